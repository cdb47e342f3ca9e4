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
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from mmscale.world import World

Event = dict[str, Any]


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


def mean_losses(pending: Sequence[tuple[str, torch.Tensor]], world: World) -> dict[str, float]:
    """The mean loss over the steps since the last log: of all, and of each task."""
    values = world.sum(torch.stack([loss for _, loss in pending]).tolist())
    groups: dict[str, list[float]] = {"all": values}
    for (name, _), value in zip(pending, values, strict=True):
        groups.setdefault(name, []).append(value)
    return {name: sum(group) / len(group) for name, group in groups.items()}


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has held: of the device, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if sys.platform != "darwin" else kib / 2**30


class Writer:
    """Appends to metrics.jsonl and TensorBoard's events in a run's folder. For rank 0.

    A resumed run writes on after the checkpoint's step: lines beyond it, from the run that was cut off, are dropped.
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        write_json_lines(path, [line for line in read_json_lines(path) if line["step"] <= resume_step])
        self._file = path.open("a", encoding="utf-8")
        # TensorBoard then ignores what lies beyond in older files. A run that starts over evaluates at step 0 again.
        self._board = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def log(self, line: Mapping[str, Any]) -> None:
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(known) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                place = name if "/" in name else f"train/{name}"
                self._board.add_scalar(place, value, line["step"])
        self._board.flush()  # else two minutes of curves are lost with a process that is killed

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def image(self, name: str, picture: Any, step: int) -> None:
        """A (H, W, 3) uint8 array."""
        self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()


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
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(path)


class ProgressBar:
    """Draws a run's events: a bar on a terminal, one plain line an interval in a pipe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None

    def update(self, event: Event) -> None:
        kind = event["event"]
        if kind == "log":
            self._log(event)
        elif kind == "message":
            self._say(event["text"])

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _log(self, event: Event) -> None:
        step, total = event["step"], event["total_steps"]
        facts = [
            f"loss {event['loss']:.3f}",
            f"{event['samples_per_s']:.0f} samples/s",
            f"data wait {event['data_wait_frac']:.0%}",
            f"ETA {'?' if event['eta_s'] is None else clock_text(event['eta_s'])}",
        ]
        if not self._stream.isatty():
            place = str(step) if total is None else f"{step}/{total}"
            print(f"step {place}: {', '.join(facts)}", file=self._stream, flush=True)
            return
        if self._bar is None:
            place = "step {n}" if total is None else "{percentage:3.0f}% |{bar:10}| {n}/{total}"
            # The facts travel as the description: tqdm puts a comma before a postfix.
            self._bar = tqdm(
                total=total,
                file=self._stream,
                # A terminal that doesn't know its size says 0, and tqdm would draw nothing.
                ncols=os.get_terminal_size(self._stream.fileno()).columns or 100,
                nrows=24,
                bar_format=place + "  {desc}",
                mininterval=0,
            )
        self._bar.n = step
        self._bar.set_description_str("  ".join(facts), refresh=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def clock_text(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
