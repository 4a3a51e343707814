"""The rehearsal sees what it is for: misspelt arguments of calls that only a GPU makes, one at a time, are all caught.

Each is written into a copy of the sources, and the test of the rehearsal that should mind is run over the copy, in a
process of its own; it has to fail with a message that holds the misspelling, or the word that it takes the place of, so
that no other fault counts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_source

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
# File, what stands there, the word in it that is misspelt, and how; then the test that should mind.
REFERENCE, KERNELS = "training the_kernels_with_a_reference", "programs the_kernels_at_every_kind_of_input"
SPLIT, ENGINE = "training a_model_split_in_two", "vllm sampling_sync_sleep_and_wake"
MUTANTS = [
    ("rankgrpo/model/attention.py", "return_debug_mask=", "return_debug_mask", "return_debug_masks", REFERENCE),
    ("rankgrpo/model/attention.py", "device=query_NHE.device),\n        scale=scale", "scale=", "scaling=", REFERENCE),
    ("rankgrpo/logprob.py", "out_dtype=exact", "out_dtype", "out_type", "training without_the_kernels"),
    ("kernels/linear_logprob.py", '"num_warps": self', "num_warps", "num_warp_s", KERNELS),
    ("kernels/rank_ratio.py", "KL_IN_LOSS=", "KL_IN_LOSS", "KL_IN_THE_LOSS", KERNELS),
    (
        "kernels/bench/common.py", "reset_peak_memory_stats(", "memory_stats", "memory_statistics",
        "programs timing_and_memory_of_the_kernels_benchmarks",
    ),
    ("rankgrpo/runtime/distributed.py", "reduce_dtype=", "reduce_dtype", "reduce_type", SPLIT),
    ("rankgrpo/sampler/vllm.py", '"gpu_memory_utilization"', "utilization", "utilisation", ENGINE),
    ("rankgrpo/sampler/vllm.py", "sleep(level=", "level", "depth", ENGINE),
    (
        "rankgrpo/sampler/vllm_trie.py", "torch.cuda.Event()", "Event()", "Event(timing=True)",
        "vllm lists_held_to_the_catalog_by_slots",
    ),
]  # fmt: skip
HARMLESS = ("rankgrpo/logprob.py", "out_dtype=exact)", "exact)", "exact)  # out_type", "training without_the_kernels")
FOLDERS = {"rankgrpo": "rankgrpo", "kernels": "rankgrpo_kernels", "experiments": "rankgrpo_experiments"}


def run_copies(folder: Path, mutants: list[tuple]) -> list[str]:
    """What each mutant's test raised, empty when it passed."""
    for name, place in FOLDERS.items():
        shutil.copytree(ROOT / name, folder / place, ignore=shutil.ignore_patterns("__pycache__", "results"))
    jobs = []
    for file, stands, word, instead, test in mutants:
        first, _, rest = file.partition("/")
        path, (module, function) = folder / FOLDERS[first] / rest, test.split()
        text = path.read_text()
        assert stands in text and word in stands, f"{file} no longer has {stands!r}: misspell something else"
        wrong = text.replace(stands, stands.replace(word, instead))
        jobs.append([str(path), wrong, f"test_rehearse_{module}", f"test_{function}"])
    environment = os.environ | {"PYTHONPATH": f"{folder}:{HERE}:{HERE.parent}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "run_copies.py")],
        input=json.dumps(jobs), capture_output=True, text=True, env=environment, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_misspelt_arguments_are_caught(tmp_path):
    try:
        vllm_source.folder()
    except vllm_source.Unavailable as error:
        pytest.skip(str(error))
    raised = run_copies(tmp_path, [HARMLESS, *MUTANTS])
    assert raised[0] == "", f"a comment more is no fault, yet: {raised[0]}"
    for (file, _, word, instead, _), text in zip(MUTANTS, raised[1:], strict=True):
        misspelt = instead.strip("=").removeprefix("Event(").partition("=")[0]
        assert misspelt in text or word in text, (
            f"{file}: {instead!r} for {word!r} was not caught: {text or 'nothing was raised'}"
        )
