"""Kills processes and knows that they are gone; also the guard of a local Ray, when run as a script.

Two ways of naming processes, both safe against reuse of a process id: a process group within its session (a
rank and its children), and a mark in the environment that every process of a local Ray inherits. Linux
only, since it reads /proc; nothing but the standard library, so that the guard starts in milliseconds.

The guard, `python processes.py MARK FOLDER`, waits until its standard input closes, which happens too when
its starter is killed by a signal that nothing can catch. Then it ends what carries the mark and removes the
folder. (Ray's own processes follow their driver, but its agents took a minute to do so.)
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

_RAY_TAGS = (":job_id:", ":task_name:", ":actor_name:")  # lines that Ray writes for its own log monitor
MARK = "MMSCALE_LAUNCH"  # the environment variable that holds a local Ray's mark


def kill_group(group: int, session: int, *, timeout: float) -> list[int]:
    """Ends a process group of a session; returns the ids of what was still there after `timeout` seconds."""
    return _kill_until_gone(lambda pid: _group(pid) == (group, session), timeout=timeout)


def kill_marked(mark: str, *, timeout: float) -> list[int]:
    """Ends all processes that were started with MARK=mark, except this one; returns those that are left."""
    assignment = f"{MARK}={mark}".encode()
    return _kill_until_gone(lambda pid: assignment in _environment(pid), timeout=timeout)


def tail(path: str | None, *, num_lines: int = 30) -> str:
    """The last lines of a text file, or nothing where there is no such file."""
    try:
        with Path(path or os.devnull).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 100_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line for line in text.splitlines() if not line.startswith(_RAY_TAGS)]
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
    """State, parent, group and session of a process; empty where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()[:4]  # the name before it may hold anything


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


def main() -> None:
    mark, folder = sys.argv[1:]
    sys.stdin.buffer.read()
    kill_marked(mark, timeout=20)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
