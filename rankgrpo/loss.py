"""The Rank-GRPO objective as pure functions of tensors (paper: "Rank-GRPO", arXiv 2510.20150, Eq. 6).

A unit is a set of a list's tokens that share one importance ratio and one advantage. `rank_BT` names the unit of every
token: the rank of the recommended item (Rank-GRPO), the token itself (GRPO) or the list (GSPO); `rankgrpo.units` builds
these. The names stay those of Eq. 6, rank and K, to be read beside it; where K ranks become U units, in
`rankgrpo.units`, a unit is called one.

The functions know no model, config, logger or process group: the caller brings log-probs in float32 and the denominator
of the whole step, and gets a loss to differentiate and detached metrics.

Log-probs are never cast here: half precision is refused, float64 passes through.
"""

# Shape letters: B lists (prompts x lists a prompt), T completion tokens, K units of a list (most often its ranks).

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["rank", "token"]
Impl = Literal["torch", "triton"]

# exp(20) = 4.9e8: far outside any clip band, far inside float32, so a stray log-prob cannot overflow the whole batch.
MAX_LOG_RATIO = 20.0


def rank_log_ratio(logp_BT: Tensor, old_logp_BT: Tensor, rank_BT: Tensor, num_ranks: int) -> Tensor:
    """Mean token log-ratio of every rank; its exp is the geometric-mean ratio w_{i,k} of Eq. 6.

    log w_{i,k} = (1 / |y_i^(k)|) sum over t in item k of (log pi(y_{i,t}) - log pi_old(y_{i,t}))

    Args:
      logp_BT, old_logp_BT: log-probs (nats) of the sampled tokens, float32 or float64.
      rank_BT: integer rank of every token; those with rank < 0 or >= num_ranks take no part, whatever their log-prob.
      num_ranks: K.

    Returns: (B, K); 0 for a rank without tokens. Gradients flow to both log-probs.
    Raises ValueError for wrong shapes or dtypes.
    """
    _check_tokens(logp_BT, rank_BT, old_logp_BT=old_logp_BT)
    mask_BT, slot_BT, count_BK = _segment(rank_BT, num_ranks, logp_BT.dtype)
    return _mean_per_unit(_kept(logp_BT, mask_BT) - _kept(old_logp_BT, mask_BT), slot_BT, count_BK)


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 estimate of KL(policy || ref) a token: exp(d) - d - 1 with d = ref_logp - logp; never negative. Any one shape.

    Beyond |d| = MAX_LOG_RATIO it is constant, without gradient; where d is not finite it is NaN.
    """
    d = _bounded(ref_logp - logp)
    return torch.expm1(d) - d  # exp(d) - 1 would lose all digits of a small d


def rank_grpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor | None,
    rank_BT: Tensor,
    advantage_BK: Tensor,
    *,
    clip_low: float = 0.06,
    clip_high: float = 0.08,
    ref_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    reduction: Reduction = "rank",
    denominator: float | Tensor | None = None,
    weight_BK: Tensor | None = None,
    impl: Impl = "torch",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate with one ratio and one advantage a unit (Eq. 6, negated), plus the KL to a reference.

    loss = -(1/Z) sum_{i,k} c_{i,k} min(w_{i,k} A_{i,k}, clip(w_{i,k}, 1 - clip_low, 1 + clip_high) A_{i,k})
           + kl_coef (1/Z) sum_{i,k} c_{i,k} (mean of kl_k3 over the tokens of unit k)

    with w the geometric-mean ratio of `rank_log_ratio`, Z the denominator, and c the weight of a unit: 1 for
    reduction="rank" (the paper: every rank counts the same, a token counts 1/|item|), its number of tokens for
    reduction="token" (the released code: every token has the surrogate of its rank and its own k3). `weight_BK`
    multiplies c. A unit without tokens has ratio 1 and no gradient: under "rank" it adds the constant -A/Z and still
    counts in Z, under "token" it adds nothing.

    Args:
      logp_BT: log-probs (nats) under the policy, with gradient; float32 or float64, as the other two.
      old_logp_BT: under the policy that sampled. None means on-policy: every ratio is exactly 1.
      rank_BT: integer unit of every token; tokens with rank < 0 or >= K take no part.
      advantage_BK, weight_BK: floating point; like old_logp_BT and ref_logp_BT they get no gradient.
      ref_logp_BT: under the reference. With kl_coef=0 it only feeds the metric.
      denominator: Z, a number or a 0-dim tensor. Pass the count of the whole step over all processes (P*G*K ranks, or
        all tokens for "token"): then the losses of micro-batches and processes add up to that of one big batch. None
        means B*K for "rank" and the number of tokens that take part for "token", of this call.
      impl: "triton" runs the fused kernel of `rankgrpo_kernels`, same numbers; it raises where that cannot run.

    A unit whose |log w| exceeds MAX_LOG_RATIO has the bounded ratio and no gradient. A log-prob that is not finite
    makes the loss NaN at a token that takes part, and has no effect at any other.

    Returns: (loss, metrics), metrics detached 0-dim tensors: `loss/policy` and `loss/kl` (the two sums above, without
    kl_coef; 0 without a reference) add up over calls like the loss itself; `ratio/mean`, `ratio/clip_low_frac` and
    `ratio/clip_high_frac` are means over the `ratio/num_units` units with tokens. Clipped means that the clip took the
    gradient: w < 1 - clip_low with A < 0, or w > 1 + clip_high with A > 0. `merge_metrics` joins calls.
    Raises ValueError for wrong shapes, dtypes or options.
    """
    _check_tokens(logp_BT, rank_BT, old_logp_BT=old_logp_BT, ref_logp_BT=ref_logp_BT)
    _check_units(logp_BT.shape[0], advantage_BK, weight_BK)
    _check_options(clip_low, clip_high, kl_coef, ref_logp_BT, reduction, denominator, impl)
    implementation = _plain_rank_grpo_loss
    if impl == "triton":
        from rankgrpo_kernels.rank_ratio import fused_rank_grpo_loss  # needs triton and a GPU; keep the import local

        implementation = fused_rank_grpo_loss
    return implementation(
        logp_BT,
        old_logp_BT,
        rank_BT,
        advantage_BK,
        clip_low=clip_low,
        clip_high=clip_high,
        ref_logp_BT=ref_logp_BT,
        kl_coef=kl_coef,
        reduction=reduction,
        denominator=denominator,
        weight_BK=weight_BK,
    )


def merge_metrics(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the metrics of several calls (micro-batches, processes) into those of one big batch.

    `loss/*` and `ratio/num_units` add up (`loss/*` rightly only if the calls shared one denominator); the other
    `ratio/*` are averaged with weight `ratio/num_units`. Raises ValueError when there is nothing to merge.
    """
    if not parts:
        raise ValueError("merge_metrics needs the metrics of at least one call, got none")
    num_units = torch.stack([part["ratio/num_units"] for part in parts])
    merged = {}
    for name in parts[0]:
        values = torch.stack([part[name] for part in parts])
        if name.startswith("loss/") or name == "ratio/num_units":
            merged[name] = values.sum()
        else:
            merged[name] = (values * num_units).sum() / num_units.sum().clamp(min=1)
    return merged


def _plain_rank_grpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor | None,
    rank_BT: Tensor,
    advantage_BK: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    ref_logp_BT: Tensor | None,
    kl_coef: float,
    reduction: Reduction,
    denominator: float | Tensor | None,
    weight_BK: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    mask_BT, slot_BT, count_BK = _segment(rank_BT, advantage_BK.shape[1], logp_BT.dtype)
    logp_BT = _kept(logp_BT, mask_BT)
    old_logp_BT = logp_BT.detach() if old_logp_BT is None else _kept(old_logp_BT.detach(), mask_BT)
    ratio_BK = _bounded(_mean_per_unit(logp_BT - old_logp_BT, slot_BT, count_BK)).exp()
    clipped_BK = ratio_BK.clamp(1 - clip_low, 1 + clip_high)
    advantage_BK = advantage_BK.detach()
    surrogate_BK = torch.minimum(ratio_BK * advantage_BK, clipped_BK * advantage_BK)
    share_BK = _share(count_BK, weight_BK, reduction, denominator)
    policy_loss = -(share_BK * surrogate_BK).sum()

    loss, kl = policy_loss, torch.zeros_like(policy_loss)
    if ref_logp_BT is not None:
        kl_BT = kl_k3(logp_BT if kl_coef else logp_BT.detach(), _kept(ref_logp_BT.detach(), mask_BT))
        kl = (share_BK * _mean_per_unit(kl_BT, slot_BT, count_BK)).sum()
        loss = policy_loss + kl_coef * kl if kl_coef else policy_loss  # 0 * NaN would poison the loss
    metrics = _ratio_metrics(ratio_BK.detach(), advantage_BK, count_BK > 0, clip_low, clip_high)
    return loss, metrics | {"loss/policy": policy_loss.detach(), "loss/kl": kl.detach()}


def _segment(rank_BT: Tensor, num_ranks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens take part, the column each one adds to (0 where it does not), and the tokens of every unit."""
    mask_BT = (rank_BT >= 0) & (rank_BT < num_ranks)
    slot_BT = torch.where(mask_BT, rank_BT, 0).long()
    count_BK = torch.zeros(rank_BT.shape[0], num_ranks, dtype=dtype, device=rank_BT.device)
    return mask_BT, slot_BT, count_BK.scatter_add(1, slot_BT, mask_BT.to(dtype))


def _kept(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Zero what takes no part before any arithmetic: NaN * 0 in a backward pass would be NaN."""
    return torch.where(mask_BT, value_BT, 0.0)


def _mean_per_unit(value_BT: Tensor, slot_BT: Tensor, count_BK: Tensor) -> Tensor:
    sum_BK = value_BT.new_zeros(count_BK.shape).scatter_add(1, slot_BT, value_BT)
    return sum_BK / count_BK.clamp(min=1)


def _bounded(log_ratio: Tensor) -> Tensor:
    """Safe argument of exp. Clamping alone would pass a log-prob of -inf off as a very small one."""
    return torch.where(log_ratio.isfinite(), log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), torch.nan)


def _share(count_BK: Tensor, weight_BK: Tensor | None, reduction: str, denominator: float | Tensor | None) -> Tensor:
    """c / Z, the share of every unit in the loss. Z = 1 for an empty batch gives a 0 that can be differentiated."""
    per_token = reduction == "token"
    share_BK = count_BK if per_token else torch.ones_like(count_BK)
    if denominator is None:
        denominator = count_BK.sum().clamp(min=1) if per_token else max(count_BK.numel(), 1)
    return (share_BK if weight_BK is None else share_BK * weight_BK.detach()) / denominator


def _ratio_metrics(
    ratio_BK: Tensor, advantage_BK: Tensor, present_BK: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    num_units = present_BK.sum().to(ratio_BK.dtype)

    def mean(value_BK: Tensor) -> Tensor:
        return torch.where(present_BK, value_BK, 0).sum().to(ratio_BK.dtype) / num_units.clamp(min=1)

    return {
        "ratio/mean": mean(ratio_BK),
        "ratio/clip_low_frac": mean((ratio_BK < 1 - clip_low) & (advantage_BK < 0)),
        "ratio/clip_high_frac": mean((ratio_BK > 1 + clip_high) & (advantage_BK > 0)),
        "ratio/num_units": num_units,
    }


def _check_tokens(logp_BT: Tensor, rank_BT: Tensor, **others_BT: Tensor | None) -> None:
    if logp_BT.ndim != 2:
        raise ValueError(f"logp_BT must have shape (B, T), got {tuple(logp_BT.shape)}")
    if rank_BT.shape != logp_BT.shape:
        raise ValueError(f"rank_BT must be (B, T) = {tuple(logp_BT.shape)}, got {tuple(rank_BT.shape)}")
    if rank_BT.is_floating_point() or rank_BT.is_complex() or rank_BT.dtype == torch.bool:
        raise ValueError(f"rank_BT must hold integers, got {rank_BT.dtype}")
    for name, value_BT in {"logp_BT": logp_BT, **others_BT}.items():
        if value_BT is None:
            continue
        if value_BT.shape != logp_BT.shape:
            raise ValueError(f"{name} must be (B, T) = {tuple(logp_BT.shape)}, got {tuple(value_BT.shape)}")
        if value_BT.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {value_BT.dtype}: take log-softmax in float32")


def _check_units(num_lists: int, advantage_BK: Tensor, weight_BK: Tensor | None) -> None:
    if advantage_BK.ndim != 2 or advantage_BK.shape[0] != num_lists:
        raise ValueError(f"advantage_BK must be (B, K) with B = {num_lists}, got {tuple(advantage_BK.shape)}")
    if not advantage_BK.is_floating_point():
        raise ValueError(f"advantage_BK must be floating point, got {advantage_BK.dtype}")
    if weight_BK is not None and weight_BK.shape != advantage_BK.shape:
        raise ValueError(f"weight_BK must be (B, K) = {tuple(advantage_BK.shape)}, got {tuple(weight_BK.shape)}")


def _check_options(
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    ref_logp_BT: Tensor | None,
    reduction: str,
    denominator: float | Tensor | None,
    impl: str,
) -> None:
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"need 0 <= clip_low <= 1 and clip_high >= 0, got {clip_low} and {clip_high}")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
    if kl_coef > 0 and ref_logp_BT is None:
        raise ValueError(
            f"kl_coef={kl_coef} needs ref_logp_BT, the log-probs under the reference; pass it or kl_coef=0"
        )
    if reduction not in ("rank", "token"):
        raise ValueError(f"reduction must be 'rank' or 'token', got {reduction!r}")
    if impl not in ("torch", "triton"):
        raise ValueError(f"impl must be 'torch' or 'triton', got {impl!r}")
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:  # its value stays unread: that would wait for the device
            raise ValueError(f"denominator must be a number or a 0-dim tensor, got shape {tuple(denominator.shape)}")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be > 0, got {denominator}")
