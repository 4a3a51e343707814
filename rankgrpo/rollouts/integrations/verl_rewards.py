"""The way of K rewards a list through verl's rollouts: a reward manager marks them, an agent loop carries the marks."""

# Shape letters: T completion tokens.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import register as register_agent_loop
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager
from verl.experimental.reward_loop.reward_manager.registry import register as register_reward_manager

from rankgrpo.errors import ConfigError
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations.marks import mark_lists
from rankgrpo.rollouts.integrations.verl_keys import num_ranks_of


class RankRewardManager(NaiveRewardManager):
    """verl's naive manager for a `compute_score` that returns K numbers, the rewards of the list's ranks.

    A list's score is then one number a token (`mark_lists`). The end tokens are the tokenizer's end and padding.
    Raises ConfigError for what is not K finite numbers.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **options: Any) -> None:
        super().__init__(config, tokenizer, compute_score, **options)
        self.num_ranks = num_ranks_of(config.algorithm)
        self.segmenter = RankSegmenter(tokenizer)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        result = await super().run_single(data)
        rewards = result["reward_score"]
        item = data[-1:][0]
        ids_T = item.batch["responses"]
        ids_T = ids_T[: int(item.batch["attention_mask"][-len(ids_T) :].sum())]
        ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id} - {None}
        (marks,) = mark_lists([ids_T.tolist()], [rewards], self.num_ranks, self.segmenter, ends)
        total = float(sum(rewards))
        info = {name: total if value is rewards else value for name, value in result["reward_extra_info"].items()}
        return {"reward_score": marks, "reward_extra_info": info}

    @classmethod
    def assemble_rm_scores(cls, data: DataProto, scores: list[list[float]]) -> Tensor:
        """The marks of all lists, (B, T), right-padded with 0."""
        marked_BT = torch.zeros_like(data.batch["responses"], dtype=torch.float32)
        for marked_T, marks in zip(marked_BT, scores, strict=True):
            marked_T[: len(marks)] = torch.tensor(marks)
        return marked_BT


class MarkedOutput(AgentLoopOutput):
    """An output whose reward score may be one number a token, which become `rm_scores` as they are."""

    def as_dict(self) -> dict[str, Any]:
        marks, self.reward_score = self.reward_score, None
        output = super().as_dict()
        if not isinstance(marks, list):
            raise ConfigError(
                f"the agent loop rank_grpo got the reward score {marks!r}, expected one number a token: set "
                "reward.reward_manager.name=rank_grpo"
            )
        output["rm_scores"] = torch.tensor(marks)
        return output


class RankAgentLoop(SingleTurnAgentLoop):
    """verl's single turn, with an output that carries marks."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> MarkedOutput:
        output = await super().run(sampling_params, **kwargs)
        return MarkedOutput.model_construct(_fields_set=set(output.model_fields_set), **dict(output))


def register(name: str) -> None:
    register_reward_manager(name)(RankRewardManager)
    register_agent_loop(name)(RankAgentLoop)
