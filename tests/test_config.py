import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankgrpo.config import (
    PARTS,
    AdapterConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ParallelConfig,
    RlConfig,
    TeacherConfig,
    with_steps,
)
from rankgrpo.config_file import changed_keys, flatten, load_config, own_keys, presets_dir, to_toml
from rankgrpo.data.prompt import open_prompt
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


def test_overrides_win_over_the_file_and_direct_keys_over_both(tmp_path):
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
def test_bad_overrides_name_the_key(word, message):
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


# ----------------------------------------------------------------------------------------------------------------------
# Sections made in Python


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RlConfig(clip_low=2), "rl.clip_low: must be at most 1, got 2"),
        (lambda: RlConfig(kl_coef=-1), "rl.kl_coef: must not be negative, got -1"),
        (lambda: RlConfig(lr=True), "rl.lr must be float, got True"),
        (lambda: RlConfig(vllm_sleep=3), "rl.vllm_sleep must be one of 0, 1, 2, got 3"),
        (lambda: RlConfig(betas=(0.9, True)), r"rl.betas must be a list of 2 numbers, got (0.9, True)"),
        (lambda: RlConfig(reward="relevanse"), "rl.reward: unknown part 'relevanse'"),
        (lambda: RlConfig(speed=1), "unknown key 'rl.speed'; known keys are rl.num_steps, rl.num_epochs"),
        (lambda: dataclasses.replace(RlConfig(), gamma=1.0), "rl.gamma: must be above 1, got 1.0"),
        (lambda: ModelConfig(kv_heads=3), "model.kv_heads: must divide model.heads = 4"),
        (lambda: AdapterConfig("lora", targets="q_proj,"), "adapter.targets: must be linear, or names"),
        (lambda: EvalConfig(draws=2), "eval.draws: above 1 needs eval.temperature > 0"),
        (lambda: AdapterConfig("qlora"), "adapter.kind must be one of 'none', 'lora', 'dora', got 'qlora'"),
        (lambda: ParallelConfig("none", True), "parallel.cpu_offload: needs a split model"),
        (lambda: Config(seed="3407"), "seed must be int, got '3407'"),
        (lambda: Config(sead=1), "unknown key 'sead'; known keys are seed, model"),
        (lambda: Config(rl=DataConfig()), "rl must be RlConfig, got DataConfig(path='demo'"),
        (lambda: ParallelConfig("full", True, 3), "parallel.argument 3: Unexpected positional argument, got 3"),
    ],
)
def test_a_section_made_in_python_is_checked_too(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_configuration_is_a_value():
    config = Config(rl=RlConfig(lr=1, betas=[0.5, 1]), data=DataConfig(path=2510))
    assert config.rl.lr == 1.0 and isinstance(config.rl.lr, float)
    assert (config.rl.betas, config.data.path) == ((0.5, 1.0), "2510")
    again = pickle.loads(pickle.dumps(config))
    assert again == config and hash(again) == hash(config) and config != Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rl.lr = 2.0


def test_reading_the_settings_needs_no_torch():
    code = "import rankgrpo.config_file, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ----------------------------------------------------------------------------------------------------------------------
# What a message says


def test_all_faults_are_told_at_once_each_with_its_source(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(
        "lr = 3\n[rl]\nlr = -1\nunit = 'item'\n[sft]\nlr = 1e-4\n[evil]\nsplit = 'test'\n[model]\nheads = 3\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["rl.gamma=0", "sft.lr=x", "rl.reward=hits"])
    sections = "adapter, data, eval, model, parallel, rl, seed, sft, teacher, track"
    parts = f"{', '.join(PARTS)}, or your own function, package.module:function"
    assert str(caught.value).splitlines() == [
        f"{path}: unknown key 'lr'; known keys are {sections}",
        f"{path}: unknown key 'evil.split'; known keys are {sections}",
        f"model.kv_heads: must divide model.heads = 3 ({path})",
        "override 'sft.lr=x': sft.lr must be float, got 'x'",
        f"{path}: rl.unit must be one of 'rank', 'token', 'list', got 'item'",
        "rl.gamma: must be above 1, got 0 (override 'rl.gamma=0')",
        f"rl.reward: unknown part 'hits'; parts are {parts} (override 'rl.reward=hits')",
        f"rl.lr: must be positive, got -1 ({path})",
    ]


def test_settings_that_are_no_tables_and_tables_that_are_no_settings(tmp_path):
    path = tmp_path / "bad.toml"
    for text, key in (("rl = 3", "rl"), ("[seed]\nx = 1", "seed.x"), ("[rl.lr]\nx = 1", "rl.lr must be float")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=key):
            load_config(path)


# ----------------------------------------------------------------------------------------------------------------------
# Settings that nothing reads


@pytest.mark.parametrize(
    ("overrides", "key", "owner"),
    [
        (
            ["model.name=qwen2.5-0.5b", "model.layers=3"],
            "model.layers",
            "model.name = tiny only, and model.name is 'qwen",
        ),
        (["model.name=some/folder", "model.vocab=99"], "model.vocab", "model.name = tiny only"),
        (["rl.gamma=3"], "rl.gamma", "rl.returns = exp only, and rl.returns is 'exp_inf'"),
        (["rl.schedule=cosine", "rl.second_phase_lr=1e-5"], "rl.second_phase_lr", "rl.schedule = two-phase only"),
        (
            ["rl.second_phase_at=0.9"],
            "rl.second_phase_at",
            "rl.schedule = two-phase only, and rl.schedule is 'constant'",
        ),
        (["rl.mismatch_cap=3"], "rl.mismatch_cap", "rl.mismatch_correction = truncate or mask only"),
        (["adapter.rank=8"], "adapter.rank", "adapter.kind = lora or dora only, and adapter.kind is 'none'"),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(overrides, key, owner):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    assert str(caught.value).startswith(f"{key}: is read with {owner}")
    assert str(caught.value).endswith(f"(override {overrides[-1]!r})")


def test_a_file_with_sizes_is_refused_for_another_model(tmp_path):
    with pytest.raises(ConfigError, match=r"^model.ffn: is read with model.name = tiny only.*tiny.toml\)$"):
        load_config(presets_dir() / "tiny.toml", model__name="qwen2.5-0.5b")
    path = tmp_path / "run.toml"
    path.write_text("[model]\nname = 'qwen2.5-0.5b'\nlayers = 4\nffn = 768\n[rl]\ngamma = 2\n")
    assert load_config(path).model == ModelConfig("qwen2.5-0.5b")  # at their defaults, as a run's own copy has them
    assert load_config(None, ["rl.returns=exp", "rl.gamma=3", "adapter.kind=lora", "adapter.rank=2"]).rl.gamma == 3.0


def test_a_setting_that_nothing_reads_is_no_difference():
    saved = Config()
    other = dataclasses.replace(saved, rl=dataclasses.replace(saved.rl, gamma=3.0))
    assert changed_keys(saved, other) == [] == list(own_keys(other))
    exp = dataclasses.replace(saved, rl=dataclasses.replace(saved.rl, returns="exp", gamma=3.0))
    assert changed_keys(other, exp) == ["rl.returns: 'exp_inf' -> 'exp'"]
    assert own_keys(exp) == {"rl.returns": "exp", "rl.gamma": 3.0}


# ----------------------------------------------------------------------------------------------------------------------
# On disk and back

FINITE = st.floats(allow_nan=False, allow_subnormal=False)
# No subnormal ones: a library that another test loads may have switched them off for the process.
POSITIVE = st.floats(min_value=sys.float_info.min, allow_nan=False, allow_subnormal=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    seed=st.integers(),
    texts=st.tuples(TEXT, TEXT, TEXT),
    rates=st.tuples(POSITIVE, POSITIVE),
    betas=st.tuples(FINITE, FINITE),
    penalty=FINITE,
    is_on=st.booleans(),
    sleep=st.sampled_from([0, 1, 2]),
)
def test_every_configuration_reads_back_equal(tmp_path_factory, seed, texts, rates, betas, penalty, is_on, sleep):
    rl = RlConfig(lr=rates[0], betas=betas, overflow_penalty=penalty, scale_by_std=is_on, vllm_sleep=sleep)
    config = Config(
        seed=seed,
        model=ModelConfig(name=texts[0]),
        data=DataConfig(path=texts[1]),
        teacher=TeacherConfig(demonstrations=texts[2], l2=rates[1]),
        rl=rl,
    )
    path = tmp_path_factory.mktemp("toml") / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_a_run_of_an_older_version_is_read():
    """The file is what to_toml wrote before tomli_w did, with settings that its model does not read."""
    path = Path(__file__).parent / "config_of_an_old_run.toml"
    config = load_config(path, saved=True)
    tiny = load_config(presets_dir() / "tiny.toml", ["seed=7", 'data.path=C:\\odd "name"', "rl.constrain=none"])
    assert config == dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, name="runs/x/sft/final"),
        rl=dataclasses.replace(tiny.rl, second_phase_lr=2.0),
    )
    assert config.rl.adam_eps == 1e-06 and config.rl.betas == (0.9, 0.99)
    with pytest.raises(ConfigError, match="override 'rl.gamma=3'"):
        load_config(path, ["rl.gamma=3"], saved=True)  # what was not read stays, and nothing is added


def test_a_run_keeps_the_text_of_its_prompt(tmp_path):
    file, saved = tmp_path / "prompt.txt", tmp_path / "config.toml"
    text = "Books,\u2028'quoted' \"twice\" \\ and 本:\n\n  {context}\n"
    file.write_text(text, encoding="utf-8")
    config = load_config(None, [f"data.prompt={file}"])
    saved.write_text(to_toml(config), encoding="utf-8")
    kept = load_config(saved, saved=True)
    assert kept.data.prompt == text and open_prompt(kept.data).template == text == open_prompt(config.data).template
    assert changed_keys(kept, config) == []
    file.write_text("Songs: {context}", encoding="utf-8")
    assert changed_keys(kept, config) == [f"data.prompt: {text!r} -> 'Songs: {{context}}'"]
    file.unlink()
    assert open_prompt(kept.data).template == text
    with pytest.raises(ConfigError, match="prompt.txt: no such file"):
        changed_keys(kept, config)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff{context}", "not UTF-8 at byte 0"), (b"no place", "prompt.txt: the template needs {context}")],
)
def test_a_file_that_holds_no_prompt_is_an_error(tmp_path, content, message):
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_prompt(load_config(None, [f"data.prompt={file}"]).data)
