"""Runs what a plan is missing, each run in a process of its own, and stops in time.

A run continues from its own checkpoints, so the whole suite may be killed at any moment and started again. What a run
prints goes to `log.txt` in its folder. A run that fails does not keep the others from running. The same command given
several times, on machines that share the folder of the runs too, shares the work: what another has begun is left to it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from rankgrpo.files.atomic import is_busy
from rankgrpo.suite.runs import PlannedRun, share_evaluations, steps_done

POLL_SECONDS, SHOW_SECONDS = 0.5, 10.0
GRACE_SECONDS = 60  # for a process to end after it was asked to


@dataclass
class Outcome:
    done: list[PlannedRun] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Title of a run -> the end of what it printed."""
    stopped: bool = False
    """Whether time ran out before everything had run."""


def run_missing(
    runs: list[PlannedRun], *, num_jobs: int, num_processes: int, max_minutes: float | None = None
) -> Outcome:
    """Run every incomplete run, at most `num_jobs` at once with `num_processes` processes each, and wait for those that
    are at work elsewhere.

    After `max_minutes`, and when this process is interrupted or terminated, those that run are stopped: they lose the
    steps since their last checkpoint.
    """
    deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else None
    waiting = [run for run in runs if not run.is_done]
    active: dict[str, tuple[PlannedRun, subprocess.Popen]] = {}
    outcome, shown = Outcome(), time.monotonic()
    done = len(runs) - len(waiting)
    with (
        _sigterm_as_exit(),
        tqdm(total=len(runs), initial=done, desc="suite", unit="run", dynamic_ncols=True) as bar,
    ):
        try:
            while waiting or active:
                if deadline is not None and time.monotonic() > deadline:
                    outcome.stopped = True
                    break
                _drop_done(waiting, bar)
                ready = [run for run in waiting if run.start is None or run.start.is_done]
                for run in ready:
                    if len(active) == num_jobs:
                        break
                    if is_busy(run.folder) or run.is_done:  # in this order: what ends in between is done
                        continue
                    waiting.remove(run)
                    bar.write(f"> {run.title}: {run.shell_command}")
                    at_once = min(num_jobs, len(active) + len(ready))
                    active[run.title] = (run, start_process(run, at_once, num_processes))
                for title, (run, process) in list(active.items()):
                    if process.poll() is not None:
                        del active[title]
                        if process.returncode != 0 and is_busy(run.folder):
                            waiting.append(run)  # another command was faster
                        else:
                            _note_end(run, process.returncode, outcome, bar)
                _drop_hopeless(waiting, outcome, bar)
                if time.monotonic() - shown > SHOW_SECONDS:
                    shown_runs = [run for run, _ in active.values()] or [run for run in waiting if is_busy(run.folder)]
                    bar.set_postfix_str(", ".join(f"{run.title} {steps_done(run)}" for run in shown_runs))
                    shown = time.monotonic()
                time.sleep(POLL_SECONDS)
        finally:
            stop_processes([process for _, process in active.values()])
    return outcome


def start_process(run: PlannedRun, at_once: int, num_processes: int) -> subprocess.Popen:
    """Begin or continue the run in processes of its own, beside `at_once` - 1 others."""
    run.folder.mkdir(parents=True, exist_ok=True)
    share_evaluations(run)
    threads = max(1, (os.cpu_count() or 1) // (at_once * num_processes))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    command = [*_launcher(num_processes), *run.command]
    with (run.folder / "log.txt").open("a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Leave by an exception when terminated: by default Python ends at once, and the runs would go on without it."""
    if threading.current_thread() is not threading.main_thread():  # only there a signal can be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_processes(processes: list[subprocess.Popen]) -> None:
    """Terminate, and kill what does not end. Not SIGINT: a process started in the background of a script ignores it."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _launcher(num_processes: int) -> list[str]:
    if num_processes == 1:
        return [sys.executable, "-m", "rankgrpo"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [sys.executable, *torchrun, "-m", "rankgrpo"]


def _drop_done(waiting: list[PlannedRun], bar: tqdm) -> None:
    """Drop what another command has completed meanwhile."""
    for run in [run for run in waiting if run.is_done]:
        waiting.remove(run)
        bar.write(f"> {run.title}: finished elsewhere")
        bar.update()


def _drop_hopeless(waiting: list[PlannedRun], outcome: Outcome, bar: tqdm) -> None:
    """Drop the runs for which what they start from failed, which cannot run."""
    for run in list(waiting):
        if run.start is not None and run.start.title in outcome.failed:
            waiting.remove(run)
            outcome.failed[run.title] = f"what it starts from, {run.start.title}, failed"
            bar.update()


def _note_end(run: PlannedRun, code: int, outcome: Outcome, bar: tqdm) -> None:
    if code == 0 and run.is_done:
        outcome.done.append(run)
        bar.write(f"> {run.title}: finished")
    else:
        outcome.failed[run.title] = f"exit status {code}; {run.folder / 'log.txt'} ends with\n{tail(run.folder)}"
        bar.write(f"> {run.title}: failed, {outcome.failed[run.title]}")
    bar.update()


def tail(folder: Path, num_lines: int = 5) -> str:
    """The last lines of a run's log, without what a progress bar has overwritten."""
    text = (folder / "log.txt").read_bytes().decode("utf-8", errors="replace")
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return "\n".join(f"    {line}" for line in [line for line in lines if line][-num_lines:])
