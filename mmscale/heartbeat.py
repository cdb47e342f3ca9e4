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
import struct
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
        ("sequence", "u8"),  # odd while it is being written
        ("pid", "i8"),
        ("step", "i8"),  # steps that are done
        ("samples", "i8"),  # of all ranks, that are consumed
        ("num_beats", "u8"),
        ("phase", "u8"),
        ("stop", "u8"),
        ("since_s", "f8"),  # when the phase began, CLOCK_MONOTONIC
        ("device_bytes", "f8"),
        ("num_steps", "u8"),  # of this process
        ("num_phases", "u8"),  # begun since the last step ended
        ("recent_s", "f4", (RECENT, len(PHASES))),
    ]
)


# Writing by way of numpy takes five times as long. The machine's own formats: struct writes others byte by byte.
_SEQUENCE, _NUMBER, _SECONDS = struct.Struct("Q"), struct.Struct("q"), struct.Struct("d")
_ROW = struct.Struct(f"{len(PHASES)}f")
_AT = {name: int(_RECORD.fields[name][1]) for name in _RECORD.names}  # type: ignore[union-attr, index]


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
    num_phases: int  # begun since the last step ended: (step, num_phases) tells who is behind
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
        self._buffer = buffer
        self._sequence = self._num_beats = self._num_steps = self._num_phases = 0
        self._spent = [0.0] * len(PHASES)  # of the step under way
        self._phase, self._since = 0, time.monotonic()
        self._number("pid", os.getpid())
        self.phase(PHASES[0])

    @staticmethod
    def from_environment() -> Heartbeat:
        path = os.environ.get(ENVIRONMENT)
        return Heartbeat(Path(path) if path else None)

    def phase(self, name: str) -> None:
        now = time.monotonic()
        self._spent[self._phase] += now - self._since
        self._phase, self._since = PHASES.index(name), now
        self._num_beats += 1
        self._num_phases += 1
        self._turn()
        self._number("num_beats", self._num_beats)
        self._number("num_phases", self._num_phases)
        self._number("phase", self._phase)
        self._seconds("since_s", now)
        self._turn()

    def beat(self) -> None:
        """Says that the present phase makes progress, as an evaluation does with each batch."""
        self._num_beats += 1
        self._turn()
        self._number("num_beats", self._num_beats)
        self._seconds("since_s", time.monotonic())
        self._turn()

    def end_step(self, *, step: int, samples: int) -> None:
        now = time.monotonic()
        self._spent[self._phase] += now - self._since
        self._since = now
        row = _AT["recent_s"] + self._num_steps % RECENT * _ROW.size
        self._num_steps += 1
        self._num_beats += 1
        self._num_phases = 0
        self._turn()
        _ROW.pack_into(self._buffer, row, *self._spent)
        self._number("num_steps", self._num_steps)
        self._number("num_beats", self._num_beats)
        self._number("num_phases", 0)
        self._number("step", step)
        self._number("samples", samples)
        self._turn()
        self._spent = [0.0] * len(PHASES)

    def resume_at(self, *, step: int, samples: int) -> None:
        self._turn()
        self._number("step", step)
        self._number("samples", samples)
        self._turn()

    def set_stop(self) -> None:
        """For signal handlers."""
        self._number("stop", 1)

    def set_device_bytes(self, number: float) -> None:
        self._seconds("device_bytes", number)

    def recent_s(self) -> dict[str, float]:
        """The median seconds of each phase over the last steps."""
        rows = _recent(np.frombuffer(self._buffer, dtype=_RECORD)[0])
        return dict(zip(PHASES, np.median(rows, axis=0).tolist(), strict=True)) if len(rows) else {}

    def _turn(self) -> None:
        """Before a change and after it."""
        self._sequence += 1
        _SEQUENCE.pack_into(self._buffer, 0, self._sequence)

    def _number(self, name: str, value: int) -> None:
        _NUMBER.pack_into(self._buffer, _AT[name], value)

    def _seconds(self, name: str, value: float) -> None:
        _SECONDS.pack_into(self._buffer, _AT[name], value)


def read(path: Path) -> Beat | None:
    """The newest state of a rank; None where there is no file yet, or no whole one."""
    with suppress(OSError), path.open("rb", buffering=0) as file:
        for _ in range(100):
            before = os.pread(file.fileno(), _SEQUENCE.size, 0)
            data = os.pread(file.fileno(), _RECORD.itemsize, 0)
            after = os.pread(file.fileno(), _SEQUENCE.size, 0)
            if len(data) < _RECORD.itemsize:
                return None
            record = np.frombuffer(data, dtype=_RECORD)[0]
            if record["sequence"] % 2 == 0 and before == after and record["pid"]:
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
                    num_phases=int(record["num_phases"]),
                    recent_s=_recent(record),
                )
    return None


def _recent(record: np.void) -> np.ndarray:
    count = int(record["num_steps"])
    rows: np.ndarray = record["recent_s"]
    return rows[:count].copy() if count < RECENT else np.roll(rows, -(count % RECENT), axis=0)
