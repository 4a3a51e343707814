"""How much of what runs on CUDA alone the rehearsal has run, and that docs/gpus.md names the rest."""

import re
from collections import Counter
from pathlib import Path

import cuda_only
import pytest
import vllm_source

PAGE = cuda_only.ROOT / "docs" / "gpus.md"
GOAL = 0.9


def documented() -> dict[tuple[str, str], int]:
    """(file, function) of the page's table of what no rehearsal reaches, and the number of its statements."""
    text = PAGE.read_text(encoding="utf-8").partition("### What it cannot reach")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (\d+) \|", text, flags=re.M)
    return {(file, function): int(number) for file, function, number in rows}


def test_most_of_it_is_run_and_the_rest_is_listed(request):
    modules = {item.path.name for item in request.session.items}
    others = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    if modules != others or request.config.getoption("keyword"):
        pytest.skip("it counts what the whole rehearsal runs, and a part of it was asked for")
    try:
        vllm_source.folder()
    except vllm_source.Unavailable as error:
        pytest.skip(str(error))
    found, device = cuda_only.everything()
    left = found.keys() - cuda_only.run
    assert 1 - len(left) / len(found) >= GOAL, "\n".join(cuda_only.report(cuda_only.run))
    counted = Counter((place[0], found[place]) for place in left)
    assert documented() == counted, "docs/gpus.md should say:\n" + "\n".join(
        f"| `{file}` | `{function}` | {number} |" for (file, function), number in sorted(counted.items())
    )
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{file}`" in text for file in device), f"docs/gpus.md should name {sorted(device)}"
