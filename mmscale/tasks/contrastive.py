"""Contrastive learning over two fields: matching samples close together, all others apart."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from mmscale.evals.retrieval import distinct_rows, retrieval
from mmscale.models.model import Batch, Model
from mmscale.objectives import Group, symmetric_contrastive
from mmscale.tasks.base import Metric, Task


class Contrastive(Task):
    """Two fields as two towers through the one trunk (Radford et al. 2021).

    Where the batch has the `label` field, samples of one label are all each other's positives.
    """

    coupled: ClassVar[bool] = True

    def __init__(self, name: str, x: str, y: str, *, label: str | None = None) -> None:
        super().__init__(name, (x, y))
        self.x, self.y, self.label = x, y, label

    def embed(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        out = {"x": model.represent(self.x, batch), "y": model.represent(self.y, batch)}
        if self.label is not None and self.label in batch:
            out["labels"] = batch[self.label]["x"]
        if "usable" in batch:  # only where some sample lacks a field: it must not even be a negative
            out = {name: value.index_select(0, batch["usable"]["x"]) for name, value in out.items()}
        return {**out, "scale": model.scales[self.name]()}

    def objective(
        self, embeddings: dict[str, Tensor], *, group: Group, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        return symmetric_contrastive(
            embeddings["x"],
            embeddings["y"],
            embeddings["scale"],
            labels=embeddings.get("labels"),
            group=group,
            backend=backend,
        )

    def score(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        present = (batch[self.x]["lengths"] > 0) & (batch[self.y]["lengths"] > 0)
        scores = {
            "x": model.represent(self.x, batch),
            "y": model.represent(self.y, batch),
            "present": present,
        }
        if self.label is not None and self.label in batch:
            scores["label"] = batch[self.label]["x"]
        return scores

    def metrics(self, scores: dict[str, Tensor], *, num_candidates: int) -> dict[str, Metric]:
        present = scores["present"].nonzero().squeeze(1)
        if "label" in scores:
            present = present[distinct_rows(scores["label"][present])]
        rows = present[:num_candidates]
        x, y = scores["x"][rows], scores["y"][rows]
        metrics = {}
        for query, found, a, b in ((self.x, self.y, x, y), (self.y, self.x, y, x)):
            for k, value in retrieval(a, b).items():
                chance = min(1.0, k / max(1, len(rows)))
                metrics[f"{query} to {found} R@{k}"] = Metric(value, chance)
        return {**metrics, "candidates": Metric(float(len(rows)))}

    def predict(self, model: Model, batch: Batch) -> list[object]:
        """Ranks the given values of one field for each given value of the other, by probability."""
        given = [name for name in self.fields if name in batch]
        if len(given) < 2:
            missing = ", ".join(name for name in self.fields if name not in batch)
            raise ValueError(f"{self.name} compares {self.x} with {self.y}: {missing} is missing")
        x, y = model.represent(self.x, batch), model.represent(self.y, batch)
        similarity = x @ y.T
        probability = (similarity * model.scales[self.name]()).softmax(1)
        answers: list[object] = []
        for row, shares in zip(similarity.tolist(), probability.tolist(), strict=True):
            order = sorted(range(len(row)), key=lambda j: -row[j])
            answers.append([{"index": j, "similarity": row[j], "probability": shares[j]} for j in order])
        return answers
