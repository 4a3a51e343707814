"""`make gpu-check` without a GPU: what it says there, what becomes of parts that fail, and a run at a small size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankgrpo_experiments.gpu_check import LIMITS, Part, check, headline, make_parts, run_part, write

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "gpu_check.py"
# What a machine with torch, transformers and triton alone does not have.
ABSENT = ("pydantic", "pydantic_core", "peft", "tyro", "tomli_w", "rapidfuzz", "matplotlib", "PIL", "pytest", "trl")
BARE = f"""
import importlib.util, sys
real = importlib.util.find_spec
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
def find_spec(name, package=None):
    return None if name.split(".")[0] in {ABSENT} else real(name, package)
sys.meta_path.insert(0, Absent())
importlib.util.find_spec = find_spec
"""


def run_bare(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Python without those packages, in the processes that it starts, too: `sitecustomize` is imported by each."""
    (folder / "sitecustomize.py").write_text(BARE)
    path = f"{folder}:{ROOT}:{ROOT / 'build/path'}"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def test_without_a_gpu_it_says_so_in_a_line(tmp_path, capsys):
    assert check("cuda", False, tmp_path / "out", list(LIMITS), 1.0) == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no NVIDIA GPU" in said and "--device cpu --small" in said
    assert not (tmp_path / "out").exists()


def test_limits_fit_into_eight_minutes():
    assert sum(LIMITS.values()) <= 480
    assert [part.name for part in make_parts("cuda", False, Path("out"))] == list(LIMITS)


def test_a_part_that_fails_or_takes_too_long_is_told(tmp_path):
    slow = run_part(Part("tests", ["-c", "import time; print('begun', flush=True); time.sleep(600)"]), 5)
    assert slow["state"] == "failed: not done after 5 s" and slow["output"] == "begun\n"
    result = tmp_path / "head.json"
    broken = run_part(Part("head", ["-c", "raise SystemExit('no memory')"], result), 60)
    assert broken["state"] == "failed with status 1" and headline(broken) == "no memory"
    absent = run_part(Part("rl_vllm", [], missing="vLLM is not installed"), 60)
    write(tmp_path, {"machine": "a GPU", "parts": [slow, broken, absent]})
    assert len(json.loads((tmp_path / "gpu-check.json").read_text())["parts"]) == 3
    assert [line.split()[0] for line in (tmp_path / "gpu-check.txt").read_text().splitlines()[2:]] == [
        "tests", "head", "rl_vllm",
    ]  # fmt: skip


def test_tests_run_without_pytest(tmp_path):
    (tmp_path / "test_it.py").write_text("""
import pytest
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(False, reason="")]
told = []

@pytest.fixture(autouse=True)
def value():
    told.append("made")
    yield 3
    told.append("closed")

@pytest.mark.parametrize("a", [1, 2])
@pytest.mark.parametrize("b", [10, 20])
def test_cases(value, a, b):
    assert value == 3 and a < b

def test_raises():
    assert told == ["made", "closed"] * 4 + ["made"]
    with pytest.raises(ValueError, match="no"):
        raise ValueError("no")

def test_wrong():
    with pytest.raises(ValueError):
        pass
""")
    done = run_bare(tmp_path, str(ROOT / "tests/gpu/plain_runner.py"), str(tmp_path))
    assert done.returncode == 1 and "no ValueError was raised" in done.stdout
    assert done.stdout.splitlines()[-1] == "5 passed, 1 failed, 0 skipped"


@pytest.mark.slow
def test_the_whole_at_a_small_size(tmp_path):
    """With torch, transformers and triton alone: every part but vLLM's passes, and leaves its result."""
    words = ("--device", "cpu", "--small", "--budget", "3000", "--out", str(tmp_path))
    done = run_bare(tmp_path, str(SCRIPT), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {one["part"]: one for one in json.loads((tmp_path / "gpu-check.json").read_text())["parts"]}
    assert parts.keys() == LIMITS.keys()
    assert {name: one["state"] for name, one in parts.items()} == dict.fromkeys(LIMITS, "passed") | {
        "rl_vllm": "left out"
    }
    assert parts["rl_hf"]["result"]["steps"] == 20
    assert "20 steps" in (tmp_path / "gpu-check.txt").read_text()
