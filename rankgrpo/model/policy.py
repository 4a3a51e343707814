"""A model ready to train and to sample from: weights, tokenizer, the ids it may emit, its compute type.

Parameters are float32 and model.autocast="bfloat16" computes in bfloat16: a whole model under torch.autocast, a split
one from parameters that are gathered in bfloat16.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankgrpo.config import AdapterConfig, ModelConfig
from rankgrpo.data.samples import Sample
from rankgrpo.errors import ConfigError
from rankgrpo.files.atomic import atomic_folder
from rankgrpo.items.allowed_ids import AllowedIds
from rankgrpo.items.catalog import Catalog
from rankgrpo.logprob import Impl
from rankgrpo.model.adapter import adapters_off, add_adapters, has_adapters, merged_parameters
from rankgrpo.model.attention import can_share_prefix, set_attention, use_shared_prefix
from rankgrpo.model.constraint import Constraint, forbidden_items
from rankgrpo.model.dropout import switch_off_dropout
from rankgrpo.model.forward import pack_logprobs, row_logprobs
from rankgrpo.model.head import LogitMap, find_logit_map, valid_token_mask
from rankgrpo.model.new_tokens import has_new_rows
from rankgrpo.model.packing import Group, Pack, build_pack, plan_micro_batches
from rankgrpo.model.presets import load_policy, save_policy
from rankgrpo.model.recurrent import read_again
from rankgrpo.runtime.distributed import Parallel, Sharding, shard_model

Item = TypeVar("Item")


@dataclass(frozen=True)
class Paths:
    """How a model is computed: what `rankgrpo.sampler.verify` found to be exact, fastest first."""

    packing: Literal["shared", "padded", "alone"] = "shared"
    """shared: packs with each prompt once. Else the model's own dense forward, over a padded batch or a row a time."""
    decoding: Literal["grouped", "padded", "alone", "uncached"] = "grouped"
    """grouped: our cache, each prompt once. Else transformers' generate, with the model's own cache and prompts padded
    on the left, or of one length at a time; or without a cache."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Of everything that is not ours."""
    logit_map: LogitMap | None = None
    """What the model does to its head's product; None where nobody asked, and then touching it is an error."""


@dataclass(frozen=True)
class Policy:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    allowed_V: Tensor
    """(V,) bool: ids the tokenizer knows. The others are masked in sampling and in training alike."""
    bfloat16: bool
    """Whether matrix products are in bfloat16; parameters stay float32."""
    impl: Impl = "torch"
    """Implementation of the head and the loss."""
    sharding: Sharding | None = None
    """How the model is split among the processes; None: it is whole on every one."""
    skeleton: PreTrainedModel | None = None
    """The plain model with empty parameters, which sampling fills; a split model has one, and a model with adapters."""
    without_adapters: bool = False
    """Whether log-probs are those of the model before it was given adapters."""
    constraint: Constraint | None = None
    """What lists are held to, also by whoever samples from the policy; None: any list may be written."""
    paths: Paths = Paths()
    dropout: tuple[str, ...] = ()
    """Rates of dropout that were switched off for training, as key = rate."""
    not_adapted: tuple[str, ...] = ()
    """Kinds of modules that no adapter reaches, where there are adapters."""

    @property
    def device(self) -> torch.device:
        return self.allowed_V.device

    def seen(self, samples: Sequence[Sample], catalog: Catalog) -> list[tuple[int, ...]]:
        """For every sample the items that its lists must not name: what was seen, where that is forbidden, and all but
        its candidates, where it brings any. Nothing where lists are not held to the catalog."""
        return forbidden_items(self.constraint, samples, catalog)

    def allowed_ids(self, groups: list[Group]) -> AllowedIds | None:
        """The ids that were allowed at every token of every list; None for a policy that may write any list."""
        return None if self.constraint is None else self.constraint.choices(groups).for_head().to(self.device)

    def logprobs(
        self, groups: list[Group], *, temperature: float = 1.0, allowed: AllowedIds | None = None
    ) -> tuple[Pack, Tensor]:
        """Pack whole groups and return the pack with the completions' token log-probabilities, (B, T) float32.

        allowed: `allowed_ids` of the groups, where several passes share it.
        """
        pack, paths = build_pack(groups, self.device), self.paths
        allowed = self.allowed_ids(groups) if allowed is None else allowed
        autocast = self.bfloat16 and self.sharding is None
        switch = adapters_off(self.model) if self.without_adapters else nullcontext()
        with switch, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            options = {
                "temperature": temperature,
                "impl": self.impl,
                "allowed_V": self.allowed_V,
                "allowed": allowed,
                "logit_map": paths.logit_map,
            }
            if paths.packing == "shared":
                return pack, pack_logprobs(self.model, pack, **options)
            logp_BT = row_logprobs(self.model, pack, groups, alone=paths.packing == "alone", **options)
        return replace(pack, tokens_shared=pack.tokens_dense), logp_BT

    def micro_batches(self, groups: Sequence[Group], token_budget: int) -> list[list[int]]:
        """`plan_micro_batches` by the tokens that this policy computes for a group."""
        return plan_micro_batches(groups, token_budget, dense=self.paths.packing != "shared")

    def paced(self, batch: Sequence[Item]) -> Iterator[Item]:
        """Every item of `batch`, each for one pass, and after them the passes that other processes still make.

        A pass is one call of `logprobs`, with its backward where gradients are recorded. A split model takes all
        processes for each; those made here add nothing.
        """
        num_passes = len(batch) if self.sharding is None else self.sharding.parallel.max(len(batch))
        yield from batch
        eos = self.tokenizer.eos_token_id
        nothing = None if self.constraint is None else AllowedIds.from_lists([[eos]], [eos]).to(self.device)
        for _ in range(num_passes - len(batch)):
            _, logp_BT = self.logprobs([Group([eos], [[eos]])], allowed=nothing)
            if torch.is_grad_enabled():
                (0.0 * logp_BT.sum()).backward()

    def export(self, folder: Path, parallel: Parallel) -> None:
        """Write the policy to `folder` in Hugging Face format, whole or not at all; every process takes part.

        Adapters are merged: the folder holds a plain model.
        """
        parameters = merged_parameters(self.model)
        if parallel.is_main:
            with atomic_folder(folder) as temporary:
                save_policy(self.skeleton or self.model, self.tokenizer, temporary, parameters)
        for _ in parameters:
            pass  # the other processes' part in gathering them


def open_policy(
    source: str | Path,
    config: ModelConfig,
    device: torch.device,
    *,
    trainable: bool = True,
    sharding: Sharding | None = None,
    adapter: AdapterConfig | None = None,
    seed: int = 0,
) -> Policy:
    """Load a model folder or hub id with the shared-prefix attention; a reference is loaded frozen.

    With `adapter` only adapters are trained, which `seed` begins. It has no place in a frozen model.
    """
    # A split model is read into host memory and reaches the device block by block: whole it may not fit there.
    model, tokenizer = load_policy(str(source), device=device if sharding is None else "cpu")
    paths = Paths(logit_map=find_logit_map(model))
    if config.attention == "dense" or (config.attention == "auto" and not can_share_prefix(model)):
        paths = replace(paths, packing="padded", attention="eager")
    else:
        use_shared_prefix(model)
    dropout = tuple(switch_off_dropout(model)) if trainable else ()
    if config.gradient_checkpointing and trainable:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"model.gradient_checkpointing: {type(model).__name__} does not recompute its layers; set "
                "model.gradient_checkpointing=false"
            )
        # transformers 5.24 warns of the second name, 5.20 has no other.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": read_again})
    model.requires_grad_(trainable)
    model.train(trainable)
    allowed_V = valid_token_mask(model, tokenizer).to(device)
    bfloat16, impl = config.autocast == "bfloat16", choose_impl(config.kernels, device)
    adapted = trainable and adapter is not None and adapter.kind != "none"
    skeleton = empty_copy(model, device) if sharding is not None or adapted else None
    if adapted and sharding is not None and has_new_rows(model):
        raise ConfigError(
            "adapter.kind with model.new_tokens trains a few rows of the embeddings, which a split model cannot; set "
            "parallel.shard=none, or adapter.kind=none"
        )
    not_adapted = tuple(add_adapters(model, adapter, seed=seed)) if adapted else ()
    if sharding is not None:
        shard_model(model, sharding, bfloat16=bfloat16)
    return Policy(
        model,
        tokenizer,
        allowed_V,
        bfloat16,
        impl,
        sharding,
        skeleton,
        paths=paths,
        dropout=dropout,
        not_adapted=not_adapted,
    )


def open_reference(
    policy: Policy, source: str | Path, config: ModelConfig, device: torch.device, sharding: Sharding | None
) -> Policy:
    """The frozen model `source` that `policy` was opened from: a second copy, or the policy without its adapters."""
    if has_adapters(policy.model):
        return replace(policy, without_adapters=True)
    ref = open_policy(source, config, device, trainable=False, sharding=sharding)
    return with_paths(replace(ref, constraint=policy.constraint), policy.paths)


def with_paths(policy: Policy, paths: Paths) -> Policy:
    """The policy on these paths, its model's attention switched."""
    if paths.packing == "shared":
        use_shared_prefix(policy.model)
    else:
        set_attention(policy.model, paths.attention)
    return replace(policy, paths=paths)


def empty_copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on `device` with parameters of no elements, frozen; ties are kept."""
    empty = {id(p): nn.Parameter(p.new_empty(0, device=device), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, empty).to(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are the device's own: a CPU without AVX-512 converts every operand first."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_impl(kernels: str, device: torch.device) -> Impl:
    """What model.kernels means on `device`."""
    if kernels == "auto":
        installed = all(importlib.util.find_spec(name) for name in ("triton", "rankgrpo_kernels"))
        return "triton" if device.type == "cuda" and installed else "torch"
    return kernels
