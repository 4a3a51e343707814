"""Memory of freed tensors is kept: seen in the pages that the kernel has to hand out again."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")

FAULTS = """
import resource, sys
import torch
from rankgrpo.files.malloc import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def fill():
    for _ in range(10):
        torch.empty(2**24).fill_(1)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def words_of(script: str, *arguments: str, **environment: str) -> list[str]:
    """What a script prints in a process whose malloc nobody else has set up."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.split()


def page_faults(word: str, **environment: str) -> tuple[str, int]:
    kept, faults = words_of(FAULTS, word, **environment)
    return kept, int(faults)


@pytest.mark.slow
def test_freed_memory_is_kept():
    kept, faults = page_faults("keep")
    assert kept == "True"
    assert 10 * faults < page_faults("default")[1]


HOLES = """
import torch
from rankgrpo.files.malloc import keep_freed_memory, return_freed_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
keep_freed_memory()
before = resident()
tensors = [torch.ones(2**18) for _ in range(400)]  # a MiB each
last = tensors[1::2]
del tensors
held = resident() - before
return_freed_memory()
print(held, resident() - before, sum(int(tensor.sum()) for tensor in last) == 200 * 2**18)
"""


@pytest.mark.slow
def test_holes_of_kept_memory_are_returned():
    held, left, whole = words_of(HOLES)
    assert int(held) > 390 and 190 < int(left) < 250 and whole == "True"


@pytest.mark.slow
def test_settings_of_the_user_stay():
    kept, faults = page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
    assert 2 * faults > page_faults("default")[1]


@pytest.mark.slow
def test_a_run_on_a_cpu_does_it():
    script = "from rankgrpo.runtime import distributed; distributed.keep_freed_memory = lambda: print('kept')\n"
    script += "print(distributed.start_parallel().device)"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["kept", "cpu"]
