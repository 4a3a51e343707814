"""The Rank-GRPO loss as one Triton kernel forward and one backward (paper: "Rank-GRPO", arXiv 2510.20150, Eq. 6).

`fused_rank_grpo_loss` computes what `rankgrpo.loss.rank_grpo_loss(impl="torch")` computes and is checked against it.
The forward kernel owns one list a program: a segmented scan sums the log-ratios of every rank, then each rank gets its
clipped surrogate and the factor of its gradient. The backward kernel gives every token the factor of its rank.

Nothing is added by atomics, so equal inputs give bitwise equal results. Lists whose ranks ascend along the tokens (what
`RankSegmenter` and `make_units` produce, masked tokens anywhere) cost O(T + K). Any other order is right as well, but
costs O(T * K) for that list.

Float64 is refused: that is the plain implementation's job. Gradients flow to `logp_BT` alone.
"""

# Shape letters: B lists, T completion tokens, K units of a list (ranks unless said otherwise), M sums of a list,
# F fields of a unit.

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
from torch import Tensor

from rankgrpo_kernels.rank_ratio_triton import NUM_SUMS, backward_kernel, forward_kernel

INTERPRETED: bool = triton.knobs.runtime.interpret  # read once, where triton.jit reads it
TOKEN_DTYPES = (torch.float32, torch.bfloat16)
FACTOR_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fused_rank_grpo_loss(
    logp_BT: Tensor,
    old_logp_BT: Tensor | None,
    rank_BT: Tensor,
    advantage_BK: Tensor,
    *,
    clip_low: float = 0.06,
    clip_high: float = 0.08,
    ref_logp_BT: Tensor | None = None,
    kl_coef: float = 0.0,
    reduction: Literal["rank", "token"] = "rank",
    denominator: float | Tensor | None = None,
    weight_BK: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate with one ratio and one advantage a rank, plus the KL to a reference.

    loss = -(1/Z) sum_{i,k} c_{i,k} min(w_{i,k} A_{i,k}, clip(w_{i,k}, 1 - clip_low, 1 + clip_high) A_{i,k})
           + kl_coef (1/Z) sum_{i,k} c_{i,k} (mean of exp(d) - d - 1 over the tokens of rank k, d = ref_logp - logp)

    with w_{i,k} = exp(mean of logp - old_logp over the tokens of rank k), c = 1 for reduction="rank" and the number of
    tokens for "token", times `weight_BK`. Arguments, edge cases and metrics are those of
    `rankgrpo.loss.rank_grpo_loss`, with two differences: log-probs may be bfloat16 (arithmetic and loss are float32
    all the same, the gradient has the dtype of `logp_BT`), and they may not be float64.

    Raises ValueError for wrong shapes, dtypes, devices or options, and where the kernel cannot run: it needs tensors on
    a CUDA device, or TRITON_INTERPRET=1 in the environment before triton is imported (slow; for tests).
    """
    _check_inputs(logp_BT, old_logp_BT, rank_BT, advantage_BK, ref_logp_BT, weight_BK)
    _check_options(reduction, kl_coef, ref_logp_BT, denominator)
    if denominator is None and reduction == "rank":
        denominator = max(advantage_BK.numel(), 1)
    # A number is divided by inside the kernel. A tensor stays unread on its device, and divides afterwards.
    scale = 1.0 if denominator is None or isinstance(denominator, Tensor) else 1.0 / denominator
    options = _Options(1 - clip_low, 1 + clip_high, kl_coef, reduction == "token", scale)
    loss, sum_M = _RankLoss.apply(
        logp_BT, _rows(old_logp_BT), _rows(rank_BT), advantage_BK, _rows(ref_logp_BT), weight_BK, options
    )
    losses_2 = sum_M[1:3]
    if denominator is None:
        denominator = sum_M[7].clamp(min=1)
    if isinstance(denominator, Tensor):
        loss, losses_2 = loss / denominator, losses_2 / denominator
    return loss, _metrics(losses_2, sum_M)


class _Options(NamedTuple):
    ratio_low: float
    ratio_high: float
    kl_coef: float
    per_token: bool
    scale: float


class _RankLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp_BT, old_logp_BT, rank_BT, advantage_BK, ref_logp_BT, weight_BK, options):
        logp_BT = _rows(logp_BT)
        unit_BKF, sum_M = _launch_forward(logp_BT, old_logp_BT, rank_BT, advantage_BK, ref_logp_BT, weight_BK, options)
        ctx.has_kl = options.kl_coef != 0
        ctx.save_for_backward(rank_BT, unit_BKF, *((logp_BT, ref_logp_BT) if ctx.has_kl else ()))
        ctx.dtype = logp_BT.dtype
        loss = sum_M[0].clone()  # an output of its own: autograd tracks it, the sums beside it are metrics
        ctx.mark_non_differentiable(sum_M)
        ctx.set_materialize_grads(False)  # a launch to fill zeros for sum_M
        return loss, sum_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _grad_sum_M):
        rank_BT, unit_BKF, *kl_inputs = ctx.saved_tensors
        logp_BT, ref_logp_BT = kl_inputs if ctx.has_kl else (None, None)
        grad_BT = _launch_backward(grad_loss, rank_BT, unit_BKF, logp_BT, ref_logp_BT, ctx.dtype)
        return grad_BT, None, None, None, None, None, None


def _metrics(losses_2: Tensor, sum_M: Tensor) -> dict[str, Tensor]:
    policy, kl = losses_2.unbind()
    mean, low, high = (sum_M[3:6] / sum_M[6].clamp(min=1)).unbind()
    return {
        "ratio/mean": mean,
        "ratio/clip_low_frac": low,
        "ratio/clip_high_frac": high,
        "ratio/num_units": sum_M[6],
        "loss/policy": policy,
        "loss/kl": kl,
    }


def _rows(x_BT: Tensor | None) -> Tensor | None:
    """The tensor with stride 1 along its rows, as the kernels walk them; the rows may lie anywhere."""
    return x_BT if x_BT is None or x_BT.stride(1) == 1 else x_BT.contiguous()


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()


def _check_inputs(
    logp_BT: Tensor,
    old_logp_BT: Tensor | None,
    rank_BT: Tensor,
    advantage_BK: Tensor,
    ref_logp_BT: Tensor | None,
    weight_BK: Tensor | None,
) -> None:
    """Raise ValueError unless the inputs are what the kernels' memory accesses rely on."""
    if not logp_BT.is_cuda and not INTERPRETED:
        raise ValueError(
            f"the Triton kernel needs tensors on a CUDA device, got {logp_BT.device}: use impl='torch', or set "
            "TRITON_INTERPRET=1 before triton is imported to test it without a GPU"
        )
    if logp_BT.ndim != 2 or advantage_BK.ndim != 2:
        shapes = f"{tuple(logp_BT.shape)} and {tuple(advantage_BK.shape)}"
        raise ValueError(f"logp_BT must be (B, T) and advantage_BK (B, K), got {shapes}")
    bt, bk = logp_BT.shape, (logp_BT.shape[0], advantage_BK.shape[1])
    inputs = {
        "logp_BT": (logp_BT, bt, TOKEN_DTYPES, "float32 or bfloat16 (impl='torch' takes float64)"),
        "old_logp_BT": (old_logp_BT, bt, TOKEN_DTYPES, "float32 or bfloat16"),
        "ref_logp_BT": (ref_logp_BT, bt, TOKEN_DTYPES, "float32 or bfloat16"),
        "rank_BT": (rank_BT, bt, (torch.int64, torch.int32, torch.int16), "int64, int32 or int16"),
        "advantage_BK": (advantage_BK, bk, FACTOR_DTYPES, "floating point"),
        "weight_BK": (weight_BK, bk, FACTOR_DTYPES, "floating point"),
    }
    for name, (value, shape, dtypes, wanted) in inputs.items():
        if value is None:
            continue
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        if value.device != logp_BT.device:
            raise ValueError(f"{name} must be on {logp_BT.device} like logp_BT, got {value.device}")
        if value.dtype not in dtypes:
            raise ValueError(f"{name} must be {wanted}, got {value.dtype}")


def _check_options(
    reduction: str, kl_coef: float, ref_logp_BT: Tensor | None, denominator: float | Tensor | None
) -> None:
    if reduction not in ("rank", "token"):
        raise ValueError(f"reduction must be 'rank' or 'token', got {reduction!r}")
    if not kl_coef >= 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
    if kl_coef > 0 and ref_logp_BT is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logp_BT, the log-probs under the reference")
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            raise ValueError(f"denominator must be a number or a 0-dim tensor, got shape {tuple(denominator.shape)}")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator must be > 0, got {denominator}")


def forward_config(num_tokens: int, num_units: int) -> dict[str, int]:
    """Blocks and warps of the forward kernel: 16 tokens a thread and few warps, so that many lists are in flight."""
    block_t = min(max(triton.next_power_of_2(num_tokens), 128), 2048)
    block_k = min(max(triton.next_power_of_2(num_units), 32), 256)
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "num_warps": min(max(block_t // 512, 1), 4)}


def backward_config(num_tokens: int) -> dict[str, int]:
    block_t = min(max(triton.next_power_of_2(num_tokens), 128), 1024)
    return {"BLOCK_T": block_t, "num_warps": min(max(block_t // 256, 1), 4)}


def _launch_forward(
    logp_BT: Tensor,
    old_logp_BT: Tensor | None,
    rank_BT: Tensor,
    advantage_BK: Tensor,
    ref_logp_BT: Tensor | None,
    weight_BK: Tensor | None,
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: what backward needs by unit, (B, K, F), see there, and the sums over all lists, (M,)."""
    (num_lists, num_tokens), num_units = logp_BT.shape, advantage_BK.shape[1]
    num_fields = 2 if ref_logp_BT is None else 3
    unit_BKF = torch.empty(num_lists, num_units, num_fields, dtype=torch.float32, device=logp_BT.device)
    sum_BM = torch.empty(num_lists, NUM_SUMS, dtype=torch.float32, device=logp_BT.device)
    config = forward_config(num_tokens, num_units)
    with torch.cuda.device_of(logp_BT):
        forward_kernel[(num_lists,)](
            logp_BT, old_logp_BT, rank_BT, ref_logp_BT, advantage_BK, weight_BK, unit_BKF, sum_BM,
            num_tokens, num_units,
            logp_BT.stride(0), _strides(old_logp_BT)[0], rank_BT.stride(0), _strides(ref_logp_BT)[0],
            *advantage_BK.stride(), *_strides(weight_BK),
            options.ratio_low, options.ratio_high, options.kl_coef, options.scale,
            FIELDS=num_fields, PER_TOKEN=options.per_token, KL_IN_LOSS=options.kl_coef != 0,
            ONE_BLOCK=num_tokens <= config["BLOCK_T"], **config,
        )  # fmt: skip
    return unit_BKF, sum_BM.sum(0)


def _launch_backward(
    grad_loss: Tensor,
    rank_BT: Tensor,
    unit_BKF: Tensor,
    logp_BT: Tensor | None,
    ref_logp_BT: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    num_lists, num_units, num_fields = unit_BKF.shape
    num_tokens = rank_BT.shape[1]
    grad_BT = torch.empty(num_lists, num_tokens, dtype=dtype, device=rank_BT.device)
    config = backward_config(num_tokens)
    num_blocks = triton.cdiv(num_tokens, config["BLOCK_T"])
    with torch.cuda.device_of(rank_BT):
        backward_kernel[(num_lists * num_blocks,)](
            grad_loss, rank_BT, unit_BKF, logp_BT, ref_logp_BT, grad_BT,
            num_tokens, num_units, num_blocks, rank_BT.stride(0), _strides(logp_BT)[0], _strides(ref_logp_BT)[0],
            FIELDS=num_fields, **config,
        )  # fmt: skip
    return grad_BT
