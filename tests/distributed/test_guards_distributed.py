"""Values that aren't finite on one of two ranks: the step changes nothing on either, and the sample is named."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from tiny import join_world, make_engine, run_step, tiny_config
from tiny_run import with_loud_sounds
from torch import Tensor

from mmscale import checkpoint
from mmscale.config import Config
from mmscale.data.assemble import Batch
from mmscale.data.batch import TensorBatch
from mmscale.engine import Engine, StepResult, held_weights
from mmscale.guards import explain_skip
from mmscale.pipeline import drop_complete, micro_batches, train_stream
from mmscale.saver import Saver
from mmscale.tasks import TASKS, Task, model_for
from mmscale.tasks.caption import Caption
from mmscale.world import World

pytestmark = pytest.mark.distributed

# A coupled task and one that isn't, both of sound: the only input that isn't integers.
HEARD = Caption("heard", "audio", "text")
BEFORE: tuple[Task, ...] = (TASKS["audio_text"](), TASKS["image_text"]())
AFTER: tuple[Task, ...] = (HEARD, TASKS["audio_text"]())


class Case(NamedTuple):
    zero_stage: int
    precision: str
    clip_norm: float
    accumulation: int
    task: Task
    value: float

    def __str__(self) -> str:
        return (
            f"ZeRO-{self.zero_stage}, {self.precision}, clip_norm={self.clip_norm}, "
            f"accumulation={self.accumulation}, {self.value} in {self.task.name}"
        )


FEW = [
    Case(stage, precision, clip, 2 if clip else 1, BEFORE[0] if clip else HEARD, math.nan)
    for (stage, precision), clip in zip(
        product((0, 1, 2, 3), ("fp32", "bf16")), (0, 0.5, 0.5, 0, 0.5, 0, 0, 0.5), strict=True
    )
]
# Half of all, so that any two settings meet in every combination, for each stage and precision.
CHOICES = [
    (clip, accumulation, task)
    for (i, clip), (j, accumulation), (k, task) in product(
        enumerate((0, 0.5)), enumerate((1, 2)), enumerate((BEFORE[0], HEARD))
    )
    if (i + j + k) % 2 == 0
]
ALL = [
    Case(stage, precision, *choice, value=(math.nan, math.inf, -math.inf)[(stage + number) % 3])
    for stage, precision, (number, choice) in product((0, 1, 2, 3), ("fp32", "bf16"), enumerate(CHOICES))
]


def first_batch(config: Config, world: World) -> Batch:
    """This rank's part of the first global batch, with every field."""
    stream = train_stream(config, model_for(config), world, select=lambda step: list(config.data.fields))
    batch = next(stream)
    stream.close()
    return batch


def poisoned(batch: TensorBatch, world: World, value: float) -> TensorBatch:
    """The batch, with one number of one sample of rank 1 replaced."""
    if world.rank != 1:
        return batch
    x = batch["audio"]["x"].clone()
    x[1, 0, 3] = value
    return {**batch, "audio": {**batch["audio"], "x": x}}


def step(engine: Engine, task: Task, batch: TensorBatch) -> tuple[StepResult, list[TensorBatch]]:
    """A training step as the trainer makes it, and its micro-batches."""
    parts = micro_batches(task, batch, engine.accumulation)
    weight = 1.0 if task.coupled else sum(task.weight(part) for part in parts)
    [weight] = engine.world.sum([weight])
    dropped = [drop_complete(part) for part in parts]
    return engine.train_step(task, dropped, weight=weight), dropped


def digest(engine: Engine) -> str:
    """Of all that this rank keeps from step to step: weights, their float32 copy, moments, counters, learning rates."""
    optimizer = engine.deepspeed.optimizer
    parameters = list(engine.model.parameters())
    tensors: list[Tensor] = [held_weights(engine, p) for p in parameters]
    tensors += getattr(optimizer, "single_partition_of_fp32_groups", [])  # ZeRO-1 and 2
    for flat, group in zip(
        getattr(optimizer, "fp32_partitioned_groups_flat", []),
        getattr(optimizer, "fp16_groups", []),
        strict=False,
    ):
        pieces = flat.split([p.ds_tensor.numel() for p in group])
        tensors += [piece[: held_weights(engine, p).numel()] for piece, p in zip(pieces, group, strict=True)]
    for group in getattr(optimizer, "fp32_groups", []):  # bf16 without ZeRO
        tensors += group
    hashed = hashlib.sha256()
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
        hashed.update(repr([v for v in state.values() if not isinstance(v, Tensor)]).encode())
    assert len(tensors) > len(parameters)
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    hashed.update(repr([group["lr"] for group in optimizer.param_groups]).encode())
    return hashed.hexdigest()


def bad_steps(scenes: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """On each rank, for each case: what a step with one bad number did, and how training went on."""
    world = join_world()
    batch = first_batch(tiny_config(scenes), world)
    results = []
    for case in cases:
        config = tiny_config(
            scenes,
            f"engine.zero_stage={case.zero_stage}",
            f"engine.precision={case.precision}",
            f"optim.clip_norm={case.clip_norm}",
            f"train.accumulation={case.accumulation}",
        )
        found: dict[str, Any] = {}
        for is_disturbed in (True, False):
            engine = make_engine(config, world)
            for task in BEFORE:
                result, _ = step(engine, task, batch.tensors)
                assert result.applied
            before = digest(engine)
            if is_disturbed:
                result, parts = step(engine, case.task, poisoned(batch.tensors, world, case.value))
                found["applied"], found["unchanged"] = result.applied, digest(engine) == before
                found["norm"] = engine.gradient_norm
                found["text"] = explain_skip(
                    engine, case.task, parts, batch.sample_keys, step=3, loss=result.loss
                )
            losses = [run_step(engine, task, batch.tensors) for task in AFTER]
            found["end", is_disturbed] = digest(engine), losses
            found["moved"] = digest(engine) != before
        found["keys"] = batch.sample_keys
        results.append(found)
    return results


def check(scenes: Path, cases: list[Case], timeout: float) -> None:
    ranks = run_ranks(2, bad_steps, scenes, cases, timeout=timeout)
    for case, *results in zip(cases, *ranks, strict=True):
        key = results[1]["keys"][1]
        for rank, found in enumerate(results):
            assert found["applied"] is False, f"{case}: applied on rank {rank}"
            assert found["unchanged"], f"{case}: rank {rank} has changed"
            assert found["norm"] == math.inf, str(case)
            assert found["end", True] == found["end", False], f"{case}: rank {rank} went on differently"
            assert found["moved"], f"{case}: nothing was learnt, so nothing was shown"
            assert f"rank 1 reads audio that isn't finite in 1 of 6 samples: {key}" in found["text"], found[
                "text"
            ]
            assert "rank 0" not in found["text"]


def test_a_step_with_a_bad_number_on_one_rank_changes_nothing(scene_shards: Path) -> None:
    check(scene_shards, FEW, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_bad_steps_in_every_case(scene_shards: Path) -> None:
    check(scene_shards, ALL, timeout=1100)


# -------------------------------------------------------------------------------------------------- going back


def go_on(engine: Engine, batch: TensorBatch) -> tuple[str, list[float], str]:
    return digest(engine), [run_step(engine, task, batch) for task in AFTER], digest(engine)


def going_back(scenes: Path, folder: Path, cases: list[tuple[int, str, int]]) -> list[tuple[Any, Any, Any]]:
    """Of an engine that goes back, of a new one that loads the same, of one that only goes on: state and losses."""
    world = join_world()
    batch = first_batch(tiny_config(scenes), world).tensors
    results = []
    for stage, precision, accumulation in cases:
        config = tiny_config(
            scenes,
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
            f"train.accumulation={accumulation}",
        )
        own = folder / f"{stage}-{precision}-{accumulation}"
        engine = make_engine(config, world)
        for task in BEFORE:
            step(engine, task, batch)
        Saver(engine, own, config=config).save(2, {})
        found, _ = checkpoint.find(own, world)
        assert found is not None
        step(engine, HEARD, batch)
        step(engine, BEFORE[0], poisoned(batch, world, math.nan))
        astray = digest(engine)
        checkpoint.load(engine, found, universal=False)
        back = go_on(engine, batch)
        fresh = make_engine(config, world)
        checkpoint.load(fresh, found, universal=False)
        results.append((back, go_on(fresh, batch), astray))
    return results


def check_going_back(scenes: Path, folder: Path, cases: list[tuple[int, str, int]], timeout: float) -> None:
    ranks = run_ranks(2, going_back, scenes, folder, cases, timeout=timeout)
    for results in ranks:
        for case, (back, fresh, astray) in zip(cases, results, strict=True):
            assert back == fresh, str(case)
            assert astray not in back, f"{case}: nothing was taken back, so nothing was shown"


def test_going_back_is_as_good_as_starting_anew(scene_shards: Path, tmp_path: Path) -> None:
    check_going_back(scene_shards, tmp_path, [(0, "fp32", 1), (3, "bf16", 2)], timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_going_back_in_every_case(scene_shards: Path, tmp_path: Path) -> None:
    cases = list(product((0, 1, 2, 3), ("fp32", "bf16"), (1, 2)))
    check_going_back(scene_shards, tmp_path, cases, timeout=500)


def saved_by_two(scenes: Path, folder: Path, stage: int) -> None:
    world = join_world()
    config = tiny_config(scenes, f"engine.zero_stage={stage}")
    engine = make_engine(config, world)
    step(engine, BEFORE[0], first_batch(config, world).tensors)
    Saver(engine, folder, config=config).save(1, {})


def going_back_alone(scenes: Path, folder: Path, stage: int) -> list[tuple[Any, Any]]:
    """One rank goes back to what two have written, then to what it has written itself; each beside a new engine."""
    world = join_world()
    config = tiny_config(scenes, f"engine.zero_stage={stage}")
    batch = first_batch(config, world).tensors

    def loaded(engine: Engine | None, *, universal: bool) -> Engine:
        engine = engine or make_engine(config, world, universal=universal)
        found, _ = checkpoint.find(folder, world)
        assert found is not None
        assert checkpoint.needs_conversion(found, world.size, stage) is universal
        checkpoint.load(engine, found, universal=universal)
        return engine

    engine = loaded(None, universal=True)
    step(engine, HEARD, batch)
    first = go_on(loaded(engine, universal=True), batch), go_on(loaded(None, universal=True), batch)
    Saver(engine, folder, config=config).save(3, {})
    step(engine, HEARD, batch)
    second = go_on(loaded(engine, universal=False), batch), go_on(loaded(None, universal=False), batch)
    return [first, second]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_going_back_after_the_number_of_ranks_has_changed(
    scene_shards: Path, tmp_path: Path, stage: int
) -> None:
    run_ranks(2, saved_by_two, scene_shards, tmp_path, stage)
    [(first, second)] = run_ranks(1, going_back_alone, scene_shards, tmp_path, stage, timeout=250)
    for back, fresh in (first, second):
        assert back == fresh
    assert first != second


# -------------------------------------------------------------------------------------------------- real files


def read_and_step(scenes: Path, shards: Path) -> tuple[bool, list[str], str]:
    world = join_world()
    config = tiny_config(scenes, f"data.train={shards}", "engine.zero_stage=2")
    batch = first_batch(config, world)
    engine = make_engine(config, world)
    result, parts = step(engine, BEFORE[0], batch.tensors)
    text = explain_skip(engine, BEFORE[0], parts, batch.sample_keys, step=1, loss=result.loss)
    return result.applied, batch.sample_keys, text


def test_the_sample_of_a_real_shard_is_named(scene_shards: Path, tmp_path: Path) -> None:
    world = World(0, 2, 0, 2, torch.device("cpu"), control=None)  # type: ignore[arg-type]
    key = first_batch(tiny_config(scene_shards), world).sample_keys[4]
    with_loud_sounds(scene_shards, tmp_path, {key})
    for rank, found in enumerate(run_ranks(2, read_and_step, scene_shards, tmp_path / "train")):
        applied, keys, text = found
        assert not applied
        assert (key in keys) is (rank == 0)
        assert text == (
            "step 1 (audio_text) was left out on all ranks: its gradients aren't finite; "
            f"rank 0 reads audio that isn't finite in 1 of 6 samples: {key}"
        )


# -------------------------------------------------------------------------------------------------- offloading


def offloaded(scenes: Path, stages: list[int], precisions: list[str]) -> list[tuple[Any, ...]]:
    world = join_world()
    batch = first_batch(tiny_config(scenes), world).tensors
    results: list[tuple[Any, ...]] = []
    for stage, precision in product(stages, precisions):
        config = tiny_config(
            scenes,
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
            "engine.offload_optimizer=cpu",
            "train.accumulation=2",
        )
        ends = []
        for is_disturbed in (True, False):
            engine = make_engine(config, world)
            step(engine, BEFORE[0], batch)
            before = digest(engine)
            if is_disturbed:
                result, _ = step(engine, BEFORE[0], poisoned(batch, world, math.nan))
                results.append((stage, precision, result.applied, digest(engine) == before))
            ends.append(go_on(engine, batch))
        results[-1] += (ends[0] == ends[1],)
    return results


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bad_steps_with_an_offloaded_optimizer(scene_shards: Path) -> None:
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("g++") is None or shutil.which("ninja", path=places) is None:
        pytest.skip("DeepSpeed's CPU Adam is compiled at its first use: there is no g++ or no ninja here")
    stages, precisions = [1, 2, 3], ["fp32", "bf16"]
    expected = [(*case, False, True, True) for case in product(stages, precisions)]
    assert run_ranks(2, offloaded, scene_shards, stages, precisions, timeout=500) == [expected] * 2
