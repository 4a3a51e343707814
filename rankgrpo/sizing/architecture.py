"""The sizes of a model, known without its weights: the presets', or a config.json's.

Of a few types they are worked out from the sizes in the file. Any other model is built from it on torch's meta device,
without weights, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankgrpo.config import AdapterConfig, ModelConfig
from rankgrpo.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch.nn import ModuleList
    from transformers import PreTrainedConfig, PreTrainedModel

KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family. Example: PRESETS["qwen2.5-0.5b"].num_parameters is 494,032,768."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = True
    """Whether embedding and head are one matrix."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    is_counted = False
    """Whether the model was built to be counted, rather than worked out from its sizes."""

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def block_matrix_parameters(self) -> int:
        """Weights of a block that take part in matrix products."""
        return self.hidden * (2 * self.query_size + 2 * self.key_size) + 3 * self.hidden * self.ffn

    @property
    def block_parameters(self) -> int:
        biases = self.qkv_bias * (self.query_size + 2 * self.key_size) + self.output_bias * self.hidden
        return self.block_matrix_parameters + biases + 2 * self.hidden + 2 * self.head_dim * self.qk_norm

    @property
    def num_parameters(self) -> int:
        """All weights; a tied head is counted once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * self.block_parameters + self.hidden

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a block's Linear layers, by the names that transformers gives them."""
        return {
            "q_proj": (self.hidden, self.query_size),
            "k_proj": (self.hidden, self.key_size),
            "v_proj": (self.hidden, self.key_size),
            "o_proj": (self.query_size, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    def adapter_parameters(self, config: AdapterConfig) -> int:
        """Weights that the adapters add; 0 for kind = none."""
        if config.kind == "none":
            return 0
        names = self.linear_sizes if config.targets == "linear" else config.target_list
        if unknown := [name for name in names if name not in self.linear_sizes]:
            raise ConfigError(f"adapter.targets: {unknown[0]!r} is none of {', '.join(self.linear_sizes)}, or linear")
        sizes = [self.linear_sizes[name] for name in names]
        magnitudes = sum(outputs for _, outputs in sizes) if config.kind == "dora" else 0
        return self.layers * (config.rank * sum(map(sum, sizes)) + magnitudes)


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
        from rankgrpo.model.adapter import target_names

        layers = [self.model.get_submodule(name) for name in target_names(self.model, config)]
        magnitudes = sum(layer.out_features for layer in layers) if config.kind == "dora" else 0
        return magnitudes + sum(config.rank * (layer.in_features + layer.out_features) for layer in layers)


PRESETS = {
    "smollm2-135m": Architecture(576, 30, 9, 3, 64, 1536, 49152),
    "qwen2.5-0.5b": Architecture(896, 24, 14, 2, 64, 4864, 151936, qkv_bias=True),
    "llama3.2-1b": Architecture(2048, 16, 32, 8, 64, 8192, 128256),
    "llama3.2-3b": Architecture(3072, 28, 24, 8, 128, 8192, 128256),
}


def find_architecture(name: str, config: ModelConfig) -> Architecture:
    """The sizes of a preset (of tiny those in `config`) or of a folder with a config.json; ConfigError for others."""
    if name == "tiny":
        head_dim = config.hidden // config.heads
        return Architecture(
            config.hidden,
            config.layers,
            config.heads,
            config.kv_heads,
            head_dim,
            config.ffn,
            config.vocab,
            qkv_bias=True,
        )
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        known = ", ".join(("tiny", *PRESETS))
        raise ConfigError(f"{name}: no preset ({known}), and no folder with a config.json; the sizes are all it takes")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    return _from_json(raw, path)


def _from_json(raw: Mapping[str, Any], path: Path) -> Architecture:
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds {type(raw).__name__}, no configuration of a model")
    if raw.get("model_type") not in KNOWN_TYPES or raw.get("mlp_bias"):
        return count_architecture(path)
    kind = raw["model_type"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if missing := [name for name in names if not isinstance(raw.get(name), int) or raw[name] < 1]:
        raise ConfigError(f"{path}: {', '.join(missing)} must be there as positive whole numbers")
    heads = raw["num_attention_heads"]
    bias = bool(raw.get("attention_bias", False))
    return Architecture(
        hidden=raw["hidden_size"],
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        # Qwen3 has heads of 128 whatever its hidden size.
        head_dim=raw.get("head_dim") or (128 if kind == "qwen3" else raw["hidden_size"] // heads),
        ffn=raw["intermediate_size"],
        vocab=raw["vocab_size"],
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or bias,
        output_bias=kind != "qwen2" and bias,
        qk_norm=kind == "qwen3",
    )


def count_architecture(path: Path) -> CountedArchitecture:
    """The architecture of a config.json. Raises ConfigError where transformers builds no language model from it."""
    import torch  # seconds, with transformers, which the presets need not wait for
    from transformers import AutoConfig

    from rankgrpo.model.export import model_class
    from rankgrpo.model.presets import count_parameters

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


def _blocks(model: PreTrainedModel) -> ModuleList:
    """The decoder's blocks: of the lists of modules that lie in no other list, the one with the most weights."""
    from torch.nn import ModuleList

    names = [name for name, module in model.named_modules() if isinstance(module, ModuleList)]
    outer = [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
    return max(
        (model.get_submodule(name) for name in outer), key=lambda blocks: sum(p.numel() for p in blocks.parameters())
    )


def _used(blocks: ModuleList, config: PreTrainedConfig) -> Iterator[float]:
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
