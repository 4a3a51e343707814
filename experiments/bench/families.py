"""The update of models that are not plain transformers, with a shared prefix and without: forward and backward.

  shared   packs: each prompt once, its recurrent state or its keys read by all lists
  dense    the model's own forward over rows [prompt ; list], the lists of a group as one batch

Both stream the same head and give the same log-probs (the largest difference is printed). Random weights; shapes:

  qwen3_5  three gated delta rules to an attention, as in Qwen3.5
  lfm2     two short convolutions to an attention, as in LFM2
  bamba    three Mamba-2 layers to an attention, as in Bamba
  gemma3   five windows of 512 tokens to a full attention, as in Gemma 3

`bound` is the ratio of tokens, which a model reaches that computes nothing across tokens.
"""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.forward import pack_logprobs, row_logprobs
from rankgrpo.model.head import find_logit_map
from rankgrpo.model.packing import Group, build_pack
from rankgrpo_kernels.bench.common import make_parser, measure, print_table, record, write_json

EXAMPLE = """examples:
  OMP_NUM_THREADS=1 python experiments/bench/families.py
  python experiments/bench/families.py --model qwen3_5 --prompt 300 --budget 1 --out build/bench/families.json"""
BODY = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
}
MODELS = {
    "qwen3_5": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 8, "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
            "linear_key_head_dim": 64, "linear_value_head_dim": 64,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        },
    ),
    "lfm2": ("lfm2", {"num_hidden_layers": 6, "layer_types": (["conv"] * 2 + ["full_attention"]) * 2}),
    "bamba": (
        "bamba",
        {
            "num_hidden_layers": 8, "attn_layer_indices": [3, 7], "mamba_n_heads": 8, "mamba_d_head": 64,
            "mamba_d_state": 64, "mamba_expand": 2, "mamba_n_groups": 1,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 6, "head_dim": 64, "sliding_window": 512,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
}  # fmt: skip
COLUMNS = {
    "model": "", "prompt": "", "list": "", "shared_ms": ".0f", "dense_ms": ".0f", "ratio": ".2f", "bound": ".2f",
    "difference": ".1e",
}  # fmt: skip


def make_model(name: str, *, packed: bool) -> PreTrainedModel:
    kind, sizes = MODELS[name]
    config = AutoConfig.for_model(kind, **BODY, **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    if packed:
        use_shared_prefix(model)
    return model


def measure_model(name: str, prompt: int, length: int, group_size: int, budget_s: float) -> dict:
    """Milliseconds of forward and backward over one group, and how far the two paths' log-probs are apart."""
    generator = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(2, BODY["vocab_size"], (size,), generator=generator).tolist()
        for size in [prompt] + [length] * group_size
    ]
    groups = [Group(ids[0], ids[1:])]
    pack = build_pack(groups)
    models = {"shared": make_model(name, packed=True), "dense": make_model(name, packed=False)}
    logit_map = find_logit_map(models["dense"])

    def logprobs(way: str) -> torch.Tensor:
        if way == "shared":
            return pack_logprobs(models[way], pack, logit_map=logit_map)
        return row_logprobs(models[way], pack, groups, logit_map=logit_map)

    def run_of(way: str):
        def run() -> None:
            models[way].zero_grad()
            logprobs(way).sum().backward()

        return run

    with torch.no_grad():
        difference = float((logprobs("shared") - logprobs("dense")).abs().max())
    timings = measure({way: run_of(way) for way in models}, torch.device("cpu"), budget_s=budget_s)
    row = {"model": name, "prompt": prompt, "list": length, "difference": difference}
    row |= {f"{way}_ms": timing.median_ms for way, timing in timings.items()}
    return row | {"ratio": row["dense_ms"] / row["shared_ms"], "bound": pack.tokens_dense / pack.tokens_shared}


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE, ())
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--prompt", type=int, default=700, help="tokens of the prompt (default 700)")
    parser.add_argument("--list", type=int, default=230, dest="length", help="tokens of a list (default 230)")
    parser.add_argument("--group-size", type=int, default=8, help="lists of the prompt, G (default 8)")
    args = parser.parse_args()
    keep_freed_memory()
    if args.device != "cpu":
        parser.error("these models are measured on a CPU: --device cpu")
    rows = [measure_model(name, args.prompt, args.length, args.group_size, args.budget) for name in args.model]
    print_table(rows, COLUMNS)
    if args.out is not None:
        write_json(args.out, record("families", torch.device("cpu"), group_size=args.group_size, results=rows))


if __name__ == "__main__":
    main()
