"""Loss and estimator in SkyRL: its own registries, tensors, reductions and losses."""

import ast
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absent import absent, bare_package

if os.environ.get("PEER") == "hosts":
    absent("jaxtyping", "loguru", "omegaconf", "skyrl.train.config", ray={"is_initialized": lambda: False})
    for name in ("skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"):
        bare_package(name)
    for name in ("skyrl.train", "skyrl.train.dataset"):
        bare_package(name)
else:
    pytest.skip("SkyRL has an environment of its own: `make test-hosts`", allow_module_level=True)

from lists import (
    EOS,
    GROUP,
    HIGH,
    LISTS,
    LOW,
    REWARD_BK,
    advantages,
    assert_same_gradient,
    log_probs,
    padded,
    script_of,
)
from skyrl.backends.skyrl_train.utils import ppo_utils
from skyrl.train.dataset.preprocess import convert_prompts_responses_to_batch_tensors
from toy import K, make_tokenizer

from rankgrpo.errors import ConfigError
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations.marks import mark_lists
from rankgrpo.rollouts.integrations.skyrl import policy_loss, register
from rankgrpo.units import hide_units, make_units

# Shape letters: B lists, T tokens, K ranks.

OFF = SimpleNamespace(
    tis_ratio_type=None, sequence_mask_metric=None, outlier_token_is_threshold_low=None,
    outlier_token_is_threshold_high=None, token_mask_is_threshold_low=None, token_mask_is_threshold_high=None,
)  # fmt: skip

ON = SimpleNamespace(**vars(OFF) | {"tis_ratio_type": "token"})


def config(**changes):
    settings = {
        "policy_loss_type": "regular", "loss_reduction": "seq_mean_token_sum_norm", "max_seq_len": 1000,
        "eps_clip_low": LOW, "eps_clip_high": HIGH, "use_kl_in_reward": False, "advantage_batch_normalize": False,
        "off_policy_correction": OFF,
    }  # fmt: skip
    return SimpleNamespace(**settings | changes)


def right_aligned(value_BT):
    """Lists end at the right edge in SkyRL."""
    width = value_BT.shape[1]
    rows = [
        torch.cat([row.new_zeros(width - len(ids)), row[: len(ids)]]) for row, ids in zip(value_BT, LISTS, strict=True)
    ]
    return torch.stack(rows)


def left_aligned(value_BT):
    rows = [row[len(row) - len(ids) :].tolist() for row, ids in zip(value_BT, LISTS, strict=True)]
    return padded(rows)


def batch(tokenizer):
    """What SkyRL's trainer makes of a generator's output with marked rewards."""
    marks = mark_lists(LISTS, REWARD_BK.tolist(), K, RankSegmenter(tokenizer), [EOS])
    prompts = [[3] * (2 + place % 3) for place in range(len(LISTS))]
    loss_masks = [[1] * len(ids) for ids in LISTS]
    made = convert_prompts_responses_to_batch_tensors(tokenizer, prompts, LISTS, marks, loss_masks)
    return made[2], made[3], made[4]


def reduced(advantage_BT, loss_mask_BT, settings):
    return ppo_utils.apply_loss_reduction_to_advantages_minibatch(
        advantage_BT, loss_mask_BT, settings.loss_reduction, micro_batch_size=2, max_seq_len=settings.max_seq_len
    )


@pytest.mark.parametrize(
    "parts, dp_size", [([range(6)], 1), ([[0, 3], [4, 5], [1, 2]], 1), ([[0, 3, 4], [5, 1, 2]], 2)]
)
def test_skyrls_loss_has_our_gradient(parts, dp_size):
    """From a generator's rewards on: one micro-batch, three, and two processes, whose gradients SkyRL averages."""
    register(num_ranks=K)
    register(num_ranks=K)
    tokenizer, settings = make_tokenizer(), config()
    action_mask_BT, reward_BT, loss_mask_BT = batch(tokenizer)
    index = [place // GROUP for place in range(len(LISTS))]
    advantage_BT, _ = ppo_utils.compute_advantages_and_returns(
        reward_BT, action_mask_BT, index, "rank_grpo", settings, values=None, grpo_norm_by_std=True
    )
    advantage_BT = reduced(advantage_BT, loss_mask_BT, settings)
    logp_BT, old_BT = (right_aligned(value_BT) for value_BT in log_probs())
    logp_BT.requires_grad_()
    function = ppo_utils.PolicyLossRegistry.get("rank_grpo")
    for lists in map(list, parts):
        # As the worker calls it and scales what it gets.
        loss, metrics = function(
            logp_BT[lists], old_BT[lists], advantage_BT[lists], config=settings, loss_mask=loss_mask_BT[lists].float(),
            rollout_logprobs=None,
        )  # fmt: skip
        (loss * dp_size / dp_size).backward()
        assert set(metrics) == {"clip_ratio", "rank_ratio_mean"}
    assert_same_gradient(left_aligned(logp_BT.grad), tokenizer)


def test_with_a_token_as_unit_it_is_the_hosts_loss():
    tokenizer = make_tokenizer()
    mask_BT = right_aligned(padded([[1.0] * len(ids) for ids in LISTS]))
    list_B1 = advantages()[:, :1]
    found, expected = log_probs()[0], log_probs()[0]
    units = make_units(
        RankSegmenter(tokenizer)(padded(LISTS, 0), padded([[True] * len(ids) for ids in LISTS], False)),
        torch.zeros(len(LISTS), found.shape[1], dtype=torch.bool), list_B1, unit="token", num_ranks=K,
    )  # fmt: skip
    found, expected = (right_aligned(value).requires_grad_() for value in (found, expected))
    old_BT, settings = right_aligned(log_probs()[1]), config()
    hidden_BT = reduced(right_aligned(hide_units(units)), mask_BT, settings)
    ours, _ = policy_loss(found, old_BT, hidden_BT, config=settings, loss_mask=mask_BT)
    settings = config(loss_reduction="sequence_mean")
    theirs, _ = ppo_utils.PolicyLossRegistry.get("regular")(
        expected, old_BT, reduced(list_B1.expand_as(mask_BT), mask_BT, settings), config=settings, loss_mask=mask_BT
    )
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (found.grad - expected.grad).norm() / expected.grad.norm() < 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"loss_reduction": "token_mean"}, "loss_reduction='token_mean' is not the mean over ranks"),
        ({"max_seq_len": None}, "max_seq_len to any number"),
        (
            {"off_policy_correction": SimpleNamespace(**vars(OFF) | {"tis_ratio_type": "token"})},
            "off_policy_correction",
        ),
    ],
)
def test_settings_of_other_losses_are_refused(changes, message):
    logp_BT, old_BT = log_probs()
    with pytest.raises(ConfigError, match=message):
        policy_loss(logp_BT, old_BT, logp_BT, config=config(**changes))


def test_what_is_not_marked_is_refused():
    register(num_ranks=K)
    plain_BT = torch.ones(2, 3)
    estimator = ppo_utils.AdvantageEstimatorRegistry.get("rank_grpo")
    with pytest.raises(ConfigError, match="rewards are not marked"):
        estimator(token_level_rewards=plain_BT * 0 + 2.0, response_mask=plain_BT, index=[0, 0], config=config())
    with pytest.raises(ConfigError, match="advantage_batch_normalize=true"):
        estimator(
            token_level_rewards=plain_BT, response_mask=plain_BT, index=[0, 0],
            config=config(advantage_batch_normalize=True),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="list 1: expected 3 finite numbers"):
        mark_lists([[4], [5]], [[1.0] * K, [1.0]], K, RankSegmenter(make_tokenizer()), [EOS])


def test_the_names_of_the_pages_script_are_skyrls():
    """Read in its source, as they need its workers' packages to be imported."""
    script = ast.parse(script_of("skyrl.md", "skyrl_run.py"))
    folder = Path(sys.modules["skyrl.train"].__path__[0]).parents[1]
    for node in script.body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("skyrl"):
            place = folder.joinpath(*node.module.split("."))
            source = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
            assert all(alias.name in source for alias in node.names), node.module

    def parameters(module, class_name, method):
        tree = ast.parse((folder / "skyrl" / "train" / module).read_text())
        (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
        functions = [node for node in found.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        (made,) = [node for node in functions if node.name == method]
        return [argument.arg for argument in made.args.args]

    generator = ("generators/skyrl_gym_generator.py", "SkyRLGymGenerator")
    assert parameters(*generator, "generate") == ["self", "input_batch", "disable_tqdm"]
    expected = ["self", "generator_cfg", "skyrl_gym_cfg", "inference_engine_client", "tokenizer"]
    assert parameters(*generator, "__init__")[:5] == expected
    main = ("entrypoints/main_base.py", "BasePPOExp")
    assert parameters(*main, "get_generator") == ["self", "cfg", "tokenizer", "inference_engine_client"]
