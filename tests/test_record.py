import json
from dataclasses import replace

import pytest
import torch
from tiny_world import byte_rollout, byte_scorer

from rankgrpo.config import RlConfig
from rankgrpo.data.samples import Candidate, Sample, Turn
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.rollouts.record import RolloutLog, describe_lists, logged_steps, read_rollouts
from rankgrpo.rollouts.score import score_groups
from rankgrpo.runtime.means import Means

CATALOG = Catalog([Item("Heat", 1995), Item("Ronin", 1998), Item("Thief", 1981), Item("Alien", 1979)])
EXAMPLE = Sample("a", (Turn("user", "I like Alien (1979)"),), ("Alien",), (("Heat", 1995), ("Thief", 1981)))
OTHER = replace(EXAMPLE, id="b", groundtruth=(("Alien", 1979),), seen_titles=())
FULL = "Ronin (1998)\nHeat (1995)\nThief (1981)"
ODD = "Alien (1979)\n\nno year\nNowhere (2050)\nAlien (1979)"
SHORT = "Heat (1995)"


def make(*texts, examples=(EXAMPLE,), **settings):
    """A scorer, the groups of `texts` (as many for each example) and how they were scored."""
    size = len(texts) // len(examples)
    rollouts = [byte_rollout(text) if isinstance(text, str) else text for text in texts]
    groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
    scorer = byte_scorer(CATALOG, RlConfig(group_size=size, **settings), 3)
    return scorer, groups, score_groups(groups, list(examples), scorer, Means())


def describe(*texts, log_ratios=None, **settings):
    scorer, groups, scored = make(*texts, **settings)
    return describe_lists(0, EXAMPLE, groups[0], scorer, scored, None, log_ratios or {})


@pytest.mark.parametrize(
    ("num_steps", "max_lists", "a_step", "steps"),
    [
        (100, 90, 30, {1, 50, 100}),
        (100, 60, 30, {1, 100}),
        (100, 59, 30, {100}),
        (100, 29, 30, set()),
        (3, 9000, 30, {1, 2, 3}),
        (1, 9000, 30, {1}),
    ],
)
def test_steps_are_spread_from_the_first_to_the_last(num_steps, max_lists, a_step, steps):
    assert logged_steps(num_steps, max_lists=max_lists, lists_a_step=a_step) == steps


def test_what_a_line_earned():
    full, odd = describe(FULL, ODD)
    half = round(0.5 / (2**-0.5 + 1e-4), 4)
    assert full["lines"] == FULL.split("\n") and full["marks"] == ["", "hit", "hit"]
    assert full["reward"] == [0, 1, 1] and full["advantage"] == [0, half, half]
    assert odd["lines"] == ["Alien (1979)", "no year", "Nowhere (2050)", "Alien (1979)"]
    assert odd["marks"] == ["seen", "unread", "out", "repeat seen"]
    assert odd["reward"] == [0, 0, 0, None]  # the fourth line is beyond K = 3 and pays the penalty of overflow
    assert odd["advantage"] == [0, -half, -half, -0.1]
    assert full["logp"] == [-0.5] * 3 and (full["finished"], full["num_tokens"]) == (True, len(FULL) + 1)
    assert full["ratio"] == [None] * 3 and "end" not in full


def test_what_is_no_candidate_is_out_and_what_was_seen_is_marked_however_it_was_written():
    wanted = (Candidate("Heat", 1995), Candidate("Ronin", 1998), Candidate("Thief", 1981))
    example = replace(EXAMPLE, candidates=wanted, seen_titles=("Alien (1979)", "Heat (1995)", "Nowhere"))
    texts = "Heat (1995)\nAlien (1979)\nThief (1981)", "Nowhere (2050)\nRonin (1998)\nno year"
    scorer, groups, scored = make(*texts, examples=(example,))
    lists = describe_lists(0, example, groups[0], scorer, scored, None, {})
    assert [one["marks"] for one in lists] == [["seen", "seen out", "hit"], ["seen out", "", "unread"]]


def test_the_end_of_a_short_list_is_a_unit_of_its_own():
    short, cut = describe(SHORT, byte_rollout(SHORT, finished=False))
    assert short["end"] == -0.1 and "end" not in cut and not cut["finished"]
    assert "end" not in describe(SHORT, FULL, early_eos_penalty=0.0)[0]
    assert describe(FULL, SHORT, full_list_bonus=0.3)[0]["end"] == 0.3


def test_ratios_are_geometric_means_over_the_tokens_of_a_line():
    moved_T = torch.zeros(len(FULL) + 1)
    start, stop = FULL.index("Heat"), FULL.index("Thief")  # "Heat (1995)\n", twelve tokens
    moved_T[start : start + 4] = 0.3
    full, other = describe(FULL, FULL, log_ratios={0: moved_T})
    mean = pytest.approx(2.718281828 ** (4 * 0.3 / 12), abs=5e-5)
    assert stop - start == 12 and full["ratio"] == [1, mean, 1]
    assert other["ratio"] == [None] * 3
    cut, _ = describe(FULL, FULL, log_ratios={0: moved_T[:stop]})
    assert cut["ratio"] == [1, mean, None]
    assert describe(FULL, FULL, log_ratios={0: moved_T[: stop - 1]})[0]["ratio"] == [1, None, None]


def test_units_without_ranks_have_one_advantage_for_all_lines():
    full, odd = describe(FULL, ODD, unit="list")
    scored = make(FULL, ODD, unit="list")[2]
    assert full["advantage"] == [pytest.approx(float(scored.advantage_PGU[0, 0, 0]), abs=5e-5)] * 3
    assert len(odd["advantage"]) == 4 and len(set(odd["advantage"])) == 1 and odd["advantage"][0] < 0
    assert describe(FULL, ODD, unit="token")[0]["advantage"] == full["advantage"]


def test_a_list_without_lines():
    empty, _ = describe(byte_rollout("", finished=False), FULL)
    assert [empty[name] for name in ("lines", "marks", "reward", "advantage", "ratio", "logp")] == [[]] * 6


def test_lines_that_the_catalog_forces():
    from rankgrpo.rollouts import record

    class AllButTheFirst:
        """Stands for `Choices`: of two lists, every token of the first line is a choice and no other."""

        def of_lists(self, lists):
            assert lists == [2, 3]  # the second group's
            self.length, self.start = torch.tensor([38, 38]), torch.tensor([0, 38])
            self.is_choice = torch.arange(76).remainder(38).lt(13).numpy()
            return self

    scorer, groups, scored = make(FULL, FULL, FULL, FULL, examples=(EXAMPLE, OTHER))
    assert len(groups[1][0].token_ids) == 38
    lists = record.describe_lists(1, OTHER, groups[1], scorer, scored, AllButTheFirst(), {})
    assert lists[1]["marks"] == ["", "forced", "forced"]


def write(path, resume_step=0, steps=range(1, 7), **settings):
    scorer, groups, scored = make(FULL, ODD, FULL, SHORT, examples=(EXAMPLE, OTHER), num_steps=6, **settings)
    log = RolloutLog(path, scorer, num_prompts=2, resume_step=resume_step)
    for step in steps:
        if log.wants(step):
            log.write(step, [EXAMPLE, OTHER], groups, scored, None, {})
    return path


def test_the_file_is_bounded_and_read_back(tmp_path):
    path = write(tmp_path / "rollouts.jsonl", log_lists=12)  # three steps of two groups of two lists
    rows, cut_short = read_rollouts(path)
    assert cut_short is None
    assert [(row["step"], row["id"]) for row in rows] == [(1, "a"), (1, "b"), (3, "a"), (3, "b"), (6, "a"), (6, "b")]
    assert rows[1]["groundtruth"] == [["Alien", 1979]] and rows[1]["conversation"][0]["role"] == "user"
    assert rows[1]["lists"][0]["marks"] == ["", "", ""] and rows[0]["lists"][0]["marks"] == ["", "hit", "hit"]
    assert {len(row["lists"]) for row in read_rollouts(write(tmp_path / "few", log_lists=3))[0]} == {2}
    assert not write(tmp_path / "none", log_lists=0).exists()


def test_resuming_cuts_the_file_back(tmp_path):
    whole = write(tmp_path / "whole").read_bytes()
    path = write(tmp_path / "cut", steps=range(1, 6))
    with path.open("a") as file:
        file.write('{"step": 6, "id')
    assert write(path, resume_step=4, steps=range(5, 7)).read_bytes() == whole
    write(path, resume_step=0, steps=())  # a run that began anew
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "broken JSON"),
        ('{"step": "x"}', "needs 'step', int"),
        ('{"step":1,"id":"a","conversation":[],"groundtruth":[],"lists":[{"lines":["x"]}]}', "lists of one length"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "rollouts.jsonl")
    good = path.read_text()
    path.write_text(line + "\n" + good)
    with pytest.raises(ValueError, match=f"rollouts.jsonl:1: .*{message}"):
        read_rollouts(path)
    path.write_text(good + '{"st')
    rows, cut_short = read_rollouts(path)
    assert len(rows) == len(good.splitlines()) and "was skipped" in cut_short


def test_text_that_is_no_title_survives(tmp_path):
    text = 'he said "x"\u2028</script> (1995)\n\x00\x01 é'
    scorer, groups, scored = make(text, FULL)
    path = tmp_path / "rollouts.jsonl"
    log = RolloutLog(path, scorer, num_prompts=1, resume_step=0)
    log.write(1, [EXAMPLE], groups, scored, None, {})
    assert read_rollouts(path)[0][0]["lists"][0]["lines"] == ['he said "x"\u2028</script> (1995)', "\x00\x01 é"]
    assert json.loads(path.read_text())["lists"][0]["marks"] == ["out", "unread"]


def test_log_probs_are_means_over_the_tokens_of_a_line():
    rollout = byte_rollout(FULL)
    logp = [-0.1] * 13 + [-0.2] * 12 + [-0.3] * 13
    full, _ = describe(replace(rollout, logp=logp), FULL)
    assert full["logp"] == [-0.1, -0.2, -0.3]
