"""What runs in a rank's process: set the environment, run the worker function, hand back how it ended.

`Rank` and `Reporter` are made into Ray actors by `mmscale_launcher.attempt`. An exception of the worker
function comes back as data, so the driver doesn't depend on how Ray wraps it; a Ray error in its place
always means that the process, or its node, is gone.
"""

from __future__ import annotations

import importlib
import os
import pickle
import re
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from mmscale import errors, heartbeat
from mmscale.doctor import interface_for

# What gloo, NCCL and the rendezvous say when it was a peer that failed.
_PEER_FAILED = re.compile(
    r"connection (reset|closed|refused|was closed)|closed by peer|broken pipe|recv(value)? failed|"
    r"failed to (recv|connect)|connect(full)?mesh failed|remote process exited|network error|"
    r"unhandled system error|timed out|timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank's process is."""

    node_id: str
    address: str  # of the node
    free_port: int
    group: int  # process group, the rank's own, and the session it belongs to
    session: int
    stderr: str  # the file that holds what the process wrote; "" where it isn't a file
    devices: list[str]  # ids of its GPUs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank's worker function ended."""

    kind: Literal["done", "user_error", "error", "peer_failed"]
    report: dict[str, Any] | None = None
    error: bytes = b""  # the pickled UserError
    title: str = ""  # type and message of the exception
    traceback: str = ""
    time: float = 0.0  # seconds since the epoch
    step: int | None = None  # that were done by then; None where the rank doesn't beat
    signalled: bool = False  # by SIGTERM


class Reporter:
    """Holds the newest events of rank 0 until the driver fetches them; the oldest go when nobody does."""

    def __init__(self, max_events: int) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=max_events)

    def push(self, event: dict[str, Any]) -> None:
        self._events.append(event)

    def drain(self) -> list[dict[str, Any]]:
        events = list(self._events)
        self._events.clear()
        return events


class Rank:
    """One rank of one attempt.

    search_path: further entries for sys.path, those of the driver. folder: the driver's working directory,
    taken where this node has it, since relative paths of a config mean that one.
    """

    def __init__(self, search_path: list[str], folder: str) -> None:
        sys.path += [entry for entry in search_path if entry not in sys.path and Path(entry).exists()]
        self._folder = folder
        if os.getpgrp() != os.getpid():
            os.setpgid(0, 0)  # so that it ends with its children, and without its siblings

    def place(self) -> Place:
        with socket.socket() as probe:
            probe.bind(("", 0))
            free_port = probe.getsockname()[1]
        context = ray.get_runtime_context()
        stderr = str(Path("/proc/self/fd/2").readlink())
        return Place(
            node_id=context.get_node_id(),
            address=ray.util.get_node_ip_address(),
            free_port=free_port,
            group=os.getpgrp(),
            session=os.getsid(0),
            stderr=stderr if stderr.startswith("/") else "",
            devices=[str(device) for device in context.get_accelerator_ids().get("GPU", [])],
        )

    def run(
        self, worker: str, config: bytes, environment: dict[str, str], devices: list[str], reporter: Any
    ) -> Outcome:
        """Runs the worker function "module:function" with the pickled config; never raises what it raised."""
        try:
            _set_environment(environment, devices)
            self._enter_folder(config)
            module, _, function = worker.partition(":")
            call = getattr(importlib.import_module(module), function)
            on_log, flush = _log_through(reporter) if reporter is not None else (None, lambda: None)
            try:
                return Outcome(kind="done", report=call(pickle.loads(config), on_log))
            finally:
                flush()
        except errors.UserError as error:
            return Outcome(
                kind="user_error", error=_pickled(error), title=str(error), time=time.time(), **_last_beat()
            )
        except (Exception, SystemExit) as error:
            own_frame, title = error.__traceback__, f"{type(error).__name__}: {error}"
            text = "".join(
                traceback.format_exception(type(error), error, own_frame.tb_next if own_frame else None)
            )
            kind: Literal["error", "peer_failed"] = (
                "peer_failed"
                if isinstance(error, RuntimeError | OSError) and _PEER_FAILED.search(title)
                else "error"
            )
            return Outcome(kind=kind, title=title, traceback=text, time=time.time(), **_last_beat())

    def _enter_folder(self, config: bytes) -> None:
        if Path(self._folder).is_dir():
            os.chdir(self._folder)
            return
        folder = pickle.loads(config).run.dir
        if folder is None or not Path(folder).is_absolute():
            raise errors.ConfigError(
                f"run.dir={folder} is relative to {self._folder}, which node "
                f"{ray.util.get_node_ip_address()} doesn't have: give an absolute path that all nodes share"
            )


def _last_beat() -> dict[str, Any]:
    path = os.environ.get(heartbeat.ENVIRONMENT)
    beat = heartbeat.read(Path(path)) if path else None
    return {"step": beat.step, "signalled": beat.stop} if beat is not None else {}


def _set_environment(environment: dict[str, str], devices: list[str]) -> None:
    assert "torch" not in sys.modules, "torch reads its environment when it is imported"
    if "OMP_NUM_THREADS" not in environment:
        os.environ.pop("OMP_NUM_THREADS", None)  # Ray's choice, 1, would be taken for the user's
    os.environ.update(environment)
    if devices:
        # All GPUs of the node's ranks, in rank order, so that LOCAL_RANK is the index of the rank's own and
        # peers see each other; Ray shows each process its own alone.
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            if name in os.environ:
                os.environ[name] = ",".join(devices)
    if environment["WORLD_SIZE"] != environment["LOCAL_WORLD_SIZE"]:
        interface = interface_for(environment["MASTER_ADDR"])
        if interface is not None:
            # gloo resolves the host's name instead, which many systems map to 127.0.1.1; NCCL takes the first it finds
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, interface)


def _log_through(reporter: Any) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    """Returns `on_log`, which never waits and drops events when too many are under way, and `flush`."""
    newest: list[Any] = []

    def on_log(event: dict[str, Any]) -> None:
        try:
            newest[:] = [reporter.push.remote(event)]
        except ray.exceptions.PendingCallsLimitExceeded:
            return

    def flush() -> None:
        ray.wait(newest, timeout=5) if newest else None  # calls arrive in order, so the last one tells

    return on_log, flush


def _pickled(error: errors.UserError) -> bytes:
    """The exception itself where it survives pickling, else the nearest class of ours with its message."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        parent = next(cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
        return pickle.dumps(parent(str(error)))
    return data
