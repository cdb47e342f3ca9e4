"""The ranks of a run: who we are, on which device, and the small messages that keep all of us in step.

`init_world()` reads what torchrun, Ray or nobody put into the environment (RANK, WORLD_SIZE, ...), so the same worker
runs in one process, under torchrun and under Ray. Host-side agreement (errors, stops, weights) goes over a gloo group
of its own: it never waits for the device.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmscale.errors import ConfigError, UserError


@dataclass(frozen=True)
class World:
    """rank of size, on one device. All methods are collective: every rank calls them in the same order."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    control: dist.ProcessGroup

    def sum(self, values: list[float]) -> list[float]:
        """The sums over all ranks, in float64."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(S, b, ...) CPU tensors of every rank as (S, size, b, ...): rows of equal shape on all ranks."""
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous(), group=self.control)
        return torch.stack(parts, 1)

    def agree(self, error: BaseException | None) -> None:
        """Raises on every rank if any rank brings an error: a user's error as itself, the first rank's first."""
        errors = self.gather(None if error is None else (type(error), str(error)))
        for rank, found in enumerate(errors):
            if found is None:
                continue
            kind, message = found
            if error is not None and rank == self.rank:
                raise error
            if issubclass(kind, UserError):
                told = kind(message)
                told.is_told_by_another = True
                raise told
            raise RuntimeError(f"rank {rank} failed: {kind.__name__}: {message}")

    def barrier(self) -> None:
        dist.barrier(group=self.control)


def init_world(*, device: str = "auto", threads: int | None = None, timeout: float = 600.0) -> World:
    """Joins the process group that the environment describes; alone if it describes none.

    device: "auto" takes CUDA where there is one. threads: of the CPU, default the machine's cores over its ranks, the
    same whoever launched us, since the number of threads decides the order of sums. timeout: seconds of a collective.
    Raises ConfigError for a device that isn't there.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = (
        int(os.environ.get("LOCAL_RANK", 0)),
        int(os.environ.get("LOCAL_WORLD_SIZE", size)),
    )
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError("run.device=cuda: torch finds no such device here; give cpu or auto")
    on_cuda = has_cuda and device != "cpu"
    if on_cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no device: this machine has {torch.cuda.device_count()}; "
            "start fewer workers a node"
        )
    place = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    if on_cuda:
        torch.cuda.set_device(place)
    else:
        _set("DS_ACCELERATOR", "cpu")
    if "MASTER_ADDR" not in os.environ:
        if size > 1:
            raise ConfigError(
                f"WORLD_SIZE={size} without MASTER_ADDR: start through torchrun or mmscale launch"
            )
        _set("MASTER_ADDR", "127.0.0.1")
        _set("MASTER_PORT", _free_port())
    _set("RANK", rank)
    _set("WORLD_SIZE", size)
    _set("LOCAL_RANK", local_rank)
    _set("LOCAL_SIZE", local_size)  # DeepSpeed's name for LOCAL_WORLD_SIZE
    limit = timedelta(seconds=timeout)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=limit, rank=rank, world_size=size)
    control = dist.new_group(backend="gloo", timeout=limit)
    return World(rank, size, local_rank, local_size, place, control)


def close_world() -> None:
    """Leaves the process group and takes back what `init_world` put into the environment, for later processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
    while _was_set:
        os.environ.pop(_was_set.pop(), None)


_was_set: list[str] = []  # names in the environment that we have set for DeepSpeed


def _set(name: str, value: object) -> None:
    if name not in os.environ:
        os.environ[name] = str(value)
        _was_set.append(name)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
