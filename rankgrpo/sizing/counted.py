"""The sizes of any other model, built from its configuration on torch's meta device, without weights, and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from rankgrpo.config import AdapterConfig
from rankgrpo.errors import ConfigError, ModelError
from rankgrpo.model.adapter import target_names
from rankgrpo.model.export import model_class
from rankgrpo.model.presets import count_parameters
from rankgrpo.sizing.architecture import Architecture

EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class CountedArchitecture(Architecture):
    """A model whose weights are counted, and whose activations are taken for those of a dense decoder of its sizes.

    Its blocks stand for their mean, and of its experts a token's share is computed with.
    """

    is_counted = True
    model: PreTrainedModel | None = None
    parameters: int = 0
    parameters_a_block: int = 0
    matrices_a_block: int = 0
    """Weights of a block that a token is multiplied with."""

    @property
    def num_parameters(self) -> int:
        return self.parameters

    @property
    def block_parameters(self) -> int:
        return self.parameters_a_block

    @property
    def block_matrix_parameters(self) -> int:
        return self.matrices_a_block

    def adapter_parameters(self, config: AdapterConfig) -> int:
        """Weights that the adapters add to the Linear layers there are; 0 for kind = none."""
        if config.kind == "none":
            return 0
        layers = [self.model.get_submodule(name) for name in target_names(self.model, config)]
        magnitudes = sum(layer.out_features for layer in layers) if config.kind == "dora" else 0
        return magnitudes + sum(config.rank * (layer.in_features + layer.out_features) for layer in layers)


def count_architecture(path: Path) -> CountedArchitecture:
    """The architecture of a config.json. Raises ConfigError where transformers builds no language model from it."""
    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
        with torch.device("meta"):
            model = model_class(str(path.parent)).from_config(config)
    except (ValueError, KeyError, ModelError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{path}: transformers builds no language model from it ({line})") from None
    model.tie_weights()
    text = config.get_text_config()
    blocks = _blocks(model)
    heads = _first(text, "num_attention_heads", "n_head", "num_heads") or 1
    head_dim = _first(text, "head_dim") or text.hidden_size // heads
    kv_heads = _first(text, "num_key_value_heads") or heads
    matrices = round(sum(_used(blocks, text)) / len(blocks))
    attention = text.hidden_size * head_dim * 2 * (heads + kv_heads)
    return CountedArchitecture(
        hidden=text.hidden_size,
        layers=len(blocks),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=max((matrices - attention) // (3 * text.hidden_size), 0),
        vocab=text.vocab_size,
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        model=model,
        parameters=count_parameters(model),
        parameters_a_block=round(count_parameters(blocks) / len(blocks)),
        matrices_a_block=matrices,
    )


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's blocks: of the lists of modules that lie in no other list, the one with the most weights."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return max((model.get_submodule(name) for name in outer), key=count_parameters)


def _used(blocks: nn.ModuleList, config: PreTrainedConfig) -> Iterator[float]:
    """Weights of every matrix of the blocks, of a routed expert's the share of the experts that a token goes to."""
    a_token = _first(config, *EXPERTS_A_TOKEN)
    lists = Counter(name.rpartition(".")[0] for name, m in blocks.named_modules() if name.endswith(tuple("0123456789")))
    for name, parameter in blocks.named_parameters():
        if parameter.ndim < 2:
            continue
        share = 1.0
        if a_token and ".experts." in name and parameter.ndim == 3:
            share = a_token / parameter.shape[0]
        elif a_token and ".experts." in name:
            share = a_token / max(lists[name.partition(".experts.")[0] + ".experts"], 1)
        yield share * parameter.numel()


def _first(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of these keys that the configuration has as a number."""
    values = config.to_dict()
    return next((values[name] for name in names if isinstance(values.get(name), int) and values[name] > 0), None)
