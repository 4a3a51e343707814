"""Lists held to the catalog, through the whole program: training, warm start, evaluation, use."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_world import ALONE, taught_dataset, tiny_config, tiny_dataset, tiny_demonstrations
from transformers import AutoTokenizer

import rankgrpo.rollouts.rounds
from rankgrpo.config import Config
from rankgrpo.data.dialogs import seen_items
from rankgrpo.data.samples import Sample
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.compare import evaluate_models
from rankgrpo.evaluation.validate import recommend_lists
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.model.constraint import hold_to_catalog, open_constraint
from rankgrpo.model.forward import dense_logprobs
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import open_policy
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.parse import parse_list
from rankgrpo.pipeline import check_run, run_pipeline
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sft import train_sft
from rankgrpo.train import train

HELD = "rl.constrain=catalog"
SIZE = tiny_config().model
TINY = TinyConfig.of(SIZE)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    return make_init("tiny", taught_dataset(), folder / "init", seed=0, tiny=TINY)


def run(start, out, *overrides):
    train(tiny_config(HELD, *overrides), tiny_dataset(), start, out / "rl", ALONE)
    return read_metrics(out / "rl" / "metrics.jsonl")[0]


def numbers(rows):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def held_policy(start, *overrides):
    config = tiny_config(HELD, *overrides)
    policy = open_policy(start, config.model, ALONE.device, trainable=False)
    return hold_to_catalog(policy, config, tiny_dataset().catalog), config


def test_a_model_from_noise_writes_lists_that_can_be_shown(start, tmp_path):
    rows = run(start, tmp_path, "eval.free_samples=2")
    for row in rows[1:]:
        assert row["list/in_catalog_frac"] == row["list/full_frac"] == row["list/finished_frac"] == 1
        assert row["list/duplicate_frac"] == 0 and row["list/items_mean"] == 5
        assert 0.3 < row["list/forced_frac"] < 0.9 and row["list/allowed_mean"] > 2
        # The trainer's distribution is the sampler's.
        assert row["mismatch/exp_abs_logp"] == pytest.approx(1, abs=1e-4) and row["mismatch/outside_clip_frac"] == 0
    assert rows[0]["eval_free/in_catalog_frac"] < 1 == rows[0]["eval/in_catalog_frac"]
    assert any(row["grad/norm"] > 0 for row in rows[1:])


@pytest.mark.parametrize("overrides", [(), ("rl.count_forced=true",), ("rl.unit=token",), ("rl.unit=list",)])
def test_every_unit_trains(start, tmp_path, overrides):
    rows = run(start, tmp_path, "rl.num_steps=2", "rl.kl_coef=0.01", "rl.updates_per_batch=2", *overrides)
    assert rows[-1]["list/duplicate_frac"] == 0 and rows[-1]["grad/norm"] > 0


def test_log_probs_are_those_of_a_masked_softmax(start):
    policy, _ = held_policy(start)
    lists = policy.constraint.trie.list_ids([3, 1, 4, 15, 9]), policy.constraint.trie.list_ids([26, 5, 35, 8, 97])
    groups = [Group([5, 9, 11], list(lists))]
    pack, logp_BT = policy.logprobs(groups)
    choices = policy.constraint.choices(groups)
    is_choice_BT = torch.zeros_like(pack.mask_BT)
    is_choice_BT[pack.mask_BT] = torch.from_numpy(choices.is_choice)
    assert bool((logp_BT[~is_choice_BT] == 0).all()) and bool((logp_BT[is_choice_BT] < 0).all())
    token = 0
    for b, ids in enumerate(lists):
        for t in range(len(ids)):
            if is_choice_BT[b, t]:
                allowed_V = torch.zeros(len(policy.allowed_V), dtype=torch.bool)
                allowed_V[choices.allowed_at(token)] = True
                whole = dense_logprobs(policy.model, [Group([5, 9, 11, *ids[:t]], [[ids[t]]])], allowed_V=allowed_V)
                assert float(logp_BT[b, t]) == pytest.approx(float(whole[0, 0]), abs=1e-5)
            token += 1


def test_a_run_that_was_stopped_goes_on_bitwise(start, tmp_path, monkeypatch):
    whole = run(start, tmp_path / "whole", "rl.num_steps=4")
    score, calls = rankgrpo.rollouts.rounds.score_groups, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 4:  # one step after the checkpoint
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(rankgrpo.rollouts.rounds, "score_groups", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(start, tmp_path / "parts", "rl.num_steps=4")
    monkeypatch.undo()
    assert numbers(run(start, tmp_path / "parts", "rl.num_steps=4")) == numbers(whole)


def test_what_was_seen_is_not_named(start):
    dataset = tiny_dataset()
    sample = next(s for s in dataset.validation if s.seen_titles)
    policy, config = held_policy(start, "rl.forbid=repeats+seen", "eval.temperature=1.0")
    seen = set(seen_items(sample, dataset.catalog))
    # Everything but six items is seen: the five lines are among these.
    titles = tuple(f"{item.title} ({item.year})" for item in dataset.catalog.items[6:])
    narrow = replace(sample, seen_titles=titles)
    (text,) = recommend_lists(policy, hf_sampler(policy), [narrow], dataset.catalog, config)
    named = [dataset.catalog.lookup(item.title, item.year) for item in parse_list(text)]
    assert len(set(named)) == 5 and set(named) <= set(range(6)) and seen


def test_the_warm_start_may_be_trained_so_and_names_a_demonstration_it_cannot(start, tmp_path):
    config = tiny_config(HELD, "sft.constrain=catalog", "sft.num_steps=2")
    final = train_sft(config, tiny_dataset(), tiny_demonstrations(), start, tmp_path / "a", ALONE)
    rows = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    free = tiny_config("sft.num_steps=2")
    train_sft(free, tiny_dataset(), tiny_demonstrations(), start, tmp_path / "b", ALONE)
    assert final.is_dir() and rows[0]["loss/nll"] < read_metrics(tmp_path / "b" / "metrics.jsonl")[0][0]["loss/nll"]
    wrong = dict(tiny_demonstrations())
    wrong["train"] = [replace(wrong["train"][0], completion="Nowhere (2050)"), *wrong["train"][1:]]
    with pytest.raises(
        ConfigError, match=f"sft.constrain = catalog: the demonstration of sample '{wrong['train'][0].id}'"
    ):
        train_sft(config, tiny_dataset(), wrong, start, tmp_path / "c", ALONE)


def test_more_ranks_than_items_are_refused(start):
    catalog, tokenizer = Catalog([Item("Heat", 1995), Item("Up", 2009)]), AutoTokenizer.from_pretrained(start)
    open_constraint(catalog, tokenizer, num_ranks=2, forbid="repeats")
    with pytest.raises(ConfigError, match="held to the catalog: .*3 ranks .*rl.constrain=none eval.constrain=run"):
        open_constraint(catalog, tokenizer, num_ranks=3, forbid="repeats")


def test_the_setting_is_read_in_one_place_only():
    with pytest.raises(ConfigError, match="rl.count_forced: is read with rl.constrain = catalog only"):
        tiny_config("rl.count_forced=true")
    with pytest.raises(ConfigError, match="sft.constrain: is read with rl.constrain = catalog only"):
        tiny_config("sft.constrain=catalog")
    assert Config().rl.constrain == "none"


@pytest.mark.slow
def test_a_run_is_evaluated_as_it_was_trained_or_freely(tmp_path):
    config = tiny_config(HELD, "rl.num_steps=1", "sft.num_steps=1", "eval.num_samples=3", "eval.free_samples=0")
    run_pipeline(config, tmp_path / "run")
    lists = [json.loads(line) for line in (tmp_path / "run" / "eval" / "test" / "rank-grpo.lists.jsonl").open()]
    assert all(mark["in_catalog"] and not mark["duplicate"] for row in lists for mark in row["items"])
    options = {"data": None, "split": "test", "num_samples": 2, "out": tmp_path / "out"}
    evaluate_models([str(tmp_path / "run")], **options, overrides=["eval.constrain=none"])
    (path,) = (tmp_path / "out" / "eval" / "test").glob("*before.lists.jsonl")
    for row in map(json.loads, path.open()):
        assert len(row["items"]) != 5 or any(mark["duplicate"] or not mark["in_catalog"] for mark in row["items"])


@pytest.mark.slow
def test_a_model_trained_free_is_validated_free_and_scored_held(tmp_path):
    config = tiny_config("eval.constrain=catalog", "rl.num_steps=1", "sft.num_steps=1", "eval.num_samples=3")
    run_pipeline(config, tmp_path / "run")
    lists = [json.loads(line) for line in (tmp_path / "run" / "eval" / "test" / "rank-grpo.lists.jsonl").open()]
    assert all(len(row["items"]) == 5 for row in lists)
    assert all(mark["in_catalog"] and not mark["duplicate"] for row in lists for mark in row["items"])
    rows, _ = read_metrics(tmp_path / "run" / "rl" / "metrics.jsonl")
    assert rows[0]["eval/items_mean"] != 5  # one line, of a model that has hardly learned
    assert not any(key.startswith("eval_free/") for key in rows[0])


def test_what_shown_lists_are_held_to():
    assert tiny_config(HELD).shown_constrain == tiny_config("eval.constrain=catalog").shown_constrain == "catalog"
    assert tiny_config(HELD, "eval.constrain=none").shown_constrain == tiny_config().shown_constrain == "none"
    assert tiny_config("eval.constrain=catalog", "rl.forbid=none").rl.forbid == "none"
    with pytest.raises(ConfigError, match="rl.forbid: is read with rl.constrain = catalog or eval.constrain = catalog"):
        tiny_config("rl.forbid=none")


def test_a_sample_without_seen_titles_forbids_nothing():
    assert seen_items(Sample("a", (), (), ()), tiny_dataset().catalog) == []


def test_a_catalog_too_small_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="data.num_ranks = 601: the catalog of demo has 600 items"):
        check_run(tiny_config(HELD, "data.num_ranks=601"), tmp_path / "run")
    with pytest.raises(ConfigError, match="601: the catalog of demo has 600 items"):
        check_run(tiny_config("eval.constrain=catalog", "data.num_ranks=601"), tmp_path / "run")
    check_run(tiny_config(HELD, "data.num_ranks=601", "rl.forbid=none"), tmp_path / "run")
