"""Time and memory of the head over allowed ids against the streamed head, forward + backward, on lists of the catalog.

  full      rankgrpo.logprob.token_logprobs over the whole vocabulary
  new       rankgrpo.model.allowed.allowed_logprobs, the weight's gradient made anew
  existing  the same, added into a gradient that exists, as tied embeddings and accumulation do
  plan      what the other two are given: reading the lists in the trie and laying out the plan

The lists are of catalog lines drawn by popularity, at every position the catalog's trie allows. Random float32 hidden
states and weights (bfloat16 on a GPU). On a CPU times are CPU seconds of one thread, of all providers in turn in one
process; on a GPU wall time of synchronised calls. Memory is the peak during forward + backward beyond the inputs and
the gradients of hidden and weight. Errors are the largest difference to a softmax over the masked vocabulary on 64
tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from torch import Tensor

from rankgrpo.data.load import load_dataset
from rankgrpo.items.allowed_ids import AllowedIds
from rankgrpo.items.trie import CatalogTrie
from rankgrpo.logprob import token_logprobs
from rankgrpo.model.allowed import allowed_logprobs
from rankgrpo.model.presets import open_tokenizer
from rankgrpo_kernels.bench.common import (
    choose_providers,
    machine_line,
    make_parser,
    peak_extra_bytes,
    print_table,
    record,
    write_json,
)

# Shape letters: N tokens, V vocabulary, D hidden.

EXAMPLE = """examples:
  python kernels/bench/allowed_logprob.py --data data/redial --tokenizer Qwen2.5-0.5B            151,936 x 896
  python kernels/bench/allowed_logprob.py --data data/redial --tokenizer Llama-3.2-1B --vocabulary 128256 --hidden 2048
  python kernels/bench/allowed_logprob.py --data data/redial --tokenizer tiny --hidden 256       the tiny preset's"""
PROVIDERS = ("full", "new", "existing", "plan")
COLUMNS = {
    "provider": "", "forward_s": ".4f", "backward_s": ".4f", "sum_s": ".4f", "low_s": ".4f", "runs": "d",
    "ratio": ".1f", "ratio_of_minima": ".1f", "workspace_mb": ".1f", "logp_error": ".1e", "grad_error": ".1e",
}  # fmt: skip


def popular_lists(trie: CatalogTrie, popularity: np.ndarray, num_tokens: int, num_ranks: int) -> list[list[int]]:
    """Lists of distinct items drawn by popularity, of about so many tokens together."""
    random = np.random.default_rng(0)
    share = (popularity + 0.1) / (popularity + 0.1).sum()
    lists: list[list[int]] = []
    while sum(map(len, lists)) < num_tokens:
        items = random.choice(len(popularity), num_ranks, replace=False, p=share)
        lists.append(trie.list_ids(items.tolist()))
    # The last list is cut, so that all sizes compare at the same number of tokens.
    lists[-1] = lists[-1][: len(lists[-1]) - (sum(map(len, lists)) - num_tokens)]
    return lists


def timed_pass(head: Callable[[], Tensor], grad_N: Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    began = clock()
    logp_N = head()
    between = clock()
    logp_N.backward(grad_N)
    return between - began, clock() - between


def errors_of(hidden_ND: Tensor, weight_VD: Tensor, trie: CatalogTrie, ids: list[int]) -> dict[str, float]:
    """Errors against float64 logits of the whole vocabulary, masked, on one list's first 64 tokens."""
    walk = trie.start()
    ids = ids[:64]
    mask_NV = torch.zeros(len(ids), len(weight_VD), dtype=torch.bool)
    for n, token_id in enumerate(ids):
        mask_NV[n, torch.from_numpy(walk.allowed()).long()] = True
        walk.advance(token_id)
    mask_NV, plan = mask_NV.to(weight_VD.device), trie.choices([ids]).for_head().to(weight_VD.device)
    hidden = hidden_ND.detach()[: len(ids)].requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    logp_N = allowed_logprobs(hidden, weight_VD.detach(), plan)
    logits_NV = (exact @ weight_VD.detach().double().t()).masked_fill(~mask_NV, -torch.inf)
    wanted_N = logits_NV.log_softmax(-1).gather(1, torch.tensor(ids, device=mask_NV.device)[:, None])[:, 0]
    grad, wanted = torch.autograd.grad(logp_N.sum(), hidden)[0], torch.autograd.grad(wanted_N.sum(), exact)[0]
    return {
        "logp_error": (logp_N - wanted_N).abs().max().item(),
        "grad_error": ((grad - wanted).norm() / wanted.norm()).item(),
    }


def workspace_mb(run: Callable[[], Tensor], leaves: list[Tensor], grad_N: Tensor, device: torch.device) -> float:
    """Peak memory in MB beyond the inputs and the gradients that are made; leaves that have a gradient keep it."""
    before = [leaf.grad for leaf in leaves]

    def both() -> None:
        run().backward(grad_N)
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad  # given back in here: the profiler would count a later release against the next run

    made = sum(leaf.nbytes for leaf in leaves if leaf.grad is None)
    return (peak_extra_bytes(both, device) - made) / 1e6


def bench(
    names: list[str], trie: CatalogTrie, lists: list[list[int]], size: tuple[int, int], device: torch.device, budget_s
) -> list[dict]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    random = torch.Generator(device).manual_seed(0)
    options = {"generator": random, "device": device}
    ids_N = torch.tensor([i for ids in lists for i in ids], device=device)
    hidden_ND = torch.randn(len(ids_N), size[1], **options).to(dtype).requires_grad_()
    weight_VD = torch.nn.Parameter((0.05 * torch.randn(*size, **options)).to(dtype))
    grad_N = torch.randn(len(ids_N), **options) / len(ids_N)
    plan: AllowedIds = trie.choices(lists).for_head().to(device)
    heads = {
        "full": lambda: token_logprobs(hidden_ND, weight_VD, ids_N),
        "new": lambda: allowed_logprobs(hidden_ND, weight_VD, plan),
        "existing": lambda: allowed_logprobs(hidden_ND, weight_VD, plan),
    }

    def clock() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    def one(name: str) -> tuple[float, float]:
        if name == "plan":
            began = clock()
            trie.choices(lists).for_head().to(device)
            return clock() - began, 0.0
        hidden_ND.grad = None
        if name == "existing":
            weight_VD.grad = existing
            return timed_pass(heads[name], grad_N, clock)
        weight_VD.grad = None
        return timed_pass(heads[name], grad_N, clock)

    existing = torch.zeros_like(weight_VD)
    one("existing")
    num_runs = {}
    for name in names:
        seconds = sum(one(name))
        num_runs[name] = min(100, max(1 if seconds > budget_s else 3, int(budget_s / max(seconds, 1e-4))))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(max(num_runs.values())):
        for name in names:
            if turn < num_runs[name]:
                times[name].append(one(name))
    rows = []
    for name in names:
        sums = [sum(pair) for pair in times[name]]
        forward, backward = (median(part) for part in zip(*times[name], strict=True))
        row = {"provider": name, "forward_s": forward, "backward_s": backward, "sum_s": median(sums)}
        row |= {"low_s": min(sums), "high_s": quantiles(sums, n=5)[3] if len(sums) > 1 else sums[0], "runs": len(sums)}
        if "full" in names and name in ("new", "existing"):
            full = [sum(pair) for pair in times["full"]]
            row |= {"ratio": median(full) / median(sums), "ratio_of_minima": min(full) / min(sums)}
        if name in ("new", "existing"):
            hidden_ND.grad, weight_VD.grad = None, existing if name == "existing" else None
            row["workspace_mb"] = workspace_mb(heads[name], [hidden_ND, weight_VD], grad_N, device)
            row |= errors_of(hidden_ND, weight_VD, trie, lists[0])
        rows.append(row)
    return rows


def main() -> None:
    parser = make_parser(__doc__, EXAMPLE, PROVIDERS)
    parser.add_argument("--data", default="demo", help="a data set folder (default: demo)")
    parser.add_argument("--tokenizer", default="tiny", help="folder or hub name (default: tiny, made of the data)")
    parser.add_argument("--vocabulary", type=int, help="V (default 151936, for tiny the tokenizer's)")
    parser.add_argument("--hidden", type=int, default=896, help="D (default 896)")
    parser.add_argument("--tokens", type=int, default=1840, help="N (default 1840: ten lists of 20 films)")
    parser.add_argument("--ranks", type=int, default=20, help="lines of a list (default 20)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    print(machine_line(device))
    dataset = load_dataset(args.data)
    tokenizer = open_tokenizer(args.tokenizer, dataset)
    items = dataset.catalog.items
    lines = [f"{item.title} ({item.year})" for item in items]
    trie = CatalogTrie.build(lines, tokenizer, num_ranks=args.ranks, eos_id=tokenizer.eos_token_id)
    lists = popular_lists(trie, np.array([item.popularity for item in items]), args.tokens, args.ranks)
    choices = trie.choices(lists)
    counts = {
        "tokens": choices.num_tokens,
        "choices": len(choices.token_C),
        "at_root": int(choices.at_root_C.sum()),
        "allowed_mean": float(choices.num_allowed.mean()),
        "nodes": trie.num_nodes,
    }
    vocabulary = args.vocabulary or (len(tokenizer) if args.tokenizer == "tiny" else 151_936)
    print(f"{vocabulary} x {args.hidden}, {counts}")
    names = choose_providers(args.providers, {}, PROVIDERS)
    rows = bench(names, trie, lists, (vocabulary, args.hidden), device, args.budget)
    print_table(rows, COLUMNS)
    if args.out is not None:
        head = {"tokenizer": Path(args.tokenizer).name, "vocabulary": vocabulary, "hidden": args.hidden, **counts}
        write_json(args.out, record("allowed_logprob", device, **head, rows=rows))


if __name__ == "__main__":
    main()
