"""A list on its way through the catalog's trie, token by token: what a sampler asks at every step."""

# Shape letters: W lists walked together, F allowed ids of all of them.

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rankgrpo.items.line_paths import ragged_range

if TYPE_CHECKING:
    from rankgrpo.items.trie import CatalogTrie


class ListWalk:
    """One list so far: what it has named, and what may follow. Made by `CatalogTrie.start`."""

    __slots__ = ("_closed", "_high", "_low", "_node", "_repeats", "_used", "done", "lines", "num_ranks", "trie")

    def __init__(self, trie: CatalogTrie, num_ranks: int, closed: list[int], *, repeats: bool):
        self.trie, self.num_ranks, self._repeats = trie, num_ranks, repeats
        self.lines: list[int] = []
        """The lines finished so far, in order; `items` has them as items."""
        self.done = False
        self._closed = closed  # lines from the start
        self._used: UsedLeaves | None = None
        self._enter_root()

    @property
    def rank(self) -> int:
        """The rank that is being written; num_ranks once the list is done."""
        return len(self.lines)

    @property
    def items(self) -> list[int]:
        """The item of every finished line, the first of those that share it."""
        return self.trie.item_of_line[self.lines].tolist() if self.lines else []

    @property
    def at_line_start(self) -> bool:
        return not self.done and self._node < self.trie.num_roots

    @property
    def node(self) -> int:
        """The trie's node that the list stands at; a root at the start of a line."""
        return self._node

    def allowed(self) -> np.ndarray:
        """The ids that may follow, sorted, int32; none once the list is done."""
        if self.done:
            return np.empty(0, np.int32)
        begin, end, closed = self.children()
        ids = self.trie.token[begin:end]
        return np.delete(ids, [child - begin for child in closed]) if closed else ids

    def follow(self) -> list[int]:
        """Take the ids beside which no other is allowed, up to the next choice or the end, and return them."""
        token, first_child, _ = self.trie.views
        run: list[int] = []
        while not self.done:
            node = self._node
            begin, end = first_child[node], first_child[node + 1]
            if end - begin == 1:
                # What is closed ends above it, for an only child has its parent's lines.
                child = begin
            else:
                closed = self.children()[2]
                if end - begin - len(closed) > 1:
                    break
                child = next(child for child in range(begin, end) if child not in closed)
            run.append(token[child])
            self._step(child, end)
        return run

    def advance(self, token_id: int) -> None:
        """Take one id. Raises ValueError when it is not allowed."""
        token = self.trie.views[0]
        if not self.done:
            begin, end, closed = self.children()
            child = bisect_left(token, token_id, begin, end)
            if child < end and token[child] == token_id and child not in closed:
                self._step(child, end)
                return
        raise ValueError(
            f"id {token_id} is not allowed at rank {self.rank} of a list of {self.num_ranks}: "
            + ("the list is done" if self.done else f"{len(self.allowed())} others are")
        )

    def copy(self) -> ListWalk:
        """The same list so far, to be gone on with apart."""
        other = object.__new__(ListWalk)
        other.trie, other.num_ranks, other._repeats = self.trie, self.num_ranks, self._repeats
        other.lines, other.done = self.lines.copy(), self.done
        other._closed, other._used = self._closed, self._used.copy()
        other._node, other._low, other._high = self._node, self._low, self._high
        return other

    def _enter_root(self) -> None:
        root = self.trie.root(len(self.lines), self.num_ranks)
        if self._used is None or self._used.root != root:
            self._used = UsedLeaves(self.trie, root, self._closed if self._repeats else self._closed + self.lines)
        self._node, self._low, self._high = root, root * self.trie.num_lines, (root + 1) * self.trie.num_lines

    def children(self) -> tuple[int, int, Sequence[int]]:
        """Of the node that the list stands at: its first child, the one after its last, and those that are closed."""
        first_child = self.trie.views[1]
        begin, end = first_child[self._node], first_child[self._node + 1]
        if self._node < self.trie.num_roots:
            return begin, end, self._used.closed_at_root
        return begin, end, self._used.closed_children(begin, end, self._low, self._high)

    def _step(self, child: int, end: int) -> None:
        _, first_child, first_leaf = self.trie.views
        if child + 1 < end:
            self._high = first_leaf[child + 1]
        self._node, self._low = child, first_leaf[child]
        if first_child[child] == first_child[child + 1]:
            line = self.trie.line_views[0][self._low]
            self.lines.append(line)
            if len(self.lines) == self.num_ranks:
                self.done = True
                return
            if not self._repeats:
                self._used.add(self._low)
            self._enter_root()


class UsedLeaves:
    """The leaves under one root that a list may not reach any more, and the root's children that this closes."""

    __slots__ = ("closed_at_root", "first_leaf", "leaves", "root", "_begin", "_end", "_high")

    def __init__(self, trie: CatalogTrie, root: int, lines: Sequence[int]):
        _, first_child, self.first_leaf = trie.views
        self.root, self._high = root, (root + 1) * trie.num_lines
        self._begin, self._end = first_child[root], first_child[root + 1]
        leaf_of_line, offset = trie.line_views[1], root * trie.num_lines
        self.leaves = sorted([leaf_of_line[offset + line] for line in lines])
        self.closed_at_root = self.closed_children(self._begin, self._end, offset, self._high)

    def copy(self) -> UsedLeaves:
        other = object.__new__(UsedLeaves)
        other.first_leaf, other.root, other._high = self.first_leaf, self.root, self._high
        other._begin, other._end = self._begin, self._end
        other.leaves, other.closed_at_root = self.leaves.copy(), self.closed_at_root
        return other

    def add(self, leaf: int) -> None:
        # One search instead of one for every leaf: no other child of the root can have closed.
        insort(self.leaves, leaf)
        child = bisect_right(self.first_leaf, leaf, self._begin, self._end) - 1
        low = self.first_leaf[child]
        high = self.first_leaf[child + 1] if child + 1 < self._end else self._high
        if bisect_left(self.leaves, high) - bisect_left(self.leaves, low) == high - low:
            self.closed_at_root = [*self.closed_at_root, child]

    def closed_children(self, begin: int, end: int, low: int, high: int) -> Sequence[int]:
        """Of the children begin .. end - 1, which have the leaves low .. high - 1, those with none left."""
        leaves, first_leaf = self.leaves, self.first_leaf
        place = bisect_left(leaves, low)
        if place == len(leaves) or leaves[place] >= high:
            return ()
        closed = []
        while place < len(leaves) and leaves[place] < high:
            child = bisect_right(first_leaf, leaves[place], begin, end) - 1
            child_high = first_leaf[child + 1] if child + 1 < end else high
            after = bisect_left(leaves, child_high, place)
            if after - place == child_high - first_leaf[child]:
                closed.append(child)
            place = after
        return closed


@dataclass(frozen=True, slots=True)
class AllowedBatch:
    """The allowed ids of W lists: those of list w are ids_F[start[w] : start[w + 1]], sorted.

    Example: AllowedBatch(ids_F=[5, 9, 7], start=[0, 2, 3]): 5 or 9 in the first list, 7 in the second.
    """

    ids_F: np.ndarray
    """int32"""
    start: np.ndarray
    """int64, W + 1 entries"""

    @property
    def row_F(self) -> np.ndarray:
        """The list of every id."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """(ids, mask), each (W, most ids of a list); ids are 0 where the mask is False."""
        size = np.diff(self.start)
        mask = np.arange(size.max(initial=0)) < size[:, None]
        ids = np.zeros(mask.shape, np.int32)
        ids[mask] = self.ids_F
        return ids, mask


def allowed_batch(trie: CatalogTrie, walks: Sequence[ListWalk]) -> AllowedBatch:
    """`CatalogTrie.allowed_batch`."""
    begins, ends, closed, closed_of = [], [], [], []
    for row, walk in enumerate(walks):
        if walk.done:
            raise ValueError(f"list {row} of {len(walks)} is done: nothing may follow")
        begin, end, closed_here = walk.children()
        begins.append(begin)
        ends.append(end)
        closed += closed_here
        closed_of += [row] * len(closed_here)
    begin, size = np.array(begins, np.int64), np.array(ends, np.int64) - np.array(begins, np.int64)
    ids = trie.token[ragged_range(begin, size)]
    if closed:
        start = np.cumsum(size) - size
        row = np.array(closed_of)
        ids = np.delete(ids, start[row] + np.array(closed) - begin[row])
        size = size - np.bincount(row, minlength=len(size))
    return AllowedBatch(ids, np.concatenate([[0], np.cumsum(size)]))
