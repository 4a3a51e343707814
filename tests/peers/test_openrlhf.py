"""Loss and advantages in OpenRLHF: its actor's training step and its normalisers on CPU tensors."""

import ast
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from absent import absent, bare_package

if os.environ.get("PEER") == "hosts":
    absent(
        "deepspeed", "ray", "flash_attn", "optree", "torchdata", "bitsandbytes", "tqdm", "openrlhf.models.actor",
        "openrlhf.models.model", "openrlhf.models.ring_attn_utils", "openrlhf.trainer.ray.launcher",
        "openrlhf.trainer.ray.utils", "openrlhf.utils.deepspeed", "openrlhf.utils.distributed_util",
        "openrlhf.utils.vlm_utils", "openrlhf.utils.seqlen_balancing", "openrlhf.datasets",
    )  # fmt: skip

    for name in (
        "openrlhf",
        "openrlhf.trainer",
        "openrlhf.trainer.ray",
        "openrlhf.trainer.ppo_utils",
        "openrlhf.utils",
    ):
        bare_package(name)
else:
    pytest.skip("OpenRLHF has an environment of its own: `make test-hosts`", allow_module_level=True)

from lists import (
    EOS,
    GROUP,
    HIGH,
    LISTS,
    LOW,
    PAD,
    REWARD_BK,
    advantages,
    assert_same_gradient,
    log_probs,
    padded,
    script_of,
)
from openrlhf.models.loss import PolicyLoss
from openrlhf.utils.loss_utils import iter_grad_accum_global_norm
from toy import K, make_tokenizer

from rankgrpo.errors import ConfigError
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations import openrlhf as adapter
from rankgrpo.rollouts.integrations.openrlhf import RankPolicyLoss, rank_advantages
from rankgrpo.units import hide_units, make_units

# Shape letters: B lists, T tokens, K ranks.


def experiences(parts):
    """As the experience maker holds them: prompts before the lists, and an action column for every token after one."""
    made = []
    for lists in map(list, parts):
        ids_BT = padded([LISTS[row] for row in lists], PAD)
        mask_BT = padded([[True] * len(LISTS[row]) for row in lists], False)
        prompt_B2 = torch.full((len(lists), 2), 3)
        made.append(
            SimpleNamespace(
                sequences=torch.cat([prompt_B2, ids_BT], 1),
                action_mask=mask_BT,
                index=lists,
                advantages=None,
                labels=[REWARD_BK[row].tolist() for row in lists],
            )  # fmt: skip
        )
    return made


def marked(parts):
    tokenizer = make_tokenizer()
    return rank_advantages(
        experiences(parts), lambda texts, labels: labels, tokenizer, num_ranks=K, lists_per_prompt=GROUP, end_ids=[EOS]
    )


@pytest.mark.parametrize("parts", [[range(6)], [[0, 4, 3], [5, 1, 2]], [[3, 5], [0, 4], [1, 2]]])
def test_the_loss_has_our_gradient_under_openrlhfs_normalisers(parts):
    """Micro-batches of one optimizer step; DeepSpeed divides each loss by their number."""
    made = marked(parts)
    logp_BT, old_BT = log_probs()
    logp_BT.requires_grad_()
    function = RankPolicyLoss(clip_eps_low=LOW, clip_eps_high=HIGH, dual_clip=None, is_correction_level="off")
    step = iter_grad_accum_global_norm(made, None, len(made), lambda experience: experience.action_mask)
    for experience, info in step:
        rows, width = experience.index, experience.action_mask.shape[1]
        loss, clip_ratio, kl, vllm_kl, filtered = function(
            logp_BT[rows, :width], old_BT[rows, :width], experience.advantages, action_mask=experience.action_mask,
            rollout_log_probs=None, **info,
        )  # fmt: skip
        (loss / len(made)).backward()
        assert clip_ratio.ndim == kl.ndim == 0 and vllm_kl is None and filtered is None
    assert_same_gradient(logp_BT.grad, make_tokenizer())


def test_with_a_token_as_unit_it_is_the_hosts_loss():
    tokenizer, list_B1 = make_tokenizer(), advantages()[:, :1]
    mask_BT = padded([[True] * len(ids) for ids in LISTS], False)
    units = make_units(
        RankSegmenter(tokenizer)(padded(LISTS, PAD), mask_BT), torch.zeros_like(mask_BT), list_B1, unit="token",
        num_ranks=K,
    )  # fmt: skip
    (found, old_BT), (expected, _) = log_probs(), log_probs()
    found.requires_grad_()
    expected.requires_grad_()
    info = {"dp_size": 2, "batch_num_tokens": torch.tensor(30.0), "global_batch_size": torch.tensor(12.0)}
    ours, *_ = RankPolicyLoss(LOW, HIGH)(found, old_BT, hide_units(units), mask_BT, **info)
    host = PolicyLoss(LOW, HIGH, token_level_loss=False)
    theirs, _, kl, *_ = host(expected, old_BT, list_B1.expand_as(old_BT), mask_BT.float(), **info)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (found.grad - expected.grad).norm() / expected.grad.norm() < 1e-5
    torch.testing.assert_close(RankPolicyLoss(LOW, HIGH)(found, old_BT, hide_units(units), mask_BT, **info)[2], kl)


# ----------------------------------------------------------------------------------------------------------------------
# The names that docs/integrations/openrlhf.md relies on, in OpenRLHF's source


def source(module):
    return ast.parse((Path(sys.modules["openrlhf"].__path__[0]) / module).read_text())


def method(tree, class_name, name):
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    (found,) = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def test_the_actors_trainer_calls_its_loss_as_ours_is_called():
    tree = source("trainer/ray/ppo_actor.py")
    init, step = (method(tree, "ActorPPOTrainer", name) for name in ("__init__", "training_step"))
    made = [
        node.value for node in ast.walk(init)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "self.actor_loss_fn"
    ]  # fmt: skip
    assert [ast.unparse(value.func) for value in made] == ["PolicyLoss"]
    given = {keyword.arg for keyword in made[0].keywords}
    assert set(adapter.NOT_HERE) | {"clip_eps_low", "clip_eps_high"} <= given
    (call,) = [
        node for node in ast.walk(step) if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.actor_loss_fn"
    ]
    assert [ast.unparse(argument) for argument in call.args] == [
        "action_log_probs", "old_action_log_probs", "advantages",
    ]  # fmt: skip
    assert [keyword.arg for keyword in call.keywords] == ["action_mask", "rollout_log_probs", None]
    (names,) = [
        ast.unparse(node.targets[0]) for node in ast.walk(step) if isinstance(node, ast.Assign) and node.value is call
    ]
    assert names.count(",") == 4


def test_the_classes_that_the_recipe_replaces_are_where_it_looks():
    maker = method(
        source("trainer/ppo_utils/experience_maker.py"), "RemoteExperienceMaker", "compute_advantages_and_returns"
    )
    assert [argument.arg for argument in maker.args.args] == ["self", "experiences"]
    trainer = ast.unparse(source("trainer/ppo_trainer.py"))
    assert "self.experience_maker = RemoteExperienceMaker(" in trainer
    fields = ast.unparse(source("trainer/ppo_utils/experience.py"))
    for name in ("sequences", "action_mask", "advantages", "index", "labels"):
        assert f"    {name}: " in fields


def test_the_script_of_the_page_replaces_both(monkeypatch):
    """Its `install` on modules of those names, and what it installs on a batch."""

    class RemoteExperienceMaker:
        def compute_advantages_and_returns(self, experiences):
            return experiences

    ppo_trainer = SimpleNamespace(RemoteExperienceMaker=RemoteExperienceMaker)
    ppo_actor = SimpleNamespace(PolicyLoss=PolicyLoss)
    monkeypatch.setattr(sys.modules["openrlhf.trainer"], "ppo_trainer", ppo_trainer, raising=False)
    monkeypatch.setattr(sys.modules["openrlhf.trainer.ray"], "ppo_actor", ppo_actor, raising=False)
    names = {"__name__": "openrlhf_ranks"}
    exec(script_of("openrlhf.md", "openrlhf_ranks.py").replace("K = 20", f"K = {K}"), names)
    names["install"]()
    assert ppo_actor.PolicyLoss is RankPolicyLoss
    maker = ppo_trainer.RemoteExperienceMaker()
    maker.strategy = SimpleNamespace(args=SimpleNamespace(rollout=SimpleNamespace(n_samples_per_prompt=GROUP)))
    maker.tokenizer = make_tokenizer()
    (batch,) = experiences([range(6)])
    batch.labels = ["a|b"] * 6
    (made,) = maker.compute_advantages_and_returns([batch])
    assert ((made.advantages != 0) == made.action_mask).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="dual_clip=3.0 .leave it at None"):
        RankPolicyLoss(LOW, HIGH, dual_clip=3.0)
    with pytest.raises(ConfigError, match=r"expected finite numbers \(6, 3\), got \(6, 2\)"):
        rank_advantages(
            experiences([range(6)]), lambda texts, labels: [[0.0, 1.0]] * 6, make_tokenizer(), num_ranks=K,
            lists_per_prompt=GROUP, end_ids=[EOS],
        )  # fmt: skip


def test_an_untested_version_is_named(monkeypatch):
    monkeypatch.setattr(adapter, "version", lambda name: "0.12.0")
    with pytest.warns(UserWarning, match="openrlhf 0.12.0 is outside .* openrlhf>=0.11.2,<0.12.0"):
        RankPolicyLoss()
