"""Ranks that train nothing, but beat, wait for each other and go wrong like those that do; run as a script, a nursery.

The nursery imports torch once, then forks a set of ranks for each line of its input, so that a set takes a fraction
of a second: {"paths": [heartbeat files], "store": FILE, "rank": r, "kind": K, "phase": P, "step": n}, where rank r does
K at the begin of phase P of step n. It answers with the list of their process ids; each leads a process group.

Kinds: "sleep"; "gil", asleep with the interpreter's lock; "busy", computing with it; "loader", waiting for a thread
that reads a pipe nobody writes to; "slow", from step n on, three times as long in P; "none".
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mmscale.heartbeat import Heartbeat


class Nursery:
    """Starts sets of ranks; ends those that are left on leaving the `with`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._pids: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        for pid in self._pids:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # it has ended
        self._process.kill()
        self._process.communicate()

    def start(self, paths: list[str], folder: Path, **fault: Any) -> dict[int, tuple[int, int]]:
        """rank -> process group and session, as Agent.watch takes them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        store = tempfile.mktemp(dir=folder)
        self._process.stdin.write(json.dumps({"paths": paths, "store": store, **fault}) + "\n")
        self._process.stdin.flush()
        pids = json.loads(self._process.stdout.readline())
        self._pids += pids
        return {rank: (pid, os.getsid(0)) for rank, pid in enumerate(pids)}


def _nurse() -> None:
    import torch.distributed  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(len(order["paths"])):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                _rank(rank, order)
                os._exit(0)
            os.setpgid(pid, pid)
            pids.append(pid)
        print(json.dumps(pids), flush=True)


def _rank(rank: int, order: Mapping[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    beat = Heartbeat(Path(order["paths"][rank]))
    world_size = len(order["paths"])
    dist.init_process_group("gloo", init_method=f"file://{order['store']}", rank=rank, world_size=world_size)
    samples: queue.SimpleQueue[int] = queue.SimpleQueue()
    blocked = threading.Event()

    def read() -> None:
        for number in itertools.count():
            while samples.qsize() > 2:
                time.sleep(0.001)
            if blocked.is_set():
                pipe = f"{order['store']}-pipe"
                os.mkfifo(pipe)
                Path(pipe).read_bytes()
            samples.put(number)

    threading.Thread(target=read, name="mmscale-read-ahead", daemon=True).start()
    kind, step = order.get("kind", "none"), 0

    def begin(phase: str) -> None:
        beat.phase(phase)
        if rank != order.get("rank") or step < order.get("step", 0) or phase != order["phase"]:
            return
        if kind == "sleep":
            time.sleep(1000)
        elif kind == "gil":
            ctypes.PyDLL(None).sleep(1000)
        elif kind == "busy":
            collections.deque(itertools.repeat(None), maxlen=0)
        elif kind == "loader":
            blocked.set()
            while not blocked.is_set() or samples.qsize():
                samples.get()
            samples.get()
        elif kind == "slow":
            time.sleep(2 * _own_s(phase))

    numbers = torch.ones(1000)
    for step in range(1, 1_000_000):
        begin("data")
        samples.get()
        time.sleep(_own_s("data"))
        begin("sync")
        dist.all_reduce(numbers)
        begin("forward")
        time.sleep(_own_s("forward"))
        begin("loss")
        dist.all_reduce(numbers)
        begin("backward")
        time.sleep(_own_s("backward"))
        dist.all_reduce(numbers)
        begin("step")
        numbers.fill_(1.0)
        beat.end_step(step=step, samples=step)


def _own_s(phase: str) -> float:
    return {"data": 0.005, "forward": 0.005, "backward": 0.01}.get(phase, 0.0)


if __name__ == "__main__":
    _nurse()
