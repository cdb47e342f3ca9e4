"""Checkpoints are whole or not there: kills, damage and full disks, on runs that really train (on one or two ranks)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, start_ranks
from safetensors.torch import load_file
from tiny import join_world, tiny_config

from mmscale import checkpoint
from mmscale.checkpoint import CheckpointError, Found, complete, load_model, needs_conversion, verify
from mmscale.config import Config
from mmscale.errors import ConfigError, UserError
from mmscale.train import train

pytestmark = pytest.mark.distributed

NUM_STEPS = 8  # with a checkpoint every second one


def make_config(scenes: Path, folder: Path, *assignments: str) -> Config:
    return tiny_config(
        scenes,
        f"run.dir={folder}",
        f"train.duration={NUM_STEPS}",
        "train.save_every=2",
        "train.keep_checkpoints=3",
        "engine.zero_stage=2",
        'tasks={"image_text": 1.0}',
        *assignments,
    )


def run(fn: Callable[..., Any], *args: Any, world_size: int = 1) -> list[int | None]:
    """The exit codes of ranks that ran fn(*args)."""
    workers = start_ranks(world_size, fn, *args)
    try:
        for worker in workers:
            worker.join(timeout=60)
        return [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def kill_at(config: Config, step: int) -> None:
    """Trains, and dies with the batch of a step (from 0) in its hands."""
    from mmscale.data import ShardStream

    take = ShardStream.__next__

    def take_or_die(stream: ShardStream) -> Any:
        batch = take(stream)
        if batch.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    ShardStream.__next__ = take_or_die  # type: ignore[method-assign]
    train(config)


@pytest.fixture(scope="module")
def killed(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its seventh step of eight, having saved after two, four and six. Copy it."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    assert run(kill_at, make_config(scene_shards, folder), 6) == [-signal.SIGKILL]
    return folder


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in complete(folder / "checkpoints")]


def log(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank-{rank}.log").read_text()


# -------------------------------------------------------------------------------------------------- whole or not at all


def die_while_saving(config: Config, point: str, step: int) -> None:
    """Trains, and is killed at a point of the saving after a step."""
    save, rename, fsync = checkpoint.save, Path.rename, os.fsync
    num_synced = 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_fatally(*args: Any, **kwargs: Any) -> Path:
        if kwargs["step"] == step:
            Path.rename = rename_fatally  # type: ignore[method-assign, assignment]
            os.fsync = fsync_fatally
        return save(*args, **kwargs)

    def rename_fatally(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp" and point == "before the rename":
            die()
        result = rename(path, target)
        if path.suffix == ".tmp" and point == "after the rename":
            die()
        return result

    def fsync_fatally(descriptor: int) -> None:
        nonlocal num_synced
        num_synced += 1
        fsync(descriptor)
        if point == f"after file {num_synced}":
            die()

    checkpoint.save = save_fatally
    train(config)


# With one rank the files are the model's state, the optimizer's, and the manifest.
@pytest.mark.parametrize("point", ["after file 1", "after file 3", "before the rename"])
def test_a_kill_while_saving_leaves_the_checkpoint_before(
    scene_shards: Path, tmp_path: Path, point: str
) -> None:
    folder = tmp_path / "run"
    config = make_config(scene_shards, folder)
    assert run(die_while_saving, config, point, 4) == [-signal.SIGKILL]
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000004.tmp"]
    assert steps(folder) == [2]
    assert verify(folder / "checkpoints" / names[0]).step == 2
    if point == "before the rename":
        assert run(train, config) == [0]
        assert "resumed at step 2" in log(folder)
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
            "step-00000004",
            "step-00000006",
            "step-00000008",
        ]


def test_a_kill_after_the_rename_leaves_the_new_checkpoint(scene_shards: Path, tmp_path: Path) -> None:
    assert run(die_while_saving, make_config(scene_shards, tmp_path / "run"), "after the rename", 4) == [
        -signal.SIGKILL
    ]
    assert steps(tmp_path / "run") == [2, 4]
    assert verify(tmp_path / "run" / "checkpoints" / "step-00000004").step == 4


def test_the_newest_are_kept(copied: Path, scene_shards: Path) -> None:
    assert steps(copied) == [2, 4, 6]
    for left_by_a_kill in ("step-00000005.tmp", "step-00000004.universal", "step-00000004.universal-tmp"):
        (copied / "checkpoints" / left_by_a_kill / "deepspeed").mkdir(parents=True)
    assert run(train, make_config(scene_shards, copied)) == [0]
    assert steps(copied) == [4, 6, 8]
    assert len(list((copied / "checkpoints").iterdir())) == 3


# -------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit in the weights": ("model.safetensors", flip, "model.safetensors has changed since"),
    "a flipped bit in the config": ("config.json", flip, "config.json has changed since"),
    "a truncated optimizer state": ("deepspeed/*optim_states.pt", truncate, "optim_states.pt has"),
    "a missing model state": ("deepspeed/*model_states.pt", Path.unlink, "model_states.pt is missing"),
    "a truncated manifest": ("manifest.json", truncate, "manifest.json can't be read"),
    "a missing manifest": ("manifest.json", Path.unlink, "manifest.json can't be read"),
    "an empty manifest": (
        "manifest.json",
        lambda path: path.write_text("{}") and None,
        "manifest.json can't be read",
    ),
}


def damage(path: Path, kind: str) -> str:
    """Damages one file of a checkpoint; what the message must say."""
    pattern, how, words = DAMAGES[kind]
    [file] = path.glob(pattern)
    how(file)
    return words


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_before_loading(copied: Path, kind: str) -> None:
    path = copied / "checkpoints" / "step-00000006"
    assert verify(path).step == 6
    words = damage(path, kind)
    with pytest.raises(CheckpointError, match=words):
        verify(path)
    with pytest.raises(UserError, match=re.escape("manifest.json" if "manifest" in kind else words)):
        load_model(path)


def found_on_each_rank(folder: Path) -> tuple[int, list[str]]:
    found, problems = checkpoint.find(folder, join_world())
    assert found is not None
    return found.step, problems


def test_all_ranks_fall_back_to_the_checkpoint_before(copied: Path) -> None:
    words = damage(copied / "checkpoints" / "step-00000006", "a flipped bit in the weights")
    for step, problems in run_ranks(2, found_on_each_rank, copied / "checkpoints"):
        assert step == 4
        assert len(problems) == 1
        assert words in problems[0]


def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(copied: Path, scene_shards: Path) -> None:
    words = damage(copied / "checkpoints" / "step-00000006", "a truncated optimizer state")
    assert run(train, make_config(scene_shards, copied)) == [0]
    assert "passed over a damaged checkpoint" in log(copied)
    assert words in log(copied)
    assert "resumed at step 4" in log(copied)
    assert steps(copied) == [4, 6, 8]
    for path in complete(copied / "checkpoints"):
        verify(path)  # the damaged one was written anew


def test_nothing_starts_over_where_all_are_damaged(copied: Path, scene_shards: Path) -> None:
    for path in complete(copied / "checkpoints"):
        damage(path, "a flipped bit in the weights")
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        run_ranks(1, found_on_each_rank, copied / "checkpoints")
    assert str(caught.value).count("model.safetensors has changed since it was written") == 3
    before = (copied / "metrics.jsonl").read_bytes()
    assert run(train, make_config(scene_shards, copied)) == [1]
    assert "CheckpointError: no checkpoint in" in log(copied)
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert run_ranks(1, finds_nothing, tmp_path) == [True]


def finds_nothing(folder: Path) -> bool:
    return checkpoint.find(folder / "checkpoints", join_world()) == (None, [])


# -------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
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


def train_unwarned(config: Config) -> None:
    """Trains without asking for the free space first, as if the disk filled up while a checkpoint is written."""
    checkpoint._bytes_needed = lambda engine: 0
    train(config)


@pytest.mark.parametrize("worker", [train, train_unwarned])
def test_a_full_disk_is_told_in_words_and_spares_the_checkpoint_before(
    scene_shards: Path, killed: Path, tmp_path: Path, worker: Callable[..., Any]
) -> None:
    newest = killed / "checkpoints" / "step-00000006"
    size = sum(path.stat().st_size for path in newest.rglob("*"))
    with small_disk(tmp_path / "disk", int(1.7 * size) + 2**18):  # some room for the run's other files
        folder = tmp_path / "disk" / "run"
        codes = run(worker, make_config(scene_shards, folder), world_size=2)
        assert codes == [1, 1]  # nobody hangs
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
        assert verify(folder / "checkpoints" / "step-00000002").step == 2
        for rank in range(2):
            [line] = [line for line in log(folder, rank).splitlines() if "CheckpointError" in line]
            assert "step-00000004 can't be written" in line
            assert ("MiB are free" if worker is train else "No space left on device") in line
            assert "the newest good one is" in line


# -------------------------------------------------------------------------------------------------- what it is good for


def test_another_zero_stage_is_refused_in_words() -> None:
    found = Found(Path("runs/x/checkpoints/step-00000006"), {"step": 6, "world_size": 2, "zero_stage": 2})
    assert not needs_conversion(found, 2, 2)
    assert needs_conversion(found, 3, 2)
    for stage in (0, 1, 3):
        with pytest.raises(
            ConfigError, match=f"engine.zero_stage={stage}: .*step-00000006 was written with zero_stage=2"
        ):
            needs_conversion(found, 2, stage)
    plain = Found(Path("step-00000006"), {"step": 6, "world_size": 2, "zero_stage": 0})
    assert not needs_conversion(plain, 3, 0)  # every rank has everything


def test_the_model_of_a_run_and_of_a_checkpoint(copied: Path, tmp_path: Path) -> None:
    newest = copied / "checkpoints" / "step-00000006"
    for path in (copied, newest):
        model, config = load_model(path)
        assert not model.training
        assert config.model.width == 32
        state = model.state_dict()
        for name, value in load_file(newest / "model.safetensors").items():
            assert torch.equal(state[name], value)
    older, _ = load_model(copied / "checkpoints" / "step-00000002")
    assert any(not torch.equal(value, state[name]) for name, value in older.state_dict().items())

    for path, words in (
        (tmp_path / "nowhere", "there is no such run or checkpoint"),
        (copied / "logs", "neither a run's folder nor a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_model(path)
    (tmp_path / "fresh" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(tmp_path / "fresh")


def test_the_manifest_lists_every_file(killed: Path) -> None:
    for path in complete(killed / "checkpoints"):
        listed = set(json.loads((path / "manifest.json").read_text())["files"])
        there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert listed == there - {"manifest.json"}
