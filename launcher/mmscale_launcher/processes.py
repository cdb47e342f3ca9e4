"""Looks at processes, kills them and knows that they are gone; also two kinds of guards, when run as a script.

Two ways of naming processes, both safe against reuse of a process id: a process group within its session (a
rank and its children), and a mark in the environment that every process of a local Ray inherits. Linux
only, since it reads /proc; nothing but the standard library, so that the guard starts in milliseconds.

The guard of a local Ray, `python processes.py MARK FOLDER`, waits until its standard input closes, which
happens too when its starter is killed by a signal that nothing can catch. Then it ends what carries the mark
and removes the folder. (Ray's own processes follow their driver, but its agents took a minute to do so.)

The guard of ranks, `python processes.py --ranks LEASE FOLDER PID`, is told process groups by an agent, and ends
them when the agent is gone, or has sent no line for LEASE seconds; in that case it ends the agent, PID, as well.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_RAY_TAGS = (":job_id:", ":task_name:", ":actor_name:")  # lines that Ray writes for its own log monitor
_OUR_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # what a rank says in its log is told already
MARK = "MMSCALE_LAUNCH"  # the environment variable that holds a local Ray's mark
ATTEMPT = "MMSCALE_ATTEMPT"  # and the one with the id of an attempt, LAUNCH-NUMBER
GUARD_TIMEOUT = 20.0  # seconds for what has been killed to be gone


def kill_group(group: int, session: int, *, timeout: float) -> list[int]:
    """Ends a process group of a session; returns the ids of what was still there after `timeout` seconds."""
    return kill_groups([(group, session)], timeout=timeout)


def kill_groups(groups: Collection[tuple[int, int]], *, timeout: float) -> list[int]:
    """The same for several, all at once."""
    return _kill_until_gone(lambda pid: _group(pid) in groups, timeout=timeout) if groups else []


def kill_attempts(launch_id: str, folders: Collection[str], *, timeout: float) -> list[int]:
    """Ends what attempts of a launch left: the groups of ranks, which have mapped a file in one of `folders`, and
    what has inherited the id of such an attempt (a rank itself has it set later). Returns what is left.
    """
    mapped = [f" {folder}/".encode() for folder in folders]
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()] if folders else []
    ranks = [pid for pid in pids if any(part in _maps(pid) for part in mapped)]
    groups = {group for pid in ranks if (group := _group(pid)) is not None}
    survivors = kill_groups(groups, timeout=timeout)
    assignment = f"{ATTEMPT}={launch_id}-".encode()
    return survivors + _kill_until_gone(
        lambda pid: any(entry.startswith(assignment) for entry in _environment(pid)), timeout=timeout
    )


def kill_marked(mark: str, *, timeout: float) -> list[int]:
    """Ends all processes that were started with MARK=mark, except this one; returns those that are left."""
    assignment = f"{MARK}={mark}".encode()
    return _kill_until_gone(lambda pid: assignment in _environment(pid), timeout=timeout)


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at a process."""

    state: Literal["running", "stopped", "gone"]  # "running", "stopped" by a signal or a debugger, or "gone"
    rss_bytes: int = 0
    cpu_s: float = 0.0  # that all its threads have used


def look(pid: int, session: int) -> Look:
    """A process that has gone to another session is another process."""
    fields = _status(pid)
    if not fields or fields[0] in "ZX" or int(fields[3]) != session:
        return Look(state="gone")
    ticks = int(fields[11]) + int(fields[12])
    return Look(
        state="stopped" if fields[0] in "Tt" else "running",
        rss_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        cpu_s=ticks / os.sysconf("SC_CLK_TCK"),
    )


def tail(path: str | None, *, num_lines: int = 30, start: int = 0) -> str:
    """The last lines of a text file, of what follows its byte `start`, or nothing where there is no such file."""
    try:
        with Path(path or os.devnull).open("rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - 100_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [
        line for line in text.splitlines() if not line.startswith(_RAY_TAGS) and not _OUR_LINE.match(line)
    ]
    return "\n".join(lines[-num_lines:]).strip()


def _kill_until_gone(wanted: Callable[[int], bool], *, timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    while True:
        # a process may start another before it goes, so each round looks again
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        left = [pid for pid in pids if pid != os.getpid() and _is_alive(pid) and wanted(pid)]
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        time.sleep(0.02)


def _status(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process: /proc/PID/stat from its third field; empty where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def _is_alive(pid: int) -> bool:
    status = _status(pid)
    return bool(status) and status[0] not in "ZX"  # a zombie holds nothing any more


def _group(pid: int) -> tuple[int, int] | None:
    status = _status(pid)
    return (int(status[2]), int(status[3])) if status else None


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _maps(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return b""


def _guard_ranks(folder: str, agent: int) -> None:
    """Each line of the input says until when the lease is (CLOCK_MONOTONIC, null for ever), and what ends with it."""
    if os.fork():
        return  # Ray kills the children of a process of its that ends, and this one must live on
    os.setsid()
    text = b""
    groups: list[tuple[int, int]] = []
    until: float | None = None
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([0], [], [], left)[0]:
            os.kill(agent, signal.SIGKILL)  # its end of the pipe is open, so this is still its id
            break
        data = os.read(0, 1 << 16)
        if not data:
            break  # the agent has ended
        *lines, text = (text + data).split(b"\n")
        if lines:
            newest = json.loads(lines[-1])
            until, groups = newest["until"], [(group, session) for group, session in newest["groups"]]
    kill_groups(groups, timeout=GUARD_TIMEOUT)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    if sys.argv[1] == "--ranks":
        folder, agent = sys.argv[2:]
        _guard_ranks(folder, int(agent))
        return
    mark, folder = sys.argv[1:]
    sys.stdin.buffer.read()
    kill_marked(mark, timeout=GUARD_TIMEOUT)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
