"""The streamed head against float64 full logits; the packed forward against the dense oracle; no silent fall-back."""

import copy
import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import rankgrpo.logprob as logprob_module
from rankgrpo.logprob import default_chunk, token_logprobs
from rankgrpo.model.attention import use_shared_prefix
from rankgrpo.model.forward import dense_logprobs, pack_logprobs
from rankgrpo.model.packing import Group, build_pack

# --- the streamed head ---


def head_inputs(num_tokens=11, num_ids=37, hidden=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(num_ids, hidden, generator=generator, dtype=torch.float64)
    ids_N = torch.randint(num_ids, (num_tokens,), generator=generator)
    grad_N = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    return hidden_ND.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), ids_N, grad_N


def full_logits(hidden_ND, weight_VD, ids_N, temperature=1.0, allowed_V=None):
    logits_NV = hidden_ND.double() @ weight_VD.double().T / temperature
    if allowed_V is not None:
        logits_NV = logits_NV.masked_fill(~allowed_V, -torch.inf)
    return logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]


def test_head_literal():
    weight_VD = torch.tensor([[0.0], [1.0], [2.0]])
    hidden_ND = torch.tensor([[0.0], [torch.log(torch.tensor(2.0))]])  # logits (0, 0, 0) and log of (1, 2, 4)
    logp_N = token_logprobs(hidden_ND, weight_VD, torch.tensor([1, 2]))
    torch.testing.assert_close(logp_N.exp(), torch.tensor([1 / 3, 4 / 7]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 37, 64])
@pytest.mark.parametrize("banned", [(), (0, 36), tuple(range(20))])
def test_head_equals_full_logits(banned, chunk, temperature):
    hidden_ND, weight_VD, ids_N, grad_N = head_inputs()
    allowed_V = torch.ones(37, dtype=torch.bool)
    allowed_V[list(banned)] = False
    ids_N = ids_N.where(allowed_V[ids_N], torch.tensor(25))
    options = {"temperature": temperature, "allowed_V": allowed_V}
    logp_N = token_logprobs(hidden_ND, weight_VD, ids_N, chunk=chunk, **options)
    want_N = full_logits(hidden_ND, weight_VD, ids_N, **options)
    torch.testing.assert_close(logp_N, want_N)
    got = torch.autograd.grad(logp_N, (hidden_ND, weight_VD), grad_N)
    want = torch.autograd.grad(want_N, (hidden_ND, weight_VD), grad_N)
    for got_grad, want_grad in zip(got, want, strict=True):
        torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize("banned", [(), (0, 36)])
def test_soft_cap_equals_full_capped_logits(banned):
    hidden_ND, weight_VD, ids_N, grad_N = head_inputs()
    allowed_V = torch.ones(37, dtype=torch.bool)
    allowed_V[list(banned)] = False
    ids_N = ids_N.where(allowed_V[ids_N], torch.tensor(25))
    logp_N = token_logprobs(
        hidden_ND, weight_VD, ids_N, chunk=5, temperature=0.7, soft_cap=1.5, allowed_V=allowed_V if banned else None
    )
    capped_NV = (1.5 * torch.tanh(hidden_ND @ weight_VD.T / 1.5) / 0.7).masked_fill(~allowed_V, -torch.inf)
    want_N = capped_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    torch.testing.assert_close(logp_N, want_N)
    got = torch.autograd.grad(logp_N, (hidden_ND, weight_VD), grad_N)
    want = torch.autograd.grad(want_N, (hidden_ND, weight_VD), grad_N)
    for got_grad, want_grad in zip(got, want, strict=True):
        torch.testing.assert_close(got_grad, want_grad)


def test_head_gradcheck():
    hidden_ND, weight_VD, ids_N, _ = head_inputs(5, 9, 4)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, ids_N, chunk=2, temperature=1.3), (hidden_ND, weight_VD)
    )


@pytest.mark.parametrize("chunk", [256, None])
def test_head_float32_error_at_a_real_vocabulary(chunk):
    hidden_ND, weight_VD, ids_N, grad_N = head_inputs(70, 20_000, 64, torch.float32)
    with torch.no_grad():
        weight_VD *= 0.3
    logp_N = token_logprobs(hidden_ND, weight_VD, ids_N, chunk=chunk)
    want_N = full_logits(hidden_ND, weight_VD, ids_N)
    assert logp_N.dtype == torch.float32
    assert (logp_N - want_N).abs().max() <= 2e-6 * want_N.abs().max()
    got = torch.autograd.grad(logp_N, (hidden_ND, weight_VD), grad_N.float())
    want = torch.autograd.grad(want_N, (hidden_ND, weight_VD), grad_N)
    for got_grad, want_grad in zip(got, want, strict=True):
        assert (got_grad - want_grad).norm() <= 1e-6 * want_grad.norm()


def test_a_likely_token_keeps_its_digits():
    weight_VD = torch.zeros(1000, 1)
    weight_VD[2], weight_VD[700] = 128.0, 126.0
    logp_N = token_logprobs(torch.ones(1, 1), weight_VD, torch.tensor([2]), chunk=256)
    want = -torch.log1p(torch.exp(torch.tensor(-2.0, dtype=torch.float64)))
    assert abs(logp_N.item() - want.item()) < 1e-7  # as 128 - log-sum-exp it would be off by up to 8e-6


@pytest.mark.parametrize("mode", ["autocast", "bfloat16 tensors"])
def test_head_bfloat16_is_within_rounding_of_the_products(mode):
    hidden_ND, weight_VD, ids_N, grad_N = head_inputs(200, 500, 64, torch.float32)
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            logp_N = token_logprobs(hidden_ND, weight_VD, ids_N, chunk=32)
    else:
        hidden_ND, weight_VD = (t.detach().bfloat16().requires_grad_() for t in (hidden_ND, weight_VD))
        logp_N = token_logprobs(hidden_ND, weight_VD, ids_N, chunk=32)
    want_N = full_logits(hidden_ND, weight_VD, ids_N)
    plain_N = (hidden_ND.bfloat16() @ weight_VD.bfloat16().T).float().log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    assert logp_N.dtype == torch.float32
    assert (logp_N - want_N).norm() <= 1.01 * (plain_N - want_N).norm()
    got = torch.autograd.grad(logp_N, (hidden_ND, weight_VD), grad_N.float())
    want = torch.autograd.grad(want_N, (hidden_ND, weight_VD), grad_N)
    for got_grad, want_grad in zip(got, want, strict=True):
        assert got_grad.dtype == want_grad.dtype
        assert (got_grad.float() - want_grad.float()).norm() <= 0.02 * want_grad.float().norm()


def test_rows_without_gradient_are_not_recomputed(monkeypatch):
    hidden_ND, weight_VD, ids_N, grad_N = head_inputs()
    grad_N[[0, 3, 4, 10]] = 0.0
    logp_N = token_logprobs(hidden_ND, weight_VD, ids_N, chunk=3)
    want = torch.autograd.grad(full_logits(hidden_ND, weight_VD, ids_N), (hidden_ND, weight_VD), grad_N)
    rows, logits = set(), logprob_module._logits
    monkeypatch.setattr(logprob_module, "_logits", lambda ctx, h, *rest: rows.add(len(h)) or logits(ctx, h, *rest))
    got = torch.autograd.grad(logp_N, (hidden_ND, weight_VD), grad_N)
    assert rows == {11 - 4}
    assert not got[0][[0, 3, 4, 10]].any()
    for got_grad, want_grad in zip(got, want, strict=True):
        torch.testing.assert_close(got_grad, want_grad)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden_ND, weight_VD, ids_N, grad_N = head_inputs()
    tensors = {"hidden": hidden_ND, "weight": weight_VD}
    tensors.pop(frozen).requires_grad_(False)
    (live,) = tensors.values()
    (got,) = torch.autograd.grad(token_logprobs(hidden_ND, weight_VD, ids_N), live, grad_N)
    (want,) = torch.autograd.grad(full_logits(hidden_ND, weight_VD, ids_N), live, grad_N)
    torch.testing.assert_close(got, want)


def test_no_tokens_and_no_gradient():
    _, weight_VD, _, _ = head_inputs()
    assert token_logprobs(torch.zeros(0, 8), weight_VD.float(), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    hidden_ND, weight_VD, ids_N, grad_N = head_inputs()
    got = torch.autograd.grad(token_logprobs(hidden_ND, weight_VD, ids_N), (hidden_ND, weight_VD), 0 * grad_N)
    assert not any(grad.any() for grad in got)


def test_default_chunk_bounds_the_logits():
    assert default_chunk(1_840, "cpu") == 1088
    assert default_chunk(1_840, "cuda") * 1_840 * 4 <= 2**27
    assert default_chunk(10**6, "cpu") == 256
    assert default_chunk(0, "cpu") >= 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_ND": torch.zeros(11, 7)}, r"hidden \(N, D\)"),
        ({"ids_N": torch.zeros(10, dtype=torch.int64)}, "one id a hidden row"),
        ({"ids_N": torch.full((11,), 37)}, r"in \[0, 37\)"),
        ({"ids_N": torch.full((11,), -1)}, r"in \[0, 37\)"),
        ({"temperature": 0.0}, "temperature"),
        ({"soft_cap": 0.0}, "soft_cap"),
        ({"chunk": 0}, "chunk"),
        ({"allowed_V": torch.ones(36, dtype=torch.bool)}, "allowed_V must be bool"),
        ({"allowed_V": torch.arange(37) != 5, "ids_N": torch.full((11,), 5)}, r"bans target ids \[5\]"),
        ({"impl": "cuda"}, "'torch' or 'triton'"),
    ],
)
def test_head_bad_input(change, message):
    hidden_ND, weight_VD, ids_N, _ = head_inputs(dtype=torch.float32)
    arguments = {"hidden_ND": hidden_ND, "weight_VD": weight_VD, "ids_N": ids_N} | change
    with pytest.raises(ValueError, match=message):
        token_logprobs(**arguments)


def test_triton_without_the_kernels_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "rankgrpo_kernels.linear_logprob", None)
    hidden_ND, weight_VD, ids_N, _ = head_inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="impl='triton' needs"):
        token_logprobs(hidden_ND, weight_VD, ids_N, impl="triton")


# --- the packed forward ---

SMALL = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
MODELS = {
    "qwen2_tied": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=False)
    ),
    "smollm2": lambda: LlamaForCausalLM(  # tied, grouped heads in threes, large rope base, as SmolLM2-135M
        LlamaConfig(
            **SMALL,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        )
    ),
}


def random_groups(*shapes, seed=0):
    """One group a shape: (prompt length, list lengths)."""
    generator = torch.Generator().manual_seed(seed)

    def ids(size):
        return torch.randint(1, 61, (size,), generator=generator).tolist()

    return [Group(ids(prompt), [ids(size) for size in lists]) for prompt, lists in shapes]


GROUPS = {
    "uneven": random_groups((17, (9, 1, 12, 4))),
    "several_groups": random_groups((17, (9, 5, 12)), (6, (7, 2)), (30, (3, 3, 3, 8))),
    "one_list_groups": random_groups((11, (6,)), (4, (9,))),
    "everything": random_groups((1, (1, 1)), (5, (7,)), (1, (4,)), (3, (1, 6, 2)), (20, (15, 14))),
}


def make_model(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms and biases away from their initial 1 and 0
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def eager_logprobs(model, groups):
    """One sequence at a time, no padding, no mask argument, eager attention."""
    model.set_attn_implementation("eager")
    longest = max(len(ids) for group in groups for ids in group.completion_ids)
    rows = []
    for group in groups:
        for ids in group.completion_ids:
            sequence = torch.tensor([group.prompt_ids + ids])
            logp = model(input_ids=sequence, use_cache=False).logits[0].log_softmax(-1)
            at = torch.arange(len(group.prompt_ids), sequence.shape[1])
            rows.append(torch.nn.functional.pad(logp[at - 1, sequence[0, at]], (0, longest - len(ids))))
    return torch.stack(rows)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_dense(name, groups, checkpointing):
    model, dense = make_model(name), make_model(name)
    use_shared_prefix(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    pack = build_pack(groups)
    logp_BT = pack_logprobs(model, pack)
    want_BT = eager_logprobs(dense, groups)
    assert logp_BT.shape == pack.mask_BT.shape and not logp_BT[~pack.mask_BT].any()
    assert (logp_BT - want_BT).abs().max() <= 1e-5
    weight_BT = torch.randn(logp_BT.shape, generator=torch.Generator().manual_seed(1))
    got, want = gradients(model, (logp_BT * weight_BT).sum()), gradients(dense, (want_BT * weight_BT).sum())
    assert (got - want).norm() <= 1e-4 * want.norm()
    assert pack.layout.num_calls == 2 * (2 if checkpointing else 1)


@pytest.mark.parametrize("name", MODELS)
def test_dense_oracle_equals_one_sequence_at_a_time(name):
    model = make_model(name)
    use_shared_prefix(model)
    dense_BT = dense_logprobs(model, GROUPS["everything"])
    assert (dense_BT - eager_logprobs(model, GROUPS["everything"])).abs().max() <= 1e-5


def test_temperature_and_allowed_ids():
    model = make_model("qwen2_tied")
    use_shared_prefix(model)
    groups = GROUPS["several_groups"]
    pack = build_pack(groups)
    allowed_V = torch.arange(61) != 0
    options = {"temperature": 0.6, "allowed_V": allowed_V}
    logp_BT = pack_logprobs(model, pack, **options)
    torch.testing.assert_close(logp_BT, dense_logprobs(model, groups, **options), atol=1e-5, rtol=0)
    in_every_id = [  # the log-probability of every id at the first place of the first list
        pack_logprobs(model, build_pack([Group(groups[0].prompt_ids, [[v]])]), **options)[0, 0] for v in range(1, 61)
    ]
    torch.testing.assert_close(torch.stack(in_every_id).exp().sum(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_order_and_company_of_groups_change_nothing():
    model = make_model("llama")
    use_shared_prefix(model)
    groups = GROUPS["everything"]
    together = pack_logprobs(model, build_pack(groups)).split([len(g.completion_ids) for g in groups])
    for order in ([4, 2, 0, 1, 3], [3], [1, 2]):
        chosen = [groups[i] for i in order]
        logp = pack_logprobs(model, build_pack(chosen)).split([len(g.completion_ids) for g in chosen])
        for i, logp_GT in zip(order, logp, strict=True):
            length = logp_GT.shape[1]
            torch.testing.assert_close(logp_GT, together[i][:, :length], atol=1e-5, rtol=0)
    reverse = Group(groups[3].prompt_ids, groups[3].completion_ids[::-1])
    logp_GT = pack_logprobs(model, build_pack([reverse]))
    torch.testing.assert_close(logp_GT.flip(0), together[3][:, : logp_GT.shape[1]], atol=1e-5, rtol=0)


def test_runs_are_bitwise_equal():
    model = make_model("qwen2_tied")
    use_shared_prefix(model)
    pack = build_pack(random_groups((40, (30, 41, 25)), (35, (17, 44))))
    runs = []
    for _ in range(3):
        logp_BT = pack_logprobs(model, pack)
        runs.append((logp_BT.detach(), gradients(model, logp_BT.sum())))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_tied_gradient_is_the_sum_of_embedding_and_head():
    tied, untied = make_model("qwen2_tied"), make_model("qwen2")
    untied = Qwen2ForCausalLM(Qwen2Config(**tied.config.to_dict() | {"tie_word_embeddings": False}))
    state = tied.state_dict()
    untied.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    pack = build_pack(GROUPS["several_groups"])
    for model in (tied, untied):
        use_shared_prefix(model)
        gradients(model, pack_logprobs(model, pack).sum())
    head, embedding = untied.lm_head.weight.grad, untied.model.embed_tokens.weight.grad
    assert head.norm() > 0 and embedding.norm() > 0
    torch.testing.assert_close(tied.model.embed_tokens.weight.grad, head + embedding)


def test_bfloat16_autocast_is_within_dense_noise():
    model = make_model("qwen2_tied")
    use_shared_prefix(model)
    groups = GROUPS["several_groups"]
    pack = build_pack(groups)
    exact_BT = pack_logprobs(model, pack)
    with torch.autocast("cpu", torch.bfloat16):
        packed_BT, dense_BT = pack_logprobs(model, pack), dense_logprobs(model, groups)
    assert packed_BT.dtype == torch.float32
    assert (packed_BT - exact_BT).abs().mean() <= 1.5 * (dense_BT - exact_BT).abs().mean()
    assert (packed_BT - exact_BT).abs().max() > 0


def test_no_silent_fall_back():
    model = make_model("llama")
    pack = build_pack(GROUPS["uneven"])
    with pytest.raises(ValueError, match="call rankgrpo.model.attention.use_shared_prefix"):
        pack_logprobs(model, pack)
    use_shared_prefix(model)
    stubborn = model.model.layers[1].self_attn
    stubborn.config = copy.deepcopy(model.config)
    stubborn.config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="1 of 2 layers"):
        pack_logprobs(model, pack)


def test_a_changed_head_is_refused():
    model = make_model("llama")
    use_shared_prefix(model)
    pack = build_pack(GROUPS["uneven"])
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    with pytest.raises(ValueError, match="changes its head's output"):
        pack_logprobs(model, pack)
    hook.remove()
    pack_logprobs(model, pack)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="only a Linear layer"):
        pack_logprobs(model, pack)


def test_a_bias_of_the_head_counts():
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(48, 61, bias=True)
    want_BT = eager_logprobs(model, GROUPS["uneven"])
    use_shared_prefix(model)
    torch.testing.assert_close(pack_logprobs(model, build_pack(GROUPS["uneven"])), want_BT, rtol=1e-4, atol=1e-5)


def test_the_head_is_whole_again_after_an_error():
    model = make_model("llama")
    use_shared_prefix(model)
    with pytest.raises(ValueError, match="temperature"):
        pack_logprobs(model, build_pack(GROUPS["uneven"]), temperature=-1.0)
    assert model.lm_head(torch.zeros(1, 48)).shape == (1, 61)


@pytest.fixture
def one_process():
    """A process group of this process alone, for sharding."""
    import torch.distributed as dist

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["qwen2_tied", "llama"])
def test_sharded_equals_plain(one_process, name):
    """FSDP2 gathers weights in the root's forward hooks, so the head must run inside them. With checkpointing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, sharded = make_model(name), make_model(name)
    mesh = init_device_mesh("cpu", (1,))
    use_shared_prefix(sharded)
    use_shared_prefix(plain)
    sharded.train()
    sharded.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    pack = build_pack(GROUPS["several_groups"])
    logp_BT = pack_logprobs(sharded, pack)
    torch.testing.assert_close(logp_BT, pack_logprobs(plain, pack))
    logp_BT.sum().backward()
    want = gradients(plain, pack_logprobs(plain, pack).sum())
    got = torch.cat([parameter.grad.full_tensor().flatten() for parameter in sharded.parameters()])
    assert (got - want).norm() <= 1e-5 * want.norm()
