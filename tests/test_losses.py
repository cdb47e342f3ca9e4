"""The contrastive losses on one process, against the dense formulas in fp64."""

import math
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmscale_kernels import contrastive_loss, explain, losses, sigmoid_loss, torch_losses
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

Loss = Callable[..., torch.Tensor]


def dense(op: Loss, x: torch.Tensor, y: torch.Tensor, *scalars: torch.Tensor, **options: Any) -> torch.Tensor:
    """Both losses as they are defined, in the dtype of the inputs."""
    labels, weights = options.get("labels"), options.get("weights")
    smoothing = options.get("label_smoothing", 0.0)
    match = torch.eye(len(x), len(y), dtype=x.dtype)
    if labels is not None:
        match = (labels[:, None] == labels).to(x.dtype)
    weights = torch.ones(len(x)).to(x.dtype) if weights is None else weights.to(x.dtype)
    weights = weights / weights.sum()
    logits = scalars[0] * x @ y.T
    if op is sigmoid_loss:
        return -weights @ torch.nn.functional.logsigmoid((2 * match - 1) * (logits + scalars[1])).sum(1)

    def cross_entropy(logits: torch.Tensor, match: torch.Tensor) -> torch.Tensor:
        target = (1 - smoothing) * match / match.sum(1, keepdim=True) + smoothing / match.shape[1]
        return -weights @ (target * logits.log_softmax(1)).sum(1)

    return (cross_entropy(logits, match) + cross_entropy(logits.T[: len(x)], match.T[: len(x)])) / 2


def make_inputs(
    op: Loss, num_rows: int, num_columns: int, num_features: int, *, scale: float = 5.0, seed: int = 0
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_features, dtype=torch.float64, generator=generator)
    y = torch.randn(num_columns, num_features, dtype=torch.float64, generator=generator)
    scalars = [torch.tensor(scale).double(), torch.tensor(-2.0).double()]
    return [x, y, *scalars[: 2 if op is sigmoid_loss else 1]]


def value_and_gradients(fn: Loss, inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    loss = fn(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_equal_to_dense(
    op: Loss, inputs: list[torch.Tensor], dtype: torch.dtype, tolerance: float, **options: Any
) -> None:
    """Value and gradients in `dtype` against dense fp64 of the same rounded inputs, relative to the largest
    entry."""
    how = {name: options.pop(name) for name in ("backend", "group") if name in options}
    rounded = [tensor.to(dtype) for tensor in inputs]
    found = value_and_gradients(op, rounded, **options, **how)
    expected = value_and_gradients(
        lambda *a, **k: dense(op, *a, **k), [t.double() for t in rounded], **options
    )
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, a, b, like in zip(
        ("loss", "x", "y", "scale", "bias"), found, expected, [found[0], *rounded], strict=False
    ):
        assert a.dtype == like.dtype
        assert a.shape == like.shape
        # The 1e-30 stands for gradients that are exactly 0, as those of a batch of one pair.
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=0,
            atol=tolerance * b.abs().max().item() + 1e-30,
            msg=lambda m, n=name: f"{n}: {m}",
        )


LOSSES = pytest.mark.parametrize("op", [contrastive_loss, sigmoid_loss])


def assert_no_worse_than_plain(op: Loss, dtype: torch.dtype, num_rows: int, backend: str) -> None:
    """In a half type, loss and gradients have at most twice the error of the plain expression in that type.

    Errors are against fp64 of the same rounded inputs, in the norm over all entries.
    """
    inputs = make_inputs(op, num_rows, num_rows, 24, scale=6.0)
    inputs[:2] = [torch.nn.functional.normalize(tensor, dim=1) for tensor in inputs[:2]]
    rounded = [tensor.to(dtype) for tensor in inputs]
    expected = value_and_gradients(lambda *a: dense(op, *a), [t.double() for t in rounded])
    plain = value_and_gradients(lambda *a: dense(op, *a), rounded)
    found = value_and_gradients(op, rounded, backend=backend)
    for name, a, b, c in zip(("loss", "x", "y", "scale", "bias"), found, plain, expected, strict=False):
        error, allowed = (a.double() - c).norm(), 2 * (b.double() - c).norm()
        # The plain error of a single number can be 0 by luck: half a unit in its last place is allowed in any case.
        allowed += torch.finfo(dtype).eps / 2 * c.norm()
        assert error <= allowed, f"{name}: {error:.3g} against {allowed:.3g}"


@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_no_worse_than_twice_the_plain_expression(op: Loss, dtype: torch.dtype) -> None:
    assert_no_worse_than_plain(op, dtype, 200, "torch")


@LOSSES
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("num_rows", "num_columns", "num_features"), [(2, 2, 1), (7, 7, 5), (5, 11, 3), (64, 64, 32)]
)
def test_parity(op: Loss, backend: str, num_rows: int, num_columns: int, num_features: int) -> None:
    inputs = make_inputs(op, num_rows, num_columns, num_features)
    # fp64: sums of some thousand products keep 12 digits of 16. fp32: logits of up to 50 (scale 5) carry an
    # error of 50 * 2^-24 * sqrt(features), 2e-5 relative in their exponentials. Halves: the results are
    # rounded once more.
    for dtype, tolerance in (
        (torch.float64, 1e-12),
        (torch.float32, 2e-5),
        (torch.float16, 2e-3),
        (torch.bfloat16, 1e-2),
    ):
        assert_equal_to_dense(op, inputs, dtype, tolerance, backend=backend)


@LOSSES
def test_one_pair(op: Loss) -> None:
    found = value_and_gradients(op, make_inputs(op, 1, 1, 3))
    if op is contrastive_loss:
        assert all(not tensor.any() for tensor in found), "one pair has nothing to be told apart from"
    assert_equal_to_dense(op, make_inputs(op, 1, 1, 3), torch.float64, 1e-12)


@LOSSES
@pytest.mark.parametrize("tile", [(4, 3), (8, 64)])
def test_tiles(op: Loss, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles, with ragged ends, and a diagonal and labels that cross them."""
    monkeypatch.setattr(torch_losses, "_CPU_TILE", tile)
    generator = torch.Generator().manual_seed(1)
    for num_columns, options in (
        (41, {}),
        (53, {"label_smoothing": 0.1} if op is contrastive_loss else {}),
        (41, {"labels": torch.randint(0, 9, (41,), generator=generator), "weights": torch.rand(41)}),
    ):
        inputs = make_inputs(op, 41, num_columns, 6)
        # As in test_parity: sums of some thousand terms in fp64.
        assert_equal_to_dense(op, inputs, torch.float64, 1e-12, **options)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {"labels": torch.tensor([3, 1, 3, 1, 2, 3])},
        {"weights": torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0, 3.0])},
        {"weights": torch.tensor([0, 1, 2, 3, 0, 1])},
        {"label_smoothing": 0.1},
        {"labels": torch.tensor([5] * 6), "weights": torch.arange(6.0), "label_smoothing": 0.3},
    ],
    ids=["labels", "weights", "integer weights", "smoothing", "all"],
)
@LOSSES
def test_options(op: Loss, backend: str, options: dict[str, Any]) -> None:
    if op is sigmoid_loss:
        options = {name: value for name, value in options.items() if name != "label_smoothing"}
    assert_equal_to_dense(op, make_inputs(op, 6, 6, 4), torch.float64, 1e-12, backend=backend, **options)


@LOSSES
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_no_weight_at_all(op: Loss, backend: str) -> None:
    found = value_and_gradients(op, make_inputs(op, 4, 4, 3), weights=torch.zeros(4), backend=backend)
    assert all(not tensor.any() for tensor in found)


@LOSSES
@pytest.mark.parametrize("tile", [(1024, 1024), (16, 16)])
def test_scale_of_100_and_rows_of_any_length(
    op: Loss, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of thousands: exp overflows without a true maximum, and underflows with a fixed one."""
    monkeypatch.setattr(torch_losses, "_CPU_TILE", tile)
    inputs = make_inputs(op, 40, 40, 16, scale=100.0)
    inputs[0][:20] *= 4
    assert max(value.abs().max() for value in (100 * inputs[0] @ inputs[1].T,)) > 4000
    assert_equal_to_dense(op, inputs, torch.float64, 1e-12)
    # fp32: logits of 5,000 carry errors of 5000 * 2^-24 = 3e-4 into probabilities where two nearly tie.
    assert_equal_to_dense(op, inputs, torch.float32, 1e-3)


def test_rounding_a_large_log_sum_exp_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are exact in fp32, large, and nearly tied: only their log-sum-exps have to be rounded."""
    monkeypatch.setattr(torch_losses, "_CPU_TILE", (16, 16))
    steps = torch.randint(0, 4, (2, 40), generator=torch.Generator().manual_seed(0)).double() / 4
    x = torch.stack([torch.ones(40), steps[0]], 1)
    y = torch.stack([torch.full((40,), 2048.0), steps[1]], 1)
    scale = torch.tensor(16 * math.log(2)).double()
    # x.y is 2048 plus a few sixteenths: in base 2 logits of 32,768 plus small integers. A log-sum-exp of that
    # size is rounded to 1/256 in fp32, 3e-3 in every probability; nothing else here is rounded to more than
    # 1e-6.
    inputs = [x.double(), y.double(), scale]
    found = value_and_gradients(contrastive_loss, [t.float() for t in inputs])[1]
    expected = value_and_gradients(
        lambda *a: dense(contrastive_loss, *a), [t.float().double() for t in inputs]
    )[1]
    torch.testing.assert_close(
        found[:, 1].double(), expected[:, 1], rtol=1e-4, atol=1e-4 * expected[:, 1].abs().max()
    )


def test_a_solved_batch_has_a_tiny_loss_and_not_a_negative_one() -> None:
    """log-sum-exp minus the positive's logit, 100 - 100: what is left must be the loss and no rounding
    error."""
    x = torch.nn.functional.normalize(torch.randn(48, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    loss = contrastive_loss(x, x, torch.tensor(60.0)).item()
    expected = dense(contrastive_loss, x.double(), x.double(), torch.tensor(60.0).double()).item()
    assert 0 < expected < 1e-8
    # The logits, up to 60, are rounded to 2^-19: so are the exponents of a sum of 48 terms that makes up the
    # loss.
    assert loss == pytest.approx(expected, rel=1e-4, abs=2e-9)


def test_gradients_by_finite_differences() -> None:
    for op in (contrastive_loss, sigmoid_loss):
        leaves = [tensor.requires_grad_() for tensor in make_inputs(op, 4, 5, 3, scale=2.0)]
        assert torch.autograd.gradcheck(op, leaves)


@LOSSES
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_and_options(op: Loss, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 20), "rows")
    seed = data.draw(st.integers(0, 2**20), "seed")
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {}
    if data.draw(st.booleans(), "labels"):
        options["labels"] = torch.randint(-3, 3, (num_rows,), generator=generator)
    if data.draw(st.booleans(), "weights"):
        options["weights"] = torch.rand(num_rows, generator=generator) + 1e-3
    num_columns = num_rows + (0 if options else data.draw(st.integers(0, 9), "further columns"))
    if op is contrastive_loss:
        options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.1, 0.9]), "smoothing")
    scale = data.draw(st.sampled_from([0.0, 0.1, 14.0, 100.0, -3.0]), "scale")
    num_features = data.draw(st.integers(1, 12), "features")
    inputs = make_inputs(op, num_rows, num_columns, num_features, scale=scale, seed=seed)
    found = value_and_gradients(op, inputs, **options)
    expected = value_and_gradients(lambda *a, **k: dense(op, *a, **k), inputs, **options)
    for a, b in zip(found, expected, strict=True):
        # fp64 and logits of up to 5,000: rounding errors of 1e-12 in exponents; gradients may cancel to 0.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_rows_need_no_particular_layout() -> None:
    inputs = make_inputs(contrastive_loss, 6, 6, 4)
    strided = [inputs[0].T.contiguous().T, inputs[1].repeat(1, 2)[:, ::2].roll(0), inputs[2]]
    strided[1] = torch.stack([inputs[1], inputs[1]], 2)[..., 0]
    assert not strided[0].is_contiguous()
    assert not strided[1].is_contiguous()
    for a, b in zip(
        value_and_gradients(contrastive_loss, strided),
        value_and_gradients(contrastive_loss, inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # the same sums, in another order at most


@pytest.mark.parametrize(
    "want", [(True, False, False), (False, True, False), (False, True, True), (False, False, True)]
)
def test_gradients_of_some_inputs_alone(want: tuple[bool, bool, bool]) -> None:
    inputs = make_inputs(contrastive_loss, 5, 7, 3)
    expected = value_and_gradients(contrastive_loss, inputs)[1:]
    leaves = [tensor.clone().requires_grad_(wanted) for tensor, wanted in zip(inputs, want, strict=True)]
    contrastive_loss(*leaves).backward()
    for leaf, wanted, gradient in zip(leaves, want, expected, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None:
            torch.testing.assert_close(
                leaf.grad, gradient, rtol=1e-12, atol=1e-14
            )  # fp64, sums in another order


def test_incoming_gradient_is_multiplied_in_and_the_graph_can_be_kept() -> None:
    inputs = make_inputs(sigmoid_loss, 5, 5, 3)
    expected = value_and_gradients(sigmoid_loss, inputs)[1:]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = sigmoid_loss(*leaves) * 3
    for _ in range(2):
        loss.backward(retain_graph=True)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, 6 * gradient)


def test_without_grad_nothing_is_saved() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(contrastive_loss, 5, 5, 3)]
    with torch.no_grad():
        loss = contrastive_loss(*inputs)
    assert not loss.requires_grad
    assert torch.equal(loss, contrastive_loss(*inputs))


@LOSSES
def test_autocast_does_not_reach_inside(op: Loss) -> None:
    inputs = [tensor.float() for tensor in make_inputs(op, 16, 16, 8)]
    expected = op(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op(*inputs), expected)


@LOSSES
def test_operator_contract(op: Loss) -> None:
    operator = getattr(torch.ops.mmscale, op.__name__)
    smoothing = [0.1] if op is contrastive_loss else []
    for labels, weights in ((None, None), (torch.arange(6) // 2, torch.rand(6))):
        inputs = [tensor.requires_grad_() for tensor in make_inputs(op, 6, 6, 4)]
        torch.library.opcheck(
            operator, (*inputs, labels, weights, *smoothing, "", "auto", "torch", True, True, True)
        )


@LOSSES
def test_compile(op: Loss) -> None:
    inputs = make_inputs(op, 6, 6, 4)
    options = {"labels": torch.arange(6) // 2, "weights": torch.rand(6)}
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for kwargs in ({}, options):
        found = value_and_gradients(compiled, inputs, **kwargs)
        for a, b in zip(found, value_and_gradients(op, inputs, **kwargs), strict=True):
            assert torch.equal(a, b), "the operator is the same one, and so are its results"


def test_memory_stays_far_below_the_matrix_of_logits() -> None:
    """Largest single allocation while N = 3000 pairs go forward and backward; the matrix would take 36 MB."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    inputs = [tensor.float().requires_grad_() for tensor in make_inputs(contrastive_loss, 3000, 3000, 8)]
    arguments = torch_losses.Targets(*[torch.full((3000,), 1 / 6000, dtype=torch.float64) for _ in range(4)])
    with Watch(), torch.no_grad():
        found = torch_losses.statistics(*inputs, arguments, keep=True)
        torch_losses.gradients(*inputs, arguments, found, dx=torch.zeros(3000, 8), dy=torch.zeros(3000, 8))
    assert found.kept is None
    height, width = torch_losses._CPU_TILE
    assert 0 < largest <= 4 * height * width


GOOD = {"x": torch.zeros(4, 3), "y": torch.zeros(4, 3), "scale": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x is list; it needs to be a tensor of shape \\(N, D\\)"),
        ({"x": torch.zeros(4)}, "x has shape \\(4,\\); it needs to be \\(N, D\\)"),
        ({"y": torch.zeros(4, 2)}, "y has 2 features; it needs to have 3, like x"),
        ({"y": torch.zeros(3, 3)}, "y has 3 rows; it needs to have 4 or more"),
        (
            {"x": torch.zeros(4, 3).int()},
            "x is torch.int32; it needs to be float16, bfloat16, float32 or float64",
        ),
        (
            {"y": torch.zeros(4, 3).half()},
            "y is torch.float16 on cpu; it needs to be torch.float32 on cpu, like x",
        ),
        ({"x": torch.zeros(0, 3), "y": torch.zeros(0, 3)}, "x has no rows; it needs at least one"),
        ({"scale": 1.0}, "scale is float; it needs to be a 0-d floating tensor"),
        ({"scale": torch.ones(1)}, "scale has shape \\(1,\\) and is torch.float32; it needs to be a 0-d"),
        (
            {"scale": torch.tensor(1)},
            "scale has shape \\(\\) and is torch.int64; it needs to be a 0-d floating",
        ),
        ({"scale": torch.tensor(1.0, device="meta")}, "scale is on meta; it needs to be on cpu, like x"),
        ({"labels": torch.zeros(4)}, "labels is torch.float32; it needs to be an integer type"),
        (
            {"labels": torch.zeros(3).int()},
            "labels has shape \\(3,\\); it needs to be \\(4,\\), one for each row",
        ),
        (
            {"weights": torch.ones(4), "y": torch.zeros(5, 3)},
            "weights are given and y has 5 rows; with weights it",
        ),
        ({"weights": torch.tensor([1.0, -0.5, 0.0, 1.0])}, "weights has -0.5; they need to be 0 or more"),
        ({"weights": torch.full((4,), torch.nan)}, "weights has nan; they need to be 0 or more"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it needs to be at least 0 and less than 1"),
        ({"exchange": "mail"}, "exchange is 'mail'; it needs to be one of"),
        ({"group": "world"}, "group is 'world'; it needs to be a process group that this process is in"),
        ({"backend": "fast"}, "backend is 'fast'; it needs to be one of"),
    ],
)
@LOSSES
def test_bad_input_says_what_it_got_and_what_it_needs(op: Loss, change: dict[str, Any], message: str) -> None:
    if op is sigmoid_loss and "label_smoothing" in change:
        return
    bias = {"bias": torch.tensor(0.0)} if op is sigmoid_loss else {}
    with pytest.raises(ValueError, match=f"^{op.__name__}: {message}"):
        op(**{**GOOD, **bias, **change})


def test_bias_is_checked() -> None:
    with pytest.raises(ValueError, match="sigmoid_loss: bias is float; it needs to be a 0-d floating tensor"):
        sigmoid_loss(**GOOD, bias=0.0)


def test_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    decision = explain(contrastive_loss, **GOOD)
    assert (decision.op, decision.backend) == ("contrastive_loss", "torch")
    assert dict(decision.passed_over).keys() == {"triton", "reference"}
    assert "the tensors lie on cpu" in str(decision)
    assert 'passed over "triton"' in str(decision)
    assert explain(sigmoid_loss, **GOOD, bias=torch.tensor(0.0), backend="reference").reason == "asked for"
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        explain(contrastive_loss, **GOOD, backend="triton")
    with pytest.raises(ValueError, match="y has 2 features"):
        explain(contrastive_loss, **{**GOOD, "y": torch.zeros(4, 2)})
    with pytest.raises(
        ValueError, match=r"op is <built-in function len>; it needs to be one of .*contrastive_loss"
    ):
        explain(len, 1)


@LOSSES
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_nothing_waits_for_a_device(op: Loss, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All host code on tensors that have no data, where reading a value is an error: so nothing synchronises."""
    from mmscale_kernels import configs, triton_losses

    class NoKernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: None

    for name in ("_statistics_kernel", "_gradients_kernel", "_sigmoid_kernel"):
        monkeypatch.setattr(triton_losses, name, NoKernel())
    # Looking at the weights is for the CPU alone.
    monkeypatch.setattr(losses._Batch, "_problem", lambda self: None)
    smoothing = {"label_smoothing": 0.1} if op is contrastive_loss else {}
    inner = {"contrastive_loss": losses._contrastive_op, "sigmoid_loss": losses._sigmoid_op}[op.__name__]
    with FakeTensorMode(), configs.override(device="sm_90"):
        for dtype in (torch.float32, torch.float16):
            x, y = torch.empty(2, 3000, 16, dtype=dtype).unbind()
            scalars = [torch.empty(()) for _ in range(1 if op is contrastive_loss else 2)]
            labels = torch.empty(3000, dtype=torch.int64)
            weights = torch.empty(3000)
            for given in ((None, None), (labels, weights)):
                inner._init_fn(
                    x, y, *scalars, *given, *smoothing.values(), "", "auto", form, True, True, True
                )
        with pytest.raises(DataDependentOutputException):
            scalars[0].item()


def _growth_mib(op_name: str) -> float:
    import resource

    op = {"contrastive_loss": contrastive_loss, "sigmoid_loss": sigmoid_loss}[op_name]
    bias = [-10.0] if op is sigmoid_loss else []

    def step(num_rows: int) -> float:
        leaves = [torch.nn.functional.normalize(torch.randn(num_rows, 64), dim=1) for _ in range(2)]
        leaves = [tensor.requires_grad_() for tensor in (*leaves, *map(torch.tensor, (10.0, *bias)))]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        op(*leaves).backward()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    step(64)  # thread pools and buffers of the library
    return step(16_384)


@pytest.mark.slow
@LOSSES
def test_resident_memory_grows_by_less_than_200_mib_where_one_matrix_is_a_gib(op: Loss) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_growth_mib, (op.__name__,)) < 200
