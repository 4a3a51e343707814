"""The order in which a run goes through its samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    # Raw Philox words and a stable sort: numpy guarantees the stream of a bit generator across versions, and not that
    # of Generator.permutation.
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # shared by the cache
    return order


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Which samples step s trains on: a function of (seed, step), so any step can be resumed without history.

    Each epoch goes through all samples once in an order of its own; batches run on over the end of an epoch, so none is
    short. Process `dp_rank` of `dp_world` takes its contiguous share of each batch: shares in process order are the
    batch of a single process, and differ by one sample at most. Raises ValueError for impossible numbers.

    Example: BatchOrder(9638, 48, seed=1, dp_rank=0, dp_world=2).indices(step=7) -> 24 sample indices
    """

    num_samples: int
    batch_size: int
    """Samples a step over all processes."""
    seed: int
    dp_rank: int = 0
    dp_world: int = 1

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.batch_size < 1 or self.dp_world < 1 or self.seed < 0:
            raise ValueError(f"num_samples, batch_size and dp_world must be at least 1 and seed at least 0, got {self}")
        if not 0 <= self.dp_rank < self.dp_world:
            raise ValueError(f"dp_rank must be in [0, {self.dp_world}), got {self.dp_rank}")
        if self.batch_size < self.dp_world:
            raise ValueError(f"batch_size {self.batch_size} must be at least the number of processes {self.dp_world}")

    def global_indices(self, step: int) -> list[int]:
        """Sample indices of the whole batch of `step` (counted from 0)."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        position, end = step * self.batch_size, (step + 1) * self.batch_size
        indices: list[int] = []
        while position < end:
            epoch, offset = divmod(position, self.num_samples)
            order = permutation(self.num_samples, self.seed, epoch)
            indices += order[offset : offset + end - position].tolist()
            position = (epoch + 1) * self.num_samples
        return indices

    def indices(self, step: int) -> list[int]:
        """This process's share of `global_indices(step)`."""
        start, end = (rank * self.batch_size // self.dp_world for rank in (self.dp_rank, self.dp_rank + 1))
        return self.global_indices(step)[start:end]
