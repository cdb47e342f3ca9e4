"""What the runners share: the clock, the counts, and mmscale's decoder for those who don't have mmscale.

A runner is started by benchmarks/data_loading.py as `PYTHON run_NAME.py CONFIG`, in the environment of its own, and
prints one line of JSON at the end. CONFIG is a JSON object:

    shards: list of paths; folder: where they lie; batch: rows in a batch; size: pixels of a side; workers: how many
    kind: "raw" (bytes as they lie in the shard), "default" (the loader's own way of decoding), "same" (mmscale's
        decode_image in all of them)
    pictures: whether the samples have pictures, or texts alone
    check: true also returns what came, to compare: text -> mean of the picture

The clock and the CPU time begin before the loader is made and end when its workers have been waited for; imports don't
count. Only the standard library, torch and Pillow are used here, which every environment has.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import resource
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
Load = Callable[[dict[str, Any]], Iterable[tuple[Any, list[Any]]]]


def shared_decoder() -> Callable[[bytes, int], Any]:
    """mmscale's decode_image, from the same file that mmscale uses, without the rest of the package."""
    package = types.ModuleType("mmscale.data")
    package.__path__ = [str(ROOT / "mmscale" / "data")]
    sys.path.insert(0, str(ROOT))
    sys.modules.setdefault("mmscale.data", package)
    from mmscale.data.decode import decode_image

    return decode_image


def to_tensor(image: Any, size: int) -> torch.Tensor:
    """A Pillow picture to (3, size, size) uint8: centre square, bicubic. `box` crops and resizes in one go."""
    import numpy as np
    from PIL import Image

    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    small = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def main(load: Load, packages: Iterable[str]) -> int:
    """Run `load` as the command line says and print what was measured. `load` gives (pictures, texts) a batch."""
    config = json.loads(sys.argv[1])
    before, start = _cpu_s(), time.perf_counter()
    batches = iter(load(config))
    num_samples, num_bytes, num_batches = 0, 0, 0
    first_batch_s = 0.0
    seen: dict[str, float] = {}
    form: list[Any] = []
    for pictures, texts in batches:
        if not num_batches:
            first_batch_s = time.perf_counter() - start
        num_batches += 1
        num_samples += len(texts)
        if torch.is_tensor(pictures):
            num_bytes += pictures.nbytes
            form = form or [str(pictures.dtype), *pictures.shape[1:]]
        elif pictures is not None:
            num_bytes += sum(map(len, pictures))
        if config.get("check"):
            means = [0.0] * len(texts)
            if torch.is_tensor(pictures):
                means = pictures.float().mean(dim=(1, 2, 3)).tolist()
            elif pictures is not None:
                means = [float(len(body)) for body in pictures]
            names = [text.decode() if isinstance(text, bytes) else text for text in texts]
            seen.update(zip(names, means, strict=True))
    wall_s = time.perf_counter() - start
    del batches
    for (
        child
    ) in multiprocessing.active_children():  # their CPU time counts only once they have been waited for
        child.join(10)
        if child.is_alive():
            child.terminate()
            child.join()
    cpu_s = _cpu_s() - before
    print(
        json.dumps(
            {
                "samples": num_samples,
                "batches": num_batches,
                "bytes": num_bytes,
                "form": form,
                "wall_s": wall_s,
                "cpu_s": cpu_s,
                "first_batch_s": first_batch_s,
                "versions": {
                    name: importlib.metadata.version(name) for name in (*packages, "torch", "pillow")
                },
                **({"seen": seen} if config.get("check") else {}),
            }
        ),
        flush=True,
    )
    return 0


def _cpu_s() -> float:
    """CPU seconds, user and system, of this process and of the children that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
