import json
import math

import pytest
import torch

from rankgrpo.data.samples import Sample, Turn
from rankgrpo.evaluation.evaluate import (
    compare,
    format_table,
    mean_evaluation,
    read_evaluation,
    read_lists,
    score_completions,
    score_items,
    summarise,
    write_evaluation,
)
from rankgrpo.evaluation.tables import format_interval, format_value
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.items.format import ItemFormat
from rankgrpo.items.lines import make_catalog, make_item
from rankgrpo.metrics import bootstrap_interval, ndcg_at_k, paired_bootstrap, recall_at_k

CATALOG = Catalog([Item(title, 2000 + place) for place, title in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ")])


def line(letter: str) -> str:
    return f"{letter} ({2000 + ord(letter) - ord('A')})"


def sample(groundtruth: str, seen: str = "", name: str = "s") -> Sample:
    truth = tuple((letter, 2000 + ord(letter) - ord("A")) for letter in groundtruth)
    return Sample(name, (Turn("user", f"Something like {seen or 'that'}?"),), tuple(seen), truth)


def score(groundtruth: str, completion: str, seen: str = "", **options) -> dict[str, float]:
    evaluation = score_completions([sample(groundtruth, seen)], [completion], CATALOG, **options)
    return {name: float(values[0]) for name, values in evaluation.metrics.items()}


def letters(text: str) -> str:
    return "\n".join(line(letter) for letter in text)


MIXED = "\n".join([line("A"), line("B"), "and then", "Nowhere (1999)", line("D"), line("B"), line("E")])


def test_scores_of_a_mixed_list_by_hand():
    scores = score("BD", MIXED, seen="E")
    # Hits at the 2nd and the 5th line: (1/log2(3) + 1/log2(6)) / (1 + 1/log2(3)).
    assert scores["ndcg@5"] == pytest.approx(0.62405052, abs=1e-8)
    assert scores["ndcg@20"] == scores["ndcg@5"]
    assert (scores["recall@5"], scores["recall@20"]) == (1.0, 1.0)
    assert scores["parsed_frac"] == pytest.approx(6 / 7)
    assert scores["in_catalog_frac"] == pytest.approx(5 / 7)
    assert scores["duplicate_frac"] == pytest.approx(1 / 7)
    assert scores["items_mean"] == 7


def test_marks_of_a_mixed_list():
    (row,) = score_completions([sample("BD", "E")], [MIXED], CATALOG).rows
    marks = [
        "".join(key[0] for key in ("in_catalog", "hit", "seen", "duplicate") if item[key]) for item in row["items"]
    ]
    assert marks == ["i", "ih", "", "", "ih", "id", "is"]
    assert row["items"][2] == {
        "title": None, "year": None, "in_catalog": False, "hit": False, "seen": False, "duplicate": False,
        "line": "and then",
    }  # fmt: skip
    assert row["groundtruth"] == [["B", 2001], ["D", 2003]]
    assert row["conversation"] == [{"role": "user", "content": "Something like E?"}]
    assert row["completion"] == MIXED
    assert row["ndcg@5"] == pytest.approx(0.62405052, abs=1e-8)


@pytest.mark.parametrize(
    ("seen", "marks"),
    [
        (("A",), [True, False, False, False]),
        (("A (2000)", "b (2001)"), [True, True, False, False]),
        (("Nowhere",), [False, False, True, True]),
        (("nowhere (1999)",), [False, False, True, False]),
        (("A (2001)",), [False, False, False, False]),
    ],
)
def test_seen_titles_are_marked_with_their_year_or_without(seen, marks):
    seen_some = Sample("s", (Turn("user", "?"),), seen, (("A", 2000), ("B", 2001)))
    text = f"{letters('AB')}\nNowhere (1999)\nNowhere (2001)"
    (row,) = score_completions([seen_some], [text], CATALOG).rows
    assert [item["seen"] for item in row["items"]] == marks
    assert [item["hit"] for item in row["items"]] == [not marks[0], not marks[1], False, False]


def test_the_title_of_a_line_is_seen_as_the_line_is():
    by = ItemFormat("{title} by {author}")
    rows = [{"title": "Emma", "author": "Jane Austen"}, {"title": "Dune", "author": "Frank Herbert"}]
    books = make_catalog([make_item(row, by) for row in rows], by)
    truth = (("Emma by Jane Austen", None), ("Dune by Frank Herbert", None))
    reader = Sample("s", (Turn("user", "?"),), ("Emma",), truth)
    (row,) = score_completions([reader], ["Emma by Jane Austen\nDune by Frank Herbert"], books, num_ranks=2).rows
    assert [(item["hit"], item["seen"]) for item in row["items"]] == [(False, True), (True, False)]


def test_lines_outside_the_catalog_keep_their_places():
    scores = score("A", "\n".join(["Nowhere (1999)"] * 19 + [line("A")]))
    assert (scores["recall@5"], scores["recall@15"], scores["recall@20"]) == (0, 0, 1)
    assert scores["ndcg@20"] == pytest.approx(1 / math.log2(21))


def test_one_hit_out_of_ten_is_no_perfect_list():
    scores = score("ABCDEFGHIJ", line("A"))
    assert scores["ndcg@20"] == pytest.approx(0.2200917, abs=1e-7)  # 1 / sum of 1/log2(j + 1), j = 1..10
    assert scores["recall@20"] == pytest.approx(0.1)


def test_lines_past_the_asked_for_length_count_only_as_lines():
    scores = score("Z", letters("ABCDEFGHIJKLMNOPQRSTZ") + "\nprose\nprose")
    assert scores["recall@20"] == 0
    assert scores["items_mean"] == 23
    assert scores["parsed_frac"] == 1


def test_an_empty_answer_scores_zero():
    assert set(score("A", " \n\n").values()) == {0.0}


def test_a_repeated_or_seen_hit_earns_nothing():
    assert score("A", letters("AA"))["recall@20"] == 1
    assert score("A", letters("A"), seen="A")["recall@20"] == 0


def test_two_spellings_of_one_liked_item_are_one_item():
    twice = Sample("s", (Turn("user", "Hi"),), (), (("A", 2000), (" a ", 2000)))
    assert score_completions([twice], [line("A")], CATALOG).metrics["recall@5"].tolist() == [1.0]


def test_items_outside_the_catalog_repeat_too():
    assert score("A", "Nowhere (1999)\nNOWHERE (1999)\nNowhere (2001)")["duplicate_frac"] == pytest.approx(1 / 3)


def test_the_year_tolerance_reaches_hits_and_marks():
    assert score("A", "A (2002)")["recall@5"] == 0
    scores = score("A", "A (2002)", year_tolerance=2)
    assert (scores["recall@5"], scores["in_catalog_frac"]) == (1, 1)


def test_a_shorter_list_has_its_own_cutoffs():
    scores = score("C", letters("ABC"), num_ranks=3)
    assert [name for name in scores if name.startswith("recall")] == ["recall@3"]
    assert scores["ndcg@3"] == pytest.approx(0.5)
    assert "recall@10" in score("C", letters("ABC"), num_ranks=12)
    assert "recall@12" in score("C", letters("ABC"), num_ranks=12)


def test_metrics_are_those_of_the_metrics_module():
    samples = [sample("BD", name="1"), sample("AZ", name="2"), sample("QRS", name="3")]
    evaluation = score_completions(samples, [letters("ABCD"), letters("ZYXA"), letters("EFG")], CATALOG)
    assert evaluation.hits[:, :4].tolist() == [[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0]]
    counts = torch.tensor([2, 2, 3])
    for k in (5, 10, 15, 20):
        torch.testing.assert_close(evaluation.metrics[f"recall@{k}"], recall_at_k(evaluation.hits, counts, k))
        torch.testing.assert_close(evaluation.metrics[f"ndcg@{k}"], ndcg_at_k(evaluation.hits, counts, k))
    assert evaluation.sample_ids == ("1", "2", "3")


def test_a_baseline_scores_like_the_same_list_written_by_a_model():
    samples = [sample("BD", name="1"), sample("AZ", "Z", name="2")]
    lists = [[0, 1, 3], [25, 0, 0]]
    written = score_completions(samples, [letters("ABD"), letters("ZAA")], CATALOG)
    ranked = score_items(samples, torch.tensor(lists), CATALOG)
    assert ranked.rows == written.rows
    assert all(torch.equal(ranked.metrics[name], written.metrics[name]) for name in written.metrics)


def test_scores_of_several_draws_are_their_means_and_survive_the_file(tmp_path):
    samples = [sample("A", name="1"), sample("BC", name="2")]
    draws = [("A", "XB"), ("XA", "BC"), ("X", "XX"), ("A", "X")]
    mean = mean_evaluation([score_completions(samples, [letters(x) for x in draw], CATALOG) for draw in draws])
    second = 1 / math.log2(3)  # of a hit at rank 2
    ideal = 1 + second  # of two hits
    assert mean.metrics["ndcg@20"].tolist() == pytest.approx([(2 + second) / 4, (second / ideal + 1) / 4])
    assert mean.metrics["recall@20"].tolist() == pytest.approx([3 / 4, (0.5 + 1) / 4])
    assert mean.metrics["duplicate_frac"].tolist() == pytest.approx([0, 0.5 / 4])
    assert mean.hits[:, :3].tolist() == [[0.5, 0.25, 0], [0.25, 0.5, 0]]
    write_evaluation(tmp_path, mean, name="sft", split="test")
    read = read_lists(tmp_path / "eval" / "test" / "sft.lists.jsonl")
    assert read.hits.tolist() == mean.hits.tolist()
    assert all(torch.equal(read.metrics[key], values) for key, values in mean.metrics.items())
    assert read.rows[1]["completion"] == letters("XB")
    with pytest.raises(ValueError, match="of the same conversations only"):
        mean_evaluation([mean, score_completions(samples[:1], [letters("A")], CATALOG)])


def test_no_samples_make_an_empty_evaluation():
    evaluation = score_completions([], [], CATALOG)
    assert evaluation.hits.shape == (0, 20)
    assert evaluation.metrics["ndcg@20"].shape == (0,)
    with pytest.raises(ValueError, match="'sft' was evaluated on no sample of the test split"):
        summarise(evaluation, name="sft", split="test")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_completions([sample("A")], [], CATALOG), "1 samples, 0 completions"),
        (lambda: score_completions([sample("", name="x")], [""], CATALOG), "sample 'x' has no ground truth"),
        (lambda: score_items([sample("A")], [[0, 26]], CATALOG), "26 is no catalog index; they go from 0 to 25"),
        (lambda: score_items([sample("A")], [[-1]], CATALOG), "-1 is no catalog index"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------- summaries, files


def two_models():
    samples = [sample("AB", name=str(index)) for index in range(40)]
    old = score_completions(samples, [letters("XA" if index % 4 == 0 else "XY") for index in range(40)], CATALOG)
    new = score_completions(samples, [letters("AX" if index % 2 == 0 else "XY") for index in range(40)], CATALOG)
    return old, new


def test_summary_of_known_scores():
    summary = summarise(two_models()[0], name="sft", split="test")
    assert (summary["name"], summary["split"], summary["num_samples"]) == ("sft", "test", 40)
    assert summary["metrics"]["recall@20"]["mean"] == pytest.approx(0.125)
    values = two_models()[0].metrics["recall@20"]
    assert tuple(summary["metrics"]["recall@20"].values()) == bootstrap_interval(values)
    assert summary["hit_rate_by_rank"] == [0, 0.25, *[0] * 18]


def test_comparison_is_paired_and_points_from_baseline_to_candidate():
    old, new = two_models()
    gain = compare(old, new)["recall@20"]
    assert (gain["baseline"], gain["candidate"]) == (0.125, 0.25)
    assert tuple(gain["difference"].values()) == paired_bootstrap(new.metrics["recall@20"], old.metrics["recall@20"])
    assert gain["difference"]["mean"] == pytest.approx(0.125)
    assert gain["relative"]["mean"] == pytest.approx(1.0)
    assert gain["relative"]["low"] < 1 < gain["relative"]["high"]
    assert compare(old, old)["recall@20"]["difference"] == {"mean": 0, "low": 0, "high": 0}


def test_comparison_with_a_baseline_without_hits_has_no_relative_gain():
    _, new = two_models()
    nothing = score_completions([sample("AB", name=str(index)) for index in range(40)], [""] * 40, CATALOG)
    assert compare(nothing, new)["recall@20"]["relative"] is None


def test_comparison_of_different_samples_is_refused():
    old, new = two_models()
    fewer = score_completions([sample("AB", name=str(index)) for index in range(3)], [""] * 3, CATALOG)
    other = score_completions([sample("AB", name=f"x{index}") for index in range(40)], [""] * 40, CATALOG)
    with pytest.raises(ValueError, match="got 40 and 3"):
        compare(old, fewer)
    with pytest.raises(ValueError, match="'0' against 'x0'"):
        compare(new, other)


def test_files_hold_what_was_written(tmp_path):
    old, _ = two_models()
    path = write_evaluation(tmp_path, old, name="sft", split="test")
    assert path == tmp_path / "eval" / "test" / "sft.json"
    assert read_evaluation(path) == summarise(old, name="sft", split="test")
    back = read_lists(tmp_path / "eval" / "test" / "sft.lists.jsonl")
    assert back.sample_ids == old.sample_ids
    assert back.rows == old.rows
    assert torch.equal(back.hits, old.hits)
    assert all(torch.equal(back.metrics[name], values) for name, values in old.metrics.items())
    assert back.metrics.keys() == old.metrics.keys()


@pytest.mark.parametrize("name", ["a/b", "", "..", ".hidden", "a b"])
def test_a_model_name_must_be_a_file_name(tmp_path, name):
    with pytest.raises(ValueError, match="model name becomes a file name"):
        write_evaluation(tmp_path, two_models()[0], name=name, split="test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"sft.json:1: broken JSON"),
        ("[]", "expected a JSON object"),
        ('{"name": "a", "split": "test"}', "'num_samples' is missing"),
        (
            '{"name": "a", "split": "t", "num_samples": 1, "metrics": {"ndcg@5": {"mean": 1}}, "hit_rate_by_rank": []}',
            "'ndcg@5'. needs the numbers mean, low and high",
        ),
        ('{"name": "a", "split": "t", "num_samples": 1, "metrics": {}, "hit_rate_by_rank": []}', "no ndcg@k"),
    ],
)
def test_a_broken_summary_is_named(tmp_path, text, message):
    (tmp_path / "sft.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_evaluation(tmp_path / "sft.json")


def test_missing_evaluation_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="none.json: no such evaluation"):
        read_evaluation(tmp_path / "none.json")
    with pytest.raises(ValueError, match="none.lists.jsonl: no such file"):
        read_lists(tmp_path / "none.lists.jsonl")


def test_a_broken_lists_row_is_named_by_file_and_line(tmp_path):
    write_evaluation(tmp_path, two_models()[0], name="sft", split="test")
    path = tmp_path / "eval" / "test" / "sft.lists.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([rows[0], rows[1][:40], rows[2]]))
    with pytest.raises(ValueError, match=r"sft.lists.jsonl:2: broken JSON"):
        read_lists(path)
    row = json.loads(rows[1])
    del row["ndcg@20"]
    path.write_text("\n".join([rows[0], json.dumps(row)]))
    with pytest.raises(ValueError, match=r"sft.lists.jsonl:2: \['ndcg@20'\] missing"):
        read_lists(path)


# ---------------------------------------------------------------------------------------------------- tables


def summary(name: str, ndcg: float, catalog: float = 0.5, split: str = "test") -> dict:
    metrics = {
        "ndcg@20": {"mean": ndcg, "low": ndcg - 0.01, "high": ndcg + 0.01},
        "in_catalog_frac": {"mean": catalog, "low": catalog - 0.1, "high": catalog + 0.1},
        "items_mean": {"mean": 20.0, "low": 19.5, "high": 20.5},
    }
    return {"name": name, "split": split, "num_samples": 500, "metrics": metrics, "hit_rate_by_rank": []}


def test_table_as_text():
    table = format_table([summary("before", 0.0312), summary("rank-grpo", 0.1011, catalog=0.9)], width=80)
    assert table == "\n".join(
        [
            "test split, 500 conversations, mean [95% interval]",
            "",
            "            before                 rank-grpo",
            "--------------------------------------------------------",
            "NDCG@20     .0312  [.0212, .0412]  .1011* [.0911, .1111]",
            "In catalog  50.0%  [40.0, 60.0%]   90.0%  [80.0, 100.0%]",
            "Lines        20.0  [19.5, 20.5]     20.0  [19.5, 20.5]",
            "* best of the row",
        ]
    )


def test_table_wraps_to_the_terminal():
    table = format_table([summary(name, 0.03) for name in ("first", "second", "third")], width=60)
    assert max(map(len, table.splitlines())) <= 60
    assert table.count("NDCG@20") == 2
    assert [name in table for name in ("first", "second", "third")] == [True] * 3


def test_table_as_markdown():
    table = format_table([summary("sft", 0.05), summary("rank-grpo", 0.07)], markdown=True)
    assert table.splitlines()[2:5] == [
        "|  | sft | rank-grpo |",
        "|---|---|---|",
        "| NDCG@20 | .0500 [.0400, .0600] | **.0700** [.0600, .0800] |",
    ]


def test_a_table_of_one_model_marks_nothing_and_holes_are_shown():
    assert "*" not in format_table([summary("sft", 0.05)])
    short = summary("other", 0.06)
    del short["metrics"]["items_mean"]
    (lines_row,) = [row for row in format_table([summary("sft", 0.05), short]).splitlines() if row.startswith("Lines")]
    assert lines_row.endswith(" -")


def test_tables_do_not_mix_splits():
    with pytest.raises(ValueError, match="one table holds one split, got test, validation"):
        format_table([summary("a", 0.1), summary("b", 0.1, split="validation")])
    with pytest.raises(ValueError, match="at least one evaluation"):
        format_table([])


def test_numbers_as_text():
    assert format_value("ndcg@20", 0.04821) == ".0482"
    assert format_value("recall@5", 1.0) == "1.0000"
    assert format_value("ndcg@20", -0.0123, sign=True) == "-.0123"
    assert format_value("ndcg@20", 0.0123, sign=True) == "+.0123"
    assert format_value("parsed_frac", 0.99149) == "99.1%"
    assert format_value("parsed_frac", 0.004, sign=True) == "+0.4 pts"
    assert format_value("items_mean", 19.84) == "19.8"
    assert format_interval("parsed_frac", {"low": 0.5, "high": 0.75}) == "[50.0, 75.0%]"
    assert format_interval("parsed_frac", {"low": -0.01, "high": 0.02}, sign=True) == "[-1.0, +2.0 pts]"
