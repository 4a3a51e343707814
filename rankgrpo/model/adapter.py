"""Adapters through peft: LoRA, rsLoRA and DoRA beside the frozen weights of a transformer's Linear layers.

    LoRA (arXiv 2106.09685)    W' = W + s B A,                      s = alpha / rank
    rsLoRA (arXiv 2312.03732)  the same with                        s = alpha / sqrt(rank)
    DoRA (arXiv 2402.09353)    W' = m * (W + s B A) / ||W + s B A||,  norms over the inputs of every output

B starts at 0 and m at ||W||, so training starts from the model as it was; with the adapters off it is that model again,
to which the KL term of reinforcement learning refers. What samples and what is exported has the merged W' under the
names of the model without adapters. Routed experts have no adapter where one parameter holds them all (`not_adapted`),
nor have layers to which W' would mean something else than to the model without adapters (`left_out`).
Head and embeddings have none, for the streamed head reads their weight itself; of them the rows of added tokens are
trained (`model.new_tokens`).
"""

# Shape letters: O outputs, I inputs of a Linear layer; R rank of its adapter.
from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import PreTrainedModel

from rankgrpo.config import AdapterConfig
from rankgrpo.errors import ConfigError
from rankgrpo.model.new_tokens import new_rows_off, train_new_rows
from rankgrpo.runtime.distributed import full_parameters

NAME = "default"
MATRICES = {
    f".lora_A.{NAME}.weight": "A_RI",
    f".lora_B.{NAME}.weight": "B_OR",
    f".lora_magnitude_vector.{NAME}.weight": "magnitude_O",
}
"""How the names end that peft gives what it stores beside a layer, and which argument of `merged_weight` each is."""


def add_adapters(model: PreTrainedModel, config: AdapterConfig, *, seed: int) -> list[str]:
    """Freeze `model` and put trained adapters into its layers, in place; with one seed every process makes the same.

    Returns the kinds of modules that none reaches, of those that adapter.targets may mean.
    Raises ConfigError when adapter.targets names no layer.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, which runs without adapters need not wait

    names = target_names(model, config)
    without = not_adapted(model) + kinds_of(left_out(model))
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        use_dora=config.kind == "dora",
        target_modules=[f"model.{name}" for name in names],
        lora_dropout=0.0,  # old and new log-probs must differ by the update alone
        bias="none",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, _Nameless(model), NAME)
    train_new_rows(model)
    return without


class _Nameless(nn.Module):
    """A model without its configuration: by the type in it peft takes the Linear layers of a shared expert for those
    of the routed ones, whose weights are one parameter in transformers 5, and puts the adapters there."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


def not_adapted(model: nn.Module) -> list[str]:
    """Kinds of modules with matrices that no adapter reaches because they are no Linear layers: routed experts."""
    stacked = [name.rpartition(".")[0] for name, parameter in model.named_parameters() if parameter.ndim == 3]
    return [kind for kind in kinds_of(stacked) if "expert" in kind]


def kinds_of(names: Iterable[str]) -> list[str]:
    """Names of modules without the numbers of their layers."""
    return sorted({".".join(part for part in name.split(".") if not part.isdigit()) for name in names})


def left_out(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers of the text model that have no adapter, by their full names, and why: the model with adapters would
    compute something else than the model that has the merged weights."""
    layers = dict(_linear_layers(model))
    uses = Counter(id(layer.weight) for layer in layers.values())
    reasons = {}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        if uses[id(layer.weight)] > 1:
            reasons[name] = "its weight is that of other layers too"
        elif type(layer).forward is not nn.Linear.forward and not _is_a_product(layer):
            reasons[name] = "it returns something else than its product"
        elif (source := _source(type(model.get_submodule(parent)))) is None:
            reasons[name] = "the code around it cannot be read"
        elif re.search(rf"\bself\.{own}\.weight\b(?!\.(dtype|device)\b)", source):
            reasons[name] = "its weight is read without it"
    return reasons


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the text model but the head, by all of their names."""
    head = model.get_output_embeddings()
    composed = model.config.get_text_config() is not model.config
    text = set((model.get_decoder() if composed else model).modules())  # images are not trained
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and module is not head and module in text:
            yield name, module


@torch.no_grad()
def _is_a_product(layer: nn.Linear) -> bool:
    """Whether a layer with a forward of its own returns x W^T + b and nothing else; plan's layers have no values."""
    inputs = torch.linspace(-1, 1, 2 * layer.in_features).to(layer.weight).view(2, -1)
    try:
        rows = layer(inputs)
    except (RuntimeError, TypeError, ValueError):  # it takes inputs of another shape
        return False
    expected = nn.functional.linear(inputs, layer.weight, layer.bias)
    if not isinstance(rows, Tensor) or rows.shape != expected.shape:
        return False
    return rows.is_meta or is_fake(rows) or torch.allclose(rows, expected, rtol=0.02, atol=1e-3)


@cache
def _source(kind: type) -> str | None:
    if kind.__module__.startswith("torch."):
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # a class that was made at run time has none
        return None


def target_names(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Full names of the Linear layers that adapter.targets means: all of the text model but the head and those that are
    `left_out`, or those that end so."""
    without = left_out(model)
    linear = [name for name, _ in _linear_layers(model) if name not in without]
    if not linear:
        raise ConfigError(
            f"adapter.kind: {type(model).__name__} has no Linear layer that an adapter could stand beside; set "
            "adapter.kind=none"
        )
    if config.targets == "linear":
        return linear
    wanted = config.target_list
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    if unknown := [word for word in wanted if word not in kinds]:
        raise ConfigError(
            f"adapter.targets: {unknown[0]!r} is no Linear layer of {type(model).__name__} that an adapter could stand "
            f"beside; it has {', '.join(kinds)}. Name some of them with commas between, or `linear` for all"
        )
    return [name for name in linear if name.rpartition(".")[2] in wanted]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute as the model did before it had adapters. For forwards without a gradient."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with new_rows_off(model):
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merged_parameters(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """`full_parameters` with every adapter merged into its layer's weight, which has its old name again.

    Only the merged tensor that is yielded exists, no second model. It is merged in the type of the parameters and then
    cast to `dtype`. A model without adapters has its parameters yielded as `full_parameters` does.
    """
    if not has_adapters(model):
        yield from full_parameters(model, dtype)
        return
    held: dict[str, Tensor] = {}  # of one layer; its weight comes first, and the layer is complete before the next
    for name, tensor in full_parameters(model):
        layer_name, _, own = name.rpartition(".base_layer.")
        matrix = next((argument for ending, argument in MATRICES.items() if name.endswith(ending)), None)
        if own == "weight":
            held["base_OI"] = tensor
        elif matrix is None:
            yield f"{layer_name}.{own}" if layer_name else name, tensor.to(dtype or tensor.dtype)
        else:
            held[matrix] = tensor
            layer_name = name.partition(".lora_")[0]
            layer = model.get_submodule(layer_name)
            if len(held) == (4 if layer.lora_magnitude_vector else 3):
                merged_OI = merged_weight(**held, scale=layer.scaling[NAME])
                held = {}
                yield f"{layer_name}.weight", merged_OI.to(dtype or merged_OI.dtype)


def merged_weight(
    base_OI: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float, magnitude_O: Tensor | None = None
) -> Tensor:
    """W' of the module's head; with a magnitude DoRA's."""
    weight_OI = base_OI + scale * (B_OR @ A_RI)
    if magnitude_O is None:
        return weight_OI
    return (magnitude_O / weight_OI.norm(dim=1))[:, None] * weight_OI


def has_adapters(model: nn.Module) -> bool:
    return any(name.endswith(tuple(MATRICES)) for name, _ in model.named_parameters())
