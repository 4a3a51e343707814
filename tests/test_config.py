import dataclasses

import pytest

from rankgrpo.config import Config, with_steps
from rankgrpo.config_file import changed_keys, flatten, load_config, presets_dir, to_toml
from rankgrpo.errors import ConfigError


def test_defaults_are_the_papers_settings_of_the_loss():
    rl = Config().rl
    assert (rl.clip_low, rl.clip_high, rl.kl_coef, rl.group_size) == (0.06, 0.08, 1e-3, 8)
    assert (rl.overflow_penalty, rl.early_eos_penalty, rl.full_list_bonus) == (-0.1, -0.1, 0.0)
    assert (rl.unit, rl.returns, rl.reduction, rl.updates_per_batch) == ("rank", "exp_inf", "rank", 1)


def test_toml_round_trip(tmp_path):
    config = load_config(
        None, ["rl.lr=3e-5", 'data.path=C:\\odd "name"', "rl.betas=[0.8, 0.99]", "rl.scale_by_std=false"]
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert load_config(path) == config
    assert config.rl.lr == 3e-5 and config.rl.betas == (0.8, 0.99) and config.rl.scale_by_std is False


def test_words_win_over_the_file_and_direct_keys_over_both(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("seed = 5\n[rl]\nlr = 1e-4\ngroup_size = 4\n[model]\nname = 'x'\n")
    config = load_config(path, ["rl.lr=1e-5"], model__name="tiny")
    assert (config.seed, config.rl.lr, config.rl.group_size, config.model.name) == (5, 1e-5, 4, "tiny")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rl.learning_rate=1", "unknown key 'rl.learning_rate'"),
        ("nothing.x=1", "known keys are"),
        ("rl.lr", "expected section.key=value"),
        ("rl.lr=fast", "rl.lr must be float"),
        ("rl.num_steps=1.5", "rl.num_steps must be int"),
        ("rl.num_steps=true", "rl.num_steps must be int"),
        ("rl.scale_by_std=1", "rl.scale_by_std must be bool"),
        ("rl.unit=item", "must be one of 'rank', 'token', 'list'"),
        ("rl.betas=[0.9]", "a list of 2 numbers"),
        ("rl.group_size=1", "rl.group_size"),
        ("rl.clip_low=0", "rl.clip_low"),
        ("teacher.num_folds=1", "teacher.num_folds"),
        ("model.kv_heads=3", "model.kv_heads"),
    ],
)
def test_bad_words_name_the_key(word, message):
    with pytest.raises(ConfigError, match="override|rl|teacher|model") as caught:
        load_config(None, [word])
    assert message in str(caught.value)


def test_bad_files_name_the_file(tmp_path):
    path = tmp_path / "bad.toml"
    for text in ("rl = [", "[rl]\nspeed = 1\n", "[rl]\nlr = 'x'\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="bad.toml"):
            load_config(path)
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "absent.toml")


def test_impossible_combination():
    with pytest.raises(ConfigError, match="rl.reduction"):
        load_config(None, ["rl.unit=token", "rl.reduction=token"])


def test_changed_keys_ignores_what_changes_no_result():
    saved = Config()
    same = dataclasses.replace(saved, rl=dataclasses.replace(saved.rl, save_every=7, keep_last=9))
    other = dataclasses.replace(saved, rl=dataclasses.replace(saved.rl, lr=1.0))
    assert changed_keys(saved, same) == []
    assert changed_keys(saved, other) == ["rl.lr: 1e-06 -> 1.0"]


@pytest.mark.parametrize("path", sorted(presets_dir().glob("*.toml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_is_named_after_its_model(path):
    config = load_config(path)
    assert config.model.name == path.stem
    assert set(flatten(config)) == set(flatten(Config()))


def test_presets_are_there():
    stems = {path.stem for path in presets_dir().glob("*.toml")}
    assert {"tiny", "smollm2-135m", "qwen2.5-0.5b", "llama3.2-1b", "llama3.2-3b"} <= stems


def test_epochs_become_steps():
    config = load_config(
        None, ["sft.num_epochs=2", "sft.batch_size=16", "teacher.short_requests=2", "rl.num_epochs=1.5"]
    )
    steps = with_steps(config, 1000)
    assert (steps.sft.num_steps, steps.rl.num_steps) == (375, 47)  # ceil(2*3000/16), ceil(1.5*1000/32)
    shared = with_steps(load_config(None, ["teacher.data_frac=0.25", "sft.num_epochs=2", "sft.batch_size=16"]), 1000)
    assert shared.sft.num_steps == 32  # ceil(2*250/16)
    given = with_steps(load_config(None, ["sft.num_steps=7", "rl.num_steps=9"]), 1000)
    assert (given.sft.num_steps, given.rl.num_steps) == (7, 9)
    assert with_steps(steps, 50) == steps
