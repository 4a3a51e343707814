"""The batches of a run: each sampled when its step begins or, with rl.overlap, while the step before it trains.

With theta_t the weights after t steps, the batch of step t + 1 is ordinarily sampled from theta_t. With rl.overlap it
comes from theta_{t-1}: a process beside the trainer (`rankgrpo.sampler.process`) samples it while step t turns
theta_{t-1} into theta_t. The first batch of a run waits for nobody, so it comes from theta_0 either way.

What was sampled ahead is the one thing in a run that is no function of the weights and the step. A checkpoint after
step t holds theta_t, and the batch of step t + 1 belongs to weights that are gone; so it holds that batch, the sampled
lists themselves. They are some megabytes where the weights would be a third of a checkpoint, nothing is sampled twice,
and waiting for them costs nothing: step t + 1 would be the next to wait. On resume the lists are found by their seeds,
by any number of processes, and scored again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rankgrpo.config import Config
from rankgrpo.data.order import BatchOrder
from rankgrpo.errors import ConfigError
from rankgrpo.rollouts.rounds import Round, RoundMaker, make_rounds
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.runtime.means import Means
from rankgrpo.sampler.base import Rollout
from rankgrpo.sampler.choose import choose_sampler
from rankgrpo.sampler.process import Opening, ProcessSampler, Request, rollouts_from_json, rollouts_to_json
from rankgrpo.sampler.sync import sync_weights

STALE = (
    "With rl.overlap the lists were sampled before the last step, which has moved their log-probs so far; lower rl.lr, "
    "or sample every batch from the newest weights, rl.overlap=false"
)


@dataclass(frozen=True)
class Batch:
    """What a step trains on."""

    rounds: list[Round]
    means: Means
    """What is logged of its lists so far."""
    next_batch: int
    """Number in the order of the first batch that it leaves to the next step."""
    score_s: float
    """Seconds of scoring since the step began."""
    sync_s: float = 0.0
    """Seconds of handing over weights since the step began."""


class Batches:
    """Batches sampled from the newest weights when their step begins."""

    def __init__(self, maker: RoundMaker, order: BatchOrder, parallel: Parallel, next_batch: int):
        self.maker, self.order, self.parallel, self.next_batch = maker, order, parallel, next_batch

    def take(self, step: int) -> Batch:
        """The batch of 0-based `step`; steps are taken in order."""
        batch = self._make(step)
        self.next_batch = batch.next_batch
        return batch

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint must hold for a run to go on with `step`, the next to be taken."""
        return {"next_batch": self.next_batch}

    def close(self) -> None:
        """End what samples beside the trainer."""

    def _make(self, step: int) -> Batch:
        means = Means()
        rounds, next_batch = make_rounds(self.maker, self.order, self.next_batch, step, means, self.parallel)
        return Batch(rounds, means, next_batch, score_s=sum(one.score_s for one in rounds))


class BatchesAhead(Batches):
    """Batches sampled by `process` while the step before them trains.

    kept: what `state` gave as "ahead". While it is open the trainer has `threads` threads.
    """

    def __init__(
        self,
        maker: RoundMaker,
        order: BatchOrder,
        parallel: Parallel,
        next_batch: int,
        process: ProcessSampler,
        kept: Iterable[tuple[int, list[Any]]],
        *,
        threads: int,
    ):
        self.lists = ListsAhead(process, kept)
        super().__init__(replace(maker, sampler=self.lists), order, parallel, next_batch)
        self.process, self.policy, self.num_steps = process, maker.policy, maker.config.rl.num_steps
        self.made: Batch | None = None
        """Batch of the next step, where a checkpoint asked for it before the step did."""
        self.threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)

    def take(self, step: int) -> Batch:
        """The batch of `step`; the next one is begun with the weights there are now."""
        sync_s = 0.0 if self.lists.ahead else self._hand_over()
        batch, self.made = self.made or self._make(step), None
        num_rounds, self.next_batch = batch.next_batch - self.next_batch, batch.next_batch
        self.lists.forget()
        if step + 1 < self.num_steps:
            sync_s += self._hand_over()
            # As many rounds as this step took: those that it turns out not to need are dropped, others waited for.
            numbers = range(self.next_batch, self.next_batch + num_rounds)
            self.lists.begin([self._request(number, step + 1) for number in numbers])
        return replace(batch, sync_s=sync_s)

    def state(self, step: int) -> dict[str, Any]:
        if self.lists.ahead and self.made is None:
            self.made = replace(self._make(step), score_s=0.0)  # before the step begins
        parts = self.parallel.gather([json.dumps(self.lists.kept())])
        return super().state(step) | {"ahead": [row for (part,) in parts for row in json.loads(part)]}

    def close(self) -> None:
        self.process.close()
        torch.set_num_threads(self.threads_before)

    def _make(self, step: int) -> Batch:
        batch = super()._make(step)
        batch.means.add("overlap/steps_behind", self.lists.ahead, 1)
        batch.means.add("time/ahead_s", self.lists.seconds, 1)
        return batch

    def _request(self, number: int, step: int) -> Request:
        return self.maker.request(self.order.indices(number), step, self.maker.config.rl.group_size)

    def _hand_over(self) -> float:
        """Give the process the newest weights; every process of the run takes part. Returns the seconds."""
        began = time.perf_counter()
        sync_weights(self.process, self.policy.model)
        return time.perf_counter() - began


class ListsAhead:
    """A sampler that has some lists by their seeds already, and has others sampled by a process.

    A conversation that comes twice in a step has one seed and the same lists, but for the rounding of their log-probs,
    which depends on the batch they were decoded in: both are kept and given in order.
    """

    owns_weights = True

    def __init__(self, process: ProcessSampler, kept: Iterable[tuple[int, list[Any]]] = ()):
        self.process = process
        self.lists: dict[int, list[list[Rollout]]] = {}
        self.given: Counter[int] = Counter()
        """By seed, how many of its groups have been asked for."""
        for seed, rows in kept:
            self._keep([seed], [rollouts_from_json(rows)])
        self.begun: list[Request] = []
        self.ahead = bool(self.lists)
        """Whether there are lists of the weights of the step before, here or on their way."""
        self.seconds = 0.0
        """How long the process took for those that it sampled ahead."""

    def begin(self, requests: Sequence[Request]) -> None:
        """Have lists sampled; nobody waits for them yet."""
        self.process.begin(requests)
        self.begun, self.ahead = list(requests), True

    def sample(self, prompts: list[list[int]], *, seeds: list[int], **terms: Any) -> list[list[Rollout]]:
        """As `Sampler.sample`. A call that was not sampled ahead is sampled now, from the weights the process has."""
        self._collect()
        asked = self.given + Counter(seeds)
        if any(len(self.lists.get(seed, ())) < asked[seed] for seed in seeds):
            self._keep(seeds, self.process.sample(prompts, seeds=seeds, **terms))
        groups = []
        for seed in seeds:
            groups.append(self.lists[seed][self.given[seed]])
            self.given[seed] += 1
        return groups

    def kept(self) -> list[tuple[int, list[Any]]]:
        """Every group by its seed, as JSON has it."""
        self._collect()
        return [(seed, rollouts_to_json(group)) for seed, groups in self.lists.items() for group in groups]

    def forget(self) -> None:
        """Drop the lists of a step that has been made."""
        self._collect()
        self.lists, self.given, self.ahead = {}, Counter(), False

    def _keep(self, seeds: Sequence[int], groups: Sequence[list[Rollout]]) -> None:
        for seed, group in zip(seeds, groups, strict=True):
            self.lists.setdefault(seed, []).append(group)

    def _collect(self) -> None:
        if not self.begun:
            return
        for request, groups in zip(self.begun, self.process.finish(), strict=True):
            self._keep(request["seeds"], groups)
        self.begun, self.seconds = [], self.process.seconds


def check_overlap(config: Config, device: torch.device) -> None:
    """Raise ConfigError where rl.overlap is asked for and cannot be had."""
    if not config.rl.overlap:
        return
    if device.type != "cpu" or choose_sampler(config.rl.sampler, device) != "hf":
        raise ConfigError(
            "rl.overlap: lists are sampled beside training on CPUs alone, with rl.sampler = hf: no GPUs can be set "
            "aside for an engine; set rl.overlap=false"
        )
    if sys.platform != "linux":
        raise ConfigError(f"rl.overlap: needs Linux, whose processes share memory without a name, and this is "
                          f"{sys.platform}; set rl.overlap=false")  # fmt: skip


def open_batches(
    maker: RoundMaker, order: BatchOrder, source: str | Path, parallel: Parallel, state: Mapping[str, Any]
) -> Batches:
    """The batches that rl.overlap means, from where `state` of a checkpoint left off.

    source: what the policy was opened from. The caller closes them. Raises ConfigError as `check_overlap`.
    """
    config, policy = maker.config, maker.policy
    next_batch = state.get("next_batch", state.get("step", 0))
    if not config.rl.overlap:
        return Batches(maker, order, parallel, next_batch)
    check_overlap(config, parallel.device)
    threads, own = share_threads(torch.get_num_threads())
    if parallel.is_main:
        warn_of_few_cores(threads + own)
    lines = maker.scorer.catalog.lines
    opening = Opening.of(policy, source, config.model, lines, rows=config.rl.sampler_rows, threads=threads)
    process, kept = ProcessSampler(opening), state.get("ahead", ())
    return BatchesAhead(maker, order, parallel, next_batch, process, kept, threads=own)


def share_threads(threads: int) -> tuple[int, int]:
    """Threads of the process that samples and of the trainer, out of those the trainer had."""
    return max(1, threads // 2), max(1, threads - threads // 2)


def warn_of_few_cores(threads: int) -> None:
    """Say that overlapping cannot pay where this machine's processes have more threads than cores between them."""
    processes, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), len(os.sched_getaffinity(0))
    if processes * threads > cores:
        print(
            f"> rl.overlap: {processes * threads} threads train and sample on {cores} cores, so none is idle that "
            f"could sample; fewer processes (NPROC), or rl.overlap=false, will be faster",
            flush=True,
        )
