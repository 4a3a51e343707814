"""Real processes, killed with SIGKILL at several moments: the same command must finish the run it would have been."""

import json
from pathlib import Path

import pytest
from processes import being_saved, finish, kill_when, num_rows, rows, start

from rankgrpo.files.atomic import TEMPORARY
from rankgrpo.runtime.checkpoint import list_checkpoints


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(start(run))
    return run


@pytest.mark.slow
def test_kill_at_any_moment_changes_nothing(uninterrupted, tmp_path):
    run = tmp_path / "run"
    sft, rl = run / "sft", run / "rl"
    moments = [
        lambda: num_rows(run, "sft") >= 3,  # between two checkpoints of the warm start
        lambda: being_saved(sft / "checkpoints"),
        lambda: being_saved(sft),  # the warm start's export
        lambda: num_rows(run, "rl") >= 2,  # before the first checkpoint of Rank-GRPO
        lambda: bool(list_checkpoints(rl / "checkpoints")) and being_saved(rl / "checkpoints"),
        lambda: (run / "eval").exists(),
    ]
    for moment in moments:
        process = start(run, delay=0.15)
        saved = set(list_checkpoints(sft / "checkpoints") + list_checkpoints(rl / "checkpoints"))
        kill_when(process, moment)
        assert (
            saved <= set(list_checkpoints(sft / "checkpoints") + list_checkpoints(rl / "checkpoints")) or sft.exists()
        )
    output = finish(start(run))
    for phase in ("sft", "rl"):
        assert rows(run, phase) == rows(uninterrupted, phase)
    table = (uninterrupted / "eval" / "test" / "rank-grpo.json").read_text()
    assert (run / "eval" / "test" / "rank-grpo.json").read_text() == table
    assert "RL over SFT, NDCG@5: " in output and "paired bootstrap" in output
    assert "report.html" in output and (run / "report.html").is_file()
    assert not list(run.rglob(f"{TEMPORARY}*"))


@pytest.mark.slow
def test_a_changed_configuration_is_refused_and_nothing_is_touched(uninterrupted):
    before = sorted(path.stat().st_mtime_ns for path in uninterrupted.rglob("*"))
    process = start(uninterrupted, "rl.lr=0.5")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rl.lr: 0.001 -> 0.5" in output and "new run folder" in output and "Traceback" not in output
    assert sorted(path.stat().st_mtime_ns for path in uninterrupted.rglob("*")) == before


@pytest.mark.slow
def test_two_processes_train_as_one(uninterrupted, tmp_path):
    run = tmp_path / "run"
    finish(start(run, num_processes=2))
    assert [row["step"] for row in rows(run, "rl")] == [row["step"] for row in rows(uninterrupted, "rl")]
    for two, one in zip(rows(run, "sft"), rows(uninterrupted, "sft"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5), one["step"]
    # Rounding differs, and Adam turns the rounding of a gradient near 0 into a step: later samples may part.
    for two, one in zip(rows(run, "rl")[:3], rows(uninterrupted, "rl")[:3], strict=True):
        assert two == pytest.approx(one, rel=5e-3, abs=1e-5), one["step"]
    # The untrained model is the same in both runs, so is what its lists score, whoever wrote which of them.
    assert evaluated(run, "before") == evaluated(uninterrupted, "before")
    assert [name for name, _ in evaluated(run, "rank-grpo")] == [name for name, _ in evaluated(run, "before")]


def evaluated(run: Path, model: str) -> list[tuple[str, str]]:
    lines = (run / "eval" / "test" / f"{model}.lists.jsonl").read_text().splitlines()
    return [(row["id"], row["completion"]) for row in map(json.loads, lines)]
