"""What was allowed at every token of given lists: what a trainer asks once a batch.

Only tokens that were choices have an entry; the others were forced. `for_head` is the plan that
`rankgrpo.model.allowed.allowed_logprobs` computes with.
"""

# Shape letters: B lists, M tokens of all lists one after the other, C of them choices, X closed children of all
# choices.

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rankgrpo.items.allowed_ids import AllowedIds, Block, Ragged
from rankgrpo.items.line_paths import ragged_range
from rankgrpo.items.walk import UsedLeaves

if TYPE_CHECKING:
    from rankgrpo.items.trie import CatalogTrie

BLOCK_ENTRIES = 2048  # from so many entries on, a node's rows are one dense product


@dataclass(frozen=True, slots=True)
class Choices:
    """The tokens of B lists that were choices among several allowed ids."""

    trie: CatalogTrie
    length: np.ndarray
    """(B,) tokens of every list; token t of list b is number start[b] + t of all."""
    token_C: np.ndarray
    """Which tokens are choices, by their number, ascending."""
    node_C: np.ndarray
    """The trie's node before each."""
    child_C: np.ndarray
    """The child that was taken."""
    choice_X: np.ndarray
    """Which choice a closed child belongs to."""
    closed_X: np.ndarray
    """Children that were closed to a list: named by it, or seen."""
    lines: list[list[int]]
    """The catalog lines that each list finished."""

    @property
    def num_tokens(self) -> int:
        return int(self.length.sum())

    @property
    def start(self) -> np.ndarray:
        """(B,) number of every list's first token."""
        return np.cumsum(self.length) - self.length

    @property
    def is_choice(self) -> np.ndarray:
        """(M,) bool"""
        mask = np.zeros(self.num_tokens, bool)
        mask[self.token_C] = True
        return mask

    @property
    def at_root_C(self) -> np.ndarray:
        """(C,) bool: whether a choice stands at the start of a line; node_C is then the root."""
        return self.node_C < self.trie.num_roots

    @property
    def num_allowed(self) -> np.ndarray:
        """(M,) int64: how many ids were allowed, 1 where forced."""
        counts = np.ones(self.num_tokens, np.int64)
        counts[self.token_C] = self._num_children() - np.bincount(self.choice_X, minlength=len(self.token_C))
        return counts

    @property
    def items(self) -> list[list[int]]:
        """The item of every finished line, the first of those that share it."""
        return [self.trie.item_of_line[lines].tolist() if lines else [] for lines in self.lines]

    def allowed_at(self, token: int) -> np.ndarray:
        """The ids allowed at a choice, given the token's number. For a look at one; `for_head` does all."""
        choice = int(np.searchsorted(self.token_C, token))
        if choice == len(self.token_C) or self.token_C[choice] != token:
            raise ValueError(f"token {token} is no choice")
        begin = self.trie.first_child[self.node_C[choice]]
        children = np.arange(begin, self.trie.first_child[self.node_C[choice] + 1])
        return self.trie.token[children[~np.isin(children, self.closed_X[self.choice_X == choice])]]

    def of_lists(self, lists: Sequence[int], length: Sequence[int] | None = None) -> Choices:
        """The same for some of the lists, in the order given; `length`: for so many tokens of each.

        `lines` stay those of whole lists.
        """
        lists = np.asarray(lists, np.int64)
        length = self.length[lists] if length is None else np.asarray(length, np.int64)
        list_C = np.searchsorted(self.start, self.token_C, side="right") - 1
        begin, end = np.full(len(self.length), -1), np.zeros(len(self.length), np.int64)
        begin[lists] = np.cumsum(length) - length
        end[lists] = self.start[lists] + length
        kept = (self.token_C < end[list_C]).nonzero()[0]
        token = self.token_C[kept] - self.start[list_C[kept]] + begin[list_C[kept]]
        order = np.argsort(token, kind="stable")
        kept = kept[order]
        place = np.full(len(self.token_C), -1)
        place[kept] = np.arange(len(kept))
        choice_X = place[self.choice_X]
        by_choice = np.argsort(choice_X, kind="stable")
        by_choice = by_choice[choice_X[by_choice] >= 0]
        return Choices(
            self.trie,
            length,
            token[order],
            self.node_C[kept],
            self.child_C[kept],
            choice_X[by_choice],
            self.closed_X[by_choice],
            [self.lines[which] for which in lists.tolist()],
        )

    def _num_children(self) -> np.ndarray:
        return (self.trie.first_child[self.node_C + 1] - self.trie.first_child[self.node_C]).astype(np.int64)

    def for_head(self, *, block_entries: int = BLOCK_ENTRIES) -> AllowedIds:
        """The plan of the head over allowed ids, on the CPU.

        Choices at one node share their ids. Where choices times ids reach `block_entries` they are a block.
        """
        first_child, token, num_roots = self.trie.first_child, self.trie.token, self.trie.num_roots
        place_C = self.child_C - first_child[self.node_C]  # of the id taken among the node's
        place_X = self.closed_X - first_child[self.node_C[self.choice_X]]
        size_C = self._num_children()
        # Roots that begin with the same ids are as one; what differs is only how their lines end.
        group_C = np.where(self.at_root_C, self.trie.like_root[np.minimum(self.node_C, num_roots - 1)], self.node_C)
        by_node = np.argsort(group_C, kind="stable")
        node, begin_of, count = np.unique(group_C[by_node], return_index=True, return_counts=True)
        fan_out = first_child[node + 1] - first_child[node]
        wide = count * fan_out >= block_entries
        in_block = np.zeros(len(self.node_C), bool)
        blocks = []
        for here, begin, size in zip(node[wide], begin_of[wide], count[wide], strict=True):
            rows = by_node[begin : begin + size]
            in_block[rows] = True
            closed = self._closed_within(rows)
            blocks.append((rows, token[first_child[here] : first_child[here + 1]], (closed[0], place_X[closed[1]])))
        rows = (~in_block).nonzero()[0]
        begin_F, size = first_child[self.node_C[rows]].astype(np.int64), size_C[rows]
        child_F, row_F = ragged_range(begin_F, size), np.repeat(np.arange(len(rows)), size)
        begin = np.cumsum(size) - size
        target = begin + place_C[rows]
        closed_row, which = self._closed_within(rows)
        if len(which):
            keep = np.ones(len(child_F), bool)
            keep[begin[closed_row] + place_X[which]] = False
            target = np.cumsum(keep)[target] - 1
            child_F, row_F = child_F[keep], row_F[keep]
        parts = [token[child_F], *(ids for _, ids, _ in blocks)]
        ids_U, column = np.unique(np.concatenate(parts), return_inverse=True)
        columns = np.split(column, np.cumsum([len(part) for part in parts])[:-1])
        tensor = torch.from_numpy
        return AllowedIds(
            num_tokens=self.num_tokens,
            ids_U=tensor(ids_U.astype(np.int64)),
            blocks=tuple(
                Block(
                    row_R=tensor(self.token_C[own_rows]),
                    column_C=tensor(own_columns),
                    target_R=tensor(place_C[own_rows]),
                    closed_row_X=tensor(closed_row),
                    closed_X=tensor(closed),
                )
                for (own_rows, _, (closed_row, closed)), own_columns in zip(blocks, columns[1:], strict=True)
            ),
            ragged=Ragged(
                row_R=tensor(self.token_C[rows]),
                place_F=tensor(row_F),
                column_F=tensor(columns[0]),
                target_R=tensor(target),
            ),
        )

    def _closed_within(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The closed children of given choices: the place in `rows` of each one's choice, and which of the X it is."""
        place = np.full(len(self.token_C), -1)
        place[rows] = np.arange(len(rows))
        place_X = place[self.choice_X]
        which = (place_X >= 0).nonzero()[0]
        return place_X[which], which


def read_choices(
    trie: CatalogTrie, lists: Sequence[Sequence[int]], terms: list[tuple[int, list[int]]], *, repeats: bool
) -> Choices:
    """`CatalogTrie.choices`; `terms` has the ranks of every list and the lines closed to it from the start."""
    rows: list[tuple[int, int, int]] = []
    closed_rows: list[tuple[int, int]] = []
    lines = []
    number = 0
    for which, (ids, (num_ranks, closed)) in enumerate(zip(lists, terms, strict=True)):
        lines.append(_read_list(trie, which, ids, num_ranks, closed, repeats, number, rows, closed_rows))
        number += len(ids)
    token_C, node_C, child_C = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    choice_X, closed_X = np.array(closed_rows, np.int64).reshape(-1, 2).T.copy()
    length = np.fromiter(map(len, lists), np.int64, len(lists))
    return Choices(trie, length, token_C, node_C, child_C, choice_X, closed_X, lines)


def _read_list(
    trie: CatalogTrie,
    which: int,
    ids: Sequence[int],
    num_ranks: int,
    closed: list[int],
    repeats: bool,
    number: int,
    rows: list[tuple[int, int, int]],
    closed_rows: list[tuple[int, int]],
) -> list[int]:
    """Walk one list, adding its choices to `rows` and their closed children to `closed_rows`; returns its lines.

    `ListWalk.advance` in one loop, several times as fast; tests hold the two to each other.
    """
    token, first_child, first_leaf = trie.views
    line_of_leaf, N = trie.line_views[0], trie.num_lines
    lines: list[int] = []
    root = node = trie.root(0, num_ranks)
    used = UsedLeaves(trie, root, closed)
    low, high = root * N, (root + 1) * N
    begin, end = first_child[root], first_child[root + 1]
    for position, token_id in enumerate(ids):
        if end - begin == 1:  # an only child has its parent's leaves
            child = begin
            if token[child] != token_id:
                raise ValueError(_not_allowed(which, position, token_id, lines, num_ranks))
        else:
            child = bisect_left(token, token_id, begin, end)
            shut = used.closed_at_root if node == root else used.closed_children(begin, end, low, high)
            if child == end or token[child] != token_id or child in shut:
                raise ValueError(_not_allowed(which, position, token_id, lines, num_ranks))
            if end - begin - len(shut) > 1:
                closed_rows += [(len(rows), other) for other in shut]
                rows.append((number + position, node, child))
            if child + 1 < end:
                high = first_leaf[child + 1]
            low = first_leaf[child]
        node = child
        begin, end = first_child[child], first_child[child + 1]
        if begin == end:
            line = line_of_leaf[low]
            lines.append(line)
            if len(lines) == num_ranks:
                continue  # a token after the end finds no children
            if not repeats:
                used.add(low)
            root = node = trie.root(len(lines), num_ranks)
            if root != used.root:
                used = UsedLeaves(trie, root, closed if repeats else closed + lines)
            low, high = root * N, (root + 1) * N
            begin, end = first_child[root], first_child[root + 1]
    return lines


def _not_allowed(which: int, position: int, token_id: int, lines: list[int], num_ranks: int) -> str:
    where = f"list {which}, token {position}: id {token_id} is not allowed"
    if len(lines) == num_ranks:
        return f"{where}, the list of {num_ranks} lines is already done"
    return f"{where} at rank {len(lines)} of {num_ranks}: not the catalog's ids there, or a line that is forbidden"
