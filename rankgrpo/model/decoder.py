"""A Qwen2, Qwen3 or Llama model in plain PyTorch, for one list from the command line.

Importing a model of transformers takes longer than a list does, and there is no need of it where the folder was written
by `model.presets.save_policy` and its configuration asks for nothing that is not here: `open_decoder` reads every key
and every tensor's name, and declines what it does not know. The forward pass is that of the transformers model of the
same folder, and a test holds the two together.
"""

# Shape letters: B rows, S tokens of a row, D hidden, H head size, V vocabulary.
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rankgrpo.model.plain_tokenizer import PlainTokenizer, open_plain_tokenizer

FAMILIES = ("qwen2", "qwen3", "llama")
# Keys that change nothing of a forward pass without dropout in float32, or whose effect is seen in the tensors' names.
IDLE_KEYS = frozenset(
    "_name_or_path architectures attention_bias attention_dropout bos_token_id dtype eos_token_id initializer_range "
    "max_position_embeddings max_window_layers mlp_bias model_type pad_token_id sliding_window transformers_version "
    "use_cache vocab_size".split()
)
SIZES = frozenset("hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads".split())


@dataclass(frozen=True)
class Shape:
    """What a configuration says of the forward pass."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    tied: bool


def read_shape(config: Mapping[str, Any]) -> Shape | None:
    """The forward pass of a transformers configuration, or None when it is not one of those written here."""
    rope = config.get("rope_parameters")
    fixed = {
        "hidden_act": config.get("hidden_act") == "silu",
        "use_sliding_window": not config.get("use_sliding_window", False),
        "layer_types": set(config.get("layer_types") or ["full_attention"]) == {"full_attention"},
        "pretraining_tp": config.get("pretraining_tp", 1) == 1,
        "rope_parameters": isinstance(rope, dict)
        and set(rope) == {"rope_theta", "rope_type"}
        and rope["rope_type"] == "default",
    }
    read = SIZES | {"head_dim", "rms_norm_eps", "tie_word_embeddings"}
    known = IDLE_KEYS | read | fixed.keys()
    if config.get("model_type") not in FAMILIES or not all(fixed.values()) or config.keys() - known:
        return None
    if not SIZES <= config.keys():
        return None
    heads = config["num_attention_heads"]
    return Shape(
        family=config["model_type"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        eps=config["rms_norm_eps"],
        rope_theta=rope["rope_theta"],
        tied=config["tie_word_embeddings"],
    )


class Decoder(nn.Module):
    """The model of a folder, as far as the samplers of `rankgrpo.sampler` need one; they set `attend`."""

    def __init__(self, shape: Shape, weights: dict[str, Tensor], eos_ids: list[int]):
        """`weights` by the names of the file. Raises KeyError for a tensor that is missing, ValueError for others."""
        super().__init__()
        self.shape = shape
        self.attend: Callable | None = None
        """A sampler's attention, with the arguments that transformers gives to one."""
        self.generation_config = SimpleNamespace(eos_token_id=eos_ids)
        left = dict(weights)
        self.embedding_VD = left.pop("model.embed_tokens.weight")
        self.norm_D = left.pop("model.norm.weight")
        self.layers = [_Layer(index, left, shape) for index in range(shape.layers)]
        head_VD = self.embedding_VD if shape.tied else left.pop("lm_head.weight")
        if left:
            raise ValueError(f"tensors that no part of the model takes: {', '.join(sorted(left))}")
        vocab, hidden = head_VD.shape
        self.head = nn.Linear(hidden, vocab, bias=False, device="meta")
        self.head.weight = nn.Parameter(head_VD, requires_grad=False)
        self.inverse_H = 1.0 / shape.rope_theta ** (torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def base_model(self) -> Callable:
        return self

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, ids_BS: Tensor, *, position_ids: Tensor, use_cache: bool, grouped_cache: Any) -> SimpleNamespace:
        """Hidden states behind the last norm, (B, S, D); keys and values are in `grouped_cache`."""
        if use_cache:
            raise ValueError("keys and values are kept in grouped_cache, not in a cache of transformers")
        angle_BSH = position_ids[..., None].float() * self.inverse_H
        cos, sin = angle_BSH.cos()[:, None], angle_BSH.sin()[:, None]
        hidden_BSD = F.embedding(ids_BS, self.embedding_VD)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, cos, sin, self.attend, grouped_cache)
        return SimpleNamespace(last_hidden_state=F.rms_norm(hidden_BSD, self.norm_D.shape, self.norm_D, self.shape.eps))


class _Layer:
    def __init__(self, index: int, weights: dict[str, Tensor], shape: Shape):
        prefix = f"model.layers.{index}."
        self.layer_idx, self.shape = index, shape

        def take(name: str) -> Tensor:
            return weights.pop(prefix + name)

        def linear(name: str) -> tuple[Tensor, Tensor | None]:
            return take(f"{name}.weight"), weights.pop(f"{prefix}{name}.bias", None)

        self.before_attention, self.before_mlp = take("input_layernorm.weight"), take("post_attention_layernorm.weight")
        self.query, self.key, self.value, self.out = (linear(f"self_attn.{name}_proj") for name in "qkvo")
        self.gate, self.up, self.down = (linear(f"mlp.{name}_proj") for name in ("gate", "up", "down"))
        normed = shape.family == "qwen3"
        self.query_norm, self.key_norm = (take(f"self_attn.{x}_norm.weight") if normed else None for x in "qk")

    def __call__(self, hidden_BSD: Tensor, cos: Tensor, sin: Tensor, attend: Callable, cache: Any) -> Tensor:
        shape, (B, S, _) = self.shape, hidden_BSD.shape
        normed_BSD = self._norm(hidden_BSD, self.before_attention)

        def heads(linear: tuple[Tensor, Tensor | None], norm: Tensor | None = None) -> Tensor:
            projected = F.linear(normed_BSD, *linear).view(B, S, -1, shape.head_dim)
            return (projected if norm is None else self._norm(projected, norm)).transpose(1, 2)

        query, key, value = heads(self.query, self.query_norm), heads(self.key, self.key_norm), heads(self.value)
        out, _ = attend(
            self,
            _rotate(query, cos, sin),
            _rotate(key, cos, sin),
            value,
            None,
            scaling=shape.head_dim**-0.5,
            grouped_cache=cache,
        )
        hidden_BSD = hidden_BSD + F.linear(out.reshape(B, S, -1), *self.out)
        normed_BSD = self._norm(hidden_BSD, self.before_mlp)
        return hidden_BSD + F.linear(
            F.silu(F.linear(normed_BSD, *self.gate)) * F.linear(normed_BSD, *self.up), *self.down
        )

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.shape.eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def open_decoder(folder: Path) -> tuple[Decoder, PlainTokenizer] | None:
    """The model and the tokenizer of an export on the CPU, in float32; None for a folder that needs transformers."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if not (weights.is_file() and config.is_file()):
        return None
    shape, tokenizer = read_shape(json.loads(config.read_text(encoding="utf-8"))), open_plain_tokenizer(folder)
    if shape is None or tokenizer is None:
        return None
    tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    try:
        model = Decoder(shape, tensors, [tokenizer.eos_token_id])
    except (KeyError, ValueError):
        return None  # tensors of another model than the configuration says; transformers finds the words
    return (model.eval(), tokenizer) if len(tokenizer) <= len(model.head.weight) else None
