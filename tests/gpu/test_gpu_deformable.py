"""deformable_attention's Triton form on a device, against grid_sample in fp64."""

from __future__ import annotations

import pytest
import torch
from mmscale_kernels import deformable_attention
from on_device import DEVICE, DTYPES, TOLERANCE, compare, device_only, generator, needs_device, normal
from torch import Tensor

pytestmark = needs_device


def make(
    shapes: list[tuple[int, int]],
    batch: int,
    lq: int,
    heads: int,
    width: int,
    points: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    pixels = sum(h * w for h, w in shapes)
    drawn = torch.rand(batch, lq, heads, len(shapes), points, 2, device=DEVICE, generator=generator(1))
    places = drawn * 1.4 - 0.2  # a third of them outside
    # Interpolation has a kink at each pixel's centre, where rounding decides on which side a place lies.
    for level, (h, w) in enumerate(shapes):
        size = torch.tensor([w, h], device=DEVICE)
        cell = places[:, :, :, level] * size - 0.5
        inside = (cell - cell.floor()).clamp(0.1, 0.9)
        places[:, :, :, level] = (cell.floor() + inside + 0.5) / size
    weights = torch.rand(batch, lq, heads, len(shapes), points, device=DEVICE, generator=generator(2))
    return {
        "value": normal(batch, pixels, heads, width, dtype=dtype, seed=3),
        "places": places.requires_grad_(),
        "weights": weights.to(dtype).requires_grad_(),
    }


def check(
    shapes: list[tuple[int, int]],
    batch: int,
    lq: int,
    heads: int,
    width: int,
    points: int,
    dtype: torch.dtype,
) -> None:
    compare(
        lambda backend, i: deformable_attention(
            i["value"], shapes, i["places"], i["weights"], backend=backend
        ),
        make(shapes, batch, lq, heads, width, points, dtype),
        TOLERANCE[dtype],
        # A place is good to 2^-24 of the map, and its gradient is a sum of differences of pixels.
        loose=("places",),
    )


@DTYPES
@pytest.mark.parametrize("width", [8, 20, *(pytest.param(w, marks=device_only) for w in (32, 64, 96, 128))])
def test_parity(width: int, dtype: torch.dtype) -> None:
    check([(5, 7), (3, 2), (1, 1)], 2, 9, 2, width, 3, dtype)


@device_only
@DTYPES
def test_sizes_of_a_detector(dtype: torch.dtype) -> None:
    check([(64, 48), (32, 24), (16, 12), (8, 6)], 2, 1000, 8, 32, 4, dtype)


def test_repeats_bit_for_bit() -> None:
    given = list(make([(6, 5), (3, 3)], 2, 300 if DEVICE == "cuda" else 9, 2, 16, 4, torch.float32).values())

    def once() -> list[Tensor]:
        out = deformable_attention(given[0], [(6, 5), (3, 3)], given[1], given[2], backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    first = once()
    for _ in range(100 if DEVICE == "cuda" else 2):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
