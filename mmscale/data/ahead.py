"""Reading ahead: a thread that makes batches in order, helped by a few others, within a budget of bytes.

    ahead = ReadAhead(make, iter(range(100)), depth=3, max_bytes=1 << 28, num_threads=2, stall_s=300.0)
    batch = ahead.take()
    ahead.stop()

Threads rather than processes: decoding releases the interpreter's lock, batches needn't be copied from one
process to another, and a thread shares the pages of the index. The price is that a reader written in plain
Python doesn't run faster with more threads.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch

from mmscale.errors import DataError

_QUICK_S = 50e-6  # rows quicker than this are done by one thread: more would wait for each other
_STOP_S = 2.0  # the longest that stopping waits for threads; one that hangs in a read is left behind

Made = TypeVar("Made")


class Helpers:
    """A few daemon threads that share the rows of a batch with the thread that asks.

    Not a ThreadPoolExecutor: the interpreter waits for that one's threads at its end, whatever they hang on.
    """

    def __init__(self, num_threads: int, *, name: str = "decode") -> None:
        self.stopped = False  # what is still to do is given up then
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.threads = [
            _Thread(target=_help, args=(self._tasks,), name=f"mmscale-{name}-{i}") for i in range(num_threads)
        ]
        _start(self.threads)

    def map(self, function: Callable[[int], Any], count: int) -> list[Any]:
        """[function(0), ..., function(count - 1)]; raises the lowest number's error, after all have run."""
        results: list[Any] = [None] * count
        errors: dict[int, Exception] = {}
        numbers = iter(range(count))  # shared: taking the next number is atomic
        done = threading.Semaphore(0)

        def do(number: int) -> None:
            try:
                if self.stopped:
                    raise InterruptedError("the stream was closed")
                results[number] = function(number)
            except Exception as error:
                errors[number] = error

        def help_and_tell() -> None:
            try:
                for number in numbers:
                    do(number)
            finally:
                done.release()

        num_helping = 0
        start = time.perf_counter()
        for number in numbers:
            do(number)
            if not num_helping and time.perf_counter() - start > _QUICK_S * (number + 1):
                num_helping = len(self.threads)
                for _ in self.threads:
                    self._tasks.put(help_and_tell)
        for _ in range(num_helping):
            done.acquire()
        if errors:
            raise errors[min(errors)]
        return results

    def submit(self, task: Callable[[], None]) -> None:
        """Have one of the threads do this, in its turn; the task catches its own errors."""
        self._tasks.put(task)

    def end(self) -> None:
        """To be called by the thread that calls `map`: a helper that ended would be waited for."""
        for _ in self.threads:
            self._tasks.put(None)


class _Thread(threading.Thread):
    """A daemon thread whose torch operators run in one thread each."""

    def __init__(self, target: Callable[..., None], name: str, args: tuple[Any, ...] = ()) -> None:
        super().__init__(target=target, name=name, args=args, daemon=True)
        self.ready = threading.Event()

    def run(self) -> None:
        torch.get_num_threads()  # torch takes over the last number set when a thread first asks for it
        torch.set_num_threads(1)
        self.ready.set()
        super().run()


def _start(threads: Sequence[_Thread]) -> None:
    """Start threads whose torch operators shall run in one thread each, and wait until they do.

    A small picture resized by several of torch's threads costs a fifth more CPU time than by one, most of it spent
    waiting for each other. The number is a thread's own under OpenMP, but the last one set is also what threads
    get that torch has not met yet, so the caller sets its own again.
    """
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.ready.wait()
    torch.set_num_threads(torch.get_num_threads())


def _help(tasks: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()


class ReadAhead(Generic[Made]):
    """One thread that makes batches in order, ahead of whoever takes them.

    make: step and helpers to what is made and how many bytes of memory it holds.
    depth, max_bytes: how many batches may lie ready, and how many bytes of them: the next one is begun when, if
        it were as large as the last, it would still fit; one batch is always allowed.
    num_threads: the thread that makes, and its helpers.
    stall_s: `take` gives up after so many seconds without a batch; `doing` is asked what the threads are at.
    """

    def __init__(
        self,
        make: Callable[[int, Helpers], tuple[Made, int]],
        steps: Iterator[int],
        *,
        depth: int,
        max_bytes: int,
        num_threads: int,
        stall_s: float,
        doing: Callable[[], str] = str,
    ) -> None:
        self._make = make
        self._steps = steps
        self._depth = depth
        self._max_bytes = max_bytes
        self._stall_s = stall_s
        self._doing = doing
        self._ready: deque[tuple[Made | BaseException, int]] = deque()
        self._ready_bytes = self._last_bytes = 0
        self._changed = threading.Condition()
        self._stopped = False
        self._helpers = Helpers(num_threads - 1)
        self._thread = _Thread(target=self._run, name="mmscale-read-ahead")
        _start([self._thread])

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def ready_bytes(self) -> int:
        return self._ready_bytes

    def _run(self) -> None:
        try:
            self._make_all()
        finally:
            self._helpers.end()

    def _may_begin(self) -> bool:
        if self._stopped or not self._ready:
            return True
        fits = self._ready_bytes + self._last_bytes <= self._max_bytes
        return len(self._ready) < self._depth and fits

    def _make_all(self) -> None:
        for step in self._steps:
            with self._changed:
                self._changed.wait_for(self._may_begin)
                if self._stopped:
                    return
            made: Made | BaseException
            try:
                made, num_bytes = self._make(step, self._helpers)
            except BaseException as error:  # whatever it is belongs to the one who asks for this batch
                made, num_bytes = error, 0
            with self._changed:
                self._ready.append((made, num_bytes))
                self._ready_bytes += num_bytes
                self._last_bytes = num_bytes
                self._changed.notify_all()
            if isinstance(made, BaseException):
                return

    def take(self) -> Made | BaseException:
        """The next batch, or the error that came instead of it.

        Raises DataError if it doesn't come within `stall_s` seconds, RuntimeError if `stop` is called meanwhile.
        """
        with self._changed:
            came = self._changed.wait_for(lambda: self._ready or self._stopped, timeout=self._stall_s)
            if not came:
                raise DataError(f"no batch came for {self._stall_s:.0f} s; {self._doing()}")
            if not self._ready:
                raise RuntimeError("the stream was closed while a batch of it was waited for")
            made, num_bytes = self._ready.popleft()
            self._ready_bytes -= num_bytes
            self._changed.notify_all()
        return made

    def stop(self) -> None:
        """End the threads after the rows that they are reading now; waits for that, but not long."""
        with self._changed:
            self._stopped = self._helpers.stopped = True
            self._ready.clear()
            self._ready_bytes = 0
            self._changed.notify_all()
        deadline = time.monotonic() + _STOP_S
        for thread in (self._thread, *self._helpers.threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
