"""Heads: what tasks read off the trunk's states. Each is a module of its own, so that ZeRO-3 gathers its weights."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmscale.models.trunk import States

MAX_LOGIT_SCALE = math.log(100.0)


class JointHead(nn.Module):
    """The mean of a segment, projected to the joint space and normalised: (B, embed_dim)."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=width**-0.5)

    def forward(self, states: States) -> Tensor:
        return F.normalize(self.projection(states.mean()).float(), dim=-1)


class LanguageHead(nn.Module):
    """Scores of the next token: (..., width) to (..., num_ids)."""

    def __init__(self, width: int, num_ids: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, num_ids, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


class LogitScale(nn.Module):
    """exp(logit_scale), a 0-d float32 tensor, as in CLIP (Radford et al. 2021): starts at 1 / 0.07, at most 100.

    The optimizer clamps the parameter after each step (see `mmscale.optim`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self) -> Tensor:
        return self.logit_scale.float().exp().squeeze(0)
