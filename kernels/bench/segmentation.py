"""Time of turning token ids into ranks: RankSegmenter against a loop that decodes one token at a time.

Both label the same well-formed lists and must agree on every token before anything is timed. The loop is the released
Rank-GRPO code's way (two host reads and one decode a token, ranks by counting line breaks). A byte-level BPE is trained
in the process, so nothing is downloaded; building the segmenter's table is timed apart, because it happens once a run.
Not measured: parsing of the text, sampling.
"""

import argparse
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rankgrpo.parse import RankSegmenter

# Shape letters: B = lists, T = tokens.

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


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats + 1):  # the first is a warm-up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(num_lists: int, num_tokens: int, vocab_size: int, device: torch.device, repeats: int, seed: int) -> dict:
    rng = random.Random(seed)
    tokenizer = train_tokenizer(rng, vocab_size)
    token_ids_BT, mask_BT = (x.to(device) for x in make_lists(tokenizer, rng, num_lists, num_tokens))
    build_start = time.perf_counter()
    segmenter = RankSegmenter(tokenizer)
    build_s = time.perf_counter() - build_start

    expected_BT = loop_ranks(tokenizer, token_ids_BT, mask_BT)
    num_wrong = int((segmenter(token_ids_BT, mask_BT) != expected_BT).sum())
    if num_wrong:
        raise AssertionError(f"{num_wrong} of {int(mask_BT.sum())} tokens have another rank than the loop gives them")

    loop_s = seconds_of(lambda: loop_ranks(tokenizer, token_ids_BT, mask_BT), device, max(3, repeats // 10))
    table_s = seconds_of(lambda: segmenter(token_ids_BT, mask_BT), device, repeats)
    return {
        "op": "segmentation",
        "shape": {"lists": num_lists, "tokens": num_tokens, "vocabulary": len(tokenizer)},
        "tokens_in_lists": int(mask_BT.sum()),
        "ranks_max": int(expected_BT.max()) + 1,
        "build_s": build_s,
        "loop": {"median_s": statistics.median(loop_s), "min_s": min(loop_s), "repeats": len(loop_s)},
        "table": {"median_s": statistics.median(table_s), "min_s": min(table_s), "repeats": len(table_s)},
        "ratio": statistics.median(loop_s) / statistics.median(table_s),
        "agree": True,
    }


def machine_line(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = names[0] if names else platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {platform.system()}"


def git_commit() -> str | None:
    """The commit the script lies in; None outside a repository or without git."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def print_table(result: dict) -> None:
    print(result["machine"])
    shape = result["shape"]
    print(
        f"{shape['lists']} x {shape['tokens']} ids ({result['tokens_in_lists']} in lists of up to "
        f"{result['ranks_max']} lines), vocabulary {shape['vocabulary']}, table built in {result['build_s']:.3f} s"
    )
    print(f"{'':24} {'median ms':>12} {'min ms':>12} {'repeats':>8}")
    for name, label in (("loop", "decode one token, .item()"), ("table", "RankSegmenter")):
        row = result[name]
        print(f"{label:25} {row['median_s'] * 1e3:11.3f} {row['min_s'] * 1e3:12.3f} {row['repeats']:8d}")
    print(f"ratio of medians: {result['ratio']:.0f}x, ranks equal on every token")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python kernels/bench/segmentation.py --lists 96 --tokens 512 --out segmentation.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--lists", type=int, default=96, help="lists in the batch (default 96)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a row (default 512)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="at most, of the BPE trained here (default 4096)")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls; the loop runs a tenth (default 50)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; the loop uses one anyway (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of titles and years (default 0)")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    result = measure(args.lists, args.tokens, args.vocab_size, device, args.repeats, args.seed)
    result["machine"] = machine_line(device)
    result["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    result["commit"] = git_commit()
    print_table(result)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
