"""Experiment trackers, for `--track`: Weights & Biases, trackio and TensorBoard.

metrics.jsonl remains the record of a run. A tracker gets a copy of its rows, the configuration, and when the run is
done the results, the report's pictures and sampled lists as a table. It belongs to one process, keeps its id over
resumes in RUN/tracker.json, and never stops a run: what fails is said once, and training goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rankgrpo.errors import ConfigError
from rankgrpo.files.atomic import write_lines
from rankgrpo.files.tracking import TrackConfig

Columns = Sequence[str]
Rows = Sequence[Sequence[Any]]


class Backend(Protocol):
    """What a tracker can be told."""

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None: ...
    def summary(self, values: Mapping[str, float]) -> None: ...
    def picture(self, name: str, path: Path) -> None: ...
    def table(self, name: str, columns: Columns, rows: Rows) -> None: ...
    def close(self) -> None: ...


class Tracker:
    """A backend that cannot stop the run, and is told every step once.

    A resumed run repeats the steps after its checkpoint; those that the backend has are not sent again.
    """

    def __init__(self, config: TrackConfig, run_dir: Path, settings: Mapping[str, Any]):
        self.kind, self.path = config.kind, run_dir / "tracker.json"
        state = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.state: dict[str, Any] = state
        self.own = state.setdefault(self.kind, {"id": secrets.token_hex(4), "logged": {}})
        self.backend: Backend | None = None
        self._try("start", lambda: self._open(config, run_dir, settings))

    def _open(self, config: TrackConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self.backend = BACKENDS[config.kind](config, run_dir, self.own["id"], settings)
        self._save()

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a row of a phase's metrics, unless it was sent before."""
        if step <= self.own["logged"].get(phase, -1):
            return
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float) and key != "step"}
        self._try("log", lambda: self.backend.log(phase, step, numbers))
        if self.backend is not None:
            self.own["logged"][phase] = step
            self._save()

    def summary(self, values: Mapping[str, float]) -> None:
        """Send results of the whole run."""
        self._try("summary", lambda: self.backend.summary(values))

    def picture(self, name: str, path: Path) -> None:
        """Send a PNG file."""
        self._try("picture", lambda: self.backend.picture(name, path))

    def table(self, name: str, columns: Columns, rows: Rows) -> None:
        """Send a table of text and numbers."""
        self._try("table", lambda: self.backend.table(name, columns, rows))

    def close(self) -> None:
        """Write what is not written yet."""
        self._try("close", lambda: self.backend.close())
        self.backend = None

    def _try(self, what: str, action) -> None:
        if self.backend is None and what != "start":
            return
        try:
            action()
        except Exception as error:  # whatever it is, it is not the run's
            self.backend = None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            print(
                f"> --track {self.kind}: {what} failed ({reason}); the run goes on without it, and metrics.jsonl has "
                f"every row. The same command with --track {self.kind} sends what is missing",
                file=sys.stderr,
                flush=True,
            )

    def _save(self) -> None:
        write_lines(self.path, [json.dumps(self.state)])


def check_tracker(config: TrackConfig) -> None:
    """Raise ConfigError when the tracker's package is not installed."""
    if config.kind != "none" and importlib.util.find_spec(config.kind) is None:
        raise ConfigError(
            f"--track {config.kind}: the package {config.kind} is not installed; pip install {config.kind}, or leave "
            f"--track out"
        )


def open_tracker(config: TrackConfig, run_dir: Path, settings: Mapping[str, Any]) -> Tracker | None:
    """The tracker of a run, told what the run's metrics files hold already; None for track.kind = none.

    settings: the run's configuration by dotted key. Raises ConfigError as `check_tracker`.
    """
    from rankgrpo.runtime.tracker import read_metrics

    check_tracker(config)
    if config.kind == "none":
        return None
    tracker = Tracker(config, run_dir, settings)
    for phase in ("sft", "rl"):
        path = run_dir / phase / "metrics.jsonl"
        for row in read_metrics(path)[0] if path.is_file() else ():
            tracker.log(phase, row["step"], row)
    return tracker


class WandbBackend:
    """Weights & Biases. Account, server and mode come from its own environment (WANDB_API_KEY, WANDB_BASE_URL,
    WANDB_MODE); track.offline writes to RUN/wandb alone, for `wandb sync`."""

    def __init__(self, config: TrackConfig, run_dir: Path, run_id: str, settings: Mapping[str, Any]):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=config.project,
            id=run_id,
            name=run_dir.resolve().name,
            dir=str(run_dir),
            config=dict(settings),
            resume="allow",
            mode="offline" if config.offline else None,
            settings=wandb.Settings(console="off"),
        )
        for phase in ("sft", "rl"):
            self.run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({f"{phase}/{key}": value for key, value in metrics.items()} | {f"{phase}/step": step})

    def summary(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def picture(self, name: str, path: Path) -> None:
        self.run.log({f"pictures/{name}": self.wandb.Image(str(path))})

    def table(self, name: str, columns: Columns, rows: Rows) -> None:
        self.run.log({name: self.wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self) -> None:
        self.run.finish()


class TrackioBackend:
    """trackio, which keeps runs in a local SQLite file (TRACKIO_DIR); `trackio show` is its page."""

    def __init__(self, config: TrackConfig, run_dir: Path, run_id: str, settings: Mapping[str, Any]):
        import trackio

        self.trackio = trackio
        quiet = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        name = f"{run_dir.resolve().name}-{run_id}"
        # trackio keeps what JSON can say.
        kept = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        trackio.init(project=config.project, name=name, config=kept, resume="allow", **quiet)

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        self.trackio.log({f"{phase}/{key}": value for key, value in metrics.items()} | {f"{phase}/step": step})

    def summary(self, values: Mapping[str, float]) -> None:
        self.trackio.log({f"summary/{key}": value for key, value in values.items()})

    def picture(self, name: str, path: Path) -> None:
        self.trackio.log({f"pictures/{name}": self.trackio.Image(str(path))})

    def table(self, name: str, columns: Columns, rows: Rows) -> None:
        self.trackio.log({name: self.trackio.Table(columns=list(columns), data=[list(row) for row in rows])})

    def close(self) -> None:
        self.trackio.finish()


class TensorboardBackend:
    """TensorBoard event files in RUN/tensorboard."""

    def __init__(self, config: TrackConfig, run_dir: Path, run_id: str, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"))
        text = "\n".join(f"    {key} = {value!r}" for key, value in settings.items())  # indented: Markdown's code
        self.writer.add_text("configuration", text)

    def log(self, phase: str, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self.writer.add_scalar(f"{phase}/{key}", value, step)

    def summary(self, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(f"summary/{key}", value)

    def picture(self, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self.writer.add_image(f"pictures/{name}", np.asarray(picture.convert("RGB")), dataformats="HWC")

    def table(self, name: str, columns: Columns, rows: Rows) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        text = [" | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line) for line in lines]
        self.writer.add_text(name, "\n".join(f"| {line} |" for line in text))

    def close(self) -> None:
        self.writer.close()


BACKENDS = {"wandb": WandbBackend, "trackio": TrackioBackend, "tensorboard": TensorboardBackend}
