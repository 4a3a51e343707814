"""Exports of many families in vLLM on a CPU: it reads the folder, and its log-probs are those that training computes.

Each family costs an engine, so all wait for `pytest -m families tests/vllm_engine/test_exports.py`.
"""

import json

import pytest
import torch
from model_families import make_model, make_tokenizer
from test_families import example_groups
from tiny_world import tiny_config
from vllm_families import ALIKE, BOUND, PACKED_EXPERTS, PUBLISHED, SIZES
from world import ALONE

from rankgrpo.errors import SamplingError
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import open_policy
from rankgrpo.sampler.sync import different_tensors, sync_weights
from rankgrpo.sampler.verify import verify_policy
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler, import_vllm

pytestmark = pytest.mark.families

CONFIG = tiny_config("data.max_prompt_tokens=60", "rl.max_new_tokens=30", "rl.sampler=vllm")
ENGINE = EngineConfig(max_tokens=128, rows=8)


@pytest.fixture(autouse=True)
def asked_at_once(monkeypatch):
    """vLLM looks at a class that it has not met before in a process of its own, which takes longer than the test."""
    import_vllm()
    import vllm.model_executor.models.registry as registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


def opened(name, folder):
    """A policy as training has it, of a model that was written by transformers."""
    make_model(name, sizes=SIZES).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PUBLISHED.get(name, {})))
    make_tokenizer().save_pretrained(folder)
    return verify_policy(open_policy(folder, CONFIG.model, ALONE.device), CONFIG)


def reader(folder, policy, monkeypatch):
    """Our sampler over an engine whose weights vLLM itself has read from `folder`."""
    vllm = import_vllm()
    start = vllm.LLM
    monkeypatch.setattr(vllm, "LLM", lambda **options: start(**options | {"model": str(folder), "load_format": "auto"}))
    return VLLMSampler(policy.model, policy.tokenizer, ENGINE, ALONE, allowed_V=policy.allowed_V)


def sampled(sampler):
    """Seeded lists of prompts on both sides of the windows, with the engine's log-probs of their tokens."""
    prompts = [group.prompt_ids for group in example_groups()]
    lists = sampler.sample(prompts, group_size=2, seeds=[5, 6, 7], max_new_tokens=24, temperature=0.7)
    groups = [Group(p, [each.token_ids for each in own]) for p, own in zip(prompts, lists, strict=True)]
    return groups, torch.tensor([value for own in lists for each in own for value in each.logp])


@torch.no_grad()
def gap(policy, groups, logp):
    """Largest distance of the engine's log-probs from the policy's."""
    own = []
    for group in groups:
        pack, logp_BT = policy.logprobs([group], temperature=0.7)
        own.append(logp_BT[pack.mask_BT])
    return float((torch.cat(own) - logp).abs().max())


@torch.no_grad()
def change(policy):
    """Move one matrix of the first layer by a tenth of its size."""
    decoder = policy.model.get_decoder()
    matrix = [p for name, p in decoder.named_parameters() if ".0." in f".{name}" and p.ndim >= 2][-1]
    matrix.add_(0.1 * matrix.std() * torch.randn(matrix.shape, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("name", ALIKE)
def test_vllm_reads_an_export_and_gives_its_log_probs(name, tmp_path, monkeypatch):
    policy = opened(name, tmp_path / "model")
    policy.export(tmp_path / "export", ALONE)
    sampler = reader(tmp_path / "export", policy, monkeypatch)
    groups, logp = sampled(sampler)
    assert gap(policy, groups, logp) <= BOUND
    change(policy)
    assert gap(policy, groups, logp) > 20 * BOUND  # one matrix that is not the export's shows
    sync_weights(sampler, policy.model)
    assert different_tensors(sampler, policy.model) == []
    assert gap(policy, *sampled(sampler)) <= BOUND


@pytest.mark.parametrize("name", PACKED_EXPERTS)
def test_vllm_reads_routed_experts_and_takes_no_others_on_a_cpu(name, tmp_path, monkeypatch):
    policy = opened(name, tmp_path / "model")
    with pytest.raises(SamplingError, match=r"packs routed experts .*; set rl.sampler=hf"):
        VLLMSampler(policy.model, policy.tokenizer, ENGINE, ALONE, allowed_V=policy.allowed_V)
    policy.export(tmp_path / "export", ALONE)
    monkeypatch.setattr("rankgrpo.sampler.vllm.check_experts", lambda model: None)
    sampler = reader(tmp_path / "export", policy, monkeypatch)
    groups, logp = sampled(sampler)
    assert gap(policy, groups, logp) <= BOUND
    change(policy)
    assert gap(policy, groups, logp) > 20 * BOUND
