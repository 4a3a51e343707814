"""Ground truth with weights: what is read, what ranks earn, NDCG of gains; weights of 1 are the numbers without."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankgrpo.data.load import load_dataset
from rankgrpo.data.samples import Sample, Turn, read_samples, write_samples
from rankgrpo.errors import DataError
from rankgrpo.evaluation.evaluate import score_completions
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.metrics import graded_ndcg_at_k, ndcg_at_k
from rankgrpo.parse import parse_list
from rankgrpo.reward import rank_returns, relevance

CATALOG = Catalog([Item(title, 2000) for title in "ABCDEFGH"])
TURNS = (Turn("user", "hi"),)


def text(letters):
    return "\n".join(f"{letter} (2000)" for letter in letters)


def sample(weights, gain="linear"):
    wanted = tuple((letter, 2000) for letter in weights)
    return Sample("a", TURNS, (), wanted, weights=tuple(weights.values()), gain=gain)


def row(entries, **more):
    return {
        "id": "a",
        "conversation": [{"role": "user", "content": "hi"}],
        "seen_titles": [],
        "groundtruth": entries,
    } | more


def read(tmp_path, entries, **options):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(row(entries)))
    return read_samples(path, **options)[0][0]


def test_weights_are_read_and_written(tmp_path):
    entries = [["A", 2000, 3], {"title": "B", "year": 2000, "weight": 0.5}, ["C", 2000], ["D", 2000, 0]]
    one = read(tmp_path, entries)
    assert one.groundtruth == (("A", 2000), ("B", 2000), ("C", 2000)) and one.weights == (3.0, 0.5, 1.0)
    write_samples(tmp_path / "again.jsonl", [one])
    assert read_samples(tmp_path / "again.jsonl")[0] == [one]
    assert read(tmp_path, [["A", 2000, 1], ["B", 2000]]).weights == ()
    books = ItemFormat("{title} by {author}")
    two = read(tmp_path, [["Emma by J", 2], {"title": "Up", "author": "Z", "weight": 4}, "X by Y"], item_format=books)
    assert two.groundtruth == (("Emma by J", None), ("Up by Z", None), ("X by Y", None)) and two.weights == (2, 4, 1)
    write_samples(tmp_path / "again.jsonl", [two])
    assert read_samples(tmp_path / "again.jsonl", item_format=books)[0] == [two]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["A", 2000, -1], "groundtruth[0]: the weight must be a number of 0 or more, got -1"),
        ({"title": "A", "year": 2000, "weight": "2"}, "got '2'"),
        ({"title": "A", "year": 2000, "weight": math.inf}, "got inf"),
    ],
)
def test_a_weight_that_cannot_be_is_named_with_its_line(tmp_path, entry, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, [entry])
    assert message in str(caught.value) and "train.jsonl:1: " in str(caught.value)
    with pytest.raises(DataError, match=r"groundtruth\[1\]: A \(2000\) weighs 2 before and 3 here; keep one"):
        read(tmp_path, [["A", 2000, 2], ["A", 2000, 3]])


def test_what_weighs_nothing_is_not_there_to_find(tmp_path):
    (tmp_path / "catalog.csv").write_text("title,year\nA,2000\n")
    for name in ("train", "validation", "test"):
        rows = [row([["A", 2000, 2]], id=name), row([["A", 2000, 0]], id=f"{name}0")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = load_dataset(tmp_path, gain="exp2")
    assert [s.id for s in dataset.train] == ["train"] and dataset.num_dropped["train"] == 1
    assert dataset.train[0].gains == (3.0,) and load_dataset(tmp_path).train[0].gains == (2.0,)


@pytest.mark.parametrize(("gain", "weight"), [("exp2", 2000), ("exp2", 200), ("linear", 1e31)])
def test_a_weight_whose_gain_cannot_be_added_is_named(tmp_path, gain, weight):
    (tmp_path / "catalog.csv").write_text("title,year\nA,2000\n")
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row([["A", 2000, weight]], id=name)) + "\n")
    with pytest.raises(
        DataError,
        match=rf"train.jsonl: sample 'train': weight {weight:g} is above .* data.gain={gain};".replace("+", "."),
    ):
        load_dataset(tmp_path, gain=gain)


def test_ranks_earn_gains():
    def earned(letters, gains, kind="exp_inf", **more):
        rel_K = relevance(
            parse_list(text(letters)), [("A", 2000), ("B", 2000)], catalog=CATALOG, seen=[], num_ranks=4, gains=gains
        )
        return rank_returns(rel_K[None], kind, **more)[0].tolist()

    assert earned("CBAB", (3.0, 0.5)) == [0, 0.5, 3, 0]
    assert earned("CBAB", (3.0, 0.5), "exp", gamma=2.0) == [1.0, 2.0, 3.0, 0.0]
    assert earned("BA", (3.0, 0.5), "log") == pytest.approx([0.5 + 3 / math.log2(3), 3 / math.log2(3), 0, 0])
    assert sample({"A": 2.0, "B": 1.0}, "exp2").gains == (3.0, 1.0)


def test_ndcg_is_that_of_the_gains():
    scores = score_completions(
        [sample({"A": 3.0, "B": 1.0, "C": 2.0})], [text("CXA")], CATALOG, num_ranks=3, cutoffs=(1,)
    )
    ideal = 3 + 2 / math.log2(3) + 1 / 2
    assert scores.metrics["ndcg@3"].item() == pytest.approx((2 + 3 / 2) / ideal, rel=1e-12)
    assert scores.metrics["ndcg@1"].item() == pytest.approx(2 / 3) and scores.metrics[
        "recall@3"
    ].item() == pytest.approx(2 / 3)
    assert scores.hits.tolist() == [[1, 0, 1]] and scores.rows[0]["gains"] == [3, 1, 2]
    exp = score_completions([sample({"A": 3.0, "B": 1.0}, "exp2")], [text("BA")], CATALOG, num_ranks=2)
    assert exp.metrics["ndcg@2"].item() == pytest.approx((1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 40), st.integers(1, 30))
def test_gains_of_one_are_bitwise_the_binary_numbers(hits, extra, k):
    hits_BK = torch.tensor([hits]).double()
    total, k = sum(hits) + extra, min(k, len(hits))
    graded = graded_ndcg_at_k(hits_BK, torch.ones(1, total), k)
    assert torch.equal(graded, ndcg_at_k(hits_BK, torch.tensor([total]), k))


@pytest.mark.parametrize(
    ("gains", "best", "k", "message"),
    [
        ([[1.0]], [[1.0]], 2, "k must be in 1..1"),
        ([[-1.0]], [[1.0]], 1, "gains must be finite and 0 or more"),
        ([[1.0]], [[0.0]], 1, "best gains must fall"),
        ([[1.0]], [[1.0, 2.0]], 1, "best gains must fall"),
        ([[1.0, 1.0]], [[1.0]], 1, "an item was counted twice"),
        ([[1.0]], [1.0], 1, "gains must be"),
    ],
)
def test_gains_that_cannot_be_are_errors(gains, best, k, message):
    with pytest.raises(ValueError, match=message):
        graded_ndcg_at_k(torch.tensor(gains), torch.tensor(best), k)


def test_lists_of_one_and_of_two_hundred():
    one = score_completions([sample({"A": 1.0})], [text("AB")], CATALOG, num_ranks=1)
    assert one.metrics["recall@1"].item() == 1 and "recall@5" not in one.metrics
    lines = text("ABCDEFGH" + "A" * 250)
    long = score_completions([sample({"H": 2.0})], [lines], CATALOG, num_ranks=200, cutoffs=(7, 8))
    assert [long.metrics[f"recall@{k}"].item() for k in (7, 8, 200)] == [0, 1, 1]
    assert long.metrics["ndcg@200"].item() == pytest.approx(1 / math.log2(9))
    assert long.metrics["items_mean"].item() == 258
