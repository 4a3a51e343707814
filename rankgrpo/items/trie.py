"""The catalog as a token trie: which ids may follow in a list that names catalog lines and nothing else.

A path from a root to a leaf is a line's ids as the tokenizer itself writes them (its canonical ids, no others), and a
root stands for a place in the list: the first line, those between, the last (which ends with the end token) and the
only one. Places with the same ids share a root; for most tokenizers there are two. What may follow is a function of the
ids of the list alone: `choices` reads whole lists for a trainer, `start` walks one for a sampler.

Nodes are numbered breadth first with a node's children side by side, sorted by id, so three integers a node hold the
trie. `leaf` numbers run through each root's paths in sorted order: the lines under a node are one interval of them. A
list's own lines are thus a few sorted numbers, and a child is closed when its whole interval is among them.
"""

# Shape letters: N lines, R roots, E = R * N paths, S nodes (roots included), I items.

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from rankgrpo.items.choices import Choices, read_choices
from rankgrpo.items.line_paths import LinePaths, PathsByPlace, read_line_paths
from rankgrpo.items.walk import AllowedBatch, ListWalk, allowed_batch

Forbid = Literal["none", "repeats", "repeats+seen"]
FORBID = ("none", "repeats", "repeats+seen")


class CatalogTrie:
    """The lines of a catalog as paths of token ids, for lists of `num_ranks` lines or another number.

    Example: CatalogTrie.build(["Heat (1995)", "Thief (1981)", "It (2017)"], tokenizer, num_ranks=2, eos_id=2)
    """

    def __init__(self, paths: PathsByPlace, line_of_item: np.ndarray, *, num_ranks: int, eos_id: int, seconds: float):
        self.num_ranks, self.eos_id, self.seconds = num_ranks, eos_id, seconds
        self.num_lines = len(paths.first)
        self.line_of_item = line_of_item
        """(I,) int32: equal lines of several items are one line."""
        self.item_of_line = np.unique(line_of_item, return_index=True)[1].astype(np.int32)
        """(N,) int32: the first of the items that share a line."""
        places = [paths.first, paths.middle, paths.last, *([] if paths.only is None else [paths.only])]
        distinct = [place for i, place in enumerate(places) if all(place is not other for other in places[:i])]
        root_of = [next(r for r, own in enumerate(distinct) if own is place) for place in places]
        self.root_first, self.root_middle, self.root_last = root_of[:3]
        self.root_only = root_of[3] if paths.only is not None else None
        self.num_roots = len(distinct)
        arrays = _grow(distinct)
        self.token, self.first_child, self.first_leaf, self.level_start, self.line_of_leaf = arrays
        """token (S,), -1 for a root; first_child (S + 1,); first_leaf (S,); line_of_leaf (E,): all int32."""
        self.like_root = np.array([self._first_like(root) for root in range(self.num_roots)])
        """(R,) the first root whose lines begin with the same ids."""
        self.leaf_of_line = np.empty_like(self.line_of_leaf)
        """(E,) int32: of line n under root r at r * N + n."""
        root_E = np.repeat(np.arange(self.num_roots, dtype=np.int32), self.num_lines)
        self.leaf_of_line[root_E * self.num_lines + self.line_of_leaf] = np.arange(len(root_E), dtype=np.int32)
        # Reading single numbers out of a memoryview takes a third of the time it takes out of an array.
        self.views = tuple(memoryview(a) for a in (self.token, self.first_child, self.first_leaf))
        self.line_views = (memoryview(self.line_of_leaf), memoryview(self.leaf_of_line))

    @classmethod
    def build(cls, lines: Sequence[str], tokenizer, *, num_ranks: int, eos_id: int) -> CatalogTrie:
        """The trie of a catalog's lines, item i's at place i; `eos_id` is the id that ends a list.

        Raises ValueError for more ranks than distinct lines, and for what `read_line_paths` refuses.
        """
        began = time.perf_counter()
        if num_ranks < 1:
            raise ValueError(f"a list has at least 1 rank, got num_ranks={num_ranks}")
        if not lines:
            raise ValueError("the catalog is empty; a list needs lines to name")
        line_of_text: dict[str, int] = {}
        line_of_item = np.fromiter(
            (line_of_text.setdefault(line, len(line_of_text)) for line in lines), np.int32, len(lines)
        )
        distinct = lines if len(line_of_text) == len(lines) else list(line_of_text)
        del line_of_text
        if num_ranks > len(distinct):
            raise ValueError(
                f"a list of {num_ranks} ranks needs as many distinct lines, the catalog has {len(distinct)}"
            )
        paths = read_line_paths(distinct, tokenizer, eos_id=eos_id, num_ranks=num_ranks)
        trie = cls(paths, line_of_item, num_ranks=num_ranks, eos_id=eos_id, seconds=0.0)
        trie.seconds = time.perf_counter() - began
        return trie

    # ------------------------------------------------------------------------------------------------------------------
    # What may follow

    def start(self, num_ranks: int | None = None, *, forbid: Forbid = "repeats", seen: Iterable[int] = ()) -> ListWalk:
        """A list before its first token. `seen` are item indices, read under forbid="repeats+seen"."""
        num_ranks, closed = self._terms(num_ranks, forbid, seen)
        return ListWalk(self, num_ranks, closed, repeats=forbid == "none")

    def choices(
        self,
        lists: Sequence[Sequence[int]],
        num_ranks: int | None = None,
        *,
        forbid: Forbid = "repeats",
        seen: Sequence[Iterable[int]] | None = None,
    ) -> Choices:
        """What was allowed at every token of given lists, whole or cut off. `seen` has the items of each list.

        Raises ValueError naming list and position of a token that was not allowed.
        """
        if seen is not None and len(seen) != len(lists):
            raise ValueError(f"expected the seen items of each list, {len(lists)}, got {len(seen)}")
        terms = [self._terms(num_ranks, forbid, () if seen is None else seen[i]) for i in range(len(lists))]
        return read_choices(self, lists, terms, repeats=forbid == "none")

    def allowed_batch(self, walks: Sequence[ListWalk]) -> AllowedBatch:
        """The allowed ids of many lists that are not done, one after the other."""
        return allowed_batch(self, walks)

    def root(self, rank: int, num_ranks: int) -> int:
        """The root under which the line of a rank is written."""
        if num_ranks == 1:
            assert self.root_only is not None
            return self.root_only
        return self.root_first if rank == 0 else self.root_last if rank == num_ranks - 1 else self.root_middle

    def _first_like(self, root: int) -> int:
        begins = [self.token[self.first_child[r] : self.first_child[r + 1]] for r in range(root + 1)]
        return next(r for r in range(root + 1) if np.array_equal(begins[r], begins[root]))

    def _terms(self, num_ranks: int | None, forbid: Forbid, seen: Iterable[int]) -> tuple[int, list[int]]:
        """Ranks of a list and the lines closed to it from the start."""
        num_ranks = self.num_ranks if num_ranks is None else num_ranks
        if forbid not in FORBID:
            raise ValueError(f"forbid must be one of {FORBID}, got {forbid!r}")
        if num_ranks < 1 or (num_ranks == 1 and self.root_only is None):
            raise ValueError(f"lists of num_ranks={num_ranks} need a trie built with num_ranks=1, got {self.num_ranks}")
        closed: list[int] = []
        if forbid == "repeats+seen":
            items = list(seen)
            if items and not 0 <= min(items) <= max(items) < len(self.line_of_item):
                raise ValueError(
                    f"seen items must be in [0, {len(self.line_of_item)}), got {min(items)} to {max(items)}"
                )
            closed = sorted(set(self.line_of_item[items].tolist())) if items else []
        left = self.num_lines - len(closed)
        needed = 1 if forbid == "none" else num_ranks
        if left < needed:
            raise ValueError(
                f"a list of {num_ranks} ranks needs {needed} lines, but {left} of {self.num_lines} are left "
                f"once the {len(closed)} seen are forbidden"
            )
        return num_ranks, closed

    # ------------------------------------------------------------------------------------------------------------------
    # Lines and items

    def items_of(self, line: int) -> list[int]:
        """The items written as this line: one, unless lines were merged."""
        if len(self.line_of_item) == self.num_lines:
            return [line]
        return (self.line_of_item == line).nonzero()[0].tolist()

    @property
    def merged(self) -> list[list[int]]:
        """Groups of items that share one line, each in catalog order."""
        if len(self.line_of_item) == self.num_lines:
            return []
        shared = (np.bincount(self.line_of_item) > 1).nonzero()[0]
        return [self.items_of(line) for line in shared.tolist()]

    def line_ids(self, line: int, rank: int, num_ranks: int | None = None) -> list[int]:
        """The ids of a line at a rank, its line break or the end token included."""
        return self.token[self._path(self.root(rank, num_ranks or self.num_ranks), line)].tolist()

    def list_ids(self, items: Sequence[int]) -> list[int]:
        """The ids of a whole list of items, the end token included."""
        lines = self.line_of_item[list(items)].tolist()
        return [i for rank, line in enumerate(lines) for i in self.line_ids(line, rank, len(lines))]

    def line_lengths(self) -> np.ndarray:
        """(N,) of every line the ids it takes at the place in a list where it takes most."""
        depth = np.zeros(self.num_nodes, np.int32)
        for begin, end in zip(self.level_start[1:-1], self.level_start[2:], strict=True):
            depth[begin:end] = depth[begin - 1] + 1
        leaf_node = (self.first_child[:-1] == self.first_child[1:]).nonzero()[0]
        length = np.zeros(self.num_lines, np.int32)
        np.maximum.at(length, self.line_of_leaf[self.first_leaf[leaf_node]], depth[leaf_node])
        return length

    def _path(self, root: int, line: int) -> np.ndarray:
        """The nodes of a line under a root, the root left out."""
        leaf = self.leaf_of_line[root * self.num_lines + line]
        nodes, node = [], root
        while self.first_child[node] < self.first_child[node + 1]:
            begin, end = self.first_child[node], self.first_child[node + 1]
            node = int(begin + np.searchsorted(self.first_leaf[begin:end], leaf, side="right") - 1)
            nodes.append(node)
        return np.array(nodes)

    # ------------------------------------------------------------------------------------------------------------------
    # Numbers

    @property
    def num_nodes(self) -> int:
        """Nodes of all roots' trees, the roots included."""
        return len(self.token)

    @property
    def num_edges(self) -> int:
        return len(self.token) - self.num_roots

    @property
    def num_bytes(self) -> int:
        arrays = (self.token, self.first_child, self.first_leaf, self.line_of_leaf, self.leaf_of_line)
        return sum(a.nbytes for a in (*arrays, self.line_of_item, self.item_of_line))

    def describe(self, items: Sequence[int] | None = None) -> dict[str, Any]:
        """Counts of the trie, and of the lines of given items (all lines for None): tokens and the share forced.

        Forced are tokens beside which the catalog allows no other; what a list has named forces a few more.
        """
        lines = np.arange(self.num_lines) if items is None else self.line_of_item[np.asarray(items)]
        trees, tokens, forced = [], [], []
        for root in range(self.num_roots):
            nodes, length, alone = self._count(root, lines)
            trees.append({"root": int(self.first_child[root + 1] - self.first_child[root]), "nodes": nodes})
            tokens.append(length / len(lines))
            forced.append(alone / length)
        names = ("first", "middle", "last")
        roots = dict(zip(names, (self.root_first, self.root_middle, self.root_last), strict=True))
        return {
            "items": len(self.line_of_item),
            "lines": self.num_lines,
            "merged": len(self.line_of_item) - self.num_lines,
            "roots": self.num_roots,
            "nodes": self.num_nodes,
            "edges": self.num_edges,
            "places": {n: trees[r] | {"tokens_a_line": tokens[r], "forced": forced[r]} for n, r in roots.items()},
            "tokens_a_line": tokens[self.root_middle],
            "forced": forced[self.root_middle],
            "bytes": self.num_bytes,
            "seconds": self.seconds,
        }

    def _count(self, root: int, lines: np.ndarray) -> tuple[int, int, int]:
        """Nodes of a root's tree, and the tokens of given lines under it: all of them, and those that are forced."""
        leaf = np.sort(self.leaf_of_line[root * self.num_lines + lines])
        num_nodes, length, alone = 1, 0, 0
        fan_out = np.diff(self.first_child)
        begin, end = root, root + 1
        while begin < end:
            # The node of this level that a leaf is under: the last that begins at it or before, if it has children.
            node = begin + np.searchsorted(self.first_leaf[begin:end], leaf, side="right") - 1
            inner = (node >= begin) & (fan_out[node] > 0)
            node, leaf = node[inner], leaf[inner]
            length += len(node)
            alone += int((fan_out[node] == 1).sum())
            begin, end = int(self.first_child[begin]), int(self.first_child[end])
            num_nodes += end - begin
        return num_nodes, length, alone


def _grow(roots: list[LinePaths]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int], np.ndarray]:
    """Token, first child and first leaf of every node, where each level begins, and the line of every leaf.

    All paths go down a level at a time: sorted within the node they share, a new node wherever node or id changes. A
    path never is the beginning of another: each ends with the first line break, or the first end token, it holds.
    """
    num_lines = len(roots[0])
    ids_F = roots[0].ids_F if len(roots) == 1 else np.concatenate([paths.ids_F for paths in roots])
    offset = np.cumsum([0, *(len(paths.ids_F) for paths in roots)])
    start_E = np.concatenate([paths.start[:-1] + o for paths, o in zip(roots, offset[:-1], strict=True)])
    size_E = np.concatenate([np.diff(paths.start) for paths in roots]).astype(np.int32)
    num_paths = len(start_E)

    order_E = np.arange(num_paths, dtype=np.int32)  # path at every leaf
    active = np.arange(num_paths, dtype=np.int32)  # leaves whose paths go on
    node = np.repeat(np.arange(len(roots), dtype=np.int64), num_lines)
    tokens = [np.full(len(roots), -1, np.int32)]
    first_leaves = [np.arange(len(roots), dtype=np.int32) * num_lines]
    fan_outs, level_start, level = [], [0, len(roots)], 0
    while len(active):
        path = order_E[active]
        key = node << 32 | ids_F[start_E[path] + level]
        by_key = np.argsort(key, kind="stable")
        key, path = key[by_key], path[by_key]
        order_E[active] = path
        is_new = np.concatenate([[True], key[1:] != key[:-1]])
        tokens.append((key[is_new] & 0xFFFFFFFF).astype(np.int32))
        first_leaves.append(active[is_new])
        fan_outs.append(np.bincount((key[is_new] >> 32) - level_start[-2], minlength=level_start[-1] - level_start[-2]))
        node = np.cumsum(is_new) - 1 + level_start[-1]
        level_start.append(level_start[-1] + len(tokens[-1]))
        level += 1
        goes_on = size_E[path] > level
        active, node = active[goes_on], node[goes_on]
    fan_outs.append(np.zeros(level_start[-1] - level_start[-2], np.int64))
    fan_out = np.concatenate(fan_outs)
    first_child = np.concatenate([[0], np.cumsum(fan_out)]) + len(roots)
    return (
        np.concatenate(tokens),
        first_child.astype(np.int32),
        np.concatenate(first_leaves).astype(np.int32),
        level_start,
        order_E % num_lines,
    )
