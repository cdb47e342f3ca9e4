"""The two sides of a run that survives what it measures: a worker runs cases, its supervisor keeps what they emit.

A kernel that faults takes the device's context with it, and one that hangs takes the process. So cases run in a worker
process that writes JSON lines to its standard output, and the supervisor writes them to the result file at once, kills
a worker that takes too long over a case, and starts another one on the rest. Standard library alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

FATAL_EXIT = 3
# Seconds over the deadline that a case may still use before it is killed.
GRACE = 20.0


class Fatal(Exception):
    """The device's context is gone: nothing more can run in this process."""


def emitter(stream: IO[str]) -> Callable[..., None]:
    def emit(kind: str, **fields: Any) -> None:
        stream.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **fields}) + "\n")
        stream.flush()

    return emit


def own_stdout() -> IO[str]:
    """The standard output for lines alone: what else would be printed there goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def work(
    cases: Mapping[str, tuple[Callable[[Any, Any], None], float]],
    names: list[str],
    setting: Any,
    deadline: float,
    emit: Callable[..., None],
    after: Callable[[], None] = lambda: None,
) -> int:
    """Run cases in order and return the exit code. One that raises is recorded; without time for it, it is skipped."""
    for name in names:
        run, needs = cases[name]
        left = deadline - time.time()
        if left < needs:
            emit(
                "skipped",
                case=name,
                why=f"{max(0.0, left):.0f} s of the budget were left, it needs {needs:.0f} s",
            )
            continue
        emit("start", case=name, limit_s=max(90.0, 4 * needs))
        began = time.perf_counter()
        try:
            run(setting, emit)
        except Exception as error:
            fatal = isinstance(error, Fatal)
            if not fatal:
                text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                emit("failure", case=name, error=text, fatal=False)
                error.__traceback__ = None
            else:
                return FATAL_EXIT
        emit("done", case=name, seconds=round(time.perf_counter() - began, 2))
        after()
    return 0


class Supervisor:
    """Runs workers one after the other until every case is done, skipped or given up; `write` gets each line."""

    def __init__(self, command: Callable[[list[str], list[tuple[str, str]]], list[str]], log: Path) -> None:
        """command: (names still to run, (case, contender) pairs to leave out) -> the worker's command line."""
        self.command, self.log = command, log

    def run(self, names: list[str], deadline: float, write: Callable[[dict[str, Any]], None]) -> None:
        excluded: list[tuple[str, str]] = []
        while names:
            current, culprit, ended, left = self._one(names, excluded, deadline, write)
            if not left:
                return
            if current is None:
                # It died before or between cases: another one would, too.
                for name in left:
                    write({"kind": "skipped", "case": name, "why": f"the worker ended: {ended}"})
                return
            if culprit is None:
                write({"kind": "failure", "case": current, "error": ended, "fatal": True})
                names = left[1:]
            else:
                excluded.append((current, culprit))
                names = left
            if time.time() > deadline:
                for name in names:
                    write({"kind": "skipped", "case": name, "why": "the budget was spent"})
                return

    def _one(
        self,
        names: list[str],
        excluded: list[tuple[str, str]],
        deadline: float,
        write: Callable[[dict[str, Any]], None],
    ) -> tuple[str | None, str | None, str, list[str]]:
        """One worker: (the case it ended in, the contender that ended it, how, cases not finished)."""
        lines: queue.Queue[str | None] = queue.Queue()
        left = list(names)
        current: str | None = None
        culprit: str | None = None
        until = deadline + GRACE + 60  # for starting up
        with self.log.open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                self.command(names, excluded), stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8"
            )
            assert process.stdout is not None
            stdout = process.stdout

            def pump() -> None:
                for text in stdout:
                    lines.put(text)
                lines.put(None)

            threading.Thread(target=pump, daemon=True).start()
            ended = ""
            try:
                while True:
                    try:
                        text = lines.get(timeout=max(0.1, until - time.time()))
                    except queue.Empty:
                        ended = "it was killed: it took too long"
                        break
                    if text is None:
                        ended = f"the worker's exit code was {process.wait()}"
                        break
                    with contextlib.suppress(json.JSONDecodeError):
                        line = json.loads(text)
                        if line["kind"] == "start":
                            current, culprit = line["case"], None
                            until = min(time.time() + line["limit_s"], max(deadline, time.time()) + GRACE)
                            continue
                        if line["kind"] == "failure" and line.get("fatal"):
                            culprit = line.get("contender")
                        if line["kind"] == "done" or (line["kind"] == "skipped" and line["case"] in left):
                            left.remove(line["case"])
                            current = None
                            until = deadline + GRACE
                        write(line)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        return current, culprit, ended, left


def machine() -> dict[str, Any]:
    """What can be said of the machine without torch."""
    import platform

    found: dict[str, Any] = {
        "host_cpu": platform.processor() or platform.machine(),
        "num_cpus": os.cpu_count(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
    }
    query = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        first = done.stdout.splitlines()[0].split(", ")
        found.update(zip((name.replace(".", "_") for name in query.split(",")), first, strict=False))
        found["driver"] = found.pop("driver_version")
    root = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=60, check=True
        )
        found.update(commit=head.stdout.strip(), dirty=bool(status.stdout.strip()))
    return found
