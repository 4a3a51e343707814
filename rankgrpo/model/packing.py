"""Shared-prefix packing: whole groups in one flat row, each prompt once, then its lists.

A pack is a row of N tokens laid out as

    [prompts shared by several lists | their lists, group by group | whole sequences of one-list groups]

Positions of a list continue where its prompt ends. A group of one list shares nothing, so it stays an ordinary causal
sequence and costs what it costs anywhere. Nothing is padded inside a pack; only the (B, T) view of its targets is.

This module only counts, orders and indexes. The attention that makes the layout exact is in `attention`, the forward
pass over it in `forward`.
"""

# Shape letters: N packed tokens, M predicted tokens (all tokens of all lists, list by list), B lists, T longest list.

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and the lists sampled for it, as token ids: the very ids sampled, end token included.

    Errors: ValueError when the prompt, the group or one of its lists is empty.
    """

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    seen: tuple[int, ...] = ()
    """Catalog items that the lists do not name, where they are held to the catalog and what was seen is forbidden."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(
                "a group needs at least one prompt token (the first list token is predicted from it), got none"
            )
        if not self.completion_ids:
            raise ValueError("a group needs at least one list, got none")
        if empty := [i for i, ids in enumerate(self.completion_ids) if not ids]:
            raise ValueError(
                f"every list of a group needs at least one token, lists {empty} have none; drop them first"
            )

    @property
    def tokens_shared(self) -> int:
        """Tokens the model sees when the prompt is shared: P + sum of list lengths."""
        return len(self.prompt_ids) + sum(map(len, self.completion_ids))

    @property
    def tokens_dense(self) -> int:
        """Tokens the model sees when every list carries its own copy of the prompt."""
        return len(self.prompt_ids) * len(self.completion_ids) + sum(map(len, self.completion_ids))


class Spans:
    """Query spans and the key spans they look at, span i to span i. Each side covers its rows without gaps.

    q_sizes, k_sizes: Python ints, for backends that loop. cu_q, cu_k: the same as int32 cumulative sums on the device,
    for backends that take variable-length batches.
    """

    __slots__ = ("cu_k", "cu_q", "k_sizes", "max_k", "max_q", "q_sizes")

    def __init__(self, q_sizes: Sequence[int], k_sizes: Sequence[int], device: torch.device | str) -> None:
        self.q_sizes, self.k_sizes = list(q_sizes), list(k_sizes)
        self.max_q, self.max_k = max(self.q_sizes), max(self.k_sizes)
        self.cu_q = torch.tensor([0, *accumulate(self.q_sizes)], dtype=torch.int32, device=device)
        self.cu_k = torch.tensor([0, *accumulate(self.k_sizes)], dtype=torch.int32, device=device)


class SharedPrefixLayout:
    """Who attends to whom in a pack. Travels to the attention layers as the keyword argument `shared_prefix`.

    own: every span over itself, causally; spans are prompts, lists and one-list sequences, and cover all rows.
    cross: all lists of a group, as one span of queries, over their prompt, without a mask; None when nothing is shared.
    cross_rows: slice of the rows that are queries of `cross`; its keys are rows [0, cross_rows.start).
    max_length: longest prompt + list. num_calls: attention and recurrent layers that have used this layout, the proof
    of engagement. forks, num_forked: what `rankgrpo.model.recurrent` keeps here.

    Not a dataclass on purpose: data-parallel wrappers rebuild dataclass arguments, which would lose the count.
    """

    __slots__ = ("cross", "cross_rows", "forks", "max_length", "num_calls", "num_forked", "num_tokens", "own")

    def __init__(self, own: Spans, cross: Spans | None, cross_rows: slice, max_length: int) -> None:
        self.own, self.cross, self.cross_rows, self.max_length = own, cross, cross_rows, max_length
        self.num_tokens = sum(own.q_sizes)
        self.num_calls = self.num_forked = 0
        self.forks: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Groups as one forward pass. List b of (B, T) is the b-th list counting through the groups in the order given.

    input_ids_1N, position_ids_1N: what the model reads. source_row_M: the row whose hidden state predicts target m; for
    the first token of a list that is the last row of its prompt, so one row feeds G targets. target_ids_M: the targets.
    slot_M: where target m lies in a flattened (B, T). token_ids_BT is 0 where mask_BT is False.
    """

    input_ids_1N: Tensor
    position_ids_1N: Tensor
    source_row_M: Tensor
    target_ids_M: Tensor
    slot_M: Tensor
    token_ids_BT: Tensor
    mask_BT: Tensor
    layout: SharedPrefixLayout
    tokens_shared: int
    tokens_dense: int


def plan_micro_batches(groups: Sequence[Group], token_budget: int, *, dense: bool = False) -> list[list[int]]:
    """Split groups into as few micro-batches of at most `token_budget` packed tokens as balancing them allows.

    Longest first into the least loaded bin, with one bin more until every load fits; a group is never split, and one
    larger than the budget gets a micro-batch of its own. The same groups give the same plan on every machine; no groups
    give no micro-batch.

    dense: a group costs what it does when every list carries its own prompt. Returns lists of indices into `groups`,
    ascending inside a micro-batch.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1 token, got {token_budget}")
    cost = [group.tokens_dense if dense else group.tokens_shared for group in groups]
    order = sorted(range(len(groups)), key=lambda i: (-cost[i], i))
    too_big = [i for i in order if cost[i] > token_budget]
    rest = sum(cost) - sum(cost[i] for i in too_big)
    num_bins = len(too_big) + -(-rest // token_budget)
    while True:
        bins = _least_loaded(order, cost, num_bins)
        if all(len(members) == 1 or sum(cost[i] for i in members) <= token_budget for members in bins):
            return [sorted(members) for members in bins]
        num_bins += 1


def _least_loaded(order: Sequence[int], cost: Sequence[int], num_bins: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0, slot) for slot in range(num_bins)]
    for i in order:
        load, slot = heap[0]
        bins[slot].append(i)
        heapq.heapreplace(heap, (load + cost[i], slot))
    return bins


def build_pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> Pack:
    """Lay groups out as one pack (see the module text) with every index the forward pass and the loss need.

    Errors: ValueError without groups.
    """
    if not groups:
        raise ValueError("a pack needs at least one group, got none")
    shared = [group for group in groups if len(group.completion_ids) > 1]
    alone = [group for group in groups if len(group.completion_ids) == 1]
    spans = [(group.prompt_ids, 0) for group in shared]  # token ids and the position of the first
    spans += [(ids, len(group.prompt_ids)) for group in shared for ids in group.completion_ids]
    spans += [(group.prompt_ids + group.completion_ids[0], 0) for group in alone]
    positions = [range(first, first + len(ids)) for ids, first in spans]

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device)

    lists = [ids for group in groups for ids in group.completion_ids]
    longest = max(map(len, lists))
    slot_M = tensor([b * longest + t for b, ids in enumerate(lists) for t in range(len(ids))])
    target_ids_M = tensor(list(chain.from_iterable(lists)))
    token_ids_BT = target_ids_M.new_zeros(len(lists), longest)
    token_ids_BT.view(-1)[slot_M] = target_ids_M
    mask_BT = torch.zeros_like(token_ids_BT, dtype=torch.bool)
    mask_BT.view(-1)[slot_M] = True
    return Pack(
        input_ids_1N=tensor(list(chain.from_iterable(ids for ids, _ in spans)))[None],
        position_ids_1N=tensor(list(chain.from_iterable(positions)))[None],
        source_row_M=tensor(_source_rows(groups)),
        target_ids_M=target_ids_M,
        slot_M=slot_M,
        token_ids_BT=token_ids_BT,
        mask_BT=mask_BT,
        layout=_layout(shared, [len(ids) for ids, _ in spans], max(r.stop for r in positions), device),
        tokens_shared=sum(group.tokens_shared for group in groups),
        tokens_dense=sum(group.tokens_dense for group in groups),
    )


def _source_rows(groups: Sequence[Group]) -> list[int]:
    """Row that predicts each target, list by list: the prompt's last row, then the list's own rows but the last."""
    shared = [group for group in groups if len(group.completion_ids) > 1]
    prompt_row = 0
    list_row = sum(len(group.prompt_ids) for group in shared)
    alone_row = list_row + sum(len(ids) for group in shared for ids in group.completion_ids)
    rows: list[int] = []
    for group in groups:
        if len(group.completion_ids) == 1:
            first = alone_row + len(group.prompt_ids) - 1
            rows.extend(range(first, first + len(group.completion_ids[0])))
            alone_row += group.tokens_shared
            continue
        prompt_row += len(group.prompt_ids)
        for ids in group.completion_ids:
            rows.append(prompt_row - 1)
            rows.extend(range(list_row, list_row + len(ids) - 1))
            list_row += len(ids)
    return rows


def _layout(
    shared: Sequence[Group], sizes: Sequence[int], max_length: int, device: torch.device | str
) -> SharedPrefixLayout:
    own = Spans(sizes, sizes, device)
    if not shared:
        return SharedPrefixLayout(own, None, slice(0, 0), max_length)
    prompt_sizes = [len(group.prompt_ids) for group in shared]
    query_sizes = [sum(map(len, group.completion_ids)) for group in shared]
    start = sum(prompt_sizes)
    cross = Spans(query_sizes, prompt_sizes, device)
    return SharedPrefixLayout(own, cross, slice(start, start + sum(query_sizes)), max_length)
