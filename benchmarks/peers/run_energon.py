"""Megatron Energon as its documentation shows it: get_train_dataset and get_savable_loader with worker processes.

`python run_energon.py prepare FOLDER image|text` makes its index and dataset.yaml with its own command.

Its default decodes a picture to a float tensor ("torchrgb"), which is resized here with antialiasing and sent on as
uint8, like everyone's: sending floats would cost four times the copies. `"pil": true` in the config takes its other
way, "pilrgb", and Pillow's resize.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import main, shared_decoder, to_tensor
from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    SampleDecoder,
    WorkerConfig,
    get_savable_loader,
    get_train_dataset,
    stateless,
)


class Encoder(DefaultTaskEncoder):
    """Decoded pictures to (3, size, size) uint8; batches by Energon's own stacking."""

    size: int
    same: Any = None

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        image = sample.image
        if isinstance(image, bytes):
            picture, caption = torch.from_numpy(self.same(image, self.size)), sample.caption.decode()
        elif torch.is_tensor(image):  # (3, H, W) float32 from 0 to 1
            height, width = image.shape[1:]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            picture = torch.nn.functional.interpolate(
                image[None, :, top : top + side, left : left + side],
                (self.size, self.size),
                mode="bicubic",
                antialias=True,
            )[0]
            picture = picture.mul_(255).round_().clamp_(0, 255).to(torch.uint8)
            caption = sample.caption
        else:
            picture, caption = to_tensor(image, self.size), sample.caption
        return dataclasses.replace(sample, image=picture, caption=caption)


def load(config: dict[str, Any]) -> Iterable[tuple[Any, list[Any]]]:
    kind, pictures = config["kind"], config["pictures"]
    encoder = Encoder() if pictures and kind != "raw" else DefaultTaskEncoder()
    if kind != "default":
        encoder.decoder = None  # bytes
    elif config.get("pil"):
        encoder.decoder = SampleDecoder(image_decode="pilrgb")
    encoder.size = config["size"]
    if kind == "same" and pictures:
        encoder.same = shared_decoder()
    dataset = get_train_dataset(
        config["folder"],
        batch_size=config["batch"],
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=config["workers"]),
        task_encoder=encoder,
        repeat=False,
    )
    for batch in get_savable_loader(dataset):
        yield (batch.image, batch.caption) if pictures else (None, batch.text)


def prepare(folder: Path, kind: str) -> int:
    sample, fields = (
        ("CaptioningSample", {"image": "jpg", "caption": "txt"})
        if kind == "image"
        else ("TextSample", {"text": "txt"})
    )
    command = [str(Path(sys.executable).parent / "energon"), "prepare", str(folder), "--non-interactive"]
    command += ["--split-ratio", "1,0,0", "--num-workers", "1", "--no-progress", "--sample-type", sample]
    return subprocess.run(
        [*command, "--field-map", json.dumps(fields)], stdout=sys.stderr, check=False
    ).returncode


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        sys.exit(prepare(Path(sys.argv[2]), sys.argv[3]))
    sys.exit(main(load, ["megatron-energon", "webdataset", "simplejpeg"]))
