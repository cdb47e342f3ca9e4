"""Worker functions for the launcher that are somebody's own: mmscale's training with a task that has a fault in it."""

from __future__ import annotations

import functools
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmscale import heartbeat
from mmscale.config import Config

FAULTY_STEP = 7
ROOM_BYTES = 512 * 2**20  # below the limit, for what a step needs
WANTED_BYTES = 8 * 2**30  # above it
OnEvent = Callable[[dict[str, Any]], None] | None


def with_a_bug(config: Config, on_event: OnEvent = None) -> dict[str, Any]:
    """Rank 1 looks up what isn't there, always in step 7."""

    def objective_of_mine(number: int) -> None:
        table = {step: step**2 for step in range(FAULTY_STEP)}
        if os.environ["RANK"] == "1":
            table[number]

    return _train(objective_of_mine, config, on_event)


def with_much_memory(config: Config, on_event: OnEvent = None) -> dict[str, Any]:
    """Rank 1 asks torch for more than it may have, in step 7."""
    import torch

    def objective_of_mine(number: int) -> None:
        if number == FAULTY_STEP and os.environ["RANK"] == "1":
            torch.ones(WANTED_BYTES, dtype=torch.uint8)

    _limit()
    return _train(objective_of_mine, config, on_event)


def with_a_long_list(config: Config, on_event: OnEvent = None) -> dict[str, Any]:
    """Rank 1 asks Python for more than it may have, in step 7."""

    def objective_of_mine(number: int) -> None:
        if number == FAULTY_STEP and os.environ["RANK"] == "1":
            bytearray(WANTED_BYTES)

    _limit()
    return _train(objective_of_mine, config, on_event)


def _limit() -> None:
    import torch.distributed  # noqa: F401  (what is mapped by then isn't what we are after)

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # what the process maps while it starts up, which is much more than it touches
    limit = used + ROOM_BYTES + 4 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _train(before: Callable[[int], None], config: Config, on_event: OnEvent) -> dict[str, Any]:
    """Trains with tasks whose objective calls `before` with the number of the step first."""
    from mmscale.tasks import TASKS
    from mmscale.train import train

    path = Path(os.environ[heartbeat.ENVIRONMENT])

    def make(original: Callable[[], Any]) -> Any:
        task = original()
        objective = task.objective

        def changed(*arguments: Any, **options: Any) -> Any:
            beat = heartbeat.read(path)
            assert beat is not None
            before(beat.step + 1)
            return objective(*arguments, **options)

        task.objective = changed
        return task

    TASKS.update({name: functools.partial(make, original) for name, original in TASKS.items()})
    return train(config, on_event)
