"""Steps an hour with and without rl.overlap, by the length of the lists: the real training loop on two cores.

  thread     one process of one thread, a step after the other
  threads    one process of two threads
  processes  two processes of one thread, as `make train` starts on two cores
  overlap    one process of one thread, and one that samples for it
The model is the tiny preset's before any training. Such a model does not stop, so every list has as many tokens as
rl.max_new_tokens allows, and rewards are noise, so every list is trained on. At some length sampling takes as long as
the rest of a step (`sample / rest` of the baseline `thread`): there overlapping has the most to give.

Each variant runs in processes of its own, one after the other in every trial; steps before the third are left out, and
wall seconds are medians. `busiest` is the processor time a step of the process that worked longest, by thread: what a
step takes at least on idle cores, also where the machine has other work. Ratios are to each baseline by both.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rankgrpo.config_file import load_config, preset_file
from rankgrpo.data.demo import make_demo
from rankgrpo.model.presets import make_init
from rankgrpo.runtime.distributed import leave_parallel, start_parallel
from rankgrpo.train import train
from rankgrpo_kernels.bench.common import print_table, record, write_json

EXAMPLE = """examples:
  python experiments/bench/overlap.py --lengths 20 40 80
  python experiments/bench/overlap.py --lengths 40 --steps 20 --trials 3 --out build/bench/overlap.json"""
VARIANTS = {"thread": (1, 1), "threads": (1, 2), "processes": (2, 1), "overlap": (1, 2)}
"""Processes, and the threads of each; overlap gives one of its threads to the process that samples."""
LEFT_OUT = 2
"""Steps at the beginning, in which caches are filled and the first batch is waited for."""
COLUMNS = {
    "length": "d", "variant": "", "wall_s": ".2f", "busiest_s": ".2f", "sample_s": ".2f", "update_s": ".2f",
    "sample_over_rest": ".2f", "steps_an_hour": ".0f", "over_thread": ".2f", "over_threads": ".2f",
    "over_processes": ".2f", "busiest_over_thread": ".2f", "busiest_over_processes": ".2f",
}  # fmt: skip


def noise(answer) -> list[float]:
    """A reward of nothing, the same whenever it is computed."""
    digest = hashlib.blake2b(answer.text.encode(), digest_size=answer.num_ranks).digest()
    return [float(byte > 127) for byte in digest]


class Clock:
    """A tracker that notes the time, and the processor time of this process and of those it started, at every step."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        me = os.getpid()
        started = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        own, beside = time.process_time(), sum(map(processor_seconds, started))
        times = {key: metrics.get(f"time/{key}", 0.0) for key in ("sample_s", "update_s", "total_s")}
        self.rows.append({"step": step, "own_s": own, "beside_s": beside, **times})


def processor_seconds(process: str) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settings(args: argparse.Namespace, length: int, overlap: bool) -> list[str]:
    return [
        *(f"rl.num_steps={args.steps}", "rl.constrain=none", "rl.kl_coef=0", "rl.mismatch_alarm=1e6", "rl.lr=1e-6"),
        *(f"rl.prompts_per_step={args.prompts}", f"rl.max_new_tokens={length}", f"rl.overlap={str(overlap).lower()}"),
        *("rl.reward=relevance + overlap:noise", "rl.log_lists=0", "rl.eval_samples=2", "rl.eval_every=1000000"),
        *("rl.save_every=1000000", "model.verify=false", "eval.free_samples=0", f"data.num_train={args.num_train}"),
    ]


def play(args: argparse.Namespace) -> None:
    """Train in this process, one of those of its variant, and write its clock."""
    parallel = start_parallel()
    config = load_config(preset_file("tiny"), settings(args, args.play_length, args.play == "overlap"))
    clock = Clock()
    train(config, make_demo(args.num_train, 8, 1), args.init, args.folder / "rl", parallel, clock)
    (args.folder / f"clock-{parallel.dp_rank}.json").write_text(json.dumps(clock.rows))
    leave_parallel()


def measure(variant: str, length: int, start: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of one run."""
    processes, threads = VARIANTS[variant]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, *(launcher if processes > 1 else []), __file__, "--play", variant),
                *("--play-length", str(length), "--init", start, "--folder", folder, "--steps", str(args.steps)),
                *("--prompts", str(args.prompts), "--num-train", str(args.num_train)),
            ],
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.DEVNULL,
            stderr=None if args.verbose else subprocess.DEVNULL,
            check=True,
        )
        (rows,) = [json.loads(path.read_text()) for path in Path(folder).glob("clock-0.json")]
    used = rows[LEFT_OUT + 1 :]  # the row of step 0 is the validation before training
    before, after, count = rows[LEFT_OUT], rows[-1], len(used)
    own, beside = ((after[key] - before[key]) / count for key in ("own_s", "beside_s"))
    result = {key: median(row[key] for row in used) for key in ("sample_s", "update_s", "total_s")}
    own /= threads if variant == "threads" else 1
    return result | {"own_s": own, "beside_s": beside, "busiest_s": max(own, beside)}


def summarise(length: int, trials: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    rows = []
    best = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in trials.items()}
    for name, seconds in best.items():
        row = {"length": length, "variant": name, "wall_s": seconds["total_s"], **seconds}
        row["sample_over_rest"] = seconds["sample_s"] / max(seconds["total_s"] - seconds["sample_s"], 1e-9)
        row["steps_an_hour"] = 3600 / seconds["total_s"]
        for other, theirs in best.items():
            row[f"over_{other}"] = theirs["total_s"] / seconds["total_s"]
            row[f"busiest_over_{other}"] = theirs["busiest_s"] / seconds["busiest_s"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 40, 80], help="tokens of every list")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a step, 8 lists each (default 8)")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run (default 10)")
    parser.add_argument("--trials", type=int, default=1, help="runs of each variant, of which the best counts")
    parser.add_argument("--num-train", type=int, default=200, help="conversations of the demo (default 200)")
    parser.add_argument("--verbose", action="store_true", help="show what the runs say")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    for inner in ("--play", "--init"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--play-length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.play:
        play(args)
        return
    rows = []
    with TemporaryDirectory() as folder:
        start = make_init("tiny", make_demo(args.num_train, 8, 1), Path(folder) / "init", seed=0)
        for length in args.lengths:
            trials: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
            for _ in range(args.trials):
                for name in VARIANTS:
                    trials[name].append(measure(name, length, start, args))
            rows += summarise(length, trials)
            print_table(rows[-len(VARIANTS) :], COLUMNS)
    if args.out is not None:
        shown = {key: getattr(args, key) for key in ("lengths", "prompts", "steps", "trials", "num_train")}
        write_json(args.out, record("overlap", torch.device("cpu"), settings=shown, rows=rows))


if __name__ == "__main__":
    main()
