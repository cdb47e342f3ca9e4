"""A node's cable is pulled while it trains: its ranks end themselves, and nobody else writes before they have.

The machines share a file system, so the cut-off ranks could go on writing into the run: that they don't is what the
lease and the attempt's id are for. The node lives on, with its raylet, and can reach nobody.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from namespaces import Machine, Network, needs_namespaces

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed, needs_namespaces]

LIMIT_S = 45.0  # from the cut to the next attempt's first step: the gate of the fault table
PATIENCE_S = 150.0
STEPS = 400


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def cluster(network: Network) -> Iterator[list[Machine]]:
    """A head that takes no ranks, and two nodes; those of the test before are as if switched off."""
    if not network.machines:
        network.machine().start_ray(num_cpus=0)
    head = network.machines[0]
    nodes = [network.machine() for _ in range(2)]
    for node in nodes:
        node.start_ray(f"{head.address}:6379")
    yield [head, *nodes]
    for node in nodes:
        node.kill_all()


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.parametrize("rank", [1, 0] if harness.SCALE != "ci" else [0])
def test_a_node_is_cut_off(cluster: list[Machine], scene_shards: Path, tmp_path: Path, rank: int) -> None:
    head, *nodes = cluster
    expected = harness.reference(scene_shards, steps=STEPS, world_size=2)
    with harness.Launched(
        tmp_path,
        scene_shards,
        "cut",
        f"train.duration={STEPS}",
        "launch.min_workers=1",
        "launch.lease_s=10",
        address=f"{head.address}:6379",
        nodes=2,
        workers=1,
        env=head.environment,
        prefix=("ip", "netns", "exec", head.name),
    ) as launched:
        launched.wait_step(15)
        pid = launched.ranks()[rank]
        [lost] = [node for node in nodes if pid in node.processes()]
        attempt, mark = (launched.run / "attempt").read_text(), launched.mark()
        lost.cut()
        begin = time.monotonic()
        ended, taken_over, written = None, None, False
        while time.monotonic() - begin < PATIENCE_S and (ended is None or taken_over is None):
            now = time.monotonic() - begin
            # in this order: an owner that changes after the first look must find the rank gone at the second
            owner = (launched.run / "attempt").read_text()
            gone = has_ended(pid)
            if gone and ended is None:
                ended = now
            if owner != attempt and taken_over is None:
                taken_over = now
                written = not gone
            assert launched.process.poll() is None, launched.told()
            time.sleep(0.05)
        assert ended is not None, "the cut-off rank goes on"
        assert taken_over is not None, f"nobody took the run over\n{launched.told()}"
        assert not written, "two attempts at once"
        launched.wait_resumed(mark, timeout=PATIENCE_S)
        resumed = time.monotonic() - begin
        busy = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
        code, told = launched.finish()
    assert code == 0, told
    harness.assert_close(launched.run, expected)
    assert not launched.rank_pids()
    assert not [p for p in lost.processes() if b"ray::Rank" in Path(f"/proc/{p}/cmdline").read_bytes()[:9]]
    harness.record(
        "partition (veth down)",
        rank=rank,
        rank_ended_s=round(ended, 1),
        resumed_s=round(resumed, 1),
        processes_for_a_core=round(busy, 1),
    )
    # where three processes want each core, as when tests run side by side, each takes three times as long
    assert resumed <= LIMIT_S * busy
