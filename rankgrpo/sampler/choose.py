"""Which sampler a run uses, opened."""

from __future__ import annotations

import math

import torch

from rankgrpo.config import Config
from rankgrpo.model.policy import Policy
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.sampler.base import Sampler
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler, vllm_installed


def open_sampler(policy: Policy, config: Config, parallel: Parallel) -> Sampler:
    """The sampler that rl.sampler means here; one with a copy of the weights has none before `sync.sync_weights`."""
    rl = config.rl
    if choose_sampler(rl.sampler, parallel.device) == "hf":
        return policy.sampler(rows=rl.sampler_rows)
    lists = rl.vllm_tp * math.ceil(rl.prompts_per_step / parallel.dp_world) * rl.group_size
    engine = EngineConfig(
        max_tokens=config.data.max_prompt_tokens + rl.max_new_tokens,
        rows=min(rl.sampler_rows, max(lists, rl.eval_samples)),
        dtype=torch.bfloat16 if config.model.autocast == "bfloat16" else torch.float32,
        memory=rl.vllm_memory,
        tensor_parallel=rl.vllm_tp,
        sleep_level=rl.vllm_sleep,
    )
    return VLLMSampler(policy.model, policy.tokenizer, engine, parallel, allowed_V=policy.allowed_V)


def choose_sampler(name: str, device: torch.device) -> str:
    """What rl.sampler means on `device`."""
    if name == "auto":
        return "vllm" if device.type == "cuda" and torch.version.cuda and vllm_installed() else "hf"
    return name
