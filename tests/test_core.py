"""The loss and its units without their checks: traced, compiled, and on packed lists."""

import pytest
import torch
from test_loss import NUM_RANKS, RANK_BT, make_batch
from test_units import RANK_BT as LISTS_BT
from test_units import K, eos_mask

from rankgrpo.loss import rank_grpo_loss, unchecked_rank_grpo_loss
from rankgrpo.units import make_units, unchecked_make_units

# Shape letters: B lists, T tokens, K ranks, M tokens of all lists.

OPTIONS = [{}, {"kl_coef": 0.1}, {"reduction": "token"}, {"kl_coef": 0.1, "weighted": True, "denominator": 7.0}]


def run(function, batch, *, weighted=False, kl_coef=0.0, **options):
    """Loss, gradient and metrics."""
    logp_BT, old_BT, ref_BT, advantage_BK, weight_BK = batch
    logp_BT = logp_BT.clone().requires_grad_()
    options |= {"weight_BK": weight_BK} if weighted else {}
    loss, metrics = function(logp_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, kl_coef=kl_coef, **options)
    loss.backward()
    return [loss.detach(), logp_BT.grad, *metrics.values()]


def same(left, right):
    return all(a.equal(b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_whole_and_bitwise_the_checked_function(options):
    batch = make_batch(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(unchecked_rank_grpo_loss, fullgraph=True, backend="aot_eager")
    assert same(run(compiled, batch, **options), run(rank_grpo_loss, batch, **options))


@pytest.mark.slow
def test_inductor_has_the_same_numbers():
    batch = make_batch(dtype=torch.float32)
    compiled = torch.compile(unchecked_rank_grpo_loss, fullgraph=True)
    for found, expected in zip(run(compiled, batch, kl_coef=0.1), run(rank_grpo_loss, batch, kl_coef=0.1), strict=True):
        torch.testing.assert_close(found, expected)


def test_traced_by_fx_for_other_values_than_it_was_traced_with():
    def loss_of(logp_BT, old_BT, rank_BT, advantage_BK):
        return unchecked_rank_grpo_loss(logp_BT, old_BT, rank_BT, advantage_BK)[0]

    traced = torch.fx.symbolic_trace(loss_of)
    for seed in range(2):
        logp_BT, old_BT, _, advantage_BK, _ = make_batch(seed)
        expected = rank_grpo_loss(logp_BT, old_BT, RANK_BT, advantage_BK)[0]
        assert traced(logp_BT, old_BT, RANK_BT, advantage_BK).equal(expected)


def units_of(rank_BT, eos_BT, advantage_BK):
    units = unchecked_make_units(rank_BT, eos_BT, advantage_BK, num_ranks=K, unit_cap=2)
    return units.unit_BT, units.advantage_BU, units.weight_BU


def test_units_are_traced_and_compiled():
    advantage_BK = make_batch()[3][:1, :K].repeat(7, 1)
    units = make_units(LISTS_BT, eos_mask(), advantage_BK, num_ranks=K)  # the longest list has two items too many
    expected = (units.unit_BT, units.advantage_BU, units.weight_BU)
    assert same(torch.fx.symbolic_trace(units_of)(LISTS_BT, eos_mask(), advantage_BK), expected)
    compiled = torch.compile(units_of, fullgraph=True, backend="aot_eager")
    assert same(compiled(LISTS_BT, eos_mask(), advantage_BK), expected)


def test_nothing_is_read_from_the_device():
    """Tensors on the meta device have no values: whatever looks at one raises."""
    logp_BT, old_BT, ref_BT, advantage_BK, _ = (x.to("meta") for x in make_batch(dtype=torch.float32))
    loss, _ = rank_grpo_loss(
        logp_BT.requires_grad_(), old_BT, RANK_BT.to("meta"), advantage_BK, ref_logp_BT=ref_BT, kl_coef=0.1
    )
    loss.backward()
    units = make_units(
        LISTS_BT.to("meta"), eos_mask().to("meta"), torch.zeros(7, K).to("meta"), num_ranks=K, unit_cap=2
    )
    assert units.advantage_BU.shape == (7, K + 2)


# ----------------------------------------------------------------------------------------------------------------------
# Packed lists


def pack(before=0, after=0):
    """The lists of RANK_BT end to end, without padding, between tokens of no list."""
    mask_BT = torch.tensor([[1] * 8, [1] * 7 + [0], [1] * 2 + [0] * 6, [0] * 8], dtype=torch.bool)
    lengths = mask_BT.sum(1)
    cu_seqlens = before + torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    def of(value_BT, fill=0.0):
        return torch.cat([value_BT.new_full((before,), fill), value_BT[mask_BT], value_BT.new_full((after,), fill)])

    return mask_BT, cu_seqlens, of


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1}, {"reduction": "token"}, {"on_policy": True}])
@pytest.mark.parametrize("around", [(0, 0), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_lists_have_the_loss_and_gradient_of_padded_ones(options, around, dtype):
    options = dict(options)
    logp_BT, old_BT, ref_BT, advantage_BK, weight_BK = make_batch()
    old_BT = None if options.pop("on_policy", False) else old_BT
    mask_BT, cu_seqlens, of = pack(*around)
    shared = options | {"weight_BK": weight_BK}
    padded_BT = logp_BT.clone().requires_grad_()
    expected, metrics = rank_grpo_loss(padded_BT, old_BT, RANK_BT, advantage_BK, ref_logp_BT=ref_BT, **shared)
    expected.backward()
    logp_M = of(logp_BT, torch.nan).requires_grad_()
    old_M = None if old_BT is None else of(old_BT, torch.nan)
    loss, found = rank_grpo_loss(
        logp_M, old_M, of(RANK_BT, 1), advantage_BK, ref_logp_BT=of(ref_BT), cu_seqlens=cu_seqlens.to(dtype), **shared
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logp_M.grad, of(padded_BT.grad))
    assert found.keys() == metrics.keys()
    for name in metrics:
        torch.testing.assert_close(found[name], metrics[name])


def test_packed_by_hand():
    # Lists of 3 and 1 tokens, two ranks: ratios e^.04 (of .06 and .02), 1 and e^-.05, 1 (no token).
    logp_M, old_M = torch.tensor([-1.0, -1.0, -1.0, -1.05]), torch.tensor([-1.06, -1.02, -1.0, -1.0])
    advantage_BK = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    loss, _ = rank_grpo_loss(
        logp_M, old_M, torch.tensor([0, 0, 1, 0]), advantage_BK, cu_seqlens=torch.tensor([0, 3, 4]), denominator=1
    )
    assert loss.item() == pytest.approx(-(1.04081077 - 2.0 + 3 * 0.95122942), rel=1e-6)


def test_packed_input_that_does_not_fit_is_refused():
    logp_M, rank_M = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    advantage_BK, cu = torch.zeros(2, NUM_RANKS), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match=r"with cu_seqlens, logp must have shape \(M,\)"):
        rank_grpo_loss(logp_M[None], None, rank_M[None], advantage_BK, cu_seqlens=cu)
    with pytest.raises(ValueError, match="cu_seqlens must be int32 or int64"):
        rank_grpo_loss(logp_M, None, rank_M, advantage_BK, cu_seqlens=cu.float())
    with pytest.raises(ValueError, match=r"advantage_BK must be \(B, K\) with B = 1"):
        rank_grpo_loss(logp_M, None, rank_M, advantage_BK, cu_seqlens=cu[:2])
    with pytest.raises(ValueError, match=r"rank_BT must be \(M,\) = \(4,\)"):
        rank_grpo_loss(logp_M, None, rank_M[:3], advantage_BK, cu_seqlens=cu)
    with pytest.raises(ValueError, match="impl='triton' takes"):
        rank_grpo_loss(logp_M, None, rank_M, advantage_BK, cu_seqlens=cu, impl="triton")
