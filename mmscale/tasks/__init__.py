"""Tasks, by name: the one thing that is registered. `schedule` says which one a step runs.

A task is one file with one class (see `mmscale.tasks.base.Task`); to add one, write the file and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmscale.config import Config
from mmscale.models import Model, build_model
from mmscale.tasks.base import Task
from mmscale.tasks.caption import Caption
from mmscale.tasks.contrastive import Contrastive

TASKS: dict[str, Callable[[], Task]] = {
    "image_text": lambda: Contrastive("image_text", "image", "text", label="concept"),
    "audio_text": lambda: Contrastive("audio_text", "audio", "spoken", label="utterance"),
    "caption": lambda: Caption("caption", "image", "text"),
}


def model_for(config: Config) -> Model:
    """The model of a config, with a temperature for each contrastive task it names. Raises ConfigError."""
    scales = [name for name in config.tasks if isinstance(TASKS[name](), Contrastive)]
    return build_model(config.model, fields=config.data.fields, scales=scales, seed=config.run.seed)


def schedule(weights: Mapping[str, float], step: int) -> str:
    """The task of a step (from 0), a pure function: the same on every rank, after any resume.

    Low discrepancy: the step falls at a point of the golden-ratio sequence, and the tasks share the unit interval by
    weight, so that any stretch of steps holds nearly the right share of each.
    """
    total = sum(weights.values())
    point = (0.5 + step * 0.6180339887498949) % 1.0 * total
    chosen = ""
    for name, weight in weights.items():
        if weight <= 0:
            continue
        chosen = name
        if point < weight:
            break
        point -= weight
    assert chosen, f"no task has a weight above 0: {dict(weights)}"
    return chosen


__all__ = ["TASKS", "Caption", "Contrastive", "Task", "model_for", "schedule"]
