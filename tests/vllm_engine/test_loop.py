"""Whole runs with the real engine: mismatch, resume after SIGKILL, syncs left out, several processes."""

import sys
from pathlib import Path

import pytest
from processes import finish, kill_when, launch
from tiny_world import ALONE, taught_dataset, tiny_config, tiny_dataset

import rankgrpo.train as train_module
from rankgrpo.config_file import to_toml
from rankgrpo.data.demo import write_demo
from rankgrpo.errors import TrainingError
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.train import train

# One head: vLLM's CPU attention knows head sizes from 32 on. Lists enough for an untrained model to be right at times.
ENGINE = ["rl.sampler=vllm", "model.heads=1", "rl.group_size=6"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start") / "init"
    return make_init("tiny", taught_dataset(), folder, seed=0, tiny=TinyConfig(32, 2, 64, 1, 1, 1024), num_ranks=5)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Rows of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    finish(launch(*command(start, folder)), timeout_s=400)
    return read_metrics(folder / "run" / "rl" / "metrics.jsonl")[0]


def numbers(rows):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def command(start: str, folder: Path, *words: str) -> list[str]:
    """Words of `launch` that train in folder/run, with the configuration and data of the runs in this process.

    Runs that must be equal are all processes of their own: sums differ in their last bits with the number of threads.
    """
    write_demo(folder / "data", num_train=48, num_validation=8, num_test=8, seed=0)
    (folder / "config.toml").write_text(to_toml(tiny_config(*ENGINE, "data.num_train=0", *words)))
    program = ["-m", "rankgrpo", "train", "--from-model", start, "--run-dir", str(folder / "run")]
    return [*program, "--data", str(folder / "data"), "--config", str(folder / "config.toml")]


def test_trainer_and_sampler_are_one_policy_at_every_step(whole):
    steps = [row for row in whole if row["step"] > 0]
    assert len(steps) == 6 and sum(row["grad/norm"] > 0 for row in steps) >= 2
    for row in steps:
        assert row["mismatch/exp_abs_logp"] <= 1.00001
        assert row["mismatch/abs_logp"] < 1e-5 and row["mismatch/outside_clip_frac"] == 0
        assert row["time/sync_s"] > 0
    assert "eval/ndcg@5" in whole[0] and "eval/ndcg@5" in whole[3]


def test_killed_and_continued_it_is_the_run_it_would_have_been(start, whole, tmp_path):
    words = command(start, tmp_path)
    out = tmp_path / "run" / "rl"
    metrics = out / "metrics.jsonl"
    kill_when(launch(*words), lambda: metrics.exists() and metrics.read_text().count("\n") >= 4, timeout_s=300)
    assert not (out / "final").exists()
    finish(launch(*words), timeout_s=400)
    assert numbers(read_metrics(metrics)[0]) == numbers(whole)


def test_a_sync_left_out_stops_the_run_at_the_next_step(start, tmp_path, monkeypatch):
    real, real_step, calls, norms = train_module.sync_weights, train_module.Updater.step, [], []

    def only_the_first(sampler, model):
        calls.append(1)
        if len(calls) == 1:
            real(sampler, model)

    def step(self, *args):
        norms.append(real_step(self, *args))
        return norms[-1]

    monkeypatch.setattr(train_module, "sync_weights", only_the_first)
    monkeypatch.setattr(train_module.Updater, "step", step)
    config = tiny_config(*ENGINE, "rl.lr=1e-2", "rl.mismatch_alarm=1.001")
    with pytest.raises(
        TrainingError, match=r"The sampler's weights are not the trainer's: model.embed_tokens"
    ) as stopped:
        train(config, tiny_dataset(), start, tmp_path / "rl", ALONE)
    changed_at = next(step for step, norm in enumerate(norms, start=1) if norm > 0)
    assert str(stopped.value).startswith(f"RL step {changed_at + 1}, ")


@pytest.mark.parametrize("shared", [False, True], ids=["an engine each", "one engine"])
def test_two_processes(tmp_path, shared):
    """The model is split over both, and each has an engine of its own, or both share one."""
    size = TinyConfig(64, 2, 64, 2, 2, 1024) if shared else TinyConfig(32, 2, 64, 1, 1, 1024)
    words = ["rl.num_steps=2", f"rl.vllm_tp={1 + shared}", "parallel.shard=full"]
    start = make_init("tiny", taught_dataset(), tmp_path / "init", seed=0, tiny=size)
    finish(launch(*command(start, tmp_path, *words), num_processes=2), timeout_s=400)
    steps = read_metrics(tmp_path / "run" / "rl" / "metrics.jsonl")[0][1:]
    assert len(steps) == 2
    for row in steps:
        assert row["mismatch/exp_abs_logp"] <= 1.00001
        assert row["tokens/sampled"] > 4 * 3  # the lists of both processes


@pytest.mark.slow
@pytest.mark.parametrize(("model", "steps"), [("tiny", 8), ("smollm2-135m", 3)])
def test_real_conversations(model, steps, tmp_path):
    """The evidence of experiments/vllm, shorter."""
    sys.path.append(str(ROOT / "experiments" / "vllm"))
    from proof import prove

    data = ROOT.parent / "shared" / "data" / "redial"
    if not data.is_dir():
        pytest.skip("no real conversations: ../shared/data/redial is missing")
    result = prove(model, str(data), steps, tmp_path / "run", ["model.autocast=none"])
    assert result["steps"] == steps and result["steps_that_changed_the_weights"] >= steps - 1
    assert result["worst_step"] <= 1.001
