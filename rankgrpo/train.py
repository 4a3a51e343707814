"""Rank-GRPO: sample G lists a prompt, reward every rank, step on the clipped rank-wise objective.

The loop at the end reads top to bottom: sample -> score -> update -> validate -> checkpoint. Everything random is a
function of (seed, step, prompt), so a run that is killed and started again writes the metrics it would have written.
"""

# Shape letters: P prompts, G lists a prompt, B = P*G, T tokens, K ranks, U units (ranks and penalties, tokens, lists).
from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rankgrpo.config import Config, RlConfig
from rankgrpo.data.order import BatchOrder
from rankgrpo.data.prompt import encode_prompts
from rankgrpo.data.samples import Dataset
from rankgrpo.errors import TrainingError
from rankgrpo.evaluation.validate import validate
from rankgrpo.files.atomic import point_link
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.model.packing import Group, Pack, plan_micro_batches
from rankgrpo.model.policy import Policy, open_policy, open_reference
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts import mismatch
from rankgrpo.rollouts.score import score_groups
from rankgrpo.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from rankgrpo.runtime.distributed import Parallel, make_sharding, sum_gradients, wait_for_all
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import check_finite, learning_rate, make_optimizer, optimizer_step
from rankgrpo.runtime.tracker import MetricsLog
from rankgrpo.sampler.base import Sampler, prompt_seed
from rankgrpo.sampler.choose import open_sampler
from rankgrpo.sampler.sync import explain_mismatch, sync_weights
from rankgrpo.units import Units, make_units


@dataclass
class MicroBatch:
    """Whole groups of one forward pass, and what does not change between the updates of a batch."""

    groups: list[Group]
    advantage_BU: Tensor
    sampler_logp: list[list[float]]
    old_logp_BT: Tensor | None = None
    """Set by the first update, whose policy is the one that sampled."""
    ref_logp_BT: Tensor | None = None
    """Set by `Updater.add_reference` when there is a reference."""
    units: Units | None = None


class Updater:
    """Optimizer steps on one batch of scored rollouts."""

    def __init__(
        self,
        policy: Policy,
        ref: Policy | None,
        sampler: Sampler,
        optimizer: torch.optim.Optimizer,
        config: Config,
        parallel: Parallel,
    ):
        self.policy, self.ref, self.sampler, self.optimizer, self.parallel = policy, ref, sampler, optimizer, parallel
        self.rl, self.num_ranks = config.rl, config.data.num_ranks
        self.segmenter = RankSegmenter(policy.tokenizer)
        self.eos_ids = torch.tensor(sampler.eos_ids, device=policy.device)

    @torch.no_grad()
    def add_reference(self, batch: list[MicroBatch]) -> None:
        """Log-probs under the reference model, which all updates of a batch share."""
        if self.ref is None:
            return
        for micro_batch in self.ref.paced(batch):
            _, micro_batch.ref_logp_BT = self.ref.logprobs(micro_batch.groups, temperature=self.rl.temperature)

    def step(self, batch: list[MicroBatch], denominator: float, lr: float, where: str, means: Means) -> float:
        """One optimizer step on the whole batch; returns the gradient norm."""
        loss_sum = torch.zeros((), device=self.policy.device)
        for name in ("loss/policy", "loss/kl", "tokens/trained"):
            means.add_sum(name, 0.0)
        for micro_batch in self.policy.paced(batch):
            loss_sum += self._backward(micro_batch, denominator, means)
        check_finite(float(loss_sum), where, "the loss")
        self._check_mismatch(means, where)
        sum_gradients(self.policy.model, self.parallel)
        return optimizer_step(
            self.optimizer, self.policy.model.parameters(), lr=lr, grad_clip=self.rl.grad_clip, where=where
        )

    def _backward(self, micro_batch: MicroBatch, denominator: float, means: Means) -> Tensor:
        rl = self.rl
        pack, logp_BT = self.policy.logprobs(micro_batch.groups, temperature=rl.temperature)
        if micro_batch.units is None:
            means.add("tokens/saved_frac", pack.tokens_dense - pack.tokens_shared, pack.tokens_dense)
            means.add_sum("tokens/trained", pack.tokens_shared)
            units, now_BT = self._units(pack, micro_batch.advantage_BU), logp_BT.detach()
            sampler_logp_BT = mismatch.as_padded(micro_batch.sampler_logp, pack.mask_BT)
            mismatch.describe_mismatch(units, now_BT, sampler_logp_BT, pack.mask_BT, rl, means)
            micro_batch.units = mismatch.correct_units(units, now_BT, sampler_logp_BT, rl, means)
        units = micro_batch.units
        loss, metrics = rank_grpo_loss(
            logp_BT,
            micro_batch.old_logp_BT,
            units.unit_BT,
            units.advantage_BU,
            clip_low=rl.clip_low,
            clip_high=rl.clip_high,
            ref_logp_BT=micro_batch.ref_logp_BT,
            kl_coef=rl.kl_coef,
            reduction=rl.reduction,
            denominator=denominator,
            weight_BK=units.weight_BU,
            impl=self.policy.impl,
        )
        loss.backward()
        if micro_batch.old_logp_BT is None and rl.updates_per_batch > 1:
            micro_batch.old_logp_BT = logp_BT.detach()
        num_units = metrics["ratio/num_units"]
        for name in ("ratio/mean", "ratio/clip_low_frac", "ratio/clip_high_frac"):
            means.add(name, metrics[name] * num_units, num_units)
        share = 1 / rl.updates_per_batch  # sums over the step's units, averaged over its updates
        for name in ("loss/policy", "loss/kl"):
            means.add_sum(name, metrics[name] * share)
        return loss.detach()

    def _units(self, pack: Pack, advantage_BU: Tensor) -> Units:
        eos_BT = torch.isin(pack.token_ids_BT, self.eos_ids) & pack.mask_BT
        return make_units(
            self.segmenter(pack.token_ids_BT, pack.mask_BT),
            eos_BT,
            advantage_BU,
            unit=self.rl.unit,
            num_ranks=self.num_ranks,
            overflow_penalty=self.rl.overflow_penalty,
            early_eos_penalty=self.rl.early_eos_penalty,
            full_list_bonus=self.rl.full_list_bonus,
            mean_by_list=self.rl.token_mean == "list",
        )

    def _check_mismatch(self, means: Means, where: str) -> None:
        """Stop, before the weights change, when the sampler's log-probs are not the trainer's."""
        total, count = self.parallel.sum(means.pairs.get("mismatch/exp_abs_logp", [0.0, 0.0]))
        alarm = self.rl.mismatch_alarm
        if total <= alarm * count:
            return
        raise TrainingError(
            f"{where}: mean exp|trainer's - sampler's log-prob| is {total / count:.4f}, above rl.mismatch_alarm = "
            f"{alarm:g}. {explain_mismatch(self.sampler, self.policy.model)}. The weights were not changed and the "
            f"last checkpoint is intact"
        )


def train(config: Config, dataset: Dataset, start: str | Path, out: Path, parallel: Parallel) -> Path:
    """Run Rank-GRPO from the model `start`; returns `out/best`, the best model by validation NDCG@K up to its noise:
    the last that comes within one standard error of the highest score before it.

    Writes out/metrics.jsonl, out/checkpoints, out/best and out/final (Hugging Face folders). Resumes from the newest
    checkpoint; returns at once when `out/final` exists.
    """
    final = out / "final"
    if final.is_dir():
        return out / "best"
    rl, num_ranks = config.rl, config.data.num_ranks
    device, sharding = parallel.device, make_sharding(config.parallel, parallel)
    policy = open_policy(start, config.model, device, sharding=sharding, adapter=config.adapter, seed=config.seed)
    ref = open_reference(policy, start, config.model, device, sharding) if rl.kl_coef > 0 else None
    optimizer = make_optimizer(policy.model, lr=rl.lr, betas=rl.betas, weight_decay=rl.weight_decay, eps=rl.adam_eps)
    sampler = open_sampler(policy, config, parallel)
    updater = Updater(policy, ref, sampler, optimizer, config, parallel)
    order = BatchOrder(len(dataset.train), rl.prompts_per_step, config.seed, parallel.dp_rank, parallel.dp_world)
    prompts = encode_prompts(policy.tokenizer, dataset.train, config.data.max_prompt_tokens)
    val_samples = dataset.validation[: rl.eval_samples]

    done, best = 0, {"ndcg": -1.0, "se": 0.0}
    if (checkpoint := latest_checkpoint(out / "checkpoints", parallel)) is not None:
        state = load_checkpoint(checkpoint, policy.model, optimizer)
        done, best = state["step"], state["best"]
    log = (
        MetricsLog(out / "metrics.jsonl", resume_step=done, num_steps=rl.num_steps, title="Rank-GRPO")
        if parallel.is_main
        else None
    )

    def validate_and_keep_best(finished: int) -> dict[str, float]:
        nonlocal best
        metrics = validate(policy, sampler, val_samples, dataset.catalog, config, parallel)
        ndcg = metrics[f"eval/ndcg@{num_ranks}"]
        # The highest of many noisy scores is mostly luck, and the last steps have the lowest learning rate.
        if ndcg >= best["ndcg"] - best["se"]:
            keep_best(policy, out, finished, parallel)
        if ndcg > best["ndcg"]:
            best = {"ndcg": ndcg, "se": metrics[f"eval/se_ndcg@{num_ranks}"]}
        return metrics

    sync_weights(sampler, policy.model)
    if done == 0:
        metrics = validate_and_keep_best(0)
        if log is not None:
            log.write(0, metrics)

    for step in range(done, rl.num_steps):
        began, means, where = time.perf_counter(), Means(), f"RL step {step + 1}"
        indices = order.indices(step)
        examples = [dataset.train[i] for i in indices]

        rollouts = sampler.sample(
            [prompts[i] for i in indices],
            group_size=rl.group_size,
            seeds=[prompt_seed(config.seed, step, example.id) for example in examples],
            max_new_tokens=rl.max_new_tokens,
            temperature=rl.temperature,
        )
        sampler.sleep()
        sampled = time.perf_counter()

        scored = score_groups(rollouts, examples, dataset.catalog, rl, num_ranks, means, updater.segmenter)
        # Without a KL term a group whose lists all earned the same moves nothing: leave it out, keep it in the count.
        chosen = [p for p in range(len(indices)) if scored.carries_gradient[p] or rl.kl_coef > 0]
        groups = [Group(prompts[indices[p]], [rollout.token_ids for rollout in rollouts[p]]) for p in chosen]
        batch = [
            MicroBatch(
                [groups[i] for i in micro],
                torch.cat([scored.advantage_PGU[chosen[i]] for i in micro]).to(policy.device),
                [rollout.logp for i in micro for rollout in rollouts[chosen[i]]],
            )
            for micro in plan_micro_batches(groups, rl.token_budget)
        ]
        num_tokens = sum(len(rollout.token_ids) for group in rollouts for rollout in group)
        denominator = step_denominator(rl, num_ranks, num_tokens, parallel)
        scored_at = time.perf_counter()

        updater.add_reference(batch)
        for update in range(rl.updates_per_batch):
            lr = learning_rate(
                step,
                num_steps=rl.num_steps,
                peak=rl.lr,
                schedule=rl.schedule,
                warmup_frac=rl.warmup_frac,
                second_phase_at=rl.second_phase_at,
                second_phase_lr=rl.second_phase_lr,
            )
            norm = updater.step(batch, denominator, lr, f"{where}, update {update + 1}", means)
        updated = time.perf_counter()
        sync_weights(sampler, policy.model)
        synced = time.perf_counter()

        means.add("groups/trained_frac", len(chosen), len(indices))
        means.add("tokens/sampled", num_tokens, 1 / parallel.dp_world)
        metrics = means.reduce(parallel)
        metrics |= {"grad/norm": norm, "lr": lr}
        finished = step + 1
        if finished % rl.eval_every == 0 or finished == rl.num_steps:
            metrics |= validate_and_keep_best(finished)
        metrics |= {
            "time/sample_s": sampled - began,
            "time/score_s": scored_at - sampled,
            "time/update_s": updated - scored_at,
            "time/sync_s": synced - updated,
            "time/total_s": time.perf_counter() - began,
        }
        if log is not None:
            log.write(finished, metrics)
        if finished % rl.save_every == 0 and finished < rl.num_steps:
            state = {"best": best}
            save_checkpoint(out / "checkpoints", finished, policy.model, optimizer, state, rl.keep_last, parallel)
    if log is not None:
        log.close()
    policy.export(final, parallel)
    sampler.sleep()
    wait_for_all(parallel)
    return out / "best"


def step_denominator(rl: RlConfig, num_ranks: int, num_tokens: int, parallel: Parallel) -> float:
    """What the losses of a whole step are divided by; num_tokens counts this process's sampled tokens."""
    num_lists = rl.prompts_per_step * rl.group_size
    if rl.reduction == "token" or rl.token_mean == "batch":
        return parallel.sum([num_tokens])[0]
    if rl.token_mean == "max":
        return num_lists * rl.max_new_tokens
    return num_lists * (num_ranks if rl.unit == "rank" else 1)


def keep_best(policy: Policy, out: Path, finished: int, parallel: Parallel) -> None:
    """Export the policy and point out/best at it; the export before it goes only once the link has moved."""
    export = out / f"best-{finished:08d}"
    policy.export(export, parallel)
    if not parallel.is_main:
        return
    point_link(out / "best", export)
    for old in out.glob("best-*"):
        if old.name != os.readlink(out / "best"):
            shutil.rmtree(old)
