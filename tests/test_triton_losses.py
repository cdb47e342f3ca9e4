"""The losses' Triton kernels under Triton's interpreter, against the dense formulas in fp64.

They run in a process of their own: see `interpreted`.
"""

from collections.abc import Iterator
from typing import Any

import interpreted
import pytest
import torch
from mmscale_kernels import configs, contrastive_loss, explain, sigmoid_loss
from test_losses import (
    LOSSES,
    Loss,
    assert_equal_to_dense,
    assert_no_worse_than_plain,
    dense,
    make_inputs,
    value_and_gradients,
)

if not interpreted.INTERPRETED:
    # Not collected here: the names below would be those of tests.
    def test_under_the_interpreter() -> None:
        interpreted.run(__file__)

else:
    from interpreted import poisoned_memory  # noqa: F401

    # The interpreter's tiles are 32 x 64 in two halves and 32 features deep, its bands 64 x 128.
    SHAPES = [(1, 1, 3), (7, 7, 5), (64, 128, 32), (70, 140, 37)]
    KERNELS = ("losses_statistics", "losses_gradients", "losses_sigmoid")

    @pytest.fixture(params=["tile", "chunk"])
    def form(request: pytest.FixtureRequest) -> Iterator[str]:
        """Both forms, for all kernels and shape classes."""
        choices = {
            (kernel, shape_class): {**entry["interpreter"], "form": request.param}
            for kernel in KERNELS
            for shape_class, entry in configs.table("losses")[kernel].items()
        }
        with configs.override(choices=choices):
            yield request.param

    @LOSSES
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_parity(op: Loss, shape: tuple[int, int, int], form: str) -> None:
        inputs = make_inputs(op, *shape, scale=3.0)
        inputs[0] /= shape[2] ** 0.5
        # fp32: logits of up to 20 carry errors of 20 * 2^-24 * sqrt(features), 1e-5 relative in exponentials;
        # halves: the gradients are rounded to 11 or 8 bits, and the logits' gradients as well.
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)):
            assert_equal_to_dense(op, inputs, dtype, tolerance, backend="triton")

    @LOSSES
    def test_labels_weights_and_smoothing(op: Loss, form: str) -> None:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {
            "labels": torch.randint(0, 40, (80,), generator=generator),
            "weights": torch.rand(80, generator=generator).round(decimals=1),
        }
        if op is contrastive_loss:
            options["label_smoothing"] = 0.2
        inputs = make_inputs(op, 80, 80, 20, scale=1.0)
        # As in test_parity. One weight is 2^14 times the others: fp16 has to hold both.
        assert_equal_to_dense(op, inputs, torch.float32, 1e-5, backend="triton", **options)
        options["weights"][0] = 2.0**14
        assert_equal_to_dense(op, inputs, torch.float16, 2e-3, backend="triton", **options)

    def test_fp16_holds_the_gradients_of_a_large_batch(form: str) -> None:
        """Each pair's share of a mean over N = 2^20 pairs is below fp16's smallest number; here weights make it so."""
        weights = torch.full((40,), 2.0**-20)
        weights[0] = 1 - 39 * 2.0**-20
        inputs = make_inputs(sigmoid_loss, 40, 40, 8, scale=1.0)
        rounded = [tensor.half() for tensor in inputs]
        found = value_and_gradients(sigmoid_loss, rounded, weights=weights, backend="triton")[1][1:]
        expected = value_and_gradients(
            lambda *a, **k: dense(sigmoid_loss, *a, **k), [t.double() for t in rounded], weights=weights
        )[1][1:]
        # fp16's numbers end at 2^-24: a gradient of 2^-20 has 4 bits, an error of up to 1/32 of it.
        assert (found.double() - expected).abs().max() < 2.0**-24
        assert found.any()

    @LOSSES
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_halves_are_no_worse_than_twice_the_plain_expression(
        op: Loss, dtype: torch.dtype, form: str
    ) -> None:
        assert_no_worse_than_plain(op, dtype, 70, "triton")

    def test_far_and_transposed_rows(form: str) -> None:
        """Rows without a unit step, or too far from each other for 32 bits, are copied."""
        inputs = [tensor.float() for tensor in make_inputs(contrastive_loss, 40, 40, 8)]
        far = torch.zeros(40, 2**22)[:, :8]
        far.copy_(inputs[1])
        expected = value_and_gradients(contrastive_loss, inputs, backend="triton")
        x, y, scale = (
            inputs[0].T.contiguous().T.requires_grad_(),
            far.requires_grad_(),
            inputs[2].requires_grad_(),
        )
        loss = contrastive_loss(x, y, scale, backend="triton")
        found = [loss.detach(), *torch.autograd.grad(loss, [x, y, scale])]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # fp32, the same sums in another order

    @LOSSES
    def test_bands_add_up(op: Loss, form: str) -> None:
        shape_class = "fp32 d<=64"
        choices = {
            (kernel, shape_class): {
                **configs.choose(kernel, shape_class, torch.device("cpu")),
                "rows": 32,
                "columns": 64,
            }
            for kernel in KERNELS
        }
        from mmscale_kernels import triton_losses

        inputs = make_inputs(op, 70, 140, 8, scale=1.0)
        with configs.override(choices=choices):
            launch = triton_losses._Launch.of(
                "losses_sigmoid", *[t.float() for t in inputs[:2]], want_band=True
            )
            assert len(list(launch.blocks())) == 9
            assert launch.config["form"] == form
            assert_equal_to_dense(
                op, inputs, torch.float32, 1e-5, backend="triton"
            )  # as in test_parity, fp32

    def test_a_value_alone_takes_no_band() -> None:
        """Without grad, the sigmoid loss writes no gradients."""
        from mmscale_kernels import triton_losses

        made: list[torch.Tensor | None] = []
        real = triton_losses._Launch.band_of
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(triton_losses._Launch, "band_of", lambda *a: made.append(real(*a)) or made[-1])
            inputs = [tensor.float() for tensor in make_inputs(sigmoid_loss, 20, 20, 8)]
            value = sigmoid_loss(*inputs, backend="triton")
        assert made == [None]
        torch.testing.assert_close(
            value.double(), dense(sigmoid_loss, *[t.double() for t in inputs]), rtol=1e-5, atol=0
        )

    @LOSSES
    def test_scale_of_100_and_rows_of_any_length(op: Loss, form: str) -> None:
        inputs = make_inputs(op, 40, 40, 16, scale=100.0)
        inputs[0][:20] *= 4
        # fp32: logits of 5,000 carry errors of 5000 * 2^-24 = 3e-4 into probabilities where two nearly tie.
        assert_equal_to_dense(op, inputs, torch.float32, 1e-3, backend="triton")

    def test_a_loss_of_tiny_terms_is_not_rounded_away() -> None:
        """With a bias of -10, SigLIP's start, each of the terms is 5e-5 and 1 + exp(-10) has 3 digits of
        it."""
        x, y = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)) / 8
        scalars = [torch.tensor(1.0), torch.tensor(-16.0)]
        # The terms are made from correctly rounded exponentials; they and their sum keep 6 digits.
        assert_equal_to_dense(sigmoid_loss, [x, y, *scalars], torch.float32, 3e-6, backend="triton")

    def test_repeats_bit_for_bit() -> None:
        inputs = [tensor.bfloat16() for tensor in make_inputs(contrastive_loss, 70, 70, 9)]
        first, second = (value_and_gradients(contrastive_loss, inputs, backend="triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_explain_and_what_is_not_covered() -> None:
        inputs = make_inputs(contrastive_loss, 4, 4, 3)
        assert explain(contrastive_loss, *[t.float() for t in inputs], backend="triton").backend == "triton"
        assert explain(contrastive_loss, *inputs).backend == "torch"
        with pytest.raises(
            ValueError, match='backend is "triton", which can\'t run this call: float64 inputs'
        ):
            contrastive_loss(*inputs, backend="triton")
