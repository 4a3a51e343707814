"""Two workers under torchrun: whichever process is killed, the same command ends as if nothing had been.

random_kills.py beside this file does the same at as many random moments as it is asked for.
"""

from pathlib import Path

import pytest
from processes import being_saved, children, finish, gone, kill_when, num_rows, rows, start

from rankgrpo.checkpoint import list_checkpoints
from rankgrpo.files import TEMPORARY

SPLIT = ("parallel.shard=full",)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(start(run, *SPLIT, num_processes=2))
    return run


def assert_same(run: Path, whole: Path) -> None:
    for phase in ("sft", "rl"):
        assert rows(run, phase) == rows(whole, phase)
    evaluation = Path("eval") / "test" / "rank-grpo.json"
    assert (run / evaluation).read_text() == (whole / evaluation).read_text()
    assert not list(run.rglob(f"{TEMPORARY}*"))


@pytest.mark.slow
def test_a_worker_or_the_parent_killed_changes_nothing(uninterrupted, tmp_path):
    run = tmp_path / "run"

    process = start(run, *SPLIT, num_processes=2)
    kill_when(process, lambda: num_rows(run, "sft") >= 3, lambda: children(process.pid)[1])
    output, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    # The survivor tells it, unless torchrun stops it first and tells it alone.
    assert "another process of this run has died" in output or "Signal 9 (SIGKILL) received" in output, output

    process = start(run, *SPLIT, num_processes=2, delay=0.1)
    started: list[int] = []

    def saving() -> bool:
        started[:] = children(process.pid)
        return bool(list_checkpoints(run / "rl" / "checkpoints")) and being_saved(run / "rl" / "checkpoints")

    kill_when(process, saving)
    assert len(started) == 2 and gone(started), "the workers outlived torchrun"

    # torchrun itself starts the workers again.
    process = start(run, *SPLIT, num_processes=2, torchrun=("--max-restarts", "1"))
    kill_when(process, lambda: num_rows(run, "rl") >= 6, lambda: children(process.pid)[0])
    finish(process)
    assert_same(run, uninterrupted)
