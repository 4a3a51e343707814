"""The rank kernel on a GPU, at the shapes it is for. tests/test_kernel_rank_ratio.py has the edge cases."""

import os

import pytest
import torch

from rankgrpo.loss import rank_grpo_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: use `make test-gpu`"),
]
DEVICE = "cuda"

# B, T, K
USUAL = (512, 256, 20)
SHAPES = [
    USUAL,
    (96, 1024, 21),  # completions of 1,024 tokens, one unit beyond the ranks
    (33, 777, 64),  # no multiple of a block
    (300, 150, 1),  # a unit a list
    (16, 4096, 4096),  # a unit a token
    (3, 65536, 20),  # longest lists
    (2, 65536, 65536),
    (32768, 512, 20),  # 16.8 million tokens
]


@pytest.fixture(autouse=True)
def fused():
    """The kernel; memory that is not written is NaN."""
    from rankgrpo_kernels.rank_ratio import fused_rank_grpo_loss

    torch.use_deterministic_algorithms(True)
    yield fused_rank_grpo_loss
    torch.use_deterministic_algorithms(False)


def make_case(num_lists, num_tokens, num_ranks, *, order="ascending", dtype=torch.float32, seed=0):
    """Ranks of uneven length, some empty, one beyond K, masked tokens in between; ratios on both sides of the clip."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    shape = {"size": (num_lists, num_tokens), "generator": random, "device": DEVICE}
    logp = -3 * torch.rand(**shape)
    old = logp + 0.1 * torch.randn(**shape)
    ref = logp + 0.5 * torch.randn(**shape)
    rank = torch.randint(0, num_ranks + 1, (num_lists, num_tokens), generator=random, device=DEVICE)
    if order == "ascending":
        rank = rank.sort(1).values
    rank[torch.rand(**shape) < 0.1] = -1
    advantage = torch.randn(num_lists, num_ranks, generator=random, device=DEVICE)
    return {
        "logp_BT": logp.to(dtype), "old_logp_BT": old.to(dtype), "rank_BT": rank, "advantage_BK": advantage,
        "ref_logp_BT": ref.to(dtype),
    }  # fmt: skip


def run(function, case, **options):
    logp = case["logp_BT"].detach().requires_grad_()
    loss, metrics = function(**case | {"logp_BT": logp}, **options)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def cast(case, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.items()}


def assert_as_exact_as_torch(ours, plain, exact):
    """Loss and gradient within twice PyTorch's own error. That can be zero by chance; hence a unit in the last place,
    of the largest gradient, and of the terms that the loss is the mean of (about 1)."""
    for i, size in enumerate((1.0, exact[1].abs().max())):
        error, plain_error = ((x[i].double() - exact[i]).abs().max() for x in (ours, plain))
        assert error <= 2 * plain_error + 2**-23 * size


def check(fused, case, **options):
    ours = run(fused, case, **options)
    upcast = cast(case, torch.float32)
    plain, exact = run(rank_grpo_loss, upcast, **options), run(rank_grpo_loss, cast(case, torch.float64), **options)
    plain = (plain[0], plain[1].to(case["logp_BT"].dtype), plain[2])
    assert ours[1].dtype == case["logp_BT"].dtype
    assert_as_exact_as_torch(ours, plain, exact)
    for name, value in ours[2].items():
        torch.testing.assert_close(value.double(), exact[2][name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["rank", "token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32(fused, shape, reduction, kl_coef):
    check(fused, make_case(*shape), reduction=reduction, kl_coef=kl_coef)


@pytest.mark.parametrize("shape", [USUAL, (33, 777, 64), (3, 65536, 20)])
def test_bfloat16(fused, shape):
    check(fused, make_case(*shape, dtype=torch.bfloat16), kl_coef=0.1)


@pytest.mark.parametrize("shape", [USUAL, (33, 777, 64), (5, 5000, 20)])
def test_ranks_in_any_order(fused, shape):
    check(fused, make_case(*shape, order="any"), kl_coef=0.1)


@pytest.mark.parametrize("rank_dtype", [torch.int32, torch.int16])
def test_narrow_ranks(fused, rank_dtype):
    case = make_case(*USUAL)
    narrow = case | {"rank_BT": case["rank_BT"].to(rank_dtype)}
    assert all(torch.equal(a, b) for a, b in zip(run(fused, case)[:2], run(fused, narrow)[:2], strict=True))


@pytest.mark.parametrize("order", ["ascending", "any"])
def test_runs_are_bitwise_equal(fused, order):
    case = make_case(2048, 512, 20, order=order)
    first, *others = (run(fused, case, kl_coef=0.1) for _ in range(4))
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])
        assert all(torch.equal(value, other[2][name]) for name, value in first[2].items())


def test_what_is_stored_at_masked_tokens_does_not_matter(fused):
    case = make_case(*USUAL)
    clean = run(fused, case, kl_coef=0.1)
    masked = (case["rank_BT"] < 0) | (case["rank_BT"] >= 20)
    for name in ("logp_BT", "old_logp_BT", "ref_logp_BT"):
        case[name][masked] = torch.nan
    dirty = run(fused, case, kl_coef=0.1)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_one_bad_log_prob_shows(fused):
    case = make_case(*USUAL)
    case["logp_BT"][tuple((case["rank_BT"] == 7).nonzero()[0])] = -torch.inf
    assert run(fused, case)[0].isnan()


def test_it_is_public_through_the_loss(fused):
    case = make_case(*USUAL)
    assert torch.equal(run(fused, case)[1], run(rank_grpo_loss, case, impl="triton")[1])


def test_cpu_tensors_are_refused(fused):
    case = {name: value.cpu() for name, value in make_case(*USUAL).items()}
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        fused(**case)
