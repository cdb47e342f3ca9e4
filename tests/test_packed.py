"""packed_attention on the CPU, against its dense form and cross_modal_attention on slices of the buffer."""

from typing import Any

import mmscale_kernels.cpu_attention as cpu
import mmscale_kernels.packed as packed
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmscale_kernels.attention import Source, cross_modal_attention
from mmscale_kernels.dispatch import explain
from mmscale_kernels.packed import packed_attention
from torch import Tensor

# fp64 sums of at most some hundred terms of size 1 to 10: 1e-12 is 100 times their rounding.
EXACT = 1e-12

# offsets, causal, columns
TABLES = {
    "one": ((0,), (False,), 9),
    "decoder": ((0,), (True,), 9),
    "two": ((0, 4), (False, False), 11),
    "prefix and target": ((0, 5), (False, True), 12),
    "three and target": ((0, 1, 4, 7), (False, False, False, True), 13),
}


def make(
    table: str, num_heads: int, num_kv_heads: int, gated: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, dict[str, Any]]:
    """Return a buffer and the arguments: full, empty and half-filled segments."""
    offsets, causal, columns = TABLES[table]
    widths = torch.tensor([*offsets[1:], columns]) - torch.tensor(offsets)
    lengths = torch.stack([widths, torch.zeros_like(widths), widths // 2, (widths + 1) // 2])
    lengths[3, 0] = 0
    shape = {"": None, "shared": (len(offsets), num_heads), "each": (4, len(offsets), num_heads)}[gated]
    gates = None if shape is None else torch.randn(shape, dtype=dtype).requires_grad_()
    qkv = torch.randn(4, columns, num_heads + 2 * num_kv_heads, 4, dtype=dtype).requires_grad_()
    return qkv, {
        "num_heads": num_heads, "offsets": offsets, "lengths": lengths, "causal": causal, "gates": gates,
    }  # fmt: skip


def results(qkv: Tensor, arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    """Return out and the gradients of a fixed random projection of it."""
    out = packed_attention(qkv, **arguments, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [qkv] if arguments["gates"] is None else [qkv, arguments["gates"]]
    return [out.detach(), *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def assert_same(got: list[Tensor], wanted: list[Tensor], tolerance: float = EXACT) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def valid_columns(arguments: dict[str, Any], columns: int) -> Tensor:
    parts = []
    offsets = arguments["offsets"]
    for number, (start, stop) in enumerate(zip(offsets, [*offsets[1:], columns], strict=True)):
        parts.append(torch.arange(stop - start) < arguments["lengths"][:, number : number + 1])
    return torch.cat(parts, 1)


def from_sources(qkv: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Say the same with one Source for each segment and one call for each segment's queries."""
    offsets, lengths, gates = (arguments[name] for name in ("offsets", "lengths", "gates"))
    num_heads, columns = arguments["num_heads"], qkv.shape[1]
    num_kv_heads = (qkv.shape[2] - num_heads) // 2
    query, key, value = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
    spans = [slice(a, b) for a, b in zip(offsets, [*offsets[1:], columns], strict=True)]
    sources = [
        Source(
            key[:, span],
            value[:, span],
            lengths=lengths[:, number],
            gate=None if gates is None else gates[..., number, :],
            causal=arguments["causal"][number],
        )
        for number, span in enumerate(spans)
    ]
    outs = []
    for number, span in enumerate(spans):
        visible = sources if arguments["causal"][number] else [s for s in sources if not s.causal]
        outs.append(
            cross_modal_attention(
                query[:, span], visible, query_lengths=lengths[:, number], backend="reference"
            )
        )
    return torch.cat(outs, 1)


@pytest.mark.parametrize("gated", ["", "shared", "each"])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("table", TABLES)
def test_against_dense_and_against_sources(table: str, heads: tuple[int, int], gated: str) -> None:
    torch.manual_seed(0)
    qkv, arguments = make(table, *heads, gated)
    wanted = results(qkv, arguments, backend="reference")
    got = results(qkv, arguments, backend="torch")
    assert_same(got, wanted)
    out = from_sources(qkv, arguments)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [qkv] if arguments["gates"] is None else [qkv, arguments["gates"]]
    assert_same(wanted, [out, *torch.autograd.grad((out * weight).sum(), leaves)])
    padding = ~valid_columns(arguments, qkv.shape[1])
    assert (got[0][padding] == 0).all()
    assert (got[1][padding] == 0).all()


@pytest.mark.parametrize("table", TABLES)
def test_full_segments(table: str) -> None:
    torch.manual_seed(1)
    qkv, arguments = make(table, 2, 2, "")
    arguments["lengths"] = arguments["lengths"][:1].expand(4, -1)
    assert_same(results(qkv, arguments), results(qkv, arguments, backend="reference"))


@pytest.mark.parametrize("gated", ["", "each"])
@pytest.mark.parametrize("table", ["prefix and target", "three and target"])
def test_many_columns_go_without_a_square_mask(table: str, gated: str) -> None:
    """More columns than one block of the kernel: the causal segment is a call of its own, joined with the prefix."""
    offsets, causal, _ = TABLES[table]
    offsets = tuple(100 * offset for offset in offsets)
    columns = offsets[-1] + 90
    torch.manual_seed(2)
    qkv = torch.randn(2, columns, 8, 4, dtype=torch.float64).requires_grad_()
    lengths = torch.ones(2, len(offsets), dtype=torch.int32)
    lengths[:, -1] = torch.tensor([90, 40])
    lengths[0, :-1] = torch.tensor(offsets).diff()
    gates = torch.randn(2, len(offsets), 4, dtype=torch.float64).requires_grad_() if gated else None
    arguments = {"num_heads": 4, "offsets": offsets, "lengths": lengths, "causal": causal, "gates": gates}
    # sums of up to 700 terms
    assert_same(results(qkv, arguments), results(qkv, arguments, backend="reference"), 10 * EXACT)


@pytest.mark.parametrize("columns", [12, 300])
def test_a_sample_may_lack_its_prefix_and_a_gate_may_close_it(columns: int) -> None:
    torch.manual_seed(11)
    qkv = torch.randn(3, columns, 6, 4, dtype=torch.float64).requires_grad_()
    gates = torch.zeros(3, 2, 2, dtype=torch.float64)
    gates[1, 0, 0] = gates[2, 1] = -torch.inf
    arguments = {
        "num_heads": 2, "offsets": (0, 5), "lengths": torch.tensor([[0, 7], [5, 7], [3, 6]]),
        "causal": (False, True), "gates": gates.requires_grad_(),
    }  # fmt: skip
    got = results(qkv, arguments)
    assert_same(got, results(qkv, arguments, backend="reference"))
    assert all(torch.isfinite(x).all() for x in got)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_table(data: st.DataObject) -> None:
    draw = data.draw
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    offsets = tuple(sum(widths[:i]) for i in range(len(widths)))
    causal = (*[False] * (len(widths) - 1), draw(st.booleans()))
    batch, num_kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    num_heads = num_kv_heads * group
    lengths = torch.tensor([[draw(st.integers(0, width)) for width in widths] for _ in range(batch)])
    torch.manual_seed(draw(st.integers(0, 99)))
    shapes = (None, (len(widths), num_heads), (batch, len(widths), num_heads))
    shape = draw(st.sampled_from(shapes))
    gates = None if shape is None else torch.randn(shape, dtype=torch.float64).requires_grad_()
    qkv = torch.randn(
        batch, sum(widths), num_heads + 2 * num_kv_heads, 3, dtype=torch.float64
    ).requires_grad_()
    arguments = {
        "num_heads": num_heads, "offsets": offsets, "lengths": lengths, "causal": causal, "gates": gates,
    }  # fmt: skip
    assert_same(results(qkv, arguments), results(qkv, arguments, backend="reference"))


@pytest.mark.parametrize("gated", ["", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, gated: str) -> None:
    torch.manual_seed(4)
    qkv, arguments = make("three and target", 4, 2, gated)
    low = qkv.detach().to(dtype).requires_grad_()
    got = results(low, arguments)
    wanted = results(low.detach().double().requires_grad_(), arguments, backend="reference")
    assert got[0].dtype == got[1].dtype == dtype
    # Inputs are the same; what differs is the rounding of results of size up to 8, and of probabilities.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}[dtype]
    assert_same([x.double() for x in got], [x.double() for x in wanted], tolerance)


@pytest.mark.parametrize("columns", [40, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, columns: int) -> None:
    """Against fp64, the error of out and of each gradient is at most twice that of matmul, softmax, matmul in dtype."""
    torch.manual_seed(5)
    buffer, gate, weight = torch.randn(2, columns, 12, 16), torch.randn(2, 4), torch.randn(2, columns, 4, 16)
    column = torch.arange(columns)
    half = columns // 2
    lengths = torch.tensor([[half, columns - half]]).expand(2, -1)

    def run(kind: torch.dtype, plain: bool) -> list[Tensor]:
        qkv, gates = (x.to(dtype).to(kind).requires_grad_() for x in (buffer, gate))
        if plain:
            query, key, value = (x.transpose(1, 2) for x in qkv.split(4, 2))
            mask = gates[(column >= half).long()].T[:, None].expand(4, columns, columns)
            mask = mask.masked_fill((column >= half) & (column > column[:, None]), -torch.inf)
            logits = query @ key.transpose(2, 3) * 0.25 + mask
            out = (logits.softmax(-1) @ value).transpose(1, 2)
        else:
            out = packed_attention(
                qkv, num_heads=4, offsets=(0, half), lengths=lengths, causal=(False, True), gates=gates
            )
        return [
            x.detach().double()
            for x in (out, *torch.autograd.grad((out * weight.to(kind)).sum(), [qkv, gates]))
        ]

    exact = run(torch.float64, True)
    ours, plain = run(dtype, False), run(dtype, True)
    for a, b, wanted in zip(ours, plain, exact, strict=True):
        assert (a - wanted).norm() <= 2 * (b - wanted).norm()


def test_strided_buffer_and_gradient() -> None:
    torch.manual_seed(5)
    qkv, arguments = make("prefix and target", 4, 2, "")
    whole = torch.zeros(12, 4, 11, 4, dtype=torch.float64)
    view = whole.transpose(0, 1)[:, :, 2:10]
    view.copy_(qkv.detach())
    view.requires_grad_()
    assert not view.is_contiguous()
    assert_same(results(view, arguments), results(qkv, arguments))
    # a gradient that arrives without a unit stride in D
    weight = torch.randn(4, 12, 4, 4, dtype=torch.float64)
    grads = [
        torch.autograd.grad(packed_attention(qkv, **arguments), qkv, x)
        for x in (weight, weight.transpose(2, 3).contiguous().transpose(2, 3))
    ]
    assert_same(list(grads[0]), list(grads[1]))


def test_gate_of_minus_infinity_removes_a_segment() -> None:
    torch.manual_seed(6)
    qkv, arguments = make("three and target", 2, 2, "shared")
    gates = arguments["gates"].detach().clone()
    gates[1] = -torch.inf
    removed = arguments | {"gates": gates.requires_grad_()}
    empty = arguments["lengths"].clone()
    empty[:, 1] = 0
    got, wanted = results(qkv, removed), results(qkv, arguments | {"lengths": empty, "gates": gates})
    elsewhere = [0, *range(4, 13)]  # all columns but those of the segment's own queries
    torch.testing.assert_close(got[0][:, elsewhere], wanted[0][:, elsewhere], rtol=EXACT, atol=EXACT)
    assert torch.isfinite(got[1]).all()
    assert (got[2][1] == 0).all()


@pytest.mark.parametrize("gated", ["", "shared"])
def test_gradcheck(gated: str) -> None:
    torch.manual_seed(7)
    qkv, arguments = make("prefix and target", 2, 1, gated)
    arguments |= {"lengths": arguments["lengths"][2:3]}
    gates = arguments.pop("gates")
    inputs = [qkv[2:3, :, :, :2].detach().requires_grad_()] + ([] if gates is None else [gates])

    def run(qkv: Tensor, gates: Tensor | None = None) -> Tensor:
        return packed_attention(qkv, gates=gates, **arguments)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize(
    ("table", "gated"), [("decoder", ""), ("three and target", "shared"), ("two", "each")]
)
def test_opcheck_and_compile(table: str, gated: str) -> None:
    torch.manual_seed(8)
    qkv, arguments = make(table, 4, 2, gated)
    gates = arguments["gates"]
    table_of = (arguments["offsets"], arguments["lengths"], arguments["causal"])
    torch.library.opcheck(packed._packed, (qkv, 4, *table_of, gates, 0.5, ""))

    def run(qkv: Tensor, gates: Tensor | None) -> Tensor:
        return packed_attention(qkv, **(arguments | {"gates": gates}))

    leaves = [qkv] if gates is None else [qkv, gates]
    both = []
    for form in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = form(qkv, gates)
        both.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert_same(both[1], both[0])


def test_every_run_gives_the_same_bits() -> None:
    torch.manual_seed(9)
    for gated in ("", "each"):
        qkv, arguments = make("three and target", 4, 2, gated, torch.float32)
        first = results(qkv, arguments)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(results(qkv, arguments), first, strict=True))


@pytest.mark.parametrize("columns", [12, 300])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_changes_nothing(backend: str, columns: int) -> None:
    torch.manual_seed(0)
    qkv, gates = torch.randn(2, columns, 6, 8).requires_grad_(), torch.randn(2, 2).requires_grad_()
    lengths = torch.tensor([[5, columns - 5], [2, 3]])
    runs = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = packed_attention(
                qkv,
                num_heads=2,
                offsets=(0, 5),
                lengths=lengths,
                causal=(False, True),
                gates=gates,
                backend=backend,
            )
        runs.append([out, *torch.autograd.grad(out, [qkv, gates], torch.ones(out.shape))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_second_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_few", lambda *_: False, raising=False)
    qkv = torch.randn(2, 12, 6, 8).requires_grad_()
    lengths = torch.tensor([[5, 7], [2, 3]])
    out = packed_attention(qkv, num_heads=2, offsets=(0, 5), lengths=lengths, causal=(False, True))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), qkv, create_graph=True)


def test_gates_wider_than_the_buffer() -> None:
    torch.manual_seed(0)
    qkv, gates = torch.randn(2, 12, 6, 8).requires_grad_(), torch.randn(2, 2).double().requires_grad_()
    both = []
    for backend in ("torch", "reference"):
        out = packed_attention(
            qkv, num_heads=2, offsets=(0, 5), lengths=torch.tensor([[5, 7], [2, 3]]), causal=(False, True),
            gates=gates, backend=backend,
        )  # fmt: skip
        both.append([out, *torch.autograd.grad(out.square().sum(), [qkv, gates])])
    for a, b in zip(*both, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of a dozen terms in fp32


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"qkv": torch.zeros(2, 6, 8)}, r"qkv has shape \(2, 6, 8\)"),
    "dtype": ({"qkv": torch.zeros(2, 6, 8, 4, dtype=torch.int64)}, "qkv has dtype torch.int64"),
    "stride": ({"qkv": torch.zeros(2, 6, 8, 8)[..., ::2]}, "stride 1"),
    "heads": ({"num_heads": 3}, "num_heads is 3 and qkv has 8 heads"),
    "first offset": ({"offsets": (1, 3)}, r"offsets is \(1, 3\)"),
    "descending": ({"offsets": (0, 0)}, r"offsets is \(0, 0\)"),
    "past the end": ({"offsets": (0, 6)}, "T = 6"),
    "causal first": ({"causal": (True, False)}, r"causal is \(True, False\)"),
    "causal count": ({"causal": (True,)}, "it needs 2 bools"),
    "lengths shape": ({"lengths": torch.zeros(2, 3).long()}, r"lengths has shape \(2, 3\)"),
    "lengths dtype": ({"lengths": torch.zeros(2, 2)}, "int32 or int64"),
    "too long": ({"lengths": torch.tensor([[3, 3], [2, 5]])}, r"\[2, 3\] .. \[3, 5\].* here \[4, 2\]"),
    "negative": ({"lengths": torch.tensor([[3, -1], [2, 1]])}, "lengths lie in"),
    "gates": ({"gates": torch.zeros(4, 2)}, r"gates has shape \(4, 2\)"),
    "no rank": ({"qkv": torch.zeros(())}, r"qkv has shape \(\)"),
    "no width": ({"qkv": torch.zeros(2, 6, 8, 0)}, r"qkv has strides"),
    "no tensor": ({"qkv": None}, "qkv is a NoneType"),
    "list of lengths": ({"lengths": [[4, 2], [0, 1]]}, "lengths is a list"),
    "number as gates": ({"gates": 1.0}, "gates is a float"),
    "no offsets": ({"offsets": None}, "offsets is None"),
    "float offsets": ({"offsets": (0.0, 4.0)}, r"offsets is \(0.0, 4.0\)"),
    "one bool": ({"causal": True}, "causal is True"),
    "float heads": ({"num_heads": 4.0}, "num_heads is 4.0"),
    "scale": ({"scale": torch.tensor(0.5)}, "scale is a tensor"),
    "backend": ({"backend": "fast"}, "backend is 'fast'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changes, message = BAD[name]
    call: dict[str, Any] = {
        "qkv": torch.zeros(2, 6, 8, 4), "num_heads": 4, "offsets": (0, 4),
        "lengths": torch.tensor([[4, 2], [0, 1]]), "causal": (False, True),
    } | changes  # fmt: skip
    qkv = call.pop("qkv")
    with pytest.raises(ValueError, match=message):
        packed_attention(qkv, **call)
    with pytest.raises(ValueError, match=message):
        explain(packed_attention, qkv, **call)


def test_an_empty_batch() -> None:
    qkv = torch.zeros(0, 6, 8, 4, requires_grad=True)
    lengths = torch.zeros(0, 2, dtype=torch.int64)
    out = packed_attention(qkv, num_heads=4, offsets=(0, 4), lengths=lengths, causal=(False, True))
    assert out.shape == (0, 6, 4, 4)
    out.sum().backward()
    assert qkv.grad is not None
