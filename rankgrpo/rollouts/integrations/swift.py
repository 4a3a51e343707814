"""Rank-GRPO in ms-swift (ms-swift >= 4.6, < 4.7): a class to stand before its GRPOTrainer.

    class RankGRPOTrainer(RankGRPOMixin, GRPOTrainer):
        num_ranks = 20

Its K reward functions give one number a list each, the reward of one rank; ms-swift gathers them over processes as it
does for any functions. It carries advantages a token, so units are hidden there (`rankgrpo.units.hide_units`), and the
log-probs are those of its own forward pass. docs/integrations/swift.md says how the class gets into a run.
"""

# Shape letters: N lists of all processes, B lists, T completion tokens, G lists a prompt, K ranks.

from __future__ import annotations

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

FIRST, PAST = (4, 6), (4, 7)
# Attributes of the trainer that would change a loss which is not computed here, and their values that mean "off".
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "loss_type": ("grpo",),
    "importance_sampling_level": ("token",),
    "kl_in_reward": (False,),
    "dynamic_num_samples": (False,),
    "sdar_loss_coef": (0.0, 0),
    "rollout_importance_sampling_mode": (None,),
    "off_policy_sequence_mask_delta": (None,),
    "scale_rewards": ("group", "none"),
}


class RankGRPOMixin:
    """The objective of Rank-GRPO in ms-swift's GRPOTrainer; `num_ranks` must be set, and as many reward functions.

    `epsilon` and `epsilon_high` are the clip range, `beta` weighs the KL, the k3 estimate as a mean by rank.
    Raises ConfigError for settings of other losses, and where rewards are not one function a rank.
    """

    num_ranks: int

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        warn_if_untested("ms-swift", version("ms-swift"), FIRST, PAST)
        wrong = {name: getattr(self, name) for name, off in NOT_HERE.items() if getattr(self, name) not in off}
        if wrong:
            told = ", ".join(f"{name}={value!r} (set {NOT_HERE[name][0]!r})" for name, value in wrong.items())
            raise ConfigError(f"settings of other losses, which RankGRPOMixin does not compute: {told}")
        if self.template.padding_free:
            raise ConfigError("padding_free=true packs token ids, from which ranks are read: set it to false")

    def _postprocess_batch(self, samples: list[Any], batch_encoded_inputs: list[dict[str, Any]]) -> None:
        super()._postprocess_batch(samples, batch_encoded_inputs)
        reward_NK = self._rewards_per_func
        if reward_NK.shape[1] != self.num_ranks:
            raise ConfigError(f"expected {self.num_ranks} reward functions, one a rank, got {reward_NK.shape[1]}")
        size = self.num_generations if self.model.training else self.num_generations_eval
        reward_PGK = reward_NK.float().view(-1, size, self.num_ranks)
        advantage_NK = group_advantage(reward_PGK, scale_by_std=self.scale_rewards == "group").flatten(0, 1)
        start = self.accelerator.process_index * len(samples)
        for batch in batch_encoded_inputs:
            ids_BT, mask_BT = _completions(batch)
            part_BK = advantage_NK[start : start + len(ids_BT)].to(ids_BT.device)
            batch["grpo_batch"].advantages = self._hidden(ids_BT, mask_BT, part_BK)
            start += len(ids_BT)

    def _hidden(self, ids_BT: Tensor, mask_BT: Tensor, advantage_BK: Tensor) -> Tensor:
        tokenizer = self.template.tokenizer
        ends = sorted({tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})
        eos_BT = torch.isin(ids_BT, torch.tensor(ends, device=ids_BT.device)) & mask_BT
        units = make_units(RankSegmenter(tokenizer)(ids_BT, mask_BT), eos_BT, advantage_BK, num_ranks=self.num_ranks)
        return hide_units(replace(units, advantage_BU=units.advantage_BU / self.num_ranks))

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        found = super()._get_per_token_logps_and_entropies(*args, **options)
        self._rank_logp_BT = found[0]
        return found

    def _compute_loss_and_metrics(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        _, metrics_data = super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        logp_BT, old_BT, ref_BT = self._rank_logp_BT.float(), grpo_batch.old_per_token_logps, None
        if self.beta:
            ref_BT = grpo_batch.ref_per_token_logps.float()
        units = units_from_advantage(grpo_batch.advantages, grpo_batch.completion_mask, num_ranks=1)
        # The KL counts every rank once; the advantages are over K, so their sum over ranks is a mean already.
        loss, _ = rank_grpo_loss(
            logp_BT,
            None if old_BT is None else old_BT.float(),
            units.unit_BT,
            units.advantage_BU,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            ref_logp_BT=ref_BT,
            kl_coef=self.beta / self.num_ranks,
            # Its Trainer divides by the accumulation steps and averages over processes.
            denominator=len(logp_BT),
        )
        return loss, metrics_data


def _completions(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and mask of the completion tokens of a micro-batch."""
    mask_BT = batch["grpo_batch"].completion_mask.bool()
    return batch["model_inputs"]["input_ids"][:, -mask_BT.shape[1] :], mask_BT
