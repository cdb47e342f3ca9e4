"""Runs a function on several ranks of a fresh process group, for tests.

    results = run_ranks(3, check_something, argument)    # [rank 0's result, rank 1's, rank 2's]

`check_something` is a function at the top level of a module, called as check_something(argument) in each
process with torch.distributed initialised (gloo over a file, no network) and RANK, LOCAL_RANK and WORLD_SIZE
set. Arguments and results are pickled. `start_ranks` starts ranks as torchrun would and leaves them alone: to
train in, and to kill.

Processes are forked from a server that has imported torch, DeepSpeed and mmscale, once a session: the first
start takes some seconds, any other some 30 ms.
"""

import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Each rank's fn(*args), by rank.

    Raises the first exception that a rank raised, with that rank's traceback as a note, and TimeoutError
    naming the ranks that are not done after `timeout` seconds. Either way no process is left behind.
    """
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        workers, pipes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            worker = context.Process(
                target=_rank, args=(rank, world_size, store, theirs, fn, args), daemon=True
            )
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        try:
            return _collect(pipes, time.monotonic() + timeout, timeout)
        finally:
            for worker in workers:
                # A rank that is done only has to leave; the others may hang in a collective for ever.
                worker.join(timeout=5 if sys.exc_info()[0] is None else 0)
                if worker.is_alive():
                    worker.kill()
                worker.join()


def start_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[BaseProcess]:
    """Processes in which fn(*args) runs, by rank, with what torchrun puts into the environment; no group is made.

    Whoever starts them waits for them (`join`, `exitcode`), and kills them if need be.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    workers: list[BaseProcess] = []
    for rank in range(world_size):
        worker = _context().Process(target=_train_rank, args=(rank, world_size, port, fn, args), daemon=True)
        worker.start()
        workers.append(worker)
    return workers


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # The last is what DeepSpeed imports late, in the first ZeRO engine: it brings torch's compiler, 4 s.
    context.set_forkserver_preload(
        ["deepspeed", "mmscale.train", "deepspeed.runtime.zero.muon.original_muon"]
    )
    return context


def _train_rank(rank: int, world_size: int, port: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    fn(*args)


def _collect(pipes: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(pipes)} not done in {timeout} s")
        failures = []
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                when, error, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} of {len(pipes)} died without a word") from None
            if error is not None:
                error.add_note(f"on rank {rank} of {len(pipes)}:\n{result}")
                failures.append((when, rank, error))
            results[rank] = result
        if failures:
            # The first to fail is the cause; the others may only have lost their connection to it.
            raise min(failures, key=lambda failure: failure[:2])[2]
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world_size: int, store: str, pipe: Connection, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        dist.barrier()  # or a rank that fails at once would tear down what another is still connecting to
        message = pickle.dumps((time.monotonic(), None, fn(*args)))
    except BaseException as error:
        when, text = time.monotonic(), traceback.format_exc()
        try:
            message = pickle.dumps((when, error, text))
            pickle.loads(message)
        except Exception:  # an exception that can't be pickled is told by its words
            message = pickle.dumps((when, RuntimeError(f"{type(error).__name__}: {error}"), text))
    # Told before the group ends, which fails whoever waits for this rank.
    pipe.send_bytes(message)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()
