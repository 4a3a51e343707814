import math
from dataclasses import replace

import pytest
import torch

from rankgrpo.config import RlConfig
from rankgrpo.config_file import load_config
from rankgrpo.errors import ConfigError
from rankgrpo.loss import rank_grpo_loss
from rankgrpo.rollouts.mismatch import correct_units, describe_mismatch, mismatch_weight
from rankgrpo.runtime.means import Means
from rankgrpo.units import Units


def by_loop(logp_BT, sampler_logp_BT, unit_BT, num_units, kind, cap):
    """One unit after the other."""
    rows = []
    for logp, sampled, units in zip(logp_BT.tolist(), sampler_logp_BT.tolist(), unit_BT.tolist(), strict=True):
        row = []
        for unit in range(num_units):
            gaps = [a - b for a, b, u in zip(logp, sampled, units, strict=True) if u == unit]
            ratio = math.exp(sum(gaps) / len(gaps)) if gaps else 1.0
            row.append(min(ratio, cap) if kind == "truncate" else float(1 / cap <= ratio <= cap))
        rows.append(row)
    return torch.tensor(rows, dtype=logp_BT.dtype)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("cap", [1.0, 1.05, 2.0])
def test_weight_equals_a_loop(kind, cap):
    generator = torch.Generator().manual_seed(0)
    logp_BT = -torch.rand(6, 23, generator=generator, dtype=torch.float64)
    sampler_logp_BT = logp_BT + 0.3 * torch.randn(6, 23, generator=generator, dtype=torch.float64)
    unit_BT = torch.randint(-1, 7, (6, 23), generator=generator)  # unit 6 is beyond the five that count
    expected = by_loop(logp_BT, sampler_logp_BT, unit_BT, 5, kind, cap)
    weight = mismatch_weight(logp_BT, sampler_logp_BT, unit_BT, 5, kind=kind, cap=cap)
    torch.testing.assert_close(weight, expected)
    if cap == 1.05:
        assert 0 < (weight == (cap if kind == "truncate" else 0)).sum() < weight.numel()


def test_weight_by_hand():
    # Two tokens of rank 0 at ratios e^.2 and e^.4: geometric mean e^.3. Rank 1 at e^-.5. Rank 2 has no token.
    logp, sampled = torch.tensor([[-1.0, -1.0, -1.5]]), torch.tensor([[-1.2, -1.4, -1.0]])
    unit = torch.tensor([[0, 0, 1]])
    truncated = mismatch_weight(logp, sampled, unit, 3, kind="truncate", cap=1.1)
    torch.testing.assert_close(truncated, torch.tensor([[1.1, 0.60653066, 1.0]]))
    masked = mismatch_weight(logp, sampled, unit, 3, kind="mask", cap=1.5)
    assert masked.tolist() == [[1.0, 0.0, 1.0]]


def test_no_mismatch_means_no_correction():
    logp = -torch.rand(2, 5)
    unit = torch.tensor([[0, 0, 1, 1, -1], [0, 1, 1, 2, 2]])
    for kind in ("truncate", "mask"):
        assert mismatch_weight(logp, logp, unit, 3, kind=kind, cap=1.0).eq(1).all()


def test_weight_refuses_what_it_cannot_use():
    logp, unit = torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="cap must be at least 1, got 0.5"):
        mismatch_weight(logp, logp, unit, 1, kind="mask", cap=0.5)
    with pytest.raises(ValueError, match="got 'drop'"):
        mismatch_weight(logp, logp, unit, 1, kind="drop", cap=2.0)


def three_ranks():
    """A list of three ranks whose middle one the sampler thought less likely than the trainer does."""
    logp = torch.tensor([[-1.0, -1.0, -1.0, -1.0]], requires_grad=True)
    sampled = torch.tensor([[-1.0, -2.0, -2.0, -1.0]])
    units = Units(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1.0, 1.0, -1.0]]), torch.ones(1, 3), 3)
    return logp, sampled, units


def test_a_masked_rank_gets_no_gradient_and_the_others_keep_theirs():
    logp, sampled, units = three_ranks()
    means = Means()
    rl = RlConfig(mismatch_correction="mask", mismatch_cap=2.0)
    corrected = correct_units(units, logp.detach(), sampled, rl, means)

    def gradient(units):
        loss, _ = rank_grpo_loss(
            logp, None, units.unit_BT, units.advantage_BU, weight_BK=units.weight_BU, denominator=units.denominator
        )
        return torch.autograd.grad(loss, logp)[0]

    whole, masked = gradient(units), gradient(corrected)
    assert masked[0, 1] == masked[0, 2] == 0 and whole[0, 1] != 0
    assert masked[0, 0] == whole[0, 0] and masked[0, 3] == whole[0, 3]
    assert means.pairs == {"mismatch/corrected_frac": [1.0, 3.0]}


def test_truncation_scales_the_gradient_of_its_rank():
    logp, sampled, units = three_ranks()
    means = Means()
    corrected = correct_units(
        units, logp.detach(), sampled, RlConfig(mismatch_correction="truncate", mismatch_cap=1.5), means
    )
    assert corrected.weight_BU.tolist() == [[1.0, 1.5, 1.0]]
    assert means.pairs == {"mismatch/corrected_frac": [1.0, 3.0]}


def test_correction_is_off_by_default():
    logp, sampled, units = three_ranks()
    means = Means()
    assert correct_units(units, logp.detach(), sampled, RlConfig(), means) is units
    assert means.pairs == {}


def test_metrics_by_hand():
    logp, sampled, units = three_ranks()
    # Another list with one rank only: ratio e^.05, inside the band [.94, 1.08]; its other ranks have no token.
    logp = torch.cat([logp.detach(), torch.tensor([[-1.0, 0.0, 0.0, 0.0]])])
    sampled = torch.cat([sampled, torch.tensor([[-1.05, 0.0, 0.0, 0.0]])])
    unit = torch.cat([units.unit_BT, torch.tensor([[0, -1, -1, -1]])])
    units = replace(units, unit_BT=unit, advantage_BU=torch.ones(2, 3), weight_BU=torch.ones(2, 3))
    means = Means()
    gap = describe_mismatch(units, logp, sampled, unit >= 0, RlConfig(), means)
    assert gap == pytest.approx((2 + 2 * math.e + math.exp(0.05), 5))
    assert means.pairs["mismatch/abs_logp"] == pytest.approx([2.05, 5])
    assert means.pairs["mismatch/exp_abs_logp"] == pytest.approx([2 + 2 * math.e + math.exp(0.05), 5])
    assert means.pairs["mismatch/outside_clip_frac"] == [1, 4]


@pytest.mark.parametrize("word", ["rl.mismatch_alarm=1.0", "rl.mismatch_cap=0.9", "rl.vllm_memory=1.5", "rl.vllm_tp=0"])
def test_impossible_settings_are_refused(word):
    with pytest.raises(ConfigError, match=word.split("=")[0]):
        load_config(None, [word])
    with pytest.raises(ConfigError, match="rl.vllm_sleep must be one of 0, 1, 2"):
        load_config(None, ["rl.vllm_sleep=3"])
