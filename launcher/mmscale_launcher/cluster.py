"""Connecting to a Ray: a cluster that is there, or one of our own on this machine that nothing is left of.

::

    with connected(config, "auto", emit) as cluster:      # None for a local one
        ...

A local Ray belongs to its run alone, and its guard process ends it even when the driver is killed by a signal that
can't be caught (see `mmscale_launcher.processes`): it costs some seconds at the start of every run. Signals meanwhile:
SIGTERM is an interrupt (`Stop` softens it), and none gets through while something is cleaned up.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

# Ray reads this once, when it is imported: the death of a rank is told by us, not by the raylet as well.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")

import ray
from ray.exceptions import RayError

from mmscale.errors import ConfigError
from mmscale_launcher import processes

if TYPE_CHECKING:
    from mmscale.config import Config

CPU_WORKERS = 2  # on a node without GPUs, unless launch.workers_per_node says otherwise
REACH_TIMEOUT = 5.0  # seconds a cluster gets to answer at all
OBJECT_STORE_BYTES = 100_000_000  # little goes through it: configs, events, one report a rank
ANSWER_TIMEOUT = 6.0  # seconds Ray gets to clean up by itself; 1.5 s is usual
MAX_SOCKET_PATH = 107  # bytes, a limit of Linux; Ray adds about 65 to its folder

OnEvent = Callable[[dict[str, Any]], None]
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    is_local: bool
    node_id: str | None  # of the driver, None where it isn't on a node of the cluster
    address: str | None  # None for a local one


@contextmanager
def connected(config: Config, address: str | None, emit: OnEvent) -> Iterator[Cluster]:
    """Connects to a Ray, local or not, and leaves it as it was found: gone, running, or connected."""
    was_connected = ray.is_initialized()
    if address is None and was_connected:
        raise ConfigError(
            "this process is connected to a Ray already, so a local one can't be started: give an address"
        )
    with interruptible():
        if address is None:
            with _own_mode(), local_ray(config, emit):
                context = ray.get_runtime_context()
                yield Cluster(is_local=True, node_id=context.get_node_id(), address=None)
            return
        if not was_connected:
            join(address)
        try:
            if address.startswith("ray://"):
                yield Cluster(is_local=False, node_id=None, address=address)
            else:
                context = ray.get_runtime_context()
                yield Cluster(is_local=False, node_id=context.get_node_id(), address=context.gcs_address)
        finally:
            if not was_connected:
                with uninterrupted():
                    ray.shutdown()


@contextmanager
def _own_mode() -> Iterator[None]:
    """Takes back that a local Ray asks for a token. A driver that brings one to a cluster without can't be called back,
    so the cluster takes it for dead: "all references to the actor were removed". Processes that this one starts later
    are safe then; Ray in this one keeps the mode for good.
    """
    with _restored(("RAY_AUTH_MODE", "PYTHONBREAKPOINT")):
        yield


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that isn't there, and says so in its own words."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"address={address}: give auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT).close()
    except OSError as error:
        raise ConfigError(f"can't join a Ray cluster at {address}: {error.strerror or error}") from None


TOKEN_HINT = (
    "\nThe head asks for a token: copy its ~/.ray/auth_token to every machine and set RAY_AUTH_MODE=token there, "
    "for `ray start` and for this command"
)


def join(address: str) -> None:
    if address != "auto":
        _check_reachable(address)
    packages = [importlib.util.find_spec(name) for name in ("mmscale", "mmscale_kernels", "mmscale_launcher")]
    folders = [
        spec.submodule_search_locations[0] for spec in packages if spec and spec.submodule_search_locations
    ]
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": folders},  # the nodes run the code of the driver
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        hint = TOKEN_HINT if re.search("auth|token", str(error), re.IGNORECASE) else ""
        raise ConfigError(f"can't join a Ray cluster at {address}: {error}{hint}") from None


@contextmanager
def local_ray(config: Config, emit: OnEvent) -> Iterator[None]:
    if config.launch.nodes > 1:
        raise ConfigError(
            f"launch.nodes={config.launch.nodes} needs a cluster, a local Ray is one node: give its address"
        )
    num_workers = config.launch.workers_per_node or CPU_WORKERS
    num_cores = len(os.sched_getaffinity(0))
    if num_workers > num_cores:
        emit(message(f"{num_workers} ranks share {num_cores} CPU cores"))
    folder = _short_folder()
    mark = uuid.uuid4().hex
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", processes.__file__, mark, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C reaches the whole process group of the driver
    )
    try:
        environment = {
            processes.MARK: mark,
            "SPT_NOENV": "1",  # else setproctitle, in each of Ray's Python processes, writes over the mark
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with _environment(environment):
            ray.init(
                address="local",
                num_cpus=num_workers + 2,  # Ray starts a process for each beforehand; two aren't ranks
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
            )
        yield
    finally:
        with uninterrupted():
            assert guard.stdin is not None
            # a SIGTERM to the whole process group leaves a Ray that answers no more: then the guard comes
            # first
            impatience = threading.Timer(ANSWER_TIMEOUT, guard.stdin.close)
            impatience.start()
            ray.shutdown()
            impatience.cancel()
            guard.stdin.close()
            guard.wait()


def _short_folder() -> str:
    for parent in (tempfile.gettempdir(), "/tmp"):
        folder = tempfile.mkdtemp(prefix="mmscale-", dir=parent)
        if len(os.fsencode(folder)) + 70 <= MAX_SOCKET_PATH:
            return folder
        Path(folder).rmdir()
    raise ConfigError(
        f"the folder for temporary files, {tempfile.gettempdir()}, is too long a path for sockets"
    )


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    with _restored(changes):
        os.environ.update(changes)
        yield


@contextmanager
def _restored(names: Iterable[str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """Calls something of Ray that may never return when Ray is half gone. Raises TimeoutError, or what it raised."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"Ray didn't answer within {seconds:g} s")
    return answers[0]


def is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM is an interrupt, so that `finally` runs; Ray, too, sets a handler and leaves it behind."""
    if not is_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Cleaning up takes seconds; a second Ctrl-C must not end it half way."""
    if not is_main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class Stop:
    """What SIGTERM does: while ranks run they are asked to save and stop; else, or at the second, an interrupt."""

    def __init__(self) -> None:
        self.ranks_run = self.requested = False

    def __call__(self, number: int, frame: object) -> None:
        if self.requested or not self.ranks_run:
            raise KeyboardInterrupt
        self.requested = True


def message(text: str) -> dict[str, Any]:
    return {"event": "message", "text": text}
