"""The sizes of a model, known without its weights: the presets', or a config.json's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankgrpo.config import AdapterConfig, ModelConfig
from rankgrpo.errors import ConfigError

KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3")


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
    """Whether a model was built to be counted (`rankgrpo.sizing.counted`), rather than worked out from its sizes."""

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
    if raw.get("model_type") not in KNOWN_TYPES:
        from rankgrpo.sizing.counted import count_architecture  # transformers, which the presets need not wait for

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
