"""One parser for a ranked list written as text: the items of a completion, and the rank of each of its tokens.

Both halves rest on one definition, so the reward of rank k and the tokens of rank k cannot drift apart:

* a line ends at ``\\n`` or ``\\r`` (``\\r\\n`` ends one line and leaves an empty one behind, which costs nothing);
* a character is visible unless it is ASCII whitespace, an ASCII control or DEL, that is, unless its code is <= 0x20
  or 0x7f;
* the list begins after the thoughts of a model that thinks aloud (`rankgrpo.thoughts`);
* rank k (0-based) is the k-th line of the list with a visible character. Nothing else makes, drops or merges a rank.

Each clause speaks about single ASCII characters, and in UTF-8 an ASCII character is one byte while every other
character, whole, cut or invalid, is bytes >= 0x80. Text and token bytes therefore give the same lines whatever the
tokenizer cut in two. The price is that the exotic ones stay plain visible characters: U+2028, U+2029 and U+0085 do
not end a line (nor do vertical tab and form feed, which are invisible), and a line holding only a no-break or
zero-width space is a line, an unparsable one.

Not here: what a title is worth (reward), which titles exist (catalog), where a list is cut (the caller's num_ranks).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rankgrpo.thoughts import ThoughtTable, list_start, mark_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Shape letters: B = lists (any number of leading dimensions), T = tokens, V = vocabulary.

_LINE = re.compile(r"[^\r\n]+")
_VISIBLE = re.compile(r"[^\x00-\x20\x7f]")
_BREAK_BYTE = re.compile(rb"[\r\n]")
_INVISIBLE_BYTES = bytes(range(0x21)) + b"\x7f"

# --------------------------------------------------------------------------------------------------------------------
# Text -> items


@dataclass(frozen=True, slots=True)
class ListedItem:
    """One line of the list. Its rank is its index in what `parse_list` returns.

    Example: ``parse_list("1. Heat (1995)\\nRonin")`` is
    ``[ListedItem("Heat", 1995, (0, 14)), ListedItem(None, None, (15, 20))]``.
    """

    title: str | None
    """The bare title; None when the line is not ``Title (year)``, and then `year` is None, too.

    Where items have a format without years (`rankgrpo.items.lines`) the line of an item, and `year` is None always.
    """
    year: int | None
    chars: tuple[int, int]
    """[start, end) of the whole line in the text, without its line break."""


def parse_list(text: str) -> list[ListedItem]:
    """Items of a ranked list, one per line with a visible character, in order.

    A line parses when it holds ``Title (1995)`` or ``Title [1995]``. Removed around the title: one list number (``1.``
    ``1)`` ``1.)`` ``(1)`` ``[1]`` ``#1`` ``1 - ``), bullets, heading marks, Markdown emphasis and quotes that wrap it.
    Text after the year is ignored: ``Heat (1995) - a crime film`` is Heat, 1995. The year is the first bracketed group
    of four digits that has a title before it; of adjacent groups the last, so ``(1408) (2007)`` has a title.

    A number that may belong to the title stays. A list number has at most three digits (two in brackets or before a
    dash), a mark of its own and something after it, and only one is removed. ``48 Hrs.``, ``2001: A Space Odyssey``,
    ``(500) Days of Summer`` and ``13: Game of Death`` keep theirs, and ``1. 12 Angry Men`` loses ``1.`` only. A leading
    ``'`` or ``*`` goes only with its partner: ``'Round Midnight`` and ``*batteries not included`` keep it.

    Any other line (prose, no year, cut before the year's closing bracket) has title None and keeps its rank.
    """
    return [ListedItem(*_title_and_year(line), chars) for line, chars in visible_lines(text)]


def visible_lines(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The lines that have a rank, in order, each with its [start, end) in the text."""
    return ((line[0], line.span()) for line in _LINE.finditer(text, list_start(text)) if _VISIBLE.search(line[0]))


def bare_title(line: str) -> str:
    """The title on a line that names no year, without the list number and the decoration that `parse_list` removes."""
    return _strip_decoration(line, "")


# Not regular whitespace to `str.strip`, but never part of a title: zero-width characters, byte order mark, controls.
_ZERO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff"
_PADDING = "".join(c for c in map(chr, range(0x3001)) if c.isspace() or c < " ") + "\x7f" + _ZERO_WIDTH

_BRACKETED_YEAR = r"(?:\(\s*[0-9]{4}\s*\)|\[\s*[0-9]{4}\s*\])"
_EMPHASIS = ("***", "**", "*", "___", "__", "_", "`")  # longest first
_DOUBLE_QUOTES = '"“”„«»'
_SINGLE_QUOTES = "'‘’"
_CLOSERS = rf"[*_`{_DOUBLE_QUOTES}{_SINGLE_QUOTES}]*"
# The year may be emphasised on its own: `Heat **(1995)**`. The last of several adjacent groups is the year.
_YEAR = re.compile(
    rf"(?P<mark>(?<!\S)[*_]{{1,3}}|){_BRACKETED_YEAR}(?P=mark)(?!{_CLOSERS}\s*{_BRACKETED_YEAR})(?P<closers>{_CLOSERS})"
)

# A dash needs a space or a letter after it (`-30-` is a film); `*`, `+` and `#` need a space.
_BULLET = re.compile(r"(?:[-–—*+>]|#{1,6})(?:\s+|$)|[•●▪◦‣·]\s*|-(?=[^\W\d_])")
_NUMBER = re.compile(
    r"""(?P<mark>[*_]{0,3})
        (?: [0-9]{1,3}(?:\.\)?|\))              # 1.   1)   1.)
          | \#[0-9]{1,3}[.:)]?                  # #1   #1.  #1:
          | \([0-9]{1,2}\) | \[[0-9]{1,2}\]     # (1)  [1]; three digits would take (500) Days of Summer
          | [0-9]{1,2}(?=\s+[-–—]\s)            # 1 -  the dash then goes as a bullet
        )
        (?P=mark)
        (?: \s+ | $ | (?=[^\W\d_]|["“”„«'‘*_(\[]) )    # `1.Heat` is numbered, `2.0` is a title""",
    re.VERBOSE,
)


def _title_and_year(line: str) -> tuple[str, int] | tuple[None, None]:
    for year in _YEAR.finditer(line):
        if title := _strip_decoration(line[: year.start()], year["closers"]):
            return title, int("".join(c for c in year[0] if c.isdecimal()))
    return None, None


def _strip_decoration(title: str, closers: str) -> str:
    """The bare title: `title` is the line up to the year, `closers` the marks right after the year."""
    num_numbers = 0
    while True:
        title = title.strip(_PADDING)
        if bullet := _BULLET.match(title):
            title = title[bullet.end() :]
        elif num_numbers == 0 and (number := _NUMBER.match(title)):
            num_numbers = 1
            title = title[number.end() :]
        else:
            inner, closers = _unwrap(title, closers)
            if inner == title:
                return title
            title = inner


def _unwrap(title: str, closers: str) -> tuple[str, str]:
    """Remove one pair of emphasis marks or quotes; the closing one may stand after the year (``**Heat (1995)**``)."""
    for mark in _EMPHASIS:
        if title.startswith(mark):
            if title.endswith(mark) and len(title) > 2 * len(mark):
                return title[len(mark) : -len(mark)], closers
            if mark in closers:
                return title[len(mark) :], closers.replace(mark, "", 1)
    first, last, inner = title[:1], title[-1:], title[1:-1]
    if first and first in _DOUBLE_QUOTES:
        quotes = [i for i, c in enumerate(inner) if c in _DOUBLE_QUOTES]
        if last in _DOUBLE_QUOTES and len(title) > 1:
            # `"Weird" and "Wonderful"` is not wrapped: the next quote closes the first. `"The "Human" Factor"` is.
            if not quotes or quotes[0] == 0 or inner[quotes[0] - 1].isspace():
                return inner, closers
        elif len(quotes) % 2 == 0:  # the partner stands after the year, or never came
            return title[1:], closers
    elif first and first in _SINGLE_QUOTES:
        if last in _SINGLE_QUOTES and inner:
            return inner, closers
        if any(c in closers for c in _SINGLE_QUOTES):
            return title[1:], closers
    return title, closers


# --------------------------------------------------------------------------------------------------------------------
# Token ids -> rank of every token


class RankSegmenter:
    """Rank of every token of a batch of lists, from a table over the vocabulary and cumulative sums on the device.

    A token belongs to the line of its first visible character; the lines that open later in the same token still
    count for the tokens after it. A token without a visible character (line breaks, spaces, special tokens, ids the
    tokenizer does not know) belongs to the line before it, and before the first line to the first. EOS thus belongs
    to the last item, as in the paper ("Rank-GRPO", arXiv 2510.20150, Section 2). Tokens of thoughts, the marks around
    them included, have rank -1, and so have all where a thought never ends.

    Agreement with the reward, for any ids of one list: the token whose first visible character lies in item k of
    ``parse_list(segmenter.text(ids))`` has rank k, so there are ``max(rank) + 1`` items. Two cases differ: a list
    without a visible character has no item, and its tokens rank 0; the lines that open inside a token after its first
    visible character are items, but have tokens only if more follow on them (possible where tokens cross line breaks).
    For byte-level tokenizers `text` is ``tokenizer.decode(ids, skip_special_tokens=True,
    clean_up_tokenization_spaces=False)``, whatever the ids, cut or invalid UTF-8 included; special tokens that mark
    thoughts stand in it, as in `rankgrpo.thoughts.list_decoder`.

    Example::

        segmenter = RankSegmenter(tokenizer)
        rank_BT = segmenter(token_ids_BT, mask_BT)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """`tokenizer`: a Hugging Face tokenizer backed by the `tokenizers` library (``tokenizer.is_fast``).

        Raises ValueError for one without such a backend, or with a decoder that does not act token by token
        (WordPiece, CTC, regex replacements): `from_token_bytes` takes any vocabulary.
        """
        self._set_vocabulary(_vocabulary_bytes(tokenizer))

    @classmethod
    def from_token_bytes(cls, token_bytes: Sequence[bytes]) -> RankSegmenter:
        """A segmenter from the bytes each id stands for; ``b""`` for special and unused ids."""
        segmenter = cls.__new__(cls)
        segmenter._set_vocabulary(list(token_bytes))
        return segmenter

    def _set_vocabulary(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        # One row more than there are ids: the row of everything that has no text.
        traits_V4 = torch.tensor([_line_traits(piece) for piece in [*token_bytes, b""]], dtype=torch.int32)
        thoughts = ThoughtTable(token_bytes)
        # What a token brings of the list after the mark in it: the first line of all begins there, whatever was before.
        after_R4 = torch.tensor([(*_line_traits(rest), True) for rest in thoughts.rests], dtype=torch.int32)
        after_R4 = after_R4[:, [0, 4, 2, 4]] * torch.tensor([1, 0, 1, 1], dtype=torch.int32)
        self._tables = {traits_V4.device: (traits_V4, thoughts, after_R4)}

    def text(self, token_ids: Sequence[int]) -> str:
        """The text the ranks refer to: the bytes of the tokens, UTF-8 decoded, malformed sequences replaced by U+FFFD.

        For byte-level tokenizers this is what ``tokenizer.decode`` gives without special tokens. SentencePiece decoders
        differ from it in two ways: they drop the leading space, and they turn a line break inside a malformed run of
        byte tokens into U+FFFD, so for those tokenizers only this text is sure to have the ranks of `__call__`.
        """
        num_ids = len(self._token_bytes)
        return b"".join(self._token_bytes[i] for i in token_ids if 0 <= i < num_ids).decode("utf-8", "replace")

    def __call__(self, token_ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """(..., T) int64: 0-based rank of each token, -1 where the mask is 0, unbounded above.

        Every token is a map of (lines so far, has the current line visible text?), and such maps compose
        associatively: the second part is set by the last token that decides it (a running maximum over positions),
        the first grows by the lines each token opens (a running sum). Nothing here synchronises with the host, save
        the copy of the table at the first call on a device.

        Args:
            token_ids_BT: integer ids, (..., T). Ids where the mask is 0 are not looked at; -100 is fine there.
            mask_BT: bool (or 0/1), same shape; True = token of the completion. Padding may be on either side.

        Raises:
            ValueError: shapes differ, no token dimension, ids are not integers.
        """
        _check_inputs(token_ids_BT, mask_BT)
        mask_BT = mask_BT.bool()
        token_ids_BT = token_ids_BT.long()
        no_text = len(self._token_bytes)
        known_BT = mask_BT & (token_ids_BT >= 0) & (token_ids_BT < no_text)
        row_BT = torch.where(known_BT, token_ids_BT, no_text)
        traits_V4, thoughts, after_R4 = self._tables_on(row_BT.device)
        traits_BT4 = traits_V4[row_BT]
        if row_BT.shape[-1] and (found := thoughts(row_BT)) is not None:
            last_B1, begins_B1, rest_B1 = found
            place_T = torch.arange(1, row_BT.shape[-1] + 1, device=row_BT.device)
            traits_BT4 = torch.where((place_T == last_B1)[..., None], after_R4[rest_B1], traits_BT4)
            traits_BT4 = torch.where((place_T < last_B1)[..., None], 0, traits_BT4)
            mask_BT = mask_BT & (place_T > last_B1) & ~begins_B1
        num_lines_BT, head_BT, tail_BT, decides_BT = traits_BT4.unbind(-1)

        position_T = torch.arange(1, row_BT.shape[-1] + 1, device=row_BT.device)
        decision_BT = torch.where(decides_BT > 0, 2 * position_T + tail_BT, 0).cummax(-1).values
        on_open_line_BT = F.pad(decision_BT, (1, 0))[..., :-1] & 1  # before each token: has its line visible text?

        continues_BT = on_open_line_BT * head_BT
        opened_BT = num_lines_BT - continues_BT
        num_before_BT = opened_BT.cumsum(-1) - opened_BT
        starts_line_BT = (num_lines_BT > 0) & (continues_BT == 0)
        rank_BT = (num_before_BT - 1 + starts_line_BT).clamp(min=0)
        return torch.where(mask_BT, rank_BT, -1)

    def _tables_on(self, device: torch.device) -> tuple[Tensor, ThoughtTable, Tensor]:
        if device not in self._tables:
            traits_V4, thoughts, after_R4 = next(iter(self._tables.values()))
            self._tables[device] = traits_V4.to(device), thoughts.to(device), after_R4.to(device)
        return self._tables[device]


def _check_inputs(token_ids_BT: Tensor, mask_BT: Tensor) -> None:
    if token_ids_BT.ndim == 0 or token_ids_BT.shape != mask_BT.shape:
        raise ValueError(
            f"token_ids and mask must both be (..., T), got {tuple(token_ids_BT.shape)} and {tuple(mask_BT.shape)}"
        )
    if token_ids_BT.is_floating_point() or token_ids_BT.dtype == torch.bool:
        raise ValueError(f"token_ids must have an integer dtype, got {token_ids_BT.dtype}; are the arguments swapped?")


def _line_traits(piece: bytes) -> tuple[int, bool, bool, bool]:
    """What a token does to the line count, from its bytes.

    (lines with visible bytes, visible before the first break, visible after the last break, does it decide whether
    the line it leaves has visible text, whatever it found). A token without a break has its one line as first and last.
    """
    visible = [bool(part.translate(None, _INVISIBLE_BYTES)) for part in _BREAK_BYTE.split(piece)]
    return sum(visible), visible[0], visible[-1], len(visible) > 1 or visible[0]


# --------------------------------------------------------------------------------------------------------------------
# Vocabulary -> bytes


def _vocabulary_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Bytes of every id, from the raw vocabulary: decoding one token at a time loses cut characters and spaces."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} has no backend of the `tokenizers` library; load the fast tokenizer, or "
            "give the bytes of every id to RankSegmenter.from_token_bytes"
        )
    backend = tokenizer.backend_tokenizer
    to_bytes = _token_decoder(backend)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    special -= mark_tokens(special)
    num_ids = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    tokens = (backend.id_to_token(token_id) for token_id in range(num_ids))  # None for a hole in the ids
    return [b"" if token is None or token in special else to_bytes(token) for token in tokens]


def _token_decoder(backend: Any) -> Callable[[str], bytes]:
    """The tokenizer's own decoder, as a function of one token."""
    if backend.decoder is None:
        return lambda token: token.encode() + b" "  # the library joins tokens with spaces then
    steps = _flatten(json.loads(backend.decoder.__getstate__()))
    kinds = {step["type"] for step in steps}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return _byte_level_bytes
    replacements = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
    strips = [step["content"] for step in steps if step["type"] == "Strip"]
    supported = kinds <= {"Replace", "Metaspace", "Strip", "ByteFallback", "Fuse"}
    if not supported or None in replacements or any(content != " " for content in strips):
        raise ValueError(
            f"cannot tell the bytes of single tokens from the decoder {steps}; known are ByteLevel and chains of "
            "Replace (a string), Metaspace, Strip (a space), ByteFallback, Fuse. Give the bytes of every id to "
            "RankSegmenter.from_token_bytes"
        )
    byte_fallback = "ByteFallback" in kinds

    def sentencepiece_bytes(token: str) -> bytes:
        if byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return sentencepiece_bytes


_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for child in decoder["decoders"] for step in _flatten(child)]


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    return (step["pattern"]["String"], step["content"]) if "String" in step["pattern"] else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where printable in Latin-1, else the next one from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    # A token with any character outside the alphabet (only added ones have such) stands for itself, as in the library.
    try:
        return bytes(map(_BYTE_ALPHABET.__getitem__, token))
    except KeyError:
        return token.encode()
