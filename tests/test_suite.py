"""Suites: what is refused, what is missing, and the numbers of the tables from a folder made by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_evaluate import CATALOG, letters, sample

from rankgrpo.config import with_steps
from rankgrpo.config_file import presets_dir, to_toml
from rankgrpo.errors import ConfigError, ModelError
from rankgrpo.evaluation.diversity import describe_lists, write_diversity
from rankgrpo.evaluation.evaluate import score_completions, write_evaluation
from rankgrpo.files.atomic import write_lines
from rankgrpo.suite import page
from rankgrpo.suite.command import list_suite, open_suite, rebuild_page
from rankgrpo.suite.figures import FIGURES, draw_figures
from rankgrpo.suite.page import gains_table, read_paper, scores_table, stages_table, union_table
from rankgrpo.suite.results import read_results, write_results
from rankgrpo.suite.runs import choose_runs, plan_runs, share_evaluations
from rankgrpo.suite.spec import OWN_START, read_suite, suite_path

SUITE = """
title = "Toy"
models = ["tiny"]
seeds = [1, 2]
against = ["sft", "grpo"]
against_union = ["grpo"]
ablation = ["before", "sft", "mine"]
paper = { tiny = ["redial-0.5b"] }

[set.rl]
num_steps = 5

[[rows]]
name = "mine"
label = "Mine"
group = "All"
method = "rank-grpo"
set = { "rl.lr" = 0.5 }

[[rows]]
name = "sft"
label = "SFT"
stage = "sft"

[[rows]]
name = "grpo"
label = "GRPO"
group = "All"
method = "grpo"

[[rows]]
name = "zero"
method = "r1-zero"
start = "none"
seeds = [7]
"""


@pytest.fixture
def write(tmp_path):
    def write_suite(text: str = SUITE) -> Path:
        path = tmp_path / "toy.toml"
        path.write_text(text)
        return path

    return write_suite


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "Toy"', 'titel = "Toy"', r"toy.toml: unknown key 'titel'; known keys are title, about"),
        ('title = "Toy"', "", r"toy.toml: needs 'title'"),
        ("seeds = [1, 2]", 'seeds = ["1"]', r"toy.toml: seeds must be whole numbers, got \['1'\]"),
        ("seeds = [1, 2]", "seeds = 3", r"toy.toml: seeds must be a list, got 3"),
        ('label = "Mine"', 'lable = "Mine"', r"toy.toml: row mine: unknown key 'lable'; known keys are name, label"),
        ('name = "mine"\n', "", r"toy.toml: row 1: needs 'name'"),
        ('name = "mine"', 'name = "grpo"', r"two rows are named 'grpo'"),
        ('name = "mine"', 'name = "ease"', r"two rows are named 'ease' \(before, popularity and ease are always there"),
        ('method = "rank-grpo"', 'method = "rankgrpo"', r"row 'mine': unknown method 'rankgrpo'; methods are .*grpo"),
        ("num_steps = 5", "num_step = 5", r"unknown key 'rl.num_step'"),
        ('"rl.lr" = 0.5', '"rl.lr" = "fast"', r"row 'mine': override 'rl.lr=fast': rl.lr must be float"),
        ('stage = "sft"', 'stage = "dpo"', r"row sft: stage must be one of sft, rl, eval, got 'dpo'"),
        ('start = "none"', 'start = "mine"', r"row 'zero' starts from 'mine'; rows with stage = \"sft\" are sft"),
        (
            'label = "SFT"\nstage = "sft"',
            'stage = "eval"',
            r"row 'sft' scores the model of 'none'; rows that train .* mine",
        ),
        (
            'name = "zero"',
            'name = "zero"\nstage = "eval"',
            r"row zero: method: not of a row of stage eval",
        ),
        ('against = ["sft", "grpo"]', 'against = ["dpo"]', r"against names the row 'dpo'; rows are mine, sft, grpo"),
        ('name = "mine"', 'name = "start"', r"two rows are named 'start' .*and start is a word of its own"),
        ("paper = { tiny", "paper = { big", r"no such model 'big' in it; models are tiny"),
        ("[set.rl]", "[set.rl", r"toy.toml: not valid TOML"),
    ],
)
def test_mistakes_are_named(write, old, new, message):
    assert old in SUITE
    with pytest.raises(ConfigError, match=message):
        read_suite(write(SUITE.replace(old, new, 1)))


def test_an_unknown_suite_lists_those_there_are(tmp_path):
    with pytest.raises(
        ConfigError,
        match="no suite 'cpuu' in .*; there are cpu, gpu-hour, held, held-choices, more, office, office-bm25",
    ):
        suite_path("cpuu")
    with pytest.raises(ConfigError, match="none.toml: no such suite"):
        read_suite(tmp_path / "none.toml")


def test_overrides_of_the_command_win(write):
    suite = read_suite(write(), overrides=["rl.num_steps=9"])
    assert suite.row("mine").overrides == ("rl.num_steps=5", "rl.lr=0.5", "rl.num_steps=9")
    (run,) = [run for run in plan_runs(suite, "demo", Path("runs")) if run.folder.name == "mine-seed1"]
    assert (run.config.rl.num_steps, run.config.rl.lr, run.config.seed) == (9, 0.5, 1)


def test_a_model_may_have_settings_of_its_own(write):
    text = SUITE.replace('set = { "rl.lr" = 0.5 }', 'set = { "rl.lr" = 0.5 }\nmodel_set.tiny = { "rl.lr" = 0.25 }')
    suite = read_suite(write(text))
    assert {run.row.name: run.config.rl.lr for run in plan_runs(suite, "demo", Path("runs"))}["mine"] == 0.25


@pytest.mark.parametrize("name", sorted(path.stem for path in (presets_dir() / "suites").glob("*.toml")))
def test_suites_of_the_repository(name):
    suite = read_suite(suite_path(name))
    paper = read_paper(presets_dir() / "results" / "paper.toml")
    assert set().union(*suite.paper.values()) <= paper.keys()
    assert suite.against[0] == OWN_START or suite.row(suite.against[0]).stage == "sft"
    assert all(run.row.method for run in plan_runs(suite, "demo", Path("none")) if run.row.stage == "rl")


# ------------------------------------------------------------------------------------------------------------ planning


def test_the_plan_goes_seed_by_seed_and_warm_starts_come_first(write):
    runs = plan_runs(read_suite(write()), "demo", Path("runs"))
    names = [run.folder.name for run in runs]
    assert names == ["sft-seed1", "mine-seed1", "grpo-seed1", "zero-seed7", "mine-seed2", "grpo-seed2"]
    sft, mine, *_, grpo = runs
    assert sft.command[:9] == [
        "run", "--model", "tiny", "--data", "demo", "--run-dir", "runs/tiny/sft-seed1", "--until", "sft",
    ]  # fmt: skip
    assert mine.shell_command == (
        "rankgrpo run --model tiny --data demo --run-dir runs/tiny/mine-seed1 --method rank-grpo "
        "--from-model runs/tiny/sft-seed1/sft/final --set rl.num_steps=5 rl.lr=0.5 seed=1"
    )
    assert grpo.start is sft and "seed=2" in grpo.command
    assert "--from-model" not in runs[3].command


FREELY = """
[[rows]]
name = "mine-free"
stage = "eval"
start = "mine"
set = { "eval.constrain" = "none" }

[[rows]]
name = "sft-free"
stage = "eval"
start = "sft"
set = { "eval.constrain" = "none" }
"""


def test_a_model_is_scored_again_under_other_settings(write, tmp_path):
    suite = read_suite(write(SUITE + FREELY))
    runs = {run.folder.name: run for run in plan_runs(suite, "demo", tmp_path)}
    assert [name for name in runs if "-free" in name] == ["mine-free-seed1", "sft-free-seed1", "mine-free-seed2"]
    again = runs["mine-free-seed2"]
    assert again.start is runs["mine-seed2"] and again.config.shown_constrain == "none"
    assert again.shell_command == (
        f"rankgrpo run --model tiny --data demo --run-dir {tmp_path}/tiny/mine-free-seed2 --from-model "
        f"{tmp_path}/tiny/mine-seed2/rl/best --until sft --set rl.num_steps=5 eval.constrain=none seed=2"
    )
    assert runs["sft-free-seed1"].source == f"{tmp_path}/tiny/sft-seed1/sft/final"
    chosen = choose_runs(suite, list(runs.values()), ["mine-free"], 1)
    assert [run.folder.name for run in chosen] == ["sft-seed1", "mine-seed1", "mine-free-seed1"]


def test_scores_are_shared_where_lists_are_scored_alike(write, tmp_path):
    text = SUITE + FREELY + '[[rows]]\nname = "free"\nmethod = "grpo"\nset = { "rl.constrain" = "none" }\n'
    runs = {run.folder.name: run for run in plan_runs(read_suite(write(text)), "demo", tmp_path)}
    for name in ("sft", "popularity", "ease"):
        add_scores(runs["sft-seed1"], name)
    for name in ("mine-seed1", "free-seed1", "sft-free-seed1", "mine-free-seed1"):
        share_evaluations(runs[name])

    def shared(name):
        return sorted(path.stem for path in runs[name].evaluation().parent.glob("*.json"))

    assert shared("mine-seed1") == ["ease", "popularity", "sft"]
    # Nor does a row that scores a model again take that model's scores for its own.
    assert all(shared(f"{name}-seed1") == ["ease", "popularity"] for name in ("free", "sft-free", "mine-free"))
    assert not runs["sft-free-seed1"].is_done


def test_rows_can_be_chosen_with_the_warm_start_they_need(write):
    suite = read_suite(write())
    runs = plan_runs(suite, "demo", Path("runs"))
    assert [run.folder.name for run in choose_runs(suite, runs, ["grpo"], 1)] == ["sft-seed1", "grpo-seed1"]
    assert [run.folder.name for run in choose_runs(suite, runs, ["zero"], None)] == ["zero-seed7"]
    with pytest.raises(ConfigError, match="suite toy has no row 'gspo'; its rows are mine, sft, grpo, zero"):
        choose_runs(suite, runs, ["gspo"], None)
    with pytest.raises(ConfigError, match="--seeds must be at least 1, got 0"):
        choose_runs(suite, runs, [], 0)


def test_an_unknown_model_is_refused(write):
    suite = read_suite(write(SUITE.replace('"tiny"', '"tinny"').replace("{ tiny", "{ tinny")))
    with pytest.raises(ModelError, match="unknown model 'tinny'. Presets: tiny"):
        plan_runs(suite, "demo", Path("runs"))


def test_a_given_model_stands_for_the_warm_start(write, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in ("config.json", "model.safetensors"):
        (model / file).touch()
    runs = plan_runs(read_suite(write()), "demo", Path("runs"), sft=str(model))
    sft, mine = runs[:2]
    assert sft.command[sft.command.index("--from-model") + 1] == str(model) and "--until" in sft.command
    assert mine.command[mine.command.index("--from-model") + 1] == str(model)


def test_a_folder_that_began_from_another_model_is_refused(write, tmp_path):
    opened = open_suite(str(write()), runs_dir=tmp_path / "runs")
    mine = opened.runs[1]
    finish(mine)
    (mine.folder / "meta.json").write_text(json.dumps({"from_model": mine.source}))
    assert open_suite(str(write()), runs_dir=tmp_path / "runs").runs[1].is_done
    (mine.folder / "meta.json").write_text(json.dumps({"from_model": "other/final"}))
    with pytest.raises(ConfigError, match="another configuration .--from-model: other/final -> .*sft-seed1/sft/final"):
        open_suite(str(write()), runs_dir=tmp_path / "runs")


def finish(run, **options) -> None:
    """The files of a run that has finished."""
    write_lines(run.folder / "config.toml", to_toml(with_steps(run.config, 40)).splitlines())
    add_scores(run, run.stage, **options)


def test_what_is_done_is_not_missing(write, tmp_path):
    opened = open_suite(str(write()), runs_dir=tmp_path / "runs", out=tmp_path / "out")
    assert list_suite(opened, [], None).endswith("6 of 6 runs are missing")
    for run in opened.runs[:2]:
        finish(run)
    listed = list_suite(opened, [], None).splitlines()
    assert [line.split()[0] for line in listed[:-1]] == ["finished"] * 2 + ["missing"] * 4
    assert list_suite(opened, ["mine"], 1).endswith("0 of 2 runs are missing")


def test_a_folder_with_another_configuration_is_refused(write, tmp_path):
    finish(open_suite(str(write()), runs_dir=tmp_path / "runs").runs[1])
    with pytest.raises(ConfigError, match=r"mine-seed1 holds a run of another .*rl.lr: 0.5 -> 0.1.*--runs-dir"):
        open_suite(str(write(SUITE.replace("= 0.5 }", "= 0.1 }"))), runs_dir=tmp_path / "runs")


def test_missing_data_are_one_message(write):
    with pytest.raises(ConfigError, match="nowhere: no such folder; --data takes a data set"):
        open_suite(str(write()), data="nowhere")


# ------------------------------------------------------------------------------------------------------------ results


# Two test conversations: one likes A, the other B and C. Lists of 20 asked for.
SAMPLES = [sample("A", name="one"), sample("BC", name="two")]


def add_scores(run, name: str, lists: tuple[str, str] = ("A", "D")) -> None:
    evaluation = score_completions(SAMPLES, [letters(one) for one in lists], CATALOG)
    write_evaluation(run.folder, evaluation, name=name, split="test")


def add_metrics(run, rows: list[dict]) -> None:
    part = "sft" if run.row.stage == "sft" else "rl"
    write_lines(run.folder / part / "metrics.jsonl", map(json.dumps, rows))


def fabricate(folder: Path):
    """A finished suite without `zero`, with scores that can be worked out by hand."""
    (folder / "toy.toml").write_text(SUITE)
    opened = open_suite(str(folder / "toy.toml"), runs_dir=folder / "runs", out=folder / "out")
    runs = {run.folder.name: run for run in opened.runs}
    finish(runs["sft-seed1"], lists=("XA", "D"))  # hit at rank 2 of the first: NDCG .6309, 0
    add_scores(runs["sft-seed1"], "before", ("X", "X"))
    finish(runs["grpo-seed1"], lists=("A", "D"))  # NDCG 1, 0
    finish(runs["grpo-seed2"], lists=("XA", "D"))  # NDCG .6309, 0
    finish(runs["mine-seed1"], lists=("A", "BC"))  # NDCG 1, 1
    for name, seconds in (("mine-seed1", 1800), ("grpo-seed1", 3600), ("grpo-seed2", 7200)):
        rows = [{"step": 0, "eval/ndcg@20": 0.1}]
        for step in (1, 2):
            rewards = {f"reward/rank_{rank:02d}": step / (rank + 1) for rank in range(20)}
            cost = {"time/total_s": seconds, "tokens/sampled": 1000.0, "tokens/trained": 500.0}
            rows.append({"step": step, "eval/ndcg@20": step * seconds, "list/hits_mean": 0.5, **cost, **rewards})
        add_metrics(runs[name], rows)
    for name, lists in (("mine-seed1", [["A", "B"], ["B", "C"]]), ("grpo-seed1", [["A", "A"], ["D", "D"]])):
        texts = [[letters(one) for one in group] for group in lists]
        union = describe_lists(SAMPLES, texts, CATALOG, torch.arange(26).float())
        write_diversity(runs[name].folder, union, name="rank-grpo", split="test")
    rebuild_page(opened)
    return opened


@pytest.fixture(scope="module")
def fabricated(tmp_path_factory):
    return fabricate(tmp_path_factory.mktemp("suite"))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The same, to change; without figures."""
    monkeypatch.setattr(page, "draw_figures", lambda *_: [])
    return fabricate(tmp_path)


def result(opened, name: str) -> dict:
    rows = read_results(opened.results_path)["boards"]["tiny"]["rows"]
    return next(row for row in rows if row["name"] == name)


def test_scores_are_means_over_seeds(fabricated):
    grpo = result(fabricated, "grpo")
    assert grpo["metrics"]["ndcg@20"]["mean"] == pytest.approx((1 + 0.63093) / 4, abs=1e-4)
    assert {seed: scores["ndcg@20"] for seed, scores in grpo["by_seed"].items()} == {"1": 0.5, "2": 0.3155}
    assert grpo["metrics"]["recall@20"]["mean"] == 0.5
    assert result(fabricated, "mine")["metrics"]["recall@5"]["mean"] == 1
    assert grpo["hit_rate_by_rank"][:3] == [0.25, 0.25, 0]


def test_gains_are_paired_by_conversation(fabricated):
    gain = result(fabricated, "mine")["gain"]
    # One conversation gains 1 - .6309, the other 1: the bootstrap of two values reaches from one to the other.
    difference = gain["sft"]["ndcg@20"]["difference"]
    assert difference == pytest.approx({"mean": (0.36907 + 1) / 2, "low": 0.36907, "high": 1}, abs=1e-4)
    assert gain["sft"]["ndcg@20"]["relative"]["mean"] == pytest.approx(2 / 0.63093 - 1, abs=1e-3)
    assert gain["grpo"]["ndcg@20"]["difference"]["mean"] == pytest.approx(1 - (1 + 0.63093) / 4, abs=1e-4)
    assert set(result(fabricated, "grpo")["gain"]) == {"sft"}  # not with itself


TWO_STARTS = """
title = "Starts"
models = ["tiny"]
seeds = [1]
against = ["start"]
rows = [
    { name = "whole", label = "All dialogs", stage = "sft" },
    { name = "half", label = "Half", stage = "sft", set = { "teacher.data_frac" = 0.5 } },
    { name = "from-whole", label = "From all", group = "Trained", method = "rank-grpo" },
    { name = "from-half", label = "From half", group = "Trained", method = "rank-grpo", start = "half" },
]
"""


def test_every_row_is_compared_with_its_own_warm_start(write, tmp_path):
    opened = open_suite(str(write(TWO_STARTS)), runs_dir=tmp_path / "runs", out=tmp_path / "out")
    runs = {run.row.name: run for run in opened.runs}
    finish(runs["whole"], lists=("A", "XB"))  # NDCG 1, .6309 / 1.6309
    finish(runs["half"], lists=("XA", "XB"))  # .6309, the same
    finish(runs["from-whole"], lists=("A", "BC"))  # 1, 1
    finish(runs["from-half"], lists=("A", "XB"))  # 1, as before
    rebuild_page(opened)
    gains = {name: result(opened, name)["gain"] for name in runs}
    assert gains["from-whole"]["start"]["ndcg@20"]["difference"]["mean"] == pytest.approx(0.61315 / 2, abs=1e-4)
    assert gains["from-half"]["start"]["ndcg@20"]["difference"]["mean"] == pytest.approx(0.36907 / 2, abs=1e-4)
    assert gains["whole"] == gains["half"] == {}
    text = (opened.out / "README.md").read_text()
    assert "NDCG@20 over its warm start" in text and "| From half | **" not in text  # one conversation does not gain
    for name in ("warm_starts", "gains", "gain_by_rank"):
        assert f"results/toy-demo/{name}.png" in text


def test_with_one_warm_start_there_is_nothing_to_plot_it_against(fabricated):
    assert "warm_starts.png" not in (fabricated.out / "README.md").read_text()


def test_cost_and_curves(fabricated):
    grpo = result(fabricated, "grpo")
    cost = {"hours": 3.0, "tokens_sampled": 2000, "tokens_trained": 1000, "steps": 2, "kept_steps": []}
    assert grpo["cost"] == cost
    assert grpo["curves"]["eval/ndcg@20"] == [[0, 1, 2], [0.1, 5400, 10800]]
    steps, matrix_KS = grpo["curves"]["reward_by_rank"]
    assert (steps, len(matrix_KS), matrix_KS[3]) == ([1, 2], 20, [0.25, 0.5])


def test_unions_are_compared_where_both_have_them(fabricated):
    gain = result(fabricated, "mine")["union_gain"]["grpo"]
    # Of two lists: mine finds A and then B, C; GRPO finds A alone. Of one list: (.5 + .5) / 2 against (1 + 0) / 2.
    assert gain["recall@20_of_2"]["mean"] == pytest.approx(0.5)
    assert gain["recall@20_of_1"]["mean"] == pytest.approx(0)
    assert gain["coverage_of_2"]["mean"] == pytest.approx((3 - 2) / 26, abs=1e-4)
    assert "union" not in result(fabricated, "sft")


def test_tables_hold_these_numbers(fabricated):
    board = read_results(fabricated.results_path)["boards"]["tiny"]
    scores = {row.split("|")[1].strip(): row for row in scores_table(board)}
    assert " .4077 [" in scores["GRPO"] and " .5000 .3155 |" in scores["GRPO"] and "| 3.00 | 0.0 |" in scores["GRPO"]
    assert "**1.0000** [1.0000, 1.0000]" in scores["Mine"] and "Before training" in scores
    paper = [read_paper(presets_dir() / "results" / "paper.toml")["redial-0.5b"]]
    gains = {row.split("|")[1].strip(): row for row in gains_table(board, ["sft", "grpo"], paper)}
    assert "**+.6845** [+.3691, +1.0000]" in gains["Mine"]
    assert " +24.0% |" in gains["GRPO"]  # .1971 / .1590 - 1, of the paper
    # Of seed 1 (1 + 0) / 2, of seed 2 (.6309 + 0) / 2, over the .3155 of SFT; GRPO's own mean is between them.
    assert "| +58.5% +0.0% |" in gains["GRPO"]
    stages = {row.split("|")[1].strip(): row for row in stages_table(board, ["before", "sft", "mine"], paper)}
    assert "| .0042 |" in stages["Before training"] and "| .1590 |" in stages["SFT"] and "Mine" in stages
    assert "2 conversations, 2 lists each" in union_table(board, ["grpo"])[0]


def test_the_page_names_the_command_of_every_row(fabricated):
    text = (fabricated.out / "README.md").read_text()
    for name in ("mine", "sft", "grpo"):
        assert f"`make experiments SUITE=toy ONLY={name}`" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (fabricated.out / line[line.index("](") + 2 : -1]).is_file()
    assert "results/toy-demo/reward_by_rank.png" in text


def test_rows_that_ran_elsewhere_stay_until_their_recipe_changes(own, tmp_path, write):
    elsewhere = open_suite(str(write()), runs_dir=tmp_path / "other", out=own.out)
    before = read_results(own.results_path)["boards"]["tiny"]["rows"]
    finish(elsewhere.runs[0], lists=("A", "B"))
    rebuild_page(elsewhere)
    rows = read_results(own.results_path)["boards"]["tiny"]["rows"]
    assert [row["name"] for row in rows] == [row["name"] for row in before]
    assert result(own, "mine") == next(row for row in before if row["name"] == "mine")
    assert result(own, "sft")["metrics"]["ndcg@20"]["mean"] == pytest.approx((1 + 0.61315) / 2, abs=1e-4)
    rebuild_page(open_suite(str(write(SUITE.replace("= 0.5 }", "= 0.1 }"))), runs_dir=tmp_path / "other", out=own.out))
    names = [row["name"] for row in read_results(own.results_path)["boards"]["tiny"]["rows"]]
    assert "mine" not in names and "grpo" in names


def test_a_row_of_a_changed_preset_is_dropped(own, tmp_path, write, monkeypatch):
    presets = tmp_path / "presets"
    shutil.copytree(presets_dir(), presets)
    preset = presets / "tiny.toml"
    monkeypatch.setattr("rankgrpo.config_file.presets_dir", lambda: presets)

    def rows_after(old: str, new: str) -> list[str]:
        text = preset.read_text()
        assert old in text
        preset.write_text(text.replace(old, new))
        elsewhere = open_suite(str(write()), runs_dir=tmp_path / new, out=own.out)
        finish(elsewhere.runs[0], lists=("A", "B"))
        rebuild_page(elsewhere)
        return [row["name"] for row in read_results(own.results_path)["boards"]["tiny"]["rows"]]

    assert "mine" in rows_after("[rl]", "[rl]\nsave_every = 7")  # changes nothing that is computed
    assert rows_after("draws = 4", "draws = 3") == ["before", "sft"]


def test_results_stay_when_no_row_is_left_of_them(own, tmp_path, write):
    results = read_results(own.results_path)
    rebuild_page(open_suite(str(write(SUITE.replace("= 5", "= 6"))), runs_dir=tmp_path / "none", out=own.out))
    assert read_results(own.results_path) == results


def test_without_the_runs_the_page_is_made_from_the_results(own, tmp_path, write):
    results, text = read_results(own.results_path), (own.out / "README.md").read_text()
    rebuild_page(open_suite(str(write()), runs_dir=tmp_path / "none", out=own.out))
    assert read_results(own.results_path) == results
    assert (own.out / "README.md").read_text() == text


def test_a_record_of_more_seeds_stays(own, tmp_path, write):
    elsewhere = open_suite(str(write()), runs_dir=tmp_path / "other", out=own.out)
    (grpo,) = [run for run in elsewhere.runs if run.folder.name == "grpo-seed1"]
    finish(grpo, lists=("D", "D"))
    rebuild_page(elsewhere)
    assert list(result(own, "grpo")["by_seed"]) == ["1", "2"]


def test_results_are_whole_or_named(tmp_path):
    path = tmp_path / "results.json"
    results = {
        "format": 1,
        "title": "T",
        "boards": {"a": {"split": "test", "rows": [{"name": "x"}, {"name": "y"}]}, "b": {"rows": []}},
    }
    write_results(path, results)
    assert read_results(path) == results
    path.write_text('{"format": 1,\n')
    with pytest.raises(ValueError, match="results.json:2: broken JSON"):
        read_results(path)
    path.write_text('{"format": 0, "boards": {}}')
    with pytest.raises(ValueError, match="not the results of a suite"):
        read_results(path)


def test_seeds_on_different_conversations_are_refused(own):
    (run,) = [run for run in own.runs if run.folder.name == "grpo-seed2"]
    write_evaluation(
        run.folder, score_completions(SAMPLES[:1], [letters("A")], CATALOG), name="rank-grpo", split="test"
    )
    with pytest.raises(ValueError, match="evaluations of the same conversations only"):
        rebuild_page(own)


def test_the_page_of_the_repository_is_what_the_command_makes(monkeypatch, tmp_path):
    experiments = presets_dir()

    def drawn(board, against, folder, prefix):
        paths = [(figure, folder / f"{prefix}{figure.name}.png") for figure in FIGURES]
        return [(figure, path) for figure, path in paths if path.is_file()]

    monkeypatch.setattr(page, "draw_figures", drawn)
    shutil.copytree(experiments / "results", tmp_path / "results")
    made = page.build_page(tmp_path).read_text()
    assert made == (experiments / "README.md").read_text(), "run `rankgrpo experiments SUITE --page`"


def test_no_rows_draw_no_figures(tmp_path):
    assert draw_figures({"rows": [], "num_ranks": 20}, ["sft"], tmp_path, "") == []
