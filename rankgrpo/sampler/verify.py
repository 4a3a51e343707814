"""A guard that knows no family: what a model is computed with is compared with its own plain forward before it is used.

Two groups of random ids, one longer than every window, chunk and rope switch of the configuration that a run can reach
and one short, are scored by transformers' eager forward, a row at a time; then as the policy scores them, in evaluation
and, where it is trained, in training mode; then lists are sampled and scored again. What differs by more than rounding
is not used: model.attention = auto takes the next slower way, and what has none is an error of one line.
"""

# Shape letters: B lists, T longest list, S tokens of a row.

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rankgrpo.config import Config
from rankgrpo.errors import ModelError, SamplingError, UserError
from rankgrpo.model.attention import set_attention
from rankgrpo.model.head import forward_replaced, output_head
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Paths, Policy, with_paths
from rankgrpo.runtime.distributed import reshard
from rankgrpo.sampler.choose import choose_sampler, hf_sampler

SWITCHES = ("window", "chunk", "original_max_position")
"""Words in the names of configuration keys at whose value a model may begin to compute otherwise."""
ROUNDING = 2e-3
"""Nats by which log-probs may differ in float32."""
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
        longest = config.data.max_prompt_tokens + config.rl.max_new_tokens
        self.groups = example_groups(policy, longest)
        self.plain_BT, noise = self._plain(self.groups)
        if not bool(self.plain_BT.isfinite().all()):
            raise SamplingError("the model's logits are not finite: its weights are broken or training has diverged")
        self.tolerance = ROUNDING + 4 * noise

    def run(self, sampled: bool) -> Policy:
        if self.policy.dropout:
            self._say(f"set to 0 while training: {', '.join(self.policy.dropout)}")
        if self.policy.not_adapted:
            self._say(f"without adapters, so not trained: {', '.join(self.policy.not_adapted)}")
        policy = self._first_exact(self._packings(), self._scoring_gap, "model.attention")
        self._say_packing(policy)
        if sampled and choose_sampler(self.config.rl.sampler, policy.device) == "hf":
            self.policy = policy
            policy = self._first_exact(self._decodings(), self._sampling_gap, "rl.sampler")
            self._say_decoding(policy)
        return policy

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

    def _first_exact(self, candidates: Iterator[Paths], gap_of: Callable[[Policy], float], key: str) -> Policy:
        reasons = []
        for paths in candidates:
            try:
                policy = with_paths(self.policy, paths)
                gap = gap_of(policy)
            except UserError as error:
                reasons.append(str(error))
            except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError) as error:
                reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            else:
                if gap <= self.tolerance:
                    self.reason = reasons[0] if reasons else None
                    return policy
                reasons.append(f"off by {gap:.2g} nats")
        name = type(self.policy.model).__name__
        hint = "set model.attention=auto" if self.config.model.attention == "shared" else "take another model"
        raise ModelError(f"{key}: nothing computes {name} as its own forward does ({reasons[0]}); {hint}")

    def _scoring_gap(self, policy: Policy) -> float:
        policy.model.eval()
        gaps = [self._gap(self._score(policy))]
        if self.trained and gaps[0] <= self.tolerance:
            policy.model.train()
            gaps.append(self._gap(self._score(policy)))
            policy.model.eval()
            if gaps[1] > self.tolerance:
                raise ModelError(
                    f"{type(policy.model).__name__}: in training mode its log-probs change by {gaps[1]:.2g} nats: "
                    "something random stays on; set every dropout and noise of its config.json to 0"
                )
        return max(gaps)

    def _score(self, policy: Policy) -> Tensor:
        free = replace(policy, constraint=None)
        return free.logprobs(self.groups)[1]

    def _gap(self, logp_BT: Tensor) -> float:
        gap = (logp_BT - self.plain_BT).abs().max()
        return float(gap) if bool(gap.isfinite()) else float("inf")

    def _sampling_gap(self, policy: Policy) -> float:
        """Largest distance of a sampler's log-probs from those of the plain forward, and under the catalog's rules from
        the policy's own."""
        policy.model.eval()
        free = replace(policy, constraint=None)
        gap = self._distance(free, lambda groups: self._plain(groups)[0])
        with_paths(self.policy, policy.paths)
        if policy.constraint is not None and gap <= self.tolerance:
            gap = self._distance(policy, lambda groups: policy.logprobs(groups)[1])
        return gap

    def _distance(self, policy: Policy, score: Callable[[list[Group]], Tensor]) -> float:
        prompts = [group.prompt_ids for group in self.groups]
        lists = hf_sampler(policy, rows=4).sample(prompts, group_size=2, seeds=[1, 2], max_new_tokens=8)
        groups = [
            Group(prompt, [rollout.token_ids for rollout in own]) for prompt, own in zip(prompts, lists, strict=True)
        ]
        expected_BT = score(groups)
        logps = [torch.tensor(rollout.logp, device=expected_BT.device) for own in lists for rollout in own]
        gaps = [(row[: len(logp)] - logp).abs().max() for row, logp in zip(expected_BT, logps, strict=True)]
        return float(torch.stack(gaps).max().nan_to_num(nan=torch.inf))

    def _plain(self, groups: list[Group]) -> tuple[Tensor, float]:
        """(B, T) by the model's own eager forward, a row at a time; and what its compute type rounds off."""
        policy = self.policy
        policy.model.eval()
        set_attention(policy.model, "eager")
        with torch.autocast(policy.device.type, enabled=False):
            exact_BT = plain_logprobs(policy, groups)
        if not policy.bfloat16:
            return exact_BT, 0.0
        with torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy.sharding is None):
            rounded_BT = plain_logprobs(policy, groups)
        noise = 0.25 if policy.sharding is not None else float((rounded_BT - exact_BT).abs().max())
        return exact_BT, noise

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


def plain_logprobs(policy: Policy, groups: list[Group]) -> Tensor:
    """(B, T) log-probs of the lists through the model's forward, attention as it is, one row at a time, full logits."""
    model, rows = policy.model, []
    for group in groups:
        for ids in group.completion_ids:
            sequence_1S = torch.tensor([group.prompt_ids + ids], device=policy.device)
            first = len(group.prompt_ids) - 1
            head = output_head(model)
            forward = head.forward
            with forward_replaced(head, lambda hidden, first=first, forward=forward: forward(hidden[:, first:-1])):
                logits_TV = model(input_ids=sequence_1S, use_cache=False).logits[0].float()
            logp_TV = logits_TV.masked_fill(~policy.allowed_V, -torch.inf).log_softmax(-1)
            rows.append(logp_TV.gather(1, sequence_1S[0, first + 1 :, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def example_groups(policy: Policy, longest: int) -> list[Group]:
    """A long and a short prompt with lists of uneven length, of random ids, the same on every machine."""
    eos = set(policy.tokenizer.all_special_ids)
    allowed = [i for i in policy.allowed_V.nonzero()[:, 0].tolist() if i not in eos]
    generator = torch.Generator().manual_seed(0)

    def ids(size: int) -> list[int]:
        return [allowed[i] for i in torch.randint(len(allowed), (size,), generator=generator).tolist()]

    reached = [switch for switch in switches(policy.model.config) if switch < longest]
    prompt = min(max(reached, default=0) + SHORT, max(longest - 16, 8))
    return [Group(ids(prompt), [ids(11), ids(4)]), Group(ids(7), [ids(3), ids(9)])]


def switches(config) -> list[int]:
    """Every length in a configuration at which its model may begin to compute otherwise."""
    found: list[int] = []

    def visit(values: dict) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                visit(value)
            elif type(value) is int and value > 0 and any(word in str(name) for word in SWITCHES):
                if "layers" not in str(name):  # Qwen's max_window_layers counts layers
                    found.append(value)

    visit(config.get_text_config().to_dict())
    return sorted(set(found))
