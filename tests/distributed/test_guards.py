"""Values that aren't finite on one of two ranks: the step changes nothing on either, and the sample is named."""

from __future__ import annotations

import hashlib
import math
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from ranks import run_ranks
from tiny import join_world, make_engine, run_step, tiny_config
from torch import Tensor

from mmscale.config import Config
from mmscale.data.assemble import Batch
from mmscale.data.batch import TensorBatch
from mmscale.engine import Engine, StepResult, held_weights
from mmscale.guards import explain_skip
from mmscale.pipeline import drop_complete, micro_batches, train_stream
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
ALL = [
    Case(*case)
    for case in product(
        (0, 1, 2, 3), ("fp32", "bf16"), (0, 0.5), (1, 2), (BEFORE[0], HEARD), (math.nan, math.inf)
    )
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
