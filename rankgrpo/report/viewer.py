"""The sampled lists of a run as data inside the report page; viewer.js shows them.

The groups of rl/rollouts.jsonl go in whole, as gzip in base64, which the browser unpacks after the page is painted.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankgrpo.rollouts.record import MARKS, read_rollouts

MAX_BYTES = 14_000_000
"""Of the data on the page."""


def viewer_context(path: Path, notes: list[str], *, max_bytes: int = MAX_BYTES) -> dict[str, Any] | None:
    """What the template needs of a rollouts file; None where there is none. Adds to `notes` what was left out.

    Raises ValueError naming file and line of a broken row.
    """
    if not path.is_file():
        return None
    rows, cut_short = read_rollouts(path)
    notes += [cut_short] if cut_short else []
    if not rows:
        return None
    shown, data = fit(rows, max_bytes)
    if len(shown) < len(rows):
        notes.append(
            f"Of {len(rows)} sampled groups, {len(shown)} spread evenly over the run are on this page, so that their "
            f"data stay below {max_bytes / 1e6:.0f} MB; rl/rollouts.jsonl holds all."
        )
    steps = {row["step"] for row in shown}
    return {
        "data": data,
        "num_lists": sum(len(row["lists"]) for row in shown),
        "num_groups": len(shown),
        "num_steps": len(steps),
        "marks": list(MARKS.items()),
    }


def fit(rows: Sequence[dict[str, Any]], max_bytes: int) -> tuple[list[dict[str, Any]], str]:
    """The rows, or as many as fit into `max_bytes` when packed, spread evenly; and the packed text."""
    shown = list(rows)
    while len(data := pack(shown)) > max_bytes and len(shown) > 1:
        count = max(1, min(len(shown) - 1, int(0.95 * len(shown) * max_bytes / len(data))))
        shown = [rows[place * len(rows) // count] for place in range(count)]
    return shown, data


def pack(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as base64 of gzip of JSON: the same rows give the same text."""
    text = json.dumps(list(rows), ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode("ascii")


def unpack(data: str) -> list[dict[str, Any]]:
    """The rows of `pack`."""
    return json.loads(gzip.decompress(base64.b64decode(data)))
