"""The Triton kernels of deformable attention under Triton's interpreter, against the reference in fp64.

They run in a process of their own: see `interpreted`.
"""

import math
import mmap

import interpreted
import pytest
import torch
import torch.nn.functional as F
from mmscale_kernels import configs
from mmscale_kernels.deformable import _deformable, deformable_attention
from mmscale_kernels.dispatch import explain
from torch import Tensor

# Sums of some dozen fp32 terms; the gradients of locations carry the size of the map.
FP32 = 2e-5

if not interpreted.INTERPRETED:
    # Not collected here: the names below would be those of tests.
    def test_under_the_interpreter() -> None:
        interpreted.run(__file__)

else:
    from interpreted import poisoned_memory  # noqa: F401
    from mmscale_kernels import triton_deformable

    Shapes = list[tuple[int, int]]

    def make(
        shapes: Shapes, *, batch: int, queries: int, heads: int, points: int, width: int, seed: int = 0
    ) -> list[Tensor]:
        """Return value, locations (some of them outside the maps), weights and the output's gradient."""
        torch.manual_seed(seed)
        places = (batch, queries, heads, len(shapes), points)
        return [
            torch.randn(batch, sum(h * w for h, w in shapes), heads, width),
            torch.rand(*places, 2) * 1.8 - 0.4,
            torch.rand(places),
            torch.randn(batch, queries, heads * width),
        ]

    def results(tensors: list[Tensor], shapes: Shapes, backend: str = "triton") -> list[Tensor]:
        """Return the output and the three gradients."""
        value, locations, weights = (x.detach().requires_grad_() for x in tensors[:3])
        out = deformable_attention(value, shapes, locations, weights, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, [value, locations, weights], tensors[3])]

    def exact(tensors: list[Tensor], shapes: Shapes) -> list[Tensor]:
        return results([x.double() for x in tensors], shapes, "reference")

    def assert_same(got: list[Tensor], wanted: list[Tensor], tolerance: float = FP32) -> None:
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)

    def plain(tensors: list[Tensor], shapes: Shapes) -> list[Tensor]:
        """The usual PyTorch form, every operation in the dtype of the inputs."""
        value, locations, weights = (x.detach().requires_grad_() for x in tensors[:3])
        batch, queries, heads, _, _ = weights.shape
        levels = value.split([height * width for height, width in shapes], 1)
        out = 0
        for number, ((height, width), level) in enumerate(zip(shapes, levels, strict=True)):
            image = level.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
            grid = (locations[:, :, :, number] * 2 - 1).transpose(1, 2).flatten(0, 1)
            sampled = F.grid_sample(image, grid, align_corners=False)  # (B * H, D, Lq, points)
            spread = weights[:, :, :, number].transpose(1, 2).flatten(0, 1)  # (B * H, Lq, points)
            out = out + (sampled * spread[:, None]).sum(-1)
        out = out.view(batch, heads, -1, queries).permute(0, 3, 1, 2).flatten(2)
        return [out.detach(), *torch.autograd.grad(out, [value, locations, weights], tensors[3])]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(
        ("shapes", "sizes"),
        [
            ([(2, 3), (1, 1), (1, 2)], {"batch": 2, "queries": 5, "heads": 2, "points": 2, "width": 5}),
            ([(1, 1), (1, 1), (1, 1)], {"batch": 1, "queries": 3, "heads": 3, "points": 1, "width": 1}),
            ([(4, 2)], {"batch": 1, "queries": 17, "heads": 1, "points": 3, "width": 33}),
        ],
    )
    def test_against_the_reference(shapes: Shapes, sizes: dict[str, int], dtype: torch.dtype) -> None:
        low = [x.to(dtype) for x in make(shapes, **sizes)]
        got, wanted = results(low, shapes), exact(low, shapes)
        if dtype == torch.float32:
            assert_same(got, wanted)
            return
        assert all(x.dtype == dtype for x in got)
        for a, b, c in zip(got, plain(low, shapes), wanted, strict=True):
            assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()

    def test_many_points_in_a_cell() -> None:
        shapes = [(1, 2)]
        chunk = configs.choose("deformable_backward_value", "d32", torch.device("cpu"))["CHUNK"]
        tensors = make(shapes, batch=1, queries=30, heads=1, points=10, width=3)  # 300 points, six cells
        assert (
            6 * 2 * chunk > 300 > 6 * chunk
        )  # so that some have one whole piece or two, and incomplete ones
        assert_same(results(tensors, shapes), exact(tensors, shapes))
        tensors[1][:] = torch.tensor([0.3, 0.6])
        assert_same(results(tensors, shapes), exact(tensors, shapes), 1e-4)  # sums of 300 terms

    def test_every_run_gives_the_same_bits() -> None:
        shapes = [(1, 1)]
        tensors = make(shapes, batch=1, queries=16, heads=1, points=10, width=3)
        runs = [results(tensors, shapes) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_outside_is_zero_however_far() -> None:
        shapes = [(2, 2), (1, 3)]
        tensors = make(shapes, batch=1, queries=5, heads=1, points=1, width=4)
        far = torch.tensor([1e30, -1e30, math.inf, -math.inf, 2.0])
        tensors[1][..., 0] = far.view(1, 5, 1, 1, 1)
        assert all((x == 0).all() for x in results(tensors, shapes))

    @pytest.mark.filterwarnings(
        "error:invalid value encountered in cast"
    )  # numpy's, where a NaN is turned into an integer
    def test_nan_is_not_hidden() -> None:
        shapes = [(2, 2)]
        tensors = make(shapes, batch=1, queries=3, heads=1, points=2, width=4)
        tensors[1][0, 1, 0, 0, 1, 0] = math.nan
        out, grad_value, grad_locations, _ = results(tensors, shapes)
        assert out.isnan().any(2).tolist() == [[False, True, False]]
        assert grad_locations.isnan().any()
        assert grad_value.isfinite().all()  # the place is in no cell

    def test_views_are_read_in_place() -> None:
        shapes = [(1, 2)]
        tensors = make(shapes, batch=2, queries=3, heads=2, points=1, width=4)
        wanted = results(tensors, shapes)
        buffer = torch.full((2, 2, 3, 7), math.nan)
        view = buffer.transpose(0, 1)[:, :, 1:, 2:6]
        view.copy_(tensors[0])
        assert triton_deformable._unit_stride(view) is view
        slow = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors[1:]]
        other_way = tensors[0].mT.contiguous().mT
        assert other_way.stride(3) != 1
        for value in (view, other_way):
            got = results([value, *slow], shapes)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    def test_addresses_beyond_32_bits() -> None:
        shapes = [(1, 2)]
        tensors = [x.half() for x in make(shapes, batch=3, queries=2, heads=1, points=1, width=2)]
        memory = mmap.mmap(-1, 2 * (2**31 + 4))  # only what is touched is taken
        far = torch.frombuffer(memory, dtype=torch.float16).as_strided((3, 2, 1, 2), (2**30, 2, 2, 1))
        far.copy_(tensors[0])
        got = results([far, *tensors[1:]], shapes)
        assert all(torch.equal(a, b) for a, b in zip(got, results(tensors, shapes), strict=True))

    def test_opcheck_and_compile() -> None:
        shapes = [(1, 1)]
        tensors = make(shapes, batch=1, queries=2, heads=1, points=1, width=2)
        inputs = [x.requires_grad_() for x in tensors[:3]]
        torch.library.opcheck(_deformable, (inputs[0], [1, 1], *inputs[1:], "triton"))

        def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return deformable_attention(value, shapes, locations, weights, backend="triton")

        out = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
        grads = torch.autograd.grad(out, inputs, tensors[3])
        for a, b in zip([out, *grads], results(tensors, shapes), strict=True):
            assert torch.equal(a, b)

    def test_backward_runs_on_the_same_backend(monkeypatch: pytest.MonkeyPatch) -> None:
        ran = []
        kernels = triton_deformable.backward
        monkeypatch.setattr(triton_deformable, "backward", lambda *a, **k: ran.append(1) or kernels(*a, **k))
        shapes = [(1, 1)]
        tensors = make(shapes, batch=1, queries=1, heads=1, points=1, width=1)
        results(tensors, shapes)
        assert ran == [1]
        results(tensors, shapes, "torch")
        assert ran == [1]

    @pytest.mark.parametrize(
        ("dtype", "width", "queries", "reason"),
        [
            (torch.float64, 2, 1, "fp64"),
            (torch.float32, 257, 1, "D is 257"),
            (torch.float32, 2, 2**31, "in 32 bits"),
        ],
    )
    def test_what_is_not_covered_is_said(dtype: torch.dtype, width: int, queries: int, reason: str) -> None:
        value, locations, weights, _ = make([(1, 1)], batch=1, queries=1, heads=1, points=1, width=width)
        many = [x.expand(-1, queries, *x.shape[2:]) for x in (locations, weights)]
        arguments = (value.to(dtype), [(1, 1)], *many)
        decision = explain(deformable_attention, *arguments)
        assert decision.backend == "torch"
        assert reason in dict(decision.passed_over)["triton"]
        with pytest.raises(ValueError, match=reason):
            deformable_attention(*arguments, backend="triton")
