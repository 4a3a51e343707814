"""Loss and estimator in the real verl: its worker-side loss call and its advantage step on CPU tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("PEER") != "verl":
    pytest.skip("verl has an environment of its own: `make test-verl`", allow_module_level=True)

import numpy as np
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.rollouts.integrations.verl import check_registered, mark_rewards, register
from rankgrpo.units import make_units

# Shape letters: B lists, T tokens, K ranks.

ROOT = Path(__file__).parents[2]
K = 3
LENGTHS = [8, 6, 8, 5, 1, 7]
RANK_BT = torch.tensor(
    [
        [0, 0, 1, 1, 2, 2, 2, 2],  # full, EOS
        [0, 0, 0, 1, 1, 1, -1, -1],  # early EOS after two items
        [0, 1, 2, 3, 3, 4, 4, 4],  # two items too many, EOS
        [0, 0, 1, 1, 1, -1, -1, -1],  # cut off in the second item
        [0, -1, -1, -1, -1, -1, -1, -1],  # EOS at once
        [0, 0, 2, 2, 2, 2, 2, -1],  # rank 1 has no token of its own
    ]
)
EOS = [7, 5, 7, None, 0, 6]
UID = ["b", "a", "b", "a", "a", "b"]  # groups in any order
REWARD_BK = torch.tensor([[1.0, 0, 0.3], [0, 1, 0], [0, 0, 0], [1, 0.25, 0], [0, 0, 0], [0, 0, -0.7]])


@pytest.fixture(autouse=True)
def registered():
    register(num_ranks=K)


def batch(seed=0):
    mask_BT = torch.arange(8) < torch.tensor(LENGTHS)[:, None]
    eos_BT = torch.zeros(6, 8, dtype=torch.bool)
    for row, place in enumerate(EOS):
        if place is not None:
            eos_BT[row, place] = True
    generator = torch.Generator().manual_seed(seed)
    old_BT = torch.where(mask_BT, -torch.rand(6, 8, generator=generator) - 0.3, 0.0)
    logp_BT = torch.where(mask_BT, old_BT + 0.12 * torch.randn(6, 8, generator=generator), 0.0)
    return mask_BT, eos_BT, old_BT, logp_BT


def by_hand():
    """Advantages within a group and rank, one after the other."""
    advantage_BK = torch.zeros(6, K)
    for name in set(UID):
        rows = [row for row, uid in enumerate(UID) if uid == name]
        for rank in range(K):
            values = REWARD_BK[rows, rank]
            advantage_BK[rows, rank] = (values - values.mean()) / (values.std() + 1e-4)
    return advantage_BK


def verl_advantages(marked_BT, mask_BT):
    """With the arguments that verl's trainer passes to an estimator."""
    estimator = get_adv_estimator_fn("rank_grpo")
    index = np.array(UID, dtype=object)
    return estimator(token_level_rewards=marked_BT, response_mask=mask_BT.long(), config=None, index=index)[0]


def jagged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def verl_loss(lists, logp_BT, old_BT, advantage_BT, dp_size=1, clip=(0.06, 0.08)):
    """`ppo_loss` as verl's worker calls it on a micro-batch: jagged tensors, log-probs of prompt and list."""
    prompts = [torch.zeros(2 + row % 3, dtype=torch.int64) for row in lists]
    responses = [torch.zeros(LENGTHS[row], dtype=torch.int64) for row in lists]
    # The log-prob of a token stands one place before it.
    model = [
        torch.cat([torch.zeros(len(prompt) - 1), logp_BT[row, : LENGTHS[row]], torch.zeros(1)])
        for prompt, row in zip(prompts, lists, strict=True)
    ]
    columns = {"old_log_probs": old_BT, "advantages": advantage_BT}
    data = TensorDict(
        {"prompts": jagged(prompts), "responses": jagged(responses)}
        | {"response_mask": jagged([torch.ones(LENGTHS[row], dtype=torch.int64) for row in lists])}
        | {name: jagged([value[row, : LENGTHS[row]] for row in lists]) for name, value in columns.items()},
        batch_size=len(lists),
    )
    tu.assign_non_tensor(data, dp_size=dp_size, batch_num_tokens=sum(LENGTHS), global_batch_size=6, max_response_len=8)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=clip[0],
        clip_ratio_high=clip[1],
        policy_loss=PolicyLossConfig(loss_mode="rank_grpo"),
    )

    return ppo_loss(config, {"log_probs": jagged(model)}, data)


def ours(logp_BT, old_BT, eos_BT):
    units = make_units(RANK_BT, eos_BT, by_hand(), num_ranks=K)
    logp_BT = logp_BT.clone().requires_grad_()
    loss, metrics = rank_grpo_loss(logp_BT, old_BT, units.unit_BT, units.advantage_BU, denominator=6 * K)
    loss.backward()
    return logp_BT.grad, metrics


@pytest.mark.parametrize("parts, dp_size", [([range(6)], 1), ([[0, 3, 4], [5, 1, 2]], 1), ([[0, 3, 4], [5, 1, 2]], 2)])
def test_verls_actor_loss_has_our_gradient(parts, dp_size):
    """One micro-batch, two, and two processes, whose gradients verl averages; from rewards a rank to the gradient."""
    mask_BT, eos_BT, old_BT, logp_BT = batch()
    advantage_BT = verl_advantages(mark_rewards(RANK_BT, eos_BT, REWARD_BK), mask_BT)
    expected, metrics = ours(logp_BT, old_BT, eos_BT)
    assert metrics["ratio/clip_low_frac"] + metrics["ratio/clip_high_frac"] > 0
    theirs_BT = logp_BT.clone().requires_grad_()
    for lists in parts:
        loss, logged = verl_loss(list(lists), theirs_BT, old_BT, advantage_BT, dp_size)
        (loss / dp_size).backward()
    assert "actor/rank_ratio_mean" in logged
    # Marked rewards keep 16 bits of their mantissa, advantages lose one.
    assert (theirs_BT.grad - expected).norm() / expected.norm() < 1e-5


def test_marked_rewards_sum_to_the_rewards():
    """Where verl adds a list's numbers up for its own metrics."""
    _, eos_BT, _, _ = batch()
    marked_BT = mark_rewards(RANK_BT, eos_BT, REWARD_BK, overflow_penalty=0.0, early_eos_penalty=0.0)
    held_BK = torch.stack([(RANK_BT == rank).any(1) for rank in range(K)], 1)
    torch.testing.assert_close(marked_BT.sum(1), (REWARD_BK * held_BK).sum(1), rtol=2e-5, atol=1e-6)
    assert (marked_BT != 0).sum(1).tolist() == [3, 2, 5, 2, 1, 2]


def test_what_is_not_marked_is_refused():
    mask_BT, eos_BT, _, _ = batch()
    plain_BT = torch.zeros(6, 8)
    plain_BT[:, 0] = 1.0
    with pytest.raises(ConfigError, match="rewards are not marked with ranks"):
        verl_advantages(plain_BT, mask_BT)
    with pytest.raises(ConfigError, match="use_kl_in_reward=True"):
        get_adv_estimator_fn("rank_grpo")(plain_BT, mask_BT, UID, config={"use_kl_in_reward": True})
    with pytest.raises(ConfigError, match="rollout_is"):
        get_policy_loss_fn("rank_grpo")(plain_BT, plain_BT, plain_BT, mask_BT, rollout_is_weights=plain_BT)
    with pytest.raises(ConfigError, match="num_ranks must be in 1..126"):
        register(num_ranks=127)
    many_BT = torch.arange(130)[None]
    with pytest.raises(ConfigError, match="more than 127 items"):
        mark_rewards(many_BT, torch.zeros(1, 130, dtype=torch.bool), torch.zeros(1, 20))


def test_a_module_of_the_users_is_loaded_by_verl_and_checked(tmp_path):
    (tmp_path / "my_ranks.py").write_text(
        "from rankgrpo.rollouts.integrations.verl import register\nregister(num_ranks=20)\n"
    )
    code = (
        "import verl; from rankgrpo.rollouts.integrations.verl import check_registered; check_registered(); print('ok')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    for named, expected in (("my_ranks", 0), ("", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | {"VERL_USE_EXTERNAL_MODULES": named}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == expected, done.stderr[-3000:]
    assert "no policy loss and no advantage estimator of the name rank_grpo" in done.stderr
    check_registered()
