"""Rounds of a step: fresh conversations until enough groups have a gradient, and more lists for hard ones."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from test_trouble import warm  # noqa: F401  (a fixture)
from tiny_world import ALONE, byte_rollout, byte_scorer, tiny_config, tiny_dataset

from rankgrpo.config_file import load_config
from rankgrpo.data.samples import Sample, Turn
from rankgrpo.errors import ConfigError
from rankgrpo.items.catalog import Catalog, Item
from rankgrpo.rollouts.rounds import RoundMaker, make_rounds
from rankgrpo.runtime.means import Means
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.train import train

CATALOG = Catalog([Item("A", 1990), Item("B", 1991), Item("C", 1992)])
HIT, MISS = "A (1990)\nB (1991)", "C (1992)\nB (1991)"


class Scripted:
    """Gives every conversation its lists in the order written: H hits at rank 0, M does not."""

    def __init__(self, script):
        self.left, self.seeds = {key: list(letters) for key, letters in script.items()}, []

    def sample(self, prompts, *, group_size, seeds, **_):
        self.seeds += seeds
        letters = [[self.left[prompt[0]].pop(0) for _ in range(group_size)] for prompt in prompts]
        return [[byte_rollout(HIT if letter == "H" else MISS) for letter in group] for group in letters]


class Order:
    """Two conversations a batch, in order."""

    def indices(self, batch):
        return [2 * batch, 2 * batch + 1]


def rounds_of(script, *words, num_samples=8):
    words = ["data.num_ranks=2", "rl.group_size=2", "rl.prompts_per_step=2", "rl.kl_coef=0", *words]
    config = load_config(None, words)
    samples = [Sample(str(i), (Turn("user", "hi"),), (), (("A", 1990),)) for i in range(num_samples)]
    sampler, means = Scripted(script), Means()
    scorer = byte_scorer(CATALOG, config.rl, 2)
    policy = SimpleNamespace(constraint=None)
    maker = RoundMaker(policy, sampler, scorer, samples, [[i] for i in range(num_samples)], [[]] * num_samples, config)
    rounds, following = make_rounds(maker, Order(), 0, 7, means, ALONE)
    return rounds, following, means.reduce(ALONE), sampler


def test_usually_a_step_is_one_round_and_all_groups_count():
    (only,), following, metrics, _ = rounds_of({0: "HM", 1: "MM"})
    assert following == 1 and only.kept == [0, 1] and only.chosen == [0] and only.flat == [1]
    assert only.denominator == 2 * 2 * 2  # conversations, lists, ranks
    assert "groups/rounds" not in metrics


def test_fresh_conversations_follow_until_enough_groups_have_a_gradient():
    script = {0: "HM", 1: "MM", 2: "HH", 3: "MM", 4: "MH", 5: "HM", 6: "HM", 7: "HM"}
    rounds, following, metrics, _ = rounds_of(script, "rl.live_groups=3")
    assert [one.indices for one in rounds] == [[0, 1], [2, 3], [4, 5]] and following == 3
    assert [one.kept for one in rounds] == [[0], [], [0, 1]]
    assert [one.denominator for one in rounds] == [4, 0, 8]  # only those with a gradient count
    assert (metrics["groups/rounds"], metrics["groups/live"]) == (3, 3)


def test_rounds_are_bounded():
    rounds, following, metrics, _ = rounds_of(dict.fromkeys(range(8), "MM"), "rl.live_groups=1", "rl.max_rounds=2")
    assert len(rounds) == 2 and following == 2 and metrics["groups/live"] == 0
    assert sum(one.denominator for one in rounds) == 0


def test_hard_conversations_get_more_lists_and_their_group_is_all_of_them():
    (first, larger), following, metrics, sampler = rounds_of({0: "HM", 1: "MMHM"}, "rl.hard_group_size=4")
    assert following == 1 and first.kept == [0] and first.denominator == 4
    assert larger.indices == [1] and larger.denominator == 8 and larger.chosen == [0]
    assert [rollout.text == HIT for rollout in larger.rollouts[0]] == [False, False, True, False]
    # Rewards 0, 0, 1, 0: mean 0.25, unbiased variance (3 * 0.0625 + 0.5625) / 3 = 0.25.
    expected = torch.tensor([-0.25, -0.25, 0.75, -0.25]) / (0.5 + 1e-4)
    assert torch.allclose(larger.scored.advantage_PGU[0, :, 0], expected)
    assert metrics["groups/hard_live_frac"] == 1 and metrics["reward/mean"] == 1 / 8  # of the lists all get
    assert len(set(sampler.seeds)) == 3  # the new lists have a seed of their own


def test_hard_groups_without_luck_stay_out_of_the_gradient_and_in_the_count():
    (first, larger), *_ = rounds_of({0: "HM", 1: "MMMM"}, "rl.hard_group_size=4")
    assert larger.chosen == [] and larger.kept == [0] and first.denominator + larger.denominator == 12
    (first, larger), _, metrics, _ = rounds_of(
        {0: "HM", 1: "MMMM"}, "rl.hard_group_size=4", "rl.live_groups=1", "rl.max_rounds=1"
    )
    assert larger.kept == [] and (first.denominator, larger.denominator) == (4, 0)


def test_token_means_count_the_tokens_of_the_groups_kept():
    script = {0: "HM", 1: "MM"}
    words = ("rl.unit=token", "rl.token_mean=batch", "rl.live_groups=1", "rl.max_rounds=1")
    (only,), *_ = rounds_of(script, *words)
    assert only.denominator == len(HIT) + 1 + len(MISS) + 1  # a token a byte, and the end


def test_a_hard_group_must_be_larger():
    with pytest.raises(ConfigError, match="rl.hard_group_size: must be above rl.group_size = 8"):
        load_config(None, ["rl.hard_group_size=8"])
    with pytest.raises(ConfigError, match="rl.vllm_tp"):
        load_config(None, ["rl.hard_group_size=9", "rl.vllm_tp=2"])


@pytest.mark.parametrize("constrain", ["none", "catalog"])
def test_a_run_with_rounds_that_was_stopped_goes_on_bitwise(constrain, warm, tmp_path):  # noqa: F811
    config = tiny_config("rl.live_groups=3", "rl.max_rounds=3", "rl.hard_group_size=5", "rl.num_steps=4",
                         "rl.kl_coef=0", "rl.overflow_penalty=0", "rl.early_eos_penalty=0",
                         f"rl.constrain={constrain}")  # fmt: skip

    def numbers(folder):
        train(config, tiny_dataset(), warm, folder, ALONE)
        rows = read_metrics(folder / "metrics.jsonl")[0]
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]

    whole = numbers(tmp_path / "a")
    assert max(row["groups/rounds"] for row in whole[1:]) > 1
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    shutil.rmtree(tmp_path / "b" / "final")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-00000004")
    assert numbers(tmp_path / "b") == whole
