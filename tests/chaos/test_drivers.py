"""The launcher itself is killed: nothing of it is left running, and the run goes on where it was."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from harness import (
    Launched,
    Nodes,
    assert_exact,
    living_processes,
    record,
    reference,
    same_ray,
    seeds,
    wait_for,
)

pytestmark = [pytest.mark.chaos, pytest.mark.distributed, pytest.mark.timeout(600)]

ROW = "supervisor or driver killed"
ORPHANS_S = 30.0  # the gate
OVERRIDES = ("train.duration=120", "train.save_every=10")


@pytest.mark.parametrize("seed", seeds(ci=1, standard=2, full=5))
@pytest.mark.parametrize("place", ["local Ray", "cluster"])
def test_a_killed_driver_leaves_nothing_and_the_run_goes_on(
    place: str, seed: int, scene_shards: Path, tmp_path: Path, shared_cluster: Nodes
) -> None:
    shuffle = random.Random(seed)
    on_cluster = place == "cluster"
    places = {"address": shared_cluster.address, "nodes": 2, "workers": 1} if on_cluster else {"workers": 2}
    run = tmp_path / "runs" / "hurt"
    again = [  # the same command, then by the run's folder alone
        lambda: Launched(tmp_path, scene_shards, "hurt", *OVERRIDES, **places),
        lambda: Launched(tmp_path, scene_shards, "hurt", attach=run),
    ]
    launched = again[0]()
    for number, start in enumerate(again):
        with launched:
            begin = (launched.last_start() or 0) if number else 0
            launched.wait_step(begin + shuffle.randint(2, 18))
            wait_for((run / "checkpoints" / "latest").exists, 60, what="a checkpoint")
            ranks = launched.ranks()
            theirs = set(ranks.values()) | same_ray(ranks[0])  # their Ray, where it isn't a cluster's
            at_work = shared_cluster.at_work() if on_cluster else []
            assert len(at_work) >= 4 if on_cluster else len(theirs) > 4  # ranks and agents, or all of a Ray
            launched.process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            launched.process.wait()

            def left(theirs: set[int] = theirs) -> list[str]:
                found = [str(pid) for pid in sorted(theirs & set(living_processes()))]
                return found + (shared_cluster.at_work() if on_cluster else [])

            while found := left():
                assert time.monotonic() - killed < ORPHANS_S, f"still there: {found}"
                time.sleep(0.05)
            seconds = time.monotonic() - killed
        step = launched.step
        launched = start()
        record(ROW, place=place, again=["same command", "--attach"][number], orphans_s=seconds, step=step)
    with launched:
        code, told = launched.finish()
    assert code == 0, told
    assert "resumed at step" in told
    assert_exact(run, reference(scene_shards, *OVERRIDES, world_size=2))
