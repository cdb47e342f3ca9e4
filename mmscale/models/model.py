"""`Model`: the modalities of the configured fields, one trunk, and the heads that the tasks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.config import FieldConfig, ModelConfig
from mmscale.models.heads import JointHead, LanguageHead, LogitScale
from mmscale.models.modality import Audio, Image, Label, Text, Tokens
from mmscale.models.trunk import KINDS, Trunk

Batch = Mapping[str, dict[str, Tensor]]  # field name -> {"x", "lengths"}


class Model(nn.Module):
    """Reads named fields of a batch. All parameters are made whatever the fields are, so that checkpoints fit.

    fields maps a field's name to its modality ("text", "image", "audio", "label"); scales names the learned
    temperatures, one for each contrastive task.
    """

    def __init__(self, config: ModelConfig, *, fields: Mapping[str, str], scales: Iterable[str]) -> None:
        super().__init__()
        self.fields = dict(fields)
        self.text = Text(config.text, config.width)
        self.image = Image(config.image, config.width)
        self.audio = Audio(config.audio, config.width)
        self.label = Label()
        self.trunk = Trunk(
            width=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            mlp_ratio=config.mlp_ratio,
            backend=config.backend,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.joint = nn.ModuleDict({kind: JointHead(config.width, config.embed_dim) for kind in KINDS})
        self.language = LanguageHead(config.width, self.text.num_ids)
        self.scales = nn.ModuleDict({name: LogitScale() for name in scales})
        self.kernels = config.backend

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Runs one function of the model, such as a task's `embed`, inside the hooks of whoever wraps the model."""
        return function(self, *args)

    def modality(self, field: str) -> Text | Image | Audio | Label:
        return getattr(self, self.fields[field])

    def tokens(self, field: str, batch: Batch) -> Tokens:
        modality = self.modality(field)
        assert not isinstance(modality, Label), f"{field} is a label and has no tokens"
        return modality.embed(batch[field])

    def represent(self, field: str, batch: Batch) -> Tensor:
        """A field's place in the joint space: (B, embed_dim) float32, of unit length."""
        tokens = self.tokens(field, batch)
        return self.joint[tokens.kind](self.trunk([tokens]))


def build_model(
    config: ModelConfig, *, fields: Mapping[str, FieldConfig], scales: Iterable[str], seed: int
) -> Model:
    """A model with weights drawn from the seed alone: equal on every rank, and the global generator untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(config, fields={name: f.modality for name, f in fields.items()}, scales=scales)
