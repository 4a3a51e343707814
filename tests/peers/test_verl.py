"""Loss and estimator in the real verl: its worker-side loss call and its advantage step on CPU tensors."""

import asyncio
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

if os.environ.get("PEER") != "verl":
    pytest.skip("verl has an environment of its own: `make test-verl`", allow_module_level=True)

import numpy as np
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations.marks import mark_lists, mark_rewards
from rankgrpo.rollouts.integrations.verl import num_ranks_of, register
from rankgrpo.rollouts.integrations.verl_rewards import MarkedOutput, RankAgentLoop
from rankgrpo.units import hide_units, make_units

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
ALGORITHM = {"num_ranks": K}
REWARD_BK = torch.tensor([[1.0, 0, 0.3], [0, 1, 0], [0, 0, 0], [1, 0.25, 0], [0, 0, 0], [0, 0, -0.7]])


@pytest.fixture(autouse=True)
def registered():
    register()


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
    return estimator(token_level_rewards=marked_BT, response_mask=mask_BT.long(), config=ALGORITHM, index=index)[0]


def jagged(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def verl_loss(lists, logp_BT, old_BT, advantage_BT, dp_size=1, mode="rank_grpo"):
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
        clip_ratio_low=0.06,
        clip_ratio_high=0.08,
        loss_agg_mode="seq-mean-token-mean",
        policy_loss=PolicyLossConfig(loss_mode=mode),
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
    with pytest.raises(ConfigError, match=r"set \+algorithm.num_ranks=20"):
        num_ranks_of({})
    with pytest.raises(ConfigError, match="rollout_is"):
        get_policy_loss_fn("rank_grpo")(plain_BT, plain_BT, plain_BT, mask_BT, rollout_is_weights=plain_BT)
    with pytest.raises(ConfigError, match="num_ranks must be in 1..126"):
        get_adv_estimator_fn("rank_grpo")(plain_BT, mask_BT, UID, config={"num_ranks": 127})
    many_BT = torch.arange(130)[None]
    with pytest.raises(ConfigError, match="more than 127 items"):
        mark_rewards(many_BT, torch.zeros(1, 130, dtype=torch.bool), torch.zeros(1, 20))


def test_with_a_token_as_unit_it_is_the_hosts_loss():
    """verl's own loss with seq-mean-token-mean, on one advantage a list."""
    mask_BT, eos_BT, old_BT, logp_BT = batch()
    list_B1 = by_hand()[:, :1]
    units = make_units(RANK_BT, eos_BT, list_B1, unit="token", num_ranks=K)
    gradients, losses = [], []
    for mode, advantage_BT in (("rank_grpo", hide_units(units)), ("vanilla", list_B1.expand(6, 8).contiguous())):
        value_BT = logp_BT.clone().requires_grad_()
        loss, _ = verl_loss(list(range(6)), value_BT, old_BT, advantage_BT, mode=mode)
        loss.backward()
        gradients.append(value_BT.grad)
        losses.append(loss.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# From a reward function's K numbers to `rm_scores`


def rollout_config():
    return OmegaConf.create({"algorithm": {"num_ranks": K}})


def scored(tokens, answer):
    """What the reward manager makes of one list, padded as a batch is."""
    from toy import make_tokenizer

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        assert solution_str.startswith("a (1990)") and ground_truth == ["a"]
        return answer

    manager = get_reward_manager_cls("rank_grpo")(rollout_config(), make_tokenizer(), compute_score)
    columns = {
        "prompts": torch.tensor([[0, 3]]),
        "responses": torch.tensor([tokens + [0, 0]]),
        "attention_mask": torch.tensor([[0, 1] + [1] * len(tokens) + [0, 0]]),
    }
    facts = {"data_source": "toy", "reward_model": {"ground_truth": ["a"]}, "extra_info": {}}
    named = {name: np.array([value], dtype=object) for name, value in facts.items()}
    data = DataProto(batch=TensorDict(columns, batch_size=1), non_tensor_batch=named)
    return manager, data, manager.loop.run_until_complete(manager.run_single(data))  # its worker runs it there


def test_the_reward_manager_marks_and_the_agent_loop_carries():
    from toy import make_tokenizer

    tokens = [4, 5, 6, 1]
    manager, data, result = scored(tokens, [1.0, 0.0, 0.5])
    (expected,) = mark_lists([tokens], [[1.0, 0.0, 0.5]], K, RankSegmenter(make_tokenizer()), [1])
    assert result["reward_score"] == expected and len(expected) == 4
    assert result["reward_extra_info"] == {"acc": 1.5}
    assert manager.assemble_rm_scores(data, [expected]).tolist() == [[*expected, 0.0, 0.0]]
    plain = AgentLoopOutput(prompt_ids=[3], response_ids=tokens, response_mask=[1] * 4, metrics=AgentLoopMetrics())
    made = MarkedOutput.model_construct(_fields_set=set(plain.model_fields_set), **dict(plain))
    made.reward_score = result["reward_score"]  # as verl's worker sets it
    columns = made.as_dict()
    assert columns["rm_scores"].tolist() == expected and columns["rm_scores"].dtype == torch.float32
    assert columns.keys() == plain.as_dict().keys() | {"rm_scores"}
    made.reward_score = 1.0
    with pytest.raises(ConfigError, match="set reward.reward_manager.name=rank_grpo"):
        made.as_dict()


def test_the_agent_loop_is_verls_single_turn(monkeypatch):
    plain = AgentLoopOutput(prompt_ids=[3], response_ids=[4], response_mask=[1], metrics=AgentLoopMetrics())

    async def run(self, sampling_params, **options):
        assert options == {"raw_prompt": "x"}
        return plain

    monkeypatch.setattr(SingleTurnAgentLoop, "run", run)
    made = asyncio.run(object.__new__(RankAgentLoop).run({}, raw_prompt="x"))
    assert isinstance(made, MarkedOutput) and made.model_fields_set == plain.model_fields_set
    assert dict(made) == dict(plain)


@pytest.mark.parametrize("answer", [[1.0, 0.0], 1.0, [1.0, 0.0, float("nan")]])
def test_rewards_that_are_not_k_numbers_are_refused(answer):
    with pytest.raises(ConfigError, match="list 0: expected 3 finite numbers"):
        scored([4, 5, 6, 1], answer)


# ----------------------------------------------------------------------------------------------------------------------
# The plug-in


def loaded(tmp_path, **variables):
    """A process that imports verl and asks whether the names are known, with this package's entry point beside it."""
    folder = tmp_path / "rankgrpo-0.dist-info"
    folder.mkdir(exist_ok=True)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["verl.plugins"]
    (folder / "entry_points.txt").write_text("[verl.plugins]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: rankgrpo\nVersion: 0\n")
    code = (
        "import verl; from rankgrpo.rollouts.integrations.verl import check_registered; check_registered(); print('ok')"
    )
    path = os.pathsep.join([str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path} | variables, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def test_verl_loads_the_plug_in_by_itself(tmp_path):
    done = loaded(tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith("ok"), done.stderr[-3000:]


def test_a_plug_in_that_was_not_loaded_is_told(tmp_path):
    done = loaded(tmp_path, VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 1
    assert "verl knows no policy loss and no advantage estimator and no reward manager and no agent loop" in done.stderr


def test_the_keys_of_the_page_are_verls():
    """Every key that docs/integrations/verl.md sets is in verl's own configuration, but for the one it adds."""
    page = (ROOT / "docs" / "integrations" / "verl.md").read_text()
    script = page.partition("```bash verl_run.sh\n")[2].partition("```")[0]
    assert script.count("\n") <= 40
    folder = Path(importlib.util.find_spec("verl").submodule_search_locations[0]) / "trainer" / "config"
    shipped = OmegaConf.load(folder / "_generated_ppo_trainer.yaml")
    keys = [word.partition("=")[0] for word in script.split() if "=" in word]
    assert "+algorithm.num_ranks" in keys and len(keys) > 5
    missing = object()
    for key in keys:
        if not key.startswith("+"):
            assert OmegaConf.select(shipped, key, default=missing) is not missing, key
