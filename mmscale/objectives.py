"""Objectives: pure loss functions of tensors.

Each returns (loss sum, weight), never a mean: the trainer divides by the weight of all ranks and micro-batches, so that
a loss doesn't depend on how its samples were dealt out.
"""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
import torch.nn.functional as F
from mmscale_kernels import contrastive_loss
from torch import Tensor

Group = dist.ProcessGroup | Literal[False] | None  # None: all ranks, False: this rank alone


def symmetric_contrastive(
    x: Tensor, y: Tensor, scale: Tensor, *, labels: Tensor | None, group: Group, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Symmetric InfoNCE over the rows of all ranks (Radford et al. 2021), pairs of equal label all being positives.

    x, y: (N, D) of this rank, of unit length; scale: 0-d; labels: (N,) int64 or None for the diagonal alone.
    The loss couples the samples of all ranks, so its sum is the global mean, with weight one on each rank.
    """
    loss = contrastive_loss(x, y, scale, labels=labels, group=group, backend=backend)
    return loss, loss.new_ones(())


IGNORED = -100  # a label that asks for nothing


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats summed over each row's labels that aren't IGNORED, and their number: both (B,).

    logits: (B, T, num_ids), labels: (B, T) int64.
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view(labels.shape).sum(1), (labels != IGNORED).sum(1)


def next_token(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`token_losses` summed over the rows: 0-d loss sum and number of tokens."""
    losses, counts = token_losses(logits, labels)
    return losses.sum(), counts.sum()
