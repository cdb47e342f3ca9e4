"""Which source and which sample lies at a position of a run: order, blend and buckets together.

    draw = Draw(datasets, seed=0, batch_size=256, steps_per_epoch=100, shuffle=True, order="full", ...)
    sources, samples = draw.at(epoch, offsets)

All of it is arithmetic on positions (`mmscale.data.order`), so any step can be asked for at any time.
"""

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from mmscale.data.order import BlendHistory, Buckets, FullOrder, Order, WindowOrder, sample_weights
from mmscale.data.shards import Shards
from mmscale.errors import DataError

_BLEND_BATCH = 64  # lanes of a blended source's windows, whatever its weight


class Blender:
    """The weights of a blend, as shares of samples, and their history."""

    def __init__(
        self, datasets: list[Shards], weights: Mapping[str, float] | None, weight_by: str | None
    ) -> None:
        self.names = [shards.name for shards in datasets]
        self._means: dict[str, float] | None = None
        if weight_by is not None:
            self._means = {shards.name: _mean(shards, weight_by) for shards in datasets}
        if weights is None:
            weights = {
                shards.name: shards.num_samples * (self._means[shards.name] if self._means else 1)
                for shards in datasets
            }
        self._wanted = self._by_sample(weights)
        self.history = BlendHistory(self._wanted)

    def _by_sample(self, weights: Mapping[str, float]) -> dict[str, float | Fraction]:
        if set(weights) != set(self.names):
            missing = sorted(set(self.names) - set(weights))
            unknown = sorted(set(weights) - set(self.names))
            problems = [f"no weight for {', '.join(missing)}"] if missing else []
            problems += [f"{', '.join(unknown)}: no such source"] if unknown else []
            raise ValueError(f"weights: {'; '.join(problems)}")
        ordered = {name: weights[name] for name in self.names}
        if self._means is None:
            return dict(ordered)
        return dict(sample_weights(ordered, self._means))

    def effective(self) -> dict[str, Fraction]:
        return self.history.effective

    def change(self, position: int, weights: Mapping[str, float]) -> None:
        self._wanted = self._by_sample(weights)
        self.history.change(position, self._wanted)

    def load(self, state: Any, position: int) -> None:
        wanted = BlendHistory(self._wanted).effective
        self.history = BlendHistory.from_json(state)
        if self.history.effective != wanted:
            self.history.change(position, self._wanted)


def _mean(shards: Shards, column: str) -> float:
    """Mean of a measured column over a source, from at most 10,000 samples spread evenly."""
    count = min(shards.num_samples, 10_000)
    samples = np.linspace(0, shards.num_samples - 1, count).round().astype(np.int64)
    mean = float(np.nanmean(shards.manifest.columns(column, samples)))
    if not mean > 0 or not math.isfinite(mean):
        raise DataError(f"source {shards.name}: column {column} has mean {mean}, which can't be a weight")
    return mean


class _Absolute:
    """The order of a run's positions before they are bucketed: itself, epoch after epoch."""

    def __init__(self, num_positions: int) -> None:
        self.num_samples = num_positions

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        return epoch * self.num_samples + offsets


class Draw:
    """Which source and sample lies at a position: order, blend and buckets together."""

    def __init__(
        self,
        datasets: list[Shards],
        *,
        seed: int,
        batch_size: int,
        steps_per_epoch: int,
        shuffle: bool,
        order: Literal["full", "window"],
        bucket_by: str | None,
        blend: Blender | None,
    ) -> None:
        self._datasets = datasets
        self._seed = seed
        self._batch_size = batch_size
        self._shuffle = shuffle
        self.blend = blend
        # Of one source an epoch is its samples; of a blend, the whole batches that are about as many.
        self._epoch_length = steps_per_epoch * batch_size if blend else datasets[0].num_samples
        self._buckets: Order | None = None
        self._bucket_by = bucket_by
        self.set_order(order)

    def set_order(self, order: Literal["full", "window"]) -> None:
        self._orders: list[Order] = []
        for shards in self._datasets:
            # Sources of the same size must not be permuted alike.
            seed = self._seed
            if self.blend is not None:
                digest = hashlib.blake2b(f"source/{self._seed}/{shards.name}".encode(), digest_size=8)
                seed = int.from_bytes(digest.digest(), "little")
            if order == "full" or not self._shuffle:
                self._orders.append(FullOrder(seed, shards.num_samples, shuffle=self._shuffle))
            else:
                lanes = self._batch_size if self.blend is None else min(self._batch_size, _BLEND_BATCH)
                self._orders.append(WindowOrder(seed, shards.num_samples, lanes))
        if self._bucket_by is not None:
            absolute = _Absolute(self._epoch_length)
            self._buckets = Buckets(absolute, self._batch_size, self._lengths, seed=self._seed)

    def _lengths(self, positions: np.ndarray) -> np.ndarray:
        assert self._bucket_by is not None
        sources, samples = self._unbucketed(positions)
        lengths = np.empty(len(positions), np.float64)
        for source, shards in enumerate(self._datasets):
            here = sources == source
            lengths[here] = shards.manifest.columns(self._bucket_by, samples[here])
        return lengths

    def at(self, epoch: int, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 offsets into an epoch to (n,) numbers of sources and (n,) sample numbers in them."""
        if self._buckets is not None:
            return self._unbucketed(self._buckets.at(epoch, offsets))
        return self._unbucketed(epoch * self._epoch_length + offsets)

    def _unbucketed(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.blend is None:
            sources, counters = np.zeros(len(positions), np.int64), positions
        else:
            sources, counters = self.blend.history.at(positions)
        samples = np.empty(len(positions), np.int64)
        for source, shards in enumerate(self._datasets):
            here = np.flatnonzero(sources == source) if self.blend is not None else slice(None)
            epochs, offsets = np.divmod(counters[here], shards.num_samples)
            found = np.empty(len(offsets), np.int64)
            for epoch in np.unique(epochs).tolist():
                within = epochs == epoch
                found[within] = self._orders[source].at(epoch, offsets[within])
            samples[here] = found
        return sources, samples
