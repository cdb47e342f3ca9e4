"""The launcher's eyes and hands on one node: looks at the ranks there, and ends them.

::

    agent = Agent(lease_s=20.0, launch_id="6f2a")     # a Ray actor, one a node
    path = agent.heartbeat_path(0)                    # MMSCALE_HEARTBEAT of rank 0, before it starts
    agent.watch({0: (group, session)})                # rank 0 leads a process group of its own
    heard, signs = agent.poll(heard)                  # a Sign for each rank; at once, and it renews the lease
    agent.stacks([0])                                 # what it executes, also of a process that is stopped
    agent.end([(group, session)], files)              # kills, and returns when they are gone

A rank does nothing for this but write its heartbeat (`mmscale.heartbeat`). All seconds are of this node's own clock.

The lease: when nobody has polled for lease_s, this node is cut off or its driver is dead, and another attempt may
begin elsewhere. It runs from the newest answer that the driver says it has heard, so it is over lease_s after the
driver last heard anything, however long a call was on its way. Then the ranks here are killed, and the agent too. A
small process of its own sees to that (`processes.py --ranks`), so that it also happens when this process is killed,
stopped or stuck; it survives Ray. Kill both at once and the ranks stay: `clear`, called by the agent of a later
attempt, ends those. The trade-off: a launcher that is stopped for longer than the lease loses its attempt, which a
restart brings back from the last checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmscale import heartbeat
from mmscale.heartbeat import Beat
from mmscale_launcher import processes

KILL_TIMEOUT = 10.0  # seconds until a killed process is gone
STACK_TIMEOUT = 10.0  # seconds py-spy gets; 0.3 s is usual
SIGNAL_WAIT = 0.5  # seconds a rank gets to write its stacks by itself
NUM_FRAMES = 8  # of each thread's stack, the innermost
_LOADER_THREAD = re.compile(r"mmscale-")  # the name of a thread that reads data begins so
_LOADER_FRAME = re.compile(r"mmscale/data/")


@dataclass(frozen=True, kw_only=True)
class Sign:
    """One look at a rank and its process."""

    rank: int
    beat: Beat | None  # None until it has begun to beat
    state: Literal["running", "stopped", "gone"]
    rss_bytes: int = 0
    cpu_s: float = 0.0


class Agent:
    """lease_s: None where something else ends the ranks of a dead driver, as on a local Ray."""

    def __init__(self, lease_s: float | None, launch_id: str = "local") -> None:
        self._launch_id = launch_id
        fresh = Path(tempfile.mkdtemp(prefix="mmscale-", dir=_memory_folder()))
        self._held = os.open(fresh, os.O_RDONLY)
        fcntl.flock(self._held, fcntl.LOCK_EX)  # before it has its name: others see that its agent lives
        self._folder = fresh.rename(fresh.with_name(f"{_prefix(launch_id)}{fresh.name[8:]}"))
        self._lease_s = lease_s
        self._given = {
            0: time.monotonic()
        }  # number of an answer -> when it was given; those that may be heard yet
        self._until = None if lease_s is None else self._given[0] + lease_s
        self._ranks: dict[int, tuple[int, int]] = {}
        self._beats: dict[int, Beat] = {}  # the last of each rank
        self._lock = threading.Lock()
        self._guard: int | None = None  # the writing end of its pipe
        self._tell_guard()

    def heartbeat_path(self, rank: int) -> str:
        """Where this rank writes its heartbeat; in memory, where there is such a folder."""
        return str(self._folder / f"rank-{rank}")

    def watch(self, ranks: Mapping[int, tuple[int, int]]) -> None:
        """Takes over these ranks, in place of those before: rank -> its process group, which it leads, and session."""
        self._ranks, self._beats = dict(ranks), {}
        self._tell_guard()

    def poll(self, heard: int) -> tuple[int, list[Sign]]:
        """A look at each rank, in microseconds, and the number of this answer.

        heard: the number of the newest answer that has reached the caller, 0 before the first: the lease runs from it.
        """
        with self._lock:
            number, now = max(self._given) + 1, time.monotonic()
            if self._lease_s is not None and heard in self._given:
                self._until = self._given[heard] + self._lease_s
            self._given = {n: given for n, given in self._given.items() if n >= heard} | {number: now}
        self._tell_guard()
        return number, self.look()

    def look(self) -> list[Sign]:
        return [self._look(rank) for rank in sorted(self._ranks)]

    def stacks(self, ranks: Iterable[int]) -> dict[int, str]:
        """What the main thread of each rank executes, innermost first, and the data threads if it waits for them."""
        dumps = {rank: _start_dump(self._ranks[rank][0]) for rank in ranks if rank in self._ranks}
        return {rank: self._stack(rank, dump) for rank, dump in dumps.items()}

    def signal(self, ranks: Iterable[int], number: int) -> None:
        """Sends a signal to the ranks' own processes, not to their children."""
        for rank in ranks:
            if rank in self._ranks and self._look(rank).state != "gone":
                with suppress(ProcessLookupError):
                    os.kill(self._ranks[rank][0], number)

    def end(self, groups: Iterable[tuple[int, int]], files: Iterable[str]) -> tuple[list[int], list[str]]:
        """Ends process groups; returns what couldn't be ended, and the files' last lines."""
        groups = set(groups)
        survivors = processes.kill_groups(groups, timeout=KILL_TIMEOUT)
        self.watch({rank: group for rank, group in self._ranks.items() if group not in groups})
        return survivors, [processes.tail(file) for file in files]

    def clear(self) -> list[int]:
        """Ends what dead agents of this launch left on this machine; returns what couldn't be ended. To be called
        before ranks start.
        """
        folders = [
            path for path in self._folder.parent.glob(f"{_prefix(self._launch_id)}*") if _is_left(path)
        ]
        names = [str(path) for path in folders]
        survivors = processes.kill_attempts(self._launch_id, names, timeout=KILL_TIMEOUT)
        for path in folders:
            shutil.rmtree(path, ignore_errors=True)
        return survivors

    def close(self) -> None:
        """Ends the ranks that are left, and what the agent itself holds."""
        self.end(list(self._ranks.values()), [])
        with self._lock:
            if self._guard is not None:
                os.close(self._guard)
                self._guard = None
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._held)

    def __ray_shutdown__(self) -> None:
        self.close()

    def _look(self, rank: int) -> Sign:
        group, session = self._ranks[rank]
        look = processes.look(group, session)
        beat = heartbeat.read(self._folder / f"rank-{rank}")
        if beat is not None:
            self._beats[rank] = beat
        beat = self._beats.get(rank)  # a rank that was stopped while it wrote leaves nothing that can be read
        return Sign(rank=rank, beat=beat, state=look.state, rss_bytes=look.rss_bytes, cpu_s=look.cpu_s)

    def _tell_guard(self) -> None:
        """How long the lease is, and whose groups are to be ended then; starts a guard if there is none."""
        with self._lock:
            line = json.dumps({"until": self._until, "groups": list(self._ranks.values())}).encode() + b"\n"
            if self._guard is not None:
                try:
                    os.write(self._guard, line)
                except BlockingIOError:
                    pass  # the guard is stopped, and will find the lines before
                except BrokenPipeError:
                    os.close(self._guard)
                    self._guard = None
            if self._guard is None:
                self._guard = _start_guard(self._folder, line)

    def _stack(self, rank: int, dump: subprocess.Popen[bytes] | str) -> str:
        if self._look(rank).state == "gone":
            problem = "the process is gone"
        elif isinstance(dump, str):
            problem = dump
        else:
            try:
                output, errors = dump.communicate(timeout=STACK_TIMEOUT)
                if dump.returncode == 0:
                    return _readable(json.loads(output))
                problem = errors.decode(errors="replace").strip().splitlines()[-1]
            except subprocess.TimeoutExpired:
                dump.kill()
                dump.wait()
                problem = f"py-spy gave no stack within {STACK_TIMEOUT:.0f} s"
            except (ValueError, IndexError):
                problem = "py-spy gave no stack"
        return stack_by_signal(self._ranks[rank][0]) or f"no stack: {problem}"


def stack_by_signal(pid: int) -> str:
    """The stack that the process itself writes on SIGUSR2 (`mmscale.runs` sets that up), which takes no right to look
    into it, but doesn't work while it is stopped; nothing where it doesn't.
    """
    try:
        log = Path(f"/proc/{pid}/fd/2").readlink()
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
        caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
        if not log.is_file() or caught is None or not int(caught[1], 16) >> (signal.SIGUSR2 - 1) & 1:
            return ""  # the signal would kill it
        before = log.stat().st_size
        os.kill(pid, signal.SIGUSR2)
        time.sleep(SIGNAL_WAIT)
        with log.open("rb") as file:
            file.seek(before)
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    frames = re.findall(r'  File "(.+)", line (\d+) in (.+)', text.rpartition("(most recent call first):")[2])
    lines = [f"  {name} ({_short(path)}:{line})" for path, line, name in frames]
    return "\n".join(["MainThread", *lines[:NUM_FRAMES]]) if lines else ""


def _prefix(launch_id: str) -> str:
    return f"mmscale-beats-{launch_id}-"


def _is_left(folder: Path) -> bool:
    """Its agent is dead."""
    try:
        held = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(held)
    return True


def _memory_folder() -> str:
    """A folder whose files never reach a disk, on which a rank would wait."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()


def _start_guard(folder: Path, line: bytes) -> int:
    """Starts the process that ends our ranks after us; returns the writing end of a pipe to it, which has the line."""
    command = [sys.executable, "-I", "-S", processes.__file__, "--ranks", str(folder), str(os.getpid())]
    # a local Ray's guard ends what carries its mark, and this one must outlive the agent to clear up after it
    environment = {name: value for name, value in os.environ.items() if name != processes.MARK}
    reading, writing = os.pipe()
    try:
        os.write(writing, line)
        os.set_blocking(writing, False)
        subprocess.run(
            command, stdin=reading, stdout=subprocess.DEVNULL, env=environment, cwd="/", check=True
        )
    finally:
        os.close(reading)
    return writing


def _start_dump(pid: int) -> subprocess.Popen[bytes] | str:
    """py-spy, under way; in words where it can't be started."""
    beside = Path(sys.executable).parent / "py-spy"
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    if program is None:
        return "py-spy is not installed"
    # it only reads the process's memory: a rank must not stop for it, and one that is stopped couldn't
    command = [program, "dump", "--nonblocking", "--json", "--pid", str(pid)]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _readable(threads: list[dict[str, Any]]) -> str:
    main = next((thread for thread in threads if thread["thread_name"] == "MainThread"), None)
    if main is None:
        main = threads[0]
    shown = [main]
    if any(_LOADER_FRAME.search(frame["filename"]) for frame in main["frames"]):
        shown += [
            thread
            for thread in threads
            if thread is not main and _LOADER_THREAD.match(thread["thread_name"] or "")
        ]
    return "\n".join(_thread(thread) for thread in shown)


def _thread(thread: dict[str, Any]) -> str:
    frames = [
        f"  {frame['name']} ({_short(frame['filename'])}:{frame['line']})"
        for frame in thread["frames"][:NUM_FRAMES]
    ]
    holds = ", holds the interpreter's lock" if thread.get("owns_gil") else ""
    return "\n".join([f"{thread['thread_name'] or 'a thread'}{holds}", *frames])


def _short(path: str) -> str:
    """The last three parts of a path, enough to know the file by."""
    return "/".join(path.rsplit("/", 3)[-3:])
