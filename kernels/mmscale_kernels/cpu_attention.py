"""Attention over several sources on the CPU, by PyTorch's own flash kernel: one call a source, or a few.

The kernel (`aten::_scaled_dot_product_flash_attention_for_cpu`) returns the log-sum-exp of every query, so sources
are joined after it: with x_s the log-sum-exp of source s and x their joint one, out = sum over s of
exp(x_s - x) * out_s. Its backward pass takes (out, x) and recomputes probabilities from x; handed the joint out and x
less the source's gate, it yields this source's share of the joint gradients. So no keys are concatenated, and a mask is
made only where a bias or many short samples of unequal lengths need one.

Three things the kernel doesn't know are had without it:

- Lengths. Samples of equal lengths share a call on slices that leave the padding out. Where a call for each costs more
  than the padding, one call runs over all with a mask (and if the padding isn't finite, on copies where it is 0).
- A causal source with more keys than queries: the keys that all queries see, in one call, and the rest, on the
  diagonal that the kernel knows, in another.
- The gradient of a gate, the sum of dS = P * (dP - delta) over a source's keys and all queries. Over queries alone,
  P * dP sums to V . dV; so the gate's gradient is the sum of V . dV less that of delta times the source's share of
  attention.

A gradient of the log-sum-exps themselves shifts delta (the row sum of dO * out) of a source by -c. It goes in by one
more column of the heads, 1 in dO and -c in out.

Where nobody asks for the log-sum-exps of the sources and there is little to do, or no padding to skip, one call on
concatenated keys is faster than a call each (`attend_joined`); it holds a copy of the keys of several sources. And
where a sample and head have few logits, time goes into calls rather than products (`attend_few`): without gates
PyTorch's own autograd runs the kernel; with gates, two batched products with a softmax between them are faster, and
keep the probabilities for the backward pass, 16 KiB of fp32 a sample and head at most.

The trade-off: the kernel has no dropout and no gradient of a bias; `tiled_attention` has both. The functions here trust
their arguments; the operators check them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tiled_attention import compute_dtype, differentiable_once, without_autocast

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
softmax_backward = torch.ops.aten._softmax_backward_data.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# Products (logits times width) that are worth a call of their own: about 30 us of work.
_WORTH_A_CALL = 1 << 20
# As much for several threads, about a millisecond: they wait for each other at the end of every call, and where other
# work wants their cores too (data loading, say), for as long as the slowest of them isn't scheduled.
_WORTH_A_MEETING = 1 << 25
# Finite, so that rows whose every key a bias hides have a log-sum-exp that tells them apart.
_HIDDEN = -1e30
# Logits of a sample and head up to which sources with padding share a call.
_FEW_LOGITS = 1 << 14
# Logits of a sample and head up to which `attend_few` wins; also what bounds the memory of its probabilities.
_DENSE_LOGITS = 1 << 12
# exp(x - x_s) * dx_s beyond this no longer shares a call with the joint gradients: fp32 ends at 3e38, and sums follow.
_MOST_SHIFT = 1e25


_PLAIN = (Tensor, torch.nn.Parameter)


class FlashSource(NamedTuple):
    """key, value: (B, Lk, Hkv, D). lengths, starts: (B,). gate: (1 or B, H). bias: 4 sizes, each 1 or full."""

    key: Tensor
    value: Tensor
    lengths: Tensor | None
    starts: Tensor | None
    gate: Tensor | None
    bias: Tensor | None
    causal: bool


class FlashGradients(NamedTuple):
    """Of a source's key and value, in their dtype; of its gate by sample and head, (B, H), in the compute dtype."""

    key: Tensor
    value: Tensor
    gate: Tensor | None


@dataclass(frozen=True)
class _Part:
    """A block of queries and keys for one call of the kernel (one a member of a group, with grouped queries)."""

    samples: slice
    queries: slice
    keys: slice
    causal: bool  # query i of the block sees keys up to i of the block
    whole_rows: bool  # all samples and queries
    whole_keys: bool  # all samples and keys
    again: bool  # an earlier part of this source has the same queries
    valid: Tensor | None  # (samples, keys) bool
    rows: Tensor | None  # (samples, queries) bool


def is_direct(tensors: Sequence[Tensor]) -> bool:
    """Say whether an operator's CPU form may be called without the operator.

    Custom operators cost some 300 us a call in PyTorch's Python, more than attention over some dozen tokens. Whatever
    looks at operators (compilers, fake tensors, dispatch modes, function transforms, subclasses) still sees them.
    """
    count_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    innermost_transform = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    if count_modes is None or innermost_transform is None:
        return False  # a PyTorch that has no such names can't be asked who is looking
    for x in tensors:
        if type(x) not in _PLAIN or not x.is_cpu:
            return False
    return not torch.compiler.is_compiling() and count_modes() == 0 and innermost_transform() is None


def attend(
    query: Tensor, sources: Sequence[FlashSource], *, query_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out (B, Lq, H, D) and the log-sum-exp of each source, (B, Lq, H, S), for query (B, Lq, H, D)."""
    rows = None if query_lengths is None else query_lengths.tolist()
    results = [_attend_source(query, source, rows, scale) for source in sources]
    if len(results) == 1:
        out, log = results[0]
        return out, log.unsqueeze(-1)
    lse = torch.stack([log for _, log in results], -1)
    shares = lse.softmax(-1)
    shares.masked_fill_((lse == -math.inf).all(-1, keepdim=True), 0.0)
    dtype = lse.dtype
    total = results[0][0].to(dtype).mul_(shares[..., :1])
    for number, (part, _) in enumerate(results[1:], 1):
        total.addcmul_(part.to(dtype), shares[..., number : number + 1])
    return total.to(query.dtype), lse


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    sources: Sequence[FlashSource],
    *,
    query_lengths: Tensor | None,
    scale: float,
    out: Tensor,
    source_lse: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, list[FlashGradients]]:
    """Return the gradients of query and of the sources.

    grad_out, out: (B, Lq, H, D); source_lse and its gradient: (B, Lq, H, S).
    """
    dtype = compute_dtype(query)
    if query.dtype != dtype and any(source.gate is not None for source in sources):
        # V . dV less share . delta cancels: from rounded results it would have three times the error of a sum over dS.
        wide = [source._replace(key=source.key.to(dtype), value=source.value.to(dtype)) for source in sources]
        out, source_lse = attend(query.to(dtype), wide, query_lengths=query_lengths, scale=scale)
        grad_query, found = attend_backward(
            grad_out.to(dtype),
            query.to(dtype),
            wide,
            query_lengths=query_lengths,
            scale=scale,
            out=out,
            source_lse=source_lse,
            grad_lse=grad_lse,
        )
        return grad_query.to(query.dtype), [
            FlashGradients(one.key.to(query.dtype), one.value.to(query.dtype), one.gate) for one in found
        ]
    rows = None if query_lengths is None else query_lengths.tolist()
    joint = source_lse[..., 0] if len(sources) == 1 else source_lse.logsumexp(-1)
    if query_lengths is not None or any(_may_see_nothing(query, source) for source in sources):
        # A query that sees nothing: exp(logit - inf) is 0 whatever arrives here.
        joint = joint.masked_fill(joint == -math.inf, math.inf)
    delta = None
    if any(source.gate is not None for source in sources):
        delta = _row_dots(grad_out, out)
    query_sum = _Sum(query, dtype)
    gradients = []
    for number, source in enumerate(sources):
        own = source_lse[..., number]
        key_sum, value_sum = _Sum(source.key, dtype), _Sum(source.value, dtype)
        gate = None if source.gate is None else torch.zeros(query.shape[0], query.shape[2], dtype=dtype)
        pull = None if grad_lse is None else grad_lse[..., number].masked_fill(own == -math.inf, 0.0)
        runs: list[tuple[Tensor, Tensor | None, bool]] = [(joint, None, True)]
        if pull is not None:
            shift = (
                torch.exp(joint - own).mul_(pull).masked_fill_((own == -math.inf) | (joint == math.inf), 0.0)
            )
            if bool(shift.abs().amax() <= _MOST_SHIFT):
                runs = [(joint, shift, True)]
            else:  # next to no share: its log-sum-exp gets gradients from calls with probabilities of its own
                runs.append((own.masked_fill(own == -math.inf, math.inf), pull, False))
        for log, moved, has_out in runs:
            if source.gate is not None:
                log = log - source.gate[:, None]  # a gate of -inf makes it inf: no key of the source counts
            for part in _parts(query, source, rows):
                _backward_part(
                    part, grad_out if has_out else None, query, source, scale, out, log, moved,
                    query_sum, key_sum, value_sum, gate,
                )  # fmt: skip
        if gate is not None:
            assert delta is not None
            share = torch.exp(own - joint)
            if rows is not None:
                share = share.masked_fill(~_below(rows, query.shape[1])[..., None], 0.0)
            terms = delta.masked_fill(share == 0, 0.0).mul_(share).neg_()
            gate += (terms if pull is None else terms.add_(pull)).sum(1)
        gradients.append(FlashGradients(key_sum.result(), value_sum.result(), gate))
    return query_sum.result(), gradients


def has_few(query: Tensor, num_keys: int, gates: Iterable[Tensor]) -> bool:
    """Say whether `attend_few` takes so many keys and these gates, and is the faster form."""
    return 0 < query.shape[1] * num_keys <= _DENSE_LOGITS and not any(closes(gate) for gate in gates)


def closes(gate: Tensor) -> bool:
    """Say whether a gate hides all keys of a source from a head (-inf, or next to it), or is NaN."""
    return not gate.min().item() > _HIDDEN


def hidden(dtype: torch.dtype) -> float:
    """Return what a mask of `attend_few` adds to hide a key: finite, so that a row of nothing else isn't NaN."""
    return torch.finfo(dtype).min / 4


def hiding(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask of `attend_few` that hides what isn't seen (bool)."""
    return torch.where(seen, *_seen_or_hidden(dtype))


@functools.cache
def _seen_or_hidden(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # they stay, and a later call may train
        return torch.zeros((), dtype=dtype, device="cpu"), torch.full(
            (), hidden(dtype), dtype=dtype, device="cpu"
        )


@functools.lru_cache(maxsize=64)
def _places(size: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(size, device="cpu")


def attend_few(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    keep: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Return out (B, Lq, H, D), contiguous, of attention over few keys, under autograd.

    Without a gate it is PyTorch's own operator, flash kernel and all, but without any Python in its backward pass. A
    gate would send it to a dense form of several passes; and grouped queries or half precision gain from fp32 products.

    key, value: (B, Hkv, Lk, D). mask: added to the logits, 4 sizes, each 1 or that of (B, H, Lq, Lk), without a
    gradient. gate: the same with one, (1 or B, H, 1, Lk). keep: (B, 1, 1 or Lq, 1), 0 for queries whose output
    is 0, else 1. rows: (B, Lq) bool, the rows whose gradients count, whatever the others' hold.
    """
    out: Tensor
    if gate is None and key.shape[1] == query.shape[2] and query.dtype == compute_dtype(query):
        heads = query.transpose(1, 2), key, value
        out = torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=scale).transpose(1, 2)
        if rows is not None:
            assert keep is not None
            # Not a product: if a NaN arrives there, 0 * NaN is one too.
            out = out.masked_fill(keep.transpose(1, 2) == 0, 0.0)
        elif keep is not None:
            out = out * keep.transpose(1, 2)
        return out.contiguous()
    out = _Few.apply(query, key, value, gate, mask, keep, rows, scale)
    return out


class _Few(torch.autograd.Function):
    """The dense form of `attend_few`: a row of probabilities 0 has no gradient, so the way back asks for no mask."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
        keep: Tensor | None,
        rows: Tensor | None,
        scale: float,
    ) -> Tensor:
        batch, num_queries, heads, width = query.shape
        kv_heads, num_keys = key.shape[1:3]
        given, dtype = query.dtype, compute_dtype(query)
        if given != dtype:
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        # Heads of a group lie side by side: one product serves them all.
        q = query.transpose(1, 2).reshape(batch * kv_heads, heads // kv_heads * num_queries, width)
        k, v = key.reshape(-1, num_keys, width), value.reshape(-1, num_keys, width)
        logits = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale)
        shape = (batch, heads, num_queries, num_keys)
        if mask is not None or gate is not None:
            wide = logits.view(shape)
            for term in (mask, gate):
                if term is not None:
                    wide.add_(term)
        share = logits.softmax(-1)
        if keep is not None:
            share.view(shape).mul_(keep)  # several times as fast as to fill with a mask
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, share, rows)
        ctx.known = (shape, width, given, scale, None if gate is None else gate.shape)
        out = torch.bmm(share, v).view(batch, heads, num_queries, width).transpose(1, 2)
        return out.contiguous() if given == dtype else torch.empty(out.shape, dtype=given).copy_(out)

    @staticmethod
    @differentiable_once
    @without_autocast
    def backward(ctx: Any, grad_out: Tensor | None) -> Any:
        if grad_out is None:
            return (None,) * 8
        q, k, v, share, rows = ctx.saved_tensors
        shape, width, given, scale, of_gate = ctx.known
        batch, heads, num_queries, num_keys = shape
        if rows is not None:
            grad_out = _cleaned(grad_out, rows)
        arrived = grad_out.transpose(1, 2).to(q.dtype).reshape(q.shape)
        grad_value = torch.bmm(share.transpose(1, 2), arrived)
        by_share = torch.bmm(arrived, v.transpose(1, 2))
        by_logit = softmax_backward(by_share, share, -1, q.dtype)
        grad_gate = None
        if of_gate is not None and ctx.needs_input_grad[3]:
            grad_gate = by_logit.view(shape).sum(2, keepdim=True)
            grad_gate = grad_gate if of_gate[0] == batch else grad_gate.sum(0, keepdim=True)
        by_logit.mul_(scale)
        grad_query, grad_key = torch.bmm(by_logit, k), torch.bmm(by_logit.transpose(1, 2), q)
        by_query = grad_query.view(batch, heads, num_queries, width).transpose(1, 2)
        by_key, by_value = (x.view(batch, -1, num_keys, width) for x in (grad_key, grad_value))
        if given != q.dtype:
            by_query, by_key, by_value = by_query.to(given), by_key.to(given), by_value.to(given)
        return by_query, by_key, by_value, grad_gate, None, None, None, None


def attend_few_sources(
    query: Tensor, sources: Sequence[FlashSource], *, query_lengths: Tensor | None, scale: float
) -> Tensor:
    """Return out (B, Lq, H, D) by `attend_few`, of sources that `shares_a_call` and `has_few` take."""
    batch, num_queries, heads, _ = query.shape
    dtype = compute_dtype(query)
    sizes = [source.key.shape[1] for source in sources]
    masks = [
        None if source.lengths is None and source.starts is None else _in_range(source) for source in sources
    ]
    mask = gate = keep = rows = seen = None
    if query_lengths is not None:
        rows = _places(num_queries) < query_lengths[:, None]
        query, keep = _cleaned(query, rows), rows.to(dtype)[:, None, :, None]
    if any(valid is not None for valid in masks):
        parts = [
            torch.ones(1, dtype=torch.bool).expand(batch, size) if valid is None else valid
            for size, valid in zip(sizes, masks, strict=True)
        ]
        seen = (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, None, None]
    if sources[0].causal:
        ahead = torch.ones(num_queries, num_queries, dtype=torch.bool).tril_()
        seen = ahead[None, None] if seen is None else seen & ahead
    if seen is not None:
        mask = hiding(seen, dtype)
        if all(valid is not None for valid in masks):
            has_any = seen.any(-1, keepdim=True)
            if not has_any.all().item():
                keep = has_any.to(dtype) if keep is None else keep * has_any
    if any(source.gate is not None for source in sources):
        gates = [query.new_zeros(1, heads, dtype=dtype) if x.gate is None else x.gate for x in sources]
        samples = max(x.shape[0] for x in gates)
        spread = [x[:, :, None].expand(samples, heads, size) for x, size in zip(gates, sizes, strict=True)]
        gate = torch.cat(spread, -1).unsqueeze(2)
    key, value = (
        _side_by_side(given, masks).transpose(1, 2)
        for given in ([source.key for source in sources], [source.value for source in sources])
    )
    return attend_few(query, key, value, scale=scale, mask=mask, gate=gate, keep=keep, rows=rows)


def shares_a_call(query: Tensor, sources: Sequence[FlashSource]) -> bool:
    """Say whether `attend_joined` takes these sources, and is the faster form."""
    first = sources[0].key
    num_keys = sum(source.key.shape[1] for source in sources)
    if num_keys == 0 or any(
        source.bias is not None or source.key.shape[2] != first.shape[2] for source in sources
    ):
        return False
    if any(source.causal for source in sources) and (len(sources) > 1 or num_keys != query.shape[1]):
        return False
    if query.shape[1] * num_keys <= _FEW_LOGITS:
        return True
    return all(source.lengths is None and source.starts is None for source in sources)


class Joined(NamedTuple):
    """What `attend_joined` hands to its backward pass: keys side by side, and what hides or weighs them."""

    key: Tensor  # (B, keys, Hkv, D)
    value: Tensor
    mask: Tensor | None  # (1 or B, 1 or H, 1, keys) with padding -inf and gates added
    lse: Tensor  # (B, Lq, H), +inf past query_lengths


def attend_joined(
    query: Tensor, sources: Sequence[FlashSource], *, query_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Joined]:
    """Return out (B, Lq, H, D) of one call over all sources together."""
    batch, num_queries, heads, _ = query.shape
    sizes = [source.key.shape[1] for source in sources]
    masks = [
        None if source.lengths is None and source.starts is None else _in_range(source) for source in sources
    ]
    key, value = (
        _side_by_side(given, masks)
        for given in ([source.key for source in sources], [source.value for source in sources])
    )
    mask = None
    gates = [source.gate for source in sources]
    if any(x is not None for x in (*gates, *masks)):
        samples = (
            batch
            if any(x is not None for x in masks)
            else max(gate.shape[0] for gate in gates if gate is not None)
        )
        wide = heads if any(gate is not None for gate in gates) else 1
        mask = torch.zeros(samples, wide, 1, sum(sizes), dtype=compute_dtype(query))
        for part, gate, valid in zip(mask.split(sizes, -1), gates, masks, strict=True):
            if gate is not None:
                part += gate[:, :, None, None]
            if valid is not None:
                part.masked_fill_(~valid[:, None, None], -math.inf)
    is_causal = sources[0].causal
    out, lse = grouped_flash(query, key, value, mask, scale, is_causal)
    if query_lengths is not None:
        past = (torch.arange(num_queries) >= query_lengths[:, None])[..., None]
        out.masked_fill_(past[..., None], 0.0)
        lse.masked_fill_(past, math.inf)
    return out, Joined(key, value, mask, lse)


def _side_by_side(tensors: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    parts = [x if valid is None else _cleaned(x, valid) for x, valid in zip(tensors, masks, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def attend_joined_backward(
    grad_out: Tensor,
    query: Tensor,
    sizes: Sequence[int],
    *,
    query_lengths: Tensor | None,
    scale: float,
    out: Tensor,
    joined: Joined,
    is_causal: bool,
    wants_gate: Sequence[bool],
) -> tuple[Tensor, list[FlashGradients]]:
    """Return the gradients of query and of the sources, of `sizes` keys each, as `attend_backward` does."""
    key, value, mask, lse = joined
    if query_lengths is not None:
        rows = torch.arange(query.shape[1]) < query_lengths[:, None]
        query, grad_out = _cleaned(query, rows), _cleaned(grad_out, rows)
    dtype = compute_dtype(query)
    given = query.dtype
    if given != dtype and any(wants_gate):  # as in `attend_backward`
        query, key, value, grad_out = (x.to(dtype) for x in (query, key, value, grad_out))
        out, _ = grouped_flash(query, key, value, mask, scale, is_causal)
    query_sum, key_sum, value_sum = _Sum(query, dtype), _Sum(key, dtype), _Sum(value, dtype)
    everything = slice(None)
    by_source = (
        torch.zeros(query.shape[0], len(sizes), query.shape[2], dtype=dtype) if any(wants_gate) else None
    )
    for members in _members(query, key):
        heads = everything if members is None else members
        grads = flash_backward(
            grad_out[:, :, heads].transpose(1, 2),
            query[:, :, heads].transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            out[:, :, heads].transpose(1, 2),
            lse[:, :, heads].transpose(1, 2),
            0.0,
            is_causal,
            attn_mask=of_members(mask, members),
            scale=scale,
        )
        for total, grad, place in zip(
            (query_sum, key_sum, value_sum), grads, (members, *[members and everything] * 2), strict=True
        ):
            total.add(grad, whole=True, samples=everything, steps=everything, heads=place)
        if by_source is not None:
            if len(sizes) == 1:
                continue
            dots = _row_dots(value, grads[2].transpose(1, 2))
            for number, part in enumerate(dots.split(list(sizes), 1)):
                by_source[:, number, heads] = part.sum(1)
    if by_source is not None and len(sizes) > 1:  # one gate for all keys changes nothing
        delta = _row_dots(grad_out, out)
        wanted = [number for number, want in enumerate(wants_gate) if want]
        stops = list(itertools.accumulate(sizes))
        # The shares of attention are what comes out where a source's values are 1 in a column of its own.
        width = query.shape[3]
        for some in (wanted[start : start + width] for start in range(0, len(wanted), width)):
            marks = torch.zeros(1, stops[-1], 1, width, dtype=query.dtype)
            for column, number in enumerate(some):
                marks[:, stops[number] - sizes[number] : stops[number], :, column] = 1.0
            shares, _ = grouped_flash(query, key, marks.expand(value.shape), mask, scale)
            pulled = shares[..., : len(some)].to(dtype).mul_(delta[..., None]).sum(1)
            by_source[:, some] -= pulled.transpose(1, 2)
    return query_sum.result().to(given), [
        FlashGradients(
            by_key.to(given), by_value.to(given), by_source[:, number] if by_source is not None else None
        )
        for number, (by_key, by_value) in enumerate(
            zip(*(x.result().split(list(sizes), 1) for x in (key_sum, value_sum)), strict=True)
        )
    ]


def grouped_flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return out (B, Lq, H, D) and log-sum-exp (B, Lq, H), contiguous; the kernel calls that of no key 0.

    Grouped queries take one call for each member of a group, so that keys are never copied.
    """
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    outs, logs = [], []
    for members in _members(query, key.transpose(1, 2)):
        heads = slice(None) if members is None else members
        out, log = flash(
            query[:, :, heads].transpose(1, 2),
            key,
            value,
            0.0,
            is_causal,
            attn_mask=of_members(mask, members),
            scale=scale,
        )
        outs.append(out.transpose(1, 2))
        logs.append(log.transpose(1, 2))
    if len(outs) > 1:
        return torch.stack(outs, 3).flatten(2, 3), torch.stack(logs, 3).flatten(2, 3)
    return outs[0].contiguous(), logs[0].contiguous()


def of_members(mask: Tensor | None, members: slice | None) -> Tensor | None:
    """Return the mask (1 or B, 1 or H, ...) of some heads, None = all."""
    return mask if mask is None or members is None or mask.shape[1] == 1 else mask[:, members]


def hides_all(mask: Tensor) -> Tensor:
    """Return where a mask (1 or B, 1 or H, 1, keys) leaves no key, (1 or B, 1, 1 or H)."""
    return (mask == -math.inf).all(-1).transpose(1, 2)


def _in_range(source: FlashSource) -> Tensor:
    """Return which keys of a source with lengths or starts are valid, (B, Lk) bool."""
    place = _places(source.key.shape[1])
    if source.starts is None:
        assert source.lengths is not None
        return place < source.lengths[:, None]
    valid = place >= source.starts[:, None]
    return valid if source.lengths is None else valid & (place < (source.starts + source.lengths)[:, None])


class _Sum:
    """A gradient of the shape of `like` that several blocks add to, without a pass for a block that covers it all."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype = like, dtype
        self.total: Tensor | None = None

    def add(self, grad: Tensor, *, whole: bool, samples: slice, steps: slice, heads: slice | None) -> None:
        """Add grad (samples, heads, steps, D)."""
        grad = grad.transpose(1, 2)
        if whole and heads is None:
            # A lone block stays in its dtype; a second one finds the sum in the compute dtype.
            self.total = grad if self.total is None else self.total.to(self.dtype).add_(grad)
            return
        if self.total is None:
            self.total = torch.zeros(self.like.shape, dtype=self.dtype)
        self.total = self.total.to(self.dtype)
        self.total[samples, steps, slice(None) if heads is None else heads] += grad

    def result(self) -> Tensor:
        """Return the sum in the dtype of the tensor that it is the gradient of."""
        if self.total is None:
            return torch.zeros(self.like.shape, dtype=self.like.dtype)
        return self.total.to(self.like.dtype).contiguous()


def _attend_source(
    query: Tensor, source: FlashSource, rows: list[int] | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the softmax over one source, (B, Lq, H, D), and its log-sum-exp with the gate, (B, Lq, H)."""
    out = log = None
    for part in _parts(query, source, rows):
        for members in _members(query, source.key):
            block = _Block.of(part, query, source, members, clean_queries=False)
            part_out, part_log = flash(
                block.query, block.key, block.value, 0.0, part.causal, attn_mask=block.mask, scale=scale
            )
            part_out, part_log = part_out.transpose(1, 2), part_log.transpose(1, 2)
            # The kernel calls the log-sum-exp of no key 0.
            dead = None
            if part.valid is not None:
                dead = ~part.valid.any(1)[:, None, None]
            if source.bias is not None:
                hidden = part_log < _HIDDEN / 10
                dead = hidden if dead is None else dead | hidden
            if part.rows is not None:
                dead = ~part.rows[..., None] if dead is None else dead | ~part.rows[..., None]
            if dead is not None:
                part_out = part_out.masked_fill(dead[..., None], 0.0)
                part_log = part_log.masked_fill(dead, -math.inf)
            if part.whole_rows and members is None and not part.again:
                out, log = part_out, part_log
                continue
            if out is None or log is None:
                out = torch.zeros(query.shape, dtype=query.dtype)
                log = torch.full(query.shape[:3], -math.inf, dtype=part_log.dtype)
            heads = slice(None) if members is None else members
            into, into_log = (x[part.samples, part.queries, heads] for x in (out, log))
            if part.again:
                join(into, into_log, part_out, part_log)
            else:
                into.copy_(part_out)
                into_log.copy_(part_log)
    if out is None or log is None:
        out = torch.zeros(query.shape, dtype=query.dtype)
        log = torch.full(query.shape[:3], -math.inf, dtype=compute_dtype(query))
    out, log = out.contiguous(), log.contiguous()
    return out, log if source.gate is None else log.add_(source.gate[:, None])


def join(out: Tensor, log: Tensor, part_out: Tensor, part_log: Tensor) -> None:
    """Join the softmax over some keys (out, its log-sum-exp) with that over others, in place of the first."""
    joint = torch.logaddexp(log, part_log)
    finite = joint.masked_fill(joint == -math.inf, 0.0)
    first, second = (torch.exp(x - finite).unsqueeze(-1) for x in (log, part_log))
    if out.dtype == joint.dtype:
        out.mul_(first).addcmul_(part_out, second)
    else:
        out.copy_((out * first).addcmul_(part_out.to(joint.dtype), second))
    log.copy_(joint)


def _backward_part(
    part: _Part,
    grad_out: Tensor | None,
    query: Tensor,
    source: FlashSource,
    scale: float,
    out: Tensor,
    log: Tensor,
    shift: Tensor | None,
    query_sum: _Sum,
    key_sum: _Sum,
    value_sum: _Sum,
    gate: Tensor | None,
) -> None:
    """Add a part's gradients; grad_out None = 0 (then only `shift` has any)."""
    for members in _members(query, source.key):
        block = _Block.of(part, query, source, members, clean_queries=True)
        heads = slice(None) if members is None else members
        q, k, v = block.query, block.key, block.value
        where = (part.samples, part.queries, heads)
        part_log = log[where].transpose(1, 2)
        width = q.shape[-1]
        if grad_out is None:
            arrived = kept = torch.zeros_like(q)
        else:
            arrived, kept = grad_out[where].transpose(1, 2), out[where].transpose(1, 2)
            if part.rows is not None:
                arrived = arrived.masked_fill(~part.rows[:, None, :, None], 0.0)
        if part.rows is not None:
            part_log = part_log.masked_fill(~part.rows[:, None], math.inf)
        if shift is not None:
            q, k, v, arrived, kept = (_widened(x, part_log.dtype) for x in (q, k, v, arrived, kept))
            arrived[..., width] = 1.0
            torch.neg(shift[where].transpose(1, 2), out=kept[..., width])
        grad_query, grad_key, grad_value = flash_backward(
            arrived, q, k, v, kept, part_log, 0.0, part.causal, attn_mask=block.mask, scale=scale
        )
        if shift is not None:
            grad_query, grad_key, grad_value = (x[..., :width] for x in (grad_query, grad_key, grad_value))
        query_sum.add(
            grad_query, whole=part.whole_rows, samples=part.samples, steps=part.queries, heads=members
        )
        # Members of a group share the keys, and so all add to the whole of their heads.
        every = None if members is None else slice(None)
        for total, grad in ((key_sum, grad_key), (value_sum, grad_value)):
            total.add(grad, whole=part.whole_keys, samples=part.samples, steps=part.keys, heads=every)
        if gate is not None and grad_out is not None:
            gate[part.samples, heads] += _sum_of_product(block.value, grad_value, gate.dtype)


class _Block(NamedTuple):
    query: Tensor  # (samples, heads, queries, D)
    key: Tensor  # (samples, Hkv, keys, D)
    value: Tensor
    mask: Tensor | None

    @classmethod
    def of(
        cls, part: _Part, query: Tensor, source: FlashSource, members: slice | None, *, clean_queries: bool
    ) -> _Block:
        """Cut a part out of its tensors: views, but for padding that no slice leaves out."""
        heads = slice(None) if members is None else members
        q = query[part.samples, part.queries, heads]
        key, value = source.key[part.samples, part.keys], source.value[part.samples, part.keys]
        mask = None
        if source.bias is not None:
            places = (part.samples, heads, part.queries, part.keys)
            mask = source.bias[
                tuple(
                    slice(None) if size == 1 else place
                    for size, place in zip(source.bias.shape, places, strict=True)
                )
            ]
            mask = mask.to(compute_dtype(query)).clamp_min(_HIDDEN)
        if part.valid is not None:
            key, value = (_cleaned(x, part.valid) for x in (key, value))
            hidden = torch.zeros(part.valid.shape, dtype=compute_dtype(query))
            hidden = hidden.masked_fill_(~part.valid, -math.inf)[:, None, None]
            mask = hidden if mask is None else mask + hidden
        if part.rows is not None and clean_queries:
            q = _cleaned(q, part.rows)
        return cls(q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask)


def _members(query: Tensor, key: Tensor) -> list[slice | None]:
    """Return the heads of query that share no key head, a slice for each member of a group; [None] = all."""
    group = query.shape[2] // key.shape[2]
    return [None] if group == 1 else [slice(member, None, group) for member in range(group)]


def _parts(query: Tensor, source: FlashSource, rows: list[int] | None) -> Iterator[_Part]:
    """Yield blocks that cover every visible (query, key) pair once, the queries of each source's samples in order."""
    batch, num_queries, heads, width = query.shape
    size = source.key.shape[1]
    if source.lengths is None and source.starts is None and rows is None:
        yield from _diagonal(query, source, slice(0, batch), (0, size, num_queries), None, None, whole=True)
        return
    begins = [0] * batch if source.starts is None else source.starts.tolist()
    ends = [size] * batch
    if source.lengths is not None:
        ends = [begin + length for begin, length in zip(begins, source.lengths.tolist(), strict=True)]
    limits = rows if rows is not None else [num_queries] * batch
    ranges = list(zip(begins, ends, limits, strict=True))
    runs: list[tuple[int, int]] = []
    for number, here in enumerate(ranges):
        if runs and ranges[runs[-1][0]] == here:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    filled = [x for x in ranges if x[1] > x[0] and x[2] > 0]
    if not filled:
        return
    low, high, most = min(x[0] for x in filled), max(x[1] for x in filled), max(x[2] for x in filled)
    if len(runs) > 1:
        threads = torch.get_num_threads()

        def paid(samples: int) -> int:
            """Count heads, with those that threads could take while others work: a thread takes a head whole."""
            return -(-samples * heads // threads) * threads

        spared = paid(batch) * most * (high - low)
        for start, stop in runs:
            begin, end, limit = ranges[start]
            spared -= paid(stop - start) * max(0, end - begin) * limit
        worth = spared * width >= (_WORTH_A_CALL if threads == 1 else _WORTH_A_MEETING) * len(runs)
        # A mask with a place for every query would be larger than the bias that asks for it.
        square = source.bias is not None and source.bias.shape[2] > 1
        slanted = source.causal and any(x[0] != low for x in filled)
        if not (square or slanted or worth):
            places = torch.arange(low, high)
            valid = None
            if any(x[:2] != (low, high) for x in ranges):
                valid = (places >= torch.tensor(begins)[:, None]) & (places < torch.tensor(ends)[:, None])
            given = None if rows is None else _below(rows, most)
            yield from _diagonal(query, source, slice(0, batch), (low, high, most), valid, given)
            return
    for start, stop in runs:
        yield from _diagonal(query, source, slice(start, stop), ranges[start], None, None)


def _diagonal(
    query: Tensor,
    source: FlashSource,
    samples: slice,
    spans: tuple[int, int, int],
    valid: Tensor | None,
    rows: Tensor | None,
    *,
    whole: bool = False,
) -> Iterator[_Part]:
    """Yield the parts of some samples: keys begin .. end, queries 0 .. limit."""
    batch, num_queries = query.shape[:2]
    size = source.key.shape[1]
    begin, end, limit = spans

    def part(first: int, start: int, stop: int, causal: bool, again: bool = False) -> _Part:
        every = whole or (samples.stop - samples.start == batch)
        return _Part(
            samples,
            slice(first, limit),
            slice(start, stop),
            causal,
            whole_rows=every and first == 0 and limit == num_queries,
            whole_keys=every and start == 0 and stop == size,
            again=again,
            valid=None if valid is None else valid[:, start - begin : stop - begin],
            rows=None if rows is None else rows[:, first:],
        )

    first = 0
    if source.causal:
        shift = size - num_queries - begin  # query i sees keys begin .. begin + i + shift
        first = max(0, -shift)
        end = min(end, begin + limit + shift)
        if first < limit and begin < end:
            ahead = first + shift  # keys before the one where the diagonal starts: all queries see them
            if first + 1 == limit:
                yield part(first, begin, min(end, begin + ahead + 1), causal=False)
                return
            if ahead > 0:
                yield part(first, begin, min(end, begin + ahead), causal=False)
            if begin + ahead < end:
                yield part(first, begin + ahead, end, causal=True, again=ahead > 0)
        return
    if limit > 0 and begin < end:
        yield part(0, begin, end, causal=False)


def _may_see_nothing(query: Tensor, source: FlashSource) -> bool:
    known = (source.lengths, source.starts, source.gate, source.bias)
    fewer = source.key.shape[1] < query.shape[1] if source.causal else source.key.shape[1] == 0
    return fewer or any(x is not None for x in known)


def _cleaned(tensor: Tensor, valid: Tensor) -> Tensor:
    """Return a tensor (samples, places, H, D) that is finite where it isn't valid: 0 * NaN must not reach a sum."""
    # A sum is finite only if its terms are, and reads where a copy reads and writes.
    if math.isfinite(tensor.detach().sum(dtype=compute_dtype(tensor)).item()):
        return tensor
    return tensor.masked_fill(~valid[:, :, None, None], 0.0)


def _below(counts: list[int], size: int) -> Tensor:
    """Return which of `size` places lie below each count, (B, size) bool."""
    return torch.arange(size) < torch.tensor(counts)[:, None]


def _widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy with one column more, and as many as make the width a multiple of 8, all 0."""
    *shape, width = tensor.shape
    wide = torch.zeros(*shape, -(-(width + 1) // 8) * 8, dtype=dtype)
    wide[..., :width] = tensor
    return wide


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum over D of a * b, in the compute dtype."""
    dtype = compute_dtype(a)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def _sum_of_product(value: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over keys and D of value * grad, (samples, heads)."""
    return (value.to(dtype) * grad.to(dtype)).sum((2, 3))
