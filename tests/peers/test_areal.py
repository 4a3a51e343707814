"""RankPPOActor in AReaL: its PPOActor, its packing and its mean over micro-batches on CPU tensors."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from absent import absent, bare_package

if os.environ.get("PEER") == "hosts":
    absent(
        "uvloop", "yaml", "hydra", "omegaconf", "orjson", "colorlog", "einops", "torchdata", "numba", "areal.infra",
        "areal.engine", "areal.experimental", "areal.utils.perf_tracer", "areal.utils.name_resolve",
        "areal.utils.logging",
        "areal.utils.seqpack", "areal.utils.functional.vocab_parallel", "areal.api.cli_args", "areal.utils.pkg_version",
    )  # fmt: skip
    for package in ("areal", "areal.api", "areal.trainer", "areal.trainer.ppo", "areal.utils"):
        bare_package(package)

    sys.modules["areal.api"].TrainEngine = object
else:
    pytest.skip("AReaL has an environment of its own: `make test-hosts`", allow_module_level=True)

from areal.trainer.ppo import actor as host
from areal.utils.data import pack_tensor_dict
from lists import EOS, GROUP, HIGH, LISTS, LOW, PAD, REWARD_BK, assert_same_gradient, log_probs, padded, script_of
from toy import K, make_tokenizer

from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.rollouts.integrations import areal as adapter
from rankgrpo.rollouts.integrations.areal import RankPPOActor

# Shape letters: B lists, S tokens of prompt and list, T tokens of a list, K ranks.

PROMPTS = [2, 3, 4, 2, 3, 4]


def config(**changes):
    settings = {
        "reward_bias": 0.0, "reward_scaling": 1.0, "reward_clip": 20.0, "kl_ctl": 0.0, "kl_estimator": "k1",
        "adv_norm": None, "reward_norm": None, "discount": 1.0, "gae_lambda": 1.0, "mask_no_eos_with_zero": False,
        "temperature": 1.0, "m2_threshold": None, "use_decoupled_loss": False, "recompute_logprob": False,
        "overlong_reward_penalty": False, "eps_clip": LOW, "eps_clip_higher": HIGH, "c_clip": None,
        "rejection_sampling": None, "log_agent_stats": False, "ppo_n_minibatches": 1, "use_sapo_loss": False,
        "importance_sampling_level": "token", "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05,
        "prox_logp_method": "recompute",
    }  # fmt: skip
    return SimpleNamespace(**settings | changes)


class Engine:
    """AReaL's FSDP engine as far as a loss sees it: packed micro-batches, their losses weighed, gradients averaged."""

    def __init__(self, logp_BT, parts, dp_size=1):
        self.logp_BT, self.parts, self.dp_size = logp_BT, [list(part) for part in parts], dp_size

    def train(self):
        pass

    def get_version(self):
        return 1

    def train_batch(self, batch, loss_fn, loss_weight_fn):
        micro = []
        for part in self.parts:
            taken = {name: v[part] if torch.is_tensor(v) and len(v) == len(LISTS) else v for name, v in batch.items()}
            micro.append(pack_tensor_dict(taken))
        total = sum(loss_weight_fn(data) for data in micro)
        for part, data in zip(self.parts, micro, strict=True):
            # The log-prob of a token stands one place before it.
            rows = []
            for row in part:
                padding = torch.zeros(PROMPTS[row] - 1)
                rows.append(torch.cat([padding, self.logp_BT[row, : len(LISTS[row])], torch.zeros(1)]))
            logp_M = torch.cat(rows)
            loss = loss_fn(logp_M, torch.ones_like(logp_M), data, vocab_min_logits=logp_M, vocab_max_logits=logp_M)
            scale = loss_weight_fn(data) / total * self.dp_size
            (loss * scale / self.dp_size).backward()
        return {}


def trajectories(old_BT):
    """What a workflow returns: columns a token of prompt and list, and K rewards a list."""
    sequences = [[3] * length + ids for length, ids in zip(PROMPTS, LISTS, strict=True)]
    columns = {
        "input_ids": padded(sequences, PAD),
        "attention_mask": padded([[1] * len(ids) for ids in sequences], 0),
        "loss_mask": padded([[0] * n + [1] * len(ids) for n, ids in zip(PROMPTS, LISTS, strict=True)], 0),
        "logprobs": padded(
            [[0.0] * n + row[: len(ids)].tolist() for n, ids, row in zip(PROMPTS, LISTS, old_BT, strict=True)]
        ),
    }
    return columns | {"rewards": REWARD_BK.sum(1), "rank_rewards": REWARD_BK.clone()}


def actor(engine, **changes):
    return RankPPOActor(config(**changes), engine, make_tokenizer(), num_ranks=K, group_size=GROUP, end_ids=[EOS])


def _whole(data, mb_spec):
    return SimpleNamespace(mbs=[data])


@pytest.fixture(autouse=True)
def no_statistics(monkeypatch):
    monkeypatch.setattr(
        host, "split_padded_tensor_dict_into_mb_list", lambda data, mb_spec: SimpleNamespace(mbs=[data])
    )


@pytest.mark.parametrize(
    "parts, dp_size", [([range(6)], 1), ([[0, 3], [4], [5, 1, 2]], 1), ([[0, 3, 4], [5, 1, 2]], 2)]
)
def test_areals_update_has_our_gradient(parts, dp_size):
    logp_BT, old_BT = log_probs()
    logp_BT.requires_grad_()
    trainer = actor(Engine(logp_BT, parts, dp_size))
    trainer._ppo_update(trainer._compute_advantages(trajectories(old_BT)))
    assert_same_gradient(logp_BT.grad, make_tokenizer())


def test_the_kl_to_the_reference_is_by_rank():
    logp_BT, old_BT = log_probs()
    ref_BT = log_probs(seed=1)[1]
    logp_BT.requires_grad_()
    trainer = actor(Engine(logp_BT, [[0, 3, 4], [5, 1, 2]]), kl_ctl=0.1)
    data = trajectories(old_BT)
    data["ref_logp"] = padded(
        [[0.0] * (n - 1) + row[: len(ids)].tolist() + [0.0] for n, ids, row in zip(PROMPTS, LISTS, ref_BT, strict=True)]
    )
    trainer._ppo_update(trainer._compute_advantages(data))
    assert_same_gradient(logp_BT.grad, make_tokenizer(), ref_logp_BT=ref_BT, kl_coef=0.1)


def test_with_a_token_as_unit_it_is_the_hosts_loss():
    """AReaL's own loss is a mean over tokens: the units of one micro-batch with that denominator."""
    (found, old_BT), (expected, _) = log_probs(), log_probs()
    found.requires_grad_()
    expected.requires_grad_()
    mask_BT = padded([[True] * len(ids) for ids in LISTS], False)
    advantage_BT = torch.where(mask_BT, REWARD_BK.sum(1, keepdim=True) - 0.4, 0.0)
    theirs, _ = host.ppo_actor_loss_fn(
        logprobs=expected, proximal_logprobs=old_BT, old_logprobs=old_BT, advantages=advantage_BT, eps_clip=LOW,
        eps_clip_higher=HIGH, loss_mask=mask_BT,
    )  # fmt: skip
    unit_BT = torch.where(mask_BT, torch.arange(mask_BT.shape[1]), -1)
    ours, _ = rank_grpo_loss(
        found, old_BT, unit_BT, advantage_BT, clip_low=LOW, clip_high=HIGH, denominator=mask_BT.sum()
    )
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (found.grad - expected.grad).norm() / expected.grad.norm() < 1e-5


def test_the_script_of_the_page_makes_an_actor_and_its_rewards():
    names = {"__name__": "areal_ranks"}
    exec(script_of("areal.md", "areal_ranks.py").replace("K = 20", f"K = {K}"), names)
    settings = SimpleNamespace(actor=config(), gconfig=SimpleNamespace(n_samples=GROUP))
    made = names["make_actor"](settings, None, make_tokenizer())
    assert isinstance(made, RankPPOActor) and made.group_size == GROUP and made.end_ids.tolist() == [PAD, EOS]
    data = names["with_ranks"]({"rewards": 0}, ["a (1990)\nb (1990)", "b (1990)"], ["b"])
    assert data["rank_rewards"].tolist() == [[0, 1, 0], [1, 0, 0]] and data["rewards"] == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="use_decoupled_loss=True .set False"):
        actor(None, use_decoupled_loss=True)
    data = trajectories(log_probs()[1])
    del data["rank_rewards"]
    with pytest.raises(ConfigError, match=r"must return rank_rewards \(lists, 3\).*got nothing"):
        actor(None)._compute_advantages(data)


def test_an_untested_version_is_named(monkeypatch):
    monkeypatch.setattr(adapter, "version", lambda name: "1.1.0")
    with pytest.warns(UserWarning, match="areal 1.1.0 is outside .* areal>=1.0.4,<1.1.0"):
        actor(None)
