"""The losses' Triton kernels under Triton's interpreter, against the dense formulas in fp64.

Triton decides at its first import whether it interprets, for good, and other tests need it otherwise. So
these tests run in a process of their own: without TRITON_INTERPRET=1 the one test here starts pytest on this
file with it.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from mmscale_kernels import contrastive_loss, explain, sigmoid_loss
from test_losses import LOSSES, Loss, assert_equal_to_dense, make_inputs, value_and_gradients

if os.environ.get("TRITON_INTERPRET") != "1":
    # Not collected here: the names below would be those of tests.
    def test_under_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stdout + done.stderr

else:
    # Tiles are 128 x 128 and 64 features deep.
    SHAPES = [(1, 1, 3), (7, 7, 5), (5, 130, 17), (129, 129, 65), (130, 260, 64)]

    @LOSSES
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_parity(op: Loss, shape: tuple[int, int, int]) -> None:
        inputs = make_inputs(op, *shape, scale=3.0)
        inputs[0] /= shape[2] ** 0.5
        # fp32: logits of up to 20 carry errors of 20 * 2^-24 * sqrt(features), 1e-5 relative in exponentials;
        # halves: the gradients are rounded to 11 or 8 bits, and for bf16 the logits' gradients as well.
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)):
            assert_equal_to_dense(op, inputs, dtype, tolerance, backend="triton")

    @LOSSES
    def test_labels_weights_and_smoothing(op: Loss) -> None:
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {
            "labels": torch.randint(0, 40, (140,), generator=generator),
            "weights": torch.rand(140, generator=generator).round(decimals=1),
        }
        inputs = make_inputs(op, 140, 140, 20, scale=1.0)
        # As in test_parity, fp32.
        assert_equal_to_dense(op, inputs, torch.float32, 1e-5, backend="triton", **options)
        if op is contrastive_loss:
            options["label_smoothing"] = 0.2
            assert_equal_to_dense(op, inputs, torch.float32, 1e-5, backend="triton", **options)

    @LOSSES
    def test_bands_add_up(op: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
        from mmscale_kernels import triton_losses

        monkeypatch.setattr(triton_losses, "_BAND_BYTES", 1)
        monkeypatch.setattr(triton_losses, "_TABLE_BYTES", 1)
        assert len(triton_losses._bands(140, 300, 1.0, 1)) == 3
        inputs = make_inputs(op, 140, 300, 8, scale=1.0)
        assert_equal_to_dense(op, inputs, torch.float32, 1e-5, backend="triton")  # as in test_parity, fp32

    @LOSSES
    def test_scale_of_100_and_rows_of_any_length(op: Loss) -> None:
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
        inputs = [tensor.bfloat16() for tensor in make_inputs(contrastive_loss, 150, 150, 9)]
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
