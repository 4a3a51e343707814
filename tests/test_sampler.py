import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rankgrpo.sampler import hf
from rankgrpo.sampler.base import prompt_seed
from rankgrpo.sampler.hf import HFSampler, draw_uniforms

VOCAB = 40
SIZE = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    bos_token_id=None, initializer_range=0.4,
)  # fmt: skip
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [7, 7, 30, 2]]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(params=["qwen2", "llama"])
def model(request):
    torch.manual_seed(0)
    made = Qwen2ForCausalLM(Qwen2Config(**SIZE)) if request.param == "qwen2" else LlamaForCausalLM(LlamaConfig(**SIZE))
    return made.eval()


def sample(model, prompts=PROMPTS, **overrides):
    settings = dict(group_size=3, seeds=[11, 12, 13, 14][: len(prompts)], max_new_tokens=12) | overrides
    rows = settings.pop("rows", 256)
    allowed_V = settings.pop("allowed_V", None)
    return HFSampler(model, word_tokenizer(), rows=rows, allowed_V=allowed_V).sample(prompts, **settings)


def full_logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def test_logp_is_that_of_a_plain_forward_pass(model):
    for prompt, group in zip(PROMPTS, sample(model, temperature=0.7), strict=True):
        for rollout in group:
            logits = full_logits(model, prompt + rollout.token_ids)[len(prompt) - 1 : -1] / 0.7
            expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(rollout.logp), expected, atol=2e-5, rtol=1e-5)


def test_greedy_is_the_argmax_of_a_plain_forward_pass(model):
    for prompt, (rollout,) in zip(PROMPTS, sample(model, group_size=1, temperature=0.0), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and (ids[-1] != 1 or len(ids) == len(prompt)):
            ids.append(int(full_logits(model, ids)[-1].argmax()))
        assert rollout.token_ids == ids[len(prompt) :]


def test_batches_and_order_change_nothing(model):
    whole = sample(model)
    assert sample(model, rows=3) == pytest_approx_groups(whole)
    turned = sample(model, prompts=PROMPTS[::-1], seeds=[14, 13, 12, 11])
    assert turned[::-1] == pytest_approx_groups(whole)


@pytest.mark.parametrize("at_a_time", [1, 3])
def test_how_many_prompts_are_read_at_a_time_changes_nothing(model, at_a_time, monkeypatch):
    whole = sample(model)
    monkeypatch.setattr(hf, "PROMPTS_READ", at_a_time)
    assert sample(model) == pytest_approx_groups(whole)


def test_bfloat16_logp_is_that_of_a_plain_bfloat16_forward_pass(model):
    sampler, errors = HFSampler(model, word_tokenizer(), autocast="bfloat16"), []
    groups = sampler.sample(PROMPTS, group_size=3, seeds=[11, 12, 13, 14], max_new_tokens=12)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for rollout in group:
            with torch.autocast("cpu", torch.bfloat16):
                logits = full_logits(model, prompt + rollout.token_ids)[len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            errors.append((torch.tensor(rollout.logp) - expected).abs())
    assert 0 < torch.cat(errors).mean() < 0.03  # weights this large make logits of some 10 nats


class pytest_approx_groups:
    """Equal ids and flags; log-probabilities up to the rounding of another batch shape."""

    def __init__(self, groups):
        self.groups = groups

    def __eq__(self, other):
        for mine, theirs in zip(self.groups, other, strict=True):
            for a, b in zip(mine, theirs, strict=True):
                assert (a.token_ids, a.finished, a.text) == (b.token_ids, b.finished, b.text)
                assert a.logp == pytest.approx(b.logp, abs=5e-5)
        return True


def test_seeds_decide(model):
    assert sample(model) == sample(model)
    assert sample(model, seeds=[11, 12, 13, 99])[:3] == sample(model)[:3]
    assert sample(model, seeds=[11, 12, 13, 99])[3] != sample(model)[3]
    group = sample(model)[0]
    assert len({tuple(rollout.token_ids) for rollout in group}) == 3


def test_a_list_does_not_depend_on_the_group_size():
    assert torch.equal(draw_uniforms(5, 8, 20)[:3], draw_uniforms(5, 3, 20))


def test_eos_ends_a_list_and_nothing_follows(model):
    rollouts = [rollout for group in sample(model, group_size=40, max_new_tokens=30) for rollout in group]
    assert any(rollout.finished for rollout in rollouts) and any(not rollout.finished for rollout in rollouts)
    for rollout in rollouts:
        assert rollout.finished == (rollout.token_ids[-1] == 1)
        assert 1 not in rollout.token_ids[:-1]
        assert rollout.finished or len(rollout.token_ids) == 30
        assert len(rollout.logp) == len(rollout.token_ids)


def test_dropping_finished_groups_keeps_the_others_right(model):
    # Prompt by prompt no group is dropped while another lives.
    prompts = [[i, i + 1] for i in range(2, 34)]
    seeds = list(range(32))
    together = sample(model, prompts=prompts, seeds=seeds, group_size=1, max_new_tokens=40)
    alone = [sample(model, prompts=[p], seeds=[s], group_size=1, max_new_tokens=40)[0] for p, s in zip(prompts, seeds)]  # noqa: B905
    assert len({len(group[0].token_ids) for group in together}) > 5
    assert alone == pytest_approx_groups(together)


def test_samples_follow_the_models_distribution(model):
    group = sample(model, prompts=[[5, 6, 7]], seeds=[3], group_size=4000, max_new_tokens=1)[0]
    counts = torch.bincount(torch.tensor([rollout.token_ids[0] for rollout in group]), minlength=VOCAB)
    expected = full_logits(model, [5, 6, 7])[-1].softmax(-1)
    chi2 = ((counts - 4000 * expected) ** 2 / (4000 * expected).clamp(min=1e-9))[expected * 4000 > 5].sum()
    assert chi2 < 80  # 39 degrees of freedom: mean 39, standard deviation 8.8


def test_banned_ids_are_never_sampled_and_logp_is_over_the_rest(model):
    allowed_V = torch.ones(VOCAB, dtype=torch.bool)
    allowed_V[20:] = False
    group = sample(model, prompts=[[5, 6, 7]], seeds=[3], group_size=500, max_new_tokens=1, allowed_V=allowed_V)[0]
    logits = full_logits(model, [5, 6, 7])[-1].masked_fill(~allowed_V, float("-inf"))
    for rollout in group:
        assert rollout.token_ids[0] < 20
        assert rollout.logp[0] == pytest.approx(float(logits.log_softmax(-1)[rollout.token_ids[0]]), abs=5e-5)


def test_the_model_is_left_as_it_was(model):
    model.train()
    attention = model.config._attn_implementation
    sample(model)
    assert model.training and model.config._attn_implementation == attention


def test_wrong_calls(model):
    with pytest.raises(ValueError, match="one seed a prompt"):
        sample(model, seeds=[1])
    with pytest.raises(ValueError, match="no tokens"):
        sample(model, prompts=[[]], seeds=[1])


def test_prompt_seed_literals():
    # Literals: a resumed run on another machine must draw the same samples.
    assert prompt_seed(3407, 0, "redial-1") == prompt_seed(3407, 0, "redial-1")
    assert (
        len(
            {prompt_seed(3407, 0, "a"), prompt_seed(3407, 1, "a"), prompt_seed(3408, 0, "a"), prompt_seed(3407, 0, "b")}
        )
        == 4
    )
    assert all(0 <= prompt_seed(s, 1, "x") < 2**63 for s in range(100))
