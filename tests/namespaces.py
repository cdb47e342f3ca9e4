"""Machines with addresses and links of their own, on this machine: network namespaces around one bridge.

    with Network() as network:
        head, other = network.machine(), network.machine()
        address = head.start_ray()                       # `ray start --head`
        other.start_ray(address)                         # `ray start --address=...`
        done = head.run(["mmscale", "launch", ...])
        other.cut()                                      # its cable is pulled; `mend()` plugs it in again

The bridge lies in a namespace too, so nothing of this machine's own network is touched and networks don't meet, though
all use the same addresses. Needs root and `ip`: mark tests with `needs_namespaces`. What the machines share is the file
system; `start_ray(..., own_disk=FOLDER)` gives one an empty disk of its own at that place. All processes of a machine
are killed when the network ends; what a killed test left behind, the next one removes.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

PREFIX = "mm"  # of namespaces, followed by the process they belong to
PORT = 6379
ROUTER = "10.77.0.254"
TOKEN = "0123456789abcdef" * 4  # what the machines of a cluster know each other by
BIN = Path(sys.executable).parent

# Ray finds a lost node in seconds, and doesn't wait minutes for a head that is gone.
QUICK_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def _can_make_namespaces() -> str:
    """Why not, in words; "" if we can."""
    if shutil.which("ip") is None:
        return "needs the `ip` command"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"{PREFIX}-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if made.returncode == 0 else f"can't make a network namespace: {made.stderr.strip()}"


_OBSTACLE = _can_make_namespaces()
needs_namespaces = pytest.mark.skipif(bool(_OBSTACLE), reason=_OBSTACLE)


class Network:
    """Machines on one bridge. A context manager."""

    _numbers = itertools.count(1)

    def __enter__(self) -> Network:
        _remove_left()
        self._name = f"{PREFIX}-{os.getpid()}-{next(self._numbers)}"
        self.machines: list[Machine] = []
        try:
            _ip("netns", "add", self._name)
            _ip("-n", self._name, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._name, "address", "add", f"{ROUTER}/24", "dev", "bridge")
            _ip("-n", self._name, "link", "set", "bridge", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for machine in self.machines:
            machine.remove()
        subprocess.run(["ip", "netns", "del", self._name], capture_output=True, check=False)

    def machine(self) -> Machine:
        machine = Machine(self._name, len(self.machines) + 1)
        self.machines.append(machine)
        machine.make()
        return machine


class Machine:
    """One namespace. address: its IPv4 address. Made by `Network.machine`."""

    def __init__(self, network: str, number: int) -> None:
        self._network, self._number = network, number
        self.name, self.address = f"{network}-{number}", f"10.77.0.{number}"
        self._link = f"to-{number}"  # the bridge's end of our cable
        # short, for Ray's sockets
        self.folder = Path(tempfile.mkdtemp(prefix="mm-", dir="/tmp"))
        (self.folder / "ray").mkdir()
        self.environment: dict[str, str] = {
            "RAY_TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",  # as README has it; Ray's head asks for one wherever it finds ~/.ray/auth_token
            "RAY_AUTH_TOKEN": TOKEN,
            **QUICK_CHECKS,
        }

    def make(self) -> None:
        _ip("netns", "add", self.name)
        _ip(
            *("-n", self._network, "link", "add", self._link, "type", "veth"),
            *("peer", "name", "eth0", "netns", self.name),
        )
        _ip("-n", self._network, "link", "set", self._link, "master", "bridge", "up")
        _ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.name, "link", "set", "eth0", "up")
        _ip("-n", self.name, "link", "set", "lo", "up")
        # it leads nowhere; Ray, as others, finds its own address by it
        _ip("-n", self.name, "route", "add", "default", "via", ROUTER)

    def remove(self) -> None:
        self.kill_all()
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def cut(self) -> None:
        """Nothing goes to or comes from this machine any more; connections aren't closed, they hang."""
        _ip("-n", self._network, "link", "set", self._link, "down")

    def mend(self) -> None:
        _ip("-n", self._network, "link", "set", self._link, "up")

    def popen(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """Starts a command on this machine, in a session of its own."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *map(str, command)],
            env={**os.environ, **self.environment, **(environment or {})},
            text=True,
            start_new_session=True,
            **options,
        )

    def run(
        self, command: Sequence[str | Path], *, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this machine and returns how it ended, output included."""
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        try:
            out, errors = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(list(command), process.returncode, out, errors)

    def start_ray(self, head: str | None = None, *, num_cpus: int = 2, own_disk: Path | None = None) -> str:
        """`ray start`, as the head, or as a node of the cluster whose head is at an address. Returns the head's."""
        place = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if head is None
            else [f"--address={head}"]
        )
        command = [
            *(str(BIN / "ray"), "start", *place),
            f"--node-ip-address={self.address}",
            f"--num-cpus={num_cpus}",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
        ]
        if own_disk is not None:  # `ip netns exec` gives the command mounts of its own
            own_disk.mkdir(parents=True, exist_ok=True)
            command = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(own_disk), *command]
        # into a file: the processes it leaves behind would hold a pipe open
        log = self.folder / "start.log"
        with log.open("w") as file:
            code = self.popen(command, stdout=file, stderr=file).wait(timeout=60)
        if code:
            raise RuntimeError(f"ray start failed on {self.name}: {log.read_text()}")
        return head or f"{self.address}:{PORT}"

    def processes(self) -> list[int]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    def find(self, part: str) -> list[int]:
        """Processes of this machine whose command line, or title, holds a text."""
        return [pid for pid in self.processes() if part in command_of(pid)]

    def kill_all(self) -> None:
        """As if its power were cut."""
        _kill(self.name)


def command_of(pid: int) -> str:
    """The command line of a process, "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _kill(name: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        if not listed.stdout.split():
            return
        for pid in map(int, listed.stdout.split()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def _remove_left() -> None:
    """Namespaces of test processes that are gone."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    for line in listed.stdout.splitlines():
        name = line.split()[0]
        prefix, _, rest = name.partition("-")
        owner = rest.partition("-")[0]
        if prefix == PREFIX and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _kill(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
