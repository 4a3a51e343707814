import numpy as np
import pytest
import torch

from rankgrpo.distill import remap
from rankgrpo.distill.adjust import Candidates, candidate_likelihood, catalog_likelihood, fit_bias
from rankgrpo.distill.remap import HeldScores

NUM_SAMPLES, NUM_ITEMS = 12, 6


def world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = HeldScores(torch.randn(NUM_SAMPLES, NUM_ITEMS, generator=generator))
    groundtruth = [torch.randperm(NUM_ITEMS, generator=generator)[: n % 4].tolist() for n in range(NUM_SAMPLES)]
    candidates = [torch.randperm(NUM_ITEMS, generator=generator)[: 3 + n % 3].tolist() for n in range(NUM_SAMPLES)]
    return scores, groundtruth, candidates


def likelihoods(scale=1.0):
    scores, groundtruth, candidates = world()
    samples = range(1, NUM_SAMPLES)
    few = Candidates.gather(scores, groundtruth, range(NUM_SAMPLES), candidates)
    return {
        "catalog": (catalog_likelihood(scores, groundtruth, samples, scale=scale), [range(NUM_ITEMS)] * NUM_SAMPLES),
        "candidates": (candidate_likelihood(few, samples, scale=scale), candidates),
    }


def oracle(weight_N, bias_N, allowed, scale):
    """Eq. 13 without its penalties, one ground-truth item at a time."""
    scores, groundtruth, _ = world()
    total = 0.0
    for sample in range(1, NUM_SAMPLES):
        items = list(allowed[sample])
        logits = {item: weight_N[item] * scale * float(scores.scores_SN[sample, item]) + bias_N[item] for item in items}
        for right in groundtruth[sample]:
            if right in logits:
                total -= logits[right] - np.log(sum(np.exp(logit) for logit in logits.values()))
    return total


def some_point():
    generator = np.random.default_rng(3)
    return 1 + generator.normal(size=NUM_ITEMS), generator.normal(size=NUM_ITEMS)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("over", ["catalog", "candidates"])
def test_the_likelihood_is_equation_13(over, scale):
    likelihood, allowed = likelihoods(scale)[over]
    weight_N, bias_N = some_point()
    total, *_ = likelihood(torch.from_numpy(weight_N), torch.from_numpy(bias_N))
    assert total == pytest.approx(oracle(weight_N, bias_N, allowed, scale), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("over", ["catalog", "candidates"])
def test_the_gradient_is_that_of_finite_differences(over, scale):
    likelihood, allowed = likelihoods(scale)[over]
    point = np.concatenate(some_point())
    _, *gradients = likelihood(*map(torch.from_numpy, np.split(point, 2)))
    step = 1e-5
    slopes = [
        (oracle(*np.split(point + d, 2), allowed, scale) - oracle(*np.split(point - d, 2), allowed, scale)) / (2 * step)
        for d in step * np.eye(len(point))
    ]
    np.testing.assert_allclose(torch.cat(gradients), slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("over", ["catalog", "candidates"])
def test_the_fit_is_a_minimum_and_the_same_every_time(over):
    (likelihood, allowed), again = likelihoods()[over], likelihoods()[over][0]
    bias = fit_bias(likelihood, NUM_ITEMS, l2_weight=0.3, l2_bias=0.2)

    def objective(weight_N, bias_N):
        return oracle(weight_N, bias_N, allowed, 1.0) + 0.3 * ((weight_N - 1) ** 2).sum() + 0.2 * (bias_N**2).sum()

    weight_N, bias_N = bias.weight_N.double().numpy(), bias.bias_N.double().numpy()
    lowest = objective(weight_N, bias_N)
    assert lowest < objective(np.ones(NUM_ITEMS), np.zeros(NUM_ITEMS)) - 0.1
    for direction in np.random.default_rng(0).normal(size=(40, 2, NUM_ITEMS)):
        assert objective(weight_N + 0.03 * direction[0], bias_N + 0.03 * direction[1]) > lowest
    second = fit_bias(again, NUM_ITEMS, l2_weight=0.3, l2_bias=0.2)
    assert torch.equal(bias.weight_N, second.weight_N) and torch.equal(bias.bias_N, second.bias_N)


def test_blocks_sum_to_the_whole(monkeypatch):
    scores, groundtruth, _ = world()
    point = [torch.from_numpy(values) for values in some_point()]
    whole = catalog_likelihood(scores, groundtruth, range(NUM_SAMPLES))(*point)
    monkeypatch.setattr(remap, "BLOCK_SCORES", 2 * NUM_ITEMS)
    parts = catalog_likelihood(scores, groundtruth, range(NUM_SAMPLES))(*point)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for part, value in zip(parts[1:], whole[1:], strict=True):
        torch.testing.assert_close(part, value, rtol=1e-5, atol=1e-5)


def test_strong_penalties_change_nothing():
    likelihood, _ = likelihoods()["catalog"]
    bias = fit_bias(likelihood, NUM_ITEMS, l2_weight=1e9, l2_bias=1e9)
    torch.testing.assert_close(bias.weight_N, torch.ones(NUM_ITEMS))
    torch.testing.assert_close(bias.bias_N, torch.zeros(NUM_ITEMS), atol=1e-6, rtol=0)


def test_an_item_that_is_always_right_gains():
    scores = HeldScores(torch.zeros(4, 3))
    bias = fit_bias(catalog_likelihood(scores, [[2]] * 4, range(4)), 3, l2_bias=0.01)
    assert bias.bias_N.argmax() == 2 and bias.bias_N[2] > 1
    assert bias.weight_N.tolist() == [1.0, 1.0, 1.0]  # scores of 0 say nothing about w


def test_impossible_penalties_are_refused():
    with pytest.raises(ValueError, match="must be positive, got 0 and 1"):
        fit_bias(likelihoods()["catalog"][0], NUM_ITEMS, l2_weight=0, l2_bias=1)
