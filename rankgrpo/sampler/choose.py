"""Which sampler a run uses, opened over a policy.

A process has one vLLM engine: it takes long to start and its memory cannot be had back whole. So the engine is kept,
and every model of the same shape that is sampled from later (the warm start, the best model) is loaded into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from rankgrpo.config import Config
from rankgrpo.model.adapter import merged_parameters
from rankgrpo.model.constraint import Constraint
from rankgrpo.model.policy import Policy
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.sampler.base import Sampler
from rankgrpo.sampler.constrained import ConstrainedSampler
from rankgrpo.sampler.hf import HFSampler
from rankgrpo.sampler.own_cache import ConstrainedOwnCacheSampler, OwnCacheSampler
from rankgrpo.sampler.rows import engine_rows
from rankgrpo.sampler.sync import sync_weights
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler, vllm_installed


@dataclass(frozen=True)
class _Engine:
    config: EngineConfig
    shape: str
    allowed: tuple[bool, ...]
    constraint: Constraint | None
    sampler: VLLMSampler


_engines: list[_Engine] = []


def open_sampler(policy: Policy, config: Config, parallel: Parallel) -> Sampler:
    """The sampler that rl.sampler means here; one with a copy of the weights has none before `sync.sync_weights`."""
    rl = config.rl
    if choose_sampler(rl.sampler, parallel.device) == "hf":
        return hf_sampler(policy, rows=rl.sampler_rows)
    constraint = policy.constraint
    longest = rl.max_new_tokens if constraint is None else constraint.max_tokens
    wanted = EngineConfig(
        max_tokens=config.data.max_prompt_tokens + longest,
        rows=engine_rows(config, parallel.dp_world),
        dtype=torch.bfloat16 if config.model.autocast == "bfloat16" else torch.float32,
        memory=rl.vllm_memory,
        tensor_parallel=rl.vllm_tp,
        sleep_level=rl.vllm_sleep,
    )
    shape = {key: value for key, value in policy.model.config.to_dict().items() if not key.startswith("_")}
    key = (wanted, repr(sorted(shape.items())), tuple(policy.allowed_V.tolist()))
    for engine in _engines:
        if (engine.config, engine.shape, engine.allowed) == key and same_lists(engine.constraint, constraint):
            return engine.sampler
    sampler = VLLMSampler(
        policy.model, policy.tokenizer, wanted, parallel, allowed_V=policy.allowed_V, constraint=constraint
    )
    _engines.append(_Engine(*key, constraint, sampler))
    return sampler


@contextmanager
def ready_sampler(policy: Policy, config: Config, parallel: Parallel) -> Iterator[Sampler]:
    """The run's sampler with the policy's weights, awake inside the block and asleep after it."""
    sampler = open_sampler(policy, config, parallel)
    sync_weights(sampler, policy.model)
    try:
        yield sampler
    finally:
        sampler.sleep()


def same_lists(one: Constraint | None, other: Constraint | None) -> bool:
    """Do both allow the same lists? A catalog that is opened again must not need an engine of its own."""
    if one is None or other is None or one is other:
        return one is other

    def terms(of: Constraint) -> tuple:
        trie = of.trie
        roots = (trie.root_first, trie.root_middle, trie.root_last, trie.root_only)
        return of.num_ranks, of.forbid, of.max_tokens, trie.eos_id, trie.num_lines, roots

    def arrays(of: Constraint) -> tuple[np.ndarray, ...]:
        return of.trie.token, of.trie.first_child, of.trie.line_of_leaf, of.trie.line_of_item

    return terms(one) == terms(other) and all(map(np.array_equal, arrays(one), arrays(other)))


def hf_sampler(policy: Policy, rows: int = 256) -> HFSampler:
    """A sampler over these very weights, adapters merged. Of a split model all processes sample when one does.

    A policy held to the catalog gets a ConstrainedSampler, one whose lists our cache cannot decode a sampler over the
    model's own.
    """
    paths = policy.paths
    grouped = paths.decoding == "grouped"
    kind: Callable[..., HFSampler] = HFSampler if grouped else OwnCacheSampler
    options = {"allowed_V": policy.allowed_V, "rows": rows, "logit_map": paths.logit_map}
    if policy.constraint is not None:
        kind = ConstrainedSampler if grouped else ConstrainedOwnCacheSampler
        options |= {"constraint": policy.constraint, "allowed_V": None}
    if not grouped:
        options |= {"attention": paths.attention, "padded": paths.decoding == "padded"}
        options["cached"] = paths.decoding != "uncached"
    if policy.sharding is None:
        options["autocast"] = "bfloat16" if policy.bfloat16 else None
    if policy.skeleton is None:
        return kind(policy.model, policy.tokenizer, **options)
    dtype = torch.bfloat16 if policy.bfloat16 and policy.sharding is not None else None
    return kind(policy.skeleton, policy.tokenizer, weights=lambda: merged_parameters(policy.model, dtype), **options)


def choose_sampler(name: str, device: torch.device) -> str:
    """What rl.sampler means on `device`."""
    if name == "auto":
        return "vllm" if device.type == "cuda" and torch.version.cuda and vllm_installed() else "hf"
    return name
