"""Seconds that `model.verify` costs when a model is opened, of the wall's clock and of the processor.

Random float32 weights in the shape of the tiny preset and of Qwen2.5-0.5B, trained, with transformers' sampler.
"""

from __future__ import annotations

import resource
import time

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankgrpo.config_file import load_config, preset_file
from rankgrpo.data.demo import make_demo
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.head import find_logit_map, valid_token_mask
from rankgrpo.model.policy import Paths, Policy
from rankgrpo.model.tiny import train_tokenizer
from rankgrpo.sampler.verify import verify_policy
from rankgrpo.sizing.architecture import find_architecture
from rankgrpo_kernels.bench.common import make_parser, print_table, record, write_json

EXAMPLE = """examples:
  OMP_NUM_THREADS=1 python experiments/bench/verify.py
  OMP_NUM_THREADS=1 python experiments/bench/verify.py --model tiny --out build/bench/verify.json"""
SHAPES = ("tiny", "qwen2.5-0.5b")
COLUMNS = {"model": "", "million": ".1f", "cpu_s": ".1f", "wall_s": ".1f", "peak_mib": ".0f", "paths": ""}


def measure_guard(name: str) -> dict:
    """Seconds of one `verify_policy`, float32, no autocast, of a policy that is trained."""
    config = load_config(preset_file(name), ["rl.sampler=hf", "model.autocast=none"], model__name=name)
    arch = find_architecture(name, config.model)
    tokenizer = train_tokenizer(make_demo(300), 2048)
    settings = Qwen2Config(
        vocab_size=arch.vocab,
        hidden_size=arch.hidden,
        intermediate_size=arch.ffn,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        num_key_value_heads=arch.kv_heads,
        tie_word_embeddings=arch.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(settings).train()
    paths = Paths(logit_map=find_logit_map(model))
    use_shared_prefix(model)
    policy = Policy(model, tokenizer, valid_token_mask(model, tokenizer), bfloat16=False, paths=paths)
    cpu, wall = time.process_time(), time.perf_counter()
    found = verify_policy(policy, config).paths
    return {
        "model": name,
        "million": arch.num_parameters / 1e6,
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "paths": f"{found.packing}, {found.decoding}",
    }


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE, ())
    parser.add_argument("--model", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("the guard is measured on a CPU: --device cpu")
    rows = [measure_guard(name) for name in args.model]
    print_table(rows, COLUMNS)
    if args.out is not None:
        write_json(args.out, record("verify", torch.device("cpu"), results=rows))


if __name__ == "__main__":
    main()
