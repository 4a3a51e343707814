"""Rank-GRPO in OpenRLHF (openrlhf >= 0.11.2, < 0.12): a loss in the place of its PolicyLoss, and rank advantages.

OpenRLHF has no registry: `RankPolicyLoss` is called as its `PolicyLoss` is and goes into
`ActorPPOTrainer.actor_loss_fn`; `rank_advantages` goes after `RemoteExperienceMaker.compute_advantages_and_returns`.
docs/integrations/openrlhf.md says how both get into its Ray actors. The loss gets no token ids, so units are hidden in
the advantages (`rankgrpo.units.hide_units`).
"""

# Shape letters: B lists, A action tokens, K ranks.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from rankgrpo.advantage import group_advantage
from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations import warn_if_untested
from rankgrpo.units import hide_units, make_units, units_from_advantage

FIRST, PAST = (0, 11, 2), (0, 12, 0)
# Arguments of PolicyLoss that would change another loss, and their values that mean "off".
NOT_HERE: dict[str, Any] = {"dual_clip": None, "policy_loss_type": "ppo", "is_correction_level": "off"}


class RankPolicyLoss(torch.nn.Module):
    """Takes the arguments of OpenRLHF's PolicyLoss; `advantages` must be those of `rank_advantages`.

    Raises ConfigError for settings of other losses.
    """

    def __init__(self, clip_eps_low: float = 0.06, clip_eps_high: float = 0.08, **others: Any) -> None:
        super().__init__()
        warn_if_untested("openrlhf", version("openrlhf"), FIRST, PAST)
        if wrong := {name: others[name] for name, off in NOT_HERE.items() if others.get(name, off) != off}:
            told = ", ".join(f"{name}={value!r} (leave it at {NOT_HERE[name]!r})" for name, value in wrong.items())
            raise ConfigError(f"settings of other losses, which RankPolicyLoss does not compute: {told}")
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: Tensor | float | None = None,
        global_batch_size: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Loss, share of clipped ranks, mean of -log ratio by token, and nothing for vLLM's mismatch."""
        units = units_from_advantage(advantages.float(), action_mask, num_ranks=1)  # the advantages are over K already
        loss, metrics = rank_grpo_loss(
            log_probs.float(),
            old_log_probs.float(),
            units.unit_BT,
            units.advantage_BU,
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            # Lists of the optimizer step over DeepSpeed's accumulation, by which it divides; it averages processes.
            denominator=(len(log_probs) if global_batch_size is None else global_batch_size) / dp_size,
        )
        inside_BA = action_mask.bool()
        kl = torch.where(inside_BA, old_log_probs - log_probs.detach(), 0.0).sum() / inside_BA.sum().clamp(min=1)
        return loss, metrics["ratio/clip_low_frac"] + metrics["ratio/clip_high_frac"], kl, None, None


def rank_advantages(
    experiences: list[Any],
    rank_reward: Callable[[list[str], list[Any]], Sequence[Sequence[float]]],
    tokenizer: Any,
    *,
    num_ranks: int,
    lists_per_prompt: int,
    end_ids: Iterable[int],
    scale_by_std: bool = True,
) -> list[Any]:
    """Write advantages (B, A) with hidden units, over K, into OpenRLHF's experiences, and return them.

    Args:
      experiences: of one rollout batch, whole groups; `index` says the place of every list in it.
      rank_reward: called with the texts of an experience's lists and its `labels`; returns K numbers a list.
      lists_per_prompt: `args.rollout.n_samples_per_prompt`.

    Raises ConfigError for rewards that are not K numbers a list.
    """
    segmenter, ends = RankSegmenter(tokenizer), torch.tensor(sorted(end_ids))
    rows, places = [], []
    for experience in experiences:
        ids_BA, mask_BA = _actions(experience)
        texts = tokenizer.batch_decode([ids[keep] for ids, keep in zip(ids_BA, mask_BA, strict=True)])
        reward_BK = torch.tensor(rank_reward(texts, experience.labels), dtype=torch.float32)
        if reward_BK.shape != (len(ids_BA), num_ranks) or not bool(reward_BK.isfinite().all()):
            raise ConfigError(
                f"rank_reward: expected finite numbers ({len(ids_BA)}, {num_ranks}), got {tuple(reward_BK.shape)}"
            )
        rows.append(reward_BK)
        places.extend(experience.index)
    group_B = torch.tensor(places) // lists_per_prompt
    advantage_BK = group_advantage(torch.cat(rows), group_B, scale_by_std=scale_by_std)
    for experience, part_BK in zip(experiences, advantage_BK.split([len(row) for row in rows]), strict=True):
        ids_BA, mask_BA = _actions(experience)
        eos_BA = torch.isin(ids_BA, ends) & mask_BA
        units = make_units(segmenter(ids_BA, mask_BA), eos_BA, part_BK, num_ranks=num_ranks)
        over_k = replace(units, advantage_BU=units.advantage_BU / num_ranks)
        experience.advantages = hide_units(over_k).to(experience.sequences.device)
    return experiences


def _actions(experience: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask of the tokens that the action columns stand for; on the CPU."""
    mask_BA = experience.action_mask.bool().cpu()
    return experience.sequences[:, -mask_BA.shape[1] :].cpu(), mask_BA
