"""The unit that an importance ratio and an advantage belong to: a rank, a token or a whole list.

`rank_grpo_loss` knows units only by number. This module gives every token its number and every number its advantage and
weight, so that one loss is Rank-GRPO (unit="rank"), GRPO (unit="token") or GSPO (unit="list"):

    units = make_units(rank_BT, eos_BT, advantage_BK, unit="rank", num_ranks=20)
    loss, metrics = rank_grpo_loss(
        logp_BT,
        old_logp_BT,
        units.unit_BT,
        units.advantage_BU,
        weight_BK=units.weight_BU,
        denominator=units.denominator,
    )

The penalties of the paper (arXiv 2510.20150, section 2.3.3 and appendix C) get units of their own, so that they move
the tokens they are about and no others. They are advantages, added after normalisation as in the released code; as
rewards they would vanish in every group whose lists all fail alike. Only the list itself is read, never its group.

For trainers that hold one advantage a token: `token_advantage` spreads the ranks' over them; `hide_units` also keeps
neighbouring units apart, and `units_from_advantage` finds them again on the other side of such a trainer.
"""

# Shape letters: B lists, T completion tokens, K ranks (or 1: one advantage a list), U units, E units beyond the ranks.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Unit = Literal["rank", "token", "list"]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What `rank_grpo_loss` takes as rank_BT, advantage_BK, weight_BK and denominator."""

    unit_BT: Tensor
    """int64, unit of every token; -1 outside the list."""
    advantage_BU: Tensor
    """A unit that the list does not have keeps its advantage if it is a rank, and has 0 if it is not."""
    weight_BU: Tensor
    """Weight of a unit: 1; for unit="token" with mean_by_list 1/|y|, |y| the tokens of the list."""
    denominator: int | Tensor
    """This call's share, for reduction="rank": B*K for ranks, whatever the penalties; for tokens without mean_by_list
    their number (0-dim tensor); else B. Sum it over the step."""

    def to(self, device: torch.device) -> Units:
        """These units on another device; the denominator stays where it is."""
        moved = {name: getattr(self, name).to(device) for name in ("unit_BT", "advantage_BU", "weight_BU")}
        return replace(self, **moved)


def make_units(
    rank_BT: Tensor,
    eos_BT: Tensor,
    advantage_BK: Tensor,
    *,
    unit: Unit = "rank",
    num_ranks: int,
    overflow_penalty: float = -0.1,
    early_eos_penalty: float = -0.1,
    full_list_bonus: float = 0.0,
    unit_cap: int | None = None,
    mean_by_list: bool = True,
) -> Units:
    """Assign tokens, advantages and weights to units.

    unit="rank" (Rank-GRPO): units 0..K-1 are the ranks. Each item beyond them is a unit with advantage
      `overflow_penalty`. The EOS of a list with fewer than K items is a unit with advantage `early_eos_penalty`, taken
      out of the last item; 0 leaves it there, as the paper's segmentation does. The EOS of a list of K items belongs to
      the last item, unless `full_list_bonus` is not 0 (the released code: +0.1): then it is a unit with that advantage.
      The EOS of an overflowing list belongs to its last item. A list cut off without EOS did not stop early and pays no
      penalty.
    unit="token": every token is a unit. With one advantage a list, (B, 1), this is GRPO: all tokens share it and the
      penalties, which belong to ranks, do not apply. With one a rank, (B, K), a token has the advantage it would have
      under unit="rank", penalties included (what the released code optimises at one update a batch).
    unit="list" (GSPO): all tokens of a list are one unit; one advantage a list, (B, 1); penalties do not apply.

    Args:
      rank_BT: integer rank of every token, -1 outside the list, unbounded above (`RankSegmenter`). EOS has a rank.
      eos_BT: bool, True at end-of-sequence tokens.
      mean_by_list: for unit="token", True weighs a token 1/|y| (GRPO, Eq. 3: lists count the same); False weighs it 1,
        for a mean over the tokens of the batch (DAPO, arXiv 2503.14476) or, with B * max_new_tokens as denominator, a
        sum whose scale no length changes (Dr. GRPO, arXiv 2503.20783).
      unit_cap: bound on the units beyond K in a list; items past it share the last one. None counts what is there,
        which waits for the device once; T is never exceeded.

    Returns: Units. Raises ValueError for wrong shapes, dtypes or options.
    """
    _check(rank_BT, eos_BT, advantage_BK, unit, num_ranks, unit_cap)
    if unit_cap is None:
        unit_cap = max(int(rank_BT.max()) + 1 - num_ranks, 1) if unit != "list" else 1
    return unchecked_make_units(
        rank_BT,
        eos_BT,
        advantage_BK,
        unit=unit,
        num_ranks=num_ranks,
        overflow_penalty=overflow_penalty,
        early_eos_penalty=early_eos_penalty,
        full_list_bonus=full_list_bonus,
        unit_cap=unit_cap,
        mean_by_list=mean_by_list,
    )


def unchecked_make_units(
    rank_BT: Tensor,
    eos_BT: Tensor,
    advantage_BK: Tensor,
    *,
    unit: Unit = "rank",
    num_ranks: int,
    overflow_penalty: float = -0.1,
    early_eos_penalty: float = -0.1,
    full_list_bonus: float = 0.0,
    unit_cap: int,
    mean_by_list: bool = True,
) -> Units:
    """`make_units` without its checks and without waiting for the device, for tracers and compilers."""
    num_lists, num_tokens = rank_BT.shape
    listed_BT = rank_BT >= 0
    if unit == "list":
        return Units(torch.where(listed_BT, 0, -1), advantage_BK, torch.ones_like(advantage_BK), num_lists)
    if unit == "token" and advantage_BK.shape[1] == 1:
        advantage_BU = advantage_BK.expand(num_lists, num_tokens)
        return _token_units(listed_BT, advantage_BU, mean_by_list)

    eos_BT = eos_BT & listed_BT
    num_items_B = _count_items(rank_BT, eos_BT)
    early_B = eos_BT.any(1) & (num_items_B < num_ranks)
    full_B = eos_BT.any(1) & (num_items_B == num_ranks)
    split_B = (early_B & (early_eos_penalty != 0)) | (full_B & (full_list_bonus != 0))
    unit_BT = rank_BT.long().clamp(max=num_ranks + unit_cap - 1)
    # A list that overflows splits off no EOS, so both kinds of extra unit can start at K.
    unit_BT = torch.where(eos_BT & split_B[:, None], num_ranks, unit_BT)

    extra_E = rank_BT.new_ones(unit_cap).cumsum(0) - 1  # torch.arange takes no device from a traced tensor
    dtype = advantage_BK.dtype
    extra_BE = (extra_E < (num_items_B - num_ranks)[:, None]).to(dtype) * overflow_penalty
    end_B = early_B.to(dtype) * early_eos_penalty + full_B.to(dtype) * full_list_bonus
    extra_BE = extra_BE + (extra_E == 0) * end_B[:, None]
    advantage_BU = torch.cat([advantage_BK, extra_BE], dim=1)
    if unit == "token":
        return _token_units(listed_BT, advantage_BU.gather(1, unit_BT.clamp(min=0)), mean_by_list)
    return Units(unit_BT, advantage_BU, torch.ones_like(advantage_BU), num_lists * num_ranks)


def take_lists(units: Units, lists: Sequence[int], length: Sequence[int], *, at_least: int = 1) -> Units:
    """The units of some of the lists, the tokens of each cut to its `length`, and those in use, `at_least` so many.

    The denominator stays that of all lists. Raises ValueError without lists.
    """
    if not lists:
        raise ValueError("expected at least one list, got none")
    unit_BT = units.unit_BT[lists]
    num_units = max(int(unit_BT.max()) + 1, at_least)
    unit_BT = unit_BT[:, : max(length)]
    length_B = torch.tensor(length, device=unit_BT.device)
    kept_BT = torch.arange(unit_BT.shape[1], device=unit_BT.device) < length_B[:, None]
    return replace(
        units,
        unit_BT=unit_BT.where(kept_BT, -1),
        advantage_BU=units.advantage_BU[lists, :num_units],
        weight_BU=units.weight_BU[lists, :num_units],
    )


def live_lengths(units: Units) -> Tensor:
    """(B,) int64: the tokens of every list up to its last one with a gradient, 0 where none has one.

    Without a KL term a unit of advantage or weight 0 moves nothing, and no token reads a later one: the loss and its
    gradient are those of the lists cut to these lengths.
    """
    live_BU = (units.advantage_BU * units.weight_BU) != 0
    live_BT = (units.unit_BT >= 0) & live_BU.gather(1, units.unit_BT.clamp(min=0))
    position_T = torch.arange(1, units.unit_BT.shape[1] + 1, device=live_BT.device)
    return torch.where(live_BT, position_T, 0).amax(1)


def token_advantage(rank_BT: Tensor, advantage_BK: Tensor, *, mean_by_rank: bool = True) -> Tensor:
    """The advantage of every token, (B, T): that of its rank, over the number of the rank's tokens; 0 outside.

    a_{i,t} = A_{i,k} / |y_i^(k)|  for the tokens t of rank k

    A trainer whose loss is -(1/Z) sum_t ratio_t a_t, with Z the lists times K of the whole step, then follows the
    gradient of Eq. 6 as long as it is on-policy: there every ratio is 1, and the geometric mean of a rank's tokens has
    the gradient 1/|y^(k)| at each. Off-policy the ratio is a token's, so the loss is another one.

    Args:
      rank_BT: integer; tokens with rank < 0 or >= K get 0. Units of `make_units` may stand for ranks.
      mean_by_rank: False leaves out the division: every token has the advantage of its rank.

    Raises ValueError for wrong shapes or dtypes.
    """
    if rank_BT.ndim != 2 or rank_BT.is_floating_point() or rank_BT.dtype == torch.bool:
        raise ValueError(f"rank_BT must be integer (B, T), got {rank_BT.dtype} {tuple(rank_BT.shape)}")
    if advantage_BK.ndim != 2 or len(advantage_BK) != len(rank_BT) or not advantage_BK.is_floating_point():
        raise ValueError(
            f"advantage_BK must be floating point ({len(rank_BT)}, K), got {advantage_BK.dtype} "
            f"{tuple(advantage_BK.shape)}"
        )
    inside_BT = (rank_BT >= 0) & (rank_BT < advantage_BK.shape[1])
    slot_BT = torch.where(inside_BT, rank_BT, 0).long()
    if mean_by_rank:
        count_BK = torch.zeros_like(advantage_BK).scatter_add(1, slot_BT, inside_BT.to(advantage_BK.dtype))
        advantage_BK = advantage_BK / count_BK.clamp(min=1)
    return torch.where(inside_BT, advantage_BK.gather(1, slot_BT), 0.0)


# The lowest bits of a hidden advantage: 0000 in a list's even units, 1000 in its odd ones. Neighbours then differ by
# 8 units in the last place at least, which three roundings of a factor cannot bring together.
_MARK_BITS, _ODD = 15, 8
# Advantages below the first count as 0 and are written as the second; what is read below the third is 0 again. Between
# them lies the room for the factors that a trainer applies on the way.
_SMALLEST, _HIDDEN_ZERO, _READ_AS_ZERO = 2.0**-60, 2.0**-100, 2.0**-80
_LARGEST = 2.0**100


def hide_units(units: Units) -> Tensor:
    """Advantage times weight of every token, (B, T) float32, in which neighbouring units differ.

    For hooks that pass (log-prob, old log-prob, advantage, mask) and nothing else: a unit begins where the advantage
    changes. Neighbours of one advantage are moved apart in the lowest four bits, by 1e-6 of the advantage at most, and
    0 is written as 2^-100. Tokens outside are 0. A trainer may multiply a list's advantages by a number of a size
    between 2^-19 and 2^19 on the way; what casts them to half precision or adds to them loses the boundaries.

    Raises ValueError where a unit's tokens are parted by another unit's, or an advantage is not finite or too large.
    """
    listed_BT = units.unit_BT >= 0
    begins_BT, run_BT = _runs(units.unit_BT, listed_BT)
    num_runs_BU = torch.zeros_like(units.advantage_BU, dtype=torch.int64)
    num_runs_BU = num_runs_BU.scatter_add(1, units.unit_BT.clamp(min=0), begins_BT.long())
    if bool((num_runs_BU > 1).any()):
        raise ValueError("tokens of one unit are parted by those of another; such units cannot be hidden in advantages")
    advantage_BT = (units.advantage_BU * units.weight_BU).float().gather(1, units.unit_BT.clamp(min=0))
    if not bool((advantage_BT[listed_BT].abs() < _LARGEST).all()):
        raise ValueError("an advantage is not finite, or 2^100 or more")
    advantage_BT = torch.where(advantage_BT.abs() < _SMALLEST, _HIDDEN_ZERO, advantage_BT)
    bits_BT = advantage_BT.contiguous().view(torch.int32)
    nearest_BT, odd_BT = (bits_BT + _ODD) & ~_MARK_BITS, (bits_BT & ~_MARK_BITS) | _ODD
    marked_BT = torch.where(run_BT % 2 == 0, nearest_BT, odd_BT).view(torch.float32)
    return torch.where(listed_BT, marked_BT, 0.0)


def units_from_advantage(advantage_BT: Tensor, mask_BT: Tensor, *, num_ranks: int) -> Units:
    """The units that `hide_units` hid, numbered 0, 1, ... in the order of a list's tokens; U is T.

    Those without tokens are gone, so numbers differ from the original ones where a rank had none; loss and gradient
    differ by the constant that such ranks add. The weight is 1, the denominator B * num_ranks. It does not wait for the
    device.

    Args:
      advantage_BT: float32, as `hide_units` made it, or times one number a list.
      mask_BT: the tokens of the lists, bool or numbers of which 0 means outside. Those that `hide_units` left out,
        which have the advantage 0, are no unit.

    Raises ValueError for another dtype or shape.
    """
    if advantage_BT.ndim != 2 or advantage_BT.dtype != torch.float32:
        raise ValueError(
            f"advantage_BT must be float32 (B, T), got {advantage_BT.dtype} {tuple(advantage_BT.shape)}: other types "
            "have no room for the hidden boundaries"
        )
    if mask_BT.shape != advantage_BT.shape:
        raise ValueError(f"mask_BT must be {tuple(advantage_BT.shape)}, got {tuple(mask_BT.shape)}")
    listed_BT = (mask_BT != 0) & (advantage_BT != 0)
    _, run_BT = _runs(advantage_BT, listed_BT)
    clean_BT = torch.where(advantage_BT.abs() < _READ_AS_ZERO, 0.0, advantage_BT)
    unit_BT = torch.where(listed_BT, run_BT, -1)
    # Tokens of one unit hold the same number, so it does not matter which of them writes it.
    slot_BT = torch.where(listed_BT, run_BT, advantage_BT.shape[1])
    advantage_BU = advantage_BT.new_zeros(len(advantage_BT), advantage_BT.shape[1] + 1).scatter(1, slot_BT, clean_BT)
    advantage_BU = advantage_BU[:, :-1]
    return Units(unit_BT, advantage_BU, torch.ones_like(advantage_BU), len(advantage_BT) * num_ranks)


def _runs(label_BT: Tensor, listed_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where a run of equal labels begins, and the number of every token's run; skips what is not listed."""
    position_BT = torch.where(listed_BT, torch.arange(label_BT.shape[1], device=label_BT.device), -1)
    last_BT = position_BT.cummax(1).values  # the last listed token up to here
    before_BT = torch.nn.functional.pad(last_BT[:, :-1], (1, 0), value=-1)
    label_before_BT = label_BT.gather(1, before_BT.clamp(min=0))
    begins_BT = listed_BT & ((before_BT < 0) | (label_BT != label_before_BT))
    return begins_BT, begins_BT.cumsum(1) - 1


def _count_items(rank_BT: Tensor, eos_BT: Tensor) -> Tensor:
    """Items of every list, (B,). EOS counts: a token that crosses a line break opens a line on which EOS may be alone.

    An EOS with nothing before it is no item.
    """
    has_text_B = ((rank_BT >= 0) & ~eos_BT).any(1)
    return torch.where(has_text_B, rank_BT.amax(1) + 1, 0)


def _token_units(listed_BT: Tensor, advantage_BT: Tensor, mean_by_list: bool) -> Units:
    """Unit t is token t. Tokens outside the list are no unit, so their advantage is 0."""
    num_lists, num_tokens = listed_BT.shape
    position_T = torch.arange(num_tokens, device=listed_BT.device)
    advantage_BT = torch.where(listed_BT, advantage_BT, 0.0)
    unit_BT = torch.where(listed_BT, position_T, -1)
    if not mean_by_list:
        return Units(unit_BT, advantage_BT, torch.ones_like(advantage_BT), listed_BT.sum())
    length_B1 = listed_BT.sum(1, keepdim=True).clamp(min=1)
    weight_BT = (1.0 / length_B1.to(advantage_BT.dtype)).expand(num_lists, num_tokens)
    return Units(unit_BT, advantage_BT, weight_BT, num_lists)


def _check(
    rank_BT: Tensor, eos_BT: Tensor, advantage_BK: Tensor, unit: str, num_ranks: int, unit_cap: int | None
) -> None:
    if unit not in ("rank", "token", "list"):
        raise ValueError(f"unit must be 'rank', 'token' or 'list', got {unit!r}")
    if num_ranks < 1 or (unit_cap is not None and unit_cap < 1):
        raise ValueError(f"num_ranks and unit_cap must be >= 1, got {num_ranks} and {unit_cap}")
    if rank_BT.ndim != 2 or rank_BT.numel() == 0 or rank_BT.is_floating_point() or rank_BT.dtype == torch.bool:
        raise ValueError(f"rank_BT must be integer (B, T), not empty; got {rank_BT.dtype} {tuple(rank_BT.shape)}")
    if eos_BT.shape != rank_BT.shape or eos_BT.dtype != torch.bool:
        raise ValueError(f"eos_BT must be bool {tuple(rank_BT.shape)}, got {eos_BT.dtype} {tuple(eos_BT.shape)}")
    columns = {"rank": (num_ranks,), "token": (1, num_ranks), "list": (1,)}[unit]
    if advantage_BK.ndim != 2 or advantage_BK.shape[0] != rank_BT.shape[0] or advantage_BK.shape[1] not in columns:
        wanted = " or ".join(f"({rank_BT.shape[0]}, {count})" for count in dict.fromkeys(columns))
        raise ValueError(f"advantage_BK for unit={unit!r} must be {wanted}, got {tuple(advantage_BK.shape)}")
