"""RUN/status.json: what a launched run is doing, for whoever asks, by way of a file.

::

    write_status(run, status)     # the supervisor, about once a second; replaced whole
    status = read_status(run)     # anyone: None where a run has none
    is_alive(status)              # whether its launcher still runs

A file outlives the launcher, needs no connection to the cluster, and is as old as its "time" says: a second, mostly.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil

FRESH_S = 10.0  # written every second, so an older one comes from a launcher that is gone, or held up


def write_status(run: Path, status: dict[str, Any]) -> None:
    """Never raises OSError: a full disk must not end what it tells of."""
    temporary = run / f".status-{os.getpid()}.json"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(status, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(run / "status.json")


def read_status(run: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the launcher that wrote it runs: known on its own machine, and judged by age on others."""
    if status["state"] in ("done", "stopped", "failed"):
        return False
    launcher = status["launcher"]
    if launcher["host"] == socket.gethostname():
        try:
            begun = psutil.Process(launcher["pid"]).create_time()
        except psutil.Error:
            return False
        return begun <= float(status["started"]) + 1.0  # not another process of the same number
    return time.time() - float(status["time"]) < FRESH_S
