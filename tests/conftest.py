"""What the tests share: shards of drawn scenes, made once a session."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest

from mmscale.data.scenes import make_scenes

# How long one example takes says nothing on a machine that other jobs share.
hypothesis.settings.register_profile("mmscale", deadline=None)
hypothesis.settings.load_profile("mmscale")


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` (64 samples), `test-style` (22), `test-concepts` (9) and `tokenizer.json`; read only."""
    folder = tmp_path_factory.mktemp("shards") / "scenes"
    make_scenes(folder, num_samples=64)
    return folder
