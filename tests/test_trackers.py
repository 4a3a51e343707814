"""Trackers: what they were told is read back from their own files, and one that fails stops nothing."""

import importlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_viewer import ROWS, write_run
from tiny_world import WORDS

from rankgrpo.errors import ConfigError
from rankgrpo.files.tracking import TrackConfig
from rankgrpo.report.track import sampled_rows, send_results
from rankgrpo.runtime import trackers
from rankgrpo.runtime.tracker import MetricsLog
from rankgrpo.runtime.trackers import check_tracker, open_tracker

SETTINGS = {"rl.lr": 1e-5, "rl.betas": (0.9, 0.99), "model.name": "tiny"}


class Recorder:
    """A backend that writes down what it is told."""

    def __init__(self, config, run_dir, run_id, settings):
        self.id, self.settings, self.told = run_id, settings, []

    def log(self, phase, step, metrics):
        self.told.append((phase, step, metrics))

    def summary(self, values):
        self.told.append(("summary", values))

    def picture(self, name, path):
        self.told.append(("picture", name, path.name))

    def table(self, name, columns, rows):
        self.told.append(("table", name, columns, rows))

    def close(self):
        self.told.append("closed")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(trackers.BACKENDS, "wandb", Recorder)
    monkeypatch.setattr(trackers, "check_tracker", lambda config: None)


def evaluated_run(folder: Path) -> Path:
    run = write_run(folder, ROWS)
    (run / "plots").mkdir()
    from PIL import Image

    Image.new("RGB", (4, 3), (250, 0, 0)).save(run / "plots" / "kl.png")
    (run / "eval" / "test").mkdir(parents=True)
    metrics = {"ndcg@20": {"mean": 0.25, "low": 0.2, "high": 0.3}}
    summary = {"name": "sft", "split": "test", "num_samples": 8, "metrics": metrics, "hit_rate_by_rank": [0.1]}
    (run / "eval" / "test" / "sft.json").write_text(json.dumps(summary))
    return run


def test_nothing_is_opened_without_the_option(tmp_path):
    assert open_tracker(TrackConfig(), tmp_path, SETTINGS) is None and not list(tmp_path.iterdir())


def test_a_step_is_sent_once_over_resumes(tmp_path, recorder):
    config, path = TrackConfig(kind="wandb"), tmp_path / "rl" / "metrics.jsonl"

    def attempt(resume_step, steps):
        tracker = open_tracker(config, tmp_path, SETTINGS)
        log = MetricsLog(path, resume_step=resume_step, num_steps=9, title="x", tracker=tracker)
        for step in steps:
            log.write(step, {"reward/mean": step / 10})
        log.close()
        return tracker.backend

    first, second = attempt(0, (1, 2, 3)), attempt(2, (3, 4))
    assert [told[:2] for told in first.told] == [("rl", 1), ("rl", 2), ("rl", 3)]
    assert first.told[0][2] == {"reward/mean": 0.1} and first.settings == SETTINGS
    assert second.told == [("rl", 4, {"reward/mean": 0.4})] and second.id == first.id
    # A tracker that comes late gets what was logged before it.
    (tmp_path / "tracker.json").unlink()
    assert [told[:2] for told in attempt(4, (5,)).told] == [("rl", step) for step in (1, 2, 3, 4, 5)]


def test_results_pictures_and_lists(tmp_path, recorder):
    run = evaluated_run(tmp_path / "run")
    tracker = open_tracker(TrackConfig(kind="wandb"), run, SETTINGS)
    told = tracker.backend.told
    send_results(tracker, run)
    tracker.close()
    summary, picture, (_, name, columns, rows), closed = told[2:]
    assert summary == ("summary", {"test/sft/ndcg@20": 0.25}) and picture == ("picture", "kl", "kl.png")
    assert name == "sampled_lists" and len(rows) == 6 and closed == "closed"
    first = dict(zip(columns, rows[0], strict=True))
    assert first["lines"].split("\n")[0] == "Heat (1995)" and first["ground truth"] == "Heat (1995)"
    assert (first["step"], first["conversation"], first["list"], first["reward"], first["hits"]) == (1, "a", 1, 1.0, 1)


def test_the_table_holds_the_last_groups_whole():
    assert [row[:3] for row in sampled_rows(ROWS, max_rows=5)] == [[1, "b", 1], [1, "b", 2], [5, "c", 1], [5, "c", 2]]


@pytest.mark.parametrize("when", ["__init__", "log", "summary", "picture", "table", "close"])
def test_a_tracker_that_fails_is_named_once_and_stops_nothing(tmp_path, recorder, monkeypatch, capsys, when):
    def fail(*_):
        raise OSError("no route\nto host")

    monkeypatch.setattr(Recorder, when, fail)
    run = evaluated_run(tmp_path / "run")
    tracker = open_tracker(TrackConfig(kind="wandb"), run, SETTINGS)
    log = MetricsLog(run / "rl" / "metrics.jsonl", resume_step=0, num_steps=2, title="x", tracker=tracker)
    log.write(2, {"reward/mean": 0.5})
    log.write(3, {"reward/mean": 0.5})
    log.close()
    send_results(tracker, run)
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("--track wandb: ") == 1 and "failed (no route to host)" in said and "goes on" in said
    assert len((run / "rl" / "metrics.jsonl").read_text().splitlines()) == 2
    monkeypatch.undo()
    monkeypatch.setitem(trackers.BACKENDS, "wandb", Recorder)
    monkeypatch.setattr(trackers, "check_tracker", lambda config: None)
    again = open_tracker(TrackConfig(kind="wandb"), run, SETTINGS)
    assert [told[1] for told in again.backend.told] == ([2, 3] if when in ("__init__", "log") else [])


def test_a_package_that_is_missing_is_an_error_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--track trackio: the package trackio is not installed; pip install trackio"):
        check_tracker(TrackConfig(kind="trackio"))
    check_tracker(TrackConfig())


# ----------------------------------------------------------------------------------------------------------------------
# The real ones, offline


def told_to(kind: str, run: Path) -> Path:
    """A run that a tracker is told, stopped and told the rest."""
    for last in (1, 3):
        tracker = open_tracker(TrackConfig(kind=kind, project="films", offline=True), run, SETTINGS)
        assert tracker.backend is not None
        for step in range(2, last + 1):
            tracker.log("rl", step, {"reward/mean": step / 10})
        if last == 3:
            send_results(tracker, run)
        tracker.close()
    return run


def wandb_records(path: Path) -> list:
    """The records of a .wandb file, which is a leveldb log of protobuf messages behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, records, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if (room := -place % 32768) < 7:  # a header is not split over blocks
            place += room
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if place + 7 + length > len(data):
            break  # still being written
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def whole_wandb_file(path: Path) -> list:
    """The records of a finished run: `finish` returns before wandb's own process has written the last of them."""
    deadline = time.monotonic() + 60
    while not (records := wandb_records(path)) or not records[-1].HasField("exit"):
        assert time.monotonic() < deadline, f"{path} was never complete"
        time.sleep(0.1)
    return records


def test_wandb_offline_is_read_back(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb, of the extra dev")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = told_to("wandb", evaluated_run(tmp_path / "run"))
    folders = sorted((run / "wandb").glob("offline-run-*"))
    ids = {folder.name.rpartition("-")[2] for folder in folders}
    assert len(folders) == 2 and ids == {json.loads((run / "tracker.json").read_text())["wandb"]["id"]}
    records = [record for folder in folders for record in whole_wandb_file(next(folder.glob("*.wandb")))]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    rewards = {row["rl/step"]: row["rl/reward/mean"] for row in rows if "rl/reward/mean" in row}
    assert rewards == {1: 0.5, 2: 0.2, 3: 0.3}
    config = {item.key: item.value_json for record in records for item in record.run.config.update}
    assert json.loads(config["model.name"]) == "tiny" and {record.run.project for record in records} <= {"films", ""}
    summary = {item.key: item.value_json for record in records for item in record.summary.update}
    summary |= {"/".join(item.nested_key): item.value_json for record in records for item in record.summary.update}
    assert json.loads(summary["test/sft/ndcg@20"]) == 0.25
    assert len(list((run / "wandb").rglob("kl_*.png"))) == 1
    (table,) = (run / "wandb").rglob("sampled_lists_*.table.json")
    assert len(json.loads(table.read_text())["data"]) == 6


@pytest.mark.slow
def test_trackio_is_read_back(tmp_path):
    pytest.importorskip("trackio", reason="needs trackio, of the extra dev")
    run = evaluated_run(tmp_path / "run")
    # trackio reads TRACKIO_DIR when it is imported.
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom test_trackers import told_to\n"
        "told_to('trackio', Path(sys.argv[1]))\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "names = SQLiteStorage.get_runs('films')\n"
        "rows = [SQLiteStorage.get_logs('films', name) for name in names]\n"
        "print('READ' + json.dumps([names, rows]))\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(run)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    names, (rows,) = json.loads(done.stdout.partition("READ")[2])
    assert names == ["run-" + json.loads((run / "tracker.json").read_text())["trackio"]["id"]]
    rewards = {row["rl/step"]: row["rl/reward/mean"] for row in rows if "rl/reward/mean" in row}
    assert rewards == {1: 0.5, 2: 0.2, 3: 0.3}
    flat = {key: value for row in rows for key, value in row.items()}
    assert flat["summary/test/sft/ndcg@20"] == 0.25 and flat["pictures/kl"]["_type"] == "trackio.image"
    assert len(flat["sampled_lists"]["_value"]) == 6


def test_tensorboard_is_read_back(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, of the extra dev")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = told_to("tensorboard", evaluated_run(tmp_path / "run"))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    points = [(event.step, round(event.value, 6)) for event in events.Scalars("rl/reward/mean")]
    assert points == [(1, 0.5), (2, 0.2), (3, 0.3)]
    assert events.Scalars("summary/test/sft/ndcg@20")[0].value == 0.25
    assert (events.Images("pictures/kl")[0].width, events.Images("pictures/kl")[0].height) == (4, 3)
    texts = {name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
             for name in ("configuration", "sampled_lists")}  # fmt: skip
    assert "rl.lr = 1e-05" in texts["configuration"] and "Heat (1995)<br>" in texts["sampled_lists"]


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


BROKEN = """
import sys
from rankgrpo.runtime import trackers

class Broken(trackers.TensorboardBackend):
    def __init__(self, *_): pass
    def log(self, phase, step, metrics):
        if (phase, step) == ("rl", 1): raise ConnectionError("the server is gone")

if sys.argv.pop(1) == "broken":
    trackers.BACKENDS["tensorboard"] = Broken
from rankgrpo.cli import main
main()
"""


@pytest.mark.slow
def test_a_run_with_a_tracker_that_dies_and_comes_back(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard, of the extra dev")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "program.py").write_text(BROKEN)
    run = tmp_path / "run"

    def start(kind, *options):
        command = [sys.executable, "program.py", kind, "run", "--run-dir", str(run), *options, "--set", *WORDS]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done

    done = start("broken", "--track", "tensorboard")
    assert done.stderr.count("log failed (the server is gone); the run goes on") == 1
    assert (run / "report.html").is_file() and not (run / "tensorboard").exists()
    start("whole", "--track", "tensorboard")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [json.loads(line) for line in (run / "rl" / "metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], pytest.approx(row["reward/mean"])) for row in logged if "reward/mean" in row]
    assert [(event.step, event.value) for event in events.Scalars("rl/reward/mean")] == expected
    assert "pictures/reward_by_rank" in events.Tags()["images"]
    assert "sampled_lists/text_summary" in events.Tags()["tensors"]
