"""Captioning: a picture in, its text out, token by token."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mmscale.models.model import Batch, Model
from mmscale.models.trunk import States
from mmscale.objectives import IGNORED, Group, next_token, token_losses
from mmscale.tasks.base import Metric, Task


class Caption(Task):
    """The picture is the trunk's prefix, the text its causal target; loss over the tokens of the text and its <eos>."""

    generates: ClassVar[bool] = True

    def __init__(self, name: str, image: str, text: str) -> None:
        super().__init__(name, (image, text), kinds=("image", "text"))
        self.image, self.text = image, text

    def weight(self, batch: Batch) -> float:
        lengths = batch[self.text]["lengths"]
        present = (batch[self.image]["lengths"] > 0) & (lengths > 0)
        return float(((lengths + 1) * present).sum())

    def _states(self, model: Model, batch: Batch, target: dict[str, Tensor]) -> States:
        tokens = model.text.embed(target)
        return model.trunk([model.tokens(self.image, batch)], tokens)

    def embed(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        target, labels = model.text.target(batch[self.text])
        states, _ = self._states(model, batch, target).segment(-1)
        present = (batch[self.image]["lengths"] > 0).unsqueeze(1)
        return {"logits": model.language(states), "labels": torch.where(present, labels, IGNORED)}

    def objective(
        self, embeddings: dict[str, Tensor], *, group: Group, backend: str | None
    ) -> tuple[Tensor, Tensor]:
        return next_token(embeddings["logits"], embeddings["labels"])

    def generate(self, model: Model, batch: Batch) -> Tensor:
        """The most likely text, token by token: ids (B, max_length), <pad> after the end."""
        text = model.text
        num_rows = len(batch[self.image]["lengths"])
        device = batch[self.image]["x"].device
        ids = torch.full((num_rows, 1), text.bos_id, dtype=torch.int64, device=device)
        ended = torch.zeros(num_rows, 1, dtype=torch.bool, device=device)
        for size in range(1, text.max_length + 1):
            lengths = torch.full((num_rows,), size, dtype=torch.int32, device=device)
            states, _ = self._states(model, batch, {"x": ids, "lengths": lengths}).segment(-1)
            best = model.language(states[:, -1:]).argmax(-1)
            ended = ended | (best == text.eos_id)
            ids = torch.cat([ids, torch.where(ended, text.pad_id, best)], 1)
        return ids[:, 1:]

    def score(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.embed(model, batch)
        losses, tokens = token_losses(embeddings["logits"], embeddings["labels"])
        ids = self.generate(model, batch)
        wanted = torch.full_like(ids, model.text.pad_id)
        given = batch[self.text]["x"]
        wanted[:, : given.shape[1]] = given
        return {"loss": losses, "tokens": tokens, "exact": (ids == wanted).all(1), "wanted": wanted}

    def metrics(self, scores: dict[str, Tensor], *, num_candidates: int) -> dict[str, Metric]:
        rows = (scores["tokens"] > 0).nonzero().squeeze(1)
        if len(rows) == 0:
            return {}
        _, counts = torch.unique(scores["wanted"][rows], dim=0, return_counts=True)
        exact = scores["exact"][rows].double().mean().item()
        return {
            "loss per token": Metric((scores["loss"][rows].sum() / scores["tokens"][rows].sum()).item()),
            "exact match": Metric(
                exact, counts.max().item() / len(rows)
            ),  # chance: always the commonest text
        }

    def predict(self, model: Model, batch: Batch) -> list[object]:
        if self.image not in batch:
            raise ValueError(f"{self.name} describes a picture: {self.image} is missing")
        return [
            model.text.write([i for i in row if i != model.text.pad_id])
            for row in self.generate(model, batch).tolist()
        ]
