"""Log-probabilities of given tokens straight from hidden states: head, log-softmax and gather as Triton kernels.

`fused_token_logprobs` computes what `rankgrpo.logprob.token_logprobs(impl="torch")` computes and is checked against it.
[tokens, vocabulary] is never held. Forward: tiles of hidden x weight feed an online log-sum-exp and pick the target's
logit, in one pass; a few numbers a row leave the chip. Backward: for one slice of the vocabulary after another a kernel
recomputes the logits and writes d loss / d logits, which two matrix products of the vendor's library turn into the
gradients. As a slice spans all rows, each row of the weight gradient is one product, accumulated in float32.

Rows whose upstream gradient is exactly zero are dropped before the backward pass (which waits for the device once, to
learn how many are left). Tile shapes depend on the dtype alone and nothing is added by atomics: on one machine equal
inputs give bitwise equal results. Float64 is the plain implementation's job.
"""

# Shape letters: N tokens, L of them with a gradient, V vocabulary, W slice of it, D hidden, S parts of the vocabulary.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

INTERPRETED: bool = triton.knobs.runtime.interpret  # read once, where triton.jit reads it
PRODUCT_DTYPES = (torch.float32, torch.bfloat16)
DELTA_BYTES = 48 * 2**20  # d loss / d logits of one slice
MIN_SLICE = 4096  # ... but no narrower than this: narrow slices make slow products

_INTERPRETED = tl.constexpr(INTERPRETED)


def fused_token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_N: Tensor,
    *,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    allowed_V: Tensor | None = None,
) -> Tensor:
    """log softmax(weight hidden / temperature) at ids, in nats.

    logp_n = z_n[ids_n] - log sum_v exp(z_n[v]),   z_n = weight hidden_n / temperature,   v over the allowed ids

    Args:
      hidden_ND, weight_VD: float32 or bfloat16, on one CUDA device. They are multiplied in the autocast type, else in
        the wider of the two; float32 products are exact float32, never TF32. Sums are float32.
      ids_N: integer. Their values are not looked at here, which would wait for the device: an id outside [0, V) has
        log-prob NaN, one that is not allowed -inf.
      soft_cap: c of logits that are c tanh(weight hidden / c) before they are divided by the temperature; None: no cap.
      allowed_V: bool; the softmax runs over the ids it allows.

    Returns: (N,) float32. Gradients, in the dtypes of their inputs, flow to hidden and weight; for tied embeddings
    autograd adds the latter to the embedding's.
    Raises ValueError for wrong shapes, dtypes, devices or temperature, and where the kernel cannot run: it needs
    tensors on a CUDA device, or TRITON_INTERPRET=1 in the environment before triton is imported (slow; for tests).
    """
    product_dtype = _product_dtype(hidden_ND, weight_VD)
    _check_inputs(hidden_ND, weight_VD, ids_N, allowed_V, temperature, product_dtype)
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    return _FusedHead.apply(hidden_ND, weight_VD, ids_N, allowed_V, 1.0 / temperature, soft_cap, product_dtype)


class Tile(NamedTuple):
    """Block shape of the logits and of the sum over hidden; warps and pipeline stages."""

    rows: int
    ids: int
    hidden: int
    num_warps: int
    num_stages: int

    def options(self, num_hidden: int) -> dict[str, int | bool]:
        return {
            "BLOCK_N": self.rows, "BLOCK_V": self.ids, "BLOCK_D": self.hidden, "EVEN_D": num_hidden % self.hidden == 0,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


# One choice a dtype, no autotuning: another tile shape sums in another order, and results would depend on the timing.
TILES = {torch.bfloat16: Tile(128, 256, 64, 8, 3), torch.float32: Tile(64, 64, 32, 4, 3)}


def num_parts(num_row_blocks: int, num_tiles: int, num_processors: int) -> int:
    """In how many parts to walk the vocabulary, so that all multiprocessors finish at about the same time.

    Minimises waves of programs x tiles a program; of equal choices the one with the fewest partial results.
    """

    def cost(parts: int) -> tuple[int, int]:
        waves = triton.cdiv(num_row_blocks * parts, num_processors)
        return waves * triton.cdiv(num_tiles, parts), parts

    best = min(range(1, min(num_tiles, 64) + 1), key=cost)
    return triton.cdiv(num_tiles, triton.cdiv(num_tiles, best))  # no part stays empty


def slice_width(num_rows: int, num_ids: int, item_size: int, multiple: int) -> int:
    """Ids in a slice of the backward pass: DELTA_BYTES worth, in whole tiles."""
    width = max(DELTA_BYTES // (item_size * num_rows), MIN_SLICE)
    return min(width // multiple * multiple, num_ids)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_N, allowed_V, inverse_temperature, soft_cap, product_dtype):
        ids_N = ids_N.contiguous()
        products = _cast(hidden_ND, product_dtype), _cast(weight_VD, product_dtype)
        logp_N, lse_N = _forward(*products, ids_N, allowed_V, inverse_temperature, soft_cap)
        ctx.inverse_temperature, ctx.soft_cap, ctx.product_dtype = inverse_temperature, soft_cap, product_dtype
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N, allowed_V, lse_N)
        return logp_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        hidden_ND, weight_VD, ids_N, allowed_V, lse_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_N = grad_N * ctx.inverse_temperature
        live_L = grad_N.nonzero()[:, 0]
        if len(live_L) == 0:
            grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
            grad_weight = torch.zeros_like(weight_VD) if needs_weight else None
            return grad_hidden, grad_weight, None, None, None, None, None
        rows = [_cast(hidden_ND, ctx.product_dtype), ids_N, lse_N, grad_N]
        if len(live_L) < len(ids_N):
            rows = [x.index_select(0, live_L) for x in rows]
        grad_hidden, grad_weight = _backward(
            *rows, weight_VD, allowed_V, (ctx.inverse_temperature, ctx.soft_cap), ctx.product_dtype,
            needs_hidden, needs_weight,
        )  # fmt: skip
        if needs_hidden:
            grad_hidden = grad_hidden.to(hidden_ND.dtype)
            if len(live_L) < len(ids_N):
                grad_hidden = torch.zeros_like(hidden_ND).index_copy_(0, live_L, grad_hidden)
        return grad_hidden, grad_weight, None, None, None, None, None


def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_N: Tensor,
    allowed_V: Tensor | None,
    inverse_temperature: float,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and log-sum-exp of every row."""
    (num_rows, num_hidden), num_ids = hidden_ND.shape, weight_VD.shape[0]
    tile = TILES[hidden_ND.dtype]
    num_row_blocks, num_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(num_ids, tile.ids)
    parts = num_parts(max(num_row_blocks, 1), num_tiles, _num_processors(hidden_ND.device))
    # Only the part that holds a row's id writes its logit, so an id outside the vocabulary leaves the NaN.
    target_N = hidden_ND.new_full((num_rows,), torch.nan, dtype=torch.float32)
    peak_SN = hidden_ND.new_empty((parts, num_rows), dtype=torch.float32)
    total_SN = torch.empty_like(peak_SN)
    with torch.cuda.device_of(hidden_ND):
        _forward_kernel[(num_row_blocks * parts,)](
            hidden_ND, weight_VD, ids_N, _bytes(allowed_V), target_N, peak_SN, total_SN,
            num_rows, num_ids, num_hidden, num_row_blocks, triton.cdiv(num_tiles, parts),
            hidden_ND.stride(0), weight_VD.stride(0), inverse_temperature, soft_cap, **tile.options(num_hidden),
        )  # fmt: skip
    peak_N = peak_SN.amax(0)
    total_SN *= (peak_SN - peak_N).exp()
    log_total_N = total_SN.sum(0).log()
    # The logit first meets the peak: next to a log-sum-exp of 30 the last digits of both would be gone.
    return (target_N - peak_N) - log_total_N, peak_N + log_total_N


def _backward(
    hidden_LD: Tensor,
    ids_L: Tensor,
    lse_L: Tensor,
    grad_L: Tensor,
    weight_VD: Tensor,
    allowed_V: Tensor | None,
    logit_map: tuple[float, float | None],
    product_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden (float32) and weight; grad_L is d loss / d logp over the temperature, nowhere zero.

    logit_map: one over the temperature, and the soft cap.
    """
    (num_rows, num_hidden), num_ids = hidden_LD.shape, weight_VD.shape[0]
    tile, product_weight_VD = TILES[product_dtype], _cast(weight_VD, product_dtype)
    width = slice_width(num_rows, num_ids, product_dtype.itemsize, tile.ids)
    delta_LW = hidden_LD.new_empty((num_rows, triton.cdiv(width, tile.ids) * tile.ids))
    grad_hidden_LD = torch.zeros_like(hidden_LD, dtype=torch.float32) if needs_hidden else None
    grad_weight_VD = torch.empty_like(weight_VD) if needs_weight else None
    for start in range(0, num_ids, width):
        ids = slice(start, min(start + width, num_ids))
        num_slice_ids = ids.stop - start
        num_row_blocks = triton.cdiv(num_rows, tile.rows)
        with torch.cuda.device_of(hidden_LD):
            _delta_kernel[(num_row_blocks * triton.cdiv(num_slice_ids, tile.ids),)](
                hidden_LD, product_weight_VD, ids_L, _bytes(allowed_V), lse_L, grad_L, delta_LW,
                num_rows, num_ids, num_hidden, num_row_blocks, start,
                hidden_LD.stride(0), product_weight_VD.stride(0), delta_LW.stride(0), *logit_map,
                **tile.options(num_hidden),
            )  # fmt: skip
        delta = delta_LW[:, :num_slice_ids]
        if needs_hidden:
            grad_hidden_LD += _product(delta, product_weight_VD[ids])
        if needs_weight:
            if weight_VD.dtype == product_dtype:
                torch.mm(delta.t(), hidden_LD, out=grad_weight_VD[ids])
            else:
                grad_weight_VD[ids] = _product(delta.t(), hidden_LD)
    return grad_hidden_LD, grad_weight_VD


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, accumulated and returned in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # the interpreter's case: a CPU has no product with another output type


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, rows, ids, N, V, D, stride_hidden, stride_weight,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """A tile of hidden x weight in float32. Rows and ids past the end repeat the last one; the caller masks them."""
    d = tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * stride_hidden + d[None, :]
    weight_ptrs = weight_ptr + tl.minimum(ids, V - 1).to(tl.int64)[None, :] * stride_weight + d[:, None]
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden = tl.load(hidden_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            hidden = tl.load(hidden_ptrs, mask=d[None, :] < D - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=d[:, None] < D - start, other=0.0)
        if _INTERPRETED:  # its bfloat16 product is wrong
            hidden = hidden.to(tl.float32)
            weight = weight.to(tl.float32)
        logits = tl.dot(hidden, weight, logits, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return logits


@triton.jit
def _allowed(allowed_ptr, ids, V):
    keep = ids < V
    if allowed_ptr is not None:
        keep = keep & (tl.load(allowed_ptr + ids, mask=keep, other=0) != 0)
    return keep


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _forward_kernel(
    hidden_ptr, weight_ptr, ids_ptr, allowed_ptr, target_ptr, peak_ptr, total_ptr,
    N, V, D, num_row_blocks, tiles_per_part, stride_hidden, stride_weight, inverse_temperature, soft_cap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp of some rows over one part of the vocabulary, and the target's logit."""
    # Programs of one part run side by side, so that they read its weights from memory once and then from the L2 cache.
    row_block = tl.program_id(0) % num_row_blocks
    part = tl.program_id(0) // num_row_blocks
    rows = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    in_batch = rows < N
    target_ids = tl.load(ids_ptr + rows, mask=in_batch, other=-1)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    target = tl.zeros((BLOCK_N,), tl.float32)

    first = part * tiles_per_part * BLOCK_V
    last = tl.minimum(first + tiles_per_part * BLOCK_V, V)
    for start in range(first, last, BLOCK_V):
        ids = start + tl.arange(0, BLOCK_V)
        logits = _logits(
            hidden_ptr, weight_ptr, rows, ids, N, V, D, stride_hidden, stride_weight,
            BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
        )  # fmt: skip
        if soft_cap is not None:
            logits = soft_cap * _tanh(logits / soft_cap)
        keep = _allowed(allowed_ptr, ids, V)
        logits = tl.where(keep[None, :], logits * inverse_temperature, float("-inf"))
        target += tl.sum(tl.where(ids[None, :] == target_ids[:, None], logits, 0.0), axis=1)
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # nothing allowed yet: exp(-inf), not exp(nan)
        decay = tl.exp(peak - shift)
        total = total * decay + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        peak = new_peak

    out = part.to(tl.int64) * N + rows
    tl.store(peak_ptr + out, peak, mask=in_batch)
    tl.store(total_ptr + out, total, mask=in_batch)
    tl.store(target_ptr + rows, target, mask=in_batch & (target_ids >= first) & (target_ids < last))


@triton.jit
def _delta_kernel(
    hidden_ptr, weight_ptr, ids_ptr, allowed_ptr, lse_ptr, grad_ptr, delta_ptr,
    N, V, D, num_row_blocks, slice_start, stride_hidden, stride_weight, stride_delta, inverse_temperature, soft_cap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
):  # fmt: skip
    """d loss / d logits = grad (onehot - softmax) for one tile of a slice of the vocabulary."""
    rows = tl.program_id(0) % num_row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) // num_row_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    ids = slice_start + columns
    in_batch = rows < N
    logits = _logits(
        hidden_ptr, weight_ptr, rows, ids, N, V, D, stride_hidden, stride_weight,
        BLOCK_N=BLOCK_N, BLOCK_V=BLOCK_V, BLOCK_D=BLOCK_D, EVEN_D=EVEN_D,
    )  # fmt: skip
    target_ids = tl.load(ids_ptr + rows, mask=in_batch, other=-1)
    lse = tl.load(lse_ptr + rows, mask=in_batch, other=0.0)
    grad = tl.load(grad_ptr + rows, mask=in_batch, other=0.0)
    slope = 1.0
    if soft_cap is not None:
        tanh = _tanh(logits / soft_cap)
        logits = soft_cap * tanh
        slope = 1.0 - tanh * tanh
    keep = _allowed(allowed_ptr, ids, V)
    share = tl.where(keep[None, :], tl.exp(logits * inverse_temperature - lse[:, None]), 0.0)
    hit = tl.where(ids[None, :] == target_ids[:, None], 1.0, 0.0)
    delta = grad[:, None] * (hit - share) * slope
    # The buffer is whole tiles wide: columns past the end are written, and left out of the products.
    delta_ptrs = delta_ptr + rows.to(tl.int64)[:, None] * stride_delta + columns[None, :]
    tl.store(delta_ptrs, delta.to(delta_ptr.dtype.element_ty), mask=in_batch[:, None])


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type of the products, rows of stride 1; no copy where both hold already."""
    x = x.to(dtype)
    return x if x.stride(1) == 1 else x.contiguous()


def _bytes(allowed_V: Tensor | None) -> Tensor | None:
    return None if allowed_V is None else allowed_V.contiguous().view(torch.uint8)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _product_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    device = hidden_ND.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden_ND.dtype, weight_VD.dtype)


def _check_inputs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    ids_N: Tensor,
    allowed_V: Tensor | None,
    temperature: float,
    product_dtype: torch.dtype,
) -> None:
    if not hidden_ND.is_cuda and not INTERPRETED:
        raise ValueError(
            f"the Triton head needs tensors on a CUDA device, got {hidden_ND.device}: use impl='torch', or set "
            "TRITON_INTERPRET=1 before triton is imported to test it without a GPU"
        )
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1] or not len(weight_VD):
        shapes = f"{tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        raise ValueError(f"hidden_ND and weight_VD must be (N, D) and (V, D) with V > 0, got {shapes}")
    if ids_N.shape != hidden_ND.shape[:1] or ids_N.is_floating_point() or ids_N.dtype == torch.bool:
        raise ValueError(f"ids_N must be integer ({len(hidden_ND)},), got {ids_N.dtype} {tuple(ids_N.shape)}")
    if allowed_V is not None and (allowed_V.dtype != torch.bool or allowed_V.shape != weight_VD.shape[:1]):
        got = f"{allowed_V.dtype} {tuple(allowed_V.shape)}"
        raise ValueError(f"allowed_V must be bool ({len(weight_VD)},), got {got}")
    for name, value in {"weight_VD": weight_VD, "ids_N": ids_N, "allowed_V": allowed_V}.items():
        if value is not None and value.device != hidden_ND.device:
            raise ValueError(f"{name} must be on {hidden_ND.device} like hidden_ND, got {value.device}")
    dtypes = {hidden_ND.dtype, weight_VD.dtype, product_dtype}
    if not dtypes <= set(PRODUCT_DTYPES):
        raise ValueError(f"inputs (and autocast) must be float32 or bfloat16, got {dtypes}; impl='torch' takes others")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
