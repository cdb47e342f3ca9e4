"""The losses' Triton form on a device, against the dense formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmscale_kernels import contrastive_loss, sigmoid_loss
from on_device import DEVICE, DTYPES, TOLERANCE, compare, device_only, generator, needs_device, rounded
from torch import Tensor

pytestmark = needs_device
LOSSES = pytest.mark.parametrize("op", [contrastive_loss, sigmoid_loss], ids=lambda op: op.__name__)


def make(op: Any, n: int, m: int, d: int, dtype: torch.dtype, scale: float = 5.0) -> dict[str, Tensor]:
    x, y = (torch.randn(rows, d, device=DEVICE, generator=generator(seed)) for rows, seed in ((n, 1), (m, 2)))
    given = {"x": rounded(F.normalize(x, dim=1), dtype), "y": rounded(F.normalize(y, dim=1), dtype)}
    given["scale"] = torch.tensor(scale, device=DEVICE, requires_grad=True)
    if op is sigmoid_loss:
        given["bias"] = torch.tensor(-1.5, device=DEVICE, requires_grad=True)
    return given


def check(op: Any, given: dict[str, Tensor], tolerance: float, **options: Any) -> None:
    compare(
        lambda backend, i: op(*i.values(), group=False, backend=backend, **options),
        given,
        tolerance,
        # Sums over all pairs of terms of both signs.
        loose=("scale", "bias"),
    )


@LOSSES
@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 3),
        (7, 7, 5),
        (5, 45, 17),
        (65, 130, 72),
        pytest.param((129, 129, 64), marks=device_only),
        pytest.param((1000, 1000, 768), marks=device_only),
        pytest.param((511, 2049, 100), marks=device_only),
        pytest.param((4097, 4097, 257), marks=device_only),
    ],
    ids=str,
)
def test_parity(op: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(op, make(op, *shape, dtype), TOLERANCE[dtype])


@LOSSES
@DTYPES
def test_labels_weights_and_smoothing(op: Any, dtype: torch.dtype) -> None:
    n = 140 if DEVICE == "cuda" else 50
    options: dict[str, Any] = {
        "labels": torch.randint(0, n // 4, (n,), device=DEVICE, generator=generator(0)),
        "weights": torch.rand(n, device=DEVICE, generator=generator(1)).round(decimals=1),
    }
    check(op, make(op, n, n, 20, dtype), TOLERANCE[dtype], **options)
    if op is contrastive_loss:
        check(op, make(op, n, n, 20, dtype), TOLERANCE[dtype], label_smoothing=0.2, **options)
        check(op, make(op, n // 2, n, 20, dtype), TOLERANCE[dtype], label_smoothing=0.1)


@LOSSES
def test_scale_of_100_and_rows_of_any_length(op: Any) -> None:
    given = make(op, 48, 48, 32, torch.float32, scale=100.0)
    given["x"] = (given["x"].detach() * 10).requires_grad_()
    # Logits of 1,000 carry errors of 1000 * 2^-24 = 6e-5 into probabilities.
    check(op, given, 1e-3)


@LOSSES
def test_strided_rows(op: Any) -> None:
    given = make(op, 40, 40, 24, torch.float16)
    wide = torch.full((40, 2, 40), float("nan"), device=DEVICE, dtype=torch.float16)
    wide[:, 1, 16:] = given["x"].detach()
    given["x"] = wide[:, 1, 16:].requires_grad_()
    check(op, given, TOLERANCE[torch.float16])


@device_only
@LOSSES
def test_offsets_beyond_32_bits(op: Any) -> None:
    buffer = torch.zeros(2**32 + 2**20, device=DEVICE, dtype=torch.bfloat16)
    given = make(op, 65, 65, 64, torch.bfloat16)
    far = buffer.as_strided((65, 64), (2**26, 1))
    far.copy_(given["x"].detach())
    given["x"] = far.requires_grad_()
    check(op, given, TOLERANCE[torch.bfloat16])


@LOSSES
def test_repeats_bit_for_bit(op: Any) -> None:
    n, runs = (3000, 50) if DEVICE == "cuda" else (40, 2)
    given = list(make(op, n, n, 64, torch.float16).values())

    def once() -> list[Tensor]:
        loss = op(*given, group=False, backend="triton")
        return [loss, *torch.autograd.grad(loss, given)]

    first = once()
    for _ in range(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@device_only
@LOSSES
def test_memory_grows_with_rows_and_not_with_pairs(op: Any) -> None:
    def extra(n: int) -> int:
        given = list(make(op, n, n, 64, torch.bfloat16).values())
        op(*given, group=False, backend="triton").backward()  # compiles
        for tensor in given:
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        op(*given, group=False, backend="triton").backward()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    small, large = extra(32_768), extra(65_536)
    # One matrix of bf16 logits would be 2 and 8 GiB. Blocks of a fixed size may be held beside what grows with rows.
    assert large < 2**30, f"{large / 2**20:.0f} MiB for 65,536 rows"
    assert large < 2.5 * small + 2**26, (
        f"{small / 2**20:.0f} MiB for half the rows, {large / 2**20:.0f} for all"
    )


@LOSSES
def test_no_gradient_wanted(op: Any) -> None:
    given = make(op, 33, 33, 16, torch.float32)
    loss = op(*given.values(), group=False, backend="triton")
    with torch.no_grad():
        bare = op(*given.values(), group=False, backend="triton")
    # The same sums, in kernels that may add in another order: 2^-24 times a few.
    torch.testing.assert_close(loss.detach(), bare, rtol=1e-6, atol=0)
