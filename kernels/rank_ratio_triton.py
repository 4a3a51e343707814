"""Device code of the rank kernel: `forward_kernel` owns one list a program, `backward_kernel` a stretch of its tokens.

`rankgrpo_kernels.rank_ratio` checks the inputs, launches both and explains the method.
"""

# Shape letters: T completion tokens and K units of a list.

from __future__ import annotations

import triton
import triton.language as tl

from rankgrpo.loss import MAX_LOG_RATIO

NUM_SUMS = 8  # loss, policy, kl, ratio, clipped low, clipped high, units with tokens, tokens

_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)
_NUM_SUMS = tl.constexpr(NUM_SUMS)


@triton.jit
def _k3(x):
    """exp(x) - 1 - x. The series (ten terms, |x| <= 1) keeps the digits that the difference would lose."""
    series = 1.0 / 3628800
    series = series * x + 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    return tl.where(tl.abs(x) <= 1.0, series * x * x, tl.exp(x) - 1.0 - x)


@triton.jit
def _bounded(x):
    """x clamped to +-MAX_LOG_RATIO; NaN where it is not finite."""
    clamped = tl.where(x > _MAX_LOG_RATIO, _MAX_LOG_RATIO, tl.where(x < -_MAX_LOG_RATIO, -_MAX_LOG_RATIO, x))
    return tl.where(tl.abs(x) < float("inf"), clamped, float("nan"))


@triton.jit
def _keys(rank, K):
    """Ranks as int32; -1 for tokens that take no part. The unsigned comparison, in 64 bits, catches both ends."""
    return tl.where(rank.to(tl.int64).to(tl.uint64) < K, rank, -1).to(tl.int32)


@triton.jit
def _join(key_l, ratio_l, count_l, key_r, ratio_r, count_r):
    """Joins two neighbouring stretches of tokens: highest rank so far, and the sums over the tokens of that rank."""
    same = key_l >= key_r  # key_l > key_r only if all on the right take no part (ranks ascend, or the sums are redone)
    return (
        tl.maximum(key_l, key_r),
        tl.where(same, ratio_l, 0.0) + ratio_r,
        tl.where(same, count_l, 0.0) + count_r,
    )


@triton.jit
def _join_kl(key_l, ratio_l, count_l, kl_l, key_r, ratio_r, count_r, kl_r):
    same = key_l >= key_r  # key_l > key_r only if all on the right take no part (ranks ascend, or the sums are redone)
    return (
        tl.maximum(key_l, key_r),
        tl.where(same, ratio_l, 0.0) + ratio_r,
        tl.where(same, count_l, 0.0) + count_r,
        tl.where(same, kl_l, 0.0) + kl_r,
    )


@triton.jit
def _token_terms(logp_ptr, old_ptr, ref_ptr, t, in_list, takes_part):
    """Log-ratio and k3 of the tokens at t; 0 where they take no part, whatever is stored there."""
    logp = tl.load(logp_ptr + t, mask=in_list, other=0.0).to(tl.float32)
    old = logp  # on-policy: the ratio is 1, yet a log-prob that is not finite still shows
    if old_ptr is not None:
        old = tl.load(old_ptr + t, mask=in_list, other=0.0).to(tl.float32)
    kl = tl.zeros_like(logp)
    if ref_ptr is not None:
        ref = tl.load(ref_ptr + t, mask=in_list, other=0.0).to(tl.float32)
        kl = tl.where(takes_part, _k3(_bounded(ref - logp)), 0.0)
    return tl.where(takes_part, logp - old, 0.0), kl


@triton.jit
def _sum_ascending(
    logp_ptr, old_ptr, rank_ptr, ref_ptr, unit_ptr, T, K,
    FIELDS: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums by rank, each stored by the last token of its rank. Returns whether the ranks of some tokens descend."""
    carry_key = tl.full((), -1, tl.int32)
    carry_ratio = tl.full((), 0.0, tl.float32)
    carry_count = tl.full((), 0.0, tl.float32)
    carry_kl = tl.full((), 0.0, tl.float32)
    descends = tl.full((), 0, tl.int32)
    lane = tl.arange(0, BLOCK_T)
    for start in range(0, T, BLOCK_T):
        t = start + lane
        in_list = t < T
        own = _keys(tl.load(rank_ptr + t, mask=in_list, other=-1), K)
        following = _keys(tl.load(rank_ptr + t + 1, mask=t + 1 < T, other=-1), K)
        takes_part = own >= 0
        ratio, kl = _token_terms(logp_ptr, old_ptr, ref_ptr, t, in_list, takes_part)
        count = takes_part.to(tl.float32)
        if ref_ptr is not None:
            key, ratio, count, kl = tl.associative_scan((own, ratio, count, kl), 0, _join_kl)
        else:
            key, ratio, count = tl.associative_scan((own, ratio, count), 0, _join)
        if not ONE_BLOCK:  # the rank that the previous block left open goes on
            same = key <= carry_key
            key = tl.maximum(key, carry_key)
            ratio += tl.where(same, carry_ratio, 0.0)
            count += tl.where(same, carry_count, 0.0)
            kl += tl.where(same, carry_kl, 0.0)
            final = lane == BLOCK_T - 1
            carry_key = tl.max(key, axis=0)
            carry_ratio = tl.sum(tl.where(final, ratio, 0.0), axis=0)
            carry_count = tl.sum(tl.where(final, count, 0.0), axis=0)
            carry_kl = tl.sum(tl.where(final, kl, 0.0), axis=0)
        descends = tl.maximum(descends, tl.max((takes_part & (own < key)).to(tl.int32), axis=0))

        closes = in_list & (key >= 0) & ((following > key) | (t == T - 1))
        slot_ptr = unit_ptr + key * FIELDS
        tl.store(slot_ptr, ratio, mask=closes)
        tl.store(slot_ptr + 1, count, mask=closes)
        if ref_ptr is not None:
            tl.store(slot_ptr + 2, kl, mask=closes)
    return descends


@triton.jit
def _sum_any_order(logp_ptr, old_ptr, rank_ptr, ref_ptr, unit_ptr, T, K, FIELDS: tl.constexpr):
    """Sums by rank for ranks in any order: every block of ranks reads all tokens."""
    for start_k in range(0, K, 32):
        k = start_k + tl.arange(0, 32)
        ratio = tl.zeros((32,), tl.float32)
        count = tl.zeros((32,), tl.float32)
        kl = tl.zeros((32,), tl.float32)
        for start_t in range(0, T, 16):
            t = start_t + tl.arange(0, 16)
            in_list = t < T
            own = _keys(tl.load(rank_ptr + t, mask=in_list, other=-1), K)
            ratio_t, kl_t = _token_terms(logp_ptr, old_ptr, ref_ptr, t, in_list, own >= 0)
            hit = own[:, None] == k[None, :]
            ratio += tl.sum(tl.where(hit, ratio_t[:, None], 0.0), axis=0)
            count += tl.sum(hit.to(tl.float32), axis=0)
            kl += tl.sum(tl.where(hit, kl_t[:, None], 0.0), axis=0)
        slot_ptr = unit_ptr + k * FIELDS
        tl.store(slot_ptr, ratio, mask=k < K)
        tl.store(slot_ptr + 1, count, mask=k < K)
        if ref_ptr is not None:
            tl.store(slot_ptr + 2, kl, mask=k < K)


@triton.jit
def _surrogate(log_ratio, advantage, ratio_low, ratio_high):
    """Ratio of a unit, its clipped surrogate, and the slope of that in the log-ratio."""
    bounded = _bounded(log_ratio)
    ratio = tl.where(tl.abs(bounded) <= 1.0, 1.0 + (bounded + _k3(bounded)), tl.exp(bounded))
    clipped = tl.where(ratio < ratio_low, ratio_low, tl.where(ratio > ratio_high, ratio_high, ratio))
    unclipped = ratio * advantage <= clipped * advantage
    moves = unclipped & (tl.abs(log_ratio) <= _MAX_LOG_RATIO)
    return ratio, tl.where(unclipped, ratio, clipped) * advantage, tl.where(moves, ratio * advantage, 0.0)


@triton.jit
def _close_units(
    advantage_ptr, weight_ptr, unit_ptr, sum_ptr, K, stride_advantage, stride_weight,
    ratio_low, ratio_high, kl_coef, scale,
    FIELDS: tl.constexpr, PER_TOKEN: tl.constexpr, KL_IN_LOSS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Turn the sums of every unit into what backward needs of it, and into the sums of the list."""
    policy = tl.zeros((BLOCK_K,), tl.float32)
    kl = tl.zeros((BLOCK_K,), tl.float32)
    ratios = tl.zeros((BLOCK_K,), tl.float32)
    low = tl.zeros((BLOCK_K,), tl.float32)
    high = tl.zeros((BLOCK_K,), tl.float32)
    units = tl.zeros((BLOCK_K,), tl.float32)
    tokens = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_list = k < K
        slot_ptr = unit_ptr + k * FIELDS
        count = tl.load(slot_ptr + 1, mask=in_list, other=0.0)
        present = count > 0
        length = tl.maximum(count, 1.0)
        log_ratio = tl.load(slot_ptr, mask=present, other=0.0) / length
        advantage = tl.load(advantage_ptr + k * stride_advantage, mask=in_list, other=0.0).to(tl.float32)
        share = tl.where(in_list, scale, 0.0)
        if PER_TOKEN:
            share *= count
        if weight_ptr is not None:
            share *= tl.load(weight_ptr + k * stride_weight, mask=in_list, other=0.0).to(tl.float32)

        ratio, surrogate, slope = _surrogate(log_ratio, advantage, ratio_low, ratio_high)
        policy -= share * surrogate
        if FIELDS == 3:
            kl += share * (tl.load(slot_ptr + 2, mask=present, other=0.0) / length)
        tl.debug_barrier()  # several threads may hold the same unit: all have read its sums before one overwrites them
        tl.store(slot_ptr, -share * slope / length, mask=present)
        if FIELDS == 3:
            tl.store(slot_ptr + 2, kl_coef * share / length, mask=present)
        ratios += tl.where(present, ratio, 0.0)
        low += (present & (ratio < ratio_low) & (advantage < 0)).to(tl.float32)
        high += (present & (ratio > ratio_high) & (advantage > 0)).to(tl.float32)
        units += present.to(tl.float32)
        tokens += count

    policy_sum = tl.sum(policy, axis=0)
    kl_sum = tl.sum(kl, axis=0)
    loss = policy_sum
    if KL_IN_LOSS:  # else 0 * NaN of a reference that only feeds the metric would poison the loss
        loss += kl_coef * kl_sum
    tl.store(sum_ptr, loss)
    tl.store(sum_ptr + 1, policy_sum)
    tl.store(sum_ptr + 2, kl_sum)
    tl.store(sum_ptr + 3, tl.sum(ratios, axis=0))
    tl.store(sum_ptr + 4, tl.sum(low, axis=0))
    tl.store(sum_ptr + 5, tl.sum(high, axis=0))
    tl.store(sum_ptr + 6, tl.sum(units, axis=0))
    tl.store(sum_ptr + 7, tl.sum(tokens, axis=0))


@triton.jit
def forward_kernel(
    logp_ptr, old_ptr, rank_ptr, ref_ptr, advantage_ptr, weight_ptr, unit_ptr, sum_ptr, T, K,
    stride_logp, stride_old, stride_rank, stride_ref,
    stride_advantage_b, stride_advantage_k, stride_weight_b, stride_weight_k,
    ratio_low, ratio_high, kl_coef, scale,
    FIELDS: tl.constexpr, PER_TOKEN: tl.constexpr, KL_IN_LOSS: tl.constexpr,
    ONE_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program reduces one list. The fields of a unit first hold its sums (log-ratio, tokens, k3), then what the
    backward pass needs: d loss / d logp of its tokens, their number, the weight of a token's k3 in the loss."""
    row = tl.program_id(0).to(tl.int64)
    logp_ptr += row * stride_logp
    rank_ptr += row * stride_rank
    advantage_ptr += row * stride_advantage_b
    unit_ptr += row * K * FIELDS
    if old_ptr is not None:
        old_ptr += row * stride_old
    if ref_ptr is not None:
        ref_ptr += row * stride_ref
    if weight_ptr is not None:
        weight_ptr += row * stride_weight_b

    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tl.store(unit_ptr + k * FIELDS + 1, tl.zeros((BLOCK_K,), tl.float32), mask=k < K)
    tl.debug_barrier()  # what a thread stores here, and below, other threads of the program go on with
    descends = _sum_ascending(
        logp_ptr, old_ptr, rank_ptr, ref_ptr, unit_ptr, T, K, FIELDS=FIELDS, ONE_BLOCK=ONE_BLOCK, BLOCK_T=BLOCK_T
    )
    if descends > 0:
        tl.debug_barrier()
        _sum_any_order(logp_ptr, old_ptr, rank_ptr, ref_ptr, unit_ptr, T, K, FIELDS=FIELDS)
    tl.debug_barrier()
    _close_units(
        advantage_ptr, weight_ptr, unit_ptr, sum_ptr + row * _NUM_SUMS, K, stride_advantage_k, stride_weight_k,
        ratio_low, ratio_high, kl_coef, scale,
        FIELDS=FIELDS, PER_TOKEN=PER_TOKEN, KL_IN_LOSS=KL_IN_LOSS, BLOCK_K=BLOCK_K,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    grad_loss_ptr, rank_ptr, unit_ptr, logp_ptr, ref_ptr, grad_ptr,
    T, K, num_blocks, stride_rank, stride_logp, stride_ref,
    FIELDS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """d loss / d logp of a stretch of tokens: the factor of their rank, plus the slope of their own k3."""
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    t = (tl.program_id(0) % num_blocks) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_list = t < T
    own = _keys(tl.load(rank_ptr + row * stride_rank + t, mask=in_list, other=-1), K)
    takes_part = own >= 0
    slot_ptr = unit_ptr + row * K * FIELDS + own * FIELDS
    slope = tl.load(slot_ptr, mask=takes_part, other=0.0)
    if logp_ptr is not None:
        logp = tl.load(logp_ptr + row * stride_logp + t, mask=in_list, other=0.0).to(tl.float32)
        ref = tl.load(ref_ptr + row * stride_ref + t, mask=in_list, other=0.0).to(tl.float32)
        d = ref - logp
        moves = takes_part & (tl.abs(d) <= _MAX_LOG_RATIO)
        d = tl.where(moves, d, 0.0)
        weight = tl.load(slot_ptr + 2, mask=moves, other=0.0)
        slope -= weight * (_k3(d) + d)
    grad = tl.load(grad_loss_ptr).to(tl.float32) * slope
    # A token that takes no part gets 0 even when the gradient of the loss is not finite.
    grad = tl.where(takes_part, grad, 0.0)
    tl.store(grad_ptr + row * T + t, grad.to(grad_ptr.dtype.element_ty), mask=in_list)
