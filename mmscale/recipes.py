"""Recipes: each a function that returns one complete, typed config.

    from mmscale.recipes import get
    config = get("quickstart").override("optim.lr=3e-4")

A recipe is where numbers live; what they mean is in `mmscale.config`. Add one by writing a function and naming it in
`RECIPES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from mmscale.config import (
    AudioConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvalConfig,
    FieldConfig,
    ImageConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TextConfig,
    TrainConfig,
    load_config,
)
from mmscale.errors import ConfigError


def quickstart() -> Config:
    """A small tri-modal model on the demo shards: pictures, names and spoken names of emoji.

    Sized for four minutes on two CPU cores. Token counts decide there, so a picture is 16 tokens.
    """
    return Config(
        run=RunConfig(name="quickstart"),
        data=DataConfig(
            train="demo-data/train",
            evals={"unseen style": "demo-data/test-style", "unseen concepts": "demo-data/test-concepts"},
            batch_size=192,
            fields={
                "image": FieldConfig(source="jpg|png|webp", modality="image"),
                "text": FieldConfig(source="json.captions|txt", modality="text"),
                "audio": FieldConfig(source="flac|wav", modality="audio"),
                "spoken": FieldConfig(source="json.spoken|txt", modality="text"),
                "concept": FieldConfig(source="json.concept", modality="label"),
            },
            cache_mb=512,
        ),
        model=ModelConfig(
            width=192,
            depth=4,
            num_heads=4,
            mlp_ratio=3.0,
            embed_dim=128,
            text=TextConfig(tokenizer="demo-data/tokenizer.json", max_length=12),
            image=ImageConfig(),
            audio=AudioConfig(),
        ),
        tasks={"image_text": 0.6, "audio_text": 0.3, "caption": 0.1},
        optim=OptimConfig(lr=1e-3, weight_decay=0.1),
        train=TrainConfig(duration="800", log_every=10, save_every="25%"),
        engine=EngineConfig(zero_stage=2),
        evals=EvalConfig(),
    )


RECIPES: dict[str, Callable[[], Config]] = {"quickstart": quickstart}


def get(name: str) -> Config:
    """The config of a recipe by name, or of a JSON file by path. Raises ConfigError with the nearest known name."""
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith(".json") or "/" in name:
        return load_config(Path(name))
    match = difflib.get_close_matches(name, RECIPES, n=1)
    hint = f"did you mean {match[0]}?" if match else f"known are {', '.join(sorted(RECIPES))}"
    raise ConfigError(f"no recipe is called {name!r}; {hint} (or give a config's .json file)")
