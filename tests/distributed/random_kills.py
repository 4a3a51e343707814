"""SIGKILL at random moments: `python tests/distributed/random_kills.py --kills 20`, from the repository's environment.

Two workers train the tiny run with a split model under torchrun's agent; one worker or the agent is killed at a random
moment, the same command goes on, and so forth. Whenever the run gets to its end, its metrics and scores must be those
of the run that was never killed, bit for bit. This process has imported everything and forks the agents and workers,
which would otherwise spend most of their time importing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import children, gone, num_rows, rows  # noqa: E402
from tiny_world import WORDS  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

import rankgrpo.pipeline  # noqa: E402, F401
from rankgrpo.checkpoint import list_checkpoints  # noqa: E402
from rankgrpo.cli import main  # noqa: E402
from rankgrpo.files import TEMPORARY  # noqa: E402

fsync = os.fsync


def worker(words: list[str], delay: float) -> None:
    def slow_fsync(file) -> None:
        time.sleep(delay)
        fsync(file)

    os.fsync, sys.argv = slow_fsync, ["rankgrpo", *words]
    main()


def start(run: Path, delay: float) -> int:
    """Fork torchrun's agent, which forks two workers; returns its process id. Output is added to run.log."""
    if agent := os.fork():
        return agent
    status = 1
    try:
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        config = LaunchConfig(
            1, 1, 2, run_id=uuid.uuid4().hex, rdzv_endpoint="localhost:0", rdzv_backend="c10d", start_method="fork",
            max_restarts=0, monitor_interval=0.1,
        )  # fmt: skip
        words = ["run", "--run-dir", str(run), "--set", *WORDS, "parallel.shard=full"]
        elastic_launch(config, worker)(words, delay)
        status = 0
    finally:
        os._exit(status)


def ended(agent: int, patience_s: float) -> int | None:
    """The exit status of the agent, waited for; None while it works on."""
    deadline = time.monotonic() + patience_s
    while (found := os.waitpid(agent, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def finish(run: Path) -> None:
    status = ended(start(run, 0.0), 1200)
    assert status == 0, f"status {status}:\n" + Path(f"{run}.log").read_text()


def newest(run: Path) -> list[str]:
    """Name of the newest complete checkpoint of each phase; "" where there is none."""
    found = [list_checkpoints(run / phase / "checkpoints") for phase in ("sft", "rl")]
    return [paths[-1].name if paths else "" for paths in found]


def assert_same(run: Path, whole: Path) -> None:
    for phase in ("sft", "rl"):
        assert rows(run, phase) == rows(whole, phase), phase
    scores = Path("eval") / "test" / "rank-grpo.json"
    assert json.loads((run / scores).read_text()) == json.loads((whole / scores).read_text())
    assert not list(run.rglob(f"{TEMPORARY}*"))


def progress(run: Path) -> int:
    """Rows of metrics and evaluated models: 18 when the run has come to its end."""
    return num_rows(run, "sft") + num_rows(run, "rl") + len(list(run.glob("eval/*/*.json")))


def kill_at_random(run: Path, rng: random.Random) -> str:
    """One start, killed somewhere in its next five bits of progress unless it ends before; says which."""
    goal, delay = progress(run) + rng.randint(0, 5), rng.choice((0.0, 0.0, 0.05))
    agent = start(run, delay)
    status = None
    while status is None and progress(run) < goal:
        status = ended(agent, 0.02)
    if status is None:
        status = ended(agent, rng.uniform(0.0, 3.0))
    if status is not None:
        assert status == 0, Path(f"{run}.log").read_text()
        return "finished"
    workers = children(agent)
    victim = rng.choice([agent, *workers])
    os.kill(victim, signal.SIGKILL)
    assert ended(agent, 300) is not None, "torchrun outlived its worker"
    assert gone(workers), "workers outlived torchrun"
    return "torchrun killed" if victim == agent else "worker killed"


def run_kills(num_kills: int, seed: int, folder: Path) -> None:
    rng, whole, run = random.Random(seed), folder / "whole", folder / "run"
    finish(whole)
    kills = resumed = completed = 0
    while kills < num_kills:
        before = newest(run)
        what = kill_at_random(run, rng)
        after = newest(run)
        assert all(old <= new for old, new in zip(before, after, strict=True)), (
            f"a checkpoint was lost: {before} {after}"
        )
        if what == "finished":
            completed += 1
            assert_same(run, whole)
            shutil.rmtree(run)
            continue
        kills, resumed = kills + 1, resumed + any(before)
        rows = f"{num_rows(run, 'sft')} + {num_rows(run, 'rl')} rows"
        print(f"{kills:3} {what}: {rows}, newest checkpoints {before} -> {after}", flush=True)
    finish(run)
    assert_same(run, whole)
    print(
        f"{kills} kills, {resumed} of them in resumed runs, {completed + 1} runs came to their end, all of them equal"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run_kills(arguments.kills, arguments.seed, Path(temporary))
