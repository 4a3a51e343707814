"""Weighted means and sums of a step, gathered over micro-batches and over processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankgrpo.runtime.distributed import Parallel


class Means:
    """Named weighted means and sums over micro-batches and processes; a process may know names that others do not.

    Example: ``means.add("list/items_mean", total, count)``, ``means.add_sum("loss/policy", value)``
    """

    def __init__(self) -> None:
        self.pairs: dict[str, list[float]] = {}
        self.sums: dict[str, float] = {}

    def add(self, name: str, total: float, count: float) -> None:
        pair = self.pairs.setdefault(name, [0.0, 0.0])
        pair[0] += float(total)
        pair[1] += float(count)

    def add_sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def reduce(self, parallel: Parallel) -> dict[str, float]:
        """Means and sums over all processes; a mean of nothing is left out."""
        names, sum_names = (_union(parallel, list(kind)) for kind in (self.pairs, self.sums))
        flat = [value for name in names for value in self.pairs.get(name, (0.0, 0.0))]
        values = parallel.sum(flat + [self.sums.get(name, 0.0) for name in sum_names])
        pairs = zip(names, values[0 : 2 * len(names) : 2], values[1 : 2 * len(names) : 2], strict=True)
        means = {name: total / count for name, total, count in pairs if count > 0}
        return means | dict(zip(sum_names, values[2 * len(names) :], strict=True))


def _union(parallel: Parallel, names: list[str]) -> list[str]:
    return sorted({name for theirs in parallel.gather(names) for name in theirs})
