"""A conversation out of plain text, as people type it."""

from __future__ import annotations

from collections.abc import Mapping

from rankgrpo.data.samples import Turn

SPEAKERS = {"user": "user", "you": "user", "assistant": "assistant", "system": "assistant"}


def read_conversation(text: str, speakers: Mapping[str, str] = SPEAKERS) -> tuple[Turn, ...]:
    """Turns from text: a line `User: ...` or `Assistant: ...` opens a turn, anything else continues it.

    Text without such a line is one user turn, and a turn in which nothing is said is none: the cue of the next speaker
    ends many a text. Empty when nothing is said at all.
    """
    turns: list[Turn] = []
    for line in text.strip().splitlines():
        speaker, separator, rest = line.partition(":")
        role = speakers.get(speaker.strip().lower()) if separator else None
        if role is not None:
            turns.append(Turn(role, rest.strip()))
        elif turns:
            turns[-1] = Turn(turns[-1].role, f"{turns[-1].content} {line.strip()}".strip())
        else:
            turns.append(Turn("user", line.strip()))
    return tuple(turn for turn in turns if turn.content)
