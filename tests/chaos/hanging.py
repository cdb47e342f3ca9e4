"""A worker function for the launcher: mmscale's training, in which ranks hang as the file hangs.json says.

{"2": {"rank": 1, "kind": "sleep", "phase": "data", "step": 5}}: in the second attempt rank 1 falls asleep at the begin
of the data phase of the fifth step of that attempt. It writes hung-2 just before.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmscale.config import Config
from mmscale.heartbeat import Heartbeat

OnEvent = Callable[[dict[str, Any]], None] | None


def fall_asleep() -> None:
    time.sleep(1000)


def hold_the_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL's functions, those keep the interpreter's lock


def read_a_pipe(path: Path) -> None:
    path.read_bytes()  # nobody writes to it


def train(config: Config, on_event: OnEvent = None) -> dict[str, Any]:
    import mmscale.data.ahead
    from mmscale.train import train

    attempt = os.environ["MMSCALE_ATTEMPT"].rpartition("-")[2]
    fault = json.loads(Path("hangs.json").read_text()).get(attempt)
    if fault is None or fault["rank"] != int(os.environ["RANK"]):
        return train(config, on_event)
    pipe = Path(f"pipe-{attempt}")
    os.mkfifo(pipe)
    blocked = threading.Event()
    begin_phase, make_reader = Heartbeat.phase, mmscale.data.ahead.ReadAhead.__init__
    steps = 0

    def phase(beat: Heartbeat, name: str) -> None:
        nonlocal steps
        begin_phase(beat, name)
        steps += name == "data"
        if name != fault["phase"] or steps != fault["step"]:
            return
        Path(f"hung-{attempt}").touch()
        if fault["kind"] == "loader":
            blocked.set()
        elif fault["kind"] == "lock":
            hold_the_lock()
        else:
            fall_asleep()

    def reader(ahead: Any, make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        def make_or_block(*about: Any) -> Any:
            if blocked.is_set():
                read_a_pipe(pipe)
            return make(*about)

        make_reader(ahead, make_or_block, *arguments, **options)

    Heartbeat.phase = phase  # type: ignore[method-assign]
    mmscale.data.ahead.ReadAhead.__init__ = reader  # type: ignore[method-assign]
    return train(config, on_event)
