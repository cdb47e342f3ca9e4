"""Values of single samples to named tensors, the same way in training, evaluation and prediction.

A `TensorBatch` is {field: {"x": tensor, "lengths": int32 (B,)}}. `lengths` says how many elements along dim 1
of a sequence (tokens, frames) are valid; for things of one shape (pictures, labels) it is 1 or 0, there or
not. A sample that lacks the field is a row of zeros (of the pad value, for sequences) with length 0, so that
every rank holds well-formed tensors whatever its samples lack.

How far a batch is padded depends on the samples that lie in it, and so on the rank: whoever uses the tensors
must go by `lengths` alone.

Tensors of megabytes made afresh for each batch cost a page fault for every 4 KiB; a `BufferPool` hands the memory
out again when nobody holds it any more.
"""

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TensorBatch = dict[str, dict[str, Tensor]]

_SMALL = 1 << 18  # bytes; the C library keeps such blocks itself


class _Buffer(np.ndarray):
    """Bytes whose end is seen: plain arrays take no weak references' callbacks through views, a subclass does."""


class BufferPool:
    """Memory for collated tensors that is used again once the last tensor, view or array of it is gone.

    pool = BufferPool(max_bytes=1 << 30)
    pad_sequences(rows, max_length=512, dtype=torch.int64, pool=pool)

    A tensor that is kept, or a view of it, keeps its memory: nothing is ever written over. At most `max_bytes`
    are handed out or lie ready; past that, tensors are ordinary ones. pin: page-locked memory for copies to a
    CUDA device; torch recycles that itself, once the copies that use it are done. Safe for several threads.
    """

    def __init__(self, max_bytes: int = 1 << 30, *, pin: bool = False) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
        self.max_bytes = max_bytes
        self.pin = pin
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = {}
        self._num_bytes = 0  # handed out and free
        # What comes back: finalizers run in any thread at any moment, inside the lock too, so they take none.
        self._returned: deque[np.ndarray] = deque()

    @property
    def num_bytes(self) -> int:
        """Bytes that are handed out or lie ready."""
        return self._num_bytes

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with arbitrary content."""
        if self.pin:
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
        needed = math.prod(shape) * dtype.itemsize
        if needed < _SMALL:
            return torch.empty(tuple(shape), dtype=dtype)
        raw = self._take(_rounded(needed))
        if raw is None:
            return torch.empty(tuple(shape), dtype=dtype)
        buffer = raw.view(_Buffer)
        weakref.finalize(buffer, self._returned.append, raw).atexit = False
        return torch.from_numpy(buffer)[:needed].view(dtype).view(tuple(shape))

    def _take(self, size: int) -> np.ndarray | None:
        with self._lock:
            while self._returned:
                raw = self._returned.popleft()
                self._free.setdefault(len(raw), []).append(raw)
            if ready := self._free.get(size):
                return ready.pop()
            for other in sorted(self._free, reverse=True):  # of other sizes, to make room
                while self._free[other] and self._num_bytes + size > self.max_bytes:
                    self._free[other].pop()
                    self._num_bytes -= other
            if self._num_bytes + size > self.max_bytes:
                return None
            self._num_bytes += size
        return np.empty(size, np.uint8)


def _rounded(num_bytes: int) -> int:
    """Up by an eighth at most, so that batches padded to slightly different lengths share buffers."""
    step = max(4096, 1 << (num_bytes.bit_length() - 4))
    return -(-num_bytes // step) * step


def _empty(shape: tuple[int, ...], dtype: torch.dtype, pool: BufferPool | None) -> Tensor:
    return torch.empty(shape, dtype=dtype) if pool is None else pool.empty(shape, dtype)


def pad_sequences(
    sequences: Sequence[np.ndarray | None],
    *,
    max_length: int,
    dtype: torch.dtype,
    pad_value: float = 0,
    multiple: int = 1,
    min_length: int = 1,
    shape: tuple[int, ...] = (),
    pool: BufferPool | None = None,
) -> tuple[dict[str, Tensor], int]:
    """B arrays (length, *shape) to `{"x": (B, T, *shape) of dtype, "lengths": (B,)}`, and how many were cut.

    T is the longest length, at least `min_length`, rounded up to a `multiple`, which divides `max_length`;
    longer sequences lose their ends. `shape` is that of one element: () for token ids, (num_mels,) for
    frames. `pool`: where the memory comes from.
    """
    if max_length < 1 or multiple < 1 or max_length % multiple:
        raise ValueError(f"max_length must be a positive multiple of {multiple}, got {max_length}")
    if not 1 <= min_length <= max_length:
        raise ValueError(f"min_length must be from 1 to max_length {max_length}, got {min_length}")
    full = [0 if sequence is None else len(sequence) for sequence in sequences]
    lengths = [min(length, max_length) for length in full]
    longest = max([min_length, *lengths])
    longest = -(-longest // multiple) * multiple
    x = _empty((len(sequences), longest, *shape), dtype, pool)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        x[row, length:] = pad_value
        if sequence is None:
            continue
        if sequence.shape[1:] != shape:
            raise ValueError(f"row {row} must have shape (length, *{shape}), got {sequence.shape}")
        x[row, :length] = _as_tensor(sequence[:length])
    num_cut = sum(length > max_length for length in full)
    return {"x": x, "lengths": torch.tensor(lengths, dtype=torch.int32)}, num_cut


def stack_arrays(
    arrays: Sequence[np.ndarray | None],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    pool: BufferPool | None = None,
) -> dict[str, Tensor]:
    """B arrays of one shape to `{"x": (B, *shape) of dtype, "lengths": (B,) of 1, or 0 for absent ones}`."""
    x = _empty((len(arrays), *shape), dtype, pool)
    for row, array in enumerate(arrays):
        if array is None:
            x[row] = 0
            continue
        if np.shape(array) != shape:
            raise ValueError(f"row {row} must have shape {shape}, got {np.shape(array)}")
        x[row] = _as_tensor(array)
    present = [array is not None for array in arrays]
    return {"x": x, "lengths": torch.tensor(present, dtype=torch.int32)}


def collate_images(
    images: Sequence[np.ndarray | None], *, size: int | None = None, pool: BufferPool | None = None
) -> dict[str, Tensor]:
    """B pictures (3, size, size) uint8 to `{"x": (B, 3, size, size) uint8, "lengths": (B,) of 1 or 0}`.

    `size` may be left out where at least one picture is sure to be there.
    """
    if size is None:
        first = next((image for image in images if image is not None), None)
        if first is None:
            raise ValueError("size is needed where every picture of a batch may be absent, got None")
        size = first.shape[-1]
    return stack_arrays(images, (3, size, size), torch.uint8, pool=pool)


def _as_tensor(array: np.ndarray) -> Tensor:
    array = np.asarray(array)
    # torch warns about arrays that it could write to but mustn't; these are only read.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def split_rows(batch: TensorBatch, num_parts: int) -> list[TensorBatch]:
    """Equal runs of consecutive rows (micro-batches), as views."""
    rows = {len(tensor) for tensors in batch.values() for tensor in tensors.values()}
    if len(rows) > 1:
        raise ValueError(f"the batch's tensors must have as many rows each, got {sorted(rows)}")
    num_rows = rows.pop() if rows else 0
    if num_parts < 1 or num_rows % num_parts:
        raise ValueError(f"num_parts must divide the batch's {num_rows} rows, got {num_parts}")
    size = num_rows // num_parts
    return [
        {
            field: {name: tensor[part * size : (part + 1) * size] for name, tensor in tensors.items()}
            for field, tensors in batch.items()
        }
        for part in range(num_parts)
    ]


def to_device(batch: TensorBatch, device: torch.device | str) -> TensorBatch:
    """The batch on `device`; to a CUDA device through pinned memory, without waiting for the copy."""
    device = torch.device(device)
    pin = device.type == "cuda"
    return {
        field: {
            name: (
                tensor.pin_memory()
                if pin and tensor.device.type == "cpu" and not tensor.is_pinned()
                else tensor
            ).to(device, non_blocking=True)
            for name, tensor in tensors.items()
        }
        for field, tensors in batch.items()
    }
