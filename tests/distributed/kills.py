"""SIGKILL at chosen or at random moments: `python tests/distributed/kills.py --random 20 --overlap`.

Two workers train the tiny run with a split model under torchrun's agent; a worker or the agent is killed, the same
command goes on, and so forth. Whenever the run gets to its end, its metrics and scores must be those of the run that
was never killed, bit for bit. With --overlap each worker has a process that samples ahead, a step may take further
rounds and larger groups, and a tracker is told of it all. This process has imported everything and forks the agents and
workers, which would otherwise spend most of their time importing.
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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import being_saved, children, gone, num_rows, rows  # noqa: E402
from tiny_world import WORDS  # noqa: E402
from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: E402

import rankgrpo.pipeline  # noqa: E402, F401
from rankgrpo.cli import main  # noqa: E402
from rankgrpo.files.atomic import TEMPORARY  # noqa: E402
from rankgrpo.runtime.checkpoint import list_checkpoints  # noqa: E402

fsync = os.fsync
SETTINGS = [*WORDS, "parallel.shard=full"]
OVERLAP = [
    *("rl.overlap=true", "rl.lr=3e-3", "rl.mismatch_alarm=1e3", "rl.kl_coef=0", "rl.overflow_penalty=0"),
    *("rl.early_eos_penalty=0", "rl.live_groups=3", "rl.max_rounds=3", "rl.hard_group_size=5", "rl.constrain=catalog"),
    *("track.kind=wandb", "track.offline=true"),
]


def worker(words: list[str], delay: float) -> None:
    def slow_fsync(file) -> None:
        time.sleep(delay)
        fsync(file)

    os.fsync, sys.argv = slow_fsync, ["rankgrpo", *words]
    main()


def start(run: Path, delay: float = 0.0, max_restarts: int = 0) -> int:
    """Fork torchrun's agent, which forks two workers; returns its process id. Output is added to run.log.

    Every sync to disk takes `delay` seconds more.
    """
    if agent := os.fork():
        return agent
    status = 1
    try:
        log = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        config = LaunchConfig(
            1, 1, 2, run_id=uuid.uuid4().hex, rdzv_endpoint="localhost:0", rdzv_backend="c10d", start_method="fork",
            max_restarts=max_restarts, monitor_interval=0.1,
        )  # fmt: skip
        words = ["run", "--run-dir", str(run), "--set", *SETTINGS]
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


def assert_finishes(agent: int, run: Path) -> None:
    status = ended(agent, 1200)
    assert status == 0, f"status {status}:\n" + Path(f"{run}.log").read_text()


def wait_until(reached: Callable[[], bool], agent: int) -> None:
    while not reached():
        assert ended(agent, 0.01) is None, "the run ended before the moment to kill came"


def newest(run: Path) -> list[str]:
    """Name of the newest complete checkpoint of each phase; "" where there is none."""
    found = [list_checkpoints(run / phase / "checkpoints") for phase in ("sft", "rl")]
    return [paths[-1].name if paths else "" for paths in found]


def assert_same(run: Path, whole: Path) -> None:
    for phase in ("sft", "rl"):
        got, expected = rows(run, phase), rows(whole, phase)
        differing = [(a, b) for a, b in zip(got, expected, strict=False) if a != b]
        assert got == expected, f"{phase}: {len(got)} rows of {len(expected)}; the first that differ: {differing[:1]}"
    scores = Path("eval") / "test" / "rank-grpo.json"
    assert json.loads((run / scores).read_text()) == json.loads((whole / scores).read_text())
    assert not list(run.rglob(f"{TEMPORARY}*"))


def progress(run: Path) -> int:
    """Rows of metrics and evaluated models: 18 when the run has come to its end."""
    return num_rows(run, "sft") + num_rows(run, "rl") + len(list(run.glob("eval/*/*.json")))


def kill_at_chosen_moments(run: Path, whole: Path) -> None:
    """A worker between two checkpoints; torchrun itself in the middle of a save; a worker that torchrun restarts."""
    agent = start(run)
    wait_until(lambda: num_rows(run, "sft") >= 3, agent)
    assert kill(children(agent)[1], agent) != 0

    checkpoints = run / "rl" / "checkpoints"
    agent = start(run, delay=0.1)
    wait_until(lambda: bool(list_checkpoints(checkpoints)) and being_saved(checkpoints), agent)
    saved = newest(run)
    kill(agent, agent)
    assert newest(run) >= saved

    agent = start(run, max_restarts=1)
    wait_until(lambda: num_rows(run, "rl") >= 6, agent)
    os.kill(children(agent)[0], signal.SIGKILL)
    assert_finishes(agent, run)
    assert_same(run, whole)


def kill(victim: int, agent: int) -> int:
    """The agent's exit status after the kill; all that it started must end with it."""
    workers = children(agent)
    started = [*workers, *samplers(workers)]
    os.kill(victim, signal.SIGKILL)
    status = ended(agent, 600)
    assert status is not None, "torchrun outlived its worker"
    assert gone(started), "a worker, or what samples for it, outlived torchrun"
    return status


def samplers(workers: list[int]) -> list[int]:
    """The processes that sample ahead for these workers."""
    started = [process for worker in workers for process in children(worker)]
    return [one for one in started if b"rankgrpo.sampler.process" in Path(f"/proc/{one}/cmdline").read_bytes()]


def kill_at_random(run: Path, rng: random.Random) -> str:
    """One start, killed somewhere in its next five bits of progress unless it ends before; says which."""
    goal = progress(run) + rng.randint(0, 5)
    agent = start(run, rng.choice((0.0, 0.0, 0.05)))
    status = None
    while status is None and progress(run) < goal:
        status = ended(agent, 0.02)
    if status is None:
        status = ended(agent, rng.uniform(0.0, 3.0))
    if status is not None:
        assert status == 0, Path(f"{run}.log").read_text()
        return "finished"
    workers = children(agent)
    victims = {agent: "torchrun"} | dict.fromkeys(workers, "worker") | dict.fromkeys(samplers(workers), "sampler")
    victim = rng.choice(list(victims))
    kill(victim, agent)  # a run that had nothing more to sample ends well without its sampler
    return f"{victims[victim]} killed"


def kill_at_random_moments(num_kills: int, seed: int, run: Path, whole: Path) -> None:
    rng = random.Random(seed)
    kills = resumed = completed = 0
    while kills < num_kills:
        before = newest(run)
        what = kill_at_random(run, rng)
        after = newest(run)
        assert all(old <= new for old, new in zip(before, after, strict=True)), f"lost one: {before} -> {after}"
        if what == "finished":
            completed += 1
            assert_same(run, whole)
            shutil.rmtree(run)
            continue
        kills, resumed = kills + 1, resumed + any(before)
        so_far = f"{num_rows(run, 'sft')} + {num_rows(run, 'rl')} rows"
        print(f"{kills:3} {what}: {so_far}, newest checkpoints {before} -> {after}", flush=True)
    assert_finishes(start(run), run)
    assert_same(run, whole)
    print(f"{kills} kills, {resumed} of them after a resume; {completed + 1} runs came to their end, all equal")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0, metavar="KILLS", help="0: at the chosen moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overlap", action="store_true", help="with rl.overlap, rounds, larger groups and a tracker")
    arguments = parser.parse_args()
    SETTINGS += OVERLAP if arguments.overlap else []
    with tempfile.TemporaryDirectory() as temporary:
        run, whole = Path(temporary) / "run", Path(temporary) / "whole"
        assert_finishes(start(whole), whole)
        if arguments.random:
            kill_at_random_moments(arguments.random, arguments.seed, run, whole)
        else:
            kill_at_chosen_moments(run, whole)
