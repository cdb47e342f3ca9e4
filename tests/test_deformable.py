"""deformable_attention on the CPU: its torch form, the reference, transformers' Deformable DETR, finite differences.

The Triton kernels are tested in test_triton_deformable.py.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mmscale_kernels.deformable import _deformable, deformable_attention
from mmscale_kernels.dispatch import explain
from torch import Tensor

# fp64 sums of at most 4 * levels * points terms of size 1 to 10
EXACT = 1e-12
SHAPES = [(4, 3), (2, 5), (1, 1)]


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return value, locations (a third of them outside the maps) and weights."""
    torch.manual_seed(0)
    value = torch.randn(2, 23, 3, 4, dtype=dtype).requires_grad_()
    locations = (torch.rand(2, 5, 3, 3, 2, 2, dtype=dtype) * 1.8 - 0.4).requires_grad_()
    return value, locations, torch.rand(2, 5, 3, 3, 2, dtype=dtype).requires_grad_()


def results(value: Tensor, locations: Tensor, weights: Tensor, **options: Any) -> list[Tensor]:
    out = deformable_attention(value, SHAPES, locations, weights, **options)
    grads = torch.autograd.grad(out.square().sum(), [value, locations, weights])
    return [out.detach(), *grads]


SIZE = st.integers(1, 4)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, and how far the locations reach beyond the maps, in maps."""
    return {
        "shapes": draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4)),
        "batch": draw(SIZE), "queries": draw(st.integers(0, 6)), "heads": draw(SIZE), "points": draw(SIZE),
        "width": draw(st.integers(1, 9)), "reach": draw(st.sampled_from([0.0, 0.5, 3.0])),
        "seed": draw(st.integers(0, 2**16)),
    }  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(calls())
@example(
    {
        "shapes": [(1, 1)] * 3,
        "batch": 1,
        "queries": 1,
        "heads": 1,
        "points": 1,
        "width": 1,
        "reach": 3.0,
        "seed": 0,
    }
)
def test_the_two_forms_agree_on_any_sizes(call: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(call["seed"])

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    shapes, reach = call["shapes"], call["reach"]
    rows = sum(height * width for height, width in shapes)
    places = (call["batch"], call["queries"], call["heads"], len(shapes), call["points"])
    tensors = [
        rand(call["batch"], rows, call["heads"], call["width"]) - 0.5,
        rand(*places, 2) * (1 + 2 * reach) - reach,
        rand(*places),
    ]
    both = []
    for backend in ("torch", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = deformable_attention(leaves[0], shapes, *leaves[1:], backend=backend)
        both.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert_same(*both)


def assert_same(got: list[Tensor], wanted: list[Tensor], tolerance: float = EXACT) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_two_forms_agree() -> None:
    assert_same(results(*inputs(), backend="torch"), results(*inputs(), backend="reference"))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_against_transformers(backend: str) -> None:
    peer = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    value, locations, weights = inputs()
    out = peer.MultiScaleDeformableAttention()(
        value, torch.tensor(SHAPES), SHAPES, torch.tensor([0, 12, 22]), locations, weights, 64
    )
    grads = torch.autograd.grad(out.square().sum(), [value, locations, weights])
    assert_same(results(value, locations, weights, backend=backend), [out.detach(), *grads])


def test_gradcheck() -> None:
    value, locations, weights = inputs()
    small = [value[:1, :, :1, :1], locations[:1, :2, :1], weights[:1, :2, :1]]

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, SHAPES, locations, weights)

    assert torch.autograd.gradcheck(run, [x.detach().requires_grad_() for x in small])


def test_pixels_and_edges_by_hand() -> None:
    value = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)  # a map of 2 x 2
    places = [(0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.0, 0.25), (0.25, 1.0), (-9.0, 0.5), (1e30, 0.5)]
    locations = torch.tensor(places).view(1, -1, 1, 1, 1, 2)
    out = deformable_attention(value, [(2, 2)], locations, torch.ones(1, len(places), 1, 1, 1))
    # centres are at 1/4 and 3/4; on the border half of the sample lies outside, where the map is 0
    assert out.flatten().tolist() == [1.0, 2.0, 2.5, 0.5, 1.5, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    low = [x.detach().to(dtype).requires_grad_() for x in inputs()]
    exact = [x.detach().double().requires_grad_() for x in low]
    # the rounding of results of size up to 60 (locations' gradients carry the size of the map)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    assert_same([x.double() for x in results(*low)], results(*exact, backend="reference"), tolerance)


def test_opcheck_and_compile() -> None:
    value, locations, weights = inputs()
    flat = [size for shape in SHAPES for size in shape]
    torch.library.opcheck(_deformable, (value, flat, locations, weights, ""))

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deformable_attention(value, SHAPES, locations, weights)

    out = torch.compile(run, fullgraph=True, backend="aot_eager")(value, locations, weights)
    grads = torch.autograd.grad(out.square().sum(), [value, locations, weights])
    assert_same([out, *grads], results(value, locations, weights))


def test_nothing_to_do() -> None:
    value, locations, weights = inputs()
    out = deformable_attention(value, SHAPES, locations[:, :0], weights[:, :0])
    assert out.shape == (2, 0, 12)
    assert (torch.autograd.grad(out.sum(), value)[0] == 0).all()
    assert math.isclose(out.sum().item(), 0.0)


def test_bad_input_is_named() -> None:
    value, locations, weights = inputs()
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((value[0], SHAPES, locations, weights), {}, "value has shape"),
        ((value.long(), SHAPES, locations, weights), {}, "value has dtype"),
        ((value, [], locations, weights), {}, "spatial_shapes is"),
        ((value, [(4, 3), (2, 4), (1, 1)], locations, weights), {}, "value has 23 rows; .* needs 21"),
        ((value, SHAPES, locations, weights[:, :, :2]), {}, "attention_weights has shape"),
        ((value, SHAPES, locations[..., :1], weights), {}, "sampling_locations has shape"),
        ((value, SHAPES, locations, weights.long()), {}, "attention_weights is torch.int64"),
        ((value, SHAPES, locations, weights), {"backend": "triton"}, "triton"),
    ]
    for arguments, options, message in cases:
        for run in (deformable_attention, lambda *a, **k: explain(deformable_attention, *a, **k)):
            with pytest.raises(ValueError, match=message):
                run(*arguments, **options)


def test_explain_says_why() -> None:
    value, locations, weights = inputs()
    decision = explain(deformable_attention, value, SHAPES, locations, weights)
    assert decision.backend == "torch"
    assert "triton" in dict(decision.passed_over)
