"""The contrastive losses on one block of rows and columns, as Triton kernels: the same functions as
`torch_losses`.

A kernel works on one tile of the logits, in registers. The first pass writes each tile's maximum and sum by row
and by column, which are combined in a fixed order: no atomics, so results repeat bit for bit. The second pass has
the tiles again and writes the loss's gradient with respect to the logits into a band, a rectangle of some MiB;
torch's matrix products turn a band into its part of the gradients of x and y. Four matrix products in all for the
softmax loss, three for the sigmoid loss, whose value and gradients are one pass.

Two forms, chosen for each kernel and shape class by the table (`configs`, "losses"):

- ``"tile"``: the kernel makes the tile of similarities itself, by a matrix product over D;
- ``"chunk"``: the GEMM library writes a band of similarities in float32, and the kernel reads its tile from there.

The trade-off: a chunk costs 12 to 16 bytes of memory traffic more for each logit, and leaves all of the products to
the library: worth it where a product costs more than that, with float32 inputs and very wide features.
docs/decisions.md has the arithmetic. A band is small enough to stay in an L2 cache, so the gradients are added up
from many bands, 8 bytes of traffic for each number of a gradient and band of the other side: that is why bands are
rectangles and not whole columns.

Memory beside the inputs: the gradients of x and y in fp32, a band (32 MiB; 96 MiB with a chunk), and, in the
first pass alone, its tables (64 MiB), so O((N + M) * D). At N = M = 65,536, D = 768 in bf16, counted and not
measured: 0.07 GB in the first pass, 0.40 for the two gradients and 0.03 for the band in the second, and 0.60
in a backward pass, which has the 0.40 and the results in bf16.

fp16, bf16 and fp32 inputs; products are accumulated in fp32. fp32 products are IEEE ones unless torch's
float32 matmul precision allows TF32. Positives are subtracted before a gradient is rounded to a half type, so
that a probability near 1 leaves no rounding error behind. For fp16, whose range ends above 1 / N of a large
batch, the band is multiplied by what makes the largest weight 2^14, and what comes of it is divided again.
Exponentials are powers of 2 with the scale folded into their base, as a device has them.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, tiles and constants, none of which has a type for Python)

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .torch_losses import Statistics, Targets

_LOG2_E = tl.constexpr(1.4426950408889634)


# What differs between blocks: a kernel isn't to be compiled anew for it.
_CHANGING = ["num_rows", "diagonal"]
# A row of a matrix must be nearer to the next than this, for offsets inside of a tile to fit 32 bits.
_MAX_STRIDE = 2**22
# What the largest gradient of an fp16 band is scaled to; two weights of that size add up below fp16's 65,504.
_FP16_PEAK = 2.0**14


@triton.jit
def _tile_of(num_rows, num_columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program. GROUP row tiles share their columns, so that these stay in L2."""
    program = tl.program_id(0)
    num_row_tiles, num_column_tiles = tl.cdiv(num_rows, BM), tl.cdiv(num_columns, BN)
    first = program // (GROUP * num_column_tiles) * GROUP
    size = min(num_row_tiles - first, GROUP)
    within = program % (GROUP * num_column_tiles)
    return first + within % size, within // size


@triton.jit
def _similarities(
    x,
    y,
    similarity,
    row_tile,
    column_tile,
    num_rows,
    num_columns,
    num_features,
    x_stride,
    y_stride,
    similarity_stride,
    FORM: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_FEATURES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of x @ y.T in fp32. Past the end it repeats the last row or column, so nothing here needs a mask."""
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    if not EVEN_ROWS:
        row = tl.minimum(row, num_rows - 1 - row_tile * BM)
    if not EVEN_COLUMNS:
        column = tl.minimum(column, num_columns - 1 - column_tile * BN)
    if FORM == "chunk":
        start = similarity + (row_tile * BM).to(tl.int64) * similarity_stride + column_tile * BN
        return tl.load(start + row[:, None] * similarity_stride + column[None, :])
    feature = tl.arange(0, BK)
    # 64 bits only for where a tile begins: inside of it, 32 bits do.
    x_part = x + (row_tile * BM).to(tl.int64) * x_stride + (row[:, None] * x_stride + feature[None, :])
    y_part = y + (column_tile * BN).to(tl.int64) * y_stride + (column[None, :] * y_stride + feature[:, None])
    product = tl.zeros((BM, BN), tl.float32)
    for start in range(0, num_features, BK):
        if EVEN_FEATURES:
            of_x, of_y = tl.load(x_part), tl.load(y_part)
        else:
            inside = feature < num_features - start
            of_x = tl.load(x_part, mask=inside[None, :], other=0.0)
            of_y = tl.load(y_part, mask=inside[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies the bit patterns of bf16
            of_x, of_y = of_x.to(tl.float32), of_y.to(tl.float32)
        product = tl.dot(of_x, of_y, product, input_precision=PRECISION)
        x_part += BK
        y_part += BK
    return product


@triton.jit
def _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS: tl.constexpr):
    """Where a tile's positives are. Past the end anything, which no sum takes in."""
    if HAS_LABELS:
        of_row = tl.load(row_labels + row, mask=row < num_rows, other=0)
        of_column = tl.load(column_labels + column, mask=column < num_columns, other=0)
        return of_row[:, None] == of_column[None, :]
    return (row + diagonal)[:, None] == column[None, :]


@triton.jit
def _may_match(row_tile, column_tile, diagonal, HAS_LABELS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile has positives: without labels few of them do."""
    if HAS_LABELS:
        return True
    first = row_tile * BM + diagonal - column_tile * BN
    return (first < BN) & (first > -BM)


@triton.jit
def _vector(vector, place, length, OTHER: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(vector + place)
    return tl.load(vector + place, mask=place < length, other=OTHER)


@triton.jit
def _store_vector(vector, place, value, index, length, EVEN: tl.constexpr):
    if EVEN:
        tl.store(vector + place, value)
    else:
        tl.store(vector + place, value, mask=index < length)


@triton.jit(do_not_specialize=_CHANGING)
def _statistics_kernel(
    x,
    y,
    similarity,
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
    y_stride,
    similarity_stride,
    HAS_LABELS: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    FORM: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_FEATURES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile's maxima and sums of powers of 2, and its sum of targets * logits, each to its own place."""
    row_tile, column_tile = _tile_of(num_rows, num_columns, BM, BN, GROUP)
    logits = _similarities(
        x, y, similarity, row_tile, column_tile, num_rows, num_columns, num_features,
        x_stride, y_stride, similarity_stride,
        FORM, EVEN_ROWS, EVEN_COLUMNS, EVEN_FEATURES, UPCAST, PRECISION, BM, BN, BK,
    )  # fmt: skip
    logits = logits * (tl.load(scale) * _LOG2_E)
    row, column = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    even: tl.constexpr = EVEN_ROWS and EVEN_COLUMNS

    total = 0.0
    if HAS_SMOOTH:
        by_row = _vector(row_smooth, row, num_rows, 0.0, EVEN_ROWS)
        by_column = _vector(column_smooth, column, num_columns, 0.0, EVEN_COLUMNS)
        wanted = by_row[:, None] + by_column[None, :]
        if not even:
            wanted = tl.where((row < num_rows)[:, None] & (column < num_columns)[None, :], wanted, 0.0)
        total += tl.sum(wanted * logits)
    if _may_match(row_tile, column_tile, diagonal, HAS_LABELS, BM, BN):
        match = _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS)
        by_row = _vector(row_share, row, num_rows, 0.0, EVEN_ROWS)
        by_column = _vector(column_share, column, num_columns, 0.0, EVEN_COLUMNS)
        wanted = tl.where(match, by_row[:, None] + by_column[None, :], 0.0)
        if not even:
            wanted = tl.where((row < num_rows)[:, None] & (column < num_columns)[None, :], wanted, 0.0)
        total += tl.sum(wanted * logits)
    tl.store(positive + row_tile * tl.cdiv(num_columns, BN) + column_tile, total)

    # A tile has at least one row and one column inside, so a maximum over what is inside is finite.
    inside = logits
    if not EVEN_COLUMNS:
        inside = tl.where((column < num_columns)[None, :], logits, float("-inf"))
    top = tl.max(inside, 1)
    total_row = tl.sum(tl.exp2(inside - top[:, None]), 1)
    place = column_tile.to(tl.int64) * num_rows + row
    _store_vector(row_max, place, top, row, num_rows, EVEN_ROWS)
    _store_vector(row_sum, place, total_row, row, num_rows, EVEN_ROWS)

    inside = logits
    if not EVEN_ROWS:
        inside = tl.where((row < num_rows)[:, None], logits, float("-inf"))
    top = tl.max(inside, 0)
    total_column = tl.sum(tl.exp2(inside - top[None, :]), 0)
    place = row_tile.to(tl.int64) * num_columns + column
    _store_vector(column_max, place, top, column, num_columns, EVEN_COLUMNS)
    _store_vector(column_sum, place, total_column, column, num_columns, EVEN_COLUMNS)


@triton.jit
def _store_band(
    band, tile, row_tile, column_tile, num_rows, num_columns, band_stride,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, BM), tl.arange(0, BN)
    at = band + (row_tile * BM).to(tl.int64) * band_stride + column_tile * BN
    at += row[:, None] * band_stride + column[None, :]
    tile = tile.to(band.dtype.element_ty)
    if EVEN:
        tl.store(at, tile)
    else:
        row_inside, column_inside = row < num_rows - row_tile * BM, column < num_columns - column_tile * BN
        tl.store(at, tile, mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half. A thread has whole pieces of a row, so this moves nothing."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _gradients_of(
    product, scale, row_share, column_share, row_smooth, column_smooth, row_labels, column_labels,
    row_shift, row_factor, column_shift, column_factor, band, row_tile, column_tile, num_rows, num_columns,
    diagonal, band_stride, HAS_LABELS: tl.constexpr, HAS_SMOOTH: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the gradient with respect to the logits, given the similarities; the sum of one times the other."""
    factor = tl.load(scale) * _LOG2_E
    row, column = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    even: tl.constexpr = EVEN_ROWS and EVEN_COLUMNS
    # Past the end, a shift of inf makes the power 0.
    of_row = _vector(row_shift, row, num_rows, float("inf"), EVEN_ROWS)
    of_column = _vector(column_shift, column, num_columns, float("inf"), EVEN_COLUMNS)
    row_weight = _vector(row_factor, row, num_rows, 0.0, EVEN_ROWS)
    column_weight = _vector(column_factor, column, num_columns, 0.0, EVEN_COLUMNS)
    result = tl.exp2(product * factor - of_row[:, None]) * row_weight[:, None]
    result += tl.exp2(product * factor - of_column[None, :]) * column_weight[None, :]
    if HAS_SMOOTH:
        by_row = _vector(row_smooth, row, num_rows, 0.0, EVEN_ROWS)
        by_column = _vector(column_smooth, column, num_columns, 0.0, EVEN_COLUMNS)
        result -= by_row[:, None] + by_column[None, :]
    if _may_match(row_tile, column_tile, diagonal, HAS_LABELS, BM, BN):
        match = _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS)
        by_row = _vector(row_share, row, num_rows, 0.0, EVEN_ROWS)
        by_column = _vector(column_share, column, num_columns, 0.0, EVEN_COLUMNS)
        result -= tl.where(match, by_row[:, None] + by_column[None, :], 0.0)
    if not even:
        result = tl.where((row < num_rows)[:, None] & (column < num_columns)[None, :], result, 0.0)
    _store_band(band, result, row_tile, column_tile, num_rows, num_columns, band_stride, even, BM, BN)
    return tl.sum(result * product)


@triton.jit
def _gradients_in(
    product, scale, row_share, column_share, row_smooth, column_smooth, row_labels, column_labels,
    row_shift, row_factor, column_shift, column_factor, band, row_tile, column_tile, num_rows, num_columns,
    diagonal, band_stride, HAS_LABELS: tl.constexpr, HAS_SMOOTH: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """As `_gradients_of`, in SPLIT parts: what lies between products and band then takes fewer registers."""
    if SPLIT > 1:
        left, right = _halves(product, BM, BN)
        first = _gradients_in(
            left, scale, row_share, column_share, row_smooth, column_smooth, row_labels, column_labels,
            row_shift, row_factor, column_shift, column_factor, band, row_tile, 2 * column_tile, num_rows,
            num_columns, diagonal, band_stride, HAS_LABELS, HAS_SMOOTH, EVEN_ROWS, EVEN_COLUMNS,
            BM, BN // 2, SPLIT // 2,
        )  # fmt: skip
        second = _gradients_in(
            right, scale, row_share, column_share, row_smooth, column_smooth, row_labels, column_labels,
            row_shift, row_factor, column_shift, column_factor, band, row_tile, 2 * column_tile + 1, num_rows,
            num_columns, diagonal, band_stride, HAS_LABELS, HAS_SMOOTH, EVEN_ROWS, EVEN_COLUMNS,
            BM, BN // 2, SPLIT // 2,
        )  # fmt: skip
        result = first + second
    else:
        result = _gradients_of(
            product, scale, row_share, column_share, row_smooth, column_smooth, row_labels, column_labels,
            row_shift, row_factor, column_shift, column_factor, band, row_tile, column_tile, num_rows,
            num_columns, diagonal, band_stride, HAS_LABELS, HAS_SMOOTH, EVEN_ROWS, EVEN_COLUMNS, BM, BN,
        )  # fmt: skip
    return result


@triton.jit(do_not_specialize=_CHANGING)
def _gradients_kernel(
    x,
    y,
    similarity,
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
    band,
    scale_grad,
    num_rows,
    num_columns,
    num_features,
    diagonal,
    x_stride,
    y_stride,
    similarity_stride,
    band_stride,
    HAS_LABELS: tl.constexpr,
    HAS_SMOOTH: tl.constexpr,
    FORM: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_FEATURES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile's gradient with respect to the logits, and the sum of that times the similarities."""
    row_tile, column_tile = _tile_of(num_rows, num_columns, BM, BN, GROUP)
    product = _similarities(
        x, y, similarity, row_tile, column_tile, num_rows, num_columns, num_features,
        x_stride, y_stride, similarity_stride,
        FORM, EVEN_ROWS, EVEN_COLUMNS, EVEN_FEATURES, UPCAST, PRECISION, BM, BN, BK,
    )  # fmt: skip
    total = _gradients_in(
        product, scale, row_share, column_share, row_smooth, column_smooth, row_labels, column_labels,
        row_shift, row_factor, column_shift, column_factor, band, row_tile, column_tile, num_rows, num_columns,
        diagonal, band_stride, HAS_LABELS, HAS_SMOOTH, EVEN_ROWS, EVEN_COLUMNS, BM, BN, SPLIT,
    )  # fmt: skip
    tl.store(scale_grad + row_tile * tl.cdiv(num_columns, BN) + column_tile, total)


@triton.jit
def _sigmoid_of(
    product, scale, bias, row_weight, row_labels, column_labels, band, row_tile, column_tile, num_rows, num_columns,
    diagonal, band_stride, HAS_LABELS: tl.constexpr, WANT_GRADIENTS: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The loss, given the similarities, and its gradients' sums for scale and bias; those of the logits are written."""
    row, column = row_tile * BM + tl.arange(0, BM), column_tile * BN + tl.arange(0, BN)
    even: tl.constexpr = EVEN_ROWS and EVEN_COLUMNS
    may_match = _may_match(row_tile, column_tile, diagonal, HAS_LABELS, BM, BN)
    logits = product * tl.load(scale) + tl.load(bias)
    if may_match:
        match = _match(row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS)
        logits = tl.where(match, -logits, logits)
    # Past the end, a row's weight of 0 takes it out of all sums.
    weight = _vector(row_weight, row, num_rows, 0.0, EVEN_ROWS)
    e = tl.exp2(tl.abs(logits) * -_LOG2_E)

    # softplus(l) = max(l, 0) + log1p(e). A device's logarithm near 1 has an absolute error, of 3 digits of the
    # loss at SigLIP's first bias of -10; so log1p(e) = 2 artanh(t) with t = e / (2 + e) <= 1 / 3, by a
    # polynomial in t^2 fitted over [0, 1 / 9] to a relative error of 4e-9.
    t = e / (2.0 + e)
    square = t * t
    series = 0.281746573 * square + 0.279614188
    series = series * square + 0.400248537
    series = series * square + 0.666663159
    series = series * square + 2.00000001
    loss = tl.maximum(logits, 0.0) + t * series
    if not EVEN_COLUMNS:
        loss = tl.where((column < num_columns)[None, :], loss, 0.0)
    total = tl.sum(tl.sum(loss, 1) * weight, 0)
    of_scale, of_bias = 0.0, 0.0
    if WANT_GRADIENTS:
        result = tl.where(logits >= 0, 1.0, e) / (1.0 + e)
        if may_match:
            match = _match(
                row_labels, column_labels, row, column, num_rows, num_columns, diagonal, HAS_LABELS
            )
            result = tl.where(match, -result, result)
        if not EVEN_COLUMNS:
            result = tl.where((column < num_columns)[None, :], result, 0.0)
        result = result * weight[:, None]
        of_scale, of_bias = tl.sum(result * product), tl.sum(result)
        _store_band(band, result, row_tile, column_tile, num_rows, num_columns, band_stride, even, BM, BN)
    return total, of_scale, of_bias


@triton.jit
def _sigmoid_in(
    product, scale, bias, row_weight, row_labels, column_labels, band, row_tile, column_tile, num_rows, num_columns,
    diagonal, band_stride, HAS_LABELS: tl.constexpr, WANT_GRADIENTS: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """As `_sigmoid_of`, in SPLIT parts."""
    if SPLIT > 1:
        left, right = _halves(product, BM, BN)
        first = _sigmoid_in(
            left, scale, bias, row_weight, row_labels, column_labels, band, row_tile, 2 * column_tile,
            num_rows, num_columns, diagonal, band_stride, HAS_LABELS, WANT_GRADIENTS, EVEN_ROWS, EVEN_COLUMNS,
            BM, BN // 2, SPLIT // 2,
        )  # fmt: skip
        second = _sigmoid_in(
            right, scale, bias, row_weight, row_labels, column_labels, band, row_tile, 2 * column_tile + 1,
            num_rows, num_columns, diagonal, band_stride, HAS_LABELS, WANT_GRADIENTS, EVEN_ROWS, EVEN_COLUMNS,
            BM, BN // 2, SPLIT // 2,
        )  # fmt: skip
        result = first[0] + second[0], first[1] + second[1], first[2] + second[2]
    else:
        result = _sigmoid_of(
            product, scale, bias, row_weight, row_labels, column_labels, band, row_tile, column_tile,
            num_rows, num_columns, diagonal, band_stride, HAS_LABELS, WANT_GRADIENTS, EVEN_ROWS, EVEN_COLUMNS,
            BM, BN,
        )  # fmt: skip
    return result


@triton.jit(do_not_specialize=_CHANGING)
def _sigmoid_kernel(
    x,
    y,
    similarity,
    scale,
    bias,
    row_weight,
    row_labels,
    column_labels,
    band,
    sums,
    num_rows,
    num_columns,
    num_features,
    diagonal,
    x_stride,
    y_stride,
    similarity_stride,
    band_stride,
    HAS_LABELS: tl.constexpr,
    WANT_GRADIENTS: tl.constexpr,
    FORM: tl.constexpr,
    EVEN_ROWS: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_FEATURES: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile's loss, its gradient with respect to the logits, and that one's sums for scale and bias."""
    row_tile, column_tile = _tile_of(num_rows, num_columns, BM, BN, GROUP)
    product = _similarities(
        x, y, similarity, row_tile, column_tile, num_rows, num_columns, num_features,
        x_stride, y_stride, similarity_stride,
        FORM, EVEN_ROWS, EVEN_COLUMNS, EVEN_FEATURES, UPCAST, PRECISION, BM, BN, BK,
    )  # fmt: skip
    loss, of_scale, of_bias = _sigmoid_in(
        product, scale, bias, row_weight, row_labels, column_labels, band, row_tile, column_tile, num_rows, num_columns,
        diagonal, band_stride, HAS_LABELS, WANT_GRADIENTS, EVEN_ROWS, EVEN_COLUMNS, BM, BN, SPLIT,
    )  # fmt: skip
    place = 3 * (row_tile * tl.cdiv(num_columns, BN) + column_tile)
    tl.store(sums + place, loss)
    if WANT_GRADIENTS:
        tl.store(sums + place + 1, of_scale)
        tl.store(sums + place + 2, of_bias)


@dataclass(frozen=True)
class _Launch:
    """How a kernel goes over x (n, D) and y (m, D): its configuration, and buffers that all blocks share.

    band: gradients of one block's logits. similarity: one block's similarities, in the chunk form.
    """

    config: configs.Config
    x: Tensor
    y: Tensor
    band: Tensor | None
    similarity: Tensor | None

    @staticmethod
    def of(kernel: str, x: Tensor, y: Tensor, want_band: bool) -> "_Launch":
        """The configuration of this kernel for these inputs, and its buffers."""
        config = configs.choose(kernel, _shape_class(x), x.device)
        height, width = min(config["rows"], len(x)), min(config["columns"], len(y))
        # Rows of 16 numbers or a multiple: what the GEMM library's faster kernels want.
        stride = triton.cdiv(max(width, 1), 16) * 16
        chunk = config["form"] == "chunk"
        similarity = x.new_empty((height, stride), dtype=torch.float32) if chunk else None
        band = None
        if want_band:
            # A tile is read before it is written, so fp32 gradients can take the similarities' place.
            in_place = chunk and x.dtype == torch.float32
            band = similarity if in_place else x.new_empty((height, stride), dtype=x.dtype)
        return _Launch(config, _near_rows(x), _near_rows(y), band, similarity)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each block, in the order in which their sums are taken."""
        for rows in _cut(len(self.x), self.config["rows"]):
            for columns in _cut(len(self.y), self.config["columns"]):
                yield rows, columns

    def grid(self, rows: slice, columns: slice) -> tuple[int, int]:
        """Number of tiles over a block's rows and columns."""
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return triton.cdiv(height, self.config["BM"]), triton.cdiv(width, self.config["BN"])

    def band_of(self, rows: slice, columns: slice) -> Tensor | None:
        """The part of the band that a block's gradients fill."""
        if self.band is None:
            return None
        return self.band[: rows.stop - rows.start, : columns.stop - columns.start]

    def operands(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and similarities of a block (x again where they are not used)."""
        x, y = self.x[rows], self.y[columns]
        if self.similarity is None:
            return x, y, x
        similarity = self.similarity[: len(x), : len(y)]
        if _has_fp32_output(x):
            torch.mm(x, y.T, out_dtype=torch.float32, out=similarity)
        else:
            torch.mm(x.float(), y.float().T, out=similarity)
        return x, y, similarity

    def constants(self, rows: slice, columns: slice) -> dict[str, object]:
        """Compile-time constants: the configuration, and what depends on dtypes, shapes and torch's settings."""
        config, x = self.config, self.x
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return {
            "FORM": config["form"],
            "EVEN_ROWS": height % config["BM"] == 0,
            "EVEN_COLUMNS": width % config["BN"] == 0,
            "EVEN_FEATURES": x.shape[1] % config["BK"] == 0,
            "UPCAST": x.dtype == torch.bfloat16 and not x.is_cuda,
            "PRECISION": "tf32" if _allows_tf32(x) else "ieee",
            **{name: value for name, value in config.items() if name not in ("form", "rows", "columns")},
        }


def _cut(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _allows_tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def _shape_class(x: Tensor) -> str:
    """The row of the tables for these inputs: what decides how long a tile's product takes."""
    width = x.shape[1]
    if x.dtype == torch.float32:
        return "tf32" if _allows_tf32(x) else "fp32 d<=64" if width <= 64 else "fp32 d>64"
    return "half d<=64" if width <= 64 else "half d<=2048" if width <= 2048 else "half d>2048"


def _near_rows(matrix: Tensor) -> Tensor:
    """The matrix with a unit step in its rows, which are near enough to each other: as it is, or copied."""
    near = matrix.stride(1) == 1 and 0 <= matrix.stride(0) < _MAX_STRIDE
    return matrix if near else matrix.clone(memory_format=torch.contiguous_format)


def _has_fp32_output(x: Tensor) -> bool:
    """Whether the library multiplies halves into fp32: CUDA's does, ROCm's and the CPU's don't."""
    return x.is_cuda and x.dtype != torch.float32 and torch.version.hip is None


def _single(vector: Tensor | None, factor: Tensor | None = None) -> Tensor | None:
    if vector is None:
        return None
    return (vector if factor is None else vector * factor).float().contiguous()


@dataclass(frozen=True)
class _Vectors:
    """Targets in fp32, whole: blocks take slices."""

    targets: Targets
    row_share: Tensor | None
    column_share: Tensor | None
    row_smooth: Tensor | None
    column_smooth: Tensor | None

    @staticmethod
    def of(targets: Targets, factor: Tensor | None = None) -> "_Vectors":
        """All targets times the factor."""
        return _Vectors(
            targets,
            _single(targets.row_share, factor),
            _single(targets.column_share, factor),
            _single(targets.row_smooth, factor),
            _single(targets.column_smooth, factor),
        )

    def shares(self, rows: slice, columns: slice) -> list[Tensor | None]:
        """A block's row_share, column_share, row_smooth and column_smooth."""
        pairs = [(self.row_share, rows), (self.column_share, columns)]
        pairs += [(self.row_smooth, rows), (self.column_smooth, columns)]
        return [None if vector is None else vector[part] for vector, part in pairs]

    def labels(self, rows: slice, columns: slice) -> list[Tensor | None]:
        """A block's row_labels and column_labels."""
        pairs = ((self.targets.row_labels, rows), (self.targets.column_labels, columns))
        return [None if vector is None else vector[part] for vector, part in pairs]

    def diagonal(self, rows: slice, columns: slice) -> int:
        """Which column of the block is paired with its row 0."""
        return self.targets.diagonal + rows.start - columns.start


def _combine(maxima: Tensor, sums: Tensor) -> Tensor:
    """Log-sum-exp in fp64 of tiles' maxima and sums of powers of 2, over the first dimension."""
    top = maxima.amax(0)
    total = maxima.sub_(top).exp2_().mul_(sums).sum(0, dtype=torch.float64)
    return total.log_().add_(top, alpha=math.log(2))


def statistics(x: Tensor, y: Tensor, scale: Tensor, targets: Targets, *, keep: bool) -> Statistics:
    """As `torch_losses.statistics`; nothing is kept."""
    row_lse = x.new_full((len(x),), -torch.inf, dtype=torch.float64)
    column_lse = x.new_full((len(y),), -torch.inf, dtype=torch.float64)
    positive = x.new_zeros((), dtype=torch.float64)
    launch, vectors = _Launch.of("losses_statistics", x, y, want_band=False), _Vectors.of(targets)
    for rows, columns in launch.blocks():
        grid = launch.grid(rows, columns)
        x_part, y_part, similarity = launch.operands(rows, columns)
        by_row = x.new_empty((2, grid[1], len(x_part)), dtype=torch.float32)
        by_column = x.new_empty((2, grid[0], len(y_part)), dtype=torch.float32)
        positives = x.new_empty(grid, dtype=torch.float32)
        _statistics_kernel[(grid[0] * grid[1],)](
            x_part,
            y_part,
            similarity,
            scale,
            *vectors.shares(rows, columns),
            *vectors.labels(rows, columns),
            *by_row,
            *by_column,
            positives,
            len(x_part),
            len(y_part),
            x.shape[1],
            vectors.diagonal(rows, columns),
            x_part.stride(0),
            y_part.stride(0),
            similarity.stride(0),
            HAS_LABELS=targets.row_labels is not None,
            HAS_SMOOTH=targets.row_smooth is not None,
            **launch.constants(rows, columns),
        )
        row_lse[rows] = torch.logaddexp(row_lse[rows], _combine(*by_row))
        column_lse[columns] = torch.logaddexp(column_lse[columns], _combine(*by_column))
        positive += positives.sum(dtype=torch.float64) * math.log(2)
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
    scale_grad = x.new_zeros((), dtype=torch.float64)
    if not len(x) or not len(y):
        return scale_grad
    factor = _range_factor(x, targets.row_weight, targets.column_weight)
    row_shift, row_factor = _shift_and_factor(found.row_lse, targets.row_weight, factor)
    column_shift, column_factor = _shift_and_factor(found.column_lse, targets.column_weight, factor)
    launch, vectors = _Launch.of("losses_gradients", x, y, want_band=True), _Vectors.of(targets, factor)
    for rows, columns in launch.blocks():
        grid = launch.grid(rows, columns)
        x_part, y_part, similarity = launch.operands(rows, columns)
        band = launch.band_of(rows, columns)
        assert band is not None
        sums = x.new_empty(grid, dtype=torch.float32)
        _gradients_kernel[(grid[0] * grid[1],)](
            x_part,
            y_part,
            similarity,
            scale,
            *vectors.shares(rows, columns),
            *vectors.labels(rows, columns),
            row_shift[rows],
            row_factor[rows],
            column_shift[columns],
            column_factor[columns],
            band,
            sums,
            len(x_part),
            len(y_part),
            x.shape[1],
            vectors.diagonal(rows, columns),
            x_part.stride(0),
            y_part.stride(0),
            similarity.stride(0),
            band.stride(0),
            HAS_LABELS=targets.row_labels is not None,
            HAS_SMOOTH=targets.row_smooth is not None,
            **launch.constants(rows, columns),
        )
        scale_grad += sums.sum(dtype=torch.float64)
        _add_products(band, x_part, y_part, _part(dx, rows), _part(dy, columns), factor)
    return scale_grad if factor is None else scale_grad / factor


def _shift_and_factor(lse: Tensor, weight: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """What turns 2^(logit - shift) * factor into a weighted probability; the factor has what rounding took."""
    shift = (lse / math.log(2)).float()
    weight = (shift.double() * math.log(2) - lse).exp_() * weight
    return shift, (weight if factor is None else weight * factor).float()


def _range_factor(x: Tensor, *weights: Tensor) -> Tensor | None:
    """What a band is multiplied by, so that fp16 can hold it: 0-d, fp64. None for other dtypes."""
    if x.dtype != torch.float16:
        return None
    largest = torch.stack([weight.amax() for weight in weights]).amax()
    return torch.where(largest > 0, _FP16_PEAK / largest, 1.0)


def _part(matrix: Tensor | None, rows: slice) -> Tensor | None:
    return None if matrix is None else matrix[rows]


def _add_products(
    band: Tensor, x: Tensor, y: Tensor, dx: Tensor | None, dy: Tensor | None, factor: Tensor | None
) -> None:
    """Add band @ y to dx and band.T @ x to dy, both divided by the factor, in fp32, where they are wanted."""
    for left, right, result in ((band, y, dx), (band.T, x, dy)):
        if result is None:
            continue
        if not _has_fp32_output(x):
            left, right = left.float(), right.float()
        if factor is None and not _has_fp32_output(x):
            result.addmm_(left, right)
        elif factor is None:
            torch.addmm(result, left, right, out_dtype=torch.float32, out=result)
        else:
            if _has_fp32_output(x):
                change = torch.mm(left, right, out_dtype=torch.float32)
            else:
                change = left @ right
            result.addcmul_(change, (1 / factor).float())


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
    result = x.new_zeros(3, dtype=torch.float64)
    if not len(x) or not len(y):
        return result[0], result[1], result[2]
    factor = _range_factor(x, targets.row_weight)
    row_weight = _single(targets.row_weight, factor)
    assert row_weight is not None
    launch, vectors = _Launch.of("losses_sigmoid", x, y, want_band=want_gradients), _Vectors.of(targets)
    for rows, columns in launch.blocks():
        grid = launch.grid(rows, columns)
        x_part, y_part, similarity = launch.operands(rows, columns)
        band = launch.band_of(rows, columns)
        sums = x.new_zeros((*grid, 3), dtype=torch.float32)
        _sigmoid_kernel[(grid[0] * grid[1],)](
            x_part,
            y_part,
            similarity,
            scale,
            bias,
            row_weight[rows],
            *vectors.labels(rows, columns),
            band,
            sums,
            len(x_part),
            len(y_part),
            x.shape[1],
            vectors.diagonal(rows, columns),
            x_part.stride(0),
            y_part.stride(0),
            similarity.stride(0),
            0 if band is None else band.stride(0),
            HAS_LABELS=targets.row_labels is not None,
            WANT_GRADIENTS=want_gradients,
            **launch.constants(rows, columns),
        )
        result += sums.sum((0, 1), dtype=torch.float64)
        if band is not None:
            _add_products(band, x_part, y_part, _part(dx, rows), _part(dy, columns), factor)
    if factor is not None:
        result /= factor
    return result[0], result[1], result[2]
