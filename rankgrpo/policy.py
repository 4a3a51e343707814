"""A model ready to train and to sample from: weights, tokenizer, the ids it may emit, its compute type."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankgrpo.attention import use_shared_prefix
from rankgrpo.config import ModelConfig
from rankgrpo.logprob import Impl, pack_logprobs
from rankgrpo.model import load_policy, valid_token_mask
from rankgrpo.packing import Group, Pack, build_pack
from rankgrpo.sampler.hf import HFSampler


@dataclass(frozen=True)
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    allowed_V: Tensor
    """(V,) bool: ids the tokenizer knows. The others are masked in sampling and in training alike."""
    autocast: bool
    """bfloat16 matrix products; parameters stay float32."""
    impl: Impl = "torch"
    """Of the head and the loss."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    def logprobs(self, groups: list[Group], *, temperature: float = 1.0) -> tuple[Pack, Tensor]:
        """Pack whole groups and return the pack with the completions' token log-probabilities, (B, T) float32."""
        pack = build_pack(groups, self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logp_BT = pack_logprobs(self.model, pack, temperature=temperature, impl=self.impl, allowed_V=self.allowed_V)
        return pack, logp_BT

    def sampler(self, rows: int = 256) -> HFSampler:
        """A sampler over these very weights."""
        return HFSampler(
            self.model,
            self.tokenizer,
            allowed_V=self.allowed_V,
            rows=rows,
            autocast="bfloat16" if self.autocast else None,
        )


def open_policy(source: str | Path, config: ModelConfig, device: torch.device, *, trainable: bool = True) -> Policy:
    """Load a model folder or hub id with the shared-prefix attention; a reference is loaded frozen."""
    model, tokenizer = load_policy(str(source), device=device)
    use_shared_prefix(model)
    if config.gradient_checkpointing and trainable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.requires_grad_(trainable)
    model.train(trainable)
    allowed_V = valid_token_mask(model, tokenizer).to(device)
    impl = choose_impl(config.kernels, device)
    return Policy(model, tokenizer, allowed_V, autocast=config.autocast == "bfloat16", impl=impl)


def choose_impl(kernels: str, device: torch.device) -> Impl:
    """What model.kernels means on `device`."""
    if kernels == "auto":
        installed = all(importlib.util.find_spec(name) for name in ("triton", "rankgrpo_kernels"))
        return "triton" if device.type == "cuda" and installed else "torch"
    return kernels
