"""How OpenMP's threads wait, in decoding and in a training micro-batch, on a machine at rest and beside a busy process.

  spinning   all threads, which wait for each other as OpenMP does by default
  passive    all threads, which wait asleep: OMP_WAIT_POLICY=passive, as the command line sets it
  one        one thread
Each runs in a process of its own, as the variable is read when torch is imported, and they take turns. Cases 1 to 256
are a token of so many lists with the `hf` sampler, its share of reading the prompts included; `train` is forward and
backward of 3,000 packed tokens. The busy process spins on the first core. `speedup` is the baseline's time over that of
`passive`; `low` columns hold the fastest run, and `load_average` tells of other work that the machine had meanwhile.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from rankgrpo.data.demo import make_demo
from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy
from rankgrpo.model.tiny import TinyConfig, init_model, train_tokenizer
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo_kernels.bench.common import print_table, record, write_json

EXAMPLE = """examples:
  python experiments/bench/threads.py
  python experiments/bench/threads.py --model 135m --cases 1 8 --trials 3 --out build/bench/threads.json"""
SIZES = {
    "tiny": TinyConfig(),
    "135m": TinyConfig(hidden=576, layers=30, ffn=1536, heads=9, kv_heads=3, vocab=8192),
}
VARIANTS = {"spinning": {}, "passive": {"OMP_WAIT_POLICY": "passive"}, "one": {"OMP_NUM_THREADS": "1"}}
CASES = ("1", "8", "64", "256", "train")
BUSY = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
PROMPT_TOKENS, LIST_TOKENS, STEPS, GROUP_SIZE = 60, 40, 8, 8


class Bench:
    """The cases of one variant, timed in this process."""

    def __init__(self, model: str):
        keep_freed_memory()
        tokenizer = train_tokenizer(make_demo(200, 1, 1), 8192)
        model = init_model(SIZES[model], tokenizer, seed=0)
        use_shared_prefix(model)
        allowed_V = torch.ones(len(tokenizer), dtype=torch.bool)
        allowed_V[tokenizer.eos_token_id] = False  # every list has as many tokens
        self.policy = Policy(model, tokenizer, allowed_V, bfloat16=False)
        self.sampler = hf_sampler(self.policy)

    def run(self, case: str) -> float:
        """Seconds of a decoding step, or of the micro-batch."""
        generator = torch.Generator().manual_seed(0)
        num_rows = 64 if case == "train" else int(case)
        group_size = min(GROUP_SIZE, num_rows)
        num_prompts = num_rows // group_size
        ids = torch.randint(3, len(self.policy.tokenizer), (num_prompts, PROMPT_TOKENS), generator=generator).tolist()
        began = time.perf_counter()
        if case != "train":
            self.sampler.sample(ids, group_size=group_size, seeds=list(range(num_prompts)), max_new_tokens=STEPS)
            return (time.perf_counter() - began) / STEPS
        groups = [Group(prompt, [prompt[:LIST_TOKENS]] * group_size) for prompt in ids]
        _, logp_BT = self.policy.logprobs(groups)
        logp_BT.sum().backward()
        return time.perf_counter() - began


def serve(model: str) -> None:
    """Answer every line of standard input, the name of a case, with its seconds."""
    bench = Bench(model)
    for line in sys.stdin:
        print(bench.run(line.strip()), flush=True)


@contextmanager
def variant_processes(model: str) -> Iterator[dict[str, subprocess.Popen]]:
    with ExitStack() as stack:
        processes = {}
        for variant, extra in VARIANTS.items():
            environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | extra
            command = [sys.executable, __file__, "--model", model, "--serve"]
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes[variant] = stack.enter_context(process)
            stack.callback(process.stdin.close)
        yield processes


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", BUSY]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def ask(process: subprocess.Popen, case: str) -> float:
    print(case, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def measure_case(processes: dict[str, subprocess.Popen], case: str, trials: int) -> dict[str, float]:
    """Median and least milliseconds of every variant, after a run that does not count."""
    times_ms = {variant: [] for variant in processes}
    for _ in range(1 + trials):
        for variant, process in processes.items():
            times_ms[variant].append(1e3 * ask(process, case))
    row = {}
    for variant, values in times_ms.items():
        row |= {f"{variant}_ms": median(values[1:]), f"{variant}_low_ms": min(values[1:])}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="tiny", help="shape of the weights, which are random")
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="lists decoded at once, or train"
    )
    parser.add_argument("--baseline", choices=VARIANTS, default="spinning", help="what `passive` is compared with")
    parser.add_argument("--trials", type=int, default=5, help="timed runs a variant (default 5)")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.model)
        return
    rows = []
    points = [(load, case) for load in ("none", "one busy") for case in args.cases]
    with variant_processes(args.model) as processes:
        for load, case in tqdm(points, desc="cases", unit="case"):
            with busy_process(load != "none"):
                row = {"beside": load, "case": case, **measure_case(processes, case, args.trials)}
            row["speedup"] = row[f"{args.baseline}_ms"] / row["passive_ms"]
            rows.append(row | {"load_average": os.getloadavg()[0]})
    columns = [f"{variant}_{kind}" for kind in ("ms", "low_ms") for variant in VARIANTS]
    formats = dict.fromkeys([*columns, "speedup", "load_average"], ".1f")
    print_table(rows, {"beside": "", "case": "", **formats})
    if args.out is not None:
        settings = {"model": args.model, "baseline": args.baseline, "trials": args.trials}
        write_json(args.out, record("threads", torch.device("cpu"), **settings, rows=rows))


if __name__ == "__main__":
    main()
