"""Saves that are killed in each of their phases, and disks that are full: real kills, real disks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import record
from ranks import run_ranks, start_ranks
from tiny import join_world, make_engine, tiny_config

from mmscale.checkpoint import complete, verify
from mmscale.config import Config
from mmscale.errors import CheckpointError
from mmscale.saver import Saver
from mmscale.train import train

pytestmark = [pytest.mark.chaos, pytest.mark.distributed]

DYING = "step-00000006"  # of a run that has saved after 2 and 4 steps and keeps two


def make_config(scenes: Path, folder: Path, *assignments: str) -> Config:
    return tiny_config(
        scenes,
        f"run.dir={folder}",
        "train.duration=8",
        "train.save_every=2",
        "train.keep_checkpoints=2",
        "engine.zero_stage=2",
        'tasks={"image_text": 1.0}',
        *assignments,
    )


# Where the interpreter is about to do something, as its audit events tell: (event, what its arguments must hold).
# The files of a save of one rank are the model's state, the optimizer's, the weights, the tokenizer, the config.
PHASES: dict[str, tuple[str, Callable[[list[str]], bool]]] = {
    "after the snapshot": ("os.mkdir", lambda a: DYING in a[0] and ".tmp" in a[0]),
    "while writing": ("open", lambda a: DYING in a[0] and "optim_states" in a[0] and "w" in a[1]),
    "before it is said to be done": ("open", lambda a: DYING in a[0] and "done-0" in a[0] and "w" in a[1]),
    "before the manifest": ("open", lambda a: DYING in a[0] and "manifest" in a[0] and "w" in a[1]),
    "before the rename": ("os.rename", lambda a: a[1].endswith(DYING)),
    "before the pointer": (
        "open",
        lambda a: a[0].endswith("latest.tmp") and "w" in a[1] and (Path(a[0]).parent / DYING).exists(),
    ),
    "before retention": ("os.rename", lambda a: a[0].endswith("step-00000002")),
    "during retention": ("os.remove", lambda a: "config.json" in a[0]),
}


def train_and_die(config: Config, phase: str) -> None:
    """Trains until a save comes to the phase; nothing of what runs is replaced."""
    wanted, holds = PHASES[phase]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == wanted and holds([os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in arguments]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    train(config)


def exit_codes(world_size: int, fn: Callable[..., Any], *args: Any) -> list[int | None]:
    workers = start_ranks(world_size, fn, *args)
    try:
        for worker in workers:
            worker.join(timeout=120)
        return [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_of_a_save_leaves_no_torn_checkpoint(
    scene_shards: Path, tmp_path: Path, phase: str
) -> None:
    folder = tmp_path / "run"
    config = make_config(scene_shards, folder)
    assert exit_codes(1, train_and_die, config, phase) == [-signal.SIGKILL]
    number = list(PHASES).index(phase)
    saved = 4 if number < 5 else 6
    there = complete(folder / "checkpoints")
    assert [verify(path).step for path in there][-1] == saved
    assert [path.name for path in (folder / "checkpoints").glob("*.tmp")] or number in (0, 5, 6)
    assert exit_codes(1, train, config) == [0]
    assert f"resumed at step {saved}" in (folder / "logs" / "rank-0.log").read_text()
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["latest", "step-00000006", "step-00000008"]  # and nothing that was left lying
    assert [verify(path).step for path in complete(folder / "checkpoints")] == [6, 8]
    record("kill -9 inside a save", phase=phase, resumed_at=saved)


# -------------------------------------------------------------------------------------------------- full disks


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk can't be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fills_up(scenes: Path, disk: Path, warned: bool) -> dict[str, Any]:
    """Saves two, fills the disk, saves until that ends it; then makes room and saves again."""
    told: list[Any] = []
    config = make_config(scenes, disk / "run", "train.max_failed_saves=3")
    engine = make_engine(config, join_world())
    rank = engine.world.rank
    saver = Saver(engine, disk / "checkpoints", config=config, on_event=told.append)
    for step in (1, 2):
        saver.save(step, {})
    ballast = disk / "ballast"
    if rank == 0:
        free = shutil.disk_usage(disk).free
        # Enough for a checkpoint, as far as can be told before: the rest goes while it is written.
        left = 0 if warned else saver._num_bytes + 2**16
        with ballast.open("wb") as file:
            file.write(bytes(max(0, free - left)))
    engine.world.barrier()
    if not warned:
        saver._num_bytes = 0
        if rank == 0:
            with ballast.open("ab") as file:
                file.write(bytes(left - left // 3))
        engine.world.barrier()
    failures = 0
    for step in (3, 4, 5):
        saver.start(step, {})
        saver._join()
        try:
            outcome = saver.settle()
        except CheckpointError as error:
            assert step == 5
            words = str(error)
            break
        assert outcome is not None
        assert outcome.error is not None
        failures += 1
    engine.world.barrier()
    left_behind = sorted(path.name for path in (disk / "checkpoints").iterdir())
    good = [verify(path).step for path in complete(disk / "checkpoints")]
    engine.world.barrier()
    if rank == 0:
        ballast.unlink()
    saver.num_failed = 0
    engine.world.barrier()
    saver.save(6, {})
    return {"words": words, "failures": failures, "left": left_behind, "good": good, "told": told}


@pytest.mark.parametrize("warned", [True, False], ids=["known before", "while it is written"])
def test_a_full_disk_fails_saves_and_ends_nothing_until_three_have_failed(
    scene_shards: Path, tmp_path: Path, warned: bool
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, 8 << 20):
        first, second = run_ranks(2, fills_up, scene_shards, disk, warned)
        assert [verify(path).step for path in complete(disk / "checkpoints")] == [2, 6]
    assert first["words"] == second["words"]
    assert "step-00000005 can't be written" in first["words"]
    assert ("are free" if warned else "No space left on device") in first["words"]
    assert "the newest good one is" in first["words"]
    assert first["failures"] == 2
    assert first["good"] == [1, 2]
    assert first["left"] == ["latest", "step-00000001", "step-00000002"]
    messages = [event["text"] for event in first["told"] if event["event"] == "message"]
    assert [text[-16:] for text in messages] == [f"(failure {n} of 3)" for n in (1, 2, 3)]
    record(
        "disk full",
        failed_saves=len(messages),
        good_lost=len({1, 2}.difference(first["good"])),
        known="before" if warned else "while writing",
    )
