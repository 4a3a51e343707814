"""The sampler held to a catalog: against enumerated probabilities, the trainer, and a plain masked softmax."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_trie import LINES, tokenizer_named
from transformers import Qwen2Config, Qwen2ForCausalLM

from rankgrpo.config import AdapterConfig
from rankgrpo.errors import SamplingError
from rankgrpo.items.trie import CatalogTrie
from rankgrpo.model.adapter import add_adapters
from rankgrpo.model.attention import ordinary_attention, use_shared_prefix
from rankgrpo.model.constraint import Constraint, longest_list
from rankgrpo.model.head import valid_token_mask
from rankgrpo.model.packing import Group
from rankgrpo.model.policy import Policy, empty_copy
from rankgrpo.sampler import constrained, hf, jump
from rankgrpo.sampler.choose import hf_sampler
from rankgrpo.sampler.constrained import ConstrainedSampler
from rankgrpo.sampler.hf import HFSampler

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [7, 7, 30, 2]]
SEEDS = [11, 12, 13, 14]


def make_policy(name="merges", *, lines=LINES, num_ranks=3, forbid="repeats", seed=0, spread=0.3, bfloat16=False):
    tokenizer = tokenizer_named(name)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=spread,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config).eval()
    use_shared_prefix(model)
    trie = CatalogTrie.build(lines, tokenizer, num_ranks=num_ranks, eos_id=tokenizer.eos_token_id)
    constraint = Constraint(trie, num_ranks, forbid, longest_list(trie, num_ranks, repeats=forbid == "none"))
    return Policy(model, tokenizer, valid_token_mask(model, tokenizer), bfloat16, constraint=constraint)


def sample(policy, prompts=PROMPTS, *, rows=256, **overrides):
    options = dict(group_size=3, seeds=SEEDS[: len(prompts)], max_new_tokens=1) | overrides
    return hf_sampler(policy, rows).sample(prompts, **options)


def ordinary_logits(policy, ids):
    """All logits after each of the ids, by the model's ordinary forward."""
    with torch.no_grad(), ordinary_attention(policy.model):
        return policy.model(torch.tensor([ids])).logits[0]


def masked_logps(policy, prompt, ids, *, seen=(), temperature=1.0):
    """Of every id its log-probability by the model's ordinary forward and a masked softmax over all logits."""
    logits_TV = ordinary_logits(policy, prompt + ids)[len(prompt) - 1 : -1] / temperature
    walk, mask_TV = policy.constraint.start(seen), torch.zeros_like(logits_TV, dtype=torch.bool)
    for t, token_id in enumerate(ids):
        mask_TV[t, torch.from_numpy(walk.allowed()).long()] = True
        walk.advance(token_id)
    assert walk.done
    logp_TV = logits_TV.masked_fill(~mask_TV, -torch.inf).log_softmax(-1)
    return logp_TV.gather(1, torch.tensor(ids)[:, None])[:, 0], mask_TV.sum(1) == 1


def assert_same(groups, others):
    for group, other in zip(groups, others, strict=True):
        for a, b in zip(group, other, strict=True):
            assert (a.token_ids, a.text, a.finished) == (b.token_ids, b.text, b.finished)
            assert a.logp == pytest.approx(b.logp, abs=5e-5)


# ----------------------------------------------------------------------------------------------------------------------
# What a list is


@pytest.mark.parametrize("num_ranks", [1, 2, 7, 40])
@pytest.mark.parametrize("name", ["merges", "apart", "sentencepiece", "tiny"])
def test_lists_are_distinct_catalog_lines_in_the_tokenizers_own_ids(name, num_ranks):
    policy = make_policy(name, num_ranks=num_ranks)
    for group in sample(policy):
        for rollout in group:
            lines = rollout.text.removeprefix(" ").split("\n")
            assert len(set(lines)) == len(lines) == num_ranks and set(lines) <= set(LINES)
            written = policy.tokenizer("\n".join(lines), add_special_tokens=False)["input_ids"]
            assert rollout.token_ids == [*written, policy.tokenizer.eos_token_id]
            assert rollout.finished and len(rollout.logp) == len(rollout.token_ids)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.floats(0.02, 3.0), st.integers(1, 12), st.sampled_from(["merges", "tiny"]))
def test_lists_are_distinct_catalog_lines_whatever_the_model(seed, spread, num_lines, name):
    lines = random.Random(seed).sample(LINES, num_lines)
    num_ranks = 1 + seed % num_lines
    policy = make_policy(name, lines=lines, num_ranks=num_ranks, seed=seed, spread=spread)
    for group in sample(policy, temperature=0.5 + seed % 3):
        for rollout in group:
            named_lines = rollout.text.split("\n")
            assert len(set(named_lines)) == len(named_lines) == num_ranks and set(named_lines) <= set(lines)


def test_seen_items_are_not_named():
    policy = make_policy(num_ranks=5, forbid="repeats+seen")
    seen = [list(range(0, 33)), [], list(range(5, 40)), [3]]
    for items, group in zip(seen, sample(policy, group_size=8, seen=seen), strict=True):
        for rollout in group:
            lines = rollout.text.split("\n")
            assert len(set(lines)) == 5 and set(lines) <= {line for i, line in enumerate(LINES) if i not in items}
    with pytest.raises(ValueError, match="seen items of 4 prompts"):
        sample(policy, seen=[[]])


def test_lines_may_repeat_when_nothing_is_forbidden():
    policy = make_policy(lines=LINES[:3], num_ranks=3, forbid="none")
    lists = [rollout.text.split("\n") for group in sample(policy, group_size=10) for rollout in group]
    assert all(len(lines) == 3 and set(lines) <= set(LINES[:3]) for lines in lists)
    assert any(len(set(lines)) < 3 for lines in lists)


def test_a_list_without_a_choice_needs_no_model():
    policy = make_policy(lines=LINES[:1], num_ranks=1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.fill_(torch.nan)
    (rollout,) = sample(policy, [[5]], group_size=1)[0]
    assert rollout.text == LINES[0] and set(rollout.logp) == {0.0}


def test_how_a_list_begins_may_be_forced():
    lines = [f"Heat ({year})" for year in (1982, 1995, 2011)]
    policy = make_policy(lines=lines, num_ranks=2)
    for prompt, group in zip(PROMPTS, sample(policy), strict=True):
        for rollout in group:
            expected, _ = masked_logps(policy, prompt, rollout.token_ids)
            torch.testing.assert_close(torch.tensor(rollout.logp), expected, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("forbid", ["repeats", "repeats+seen", "none"])
@pytest.mark.parametrize("name", ["merges", "sentencepiece"])
def test_logp_is_that_of_trainer_and_of_a_masked_softmax(name, forbid, temperature, monkeypatch):
    monkeypatch.setattr(constrained, "WIDE", 5)  # the dense products of nodes below a root, too
    policy = make_policy(name, num_ranks=9, forbid=forbid)
    seen = [(1, 2), (), tuple(range(30)), (39,)]
    groups = sample(policy, temperature=temperature, seen=seen)
    packed = [Group(p, [r.token_ids for r in g], s) for p, g, s in zip(PROMPTS, groups, seen, strict=True)]
    with torch.no_grad():
        _, logp_BT = policy.logprobs(packed, temperature=temperature)
    rollouts = [(p, s, rollout) for p, s, group in zip(PROMPTS, seen, groups, strict=True) for rollout in group]
    for row, (prompt, items, rollout) in enumerate(rollouts):
        own = torch.tensor(rollout.logp)
        expected, forced = masked_logps(policy, prompt, rollout.token_ids, seen=items, temperature=temperature)
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(own, logp_BT[row, : len(own)], atol=1e-5, rtol=0)
        assert bool((own[forced] == 0.0).all()) and bool((own[~forced] < 0).all()) and bool(forced.any())


@pytest.mark.parametrize("name", ["merges", "tiny"])
def test_frequencies_are_the_enumerated_probabilities(name):
    lines, prompt = [LINES[i] for i in (0, 1, 3, 6, 9, 12, 39)], [5, 6, 7]
    policy = make_policy(name, lines=lines, num_ranks=2, spread=0.2)
    pairs = list(itertools.permutations(range(len(lines)), 2))
    lists = [policy.constraint.trie.list_ids(pair) for pair in pairs]
    share = torch.tensor([masked_logps(policy, prompt, ids)[0].double().sum() for ids in lists]).exp()
    assert float(share.sum()) == pytest.approx(1, abs=1e-5)
    (group,) = sample(policy, [prompt], group_size=6000)
    place = {tuple(ids): i for i, ids in enumerate(lists)}
    counts = torch.bincount(torch.tensor([place[tuple(r.token_ids)] for r in group]), minlength=len(pairs))
    common = 6000 * share > 5
    assert int(common.sum()) > 15
    chi2 = ((counts - 6000 * share) ** 2 / (6000 * share))[common].sum()
    degrees = int(common.sum()) - 1
    assert float(chi2) < degrees + 4 * (2 * degrees) ** 0.5


def test_greedy_takes_the_likeliest_allowed_id():
    policy = make_policy(num_ranks=6)
    for prompt, (rollout,) in zip(PROMPTS, sample(policy, group_size=1, temperature=0.0), strict=True):
        walk, ids = policy.constraint.start(), []
        while not walk.done:
            logits_V = ordinary_logits(policy, prompt + ids)[-1]
            allowed = walk.allowed()
            ids.append(int(allowed[logits_V[torch.from_numpy(allowed).long()].argmax()]))
            walk.advance(ids[-1])
        assert rollout.token_ids == ids
        expected, _ = masked_logps(policy, prompt, ids)
        torch.testing.assert_close(torch.tensor(rollout.logp), expected, atol=1e-5, rtol=0)


def test_segments_are_drawn_by_inversion():
    logits_F = torch.tensor([0.0, -torch.inf, 0.0, 5.0, -torch.inf, 0.0, 0.0]) + 100
    start_W, size_W = torch.tensor([0, 3, 5]), torch.tensor([3, 2, 2])
    for uniforms, expected in (([0.0, 0.0, 0.49], [0, 0, 0]), ([0.5, 0.9999999, 0.5], [2, 0, 1])):
        place_W, logp_W = constrained.draw_segments(logits_F, start_W, size_W, torch.tensor(uniforms), 1.0)
        assert place_W.tolist() == expected
        torch.testing.assert_close(logp_W, torch.tensor([0.5, 1.0, 0.5]).log(), atol=2e-5, rtol=0)
    place_W, _ = constrained.draw_segments(logits_F, start_W, size_W, torch.ones(3), 0.0)
    assert place_W.tolist() == [0, 0, 0]
    # A uniform that a product rounds up to the total stays inside its segment.
    top = torch.ones(3, dtype=torch.float64)
    assert constrained.draw_segments(logits_F, start_W, size_W, top, 1.0)[0].tolist() == [2, 0, 1]


# ----------------------------------------------------------------------------------------------------------------------
# What does not change a list


def test_batches_order_and_company_change_nothing(monkeypatch):
    policy = make_policy(num_ranks=8)
    whole = sample(policy)
    assert_same(sample(policy, rows=3), whole)
    assert_same(sample(policy, PROMPTS[::-1], seeds=SEEDS[::-1])[::-1], whole)
    assert_same(sample(policy, [PROMPTS[2]], seeds=[SEEDS[2]]), [whole[2]])
    assert_same([group[:2] for group in whole], sample(policy, group_size=2))
    monkeypatch.setattr(hf, "PROMPTS_READ", 1)
    monkeypatch.setattr(jump, "GROWTH", 3)
    assert_same(sample(policy), whole)
    assert len({rollout.text for rollout in whole[0]}) == 3
    assert sample(policy, seeds=[11, 12, 13, 99])[3] != whole[3]


def test_ways_to_compute_attention_agree(monkeypatch):
    policy = make_policy(num_ranks=8)
    whole = sample(policy)
    sizes = iter(itertools.cycle([1, 2, 5, 40]))
    with monkeypatch.context() as patch:
        patch.setattr(jump.Start, "choose", lambda *jumps: jump.Start(next(sizes), *jumps))
        assert_same(sample(policy), whole)
    monkeypatch.setattr(jump.Start, "choose", lambda *jumps: None)
    assert_same(sample(policy), whole)
    monkeypatch.setattr(jump, "attend_by_span", jump.attend_padded)
    assert_same(sample(policy), whole)


def test_dropping_finished_lists_keeps_the_others_right():
    # Few lines left make short lists: no two prompts are done at once. Prompt by prompt none is dropped early.
    policy = make_policy(num_ranks=4, forbid="repeats+seen")
    prompts, seeds = [[i, i + 1] for i in range(2, 34)], list(range(32))
    seen = [list(range(i)) for i in range(5, 37)]
    together = sample(policy, prompts, seeds=seeds, seen=seen, group_size=2)
    assert len({len(rollout.token_ids) for group in together for rollout in group}) > 10
    alone = [
        sample(policy, [p], seeds=[s], seen=[i], group_size=2)[0] for p, s, i in zip(prompts, seeds, seen, strict=True)
    ]
    assert_same(alone, together)


def test_the_model_is_left_as_it_was():
    policy = make_policy()
    policy.model.train()
    attention = policy.model.config._attn_implementation
    heard = []
    sample(policy, on_progress=heard.append, rows=6)
    assert policy.model.training and policy.model.config._attn_implementation == attention
    assert heard == [2, 2]


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of policy


def test_which_sampler_a_policy_gets():
    policy = make_policy()
    assert type(hf_sampler(policy)) is ConstrainedSampler
    assert type(hf_sampler(replace(policy, constraint=None))) is HFSampler


def test_bfloat16_logp_is_near_the_trainers():
    policy = make_policy(num_ranks=6, bfloat16=True)
    groups = sample(policy)
    packed = [Group(p, [r.token_ids for r in g]) for p, g in zip(PROMPTS, groups, strict=True)]
    with torch.no_grad():
        _, logp_BT = policy.logprobs(packed)
    errors = [
        (torch.tensor(rollout.logp) - logp_BT[row, : len(rollout.logp)]).abs()
        for row, rollout in enumerate(rollout for group in groups for rollout in group)
    ]
    assert 0 < torch.cat(errors).mean() < 0.03


def test_adapters_are_merged():
    policy = make_policy(num_ranks=4)
    skeleton = empty_copy(policy.model, policy.device)
    add_adapters(policy.model, AdapterConfig(kind="lora"), seed=0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora" in name or "adapter" in name:
                parameter.normal_(0, 0.1)
    policy = replace(policy, skeleton=skeleton)
    groups = sample(policy)
    packed = [Group(p, [r.token_ids for r in g]) for p, g in zip(PROMPTS, groups, strict=True)]
    with torch.no_grad():
        _, logp_BT = policy.logprobs(packed)
    for row, rollout in enumerate(rollout for group in groups for rollout in group):
        torch.testing.assert_close(torch.tensor(rollout.logp), logp_BT[row, : len(rollout.logp)], atol=1e-5, rtol=0)
    assert all(parameter.numel() == 0 for parameter in skeleton.parameters())


def test_a_broken_model_is_refused():
    policy = make_policy()
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(SamplingError, match="not finite"):
        sample(policy)
