"""Attention of one set of queries over several sources of keys, without concatenating them.

Each `Source` keeps its own keys, values, lengths, gate and bias; one softmax runs over all of them (or one
over each)::

    text = Source(text_k, text_v, lengths=text_lengths)
    image = Source(image_k, image_v, gate=log_weight)
    out = cross_modal_attention(query, [text, image])
    out, mass = cross_modal_attention(query, [text, image], return_mass=True)  # who was looked at, and how
    much

Besides the output, the operator underneath returns the log-sum-exp of every source, from which `lse` and
`mass` follow and through which their
gradients flow. Inside a trunk, where all tokens share one buffer, `packed_attention` is the cheaper form.

The trade-off: masks are ranges (lengths, starts, causal), so padding costs nothing; anything else is a
`bias`, which costs the memory of its own shape.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cpu_attention as cpu
from . import tiled_attention as tiled
from .dispatch import Decision, choose, custom_op, is_torch_on_cpu, register_decision


@dataclass(frozen=True)
class Source:
    """Keys and values that queries attend to, and what is known about them.

    key, value: (B, Lk, Hkv, D), Hkv divides the H of the query (grouped queries); any strides with a unit
        one in D.
    lengths, starts: (B,) int32 or int64; valid keys are starts[b] .. starts[b] + lengths[b] - 1. None =
        all, from 0; 0 is allowed. What the
        other rows hold doesn't matter.
    gate: (H,) or (B, H), added to every logit of this source (the log weight of a modality); differentiable.
    bias: broadcastable to (B, H, Lq, Lk), added to the logits; differentiable; -inf masks a key out.
    causal: query i sees keys 0 .. i + Lk - Lq.
    """

    key: Tensor
    value: Tensor
    lengths: Tensor | None = None
    starts: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False


@tiled.without_autocast
def cross_modal_attention(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_lengths: Tensor | None = None,
    scale: float | None = None,
    softmax: str = "joint",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attend from query (B, Lq, H, D) to all sources.

    query: fp64, fp32, bf16 or fp16, any strides with a unit one in D; keys and values have the same dtype.
    query_lengths: (B,) int32 or int64; rows past it get out 0, gradient 0 and lse -inf.
    scale: factor of query . key, D ** -0.5 by default.
    softmax: "joint" = one softmax over all sources; "per_source" = one for each, outputs summed.
    dropout_p: probability in [0, 1) with which an attention weight is dropped; it needs `seed`.
    seed: int, or (B,) int64, one for each sample, so that its dropout doesn't depend on the row or rank it
        lies on.
        The mask is a function of (seed, source, head, query, key), drawn again in the backward pass.
    return_lse: also return lse, (B, H, Lq) for "joint", (B, H, Lq, num_sources) for "per_source".
    return_mass: also return mass (B, H, Lq, num_sources), the share of attention that each source got
        ("joint" only); all shares are 0 where lse is -inf.

    Returns out (B, Lq, H, D) of query's dtype, then lse, then mass if asked; these two are fp32 (fp64 for
    fp64) and differentiable, and know no dropout.
    A query with no valid key: out 0, gradients 0, lse -inf. Deterministic, forward and backward.
    Raises ValueError on bad input; lengths on a device are clamped instead, unless MMSCALE_CHECK=1.
    """
    sources = _sources(query, sources, query_lengths)
    _check_options(softmax, scale, dropout_p, seed, return_mass)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if softmax == "per_source" and len(sources) > 1:
        seeds = _seeds(query, seed) if dropout_p > 0 else None
        # a source's place tells its dropout from that of the others
        runs = [
            _run(query, [source], query_lengths, scale, dropout_p, seeds, place, backend, return_lse)
            for place, source in enumerate(sources)
        ]
        out = sum(
            (out.to(source_lse.dtype) for out, source_lse in runs[1:]), start=runs[0][0].to(runs[0][1].dtype)
        ).to(query.dtype)
        return (out, torch.cat([lse for _, lse in runs], -1).transpose(1, 2)) if return_lse else out
    seeds = _seeds(query, seed) if dropout_p > 0 else None
    wants_lse = return_lse or return_mass
    out, source_lse = _run(
        query, list(sources), query_lengths, scale, dropout_p, seeds, 0, backend, wants_lse
    )
    if not wants_lse:
        return out
    results = [out]
    source_lse = source_lse.transpose(1, 2)
    if softmax == "per_source":
        return out, source_lse
    dead = (source_lse == -math.inf).all(-1, keepdim=True)
    # a finite stand-in, so that the gradient of such a row is 0 and not NaN
    safe = source_lse.masked_fill(dead, 0.0)
    if return_lse:
        results.append(safe.logsumexp(-1).masked_fill(dead.squeeze(-1), -math.inf))
    if return_mass:
        results.append(safe.softmax(-1).masked_fill(dead, 0.0))
    return tuple(results)


def _decide(
    query: Tensor,
    sources: Sequence[Source],
    *,
    query_lengths: Tensor | None = None,
    scale: float | None = None,
    softmax: str = "joint",
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    backend: str | None = None,
) -> Decision:
    sources = _sources(query, sources, query_lengths)
    _check_options(softmax, scale, dropout_p, seed, return_mass)
    seeds = _seeds(query, seed) if dropout_p > 0 else None
    _check(query, sources, query_lengths, seeds)
    return _choose(query, len(sources) if softmax == "joint" else 1, backend)


register_decision(cross_modal_attention, _decide)


def _choose(query: Tensor, num_joint: int, backend: str | None) -> Decision:
    return choose("cross_modal_attention", backend, query.device, tiled.triton_refusal(query, num_joint))


def _run(
    query: Tensor,
    sources: list[Source],
    query_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seeds: Tensor | None,
    place: int,
    backend: str | None,
    wants_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return out and the log-sum-exp of each source, (B, Lq, H, S), under one softmax.

    Without `wants_lse` the second is whatever came cheapest.
    """
    if backend == "reference":
        _check(query, sources, query_lengths, seeds)
        return _reference(query, sources, query_lengths, scale, dropout_p, seeds, place)
    flat: list[list[Tensor]] = [[], [], [], []]
    index: list[int] = []
    for source in sources:
        known = (source.lengths, source.starts, source.gate, source.bias)
        for tensors, tensor in zip(flat, known, strict=True):
            index.append(-1 if tensor is None else len(tensors))
            if tensor is not None:
                tensors.append(tensor)
    keys, values = [source.key for source in sources], [source.value for source in sources]
    table: Any = (index, [source.causal for source in sources], query_lengths, scale, dropout_p, seeds, place)
    lists: Any = (keys, values, *flat)
    if not cpu.is_direct(together := [query, *(tensor for tensors in lists for tensor in tensors)]):
        return _attention(query, *lists, *table, backend or "")
    if not wants_lse and _use_flash(query, dropout_p):
        _check(query, sources, query_lengths, seeds)
        known_sources = [_flash_source(source) for source in sources]
        is_torch = is_torch_on_cpu(backend, query.device)
        is_torch = is_torch or _choose(query, len(sources), backend).backend == "torch"
        if is_torch and cpu.shares_a_call(query, known_sources):
            num_keys = sum(source.key.shape[1] for source in sources)
            if cpu.has_few(query, num_keys, (one.gate for one in known_sources if one.gate is not None)):
                out = cpu.attend_few_sources(query, known_sources, query_lengths=query_lengths, scale=scale)
                return out, out
            return _Joined.apply(known_sources, query_lengths, scale, *together)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in together):
        return _Direct.apply([len(tensors) for tensors in lists], (*table, backend or ""), *together)
    arguments: Any = (query, *lists, *table, backend or "")
    return _attend(*arguments)


def _attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor],
    starts: Sequence[Tensor],
    gates: Sequence[Tensor],
    biases: Sequence[Tensor],
    index: Sequence[int],
    causal: Sequence[bool],
    query_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seeds: Tensor | None,
    place: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return out and the log-sum-exp of each source, (B, Lq, H, S).

    index: four numbers a source, its places in lengths, starts, gates and biases, -1 where it has none.
    place: number of the first source, for dropout.
    """
    sources = _gather(keys, values, lengths, starts, gates, biases, index, causal)
    _check(query, sources, query_lengths, seeds)
    chosen = _choose(query, len(sources), backend or None).backend
    if chosen == "torch" and _use_flash(query, dropout_p):
        out, lse = cpu.attend(
            query, [_flash_source(source) for source in sources], query_lengths=query_lengths, scale=scale
        )
        if len(sources) == 1 and sources[0].gate is not None:
            # No share weighs a lone source, so a gate of -inf has to close it here.
            out.masked_fill_(lse == -math.inf, 0.0)
        return out, lse
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((*query.shape[:3], len(sources)), dtype=tiled.compute_dtype(query), device=query.device)
    if lse.numel() == 0:
        return out, lse
    if chosen == "triton":
        from . import triton_attention

        call = _triton_call(query, sources, query_lengths, scale, _dropout(dropout_p, seeds, place))
        triton_attention.attend(call, out=out, lse=lse)
        return out, lse
    tiled.attend(
        query,
        [_engine_source(query, source) for source in sources],
        scale=scale,
        out=out,
        lse=lse,
        query_valid=_in_range(query.shape[1], query_lengths, None),
        dropout=_dropout(dropout_p, seeds, place),
    )
    return out, lse


_attention = custom_op("mmscale_kernels::cross_modal_attention")(_attend)


@_attention.register_fake
def _(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor],
    starts: Sequence[Tensor],
    gates: Sequence[Tensor],
    biases: Sequence[Tensor],
    index: Sequence[int],
    causal: Sequence[bool],
    query_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seeds: Tensor | None,
    place: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(
        (*query.shape[:3], len(keys)), dtype=tiled.compute_dtype(query), device=query.device
    )


def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    out: Tensor,
    source_lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor],
    starts: Sequence[Tensor],
    gates: Sequence[Tensor],
    biases: Sequence[Tensor],
    wants_bias: Sequence[bool],
    index: Sequence[int],
    causal: Sequence[bool],
    query_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seeds: Tensor | None,
    place: int,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of query, keys, values, gates and biases in a row; a bias may want none (empty)."""
    sources = _gather(keys, values, lengths, starts, gates, biases, index, causal)
    dtype = tiled.compute_dtype(query)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    chosen = _choose(query, len(sources), backend or None).backend
    if chosen == "torch" and _use_flash(query, dropout_p) and not any(wants_bias):
        grad_query, found = cpu.attend_backward(
            grad_out,
            query,
            [_flash_source(source) for source in sources],
            query_lengths=query_lengths,
            scale=scale,
            out=out,
            source_lse=source_lse,
            grad_lse=grad_lse,
        )
        by_gate = [one.gate for one in found if one.gate is not None]
        return [
            grad_query,
            *(one.key for one in found),
            *(one.value for one in found),
            *(
                (grad if grad.shape == like.shape else grad.sum(0)).to(like.dtype)
                for grad, like in zip(by_gate, gates, strict=True)
            ),
            *(bias.new_empty(0) for bias in biases),
        ]
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if chosen == "triton" and source_lse.numel():
        from . import triton_attention

        made = triton_attention.attend_backward(
            _triton_call(query, sources, query_lengths, scale, _dropout(dropout_p, seeds, place)),
            grad_out,
            out=out,
            lse=source_lse,
            grad_query=grad_query,
            grad_keys=[torch.empty(key.shape, dtype=key.dtype, device=key.device) for key in keys],
            grad_values=[
                torch.empty(value.shape, dtype=value.dtype, device=value.device) for value in values
            ],
            wants_bias=[
                source.bias is not None and wants_bias[index[4 * n + 3]] for n, source in enumerate(sources)
            ],
            grad_lse=None if grad_lse is None else grad_lse.contiguous(),
        )
        grads = [grad_query, *made.keys, *made.values]
        for source, by_head in zip(sources, made.gates, strict=True):
            if source.gate is not None and by_head is not None:
                by_head = by_head if source.gate.shape == by_head.shape else by_head.sum(0)
                grads.append(by_head.to(source.gate.dtype))
        for source, grad in zip(sources, made.biases, strict=True):
            if source.bias is not None:
                grads.append(source.bias.new_empty(0) if grad is None else grad.view(source.bias.shape))
        return grads

    def zeros(like: Tensor) -> Tensor:
        return torch.zeros(like.shape, dtype=dtype, device=like.device)

    grad_keys, grad_values, grad_gates = (
        [zeros(tensor) for tensor in tensors] for tensors in (keys, values, gates)
    )
    grad_biases = [
        zeros(bias) if want else bias.new_empty(0) for bias, want in zip(biases, wants_bias, strict=True)
    ]
    into = []
    for number in range(len(sources)):
        gate, bias = index[4 * number + 2], index[4 * number + 3]
        into.append(
            tiled.SourceGradients(
                key=grad_keys[number],
                value=grad_values[number],
                gate=_widened(grad_gates[gate], 2) if gate >= 0 else None,
                bias=_widened(grad_biases[bias], 4) if bias >= 0 and wants_bias[bias] else None,
            )
        )
    if source_lse.numel():
        tiled.attend_backward(
            grad_out,
            query,
            [_engine_source(query, source) for source in sources],
            scale=scale,
            out=out,
            lse=source_lse.logsumexp(-1),
            grad_query=grad_query,
            grad_sources=into,
            source_lse=source_lse,
            grad_lse=grad_lse,
            query_valid=_in_range(query.shape[1], query_lengths, None),
            dropout=_dropout(dropout_p, seeds, place),
        )
    return [
        grad_query,
        *(grad.to(query.dtype) for grad in (*grad_keys, *grad_values)),
        *(grad.to(like.dtype) for grad, like in zip(grad_gates, gates, strict=True)),
        *(grad.to(like.dtype) for grad, like in zip(grad_biases, biases, strict=True)),
    ]


_attention_backward = custom_op("mmscale_kernels::cross_modal_attention_backward")(_attend_backward)


@_attention_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    out: Tensor,
    source_lse: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor],
    starts: Sequence[Tensor],
    gates: Sequence[Tensor],
    biases: Sequence[Tensor],
    wants_bias: Sequence[bool],
    index: Sequence[int],
    causal: Sequence[bool],
    query_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seeds: Tensor | None,
    place: int,
    backend: str,
) -> list[Tensor]:
    return [
        *(
            torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for tensor in (query, *keys, *values, *gates)
        ),
        *(
            torch.empty(bias.shape if want else (0,), dtype=bias.dtype, device=bias.device)
            for bias, want in zip(biases, wants_bias, strict=True)
        ),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, keys, values, lengths, starts, gates, biases, *table = inputs
    index, causal, query_lengths, scale, dropout_p, seeds, place, backend = table
    ctx.set_materialize_grads(False)
    lists = (keys, values, lengths, starts, gates, biases)
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.wants_bias = [bias.requires_grad for bias in biases]
    ctx.table = (index, causal, scale, dropout_p, place, backend)
    flat = [tensor for tensors in lists for tensor in tensors]
    ctx.save_for_backward(query, query_lengths, seeds, *output, *flat)


@tiled.without_autocast
def _backward(
    ctx: Any,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    form: Callable[..., list[Tensor]] = _attention_backward,
) -> tuple[Any, ...]:
    query, query_lengths, seeds, out, source_lse, *flat = ctx.saved_tensors
    lists = _split(flat, ctx.counts)
    index, causal, scale, dropout_p, place, backend = ctx.table
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = form(
        grad_out, grad_lse, query, out, source_lse, *lists, ctx.wants_bias, index, causal,
        query_lengths, scale, dropout_p, seeds, place, backend,
    )  # fmt: skip
    num_keys, _, num_lengths, num_starts, num_gates, _ = ctx.counts
    grad_query, *grads = grads
    grad_keys, grads = grads[:num_keys], grads[num_keys:]
    grad_values, grads = grads[:num_keys], grads[num_keys:]
    grad_gates, grad_biases = grads[:num_gates], grads[num_gates:]
    by_bias = [grad if want else None for grad, want in zip(grad_biases, ctx.wants_bias, strict=True)]
    nothing = [None] * num_lengths, [None] * num_starts
    return grad_query, grad_keys, grad_values, *nothing, grad_gates, by_bias, *[None] * 8


_attention.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator's autograd without the operator; see `cpu_attention.is_direct`."""

    @staticmethod
    def forward(ctx: Any, counts: list[int], table: tuple[Any, ...], query: Tensor, *flat: Tensor) -> Any:
        lists: Any = _split(flat, counts)
        out, source_lse = _attend(query, *lists, *table)
        _setup_context(ctx, (query, *lists, *table), (out, source_lse))
        return out, source_lse

    @staticmethod
    @tiled.differentiable_once
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        grad_query, *by_list = _backward(ctx, grad_out, grad_lse, _attend_backward)[:7]
        return None, None, grad_query, *(grad for grads in by_list for grad in grads)


class _Joined(torch.autograd.Function):
    """`cpu_attention.attend_joined` under autograd; tensors come as to `_Direct`, and none is a bias."""

    @staticmethod
    def forward(
        ctx: Any,
        sources: list[cpu.FlashSource],
        query_lengths: Tensor | None,
        scale: float,
        query: Tensor,
        *flat: Tensor,
    ) -> Any:
        out, joined = cpu.attend_joined(query, sources, query_lengths=query_lengths, scale=scale)
        ctx.set_materialize_grads(False)
        ctx.sizes = [source.key.shape[1] for source in sources]
        ctx.scale = scale
        ctx.is_causal = sources[0].causal
        # The gates are the last tensors of the row.
        gates = [source.gate for source in sources]
        ctx.first_gate = 4 + len(flat) - sum(gate is not None for gate in gates)
        places = itertools.count(ctx.first_gate)
        ctx.gates = [-1 if gate is None else next(places) for gate in gates]
        ctx.save_for_backward(query, query_lengths, out, *joined, *flat[ctx.first_gate - 4 :])
        ctx.mark_non_differentiable(joined.lse)
        return out, joined.lse

    @staticmethod
    @tiled.differentiable_once
    @tiled.without_autocast
    def backward(ctx: Any, grad_out: Tensor | None, _: Any) -> Any:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        query, query_lengths, out, *row = ctx.saved_tensors
        joined, gates = cpu.Joined(*row[:4]), row[4:]
        grad_query, found = cpu.attend_joined_backward(
            grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous(),
            query,
            ctx.sizes,
            query_lengths=query_lengths,
            scale=ctx.scale,
            out=out,
            joined=joined,
            is_causal=ctx.is_causal,
            wants_gate=[place >= 0 and ctx.needs_input_grad[place] for place in ctx.gates],
        )
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        grads[3] = grad_query
        num_sources = len(found)
        for number, one in enumerate(found):
            grads[4 + number], grads[4 + num_sources + number] = one.key, one.value
            place = ctx.gates[number]
            if place >= 0 and one.gate is not None:
                like = gates[place - ctx.first_gate]
                grads[place] = (one.gate if like.dim() == 2 else one.gate.sum(0)).to(like.dtype)
        return tuple(grads)


def _split(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """Cut a row into lists of the given lengths."""
    ends = list(itertools.accumulate(counts))
    return [list(flat[end - count : end]) for end, count in zip(ends, counts, strict=True)]


def _gather(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    lengths: Sequence[Tensor],
    starts: Sequence[Tensor],
    gates: Sequence[Tensor],
    biases: Sequence[Tensor],
    index: Sequence[int],
    causal: Sequence[bool],
) -> list[Source]:
    """Put the sources together again."""

    def pick(tensors: Sequence[Tensor], place: int) -> Tensor | None:
        return tensors[place] if place >= 0 else None

    return [
        Source(
            keys[number],
            values[number],
            lengths=pick(lengths, index[4 * number]),
            starts=pick(starts, index[4 * number + 1]),
            gate=pick(gates, index[4 * number + 2]),
            bias=pick(biases, index[4 * number + 3]),
            causal=causal[number],
        )
        for number in range(len(keys))
    ]


def _in_range(size: int, lengths: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """Return which of `size` places lie in starts .. starts + lengths - 1, (B, size) bool; None = all."""
    if lengths is None and starts is None:
        return None
    given = lengths if lengths is not None else starts
    assert given is not None
    place = torch.arange(size, device=given.device)
    valid = torch.ones(given.shape[0], size, dtype=torch.bool, device=given.device)
    if starts is not None:
        valid &= place >= starts[:, None]
    if lengths is not None:
        end = lengths if starts is None else starts + lengths
        valid &= place < end[:, None]
    return valid


def _widened(tensor: Tensor, dims: int) -> Tensor:
    """View with leading dimensions of size 1 up to `dims` dimensions."""
    return tensor[(None,) * (dims - tensor.dim())]


def _engine_source(query: Tensor, source: Source) -> tiled.KeySource:
    size = source.key.shape[1]
    return tiled.KeySource(
        key=source.key,
        value=source.value,
        valid=_in_range(size, source.lengths, source.starts),
        gate=None if source.gate is None else _widened(source.gate, 2),
        bias=None if source.bias is None else _widened(source.bias, 4),
        diagonal=size - query.shape[1] if source.causal else None,
    )


def _use_flash(query: Tensor, dropout_p: float) -> bool:
    # aten's flash kernel for the CPU reads strided views in place, and knows no dropout
    return query.device.type == "cpu" and dropout_p == 0 and query.numel() > 0


def _flash_source(source: Source) -> cpu.FlashSource:
    gate, bias = source.gate, source.bias
    return cpu.FlashSource(
        source.key,
        source.value,
        source.lengths,
        source.starts,
        None if gate is None else _widened(gate, 2).to(tiled.compute_dtype(source.key)),
        None if bias is None else _widened(bias, 4),
        source.causal,
    )


def _triton_call(
    query: Tensor,
    sources: Sequence[Source],
    query_lengths: Tensor | None,
    scale: float,
    dropout: tiled.Dropout | None,
) -> Any:
    from .triton_attention import Call, KeySource, QueryRange

    num_queries = query.shape[1]
    given = [
        KeySource(
            source.key,
            source.value,
            lengths=source.lengths,
            starts=source.starts,
            gate=None if source.gate is None else _unit_stride(_widened(source.gate, 2)),
            bias=None if source.bias is None else _widened(source.bias, 4),
            shift=source.key.shape[1] - num_queries if source.causal else None,
        )
        for source in sources
    ]
    return Call(query, given, [QueryRange(0, num_queries, query_lengths)], scale, dropout)


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _dropout(probability: float, seeds: Tensor | None, place: int) -> tiled.Dropout | None:
    return (
        None if seeds is None or probability == 0 else tiled.Dropout(probability, seeds.contiguous(), place)
    )


def _seeds(query: Tensor, seed: int | Tensor | None) -> Tensor:
    """Return one seed for each sample, (B,) int64."""
    if isinstance(seed, Tensor):
        return seed
    assert seed is not None
    rows = torch.arange(query.shape[0], device=query.device, dtype=torch.int64)
    # the low word is the seed, the high word the row
    return (rows << 32) | (seed & 0xFFFFFFFF)


def _reference(
    query: Tensor,
    sources: list[Source],
    query_lengths: Tensor | None,
    scale: float,
    dropout_p: float,
    seeds: Tensor | None,
    place: int,
) -> tuple[Tensor, Tensor]:
    """Dense attention with every mask written out, differentiated by autograd."""
    batch, num_queries, num_heads, _ = query.shape
    dtype = tiled.compute_dtype(query)
    rows = _in_range(num_queries, query_lengths, None)
    rows = torch.ones(batch, num_queries, dtype=torch.bool, device=query.device) if rows is None else rows
    wide = query.to(dtype).masked_fill(~rows[:, :, None, None], 0.0)
    dropout = _dropout(dropout_p, seeds, place)
    all_logits, all_seen, all_values, all_kept = [], [], [], []
    for number, source in enumerate(sources):
        size = source.key.shape[1]
        seen = rows[:, None, :, None].expand(batch, 1, num_queries, size)
        key, value = source.key.to(dtype), source.value.to(dtype)
        valid = _in_range(size, source.lengths, source.starts)
        if valid is not None:
            seen = seen & valid[:, None, None, :]
            key, value = (x.masked_fill(~valid[:, :, None, None], 0.0) for x in (key, value))
        if source.causal:
            last = torch.arange(num_queries, device=query.device) + size - num_queries
            seen = seen & (torch.arange(size, device=query.device) <= last[:, None])
        key, value = (x.repeat_interleave(num_heads // x.shape[2], dim=2) for x in (key, value))
        logits = torch.einsum("bqhd,bkhd->bhqk", wide, key) * scale
        if source.gate is not None:
            logits = logits + source.gate.to(dtype)[..., None, None]
        if source.bias is not None:
            logits = logits + source.bias.to(dtype)
        all_logits.append(logits)
        all_seen.append((seen & (logits > -math.inf)).expand_as(logits))
        all_values.append(value)
        if dropout is not None:
            kept = dropout.keep(slice(None), number, range(num_queries), range(size), num_heads)
            all_kept.append(kept.to(dtype))
    seen = torch.cat(all_seen, -1)
    logits = torch.cat(all_logits, -1).masked_fill(~seen, torch.finfo(dtype).min)
    probability = logits.softmax(-1).masked_fill(~seen, 0.0)
    if dropout is not None:
        probability = probability * torch.cat(all_kept, -1)
    out = torch.einsum("bhqk,bkhd->bqhd", probability, torch.cat(all_values, 1)).to(query.dtype)
    lse = []
    for part, visible in zip(all_logits, all_seen, strict=True):
        dead = ~visible.any(-1)
        filled = part.masked_fill(~visible, -math.inf).masked_fill(dead[..., None], 0.0)
        log = filled.logsumexp(-1) if part.shape[-1] else part.new_zeros(part.shape[:-1])
        lse.append(log.masked_fill(dead, -math.inf))
    return out, torch.stack(lse, -1).transpose(1, 2)


def _sources(query: Tensor, sources: Sequence[Source], query_lengths: Tensor | None) -> list[Source]:
    """Check what has to hold before shapes can be looked at; return the sources as a list."""
    if not isinstance(sources, list | tuple) or not all(isinstance(source, Source) for source in sources):
        raise ValueError(f"sources is {type(sources).__name__}; it needs to be a list of Source")
    if len(sources) == 0:
        raise ValueError("sources is empty; it needs at least one Source")
    tiled.check_tensor("query", query)
    if query.dim() != 4 or query.shape[3] == 0:
        _check_query(query)
    if query_lengths is not None:
        tiled.check_tensor("query_lengths", query_lengths)
    for number, source in enumerate(sources):
        for name in ("key", "value", "lengths", "starts", "gate", "bias"):
            given = getattr(source, name)
            if given is not None or name in ("key", "value"):
                tiled.check_tensor(name, given, number)
    return list(sources)


def _check_options(
    softmax: str, scale: float | None, dropout_p: float, seed: int | Tensor | None, return_mass: bool
) -> None:
    if isinstance(scale, Tensor):
        raise ValueError("scale is a tensor, which would get no gradient; it needs to be a number, or None")
    if softmax not in ("joint", "per_source"):
        raise ValueError(f'softmax is {softmax!r}; it needs to be "joint" or "per_source"')
    if return_mass and softmax != "joint":
        raise ValueError('return_mass is True and softmax is "per_source"; mass needs softmax="joint"')
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p is {dropout_p}; it needs to lie in [0, 1)")
    if dropout_p > 0 and seed is None:
        raise ValueError(
            f"seed is None and dropout_p is {dropout_p}; dropout needs an int or a (B,) int64 tensor"
        )
    if seed is not None and not isinstance(seed, int | numbers.Integral | Tensor):
        raise ValueError(f"seed is {seed!r}; it needs to be an int or a (B,) int64 tensor")


def _check(
    query: Tensor, sources: Sequence[Source], query_lengths: Tensor | None, seeds: Tensor | None
) -> None:
    """Raise ValueError naming the first argument that can't be used."""
    _check_query(query)
    batch, num_queries, num_heads, width = query.shape
    _check_counts("query_lengths", query_lengths, query, num_queries)
    if seeds is not None and (seeds.shape != (batch,) or seeds.dtype != torch.int64):
        raise ValueError(
            f"seed has shape {tuple(seeds.shape)} and dtype {seeds.dtype}; "
            f"it needs ({batch},) and int64, or to be an int"
        )
    if seeds is not None and seeds.device != query.device:
        raise ValueError(f"seed lies on {seeds.device}; it needs query's device, {query.device}")
    for number, source in enumerate(sources):
        name = f"sources[{number}]"
        key, value = source.key, source.value
        if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != width:
            raise ValueError(
                f"{name}.key has shape {tuple(key.shape)}; "
                f"it needs ({batch}, Lk, Hkv, {width}) for query {tuple(query.shape)}"
            )
        if value.shape != key.shape:
            raise ValueError(
                f"{name}.value has shape {tuple(value.shape)}; it needs that of key, {tuple(key.shape)}"
            )
        if key.shape[2] == 0 or num_heads % key.shape[2]:
            raise ValueError(
                f"{name}.key has {key.shape[2]} heads; it needs a number that divides query's {num_heads}"
            )
        for label, tensor in (("key", key), ("value", value)):
            if tensor.dtype != query.dtype or tensor.device != query.device:
                raise ValueError(
                    f"{name}.{label} is {tensor.dtype} on {tensor.device}; "
                    f"it needs {query.dtype} on {query.device}, as query"
                )
            _check_stride(f"{name}.{label}", tensor)
        _check_counts(f"{name}.lengths", source.lengths, query, key.shape[1])
        _check_counts(f"{name}.starts", source.starts, query, key.shape[1])
        if source.lengths is not None and source.starts is not None and tiled.readable(source.lengths):
            end = int((source.starts + source.lengths).max()) if batch else 0
            if end > key.shape[1]:
                raise ValueError(
                    f"{name}.starts + {name}.lengths reaches {end}; "
                    f"it needs to stay within Lk = {key.shape[1]}"
                )
        gate, bias = source.gate, source.bias
        if gate is not None and gate.shape not in ((num_heads,), (batch, num_heads)):
            raise ValueError(
                f"{name}.gate has shape {tuple(gate.shape)}; "
                f"it needs ({num_heads},) or ({batch}, {num_heads})"
            )
        if bias is not None:
            full = (batch, num_heads, num_queries, key.shape[1])
            sizes = zip(reversed(bias.shape), reversed(full), strict=False)
            if bias.dim() > 4 or any(size not in (1, whole) for size, whole in sizes):
                raise ValueError(
                    f"{name}.bias has shape {tuple(bias.shape)}; it needs to broadcast to {full}"
                )
        for label, term in (("gate", gate), ("bias", bias)):
            if term is not None and (not term.is_floating_point() or term.device != query.device):
                raise ValueError(
                    f"{name}.{label} is {term.dtype} on {term.device}; "
                    f"it needs a floating dtype on {query.device}"
                )


def _check_query(query: Tensor) -> None:
    if query.dim() != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}; it needs to be (B, Lq, H, D)")
    if query.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"query has dtype {query.dtype}; it needs float64, float32, bfloat16 or float16")
    if query.shape[2] == 0 or query.shape[3] == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}; it needs H >= 1 and D >= 1")
    _check_stride("query", query)


def _check_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}; it needs stride 1 in D"
        )


def _check_counts(name: str, counts: Tensor | None, query: Tensor, most: int) -> None:
    if counts is None:
        return
    batch = query.shape[0]
    if counts.shape != (batch,) or counts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} has shape {tuple(counts.shape)} and dtype {counts.dtype}; "
            f"it needs ({batch},), int32 or int64"
        )
    if counts.device != query.device:
        raise ValueError(f"{name} lies on {counts.device}; it needs query's device, {query.device}")
    if batch and tiled.readable(counts):
        low, high = (int(x) for x in counts.aminmax())
        if low < 0 or high > most:
            raise ValueError(f"{name} lies in {low} .. {high}; it needs to lie in 0 .. {most}")
