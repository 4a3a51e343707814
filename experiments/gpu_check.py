"""What works on this machine's GPU, in at most eight minutes: `make gpu-check PYTHON=python3`, or this file by itself.

It needs torch, transformers and triton, and nothing from a network; with vLLM it also samples with that. The parts, the
most valuable first, each in a process and with a time limit of its own:

  tests       tests/gpu: attention and kernels against exact arithmetic, at real shapes
  rank_ratio  the loss: kernel, eager, compiled
  head        log-probs of Qwen2.5-0.5B's head: kernel, streamed, full logits
  update      forward and backward of two layers of Qwen2.5-0.5B with its head, shared prefix against dense
  rl_hf       twenty Rank-GRPO steps of a small model that samples for itself
  rl_vllm     the same with vLLM, where it can be imported

After every part OUT/gpu-check.json and OUT/gpu-check.txt are written anew, so that being cut short loses one part. The
exit status is 1 when a part failed; the others are run all the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"tests": 150, "rank_ratio": 40, "head": 50, "update": 80, "rl_hf": 80, "rl_vllm": 80}
NUM_STEPS = 20
TAIL = 3000  # characters of a part's output that are kept


@dataclasses.dataclass(frozen=True)
class Part:
    name: str
    command: Sequence[str]
    result: Path | None = None
    """JSON that the command writes."""
    missing: str = ""
    """Why it cannot run here; empty when it can."""


def make_parts(device: str, small: bool, out: Path) -> list[Part]:
    """The commands of every part, at real shapes or, with small, at shapes of seconds on a CPU."""
    files = {name: out / f"{name}.json" for name in LIMITS}

    def bench(name: str, script: str, *options: str) -> Part:
        command = [str(ROOT / script), "--device", device, "--out", str(files[name]), *options]
        return Part(name, command, files[name])

    def rl(sampler: str) -> Part:
        name, missing = f"rl_{sampler}", ""
        if sampler == "vllm" and (device == "cpu" or importlib.util.find_spec("vllm") is None):
            missing = "vLLM is not installed" if device != "cpu" else "it is for GPUs"
        options = ["--run", sampler, "--device", device, *(["--small"] if small else [])]
        return Part(name, [__file__, *options, "--out", str(files[name])], files[name], missing)

    runner = ["-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", "--durations=3"]
    if importlib.util.find_spec("pytest") is None:
        runner = [str(ROOT / "tests/gpu/plain_runner.py")]
    sizes = ["64x64"] if small else ["512x256", "8192x512"]
    shape = ["--shape", "tiny" if small else "qwen2.5-0.5b", "--trials", "1" if small else "3"]
    shape += ["--case", *(["p40"] if small else ["p300", "p700"])]
    ways = ["shared", "dense_packed", *([] if small else ["dense_rows", "dense_padded"])]
    return [
        Part("tests", [*runner, str(ROOT / "tests/gpu")]),
        bench("rank_ratio", "kernels/bench/rank_ratio.py", "--sizes", *sizes,
              "--budget", "0.1" if small else "1"),
        bench("head", "kernels/bench/linear_logprob.py", "--tokens", "32" if small else "1840", "--live", "1", "0.25",
              "--budget", "0.1" if small else "1", *(["--vocabulary", "512", "--hidden", "64"] if small else [])),
        bench("update", "experiments/bench/update.py", *shape, "--providers", *ways, "--dtype",
              "float32" if device == "cpu" else "bfloat16", *(["--no-memory"] if small else [])),
        rl("hf"),
        rl("vllm"),
    ]  # fmt: skip


def run_part(part: Part, limit_s: float) -> dict:
    """What became of a part: state, seconds, the end of what it printed, and the JSON that it wrote."""
    if part.missing:
        return {"part": part.name, "state": "left out", "why": part.missing}
    paths = [str(ROOT), str(ROOT / "build/path"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *part.command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            timeout=limit_s, cwd=ROOT, check=False,
        )  # fmt: skip
        state, output = "passed" if done.returncode == 0 else f"failed with status {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as error:
        state, output = f"failed: not done after {limit_s:.0f} s", error.stdout or b""
    text = output.decode(errors="replace")
    outcome = {
        "part": part.name,
        "state": state,
        "seconds": round(time.perf_counter() - began, 1),
        "output": text[-TAIL:],
    }
    if part.result is not None and part.result.is_file():
        outcome["result"] = json.loads(part.result.read_text())
    return outcome


def headline(outcome: dict) -> str:
    """A part's result in a line."""
    result, lines = outcome.get("result"), outcome.get("output", "").strip().splitlines()
    if "why" in outcome or result is None:
        return outcome.get("why") or (lines[-1][:100] if lines else "")
    if "results" in result:
        cases = [(case["case"], row) for case in result["results"] for row in case["providers"]]
        return ", ".join(f"{case} {row['provider']} {1e3 * row['best_s']:.1f} ms" for case, row in cases)
    if "losses" in result:
        return f"{result['steps']} steps, {result['step_s']:.3f} s each, largest gap to the sampler {result['gap']:.4f}"
    rows = [row for row in result["rows"] if row["pass"] == "both"]
    size = "size" if "size" in rows[0] else "live"
    return ", ".join(f"{row[size]} {row['provider']} {row['median_ms']:.3f} ms" for row in rows)


def write(out: Path, record: dict) -> None:
    """Both files, whole."""
    for name, text in (("gpu-check.json", json.dumps(record, indent=1) + "\n"), ("gpu-check.txt", table(record))):
        part = out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(out / name)


def table(record: dict) -> str:
    rows = [f"{'part':10}  {'state':28}  {'seconds':>7}  result"]
    for one in record["parts"]:
        rows.append(f"{one['part']:10}  {one['state']:28}  {one.get('seconds', 0):7.1f}  {headline(one)}")
    return "\n".join([record["machine"], *rows]) + "\n"


def check(device: str, small: bool, out: Path, wanted: Sequence[str], budget_s: float) -> int:
    """Run the parts within budget_s; 1 when one failed."""
    sys.path.insert(0, str(ROOT / "build/path"))
    sys.path.insert(0, str(ROOT))
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("no NVIDIA GPU is visible to torch here; `--device cpu --small` rehearses the command without one")
        return 2
    from rankgrpo_kernels.bench.common import machine_line, versions

    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine_line(torch.device(device)), "versions": versions(), "small": small, "parts": []}
    deadline = time.perf_counter() + budget_s
    for part in make_parts(device, small, out):
        if part.name not in wanted:
            continue
        left = deadline - time.perf_counter()
        print(f"> {part.name}", flush=True)
        limit_s = left if small else min(LIMITS[part.name], left)  # small is for a CPU, however slow
        record["parts"].append(run_part(part, max(limit_s, 1)))
        write(out, record)
    print(table(record))
    print(f"written to {out}")
    return int(any(one["state"].startswith("failed") for one in record["parts"]))


# ----------------------------------------------------------------------------------------------------------------------
# Steps of Rank-GRPO


def settings_without_checks() -> None:
    """Stand-ins for pydantic and tomli-w where they are not installed: settings are taken as they are, unchecked."""
    if importlib.util.find_spec("pydantic") is not None:
        return

    def section(cls=None, *, config=None, **options):
        return dataclasses.dataclass(**options) if cls is None else dataclasses.dataclass(cls)

    def nothing(*_, **__):
        return lambda function: function

    names = ("BeforeValidator", "AfterValidator", "WrapValidator", "Field", "ConfigDict", "model_validator")
    types_ = ("NonNegativeFloat", "NonNegativeInt", "PositiveFloat", "PositiveInt", "ValidatorFunctionWrapHandler")
    for module, members in {
        "pydantic": dict.fromkeys(names, nothing) | dict.fromkeys(types_, float) | {"ValidationError": TypeError},
        "pydantic.dataclasses": {"dataclass": section},
        "pydantic_core": {"PydanticCustomError": ValueError},
        "tomli_w": {},
    }.items():
        sys.modules[module] = types.ModuleType(module)
        vars(sys.modules[module]).update(members)


def rl_steps(sampler_name: str, device_name: str, small: bool) -> dict:
    """Twenty steps of a small random model on the demo: sampled, scored, updated, and with vLLM synced.

    Advantages are random, for a model without training hits nothing. Every step checks the loss, the gradient norm and
    the sampler's log-probs against the trainer's, and raises where they are off.
    """
    settings_without_checks()
    import torch

    from rankgrpo.config import Config, RlConfig
    from rankgrpo.data.demo import make_demo
    from rankgrpo.data.prompt import encode_prompts
    from rankgrpo.model.attention import use_shared_prefix
    from rankgrpo.model.head import valid_token_mask
    from rankgrpo.model.packing import Group
    from rankgrpo.model.policy import Policy, choose_impl
    from rankgrpo.model.tiny import TinyConfig, init_model, train_tokenizer
    from rankgrpo.parse import RankSegmenter
    from rankgrpo.rollouts.score import Scorer, score_groups
    from rankgrpo.runtime.distributed import Parallel
    from rankgrpo.runtime.means import Means
    from rankgrpo.runtime.optim import make_optimizer
    from rankgrpo.sampler.choose import hf_sampler
    from rankgrpo.sampler.sync import sync_weights
    from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler
    from rankgrpo.train import Updater, make_micro_batches

    device = torch.device(device_name, 0) if device_name == "cuda" else torch.device("cpu")
    on_gpu, num_prompts, num_ranks, max_new = device_name == "cuda", 2 if small else 16, 5, 16 if small else 96
    dataset = make_demo(64, 1, 1)
    tokenizer = train_tokenizer(dataset, 1024 if small else 8192)
    size = TinyConfig(hidden=32, layers=1, ffn=64, heads=2, kv_heads=1) if small else TinyConfig()
    model = init_model(size, tokenizer, seed=0).to(device)
    use_shared_prefix(model)
    allowed_V = valid_token_mask(model, tokenizer).to(device)
    policy = Policy(model, tokenizer, allowed_V, bfloat16=on_gpu, impl=choose_impl("auto", device))
    rl = dataclasses.replace(RlConfig(), group_size=4, kl_coef=0.0, max_new_tokens=max_new)
    parallel = Parallel(0, 1, device)
    optimizer = make_optimizer(model, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
    sampler = hf_sampler(policy)
    if sampler_name == "vllm":
        dtype = torch.bfloat16 if on_gpu else torch.float32
        engine = EngineConfig(max_tokens=Config().data.max_prompt_tokens + max_new, rows=64, dtype=dtype)
        sampler = VLLMSampler(model, tokenizer, engine, parallel, allowed_V=allowed_V)
        sync_weights(sampler, model)
    updater = Updater(policy, None, sampler, optimizer, rl, parallel)
    scorer = Scorer.open(dataset.catalog, rl, num_ranks, RankSegmenter(tokenizer), sampler.eos_ids)
    samples = dataset.train[:num_prompts]
    prompts = encode_prompts(tokenizer, samples, Config().data.max_prompt_tokens, num_ranks)
    times, norms, gaps = [], [], []
    for step in range(NUM_STEPS):
        began, means = time.perf_counter(), Means()
        seeds = [step * num_prompts + p for p in range(num_prompts)]
        rollouts = sampler.sample(prompts, group_size=4, seeds=seeds, max_new_tokens=max_new)
        sampler.sleep()
        units = score_groups(rollouts, samples, scorer, means).units
        drawn_BU = torch.randn(units.advantage_BU.shape, generator=torch.Generator().manual_seed(step))
        units = dataclasses.replace(units, advantage_BU=drawn_BU)
        groups = [Group(p, [one.token_ids for one in row]) for p, row in zip(prompts, rollouts, strict=True)]
        batch = make_micro_batches(groups, rollouts, units, list(range(num_prompts)), rl, num_ranks)
        norms.append(updater.step(batch, units.denominator, 1e-4, f"step {step + 1}", means))
        sync_weights(sampler, model)
        total, num_tokens = (sum(column) for column in zip(*(micro.gap for micro in batch), strict=True))
        gaps.append(float(total) / max(float(num_tokens), 1.0) - 1.0)
        times.append(time.perf_counter() - began)
    times.sort()
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    return {
        "steps": NUM_STEPS, "step_s": times[len(times) // 2], "gap": max(gaps), "losses": norms, "impl": policy.impl,
        "gib": memory,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes of seconds, to rehearse the command on a CPU")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="NAME")
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts together (default 480)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "build/gpu-check")))
    parser.add_argument("--run", choices=["hf", "vllm"], help=argparse.SUPPRESS)  # the process of one part
    args = parser.parse_args()
    if args.run:
        args.out.write_text(json.dumps(rl_steps(args.run, args.device, args.small)) + "\n")
        return 0
    return check(args.device, args.small, args.out.resolve(), args.parts, args.budget)


if __name__ == "__main__":
    sys.exit(main())
