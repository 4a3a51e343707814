"""RankGRPOMixin over a trainer with ms-swift's methods, and that ms-swift has them, read in its source."""

import ast
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

if os.environ.get("PEER") != "hosts":
    pytest.skip("ms-swift has an environment of its own: `make test-hosts`", allow_module_level=True)

from lists import GROUP, HIGH, LISTS, LOW, PAD, REWARD_BK, assert_same_gradient, log_probs, padded, script_of
from toy import K, make_tokenizer

from rankgrpo.errors import ConfigError
from rankgrpo.rollouts.integrations import swift as adapter
from rankgrpo.rollouts.integrations.swift import NOT_HERE, RankGRPOMixin

# Shape letters: B lists, T tokens, K ranks.

SETTINGS = {
    "loss_type": "grpo", "importance_sampling_level": "token", "kl_in_reward": False, "dynamic_num_samples": False,
    "sdar_loss_coef": 0.0, "rollout_importance_sampling_mode": None, "off_policy_sequence_mask_delta": None,
    "scale_rewards": "group", "epsilon_low": LOW, "epsilon_high": HIGH, "beta": 0.0, "num_generations": GROUP,
}  # fmt: skip


class Trainer:
    """ms-swift's GRPOTrainer as far as the class before it sees it."""

    def __init__(self, logp_BT, **changes):
        vars(self).update(SETTINGS | changes)
        self.logp_BT = logp_BT
        self.template = SimpleNamespace(tokenizer=make_tokenizer(), padding_free=False)
        self.model, self.accelerator = SimpleNamespace(training=True), SimpleNamespace(process_index=0)
        self._rewards_per_func = REWARD_BK

    def _postprocess_batch(self, samples, batch_encoded_inputs):
        for batch in batch_encoded_inputs:
            batch["grpo_batch"].advantages = torch.ones(batch["grpo_batch"].completion_mask.shape)

    def _get_per_token_logps_and_entropies(self, model, model_inputs, grpo_batch, compute_entropy=False):
        return self.logp_BT[model_inputs["rows"]][:, : grpo_batch.completion_mask.shape[1]], None

    def _compute_loss_and_metrics(self, model, model_inputs, grpo_batch):
        logp_BT, _ = self._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, compute_entropy=True)
        return (logp_BT * grpo_batch.advantages).sum(), {"mode": "train"}


class RankTrainer(RankGRPOMixin, Trainer):
    num_ranks = K


def batches(old_BT, ref_BT=None):
    made = []
    for rows in ([0, 1, 2], [3, 4, 5]):
        ids_BT = padded([LISTS[row] for row in rows], PAD)
        mask_BT = padded([[1] * len(LISTS[row]) for row in rows], 0)
        width = mask_BT.shape[1]
        held = SimpleNamespace(
            completion_mask=mask_BT, old_per_token_logps=old_BT[rows, :width], advantages=None,
            ref_per_token_logps=None if ref_BT is None else ref_BT[rows, :width],
        )  # fmt: skip
        prompt_B2 = torch.full((3, 2), 3)
        inputs = {"input_ids": torch.cat([prompt_B2, ids_BT], 1), "rows": rows}
        made.append({"model_inputs": inputs, "grpo_batch": held})
    return made


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_loss_has_our_gradient(monkeypatch, beta):
    """Two micro-batches of an optimizer step, each of whose losses the Trainer divides by two."""
    monkeypatch.setattr(adapter, "version", lambda name: "4.6.0")
    logp_BT, old_BT = log_probs()
    ref_BT = log_probs(seed=1)[1] if beta else None
    logp_BT.requires_grad_()
    trainer = RankTrainer(logp_BT, beta=beta)
    made = batches(old_BT, ref_BT)
    trainer._postprocess_batch([None] * len(LISTS), made)
    for batch in made:
        loss, metrics = trainer._compute_loss_and_metrics(None, batch["model_inputs"], batch["grpo_batch"])
        (loss / len(made)).backward()
        assert metrics == {"mode": "train"}
    options = {"ref_logp_BT": ref_BT, "kl_coef": beta} if beta else {}
    assert_same_gradient(logp_BT.grad, make_tokenizer(), **options)


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(adapter, "version", lambda name: "4.6.0")
    with pytest.raises(ConfigError, match="loss_type='dapo' .set 'grpo'"):
        RankTrainer(None, loss_type="dapo")
    trainer = RankTrainer(None)
    trainer._rewards_per_func = REWARD_BK[:, :2]
    with pytest.raises(ConfigError, match="expected 3 reward functions, one a rank, got 2"):
        trainer._postprocess_batch([], [])


def test_an_untested_version_is_named(monkeypatch):
    monkeypatch.setattr(adapter, "version", lambda name: "4.7.1")
    with pytest.warns(UserWarning, match="ms-swift 4.7.1 is outside .* ms-swift>=4.6,<4.7"):
        RankTrainer(None)


# ----------------------------------------------------------------------------------------------------------------------
# The names that the class and docs/integrations/swift.md rely on, in ms-swift's source


def source(module):
    folder = Path(importlib.util.find_spec("swift").submodule_search_locations[0])
    return (folder / module).read_text()


def test_ms_swifts_trainer_has_these_methods_and_attributes():
    text = source("rlhf_trainers/grpo_trainer.py")
    (trainer,) = [n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == "GRPOTrainer"]
    methods = {node.name: node for node in trainer.body if isinstance(node, ast.FunctionDef)}
    expected = {
        "_postprocess_batch": ["self", "samples", "batch_encoded_inputs"],
        "_compute_loss_and_metrics": ["self", "model", "model_inputs", "grpo_batch"],
    }
    for name, parameters in expected.items():
        assert [argument.arg for argument in methods[name].args.args] == parameters
    called = ast.unparse(methods["_compute_loss_and_metrics"])
    assert "per_token_logps, entropies = self._get_per_token_logps_and_entropies(model, model_inputs" in called
    assert called.rstrip().endswith("return (loss, metrics_data)")
    assert "total_advantages = self._compute_advantages(samples, self._rewards_per_func, " in text
    assert "batch_encoded_inputs = {'model_inputs': model_inputs, 'grpo_batch': grpo_batch}" in text
    both = text + source("rlhf_trainers/rollout_mixin.py")
    for name in [*NOT_HERE, "epsilon_low", "epsilon_high", "num_generations_eval", "beta"]:
        assert f"self.{name}" in both, name


def test_the_file_of_the_page_takes_the_trainers_place(monkeypatch):
    rewards, trainers, factory = ModuleType("swift.rewards"), ModuleType("swift.rlhf_trainers"), ModuleType("s")
    rewards.ORM, rewards.orms, trainers.GRPOTrainer = object, {}, Trainer
    factory.TrainerFactory = SimpleNamespace(TRAINER_MAPPING={})
    for name, module in {"rewards": rewards, "rlhf_trainers": trainers, "trainers": factory}.items():
        monkeypatch.setitem(sys.modules, f"swift.{name}", module)
    monkeypatch.setitem(sys.modules, "swift", ModuleType("swift"))
    names = {"__name__": "swift_ranks"}
    exec(script_of("swift.md", "swift_ranks.py"), names)
    assert factory.TrainerFactory.TRAINER_MAPPING == {"grpo": "swift_ranks.RankGRPOTrainer"}
    assert issubclass(names["RankGRPOTrainer"], RankGRPOMixin) and len(rewards.orms) == 20
    found = [rewards.orms[f"rank_{rank:02d}"]()(["a (1990)\nb (1990)"], solution=[["b"]]) for rank in (0, 1, 2)]
    assert found == [[0.0], [1.0], [0.0]]


def test_the_names_of_the_page_are_ms_swifts():
    assert "class ORM" in source("rewards/orm.py") and "\norms = {" in source("rewards/orm.py")
    factory = source("trainers/trainer_factory.py")
    assert "'grpo': 'swift.rlhf_trainers.GRPOTrainer'" in factory and "mapping[train_method].rsplit('.', 1)" in factory
    assert "TrainerFactory" in source("trainers/__init__.py")
