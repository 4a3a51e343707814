"""A sampler with a copy of the weights, kept equal to the trainer's; tests/vllm_engine has the real engine."""

import copy

import pytest
import torch
from tiny_world import ALONE, taught_dataset, tiny_config, tiny_dataset
from torch import nn

import rankgrpo.train as train_module
from rankgrpo.errors import SamplingError, TrainingError
from rankgrpo.model.policy import open_policy
from rankgrpo.model.presets import make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.sampler.base import FINGERPRINT_FACTOR, fingerprint
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sampler.hf import HFSampler
from rankgrpo.sampler.sync import OTHERS, different_tensors, sync_weights
from rankgrpo.train import Updater, train


class CopyingSampler(HFSampler):
    """transformers' sampling from a copy of the model, of which the query, key and value weights lie in one tensor."""

    owns_weights = True
    dtype = torch.float32
    holds_weights = True

    def __init__(self, policy):
        super().__init__(copy.deepcopy(policy.model), policy.tokenizer, allowed_V=policy.allowed_V)
        self.calls = []

    def load_weights(self, named):
        self.calls.append("load")
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named:
                own[name].copy_(tensor)

    def fingerprints(self):
        totals = {}
        for name, parameter in self.model.named_parameters():
            key = self.stored_name(name)
            totals[key] = totals.get(key, 0) + int(fingerprint(parameter))
        return totals

    def stored_name(self, name):
        module, leaf = name.rsplit(".", 1)
        return f"{module[:-6]}qkv_proj.{leaf}" if module.endswith(("q_proj", "k_proj", "v_proj")) else name

    def sleep(self):
        self.calls.append("sleep")

    def wake(self):
        self.calls.append("wake")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync") / "init"
    return make_init("tiny", taught_dataset(), folder, seed=0, tiny=TinyConfig(32, 2, 64, 2, 1, 1024))


@pytest.fixture
def policy(start):
    return open_policy(start, tiny_config().model, ALONE.device)


def nudge(model: nn.Module, only: str = "") -> None:
    """Change the last bit of one number of every parameter named."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.view(torch.int32).flatten()[-1] += 1


def test_one_bit_in_one_tensor_is_found_and_named(policy):
    sampler = CopyingSampler(policy)
    assert different_tensors(sampler, policy.model) == []
    nudge(policy.model, "layers.1.self_attn.k_proj.weight")
    assert different_tensors(sampler, policy.model) == ["model.layers.1.self_attn.qkv_proj.weight"]
    sync_weights(sampler, policy.model)
    assert different_tensors(sampler, policy.model) == []
    assert sampler.calls[-3:] == ["wake", "load", "wake"]


def test_a_tensor_left_out_a_corrupted_one_and_a_whole_sync_left_out(policy, monkeypatch):
    load = CopyingSampler.load_weights
    sampler = CopyingSampler(policy)

    def leave_out(self, named):
        load(self, ((name, tensor) for name, tensor in named if name != "model.norm.weight"))

    nudge(policy.model)
    monkeypatch.setattr(CopyingSampler, "load_weights", leave_out)
    with pytest.raises(SamplingError, match="policy's: model.norm.weight differ"):
        sync_weights(sampler, policy.model)

    def corrupt(self, named):
        load(self, ((name, tensor * 1.0001 if "down_proj" in name else tensor) for name, tensor in named))

    monkeypatch.setattr(CopyingSampler, "load_weights", corrupt)
    with pytest.raises(SamplingError, match="mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight differ"):
        sync_weights(sampler, policy.model)

    nudge(policy.model)
    monkeypatch.setattr(CopyingSampler, "load_weights", lambda self, named: None)
    with pytest.raises(SamplingError, match="model.embed_tokens.weight, .* more differ"):
        sync_weights(sampler, policy.model)


def test_tensors_of_an_unknown_place_are_compared_as_a_whole(policy, monkeypatch):
    monkeypatch.setattr(CopyingSampler, "stored_name", lambda self, name: f"elsewhere.{name}")
    stored = CopyingSampler.fingerprints
    monkeypatch.setattr(
        CopyingSampler, "fingerprints", lambda self: {f"inside {k}": v for k, v in stored(self).items()}
    )
    sampler = CopyingSampler(policy)
    assert different_tensors(sampler, policy.model) == []
    nudge(policy.model, "model.norm")
    assert different_tensors(sampler, policy.model) == [OTHERS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fingerprints_add_up_and_see_every_bit(dtype):
    tensor = torch.randn(3 * 2**18 + 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = int(fingerprint(tensor))
    head = tensor[:5].view(torch.int32 if dtype == torch.float32 else torch.int16).tolist()
    by_hand = sum((v + FINGERPRINT_FACTOR * v * v + 2**31) % 2**32 - 2**31 for v in head)
    assert int(fingerprint(tensor[:5])) == by_hand
    assert whole == int(fingerprint(tensor[:1001])) + int(fingerprint(tensor[1001:]))
    assert whole == int(fingerprint(torch.cat([tensor.flip(0), torch.zeros(64, dtype=dtype)])))
    bits = tensor.clone().view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[5] += 1
    bits[9] -= 1  # a plain sum of the bits would not change
    assert whole != int(fingerprint(bits.view(dtype)))


def test_the_hf_sampler_needs_no_sync(policy):
    sampler = hf_sampler(policy)
    before = fingerprint(policy.model.get_input_embeddings().weight)
    sync_weights(sampler, policy.model)
    assert different_tensors(sampler, policy.model) == []
    assert fingerprint(policy.model.get_input_embeddings().weight) == before


def run(start, out, *words):
    train(tiny_config("rl.num_steps=4", *words), tiny_dataset(), start, out / "rl", ALONE)
    return read_metrics(out / "rl" / "metrics.jsonl")[0]


def numbers(rows):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_run_through_a_copy_is_the_run_without_one(start, tmp_path, monkeypatch):
    alone = run(start, tmp_path / "a")
    opened = []

    def open_copy(policy, config, parallel):
        opened.append(CopyingSampler(policy))
        with torch.no_grad():
            for parameter in opened[0].model.parameters():
                parameter.zero_()  # only the sync can have filled it
        return opened[0]

    monkeypatch.setattr(train_module, "open_sampler", open_copy)
    assert numbers(run(start, tmp_path / "b")) == numbers(alone)
    # Filled once before the first list, then woken and filled after each of the four updates; asleep in between.
    assert opened[0].calls == ["wake", "load"] + ["sleep", "wake", "load"] * 4 + ["sleep"]


def test_a_sync_left_out_stops_the_run_at_the_next_step(start, tmp_path, monkeypatch):
    """The loop itself forgets to sync: no probe runs, and the mismatch of the next lists tells."""
    monkeypatch.setattr(train_module, "open_sampler", lambda policy, config, parallel: CopyingSampler(policy))
    real, real_step, calls, norms = train_module.sync_weights, Updater.step, [], []

    def only_the_first(sampler, model):
        calls.append(1)
        if len(calls) == 1:
            real(sampler, model)

    def step(self, *args):
        norms.append(real_step(self, *args))
        return norms[-1]

    monkeypatch.setattr(train_module, "sync_weights", only_the_first)
    monkeypatch.setattr(Updater, "step", step)
    with pytest.raises(TrainingError, match=r"mismatch_alarm = 1.001\. The sampler's weights.*embed_tokens") as stopped:
        run(start, tmp_path, "rl.lr=1e-2", "rl.mismatch_alarm=1.001")
    changed_at = next(step for step, norm in enumerate(norms, start=1) if norm > 0)
    assert str(stopped.value).startswith(f"RL step {changed_at + 1}, ")


def test_equal_weights_that_compute_differently_are_told_apart(start, tmp_path, monkeypatch):
    class Skewed(CopyingSampler):
        def _draw(self, hidden_BD, uniform_B, temperature):
            return super()._draw(hidden_BD * 0.5, uniform_B, temperature)

    monkeypatch.setattr(train_module, "open_sampler", lambda policy, config, parallel: Skewed(policy))
    with pytest.raises(TrainingError, match="RL step 1, .*equal bit for bit"):
        run(start, tmp_path / "a", "rl.mismatch_alarm=1.01")
    monkeypatch.setattr(Skewed, "holds_weights", False)
    with pytest.raises(TrainingError, match="RL step 1, .*dropped its weights .*rl.vllm_sleep=1 keeps them"):
        run(start, tmp_path / "b", "rl.mismatch_alarm=1.01")
