"""Text with names between braces: `{title} by {author}`."""

from __future__ import annotations

import re
from pathlib import Path

from rankgrpo.errors import ConfigError

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(template: str) -> tuple[str, ...]:
    """The names between braces, each once, in order."""
    return tuple(dict.fromkeys(PLACEHOLDER.findall(template)))


def prompt_text(prompt: str) -> str:
    """The template that data.prompt gives: itself where it holds a brace or a line break, else the text of that file.

    Raises ConfigError for a file that is not there, is no UTF-8, or has no place for the conversation.
    """
    if not prompt or "{" in prompt or "\n" in prompt:
        return prompt
    try:
        text = Path(prompt).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(
            f"data.prompt: {prompt}: no such file; it holds the text of the prompt, with {{context}}"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.prompt: {prompt}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from None
    if "context" not in placeholders(text):
        raise ConfigError(f"data.prompt = {prompt}: the template needs {{context}}, where the conversation goes")
    return text


def item_problem(template: str) -> str | None:
    """Why a template can write no item (data.item), or None."""
    if len(template.splitlines()) > 1:
        return "holds a line break, but a list names one item a line"
    if re.search(r"[{}]", PLACEHOLDER.sub("", template)):
        return "has a brace without its partner; columns stand between braces, such as {title}"
    if not all(name.strip() for name in placeholders(template)):
        return "has a pair of braces without the name of a column between them"
    if not placeholders(template):
        return "names no column of the catalog; one stands between braces, such as {title}"
    return None
