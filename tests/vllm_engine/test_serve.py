"""An exported folder in vLLM's own server, on loopback: lists held to the catalog by a request's arguments."""

import json
import os
import sys
import urllib.request
from pathlib import Path

import pytest
from server import serve
from test_export import write_run
from tiny_world import tiny_dataset

from rankgrpo.report.export import export_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    # One head: vLLM's CPU attention knows head sizes from 32 on.
    out = export_run(write_run(folder / "run", "model.heads=1"), folder / "served")
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    words = ["--model", str(out), "--logits-processors", "rankgrpo.sampler.vllm_serve:RowCatalog"]
    with serve(words, folder, PYTHONPATH=path) as url:
        yield out, f"{url}/chat/completions"


def answer(url, request):
    body = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(body, timeout=300) as reply:
        (choice,) = json.loads(reply.read())["choices"]
    return choice["message"]["content"].split("\n"), choice["finish_reason"]


def test_lists_of_the_server_are_held_to_the_catalog(served):
    out, url = served
    catalog = tiny_dataset().catalog
    request = json.loads((out / "request.json").read_text()) | {"temperature": 1.0}
    for seed in range(4):
        lines, reason = answer(url, request | {"seed": seed})
        assert reason == "stop" and len(set(lines)) == 5 and set(lines) <= set(catalog.lines)
    free, _ = answer(url, {key: value for key, value in request.items() if key != "vllm_xargs"} | {"seed": 0})
    assert not set(free) <= set(catalog.lines)  # an untrained model, and a request that does not ask to be held
