"""Time, memory and error of the head: log-probs of given tokens from hidden states, forward and forward + backward.

  triton   rankgrpo_kernels.linear_logprob, the fused head
  torch    rankgrpo.logprob.token_logprobs, the head streamed over chunks of the vocabulary in plain PyTorch
  full     full logits: one matrix product, then float32 log-softmax and gather
  liger    Liger's chunked GRPO loss on the same hidden states and tokens (pip install liger-kernel). It computes its
           gradients in forward, so its forward is left out; its loss on top of the log-probs is small next to the head
  bare     the matrix products alone, results thrown away: logits, gradient of hidden, gradient of the weight. A ceiling

Random bfloat16 hidden states and weights (float32 on a CPU). TFLOP/s counts 2 N V D for forward and 4 N V D for
backward, that scaled by the share of tokens with a gradient; recomputed logits count for nothing. Errors are the
largest difference to float64 on 64 tokens: of a log-prob in nats, and of the gradient of hidden relative to its norm.
Memory is the peak beyond the inputs during forward + backward, gradients included; `workspace_gb` leaves out the
gradients themselves.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.logprob import token_logprobs
from rankgrpo_kernels.bench.common import (
    choose_providers,
    machine_line,
    make_parser,
    measure,
    peak_extra_bytes,
    print_table,
    record,
    write_json,
)

# Shape letters: N tokens, V vocabulary, D hidden.

EXAMPLE = """examples:
  python kernels/bench/linear_logprob.py                             Qwen2.5-0.5B's head, every provider that runs here
  python kernels/bench/linear_logprob.py --tokens 1840 --live 0.25   gradients for a quarter of the tokens
  python kernels/bench/linear_logprob.py --device cpu --tokens 64 --vocabulary 8192 --out head.json"""
PROVIDERS = ("triton", "torch", "full", "liger", "bare")
TOKENS = {"cuda": [1840, 8192, 32768], "cpu": [128]}
COLUMNS = {
    "tokens": "", "live": ".2f", "provider": "", "pass": "", "median_ms": ".3f", "tflop_per_s": ".2f",
    "over_bare": ".2f", "memory_gb": ".3f", "workspace_gb": ".3f", "logp_error": ".1e", "grad_error": ".1e",
}  # fmt: skip
FULL_LOGITS_LIMIT = 2**31  # elements: 32,768 tokens of full float32 logits and their copies fill a GPU

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Inputs:
    hidden_ND: Tensor
    weight_VD: Tensor
    ids_N: Tensor
    grad_N: Tensor
    """Upstream gradient; exactly 0 for a share 1 - live of the tokens."""


def make_inputs(num_tokens: int, num_ids: int, num_hidden: int, live: float, device: torch.device) -> Inputs:
    random = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = {"generator": random, "device": device}
    hidden_ND = torch.randn(num_tokens, num_hidden, **options)
    weight_VD = 0.05 * torch.randn(num_ids, num_hidden, **options)  # logits of standard deviation 1.5
    grad_N = torch.randn(num_tokens, **options) / num_tokens
    grad_N[torch.randperm(num_tokens, **options)[int(live * num_tokens) :]] = 0
    return Inputs(
        hidden_ND.to(dtype).requires_grad_(),
        weight_VD.to(dtype).requires_grad_(),
        torch.randint(num_ids, (num_tokens,), **options),
        grad_N,
    )


def full_logits(hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor) -> Tensor:
    logits_NV = (hidden_ND @ weight_VD.t()).float()
    return logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]


def make_heads(names: list[str]) -> dict[str, Head]:
    heads: dict[str, Head] = {"torch": token_logprobs, "full": full_logits}
    if "triton" in names:
        from rankgrpo_kernels.linear_logprob import fused_token_logprobs

        heads["triton"] = fused_token_logprobs
    return {name: heads[name] for name in names if name in heads}


def liger_pass(inputs: Inputs) -> Callable[[], object]:
    """Forward and backward of Liger's loss over lists of as many tokens as divide N, up to 256; no KL, no clipping."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    num_tokens = len(inputs.ids_N)
    length = max(size for size in range(1, 257) if num_tokens % size == 0)
    shape = (num_tokens // length, length)
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=inputs.ids_N.is_cuda, loss_type="grpo")
    ids_BT, mask_BT = inputs.ids_N.view(shape), torch.ones(shape, device=inputs.ids_N.device)
    advantage_B = inputs.grad_N.view(shape)[:, 0].sign()

    def run() -> tuple[Tensor, ...]:
        hidden_BTD = inputs.hidden_ND.view(*shape, -1)
        value, _ = loss(hidden_BTD, inputs.weight_VD, ids_BT, mask_BT, advantage_B)
        return torch.autograd.grad(value, (inputs.hidden_ND, inputs.weight_VD))

    return run


def bare_passes(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The products alone, in slices of 16,384 ids, so that one slice of logits is held; all rows, whatever is live."""
    hidden_ND, weight_VD = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    slices = weight_VD.split(16384)

    def forward() -> None:
        for slice_WD in slices:
            hidden_ND @ slice_WD.t()

    live_ND = hidden_ND[inputs.grad_N != 0]
    delta_NW = torch.randn(len(live_ND), len(slices[0]), device=hidden_ND.device).to(hidden_ND.dtype)

    def both() -> None:
        for slice_WD in slices:
            hidden_ND @ slice_WD.t()
            delta = delta_NW[:, : len(slice_WD)]
            delta @ slice_WD
            delta.t() @ live_ND

    return {"forward": forward, "both": both}


def passes_of(head: Head, inputs: Inputs) -> dict[str, Callable[[], object]]:
    def forward() -> Tensor:
        with torch.no_grad():
            return head(inputs.hidden_ND, inputs.weight_VD, inputs.ids_N)

    def both() -> tuple[Tensor, ...]:
        logp_N = head(inputs.hidden_ND, inputs.weight_VD, inputs.ids_N)
        return torch.autograd.grad(logp_N, (inputs.hidden_ND, inputs.weight_VD), inputs.grad_N)

    return {"forward": forward, "both": both}


def errors_of(head: Head, inputs: Inputs) -> dict[str, float]:
    """Errors against float64 on the first 64 tokens with a gradient."""
    rows = (inputs.grad_N != 0).nonzero()[:64, 0]
    hidden, weight = inputs.hidden_ND.detach()[rows].requires_grad_(), inputs.weight_VD.detach()
    ids, grad = inputs.ids_N[rows], torch.ones(len(rows), device=rows.device)
    logp = head(hidden, weight, ids)
    grad_hidden = torch.autograd.grad(logp, hidden, grad)[0]
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = (exact_hidden @ weight.double().t()).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    exact_grad = torch.autograd.grad(exact, exact_hidden, grad.double())[0]
    return {
        "logp_error": (logp - exact).abs().max().item(),
        "grad_error": ((grad_hidden - exact_grad).norm() / exact_grad.norm()).item(),
    }


def bench_one(num_tokens: int, live: float, names: list[str], args: argparse.Namespace, device: torch.device) -> list:
    inputs = make_inputs(num_tokens, args.vocabulary, args.hidden, live, device)
    heads = make_heads(names)
    if num_tokens * args.vocabulary > FULL_LOGITS_LIMIT and heads.pop("full", None):
        print(f"left out: full at {num_tokens} tokens (its logits and their copies would fill the memory)")
    passes = {name: passes_of(head, inputs) for name, head in heads.items()}
    if "liger" in names:
        passes["liger"] = {"both": liger_pass(inputs)}
    if "bare" in names:
        passes["bare"] = bare_passes(inputs)
    errors = {name: errors_of(head, inputs) for name, head in heads.items()}
    grad_gb = (inputs.hidden_ND.nbytes + inputs.weight_VD.nbytes) / 1e9
    flop = 2 * num_tokens * args.vocabulary * args.hidden
    rows = []
    for name, total_flop in {"forward": flop, "both": flop * (1 + 2 * live)}.items():
        runs = {provider: own[name] for provider, own in passes.items() if name in own}
        timings = measure(runs, device, budget_s=args.budget)
        for provider, timing in timings.items():
            row = {"tokens": num_tokens, "live": live, "provider": provider, "pass": name, **asdict(timing)}
            row |= {"tflop_per_s": total_flop / timing.median_ms / 1e9}
            if "bare" in timings:
                row["over_bare"] = timing.median_ms / timings["bare"].median_ms
            if name == "both" and provider != "bare":
                row["memory_gb"] = peak_extra_bytes(runs[provider], device) / 1e9
                row["workspace_gb"] = row["memory_gb"] - grad_gb
                row |= errors.get(provider, {})
            rows.append(row)
    return rows


def missing_providers(device: torch.device) -> dict[str, str]:
    missing = {}
    if device.type != "cuda":
        missing["triton"] = "it needs a GPU; the interpreter says nothing about speed"
    if importlib.util.find_spec("liger_kernel") is None:
        missing["liger"] = "liger-kernel is not installed"
    return missing


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE, PROVIDERS)
    parser.add_argument("--tokens", type=int, nargs="+", help="N (default: by device)")
    parser.add_argument("--vocabulary", type=int, default=151_936, help="V (default 151936)")
    parser.add_argument("--hidden", type=int, default=896, help="D (default 896)")
    parser.add_argument("--live", type=float, nargs="+", default=[1.0, 0.25], help="share of tokens with a gradient")
    args = parser.parse_args()
    keep_freed_memory()
    device = torch.device(args.device)
    print(machine_line(device))
    names = choose_providers(args.providers, missing_providers(device), PROVIDERS)
    rows = []
    for num_tokens in args.tokens or TOKENS[device.type]:
        for live in args.live:
            rows += bench_one(num_tokens, live, names, args, device)
    print_table(rows, COLUMNS)
    if args.out is not None:
        write_json(
            args.out, record("linear_logprob", device, vocabulary=args.vocabulary, hidden=args.hidden, rows=rows)
        )


if __name__ == "__main__":
    main()
