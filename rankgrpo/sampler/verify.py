"""A guard that knows no family: what a model is computed with is compared with its own plain forward before it is used.

Groups of random ids, longer than every window, chunk and rope switch of the configuration that a run can reach, across
it and short, are scored by transformers' eager forward, a row at a time, which must not read ahead; then as the policy
scores them, in evaluation and, where it is trained, in training mode; then lists are sampled and scored again. What
differs by more than rounding is not used: model.attention = auto takes the next slower way, and what has none is an
error of one line.
"""

# Shape letters: B lists, T longest list, S tokens of a row.

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from rankgrpo.config import Config
from rankgrpo.errors import ModelError, SamplingError, UserError
from rankgrpo.model.attention import set_attention
from rankgrpo.model.head import forward_replaced, output_head
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Paths, Policy, with_paths
from rankgrpo.runtime.distributed import reshard
from rankgrpo.sampler.choose import choose_sampler, hf_sampler

COUNTS = (
    "hidden", "intermediate", "vocab", "num", "layer", "head", "dim", "rank", "token_id", "embd", "d_model", "ffn",
    "channel", "version", "group", "expert", "inner", "factor", "state", "conv", "kernel", "label", "seed", "scal",
    "width", "pattern", "interval", "step", "period", "offset", "beam",
)  # fmt: skip
"""Words in the names of a configuration's integers that are no lengths. Any other may be one at which a model begins to
compute otherwise."""
ROUNDING = 2e-3
"""Nats by which log-probs may differ in float32."""
BFLOAT16 = 2**-8
"""The relative distance of neighbouring bfloat16 numbers."""
SHORT = 24  # tokens of an example's prompt beyond the last switch


def verify_policy(policy: Policy, config: Config, *, sampled: bool = True) -> Policy:
    """The policy with the fastest paths that are exact for it, and a line for each that is not the usual one.

    sampled: whether lists are sampled from it; a reference only scores them. Every process of a run calls it. Raises
    ModelError where nothing is exact, or where model.attention = shared is not.
    """
    if not config.model.verify:
        return policy
    training = policy.model.training
    try:
        with torch.no_grad():
            return _Guard(policy, config).run(sampled)
    finally:
        policy.model.train(training)
        reshard(policy.model)


class _Guard:
    def __init__(self, policy: Policy, config: Config):
        self.policy, self.config = policy, config
        self.trained = policy.model.training
        self.groups = example_groups(policy, config.data.max_prompt_tokens, config.rl.max_new_tokens)
        try:
            self.plain_BT = self._plain(self.groups)
        except (ValueError, RuntimeError, IndexError) as error:
            tokens = max(len(group.prompt_ids) + len(group.completion_ids[0]) for group in self.groups)
            raise ModelError(
                f"{type(policy.model).__name__} cannot read {tokens} tokens ({str(error).splitlines()[0]}); if it was "
                "made for fewer, lower data.max_prompt_tokens and rl.max_new_tokens"
            ) from error
        if not bool(self.plain_BT.isfinite().all()):
            raise SamplingError("the model's logits are not finite: its weights are broken or training has diverged")
        self.tolerance = self._tolerance()
        self._check_causal()

    def run(self, sampled: bool) -> Policy:
        if self.policy.dropout:
            self._say(f"set to 0 while training: {', '.join(self.policy.dropout)}")
        if self.policy.not_adapted:
            self._say(f"without adapters, so not trained: {', '.join(self.policy.not_adapted)}")
        policy = self._first_exact(self._packings(), self._scoring_gaps, "model.attention")
        self._say_packing(policy)
        if sampled and choose_sampler(self.config.rl.sampler, policy.device) == "hf":
            self.policy = policy
            policy = self._first_exact(self._decodings(), self._sampling_gaps, "rl.sampler")
            self._say_decoding(policy)
        return policy

    def _check_causal(self) -> None:
        """A list with another last token: those before it keep their log-probs, or they would be learned from it."""
        ids = self.groups[0].prompt_ids
        lists = [own for group in self.groups for own in group.completion_ids]

        def with_another_end(own: list[int]) -> list[int]:
            return [*own[:-1], next(i for i in ids if i != own[-1])]

        changed = [
            replace(group, completion_ids=list(map(with_another_end, group.completion_ids))) for group in self.groups
        ]
        gap_BT = (self._plain(changed) - self.plain_BT).abs()
        for row, own in zip(gap_BT, lists, strict=True):
            row[len(own) - 1] = 0.0
        gaps = by_group(gap_BT, self.groups)
        if not self.tolerance.covers(gaps):
            raise ModelError(
                f"{type(self.policy.model).__name__} is no causal language model: log-probs of tokens change by "
                f"{_largest(gaps):.2g} nats with the token after them; take another model (some encoders become causal "
                "by is_decoder = true in config.json)"
            )

    def _packings(self) -> Iterator[Paths]:
        paths, wanted = self.policy.paths, self.config.model.attention
        if wanted != "dense" and paths.packing == "shared":
            yield paths
        if wanted != "shared":
            yield replace(paths, packing="padded", attention="sdpa")
            yield replace(paths, packing="padded", attention="eager")
            if self.policy.sharding is None:
                yield replace(paths, packing="alone", attention="eager")

    def _decodings(self) -> Iterator[Paths]:
        paths = self.policy.paths
        yield replace(paths, decoding="grouped")
        # A dense policy's attention is that of its packing; one that packs has none yet.
        for attention in ("sdpa", "eager") if paths.packing == "shared" else (paths.attention,):
            yield replace(paths, decoding="padded", attention=attention)
        attention = paths.attention if paths.packing != "shared" else "eager"
        yield replace(paths, decoding="alone", attention=attention)
        yield replace(paths, decoding="uncached", attention=attention)

    def _first_exact(self, candidates: Iterator[Paths], gaps_of: Callable[[Policy], list[Tensor]], key: str) -> Policy:
        reasons = []
        for paths in candidates:
            try:
                policy = with_paths(self.policy, paths)
                gaps = gaps_of(policy)
            except UserError as error:
                reasons.append(str(error))
            except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError) as error:
                reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            else:
                if self.tolerance.covers(gaps):
                    self.reason = reasons[0] if reasons else None
                    return policy
                reasons.append(f"off by {_largest(gaps):.2g} nats")
        name = type(self.policy.model).__name__
        hint = "set model.attention=auto" if self.config.model.attention == "shared" else "take another model"
        raise ModelError(f"{key}: nothing computes {name} as its own forward does ({reasons[0]}); {hint}")

    def _scoring_gaps(self, policy: Policy) -> list[Tensor]:
        policy.model.eval()
        gaps = self._gaps(self._score(policy))
        if self.trained and self.tolerance.covers(gaps):
            policy.model.train()
            trained = self._gaps(self._score(policy))
            policy.model.eval()
            if not self.tolerance.covers(trained):
                raise ModelError(
                    f"{type(policy.model).__name__}: in training mode its log-probs change by {_largest(trained):.2g} "
                    "nats: something random stays on; set every dropout and noise of its config.json to 0"
                )
        return gaps

    def _score(self, policy: Policy) -> Tensor:
        free = replace(policy, constraint=None)
        return free.logprobs(self.groups)[1]

    def _gaps(self, logp_BT: Tensor) -> list[Tensor]:
        return by_group((logp_BT - self.plain_BT).abs(), self.groups)

    def _sampling_gaps(self, policy: Policy) -> list[Tensor]:
        """Distances of a sampler's log-probs from those of the plain forward; where these are small, under the
        catalog's rules from the policy's own."""
        policy.model.eval()
        groups, logp_BT = self._draw(replace(policy, constraint=None))
        gaps = by_group((self._plain(groups) - logp_BT).abs(), groups)
        if not self.tolerance.covers(gaps):  # a rope that switches by length gives a token another past later on
            gaps = by_group((self._as_drawn(groups) - logp_BT).abs(), groups)
        with_paths(self.policy, policy.paths)
        if policy.constraint is not None and self.tolerance.covers(gaps):
            groups, logp_BT = self._draw(policy)
            gaps = by_group((policy.logprobs(groups)[1] - logp_BT).abs(), groups)
        return gaps

    def _draw(self, policy: Policy) -> tuple[list[Group], Tensor]:
        """Lists that the sampler draws after the examples' prompts, and the log-probs it gives them, (B, T)."""
        prompts, seeds = [group.prompt_ids for group in self.groups], list(range(1, len(self.groups) + 1))
        sampler = hf_sampler(policy, rows=2 * len(prompts))  # short and long prompts in one batch
        lists = sampler.sample(prompts, group_size=2, seeds=seeds, max_new_tokens=8)
        groups = [
            Group(prompt, [rollout.token_ids for rollout in own]) for prompt, own in zip(prompts, lists, strict=True)
        ]
        rows = [torch.tensor(rollout.logp, device=policy.device) for own in lists for rollout in own]
        return groups, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def _as_drawn(self, groups: list[Group]) -> Tensor:
        """`_plain` of every token after what stood before it alone, (B, T)."""
        begun = [
            Group(group.prompt_ids, [own[: i + 1] for own in group.completion_ids for i in range(len(own))])
            for group in groups
        ]
        rows = iter(self._plain(begun, read_last=False))
        lists = [own for group in groups for own in group.completion_ids]
        return torch.nn.utils.rnn.pad_sequence(
            [torch.stack([next(rows)[i] for i in range(len(own))]) for own in lists], batch_first=True
        )

    def _plain(self, groups: list[Group], **options) -> Tensor:
        """`plain_logprobs` with eager attention; in bfloat16 where a split model is gathered so."""
        policy = self.policy
        policy.model.eval()
        set_attention(policy.model, "eager")
        with torch.autocast(policy.device.type, enabled=False):
            return plain_logprobs(policy, groups, **options)

    def _tolerance(self) -> Tolerance:
        """What the compute type rounds off: as the plain forward shows it, and as it shows when the output of every
        block is moved by about as much as its type rounds."""
        policy, groups = self.policy, self.groups
        if not policy.bfloat16:
            return Tolerance(ROUNDING, [ROUNDING] * len(groups))
        with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy.sharding is None):
            rounded_BT = plain_logprobs(policy, groups)
            moved = [moved_logprobs(policy, groups, seed) - rounded_BT for seed in range(3)]
        noise = by_group(torch.stack([rounded_BT - self.plain_BT, *moved]).abs().amax(0), groups)
        # Where a router decides otherwise one token moves far. A split model shows only its rounded numbers.
        floor = 1.0 if policy.sharding is not None else 0.0
        return Tolerance(
            ROUNDING + max(floor, 4 * _largest(noise)), [ROUNDING + 6 * float(own.median()) for own in noise]
        )

    def _say_packing(self, policy: Policy) -> None:
        if policy.paths.packing == "shared" or self.config.model.attention == "dense":
            return
        rl, data = self.config.rl, self.config.data
        tokens = rl.group_size * (data.max_prompt_tokens + rl.max_new_tokens)
        shared = data.max_prompt_tokens + rl.group_size * rl.max_new_tokens
        self._say(
            f"{type(policy.model).__name__} cannot be packed exactly ({self.reason}): every list carries its prompt, "
            f"up to {tokens / shared:.1f} times the tokens"
            + (", a row at a time" if policy.paths.packing == "alone" else "")
        )

    def _say_decoding(self, policy: Policy) -> None:
        if policy.paths.decoding != "grouped":
            own = "without a cache" if policy.paths.decoding == "uncached" else "with the model's own cache"
            self._say(f"{type(policy.model).__name__}: lists are sampled {own} ({self.reason}), which is slower")

    def _say(self, text: str) -> None:
        """Print a line, once in a process however often the model is opened."""
        sharding = self.policy.sharding
        if text not in _said and (sharding is None or sharding.parallel.is_main):
            _said.add(text)
            print(f"> {text}", flush=True)


_said: set[str] = set()


@dataclass(frozen=True)
class Tolerance:
    """Nats that rounding explains. A wrong path moves most tokens of a prompt's lists, rounding few of them far."""

    token: float
    """Of any token."""
    median: list[float]
    """Of the median token of each group."""

    def covers(self, gaps: list[Tensor]) -> bool:
        """gaps: of every group, those of its lists' tokens. Numbers that are not finite are never covered."""
        medians = [float(own.median()) for own in gaps]
        return _largest(gaps) <= self.token and all(
            gap <= allowed for gap, allowed in zip(medians, self.median, strict=True)
        )


def _largest(gaps: list[Tensor]) -> float:
    return float(torch.cat(gaps).nan_to_num(nan=torch.inf).max())


def by_group(values_BT: Tensor, groups: list[Group]) -> list[Tensor]:
    """The values of every group's tokens, without those beyond a list's end."""
    rows = iter(values_BT)
    return [torch.cat([next(rows)[: len(own)] for own in group.completion_ids]) for group in groups]


def moved_logprobs(policy: Policy, groups: list[Group], seed: int) -> Tensor:
    """`plain_logprobs` with the output of every block multiplied by 1 + u, u uniform within BFLOAT16 of 0."""
    generator = torch.Generator().manual_seed(seed)  # of its own: a run's random numbers stay where they are

    def move(hidden: Tensor) -> Tensor:
        change = BFLOAT16 * (2 * torch.rand(hidden.shape, generator=generator) - 1)
        return hidden * (1 + change).to(hidden.device, hidden.dtype)

    def hook(module, arguments, output):
        return (move(output[0]), *output[1:]) if isinstance(output, tuple) else move(output)

    with ExitStack() as stack:
        for module in policy.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                stack.enter_context(module.register_forward_hook(hook))
        return plain_logprobs(policy, groups)


def plain_logprobs(policy: Policy, groups: list[Group], *, read_last: bool = True) -> Tensor:
    """(B, T) log-probs of the lists through the model's forward, attention as it is, one row at a time, full logits.

    read_last: whether the model also reads a list's last token, of which nothing is asked.
    """
    model, rows = policy.model, []
    for group in groups:
        for ids in group.completion_ids:
            sequence_1S = torch.tensor([group.prompt_ids + ids], device=policy.device)
            read_1S = sequence_1S if read_last else sequence_1S[:, :-1]
            asked = slice(len(group.prompt_ids) - 1, sequence_1S.shape[1] - 1)
            head = output_head(model)
            forward = head.forward
            with forward_replaced(head, lambda hidden, asked=asked, forward=forward: forward(hidden[:, asked])):
                logits_TV = model(input_ids=read_1S, use_cache=False).logits[0].float()
            logp_TV = logits_TV.masked_fill(~policy.allowed_V, -torch.inf).log_softmax(-1)
            rows.append(logp_TV.gather(1, sequence_1S[0, len(group.prompt_ids) :, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def example_groups(policy: Policy, max_prompt_tokens: int, max_new_tokens: int) -> list[Group]:
    """Long and short prompts with lists of uneven length, of random ids, the same on every machine."""
    eos = set(policy.tokenizer.all_special_ids)
    allowed = [i for i in policy.allowed_V.nonzero()[:, 0].tolist() if i not in eos]
    generator = torch.Generator().manual_seed(0)

    def ids(size: int) -> list[int]:
        return [allowed[i] for i in torch.randint(len(allowed), (size,), generator=generator).tolist()]

    longest = max_prompt_tokens + max_new_tokens
    last = max((switch for switch in switches(policy.model.config) if switch < longest), default=0)
    prompt = min(last + SHORT, max(longest - 16, 8))
    groups = [Group(ids(prompt), [ids(11), ids(4)]), Group(ids(7), [ids(3), ids(9)])]
    if last:  # a list that crosses the last switch, and one that leaves its prompt behind
        groups.append(Group(ids(max(last - 4, 1)), [ids(9)]))
        groups.append(Group(ids(5), [ids(min(last + SHORT, max_new_tokens))]))
    return groups


def switches(config) -> list[int]:
    """Every length in a configuration at which its model may begin to compute otherwise: its integers that COUNTS does
    not exclude, and products of two whose names begin alike, such as a number of blocks and their size."""
    lengths: dict[str, int] = {}

    def visit(values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value)
            elif type(value) is int and value > 1 and not any(word in str(name).lower() for word in COUNTS):
                lengths[str(name)] = value

    visit(config.get_text_config().to_dict())
    products = {
        one * other
        for (name, one), (second, other) in combinations(lengths.items(), 2)
        if name.split("_")[0] == second.split("_")[0]
    }
    return sorted(products | set(lengths.values()))
