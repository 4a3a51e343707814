"""A sample of what a run drew, kept for people to look at: whole groups with what every line earned, as JSON lines.

It keeps rl.log_lists lists of a run, those of the first few conversations of steps spread evenly over it. The order of
the conversations is random, so nothing is chosen for how it looks. On resume the groups after the checkpoint are cut
off, so the file reads as if the run had never stopped.
"""

# Shape letters: G lists a prompt, B lists of all prompts, T tokens, K ranks, U units.
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankgrpo.data.candidates import sample_catalog
from rankgrpo.data.dialogs import seen_lines
from rankgrpo.data.samples import Sample
from rankgrpo.files.atomic import write_lines
from rankgrpo.files.rows import read_log
from rankgrpo.items.choices import Choices
from rankgrpo.loss import rank_log_ratio
from rankgrpo.rollouts.parts import Answer, repetition
from rankgrpo.rollouts.score import ScoredGroups, Scorer, list_ranks
from rankgrpo.sampler.base import Rollout

GROUPS_A_STEP = 4
COLUMNS = ("lines", "marks", "reward", "advantage", "ratio", "logp")
"""By line of a list. marks: words of `MARKS`, with spaces between; reward: the return of its rank, null beyond rank K;
advantage: that of its tokens, penalties included; ratio: geometric mean over its tokens in the last update of the
batch, null where they were left out of it; logp: mean over its tokens, when it was sampled."""
MARKS = {
    "hit": "an item of the ground truth",
    "repeat": "names what an earlier line named",
    "seen": "named in the conversation already",
    "out": "not in the catalog",
    "unread": "not a line that names an item",
    "forced": "no token of it was a choice",
}


def logged_steps(num_steps: int, *, max_lists: int, lists_a_step: int) -> set[int]:
    """Steps whose groups are kept, as many as `max_lists` pays for, spread evenly from 1 to `num_steps`.

    Example: logged_steps(100, max_lists=90, lists_a_step=30) is {1, 50, 100}
    """
    count = min(max_lists // lists_a_step, num_steps)
    if count < 2:
        return {num_steps} if count else set()
    return {1 + place * (num_steps - 1) // (count - 1) for place in range(count)}


class RolloutLog:
    """Writes `path`, a line a group; groups after `resume_step` of an earlier run are dropped first.

    num_prompts: conversations a step that this process samples for.
    """

    def __init__(self, path: Path, scorer: Scorer, *, num_prompts: int, resume_step: int):
        rl = scorer.rl
        self.path, self.scorer = path, scorer
        self.num_groups = min(GROUPS_A_STEP, num_prompts, rl.log_lists // rl.group_size)
        self.steps = set()
        if self.num_groups:
            lists_a_step = self.num_groups * rl.group_size
            self.steps = logged_steps(rl.num_steps, max_lists=rl.log_lists, lists_a_step=lists_a_step)
        if path.exists() or self.steps:
            kept = [row for row in read_rollouts(path)[0] if row["step"] <= resume_step] if path.exists() else []
            write_lines(path, map(_to_line, kept))

    def wants(self, step: int) -> bool:
        """Whether groups of `step` are kept, the first step being 1."""
        return step in self.steps

    def write(
        self,
        step: int,
        examples: Sequence[Sample],
        rollouts: Sequence[list[Rollout]],
        scored: ScoredGroups,
        choices: Choices | None,
        token_log_ratio: Mapping[int, Tensor],
    ) -> None:
        """Append the first groups of a step.

        token_log_ratio: by list of all groups the log-ratios of its first tokens, as many as went through the model;
        without lists that were left out.
        """
        lines = []
        for place in range(min(self.num_groups, len(examples))):
            example, group = examples[place], rollouts[place]
            row = {
                "step": step,
                "id": example.id,
                "conversation": [{"role": turn.role, "content": turn.content} for turn in example.conversation],
                "groundtruth": [list(title_year) for title_year in example.groundtruth],
                "lists": describe_lists(place, example, group, self.scorer, scored, choices, token_log_ratio),
            }
            lines.append(_to_line(row))
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)


def describe_lists(
    place: int,
    example: Sample,
    group: list[Rollout],
    scorer: Scorer,
    scored: ScoredGroups,
    choices: Choices | None,
    token_log_ratio: Mapping[int, Tensor],
) -> list[dict[str, Any]]:
    """What `COLUMNS` says of every list of the group at `place`, and whether the list was cut, its tokens, its end.

    `end` is the advantage of an end token that is a unit of its own.
    """
    rl, K, G = scorer.rl, scorer.num_ranks, len(group)
    own = range(place * G, (place + 1) * G)
    rank_BT, eos_BT = list_ranks(group, scorer)
    tokens = rank_BT.shape[1]
    unit_BT = scored.units.unit_BT[own.start : own.stop, :tokens]
    # What shares a ratio in the loss, which for ranks leaves out forced tokens and an end that is penalised.
    line_BT = unit_BT if rl.unit == "rank" else rank_BT
    logp_BT = pad_sequence([torch.tensor(rollout.logp) for rollout in group], batch_first=True)
    moved_BT = torch.full_like(logp_BT, torch.nan)
    for g, b in enumerate(own):
        if b in token_log_ratio:
            moved_BT[g, : len(token_log_ratio[b])] = token_log_ratio[b].cpu().float()
    num_lines = max(1, int(rank_BT.max()) + 1)
    logp_BL = rank_log_ratio(logp_BT, torch.zeros_like(logp_BT), line_BT, num_lines)
    ratio_BL = rank_log_ratio(moved_BT.nan_to_num(), torch.zeros_like(moved_BT), line_BT, num_lines).exp()
    left_out = [
        set(line_T[moved_T.isnan()].tolist()) if b in token_log_ratio else range(num_lines)
        for b, line_T, moved_T in zip(own, line_BT, moved_BT, strict=True)
    ]
    forced = _forced_lines(choices, own, rank_BT, num_lines)
    own_catalog, lists = sample_catalog(example, scorer.catalog), []
    for g, (b, rollout) in enumerate(zip(own, group, strict=True)):
        answer = Answer(example, rollout.text, rollout.finished, own_catalog, K, rl.year_tolerance)
        n = len(answer.items)
        units_U = scored.units.advantage_BU[b] if rl.unit == "rank" else scored.advantage_PGU[place, g]
        advantage_L = units_U[:n] if rl.unit == "rank" or len(units_U) == K else units_U.expand(n)
        described = {
            "lines": [rollout.text[slice(*item.chars)].strip() for item in answer.items],
            "marks": line_marks(answer, scorer, forced[g] if forced else ()),
            "reward": _padded(scored.reward_PGK[place, g], n),
            "advantage": _padded(advantage_L, n),
            "ratio": [None if line in left_out[g] else ratio for line, ratio in enumerate(_padded(ratio_BL[g], n))],
            "logp": _padded(logp_BL[g], n),
            "finished": rollout.finished,
            "num_tokens": len(rollout.token_ids),
        }
        end_units = unit_BT[g][eos_BT[g]].tolist()
        if rl.unit == "rank" and end_units and end_units[0] >= K >= n:
            described["end"] = _number(units_U[end_units[0]])
        lists.append(described)
    return lists


def line_marks(answer: Answer, scorer: Scorer, forced: Sequence[bool] = ()) -> list[str]:
    """The marks of every line of a list, words of `MARKS`."""
    relevance_K = torch.as_tensor(scorer.parts["relevance"](answer))
    all_lines = replace(answer, num_ranks=max(1, len(answer.items)))
    repeat_L = repetition(all_lines).tolist()
    seen = seen_lines(answer.items, answer.sample, scorer.catalog, answer.year_tolerance)
    marks = []
    for rank, (item, index) in enumerate(zip(answer.items, answer.indices, strict=True)):
        is_read = item.title is not None
        holds = {
            "hit": rank < answer.num_ranks and bool(relevance_K[rank] > 0),
            "repeat": bool(repeat_L[rank]),
            "seen": seen[rank],
            "out": is_read and index is None,
            "unread": not is_read,
            "forced": rank < len(forced) and forced[rank],
        }
        marks.append(" ".join(mark for mark in MARKS if holds[mark]))
    return marks


def _forced_lines(choices: Choices | None, own: range, rank_BT: Tensor, num_lines: int) -> list[list[bool]]:
    """By list and line, whether none of its tokens was a choice; nothing where lists are free."""
    if choices is None:
        return []
    of_group = choices.of_lists(list(own))
    forced, start = [], of_group.start.tolist()
    for g, length in enumerate(of_group.length.tolist()):
        is_choice = torch.from_numpy(of_group.is_choice[start[g] : start[g] + length])
        chosen = rank_BT[g, :length][is_choice]
        forced.append([not bool((chosen == rank).any()) for rank in range(num_lines)])
    return forced


def read_rollouts(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Groups of a rollouts file, and what was wrong with a last line that a kill cut short (None when it is whole).

    Raises ValueError with file and line for any other broken row.
    """
    rows, cut_short = read_log(path)
    for line, row in rows:
        problem = row if isinstance(row, str) else _problem(row)
        if problem is not None:
            raise ValueError(f"{path}:{line}: {problem}; delete the line, or the file: nothing but the viewer reads it")
    return [row for _, row in rows], cut_short


def _problem(row: dict[str, Any]) -> str | None:
    kinds = {"step": int, "id": str, "conversation": list, "groundtruth": list, "lists": list}
    for key, kind in kinds.items():
        if not isinstance(row.get(key), kind):
            return f"a sampled group needs {key!r}, {kind.__name__}, got {row.get(key)!r}"
    for one in row["lists"]:
        columns = [one.get(name) if isinstance(one, dict) else None for name in COLUMNS]
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return f"a list needs {', '.join(COLUMNS)}, lists of one length"
    return None


def _to_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def _padded(values: Tensor, length: int) -> list[float | None]:
    """The first `length` values; null where there are fewer, as beyond rank K."""
    return [*map(_number, values[:length]), *[None] * (length - len(values))]


def _number(value: Tensor) -> float:
    return round(float(value), 4)
