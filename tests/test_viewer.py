"""Sampled lists on the report page and in the terminal; the page in a real browser where there is one."""

import io
import json
import random
import re
from pathlib import Path

import pytest
from browser import open_page

from rankgrpo.errors import DataError
from rankgrpo.report.build import build_report
from rankgrpo.report.terminal import format_group, largest, printable, show
from rankgrpo.report.viewer import fit, pack, unpack, viewer_context

EVIL = "</script><img src=x onerror=alert(1)> \x1b[31m\u202e & \u2028 (1999)"


def one_list(lines, *, marks=None, reward=None, advantage=None, ratio=None, logp=None, **more):
    n = len(lines)
    return {
        "lines": lines,
        "marks": marks or [""] * n,
        "reward": reward or [0.0] * n,
        "advantage": advantage or [0.0] * n,
        "ratio": ratio or [1.0] * n,
        "logp": logp or [-1.0] * n,
        "finished": True,
        "num_tokens": 3 * n,
    } | more


def group(step, sample_id, *lists):
    talk = [{"role": "user", "content": f"something like {EVIL}"}, {"role": "assistant", "content": "Slow?"}]
    return {"step": step, "id": sample_id, "conversation": talk, "groundtruth": [["Heat", 1995]], "lists": list(lists)}


HEAT = one_list(
    ["Heat (1995)", EVIL], marks=["hit", "out"], reward=[1.0, None], advantage=[0.7, -0.1], ratio=[1.1, 0.9],
    logp=[-0.2, -2.0],
)  # fmt: skip
MISS = one_list(["Ronin (1998)"], marks=["repeat forced"], advantage=[-0.7], ratio=[None], finished=False, end=-0.1)
ROWS = [group(1, "a", HEAT, MISS), group(1, "b", MISS, MISS), group(5, "c", one_list([]), one_list(["Alien (1979)"]))]


def write_run(folder: Path, rows) -> Path:
    (folder / "rl").mkdir(parents=True)
    (folder / "rl" / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "reward/mean": 0.5}\n')
    (folder / "rl" / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Data on the page


def test_rows_are_packed_whole_and_alike():
    assert unpack(pack(ROWS)) == ROWS and pack(ROWS) == pack(ROWS)
    assert re.fullmatch(r"[A-Za-z0-9+/=]+", pack(ROWS))


def test_too_many_groups_are_thinned_evenly(tmp_path):
    draw = random.Random(0)
    rows = [group(step, f"{draw.random()}", MISS, HEAT) for step in range(1, 201)]
    limit = len(pack(rows)) // 4
    shown, data = fit(rows, limit)
    assert len(data) <= limit and unpack(data) == shown and 20 < len(shown) < 60
    gaps = [b["step"] - a["step"] for a, b in zip(shown, shown[1:], strict=False)]
    assert shown[0]["step"] == 1 and max(gaps) - min(gaps) <= 1
    run, notes = write_run(tmp_path / "run", rows), []
    context = viewer_context(run / "rl" / "rollouts.jsonl", notes, max_bytes=limit)
    assert context["num_lists"] == 2 * context["num_groups"] == 2 * len(shown)
    assert f"Of 200 sampled groups, {len(shown)} spread evenly" in notes[0]


def test_the_page_holds_the_data_and_no_text_of_it(tmp_path):
    text = build_report(write_run(tmp_path / "run", ROWS)).read_text()
    assert unpack(re.search(r'id="v-data">([^<]*)<', text)[1]) == ROWS
    assert "onerror" not in text and "Ronin" not in text
    assert '<a href="#rollouts">Sampled lists</a>' in text and "3 groups (6 lists) of 2 training steps" in text


def test_a_run_without_sampled_lists_has_no_viewer(tmp_path):
    run = write_run(tmp_path / "run", [])
    assert "v-data" not in build_report(run).read_text()
    (run / "rl" / "rollouts.jsonl").unlink()
    assert "v-data" not in build_report(run).read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Terminal


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_group_in_the_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    run = write_run(tmp_path / "run", ROWS)
    text = show(run, 1, 1, None, "advantage")
    assert text.splitlines()[0] == f"{run}, step 1, group 1 of 2"
    assert "ground truth: Heat (1995)" in text and "  Recommender: Slow?" in text
    heads = next(line for line in text.splitlines() if "list 1" in line)
    assert re.fullmatch(r" +list 1: reward 1\.00, 6 tokens +list 2: reward 0\.00, 3 tokens, cut, end -0\.10", heads)
    first = next(line for line in text.splitlines() if line.startswith("  1 "))
    assert re.fullmatch(r"  1 \* Heat \(1995\) +\+0\.70  =~Ronin \(1998\) +-0\.70", first)
    assert heads.index("list 2") == first.index("=~")
    assert "\x1b" not in text and "\u202e" not in text and text.rstrip().endswith("number: advantage")
    assert "step 5, group 1 of 1\n" in show(run, None, 1, None, "reward")
    assert "conversation b" in show(run, None, 1, "b", "ratio")
    monkeypatch.setenv("COLUMNS", "40")
    assert len([line for line in show(run, 1, 1, None, "logp").splitlines() if line.startswith("  1 ")]) == 2


def test_colours_on_a_terminal_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)

    def text(out, by="advantage"):
        return format_group(ROWS[0], by=by, width=100, scale=largest(ROWS, by), out=out)

    assert "\x1b" not in text(io.StringIO())
    coloured = text(Terminal())
    assert "\x1b[1;38;5;15;48;5;34m* Heat (1995)" in coloured and "\x1b[38;5;15;48;5;124m=~Ronin" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == text(io.StringIO())
    assert "48;5;34m* Heat" in text(Terminal(), "ratio") and "48;5;52m" not in text(Terminal(), "logp")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in text(Terminal())


def test_what_a_terminal_would_obey_is_replaced():
    assert printable("a\x1b[2J\tb\x07é\n") == "a\ufffd[2J b\ufffdé "


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((3, 1, None), r"--step 3: not kept; 2 steps from 1 to 5 are, the nearest 1, 5 \(rl.log_lists"),
        ((1, 3, None), "--group 3: step 1 has the groups 1 to 2"),
        ((1, 0, None), "--group 0"),
        ((None, 1, "x"), "--id x: no group of this conversation was kept; kept: a, b, c"),
        ((5, 1, "a"), "was kept at step 5; kept: c"),
    ],
)
def test_a_group_that_is_not_there(tmp_path, asked, message):
    with pytest.raises(DataError, match=message):
        show(write_run(tmp_path / "run", ROWS), *asked, "reward")


def test_a_run_without_sampled_lists(tmp_path):
    with pytest.raises(DataError, match="rollouts.jsonl: no such file.*log_lists=0"):
        show(tmp_path, 1, 1, None, "reward")
    with pytest.raises(DataError, match="no step was kept yet"):
        show(write_run(tmp_path / "run", []), 1, 1, None, "reward")


# ----------------------------------------------------------------------------------------------------------------------
# Browser


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_report(write_run(tmp_path_factory.mktemp("small") / "run", ROWS))


def shown_lists(page):
    """Text of the cells by row, without the column of ranks."""
    rows = page.locator("#v-lists tbody tr").all()
    return [[cell.inner_text() for cell in row.locator("td").all()[1:]] for row in rows]


def ready(page):
    page.wait_for_selector("#viewer[data-ready=yes]")
    return page


def test_the_viewer_shows_groups_and_filters_them(small):
    with open_page(small) as page:
        ready(page)
        assert page.locator("#v-count").inner_text() == "1 of 3 groups"
        cells = page.locator("#v-lists tbody td")
        assert cells.nth(1).inner_text().replace("\n", "") == "1.00hitHeat (1995)"
        assert (
            cells.nth(2).inner_text().split()[:3] == ["0.00", "repeat", "forced"]
            or "Ronin" in cells.nth(2).inner_text()
        )
        assert cells.nth(1).get_attribute("title") == "reward 1.00, advantage +0.70, ratio 1.100, log-prob -0.20"
        assert EVIL.replace("\u2028", "").split(" (")[0][:20] in page.locator("#v-lists").inner_text()
        assert page.locator("#viewer img").count() == 0
        assert "cut, end -0.10" in page.locator("#v-lists thead").inner_text()
        for kind, ids in (("hit", "a"), ("none", "bc"), ("differ", "ab"), ("flat", "c"), ("all", "abc")):
            page.select_option("#v-kind", kind)
            labels = page.locator("#v-group option").all_inner_texts()
            assert [label.split(": ")[1][0] for label in labels] == list(ids), kind
        page.select_option("#v-step", "5")
        assert page.locator("#v-count").inner_text() == "1 of 1 groups"
        page.select_option("#v-step", "all")
        page.fill("#v-search", "alien")
        assert page.locator("#v-group option").all_inner_texts() == ["step 5: c (0 hits, mean reward 0.00)"]
        page.fill("#v-search", "")
        page.fill("#v-least", "0.5")
        assert page.locator("#v-count").inner_text() == "1 of 1 groups"
        page.fill("#v-least", "2")
        assert page.locator("#v-count").inner_text() == "no group fits (of 3)" and shown_lists(page) == []


def test_the_viewer_by_keyboard(small):
    with open_page(small) as page:
        ready(page).locator("#viewer").scroll_into_view_if_needed()
        page.wait_for_timeout(200)
        count, colour = page.locator("#v-count"), page.locator("#v-lists tbody td").nth(1)
        for key, place in (("j", 2), ("ArrowRight", 3), ("j", 3), ("k", 2), ("ArrowLeft", 1), ("n", 3), ("p", 1)):
            page.keyboard.press(key)
            assert count.inner_text() == f"{place} of 3 groups", key
        colours = set()
        for by in ("advantage", "ratio", "logp", "reward"):
            page.keyboard.press("c")
            assert page.locator("#v-by").input_value() == by
            colours.add(colour.evaluate("cell => cell.style.backgroundColor"))
        assert len(colours) >= 2 and all(value.startswith("rgba(") for value in colours)
        page.keyboard.press("b")
        assert page.locator("#v-order").input_value() == "best"
        page.keyboard.press("/")
        page.keyboard.type("jb")  # into the field, and no key of the viewer
        assert page.locator("#v-search").input_value() == "jb" and count.inner_text() == "no group fits (of 3)"
        page.keyboard.press("Escape")
        assert page.evaluate("document.activeElement.id") != "v-search"


def test_a_page_of_five_thousand_lists(tmp_path):
    draw = random.Random(0)
    titles = [f"The {draw.randrange(10**6):x} of {draw.choice(['Night', 'Rome', 'Mars', 'Us'])} ({year})"
              for year in range(1930, 2026) for _ in range(60)]  # fmt: skip

    def numbers(low, high):
        return [round(draw.uniform(low, high), 4) for _ in range(20)]

    rows = [
        group(1 + place // 4, f"demo-{place:05d}", *(
            one_list(draw.sample(titles, 20), reward=numbers(0, 2), advantage=numbers(-2, 2), ratio=numbers(0.8, 1.2),
                     logp=numbers(-4, 0), marks=draw.choices(["", "hit", "repeat"], [18, 1, 1], k=20))
            for _ in range(8)
        ))
        for place in range(625)
    ]  # fmt: skip
    path = build_report(write_run(tmp_path / "run", rows))
    assert path.stat().st_size < 20_000_000 and len(re.search(r'id="v-data">([^<]*)<', path.read_text())[1]) < 15e6
    with open_page(path, viewport={"width": 1280, "height": 900}) as page:
        ready(page)
        assert page.locator("#v-count").inner_text() == "1 of 625 groups"
        assert len(shown_lists(page)) == 20 and len(shown_lists(page)[0]) == 8
        page.locator("#v-next").click()
