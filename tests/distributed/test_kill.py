"""Two workers under torchrun: whichever process is killed, the same command ends as if nothing had been."""

from pathlib import Path

import pytest
from processes import finish, launch


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--overlap", "--random", "1")], ids=["chosen", "overlap"])
def test_a_worker_or_the_parent_killed_changes_nothing(words):
    finish(launch(str(Path(__file__).with_name("kills.py")), *words))
