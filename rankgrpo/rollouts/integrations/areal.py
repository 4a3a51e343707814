"""Rank-GRPO in AReaL (areal >= 1.0.4, < 1.1): a PPOActor whose loss has one ratio and one advantage a rank.

Any tensor a token of a trajectory reaches a loss in AReaL, packed end to end, so units travel as they are. A
RolloutWorkflow must return `rank_rewards`, (lists, K) float32, beside what it returns for AReaL's own loss.
"""

# Shape letters: B lists, S tokens of prompt and list, K ranks, U units, M tokens of a micro-batch, end to end.

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from areal.trainer.ppo.actor import PPOActor
from areal.utils import stats_tracker
from torch import Tensor

from rankgrpo.advantage import group_advantage
from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations import warn_if_untested
from rankgrpo.units import make_units

FIRST, PAST = (1, 0, 4), (1, 1, 0)
# Settings of PPOActorConfig that would change a loss which is not computed here, and their values that mean "off".
NOT_HERE: dict[str, Any] = {
    "use_decoupled_loss": False,
    "use_sapo_loss": False,
    "importance_sampling_level": "token",
    "c_clip": None,
    "m2_threshold": None,
    "rejection_sampling": None,
}


class RankPPOActor(PPOActor):
    """AReaL's PPOActor with the objective of Rank-GRPO.

    `config.eps_clip` and `eps_clip_higher` are the clip range; `kl_ctl` weighs the KL to the reference, a mean by rank,
    where the batch has `ref_logp`; `adv_norm.std_level=None` only centres. Its statistics of rewards and advantages by
    token stay AReaL's.

    Args:
      tokenizer: of the model; ranks are read from token ids.
      num_ranks: K.
      group_size: lists of a prompt, which lie one after the other.
      end_ids: the ids that end a list.

    Raises ConfigError for settings of other losses.
    """

    def __init__(
        self, config: Any, engine: Any, tokenizer: Any, *, num_ranks: int, group_size: int, end_ids: Iterable[int]
    ) -> None:
        warn_if_untested("areal", version("areal"), FIRST, PAST)
        if wrong := {name: getattr(config, name) for name, off in NOT_HERE.items() if getattr(config, name) != off}:
            told = ", ".join(f"{name}={value!r} (set {NOT_HERE[name]!r})" for name, value in wrong.items())
            raise ConfigError(f"settings of other losses, which RankPPOActor does not compute: {told}")
        super().__init__(config, _RankEngine(engine, config))
        self.segmenter, self.num_ranks, self.group_size = RankSegmenter(tokenizer), num_ranks, group_size
        self.end_ids = torch.tensor(sorted(end_ids))

    def _compute_advantages(self, data: dict[str, Any]) -> dict[str, Any]:
        mask_BS, ids_BS = data["loss_mask"].bool(), data["input_ids"]
        reward_BK = data.pop("rank_rewards", None)
        if reward_BK is None or reward_BK.shape != (len(ids_BS), self.num_ranks):
            found = "nothing" if reward_BK is None else tuple(reward_BK.shape)
            raise ConfigError(
                f"the workflow must return rank_rewards (lists, {self.num_ranks}), one number a rank; got {found}"
            )
        if len(ids_BS) % self.group_size:
            raise ConfigError(f"{len(ids_BS)} lists are no whole groups of group_size={self.group_size}")
        reward_PGK = reward_BK.float().view(-1, self.group_size, self.num_ranks)
        norm = self.config.adv_norm
        advantage_PGK = group_advantage(reward_PGK, scale_by_std=norm is None or norm.std_level is not None)
        units = make_units(
            self.segmenter(ids_BS, mask_BS),
            torch.isin(ids_BS, self.end_ids.to(ids_BS.device)) & mask_BS,
            advantage_PGK.flatten(0, 1),
            num_ranks=self.num_ranks,
        )
        data = super()._compute_advantages(data)  # old log-probs and masks, which it moves by one; its statistics
        # AReaL splits and packs what has a number a token and nothing else, so advantages travel a token each.
        value_BS = units.advantage_BU.gather(1, units.unit_BT.clamp(min=0))
        data["advantages"] = torch.where(units.unit_BT >= 0, value_BS, 0.0).roll(-1, 1)
        data["rank_units"] = units.unit_BT.roll(-1, 1)
        return data

    def _ppo_update(self, data: dict[str, Any]) -> None:
        self.engine.num_ranks = self.num_ranks
        super()._ppo_update(data)


class _RankEngine:
    """A TrainEngine that trains with the loss of ranks, whichever it is given."""

    def __init__(self, engine: Any, config: Any) -> None:
        self.engine, self.config, self.num_ranks = engine, config, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def train_batch(self, batch: Any, loss_fn: Any, loss_weight_fn: Any) -> dict[str, float]:
        loss = partial(rank_loss, num_ranks=self.num_ranks, config=self.config)
        return self.engine.train_batch(batch, loss_fn=loss, loss_weight_fn=count_lists)


def count_lists(data: dict[str, Any]) -> Tensor:
    """Lists of a micro-batch, its weight in AReaL's mean over micro-batches and processes."""
    return _list_of_token(data)[data["rank_units"] >= 0].unique().numel() * torch.ones(
        (), device=data["rank_units"].device
    )


def rank_loss(
    logprobs: Tensor, entropy: Tensor, input_data: dict[str, Any], *, num_ranks: int, config: Any, **_: Any
) -> Tensor:
    """The mean over the ranks of a micro-batch's lists; called as AReaL calls `grpo_loss_fn`."""
    unit_M, cu_seqlens = input_data["rank_units"], input_data["cu_seqlens"]
    num_units = max(int(unit_M.max()) + 1, num_ranks)
    advantage_BU = logprobs.new_zeros(len(cu_seqlens) - 1, num_units, dtype=torch.float32)
    inside_M = unit_M >= 0
    # Tokens of one unit hold the same number, so it does not matter which of them writes it.
    advantage_BU[_list_of_token(input_data)[inside_M], unit_M[inside_M]] = input_data["advantages"][inside_M].float()
    ref_logp_M = input_data.get("ref_logp")
    loss, metrics = rank_grpo_loss(
        logprobs.float(),
        input_data["logprobs"].float(),
        unit_M,
        advantage_BU,
        clip_low=config.eps_clip,
        clip_high=config.eps_clip if config.eps_clip_higher is None else config.eps_clip_higher,
        ref_logp_BT=None if ref_logp_M is None else ref_logp_M.float(),
        kl_coef=0.0 if ref_logp_M is None else config.kl_ctl,
        denominator=count_lists(input_data).clamp(min=1) * num_ranks,
        cu_seqlens=cu_seqlens,
    )
    scalars = {name.replace("/", "_"): float(value) for name, value in metrics.items()}
    stats_tracker.scalar(**scalars, entropy=float(entropy.detach()[inside_M].float().mean()))
    return loss


def _list_of_token(data: dict[str, Any]) -> Tensor:
    unit_M, cu_seqlens = data["rank_units"], data["cu_seqlens"]
    place_M = torch.arange(len(unit_M), device=unit_M.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, place_M, right=True) - 1
