"""rl.overlap: batches sampled from weights that are a step old, in a process beside the trainer."""

import json
import os
import shutil
import signal
import time
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from processes import gone
from test_trouble import warm  # noqa: F401  (a fixture)
from tiny_world import ALONE, byte_rollout, tiny_config, tiny_dataset

from rankgrpo.config_file import load_config
from rankgrpo.data.order import BatchOrder
from rankgrpo.data.prompt import encode_prompts, open_prompt
from rankgrpo.errors import ConfigError, SamplingError, TrainingError
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.policy import open_policy, open_reference
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.ahead import ListsAhead, check_overlap, share_threads, warn_of_few_cores
from rankgrpo.rollouts.rounds import RoundMaker, describe_rounds, make_rounds
from rankgrpo.rollouts.score import Scorer
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.optim import make_optimizer, rl_learning_rate
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sampler.process import Opening, ProcessSampler, rollouts_to_json
from rankgrpo.sampler.sync import different_tensors, sync_weights
from rankgrpo.train import Updater, make_round_micro_batches, train

OVERLAP = ("rl.overlap=true", "rl.lr=3e-3", "rl.mismatch_alarm=1e3", "model.verify=false", "rl.num_steps=5")
"""A learning rate at which weights a step old give other lists."""
ROUNDS = ("rl.live_groups=3", "rl.max_rounds=3", "rl.hard_group_size=5", "rl.kl_coef=0", "rl.overflow_penalty=0",
          "rl.early_eos_penalty=0", "rl.constrain=catalog", "rl.forbid=repeats+seen", "rl.keep_last=3")  # fmt: skip


def run(warm, folder, *words):  # noqa: F811
    train(tiny_config(*words), tiny_dataset(), warm, folder, ALONE)
    return numbers(folder)


def numbers(folder):
    rows = read_metrics(folder / "metrics.jsonl")[0]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def with_rounds(warm, tmp_path_factory):  # noqa: F811
    """Folder and rows of a run with further rounds and larger groups, its lists held to the catalog."""
    folder = tmp_path_factory.mktemp("rounds") / "rl"
    return folder, run(warm, folder, *OVERLAP, *ROUNDS)


def opened(warm, config):  # noqa: F811
    policy = open_policy(warm, config.model, ALONE.device, adapter=config.adapter, seed=config.seed)
    return hold_to_catalog(policy, config, tiny_dataset().catalog)


def by_hand(warm, config):  # noqa: F811
    """The rows of a run without validation, in one process: every step keeps a copy of the weights that it began
    with, and its successor is sampled from that copy. Also the weights in the end."""
    dataset, rl, num_ranks = tiny_dataset(), config.rl, config.data.num_ranks
    policy = opened(warm, config)
    older = replace(opened(warm, config), paths=policy.paths)
    ref = open_reference(policy, warm, config.model, ALONE.device, None) if rl.kl_coef else None
    optimizer = make_optimizer(policy.model, lr=rl.lr, betas=rl.betas, weight_decay=rl.weight_decay, eps=rl.adam_eps)
    sampler = hf_sampler(older, rows=rl.sampler_rows)
    updater = Updater(policy, ref, sampler, optimizer, rl, ALONE)
    scorer = Scorer.open(dataset.catalog, rl, num_ranks, RankSegmenter(policy.tokenizer), sampler.eos_ids)
    prompts = encode_prompts(
        policy.tokenizer, dataset.train, config.data.max_prompt_tokens, num_ranks, prompt=open_prompt(config.data)
    )
    seen = policy.seen(dataset.train, dataset.catalog)
    maker = RoundMaker(older, sampler, scorer, dataset.train, prompts, seen, config)
    order = BatchOrder(len(dataset.train), rl.prompts_per_step, config.seed)
    kept = [p.detach().clone() for p in policy.model.parameters()]
    rows, number = [], 0
    for step in range(rl.num_steps):
        for old, copy in zip(older.model.parameters(), kept, strict=True):
            old.data.copy_(copy)
        means = Means()
        rounds, number = make_rounds(maker, order, number, step, means, ALONE)
        kept = [p.detach().clone() for p in policy.model.parameters()]
        batch = list(chain.from_iterable(make_round_micro_batches(one, policy, num_ranks) for one in rounds))
        denominator = max(sum(one.denominator for one in rounds), 1.0)
        updater.add_reference(batch)
        for _ in range(rl.updates_per_batch):
            norm = updater.step(batch, denominator, rl_learning_rate(step, rl), "here", means)
        describe_rounds(rounds, rl, means, ALONE)
        rows.append(means.reduce(ALONE) | {"grad/norm": norm})
    return rows, dict(policy.model.named_parameters())


def assert_by_hand(folder, rows, warm, *words):  # noqa: F811
    expected, parameters = by_hand(warm, tiny_config(*words))
    for step, (row, by_loop) in enumerate(zip(rows[1:], expected, strict=True)):
        assert {key: row[key] for key in by_loop} == by_loop
        assert row["overlap/steps_behind"] == min(step, 1)
    final = open_policy(folder / "final", tiny_config().model, ALONE.device)
    for name, parameter in final.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    # The first batch comes from the weights it trains; from then on the step between shows.
    gaps = [row["mismatch/exp_abs_logp"] for row in rows[1:]]
    assert gaps[0] == pytest.approx(1, abs=1e-4) and min(gaps[1:]) > 1.001
    assert all(row["ratio/mean"] != pytest.approx(1, abs=1e-4) for row in rows[2:])


@pytest.mark.slow
def test_it_is_a_loop_that_samples_from_weights_one_step_old(warm, tmp_path):  # noqa: F811
    words = (*OVERLAP, "rl.num_steps=3", "rl.updates_per_batch=2")
    assert_by_hand(tmp_path / "rl", run(warm, tmp_path / "rl", *words), warm, *words)


@pytest.mark.slow
def test_it_is_that_loop_with_further_rounds_and_lists_held_to_the_catalog(with_rounds, warm):  # noqa: F811
    folder, rows = with_rounds
    assert max(row["groups/rounds"] for row in rows[1:]) > 1
    assert any(row.get("groups/hard_live_frac", 0) > 0 for row in rows[1:])
    assert_by_hand(folder, rows, warm, *OVERLAP, *ROUNDS)


@pytest.mark.slow
def test_a_checkpoint_holds_the_batch_that_was_sampled_ahead(with_rounds, warm, tmp_path):  # noqa: F811
    folder, rows = with_rounds
    shutil.copytree(folder, tmp_path / "rl", symlinks=True)
    shutil.rmtree(tmp_path / "rl" / "final")
    for step in (4, 5):
        shutil.rmtree(tmp_path / "rl" / "checkpoints" / f"step-{step:08d}")
    state = json.loads((tmp_path / "rl" / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert len(state["ahead"]) >= 4  # seeds: conversations, and those that got more lists once more
    assert run(warm, tmp_path / "rl", *OVERLAP, *ROUNDS) == rows
    last = json.loads((folder / "checkpoints" / "step-00000005" / "state.json").read_text())
    assert last["ahead"] == []  # nobody samples for a step that does not come


class Nobody:
    def sample(self, *_, **__):
        raise LookupError("not there")


def test_lists_of_a_checkpoint_serve_any_number_of_processes():
    lists = [byte_rollout("ab", logp=-1 / 3), byte_rollout("c\n")], [byte_rollout("ü"), byte_rollout("", False)]
    two = [ListsAhead(Nobody(), [(seed, rollouts_to_json(group))]) for seed, group in zip((7, 8), lists, strict=True)]
    kept = json.loads(json.dumps([row for one in two for row in one.kept()]))
    alone = ListsAhead(Nobody(), kept)
    assert alone.ahead and alone.sample([[1], [2]], seeds=[8, 7]) == [lists[1], lists[0]]
    with pytest.raises(LookupError):  # each was kept once
        alone.sample([[1]], seeds=[7])
    twice = ListsAhead(Nobody(), [*kept, (7, rollouts_to_json(lists[1]))])
    assert twice.sample([[1], [2], [1]], seeds=[7, 8, 7]) == [lists[0], lists[1], lists[1]]
    alone.forget()
    assert not alone.ahead and alone.kept() == []


# ----------------------------------------------------------------------------------------------------------------------
# The process


def opening_of(policy, source, config):
    return Opening.of(policy, source, config.model, tiny_dataset().catalog.lines, rows=256, threads=1)


@pytest.mark.slow
def test_a_sampler_in_a_process_of_its_own(warm):  # noqa: F811
    config = tiny_config("model.verify=false")
    policy = opened(warm, config)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    terms = {"group_size": 3, "seeds": [1, 2, 3], "max_new_tokens": 9, "temperature": 0.7}
    with closing(ProcessSampler(opening_of(policy, warm, config))) as process:
        sync_weights(process, policy.model)
        before = process.sample(prompts, **terms)
        assert before == hf_sampler(policy).sample(prompts, **terms)
        assert process.eos_ids == hf_sampler(policy).eos_ids

        with torch.no_grad():
            policy.model.lm_head.weight.mul_(1.5)
        (different,) = different_tensors(process, policy.model)
        assert different == "model.embed_tokens.weight"  # tied
        assert process.sample(prompts, **terms) == before  # it has a copy
        sync_weights(process, policy.model)
        after = process.sample(prompts, **terms)
        assert after == hf_sampler(policy).sample(prompts, **terms) != before

        with pytest.raises(
            RuntimeError, match=r"(?s)in the process that samples:\nTraceback.*unexpected keyword.*'no'"
        ):
            process.sample(prompts, **terms, no=1)
        with torch.no_grad():
            policy.model.lm_head.weight[0, 0] = torch.nan
        sync_weights(process, policy.model)
        with pytest.raises(SamplingError, match="^the model's logits are not finite"):
            process.sample(prompts, **terms)
        process.process.kill()
        with pytest.raises(SamplingError, match="was killed by signal 9; .*memory.*the same command continues"):
            process.sample(prompts, **terms)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_whatever_ends_the_trainer_ends_the_process_that_samples(number, warm):  # noqa: F811
    config = tiny_config()
    opening = opening_of(opened(warm, config), warm, config)
    reading, writing = os.pipe()
    if (trainer := os.fork()) == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with closing(ProcessSampler(opening)) as sampler:
                os.write(writing, f"{sampler.process.pid:8}".encode())
                time.sleep(600)
        finally:
            os._exit(1)
    process = int(os.read(reading, 8))
    while "libtorch" not in Path(f"/proc/{process}/maps").read_text():  # it has asked to be ended by then
        time.sleep(0.05)
    os.kill(trainer, number)
    os.waitpid(trainer, 0)
    assert gone([process])


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, and what is said


@pytest.mark.slow
def test_a_step_that_moves_too_far_stops_the_run(warm, tmp_path):  # noqa: F811
    words = ("rl.num_steps=2", "rl.lr=1e-2", "rl.mismatch_alarm=1.01")
    with pytest.raises(TrainingError, match="RL step 2.*above rl.mismatch_alarm = 1.01. With rl.overlap.*lower rl.lr"):
        run(warm, tmp_path / "rl", *OVERLAP, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl.sampler=vllm"], "rl.overlap: needs rl.sampler = hf"),
        (["rl.mismatch_correction=truncate"], "rl.mismatch_correction: truncate needs rl.overlap = false"),
    ],
)
def test_settings_that_do_not_go_together(words, message):
    load_config(None, words)
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["rl.overlap=true", *words])


def test_gpus_are_refused_in_one_line():
    check_overlap(tiny_config(), torch.device("cuda"))
    check_overlap(tiny_config("rl.overlap=true"), torch.device("cpu"))
    with pytest.raises(ConfigError, match="^rl.overlap: .*on CPUs alone.*rl.overlap=false$"):
        check_overlap(tiny_config("rl.overlap=true", "rl.sampler=hf"), torch.device("cuda"))


def test_threads_are_shared_and_too_few_cores_are_told(monkeypatch, capsys):
    assert [share_threads(n) for n in (1, 2, 5, 8)] == [(1, 1), (1, 1), (2, 3), (4, 4)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    warn_of_few_cores(2)
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    warn_of_few_cores(2)
    assert "4 threads train and sample on 2 cores" in capsys.readouterr().out
