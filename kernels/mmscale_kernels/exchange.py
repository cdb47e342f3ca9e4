"""What the ranks of a contrastive loss tell each other: image features stay, text features travel.

Every rank keeps its rows of x and meets the rows of y of all ranks, its own among them, as a few blocks of
columns. `Peers` holds the collectives and `Peers.columns` the blocks:

- ``"gather"``: one block, all columns at once, and one reduce-scatter that brings their gradients home.
  Fewest and largest messages and products; holds all of y and its gradient.
- ``"ring"``: one rank's columns at a time, passed on from neighbour to neighbour while they are worked on,
  their gradient travelling one step behind them: both are on their way while the next block is worked on. Holds
  O(local rows * D), the gradient three times (leaving, arriving, this rank's part of the next); only vectors
  (weights, labels, log-sum-exps) are ever as long as the global batch.

Ranks may hold different numbers of rows, 0 among them. All sums run in a fixed order. Nothing here is seen by
autograd: the losses compute their gradients in the forward pass, so their backward never communicates and
cannot hang. Works with gloo and nccl.

Before anything bulky moves, the ranks `agree`: one all-gather of a dozen numbers each. What is wrong on one
rank, or differs between ranks, raises the same ValueError on all of them instead of leaving some to wait.
"""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OPS = ("contrastive_loss", "sigmoid_loss")
EXCHANGES = ("auto", "gather", "ring")

# Renamed in torch 2.13, which warns about the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# "auto" gathers while y of all ranks and its gradient stay below this many bytes on each rank.
_GATHER_BYTES = 2**28


@dataclass(frozen=True)
class Header:
    """One rank's part of a loss, in numbers that fit a float64: what has to be known, or equal, on all
    ranks."""

    op: int  # index into OPS
    dtype: int  # index into DTYPES
    num_rows: int
    num_columns: int
    num_features: int
    has_labels: int
    has_weights: int
    label_smoothing: float  # the only one that is no integer
    exchange: int  # index into EXCHANGES
    want_dx: int
    want_dy: int
    want_scalars: int

    @staticmethod
    def decode(numbers: list[float]) -> "Header":
        """The header that was sent as these numbers."""
        values = dict(zip((f.name for f in fields(Header)), numbers, strict=True))
        smoothing = values.pop("label_smoothing")
        return Header(label_smoothing=smoothing, **{name: int(value) for name, value in values.items()})

    def differences(self, other: "Header") -> list[str]:
        """Names of the fields that all ranks must share and these two don't."""
        free = {"num_rows", "num_columns", "want_dx", "want_dy", "want_scalars"}
        names = [f.name for f in fields(self) if f.name not in free]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def describe(self, name: str) -> str:
        """The value of a field, as a user would write it."""
        tables: dict[str, tuple[object, ...]] = {"op": OPS, "dtype": DTYPES, "exchange": EXCHANGES}
        value = getattr(self, name)
        return str(tables[name][value]) if name in tables else f"{name}={value}"


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group of this name. Operators carry names: a graph can hold a string but no group."""
    # The lookup that torch's own functional collectives use.
    return dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(group_name))


def agree(group: dist.ProcessGroup | None, header: Header | None, problem: str | None = None) -> list[Header]:
    """Tell all ranks this rank's header, or what is wrong with its input; the headers of all ranks, by rank.

    A problem outweighs the header, which may be None then. Without a group, this process is the only rank.
    Raises ValueError on every rank, naming the ranks concerned, if any has a problem or two disagree, or all
    are empty.
    """
    if group is not None:
        headers = _agree(group, header, problem)
    elif problem is not None:
        raise ValueError(problem)
    else:
        assert header is not None
        headers = [header]
    if not any(h.num_rows for h in headers):
        ranks = "" if group is None else " on any rank"
        raise ValueError(f"{OPS[headers[0].op]}: x has no rows{ranks}; it needs at least one")
    return headers


def _agree(group: dist.ProcessGroup, header: Header | None, problem: str | None) -> list[Header]:
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    numbers = [0.0] * len(fields(Header)) if header is None else [float(v) for v in astuple(header)]
    rows = _exchange_numbers(group, [float(problem is not None), *numbers])
    if any(row[0] for row in rows):
        texts: list[str | None] = [None] * world_size
        dist.all_gather_object(texts, problem, group=group)
        others = [f"rank {r} of {world_size}: {text}" for r, text in enumerate(texts) if text and r != rank]
        raise ValueError("; ".join([problem, *others] if problem else others))
    headers = [Header.decode(row[1:]) for row in rows]
    for r, other in enumerate(headers):
        if names := headers[0].differences(other):
            first = ", ".join(headers[0].describe(name) for name in names)
            second = ", ".join(other.describe(name) for name in names)
            raise ValueError(
                f"{OPS[headers[0].op]}: rank 0 was called with {first} and rank {r} with {second}; "
                "all ranks of the group need the same"
            )
    return headers


def _exchange_numbers(group: dist.ProcessGroup, numbers: list[float]) -> list[list[float]]:
    """All ranks' lists, read on the host. Over the CPU where the group can, else on a stream of its own."""

    def gather(device: torch.device) -> list[list[float]]:
        mine = torch.tensor(numbers, dtype=torch.float64, device=device)
        everyone = mine.new_empty(dist.get_world_size(group) * len(numbers))
        _all_gather(everyone, mine, group=group)
        result: list[list[float]] = everyone.view(-1, len(numbers)).tolist()
        return result

    if "cpu:" in dist.get_backend_config(group):
        return gather(torch.device("cpu"))
    # Read on the current stream, the numbers would wait for the towers' forward passes to finish on the
    # device.
    with torch.cuda.stream(torch.cuda.Stream()):
        return gather(torch.device("cuda", torch.cuda.current_device()))


class Columns(Protocol):
    """The rows of y of all ranks, met as blocks of columns; `start` counts columns over all ranks."""

    num_blocks: int

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Each (start, y_block) once."""
        ...

    def accumulate(self, add: Callable[[int, Tensor, Tensor], None], dtype: torch.dtype) -> Tensor:
        """Call add(start, y_block, dy_block) for each block, and bring what it added to dy_block back to its
        owner.

        dy_block begins as zeros. Returns dy of this rank's own rows, summed over ranks in a fixed order.
        """
        ...


class Peers:
    """The ranks that share one loss, and what they need from each other. Without a group: this process
    alone."""

    def __init__(self, group: dist.ProcessGroup | None, headers: list[Header]) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = len(headers)
        self.num_rows = [h.num_rows for h in headers]
        self.num_columns = [h.num_columns for h in headers]
        self.first_row = sum(self.num_rows[: self.rank])
        self.column_starts = [sum(self.num_columns[:r]) for r in range(self.world_size)]
        self.first_column = self.column_starts[self.rank]

    def gather(self, mine: Tensor, sizes: list[int]) -> Tensor:
        """Concatenate every rank's tensor along the first dimension; sizes[r] is its length on rank r."""
        if self.group is None:
            return mine
        longest = max(sizes)
        if len(mine) < longest:
            mine = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
        padded = mine.new_empty(longest * len(sizes), *mine.shape[1:])
        _all_gather(padded, mine.contiguous(), group=self.group)
        if min(sizes) == longest:
            return padded
        return torch.cat([padded[r * longest :][:size] for r, size in enumerate(sizes)])

    def reduce_scatter(self, everyone: Tensor, sizes: list[int]) -> Tensor:
        """Sum over ranks, and keep the part that is this rank's: the transpose of `gather`."""
        if self.group is None:
            return everyone
        longest = max(sizes)
        if min(sizes) < longest:
            padded = everyone.new_zeros(len(sizes), longest, *everyone.shape[1:])
            for r, part in enumerate(everyone.split(sizes)):
                padded[r, : sizes[r]] = part
            everyone = padded.flatten(0, 1)
        mine = everyone.new_empty(longest, *everyone.shape[1:])
        _reduce_scatter(mine, everyone, group=self.group)
        return mine[: sizes[self.rank]]

    def sum(self, values: list[Tensor]) -> list[Tensor]:
        """Sum 0-d tensors over ranks, in the order of ranks, so that every rank gets the same bits."""
        if self.group is None:
            return values
        total = self.gather(torch.stack(values)[None], [1] * self.world_size).sum(0)
        return [value.clone() for value in total]

    def logsumexp(self, lse: Tensor) -> Tensor:
        """Combine log-sum-exps over disjoint parts of a sum, one part a rank; -inf stands for an empty
        part."""
        if self.group is None:
            return lse
        top = lse.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        total = (lse - top).exp_()
        dist.all_reduce(total, group=self.group)
        return total.log_().add_(top)

    def columns(self, y: Tensor, exchange: str) -> Columns:
        """The columns of all ranks, gathered or passed around as `exchange` says."""
        if exchange == "auto":
            gathered_bytes = sum(self.num_columns) * y.shape[1] * (y.element_size() + 4)
            exchange = "gather" if gathered_bytes <= _GATHER_BYTES else "ring"
        if exchange == "gather" or self.world_size == 1:
            return _Gathered(self, y)
        return _Ring(self, y)


class _Gathered:
    def __init__(self, peers: Peers, y: Tensor) -> None:
        self.peers = peers
        self.y = peers.gather(y, peers.num_columns)
        self.num_blocks = 1

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.y

    def accumulate(self, add: Callable[[int, Tensor, Tensor], None], dtype: torch.dtype) -> Tensor:
        dy = torch.zeros_like(self.y, dtype=dtype)
        add(0, self.y, dy)
        return self.peers.reduce_scatter(dy, self.peers.num_columns)


class _Ring:
    """In each step every rank hands its block to the rank before it, so the owners it meets count upwards."""

    def __init__(self, peers: Peers, y: Tensor) -> None:
        assert peers.group is not None
        self.peers = peers
        self.group = peers.group
        self.y = y.contiguous()
        self.num_blocks = peers.world_size
        self.previous = dist.get_global_rank(self.group, (peers.rank - 1) % peers.world_size)
        self.next = dist.get_global_rank(self.group, (peers.rank + 1) % peers.world_size)

    def _pass_on(self, block: Tensor, owner: int) -> tuple[Tensor, list[dist.Work]]:
        """Begin to send `block`, and to receive the one of the same kind that belongs to `owner`."""
        incoming = block.new_empty(self.peers.num_columns[owner], *block.shape[1:])
        transfers = []
        if block.numel():
            transfers.append(dist.P2POp(dist.isend, block, self.previous, self.group))
        if incoming.numel():
            transfers.append(dist.P2POp(dist.irecv, incoming, self.next, self.group))
        return incoming, dist.batch_isend_irecv(transfers) if transfers else []

    def _walk(self) -> Iterator[tuple[int, Tensor]]:
        """(owner, y_block) for each rank, own first; the next block is on its way while one is worked on."""
        owner, block = self.peers.rank, self.y
        for step in range(self.peers.world_size):
            following = (owner + 1) % self.peers.world_size
            incoming, work = block, list[dist.Work]()
            if step + 1 < self.peers.world_size:
                incoming, work = self._pass_on(block, following)
            yield owner, block
            for transfer in work:
                transfer.wait()
            owner, block = following, incoming

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for owner, block in self._walk():
            yield self.peers.column_starts[owner], block

    def accumulate(self, add: Callable[[int, Tensor, Tensor], None], dtype: torch.dtype) -> Tensor:
        travelling: Tensor | None = None  # what other ranks added to the block at hand, or to the next one
        on_its_way: list[dist.Work] = []
        for owner, block in self._walk():
            # This rank's part goes into a buffer of its own while the others' parts are still on their way.
            part = torch.zeros_like(block, dtype=dtype)
            add(self.peers.column_starts[owner], block, part)
            for transfer in on_its_way:
                transfer.wait()
            dy_block = part if travelling is None else travelling.add_(part)
            # After the last step what arrives is this rank's own gradient, with every rank's part in it.
            travelling, on_its_way = self._pass_on(dy_block, (owner + 1) % self.peers.world_size)
        for transfer in on_its_way:
            transfer.wait()
        assert travelling is not None
        return travelling
