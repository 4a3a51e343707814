"""The real engine on a CPU, held to the demo's catalog: what it draws, with which log-probs, for whom."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import finish, launch
from tiny_world import tiny_dataset
from world import engine, make_model, prompts_of

import rankgrpo.sampler.vllm_trie as vllm_trie
from rankgrpo.errors import SamplingError
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.constraint import open_constraint
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy
from rankgrpo.sampler.sync import different_tensors, sync_weights

NUM_RANKS = 4
NEVER = 1  # max_new_tokens, which held lists have no use for


@pytest.fixture(scope="module", params=["tied", "untied"])
def world(request):
    """(plain model, policy, sampler) with equal weights; the untied model's head has rows that are banned.

    Six lists are decoded at once, so requests wait, leave and change rows.
    """
    model, tokenizer = make_model(tied=request.param == "tied", more_rows=64 if request.param == "untied" else 0)
    catalog = tiny_dataset().catalog
    constraint = open_constraint(catalog, tokenizer, num_ranks=NUM_RANKS, forbid="repeats+seen")
    sampler = engine(model, tokenizer, rows=6, constraint=constraint)
    sync_weights(sampler, model)
    return model, policy_of(model, tokenizer, constraint), sampler


def policy_of(model, tokenizer, constraint):
    model = copy.deepcopy(model)
    use_shared_prefix(model)
    return Policy(model, tokenizer, valid_token_mask(model, tokenizer), False, constraint=constraint)


def trainer_logp(policy, group, temperature=1.0):
    with torch.no_grad():
        pack, logp_BT = policy.logprobs([group], temperature=temperature)
    return logp_BT[pack.mask_BT]


def group_of(prompt, rollouts, seen=()):
    return Group(prompt, [rollout.token_ids for rollout in rollouts], tuple(seen))


def sampled_logp(rollouts):
    return torch.tensor([value for rollout in rollouts for value in rollout.logp])


SEEN = [[], [3, 1, 4], list(range(0, 600, 2))]


def draw(policy, sampler, *, temperature=1.0, group_size=4, seen=SEEN, seeds=(1, 2, 3)):
    prompts = prompts_of(policy.tokenizer)
    wanted = {"group_size": group_size, "seeds": list(seeds), "max_new_tokens": NEVER, "temperature": temperature}
    return prompts, sampler.sample(prompts, **wanted, seen=seen)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_lists_are_whole_and_their_log_probs_the_trainers(world, temperature):
    _, policy, sampler = world
    prompts, groups = draw(policy, sampler, temperature=temperature)
    lines = [f"{item.title} ({item.year})" for item in tiny_dataset().catalog.items]
    forced = 0
    for prompt, rollouts, seen in zip(prompts, groups, SEEN, strict=True):
        for rollout in rollouts:
            named = rollout.text.split("\n")
            assert rollout.finished and len(set(named)) == NUM_RANKS and set(named) <= set(lines)
            assert not set(named) & {lines[item] for item in seen}
            items = [lines.index(line) for line in named]
            assert policy.constraint.trie.list_ids(items) == rollout.token_ids  # as the tokenizer itself writes them
        group = group_of(prompt, rollouts, seen)
        logp = sampled_logp(rollouts)
        is_choice = torch.from_numpy(policy.constraint.choices([group]).is_choice)
        assert (logp[~is_choice] == 0).all() and (logp[is_choice] < 0).any()
        torch.testing.assert_close(logp, trainer_logp(policy, group, temperature), atol=2e-5, rtol=0)
        forced += int((~is_choice).sum())
    assert forced > 150
    assert len({tuple(r.token_ids) for group in groups for r in group}) >= 10


def test_the_log_prob_of_a_list_is_by_the_definition(world):
    """Against the masked full softmax of transformers, walked token by token."""
    plain, policy, sampler = world
    prompts, groups = draw(policy, sampler, group_size=1)
    for prompt, (rollout,), seen in zip(prompts, groups, SEEN, strict=True):
        with torch.no_grad():
            logits_TV = plain(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
        walk = policy.constraint.start(seen)
        for logits_V, token_id, logp in zip(logits_TV, rollout.token_ids, rollout.logp, strict=True):
            allowed = torch.from_numpy(walk.allowed()).long()
            expected = (logits_V[token_id] - logits_V[allowed].logsumexp(0)).item()
            assert logp == pytest.approx(expected, abs=2e-5)
            walk.advance(token_id)
        assert walk.done


def test_greedy_lists_take_the_likeliest_allowed_id(world):
    plain, policy, sampler = world
    prompts, groups = draw(policy, sampler, temperature=0.0, group_size=2)
    for prompt, rollouts, seen in zip(prompts, groups, SEEN, strict=True):
        assert rollouts[0] == rollouts[1] and rollouts[0].finished
        walk, ids = policy.constraint.start(seen), list(prompt)
        while not walk.done:
            with torch.no_grad():
                logits_V = plain(torch.tensor([ids])).logits[0, -1]
            allowed = torch.from_numpy(walk.allowed()).long()
            ids.append(int(allowed[logits_V[allowed].argmax()]))
            walk.advance(ids[-1])
        assert rollouts[0].token_ids == ids[len(prompt) :]
        expected = trainer_logp(policy, group_of(prompt, rollouts[:1], seen))
        torch.testing.assert_close(sampled_logp(rollouts[:1]), expected, atol=2e-5, rtol=0)


def test_a_list_alone_is_the_list_in_the_group(world):
    _, policy, sampler = world
    prompts, whole = draw(policy, sampler, group_size=8)
    for which in range(3):
        wanted = {"group_size": 2, "seeds": [which + 1], "max_new_tokens": NEVER, "seen": [SEEN[which]]}
        (alone,) = sampler.sample([prompts[which]], **wanted)
        assert [r.token_ids for r in alone] == [r.token_ids for r in whole[which][:2]]
        for one, other in zip(alone, whole[which], strict=False):
            torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)
    assert [[r.token_ids for r in group] for group in draw(policy, sampler, group_size=8)[1]] == [
        [r.token_ids for r in group] for group in whole
    ]


def test_one_line_left_is_forced_from_the_first_id_on(world):
    """All but four lines are seen, so a list is an order of these four."""
    _, policy, sampler = world
    left = [10, 20, 30, 40]
    seen = [[item for item in range(600) if item not in left]] * 3
    prompts, groups = draw(policy, sampler, group_size=8, seen=seen)
    for prompt, rollouts in zip(prompts, groups, strict=True):
        for rollout in rollouts:
            assert sorted(policy.constraint.choices([group_of(prompt, [rollout], seen[0])]).items[0]) == left
            assert rollout.logp[-3:] == [0.0, 0.0, 0.0]
        expected = trainer_logp(policy, group_of(prompt, rollouts, seen[0]))
        torch.testing.assert_close(sampled_logp(rollouts), expected, atol=2e-5, rtol=0)


def test_new_weights_arrive_and_are_sampled_from(world):
    _, policy, sampler = world
    _, before = draw(policy, sampler)
    changed = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            scale = 0.1 * parameter.std() if parameter.dim() > 1 else 0.01
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    assert set(different_tensors(sampler, changed)) == set(sampler.fingerprints())
    sync_weights(sampler, changed)
    assert different_tensors(sampler, changed) == []
    prompts, groups = draw(policy, sampler)
    for prompt, rollouts, seen in zip(prompts, groups, SEEN, strict=True):
        group = group_of(prompt, rollouts, seen)
        expected = trainer_logp(replace(policy, model=changed), group)
        torch.testing.assert_close(sampled_logp(rollouts), expected, atol=2e-5, rtol=0)
        assert (sampled_logp(rollouts) - trainer_logp(policy, group)).abs().max() > 1e-2
    sync_weights(sampler, policy.model)
    assert draw(policy, sampler)[1] == before


def test_broken_weights_leave_an_engine_that_goes_on(world):
    _, policy, sampler = world
    _, before = draw(policy, sampler)
    broken = copy.deepcopy(policy.model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    sync_weights(sampler, broken)
    with pytest.raises(SamplingError, match="not finite"):
        draw(policy, sampler)
    sync_weights(sampler, policy.model)
    assert draw(policy, sampler)[1] == before


def test_a_mask_that_vllm_does_not_apply_is_an_error(world, monkeypatch):
    _, policy, sampler = world
    monkeypatch.setattr(vllm_trie, "mask_rows", lambda constraint, logits_BV, rows, walks: logits_BV)
    with pytest.raises(SamplingError, match="vLLM did not keep to the catalog: list 0, token 0: id .* is not allowed"):
        draw(policy, sampler)


def test_requests_that_no_list_can_answer_are_refused_before_the_engine_has_them(world):
    _, policy, sampler = world
    with pytest.raises(ValueError, match="needs 4 lines, but 3 of 600 are left once the 597 seen are forbidden"):
        draw(policy, sampler, seen=[[], [], list(range(597))])
    with pytest.raises(ValueError, match="seen items of each prompt, 3, got 1"):
        draw(policy, sampler, seen=[[]])
    prompt = [prompts_of(policy.tokenizer)[0] * 12]
    longest = 12 * 5 + policy.constraint.max_tokens
    with pytest.raises(ValueError, match=f"a list, prompt included, not {longest}"):
        sampler.sample(prompt, group_size=1, seeds=[1], max_new_tokens=NEVER)
    assert sampler.sample([], group_size=2, seeds=[], max_new_tokens=NEVER) == []
    assert all(r.finished for group in draw(policy, sampler, seen=None)[1] for r in group)


def test_a_catalog_written_with_banned_ids_is_refused(world):
    _, policy, _ = world
    allowed_V = policy.allowed_V.clone()
    allowed_V[policy.constraint.trie.line_ids(0, 0)[0]] = False
    with pytest.raises(SamplingError, match="lines need ids that are masked"):
        vllm_trie.check_ids(policy.constraint, allowed_V)


def test_processes_that_share_an_engine():
    """Every process draws all lists of both, so what was seen has to reach both."""
    said = finish(launch(str(Path(__file__).parent / "shared_engine.py"), num_processes=2), timeout_s=300)
    assert "process 0: 2 groups as the trainer has them" in said
    assert "process 1: 1 groups as the trainer has them" in said
