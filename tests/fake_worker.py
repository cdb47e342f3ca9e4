"""Worker functions for the launcher's tests, in the place of `mmscale.train.train`: each ends in its own way.

They leave a file `attempt-N-rank-R` in config.run.dir for each time they were run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from mmscale.config import Config
from mmscale.errors import DataError, Preempted

OnLog = Callable[[dict[str, Any]], None] | None
NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DS_ACCELERATOR",
)


class TwoPartError(DataError):
    """Unlike most exceptions it can't be unpickled from its message."""

    def __init__(self, shard: str, key: str) -> None:
        super().__init__(f"{shard}, key {key}: no such field")


def _begin(config: Config) -> tuple[int, int]:
    """Returns the rank and the number of the attempt, from 1."""
    rank = int(os.environ["RANK"])
    folder = Path(config.run.dir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    attempt = len(list(folder.glob(f"attempt-*-rank-{rank}"))) + 1
    (folder / f"attempt-{attempt}-rank-{rank}").write_text(str(os.getpid()))
    return rank, attempt


def _join_group() -> Any:
    import torch.distributed as dist  # takes seconds, which most of these do without

    dist.init_process_group("gloo")
    return dist


def environment(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    """What every rank finds, by way of files; needs no torch."""
    rank, _ = _begin(config)
    report: dict[str, Any] = {name: os.environ.get(name) for name in (*NAMES, "OMP_NUM_THREADS")}
    report |= {
        "cwd": str(Path.cwd()),
        "node": ray.get_runtime_context().get_node_id(),
        "torch": "torch" in sys.modules,
        "rank": rank,
        "started": time.time(),
    }
    for step in range(1, 4):
        if on_log is not None:
            on_log({"event": "log", "step": step, "total_steps": 3})
    folder = Path(config.run.dir or ".")
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    return report


def killed_once(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    """Sums over all ranks in each of 20 steps; in the first attempt rank 1 is killed at step 5."""
    rank, attempt = _begin(config)
    dist = _join_group()
    import torch

    for step in range(20):
        if (rank, attempt, step) == (1, 1, 5):
            print("about to be killed", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        total = torch.ones(())
        dist.all_reduce(total)
        assert total == dist.get_world_size()
        if on_log is not None:
            on_log({"event": "log", "step": step, "time": time.time(), "attempt": attempt})
    dist.destroy_process_group()
    return {"attempt": attempt}


def stuck(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    """All ranks but the last wait for it in a collective, with a child each; it raises, each time."""
    rank, attempt = _begin(config)
    child = subprocess.Popen(["sleep", "600"])
    (Path(config.run.dir or ".") / f"child-{attempt}-{rank}").write_text(str(child.pid))
    dist = _join_group()
    if rank == dist.get_world_size() - 1:
        time.sleep(0.5)  # the others are in the barrier by now
        raise ZeroDivisionError(f"a bug of the model, at {id(child):#x}")
    dist.barrier()
    return {}


def data_error(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    rank, _ = _begin(config)
    if rank == 1:
        raise DataError("shards/000001.tar, key 7: no field jpg")
    time.sleep(600)
    return {}


def two_part_error(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    raise TwoPartError("shards/000001.tar", "7")


def preempted(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    raise Preempted("stopped at step 7")


def bug(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    _begin(config)
    raise KeyError("the same each time")


def always_killed(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    _begin(config)
    print("the last words of a rank", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def asleep(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    _begin(config)
    if on_log is not None:
        on_log({"event": "start", "step": 0, "total_steps": 1})
    time.sleep(600)
    return {}


def talkative(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    """Reports how long 20,000 events took rank 0."""
    begin = time.perf_counter()
    for step in range(20_000):
        if on_log is not None:
            on_log({"event": "log", "step": step})
    return {"seconds": time.perf_counter() - begin}


def until_node_lost(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    """Waits in the first attempt to be lost with its node; later ones are done at once."""
    _, attempt = _begin(config)
    if on_log is not None:
        on_log({"event": "start", "node": ray.get_runtime_context().get_node_id()})
    if attempt == 1:
        time.sleep(600)
    return {"attempt": attempt}


def unhurried(config: Config, on_log: OnLog = None) -> dict[str, Any]:
    """mmscale's training with steps of a quarter of a second, so that there is time for what is done to it."""
    from mmscale.tasks import TASKS
    from mmscale.train import train

    def slowed(make: Callable[[], Any]) -> Callable[[], Any]:
        def build() -> Any:
            task = make()
            objective = task.objective

            def changed(*arguments: Any, **options: Any) -> Any:
                time.sleep(0.25)
                return objective(*arguments, **options)

            task.objective = changed
            return task

        return build

    TASKS.update({name: slowed(make) for name, make in TASKS.items()})
    return train(config, on_log)
