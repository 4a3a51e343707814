"""The tables and figures of all suites as one page, from `results/*/results.json` and `results/paper.toml` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankgrpo.config_file import presets_dir, read_toml
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.tables import format_interval, format_value, main_metric, metric_label, model_label
from rankgrpo.files.atomic import write_lines
from rankgrpo.suite.figures import Board, Result, base_label, base_of, draw_figures, find_row
from rankgrpo.suite.results import read_results
from rankgrpo.suite.spec import BASELINE_ROWS

HEAD = """# Experiments

<!-- Made by `rankgrpo experiments` from results/: edits are lost. A suite's own remarks
stand in results/*/notes.md. -->

A suite trains one model once by imitation (SFT), then by every method from that same model, and scores all of them on
the same conversations. This page is rebuilt by

```bash hours
make experiments SUITE=cpu DATA=path/to/redial                       # what is missing is run, then the page is made
make experiments SUITE=cpu DATA=path/to/redial MAX_MINUTES=30        # stops in time; the same command goes on
make experiments SUITE=cpu DATA=path/to/redial ONLY=rank-grpo        # one row, and the warm start it needs
make experiments SUITE=cpu DATA=path/to/redial SFT=path/to/run/sft/final SEEDS=1
make experiments SUITE=cpu DATA=path/to/redial PAGE=1                # the page alone, from what has run
```

Given twice, also on machines that share the folder of the runs, the command shares the rows. [suites/](suites) holds
the suites, [methods/](methods) the methods, one TOML each; `SUITE=path/to/mine.toml` runs one of your own
([spec.py](../rankgrpo/suite/spec.py) explains the keys). A row is the mean over its seeds. Intervals are 95 %
bootstrap intervals over conversations, those of differences paired by conversation; they say nothing about further
seeds, for which the scores of the single seeds stand beside them. Recall, NDCG and the other columns are defined in
[evaluate.py](../rankgrpo/evaluation/evaluate.py) and [diversity.py](../rankgrpo/evaluation/diversity.py).
"""
CUTOFFS = (5, 10, 15, 20)
COMPARED_UNIONS = ("_of_1", "_of_4", "_of_16")


def build_page(folder: Path) -> Path:
    """Write `folder/README.md` and the figures beside every results.json under `folder/results`; returns the page."""
    paper = read_paper(presets_dir() / "results" / "paper.toml")
    paths = sorted(folder.glob("results/*/results.json"))
    lines = [HEAD]
    if not paths:
        lines.append("There are no results yet.\n")
    for path in paths:
        lines += suite_section(read_results(path), path.parent, folder, paper)
    page = folder / "README.md"
    write_lines(page, "\n".join(lines).rstrip("\n").split("\n"))
    return page


def read_paper(path: Path) -> dict[str, dict[str, Any]]:
    """Tables of published figures by name. Raises ConfigError for a row without 8 scores."""
    tables = read_toml(path, what="file of published figures")
    for name, table in tables.items():
        for row in table["rows"]:
            if len(row["scores"]) != 2 * len(CUTOFFS):
                raise ConfigError(f"{path}: [{name}] row {row['row']!r} needs 8 scores, Recall then NDCG at 5 to 20")
    return tables


def suite_section(results: dict[str, Any], results_dir: Path, folder: Path, paper: dict[str, Any]) -> list[str]:
    command = suite_command(results)
    lines = [
        f"## {results['title']} ({results['data']})",
        "",
        *([results["about"], ""] if results["about"] else []),
        f"`{command}`",
        "",
    ]
    notes = results_dir / "notes.md"
    if notes.is_file():
        lines += [notes.read_text(encoding="utf-8").strip(), ""]
    boards = {model: board for model, board in results["boards"].items() if board["rows"]}
    for model, board in boards.items():
        tables = [paper[name] for name in results["paper"].get(model, []) if name in paper]
        tables.sort(key=lambda table: table["data"] != results["data"])  # the same conversations first
        prefix = f"{Path(model).name}-" if len(results["boards"]) > 1 else ""
        lines += [f"### {model}", "", *measured_section(board, results, tables)]
        for figure, file in draw_figures(board, results["against"], results_dir, prefix):
            link = f"![{figure.title}]({file.relative_to(folder).as_posix()})"
            lines += [f"**{figure.title}.** {figure.caption}", "", link, ""]
        for table in tables:
            lines += _titled(f"The paper's figures: {table['title']}", paper_table(table))
        lines += _titled("Rows", recipes_table(board, command))
    return lines if boards else [*lines, "Nothing of it has run yet.", ""]


def suite_command(results: dict[str, Any]) -> str:
    data = "" if results["data"] == "demo" else f" DATA=path/to/{results['data']}"
    return f"make experiments SUITE={results['suite']}{data}"


def measured_section(board: Board, results: dict[str, Any], paper: Sequence[dict[str, Any]]) -> list[str]:
    return [
        *[_facts(board), "", *scores_table(board), ""],
        *_titled("Paired differences", gains_table(board, results["against"], paper)),
        *_titled("Stage by stage", stages_table(board, results["ablation"], paper)),
        *_titled("Many lists a conversation", union_table(board, results["against_union"])),
    ]


def _titled(title: str, table: list[str]) -> list[str]:
    return [f"**{title}**", "", *table, ""] if table else []


def _facts(board: Board) -> str:
    machines = dict.fromkeys(row["machine"]["machine"] for row in board["rows"] if "machine" in row)
    commits = dict.fromkeys(row["machine"]["commit"] for row in board["rows"] if "machine" in row)
    draws = board.get("num_draws", 1)
    lists = f"lists of {board['num_ranks']}" + (f", the mean of {draws} drawn a conversation" if draws > 1 else "")
    return (
        f"{board['num_samples']:,} {board['split']} conversations, {lists}. "
        f"Machine: {', '.join(map(str, machines))}. Commit: {', '.join(map(str, commits))}."
    )


def label_of(row: Result) -> str:
    return row.get("label") or model_label(row["name"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


# ---------------------------------------------------------------------------------------------------------- tables


def scores_table(board: Board) -> list[str]:
    """All scores of all rows."""
    accuracy = [key for key in board["rows"][0]["metrics"] if key.startswith(("recall@", "ndcg@"))]
    shares = ("in_catalog_frac", "parsed_frac", "duplicate_frac")
    last = main_metric(accuracy)
    head = ["", *(key.replace("recall", "R").replace("ndcg", "N") for key in accuracy)]
    head += [*(metric_label(key) for key in shares), f"{metric_label(last)} by seed", "Kept step", "Hours", "Tokens, M"]
    best = {key: max(row["metrics"][key]["mean"] for row in board["rows"] if _is_model(row)) for key in accuracy}
    rows = []
    for row in board["rows"]:
        cells = [label_of(row)]
        for key in accuracy:
            interval = row["metrics"][key]
            mean = format_value(key, interval["mean"])
            mean = f"**{mean}**" if _is_model(row) and interval["mean"] == best[key] > 0 else mean
            cells.append(f"{mean} {format_interval(key, interval)}" if key == last else mean)
        cells += [format_value(key, row["metrics"][key]["mean"]) for key in shares]
        seeds = [format_value(last, scores[last]) for scores in row["by_seed"].values()]
        cells.append(" ".join(seeds) if len(seeds) > 1 else "")
        rows.append([*cells, *_cost_cells(row)])
    return _table(head, rows)


def _is_model(row: Result) -> bool:
    return row["name"] not in BASELINE_ROWS


def _cost_cells(row: Result) -> list[str]:
    if "cost" not in row:
        return ["", "", ""]
    cost = row["cost"]
    kept = " ".join(map(str, cost["kept_steps"])) or "last"
    tokens = (cost["tokens_sampled"] + cost["tokens_trained"]) / 1e6
    return [f"{kept} of {cost['steps']}", f"{cost['hours']:.2f}", f"{tokens:.1f}"]


def gains_table(board: Board, against: Sequence[str], paper: Sequence[dict[str, Any]]) -> list[str]:
    """NDCG at the deepest cut against every row of `against`, seed by seed too, and what the paper has there."""
    rows = [row for row in board["rows"] if row["gain"] and _is_model(row)]
    bases = [name for name in against if any(name in row["gain"] for row in rows)]
    if not bases:
        return []
    key = main_metric(rows[0]["metrics"])
    with_paper = [base for base in bases if any(_paper_gain(paper, row["name"], base) for row in rows)]
    with_seeds = any(len(row["by_seed"]) > 1 for row in rows)
    head = [""]
    for base in bases:
        head += [f"{metric_label(key)} over {base_label(board, base)}", "relative", *["by seed"] * with_seeds]
        head += ["the paper's"] if base in with_paper else []
    lines = []
    for row in rows:
        cells = [row["label"]]
        for base in bases:
            gain = row["gain"].get(base)
            cells += _gain_cells(key, gain) if gain else ["", ""]
            cells += [_gains_by_seed(key, row, base_of(board, row, base)) if gain else ""] * with_seeds
            cells += [_paper_gain(paper, row["name"], base)] if base in with_paper else []
        lines.append(cells)
    return _table(head, lines)


def _gain_cells(key: str, gain: dict[str, Any]) -> list[str]:
    difference, relative = gain[key]["difference"], gain[key]["relative"]
    value = format_value(key, difference["mean"], sign=True)
    if difference["low"] > 0 or difference["high"] < 0:
        value = f"**{value}**"  # the interval leaves out 0
    return [f"{value} {format_interval(key, difference, sign=True)}", _relative(relative)]


def _gains_by_seed(key: str, row: Result, base: Result | None) -> str:
    """Relative gain of every seed over the mean of the base's; empty for one seed, whose gain is the row's."""
    mean = base["metrics"][key]["mean"] if base else 0.0
    seeds = [scores[key] for scores in row["by_seed"].values()]
    return " ".join(f"{score / mean - 1:+.1%}" for score in seeds) if mean > 0 and len(seeds) > 1 else ""


def _relative(interval: dict[str, float | None] | None) -> str:
    if not interval or None in interval.values():
        return ""
    return f"{interval['mean']:+.1%} [{interval['low']:+.1%}, {interval['high']:+.1%}]"


def published_ndcg(paper: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """data set -> row -> NDCG@20."""
    published: dict[str, dict[str, float]] = {}
    for table in paper:
        for row in table["rows"]:
            published.setdefault(table["data"], {}).setdefault(row["row"], row["scores"][-1])
    return published


def _paper_gain(paper: Sequence[dict[str, Any]], name: str, base: str) -> str:
    """Relative gain of NDCG@20 on the first data set that has both rows, named unless it is the first of all."""
    for place, (data, scores) in enumerate(published_ndcg(paper).items()):
        if name in scores and base in scores and name != base:
            return f"{scores[name] / scores[base] - 1:+.1%}" + (f" ({data})" if place else "")
    return ""


def stages_table(board: Board, names: Sequence[str], paper: Sequence[dict[str, Any]]) -> list[str]:
    """What every stage of the method is worth."""
    rows = [row for name in names if (row := find_row(board, name)) is not None]
    if not rows:
        return []
    accuracy = [key for key in rows[0]["metrics"] if key.startswith(("recall@", "ndcg@"))]
    keys = [key for key in accuracy if key.endswith(main_metric(accuracy).removeprefix("ndcg"))]
    by_data = published_ndcg(paper)
    # One data set, so that its stages compare: the one with most of them.
    data = max(by_data, key=lambda data: sum(row["name"] in by_data[data] for row in rows), default="")
    published = by_data.get(data, {})
    lines = []
    for row in rows:
        scores = [f"{format_value(k, row['metrics'][k]['mean'])} {format_interval(k, row['metrics'][k])}" for k in keys]
        value = format_value("ndcg@20", published[row["name"]]) if row["name"] in published else ""
        lines.append([label_of(row), *scores, *([value] if published else [])])
    return _table(["", *map(metric_label, keys), *([f"the paper's NDCG@20, {data}"] if published else [])], lines)


def union_table(board: Board, against: Sequence[str]) -> list[str]:
    """Recall of unions, coverage and popularity, and the paired differences to every row of `against`."""
    rows = [row for row in board["rows"] if "union" in row]
    if not rows:
        return []
    most = max((row["union"] for row in rows), key=len)
    recalls = [key for key in most if key.startswith("recall@")]
    coverage = [key for key in most if key.startswith("coverage_of_")]
    ndcg = main_metric(most)
    keys = [ndcg, *recalls, *dict.fromkeys((coverage[0], coverage[-1])), "popularity", "hit_popularity", "gini"]
    bases = [row for name in against if (row := find_row(board, name)) in rows]
    compared = [ndcg, *(key for key in recalls if key.endswith(COMPARED_UNIONS) or key == recalls[-1]), coverage[-1]]
    head = ["", *(metric_label(key) for key in keys)]
    lines = []
    for row in rows:
        union = row["union"]
        lines.append([label_of(row), *(format_value(k, union[k]["mean"]) if k in union else "" for k in keys)])
    text = f"{board['num_union_samples']:,} conversations, {board['num_lists']} lists each, sampled as in training."
    table = [text, "", *_table(head, lines)]
    for base in bases:
        compare = [row for row in rows if base["name"] in row.get("union_gain", {}) and row is not base]
        if compare:
            head = [f"less {label_of(base)}", *map(metric_label, compared)]
            table += ["", *_table(head, [_union_gain_cells(row, base["name"], compared) for row in compare])]
    return table


def _union_gain_cells(row: Result, base: str, keys: Sequence[str]) -> list[str]:
    cells = [label_of(row)]
    for key in keys:
        gain = row["union_gain"][base].get(key)
        value = "" if gain is None else format_value(key, gain["mean"], sign=True)
        cells.append(f"{value} {format_interval(key, gain, sign=True)}" if gain and "low" in gain else value)
    return cells


def paper_table(table: dict[str, Any]) -> list[str]:
    head = ["", *(f"{letter}@{k}" for letter in "RN" for k in CUTOFFS)]
    return _table(head, [[row["label"], *(format_value("ndcg@20", s) for s in row["scores"])] for row in table["rows"]])


def recipes_table(board: Board, command: str) -> list[str]:
    """What a row is and the command that runs it alone."""
    lines = []
    for row in board["rows"]:
        if "recipe" in row:
            overrides = " ".join(f"`{override}`" for override in _own_overrides(row, board))
            method = f"`{row['recipe']['method']}`" if row["recipe"]["method"] else ""
            lines.append([row["label"], row["about"], method, overrides, f"`{command} ONLY={row['name']}`"])
    shared = " ".join(f"`{override}`" for override in _shared_overrides(board))
    return [*([f"Every row: {shared}", ""] if shared else []), *_table(["", "", "method", "set", "command"], lines)]


def _shared_overrides(board: Board) -> list[str]:
    sets = [row["recipe"]["set"] for row in board["rows"] if "recipe" in row]
    return [override for override in sets[0] if all(override in other for other in sets)] if sets else []


def _own_overrides(row: Result, board: Board) -> list[str]:
    shared = _shared_overrides(board)
    return [override for override in row["recipe"]["set"] if override not in shared]
