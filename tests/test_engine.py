"""The engine on two ranks: ZeRO stages agree; clamping, clipping, bf16, recomputation, offloading, Triton kernels."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny import join_world, make_engine, run_step, tiny_config
from torch import Tensor

from mmscale.config import Config, EngineConfig, OptimConfig
from mmscale.data.batch import TensorBatch
from mmscale.engine import Engine, deepspeed_config
from mmscale.errors import ConfigError
from mmscale.models import Model
from mmscale.models.model import Batch
from mmscale.optim import learning_rate, parameter_groups
from mmscale.pipeline import train_stream
from mmscale.tasks import TASKS, Task, model_for
from mmscale.tasks.base import Metric
from mmscale.world import World

STAGES = (0, 1, 2, 3)
ALTERNATING = ("image_text", "audio_text", "caption", "image_text", "caption", "audio_text")


def make_batch(config: Config, world: World) -> TensorBatch:
    """This rank's part of the first global batch, with every field."""
    stream = train_stream(config, model_for(config), world, select=lambda step: list(config.data.fields))
    batch = next(stream).tensors
    stream.close()
    return batch


class Upwards(Task):
    """Wants a temperature as high as can be, by a huge gradient, and uses nothing else of the model."""

    def __init__(self) -> None:
        super().__init__("upwards", ("image",))

    def embed(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        return {"scale": model.scales["image_text"]()}

    def objective(self, embeddings: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, Tensor]:
        return -1e6 * embeddings["scale"], torch.ones(())

    def score(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        raise AssertionError

    def metrics(self, scores: dict[str, Tensor], *, num_candidates: int) -> dict[str, Metric]:
        raise AssertionError

    def predict(self, model: Model, batch: Batch) -> list[object]:
        raise AssertionError


def steps_of_all_tasks(engine: Engine, batch: TensorBatch) -> list[tuple[float, float | None]]:
    """(loss, gradient norm) of steps of tasks that use different parts of the model."""
    return [(run_step(engine, TASKS[name](), batch), engine.gradient_norm) for name in ALTERNATING]


def first_moments_norm(engine: Engine) -> float:
    """The norm of Adam's first moments over the whole model, wherever its parts lie."""
    own = sum(
        float(state["exp_avg"].double().square().sum()) for state in engine.deepspeed.optimizer.state.values()
    )
    [total] = engine.world.sum([own])
    return math.sqrt(total / (engine.world.size if engine.zero_stage == 0 else 1))


def two_ranks(scenes: Path) -> dict[Any, Any]:
    """All that needs ranks, in one start."""
    world = join_world()
    results: dict[Any, Any] = {}
    batch = make_batch(tiny_config(scenes), world)
    for stage in STAGES:
        options = (f"engine.zero_stage={stage}", "optim.lr=3e-3")
        results["alternating", stage] = steps_of_all_tasks(
            make_engine(tiny_config(scenes, *options), world), batch
        )

        for precision in ("fp32", "bf16"):
            config = tiny_config(scenes, *options, f"engine.precision={precision}", "optim.lr=10")
            engine = make_engine(config, world)
            run_step(engine, Upwards(), batch)
            scale = engine.deepspeed(lambda model: model.scales["image_text"]())
            results["clamped", stage, precision] = scale.item()

        engine = make_engine(tiny_config(scenes, *options, "optim.clip_norm=0.125"), world)
        run_step(engine, TASKS["image_text"](), batch)
        results["clipped", stage] = engine.gradient_norm, first_moments_norm(engine)

        engine = make_engine(tiny_config(scenes, *options, "engine.precision=bf16"), world)
        losses = [run_step(engine, TASKS["image_text"](), batch) for _ in range(12)]
        dtypes = {value.dtype for value in engine.weights().values()}
        results["bf16", stage] = losses, dtypes
    for stage in (0, 3):
        for recompute in ("false", "true"):
            config = tiny_config(
                scenes,
                f"engine.zero_stage={stage}",
                f"model.activation_checkpointing={recompute}",
                "train.accumulation=2",
            )
            engine = make_engine(config, world)
            run_step(engine, TASKS["image_text"](), batch, step=False)
            results["recompute", stage, recompute] = engine.gradients()
    return results


@pytest.fixture(scope="module")
def results(scene_shards: Path) -> list[dict[Any, Any]]:
    return run_ranks(2, two_ranks, scene_shards)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES[1:])
def test_zero_stages_agree_over_steps_of_different_tasks(results: list[dict[Any, Any]], stage: int) -> None:
    # fp32 sums in another order, as in tests/distributed/test_invariance.py; a gradient left over from another task's
    # step would show in the norm at once.
    for found, expected in zip(results[0]["alternating", stage], results[0]["alternating", 0], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert results[0]["alternating", stage] == results[1]["alternating", stage]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_logit_scale_never_exceeds_100(results: list[dict[Any, Any]], stage: int, precision: str) -> None:
    for result in results:
        scale = result["clamped", stage, precision]
        # ln(100) is rounded to the nearest fp32 or bf16 (4.59375), which moves exp of it by 1e-5 and 1.2 % at most.
        assert scale == pytest.approx(100, rel=1e-5 if precision == "fp32" else 0.012)
        assert scale <= 100 * (1 + 1e-6)  # fp32's rounding of the exponential itself


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_clipped_by_their_global_norm(results: list[dict[Any, Any]], stage: int) -> None:
    norm, moments = results[0]["clipped", stage]
    assert norm == pytest.approx(results[0]["clipped", 0][0], rel=1e-5)  # fp32 sums in another order
    assert norm > 1  # before clipping
    # After one step the first moment is (1 - beta1) times the clipped gradient; DeepSpeed adds 1e-6 to the norm.
    assert moments == pytest.approx((1 - OptimConfig().betas[0]) * 0.125, rel=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_learns(results: list[dict[Any, Any]], stage: int) -> None:
    losses, dtypes = results[0]["bf16", stage]
    assert dtypes == {torch.bfloat16}
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]  # it sees one batch over and over; seen is a fall to 0.6 and less


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 3])
def test_recomputed_activations_give_the_same_gradients(results: list[dict[Any, Any]], stage: int) -> None:
    kept, recomputed = (results[0]["recompute", stage, flag] for flag in ("false", "true"))
    assert kept.keys() == recomputed.keys()
    for name, gradient in kept.items():
        # The same operations on the same numbers; only the ranks' sums may be taken in another order.
        torch.testing.assert_close(
            recomputed[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item()
        )


# -------------------------------------------------------------------------------------------------- without ranks


def test_the_configuration_that_deepspeed_gets() -> None:
    def made(**engine: Any) -> dict[str, Any]:
        return deepspeed_config(
            EngineConfig(**engine), micro_batch=4, accumulation=2, world_size=3, clip_norm=0.5
        )

    plain = made()
    assert plain["train_micro_batch_size_per_gpu"] == 4
    assert plain["gradient_accumulation_steps"] == 2
    assert plain["train_batch_size"] == 24
    assert plain["gradient_clipping"] == 0.5
    assert plain["bf16"] == {"enabled": False}
    assert plain["zero_optimization"] == {"stage": 0}
    assert made(precision="bf16")["bf16"] == {"enabled": True}

    cpu = made(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")["zero_optimization"]
    assert cpu["offload_optimizer"]["device"] == cpu["offload_param"]["device"] == "cpu"
    nvme = made(zero_stage=3, offload_optimizer="nvme", nvme_path="/fast")["zero_optimization"]
    assert nvme["offload_optimizer"]["device"] == "nvme"
    assert nvme["offload_optimizer"]["nvme_path"] == "/fast"
    assert "offload_param" not in nvme


def test_parameter_groups(scene_shards: Path) -> None:
    model = model_for(tiny_config(scene_shards))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, plain, clamped = parameter_groups(model, weight_decay=0.1)
    found = [{names[id(p)] for p in group["params"]} for group in (decayed, plain, clamped)]
    assert sum(map(len, found)) == len(names)
    assert set.union(*found) == set(names.values())
    assert "trunk.blocks.0.attention.qkv.weight" in found[0]
    assert {
        "text.embedding.weight",
        "image.position",
        "trunk.norm.weight",
        "trunk.blocks.1.up.bias",
    } <= found[1]
    assert found[2] == {"scales.image_text.logit_scale", "scales.audio_text.logit_scale"}
    assert [group["weight_decay"] for group in (decayed, plain, clamped)] == [0.1, 0.0, 0.0]
    assert clamped["clamp"] == (0.0, math.log(100))


def test_learning_rates() -> None:
    def rates(schedule: str, total: int | None, *steps: int) -> list[float]:
        config = OptimConfig.model_validate({"lr": 2.0, "schedule": schedule, "final_lr": 0.25})
        return [learning_rate(config, step, warmup_steps=4, total_steps=total) for step in steps]

    assert rates("cosine", 12, 0, 1, 2, 3) == [0.5, 1.0, 1.5, 2.0]
    assert rates("cosine", 12, 4, 8, 12, 99) == pytest.approx([2.0, 1.25, 0.5, 0.5])
    assert rates("cosine", 12, 6) == pytest.approx([0.5 + 1.5 * (1 + math.cos(math.pi / 4)) / 2])
    assert rates("linear", 12, 4, 6, 8, 12) == pytest.approx([2.0, 1.625, 1.25, 0.5])
    assert rates("constant", 12, 4, 11) == [2.0, 2.0]
    assert rates("cosine", None, 3, 4, 10**6) == [2.0, 2.0, 2.0]  # a run that ends by the clock


# -------------------------------------------------------------------------------------------------- offloading


def offloaded(scenes: Path, stage: int, place: str) -> list[tuple[float, float | None]] | str:
    world = join_world()
    config = tiny_config(scenes, f"engine.zero_stage={stage}", f"engine.offload_optimizer={place}")
    try:
        engine = make_engine(config, world)
    except ConfigError as error:
        return str(error)
    return steps_of_all_tasks(engine, make_batch(config, world))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps(scene_shards: Path, stage: int) -> None:
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("g++") is None or shutil.which("ninja", path=places) is None:
        pytest.skip("DeepSpeed's CPU Adam is compiled at its first use: there is no g++ or no ninja here")
    at_home = run_ranks(2, offloaded, scene_shards, stage, "none")[0]
    away = run_ranks(2, offloaded, scene_shards, stage, "cpu", timeout=500)[0]
    assert not isinstance(away, str), away
    for found, expected in zip(away, at_home, strict=True):
        # DeepSpeed's Adam rounds its intermediate results elsewhere than torch's: 1e-7 a step, carried on over six.
        assert found == pytest.approx(expected, rel=1e-4)


# -------------------------------------------------------------------------------------------------- Triton kernels


def one_step(scenes: Path, task: str, kernels: str, labelled: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step in this process."""
    config = tiny_config(scenes, f"model.kernels={kernels}", "data.batch_size=6")
    world = join_world()
    batch = make_batch(config, world)
    if not labelled:
        del batch["concept"]
    engine = make_engine(config, world)
    loss = run_step(engine, TASKS[task](), batch, step=False)
    return loss, engine.gradients()


def compare_kernels(scenes: Path) -> dict[str, Any]:
    """With TRITON_INTERPRET=1: how far Triton's step is from torch's, and which Triton kernels ran."""
    from mmscale_kernels import triton_attention, triton_losses

    called: set[str] = set()

    def count(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            called.add(f"{module.__name__}.{name}")
            return function(*args, **kwargs)

        setattr(module, name, counting)

    for module, names in (
        (triton_attention, ("attend", "attend_backward")),
        (triton_losses, ("statistics", "gradients")),
    ):
        for name in names:
            count(module, name)
    found: dict[str, Any] = {}
    for task, labelled in (("image_text", True), ("image_text", False), ("caption", False)):
        loss, gradients = one_step(scenes, task, "torch", labelled)
        assert not called, "the torch form ran Triton kernels"
        other_loss, other = one_step(scenes, task, "triton", labelled)
        errors = [
            ((other[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-30)).item()
            for name, gradient in gradients.items()
        ]
        found[f"{task} {labelled}"] = {
            "loss": abs(other_loss - loss) / loss,
            "gradient": max(errors),
            "kernels": sorted(called),
        }
        called.clear()
    return found


def test_a_training_step_with_triton_kernels(scene_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, __file__, str(scene_shards), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    attention = [
        "mmscale_kernels.triton_attention.attend",
        "mmscale_kernels.triton_attention.attend_backward",
    ]
    losses = ["mmscale_kernels.triton_losses.gradients", "mmscale_kernels.triton_losses.statistics"]
    for name, found in json.loads(out.read_text()).items():
        # Both compute in fp32 and differ in the order of sums, as ranks do.
        assert found["loss"] < 1e-5, name
        assert found["gradient"] < 1e-5, name
        assert found["kernels"] == (attention if name.startswith("caption") else attention + losses), name


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    Path(sys.argv[2]).write_text(json.dumps(compare_kernels(Path(sys.argv[1]))))
    dist.destroy_process_group()
