"""The Triton kernels of attention under Triton's interpreter, against the tiled form.

Triton decides at its first import whether it interprets, for good, and other tests need it otherwise. So
these tests run in a process of their own: without TRITON_INTERPRET=1 the one test here starts pytest on this
file with it.
"""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from mmscale_kernels.attention import Source, cross_modal_attention
from mmscale_kernels.dispatch import explain
from mmscale_kernels.packed import packed_attention
from torch import Tensor

# Inputs are the same in both forms. fp32: sums of some dozen terms in another order. fp16: the kernels round
# probabilities and their gradients to 11 bits before the second product, and results are up to 8 in size.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}

if os.environ.get("TRITON_INTERPRET") != "1":
    # Not collected here: the names below would be those of tests.
    def test_under_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(
            command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stdout + done.stderr

else:

    @pytest.fixture(autouse=True)
    def _poisoned_memory() -> Any:
        """What a kernel forgets to write is NaN."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
        assert torch.empty(3).isnan().all()
        yield
        torch.use_deterministic_algorithms(before)

    def assert_same(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
        tolerance = TOLERANCE[dtype]
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        ("offsets", "causal", "columns", "heads", "width", "gated"),
        [
            ((0,), (False,), 5, (1, 1), 3, ""),
            ((0,), (True,), 37, (2, 1), 16, ""),
            ((0,), (True,), 19, (2, 2), 16, "each"),
            ((0, 3, 20), (False, False, True), 40, (4, 2), 24, "each"),
            ((0, 3, 20), (False, False, True), 29, (2, 2), 8, ""),
            ((0, 35), (False, True), 70, (1, 1), 8, "shared"),  # several blocks of 32 or 64
        ],
    )
    def test_packed(
        offsets: tuple[int, ...], causal: tuple[bool, ...], columns: int, heads: tuple[int, int], width: int,
        gated: str, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        num_heads, num_kv_heads = heads
        widths = torch.tensor([*offsets[1:], columns]) - torch.tensor(offsets)
        lengths = torch.stack([(widths + 1) // 2, widths])
        lengths[0, 0] = 0
        shape = {"": None, "shared": (len(offsets), num_heads), "each": (2, len(offsets), num_heads)}[gated]
        gates = None if shape is None else torch.randn(shape).requires_grad_()
        qkv = torch.randn(2, columns, num_heads + 2 * num_kv_heads, width).to(dtype).requires_grad_()
        weight = torch.randn(2, columns, num_heads, width).to(dtype)
        leaves = [qkv] if gates is None else [qkv, gates]
        both = []
        for backend in ("triton", "torch"):
            out = packed_attention(
                qkv, num_heads=num_heads, offsets=offsets, lengths=lengths, causal=causal, gates=gates,
                backend=backend,
            )  # fmt: skip
            both.append([out, *torch.autograd.grad(out, leaves, weight)])
        assert_same(*both, dtype)
        place = torch.cat([torch.arange(int(size)) for size in widths])
        padding = place >= lengths.repeat_interleave(widths, 1)
        assert (both[0][0][padding] == 0).all()
        assert (both[0][1][padding] == 0).all()

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize(
        ("num_queries", "num_keys", "known"),
        [
            (1, 1, {}),
            (3, 20, {"lengths": [20, 0], "causal": True}),
            (20, 3, {"causal": True}),
            (37, 19, {"lengths": [5, 12], "starts": [14, 0], "gate": (2,)}),
            (7, 70, {"starts": [70, 3], "gate": (2, 2), "causal": True}),
        ],
    )
    def test_one_source(num_queries: int, num_keys: int, known: dict[str, Any], dtype: torch.dtype) -> None:
        torch.manual_seed(1)
        query = torch.randn(2, num_queries, 2, 5).to(dtype).requires_grad_()
        buffer = torch.randn(2, num_keys, 2, 7).to(dtype).requires_grad_()
        gate = torch.randn(known["gate"]).requires_grad_() if "gate" in known else None
        one = Source(
            buffer[:, :, :1, 1:6],
            buffer[:, :, 1:, :5],
            lengths=torch.tensor(known["lengths"]) if "lengths" in known else None,
            starts=torch.tensor(known["starts"]) if "starts" in known else None,
            gate=gate,
            causal=known.get("causal", False),
        )
        leaves = [query, buffer] if gate is None else [query, buffer, gate]
        rows = torch.tensor([num_queries, num_queries // 2])
        weights = [torch.randn(2, num_queries, 2, 5), torch.randn(2, 2, num_queries)]
        both = []
        for backend in ("triton", "torch"):
            out, lse = cross_modal_attention(
                query, [one], query_lengths=rows, return_lse=True, backend=backend
            )
            finite = lse.masked_fill(lse == -math.inf, 0.0)
            loss = (out * weights[0]).sum() + (finite * weights[1]).sum()
            both.append([out, lse, *torch.autograd.grad(loss, leaves)])
        assert_same(*both, dtype)

    def test_what_padding_holds_does_not_matter() -> None:
        torch.manual_seed(2)
        lengths = torch.tensor([[2, 5], [4, 0]])
        padding = torch.cat([torch.arange(4) >= lengths[:, :1], torch.arange(6) >= lengths[:, 1:]], 1)
        clean = torch.randn(2, 10, 4, 8)
        both = []
        for hole in (math.nan, 0.0):
            qkv = clean.masked_fill(padding[:, :, None, None], hole).requires_grad_()
            out = packed_attention(
                qkv, num_heads=2, offsets=(0, 4), lengths=lengths, causal=(False, True), backend="triton"
            )
            both.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))

    def test_every_run_gives_the_same_bits() -> None:
        torch.manual_seed(3)
        qkv = torch.randn(2, 40, 4, 8, requires_grad=True)
        lengths = torch.tensor([[7, 30], [3, 11]])
        runs = []
        for _ in range(2):
            out = packed_attention(
                qkv, num_heads=2, offsets=(0, 8), lengths=lengths, causal=(False, True), backend="triton"
            )
            runs.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"num_sources": 2}, "one source at a time"),
            ({"bias": torch.zeros(3, 4)}, "no bias"),
            ({"dropout_p": 0.1, "seed": 0}, "no dropout"),
            ({"dtype": torch.float64}, "fp64"),
            ({"dtype": torch.bfloat16}, "bf16"),
            ({"width": 300}, "D is 300"),
        ],
    )
    def test_what_is_not_covered_is_said(changes: dict[str, Any], reason: str) -> None:
        changes = dict(changes)
        dtype, width = changes.pop("dtype", torch.float32), changes.pop("width", 8)
        key = torch.zeros(2, 4, 1, width, dtype=dtype)
        sources = [Source(key, key, bias=changes.pop("bias", None))] * changes.pop("num_sources", 1)
        query = torch.zeros(2, 3, 2, width, dtype=dtype)
        decision = explain(cross_modal_attention, query, sources, **changes)
        assert decision.backend == "torch"
        assert reason in dict(decision.passed_over)["triton"]
        with pytest.raises(ValueError, match=reason):
            cross_modal_attention(query, sources, backend="triton", **changes)
