"""`rankgrpo show`: one sampled group of a run in a terminal, its lists side by side with what every line earned."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from rankgrpo.errors import DataError
from rankgrpo.items.format import title_line
from rankgrpo.rollouts.record import read_rollouts

Measure = Literal["reward", "advantage", "ratio", "logp"]
SIGNS = {"hit": "*", "repeat": "=", "seen": "^", "out": "?", "unread": "!", "forced": "~"}
LEGEND = "* hit   = repeat   ^ seen   ? not in the catalog   ! unreadable   ~ forced"
_FORMATS = {"reward": "{:.2f}", "advantage": "{:+.2f}", "ratio": "{:.3f}", "logp": "{:.2f}"}
NARROWEST = 36  # columns of a list
UP, DOWN = (22, 28, 34), (52, 88, 124)  # greens and reds of the 256 colours, from faint to strong


def show(run: Path, step: int | None, place: int, sample_id: str | None, by: Measure) -> str:
    """The group of `run` at `step` (the last that was kept when None) as text for the terminal.

    place: which of the step's groups, from 1; sample_id chooses by conversation instead. Raises DataError for a run
    without sampled lists and for a step or a group that was not kept, naming those that were.
    """
    path = run / "rl" / "rollouts.jsonl"
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; a run keeps sampled lists from its first step on, unless it has rl.log_lists=0"
        )
    rows, _ = read_rollouts(path)
    if not rows:
        raise DataError(f"{path}: no step was kept yet")
    group, position = choose_group(rows, step, place, sample_id)
    width = shutil.get_terminal_size((120, 24)).columns
    return f"{run}, {position}\n" + format_group(group, by=by, width=width, scale=largest(rows, by), out=sys.stdout)


def choose_group(
    rows: Sequence[Mapping[str, Any]], step: int | None, place: int, sample_id: str | None
) -> tuple[Mapping[str, Any], str]:
    """The group asked for, and where it stands; errors as `show`."""
    if sample_id is not None:
        found = [row for row in rows if row["id"] == sample_id and step in (None, row["step"])]
        if not found:
            kept = ", ".join(dict.fromkeys(row["id"] for row in rows if step in (None, row["step"])))
            where = "" if step is None else f" at step {step}"
            raise DataError(f"--id {sample_id}: no group of this conversation was kept{where}; kept: {_short(kept)}")
        return found[-1], f"step {found[-1]['step']}"
    steps = sorted({row["step"] for row in rows})
    step = steps[-1] if step is None else step
    of_step = [row for row in rows if row["step"] == step]
    if not of_step:
        near = sorted(sorted(steps, key=lambda kept: abs(kept - step))[:6])
        raise DataError(
            f"--step {step}: not kept; {len(steps)} steps from {steps[0]} to {steps[-1]} are, the nearest "
            f"{', '.join(map(str, near))} (rl.log_lists says how many lists a run keeps)"
        )
    if not 1 <= place <= len(of_step):
        raise DataError(f"--group {place}: step {step} has the groups 1 to {len(of_step)}")
    return of_step[place - 1], f"step {step}, group {place} of {len(of_step)}"


def largest(rows: Sequence[Mapping[str, Any]], by: Measure) -> float:
    """The largest `strength` of a line in all groups; at least a little above 0."""
    values = (value for row in rows for one in row["lists"] for value in one[by])
    return max((abs(strength(value, by)) for value in values), default=0.0) or 1e-9


def strength(value: float | None, by: Measure) -> float:
    """How strongly a line is coloured, with the sign of its colour: 0 for what changes nothing."""
    if value is None:
        return 0.0
    if by == "ratio":
        return math.log(max(value, 1e-9))
    return math.exp(value) if by == "logp" else value


def format_group(group: Mapping[str, Any], *, by: Measure, width: int, scale: float, out: TextIO) -> str:
    """A group as text: conversation, ground truth, and its lists side by side as far as `width` allows.

    Lines are coloured only where `out` is a terminal and NO_COLOR is not set.
    """
    coloured = out.isatty() and not os.environ.get("NO_COLOR")
    lines = [f"conversation {printable(group['id'])}"]
    for turn in group["conversation"]:
        speaker = "Recommender" if turn["role"] == "assistant" else "User"
        lines.append(f"  {speaker}: {printable(turn['content'])}")
    truth = ", ".join(title_line(*item) for item in group["groundtruth"])
    lines += [f"ground truth: {printable(truth)}", ""]
    lists = list(enumerate(group["lists"], start=1))
    num_beside = min(max(1, (width - 4) // NARROWEST), max(1, len(lists)))
    column = min((width - 4) // num_beside, 60)
    for start in range(0, len(lists), num_beside):
        block = lists[start : start + num_beside]
        lines.append("    " + "".join(_fit(_head(number, one), column) for number, one in block).rstrip())
        for rank in range(max(len(one["lines"]) for _, one in block)):
            cells = "".join(_cell(one, rank, by, column, scale, coloured) for _, one in block)
            lines.append(f"{rank + 1:3d} {cells}".rstrip())
        lines.append("")
    return "\n".join([*lines, f"{LEGEND}   number: {by}"])


def printable(text: str) -> str:
    """The text without what a terminal would obey: escapes, line breaks and other controls become a replacement."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def _head(number: int, one: Mapping[str, Any]) -> str:
    total = sum(value for value in one["reward"] if value is not None)
    end = "" if one.get("finished", True) else ", cut"
    end += f", end {one['end']:+.2f}" if "end" in one else ""
    return f"list {number}: reward {total:.2f}, {one.get('num_tokens', 0)} tokens{end}"


def _cell(one: Mapping[str, Any], rank: int, by: Measure, column: int, scale: float, coloured: bool) -> str:
    if rank >= len(one["lines"]):
        return " " * column
    value = one[by][rank]
    signs = "".join(SIGNS.get(mark, "") for mark in one["marks"][rank].split())
    number = "" if value is None else _FORMATS[by].format(value)
    text = _fit(f"{signs:<2}{printable(one['lines'][rank])}", column - 8) + f"{number:>6}"
    if coloured and (shade := _shade(strength(value, by) / scale)) is not None:
        bold = "1;" if "*" in signs else ""
        text = f"\x1b[{bold}38;5;15;48;5;{shade}m{text}\x1b[0m"
    return text + "  "


def _shade(part: float) -> int | None:
    level = math.ceil(3 * min(abs(part), 1.0) - 1e-9)
    return None if level < 1 or abs(part) < 0.02 else (UP if part > 0 else DOWN)[level - 1]


def _fit(text: str, width: int) -> str:
    return text.ljust(width) if len(text) < width else text[: width - 2] + "… "


def _short(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."
