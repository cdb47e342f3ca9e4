"""The Triton kernels of attention under Triton's interpreter, against the tiled form and the dense one.

They run in a process of their own: see `interpreted`.
"""

import math
from collections.abc import Iterator
from typing import Any

import interpreted
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmscale_kernels import configs
from mmscale_kernels.attention import Source, cross_modal_attention
from mmscale_kernels.dispatch import explain
from mmscale_kernels.packed import packed_attention
from torch import Tensor

# Inputs are the same in both forms. fp32: sums of some dozen terms in another order. fp16: the kernels round
# probabilities and their gradients to 11 bits before the second product, and results are up to 8 in size.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}

if not interpreted.INTERPRETED:
    # Not collected here: the names below would be those of tests.
    def test_under_the_interpreter() -> None:
        interpreted.run(__file__)

    @pytest.mark.slow
    def test_more_under_the_interpreter() -> None:
        interpreted.run(__file__, "slow")

else:
    import triton
    import triton.language as tl
    from interpreted import poisoned_memory  # noqa: F401
    from mmscale_kernels.triton_attention import _where_we_are

    # A program of the streaming form has 16 queries and 16 keys here, one of the short form all keys.
    KEYS = {"short": 64, "streaming": 0}

    @pytest.fixture(params=KEYS)
    def form(request: pytest.FixtureRequest) -> Iterator[str]:
        with forced(request.param):
            yield request.param

    def forced(form: str) -> Any:
        """Take this form, whatever the shapes are."""
        classes = configs.table("attention")["attention_short"]
        return configs.override(choices={("attention_short", name): {"keys": KEYS[form]} for name in classes})

    def assert_same(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
        tolerance = TOLERANCE[dtype]
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    def source(size: int, heads: int, width: int, dtype: torch.dtype, **known: Any) -> Source:
        return Source(
            leaf(2, size, heads, width, dtype=dtype), leaf(2, size, heads, width, dtype=dtype), **known
        )

    def results(query: Tensor, sources: list[Source], **options: Any) -> list[Tensor]:
        """The outputs, and the gradients of a fixed random projection of them; -inf is replaced by a mark."""
        outputs = cross_modal_attention(query, sources, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(7)
        loss = torch.zeros(())
        for x in outputs:
            loss = (
                loss + (x.masked_fill(x == -math.inf, 0.0) * torch.randn(x.shape, generator=generator)).sum()
            )
        leaves = [query]
        for one in sources:
            leaves += [
                x for x in (one.key, one.value, one.gate, one.bias) if x is not None and x.requires_grad
            ]
        marked = [x.detach().masked_fill(x == -math.inf, -12345.0) for x in outputs]
        return [*marked, *torch.autograd.grad(loss, leaves)]

    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        ("offsets", "causal", "columns", "heads", "width", "gated"),
        [
            pytest.param((0,), (False,), 5, (1, 1), 3, "", marks=pytest.mark.slow),
            pytest.param((0,), (True,), 37, (2, 1), 16, "", marks=pytest.mark.slow),
            ((0,), (True,), 19, (2, 2), 16, "each"),
            ((0, 3, 20), (False, False, True), 40, (4, 2), 24, "each"),
            ((0, 3, 20), (False, False, True), 29, (2, 2), 8, ""),
            ((0, 35), (False, True), 64, (1, 1), 8, "shared"),
        ],
    )
    def test_packed(
        offsets: tuple[int, ...], causal: tuple[bool, ...], columns: int, heads: tuple[int, int], width: int,
        gated: str, dtype: torch.dtype, form: str,
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

    def test_what_padding_of_a_buffer_holds_does_not_matter(form: str) -> None:
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

    LENGTHS = {"lengths": torch.tensor([5, 12]), "starts": torch.tensor([14, 0])}
    # Each source: its size, heads of keys, and what is known about it; gate and bias by their shapes.
    SOURCES: dict[str, tuple[int, list[tuple[int, int, dict[str, Any]]]]] = {
        "one key": (1, [(1, 1, {})]),
        "an empty sample": (3, [(20, 2, {"lengths": torch.tensor([20, 0]), "causal": True})]),
        "more queries than keys, causal": (20, [(3, 2, {"causal": True})]),
        "starts": (37, [(19, 1, {**LENGTHS, "gate": (2,)})]),
        "starts alone": (7, [(50, 2, {"starts": torch.tensor([50, 3]), "gate": (2, 2), "causal": True})]),
        "two": (18, [(19, 2, LENGTHS), (17, 2, {"gate": (2,)})]),
        "two kinds of heads": (18, [(20, 1, {"gate": (2, 2)}), (7, 2, {"causal": True})]),
        "three, one of them empty": (
            17,
            [(4, 1, {"lengths": torch.tensor([0, 0])}), (33, 1, {"causal": True, "gate": (2,)}), (2, 1, {})],
        ),
        "none but empty": (
            5,
            [(4, 1, {"lengths": torch.tensor([0, 2])}), (3, 2, {"lengths": torch.tensor([0, 0]), "gate": (2,)})],
        ),
        "a source of no keys at all": (5, [(0, 1, {}), (9, 1, {"gate": (2,)})]),
    }  # fmt: skip

    def make(name: str, width: int, dtype: torch.dtype) -> tuple[Tensor, list[Source], dict[str, Any]]:
        torch.manual_seed(1)
        num_queries, given_sources = SOURCES[name]
        sources = []
        for size, heads, known in given_sources:
            known = dict(known)
            if "gate" in known:
                known["gate"] = leaf(*known["gate"])
            sources.append(source(size, heads, width, dtype, **known))
        lengths = torch.tensor([num_queries, num_queries // 2])
        return leaf(2, num_queries, 2, width, dtype=dtype), sources, {"query_lengths": lengths}

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SOURCES)
    def test_sources_in_half_precision(name: str, form: str) -> None:
        check_sources(name, torch.float16)

    @pytest.mark.parametrize(
        "name", ["starts", "two kinds of heads", "three, one of them empty", "none but empty"]
    )
    def test_sources(name: str, form: str) -> None:
        check_sources(name, torch.float32)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SOURCES)
    def test_more_sources(name: str, form: str) -> None:
        check_sources(name, torch.float32)

    def check_sources(name: str, dtype: torch.dtype) -> None:
        query, sources, options = make(name, 5, dtype)
        options |= {"return_lse": True, "return_mass": True}
        got, wanted = (results(query, sources, backend=b, **options) for b in ("triton", "torch"))
        assert_same(got, wanted, dtype)
        past = torch.arange(query.shape[1]) >= options["query_lengths"][:, None]
        assert (got[0][past] == 0).all()
        assert (got[3][past] == 0).all()

    def test_one_softmax_each(form: str) -> None:
        query, sources, options = make("two kinds of heads", 8, torch.float32)
        options |= {"softmax": "per_source", "return_lse": True}
        both = [results(query, sources, backend=b, **options) for b in ("triton", "torch")]
        assert_same(*both, torch.float32)

    @pytest.mark.parametrize("width", [16, *(pytest.param(w, marks=pytest.mark.slow) for w in (24, 40, 72))])
    def test_widths(width: int, form: str) -> None:
        query, sources, options = make("two", width, torch.float32)
        assert_same(
            *[results(query, sources, backend=b, **options) for b in ("triton", "torch")], torch.float32
        )

    def test_bf16(form: str) -> None:
        query, sources, options = make("two", 8, torch.bfloat16)
        got = results(query, sources, backend="triton", return_lse=True, **options)
        wanted = results(query, sources, backend="torch", return_lse=True, **options)
        for a, b in zip(got, wanted, strict=True):
            # results of size up to 8 rounded to 8 bits
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)

    # Full, and broadcast in each way; with and without dropout.
    BIASES = [
        ((2, 2, 18, 20), torch.float16, 0.0),
        ((2, 2, 18, 20), torch.float32, 0.3),
        ((1, 2, 18, 20), torch.float32, 0.3),
        ((2, 1, 18, 20), torch.float16, 0.0),
        ((18, 20), torch.float32, 0.3),
        ((2, 2, 1, 20), torch.float16, 0.3),
        ((2, 2, 18, 1), torch.float32, 0.0),
        ((1, 2, 1, 1), torch.float16, 0.0),
        ((1, 1, 1, 20), torch.float32, 0.0),
        ((18, 1), torch.float16, 0.0),
        ((1,), torch.float32, 0.3),
    ]

    def check_bias(shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> None:
        query, sources, known = make("two kinds of heads", 8, dtype)
        bias = torch.randn(shape)
        if len(shape) >= 2 and shape[-1] == 20:
            bias[..., -1, 3] = -math.inf
        sources[0] = Source(
            sources[0].key, sources[0].value, lengths=torch.tensor([20, 11]), gate=sources[0].gate,
            bias=bias.to(dtype).requires_grad_(),
        )  # fmt: skip
        sources[1] = Source(sources[1].key, sources[1].value, causal=True, bias=torch.randn(2, 1, 1, 7))
        options |= {"return_lse": True, "return_mass": True, **known}
        got, wanted = (results(query, sources, backend=b, **options) for b in ("triton", "torch"))
        assert_same(got, wanted, dtype)
        if len(shape) >= 2 and shape[-1] == 20:
            assert (got[7][..., -1, 3] == 0).all()

    @pytest.mark.parametrize("shape", [(2, 2, 18, 20), (1, 2, 18, 20), (2, 2, 1, 20)], ids=str)
    def test_bias(shape: tuple[int, ...]) -> None:
        check_bias(shape, torch.float32)

    @pytest.mark.slow
    @pytest.mark.parametrize(("shape", "dtype", "dropout_p"), BIASES, ids=str)
    def test_bias_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, dropout_p: float) -> None:
        check_bias(shape, dtype, dropout_p=dropout_p, seed=3 if dropout_p else None)

    @pytest.mark.parametrize(
        ("softmax", "seed"),
        [
            ("joint", torch.tensor([2**60 + 17, -5])),
            pytest.param("joint", 3, marks=pytest.mark.slow),
            pytest.param("per_source", 3, marks=pytest.mark.slow),
        ],
        ids=["joint, a sample", "joint, a number", "per source"],
    )
    def test_dropout_is_that_of_the_torch_form(softmax: str, seed: int | Tensor) -> None:
        query, sources, options = make("two kinds of heads", 8, torch.float32)
        options |= {"dropout_p": 0.4, "seed": seed, "softmax": softmax, "return_lse": True}
        both = [results(query, sources, backend=b, **options) for b in ("triton", "torch")]
        assert_same(*both, torch.float32)
        dropped = results(query, sources, backend="triton", **(options | {"dropout_p": 0.0, "seed": None}))
        assert not torch.allclose(dropped[0], both[0][0])
        assert torch.allclose(dropped[1], both[0][1])  # lse knows no dropout

    @pytest.mark.slow
    @given(data=st.data())
    @settings(max_examples=25, deadline=None)
    def test_any_call(data: st.DataObject) -> None:
        draw, whole, some = data.draw, st.integers, st.booleans()
        torch.manual_seed(draw(whole(0, 1000)))
        heads, width = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 8, 17, 32]))
        num_queries = draw(st.sampled_from([1, 2, 16, 33]))
        sources = []
        for _ in range(draw(whole(1, 3))):
            size = draw(whole(1, 40))
            known: dict[str, Any] = {"causal": draw(some)}
            begin = [0, 0]
            if draw(some):
                begin = [draw(whole(0, size)) for _ in range(2)]
                known["starts"] = torch.tensor(begin, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
            if draw(some):
                known["lengths"] = torch.tensor([draw(whole(0, size - n)) for n in begin])
            if draw(some):
                known["gate"] = leaf(*((heads,) if draw(some) else (2, heads)))
            if draw(whole(0, 3)) == 0:
                shape = [n if draw(some) else 1 for n in (2, heads, num_queries, size)]
                known["bias"] = leaf(*shape)
            sources.append(source(size, draw(st.sampled_from([1, heads])), width, torch.float32, **known))
        options: dict[str, Any] = {"return_lse": True, "return_mass": True}
        if draw(some):
            options["query_lengths"] = torch.tensor([draw(whole(0, num_queries)) for _ in range(2)])
        if draw(whole(0, 3)) == 0:
            options |= {"dropout_p": 0.4, "seed": 5}
        query = leaf(2, num_queries, heads, width)
        with forced(draw(st.sampled_from(["short", "streaming"]))):
            got = results(query, sources, backend="triton", **options)
        assert_same(got, results(query, sources, backend="torch", **options), torch.float32)

    def test_what_padding_holds_does_not_matter(form: str) -> None:
        query, sources, options = make("starts", 8, torch.float32)
        place, one = torch.arange(19), sources[0]
        assert one.starts is not None
        assert one.lengths is not None
        padding = (place < one.starts[:, None]) | (place >= (one.starts + one.lengths)[:, None])
        past = torch.arange(37) >= options["query_lengths"][:, None]
        both = []
        for hole in (math.nan, 0.0):
            key, value = (
                x.detach().masked_fill(padding[:, :, None, None], hole).requires_grad_()
                for x in (one.key, one.value)
            )
            clean = Source(key, value, lengths=one.lengths, starts=one.starts, gate=one.gate)
            rows = query.detach().masked_fill(past[:, :, None, None], hole).requires_grad_()
            both.append(results(rows, [clean], backend="triton", return_lse=True, **options))
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))

    def test_strided_views_are_read_and_written_in_place(form: str) -> None:
        torch.manual_seed(4)
        buffer = leaf(2, 40, 6, 9)
        query, key, value = buffer[:, 22:, :2, 1:], buffer[:, :20, 2:4, :8], buffer[:, :20, 4:, 1:]
        weight = torch.randn(2, 18, 2, 8)
        both = []
        for backend in ("triton", "torch"):
            out = cross_modal_attention(query, [Source(key, value)], backend=backend)
            both.append([out, *torch.autograd.grad((out * weight).sum(), buffer)])
        assert_same(*both, torch.float32)

    def test_lengths_out_of_bounds_are_clamped(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a device nobody looks at them before the kernel does."""
        from mmscale_kernels import tiled_attention

        torch.manual_seed(5)
        query, one = leaf(2, 5, 1, 8), source(18, 1, 8, torch.float32)
        wild = Source(one.key, one.value, torch.tensor([99, -3]), starts=torch.tensor([-4, 30]))
        tame = Source(one.key, one.value, torch.tensor([18, 0]))
        wanted = results(query, [tame], backend="triton", query_lengths=torch.tensor([5, 0]))
        monkeypatch.setattr(tiled_attention, "readable", lambda tensor: False)
        got = results(query, [wild], backend="triton", query_lengths=torch.tensor([7, -1]))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    def test_counts_beyond_32_bits_are_clamped(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cast before they are clamped, they would wrap into the range."""
        from mmscale_kernels import tiled_attention

        torch.manual_seed(5)
        query, one = leaf(2, 5, 1, 8), source(18, 1, 8, torch.float32)
        wild = Source(
            one.key, one.value, torch.tensor([2**32 + 3, 5 - 2**32]), starts=torch.tensor([4 - 2**32, 2**32])
        )
        tame = Source(one.key, one.value, torch.tensor([18, 0]))
        wanted = results(query, [tame], backend="triton", query_lengths=torch.tensor([5, 0]))
        monkeypatch.setattr(tiled_attention, "readable", lambda tensor: False)
        got = results(query, [wild], backend="triton", query_lengths=torch.tensor([2**32 + 1, 2 - 2**32]))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    @triton.jit
    def _offset_of_head(ptr: Any, stride: Any, num_heads: Any) -> None:
        _, head, _ = _where_we_are(1, num_heads)
        tl.store(ptr + tl.program_id(0), head * stride)

    def test_a_head_times_a_stride_leaves_32_bits() -> None:
        """Heads may lie further apart than 2**31 / H elements: long keys laid out by head, or a large bias."""
        got = torch.zeros(3, dtype=torch.int64)
        _offset_of_head[(3,)](got, 2**30, 3)
        assert got.tolist() == [0, 2**30, 2**31]

    def test_large_logits_leave_small_gradients(form: str) -> None:
        """One key has all the mass, and rounding the log-sum-exp of such logits moves it by more than the gradients."""
        torch.manual_seed(3)
        exact = [torch.randn(2, n, 2, 8, dtype=torch.float64) for n in (7, 9, 9)]
        exact[0] *= 1000
        weight = torch.randn(2, 7, 2, 8, dtype=torch.float64)

        def gradients(dtype: torch.dtype, backend: str) -> list[Tensor]:
            leaves = [x.to(dtype).requires_grad_() for x in exact]
            out = cross_modal_attention(leaves[0], [Source(leaves[1], leaves[2])], backend=backend)
            return [x.double() for x in torch.autograd.grad(out, leaves, weight.to(dtype))]

        for got, wanted in zip(
            gradients(torch.float32, "triton"), gradients(torch.float64, "reference"), strict=True
        ):
            # 2**-24 of logits of 3000, times gradients of 1: 2e-4; keys' gradients have queries of 1000 as a factor
            torch.testing.assert_close(
                got, wanted, rtol=1e-3, atol=1e-3 * max(1.0, float(wanted.abs().max()))
            )

    def test_seeds_of_any_stride() -> None:
        query, sources, options = make("starts alone", 8, torch.float32)
        table = torch.tensor([[5, 6], [7, 8]])
        options |= {"dropout_p": 0.4, "backend": "triton"}
        column, copy = (
            results(query, sources, seed=seed, **options) for seed in (table[:, 0], table[:, 0].clone())
        )
        assert all(torch.equal(a, b) for a, b in zip(column, copy, strict=True))

    def test_dropout_of_all_but_nothing() -> None:
        """Its threshold rounds to 2**32, which no word holds."""
        query, sources, options = make("two", 8, torch.float32)
        options |= {"dropout_p": 1 - 1e-12, "seed": 1}
        out = cross_modal_attention(query, sources, backend="triton", **options)
        assert torch.equal(out, cross_modal_attention(query, sources, backend="torch", **options))
        assert (out == 0).all()

    def test_launches_happen_on_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        real = torch.cuda.device_of
        monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: (asked.append(tensor), real(tensor))[1])
        query, sources, options = make("one key", 8, torch.float32)
        results(query, sources, backend="triton", **options)
        assert len(asked) == 2
        assert asked[0].data_ptr() == query.data_ptr()

    def test_every_run_gives_the_same_bits(form: str) -> None:
        query, sources, options = make("two kinds of heads", 8, torch.float16)
        runs = [results(query, sources, backend="triton", return_mass=True, **options) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    def test_a_source_without_mass_to_speak_of(form: str) -> None:
        """Its share underflows in fp32; nothing becomes NaN."""
        query, sources, options = make("two", 8, torch.float32)
        low = Source(sources[1].key, sources[1].value, gate=torch.full((2,), -300.0).requires_grad_())
        options |= {"return_mass": True, "return_lse": True}
        got, wanted = (results(query, [sources[0], low], backend=b, **options) for b in ("triton", "torch"))
        assert_same(got, wanted, torch.float32)

    def test_error_is_at_most_twice_that_of_plain_torch(form: str) -> None:
        """In fp16, out and gradients, against fp64: the largest error of each tensor."""
        torch.manual_seed(8)
        exact = [torch.randn(2, n, 2, 32).half().double() for n in (33, 50, 50)]

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 32**-0.5
            return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)

        def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return cross_modal_attention(q, [Source(k, v)], backend="triton")

        def run(fn: Any, dtype: torch.dtype) -> list[Tensor]:
            leaves = [x.to(dtype).requires_grad_() for x in exact]
            out = fn(*leaves)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).half().to(dtype)
            return [x.double() for x in (out, *torch.autograd.grad((out * weight).sum(), leaves))]

        wanted = run(plain, torch.float64)
        for ours, theirs, true in zip(
            run(fused, torch.float16), run(plain, torch.float16), wanted, strict=True
        ):
            assert (ours - true).abs().max() <= 2 * (theirs - true).abs().max()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"num_sources": 9}, "up to 8 sources, and 9"),
            ({"dtype": torch.float64}, "fp64"),
            ({"width": 300}, "D is 300"),
        ],
    )
    def test_what_is_not_covered_is_said(changes: dict[str, Any], reason: str) -> None:
        changes = dict(changes)
        dtype, width = changes.pop("dtype", torch.float32), changes.pop("width", 8)
        key = torch.zeros(2, 4, 1, width, dtype=dtype)
        sources = [Source(key, key)] * changes.pop("num_sources", 1)
        query = torch.zeros(2, 3, 2, width, dtype=dtype)
        with pytest.raises(ValueError, match=reason):
            cross_modal_attention(query, sources, backend="triton")
        with pytest.raises(ValueError, match=reason):
            explain(cross_modal_attention, query, sources, backend="triton")
