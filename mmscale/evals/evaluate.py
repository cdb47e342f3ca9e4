"""Runs tasks over held-out shards: every rank scores its share, all gather, and the order is that of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmscale.config import Config
from mmscale.data.batch import to_device
from mmscale.models import Model
from mmscale.pipeline import eval_stream
from mmscale.tasks import Task
from mmscale.tasks.base import Metric
from mmscale.world import World

Metrics = dict[str, Metric]


@torch.no_grad()
def evaluate(
    forward: Callable[..., Any],
    model: Model,
    tasks: Mapping[str, Task],
    shards: str | list[str],
    *,
    config: Config,
    world: World,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[str, Metrics]:
    """The metrics of each task, by task name, on every rank. Collective.

    forward runs a function of the model (`forward(task.score, batch)`): the model itself, or the engine around it.
    on_batch: called after each batch, for those who watch for progress.
    Raises DataError on all ranks.
    """
    model.eval()
    results = {}
    for name, task in tasks.items():
        limit = config.evals.num_generated if task.generates else None
        scores, num_unreadable = _scores(
            forward, model, task, shards, config=config, world=world, limit=limit, on_batch=on_batch
        )
        results[name] = task.metrics(scores, num_candidates=config.evals.num_candidates)
        if num_unreadable:
            results[name]["unreadable samples, left out"] = Metric(float(num_unreadable))
    model.train()
    return results


def _scores(
    forward: Callable[..., Any],
    model: Model,
    task: Task,
    shards: str | list[str],
    *,
    config: Config,
    world: World,
    limit: int | None,
    on_batch: Callable[[], None],
) -> tuple[dict[str, Tensor], int]:
    names = [*task.fields, *(name for name, f in config.data.fields.items() if f.modality == "label")]
    stream = eval_stream(config, model, world, shards, names=names)
    batches: list[dict[str, Tensor]] = []
    iterator = iter(stream)
    seen = 0
    while limit is None or seen < limit:
        batch, error = None, None
        try:
            batch = next(iterator, None)
        except Exception as caught:
            error = caught
        world.agree(error)  # a rank whose data fails must not leave the others in a collective
        if batch is None:
            break
        scores = forward(task.score, to_device(batch.tensors, world.device))
        batches.append({**{k: v.cpu() for k, v in scores.items()}, "valid": torch.from_numpy(batch.valid)})
        seen += len(batch) * world.size
        on_batch()
    stream.close()
    gathered = {
        key: world.gather_rows(torch.stack([one[key] for one in batches])).flatten(0, 2) for key in batches[0]
    }
    valid = gathered.pop("valid")
    num_unreadable = min(stream.num_samples, seen) - int(valid.sum())
    return {key: value[valid][:limit] for key, value in gathered.items()}, num_unreadable
