"""What a run says of itself on the terminal: one bar, one plain line an interval in a pipe.

::

    bar = ProgressBar()             # on stderr
    train(config, bar.update)       # or launch(config, on_event=bar.update)
    bar.close()

The bar shows rank 0's figures. Under the launcher it adds what the ranks do where that matters: how many there are,
how often they were restarted, the one that is behind. The trade-off: what changes every second goes to terminals
only, so a pipe tells of a slow rank when the supervisor has something to say about it, not before.
"""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

SLOW_S = 5.0  # in one phase: then a rank is named


class ProgressBar:
    """Draws a run's events: a bar on a terminal, one plain line an interval in a pipe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        self._line: dict[str, Any] | None = None  # the newest of rank 0's log
        self._status: dict[str, Any] | None = None  # the newest of the supervisor's
        self._total: int | None = None  # what the bar was made for
        self._has_line = False

    def update(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "log":
            self._line = event
            if self._stream.isatty():
                self._draw()
            else:
                place = _place(event["step"], event["total_steps"])
                self._say(f"step {place}: {', '.join([*_facts(event), *_few(self._status)])}")
        elif kind == "ranks":
            self._status = event["status"]
            if self._stream.isatty():
                self._draw()
        elif kind == "message":
            self._say(event["text"])

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _draw(self) -> None:
        facts = [*(_facts(self._line) if self._line else []), *rank_facts(self._status)]
        if not facts:
            return
        total = self._line["total_steps"] if self._line else None
        if self._bar is None or self._total != total or self._has_line != (self._line is not None):
            self.close(keep=False)
            self._total, self._has_line = total, self._line is not None
            place = "{percentage:3.0f}% |{bar:10}| {n}/{total}  {desc}"
            if total is None:
                place = "step {n}  {desc}" if self._line else "{desc}"
            # The facts travel as the description: tqdm puts a comma before a postfix.
            self._bar = tqdm(
                total=total,
                file=self._stream,
                # A terminal that doesn't know its size says 0, and tqdm would draw nothing.
                ncols=os.get_terminal_size(self._stream.fileno()).columns or 100,
                nrows=24,
                bar_format=place,
                mininterval=0,
            )
        self._bar.n = self._line["step"] if self._line else 0
        self._bar.set_description_str("  ".join(facts), refresh=True)

    def close(self, *, keep: bool = True) -> None:
        """Ends the bar, which stays on the screen if it is kept."""
        if self._bar is not None:
            self._bar.leave = keep
            self._bar.close()
            self._bar = None


def _place(step: int, total: int | None) -> str:
    return str(step) if total is None else f"{step}/{total}"


def _facts(line: dict[str, Any]) -> list[str]:
    return [
        f"loss {line['loss']:.3f}" if line["loss"] is not None else "loss not finite",
        f"{line['samples_per_s']:.0f} samples/s",
        f"data wait {line['data_wait_frac']:.0%}",
        *([f"bad {line['data/bad_frac']:.2%}"] if line.get("data/bad_frac") else []),
        f"ETA {'?' if line.get('eta_s') is None else clock_text(line['eta_s'])}",
    ]


def _few(status: dict[str, Any] | None) -> list[str]:
    """What is out of the ordinary about the whole of the ranks."""
    if status is None:
        return []
    idle, restarts = status.get("idle_workers") or 0, status.get("restarts") or 0
    return [
        *([f"{idle} worker{'s' * (idle > 1)} idle"] if idle else []),
        *([f"{restarts} restart{'s' * (restarts > 1)}"] if restarts else []),
    ]


def rank_facts(status: dict[str, Any] | None) -> list[str]:
    """What a launched run's ranks do, as far as it matters: their state unless they run, number, the last of them."""
    if status is None:
        return []
    state, ranks = status.get("state", "running"), status.get("ranks") or []
    facts = [] if state == "running" else [state]
    nodes = {rank.get("node") for rank in ranks}
    if len(ranks) > 1:
        facts.append(f"{len(ranks)} ranks" + (f" on {len(nodes)} nodes" if len(nodes) > 1 else ""))
    facts += _few(status)
    last = slowest(ranks)
    if last is not None and state not in ("done", "stopped", "failed"):
        if last.get("process", "running") != "running":
            facts.append(f"rank {last['rank']} {last['process']}")
        elif (last.get("phase_s") or 0.0) >= SLOW_S and last.get("phase") not in (None, "done"):
            facts.append(f"rank {last['rank']} {last['phase']} {last['phase_s']:.0f} s")
    return facts


def slowest(ranks: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rank that holds up the others: stopped or gone, else the fewest steps, else longest in a phase of its own."""
    return min(
        ranks,
        key=lambda rank: (
            rank.get("process", "running") == "running",
            rank.get("step") or 0,
            rank.get("phase") == "sync",  # it waits for the others
            -(rank.get("phase_s") or 0.0),
        ),
        default=None,
    )


def clock_text(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
