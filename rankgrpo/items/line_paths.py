"""The token ids of a catalog's lines, as the tokenizer itself writes them inside a list.

A list is its lines joined by line breaks, with no break after the last one, and then the end token. What ids a line has
may depend on where it stands: a tokenizer may merge `)` with the line break, the last line ends with the end token
instead, and SentencePiece puts a space before the very first. So every line is read between neighbours and alone, and
at each end of a list unless those two readings settle it; one line in twenty is read at both ends in any case, to be
compared. Ids that hold the text of two lines are refused: such a line has no ids of its own.
"""

# Shape letters: N lines, F ids of all lines one after the other, M ids of the texts read at once.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

LINES_AT_ONCE = 16_384  # read by the tokenizer; its Python objects take about 2 kB a line
WINDOW = 22  # lines of a text in which those between the first and the last are read


@dataclass(frozen=True, slots=True)
class LinePaths:
    """Token ids of N lines at one place of a list.

    Example: ids of "It (2017)\\n", "Heat (1995)\\n" are LinePaths(ids_F=[2132, 8, ...], start=[0, 8, 17])
    """

    ids_F: np.ndarray
    """int32"""
    start: np.ndarray
    """int64, N + 1 entries: where each line's ids begin."""

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, line: int) -> np.ndarray:
        return self.ids_F[self.start[line] : self.start[line + 1]]

    def equals(self, other: LinePaths) -> bool:
        return np.array_equal(self.start, other.start) and np.array_equal(self.ids_F, other.ids_F)


@dataclass(frozen=True, slots=True)
class PathsByPlace:
    """The lines' ids at every place of a list. Places at which all lines have the same ids share one object."""

    first: LinePaths
    middle: LinePaths
    last: LinePaths
    only: LinePaths | None
    """Of a list of one line; None where it would have to be read apart and no list is that short."""


def read_line_paths(lines: Sequence[str], tokenizer, *, eos_id: int, num_ranks: int) -> PathsByPlace:
    """Ids of distinct lines at every place of a list of `num_ranks`.

    Raises ValueError naming the first line that is empty, that breaks, that the tokenizer does not give back, that
    holds the end token, or whose ids depend on its neighbours.
    """
    for index, line in enumerate(lines):
        if not line.strip():
            raise ValueError(f"line {index} of the catalog is empty; a list names one item a line")
        if "\n" in line or "\r" in line:
            raise ValueError(f"line {index} of the catalog, {line!r}, holds a line break; a list names one item a line")
    reader = _Reader(lines, tokenizer, eos_id)
    num_lines = len(lines)
    every = np.arange(num_lines)
    alone = _with_end(reader.read(every[:, None])[0], eos_id)
    if num_lines == 1:
        return PathsByPlace(alone, alone, alone, alone)
    begin = np.arange(0, num_lines, WINDOW - 2)
    windows = (begin[:, None] + np.arange(-1, WINDOW - 1)) % num_lines
    columns = reader.read_windows(windows)
    middle, last_seen = columns[1], _with_end(columns[2], eos_id)
    if _differ_at_the_end(alone, middle):
        # What is before a line and what is after it each change one end of it, if at all: none changes the beginning.
        first, last, only = middle, alone, alone
    else:
        shift = max(1, num_lines // 2)
        first, last = reader.read(np.stack([every, (every + shift) % num_lines], 1))
        last = _with_end(_rolled(last, shift), eos_id)
        first = middle if first.equals(middle) else first
        only = last if alone.equals(last) else alone if num_ranks == 1 else None
    reader.compare(windows[:, 0], columns[0], first)
    reader.compare(windows[:, -1], last_seen, last)
    return PathsByPlace(first, middle, last, only)


def _differ_at_the_end(alone: LinePaths, middle: LinePaths) -> bool:
    """Whether every line begins alone with the ids it has in the middle, save the one that holds the line break."""
    size = np.diff(middle.start) - 1
    if (np.diff(alone.start) < size).any():
        return False
    begins = middle.ids_F[ragged_range(middle.start[:-1], size)]
    return np.array_equal(begins, alone.ids_F[ragged_range(alone.start[:-1], size)])


class _Reader:
    """Reads texts of several lines and cuts their ids into lines."""

    def __init__(self, lines: Sequence[str], tokenizer, eos_id: int):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} has no backend of the `tokenizers` library; load the fast tokenizer"
            )
        self.lines, self.tokenizer, self.eos_id = lines, tokenizer, eos_id
        # Calling the tokenizer once clears a padding or a truncation that its file may ask for.
        tokenizer(["a"], add_special_tokens=False)
        self.num_breaks = np.full(len(tokenizer), -1, dtype=np.int8)
        """Of every id the line breaks in its text, where it ends with one; 2 where it goes on; -1 not looked up yet."""

    def read(self, lines_TW: np.ndarray) -> list[LinePaths]:
        """Of T texts of W lines each, the ids of the lines in each of the W columns."""
        columns: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(lines_TW.shape[1])]
        for ids_M, place_M, length_TW in self._slabs(lines_TW):
            for column, parts in enumerate(columns):
                parts.append((ids_M[place_M == column], length_TW[:, column]))
        return [_joined(parts) for parts in columns]

    def read_windows(self, lines_TW: np.ndarray) -> tuple[LinePaths, LinePaths, LinePaths]:
        """The ids of every text's first line, of those between, which are all N lines in order, and of its last."""
        parts: tuple[list, list, list] = ([], [], [])
        for ids_M, place_M, length_TW in self._slabs(lines_TW):
            end = lines_TW.shape[1] - 1
            parts[0].append((ids_M[place_M == 0], length_TW[:, 0]))
            parts[1].append((ids_M[(place_M > 0) & (place_M < end)], length_TW[:, 1:-1].reshape(-1)))
            parts[2].append((ids_M[place_M == end], length_TW[:, -1]))
        first, middle, last = map(_joined, parts)
        # The last window goes round to the catalog's beginning.
        count = len(self.lines)
        return first, LinePaths(middle.ids_F[: middle.start[count]], middle.start[: count + 1]), last

    def _slabs(self, lines_TW: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Ids of some of the texts one after the other, the column each id belongs to, and the ids of every line."""
        width = lines_TW.shape[1]
        step = max(1, LINES_AT_ONCE // width)
        for begin in range(0, len(lines_TW), step):
            rows = lines_TW[begin : begin + step]
            texts = ["\n".join([self.lines[i] for i in row]) for row in rows.tolist()]
            encodings = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            ids = [encoding.ids for encoding in encodings]
            self._check_text(rows, texts, ids)
            size_T = np.fromiter(map(len, ids), np.int64, len(ids))
            ids_M = np.fromiter(chain.from_iterable(ids), np.int32, int(size_T.sum()))
            text_M = np.repeat(np.arange(len(ids)), size_T)
            breaks_M = self._breaks(ids_M)
            breaks_T = np.bincount(text_M, weights=breaks_M, minlength=len(ids)).astype(np.int64)
            if (breaks_M > 1).any() or (breaks_T != width - 1).any():
                self._refuse(rows, ids, breaks_M, text_M, breaks_T)
            before_M = np.cumsum(breaks_M, dtype=np.int64) - breaks_M  # a line's break belongs to it
            place_M = before_M - np.repeat(np.cumsum(breaks_T) - breaks_T, size_T)
            length_TW = np.bincount(text_M * width + place_M, minlength=len(ids) * width).reshape(-1, width)
            if (ids_M == self.eos_id).any():
                text = int(text_M[ids_M == self.eos_id][0])
                column = int(place_M[ids_M == self.eos_id][0])
                raise ValueError(f"{self._name(rows[text, column])} holds the end token {self.eos_id}")
            yield ids_M, place_M, length_TW

    def _breaks(self, ids_M: np.ndarray) -> np.ndarray:
        for token_id in np.unique(ids_M[self.num_breaks[ids_M] < 0]).tolist():
            text = self.tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            crosses = "\n" in text and (text.count("\n") > 1 or not text.endswith("\n"))
            self.num_breaks[token_id] = 2 if crosses else text.count("\n")
        return self.num_breaks[ids_M]

    def _check_text(self, rows: np.ndarray, texts: list[str], ids: list[list[int]]) -> None:
        """Every text must come back as it was: as the sampler reads it, without special tokens."""
        back = self.tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)
        if back == texts:
            return
        bad = next(i for i, (a, b) in enumerate(zip(texts, back, strict=True)) if a != b)
        read = back[bad].split("\n")
        for index, line in zip(rows[bad].tolist(), read, strict=False):
            if line != self.lines[index]:
                raise ValueError(f"the tokenizer cannot write {self._name(index)}: it reads back as {line!r}")
        raise ValueError(f"the tokenizer cannot write a list: {texts[bad]!r} reads back as {back[bad]!r}")

    def compare(self, index_T: np.ndarray, here: LinePaths, known: LinePaths) -> None:
        """Lines read in one text must have the ids they are known by."""
        there = _taken(known, index_T)
        if here.equals(there):
            return
        bad = next(i for i in range(len(here)) if not np.array_equal(here[i], there[i]))
        raise ValueError(
            f"the tokenizer's ids of {self._name(index_T[bad])} depend on the lines beside it: "
            f"{there[bad].tolist()} and {here[bad].tolist()}; such lines have no ids of their own"
        )

    def _refuse(self, rows, ids, breaks_M, text_M, breaks_T) -> None:
        crossing = breaks_M > 1
        text = int(text_M[crossing][0]) if crossing.any() else int((breaks_T != rows.shape[1] - 1).nonzero()[0][0])
        names = self._name(rows[text, 0])
        for token_id in ids[text]:
            if self.num_breaks[token_id] > 1:
                piece = self.tokenizer.decode([token_id])
                raise ValueError(
                    f"the tokenizer's ids of {names} depend on the lines beside it: id {token_id} is {piece!r}, which "
                    "holds text of two lines"
                )
        raise ValueError(
            f"the tokenizer writes no line break of its own in the list that begins with {names}: {ids[text][:40]}"
        )

    def _name(self, index: int) -> str:
        return f"line {index} of the catalog, {self.lines[index]!r},"


def ragged_range(start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (size[0] of them), start[1], ..."""
    ends = np.cumsum(size)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(start - (ends - size), size)


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> LinePaths:
    length = np.concatenate([length for _, length in parts])
    return LinePaths(np.concatenate([ids for ids, _ in parts]), np.concatenate([[0], np.cumsum(length)]))


def _taken(paths: LinePaths, index: np.ndarray) -> LinePaths:
    size = np.diff(paths.start)[index]
    ids = paths.ids_F[ragged_range(paths.start[index], size)]
    return LinePaths(ids, np.concatenate([[0], np.cumsum(size)]))


def _rolled(paths: LinePaths, shift: int) -> LinePaths:
    """Entry i of `paths` is of line i + shift; the result has it at its own place."""
    size = np.roll(np.diff(paths.start), shift)
    cut = paths.start[len(paths) - shift]
    ids = np.concatenate([paths.ids_F[cut:], paths.ids_F[:cut]])
    return LinePaths(ids, np.concatenate([[0], np.cumsum(size)]))


def _with_end(paths: LinePaths, eos_id: int) -> LinePaths:
    size = np.diff(paths.start)
    start = np.concatenate([[0], np.cumsum(size + 1)])
    ids = np.full(start[-1], eos_id, dtype=np.int32)
    ids[ragged_range(start[:-1], size)] = paths.ids_F
    return LinePaths(ids, start)
