"""Collation: contents, lengths, and well-formed tensors for whatever is absent."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from mmscale.data.batch import (
    BufferPool,
    collate_images,
    pad_sequences,
    split_rows,
    stack_arrays,
    to_device,
)


def test_sequences_are_padded_and_counted() -> None:
    rows = [np.arange(1, 4), None, np.arange(1, 8), np.zeros(0, int)]
    tensors, num_cut = pad_sequences(rows, max_length=6, pad_value=9, dtype=torch.int64)
    assert tensors["x"].tolist() == [[1, 2, 3, 9, 9, 9], [9] * 6, [1, 2, 3, 4, 5, 6], [9] * 6]
    assert tensors["lengths"].tolist() == [3, 0, 6, 0]
    assert tensors["lengths"].dtype == torch.int32
    assert tensors["x"].dtype == torch.int64
    assert num_cut == 1


def test_padded_length() -> None:
    def width(lengths: list[int], **arguments: int) -> int:
        rows = [np.ones(length, np.float32) for length in lengths]
        tensors, _ = pad_sequences(rows, max_length=16, dtype=torch.float32, **arguments)
        return tensors["x"].shape[1]

    assert width([3, 5]) == 5
    assert width([3, 5], multiple=4) == 8
    assert width([3, 99], multiple=8) == 16
    assert width([3], min_length=7) == 7
    assert width([0]) == 1


def test_frames_and_a_rank_without_any() -> None:
    frames = np.random.default_rng(0).random((5, 3), np.float32)
    tensors, _ = pad_sequences([None, frames], max_length=8, shape=(3,), dtype=torch.float32)
    assert tensors["x"].shape == (2, 5, 3)
    assert torch.equal(tensors["x"][1], torch.from_numpy(frames))
    tensors, num_cut = pad_sequences(
        [None, None], max_length=8, shape=(3,), min_length=2, dtype=torch.float32
    )
    assert tensors["x"].shape == (2, 2, 3)
    assert not tensors["x"].any()
    assert tensors["lengths"].tolist() == [0, 0]
    assert num_cut == 0


def test_bad_sequences() -> None:
    with pytest.raises(ValueError, match=r"row 1 must have shape \(length, \*\(3,\)\), got \(2, 4\)"):
        pad_sequences([None, np.zeros((2, 4))], max_length=8, shape=(3,), dtype=torch.float32)
    with pytest.raises(ValueError, match="max_length must be a positive multiple of 3, got 8"):
        pad_sequences([], max_length=8, multiple=3, dtype=torch.int64)
    with pytest.raises(ValueError, match="min_length must be from 1 to max_length 8, got 9"):
        pad_sequences([], max_length=8, min_length=9, dtype=torch.int64)


def test_stacking_and_images() -> None:
    labels = stack_arrays([np.int64(3), None, np.int64(5)], (), torch.int64)
    assert labels["x"].tolist() == [3, 0, 5]
    assert labels["lengths"].tolist() == [1, 0, 1]
    pictures = [None, np.full((3, 4, 4), 7, np.uint8)]
    images = collate_images(pictures)
    assert images["x"].dtype == torch.uint8
    assert images["x"].sum(dim=(1, 2, 3)).tolist() == [0, 7 * 48]
    assert images["lengths"].tolist() == [0, 1]
    assert images["lengths"].dtype == torch.int32
    none = collate_images([None, None], size=4)
    assert none["x"].shape == images["x"].shape
    assert none["lengths"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="size is needed"):
        collate_images([None])
    with pytest.raises(ValueError, match=r"row 1 must have shape \(3, 8, 8\), got \(3, 4, 4\)"):
        collate_images(pictures, size=8)


def test_arrays_that_are_read_only() -> None:
    """What comes from bytes can't be written to; torch would warn about each of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = np.frombuffer(bytes(range(6)), np.uint8)
        assert stack_arrays([array], (6,), torch.uint8)["x"].tolist() == [list(range(6))]


def test_split_rows() -> None:
    tokens, _ = pad_sequences([np.full(i, i) for i in range(6)], max_length=8, dtype=torch.int64)
    batch = {"text": tokens, "label": stack_arrays([np.int64(i) for i in range(6)], (), torch.int64)}
    parts = split_rows(batch, 3)
    assert [part["label"]["x"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [part["text"]["lengths"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert parts[0]["text"]["x"].data_ptr() == batch["text"]["x"].data_ptr()
    for num_parts in (0, 4):
        with pytest.raises(ValueError, match=f"num_parts must divide the batch's 6 rows, got {num_parts}"):
            split_rows(batch, num_parts)
    with pytest.raises(ValueError, match=r"as many rows each, got \[2, 6\]"):
        split_rows({**batch, "text": parts[0]["text"]}, 2)


def test_to_device() -> None:
    batch = {"label": stack_arrays([np.int64(1), None], (), torch.int64)}
    moved = to_device(batch, "cpu")
    assert torch.equal(moved["label"]["x"], batch["label"]["x"])
    meta = to_device(batch, torch.device("meta"))
    assert meta["label"]["lengths"].device.type == "meta"
    assert meta["label"]["lengths"].shape == (2,)


@pytest.mark.gpu
def test_to_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
    batch = {"label": stack_arrays([np.int64(1), None], (), torch.int64)}
    moved = to_device(batch, "cuda")
    assert moved["label"]["x"].is_cuda
    assert moved["label"]["x"].tolist() == [1, 0]


# --- memory that is used again ---


def anonymous_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def test_pool_memory_stays_flat_over_300_batches() -> None:
    pool = BufferPool(64 << 20)
    pictures = [np.full((3, 224, 224), i, np.uint8) for i in range(16)]
    held = []
    for step in range(300):
        batch = collate_images([None, *pictures[1:]], pool=pool)
        assert batch["x"][:, 0, 0, 0].tolist() == list(range(16))  # and the row of zeros over what was there
        held = [*held[-1:], batch["x"]]
        if step == 20:
            before, num_bytes = anonymous_mib(), pool.num_bytes
    # Two batches are held and one is made: a fourth buffer of 2.3 MiB may still wait for its finalizer.
    assert pool.num_bytes == num_bytes <= 4 * 2.6 * 2**20
    assert anonymous_mib() - before < 8  # 300 batches are 700 MiB; a few MiB are the interpreter's own


def test_pool_never_writes_over_what_is_held() -> None:
    pool = BufferPool(64 << 20)
    kept = []
    for value in range(12):
        x = pool.empty((600_000,), torch.uint8)
        x.fill_(value)
        # What is left of each: a slice, another type, an array, a tensor of the array, a parameter.
        kept.append(
            [
                x[5:9],
                x.view(torch.int16)[7:8].view(torch.uint8),
                x.numpy()[3:4],
                torch.from_numpy(x.numpy())[1:2],
                torch.nn.Parameter(x, requires_grad=False),
                x.untyped_storage(),
            ][value % 6]
        )
        del x
        for _ in range(3):
            pool.empty((600_000,), torch.uint8).fill_(255)
    for value, thing in enumerate(kept):
        assert int(thing[0]) == value
    before = pool.num_bytes
    kept.clear()
    del thing
    # As many as there were (each rounded up to 655,360 bytes), without more memory: all came back.
    again = [pool.empty((600_000,), torch.uint8) for _ in range(before // 655_360)]
    assert len(again) >= 12
    assert pool.num_bytes == before


def test_pool_is_bounded_and_goes_on_without() -> None:
    pool = BufferPool(4 << 20)
    held = [pool.empty((1 << 20,), torch.uint8) for _ in range(9)]
    assert pool.num_bytes == 4 << 20
    del held
    large = pool.empty((2, 1 << 20), torch.uint8)  # another size: the free ones of the old make room
    assert pool.num_bytes <= 4 << 20
    assert large.shape == (2, 1 << 20)
    assert pool.empty((3,), torch.int64).shape == (3,)
    assert pool.empty((0, 3), torch.int64).shape == (0, 3)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        BufferPool(-1)


def test_pooled_sequences_equal_fresh_ones() -> None:
    pool = BufferPool()
    rng = np.random.default_rng(0)
    for _ in range(4):
        rows = [None if i == 3 else rng.random((int(rng.integers(1, 900)), 80)) for i in range(8)]
        arguments = {"max_length": 800, "dtype": torch.float32, "shape": (80,), "pad_value": -1.0}
        found, _ = pad_sequences(rows, pool=pool, **arguments)
        expected, _ = pad_sequences(rows, **arguments)
        assert torch.equal(found["x"], expected["x"])
        found["x"].fill_(7)  # what is left in the buffer must not come back
        del found


@pytest.mark.gpu
def test_pinned_pool() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
    x = BufferPool(pin=True).empty((1 << 20,), torch.uint8)
    assert x.is_pinned()
