"""Seconds of a weight sync to vLLM, and of its sleep and wake: 0.5B parameters on a GPU, a tiny model on a CPU.

    python experiments/bench/sync.py --out build/bench/sync.json

`sync` is what a training step pays after its update: every tensor streamed, the prefix cache dropped, all tensors
fingerprinted on both sides and compared; `load` is the streaming alone. Medians over the trials, after one to warm up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankgrpo.data.demo import make_demo
from rankgrpo.model.presets import count_parameters
from rankgrpo.model.tiny import train_tokenizer
from rankgrpo.pipeline import describe_machine
from rankgrpo.runtime.distributed import full_parameters, start_parallel
from rankgrpo.sampler.sync import different_tensors, sync_weights
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler

SIZES = {
    # hidden, layers, feed-forward, heads, key-value heads, vocabulary
    "tiny": (256, 4, 512, 4, 2, 8192),
    "0.5b": (896, 24, 4864, 14, 2, 151_936),  # Qwen2.5-0.5B
}


def make_model(size: str, eos_token_id: int, device: torch.device) -> Qwen2ForCausalLM:
    hidden, layers, ffn, heads, kv_heads, vocab = SIZES[size]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
    with device:
        return Qwen2ForCausalLM(config)


def seconds(work: Callable[[], object], trials: int) -> dict[str, float]:
    """Median and fastest of `trials` runs; one before them is not counted."""
    taken = []
    for _ in range(trials + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return {"median_s": statistics.median(taken[1:]), "fastest_s": min(taken[1:])}


def measure(size: str, trials: int) -> dict:
    parallel = start_parallel()
    on_gpu = parallel.device.type == "cuda"
    tokenizer = train_tokenizer(make_demo(50, 1, 1), 1024)
    model = make_model(size, tokenizer.eos_token_id, parallel.device)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    engine = EngineConfig(max_tokens=512, rows=16, dtype=dtype)
    allowed_V = torch.ones(model.config.vocab_size, dtype=torch.bool, device=parallel.device)
    sampler = VLLMSampler(model, tokenizer, engine, parallel, allowed_V=allowed_V)
    rows = {
        "sync": seconds(lambda: sync_weights(sampler, model), trials),
        "load": seconds(lambda: sampler.load_weights(full_parameters(model, dtype)), trials),
    }
    for level in (1, 2):

        def sleep_and_wake(level: int = level) -> None:
            sampler.config = replace(engine, sleep_level=level)
            sampler.sleep()
            sampler.wake()

        rows[f"sleep {level} + wake"] = seconds(sleep_and_wake, trials)
        sync_weights(sampler, model)
    assert different_tensors(sampler, model) == []
    notes = [] if on_gpu else ["vLLM's engine does not sleep on a CPU: those seconds mean nothing"]
    return {
        "size": size,
        "parameters": count_parameters(model),
        "dtype": str(dtype),
        "trials": trials,
        "rows": rows,
        "notes": notes,
        "machine": describe_machine() | {"command": " ".join(["experiments/bench/sync.py", *sys.argv[1:]])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), help="default: 0.5b on a GPU, tiny without one")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args()
    result = measure(args.size or ("0.5b" if torch.cuda.is_available() else "tiny"), args.trials)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
