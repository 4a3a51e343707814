"""Recall, NDCG, what the union of several lists finds, and bootstrap intervals over them.

Standard definitions, those behind the examples in appendix F of arXiv 2510.20150: positions stay in place (a line that
is wrong or not in the catalog keeps its rank) and the ideal list holds min(#ground truth, k) hits. Float64 throughout.
What counts as a hit is decided in `rankgrpo.reward.relevance`. The intervals resample the samples: they hold the model
fixed and say nothing about training seeds.
"""

# Shape letters: B samples, K ranks, N values, R resamples, M lists a sample. B may be absent: hits (K,) and a scalar
# count.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rankgrpo.reward import dcg_discounts

MAX_DRAWS = 1 << 22  # resampled values held at once: 32 MiB of indices


def recall_at_k(hits_BK: Tensor, num_groundtruth_B: Tensor, k: int) -> Tensor:
    """Share of the ground truth found in the first k ranks, float64 (B,): sum over j <= k of hit_j / #groundtruth.

    Raises ValueError for hits that are not 0 or 1, k outside 1..K, no ground truth, or more hits than ground truth.
    """
    hits_BK, num_groundtruth_B = _checked(hits_BK, num_groundtruth_B, k)
    return hits_BK[..., :k].sum(-1) / num_groundtruth_B


def ndcg_at_k(hits_BK: Tensor, num_groundtruth_B: Tensor, k: int) -> Tensor:
    """DCG@k over the DCG@k of the best possible list, float64 (B,).

    DCG@k = sum over j <= k of hit_j / log2(j + 1); the best list has min(#groundtruth, k) hits on top.
    Raises ValueError as `recall_at_k` does.
    """
    hits_BK, num_groundtruth_B = _checked(hits_BK, num_groundtruth_B, k)
    discounts_K = dcg_discounts(k).to(hits_BK.device)
    ideal_K = discounts_K.cumsum(0)
    return (hits_BK[..., :k] * discounts_K).sum(-1) / ideal_K[num_groundtruth_B.clamp(max=k) - 1]


def graded_ndcg_at_k(gain_BK: Tensor, best_BJ: Tensor, k: int) -> Tensor:
    """DCG@k of gains over that of the best possible list, float64 (B,).

    DCG@k = sum over j <= k of gain_j / log2(j + 1). For gains of 1 these are the very numbers of `ndcg_at_k`.

    Args:
      gain_BK: what each rank earned, 0 or more.
      best_BJ: the gains of all there is to find, highest first, filled up with 0 to any length J.

    Raises ValueError for k outside 1..K, for gains below 0 or not finite, for nothing to find, and for a list that
      earned more than there is.
    """
    gain_BK, best_BJ = torch.as_tensor(gain_BK).double(), torch.as_tensor(best_BJ).double()
    if gain_BK.ndim == 0 or gain_BK.ndim != best_BJ.ndim or gain_BK.shape[:-1] != best_BJ.shape[:-1]:
        raise ValueError(
            f"gains must be (B, K) and the best gains (B, J), got {tuple(gain_BK.shape)} and {tuple(best_BJ.shape)}"
        )
    if not 1 <= k <= gain_BK.shape[-1]:
        raise ValueError(f"k must be in 1..{gain_BK.shape[-1]}, the ranks that gains cover, got {k}")
    for name, gains in (("gains", gain_BK), ("best gains", best_BJ)):
        if not (gains.isfinite() & (gains >= 0)).all():
            raise ValueError(f"{name} must be finite and 0 or more")
    if (best_BJ[..., 1:] > best_BJ[..., :-1]).any() or not (best_BJ[..., :1] > 0).all():
        raise ValueError("best gains must fall from a first one above 0: leave samples without ground truth out")
    if (gain_BK.sum(-1) > best_BJ.sum(-1) * (1 + 1e-6)).any():
        raise ValueError("a list has earned more than its ground truth is worth: an item was counted twice")
    discounts_K = dcg_discounts(k).to(gain_BK.device)
    ideal_BK = torch.zeros(*best_BJ.shape[:-1], k, dtype=torch.float64, device=gain_BK.device)
    num_best = min(k, best_BJ.shape[-1])
    ideal_BK[..., :num_best] = best_BJ[..., :num_best]
    return (gain_BK[..., :k] * discounts_K).sum(-1) / (ideal_BK * discounts_K).cumsum(-1)[..., -1]


def hit_rate_by_rank(hits_BK: Tensor) -> Tensor:
    """Share of samples with a hit at each rank, float64 (K,). Raises ValueError for a wrong shape or no samples."""
    hits_BK = torch.as_tensor(hits_BK)
    if hits_BK.ndim != 2 or hits_BK.shape[0] == 0:
        raise ValueError(f"hits must have shape (B, K) with B >= 1, got {tuple(hits_BK.shape)}")
    return hits_BK.double().mean(0)


def union_chance(num_lists: int, num_drawn: int) -> Tensor:
    """Chance that `num_drawn` of M = `num_lists` lists hold an item that c of the M hold; float64 (M + 1,) over c.

    1 - C(M - c, n) / C(M, n) for n lists drawn without replacement: the estimator of pass@n of arXiv 2107.03374, which
    is unbiased for n lists sampled anew. Raises ValueError unless 1 <= num_drawn <= num_lists.
    """
    if not 1 <= num_drawn <= num_lists:
        raise ValueError(f"a union is of 1 to {num_lists} lists, as many as were sampled, got {num_drawn}")
    ways = math.comb(num_lists, num_drawn)
    without_M = [math.comb(num_lists - count, num_drawn) / ways for count in range(num_lists + 1)]
    return 1 - torch.tensor(without_M, dtype=torch.float64)


def union_recall(
    num_holding: Sequence[Sequence[int]], num_groundtruth: Sequence[int], *, num_lists: int, num_drawn: int
) -> Tensor:
    """Share of the ground truth in the union of `num_drawn` lists, float64 (B,), expected over which are drawn.

    1 / #groundtruth * sum over its items j of `union_chance` at c_j, the number of the M = `num_lists` sampled lists in
    which j is a hit. num_holding: by sample the c_j of the items found at all; the others count as 0.
    Raises ValueError as `union_chance` does, and for a sample with fewer items than were found.
    """
    chance_M = union_chance(num_lists, num_drawn)
    recall_B = torch.zeros(len(num_groundtruth), dtype=torch.float64)
    for place, (counts, total) in enumerate(zip(num_holding, num_groundtruth, strict=True)):
        if len(counts) > total or total < 1:
            raise ValueError(f"sample {place}: {len(counts)} items found of a ground truth of {total}")
        recall_B[place] = chance_M[list(counts)].sum() / total
    return recall_B


def gini(counts: Sequence[int] | Tensor) -> float:
    """Gini coefficient of how often each item of the catalog was recommended: 0 all alike, 1 - 1/N one item always.

    Raises ValueError for negative counts and where nothing was recommended.
    """
    sorted_N = torch.as_tensor(counts, dtype=torch.float64).sort().values
    if sorted_N.ndim != 1 or not sorted_N.numel() or sorted_N[0] < 0 or not sorted_N.sum() > 0:
        raise ValueError("Gini needs the counts of one item or more, none negative and not all 0")
    num_items = len(sorted_N)
    place_N = torch.arange(1, num_items + 1, dtype=torch.float64)
    return float(2 * (place_N * sorted_N).sum() / (num_items * sorted_N.sum()) - (num_items + 1) / num_items)


def bootstrap_interval(
    values: Sequence[float] | Tensor | np.ndarray, *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of the values with its percentile-bootstrap interval: (mean, low, high).

    Raises ValueError for values that are not a non-empty finite vector, level outside (0, 1) or num_resamples < 1.
    """
    values_N = _vector(values, "values")
    means_R = np.concatenate([values_N[draw_RN].mean(1) for draw_RN in _draws(len(values_N), num_resamples, seed)])
    return float(values_N.mean()), *_interval(means_R, level)


def paired_bootstrap(
    values_a: Sequence[float] | Tensor | np.ndarray,
    values_b: Sequence[float] | Tensor | np.ndarray,
    *,
    relative: bool = False,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How much higher a is than b on the same samples: mean(a) - mean(b) as (difference, low, high).

    Each resample draws the same samples for both, so what makes a sample hard for both cancels. `relative=True` gives
    mean(a) / mean(b) - 1 instead (0.2 is 20 % more); a resample whose mean(b) is 0 counts as infinitely more.
    Raises ValueError as `bootstrap_interval` does, for different lengths, and for relative=True if mean(b) is not > 0.
    """
    a_N, b_N = _vector(values_a, "values_a"), _vector(values_b, "values_b")
    if len(a_N) != len(b_N):
        raise ValueError(f"paired values must be of the same samples, got {len(a_N)} and {len(b_N)} of them")
    if relative and not b_N.mean() > 0:
        raise ValueError(f"a relative difference needs mean(values_b) > 0, got {b_N.mean()}; use relative=False")

    def compare(mean_a: np.ndarray, mean_b: np.ndarray) -> np.ndarray:
        if not relative:
            return mean_a - mean_b
        return np.divide(mean_a, mean_b, out=np.full_like(mean_a, np.inf), where=mean_b > 0) - 1

    draws = _draws(len(a_N), num_resamples, seed)
    gains_R = np.concatenate([compare(a_N[draw_RN].mean(1), b_N[draw_RN].mean(1)) for draw_RN in draws])
    gain = compare(a_N.mean(keepdims=True), b_N.mean(keepdims=True))
    return float(gain[0]), *_interval(gains_R, level)


def _checked(hits_BK: Tensor, num_groundtruth_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    hits_BK, num_groundtruth_B = torch.as_tensor(hits_BK).double(), torch.as_tensor(num_groundtruth_B)
    if hits_BK.ndim == 0 or hits_BK.shape[:-1] != num_groundtruth_B.shape:
        shapes = f"{tuple(hits_BK.shape)} and {tuple(num_groundtruth_B.shape)}"
        raise ValueError(f"hits must have shape (B, K) and num_groundtruth (B,), got {shapes}")
    if num_groundtruth_B.is_floating_point() or num_groundtruth_B.dtype == torch.bool:
        raise ValueError(f"num_groundtruth must hold integers, got {num_groundtruth_B.dtype}")
    if not 1 <= k <= hits_BK.shape[-1]:
        raise ValueError(f"k must be in 1..{hits_BK.shape[-1]}, the ranks that hits cover, got {k}")
    if not ((hits_BK == 0) | (hits_BK == 1)).all():
        raise ValueError("hits must be 0 or 1")
    if (num_groundtruth_B < 1).any():
        raise ValueError("num_groundtruth must be >= 1: leave samples without ground truth out of the evaluation")
    if (hits_BK.sum(-1) > num_groundtruth_B).any():
        raise ValueError("a list has more hits than its ground truth has items: an item was counted twice")
    return hits_BK, num_groundtruth_B


def _vector(values: Sequence[float] | Tensor | np.ndarray, name: str) -> np.ndarray:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or values_N.size == 0 or not np.isfinite(values_N).all():
        raise ValueError(f"{name} must be a non-empty vector of finite numbers, got shape {values_N.shape}")
    return values_N


def _draws(num_values: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Indices of resamples, (R, N) a chunk, R bounded by memory; the chunks depend on the arguments alone."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be >= 1, got {num_resamples}")
    generator = np.random.default_rng(seed)
    rows = max(MAX_DRAWS // num_values, 1)
    for start in range(0, num_resamples, rows):
        yield generator.integers(num_values, size=(min(rows, num_resamples - start), num_values))


def _interval(statistic_R: np.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    # No interpolation: it would make inf - inf of a bound that is infinite.
    low, high = np.quantile(statistic_R, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)
