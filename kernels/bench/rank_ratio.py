"""Time of the Rank-GRPO loss, forward and forward + backward: fused kernel, eager scatter, torch.compile.

The baselines are `rankgrpo.loss.rank_grpo_loss(impl="torch")` itself and the same compiled. All providers get the same
tensors, and must agree on loss and gradient before anything is timed. GB/s counts the bytes the operation has to move,
each input read once and each output written once, whatever a provider really moves:

  forward   log-prob, old log-prob (4 bytes each), rank (8) and, with --kl-coef, reference log-prob (4) a token
  backward  rank (8), gradient (4) and, with --kl-coef, both log-probs (8) a token

Not measured: producing the log-probs (linear_logprob.py does that) and finding the ranks (segmentation.py).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.loss import rank_grpo_loss
from rankgrpo_kernels.bench.common import (
    choose_providers,
    copy_gb_per_s,
    machine_line,
    make_parser,
    measure,
    print_table,
    record,
    write_json,
)

# Shape letters: B lists, T tokens, K ranks.

EXAMPLE = """examples:
  python kernels/bench/rank_ratio.py                                    all sizes, every provider that runs here
  python kernels/bench/rank_ratio.py --sizes 512x256 --kl-coef 0.001
  python kernels/bench/rank_ratio.py --sweep --out sweep.json           block sizes of the forward kernel (GPU)"""
PROVIDERS = ("triton", "eager", "compile")
SIZES = {"cuda": ["512x256", "4096x256", "8192x512", "32768x512", "256x65536"], "cpu": ["512x256", "2048x512"]}
COLUMNS = {
    "size": "", "provider": "", "pass": "", "median_ms": ".4f", "wall_ms": ".4f", "gb_per_s": ".1f",
    "of_copy": ".0%", "speedup_over_eager": ".2f",
}  # fmt: skip

Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def make_inputs(num_lists: int, num_tokens: int, num_ranks: int, with_ref: bool, device: torch.device) -> dict:
    """Lists of 90 to 100 % of the width, padded on the right; ranks of uneven length; ratios around the clip."""
    random = torch.Generator(device).manual_seed(0)
    shape = {"size": (num_lists, num_tokens), "generator": random, "device": device}
    logp_BT = -3 * torch.rand(**shape)
    border_BT = torch.rand(**shape) < (num_ranks - 1) / max(num_tokens - 1, 1)
    rank_BT = border_BT.cumsum(1)
    length_B1 = (num_tokens * (0.9 + 0.1 * torch.rand(num_lists, 1, generator=random, device=device))).long()
    rank_BT[torch.arange(num_tokens, device=device) >= length_B1] = -1
    return {
        "logp_BT": logp_BT.requires_grad_(),
        "old_logp_BT": logp_BT.detach() + 0.1 * torch.randn(**shape),
        "rank_BT": rank_BT,
        "advantage_BK": torch.randn(num_lists, num_ranks, generator=random, device=device),
        "ref_logp_BT": logp_BT.detach() + 0.3 * torch.randn(**shape) if with_ref else None,
    }


def make_losses(device: torch.device, asked: list[str] | None) -> dict[str, Loss]:
    missing = {}
    if device.type != "cuda":
        missing = {
            "triton": "it needs a GPU; the interpreter says nothing about speed",
            "compile": "a baseline for the kernel, compiled for GPUs; ask for it by name to try it here",
        }
        if asked and "compile" in asked:
            del missing["compile"]
    losses: dict[str, Loss] = {}
    for name in choose_providers(asked, missing, PROVIDERS):
        if name == "triton":
            from rankgrpo_kernels.rank_ratio import fused_rank_grpo_loss

            losses[name] = fused_rank_grpo_loss
        else:
            losses[name] = rank_grpo_loss if name == "eager" else torch.compile(rank_grpo_loss, dynamic=False)
    return losses


def moved_bytes(inputs: dict) -> dict[str, int]:
    tokens, units = inputs["rank_BT"].numel(), inputs["advantage_BK"].numel()
    with_ref = inputs["ref_logp_BT"] is not None
    forward = tokens * (4 + 4 + 8 + 4 * with_ref) + 4 * units
    backward = tokens * (8 + 4 + 8 * with_ref) + 4 * units
    return {"forward": forward, "both": forward + backward}


def passes_of(loss: Loss, inputs: dict, kl_coef: float) -> dict[str, Callable[[], object]]:
    def forward() -> Tensor:
        return loss(**inputs, kl_coef=kl_coef)[0]

    def both() -> Tensor:
        return torch.autograd.grad(forward(), inputs["logp_BT"])[0]

    return {"forward": forward, "both": both}


def check_agreement(losses: dict[str, Loss], inputs: dict, kl_coef: float) -> None:
    """Check every provider against float64, to 1e-5 of the loss and of the largest gradient."""
    exact_inputs = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in inputs.items()}
    exact_inputs["logp_BT"] = inputs["logp_BT"].detach().double().requires_grad_()
    exact = {name: run() for name, run in passes_of(rank_grpo_loss, exact_inputs, kl_coef).items()}
    for provider, loss in losses.items():
        for name, run in passes_of(loss, inputs, kl_coef).items():
            error = (run() - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-3 * (name == "forward"))
            if not error < 1e-5:
                raise AssertionError(f"{provider}, {name}: relative error {error:.1e} against float64")


def bench(args: argparse.Namespace, device: torch.device, losses: dict[str, Loss], copy: float) -> list[dict]:
    rows = []
    for size in args.sizes or SIZES[device.type]:
        num_lists, num_tokens = (int(part) for part in size.split("x"))
        inputs = make_inputs(num_lists, num_tokens, args.num_ranks, args.kl_coef > 0, device)
        check_agreement(losses, inputs, args.kl_coef)
        for name in ("forward", "both"):
            runs = {provider: passes_of(loss, inputs, args.kl_coef)[name] for provider, loss in losses.items()}
            timings = measure(runs, device, budget_s=args.budget)
            for provider, timing in timings.items():
                gb_per_s = moved_bytes(inputs)[name] / timing.median_ms / 1e6
                row = {"size": size, "provider": provider, "pass": name, **asdict(timing), "gb_per_s": gb_per_s}
                row["of_copy"] = gb_per_s / copy
                if "eager" in timings:
                    row["speedup_over_eager"] = timings["eager"].median_ms / timing.median_ms
                    if timing.wall_ms is not None:
                        row["wall_speedup_over_eager"] = timings["eager"].wall_ms / timing.wall_ms
                rows.append(row)
    return rows


def sweep(args: argparse.Namespace, device: torch.device, copy: float) -> list[dict]:
    """Time the forward kernel with other blocks and warps than `forward_config` chooses."""
    import rankgrpo_kernels.rank_ratio as op

    rows, chosen = [], op.forward_config
    for size in args.sizes or SIZES["cuda"]:
        num_lists, num_tokens = (int(part) for part in size.split("x"))
        inputs = make_inputs(num_lists, num_tokens, args.num_ranks, args.kl_coef > 0, device)
        run = passes_of(op.fused_rank_grpo_loss, inputs, args.kl_coef)["forward"]
        for block_t, num_warps in itertools.product((256, 512, 1024, 2048), (1, 2, 4, 8)):
            config = chosen(num_tokens, args.num_ranks) | {"BLOCK_T": block_t, "num_warps": num_warps}
            op.forward_config = lambda *_, config=config: config
            timing = measure({"triton": run}, device, budget_s=args.budget / 10)["triton"]
            gb_per_s = moved_bytes(inputs)["forward"] / timing.median_ms / 1e6
            name = f"{block_t} tokens, {num_warps} warps"
            row = {"size": size, "provider": name, "pass": "forward", **asdict(timing), "gb_per_s": gb_per_s}
            rows.append(row | {"of_copy": gb_per_s / copy})
        op.forward_config = chosen
    return rows


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE, PROVIDERS)
    parser.add_argument("--sizes", nargs="+", metavar="BxT", help="lists x tokens (default: by device)")
    parser.add_argument("--num-ranks", type=int, default=20, help="K (default 20)")
    parser.add_argument("--kl-coef", type=float, default=0.0, help="above 0: with a reference (default 0)")
    parser.add_argument("--sweep", action="store_true", help="time block sizes and warps of the forward kernel instead")
    args = parser.parse_args()
    keep_freed_memory()
    device = torch.device(args.device)
    if args.sweep and device.type != "cuda":
        raise SystemExit("--sweep times the kernel itself and needs a GPU")
    print(machine_line(device))
    losses = {} if args.sweep else make_losses(device, args.providers)
    copy = copy_gb_per_s(device)
    print(f"copy bandwidth: {copy:.0f} GB/s")
    rows = sweep(args, device, copy) if args.sweep else bench(args, device, losses, copy)
    print_table(rows, COLUMNS)
    if args.out is not None:
        fields = {"num_ranks": args.num_ranks, "kl_coef": args.kl_coef, "copy_gb_per_s": copy, "rows": rows}
        write_json(args.out, record("rank_ratio", device, **fields))


if __name__ == "__main__":
    main()
