"""What the contenders of benchmarks/data_loading.py deliver: all of them every sample, and the same pictures.

Needs `make peers`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import data_loading  # noqa: E402

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        any(data_loading.python_of(name) is None for name in ("webdataset", "energon")),
        reason="needs the peers' environments: make peers",
    ),
]
NUM_SAMPLES = 512


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("text", "vga"):
        folder = tmp_path_factory.mktemp(name)
        data = data_loading.DATA[name]
        data_loading.make_shards(folder, data, NUM_SAMPLES, distinct=16)
        assert data_loading.prepare_energon(folder, "image" if data.pixels else "text") is not None
        found[name] = folder
    return found


def _delivered(folder: Path, kind: str, workers: int) -> dict[str, dict[str, Any]]:
    config = {
        "shards": sorted(map(str, folder.glob("*.tar"))),
        "folder": str(folder),
        "batch": 64,
        "size": 224,
        "workers": workers,
        "kind": kind,
        "pictures": folder.name.startswith("vga"),
        "check": True,
    }
    names = [name for name, (_, _, kinds) in data_loading.CONTENDERS.items() if kind in kinds]
    found = {name: data_loading.run_once(name, config) for name in names}
    for name, result in found.items():
        assert "error" not in result, (name, result)
        assert result["samples"] == NUM_SAMPLES, name
        assert len(result["seen"]) == NUM_SAMPLES, name  # captions differ, so no sample came twice
        assert result["cpu_s"] > 0, name
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", ["text", "vga"])
def test_raw_bytes_are_the_same_for_all(folders: dict[str, Path], data: str, workers: int) -> None:
    found = _delivered(folders[data], "raw", workers)
    ours = found["mmscale"]["seen"]
    for name, result in found.items():
        assert result["seen"] == ours, name
        assert result["bytes"] == found["mmscale"]["bytes"], name


def test_with_the_same_decoder_all_deliver_the_same_pictures(folders: dict[str, Path]) -> None:
    found = _delivered(folders["vga"], "same", 2)
    for name, result in found.items():
        assert result["form"] == ["torch.uint8", 3, 224, 224], name
        assert result["seen"] == found["mmscale"]["seen"], name


def test_their_own_decoders_deliver_the_same_pictures_nearly(folders: dict[str, Path]) -> None:
    """The mean of 150,528 values: rounding them differently hardly changes it; measured were up to 0.011."""
    found = _delivered(folders["vga"], "default", 2)
    ours = found["mmscale"]["seen"]
    assert len({round(mean, 3) for mean in ours.values()}) == 16
    for name, result in found.items():
        assert result["form"] == ["torch.uint8", 3, 224, 224], name
        worst = max(abs(mean - ours[text]) for text, mean in result["seen"].items())
        assert worst < 0.1, (name, worst)
