"""The data tools over a Ray cluster: a `JobMap` (see `mmscale.data.jobs`) that runs each job as a Ray task.

    for number, result in ray_map("10.0.0.1:6379")(work, jobs):
        ...

The nodes run the driver's code, which is sent to them; they need the packages that mmscale depends on, not mmscale
itself. The trade-off: a job's result travels through the driver, so results must be small, and connecting takes
seconds, so it pays for many shards only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from mmscale.data.jobs import JobMap
from mmscale.errors import UserError
from mmscale_launcher.cluster import join

RETRIES = 3  # of a job whose process or node dies


def ray_map(address: str) -> JobMap:
    """A JobMap over the cluster at `address` (auto, HOST:PORT or ray://HOST:PORT); work and jobs must pickle.

    Shards and outputs must lie where every node sees them, at the same path. Jobs run in the driver's working
    directory where a node has it, so relative paths mean the same. A job whose process or node dies is run again,
    up to 3 times; a job's own error ends all and is raised here.

    Raises UserError, while it runs, if no cluster answers at `address`, or a job's process dies again and again.
    """

    def run(work: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        started = not ray.is_initialized()
        if started:
            try:
                join(address)
            except UserError as error:
                raise UserError(str(error)) from None
        try:
            task = ray.remote(num_cpus=1, max_retries=RETRIES)(_run_job)
            shared = ray.put((work, str(Path.cwd())))  # sent to a node once, not with each job
            limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
            waiting = iter(enumerate(jobs))
            running: dict[Any, int] = {}
            while True:
                while len(running) < limit and (item := next(waiting, None)) is not None:
                    running[task.remote(shared, item[1])] = item[0]
                if not running:
                    return
                finished, _ = ray.wait(list(running))
                for reference in finished:
                    yield running.pop(reference), _result(reference)
        finally:
            if started:
                ray.shutdown()

    return run


def _run_job(shared: tuple[Callable[[Any], Any], str], job: Any) -> Any:
    work, folder = shared
    with contextlib.suppress(OSError):  # a node without that folder can still do jobs with absolute paths
        os.chdir(folder)
    return work(job)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error  # whose text is the traceback on the node
    except RayError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"a worker process died at the last of {RETRIES + 1} tries, killed from outside or for want of memory; "
            f"the same command goes on with what is left to do. Ray says: {type(error).__name__}: {reason}"
        ) from None
