"""Contrastive losses of two batches of features, exact over all ranks, in memory O((N + M) * D).

`contrastive_loss` is the symmetric softmax loss of CLIP, `sigmoid_loss` the pairwise one of SigLIP::

    loss = contrastive_loss(image_features, text_features, logit_scale.exp())
    loss.backward()

Every rank passes its own rows and gets the loss of the global batch. Gradients follow one convention: *the
mean over ranks of each rank's parameter gradient equals the gradient of the global loss on one rank*, so
averaging them, as DDP and DeepSpeed do, is right as it is. (A rank's features get world_size times their
gradient of the global loss; scale and bias get the gradient of the global loss itself.) There is no flag for
another behaviour.

The trade-off: the N x M matrix of logits is never held. It is computed once for the log-sum-exps and again
for the gradients, tile by tile, and the gradients are computed in the forward pass: backward only multiplies
them by the incoming gradient. So backward neither communicates nor can hang, a forward pass under grad costs
as much as both, and there is no second derivative. Evaluate under `torch.no_grad()`, and the gradients are
not computed.

Sources: Radford et al. 2021 (CLIP, arXiv 2103.00020); Zhai et al. 2023 (SigLIP, arXiv 2303.15343); Khosla et
al. 2020 (several positives, arXiv 2004.11362).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import exchange as _exchange
from . import torch_losses
from .dispatch import Decision, choose, custom_op, register_decision
from .torch_losses import Statistics, Targets, compute_dtype, exact_dtype

Group = dist.ProcessGroup | Literal[False] | None


def contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: Group = None,
    exchange: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """Symmetric InfoNCE over the global batch: (row loss + column loss) / 2, each a (weighted) mean.

    x: (N, D) and y: (M, D), this rank's features, M >= N, both fp16, bf16, fp32 or fp64. y_i is the positive
    of x_i
        for i < N; further y are negatives only: the column loss runs over the first N. N may be 0 on some
        ranks.
    scale: 0-d floating tensor that multiplies the similarities x @ y.T (CLIP's exp(logit_scale)).
    labels: (N,) integers, M = N. x_i and y_j match where labels[i] == labels[j], anywhere in the global
    batch; the
        target of a row, or column, is spread evenly over its positives. None: the pairs alone match.
    weights: (N,) >= 0, M = N, of any floating or integer dtype: each pair's weight in the means over rows and
    over
        columns. A pair of weight 0 still is a negative of others. They get no gradient. If they sum to 0 over
        all ranks, so are the loss and its gradients.
    label_smoothing: s in [0, 1): a target becomes target * (1 - s) + s / number of candidates.
    group: a process group; None is the default group if torch.distributed is initialised and this process
    alone
        otherwise; False is this process alone.
    exchange: how ranks meet each other's y: "gather" (all at once), "ring" (one rank's at a time: memory O(N
    * D)
        of this rank), or "auto", which gathers up to 256 MiB.
    backend: "triton", "torch", "reference" or None to decide; see `explain`.

    Returns the global loss on every rank: 0-d, fp32 (fp64 for fp64 inputs), differentiable once with respect
    to x, y and scale. Raises ValueError, on all ranks of the group alike, for input that doesn't fit.
    Negative weights are found where they lie on the CPU; on a device only if MMSCALE_CHECK=1, since looking
    costs a synchronisation.
    """
    arguments = _Arguments("contrastive_loss", x, y, scale, None, labels, weights, label_smoothing, exchange)
    group_name = _group_name("contrastive_loss", group)
    chosen = arguments.settle(group_name, backend)
    if chosen == "reference":
        return _reference(arguments, group_name)
    want = _wanted(x, y, scale)
    return torch.ops.mmscale.contrastive_loss(
        x, y, scale, labels, weights, label_smoothing, group_name, exchange, chosen, *want
    )[0]


def sigmoid_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    group: Group = None,
    exchange: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """SigLIP's loss over the global batch: mean over x of the sum over y of -log sigmoid(z (scale x.y +
    bias)).

    z is 1 where x and y match and -1 elsewhere.

    bias: 0-d floating tensor. weights: (N,) >= 0, M = N: the mean over x is weighted by them.
    All other arguments, the result, gradients and errors: as in `contrastive_loss`.
    """
    arguments = _Arguments("sigmoid_loss", x, y, scale, bias, labels, weights, 0.0, exchange)
    group_name = _group_name("sigmoid_loss", group)
    chosen = arguments.settle(group_name, backend)
    if chosen == "reference":
        return _reference(arguments, group_name)
    want = _wanted(x, y, scale, bias)
    return torch.ops.mmscale.sigmoid_loss(
        x, y, scale, bias, labels, weights, group_name, exchange, chosen, *want
    )[0]


@dataclass(frozen=True)
class _Arguments:
    """The arguments of one call, and what is wrong with them."""

    op: str
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor | None
    labels: Tensor | None
    weights: Tensor | None
    label_smoothing: float
    exchange: str

    def decide(self, backend: str | None) -> Decision:
        """The backend for these arguments; ValueError if they don't fit."""
        if problem := self.problem():
            raise ValueError(problem)
        refusal = "float64 inputs" if self.x.dtype == torch.float64 else None
        return choose(self.op, backend, self.x.device, refusal)

    def settle(self, group_name: str, backend: str | None) -> str:
        """The backend; a ValueError of this rank is raised on all of the group."""
        try:
            return self.decide(backend).backend
        except ValueError as error:
            if group_name:
                _exchange.agree(_exchange.resolve(group_name), None, str(error))
            raise

    def problem(self) -> str | None:
        """What keeps this rank from computing the loss, in words for the user, or None."""
        text = self._features() or self._scalars() or self._vectors() or self._settings()
        return f"{self.op}: {text}" if text else None

    def _features(self) -> str | None:
        x, y = self.x, self.y
        for name, value, shape in (("x", x, "(N, D)"), ("y", y, "(M, D)")):
            if not isinstance(value, Tensor):
                return f"{name} is {type(value).__name__}; it needs to be a tensor of shape {shape}"
            if value.ndim != 2 or value.shape[1] == 0:
                return f"{name} has shape {tuple(value.shape)}; it needs to be {shape} with D >= 1"
        if x.dtype not in _exchange.DTYPES:
            return f"x is {x.dtype}; it needs to be float16, bfloat16, float32 or float64"
        if y.dtype != x.dtype or y.device != x.device:
            return f"y is {y.dtype} on {y.device}; it needs to be {x.dtype} on {x.device}, like x"
        if y.shape[1] != x.shape[1]:
            return f"y has {y.shape[1]} features; it needs to have {x.shape[1]}, like x"
        if y.shape[0] < x.shape[0]:
            return f"y has {y.shape[0]} rows; it needs to have {x.shape[0]} or more, one for each row of x"
        return None

    def _scalars(self) -> str | None:
        for name, value in (("scale", self.scale), ("bias", self.bias)):
            if value is None and self.op == "contrastive_loss" and name == "bias":
                continue
            if not isinstance(value, Tensor):
                return f"{name} is {type(value).__name__}; it needs to be a 0-d floating tensor"
            if value.ndim != 0 or not value.is_floating_point():
                return (
                    f"{name} has shape {tuple(value.shape)} and is {value.dtype}; "
                    "it needs to be a 0-d floating tensor"
                )
            if value.device != self.x.device:
                return f"{name} is on {value.device}; it needs to be on {self.x.device}, like x"
        return None

    def _vectors(self) -> str | None:
        num_rows, num_columns = self.x.shape[0], self.y.shape[0]
        for name, value in (("labels", self.labels), ("weights", self.weights)):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                return f"{name} is {type(value).__name__}; it needs to be a tensor of shape (N,), or None"
            if num_columns != num_rows:
                return (
                    f"{name} are given and y has {num_columns} rows; with {name} it needs {num_rows}, like x"
                )
            if value.shape != (num_rows,):
                return (
                    f"{name} has shape {tuple(value.shape)}; it needs to be ({num_rows},), one for each row"
                )
            if value.device != self.x.device:
                return f"{name} is on {value.device}; it needs to be on {self.x.device}, like x"
            if value.is_complex() or value.dtype == torch.bool:
                return f"{name} is {value.dtype}; it needs to be a real number type"
        if self.labels is not None and self.labels.is_floating_point():
            return f"labels is {self.labels.dtype}; it needs to be an integer type"
        return None

    def _settings(self) -> str | None:
        if not 0.0 <= self.label_smoothing < 1.0:
            return f"label_smoothing is {self.label_smoothing}; it needs to be at least 0 and less than 1"
        if self.exchange not in _exchange.EXCHANGES:
            return f"exchange is {self.exchange!r}; it needs to be one of {_exchange.EXCHANGES}"
        return None


def _group_name(op: str, group: Group) -> str:
    """Name of the process group to compute in, empty for this process alone."""
    if group is False or (group is None and not (dist.is_available() and dist.is_initialized())):
        return ""
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            f"{op}: group is {group!r}; it needs to be a process group that this process is in, None for the "
            "default one, or False for this process alone"
        )
    return group.group_name if dist.get_world_size(group) > 1 else ""


def _wanted(*tensors: Tensor) -> tuple[bool, bool, bool]:
    """Whether gradients of x, of y, and of any scalar are wanted."""
    enabled = torch.is_grad_enabled()
    x, y, *scalars = (enabled and tensor.requires_grad for tensor in tensors)
    return x, y, any(scalars)


def _decide_contrastive(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: Group = None,
    exchange: str = "auto",
    backend: str | None = None,
) -> Decision:
    _group_name("contrastive_loss", group)
    arguments = _Arguments("contrastive_loss", x, y, scale, None, labels, weights, label_smoothing, exchange)
    return arguments.decide(backend)


def _decide_sigmoid(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    labels: Tensor | None = None,
    weights: Tensor | None = None,
    group: Group = None,
    exchange: str = "auto",
    backend: str | None = None,
) -> Decision:
    _group_name("sigmoid_loss", group)
    return _Arguments("sigmoid_loss", x, y, scale, bias, labels, weights, 0.0, exchange).decide(backend)


register_decision(contrastive_loss, _decide_contrastive)
register_decision(sigmoid_loss, _decide_sigmoid)


def _form(backend: str) -> ModuleType:
    """The module that has `statistics`, `gradients` and `sigmoid` of this backend."""
    if backend == "torch":
        return torch_losses
    from . import triton_losses

    return triton_losses


class _Batch:
    """The global batch as this rank sees it, agreed on with the others."""

    def __init__(self, arguments: _Arguments, group_name: str, want: tuple[bool, bool, bool]) -> None:
        x, y = arguments.x, arguments.y
        self.arguments = arguments
        self.exact = exact_dtype(x.device)
        group = _exchange.resolve(group_name) if group_name else None
        header = _exchange.Header(
            op=_exchange.OPS.index(arguments.op),
            dtype=_exchange.DTYPES.index(x.dtype),
            num_rows=x.shape[0],
            num_columns=y.shape[0],
            num_features=x.shape[1],
            has_labels=arguments.labels is not None,
            has_weights=arguments.weights is not None,
            label_smoothing=arguments.label_smoothing,
            exchange=_exchange.EXCHANGES.index(arguments.exchange),
            want_dx=want[0],
            want_dy=want[1],
            want_scalars=want[2],
        )
        headers = _exchange.agree(group, header, self._problem())
        self.peers = _exchange.Peers(group, headers)
        self.num_rows, self.num_columns = sum(self.peers.num_rows), sum(self.peers.num_columns)
        # dx is this rank's own affair, but a rank has to take part in what any other one wants of it.
        self.want_dx, self.want_dy, self.want_scalars = want
        self.anyone_wants_dy = any(h.want_dy for h in headers)
        self.anyone_wants = any(h.want_dx or h.want_dy or h.want_scalars for h in headers)

    def _problem(self) -> str | None:
        weights = self.arguments.weights
        if weights is None or (weights.device.type != "cpu" and os.environ.get("MMSCALE_CHECK") != "1"):
            return None
        if bool((weights >= 0).all()):  # false for NaN too
            return None
        return f"{self.arguments.op}: weights has {weights.min().item()}; they need to be 0 or more"

    def mean_weights(self) -> tuple[Tensor, Tensor]:
        """Each pair's weight in a mean over the global batch: of this rank's rows (n,), of all columns
        (M,)."""
        peers, weights, x = self.peers, self.arguments.weights, self.arguments.x
        own = slice(peers.first_row, peers.first_row + len(x))
        if weights is not None:
            weights = peers.gather(weights.to(self.exact), peers.num_rows)
            total = weights.sum()
            weights = weights * torch.where(total > 0, 1 / total, 0.0)
            return weights[own], weights
        columns = x.new_full((self.num_columns,), 1 / self.num_rows, dtype=self.exact)
        for start, rows, length in zip(peers.column_starts, peers.num_rows, peers.num_columns, strict=True):
            if rows < length:
                columns[start + rows : start + length] = 0.0  # negatives only
        return columns[peers.first_column : peers.first_column + len(x)], columns

    def _labels(self) -> tuple[Tensor | None, Tensor | None]:
        labels, peers = self.arguments.labels, self.peers
        if labels is None:
            return None, None
        return labels.long(), peers.gather(labels.long(), peers.num_rows)

    def contrastive_targets(self) -> Targets:
        """Targets of this rank's rows and all columns."""
        smoothing, peers = self.arguments.label_smoothing, self.peers
        rows, columns = self.mean_weights()
        rows, columns = rows / 2, columns / 2
        row_share, column_share = rows, columns
        if smoothing:
            row_share, column_share = rows * (1 - smoothing), columns * (1 - smoothing)
        row_labels, labels = self._labels()
        if labels is not None:
            # Counted by two searches of the sorted labels: unlike unique, this needs no synchronisation on a
            # device.
            ordered = labels.sort().values
            counts = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
            row_share = row_share / counts[peers.first_row : peers.first_row + len(rows)]
            column_share = column_share / counts
        return Targets(
            row_weight=rows,
            column_weight=columns,
            row_share=row_share,
            column_share=column_share,
            row_smooth=rows * (smoothing / self.num_columns) if smoothing else None,
            column_smooth=columns * (smoothing / self.num_rows) if smoothing else None,
            row_labels=row_labels,
            column_labels=labels,
            diagonal=peers.first_column,
        )

    def sigmoid_targets(self) -> Targets:
        """Targets of this rank's rows and all columns."""
        row_labels, labels = self._labels()
        return Targets(
            row_weight=self.mean_weights()[0],
            row_labels=row_labels,
            column_labels=labels,
            diagonal=self.peers.first_column,
        )

    def sweep(
        self, columns: _exchange.Columns, add: Callable[[int, Tensor, Tensor | None], None]
    ) -> Tensor | None:
        """Call add(start, y_block, dy_block) for all blocks; dy of this rank, or None if nobody wants it."""
        if self.anyone_wants_dy:
            return columns.accumulate(add, compute_dtype(self.arguments.y.dtype))
        for start, block in columns.blocks():
            add(start, block, None)
        return None

    def results(
        self, sums: list[Tensor], scale: Tensor, dx: Tensor | None, dy: Tensor | None
    ) -> list[Tensor]:
        """loss, dx, dy and the scalars' gradients, from this rank's sums and gradients without the scale."""
        x, y = self.arguments.x, self.arguments.y
        dtype = compute_dtype(x.dtype)
        # The mean over ranks divides by the number of ranks what only one of them has.
        factor = scale * self.peers.world_size
        loss, *scalars = self.peers.sum(sums)
        return [
            loss.to(dtype),
            x.new_empty(0, dtype=dtype) if dx is None else dx.mul_(factor),
            y.new_empty(0, dtype=dtype) if dy is None or not self.want_dy else dy.mul_(factor),
            *scalars,
        ]


@custom_op("mmscale::contrastive_loss")
def _contrastive_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    group_name: str,
    exchange: str,
    backend: str,
    want_dx: bool,
    want_dy: bool,
    want_dscale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, dx, dy, dscale): the gradients for an incoming gradient of 1, empty or 0 where not wanted."""
    arguments = _Arguments("contrastive_loss", x, y, scale, None, labels, weights, label_smoothing, exchange)
    with torch.autocast(x.device.type, enabled=False):
        batch = _Batch(arguments, group_name, (want_dx, want_dy, want_dscale))
        targets = batch.contrastive_targets()
        return cast(Any, tuple(_contrastive(arguments, batch, targets, _form(backend))))


def _contrastive(arguments: _Arguments, batch: _Batch, targets: Targets, form: ModuleType) -> list[Tensor]:
    x, y = arguments.x, arguments.y
    assert targets.column_weight is not None
    dtype = compute_dtype(x.dtype)
    scale = arguments.scale.detach().to(dtype)
    columns = batch.peers.columns(y, arguments.exchange)
    keep = batch.anyone_wants and columns.num_blocks == 1
    found: list[tuple[int, Statistics]] = []
    for start, block in columns.blocks():
        part = targets.columns(start, start + len(block))
        found.append((start, form.statistics(x, block, scale, part, keep=keep)))
    first = found[0][1]
    row_lse, column_lse, positive = first.row_lse, first.column_lse, first.positive
    if len(found) > 1:
        row_lse = torch.stack([statistics.row_lse for _, statistics in found]).logsumexp(0)
        # Every rank begins with its own block.
        found.sort(key=lambda pair: pair[0])
        column_lse = torch.cat([statistics.column_lse for _, statistics in found])
        positive = torch.stack([statistics.positive for _, statistics in found]).sum()
    column_lse = batch.peers.logsumexp(column_lse)
    # Every rank has all columns' log-sum-exps now, so each adds an equal part of their sum.
    loss = targets.row_weight @ row_lse - positive
    loss += targets.column_weight @ column_lse / batch.peers.world_size

    dscale = torch.zeros_like(loss)
    dx = torch.zeros_like(x, dtype=dtype) if batch.want_dx else None
    dy = None

    def add(start: int, block: Tensor, dy_block: Tensor | None) -> None:
        stop = start + len(block)
        whole = Statistics(row_lse, column_lse[start:stop], positive, first.kept)
        dscale.add_(form.gradients(x, block, scale, targets.columns(start, stop), whole, dx=dx, dy=dy_block))

    if batch.anyone_wants:
        dy = batch.sweep(columns, add)
    return batch.results([loss, dscale], scale, dx, dy)


@custom_op("mmscale::sigmoid_loss")
def _sigmoid_op(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    group_name: str,
    exchange: str,
    backend: str,
    want_dx: bool,
    want_dy: bool,
    want_scalars: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, dx, dy, dscale, dbias): the gradients for an incoming gradient of 1, empty or 0 where not
    wanted."""
    arguments = _Arguments("sigmoid_loss", x, y, scale, bias, labels, weights, 0.0, exchange)
    with torch.autocast(x.device.type, enabled=False):
        batch = _Batch(arguments, group_name, (want_dx, want_dy, want_scalars))
        return cast(Any, tuple(_sigmoid(arguments, batch, batch.sigmoid_targets(), _form(backend))))


def _sigmoid(arguments: _Arguments, batch: _Batch, targets: Targets, form: ModuleType) -> list[Tensor]:
    x, y = arguments.x, arguments.y
    assert arguments.bias is not None
    dtype = compute_dtype(x.dtype)
    scale, bias = arguments.scale.detach().to(dtype), arguments.bias.detach().to(dtype)
    dx = torch.zeros_like(x, dtype=dtype) if batch.want_dx else None
    sums = [x.new_zeros((), dtype=batch.exact) for _ in range(3)]  # loss, gradients of scale and bias

    def add(start: int, block: Tensor, dy_block: Tensor | None) -> None:
        part = targets.columns(start, start + len(block))
        found = form.sigmoid(
            x, block, scale, bias, part, dx=dx, dy=dy_block, want_gradients=batch.anyone_wants
        )
        for total, value in zip(sums, found, strict=True):
            total.add_(value)

    dy = batch.sweep(batch.peers.columns(y, arguments.exchange), add)
    return batch.results(sums, scale, dx, dy)


def _fake(x: Tensor, y: Tensor, want_dx: bool, want_dy: bool, num_scalars: int) -> tuple[Tensor, ...]:
    dtype = compute_dtype(x.dtype)
    scalars = [x.new_empty((), dtype=exact_dtype(x.device)) for _ in range(num_scalars)]
    return (
        x.new_empty((), dtype=dtype),
        torch.empty_like(x, dtype=dtype) if want_dx else x.new_empty(0, dtype=dtype),
        torch.empty_like(y, dtype=dtype) if want_dy else y.new_empty(0, dtype=dtype),
        *scalars,
    )


@_contrastive_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    group_name: str,
    exchange: str,
    backend: str,
    want_dx: bool,
    want_dy: bool,
    want_dscale: bool,
) -> tuple[Tensor, ...]:
    return _fake(x, y, want_dx, want_dy, 1)


@_sigmoid_op.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    labels: Tensor | None,
    weights: Tensor | None,
    group_name: str,
    exchange: str,
    backend: str,
    want_dx: bool,
    want_dy: bool,
    want_scalars: bool,
) -> tuple[Tensor, ...]:
    return _fake(x, y, want_dx, want_dy, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    ctx.num_inputs = len(inputs)
    # x, y, scale and, for the sigmoid loss, bias come first in both.
    ctx.dtypes = [tensor.dtype for tensor in inputs[: len(gradients)]]


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.num_inputs
    needed = ctx.needs_input_grad
    results = [
        _times(gradient, grad, dtype) if need else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needed, strict=False)
    ]
    return (*results, *[None] * (ctx.num_inputs - len(results)))


def _times(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * grad in dtype, without holding the product in fp32 if that can be helped."""
    if gradient.dtype == dtype or grad.requires_grad:  # `out` doesn't go with a graph of the backward pass
        return (gradient * grad).to(dtype)
    return torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=dtype))


_contrastive_op.register_autograd(_backward, setup_context=_setup_context)
_sigmoid_op.register_autograd(_backward, setup_context=_setup_context)


def _reference(arguments: _Arguments, group_name: str) -> Tensor:
    """Both losses on the whole global batch, dense, by autograd: the formulas as they are written down."""
    dtype = compute_dtype(arguments.x.dtype)
    with torch.autocast(arguments.x.device.type, enabled=False):
        batch = _Batch(arguments, group_name, (False, False, False))
        peers = batch.peers
        x = _gather_own_grad(arguments.x.to(dtype), peers, peers.num_rows, peers.first_row)
        y = _gather_own_grad(arguments.y.to(dtype), peers, peers.num_columns, peers.first_column)
        logits = arguments.scale.to(dtype) * (x @ y.T)
        pairs = [
            start + torch.arange(rows, device=x.device)
            for start, rows in zip(peers.column_starts, peers.num_rows, strict=True)
        ]
        paired = torch.cat(pairs)
        if arguments.labels is None:
            match = torch.zeros_like(logits, dtype=torch.bool)
            match[torch.arange(len(paired), device=x.device), paired] = True
        else:
            labels = peers.gather(arguments.labels, peers.num_rows)
            match = labels[:, None] == labels
        weights = batch.mean_weights()[1][paired].to(dtype)
        if arguments.bias is not None:
            logits = logits + arguments.bias.to(dtype)
            return -(F.logsigmoid(torch.where(match, logits, -logits)).sum(1) * weights).sum()
        smoothing, target = arguments.label_smoothing, match.to(dtype)
        by_row = target / target.sum(1, keepdim=True) * (1 - smoothing) + smoothing / len(y)
        target = target[:, paired]
        by_column = target / target.sum(0) * (1 - smoothing) + smoothing / len(x)
        row_loss = -(by_row * logits.log_softmax(1)).sum(1) @ weights
        column_loss = -(by_column * logits.log_softmax(0)[:, paired]).sum(0) @ weights
        return (row_loss + column_loss) / 2


def _gather_own_grad(mine: Tensor, peers: _exchange.Peers, sizes: list[int], first: int) -> Tensor:
    """All ranks' rows, of which this rank's carry world_size times their gradient: the mean over ranks
    restores it."""
    everyone = peers.gather(mine.detach(), sizes)
    scaled = mine + (mine - mine.detach()) * (peers.world_size - 1)
    return torch.cat([everyone[:first], scaled, everyone[first + len(mine) :]])
