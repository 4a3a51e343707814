"""Time of turning token ids into ranks: RankSegmenter against a loop that decodes one token at a time.

Both label the same well-formed lists and must agree on every token before anything is timed. The loop is the released
Rank-GRPO code's way (two host reads and one decode a token, ranks by counting line breaks). A byte-level BPE is trained
in the process, so nothing is downloaded; building the segmenter's table is timed apart, because it happens once a run.
Not measured: parsing of the text, sampling.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.parse import RankSegmenter
from rankgrpo_kernels.bench.common import machine_line, make_parser, measure, print_table, record, write_json

# Shape letters: B lists, T tokens.

EXAMPLE = "example: python kernels/bench/segmentation.py --lists 96 --tokens 512 --out segmentation.json"
COLUMNS = {"provider": "", "median_ms": ".3f", "low_ms": ".3f", "high_ms": ".3f", "runs": "d", "ratio": ".0f"}

EOS = "<|im_end|>"
# Qwen's: it merges a bracket with the line break after it, the case in which counting line breaks still works.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = (
    "Night City Last Summer Silence Lambs Stalker Heat Paris Texas Return King Shadow Mirror River Winter Ghost Dog "
    "Blade Runner Lost Translation Garden State Mulholland Drive Vertigo Apartment Seventh Seal Persona Amélie Ran"
).split()


def random_line(rng: random.Random) -> str:
    title = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
    return f"{title} ({rng.randint(1930, 2024)})"


def train_tokenizer(rng: random.Random, vocab_size: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = ("\n".join(random_line(rng) for _ in range(20)) for _ in range(500))
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token="<|endoftext|>")


def make_lists(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, num_lists: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, T): lists of whole lines and EOS that fill their row up to one line, padded on the right."""
    token_ids_BT = torch.full((num_lists, num_tokens), tokenizer.pad_token_id)
    mask_BT = torch.zeros(num_lists, num_tokens, dtype=torch.bool)
    for b in range(num_lists):
        text, ids = random_line(rng), []
        while len(longer := tokenizer.encode(text, add_special_tokens=False)) < num_tokens:
            ids = longer
            text += "\n" + random_line(rng)
        ids = [*ids, tokenizer.eos_token_id]
        token_ids_BT[b, : len(ids)] = torch.tensor(ids)
        mask_BT[b, : len(ids)] = True
    return token_ids_BT, mask_BT


def loop_ranks(tokenizer: PreTrainedTokenizerFast, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Rank = line breaks in the tokens before, each token read back and decoded alone."""
    rank_BT = torch.full_like(token_ids_BT, -1)
    for b in range(token_ids_BT.shape[0]):
        line = 0
        for t in range(token_ids_BT.shape[1]):
            if mask_BT[b, t].item():
                rank_BT[b, t] = line
                line += tokenizer.decode([token_ids_BT[b, t].item()]).count("\n")
    return rank_BT


def bench(args, device: torch.device) -> dict:
    rng = random.Random(args.seed)
    tokenizer = train_tokenizer(rng, args.vocab_size)
    token_ids_BT, mask_BT = (x.to(device) for x in make_lists(tokenizer, rng, args.lists, args.tokens))
    start = time.perf_counter()
    segmenter = RankSegmenter(tokenizer)
    build_s = time.perf_counter() - start

    expected_BT = loop_ranks(tokenizer, token_ids_BT, mask_BT)
    num_wrong = int((segmenter(token_ids_BT, mask_BT) != expected_BT).sum())
    if num_wrong:
        raise AssertionError(f"{num_wrong} of {int(mask_BT.sum())} tokens have another rank than the loop gives them")

    runs = {
        "segmenter": lambda: segmenter(token_ids_BT, mask_BT),
        "loop": lambda: loop_ranks(tokenizer, token_ids_BT, mask_BT),
    }
    timings = measure(runs, device, budget_s=args.budget)
    fastest = timings["segmenter"].median_ms
    rows = [{"provider": name, **asdict(t), "ratio": t.median_ms / fastest} for name, t in timings.items()]
    shape = {"lists": args.lists, "tokens": args.tokens, "vocabulary": len(tokenizer)}
    return {"shape": shape, "tokens_in_lists": int(mask_BT.sum()), "build_s": build_s, "rows": rows}


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE, ())
    parser.add_argument("--lists", type=int, default=96, help="lists in the batch (default 96)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a row (default 512)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="at most, of the BPE trained here (default 4096)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the loop uses one anyway (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of titles and years (default 0)")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(machine_line(device))
    result = bench(args, device)
    shape = result["shape"]
    print(
        f"{shape['lists']} x {shape['tokens']} ids ({result['tokens_in_lists']} in lists), vocabulary "
        f"{shape['vocabulary']}, table built once in {result['build_s']:.3f} s; ranks equal on every token"
    )
    print_table(result["rows"], COLUMNS)
    if args.out is not None:
        write_json(args.out, record("segmentation", device, **result))


if __name__ == "__main__":
    main()
