import math
import sys
import types

import pytest
import torch

from rankgrpo.loss import MAX_LOG_RATIO, kl_k3, merge_metrics, rank_grpo_loss, rank_log_ratio

# Shape letters: B lists, T tokens, K ranks.

CLIP = {"clip_low": 0.06, "clip_high": 0.08}
RANK_BT = torch.tensor(
    [
        [0, 0, 0, 1, 1, 2, 2, 2],  # a full list
        [0, 1, 1, 3, 3, 4, -1, -1],  # rank 2 missing, one token past K, padding
        [0, 0, -1, -1, -1, -1, -1, -1],  # short
        [-1, -1, -1, -1, -1, -1, -1, -1],  # empty
    ]
)
NUM_RANKS = 4


def make_batch(seed=0, dtype=torch.float64, spread=0.15):
    """Log-probs whose rank ratios fall on both sides of the clip band, but not on its edge."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    old_BT = -draw(4, 8).abs() - 0.5
    logp_BT = old_BT + spread * draw(4, 8)
    ref_BT = old_BT + 0.3 * draw(4, 8)
    return [x.to(dtype) for x in (logp_BT, old_BT, ref_BT, draw(4, NUM_RANKS), draw(4, NUM_RANKS).abs())]


def loop_loss(logp, old, rank, advantage, *, ref, kl_coef, reduction, denominator, weight):
    """Eq. 6 with Python floats: (loss, policy part, mean k3, units with tokens, sum of ratios, clipped low, high)."""
    policy = kl = ratios = 0.0
    num_tokens = num_units = num_low = num_high = 0
    num_lists, num_ranks = len(advantage), len(advantage[0])
    for b in range(num_lists):
        for k in range(num_ranks):
            tokens = [t for t in range(len(rank[b])) if rank[b][t] == k]
            n = len(tokens)
            log_ratio = sum(logp[b][t] - old[b][t] for t in tokens) / n if n else 0.0
            ratio, a = math.exp(log_ratio), advantage[b][k]
            clipped = min(max(ratio, 0.94), 1.08)
            k3 = [math.exp(ref[b][t] - logp[b][t]) - (ref[b][t] - logp[b][t]) - 1 for t in tokens]
            c = (weight[b][k] if weight else 1.0) * (n if reduction == "token" else 1)
            policy -= c * min(ratio * a, clipped * a)
            kl += c * (sum(k3) / n if n else 0.0)
            num_tokens, num_units, ratios = num_tokens + n, num_units + (n > 0), ratios + ratio * (n > 0)
            num_low += n > 0 and ratio < 0.94 and a < 0
            num_high += n > 0 and ratio > 1.08 and a > 0
    if denominator is None:
        denominator = num_tokens if reduction == "token" else num_lists * num_ranks
    policy, kl = policy / denominator, kl / denominator
    return policy + kl_coef * kl, policy, kl, num_units, ratios, num_low, num_high


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


def test_rank_log_ratio_is_the_mean_over_each_rank():
    logp_BT = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]])
    old_BT = torch.tensor([[-1.5, -1.0, -3.0, -4.2, -9.0]])
    rank_BT = torch.tensor([[0, 0, 2, 2, -1]])
    expected_BK = torch.tensor([[(0.5 - 1.0) / 2, 0.0, (0.0 + 0.2) / 2]])
    torch.testing.assert_close(rank_log_ratio(logp_BT, old_BT, rank_BT, 3), expected_BK)


def test_kl_k3_literals():
    d = torch.tensor([0.0, 1.0, -1.0, math.log(2.0)], dtype=torch.float64)
    expected = torch.tensor([0.0, math.e - 2.0, 1 / math.e, 1 - math.log(2.0)], dtype=torch.float64)
    torch.testing.assert_close(kl_k3(torch.zeros_like(d), d), expected)


def test_kl_k3_keeps_the_digits_of_a_small_difference():
    k3 = kl_k3(torch.zeros(1), torch.tensor([1e-4]))
    torch.testing.assert_close(k3, torch.tensor([0.5e-8]), rtol=0.01, atol=0.0)  # d^2 / 2


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "expected"),
    [  # one unit; -min(w A, clip(w) A)
        (math.log(1.05), 2.0, -2.10),
        (math.log(1.20), 2.0, -2.16),  # clipped at 1.08
        (math.log(1.20), -2.0, 2.40),  # above the band, but the minimum is the unclipped side
        (math.log(0.50), 2.0, -1.00),
        (math.log(0.50), -2.0, 1.88),  # clipped at 0.94
    ],
)
@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_surrogate_literals(log_ratio, advantage, expected, reduction):
    logp_BT = torch.tensor([[log_ratio - 1.0, log_ratio - 2.0]], dtype=torch.float64)
    old_BT = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    advantage_BK = torch.tensor([[advantage]], dtype=torch.float64)
    loss, _ = rank_grpo_loss(logp_BT, old_BT, torch.zeros(1, 2, dtype=torch.int64), advantage_BK, reduction=reduction)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_reductions_weigh_ranks_and_tokens():
    """Ranks of 1 and 3 tokens, on-policy. By rank each has half; by token a quarter and three quarters."""
    rank_BT, advantage_BK = torch.tensor([[0, 1, 1, 1]]), torch.tensor([[4.0, 12.0]])
    expected = {"rank": ([-2.0, -2.0, -2.0, -2.0], -8.0), "token": ([-1.0, -3.0, -3.0, -3.0], -10.0)}
    for reduction, (gradient, value) in expected.items():
        logp_BT = torch.full((1, 4), -1.0, requires_grad=True)
        loss, _ = rank_grpo_loss(logp_BT, None, rank_BT, advantage_BK, reduction=reduction)
        loss.backward()
        assert loss.item() == value
        torch.testing.assert_close(logp_BT.grad, torch.tensor([gradient]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("denominator", [None, 37.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_loss_and_metrics_agree_with_a_loop(reduction, kl_coef, denominator, weighted, seed):
    logp_BT, old_BT, ref_BT, advantage_BK, weight_BK = make_batch(seed)
    options = {"kl_coef": kl_coef, "reduction": reduction, "denominator": denominator}
    weight_BK = weight_BK if weighted else None
    loss, metrics = rank_grpo_loss(
        logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, weight_BK=weight_BK, **CLIP, **options
    )
    lists = [x.tolist() for x in (logp_BT, old_BT, RANK_BT, advantage_BK)]
    expected, policy, kl, num_units, ratios, num_low, num_high = loop_loss(
        *lists, ref=ref_BT.tolist(), weight=weight_BK.tolist() if weighted else None, **options
    )
    assert num_units == 7
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "loss/policy": policy,
            "loss/kl": kl,
            "ratio/mean": ratios / num_units,
            "ratio/clip_low_frac": num_low / num_units,
            "ratio/clip_high_frac": num_high / num_units,
            "ratio/num_units": num_units,
        },
        rel=1e-12,
    )


def test_seeds_reach_both_sides_of_the_clip():
    """Without this the oracle test could agree on batches that never clip."""
    fractions = []
    for seed in range(3):
        logp_BT, old_BT, _, advantage_BK, _ = make_batch(seed)
        metrics = rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK, **CLIP)[1]
        fractions.append([metrics["ratio/clip_low_frac"].item(), metrics["ratio/clip_high_frac"].item()])
    assert all(max(side) > 0 for side in zip(*fractions, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_gradcheck(reduction, kl_coef, weighted, seed):
    logp_BT, old_BT, ref_BT, advantage_BK, weight_BK = make_batch(seed)

    def loss_of(logp_BT):
        return rank_grpo_loss(
            logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, kl_coef=kl_coef, reduction=reduction,
            weight_BK=weight_BK if weighted else None,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss_of, logp_BT.requires_grad_())


def test_gradcheck_of_the_parts():
    logp_BT, old_BT, ref_BT, _, _ = make_batch()
    logp_BT.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rank_log_ratio(x, old_BT, RANK_BT, NUM_RANKS), logp_BT)
    assert torch.autograd.gradcheck(lambda x: kl_k3(x, ref_BT), logp_BT)


def gradient_of(logp_BT, *args, **options):
    logp_BT = logp_BT.detach().clone().requires_grad_()
    rank_grpo_loss(logp_BT, *args, **options)[0].backward()
    return logp_BT.grad


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_on_policy_has_ratio_one_and_the_gradient_at_equal_log_probs(reduction):
    logp_BT, _, _, advantage_BK, _ = make_batch(dtype=torch.float32)
    metrics = rank_grpo_loss(logp_BT, None, RANK_BT, advantage_BK, reduction=reduction)[1]
    same = rank_grpo_loss(logp_BT, logp_BT.clone(), RANK_BT, advantage_BK, reduction=reduction)[1]
    assert metrics["ratio/mean"].item() == same["ratio/mean"].item() == 1.0
    gradients_BT = [
        gradient_of(logp_BT, old_BT, RANK_BT, advantage_BK, reduction=reduction) for old_BT in (None, logp_BT.clone())
    ]
    torch.testing.assert_close(gradients_BT[0], gradients_BT[1], rtol=0, atol=0)
    assert gradients_BT[0].abs().sum() > 0


def test_token_reduction_at_one_update_is_token_level_grpo_with_rank_advantages():
    logp_BT, _, _, advantage_BK, _ = make_batch()
    gradient_BT = gradient_of(logp_BT, None, RANK_BT, advantage_BK, reduction="token")
    takes_part_BT = (RANK_BT >= 0) & (RANK_BT < NUM_RANKS)
    advantage_BT = advantage_BK.gather(1, RANK_BT.clamp(0, NUM_RANKS - 1))
    expected_BT = torch.where(takes_part_BT, -advantage_BT / takes_part_BT.sum(), 0.0)
    torch.testing.assert_close(gradient_BT, expected_BT)


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_zero_advantage_gives_zero_gradient(reduction):
    logp_BT, old_BT, _, advantage_BK, _ = make_batch()
    gradient_BT = gradient_of(logp_BT, old_BT, RANK_BT, torch.zeros_like(advantage_BK), reduction=reduction)
    assert torch.equal(gradient_BT, torch.zeros_like(gradient_BT))


def test_gradient_reaches_only_the_policy():
    logp_BT, old_BT, ref_BT, advantage_BK, weight_BK = (x.requires_grad_() for x in make_batch())
    loss, metrics = rank_grpo_loss(
        logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, kl_coef=0.3, weight_BK=weight_BK
    )
    loss.backward()
    assert logp_BT.grad is not None
    assert [x.grad for x in (old_BT, ref_BT, advantage_BK, weight_BK)] == [None] * 4
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_tokens_outside_the_ranks_have_no_gradient(reduction):
    logp_BT, old_BT, ref_BT, advantage_BK, _ = make_batch()
    options = {"ref_logp_BT": ref_BT, "kl_coef": 0.3, "reduction": reduction}
    gradient_BT = gradient_of(logp_BT, old_BT, RANK_BT, advantage_BK, **options)
    outside_BT = (RANK_BT < 0) | (RANK_BT >= NUM_RANKS)
    assert torch.equal(gradient_BT != 0, ~outside_BT)


def test_reference_without_coefficient_is_only_measured():
    logp_BT, old_BT, ref_BT, advantage_BK, _ = make_batch()
    plain, _ = rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK)
    ref_BT[0, 0] = -torch.inf
    loss, metrics = rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT)
    assert torch.equal(loss, plain)
    assert metrics["loss/kl"].isnan()


# ----------------------------------------------------------------------------------------------------------------------
# Invariances


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_padding_changes_nothing(reduction):
    logp_BT, old_BT, ref_BT, advantage_BK, _ = make_batch()
    garbage_B5 = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 0.0], dtype=torch.float64).expand(4, 5)
    rank_B5 = torch.tensor([-1, -1, NUM_RANKS, 10**9, -1]).expand(4, 5)
    padded = [torch.cat([x, garbage_B5], dim=1) for x in (logp_BT, old_BT, ref_BT)]
    padded_rank = torch.cat([RANK_BT, rank_B5], dim=1)
    options = {"kl_coef": 0.3, "reduction": reduction}
    whole = rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, **options)
    again = rank_grpo_loss(padded[0], padded[1], padded_rank, advantage_BK, ref_logp_BT=padded[2], **options)
    torch.testing.assert_close(again, whole, rtol=1e-14, atol=0)
    gradient_BT = gradient_of(padded[0], padded[1], padded_rank, advantage_BK, ref_logp_BT=padded[2], **options)
    expected_BT = gradient_of(logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, **options)
    torch.testing.assert_close(gradient_BT, torch.nn.functional.pad(expected_BT, (0, 5)), rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_order_of_lists_and_of_tokens_changes_nothing(reduction):
    batch = make_batch()
    order_B, order_T = torch.tensor([2, 0, 3, 1]), torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = [x[order_B] if x.shape[1] == NUM_RANKS else x[order_B][:, order_T] for x in batch]
    rank_BT = RANK_BT[order_B][:, order_T]
    results = [
        rank_grpo_loss(logp, old, rank, advantage, ref_logp_BT=ref, kl_coef=0.3, weight_BK=weight, reduction=reduction)
        for (logp, old, ref, advantage, weight), rank in ((batch, RANK_BT), (shuffled, rank_BT))
    ]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("reduction", "denominator"), [("rank", 16), ("token", 15)])
def test_micro_batches_add_up_to_the_whole(reduction, denominator, as_tensor):
    logp_BT, old_BT, ref_BT, advantage_BK, _ = make_batch()
    options = {"kl_coef": 0.3, "reduction": reduction}
    whole, whole_metrics = rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, **options)
    gradient_BT = gradient_of(logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, **options)
    options["denominator"] = torch.tensor(denominator) if as_tensor else denominator
    logp_BT.requires_grad_()
    losses, parts = [], []
    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        loss, metrics = rank_grpo_loss(
            logp_BT[rows], old_BT[rows], RANK_BT[rows], advantage_BK[rows], ref_logp_BT=ref_BT[rows], **options
        )
        loss.backward()
        losses.append(loss)
        parts.append(metrics)
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(logp_BT.grad, gradient_BT)
    torch.testing.assert_close(merge_metrics(parts), whole_metrics)


@pytest.mark.parametrize(("reduction", "expected"), [("rank", -(2.0 + 3.0) / 2), ("token", -2.0)])
def test_missing_rank_counts_only_by_rank(reduction, expected):
    logp_BT = torch.full((1, 2), -1.0)
    loss, metrics = rank_grpo_loss(
        logp_BT, None, torch.tensor([[0, 0]]), torch.tensor([[2.0, 3.0]]), reduction=reduction
    )
    assert loss.item() == expected
    assert metrics["ratio/num_units"].item() == 1


@pytest.mark.parametrize("reduction", ["rank", "token"])
@pytest.mark.parametrize("num_lists", [0, 2])
def test_a_batch_without_tokens_gives_a_zero_to_differentiate(reduction, num_lists):
    logp_BT = torch.zeros(num_lists, 3, requires_grad=True)
    rank_BT = torch.full((num_lists, 3), -1)
    loss, metrics = rank_grpo_loss(logp_BT, None, rank_BT, torch.zeros(num_lists, NUM_RANKS), reduction=reduction)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logp_BT.grad, torch.zeros(num_lists, 3))
    assert all(value.item() == 0.0 for value in metrics.values())


# ----------------------------------------------------------------------------------------------------------------------
# Extremes


@pytest.mark.parametrize("reduction", ["rank", "token"])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("log_ratio", [1e3, -1e3, 1e30, -1e30])
def test_huge_log_ratios_stay_finite(log_ratio, advantage, reduction):
    logp_BT = torch.tensor([[log_ratio, -1.0]], requires_grad=True)
    old_BT = torch.tensor([[0.0, -1.0]])
    loss, metrics = rank_grpo_loss(
        logp_BT, old_BT, torch.tensor([[0, 1]]), torch.tensor([[advantage, 1.0]]), ref_logp_BT=old_BT, kl_coef=0.1,
        reduction=reduction,
    )  # fmt: skip
    loss.backward()
    assert loss.isfinite() and logp_BT.grad.isfinite().all()
    assert logp_BT.grad[0, 1] == -0.5
    assert all(value.isfinite() for value in metrics.values())


def test_the_bound_on_log_ratios_is_far_outside_the_band():
    logp_BT = torch.tensor([[MAX_LOG_RATIO - 1.0]], dtype=torch.float64)
    loss, _ = rank_grpo_loss(logp_BT, torch.zeros(1, 1).double(), torch.tensor([[0]]), -torch.ones(1, 1).double())
    assert loss.item() == pytest.approx(math.exp(MAX_LOG_RATIO - 1.0))


@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("where", ["logp", "old", "both", "ref"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_log_prob_that_is_not_finite_makes_the_loss_nan(value, where, advantage):
    logp_BT, old_BT, ref_BT, _, _ = make_batch(dtype=torch.float32)
    for name, tensor in (("logp", logp_BT), ("old", old_BT), ("ref", ref_BT)):
        if where == name or (where == "both" and name != "ref"):
            tensor[0, 4] = value
    options = {"ref_logp_BT": ref_BT, "kl_coef": 0.1} if where == "ref" else {}
    advantage_BK = torch.full((4, NUM_RANKS), advantage)
    for reduction in ("rank", "token"):
        assert rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK, reduction=reduction, **options)[0].isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_on_policy_does_not_hide_a_log_prob_that_is_not_finite(value):
    logp_BT = torch.tensor([[value, -1.0]])
    assert rank_grpo_loss(logp_BT, None, torch.tensor([[0, 0]]), torch.ones(1, 1))[0].isnan()


def test_dtypes_pass_through():
    for dtype in (torch.float32, torch.float64):
        logp_BT, old_BT, ref_BT, advantage_BK, _ = make_batch(dtype=dtype)
        loss, metrics = rank_grpo_loss(logp_BT, old_BT, RANK_BT.int(), advantage_BK, ref_logp_BT=ref_BT, kl_coef=0.1)
        assert {loss.dtype, *(value.dtype for value in metrics.values())} == {dtype}


@pytest.mark.parametrize("reduction", ["rank", "token"])
def test_nothing_waits_for_the_device(reduction):
    """A meta tensor has no values, so reading one on the host, or making a helper tensor on the CPU, raises."""
    logp_BT, old_BT, ref_BT, advantage_BK, weight_BK = (x.to("meta") for x in make_batch())
    for denominator in (None, torch.tensor(3.0, device="meta")):
        loss, metrics = rank_grpo_loss(
            logp_BT.requires_grad_(),
            old_BT,
            RANK_BT.to("meta"),
            advantage_BK,
            ref_logp_BT=ref_BT,
            kl_coef=0.1,
            reduction=reduction,
            denominator=denominator,
            weight_BK=weight_BK,
        )
        loss.backward()
        assert {value.device.type for value in (loss, logp_BT.grad, *merge_metrics([metrics]).values())} == {"meta"}


# ----------------------------------------------------------------------------------------------------------------------
# The caller's mistakes, and the fused kernel's entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logp_BT": torch.zeros(8)}, "must have shape"),
        ({"logp_BT": torch.zeros(4, 8, dtype=torch.bfloat16)}, "float32 or float64, got torch.bfloat16"),
        ({"old_logp_BT": torch.zeros(4, 7)}, r"old_logp_BT must be \(B, T\) = \(4, 8\), got \(4, 7\)"),
        ({"rank_BT": RANK_BT[:, :7]}, "rank_BT"),
        ({"rank_BT": RANK_BT.double()}, "integers"),
        ({"ref_logp_BT": torch.zeros(4, 8, 1)}, "ref_logp_BT"),
        ({"advantage_BK": torch.zeros(3, NUM_RANKS)}, "B = 4"),
        ({"advantage_BK": torch.zeros(4, NUM_RANKS, dtype=torch.int64)}, "floating point"),
        ({"weight_BK": torch.ones(4, 1)}, "weight_BK"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_low": 1.1}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_coef": 0.1, "ref_logp_BT": None}, "needs ref_logp_BT"),
        ({"reduction": "mean"}, "'rank' or 'token', got 'mean'"),
        ({"impl": "cuda"}, "'torch' or 'triton', got 'cuda'"),
        ({"denominator": 0}, "denominator must be > 0"),
        ({"denominator": torch.ones(2)}, "0-dim"),
    ],
)
def test_mistakes_are_named(change, message):
    logp_BT, old_BT, ref_BT, advantage_BK, _ = make_batch()
    arguments = {"logp_BT": logp_BT, "old_logp_BT": old_BT, "rank_BT": RANK_BT, "advantage_BK": advantage_BK}
    with pytest.raises(ValueError, match=message):
        rank_grpo_loss(**(arguments | {"ref_logp_BT": ref_BT} | change))


def test_merging_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        merge_metrics([])


def test_triton_receives_every_argument(monkeypatch):
    def fused_rank_grpo_loss(*args, **kwargs):
        return args, kwargs

    package, module = types.ModuleType("rankgrpo_kernels"), types.ModuleType("rankgrpo_kernels.rank_ratio")
    module.fused_rank_grpo_loss = fused_rank_grpo_loss
    monkeypatch.setitem(sys.modules, "rankgrpo_kernels", package)
    monkeypatch.setitem(sys.modules, "rankgrpo_kernels.rank_ratio", module)
    logp_BT, old_BT, ref_BT, advantage_BK, weight_BK = make_batch()
    options = {"clip_low": 0.1, "clip_high": 0.2, "ref_logp_BT": ref_BT, "kl_coef": 0.3, "reduction": "token"}
    options |= {"denominator": 5, "weight_BK": weight_BK}
    args, kwargs = rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK, **options, impl="triton")
    assert [id(x) for x in args] == [id(x) for x in (logp_BT, old_BT, RANK_BT, advantage_BK)]
    assert kwargs == options


def test_triton_without_the_kernels_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "rankgrpo_kernels.rank_ratio", None)  # as if it could not be imported
    logp_BT, old_BT, _, advantage_BK, _ = make_batch()
    with pytest.raises(ImportError):
        rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK, impl="triton")
