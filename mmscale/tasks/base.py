"""The contract of a task: which fields go in, what comes out, how it is measured.

The trainer calls `embed` on each micro-batch and `objective` on what it gave. The split lets a loss that couples
samples see all micro-batches and ranks at once while activations of one micro-batch only are in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mmscale.models.model import Batch, Model
from mmscale.objectives import Group


class Metric(NamedTuple):
    """A score and what guessing would score, None where that isn't known."""

    value: float
    chance: float | None = None


class Task(ABC):
    """One thing to learn. Subclasses keep no state: a task may be made anew at any time."""

    coupled: ClassVar[bool] = False  # whether a sample's loss depends on the other samples
    generates: ClassVar[bool] = (
        False  # whether scoring generates, which is slow: fewer samples are scored then
    )

    def __init__(self, name: str, fields: tuple[str, ...], *, kinds: tuple[str, ...] | None = None) -> None:
        """kinds: the modality that each field must have; None for any that makes tokens."""
        self.name, self.fields, self.kinds = name, fields, kinds

    def accepts(self, field: str, modality: str) -> bool:
        """Whether the task can read a field of that modality."""
        if self.kinds is None:
            return modality != "label"
        return modality == self.kinds[self.fields.index(field)]

    def usable(self, batch: Batch) -> Tensor:
        """The rows (int64) of a batch on the CPU that have all the task's fields."""
        present = torch.stack([batch[name]["lengths"] > 0 for name in self.fields]).all(0)
        return present.nonzero().squeeze(1)

    def weight(self, batch: Batch) -> float:
        """What `objective` will return as weight, known on the CPU before anything ran; one for a coupled task."""
        return 1.0

    @abstractmethod
    def embed(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Runs the model. Every module runs whatever the samples lack, so that all ranks do the same collectives.

        A coupled task returns tensors with a row for each sample (joined over micro-batches along it) or of no
        dimension (equal in all micro-batches).
        """

    @abstractmethod
    def objective(
        self, embeddings: dict[str, Tensor], *, group: Group, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        """(loss sum, weight) of this rank: 0-d tensors. backend: of the kernels."""

    @abstractmethod
    def score(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Evaluation of one batch: named tensors, each with a row for each sample, present or not."""

    @abstractmethod
    def metrics(self, scores: dict[str, Tensor], *, num_candidates: int) -> dict[str, Metric]:
        """Metrics from the scores of the whole evaluation set, in its order, on the CPU."""

    @abstractmethod
    def predict(self, model: Model, batch: Batch) -> list[object]:
        """A json-able answer for each row of the first field. Raises ValueError where an input is missing."""
