"""Parameter groups, the optimizer and the learning-rate schedule.

`make_optimizer` gives AdamW with the usual exclusions from weight decay, and clamps the logit scales after each step as
CLIP does. A group is clamped by its "clamp" entry, elementwise, so it works on the flat shards that ZeRO makes of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mmscale.config import OptimConfig
from mmscale.models.heads import MAX_LOGIT_SCALE, LogitScale


class ClampAfterStep:
    """Mixed into an optimizer: after a step, the parameters of a group lie within its "clamp" (low, high)."""

    param_groups: list[dict[str, Any]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *args: Any, **kwargs: Any) -> Any:
        loss = super().step(closure, *args, **kwargs)  # type: ignore[misc]
        for group in self.param_groups:
            if "clamp" in group:
                for parameter in group["params"]:
                    parameter.clamp_(*group["clamp"])
        return loss


class EagerAdamW(torch.optim.AdamW):
    """torch's AdamW (Loshchilov and Hutter 2019) without the wrappers that keep its methods out of compiled graphs.

    At their first call those import torch's compiler, which took 1.6 s of the 6 s of CPU time that a rank's start took.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class AdamW(ClampAfterStep, EagerAdamW):
    """AdamW with clamped groups."""


class CheckedAdamW(AdamW):
    """For whole gradients, equal on all ranks: clips them, and makes no step if they aren't finite.

    What DeepSpeed's own optimizers do; it reads the same attributes of theirs. All ranks hold the same sums after the
    all-reduce, so they decide alike. Deciding waits for the device once a step, as those do too.
    """

    overflow = False  # the last step was left out
    _global_grad_norm: float | None = None  # of the last step, before clipping

    def __init__(self, params: Iterable[dict[str, Any]], *, max_norm: float, **kwargs: Any) -> None:
        """max_norm: the global norm to clip by; 0 for none."""
        super().__init__(params, **kwargs)
        self.max_norm = max_norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *args: Any, **kwargs: Any) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self._global_grad_norm = norm.item()
        self.overflow = not math.isfinite(self._global_grad_norm)
        if self.overflow:
            self._global_grad_norm = math.inf
            return None
        if self.max_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return super().step(closure, *args, **kwargs)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Three groups: matrices (decayed); vectors, embeddings, positions (not); logit scales (clamped, not decayed)."""
    scales = {id(p) for m in model.modules() if isinstance(m, LogitScale) for p in m.parameters()}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    clamped: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        # ZeRO-3 may have emptied the parameter: its full shape is then in ds_shape.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if id(parameter) in scales:
            clamped.append(parameter)
        elif (
            len(shape) < 2
            or id(parameter) in tables
            or name.split(".")[-1] in ("position", "gates", "qkv_scale")
        ):
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": clamped, "weight_decay": 0.0, "clamp": (0.0, MAX_LOGIT_SCALE)},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    groups: Iterable[dict[str, Any]], config: OptimConfig, *, offloaded: bool = False, checked: bool = False
) -> torch.optim.Optimizer:
    """AdamW over the groups. offloaded: DeepSpeed's CPU Adam, which a ZeRO optimizer kept in host memory needs.

    checked: `CheckedAdamW`, where DeepSpeed has no optimizer of its own around it that checks and clips.
    """
    kwargs: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if offloaded:
        from mmscale.engine import cpu_adam

        return cpu_adam(list(groups), ClampAfterStep, **kwargs)
    if checked:
        return CheckedAdamW(list(groups), max_norm=config.clip_norm, **kwargs)
    return AdamW(list(groups), **kwargs)


def learning_rate(config: OptimConfig, step: int, *, warmup_steps: int, total_steps: int | None) -> float:
    """The rate of a step (from 0): linear from lr / warmup_steps over the warm-up, then the schedule down to final_lr.

    total_steps is None where the run ends by the clock; the schedule is then constant.
    """
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant" or total_steps is None:
        return config.lr
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    share = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.final_lr + (1 - config.final_lr) * share)
