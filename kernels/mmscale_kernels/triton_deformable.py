"""The Triton kernels of `deformable_attention`: the same function as its torch form, deterministic.

Forward: a program owns a block of (sample, query, head)s, walks over their sampled points and sums. Backward, first
part: the same walk yields the gradients of locations and weights. Second part: the gradient of value is a scatter,
which atomics would do in another order every run. So the points are sorted by the cell that they fall in, the square
between four pixels' centres. A pixel gets its gradient from the four cells around it, which are two and two next to
each other in the sorted order: a program owns one pixel of one head and sums two runs of points. Sorting cells, not
corners, makes the sort four times smaller. Many points may fall in one cell (a level of 1 x 1, heads that all look at
one place), so pieces of CHUNK sorted points that lie in one cell are summed before, by programs of their own; then no
program sums more than 8 * CHUNK points one by one. Pieces follow from the sorted order alone, so results repeat bit for
bit, and nothing waits for the host.

The trade-off: for the sort, the backward pass holds some 20 bytes a point, and torch's working space; and it reads each
row of grad_out four times, at random.

Sums are in fp32. Import this module only where a kernel is about to run: it needs triton, and ``TRITON_INTERPRET=1``
has to be set before.
"""

# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are pointers, tiles and constants, none of which has a type for Python)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs


@triton.jit
def _positions(locations, point, valid, height, width):
    """Where points lie, (x, y) in pixels from the centre of the first; NaN stays NaN."""
    x = tl.load(locations + point * 2, mask=valid, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + point * 2 + 1, mask=valid, other=0.0).to(tl.float32) * height - 0.5
    # Beyond one pixel outside nothing is left to see; the limits keep the integers small.
    x = tl.where(x < -2.0, -2.0, x)
    y = tl.where(y < -2.0, -2.0, y)
    return tl.where(x > width + 1.0, width + 1.0, x), tl.where(y > height + 1.0, height + 1.0, y)


@triton.jit
def _integer(floor):
    return tl.where(floor == floor, floor, -2.0).to(tl.int32)  # a NaN has no integer, and is in no cell


@triton.jit
def _pixels(base, begin, line, column, height, width, step, valid, dims, D: tl.constexpr):
    """One pixel of value for each row (rows, BD), in fp32; 0 outside the map."""
    inside = valid & (line >= 0) & (line < height) & (column >= 0) & (column < width)
    row = (begin + line * width + column).to(tl.int64)
    return tl.load(
        base[:, None] + row[:, None] * step + dims[None, :],
        mask=inside[:, None] & (dims < D)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip


@triton.jit
def _forward(
    value, sizes, locations, weights, out, value_b, value_t, value_h, num_rows, num_queries, num_heads,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """A block of (sample, query, head)s."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    valid = rows < num_rows
    head = rows % num_heads
    sample = rows // num_heads // num_queries
    base = value + sample * value_b + head * value_h
    total = tl.zeros((BM, BD), tl.float32)
    begin = 0
    for level in range(LEVELS):
        height = tl.load(sizes + 2 * level)
        width = tl.load(sizes + 2 * level + 1)
        for number in range(POINTS):
            point = (rows * LEVELS + level) * POINTS + number
            x, y = _positions(locations, point, valid, height, width)
            weight = tl.load(weights + point, mask=valid, other=0.0).to(tl.float32)
            left, top = tl.floor(x), tl.floor(y)
            column, line = _integer(left), _integer(top)
            right_part, bottom_part = x - left, y - top
            top_weight, bottom_weight = weight * (1.0 - bottom_part), weight * bottom_part
            a = _pixels(base, begin, line, column, height, width, value_t, valid, dims, D)
            b = _pixels(base, begin, line, column + 1, height, width, value_t, valid, dims, D)
            c = _pixels(base, begin, line + 1, column, height, width, value_t, valid, dims, D)
            d = _pixels(base, begin, line + 1, column + 1, height, width, value_t, valid, dims, D)
            total += (top_weight * (1.0 - right_part))[:, None] * a
            total += (top_weight * right_part)[:, None] * b
            total += (bottom_weight * (1.0 - right_part))[:, None] * c
            total += (bottom_weight * right_part)[:, None] * d
        begin += height * width
    tl.store(
        out + rows[:, None] * D + dims[None, :], total.to(out.dtype.element_ty),
        mask=valid[:, None] & (dims < D)[None, :],
    )  # fmt: skip


@triton.jit
def _backward_points(
    grad_out, value, sizes, locations, weights, grad_locations, grad_weights, keys,
    value_b, value_t, value_h, num_rows, num_queries, num_heads, num_cells, no_cell,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Gradients of the locations and weights of a block of (sample, query, head)s, and the points' cells.

    A level of h x w pixels has (h + 1) x (w + 1) cells, those at the border among them; num_cells is the number of all
    of one sample and head. What lies in none gets no_cell, which sorts last.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    dims = tl.arange(0, BD)
    valid = rows < num_rows
    head = rows % num_heads
    sample = rows // num_heads // num_queries
    base = value + sample * value_b + head * value_h
    grad = tl.load(
        grad_out + rows[:, None] * D + dims[None, :], mask=valid[:, None] & (dims < D)[None, :], other=0.0
    ).to(tl.float32)
    first_cell = (sample * num_heads + head) * num_cells
    begin = 0
    for level in range(LEVELS):
        height = tl.load(sizes + 2 * level)
        width = tl.load(sizes + 2 * level + 1)
        for number in range(POINTS):
            point = (rows * LEVELS + level) * POINTS + number
            x, y = _positions(locations, point, valid, height, width)
            weight = tl.load(weights + point, mask=valid, other=0.0).to(tl.float32)
            left, top = tl.floor(x), tl.floor(y)
            column, line = _integer(left), _integer(top)
            right_part, bottom_part = (x - left)[:, None], (y - top)[:, None]
            a = _pixels(base, begin, line, column, height, width, value_t, valid, dims, D)
            b = _pixels(base, begin, line, column + 1, height, width, value_t, valid, dims, D)
            c = _pixels(base, begin, line + 1, column, height, width, value_t, valid, dims, D)
            d = _pixels(base, begin, line + 1, column + 1, height, width, value_t, valid, dims, D)
            upper = a * (1.0 - right_part) + b * right_part
            lower = c * (1.0 - right_part) + d * right_part
            sampled = upper * (1.0 - bottom_part) + lower * bottom_part
            by_x = (b - a) * (1.0 - bottom_part) + (d - c) * bottom_part
            grad_weight = tl.sum(grad * sampled, 1)
            grad_x = tl.sum(grad * by_x, 1) * weight * width
            grad_y = tl.sum(grad * (lower - upper), 1) * weight * height
            tl.store(grad_weights + point, grad_weight.to(grad_weights.dtype.element_ty), mask=valid)
            tl.store(grad_locations + point * 2, grad_x.to(grad_locations.dtype.element_ty), mask=valid)
            tl.store(grad_locations + point * 2 + 1, grad_y.to(grad_locations.dtype.element_ty), mask=valid)
            inside = (line >= -1) & (line < height) & (column >= -1) & (column < width)
            cell = first_cell + (line + 1) * (width + 1) + (column + 1)
            tl.store(keys + point, tl.where(inside, cell, no_cell).to(keys.dtype.element_ty), mask=valid)
        begin += height * width
        first_cell += (height + 1) * (width + 1)


@triton.jit
def _sum_points(
    total, first, last, x, y, grad_out, locations, weights, order, height, width, dims,
    PER_ROW: tl.constexpr, D: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Add to total (BE, BD) what pixel (x, y) gets from the sorted points first .. last - 1."""
    for start in range(first, last, BE):
        entry = start + tl.arange(0, BE)
        valid = entry < last
        point = tl.load(order + entry, mask=valid, other=0)
        weight = tl.load(weights + point, mask=valid, other=0.0).to(tl.float32)
        point_x, point_y = _positions(locations, point, valid, height, width)
        # The share of a sample that a pixel gets falls with the distance, along each axis, to 0 at one pixel.
        weight *= tl.maximum(1.0 - tl.abs(point_x - x), 0.0) * tl.maximum(1.0 - tl.abs(point_y - y), 0.0)
        grad = tl.load(
            grad_out + (point // PER_ROW)[:, None] * D + dims[None, :],
            mask=valid[:, None] & (dims < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total += weight[:, None] * grad
    return total


@triton.jit
def _backward_pieces(
    grad_out, sizes, locations, weights, order, keys, sums, no_cell, num_cells,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What the four pixels around a cell get from CHUNK sorted points, if all of them lie in that cell.

    sums: (pieces, 4, D) fp32, the pixels line by line; the other pieces are left as they are.
    """
    piece = tl.program_id(0)
    first = piece * CHUNK
    cell = tl.load(keys + first).to(tl.int64)
    if (cell == tl.load(keys + first + CHUNK - 1)) & (cell < no_cell):
        dims = tl.arange(0, BD)
        cell = cell % num_cells
        found = False
        height, width = 1, 1
        for level in range(LEVELS):
            if not found:
                height = tl.load(sizes + 2 * level)
                width = tl.load(sizes + 2 * level + 1)
                count = (height + 1) * (width + 1)
                found = cell < count
                cell = tl.where(found, cell, cell - count)
        x = (cell % (width + 1) - 1).to(tl.int32)
        y = (cell // (width + 1) - 1).to(tl.int32)
        for corner in range(4):
            total = _sum_points(
                tl.zeros((BE, BD), tl.float32), first, first + CHUNK, x + corner % 2, y + corner // 2,
                grad_out, locations, weights, order, height, width, dims, LEVELS * POINTS, D, BE,
            )  # fmt: skip
            tl.store(sums + (piece.to(tl.int64) * 4 + corner) * D + dims, tl.sum(total, 0), mask=dims < D)


@triton.jit
def _backward_value(
    grad_out, sizes, locations, weights, order, starts, sums, grad_value, num_pixels, num_heads, num_cells,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of one pixel of one sample and head. starts: the first sorted point of each cell."""
    # Neighbours are neighbours in the map, and share points.
    pixel = tl.program_id(0) % num_pixels
    owner = (tl.program_id(0) // num_pixels).to(tl.int64)  # sample * num_heads + head
    dims = tl.arange(0, BD)
    cell = owner * num_cells
    rest = pixel
    found = False
    height, width = 1, 1
    for level in range(LEVELS):
        if not found:
            height = tl.load(sizes + 2 * level)
            width = tl.load(sizes + 2 * level + 1)
            found = rest < height * width
            rest = tl.where(found, rest, rest - height * width)
            cell += tl.where(found, 0, (height + 1) * (width + 1))
    x, y = rest % width, rest // width
    total = tl.zeros((BE, BD), tl.float32)
    for above in range(2):
        # The two cells whose lower pixels (first), or upper pixels, are this one's line.
        here = starts + cell + (y + above) * (width + 1) + x
        first, middle, last = tl.load(here), tl.load(here + 1), tl.load(here + 2)
        # Of each cell the pieces that lie wholly in it are summed already: a .. b - 1 and c .. d - 1.
        a, b = (first + CHUNK - 1) // CHUNK, middle // CHUNK
        c, d = (middle + CHUNK - 1) // CHUNK, last // CHUNK
        has_left, has_right = a < b, c < d
        for part in range(3):
            # The points before, between and after those; all of them if there are no such pieces.
            start = tl.where(has_left, b * CHUNK, first)
            stop = tl.where(has_right, c * CHUNK, last)
            if part == 0:
                start, stop = first, tl.where(has_left, a * CHUNK, first)
            elif part == 2:
                start, stop = tl.where(has_right, d * CHUNK, last), last
            if start < stop:
                total = _sum_points(
                    total, start, stop, x, y, grad_out, locations, weights, order, height, width, dims,
                    LEVELS * POINTS, D, BE,
                )  # fmt: skip
        for side in range(2):
            start, stop = a, b
            if side == 1:
                start, stop = c, d
            for piece in range(start, stop, BE):
                pieces = (piece + tl.arange(0, BE)).to(tl.int64)
                total += tl.load(
                    sums + (pieces * 4 + 3 - 2 * above - side)[:, None] * D + dims[None, :],
                    mask=(pieces < stop)[:, None] & (dims < D)[None, :], other=0.0,
                )  # fmt: skip
    row = (owner // num_heads * num_pixels + pixel) * num_heads + owner % num_heads
    tl.store(grad_value + row * D + dims, tl.sum(total, 0).to(grad_value.dtype.element_ty), mask=dims < D)


def _config(kernel: str, value: Tensor) -> configs.Config:
    """The launch configuration of a kernel; BD, the tile's width, among it."""
    width = max(16, triton.next_power_of_2(value.shape[3]))
    return {"BD": width, **configs.choose(kernel, f"d{width}", value.device)}


def forward(value: Tensor, sizes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Return (B, Lq, H * D) of value's dtype.

    value: (B, N, H, D) fp32, bf16 or fp16, any strides. sizes: (levels, 2) int32, the heights and widths. locations:
    (B, Lq, H, levels, points, 2), weights: (B, Lq, H, levels, points), any floating dtype. None of them empty.
    """
    value, locations, weights = _unit_stride(value), locations.contiguous(), weights.contiguous()
    batch, num_queries, num_heads, levels, points = weights.shape
    num_rows = batch * num_queries * num_heads
    out = value.new_empty(batch, num_queries, num_heads * value.shape[3])
    config = _config("deformable_forward", value)
    _forward[(triton.cdiv(num_rows, config["BM"]),)](
        value, sizes, locations, weights, out, *value.stride()[:3], num_rows, num_queries, num_heads,
        LEVELS=levels, POINTS=points, D=value.shape[3], **config,
    )  # fmt: skip
    return out


def backward(
    grad_out: Tensor, value: Tensor, sizes: Tensor, locations: Tensor, weights: Tensor, *, num_cells: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights.

    grad_out: (B, Lq, H * D). num_cells: the sum of (h + 1) * (w + 1) over the levels. The rest as in `forward`.
    """
    grad_out, value = grad_out.contiguous(), _unit_stride(value)
    locations, weights = locations.contiguous(), weights.contiguous()
    batch, num_queries, num_heads, levels, points = weights.shape
    num_rows = batch * num_queries * num_heads
    all_cells = batch * num_heads * num_cells
    constants = {"LEVELS": levels, "POINTS": points, "D": value.shape[3]}
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    key_dtype = torch.int32 if all_cells < 2**31 - 1 else torch.int64  # half as many rounds of the sort
    keys = torch.empty(weights.numel(), dtype=key_dtype, device=value.device)
    config = _config("deformable_backward_points", value)
    _backward_points[(triton.cdiv(num_rows, config["BM"]),)](
        grad_out, value, sizes, locations, weights, grad_locations, grad_weights, keys,
        *value.stride()[:3], num_rows, num_queries, num_heads, num_cells, all_cells, **constants, **config,
    )  # fmt: skip

    keys, order = torch.sort(keys, stable=True)
    every_cell = torch.arange(all_cells + 1, dtype=key_dtype, device=value.device)
    starts = torch.searchsorted(keys, every_cell, out_int32=True)
    config = _config("deformable_backward_value", value)
    pieces = len(keys) // config["CHUNK"]
    sums = torch.empty(pieces, 4, value.shape[3], dtype=torch.float32, device=value.device)
    if pieces:
        _backward_pieces[(pieces,)](
            grad_out,
            sizes,
            locations,
            weights,
            order,
            keys,
            sums,
            all_cells,
            num_cells,
            **constants,
            **config,
        )
    grad_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    _backward_value[(batch * num_heads * value.shape[1],)](
        grad_out, sizes, locations, weights, order, starts, sums, grad_value, value.shape[1], num_heads, num_cells,
        **constants, **config,
    )  # fmt: skip
    return grad_value, grad_locations, grad_weights


def _unit_stride(value: Tensor) -> Tensor:
    return value if value.stride(3) == 1 else value.contiguous()
