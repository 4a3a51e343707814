"""The fused head in Triton's interpreter: same code as on a GPU, tiny shapes. tests/gpu has the real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
import triton  # noqa: E402

if not triton.knobs.runtime.interpret:
    reason = "triton was imported without TRITON_INTERPRET=1; run `make test`, or this file alone"
    pytest.skip(reason, allow_module_level=True)

import rankgrpo_kernels.linear_logprob as op  # noqa: E402
from rankgrpo_kernels.linear_logprob import fused_token_logprobs  # noqa: E402

# The interpreter's arithmetic on masked lanes (0 * -inf, log 0) is thrown away, but numpy warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# N, V, D: one of each; below a tile; past one tile of rows, two of ids, a step of D; whole tiles.
SHAPES = [(1, 1, 16), (5, 100, 32), (150, 700, 80), (128, 512, 64)]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def narrow_slices(monkeypatch):
    """Several slices of the vocabulary, so that the backward pass goes through its loop."""
    monkeypatch.setattr(op, "DELTA_BYTES", 1)
    monkeypatch.setattr(op, "MIN_SLICE", 256)


def make_case(num_rows, num_ids, num_hidden, dtype=torch.float32, *, masked=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, num_hidden, generator=random).to(dtype)
    weight = (0.5 * torch.randn(num_ids, num_hidden, generator=random)).to(dtype)
    ids = torch.randint(0, num_ids, (num_rows,), generator=random)
    allowed = None
    if masked:
        allowed = torch.rand(num_ids, generator=random) < 0.7
        allowed[ids] = True
    grad = torch.randn(num_rows, generator=random)
    grad[torch.rand(num_rows, generator=random) < 0.5] = 0
    return hidden, weight, ids, allowed, grad


def plain(hidden, weight, ids, allowed, temperature):
    """Full logits, PyTorch's own log-softmax."""
    logits = hidden @ weight.t() / temperature
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def fused(hidden, weight, ids, allowed, temperature):
    return fused_token_logprobs(hidden, weight, ids, allowed_V=allowed, temperature=temperature)


def run(function, hidden, weight, ids, allowed, grad, temperature=1.0):
    """Log-probs, and the gradients of sum(grad * log-probs)."""
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    logp = function(hidden, weight, ids, allowed, temperature)
    grads = torch.autograd.grad(logp, (hidden, weight), grad.to(logp.dtype))
    return logp.detach(), *grads


def exact(hidden, weight, ids, allowed, grad, temperature=1.0):
    return run(plain, hidden.double(), weight.double(), ids, allowed, grad, temperature)


def assert_as_exact_as_torch(ours, plain, exact, last_place):
    """In norm, within twice PyTorch's own error, which can be zero by chance: hence a unit in the last place."""
    for x, y, z in zip(ours, plain, exact, strict=True):
        error, plain_error = ((value.double() - z).norm() for value in (x, y))
        assert error <= 2 * plain_error + last_place * z.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_agrees_with_full_logits(shape, masked, temperature):
    case = make_case(*shape, masked=masked)
    results = [run(function, *case, temperature) for function in (fused, plain)]
    assert_as_exact_as_torch(*results, exact(*case, temperature), last_place=2**-23)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_soft_cap_agrees_with_full_capped_logits(shape, masked):
    case = make_case(*shape, masked=masked)

    def capped(hidden, weight, ids, allowed, temperature):
        logits = 1.5 * torch.tanh(hidden @ weight.t() / 1.5) / temperature
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def ours(hidden, weight, ids, allowed, temperature):
        return fused_token_logprobs(hidden, weight, ids, allowed_V=allowed, temperature=temperature, soft_cap=1.5)

    truth = run(capped, *(x.double() for x in case[:2]), *case[2:], 0.7)
    # tanh out of a sigmoid is exact to a unit of 1, not of its own.
    assert_as_exact_as_torch(run(ours, *case, 0.7), run(capped, *case, 0.7), truth, last_place=2**-20)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_inputs_with_float32_logits(shape, masked):
    case = make_case(*shape, torch.bfloat16, masked=masked)
    ours, truth = run(fused, *case), exact(*case)
    up = run(plain, *(x.float() for x in case[:2]), *case[2:])
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    assert_as_exact_as_torch(ours[:1], up[:1], truth[:1], last_place=2**-23)
    assert_as_exact_as_torch(ours[1:], run(plain, *case)[1:], truth[1:], last_place=2**-8)


def test_log_probs_of_large_logits_keep_their_digits():
    """Logits around 58 without an error of their own (one product with 1); the likeliest one is the target."""
    hidden, weight, _, _, _ = make_case(40, 600, 16)
    hidden, weight = torch.eye(16)[torch.arange(40) % 16], 58 + 8 * weight
    likely = (hidden @ weight.t()).argmax(1)
    truth = plain(hidden.double(), weight.double(), likely, None, 1.0)
    assert (fused_token_logprobs(hidden, weight, likely) - truth).abs().max() <= 2**-22 * truth.abs().max()


def test_mixed_types_multiply_in_the_wider_one_and_autocast_decides():
    hidden, weight, ids, _, grad = make_case(20, 300, 32)
    mixed = run(fused, hidden.bfloat16(), weight, ids, None, grad)
    wide = run(fused, hidden.bfloat16().float(), weight, ids, None, grad)
    assert torch.equal(mixed[0], wide[0]) and mixed[1].dtype == torch.bfloat16 and mixed[2].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(fused, hidden, weight, ids, None, grad)
    half = run(fused, hidden.bfloat16(), weight.bfloat16(), ids, None, grad)
    assert torch.equal(cast[0], half[0]) and cast[2].dtype == torch.float32
    torch.testing.assert_close(cast[2].bfloat16(), half[2], rtol=2**-7, atol=1e-6)


def test_results_are_bitwise_repeatable():
    case = make_case(150, 700, 80, torch.bfloat16, masked=True)
    assert all(torch.equal(a, b) for a, b in zip(run(fused, *case), run(fused, *case), strict=True))


def test_rows_without_gradient_cost_nothing(monkeypatch):
    seen = []
    backward = op._backward

    def counting(hidden_LD, *args):
        seen.append(len(hidden_LD))
        return backward(hidden_LD, *args)

    monkeypatch.setattr(op, "_backward", counting)
    hidden, weight, ids, allowed, grad = make_case(60, 300, 32)
    _, grad_hidden, grad_weight = run(fused, hidden, weight, ids, allowed, grad)
    assert seen == [int((grad != 0).sum())]
    assert (grad_hidden[grad == 0] == 0).all() and (grad_hidden[grad != 0] != 0).any(1).all()
    _, grad_hidden, grad_weight = run(fused, hidden, weight, ids, allowed, torch.zeros(60))
    assert len(seen) == 1 and not grad_hidden.any() and not grad_weight.any()
    run(fused, hidden, weight, ids, allowed, torch.ones(60))
    assert seen[1:] == [60]


def test_tokens_by_vocabulary_is_never_held():
    class Largest(TorchDispatchMode):
        num_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes = [x.nbytes for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.num_bytes = max([self.num_bytes, *sizes])
            return out

    hidden, weight, ids, _, _ = make_case(150, 2000, 16)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with Largest() as largest:
        fused_token_logprobs(hidden, weight, ids).sum().backward()
    assert largest.num_bytes == max(weight.nbytes, 4 * 150 * 256) < 4 * 150 * 2000


def test_only_the_gradients_asked_for():
    hidden, weight, ids, _, grad = make_case(20, 300, 32)
    whole = run(fused, hidden, weight, ids, None, grad)
    for i, inputs in enumerate([(hidden.requires_grad_(), weight), (hidden.detach(), weight.requires_grad_())]):
        logp = fused_token_logprobs(*inputs, ids)
        only = torch.autograd.grad(logp, inputs[i], grad)[0]
        assert torch.equal(only, whole[1 + i])
    assert not fused_token_logprobs(hidden.detach(), weight.detach(), ids).requires_grad


def test_tied_embeddings_get_both_gradients():
    _, weight, ids, _, grad = make_case(20, 300, 32)
    weight.requires_grad_()
    tied = fused_token_logprobs(torch.nn.functional.embedding(ids, weight).tanh(), weight, ids.flip(0))
    exact_weight = weight.detach().double().requires_grad_()
    truth = plain(torch.nn.functional.embedding(ids, exact_weight).tanh(), exact_weight, ids.flip(0), None, 1.0)
    ours, expected = (
        torch.autograd.grad(x, w, grad.to(x.dtype))[0] for x, w in ((tied, weight), (truth, exact_weight))
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


def test_ids_outside_the_vocabulary_and_ids_not_allowed():
    hidden, weight, ids, _, _ = make_case(4, 300, 16)
    ids[:3] = torch.tensor([-1, 300, 2**31 + 5])
    allowed = torch.ones(300, dtype=torch.bool)
    allowed[ids[3]] = False
    logp = fused_token_logprobs(hidden, weight, ids, allowed_V=allowed)
    assert logp[:3].isnan().all() and logp[3] == -torch.inf


def test_a_part_of_the_vocabulary_with_nothing_allowed():
    hidden, weight, ids, _, grad = make_case(10, 1100, 32)
    ids = ids % 7 + 600
    allowed = torch.zeros(1100, dtype=torch.bool)
    allowed[600:607] = True
    ours, expected = run(fused, hidden, weight, ids, allowed, grad), exact(hidden, weight, ids, allowed, grad)
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_hidden_that_is_not_finite_shows():
    hidden, weight, ids, _, _ = make_case(3, 100, 16)
    hidden[1, 3] = torch.nan
    logp = fused_token_logprobs(hidden, weight, ids)
    assert logp[1].isnan() and logp[[0, 2]].isfinite().all()


def test_no_rows():
    logp = fused_token_logprobs(torch.zeros(0, 16), torch.zeros(9, 16), torch.zeros(0, dtype=torch.int64))
    assert logp.shape == (0,)


def test_strided_hidden_states():
    hidden, weight, ids, _, grad = make_case(20, 300, 32)
    expected = run(fused, hidden, weight, ids, None, grad)
    wide = torch.randn(20, 50)
    wide[:, 5:37] = hidden
    for strided in (wide[:, 5:37], hidden.t().contiguous().t()):
        ours = run(fused, strided, weight, ids, None, grad)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_it_is_public_through_logprob():
    from rankgrpo.logprob import token_logprobs

    hidden, weight, ids, allowed, _ = make_case(20, 300, 32, masked=True)
    ours = token_logprobs(hidden, weight, ids, impl="triton", temperature=0.7, allowed_V=allowed)
    assert torch.equal(ours, fused_token_logprobs(hidden, weight, ids, temperature=0.7, allowed_V=allowed))


def test_where_it_cannot_run_it_says_so(monkeypatch):
    monkeypatch.setattr(op, "INTERPRETED", False)
    hidden, weight, ids, _, _ = make_case(5, 100, 16)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu: use impl='torch'"):
        fused_token_logprobs(hidden, weight, ids)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_ND": torch.zeros(4, 15)}, r"hidden_ND and weight_VD must be \(N, D\) and \(V, D\)"),
        ({"hidden_ND": torch.zeros(4)}, r"got \(4,\) and \(9, 16\)"),
        ({"weight_VD": torch.zeros(0, 16)}, "V > 0"),
        ({"hidden_ND": torch.zeros(4, 16, dtype=torch.float64)}, "must be float32 or bfloat16"),
        ({"weight_VD": torch.zeros(9, 16, dtype=torch.float16)}, "must be float32 or bfloat16"),
        ({"weight_VD": torch.zeros(9, 16, device="meta")}, "weight_VD must be on cpu like hidden_ND, got meta"),
        ({"ids_N": torch.zeros(3, dtype=torch.int64)}, r"ids_N must be integer \(4,\)"),
        ({"ids_N": torch.zeros(4)}, r"got torch.float32 \(4,\)"),
        ({"allowed_V": torch.ones(9)}, r"allowed_V must be bool \(9,\)"),
        ({"allowed_V": torch.ones(8, dtype=torch.bool)}, r"got torch.bool \(8,\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "hidden_ND": torch.zeros(4, 16),
        "weight_VD": torch.zeros(9, 16),
        "ids_N": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        fused_token_logprobs(**arguments | change)


@pytest.mark.parametrize("num_row_blocks, num_tiles", [(1, 1), (15, 594), (64, 594), (140, 594), (256, 594), (3, 7)])
def test_parts_cover_the_vocabulary_and_keep_the_multiprocessors_busy(num_row_blocks, num_tiles):
    parts = op.num_parts(num_row_blocks, num_tiles, 132)
    tiles = triton.cdiv(num_tiles, parts)
    assert parts * tiles >= num_tiles > (parts - 1) * tiles  # all tiles, and no part without one
    makespan = triton.cdiv(num_row_blocks * parts, 132) * tiles
    if num_row_blocks * num_tiles > 2000:
        assert num_row_blocks * num_tiles / (132 * makespan) > 0.9


@pytest.mark.parametrize("num_rows", [1, 1840, 100_000])
def test_slices_are_whole_tiles_within_the_memory_limit(num_rows):
    op.MIN_SLICE, op.DELTA_BYTES = 4096, 48 * 2**20
    width = op.slice_width(num_rows, 151_936, 2, 256)
    assert width == 151_936 or width % 256 == 0
    assert width <= 4096 or width * num_rows * 2 <= 48 * 2**20


def test_the_kernels_compile_for_hopper_and_use_its_tensor_cores(tmp_path):
    script = Path(__file__).parent / "gpu" / "compile_for_hopper.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, script, "linear_logprob"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum("wgmma" in line for line in lines) == 4 and len(lines) == 8  # bfloat16 does, exact float32 cannot


@pytest.mark.slow
def test_the_benchmark_runs_on_a_cpu_and_leaves_a_record(tmp_path):
    script, out = Path(__file__).parents[1] / "kernels" / "bench" / "linear_logprob.py", tmp_path / "record.json"
    options = ["--device", "cpu", "--budget", "0.01", "--out", out]
    shape = ["--tokens", "8", "--vocabulary", "64", "--hidden", "16", "--live", "0.5"]
    done = subprocess.run([sys.executable, script, *options, *shape], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out: triton (it needs a GPU" in done.stdout
    record = json.loads(out.read_text())
    assert {"op", "machine", "versions", "commit", "command", "rows"} <= record.keys()
    assert record["op"] == "linear_logprob" and all(row["median_ms"] > 0 for row in record["rows"])
    asked = subprocess.run([sys.executable, script, "--providers", "triton", *options], capture_output=True, text=True)
    assert asked.returncode == 1 and "triton cannot run: it needs a GPU" in asked.stderr
