"""Rank-GRPO in verl (verl >= 0.9, < 0.10): loss, advantage estimator, reward manager and agent loop named `rank_grpo`.

verl loads `rankgrpo.rollouts.integrations.verl_plugin` in each of its processes, by the entry point `verl.plugins` of
this package, so these keys of its configuration are all there is to set:

    algorithm.adv_estimator=rank_grpo  +algorithm.num_ranks=20
    actor_rollout_ref.actor.policy_loss.loss_mode=rank_grpo
    reward.reward_manager.name=rank_grpo  actor_rollout_ref.rollout.agent.default_agent_loop=rank_grpo

verl hands a loss five tensors of tokens and no ids, so ranks travel in numbers: see `rankgrpo.rollouts.integrations.
marks`. The reward manager and the agent loop, which write the marks, are in `verl_rewards` beside this module.
"""

# Shape letters: B lists, T completion tokens.

from __future__ import annotations

from typing import Any

import verl
from torch import Tensor
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    POLICY_LOSS_REGISTRY,
    register_adv_est,
    register_policy_loss,
)

from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.rollouts.integrations import warn_if_untested
from rankgrpo.rollouts.integrations.marks import marked_advantages
from rankgrpo.rollouts.integrations.verl_keys import num_ranks_of, option
from rankgrpo.units import units_from_advantage

FIRST, PAST = (0, 9), (0, 10)
NAME = "rank_grpo"


def register() -> None:
    """Register loss, estimator, reward manager and agent loop in this process; again is no error."""
    warn_if_untested("verl", verl.__version__, FIRST, PAST)
    POLICY_LOSS_REGISTRY.pop(NAME, None)
    ADV_ESTIMATOR_REGISTRY.pop(NAME, None)
    register_policy_loss(NAME)(_policy_loss)
    register_adv_est(NAME)(_advantages)
    from rankgrpo.rollouts.integrations import verl_rewards  # after the two above: it needs more of verl

    verl_rewards.register(NAME)


def check_registered() -> None:
    """Raise ConfigError unless `register` has run in this process; verl logs plug-ins that fail at debug level only."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

    registries = {
        "policy loss": POLICY_LOSS_REGISTRY,
        "advantage estimator": ADV_ESTIMATOR_REGISTRY,
        "reward manager": REWARD_MANAGER,
        "agent loop": _agent_loop_registry,
    }
    if missing := [what for what, registry in registries.items() if NAME not in registry]:
        raise ConfigError(
            f"verl knows no {' and no '.join(missing)} of the name {NAME}: its plug-in was not loaded. Check that "
            "VERL_USE_EXTERNAL_PLUGINS is unset or names rankgrpo, and that `python -c 'import "
            "rankgrpo.rollouts.integrations.verl_plugin'` works"
        )


def _advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    if option(config, "use_kl_in_reward", False):
        raise ConfigError(
            "algorithm.use_kl_in_reward=True adds to every token's reward and destroys the marks of ranks"
        )
    scale = bool(option(config, "norm_adv_by_std_in_grpo", True))
    hidden_BT = marked_advantages(token_level_rewards, response_mask, index, num_ranks_of(config), scale_by_std=scale)
    return hidden_BT, hidden_BT


def _policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    if rollout_is_weights is not None:
        raise ConfigError(
            "rollout_is_weights are a token's or a list's; rank_grpo has no use for them: switch off "
            "algorithm.rollout_correction.rollout_is"
        )
    units = units_from_advantage(advantages, response_mask, num_ranks=1)  # the advantages are over K already
    info = config.global_batch_info
    num_lists, processes = info.get("global_batch_size"), info.get("dp_size") or 1
    low, high = (option(config, f"clip_ratio_{side}", None) for side in ("low", "high"))
    loss, metrics = rank_grpo_loss(
        log_prob.float(),
        old_log_prob.float(),
        units.unit_BT,
        units.advantage_BU,
        clip_low=config.clip_ratio if low is None else low,
        clip_high=config.clip_ratio if high is None else high,
        # Lists of the whole mini-batch; verl averages gradients over dp_size processes and sums micro-batches.
        denominator=(num_lists or len(log_prob)) / processes,
    )
    low, high = metrics["ratio/clip_low_frac"], metrics["ratio/clip_high_frac"]
    return loss, {
        "actor/pg_clipfrac": float(low + high),
        "actor/pg_clipfrac_lower": float(low),
        "actor/rank_ratio_mean": float(metrics["ratio/mean"]),
    }
