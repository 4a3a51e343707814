"""Shared-prefix attention against a loop over tokens, gradcheck, and the refusals that keep it from falling back."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankgrpo.model import attention
from rankgrpo.model.attention import (
    ORDINARY,
    SHARED_PREFIX,
    ordinary_attention,
    pick_backend,
    shared_prefix_attention,
    use_shared_prefix,
    uses_shared_prefix,
)
from rankgrpo.model.by_sequence import prompt_rows
from rankgrpo.model.forward import pack_logprobs
from rankgrpo.model.packing import Group, build_pack

LAYOUTS = {
    "mixed": [Group([1, 2, 3], [[4, 5], [6]]), Group([1, 2], [[3, 4]]), Group([7], [[8], [9, 7, 8]])],
    "one_token_everything": [Group([1], [[2], [3]])],
    "one_list_groups": [Group([1, 2], [[3]]), Group([4], [[5, 6]])],
    "uneven": [Group([1] * 9, [[2] * n for n in (1, 7, 3, 5)])],
}


def visible_rows(groups: list[Group]) -> list[list[int]]:
    """For every packed row, the rows it attends to, written from the definition and not from the layout."""
    shared = [g for g in groups if len(g.completion_ids) > 1]
    visible, prompts = [], []
    for group in shared:
        first = len(visible)
        prompts.append(list(range(first, first + len(group.prompt_ids))))
        visible += [prompts[-1][: i + 1] for i in range(len(group.prompt_ids))]
    for group, prompt in zip(shared, prompts, strict=True):
        for ids in group.completion_ids:
            first = len(visible)
            visible += [prompt + list(range(first, first + t + 1)) for t in range(len(ids))]
    for group in groups:
        if len(group.completion_ids) == 1:
            first = len(visible)
            visible += [list(range(first, first + i + 1)) for i in range(group.tokens_shared)]
    return visible


def loop_attention(query, key, value, groups, scale):
    repeats = query.shape[1] // key.shape[1]
    rows = []
    for n, seen in enumerate(visible_rows(groups)):
        heads = []
        for h in range(query.shape[1]):
            scores = key[seen, h // repeats] @ query[n, h] * scale
            heads.append(scores.softmax(0) @ value[seen, h // repeats])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def random_qkv(num_tokens, heads, kv_heads, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, channels), (num_tokens, kv_heads, channels), (num_tokens, kv_heads, channels)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("backend", ["cpu", "concat"])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_loop(name, heads, backend):
    groups = LAYOUTS[name]
    layout = build_pack(groups).layout
    qkv = random_qkv(layout.num_tokens, *heads, 8)
    out = shared_prefix_attention(*qkv, layout, scale=0.3, backend=backend)
    expected = loop_attention(*qkv, groups, 0.3)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    layout = build_pack(LAYOUTS["mixed"]).layout
    qkv = random_qkv(layout.num_tokens, 4, 2, 4)
    assert torch.autograd.gradcheck(lambda q, k, v: shared_prefix_attention(q, k, v, layout, scale=0.5), qkv)


def test_peaked_scores_stay_finite():
    """The two passes can differ by hundreds in log-sum-exp; the merge must pick one side, not overflow."""
    groups = LAYOUTS["uneven"]
    layout = build_pack(groups).layout
    qkv = random_qkv(layout.num_tokens, 2, 1, 8, torch.float32)
    out = shared_prefix_attention(*qkv, layout, scale=100.0)
    torch.testing.assert_close(out, loop_attention(*qkv, groups, 100.0), atol=1e-4, rtol=1e-4)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), qkv))


@pytest.mark.parametrize("short_spans", [0, attention.SHORT_SPANS], ids=["bfloat16 backward", "float32 backward"])
def test_bfloat16_error_is_that_of_plain_sdpa(short_spans, monkeypatch):
    monkeypatch.setattr(attention, "SHORT_SPANS", short_spans)
    groups = [Group([1] * 40, [[2] * n for n in (30, 11, 50)])]
    layout = build_pack(groups).layout
    qkv = random_qkv(layout.num_tokens, 4, 2, 32, torch.bfloat16)
    exact = [tensor.detach().float().requires_grad_() for tensor in qkv]
    grad = torch.randn(layout.num_tokens, 4, 32).bfloat16()

    def run(tensors, backend):
        out = shared_prefix_attention(*tensors, layout, scale=32**-0.5, backend=backend)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    assert 0 < attention.mean_pairs(layout.own) < 2500 and attention.mean_pairs(layout.cross) == 40 * 91
    for want, ours, plain in zip(run(exact, "concat"), run(qkv, "cpu"), run(qkv, "concat"), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - want).norm() <= 1.5 * (plain - want).norm() + 1e-6


def reference_flash(query, key, value, cu_q, cu_k, causal, scale):
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        repeats = query.shape[1] // key.shape[1]
        k, v = (t[k0:k1].repeat_interleave(repeats, 1).transpose(0, 1) for t in (key, value))
        scores = query[q0:q1].transpose(0, 1) @ k.transpose(1, 2) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), -math.inf)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def test_cuda_backend_calls(monkeypatch):
    """The CUDA wrappers' arguments and log-sum-exp layout, with the flash operators replaced by their definition."""

    def forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, return_debug_mask, *, scale):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and dropout == 0.0 and return_debug_mask is False
        assert max_q == (cu_q[1:] - cu_q[:-1]).max() and max_k == (cu_k[1:] - cu_k[:-1]).max()
        out, lse = reference_flash(q, k, v, cu_q, cu_k, causal, scale)
        return out, lse, None, None, None

    def backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale):
        assert lse.is_contiguous() and grad.is_contiguous() and dropout == 0.0
        delta = (grad * out).sum(-1)
        grads = [torch.zeros_like(t) for t in (q, k, v)]
        repeats = q.shape[1] // k.shape[1]
        for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            for h in range(q.shape[1]):
                j = h // repeats
                prob = (q[q0:q1, h] @ k[k0:k1, j].T * scale - lse[h, q0:q1, None]).exp()
                prob = prob.tril() if causal else prob
                score_grad = prob * (grad[q0:q1, h] @ v[k0:k1, j].T - delta[q0:q1, h, None]) * scale
                grads[0][q0:q1, h] += score_grad @ k[k0:k1, j]
                grads[1][k0:k1, j] += score_grad.T @ q[q0:q1, h]
                grads[2][k0:k1, j] += prob.T @ grad[q0:q1, h]
        return grads

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    layout = build_pack(LAYOUTS["mixed"]).layout
    qkv = random_qkv(layout.num_tokens, 4, 2, 8)
    out = shared_prefix_attention(*qkv, layout, scale=0.3, backend="cuda")
    expected = shared_prefix_attention(*qkv, layout, scale=0.3, backend="concat")
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, qkv, grad), torch.autograd.grad(expected, qkv, grad), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_equals_cpu(dtype):
    groups = [Group([1] * 40, [[2] * n for n in (30, 11, 50)]), Group([1] * 7, [[2] * 5]), Group([1], [[2], [3, 4]])]
    qkv = random_qkv(build_pack(groups).layout.num_tokens, 4, 2, 64, dtype)
    exact = [tensor.detach().float().requires_grad_() for tensor in qkv]
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in qkv]
    assert pick_backend(on_gpu[0]) == ("cuda" if dtype == torch.bfloat16 else "concat")
    out = shared_prefix_attention(*on_gpu, build_pack(groups, "cuda").layout, scale=0.125)
    want = shared_prefix_attention(*exact, build_pack(groups).layout, scale=0.125)
    tolerance = {"atol": 3e-2, "rtol": 3e-2} if dtype == torch.bfloat16 else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(out.cpu().float(), want, **tolerance)
    grad = torch.randn_like(want)
    got_grads = torch.autograd.grad(out, on_gpu, grad.to(dtype).cuda())
    for got, expected in zip(got_grads, torch.autograd.grad(want, exact, grad), strict=True):
        torch.testing.assert_close(got.cpu().float(), expected, **tolerance)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def test_ordinary_attention_decodes_like_sdpa_and_restores(model):
    prompt = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(prompt, **options)
    use_shared_prefix(model)
    with ordinary_attention(model):
        assert model.config._attn_implementation == ORDINARY
        assert torch.equal(model.generate(prompt, **options), expected)
    assert uses_shared_prefix(model)
    with pytest.raises(KeyError), ordinary_attention(model):
        raise KeyError
    assert uses_shared_prefix(model)


def test_without_a_layout_it_raises(model):
    use_shared_prefix(model)
    with pytest.raises(ValueError, match="without a layout"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_recomputation_inside_ordinary_attention_raises(model):
    """Activation checkpointing recomputes layers in backward; the wrong attention there would be wrong gradients."""
    use_shared_prefix(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    logp_BT = pack_logprobs(model, build_pack(LAYOUTS["mixed"]))
    with pytest.raises(ValueError, match="leave it first"), ordinary_attention(model):
        logp_BT.sum().backward()


def test_refusals(model):
    use_shared_prefix(model)
    pack = build_pack(LAYOUTS["mixed"])
    inputs = {"position_ids": pack.position_ids_1N, "shared_prefix": pack.layout, "use_cache": False}
    with pytest.raises(ValueError, match="one row"):
        model(input_ids=pack.input_ids_1N.expand(2, -1), **inputs)
    with pytest.raises(ValueError, match="describes 15 tokens"):
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), **inputs | {"position_ids": None})
    mask = torch.zeros(1, 1, 15, 15)
    with pytest.raises(ValueError, match="no attention mask"):
        model(input_ids=pack.input_ids_1N, attention_mask=mask, **inputs)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout"):
        pack_logprobs(model, pack)


CHANGES = {
    "window": {"sliding_window": 4},
    "soft_cap": {"softcap": 2.0},
    "sinks": {"s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)},
    "all": {"sliding_window": 3, "softcap": 2.0, "s_aux": torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_scores_equal_a_loop_over_queries(change):
    """Every query by itself: its keys by position, tanh on the scores, and the sink's exp in the denominator."""
    from transformers import AttentionInterface

    options = CHANGES[change]
    groups = LAYOUTS["mixed"]
    pack = build_pack(groups)
    query_NHE, key_NJE, value_NJE = random_qkv(15, 4, 2, 8)
    query, key, value = (t.detach().transpose(0, 1)[None] for t in (query_NHE, key_NJE, value_NJE[..., :5]))
    out = AttentionInterface()[SHARED_PREFIX](
        None, query, key, value, None, scaling=0.7, shared_prefix=pack.layout, **options
    )[0][0]
    position_N = pack.position_ids_1N[0].tolist()
    prompt_of_row = prompt_rows(pack.layout)
    start = 0
    for size in pack.layout.own.q_sizes:
        rows = list(range(start, start + size))
        prompt = prompt_of_row.get(start, slice(0, 0))
        for n in rows:
            keys = [*range(prompt.start, prompt.stop), *(row for row in rows if row <= n)]
            keys = [k for k in keys if position_N[n] - position_N[k] < options.get("sliding_window", 99)]
            for h in range(4):
                score = torch.stack([query_NHE[n, h] @ key_NJE[k, h // 2] for k in keys]) * 0.7
                if "softcap" in options:
                    score = options["softcap"] * torch.tanh(score / options["softcap"])
                weight = score.exp()
                total = weight.sum() + (options["s_aux"][h].exp() if "s_aux" in options else 0)
                want = (weight / total) @ torch.stack([value_NJE[k, h // 2, :5] for k in keys])
                torch.testing.assert_close(out[n, h], want.detach(), rtol=1e-5, atol=1e-6)
        start += size


def test_values_of_another_size_are_those_of_a_loop():
    from transformers import AttentionInterface

    pack = build_pack(LAYOUTS["mixed"])
    query, key, value = (t.detach().transpose(0, 1)[None] for t in random_qkv(15, 4, 2, 8))
    forward = AttentionInterface()[SHARED_PREFIX]
    whole = forward(None, query, key, value, None, scaling=1.0, shared_prefix=pack.layout)[0]
    part = forward(None, query, key, value[..., :5], None, scaling=1.0, shared_prefix=pack.layout)[0]
    torch.testing.assert_close(part, whole[..., :5])


def test_position_biases_are_refused():
    from transformers import AttentionInterface

    pack = build_pack(LAYOUTS["mixed"])
    query, key, value = (t.detach().transpose(0, 1)[None] for t in random_qkv(15, 4, 2, 8))
    forward = AttentionInterface()[SHARED_PREFIX]
    with pytest.raises(ValueError, match="not supported"):
        forward(None, query, key, value, None, scaling=1.0, shared_prefix=pack.layout, position_bias=torch.zeros(1))


def test_autocast_type_is_used():
    from transformers import AttentionInterface

    pack = build_pack(LAYOUTS["mixed"])
    query, key, value = (t.detach().float().transpose(0, 1)[None] for t in random_qkv(15, 4, 2, 8))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = AttentionInterface()[SHARED_PREFIX](
            None, query, key, value.bfloat16(), None, scaling=1.0, shared_prefix=pack.layout
        )
    assert out.dtype == torch.bfloat16 and out.shape == (1, 15, 4, 8)
