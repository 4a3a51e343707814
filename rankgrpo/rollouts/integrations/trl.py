"""Rank-GRPO in TRL's GRPOTrainer (trl >= 1.16, < 1.17): K rewards a completion, one ratio and advantage a rank.

Two of the trainer's methods are extended. After it has sampled, K rewards a completion are gathered over the processes,
and advantages, the rank of every token and the units go with the batch; `_compute_loss` takes the log-probs from the
trainer's own head and the loss from `rankgrpo.loss`. Sampling, vLLM, adapters, accelerate and FSDP are the trainer's.
"""

# Shape letters: B completions, T completion tokens, K ranks, U units.

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from rankgrpo.advantage import group_advantage
from rankgrpo.errors import ConfigError
from rankgrpo.loss import kl_k3, rank_grpo_loss, rank_log_ratio
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations import warn_if_untested
from rankgrpo.units import Unit, make_units

FIRST, PAST = (1, 16), (1, 17)
# Settings of GRPOConfig that would change a loss which is not computed here, and their values that mean "off".
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "loss_type": ("dapo", "grpo"),
    "importance_sampling_level": ("token",),
    "scale_rewards": ("group", "none"),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "top_entropy_quantile": (1.0,),
    "off_policy_mask_threshold": (None,),
    "use_adaptive_entropy": (False,),
    "entropy_coef": (0.0,),
    "delta": (None,),
}
# What a vision model gets beside the tokens.
VISION = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class RankGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with the objective of Rank-GRPO (arXiv 2510.20150, Eq. 6).

    Args:
      model: as GRPOTrainer takes it.
      rank_reward_funcs: one function or several, called as TRL calls a reward function; returns for every completion
        `num_ranks` numbers, the reward of its first, second, ... line. `args.reward_weights` weighs the functions.
      num_ranks: K, the length of the list that is asked for.
      args: GRPOConfig. `epsilon` and `epsilon_high` are the clip range (the paper's: 0.06 and 0.08), `beta` the weight
        of the KL to the reference, a mean by rank as the rest; it needs use_bias_correction_kl=False. vLLM's
        correction is by rank: its `*_truncate` modes clamp a rank's ratio of trainer to vLLM, its `*_mask` modes drop
        ranks outside.
      unit: "rank"; "token" or "list" are GRPO and GSPO on the sum of a completion's rewards, for comparison: TRL's own
        loss_type="grpo" at the level of tokens or sequences.
      overflow_penalty, early_eos_penalty, full_list_bonus: of `rankgrpo.units.make_units`.
      kwargs: all others that GRPOTrainer takes, but for `reward_funcs`.

    Raises ConfigError for settings of TRL that belong to other losses, and for rewards that are not K finite numbers.
    """

    def __init__(
        self,
        model: Any,
        rank_reward_funcs: Callable | list[Callable],
        num_ranks: int,
        args: GRPOConfig | None = None,
        *,
        unit: Unit = "rank",
        overflow_penalty: float = -0.1,
        early_eos_penalty: float = -0.1,
        full_list_bonus: float = 0.0,
        **kwargs: Any,
    ) -> None:
        warn_if_untested("trl", trl.__version__, FIRST, PAST)
        if num_ranks < 1:
            raise ConfigError(f"num_ranks must be at least 1, got {num_ranks}")
        if "reward_funcs" in kwargs:
            raise ConfigError(
                "reward_funcs gives one reward a completion; give rank_reward_funcs, which give num_ranks numbers a "
                "completion (the same number K times is a reward of the whole list)"
            )
        functions = list(rank_reward_funcs) if isinstance(rank_reward_funcs, list | tuple) else [rank_reward_funcs]
        self.rank_rewards = [_RankReward(function, num_ranks) for function in functions]
        super().__init__(model=model, reward_funcs=list(self.rank_rewards), args=args, **kwargs)
        _refuse_other_losses(self.args)
        self.num_ranks, self.unit = num_ranks, unit
        self.penalties = {
            "overflow_penalty": overflow_penalty,
            "early_eos_penalty": early_eos_penalty,
            "full_list_bonus": full_list_bonus,
        }
        self.segmenter = RankSegmenter(self._tokenizer)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        ids_BT = output["completion_ids"]
        advantage_BK = self._rank_advantages(mode, ids_BT.device)
        mask_BT = _mask(output).bool()
        eos_ids = torch.tensor(self.eos_token_ids, device=ids_BT.device)
        units = make_units(
            self.segmenter(ids_BT, mask_BT),
            torch.isin(ids_BT, eos_ids) & mask_BT,
            advantage_BK,
            unit=self.unit,
            num_ranks=self.num_ranks,
            **self.penalties,
        )
        # Tensors of leading dimension B are shuffled and split with the batch.
        carried = {"unit": units.unit_BT, "unit_advantage": units.advantage_BU, "unit_weight": units.weight_BU}
        return output | {name: value.contiguous() for name, value in carried.items()}

    def _rank_advantages(self, mode: str, device: torch.device) -> Tensor:
        """Advantages of this process's completions: groups may lie across processes."""
        weights = self.reward_weights.tolist()
        parts = [reward.reward_BK for reward in self.rank_rewards]
        local_BK = sum(weight * part_BK for weight, part_BK in zip(weights, parts, strict=True)).to(device)
        reward_BK = self.accelerator.gather(local_BK)
        for rank, mean in enumerate(reward_BK.mean(0).tolist()):
            self._metrics[mode][f"reward/rank_{rank:02d}"].append(mean)
        if self.unit != "rank":
            reward_BK = reward_BK.sum(1, keepdim=True)
        size = self.num_generations if mode == "train" else self.num_generations_eval
        reward_PGK = reward_BK.view(-1, size, reward_BK.shape[1])
        advantage_PGK = group_advantage(reward_PGK, scale_by_std=self.scale_rewards == "group")
        start = self.accelerator.process_index * len(local_BK)
        return advantage_PGK.flatten(0, 1)[start : start + len(local_BK)]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids_BT = inputs["completion_ids"]
        logp_BT, entropy_BT, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], ids_BT], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            ids_BT.shape[1],
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs[name] for name in VISION if name in inputs},
        )
        logp_BT, old_logp_BT = logp_BT.float(), inputs.get("old_per_token_logps")
        ref_logp_BT = inputs["ref_per_token_logps"].float() if self.beta else None
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        count = len(ids_BT) * (self.num_ranks if self.unit == "rank" else 1)
        loss, metrics = rank_grpo_loss(
            logp_BT,
            None if old_logp_BT is None else old_logp_BT.float(),
            inputs["unit"],
            inputs["unit_advantage"],
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            ref_logp_BT=ref_logp_BT,
            kl_coef=self.beta,
            # accelerate averages gradients over processes, and nothing else divides by the accumulation steps.
            denominator=count * accumulation,
            weight_BK=self._weight(inputs),
        )
        self._log_loss(metrics, logp_BT.detach(), ref_logp_BT, entropy_BT, _mask(inputs))
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather_for_metrics(aux_loss).mean().item())
        return loss

    def _weight(self, inputs: dict[str, Any]) -> Tensor:
        """Weight of every unit, with vLLM's correction by unit where TRL has one by token or list."""
        weight_BU = inputs["unit_weight"]
        if "importance_sampling_ratio" not in inputs:
            return weight_BU
        old_logp_BT, sampled_BT = inputs["old_per_token_logps"].float(), inputs["sampling_per_token_logps"].float()
        sampled_BT = torch.where(sampled_BT.isnan(), old_logp_BT, sampled_BT)  # vLLM could not score these tokens
        ratio_BU = rank_log_ratio(old_logp_BT, sampled_BT, inputs["unit"], weight_BU.shape[1]).exp()
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        low, high = 0.0 if low is None else low, math.inf if high is None else high
        if self.vllm_importance_sampling_mode.endswith("truncate"):
            return weight_BU * ratio_BU.clamp(low, high)
        return weight_BU * torch.where((ratio_BU >= low) & (ratio_BU <= high), ratio_BU, 0.0)

    def _log_loss(
        self, metrics: dict[str, Tensor], logp_BT: Tensor, ref_logp_BT: Tensor | None, entropy_BT: Tensor, mask: Tensor
    ) -> None:
        """Means over all processes under TRL's names: kl and entropy by token, the rest by unit."""
        kl = kl_k3(logp_BT, ref_logp_BT) if ref_logp_BT is not None else torch.zeros_like(logp_BT)
        inside_BT = mask.bool()
        units = metrics["ratio/num_units"]
        low, high = (metrics[f"ratio/clip_{side}_frac"] * units for side in ("low", "high"))
        ratios = metrics["ratio/mean"] * units
        sums = [kl[inside_BT].sum(), entropy_BT.detach()[inside_BT].sum(), inside_BT.sum(), low, high, ratios, units]
        totals = self.accelerator.reduce(torch.stack([value.float() for value in sums]), reduction="sum")
        kl, entropy, num_tokens, low, high, ratios, units = totals.tolist()
        num_tokens, units = max(num_tokens, 1.0), max(units, 1.0)
        logged = self._metrics["train" if self.model.training else "eval"]
        if self.beta:
            logged["kl"].append(kl / num_tokens)
        logged["entropy"].append(entropy / num_tokens)
        logged["clip_ratio/low_mean"].append(low / units)
        logged["clip_ratio/high_mean"].append(high / units)
        logged["clip_ratio/region_mean"].append((low + high) / units)
        logged["ratio/mean"].append(ratios / units)


class _RankReward:
    """A reward function of TRL's kind, the sum over a completion's ranks, which keeps the ranks' rewards."""

    def __init__(self, function: Callable, num_ranks: int) -> None:
        self.function, self.num_ranks = function, num_ranks
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        if inspect.iscoroutinefunction(function):
            raise ConfigError(f"{self.__name__}: a rank reward function must not be async")
        self.reward_BK = torch.zeros(0, num_ranks)

    def __call__(self, completions: list, **columns: Any) -> list[float]:
        rows = list(self.function(completions=completions, **columns))
        if len(rows) != len(completions):
            raise ConfigError(
                f"{self.__name__} returned {len(rows)} rows of rewards for {len(completions)} completions"
            )
        for place, row in enumerate(rows):
            values = row.tolist() if isinstance(row, Tensor) else row
            count = len(values) if hasattr(values, "__len__") else None
            if count != self.num_ranks or not all(math.isfinite(value) for value in values):
                raise ConfigError(
                    f"{self.__name__}, completion {place}: expected {self.num_ranks} finite numbers, one a rank (0 for "
                    f"a rank that the list does not have), got {values!r}"
                )
        self.reward_BK = torch.tensor([[float(value) for value in row] for row in rows])
        return self.reward_BK.sum(1).tolist()


def _mask(inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _refuse_other_losses(args: GRPOConfig) -> None:
    wrong = {
        name: getattr(args, name)
        for name, off in NOT_HERE.items()
        if hasattr(args, name) and getattr(args, name) not in off
    }
    if args.beta and getattr(args, "use_bias_correction_kl", False):
        raise ConfigError(
            f"beta={args.beta} with use_bias_correction_kl=True, TRL's default, weighs the KL of a token by its ratio; "
            "the KL of Rank-GRPO is the plain k3 estimate: set use_bias_correction_kl=False"
        )
    if wrong:
        told = ", ".join(f"{name}={value!r} (leave it at {NOT_HERE[name][0]!r})" for name, value in wrong.items())
        raise ConfigError(f"settings of other losses, which RankGRPOTrainer does not compute: {told}")
