import pytest

from rankgrpo.errors import ConfigError
from rankgrpo.pipeline import keep_start


def test_a_run_goes_on_from_the_model_it_started_from(tmp_path):
    keep_start(tmp_path / "rl", "models/a")
    keep_start(tmp_path / "rl", "models/a")
    with pytest.raises(ConfigError, match="started from models/a, not from models/b"):
        keep_start(tmp_path / "rl", "models/b")
    with pytest.raises(ConfigError, match="started from models/a, not from the run's own warm start"):
        keep_start(tmp_path / "rl", None)


def test_a_run_of_its_own_warm_start_refuses_another_model(tmp_path):
    keep_start(tmp_path / "rl", None)
    keep_start(tmp_path / "rl", None)
    with pytest.raises(ConfigError, match="started from the run's own warm start, not from models/b"):
        keep_start(tmp_path / "rl", "models/b")
