"""Start the scenarios of scenarios.py under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def environment(**extra: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | extra


def launch(num_processes: int, scenario: str, folder: Path) -> None:
    """Run a function of scenarios.py in `num_processes` processes; it gets `folder`. Fails with their output."""
    command = [*TORCHRUN, "--nproc-per-node", str(num_processes), str(Path(__file__).with_name("scenarios.py"))]
    done = subprocess.run(
        [*command, scenario, str(folder)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
