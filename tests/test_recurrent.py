"""Packs through recurrent and convolutional layers, a kind each: against whole sequences, a row at a time."""

import pytest
import torch
from against_eager import assert_same_gradients, eager_logprobs, gradients, ids, reload, save
from peft import LoraConfig, inject_adapter_in_model
from tiny_world import ALONE, tiny_config

from rankgrpo.model.attention import ordinary_attention, use_shared_prefix
from rankgrpo.model.forward import pack_logprobs
from rankgrpo.model.head import find_logit_map
from rankgrpo.model.packing import Group, build_pack
from rankgrpo.model.policy import open_policy
from rankgrpo.model.recurrent import Forks

# A gated delta rule, a convolution alone, and Mamba-2's scan, each beside attention.
KINDS = ["qwen3_next", "lfm2", "granitemoehybrid"]


def groups():
    """Prompts and lists on both sides of the convolution's width and of a chunk, and a group of one list."""
    g = torch.Generator().manual_seed(3)
    sizes = {1: (1, 2, 9), 2: (70, 3), 5: (1,), 67: (2, 30, 66), 130: (7,), 20: (20, 21, 5, 1)}
    return [Group(ids(prompt, g), [ids(size, g) for size in lists]) for prompt, lists in sizes.items()]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    save(request.param, folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pack_is_its_sequences(folder, checkpointing):
    config = tiny_config(f"model.gradient_checkpointing={str(checkpointing).lower()}")
    policy = open_policy(folder, config.model, ALONE.device)
    assert policy.paths.packing == "shared"
    plain = reload(folder)
    want_BT = eager_logprobs(plain, groups(), policy.allowed_V)
    pack, logp_BT = policy.logprobs(groups())
    assert pack.tokens_shared < pack.tokens_dense
    torch.testing.assert_close(logp_BT, want_BT, rtol=0, atol=1e-4)
    weight_BT = torch.randn(want_BT.shape, generator=torch.Generator().manual_seed(4))
    got, want = gradients(policy.model, (logp_BT * weight_BT).sum()), gradients(plain, (want_BT * weight_BT).sum())
    assert_same_gradients(got, want)
    assert len(got) == len(want) > 20


def test_adapters_in_a_pack(folder):
    model, plain = reload(folder), reload(folder)
    for each in (model, plain):
        torch.manual_seed(5)
        inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), each)
    logit_map = find_logit_map(plain)
    use_shared_prefix(model)
    allowed_V = torch.ones(model.config.vocab_size, dtype=torch.bool)
    want_BT = eager_logprobs(plain, groups(), allowed_V)
    logp_BT = pack_logprobs(model, build_pack(groups()), logit_map=logit_map)
    torch.testing.assert_close(logp_BT, want_BT, rtol=1e-4, atol=1e-4)
    weight_BT = torch.randn(want_BT.shape, generator=torch.Generator().manual_seed(4))
    got, want = gradients(model, (logp_BT * weight_BT).sum()), gradients(plain, (want_BT * weight_BT).sum())
    assert any("lora_A" in name for name in got)
    assert_same_gradients(got, want)


def test_a_list_reads_no_other_list(folder):
    """Changing one list of a group leaves the others' log-probs bitwise what they were."""
    policy = open_policy(folder, tiny_config().model, ALONE.device)
    one, other = groups()[3], groups()[3]
    other.completion_ids[1] = [id + 1 for id in other.completion_ids[1]]
    with torch.no_grad():
        first_BT, second_BT = (policy.logprobs([group])[1] for group in (one, other))
    assert torch.equal(first_BT[[0, 2]], second_BT[[0, 2]])
    assert not torch.equal(first_BT[1], second_BT[1])


def test_a_packed_model_without_a_layout_is_an_error(folder):
    policy = open_policy(folder, tiny_config().model, ALONE.device)
    with pytest.raises(ValueError, match="without a layout"):
        policy.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    with ordinary_attention(policy.model), torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False).logits
    torch.testing.assert_close(logits, reload(folder)(input_ids=torch.tensor([[3, 4, 5]])).logits, rtol=0, atol=1e-4)


def test_where_sequences_lie_in_padded_batches():
    pack = build_pack([Group([5, 6, 7], [[1], [2, 3]]), Group([8], [[9]])])
    forks = Forks(pack.layout)
    flat = torch.arange(1.0, 1 + pack.layout.num_tokens)
    batches = forks.pad(flat)
    assert torch.equal(forks.unpad(batches), flat)
    roots, lists = batches
    assert roots.tolist() == [[1, 2, 3], [7, 8, 0]]  # a prompt, and the whole sequence of a group of one list
    assert lists.tolist() == [[5, 6], [4, 0]]
    assert forks.lists[0].begins_R.tolist() == [0, 0]
    rows_M, sources_Mk, none_Mk = forks.windows(3)
    assert rows_M.tolist() == [0, 1, 3, 4, 5, 6, 7]  # row 2 has its two predecessors before it in the pack
    assert sources_Mk[2:5].tolist() == [[1, 2, 3], [1, 2, 4], [2, 4, 5]]
    assert none_Mk.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0]]
