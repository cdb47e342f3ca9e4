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
    AugmentConfig,
    Config,
    DataConfig,
    EngineConfig,
    EvalConfig,
    FieldConfig,
    ImageAugmentConfig,
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

    Sized for less than four minutes on two CPU cores, where token counts decide: a picture is 16 tokens, a spoken name
    16 at most. Sound is not augmented: in so few steps it learned half as much with masked spectrograms.
    """
    return Config(
        run=RunConfig(name="quickstart"),
        data=DataConfig(
            train="demo-data/train",
            evals={"unseen style": "demo-data/test-style", "unseen concepts": "demo-data/test-concepts"},
            batch_size=128,
            fields={
                "image": FieldConfig(source="jpg|png|webp", modality="image"),
                "text": FieldConfig(source="json.captions|txt", modality="text", first=0.8),
                "audio": FieldConfig(source="flac|wav", modality="audio"),
                "spoken": FieldConfig(source="json.spoken|txt", modality="text"),
                "concept": FieldConfig(source="json.concept", modality="label"),
                "utterance": FieldConfig(source="json.spoken", modality="label"),
            },
            augment=AugmentConfig(
                image=ImageAugmentConfig(shift=0.08, scale=0.25, rotate_deg=15, color=0.3),
            ),
            cache_mb=512,
        ),
        model=ModelConfig(
            width=128,
            depth=3,
            num_heads=4,
            mlp_ratio=4.0,
            embed_dim=128,
            text=TextConfig(tokenizer="demo-data/tokenizer.json", max_length=12),
            image=ImageConfig(),
            audio=AudioConfig(),
        ),
        tasks={"image_text": 0.5, "audio_text": 0.35, "caption": 0.15},
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup="50", final_lr=0.01),
        train=TrainConfig(duration="640", log_every=10, save_every="25%"),
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
