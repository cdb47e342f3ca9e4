"""Exact resume: killed at any time with SIGKILL, a stream goes on at other world sizes with the very same tensors.

What is killed is a process of its own that decodes pictures, sound and text, as a trainer would, and writes
down after each batch what it consumed and the state after it.
"""

import hashlib
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmscale.data import Batch, Field, ShardStream
from mmscale.data.pack import ShardWriter

pytestmark = pytest.mark.chaos

BATCH = 24
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"order": "window"},
    "blend": {"weights": {"a": 0.7, "b": 0.3}},
    "buckets": {"bucket_by": "txt.chars"},
}


def flat(parts: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def make_shards(folder: Path, num_samples: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=40) as writer:
        for i in range(num_samples):
            picture, sound = io.BytesIO(), io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 40, 3), np.uint8)).save(picture, "JPEG")
            soundfile.write(sound, rng.uniform(-0.5, 0.5, 800), 8000, format="WAV")
            fields = {"jpg": picture.getvalue(), "txt": b"word " * int(rng.integers(1, 30))}
            if i % 3:
                fields["wav"] = sound.getvalue()
            if i % 37 == 5:
                fields["jpg"] = fields["jpg"][:100]  # bad ones: the same stand-ins must come again
            writer.write(f"{i:05d}", fields)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_shards(folder / "a", 170, 0)
    make_shards(folder / "b", 90, 1)
    from mmscale.data.index import build_index

    for name in ("a", "b"):
        for shard in (folder / name).glob("*.tar"):
            build_index(shard, measure=["text"])
        (folder / name / "shards.manifest").unlink(missing_ok=True)
    return folder


def jitter(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return array + rng.random(array.shape).astype(np.float32)


def make_stream(folder: Path, kind: str, *, rank: int = 0, world_size: int = 1) -> ShardStream:
    from mmscale.data.decode import decode_audio, decode_image

    def picture(data: bytes) -> np.ndarray:
        return decode_image(data, 16)

    def sound(data: bytes) -> np.ndarray:
        return decode_audio(data, 4000)

    urls: Any = {"a": folder / "a", "b": folder / "b"} if kind == "blend" else folder / "a"
    return ShardStream(
        urls,
        batch_size=BATCH,
        seed=3,
        rank=rank,
        world_size=world_size,
        epochs=5,
        fields={
            "image": Field("jpg|png", picture, augment=jitter),
            "text": Field("txt", bytes.decode),
            "audio": Field("wav", sound, required=False),
        },
        on_error="substitute",
        error_budget=1.0,
        **KINDS[kind],
    )


def rows_of(batch: Batch) -> list[str]:
    """One digest a row: its key and every decoded value."""
    rows = []
    for row, key in enumerate(batch.sample_keys):
        digest = hashlib.sha256(key.encode())
        for name in batch.names:
            value = batch[name][row]
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
        rows.append(digest.hexdigest())
    return rows


def consume(folder: str, kind: str, log: str) -> None:
    """In the process that is killed: a line for each batch, with the state that a checkpoint would hold."""
    stream = make_stream(Path(folder), kind)
    with open(log, "w", encoding="utf-8") as file:  # noqa: PTH123
        for batch in stream:
            file.write(json.dumps([rows_of(batch), stream.state_dict()]) + "\n")
            file.flush()


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_at_any_world_size(folders: Path, tmp_path: Path, kind: str) -> None:
    whole = [rows_of(batch) for batch in make_stream(folders, kind)]
    log = tmp_path / "log.jsonl"
    command = [sys.executable, __file__, str(folders), kind, str(log)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.1))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    lines = log.read_text().splitlines(keepends=True)
    done = [json.loads(line) for line in lines if line.endswith("\n")]
    assert done, "it was killed before its first batch"
    assert [rows for rows, _ in done] == whole[: len(done)]
    state = done[-1][1]
    assert len(json.dumps(state)) < 4096
    for world_size in (1, 2, 3, 4, 6, 8):
        parts = []
        for rank in range(world_size):
            stream = make_stream(folders, kind, rank=rank, world_size=world_size)
            stream.load_state_dict(state)
            parts.append([rows_of(batch) for batch in stream])
        joined = [flat(rows) for rows in zip(*parts, strict=True)]
        assert joined == whole[len(done) :], (kind, world_size)


def test_resuming_takes_less_than_a_second_of_cpu(folders: Path) -> None:
    state = {**make_stream(folders, "window").state_dict(), "step": 29}
    begin = time.process_time()
    stream = make_stream(folders, "window")
    stream.load_state_dict(state)
    batch = next(stream)
    took = time.process_time() - begin
    stream.close()
    assert batch.step == 29
    assert took < 1


if __name__ == "__main__":
    consume(*sys.argv[1:])
