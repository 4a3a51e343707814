"""K rewards a list as one number a token, and from them the advantages, for trainers that carry nothing else.

Trainers such as verl and SkyRL pass rewards (B, T) to an estimator of advantages and advantages (B, T) to a loss, and
no token ids or columns of one's own to either. So ranks travel twice: `mark_rewards` writes a list's rewards at the
last tokens of its ranks, with the rank in their lowest bits; `marked_advantages` reads them, compares groups, and keeps
the units apart in its advantages (`rankgrpo.units.hide_units`), where the loss finds them.
"""

# Shape letters: B lists, T completion tokens, K ranks, U units.

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rankgrpo.advantage import group_advantage
from rankgrpo.errors import ConfigError
from rankgrpo.parse import RankSegmenter
from rankgrpo.units import Units, hide_units, make_units

# Low bits of a marked reward that hold the unit; the other 16 of the mantissa stay: 1.5e-5 of the reward at most.
UNIT_BITS = 7
MAX_UNITS = 2**UNIT_BITS - 1
_UNIT_MASK = 2**UNIT_BITS - 1
# Stands for a reward of 0, whose low bits would make a number that devices flush.
_ZERO = 2.0**-120


def mark_rewards(
    rank_BT: Tensor,
    eos_BT: Tensor,
    reward_BK: Tensor,
    *,
    overflow_penalty: float = -0.1,
    early_eos_penalty: float = -0.1,
) -> Tensor:
    """K rewards a list as one number a token, (B, T) float32; `marked_advantages` reads them.

    At the last token of each rank stands its reward, and at that of each penalty its value; their lowest 7 bits hold
    the unit. A reward of 0 is written as 2^-120, so sums of a list are its reward all the same. A rank without tokens
    has no place: it counts as a reward of 0 in its group.

    Args:
      rank_BT: rank of every token, -1 outside (`rankgrpo.parse.RankSegmenter`).
      eos_BT: bool, True at end-of-sequence tokens.
      reward_BK: (B, K), finite.

    Raises ValueError for wrong shapes, and ConfigError for lists of more than 127 units.
    """
    if not bool(reward_BK.isfinite().all()):
        raise ValueError("reward_BK must be finite")
    options = {"overflow_penalty": overflow_penalty, "early_eos_penalty": early_eos_penalty}
    units = make_units(rank_BT, eos_BT, reward_BK.float(), num_ranks=reward_BK.shape[1], **options)
    if bool((units.unit_BT >= MAX_UNITS).any()):
        raise ConfigError(f"a list has more than {MAX_UNITS} items; a shorter response length ends it")
    following_BT = torch.nn.functional.pad(units.unit_BT[:, 1:], (0, 1), value=-1)
    ends_BT = (units.unit_BT >= 0) & (units.unit_BT != following_BT)
    value_BT = units.advantage_BU.gather(1, units.unit_BT.clamp(min=0))
    value_BT = torch.where(value_BT.abs() < 2 * _ZERO, _ZERO, value_BT)
    bits_BT = (value_BT.view(torch.int32) & ~_UNIT_MASK) | (units.unit_BT.clamp(min=0) + 1).int()
    return torch.where(ends_BT, bits_BT.view(torch.float32), 0.0)


def mark_lists(
    lists: Sequence[Sequence[int]],
    rewards: Sequence[Sequence[float]],
    num_ranks: int,
    segmenter: RankSegmenter,
    end_ids: Iterable[int],
) -> list[list[float]]:
    """`mark_rewards` of lists of token ids and rows of K rewards, as lists of numbers, one a token.

    Raises ConfigError, with the place of the list, for a row that is not K finite numbers.
    """
    if len(lists) != len(rewards):
        raise ConfigError(f"expected a row of {num_ranks} rewards for each of {len(lists)} lists, got {len(rewards)}")
    for place, row in enumerate(rewards):
        count = len(row) if hasattr(row, "__len__") else None
        if count != num_ranks or not all(math.isfinite(value) for value in row):
            raise ConfigError(
                f"list {place}: expected {num_ranks} finite numbers, one a rank (0 for a rank that the list does not "
                f"have), got {row!r}"
            )
    ids_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids, dtype=torch.int64) for ids in lists], batch_first=True)
    length_B = torch.tensor([len(ids) for ids in lists])
    mask_BT = torch.arange(ids_BT.shape[1]) < length_B[:, None]
    eos_BT = torch.isin(ids_BT, torch.tensor(sorted(end_ids), dtype=torch.int64)) & mask_BT
    reward_BK = torch.tensor([[float(value) for value in row] for row in rewards])
    marked_BT = mark_rewards(segmenter(ids_BT, mask_BT), eos_BT, reward_BK)
    return [marked_T[:length].tolist() for marked_T, length in zip(marked_BT, length_B, strict=True)]


def marked_advantages(
    marked_BT: Tensor, mask_BT: Tensor, index: Sequence[Any], num_ranks: int, *, scale_by_std: bool
) -> Tensor:
    """Advantages (B, T) of marked rewards: those of `group_advantage` over K, hidden by `hide_units`.

    They are divided by K so that a loss that knows no K is a mean over ranks when it divides by lists.

    Args:
      marked_BT: float32, as `mark_rewards` made it; nothing may have been added to it or multiplied.
      index: the group's name of every list, in any order.

    Raises ConfigError for rewards without marks and for a `num_ranks` that the marks have no room for, and ValueError
    for another dtype.
    """
    if not 1 <= num_ranks < MAX_UNITS:
        raise ConfigError(f"num_ranks must be in 1..{MAX_UNITS - 1}, got {num_ranks}")
    unit_BT, value_BU = _read_rewards(marked_BT, mask_BT, num_ranks)
    numbers: dict[Any, int] = {}
    group_B = torch.tensor([numbers.setdefault(name, len(numbers)) for name in index], device=marked_BT.device)
    advantage_BK = group_advantage(value_BU[:, :num_ranks], group_B, scale_by_std=scale_by_std)
    advantage_BU = torch.cat([advantage_BK, value_BU[:, num_ranks:]], dim=1) / num_ranks
    return hide_units(Units(unit_BT, advantage_BU, torch.ones_like(advantage_BU), 1))


def _read_rewards(marked_BT: Tensor, mask_BT: Tensor, num_ranks: int) -> tuple[Tensor, Tensor]:
    """Unit of every token, -1 outside, and the value of every unit, (B, U), 0 where it has no token."""
    if marked_BT.dtype != torch.float32:
        raise ValueError(f"token_level_rewards must be float32, as mark_rewards makes them, got {marked_BT.dtype}")
    listed_BT = mask_BT.bool()
    ends_BT = (marked_BT != 0) & listed_BT
    bits_BT = marked_BT.contiguous().view(torch.int32)
    end_unit_BT = (bits_BT & _UNIT_MASK).long() - 1
    if bool((ends_BT & (end_unit_BT < 0)).any()):
        raise ConfigError(
            "rewards are not marked with ranks: what makes them must write them with "
            "rankgrpo.rollouts.integrations.marks.mark_rewards"
        )
    num_tokens = marked_BT.shape[1]
    position_T = torch.arange(num_tokens, device=marked_BT.device)
    place_BT = torch.where(ends_BT, position_T, num_tokens)
    end_BT = place_BT.flip(1).cummin(1).values.flip(1)  # the mark at or after every token
    unit_BT = end_unit_BT.gather(1, end_BT.clamp(max=num_tokens - 1))
    unit_BT = torch.where(listed_BT & (end_BT < num_tokens), unit_BT, -1)
    value_BT = (bits_BT & ~_UNIT_MASK).view(torch.float32)
    value_BT = torch.where(value_BT.abs() < 2 * _ZERO, 0.0, value_BT)
    num_units = max(int(unit_BT.max()) + 1, num_ranks)
    slot_BT = torch.where(ends_BT, end_unit_BT, num_units)
    value_BU = marked_BT.new_zeros(len(marked_BT), num_units + 1).scatter(1, slot_BT, value_BT)
    return unit_BT, value_BU[:, :num_units]
