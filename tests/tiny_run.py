"""A whole run small enough for tests: the quickstart reduced to seconds, with its evaluations and all three tasks.

    config = run_config(scene_shards, "train.duration=8", f"run.dir={tmp_path / 'run'}")

`scene_shards` is the fixture of tests/conftest.py, a folder that `make_scenes` filled.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import soundfile

from mmscale.config import Config
from mmscale.recipes import get


def run_changes(shards: Path) -> list[str]:
    """What makes the quickstart tiny, as the command line takes it: `mmscale train quickstart CHANGES`.

    It fixes every number that a test goes by, so that the recipe may be tuned.
    """
    return [
        "run.name=tiny",
        "run.device=cpu",
        "run.threads=1",
        f"data.train={shards / 'train'}",
        f'data.evals={{"unseen style": "{shards / "test-style"}"}}',
        "data.batch_size=8",
        "data.cache_mb=8",
        "data.augment={}",
        "data.fields.text.first=null",
        "model.width=32",
        "model.depth=1",
        "model.num_heads=2",
        "model.mlp_ratio=2",
        "model.embed_dim=16",
        f"model.text.tokenizer={shards / 'tokenizer.json'}",
        "model.text.max_length=12",
        "model.image.size=32",
        "model.image.stem_widths=[8,16]",
        "model.image.patch_size=2",
        "model.audio.num_mels=16",
        "model.audio.hop=320",
        "model.audio.max_frames=96",
        "model.audio.stem_widths=[16,16]",
        "model.audio.patch_size=2",
        'tasks={"image_text": 0.6, "audio_text": 0.3, "caption": 0.1}',
        "optim.lr=1e-3",
        "optim.warmup=5%",
        "optim.schedule=cosine",
        "train.duration=6",
        "train.accumulation=1",
        "train.log_every=2",
        "train.save_every=3",
        "train.eval_every=null",
        "train.keep_checkpoints=2",
        "engine.zero_stage=1",
        "engine.precision=fp32",
        "evals.num_candidates=400",
        "evals.batch_size=16",
        "evals.num_generated=16",
        "launch.workers_per_node=1",
    ]


def run_config(shards: Path, *changes: str) -> Config:
    """The tiny run: 64 samples in batches of 8, pictures of 32 px, width 32, one block, 6 steps on the CPU.

    changes: `section.field=value`, applied last. Training writes to runs/tiny below the working directory unless they
    name `run.dir`.
    """
    return get("quickstart").override(*run_changes(shards), *changes)


def with_loud_sounds(scenes: Path, folder: Path, keys: Collection[str]) -> None:
    """A copy of the training shards, folder/train, in which some samples' sounds are float WAVs, finite and absurd.

    So are those of a file whose integers were taken for floats. NaN itself is refused when a file is decoded; the power
    spectrum of 1e25 isn't finite in fp32. keys: "shard-stem/key", or the key alone.
    """
    wave = io.BytesIO()
    tone = 1e25 * np.sin(np.arange(8000, dtype=np.float32))
    soundfile.write(wave, tone.astype(np.float32), 16000, format="WAV", subtype="FLOAT")
    names = {key.rpartition("/")[2] for key in keys}
    (folder / "train").mkdir()
    for shard in (scenes / "train").glob("*.tar"):
        with tarfile.open(shard) as source, tarfile.open(folder / "train" / shard.name, "w") as target:
            for member in source:
                file = source.extractfile(member)
                assert file is not None
                body = file.read()
                key, _, extension = member.name.rpartition(".")
                if extension == "flac" and key in names:
                    member.name, body = f"{key}.wav", wave.getvalue()
                member.size = len(body)
                target.addfile(member, io.BytesIO(body))
