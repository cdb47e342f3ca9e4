"""The forms that attention takes on the CPU: few keys by products of their own, more by the flash kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from mmscale_kernels import Source, cross_modal_attention
from mmscale_kernels import cpu_attention as cpu
from mmscale_kernels.packed import _cached_table, packed_attention
from torch import Tensor

BATCH, HEADS, WIDTH = 3, 4, 8


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.fixture(params=["few", "kernel"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Let both forms see the same small shapes, and hold each to what it is called."""
    ran = []
    monkeypatch.setattr(cpu, "_DENSE_LOGITS", 1 << 12 if request.param == "few" else 0)
    real = cpu.attend_few
    monkeypatch.setattr(cpu, "attend_few", lambda *args, **kwargs: ran.append(1) or real(*args, **kwargs))
    yield request.param
    assert bool(ran) == (request.param == "few")


def same_as_reference(call: Callable[[str | None], Tensor], leaves: list[Tensor]) -> None:
    found, exact = (call(backend) for backend in (None, "reference"))
    arriving = torch.randn_like(exact)
    pairs = zip(
        (found, *torch.autograd.grad(found, leaves, arriving)),
        (exact, *torch.autograd.grad(exact, leaves, arriving)),
        strict=True,
    )
    for one, other in pairs:
        # float64 sums of some dozen terms of size 1
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def sources(kind: str, kv_heads: int) -> tuple[list[Source], dict[str, Any]]:
    def source(size: int, **known: Any) -> Source:
        return Source(leaf(BATCH, size, kv_heads, WIDTH), leaf(BATCH, size, kv_heads, WIDTH), **known)

    if kind == "full":
        return [source(7)], {}
    if kind == "lengths":
        return [source(5, lengths=torch.tensor([0, 5, 2])), source(3)], {}
    if kind == "a sample without keys":
        return [source(5, lengths=torch.tensor([0, 5, 2])), source(3, lengths=torch.tensor([0, 0, 3]))], {}
    if kind == "gates":
        gated = source(4, gate=leaf(HEADS), lengths=torch.tensor([4, 0, 1]))
        return [gated, source(3), source(2, gate=leaf(BATCH, HEADS))], {}
    if kind == "one gate":
        return [source(4, gate=leaf(HEADS)), source(3)], {}
    if kind == "causal":
        return [source(6, causal=True)], {}
    assert kind == "query lengths"
    known = {"starts": torch.tensor([1, 0, 2]), "lengths": torch.tensor([3, 4, 0])}
    return [source(5, **known)], {"query_lengths": torch.tensor([6, 0, 2])}


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize(
    "kind", ["full", "lengths", "a sample without keys", "gates", "one gate", "causal", "query lengths"]
)
def test_sources_in_both_forms(form: str, kind: str, kv_heads: int) -> None:
    query = leaf(BATCH, 6, HEADS, WIDTH)
    given, known = sources(kind, kv_heads)
    leaves = [query, *(x for one in given for x in (one.key, one.value, one.gate) if x is not None)]
    same_as_reference(lambda backend: cross_modal_attention(query, given, backend=backend, **known), leaves)


@pytest.mark.parametrize("gated", ["no gates", "gates", "gates of each sample"])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("causal", [(False, False), (False, True)])
def test_packed_in_both_forms(
    form: str, causal: tuple[bool, bool], kv_heads: int, full: bool, gated: str
) -> None:
    qkv = leaf(BATCH, 9, HEADS + 2 * kv_heads, WIDTH)
    lengths = torch.tensor([[4, 5]] * BATCH if full else [[0, 5], [4, 2], [2, 0]])
    gates = {"no gates": None, "gates": leaf(2, HEADS), "gates of each sample": leaf(BATCH, 2, HEADS)}[gated]
    same_as_reference(
        lambda backend: packed_attention(
            qkv, num_heads=HEADS, offsets=(0, 4), lengths=lengths, causal=causal, gates=gates, backend=backend
        ),
        [qkv] if gates is None else [qkv, gates],
    )


def test_one_causal_segment_in_both_forms(form: str) -> None:
    qkv = leaf(BATCH, 9, 3 * HEADS, WIDTH)
    known: dict[str, Any] = {"lengths": torch.tensor([[9], [1], [4]]), "causal": (True,)}
    same_as_reference(
        lambda backend: packed_attention(qkv, num_heads=HEADS, offsets=(0,), backend=backend, **known), [qkv]
    )


@pytest.mark.parametrize("gated", [False, True])
def test_padding_and_what_arrives_there_may_be_nan(form: str, gated: bool) -> None:
    query, key, value = leaf(2, 4, HEADS, WIDTH), leaf(2, 5, HEADS, WIDTH), leaf(2, 5, HEADS, WIDTH)
    lengths, rows = torch.tensor([3, 5]), torch.tensor([4, 1])
    arriving = torch.randn(2, 4, HEADS, WIDTH, dtype=torch.float64)
    gate = torch.randn(HEADS, dtype=torch.float64) if gated else None

    def run() -> list[Tensor]:
        source = Source(key, value, lengths=lengths, gate=gate)
        out = cross_modal_attention(query, [source], query_lengths=rows)
        return [out, *torch.autograd.grad(out, [query, key, value], arriving)]

    clean = run()
    with torch.no_grad():
        key[0, 3:], value[0, 3:], query[1, 1:], arriving[1, 1:] = math.nan, -math.inf, math.inf, math.nan
    for one, other in zip(run(), clean, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_closed_gate_is_left_to_the_kernel() -> None:
    query = leaf(BATCH, 6, HEADS, WIDTH)
    closed = torch.tensor([0.0, -math.inf, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    source = Source(leaf(BATCH, 5, HEADS, WIDTH), leaf(BATCH, 5, HEADS, WIDTH), gate=closed)
    same_as_reference(
        lambda backend: cross_modal_attention(query, [source], backend=backend),
        [query, source.key, source.value, closed],
    )


@pytest.mark.parametrize("gated", [False, True])
def test_training_after_inference_with_the_same_table(gated: bool) -> None:
    _cached_table.cache_clear()
    qkv = leaf(BATCH, 9, 3 * HEADS, WIDTH)
    gates = leaf(2, HEADS) if gated else None
    known: dict[str, Any] = {"offsets": (0, 4), "causal": (False, True), "gates": gates}

    def run(lengths: list[int]) -> Tensor:
        return packed_attention(qkv, num_heads=HEADS, lengths=torch.tensor([lengths] * BATCH), **known)

    with torch.inference_mode():
        run([4, 5]), run([3, 2])
    for lengths in ([4, 5], [3, 2]):
        torch.autograd.grad(run(lengths).sum(), [qkv])


@pytest.mark.parametrize("name", ["_len_torch_dispatch_stack", "_functorch"])
def test_without_pytorchs_private_names_the_operator_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.is_direct([torch.zeros(1)])
    x = torch.zeros(1)
    monkeypatch.delattr(torch._C, name)
    assert not cpu.is_direct([x])
    monkeypatch.undo()
    assert cpu.is_direct([torch.zeros(1)])


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_a_call_a_sample_keeps_the_threads_busy(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples of one head each on eight threads share a call; where heads fill the threads, they don't."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    size = 512
    key = torch.zeros(8, size, heads, 64)
    source = cpu.FlashSource(key, key, torch.arange(1, 9) * 64, None, None, None, False)
    parts = list(cpu._parts(key, source, None))
    assert len(parts) == (8 if heads == 8 else 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_meet_only_for_much_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    key = torch.zeros(8, 256, 8, 64)
    source = cpu.FlashSource(key, key, torch.arange(1, 9) * 32, None, None, None, False)
    assert len(list(cpu._parts(key, source, None))) == (8 if threads == 1 else 1)
