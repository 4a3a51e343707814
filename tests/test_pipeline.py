import pytest
from tiny_world import tiny_config

from rankgrpo import pipeline
from rankgrpo.errors import ConfigError
from rankgrpo.pipeline import keep_start, run_pipeline


@pytest.mark.parametrize(
    ("autocast", "has_it", "warned"), [("bfloat16", False, True), ("bfloat16", True, False), ("none", False, False)]
)
def test_a_run_says_that_bfloat16_is_emulated(autocast, has_it, warned, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "has_bfloat16", lambda device: has_it)
    monkeypatch.setattr(pipeline, "teach", _stop)
    with pytest.raises(InterruptedError):
        run_pipeline(tiny_config(f"model.autocast={autocast}"), tmp_path / "run")
    assert ("emulates bfloat16" in capsys.readouterr().out) == warned


def _stop(*_):
    raise InterruptedError


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
