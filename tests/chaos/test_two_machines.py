"""README's way to two machines: `ray start` on each, `mmscale doctor`, `mmscale launch`; exactly the commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import harness
import pytest
from namespaces import Machine, Network, needs_namespaces

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed, needs_namespaces]


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    with Network() as network:
        first, second = network.machine(), network.machine()
        start_as_in_readme(first, "ray start --head --port=6379")
        start_as_in_readme(second, f"ray start --address={first.address}:6379")
        yield first, second


def start_as_in_readme(machine: Machine, command: str) -> None:
    """With what a test adds: less memory, and as many CPUs as if there were two each."""
    log = machine.folder / "start.log"
    with log.open("w") as file:
        extra = ["--num-cpus=2", "--object-store-memory=100000000", "--include-dashboard=false"]
        extra = extra if "--head" in command else extra[:2]
        code = machine.popen([*command.split(), *extra], stdout=file, stderr=file).wait(timeout=60)
    assert code == 0, log.read_text()


def test_readme(machines: tuple[Machine, Machine], scene_shards: Path, tmp_path: Path) -> None:
    first, _ = machines
    expected = harness.reference(scene_shards, steps=150, world_size=2)
    where = ("ip", "netns", "exec", first.name)
    with harness.Launched(
        tmp_path,
        scene_shards,
        "two",
        "train.duration=150",
        "launch.preflight=true",
        address=f"{first.address}:6379",
        nodes=2,
        workers=1,
        env=first.environment,
        prefix=where,
    ) as launched:
        launched.wait_step(1)
        ranks = set(launched.rank_pids())
        assert [len(ranks & set(machine.processes())) for machine in machines] == [1, 1]
        code, told = launched.finish()
    assert code == 0, told
    harness.assert_exact(launched.run, expected)


def test_doctor(machines: tuple[Machine, Machine], scene_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-data").symlink_to(scene_shards)
    first, _ = machines
    command = ["mmscale", "doctor", "quickstart", *harness.SMALL, "launch.nodes=2"]
    done = first.run([*command, "--address", f"{first.address}:6379"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("agreement", "clock", "network", "storage"):
        assert any(line.startswith(f"{check} ") and " ok " in line for line in done.stdout.splitlines())
    assert "over eth0" in done.stdout
