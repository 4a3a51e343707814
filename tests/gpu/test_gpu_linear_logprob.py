"""The fused head on a GPU, at the shapes it is for. tests/test_kernel_linear_logprob.py has the edge cases."""

import os

import pytest
import torch

from rankgrpo.logprob import token_logprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: use `make test-gpu`"),
]
DEVICE = "cuda"

# N, V, D
QWEN = (1840, 151_936, 896)  # 8 lists of 230 tokens, Qwen2.5-0.5B
SHAPES = [
    QWEN,
    (1000, 128_256, 2048),  # Llama-3.2-1B
    (300, 49_152, 576),  # SmolLM2-135M
    (1837, 50_257, 80),  # nothing a multiple of a tile
    (1, 32_000, 256),
]


@pytest.fixture
def fused():
    from rankgrpo_kernels.linear_logprob import fused_token_logprobs

    return fused_token_logprobs


def make_case(num_rows, num_ids, num_hidden, dtype=torch.bfloat16, *, live=1.0, seed=0):
    random = torch.Generator(DEVICE).manual_seed(seed)
    options = {"generator": random, "device": DEVICE}
    hidden = torch.randn(num_rows, num_hidden, **options).to(dtype)
    weight = (1.5 * num_hidden**-0.5 * torch.randn(num_ids, num_hidden, **options)).to(dtype)
    ids = torch.randint(num_ids, (num_rows,), **options)
    grad = torch.randn(num_rows, **options) / num_rows
    grad[torch.rand(num_rows, **options) >= live] = 0
    return hidden, weight, ids, grad


def plain(hidden, weight, ids, allowed_V=None, temperature=1.0):
    """Full logits, PyTorch's own log-softmax."""
    logits = (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature
    if allowed_V is not None:
        logits = logits.masked_fill(~allowed_V, -torch.inf)
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def run(function, hidden, weight, ids, grad, **options):
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    logp = function(hidden, weight, ids, **options)
    return logp.detach(), *torch.autograd.grad(logp, (hidden, weight), grad.to(logp.dtype))


def exact(hidden, weight, ids, grad, **options):
    return run(plain, hidden.double(), weight.double(), ids, grad, **options)


def check_log_probs(logp, truth, hidden, weight, ids, _grad, **options):
    """Within 2e-6, or twice what full float32 logits of the same inputs lose: long products have errors too."""
    with torch.no_grad():
        full = plain(hidden.float(), weight.float(), ids, **options)
    error, full_error = ((x - truth).abs().max() for x in (logp, full))
    assert error <= max(2e-6, 2 * full_error), f"{error:.2e}, full float32 logits {full_error:.2e}"


def check_gradients(ours, plain_ones, truth):
    """In norm, within twice the error of full logits in the same type."""
    for x, y, z in zip(ours, plain_ones, truth, strict=True):
        error, plain_error = ((value.double() - z).norm() / z.norm() for value in (x, y))
        assert error <= 2 * plain_error + 1e-6, f"{error:.2e}, PyTorch {plain_error:.2e}"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16(fused, shape, temperature):
    case = make_case(*shape, live=0.5)
    ours, truth = run(fused, *case, temperature=temperature), exact(*case, temperature=temperature)
    check_log_probs(ours[0], truth[0], *case, temperature=temperature)
    check_gradients(ours[1:], run(plain, *case, temperature=temperature)[1:], truth[1:])


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_float32(fused, shape):
    case = make_case(*shape, torch.float32, live=0.5)
    ours, truth = run(fused, *case), exact(*case)
    check_log_probs(ours[0], truth[0], *case)
    check_gradients(ours[1:], run(plain, *case)[1:], truth[1:])


def test_a_vocabulary_with_ids_not_allowed(fused):
    hidden, weight, ids, grad = make_case(*QWEN, live=0.5)
    allowed = torch.arange(len(weight), device=DEVICE) < 151_665  # ids beyond the tokenizer
    ids = ids.clamp(max=151_664)
    case = (hidden, weight, ids, grad)
    ours, truth = run(fused, *case, allowed_V=allowed), exact(*case, allowed_V=allowed)
    check_log_probs(ours[0], truth[0], *case, allowed_V=allowed)
    check_gradients(ours[1:], run(plain, *case, allowed_V=allowed)[1:], truth[1:])
    assert not ours[2][151_665:].any()


def test_runs_are_bitwise_equal(fused):
    case = make_case(*QWEN, live=0.5)
    first, *others = (run(fused, *case) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_rows_without_gradient_change_nothing(fused):
    hidden, weight, ids, grad = make_case(*QWEN, live=0.25)
    live = grad != 0
    whole = run(fused, hidden, weight, ids, grad)
    alone = run(fused, hidden[live], weight, ids[live], grad[live])
    assert not whole[1][~live].any()
    # Not bitwise: how the vocabulary is parted, and so the last bit of a log-sum-exp, depends on the number of rows.
    for x, y in ((whole[1][live], alone[1]), (whole[2], alone[2])):
        assert (x.double() - y.double()).norm() <= 1e-3 * y.double().norm()


def test_memory(fused):
    """At 1,840 x 151,936 full float32 logits alone are 1.1 GB. The weight's gradient, 0.27 GB, is counted in."""
    case = make_case(*QWEN)
    run(fused, *case)  # the matrix products' workspace and the compiled kernels stay
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(fused, *case)
    assert torch.cuda.max_memory_allocated() - before <= 0.35e9


def test_it_is_public_through_logprob(fused):
    hidden, weight, ids, _ = make_case(*SHAPES[2])
    assert torch.equal(token_logprobs(hidden, weight, ids, impl="triton"), fused(hidden, weight, ids))


def test_cpu_tensors_are_refused(fused):
    hidden, weight, ids, _ = (x.cpu() for x in make_case(*SHAPES[2]))
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        fused(hidden, weight, ids)
