"""The contrastive losses on one block of rows and columns, as Triton kernels: the same functions as
`torch_losses`.

Each program has one tile of the logits, in registers. The first pass writes each tile's maximum and sum by
row and by column, which are combined in a fixed order: no atomics, so results repeat bit for bit. The second
pass computes the tiles again and writes the loss's gradient with respect to the logits, for a band of columns
at a time; torch's matrix products turn a band into gradients of x and y.

The trade-off: writing and reading the bands costs memory traffic (6 bytes a logit in bf16) but leaves two of
the four matrix products to the vendor's library. Bands and the first pass's tables are bounded, so memory
stays O((N + M) * D).

fp16, bf16 and fp32 inputs; products are accumulated in fp32. fp32 products are IEEE ones unless torch's
float32 matmul precision allows TF32. Positives are subtracted before a gradient is rounded to bf16, so that a
probability near 1 leaves no rounding error behind. Bands are fp32 for fp16 inputs, whose range ends above 1 /
N of a large batch.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, tiles and constants, none of which has a type for Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from .torch_losses import Statistics, Targets

_TILE = 128
_DEPTH = 64
# Bytes of a band of gradients, and of the first pass's tables.
_BAND_BYTES = 2**28
_TABLE_BYTES = 2**26


@triton.jit
def _similarities(
    x,
    y,
    row,
    column,
    num_rows,
    num_columns,
    num_features,
    x_stride,
    x_step,
    y_stride,
    y_step,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x[row] @ y[column].T in fp32; 0 outside."""
    product = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, num_features, DEPTH):
        feature = start + tl.arange(0, DEPTH)
        inside = feature < num_features
        x_part = tl.load(
            x + row[:, None].to(tl.int64) * x_stride + feature[None, :] * x_step,
            mask=(row < num_rows)[:, None] & inside[None, :],
            other=0.0,
        )
        y_part = tl.load(
            y + column[None, :].to(tl.int64) * y_stride + feature[:, None] * y_step,
            mask=(column < num_columns)[None, :] & inside[:, None],
            other=0.0,
        )
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            x_part = x_part.to(tl.float32)
            y_part = y_part.to(tl.float32)
        product = tl.dot(x_part, y_part, product, input_precision=PRECISION)
    return product


@triton.jit
def _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS: tl.constexpr):
    """Where a tile's positives are."""
    if HAS_LABELS:
        of_row = tl.load(row_labels + row, mask=row < num_rows, other=0)
        of_column = tl.load(column_labels + column, mask=column < num_columns, other=0)
        match = of_row[:, None] == of_column[None, :]
    else:
        match = (row + diagonal)[:, None] == column[None, :]
    return match & (row < num_rows)[:, None] & (column < num_columns)[None, :]


@triton.jit
def _wanted(
    match,
    row,
    column,
    num_rows,
    num_columns,
    row_share,
    column_share,
    row_smooth,
    column_smooth,
    HAS_SMOOTH: tl.constexpr,
):
    """The targets of a tile: factors of its logits in the loss."""
    by_row = tl.load(row_share + row, mask=row < num_rows, other=0.0)
    by_column = tl.load(column_share + column, mask=column < num_columns, other=0.0)
    wanted = tl.where(match, by_row[:, None] + by_column[None, :], 0.0)
    if HAS_SMOOTH:
        by_row = tl.load(row_smooth + row, mask=row < num_rows, other=0.0)
        by_column = tl.load(column_smooth + column, mask=column < num_columns, other=0.0)
        valid = (row < num_rows)[:, None] & (column < num_columns)[None, :]
        wanted += tl.where(valid, by_row[:, None] + by_column[None, :], 0.0)
    return wanted


@triton.jit
def _statistics_kernel(
    x,
    y,
    scale,
    row_share,
    column_share,
    row_smooth,
    column_smooth,
    row_labels,
    column_labels,
    row_max,
    row_sum,
    column_max,
    column_sum,
    positive,
    num_rows,
    num_columns,
    num_features,
    diagonal,
    x_stride,
    x_step,
    y_stride,
    y_step,
    HAS_LABELS: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile's maxima, sums of exponentials and sum of targets * logits, each to its own place."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    row = row_tile * TILE + tl.arange(0, TILE)
    column = column_tile * TILE + tl.arange(0, TILE)
    similarity = _similarities(
        x,
        y,
        row,
        column,
        num_rows,
        num_columns,
        num_features,
        x_stride,
        x_step,
        y_stride,
        y_step,
        UPCAST,
        PRECISION,
        DEPTH,
    )
    logits = similarity * tl.load(scale)
    match = _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS)
    wanted = _wanted(
        match,
        row,
        column,
        num_rows,
        num_columns,
        row_share,
        column_share,
        row_smooth,
        column_smooth,
        HAS_SMOOTH,
    )
    tl.store(positive + row_tile * tl.num_programs(1) + column_tile, tl.sum(tl.sum(wanted * logits, 1), 0))

    # A tile has at least one row and one column inside, so a maximum over what is inside is finite.
    inside = tl.where((column < num_columns)[None, :], logits, float("-inf"))
    top = tl.max(inside, 1)
    place = column_tile.to(tl.int64) * num_rows + row
    tl.store(row_max + place, top, mask=row < num_rows)
    tl.store(row_sum + place, tl.sum(tl.exp(inside - top[:, None]), 1), mask=row < num_rows)

    inside = tl.where((row < num_rows)[:, None], logits, float("-inf"))
    top = tl.max(inside, 0)
    place = row_tile.to(tl.int64) * num_columns + column
    tl.store(column_max + place, top, mask=column < num_columns)
    tl.store(column_sum + place, tl.sum(tl.exp(inside - top[None, :]), 0), mask=column < num_columns)


@triton.jit
def _gradients_kernel(
    x,
    y,
    scale,
    row_share,
    column_share,
    row_smooth,
    column_smooth,
    row_labels,
    column_labels,
    row_shift,
    row_factor,
    column_shift,
    column_factor,
    grad,
    scale_grad,
    num_rows,
    num_columns,
    num_features,
    diagonal,
    x_stride,
    x_step,
    y_stride,
    y_step,
    HAS_LABELS: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile's gradient with respect to the logits, and the sum of that times the similarities."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    row = row_tile * TILE + tl.arange(0, TILE)
    column = column_tile * TILE + tl.arange(0, TILE)
    similarity = _similarities(
        x,
        y,
        row,
        column,
        num_rows,
        num_columns,
        num_features,
        x_stride,
        x_step,
        y_stride,
        y_step,
        UPCAST,
        PRECISION,
        DEPTH,
    )
    logits = similarity * tl.load(scale)
    match = _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS)
    wanted = _wanted(
        match,
        row,
        column,
        num_rows,
        num_columns,
        row_share,
        column_share,
        row_smooth,
        column_smooth,
        HAS_SMOOTH,
    )
    # Outside, a shift of inf makes the exponential 0.
    shift = tl.load(row_shift + row, mask=row < num_rows, other=float("inf"))
    factor = tl.load(row_factor + row, mask=row < num_rows, other=0.0)
    result = tl.exp(logits - shift[:, None]) * factor[:, None]
    shift = tl.load(column_shift + column, mask=column < num_columns, other=float("inf"))
    factor = tl.load(column_factor + column, mask=column < num_columns, other=0.0)
    result += tl.exp(logits - shift[None, :]) * factor[None, :]
    result -= wanted
    valid = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    result = tl.where(valid, result, 0.0)
    place = row[:, None].to(tl.int64) * num_columns + column[None, :]
    tl.store(grad + place, result.to(grad.dtype.element_ty), mask=valid)
    tl.store(
        scale_grad + row_tile * tl.num_programs(1) + column_tile, tl.sum(tl.sum(result * similarity, 1), 0)
    )


@triton.jit
def _sigmoid_kernel(
    x,
    y,
    scale,
    bias,
    row_weight,
    row_labels,
    column_labels,
    grad,
    sums,
    num_rows,
    num_columns,
    num_features,
    diagonal,
    x_stride,
    x_step,
    y_stride,
    y_step,
    HAS_LABELS: tl.constexpr,
    WANT_GRADIENTS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile's loss, its gradient with respect to the logits, and that one's sums for scale and bias."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    row = row_tile * TILE + tl.arange(0, TILE)
    column = column_tile * TILE + tl.arange(0, TILE)
    similarity = _similarities(
        x,
        y,
        row,
        column,
        num_rows,
        num_columns,
        num_features,
        x_stride,
        x_step,
        y_stride,
        y_step,
        UPCAST,
        PRECISION,
        DEPTH,
    )
    match = _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS)
    valid = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    sign = tl.where(match, -1.0, 1.0)
    logits = sign * (similarity * tl.load(scale) + tl.load(bias))
    weight = tl.load(row_weight + row, mask=row < num_rows, other=0.0)

    # softplus(l) = max(l, 0) + log1p(e). log(1 + e) alone would lose what makes up the loss at a bias of -10;
    # the quotient puts back what rounding 1 + e took away.
    e = tl.exp(-tl.abs(logits))
    rounded = 1.0 + e
    log1p = tl.where(rounded == 1.0, e, tl.log(rounded) * (e / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))
    loss = tl.where(valid, (tl.maximum(logits, 0.0) + log1p) * weight[:, None], 0.0)
    place = row_tile * tl.num_programs(1) + column_tile
    tl.store(sums + 3 * place, tl.sum(tl.sum(loss, 1), 0))
    if WANT_GRADIENTS:
        result = sign * tl.where(logits >= 0, 1.0, e) / rounded * weight[:, None]
        result = tl.where(valid, result, 0.0)
        tl.store(sums + 3 * place + 1, tl.sum(tl.sum(result * similarity, 1), 0))
        tl.store(sums + 3 * place + 2, tl.sum(tl.sum(result, 1), 0))
        at = row[:, None].to(tl.int64) * num_columns + column[None, :]
        tl.store(grad + at, result.to(grad.dtype.element_ty), mask=valid)


def _bands(num_rows: int, num_columns: int, bytes_per_column: float, limit: int) -> list[slice]:
    """Cut the columns into bands of whole tiles that take `limit` bytes or one tile each."""
    width = max(1, int(limit / (bytes_per_column * _TILE))) * _TILE
    if not num_rows:
        return []
    return [slice(start, min(start + width, num_columns)) for start in range(0, num_columns, width)]


def _how(x: Tensor) -> dict[str, object]:
    """Compile-time constants that depend on the inputs' dtype and on torch's settings."""
    tf32 = x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return {
        "UPCAST": x.dtype == torch.bfloat16 and not x.is_cuda,
        "PRECISION": "tf32" if tf32 else "ieee",
        "TILE": _TILE,
        "DEPTH": _DEPTH,
        "num_warps": 8,
        "num_stages": 3,
    }


def _single(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def _grid(num_rows: int, num_columns: int) -> tuple[int, int]:
    return triton.cdiv(num_rows, _TILE), triton.cdiv(num_columns, _TILE)


def _target_vectors(targets: Targets) -> list[Tensor | None]:
    return [
        _single(targets.row_share),
        _single(targets.column_share),
        _single(targets.row_smooth),
        _single(targets.column_smooth),
        targets.row_labels,
        targets.column_labels,
    ]


def _combine(maxima: Tensor, sums: Tensor) -> Tensor:
    """Log-sum-exp in fp64 of tiles' maxima and sums, over the first dimension."""
    top = maxima.amax(0)
    return (sums * (maxima - top).exp_()).sum(0, dtype=torch.float64).log_().add_(top)


def statistics(x: Tensor, y: Tensor, scale: Tensor, targets: Targets, *, keep: bool) -> Statistics:
    """As `torch_losses.statistics`; nothing is kept."""
    num_rows, num_features = x.shape
    row_lse = x.new_full((num_rows,), -torch.inf, dtype=torch.float64)
    column_lse = x.new_full((len(y),), -torch.inf, dtype=torch.float64)
    positive = x.new_zeros((), dtype=torch.float64)
    # A column costs 8 bytes for each of num_rows / TILE tiles, and the band's tiles 8 bytes for each row.
    for band in _bands(num_rows, len(y), 16 * num_rows / _TILE, _TABLE_BYTES):
        here, part = y[band], targets.columns(band.start, band.stop)
        grid = _grid(num_rows, len(here))
        by_row = x.new_empty((2, grid[1], num_rows), dtype=torch.float32)
        by_column = x.new_empty((2, grid[0], len(here)), dtype=torch.float32)
        positives = x.new_empty(grid, dtype=torch.float32)
        _statistics_kernel[grid](
            x,
            here,
            scale,
            *_target_vectors(part),
            *by_row,
            *by_column,
            positives,
            num_rows,
            len(here),
            num_features,
            part.diagonal,
            *x.stride(),
            *here.stride(),
            HAS_LABELS=targets.row_labels is not None,
            HAS_SMOOTH=targets.row_smooth is not None,
            **_how(x),
        )
        row_lse = torch.logaddexp(row_lse, _combine(*by_row))
        column_lse[band] = _combine(*by_column)
        positive += positives.sum(dtype=torch.float64)
    return Statistics(row_lse, column_lse, positive)


def gradients(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    targets: Targets,
    found: Statistics,
    *,
    dx: Tensor | None,
    dy: Tensor | None,
) -> Tensor:
    """As `torch_losses.gradients`."""
    assert targets.column_weight is not None
    num_rows, num_features = x.shape
    row_shift, column_shift = found.row_lse.float(), found.column_lse.float()
    row_factor = (targets.row_weight * (row_shift - found.row_lse).exp_()).float()
    column_factor = (targets.column_weight * (column_shift - found.column_lse).exp_()).float()
    scale_grad = x.new_zeros((), dtype=torch.float64)
    band_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    for band in _bands(num_rows, len(y), num_rows * band_dtype.itemsize, _BAND_BYTES):
        here, part = y[band], targets.columns(band.start, band.stop)
        grid = _grid(num_rows, len(here))
        grad = x.new_empty((num_rows, len(here)), dtype=band_dtype)
        sums = x.new_empty(grid, dtype=torch.float32)
        _gradients_kernel[grid](
            x,
            here,
            scale,
            *_target_vectors(part),
            row_shift,
            row_factor,
            column_shift[band],
            column_factor[band],
            grad,
            sums,
            num_rows,
            len(here),
            num_features,
            part.diagonal,
            *x.stride(),
            *here.stride(),
            HAS_LABELS=targets.row_labels is not None,
            HAS_SMOOTH=targets.row_smooth is not None,
            **_how(x),
        )
        scale_grad += sums.sum(dtype=torch.float64)
        _add_products(grad, x, here, dx, None if dy is None else dy[band])
    return scale_grad


def _add_products(grad: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None) -> None:
    """Add grad @ y to dx and grad.T @ x to dy, in fp32, where they are wanted."""
    for left, right, result in ((grad, y, dx), (grad.T, x, dy)):
        if result is None:
            continue
        if grad.dtype == torch.bfloat16 and grad.is_cuda:
            result.add_(torch.mm(left, right, out_dtype=torch.float32))
        else:
            result.addmm_(left.float(), right.float())


def sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    targets: Targets,
    *,
    dx: Tensor | None,
    dy: Tensor | None,
    want_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `torch_losses.sigmoid`."""
    num_rows, num_features = x.shape
    result = x.new_zeros(3, dtype=torch.float64)
    band_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    for band in _bands(num_rows, len(y), num_rows * band_dtype.itemsize, _BAND_BYTES):
        here, part = y[band], targets.columns(band.start, band.stop)
        grid = _grid(num_rows, len(here))
        grad = x.new_empty((num_rows, len(here)) if want_gradients else (0, 0), dtype=band_dtype)
        sums = x.new_zeros((*grid, 3), dtype=torch.float32)
        _sigmoid_kernel[grid](
            x,
            here,
            scale,
            bias,
            _single(part.row_weight),
            part.row_labels,
            part.column_labels,
            grad,
            sums,
            num_rows,
            len(here),
            num_features,
            part.diagonal,
            *x.stride(),
            *here.stride(),
            HAS_LABELS=targets.row_labels is not None,
            WANT_GRADIENTS=want_gradients,
            **_how(x),
        )
        result += sums.sum((0, 1), dtype=torch.float64)
        if want_gradients:
            _add_products(grad, x, here, dx, None if dy is None else dy[band])
    return result[0], result[1], result[2]
