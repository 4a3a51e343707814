"""What every model is held to: transformers' own eager forward of a fresh model, a row at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from model_families import make_model, make_tokenizer
from safetensors import safe_open
from tiny_world import ALONE, tiny_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankgrpo.model.export import model_class
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy
from rankgrpo.sampler.choose import hf_sampler

CONFIG = tiny_config("data.max_prompt_tokens=60", "rl.max_new_tokens=30")


def ids(size: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 250, (size,), generator=generator).tolist()


def example_groups() -> list[Group]:
    """Prompts and lists on both sides of the windows (16) and of the rope switch (32)."""
    g = torch.Generator().manual_seed(1)
    return [
        Group(ids(50, g), [ids(9, g), ids(24, g), ids(1, g)]),
        Group(ids(7, g), [ids(30, g), ids(12, g)]),
        Group(ids(22, g), [ids(3, g)]),
    ]


def eager_logprobs(model: PreTrainedModel, groups: list[Group], allowed_V: Tensor, temperature: float = 1.0) -> Tensor:
    """One sequence at a time, no padding, no mask, full logits."""
    longest = max(len(own) for group in groups for own in group.completion_ids)
    rows = []
    for group in groups:
        for own in group.completion_ids:
            sequence = torch.tensor([group.prompt_ids + own])
            logits = model(input_ids=sequence, use_cache=False).logits[0].float() / temperature
            logp = logits.masked_fill(~allowed_V, -torch.inf).log_softmax(-1)
            at = torch.arange(len(group.prompt_ids), sequence.shape[1])
            rows.append(nn.functional.pad(logp[at - 1, sequence[0, at]], (0, longest - len(own))))
    return torch.stack(rows)


def logprobs_as_drawn(
    model: PreTrainedModel, groups: list[Group], allowed_V: Tensor, temperature: float = 1.0
) -> Tensor:
    """`eager_logprobs` of every token after a text that ends before it."""
    rows = []
    for group in groups:
        for own in group.completion_ids:
            row = []
            for i, token in enumerate(own):
                logits = model(input_ids=torch.tensor([group.prompt_ids + own[:i]]), use_cache=False).logits[0, -1]
                row.append((logits.float() / temperature).masked_fill(~allowed_V, -torch.inf).log_softmax(-1)[token])
            rows.append(torch.stack(row))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    shared = got.keys() & want.keys()
    assert all(not grad.any() for name, grad in [*got.items(), *want.items()] if name not in shared)
    total = sum(float(want[name].double().square().sum()) for name in shared) ** 0.5
    gap = sum(float((got[name] - want[name]).double().square().sum()) for name in shared) ** 0.5
    assert gap <= 1e-3 * total


def save(name: str, folder: Path) -> None:
    model = make_model(name)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def tensors_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a folder's file holds."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def reload(folder: Path) -> PreTrainedModel:
    kind = model_class(str(folder))
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def assert_as_its_own_forward(
    policy: Policy,
    folder: Path,
    export: Path,
    *,
    atol: float = 1e-4,
    sampled_atol: float = 1e-4,
    as_drawn: bool = False,
    left_out: str | None = None,
) -> None:
    """Log-probs, gradients, sampled lists and export of a policy that was opened from `folder`.

    atol, sampled_atol: of a log-prob, in nats; as_drawn: sampled lists are scored by `logprobs_as_drawn`;
    left_out: in the names of the tensors that an export does without.
    """
    plain = reload(folder)
    for module in plain.modules():  # what was switched off in the policy
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    groups = example_groups()
    want_BT = eager_logprobs(plain, groups, policy.allowed_V, temperature=0.7)
    _, logp_BT = policy.logprobs(groups, temperature=0.7)
    torch.testing.assert_close(logp_BT, want_BT, rtol=0, atol=atol)
    weight_BT = torch.randn(want_BT.shape, generator=torch.Generator().manual_seed(2))
    assert_same_gradients(
        gradients(policy.model, (logp_BT * weight_BT).sum()), gradients(plain, (want_BT * weight_BT).sum())
    )
    assert torch.equal(policy.logprobs(groups, temperature=0.7)[1], logp_BT)  # nothing random is left

    lists = hf_sampler(policy).sample(
        [group.prompt_ids for group in groups], group_size=2, seeds=[5, 6, 7], max_new_tokens=24, temperature=0.7
    )
    drawn = [Group(g.prompt_ids, [each.token_ids for each in own]) for g, own in zip(groups, lists, strict=True)]
    with torch.no_grad():
        score = logprobs_as_drawn if as_drawn else eager_logprobs
        rows_BT = score(plain, drawn, policy.allowed_V, temperature=0.7)
    for row, each in zip(rows_BT, [each for own in lists for each in own], strict=True):
        torch.testing.assert_close(row[: len(each.logp)], torch.tensor(each.logp), rtol=0, atol=sampled_atol)

    policy.export(export, ALONE)
    own = {key: shape for key, shape in tensors_of(folder).items() if left_out is None or left_out not in key}
    assert tensors_of(export) == own
    sequence = torch.tensor([groups[0].prompt_ids])
    with torch.no_grad():
        exported, original = (m(input_ids=sequence, use_cache=False).logits for m in (reload(export), plain))
    torch.testing.assert_close(exported, original, rtol=0, atol=1e-5)
