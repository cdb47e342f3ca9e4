"""The engine: DeepSpeed behind a narrow door.

ZeRO 0 to 3, offload to CPU or NVMe, fp32 or bf16, clipping and accumulation are DeepSpeed's. `train_step` is ours: it
runs a task's micro-batches so that the gradient is that of one batch over all ranks, contrastive losses included. A
step whose gradients aren't finite changes nothing, on any rank: DeepSpeed sees to that but in fp32 without ZeRO, where
`mmscale.optim.CheckedAdamW` does.
The trade-off: under ZeRO-3 a model is built whole on each host before DeepSpeed cuts it up.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from mmscale.config import EngineConfig, OptimConfig
from mmscale.doctor import clear_stale_locks
from mmscale.errors import ConfigError
from mmscale.heartbeat import Heartbeat
from mmscale.models.model import Batch, Model
from mmscale.optim import make_optimizer, parameter_groups
from mmscale.tasks import Task
from mmscale.world import World


def load_deepspeed() -> Any:
    """Imports DeepSpeed, quiet, without its shared-memory all-reduce.

    That one is compiled at the first start; a process killed meanwhile leaves a lock on which later starts hang, and
    machines without a compiler can't start at all. Gloo does its work.
    """
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that torch has renamed; a user can't help that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    # It imports an optimizer that isn't used here wherever it asks whether one is that. As that is imported it compiles
    # a function, for which torch imports its compiler: 2.8 s of CPU time in each rank's start.
    with mock.patch("deepspeed.runtime.compiler.compile", return_value=lambda function: function):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Made anew for each engine: the one DeepSpeed remembers may be of a process group that was destroyed since, as
    # between two runs in one process.
    deepspeed.utils.groups._WORLD_GROUP = None
    return deepspeed


def cpu_adam(groups: list[dict[str, Any]], mixin: type, **kwargs: Any) -> torch.optim.Optimizer:
    """DeepSpeed's Adam for optimizer states in host memory, with a mixin; it is compiled at its first use."""
    load_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    clear_stale_locks()  # of a rank that was killed while it compiled: on it this one would wait for ever
    try:
        return type("CPUAdamW", (mixin, DeepSpeedCPUAdam), {})(groups, adamw_mode=True, **kwargs)
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"engine.offload_optimizer needs DeepSpeed's CPU Adam, which needs a C++ compiler and ninja: {error}"
        ) from None


def deepspeed_config(
    engine: EngineConfig, *, micro_batch: int, accumulation: int, world_size: int, clip_norm: float
) -> dict[str, Any]:
    """The configuration that DeepSpeed gets. micro_batch: samples of one rank in one forward pass."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    for part, place in (("optimizer", engine.offload_optimizer), ("param", engine.offload_parameters)):
        if place != "none":
            zero[f"offload_{part}"] = {"device": place, "pin_memory": torch.cuda.is_available()}
        if place == "nvme":
            zero[f"offload_{part}"]["nvme_path"] = engine.nvme_path
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro_batch * accumulation * world_size,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": engine.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


class StepResult(NamedTuple):
    """What became of a step. Reading `loss` waits for the device, `applied` doesn't."""

    loss: Tensor  # 0-d, on the device; its sum over ranks is the global loss
    applied: bool  # equal on all ranks; False where gradients weren't finite: nothing has changed


class Engine:
    """A model and its optimizer, sharded. `micro_batch`: samples of one rank in one forward pass."""

    def __init__(
        self,
        model: Model,
        *,
        config: EngineConfig,
        optim: OptimConfig,
        world: World,
        micro_batch: int,
        accumulation: int,
        universal: bool = False,
    ) -> None:
        deepspeed = load_deepspeed()
        self.world, self.accumulation = world, accumulation
        self.zero_stage, self.precision = config.zero_stage, config.precision
        options = deepspeed_config(
            config,
            micro_batch=micro_batch,
            accumulation=accumulation,
            world_size=world.size,
            clip_norm=optim.clip_norm,
        )
        if universal:
            options["checkpoint"] = {"load_universal": True}
        optimizer = make_optimizer(
            parameter_groups(model, weight_decay=optim.weight_decay),
            optim,
            offloaded=config.offload_optimizer != "none",
            checked=config.zero_stage == 0 and config.precision == "fp32",
        )
        self.deepspeed, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
        self.model: Model = self.deepspeed.module
        if config.zero_stage == 0:
            self.deepspeed.clip_fp32_gradients = lambda: None  # CheckedAdamW clips

    def train_step(
        self,
        task: Task,
        parts: Sequence[Batch],
        *,
        weight: float,
        step: bool = True,
        beat: Heartbeat | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then the optimizer, which waits for the device.

        weight: the task's weight summed over all ranks and parts. A task that couples samples embeds all parts first
        without keeping activations, takes the loss over all of them, and replays each part with the gradient of its
        embeddings (Gao et al. 2021, gradient cache). step=False leaves the gradients in place, for `gradients`, and
        applies nothing; don't train on with the engine then. beat: told the phases forward, loss, backward and step.
        """
        assert len(parts) == self.accumulation
        phase = beat.phase if beat is not None else _no_phase
        self._forget_gradients()
        factor = self.world.size / weight  # the engine averages gradients over ranks
        total = torch.zeros((), device=self.world.device)
        cached = self._cache(task, parts, factor, phase) if task.coupled and len(parts) > 1 else None
        for index, part in enumerate(parts):
            phase("forward")
            embeddings = self.deepspeed(task.embed, part)
            if cached is None:
                phase("loss")
                loss, _ = task.objective(embeddings, group=None, backend=self.model.kernels)
                loss = loss * factor
                total += loss.detach()
            else:
                loss = sum_products(embeddings, cached[1][index])
                total = cached[0]
            is_last = index == len(parts) - 1
            self.deepspeed.set_gradient_accumulation_boundary(is_last)
            phase("backward")
            self.deepspeed.backward(loss, scale_wrt_gas=False)
            if step or not is_last:
                phase("step")
                self.deepspeed.step()
        return StepResult(total / self.world.size, step and self.deepspeed.was_step_applied())

    def _forget_gradients(self) -> None:
        """Zeroes DeepSpeed's gradient buffers, which ZeRO-3 and offloading only write where a step uses a parameter.

        Otherwise what a task leaves out would be updated again with the gradient of the last step that used it.
        """
        optimizer = self.deepspeed.optimizer
        if self.zero_stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
            flat = optimizer.fp32_partitioned_groups_flat
        else:
            flat = optimizer.single_partition_of_fp32_groups if self.zero_stage else []
        for parameter in flat:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def _cache(
        self, task: Task, parts: Sequence[Batch], factor: float, phase: Callable[[str], None]
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """The scaled loss over all parts, and its gradient with respect to each part's embeddings."""
        phase("forward")
        with torch.no_grad():
            embedded = [self.deepspeed(task.embed, part) for part in parts]
        leaves = [
            {name: value.requires_grad_(value.is_floating_point()) for name, value in one.items()}
            for one in embedded
        ]
        joined = {
            # Values without rows, such as a temperature, are equal in all parts: their mean is the value itself, and
            # gives each part its share of the gradient.
            name: torch.cat([one[name] for one in leaves])
            if value.dim()
            else torch.stack([one[name] for one in leaves]).mean()
            for name, value in leaves[0].items()
        }
        phase("loss")
        with torch.enable_grad():
            loss, _ = task.objective(joined, group=None, backend=self.model.kernels)
            loss = loss * factor
            loss.backward()
        gradients = [
            {
                name: value.grad if value.grad is not None else torch.zeros_like(value)
                for name, value in one.items()
                if value.requires_grad
            }
            for one in leaves
        ]
        return loss.detach(), gradients

    def describe(self) -> str:
        """How large the model is, and how it is spread."""
        number = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        ranks = f"{self.world.size} rank{'s' * (self.world.size > 1)} on {self.world.device.type}"
        return f"{number / 1e6:.1f} M parameters, ZeRO-{self.zero_stage}, {self.precision}, {ranks}"

    @property
    def gradient_norm(self) -> float | None:
        """The global gradient norm of the last step, before clipping; infinite if the step was left out.

        None before the first step.
        """
        norm = self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = rate

    def gradients(self) -> dict[str, Tensor]:
        """Each parameter's gradient averaged over ranks, whole, in float32 on the CPU; collective. For checks."""
        from deepspeed.utils import safe_get_full_grad

        gradients = {}
        for name, parameter in self.model.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is None:
                gradient = torch.zeros(getattr(parameter, "ds_shape", parameter.shape))
            gradients[name] = gradient.detach().float().cpu().clone()
        return gradients

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters, whole, on the CPU of rank 0 (empty elsewhere); collective under ZeRO-3."""
        if self.zero_stage == 3:
            state = self.deepspeed._zero3_consolidated_16bit_state_dict() or {}
        else:
            state = self.model.state_dict() if self.world.rank == 0 else {}
        return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def held_weights(engine: Engine, parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, flat: all of it; under ZeRO-3 its share, without the padding, whose content
    is arbitrary (nothing where the share lies on NVMe).
    """
    if engine.zero_stage < 3:
        return parameter.detach().reshape(-1)
    share: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    if share.numel() != share.ds_numel:
        return share.new_empty(0)
    rest = parameter.ds_numel - engine.world.rank * share.ds_numel  # type: ignore[attr-defined]
    return share.detach().reshape(-1)[: max(0, rest)]


def sum_products(embeddings: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
    """A 0-d tensor whose gradient with respect to the embeddings is the given one."""
    return torch.stack([(embeddings[name] * gradient).sum() for name, gradient in gradients.items()]).sum()


def _no_phase(name: str) -> None:
    """For steps that nobody watches."""
