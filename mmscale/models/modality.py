"""Modalities: each turns one field of a sample into Tokens.

Three steps, in the order a sample meets them: `read` (bytes to an array, in the loader's threads), `collate` (a list of
arrays, None where a sample lacks the field, to tensors), `embed` (tensors on the device to Tokens). Arrays and batches
stay small integers; pixels are normalised on the device.

Tokens keep valid positions first and padding last. An embedding never depends on how far a batch was padded: the same
sample gives the same tokens beside any neighbours, which is what makes ranks interchangeable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmscale.config import AudioConfig, ImageConfig, TextConfig
from mmscale.data.batch import BufferPool, pad_sequences, stack_arrays
from mmscale.data.decode import decode_audio, decode_image, log_mel
from mmscale.errors import ConfigError
from mmscale.objectives import IGNORED

Field = dict[str, Tensor]  # one field of a batch: "x" and "lengths" (B,) int32


class Tokens(NamedTuple):
    """A sequence for each sample: x (B, T, width), lengths (B,) int32 valid tokens, and the modality's name."""

    x: Tensor
    lengths: Tensor
    kind: str


MEL_SPREAD = 0.45  # standard deviation of log-mel features of speech around a clip's mean


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths to a (B, size) boolean mask of the valid positions."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


class ChannelNorm(nn.Module):
    """RMS norm over the channels of (B, C, ...) activations; unlike batch norm, a sample never sees its neighbours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return x * scale * self.weight.view(-1, *[1] * (x.dim() - 2))


def _keeping_spread(conv: nn.Conv1d | nn.Conv2d) -> Any:
    """The convolution with weights that keep the spread of activations through a GELU (He et al. 2015)."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class Text(nn.Module):
    """Text as token ids of a `tokenizers` file, which must name <pad>, <bos> and <eos>."""

    kind = "text"

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        from tokenizers import Tokenizer

        path = Path(config.tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ConfigError(f"model.text.tokenizer={config.tokenizer}: there is no such file")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"model.text.tokenizer={path} can't be read: {error}") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        found = {name: self.tokenizer.token_to_id(name) for name in ("<pad>", "<bos>", "<eos>")}
        ids = [value for value in found.values() if value is not None]
        if len(ids) < len(found):
            missing = ", ".join(name for name, value in found.items() if value is None)
            raise ConfigError(f"model.text.tokenizer={path} lacks the special tokens {missing}")
        self.pad_id, self.bos_id, self.eos_id = ids
        self.num_ids = max(self.tokenizer.get_vocab().values()) + 1  # ids may have holes
        self.max_length = config.max_length
        self.embedding = nn.Embedding(self.num_ids, width)
        self.position = nn.Embedding(config.max_length + 1, width)  # one more: <bos> before a target
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.normal_(self.position.weight, std=0.02)

    def read(self, data: bytes) -> np.ndarray:
        """UTF-8 bytes to (T,) int32 ids, without special tokens, cut to max_length."""
        text = data.decode("utf-8", errors="strict").strip()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids[: self.max_length], dtype=np.int32)

    def write(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def collate(self, arrays: Sequence[np.ndarray | None], pool: BufferPool | None = None) -> Field:
        field, _ = pad_sequences(
            arrays, max_length=self.max_length, pad_value=self.pad_id, dtype=torch.int64, pool=pool
        )
        return field

    def num_tokens(self, field: Field) -> int:
        return int(field["lengths"].sum())

    def embed(self, field: Field) -> Tokens:
        ids = field["x"]
        positions = torch.arange(ids.shape[1], device=ids.device)
        return Tokens(self.embedding(ids) + self.position(positions), field["lengths"], self.kind)

    def target(self, field: Field) -> tuple[Field, Tensor]:
        """A field to generate: the input (<bos> then the ids) and the labels (the ids then <eos>), both (B, T + 1).

        A sample without text has length 0 and asks for nothing; labels past the end are IGNORED.
        """
        ids, lengths = field["x"], field["lengths"]
        present = lengths > 0
        inputs = F.pad(ids, (1, 0), value=self.bos_id)
        labels = F.pad(ids, (0, 1), value=self.eos_id)
        size = ids.shape[1]
        labels = torch.where(valid_mask(lengths, size + 1), labels, self.eos_id)
        target_lengths = torch.where(present, lengths + 1, 0)
        labels = torch.where(valid_mask(target_lengths, size + 1), labels, IGNORED)
        return {"x": inputs, "lengths": target_lengths}, labels


class Image(nn.Module):
    """A square picture as patches of a small convolutional stem's output."""

    kind = "image"

    def __init__(self, config: ImageConfig, width: int) -> None:
        super().__init__()
        self.size, self.num_patches = config.size, config.num_tokens
        channels = [3, *config.stem_widths]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [_keeping_spread(conv), ChannelNorm(after), nn.GELU()]
        self.stem = nn.Sequential(*layers)
        patch = nn.Conv2d(channels[-1], width, config.patch_size, stride=config.patch_size)
        self.patch = _keeping_spread(patch)
        self.position = nn.Parameter(torch.randn(config.num_tokens, width) * 0.02)

    def read(self, data: bytes, out: torch.Tensor | None = None) -> np.ndarray:
        """Picture bytes to (3, size, size) uint8, written into `out` if it is given."""
        return decode_image(data, self.size, out=out)

    def collate(self, arrays: Sequence[np.ndarray | None], pool: BufferPool | None = None) -> Field:
        return stack_arrays(arrays, (3, self.size, self.size), torch.uint8, pool=pool)

    def num_tokens(self, field: Field) -> int:
        return int(field["lengths"].sum()) * self.num_patches

    def embed(self, field: Field) -> Tokens:
        dtype = self.patch.weight.dtype
        x = field["x"].to(dtype) / 127.5 - 1
        x = self.patch(self.stem(x)).flatten(2).transpose(1, 2)
        return Tokens(x + self.position, field["lengths"] * self.num_patches, self.kind)


class Audio(nn.Module):
    """Sound as a log-mel spectrogram, reduced over time by a small convolutional stem.

    A clip's mean spectrum is subtracted (cepstral mean normalisation): it is of the voice and the room, not the words.
    """

    kind = "audio"

    def __init__(self, config: AudioConfig, width: int) -> None:
        super().__init__()
        self.config = config
        channels = [config.num_mels, *config.stem_widths]
        self.stem = nn.ModuleList(
            _keeping_spread(nn.Conv1d(before, after, 5, stride=2, padding=2))
            for before, after in pairwise(channels)
        )
        patch = nn.Conv1d(channels[-1], width, config.patch_size, stride=config.patch_size)
        self.patch = _keeping_spread(patch)
        self.position = nn.Parameter(torch.randn(config.max_frames // config.stride, width) * 0.02)

    def read(self, data: bytes) -> np.ndarray:
        """Sound bytes to (frames, num_mels) float16, cut to max_frames."""
        wave = decode_audio(data, self.config.sample_rate)
        mel = log_mel(
            wave, sample_rate=self.config.sample_rate, hop=self.config.hop, num_mels=self.config.num_mels
        )
        return mel[: self.config.max_frames].astype(np.float16)

    def collate(self, arrays: Sequence[np.ndarray | None], pool: BufferPool | None = None) -> Field:
        field, _ = pad_sequences(
            arrays,
            max_length=self.config.max_frames,
            multiple=self.config.stride,
            dtype=torch.float16,
            shape=(self.config.num_mels,),
            pool=pool,
        )
        return field

    def num_tokens(self, field: Field) -> int:
        return int((-(-field["lengths"] // self.config.stride)).sum())

    def embed(self, field: Field) -> Tokens:
        lengths = field["lengths"]
        x = field["x"].to(self.patch.weight.dtype).transpose(1, 2)
        # What lies past the end must stay zero, or the last valid frame would see how far the batch was padded.
        valid = valid_mask(lengths, x.shape[2]).unsqueeze(1)
        mean = (x * valid).sum(2, keepdim=True) / lengths.clamp(min=1).view(-1, 1, 1)
        x = (x - mean) * valid / MEL_SPREAD
        for conv in self.stem:
            lengths = (lengths + 1) // 2
            x = F.gelu(conv(x)) * valid_mask(lengths, -(-x.shape[2] // 2)).unsqueeze(1)
        x = self.patch(x).transpose(1, 2)
        lengths = -(-lengths // self.config.patch_size)
        return Tokens(x + self.position[: x.shape[1]], lengths, self.kind)


class Label:
    """What tells which samples are the same: an integer of the record, or any text, of which it takes the hash.

    It makes no tokens; tasks read it as it is.
    """

    kind = "label"

    def read(self, data: bytes) -> np.ndarray:
        try:
            return np.asarray(int(data), dtype=np.int64)
        except (ValueError, OverflowError):
            digest = hashlib.blake2b(data, digest_size=8).digest()
            return np.asarray(int.from_bytes(digest, "little", signed=True), dtype=np.int64)

    def collate(self, arrays: Sequence[np.ndarray | None], pool: BufferPool | None = None) -> Field:
        return stack_arrays(arrays, (), torch.int64, pool=pool)

    def num_tokens(self, field: Field) -> int:
        return 0
