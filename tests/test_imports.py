import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"transformers", "vllm", "triton", "tokenizers", "rankgrpo_kernels"}


def modules_after(statement):
    """Names in sys.modules after a statement in a fresh interpreter, run from the root of the repository."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["loss", "advantage"])
def test_the_maths_costs_torch_alone(module):
    loaded = modules_after(f"import rankgrpo.{module}")
    assert not {name.split(".")[0] for name in loaded} & HEAVY
    assert {name for name in loaded if name.startswith("rankgrpo")} == {"rankgrpo", f"rankgrpo.{module}"}


@pytest.mark.parametrize("module", ["units", "reward", "metrics"])
def test_light_modules_stay_light(module):
    loaded = modules_after(f"import rankgrpo.{module}")
    assert not {name.split(".")[0] for name in loaded} & HEAVY


def test_the_package_itself_imports_nothing():
    loaded = modules_after("import rankgrpo; assert rankgrpo.__version__")
    assert "torch" not in loaded
    assert {name for name in loaded if name.startswith("rankgrpo")} == {"rankgrpo"}


def test_help_imports_no_torch():
    loaded = modules_after("import rankgrpo.cli as cli\ntry: cli.app.cli(args=['--help'])\nexcept SystemExit: pass")
    assert not {name.split(".")[0] for name in loaded} & {*HEAVY, "torch", "numpy"}


def test_recommend_imports_no_more_than_its_model_needs():
    # `triton` comes with transformers, whose flash attention imports torch's compiler.
    loaded = modules_after("import rankgrpo.evaluation.compare")
    unneeded = {"vllm", "peft", "matplotlib", "datasets", "rankgrpo_kernels"}
    assert not {name.split(".")[0] for name in loaded} & unneeded
