"""Values of single samples to named tensors, the same way in training, evaluation and prediction.

A `TensorBatch` is {field: {"x": tensor, "lengths": int32 (B,)}}. `lengths` says how many elements along dim 1
of a sequence (tokens, frames) are valid; for things of one shape (pictures, labels) it is 1 or 0, there or
not. A sample that lacks the field is a row of zeros (of the pad value, for sequences) with length 0, so that
every rank holds well-formed tensors whatever its samples lack.

How far a batch is padded depends on the samples that lie in it, and so on the rank: whoever uses the tensors
must go by `lengths` alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TensorBatch = dict[str, dict[str, Tensor]]


def pad_sequences(
    sequences: Sequence[np.ndarray | None],
    *,
    max_length: int,
    dtype: torch.dtype,
    pad_value: float = 0,
    multiple: int = 1,
    min_length: int = 1,
    shape: tuple[int, ...] = (),
) -> tuple[dict[str, Tensor], int]:
    """B arrays (length, *shape) to `{"x": (B, T, *shape) of dtype, "lengths": (B,)}`, and how many were cut.

    T is the longest length, at least `min_length`, rounded up to a `multiple`, which divides `max_length`;
    longer sequences lose their ends. `shape` is that of one element: () for token ids, (num_mels,) for
    frames.
    """
    if max_length < 1 or multiple < 1 or max_length % multiple:
        raise ValueError(f"max_length must be a positive multiple of {multiple}, got {max_length}")
    if not 1 <= min_length <= max_length:
        raise ValueError(f"min_length must be from 1 to max_length {max_length}, got {min_length}")
    full = [0 if sequence is None else len(sequence) for sequence in sequences]
    lengths = [min(length, max_length) for length in full]
    longest = max([min_length, *lengths])
    longest = -(-longest // multiple) * multiple
    x = torch.full((len(sequences), longest, *shape), pad_value, dtype=dtype)
    for row, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        if sequence is None:
            continue
        if sequence.shape[1:] != shape:
            raise ValueError(f"row {row} must have shape (length, *{shape}), got {sequence.shape}")
        x[row, :length] = _as_tensor(sequence[:length])
    num_cut = sum(length > max_length for length in full)
    return {"x": x, "lengths": torch.tensor(lengths, dtype=torch.int32)}, num_cut


def stack_arrays(
    arrays: Sequence[np.ndarray | None], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """B arrays of one shape to `{"x": (B, *shape) of dtype, "lengths": (B,) of 1, or 0 for absent ones}`."""
    x = torch.zeros((len(arrays), *shape), dtype=dtype)
    for row, array in enumerate(arrays):
        if array is None:
            continue
        if np.shape(array) != shape:
            raise ValueError(f"row {row} must have shape {shape}, got {np.shape(array)}")
        x[row] = _as_tensor(array)
    present = [array is not None for array in arrays]
    return {"x": x, "lengths": torch.tensor(present, dtype=torch.int32)}


def collate_images(images: Sequence[np.ndarray | None], *, size: int | None = None) -> dict[str, Tensor]:
    """B pictures (3, size, size) uint8 to `{"x": (B, 3, size, size) uint8, "lengths": (B,) of 1 or 0}`.

    `size` may be left out where at least one picture is sure to be there.
    """
    if size is None:
        first = next((image for image in images if image is not None), None)
        if first is None:
            raise ValueError("size is needed where every picture of a batch may be absent, got None")
        size = first.shape[-1]
    return stack_arrays(images, (3, size, size), torch.uint8)


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
            name: (tensor.pin_memory() if pin and tensor.device.type == "cpu" else tensor).to(
                device, non_blocking=True
            )
            for name, tensor in tensors.items()
        }
        for field, tensors in batch.items()
    }
