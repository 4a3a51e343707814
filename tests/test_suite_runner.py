"""Runs of a suite: their order, what fails, what is at work elsewhere, and what ends with the suite."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_suite import SUITE
from tiny_world import WORDS

from rankgrpo.errors import ConfigError
from rankgrpo.files.atomic import only_one
from rankgrpo.runtime.checkpoint import list_checkpoints
from rankgrpo.suite import runner
from rankgrpo.suite.command import open_suite, run_suite
from rankgrpo.suite.results import read_results
from rankgrpo.suite.runner import run_missing
from rankgrpo.suite.runs import plan_runs
from rankgrpo.suite.spec import read_suite


@pytest.fixture
def toy(tmp_path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(SUITE)
    return path


# In place of `rankgrpo run`: notes when it ran, then does what the name of its folder asks for.
FAKE = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run-dir") + 1])
with open(folder.parent / "order", "a") as order: print(folder.name, file=order)
print("some words\\rlast words")
behaviour = (folder.parent / "behaviour").read_text().split()
if folder.name in behaviour: sys.exit(3)
if "sleep" in behaviour: time.sleep(60)
stage = "sft" if "--until" in sys.argv else "rank-grpo"
(folder / "eval" / "test").mkdir(parents=True, exist_ok=True)
(folder / "eval" / "test" / f"{stage}.json").write_text("{}")
"""


@pytest.fixture
def fake(monkeypatch, tmp_path, toy):
    monkeypatch.setattr(runner, "_launcher", lambda num_processes: [sys.executable, "-c", FAKE])
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)

    def run(behaviour: str, **options):
        (tmp_path / "runs" / "tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / "tiny" / "behaviour").write_text(behaviour)
        runs = plan_runs(read_suite(toy), "demo", tmp_path / "runs")
        outcome = run_missing(runs, **{"num_jobs": 1, "num_processes": 1, **options})
        order = (tmp_path / "runs" / "tiny" / "order").read_text().split()
        return outcome, order

    return run


def test_runs_go_in_order_and_only_once(fake):
    outcome, order = fake("")
    assert order == ["sft-seed1", "mine-seed1", "grpo-seed1", "zero-seed7", "mine-seed2", "grpo-seed2"]
    assert not outcome.failed and not outcome.stopped
    assert fake("")[1] == order


def test_a_failure_is_reported_and_the_others_run(fake):
    outcome, order = fake("mine-seed1")
    assert len(order) == 6
    (why,) = outcome.failed.values()
    assert "exit status 3" in why and why.endswith("    last words") and "some words" not in why


def test_nothing_starts_from_a_warm_start_that_failed(fake):
    outcome, order = fake("sft-seed1", num_jobs=2)
    assert sorted(order) == ["sft-seed1", "zero-seed7"]
    assert outcome.failed.pop("tiny/grpo-seed2") == "what it starts from, tiny/sft-seed1, failed"
    assert len(outcome.failed) == 4


def test_what_another_command_has_begun_is_left_to_it(fake, tmp_path):
    """The warm start is at work elsewhere: its rows wait for it, and it is not begun here, nor counted as failed."""
    folder, seen = tmp_path / "runs" / "tiny", []

    def elsewhere():
        with only_one(folder / "sft-seed1"):
            begun.set()
            while not (folder / "order").is_file():  # `zero` needs no warm start
                time.sleep(0.01)
            time.sleep(0.2)
            seen.extend((folder / "order").read_text().split())
            (folder / "sft-seed1" / "eval" / "test").mkdir(parents=True)
            (folder / "sft-seed1" / "eval" / "test" / "sft.json").write_text("{}")

    begun = threading.Event()
    threading.Thread(target=elsewhere, daemon=True).start()
    begun.wait()
    outcome, order = fake("")
    assert seen == ["zero-seed7"]
    assert order == ["zero-seed7", "mine-seed1", "grpo-seed1", "mine-seed2", "grpo-seed2"]
    assert not outcome.failed


def test_what_ends_elsewhere_between_two_looks_is_not_begun_again(fake, tmp_path, monkeypatch):
    scores = tmp_path / "runs" / "tiny" / "sft-seed1" / "eval" / "test"

    def busy_until_now(folder: Path) -> bool:
        if folder.name == "sft-seed1":
            scores.mkdir(parents=True, exist_ok=True)
            (scores / "sft.json").write_text("{}")
        return False

    monkeypatch.setattr(runner, "is_busy", busy_until_now)
    outcome, order = fake("")
    assert "sft-seed1" not in order and "mine-seed1" in order and not outcome.failed


def test_a_run_that_another_command_was_faster_to_begin_is_no_failure(fake, tmp_path, monkeypatch):
    behaviour, order = tmp_path / "runs" / "tiny" / "behaviour", tmp_path / "runs" / "tiny" / "order"

    def busy_when_it_has_failed(folder: Path) -> bool:
        busy = folder.name == "mine-seed1" == behaviour.read_text() and folder.name in order.read_text().split()
        if busy:
            behaviour.write_text("")  # and the next time it does not
        return busy

    monkeypatch.setattr(runner, "is_busy", busy_when_it_has_failed)
    outcome, order = fake("mine-seed1")
    assert not outcome.failed and len(outcome.done) == 6
    assert order.count("mine-seed1") == 2


def test_time_runs_out_within_a_run(fake):
    outcome, order = fake("sleep", max_minutes=0.02)
    assert outcome.stopped and order in ([], ["sft-seed1"])
    assert not outcome.done and not outcome.failed


TERMINATED = """
import sys
from pathlib import Path
from rankgrpo.suite import runner
from rankgrpo.suite.runs import plan_runs
from rankgrpo.suite.spec import read_suite
note = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
runner._launcher = lambda num_processes: [sys.executable, "-c", note, sys.argv[3]]
(run, *_) = plan_runs(read_suite(Path(sys.argv[1])), "demo", Path(sys.argv[2]))
runner.run_missing([run], num_jobs=1, num_processes=1)
"""


@pytest.mark.slow
def test_runs_end_with_a_suite_that_is_terminated(toy, tmp_path):
    noted = tmp_path / "pid"
    suite = subprocess.Popen([sys.executable, "-c", TERMINATED, str(toy), str(tmp_path / "runs"), str(noted)])
    while not (noted.is_file() and noted.read_text()):
        assert suite.poll() is None
        time.sleep(0.05)
    suite.terminate()
    assert suite.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_checkpoint(monkeypatch, tmp_path):
    """A real run, killed after a checkpoint: the same command finishes it, and what was done is not done again."""
    path = tmp_path / "toy.toml"
    path.write_text(
        'title = "T"\nmodels = ["tiny"]\nseeds = [1]\n[[rows]]\nname = "zero"\nmethod = "r1-zero"\nstart = "none"\n'
    )
    overrides = [*WORDS, "teacher.short_requests=0", "rl.num_steps=8", "rl.kl_coef=1e-3", "rl.repeat_penalty=0"]
    started, folder = [], tmp_path / "runs" / "tiny" / "zero-seed1"
    monkeypatch.setattr(
        runner, "start_process", lambda *a, start=runner.start_process: started.append(start(*a)) or started[-1]
    )

    def kill_after_a_checkpoint():
        while not list_checkpoints(folder / "rl" / "checkpoints"):
            time.sleep(0.05)
        os.kill(started[0].pid, signal.SIGKILL)

    def run():
        run_suite(
            open_suite(str(path), runs_dir=tmp_path / "runs", out=tmp_path / "out", overrides=overrides), [], None
        )

    threading.Thread(target=kill_after_a_checkpoint, daemon=True).start()
    with pytest.raises(ConfigError, match=r"1 runs failed; the same command tries them again.\n.*exit status -9"):
        run()
    metrics = folder / "rl" / "metrics.jsonl"
    (saved, *_) = [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "rl" / "checkpoints")]
    before = metrics.read_text().splitlines()[: saved + 1]
    run()
    after = metrics.read_text().splitlines()
    assert after[: saved + 1] == before  # with the seconds that they took
    assert [json.loads(line)["step"] for line in after] == list(range(9))
    (row,) = [
        row
        for row in read_results(tmp_path / "out" / "results" / "toy-demo" / "results.json")["boards"]["tiny"]["rows"]
        if row["name"] == "zero"
    ]
    assert row["cost"]["steps"] == 8
    run()
    assert len(started) == 2
