"""Each of the usual answers to why RL hurt: on either side of its threshold, with the number it shows."""

import numpy as np
import pytest

from rankgrpo.data.samples import Sample, Turn
from rankgrpo.evaluation.evaluate import compare, score_items
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.report.diagnosis import CHECKS, Evidence, diagnose, ends

CATALOG = Catalog([Item(f"Film {letter}", 1990 + place) for place, letter in enumerate("ABCDEFGHIJ")])
CONFIG = {"data": {"num_ranks": 4}, "rl": {"lr": 1e-5, "group_size": 8, "kl_coef": 0.001, "updates_per_batch": 2}}


def curve(*values):
    return np.arange(1, len(values) + 1), np.array(values, dtype=float)


def scored(*lists):
    """Lists of catalog indices of K = 4, for users who want item 0."""
    samples = [Sample(f"s{place}", (Turn("user", "hi"),), (), (("Film A", 1990),)) for place in range(len(lists))]
    return score_items(samples, lists, CATALOG, num_ranks=4)


def evidence(lists=None, **curves):
    rl = {"reward/mean": curve(0.1, 0.1)} | {key.replace("__", "/"): value for key, value in curves.items()}
    pair = ("sft", "rank-grpo") if lists and "rank-grpo" in lists else None
    gain = compare(lists["sft"], lists["rank-grpo"]) if pair else None
    return Evidence(rl, CONFIG, lists or {}, pair, gain)


def only(name, e):
    (found,) = [check for check in (check(e) for check in CHECKS) if check is not None and check.name == name]
    return found


def lists(before, after, popular=((0, 1, 2, 3),)):
    return {"sft": scored(*before), "rank-grpo": scored(*after), "popularity": scored(*popular)}


WIDE = [(0, 1, 2, 3), (4, 5, 6, 7)]
NARROW = [(0, 1, 2, 3), (1, 0, 2, 4)]
GRADIENT, VALID = "groups__gradient_frac", "eval_free__in_catalog_frac"
CASES = [
    ("Groups without a gradient", {GRADIENT: curve(1, 1, 1, 0.4)}, "60.0% of the groups", {GRADIENT: curve(0, 0.6)}),
    ("Ranks without a gradient", {"reward__zero_std_frac": curve(0.5, 0.97)}, "97.0% of the (conversation, rank) cells",
     {"reward__zero_std_frac": curve(0.99, 0.94)}),
    ("Coverage of the catalog", {"lists": lists(WIDE, NARROW)}, "8 → 5 different items",
     {"lists": lists(NARROW, WIDE)}),
    ("Drift to what is popular", {"lists": lists(WIDE, NARROW)}, "50.0% → 87.5% of the lines name one of the 4",
     {"lists": lists(NARROW, WIDE)}),
    ("Validity of free lists", {VALID: curve(0.99, 0.93)}, "99.0% → 93.0% of the lines of free lists",
     {VALID: curve(0.92, 0.91)}),
    ("Validity of free lists", {"eval__in_catalog_frac": curve(0.85, 0.88)}, "85.0% → 88.0% of the lines name",
     {"eval__in_catalog_frac": curve(0.95, 0.97)}),
    ("Entropy of the policy", {"policy__entropy": curve(2, 2, 2, 0.9)}, "2.00 → 0.90 a token",
     {"policy__entropy": curve(2, 1.2)}),
    ("Entropy of the policy", {"policy__entropy": curve(9, 9), "policy__entropy_a_choice": curve(2, 3.2)},
     "2.00 → 3.20 a choice", {"policy__entropy": curve(2, 2.9)}),
    ("Training reward against validation",
     {"reward__mean": curve(0.1, 0.12), "eval__ndcg@4": curve(0.2, 0.19), "eval__ndcg@2": curve(0.1, 0.5)},
     "training reward +20.0%, validation NDCG@4 -5.0%",
     {"reward__mean": curve(0.1, 0.12), "eval__ndcg@4": curve(1, 2)}),
    ("Clipped ratios", {"ratio__clip_low_frac": curve(0.1, 0.2), "ratio__clip_high_frac": curve(0.1, 0.1)},
     "25.0% of the units", {"ratio__clip_low_frac": curve(0.1, 0.1), "ratio__clip_high_frac": curve(0.05, 0.05)}),
    ("Lists cut before their end", {"list__finished_frac": curve(1, 0.8)}, "0.0% → 20.0% of the sampled lists",
     {"list__finished_frac": curve(0.5, 0.95)}),
    ("Length of the lists", {"list__items_mean": curve(4, 4.5)}, "4.0 → 4.5 lines, asked for 4",
     {"list__items_mean": curve(9, 3.7)}),
    ("Repeats", {"list__duplicate_frac": curve(0.05, 0.2)}, "5.0% → 20.0% of the lines",
     {"list__duplicate_frac": curve(0.3, 0.09)}),
    ("Effect by rank", {"lists": lists([(0, 1, 2, 3), (1, 2, 3, 4)], [(1, 0, 2, 3), (1, 2, 3, 0)])},
     "hit rate 0.5000 → 0.0000 at ranks 1 to 1, 0.0000 → 0.3333 below",
     {"lists": lists([(1, 0, 2, 3)], [(0, 1, 2, 3)])}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "bad", "shown", "good"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_a_warning_and_none(name, bad, shown, good):
    warned, fine = only(name, evidence(**bad)), only(name, evidence(**good))
    assert warned.warns and not fine.warns
    assert warned.value.startswith(shown) and warned.threshold and "rl." in warned.advice


def test_every_check_has_a_case():
    nothing = [check(evidence()) for check in CHECKS]
    assert nothing == [None] * len(CHECKS)  # what was not logged is no answer
    assert len({case[0] for case in CASES}) == len(CHECKS)


def test_advice_says_what_is_set():
    advice = only("Groups without a gradient", evidence(**{GRADIENT: curve(0)})).advice
    assert "rl.group_size (now 8)" in advice and "rl.reward;" in advice


def test_quarters():
    assert ends(np.array([1.0, 3, 9, 9, 9, 9, 4, 6])) == (2.0, 5.0)
    assert ends(np.array([2.0, np.nan])) == (2.0, 2.0) and ends(np.array([np.nan])) is None


def test_verdicts():
    best, worst = [(0, 1, 2, 3)] * 9, [(1, 2, 3, 0)] * 9
    found = diagnose(evidence(lists(worst, best), list__duplicate_frac=curve(0.2, 0.2)))
    assert found["gained"] and found["verdict"].startswith("It did not: RL gained (NDCG@4 .4307 → 1.0000, +132.2% [")
    assert found["num_warnings"] == 1 and found["checks"][0].name == "Repeats"
    hurt = diagnose(evidence(lists(best, worst)))
    assert not hurt["gained"] and hurt["verdict"].startswith("RL hurt (NDCG@4 1.0000 → .4307, -56.9%")
    assert diagnose(evidence(lists(best, best)))["verdict"].startswith("RL changed nothing")
    early = diagnose(evidence(**{"eval__ndcg@4": curve(0.2, 0.19)}))
    assert early["verdict"].endswith("In validation, NDCG@4 went from .2000 to .1900.") and not early["gained"]


def test_a_run_without_rl_has_no_section():
    assert diagnose(Evidence({}, CONFIG, {}, None, None)) is None
    both = {"before": scored((1, 0, 2, 3)), "sft": scored((0, 1, 2, 3))}
    gain = compare(both["before"], both["sft"])
    assert diagnose(Evidence({"reward/mean": curve(1)}, CONFIG, both, ("before", "sft"), gain)) is None
