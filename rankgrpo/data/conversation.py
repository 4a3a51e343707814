"""A conversation out of plain text, as people type it."""

from __future__ import annotations

from rankgrpo.data.samples import Turn
from rankgrpo.errors import DataError

SPEAKERS = {"user": "user", "you": "user", "assistant": "assistant", "system": "assistant"}


def read_conversation(text: str) -> tuple[Turn, ...]:
    """Turns from text: a line `User: ...` or `Assistant: ...` opens a turn, anything else continues it.

    Text without such a line is one user turn. Raises DataError when there is no text.
    """
    turns: list[Turn] = []
    for line in text.strip().splitlines():
        speaker, separator, rest = line.partition(":")
        role = SPEAKERS.get(speaker.strip().lower()) if separator else None
        if role is not None:
            turns.append(Turn(role, rest.strip()))
        elif turns:
            turns[-1] = Turn(turns[-1].role, f"{turns[-1].content} {line.strip()}".strip())
        else:
            turns.append(Turn("user", line.strip()))
    if not any(turn.content for turn in turns):
        raise DataError("no conversation: pass it as an argument, on standard input, or as --batch FILE.jsonl")
    return tuple(turns)
