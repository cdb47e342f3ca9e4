"""The data tools over a Ray cluster: a `JobMap` (see `mmscale.data.jobs`) that runs each job as a Ray task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from mmscale.data.jobs import JobMap
from mmscale.errors import UserError


def ray_map(address: str) -> JobMap:
    """A JobMap over the cluster at `address` (auto, HOST:PORT or ray://HOST:PORT); work and jobs must pickle.

    Shards and outputs must lie where every node sees them. A task whose node dies is run again; a job's own
    error ends all and is raised here.
    """

    def run(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        started = not ray.is_initialized()
        if started:
            try:
                ray.init(address=address, log_to_driver=False, logging_level="error")
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UserError(f"--address {address}: no Ray cluster answers there: {error}") from None
        try:
            task = ray.remote(num_cpus=1, max_retries=3)(work)
            limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
            waiting = iter(enumerate(jobs))
            running: dict[Any, int] = {}
            while True:
                while len(running) < limit and (item := next(waiting, None)) is not None:
                    running[task.remote(item[1])] = item[0]
                if not running:
                    return
                finished, _ = ray.wait(list(running))
                for reference in finished:
                    try:
                        result = ray.get(reference)
                    except ray.exceptions.RayTaskError as error:
                        raise error.cause from None
                    yield running.pop(reference), result
        finally:
            if started:
                ray.shutdown()

    return run
