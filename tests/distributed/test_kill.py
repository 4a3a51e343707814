"""Two workers under torchrun: whichever process is killed, the same command ends as if nothing had been."""

from pathlib import Path

import pytest
from processes import finish, launch


@pytest.mark.slow
def test_a_worker_or_the_parent_killed_changes_nothing():
    finish(launch(str(Path(__file__).with_name("kills.py"))))
