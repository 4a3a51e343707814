import os
import subprocess
import sys

import pytest

from rankgrpo import cli
from rankgrpo.cli import default_run_dir
from rankgrpo.errors import ConfigError
from rankgrpo.evaluation.compare import check_comparable, evaluate_models, list_sources
from rankgrpo.evaluation.run_folder import distinct_names


def command(*words, **settings):
    return subprocess.run(
        [sys.executable, "-m", "rankgrpo", *words], capture_output=True, text=True, timeout=120, check=False, **settings
    )


@pytest.mark.parametrize(
    "words",
    [
        *([], ["run"], ["distill"], ["evaluate"], ["recommend"], ["experiments"], ["plan"]),
        *(["data", "check"], ["data", "import"], ["data", "demo"]),
    ],
    ids=" ".join,
)
def test_help_has_examples(words):
    done = command(*words, "--help")
    assert done.returncode == 0
    assert "rankgrpo" in done.stdout and (
        not words or f"rankgrpo {' '.join(words)} " in done.stdout.partition("Try:")[2]
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--model", "tinny"], "unknown model 'tinny'. Presets: tiny, smollm2-135m, qwen2.5-0.5b"),
        (["run", "--set", "rl.speed=1"], "unknown key 'rl.speed'"),
        (["run", "--data", "no-such-folder"], "no-such-folder does not exist"),
        (["recommend", "hello"], "no such run; `make train`"),
        (["report", "runs/none"], "no such run folder"),
        (["evaluate", "nothing"], "unknown model"),
        (["evaluate", "popularity", "--set", "eval.draws=2"], "eval.draws: above 1 needs eval.temperature > 0"),
        (["experiments", "cpuu"], "no suite 'cpuu'"),
        (["evaluate", "popularity", "--num-samples", "-400"], "--num-samples must be at least 0, got -400"),
        (["evaluate", "popularity", "--lists", "0"], "--lists must be at least 1, got 0"),
        (["experiments", "cpu", "--jobs", "-1"], "--jobs must be at least 0, got -1"),
        (["plan", "tiny", "--num-train", "-3"], "--num-train must be at least 0, got -3"),
        (["data", "check", "demo", "--num-train", "-5"], "--num-train must be at least 0, got -5"),
        (["data", "demo", "runs/x", "--num-validation", "0"], "--num-validation must be at least 1, got 0"),
        (["data", "import", "table.csv", "runs/x", "--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_message(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rankgrpo", *words])
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with pytest.raises(SystemExit) as stopped:  # with a message as its code the status is 1
        cli.main()
    assert stopped.value.code.startswith("rankgrpo: ") and message in stopped.value.code
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_hub_model_without_network_says_how_to_give_a_path(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = command("run", "--model", "qwen2.5-0.5b", "--set", "data.num_train=40", cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert "MODEL=/path/to/folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("given", "expected"), [(None, "passive"), ("active", "active")])
def test_threads_wait_asleep_unless_the_user_says_how(given, expected, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(cli.app, "cli", lambda **_: None)
    cli.main()
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_run_folder_names():
    assert str(default_run_dir("tiny", "demo")) == "runs/tiny-demo"
    assert str(default_run_dir("models/mine", "../data/redial/")) == "runs/mine-redial"


def make_run(folder):
    (folder / "sft" / "final").mkdir(parents=True)
    (folder / "config.toml").write_text("")
    return folder


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two, other = (make_run(tmp_path / name) for name in ("y/1/run", "y/2/run", "y/2/other"))
    names = [source.name for source in list_sources(["y/1/run", str(two), str(other), "ease"], None)]
    assert names == ["1/run/sft", "2/run/sft", "other/sft", "ease"]
    monkeypatch.chdir(one)
    assert [source.name for source in list_sources([".", "../../2/run"], None)] == ["1/run/sft", "2/run/sft"]
    with pytest.raises(ConfigError, match="two of the models to evaluate are called run/sft; name every model once"):
        list_sources([".", str(one)], None)
    with pytest.raises(ConfigError, match="are called ease"):
        list_sources(["ease", "popularity", "ease"], None)
    assert distinct_names([tmp_path / "a/x/run", tmp_path / "b/x/run", tmp_path / "x/run"]) == [
        "a/x/run", "b/x/run", f"{tmp_path.name}/x/run",
    ]  # fmt: skip


def test_results_of_two_models_never_share_a_file(tmp_path):
    runs = make_run(tmp_path / "a" / "b-run"), make_run(tmp_path / "c" / "b-run"), make_run(tmp_path / "a-b-run")
    options = {"data": "demo", "split": "test", "num_samples": 2, "out": tmp_path / "out"}
    message = "--out: a/b-run/sft and a-b-run/sft would both be written as a-b-run-sft.json"
    with pytest.raises(ConfigError, match=message):
        evaluate_models([*map(str, runs)], **options)
    assert not (tmp_path / "out").exists()


def test_a_run_stands_for_its_models_on_one_data_set(tmp_path):
    run = tmp_path / "run"
    (run / "sft" / "final").mkdir(parents=True)
    (run / "config.toml").write_text("[data]\npath = 'elsewhere'\nnum_train = 9\n[rl]\nmax_new_tokens = 33\n")
    sft, ease = list_sources([str(run), "ease"], None)
    assert (sft.name, sft.location, ease.location) == ("run/sft", str(run / "sft" / "final"), "ease")
    assert sft.config.rl.max_new_tokens == 33
    assert sft.config.data == ease.config.data and ease.config.data.path == "elsewhere"
    assert {s.config.data.path for s in list_sources(["popularity", str(run)], "other")} == {"other"}
    sources = list_sources([str(run), "ease"], None, ["eval.temperature=0.5", "eval.draws=3"])
    assert [(s.config.eval.draws, s.config.eval.temperature) for s in sources] == [(3, 0.5), (3, 0.5)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").write_text("")
    with pytest.raises(ConfigError, match="no model yet"):
        list_sources([str(tmp_path / "empty")], None)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        list_sources([], None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            '[data]\nitem = "{sid}"',
            "data.item is '{title} .{year}.' of a/sft and '{sid}' of b/sft, .* evaluate them apart",
        ),
        ('[data]\ngain = "exp2"', "data.gain is 'linear' of a/sft and 'exp2' of b/sft, .* give --set data.gain=NAME"),
        ("[rl]\nyear_tolerance = 1", "rl.year_tolerance is 0 of a/sft and 1 of b/sft"),
    ],
)
def test_runs_of_different_tasks_are_not_put_in_one_table(tmp_path, settings, message):
    for name, text in (("a", ""), ("b", settings)):
        (tmp_path / name / "sft" / "final").mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text(text + "\n")
        for file in ("meta.json", *(f"sft/final/{n}" for n in ("config.json", "model.safetensors", "tokenizer.json"))):
            (tmp_path / name / file).write_text("{}")
    runs = [str(tmp_path / "a"), "popularity", str(tmp_path / "b")]
    with pytest.raises(ConfigError, match=message):
        check_comparable(list_sources(runs, "demo"))
    if "item" in settings:
        with pytest.raises(ConfigError, match="of .*b/sft/final, which"):  # a model out of a run as well
            check_comparable(list_sources([runs[0], f"{runs[2]}/sft/final"], "demo"))
    else:
        check_comparable(list_sources(runs, "demo", ["data.gain=linear", "rl.year_tolerance=1"]))
