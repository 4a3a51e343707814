"""Two workers under torchrun: whichever process is killed, and whenever, the same command ends as if nothing had been.

RANKGRPO_KILLS=20 pytest tests/distributed/test_kill.py -k random: that many kills at random moments.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import being_saved, finish, kill_when, num_rows, rows, start, workers

from rankgrpo.checkpoint import list_checkpoints
from rankgrpo.files import TEMPORARY

SPLIT = ("parallel.shard=full",)
NUM_KILLS = int(os.environ.get("RANKGRPO_KILLS", "0"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    finish(start(run, *SPLIT, num_processes=2))
    return run, time.monotonic() - began


def newest(run: Path) -> list[str]:
    """Name of the newest complete checkpoint of each phase; "" where there is none."""
    found = [list_checkpoints(run / phase / "checkpoints") for phase in ("sft", "rl")]
    return [paths[-1].name if paths else "" for paths in found]


def assert_same(run: Path, whole: Path) -> None:
    for phase in ("sft", "rl"):
        assert rows(run, phase) == rows(whole, phase)
    evaluation = Path("eval") / "test" / "rank-grpo.json"
    assert (run / evaluation).read_text() == (whole / evaluation).read_text()
    assert not list(run.rglob(f"{TEMPORARY}*"))


def gone(process_ids: list[int], patience_s: float = 10.0) -> bool:
    deadline = time.monotonic() + patience_s
    while alive := [i for i in process_ids if Path(f"/proc/{i}").exists() and " Z " not in stat(i)]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return not alive


def stat(process_id: int) -> str:
    try:
        return Path(f"/proc/{process_id}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return " Z "


@pytest.mark.slow
def test_a_worker_or_the_parent_killed_changes_nothing(uninterrupted, tmp_path):
    run = tmp_path / "run"

    process = start(run, *SPLIT, num_processes=2)
    kill_when(process, lambda: num_rows(run, "sft") >= 3, lambda: workers(process)[1])
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this run has died" in output and "the same command" in output.lower(), output

    process = start(run, *SPLIT, num_processes=2, delay=0.1)
    started: list[int] = []

    def saving() -> bool:
        started[:] = workers(process)
        return bool(list_checkpoints(run / "rl" / "checkpoints")) and being_saved(run / "rl" / "checkpoints")

    kill_when(process, saving)
    assert len(started) == 2 and gone(started), "the workers outlived torchrun"

    # torchrun itself starts the workers again.
    process = start(run, *SPLIT, num_processes=2, torchrun=("--max-restarts", "1"))
    kill_when(process, lambda: num_rows(run, "rl") >= 6, lambda: workers(process)[0])
    finish(process)
    assert_same(run, uninterrupted[0])


@pytest.mark.slow
@pytest.mark.skipif(NUM_KILLS == 0, reason="takes minutes: set RANKGRPO_KILLS=20 to kill at 20 random moments")
def test_random_kills(uninterrupted, tmp_path):
    whole, duration = uninterrupted
    rng, run, resumed = random.Random(os.environ.get("RANKGRPO_SEED", "0")), tmp_path / "run", 0
    for kill in range(NUM_KILLS):
        before = newest(run)
        process = start(run, *SPLIT, num_processes=2, delay=rng.choice((0.0, 0.1)))
        deadline = time.monotonic() + rng.uniform(0.2, 1.0) * duration
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        victims = workers(process) if process.poll() is None else []
        victim = rng.choice([process.pid, *victims])
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
        process.communicate(timeout=120)
        assert gone(victims)
        resumed += any(before)
        kind = "parent" if victim == process.pid else "worker"
        steps = f"{num_rows(run, 'sft')} + {num_rows(run, 'rl')} rows"
        print(f"kill {kill + 1}: {kind}, saved {before} -> {newest(run)}, {steps}")
        assert all(old <= new for old, new in zip(before, newest(run), strict=True))
        if (run / "rl" / "final").exists():
            finish(start(run, *SPLIT, num_processes=2))
            assert_same(run, whole)
            shutil.rmtree(run)
    finish(start(run, *SPLIT, num_processes=2))
    assert_same(run, whole)
    assert resumed > 0
