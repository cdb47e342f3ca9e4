"""A run that something happens to every half minute, on three nodes, and one that nothing happens to for long."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from harness import SCALE, Launched, Nodes, assert_close, plain_run, record, seeds

from mmscale.metrics import read_json_lines

pytestmark = [pytest.mark.chaos, pytest.mark.distributed, pytest.mark.timeout(2400)]

EVERY_S = 30.0  # between faults
GOODPUT = 0.45 if SCALE == "ci" else 0.6  # the gate; a third of the short form is its start-up
# CI has no time for a hang, which takes 15 s to be one; tests/chaos/test_hangs.py has that.
STEPS, KINDS = (
    (150, ["kill", "term", "remove", "add"])
    if SCALE == "ci"
    else (200, ["kill", "stop", "term", "remove", "add"])
)
# Some tenths of a second a step on two cores, a save each few seconds.
SLOW = (
    "model.width=256",
    "model.depth=6",
    "model.num_heads=4",
    "data.batch_size=60",
    f"train.duration={STEPS}",
    "train.save_every=5",
    "engine.zero_stage=2",
    "optim.lr=1e-4",
    "launch.hang_s=4",  # ten steps
)


def inflict(kind: str, launched: Launched, nodes: Nodes, shuffle: random.Random) -> None:
    if kind == "add":
        nodes.add_node()
        return
    pid = shuffle.choice(sorted(launched.ranks(120).values()))
    if kind == "remove":
        nodes.remove_node(nodes.node_of(pid))
    else:
        os.kill(pid, {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[kind])


@pytest.mark.parametrize("seed", seeds(ci=1, standard=1, full=3))
def test_a_fault_each_half_minute(
    seed: int, scene_shards: Path, tmp_path: Path, shared_cluster: Nodes
) -> None:
    expected = plain_run(scene_shards, *SLOW, world_size=3).trace
    shuffle = random.Random(seed)
    faults: list[dict[str, object]] = []
    with Launched(
        tmp_path,
        scene_shards,
        "soak",
        *SLOW,
        "launch.min_workers=2",
        "launch.max_restarts=100",
        address=shared_cluster.address,
        nodes=3,
        workers=1,
    ) as launched:
        while launched.process.poll() is None:
            due = launched.started + EVERY_S * (len(faults) + 1) * shuffle.uniform(0.9, 1.1)
            while launched.process.poll() is None and time.monotonic() < due:
                time.sleep(0.1)
            if launched.process.poll() is not None or launched.step > STEPS - 5:
                break
            missing = len(shared_cluster.nodes) < 3
            kinds = [kind for kind in KINDS if kind != ("remove" if missing else "add")]
            kind = "add" if missing and faults[-1]["kind"] == "remove" else shuffle.choice(kinds)
            if SCALE == "ci":
                kind = KINDS[len(faults) % len(KINDS)]
            inflict(kind, launched, shared_cluster, shuffle)
            faults.append({"kind": kind, "step": launched.step})
        code, told = launched.finish(600)
        wall = time.monotonic() - launched.started
    # each step counts once, as it was done last, and without the time that saves held it
    useful = sum(line["step_s"] for line in read_json_lines(launched.run / "metrics.jsonl"))
    goodput = useful / wall
    record("soak", seed=seed, steps=STEPS, faults=faults, wall_s=wall, goodput=goodput, code=code)
    assert code == 0, told
    assert len(faults) >= 2, f"{faults}: it was over too quickly"
    assert_close(launched.run, expected)
    assert goodput >= GOODPUT, (goodput, faults, told)


@pytest.mark.skipif(SCALE != "full", reason="takes minutes; with MMSCALE_CHAOS=full")
def test_a_thousand_steps_without_a_false_alarm(
    scene_shards: Path, tmp_path: Path, shared_cluster: Nodes
) -> None:
    steps = ("train.duration=1000", "train.save_every=50", "data.batch_size=48", "model.width=64")
    with Launched(
        tmp_path, scene_shards, "clean", *steps, address=shared_cluster.address, nodes=3, workers=1
    ) as launched:
        code, told = launched.finish(1800)
    alarms = [
        line
        for line in told.splitlines()
        if any(word in line for word in ("restarting", "is slow", "hangs", "spike", "left out"))
    ]
    record("clean steps", steps=1000, alarms=len(alarms), seconds=time.monotonic() - launched.started)
    assert code == 0, told
    assert launched.step == 1000
    assert alarms == []
