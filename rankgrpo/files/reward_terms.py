"""The text of rl.reward: a weighted sum of parts, by name."""

from __future__ import annotations

import re

PARTS = {
    "relevance": "by rank: 1 for the first line that names an item of the ground truth",
    "format": "by rank: 1 for a line of the form of data.item, Title (Year)",
    "in_catalog": "by rank: 1 for a line that names a catalog item",
    "repetition": "by rank: 1 for a line that names what an earlier line named; give it a negative weight",
    "novelty": "by rank: from 0 for the most popular item of the catalog to 1 for one nobody asked for in training",
    "length": "by list: n lines of K asked for, min(n, K) / max(n, K)",
}
"""Name of every part of our own, and what it measures; `reward_parts` computes them."""

_TERM = re.compile(
    r"\s*(?P<sign>[+-])?\s*(?:(?P<weight>[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*\*\s*)?"
    r"(?P<name>[A-Za-z_][\w.]*(?::\w+)?)\s*",
    re.ASCII,
)


def reward_terms(text: str) -> dict[str, float]:
    """Part -> weight, in the order written. A part has a name of `PARTS`, or is `package.module:function`.

    Raises ValueError for text that is not a sum of `weight * part`, for an unknown part and for one given twice.
    """
    terms: dict[str, float] = {}
    place = 0
    while place < len(text) or not terms:
        match = _TERM.match(text, place)
        if match is None or (terms and not match["sign"]):
            raise ValueError(
                f"cannot read {text[place:].strip()!r} in {text!r}; expected a sum such as relevance + 0.1 * in_catalog"
            )
        name = match["name"]
        if name not in PARTS and ":" not in name:
            raise ValueError(
                f"unknown part {name!r}; parts are {', '.join(PARTS)}, or your own function, package.module:function"
            )
        if name in terms:
            raise ValueError(f"part {name!r} is given twice in {text!r}")
        try:
            weight = float(match["weight"] or 1.0)
        except ValueError:
            raise ValueError(f"{match['weight']!r} is no number in {text!r}") from None
        terms[name] = -weight if match["sign"] == "-" else weight
        place = match.end()
    return terms
