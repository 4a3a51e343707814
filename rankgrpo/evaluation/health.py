"""The health report of a data set, `rankgrpo data check PATH`: is this worth training on, and what must be beaten?

Counts and lengths by split, how the ground truth lies in the catalog and in the training split, what the splits share
(a leak), what looked wrong while reading, and the scores of the popularity list, of EASE and, for the demo, of an
oracle that knows the simulated tastes. It judges the data only; no language model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rankgrpo.baselines.ease import EaseTeacher
from rankgrpo.baselines.popularity import popularity_lists
from rankgrpo.data.dialogs import dialog_ids, groundtruth_items, named_items
from rankgrpo.data.samples import SPLITS, Dataset, Sample
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.evaluate import score_items, summarise
from rankgrpo.evaluation.tables import format_table
from rankgrpo.files.rows import Problem
from rankgrpo.items.catalog import Catalog
from rankgrpo.items.lines import LineCatalog
from rankgrpo.items.titles import in_library_order
from rankgrpo.model.constraint import open_constraint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASELINE_METRICS = tuple(f"{name}@{k}" for name in ("recall", "ndcg") for k in (5, 10, 20))
MAX_SHOWN_A_KIND = 3
LEAK_FOLDS, LEAK_SAMPLES = 5, 2000
LEAK_RATIO = 1.4
"""Recall out of fold over that on other splits from which dialogs are taken to leak; on ReDial it is 1.03."""


@dataclass(frozen=True)
class Spread:
    """Median, 95th percentile and maximum of a count; each is a value that occurs."""

    median: int
    p95: int
    max: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread:
        return cls(*(int(value) for value in np.quantile(values, [0.5, 0.95, 1.0], method="inverted_cdf")))

    def __str__(self) -> str:
        return f"{self.median} / {self.p95} / {self.max}"


@dataclass(frozen=True)
class SplitHealth:
    """Facts about one split. Shares are of ground-truth entries or seen titles, each counted as often as it occurs."""

    num_samples: int
    num_dialogs: int
    num_dropped: int
    """Samples left out because their ground truth is empty."""
    turns: Spread
    words: Spread
    """Words of a conversation, instruction not counted."""
    groundtruth: Spread
    seen_titles: Spread
    in_catalog_frac: float
    """Share of the ground truth that the catalog holds; the rest can never be a hit."""
    new_frac: float
    """Share of the ground truth that no training sample has as ground truth."""
    named_frac: float
    """Share of the ground truth that the conversation named before; the teacher's lists leave it out."""
    known_seen_frac: float
    """Share of the seen titles that the catalog holds; 1 where there are none."""
    nothing_named_frac: float
    """Share of the samples that name no catalog item: the popularity list is all EASE can give them."""
    num_repeated: int
    """Samples whose conversation is, word for word, that of an earlier sample of the split."""


@dataclass(frozen=True)
class HealthReport:
    """What `check_dataset` found; `str()` renders it."""

    name: str
    catalog: dict[str, str]
    """Facts about the catalog, ready to print."""
    splits: dict[str, SplitHealth]
    baselines: dict[str, list[dict[str, Any]]]
    """By split, the summaries of `rankgrpo.evaluation.evaluate.summarise` for popularity, ease and (demo) oracle."""
    warnings: list[str]
    """What would make results wrong or meaningless."""
    problems: list[Problem]
    """`Dataset.problems`."""
    trie: dict[str, str] = field(default_factory=dict)
    """Facts about the catalog as a trie of tokens, ready to print; empty without a tokenizer."""

    def __str__(self) -> str:
        return render(self)


def headline(dataset: Dataset) -> str:
    """The report without what takes long (baselines) or is long (problems)."""
    report = check_dataset(dataset, baselines=False)
    return "\n\n".join(
        [
            f"Data set {report.name}",
            _section("Catalog", _pairs(report.catalog)),
            _section("Splits", _split_table(report.splits)),
            _section("Warnings", "\n".join(report.warnings) or "none"),
            f"{len(report.problems)} problems; `rankgrpo data check` shows them, and the baselines",
        ]
    )


def check_dataset(
    dataset: Dataset, *, baselines: bool = True, tokenizer: PreTrainedTokenizerBase | None = None, num_ranks: int = 20
) -> HealthReport:
    """Examine a data set; seconds for thousands of conversations, most of them in EASE (fitted with its defaults).

    With a tokenizer, also what holding lists of `num_ranks` lines to the catalog would come to.
    """
    train_items = {item for sample in dataset.train for item in _keys(sample, dataset.catalog)}
    tables = _baselines(dataset) if baselines else {}
    return HealthReport(
        name=dataset.name,
        catalog=_catalog_facts(dataset.catalog),
        splits={name: _split_health(dataset, name, train_items) for name in SPLITS},
        baselines=tables,
        warnings=[*_leaks(dataset), *_fold_leak(dataset, tables), *_catalog_warnings(dataset.catalog)],
        problems=dataset.problems,
        trie=_trie_facts(dataset, tokenizer, num_ranks) if tokenizer is not None else {},
    )


def _trie_facts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, num_ranks: int) -> dict[str, str]:
    try:
        constraint = open_constraint(dataset.catalog, tokenizer, num_ranks=num_ranks, forbid="repeats")
    except ConfigError as error:
        return {"impossible": str(error)}
    trie = constraint.trie
    asked = [index for sample in dataset.test for index in groundtruth_items(sample, dataset.catalog)]
    facts = trie.describe(asked or None)
    places = {name: facts["places"][name] for name in ("first", "middle", "last")}
    shown = {name: place for name, place in places.items() if name == "middle" or place != places["middle"]}
    return {
        "lines": f"{facts['lines']}, {facts['merged']} items share the line of another",
        **{
            f"nodes, {name} line": f"{place['nodes']}, {place['root']} at the root, {place['tokens_a_line']:.1f} "
            f"tokens a line of the test ground truth, {place['forced']:.0%} forced"
            for name, place in shown.items()
        },
        "longest list": f"{constraint.max_tokens} tokens for {num_ranks} lines",
        "size": f"{facts['bytes'] / 1e6:.1f} MB, built in {facts['seconds']:.1f} s",
    }


def _keys(sample: Sample, catalog: Catalog) -> list[tuple[str, int | None]]:
    return [(catalog.title_key(title), year) for title, year in sample.groundtruth]


def _split_health(dataset: Dataset, name: str, train_items: set[tuple[str, int | None]]) -> SplitHealth:
    samples, catalog = dataset.split(name), dataset.catalog
    named = [set(named_items(sample, catalog)) for sample in samples]
    indices = [[catalog.lookup(*item) for item in sample.groundtruth] for sample in samples]
    flat = [index for group in indices for index in group]
    keys = [key for sample in samples for key in _keys(sample, catalog)]
    seen = [title for sample in samples for title in sample.seen_titles]
    return SplitHealth(
        num_samples=len(samples),
        num_dialogs=max(dialog_ids(samples)) + 1,
        num_dropped=dataset.num_dropped.get(name, 0),
        turns=Spread.of([len(sample.conversation) for sample in samples]),
        words=Spread.of([sum(len(turn.content.split()) for turn in sample.conversation) for sample in samples]),
        groundtruth=Spread.of([len(sample.groundtruth) for sample in samples]),
        seen_titles=Spread.of([len(sample.seen_titles) for sample in samples]),
        in_catalog_frac=sum(index is not None for index in flat) / len(flat),
        new_frac=sum(key not in train_items for key in keys) / len(keys),
        named_frac=sum(i in known for known, group in zip(named, indices, strict=True) for i in group) / len(flat),
        known_seen_frac=sum(bool(catalog.title_indices(title)) for title in seen) / len(seen) if seen else 1.0,
        nothing_named_frac=sum(not known for known in named) / len(samples),
        num_repeated=len(samples) - len({sample.conversation for sample in samples}),
    )


def _leaks(dataset: Dataset) -> list[str]:
    """Ids, dialogs and conversations that two splits share."""
    warnings = []
    everything = [sample for name in SPLITS for sample in dataset.split(name)]
    dialog_of = iter(dialog_ids(everything))
    dialogs = {name: {next(dialog_of) for _ in dataset.split(name)} for name in SPLITS}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        a, b = dataset.split(first), dataset.split(second)
        ids = sorted({sample.id for sample in a} & {sample.id for sample in b})
        if ids:
            warnings.append(f"leak: {first} and {second} share {len(ids)} ids, for example {ids[0]}")
        if num_dialogs := len(dialogs[first] & dialogs[second]):
            warnings.append(f"leak: {num_dialogs} dialogs have samples in both {first} and {second}")
        known = {sample.conversation for sample in a}
        same = [sample.id for sample in b if sample.conversation in known]
        if same:
            warnings.append(
                f"{len(same)} conversations of {second} are in {first} word for word, for example {same[0]}; a leak "
                "unless they are mere greetings"
            )
    return warnings


def _fold_leak(dataset: Dataset, tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Whether EASE knows training conversations that it was fitted without: their dialogs are then told apart wrongly.

    In fold, its recall is that of a model which saw the dialogs. Out of fold it should be about that on the other
    splits; a dialog whose cuts lie in several folds betrays what is right.
    """
    num_dialogs = max(dialog_ids(dataset.train)) + 1
    if not tables or num_dialogs < LEAK_FOLDS * 4:
        return []
    some = dataset.train[:: max(len(dataset.train) // LEAK_SAMPLES, 1)]
    recall = {}
    for name, num_folds in (("in", 0), ("out of", LEAK_FOLDS)):
        teacher = EaseTeacher.fit(dataset.train, dataset.catalog, num_folds=num_folds)
        recall[name] = score_items(some, teacher.rank_all(some), dataset.catalog).metrics["recall@20"].double()
    elsewhere = max(
        summary["metrics"]["recall@20"]["mean"]
        for summaries in tables.values()
        for summary in summaries
        if summary["name"] == "ease"
    )
    found = float(recall["out of"].mean())
    uncertain = float(recall["out of"].std()) / len(some) ** 0.5
    if found <= max(LEAK_RATIO * elsewhere, elsewhere + 4 * uncertain):
        return []
    return [
        f"leak: EASE finds {found:.3f} of the ground truth of training conversations that it was fitted without "
        f"(Recall@20; {float(recall['in'].mean()):.3f} of those it was fitted on), and {elsewhere:.3f} on other "
        "splits. Samples of one dialog seem to count as several dialogs: import with the column that names the dialog "
        "(--columns dialog=NAME)"
    ]


def _catalog_facts(catalog: Catalog) -> dict[str, str]:
    items = catalog.items
    named = {"items": f"{len(items)}, written {catalog.item_format.template}"}
    if catalog.item_format.is_film:
        years = sorted(item.year for item in items)
        num_titles = len({catalog.title_key(item.title) for item in items})
        named = {
            "items": f"{len(items)}, {years[0]} to {years[-1]} (median {years[len(years) // 2]})",
            "titles with several years": str(sum(len(catalog.title_indices(t)) > 1 for t in _titles(catalog))),
            "different titles": str(num_titles),
        }
    return {
        **named,
        "with popularity": _share(sum(item.popularity > 0 for item in items), len(items)),
        "with genres": _share(sum(bool(item.genres) for item in items), len(items)),
        "with text": _share(sum(bool(item.text) for item in items), len(items)),
    }


def _titles(catalog: Catalog) -> list[str]:
    """The titles of the catalog, each in one spelling."""
    return list({catalog.title_key(item.title): item.title for item in catalog.items}.values())


def _catalog_warnings(catalog: Catalog) -> list[str]:
    """Items whose line, written exactly so, is not read back as the item: they can never be a hit. And items told apart
    by exact spelling alone."""
    lost = []
    for index, item in enumerate(catalog.items):
        parsed = catalog.parse(item.line)
        found = [catalog.lookup(p.title, p.year) for p in parsed if p.title is not None]
        if found != [index]:
            lost.append(item.line)
    warnings = []
    if lost:
        text = "catalog items are not read back from the line that names them, for example"
        warnings.append(f"{len(lost)} {text} {lost[0]!r}")
    if isinstance(catalog, LineCatalog) and catalog.alike:
        first = ", ".join(repr(catalog.items[index].line) for index in catalog.alike[0])
        warnings.append(
            f"{sum(map(len, catalog.alike))} catalog items differ from another in case, spaces or punctuation marks "
            f"alone, for example {first}; a line counts as one of them only where it is spelt exactly so"
        )
    library = [item.title for item in catalog if catalog.item_format.is_film and in_library_order(item.title)]
    if library:
        warnings.append(
            f"{len(library)} of {len(catalog)} titles are in library order, for example {library[0]!r}, as no model "
            "writes them; `rankgrpo data import` moves the articles to the front"
        )
    return warnings


def _is_demo(dataset: Dataset) -> bool:
    """Whether the tastes behind the data are known: the demo's users and catalog, made here or read from files."""
    from rankgrpo.data.demo import demo_films

    catalog = [(item.title, item.year) for item in dataset.catalog]
    samples = dataset.validation + dataset.test
    return catalog == [(film.title, film.year) for film in demo_films()] and all(
        sample.id.startswith("demo_") for sample in samples
    )


def _baselines(dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    teacher = EaseTeacher.fit(dataset.train, dataset.catalog)
    is_demo = _is_demo(dataset)
    tables = {}
    for split in ("validation", "test"):
        samples = dataset.split(split)
        lists = {
            "popularity": popularity_lists(dataset.train, samples, dataset.catalog),
            "ease": teacher.rank_all(samples),
        }
        if is_demo:
            from rankgrpo.data.demo import oracle_lists

            lists["oracle"] = oracle_lists(samples)
        tables[split] = []
        for name, indices in lists.items():
            evaluation = score_items(samples, indices, dataset.catalog)
            metrics = {key: evaluation.metrics[key] for key in BASELINE_METRICS}
            tables[split].append(summarise(replace(evaluation, metrics=metrics), name=name, split=split))
    return tables


# ----------------------------------------------------------------------------------------------------------------------
# Text


def render(report: HealthReport) -> str:
    """The report as plain text, at most 120 characters wide but for paths."""
    sections = [
        f"Data set {report.name}",
        _section("Catalog", _pairs(report.catalog)),
        _section("Splits", _split_table(report.splits)),
        _section("To beat", "\n\n".join(format_table(summaries) for summaries in report.baselines.values())),
        *([_section("Catalog as a trie of tokens", _pairs(report.trie))] if report.trie else []),
        _section("Warnings", "\n".join(report.warnings) or "none"),
        _section(f"Problems ({len(report.problems)})", _grouped_problems(report.problems)),
    ]
    return "\n\n".join(sections)


def _section(title: str, body: str) -> str:
    return f"{title}\n{'=' * len(title)}\n{body}"


def _pairs(facts: dict[str, str]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


def _split_table(splits: dict[str, SplitHealth]) -> str:
    healths = list(splits.values())
    rows = [
        ("samples", [str(h.num_samples) for h in healths]),
        ("dialogs", [str(h.num_dialogs) for h in healths]),
        ("left out: empty ground truth", [str(h.num_dropped) for h in healths]),
        ("repeated conversations", [str(h.num_repeated) for h in healths]),
        ("turns: median / p95 / max", [str(h.turns) for h in healths]),
        ("words: median / p95 / max", [str(h.words) for h in healths]),
        ("ground truth: median / p95 / max", [str(h.groundtruth) for h in healths]),
        ("seen titles: median / p95 / max", [str(h.seen_titles) for h in healths]),
        ("ground truth in the catalog", [f"{h.in_catalog_frac:.1%}" for h in healths]),
        ("ground truth never in train's", [f"{h.new_frac:.1%}" for h in healths]),
        ("ground truth named before", [f"{h.named_frac:.1%}" for h in healths]),
        ("seen titles in the catalog", [f"{h.known_seen_frac:.1%}" for h in healths]),
        ("samples naming no catalog item", [f"{h.nothing_named_frac:.1%}" for h in healths]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'':{width}}" + "".join(f"{name:>17}" for name in splits)]
    lines += [f"{name:{width}}" + "".join(f"{value:>17}" for value in values) for name, values in rows]
    return "\n".join(lines)


def _grouped_problems(problems: Sequence[Problem]) -> str:
    """Problems by kind, a few of each, so that a thousand of one kind do not hide the one of another."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.kind, []).append(problem)
    lines = []
    for kind, members in groups.items():
        lines.append(f"{len(members)} {kind}:")
        lines += [f"  {problem}" for problem in members[:MAX_SHOWN_A_KIND]]
        if hidden := len(members) - MAX_SHOWN_A_KIND:
            lines += [f"  and {hidden} more"] if hidden > 0 else []
    return "\n".join(lines) or "none"


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})"
