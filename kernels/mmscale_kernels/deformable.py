"""Multi-scale deformable attention: each query looks at a few learned places of each feature map.

As in Deformable DETR (Zhu et al., 2021, equation 3): every head samples `points` places a level by bilinear
interpolation, zero outside the map, and sums them with its weights::

    out = deformable_attention(value, [(32, 32), (16, 16)], sampling_locations, attention_weights)

The "triton" backend samples and sums in one kernel, and sorts the points by the pixels they fall between for the
gradient of `value`, which so needs no atomics (see `triton_deformable`). The "torch" backend treats a bilinear sample
as a weighted bag of four rows of `value`. Neither makes anything of size (B, Lq, H, levels, points, D), as the usual
grid_sample form ("reference") does. The trade-off: the torch form builds four indices and weights for each sampled
point, the Triton form's backward pass 20 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Decision, choose, custom_op, register_decision
from .tiled_attention import compute_dtype

# The Triton kernels hold a row of a head in registers, and count points and pixels in 32 bits.
_MAX_WIDTH = 256
_MAX_COUNT = 2**31 - 2**16


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sample value at sampling_locations and sum with attention_weights.

    value: (B, sum(h * w), H, D), the levels one after the other, each row by row; fp64, fp32, bf16 or fp16.
        The Triton form reads any strides in place if D has a unit one.
    spatial_shapes: (h, w) of each level.
    sampling_locations: (B, Lq, H, levels, points, 2), (x, y) in units of the map, 0 .. 1; outside of it
        value is 0.
    attention_weights: (B, Lq, H, levels, points), usually a softmax over levels and points.

    Returns (B, Lq, H * D) of value's dtype, computed in fp32 (fp64 for fp64); differentiable in the three
    tensors, and the same bits in every run of the Triton form.
    Raises ValueError on bad input, and for backend="triton" where that can't run, or value is fp64 or D above 256.
    """
    shapes = [tuple(shape) for shape in spatial_shapes]
    if backend == "reference":
        _check(value, shapes, sampling_locations, attention_weights)
        return _reference(value, shapes, sampling_locations, attention_weights)
    flat = [size for shape in shapes for size in shape]
    return _deformable(value, flat, sampling_locations, attention_weights, backend or "")


def _decide(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    backend: str | None = None,
) -> Decision:
    _check(value, [tuple(shape) for shape in spatial_shapes], sampling_locations, attention_weights)
    return _choose(value, attention_weights, backend)


def _choose(value: Tensor, weights: Tensor, backend: str | None) -> Decision:
    refusal = None
    if value.dtype == torch.float64:
        refusal = "the kernels sum in fp32, and value is fp64"
    elif value.shape[3] > _MAX_WIDTH:
        refusal = f"the kernels cover D up to {_MAX_WIDTH}, and D is {value.shape[3]}"
    elif max(weights.numel(), value.shape[:3].numel(), 4 * value.shape[1]) > _MAX_COUNT:
        refusal = "the kernels count sampled points, and the cells between pixels, in 32 bits"
    return choose("deformable_attention", backend, value.device, refusal)


register_decision(deformable_attention, _decide)


@custom_op("mmscale_kernels::deformable_attention")
def _deformable(
    value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, backend: str
) -> Tensor:
    """Return (B, Lq, H * D). shapes: h, w, h, w, ..."""
    _check(value, _pairs(shapes), locations, weights)
    chosen = _choose(value, weights, backend or None).backend
    batch, queries, heads = weights.shape[:3]
    if weights.numel() == 0 or value.numel() == 0:
        return value.new_zeros(batch, queries, heads * value.shape[3])
    if chosen == "triton":
        from . import triton_deformable

        with torch.cuda.device_of(value):
            return triton_deformable.forward(value, _sizes(shapes, value.device), locations, weights)
    corners, bilinear, _, _ = _corners(value, shapes, locations)
    bags = (bilinear * weights.to(bilinear.dtype)[..., None]).flatten()
    rows = value.to(bilinear.dtype).reshape(-1, value.shape[3])
    out = torch.ops.aten._embedding_bag(
        rows, corners.flatten(), _offsets(corners), False, 0, False, bags, False, -1
    )[0]  # mode 0 is the sum
    return out.view(batch, queries, -1).to(value.dtype)


@_deformable.register_fake
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, backend: str) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], weights.shape[2] * value.shape[3])


@custom_op("mmscale_kernels::deformable_attention_backward")
def _deformable_backward(
    grad_out: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights."""
    if weights.numel() == 0 or value.numel() == 0:
        grads = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (value, locations, weights))
        return next(grads), next(grads), next(grads)
    if _choose(value, weights, backend or None).backend == "triton":
        from . import triton_deformable

        num_cells = sum((height + 1) * (width + 1) for height, width in _pairs(shapes))
        with torch.cuda.device_of(value):
            return triton_deformable.backward(
                grad_out, value, _sizes(shapes, value.device), locations, weights, num_cells=num_cells
            )
    corners, bilinear, slope_x, slope_y = _corners(value, shapes, locations)
    dtype = bilinear.dtype
    wide_weights = weights.to(dtype)
    bags = (bilinear * wide_weights[..., None]).flatten()
    rows = value.to(dtype).reshape(-1, value.shape[3])
    grad = grad_out.to(dtype).reshape(-1, value.shape[3])
    offsets = _offsets(corners)
    bag_of_row = torch.arange(len(offsets), device=value.device)
    bag_of_row = bag_of_row.repeat_interleave(corners.numel() // len(offsets))
    unused = offsets.new_empty(0)  # bag sizes and maxima matter to other modes than the sum
    grad_rows = torch.ops.aten._embedding_bag_dense_backward(
        grad, corners.flatten(), bag_of_row, unused, unused, rows.shape[0], False, 0, bags
    )
    # <grad_out, corner>, (B, Lq, H, levels, points, 4)
    pull = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad, rows, corners.flatten(), offsets, bag_of_row, 0
    ).view(bilinear.shape)
    grad_weights = (pull * bilinear).sum(-1)
    grad_x = (pull * slope_x).sum(-1) * wide_weights
    grad_y = (pull * slope_y).sum(-1) * wide_weights
    return (
        grad_rows.view(value.shape).to(value.dtype),
        torch.stack((grad_x, grad_y), -1).to(locations.dtype),
        grad_weights.to(weights.dtype),
    )


@_deformable_backward.register_fake
def _(
    grad_out: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    grads = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (value, locations, weights))
    return next(grads), next(grads), next(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, locations, weights, ctx.backend = inputs
    ctx.save_for_backward(value, locations, weights)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _deformable_backward(
        grad_out, value, ctx.shapes, locations, weights, ctx.backend
    )
    return grad_value, None, grad_locations, grad_weights, None


_deformable.register_autograd(_backward, setup_context=_setup_context)


def _corners(
    value: Tensor, shapes: Sequence[int], locations: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four pixels around each sampled place, and what they count for.

    corners: rows of value seen as (B * N * H, D), int64; then the bilinear weights and their derivatives by
        x and by y (in units of the map). All
    (B, Lq, H, levels, points, 4); a corner outside the map has zeros and some valid row.
    """
    batch, _, heads = locations.shape[:3]
    num_rows = value.shape[1]
    device = locations.device
    sizes = _sizes(shapes, device).long()
    areas = sizes.prod(1)
    begin = (areas.cumsum(0) - areas).view(-1, 1, 1)
    height, width = (sizes[:, i].view(-1, 1) for i in (0, 1))
    locations = locations.to(compute_dtype(value))
    # Beyond one pixel outside nothing is left to see; the clamp keeps the integers small.
    x = torch.minimum((locations[..., 0] * width - 0.5).clamp(min=-2), width + 1.0)
    y = torch.minimum((locations[..., 1] * height - 0.5).clamp(min=-2), height + 1.0)
    left, top = x.floor(), y.floor()
    right_part, bottom_part = x - left, y - top
    across = torch.stack((1 - right_part, right_part), -1)
    down = torch.stack((1 - bottom_part, bottom_part), -1)
    sign = torch.arange(-1, 2, 2, dtype=across.dtype, device=device)
    columns = left.long()[..., None] + torch.arange(2, device=device)
    lines = top.long()[..., None] + torch.arange(2, device=device)
    inside_x = (columns >= 0) & (columns < width[..., None])
    inside_y = (lines >= 0) & (lines < height[..., None])
    across, slope_x = across * inside_x, sign * inside_x * width[..., None]
    down, slope_y = down * inside_y, sign * inside_y * height[..., None]
    columns = torch.minimum(columns.clamp(min=0), width[..., None] - 1)
    lines = torch.minimum(lines.clamp(min=0), height[..., None] - 1)

    def outer(a: Tensor, b: Tensor) -> Tensor:
        return (a[..., :, None] * b[..., None, :]).flatten(-2)

    pixel = (lines * width[..., None])[..., :, None] + columns[..., None, :]
    pixel = pixel.flatten(-2) + begin
    sample = torch.arange(batch, device=device).view(-1, 1, 1, 1, 1, 1)
    head = torch.arange(heads, device=device).view(-1, 1, 1, 1)
    corners = (sample * num_rows + pixel) * heads + head
    return corners, outer(down, across), outer(down, slope_x), outer(slope_y, across)


def _offsets(corners: Tensor) -> Tensor:
    """Return where the bag of each (sample, query, head) begins."""
    size = corners[0, 0, 0].numel()
    return torch.arange(0, corners.numel(), size, device=corners.device)


def _sizes(shapes: Sequence[int], device: torch.device) -> Tensor:
    """Return the levels' (h, w) as a (levels, 2) int32 tensor, without the copy that would wait for the device."""
    sizes = [torch.full((), size, dtype=torch.int32, device=device) for size in shapes]
    return torch.stack(sizes).view(-1, 2)


def _pairs(shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(shapes[::2], shapes[1::2], strict=True))


def _reference(
    value: Tensor, shapes: Sequence[tuple[int, ...]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample each level with grid_sample, differentiated by autograd."""
    batch, queries, heads, _, _ = weights.shape
    dtype = compute_dtype(value)
    levels = value.to(dtype).split([height * width for height, width in shapes], dim=1)
    grid = locations.to(dtype) * 2 - 1
    sampled = []
    for number, ((height, width), level) in enumerate(zip(shapes, levels, strict=True)):
        image = level.permute(0, 2, 3, 1).reshape(batch * heads, value.shape[3], height, width)
        places = grid[:, :, :, number].transpose(1, 2).flatten(0, 1)  # (B * H, Lq, points, 2)
        sampled.append(F.grid_sample(image, places, align_corners=False))  # (B * H, D, Lq, points)
    spread = weights.to(dtype).transpose(1, 2).flatten(0, 1)  # (B * H, Lq, levels, points)
    out = torch.einsum("ndqlp,nqlp->nqd", torch.stack(sampled, 3), spread)
    return out.view(batch, heads, queries, value.shape[3]).transpose(1, 2).flatten(2).to(value.dtype)


def _check(value: Tensor, shapes: Sequence[tuple[int, ...]], locations: Tensor, weights: Tensor) -> None:
    """Raise ValueError naming the first argument that can't be used."""
    if value.dim() != 4:
        raise ValueError(f"value has shape {tuple(value.shape)}; it needs to be (B, sum(h * w), H, D)")
    if value.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"value has dtype {value.dtype}; it needs float64, float32, bfloat16 or float16")
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise ValueError(
            f"spatial_shapes is {list(shapes)}; it needs one (h, w), both positive, for each level"
        )
    batch, rows, heads, _ = value.shape
    total = sum(height * width for height, width in shapes)
    if rows != total:
        raise ValueError(f"value has {rows} rows; spatial_shapes {list(shapes)} needs {total}")
    known = weights.dim() == 5 and (weights.shape[0], *weights.shape[2:4]) == (batch, heads, len(shapes))
    if not known:
        raise ValueError(
            f"attention_weights has shape {tuple(weights.shape)}; "
            f"it needs ({batch}, Lq, {heads}, {len(shapes)}, points)"
        )
    if locations.shape != (*weights.shape, 2):
        raise ValueError(
            f"sampling_locations has shape {tuple(locations.shape)}; it needs {(*weights.shape, 2)}, "
            "as attention_weights"
        )
    for name, tensor in (("sampling_locations", locations), ("attention_weights", weights)):
        if not tensor.is_floating_point() or tensor.device != value.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; "
                f"it needs a floating dtype on {value.device}, as value"
            )
