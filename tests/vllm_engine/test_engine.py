"""The real engine on a CPU, one test process for all: sampling, sync and errors."""

import copy

import pytest
import torch
from world import ALONE, engine, make_model, prompts_of

from rankgrpo.errors import SamplingError
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy
from rankgrpo.sampler.hf import HFSampler
from rankgrpo.sampler.sync import different_tensors, sync_weights
from rankgrpo.sampler.vllm import EngineConfig, VLLMSampler


@pytest.fixture(scope="module", params=["tied", "untied"])
def world(request, tmp_path_factory):
    """(model, tokenizer, sampler) with equal weights; the untied model's head has more rows than there are ids."""
    model, tokenizer = make_model(tied=request.param == "tied", more_rows=64 if request.param == "untied" else 0)
    sampler = engine(model, tokenizer)
    sync_weights(sampler, model)
    return model, tokenizer, sampler


def trainer_logp(model, tokenizer, prompt, rollouts, temperature=1.0):
    model = copy.deepcopy(model)
    use_shared_prefix(model)
    policy = Policy(model, tokenizer, valid_token_mask(model, tokenizer), False)
    with torch.no_grad():
        group = Group(prompt, [rollout.token_ids for rollout in rollouts])
        pack, logp_BT = policy.logprobs([group], temperature=temperature)
    return logp_BT[pack.mask_BT]


def sampled_logp(rollouts):
    return torch.tensor([value for rollout in rollouts for value in rollout.logp])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(world, temperature):
    model, tokenizer, sampler = world
    prompts = prompts_of(tokenizer)
    groups = sampler.sample(prompts, group_size=4, seeds=[1, 2, 3], max_new_tokens=20, temperature=temperature)
    for prompt, rollouts in zip(prompts, groups, strict=True):
        expected = trainer_logp(model, tokenizer, prompt, rollouts, temperature)
        torch.testing.assert_close(sampled_logp(rollouts), expected, atol=2e-5, rtol=0)


def test_draws_depend_on_the_seed_of_the_prompt_alone(world):
    _, tokenizer, sampler = world
    prompts = prompts_of(tokenizer)
    whole = sampler.sample(prompts, group_size=4, seeds=[2**63 - 1, 2, 3], max_new_tokens=12)
    ids = [[rollout.token_ids for rollout in group] for group in whole]
    alone = sampler.sample(prompts[1:2], group_size=2, seeds=[2], max_new_tokens=12)
    assert [rollout.token_ids for rollout in alone[0]] == ids[1][:2]
    assert len({tuple(tokens) for group in ids for tokens in group}) == 12
    again = sampler.sample(prompts, group_size=4, seeds=[2**63 - 1, 2, 3], max_new_tokens=12)
    assert again == whole
    other = sampler.sample(prompts, group_size=4, seeds=[9, 10, 11], max_new_tokens=12)
    assert all(a.token_ids != b.token_ids for a, b in zip(sum(other, []), sum(whole, []), strict=True))


def test_greedy_lists_are_those_of_transformers(world):
    model, tokenizer, sampler = world
    prompts = prompts_of(tokenizer)
    wanted = {"group_size": 2, "seeds": [0, 0, 0], "max_new_tokens": 16, "temperature": 0.0}
    reference = HFSampler(model, tokenizer, allowed_V=valid_token_mask(model, tokenizer)).sample(prompts, **wanted)
    for ours, theirs in zip(sampler.sample(prompts, **wanted), reference, strict=True):
        assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
        assert [(r.text, r.finished) for r in ours] == [(r.text, r.finished) for r in theirs]
        torch.testing.assert_close(sampled_logp(ours), sampled_logp(theirs), atol=2e-5, rtol=0)


def test_prompts_of_more_tokens_than_the_engine_reads_at_once():
    """It reads 4,096 tokens at once on CPUs; a prompt that lies across the border waits instead of being cut in two."""
    model, tokenizer = make_model(tied=True)
    sampler = engine(model, tokenizer, rows=128)
    sync_weights(sampler, model)
    ids = tokenizer("I loved Alien (1979) and Stalker (1979). " * 20)["input_ids"]
    prompts = [[*ids[i : i + 90], i] for i in range(100)]
    groups = sampler.sample(prompts, group_size=1, seeds=list(range(100)), max_new_tokens=4)
    assert [len(rollouts) for rollouts in groups] == [1] * 100
    for i in (0, 45, 46, 99):
        expected = trainer_logp(model, tokenizer, prompts[i], groups[i])
        torch.testing.assert_close(sampled_logp(groups[i]), expected, atol=1e-4, rtol=0)


def test_a_list_ends_with_its_end_token(world):
    model, tokenizer, sampler = world
    likely = copy.deepcopy(model)
    with torch.no_grad():  # the end token becomes the likeliest everywhere by a wide margin
        likely.get_output_embeddings().weight.mul_(0.01)
        likely.model.norm.weight.zero_()
    sync_weights(sampler, likely)
    (group,) = sampler.sample(prompts_of(tokenizer)[:1], group_size=64, seeds=[4], max_new_tokens=40)
    sync_weights(sampler, model)
    # Uniform logits: every list ends where it happens to draw the end token, or is cut.
    for rollout in group:
        assert rollout.finished == (rollout.token_ids[-1] in sampler.eos_ids)
        assert not set(rollout.token_ids[:-1]) & set(sampler.eos_ids)
        assert rollout.finished or len(rollout.token_ids) == 40
    num_ids = int(valid_token_mask(model, tokenizer).sum())
    torch.testing.assert_close(
        sampled_logp(group), torch.full((sum(len(r.token_ids) for r in group),), -float(num_ids)).neg().log().neg()
    )
    assert max(max(r.token_ids) for r in group) < len(tokenizer)  # no id beyond the tokenizer's


def test_every_tensor_arrives_and_each_that_does_not_is_named(world):
    model, _, sampler = world
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1e-6 + 1e-3 * torch.rand_like(parameter))
    stored = {sampler.stored_name(name) for name, _ in model.named_parameters()}
    assert set(different_tensors(sampler, changed)) == stored == set(sampler.fingerprints())
    sync_weights(sampler, changed)
    assert different_tensors(sampler, changed) == []
    for name, _ in model.named_parameters():
        partly = copy.deepcopy(changed)
        with torch.no_grad():
            partly.get_parameter(name).flatten()[-1:].add_(1e-3)
        assert different_tensors(sampler, partly) == [sampler.stored_name(name)], name
    sync_weights(sampler, model)


def test_new_weights_are_computed_with_at_once(world):
    """The embedding, the head tied to it, and the keys and values of cached prompts: all are of the new weights."""
    model, tokenizer, sampler = world
    prompts = prompts_of(tokenizer)
    before = sampler.sample(prompts, group_size=4, seeds=[1, 2, 3], max_new_tokens=12)
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    sync_weights(sampler, changed)
    groups = sampler.sample(prompts, group_size=4, seeds=[1, 2, 3], max_new_tokens=12)
    for prompt, rollouts in zip(prompts, groups, strict=True):
        expected = trainer_logp(changed, tokenizer, prompt, rollouts)
        torch.testing.assert_close(sampled_logp(rollouts), expected, atol=2e-5, rtol=0)
        old = trainer_logp(model, tokenizer, prompt, rollouts)
        assert (sampled_logp(rollouts) - old).abs().mean() > 1e-2
    sync_weights(sampler, model)
    assert sampler.sample(prompts, group_size=4, seeds=[1, 2, 3], max_new_tokens=12) == before


def test_a_sync_that_the_engine_ignores_or_corrupts_is_caught(world, monkeypatch):
    model, _, sampler = world
    load = sampler.engine_model.load_weights
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.add_(1e-6)
    monkeypatch.setattr(sampler.engine_model, "load_weights", lambda weights: None)
    with pytest.raises(SamplingError, match=r"policy's: model.layers.1.mlp.gate_up_proj.weight differ"):
        sync_weights(sampler, changed)

    def corrupt(weights):
        load((name, tensor.flip(0) * 2 if name.endswith("o_proj.weight") else tensor) for name, tensor in weights)

    monkeypatch.setattr(sampler.engine_model, "load_weights", corrupt)
    with pytest.raises(SamplingError, match="layers.0.self_attn.o_proj.weight, model.layers.1.self_attn.o_proj.weight"):
        sync_weights(sampler, model)
    monkeypatch.undo()
    sync_weights(sampler, model)


def test_requests_it_cannot_serve_are_refused(world):
    _, tokenizer, sampler = world
    prompt = prompts_of(tokenizer)[0]
    with pytest.raises(ValueError, match=f"holds 160 tokens a list, prompt included, not {len(prompt) + 158}"):
        sampler.sample([prompt], group_size=2, seeds=[0], max_new_tokens=158)
    with pytest.raises(ValueError, match="got 0 seeds for 1 prompts"):
        sampler.sample([prompt], group_size=2, seeds=[], max_new_tokens=5)
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        sampler.sample([[]], group_size=2, seeds=[0], max_new_tokens=5)
    assert sampler.sample([], group_size=2, seeds=[], max_new_tokens=5) == []


def test_broken_weights_are_an_error_not_a_list(world):
    model, tokenizer, sampler = world
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    sync_weights(sampler, broken)
    with pytest.raises(SamplingError, match="not finite"):
        sampler.sample(prompts_of(tokenizer)[:1], group_size=2, seeds=[0], max_new_tokens=5)
    sync_weights(sampler, model)


def test_bfloat16_is_near(tmp_path):
    model, tokenizer = make_model(tied=True)
    sampler = engine(model, tokenizer, dtype=torch.bfloat16)
    sync_weights(sampler, model)
    assert different_tensors(sampler, model) == []
    prompts = prompts_of(tokenizer)
    groups = sampler.sample(prompts, group_size=4, seeds=[1, 2, 3], max_new_tokens=20)
    expected = [trainer_logp(model, tokenizer, p, rollouts) for p, rollouts in zip(prompts, groups, strict=True)]
    gap = (torch.cat([sampled_logp(rollouts) for rollouts in groups]) - torch.cat(expected)).abs()
    assert 0 < gap.mean() < 0.05


def test_what_cannot_start_says_what_to_change(monkeypatch):
    model, tokenizer = make_model(tied=True)
    allowed = valid_token_mask(model, tokenizer)
    with pytest.raises(SamplingError, match="may take 100000 tokens together, .*rl.max_new_tokens"):
        VLLMSampler(model, tokenizer, EngineConfig(max_tokens=100_000), ALONE, allowed_V=allowed)
    with pytest.raises(SamplingError, match="rl.vllm_tp = 2 must divide the number of processes, 1"):
        VLLMSampler(model, tokenizer, EngineConfig(max_tokens=64, tensor_parallel=2), ALONE, allowed_V=allowed)
    unknown = copy.deepcopy(model)
    unknown.config.architectures = ["NobodysForCausalLM"]
    unknown.config.model_type = "qwen2"
    with pytest.raises(
        SamplingError, match="does not know the model architecture NobodysForCausalLM; set rl.sampler=hf"
    ):
        VLLMSampler(unknown, tokenizer, EngineConfig(max_tokens=64), ALONE, allowed_V=allowed)
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 2**18}))
    with pytest.raises(SamplingError, match="0.0 GiB of main memory are free.*free memory, or make lists"):
        VLLMSampler(model, tokenizer, EngineConfig(max_tokens=512), ALONE, allowed_V=allowed)
