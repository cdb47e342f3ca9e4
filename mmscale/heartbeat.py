"""What a rank is doing, for those who watch it: a few numbers in a memory-mapped file, written in microseconds.

::

    beat = Heartbeat.from_environment()     # the file MMSCALE_HEARTBEAT names; without it, this process's memory
    beat.phase("forward")                   # ends the phase before
    beat.end_step(step=12, samples=96)
    read(path)                              # by another process: a Beat, or None while there is nothing to read

Nothing is sent and no thread runs, so a rank that sleeps, is stopped, or holds the interpreter's lock can be watched as
well as any other. The trade-off: only a process of the same machine can read it.
"""

from __future__ import annotations

import mmap
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ENVIRONMENT = "MMSCALE_HEARTBEAT"
# sync: waiting for the other ranks before a step; loss: the objective, which may exchange embeddings
PHASES = ("start", "data", "sync", "forward", "loss", "backward", "step", "save", "eval", "done")
RECENT = 64  # steps whose phases are kept

_RECORD = np.dtype(
    [
        ("sequence", "<u8"),  # odd while it is being written
        ("pid", "<i8"),
        ("step", "<i8"),  # steps that are done
        ("samples", "<i8"),  # of all ranks, that are consumed
        ("num_beats", "<u8"),
        ("phase", "<u8"),
        ("stop", "<u8"),
        ("since_s", "<f8"),  # when the phase began, CLOCK_MONOTONIC
        ("device_bytes", "<f8"),
        ("num_steps", "<u8"),  # of this process
        ("recent_s", "<f4", (RECENT, len(PHASES))),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Beat:
    """One look at a rank."""

    pid: int
    step: int  # steps that are done
    samples: int  # consumed by all ranks
    num_beats: int  # grows while the rank makes progress
    phase: str
    phase_s: float  # how long it has been in it
    stop: bool  # it has been sent SIGTERM
    device_bytes: float  # the most memory it has held on its device; 0 on a CPU
    num_steps: int  # since the process began
    recent_s: (
        np.ndarray
    )  # (min(num_steps, RECENT), phases) float32: seconds of the last steps by phase, oldest first


class Heartbeat:
    """Written by one rank. path: the file to make; None keeps the numbers in this process."""

    def __init__(self, path: Path | None = None) -> None:
        buffer: bytearray | mmap.mmap = bytearray(_RECORD.itemsize)
        if path is not None:
            with path.open("w+b") as file:
                file.truncate(_RECORD.itemsize)
                buffer = mmap.mmap(file.fileno(), _RECORD.itemsize)
        self._record = np.frombuffer(buffer, dtype=_RECORD)[0:1]
        self._spent = np.zeros(len(PHASES), np.float32)  # of the step under way
        self._phase, self._since = 0, time.monotonic()
        self._record["pid"] = os.getpid()
        self._begin(0)

    @staticmethod
    def from_environment() -> Heartbeat:
        path = os.environ.get(ENVIRONMENT)
        return Heartbeat(Path(path) if path else None)

    def phase(self, name: str) -> None:
        self._begin(PHASES.index(name))

    def beat(self) -> None:
        """Says that the present phase makes progress, as an evaluation does with each batch."""
        self._record["sequence"] += 1
        self._record["num_beats"] += 1
        self._record["since_s"] = time.monotonic()
        self._record["sequence"] += 1

    def end_step(self, *, step: int, samples: int) -> None:
        now = time.monotonic()
        self._spent[self._phase] += now - self._since
        self._since = now
        record = self._record
        record["sequence"] += 1
        record["recent_s"][0, int(record["num_steps"][0]) % RECENT] = self._spent
        record["num_steps"] += 1
        record["num_beats"] += 1
        record["step"], record["samples"] = step, samples
        record["sequence"] += 1
        self._spent[:] = 0

    def resume_at(self, *, step: int, samples: int) -> None:
        self._record["step"], self._record["samples"] = step, samples

    def set_stop(self) -> None:
        """For signal handlers."""
        self._record["stop"] = 1

    def set_device_bytes(self, number: float) -> None:
        self._record["device_bytes"] = number

    def recent_s(self) -> dict[str, float]:
        """The median seconds of each phase over the last steps."""
        rows = _recent(self._record[0])
        return dict(zip(PHASES, np.median(rows, axis=0).tolist(), strict=True)) if len(rows) else {}

    def _begin(self, phase: int) -> None:
        now = time.monotonic()
        self._spent[self._phase] += now - self._since
        self._phase, self._since = phase, now
        record = self._record
        record["sequence"] += 1
        record["num_beats"] += 1
        record["phase"], record["since_s"] = phase, now
        record["sequence"] += 1


def read(path: Path) -> Beat | None:
    """The newest state of a rank; None where there is no file yet, or no whole one."""
    with suppress(OSError):
        for _ in range(100):
            data = path.read_bytes()
            if len(data) < _RECORD.itemsize:
                return None
            record = np.frombuffer(data, dtype=_RECORD)[0]
            again = np.frombuffer(path.read_bytes()[:8], dtype="<u8")[0]
            if record["sequence"] % 2 == 0 and record["sequence"] == again and record["pid"]:
                return Beat(
                    pid=int(record["pid"]),
                    step=int(record["step"]),
                    samples=int(record["samples"]),
                    num_beats=int(record["num_beats"]),
                    phase=PHASES[int(record["phase"])],
                    phase_s=time.monotonic() - float(record["since_s"]),
                    stop=bool(record["stop"]),
                    device_bytes=float(record["device_bytes"]),
                    num_steps=int(record["num_steps"]),
                    recent_s=_recent(record),
                )
    return None


def _recent(record: np.void) -> np.ndarray:
    count = int(record["num_steps"])
    rows: np.ndarray = record["recent_s"]
    return rows[:count].copy() if count < RECENT else np.roll(rows, -(count % RECENT), axis=0)
