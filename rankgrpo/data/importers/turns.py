"""Conversations as files hold them: text with speakers, lists of texts, lists of messages, prompts of the release."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rankgrpo.data.conversation import read_conversation
from rankgrpo.data.importers.saved import MARK, parse_prompt, said
from rankgrpo.data.samples import Turn
from rankgrpo.errors import DataError
from rankgrpo.files.rows import parse_list_text

ROLES = {
    **dict.fromkeys(("user", "human", "seeker", "initiator", "you", "customer"), "user"),
    **dict.fromkeys(("assistant", "system", "bot", "gpt", "recommender", "respondent", "agent"), "assistant"),
}
_WHO, _WHAT = ("role", "from", "speaker"), ("content", "value", "text", "utterance")
_LABEL = rf"(?:{'|'.join(name.capitalize() for name in ROLES)}|{'|'.join(name.upper() for name in ROLES)}):(?=\s|$)"
_LABELLED = re.compile(_LABEL)
_INLINE = re.compile(rf"\s+(?={_LABEL})")


def read_turns(value: object) -> tuple[Turn, ...]:
    """The turns in which something is said; none where the value holds no more than the cue of the next speaker.

    Text has a line a turn (`User: ...`), or all turns in one line behind capitalised speakers; a text that is a list in
    JSON or Python is that list. Texts of a list without speakers are turns from the user on, by turns. A message of a
    prompt as released with the paper becomes the conversation that it quotes. DataError for anything else.
    """
    if isinstance(value, str):
        listed = parse_list_text(value, "conversation")
        return said(_from_text(value) if listed is None else _from_list(listed))
    if not isinstance(value, list) or not value:
        raise DataError(f"conversation must be a list of turns or a text, got {value!r:.80}")
    return said(_from_list(value))


def _from_text(text: str) -> Sequence[Turn]:
    if MARK in text:
        return parse_prompt(text)
    text = text.strip()
    if _LABELLED.match(text) and len(text.splitlines()) == 1:
        text = _INLINE.sub("\n", text)
    return read_conversation(text, ROLES) if text else ()


def _from_list(entries: Sequence[Any]) -> Sequence[Turn]:
    if all(isinstance(entry, str) for entry in entries):
        if any(_LABELLED.match(entry.strip()) for entry in entries):
            return read_conversation("\n".join(" ".join(entry.split()) for entry in entries), ROLES)
        return [Turn(("user", "assistant")[place % 2], entry.strip()) for place, entry in enumerate(entries)]
    messages = [_message(entry, place) for place, entry in enumerate(entries)]
    if quoting := [content for _, content in messages if MARK in content]:
        return parse_prompt(quoting[-1])
    if messages[0][0] == "system" and any(role == "assistant" for role, _ in messages):
        messages = messages[1:]  # an instruction to the assistant, which speaks for itself
    turns = []
    for place, (role, content) in enumerate(messages):
        if role not in ROLES:
            raise DataError(f"conversation[{place}].role must be one of {', '.join(ROLES)}, got {role!r}")
        turns.append(Turn(ROLES[role], content.strip()))
    return turns


def _message(entry: object, place: int) -> tuple[str, str]:
    if isinstance(entry, Mapping):
        who = next((entry[name] for name in _WHO if entry.get(name) is not None), None)
        what = next((entry[name] for name in _WHAT if isinstance(entry.get(name), str)), None)
        if who is not None and what is not None:
            return str(who).lower(), what
    raise DataError(f"conversation[{place}] must be an object with role and content, got {entry!r:.80}")
