"""The catalog's trie at 6,302, 100,000 and 1,000,000 lines: build time, memory, and what a token costs.

The lines are made, the same on every machine: titles of one to five words, drawn by a Zipf law from common words of
titles and 20,000 names (syllables put together), some with a number or a subtitle, and a year. Every size is built in a
process of its own, so that its peak is its own. Build times are wall and CPU time, those of tokens CPU time of one
thread.

  python experiments/bench/trie_scale.py --tokenizer Qwen2.5-0.5B --out scale.json
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import threading
import time
from pathlib import Path
from statistics import median

import numpy as np

from rankgrpo.items.trie import CatalogTrie

COMMON = """the of and in a to love man night day girl last house life black dark dead good great world war king time
big little city death blood red white american home heart secret road city lost men story boys wild dream queen star
women fire river summer blue ghost island first christmas murder street return game shadow beyond evil moon golden
family mother father young old new angel devil train sea song sky winter road children friend party wedding school
hotel state summer garden mountain bridge stranger doctor captain soldier hunter killer witness escape revenge justice
honor glory paradise heaven hell storm rain wind sun light mirror window door room paper letter silence voice face
hand eye body soul mind""".split()
SYLLABLES = [c + v for c in "b c d f g h k l m n p r s t v w st br th ch".split() for v in "a e i o u ai en or".split()]


def make_lines(num_lines: int) -> list[str]:
    """Distinct lines `Title (Year)`; the first n of a larger catalog are those of a smaller one."""
    random = np.random.default_rng(0)
    words = list(dict.fromkeys(word.capitalize() for word in COMMON))
    for size in random.integers(1, 4, 20_000):
        words.append("".join(SYLLABLES[i] for i in random.integers(len(SYLLABLES), size=size)).capitalize())
    share = 1 / np.arange(20, len(words) + 20) ** 1.5
    cumulative = np.cumsum(share / share.sum())
    lines: dict[str, None] = {}
    while len(lines) < num_lines:
        draws = np.searchsorted(cumulative, random.random((100_000, 6)))
        sizes, kinds = random.integers(1, 6, 100_000).tolist(), random.random(100_000).tolist()
        years = random.integers(1920, 2026, 100_000).tolist()
        for draw, size, kind, year in zip(draws.tolist(), sizes, kinds, years, strict=True):
            title = " ".join([words[i] for i in draw[:size]])
            if kind < 0.1:
                title += f" {2 + int(kind * 80)}"
            elif kind < 0.2:
                title += ": " + words[draw[-1]]
            lines.setdefault(f"{title} ({year})")
    return list(lines)[:num_lines]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class PeakResident:
    """The most memory this process held while it was watched."""

    def __enter__(self):
        self.peak, self._stop = resident_mb(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.peak = max(self.peak, resident_mb())

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def measure(num_lines: int, tokenizer_name: str, num_ranks: int) -> dict:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    lines = make_lines(num_lines)
    gc.collect()
    before = resident_mb()
    began = time.process_time()
    with PeakResident() as memory:
        trie = CatalogTrie.build(lines, tokenizer, num_ranks=num_ranks, eos_id=tokenizer.eos_token_id)
    cpu_s = time.process_time() - began
    random = np.random.default_rng(1)
    lists = [trie.list_ids(random.choice(num_lines, num_ranks, replace=False).tolist()) for _ in range(128)]
    stats = trie.describe()
    num_tokens = sum(map(len, lists))
    return {
        "lines": num_lines, "build_s": stats["seconds"], "build_cpu_s": cpu_s,
        "peak_mb": memory.peak - before, "process_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "trie_mb": trie.num_bytes / 1e6, "nodes": stats["nodes"], "root": stats["places"]["middle"]["root"],
        "tokens_a_line": stats["tokens_a_line"], "forced": stats["forced"],
        "choices_a_token": float(trie.choices(lists).is_choice.mean()),
    } | token_costs(trie, lists, num_tokens)  # fmt: skip


def token_costs(trie: CatalogTrie, lists: list[list[int]], num_tokens: int) -> dict[str, float]:
    """Microseconds of reading lists, by token and by choice; of a step of a walk; of a list of a batch below and at the
    root."""

    def cost(run, count: int) -> float:
        times = []
        for _ in range(7):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
        return 1e6 * median(times) / count

    def walk_all() -> None:
        for ids in lists:
            walk = trie.start()
            for token_id in ids:
                walk.advance(token_id)

    below = []
    for ids in lists:
        walk = trie.start()
        for token_id in ids[: len(ids) // 2]:
            walk.advance(token_id)
        while walk.at_line_start or len(walk.allowed()) == 1:
            if walk.at_line_start:
                walk.advance(ids[len(ids) // 2 + 1] if ids[len(ids) // 2 + 1] in walk.allowed() else walk.allowed()[0])
            else:
                walk.advance(walk.allowed()[0])
            if walk.done:
                break
        if not walk.done:
            below.append(walk)
    roots = [trie.start() for _ in lists]
    num_choices = len(trie.choices(lists).token_C)
    return {
        "choice_us": cost(lambda: trie.choices(lists), num_choices),
        "choices_us": cost(lambda: trie.choices(lists), num_tokens),
        "advance_us": cost(walk_all, num_tokens),
        "batch_below_us": cost(lambda: trie.allowed_batch(below), max(1, len(below))),
        "batch_root_us": cost(lambda: trie.allowed_batch(roots), len(roots)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a Hugging Face folder or name")
    parser.add_argument("--lines", type=int, nargs="+", default=[6_302, 100_000, 1_000_000], help="sizes of catalogs")
    parser.add_argument("--ranks", type=int, default=20, help="lines of a list (default 20)")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    args = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    for num_lines in args.lines:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (num_lines, args.tokenizer, args.ranks)))
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"tokenizer": Path(args.tokenizer).name, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
