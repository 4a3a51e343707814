"""Whole processes of the command line, alone or under torchrun, to be killed: used by the tests of resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny_world import WORDS

from rankgrpo.files.atomic import TEMPORARY

TESTS = Path(__file__).parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def launch(*words: str, num_processes: int = 1, cwd: Path | None = None) -> subprocess.Popen:
    """Start a Python file with its words, several processes under torchrun."""
    launcher = [*TORCHRUN, str(num_processes)] if num_processes > 1 else []
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *launcher, *words],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start(run: Path, *words: str, delay: float = 0.0, num_processes: int = 1) -> subprocess.Popen:
    """Start or continue the tiny run in `run`; every sync to disk takes `delay` seconds more."""
    program = str(TESTS / "slow_saves.py")
    command = [program, str(delay), "run", "--run-dir", str(run), "--set", *WORDS, *words]
    return launch(*command, num_processes=num_processes, cwd=run.parent)


def finish(process: subprocess.Popen, timeout_s: float = 900) -> str:
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen, reached: Callable[[], bool], timeout_s: float = 900) -> None:
    """SIGKILL once the moment is reached."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def children(process_id: int) -> list[int]:
    """Process ids of its children; of torchrun the workers by rank."""
    return sorted(map(int, Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()))


def gone(process_ids: list[int], patience_s: float = 10.0) -> bool:
    """Do all of these processes end within that time?"""
    deadline = time.monotonic() + patience_s
    while any(map(_alive, process_ids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rows(run: Path, phase: str) -> list[dict]:
    lines = (run / phase / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def num_rows(run: Path, phase: str) -> int:
    path = run / phase / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def being_saved(folder: Path) -> bool:
    return any(folder.glob(f"{TEMPORARY}*"))
