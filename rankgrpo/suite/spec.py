"""What a suite is: one TOML file that names models, rows, seeds and shared settings.

    title = "..."                 heading of its section in the page
    about = "..."                 what is compared, and why in this order
    models = ["tiny"]             presets; every row runs once a model and seed
    data = "demo"                 used unless the command names a data set
    seeds = [1, 2, 3]             the first seed of every row comes before the second of any
    against = ["sft", "grpo"]     rows that every row is compared with on the same conversations; "start" is the warm
                                  start of each
    against_union = ["rank-grpo"] the same for the union of many lists
    ablation = ["before", "sft"]  rows of the table of stages; before, popularity and ease come with the warm start
    paper = { tiny = ["redial-0.5b"] }   tables of experiments/results/paper.toml to show beside a model's

    [set.rl]                      overrides of the preset for every row
    num_steps = 60

    [[rows]]
    name = "rank-grpo"
    label = "Rank-GRPO, exp_inf"
    group = "returns"             rows of a group share a panel of the figures; without one a row is in the tables only
    method = "rank-grpo"          file of experiments/methods
    set = { "rl.updates_per_batch" = 2 }
    model_set.tiny = { "rl.lr" = 1e-4 }   with one of the models

A row is reinforcement learning from the model of the first row with `stage = "sft"`, or of the one `start` names, or,
with `start = "none"`, from the untrained model. With `stage = "eval"` it trains nothing: the model of the row that
`start` names is scored under this row's settings, such as `eval.constrain`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rankgrpo.config import Config
from rankgrpo.config_file import load_config, preset_file, presets_dir, read_toml
from rankgrpo.errors import ConfigError

BASELINE_ROWS = ("before", "popularity", "ease")
STAGES = ("sft", "rl", "eval")
"""In the order in which rows must run."""
NO_START = "none"
OWN_START = "start"


@dataclass(frozen=True)
class Row:
    name: str
    label: str
    about: str = ""
    stage: str = "rl"
    """rl, sft for a warm start, or eval for another row's model that is scored under other settings."""
    start: str = NO_START
    """Row of stage sft that reinforcement learning starts from; of stage eval, the row whose model is scored."""
    method: str | None = None
    group: str = ""
    overrides: tuple[str, ...] = ()
    """`section.key=value` of every model, the suite's first and the command line's last."""
    model_overrides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further ones by model, again with the command line's last."""
    seeds: tuple[int, ...] = ()

    def overrides_for(self, model: str) -> tuple[str, ...]:
        return (*self.overrides, *self.model_overrides.get(model, ()))


@dataclass(frozen=True)
class Suite:
    name: str
    title: str
    about: str
    models: tuple[str, ...]
    data: str
    rows: tuple[Row, ...]
    against: tuple[str, ...]
    against_union: tuple[str, ...]
    ablation: tuple[str, ...]
    paper: Mapping[str, tuple[str, ...]]

    def row(self, name: str) -> Row:
        """The row of this name. Raises ConfigError listing the rows there are."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise ConfigError(f"suite {self.name} has no row {name!r}; its rows are {', '.join(self.row_names)}")
        return found[0]

    @property
    def row_names(self) -> list[str]:
        return [row.name for row in self.rows]


_SUITE_KEYS = {
    "title": str,
    "about": str,
    "models": list,
    "data": str,
    "seeds": list,
    "against": list,
    "against_union": list,
    "ablation": list,
    "paper": dict,
    "set": dict,
    "rows": list,
}
_ROW_KEYS = {
    "name": str,
    "label": str,
    "about": str,
    "stage": str,
    "start": str,
    "method": str,
    "group": str,
    "set": dict,
    "model_set": dict,
    "seeds": list,
}


def suite_path(name: str) -> Path:
    """File of a suite of the repository, or of one given as a path. Raises ConfigError naming the suites there are."""
    if name.endswith(".toml"):
        return Path(name)
    folder = presets_dir() / "suites"
    known = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in known:
        raise ConfigError(f"no suite {name!r} in {folder}; there are {', '.join(known)} (or give a path to a .toml)")
    return folder / f"{name}.toml"


def read_suite(path: Path, *, overrides: list[str] | None = None) -> Suite:
    """Read a suite; `overrides` (section.key=value) hold for every row and win over the file's.

    Raises ConfigError naming file, row and key for whatever no run could be made of.
    """
    raw = read_toml(path, what="suite")
    _check_keys(raw, _SUITE_KEYS, str(path), required=("title", "models", "seeds", "rows"))
    shared = _as_overrides(raw.get("set", {}))
    rows = tuple(
        _read_row(row, place, path, shared, list(overrides or []), tuple(raw["seeds"]))
        for place, row in enumerate(raw["rows"])
    )
    suite = Suite(
        name=path.stem,
        title=raw["title"],
        about=raw.get("about", "").strip(),
        models=tuple(raw["models"]),
        data=raw.get("data", "demo"),
        rows=_with_starts(rows, path),
        against=tuple(raw.get("against", ())),
        against_union=tuple(raw.get("against_union", ())),
        ablation=tuple(raw.get("ablation", ())),
        paper={model: tuple(tables) for model, tables in raw.get("paper", {}).items()},
    )
    _check_names(suite, path)
    for model in suite.models:
        for row in suite.rows:
            row_config(row, model, suite.data, row.seeds[0], where=f"{path}: row {row.name!r}")
    return suite


def row_config(row: Row, model: str, data: str, seed: int, *, where: str = "") -> Config:
    """The configuration of a row's run; steps that follow from epochs are still 0."""
    overrides = [*row.overrides_for(model), f"seed={seed}"]
    try:
        return load_config(preset_file(model), overrides, method=row.method, model__name=model, data__path=data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _check_keys(raw: Any, known: Mapping[str, type], where: str, required: tuple[str, ...]) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a table, got {raw!r}")
    if unknown := sorted(raw.keys() - known.keys()):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(known)}")
    if missing := [key for key in required if not raw.get(key)]:
        raise ConfigError(f"{where}: needs {missing[0]!r}")
    for key, value in raw.items():
        if not isinstance(value, known[key]):
            raise ConfigError(f"{where}: {key} must be a {known[key].__name__}, got {value!r}")
        if key == "seeds" and not all(type(seed) is int for seed in value):
            raise ConfigError(f"{where}: seeds must be whole numbers, got {value!r}")


def _read_row(raw: Any, place: int, path: Path, shared: list[str], overrides: list[str], seeds: tuple[int, ...]) -> Row:
    where = f"{path}: row {raw.get('name', place + 1) if isinstance(raw, dict) else place + 1}"
    _check_keys(raw, _ROW_KEYS, where, required=("name",))
    stage = raw.get("stage", "rl")
    if stage not in STAGES:
        raise ConfigError(f"{where}: stage must be one of {', '.join(STAGES)}, got {stage!r}")
    if stage == "eval" and (unread := sorted(raw.keys() & {"method", "seeds", "group"})):
        raise ConfigError(
            f"{where}: {unread[0]}: not of a row of stage eval, which trains nothing and has its start's seeds"
        )
    return Row(
        name=raw["name"],
        label=raw.get("label", raw["name"]),
        about=raw.get("about", ""),
        stage=stage,
        start=raw.get("start", ""),
        method=raw.get("method"),
        group=raw.get("group", ""),
        overrides=(*shared, *_as_overrides(raw.get("set", {})), *overrides),
        model_overrides={
            model: (*_as_overrides(table), *overrides) for model, table in raw.get("model_set", {}).items()
        },
        seeds=tuple(raw.get("seeds", ())) or (seeds[:1] if stage == "sft" else seeds),
    )


def _as_overrides(table: Mapping[str, Any], prefix: str = "") -> list[str]:
    """{"rl": {"lr": 1e-4}} and {"rl.lr": 1e-4} alike as ["rl.lr=0.0001"]."""
    overrides = []
    for key, value in table.items():
        if isinstance(value, dict):
            overrides += _as_overrides(value, f"{prefix}{key}.")
        else:
            overrides.append(f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}")
    return overrides


def _with_starts(rows: tuple[Row, ...], path: Path) -> tuple[Row, ...]:
    """Every row with the row that it starts from; one of stage eval has the seeds of that row."""
    starts = [row.name for row in rows if row.stage == "sft"]
    trained = {row.name: row for row in rows if row.stage != "eval"}
    done = []
    for row in rows:
        if row.stage == "eval":
            if row.start not in trained:
                raise ConfigError(
                    f"{path}: row {row.name!r} scores the model of {row.start or NO_START!r}; rows that train one are "
                    f"{', '.join(trained)}"
                )
            done.append(replace(row, seeds=trained[row.start].seeds))
            continue
        start = row.start or (starts[0] if starts and row.stage == "rl" else NO_START)
        if start not in (NO_START, *starts):
            raise ConfigError(
                f'{path}: row {row.name!r} starts from {start!r}; rows with stage = "sft" are '
                f"{', '.join(starts) or 'none'}, and {NO_START!r} is the untrained model"
            )
        done.append(replace(row, start=start))
    return tuple(done)


def _check_names(suite: Suite, path: Path) -> None:
    names = suite.row_names
    if twice := [name for place, name in enumerate(names) if name in (*names[:place], *BASELINE_ROWS, OWN_START)]:
        raise ConfigError(
            f"{path}: two rows are named {twice[0]!r} (before, popularity and ease are always there, and start is "
            f"a word of its own)"
        )
    named = [*suite.paper, *(model for row in suite.rows for model in row.model_overrides)]
    if unknown := [model for model in named if model not in suite.models]:
        raise ConfigError(f"{path}: no such model {unknown[0]!r} in it; models are {', '.join(suite.models)}")
    for key in ("against", "against_union", "ablation"):
        known = {"against": (*names, OWN_START), "ablation": (*names, *BASELINE_ROWS)}.get(key, names)
        if unknown := [name for name in getattr(suite, key) if name not in known]:
            raise ConfigError(f"{path}: {key} names the row {unknown[0]!r}; rows are {', '.join(known)}")
