"""Metrics: windowed counters, and where they go: TensorBoard, JSON lines, the terminal.

Counters are plain sums over a window of steps, closed by one synchronisation; the arithmetic takes its clock as a
parameter, so a test can hold it to account.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from mmscale.errors import DataError
from mmscale.heartbeat import Heartbeat
from mmscale.world import World

Event = dict[str, Any]

FREE_FAULTS = 3  # so many never exceed the budget, however short the run
STALL_WARNING = 0.15  # share of the time spent waiting for data from which a warning is due
_WARM_UP_STEPS = 10  # that a warning waits for: the first batches always come late


class Window:
    """Counts samples, tokens and waiting time since the last `close`, and seconds since it was made.

    before_s: seconds that a resumed run has trained before.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, *, before_s: float = 0.0) -> None:
        self._clock, self._closed_s = clock, before_s
        self._reset()

    @property
    def total_s(self) -> float:
        """All seconds of training, pauses left out."""
        return self._closed_s + self._clock() - self._start

    def _reset(self) -> None:
        self._start, self._wait = self._clock(), 0.0
        self._samples = self._tokens = self._steps = 0

    def add(self, *, samples: int, tokens: int, wait_s: float) -> None:
        """One step: samples and tokens over all ranks, wait_s seconds spent waiting for its batch."""
        self._samples += samples
        self._tokens += tokens
        self._wait += wait_s
        self._steps += 1

    def close(self) -> dict[str, float]:
        """Rates over the window, which begins anew: samples and tokens a second, waiting share, seconds a step."""
        elapsed = max(self._clock() - self._start, 1e-9)
        self._closed_s += elapsed
        rates = {
            "samples_per_s": self._samples / elapsed,
            "tokens_per_s": self._tokens / elapsed,
            "data_wait_frac": min(1.0, self._wait / elapsed),
            "step_s": elapsed / max(1, self._steps),
        }
        self._reset()
        return rates

    def pause(self) -> Callable[[], None]:
        """Leaves out the time until the returned function is called: evaluating and saving aren't training."""
        begin = self._clock()

        def resume() -> None:
            self._start += self._clock() - begin

        return resume


class Loader(Protocol):
    """What the trainer asks of a stream for its metrics; see `mmscale.data.ShardStream`."""

    shard_faults: list[Any]

    def take_faults(self) -> list[Any]: ...
    def stats(self) -> dict[str, float]: ...


class LoaderMeter:
    """Counts what the loaders of all ranks do and fail at, and says what to do if they are too slow.

    counts: faults by cause before this start. folder: where rank 0 writes quarantine.jsonl, one line for each
    sample that was replaced: step, row, shard, key, field, cause, detail (step -1 and no key for shards that
    were left out at the start). `budget` is a share of all samples
    consumed since the start of the run.
    """

    def __init__(
        self,
        stream: Loader,
        world: World,
        folder: Path,
        *,
        counts: Mapping[str, int],
        step: int,
        budget: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.counts = Counter(counts)
        self._stream, self._world, self._budget, self._clock = stream, world, budget, clock
        self._new: list[dict[str, Any]] = []
        self._path = folder / "quarantine.jsonl"
        self._last, self._last_s = stream.stats(), clock()
        self._first_step, self._warned = step, False
        if world.rank == 0:
            lines = read_json_lines(self._path)
            kept = [line for line in lines if 0 <= line["step"] < step]  # the others come again
            left_out = [fault.as_dict() for fault in stream.shard_faults]
            if left_out or len(kept) < len(lines):
                write_json_lines(self._path, [*left_out, *kept])

    def num_new(self) -> int:
        """Faults of this rank's last batch."""
        self._new = [fault.as_dict() for fault in self._stream.take_faults()]
        return len(self._new)

    def record(self, num_new: float, samples: int) -> None:
        """num_new: over all ranks; collective if there are any. samples: consumed by all ranks since the run's start.

        Raises DataError, on every rank, if the faults exceed the budget.
        """
        if not num_new:
            return
        found = [fault for part in self._world.gather(self._new) for fault in part]
        self.counts.update(fault["cause"] for fault in found)
        if self._world.rank == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(fault, ensure_ascii=False) + "\n" for fault in found)
        total = self.counts.total()
        if total > FREE_FAULTS and total > self._budget * samples:
            causes = ", ".join(f"{count} x {cause}" for cause, count in self.counts.most_common(5))
            raise DataError(
                f"{total} of {samples} samples can't be used, more than the error budget of {self._budget:.3%}: "
                f"{causes}. The last one: {found[-1]['detail']}"
            )

    def rates(self, samples: int) -> dict[str, float]:
        """This rank's loader since the last call, as `data/...` metrics; bad_frac is of all ranks and the whole run."""
        now, now_s = self._stream.stats(), self._clock()
        elapsed = max(now_s - self._last_s, 1e-9)
        rates = {
            "data/mb_per_s": (now["bytes_read"] - self._last["bytes_read"]) / elapsed / 1e6,
            "data/queue_depth": now["queue_depth"],
            "data/ready_mib": now["ready_bytes"] / 2**20,
            "data/in_flight_mib": now["bytes_in_flight"] / 2**20,
            "data/bad_frac": self.counts.total() / max(1, samples),
            **{f"data/bad/{cause}": float(count) for cause, count in sorted(self.counts.items())},
        }
        self._last, self._last_s = now, now_s
        return rates

    def warning(self, step: int, data_wait_frac: float, *, threads: int) -> str | None:
        """Once, and early: that the loader is the limit, and the cheapest remedy."""
        if self._warned or step - self._first_step < _WARM_UP_STEPS or data_wait_frac < STALL_WARNING:
            return None
        self._warned = True
        cores = max(1, (os.cpu_count() or 1) // self._world.local_size)
        return f"training waits for data {data_wait_frac:.0%} of the time; " + remedy(
            self._stream.stats(), threads=threads, cores=cores
        )


def remedy(stats: Mapping[str, float], *, threads: int, cores: int) -> str:
    """The cheapest thing to do about a slow loader. cores: of the machine for each of its ranks."""
    if stats["read_s"] > 2 * stats["decode_s"]:
        return (
            f"{stats['read_s'] / max(1e-9, stats['read_s'] + stats['decode_s']):.0%} of the loader's time is reading: "
            "put the shards on a faster disk, or give remote ones a larger data.storage.cache_gb"
        )
    if threads < cores:
        return f"data.threads={cores} would use the cores that are there (now {threads})"
    return (
        "all cores are decoding: data.cache_mb keeps decoded samples in memory if they fit, "
        "`mmscale data repack` or `pack --resize` makes smaller pictures once, and more nodes bring more cores"
    )


def global_losses(
    pending: Sequence[tuple[int, str, torch.Tensor]], world: World
) -> list[tuple[int, str, float]]:
    """(step, task, loss) with the losses of all ranks, of the steps since the last log; waits for the device."""
    values = world.sum(torch.stack([loss for *_, loss in pending]).tolist())
    return [(step, name, value) for (step, name, _), value in zip(pending, values, strict=True)]


def mean_losses(losses: Sequence[tuple[int, str, float]]) -> dict[str, float]:
    """The mean loss over steps: of all, and of each task."""
    groups: dict[str, list[float]] = {"all": [value for *_, value in losses]}
    for _, name, value in losses:
        groups.setdefault(name, []).append(value)
    return {name: sum(group) / len(group) for name, group in groups.items()}


def all_ranks(beat: Heartbeat, world: World) -> dict[str, float]:
    """What the slowest and the largest rank needs: seconds of each phase of a step, its memory. Collective."""
    memory = peak_memory_gib(world.device)
    if world.device.type == "cuda":
        beat.set_device_bytes(memory * 2**30)
    parts = world.gather({"mem_gib": memory, **{f"time/{k}_s": v for k, v in beat.recent_s().items() if v}})
    return {name: max(part.get(name, 0.0) for part in parts) for part in parts for name in part}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held: of the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30


class Writer:
    """Appends to metrics.jsonl and TensorBoard's events in a run's folder. For rank 0.

    A resumed run writes on after the checkpoint's step: lines beyond it, from the run that was cut off, are dropped.
    A disk that is full doesn't end the training that it tells of: `say` is told once, lines are kept until there is
    room, and what TensorBoard would have shown meanwhile is lost.
    """

    def __init__(
        self, folder: Path, *, resume_step: int, say: Callable[[str], None] = lambda text: None
    ) -> None:
        path = folder / "metrics.jsonl"
        self._folder, self._say, self._has_failed = folder, say, False
        # TensorBoard then ignores what lies beyond in older files. A run that starts over evaluates at step 0 again.
        self._purge_step: int | None = resume_step + 1 if resume_step else 0
        self._unwritten = b""
        self._board: Any = None
        with self._tolerated():
            write_json_lines(path, [line for line in read_json_lines(path) if line["step"] <= resume_step])
        self._file = path.open("ab", buffering=0)  # so that what didn't fit is known to the byte

    def log(self, line: Mapping[str, Any]) -> None:
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._unwritten += json.dumps(known).encode() + b"\n"
        with self._tolerated():
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        places = {name if "/" in name else f"train/{name}": value for name, value in numbers.items()}
        self.scalars(line["step"], places)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        def add(board: Any) -> None:
            for name, value in values.items():
                board.add_scalar(name, value, step)
            board.flush()  # else two minutes of curves are lost with a process that is killed

        self._on_board(add)

    def image(self, name: str, picture: Any, step: int) -> None:
        """A (H, W, 3) uint8 array."""
        self._on_board(lambda board: board.add_image(name, picture, step, dataformats="HWC"))

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            with self._tolerated():
                self._board.close()

    def _on_board(self, call: Callable[[Any], None]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        board, self._board = self._board, None  # one that has failed once goes on failing
        with self._tolerated():
            if board is None:
                board = SummaryWriter(str(self._folder), purge_step=self._purge_step)
            call(board)
            self._board, self._purge_step = board, None

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._say(
                    f"metrics can't be written to {self._folder}: {error.strerror or error}; training goes on"
                )


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file up to the first damaged line: a process that was killed tears the last one."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replaces a JSON lines file, whole or not at all."""
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_whole(path: Path, text: str) -> None:
    """Replaces a file, whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
