"""Trainer against sampler: how far their log-probs of the same tokens are apart, and a correction by unit.

A list has some hundred tokens, so the product of its token ratios is noise even where every token is nearly right. The
unit is that of the loss: with ranks, the geometric mean over the tokens of one item, the ratio that is clipped too.
"""

# Shape letters: B lists, T completion tokens, U units of a list (its ranks, most often).

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from rankgrpo.loss import rank_log_ratio
from rankgrpo.units import Units

if TYPE_CHECKING:  # `mismatch_weight` costs torch alone
    from rankgrpo.config import RlConfig
    from rankgrpo.runtime.means import Means

Correction = Literal["truncate", "mask"]


class Gap(NamedTuple):
    """Sum over tokens of exp|trainer's - sampler's log-prob|, which is 1 a token where the two agree."""

    total: float
    num_tokens: int


def mismatch_weight(
    logp_BT: Tensor, sampler_logp_BT: Tensor, unit_BT: Tensor, num_units: int, *, kind: Correction, cap: float
) -> Tensor:
    """Weight of every unit for having been sampled by the sampler's policy instead of the trainer's, (B, U).

    With r the geometric mean over the unit's tokens of trainer probability / sampler probability:
    truncate: min(r, cap). mask: 1 where 1 / cap <= r <= cap, else 0. A unit without tokens has r = 1.

    Args:
      logp_BT, sampler_logp_BT: log-probs of the sampled tokens by the trainer and by the sampler, float32 or float64.
      unit_BT: integer unit of every token; those outside [0, num_units) take no part.
      cap: at least 1.

    Returns: no gradient flows through it. Raises ValueError for wrong shapes, dtypes or options.
    """
    if not cap >= 1:
        raise ValueError(f"cap must be at least 1, got {cap}")
    log_ratio_BU = rank_log_ratio(logp_BT.detach(), sampler_logp_BT.detach(), unit_BT, num_units)
    if kind == "truncate":
        return log_ratio_BU.exp().clamp(max=cap)
    if kind == "mask":
        return (log_ratio_BU.exp().clamp(1 / cap, cap) == log_ratio_BU.exp()).to(log_ratio_BU.dtype)
    raise ValueError(f"kind must be 'truncate' or 'mask', got {kind!r}")


def correct_units(units: Units, logp_BT: Tensor, sampler_logp_BT: Tensor, rl: RlConfig, means: Means) -> Units:
    """`units` weighted as rl.mismatch_correction says; adds the share of units that it touched to `means`."""
    if rl.mismatch_correction == "none":
        return units
    num_units = units.advantage_BU.shape[1]
    weight_BU = mismatch_weight(
        logp_BT, sampler_logp_BT, units.unit_BT, num_units, kind=rl.mismatch_correction, cap=rl.mismatch_cap
    )
    present_BU = _present(units)
    touched_BU = weight_BU >= rl.mismatch_cap if rl.mismatch_correction == "truncate" else weight_BU == 0
    means.add("mismatch/corrected_frac", (touched_BU & present_BU).sum(), present_BU.sum())
    return replace(units, weight_BU=units.weight_BU * weight_BU)


def describe_mismatch(
    units: Units, logp_BT: Tensor, sampler_logp_BT: Tensor, mask_BT: Tensor, rl: RlConfig, means: Means
) -> Gap:
    """Add mismatch/*: by token, and the share of units that the mismatch alone would carry out of the clip band."""
    gap = (logp_BT - sampler_logp_BT)[mask_BT].abs()
    exp_gap = Gap(float(gap.exp().sum()), gap.numel())
    means.add("mismatch/abs_logp", gap.sum(), gap.numel())
    means.add("mismatch/exp_abs_logp", exp_gap.total, exp_gap.num_tokens)
    ratio_BU = rank_log_ratio(logp_BT, sampler_logp_BT, units.unit_BT, units.advantage_BU.shape[1]).exp()
    outside_BU = (ratio_BU < 1 - rl.clip_low) | (ratio_BU > 1 + rl.clip_high)
    means.add("mismatch/outside_clip_frac", outside_BU.sum(), _present(units).sum())  # an absent unit has ratio 1
    return exp_gap


def _present(units: Units) -> Tensor:
    """(B, U) units that have tokens."""
    listed_BT = units.unit_BT >= 0
    count_BU = torch.zeros_like(units.advantage_BU)
    return count_BU.scatter_add(1, units.unit_BT.clamp(min=0), listed_BT.to(count_BU.dtype)) > 0
