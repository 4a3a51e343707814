"""Runs that learn nothing or come apart: rules on rows written by hand, then real short runs."""

from dataclasses import replace

import pytest
from tiny_world import ALONE, taught_dataset, tiny_config, tiny_dataset, tiny_demonstrations

from rankgrpo.config import Config
from rankgrpo.config_file import to_toml
from rankgrpo.errors import TrainingError
from rankgrpo.evaluation.validate import recommend_lists
from rankgrpo.model.constraint import hold_to_catalog
from rankgrpo.model.policy import open_policy
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.report.build import _trouble_notes
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.runtime.trouble import find_troubles
from rankgrpo.sampler.choose import ready_sampler
from rankgrpo.sft import train_sft
from rankgrpo.train import train

GOOD = {"policy/entropy": 0.5, "list/finished_frac": 1.0, "reward/zero_std_frac": 0.9, "reward/mean": 0.1}


def rows_of(values, first=None):
    start = {"step": 0, "eval/ndcg@20": 0.10, "eval/se_ndcg@20": 0.005} | (first or {})
    return [start, *({"step": step, **GOOD, **row} for step, row in enumerate(values, 1))]


def kinds(rows, config=None):
    return [(trouble.kind, trouble.step) for trouble in find_troubles(rows, config or Config())]


def test_a_run_that_learns_has_no_trouble():
    assert kinds(rows_of([{}] * 9 + [{"eval/ndcg@20": 0.09, "eval/se_ndcg@20": 0.005}])) == []


@pytest.mark.parametrize(
    ("row", "almost", "kind"),
    [
        ({"reward/zero_std_frac": 1.0}, {"reward/zero_std_frac": 0.99}, "flat"),
        ({"list/finished_frac": 0.1}, {"list/finished_frac": 0.11}, "cut"),
        ({"policy/entropy": 0.009}, {"policy/entropy": 0.011}, "collapsed"),
    ],
)
def test_five_steps_in_a_row_show_it_once(row, almost, kind):
    assert kinds(rows_of([row] * 4 + [almost] + [row] * 4)) == []
    assert kinds(rows_of([almost] * 2 + [row] * 9)) == [(kind, 7)]
    assert kinds(rows_of([row] * 5)[1:]) == [(kind, 5)]


def test_the_cause_is_told_not_what_follows_from_it():
    cut = {"list/finished_frac": 0.0, "reward/zero_std_frac": 1.0}
    assert kinds(rows_of([cut] * 5)) == [("cut", 5)]
    held = Config(rl=replace(Config().rl, constrain="catalog"))
    steps = [{"policy/entropy": 0.001, "policy/entropy_a_choice": 0.3}] * 5  # most tokens are forced
    assert kinds(rows_of(steps), held) == []


def test_validation_must_fall_below_half_and_beyond_its_noise():
    def after(ndcg, error, start=0.10, start_error=0.005):
        rows = rows_of([{"eval/ndcg@20": ndcg, "eval/se_ndcg@20": error}])
        rows[0] |= {"eval/ndcg@20": start, "eval/se_ndcg@20": start_error}
        return kinds(rows)

    assert after(0.049, 0.005) == [("fallen", 1)]
    assert after(0.051, 0.005) == []
    assert after(0.04, 0.03) == []  # 0.06 lower, 2 * sqrt(0.03^2 + 0.005^2) = 0.0608
    assert after(0.0, 0.0, start=0.0, start_error=0.0) == []


def test_a_trouble_names_setting_and_value():
    (cut,) = find_troubles(rows_of([{"list/finished_frac": 0.0}] * 5), Config())
    assert str(cut) == (
        "RL step 5: nearly all lists are cut: at most 0% reached their end within rl.max_new_tokens = 256 for 5 steps; "
        "try rl.max_new_tokens=512 in a new run folder"
    )


# ----------------------------------------------------------------------------------------------------------------------
# Real runs


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm")
    config = tiny_config("sft.num_steps=20", "sft.eval_every=20")
    size = config.model
    tiny = TinyConfig.of(size)
    init = make_init("tiny", taught_dataset(), folder / "init", seed=0, tiny=tiny)
    return train_sft(config, tiny_dataset(), tiny_demonstrations(), init, folder / "sft", ALONE)


def what_it_lists(start, dataset, config):
    """The data set in which validation wants what the model lists, and training half of the catalog."""
    policy = hold_to_catalog(open_policy(start, config.model, ALONE.device, trainable=False), config, dataset.catalog)
    with ready_sampler(policy, config, ALONE) as sampler:
        texts = recommend_lists(policy, sampler, dataset.validation, dataset.catalog, config)
    listed = [tuple((item.title, item.year) for item in dataset.catalog.parse(text)) for text in texts]
    validation = [replace(s, groundtruth=items) for s, items in zip(dataset.validation, listed, strict=True)]
    half = tuple((item.title, item.year) for item in dataset.catalog.items[::2])
    return replace(dataset, validation=validation, train=[replace(s, groundtruth=half) for s in dataset.train])


REAL = {
    "flat": (["rl.reward=length", "rl.constrain=catalog"], r"rl.reward=relevance"),
    "cut": (["rl.max_new_tokens=1"], r"rl.max_new_tokens=2"),
    "collapsed": (["rl.temperature=1e-5", "rl.constrain=catalog"], r"rl.lr=0.00025 and rl.temperature=1.0"),
}


@pytest.mark.parametrize("kind", REAL)
def test_a_real_run_says_so_on_the_screen_and_in_the_report(kind, warm, tmp_path, capsys):
    words, remedy = REAL[kind]
    config = tiny_config(*words, "rl.num_steps=5", "rl.kl_coef=0", "rl.save_every=2", "rl.eval_every=5")
    train(config, tiny_dataset(), warm, tmp_path / "rl", ALONE)
    told = [line for line in capsys.readouterr().err.splitlines() if "warning: RL step 5" in line]
    assert len(told) == 1 and remedy in told[0]
    assert kinds(read_metrics(tmp_path / "rl" / "metrics.jsonl")[0], config) == [(kind, 5)]
    (tmp_path / "config.toml").write_text(to_toml(config))
    (note,) = _trouble_notes(tmp_path)
    assert remedy in note


def test_a_run_that_is_to_stop_stops_and_keeps_what_there_is(warm, tmp_path):
    config = tiny_config("rl.lr=0.3", "rl.kl_coef=0", "rl.eval_every=2", "rl.eval_samples=8", "rl.save_every=1",
                         "rl.constrain=catalog", "rl.stop_on_failure=true")  # fmt: skip
    dataset = what_it_lists(warm, tiny_dataset(), config)
    with pytest.raises(TrainingError, match=r"RL step \d: validation has fallen .* try rl.lr=0.075 .* are kept"):
        train(config, dataset, warm, tmp_path / "rl", ALONE)
    assert any((tmp_path / "rl" / "checkpoints").glob("step-*/state.json"))
    assert (tmp_path / "rl" / "best" / "model.safetensors").is_file() and not (tmp_path / "rl" / "final").exists()
