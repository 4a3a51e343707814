import math
import sys
from dataclasses import replace

import pytest
import torch
from tiny_world import byte_rollout, byte_scorer

from rankgrpo.config import PARTS, RlConfig, reward_terms
from rankgrpo.config_file import load_config
from rankgrpo.data.candidates import sample_catalog
from rankgrpo.data.samples import Candidate, Sample, Turn
from rankgrpo.errors import ConfigError, TrainingError
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.rollouts.parts import Answer, _own_parts, load_parts, measure
from rankgrpo.rollouts.score import score_groups
from rankgrpo.runtime.distributed import Parallel
from rankgrpo.runtime.means import Means

# Shape letters: P prompts, G lists a prompt, K ranks.

K = 4
CATALOG = Catalog(
    [Item("Heat", 1995, popularity=7), Item("Ronin", 1998, popularity=1), Item("Thief", 1981), Item("Alien", 1979)]
)
EXAMPLE = Sample("s-17", (Turn("user", "I like Alien (1979)"),), ("Alien",), (("Heat", 1995), ("Thief", 1981)))
MIXED = "Ronin (1998)\nno year\nHeat (1995)\nRONIN (1998)\nThief (1981)"
SHORT = "Thief (1981)\nNowhere (2050)"
ALONE = Parallel(0, 1, torch.device("cpu"))

# ----------------------------------------------------------------------------------------------------------------------
# A user's functions, imported by this module's name


def by_rank(answer):
    return [float(rank) for rank in range(answer.num_ranks)]


def by_list(answer):
    return len(answer.sample.conversation) * (2.0 if answer.finished else 1.0)


def too_long(answer):
    return [0.0] * (answer.num_ranks + 1)


def nothing(answer):
    return None


def not_a_number(answer):
    return torch.tensor([1.0, math.nan, 0.0, 0.0])


def raising(answer):
    return answer.titles


def changing(answer):
    return 1.0 if len(answer.items) > 2 else by_rank(answer)


OF_NO_USE = 3


def answer(text, finished=True):
    return Answer(EXAMPLE, text, finished, CATALOG, K)


def score(*texts, **settings):
    means = Means()
    group = [byte_rollout(text) for text in texts]
    rl = RlConfig(group_size=len(group), **settings)
    return score_groups([group], [EXAMPLE], byte_scorer(CATALOG, rl, K), means), means.reduce(ALONE)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("relevance", {"relevance": 1}),
        ("relevance + 0.1 * in_catalog", {"relevance": 1, "in_catalog": 0.1}),
        (" -2e-1*repetition+relevance-length ", {"repetition": -0.2, "relevance": 1, "length": -1}),
        ("relevance + 3 * my.package:func_2 - 0 * format", {"relevance": 1, "my.package:func_2": 3, "format": 0}),
    ],
)
def test_terms(text, expected):
    assert reward_terms(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("relevance +", "cannot read '[+]'"),
        ("relevance in_catalog", "cannot read 'in_catalog'"),
        ("relevance * 2", "cannot read '[*] 2'"),
        ("relevance + 1.2.3 * format", "'1.2.3' is no number"),
        ("relevanse", "unknown part 'relevanse'; parts are relevance, format, .* package.module:function"),
        ("format + 2 * format", "'format' is given twice"),
    ],
)
def test_mistakes_in_a_reward_fail_when_the_configuration_is_read(text, message):
    with pytest.raises(ConfigError, match=f"^rl.reward: .*{message}"):
        load_config(None, [f"rl.reward={text}"])


def test_every_part_that_is_documented_is_there():
    assert list(_own_parts(1)) == list(PARTS)


@pytest.mark.parametrize(
    ("name", "mixed", "short"),
    [
        ("relevance", [0, 0, 1, 0], [1, 0, 0, 0]),
        ("format", [1, 0, 1, 1], [1, 1, 0, 0]),
        ("in_catalog", [1, 0, 1, 1], [1, 0, 0, 0]),
        ("repetition", [0, 0, 0, 1], [0, 0, 0, 0]),
        ("novelty", [2 / 3, 0, 0, 2 / 3], [1, 0, 0, 0]),  # log 2 / log 8 = 1/3
        ("length", 4 / 5, 2 / 4),
    ],
)
def test_what_a_part_measures(name, mixed, short):
    (part,) = load_parts(name, CATALOG).values()
    found = measure(name, part, [answer(MIXED), answer(SHORT), answer("")])
    torch.testing.assert_close(found, torch.tensor([mixed, short, [0] * K if found.ndim == 2 else 0]).float())


def test_a_weighted_sum_by_rank_and_by_list():
    reward = f"2 * relevance + 0.5 * in_catalog - {__name__}:by_list - 0.25 * length"
    scored, means = score(MIXED, SHORT, reward=reward)
    by_hand = [[0.5, 0, 2.5, 0.5], [2.5, 0, 0, 0]]
    offsets = [-2 - 0.25 * 4 / 5, -2 - 0.25 * 2 / 4]
    expected = torch.tensor([[[value + offset for value in row] for row, offset in zip(by_hand, offsets, strict=True)]])
    torch.testing.assert_close(scored.reward_PGK, expected)
    assert means["reward_part/relevance"] == 2 / 8 and means["reward_part/in_catalog"] == 4 / 8
    assert means[f"reward_part/{__name__}:by_list"] == 2 and means["reward_part/length"] == pytest.approx(0.65)
    assert "reward_part/format" not in means
    assert means["reward/mean"] == pytest.approx(expected.mean().item())
    assert means["list/hits_mean"] == 1.0  # hits stay hits, whatever they earn


def test_returns_and_dcg_are_taken_of_the_parts_by_rank():
    scored, _ = score(MIXED, SHORT, reward=f"{__name__}:by_rank", returns="exp", gamma=2.0)
    assert scored.reward_PGK[0, 0].tolist() == [0 + 1 / 2 + 2 / 4 + 3 / 8, 1 + 2 / 2 + 3 / 4, 2 + 3 / 2, 3]
    settings = {"unit": "list", "scale_by_std": False}
    scored, _ = score(MIXED, SHORT, reward="relevance + 0.5 * length", **settings)
    lists = [1 / math.log2(4) + 0.5 * 4 / 5, 1 / math.log2(2) + 0.5 * 2 / 4]
    half = (lists[0] - lists[1]) / 2
    torch.testing.assert_close(scored.advantage_PGU, torch.tensor([[[half], [-half]]]))


def test_parts_without_weight_are_only_logged_and_unlikeliness_cuts_hits_alone():
    plain, _ = score(MIXED, SHORT)
    watched, means = score(MIXED, SHORT, reward="relevance + 0 * novelty")
    assert torch.equal(plain.advantage_PGU, watched.advantage_PGU) and means["reward_part/novelty"] > 0
    settings = {"unit": "list", "scale_by_std": False, "unlikeliness": 0.5}
    alone, together = (score(MIXED, SHORT, reward=r, **settings)[0] for r in ("relevance", "relevance + 3 * length"))
    gained = 3 * (4 / 5 - 2 / 4) / 2
    torch.testing.assert_close(together.advantage_PGU - alone.advantage_PGU, torch.tensor([[[gained], [-gained]]]))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_long", r"expected one number, or one for each of the 4 ranks; got the shape \(5,\)"),
        ("nothing", "expected numbers, got None"),
        ("not_a_number", r"not finite: \[1.0, nan, 0.0, 0.0\]"),
        ("raising", "it raised AttributeError: 'Answer' object has no attribute 'titles'"),
        ("changing", "one number a list for some lists, one a rank for others"),
    ],
)
def test_a_part_that_fails_is_named_with_the_sample(function, message):
    with pytest.raises(TrainingError, match=f"reward part '{__name__}:{function}', sample 's-17': .*{message}"):
        score(MIXED, SHORT, reward=f"relevance + {__name__}:{function}")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("no_such_module:f", "cannot import 'no_such_module'"),
        (f"{__name__}:absent", f"module '{__name__}' has no 'absent'"),
        (f"{__name__}:OF_NO_USE", "is not a function but int"),
    ],
)
def test_a_part_that_cannot_be_had_is_named(reward, message):
    with pytest.raises(ConfigError, match=f"^rl.reward: .*{message}"):
        load_parts(reward, CATALOG)


def test_novelty_needs_popularity():
    with pytest.raises(ConfigError, match="popularity in the catalog"):
        load_parts("novelty", Catalog([Item("Heat", 1995)]))


def test_novelty_goes_by_the_whole_catalog_whatever_the_candidates():
    part = load_parts("novelty", CATALOG)["novelty"]
    ronin, thief = (Candidate(item.title, item.year) for item in CATALOG.items[1:3])
    answers = []
    for text, candidates in ((MIXED, (ronin, thief)), (SHORT, (thief,))):  # of the second nobody was asked for
        example = replace(EXAMPLE, candidates=candidates, groundtruth=(("Thief", 1981),))
        answers.append(Answer(example, text, True, sample_catalog(example, CATALOG), K))
    found = measure("novelty", part, answers)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 0, 0, 2 / 3], [1, 0, 0, 0]]))


def test_functions_of_the_working_folder_are_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def half(answer):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))  # the folder is added to it
    (part,) = load_parts("rewards_of_mine:half", CATALOG).values()
    assert measure("half", part, [answer(SHORT)]).tolist() == [0.5]
