"""experiments/minimal.py: its step is that of `rankgrpo.train`, it stays short, and it runs."""

import re
from pathlib import Path

import pytest
import torch
from tiny_world import ALONE, keep_ends_of_lists, taught_dataset, tiny_config, tiny_dataset, tiny_demonstrations

from rankgrpo.data.order import BatchOrder
from rankgrpo.model.policy import open_policy
from rankgrpo.model.presets import load_policy, make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.sampler.base import prompt_seed
from rankgrpo.sft import train_sft
from rankgrpo.train import train
from rankgrpo_experiments import minimal

SCRIPT = Path(__file__).parents[1] / "experiments" / "minimal.py"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """The folder of a model that has learned lists a little."""
    folder = tmp_path_factory.mktemp("warm")
    size = tiny_config().model
    tiny = TinyConfig.of(size)
    init = make_init("tiny", taught_dataset(), folder / "init", seed=0, tiny=tiny)
    config = tiny_config("sft.num_steps=40", "sft.eval_every=40", "sft.save_every=40")
    return train_sft(config, tiny_dataset(), tiny_demonstrations(), init, folder / "sft", ALONE)


@pytest.mark.parametrize("returns", ["exp_inf", "log"])
@pytest.mark.parametrize("updates", [1, 2])
def test_a_step_moves_the_weights_as_train_does(warm, tmp_path, monkeypatch, returns, updates):
    # train leaves out what has no gradient: whole groups, of which there are none here, and the ends of lists.
    keep_ends_of_lists(monkeypatch)
    config = tiny_config(
        "rl.num_steps=1", "rl.kl_coef=0", "rl.lr=1e-3", "rl.group_size=8", "rl.token_budget=100000",
        f"rl.returns={returns}", f"rl.updates_per_batch={updates}",
        f"data.max_prompt_tokens={minimal.DATA.max_prompt_tokens}",
    )  # fmt: skip
    rl, dataset = config.rl, tiny_dataset()
    train(config, dataset, warm, tmp_path, ALONE)
    trained, _ = load_policy(tmp_path / "final")
    row = read_metrics(tmp_path / "metrics.jsonl")[0][1]
    assert row["groups/trained_frac"] == 1 and row["reward/mean"] > 0

    policy = open_policy(warm, config.model, torch.device("cpu"))
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    samples = [dataset.train[i] for i in BatchOrder(len(dataset.train), rl.prompts_per_step, config.seed).indices(0)]
    reward = minimal.train_step(
        policy,
        torch.optim.AdamW(policy.model.parameters(), rl.lr, rl.betas, rl.adam_eps, weight_decay=0.0, fused=True),
        dataset,
        samples,
        [prompt_seed(config.seed, 0, sample.id) for sample in samples],
        group_size=rl.group_size,
        num_ranks=config.data.num_ranks,
        max_new_tokens=rl.max_new_tokens,
        returns=returns,
        updates=updates,
    )
    assert reward == pytest.approx(row["reward/mean"] * config.data.num_ranks, rel=1e-6)
    moved = dict(policy.model.named_parameters())
    assert moved.keys() == dict(trained.named_parameters()).keys()
    for name, weight in trained.named_parameters():
        assert torch.equal(moved[name], weight), name
        assert not torch.equal(before[name], weight), name


def test_it_fits_on_a_few_screens():
    assert len(SCRIPT.read_text().splitlines()) <= 150


def test_it_prints_the_reward_of_every_step(capsys):
    minimal.main(["--steps=2", "--warm-steps=3", "--conversations=40", "--prompts=2"])
    rewards = re.findall(r"^step +(\d+): reward (\d+\.\d+) a list", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step, _ in rewards] == [1, 2]
