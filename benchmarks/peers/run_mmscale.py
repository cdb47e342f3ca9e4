"""mmscale's ShardStream: threads in the process of the training loop; the true shuffle that it always does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from common import main

from mmscale.data import ShardStream
from mmscale.data.schema import schema


def load(config: dict[str, Any]) -> Iterator[tuple[Any, list[Any]]]:
    raw, pictures = config["kind"] == "raw", config["pictures"]
    fields = {"text": "txt", "image": "jpg"} if pictures else {"text": "txt"}
    stream = ShardStream(
        config["shards"],
        batch_size=config["batch"],
        fields=None if raw else schema(fields, image_size=config["size"]),
        threads=max(1, config["workers"]),
    )
    for batch in stream:
        if raw:
            yield (batch["jpg"] if pictures else None), batch["txt"]
        else:
            yield (batch.stacked["image"] if pictures else None), batch["text"]
    stream.close()


if __name__ == "__main__":
    sys.exit(main(load, ["mmscale", "simplejpeg"]))
