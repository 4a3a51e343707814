"""Titles as libraries and film databases write them: the article at the end, other titles in brackets.

`Matrix, The` is The Matrix, `Seven (a.k.a. Se7en)` is also Se7en, and `Postman, The (Postino, Il)` is also Il Postino.
"""

from __future__ import annotations

import re

# "Haine, La": moved to the front like English ones.
ARTICLES = r"the|a|an|le|la|les|l'|el|los|las|il|lo|gli|der|die|das|une?|o|os|as"

_LIBRARY = re.compile(rf"(?P<title>.*\S),\s*(?P<article>{ARTICLES})", re.IGNORECASE)
_LAST_BRACKET = re.compile(r"(?P<before>.*\S)\s*\((?P<inside>[^()]*[^()\s][^()]*)\)", re.DOTALL)
_ALSO_KNOWN = re.compile(r"\s*(?:\ba\.?\s?k\.?\s?a\b\.?|also known as)\s*:?\s*", re.IGNORECASE)
_EDITION = re.compile(
    r"\d|\b(?:edition|cut|version|remaster(?:ed)?|director'?s|extended|uncut|unrated|redux|restored|tv|series|season|part"
    r"|vol|volume|chapter|episode|movie|film|imax|short|documentary|animated|live|collection|trilogy|remake)\b",
    re.IGNORECASE,
)


def natural_order(title: str) -> str | None:
    """The title with its article in front, "The Matrix" for "Matrix, The"; None for a title that ends in none."""
    match = _LIBRARY.fullmatch(title.strip())
    # A library writes the article with a capital; "Yours, mine, a" is no title of that order.
    if match is None or not match["article"][0].isupper():
        return None
    article = match["article"]
    return f"{article}{'' if article.endswith(chr(39)) else ' '}{match['title']}"


def in_library_order(title: str) -> bool:
    """Whether the title, or what stands before brackets at its end, ends in its article."""
    while natural_order(title) is None:
        match = _LAST_BRACKET.fullmatch(title.strip())
        if match is None:
            return False
        title = match["before"]
    return True


def split_names(title: str, *, originals: bool) -> tuple[str, tuple[str, ...]]:
    """(the title in natural order, its other titles) of one written as a database does.

    What follows `a.k.a.` in brackets at the end is another title; with `originals` so is what stands in brackets alone
    ("(Postino, Il)"), unless it names an edition ("(Director's Cut)", "(US)", "(Part 2)").
    """
    others: list[str] = []
    rest = title.strip()
    while match := _LAST_BRACKET.fullmatch(rest):
        inside = match["inside"].strip()
        first, *known = _ALSO_KNOWN.split(inside)
        if known:
            found = [first, *known] if first.strip() else known
        elif originals and not _EDITION.search(inside) and not (inside.isupper() and len(inside) <= 4):
            found = [inside]
        else:
            break
        others = [*(name.strip(" ,;") for name in found), *others]
        rest = match["before"]
    names = [natural_order(name) or name for name in others if name]
    return natural_order(rest) or rest, tuple(dict.fromkeys(names))
