"""World-size invariance: loss and every gradient on W ranks are those of one process on the concatenated batch.

The yardstick knows nothing of DeepSpeed, ranks or micro-batches: plain autograd over the whole batch. The batches come
from the shards through each rank's own stream, so that dealing them out and padding them is part of what is checked.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ranks import run_ranks
from tiny import join_world, make_engine, run_step, tiny_config
from torch import Tensor

from mmscale.config import Config
from mmscale.data.batch import TensorBatch
from mmscale.models import Model
from mmscale.pipeline import collate, train_stream
from mmscale.tasks import TASKS, Task, model_for
from mmscale.world import World

pytestmark = pytest.mark.distributed

BATCH_SIZE = 12  # divided by 1, 2 and 3 ranks with 1 and 2 micro-batches

# Which samples lack the task's first field.
NONE_LACK, SOME_LACK, LAST_RANK_LACKS, LAST_RANK_ALONE_HAS = (
    "",
    "some",
    "last rank lacks",
    "last rank alone has",
)
LACKING = (NONE_LACK, SOME_LACK, LAST_RANK_LACKS, LAST_RANK_ALONE_HAS)


class Case(NamedTuple):
    task: str
    zero_stage: int
    accumulation: int
    lacking: str = NONE_LACK


# Every stage, task and way of lacking a field, with and without accumulation; the cross is in the slow tier.
FEW = {
    1: [
        Case("image_text", 0, 2),
        Case("audio_text", 2, 2, SOME_LACK),
        Case("caption", 3, 2, SOME_LACK),
    ],
    2: [
        Case("image_text", 1, 1),
        Case("image_text", 3, 2),
        Case("audio_text", 3, 1, LAST_RANK_LACKS),
        Case("audio_text", 2, 2, LAST_RANK_ALONE_HAS),
        Case("caption", 0, 1, SOME_LACK),
        Case("caption", 3, 2, LAST_RANK_LACKS),
    ],
    3: [
        Case("image_text", 2, 2, SOME_LACK),
        Case("audio_text", 3, 2, LAST_RANK_ALONE_HAS),
        Case("audio_text", 0, 2, LAST_RANK_LACKS),
        Case("caption", 1, 2),
        Case("caption", 3, 1, LAST_RANK_ALONE_HAS),
    ],
}
ALL = [Case(*case) for case in itertools.product(TASKS, range(4), (1, 2), LACKING)]


def rows_lacking(lacking: str, world_size: int) -> set[int]:
    """The rows of the global batch, which ranks share out as runs of consecutive ones."""
    last = set(range(BATCH_SIZE - BATCH_SIZE // world_size, BATCH_SIZE))
    return {
        NONE_LACK: set(),
        SOME_LACK: {0, 3, 4, 5, 10},
        LAST_RANK_LACKS: last,
        LAST_RANK_ALONE_HAS: set(range(BATCH_SIZE)) - last,
    }[lacking]


def make_config(scenes: Path, case: Case) -> Config:
    return tiny_config(
        scenes,
        f"data.batch_size={BATCH_SIZE}",
        f"engine.zero_stage={case.zero_stage}",
        f"train.accumulation={case.accumulation}",
    )


def make_batch(
    config: Config, model: Model, task: Task, rank: int, size: int, lacking: set[int]
) -> TensorBatch:
    """A rank's part of the first global batch, without the first field in the rows given."""
    # A rank's stream needs no group: it knows its rows from its number.
    world = World(rank, size, rank, size, torch.device("cpu"), control=None)  # type: ignore[arg-type]
    stream = train_stream(config, model, world, select=lambda step: [*task.fields, "concept"])
    batch = next(stream)
    stream.close()
    first = rank * BATCH_SIZE // size
    for row in range(len(batch)):
        batch["concept"][row] = (
            batch["concept"][row] % 5
        )  # so that some samples match others, on other ranks too
        if first + row in lacking:
            batch[task.fields[0]][row] = None
    return collate(model, batch)


def engine_results(scenes: Path, cases: list[Case]) -> list[tuple[float, dict[str, Tensor]]]:
    """On each rank, for each case: the loss summed over ranks, and the averaged gradients."""
    world = join_world()
    results = []
    for case in cases:
        config, task = make_config(scenes, case), TASKS[case.task]()
        engine = make_engine(config, world)
        lacking = rows_lacking(case.lacking, world.size)
        batch = make_batch(config, engine.model, task, world.rank, world.size, lacking)
        loss = run_step(engine, task, batch, step=False)
        results.append((loss, engine.gradients()))
    return results if world.rank == 0 else []


def plain_results(scenes: Path, case: Case, world_size: int) -> tuple[float, dict[str, Tensor]]:
    """The same in one process with plain autograd: no ranks, no micro-batches, incomplete samples left out."""
    config, task = make_config(scenes, case), TASKS[case.task]()
    model = model_for(config)
    batch = make_batch(config, model, task, 0, 1, rows_lacking(case.lacking, world_size))
    rows = task.usable(batch)
    batch = {name: {key: value[rows] for key, value in field.items()} for name, field in batch.items()}
    total, weight = task.objective(task.embed(model, batch), group=False, backend=None)
    loss = total / weight
    loss.backward()
    zero = torch.zeros(())
    return loss.item(), {
        n: zero.expand_as(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def check(scenes: Path, world_size: int, cases: list[Case], timeout: float) -> None:
    results = run_ranks(world_size, engine_results, scenes, cases, timeout=timeout)[0]
    for case, (loss, gradients) in zip(cases, results, strict=True):
        expected_loss, expected = plain_results(scenes, case, world_size)
        # The invariant's own bound. fp32 keeps 6e-8 of each product and the sums over samples and ranks only differ in
        # their order: measured are 1e-7 for losses and up to 2e-6 of a gradient's largest element.
        assert abs(loss - expected_loss) <= 1e-5 * expected_loss, f"{case}: {loss} instead of {expected_loss}"
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error, size = (gradient - expected[name]).abs().max(), expected[name].abs().max()
            assert error <= 1e-5 * size, (
                f"{case}: {name} is off by {error:.1e}, its largest element is {size:.1e}"
            )
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values()), (
            f"{case}: no gradient at all"
        )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradients_are_those_of_one_process(scene_shards: Path, world_size: int) -> None:
    check(scene_shards, world_size, FEW[world_size], timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradients_of_every_case(scene_shards: Path, world_size: int) -> None:
    # The last of one rank is all: a step without any usable sample, which the trainer passes over.
    cases = [case for case in ALL if world_size > 1 or case.lacking != LAST_RANK_LACKS]
    check(scene_shards, world_size, cases, timeout=1700)
