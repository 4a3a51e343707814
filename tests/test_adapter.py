import math
import shutil

import pytest
import torch
from tiny_world import ALONE, taught_dataset, tiny_config, tiny_dataset, tiny_demonstrations
from torch import nn
from transformers import AutoModelForCausalLM

import rankgrpo.model.policy
from rankgrpo.config import AdapterConfig
from rankgrpo.config_file import load_config
from rankgrpo.errors import ConfigError
from rankgrpo.model.adapter import (
    adapters_off,
    has_adapters,
    left_out,
    merged_parameters,
    merged_weight,
    target_names,
)
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import open_policy, open_reference
from rankgrpo.model.presets import load_policy, make_init
from rankgrpo.model.tiny import TinyConfig
from rankgrpo.runtime.tracker import read_metrics
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sampler.sync import different_tensors, sync_weights
from rankgrpo.sft import train_sft
from rankgrpo.sizing.architecture import find_architecture
from rankgrpo.train import train

KINDS = {
    "lora": AdapterConfig("lora", rank=3, alpha=6.0),
    "rslora": AdapterConfig("lora", rank=3, alpha=6.0, rslora=True),
    "dora": AdapterConfig("dora", rank=3, alpha=6.0),
    "dora-rslora": AdapterConfig("dora", rank=3, alpha=6.0, rslora=True, targets="q_proj, v_proj,down_proj"),
}
GROUPS = [Group([5, 9, 11, 4], [[7, 8, 2], [30, 31]]), Group([6, 3], [[21, 22, 23, 24], [12]])]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    size = tiny_config().model
    size = TinyConfig.of(size)
    return make_init("tiny", taught_dataset(), tmp_path_factory.mktemp("init") / "init", seed=0, tiny=size, num_ranks=5)


def opened(start, kind, moved=0.05):
    """A policy with adapters that are not at their start any more."""
    policy = open_policy(start, tiny_config().model, ALONE.device, adapter=KINDS[kind], seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter += moved * torch.randn(parameter.shape, generator=generator)
    return policy


# ----------------------------------------------------------------------------------------------------------------------
# Formulas


def test_merged_weights_by_hand():
    base, A, B = torch.tensor([[3.0, 0.0], [1.0, 2.0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0], [1.0]])
    assert merged_weight(base, A, B, 2.0).tolist() == [[3, 0], [3, 6]]
    found = merged_weight(base, A, B, 2.0, torch.tensor([6.0, 5.0]))
    assert found.flatten().tolist() == pytest.approx([6, 0, 5 * 3 / math.sqrt(45), 5 * 6 / math.sqrt(45)])


@pytest.mark.parametrize(("kind", "scale"), [("lora", 6 / 3), ("rslora", 6 / math.sqrt(3)), ("dora", 6 / 3)])
def test_a_layer_computes_its_formula(start, kind, scale):
    layer = opened(start, kind).model.model.layers[1].mlp.up_proj.requires_grad_(False)
    linear = (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"])
    weight, A, B = (module.weight.tolist() for module in linear)
    expected = [
        [weight[o][i] + scale * sum(B[o][r] * A[r][i] for r in range(3)) for i in range(len(weight[0]))]
        for o in range(4)
    ]
    if kind == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight
        norms = [math.sqrt(sum(value**2 for value in row)) for row in expected]
        expected = [[float(magnitude[o]) * value / norms[o] for value in row] for o, row in enumerate(expected)]
    found = layer(torch.eye(len(weight[0]))).T[:4]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# A policy with adapters


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged(start, tmp_path, kind):
    """In the shared-prefix forward, in what samples and in what is exported, within 1e-5."""
    policy = opened(start, kind)
    plain = open_policy(start, tiny_config().model, ALONE.device, trainable=False)
    pack, logp_BT = policy.logprobs(GROUPS)
    assert (logp_BT - plain.logprobs(GROUPS)[1]).abs().max() > 0.01  # the adapters do something

    policy.export(tmp_path / "export", ALONE)
    exported = open_policy(tmp_path / "export", tiny_config().model, ALONE.device, trainable=False)
    torch.testing.assert_close(exported.logprobs(GROUPS)[1], logp_BT, atol=1e-5, rtol=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert dict(model.named_parameters()).keys() == dict(plain.model.named_parameters()).keys()
    assert sorted(path.suffix for path in (tmp_path / "export").glob("adapter*")) == []

    (rollouts,) = hf_sampler(policy).sample([[5, 9, 11, 4]], group_size=3, seeds=[3], max_new_tokens=6)
    _, again_BT = policy.logprobs([Group([5, 9, 11, 4], [rollout.token_ids for rollout in rollouts])])
    for rollout, logp_T in zip(rollouts, again_BT.tolist(), strict=True):
        assert rollout.logp == pytest.approx(logp_T[: len(rollout.logp)], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_model_as_it_was_and_is_that_model_with_the_adapters_off(start, kind):
    plain = open_policy(start, tiny_config().model, ALONE.device, trainable=False)
    expected = plain.logprobs(GROUPS)[1]
    fresh = open_policy(start, tiny_config().model, ALONE.device, adapter=KINDS[kind], seed=1)
    assert torch.equal(fresh.logprobs(GROUPS)[1], expected)
    policy = opened(start, kind)
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    with torch.no_grad(), adapters_off(policy.model):
        assert torch.equal(policy.logprobs(GROUPS)[1], expected)
    assert {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad} == trained
    assert not torch.equal(policy.logprobs(GROUPS)[1], expected)


def test_the_reference_of_an_adapter_is_its_own_model(start, monkeypatch):
    loads = []
    monkeypatch.setattr(rankgrpo.model.policy, "load_policy", lambda *a, **k: loads.append(a) or load_policy(*a, **k))
    policy = opened(start, "dora")
    ref = open_reference(policy, start, tiny_config().model, ALONE.device, None)
    plain = open_policy(start, tiny_config().model, ALONE.device, trainable=False)
    assert ref.model is policy.model and len(loads) == 2
    with torch.no_grad():
        assert torch.equal(ref.logprobs(GROUPS)[1], plain.logprobs(GROUPS)[1])
    copy = open_reference(plain, start, tiny_config().model, ALONE.device, None)
    assert copy.model is not plain.model


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_adapter_and_nothing_else(start, kind):
    policy = opened(start, kind)
    policy.logprobs(GROUPS)[1].sum().backward()
    for name, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (".lora_" in name), name


class Copy:
    """A sampler with a copy of the plain model."""

    owns_weights, dtype = True, torch.float32

    def __init__(self, model):
        self.model = model

    def wake(self):
        pass

    def load_weights(self, named):
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named:
                own[name].copy_(tensor)

    def fingerprints(self):
        from rankgrpo.sampler.base import fingerprint

        return {name: int(fingerprint(parameter)) for name, parameter in self.model.named_parameters()}

    def stored_name(self, name):
        return name


def test_another_sampler_receives_the_merged_weights(start):
    policy = opened(start, "dora")
    sampler = Copy(load_policy(start)[0])
    assert "model.layers.0.self_attn.q_proj.weight" in different_tensors(sampler, policy.model)
    sync_weights(sampler, policy.model)
    assert different_tensors(sampler, policy.model) == []
    named = dict(merged_parameters(policy.model, torch.bfloat16))
    assert {tensor.dtype for tensor in named.values()} == {torch.bfloat16}
    assert sorted(named) == sorted(name for name, _ in sampler.model.named_parameters())


def test_targets(start):
    model, _ = load_policy(start)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in target_names(model, AdapterConfig())} == kinds
    assert target_names(model, AdapterConfig(targets="q_proj")) == [
        f"model.layers.{n}.self_attn.q_proj" for n in range(2)
    ]
    with pytest.raises(ConfigError, match="'query' is no Linear layer of LlamaForCausalLM that .*; it has down_proj"):
        target_names(model, AdapterConfig(targets="q_proj,query"))
    for word, message in (
        ("adapter.rank=0", "adapter.rank"),
        ("adapter.kind=qlora", "'none', 'lora', 'dora'"),
        ("adapter.targets=q_proj,", "adapter.targets"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(None, [word])


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_what_is_trained(start, kind):
    model = opened(start, kind).model
    counted = find_architecture("tiny", tiny_config().model).adapter_parameters(KINDS[kind])
    assert counted == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ----------------------------------------------------------------------------------------------------------------------
# The two loops

WORDS = ("adapter.kind=dora", "adapter.rslora=true", "adapter.rank=4", "sft.num_steps=4", "rl.num_steps=4",
         "rl.updates_per_batch=2", "rl.kl_coef=0.01", "rl.lr=1e-2")  # fmt: skip


def without_times(folder):
    rows, _ = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def cut_back(folder, step):
    """As after a kill: no export, and only the checkpoint of `step`."""
    shutil.rmtree(folder / "final")
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)


def test_both_stages_train_resume_bit_for_bit_and_keep_only_adapters(start, tmp_path):
    config = tiny_config(*WORDS)
    out, frozen = tmp_path / "run", dict(load_policy(start)[0].named_parameters())

    def sft():
        return train_sft(config, tiny_dataset(), tiny_demonstrations(), start, out / "sft", ALONE)

    def rl():
        return train(config, tiny_dataset(), out / "sft" / "final", out / "rl", ALONE)

    for stage, run in (("sft", sft), ("rl", rl)):
        run()
        rows = without_times(out / stage)
        assert all(math.isfinite(value) for row in rows for value in row.values())
        exported = {path.name: path.read_bytes() for path in (out / stage / "final").glob("*.safetensors")}
        cut_back(out / stage, 2)
        run()
        assert without_times(out / stage) == rows
        assert {path.name: path.read_bytes() for path in (out / stage / "final").glob("*.safetensors")} == exported
    rows = without_times(out / "rl")
    assert rows[1]["loss/kl"] < 0.1 * rows[-1]["loss/kl"]  # the reference is the start, not the moving policy
    assert rows[1]["mismatch/exp_abs_logp"] == pytest.approx(1.0, abs=1e-4)

    (checkpoint,) = (out / "rl" / "checkpoints").glob("step-00000002")
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    policy = open_policy(out / "rl" / "final", config.model, ALONE.device, adapter=config.adapter)
    assert has_adapters(policy.model)
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert size < 1.5 * 3 * 4 * trained + 20_000  # weights and two moments, and the headers that name them
    final = dict(AutoModelForCausalLM.from_pretrained(out / "rl" / "final").named_parameters())
    changed = {name for name, parameter in final.items() if not torch.equal(parameter, frozen[name])}
    assert changed == {name for name in final if name.endswith("_proj.weight")}


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures of experts


@pytest.mark.parametrize("name", ["glm4_moe", "dots1", "ernie4_5_moe"])
def test_a_shared_expert_is_adapted_and_routed_ones_are_left_out_with_a_word(name, tmp_path, capsys, monkeypatch):
    from model_families import make_model, make_tokenizer

    from rankgrpo.sampler import verify

    monkeypatch.setattr(verify, "_said", set())  # a line is said once in a process
    make_model(name).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    plain = open_policy(tmp_path / "model", tiny_config().model, ALONE.device, trainable=False)
    policy = opened(tmp_path / "model", "lora")
    adapted = {n.partition(".lora_A")[0] for n, _ in policy.model.named_parameters() if ".lora_A" in n}
    assert adapted == set(target_names(plain.model, KINDS["lora"]))
    assert any("shared_expert" in n for n in adapted) and not any(".experts" in n for n in adapted)

    policy = verify.verify_policy(policy, tiny_config())  # the sampler, too, computes what is trained
    assert "without adapters, so not trained: model.layers.mlp.experts" in capsys.readouterr().out
    logp_BT = policy.logprobs(GROUPS)[1]
    assert (logp_BT - plain.logprobs(GROUPS)[1]).abs().max() > 0.01
    policy.export(tmp_path / "export", ALONE)
    exported = open_policy(tmp_path / "export", tiny_config().model, ALONE.device, trainable=False)
    torch.testing.assert_close(exported.logprobs(GROUPS)[1], logp_BT, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "kinds", "why"),
    [
        (
            "zamba2",
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
            "its weight is that of other",
        ),
        ("jamba", {"dt_proj"}, "its weight is read without it"),
        ("llama4", {"router"}, "it returns something else"),
    ],
)
def test_layers_whose_merged_weight_would_mean_something_else_are_left_out(name, kinds, why):
    from model_families import make_model

    model = make_model(name)
    reasons = left_out(model)
    assert kinds <= {layer.rpartition(".")[2] for layer, reason in reasons.items() if reason.startswith(why)}
    assert reasons.keys().isdisjoint(target_names(model, AdapterConfig("lora")))
    with pytest.raises(
        ConfigError, match=f"'{min(kinds)}' is no Linear layer of {type(model).__name__} that an adapter"
    ):
        target_names(model, AdapterConfig("lora", targets=min(kinds)))


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OfThreeAxes(nn.Linear):
    def forward(self, x_BNI):
        return super().forward(x_BNI.view(-1, 2, self.in_features))


class Plain(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize(("kind", "out"), [(Twice, True), (OfThreeAxes, True), (Plain, False)])
def test_a_layer_whose_forward_is_its_own_has_an_adapter_where_it_returns_its_product(start, kind, out):
    model, _ = load_policy(start)
    layer = model.model.layers[0].mlp
    layer.up_proj = kind(layer.up_proj.in_features, layer.up_proj.out_features)
    assert ("model.layers.0.mlp.up_proj" in left_out(model)) == out
