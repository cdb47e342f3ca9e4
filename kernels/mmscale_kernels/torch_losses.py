"""The contrastive losses on one block of rows and columns, in plain PyTorch, tile by tile.

What the forms of a loss have in common is here (`Targets`, `Statistics`); `triton_losses` has the same
functions as kernels, and `losses` adds blocks and ranks up. A tile is small enough to stay in a cache, so
that going over it several times is cheap; nothing larger is ever held, and a batch of one tile costs what the
dense loss does: its exponentials are kept from the first pass to the second.

Numbers: products and tiles in fp32 (fp64 for fp64 inputs) whatever the inputs are, vectors that are as long
as the batch in fp64. Maxima are true running maxima, and where they are subtracted the rounding of the
log-sum-exp is put back as a factor, so that neither a large scale nor unnormalised rows cost accuracy.
Exponentials are powers of 2: on a CPU torch's exp2 is 3 times faster than exp, and 20 times where results
underflow.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Height and width of a tile. On a CPU, at N = 4096, sizes from 512 x 512 to 1024 x 1024 took the same time
# and larger ones half as much again; the largest of the fast ones makes most batches of small runs a single
# tile.
_CPU_TILE = (1024, 1024)
_DEVICE_TILE = (4096, 4096)


@dataclass(frozen=True)
class Targets:
    """What a loss wants of the logits between n rows and m columns: vectors and never a matrix.

    row_weight (n,), column_weight (m,): factors of the rows' and the columns' losses; columns are None for a
    loss over rows only. row_share, column_share: factors of one positive's logit in its row's and its
    column's loss.
    row_smooth, column_smooth: the same for every logit, None without label smoothing. All of them fp64.
    row_labels (n,), column_labels (m,): equal labels are positives. Without labels the diagonal is: row i is
    paired with column i + diagonal, which need not lie in this block.
    """

    row_weight: Tensor
    column_weight: Tensor | None = None
    row_share: Tensor | None = None
    column_share: Tensor | None = None
    row_smooth: Tensor | None = None
    column_smooth: Tensor | None = None
    row_labels: Tensor | None = None
    column_labels: Tensor | None = None
    diagonal: int = 0

    def columns(self, start: int, stop: int) -> "Targets":
        """The same for columns start .. stop - 1 alone."""
        if start == 0 and self.column_weight is not None and stop == len(self.column_weight):
            return self

        def cut(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[start:stop]

        return Targets(
            self.row_weight,
            cut(self.column_weight),
            self.row_share,
            cut(self.column_share),
            self.row_smooth,
            cut(self.column_smooth),
            self.row_labels,
            cut(self.column_labels),
            self.diagonal - start,
        )


@dataclass(frozen=True)
class Statistics:
    """First pass over a block: log-sum-exp of each row (n,) and column (m,), sum of the targets' logits;
    fp64.

    kept: exponentials and maxima of rows and columns, if the block was one tile and they are wanted again.
    """

    row_lse: Tensor
    column_lse: Tensor
    positive: Tensor
    kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What products and tiles are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_dtype(device: torch.device) -> torch.dtype:
    """What sums over the batch are kept in."""
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's devices have no fp64


def _tiles(num_rows: int, num_columns: int, device: torch.device) -> tuple[list[slice], list[slice]]:
    height, width = _CPU_TILE if device.type == "cpu" else _DEVICE_TILE
    if num_rows * num_columns <= height * width:
        height, width = num_rows, num_columns
    return _cut(num_rows, height), _cut(num_columns, width)


def _cut(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)] if length else []


def _positives(targets: Targets, rows: slice, columns: slice) -> tuple[Tensor | None, slice, slice]:
    """Where the positives of a tile are: a mask of them, or else the rows and columns of its part of the
    diagonal."""
    if targets.row_labels is not None:
        assert targets.column_labels is not None
        return targets.row_labels[rows, None] == targets.column_labels[columns], rows, columns
    first = max(rows.start, columns.start - targets.diagonal)
    last = max(first, min(rows.stop, columns.stop - targets.diagonal))
    return None, slice(first, last), slice(first + targets.diagonal, last + targets.diagonal)


def _diagonal(tile: Tensor, rows: slice, columns: slice, on_rows: slice, on_columns: slice) -> Tensor:
    """View of the part of the diagonal in `tile` that `_positives` found."""
    part = tile[on_rows.start - rows.start : on_rows.stop - rows.start]
    return part[:, on_columns.start - columns.start : on_columns.stop - columns.start].diagonal()


class _Products:
    """What the tiles of one row of tiles add up to: dx += grad @ y, dy += grad.T @ x, and the scale's gradient.

    The scale's gradient is the sum of grad * (x @ y.T). Taken from a product that is there anyway, it is a pass over
    n x D numbers and not over n x m.
    """

    def __init__(self, x: Tensor, dx: Tensor | None) -> None:
        self.x, self.dx = x, dx
        self.change: Tensor | None = None
        self.scale_grad = torch.zeros((), dtype=exact_dtype(x.device), device=x.device)

    def add(self, grad: Tensor, y: Tensor, dy: Tensor | None, x: Tensor) -> None:
        """One tile's part. x: the rows that dy sums up."""
        if self.dx is not None or dy is None:
            self.change = grad @ y if self.change is None else self.change.addmm_(grad, y)
        if dy is None:
            return
        if self.dx is not None:
            dy.addmm_(grad.T, x)
        else:
            change = grad.T @ x
            self.scale_grad += torch.linalg.vecdot(change, y).sum(dtype=self.scale_grad.dtype)
            dy.add_(change)

    def finish(self, weight: Tensor | None = None) -> Tensor:
        """Add to dx, each row times its weight; the scale's gradient."""
        if self.change is not None:
            if weight is not None:
                self.change.mul_(weight[:, None])
            self.scale_grad += torch.linalg.vecdot(self.change, self.x).sum(dtype=self.scale_grad.dtype)
            if self.dx is not None:
                self.dx.add_(self.change)
        return self.scale_grad


def statistics(x: Tensor, y: Tensor, scale: Tensor, targets: Targets, *, keep: bool) -> Statistics:
    """First pass of the contrastive loss over the logits scale * x @ y.T of x (n, D) and y (m, D)."""
    dtype, exact = compute_dtype(x.dtype), exact_dtype(x.device)
    rows_of, columns_of = _tiles(len(x), len(y), x.device)
    keep = keep and len(rows_of) == len(columns_of) == 1
    positive = torch.zeros((), dtype=exact, device=x.device)
    row_lses: list[Tensor | None] = [None] * len(rows_of)
    column_lses: list[Tensor | None] = [None] * len(columns_of)
    kept = None
    for i, rows in enumerate(rows_of):
        scaled = x[rows].to(dtype) * (scale / math.log(2))
        for j, columns in enumerate(columns_of):
            logits = scaled @ y[columns].to(dtype).T
            positive += _positive_sum(logits, targets, rows, columns) * math.log(2)
            row_max, column_max = logits.amax(1), logits.amax(0)
            by_column = (logits - column_max).exp2_()
            by_row = logits.sub_(row_max[:, None]).exp2_()
            row_lses[i] = _add_exponentials(row_lses[i], row_max, by_row.sum(1).to(exact))
            column_lses[j] = _add_exponentials(column_lses[j], column_max, by_column.sum(0).to(exact))
            if keep:
                kept = (by_row, row_max, by_column, column_max)
    return Statistics(
        _concatenate(row_lses, len(x), positive), _concatenate(column_lses, len(y), positive), positive, kept
    )


def _add_exponentials(lse: Tensor | None, top: Tensor, total: Tensor) -> Tensor:
    """log(exp(lse) + 2^top total), in fp64."""
    here = total.log_().add_(top, alpha=math.log(2))
    return here if lse is None else torch.logaddexp(lse, here)


def _concatenate(parts: list[Tensor | None], length: int, like: Tensor) -> Tensor:
    """The parts in a row; -inf, the log-sum-exp of nothing, if the other side is empty."""
    found = [part for part in parts if part is not None]
    if not found:
        return like.new_full((length,), -torch.inf)
    return found[0] if len(found) == 1 else torch.cat(found)


def _positive_sum(logits: Tensor, targets: Targets, rows: slice, columns: slice) -> Tensor:
    assert targets.row_share is not None
    assert targets.column_share is not None
    exact = targets.row_share.dtype
    mask, on_rows, on_columns = _positives(targets, rows, columns)
    if mask is None:
        share = targets.row_share[on_rows] + targets.column_share[on_columns]
        result = _diagonal(logits, rows, columns, on_rows, on_columns).to(exact) @ share
    else:
        masked = logits * mask
        result = masked.sum(1).to(exact) @ targets.row_share[rows]
        result += masked.sum(0).to(exact) @ targets.column_share[columns]
    if targets.row_smooth is not None and targets.column_smooth is not None:
        result += logits.sum(1).to(exact) @ targets.row_smooth[rows]
        result += logits.sum(0).to(exact) @ targets.column_smooth[columns]
    return result


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
    """Second pass of the contrastive loss, with the log-sum-exps of whole rows and columns over all blocks.

    Adds the gradients of x and y, each divided by the scale, to dx (n, D) and dy (m, D), either None if not
    wanted. Returns the gradient of the scale, a 0-d fp64 tensor.
    """
    dtype, exact = compute_dtype(x.dtype), exact_dtype(x.device)
    assert targets.row_share is not None
    assert targets.column_share is not None
    assert targets.column_weight is not None
    rows_of, columns_of = _tiles(len(x), len(y), x.device)
    if found.kept is None:
        row_shift = (found.row_lse / math.log(2)).to(dtype)
        column_shift = (found.column_lse / math.log(2)).to(dtype)
    else:
        _, row_shift, _, column_shift = found.kept
    # What the shift lacks of the log-sum-exp goes into the factor.
    row_factor = _factor(targets.row_weight, row_shift, found.row_lse).to(dtype)
    column_factor = _factor(targets.column_weight, column_shift, found.column_lse).to(dtype)
    row_share, column_share = targets.row_share.to(dtype), targets.column_share.to(dtype)
    scale_grad = torch.zeros((), dtype=exact, device=x.device)
    for rows in rows_of:
        x_rows = x[rows].to(dtype)
        scaled = None if found.kept else x_rows * (scale / math.log(2))
        products = _Products(x_rows, None if dx is None else dx[rows])
        for columns in columns_of:
            y_columns = y[columns].to(dtype)
            if scaled is None:
                assert found.kept is not None
                by_row, _, by_column, _ = found.kept
            else:
                logits = scaled @ y_columns.T
                by_column = (logits - column_shift[columns]).exp2_()
                by_row = logits.sub_(row_shift[rows, None]).exp2_()
            grad = by_row.mul_(row_factor[rows, None]).addcmul_(by_column, column_factor[columns])
            mask, on_rows, on_columns = _positives(targets, rows, columns)
            if mask is None:
                share = row_share[on_rows] + column_share[on_columns]
                _diagonal(grad, rows, columns, on_rows, on_columns).sub_(share)
            else:
                grad.addcmul_(mask, row_share[rows, None] + column_share[columns], value=-1)
            if targets.row_smooth is not None and targets.column_smooth is not None:
                grad.sub_(targets.row_smooth[rows, None].to(dtype) + targets.column_smooth[columns].to(dtype))
            products.add(grad, y_columns, None if dy is None else dy[columns], x_rows)
        scale_grad += products.finish()
    return scale_grad


def _factor(weight: Tensor, shift: Tensor, lse: Tensor) -> Tensor:
    """weight * 2^shift / exp(lse), in fp64: what turns 2^(logit - shift) into a weighted probability."""
    return (shift.to(lse.dtype) * math.log(2)).sub_(lse).exp_().mul_(weight)


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
    """The sigmoid loss of a block, in one pass: its value and the gradients of scale and bias, 0-d fp64.

    Adds the gradients of x and y, each divided by the scale, to dx (n, D) and dy (m, D), either None if not
    wanted. Without want_gradients the value alone is computed, and the rest is 0.
    """
    dtype, exact = compute_dtype(x.dtype), exact_dtype(x.device)
    rows_of, columns_of = _tiles(len(x), len(y), x.device)
    loss, scale_grad, bias_grad = torch.zeros(3, dtype=exact, device=x.device).unbind()
    for rows in rows_of:
        x_rows = x[rows].to(dtype)
        scaled = x_rows * scale
        # The weights are multiplied into rows of D numbers, not into tiles.
        weight = targets.row_weight[rows].to(dtype)
        weighted = x_rows * weight[:, None] if want_gradients and dy is not None else x_rows
        products = _Products(x_rows, None if dx is None else dx[rows])
        for columns in columns_of:
            y_columns = y[columns].to(dtype)
            logits = (scaled @ y_columns.T).add_(bias)
            mask, on_rows, on_columns = _positives(targets, rows, columns)
            _negate(logits, mask, rows, columns, on_rows, on_columns)
            # Beyond the threshold softplus is the identity: exp(-40) is less than half a unit of fp64 at 40.
            loss += F.softplus(logits, threshold=40).sum(1).to(exact) @ targets.row_weight[rows]
            if not want_gradients:
                continue
            grad = logits.sigmoid_()
            _negate(grad, mask, rows, columns, on_rows, on_columns)
            products.add(grad, y_columns, None if dy is None else dy[columns], weighted)
            bias_grad += grad.sum(1).to(exact) @ targets.row_weight[rows]
        if want_gradients:
            scale_grad += products.finish(weight)
    return loss, scale_grad, bias_grad


def _negate(
    tile: Tensor, mask: Tensor | None, rows: slice, columns: slice, on_rows: slice, on_columns: slice
) -> None:
    """Flip the sign of a tile's positives in place."""
    if mask is None:
        _diagonal(tile, rows, columns, on_rows, on_columns).neg_()
    else:
        torch.where(mask, -tile, tile, out=tile)
