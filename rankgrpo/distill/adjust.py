"""Adjust: what the training ground truth says about each item's scores (arXiv 2510.20150, Eq. 12 and 13).

    s_final = w * s + b,   w, b in R^N shared by all conversations, minimising over the training conversations i

    - sum_i sum_{j in groundtruth_i} log softmax(w * s_i + b)_j + l2_weight ||w - 1||^2 + l2_bias ||b||^2

The softmax is over the whole catalog, as in the paper, or over the best candidates of each conversation: then w and b
learn which of the items that compete for a list are right too often or too rarely, and nothing from ground truth that
is not among them. The objective is convex; L-BFGS from w = 1, b = 0 finds its minimum, the same one every time. The
scores may be scaled first (s -> scale * s), which says how sharp a softmax w = 1 stands for.
"""

# Shape letters: B samples of a block, N catalog items, S samples, C candidates, H hits (a sample and a right item).

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from rankgrpo.distill.remap import Scores, blocks

HISTORY = 10

Likelihood = Callable[[Tensor, Tensor], tuple[float, Tensor, Tensor]]
"""From w and b, float64 (N,), to minus the log likelihood and its gradients by w and b."""


@dataclass(frozen=True)
class Bias:
    """w and b of every catalog item, float32."""

    weight_N: Tensor
    bias_N: Tensor


def catalog_likelihood(
    scores: Scores, groundtruth: Sequence[Sequence[int]], samples: Sequence[int], *, scale: float = 1.0
) -> Likelihood:
    """-sum of log softmax(w * scale * s + b)_j, over the catalog, a block of samples at a time.

    The softmax of a block is float32, sums over blocks are float64. Samples without ground truth add nothing.
    """
    told = [sample for sample in samples if groundtruth[sample]]

    def likelihood(weight_N: Tensor, bias_N: Tensor) -> tuple[float, Tensor, Tensor]:
        total = 0.0
        grad_weight_N, grad_bias_N = torch.zeros_like(weight_N), torch.zeros_like(bias_N)
        factor_N, shift_N = (scale * weight_N).float(), bias_N.float()
        for block in blocks(told, scores.num_items):
            scores_BN = scores.block(block)
            row_H = torch.tensor([row for row, sample in enumerate(block) for _ in groundtruth[sample]])
            item_H = torch.tensor([item for sample in block for item in groundtruth[sample]])
            count_B = row_H.bincount(minlength=len(block))
            logit_BN = (scores_BN * factor_N).add_(shift_N)
            log_norm_B = logit_BN.logsumexp(1)
            total += float((log_norm_B.double() * count_B).sum() - logit_BN[row_H, item_H].double().sum())
            # By the logits: the number of hits times the softmax, minus 1 at each hit.
            slope_BN = logit_BN.sub_(log_norm_B[:, None]).exp_().mul_(count_B[:, None])
            slope_BN.index_put_((row_H, item_H), torch.tensor(-1.0), accumulate=True)
            grad_bias_N += slope_BN.sum(0)
            grad_weight_N += slope_BN.mul_(scores_BN).sum(0)
        return total, grad_weight_N * scale, grad_bias_N

    return likelihood


@dataclass(frozen=True)
class Candidates:
    """The candidates of samples as rectangles, short rows padded; made by `Candidates.gather`."""

    item_SC: Tensor
    score_SC: Tensor
    hit_SC: Tensor
    """1 where a candidate is right."""
    mask_SC: Tensor
    """False where a row is padded."""

    @classmethod
    def gather(
        cls,
        scores: Scores,
        groundtruth: Sequence[Sequence[int]],
        samples: Sequence[int],
        candidates: Sequence[Sequence[int]],
    ) -> Candidates:
        """One row for each of `samples`, whose ground truth and candidates are given in the same order."""
        width = max(map(len, candidates), default=0)
        item_SC = torch.zeros(len(samples), width, dtype=torch.long)
        score_SC = torch.zeros(len(samples), width, dtype=torch.float64)
        hit_SC, mask_SC = torch.zeros_like(score_SC), torch.zeros(len(samples), width, dtype=torch.bool)
        for row, (items, right) in enumerate(zip(candidates, map(set, groundtruth), strict=True)):
            item_SC[row, : len(items)] = torch.tensor(items, dtype=torch.long)
            hit_SC[row, : len(items)] = torch.tensor([float(item in right) for item in items])
            mask_SC[row, : len(items)] = True
        row = 0
        for block in blocks(samples, scores.num_items):
            rows = slice(row, row + len(block))
            score_SC[rows] = scores.block(block).gather(1, item_SC[rows]).double()
            row += len(block)
        return cls(item_SC, score_SC, hit_SC, mask_SC)


def candidate_likelihood(candidates: Candidates, rows: Sequence[int], *, scale: float = 1.0) -> Likelihood:
    """`catalog_likelihood` over the candidates of each of `rows`; a right item that is none of them adds nothing."""
    chosen_S = torch.tensor(rows, dtype=torch.long)
    item_SC, hit_SC, mask_SC = candidates.item_SC[chosen_S], candidates.hit_SC[chosen_S], candidates.mask_SC[chosen_S]
    score_SC = scale * candidates.score_SC[chosen_S]
    count_S = hit_SC.sum(1)

    def likelihood(weight_N: Tensor, bias_N: Tensor) -> tuple[float, Tensor, Tensor]:
        logit_SC = (weight_N[item_SC] * score_SC + bias_N[item_SC]).masked_fill(~mask_SC, -torch.inf)
        log_norm_S = logit_SC.logsumexp(1)
        total = float((count_S * log_norm_S).sum() - logit_SC[hit_SC > 0].sum())
        slope_SC = (logit_SC - log_norm_S[:, None]).exp() * count_S[:, None] - hit_SC
        grads = [torch.zeros_like(weight_N), torch.zeros_like(bias_N)]
        for grad_N, by_SC in zip(grads, (slope_SC * score_SC, slope_SC), strict=True):
            grad_N.index_add_(0, item_SC.flatten(), by_SC.flatten())
        return total, *grads

    return likelihood


def fit_bias(
    likelihood: Likelihood,
    num_items: int,
    *,
    l2_weight: float = 0.01,
    l2_bias: float = 0.01,
    max_steps: int = 60,
    title: str | None = None,
) -> Bias:
    """The minimum of the penalised likelihood, to within `max_steps` steps of L-BFGS.

    Raises ValueError for penalties that are not positive.
    """
    if not l2_weight > 0 or not l2_bias > 0:
        raise ValueError(f"l2_weight and l2_bias must be positive, got {l2_weight} and {l2_bias}")
    weight_N = torch.ones(num_items, dtype=torch.float64, requires_grad=True)
    bias_N = torch.zeros(num_items, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_N, bias_N],
        max_iter=max_steps,
        history_size=HISTORY,
        tolerance_grad=1e-3,
        tolerance_change=1e-4,  # of a sum of log-probabilities over all hits
        line_search_fn="strong_wolfe",
    )
    with tqdm(desc=title, unit="pass", disable=title is None, leave=False, dynamic_ncols=True) as bar:

        @torch.no_grad()
        def objective() -> Tensor:
            total, grad_weight_N, grad_bias_N = likelihood(weight_N.detach(), bias_N.detach())
            weight_N.grad = grad_weight_N + 2 * l2_weight * (weight_N - 1)
            bias_N.grad = grad_bias_N + 2 * l2_bias * bias_N
            total += float(l2_weight * ((weight_N - 1) ** 2).sum() + l2_bias * (bias_N**2).sum())
            bar.set_postfix_str(f"objective {total:.0f}", refresh=False)
            bar.update()
            return torch.tensor(total, dtype=torch.float64)

        optimizer.step(objective)
    return Bias(weight_N.detach().float(), bias_N.detach().float())
