"""The rank kernel in Triton's interpreter: same code as on a GPU, tiny shapes. tests/gpu has the real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
import triton  # noqa: E402

if not triton.knobs.runtime.interpret:
    reason = "triton was imported without TRITON_INTERPRET=1; run `make test`, or this file alone"
    pytest.skip(reason, allow_module_level=True)

import rankgrpo_kernels.rank_ratio as op  # noqa: E402
from rankgrpo.loss import rank_grpo_loss  # noqa: E402
from rankgrpo_kernels.rank_ratio import fused_rank_grpo_loss  # noqa: E402

CLIP = {"clip_low": 0.06, "clip_high": 0.08}
# T, K: one token; a list shorter than a block; no power of two; K beyond a block of ranks; three blocks of tokens.
SHAPES = [(1, 1), (37, 20), (130, 21), (200, 64), (4500, 20)]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(num_tokens, num_ranks, *, order="ascending", num_lists=2, seed=0):
    """Ranks of uneven length, some empty, some beyond K, masked tokens in between; ratios on both sides of the clip."""
    random = torch.Generator().manual_seed(seed)
    shape = (num_lists, num_tokens)
    logp = -3 * torch.rand(shape, generator=random)
    old = logp + 0.1 * torch.randn(shape, generator=random)
    ref = logp + 0.5 * torch.randn(shape, generator=random)
    rank = torch.randint(0, num_ranks + 2, shape, generator=random)
    if order == "ascending":
        rank = rank.sort(1).values
    rank[torch.rand(shape, generator=random) < 0.2] = -1
    rank[0, 0] = 0
    advantage = torch.randn(num_lists, num_ranks, generator=random)
    weight = torch.rand(num_lists, num_ranks, generator=random)
    return logp, old, rank, advantage, ref, weight


def loop_oracle(logp, old, rank, advantage, *, ref=None, kl_coef=0.0, reduction="rank", weight=None, denominator=None):
    """Loss and gradient in float64, one token after another."""
    logp = logp.double().requires_grad_()
    policy, kl, taking_part = 0 * logp.sum(), 0.0, 0
    for b in range(logp.shape[0]):
        for k in range(advantage.shape[1]):
            tokens = [t for t in range(logp.shape[1]) if int(rank[b, t]) == k]
            taking_part += len(tokens)
            share = float(weight[b, k]) if weight is not None else 1.0
            share *= len(tokens) if reduction == "token" else 1
            log_ratio = sum((logp[b, t] - float(old[b, t]) for t in tokens), logp.new_zeros(())) / max(len(tokens), 1)
            ratio, a = log_ratio.exp(), float(advantage[b, k])
            clipped = min(max(ratio.item(), 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
            policy = policy - share * (ratio * a if ratio.item() * a <= clipped * a else clipped * a)
            for t in tokens if ref is not None else []:
                d = float(ref[b, t]) - logp[b, t]
                kl = kl + share * (d.exp() - d - 1) / len(tokens)
    if denominator is None:
        denominator = max(taking_part if reduction == "token" else advantage.numel(), 1)
    loss = (policy + kl_coef * kl) / denominator
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


def run(function, logp, *args, **options):
    logp = logp.detach().requires_grad_()
    loss, metrics = function(logp, *args, **CLIP, **options)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def assert_as_exact_as_torch(ours, plain, exact):
    """Loss and gradient within twice PyTorch's own error. That can be zero by chance; hence a unit in the last place,
    of the largest gradient, and of the terms that the loss is the mean of (about 1)."""
    for i, size in enumerate((torch.tensor(1.0), exact[1].abs().max())):
        error, plain_error = ((x[i].double() - exact[i]).abs().max() for x in (ours, plain))
        assert error <= 2 * plain_error + 2**-23 * size


@pytest.mark.parametrize("reduction", ["rank", "token"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("order", ["ascending", "any"])
@pytest.mark.parametrize("num_tokens, num_ranks", SHAPES[:-1])
def test_loss_and_gradient_agree_with_the_loop(num_tokens, num_ranks, order, kl_coef, reduction):
    logp, old, rank, advantage, ref, weight = make_case(num_tokens, num_ranks, order=order)
    options = {"kl_coef": kl_coef, "reduction": reduction}
    exact = loop_oracle(logp, old, rank, advantage, ref=ref, weight=weight, **options)
    plain = run(rank_grpo_loss, logp, old, rank, advantage, ref_logp_BT=ref, weight_BK=weight, **options)
    ours = run(fused_rank_grpo_loss, logp, old, rank, advantage, ref_logp_BT=ref, weight_BK=weight, **options)
    assert_as_exact_as_torch(ours, plain, exact)
    assert ours[2].keys() == plain[2].keys()
    for name, value in ours[2].items():
        torch.testing.assert_close(value, plain[2][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("order", ["ascending", "any"])
def test_a_list_of_several_blocks(order):
    logp, old, rank, advantage, ref, _ = make_case(*SHAPES[-1], order=order, num_lists=1)
    options = {"ref_logp_BT": ref, "kl_coef": 0.1}
    plain = run(rank_grpo_loss, logp, old, rank, advantage, **options)
    ours = run(fused_rank_grpo_loss, logp, old, rank, advantage, **options)
    double = [x.double() for x in (logp, old)]
    exact = run(rank_grpo_loss, *double, rank, advantage.double(), ref_logp_BT=ref.double(), kl_coef=0.1)
    assert_as_exact_as_torch(ours, plain, exact)


@pytest.mark.parametrize("num_ranks", [1, 20, 300])
def test_one_misplaced_token(num_ranks):
    """Ranks that ascend but for the last token: the sums of the ascending pass must not survive."""
    logp, old, rank, advantage, _, _ = make_case(300, num_ranks, num_lists=1)
    rank[0, -1] = 0
    ours = run(fused_rank_grpo_loss, logp, old, rank, advantage)
    plain = run(rank_grpo_loss, logp, old, rank, advantage)
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])


def test_results_are_bitwise_repeatable():
    logp, old, rank, advantage, ref, _ = make_case(200, 20, num_lists=4)
    runs = [run(fused_rank_grpo_loss, logp, old, rank, advantage, ref_logp_BT=ref, kl_coef=0.1) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(value, runs[1][2][name]) for name, value in runs[0][2].items())


def test_on_policy_ratio_is_one_and_the_gradient_is_the_policy_gradient():
    logp, _, rank, advantage, _, _ = make_case(60, 5)
    loss, grad, metrics = run(fused_rank_grpo_loss, logp, None, rank, advantage)
    assert metrics["ratio/mean"] == 1 and metrics["ratio/clip_low_frac"] == 0
    torch.testing.assert_close(loss, -advantage.mean())
    count = torch.stack([(rank == k).sum(1) for k in range(5)], 1)
    expected = torch.zeros_like(logp)
    for b, t in ((rank >= 0) & (rank < 5)).nonzero().tolist():
        k = rank[b, t]
        expected[b, t] = -advantage[b, k] / count[b, k] / advantage.numel()
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_stored_at_masked_tokens_does_not_matter(bad):
    logp, old, rank, advantage, ref, _ = make_case(60, 5)
    clean = run(fused_rank_grpo_loss, logp, old, rank, advantage, ref_logp_BT=ref, kl_coef=0.1)
    masked = (rank < 0) | (rank >= 5)
    for values in (logp, old, ref):
        values[masked] = bad
    dirty = run(fused_rank_grpo_loss, logp, old, rank, advantage, ref_logp_BT=ref, kl_coef=0.1)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    assert (dirty[1][masked] == 0).all()


@pytest.mark.parametrize("where", ["logp", "old", "ref", "on-policy"])
def test_a_log_prob_that_is_not_finite_shows_in_the_loss(where):
    logp, old, rank, advantage, ref, _ = make_case(60, 5)
    {"logp": logp, "old": old, "ref": ref, "on-policy": logp}[where][tuple((rank == 2).nonzero()[0])] = float("-inf")
    old = None if where == "on-policy" else old
    loss, _, _ = run(fused_rank_grpo_loss, logp, old, rank, advantage, ref_logp_BT=ref, kl_coef=0.1)
    assert loss.isnan()
    if where == "ref":  # a reference that only feeds the metric stays out of the loss
        loss, _, metrics = run(fused_rank_grpo_loss, logp, old, rank, advantage, ref_logp_BT=ref)
        assert loss.isfinite() and metrics["loss/kl"].isnan()


def test_ratios_beyond_the_bound_have_no_gradient():
    logp = torch.tensor([[-1.0, -1.0, -1.0]])
    old, rank, advantage = torch.tensor([[-40.0, -0.5, 60.0]]), torch.tensor([[0, 1, 2]]), torch.tensor([[-1.0] * 3])
    loss, grad, _ = run(fused_rank_grpo_loss, logp, old, rank, advantage)
    plain_loss, plain_grad, _ = run(rank_grpo_loss, logp, old, rank, advantage)
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(grad, plain_grad)
    assert grad[0, 0] == 0 and grad[0, 2] == 0


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_empty_ranks_lists_and_batches(reduction):
    logp, old, rank, advantage, ref, _ = make_case(40, 6, num_lists=3)
    rank[0] = -1
    rank[1] = 99
    rank[2][rank[2] == 3] = -1
    options = {"reduction": reduction, "ref_logp_BT": ref, "kl_coef": 0.1}
    ours = run(fused_rank_grpo_loss, logp, old, rank, advantage, **options)
    plain = run(rank_grpo_loss, logp, old, rank, advantage, **options)
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])
    torch.testing.assert_close(ours[2], plain[2])
    for lists, tokens, ranks in ((0, 40, 6), (3, 0, 6), (3, 40, 0)):
        cut = [x[:lists, :tokens] for x in (logp, old, rank)]
        loss, grad, _ = run(fused_rank_grpo_loss, *cut, advantage[:lists, :ranks], reduction=reduction)
        no_tokens_but_ranks = tokens == 0 and reduction == "rank"
        torch.testing.assert_close(loss, -advantage.mean() if no_tokens_but_ranks else torch.tensor(0.0))
        assert grad.shape == (lists, tokens) and (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_ranks_outside_the_list_take_no_part_in_any_integer_type(dtype):
    logp, old, _, advantage, _, _ = make_case(8, 3, num_lists=1)
    outside = {torch.int64: [2**32, -(2**32) + 1, 2**62], torch.int32: [2**31 - 1, -(2**31), 3]}
    rank = torch.tensor([[0, 0, 1, 2, 2, *outside.get(dtype, [3, -7, 2**15 - 1])]], dtype=dtype)
    _, grad, metrics = run(fused_rank_grpo_loss, logp, old, rank, advantage)
    assert metrics["ratio/num_units"] == 3 and (grad[0, 5:] == 0).all()


@pytest.mark.parametrize("unit", ["token", "list"])
def test_token_and_list_units(unit):
    logp, old, rank, _, _, _ = make_case(150, 20)
    units = torch.arange(150).expand(2, 150) if unit == "token" else torch.zeros(2, 150, dtype=torch.int64)
    units = torch.where(rank < 0, -1, units)
    advantage = torch.tensor([[1.0], [-0.5]]).expand(2, 150 if unit == "token" else 1)
    weight = torch.tensor([[0.01], [0.02]]).expand_as(advantage)
    ours = run(fused_rank_grpo_loss, logp, old, units, advantage, weight_BK=weight, denominator=2)
    plain = run(rank_grpo_loss, logp, old, units, advantage, weight_BK=weight, denominator=2)
    torch.testing.assert_close(ours[0], plain[0])
    torch.testing.assert_close(ours[1], plain[1])


@pytest.mark.parametrize("reduction", ["rank", "token"])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_sum_to_the_whole(reduction, as_tensor):
    case = make_case(60, 5, num_lists=4)[:4]
    denominator = torch.tensor(77.0) if as_tensor else 77.0
    options = {"reduction": reduction, "denominator": denominator}
    whole = run(fused_rank_grpo_loss, *case, **options)
    parts = [run(fused_rank_grpo_loss, *(x[i : i + 2] for x in case), **options) for i in (0, 2)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1])
    plain = run(rank_grpo_loss, *case, **options)
    torch.testing.assert_close(whole[0], plain[0])
    torch.testing.assert_close(whole[2], plain[2])


def test_bfloat16_log_probs_lose_nothing_but_their_own_digits():
    logp, old, rank, advantage, ref, _ = make_case(130, 20)
    half = [x.bfloat16() for x in (logp, old, ref)]
    up = [x.float() for x in half]
    ours = run(fused_rank_grpo_loss, *half[:2], rank, advantage, ref_logp_BT=half[2], kl_coef=0.1)
    plain = run(rank_grpo_loss, *up[:2], rank, advantage, ref_logp_BT=up[2], kl_coef=0.1)
    exact = loop_oracle(*up[:2], rank, advantage, ref=up[2], kl_coef=0.1)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    assert_as_exact_as_torch(ours, (plain[0], plain[1].bfloat16()), exact)


def test_rows_may_lie_anywhere_in_memory():
    logp, old, rank, advantage, _, _ = make_case(60, 5)
    expected = run(fused_rank_grpo_loss, logp, old, rank, advantage)
    wide = torch.full((2, 90), float("nan"))
    wide[:, 7:67] = old
    transposed = [x.t().contiguous().t() for x in (rank, advantage)]
    ours = run(fused_rank_grpo_loss, logp, wide[:, 7:67], *transposed)
    assert torch.equal(expected[0], ours[0]) and torch.equal(expected[1], ours[1])


def test_the_loss_scales_its_gradient():
    logp, old, rank, advantage, _, _ = make_case(60, 5)
    logp.requires_grad_()
    (3 * fused_rank_grpo_loss(logp, old, rank, advantage)[0]).backward()
    torch.testing.assert_close(logp.grad, 3 * run(fused_rank_grpo_loss, logp, old, rank, advantage)[1])
    logp.grad = None
    (torch.inf * fused_rank_grpo_loss(logp, old, rank, advantage)[0]).backward()
    takes_part = (rank >= 0) & (rank < 5)
    assert not logp.grad[takes_part].isfinite().any() and (logp.grad[~takes_part] == 0).all()


def test_it_is_public_through_the_loss():
    case = make_case(60, 5)[:4]
    ours = run(fused_rank_grpo_loss, *case)
    public = run(rank_grpo_loss, *case, impl="triton")
    assert torch.equal(ours[0], public[0]) and torch.equal(ours[1], public[1])


def test_metrics_and_inputs_carry_no_gradient():
    logp, old, rank, advantage, ref, weight = make_case(20, 3)
    inputs = [x.requires_grad_() for x in (logp, old, advantage, ref, weight)]
    loss, metrics = fused_rank_grpo_loss(logp, old, rank, advantage, ref_logp_BT=ref, kl_coef=0.1, weight_BK=weight)
    assert not any(value.requires_grad for value in metrics.values())
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    assert grads[0] is not None and grads[1:] == (None, None, None, None)


def test_where_it_cannot_run_it_says_so(monkeypatch):
    monkeypatch.setattr(op, "INTERPRETED", False)
    case = make_case(20, 3)[:4]
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu: use impl='torch'"):
        fused_rank_grpo_loss(*case)
    with pytest.raises(ValueError, match="CUDA"):
        rank_grpo_loss(*case, impl="triton")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logp_BT": torch.zeros(2, 20, dtype=torch.float64)}, "logp_BT must be float32 or bfloat16"),
        ({"old_logp_BT": torch.zeros(2, 19)}, r"old_logp_BT must have shape \(2, 20\)"),
        ({"ref_logp_BT": torch.zeros(2, 20, dtype=torch.float16)}, "ref_logp_BT must be float32 or bfloat16"),
        ({"rank_BT": torch.zeros(2, 20)}, "rank_BT must be int64, int32 or int16, got torch.float32"),
        ({"rank_BT": torch.zeros(3, 20, dtype=torch.int64)}, r"rank_BT must have shape \(2, 20\)"),
        ({"advantage_BK": torch.zeros(3, 4)}, r"advantage_BK must have shape \(2, 4\)"),
        ({"advantage_BK": torch.zeros(2, 4, dtype=torch.int64)}, "advantage_BK must be floating point"),
        ({"advantage_BK": torch.zeros(2)}, r"advantage_BK \(B, K\)"),
        ({"advantage_BK": torch.zeros(2, 4, device="meta")}, "advantage_BK must be on cpu like logp_BT, got meta"),
        ({"weight_BK": torch.zeros(2, 5)}, r"weight_BK must have shape \(2, 4\)"),
        ({"reduction": "mean"}, "reduction must be 'rank' or 'token', got 'mean'"),
        ({"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logp_BT"),
        ({"kl_coef": -0.1}, "kl_coef must be >= 0"),
        ({"denominator": 0}, "denominator must be > 0"),
        ({"denominator": torch.ones(2)}, "0-dim tensor"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "logp_BT": torch.zeros(2, 20),
        "old_logp_BT": torch.zeros(2, 20),
        "rank_BT": torch.zeros(2, 20, dtype=torch.int64),
        "advantage_BK": torch.zeros(2, 4),
    }
    with pytest.raises(ValueError, match=message):
        fused_rank_grpo_loss(**arguments | change)


def test_the_kernels_compile_for_hopper(tmp_path):
    script = Path(__file__).parent / "gpu" / "compile_for_hopper.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script, "rank_ratio"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("forward_kernel") == 4 and done.stdout.count("backward_kernel") == 4


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu_and_leaves_a_record(tmp_path):
    script, out = Path(__file__).parents[1] / "kernels" / "bench" / "rank_ratio.py", tmp_path / "record.json"
    options = ["--device", "cpu", "--budget", "0.01", "--out", out]
    shape = ["--sizes", "4x32", "--kl-coef", "0.1"]
    done = subprocess.run([sys.executable, script, *options, *shape], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out: triton (it needs a GPU" in done.stdout
    record = json.loads(out.read_text())
    assert {"op", "machine", "versions", "commit", "command", "rows"} <= record.keys()
    assert record["op"] == "rank_ratio" and all(row["median_ms"] > 0 for row in record["rows"])
    asked = subprocess.run([sys.executable, script, "--providers", "triton", *options], capture_output=True, text=True)
    assert asked.returncode == 1 and "triton cannot run: it needs a GPU" in asked.stderr
