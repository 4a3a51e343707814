import math

import pytest
import torch

from rankgrpo.loss import rank_grpo_loss
from rankgrpo.units import Units, live_lengths, make_units, take_lists

# Shape letters: B lists, T tokens, K ranks, U units.

K = 3
RANK_BT = torch.tensor(
    [
        [0, 0, 1, 1, 2, 2, 2, 2],  # full, EOS
        [0, 0, 0, 1, 1, 1, -1, -1],  # early EOS after 2 items
        [0, 1, 2, 3, 3, 4, 4, 4],  # 2 overflow items, EOS
        [0, 0, 1, 1, 1, -1, -1, -1],  # cut off in the second item
        [0, -1, -1, -1, -1, -1, -1, -1],  # EOS at once
        [0, 0, 2, 2, -1, -1, -1, -1],  # a token crossed a line break: rank 1 has no token of its own; full, EOS
        [-1, -1, -1, -1, -1, -1, -1, -1],  # nothing
    ]
)
EOS_B = [7, 5, 7, None, 0, 3, None]


def eos_mask():
    eos_BT = torch.zeros(RANK_BT.shape, dtype=torch.bool)
    for b, t in enumerate(EOS_B):
        if t is not None:
            eos_BT[b, t] = True
    return eos_BT


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    old_BT = -draw(7, 8).abs() - 0.5
    return old_BT + 0.1 * draw(7, 8), old_BT, old_BT + 0.3 * draw(7, 8), draw(7, K)


def units_loss(logp_BT, old_BT, units, **options):
    return rank_grpo_loss(
        logp_BT, old_BT, units.unit_BT, units.advantage_BU, weight_BK=units.weight_BU,
        **{"denominator": units.denominator} | options,
    )[0]  # fmt: skip


def clipped_term(log_ratios, advantage):
    ratio = math.exp(sum(log_ratios) / len(log_ratios))
    return min(ratio * advantage, min(max(ratio, 0.94), 1.08) * advantage)


# ----------------------------------------------------------------------------------------------------------------------
# Rank units


def test_rank_units_literal():
    advantage_BK = torch.arange(21, dtype=torch.float64).reshape(7, K)
    units = make_units(RANK_BT, eos_mask(), advantage_BK, num_ranks=K, overflow_penalty=-0.2, early_eos_penalty=-0.5)
    assert units.unit_BT.tolist() == [
        [0, 0, 1, 1, 2, 2, 2, 2],
        [0, 0, 0, 1, 1, 3, -1, -1],
        [0, 1, 2, 3, 3, 4, 4, 4],
        [0, 0, 1, 1, 1, -1, -1, -1],
        [3, -1, -1, -1, -1, -1, -1, -1],
        [0, 0, 2, 2, -1, -1, -1, -1],
        [-1] * 8,
    ]
    assert units.advantage_BU[:, :K].equal(advantage_BK)
    assert units.advantage_BU[:, K:].tolist() == [[0, 0], [-0.5, 0], [-0.2, -0.2], [0, 0], [-0.5, 0], [0, 0], [0, 0]]
    assert units.weight_BU.equal(torch.ones(7, K + 2, dtype=torch.float64))
    assert units.denominator == 7 * K


def test_zero_early_penalty_leaves_eos_in_the_last_item():
    units = make_units(RANK_BT, eos_mask(), torch.ones(7, K), num_ranks=K, early_eos_penalty=0.0)
    assert units.unit_BT.equal(RANK_BT)
    assert units.advantage_BU[:, K:].tolist() == [
        [0, 0], [0, 0], [pytest.approx(-0.1)] * 2, [0, 0], [0, 0], [0, 0], [0, 0]
    ]  # fmt: skip


def test_full_list_bonus_is_a_unit_of_its_own_and_only_for_exactly_full_lists():
    units = make_units(RANK_BT, eos_mask(), torch.zeros(7, K), num_ranks=K, full_list_bonus=0.1)
    assert units.unit_BT[0].tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert units.unit_BT[5].tolist() == [0, 0, 2, 3, -1, -1, -1, -1]
    assert units.advantage_BU[:, K].tolist() == pytest.approx([0.1, -0.1, -0.1, 0.0, -0.1, 0.1, 0.0])


def test_eos_alone_on_a_line_that_a_crossing_token_opened_ends_a_full_list():
    rank_BT, eos_BT = torch.tensor([[0, 1, 2]]), torch.tensor([[False, False, True]])
    units = make_units(rank_BT, eos_BT, torch.zeros(1, K), num_ranks=K)
    assert units.unit_BT.equal(rank_BT)
    assert units.advantage_BU.equal(torch.zeros(1, K + 1))


def test_lone_eos_is_early_even_for_one_rank():
    units = make_units(torch.tensor([[0]]), torch.tensor([[True]]), torch.zeros(1, 1), num_ranks=1)
    assert (units.unit_BT.item(), units.advantage_BU[0, 1].item()) == (1, pytest.approx(-0.1))


def test_masked_eos_does_not_count():
    rank_BT, eos_BT = torch.tensor([[0, 0, -1]]), torch.tensor([[False, False, True]])
    units = make_units(rank_BT, eos_BT, torch.zeros(1, K), num_ranks=K)
    assert units.unit_BT.equal(rank_BT)
    assert units.advantage_BU.equal(torch.zeros(1, K + 1))


def test_unit_cap_bounds_the_extra_units():
    capped = make_units(RANK_BT, eos_mask(), torch.zeros(7, K), num_ranks=K, unit_cap=1)
    assert capped.advantage_BU.shape == (7, K + 1)
    assert capped.unit_BT[2].tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    wide = make_units(RANK_BT, eos_mask(), torch.zeros(7, K), num_ranks=K, unit_cap=5)
    exact = make_units(RANK_BT, eos_mask(), torch.zeros(7, K), num_ranks=K)
    assert wide.unit_BT.equal(exact.unit_BT)
    assert wide.advantage_BU.equal(torch.nn.functional.pad(exact.advantage_BU, (0, 3)))
    logp_BT, old_BT, _, _ = make_batch()
    torch.testing.assert_close(units_loss(logp_BT, old_BT, wide), units_loss(logp_BT, old_BT, exact))


def test_units_read_only_their_own_list():
    advantage_BK = make_batch()[3]
    whole = make_units(RANK_BT, eos_mask(), advantage_BK, num_ranks=K, unit_cap=2)
    for b in range(7):
        alone = make_units(RANK_BT[b : b + 1], eos_mask()[b : b + 1], advantage_BK[b : b + 1], num_ranks=K, unit_cap=2)
        assert alone.unit_BT.equal(whole.unit_BT[b : b + 1])
        assert alone.advantage_BU.equal(whole.advantage_BU[b : b + 1])


def test_eos_penalty_does_not_leak_into_the_title():
    """An item of 7 title tokens and EOS, advantage 1. Sharing a ratio would give every token (7 * 1 + penalty) / 8."""
    rank_BT = torch.zeros(1, 8, dtype=torch.int64)
    eos_BT = torch.arange(8)[None] == 7
    gradients = {}
    for penalty in (-0.1, -1.0):
        logp_BT = torch.full((1, 8), -1.0, requires_grad=True)
        units = make_units(rank_BT, eos_BT, torch.tensor([[1.0, 0.0]]), num_ranks=2, early_eos_penalty=penalty)
        units_loss(logp_BT, None, units, denominator=1).backward()
        gradients[penalty] = logp_BT.grad[0].tolist()
        assert gradients[penalty][7] == pytest.approx(-penalty)
    assert gradients[-0.1][:7] == gradients[-1.0][:7] == pytest.approx([-1 / 7] * 7)


def test_overflow_penalty_moves_every_overflow_item_alone():
    gradients = []
    for penalty in (-0.1, -0.7):
        logp_BT = torch.zeros(1, 8, requires_grad=True)
        units = make_units(RANK_BT[2:3], eos_mask()[2:3], torch.ones(1, K), num_ranks=K, overflow_penalty=penalty)
        units_loss(logp_BT, None, units, denominator=1).backward()
        gradients.append(logp_BT.grad[0].tolist())
    assert gradients[0] == pytest.approx([-1, -1, -1, 0.05, 0.05, 0.1 / 3, 0.1 / 3, 0.1 / 3])
    assert gradients[1] == pytest.approx([-1, -1, -1, 0.35, 0.35, 0.7 / 3, 0.7 / 3, 0.7 / 3])


# ----------------------------------------------------------------------------------------------------------------------
# One loss, three methods: against the formulas of the papers, in loops


def rank_grpo_by_hand(logp, old, advantage, overflow, early):
    """Mean over B*K ranks; overflow items and an early EOS as further terms, not in the count."""
    total = 0.0
    for b, ranks in enumerate(RANK_BT.tolist()):
        tokens_of = {}
        eos = EOS_B[b]
        num_items = 0 if eos == 0 else max(ranks) + 1
        for t, rank in enumerate(ranks):
            is_early_eos = t == eos and num_items < K
            key = "eos" if is_early_eos else rank
            if rank >= 0:
                tokens_of.setdefault(key, []).append(logp[b][t] - old[b][t])
        for rank in range(K):
            total += clipped_term(tokens_of.pop(rank, [0.0]), advantage[b][rank])
        for key, log_ratios in tokens_of.items():
            total += clipped_term(log_ratios, early if key == "eos" else overflow)
    return -total / (len(logp) * K)


def test_rank_units_are_rank_grpo():
    logp_BT, old_BT, _, advantage_BK = make_batch()
    units = make_units(RANK_BT, eos_mask(), advantage_BK, num_ranks=K, overflow_penalty=-0.3, early_eos_penalty=-0.6)
    expected = rank_grpo_by_hand(logp_BT.tolist(), old_BT.tolist(), advantage_BK.tolist(), -0.3, -0.6)
    assert units_loss(logp_BT, old_BT, units).item() == pytest.approx(expected, rel=1e-12)


def test_token_units_are_grpo():
    logp_BT, old_BT, _, advantage_BK = make_batch()
    units = make_units(RANK_BT, eos_mask(), advantage_BK[:, :1], unit="token", num_ranks=K)
    total = 0.0
    for b, ranks in enumerate(RANK_BT.tolist()):
        tokens = [t for t, rank in enumerate(ranks) if rank >= 0]
        terms = [clipped_term([(logp_BT - old_BT)[b, t].item()], advantage_BK[b, 0].item()) for t in tokens]
        total += sum(terms) / max(len(tokens), 1)
    assert units_loss(logp_BT, old_BT, units).item() == pytest.approx(-total / 7, rel=1e-12)
    assert units.denominator == 7


def test_tokens_of_a_batch_can_count_the_same():
    """DAPO: the mean over the tokens of all lists. A long list then weighs more than a short one."""
    logp_BT, old_BT, _, advantage_BK = make_batch()
    units = make_units(RANK_BT, eos_mask(), advantage_BK[:, :1], unit="token", num_ranks=K, mean_by_list=False)
    tokens = [(b, t) for b, ranks in enumerate(RANK_BT.tolist()) for t, rank in enumerate(ranks) if rank >= 0]
    terms = [clipped_term([(logp_BT - old_BT)[b, t].item()], advantage_BK[b, 0].item()) for b, t in tokens]
    assert units.denominator == len(tokens) == 32
    assert units_loss(logp_BT, old_BT, units).item() == pytest.approx(-sum(terms) / 32, rel=1e-12)


def test_list_units_are_gspo():
    logp_BT, old_BT, _, advantage_BK = make_batch()
    units = make_units(RANK_BT, eos_mask(), advantage_BK[:, :1], unit="list", num_ranks=K)
    total = 0.0
    for b, ranks in enumerate(RANK_BT.tolist()):
        log_ratios = [(logp_BT - old_BT)[b, t].item() for t, rank in enumerate(ranks) if rank >= 0]
        total += clipped_term(log_ratios or [0.0], advantage_BK[b, 0].item())
    assert units_loss(logp_BT, old_BT, units).item() == pytest.approx(-total / 7, rel=1e-12)
    assert units.unit_BT.equal(RANK_BT.clamp(max=0))


def test_token_units_with_rank_advantages_are_the_released_gradient():
    """At one update a batch the token mean cannot tell ranks with their tokens from tokens with their rank's advantage.

    Penalties included; but a penalised EOS keeps to itself either way.
    """
    logp_BT, _, _, advantage_BK = make_batch()
    gradients = []
    for unit in ("rank", "token"):
        units = make_units(RANK_BT, eos_mask(), advantage_BK, unit=unit, num_ranks=K, full_list_bonus=0.1)
        leaf_BT = logp_BT.clone().requires_grad_()
        loss, _ = rank_grpo_loss(leaf_BT, None, units.unit_BT, units.advantage_BU, reduction="token")
        loss.backward()
        gradients.append(leaf_BT.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0][2, 3].item() == pytest.approx(0.1 / 32)  # overflow token, one of 32 tokens
    assert gradients[0][1, 5].item() == pytest.approx(0.1 / 32)  # early EOS
    assert gradients[0][0, 7].item() == pytest.approx(-0.1 / 32)  # EOS of a full list


# ----------------------------------------------------------------------------------------------------------------------
# Every unit


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["rank", "token"])
@pytest.mark.parametrize(("unit", "columns"), [("rank", K), ("token", 1), ("token", K), ("list", 1)])
def test_gradcheck(unit, columns, reduction, kl_coef):
    logp_BT, old_BT, ref_BT, advantage_BK = make_batch()
    units = make_units(RANK_BT, eos_mask(), advantage_BK[:, :columns], unit=unit, num_ranks=K, full_list_bonus=0.1)
    options = {"ref_logp_BT": ref_BT, "kl_coef": kl_coef, "reduction": reduction}
    assert torch.autograd.gradcheck(lambda x: units_loss(x, old_BT, units, **options), logp_BT.requires_grad_())


@pytest.mark.parametrize(("unit", "columns"), [("rank", K), ("token", 1), ("token", K), ("list", 1)])
def test_padding_and_micro_batches_change_nothing(unit, columns):
    logp_BT, old_BT, ref_BT, advantage_BK = make_batch()
    advantage_BK = advantage_BK[:, :columns]

    def loss_of(rows, width, denominator):
        pad = lambda x, value: torch.nn.functional.pad(x[rows], (0, width), value=value)  # noqa: E731
        units = make_units(pad(RANK_BT, -1), pad(eos_mask(), False), advantage_BK[rows], unit=unit, num_ranks=K)
        shares.append(units.denominator)
        options = {"ref_logp_BT": pad(ref_BT, 9.0), "kl_coef": 0.3, "denominator": denominator or units.denominator}
        return units_loss(pad(logp_BT, torch.nan), pad(old_BT, 3.0), units, **options)

    shares = []
    whole = loss_of(slice(None), 0, None)
    torch.testing.assert_close(loss_of(slice(None), 4, None), whole)
    total, shares = shares[0], []
    parts = [loss_of(slice(start, start + 3), 2, total) for start in (0, 3, 6)]
    torch.testing.assert_close(sum(parts), whole)
    assert sum(shares) == total


@pytest.mark.parametrize(("unit", "columns"), [("rank", K), ("token", 1), ("token", K), ("list", 1)])
def test_nothing_waits_for_the_device_when_the_units_are_capped(unit, columns):
    """A meta tensor has no values, so reading one on the host, or making a helper tensor on the CPU, raises."""
    rank_BT, eos_BT, advantage_BK = (x.to("meta") for x in (RANK_BT, eos_mask(), torch.zeros(7, columns)))
    units = make_units(rank_BT, eos_BT, advantage_BK, unit=unit, num_ranks=K, unit_cap=4)
    assert {x.device.type for x in (units.unit_BT, units.advantage_BU, units.weight_BU)} == {"meta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "item"}, "'rank', 'token' or 'list', got 'item'"),
        ({"num_ranks": 0}, "num_ranks"),
        ({"unit_cap": 0}, "unit_cap"),
        ({"rank_BT": RANK_BT.double()}, "integer"),
        ({"rank_BT": RANK_BT[:, :0]}, "not empty"),
        ({"eos_BT": torch.zeros(7, 8)}, "bool"),
        ({"advantage_BK": torch.zeros(7, 1)}, r"unit='rank' must be \(7, 3\), got \(7, 1\)"),
        ({"advantage_BK": torch.zeros(7, 2), "unit": "token"}, r"\(7, 1\) or \(7, 3\), got \(7, 2\)"),
        ({"unit": "list"}, r"unit='list' must be \(7, 1\), got \(7, 3\)"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"rank_BT": RANK_BT, "eos_BT": eos_mask(), "advantage_BK": torch.zeros(7, K), "num_ranks": K}
    with pytest.raises(ValueError, match=message):
        make_units(**(arguments | change))


def test_live_lengths_end_with_the_last_token_of_a_unit_that_moves():
    unit_BT = torch.tensor([[0, 0, 1, 1, 2, -1], [0, 1, -1, 1, 2, 2], [0, 1, 2, 2, -1, -1], [-1, -1, -1, -1, -1, -1]])
    advantage_BU = torch.tensor([[0.5, -0.5, 0.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    weight_BU = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    assert live_lengths(Units(unit_BT, advantage_BU, weight_BU, 9)).tolist() == [4, 4, 0, 0]


def test_taken_lists_are_cut_each_to_its_length():
    unit_BT = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [0, 1, 1, 2]])
    numbers_BU = torch.arange(12.0).view(3, 4)
    taken = take_lists(Units(unit_BT, numbers_BU, numbers_BU + 1, 9), [2, 0], [2, 3], at_least=2)
    assert taken.unit_BT.tolist() == [[0, 1, -1], [0, 0, 1]] and taken.denominator == 9
    assert taken.advantage_BU.tolist() == [[8, 9, 10], [0, 1, 2]]
    assert taken.weight_BU.tolist() == [[9, 10, 11], [1, 2, 3]]
