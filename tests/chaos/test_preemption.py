"""Notice is given: SIGTERM to a rank, a node that is drained. Nothing is done twice."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import Launched, Nodes, assert_exact, record, reference

from mmscale.metrics import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed]

STEPS = 30


def replayed(run: Path) -> int:
    """Steps that were done twice: from where rank 0 stopped to where it went on."""
    log = (run / "logs" / "rank-0.log").read_text()
    stopped = [int(number) for number in re.findall(r"stopped at step (\d+)", log)]
    begun = [int(number) for number in re.findall(r"resumed at step (\d+)", log)]
    assert stopped, log
    assert begun, log
    return stopped[-1] - begun[-1]


def test_sigterm_to_a_rank_on_one_machine(scene_shards: Path, tmp_path: Path) -> None:
    """There is nowhere else to go on."""
    with Launched(
        tmp_path, scene_shards, "told", f"train.duration={STEPS}", worker="fake_worker:unhurried"
    ) as first:
        first.wait_step(7)
        first.signal(1, signal.SIGTERM)
        code, told = first.finish()
    assert code == 75, told
    at = first.step
    assert 7 <= at < STEPS
    with Launched(tmp_path, scene_shards, "told", f"train.duration={STEPS}") as second:
        code, told = second.finish()
    assert code == 0, told
    assert f"resumed at step {at} " in told
    assert_exact(second.run, reference(scene_shards, steps=STEPS, world_size=2))
    record("SIGTERM to a rank, nowhere else to go", steps_replayed=replayed(second.run))


@pytest.mark.parametrize("how", ["SIGTERM", "drain"])
def test_a_rank_moves_to_another_node(
    shared_cluster: Nodes, scene_shards: Path, tmp_path: Path, how: str
) -> None:
    with Launched(
        tmp_path,
        scene_shards,
        "moved",
        f"train.duration={STEPS}",
        "train.save_every=1000",
        address=shared_cluster.address,
        nodes=2,
        workers=1,
        worker="fake_worker:unhurried",
    ) as launched:
        launched.wait_step(5)
        rank, mark = launched.ranks()[1], launched.mark()
        node = shared_cluster.node_of(rank)
        begin = time.monotonic()
        if how == "SIGTERM":
            launched.signal(1, signal.SIGTERM)
        else:
            ray = Path(sys.executable).with_name("ray")
            options = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
            given = [
                "--address",
                shared_cluster.address,
                "--node-id",
                node.node_id,
                "--deadline-remaining-seconds",
                "20",
            ]
            subprocess.run([ray, "drain-node", *given, *options], check=True, capture_output=True, timeout=60)
        resumed = launched.wait_resumed(mark)
        seconds = time.monotonic() - begin
        assert shared_cluster.node_of(launched.ranks()[1]).node_id != node.node_id
        assert shared_cluster.node_of(launched.ranks()[0]).node_id != node.node_id
        code, told = launched.finish()
    assert code == 0, told
    assert f"saved at step {resumed - 1};" in told
    assert replayed(launched.run) == 0
    steps = [line["step"] for line in read_json_lines(launched.run / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))
    assert_exact(launched.run, reference(scene_shards, "train.save_every=1000", steps=STEPS, world_size=2))
    record(f"{how}: a rank moves to another node", seconds=seconds, steps_replayed=replayed(launched.run))
    if how == "drain":  # it takes no more work, so a fresh one takes its place
        shared_cluster.remove_node(node)
