"""Resume invariance: 2N steps are N steps, a `kill -9`, and N steps more, on as many workers or on others.

Every run here is real: ranks are processes of their own, as torchrun would start them, and one of them is killed while
it trains. What is compared is what a run leaves behind: metrics.jsonl, the checkpoint, and the samples each rank read.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import start_ranks
from safetensors.torch import load_file
from tiny import tiny_config

from mmscale.config import Config
from mmscale.data import Batch, ShardStream
from mmscale.train import train

pytestmark = pytest.mark.distributed

NUM_STEPS, SAVED, KILLED = (
    10,
    5,
    7,
)  # an epoch has 5 steps of 12 samples; the kill costs steps that were logged already


def make_config(scenes: Path, folder: Path, *assignments: str) -> Config:
    """All three tasks, so that steps differ in the parameters they use, and random augmentation."""
    return tiny_config(
        scenes,
        f"run.dir={folder}",
        f"train.duration={NUM_STEPS}",
        f"train.save_every={SAVED}",
        "data.augment.image.shift=0.1",
        "data.augment.audio.time_mask=4",
        *assignments,
    )


def train_and_note(config: Config, kill: tuple[int, int] | None) -> None:
    """Trains, noting the keys of each step's samples; `kill` (rank, step) ends this process when it has that batch."""
    rank = int(os.environ["RANK"])
    take = ShardStream.__next__

    def take_and_note(stream: ShardStream) -> Batch:
        batch = take(stream)
        if kill == (rank, batch.step):
            while not (keys_file(config, rank).parent / "checkpoints" / "latest").exists():
                time.sleep(0.01)  # the save goes on behind the steps
            os.kill(os.getpid(), signal.SIGKILL)
        with keys_file(config, rank).open("a") as file:
            file.write(json.dumps([batch.step, batch.sample_keys]) + "\n")
        return batch

    ShardStream.__next__ = take_and_note  # type: ignore[method-assign]
    train(config)


def keys_file(config: Config, rank: int) -> Path:
    assert config.run.dir is not None
    return Path(config.run.dir) / f"keys-{rank}.jsonl"


def run(config: Config, world_size: int, kill: tuple[int, int] | None = None) -> None:
    """Trains on so many ranks until all have ended: well, or, after a kill, in any other way."""
    workers = start_ranks(world_size, train_and_note, config, kill)
    try:
        for worker in workers:
            worker.join(timeout=120)
        codes = [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    if kill is None:
        assert codes == [0] * world_size
    else:
        # The others don't wait for ever: they end by themselves, and say that they failed.
        assert codes[kill[0]] == -signal.SIGKILL
        assert all(code is not None and code > 0 for rank, code in enumerate(codes) if rank != kill[0])


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    return [line["loss"] for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{NUM_STEPS:08d}" / "model.safetensors")


def sample_keys(folder: Path, first_step: int = 0) -> list[str]:
    """The keys of the global batches from a step on, in order; a step done twice counts as it was last."""
    steps: dict[int, dict[int, list[str]]] = {}
    for path in sorted(folder.glob("keys-*.jsonl")):
        rank = int(path.stem.removeprefix("keys-"))
        for line in path.read_text().splitlines():
            step, keys = json.loads(line)
            steps.setdefault(step, {})[rank] = keys
    return [
        key
        for step in range(first_step, NUM_STEPS)
        for rank in sorted(steps[step])
        for key in steps[step][rank]
    ]


def killed_run(scenes: Path, folder: Path, world_size: int, *assignments: str) -> None:
    """A run in `folder` that was killed in its step KILLED, with a checkpoint of step SAVED."""
    run(make_config(scenes, folder, *assignments), world_size, kill=(world_size - 1, KILLED))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", f"step-{SAVED:08d}"]
    for path in folder.glob("keys-*.jsonl"):
        path.unlink()


def resumed(scenes: Path, killed: Path, world_size: int, *assignments: str) -> Path:
    """A copy of a killed run that was gone on with."""
    folder = killed.with_name(f"{killed.name}-on-{world_size}")
    shutil.copytree(killed, folder)
    run(make_config(scenes, folder, *assignments), world_size)
    return folder


def assert_close(found: Path, expected: Path) -> None:
    # The invariant's bound: sums over samples and ranks are taken in another order, each to 6e-8 of its terms, and
    # AdamW carries such differences on from step to step. Measured after 10 steps: up to 1e-6.
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


def assert_equal(found: Path, expected: Path) -> None:
    """The same arithmetic in the same order: bit for bit."""
    assert losses(found) == losses(expected)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(scene_shards: Path, tmp_path: Path) -> None:
    stage = "engine.zero_stage=2"
    whole, alone, killed = tmp_path / "whole", tmp_path / "alone", tmp_path / "killed"
    run(make_config(scene_shards, whole, stage), 2)
    run(make_config(scene_shards, alone, stage), 1)
    assert_close(alone, whole)
    assert sample_keys(alone) == sample_keys(whole)
    assert len(set(sample_keys(whole)[:60])) == 60  # an epoch has nothing twice

    killed_run(scene_shards, killed, 2, stage)
    same, fewer = resumed(scene_shards, killed, 2, stage), resumed(scene_shards, killed, 1, stage)
    assert_equal(same, whole)
    assert_close(fewer, whole)
    for folder in (same, fewer):
        assert sample_keys(folder, SAVED) == sample_keys(whole, SAVED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("zero_stage", "world_size", "accumulation"),
    [*itertools.product((0, 1, 2, 3), (1, 2), (1,)), (0, 2, 2), (2, 2, 2), (3, 2, 2)],
)
def test_resume_at_every_stage_and_on_other_numbers_of_workers(
    scene_shards: Path, tmp_path: Path, zero_stage: int, world_size: int, accumulation: int
) -> None:
    options = (f"engine.zero_stage={zero_stage}", f"train.accumulation={accumulation}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(make_config(scene_shards, whole, *options), world_size)
    killed_run(scene_shards, killed, world_size, *options)
    for size in (1, 2, 3):
        folder = resumed(scene_shards, killed, size, *options)
        (assert_equal if size == world_size else assert_close)(folder, whole)
        assert sample_keys(folder, SAVED) == sample_keys(whole, SAVED)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_steps_in_one_process_under_torchrun_and_twice(scene_shards: Path, tmp_path: Path) -> None:
    """The recipe as users start it: `mmscale train`, alone and under torchrun with two ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = {}
    for name, launcher in (("alone", []), ("two", torchrun), ("two again", torchrun)):
        folder = tmp_path / name
        config = make_config(
            scene_shards, folder, "train.duration=50", "train.save_every=50", "engine.zero_stage=2"
        )
        (tmp_path / "config.json").write_text(config.to_json())
        command = [sys.executable, *launcher, "-m", "mmscale.cli", "train", str(tmp_path / "config.json")]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                output, _ = process.communicate(timeout=180)
            except subprocess.TimeoutExpired:
                process.terminate()  # torchrun ends its ranks then; killed, it would leave them behind
                raise
        assert process.returncode == 0, output[-3000:]
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["loss"] for line in lines]
        assert len(found[name]) == 50
    assert found["two"] == found["two again"]
    # See assert_close; the invariant promises this bound for 50 steps.
    assert found["alone"] == pytest.approx(found["two"], rel=1e-5)
