"""Tiled attention in plain torch: the engine behind backend "torch" of both attention operators.

`attend` and `attend_backward` work on tiles of (some samples, some query rows, some keys) that are sized to
stay
in cache, so the logits of a tile are all that ever exists of the Lq x Lk matrix. Every source of keys has
its own running softmax, and the sources
are joined by their log-sum-exp at the end; the backward pass recomputes the probabilities from it.

It runs on any device in fp32 (fp64 for fp64 inputs), half precision being raised tile by tile. The
trade-off: it is a handful of batched
matrix products and passes per tile, bounded in memory and exact, but on an accelerator a fused kernel is
several times faster.

The functions here trust their arguments; the operators check them.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The Triton kernels are unrolled over the sources of a softmax.
MAX_TRITON_SOURCES = 8

_KEY_BLOCK = 512
# Logits in a tile: half a MiB of fp32 a thread stays in a core's second-level cache.
_TILE_PER_THREAD = 1 << 17
_TILE_ON_DEVICE = 1 << 26


@dataclass(frozen=True)
class KeySource:
    """Keys and values of one source as the engine reads them; the tensors may be views of anything.

    key, value: (B, Lk, Hkv, D). valid: (B, Lk) bool, None = all. gate: (1 or B, H). bias: each size 1 or
        full against
    (B, H, Lq, Lk). diagonal: query i sees keys up to i + diagonal, None = all.
    """

    key: Tensor
    value: Tensor
    valid: Tensor | None = None
    gate: Tensor | None = None
    bias: Tensor | None = None
    diagonal: int | None = None


@dataclass(frozen=True)
class SourceGradients:
    """Accumulators of one source in the compute dtype, added to in place; None = no gradient is wanted."""

    key: Tensor
    value: Tensor
    gate: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Dropout:
    """Dropout of probabilities; the mask depends on (seed, source, head, query, key) alone.

    seeds: (B,) int64. place: number of the first source, where the sources of one call are run one by one.
    """

    probability: float
    seeds: Tensor
    place: int = 0

    @property
    def threshold(self) -> int:
        """A weight is kept where its 32 random bits are at least this; the largest word at most."""
        return min(round(self.probability * 2**32), 2**32 - 1)

    def keep(self, rows: slice, source: int, queries: range, keys: range, num_heads: int) -> Tensor:
        """Return the factors 0 or 1 / (1 - p), fp32, of shape (samples, H, queries, keys)."""
        device = self.seeds.device
        seeds = self.seeds[rows]
        low, high = seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF
        state = _mix(_mix(low) ^ high)
        state = _mix(state ^ ((self.place + source) * 0x9E3779B1 & 0xFFFFFFFF))
        heads = torch.arange(num_heads, device=device)
        state = _mix(state[:, None] + heads * 0x85EBCA6B)
        steps = torch.arange(queries.start, queries.stop, device=device)
        state = _mix(state[:, :, None] + steps * 0xC2B2AE35)
        steps = torch.arange(keys.start, keys.stop, device=device)
        bits = _mix(state[..., None] + steps * 0x9E3779B9)
        kept = bits >= self.threshold
        return kept.to(torch.float32).div_(1 - self.probability)


def _mix(x: Tensor) -> Tensor:
    """Scramble the low 32 bits of int64 values: a bijection of words; each bit in flips half of those out."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that softmax and sums use: fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def without_autocast(form: Callable[_P, _R]) -> Callable[_P, _R]:
    """Let an operator compute in the dtypes that it is given.

    Autocast would round the products inside, change the dtype of results, and mix dtypes that in-place sums refuse.
    """

    @functools.wraps(form)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return run(*args, **kwargs)
        return form(*args, **kwargs)

    return run


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of an autograd function refuse to be differentiated.

    torch's `once_differentiable` does so only where the second derivative is asked of what it returned and of nothing
    else: in a sum with other terms, a gradient penalty would silently lose its gradient.
    """

    @functools.wraps(backward)
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled():  # that is create_graph=True, here
            raise RuntimeError(
                "attention has no second derivative, which create_graph=True asks for; "
                'backend="reference" has one'
            )
        return backward(*args)

    return run


def attend(
    query: Tensor,
    sources: list[KeySource],
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    query_valid: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Fill out (B, Lq, H, D) and lse (B, Lq, H, S), the log-sum-exp of each source, for query (B, Lq, H, D).

    query_valid: (B, Lq) bool; other rows get out 0 and lse -inf.
    """
    for rows, chunk in _chunks(query, sources):
        for steps in _query_tiles(query, sources):
            tile = _tile(_valid_rows(query, query_valid, rows, slice(steps.start, steps.stop))).mul_(scale)
            parts, logs = [], []
            for index, source in enumerate(chunk):
                part, log = _attend_source(tile, source, index, steps, rows, query.shape[2], dropout)
                parts.append(part)
                logs.append(log)
            joint = logs[0] if len(logs) == 1 else torch.stack(logs).logsumexp(0)
            if len(parts) == 1:
                total = parts[0]
            else:
                finite = joint.masked_fill(joint == -math.inf, 0.0)
                total = sum(
                    (part * (log - finite).exp_() for part, log in zip(parts[1:], logs[1:], strict=True)),
                    start=parts[0] * (logs[0] - finite).exp_(),
                )
            _untile(total, out[rows, steps.start : steps.stop])
            for index, log in enumerate(logs):
                _untile(log, lse[rows, steps.start : steps.stop, :, index : index + 1])
    if query_valid is not None:
        out.masked_fill_(~query_valid[:, :, None, None], 0.0)
        lse.masked_fill_(~query_valid[:, :, None, None], -math.inf)


def attend_backward(
    grad_out: Tensor,
    query: Tensor,
    sources: list[KeySource],
    *,
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_query: Tensor,
    grad_sources: list[SourceGradients],
    source_lse: Tensor | None = None,
    grad_lse: Tensor | None = None,
    query_valid: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Fill grad_query and add to grad_sources.

    lse: (B, Lq, H), joint over the sources. grad_lse: gradient of source_lse (B, Lq, H, S), both or none.
        Shapes otherwise as in `attend`.
    """
    num_heads = query.shape[2]
    for rows, chunk in _chunks(query, sources):
        grad_keys = [torch.zeros_like(source.key) for source in chunk]
        grad_values = [torch.zeros_like(source.value) for source in chunk]
        for steps in _query_tiles(query, sources):
            span = slice(steps.start, steps.stop)
            whole_tile = _tile(_valid_rows(query, query_valid, rows, span)).mul_(scale)
            whole_grad = _tile(_valid_rows(grad_out, query_valid, rows, span))
            whole_delta = (whole_grad * _tile(out[rows, span])).sum(-1, keepdim=True)
            # A query that sees nothing: exp(logit - inf) is 0, exp(-inf - -inf) would be NaN.
            whole_log = _tile(lse[rows, span, :, None])
            whole_log.masked_fill_(whole_log == -math.inf, math.inf)
            grad_tile = torch.zeros_like(whole_tile)
            for index, (source, into) in enumerate(zip(chunk, grad_sources, strict=True)):
                tile, grad, delta, log, grad_query_tile = (
                    source.grouped(x) for x in (whole_tile, whole_grad, whole_delta, whole_log, grad_tile)
                )
                extra = None
                if grad_lse is not None and source_lse is not None:
                    own = source.grouped(_tile(source_lse[rows, span, :, index : index + 1]))
                    pull = source.grouped(_tile(grad_lse[rows, span, :, index : index + 1]))
                    extra = (own.masked_fill_(own == -math.inf, math.inf), pull)
                for keys in source.blocks(steps):
                    logits = source.logits(tile, keys, steps)
                    probability = torch.exp(logits - log)
                    key = source.key[:, keys.start : keys.stop]
                    value = source.value[:, keys.start : keys.stop]
                    grad_p = torch.bmm(grad, value.transpose(1, 2))
                    dropped = probability
                    if dropout is not None:
                        keep = dropout.keep(rows, index, steps, keys, num_heads).view_as(grad_p)
                        grad_p.mul_(keep)
                        dropped = probability * keep
                    grad_values[index][:, keys.start : keys.stop].baddbmm_(dropped.transpose(1, 2), grad)
                    grad_logits = grad_p.sub_(delta).mul_(probability)
                    if extra is not None:
                        own, pull = extra
                        grad_logits.add_(torch.exp(logits - own).mul_(pull))
                    grad_query_tile.baddbmm_(grad_logits, key)
                    grad_keys[index][:, keys.start : keys.stop].baddbmm_(grad_logits.transpose(1, 2), tile)
                    by_head = grad_logits.view(-1, num_heads, len(steps), len(keys))
                    if into.gate is not None:
                        _add_reduced(into.gate, by_head.sum((2, 3)), (rows, slice(None)))
                    if into.bias is not None:
                        where = (rows, slice(None), span, slice(keys.start, keys.stop))
                        _add_reduced(into.bias, by_head, where)
            _untile(grad_tile.mul_(scale), grad_query[rows, span])
        for index, into in enumerate(grad_sources):
            shape = (rows.stop - rows.start, into.key.shape[2], *grad_keys[index].shape[1:])
            into.key[rows] += grad_keys[index].view(shape).transpose(1, 2)
            into.value[rows] += grad_values[index].view(shape).transpose(1, 2)


def check_tensor(name: str, given: Any, source: int | None = None) -> None:
    """Raise ValueError if an argument, or this field of a source, isn't a tensor."""
    if not isinstance(given, Tensor):
        name = name if source is None else f"sources[{source}].{name}"
        raise ValueError(f"{name} is a {type(given).__name__}; it needs to be a tensor")


def readable(tensor: Tensor) -> bool:
    """Say whether values may be looked at for a check: on a device that waits for it, so only when asked."""
    return tensor.device.type == "cpu" or os.environ.get("MMSCALE_CHECK") == "1"


def triton_refusal(query: Tensor, num_sources: int) -> str | None:
    """Say why the Triton kernels can't take a query of this dtype and width, or so many sources, or None."""
    if query.dtype == torch.float64:
        return "the kernels compute in fp32, and the input is fp64"
    if query.shape[-1] > 256:
        return f"the kernels hold a head in registers, up to D = 256, and D is {query.shape[-1]}"
    if num_sources > MAX_TRITON_SOURCES:
        return f"the kernels are unrolled over up to {MAX_TRITON_SOURCES} sources, and {num_sources} share a softmax"
    return None


@dataclass(frozen=True)
class _ChunkSource:
    """A source for some samples, its key and value (samples * Hkv, Lk, D) with invalid rows zero."""

    key: Tensor
    value: Tensor
    invalid: Tensor | None  # (samples, 1, 1, Lk)
    gate: Tensor | None  # (1 or samples, H, 1, 1)
    bias: Tensor | None
    diagonal: int | None
    num_heads: int

    def grouped(self, tile: Tensor) -> Tensor:
        """View a tile (samples * H, queries, X) as (samples * Hkv, group * queries, X)."""
        return tile.view(self.key.shape[0], -1, tile.shape[-1])

    def blocks(self, steps: range) -> Iterator[range]:
        """Yield the key ranges that the queries of `steps` can see."""
        stop = self.key.shape[1]
        if self.diagonal is not None:
            stop = min(stop, max(0, steps.stop + self.diagonal))
        for start in range(0, stop, _KEY_BLOCK):
            yield range(start, min(stop, start + _KEY_BLOCK))

    def logits(self, tile: Tensor, keys: range, steps: range) -> Tensor:
        """Return the masked logits (samples * Hkv, group * queries, keys) of scaled queries."""
        product = torch.bmm(tile, self.key[:, keys.start : keys.stop].transpose(1, 2))
        logits = product.view(-1, self.num_heads, len(steps), len(keys))
        if self.gate is not None:
            logits += self.gate
        if self.bias is not None:
            queries = slice(None) if self.bias.shape[2] == 1 else slice(steps.start, steps.stop)
            columns = slice(None) if self.bias.shape[3] == 1 else slice(keys.start, keys.stop)
            logits += self.bias[:, :, queries, columns]
        if self.invalid is not None:
            logits.masked_fill_(self.invalid[..., keys.start : keys.stop], -math.inf)
        if self.diagonal is not None and keys.stop - 1 > steps.start + self.diagonal:
            last = torch.arange(steps.start, steps.stop, device=tile.device) + self.diagonal
            places = torch.arange(keys.start, keys.stop, device=tile.device)
            logits.masked_fill_(places > last[:, None], -math.inf)
        return product


def _attend_source(
    tile: Tensor,
    source: _ChunkSource,
    index: int,
    steps: range,
    rows: slice,
    num_heads: int,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """Return the output of a tile (samples * H, queries, D) over one source, and its log-sum-exp (..., 1)."""
    shape = tile.shape
    tile = source.grouped(tile)
    total = maximum = weight = None
    for keys in source.blocks(steps):
        logits = source.logits(tile, keys, steps)
        high = logits.amax(-1, keepdim=True)
        high.masked_fill_(high == -math.inf, torch.finfo(high.dtype).min)
        if maximum is not None:
            high = torch.maximum(maximum, high)
        probability = logits.sub_(high).exp_()
        mass = probability.sum(-1, keepdim=True)
        if dropout is not None:
            probability *= dropout.keep(rows, index, steps, keys, num_heads).view_as(probability)
        part = torch.bmm(probability, source.value[:, keys.start : keys.stop])
        if total is None:
            total, weight = part, mass
        else:
            assert maximum is not None
            assert weight is not None
            fade = torch.exp(maximum - high)
            total = total.mul_(fade).add_(part)
            weight = weight.mul_(fade).add_(mass)
        maximum = high
    if total is None or weight is None or maximum is None:  # no key in sight of any query of the tile
        return tile.new_zeros(shape), tile.new_full((*shape[:-1], 1), -math.inf)
    log = weight.log().add_(maximum)
    total.div_(weight.masked_fill_(weight == 0, 1.0))
    return total.view(shape), log.view(*shape[:-1], 1)


def _chunks(query: Tensor, sources: list[KeySource]) -> Iterator[tuple[slice, list[_ChunkSource]]]:
    """Yield runs of samples whose tiles fit the budget, with their keys laid out for batched products."""
    batch, num_queries, num_heads, _ = query.shape
    longest = max((source.key.shape[1] for source in sources), default=0)
    tile = max(1, num_heads * _rows_per_tile(query, sources) * min(longest, _KEY_BLOCK))
    size = max(1, min(batch, _budget(query) // tile))
    dtype = compute_dtype(query)
    for start in range(0, batch if num_queries else 0, size):
        rows = slice(start, min(batch, start + size))
        yield rows, [_lay_out(source, rows, dtype, num_heads) for source in sources]


def _lay_out(source: KeySource, rows: slice, dtype: torch.dtype, num_heads: int) -> _ChunkSource:
    valid = None if source.valid is None else source.valid[rows]
    if valid is not None and valid.device.type == "cpu" and bool(valid.all()):
        valid = None

    def contiguous(tensor: Tensor) -> Tensor:
        tensor = tensor[rows]
        laid = torch.empty(
            (tensor.shape[0], tensor.shape[2], tensor.shape[1], tensor.shape[3]),
            dtype=dtype,
            device=tensor.device,
        )
        laid.copy_(tensor.transpose(1, 2))
        if valid is not None:
            # whatever padding holds, 0 * NaN included, must not reach a product
            laid.masked_fill_(~valid[:, None, :, None], 0.0)
        return laid.flatten(0, 1)

    gate = source.gate
    if gate is not None:
        gate = (gate if gate.shape[0] == 1 else gate[rows])[:, :, None, None].to(dtype)
    bias = source.bias
    if bias is not None:
        bias = bias if bias.shape[0] == 1 else bias[rows]
    return _ChunkSource(
        key=contiguous(source.key),
        value=contiguous(source.value),
        invalid=None if valid is None else ~valid[:, None, None, :],
        gate=gate,
        bias=bias,
        diagonal=source.diagonal,
        num_heads=num_heads,
    )


def _budget(query: Tensor) -> int:
    return _TILE_PER_THREAD * torch.get_num_threads() if query.device.type == "cpu" else _TILE_ON_DEVICE


def _rows_per_tile(query: Tensor, sources: list[KeySource]) -> int:
    longest = max(1, min(_KEY_BLOCK, max((source.key.shape[1] for source in sources), default=1)))
    return max(1, min(query.shape[1], max(16, _budget(query) // (query.shape[2] * longest))))


def _query_tiles(query: Tensor, sources: list[KeySource]) -> Iterator[range]:
    size = _rows_per_tile(query, sources)
    for start in range(0, query.shape[1], size):
        yield range(start, min(query.shape[1], start + size))


def _tile(tensor: Tensor) -> Tensor:
    """Copy (samples, queries, H, X) to (samples * H, queries, X) in the compute dtype."""
    samples, queries, heads, width = tensor.shape
    tile = torch.empty((samples, heads, queries, width), dtype=compute_dtype(tensor), device=tensor.device)
    return tile.copy_(tensor.transpose(1, 2)).flatten(0, 1)


def _valid_rows(tensor: Tensor, valid: Tensor | None, rows: slice, span: slice) -> Tensor:
    """Take a part of (B, Lq, H, X), with other rows zero: what they hold must not reach a product."""
    part = tensor[rows, span]
    return part if valid is None else part.masked_fill(~valid[rows, span, None, None], 0.0)


def _untile(tile: Tensor, into: Tensor) -> None:
    """Copy (samples * H, queries, X) to a (samples, queries, H, X) view."""
    samples, queries, heads, width = into.shape
    into.copy_(tile.view(samples, heads, queries, width).transpose(1, 2))


def _add_reduced(into: Tensor, grad: Tensor, where: tuple[slice, ...]) -> None:
    """Add grad to into[where], summed over the dimensions in which `into` broadcasts."""
    dims = [dim for dim in range(grad.dim()) if into.shape[dim] == 1]
    target = into[tuple(slice(None) if into.shape[dim] == 1 else where[dim] for dim in range(grad.dim()))]
    target += grad.sum(dims, keepdim=True) if dims else grad
