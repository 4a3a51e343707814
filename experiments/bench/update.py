"""Update-step benchmark: forward and backward of policy log-probabilities, shared prefix against dense.

Providers, all on the same model, rollouts and weighted-sum loss:
  shared        packs of whole groups, each prompt once (the trainer's path)
  dense_packed  every list with its own copy of the prompt, sequences end to end without padding, same streamed head
  dense_rows    the same as a batch of equal-length rows through PyTorch SDPA, causal and unmasked, same streamed head;
                only where the lists of a group have one length
  dense_model   dense_rows through the model's ordinary head: full logits of every position
  dense_padded  prompts left-padded and lists right-padded to the longest of a micro-batch of shuffled rows, padding
                mask, full logits of the completion positions

Providers take turns, so a machine that slows down slows all of them. Times are the best and the median of the trials,
and the least processor time, which a busy machine distorts less; ratios are of the best. Memory is the peak of what
PyTorch allocated during one step beyond parameters and gradients (profiler, in a run of its own). That all providers
compute the same gradients is checked before anything is timed.

    python experiments/bench/update.py --case p300 p700 p2048 mix
    python experiments/bench/update.py --shape tiny --case tiny --providers shared dense_packed dense_padded
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankgrpo.attention import ordinary_attention, use_shared_prefix
from rankgrpo.logprob import pack_logprobs, token_logprobs
from rankgrpo.packing import Group, build_pack, plan_micro_batches

GROUP_SIZE, LIST_TOKENS = 8, 230
MIX = (180, 260, 350, 450, 560, 720, 1032, 2048)  # prompt lengths, mean 700


@dataclass(frozen=True)
class Shape:
    """Qwen2 architecture, tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


SHAPES = {
    "body": Shape(512, 4, 8, 2, 2752, 1024),  # proportions of Qwen2.5-0.5B, a vocabulary that does not dominate
    "tiny": Shape(256, 4, 4, 2, 768, 12288),
    "qwen2.5-0.5b": Shape(896, 2, 14, 2, 4864, 151936),  # two of its 24 layers
}


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(device, dtype)
    use_shared_prefix(model)
    return model


def make_groups(case: str, vocab: int) -> list[Group]:
    """pN: one group with a prompt of N tokens; mix: eight prompts of mean 700; tiny: 32 small uneven groups."""
    rng = random.Random(0)

    def ids(size: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(size)]

    if case == "tiny":
        prompts = [rng.randint(25, 150) for _ in range(32)]
        return [Group(ids(p), [ids(rng.randint(40, 130)) for _ in range(GROUP_SIZE)]) for p in prompts]
    prompts = MIX if case == "mix" else (int(case.removeprefix("p")),)
    return [Group(ids(p), [ids(LIST_TOKENS) for _ in range(GROUP_SIZE)]) for p in prompts]


def list_weights(groups: list[Group]) -> list[list[Tensor]]:
    """A fixed upstream gradient a token, so that every provider computes the same loss."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(len(ids), generator=generator) for ids in group.completion_ids] for group in groups]


def weighted_sum(logp_BT: Tensor, weights: list[Tensor]) -> Tensor:
    weight_BT = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True).to(logp_BT.device)
    return (logp_BT * weight_BT).sum()


def packed_step(model, groups: list[Group], weights: list[list[Tensor]], budget: int) -> float:
    total = 0.0
    for chosen in plan_micro_batches(groups, budget):
        pack = build_pack([groups[i] for i in chosen], model.device)
        loss = weighted_sum(pack_logprobs(model, pack), [w for i in chosen for w in weights[i]])
        loss.backward()
        total += float(loss.detach())
    return total


def dense_packed_step(model, groups: list[Group], weights: list[list[Tensor]], budget: int) -> float:
    alone = [Group(group.prompt_ids, [ids]) for group in groups for ids in group.completion_ids]
    return packed_step(model, alone, [[w] for row in weights for w in row], budget)


def dense_rows_step(model, groups: list[Group], weights: list[list[Tensor]], *, streamed: bool) -> float:
    total = 0.0
    for group, group_weights in zip(groups, weights, strict=True):
        ids_BS = torch.tensor([group.prompt_ids + ids for ids in group.completion_ids], device=model.device)
        target_BT = ids_BS[:, len(group.prompt_ids) :]
        with ordinary_attention(model):
            if streamed:
                hidden_BSD = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
                hidden_MD = hidden_BSD[:, len(group.prompt_ids) - 1 : -1].flatten(0, 1)
                logp_BT = token_logprobs(hidden_MD, model.lm_head.weight, target_BT.flatten()).view(target_BT.shape)
            else:
                logits_BTV = model(input_ids=ids_BS, use_cache=False).logits[:, len(group.prompt_ids) - 1 : -1]
                logp_BT = logits_BTV.float().log_softmax(-1).gather(-1, target_BT[..., None])[..., 0]
            loss = weighted_sum(logp_BT, group_weights)
            loss.backward()
        total += float(loss.detach())
    return total


def dense_padded_step(model, groups: list[Group], weights: list[list[Tensor]], num_rows: int) -> float:
    rows = [
        (group.prompt_ids, ids, weight)
        for group, group_weights in zip(groups, weights, strict=True)
        for ids, weight in zip(group.completion_ids, group_weights, strict=True)
    ]
    random.Random(0).shuffle(rows)
    total = 0.0
    for start in range(0, len(rows), num_rows):
        part = rows[start : start + num_rows]
        left, right = max(len(p) for p, _, _ in part), max(len(c) for _, c, _ in part)
        ids_BS = torch.tensor([[0] * (left - len(p)) + p + c + [0] * (right - len(c)) for p, c, _ in part])
        mask_BS = torch.tensor(
            [[0] * (left - len(p)) + [1] * (len(p) + len(c)) + [0] * (right - len(c)) for p, c, _ in part]
        )
        ids_BS, mask_BS = ids_BS.to(model.device), mask_BS.to(model.device)
        position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        with ordinary_attention(model):
            logits_BTV = model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=position_BS,
                use_cache=False,
                logits_to_keep=right + 1,
            ).logits[:, :-1]
            logp_BT = logits_BTV.float().log_softmax(-1).gather(-1, ids_BS[:, left:, None])[..., 0]
            loss = weighted_sum(logp_BT, [weight for _, _, weight in part])
            loss.backward()
        total += float(loss.detach())
    return total


def make_providers(args, model, groups: list[Group]) -> dict[str, Callable[[], float]]:
    weights = list_weights(groups)
    steps = {
        "shared": lambda: packed_step(model, groups, weights, args.token_budget),
        "dense_packed": lambda: dense_packed_step(model, groups, weights, args.token_budget),
        "dense_rows": lambda: dense_rows_step(model, groups, weights, streamed=True),
        "dense_model": lambda: dense_rows_step(model, groups, weights, streamed=False),
        "dense_padded": lambda: dense_padded_step(model, groups, weights, args.rows),
    }
    if any(len(set(map(len, group.completion_ids))) > 1 for group in groups):
        del steps["dense_rows"], steps["dense_model"]
    return {name: step for name, step in steps.items() if name in args.providers}


def zero_gradients(model) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def check_agreement(model, providers: dict[str, Callable[[], float]], tolerance: float) -> dict[str, float]:
    """Relative gradient difference of every provider to the first; raises beyond the tolerance."""
    gradients: dict[str, Tensor] = {}
    for name, step in providers.items():
        zero_gradients(model)
        step()
        gradients[name] = torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])
    reference = next(iter(gradients.values()))
    errors = {name: float((grad - reference).norm() / reference.norm()) for name, grad in gradients.items()}
    if wrong := {name: error for name, error in errors.items() if not error <= tolerance}:
        raise ValueError(f"providers compute different gradients, relative errors {wrong}, allowed {tolerance}")
    return errors


def peak_bytes(step: Callable[[], float], device: torch.device) -> int:
    """Peak of memory allocated inside one step, beyond what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return max(int(event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]")


def seconds(step: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Wall-clock and processor seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_case(args, case: str, model) -> dict:
    groups = make_groups(case, model.config.vocab_size)
    providers = make_providers(args, model, groups)
    errors = check_agreement(model, providers, 1e-4 if model.dtype == torch.float32 else 5e-2)
    peaks = {name: peak_bytes(step, model.device) for name, step in providers.items()} if args.memory else {}
    wall: dict[str, list[float]] = {name: [] for name in providers}
    cpu: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(args.trials):
        for name, step in providers.items():
            for times, spent in zip((wall, cpu), seconds(step, model.device), strict=True):
                times[name].append(spent)
    shared, dense = sum(g.tokens_shared for g in groups), sum(g.tokens_dense for g in groups)
    rows = {
        name: {
            "best_s": min(wall[name]),
            "median_s": median(wall[name]),
            "cpu_s": min(cpu[name]),
            "peak_mib": peaks[name] / 2**20 if peaks else None,
            "gradient_error": errors[name],
            "time_ratio": min(wall[name]) / min(wall["shared"]),
            "cpu_ratio": min(cpu[name]) / min(cpu["shared"]),
            "memory_ratio": peaks[name] / peaks["shared"] if peaks else None,
        }
        for name in providers
    }
    return {"case": case, "tokens_shared": shared, "tokens_dense": dense, "providers": rows}


def environment(device: torch.device) -> dict[str, str | int]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip() if commit.returncode == 0 else "unknown",
    }


def print_case(result: dict) -> None:
    saved = 1 - result["tokens_shared"] / result["tokens_dense"]
    print(f"\n{result['case']}: {result['tokens_shared']} tokens for {result['tokens_dense']} ({saved:.0%} saved)")
    columns = ("best_s", "median_s", "time_ratio", "cpu_s", "cpu_ratio", "peak_mib", "memory_ratio", "gradient_error")
    print(f"{'provider':<14}" + "".join(f"{column:>15}" for column in columns))
    for name, row in result["providers"].items():
        print(f"{name:<14}" + "".join(f"{'-' if row[c] is None else format(row[c], '.3g'):>15}" for c in columns))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="body", help="model shape (default: body)")
    parser.add_argument(
        "--case", nargs="+", default=["p300", "p700", "p2048"], help="pN (one prompt of N tokens), mix, tiny"
    )
    names = ["shared", "dense_packed", "dense_rows", "dense_model", "dense_padded"]
    parser.add_argument("--providers", nargs="+", choices=names, default=names)
    parser.add_argument("--trials", type=int, default=3, help="timed steps a provider (default: 3)")
    parser.add_argument("--token-budget", type=int, default=16384, help="packed tokens a micro-batch (default: 16384)")
    parser.add_argument("--rows", type=int, default=8, help="rows a micro-batch of dense_padded (default: 8)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the memory runs")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    if "shared" not in args.providers:
        parser.error("--providers must include 'shared': every ratio is against it")
    return args


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    model = make_model(SHAPES[args.shape], device, getattr(torch, args.dtype))
    results = []
    for case in args.case:
        results.append(measure_case(args, case, model))
        print_case(results[-1])
    if args.json:
        report = {
            "environment": environment(device),
            "shape": {"name": args.shape, **asdict(SHAPES[args.shape])},
            "dtype": args.dtype,
            "group_size": GROUP_SIZE,
            "list_tokens": LIST_TOKENS,
            "results": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
