"""A pipeline of the user's own, a webdataset one for instance, in place of a `ShardStream`.

    def samples(rank, world_size):
        urls = wds.shardlists.expand_urls("shards/{000..099}.tar")[rank::world_size]
        return wds.WebDataset(urls, shardshuffle=100).shuffle(1000)

    train(config, pipeline=Pipeline(samples, num_samples=100_000))

The pipeline yields dicts of raw bytes by field (`{"__key__": ..., "jpg": b"...", "txt": b"..."}`), which is what
webdataset gives before `.decode()`; decoding, augmentation and collation are then the same as for shards.

What is lost against `ShardStream`: the order is the pipeline's, so it depends on the number of ranks and of
their workers; a resume has to run through all samples consumed before (slowly, and exactly only if the pipeline gives
the same samples again); a run can't go on with another number of ranks; a bad sample ends the run; blends,
length buckets, epochs and the counts of what was read are up to the pipeline.
"""

import itertools
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmscale.data.ahead import Helpers, ReadAhead
from mmscale.data.assemble import Batch, held_bytes
from mmscale.data.fields import Decoder, Field
from mmscale.errors import ConfigError, DataError

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Pipeline:
    """A user's pipeline: `open(rank, world_size)` gives a rank's samples; an epoch is `num_samples` of all ranks."""

    open: Callable[[int, int], Iterable[Sample]]
    num_samples: int


class PipelineStream:
    """The batches of one rank from an iterable of samples; begins it anew when it ends.

    open_samples: called for the pipeline, at the start and whenever it has ended.
    batch_size: samples in the global batch, of which this rank takes `batch_size / world_size` from its pipeline.
    num_samples: of an epoch over all ranks, for durations in epochs.
    fields, select, train, transform, threads, prefetch, buffer_bytes, stall_s: as for `ShardStream`.

    Raises DataError, when a batch is asked for, if the pipeline yields no samples, or one that isn't raw bytes.
    """

    def __init__(
        self,
        open_samples: Callable[[], Iterable[Sample]],
        *,
        batch_size: int,
        num_samples: int,
        fields: Mapping[str, Field],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        select: Callable[[int], Collection[str]] | None = None,
        train: bool = True,
        transform: Callable[[Batch], Any] | None = None,
        threads: int = 2,
        prefetch: int = 2,
        buffer_bytes: int = 256 << 20,
        stall_s: float = 600.0,
    ) -> None:
        if batch_size % world_size:
            raise ConfigError(
                f"batch_size {batch_size} can't be shared equally by world_size {world_size} ranks"
            )
        if num_samples < batch_size:
            raise ValueError(f"num_samples must be at least batch_size {batch_size}, got {num_samples}")
        self.num_samples = num_samples
        self.steps_per_epoch = num_samples // batch_size
        self.faults: Counter[str] = Counter()
        self.shard_faults: list[Any] = []
        self._open_samples = open_samples
        self._samples: Iterator[Sample] | None = None
        self._batch_size, self._world_size = batch_size, world_size
        self._rows = batch_size // world_size
        self._first_row = rank * self._rows
        self._decoder = Decoder(seed, fields, train=train)
        self._select, self._transform = select, transform
        self._threads, self._prefetch = threads, prefetch
        self._buffer_bytes, self._stall_s = buffer_bytes, stall_s
        self._step = 0
        self._ahead: ReadAhead[Batch] | None = None
        self._num_read, self._bytes_read, self._wait_s, self._decode_s, self._read_s = 0, 0, 0.0, 0.0, 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            # A pipeline can't be asked for a sample: what lies before this step has to be run through again.
            samples = _endless(self._open_samples)
            for _ in range(self._step * self._rows):
                next(samples)
            self._samples = samples
            self._ahead = ReadAhead(
                self._make,
                itertools.count(self._step),
                depth=self._prefetch,
                max_bytes=self._buffer_bytes,
                num_threads=self._threads,
                stall_s=self._stall_s,
            )
            self._stop = weakref.finalize(self, self._ahead.stop)
        begin = time.perf_counter()
        try:
            batch = self._ahead.take()
        except DataError:
            self.close()
            raise
        finally:
            self._wait_s += time.perf_counter() - begin
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        self._step += 1
        self._num_read += len(batch)
        return batch

    def _make(self, step: int, helpers: Helpers) -> tuple[Batch, int]:
        assert self._samples is not None
        begin = time.perf_counter()
        samples = [_checked(next(self._samples)) for _ in range(self._rows)]
        self._read_s += time.perf_counter() - begin
        names = list(self._decoder.sources)
        if self._select is not None:
            selected = set(self._select(step))
            names = [name for name in names if name in selected]
        first_slot = step * self._batch_size + self._first_row

        def decode(row: int) -> dict[str, Any]:
            key, record = samples[row]
            return self._decoder.decode(
                record,
                lambda wanted: {name: record[name] for name in wanted},
                names,
                sample=key,
                slot=first_slot + row,
                where=("of the pipeline", key),
            )

        begin = time.perf_counter()
        values = helpers.map(decode, self._rows)
        self._decode_s += time.perf_counter() - begin
        self._bytes_read += sum(len(body) for _, record in samples for body in record.values())
        batch = Batch(
            sample_keys=[key for key, _ in samples],
            columns={name: [row[name] for row in values] for name in names},
            step=step,
            epoch=step // self.steps_per_epoch,
            position=(step + 1) * self._batch_size,
            valid=np.ones(self._rows, bool),
        )
        if self._transform is not None:
            batch.tensors = self._transform(batch)
        return batch, held_bytes(batch.columns) + held_bytes(batch.tensors)

    def close(self) -> None:
        if self._ahead is not None:
            self._stop()
            self._ahead = self._samples = None

    def check_fields(self, names: Collection[str]) -> int:
        """Nothing is known of a pipeline's samples before they come."""
        return self.num_samples

    def notes(self) -> list[str]:
        return [
            "samples come from a pipeline of your own: their order depends on the number of ranks, and a resume "
            "runs through all earlier ones"
        ]

    def blend_report(self) -> dict[str, Any]:
        return {}

    def take_faults(self) -> list[Any]:
        return []

    def stats(self) -> dict[str, float]:
        """As `ShardStream.stats`."""
        ahead = self._ahead
        return {
            "samples": self._num_read,
            "bytes_read": self._bytes_read,
            "wait_s": self._wait_s,
            "read_s": self._read_s,
            "decode_s": self._decode_s,
            "queue_depth": ahead.num_ready if ahead is not None else 0,
            "ready_bytes": ahead.ready_bytes if ahead is not None else 0,
            "bytes_in_flight": 0,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": 1,
            "pipeline": True,
            "step": self._step,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises DataError for the state of another stream, batch size or number of ranks."""
        mine = self.state_dict()
        differences = [
            f"{name}: {state.get(name)} in the state, {mine[name]} here"
            for name in ("pipeline", "batch_size", "world_size")
            if state.get(name) != mine[name]
        ]
        if differences:
            raise DataError(f"the state belongs to another stream; differing are {'; '.join(differences)}")
        self.close()
        self._step = state["step"]


def _endless(open_samples: Callable[[], Iterable[Sample]]) -> Iterator[Sample]:
    while True:
        came = False
        for sample in open_samples():
            came = True
            yield sample
        if not came:
            raise DataError("the pipeline yields no samples")


def _checked(sample: Sample) -> tuple[str, dict[str, bytes]]:
    """Key and members of a sample. Raises DataError for one that isn't raw bytes."""
    if not isinstance(sample, Mapping) or "__key__" not in sample:
        raise DataError(f"the pipeline must yield dicts with a __key__, got {type(sample).__name__}")
    record = {name.lower(): body for name, body in sample.items() if not name.startswith("__")}
    for name, body in record.items():
        if not isinstance(body, bytes):
            raise DataError(
                f"the pipeline's sample {sample['__key__']} has a {type(body).__name__} as {name}: give raw bytes "
                "(leave .decode() out), so that the fields' own readers decode them"
            )
    return str(sample["__key__"]), record
