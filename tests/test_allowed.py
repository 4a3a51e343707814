"""The head over allowed ids against a masked softmax over the whole vocabulary, and where its gradient goes."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from rankgrpo.items.allowed_ids import AllowedIds, Block, Ragged
from rankgrpo.logprob import exact_product
from rankgrpo.model import allowed
from rankgrpo.model.allowed import allowed_logprobs, allowed_logprobs_and_entropy

# Shape letters: N tokens, V vocabulary, D hidden.

V, D = 60, 8
ROOT = list(range(3, 40, 2))


def make_plan():
    """12 tokens: five at a root (two with closed ids), four with ids of their own, three forced; and their masks."""
    row, target = [0, 3, 4, 7, 11], [0, 5, 2, 18, 7]
    closed_row, closed = [1, 3, 3], [4, 0, 6]
    own = {1: ([2, 9], 9), 5: ([0, 1, 2, 59], 59), 6: ([9, 2], 2), 10: ([5, 7, 11, 30, 58], 11)}
    ids_U = sorted(set(ROOT).union(*(ids for ids, _ in own.values())))
    place = {token_id: u for u, token_id in enumerate(ids_U)}
    entries = [(r, place[i]) for r, (ids, _) in enumerate(own.values()) for i in ids]
    begin = 0
    targets = []
    for ids, taken in own.values():
        targets.append(begin + ids.index(taken))
        begin += len(ids)
    block = Block(*map(torch.tensor, (row, [place[i] for i in ROOT], target, closed_row, closed)))
    ragged = Ragged(*map(torch.tensor, (list(own), [e[0] for e in entries], [e[1] for e in entries], targets)))
    plan = AllowedIds(12, torch.tensor(ids_U), (block,), ragged)

    mask_NV, ids_N = torch.zeros(12, V, dtype=torch.bool), torch.zeros(12, dtype=torch.int64)
    for n, place_of in zip(row, target, strict=True):
        mask_NV[n, ROOT] = True
        ids_N[n] = ROOT[place_of]
    for r, c in zip(closed_row, closed, strict=True):
        mask_NV[row[r], ROOT[c]] = False
    for n, (ids, taken) in own.items():
        mask_NV[n, ids] = True
        ids_N[n] = taken
    for n, token_id in ((2, 17), (8, 0), (9, 59)):
        mask_NV[n, token_id] = True
        ids_N[n] = token_id
    return plan, mask_NV, ids_N


def masked_softmax(hidden_ND, weight_VD, mask_NV, ids_N, temperature=1.0):
    logits_NV = (hidden_ND @ weight_VD.t() / temperature).masked_fill(~mask_NV, -torch.inf)
    return logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]


def make_inputs(dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(12, D, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VD = nn.Parameter(torch.randn(V, D, generator=random, dtype=torch.float64).to(dtype))
    return hidden_ND, weight_VD, torch.randn(12, generator=random, dtype=torch.float64).to(dtype)


def expected_gradients(grad_N, hidden_ND, weight_VD, temperature=1.0):
    _, mask_NV, ids_N = make_plan()
    hidden, weight = hidden_ND.detach().double().requires_grad_(), weight_VD.detach().double().requires_grad_()
    logp_N = masked_softmax(hidden, weight, mask_NV, ids_N, temperature)
    return logp_N.detach(), *torch.autograd.grad(logp_N, (hidden, weight), grad_N.double())


@pytest.mark.parametrize("live", [[], [0], [1, 10], [0, 3, 5, 6, 9], [4, 5, 7, 11]])
def test_tokens_without_a_gradient_from_above_cost_none(live, monkeypatch):
    plan, _, _ = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs()
    dead = torch.ones(12, dtype=torch.bool)
    dead[live] = False
    grad_N[dead] = 0.0
    _, expected_hidden, expected_weight = expected_gradients(grad_N, hidden_ND, weight_VD)
    logp_N = allowed_logprobs(hidden_ND, weight_VD, plan)
    rows, product = [], exact_product

    def counted(a, b, exact):
        rows.append(len(a))
        return product(a, b, exact)

    monkeypatch.setattr(allowed, "exact_product", counted)
    logp_N.backward(grad_N)
    assert rows[0] == len(set(live) & {0, 3, 4, 7, 11})  # of the block
    torch.testing.assert_close(hidden_ND.grad.double(), expected_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight_VD.grad.double(), expected_weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_a_masked_softmax_forward_and_backward(dtype, tolerance, temperature):
    plan, mask_NV, ids_N = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs(dtype)
    logp_N = allowed_logprobs(hidden_ND, weight_VD, plan, temperature=temperature)
    logp_N.backward(grad_N)
    expected, grad_hidden, grad_weight = expected_gradients(grad_N, hidden_ND, weight_VD, temperature)
    assert logp_N.dtype == dtype
    torch.testing.assert_close(logp_N.double(), expected, rtol=tolerance, atol=tolerance)
    for got, want in ((hidden_ND.grad, grad_hidden), (weight_VD.grad, grad_weight)):
        assert (got.double() - want).norm() <= tolerance * want.norm()


def test_entropy_is_that_of_the_masked_softmax():
    plan, mask_NV, ids_N = make_plan()
    hidden_ND, weight_VD, _ = make_inputs(torch.float64)
    logp_N, entropy_N = allowed_logprobs_and_entropy(hidden_ND, weight_VD, plan, temperature=0.7)
    share_NV = (hidden_ND @ weight_VD.t() / 0.7).masked_fill(~mask_NV, -torch.inf).softmax(-1)
    torch.testing.assert_close(entropy_N, torch.special.entr(share_NV).sum(-1).detach())
    torch.testing.assert_close(logp_N, allowed_logprobs(hidden_ND, weight_VD, plan, temperature=0.7))
    assert not entropy_N.requires_grad


def test_forced_tokens_are_exactly_zero_and_not_read():
    plan, mask_NV, _ = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs()
    forced = mask_NV.sum(1) == 1
    with torch.no_grad():
        hidden_ND[forced] = torch.nan
    logp_N, entropy_N = allowed_logprobs_and_entropy(hidden_ND, weight_VD, plan)
    logp_N.backward(grad_N)
    assert (logp_N[forced] == 0).all() and (entropy_N[forced] == 0).all() and (hidden_ND.grad[forced] == 0).all()
    assert logp_N.isfinite().all() and weight_VD.grad.isfinite().all()


def test_gradient_of_the_weight_is_in_the_allowed_rows_alone():
    plan, mask_NV, _ = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs()
    allowed_logprobs(hidden_ND, weight_VD, plan).backward(grad_N)
    several = mask_NV[mask_NV.sum(1) > 1].any(0)
    assert torch.equal(weight_VD.grad.abs().sum(1) > 0, several)


def test_gradcheck():
    plan, _, _ = make_plan()
    hidden_ND, weight_VD, _ = make_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: allowed_logprobs(h, w, plan, temperature=1.3), (hidden_ND, weight_VD))


def test_hand_computed():
    # Logits 0, ln 2, ln 5 over ids 0, 1, 3: shares 1/8, 2/8, 5/8; id 2 would have dwarfed them.
    weight_VD = torch.tensor([1.0, 2.0, 1e9, 5.0])[:, None].log()
    plan = AllowedIds.from_lists([[0, 1, 3], [2], [3, 0]], [1, 2, 0])
    logp_N = allowed_logprobs(torch.ones(3, 1), weight_VD, plan)
    torch.testing.assert_close(logp_N.exp(), torch.tensor([2 / 8, 1.0, 1 / 6]))


def test_lists_make_the_same_plan():
    _, mask_NV, ids_N = make_plan()
    allowed = [mask.nonzero()[:, 0].tolist() for mask in mask_NV]
    plan = AllowedIds.from_lists(allowed, ids_N.tolist())
    hidden_ND, weight_VD, _ = make_inputs(torch.float64)
    expected = masked_softmax(hidden_ND, weight_VD, mask_NV, ids_N)
    torch.testing.assert_close(allowed_logprobs(hidden_ND, weight_VD, plan), expected)
    assert len(plan.blocks) > 0 and len(plan.ragged.row_R) > 0
    with pytest.raises(ValueError, match="token 1 is id 4"):
        AllowedIds.from_lists([[0, 1], [2, 3]], [1, 4])


@pytest.mark.parametrize("allowed, ids", [([[1], [2]], [1, 2]), ([], [])])
def test_nothing_to_choose(allowed, ids):
    hidden_ND, weight_VD = torch.randn(len(ids), D, requires_grad=True), nn.Parameter(torch.randn(V, D))
    logp_N = allowed_logprobs(hidden_ND, weight_VD, AllowedIds.from_lists(allowed, ids))
    logp_N.sum().backward()
    assert (logp_N == 0).all() and (hidden_ND.grad == 0).all() and (weight_VD.grad == 0).all()
    assert weight_VD.grad.layout == torch.strided


# ----------------------------------------------------------------------------------------------------------------------
# Where the weight's gradient goes


@pytest.fixture
def head():
    plan, *_ = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs()
    _, _, grad_weight = expected_gradients(grad_N, hidden_ND, weight_VD)
    return lambda weight: allowed_logprobs(hidden_ND, weight, plan), weight_VD, grad_N, grad_weight.float()


def assert_dense(actual, expected):
    assert actual.layout == torch.strided
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_parameter_without_a_gradient_gets_a_dense_one(head):
    run, weight, grad_N, expected = head
    run(weight).backward(grad_N)
    assert_dense(weight.grad, expected)
    assert not weight._post_accumulate_grad_hooks


def test_parameter_with_a_gradient_is_added_to_in_place(head):
    run, weight, grad_N, expected = head
    weight.grad = torch.ones_like(weight)
    before = weight.grad
    run(weight).backward(grad_N)
    assert weight.grad is before
    assert_dense(weight.grad, expected + 1)


def test_second_backward_accumulates(head):
    run, weight, grad_N, expected = head
    for _ in range(3):
        run(weight).backward(grad_N)
    assert_dense(weight.grad, 3 * expected)


def test_two_uses_in_one_backward(head):
    run, weight, grad_N, expected = head
    (run(weight) + run(weight)).backward(grad_N)
    assert_dense(weight.grad, 2 * expected)
    assert not weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("with_gradient", [False, True])
def test_tied_embedding(head, with_gradient):
    run, weight, grad_N, expected = head
    if with_gradient:
        weight.grad = torch.ones_like(weight)
    ids = torch.tensor([3, 3, 50])
    (run(weight) @ grad_N + nn.functional.embedding(ids, weight).sum()).backward()
    want = expected + with_gradient
    want[3] += 2
    want[50] += 1
    assert_dense(weight.grad, want)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_autograd_grad_returns_a_dense_gradient_and_stores_none(head, with_gradient):
    run, weight, grad_N, expected = head
    if with_gradient:
        weight.grad = torch.ones_like(weight)
    (got,) = torch.autograd.grad(run(weight), weight, grad_N)
    assert_dense(got, expected)
    assert weight.grad is None or (weight.grad == 1).all()
    assert not weight._post_accumulate_grad_hooks


def test_backward_for_other_inputs_leaves_the_weight_alone(head):
    run, weight, grad_N, _ = head
    other = torch.zeros((), requires_grad=True)
    (run(weight) @ grad_N + other).backward(inputs=[other])
    assert weight.grad is None and other.grad == 1 and not weight._post_accumulate_grad_hooks


def test_backward_naming_the_weight_stores_its_gradient(head):
    run, weight, grad_N, expected = head
    run(weight).backward(grad_N, inputs=[weight])
    assert_dense(weight.grad, expected)


def test_computed_weight(head):
    run, weight, grad_N, expected = head
    run(2 * weight / 2).backward(grad_N)
    assert_dense(weight.grad, expected)


def test_weight_with_hooks_sees_dense_gradients(head):
    run, weight, grad_N, expected = head
    layouts = []
    weight.register_hook(lambda grad: layouts.append(grad.layout))
    weight.register_post_accumulate_grad_hook(lambda leaf: layouts.append(leaf.grad.layout))
    run(weight).backward(grad_N)
    assert_dense(weight.grad, expected)
    assert layouts == [torch.strided] * 2


def test_activation_checkpointing(head):
    run, weight, grad_N, expected = head
    for reentrant in (False, True):
        weight.grad = None
        torch.utils.checkpoint.checkpoint(run, weight, use_reentrant=reentrant).backward(grad_N)
        assert_dense(weight.grad, expected)


def test_frozen_weight_and_frozen_hidden():
    plan, *_ = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs()
    _, grad_hidden, grad_weight = expected_gradients(grad_N, hidden_ND, weight_VD)
    allowed_logprobs(hidden_ND, weight_VD.detach(), plan).backward(grad_N)
    assert_dense(hidden_ND.grad, grad_hidden.float())
    allowed_logprobs(hidden_ND.detach(), weight_VD, plan).backward(grad_N)
    assert_dense(weight_VD.grad, grad_weight.float())
    with torch.no_grad():
        assert not allowed_logprobs(hidden_ND, weight_VD, plan).requires_grad


def test_training_with_tied_weights_equals_the_masked_softmax():
    plan, mask_NV, ids_N = make_plan()
    tokens, grad_N = torch.arange(12) * 4, make_inputs()[2]
    ours, theirs = nn.Embedding(V, D), None
    theirs = copy.deepcopy(ours)
    for step in range(3):
        for micro_batch in range(2):
            loss = allowed_logprobs(ours(tokens + micro_batch), ours.weight, plan) @ grad_N
            loss.backward()
            (masked_softmax(theirs(tokens + micro_batch), theirs.weight, mask_NV, ids_N) @ grad_N).backward()
        for model in (ours, theirs):
            with torch.no_grad():
                model.weight -= 0.1 * model.weight.grad
            model.weight.grad = None
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-5, atol=1e-5, msg=f"after step {step}")


# ----------------------------------------------------------------------------------------------------------------------
# Types, errors, imports


def test_bfloat16_products_lose_no_more_than_a_masked_softmax_in_bfloat16():
    plan, mask_NV, ids_N = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs()
    exact, *_ = expected_gradients(grad_N, hidden_ND, weight_VD)
    with torch.autocast("cpu", torch.bfloat16):
        logp_N = allowed_logprobs(hidden_ND, weight_VD, plan)
        logits_NV = (hidden_ND @ weight_VD.t()).float().masked_fill(~mask_NV, -torch.inf)
    rounded = logits_NV.log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    assert logp_N.dtype == torch.float32
    assert (logp_N - exact).abs().max() <= 2 * (rounded - exact).abs().max() + 1e-5
    logp_N.backward(grad_N)
    assert weight_VD.grad.dtype == hidden_ND.grad.dtype == torch.float32


@pytest.mark.parametrize("change, message", [
    ({"hidden_ND": torch.zeros(12, D + 1)}, "hidden"),
    ({"hidden_ND": torch.zeros(11, D)}, "one hidden row a token"),
    ({"weight_VD": torch.zeros(20, D)}, r"\[0, 20\)"),
    ({"temperature": 0.0}, "temperature"),
])  # fmt: skip
def test_errors(change, message):
    plan, *_ = make_plan()
    hidden_ND, weight_VD, _ = make_inputs()
    arguments = {"hidden_ND": hidden_ND, "weight_VD": weight_VD, "allowed": plan} | change
    with pytest.raises(ValueError, match=message):
        allowed_logprobs(**arguments)


def test_imports_torch_and_nothing_else_of_ours():
    code = (
        "import sys, rankgrpo.model.allowed; "
        "print(sorted(m for m in sys.modules if m.startswith(('rankgrpo.', 'transformers'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    own = ["items", "items.allowed_ids", "logprob", "loss", "model", "model.allowed"]
    assert done.stdout.strip() == str([f"rankgrpo.{name}" for name in own])


@pytest.mark.parametrize("num_dead", [0, 7])
def test_soft_cap_equals_a_masked_softmax_of_capped_logits(num_dead):
    plan, mask_NV, ids_N = make_plan()
    hidden_ND, weight_VD, grad_N = make_inputs(torch.float64)
    grad_N[:num_dead] = 0.0
    logp_N = allowed_logprobs(hidden_ND, weight_VD, plan, temperature=0.7, soft_cap=1.5)
    got = torch.autograd.grad(logp_N, (hidden_ND, weight_VD), grad_N)
    capped_NV = 1.5 * torch.tanh(hidden_ND @ weight_VD.t() / 1.5) / 0.7
    want_N = capped_NV.masked_fill(~mask_NV, -torch.inf).log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    torch.testing.assert_close(logp_N, want_N)
    for got_grad, want_grad in zip(got, torch.autograd.grad(want_N, (hidden_ND, weight_VD), grad_N), strict=True):
        torch.testing.assert_close(got_grad, want_grad)
