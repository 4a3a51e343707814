"""These tests run by themselves, as `make rehearse-gpu`: what they load must be there before PyTorch is."""

import os
import sys

import pytest

REHEARSES = os.environ.get("REHEARSE") == "1"

if REHEARSES:
    import cuda_only
    import fake_gpu

    if "torch" not in sys.modules:
        try:
            fake_gpu.load()
        except RuntimeError as error:
            pytest.exit(str(error), returncode=1)
    cuda_only.install()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    """What has been run is counted at the end."""
    items.sort(key=lambda item: "test_rehearse_what_runs" in item.nodeid)


def pytest_terminal_summary(terminalreporter):
    if REHEARSES and len({path for path, _, _ in cuda_only.run}) > 3:
        terminalreporter.write_line("")
        terminalreporter.write_line("\n".join(cuda_only.report(cuda_only.run)))
