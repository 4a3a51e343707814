"""Rank-GRPO sampled by vLLM, the weights synced after every step: are the two the same policy?

Runs reinforcement learning with small groups and short lists, in real conversations, and writes the mismatch of every
step as JSON. Every sync has compared all tensors bit by bit, or the run would have stopped; here are the log-probs.

    .venv-vllm/bin/python experiments/vllm/proof.py --model smollm2-135m --steps 20 --data ../shared/data/redial
    .venv-vllm/bin/python experiments/vllm/proof.py --model tiny --steps 50 --data ../shared/data/redial
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rankgrpo.config_file import load_config, presets_dir
from rankgrpo.pipeline import describe_machine, run_pipeline
from rankgrpo.runtime.tracker import read_metrics

OVERRIDES = {
    # Warm, so that its lists have lines; the KL term gives every step after the first a gradient.
    "tiny": [
        *("data.num_train=1000", "teacher.short_requests=0", "sft.num_steps=60", "sft.eval_samples=8"),
        *("rl.max_new_tokens=48", "rl.kl_coef=1e-2", "rl.token_budget=2048"),
    ],
    # As it comes. It lists more than two items, which costs a penalty, so there is a gradient.
    "smollm2-135m": [
        *("data.num_train=200", "data.max_prompt_tokens=256", "data.num_ranks=2", "sft.enabled=false"),
        *("rl.max_new_tokens=32", "rl.kl_coef=0", "rl.lr=1e-5", "rl.token_budget=2048", "model.autocast=none"),
    ],
}
SMALL = ["rl.sampler=vllm", "rl.prompts_per_step=2", "rl.group_size=4", "rl.eval_samples=4", "rl.eval_every=1000"]


def prove(model: str, data: str, steps: int, run_dir: Path, overrides: Sequence[str] = ()) -> dict:
    """The mismatch of every step of a run in `run_dir`, which continues one that is there."""
    overrides = [*OVERRIDES[model], *SMALL, f"rl.num_steps={steps}", *overrides]
    config = load_config(presets_dir() / f"{model}.toml", overrides, model__name=model, data__path=data)
    run_pipeline(config, run_dir, until="rl", evaluate=False)
    return summarise(run_dir) | {"settings": overrides}


def summarise(run_dir: Path) -> dict:
    """The mismatch of the steps that the run has made."""
    config = load_config(run_dir / "config.toml")
    rows = [row for row in read_metrics(run_dir / "rl" / "metrics.jsonl")[0] if row["step"] > 0]
    # A step whose lists all earned the same trains nothing, so it has no log-probs of the trainer's.
    by_step = {
        key: [row.get(key) for row in rows] for key in ("mismatch/exp_abs_logp", "mismatch/abs_logp", "grad/norm")
    }

    def mean(key: str) -> float:
        values = [row[key] for row in rows if key in row]
        return sum(values) / len(values)

    return {
        "model": config.model.name,
        "compute": "bfloat16" if config.model.autocast == "bfloat16" else "float32",
        "steps": len(rows),
        "steps_that_changed_the_weights": sum(row["grad/norm"] > 0 for row in rows),
        "mean_exp_abs_logp": mean("mismatch/exp_abs_logp"),
        "worst_step": max(row["mismatch/exp_abs_logp"] for row in rows if "mismatch/exp_abs_logp" in row),
        "mean_abs_logp": mean("mismatch/abs_logp"),
        "outside_clip_frac": mean("mismatch/outside_clip_frac"),
        "tokens_sampled": sum(row["tokens/sampled"] for row in rows),
        "by_step": by_step,
        "machine": describe_machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(OVERRIDES), default="tiny")
    parser.add_argument("--data", default="demo", help="`demo` or a folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--run-dir", type=Path, help="kept and continued; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--bound", type=float, help="fail when mean exp|difference| of a step is above it")
    args = parser.parse_args()
    overrides = [f"model.autocast={'bfloat16' if args.bfloat16 else 'none'}"]
    with tempfile.TemporaryDirectory() as folder:
        result = prove(args.model, args.data, args.steps, args.run_dir or Path(folder) / "run", overrides)
    result["machine"]["command"] = " ".join(["experiments/vllm/proof.py", *sys.argv[1:]])
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key not in ("by_step", "machine")}, indent=1))
    if args.bound is not None and result["worst_step"] > args.bound:
        sys.exit(f"mean exp|difference| of a step is above {args.bound}")


if __name__ == "__main__":
    main()
