"""Thoughts that a model writes before its list, `<think> ... </think>`, are no part of the list.

One rule, for text and for tokens: the list begins after the last end of a thought; where after that a thought begins,
and thus never ends, there is no list. What stands before an end is a thought also without a beginning, for that may
stand in the prompt. gpt-oss thinks in channels of Harmony, and its list stands in the final one.

Marks are ASCII, so in UTF-8 they are the same bytes however a tokenizer cuts them, and a text that spells a mark with
ordinary tokens holds that mark. Special tokens, which have no text, keep theirs where they are a part of a mark.
"""

# Shape letters: B = lists (any number of leading dimensions), T = tokens, V = vocabulary; C kinds of tokens, S states.
from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|channel>": "<channel|>",
    "<|channel|>": "<|channel|>final<|message|>",
}
"""Beginning and end: of most models, of Mistral, Seed-OSS and Gemma 4, and of gpt-oss."""
MESSAGE = "<|message|>"
"""A token of Harmony that is a mark together with others."""
_ENDS = frozenset(mark.encode() for mark in MARKS.values())
_ALL = frozenset(mark.encode() for mark in MARKS) | _ENDS
LONGEST = max(map(len, _ALL)) - 1
"""Bytes of the longest beginning of a mark."""
_MARK = re.compile("|".join(map(re.escape, sorted((m.decode() for m in _ALL), key=len, reverse=True))))

# What a token brings last: nothing, the beginning of a thought, its end.
NOTHING, BEGINS, ENDS = 0, 1, 2


def list_start(text: str) -> int:
    """Where the list begins in a completion: after its thoughts; at its end when there is no list.

    Example: ``list_start("<think>Heat?</think>Ronin (1998)")`` is 20.
    """
    start = 0
    for mark in _MARK.finditer(text):
        start = mark.end() if mark[0].encode() in _ENDS else len(text)
    return start


def find_mark(text: str) -> str | None:
    """The first mark of thoughts in a text: an item whose line holds one can never be read out of a list."""
    return found[0] if (found := _MARK.search(text)) else None


def mark_tokens(special: Collection[str]) -> set[str]:
    """Those of a tokenizer's special tokens that a mark is made of."""
    found = {token for token in special if token.encode() in _ALL}
    return found | ({MESSAGE} & set(special) if "<|channel|>" in found else set())


def list_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """The text of a completion: decoded without special tokens, but for those that mark thoughts."""
    special = {i: t.content for i, t in tokenizer.backend_tokenizer.get_added_tokens_decoder().items() if t.special}
    marks = mark_tokens(special.values())
    kept = {i: content for i, content in special.items() if content in marks}

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_list(ids: Sequence[int]) -> str:
        ids, texts, start = list(ids), [], 0
        for place, token in enumerate(ids):
            if token in kept:
                texts += [decode(ids[start:place]), kept[token]]
                start = place + 1
        return "".join([*texts, decode(ids[start:])])

    return decode_list if kept else decode


# --------------------------------------------------------------------------------------------------------------------
# Tokens


class ThoughtTable:
    """Where the thoughts end in a batch of token ids: an automaton over bytes, one step a token.

    Its state is the longest beginning of a mark with which the bytes so far end. Most tokens lead from every state to
    the empty one; the others are of a few kinds, which a table holds.
    """

    def __init__(self, token_bytes: Sequence[bytes]):
        self._states = sorted({mark[:cut] for mark in _ALL for cut in range(len(mark))})
        self._number = {state: i for i, state in enumerate(self._states)}
        # By length, each with the state that a byte which it does not go on with is read from.
        self._shorter = {state: self._longest(state[1:]) for state in sorted(self._states, key=len) if state}
        plain = ((0, NOTHING, b""),) * len(self._states)
        kinds, kind_of_token = {plain: 0}, []
        for piece in token_bytes:
            kind_of_token.append(0 if _is_plain(piece) else kinds.setdefault(self._effects(piece), len(kinds)))
        self.rests = list(dict.fromkeys(rest for kind in kinds for _, _, rest in kind))
        """What a token may bring after a mark."""
        number = {rest: i for i, rest in enumerate(self.rests)}
        kind_V = torch.tensor([*kind_of_token, 0], dtype=torch.int32)
        empty_V = torch.tensor([not piece for piece in [*token_bytes, b""]])
        next_CS, event_CS, rest_CS = (
            torch.tensor([[value(effect) for effect in kind] for kind in kinds], dtype=torch.int32)
            for value in (lambda e: e[0], lambda e: e[1], lambda e: number[e[2]])
        )
        self._tables = (kind_V, empty_V, next_CS.flatten(), event_CS.flatten(), rest_CS.flatten(), event_CS.any(1))

    def _effects(self, piece: bytes) -> tuple[tuple[int, int, bytes], ...]:
        """By state: the state after a token, what it brings last, and its bytes after that."""
        effects = {b"": self._effect(b"", piece)}
        if piece[:1] not in _CONTINUES:
            return (effects[b""],) * len(self._states)
        for state, shorter in self._shorter.items():
            goes_on = state + piece[:1] in _BEGINNINGS
            effects[state] = self._effect(state, piece) if goes_on else effects[shorter]
        return tuple(effects[state] for state in self._states)

    def _effect(self, state: bytes, piece: bytes) -> tuple[int, int, bytes]:
        text, event, rest = state + piece, NOTHING, b""
        for mark in _MARK_BYTES.finditer(text):
            if mark.end() > len(state):
                event, rest = (ENDS if mark[0] in _ENDS else BEGINS), text[mark.end() :]
        return self._number[self._longest(text)], event, rest

    def _longest(self, text: bytes) -> bytes:
        """The longest state with which a text ends; the empty one is a state."""
        start = max(len(text) - LONGEST, 0)
        return next(text[cut:] for cut in range(start, len(text) + 1) if text[cut:] in self._number)

    def to(self, device: torch.device) -> ThoughtTable:
        moved = ThoughtTable.__new__(ThoughtTable)
        moved.__dict__.update(self.__dict__)
        moved._tables = tuple(table.to(device) for table in self._tables)
        return moved

    def __call__(self, row_BT: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """For every list: position of the token that brings its last mark, from 1, or 0 without; that it is a
        beginning; and which of `rests` follows the mark in that token. (..., 1) each.

        None where no token can complete a mark, which only a CPU is asked: elsewhere looking waits for the device.
        """
        kind_V, empty_V, next_CS, event_CS, rest_CS, eventful_C = self._tables
        kind_BT = kind_V[row_BT]
        if row_BT.device.type == "cpu" and not bool(eventful_C[kind_BT].any()):
            return None
        first_BT = kind_BT.long() * len(self._states)
        position_T = torch.arange(1, row_BT.shape[-1] + 1, device=row_BT.device)
        # The place of the token with text before each: special tokens come between the pieces of a mark unseen.
        with_text_BT = torch.where(empty_V[row_BT], 0, position_T).cummax(-1).values
        before_BT = F.pad(with_text_BT, (1, 0))[..., :-1]
        came_BT = torch.zeros_like(row_BT)
        for _ in range(LONGEST):  # a state's bytes lie in as many tokens at most
            left_BT = next_CS[first_BT + came_BT].long()
            came_BT = F.pad(left_BT, (1, 0)).gather(-1, before_BT)
        effect_BT = first_BT + came_BT
        last_B1 = torch.where(event_CS[effect_BT] > 0, position_T, 0).amax(-1, keepdim=True)
        last_effect_B1 = effect_BT.gather(-1, (last_B1 - 1).clamp(min=0))
        begins_B1 = (event_CS[last_effect_B1] == BEGINS) & (last_B1 > 0)
        return last_B1, begins_B1, rest_CS[last_effect_B1].long()


def _alternatives(pieces: Iterable[bytes]) -> bytes:
    return b"|".join(map(re.escape, sorted(pieces, key=len, reverse=True)))


_MARK_BYTES = re.compile(_alternatives(_ALL))
_INSIDE = {mark[i:j] for mark in _ALL for i in range(1, len(mark)) for j in range(i + 1, len(mark) + 1)}
_CONTINUES = {inside[:1] for inside in _INSIDE}
_BEGINNINGS = {mark[:cut] for mark in _ALL for cut in range(1, len(mark) + 1)}
_BRACKET = re.compile(rb"[<>\[\]]")  # one begins every mark, and one ends it


def _is_plain(piece: bytes) -> bool:
    """Whether a token leads from every state to the empty one and completes no mark."""
    return bool(piece) and _BRACKET.search(piece) is None and piece not in _INSIDE
