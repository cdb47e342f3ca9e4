"""mmscale's ShardStream: threads in the process of the training loop; the true shuffle that it always does."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from common import main

from mmscale.data import Batch, Field, ShardStream
from mmscale.data.batch import collate_images
from mmscale.data.decode import decode_image


def collate(batch: Batch) -> Any:
    return collate_images(batch["image"])["x"]


def load(config: dict[str, Any]) -> Iterator[tuple[Any, list[Any]]]:
    raw, pictures = config["kind"] == "raw", config["pictures"]
    fields = None
    if not raw:
        fields = {"text": Field("txt", bytes.decode)}
        if pictures:
            fields["image"] = Field("jpg", functools.partial(decode_image, size=config["size"]))
    stream = ShardStream(
        config["shards"],
        batch_size=config["batch"],
        fields=fields,
        transform=None if raw or not pictures else collate,
        threads=max(1, config["workers"]),
    )
    for batch in stream:
        if raw:
            yield (batch["jpg"] if pictures else None), batch["txt"]
        else:
            yield batch.tensors, batch["text"]
    stream.close()


if __name__ == "__main__":
    sys.exit(main(load, ["mmscale", "simplejpeg"]))
