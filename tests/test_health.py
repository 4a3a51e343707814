import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from rankgrpo.data.load import load_dataset
from rankgrpo.data.samples import Dataset, Sample, Turn
from rankgrpo.evaluation.health import Spread, check_dataset
from rankgrpo.items.catalog import Catalog, Item

REDIAL = Path(os.environ.get("RANKGRPO_REDIAL", Path(__file__).parents[2] / "shared" / "data" / "redial"))
CATALOG = Catalog([Item("Heat", 1995, 3, ("Crime",), "x"), Item("Ronin", 1998), Item("Up", 2009), Item("Up", 1984)])
HEAT, RONIN, UP = ("Heat", 1995), ("Ronin", 1998), ("Up", 2009)


def sample(id, text, seen=(), wanted=(RONIN,)):
    return Sample(id, (Turn("user", text),), seen, wanted)


def dataset(**changes):
    base = {
        "train": [
            sample("t-1", "I like Heat (1995)", ("Heat",), (RONIN,)),
            sample("u-1", "one two three four five", (), (RONIN, HEAT)),
            sample("u-2", "I like Heat (1995)", ("Heat", "Nobody"), (UP,)),
        ],
        "validation": [sample("v-1", "Hello", (), (RONIN,))],
        "test": [
            sample("w-1", "Is Ronin (1998) good?", ("Ronin",), (RONIN, ("Up", 1984))),
            sample("w-2", "Hm", (), (("Lost", 1990), UP)),
        ],
    }
    return Dataset("small", **(base | {"catalog": CATALOG} | changes))


def test_facts_of_the_splits_counted_by_hand():
    report = check_dataset(dataset(num_dropped={"train": 4, "validation": 0, "test": 0}))
    train, test = report.splits["train"], report.splits["test"]
    assert (train.num_samples, train.num_dialogs, train.num_dropped, train.num_repeated) == (3, 3, 4, 1)
    assert train.words == Spread(4, 5, 5) and train.turns == Spread(1, 1, 1)
    assert train.groundtruth == Spread(1, 2, 2) and train.seen_titles == Spread(1, 2, 2)
    assert train.known_seen_frac == 2 / 3 and test.known_seen_frac == 1
    assert train.nothing_named_frac == 1 / 3 and test.nothing_named_frac == 1 / 2
    assert (train.in_catalog_frac, train.new_frac, train.named_frac) == (1, 0, 0)
    assert test.in_catalog_frac == 3 / 4
    assert test.new_frac == 2 / 4  # Up of 1984 and Lost; a remake is another film
    assert test.named_frac == 1 / 4  # Ronin was named and cannot be recommended
    assert report.catalog["items"] == "4, 1984 to 2009 (median 1998)"
    assert report.catalog["titles with several years"] == "1"
    assert report.catalog["with popularity"] == report.catalog["with genres"] == "1 (25%)"


def test_baselines_are_scored():
    tables = check_dataset(dataset()).baselines
    assert list(tables) == ["validation", "test"]
    assert [summary["name"] for summary in tables["test"]] == ["popularity", "ease"]
    popularity = tables["test"][0]
    # Ronin, Heat, Up, Up of 1984: w-1 may not have Ronin and finds Up of 1984 third, w-2 finds Up third of two wanted.
    assert popularity["num_samples"] == 2
    assert popularity["metrics"]["recall@5"]["mean"] == pytest.approx(0.5)
    assert popularity["metrics"]["ndcg@5"]["mean"] == pytest.approx(0.5 / (1 + 0.6309297535714575))
    assert set(popularity["metrics"]) == {f"{m}@{k}" for m in ("recall", "ndcg") for k in (5, 10, 20)}


def test_what_splits_share_is_a_warning():
    assert check_dataset(dataset()).warnings == []
    greeting = sample("x-1", "one two three four five")
    cut = (Turn("user", "I like Heat (1995)"), Turn("assistant", "And Ronin?"))
    leaky = dataset(validation=[replace(greeting, id="t-1"), Sample("t-3", cut, (), (UP,))], test=[greeting])
    warnings = check_dataset(leaky).warnings
    assert warnings[:2] == [
        "leak: train and validation share 1 ids, for example t-1",
        "leak: 1 dialogs have samples in both train and validation",
    ]
    assert [warning.split(",")[0] for warning in warnings[2:]] == [
        "1 conversations of validation are in train word for word",
        "1 conversations of test are in train word for word",
        "1 conversations of test are in validation word for word",
    ]


def test_a_title_that_looks_numbered_is_read_back_and_no_warning():
    catalog = Catalog([*CATALOG, Item("1. Heat", 1982)])
    assert not check_dataset(dataset(catalog=catalog)).warnings


def test_the_text_holds_the_facts_and_groups_the_problems(tmp_path):
    good = {"conversation": [{"role": "user", "content": "Hi"}], "seen_titles": [], "groundtruth": [RONIN]}
    changes = [
        {"seen_titles": ["Nobody"]},
        {"groundtruth": [RONIN, RONIN, ("Lost", 1990)], "mood": 1},
        {"split": "test"},
        {},
        *({"groundtruth": []} for _ in range(4)),
    ]
    rows = [json.dumps(good | {"id": str(number)} | change) for number, change in enumerate(changes)]
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows if name == "train" else rows[3:4]) + "\n")
    CATALOG.to_jsonl(tmp_path / "catalog.jsonl")
    text = str(check_dataset(load_dataset(tmp_path)))
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 120
    kinds = {
        "empty ground truth": 4,
        "ground truth not in the catalog": 1,
        "repeated ground truth": 1,
        "seen titles not in the catalog": 1,
        "samples of another split": 1,
        "unknown fields": 1,
    }
    for kind, count in kinds.items():
        assert f"{count} {kind}:" in text
    assert f"  {tmp_path}/train.jsonl:6: 5: ground truth is empty" in text
    assert "train.jsonl:8: 7" not in text and "  and 1 more" in text  # three of a kind are shown
    assert "leak: train and test share 1 ids, for example 3" in text
    assert " other:" not in text


def test_a_report_without_problems_says_so():
    text = str(check_dataset(dataset()))
    assert text.startswith("Data set small\n") and text.endswith("Problems (0)\n============\nnone")
    assert "Warnings\n========\nnone" in text and "test split, 2 conversations" in text


@pytest.mark.slow
def test_the_demos_oracle_ease_and_popularity_are_clearly_apart():
    for source in ("popularity", "ease", "oracle"):
        assert source in {s["name"] for s in DEMO().baselines["test"]}
    scores = {s["name"]: s["metrics"]["ndcg@20"] for s in DEMO().baselines["test"]}
    assert scores["popularity"]["high"] < scores["ease"]["low"] < scores["ease"]["high"] < scores["oracle"]["low"]
    assert DEMO().problems == [] and not [warning for warning in DEMO().warnings if "leak:" in warning]


def DEMO(_report=[]):  # noqa: B006
    if not _report:
        _report.append(check_dataset(load_dataset("demo")))
    return _report[0]


@pytest.mark.slow
@pytest.mark.skipif(not REDIAL.is_dir(), reason=f"no ReDial data in {REDIAL}; set RANKGRPO_REDIAL to its folder")
def test_redial_gives_the_published_baselines():
    # The figures of the data set's NOTICE.md, given there to three digits.
    report = check_dataset(load_dataset(REDIAL))
    popularity, ease = report.baselines["test"]
    assert popularity["metrics"]["recall@20"]["mean"] == pytest.approx(0.085, abs=1e-3)
    assert popularity["metrics"]["ndcg@20"]["mean"] == pytest.approx(0.048, abs=5e-4)
    assert ease["metrics"]["recall@20"]["mean"] == pytest.approx(0.185, abs=5e-4)
    assert ease["metrics"]["ndcg@20"]["mean"] == pytest.approx(0.102, abs=5e-4)
    assert report.splits["test"].new_frac == pytest.approx(0.16, abs=5e-3)
    assert {name: split.num_samples for name, split in report.splits.items()} == {
        "train": 9638,
        "validation": 827,
        "test": 3166,
    }
    assert report.splits["test"].in_catalog_frac == 1.0
