"""Whole-step benchmark: seconds by phase against prompt length, lists a prompt and model size, as table and plot.

A step is what the training loop does: sample G lists of every prompt with the `hf` sampler, read and score, forward and
backward of the rank-wise loss over shared-prefix packs, one optimizer step. Weights and prompts are random, lists have
--list-tokens tokens (a random model does not stop), and rewards are random, so that every group is trained on. One
quantity is varied at a time around the middle of each axis; of --trials steps after a warm-up the best counts.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from rankgrpo.config import Config, RlConfig
from rankgrpo.data.demo import make_demo
from rankgrpo.data.samples import Sample
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy
from rankgrpo.model.presets import count_parameters
from rankgrpo.model.tiny import TinyConfig, init_model, train_tokenizer
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.score import Scorer, score_groups
from rankgrpo.runtime.distributed import start_parallel
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import make_optimizer
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.train import Updater, make_micro_batches
from rankgrpo_kernels.bench.common import print_table, record, write_json

EXAMPLE = """examples:
  python experiments/bench/step.py --out step.json --plot step.png
  python experiments/bench/step.py --prompts 100 700 --group-sizes 8 --sizes medium --list-tokens 64"""
SIZES = {
    "small": TinyConfig(hidden=128, layers=2, ffn=512, heads=4, kv_heads=2),
    "medium": TinyConfig(hidden=256, layers=4, ffn=1024, heads=4, kv_heads=2),
    "large": TinyConfig(hidden=512, layers=6, ffn=2048, heads=8, kv_heads=2),
}
PHASES = ("sample", "score", "update")
COLUMNS = {
    "size": "", "prompt": "d", "group_size": "d", "sample_s": ".3f", "score_s": ".3f", "update_s": ".3f",
    "total_s": ".3f", "update_share": ".2f",
}  # fmt: skip


class Bench:
    """One model and its update, timed at several shapes of the batch."""

    def __init__(self, size: str, args: argparse.Namespace):
        self.args, self.size = args, size
        self.parallel = start_parallel()
        self.dataset = make_demo(200, 1, 1)
        tokenizer = train_tokenizer(self.dataset, 8192)
        model = init_model(SIZES[size], tokenizer, seed=0).to(self.parallel.device)
        use_shared_prefix(model)
        self.num_parameters = count_parameters(model)
        self.policy = Policy(model, tokenizer, valid_token_mask(model, tokenizer).to(self.parallel.device), False)
        self.config = replace(Config(), rl=RlConfig(kl_coef=0.0, token_budget=args.token_budget))
        optimizer = make_optimizer(model, lr=1e-6, betas=(0.9, 0.99), weight_decay=0.0)
        self.sampler = hf_sampler(self.policy)
        self.updater = Updater(self.policy, None, self.sampler, optimizer, self.config.rl, self.parallel)

    def step(self, prompt_tokens: int, group_size: int, seed: int) -> dict[str, float]:
        """Seconds of each phase of one step."""
        rng = random.Random(seed)
        vocab = len(self.policy.tokenizer)
        prompts = [[rng.randrange(3, vocab) for _ in range(prompt_tokens)] for _ in range(self.args.num_prompts)]
        examples: list[Sample] = self.dataset.train[: len(prompts)]
        self._wait()
        began = time.perf_counter()
        rollouts = self.sampler.sample(
            prompts,
            group_size=group_size,
            seeds=[seed + i for i in range(len(prompts))],
            max_new_tokens=self.args.list_tokens,
            temperature=1.0,
        )
        self._wait()
        sampled = time.perf_counter()
        rl = replace(self.config.rl, group_size=group_size)
        segmenter = RankSegmenter(self.policy.tokenizer)
        scorer = Scorer.open(self.dataset.catalog, rl, 20, segmenter, self.sampler.eos_ids)
        units = score_groups(rollouts, examples, scorer, Means()).units
        scored = time.perf_counter()
        # A model with random weights hits nothing; with random advantages every list is trained on.
        random_BU = torch.randn(units.advantage_BU.shape, generator=torch.Generator().manual_seed(seed))
        units = replace(units, advantage_BU=random_BU)
        groups = [Group(p, [r.token_ids for r in lists]) for p, lists in zip(prompts, rollouts, strict=True)]
        batch = make_micro_batches(groups, rollouts, units, list(range(len(prompts))), rl, 20)
        self.updater.step(batch, units.denominator, 1e-6, "benchmark", Means())
        self._wait()
        return {"sample": sampled - began, "score": scored - sampled, "update": time.perf_counter() - scored}

    def measure(self, prompt_tokens: int, group_size: int) -> dict:
        self.step(prompt_tokens, group_size, 0)
        steps = [self.step(prompt_tokens, group_size, 1 + trial) for trial in range(self.args.trials)]
        best = min(steps, key=lambda phases: sum(phases.values()))
        total = sum(best.values())
        row = {"size": self.size, "parameters": self.num_parameters, "prompt": prompt_tokens, "group_size": group_size}
        row |= {f"{phase}_s": best[phase] for phase in PHASES}
        return row | {"total_s": total, "update_share": best["update"] / total}

    def _wait(self) -> None:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)


def plan(args: argparse.Namespace) -> list[tuple[str, str, int, int]]:
    """(axis, size, prompt tokens, lists a prompt) of every point, sizes together."""
    size, prompt, group = (values[len(values) // 2] for values in (args.sizes, args.prompts, args.group_sizes))
    points = [("prompt", size, value, group) for value in args.prompts]
    points += [("group_size", size, prompt, value) for value in args.group_sizes]
    points += [("size", value, prompt, group) for value in args.sizes]
    return sorted(points, key=lambda point: args.sizes.index(point[1]))


def draw(rows: list[dict], path: Path) -> None:
    """Stacked seconds by phase, one panel an axis."""
    import matplotlib.pyplot as plt

    axes_names = {"prompt": "prompt tokens", "group_size": "lists a prompt", "size": "model"}
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), constrained_layout=True)
    for axis, (key, label) in zip(axes, axes_names.items(), strict=True):
        points = [row for row in rows if row["axis"] == key]
        ticks = [f"{row['parameters'] / 1e6:.1f}M" if key == "size" else str(row[key]) for row in points]
        bottom = [0.0] * len(points)
        for phase, color in zip(PHASES, ("#4477aa", "#bbbbbb", "#ee7733"), strict=True):
            heights = [row[f"{phase}_s"] for row in points]
            axis.bar(ticks, heights, bottom=bottom, label=phase, color=color)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set_xlabel(label)
        axis.set_ylabel("seconds a step")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 300, 700, 2048], help="prompt lengths")
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[2, 4, 8, 16], help="lists a prompt, G")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="model sizes, small to large")
    parser.add_argument("--num-prompts", type=int, default=4, help="prompts a step (default 4)")
    parser.add_argument("--list-tokens", type=int, default=230, help="tokens a list (default 230)")
    parser.add_argument("--token-budget", type=int, default=8192, help="packed tokens a micro-batch (default 8192)")
    parser.add_argument("--trials", type=int, default=2, help="timed steps a point (default 2)")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    parser.add_argument("--plot", type=Path, help="write the plot here (.png, .svg, .pdf)")
    args = parser.parse_args()
    rows, bench = [], None
    measured: dict[tuple[str, int, int], dict] = {}  # the middle of every axis is one and the same point
    for axis, size, prompt_tokens, group_size in tqdm(plan(args), desc="points", unit="point"):
        bench = bench if bench is not None and bench.size == size else Bench(size, args)
        point = (size, prompt_tokens, group_size)
        if point not in measured:
            measured[point] = bench.measure(prompt_tokens, group_size)
        rows.append({"axis": axis, **measured[point]})
    print_table(rows, {"axis": "", **COLUMNS})
    if args.out is not None:
        shapes = {size: asdict(SIZES[size]) for size in args.sizes}
        settings = {"shapes": shapes, "num_prompts": args.num_prompts, "list_tokens": args.list_tokens}
        write_json(args.out, record("step", bench.parallel.device, **settings, rows=rows))
    if args.plot is not None:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
