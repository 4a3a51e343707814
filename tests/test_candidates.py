"""Samples with candidates: their catalog, rewards, baselines, demonstrations, and lists held to them."""

import json
from dataclasses import replace

import pytest
from tiny_world import ALONE, tiny_config, tiny_dataset
from transformers import AutoTokenizer

from rankgrpo.baselines.popularity import popularity_lists
from rankgrpo.config import RlConfig
from rankgrpo.data.candidates import best_order, check_candidates, excluded_items, sample_catalog
from rankgrpo.data.load import load_catalog, load_dataset
from rankgrpo.data.samples import Candidate, read_samples, write_samples
from rankgrpo.distill.demonstrations import make_demonstrations
from rankgrpo.errors import ConfigError, DataError
from rankgrpo.evaluation.evaluate import score_completions
from rankgrpo.items.format import ItemFormat
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.policy import open_policy
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.parse import parse_list
from rankgrpo.rollouts.parts import Answer, load_parts, measure
from rankgrpo.sampler.choose import hf_sampler

LABEL = ItemFormat("{label}")
PASSAGES = [
    {"label": f"[{n}]", "text": f"Passage about {word}."} for n, word in enumerate("ships sea kings".split(), 1)
]


def row(name, groundtruth, candidates=PASSAGES, **more):
    turns = [{"role": "user", "content": "which is about the sea?"}]
    fields = {"id": name, "conversation": turns, "seen_titles": [], "groundtruth": groundtruth}
    return fields | ({} if candidates is None else {"candidates": candidates}) | more


def write(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def folder(tmp_path, *rows):
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}.jsonl", *(one | {"id": f"{split}{n}"} for n, one in enumerate(rows)))
    return tmp_path


def test_passages_are_read_written_and_their_own_catalog(tmp_path):
    dataset = load_dataset(folder(tmp_path, row("a", [["[2]", 2], "[1]"]), row("b", ["[3]"])), item_format=LABEL)
    assert dataset.catalog.lines == ["[1]", "[2]", "[3]"] == load_catalog(tmp_path, LABEL).lines
    first = dataset.train[0]
    assert first.candidates[1] == Candidate("[2]", None, "Passage about sea.") and first.weights == (2, 1)
    write_samples(tmp_path / "again.jsonl", dataset.train)
    assert read_samples(tmp_path / "again.jsonl", item_format=LABEL)[0] == dataset.train
    assert best_order(first, dataset.catalog) == [1, 0, 2]


def test_an_answer_is_an_order_of_the_candidates(tmp_path):
    some = [{"label": "[1]", "text": "x"}, {"label": "[2]", "text": "y"}]
    rows = row("a", ["[2]"], some), row("b", [["[3]", 3], "[1]"])
    dataset = load_dataset(folder(tmp_path, *rows), item_format=LABEL)
    scores = score_completions(
        dataset.train, ["[3]\n2. [2] is it\n[1]", "1. [3]\n2. [1]"], dataset.catalog, num_ranks=2
    )
    assert scores.hits.tolist() == [[0, 1], [1, 1]] and scores.metrics["ndcg@2"][1] == 1
    assert [mark["in_catalog"] for mark in scores.rows[0]["items"]] == [False, True]  # [3] is no candidate there
    parts = load_parts("relevance + in_catalog", dataset.catalog)
    answer = Answer(dataset.train[0], "[3]\n[2]", True, sample_catalog(dataset.train[0], dataset.catalog), 2)
    assert measure("in_catalog", parts["in_catalog"], [answer]).tolist() == [[0, 1]]
    assert measure("relevance", parts["relevance"], [answer]).tolist() == [[0, 1]]
    assert popularity_lists(dataset.train, dataset.train, dataset.catalog) == [[0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("groundtruth", "candidates", "message"),
    [
        (["[9]"], PASSAGES, "the ground truth [9] is not among the 3 candidates"),
        (["[1]"], [], "candidates is empty"),
        (["[1]"], [*PASSAGES, {"label": "[1]"}], "candidates[3]: [1] is a candidate already; keep one"),
        (["[1]"], [{"text": "x"}], "candidates[0]: no label, which data.item = '{label}' names"),
        (["[1]"], [{"label": "[1]", "text": 3}], "candidates[0]: text must be a string"),
        (["[1]"], "[1]", "candidates must be a list"),
    ],
)
def test_candidates_that_cannot_be_are_named_with_their_line(tmp_path, groundtruth, candidates, message):
    with pytest.raises(DataError) as caught:
        read_samples(write(tmp_path / "train.jsonl", row("a", groundtruth, candidates)), item_format=LABEL)
    assert message in str(caught.value) and "train.jsonl:1: " in str(caught.value)


def test_lists_longer_than_the_candidates_are_refused(tmp_path):
    dataset = load_dataset(folder(tmp_path, row("a", ["[2]"])), item_format=LABEL)
    check_candidates(dataset.train, dataset.catalog, 3, "repeats", held=True)
    with pytest.raises(ConfigError, match="data.num_ranks = 4: sample 'train0' has 3 candidates"):
        check_candidates(dataset.train, dataset.catalog, 4, "repeats", held=False)
    with pytest.raises(ConfigError, match="rl.forbid = none: sample 'train0'"):
        check_candidates(dataset.train, dataset.catalog, 3, "none", held=True)
    stranger = replace(dataset.train[0], candidates=(Candidate("[8]"), *dataset.train[0].candidates))
    with pytest.raises(DataError, match=r"sample 'train0': candidate '\[8\]' is not in the catalog"):
        check_candidates([stranger], dataset.catalog, 3, "repeats", held=False)


def test_a_folder_without_catalog_needs_candidates_everywhere(tmp_path):
    with pytest.raises(DataError, match="missing catalog.jsonl or catalog.csv"):
        load_dataset(folder(tmp_path, row("a", ["[1]"]), row("b", ["[1]"], None)), item_format=LABEL)


def films(indices):
    dataset = tiny_dataset()
    items = [dataset.catalog.items[index] for index in indices]
    return replace(dataset.validation[0], candidates=tuple(Candidate(item.title, item.year) for item in items))


@pytest.mark.parametrize("forbid", ["repeats", "repeats+seen"])
def test_lists_held_to_the_candidates_name_no_other(tmp_path, forbid):
    dataset = tiny_dataset()
    size = tiny_config().model
    tiny = TinyConfig.of(size)
    start = make_init("tiny", dataset, tmp_path / "init", seed=0, tiny=tiny)
    config = tiny_config("rl.constrain=catalog", f"rl.forbid={forbid}", "data.num_ranks=5")
    policy = open_policy(start, config.model, ALONE.device, trainable=False)
    policy = hold_to_catalog(policy, config, dataset.catalog)
    wanted = [3, 14, 15, 92, 65, 35]
    samples = [replace(films(wanted), seen_titles=()), dataset.validation[1]]
    closed = policy.seen(samples, dataset.catalog)
    assert len(closed[0]) == len(dataset.catalog) - 6 == len(excluded_items(samples[0], dataset.catalog))
    prompts = [AutoTokenizer.from_pretrained(start)("hello").input_ids] * 2
    groups = hf_sampler(policy).sample(
        prompts, group_size=4, seeds=[1, 2], max_new_tokens=8, temperature=1.0, seen=closed
    )
    for rollout in groups[0]:
        named = [dataset.catalog.lookup(item.title, item.year) for item in parse_list(rollout.text)]
        assert len(set(named)) == 5 and set(named) < set(wanted)
    named = [dataset.catalog.lookup(i.title, i.year) for r in groups[1] for i in parse_list(r.text)]
    assert None not in named and not set(named) <= set(wanted)


def test_demonstrations_of_candidates_are_their_best_order(tmp_path):
    dataset = tiny_dataset()

    class Teacher:
        catalog = dataset.catalog

        def rank_all(self, samples, *, num_items=20):
            return [[0, 1] for _ in samples]

    items = [dataset.catalog.items[index] for index in (7, 8, 9)]
    sample = replace(films([7, 8, 9]), groundtruth=((items[2].title, items[2].year),))
    plain, ordered = make_demonstrations([dataset.validation[1], sample], Teacher(), num_items=2)
    assert plain.completion == "\n".join(dataset.catalog.items[i].line for i in (0, 1))
    assert ordered.completion == "\n".join(item.line for item in (items[2], items[0]))
    assert RlConfig().reward == "relevance"
