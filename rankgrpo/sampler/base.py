"""What every sampler promises to the training loop.

A sampler takes prompts as token ids and gives token ids back: the ids trained on are the ids sampled, never a
re-tokenised text. Seeds come from the caller, one a prompt, so that a rollout depends on (seed, step, prompt) and
not on what was sampled before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

FINGERPRINT_FACTOR = 0x4C957F2E


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
    eos_ids: list[int]
    """Every id that ends a completion."""
    owns_weights: bool
    """False: it samples with the trainer's own tensors. True: it is a CopySampler."""

    def sample(
        self,
        prompts: list[list[int]],
        *,
        group_size: int,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        seen: Sequence[Sequence[int]] | None = None,
        on_progress: Callable[[int], object] | None = None,
    ) -> list[list[Rollout]]:
        """Sample `group_size` completions of every prompt; temperature 0 decodes greedily.

        `seen` has catalog items for every prompt, which its lists do not name where lists are held to the catalog and
        what was seen is forbidden; no list held to the catalog is cut. `on_progress(n)` hears of every n prompts that
        are done.
        """
        ...

    def sleep(self) -> None:
        """Give memory to the trainer until `wake`."""
        ...

    def wake(self) -> None: ...


class CopySampler(Sampler, Protocol):
    """A sampler with a copy of the weights, which `sync.sync_weights` keeps equal to the trainer's."""

    dtype: torch.dtype
    holds_weights: bool
    """False between a sleep that drops them and the next load_weights."""

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the weights by the whole tensors that the iterator yields, one at a time."""
        ...

    def fingerprints(self) -> dict[str, int | None]:
        """`fingerprint` of every tensor it computes with, by the name it stores it under; None where it has none."""
        ...

    def stored_name(self, name: str) -> str:
        """Name of its tensor that holds the model's parameter `name`, maybe among others."""
        ...


def prompt_seed(seed: int, step: int, prompt_id: str) -> int:
    """A 63-bit seed that depends on (seed, step, prompt) alone, the same on every machine and Python process."""
    digest = hashlib.blake2b(f"{seed}\0{step}\0{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_prompts(prompts: list[list[int]], seeds: list[int]) -> None:
    """Raise ValueError unless every prompt has tokens and a seed."""
    if len(seeds) != len(prompts):
        raise ValueError(f"one seed a prompt: got {len(seeds)} seeds for {len(prompts)} prompts")
    if any(not prompt for prompt in prompts):
        raise ValueError("a prompt has no tokens")


def fingerprint(tensor: Tensor) -> Tensor:
    """A 0-dim int64 on the tensor's device that depends on every bit of it.

    It adds up: that of a concatenation is the sum of those of the parts, whatever their order, and zeros add
    nothing. So tensors that a sampler stores as one can be compared without knowing how it arranges them.
    """
    bits = tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).flatten()
    sums = []
    # On a CPU the chunks stay in its cache; on a GPU a kernel launch costs more than memory does.
    for chunk in bits.split(2**26 if tensor.is_cuda else 2**18):
        value = chunk.to(torch.int32)
        # v + c v^2 mod 2^32 with even c maps no two values to one, and changes of the last bit up and down do not
        # cancel, as they would in a plain sum.
        sums.append(torch.addcmul(value, value, value, value=FINGERPRINT_FACTOR).sum(dtype=torch.int64))
    return torch.stack(sums).sum() if len(sums) > 1 else sums[0]


def eos_token_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those of the model's generation config."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    extra = configured if isinstance(configured, list) else [configured]
    ids = {tokenizer.eos_token_id, *extra} - {None}
    if not ids:
        raise ValueError("neither the tokenizer nor the model's generation config names an end-of-sequence token")
    return sorted(ids)
