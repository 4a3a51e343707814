"""`pip install rankgrpo` beside the trainers that it plugs into: pip finds versions for both. Nothing is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    os.environ.get("PEER") != "resolve",
    reason="minutes of a package registry's time; `make test-peers` runs these tests",
)

ROOT = Path(__file__).parents[2]
# Their setup imports torch, so pip cannot read what they need without building them.
BUILT_FROM_SOURCE = ("deepspeed", "flash-attn", "transformers-stream-generator")
NO_NETWORK = ("NameResolutionError", "Connection", "ProxyError", "timed out", "No matching distribution")


def resolve(*requirements: str) -> dict[str, dict]:
    """Metadata of what pip would install into an empty environment, by name."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*pip, *requirements], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    if done.returncode and "ResolutionImpossible" not in done.stderr:
        if any(sign in done.stderr for sign in NO_NETWORK):
            pytest.skip(f"no package registry here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return {found["metadata"]["name"].lower(): found["metadata"] for found in json.loads(done.stdout)["install"]}


@pytest.mark.parametrize("peer", ["trl==1.16.*", "verl==0.9.1", "skyrl==0.3.0"])
def test_resolves_beside(peer):
    found = resolve(".", peer)
    assert {"rankgrpo", "torch", peer.partition("==")[0]} <= set(found)


def test_resolves_beside_openrlhf():
    (metadata,) = resolve("--no-deps", "openrlhf==0.11.*").values()
    wanted = [line for line in metadata["requires_dist"] if "extra ==" not in line]
    found = resolve(".", *(line for line in wanted if not line.startswith(BUILT_FROM_SOURCE)))
    assert found["transformers"]["version"] == "5.15.0" and "rankgrpo" in found


def test_the_pipeline_itself_does_not_resolve_beside_verl():
    """Why the base install is torch alone; fails when verl's range and that of [train] meet."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run([*pip, ".[train]", "verl==0.9.1"], cwd=ROOT, capture_output=True, text=True, timeout=1200)
    if not any(sign in done.stderr for sign in ("ResolutionImpossible", "conflicting dependencies")):
        if any(sign in done.stderr for sign in NO_NETWORK):
            pytest.skip(f"no package registry here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode != 0
