"""Rank-GRPO in verl (verl >= 0.9, < 0.10): a policy loss and an advantage estimator under the name `rank_grpo`.

verl imports the modules that VERL_USE_EXTERNAL_MODULES names in each of its processes. One such module of the user's:

    from rankgrpo.rollouts.integrations.verl import register
    register(num_ranks=20)

and `actor.policy_loss.loss_mode=rank_grpo`, `algorithm.adv_estimator=rank_grpo`. verl hands a loss five tensors of
tokens and no ids, so ranks travel twice in lowest bits: `mark_rewards` writes a list's K rewards at the last tokens of
its ranks, with the rank; the estimator reads them, compares groups, and hides the units in its advantages
(`rankgrpo.units.hide_units`), where the loss finds them.
"""

# Shape letters: B lists, T completion tokens, K ranks, U units.

from __future__ import annotations

from typing import Any

import torch
import verl
from torch import Tensor
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    POLICY_LOSS_REGISTRY,
    register_adv_est,
    register_policy_loss,
)

from rankgrpo.advantage import group_advantage
from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.rollouts.integrations import warn_if_untested
from rankgrpo.units import Units, hide_units, make_units, units_from_advantage

FIRST, PAST = (0, 9), (0, 10)
NAME = "rank_grpo"
# Low bits of a marked reward that hold the unit; the other 16 of the mantissa stay: 1.5e-5 of the reward at most.
UNIT_BITS = 7
MAX_UNITS = 2**UNIT_BITS - 1
_UNIT_MASK = 2**UNIT_BITS - 1
# Stands for a reward of 0, whose low bits would make a number that devices flush.
_ZERO = 2.0**-120


def register(num_ranks: int) -> None:
    """Register loss and estimator for lists of `num_ranks` ranks, in this process.

    Raises ConfigError for a `num_ranks` that the marks have no room for.
    """
    warn_if_untested("verl", verl.__version__, FIRST, PAST)
    if not 1 <= num_ranks < MAX_UNITS:
        raise ConfigError(f"num_ranks must be in 1..{MAX_UNITS - 1}, got {num_ranks}")

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        return _policy_loss(num_ranks, old_log_prob, log_prob, advantages, response_mask, config, rollout_is_weights)

    def estimator(
        token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        return _advantages(num_ranks, token_level_rewards, response_mask, index, config)

    POLICY_LOSS_REGISTRY.pop(NAME, None)
    ADV_ESTIMATOR_REGISTRY.pop(NAME, None)
    register_policy_loss(NAME)(loss)
    register_adv_est(NAME)(estimator)


def check_registered() -> None:
    """Raise ConfigError unless `register` has run in this process; verl logs plug-ins that fail at debug level only."""
    missing = [
        what
        for what, registry in (("policy loss", POLICY_LOSS_REGISTRY), ("advantage estimator", ADV_ESTIMATOR_REGISTRY))
        if NAME not in registry
    ]
    if missing:
        raise ConfigError(
            f"verl knows no {' and no '.join(missing)} of the name {NAME}: a module that calls "
            "rankgrpo.rollouts.integrations.verl.register must stand in VERL_USE_EXTERNAL_MODULES of every process"
        )


def mark_rewards(
    rank_BT: Tensor,
    eos_BT: Tensor,
    reward_BK: Tensor,
    *,
    overflow_penalty: float = -0.1,
    early_eos_penalty: float = -0.1,
) -> Tensor:
    """K rewards a list as one number a token, (B, T) float32, for verl's `rm_scores`; the estimator reads them.

    At the last token of each rank stands its reward, and at that of each penalty its value; their lowest 7 bits hold
    the unit. A reward of 0 is written as 2^-120, so sums of a list are its reward all the same. A rank without tokens
    has no place: it counts as a reward of 0 in its group.

    Args:
      rank_BT: rank of every token, -1 outside (`rankgrpo.parse.RankSegmenter`).
      eos_BT: bool, True at end-of-sequence tokens.
      reward_BK: (B, K), finite.

    Raises ValueError for wrong shapes, and ConfigError for lists of more than 127 units.
    """
    if not bool(reward_BK.isfinite().all()):
        raise ValueError("reward_BK must be finite")
    options = {"overflow_penalty": overflow_penalty, "early_eos_penalty": early_eos_penalty}
    units = make_units(rank_BT, eos_BT, reward_BK.float(), num_ranks=reward_BK.shape[1], **options)
    if bool((units.unit_BT >= MAX_UNITS).any()):
        raise ConfigError(f"a list has more than {MAX_UNITS} items; a shorter max_response_length ends it")
    following_BT = torch.nn.functional.pad(units.unit_BT[:, 1:], (0, 1), value=-1)
    ends_BT = (units.unit_BT >= 0) & (units.unit_BT != following_BT)
    value_BT = units.advantage_BU.gather(1, units.unit_BT.clamp(min=0))
    value_BT = torch.where(value_BT.abs() < 2 * _ZERO, _ZERO, value_BT)
    bits_BT = (value_BT.view(torch.int32) & ~_UNIT_MASK) | (units.unit_BT.clamp(min=0) + 1).int()
    return torch.where(ends_BT, bits_BT.view(torch.float32), 0.0)


def _read_rewards(marked_BT: Tensor, mask_BT: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Unit of every token, -1 outside, and the value of every unit, (B, U), 0 where it has no token."""
    if marked_BT.dtype != torch.float32:
        raise ValueError(f"token_level_rewards must be float32, as mark_rewards makes them, got {marked_BT.dtype}")
    listed_BT = mask_BT.bool()
    ends_BT = (marked_BT != 0) & listed_BT
    bits_BT = marked_BT.contiguous().view(torch.int32)
    end_unit_BT = (bits_BT & _UNIT_MASK).long() - 1
    if bool((ends_BT & (end_unit_BT < 0)).any()):
        raise ConfigError(
            "rewards are not marked with ranks: the reward manager must write rm_scores with "
            "rankgrpo.rollouts.integrations.verl.mark_rewards"
        )
    num_tokens = marked_BT.shape[1]
    position_T = torch.arange(num_tokens, device=marked_BT.device)
    place_BT = torch.where(ends_BT, position_T, num_tokens)
    end_BT = place_BT.flip(1).cummin(1).values.flip(1)  # the mark at or after every token
    unit_BT = end_unit_BT.gather(1, end_BT.clamp(max=num_tokens - 1))
    unit_BT = torch.where(listed_BT & (end_BT < num_tokens), unit_BT, -1)
    value_BT = (bits_BT & ~_UNIT_MASK).view(torch.float32)
    value_BT = torch.where(value_BT.abs() < 2 * _ZERO, 0.0, value_BT)
    num_units = max(int(unit_BT.max()) + 1, num_ranks)
    slot_BT = torch.where(ends_BT, end_unit_BT, num_units)
    value_BU = marked_BT.new_zeros(len(marked_BT), num_units + 1).scatter(1, slot_BT, value_BT)
    return unit_BT, value_BU[:, :num_units]


def _advantages(num_ranks: int, marked_BT: Tensor, mask_BT: Tensor, index: Any, config: Any) -> tuple[Tensor, Tensor]:
    if _option(config, "use_kl_in_reward", False):
        raise ConfigError(
            "algorithm.use_kl_in_reward=True adds to every token's reward and destroys the marks of ranks"
        )
    unit_BT, value_BU = _read_rewards(marked_BT, mask_BT, num_ranks)
    numbers: dict[Any, int] = {}
    group_B = torch.tensor([numbers.setdefault(name, len(numbers)) for name in index], device=marked_BT.device)
    scale = bool(_option(config, "norm_adv_by_std_in_grpo", True))
    advantage_BK = group_advantage(value_BU[:, :num_ranks], group_B, scale_by_std=scale)
    advantage_BU = torch.cat([advantage_BK, value_BU[:, num_ranks:]], dim=1)
    hidden_BT = hide_units(Units(unit_BT, advantage_BU, torch.ones_like(advantage_BU), 1))
    return hidden_BT, hidden_BT


def _policy_loss(
    num_ranks: int,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: Any,
    rollout_is_weights: Tensor | None,
) -> tuple[Tensor, dict[str, Any]]:
    if rollout_is_weights is not None:
        raise ConfigError(
            "rollout_is_weights are a token's or a list's; rank_grpo has no use for them: switch off "
            "algorithm.rollout_correction.rollout_is"
        )
    units = units_from_advantage(advantages, response_mask, num_ranks=num_ranks)
    info = config.global_batch_info
    num_lists, processes = info.get("global_batch_size"), info.get("dp_size") or 1
    low, high = (_option(config, f"clip_ratio_{side}", None) for side in ("low", "high"))
    loss, metrics = rank_grpo_loss(
        log_prob.float(),
        old_log_prob.float(),
        units.unit_BT,
        units.advantage_BU,
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
        # Lists of the whole mini-batch; verl averages gradients over dp_size processes and sums micro-batches.
        denominator=(num_lists or len(log_prob)) * num_ranks / processes,
    )
    low, high = metrics["ratio/clip_low_frac"], metrics["ratio/clip_high_frac"]
    return loss, {
        "actor/pg_clipfrac": float(low + high),
        "actor/pg_clipfrac_lower": float(low),
        "actor/rank_ratio_mean": float(metrics["ratio/mean"]),
    }


def _option(config: Any, name: str, default: Any) -> Any:
    if config is None:
        return default
    return config.get(name, default) if hasattr(config, "get") else getattr(config, name, default)
