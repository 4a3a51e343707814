"""RankGRPOTrainer in the real TRL: its gradients, its parity with TRL's own GRPO, and that it learns."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("PEER") != "trl":
    pytest.skip("TRL has an environment of its own: `make test-trl`", allow_module_level=True)

from datasets import Dataset
from toy import K, hits, prompts, save_model, write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.forward import pack_logprobs
from rankgrpo.model.packing import Group, build_pack
from rankgrpo.parse import RankSegmenter
from rankgrpo.rollouts.integrations import warn_if_untested
from rankgrpo.rollouts.integrations.trl import RankGRPOTrainer
from rankgrpo.units import make_units

# Shape letters: P prompts, G lists a prompt, B lists, T tokens, K ranks.

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LISTS = 24


def run(folder, num_processes=1, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    words = [*(launcher if num_processes > 1 else []), str(HERE / "run_trl.py"), str(folder), json.dumps(options)]
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [torch.load(folder / f"recorded-{rank}.pt", weights_only=True) for rank in range(num_processes)]


def real_tokens(ids, mask):
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def our_gradient(folder, parts, before, first, group, beta):
    """The gradient of one big batch of rank_grpo_loss over the lists of all processes, through our own forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lists = [tokens for part in parts for tokens in real_tokens(part["completion_ids"], part["completion_mask"])]
    asked = [tokens for part in parts for tokens in real_tokens(part["prompt_ids"], part["prompt_mask"])]
    wanted = [names for part in parts for names in part["groundtruth"]]
    reward_PGK = torch.tensor(hits(tokenizer.batch_decode(lists, skip_special_tokens=True), wanted)).view(-1, group, K)
    centred_PGK = reward_PGK - reward_PGK.mean(1, keepdim=True)
    advantage_BK = (centred_PGK / (reward_PGK.std(1, keepdim=True) + 1e-4)).flatten(0, 1)

    starts = range(0, len(lists), group)
    pack = build_pack([Group(asked[start], lists[start : start + group]) for start in starts])
    logps = {}
    for name, weights in {"now": before, "old": first, "ref": first}.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        model.load_state_dict(weights, strict=False)  # the head is the embedding
        use_shared_prefix(model)
        logps[name] = (model, pack_logprobs(model, pack))
    rank_BT = RankSegmenter(tokenizer)(pack.token_ids_BT, pack.mask_BT)
    eos_BT = (pack.token_ids_BT == tokenizer.eos_token_id) & pack.mask_BT
    units = make_units(rank_BT, eos_BT, advantage_BK, num_ranks=K)
    model, logp_BT = logps["now"]
    loss, metrics = rank_grpo_loss(
        logp_BT, logps["old"][1].detach(), units.unit_BT, units.advantage_BU, ref_logp_BT=logps["ref"][1].detach(),
        kl_coef=beta, denominator=len(lists) * K,
    )  # fmt: skip
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, metrics, rank_BT, advantage_BK


CASES = [
    {"num_processes": 1, "accumulation": 1, "iterations": 2, "beta": 0.1},
    {"num_processes": 1, "accumulation": 4, "iterations": 1, "beta": 0.0},
    {"num_processes": 2, "accumulation": 1, "iterations": 1, "beta": 0.1},
    {"num_processes": 2, "accumulation": 4, "iterations": 2, "beta": 0.0},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_ours(tmp_path, case):
    """Groups of 8 over processes of 12 lists: the second group lies on both."""
    save_model(tmp_path / "model")
    steps = case["iterations"]
    recorded = run(tmp_path, **case, lists=LISTS, group=8, steps=steps, lr=0.004)
    parts = [process["rollouts"][0] for process in recorded]
    first = recorded[0]["steps"][0]["before"]
    log = json.loads((tmp_path / "log.json").read_text())
    for number in range(steps):
        step = recorded[0]["steps"][number]
        expected, metrics, rank_BT, advantage_BK = our_gradient(tmp_path, parts, step["before"], first, 8, case["beta"])
        found = torch.cat([step["gradient"][name].flatten() for name in expected])
        wanted = torch.cat([gradient.flatten() for gradient in expected.values()])
        assert wanted.norm() > 1e-3
        assert (found - wanted).norm() / wanted.norm() < 1e-5
        near = 1e-4 if case["accumulation"] == 1 else 0.03  # TRL logs the mean of the micro-batches' means
        assert log[number]["clip_ratio/low_mean"] == pytest.approx(float(metrics["ratio/clip_low_frac"]), abs=near)
        assert log[number]["clip_ratio/high_mean"] == pytest.approx(float(metrics["ratio/clip_high_frac"]), abs=near)
        assert log[number]["ratio/mean"] == pytest.approx(float(metrics["ratio/mean"]), abs=near)
    if steps == 2:  # the second step is off-policy, outside of the clip band in places
        assert 0.02 < metrics["ratio/clip_low_frac"] + metrics["ratio/clip_high_frac"] < 0.7
    # What the rollouts contain: uneven lists, a rank without tokens, and advantages of their own at every rank.
    present_BK = torch.stack([(rank_BT == rank).any(1) for rank in range(K)], 1)
    assert (~present_BK & (rank_BT.amax(1, keepdim=True) > torch.arange(K))).any()
    assert len(set(map(tuple, present_BK.tolist()))) > 2
    assert (advantage_BK != advantage_BK[:, :1]).any()
    carried = torch.cat([part["unit_advantage"][:, :K] for part in parts])
    torch.testing.assert_close(carried, advantage_BK, rtol=1e-4, atol=1e-5)


def make_trainer(folder, base=RankGRPOTrainer, rewards=hits, lists=8, args=None, **options):
    settings = {
        "use_cpu": True, "bf16": False, "per_device_train_batch_size": lists, "num_generations": 4,
        "max_completion_length": 14, "gradient_checkpointing": False, "report_to": [], "seed": 3, "epsilon": 0.06,
        "epsilon_high": 0.08, "save_strategy": "no", "use_bias_correction_kl": False,
    }  # fmt: skip
    args = GRPOConfig(output_dir=str(folder / "out"), **settings | (args or {}))
    data = Dataset.from_list(prompts(12))
    if base is RankGRPOTrainer:
        return base(str(folder / "model"), rewards, K, args, train_dataset=data, **options)
    return base(str(folder / "model"), rewards, args, train_dataset=data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    save_model(folder / "model")
    return folder


def sampled(trainer):
    """One batch as the trainer makes it, off-policy: the old log-probs are some way off."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    inputs = [row for row in prompts(2) for _ in range(4)]
    torch.manual_seed(1)
    batch = trainer._generate_and_score_completions(inputs)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logp_BT, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1]
        )
    batch["old_per_token_logps"] = logp_BT + 0.1 * torch.randn(logp_BT.shape)
    return batch


def gradient_of(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("unit, level", [("token", "token"), ("list", "sequence")])
def test_with_its_own_unit_it_is_the_hosts_grpo(folder, unit, level):
    """What differs then is the method alone."""
    ours = make_trainer(folder, unit=unit, args={"loss_type": "grpo", "beta": 0.1 if unit == "token" else 0.0})
    batch = sampled(ours)
    if unit == "token":
        batch["ref_per_token_logps"] = batch["ref_per_token_logps"] + 0.2 * torch.randn(batch["unit"].shape)
    loss = ours._compute_loss(ours.model, batch)
    found = gradient_of(ours, loss)
    ours.importance_sampling_level, ours.loss_type = level, "grpo"
    expected = GRPOTrainer._compute_loss(ours, ours.model, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, gradient_of(ours, expected), rtol=1e-4, atol=1e-6)
    for name in ("kl",) * (unit == "token") + ("entropy",):
        mine, theirs = ours._metrics["train"][name]
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_correction_of_vllm_is_by_rank(folder, mode):
    trainer = make_trainer(
        folder, args={"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.1}
    )
    batch = sampled(trainer)
    noise = 0.3 * torch.randn(batch["old_per_token_logps"].shape)
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"] - noise
    batch["sampling_per_token_logps"][:, 0] = torch.nan  # vLLM could not score it
    batch["importance_sampling_ratio"] = torch.ones(1)
    weight_BU = trainer._weight(batch)
    touched = 0
    for row, units in enumerate(batch["unit"].tolist()):
        for unit in range(weight_BU.shape[1]):
            gaps = [0.0 if t == 0 else noise[row, t].item() for t, u in enumerate(units) if u == unit]
            ratio = math.exp(sum(gaps) / len(gaps)) if gaps else 1.0
            expected = min(ratio, 1.1) if mode == "token_truncate" else ratio * (ratio <= 1.1)
            touched += expected != ratio
            assert weight_BU[row, unit].item() == pytest.approx(expected, rel=1e-5)
    assert touched


def test_reward_rises_in_20_steps(tmp_path):
    save_model(tmp_path / "model")
    run(tmp_path, accumulation=1, iterations=1, beta=0.0, lists=64, group=8, steps=20, lr=0.01, max_grad_norm=1.0)
    log = json.loads((tmp_path / "log.json").read_text())
    reward = [line["reward"] for line in log if "reward" in line]
    assert len(reward) == 20
    assert sum(reward[-5:]) > 1.5 * sum(reward[:5])
    for line in log[:20]:
        assert line["reward"] == pytest.approx(sum(line[f"reward/rank_{rank:02d}"] for rank in range(K)), abs=1e-4)


def test_the_users_script_runs(tmp_path):
    page = (ROOT / "docs" / "integrations" / "trl.md").read_text()
    script = page.partition("```python train_trl.py\n")[2].partition("```")[0]
    assert 10 < script.count("\n") <= 40
    (tmp_path / "train_trl.py").write_text(script)
    save_model(tmp_path / "model")
    write_prompts(tmp_path / "prompts.jsonl", 16)
    words = [
        "train_trl.py",
        "model",
        "prompts.jsonl",
        "max_steps=2",
        "num_generations=4",
        "per_device_train_batch_size=4",
    ]
    done = subprocess.run(
        [sys.executable, *words, "gradient_accumulation_steps=2", "max_completion_length=14"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "trained" / "model.safetensors").exists() and "reward/rank_19" in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    "setting, value",
    [("loss_type", "dr_grpo"), ("importance_sampling_level", "sequence"), ("scale_rewards", "batch"), ("delta", 1.5)],
)
def test_settings_of_other_losses_are_refused(folder, setting, value):
    with pytest.raises(ConfigError, match=f"{setting}='?{value}'? .leave it at"):
        make_trainer(folder, args={setting: value})


def test_the_kl_of_another_estimator_is_refused(folder):
    with pytest.raises(
        ConfigError, match="beta=0.1 with use_bias_correction_kl=True.*set use_bias_correction_kl=False"
    ):
        make_trainer(folder, args={"beta": 0.1, "use_bias_correction_kl": True})


@pytest.mark.parametrize(
    "rows, message",
    [
        (lambda n: [[1.0] * K] * (n - 1), r"bad returned 7 rows of rewards for 8 completions"),
        (lambda n: [[1.0] * (K - 1)] * n, r"bad, completion 0: expected 3 finite numbers"),
        (lambda n: [[1.0] * K] * (n - 1) + [[math.nan] * K], r"bad, completion 7: expected 3 finite numbers"),
        (lambda n: [1.0] * n, r"bad, completion 0: expected 3 finite numbers"),
    ],
)
def test_rewards_that_are_not_k_numbers_are_refused(folder, rows, message):
    def bad(completions, **_):
        return rows(len(completions))

    trainer = make_trainer(folder, rewards=bad)
    with pytest.raises(ConfigError, match=message):
        sampled(trainer)


def test_rewards_a_completion_are_refused(folder):
    with pytest.raises(ConfigError, match="give rank_reward_funcs"):
        RankGRPOTrainer(str(folder / "model"), hits, K, reward_funcs=hits)


def test_an_untested_version_is_named():
    with pytest.warns(UserWarning, match=r"trl 1.17.2 is outside .* trl>=1.16,<1.17"):
        warn_if_untested("trl", "1.17.2", (1, 16), (1, 17))
    with pytest.warns(UserWarning, match="trl 1.15.0"):
        warn_if_untested("trl", "1.15.0", (1, 16), (1, 17))
    warn_if_untested("trl", "1.16.9+cpu", (1, 16), (1, 17))
