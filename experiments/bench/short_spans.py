"""Shared-prefix attention in bfloat16 on a CPU, forward and backward, with its backward kernel in either type.

  float32    backward of every span in float32
  bfloat16   backward of every span in bfloat16
`chosen` is what rankgrpo.model.attention takes, by the query-key pairs of a span (SHORT_SPANS). Groups of 8 equal
lists; 4 query heads, 2 key heads, 64 channels, as in the tiny preset.
"""

from __future__ import annotations

import torch

from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.model import attention
from rankgrpo.model.packing import Group, build_pack
from rankgrpo_kernels.bench.common import make_parser, measure, print_table, record, write_json

EXAMPLE = """examples:
  python experiments/bench/short_spans.py
  python experiments/bench/short_spans.py --budget 1 --out build/bench/short_spans.json"""
SIZES = ((60, 20, 16), (90, 40, 16), (180, 80, 8), (350, 150, 4), (700, 230, 2), (2048, 230, 1))
COLUMNS = {
    "prompt": "", "list": "", "groups": "", "own_pairs": ".0f", "cross_pairs": ".0f", "float32_ms": ".2f",
    "bfloat16_ms": ".2f", "chosen_ms": ".2f", "over_chosen": ".2f",
}  # fmt: skip


def measure_size(prompt: int, length: int, num_groups: int, budget_s: float) -> dict:
    """Milliseconds with either type and with the chosen ones; `over_chosen` is bfloat16's over the last."""
    layout = build_pack([Group([1] * prompt, [[2] * length] * 8)] * num_groups).layout
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(layout.num_tokens, heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2, 4)
    )
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]

    def run_with(short_spans: float):
        def run() -> None:
            attention.SHORT_SPANS = short_spans
            out = attention.shared_prefix_attention(*inputs, layout, scale=0.125)
            torch.autograd.grad(out, inputs, grad)

        return run

    default = attention.SHORT_SPANS
    limits = {"float32": float("inf"), "bfloat16": 0, "chosen": default}
    try:
        timings = measure({name: run_with(x) for name, x in limits.items()}, torch.device("cpu"), budget_s=budget_s)
    finally:
        attention.SHORT_SPANS = default
    row = {"prompt": prompt, "list": length, "groups": num_groups}
    row |= {"own_pairs": attention.mean_pairs(layout.own), "cross_pairs": attention.mean_pairs(layout.cross)}
    row |= {f"{name}_ms": timing.median_ms for name, timing in timings.items()}
    return row | {"over_chosen": row["bfloat16_ms"] / row["chosen_ms"]}


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE, ())
    args = parser.parse_args()
    keep_freed_memory()
    if args.device != "cpu":
        parser.error("the choice exists on a CPU only: --device cpu")
    rows = [measure_size(*size, args.budget) for size in SIZES]
    print_table(rows, COLUMNS)
    if args.out is not None:
        limit = attention.SHORT_SPANS
        write_json(args.out, record("short_spans", torch.device("cpu"), short_spans=limit, results=rows))


if __name__ == "__main__":
    main()
