"""Weights of units that turn the one loss into other surrogates known from token-level methods, here at any unit.

`rank_grpo_loss` without its clip is -(1/Z) sum c w A, with the gradient c w A grad log w. Each surrogate is a weight c
that gets no gradient, computed anew for every update on a batch. At ratio 1 every weight is 1, so with one update a
batch they are all the same.
"""

# Shape letters: B lists, T completion tokens, U units of a list (its ranks, most often).

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from rankgrpo.loss import MAX_LOG_RATIO, rank_log_ratio

if TYPE_CHECKING:  # `surrogate_weight` costs torch alone
    from rankgrpo.config import RlConfig

Surrogate = Literal["cispo", "sapo", "dppo"]
NO_CLIP = {"clip_low": 1.0, "clip_high": 1e9}
"""Bounds that no ratio reaches: ratios are in (0, exp(MAX_LOG_RATIO)]."""


def surrogate_weight(
    logp_BT: Tensor,
    old_logp_BT: Tensor,
    unit_BT: Tensor,
    advantage_BU: Tensor,
    *,
    kind: Surrogate,
    clip_low: float = 0.06,
    clip_high: float = 0.08,
    sapo_tau: tuple[float, float] = (1.0, 1.05),
    dppo_delta: float = 0.15,
) -> Tensor:
    """Weight c of every unit, (B, U), with w its geometric-mean ratio and A its advantage.

    cispo: c = clip(w, 1 - clip_low, 1 + clip_high) / w: the gradient is clip(w) A grad log w (arXiv 2506.13585, Eq. 4).
    sapo: c = 4 s (1 - s), s = sigmoid(tau (w - 1)), tau = sapo_tau[0] where A > 0, else sapo_tau[1]: the gradient of
      (4 / tau) sigmoid(tau (w - 1)) A (arXiv 2511.20347).
    dppo: c = 0 where |p - q| > dppo_delta and the step leads further away (w > 1 and A > 0, or w < 1 and A < 0), else
      1; p and q are the unit's geometric-mean token probabilities under the policy and under the one that sampled
      (arXiv 2602.04879, binary total variation, there of one token).

    A unit without tokens has w = 1 and the weight 1. Returns no gradient. Raises ValueError for wrong shapes, dtypes or
    options.
    """
    num_units = advantage_BU.shape[1]
    logp_BT, old_logp_BT = logp_BT.detach(), old_logp_BT.detach()
    log_ratio_BU = rank_log_ratio(logp_BT, old_logp_BT, unit_BT, num_units).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio_BU = log_ratio_BU.exp()
    if kind == "cispo":
        return ratio_BU.clamp(1 - clip_low, 1 + clip_high) / ratio_BU
    if kind == "sapo":
        tau_BU = torch.where(advantage_BU > 0, *sapo_tau).to(ratio_BU.dtype)
        gate_BU = torch.sigmoid(tau_BU * (ratio_BU - 1))
        return 4 * gate_BU * (1 - gate_BU)
    if kind == "dppo":
        nothing_BT = torch.zeros_like(logp_BT)
        new_BU, old_BU = (rank_log_ratio(x, nothing_BT, unit_BT, num_units).exp() for x in (logp_BT, old_logp_BT))
        further_BU = (log_ratio_BU * advantage_BU) > 0
        return (~(further_BU & ((new_BU - old_BU).abs() > dppo_delta))).to(ratio_BU.dtype)
    raise ValueError(f"kind must be 'cispo', 'sapo' or 'dppo', got {kind!r}")


def hold_units(
    logp_BT: Tensor, old_logp_BT: Tensor, unit_BT: Tensor, advantage_BU: Tensor, weight_BU: Tensor, rl: RlConfig
) -> tuple[Tensor, dict[str, float]]:
    """The units' weights and the clip of `rank_grpo_loss` under rl.surrogate."""
    if rl.surrogate == "clip":
        return weight_BU, {"clip_low": rl.clip_low, "clip_high": rl.clip_high}
    weight = surrogate_weight(
        logp_BT,
        old_logp_BT,
        unit_BT,
        advantage_BU,
        kind=rl.surrogate,
        clip_low=rl.clip_low,
        clip_high=rl.clip_high,
        sapo_tau=rl.sapo_tau,
        dppo_delta=rl.dppo_delta,
    )
    return weight_BU * weight, NO_CLIP
