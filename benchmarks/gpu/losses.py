"""The losses' cases: CLIP's and SigLIP's, ours against the plain expressions and the peers that can be imported.

Counted work, the same for all contenders: one product of N x D by D x N forward (2 N^2 D operations), and with the
gradients two more for dx and dy, and for the softmax a second pass over the logits: 3 products for the sigmoid, 4 for
the softmax. Bytes: x and y once, and their gradients once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmscale_kernels import contrastive_loss, explain, sigmoid_loss
from torch import Tensor

from gpu.harness import Case, Contender, Emit, Setting, Tensors, Work

SCALE = {"softmax": 100.0, "sigmoid": 10.0}  # where CLIP's ends up, and where SigLIP's starts


def make(kind: str, setting: Setting, sizes: dict[str, Any], seed: int) -> Tensors:
    generator = torch.Generator(device=setting.device).manual_seed(seed)
    x, y = (
        F.normalize(torch.randn(sizes["n"], sizes["d"], device=setting.device, generator=generator), dim=1)
        for _ in range(2)
    )
    # Pairs resemble each other, so that the loss isn't that of noise.
    y = F.normalize(x + y, dim=1)
    made: Tensors = {"x": x.bfloat16().requires_grad_(), "y": y.bfloat16().requires_grad_()}
    made["scale"] = torch.tensor(SCALE[kind], device=setting.device, requires_grad=True)
    if kind == "sigmoid":
        made["bias"] = torch.tensor(-10.0, device=setting.device, requires_grad=True)
    return made


def softmax_expression(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on one rank, written out."""
    logits = scale * x @ y.T
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def sigmoid_expression(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss on one rank, written out."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), device=x.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def dense(kind: str, inputs: Tensors) -> Tensor:
    if kind == "softmax":
        return softmax_expression(inputs["x"], inputs["y"], inputs["scale"])
    return sigmoid_expression(inputs["x"], inputs["y"], inputs["scale"], inputs["bias"])


def _arguments(kind: str, inputs: Tensors) -> tuple[Tensor, ...]:
    names = ("x", "y", "scale") if kind == "softmax" else ("x", "y", "scale", "bias")
    return tuple(inputs[name] for name in names)


def _open_clip(kind: str) -> Callable[[Tensors], Tensor]:
    module = importlib.import_module("open_clip.loss")
    loss = module.ClipLoss() if kind == "softmax" else module.SigLipLoss()
    return lambda inputs: loss(*_arguments(kind, inputs))


def _siglip_kernel() -> Callable[[Tensors], Tensor]:
    fused = importlib.import_module("siglip_kernel").fused_siglip_loss
    return lambda i: fused(i["x"], i["y"], i["scale"].log(), i["bias"])


def _memeff() -> Callable[[Tensors], Tensor]:
    # It takes the temperature as a number: no gradient of it. stable=True would change the gradients' scale.
    loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(
        temperature=1 / SCALE["softmax"], normalized_inputs=True, stable=False
    )
    # The added 0 gives the scale a gradient, so that all contenders are differentiated alike.
    return lambda i: loss(i["x"], i["y"]) + 0 * i["scale"]


def _inf_cl() -> Callable[[Tensors], Tensor]:
    loss = importlib.import_module("inf_cl").cal_inf_loss
    return lambda i: (loss(i["x"], i["y"], scale=i["scale"]) + loss(i["y"], i["x"], scale=i["scale"])) / 2


PEERS: dict[str, list[tuple[str, Callable[[], Callable[[Tensors], Tensor]], str]]] = {
    "softmax": [
        ("open_clip ClipLoss", lambda: _open_clip("softmax"), ""),
        ("memeff", _memeff, "no gradient of the scale"),
        ("inf-cl", _inf_cl, ""),
    ],
    "sigmoid": [
        ("open_clip SigLipLoss", lambda: _open_clip("sigmoid"), ""),
        ("siglip-kernel", _siglip_kernel, ""),
    ],
}


def contenders(kind: str, setting: Setting, inputs: Tensors, emit: Emit) -> list[Contender]:
    ours = contrastive_loss if kind == "softmax" else sigmoid_loss
    expression = softmax_expression if kind == "softmax" else sigmoid_expression
    compiled = setting.compiled(expression)
    found = [
        Contender("ours", lambda i: ours(*_arguments(kind, i), group=False)),
        Contender("eager", lambda i: expression(*_arguments(kind, i))),
        Contender("compiled", lambda i: compiled(*_arguments(kind, i))),
    ]
    for name, load, note in PEERS[kind]:
        try:
            found.append(Contender(name, load(), needs_gpu=True, note=note))
        except Exception as error:
            emit("absent", case=kind, contender=name, why=f"{type(error).__name__}: {error}")
    return found


def work(kind: str, sizes: dict[str, Any], inputs: Tensors) -> dict[str, Work]:
    unit = 2.0 * sizes["n"] ** 2 * sizes["d"]
    features = 2.0 * sizes["n"] * sizes["d"] * inputs["x"].element_size()
    return {
        "forward": Work(unit, features),
        "forward_backward": Work(unit * (4 if kind == "softmax" else 3), 2 * features),
    }


def decide(kind: str, inputs: Tensors) -> dict[str, Any]:
    ours = contrastive_loss if kind == "softmax" else sigmoid_loss
    decision = explain(ours, *_arguments(kind, inputs), group=False)
    return {"backend": decision.backend, "says": str(decision)}


def case(name: str, kind: str, n: int, d: int) -> Case:
    return Case(
        name=name,
        sizes={"n": n, "d": d},
        tiny={"n": 96, "d": 24},
        error_sizes={"n": min(n, 4096), "d": d},
        make=lambda setting, sizes, seed: make(kind, setting, sizes, seed),
        dense=lambda inputs: dense(kind, inputs),
        contenders=lambda setting, inputs, emit: contenders(kind, setting, inputs, emit),
        work=lambda sizes, inputs: work(kind, sizes, inputs),
        decide=lambda inputs: decide(kind, inputs),
        # The gradients are computed in the forward pass, so a backward pass alone says nothing.
        passes=("forward", "forward_backward"),
        about={"scale": SCALE[kind]},
    )
