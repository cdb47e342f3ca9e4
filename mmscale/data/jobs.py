"""Long work over many shards: jobs over processes of this machine, with progress.

    for number, result in local_map(workers=4)(work, jobs):
        ...

A `JobMap` runs `work(job)` for every job and yields (the job's number, its result) as each is done. `local_map`
forks processes; `mmscale_launcher.tools.ray_map` is the same over a Ray cluster, where work and jobs must
pickle. Tools take a JobMap and don't know where their work runs; they resume by leaving out the jobs whose
results already lie on the disk.
"""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from tqdm import tqdm

from mmscale.errors import UserError

JobMap = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]


def local_map(workers: int | None = None) -> JobMap:
    """A JobMap over `workers` forked processes, default one a CPU; with one worker, or one job, in this process.

    A job that raises ends all: its error is raised here, and jobs that haven't begun never run. If this
    process is killed its children end within a second.

    Raises UserError, while it runs, if a child is killed from outside.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")

    def run(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        count = min(workers or os.cpu_count() or 1, len(jobs))
        if count <= 1:
            for number, job in enumerate(jobs):
                yield number, work(job)
            return
        # fork: the work reaches the children without a copy, and a script that calls this needs no main guard
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(
            count, mp_context=context, initializer=_start_child, initargs=(work,)
        ) as pool:
            waiting = iter(enumerate(jobs))
            running: dict[Any, int] = {}
            try:
                while True:
                    while len(running) < 2 * count and (item := next(waiting, None)) is not None:
                        running[pool.submit(_run_child, item[1])] = item[0]
                    if not running:
                        return
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        yield running.pop(future), future.result()  # raises what the child raised
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process died, killed from outside or for want of memory; the same command goes "
                    "on with what is left to do, and one worker needs the least memory"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    return run


_work: Callable[[Any], Any]  # in a child: what it was forked to do


def _start_child(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    parent = os.getppid()

    def follow_parent() -> None:  # else a child whose parent is killed waits for work for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _run_child(job: Any) -> Any:
    return _work(job)


class Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds. On stderr: stdout is for results."""

    def __init__(self, total: int, *, done: int = 0, unit: str = "samples", shown: bool = True) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, unit=f" {unit}", disable=not (shown and terminal), file=sys.stderr
        )
        self._lines = shown and not terminal
        self._total, self._done, self._unit = total, done, unit
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int = 1) -> None:
        self.set(self._done + count)

    def set(self, done: int) -> None:
        self._bar.update(done - self._done)
        self._done = done
        if self._lines and (time.monotonic() - self._last > 10 or done == self._total):
            self._last = time.monotonic()
            print(f"{done} of {self._total} {self._unit}", file=sys.stderr, flush=True)
