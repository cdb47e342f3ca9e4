"""cross_modal_attention on the CPU: its flash and tiled forms against its dense form and against loops written here."""

import math
import subprocess
import sys
from typing import Any

import mmscale_kernels.attention as attention
import mmscale_kernels.cpu_attention as cpu
import mmscale_kernels.tiled_attention as tiled
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmscale_kernels.attention import Source, _attention, cross_modal_attention
from mmscale_kernels.dispatch import explain
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# fp64 sums of at most a few hundred terms of size 1 to 10: 1e-12 is 100 times their rounding.
EXACT = 1e-12


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def source(batch: int, size: int, heads: int, width: int, **known: Any) -> Source:
    return Source(leaf(batch, size, heads, width), leaf(batch, size, heads, width), **known)


def leaves_of(query: Tensor, sources: list[Source]) -> list[Tensor]:
    tensors = [query]
    for one in sources:
        tensors += [x for x in (one.key, one.value, one.gate, one.bias) if x is not None and x.requires_grad]
    return tensors


def results(query: Tensor, sources: list[Source], **options: Any) -> list[Tensor]:
    """Return the outputs, -inf replaced by a mark, and the gradients of a fixed random projection of them."""
    outputs = cross_modal_attention(query, sources, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    finite = [x.masked_fill(x == -math.inf, 0.0) for x in outputs]
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in finite]
    loss = sum((x * w).sum() for x, w in zip(finite, weights, strict=True))
    leaves = leaves_of(query, sources)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    marked = [x.detach().masked_fill(x == -math.inf, -12345.0) for x in outputs]
    return [
        *marked,
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)),
    ]


def assert_same(got: list[Tensor], wanted: list[Tensor], tolerance: float = EXACT) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def oracle(
    query: Tensor, sources: list[Source], query_lengths: Tensor | None, scale: float, per_source: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend row by row over the list of visible keys; return out, lse (a source), mass."""
    batch, num_queries, heads, width = query.shape
    out, lses, masses = [], [], []
    for b in range(batch):
        for i in range(num_queries):
            for h in range(heads):
                logits: list[list[Tensor]] = []
                values: list[list[Tensor]] = []
                for one in sources:
                    size, group = one.key.shape[1], heads // one.key.shape[2]
                    begin = 0 if one.starts is None else int(one.starts[b])
                    end = size if one.lengths is None else begin + int(one.lengths[b])
                    end = min(end, i + size - num_queries + 1) if one.causal else end
                    end = 0 if query_lengths is not None and i >= int(query_lengths[b]) else end
                    logits.append([])
                    values.append([])
                    for j in range(begin, end):
                        logit = (query[b, i, h] * one.key[b, j, h // group]).sum() * scale
                        if one.gate is not None:
                            logit = logit + (one.gate[h] if one.gate.dim() == 1 else one.gate[b, h])
                        if one.bias is not None:
                            logit = logit + one.bias.expand(batch, heads, num_queries, size)[b, h, i, j]
                        if logit > -math.inf:
                            logits[-1].append(logit)
                            values[-1].append(one.value[b, j, h // group])
                nothing = query.new_tensor(-math.inf)
                lse = torch.stack([torch.stack(x).logsumexp(0) if x else nothing for x in logits])
                total = lse.logsumexp(0)
                row = query.new_zeros(width)
                for s in range(len(sources)):
                    base = lse[s] if per_source else total
                    for logit, value in zip(logits[s], values[s], strict=True):
                        row = row + (logit - base).exp() * value
                out.append(row)
                lses.append(lse)
                masses.append((lse - total).exp() if total > -math.inf else torch.zeros_like(lse))
    shape = (batch, num_queries, heads)
    joined = [torch.stack(x).view(*shape, -1) for x in (out, lses, masses)]
    return joined[0], joined[1].transpose(1, 2), joined[2].transpose(1, 2)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("softmax", ["joint", "per_source"])
def test_against_loops(backend: str, softmax: str) -> None:
    torch.manual_seed(0)
    bias = torch.randn(2, 1, 3, 4, dtype=torch.float64)
    bias[0, 0, 1, 2] = -math.inf
    query = leaf(2, 3, 4, 5)
    sources = [
        source(2, 4, 2, 5, lengths=torch.tensor([4, 0]), gate=leaf(4)),
        source(2, 5, 1, 5, lengths=torch.tensor([2, 3]), starts=torch.tensor([3, 1]), causal=True),
        source(2, 4, 4, 5, gate=leaf(2, 4), bias=bias.requires_grad_(), starts=torch.tensor([1, 4])),
    ]
    lengths = torch.tensor([3, 2], dtype=torch.int32)
    out, lse, mass = oracle(query, sources, lengths, 0.7, softmax == "per_source")
    options = {"query_lengths": lengths, "scale": 0.7, "softmax": softmax, "backend": backend}
    got = cross_modal_attention(query, sources, return_lse=True, return_mass=softmax == "joint", **options)
    assert_same([got[0]], [out])
    assert_same([got[1]], [lse.logsumexp(-1) if softmax == "joint" else lse])
    if softmax == "joint":
        assert_same([got[2]], [mass])
    weight = torch.randn_like(out)
    leaves = leaves_of(query, sources)
    assert_same(
        list(torch.autograd.grad((got[0] * weight).sum(), leaves)),
        list(torch.autograd.grad((out * weight).sum(), leaves)),
    )


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, list[Source], dict[str, Any]]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    whole = st.integers
    batch, heads, width = (
        draw(whole(1, 3)),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([1, 4, 5])),
    )
    num_queries = draw(st.sampled_from([1, 2, 7, 37]))
    some = st.booleans()
    sources = []
    for _ in range(draw(whole(1, 3))):
        size = draw(whole(1, 12))
        known: dict[str, Any] = {"causal": draw(some)}
        begin = [0] * batch
        if draw(some):
            begin = [draw(whole(0, size)) for _ in range(batch)]
            known["starts"] = torch.tensor(begin, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
        if draw(some):
            known["lengths"] = torch.tensor([draw(whole(0, size - n)) for n in begin])
        if draw(some):
            known["gate"] = leaf(*((heads,) if draw(some) else (batch, heads)))
        if draw(some):
            shape = [n if draw(some) else 1 for n in (batch, heads, num_queries, size)][draw(whole(0, 2)) :]
            bias = torch.randn(shape, dtype=torch.float64)
            known["bias"] = bias.masked_fill(torch.rand(shape) < 0.1, -math.inf).requires_grad_(draw(some))
        sources.append(source(batch, size, draw(st.sampled_from([1, heads])), width, **known))
    options: dict[str, Any] = {
        "softmax": draw(st.sampled_from(["joint", "per_source"])),
        "return_lse": draw(some),
    }
    options["return_mass"] = options["softmax"] == "joint" and draw(some)
    if draw(some):
        options["query_lengths"] = torch.tensor([draw(whole(0, num_queries)) for _ in range(batch)])
    if draw(st.sampled_from([False, False, True])):
        seeds = torch.randint(0, 2**60, (batch,))
        options |= {"dropout_p": 0.4, "seed": draw(st.sampled_from([5, seeds]))}
    return leaf(batch, num_queries, heads, width), sources, options


# What decides between the forms, set so that small calls reach each: how many samples and sources share a call.
FORMS: dict[str, dict[str, int]] = {
    "as it comes": {},
    "tiny tiles": {"_KEY_BLOCK": 4, "_TILE_PER_THREAD": 64},  # several of queries, of keys and of samples
    "a call a source": {"_FEW_LOGITS": -1},
    "a call a sample": {"_FEW_LOGITS": -1, "_WORTH_A_CALL": 0},
}


@pytest.mark.parametrize("form", FORMS)
@given(call=calls())
@settings(max_examples=40, deadline=None)
def test_every_form_equals_dense(form: str, call: tuple[Tensor, list[Source], dict[str, Any]]) -> None:
    query, sources, options = call
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FORMS[form].items():
            patch.setattr(tiled if hasattr(tiled, name) else cpu, name, value)
        got = results(query, sources, backend="torch", **options)
    assert_same(got, results(query, sources, backend="reference", **options))
    assert all(torch.isfinite(x).all() for x in got)


@pytest.mark.parametrize("worth_a_call", [0, 1 << 62])
@pytest.mark.parametrize("num_queries", [1, 40, 530])
def test_more_keys_than_a_block_of_the_kernel(
    worth_a_call: int, num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel walks blocks of 512 keys; here whole blocks are padding, or lie behind the diagonal."""
    monkeypatch.setattr(cpu, "_WORTH_A_CALL", worth_a_call)
    monkeypatch.setattr(cpu, "_FEW_LOGITS", -1)
    torch.manual_seed(20)
    sources = [
        source(3, 700, 1, 4, lengths=torch.tensor([700, 0, 520]), causal=True),
        source(3, 600, 2, 4, starts=torch.tensor([0, 550, 590]), gate=leaf(3, 2)),
    ]
    options = {"return_lse": True, "return_mass": True}
    query = leaf(3, num_queries, 2, 4)
    got = results(query, sources, backend="torch", **options)
    # sums of up to 1,300 terms
    assert_same(got, results(query, sources, backend="reference", **options), 20 * EXACT)


@pytest.mark.parametrize("gate", [0.0, -80.0, -2000.0])
def test_gradient_of_the_log_sum_exps(gate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source with next to no share still has a gradient through its own log-sum-exp; the tiled engine tells which."""
    torch.manual_seed(21)
    query, gates = leaf(2, 5, 4, 4), torch.full((4,), gate, dtype=torch.float64).requires_grad_()
    one, two = source(2, 6, 2, 4, lengths=torch.tensor([6, 2])), source(2, 7, 4, 4)
    both = []
    for flash in (True, False):
        if not flash:
            monkeypatch.setattr(attention, "_use_flash", lambda *_: False)
        out, lse = _attention(
            query, [one.key, two.key], [one.value, two.value], [one.lengths], [], [gates], [],
            [0, -1, 0, -1, -1, -1, -1, -1], [False, False], torch.tensor([5, 3]), 0.5, 0.0, None, 0, "torch",
        )  # fmt: skip
        finite = lse.masked_fill(lse == -math.inf, 0.0)
        weight = torch.randn(lse.shape, generator=torch.Generator().manual_seed(1), dtype=lse.dtype)
        loss = out.square().sum() + (finite * weight).sum()
        leaves = [query, one.key, one.value, two.key, two.value, gates]
        both.append([out.detach(), finite.detach(), *torch.autograd.grad(loss, leaves)])
    assert_same(both[0], both[1])
    assert (both[0][3].abs() > 1e-3).any()  # the keys of the faint source


@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain(dtype: torch.dtype, mass: bool) -> None:
    """Against fp64, the error of out and of each gradient is at most twice that of matmul, softmax, matmul in dtype.

    `mass`: one call for each source, as when log-sum-exps are asked for, instead of one for all.
    """
    torch.manual_seed(22)
    gates = [torch.randn(4), torch.randn(4)]
    tensors = [torch.randn(3, n, 4, 16) for n in (60, 30, 30, 50, 50)]
    lengths = torch.tensor([50, 20, 1])
    weight = torch.randn(3, 60, 4, 16)

    def run(kind: torch.dtype, plain: bool) -> list[Tensor]:
        query, *known = (x.to(dtype).to(kind).requires_grad_() for x in tensors)
        g = [x.to(dtype).to(kind).requires_grad_() for x in gates]
        if plain:
            key, value = torch.cat([known[0], known[2]], 1), torch.cat([known[1], known[3]], 1)
            mask = torch.cat([x[:, None, None].expand(4, 1, n) for x, n in zip(g, (30, 50), strict=True)], -1)
            hidden = torch.arange(80) >= 30 + lengths[:, None]
            mask = mask.masked_fill(hidden[:, None, None], -math.inf)
            logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * 0.25 + mask
            out = (logits.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)
        else:
            sources = [
                Source(known[0], known[1], gate=g[0]),
                Source(known[2], known[3], gate=g[1], lengths=lengths),
            ]
            out = cross_modal_attention(query, sources, return_mass=mass)
            out = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad((out * weight.to(kind)).sum(), [query, *known, *g])
        return [x.detach().double() for x in (out, *grads)]

    exact = run(torch.float64, True)
    ours, plain = run(dtype, False), run(dtype, True)
    for a, b, wanted in zip(ours, plain, exact, strict=True):
        assert (a - wanted).norm() <= 2 * (b - wanted).norm()


def test_the_operator_and_the_way_around_it_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(23)
    query = leaf(2, 6, 4, 8)
    sources = [
        source(2, 5, 2, 8, lengths=torch.tensor([5, 0]), gate=leaf(4)),
        source(2, 6, 2, 8, causal=True),
    ]
    direct = results(query, sources, return_mass=True)
    monkeypatch.setattr(cpu, "is_direct", lambda _: False)
    through = results(query, sources, return_mass=True)
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))


def test_what_looks_at_operators_sees_one() -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with Watch():
        cross_modal_attention(leaf(2, 3, 2, 4), [source(2, 4, 2, 4), source(2, 5, 2, 4)])
    assert "mmscale_kernels.cross_modal_attention.default" in seen


@pytest.mark.parametrize("form", ["tiled", "flash", "flash without log-sum-exps"])
def test_gradcheck(form: str) -> None:
    torch.manual_seed(1)
    query, gate, bias = leaf(2, 2, 2, 2), leaf(2), leaf(2, 1, 1, 2)
    first, second = source(2, 3, 1, 2), source(2, 2, 1 if form.endswith("exps") else 2, 2)

    def run(query: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor, bias: Tensor) -> Any:
        one = Source(k1, v1, gate=gate, lengths=torch.tensor([3, 1]))
        if form == "flash without log-sum-exps":
            return cross_modal_attention(query, [one, Source(k2, v2, gate=bias.sum((0, 1, 2)))])
        two = Source(k2, v2, bias=bias if form == "tiled" else bias.detach(), causal=True)
        known: dict[str, Any] = {"dropout_p": 0.3, "seed": 4} if form == "tiled" else {}
        return cross_modal_attention(query, [one, two], return_lse=True, return_mass=True, **known)

    inputs = (query, first.key, first.value, second.key, second.value, gate, bias)
    if form == "flash":
        inputs = (*inputs[:-1], bias.detach())
    assert torch.autograd.gradcheck(run, inputs)


def test_queries_that_see_nothing() -> None:
    torch.manual_seed(2)
    query = leaf(2, 3, 2, 4)
    # causal with fewer keys than queries: the first query sees none
    sources = [source(2, 2, 2, 4, causal=True), source(2, 3, 2, 4, lengths=torch.tensor([0, 3]))]
    out, lse, mass = cross_modal_attention(query, sources, return_lse=True, return_mass=True)
    assert (out[0, 0] == 0).all()
    assert (lse[0, :, 0] == -math.inf).all()
    assert (mass[0, :, 0] == 0).all()
    assert torch.isfinite(lse[0, :, 1:]).all()
    loss = out.sum() + mass[..., 0].sum() + lse[torch.isfinite(lse)].sum()
    grads = torch.autograd.grad(loss, leaves_of(query, sources))
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert (grads[0][0, 0] == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_what_padding_holds_does_not_matter(backend: str) -> None:
    torch.manual_seed(3)
    query = leaf(2, 4, 2, 4)
    lengths, starts, rows = torch.tensor([2, 3]), torch.tensor([1, 0]), torch.tensor([4, 2])
    clean = source(2, 5, 1, 4, lengths=lengths, starts=starts)
    place = torch.arange(5)
    padding = (place < starts[:, None]) | (place >= (starts + lengths)[:, None])
    poisoned = Source(
        *(
            x.detach().masked_fill(padding[:, :, None, None], math.nan).requires_grad_()
            for x in (clean.key, clean.value)
        ),
        lengths=lengths,
        starts=starts,
    )
    past = (torch.arange(4) >= rows[:, None])[:, :, None, None]
    poisoned_query = query.detach().masked_fill(past, math.nan).requires_grad_()
    options = {"query_lengths": rows, "return_lse": True, "backend": backend}
    got, wanted = results(poisoned_query, [poisoned], **options), results(query, [clean], **options)
    assert_same(got, wanted)
    assert (got[0].masked_select(past) == 0).all()
    assert (got[2].masked_select(past) == 0).all()
    assert (got[3].masked_select(padding[:, :, None, None]) == 0).all()


def test_strided_views_of_one_buffer() -> None:
    torch.manual_seed(4)
    buffer = leaf(2, 9, 6, 4)
    query, key, value = buffer[:, 5:, :2], buffer[:, :5, 2:4], buffer[:, :5, 4:]
    got = cross_modal_attention(query, [Source(key, value)])
    wanted = cross_modal_attention(
        query.contiguous(), [Source(key.contiguous(), value.contiguous())], backend="reference"
    )
    weight = torch.randn_like(got)
    assert_same(
        [got, *torch.autograd.grad((got * weight).sum(), buffer)],
        [wanted, *torch.autograd.grad((wanted * weight).sum(), buffer)],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    query = leaf(2, 6, 4, 8)
    sources = [source(2, 7, 2, 8, lengths=torch.tensor([7, 3])), source(2, 3, 4, 8, gate=leaf(4))]

    def cast(x: Tensor) -> Tensor:
        return x.detach().to(dtype).requires_grad_()

    low = [Source(cast(s.key), cast(s.value), s.lengths, gate=s.gate) for s in sources]
    rounded = [
        Source(
            x.key.detach().double().requires_grad_(),
            x.value.detach().double().requires_grad_(),
            x.lengths,
            gate=x.gate,
        )
        for x in low
    ]
    got = results(cast(query), low, return_lse=True)
    wanted = results(
        cast(query).detach().double().requires_grad_(), rounded, return_lse=True, backend="reference"
    )
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    # Inputs are the same; what is left is the rounding of outputs of size up to 8, and fp32 arithmetic.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert_same([x.double() for x in got], [x.double() for x in wanted], tolerance)


def test_dropout_is_a_function_of_the_seed() -> None:
    torch.manual_seed(6)
    query, keys = leaf(4, 64, 2, 4), source(4, 128, 2, 4)
    seeds = torch.tensor([11, 12, 13, 2**40 + 11])

    def run(rows: list[int]) -> Tensor:
        one = Source(keys.key[rows], keys.value[rows])
        return cross_modal_attention(query[rows], [one], dropout_p=0.25, seed=seeds[rows])

    whole = run([0, 1, 2, 3])
    # the same sums, but the batched products of another batch size may group them differently
    torch.testing.assert_close(run([2, 0]), whole[[2, 0]], rtol=EXACT, atol=EXACT)
    assert torch.equal(whole, run([0, 1, 2, 3]))
    keep = tiled.Dropout(0.25, seeds).keep(slice(None), 0, range(64), range(128), 2)
    kept = keep > 0
    # 65,536 draws of probability 0.75: the standard deviation of the mean is 0.0017
    assert abs(kept.float().mean().item() - 0.75) < 0.007
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(1, 2), kept.roll(1, 3)):
        # two independent masks agree with probability 0.625, +- 0.0019
        assert abs((kept == other).float().mean().item() - 0.625) < 0.008
    first = tiled.Dropout(0.25, seeds).keep(slice(None), 1, range(64), range(128), 2) > 0
    assert abs((kept == first).float().mean().item() - 0.625) < 0.008
    # one number: every sample has its own mask
    by_number = cross_modal_attention(
        query[[0, 0]], [Source(keys.key[[0, 0]], keys.value[[0, 0]])], dropout_p=0.25, seed=3
    )
    assert not torch.equal(by_number[0], by_number[1])


def test_sources_of_a_sum_drop_independently() -> None:
    torch.manual_seed(7)
    query, one = leaf(1, 8, 1, 4), source(1, 32, 1, 4)
    options = {"softmax": "per_source", "dropout_p": 0.5, "seed": 1}
    alone = cross_modal_attention(query, [one], **options)
    twice = cross_modal_attention(query, [one, one], **options)
    assert not torch.allclose(twice, 2 * alone)


def test_opcheck() -> None:
    torch.manual_seed(8)
    one, two = source(2, 4, 1, 4), source(2, 5, 2, 4)
    index = [0, -1, 0, -1, -1, -1, -1, 0]
    terms = (
        [torch.tensor([2, 3])],
        [],
        [leaf(2)],
        [leaf(2, 1, 5)],
        index,
        [False, True],
        torch.tensor([3, 1]),
    )
    arguments = (
        *(leaf(2, 3, 2, 4), [one.key, two.key], [one.value, two.value]),
        *(*terms, 0.5, 0.0, None, 0, ""),
    )
    torch.library.opcheck(_attention, arguments)


def test_compiled_is_the_same() -> None:
    torch.manual_seed(9)
    one, two = source(2, 4, 1, 4), source(2, 5, 2, 4)
    inputs = [leaf(2, 3, 2, 4), one.key, one.value, two.key, two.value, leaf(2), leaf(2, 1, 1, 5)]

    def run(q: Tensor, k1: Tensor, v1: Tensor, k2: Tensor, v2: Tensor, gate: Tensor, bias: Tensor) -> Any:
        sources = [Source(k1, v1, lengths=torch.tensor([2, 3]), gate=gate), Source(k2, v2, bias=bias)]
        return cross_modal_attention(q, sources, return_lse=True, return_mass=True, dropout_p=0.2, seed=5)

    wanted, got = run(*inputs), torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    assert_same(list(got), list(wanted))
    grads = [torch.autograd.grad(sum(x.square().sum() for x in y), inputs) for y in (got, wanted)]
    assert_same(list(grads[0]), list(grads[1]))


def test_a_bias_without_gradient_gets_none() -> None:
    query, one = leaf(1, 3, 2, 4), source(1, 5, 2, 4, bias=torch.randn(3, 5))
    cross_modal_attention(query, [one]).sum().backward()
    assert query.grad is not None
    assert one.bias is not None
    assert one.bias.grad is None


PEAK = """
import resource, torch
from mmscale_kernels.attention import Source, cross_modal_attention
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 3000, 2, 8, requires_grad=True) for _ in range(3))
def run(n):
    cross_modal_attention(q[:, :n], [Source(k[:, :n], v[:, :n])], backend="torch").sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = run(64)
print(run(3000) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_does_not_grow_with_the_matrix() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    # The matrix of logits would be 2 * 3000 * 3000 * 4 B = 72 MB, of which autograd would hold several.
    assert int(done.stdout) < 36_000


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    def one(**changes: Any) -> list[Source]:
        base: dict[str, Any] = {"key": torch.zeros(2, 5, 2, 4), "value": torch.zeros(2, 5, 2, 4)}
        return [Source(**(base | changes))]

    return {
        "no sources": ({"sources": []}, "sources is empty"),
        "not sources": ({"sources": [torch.zeros(1)]}, "list of Source"),
        "query rank": ({"query": torch.zeros(2, 3, 4)}, r"query has shape \(2, 3, 4\)"),
        "query dtype": ({"query": torch.zeros(2, 3, 4, 4, dtype=torch.int32)}, "query has dtype"),
        "query stride": ({"query": torch.zeros(2, 3, 4, 8)[..., ::2]}, "stride 1 in D"),
        "key width": ({"sources": one(key=torch.zeros(2, 5, 2, 3))}, r"sources\[0\].key has shape"),
        "value shape": ({"sources": one(value=torch.zeros(2, 4, 2, 4))}, r"sources\[0\].value has shape"),
        "heads": ({"sources": one(key=torch.zeros(2, 5, 3, 4), value=torch.zeros(2, 5, 3, 4))}, "3 heads"),
        "dtype": (
            {"sources": one(value=torch.zeros(2, 5, 2, 4).double())},
            r"sources\[0\].value is torch.float64",
        ),
        "lengths": ({"sources": one(lengths=torch.tensor([6, 0]))}, r"lengths lies in 0 .. 6; .* 0 .. 5"),
        "negative": ({"sources": one(lengths=torch.tensor([-1, 0]))}, "lengths lies in -1"),
        "float lengths": ({"sources": one(lengths=torch.zeros(2))}, "int32 or int64"),
        "range": ({"sources": one(lengths=torch.tensor([3, 3]), starts=torch.tensor([3, 0]))}, "reaches 6"),
        "gate": ({"sources": one(gate=torch.zeros(3))}, r"gate has shape \(3,\)"),
        "bias": ({"sources": one(bias=torch.zeros(4, 5))}, r"bias has shape \(4, 5\)"),
        "query_lengths": ({"query_lengths": torch.tensor([4, 1])}, "query_lengths lies in 1 .. 4"),
        "softmax": ({"softmax": "both"}, "softmax is 'both'"),
        "mass": ({"softmax": "per_source", "return_mass": True}, "return_mass"),
        "dropout": ({"dropout_p": 1.0}, "dropout_p is 1.0"),
        "no seed": ({"dropout_p": 0.5}, "seed is None"),
        "seed": ({"dropout_p": 0.5, "seed": torch.zeros(3).long()}, "seed has shape"),
        "no rank": ({"query": torch.zeros(())}, r"query has shape \(\)"),
        "no rank, dropout": (
            {"query": torch.zeros(()), "dropout_p": 0.5, "seed": 1},
            r"query has shape \(\)",
        ),
        "no width": ({"query": torch.zeros(2, 3, 4, 0)}, r"query has shape \(2, 3, 4, 0\)"),
        "no tensor": ({"query": [1.0]}, "query is a list"),
        "sources": ({"sources": 5}, "sources is int"),
        "key": ({"sources": one(key=None)}, r"sources\[0\].key is a NoneType"),
        "list of lengths": ({"sources": one(lengths=[1, 2])}, r"sources\[0\].lengths is a list"),
        "number as gate": ({"sources": one(gate=0.5)}, r"sources\[0\].gate is a float"),
        "list of query_lengths": ({"query_lengths": [1, 2]}, "query_lengths is a list"),
        "seed of no kind": ({"dropout_p": 0.5, "seed": 1.5}, "seed is 1.5"),
        "scale": ({"scale": torch.tensor(0.5)}, "scale is a tensor"),
        "backend": ({"backend": "cuda"}, "backend is 'cuda'"),
        "no kernel": ({"backend": "triton", "dropout_p": 0.1, "seed": 0}, "triton"),
    }


@pytest.mark.parametrize("options", [{}, {"return_mass": True}, {"dropout_p": 0.3, "seed": 1}], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_changes_nothing(backend: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query, gate, bias = (leaf(*shape, dtype=torch.float32) for shape in ((2, 7, 2, 8), (2,), (7, 40)))
    key, value = (leaf(2, 40, 2, 8, dtype=torch.float32) for _ in range(2))
    for sources in ([Source(key, value, gate=gate), Source(value, key)], [Source(key, value, bias=bias)]):
        runs = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = cross_modal_attention(query, sources, backend=backend, **options)
                runs.append(list(out) if isinstance(out, tuple) else [out])
            loss = sum((x.square().sum() for x in runs[-1]), start=torch.zeros(()))
            runs[-1] += torch.autograd.grad(loss, leaves_of(query, sources))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("biased", [False, True])
def test_the_backward_pass_under_autocast(biased: bool) -> None:
    torch.manual_seed(0)
    query, key, bias = (leaf(*shape, dtype=torch.float32) for shape in ((2, 7, 2, 8), (2, 9, 2, 8), (7, 9)))
    one = Source(key, key, gate=None if biased else torch.zeros(2), bias=bias if biased else None)
    runs = []
    for enabled in (False, True):
        out = cross_modal_attention(query, [one])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            runs.append(torch.autograd.grad(out, leaves_of(query, [one])[:2], torch.ones(out.shape)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("softmax", ["joint", "per_source"])
def test_a_gate_of_minus_infinity_closes_the_only_source(softmax: str) -> None:
    torch.manual_seed(0)
    gate = torch.tensor([-math.inf, 0.0], dtype=torch.float64).requires_grad_()
    query, one = leaf(2, 7, 2, 8), source(2, 9, 2, 8, gate=gate)
    options: dict[str, Any] = {"softmax": softmax, "return_lse": True}
    for sources in ([one], [one, source(2, 5, 2, 8)]):
        got, wanted = (results(query, sources, backend=b, **options) for b in ("torch", "reference"))
        assert_same(got, wanted)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_a_second_derivative_is_right_or_refused(
    few: bool, lse: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient penalty must never lose its gradient without a word."""
    torch.manual_seed(0)
    if not few:
        monkeypatch.setattr(cpu, "has_few", lambda *_: False)
    query = leaf(2, 5, 2, 8)
    one = source(2, 6, 2, 8, gate=leaf(2) if few else None, bias=leaf(5, 6) if biased else None)

    def penalty(backend: str) -> Tensor:
        out = cross_modal_attention(query, [one], return_lse=lse, backend=backend)
        out = out[0] if isinstance(out, tuple) else out
        (slope,) = torch.autograd.grad(out.sum(), query, create_graph=True)
        return slope.square().sum() + query.sum()

    wanted = torch.autograd.grad(penalty("reference"), query)
    refused = None
    try:
        got = torch.autograd.grad(penalty("torch"), query)
    except RuntimeError as error:
        refused = str(error)
    if refused is None:
        assert_same(list(got), list(wanted))
    else:
        assert "no second derivative" in refused


@pytest.mark.parametrize("name", bad_calls())
def test_bad_input_is_named(name: str) -> None:
    changes, message = bad_calls()[name]
    known = [Source(torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2, 4))]
    call: dict[str, Any] = {"query": torch.zeros(2, 3, 4, 4), "sources": known} | changes
    for run in (cross_modal_attention, lambda *a, **k: explain(cross_modal_attention, *a, **k)):
        with pytest.raises(ValueError, match=message):
            run(
                call["query"],
                call["sources"],
                **{k: v for k, v in call.items() if k not in ("query", "sources")},
            )


def test_explain_says_why() -> None:
    known = Source(torch.zeros(2, 5, 2, 4), torch.zeros(2, 5, 2, 4))
    decision = explain(cross_modal_attention, torch.zeros(2, 3, 4, 4), [known, known])
    assert decision.backend == "torch"
    assert "triton" in dict(decision.passed_over)


def test_nothing_to_do() -> None:
    for batch, num_queries, size in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        query, one = leaf(batch, num_queries, 2, 4), source(batch, size, 2, 4)
        out, lse = cross_modal_attention(query, [one], return_lse=True)
        out.sum().backward()
        assert out.shape == query.shape
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        assert query.grad is not None
        assert (query.grad == 0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("size", [6, 100, 140], ids=["few", "joined", "long"])
def test_causal_over_as_many_keys_as_queries_with_padding(size: int, heads: int, gated: bool) -> None:
    """A decoder's own shape: padding on the left, on the right, on both sides, and nothing but padding."""
    torch.manual_seed(12)
    starts, lengths = torch.tensor([2, 0, 3, 0]), torch.tensor([size - 2, size - 3, 2, 0])
    query = leaf(4, size, 2, 4)
    for known in ({"starts": starts}, {"lengths": lengths}, {"starts": starts, "lengths": lengths}):
        sources = [source(4, size, heads, 4, causal=True, gate=leaf(2) if gated else None, **known)]
        for options in ({}, {"return_lse": True}, {"query_lengths": torch.tensor([size, 1, size - 1, 0])}):
            got = results(query, sources, backend="torch", **options)
            assert_same(got, results(query, sources, backend="reference", **options))
