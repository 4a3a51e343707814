"""Exports of many families in vLLM on a CPU: it reads the folder, and its log-probs are those that training computes.

Each family costs an engine: a few run with `make test-vllm`, all with `pytest -m "families or not families"
tests/vllm_engine/test_exports.py`.
"""

import pytest
import torch
from against_eager import example_groups
from model_families import make_model, make_tokenizer
from tiny_world import tiny_config
from vllm_families import ALIKE, BOUND, FAST, NOT_STARTED, READ_ONLY, SIZES, UNLIKE
from world import ALONE

from rankgrpo.errors import SamplingError
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import open_policy
from rankgrpo.sampler.sync import different_tensors, sync_weights
from rankgrpo.sampler.verify import verify_policy
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler, import_vllm
from rankgrpo.sampler.vllm_models import check_architecture

LATER = pytest.mark.families
CONFIG = tiny_config("data.max_prompt_tokens=60", "rl.max_new_tokens=30", "rl.sampler=vllm")
ENGINE = EngineConfig(max_tokens=128, rows=8)
_kept = []  # vLLM's process groups go with the first engine that is dropped, under those that came later


@pytest.fixture(autouse=True)
def asked_at_once(monkeypatch):
    """vLLM looks at a class that it has not met before in a process of its own, which takes longer than the test."""
    import_vllm()
    import vllm.model_executor.models.registry as registry

    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())


@pytest.fixture
def fresh_groups(asked_at_once):
    """vLLM keeps the process groups of its first engine, and a dense model's lack what routed experts need."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def opened(name, folder):
    """A policy as training has it, of a model that was written by transformers."""
    make_model(name, sizes=SIZES).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return verify_policy(open_policy(folder, CONFIG.model, ALONE.device), CONFIG)


def reader(folder, policy, monkeypatch):
    """Our sampler over an engine whose weights vLLM itself has read from `folder`."""
    vllm = import_vllm()
    start = vllm.LLM
    with monkeypatch.context() as patch:
        patch.setattr(vllm, "LLM", lambda **options: start(**options | {"model": str(folder), "load_format": "auto"}))
        _kept.append(VLLMSampler(policy.model, policy.tokenizer, ENGINE, ALONE, allowed_V=policy.allowed_V))
    return _kept[-1]


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


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=LATER) for name in ALIKE])
def test_vllm_reads_an_export_and_gives_its_log_probs(name, tmp_path, monkeypatch):
    policy = opened(name, tmp_path / "model")
    check_architecture(policy.model, ALONE.device)
    policy.export(tmp_path / "export", ALONE)
    sampler = reader(tmp_path / "export", policy, monkeypatch)
    groups, logp = sampled(sampler)
    assert gap(policy, groups, logp) <= BOUND
    change(policy)
    assert gap(policy, groups, logp) > 200 * BOUND  # one matrix that is not the export's shows
    sync_weights(sampler, policy.model)
    assert different_tensors(sampler, policy.model) == []
    assert gap(policy, *sampled(sampler)) <= BOUND


@LATER
@pytest.mark.parametrize("name", READ_ONLY)
def test_vllm_reads_an_export_that_it_cannot_be_sent_an_update_of(name, tmp_path, monkeypatch, fresh_groups):
    policy = opened(name, tmp_path / "model")
    message = f"{READ_ONLY[name]} .*; set rl.sampler=hf"
    with pytest.raises(SamplingError, match=message):
        check_architecture(policy.model, ALONE.device)
    with pytest.raises(SamplingError, match=message):
        reader(tmp_path / "model", policy, monkeypatch)
    policy.export(tmp_path / "export", ALONE)
    monkeypatch.setattr("rankgrpo.sampler.vllm.check_replaceable", lambda model, device: None)
    groups, logp = sampled(reader(tmp_path / "export", policy, monkeypatch))
    assert gap(policy, groups, logp) <= BOUND
    change(policy)
    assert gap(policy, groups, logp) > 200 * BOUND


@LATER
@pytest.mark.parametrize("name", UNLIKE)
def test_vllm_computes_some_families_otherwise(name, tmp_path, monkeypatch):
    policy = opened(name, tmp_path / "model")
    policy.export(tmp_path / "export", ALONE)
    assert gap(policy, *sampled(reader(tmp_path / "export", policy, monkeypatch))) > 10 * BOUND


@LATER
@pytest.mark.parametrize("name", NOT_STARTED)
def test_vllm_does_not_start_with_some_families(name, tmp_path, monkeypatch):
    policy = opened(name, tmp_path / "model")
    policy.export(tmp_path / "export", ALONE)
    with pytest.raises(SamplingError, match=NOT_STARTED[name]):
        reader(tmp_path / "export", policy, monkeypatch)
