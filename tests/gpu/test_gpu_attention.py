"""cross_modal_attention's and packed_attention's Triton forms on a device, against dense attention in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmscale_kernels import Source, cross_modal_attention, packed_attention
from on_device import DEVICE, DTYPES, TOLERANCE, compare, device_only, needs_device, normal
from torch import Tensor

pytestmark = needs_device

# One dict a source: lk, and what is known of it. bias: its shape. Batch 2, 4 heads.
ONE: dict[str, list[dict[str, Any]]] = {
    "plain": [{"lk": 50}],
    "lengths": [{"lk": 70, "lengths": [70, 33]}],
    "lengths with 0": [{"lk": 40, "lengths": [0, 17]}],
    "starts": [{"lk": 60, "lengths": [20, 31], "starts": [7, 29]}],
    "grouped": [{"lk": 37, "hkv": 2}],
    "gate": [{"lk": 37, "gate": (4,), "lengths": [30, 1]}],
    "bias": [{"lk": 45, "bias": (1, 4, 21, 45)}],
    "masking bias": [{"lk": 45, "bias": (2, 1, 1, 45), "mask": True}],
    "causal": [{"lk": 21, "causal": True}],
    "causal, fewer queries": [{"lk": 64, "causal": True, "lengths": [64, 50]}],
    "causal, more queries": [{"lk": 9, "causal": True}],
}
SEVERAL: dict[str, list[dict[str, Any]]] = {
    "two": [{"lk": 33}, {"lk": 50}],
    "two with lengths": [{"lk": 33, "lengths": [0, 33]}, {"lk": 50, "lengths": [0, 13]}],
    "all at once": [
        {"lk": 19, "lengths": [19, 4], "gate": (2, 4), "hkv": 1},
        {"lk": 40, "starts": [3, 11], "lengths": [30, 0], "bias": (4, 21, 40)},
        {"lk": 21, "causal": True, "gate": (4,), "hkv": 2},
        {"lk": 1},
    ],
}


def make(
    sources: list[dict[str, Any]], lq: int, width: int, dtype: torch.dtype, batch: int = 2, poisoned: int = 8
) -> dict[str, Tensor]:
    """The tensors that are differentiated, by name."""
    given = {"query": normal(batch, lq, 4, width, dtype=dtype, seed=1, poisoned=poisoned)}
    for i, known in enumerate(sources):
        shape = (batch, known["lk"], known.get("hkv", 4), width)
        for j, name in enumerate(("key", "value")):
            given[f"{name}{i}"] = normal(*shape, dtype=dtype, seed=10 * i + j + 2, poisoned=poisoned)
        if "gate" in known:
            given[f"gate{i}"] = normal(*known["gate"], dtype=torch.float32, seed=10 * i + 4)
        if "bias" in known:
            bias = normal(*known["bias"], dtype=dtype, seed=10 * i + 5)
            if known.get("mask"):
                bias = (bias.detach().masked_fill(bias > 0, -torch.inf)).requires_grad_()
            given[f"bias{i}"] = bias
    return given


def gather(sources: list[dict[str, Any]], given: dict[str, Tensor]) -> list[Source]:
    def whole(values: list[int] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, device=DEVICE)

    return [
        Source(
            given[f"key{i}"],
            given[f"value{i}"],
            lengths=whole(known.get("lengths")),
            starts=whole(known.get("starts")),
            gate=given.get(f"gate{i}"),
            bias=given.get(f"bias{i}"),
            causal=known.get("causal", False),
        )
        for i, known in enumerate(sources)
    ]


def check(
    sources: list[dict[str, Any]], lq: int, width: int, dtype: torch.dtype, *, batch: int = 2, **options: Any
) -> None:
    given = make(sources, lq, width, dtype, batch)
    compare(
        lambda backend, i: cross_modal_attention(i["query"], gather(sources, i), backend=backend, **options),
        given,
        TOLERANCE[dtype],
        # Each is a sum over queries and keys of what cancels exactly but for the values.
        loose=[name for name in given if name.startswith(("gate", "bias"))],
    )


@DTYPES
@pytest.mark.parametrize("name", [*ONE, *SEVERAL])
def test_what_a_source_may_have(name: str, dtype: torch.dtype) -> None:
    sources = (ONE | SEVERAL)[name]
    check(sources, 21, 16, dtype, return_lse=True, return_mass=True)


@pytest.mark.parametrize("name", list(SEVERAL))
def test_a_softmax_for_each_source(name: str) -> None:
    check(SEVERAL[name], 21, 16, torch.float32, softmax="per_source", return_lse=True)


@DTYPES
def test_query_lengths_and_scale(dtype: torch.dtype) -> None:
    lengths = torch.tensor([21, 0], device=DEVICE)
    check(SEVERAL["all at once"], 21, 16, dtype, query_lengths=lengths, scale=0.3, return_lse=True)


@DTYPES
@pytest.mark.parametrize(
    "width", [24, 40, *(pytest.param(w, marks=device_only) for w in (32, 64, 72, 80, 96, 128, 160, 192, 256))]
)
def test_widths(width: int, dtype: torch.dtype) -> None:
    lq, lk = (200, 150) if DEVICE == "cuda" else (20, 33)
    check([{"lk": lk, "lengths": [lk, lk - 9], "hkv": 2}], lq, width, dtype)


@device_only
@DTYPES
@pytest.mark.parametrize(
    ("lq", "lk"),
    [(1, 1), (1, 5000), (5000, 1), (1344, 77), (1023, 257), (129, 128), (128, 129), (2000, 3000)],
)
def test_many_shapes(lq: int, lk: int, dtype: torch.dtype) -> None:
    check([{"lk": lk, "lengths": [lk, (lk + 1) // 2]}], lq, 64, dtype, return_lse=True)


@device_only
@DTYPES
@pytest.mark.parametrize("width", [64, 128])
def test_long_causal(width: int, dtype: torch.dtype) -> None:
    check([{"lk": 1500, "causal": True}], 1500, width, dtype)


@device_only
@DTYPES
def test_four_long_sources(dtype: torch.dtype) -> None:
    sources = [
        {"lk": 700, "lengths": [700, 300], "gate": (4,)},
        {"lk": 257, "hkv": 2},
        {"lk": 77, "lengths": [0, 60], "bias": (4, 1, 77)},
        {"lk": 600, "causal": True},
    ]
    check(sources, 600, 64, dtype, return_lse=True, return_mass=True)


@pytest.mark.parametrize("name", ["plain", "two", "all at once"])
def test_dropout_is_that_of_the_torch_form(name: str) -> None:
    """The mask is a function of (seed, source, head, query, key), the same in every form."""
    sources = (ONE | SEVERAL)[name]
    seeds = torch.tensor([3, 2**40 + 5], device=DEVICE)
    check(sources, 21, 16, torch.float32, dropout_p=0.3, seed=seeds)
    given = make(sources, 21, 16, torch.float32)
    runs = [
        cross_modal_attention(given["query"], gather(sources, given), dropout_p=0.3, seed=seeds, backend=form)
        for form in ("triton", "torch")
    ]
    plain = cross_modal_attention(given["query"], gather(sources, given), backend="torch")
    # fp32 sums of up to 100 products; one entry of the mask that differs shows at 1e-2.
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)
    assert float((runs[1] - plain).detach().norm() / plain.detach().norm()) > 0.1


@device_only
def test_dropout_of_long_keys() -> None:
    check([{"lk": 900}, {"lk": 300}], 500, 64, torch.float32, dropout_p=0.2, seed=11)


@device_only
def test_offsets_beyond_32_bits() -> None:
    """Strides over 4 GiB in batch, rows and heads, for every operand."""
    buffer = torch.full((2**32 + 2**24,), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    shape = (2, 40, 2, 64)

    def far(first: int, strides: tuple[int, ...]) -> Tensor:
        view = buffer.as_strided(shape, strides, first)
        view.copy_(torch.randn(shape, device=DEVICE))
        return view.requires_grad_()

    given = {
        "query": far(0, (2**32, 2**10, 64, 1)),
        "key0": far(2**20, (2**10, 2**26, 64, 1)),
        "value0": far(2**21, (2**11, 2**10 * 4, 2**32, 1)),
    }
    compare(
        lambda backend, i: cross_modal_attention(i["query"], gather([{"lk": 40}], i), backend=backend),
        given,
        TOLERANCE[torch.bfloat16],
    )


def test_repeats_bit_for_bit() -> None:
    runs = 100 if DEVICE == "cuda" else 2
    lq = 500 if DEVICE == "cuda" else 21
    sources = [
        {"lk": 3 * lq, "lengths": [3 * lq, 9], "hkv": 2},
        {"lk": lq, "bias": (1, 4, lq, lq), "gate": (4,)},
    ]
    given = make(sources, lq, 32, torch.float16, poisoned=0)

    def once() -> list[Tensor]:
        out = cross_modal_attention(given["query"], gather(sources, given), backend="triton")
        return [out, *torch.autograd.grad(out.float().square().sum(), list(given.values()))]

    first = once()
    for _ in range(runs):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@device_only
def test_no_matrix_of_logits_is_held() -> None:
    given = make([{"lk": 16_384}], 16_384, 64, torch.bfloat16, batch=1, poisoned=0)

    def step() -> None:
        out = cross_modal_attention(given["query"], gather([{"lk": 16_384}], given), backend="triton")
        torch.autograd.grad(out.float().sum(), list(given.values()))

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    # The logits of 4 heads would be 2 GiB in bf16. Result, gradients and their fp32 copies are 8 MiB to 16 MiB each.
    assert extra < 256, f"{extra:.0f} MiB"


PACKED: dict[str, dict[str, Any]] = {
    "one": {"offsets": (0,), "lengths": [[30], [11]], "causal": (False,), "columns": 30},
    "two": {"offsets": (0, 20), "lengths": [[20, 25], [7, 0]], "causal": (False, False), "columns": 45},
    "causal last": {
        "offsets": (0, 9, 30), "lengths": [[9, 2, 20], [0, 21, 5]], "causal": (False, False, True), "columns": 50,
    },
    "causal alone": {"offsets": (0,), "lengths": [[33], [0]], "causal": (True,), "columns": 33},
}  # fmt: skip


def check_packed(known: dict[str, Any], width: int, dtype: torch.dtype, kv_heads: int, gates: bool) -> None:
    given = {
        "qkv": normal(2, known["columns"], 4 + 2 * kv_heads, width, dtype=dtype, seed=5),
    }
    if gates and len(known["offsets"]) > 1:  # the gate of all keys there are cancels
        given["gates"] = normal(len(known["offsets"]), 4, dtype=torch.float32, seed=6)
    lengths = torch.tensor(known["lengths"], device=DEVICE)
    compare(
        lambda backend, i: packed_attention(
            i["qkv"],
            num_heads=4,
            offsets=known["offsets"],
            lengths=lengths,
            causal=known["causal"],
            gates=i.get("gates"),
            backend=backend,
        ),
        given,
        TOLERANCE[dtype],
        loose=("gates",),
    )


@DTYPES
@pytest.mark.parametrize("name", list(PACKED))
def test_packed(name: str, dtype: torch.dtype) -> None:
    check_packed(PACKED[name], 16, dtype, 4, gates=False)
    check_packed(PACKED[name], 24, dtype, 2, gates=True)


@device_only
@DTYPES
@pytest.mark.parametrize("width", [64, 80, 128])
def test_packed_trunk(width: int, dtype: torch.dtype) -> None:
    known = {
        "offsets": (0, 197, 274),
        "lengths": [[197, 33, 500], [0, 77, 120]],
        "causal": (False, False, True),
        "columns": 800,
    }
    check_packed(known, width, dtype, 2, gates=True)
