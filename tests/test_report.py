import base64
import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rankgrpo.data.samples import Sample, Turn
from rankgrpo.evaluation.evaluate import (
    compare,
    read_evaluation,
    read_lists,
    score_completions,
    score_items,
    write_evaluation,
)
from rankgrpo.evaluation.tables import format_interval, format_value
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.report import figures as report_figures
from rankgrpo.report.build import build_report, read_curves, read_run
from rankgrpo.report.examples import choose_examples
from rankgrpo.report.figures import TEXT, RunCurves, curve_matrix, smooth, thin
from rankgrpo.report.page import flatten
from rankgrpo.report.plots import PLOTS, darken

TITLES = (
    "Alien|Aliens|Amélie|Arrival|Blade Runner|Brazil|Casablanca|Chinatown|Collateral|Contact|Dark City|Drive|Dune|"
    "Fargo|Gattaca|Gravity|Heat|Her|Hugo|Inception|Interstellar|Jaws|Looper|Memento|Metropolis|Moon|Network|Notorious|"
    "Psycho|Oblivion|Ran|Rebecca|Ronin|Rope|Se7en|Shane|Signs|Sneakers|Solaris|Stalker|Sunshine|Taxi Driver|The Abyss|"
    "The Fly|The Game|The Insider|The Matrix|The Prestige|The Sting|The Thing|Thief|Tron|Vertigo|Wings|Witness|Zodiac|"
    "<script>alert(1)</script>"
).split("|")
CATALOG = Catalog([Item(title, 1950 + place, popularity=60 - place) for place, title in enumerate(TITLES)])
SCRIPT_TITLE = TITLES[-1]
NUM_RANKS = 20


# ---------------------------------------------------------------------------------------------------- a fake run folder


def fake_samples(num_samples: int, rng: np.random.Generator) -> list[Sample]:
    samples = []
    for index in range(num_samples):
        liked = rng.choice(len(CATALOG), size=int(rng.integers(2, 6)), replace=False)
        seen, *groundtruth = (CATALOG.items[place] for place in liked)
        turns = (
            Turn("user", f"Hello! I loved {seen.title} ({seen.year}) & would like something along those lines."),
            Turn("assistant", "Sure. Do you prefer it slow and eerie, or fast?"),
            Turn("user", "Slow is fine, as long as it is <b>not</b> too long."),
        )
        truth = tuple((item.title, item.year) for item in groundtruth)
        samples.append(Sample(f"demo-{index:04d}", turns, (seen.title,), truth))
    return samples


def fake_completion(sample: Sample, skill: float, noise: float, rng: np.random.Generator) -> str:
    """A list that favours each liked item with probability `skill`, and has bad lines with probability `noise`."""
    scores = rng.random(len(CATALOG))
    for title, year in sample.groundtruth:
        if rng.random() < skill:
            scores[CATALOG.lookup(title, year)] += skill * rng.random()
    best = np.argsort(-scores)[: NUM_RANKS + int(rng.integers(-3, 2) if noise > 0.1 else 0)]
    lines = [f"{CATALOG.items[place].title} ({CATALOG.items[place].year})" for place in best]
    for rank in range(len(lines)):
        if rng.random() < noise:
            lines[rank] = rng.choice(["I would also suggest", "Made Up Film (2031)", "Another One (1888)", lines[0]])
    return "\n".join(lines)


def write_metrics(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fake_validation(progress: float, rng: np.random.Generator) -> dict[str, float]:
    row = {f"eval/ndcg@{k}": (0.02 + 0.06 * progress) * (0.6 + k / 50) + rng.normal(0, 0.001) for k in (5, 10, 15, 20)}
    row |= {f"eval/recall@{k}": 2.0 * row[f"eval/ndcg@{k}"] for k in (5, 10, 15, 20)}
    row |= {f"eval/hit_rank_{rank:02d}": 0.1 * progress / (1 + rank) for rank in range(NUM_RANKS)}
    return row | {"eval/in_catalog_frac": min(0.6 + 0.4 * progress, 1.0), "time/eval_s": 4.0}


def fake_sft_rows(num_steps: int, rng: np.random.Generator) -> list[dict]:
    rows = []
    for step in range(1, num_steps + 1):
        progress = step / num_steps
        row = {"step": step, "loss/nll": 1.2 + 5 * np.exp(-6 * progress) + rng.normal(0, 0.05), "lr": 1e-3}
        row |= {"grad/norm": 1.0 + rng.random(), "tokens/trained": 8000.0, "time/update_s": 0.5}
        if step % max(num_steps // 4, 1) == 0:
            row |= {"loss/val_nll": 1.3 + 5 * np.exp(-6 * progress)} | fake_validation(0.5 * progress, rng)
        rows.append(row | {"time/total_s": 0.55 + row.get("time/eval_s", 0.0)})
    return rows


def fake_rl_rows(num_steps: int, rng: np.random.Generator) -> list[dict]:
    rows = []
    for step in range(1, num_steps + 1):
        progress = step / num_steps
        by_rank = [(0.06 + 0.14 * progress) / (1 + 0.25 * rank) + abs(rng.normal(0, 0.02)) for rank in range(NUM_RANKS)]
        row = {"step": step, "reward/mean": float(np.mean(by_rank))}
        row |= {f"reward/rank_{rank:02d}": value for rank, value in enumerate(by_rank)}
        row |= {f"reward/zero_std_rank_{rank:02d}": 1 - 2 * value for rank, value in enumerate(by_rank)}
        row |= {"reward/zero_std_frac": 1 - 2 * float(np.mean(by_rank)), "list/hit_frac": 0.4 + 0.3 * progress}
        row |= {"list/items_mean": 18 + 2 * progress, "list/tokens_mean": 130.0, "list/parsed_frac": 0.97}
        row |= {"list/in_catalog_frac": 0.9 + 0.09 * progress, "list/duplicate_frac": 0.05 * (1 - progress)}
        row |= {"list/finished_frac": 0.98, "loss/policy": -0.01, "loss/kl": 0.02 * progress**2 + 0.001 * rng.random()}
        row |= {"mismatch/abs_logp": 1e-6 * rng.random(), "mismatch/exp_abs_logp": 1 + 1e-6 * rng.random()}
        row |= {"mismatch/outside_clip_frac": 1e-3 * rng.random()}
        row |= {"policy/entropy": 1.4 - 0.5 * progress + 0.02 * rng.random(), "ratio/mean": 1.0, "lr": 1e-5}
        row |= {"ratio/clip_low_frac": 0.01 * rng.random(), "ratio/clip_high_frac": 0.012 * rng.random()}
        row |= {"grad/norm": 0.4 + 0.2 * rng.random(), "time/sample_s": 2.0 + 0.2 * rng.random(), "time/score_s": 0.1}
        row |= {"time/update_s": 1.5, "tokens/sampled": 33_000.0, "tokens/trained": 51_000.0, "tokens/saved_frac": 0.55}
        row["tokens/cut_frac"] = 0.375
        row["time/total_s"] = row["time/sample_s"] + row["time/score_s"] + row["time/update_s"] + 0.05
        if step % max(num_steps // 6, 1) == 0:
            row |= fake_validation(0.5 + 0.5 * progress, rng)
            row["time/total_s"] += 4.0
        rows.append(row)
    return rows


def write_fake_run(folder: Path, *, num_samples: int = 60, sft_steps: int = 80, rl_steps: int = 90) -> Path:
    """A finished run as `make train` leaves it, with made-up learning curves and really scored lists."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(
        f'seed = 3407\n\n[model]\nname = "tiny"\n\n[data]\npath = "demo"\n\n[sft]\nnum_steps = {sft_steps}\n'
        f'betas = [0.9, 0.95]\n\n[rl]\nnum_steps = {rl_steps}\nreturns = "exp_inf"\n'
    )
    meta = {"command": "rankgrpo run --name <demo>", "machine": "2 CPU cores", "versions": {"torch": "2.13.0+cpu"}}
    (folder / "meta.json").write_text(json.dumps(meta))
    write_metrics(folder / "sft" / "metrics.jsonl", fake_sft_rows(sft_steps, rng))
    write_metrics(folder / "rl" / "metrics.jsonl", fake_rl_rows(rl_steps, rng))
    samples = fake_samples(num_samples, rng)
    for name, skill, noise in (("before", 0.0, 0.5), ("sft", 0.3, 0.04), ("rank-grpo", 0.8, 0.01)):
        texts = [fake_completion(sample, skill, noise, rng) for sample in samples]
        write_evaluation(folder, score_completions(samples, texts, CATALOG), name=name, split="test")
    popular = [list(range(NUM_RANKS))] * num_samples
    write_evaluation(folder, score_items(samples, popular, CATALOG), name="popularity", split="test")
    shuffled = [np.argsort(-rng.random(len(CATALOG)))[:NUM_RANKS] for _ in samples]
    write_evaluation(folder, score_items(samples, shuffled, CATALOG), name="ease", split="test")
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A finished run with its report built. Read only."""
    folder = write_fake_run(tmp_path_factory.mktemp("runs") / "fake-run")
    assert build_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def copied_run(run_dir, tmp_path, monkeypatch) -> Path:
    """A run to break, without report; figures are off, for speed."""
    monkeypatch.setattr("rankgrpo.report.plots.PLOTS", ())
    return Path(shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("report.html", "plots")))


def page_of(folder: Path) -> str:
    return build_report(folder).read_text(encoding="utf-8")


def notes_of(page: str) -> str:
    found = re.search(r'<div class="note".*?</div>', page, flags=re.S)
    return html.unescape(found[0]) if found else ""


def decoded_figures(page: str) -> list[str]:
    return [
        base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    ]


# ---------------------------------------------------------------------------------------------------- the finished page


def test_the_page_holds_the_numbers_of_the_evaluation(run_dir):
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    for name in ("before", "sft", "rank-grpo", "ease", "popularity"):
        summary = read_evaluation(run_dir / "eval" / "test" / f"{name}.json")
        for key, interval in summary["metrics"].items():
            assert f"{format_value(key, interval['mean'])}" in page
            assert format_interval(key, interval).strip("[]%").replace(", ", "–") in page
    lists = [read_lists(run_dir / "eval" / "test" / f"{name}.lists.jsonl") for name in ("sft", "rank-grpo")]
    gain = compare(*lists)["ndcg@20"]
    assert gain["difference"]["low"] > 0
    assert f"a change of {100 * gain['relative']['mean']:+.1f}%. The 95% interval of the difference lies above" in page
    low, high = (100 * gain["relative"][bound] for bound in ("low", "high"))
    assert f"[{low:+.1f}%, {high:+.1f}%]" in page
    assert "On 60 test conversations, NDCG@20 is " in page


def test_the_page_says_in_one_line_that_rl_gained(run_dir):
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    section = re.search(r'<section id="why">.*?</section>', page, flags=re.S)[0]
    assert re.search(r"It did not: RL gained \(NDCG@20 \.\d{4} → \.\d{4}, \+", section)
    assert "usual answers" in section and '<details class="card">' in section  # folded away


def test_the_page_says_what_it_cost(run_dir):
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "2,970,000" in page  # 90 steps of 33,000 sampled tokens
    assert "4,590,000" in page  # 90 steps of 51,000 trained tokens
    assert "55.0%" in page and "37.5%" in page  # tokens saved by sharing prompts, and by cutting lists
    # 80 steps of 0.55 s and 4 validations of 4 s.
    assert re.search(r"<th[^>]*>SFT time</th><td>1 min 00 s</td>", page)
    assert re.search(r"<th[^>]*>SFT: eval</th><td>16.0 s</td><td>26.7%</td>", page)
    assert re.search(r"<th[^>]*>SFT: other</th><td>4.0 s</td>", page)


def test_the_page_holds_the_run_facts(run_dir):
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<th[^>]*>versions.torch</th><td>2.13.0\+cpu</td>", page)
    assert re.search(r"<th[^>]*>rl.returns</th><td>exp_inf</td>", page)
    assert re.search(r"<th[^>]*>sft.betas</th><td>0.9, 0.95</td>", page)
    assert "Rank-GRPO run: fake-run" in page
    assert notes_of(page) == ""


def test_the_page_loads_nothing(run_dir):
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == page.count("<source") == len(PLOTS)
    for value in re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'\s>]+)""", page):
        assert value.startswith(("#", "data:")), value
    for pattern in (r"url\(", "@import", "<script", "<iframe", "<object", "http-equiv", "https?://", r"\son\w+="):
        assert not re.search(pattern, page), pattern
    figures = decoded_figures(page)
    assert len(figures) == 2 * len(PLOTS)
    for figure in figures:
        for value in re.findall(r'href="([^"]*)"', figure):
            assert value.startswith(("#", "data:")), value


def test_text_from_files_is_escaped(run_dir):
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    assert html.escape(SCRIPT_TITLE) in page
    assert "<script" not in page
    assert "it is &lt;b&gt;not&lt;/b&gt; too long" in page
    assert "rankgrpo run --name &lt;demo&gt;" in page


def test_every_figure_is_a_png_and_drawn_for_both_pages(run_dir):
    assert sorted(path.name for path in (run_dir / "plots").iterdir()) == sorted(f"{plot.name}.png" for plot in PLOTS)
    for path in (run_dir / "plots").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    light, dark = decoded_figures((run_dir / "report.html").read_text(encoding="utf-8"))[1::-1]
    assert TEXT in light and TEXT not in dark
    assert dark == darken(light)


def test_the_report_is_a_function_of_the_run(copied_run, monkeypatch):
    monkeypatch.setattr("rankgrpo.report.plots.PLOTS", PLOTS[:3])
    first = page_of(copied_run)
    assert len(decoded_figures(first)) == 6
    assert page_of(copied_run) == first


def test_examples_show_the_lists_of_the_three_stages(run_dir):
    page = (run_dir / "report.html").read_text(encoding="utf-8")
    before, after = (read_lists(run_dir / "eval" / "test" / f"{name}.lists.jsonl") for name in ("sft", "rank-grpo"))
    old, new = before.metrics["ndcg@20"], after.metrics["ndcg@20"]
    counts = f"{int((new > old).sum())} scored better after RL than after SFT (NDCG@20), {int((new < old).sum())}"
    assert f"Of 60 conversations, {counts} worse" in page
    section = page[page.index('id="examples"') : page.index('id="facts"')]
    for kind in ("better", "worse", "same"):
        assert section.count(f'class="tag {kind}"') == 2
    for name in ("Before training", "After SFT", "After RL"):
        assert section.count(f"<h4>{name}") == 6
    num_hits = sum(
        mark["hit"]
        for _, index in choose_examples(after.sample_ids, old.tolist(), new.tolist())
        for name in ("before", "sft", "rank-grpo")
        for mark in read_lists(run_dir / "eval" / "test" / f"{name}.lists.jsonl").rows[index]["items"]
    )
    assert num_hits > 0
    assert section.count('<span class="mark">hit</span>') == num_hits
    assert "not in catalog</span>" in section and "unreadable</span>" in section


def test_examples_do_not_depend_on_how_flattering_they_are():
    ids = [f"id-{index}" for index in range(100)]
    old = [0.5] * 100
    new = [0.9 if index % 3 == 0 else 0.1 if index % 3 == 1 else 0.5 for index in range(100)]
    chosen = choose_examples(ids, old, new)
    assert [kind for kind, _ in chosen] == ["better", "worse", "same"] * 2
    assert all(new[index] > 0.5 for kind, index in chosen if kind == "better")
    much_better = [value + 0.01 * index if value == 0.9 else value for index, value in enumerate(new)]
    assert choose_examples(ids, old, much_better) == chosen
    assert [kind for kind, _ in choose_examples(ids[:4], [0.0] * 4, [1.0] * 4)] == ["better", "better"]


# ---------------------------------------------------------------------------------------------------- partial runs


def test_a_run_that_has_only_done_sft(run_dir, tmp_path):
    folder = Path(shutil.copytree(run_dir, tmp_path / "run"))  # with the figures of the finished run still in it
    shutil.rmtree(folder / "rl")
    for name in ("rank-grpo", "ease", "popularity"):
        (folder / "eval" / "test" / f"{name}.json").unlink()
    page = page_of(folder)
    assert "RL has logged nothing yet" in notes_of(page)
    assert "Not evaluated on the test split: After RL, EASE, Popularity list" in notes_of(page)
    assert "Reward by rank" not in page
    assert "before training and" in page  # the comparison is now of SFT with the start
    assert {path.stem for path in (folder / "plots").iterdir()} == {"validation_ndcg", "hit_rate_by_rank", "sft_loss"}


def test_a_run_in_the_middle_of_rl(copied_run):
    path = copied_run / "rl" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:37]))
    shutil.rmtree(copied_run / "eval")
    page = page_of(copied_run)
    assert "RL is at step 37 of 90." in notes_of(page)
    assert "There is no evaluation yet" in notes_of(page)
    assert "has not been evaluated yet" in page


def test_figures_without_data_are_named(run_dir, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir / "sft", folder / "sft")
    write_metrics(folder / "rl" / "metrics.jsonl", [{"step": 1, "reward/mean": 0.5}])
    notes = notes_of(page_of(folder))
    assert "Distance from the SFT model (needs loss/kl in rl/metrics.jsonl)" in notes
    assert "NDCG by step" not in notes
    assert "config.toml is missing" in notes and "meta.json is missing" in notes


def test_lists_that_are_missing_or_of_other_samples_are_not_compared(copied_run):
    (copied_run / "eval" / "test" / "sft.lists.jsonl").unlink()
    page = page_of(copied_run)
    assert "eval/test/sft.lists.jsonl is missing" in notes_of(page)
    assert "before training and" in page
    path = copied_run / "eval" / "test" / "rank-grpo.lists.jsonl"
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]), encoding="utf-8")
    page = page_of(copied_run)
    assert "Before training and After RL were evaluated on different samples" in notes_of(page)
    assert 'id="examples"' not in page


def test_every_split_has_a_table_and_test_is_the_headline(copied_run):
    shutil.copytree(copied_run / "eval" / "test", copied_run / "eval" / "dev")
    page = page_of(copied_run)
    titles = re.findall(r"All scores on the (\w+) split", page)
    assert titles == ["test", "dev"]


@pytest.mark.parametrize(
    ("source", "turn", "verdict"),
    [
        ("before", 0, "lies below zero: the lists got worse"),
        ("sft", 1, "holds zero: no difference is shown"),  # the same scores, dealt to other conversations
    ],
)
def test_no_gain_is_called_no_gain(copied_run, source, turn, verdict):
    folder = copied_run / "eval" / "test"
    rows = [json.loads(line) for line in (folder / f"{source}.lists.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [row["ndcg@20"] for row in rows]
    dealt = [row | {"ndcg@20": score} for row, score in zip(rows, scores[turn:] + scores[:turn], strict=True)]
    write_metrics(folder / "rank-grpo.lists.jsonl", dealt)
    page = page_of(copied_run)
    assert verdict in page
    assert page.count("The 95% interval of the difference") == 1


@pytest.mark.parametrize("name", ["nothing", "no-such-folder"])
def test_a_folder_without_a_run_is_an_error(tmp_path, name):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=f"{name}: (nothing to report|no such run folder)"):
        build_report(tmp_path / name)
    assert not (tmp_path / "nothing" / "report.html").exists()


# ---------------------------------------------------------------------------------------------------- broken files


def test_a_last_line_cut_short_is_skipped_and_mentioned(copied_run):
    path = copied_run / "rl" / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text[: text.rstrip().rindex("\n") + 30])
    notes = notes_of(page_of(copied_run))
    assert "rl/metrics.jsonl:90 was skipped: broken JSON" in notes
    assert "RL is at step 89 of 90." in notes


def test_a_last_line_cut_inside_a_character_is_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 2.0}\n{"step": 2, "note": "\xc3')
    curves, notes = read_curves(path)
    assert curves["a"][0].tolist() == [1]
    assert len(notes) == 1 and "metrics.jsonl:2 was skipped" in notes[0]


def test_a_broken_line_before_the_last_is_an_error(copied_run):
    path = copied_run / "rl" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], lines[4][:25] + "\n", *lines[5:]]))
    with pytest.raises(ValueError, match=r"rl/metrics.jsonl:5: broken JSON"):
        build_report(copied_run)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sft/metrics.jsonl", '{"loss/nll": 1.0}\n', r"sft/metrics.jsonl:1: .*whole number under 'step', got None"),
        ("sft/metrics.jsonl", '{"step": 1}\n{"step": "two"}\n', r"metrics.jsonl:2: .*got 'two'"),
        ("meta.json", '{"a": 1,\n', r"meta.json:2: broken JSON"),
        ("meta.json", "[]", "meta.json: expected a JSON object"),
        ("config.toml", "seed = \n", "config.toml: not valid TOML"),
        ("eval/test/sft.json", "{", "sft.json:1: broken JSON"),
    ],
)
def test_other_broken_files_are_named(copied_run, name, text, message):
    (copied_run / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        build_report(copied_run)


def test_metrics_rows_of_a_step_are_merged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_metrics(
        path,
        [
            {"step": 1, "a": 1.0, "note": "text"},
            {"step": 3, "a": 3.0, "b": None},
            {"step": 1, "b": 7.0},
            {"step": 3, "a": 4},
        ],
    )
    curves, notes = read_curves(path)
    assert {key: (steps.tolist(), values.tolist()) for key, (steps, values) in curves.items() if key != "b"} == {
        "a": ([1, 3], [1.0, 4.0])
    }
    np.testing.assert_array_equal(curves["b"][1], [7.0, np.nan])
    assert notes == []


# ---------------------------------------------------------------------------------------------------- curves


def test_thinning_averages_neighbours_and_keeps_short_curves():
    steps, values = thin(np.arange(6), np.array([0.0, 2.0, 4.0, np.nan, np.nan, np.nan]), 3)
    np.testing.assert_array_equal(steps, [0.5, 2.5, 4.5])
    np.testing.assert_array_equal(values, [1.0, 4.0, np.nan])
    assert thin(np.arange(3), np.arange(3.0), 3)[1].tolist() == [0, 1, 2]


def test_smoothing_is_a_centred_mean_without_the_absent():
    np.testing.assert_allclose(smooth(np.array([0.0, 3.0, 6.0, 0.0]), 3), [1.5, 3.0, 3.0, 3.0])
    np.testing.assert_allclose(smooth(np.array([1.0, np.nan, 3.0]), 3), [1.0, 2.0, 3.0])
    np.testing.assert_allclose(smooth(np.array([5.0, 1.0]), 1), [5.0, 1.0])


def test_curves_of_different_steps_share_a_matrix():
    curves = {"a": (np.array([1, 2, 4]), np.array([1.0, 2.0, 4.0])), "b": (np.array([2]), np.array([20.0]))}
    matrix, steps = curve_matrix(curves, ["a", "b"])
    np.testing.assert_array_equal(steps, [1, 2, 4])
    np.testing.assert_array_equal(matrix, [[1, 2, 4], [np.nan, 20, np.nan]])
    matrix, steps = curve_matrix(curves, ["b", "a"], absent=0.0, max_columns=2)
    np.testing.assert_array_equal(steps, [1.5, 4])
    np.testing.assert_array_equal(matrix, [[10, 0], [1.5, 4]])


@pytest.mark.parametrize("num_steps", [1, 2])
def test_all_figures_survive_very_short_runs(tmp_path, num_steps):
    rng = np.random.default_rng(0)
    write_metrics(tmp_path / "rl" / "metrics.jsonl", fake_rl_rows(num_steps, rng))
    write_metrics(tmp_path / "sft" / "metrics.jsonl", fake_sft_rows(num_steps, rng))
    curves = read_run(tmp_path).curves
    figures = {plot.name: plot.draw(curves) for plot in PLOTS}
    assert [name for name, figure in figures.items() if figure is None] == ["hit_rate_by_rank"]
    for figure in figures.values():
        if figure is not None:
            figure.draw_without_rendering()


def test_a_long_run_is_drawn_with_few_points():
    steps = np.arange(1, 20_001)
    rows = {f"reward/rank_{rank:02d}": (steps, steps / 20_000) for rank in range(20)}
    heatmap = report_figures.reward_heatmap(RunCurves(rl=rows))
    assert heatmap.axes[0].images[0].get_array().shape == (20, 160)
    lines = report_figures.reward_lines(RunCurves(rl=rows))
    assert {len(line.get_xdata()) for line in lines.axes[0].lines} == {300}


def test_rare_phases_are_averaged_over_all_steps_of_a_long_run():
    steps = np.arange(1, 2001)
    rl = {"time/sample_s": (steps, np.ones(2000)), "time/eval_s": (steps[99::100], np.full(20, 10.0))}
    figure = report_figures.seconds_by_step(RunCurves(rl=rl))
    # 12 or 13 steps a column, at most one of them with a validation.
    assert 1 + 10 / 13 <= figure.axes[0].dataLim.ymax <= 1 + 10 / 12


def test_nested_tables_are_flattened():
    assert flatten({"a": 1, "b": {"c": [1, 2], "d": {"e": None}}}) == [("a", "1"), ("b.c", "1, 2"), ("b.d.e", "-")]
