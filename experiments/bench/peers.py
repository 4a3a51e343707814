"""Whole optimizer steps of TRL's GRPOTrainer and of this project's loop: sampling, scoring, update, by phase.

Both have the same weights (the tiny preset's, random), the same prompts and G lists of each, temperature 1, float32,
AdamW, no KL, rewards that are random after lists have been read and matched with the catalog, so that every token is
trained on. The trainers take turns, ours after each step of TRL's own `train()`, so a machine that slows down slows
both. With --model, a warm start, rewards are what lists earn: hits by rank for ours, their number in a list for TRL.
Most groups then earn nothing, and most ranks of the others: ours leaves out what has no gradient.

  free   Both sample lists of exactly --list-tokens tokens: no id ends a list. A step of each has the same tokens.
  held   Ours are lists held to the catalog (rl.constrain = catalog): K different lines of it, of as many tokens as
         those lines have. TRL, which cannot hold lists to a catalog, samples free ones of the mean length of ours,
         rounded down: it has as many tokens or fewer. Ours are trained on under the probabilities they were sampled
         with, where a forced token has none to learn; what is equal are prompts, lists and tokens, not the task.

TRL runs as its users have it on this device with transformers' generate, but for two things in its favour: gradient
checkpointing is off, and its head drops all but the lists' tokens first, as it does on a GPU (--head cpu: every
position goes through it, as TRL has it on a CPU). Its micro-batch is the fastest of --trl-rows, found in the run. Ours
is the preset's token budget. TRL on a GPU with vLLM is another matter: this measures what the two do on a CPU.

Seconds are medians over the steps, wall clock and processor time; with one thread (OMP_NUM_THREADS=1) the latter hardly
feels other work on the machine. Memory is the peak of what PyTorch allocated during one whole step beyond weights and
optimizer state (profiler, in steps of their own). Needs TRL: `make bench-peers`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from rankgrpo.config import Config
from rankgrpo.config_file import load_config, preset_file
from rankgrpo.data.load import load_dataset
from rankgrpo.data.prompt import encode_prompts
from rankgrpo.data.samples import Dataset
from rankgrpo.items.catalog import Catalog
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.policy import Policy, open_policy
from rankgrpo.model.presets import count_parameters
from rankgrpo.model.tiny import TinyConfig, make_tiny
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.parts import Answer, load_parts, measure
from rankgrpo.rollouts.rounds import RoundMaker
from rankgrpo.rollouts.score import Scorer
from rankgrpo.runtime.distributed import start_parallel
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import make_optimizer
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.train import Updater, make_micro_batches
from rankgrpo_kernels.bench.common import PeakMemory, print_table, record, write_json

if TYPE_CHECKING:
    from peers_trl import PeerTrainer

EXAMPLE = """examples:
  OMP_NUM_THREADS=1 python experiments/bench/peers.py --out peers.json
  OMP_NUM_THREADS=1 python experiments/bench/peers.py --case data-held --steps 5 --trl-rows 16 --no-memory
  OMP_NUM_THREADS=1 python experiments/bench/peers.py --case data-held --model runs/tiny-demo/sft/final
  python experiments/bench/peers.py --case p90-free p700-free --prompts 8 --head cpu"""
PHASES = ("sample", "score", "update")
COLUMNS = {
    "case": "", "trainer": "", "list_tokens": ".1f", "sample_s": ".2f", "score_s": ".2f", "update_s": ".2f",
    "step_s": ".2f", "wall_s": ".2f", "ratio": ".2f", "wall_ratio": ".2f", "sample_ratio": ".2f",
    "update_ratio": ".2f", "peak_mib": ".0f", "memory_ratio": ".2f",
}  # fmt: skip
LR = 1e-6


class Ours:
    """The loop's step over one batch of prompts; the model is that of `policy`."""

    def __init__(
        self, policy: Policy, config: Config, dataset: Dataset, prompts: list[list[int]], *, earned: bool = False
    ):
        """earned: rewards are the lists' own, not random."""
        self.policy, self.config, self.parallel, self.earned = policy, config, start_parallel(), earned
        rl, samples = config.rl, dataset.train[: len(prompts)]
        self.sampler = hf_sampler(policy, rows=rl.sampler_rows)
        if policy.constraint is None:
            self.sampler.eos_ids = [len(policy.tokenizer)]  # no such id: no list ends before the others
        optimizer = make_optimizer(policy.model, lr=LR, betas=rl.betas, weight_decay=rl.weight_decay, eps=rl.adam_eps)
        self.updater = Updater(policy, None, self.sampler, optimizer, rl, self.parallel)
        segmenter = RankSegmenter(policy.tokenizer)
        scorer = Scorer.open(dataset.catalog, rl, config.data.num_ranks, segmenter, self.sampler.eos_ids)
        seen = policy.seen(samples, dataset.catalog)
        self.maker = RoundMaker(policy, self.sampler, scorer, samples, prompts, seen, config)

    def step(self, number: int) -> tuple[dict[str, tuple[float, float]], float]:
        """Wall and processor seconds by phase, and the mean tokens of a list."""
        from peers_trl import minus, now, since

        rl, means, began = self.config.rl, Means(), now()
        made = self.maker.make(list(range(len(self.maker.prompts))), number, means)
        sampled, scored = since(began), now()
        units, chosen = made.scored.units, made.chosen
        if not self.earned:
            random = torch.Generator().manual_seed(number)
            units = replace(units, advantage_BU=torch.randn(units.advantage_BU.shape, generator=random))
            chosen = made.indices
        batch = make_micro_batches(
            made.groups, made.rollouts, units, chosen, rl, self.config.data.num_ranks, made.choices
        )
        score = since(scored)
        self.updater.step(batch, made.scored.denominator, LR, f"step {number}", means)
        lists = list(chain.from_iterable(made.rollouts))
        tokens = sum(len(rollout.token_ids) for rollout in lists) / len(lists)
        updated = minus(since(scored), score)
        # The round's own clock tells sampling from scoring; processor time is split in that proportion.
        share = made.score_s / sampled[0]
        of_score = (score[0] + made.score_s, score[1] + share * sampled[1])
        return {
            "sample": minus(sampled, (made.score_s, share * sampled[1])),
            "score": of_score,
            "update": updated,
        }, tokens


def make_policy(dataset: Dataset, config: Config) -> Policy:
    """The preset's model with random weights, all ids allowed."""
    sizes = config.model
    tiny = TinyConfig.of(sizes)
    model, tokenizer = make_tiny(dataset, tiny, seed=0, num_ranks=config.data.num_ranks)
    use_shared_prefix(model)
    return Policy(model, tokenizer, torch.ones(len(tokenizer), dtype=torch.bool), False)


def make_prompts(kind: str, num: int, policy: Policy, dataset: Dataset, config: Config) -> list[list[int]]:
    """pN: `num` random prompts of N tokens; data: the prompts of the first conversations."""
    if kind == "data":
        data = config.data
        return encode_prompts(policy.tokenizer, dataset.train[:num], data.max_prompt_tokens, data.num_ranks)
    rng = random.Random(0)
    return [[rng.randrange(3, len(policy.tokenizer)) for _ in range(int(kind[1:]))] for _ in range(num)]


class Reward:
    """What TRL's lists earn: read and matched with the catalog as ours are, then their hits or a random number."""

    def __init__(self, catalog: Catalog, dataset: Dataset, num_ranks: int, *, earned: bool):
        self.catalog, self.samples, self.num_ranks, self.earned = catalog, dataset.train, num_ranks, earned
        self.part = load_parts("relevance", catalog)["relevance"]
        self.generator = torch.Generator().manual_seed(0)
        self.__name__ = "hits" if earned else "random"

    def __call__(self, completions: list[str], place: list[int], **_) -> list[float]:
        answers = [
            Answer(self.samples[p], text, True, self.catalog, self.num_ranks)
            for p, text in zip(place, completions, strict=True)
        ]
        relevance_BK = measure("relevance", self.part, answers)
        if self.earned:
            return relevance_BK.sum(1).tolist()
        return torch.randn(len(completions), generator=self.generator).tolist()


def measure_case(args: argparse.Namespace, case: str, dataset: Dataset) -> dict:
    from peers_trl import best_rows, make_trainer, take_turns

    kind, way = case.split("-")
    constrain = "catalog" if way == "held" else "none"
    config = load_config(preset_file("tiny"), [f"rl.constrain={constrain}", f"rl.max_new_tokens={args.list_tokens}"])
    config = replace(config, rl=replace(config.rl, group_size=args.group_size, prompts_per_step=args.prompts))
    earned = args.model is not None
    policy = open_policy(args.model, config.model, start_parallel().device) if earned else make_policy(dataset, config)
    policy = hold_to_catalog(policy, config, dataset.catalog)
    prompts = make_prompts(kind, args.prompts, policy, dataset, config)
    reward = Reward(dataset.catalog, dataset, config.data.num_ranks, earned=earned)
    ours = Ours(policy, config, dataset, prompts, earned=earned)
    tokens = int(ours.step(0)[1])
    num_lists, num_steps, lists_only = len(prompts) * args.group_size, 1 + args.steps + args.memory, args.head == "gpu"

    def make(rows: int) -> PeerTrainer:
        return make_trainer(
            policy.model, policy.tokenizer, prompts, reward,
            group_size=args.group_size, list_tokens=tokens, rows=rows, steps=num_steps, lr=LR,
        )  # fmt: skip

    sizes = sorted({rows for rows in args.trl_rows if num_lists % rows == 0})
    rows, seconds_of_rows = best_rows(make, sizes, lists_only)
    own_steps: list[tuple[dict[str, tuple[float, float]], float]] = []
    peaks: dict[str, list[float]] = {"trl": [], "ours": []}
    bar = tqdm(total=num_steps, desc=case, unit="step", leave=False, disable=None)

    def around(number: int, name: str = "trl"):
        gc.collect()
        last = args.memory and number == num_steps - 1
        return PeakMemory(policy.device, peaks[name].append) if last else nullcontext()

    def turn(number: int) -> None:
        with around(number, "ours"):
            own_steps.append(ours.step(1 + number))
        bar.update()

    trainer = make(rows)
    trl_steps = take_turns(trainer, turn, around, lists_only=lists_only)
    bar.close()
    timed = slice(1, 1 + args.steps)  # the first step warms up, the last one is for memory
    table = {"trl": trl_steps[timed], "ours": [phases for phases, _ in own_steps[timed]]}
    lengths = {"trl": float(tokens), "ours": sum(length for _, length in own_steps[timed]) / args.steps}
    return {
        "case": case,
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "lists": num_lists,
        "trl_rows": rows,
        "update_s_by_trl_rows": seconds_of_rows,
        "trainers": make_rows(case, table, lengths, peaks),
        "steps": table,
    }


def make_rows(case: str, table: dict, lengths: dict[str, float], peaks: dict[str, list[float]]) -> list[dict]:
    """A row a trainer: medians of processor seconds, and TRL's over ours."""
    rows = {}
    for name, steps in table.items():
        phases = {f"{phase}_s": median(step[phase][1] for step in steps) for phase in PHASES}
        totals = [tuple(sum(step[phase][clock] for phase in PHASES) for clock in (0, 1)) for step in steps]
        wall, cpu = (median(total[clock] for total in totals) for clock in (0, 1))
        rows[name] = {"case": case, "trainer": name, "list_tokens": lengths[name]} | phases
        rows[name] |= {"step_s": cpu, "wall_s": wall, "peak_mib": peaks[name][0] / 2**20 if peaks[name] else None}
    own = rows["ours"]
    for row in rows.values():
        row |= {"ratio": row["step_s"] / own["step_s"], "wall_ratio": row["wall_s"] / own["wall_s"]}
        row |= {f"{phase}_ratio": row[f"{phase}_s"] / own[f"{phase}_s"] for phase in ("sample", "update")}
        row["memory_ratio"] = row["peak_mib"] / own["peak_mib"] if row["peak_mib"] else None
    return list(rows.values())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", nargs="+", default=["p90-free", "data-free", "p90-held", "data-held"], metavar="CASE",
        help="pN-free, pN-held (prompts of N tokens), data-free, data-held (those of --data; default: p90 and data)",
    )  # fmt: skip
    parser.add_argument("--data", default="demo", help="demo, or a data set's folder (default demo)")
    parser.add_argument("--model", type=Path, help="a warm start (tiny preset) on it; rewards are what lists earn")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step (default 16)")
    parser.add_argument("--group-size", type=int, default=8, help="lists a prompt, G (default 8)")
    parser.add_argument("--list-tokens", type=int, default=110, help="tokens of a free list (default 110)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each (default 3)")
    parser.add_argument(
        "--trl-rows", type=int, nargs="+", default=[8, 16, 32], help="TRL's micro-batches to try (default 8 16 32)"
    )
    parser.add_argument("--head", choices=["gpu", "cpu"], default="gpu", help="TRL's head as on it (default gpu)")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the steps for memory")
    parser.add_argument("--out", type=Path, help="write the results as JSON here")
    args = parser.parse_args()
    for case in args.case:
        kind, _, way = case.partition("-")
        if way not in ("free", "held") or not (kind == "data" or (kind[:1] == "p" and kind[1:].isdigit())):
            parser.error(f"--case {case}: expected pN-free, pN-held, data-free or data-held")
        if args.model is not None and kind != "data":
            parser.error(f"--case {case}: with --model, lists earn by conversations: data-free or data-held")
    if not any(args.prompts * args.group_size % rows == 0 for rows in args.trl_rows):
        parser.error(f"--trl-rows: none of {args.trl_rows} divides {args.prompts} x {args.group_size} lists")
    if importlib.util.find_spec("trl") is None:
        parser.error("trl is not installed: pip install -e '.[bench]', or run `make bench-peers`")
    return args


def main() -> None:
    args = parse_args()
    device = start_parallel().device
    dataset = load_dataset(args.data)
    results = [measure_case(args, case, dataset) for case in args.case]
    print(f"{torch.get_num_threads()} threads; processor seconds a step, and TRL's over ours")
    print_table(list(chain.from_iterable(result["trainers"] for result in results)), COLUMNS)
    if args.out is not None:
        settings = {name: getattr(args, name) for name in ("data", "prompts", "group_size", "steps", "head")}
        settings |= {"parameters": count_parameters(make_policy(dataset, load_config(preset_file("tiny"))).model)}
        write_json(args.out, record("peers", device, settings=settings, results=results))


if __name__ == "__main__":
    main()
