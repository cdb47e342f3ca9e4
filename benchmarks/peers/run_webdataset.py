"""webdataset as its documentation shows it: shuffle, decode, to_tuple, batched, in a WebLoader with worker processes.

The shuffle across workers that the documentation also shows (unbatched, shuffle, batched again in the main process) is
left out: it would only cost more. With "normalised" the workers also do what its documentation's own example does
(torchvision's ToTensor and Normalize); without it they hand over uint8, as mmscale does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import torch
import webdataset as wds
from common import main, shared_decoder, to_tensor

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise(picture: torch.Tensor) -> torch.Tensor:
    """torchvision's ToTensor and Normalize: float32 around zero."""
    return (picture.float().div_(255) - MEAN) / STD


def load(config: dict[str, Any]) -> Iterable[tuple[Any, list[Any]]]:
    kind, size = config["kind"], config["size"]
    dataset = wds.WebDataset(config["shards"], shardshuffle=100).shuffle(1000)
    if not config["pictures"]:
        if kind != "raw":
            dataset = dataset.decode()
        dataset = dataset.to_tuple("txt")
    elif kind == "raw":
        dataset = dataset.to_tuple("jpg", "txt")
    elif kind == "default":
        dataset = (
            dataset.decode("pil").to_tuple("jpg", "txt").map_tuple(functools.partial(to_tensor, size=size))
        )
        if config.get("normalised"):
            dataset = dataset.map_tuple(normalise)
    else:
        decode_image = shared_decoder()
        handler = wds.handle_extension("jpg", lambda data: torch.from_numpy(decode_image(data, size)))
        dataset = dataset.decode(handler).to_tuple("jpg", "txt")
    loader = wds.WebLoader(dataset.batched(config["batch"]), batch_size=None, num_workers=config["workers"])
    for batch in loader:
        yield (batch[0] if config["pictures"] else None), batch[-1]


if __name__ == "__main__":
    sys.exit(main(load, ["webdataset", "simplejpeg"]))
