"""Triton kernels of attention, shared by `packed_attention` and `cross_modal_attention`.

Several sources of keys in one pass: the kernels take tuples of pointers and strides, one entry a source, and unroll
over them, so nothing is concatenated. Queries, keys and values are views with any strides (a unit one in D): parts of
one buffer, or tensors of their own. What is valid is a range per sample and source, so padding is skipped block by
block, and only the blocks at a range's end or on the diagonal are masked.

Two forms, chosen by the shapes and the tables alone (`Call.short_tile`):

- *streaming*: an online softmax over blocks of keys. Two backward kernels, one that owns query blocks and one that owns
  key blocks, recompute the probabilities from the log-sum-exp. The price is that they are computed twice there.
- *short keys*: the keys and values of all sources stay on chip as one tile, a program walks over its queries, and the
  backward pass is one kernel that reads Q and dO and writes dQ, once. Keys' gradients are then summed over programs.

No atomics: partial sums have places of their own and are added in a fixed order, so every run gives the same bits.

A bias that broadcasts over samples, heads, queries or keys gets its gradient from a kernel of its own, which recomputes
the logits and owns a tile of the bias: memory stays that of the bias.

Import this module only where a kernel is about to run: it needs triton, and ``TRITON_INTERPRET=1`` has to be set
before.
Sources: Dao 2023 (FlashAttention-2, arXiv 2307.08691) for the streaming form; Milakov and Gimelshein 2018 (arXiv
1805.02867) for the online softmax.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, tiles and constants, none of which has a type for Python)

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiled_attention import Dropout

_LOG2E = tl.constexpr(1.4426950408889634)
_FAR = tl.constexpr(1 << 30)
# Programs that a pass over queries is cut into, if there are queries enough: some for each processor of a large device.
_PROGRAMS = 528


@dataclass(frozen=True)
class KeySource:
    """Keys and values of one source as the kernels read them.

    key, value: (B, Lk, Hkv, D) views. lengths, starts: (B,) int32 or int64 views; out of bounds, they are clamped.
    gate: (1 or B, H), unit stride in H. bias: each size 1 or full against (B, H, Lq, Lk). shift: query i sees keys up
    to i + shift; None = all.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    starts: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None
    shift: int | None = None


@dataclass(frozen=True)
class QueryRange:
    """Rows first .. first + size - 1 of the queries; lengths[b] (B,) of them, or all, are valid, others padding."""

    first: int
    size: int
    lengths: Tensor | None = None


@triton.jit
def _clamped(count, most):
    """A count of any integer type as int32 in 0 .. most: clamped first, for the cast would wrap."""
    return tl.minimum(tl.maximum(count, 0), most).to(tl.int32)


@triton.jit
def _valid_rows(rows, sample, q_lengths, q_strides, q_firsts, q_sizes, HAS: tl.constexpr, QS: tl.constexpr):
    """Which rows hold a query."""
    valid = rows < 0
    for s in tl.static_range(QS):
        size = q_sizes[s]
        if HAS[s]:
            size = _clamped(tl.load(q_lengths[s] + sample * q_strides[s]), size)
        valid |= (rows >= q_firsts[s]) & (rows < q_firsts[s] + size)
    return valid


@triton.jit
def _key_range(
    sample,
    lengths,
    starts,
    length_stride,
    start_stride,
    size,
    HAS_LENGTHS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """First valid key of a source and the one past the last, clamped to its size."""
    start = sample.to(tl.int32) * 0
    if HAS_STARTS:
        start = _clamped(tl.load(starts + sample * start_stride), size)
    end = start * 0 + size
    if HAS_LENGTHS:
        end = start + _clamped(tl.load(lengths + sample * length_stride), size - start)
    return start, end


@triton.jit
def _load(ptr, rows, t_stride, dims, mask, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """A tile (rows, BD), 0 where mask (rows,) is false."""
    ptrs = ptr + rows[:, None].to(tl.int64) * t_stride + dims[None, :]
    if D == BD:
        tile = tl.load(ptrs, mask=mask[:, None], other=0.0)
    else:
        tile = tl.load(ptrs, mask=mask[:, None] & (dims < D)[None, :], other=0.0)
    if UPCAST:  # the interpreter multiplies the bit patterns of bf16
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store(ptr, rows, t_stride, dims, tile, mask, D: tl.constexpr, BD: tl.constexpr):
    ptrs = ptr + rows[:, None].to(tl.int64) * t_stride + dims[None, :]
    tile = tile.to(ptr.dtype.element_ty)
    if D == BD:
        tl.store(ptrs, tile, mask=mask[:, None])
    else:
        tl.store(ptrs, tile, mask=mask[:, None] & (dims < D)[None, :])


@triton.jit
def _mix(x):
    """Scramble 32 bits, as `tiled_attention._mix`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _row_state(seeds, sample, salt, head, rows):
    """The state of the dropout generator of each query, as `tiled_attention.Dropout.keep` draws it."""
    seed = tl.load(seeds + sample)
    state = _mix(_mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    state = _mix(state ^ salt.to(tl.uint32))
    state = _mix(state + head.to(tl.uint32) * 0x85EBCA6B)
    return _mix(state + rows.to(tl.uint32) * 0xC2B2AE35)


@triton.jit
def _kept(state, columns, threshold):
    # a threshold of 1 is a constant to the compiler, which `to` is no method of
    return _mix(state + columns.to(tl.uint32) * 0x9E3779B9) >= tl.cast(threshold, tl.uint32)


@triton.jit
def _bias_tile(bias, rows, columns, q_stride, k_stride, mask):
    """Bias in units of log2; rows, columns and mask broadcast to a tile."""
    tile = tl.load(
        bias + rows.to(tl.int64) * q_stride + columns.to(tl.int64) * k_stride, mask=mask, other=0.0
    )
    return tile.to(tl.float32) * _LOG2E


@triton.jit
def _where_we_are(num_blocks, num_heads):
    """(block, head, sample) of this program. The last blocks come first: under causality they are the longest.

    Head and sample are int64: times a stride, they leave 32 bits.
    """
    program = tl.program_id(0)
    block = num_blocks - 1 - program % num_blocks
    head = (program // num_blocks % num_heads).to(tl.int64)
    sample = (program // num_blocks // num_heads).to(tl.int64)
    return block, head, sample


@triton.jit
def _joint_lse(lse_ptr, place, mask, NL: tl.constexpr):
    """The log-sum-exp over all sources, in units of log2, from NL of them; +inf where there is nothing to see."""
    joint = tl.load(lse_ptr + place * NL, mask=mask, other=-float("inf"))
    if NL > 1:
        high = joint
        for s in tl.static_range(1, NL):
            high = tl.maximum(high, tl.load(lse_ptr + place * NL + s, mask=mask, other=-float("inf")))
        base = tl.where(high == -float("inf"), 0.0, high)
        total = tl.exp2((joint - base) * _LOG2E)
        for s in tl.static_range(1, NL):
            total += tl.exp2(
                (tl.load(lse_ptr + place * NL + s, mask=mask, other=-float("inf")) - base) * _LOG2E
            )
        joint = tl.where(total > 0, base + tl.log2(tl.where(total > 0, total, 1.0)) / _LOG2E, -float("inf"))
    # exp2(logit - inf) is 0, where exp2(-inf - -inf) would be NaN
    return tl.where(joint == -float("inf"), float("inf"), joint * _LOG2E)


@triton.jit
def _own_lse(lse_ptr, place, s, mask, NL: tl.constexpr):
    own = tl.load(lse_ptr + place * NL + s, mask=mask, other=-float("inf"))
    return tl.where(own == -float("inf"), float("inf"), own * _LOG2E)


@triton.jit
def _forward_block(
    q, k_base, v_base, bias, high, own, total, block, stop, rows, dims, present, shift, gate, state, threshold,
    k_stride, v_stride, bias_q, bias_k, scale, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum, weight and output after it."""
    columns = block + tl.arange(0, BN)
    if MASKED:
        inside = columns < stop
    else:
        inside = columns >= 0
    k = _load(k_base, columns, k_stride, dims, inside, D, BD, UPCAST)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
    if GATED:
        logits += gate
    if BIASED:
        logits += _bias_tile(
            bias, rows[:, None], columns[None, :], bias_q, bias_k, present[:, None] & inside[None, :]
        )
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None] + shift)
        logits = tl.where(seen, logits, -float("inf"))
    peak = tl.maximum(high, tl.max(logits, 1))
    # a row that has seen nothing yet: -inf - -inf would be NaN
    base = tl.where(peak == -float("inf"), 0.0, peak)
    fade = tl.exp2(high - base)
    p = tl.exp2(logits - base[:, None])
    own = own * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(_kept(state[:, None], columns[None, :], threshold), p * keep_scale, 0.0)
    v = _load(v_base, columns, v_stride, dims, inside, D, BD, UPCAST)
    total = total * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return peak, own, total


@triton.jit
def _forward(
    q_ptr, out_ptr, lse_ptr, seeds,
    keys, values, lengths, starts, gates, biases,
    sizes, k_strides, v_strides, length_strides, start_strides, gate_strides, bias_strides, groups, shifts, salts,
    q_lengths, q_length_strides, q_firsts, q_sizes, q_b, q_t, q_h,
    num_queries, num_heads, num_blocks, scale, threshold, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr, HAS_Q: tl.constexpr,
    NS: tl.constexpr, NL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against the keys it sees; lse of each source (NL = NS) or of all (NL = 1)."""
    block_of_rows, head, sample = _where_we_are(num_blocks, num_heads)
    first = block_of_rows * BM
    rows = first + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    present = rows < num_queries
    valid = _valid_rows(rows, sample, q_lengths, q_length_strides, q_firsts, q_sizes, HAS_Q, QS)
    some = tl.max(valid.to(tl.int32), 0) > 0
    place = (sample * num_queries + rows) * num_heads + head
    total = tl.zeros((BM, BD), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    high = tl.full((BM,), -float("inf"), tl.float32)
    q = _load(q_ptr + sample * q_b + head * q_h, rows, q_t, dims, valid, D, BD, UPCAST)
    for s in tl.static_range(NS):
        own = tl.zeros((BM,), tl.float32)
        if some:
            start, end = _key_range(
                sample, lengths[s], starts[s], length_strides[s], start_strides[s], sizes[s],
                HAS_LENGTHS[s], HAS_STARTS[s],
            )  # fmt: skip
            # up to `whole`, blocks are seen by every row
            stop, whole = end, end
            if CAUSAL[s]:
                stop = tl.minimum(end, first + BM + shifts[s])
                whole = tl.minimum(end, first + 1 + shifts[s])
            whole = start + tl.maximum(whole - start, 0) // BN * BN
            kv_head = head // groups[s]
            k_base = keys[s] + sample * k_strides[3 * s] + kv_head * k_strides[3 * s + 2]
            v_base = values[s] + sample * v_strides[3 * s] + kv_head * v_strides[3 * s + 2]
            bias = biases[s]
            bias_q, bias_k = bias_strides[4 * s + 2], bias_strides[4 * s + 3]
            if BIASED[s]:
                bias += sample * bias_strides[4 * s] + head * bias_strides[4 * s + 1]
            gate = 0.0
            if GATED[s]:
                gate = tl.load(gates[s] + sample * gate_strides[s] + head).to(tl.float32) * _LOG2E
            state = rows
            if DROPOUT:
                state = _row_state(seeds, sample, salts[s], head, rows)
            before = high
            for block in range(start, whole, BN):
                high, own, total = _forward_block(
                    q, k_base, v_base, bias, high, own, total, block, stop, rows, dims, present,
                    shifts[s], gate, state, threshold, k_strides[3 * s + 1], v_strides[3 * s + 1],
                    bias_q, bias_k, scale, keep_scale,
                    D, BD, BN, GATED[s], BIASED[s], CAUSAL[s], False, DROPOUT, PRECISION, UPCAST,
                )  # fmt: skip
            for block in range(whole, stop, BN):
                high, own, total = _forward_block(
                    q, k_base, v_base, bias, high, own, total, block, stop, rows, dims, present,
                    shifts[s], gate, state, threshold, k_strides[3 * s + 1], v_strides[3 * s + 1],
                    bias_q, bias_k, scale, keep_scale,
                    D, BD, BN, GATED[s], BIASED[s], CAUSAL[s], True, DROPOUT, PRECISION, UPCAST,
                )  # fmt: skip
            weight = weight * tl.exp2(before - tl.where(high == -float("inf"), 0.0, high)) + own
        if NL > 1:
            log = tl.where(own > 0, (high + tl.log2(tl.where(own > 0, own, 1.0))) / _LOG2E, -float("inf"))
            tl.store(lse_ptr + place * NL + s, tl.where(valid, log, -float("inf")), mask=present)
    seen = valid & (weight > 0)
    weight = tl.where(seen, weight, 1.0)
    if NL == 1:
        log = tl.where(seen, (high + tl.log2(weight)) / _LOG2E, -float("inf"))
        tl.store(lse_ptr + place, log, mask=present)
    total = tl.where(seen[:, None], total / weight[:, None], 0.0)
    _store(
        out_ptr + (sample * num_queries * num_heads + head) * D,
        rows,
        num_heads * D,
        dims,
        total,
        present,
        D,
        BD,
    )


@triton.jit
def _query_block(
    q, grad, k_base, v_base, bias, dbias, lse, own, delta, pull, dq, dgate, block, stop, rows, dims, valid,
    shift, gate, state, threshold, k_stride, v_stride, bias_q, bias_k, dbias_q, scale, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr,
    STORED: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, DROPOUT: tl.constexpr,
    PULLED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of keys: what it adds to the gradient of the queries and of the source's gate."""
    columns = block + tl.arange(0, BN)
    if MASKED:
        inside = columns < stop
    else:
        inside = columns >= 0
    k = _load(k_base, columns, k_stride, dims, inside, D, BD, UPCAST)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
    if GATED:
        logits += gate
    if BIASED:
        logits += _bias_tile(
            bias, rows[:, None], columns[None, :], bias_q, bias_k, valid[:, None] & inside[None, :]
        )
    if MASKED:
        seen = inside[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None] + shift)
        logits = tl.where(seen, logits, -float("inf"))
    p = tl.exp2(logits - lse[:, None])
    v = _load(v_base, columns, v_stride, dims, inside, D, BD, UPCAST)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(_kept(state[:, None], columns[None, :], threshold), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if PULLED:
        ds += tl.exp2(logits - own[:, None]) * pull[:, None]
    if GATED:
        dgate += tl.sum(ds, 1)
    if STORED:
        tl.store(
            dbias + rows[:, None].to(tl.int64) * dbias_q + columns[None, :],
            ds.to(dbias.dtype.element_ty),
            mask=valid[:, None] & inside[None, :],
        )
    dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    return dq, dgate


@triton.jit
def _backward_query(
    q_ptr, out_ptr, lse_ptr, seeds, grad_ptr, grad_lse_ptr, delta_ptr, dq_ptr, dgate_ptr,
    keys, values, lengths, starts, gates, biases, dbiases,
    sizes, k_strides, v_strides, length_strides, start_strides, gate_strides, bias_strides, groups, shifts, salts,
    q_lengths, q_length_strides, q_firsts, q_sizes, q_b, q_t, q_h, g_b, g_t, g_h, dq_b, dq_t, dq_h,
    num_queries, num_heads, num_blocks, scale, threshold, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr, HAS_Q: tl.constexpr,
    NS: tl.constexpr, NL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, STORED: tl.constexpr, PULLED: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries of one head; leaves delta, the row sums of grad * out, for the other kernels.

    STORED: a source's bias has a gradient of full shape, (B, H, Lq, Lk) contiguous and zero, which is written here.
    dgate: (B, H, num_blocks, NS), this block's part.
    """
    block_of_rows, head, sample = _where_we_are(num_blocks, num_heads)
    first = block_of_rows * BM
    rows = first + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    present = rows < num_queries
    valid = _valid_rows(rows, sample, q_lengths, q_length_strides, q_firsts, q_sizes, HAS_Q, QS)
    some = tl.max(valid.to(tl.int32), 0) > 0
    place = (sample * num_queries + rows) * num_heads + head
    row_of_out = (sample * num_queries * num_heads + head) * D
    dq = tl.zeros((BM, BD), tl.float32)
    q = _load(q_ptr + sample * q_b + head * q_h, rows, q_t, dims, valid, D, BD, UPCAST)
    grad = _load(grad_ptr + sample * g_b + head * g_h, rows, g_t, dims, valid, D, BD, UPCAST)
    out = _load(out_ptr + row_of_out, rows, num_heads * D, dims, valid, D, BD, UPCAST)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    lse = _joint_lse(lse_ptr, place, valid, NL)
    if PULLED and NL == 1:
        delta -= tl.load(grad_lse_ptr + place, mask=valid, other=0.0)
    tl.store(delta_ptr + place, delta, mask=present)
    for s in tl.static_range(NS):
        dgate = tl.zeros((BM,), tl.float32)
        if some:
            start, end = _key_range(
                sample, lengths[s], starts[s], length_strides[s], start_strides[s], sizes[s],
                HAS_LENGTHS[s], HAS_STARTS[s],
            )  # fmt: skip
            stop, whole = end, end
            if CAUSAL[s]:
                stop = tl.minimum(end, first + BM + shifts[s])
                whole = tl.minimum(end, first + 1 + shifts[s])
            whole = start + tl.maximum(whole - start, 0) // BN * BN
            kv_head = head // groups[s]
            k_base = keys[s] + sample * k_strides[3 * s] + kv_head * k_strides[3 * s + 2]
            v_base = values[s] + sample * v_strides[3 * s] + kv_head * v_strides[3 * s + 2]
            bias, dbias = biases[s], dbiases[s]
            bias_q, bias_k = bias_strides[4 * s + 2], bias_strides[4 * s + 3]
            if BIASED[s]:
                bias += sample * bias_strides[4 * s] + head * bias_strides[4 * s + 1]
            if STORED[s]:
                dbias += (sample * num_heads + head) * num_queries * sizes[s]
            gate = 0.0
            if GATED[s]:
                gate = tl.load(gates[s] + sample * gate_strides[s] + head).to(tl.float32) * _LOG2E
            state = rows
            if DROPOUT:
                state = _row_state(seeds, sample, salts[s], head, rows)
            own, pull = lse, delta
            if PULLED and NL > 1:
                own = _own_lse(lse_ptr, place, s, valid, NL)
                pull = tl.load(grad_lse_ptr + place * NL + s, mask=valid, other=0.0)
            for block in range(start, whole, BN):
                dq, dgate = _query_block(
                    q, grad, k_base, v_base, bias, dbias, lse, own, delta, pull, dq, dgate, block, stop, rows,
                    dims, valid, shifts[s], gate, state, threshold, k_strides[3 * s + 1], v_strides[3 * s + 1],
                    bias_q, bias_k, sizes[s], scale, keep_scale,
                    D, BD, BN, GATED[s], BIASED[s], STORED[s], CAUSAL[s], False, DROPOUT,
                    PULLED and NL > 1, PRECISION, UPCAST,
                )  # fmt: skip
            for block in range(whole, stop, BN):
                dq, dgate = _query_block(
                    q, grad, k_base, v_base, bias, dbias, lse, own, delta, pull, dq, dgate, block, stop, rows,
                    dims, valid, shifts[s], gate, state, threshold, k_strides[3 * s + 1], v_strides[3 * s + 1],
                    bias_q, bias_k, sizes[s], scale, keep_scale,
                    D, BD, BN, GATED[s], BIASED[s], STORED[s], CAUSAL[s], True, DROPOUT,
                    PULLED and NL > 1, PRECISION, UPCAST,
                )  # fmt: skip
        if GATED[s]:
            at = ((sample * num_heads + head) * num_blocks + block_of_rows) * NS + s
            tl.store(dgate_ptr + at, tl.sum(dgate, 0))
    _store(dq_ptr + sample * dq_b + head * dq_h, rows, dq_t, dims, dq * scale, present, D, BD)


@triton.jit
def _merged_columns(
    n, sample, lengths, starts, length_strides, start_strides, sizes, shifts,
    NS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The sources one after the other as one row of columns: which of n are valid, and who is the first to see them."""
    inside = n < 0
    limit = n * 0 - _FAR
    first = 0
    for s in tl.static_range(NS):
        start, end = _key_range(
            sample, lengths[s], starts[s], length_strides[s], start_strides[s], sizes[s],
            HAS_LENGTHS[s], HAS_STARTS[s],
        )  # fmt: skip
        local = n - first
        inside |= (local >= start) & (local < end)
        if CAUSAL[s]:
            limit = tl.where((local >= 0) & (local < sizes[s]), local - shifts[s], limit)
        first += sizes[s]
    return inside, limit


@triton.jit
def _merged_load(
    ptrs, strides, n, dims, inside, sample, head, groups, sizes,
    NS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Keys or values of merged columns (n, BD), 0 outside."""
    first = 0
    for s in tl.static_range(NS):
        local = n - first
        base = ptrs[s] + sample * strides[3 * s] + (head // groups[s]) * strides[3 * s + 2]
        mine = inside & (local >= 0) & (local < sizes[s])
        part = _load(base, local, strides[3 * s + 1], dims, mine, D, BD, UPCAST)
        if s == 0:
            tile = part
        else:
            tile += part
        first += sizes[s]
    return tile


@triton.jit
def _merged_gate(gates, gate_strides, n, sample, head, sizes, NS: tl.constexpr, GATED: tl.constexpr):
    """Gates of merged columns, in units of log2."""
    gate = n.to(tl.float32) * 0.0
    first = 0
    for s in tl.static_range(NS):
        if GATED[s]:
            mine = (n >= first) & (n < first + sizes[s])
            own = tl.load(gates[s] + sample * gate_strides[s] + head).to(tl.float32) * _LOG2E
            gate = tl.where(mine, own, gate)
        first += sizes[s]
    return gate


@triton.jit
def _merged_store(
    ptrs,
    strides,
    n,
    dims,
    tile,
    sample,
    head,
    groups,
    sizes,
    NS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    first = 0
    for s in tl.static_range(NS):
        local = n - first
        base = ptrs[s] + sample * strides[3 * s] + (head // groups[s]) * strides[3 * s + 2]
        _store(base, local, strides[3 * s + 1], dims, tile, (local >= 0) & (local < sizes[s]), D, BD)
        first += sizes[s]


@triton.jit
def _backward_key(
    q_ptr, lse_ptr, seeds, grad_ptr, grad_lse_ptr, delta_ptr,
    keys, values, dkeys, dvalues, lengths, starts, gates, biases,
    sizes, k_strides, v_strides, dk_strides, dv_strides, length_strides, start_strides, gate_strides, bias_strides,
    groups, shifts, salts, q_lengths, q_length_strides, q_firsts, q_sizes, q_b, q_t, q_h, g_b, g_t, g_h,
    num_queries, num_heads, num_blocks, group, scale, threshold, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr, HAS_Q: tl.constexpr,
    NS: tl.constexpr, NL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, GATED: tl.constexpr,
    BIASED: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, PULLED: tl.constexpr, ANY_GATED: tl.constexpr, ANY_CAUSAL: tl.constexpr,
    IDS: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of merged columns, keys and values, of one kv head; all sources here share `group`.

    IDS: places of these sources among all of the call.
    """
    block_of_columns, kv_head, sample = _where_we_are(num_blocks, num_heads // group)
    n = block_of_columns * BN + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    inside, limit = _merged_columns(
        n,
        sample,
        lengths,
        starts,
        length_strides,
        start_strides,
        sizes,
        shifts,
        NS,
        HAS_LENGTHS,
        HAS_STARTS,
        CAUSAL,
    )
    some = tl.max(inside.to(tl.int32), 0) > 0
    first_row = 0
    if ANY_CAUSAL:
        first_row = tl.min(tl.where(inside, limit, _FAR), 0)
    k = _merged_load(
        keys, k_strides, n, dims, inside, sample, kv_head * group, groups, sizes, NS, D, BD, UPCAST
    )
    v = _merged_load(
        values, v_strides, n, dims, inside, sample, kv_head * group, groups, sizes, NS, D, BD, UPCAST
    )
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    for member in range(group):
        head = kv_head * group + member
        if ANY_GATED:
            gate = _merged_gate(gates, gate_strides, n, sample, head, sizes, NS, GATED)
        for r in tl.static_range(QS):
            size = q_sizes[r]
            if HAS_Q[r]:
                size = _clamped(tl.load(q_lengths[r] + sample * q_length_strides[r]), size)
            start = sample.to(tl.int32) * 0 + q_firsts[r]
            stop = start + size
            if ANY_CAUSAL:
                start = tl.maximum(start, first_row)
            if some == 0:
                stop = start
            for block in range(start, stop, BM):
                rows = block + tl.arange(0, BM)
                valid = rows < stop
                place = (sample * num_queries + rows) * num_heads + head
                lse = _joint_lse(lse_ptr, place, valid, NL)
                delta = tl.load(delta_ptr + place, mask=valid, other=0.0)
                q = _load(q_ptr + sample * q_b + head * q_h, rows, q_t, dims, valid, D, BD, UPCAST)
                grad = _load(grad_ptr + sample * g_b + head * g_h, rows, g_t, dims, valid, D, BD, UPCAST)
                logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E)
                if ANY_GATED:
                    logits += gate[:, None]
                first = 0
                for s in tl.static_range(NS):
                    if BIASED[s]:
                        local = n - first
                        mine = inside & (local >= 0) & (local < sizes[s])
                        logits += _bias_tile(
                            biases[s] + sample * bias_strides[4 * s] + head * bias_strides[4 * s + 1],
                            rows[None, :], local[:, None], bias_strides[4 * s + 2], bias_strides[4 * s + 3],
                            mine[:, None] & valid[None, :],
                        )  # fmt: skip
                    first += sizes[s]
                if ANY_CAUSAL:
                    logits = tl.where(limit[:, None] <= rows[None, :], logits, -float("inf"))
                # Padding has finite logits here, but what it adds stays in rows that are zeroed at the end.
                p = tl.exp2(logits - lse[None, :])
                dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                dropped = p
                if DROPOUT:
                    kept = logits < -float("inf")
                    first = 0
                    for s in tl.static_range(NS):
                        local = n - first
                        mine = (local >= 0) & (local < sizes[s])
                        state = _row_state(seeds, sample, salts[s], head, rows)
                        kept |= mine[:, None] & _kept(state[None, :], local[:, None], threshold)
                        first += sizes[s]
                    dropped = tl.where(kept, p * keep_scale, 0.0)
                    dp = tl.where(kept, dp * keep_scale, 0.0)
                dv += tl.dot(dropped.to(grad.dtype), grad, input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                if PULLED and NL > 1:
                    first = 0
                    for s in tl.static_range(NS):
                        mine = (n >= first) & (n < first + sizes[s])
                        own = _own_lse(lse_ptr, place, IDS[s], valid, NL)
                        pull = tl.load(grad_lse_ptr + place * NL + IDS[s], mask=valid, other=0.0)
                        ds += tl.where(mine[:, None], tl.exp2(logits - own[None, :]) * pull[None, :], 0.0)
                        first += sizes[s]
                dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    dk = tl.where(inside[:, None], dk * scale, 0.0)
    dv = tl.where(inside[:, None], dv, 0.0)
    _merged_store(dkeys, dk_strides, n, dims, dk, sample, kv_head * group, groups, sizes, NS, D, BD)
    _merged_store(dvalues, dv_strides, n, dims, dv, sample, kv_head * group, groups, sizes, NS, D, BD)


@triton.jit
def _backward_bias(
    q_ptr, lse_ptr, seeds, grad_ptr, grad_lse_ptr, delta_ptr, dbias_ptr,
    key, value, lengths, starts, gate_ptr, bias_ptr,
    size, k_b, k_t, k_h, v_b, v_t, v_h, length_stride, start_stride, gate_stride,
    bias_b, bias_h, bias_q, bias_k, group, shift, salt,
    q_lengths, q_length_strides, q_firsts, q_sizes, q_b, q_t, q_h, g_b, g_t, g_h,
    batch, num_queries, num_heads, query_tiles, key_tiles, scale, threshold, keep_scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr, HAS_Q: tl.constexpr,
    NL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, GATED: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PULLED: tl.constexpr, ID: tl.constexpr, ALL_SAMPLES: tl.constexpr, ALL_HEADS: tl.constexpr,
    ALL_QUERIES: tl.constexpr, ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of a bias's gradient: dS summed over all that the bias broadcasts to, in a fixed order."""
    program = tl.program_id(0)
    tiles = 1
    if not ALL_QUERIES:
        tiles *= query_tiles
    if not ALL_KEYS:
        tiles *= key_tiles
    tile = program % tiles
    other = program // tiles
    first_query, last_query = 0, query_tiles
    first_key, last_key = 0, key_tiles
    if not ALL_QUERIES:
        first_query = tile % query_tiles
        last_query = first_query + 1
        tile = tile // query_tiles
    if not ALL_KEYS:
        first_key = tile
        last_key = tile + 1
    first_head, last_head = 0, num_heads
    head_place = 0
    if not ALL_HEADS:
        first_head = other % num_heads
        last_head = first_head + 1
        head_place = (other % num_heads).to(tl.int64)
        other = other // num_heads
    first_sample, last_sample = 0, batch
    sample_place = 0
    if not ALL_SAMPLES:
        first_sample = other
        last_sample = other + 1
        sample_place = other.to(tl.int64)
    dims = tl.arange(0, BD)
    total = tl.zeros((BM, BN), tl.float32)
    for sample_number in range(first_sample, last_sample):
        sample = (sample_number + tl.program_id(1)).to(tl.int64)  # the second is 0, and makes it a tensor
        start, end = _key_range(
            sample, lengths, starts, length_stride, start_stride, size, HAS_LENGTHS, HAS_STARTS
        )
        for head_number in range(first_head, last_head):
            head = (head_number + tl.program_id(1)).to(tl.int64)
            gate = 0.0
            if GATED:
                gate = tl.load(gate_ptr + sample * gate_stride + head).to(tl.float32) * _LOG2E
            for query_tile in range(first_query, last_query):
                rows = query_tile * BM + tl.arange(0, BM)
                valid = _valid_rows(rows, sample, q_lengths, q_length_strides, q_firsts, q_sizes, HAS_Q, QS)
                if tl.max(valid.to(tl.int32), 0) > 0:
                    place = (sample * num_queries + rows) * num_heads + head
                    lse = _joint_lse(lse_ptr, place, valid, NL)
                    delta = tl.load(delta_ptr + place, mask=valid, other=0.0)
                    q = _load(q_ptr + sample * q_b + head * q_h, rows, q_t, dims, valid, D, BD, UPCAST)
                    grad = _load(grad_ptr + sample * g_b + head * g_h, rows, g_t, dims, valid, D, BD, UPCAST)
                    for key_tile in range(first_key, last_key):
                        columns = key_tile * BN + tl.arange(0, BN)
                        inside = (columns >= start) & (columns < end)
                        k = _load(
                            key + sample * k_b + head // group * k_h,
                            columns,
                            k_t,
                            dims,
                            inside,
                            D,
                            BD,
                            UPCAST,
                        )
                        v = _load(
                            value + sample * v_b + head // group * v_h,
                            columns,
                            v_t,
                            dims,
                            inside,
                            D,
                            BD,
                            UPCAST,
                        )
                        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E) + gate
                        logits += _bias_tile(
                            bias_ptr + sample * bias_b + head * bias_h, rows[:, None], columns[None, :],
                            bias_q, bias_k, valid[:, None] & inside[None, :],
                        )  # fmt: skip
                        seen = valid[:, None] & inside[None, :]
                        if CAUSAL:
                            seen = seen & (columns[None, :] <= rows[:, None] + shift)
                        logits = tl.where(seen, logits, -float("inf"))
                        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                        if DROPOUT:
                            state = _row_state(seeds, sample, salt, head, rows)
                            kept = _kept(state[:, None], columns[None, :], threshold)
                            dp = tl.where(kept, dp * keep_scale, 0.0)
                        total += tl.exp2(logits - lse[:, None]) * (dp - delta[:, None])
                        if PULLED and NL > 1:
                            own = _own_lse(lse_ptr, place, ID, valid, NL)
                            pull = tl.load(grad_lse_ptr + place * NL + ID, mask=valid, other=0.0)
                            total += tl.exp2(logits - own[:, None]) * pull[:, None]
    # The gradient is contiguous, with size 1 where the bias broadcasts.
    wide = 1 if ALL_KEYS else size
    tall = 1 if ALL_QUERIES else num_queries
    num_bias_heads = 1 if ALL_HEADS else num_heads
    base = dbias_ptr + sample_place * num_bias_heads * tall * wide
    base += head_place * tall * wide
    row = first_query * BM + tl.arange(0, BM)
    column = first_key * BN + tl.arange(0, BN)
    if ALL_QUERIES and ALL_KEYS:
        tl.store(base, tl.sum(tl.sum(total, 1), 0).to(dbias_ptr.dtype.element_ty))
    elif ALL_QUERIES:
        tl.store(base + column, tl.sum(total, 0).to(dbias_ptr.dtype.element_ty), mask=column < size)
    elif ALL_KEYS:
        tl.store(base + row, tl.sum(total, 1).to(dbias_ptr.dtype.element_ty), mask=row < num_queries)
    else:
        tl.store(
            base + row[:, None].to(tl.int64) * wide + column[None, :],
            total.to(dbias_ptr.dtype.element_ty),
            mask=(row < num_queries)[:, None] & (column < size)[None, :],
        )


@triton.jit
def _short_forward(
    q_ptr, out_ptr, lse_ptr,
    keys, values, lengths, starts, gates,
    sizes, k_strides, v_strides, length_strides, start_strides, gate_strides, groups, shifts,
    q_lengths, q_length_strides, q_firsts, q_sizes, q_b, q_t, q_h,
    num_queries, num_heads, num_splits, rows_per_split, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr, HAS_Q: tl.constexpr,
    NS: tl.constexpr, NL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, GATED: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ANY_GATED: tl.constexpr,
    ANY_CAUSAL: tl.constexpr,
):  # fmt: skip
    """All keys of all sources in one tile; the queries of one head, or a run of them, block by block."""
    split, head, sample = _where_we_are(num_splits, num_heads)
    n = tl.arange(0, BN)
    dims = tl.arange(0, BD)
    inside, limit = _merged_columns(
        n,
        sample,
        lengths,
        starts,
        length_strides,
        start_strides,
        sizes,
        shifts,
        NS,
        HAS_LENGTHS,
        HAS_STARTS,
        CAUSAL,
    )
    k = _merged_load(keys, k_strides, n, dims, inside, sample, head, groups, sizes, NS, D, BD, UPCAST)
    v = _merged_load(values, v_strides, n, dims, inside, sample, head, groups, sizes, NS, D, BD, UPCAST)
    if ANY_GATED:
        gate = _merged_gate(gates, gate_strides, n, sample, head, sizes, NS, GATED)
    row_of_out = (sample * num_queries * num_heads + head) * D
    begin = split * rows_per_split
    for block in range(begin, tl.minimum(begin + rows_per_split, num_queries), BM):
        rows = block + tl.arange(0, BM)
        present = rows < num_queries
        valid = _valid_rows(rows, sample, q_lengths, q_length_strides, q_firsts, q_sizes, HAS_Q, QS)
        q = _load(q_ptr + sample * q_b + head * q_h, rows, q_t, dims, valid, D, BD, UPCAST)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
        if ANY_GATED:
            logits += gate[None, :]
        seen = inside[None, :]
        if ANY_CAUSAL:
            seen = seen & (limit[None, :] <= rows[:, None])
        logits = tl.where(seen, logits, -float("inf"))
        high = tl.max(logits, 1)
        high = tl.where(high == -float("inf"), 0.0, high)
        p = tl.exp2(logits - high[:, None])
        weight = tl.sum(p, 1)
        some = valid & (weight > 0)
        place = (sample * num_queries + rows) * num_heads + head
        if NL == 1:
            log = tl.where(some, (high + tl.log2(tl.where(some, weight, 1.0))) / _LOG2E, -float("inf"))
            tl.store(lse_ptr + place, log, mask=present)
        else:
            first = 0
            for s in tl.static_range(NS):
                mine = (n >= first) & (n < first + sizes[s])
                own = tl.sum(tl.where(mine[None, :], p, 0.0), 1)
                log = (high + tl.log2(tl.where(own > 0, own, 1.0))) / _LOG2E
                tl.store(
                    lse_ptr + place * NL + s, tl.where(valid & (own > 0), log, -float("inf")), mask=present
                )
                first += sizes[s]
        total = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        total = tl.where(some[:, None], total / tl.where(some, weight, 1.0)[:, None], 0.0)
        _store(out_ptr + row_of_out, rows, num_heads * D, dims, total, present, D, BD)


@triton.jit
def _short_backward(
    q_ptr, lse_ptr, grad_ptr, grad_lse_ptr, dq_ptr, dk_part, dv_part, dgate_ptr,
    keys, values, dkeys, dvalues, lengths, starts, gates,
    sizes, k_strides, v_strides, dk_strides, dv_strides, length_strides, start_strides, gate_strides, groups, shifts,
    q_lengths, q_length_strides, q_firsts, q_sizes, q_b, q_t, q_h, g_b, g_t, g_h, dq_b, dq_t, dq_h,
    num_queries, num_keys, num_heads, num_splits, rows_per_split, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr, HAS_Q: tl.constexpr,
    NS: tl.constexpr, NL: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_STARTS: tl.constexpr, GATED: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, ANY_GATED: tl.constexpr,
    ANY_CAUSAL: tl.constexpr, PULLED: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of a run of queries of one head: each is read once, and its gradient written once.

    Gradients of keys and values go to dkeys and dvalues (DIRECT), or as this program's part to dk_part and dv_part
    (B, H, num_splits, num_keys, D); gates' to dgate (B, H, num_splits, NS).
    """
    split, head, sample = _where_we_are(num_splits, num_heads)
    n = tl.arange(0, BN)
    dims = tl.arange(0, BD)
    inside, limit = _merged_columns(
        n,
        sample,
        lengths,
        starts,
        length_strides,
        start_strides,
        sizes,
        shifts,
        NS,
        HAS_LENGTHS,
        HAS_STARTS,
        CAUSAL,
    )
    k = _merged_load(keys, k_strides, n, dims, inside, sample, head, groups, sizes, NS, D, BD, UPCAST)
    v = _merged_load(values, v_strides, n, dims, inside, sample, head, groups, sizes, NS, D, BD, UPCAST)
    if ANY_GATED:
        gate = _merged_gate(gates, gate_strides, n, sample, head, sizes, NS, GATED)
        dgate = tl.zeros((BN,), tl.float32)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    begin = split * rows_per_split
    for block in range(begin, tl.minimum(begin + rows_per_split, num_queries), BM):
        rows = block + tl.arange(0, BM)
        present = rows < num_queries
        valid = _valid_rows(rows, sample, q_lengths, q_length_strides, q_firsts, q_sizes, HAS_Q, QS)
        place = (sample * num_queries + rows) * num_heads + head
        lse = _joint_lse(lse_ptr, place, valid, NL)
        q = _load(q_ptr + sample * q_b + head * q_h, rows, q_t, dims, valid, D, BD, UPCAST)
        grad = _load(grad_ptr + sample * g_b + head * g_h, rows, g_t, dims, valid, D, BD, UPCAST)
        # keys by queries: what both products of the keys need as their left operand then lies in registers
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E)
        if ANY_GATED:
            logits += gate[:, None]
        seen = inside[:, None]
        if ANY_CAUSAL:
            seen = seen & (limit[:, None] <= rows[None, :])
        logits = tl.where(seen, logits, -float("inf"))
        p = tl.exp2(logits - lse[None, :])
        dv += tl.dot(p.to(grad.dtype), grad, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        # All keys are here, so delta needs no output: the mean of dp under p. Where logits are thousands, their rounded
        # log-sum-exp leaves p a common factor, which a plain sum would turn into gradients where next to none are.
        weight = tl.sum(p, 0)
        delta = tl.sum(p * dp, 0) / tl.where(weight > 0, weight, 1.0)
        if PULLED and NL == 1:
            delta -= tl.load(grad_lse_ptr + place, mask=valid, other=0.0)
        ds = p * (dp - delta[None, :])
        if PULLED and NL > 1:
            first = 0
            for s in tl.static_range(NS):
                mine = (n >= first) & (n < first + sizes[s])
                own = _own_lse(lse_ptr, place, s, valid, NL)
                pull = tl.load(grad_lse_ptr + place * NL + s, mask=valid, other=0.0)
                ds += tl.where(mine[:, None], tl.exp2(logits - own[None, :]) * pull[None, :], 0.0)
                first += sizes[s]
        if ANY_GATED:
            dgate += tl.sum(ds, 1)
        rounded = ds.to(q.dtype)
        dk += tl.dot(rounded, q, input_precision=PRECISION)
        dq = tl.dot(tl.trans(rounded), k, input_precision=PRECISION) * scale
        _store(dq_ptr + sample * dq_b + head * dq_h, rows, dq_t, dims, dq, present, D, BD)
    dk *= scale
    if DIRECT:
        _merged_store(dkeys, dk_strides, n, dims, dk, sample, head, groups, sizes, NS, D, BD)
        _merged_store(dvalues, dv_strides, n, dims, dv, sample, head, groups, sizes, NS, D, BD)
    else:
        part = ((sample * num_heads + head) * num_splits + split) * num_keys * D
        _store(dk_part + part, n, D, dims, dk, n < num_keys, D, BD)
        _store(dv_part + part, n, D, dims, dv, n < num_keys, D, BD)
    if ANY_GATED:
        first = 0
        for s in tl.static_range(NS):
            mine = (n >= first) & (n < first + sizes[s])
            at = ((sample * num_heads + head) * num_splits + split) * NS + s
            tl.store(dgate_ptr + at, tl.sum(tl.where(mine, dgate, 0.0), 0))
            first += sizes[s]


@dataclass(frozen=True)
class Call:
    """One call of the kernels: what forward and backward have in common.

    query: (B, Lq, H, D), unit stride in D. rows: which of its rows are queries. dropout: as in the tiled form.
    """

    query: Tensor
    sources: Sequence[KeySource]
    rows: Sequence[QueryRange]
    scale: float
    dropout: Dropout | None = None

    @property
    def num_keys(self) -> int:
        return sum(source.key.shape[1] for source in self.sources)

    @property
    def width(self) -> int:
        return max(16, triton.next_power_of_2(self.query.shape[3]))

    @property
    def shape_class(self) -> str:
        return f"{'half' if self.query.element_size() == 2 else 'fp32'} d{max(64, self.width)}"

    def short_tile(self) -> int | None:
        """The size of the tile that holds all keys, where the short form serves this call; None = streaming."""
        if self.dropout is not None or any(source.bias is not None for source in self.sources):
            return None
        most: int = configs.choose("attention_short", self.shape_class, self.query.device)["keys"]
        return max(16, triton.next_power_of_2(self.num_keys)) if self.num_keys <= most else None

    def launch(self, kernel: str, shape_class: str | None = None) -> dict[str, Any]:
        """The configuration of a kernel: blocks no larger than the shapes need, and the options of the launch."""
        if shape_class is None:
            # A bias is one more tile to hold; at other widths the same blocks leave room for it.
            biased = any(source.bias is not None for source in self.sources)
            shape_class = "half d128 bias" if biased and self.shape_class == "half d128" else self.shape_class
        config = configs.choose(kernel, shape_class, self.query.device)
        config["BM"] = min(config["BM"], max(16, triton.next_power_of_2(self.query.shape[1])))
        if "BN" in config:
            longest = max(source.key.shape[1] for source in self.sources)
            config["BN"] = min(config["BN"], max(16, triton.next_power_of_2(longest)))
        return config

    def constants(self) -> dict[str, Any]:
        query = self.query
        tf32 = query.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return {
            "D": query.shape[3],
            "BD": self.width,
            "QS": len(self.rows),
            "HAS_Q": tuple(r.lengths is not None for r in self.rows),
            "PRECISION": "tf32" if tf32 else "ieee",
            "UPCAST": query.dtype == torch.bfloat16 and not query.is_cuda,
        }

    def row_arguments(self) -> tuple[Any, ...]:
        """q_lengths, q_length_strides, q_firsts, q_sizes, q_b, q_t, q_h."""
        lengths = tuple(self.query if r.lengths is None else r.lengths for r in self.rows)
        strides = tuple(0 if r.lengths is None else r.lengths.stride(0) for r in self.rows)
        return (
            lengths, strides, tuple(r.first for r in self.rows), tuple(r.size for r in self.rows),
            *self.query.stride()[:3],
        )  # fmt: skip

    def dropout_arguments(self) -> tuple[int, float]:
        """threshold, keep_scale."""
        if self.dropout is None:
            return 0, 1.0
        return self.dropout.threshold, 1 / (1 - self.dropout.probability)


class _Sources:
    """The tuples that the kernels take, for some of a call's sources; `places` are theirs in the call."""

    def __init__(self, call: Call, places: Sequence[int]) -> None:
        chosen = [call.sources[place] for place in places]
        nothing = call.query  # stands for a pointer that is not there
        num_heads = call.query.shape[2]

        def pointers(tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
            return tuple(nothing if tensor is None else tensor for tensor in tensors)

        def stride(tensor: Tensor | None, dim: int) -> int:
            return 0 if tensor is None or tensor.shape[dim] == 1 else tensor.stride(dim)

        self.keys, self.values = pointers([s.key for s in chosen]), pointers([s.value for s in chosen])
        self.lengths, self.starts = (
            pointers([s.lengths for s in chosen]),
            pointers([s.starts for s in chosen]),
        )
        self.gates, self.biases = pointers([s.gate for s in chosen]), pointers([s.bias for s in chosen])
        self.sizes = tuple(s.key.shape[1] for s in chosen)
        self.key_strides, self.value_strides = strides_of(self.keys), strides_of(self.values)
        self.length_strides = tuple(stride(s.lengths, 0) for s in chosen)
        self.start_strides = tuple(stride(s.starts, 0) for s in chosen)
        self.gate_strides = tuple(stride(s.gate, 0) for s in chosen)
        self.bias_strides = tuple(stride(s.bias, dim) for s in chosen for dim in range(4))
        self.groups = tuple(num_heads // s.key.shape[2] for s in chosen)
        self.shifts = tuple(s.shift or 0 for s in chosen)
        first = call.dropout.place if call.dropout is not None else 0
        self.salts = tuple(((first + place) * 0x9E3779B1) & 0xFFFFFFFF for place in places)
        self.flags = {
            "NS": len(chosen),
            "HAS_LENGTHS": tuple(s.lengths is not None for s in chosen),
            "HAS_STARTS": tuple(s.starts is not None for s in chosen),
            "GATED": tuple(s.gate is not None for s in chosen),
            "CAUSAL": tuple(s.shift is not None for s in chosen),
        }
        self.biased = {
            "BIASED": tuple(s.bias is not None for s in chosen),
            "DROPOUT": call.dropout is not None,
        }
        self.any = {"ANY_GATED": any(self.flags["GATED"]), "ANY_CAUSAL": any(self.flags["CAUSAL"])}  # type: ignore[arg-type]

    @property
    def masks(self) -> tuple[Any, ...]:
        return self.lengths, self.starts, self.gates


def strides_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The strides of each, those of (B, L, H, D) but the last, one tensor after the other."""
    return tuple(tensor.stride(dim) for tensor in tensors for dim in range(3))


def _splits(call: Call, block: int) -> tuple[int, int]:
    """Into how many programs the queries of a head are cut, and how many rows each has: by the shapes alone."""
    batch, num_queries, num_heads, _ = call.query.shape
    num_blocks = triton.cdiv(num_queries, block)
    wanted = min(num_blocks, max(1, triton.cdiv(_PROGRAMS, batch * num_heads)))
    rows = triton.cdiv(num_blocks, wanted) * block
    return triton.cdiv(num_queries, rows), rows


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; make that the one where the tensors lie."""

    @functools.wraps(launch)
    def run(call: Call, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(call.query):
            return launch(call, *args, **kwargs)

    return run


@_on_its_device
def attend(call: Call, *, out: Tensor, lse: Tensor) -> None:
    """Fill out (B, Lq, H, D) and lse fp32, both contiguous, under one softmax over the sources.

    lse: (B, Lq, H, S), of each source, or (B, Lq, H), of all. Rows without a visible key, or outside `rows`: out 0,
    lse -inf.
    """
    query = call.query
    batch, num_queries, num_heads, _ = query.shape
    num_lse = lse.shape[3] if lse.dim() == 4 else 1
    given = _Sources(call, range(len(call.sources)))
    tile = call.short_tile()
    if tile is not None:
        config = call.launch("attention_short_forward", f"{call.shape_class} n{max(64, tile)}")
        num_splits, rows_per_split = _splits(call, config["BM"])
        _short_forward[(num_splits * num_heads * batch,)](
            query, out, lse, given.keys, given.values, *given.masks,
            given.sizes, given.key_strides, given.value_strides, given.length_strides, given.start_strides,
            given.gate_strides, given.groups, given.shifts, *call.row_arguments(),
            num_queries, num_heads, num_splits, rows_per_split, call.scale,
            NL=num_lse, BN=tile, **call.constants(), **given.flags, **given.any, **config,
        )  # fmt: skip
        return
    config = call.launch("attention_forward")
    num_blocks = triton.cdiv(num_queries, config["BM"])
    _forward[(num_blocks * num_heads * batch,)](
        query, out, lse, query if call.dropout is None else call.dropout.seeds,
        given.keys, given.values, *given.masks, given.biases,
        given.sizes, given.key_strides, given.value_strides, given.length_strides, given.start_strides,
        given.gate_strides, given.bias_strides, given.groups, given.shifts, given.salts, *call.row_arguments(),
        num_queries, num_heads, num_blocks, call.scale, *call.dropout_arguments(),
        NL=num_lse, **call.constants(), **given.flags, **given.biased, **config,
    )  # fmt: skip


@dataclass(frozen=True)
class Gradients:
    """Where the gradients go: query, keys and values are filled; gates and biases are made, None where not wanted.

    gates: (B, H) fp32 each. biases: contiguous, of the bias's shape and dtype.
    """

    query: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    gates: list[Tensor | None]
    biases: list[Tensor | None]


@_on_its_device
def attend_backward(
    call: Call,
    grad_out: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_keys: Sequence[Tensor],
    grad_values: Sequence[Tensor],
    wants_bias: Sequence[bool],
    grad_lse: Tensor | None = None,
) -> Gradients:
    """Fill grad_query, grad_keys and grad_values (any strides, unit in D); return them with those of gates and biases.

    grad_lse: fp32, contiguous, of lse's shape. out, lse: what `attend` filled.
    """
    query = call.query
    batch, num_queries, num_heads, width = query.shape
    num_sources = len(call.sources)
    num_lse = lse.shape[3] if lse.dim() == 4 else 1
    gradients = Gradients(grad_query, grad_keys, grad_values, [None] * num_sources, [None] * num_sources)
    given = _Sources(call, range(num_sources))
    pulled = {"PULLED": grad_lse is not None, "NL": num_lse}
    pull = lse if grad_lse is None else grad_lse
    tile = call.short_tile()
    grad_strides = (*grad_out.stride()[:3], *grad_query.stride()[:3])

    def keep_gates(parts: Tensor) -> None:
        sums = parts.sum(2)  # (B, H, S)
        for place, source in enumerate(call.sources):
            if source.gate is not None:
                gradients.gates[place] = sums[..., place]

    if tile is not None:
        config = call.launch("attention_short_backward", f"{call.shape_class} n{max(64, tile)}")
        num_splits, rows_per_split = _splits(call, config["BM"])
        direct = num_splits == 1 and all(group == 1 for group in given.groups)
        shape = (0,) if direct else (batch, num_heads, num_splits, call.num_keys, width)
        key_parts, value_parts = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
        gate_parts = query.new_empty(batch, num_heads, num_splits, num_sources, dtype=torch.float32)
        _short_backward[(num_splits * num_heads * batch,)](
            query, lse, grad_out, pull, grad_query, key_parts, value_parts, gate_parts,
            given.keys, given.values, tuple(grad_keys), tuple(grad_values), *given.masks,
            given.sizes, given.key_strides, given.value_strides, strides_of(grad_keys), strides_of(grad_values),
            given.length_strides, given.start_strides, given.gate_strides, given.groups, given.shifts,
            *call.row_arguments(), *grad_strides,
            num_queries, call.num_keys, num_heads, num_splits, rows_per_split, call.scale,
            BN=tile, DIRECT=direct, **pulled, **call.constants(), **given.flags, **given.any, **config,
        )  # fmt: skip
        if given.any["ANY_GATED"]:
            keep_gates(gate_parts)
        if not direct:
            _sum_parts(call, key_parts, grad_keys)
            _sum_parts(call, value_parts, grad_values)
        return gradients

    config = call.launch("attention_query")
    num_blocks = triton.cdiv(num_queries, config["BM"])
    seeds = query if call.dropout is None else call.dropout.seeds
    delta = lse.new_empty(lse.shape[:3])
    gate_parts = query.new_empty(batch, num_heads, num_blocks, num_sources, dtype=torch.float32)
    stored = []
    for place, source in enumerate(call.sources):
        full = (batch, num_heads, num_queries, source.key.shape[1])
        wanted = source.bias is not None and wants_bias[place]
        stored.append(wanted and source.bias.shape == full)  # type: ignore[union-attr]
        if wanted and source.bias is not None:
            make = torch.zeros if stored[-1] else torch.empty
            gradients.biases[place] = make(source.bias.shape, dtype=source.bias.dtype, device=query.device)
    filled = tuple(query if grad is None else grad for grad in gradients.biases)
    _backward_query[(num_blocks * num_heads * batch,)](
        query, out, lse, seeds, grad_out, pull, delta, grad_query, gate_parts,
        given.keys, given.values, *given.masks, given.biases, filled,
        given.sizes, given.key_strides, given.value_strides, given.length_strides, given.start_strides,
        given.gate_strides, given.bias_strides, given.groups, given.shifts, given.salts,
        *call.row_arguments(), *grad_strides,
        num_queries, num_heads, num_blocks, call.scale, *call.dropout_arguments(),
        STORED=tuple(stored), **pulled, **call.constants(), **given.flags, **given.biased, **config,
    )  # fmt: skip
    if given.any["ANY_GATED"]:
        keep_gates(gate_parts)

    config = call.launch("attention_key")
    for group in sorted(set(given.groups)):
        places = [place for place in range(num_sources) if given.groups[place] == group]
        some = _Sources(call, places)
        dkeys, dvalues = (tuple(grads[place] for place in places) for grads in (grad_keys, grad_values))
        num_blocks = triton.cdiv(sum(some.sizes), config["BN"])
        if num_blocks == 0:
            continue
        _backward_key[(num_blocks * (num_heads // group) * batch,)](
            query, lse, seeds, grad_out, pull, delta,
            some.keys, some.values, dkeys, dvalues, *some.masks, some.biases,
            some.sizes, some.key_strides, some.value_strides, strides_of(dkeys), strides_of(dvalues),
            some.length_strides, some.start_strides, some.gate_strides, some.bias_strides,
            some.groups, some.shifts, some.salts, *call.row_arguments(), *grad_out.stride()[:3],
            num_queries, num_heads, num_blocks, group, call.scale, *call.dropout_arguments(),
            IDS=tuple(places), **pulled, **call.constants(), **some.flags, **some.biased, **some.any, **config,
        )  # fmt: skip

    for place, grad in enumerate(gradients.biases):
        if grad is not None and not stored[place]:
            _launch_bias(call, place, grad, grad_out, lse, delta, pull, pulled)
    return gradients


def _sum_parts(call: Call, parts: Tensor, grads: Sequence[Tensor]) -> None:
    """Add up (B, H, splits, all keys, D) over splits and over the heads that share a key."""
    by_head = parts.sum(2)
    first = 0
    for grad in grads:
        batch, size, num_kv_heads, width = grad.shape
        group = call.query.shape[2] // num_kv_heads
        mine = by_head[:, :, first : first + size].reshape(batch, num_kv_heads, group, size, width)
        grad.copy_(mine.sum(2).transpose(1, 2))
        first += size


def _launch_bias(
    call: Call,
    place: int,
    grad: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    pull: Tensor,
    pulled: Any,
) -> None:
    query, source = call.query, call.sources[place]
    assert source.bias is not None
    batch, num_queries, num_heads, _ = query.shape
    one = _Sources(call, [place])
    config = call.launch("attention_bias")
    size = source.key.shape[1]
    tiles = (triton.cdiv(num_queries, config["BM"]), triton.cdiv(size, config["BN"]))
    names = ("ALL_SAMPLES", "ALL_HEADS", "ALL_QUERIES", "ALL_KEYS")
    whole = {name: grad.shape[dim] == 1 for dim, name in enumerate(names)}
    owned = zip((batch, num_heads, *tiles), whole.values(), strict=True)
    num_programs = 1
    for count, all_of_it in owned:
        num_programs *= 1 if all_of_it else count
    if num_programs == 0 or 0 in tiles:
        grad.zero_()
        return
    flags = {name: one.flags[name][0] for name in ("HAS_LENGTHS", "HAS_STARTS", "GATED", "CAUSAL")}  # type: ignore[index]
    _backward_bias[(num_programs,)](
        query, lse, query if call.dropout is None else call.dropout.seeds, grad_out, pull, delta, grad,
        one.keys[0], one.values[0], one.lengths[0], one.starts[0], one.gates[0], one.biases[0],
        size, *one.key_strides, *one.value_strides, one.length_strides[0], one.start_strides[0],
        one.gate_strides[0], *one.bias_strides, one.groups[0], one.shifts[0], one.salts[0],
        *call.row_arguments(), *grad_out.stride()[:3],
        batch, num_queries, num_heads, *tiles, call.scale, *call.dropout_arguments(),
        ID=place, DROPOUT=call.dropout is not None, **whole, **flags, **pulled, **call.constants(), **config,
    )  # fmt: skip
