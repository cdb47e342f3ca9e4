"""A tiny tri-modal run for tests: drawn scenes, a model of some ten thousand weights, engines around it.

    config = tiny_config(scenes, "engine.zero_stage=3")    # scenes: a folder made by make_scenes
    engine = make_engine(config, join_world())
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from mmscale.config import Config
from mmscale.data.batch import TensorBatch, split_rows
from mmscale.engine import Engine
from mmscale.models import Model
from mmscale.pipeline import train_stream
from mmscale.recipes import get
from mmscale.tasks import TASKS, Task, model_for
from mmscale.world import World, init_world

LABELS = ("concept",)


def tiny_config(scenes: Path, *assignments: str) -> Config:
    """The quickstart recipe, shrunk: width 32, depth 2, pictures of 16 pixels, 12 samples a step, one task."""
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
    """The world of a rank that `run_ranks` started, or of this process alone."""
    # The group is there already; DeepSpeed would look for MPI if these were missing.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    return init_world(device="cpu", threads=1)
