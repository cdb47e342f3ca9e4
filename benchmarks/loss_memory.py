"""Memory of the contrastive loss against the dense expression, forward and backward, each in a process of its own.

    python benchmarks/loss_memory.py            # N = 16,384, D = 64, float32, on the CPU

Prints by how much the process's largest resident size grew over one loss and its gradients, the inputs left out.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys

import torch
import torch.nn.functional as F
from mmscale_kernels import contrastive_loss
from torch import Tensor

N, D = 16_384, 64


def dense(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * x @ y.T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def growth_mib(form: str) -> tuple[float, float]:
    """(growth in MiB, the loss) of one forward and backward pass."""
    loss_of = {"dense": dense, "tiled": contrastive_loss}[form]
    generator = torch.Generator().manual_seed(0)

    def measure(num_rows: int) -> float:
        x, y = (F.normalize(torch.randn(num_rows, D, generator=generator), dim=1) for _ in range(2))
        scale = torch.tensor(14.3, requires_grad=True)
        loss = loss_of(x.requires_grad_(), y.requires_grad_(), scale)
        loss.backward()
        return float(loss.detach())

    measure(64)  # imports and thread pools are not the loss's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss = measure(N)
    inputs = 4 * N * D * 4 / 2**20  # x, y and their gradients, which any form has
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - inputs, loss


def main() -> int:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        results = pool.map(growth_mib, ["dense", "tiled"], chunksize=1)
    for form, (growth, loss) in zip(("dense", "tiled"), results, strict=True):
        print(f"{form}: {growth:,.0f} MiB, loss {loss:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
