"""Rank-GRPO: sample G lists a prompt, reward every rank, step on the clipped rank-wise objective.

The loop at the end reads top to bottom: sample -> score -> update -> validate -> checkpoint. Everything random is a
function of (seed, step, prompt), so a run that is killed and started again writes the metrics it would have written.
"""

# Shape letters: P prompts, G lists a prompt, B = P*G, T tokens, K ranks, U units (ranks and penalties, tokens, lists).
from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from rankgrpo.config import Config, RlConfig
from rankgrpo.data.order import BatchOrder
from rankgrpo.data.prompt import encode_prompts, open_prompt
from rankgrpo.data.samples import Dataset
from rankgrpo.errors import TrainingError
from rankgrpo.evaluation.validate import validate
from rankgrpo.files.atomic import point_link, remove_folder
from rankgrpo.items.allowed_ids import AllowedIds
from rankgrpo.items.choices import Choices
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.packing import Group, Pack, plan_micro_batches
from rankgrpo.model.policy import Policy, open_policy, open_reference
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.ahead import STALE, open_batches
from rankgrpo.rollouts.mismatch import Gap, correct_units, describe_mismatch
from rankgrpo.rollouts.record import RolloutLog
from rankgrpo.rollouts.rounds import Round, RoundMaker, describe_rounds
from rankgrpo.rollouts.score import Scorer
from rankgrpo.rollouts.surrogate import hold_units
from rankgrpo.runtime.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from rankgrpo.runtime.distributed import Parallel, make_sharding, sum_gradients, wait_for_all
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import check_finite, make_optimizer, optimizer_step, rl_learning_rate
from rankgrpo.runtime.tracker import MetricsLog, read_metrics
from rankgrpo.runtime.trackers import Tracker
from rankgrpo.runtime.trouble import Watch
from rankgrpo.sampler.base import Rollout, Sampler
from rankgrpo.sampler.choose import open_sampler
from rankgrpo.sampler.sync import explain_mismatch, sync_weights
from rankgrpo.sampler.verify import verify_policy
from rankgrpo.units import Units, live_lengths, take_lists


@dataclass
class MicroBatch:
    """Whole groups of one forward pass, and what does not change between the updates of a batch."""

    groups: list[Group]
    units: Units
    sampler_logp_BT: Tensor
    lists: list[int]
    """Which lists of the step they are, in order."""
    num_cut: int = 0
    """Tokens of these lists that came after their last one with a gradient, and are not here."""
    allowed: AllowedIds | None = None
    """The ids that were allowed at each token, where lists are held to the catalog."""
    old_logp_BT: Tensor | None = None
    """Log-probs under the policy that sampled; the first pass sets them."""
    logp_BT: Tensor | None = None
    """Log-probs in the last update."""
    ref_logp_BT: Tensor | None = None
    """Log-probs under the reference, set by `Updater.add_reference` when there is one."""
    gap: Gap = Gap(0.0, 0)
    """Distance of the sampler from the trainer, found by the first pass."""


def make_micro_batches(
    groups: list[Group],
    rollouts: list[list[Rollout]],
    units: Units,
    chosen: list[int],
    rl: RlConfig,
    num_ranks: int,
    choices: Choices | None = None,
    *,
    dense: bool = False,
) -> list[MicroBatch]:
    """The groups `chosen` (groups[p] holds the ids of rollouts[p]) in micro-batches of rl.token_budget tokens.

    Without a KL term a list ends with its last token that has a gradient: what follows changes nothing.
    units, choices: those of the lists of all groups, in order. dense: as in `plan_micro_batches`.
    """
    G = rl.group_size
    whole = [len(rollout.token_ids) for lists in rollouts for rollout in lists]
    kept = whole if rl.kl_coef > 0 else live_lengths(units).clamp(min=1).tolist()
    cut = [
        replace(groups[p], completion_ids=[ids[: kept[p * G + g]] for g, ids in enumerate(groups[p].completion_ids)])
        for p in chosen
    ]
    batch = []
    for micro in plan_micro_batches(cut, rl.token_budget, dense=dense):
        lists = [chosen[i] * G + g for i in micro for g in range(G)]
        length = [kept[b] for b in lists]
        logp = [torch.tensor(rollouts[b // G][b % G].logp[: kept[b]]) for b in lists]
        of_lists = take_lists(units, lists, length, at_least=num_ranks + 1)
        allowed = None if choices is None else choices.of_lists(lists, length).for_head()
        num_cut = sum(whole[b] for b in lists) - sum(length)
        own = [cut[i] for i in micro]
        batch.append(MicroBatch(own, of_lists, pad_sequence(logp, batch_first=True), lists, num_cut, allowed))
    return batch


def make_round_micro_batches(one: Round, policy: Policy, num_ranks: int) -> list[MicroBatch]:
    """`make_micro_batches` of the groups of a round that are trained on."""
    dense = policy.paths.packing != "shared"
    return make_micro_batches(
        one.groups, one.rollouts, one.scored.units, one.chosen, one.rl, num_ranks, one.choices, dense=dense
    )


class Updater:
    """Optimizer steps on one batch of scored rollouts."""

    def __init__(
        self,
        policy: Policy,
        ref: Policy | None,
        sampler: Sampler,
        optimizer: torch.optim.Optimizer,
        rl: RlConfig,
        parallel: Parallel,
    ):
        self.policy, self.ref, self.sampler, self.optimizer = policy, ref, sampler, optimizer
        self.rl, self.parallel = rl, parallel

    @torch.no_grad()
    def add_reference(self, batch: list[MicroBatch]) -> None:
        """Log-probs under the reference model, which all updates of a batch share."""
        if self.ref is None:
            return
        for micro_batch in self.ref.paced(batch):
            _, micro_batch.ref_logp_BT = self.ref.logprobs(
                micro_batch.groups, temperature=self.rl.temperature, allowed=micro_batch.allowed
            )

    def step(self, batch: list[MicroBatch], denominator: float, lr: float, where: str, means: Means) -> float:
        """One optimizer step on the whole batch; returns the gradient norm."""
        loss_sum = torch.zeros((), device=self.policy.device)
        for name in ("loss/policy", "loss/kl", "tokens/trained"):
            means.add_sum(name, 0.0)
        for micro_batch in self.policy.paced(batch):
            loss_sum += self._backward(micro_batch, denominator, means)
        self._check(float(loss_sum), [micro_batch.gap for micro_batch in batch], where)
        sum_gradients(self.policy.model, self.parallel)
        return optimizer_step(
            self.optimizer, self.policy.model.parameters(), lr=lr, grad_clip=self.rl.grad_clip, where=where
        )

    def _backward(self, micro_batch: MicroBatch, denominator: float, means: Means) -> Tensor:
        rl = self.rl
        pack, logp_BT = self.policy.logprobs(
            micro_batch.groups, temperature=rl.temperature, allowed=micro_batch.allowed
        )
        if micro_batch.old_logp_BT is None:
            self._first_pass(micro_batch, pack, logp_BT.detach(), means)
        micro_batch.logp_BT = logp_BT.detach()
        units = micro_batch.units
        weight_BU, clip = hold_units(
            logp_BT, micro_batch.old_logp_BT, units.unit_BT, units.advantage_BU, units.weight_BU, rl
        )
        loss, metrics = rank_grpo_loss(
            logp_BT,
            micro_batch.old_logp_BT,
            units.unit_BT,
            units.advantage_BU,
            ref_logp_BT=micro_batch.ref_logp_BT,
            kl_coef=rl.kl_coef,
            reduction=rl.reduction,
            denominator=denominator,
            weight_BK=weight_BU,
            impl=self.policy.impl,
            **clip,
        )
        loss.backward()
        num_units = metrics["ratio/num_units"]
        for name in ("ratio/mean", "ratio/clip_low_frac", "ratio/clip_high_frac"):
            means.add(name, metrics[name] * num_units, num_units)
        share = 1 / rl.updates_per_batch  # sums over the step's units, averaged over its updates
        for name in ("loss/policy", "loss/kl"):
            means.add_sum(name, metrics[name] * share)
        return loss.detach()

    def _first_pass(self, micro_batch: MicroBatch, pack: Pack, logp_BT: Tensor, means: Means) -> None:
        """What the policy that sampled says of its lists: old log-probs, and the sampler's distance from them."""
        device = logp_BT.device
        units, sampler_logp_BT = micro_batch.units.to(device), micro_batch.sampler_logp_BT.to(device)
        means.add("tokens/saved_frac", pack.tokens_dense - pack.tokens_shared, pack.tokens_dense)
        means.add_sum("tokens/trained", pack.tokens_shared)
        means.add("tokens/cut_frac", micro_batch.num_cut, micro_batch.num_cut + int(pack.mask_BT.sum()))
        # What was sampled ahead is judged by the policy that sampled it, which only the sampler has seen: the ratio of
        # the loss then corrects for the step between. Otherwise the two are one, and the trainer's own numbers are
        # those that make the first ratio exactly 1.
        micro_batch.old_logp_BT = sampler_logp_BT if self.rl.overlap else logp_BT
        counted_BT = pack.mask_BT & (units.unit_BT >= 0)  # a forced token is no evidence that the two agree
        micro_batch.gap = describe_mismatch(units, logp_BT, sampler_logp_BT, counted_BT, self.rl, means)
        micro_batch.units = correct_units(units, logp_BT, sampler_logp_BT, self.rl, means)

    def _check(self, loss: float, gaps: list[Gap], where: str) -> None:
        """Stop all processes alike, before the weights change, when one has a loss that is not finite, or the sampler's
        log-probs are not the trainer's."""
        total, num_tokens = (sum(column) for column in zip(Gap(0.0, 0), *gaps, strict=True))
        loss, total, num_tokens = self.parallel.sum([loss, total, num_tokens])
        check_finite(loss, where, "the loss")
        alarm = self.rl.mismatch_alarm
        if total <= alarm * num_tokens:
            return
        reason = STALE if self.rl.overlap else explain_mismatch(self.sampler, self.policy.model)
        raise TrainingError(
            f"{where}: mean exp|trainer's - sampler's log-prob| is {total / num_tokens:.4f}, above rl.mismatch_alarm = "
            f"{alarm:g}. {reason}. The weights were not changed and the last checkpoint is intact",
            everywhere=True,
        )


def train(
    config: Config,
    dataset: Dataset,
    start: str | Path,
    out: Path,
    parallel: Parallel,
    tracker: Tracker | None = None,
) -> Path:
    """Run Rank-GRPO from the model `start`; returns `out/best`, the best model by validation NDCG@K up to its noise:
    the last that comes within one standard error of the highest score before it.

    Writes out/metrics.jsonl, out/checkpoints, out/best and out/final (Hugging Face folders). Resumes from the newest
    checkpoint; returns at once when `out/final` is that of rl.num_steps. A run that ended after fewer goes on from its
    end, under the schedule of the larger number.
    """
    final = out / "final"
    if is_finished(out, config.rl.num_steps, parallel):
        return out / "best"
    rl, num_ranks = config.rl, config.data.num_ranks
    device, sharding = parallel.device, make_sharding(config.parallel, parallel)
    policy = open_policy(start, config.model, device, sharding=sharding, adapter=config.adapter, seed=config.seed)
    policy = verify_policy(hold_to_catalog(policy, config, dataset.catalog), config)
    ref = open_reference(policy, start, config.model, device, sharding) if rl.kl_coef > 0 else None
    optimizer = make_optimizer(policy.model, lr=rl.lr, betas=rl.betas, weight_decay=rl.weight_decay, eps=rl.adam_eps)
    sampler = open_sampler(policy, config, parallel)
    updater = Updater(policy, ref, sampler, optimizer, rl, parallel)
    scorer = Scorer.open(dataset.catalog, rl, num_ranks, RankSegmenter(policy.tokenizer), sampler.eos_ids)
    order = BatchOrder(len(dataset.train), rl.prompts_per_step, config.seed, parallel.dp_rank, parallel.dp_world)
    prompts = encode_prompts(
        policy.tokenizer, dataset.train, config.data.max_prompt_tokens, num_ranks, prompt=open_prompt(config.data)
    )
    seen = policy.seen(dataset.train, dataset.catalog)
    maker = RoundMaker(policy, sampler, scorer, dataset.train, prompts, seen, config)
    val_samples = dataset.validation[: rl.eval_samples]

    state: dict[str, Any] = {"step": 0, "best": {"ndcg": -1.0, "se": 0.0}}
    if (checkpoint := latest_checkpoint(out / "checkpoints", parallel)) is not None:
        state = load_checkpoint(checkpoint, policy.model, optimizer)
    done, best = state["step"], state["best"]
    log = rollout_log = None
    if parallel.is_main:
        log = MetricsLog(
            out / "metrics.jsonl", resume_step=done, num_steps=rl.num_steps, title="Rank-GRPO", tracker=tracker
        )
        rollout_log = RolloutLog(out / "rollouts.jsonl", scorer, num_prompts=len(order.indices(0)), resume_step=done)
        if final.is_dir():  # of fewer steps; beside the rows of the last step it would be taken for their model
            remove_folder(final)
    watch = Watch(config)
    for row in read_metrics(log.path)[0] if log is not None else []:
        watch.add(row)

    def validate_and_keep_best(num_done: int) -> dict[str, float]:
        nonlocal best
        title = "first validation" if num_done == 0 else None
        metrics = validate(policy, sampler, val_samples, dataset.catalog, config, parallel, title=title)
        ndcg = metrics[f"eval/ndcg@{num_ranks}"]
        # The highest of many noisy scores is mostly luck, and the last steps have the lowest learning rate.
        if ndcg >= best["ndcg"] - best["se"]:
            keep_best(policy, out, num_done, parallel)
        if ndcg > best["ndcg"]:
            best = {"ndcg": ndcg, "se": metrics[f"eval/se_ndcg@{num_ranks}"]}
        return metrics

    with closing(open_batches(maker, order, start, parallel, state)) as batches:
        sync_weights(sampler, policy.model)
        if done == 0:
            metrics = validate_and_keep_best(0)
            watch.add({"step": 0, **metrics})
            if log is not None:
                log.write(0, metrics)

        for step in range(done, rl.num_steps):
            began, where = time.perf_counter(), f"RL step {step + 1}"
            batch = batches.take(step)
            rounds, means = batch.rounds, batch.means
            sampler.sleep()
            sampled = time.perf_counter()

            of_rounds = [make_round_micro_batches(one, policy, num_ranks) for one in rounds]
            micro_batches = list(chain.from_iterable(of_rounds))
            denominator = max(parallel.sum([sum(one.denominator for one in rounds)])[0], 1.0)
            scored_at = time.perf_counter()

            updater.add_reference(micro_batches)
            for update in range(rl.updates_per_batch):
                lr = rl_learning_rate(step, rl)
                norm = updater.step(micro_batches, denominator, lr, f"{where}, update {update + 1}", means)
            updated = time.perf_counter()
            sync_weights(sampler, policy.model)
            synced = time.perf_counter()

            describe_rounds(rounds, rl, means, parallel)
            metrics = means.reduce(parallel)
            metrics |= {"grad/norm": norm, "lr": lr}
            num_done = step + 1
            if num_done % rl.eval_every == 0 or num_done == rl.num_steps:
                metrics |= validate_and_keep_best(num_done)
            metrics |= {
                "time/sample_s": sampled - began - batch.score_s - batch.sync_s,
                "time/score_s": batch.score_s + scored_at - sampled,
                "time/update_s": updated - scored_at,
                "time/sync_s": batch.sync_s + synced - updated,
                "time/total_s": time.perf_counter() - began,
            }
            if log is not None:
                log.write(num_done, metrics)
            if rollout_log is not None and rollout_log.wants(num_done):
                first, ratios = rounds[0], token_log_ratios(of_rounds[0])
                rollout_log.write(num_done, first.examples, first.rollouts, first.scored, first.choices, ratios)
            report_trouble(watch, num_done, metrics, out, parallel)
            if num_done % rl.save_every == 0 or num_done == rl.num_steps:
                state = {"best": best, **batches.state(num_done)}
                save_checkpoint(out / "checkpoints", num_done, policy.model, optimizer, state, rl.keep_last, parallel)
    if log is not None:
        log.close()
    policy.export(final, parallel)
    sampler.sleep()
    wait_for_all(parallel)
    return out / "best"


def token_log_ratios(batch: list[MicroBatch]) -> dict[int, Tensor]:
    """By list, log pi / pi_old of its tokens that went through the model, in the last update; none of lists that were
    left out."""
    ratios = {}
    for micro_batch in batch:
        lengths = [len(ids) for group in micro_batch.groups for ids in group.completion_ids]
        log_ratio_BT = micro_batch.logp_BT - micro_batch.old_logp_BT
        for b, length, log_ratio_T in zip(micro_batch.lists, lengths, log_ratio_BT, strict=True):
            ratios[b] = log_ratio_T[:length]
    return ratios


def is_finished(out: Path, num_steps: int, parallel: Parallel) -> bool:
    """Whether out/final is the model of so many steps; the same on every process."""
    behind = 0.0
    if parallel.is_main and (out / "metrics.jsonl").exists():
        behind = max((row["step"] for row in read_metrics(out / "metrics.jsonl")[0]), default=0) < num_steps
    return (out / "final").is_dir() and not parallel.sum([behind])[0]


def report_trouble(watch: Watch, num_done: int, metrics: dict[str, float], out: Path, parallel: Parallel) -> None:
    """Say above the progress bar what this step shows for the first time; with rl.stop_on_failure stop all processes
    alike: the main process has seen all rows, also those before a resumption."""
    troubles = [str(trouble) for trouble in watch.add({"step": num_done, **metrics})]
    for trouble in troubles if parallel.is_main else []:
        tqdm.write(f"warning: {trouble}", file=sys.stderr)
    if watch.config.rl.stop_on_failure and (found := parallel.gather(troubles)[0]):
        raise TrainingError(
            f"{'; '.join(found)}. The run stops (rl.stop_on_failure); checkpoints and {out / 'best'} are kept",
            everywhere=True,
        )


def keep_best(policy: Policy, out: Path, num_done: int, parallel: Parallel) -> None:
    """Export the policy and point out/best at it; the export before it goes only once the link has moved."""
    export = out / f"best-{num_done:08d}"
    policy.export(export, parallel)
    if not parallel.is_main:
        return
    point_link(out / "best", export)
    for old in out.glob("best-*"):
        if old.name != os.readlink(out / "best"):
            shutil.rmtree(old)
