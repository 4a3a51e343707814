"""What an engine in the trainer's process asks of a model: weights that it can replace, and classes of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from rankgrpo.errors import SamplingError
from rankgrpo.model.adapter import not_adapted


def plain_options(config: PreTrainedConfig, on_gpu: bool) -> dict[str, Any]:
    """Options of an engine that hold it to the plainer of its ways."""
    keys = config.get_text_config().to_dict()
    if on_gpu:
        # Others rearrange routed experts when they are read (vLLM 0.33 on Blackwell), and an update would be written in
        # their plain order over that.
        return {"moe_backend": "triton"} if any("experts" in key for key in keys) else {}
    # A prompt with a seed that is read in two pieces ends the engine: vLLM then takes back what the generator drew,
    # which torch's generators on CPUs cannot (vLLM 0.32, `GPUModelRunner._bookkeeping_sync`). Layers that carry states,
    # which show in the names of their sizes, need such pieces, so there long prompts can still end it.
    carries_states = any(re.match(r"mamba_|ssm_|conv_|linear_(conv|key|num|value)_", key) for key in keys)
    return {} if carries_states else {"enable_chunked_prefill": False}


def check_replaceable(model: nn.Module, device: torch.device) -> None:
    """Raise SamplingError for weights that an engine keeps in another form than they have, so that after an update
    nobody could tell whether it has them."""
    if any({"A_log", "D"} <= module._parameters.keys() for module in model.modules()):
        raise SamplingError(
            "vLLM keeps the decay of this model's Mamba layers (A_log) in another form, so the weights it samples with "
            "cannot be compared with the trainer's; set rl.sampler=hf"
        )
    if device.type == "cpu" and (kinds := not_adapted(model)):
        raise SamplingError(
            f"vLLM on a CPU packs routed experts ({kinds[0]}) when it has read them, so they cannot be replaced while "
            f"it runs; set rl.sampler=hf"
        )


@contextmanager
def shared_classes(model: PreTrainedModel) -> Iterator[None]:
    """Keep the classes of `model` usable by the trainer while an engine is started in the block, and after it.

    For architectures without code of its own vLLM builds transformers' model and rewrites the decoder's class in place:
    `__init__` then asks for vLLM's configuration, and `__call__` for what that `__init__` has set. The trainer's models
    are of the same class, those it has and those it opens later.
    """
    kinds = {
        kind
        for module in model.modules()
        for kind in type(module).__mro__
        if issubclass(kind, PreTrainedModel) and "__call__" not in vars(kind)
    }
    plain = {kind: (kind.__init__, kind.__call__) for kind in kinds}
    try:
        yield
    finally:
        for kind, own in plain.items():
            if "__call__" in vars(kind):
                _share(kind, *own)


def _share(kind: type[PreTrainedModel], init: Callable, call: Callable) -> None:
    """Give a rewritten class its own `init` and `call` back, but for the models that vLLM builds of it."""
    from vllm.config import get_current_vllm_config_or_none

    engine_init, engine_call = kind.__init__, kind.__call__

    @wraps(init)
    def __init__(self, *args, **kwargs):
        in_vllm = get_current_vllm_config_or_none() is not None
        (engine_init if in_vllm else init)(self, *args, **kwargs)

    @wraps(call)
    def __call__(self, *args, **kwargs):
        built_by_vllm = "do_not_compile" in vars(self)
        return (engine_call if built_by_vllm else call)(self, *args, **kwargs)

    kind.__init__, kind.__call__ = __init__, __call__
