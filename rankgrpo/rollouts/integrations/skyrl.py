"""Rank-GRPO in SkyRL (skyrl >= 0.3, < 0.4): a policy loss and an advantage estimator under the name `rank_grpo`.

SkyRL's registries reach every process through Ray, so `register(num_ranks=20)` once, where the run begins, is enough.
Its losses get no token ids, and its trainer divides advantages before they arrive, by lists and `max_seq_len`. So the
generator writes marked rewards, a number a token (`rankgrpo.rollouts.integrations.marks.mark_lists`), the estimator
keeps units apart in its advantages, which division leaves apart, and the loss multiplies `max_seq_len` back.
"""

# Shape letters: B lists, T completion tokens.

from __future__ import annotations

from functools import partial
from typing import Any

import skyrl
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import off_policy_correction_enabled
from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry, PolicyLossRegistry
from torch import Tensor

from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.rollouts.integrations import warn_if_untested
from rankgrpo.rollouts.integrations.marks import marked_advantages
from rankgrpo.units import units_from_advantage

FIRST, PAST = (0, 3), (0, 4)
NAME = "rank_grpo"
REDUCTION = "seq_mean_token_sum_norm"


def register(num_ranks: int) -> None:
    """Register loss and estimator for lists of `num_ranks` ranks; again replaces them."""
    warn_if_untested("skyrl", skyrl.__version__, FIRST, PAST)
    functions = {
        PolicyLossRegistry: policy_loss,
        AdvantageEstimatorRegistry: partial(advantages_of_marks, num_ranks=num_ranks),
    }
    for registry, function in functions.items():
        if NAME in registry.list_available():
            registry.unregister(NAME)
        registry.register(NAME, function)


def advantages_of_marks(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    config: Any,
    *,
    num_ranks: int,
    grpo_norm_by_std: bool = True,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Advantages (B, T) with hidden units, over K; twice, as SkyRL wants returns too."""
    for setting in ("use_kl_in_reward", "advantage_batch_normalize"):
        if getattr(config, setting):
            raise ConfigError(f"trainer.algorithm.{setting}=true adds to numbers that hold ranks: set it to false")
    hidden_BT = marked_advantages(
        token_level_rewards, response_mask, index, num_ranks, scale_by_std=bool(grpo_norm_by_std)
    )
    return hidden_BT, hidden_BT


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The sum over this micro-batch's ranks; SkyRL's division by lists is in the advantages."""
    if config.loss_reduction != REDUCTION or config.max_seq_len is None:
        raise ConfigError(
            f"trainer.algorithm.loss_reduction={config.loss_reduction!r} is not the mean over ranks of Eq. 6: "
            f"set {REDUCTION!r}, and max_seq_len to any number, which cancels"
        )
    if off_policy_correction_enabled(config.off_policy_correction):
        raise ConfigError("trainer.algorithm.off_policy_correction is by token or list; rank_grpo has no use for it")
    mask = (advantages != 0) if loss_mask is None else loss_mask
    units = units_from_advantage(advantages, mask, num_ranks=1)
    loss, metrics = rank_grpo_loss(
        log_probs.float(),
        old_log_probs.float(),
        units.unit_BT,
        units.advantage_BU,
        clip_low=config.eps_clip_low,
        clip_high=config.eps_clip_high,
        denominator=1 / config.max_seq_len,
    )
    clipped = metrics["ratio/clip_low_frac"] + metrics["ratio/clip_high_frac"]
    return loss, {"clip_ratio": float(clipped), "rank_ratio_mean": float(metrics["ratio/mean"])}
