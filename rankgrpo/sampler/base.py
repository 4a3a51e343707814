"""What every sampler promises to the training loop.

A sampler takes prompts as token ids and gives token ids back: the ids trained on are the ids sampled, never a
re-tokenised text. Seeds come from the caller, one a prompt, so that a rollout depends on (seed, step, prompt) and
not on what was sampled before it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol


class SamplingError(RuntimeError):
    """The model cannot be sampled from."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion.

    Example: ``Rollout([412, 7, 2], [-0.1, -0.02, -0.001], "Heat (1995)\\n", finished=True)``
    """

    token_ids: list[int]
    """Sampled ids in order; the end-of-sequence id is included when it was emitted."""
    logp: list[float]
    """Natural log-probability of each sampled id under the sampling distribution (temperature applied)."""
    text: str
    """The decoded completion without special tokens."""
    finished: bool
    """False when the completion was cut at max_new_tokens before an end-of-sequence id."""


class Sampler(Protocol):
    def sample(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> list[list[Rollout]]:
        """Sample `group_size` completions of every prompt; temperature 0 decodes greedily."""
        ...


def prompt_seed(seed: int, step: int, prompt_id: str) -> int:
    """A 63-bit seed that depends on (seed, step, prompt) alone, the same on every machine and Python process."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
