"""The deformable attention case: ours against the usual form, one grid_sample a level.

Counted work, the same for all: a bilinear sample is 8 operations a channel, its weight 2; backward three times that.
Bytes: value, places, weights and result once forward; backward reads them and the gradient, and writes three gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from mmscale_kernels import deformable_attention, explain
from torch import Tensor

from gpu.harness import Case, Contender, Emit, Setting, Tensors, Work

LEVELS = [(64, 64), (32, 32), (16, 16), (8, 8)]
TINY_LEVELS = [(8, 8), (4, 5)]


def make(setting: Setting, sizes: dict[str, Any], seed: int) -> Tensors:
    generator = torch.Generator(device=setting.device).manual_seed(seed)
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32
    batch, heads, width, lq, points = (sizes[name] for name in ("b", "h", "d", "lq", "points"))
    levels = sizes["levels"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device, generator=generator)

    pixels = sum(h * w for h, w in levels)
    weights = normal(batch, lq, heads, len(levels) * points).softmax(-1)
    places = torch.rand(batch, lq, heads, len(levels), points, 2, device=setting.device, generator=generator)
    return {
        "value": normal(batch, pixels, heads, width).to(dtype).requires_grad_(),
        # fp32, as a detector keeps them: 8 bits would not tell two pixels of a map apart
        "places": places.requires_grad_(),
        "weights": weights.view(batch, lq, heads, len(levels), points).to(dtype).requires_grad_(),
        "grad_out": normal(batch, lq, heads * width).to(dtype),
    }


def case(name: str) -> Case:
    sizes = {"b": 8, "h": 8, "d": 32, "lq": 5440, "points": 4, "levels": LEVELS}
    tiny = {"b": 2, "h": 2, "d": 8, "lq": 12, "points": 2, "levels": TINY_LEVELS}

    def levels(inputs: Tensors) -> list[tuple[int, int]]:
        return LEVELS if inputs["places"].shape[3] == len(LEVELS) else TINY_LEVELS

    def run(inputs: Tensors, backend: str | None) -> Tensor:
        return deformable_attention(
            inputs["value"], levels(inputs), inputs["places"], inputs["weights"], backend=backend
        )

    def contenders(setting: Setting, inputs: Tensors, emit: Emit) -> list[Contender]:
        usual = setting.compiled(lambda given: run(given, "reference"))
        return [
            Contender("ours", lambda given: run(given, None)),
            Contender("grid_sample", lambda given: run(given, "reference")),
            Contender("grid_sample, compiled", usual),
        ]

    def work(sizes: dict[str, Any], inputs: Tensors) -> dict[str, Work]:
        samples = float(inputs["weights"].numel())
        read = sum(
            inputs[name].numel() * inputs[name].element_size() for name in ("value", "places", "weights")
        )
        written = inputs["grad_out"].numel() * inputs["grad_out"].element_size()
        forward = Work(10 * samples * sizes["d"], read + written)
        backward = Work(30 * samples * sizes["d"], 2 * read + written)
        both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
        return {"forward": forward, "backward": backward, "forward_backward": both}

    def decide(inputs: Tensors) -> dict[str, Any]:
        decision = explain(
            deformable_attention, inputs["value"], levels(inputs), inputs["places"], inputs["weights"]
        )
        return {"backend": decision.backend, "says": str(decision)}

    return Case(
        name=name,
        sizes=sizes,
        tiny=tiny,
        error_sizes={**sizes, "b": 1, "lq": 256},
        make=make,
        dense=lambda inputs: run(inputs, "reference"),
        contenders=contenders,
        work=work,
        decide=decide,
    )
