import json
from itertools import combinations, product

import pytest
import torch
from test_evaluate import CATALOG, letters, sample
from tiny_world import ALONE, taught_dataset, tiny_config, tiny_dataset

from rankgrpo.config_file import load_config
from rankgrpo.evaluation.compare import Source, describe_source, draw_lists, score_source
from rankgrpo.evaluation.diversity import describe_lists, read_diversity, summarise_lists, union_sizes, write_diversity
from rankgrpo.evaluation.evaluate import score_completions
from rankgrpo.evaluation.tables import format_table

POPULARITY_N = torch.arange(26).float()  # A 0, B 1, ... Z 25


def describe(groundtruths: list[str], lists: list[list[str]], **options):
    samples = [sample(groundtruth, name=str(place)) for place, groundtruth in enumerate(groundtruths)]
    texts = [[letters(one) for one in group] for group in lists]
    return describe_lists(samples, texts, CATALOG, POPULARITY_N, **options)


GROUNDTRUTHS = ["ABZ", "C"]
LISTS = [["AC", "BA", "", "AX"], ["D", "CE", "FDD", "C"]]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_unions_agree_with_every_choice_of_lists(n):
    diversity = describe(GROUNDTRUTHS, LISTS)
    choices = [list(combinations(group, n)) for group in LISTS]
    for place, truth in enumerate(GROUNDTRUTHS):
        recalls = [len(set("".join(chosen)) & set(truth)) / len(truth) for chosen in choices[place]]
        assert diversity.by_sample[f"recall@20_of_{n}"][place] == pytest.approx(sum(recalls) / len(recalls))
    covered = [len(set("".join(first) + "".join(second))) / 26 for first, second in product(*choices)]
    assert diversity.overall[f"coverage_of_{n}"] == pytest.approx(sum(covered) / len(covered))


def test_popularity_and_gini_by_hand():
    diversity = describe(GROUNDTRUTHS, LISTS)
    # Items, once a list: A C, B A, -, A X; D, C E, F D, C. Popularity is the place in the alphabet.
    items = [0, 2, 1, 0, 0, 23, 3, 2, 4, 5, 3, 2]
    hits = [0, 1, 0, 0, 2, 2]
    assert diversity.overall["popularity"] == pytest.approx(sum(items) / len(items))
    assert diversity.overall["hit_popularity"] == pytest.approx(sum(hits) / len(hits))
    counts = [items.count(place) for place in range(26)]
    differences = sum(abs(a - b) for a in counts for b in counts)
    assert diversity.overall["gini"] == pytest.approx(differences / (2 * 26 * sum(counts)))


def test_ndcg_is_the_mean_over_the_lists():
    diversity = describe(["A"], [["A", "BA", ""]])
    assert diversity.by_sample["ndcg@20"].tolist() == pytest.approx(
        [(1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 3]
    )


def test_nothing_past_the_asked_for_length_or_outside_the_catalog_counts():
    diversity = describe(["Z"], [["ABZ", "AB"]], num_ranks=2)
    assert diversity.by_sample["recall@2_of_2"].tolist() == [0]
    assert diversity.overall["coverage_of_2"] == pytest.approx(2 / 26)
    nowhere = describe_lists([sample("A")], [["Nowhere (1999)", "prose"]], CATALOG, POPULARITY_N)
    assert nowhere.overall == {"coverage_of_1": 0, "coverage_of_2": 0}


def test_union_sizes():
    assert [union_sizes(n) for n in (1, 2, 5, 64)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8, 16, 32, 64]]


def test_every_sample_needs_as_many_lists():
    with pytest.raises(ValueError, match=r"same number of lists, got \[1, 2\] for 2 of 2 samples"):
        describe(["A", "B"], [["A", "B"], ["A"]])


def test_files_hold_what_was_written_and_a_broken_one_is_named(tmp_path):
    diversity = describe(GROUNDTRUTHS, LISTS)
    path = write_diversity(tmp_path, diversity, name="sft", split="test")
    back = read_diversity(path)
    assert (back.sample_ids, back.num_lists, back.overall) == (("0", "1"), 4, pytest.approx(diversity.overall))
    assert all(torch.equal(back.by_sample[key], values) for key, values in diversity.by_sample.items())
    samples = path.with_suffix(".samples.jsonl")
    samples.write_text(samples.read_text() + '{"id": "2"}\n')
    with pytest.raises(ValueError, match=r"sft.samples.jsonl:3: broken row"):
        read_diversity(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="sft.json: not a result of many lists"):
        read_diversity(path)
    with pytest.raises(ValueError, match="none.json: no such result"):
        read_diversity(tmp_path / "none.json")


def test_table_of_unions():
    summary = summarise_lists(describe(GROUNDTRUTHS, LISTS), name="sft", split="test")
    assert json.loads(json.dumps(summary)) == summary
    rows = format_table([summary], width=100).splitlines()
    (first,) = [row for row in rows if row.startswith("Recall@20, 1 list ")]
    assert "[" in first
    assert any(row.startswith("Catalog coverage, 4 lists") and row.endswith("26.9%") for row in rows)  # 7 of 26
    assert any(row.startswith("Gini of the items") for row in rows)


def test_lists_of_a_model(tmp_path):
    from rankgrpo.model.presets import make_init
    from rankgrpo.model.tiny import TinyConfig

    config, dataset = tiny_config(), tiny_dataset()
    init = make_init("tiny", taught_dataset(), tmp_path / "init", seed=1, tiny=TinyConfig(32, 2, 64, 2, 1, 1024))
    diversity = describe_source(Source("a", init, config), dataset.test[:3], 5, dataset, ALONE)
    assert diversity.num_lists == 5 and list(diversity.by_sample) == [
        *(f"recall@5_of_{n}" for n in (1, 2, 4, 5)),
        "ndcg@5",
    ]
    baseline = describe_source(Source("popularity", "popularity", config), dataset.test, 5, dataset, ALONE)
    assert baseline.num_lists == 1 and 0 < baseline.by_sample["recall@5_of_1"].mean() < 1


def test_a_model_is_scored_by_the_mean_of_its_draws(tmp_path):
    from rankgrpo.model.presets import make_init
    from rankgrpo.model.tiny import TinyConfig

    dataset = tiny_dataset()
    init = make_init("tiny", taught_dataset(), tmp_path / "init", seed=1, tiny=TinyConfig(32, 2, 64, 2, 1, 1024))

    def scored(draws: int):
        config = tiny_config("eval.temperature=1.0", f"eval.draws={draws}")
        return score_source(Source("a", init, config), dataset.test, dataset, ALONE)

    one, three = scored(1), scored(3)
    texts = draw_lists(Source("a", init, tiny_config()), dataset.test, 3, 1.0, "", dataset.catalog, ALONE)
    assert [row["completion"] for row in three.rows] == [row["completion"] for row in one.rows]
    assert [text for text, *_ in texts] == [row["completion"] for row in one.rows]
    for index, asked in enumerate(dataset.test):
        alone = score_completions([asked] * 3, texts[index], dataset.catalog, num_ranks=5)
        for key, values_N in three.metrics.items():
            assert float(values_N[index]) == pytest.approx(float(alone.metrics[key].mean())), key
    assert three.metrics["items_mean"].tolist() != one.metrics["items_mean"].tolist()


def test_too_few_lists_are_refused():
    with pytest.raises(ValueError, match="eval.draws: above 1 needs eval.temperature > 0"):
        load_config(None, ["eval.draws=2"])
    with pytest.raises(ValueError, match="eval.lists: must be at least 1"):
        load_config(None, ["eval.lists=0"])
