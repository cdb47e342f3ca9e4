"""The packed attention case: what a trunk runs in every layer, padded modalities in one buffer.

Counted work as for the other attention cases (attention.py), over the valid tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmscale_kernels import explain, packed_attention
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from gpu.attention import BACKENDS, spread_lengths
from gpu.harness import Case, Contender, Emit, Setting, Tensors, Work


def make(setting: Setting, sizes: dict[str, Any], seed: int) -> Tensors:
    generator = torch.Generator(device=setting.device).manual_seed(seed)
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    batch, heads, width, segments = sizes["b"], sizes["h"], sizes["d"], sizes["segments"]
    columns = sum(segments)
    qkv = torch.randn(
        batch, columns, 3 * heads, width, device=setting.device, dtype=dtype, generator=generator
    )
    lengths = torch.stack([spread_lengths(batch, n, 3 + i) for i, n in enumerate(segments)], 1)
    place = torch.cat([torch.arange(n) for n in segments])
    of = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    rows = (place < lengths[:, of]).to(setting.device)  # (B, T)
    grad_out = torch.randn(
        batch, columns, heads, width, device=setting.device, dtype=dtype, generator=generator
    )
    return {
        "qkv": qkv.requires_grad_(),
        "rows": rows,
        "table": lengths.to(setting.device),
        "host_lengths": lengths,
        "grad_out": grad_out * rows[:, :, None, None],
    }


def case(name: str) -> Case:
    """Self-attention over a packed buffer of three padded modalities, one gradient buffer."""
    sizes: dict[str, Any] = {"b": 32, "h": 12, "d": 64, "segments": [197, 77, 256]}
    tiny: dict[str, Any] = {"b": 2, "h": 2, "d": 16, "segments": [17, 9, 20]}

    def offsets(inputs: Tensors) -> tuple[int, ...]:
        segments = (tiny if inputs["qkv"].shape[1] == sum(tiny["segments"]) else sizes)["segments"]
        return tuple(sum(segments[:i]) for i in range(len(segments)))

    def arguments(inputs: Tensors) -> dict[str, Any]:
        return {
            "num_heads": inputs["qkv"].shape[2] // 3,
            "offsets": offsets(inputs),
            "lengths": inputs["table"],
            "causal": (False,) * 3,
        }

    def split(inputs: Tensors) -> list[Tensor]:
        return [x.transpose(1, 2) for x in inputs["qkv"].chunk(3, 2)]

    def dense(inputs: Tensors) -> Tensor:
        query, key, value = split(inputs)
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        logits = logits.masked_fill(~inputs["rows"][:, None, None, :], float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2)

    def masked(backend: str, mask: Tensor) -> Callable[[Tensors], Tensor]:
        def run(inputs: Tensors) -> Tensor:
            with sdpa_kernel([BACKENDS[backend]]):
                return F.scaled_dot_product_attention(*split(inputs), attn_mask=mask).transpose(1, 2)

        return run

    def contenders(setting: Setting, inputs: Tensors, emit: Emit) -> list[Contender]:
        mask = inputs["rows"][:, None, None, :].expand(-1, -1, inputs["qkv"].shape[1], -1)
        return [
            Contender("ours", lambda given: packed_attention(given["qkv"], **arguments(given))),
            Contender("SDPA efficient + mask", masked("efficient", mask), needs_gpu=True),
            Contender("SDPA cuDNN + mask", masked("cuDNN", mask), needs_gpu=True),
        ]

    def work(sizes: dict[str, Any], inputs: Tensors) -> dict[str, Work]:
        per_sample = inputs["host_lengths"].sum(1).double()
        pairs = float((per_sample**2).sum()) * sizes["h"]
        token = sizes["h"] * sizes["d"] * inputs["qkv"].element_size()
        tokens = float(per_sample.sum())
        forward = Work(4 * sizes["d"] * pairs, 4 * token * tokens)
        backward = Work(10 * sizes["d"] * pairs, 8 * token * tokens)
        both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
        return {"forward": forward, "backward": backward, "forward_backward": both}

    def decide(inputs: Tensors) -> dict[str, Any]:
        decision = explain(packed_attention, inputs["qkv"], **arguments(inputs))
        return {"backend": decision.backend, "says": str(decision)}

    return Case(
        name=name,
        sizes=sizes,
        tiny=tiny,
        error_sizes={**sizes, "b": 4, "h": 2},
        make=make,
        dense=dense,
        contenders=contenders,
        work=work,
        decide=decide,
        # Rows of padding are 0 in ours and arbitrary in the peers.
        select=lambda inputs, out: out * inputs["rows"][:, :, None, None],
    )
