"""What the GPU tests share: the device, tolerances, and the comparison of an operator's Triton form with fp64.

The tests need a CUDA or ROCm device, torch, triton and pytest. With MMSCALE_GPU_TESTS_ON_CPU=1 and TRITON_INTERPRET=1
those that make sense run on the CPU, slowly: it shows that the tests are right, and nothing of a device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_DEVICE = torch.cuda.is_available()
ON_CPU = (
    not HAS_DEVICE
    and os.environ.get("MMSCALE_GPU_TESTS_ON_CPU") == "1"
    and os.environ.get("TRITON_INTERPRET") == "1"
)
DEVICE = "cuda" if HAS_DEVICE else "cpu"

needs_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HAS_DEVICE or ON_CPU), reason="needs a CUDA or ROCm device"),
]
# For what the interpreter can't show, or shows too slowly.
device_only = pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA or ROCm device")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)

# Norm of the error over the norm of the exact value. Halves: results and the factors of the second products are
# rounded once, by at most eps / 2 each, and such roundings are independent: eps has a factor of 3 to spare.
# fp32: sums of some hundred products and exponentials of logits of up to 20: 20 * 2^-24 * sqrt(products).
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf of `dtype`."""
    return tensor.detach().to(dtype).requires_grad_()


def generator(seed: int) -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype, seed: int, poisoned: int = 0) -> Tensor:
    """A normal leaf. `poisoned`: it is a view of a buffer with so many more columns in front, which hold NaN."""
    drawn = torch.randn(*shape, device=DEVICE, generator=generator(seed)).to(dtype)
    if poisoned:
        buffer = torch.full((*shape[:-1], poisoned + shape[-1]), float("nan"), device=DEVICE, dtype=dtype)
        buffer[..., poisoned:] = drawn
        drawn = buffer[..., poisoned:]
    return drawn.requires_grad_()


def poison_memory() -> None:
    """Leave NaN in the memory that the next allocations get, so that what isn't written shows."""
    held = [torch.full((1 << p,), float("nan"), device=DEVICE) for p in range(8, 23 if HAS_DEVICE else 16)]
    del held


def widened(value: Any) -> Any:
    """The same in fp64, as leaves of their own."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def assert_close(name: str, got: Tensor, exact: Tensor, tolerance: float) -> None:
    """Norm and largest element of the error; -inf in the same places; NaN never."""
    got, exact = got.detach().double(), exact.detach().double()
    assert got.shape == exact.shape, name
    assert torch.equal(got == -torch.inf, exact == -torch.inf), f"{name}: -inf in other places"
    got, exact = got.masked_fill(got == -torch.inf, 0.0), exact.masked_fill(exact == -torch.inf, 0.0)
    assert bool(torch.isfinite(got).all()), f"{name} isn't finite"
    if exact.numel() == 0:
        return
    error, norm = (got - exact).norm(), exact.norm()
    assert error <= tolerance * norm + 1e-12, f"{name}: relative error {float(error / norm):.2e}"
    most = (got - exact).abs().max() / exact.abs().max().clamp(min=1e-12)
    # Of a normal distribution's elements none lies beyond 8 times its root mean square.
    assert most <= 8 * tolerance, f"{name}: an element is off by {float(most):.2e} of the largest"


def compare(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    given: dict[str, Tensor],
    tolerance: float,
    *,
    loose: Sequence[str] = (),
    looser: float = 10.0,
) -> None:
    """Compare run(backend, given)'s results and gradients, Triton against the dense form in fp64.

    loose: names of gradients that are sums over many rows of what nearly cancels, which get `looser` times the
    tolerance.
    """

    def results(backend: str, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        out = run(backend, inputs)
        outs = list(out) if isinstance(out, tuple) else [out]
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for number, part in enumerate(outs):
            weight = torch.randn(
                part.shape, device=DEVICE, dtype=torch.float64, generator=generator(90 + number)
            )
            finite = part.masked_fill(part == -torch.inf, 0.0)
            # The incoming gradient is what the dtype can hold, for both.
            total = (
                total + (finite * weight.to(next(iter(given.values())).dtype).to(part.dtype)).double().sum()
            )
        leaves = [x for x in inputs.values() if x.requires_grad]
        return outs, list(torch.autograd.grad(total, leaves))

    poison_memory()
    outs, grads = results("triton", given)
    exact_outs, exact_grads = results("reference", {name: widened(x) for name, x in given.items()})
    for number, (got, exact) in enumerate(zip(outs, exact_outs, strict=True)):
        assert_close(f"result {number}", got, exact, tolerance)
    names = [name for name, x in given.items() if x.requires_grad]
    for name, got, exact in zip(names, grads, exact_grads, strict=True):
        assert got.dtype == given[name].dtype, name
        assert_close(f"gradient of {name}", got, exact, tolerance * (looser if name in loose else 1.0))
