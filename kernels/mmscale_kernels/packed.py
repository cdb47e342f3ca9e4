"""Attention over one packed buffer: the operator that a trunk runs in every layer.

All tokens of a batch lie in one buffer of T columns, cut into segments: one for each modality, valid tokens
first and
padding last in each, and perhaps a causal one (the target of generation) at the end::

    qkv = project(x).view(B, T, num_heads + 2 * num_kv_heads, D)
    out = packed_attention(qkv, num_heads=8, offsets=(0, 50), lengths=lengths, causal=(False, True))

The queries, keys and values are read where they lie, and the backward pass writes one gradient buffer for
all of them. `cross_modal_attention` is
the same mathematics for tensors that live apart; its price inside a trunk would be a gradient buffer for
every slice.

The trade-off: the layout is rigid. Every sample has the same segment starts, and what a segment sees is
decided by
its place in the table, not by a mask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu_attention as cpu
from . import tiled_attention as tiled
from .dispatch import Decision, choose, custom_op, is_torch_on_cpu, register_decision

# Up to here one flash call with a (T, T) mask beats a call for the prefix and one for the causal segment.
_FEW_COLUMNS = 128
# Elements that such a mask may have where gates give it a head dimension.
_MASK_BUDGET = 1 << 19


@tiled.without_autocast
def packed_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend within a packed buffer; see the module's docstring for the layout.

    qkv: (B, T, num_heads + 2 * num_kv_heads, D), heads in the order query, key, value; fp64, fp32, bf16 or
        fp16;
        unit stride in D, any strides otherwise. num_kv_heads follows from the shape and divides num_heads.
        What padding holds has to be finite.
    offsets: first column of each of the S segments, ascending from 0; a segment ends where the next one
        begins.
    lengths: (B, S) int32 or int64, valid tokens of each segment; 0 is allowed. On a device they are
        clamped, unless MMSCALE_CHECK=1.
    causal: S bools, all False but perhaps the last. Queries of a non-causal segment see the valid keys of
        all non-causal segments;
        queries of the causal one see those and, causally, their own segment.
    gates: (S, H) or (B, S, H), added to every logit of the keys of a segment (the log weight of a
        modality); differentiable.
    scale: factor of the logits, D ** -0.5 by default.

    Returns (B, T, H, D), contiguous, of qkv's dtype. Rows past a segment's length, and queries that see no
    valid key, are 0 and get gradient 0. Softmax and sums
    are fp32 (fp64 for fp64). Deterministic, forward and backward. Raises ValueError on bad input.
    """
    offsets, causal = _check_types(qkv, offsets, lengths, causal, gates, scale)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    if backend == "reference":
        _check(qkv, num_heads, offsets, lengths, causal, gates)
        return _reference(qkv, num_heads, offsets, lengths, causal, gates, scale)
    arguments = (qkv, num_heads, offsets, lengths, causal, gates, scale, backend or "")
    if not cpu.is_direct([qkv, lengths] if gates is None else [qkv, lengths, gates]):
        return _packed(*arguments)[0]
    if _use_flash(qkv) and qkv.numel() and cpu.has_few(qkv, qkv.shape[1], () if gates is None else (gates,)):
        _check(qkv, num_heads, offsets, lengths, causal, gates)
        if is_torch_on_cpu(backend, qkv.device) or _choose(qkv, len(offsets), backend).backend == "torch":
            return _attend_few(qkv, num_heads, offsets, lengths, causal, gates, scale)
    if torch.is_grad_enabled() and (qkv.requires_grad or (gates is not None and gates.requires_grad)):
        return _Direct.apply(*arguments)[0]
    return _attend(*arguments)[0]


def _decide(
    qkv: Tensor,
    *,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Decision:
    offsets, causal = _check_types(qkv, offsets, lengths, causal, gates, scale)
    _check(qkv, num_heads, offsets, lengths, causal, gates)
    return _choose(qkv, len(offsets), backend)


def _choose(qkv: Tensor, num_segments: int, backend: str | None) -> Decision:
    return choose("packed_attention", backend, qkv.device, tiled.triton_refusal(qkv, num_segments))


register_decision(packed_attention, _decide)


def _attend(
    qkv: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return out (B, T, H, D) and the log-sum-exp (B, T, H), +inf for rows of padding."""
    _check(qkv, num_heads, offsets, lengths, causal, gates)
    chosen = _choose(qkv, len(offsets), backend or None).backend
    batch, columns, _, width = qkv.shape
    dtype = tiled.compute_dtype(qkv)
    if qkv.numel() == 0:
        return qkv.new_empty(batch, columns, num_heads, width), qkv.new_empty(
            batch, columns, num_heads, dtype=dtype
        )
    table = _table(offsets, causal, columns, qkv.device)
    if chosen == "triton":
        return _triton_forward(qkv, num_heads, table, lengths, gates, scale)
    valid = table.valid(lengths)
    if _use_flash(qkv):
        bias = _gate_bias(gates, table, dtype)
        out, lse = _flash_forward(qkv, num_heads, table, valid, bias, scale)
    else:
        out = qkv.new_empty(batch, columns, num_heads, width)
        lse = qkv.new_empty(batch, columns, num_heads, dtype=dtype)
        bias = _gate_bias(gates, table, dtype)
        for rows, query, sources, _ in _tiled_calls(qkv, num_heads, table, valid, bias):
            logs = lse.new_empty(*query.shape[:3], len(sources))
            tiled.attend(query, sources, scale=scale, out=out[:, rows], lse=logs)
            lse[:, rows] = logs.logsumexp(-1)
    if valid is not None and qkv.device.type != "cpu":  # counting what is valid would wait for the device
        out.masked_fill_(~valid[:, :, None, None], 0.0)
        lse.masked_fill_(~valid[:, :, None], math.inf)
    elif valid is not None:
        padding = (~valid).flatten().nonzero().squeeze(1)
        out.view(batch * columns, -1).index_fill_(0, padding, 0.0)
        # exp(logit - inf) is 0: whatever gradient arrives at padding goes no further
        lse.view(batch * columns, -1).index_fill_(0, padding, math.inf)
    return out, lse


_packed = custom_op("mmscale_kernels::packed_attention")(_attend)


@_packed.register_fake
def _(
    qkv: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, columns, _, width = qkv.shape
    out = qkv.new_empty(batch, columns, num_heads, width)
    return out, qkv.new_empty(batch, columns, num_heads, dtype=tiled.compute_dtype(qkv))


def _attend_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv and gates (empty without gates)."""
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    grad_gates = qkv.new_empty(0) if gates is None else torch.zeros_like(gates)
    if qkv.numel() == 0:
        return grad_qkv, grad_gates
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    table = _table(offsets, causal, qkv.shape[1], qkv.device)
    if _choose(qkv, len(offsets), backend or None).backend == "triton":
        by_sample = _triton_backward(
            grad_out, qkv, out, lse, num_heads, table, lengths, gates, scale, grad_qkv
        )
        if gates is not None and by_sample is not None:
            grad_gates = (by_sample if gates.dim() == 3 else by_sample.sum(0)).to(gates.dtype)
        return grad_qkv, grad_gates
    valid = table.valid(lengths)
    if _use_flash(qkv):
        bias = _gate_bias(gates, table, lse.dtype)
        by_segment = _flash_backward(grad_out, qkv, out, lse, num_heads, table, valid, bias, scale, grad_qkv)
        if gates is not None and by_segment is not None:
            grad_gates = (by_segment if gates.dim() == 3 else by_segment.sum(0)).to(gates.dtype)
        return grad_qkv, grad_gates
    # Several contributions to a key are summed in the compute dtype.
    sums = torch.zeros(grad_qkv[:, :, num_heads:].shape, dtype=tiled.compute_dtype(qkv), device=qkv.device)
    bias = _gate_bias(gates, table, sums.dtype)
    grad_bias = None if bias is None else torch.zeros_like(bias)
    for rows, query, sources, spans in _tiled_calls(qkv, num_heads, table, valid, bias):
        tiled.attend_backward(
            grad_out[:, rows],
            query,
            sources,
            scale=scale,
            out=out[:, rows],
            lse=lse[:, rows],
            grad_query=grad_qkv[:, rows, :num_heads],
            grad_sources=[
                tiled.SourceGradients(
                    key=sums[:, span, :num_kv_heads],
                    value=sums[:, span, num_kv_heads:],
                    bias=None if grad_bias is None else grad_bias[..., span],
                )
                for span in spans
            ],
        )
    if gates is not None and grad_bias is not None:
        grad_gates = _reduce_columns(grad_bias[:, :, 0], table, gates)
    grad_qkv[:, :, num_heads:] = sums
    return grad_qkv, grad_gates


_packed_backward = custom_op("mmscale_kernels::packed_attention_backward")(_attend_backward)


@_packed_backward.register_fake
def _(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    grad_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    return grad_qkv, qkv.new_empty(0) if gates is None else torch.zeros_like(gates)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv, num_heads, offsets, lengths, causal, gates, scale, backend = inputs
    ctx.save_for_backward(qkv, lengths, gates, *output)
    ctx.table = (num_heads, offsets, causal, scale, backend)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


@tiled.without_autocast
def _backward(ctx, grad_out, grad_lse, form=_packed_backward):  # type: ignore[no-untyped-def]
    qkv, lengths, gates, out, lse = ctx.saved_tensors
    num_heads, offsets, causal, scale, backend = ctx.table
    if grad_out is None:
        return (None,) * 8
    grad_qkv, grad_gates = form(
        grad_out, qkv, out, lse, num_heads, offsets, lengths, causal, gates, scale, backend
    )
    return grad_qkv, None, None, None, None, None if gates is None else grad_gates, None, None


_packed.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator's autograd without the operator; see `cpu_attention.is_direct`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        output = _attend(*arguments)
        _setup_context(ctx, arguments, output)
        return output

    @staticmethod
    @tiled.differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        return _backward(ctx, grad_out, grad_lse, _attend_backward)


def _use_flash(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu"  # aten's flash kernel for the CPU reads strided views in place


@dataclass(frozen=True)
class _Table:
    """What follows from the segment table alone."""

    widths: list[int]
    prefix: int  # the column at which the non-causal segments end
    segment: Tensor  # (T,) the segment of a column
    step: Tensor  # (T,) the place of a column in its segment
    starts: Tensor  # (S,) int32
    full: Tensor  # (S,) widths
    ahead: (
        Tensor | None
    )  # (1, 1, T, T) additive, for few columns: 0 where a query's segment and causality let it see a key

    def valid(self, lengths: Tensor) -> Tensor | None:
        """Return which columns hold tokens, (B, T) bool; None if all do (asked on the CPU alone)."""
        if lengths.device.type == "cpu" and torch.equal(
            lengths, self.full.to(lengths.dtype).expand_as(lengths)
        ):
            return None
        return self.step < lengths[:, self.segment]

    def ranges(self, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first valid column of each segment and the one past the last, (B, S) int32, clamped."""
        begin = self.starts.expand(lengths.shape).contiguous()
        return begin, begin + torch.minimum(lengths, self.full).to(torch.int32)


def _table(offsets: Sequence[int], causal: Sequence[bool], columns: int, device: torch.device) -> _Table:
    with torch.inference_mode(False):  # what the cache holds may be saved for a backward pass later
        return _cached_table(tuple(offsets), bool(causal[-1]), columns, device)


@functools.lru_cache(maxsize=64)
def _cached_table(offsets: tuple[int, ...], causal: bool, columns: int, device: torch.device) -> _Table:
    full = torch.tensor([*offsets[1:], columns]) - torch.tensor(offsets)
    segment = torch.repeat_interleave(torch.arange(len(offsets)), full)
    column = torch.arange(columns)
    step = column - torch.tensor(offsets)[segment]
    prefix = offsets[-1] if causal else columns
    starts = torch.tensor(offsets, dtype=torch.int32)
    ahead = None
    if device.type == "cpu" and prefix < columns <= _FEW_COLUMNS:
        hidden = (column >= prefix) & (column > column[:, None])
        ahead = torch.zeros(1, 1, columns, columns).masked_fill_(hidden, -math.inf)
    return _Table(
        full.tolist(), prefix, segment.to(device), step.to(device), starts.to(device), full.to(device), ahead
    )


def _gate_bias(gates: Tensor | None, table: _Table, dtype: torch.dtype) -> Tensor | None:
    """Spread gates (S, H) or (B, S, H) over their columns: (1 or B, H, 1, T)."""
    if gates is None:
        return None
    spread = gates if gates.dim() == 3 else gates[None]
    return spread.to(dtype).index_select(1, table.segment).transpose(1, 2).unsqueeze(2)


def _reduce_columns(by_column: Tensor, table: _Table, gates: Tensor) -> Tensor:
    """Sum (1 or B, H, T) over the columns of each segment, into the shape and dtype of gates."""
    by_segment = [part.sum(-1) for part in by_column.split(table.widths, dim=-1)]
    return torch.stack(by_segment, 1).view(gates.shape).to(gates.dtype)


class _FlashCall(NamedTuple):
    rows: slice
    keys: slice
    mask: Tensor | None
    is_causal: bool


def _flash_calls(qkv: Tensor, table: _Table, valid: Tensor | None, bias: Tensor | None) -> list[_FlashCall]:
    """Return the calls of the flash kernel which together cover every visible (query, key) pair once.

    No key is in two calls. A second call has the causal segment alone; its queries are in the first one too.
    """
    columns = qkv.shape[1]
    prefix = table.prefix
    everything, before, own = slice(0, columns), slice(0, prefix), slice(prefix, columns)
    mask = bias
    if valid is not None and prefix:
        padding = torch.zeros(valid.shape, dtype=tiled.compute_dtype(qkv))
        padding = padding.masked_fill_(~valid, -math.inf)[:, None, None]
        mask = padding if bias is None else bias + padding
    if prefix == columns:
        return [_FlashCall(everything, everything, mask, False)]
    if prefix == 0:
        # padding lies behind the queries that matter, so causality alone hides it
        return [_FlashCall(everything, everything, bias, True)]
    few = bias is None or bias.shape[0] * bias.shape[1] * columns**2 <= _MASK_BUDGET
    if table.ahead is not None and few:
        ahead = table.ahead.to(tiled.compute_dtype(qkv))
        return [_FlashCall(everything, everything, ahead if mask is None else ahead + mask, False)]
    return [
        _FlashCall(everything, before, None if mask is None else mask[..., before], False),
        _FlashCall(own, own, None if bias is None else bias[..., own], True),
    ]


def _flash(qkv: Tensor, num_heads: int, call: _FlashCall, scale: float) -> tuple[Tensor, Tensor]:
    """Return the call's output (B, rows, H, D) and log-sum-exp (B, rows, H)."""
    query, key, value = _views(qkv, num_heads)
    return cpu.grouped_flash(
        query[:, call.rows], key[:, call.keys], value[:, call.keys], call.mask, scale, call.is_causal
    )


def _flash_forward(
    qkv: Tensor, num_heads: int, table: _Table, valid: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    first, *second = _flash_calls(qkv, table, valid, bias)
    out, lse = _flash(qkv, num_heads, first, scale)
    for call in second:
        part, log = _flash(qkv, num_heads, call, scale)
        # The kernel calls the log-sum-exp of no key 0.
        for logs, mask in ((lse, first.mask), (log, call.mask)):
            if mask is not None:
                logs.masked_fill_(cpu.hides_all(mask), -math.inf)
        cpu.join(out[:, call.rows], lse[:, call.rows], part, log)
        lse.masked_fill_(lse == -math.inf, math.inf)
    return out, lse


def _flash_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    table: _Table,
    valid: Tensor | None,
    bias: Tensor | None,
    scale: float,
    grad_qkv: Tensor,
) -> Tensor | None:
    """Fill grad_qkv; return the gradient of gates, (B, S, H) in the compute dtype, if there are any.

    `cpu_attention` says how it follows from the gradient of the values and each segment's share of attention.
    """
    if bias is not None and qkv.dtype != bias.dtype:
        # The gates' gradient is a difference that rounded results would leave too little of.
        wide = qkv.to(bias.dtype)
        out, exact = _flash_forward(wide, num_heads, table, valid, bias, scale)
        exact.masked_fill_(lse == math.inf, math.inf)
        grad_wide = torch.empty_like(wide)
        by_segment = _flash_backward(
            grad_out.to(bias.dtype), wide, out, exact, num_heads, table, valid, bias, scale, grad_wide
        )
        grad_qkv.copy_(grad_wide)
        return by_segment
    query, key, value = _views(qkv, num_heads)
    grad_query, grad_key, grad_value = _views(grad_qkv, num_heads)
    group = num_heads // key.shape[2]
    dtype = tiled.compute_dtype(qkv)
    shape = (qkv.shape[0], len(table.widths), num_heads)
    by_segment = None if bias is None else torch.zeros(shape, dtype=dtype)
    for number, call in enumerate(_flash_calls(qkv, table, valid, bias)):
        for member in range(group):
            heads = slice(member, num_heads, group)
            grads = cpu.flash_backward(
                grad_out[:, call.rows, heads].transpose(1, 2),
                query[:, call.rows, heads].transpose(1, 2),
                key[:, call.keys].transpose(1, 2),
                value[:, call.keys].transpose(1, 2),
                out[:, call.rows, heads].transpose(1, 2),
                lse[:, call.rows, heads].transpose(1, 2),
                0.0,
                call.is_causal,
                attn_mask=cpu.of_members(call.mask, heads),
                scale=scale,
            )
            by_query, by_key, by_value = (grad.transpose(1, 2) for grad in grads)
            if number == 0:
                grad_query[:, call.rows, heads] = by_query
            else:
                grad_query[:, call.rows, heads] += by_query
            if by_segment is not None and len(table.widths) > 1:
                dots = (by_value.to(dtype) * value[:, call.keys].to(dtype)).sum(-1)
                spots = table.segment[call.keys]
                by_segment[:, :, heads].index_add_(1, spots, dots)
            if group == 1:
                grad_key[:, call.keys] = by_key
                grad_value[:, call.keys] = by_value
            elif member == 0:
                key_sum, value_sum = by_key.to(dtype), by_value.to(dtype)
            else:
                key_sum += by_key
                value_sum += by_value
        if group > 1:
            grad_key[:, call.keys] = key_sum
            grad_value[:, call.keys] = value_sum
    if by_segment is None or len(table.widths) == 1:
        return by_segment  # one gate for all keys changes nothing
    delta = (grad_out.to(dtype) * out.to(dtype)).sum(-1).masked_fill_(lse == math.inf, 0.0)
    # The widest segment's share is what the others leave.
    widest = max(range(len(table.widths)), key=table.widths.__getitem__)
    by_segment[:, widest] -= delta.sum(1)
    first = 0
    for number, width in enumerate(table.widths):
        keys = slice(first, first + width)
        first += width
        if number == widest:
            continue
        is_causal = keys.start >= table.prefix
        rows = keys if is_causal else slice(0, qkv.shape[1])
        assert bias is not None
        mask = bias[..., keys]
        if valid is not None and not is_causal:
            mask = mask.masked_fill(~valid[:, None, None, keys], -math.inf)
        _, log = _flash(qkv, num_heads, _FlashCall(rows, keys, mask, is_causal), scale)
        share = log.sub_(lse[:, rows]).exp_().masked_fill_(cpu.hides_all(mask), 0.0)
        pulled = share.mul_(delta[:, rows]).sum(1)
        by_segment[:, number] -= pulled
        by_segment[:, widest] += pulled
    return by_segment


def _attend_few(
    qkv: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
    scale: float,
) -> Tensor:
    """Return out (B, T, H, D) by `cpu_attention.attend_few`."""
    dtype = tiled.compute_dtype(qkv)
    table = _table(offsets, causal, qkv.shape[1], qkv.device)
    valid = table.valid(lengths)
    mask = None if table.ahead is None else table.ahead.to(dtype)
    keep = None
    if valid is not None:
        keep, padding = valid.to(dtype)[:, None, :, None], cpu.hiding(valid, dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    query, key, value = _views(qkv, num_heads)
    return cpu.attend_few(
        query,
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scale,
        mask=mask,
        gate=_gate_bias(gates, table, dtype),
        keep=keep,
    )


def _tiled_calls(
    qkv: Tensor, num_heads: int, table: _Table, valid: Tensor | None, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor, list[tiled.KeySource], list[slice]]]:
    """Yield (rows, query, sources, their columns) for the prefix and for the causal segment."""
    columns, heads = qkv.shape[1:3]
    num_kv_heads = (heads - num_heads) // 2

    def source(span: slice, diagonal: int | None) -> tiled.KeySource:
        return tiled.KeySource(
            key=qkv[:, span, num_heads : num_heads + num_kv_heads],
            value=qkv[:, span, num_heads + num_kv_heads :],
            valid=None if valid is None else valid[:, span],
            bias=None if bias is None else bias[..., span],
            diagonal=diagonal,
        )

    prefix, own = slice(0, table.prefix), slice(table.prefix, columns)
    before = [source(prefix, None)] if table.prefix else []
    if table.prefix:
        yield prefix, qkv[:, prefix, :num_heads], before, [prefix]
    if table.prefix < columns:
        spans = [prefix, own] if table.prefix else [own]
        yield own, qkv[:, own, :num_heads], [*before, source(own, 0)], spans


def _triton_call(
    qkv: Tensor, num_heads: int, table: _Table, lengths: Tensor, gates: Tensor | None, scale: float
) -> Any:
    """Say it with one source a segment, all of them views of the buffer."""
    from .triton_attention import Call, KeySource, QueryRange

    query, key, value = _views(qkv, num_heads)
    by_sample = None if gates is None else (gates if gates.dim() == 3 else gates[None]).contiguous()
    sources, rows, first = [], [], 0
    for number, width in enumerate(table.widths):
        span = slice(first, first + width)
        sources.append(
            KeySource(
                key[:, span],
                value[:, span],
                lengths=lengths[:, number],
                gate=None if by_sample is None else by_sample[:, number],
                shift=-first if first == table.prefix else None,
            )
        )
        rows.append(QueryRange(first, width, lengths[:, number]))
        first += width
    return Call(query, sources, rows, scale)


def _triton_forward(
    qkv: Tensor, num_heads: int, table: _Table, lengths: Tensor, gates: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    from . import triton_attention

    batch, columns, _, width = qkv.shape
    out = qkv.new_empty(batch, columns, num_heads, width)
    lse = qkv.new_empty(batch, columns, num_heads, dtype=torch.float32)
    triton_attention.attend(_triton_call(qkv, num_heads, table, lengths, gates, scale), out=out, lse=lse)
    return out, lse


def _triton_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    table: _Table,
    lengths: Tensor,
    gates: Tensor | None,
    scale: float,
    grad_qkv: Tensor,
) -> Tensor | None:
    """Fill grad_qkv; return the gradient of gates, (B, S, H), if there are any."""
    from . import triton_attention

    call = _triton_call(qkv, num_heads, table, lengths, gates, scale)
    grad_query, grad_key, grad_value = _views(grad_qkv, num_heads)
    made = triton_attention.attend_backward(
        call,
        grad_out,
        out=out,
        lse=lse,
        grad_query=grad_query,
        grad_keys=grad_key.split(table.widths, 1),
        grad_values=grad_value.split(table.widths, 1),
        wants_bias=[False] * len(call.sources),
    )
    by_segment = [grad for grad in made.gates if grad is not None]
    return torch.stack(by_segment, 1) if by_segment else None


def _views(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    query, key, value = qkv.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=2)
    return query, key, value


def _reference(
    qkv: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
    scale: float,
) -> Tensor:
    """Dense attention with the mask written out, differentiated by autograd."""
    columns = qkv.shape[1]
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    wide = qkv.to(tiled.compute_dtype(qkv))
    starts = torch.tensor(offsets, device=qkv.device)
    column = torch.arange(columns, device=qkv.device)
    segment = torch.searchsorted(starts, column, right=True) - 1
    valid = column - starts[segment] < lengths[:, segment]
    wide = wide.masked_fill(~valid[:, :, None, None], 0.0)
    query, key, value = wide.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    key, value = (x.repeat_interleave(num_heads // num_kv_heads, dim=2) for x in (key, value))
    is_causal = torch.tensor(causal, device=qkv.device)[segment]
    sees = ~is_causal | (is_causal[:, None] & (column <= column[:, None]))
    sees = (sees & valid[:, None, :] & valid[:, :, None])[:, None]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
    if gates is not None:
        logits = logits + gates[..., segment, :].transpose(-1, -2).unsqueeze(-2).to(logits.dtype)
    sees = sees & (logits > -math.inf)
    # A finite fill keeps the gradient of a row that sees nothing 0 instead of NaN.
    logits = logits.masked_fill(~sees, torch.finfo(logits.dtype).min)
    probability = logits.softmax(-1).masked_fill(~sees, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", probability, value).to(qkv.dtype)


def _check_types(
    qkv: Tensor,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
    scale: float | None,
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Check what has to hold before shapes can be looked at; return offsets and causal as tuples."""
    for name, given in (("qkv", qkv), ("lengths", lengths), ("gates", gates)):
        if given is not None or name != "gates":
            tiled.check_tensor(name, given)
    for name, row in (("offsets", offsets), ("causal", causal)):
        if not isinstance(row, Sequence) or any(isinstance(x, float) for x in row):
            raise ValueError(
                f"{name} is {row!r}; it needs one {'int' if row is offsets else 'bool'} a segment"
            )
    if isinstance(scale, Tensor):
        raise ValueError("scale is a tensor, which would get no gradient; it needs to be a number, or None")
    if qkv.dim() != 4 or qkv.shape[3] == 0:
        _check_qkv(qkv)
    return tuple(offsets), tuple(bool(x) for x in causal)


def _check_qkv(qkv: Tensor) -> None:
    if qkv.dim() != 4:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; it needs to be (B, T, num_heads + 2 * num_kv_heads, D)"
        )
    if qkv.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"qkv has dtype {qkv.dtype}; it needs float64, float32, bfloat16 or float16")
    if qkv.shape[3] == 0 or (qkv.stride(-1) != 1 and qkv.shape[3] > 1):
        raise ValueError(
            f"qkv has strides {qkv.stride()} for shape {tuple(qkv.shape)}; it needs D >= 1 with stride 1"
        )


def _check(
    qkv: Tensor,
    num_heads: int,
    offsets: Sequence[int],
    lengths: Tensor,
    causal: Sequence[bool],
    gates: Tensor | None,
) -> None:
    """Raise ValueError naming the first argument that can't be used."""
    _check_qkv(qkv)
    batch, columns, heads, _ = qkv.shape
    if not isinstance(num_heads, int):
        raise ValueError(f"num_heads is {num_heads!r}; it needs to be an int")
    num_kv_heads, odd = divmod(heads - num_heads, 2)
    if num_heads < 1 or odd or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads} and qkv has {heads} heads; it needs to have "
            "num_heads + 2 * num_kv_heads, where num_kv_heads divides num_heads"
        )
    ordered = all(start < stop for start, stop in zip(offsets, [*offsets[1:], columns], strict=True))
    if len(offsets) == 0 or offsets[0] != 0 or (not ordered and columns > 0):
        raise ValueError(
            f"offsets is {tuple(offsets)}; it needs to ascend from 0 and stay below T = {columns}"
        )
    if len(causal) != len(offsets) or any(causal[:-1]):
        raise ValueError(
            f"causal is {tuple(causal)}; it needs {len(offsets)} bools, one for each segment, "
            "of which at most the last is True"
        )
    if lengths.shape != (batch, len(offsets)) or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}; "
            f"it needs ({batch}, {len(offsets)}), int32 or int64"
        )
    if lengths.device != qkv.device:
        raise ValueError(f"lengths lies on {lengths.device}; it needs qkv's device, {qkv.device}")
    if tiled.readable(lengths) and lengths.numel():
        widths = [stop - start for start, stop in zip(offsets, [*offsets[1:], columns], strict=True)]
        low, high = lengths.aminmax(dim=0)
        if min(low.tolist()) < 0 or any(n > width for n, width in zip(high.tolist(), widths, strict=True)):
            raise ValueError(
                f"lengths lie in {low.tolist()} .. {high.tolist()}, by segment; they need to lie in "
                f"0 .. the segment's width, here {widths}"
            )
    if gates is not None:
        shape = (len(offsets), num_heads)
        if gates.shape not in (shape, (batch, *shape)) or not gates.is_floating_point():
            raise ValueError(
                f"gates has shape {tuple(gates.shape)} and dtype {gates.dtype}; "
                f"it needs {shape} or {(batch, *shape)} of a floating dtype"
            )
        if gates.device != qkv.device:
            raise ValueError(f"gates lies on {gates.device}; it needs qkv's device, {qkv.device}")
