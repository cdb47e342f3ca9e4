"""A launched run loses a worker, or is told to stop: what it had learned is kept, and nothing is computed twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.distributed, pytest.mark.timeout(600)]

MMSCALE = Path(sys.executable).with_name("mmscale")
SMALL = [
    "train.duration=60",
    "train.log_every=1",
    "train.save_every=10",
    "data.batch_size=8",
    "model.width=32",
    "model.depth=1",
    "model.num_heads=2",
    "data.evals={}",
]


def start(folder: Path, shards: Path, name: str, *more: str) -> subprocess.Popen[str]:
    link = folder / "demo-data"
    if not link.exists():
        link.symlink_to(shards)
    return subprocess.Popen(
        [str(MMSCALE), "launch", "quickstart", f"run.name={name}", *SMALL, *more],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it didn't get so far in three minutes"
        time.sleep(0.05)


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks: Ray names an actor's process after what it runs."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    home = Path(f"/proc/{process.pid}/cwd").readlink()
    found = []
    for line in listed.splitlines():
        pid, _, name = line.strip().partition(" ")
        if name.strip().startswith("ray::Rank"):
            with suppress(OSError):  # it may have ended meanwhile
                if Path(f"/proc/{pid}/cwd").readlink() == home:
                    found.append(int(pid))
    return found


def test_a_killed_worker_costs_nothing_but_time(scene_shards: Path, tmp_path: Path):
    whole = start(tmp_path, scene_shards, "whole")
    assert whole.wait(300) == 0, whole.communicate()[1]
    hurt = start(tmp_path, scene_shards, "hurt")
    run = tmp_path / "runs" / "hurt"
    wait_for(lambda: logged(run) >= 25, hurt)
    os.kill(ranks_of(hurt)[-1], signal.SIGKILL)
    _, said = hurt.communicate(timeout=300)
    assert hurt.returncode == 0, said
    assert "restarting, attempt 2" in said
    assert "resumed at step" in said
    assert losses(run) == losses(tmp_path / "runs" / "whole")


def test_sigterm_saves_and_the_same_command_goes_on(scene_shards: Path, tmp_path: Path):
    first = start(tmp_path, scene_shards, "stopped")
    run = tmp_path / "runs" / "stopped"
    wait_for(lambda: logged(run) >= 15, first)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert "Traceback" not in said
    second = start(tmp_path, scene_shards, "stopped")
    _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    assert sorted(losses(run)) == list(range(1, 61))
    assert "resumed at step" in said


@pytest.mark.parametrize(("preflight", "code"), [("true", 16), ("false", 14)])
def test_a_full_disk_ends_in_one_message(scene_shards: Path, tmp_path: Path, preflight: str, code: int):
    """Seen coming by the preflight; else after three saves that fail, the training going on between them."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        process = start(
            tmp_path, scene_shards, "full", f"run.dir={disk / 'run'}", f"launch.preflight={preflight}"
        )
        _, said = process.communicate(timeout=120)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert "restarting" not in said
    last = said[said.rindex("mmscale: ") :]
    assert str(disk) in last
    assert "space left" in last or "MiB" in last or "MB of room" in last
    if preflight == "false":
        assert "(failure 2 of 3)" in said
        assert "step 19/60" in said
