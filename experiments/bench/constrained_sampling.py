"""Lists a second of the `hf` sampler, free and held to the catalog, at the same weights and temperature.

Prompts are those of a data set's test split, weights are those a model has before training: a random one writes neither
lines nor ends, so the free lists are made as long as the constrained ones are on average (rounded down), the end token
forbidden to them. That is the least a free list of K lines takes: real ones differ in length, and a batch waits for its
longest.

The two take turns, so a machine that slows down slows both. Seconds are the least processor time of the trials (wall
time beside it), and ratios are of these. Threads are torch's: set OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from rankgrpo.config_file import load_config, preset_file
from rankgrpo.data.dialogs import seen_items
from rankgrpo.data.load import load_dataset
from rankgrpo.data.prompt import encode_prompts
from rankgrpo.data.samples import Dataset
from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.model.constraint import open_constraint
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.presets import count_parameters, load_policy, make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.sampler.base import Rollout, prompt_seed
from rankgrpo.sampler.constrained import ConstrainedSampler
from rankgrpo.sampler.hf import HFSampler
from rankgrpo_kernels.bench.common import print_table, record, write_json

EXAMPLE = """examples:
  OMP_NUM_THREADS=1 python experiments/bench/constrained_sampling.py --data shared/data/redial --prompts 4 16 32
  OMP_NUM_THREADS=1 python experiments/bench/constrained_sampling.py --data shared/data/redial --model smollm2-135m \\
      --prompts 1 4 --out smollm2.json"""
COLUMNS = {
    "prompts": "d", "group_size": "d", "prompt_tokens": ".0f", "list_tokens": ".0f", "forced": ".3f",
    "choices": ".1f", "passes": "d", "free_passes": "d", "free_s": ".3g", "constrained_s": ".3g",
    "free_lists_s": ".3g", "constrained_lists_s": ".3g", "ratio": ".2f", "wall_ratio": ".2f",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A batch of prompts and what is asked of the samplers."""

    prompts: list[list[int]]
    seen: list[list[int]]
    seeds: list[int]
    group_size: int
    temperature: float

    def sample(self, sampler: HFSampler, max_new_tokens: int) -> list[Rollout]:
        options = {"group_size": self.group_size, "seeds": self.seeds, "temperature": self.temperature}
        groups = sampler.sample(self.prompts, max_new_tokens=max_new_tokens, seen=self.seen, **options)
        return [rollout for group in groups for rollout in group]


class Passes:
    """Counts the forward passes of a model's body."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __enter__(self) -> Passes:
        self.handle = self.model.base_model.register_forward_hook(self._heard)
        return self

    def _heard(self, *_) -> None:
        self.count += 1

    def __exit__(self, *_) -> None:
        self.handle.remove()


def make_samplers(dataset: Dataset, args: argparse.Namespace) -> tuple[HFSampler, ConstrainedSampler]:
    with TemporaryDirectory() as folder:
        size = load_config(preset_file("tiny")).model
        tiny = TinyConfig.of(size)
        init = make_init(args.model, dataset, Path(folder) / "init", seed=0, tiny=tiny, num_ranks=args.num_ranks)
        model, tokenizer = load_policy(init)
    model.eval()
    constraint = open_constraint(dataset.catalog, tokenizer, num_ranks=args.num_ranks, forbid=args.forbid)
    allowed_V = valid_token_mask(model, tokenizer)
    options = {"rows": args.rows, "autocast": args.autocast}
    free = HFSampler(model, tokenizer, allowed_V=allowed_V, **options)
    banned_V = torch.zeros_like(allowed_V).index_fill_(0, torch.tensor(free.eos_ids), True)
    return HFSampler(model, tokenizer, allowed_V=allowed_V & ~banned_V, **options), ConstrainedSampler(
        model, tokenizer, constraint, **options
    )


def measure(free: HFSampler, constrained: ConstrainedSampler, case: Case, trials: int) -> dict:
    lists = case.sample(constrained, 1)
    tokens = sum(len(rollout.token_ids) for rollout in lists)
    choices = sum(logp != 0 for rollout in lists for logp in rollout.logp)
    mean = tokens // len(lists)
    case.sample(free, 2)  # as the one above, to warm up
    seconds: dict[str, list[tuple[float, float]]] = {"free": [], "constrained": []}
    passes: dict[str, int] = {}
    for _ in tqdm(range(trials), desc=f"{len(case.prompts)} prompts", leave=False, disable=None):
        for name, sampler in (("free", free), ("constrained", constrained)):
            gc.collect()
            with Passes(sampler.model) as counted:
                began = time.process_time(), time.perf_counter()
                again = case.sample(sampler, mean)
                seconds[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
            assert len(again) == len(lists)
            passes[name] = counted.count
    (free_s, free_wall), (own_s, own_wall) = (
        (min(s for s, _ in seconds[name]), min(wall for _, wall in seconds[name])) for name in seconds
    )
    return {
        "prompts": len(case.prompts),
        "group_size": case.group_size,
        "prompt_tokens": sum(map(len, case.prompts)) / len(case.prompts),
        "list_tokens": tokens / len(lists),
        "forced": 1 - choices / tokens,
        "choices": choices / len(lists),
        "passes": passes["constrained"],
        "free_passes": passes["free"],
        "free_s": free_s,
        "constrained_s": own_s,
        "free_lists_s": len(lists) / free_s,
        "constrained_lists_s": len(lists) / own_s,
        "ratio": free_s / own_s,
        "wall_ratio": free_wall / own_wall,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, smollm2-135m, a folder or a hub id (default tiny)")
    parser.add_argument("--data", default="demo", help="demo or a data folder (default demo)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32], help="prompts sampled from at once")
    parser.add_argument("--group-size", type=int, default=8, help="lists a prompt (default 8)")
    parser.add_argument("--num-ranks", type=int, default=20, help="lines a list (default 20)")
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--forbid", choices=("none", "repeats", "repeats+seen"), default="repeats+seen")
    parser.add_argument("--rows", type=int, default=256, help="lists decoded at once, at most (default 256)")
    parser.add_argument("--autocast", choices=("bfloat16",), help="default: float32")
    parser.add_argument("--trials", type=int, default=3, help="turns of each sampler (default 3)")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args()

    keep_freed_memory()
    dataset = load_dataset(args.data)
    free, constrained = make_samplers(dataset, args)
    rows = []
    for num_prompts in args.prompts:
        samples = dataset.test[:num_prompts]
        prompts = encode_prompts(constrained.tokenizer, samples, args.max_prompt_tokens, args.num_ranks)
        seen = [seen_items(sample, dataset.catalog) for sample in samples]
        seeds = [prompt_seed(0, 0, sample.id) for sample in samples]
        case = Case(prompts, seen, seeds, args.group_size, args.temperature)
        rows.append(measure(free, constrained, case, args.trials))
    num_parameters = count_parameters(free.model)
    print(f"{args.model} ({num_parameters:,} parameters) on {dataset.name}, {torch.get_num_threads()} threads")
    print_table(rows, COLUMNS)
    if args.out is not None:
        settings = {key: value for key, value in vars(args).items() if key != "out"} | {"parameters": num_parameters}
        write_json(args.out, record("constrained_sampling", free.model.device, settings=settings, rows=rows))


if __name__ == "__main__":
    main()
