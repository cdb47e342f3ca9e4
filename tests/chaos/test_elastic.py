"""Nodes that are lost, one after the other, and come back: fewer ranks, then more, and the same training."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from harness import Launched, Nodes, assert_close, plain_run, record, reference, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed]

STEPS = 60
FIRST_STEP_S = 15.0  # the gate, beyond the start of plain processes
# steps of 0.5 s and more, so that there is time to take nodes away
SLOW = ("train.save_every=5", "data.augment={}")


def world(launched: Launched) -> int:
    status = launched.status() or {}
    return int(status["world_size"]) if status.get("state") == "running" else 0


def test_three_nodes_two_one_and_back(shared_cluster: Nodes, scene_shards: Path, tmp_path: Path) -> None:
    plain = plain_run(scene_shards, *SLOW, steps=STEPS, world_size=3)
    nodes = shared_cluster.nodes
    with Launched(
        tmp_path,
        scene_shards,
        "elastic",
        *SLOW,
        f"train.duration={STEPS}",
        "launch.min_workers=1",
        address=shared_cluster.address,
        nodes=3,
        workers=1,
        worker="fake_worker:unhurried",
        env={"MMSCALE_GROW_AFTER_S": "1"},
    ) as launched:
        seconds, lost = [], []
        for num_left, step in ((2, 8), (1, 16)):
            launched.wait_step(step)
            assert world(launched) == num_left + 1
            mark, before = launched.mark(), launched.step
            victim = shared_cluster.node_of(launched.ranks()[num_left])
            begin = time.monotonic()
            shared_cluster.remove_node(victim)
            resumed = launched.wait_resumed(mark)
            seconds.append(time.monotonic() - begin - plain.start_s)
            lost.append(before - resumed + 1)
            wait_for(lambda n=num_left: world(launched) == n, 30, what=f"a world of {num_left}")
        mark = launched.mark()
        shared_cluster.add_node()
        shared_cluster.add_node()
        resumed = launched.wait_resumed(mark)
        grown_from = launched.last_start()
        code, told = launched.finish()
    assert code == 0, told
    assert "there is room for more ranks: the ranks save first" in told
    assert f"saved at step {grown_from}" in told  # what it goes on from is the last step that was done
    assert_close(launched.run, reference(scene_shards, *SLOW, steps=STEPS, world_size=3))
    before_growing = told[: told.index(f"saved at step {grown_from}")]
    lost_then = max(map(int, re.findall(r"step (\d+)/", before_growing))) - grown_from
    for beyond, steps in zip(seconds, lost, strict=True):
        record("a node lost", seconds_beyond_start=beyond, lost_steps=steps, lost_when_growing=lost_then)
    assert max(lost) <= 5 + 1  # the interval, and the step under way
    assert lost_then == 0
    assert max(seconds) <= FIRST_STEP_S
    assert len(nodes) == 3
