"""Text with names between braces: `{title} by {author}`."""

from __future__ import annotations

import re

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(template: str) -> tuple[str, ...]:
    """The names between braces, each once, in order."""
    return tuple(dict.fromkeys(PLACEHOLDER.findall(template)))


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
