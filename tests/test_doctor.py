"""The doctor: real locks of real builders, full disks, missing shards, and over nodes the same through Ray."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mmscale_launcher import doctor as cluster_doctor
from mmscale_launcher.doctor import Report, clock_offset
from namespaces import Network, needs_namespaces
from tiny_run import run_config

from mmscale import doctor
from mmscale.config import Config
from mmscale.doctor import Finding

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")


@pytest.fixture
def config(scene_shards: Path, tmp_path: Path) -> Config:
    return run_config(scene_shards, f"run.dir={tmp_path / 'runs' / 'tiny'}")


@contextlib.contextmanager
def small_disk(place: Path, options: str) -> Iterator[None]:
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def find(findings: list[Finding], name: str) -> Finding:
    [found] = [finding for finding in findings if finding.check == name]
    return found


def test_a_sound_machine(config: Config) -> None:
    findings = doctor.examine(config, num_ranks=2, world_size=2)
    assert [finding.check for finding in findings] == [
        *("versions", "operators", "folder", "disk", "memory", "shards"),
    ]
    assert {finding.level for finding in findings} == {"ok"}
    assert find(findings, "versions").values["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [f.check for f in doctor.examine(None)] == ["versions", "operators"]
    assert not Path(config.run.dir or "").parent.exists()  # it left nothing behind


BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton  # what torch's extension builds lock with
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("locked", flush=True)
time.sleep(60)
"""


def test_locks_of_killed_builds_are_removed_and_those_of_living_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    lock = tmp_path / "cpu_adam" / "lock"
    builder = subprocess.Popen([sys.executable, "-c", BUILDER, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "locked\n"
        found = doctor.operators(None)
        assert (found.values["cleared"], found.values["building"]) == ([], ["cpu_adam"])
        assert lock.exists()
    finally:
        builder.kill()
        builder.wait()
    found = doctor.operators(None)
    assert found.values["cleared"] == ["cpu_adam"]
    assert "cpu_adam" in found.text
    assert not lock.exists()


def test_on_a_shared_folder_only_an_old_lock_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    assert doctor.is_stale(lock)
    monkeypatch.setattr(doctor, "SHARED_FILE_SYSTEMS", ("",))  # whatever it lies on counts as shared
    assert not doctor.is_stale(lock)
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    assert doctor.is_stale(lock)
    assert not doctor.is_stale(tmp_path / "none")


@needs_root
def test_a_disk_too_small_for_three_checkpoints(config: Config, tmp_path: Path) -> None:
    size = doctor.checkpoint_bytes(config)
    with small_disk(tmp_path / "disk", f"size={2 * size}"):
        there = config.override(f"run.dir={tmp_path / 'disk' / 'run'}")
        found = doctor.disk(there)
        assert found.level == "error"
        assert "3 must fit" in found.text
        assert "run.checkpoints" in found.remedy
        assert doctor.disk(there.override(f"run.checkpoints={tmp_path}")).level == "ok"
    assert doctor.disk(config.override("run.checkpoints=s3://bucket/x")).level == "ok"


@needs_root
def test_a_folder_that_can_not_be_written(config: Config, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "ro"):
        [found] = [
            f
            for f in doctor.examine(config.override(f"run.dir={tmp_path / 'disk' / 'run'}"))
            if f.level == "error"
        ]
        assert found.check == "folder"
        assert "Read-only" in found.text


def test_a_folder_below_a_file(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = find(doctor.examine(config.override(f"run.dir={tmp_path / 'file' / 'run'}")), "folder")
    assert (found.level, str(tmp_path / "file") in found.text) == ("error", True)


def test_shards_that_are_missing_damaged_or_not_indexed(
    config: Config, scene_shards: Path, tmp_path: Path
) -> None:
    [source, *_] = sorted((scene_shards / "train").glob("*.tar"))
    place = tmp_path / "shards"
    place.mkdir()
    there = config.override(f"data.train={place}")
    found = find(doctor.examine(there), "shards")
    assert found.level == "error"
    assert "data.train" in found.text

    (place / source.name).write_bytes(source.read_bytes())
    found = doctor.shards(there)
    assert found.level == "warning"
    assert "mmscale data index" in found.remedy

    with (place / source.name).open("r+b") as file:
        file.truncate(source.stat().st_size // 2)
    found = doctor.shards(there)
    assert found.level == "error"
    assert source.name in found.text


def test_memory_by_stage(config: Config) -> None:
    """Against the figures of the paper: Rajbhandari et al. 2020, figure 1, 7.5 G parameters on 64 devices."""
    num = 7_500_000_000
    mixed = config.override("engine.precision=bf16")
    device = {
        stage: doctor.bytes_of_rank(mixed.override(f"engine.zero_stage={stage}"), num, 64)[0] / 1e9
        for stage in range(4)
    }
    assert device == pytest.approx({0: 120, 1: 31.4, 2: 16.6, 3: 1.9}, abs=0.06)  # as they round
    offloaded = mixed.override("engine.zero_stage=2", "engine.offload_optimizer=cpu")
    assert doctor.bytes_of_rank(offloaded, num, 64)[0] / 1e9 == pytest.approx(15.2, abs=0.06)

    wide = config.override("model.width=16384", "model.depth=64", "model.num_heads=128")
    found = doctor.memory(wide, num_ranks=2, world_size=2)  # built on no device: some 400 G parameters
    assert found.level == "error"
    assert found.values["parameters"] > 1e11
    assert "engine.zero_stage" in found.remedy


def test_code_that_differs_has_another_hash(tmp_path: Path) -> None:
    package = tmp_path / "mmscale_launcher"
    package.mkdir()
    (package / "__init__.py").write_text("")
    command = [sys.executable, "-c", "from mmscale.doctor import code_hash; print(code_hash())"]

    def hash_with(path: str) -> str:
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert hash_with("") == f"{doctor.code_hash()}\n" != hash_with(str(tmp_path))


def test_the_interface_that_reaches_an_address() -> None:
    assert doctor.interface_for("127.0.0.1") == "lo"
    assert doctor.interface_for("localhost") == "lo"
    assert doctor.interface_for("no-such-host.invalid") is None


def test_the_shortest_round_trip_tells_a_clock() -> None:
    # 3 s ahead; one answer took long on its way back
    assert clock_offset([(10.0, 13.5, 14.0), (20.0, 23.01, 20.02)]) == pytest.approx((3.0, 0.01))


def test_a_report_for_people_and_for_scripts() -> None:
    sound = Finding(check="folder", level="ok", text="/runs can be written")
    full = Finding(check="disk", level="error", text="1 GB free", remedy="make room")
    late = Finding(check="clock", level="warning", text="+0.70 s", remedy="run chrony")
    report = Report([("a", sound), ("b", sound), ("a", full), ("b", late)], 1.5, ["a", "b"])
    text = report.to_text()
    assert "folder  all nodes  ok" in text
    assert "disk    a          error    1 GB free" in text
    assert "error: disk, a: 1 GB free\n  remedy: make room" in text
    assert text.endswith("1 error, 1 warning; 1.5 s")
    assert report.to_json()["level"] == "error"
    assert report.to_json()["findings"][2]["where"] == "a"
    error = report.error()
    assert error is not None
    assert error.exit_code == 16
    assert "make room" in str(error)
    assert "chrony" not in str(error)
    assert Report([("a", sound)], 0.1).error() is None


class _Local:
    is_local = True


def test_launch_is_stopped_by_what_is_wrong(config: Config, tmp_path: Path) -> None:
    report = cluster_doctor.check(config, _Local())
    assert report.nodes == ["this machine"]
    from mmscale_launcher.launch import PreflightFailed

    with pytest.raises(PreflightFailed, match=r"shards[\s\S]*remedy[\s\S]*launch.preflight=false"):
        cluster_doctor.check(config.override(f"data.train={tmp_path / 'none'}"), _Local())


DIAGNOSE = """
import json, sys
from mmscale.config import load_config
from mmscale_launcher.doctor import diagnose
print(json.dumps(diagnose(load_config(sys.argv[1]), sys.argv[2]).to_json()))
"""


@pytest.mark.slow
@pytest.mark.distributed
@needs_namespaces
def test_two_machines_that_do_not_fit_together(scene_shards: Path, tmp_path: Path) -> None:
    """Another torch on one (by its metadata), and a run folder of its own there."""
    disk = tmp_path / "runs"
    odd = tmp_path / "site" / "torch-9.9.9.dist-info"
    odd.mkdir(parents=True)
    (odd / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    config = run_config(scene_shards, f"run.dir={disk / 'tiny'}", "launch.nodes=2")
    (tmp_path / "config.json").write_text(config.to_json())
    with Network() as network:
        head, other = network.machine(), network.machine()
        other.environment["PYTHONPATH"] = str(odd.parent)
        address = head.start_ray()
        other.start_ray(address, own_disk=disk)

        def diagnose() -> dict[tuple[str, str], dict[str, str]]:
            done = head.run([sys.executable, "-c", DIAGNOSE, tmp_path / "config.json", address])
            assert done.returncode == 0, done.stderr
            report = json.loads(done.stdout)
            assert report["level"] == "error"
            return {(f["where"], f["check"]): f for f in report["findings"]}

        found = diagnose()
        assert (
            f"torch: {found[head.address, 'versions']['values']['torch']} on {head.address}"
            in (  # type: ignore[index]
                found["all nodes", "agreement"]["text"]
            )
        )
        assert f"9.9.9 on {other.address}" in found["all nodes", "agreement"]["text"]
        assert found[other.address, "storage"]["level"] == "error"
        assert found["all nodes", "network"]["level"] == "ok"
        assert found["all nodes", "clock"]["level"] == "ok"
        assert not disk.exists() or list(disk.iterdir()) == []
