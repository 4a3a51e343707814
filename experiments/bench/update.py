"""Update-step benchmark: forward and backward of policy log-probabilities, shared prefix against dense and TRL.

Providers, all on the same weights, rollouts and weighted-sum loss:
  shared        packs of whole groups, each prompt once (the trainer's path)
  dense_packed  every list with its own copy of the prompt, sequences end to end without padding, same streamed head
  dense_rows    the same as a batch of equal-length rows through PyTorch SDPA, causal and unmasked, same streamed head;
                only where the lists of a group have one length
  dense_model   dense_rows through the model's ordinary head: full logits of every position
  dense_padded  prompts left-padded and lists right-padded to the longest of a micro-batch of shuffled rows, padding
                mask, full logits of the completion positions
  trl           GRPOTrainer.compute_loss and backward, rows padded to the longest of the batch as the trainer does it.
                Its head is tiled and sends only the lists' tokens through the vocabulary where Triton runs, on a GPU;
                elsewhere every position goes through it, prompts and padding too
  trl_head      the same with its head as on a GPU: the lists' tokens alone, wherever it runs
  trl_trimmed   trl_head with rows of like length together, padded to the longest of the micro-batch, as it does not
  held          shared with the head over the ids that a catalog allows at every token; only with --held
With --held the lists are of a catalog's lines, at most 230 tokens each, and the others read the same lists over the
whole vocabulary: prompts, lists and tokens are equal, the task is not, so held's gradient is another one.
TRL's run once at every micro-batch size of --trl-rows, and the fastest size is measured (trl@2: two rows). They need
the extra [bench].

Providers take turns, so a machine that slows down slows all of them. Times are the best and the median of the trials,
and the least processor time, which a busy machine distorts less; ratios are of the best. Memory is the peak of what
PyTorch allocated during one step beyond parameters and gradients (profiler, in a run of its own). That all providers
compute the same gradients is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankgrpo.files.malloc import keep_freed_memory
from rankgrpo.items.trie import CatalogTrie
from rankgrpo.logprob import token_logprobs
from rankgrpo.model.attention import ordinary_attention, use_shared_prefix
from rankgrpo.model.forward import pack_logprobs
from rankgrpo.model.packing import Group, build_pack, plan_micro_batches
from rankgrpo_kernels.bench.common import peak_extra_bytes, print_table, record, write_json

EXAMPLE = """examples:
  python experiments/bench/update.py --case p300 p700 p2048 mix
  python experiments/bench/update.py --shape tiny --case tiny --providers shared dense_packed dense_padded
  python experiments/bench/update.py --shape qwen2.5-0.5b --case p700 --providers shared held trl_head \\
    --held path/to/redial --tokenizer build/tokenizers/qwen2_5"""
PROVIDERS = (
    "shared", "held", "dense_packed", "dense_rows", "dense_model", "dense_padded", "trl", "trl_head", "trl_trimmed",
)  # fmt: skip
COLUMNS = {
    "provider": "", "best_s": ".3g", "median_s": ".3g", "time_ratio": ".2f", "cpu_s": ".3g", "cpu_ratio": ".2f",
    "peak_mib": ".0f", "memory_ratio": ".2f", "gradient_error": ".1e",
}  # fmt: skip
GROUP_SIZE, LIST_TOKENS = 8, 230
MIX = (180, 260, 350, 450, 560, 720, 1032, 2048)  # prompt lengths, mean 700


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the Qwen2 architecture with tied embeddings."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


SHAPES = {
    "body": Shape(512, 4, 8, 2, 2752, 1024),  # proportions of Qwen2.5-0.5B, a vocabulary that does not dominate
    "tiny": Shape(256, 4, 4, 2, 768, 12288),
    "qwen2.5-0.5b": Shape(896, 2, 14, 2, 4864, 151936),  # two of its 24 layers
}


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config).to(device, dtype)
    use_shared_prefix(model)
    return model


def make_groups(case: str, vocab: int, trie: CatalogTrie | None = None) -> list[Group]:
    """Groups of pN: one with a prompt of N tokens; of mix: eight prompts of mean 700; of tiny: 32 small uneven ones.

    With a trie the lists are of its lines, else random ids.
    """
    rng = random.Random(0)

    def one_list(size: int) -> list[int]:
        if trie is None:
            return ids(size)
        return trie.list_ids(rng.sample(range(len(trie.line_of_item)), trie.num_ranks))[:size]

    def ids(size: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(size)]

    if case == "tiny":
        prompts = [rng.randint(25, 150) for _ in range(32)]
        return [Group(ids(p), [one_list(rng.randint(40, 130)) for _ in range(GROUP_SIZE)]) for p in prompts]
    prompts = MIX if case == "mix" else (int(case.removeprefix("p")),)
    return [Group(ids(p), [one_list(LIST_TOKENS) for _ in range(GROUP_SIZE)]) for p in prompts]


def list_weights(groups: list[Group]) -> list[list[Tensor]]:
    """A fixed upstream gradient a token, so that every provider computes the same loss."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(len(ids), generator=generator) for ids in group.completion_ids] for group in groups]


def weighted_sum(logp_BT: Tensor, weights: list[Tensor]) -> Tensor:
    weight_BT = torch.nn.utils.rnn.pad_sequence(weights, batch_first=True).to(logp_BT.device)
    return (logp_BT * weight_BT).sum()


def packed_step(
    model, groups: list[Group], weights: list[list[Tensor]], budget: int, trie: CatalogTrie | None = None
) -> float:
    total = 0.0
    for chosen in plan_micro_batches(groups, budget):
        pack = build_pack([groups[i] for i in chosen], model.device)
        allowed = None
        if trie is not None:  # the walk through the trie is part of the step
            lists = [ids for i in chosen for ids in groups[i].completion_ids]
            allowed = trie.choices(lists).for_head().to(model.device)
        logp_BT = pack_logprobs(model, pack, allowed=allowed)
        loss = weighted_sum(logp_BT, [w for i in chosen for w in weights[i]])
        loss.backward()
        total += float(loss.detach())
    return total


def dense_packed_step(model, groups: list[Group], weights: list[list[Tensor]], budget: int) -> float:
    alone = [Group(group.prompt_ids, [ids]) for group in groups for ids in group.completion_ids]
    return packed_step(model, alone, [[w] for row in weights for w in row], budget)


def dense_rows_step(model, groups: list[Group], weights: list[list[Tensor]], *, streamed: bool) -> float:
    total = 0.0
    for group, group_weights in zip(groups, weights, strict=True):
        ids_BS = torch.tensor([group.prompt_ids + ids for ids in group.completion_ids], device=model.device)
        target_BT = ids_BS[:, len(group.prompt_ids) :]
        with ordinary_attention(model):
            if streamed:
                hidden_BSD = model.model(input_ids=ids_BS, use_cache=False).last_hidden_state
                hidden_MD = hidden_BSD[:, len(group.prompt_ids) - 1 : -1].flatten(0, 1)
                logp_BT = token_logprobs(hidden_MD, model.lm_head.weight, target_BT.flatten()).view(target_BT.shape)
            else:
                logits_BTV = model(input_ids=ids_BS, use_cache=False).logits[:, len(group.prompt_ids) - 1 : -1]
                logp_BT = logits_BTV.float().log_softmax(-1).gather(-1, target_BT[..., None])[..., 0]
            loss = weighted_sum(logp_BT, group_weights)
            loss.backward()
        total += float(loss.detach())
    return total


def dense_padded_step(model, groups: list[Group], weights: list[list[Tensor]], num_rows: int) -> float:
    rows = [
        (group.prompt_ids, ids, weight)
        for group, group_weights in zip(groups, weights, strict=True)
        for ids, weight in zip(group.completion_ids, group_weights, strict=True)
    ]
    random.Random(0).shuffle(rows)
    total = 0.0
    for start in range(0, len(rows), num_rows):
        part = rows[start : start + num_rows]
        left, right = max(len(p) for p, _, _ in part), max(len(c) for _, c, _ in part)
        ids_BS = torch.tensor([[0] * (left - len(p)) + p + c + [0] * (right - len(c)) for p, c, _ in part])
        mask_BS = torch.tensor(
            [[0] * (left - len(p)) + [1] * (len(p) + len(c)) + [0] * (right - len(c)) for p, c, _ in part]
        )
        ids_BS, mask_BS = ids_BS.to(model.device), mask_BS.to(model.device)
        position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
        with ordinary_attention(model):
            logits_BTV = model(
                input_ids=ids_BS,
                attention_mask=mask_BS,
                position_ids=position_BS,
                use_cache=False,
                logits_to_keep=right + 1,
            ).logits[:, :-1]
            logp_BT = logits_BTV.float().log_softmax(-1).gather(-1, ids_BS[:, left:, None])[..., 0]
            loss = weighted_sum(logp_BT, [weight for _, _, weight in part])
            loss.backward()
        total += float(loss.detach())
    return total


@dataclass(frozen=True)
class Provider:
    """One way to compute the gradients of a batch, on weights of its own or shared ones."""

    model: torch.nn.Module
    step: Callable[[], float]


def make_providers(args, model, groups: list[Group], trie: CatalogTrie | None) -> dict[str, Provider]:
    weights = list_weights(groups)
    steps = {
        "shared": lambda: packed_step(model, groups, weights, args.token_budget),
        "held": lambda: packed_step(model, groups, weights, args.token_budget, trie),
        "dense_packed": lambda: dense_packed_step(model, groups, weights, args.token_budget),
        "dense_rows": lambda: dense_rows_step(model, groups, weights, streamed=True),
        "dense_model": lambda: dense_rows_step(model, groups, weights, streamed=False),
        "dense_padded": lambda: dense_padded_step(model, groups, weights, args.rows),
    }
    if any(len(set(map(len, group.completion_ids))) > 1 for group in groups):
        del steps["dense_rows"], steps["dense_model"]
    providers = {name: Provider(model, step) for name, step in steps.items() if name in args.providers}
    return providers | trl_providers(args, model, groups, weights)


def trl_providers(args, model, groups: list[Group], weights: list[list[Tensor]]) -> dict[str, Provider]:
    asked = [name for name in ("trl", "trl_head", "trl_trimmed") if name in args.providers]
    if not asked:
        return {}
    from update_trl import make_trainer, trl_step

    trainer = make_trainer(model)
    in_order = sorted(range(len(groups)), key=lambda i: len(groups[i].prompt_ids))
    groups, weights = [groups[i] for i in in_order], [weights[i] for i in in_order]
    num_rows = sorted({min(rows, GROUP_SIZE * len(groups)) for rows in args.trl_rows})
    return {
        f"{name}@{rows}": Provider(
            trainer.model,
            lambda rows=rows, name=name: trl_step(
                trainer, groups, weights, rows, trim=name == "trl_trimmed", lists_only=name != "trl"
            ),
        )
        for name in asked
        for rows in num_rows
    }


def zero_gradients(model) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def check_agreement(providers: dict[str, Provider], tolerance: float) -> tuple[dict[str, float], dict[str, float]]:
    """Relative gradient difference of every provider to the first, and seconds; raises beyond the tolerance."""
    errors: dict[str, float] = {}
    wall: dict[str, float] = {}
    reference: Tensor | None = None
    for name, provider in providers.items():
        zero_gradients(provider.model)
        wall[name], _ = seconds(provider.step, provider.model.device)
        gradient = torch.cat([parameter.grad.flatten().float() for parameter in provider.model.parameters()])
        reference = gradient if reference is None else reference
        errors[name] = float((gradient - reference).norm() / reference.norm())
    if wrong := {name: error for name, error in errors.items() if name != "held" and not error <= tolerance}:
        raise ValueError(f"providers compute different gradients, relative errors {wrong}, allowed {tolerance}")
    return errors, wall


def seconds(step: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """Wall-clock and processor seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_case(args, case: str, model, trie: CatalogTrie | None) -> dict:
    groups = make_groups(case, model.config.vocab_size, trie)
    providers = make_providers(args, model, groups, trie)
    errors, once = check_agreement(providers, 1e-4 if model.dtype == torch.float32 else 5e-2)
    providers = {name: providers[name] for name in best_sizes(once)}
    peaks = {}
    for name, provider in providers.items() if args.memory else ():
        gc.collect()
        peaks[name] = peak_extra_bytes(provider.step, model.device)
    wall: dict[str, list[float]] = {name: [] for name in providers}
    cpu: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(args.trials):
        for name, provider in providers.items():
            for times, spent in zip((wall, cpu), seconds(provider.step, model.device), strict=True):
                times[name].append(spent)
    rows = [
        {
            "provider": name,
            "best_s": min(wall[name]),
            "median_s": median(wall[name]),
            "cpu_s": min(cpu[name]),
            "peak_mib": peaks[name] / 2**20 if peaks else None,
            "gradient_error": None if name == "held" else errors[name],
            "time_ratio": min(wall[name]) / min(wall["shared"]),
            "cpu_ratio": min(cpu[name]) / min(cpu["shared"]),
            "memory_ratio": peaks[name] / peaks["shared"] if peaks else None,
        }
        for name in providers
    ]
    shared, dense = sum(g.tokens_shared for g in groups), sum(g.tokens_dense for g in groups)
    return {"case": case, "tokens_shared": shared, "tokens_dense": dense, "providers": rows}


def best_sizes(wall: dict[str, float]) -> list[str]:
    """The fastest name `provider@size` of each provider, and every name without a size."""
    best: dict[str, str] = {}
    for name in wall:
        provider = name.partition("@")[0]
        if provider not in best or wall[name] < wall[best[provider]]:
            best[provider] = name
    return list(best.values())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="body", help="model shape (default: body)")
    parser.add_argument(
        "--case", nargs="+", default=["p300", "p700", "p2048"], help="pN (one prompt of N tokens), mix, tiny"
    )
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help="default: all installed")
    parser.add_argument("--held", metavar="DATA", help="lists of this data set's catalog: a folder, or demo")
    parser.add_argument("--tokenizer", help="of --held: a folder or a hub name, with ids of the shape's vocabulary")
    parser.add_argument("--trials", type=int, default=3, help="timed steps a provider (default: 3)")
    parser.add_argument("--token-budget", type=int, default=16384, help="packed tokens a micro-batch (default: 16384)")
    parser.add_argument("--rows", type=int, default=8, help="rows a micro-batch of dense_padded (default: 8)")
    parser.add_argument(
        "--trl-rows", type=int, nargs="+", default=[1, 2, 8], help="rows a micro-batch of TRL (default: 1 2 8)"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help=f"(default here: {default})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="skip the memory runs")
    parser.add_argument("--out", type=Path, help="write the results as JSON here")
    args = parser.parse_args()
    has_trl = importlib.util.find_spec("trl") is not None
    if (args.held is None) != (args.tokenizer is None):
        parser.error("--held and --tokenizer go together: the lists are the catalog's lines in that tokenizer's ids")
    if args.providers is None:
        args.providers = [name for name in PROVIDERS if has_trl or not name.startswith("trl")]
        args.providers = [name for name in args.providers if args.held is not None or name != "held"]
        if not has_trl:
            print("left out: trl (not installed; pip install -e '.[bench]')")
    elif not has_trl and any(name.startswith("trl") for name in args.providers):
        parser.error("trl is not installed: pip install -e '.[bench]'")
    if "held" in args.providers and args.held is None:
        parser.error("--providers held needs --held DATA and --tokenizer PATH")
    if "shared" not in args.providers:
        parser.error("--providers must include 'shared': every ratio is against it")
    return args


def main() -> None:
    args = parse_args()
    keep_freed_memory()
    device, shape = torch.device(args.device), SHAPES[args.shape]
    model = make_model(shape, device, getattr(torch, args.dtype))
    trie = None
    if args.held is not None:
        from update_held import make_trie  # a data set needs more than a bare GPU machine has

        trie = make_trie(args.held, args.tokenizer, shape.vocab)
    results = []
    for case in args.case:
        result = measure_case(args, case, model, trie)
        results.append(result)
        saved = 1 - result["tokens_shared"] / result["tokens_dense"]
        print(f"\n{case}: {result['tokens_shared']} tokens for {result['tokens_dense']} ({saved:.0%} saved)")
        print_table(result["providers"], COLUMNS)
    if args.out is not None:
        settings = {"shape": {"name": args.shape, **asdict(shape)}, "dtype": args.dtype}
        settings |= {"group_size": GROUP_SIZE, "list_tokens": LIST_TOKENS, "held": args.held is not None}
        write_json(args.out, record("update", device, **settings, results=results))


if __name__ == "__main__":
    main()
