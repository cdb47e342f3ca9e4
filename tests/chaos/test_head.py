"""The head (Ray's GCS) is killed and started again, with its state kept on disk and without.

Kept (RAY_gcs_storage=rocksdb on the head): nodes, actors and the driver wait for it and go on; training doesn't notice.
Not kept: the new head knows no node, and Ray ends drivers of the old one; the ranks end with the launcher's lease, and
the same command resumes once the nodes have joined again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import harness
import pytest
from namespaces import Machine, Network, needs_namespaces

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed, needs_namespaces]

STEPS = 400
SLOW = (
    "data.batch_size=24",
    "model.depth=3",
)  # for steps of some 30 ms: the head is away for a part of the run
AWAY_S = 5.0
LIMIT_S = 30.0  # after the head is back


class Head:
    """The GCS process of a machine, and how it was started, so that it can be started again as a service would."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        [self.pid] = machine.find("gcs/gcs_server")
        place = Path(f"/proc/{self.pid}")
        self._command = [part.decode() for part in (place / "cmdline").read_bytes().split(b"\0")[:-1]]
        entries = (place / "environ").read_bytes().decode().split("\0")
        self._environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def start(self) -> None:
        self._machine.popen(
            self._command, environment=self._environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def launched_on(machine: Machine, shards: Path, folder: Path, name: str) -> harness.Launched:
    return harness.Launched(
        folder,
        shards,
        name,
        *SLOW,
        f"train.duration={STEPS}",
        "launch.lease_s=10",
        address=f"{machine.address}:6379",
        workers=2,
        env=machine.environment,
        prefix=("ip", "netns", "exec", machine.name),
    )


def test_the_head_is_away_for_a_while(scene_shards: Path, tmp_path: Path) -> None:
    expected = harness.reference(scene_shards, *SLOW, steps=STEPS, world_size=2)
    with Network() as network:
        first, second = network.machine(), network.machine()
        store = first.folder / "store"
        store.mkdir()
        first.environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(store)}
        address = first.start_ray(num_cpus=0)
        second.start_ray(address)
        head = Head(first)
        with launched_on(first, scene_shards, tmp_path, "away") as launched:
            launched.wait_step(20)
            before, mark = set(launched.rank_pids()), launched.mark()
            head.kill()
            begin = launched.step
            time.sleep(AWAY_S)
            during = launched.step - begin
            head.start()
            back = time.monotonic()
            at = launched.step
            launched.wait_step(at + 1, timeout=LIMIT_S)
            resumed = time.monotonic() - back
            same = set(launched.rank_pids()) == before and launched.mark() == mark
            launched.kill(1)  # the head must know the cluster again, or there is no place for new ranks
            launched.wait_resumed(mark)
            restarted = time.monotonic() - back
            code, told = launched.finish()
        assert code == 0, told
        harness.assert_exact(launched.run, expected)
        assert during > 0  # nothing of a step needs the head
        assert same
        harness.record(
            "head (GCS) killed and restarted",
            storage="rocksdb",
            resumed_s=round(resumed, 1),
            steps_meanwhile=during,
            killed_rank_resumed_s=round(restarted, 1),
        )


@pytest.mark.skipif(harness.SCALE == "ci", reason="MMSCALE_CHAOS=standard and full do it")
def test_the_head_forgets(scene_shards: Path, tmp_path: Path) -> None:
    expected = harness.reference(scene_shards, *SLOW, steps=STEPS, world_size=2)
    with Network() as network:
        first, second = network.machine(), network.machine()
        address = first.start_ray(num_cpus=0)
        second.start_ray(address)
        head = Head(first)
        with launched_on(first, scene_shards, tmp_path, "forgotten") as launched:
            launched.wait_step(20)
            head.kill()
            killed = time.monotonic()
            time.sleep(AWAY_S)
            head.start()
            ended_with, told = launched.finish(timeout=60)
            noticed = time.monotonic() - killed
            assert ended_with != 0, told
            harness.wait_for(lambda: not launched.rank_pids(), 30, what="the end of all ranks")
            orphans = time.monotonic() - killed - noticed
        # as the machines' services would: everything of Ray is started again
        for machine in (first, second):
            machine.kill_all()
        first.start_ray(num_cpus=0)
        second.start_ray(address)
        back = time.monotonic()
        with launched_on(first, scene_shards, tmp_path, "forgotten") as again:
            begun = again.wait_step(1)
            resumed = time.monotonic() - back
            code, told = again.finish()
        assert code == 0, told
        harness.assert_exact(again.run, expected)
        harness.record(
            "head (GCS) killed and restarted",
            storage="none",
            launcher_ended_s=round(noticed, 1),
            exit_code=ended_with,
            ranks_ended_s=round(orphans, 1),
            resumed_s=round(resumed, 1),
            step=begun,
        )
