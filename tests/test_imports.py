import ast
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from rankgrpo.__main__ import MODULES

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


@cache
def packages_after(statement):
    """Top-level packages that a statement loads, without those of the standard library."""
    loaded = {name.split(".")[0] for name in modules_after(statement)}
    return {name for name in loaded if not name.startswith("_")} - sys.stdlib_module_names


SCRIPTS = [
    path.relative_to(ROOT).as_posix() for top in ("experiments", "kernels") for path in (ROOT / top).rglob("*.py")
]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_import_names_that_exist(script):
    """Benchmarks run in no test: what they import of the package must still be where they look for it."""
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("rankgrpo", "rankgrpo_kernels"):
            module = importlib.import_module(node.module)
            for name in node.names:
                found = hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}")
                assert found, f"line {node.lineno}: {node.module} has no {name.name}"


# What the base install has to serve: pyproject.toml asks for torch and nothing else.
BASE = ["loss", "units", "advantage", "parse", "reward", "logprob", "rollouts.mismatch"]


@pytest.mark.parametrize("module", BASE)
def test_the_base_install_is_torch_alone(module):
    assert packages_after(f"import rankgrpo.{module}") - packages_after("import torch") == {"rankgrpo"}


def extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"], project["optional-dependencies"]


def test_the_command_line_names_every_requirement_of_the_pipeline():
    base, optional = extras()
    assert [re.split(r"[<>=]", line)[0] for line in base] == ["torch"]
    module_of = {"tomli-w": "tomli_w", "pillow": "PIL"}
    names = [re.split(r"[<>=]", line)[0] for line in optional["train"]]
    assert [module_of.get(name, name) for name in names] == list(MODULES)


def test_the_command_line_without_the_pipeline_says_so_in_one_line():
    hidden = ("tyro", "peft")
    code = f"""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {hidden} else find(name, *rest)
from rankgrpo.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "rankgrpo: the command line needs tyro, peft: pip install 'rankgrpo[train]'\n"


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


def test_recommend_imports_no_transformers():
    loaded = modules_after("import rankgrpo.evaluation.recommend")
    unneeded = {"transformers", "vllm", "peft", "matplotlib", "datasets", "rankgrpo_kernels", "triton", "sympy"}
    assert not {name.split(".")[0] for name in loaded} & unneeded
    assert not {"torch._dynamo", "torch.distributed.tensor"} & loaded


def test_scores_import_no_more_than_a_model_needs():
    # `triton` comes with transformers, whose flash attention imports torch's compiler.
    loaded = modules_after("import rankgrpo.evaluation.compare")
    unneeded = {"vllm", "peft", "matplotlib", "datasets", "rankgrpo_kernels"}
    assert not {name.split(".")[0] for name in loaded} & unneeded
