"""A tiny tri-modal run for tests: drawn scenes, a model of some ten thousand weights, engines around it.

config = tiny_config(scenes, "engine.zero_stage=3")    # scenes: a folder made by make_scenes
engine = make_engine(config, join_world())
loss = run_step(engine, TASKS["caption"](), tensors)
"""

from __future__ import annotations

import os
from pathlib import Path

from mmscale.config import Config
from mmscale.data.batch import TensorBatch
from mmscale.engine import Engine
from mmscale.pipeline import drop_complete, micro_batches
from mmscale.recipes import get
from mmscale.tasks import Task, model_for
from mmscale.world import World, init_world


def tiny_config(scenes: Path, *assignments: str) -> Config:
    """The quickstart recipe, shrunk: width 32, depth 2, pictures of 16 pixels, 12 samples a step."""
    return get("quickstart").override(
        f"data.train={scenes}/train",
        "data.evals={}",
        "data.batch_size=12",
        "data.cache_mb=0",
        "model.width=32",
        "model.depth=2",
        "model.num_heads=2",
        "model.mlp_ratio=2",
        "model.embed_dim=16",
        f"model.text.tokenizer={scenes}/tokenizer.json",
        "model.image.size=16",
        "model.image.stem_widths=[8,8]",
        "model.audio.num_mels=8",
        "model.audio.max_frames=32",
        "model.audio.stem_widths=[16,16]",
        "engine.zero_stage=0",
        "run.device=cpu",
        "run.threads=1",
        "train.log_every=1",
        *assignments,
    )


def join_world() -> World:
    """The world of a rank that `run_ranks` started."""
    # The group is there already; without an address DeepSpeed and we would ask who is to be met.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    return init_world(device="cpu", threads=1)


def make_engine(config: Config, world: World, *, universal: bool = False) -> Engine:
    return Engine(
        model_for(config),
        config=config.engine,
        optim=config.optim,
        world=world,
        micro_batch=config.data.batch_size // (world.size * config.train.accumulation),
        accumulation=config.train.accumulation,
        universal=universal,
    )


def run_step(engine: Engine, task: Task, batch: TensorBatch, *, step: bool = True) -> float:
    """One training step on this rank's part of a batch, as the trainer does it; the global loss."""
    parts = micro_batches(task, batch, engine.accumulation)
    weight = 1.0 if task.coupled else sum(task.weight(part) for part in parts)
    [weight] = engine.world.sum([weight])
    result = engine.train_step(task, [drop_complete(part) for part in parts], weight=weight, step=step)
    return engine.world.sum([result.loss.item()])[0]
