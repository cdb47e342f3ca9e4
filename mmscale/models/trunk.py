"""The trunk: one transformer over all modalities, bidirectional over the prefix and causal over the target.

`trunk(prefix, target) -> States`. All tokens of a batch lie in one buffer (B, T, width), laid out once: the segments
side by side, each padded to its own longest sample. Norms and linear layers run over the whole of it, attention reads
and writes it in place through `packed_attention` with a segment table (start, lengths, causal, gate), so that nothing
is concatenated in a layer and no mask is built. Pre-norm, QK-norm; no dropout and no batch statistics, so a sample's
states don't depend on its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmscale_kernels.packed import packed_attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmscale.models.modality import Tokens, valid_mask

KINDS = ("text", "image", "audio")


class States(NamedTuple):
    """What the trunk made of its tokens: x (B, T, width), and where the segments of prefix and target lie in T."""

    x: Tensor
    offsets: tuple[int, ...]
    lengths: Tensor  # (B, segments) int32

    def segment(self, index: int) -> tuple[Tensor, Tensor]:
        """The states (B, T_segment, width) and lengths (B,) of one segment; -1 is the target where there is one."""
        index %= len(self.offsets)
        ends = (*self.offsets[1:], self.x.shape[1])
        return self.x[:, self.offsets[index] : ends[index]], self.lengths[:, index]

    def mean(self, index: int = 0) -> Tensor:
        """The mean over a segment's valid tokens, (B, width); zero for a sample that has none."""
        x, lengths = self.segment(index)
        mask = valid_mask(lengths, x.shape[1]).unsqueeze(2)
        return (x * mask).sum(1) / lengths.clamp(min=1).unsqueeze(1)


def _linear(inputs: int, outputs: int, *, bias: bool, scale: float = 1.0) -> nn.Linear:
    """A linear layer whose outputs have `scale` times the inputs' spread at the start."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=scale * inputs**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    head_part: Tensor
    normed: Tensor

    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, scale: float, backend: str | None
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.backend = num_heads, num_kv_heads, backend
        self.head_dim = width // num_heads
        self.qkv = _linear(width, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.out = _linear(width, width, bias=False, scale=scale)
        self.qkv_scale = nn.Parameter(torch.ones(3, self.head_dim))  # of queries, keys, values
        self.gates = nn.Parameter(torch.zeros(len(KINDS), num_heads))  # log weight of a source's keys
        heads = torch.tensor([0] * num_heads + [1] * num_kv_heads + [2] * num_kv_heads)
        self.register_buffer("head_part", heads, persistent=False)
        self.register_buffer("normed", (heads < 2).view(-1, 1), persistent=False)

    def forward(
        self,
        x: Tensor,
        offsets: tuple[int, ...],
        lengths: Tensor,
        causal: tuple[bool, ...],
        kinds: tuple[int, ...],
    ) -> Tensor:
        batch, tokens, width = x.shape
        buffer = self.qkv(x).view(batch, tokens, -1, self.head_dim)
        # QK-norm on the whole buffer, values passing with factor one: cheaper than cutting it up and joining it again.
        factor = torch.rsqrt(buffer.square().mean(-1, keepdim=True) + 1e-6)
        factor = torch.where(self.normed, factor, 1.0)
        buffer = buffer * factor * self.qkv_scale.index_select(0, self.head_part)
        y = packed_attention(
            buffer,
            num_heads=self.num_heads,
            offsets=offsets,
            lengths=lengths,
            causal=causal,
            gates=torch.stack([self.gates[kind] for kind in kinds]) if len(offsets) > 1 else None,
            backend=self.backend,
        )
        return self.out(y.reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(
        self, width: int, num_heads: int, num_kv_heads: int, hidden: int, depth: int, backend: str | None
    ) -> None:
        super().__init__()
        scale = (
            2 * depth
        ) ** -0.5  # so that the residual stream doesn't grow with the number of its summands
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, num_heads, num_kv_heads, scale, backend)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.up = _linear(width, hidden, bias=True)
        self.down = _linear(hidden, width, bias=True, scale=scale)

    def forward(
        self,
        x: Tensor,
        offsets: tuple[int, ...],
        lengths: Tensor,
        causal: tuple[bool, ...],
        kinds: tuple[int, ...],
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), offsets, lengths, causal, kinds)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Trunk(nn.Module):
    """depth pre-norm blocks and a final norm. Parameters are float32 until the engine casts them."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 4.0,
        backend: str | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        hidden = round(width * mlp_ratio)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, num_kv_heads or num_heads, hidden, depth, backend) for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, prefix: list[Tokens], target: Tokens | None = None) -> States:
        segments = [*prefix, target] if target is not None else prefix
        causal = (False,) * len(prefix) + (True,) * (target is not None)
        offsets = tuple(sum(t.x.shape[1] for t in segments[:i]) for i in range(len(segments)))
        if len(segments) == 1:
            x, lengths = segments[0].x, segments[0].lengths.unsqueeze(1)
        else:
            x = torch.cat([t.x for t in segments], 1)  # the one time that the buffer is laid out
            lengths = torch.stack([t.lengths for t in segments], 1)
        kinds = tuple(KINDS.index(t.kind) for t in segments)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, offsets, lengths, causal, kinds, use_reentrant=False)
            else:
                x = block(x, offsets, lengths, causal, kinds)
        return States(self.norm(x), offsets, lengths)
