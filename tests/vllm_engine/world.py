"""Models, prompts and engines small enough for a CPU."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankgrpo.data.demo import make_demo
from rankgrpo.model.constraint import Constraint
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.tiny import train_tokenizer
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler

ALONE = Parallel(0, 1, torch.device("cpu"))
MAX_TOKENS, MAX_PROMPT = 160, 48


def make_model(*, tied: bool, more_rows: int = 0):
    """A random two-layer model whose heads share keys, and the demo's tokenizer."""
    tokenizer = train_tokenizer(make_demo(num_train=48, num_validation=8, num_test=8, seed=0), 1024)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + more_rows,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=0.125,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model, tokenizer


def prompts_of(tokenizer) -> list[list[int]]:
    """Three prompts of unlike length."""
    texts = ("Something like Heat (1995)?", "I loved Alien (1979) and Stalker (1979). " * 3, "A comedy, please. " * 6)
    return [tokenizer(text)["input_ids"] for text in texts]


def engine(
    model, tokenizer, *, dtype: torch.dtype = torch.float32, rows: int = 16, constraint: Constraint | None = None
) -> VLLMSampler:
    """An engine that has not been filled yet."""
    max_tokens = MAX_TOKENS if constraint is None else MAX_PROMPT + constraint.max_tokens
    config = EngineConfig(max_tokens=max_tokens, rows=rows, dtype=dtype)
    allowed_V = valid_token_mask(model, tokenizer)
    return VLLMSampler(model, tokenizer, config, ALONE, allowed_V=allowed_V, constraint=constraint)
