"""Lists, rewards and log-probs for the losses of the trainers: uneven, cut off, too long, with an empty rank."""

from __future__ import annotations

from pathlib import Path

import torch
from toy import ITEMS, K

from rankgrpo.loss import rank_grpo_loss
from rankgrpo.parse import RankSegmenter
from rankgrpo.units import make_units

# Shape letters: B lists, T tokens, K ranks.

PAD, EOS, LINE, X = range(4)
A, B, C, D, E, F, TWO_LINES = range(4, 4 + len(ITEMS))
LISTS = [
    [A, X, LINE, B, C, EOS],  # full: "x" is a title of its own line
    [A, B, EOS],  # ends early
    [A, B, C, D, E, EOS],  # two items too many
    [B, X, X],  # cut off in the second item
    [EOS],
    [TWO_LINES, A, EOS],  # rank 1 has no token of its own
]
GROUP = 3
REWARD_BK = torch.tensor([[1.0, 0, 0.25], [0, 1, 0], [0, 0, 0], [1, 0.25, 0], [0, 0, 0], [0, 0, -0.75]])
LOW, HIGH = 0.06, 0.08


def padded(rows: list[list], fill=0.0) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def log_probs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs now and before, far enough apart for the clip; 0 outside."""
    mask_BT = padded([[True] * len(ids) for ids in LISTS], False)
    generator = torch.Generator().manual_seed(seed)
    old_BT = torch.where(mask_BT, -torch.rand(mask_BT.shape, generator=generator) - 0.3, 0.0)
    noise_BT = 0.12 * torch.randn(mask_BT.shape, generator=generator)
    return torch.where(mask_BT, old_BT + noise_BT, 0.0), old_BT


def advantages() -> torch.Tensor:
    """Within a group and rank, one after the other."""
    advantage_BK = torch.zeros(len(LISTS), K)
    for start in range(0, len(LISTS), GROUP):
        for rank in range(K):
            values = REWARD_BK[start : start + GROUP, rank]
            advantage_BK[start : start + GROUP, rank] = (values - values.mean()) / (values.std() + 1e-4)
    return advantage_BK


def ours(tokenizer, **options) -> torch.Tensor:
    """The gradient of one big batch in every token's log-prob."""
    ids_BT = padded(LISTS, PAD)
    mask_BT = padded([[True] * len(ids) for ids in LISTS], False)
    rank_BT = RankSegmenter(tokenizer)(ids_BT, mask_BT)
    present_BK = torch.stack([(rank_BT == rank).any(1) for rank in range(K)], 1)
    assert not present_BK[5, 1] and present_BK[5, 2], "rank 1 of the last list is empty"
    units = make_units(rank_BT, (ids_BT == EOS) & mask_BT, advantages(), num_ranks=K)
    logp_BT, old_BT = log_probs()
    logp_BT.requires_grad_()
    loss, metrics = rank_grpo_loss(
        logp_BT, old_BT, units.unit_BT, units.advantage_BU, clip_low=LOW, clip_high=HIGH, denominator=len(LISTS) * K,
        **options,
    )  # fmt: skip
    loss.backward()
    assert metrics["ratio/clip_low_frac"] + metrics["ratio/clip_high_frac"] > 0
    return logp_BT.grad


def assert_same_gradient(found_BT: torch.Tensor, tokenizer, **options) -> None:
    expected_BT = ours(tokenizer, **options)
    assert expected_BT.norm() > 1e-2
    assert (found_BT - expected_BT).norm() / expected_BT.norm() < 1e-5


def script_of(page: str, name: str) -> str:
    """A user's script of a page in docs/integrations, which must be short and be Python."""
    text = (Path(__file__).parents[2] / "docs" / "integrations" / page).read_text()
    script = text.partition(f"```python {name}\n")[2].partition("```")[0]
    assert 10 < script.count("\n") <= 40, f"{page} has a script of {script.count(chr(10))} lines"
    compile(script, name, "exec")
    return script
