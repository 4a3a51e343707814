"""The Rank-GRPO objective as pure functions of tensors (paper: "Rank-GRPO", arXiv 2510.20150, Eq. 6).

A unit is a set of a list's tokens that share one importance ratio and one advantage. `rank_BT` names the unit of every
token: the rank of the recommended item (Rank-GRPO), the token itself (GRPO) or the list (GSPO); `rankgrpo.units` builds
these. The names stay those of Eq. 6, rank and K, to be read beside it; where K ranks become U units, in
`rankgrpo.units`, a unit is called one.

The functions know no model, config, logger or process group: the caller brings log-probs in float32 and the denominator
of the whole step, and gets a loss to differentiate and detached metrics.

`rank_grpo_loss` checks what it is given. `unchecked_rank_grpo_loss` is the same arithmetic and nothing else, which
`torch.compile(fullgraph=True)` and `torch.fx` trace. Neither waits for the device.

Log-probs are never cast here: half precision is refused, float64 passes through.
"""

# Shape letters: B lists (prompts x lists a prompt), T completion tokens, K units of a list (most often its ranks),
# M tokens of all lists, end to end.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

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
    empty_BK = logp_BT.new_zeros(logp_BT.shape[0], num_ranks)
    segments = _segment(rank_BT, empty_BK, None)
    return _mean_per_unit(_kept(logp_BT, segments.mask) - _kept(old_logp_BT, segments.mask), segments)


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
    cu_seqlens: Tensor | None = None,
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
      cu_seqlens: for lists that lie end to end without padding: then everything a token is (M,), list b holds tokens
        cu_seqlens[b] to cu_seqlens[b + 1], (B + 1,) ascending integers, and tokens outside all lists take no part.
      impl: "triton" runs the fused kernel of `rankgrpo_kernels`, same numbers; it raises where that cannot run.

    A unit whose |log w| exceeds MAX_LOG_RATIO has the bounded ratio and no gradient. A log-prob that is not finite
    makes the loss NaN at a token that takes part, and has no effect at any other.

    Returns: (loss, metrics), metrics detached 0-dim tensors: `loss/policy` and `loss/kl` (the two sums above, without
    kl_coef; 0 without a reference) add up over calls like the loss itself; `ratio/mean`, `ratio/clip_low_frac` and
    `ratio/clip_high_frac` are means over the `ratio/num_units` units with tokens. Clipped means that the clip took the
    gradient: w < 1 - clip_low with A < 0, or w > 1 + clip_high with A > 0. `merge_metrics` joins calls.
    Raises ValueError for wrong shapes, dtypes or options.
    """
    num_lists = logp_BT.shape[0] if cu_seqlens is None else _check_packed(logp_BT, cu_seqlens)
    _check_tokens(logp_BT, rank_BT, packed=cu_seqlens is not None, old_logp_BT=old_logp_BT, ref_logp_BT=ref_logp_BT)
    _check_units(num_lists, advantage_BK, weight_BK)
    _check_options(clip_low, clip_high, kl_coef, ref_logp_BT, reduction, denominator, impl)
    options = {
        "clip_low": clip_low,
        "clip_high": clip_high,
        "ref_logp_BT": ref_logp_BT,
        "kl_coef": kl_coef,
        "reduction": reduction,
        "denominator": denominator,
        "weight_BK": weight_BK,
    }
    if impl == "torch":
        return unchecked_rank_grpo_loss(logp_BT, old_logp_BT, rank_BT, advantage_BK, **options, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None:
        raise ValueError("impl='triton' takes (B, T) and no cu_seqlens; use impl='torch', or pad the lists")
    from rankgrpo_kernels.rank_ratio import fused_rank_grpo_loss  # needs triton and a GPU; keep the import local

    return fused_rank_grpo_loss(logp_BT, old_logp_BT, rank_BT, advantage_BK, **options)


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


def unchecked_rank_grpo_loss(
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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`rank_grpo_loss(impl="torch")` without its checks: tensor operations alone, for tracers and compilers.

    It computes the same numbers, bit for bit. What the checks would refuse gives wrong numbers or an error of torch's.
    """
    segments = _segment(rank_BT, torch.zeros_like(advantage_BK, dtype=logp_BT.dtype), cu_seqlens)
    logp_BT = _kept(logp_BT, segments.mask)
    old_logp_BT = logp_BT.detach() if old_logp_BT is None else _kept(old_logp_BT.detach(), segments.mask)
    ratio_BK = _bounded(_mean_per_unit(logp_BT - old_logp_BT, segments)).exp()
    clipped_BK = ratio_BK.clamp(1 - clip_low, 1 + clip_high)
    advantage_BK = advantage_BK.detach()
    surrogate_BK = torch.minimum(ratio_BK * advantage_BK, clipped_BK * advantage_BK)
    share_BK = _share(segments.count_BK, weight_BK, reduction, denominator)
    policy_loss = -(share_BK * surrogate_BK).sum()

    loss, kl = policy_loss, torch.zeros_like(policy_loss)
    if ref_logp_BT is not None:
        kl_BT = kl_k3(logp_BT if kl_coef else logp_BT.detach(), _kept(ref_logp_BT.detach(), segments.mask))
        kl = (share_BK * _mean_per_unit(kl_BT, segments)).sum()
        loss = policy_loss + kl_coef * kl if kl_coef else policy_loss  # 0 * NaN would poison the loss
    metrics = _ratio_metrics(ratio_BK.detach(), advantage_BK, segments.count_BK > 0, clip_low, clip_high)
    return loss, metrics | {"loss/policy": policy_loss.detach(), "loss/kl": kl.detach()}


class _Segments(NamedTuple):
    """Which tokens belong to which unit; tokens are (B, T), or (M,) where the lists are packed."""

    mask: Tensor
    """Tokens that take part."""
    slot: Tensor
    """The column that a token adds to, 0 where it does not; packed, of the columns of all lists."""
    count_BK: Tensor
    packed: bool

    def sums(self, value: Tensor) -> Tensor:
        """Sum over the tokens of every unit, (B, K); values of tokens that take no part must be 0."""
        empty_BK = torch.zeros_like(self.count_BK, dtype=value.dtype)
        if self.packed:
            return empty_BK.flatten().scatter_add(0, self.slot, value).view_as(empty_BK)
        return empty_BK.scatter_add(1, self.slot, value)


def _segment(rank: Tensor, empty_BK: Tensor, cu_seqlens: Tensor | None) -> _Segments:
    mask = (rank >= 0) & (rank < empty_BK.shape[1])
    if cu_seqlens is None:
        slot = torch.where(mask, rank, 0).long()
    else:
        token_M = torch.ones_like(rank, dtype=cu_seqlens.dtype).cumsum(0, dtype=cu_seqlens.dtype) - 1
        list_M = torch.searchsorted(cu_seqlens, token_M, right=True) - 1
        mask = mask & (list_M >= 0) & (list_M < empty_BK.shape[0])
        slot = torch.where(mask, list_M * empty_BK.shape[1] + rank, 0).long()
    segments = _Segments(mask, slot, empty_BK, cu_seqlens is not None)
    return segments._replace(count_BK=segments.sums(mask.to(empty_BK.dtype)))


def _kept(value_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Zero what takes no part before any arithmetic: NaN * 0 in a backward pass would be NaN."""
    return torch.where(mask_BT, value_BT, 0.0)


def _mean_per_unit(value: Tensor, segments: _Segments) -> Tensor:
    return segments.sums(value) / segments.count_BK.clamp(min=1)


def _bounded(log_ratio: Tensor) -> Tensor:
    """Safe argument of exp. Clamping alone would pass a log-prob of -inf off as a very small one."""
    return torch.where(log_ratio.isfinite(), log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO), torch.nan)


def _share(count_BK: Tensor, weight_BK: Tensor | None, reduction: str, denominator: float | Tensor | None) -> Tensor:
    """c / Z, the share of every unit in the loss. Z = 1 for an empty batch gives a 0 that can be differentiated."""
    per_token = reduction == "token"
    share_BK = count_BK if per_token else torch.ones_like(count_BK)
    if denominator is None:
        denominator = share_BK.sum().clamp(min=1)  # B*K, or the tokens; a tensor, which tracers can follow
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


def _check_packed(logp_M: Tensor, cu_seqlens: Tensor) -> int:
    """The number of lists."""
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 (B + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if logp_M.ndim != 1:
        raise ValueError(f"with cu_seqlens, logp must have shape (M,), got {tuple(logp_M.shape)}")
    return len(cu_seqlens) - 1


def _check_tokens(logp_BT: Tensor, rank_BT: Tensor, packed: bool = False, **others_BT: Tensor | None) -> None:
    axes = "(M,)" if packed else "(B, T)"
    if logp_BT.ndim != 2 and not packed:
        raise ValueError(f"logp_BT must have shape (B, T), got {tuple(logp_BT.shape)}")
    if rank_BT.shape != logp_BT.shape:
        raise ValueError(f"rank_BT must be {axes} = {tuple(logp_BT.shape)}, got {tuple(rank_BT.shape)}")
    if rank_BT.is_floating_point() or rank_BT.is_complex() or rank_BT.dtype == torch.bool:
        raise ValueError(f"rank_BT must hold integers, got {rank_BT.dtype}")
    for name, value_BT in {"logp_BT": logp_BT, **others_BT}.items():
        if value_BT is None:
            continue
        if value_BT.shape != logp_BT.shape:
            raise ValueError(f"{name} must be {axes} = {tuple(logp_BT.shape)}, got {tuple(value_BT.shape)}")
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
