"""A toy list task for whole trainers: a tokenizer of a few items and line breaks, a small random model, prompts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rankgrpo.parse import parse_list

# Shape letters: K ranks.

K = 3
BYTES = ["<pad>", "<eos>", "Ċ", "x"]  # Ċ is the byte of a line break
# The last one holds two lines, so a rank is left without a token; a list that begins with <eos> has no item at all.
ITEMS = [*(f"{letter} (1990)\n" for letter in "abcdef"), "e (1990)\nf (1990)\n"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    # Byte-level, which is what AutoTokenizer makes of every tokenizer beside a Qwen2 model.
    words = Tokenizer(models.BPE({word: index for index, word in enumerate(BYTES)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_tokens([AddedToken(item, normalized=False) for item in ITEMS])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def save_model(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(BYTES) + len(ITEMS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
        initializer_range=0.15, max_position_embeddings=128,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def prompts(num: int) -> list[dict]:
    """Prompts of uneven length, and the items that are right for each."""
    wanted = [ITEMS[place % 4 : place % 4 + 2] for place in range(num)]
    return [
        {"prompt": "x" + "".join(items) * (1 + place % 3), "groundtruth": [item[0] for item in items]}
        for place, items in enumerate(wanted)
    ]


def write_prompts(path: Path, num: int) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts(num)))


def hits(completions: list[str], groundtruth: list[list[str]], **_) -> list[list[float]]:
    """1 where the k-th line names an item that is right."""
    rows = []
    for text, wanted in zip(completions, groundtruth, strict=True):
        row = [float(item.title in wanted) for item in parse_list(text)[:K]]
        rows.append(row + [0.0] * (K - len(row)))
    return rows
