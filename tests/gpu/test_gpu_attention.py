"""Shared-prefix attention by the flash kernels of a GPU, at the shapes it is for."""

import os

import pytest
import torch

from rankgrpo.model.attention import pick_backend, shared_prefix_attention
from rankgrpo.model.packing import Group, build_pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: use `make test-gpu`"),
]
DEVICE = "cuda"
# Query heads, key heads, channels: Qwen2.5-0.5B, Llama-3.2-1B, Qwen3-0.6B.
HEADS = [(14, 2, 64), (32, 8, 64), (16, 8, 128)]


def make_pack(prompts=(700, 33), lists=(230, 230, 41)):
    groups = [Group([1] * size, [[2] * length for length in lists]) for size in prompts]
    return build_pack([*groups, Group([1] * 50, [[2] * 60])], DEVICE)  # and one that shares nothing


def run(inputs, grad, layout, backend):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = shared_prefix_attention(*inputs, layout, scale=inputs[0].shape[-1] ** -0.5, backend=backend)
    return out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
def test_flash_attention_of_packs(heads, dtype):
    """Outputs and gradients in norm within twice the error of plain attention in the same type."""
    num_heads, num_kv_heads, size = heads
    layout = make_pack().layout
    random = torch.Generator(DEVICE).manual_seed(0)
    shapes = [(layout.num_tokens, count, size) for count in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    *inputs, grad = (torch.randn(shape, generator=random, device=DEVICE).to(dtype) for shape in shapes)
    assert pick_backend(inputs[0]) == "cuda"
    exact = run([x.double() for x in inputs], grad, layout, "concat")
    plain, ours = run(inputs, grad, layout, "concat"), run(inputs, grad, layout, "cuda")
    for name, x, y, z in zip(("out", "query", "key", "value"), ours, plain, exact, strict=True):
        error, plain_error = ((value.double() - z).norm() / z.norm() for value in (x, y))
        assert error <= 2 * plain_error + 1e-6, f"{name}: {error:.2e}, plain attention {plain_error:.2e}"


def test_runs_are_bitwise_equal_forward():
    layout = make_pack().layout
    random = torch.Generator(DEVICE).manual_seed(0)
    shape = (layout.num_tokens, 8, 64)
    inputs = [torch.randn(shape, generator=random, device=DEVICE).bfloat16() for _ in range(3)]
    first, again = (shared_prefix_attention(*inputs, layout, scale=0.125) for _ in range(2))
    assert torch.equal(first, again)
