"""A finished run goes on, a finished command prints its result, and a disk that is too small is refused at once."""

import shutil
from collections import namedtuple
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import WORDS

from rankgrpo.config import Config, ModelConfig
from rankgrpo.config_file import load_config
from rankgrpo.errors import ConfigError, SaveError
from rankgrpo.pipeline import extend_run, run_pipeline
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.sizing.architecture import PRESETS
from rankgrpo.sizing.disk import check_disk, disk_bytes, disk_line

STEPS = ("rl.num_steps=3", "rl.eval_every=3")


def rows_of(run):
    rows = read_metrics(run / "rl" / "metrics.jsonl")[0]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "eval"))} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("extend") / "run"
    run_pipeline(load_config(None, [*WORDS, *STEPS]), run, evaluate=False)
    return run


def test_a_finished_command_prints_its_result(finished, capsys):
    before = (finished / "rl" / "metrics.jsonl").stat().st_mtime_ns
    run_pipeline(load_config(None, [*WORDS, *STEPS]), finished, evaluate=False)
    assert (finished / "rl" / "metrics.jsonl").stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert "> finished: 3 steps of rl; validation NDCG@5 0." in out and str(finished / "rl" / "best") in out


@pytest.mark.slow
def test_a_finished_run_goes_on_to_more_steps(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    fewer, more = [*WORDS, "rl.num_steps=2"], [*WORDS, "rl.num_steps=5", "rl.eval_every=3"]
    with pytest.raises(ConfigError, match="rl.num_steps: 3 -> 2"):
        run_pipeline(load_config(None, [*fewer, "rl.eval_every=3"]), run, evaluate=False)
    with pytest.raises(ConfigError, match="rl.lr: 0.001 -> 0.5"):
        run_pipeline(load_config(None, [*more, "rl.lr=0.5"]), run, evaluate=False)
    capsys.readouterr()
    run_pipeline(load_config(None, more), run, evaluate=False)
    out = capsys.readouterr().out
    assert "extended from 3 to 5 steps: rl.schedule = constant over 5 steps" in out
    assert "learning rate was 0.001 at step 3 and is 0.001 at the next" in out
    assert "finished: 5 steps of rl" in out
    whole = tmp_path / "whole"
    shutil.copytree(finished, whole, symlinks=True, ignore=shutil.ignore_patterns("rl", "config.toml"))
    run_pipeline(load_config(None, more), whole, evaluate=False)
    assert rows_of(run) == rows_of(whole)  # bit for bit, but for the validation at the first end


def test_a_run_that_goes_on_and_is_stopped_at_its_end_does_not_keep_the_last_model_of_the_shorter_one(
    finished, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    more = load_config(None, [*WORDS, "rl.num_steps=4", "rl.eval_every=3"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # after the row of step 4
        patch.setattr("rankgrpo.train.save_checkpoint", mock.Mock(side_effect=KeyboardInterrupt))
        run_pipeline(more, run, evaluate=False)
    assert [row["step"] for row in rows_of(run)][-1] == 4
    run_pipeline(more, run, evaluate=False)
    shorter, longer = (load_file(folder / "rl" / "final" / "model.safetensors") for folder in (finished, run))
    assert any(not torch.equal(shorter[name], longer[name]) for name in shorter)


def test_going_on_states_the_schedule_and_drops_the_old_scores(tmp_path):
    for path in ("eval/test/rank-grpo.json", "eval/test/rank-grpo.lists.jsonl", "eval/test/sft.json",
                 "diversity/test/rank-grpo.json"):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    before, after = (load_config(None, ["rl.lr=1e-4", "rl.schedule=cosine", f"rl.num_steps={n}"]) for n in (100, 200))
    told = extend_run(before, after, tmp_path)
    # cosine to 0 over 100 steps: 1e-4 * (1 + cos(0.99 pi)) / 2 = 2.47e-8; over 200, halfway: 5e-5
    assert "learning rate was 2.47e-08 at step 100 and is 5e-05 at the next" in told
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.json*")) == ["eval/test/sft.json"]


def test_bytes_on_disk():
    config = load_config(None, ["sft.keep_last=2", "rl.keep_last=1"])
    assert disk_bytes(1000, 0, config) == {
        "first model": 4_000,
        "SFT checkpoints": 36_000,  # two and the one that is written, of 12 bytes a parameter
        "SFT model": 4_000,
        "RL checkpoints": 24_000,
        "RL models": 12_000,
    }
    adapted = disk_bytes(1000, 10, config, made=False, warm_start=False)
    assert (adapted["RL checkpoints"], adapted["SFT model"], adapted["first model"]) == (240, 0, 0)
    # 494,032,768 parameters: 3 * 12 bytes twice, 4 + 12 bytes of models.
    assert disk_line(PRESETS["qwen2.5-0.5b"], Config(model=ModelConfig("qwen2.5-0.5b"))).startswith(
        "GB on disk 43.5: SFT checkpoints 17.79, "
    )


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run = tmp_path / "deep" / "run"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 5_000_000))
    check_disk({"RL models": 5_000_000}, run)
    with pytest.raises(SaveError, match="needs 0.01 GB more .* 0.01 GB are free.*rl.keep_last=1"):
        check_disk({"RL models": 5_000_001}, run)
    run.mkdir(parents=True)
    (run / "model.safetensors").write_bytes(bytes(1000))
    check_disk({"RL models": 5_001_000}, run)  # what is there already needs no more room
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 1000))
    with pytest.raises(SaveError, match="name a run folder on another disk"):
        run_pipeline(load_config(None, WORDS), tmp_path / "new")
    assert not (tmp_path / "new").exists()
