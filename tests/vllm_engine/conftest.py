"""These tests run in the environment of `make test-vllm`; elsewhere they are skipped."""

import sys
from pathlib import Path

import pytest

from rankgrpo.sampler.vllm import vllm_installed

sys.path.append(str(Path(__file__).parents[1]))  # tiny_world


def pytest_collection_modifyitems(items):
    if not vllm_installed():
        reason = "vLLM is not installed here; `make test-vllm` installs its CPU build and runs these tests"
        for item in items:
            if "tests/vllm_engine/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=reason))
