"""Triton kernels of attention, shared by `packed_attention` and `cross_modal_attention`.

Queries, keys and values are views with any strides (a unit one in D): parts of one buffer, or tensors of
their own. What is valid is a
table of ranges per sample, so padding is skipped block by block; the softmax is an online one, and the
backward pass recomputes the probabilities
from the log-sum-exp. Two backward kernels, one that owns query blocks and one that owns key blocks, keep it
free of atomics: every run gives the
same bits. The price is that the probabilities are computed twice there.

Import this module only where a kernel is about to run: it needs triton, and ``TRITON_INTERPRET=1`` has to
be set before.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, tiles and constants, none of which has a type for Python)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Ranges:
    """The rows that are valid: begin and end (B, S) int32, contiguous; a range is empty if begin >= end."""

    begin: Tensor
    end: Tensor


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, gate_ptr,
    q_begin, q_end, k_begin, k_end,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, gate_b,
    num_queries, num_heads, group, causal_from, shift, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    QS: tl.constexpr, KS: tl.constexpr, GATED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head against all the keys it sees."""
    first = tl.program_id(0) * BM
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    rows = first + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    valid = rows < 0
    for s in tl.static_range(QS):
        valid |= (rows >= tl.load(q_begin + sample * QS + s)) & (rows < tl.load(q_end + sample * QS + s))
    total = tl.zeros((BM, BD), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    high = tl.full((BM,), -float("inf"), tl.float32)
    if tl.max(valid.to(tl.int32), 0) > 0:
        q = tl.load(
            q_ptr + sample * q_b + head * q_h + rows[:, None].to(tl.int64) * q_t + dims[None, :],
            mask=valid[:, None] & (dims < D)[None, :], other=0.0,
        )  # fmt: skip
        for s in tl.static_range(KS):
            start = tl.load(k_begin + sample * KS + s)
            end = tl.load(k_end + sample * KS + s)
            stop = end
            if CAUSAL:
                stop = tl.where(start >= causal_from, tl.minimum(end, first + BM + shift), end)
            if GATED:
                gate = tl.load(gate_ptr + sample * gate_b + s * num_heads + head).to(tl.float32) * _LOG2E
            for block in range(start, stop, BN):
                columns = block + tl.arange(0, BN)
                inside = columns < end
                k = tl.load(
                    k_ptr + sample * k_b + (head // group) * k_h
                    + columns[None, :].to(tl.int64) * k_t + dims[:, None],
                    mask=inside[None, :] & (dims < D)[:, None], other=0.0,
                )  # fmt: skip
                logits = tl.dot(q, k, input_precision=PRECISION) * (scale * _LOG2E)
                if GATED:
                    logits += gate
                seen = valid[:, None] & inside[None, :]
                if CAUSAL:
                    seen &= (columns < causal_from)[None, :] | (columns[None, :] <= rows[:, None] + shift)
                logits = tl.where(seen, logits, -float("inf"))
                peak = tl.maximum(high, tl.max(logits, 1))
                # a row that has seen nothing yet: -inf - -inf would be NaN
                base = tl.where(peak == -float("inf"), 0.0, peak)
                fade = tl.exp2(high - base)
                p = tl.exp2(logits - base[:, None])
                weight = weight * fade + tl.sum(p, 1)
                v = tl.load(
                    v_ptr + sample * v_b + (head // group) * v_h
                    + columns[:, None].to(tl.int64) * v_t + dims[None, :],
                    mask=inside[:, None] & (dims < D)[None, :], other=0.0,
                )  # fmt: skip
                total = total * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
                high = peak
    lse = tl.where(weight > 0, high + tl.log2(tl.where(weight > 0, weight, 1.0)), -float("inf")) / _LOG2E
    total = total / tl.where(weight > 0, weight, 1.0)[:, None]
    place = (sample * num_queries + rows) * num_heads + head
    tl.store(
        out_ptr + place[:, None] * D + dims[None, :], total.to(out_ptr.dtype.element_ty),
        mask=(rows < num_queries)[:, None] & (dims < D)[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + place, lse, mask=rows < num_queries)


@triton.jit
def _backward_query(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, gate_ptr, grad_ptr, grad_lse_ptr, delta_ptr, dq_ptr,
    q_begin, q_end, k_begin, k_end,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, dq_b, dq_t, dq_h, gate_b,
    num_queries, num_heads, group, causal_from, shift, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr,
    KS: tl.constexpr, GATED: tl.constexpr, CAUSAL: tl.constexpr, PULLED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries of one head; leaves delta, row sums of grad * out, for the next."""
    first = tl.program_id(0) * BM
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    rows = first + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    valid = rows < 0
    for s in tl.static_range(QS):
        valid |= (rows >= tl.load(q_begin + sample * QS + s)) & (rows < tl.load(q_end + sample * QS + s))
    dq = tl.zeros((BM, BD), tl.float32)
    if tl.max(valid.to(tl.int32), 0) > 0:
        present = valid[:, None] & (dims < D)[None, :]
        place = (sample * num_queries + rows) * num_heads + head
        lse = tl.load(lse_ptr + place, mask=valid, other=-float("inf"))
        lse = tl.where(lse == -float("inf"), float("inf"), lse * _LOG2E)
        q = tl.load(
            q_ptr + sample * q_b + head * q_h + rows[:, None].to(tl.int64) * q_t + dims[None, :],
            mask=present, other=0.0,
        )  # fmt: skip
        grad = tl.load(
            grad_ptr + sample * g_b + head * g_h + rows[:, None].to(tl.int64) * g_t + dims[None, :],
            mask=present, other=0.0,
        )  # fmt: skip
        out = tl.load(out_ptr + place[:, None] * D + dims[None, :], mask=present, other=0.0)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        if PULLED:
            delta -= tl.load(grad_lse_ptr + place, mask=valid, other=0.0)
        tl.store(delta_ptr + place, delta, mask=valid)
        for s in tl.static_range(KS):
            start = tl.load(k_begin + sample * KS + s)
            end = tl.load(k_end + sample * KS + s)
            stop = end
            if CAUSAL:
                stop = tl.where(start >= causal_from, tl.minimum(end, first + BM + shift), end)
            if GATED:
                gate = tl.load(gate_ptr + sample * gate_b + s * num_heads + head).to(tl.float32) * _LOG2E
            for block in range(start, stop, BN):
                columns = block + tl.arange(0, BN)
                inside = columns < end
                k = tl.load(
                    k_ptr + sample * k_b + (head // group) * k_h
                    + columns[:, None].to(tl.int64) * k_t + dims[None, :],
                    mask=inside[:, None] & (dims < D)[None, :], other=0.0,
                )  # fmt: skip
                v = tl.load(
                    v_ptr + sample * v_b + (head // group) * v_h
                    + columns[:, None].to(tl.int64) * v_t + dims[None, :],
                    mask=inside[:, None] & (dims < D)[None, :], other=0.0,
                )  # fmt: skip
                logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * _LOG2E)
                if GATED:
                    logits += gate
                seen = valid[:, None] & inside[None, :]
                if CAUSAL:
                    seen &= (columns < causal_from)[None, :] | (columns[None, :] <= rows[:, None] + shift)
                p = tl.where(seen, tl.exp2(logits - lse[:, None]), 0.0)
                dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
                ds = p * (dp - delta[:, None])
                dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    tl.store(
        dq_ptr + sample * dq_b + head * dq_h + rows[:, None].to(tl.int64) * dq_t + dims[None, :],
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=(rows < num_queries)[:, None] & (dims < D)[None, :],
    )  # fmt: skip


@triton.jit
def _backward_key(
    q_ptr, k_ptr, v_ptr, lse_ptr, gate_ptr, grad_ptr, delta_ptr, dk_ptr, dv_ptr, dcolumn_ptr,
    q_begin, q_end, k_begin, k_end,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h, gate_b,
    num_queries, num_keys, num_heads, group, causal_from, shift, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, QS: tl.constexpr,
    KS: tl.constexpr, GATED: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of keys and values of one kv head, and of a term added to a key's logits."""
    first = tl.program_id(0) * BN
    kv_head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    columns = first + tl.arange(0, BN)
    dims = tl.arange(0, BD)
    inside = columns < 0
    for s in tl.static_range(KS):
        inside |= (columns >= tl.load(k_begin + sample * KS + s)) & (
            columns < tl.load(k_end + sample * KS + s)
        )
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BD), tl.float32)
    populated = tl.max(inside.to(tl.int32), 0) > 0
    present = inside[:, None] & (dims < D)[None, :]
    k = tl.load(
        k_ptr + sample * k_b + kv_head * k_h + columns[:, None].to(tl.int64) * k_t + dims[None, :],
        mask=present, other=0.0,
    )  # fmt: skip
    v = tl.load(
        v_ptr + sample * v_b + kv_head * v_h + columns[:, None].to(tl.int64) * v_t + dims[None, :],
        mask=present, other=0.0,
    )  # fmt: skip
    for member in range(group):
        head = kv_head * group + member
        dcolumn = tl.zeros((BN,), tl.float32)
        if populated:
            if GATED:
                gate = tl.zeros((BN,), tl.float32)
                for s in tl.static_range(KS):
                    here = (columns >= tl.load(k_begin + sample * KS + s)) & (
                        columns < tl.load(k_end + sample * KS + s)
                    )
                    here_gate = tl.load(gate_ptr + sample * gate_b + s * num_heads + head).to(tl.float32)
                    gate = tl.where(here, here_gate * _LOG2E, gate)
            for s in tl.static_range(QS):
                start = tl.load(q_begin + sample * QS + s)
                stop = tl.load(q_end + sample * QS + s)
                if CAUSAL:
                    start = tl.where(first >= causal_from, tl.maximum(start, first - shift), start)
                for block in range(start, stop, BM):
                    rows = block + tl.arange(0, BM)
                    valid = rows < stop
                    place = (sample * num_queries + rows) * num_heads + head
                    lse = tl.load(lse_ptr + place, mask=valid, other=-float("inf"))
                    lse = tl.where(lse == -float("inf"), float("inf"), lse * _LOG2E)
                    delta = tl.load(delta_ptr + place, mask=valid, other=0.0)
                    shown = valid[:, None] & (dims < D)[None, :]
                    q = tl.load(
                        q_ptr + sample * q_b + head * q_h + rows[:, None].to(tl.int64) * q_t + dims[None, :],
                        mask=shown, other=0.0,
                    )  # fmt: skip
                    grad = tl.load(
                        grad_ptr + sample * g_b + head * g_h
                        + rows[:, None].to(tl.int64) * g_t + dims[None, :],
                        mask=shown, other=0.0,
                    )  # fmt: skip
                    logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * _LOG2E)
                    if GATED:
                        logits += gate[:, None]
                    seen = inside[:, None] & valid[None, :]
                    if CAUSAL:
                        seen &= (columns < causal_from)[:, None] | (columns[:, None] <= rows[None, :] + shift)
                    p = tl.where(seen, tl.exp2(logits - lse[None, :]), 0.0)
                    dv += tl.dot(p.to(grad.dtype), grad, input_precision=PRECISION)
                    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                    ds = p * (dp - delta[None, :])
                    dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
                    if GATED:
                        dcolumn += tl.sum(ds, 1)
        if GATED:
            tl.store(
                dcolumn_ptr + (sample * num_heads + head) * num_keys + columns,
                dcolumn,
                mask=columns < num_keys,
            )
    written = (columns < num_keys)[:, None] & (dims < D)[None, :]
    tl.store(
        dk_ptr + sample * dk_b + kv_head * dk_h + columns[:, None].to(tl.int64) * dk_t + dims[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty), mask=written,
    )  # fmt: skip
    tl.store(
        dv_ptr + sample * dv_b + kv_head * dv_h + columns[:, None].to(tl.int64) * dv_t + dims[None, :],
        dv.to(dv_ptr.dtype.element_ty), mask=written,
    )  # fmt: skip


def _blocks(query: Tensor, num_keys: int) -> dict[str, int | str]:
    """Choose the block sizes from the shapes alone."""
    width = max(16, triton.next_power_of_2(query.shape[3]))
    # Chosen so that a compiled kernel spills nothing worth mention (sm_90, seen with cuobjdump).
    largest = 64 if query.element_size() == 2 else 32
    largest = largest // 2 if width > 128 else largest
    tf32 = query.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return {
        "D": query.shape[3],
        "BD": width,
        "BM": min(largest, max(16, triton.next_power_of_2(query.shape[1]))),
        "BN": min(largest, max(16, triton.next_power_of_2(num_keys))),
        "PRECISION": "tf32" if tf32 else "ieee",
        "num_warps": 8 if width >= 128 else 4,
    }


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    queries: Ranges,
    keys: Ranges,
    scale: float,
    causal_from: int | None,
    shift: int,
    gates: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill out (B, Lq, H, D) and lse (B, Lq, H) fp32, both contiguous.

    query: (B, Lq, H, D); key, value: (B, Lk, Hkv, D). queries, keys: what is valid. Keys from column
        `causal_from` on are seen by query
    i only up to column i + shift; None = no causality. gates: (1 or B, S, H), contiguous, added to the
    logits of each range of keys.
    Rows without a visible key, or outside `queries`: out 0, lse -inf.
    """
    batch, num_queries, num_heads, _ = query.shape
    blocks = _blocks(query, key.shape[1])
    grid = (triton.cdiv(num_queries, blocks["BM"]), num_heads, batch)
    _forward[grid](
        query, key, value, out, lse, lse if gates is None else gates,
        queries.begin, queries.end, keys.begin, keys.end,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], _sample_stride(gates),
        num_queries, num_heads, num_heads // key.shape[2],
        0 if causal_from is None else causal_from, shift, scale,
        QS=queries.begin.shape[1], KS=keys.begin.shape[1],
        GATED=gates is not None, CAUSAL=causal_from is not None, **blocks,
    )  # fmt: skip


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    queries: Ranges,
    keys: Ranges,
    scale: float,
    causal_from: int | None,
    shift: int,
    gates: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_lse: Tensor | None = None,
) -> Tensor | None:
    """Fill the three gradients; with gates return (B, H, Lk) fp32, the gradient of a term for each key.

    grad_lse: (B, Lq, H) fp32, contiguous. Everything else as in `attend`.
    """
    batch, num_queries, num_heads, _ = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    blocks = _blocks(query, num_keys)
    delta = torch.empty_like(lse)
    gated = gates is not None
    columns = query.new_empty(batch, num_heads, num_keys, dtype=torch.float32) if gated else None
    common = {
        "QS": queries.begin.shape[1],
        "KS": keys.begin.shape[1],
        "GATED": gated,
        "CAUSAL": causal_from is not None,
        **blocks,
    }
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3])
    ranges = (queries.begin, queries.end, keys.begin, keys.end)
    causality = (0 if causal_from is None else causal_from, shift, scale)
    _backward_query[(triton.cdiv(num_queries, blocks["BM"]), num_heads, batch)](
        query, key, value, out, lse, lse if gates is None else gates,
        grad_out, lse if grad_lse is None else grad_lse, delta, grad_query,
        *ranges, *strides, *grad_query.stride()[:3], _sample_stride(gates),
        num_queries, num_heads, num_heads // num_kv_heads, *causality,
        PULLED=grad_lse is not None, **common,
    )  # fmt: skip
    _backward_key[(triton.cdiv(num_keys, blocks["BN"]), num_kv_heads, batch)](
        query, key, value, lse, lse if gates is None else gates,
        grad_out, delta, grad_key, grad_value, delta if columns is None else columns,
        *ranges, *strides, *grad_key.stride()[:3], *grad_value.stride()[:3], _sample_stride(gates),
        num_queries, num_keys, num_heads, num_heads // num_kv_heads, *causality,
        **common,
    )  # fmt: skip
    return columns


def _sample_stride(gates: Tensor | None) -> int:
    return 0 if gates is None or gates.shape[0] == 1 else gates.stride(0)
