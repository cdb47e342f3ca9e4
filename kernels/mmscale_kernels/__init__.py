"""Operators for multimodal training, each a torch.library operator with a Triton, a tiled and a reference
form.

- `contrastive_loss`, `sigmoid_loss`: CLIP's and SigLIP's losses, exact over all ranks, never holding N x M.

`backend=None` chooses the form (see `dispatch`), and `explain(op, *args, **kwargs)` says which one and why.
Needs torch; triton only for the Triton forms, and only when one of them runs.
"""

from .dispatch import Decision, explain
from .losses import contrastive_loss, sigmoid_loss

__all__ = ["Decision", "contrastive_loss", "explain", "sigmoid_loss"]
