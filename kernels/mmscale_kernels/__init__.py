"""Operators for multimodal training, each with a Triton form, a tiled one for any device, and a plain
reference.

- `cross_modal_attention` over any number of `Source`s, `packed_attention` over one buffer of segments;
- `contrastive_loss`, `sigmoid_loss`: CLIP's and SigLIP's losses, exact over all ranks, never holding N x M;
- `deformable_attention`: multi-scale sampling as in Deformable DETR.

All are torch.library operators. `backend=None` chooses the form (see `dispatch`), and `explain(op, *args,
**kwargs)` says which one and why. Needs torch; triton only for the Triton forms, and only when one of them
runs.
"""

from .attention import Source, cross_modal_attention
from .deformable import deformable_attention
from .dispatch import Decision, explain
from .losses import contrastive_loss, sigmoid_loss
from .packed import packed_attention

__all__ = [
    "Decision",
    "Source",
    "contrastive_loss",
    "cross_modal_attention",
    "deformable_attention",
    "explain",
    "packed_attention",
    "sigmoid_loss",
]
