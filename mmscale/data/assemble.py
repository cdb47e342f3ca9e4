"""A step to this rank's batch: draw its samples, read and decode them, put stand-ins where that fails.

What the reading threads of a `ShardStream` run. A sample that can't be used is replaced by one that is drawn
from (seed, row of the run, attempt), so the stand-in is the same on any number of ranks and after any crash.
"""

import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmscale.data.ahead import Helpers
from mmscale.data.batch import BufferPool
from mmscale.data.decode import MAX_BYTES
from mmscale.data.draw import Draw
from mmscale.data.fields import Decoder, SampleError
from mmscale.data.shards import SMALL, Record, Shards
from mmscale.errors import DataError

logger = logging.getLogger("mmscale.data")

MAX_SUBSTITUTES = 16  # for one row; with 1 % of bad samples all of them are bad once in 1e32 rows
_FETCH_THREADS = 16  # that wait for remote shards

_FETCH_AHEAD = 4  # steps beyond those that are being made


@dataclass
class Batch:
    """This rank's part of one global batch; `batch["txt"]` is the list of that field's values, one a row.

    A value is None where the record lacks the field. `len(batch)` is the number of rows, `batch.names` the
    fields that this step has. `valid` is False for the rows that only fill up a last batch (remainder="pad"),
    and, with train=False, for those whose sample can't be read and has another in its place.
    `position` is the number of samples that all ranks have consumed, since the start, when this batch is done
    (without such fillers). `tensors` is what the stream's `transform` made of the batch. `sources` names the
    source of each row, in a blend. `stacked` has the fields of one shape as one tensor each, (rows, *shape) uint8.
    """

    sample_keys: list[str]
    columns: dict[str, list[Any]]
    step: int
    epoch: int
    position: int
    valid: np.ndarray
    tensors: Any = None
    sources: list[str] | None = None
    stacked: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_keys)

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __getitem__(self, name: str) -> list[Any]:
        try:
            return self.columns[name]
        except KeyError:
            raise KeyError(
                f"no field {name!r} in this batch (step {self.step}): it has {self.names}"
            ) from None

    @property
    def names(self) -> list[str]:
        return list(self.columns)


Made = tuple[Batch, list[tuple[int, SampleError]]]


@dataclass(slots=True)
class _Row:
    """What was read for one row of a batch."""

    key: str
    values: dict[str, Any]
    errors: list[SampleError]
    num_bytes: int


class Assembler:
    """Makes the batch of a step: all that the reading threads need, and nothing that changes the stream."""

    def __init__(
        self,
        *,
        datasets: list[Shards],
        draw: Draw,
        seed: int,
        rows: range,
        batch_size: int,
        steps_per_epoch: int,
        pad: bool,
        decoder: Decoder | None,
        select: Callable[[int], Collection[str]] | None,
        substitute: bool,
        train: bool,
        transform: Callable[[Batch], Any] | None,
        pool: BufferPool,
    ) -> None:
        self._pool = pool
        self.datasets = datasets
        self.draw = draw
        self.batch_size = batch_size
        self.decoder = decoder
        self.bytes_read, self.read_s, self.decode_s = 0, 0.0, 0.0
        self._seed = seed
        self._rows = rows
        self._steps_per_epoch = steps_per_epoch
        self._pad = pad
        self._select = select
        self._substitute = substitute
        self._train = train
        self._transform = transform
        self._num_samples = sum(shards.num_samples for shards in datasets)
        self._known = sorted({name for shards in datasets for name in shards.field_names})
        self._doing: dict[int, str] = {}
        self._lock = threading.Lock()
        self._end: int | None = None
        self._fetchers: Helpers | None = None
        self._fetched = -1  # the last step whose bytes were asked for
        is_remote = any(shards.is_remote for shards in datasets)
        # Raw bytes of local shards, wanted whole: the quick way, without threads.
        self.is_plain = decoder is None and select is None and transform is None and not is_remote
        self._fetches = any(shards.is_remote and shards.storage.cache_bytes for shards in datasets)

    def start(self, end: int | None) -> None:
        self._end = end
        self._fetched = -1
        if self._fetches:
            self._fetchers = Helpers(_FETCH_THREADS, name="fetch")

    def stop(self) -> None:
        if self._fetchers is not None:
            self._fetchers.stopped = True
            self._fetchers.end()
            self._fetchers = None

    def position(self, step: int) -> int:
        """Samples consumed by all ranks before `step`; the fillers of a padded batch don't count."""
        epoch, in_epoch = divmod(step, self._steps_per_epoch)
        if self._pad:
            return epoch * self._num_samples + in_epoch * self.batch_size
        return step * self.batch_size

    def doing(self) -> str:
        at = sorted(set(self._doing.values()))
        return f"being read: {', '.join(at[:8])}" if at else "nothing is being read"

    def _drawn(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows,) sources, samples, and which of them aren't fillers."""
        epoch, in_epoch = divmod(step, self._steps_per_epoch)
        offsets = in_epoch * self.batch_size + np.arange(self._rows.start, self._rows.stop, dtype=np.int64)
        if self.draw.blend is not None:
            return *self.draw.at(epoch, offsets), np.ones(len(offsets), bool)
        valid = offsets < self._num_samples if self._pad else np.ones(len(offsets), bool)
        return *self.draw.at(epoch, offsets % self._num_samples), valid

    def _located(self, sources: np.ndarray, samples: np.ndarray) -> list[tuple[Shards, int, int]]:
        if len(self.datasets) == 1:
            shards = self.datasets[0]
            return [(shards, shard, place) for shard, place in zip(*shards.locate(samples), strict=True)]
        found: list[Any] = [None] * len(samples)
        for number, shards in enumerate(self.datasets):
            here = np.flatnonzero(sources == number)
            for row, shard, place in zip(here.tolist(), *shards.locate(samples[here]), strict=True):
                found[row] = (shards, shard, place)
        return found

    def keys(self, step: int) -> list[str]:
        sources, samples, _ = self._drawn(step)
        return [
            shards.sample_key(shards.record(shard, place))
            for shards, shard, place in self._located(sources, samples)
        ]

    def assemble(self, step: int, helpers: Helpers) -> tuple[Made, int]:
        if self._fetchers is not None:
            self._fetch_ahead(step, self._fetchers)
        sources, samples, valid = self._drawn(step)
        places = self._located(sources, samples)
        names = self._names(step)
        first_slot = step * self.batch_size + self._rows.start

        stacked = self._stacks(names, len(places))

        def read_row(row: int) -> _Row:
            rows = {name: stack[row] for name, stack in stacked.items()}
            return self._read_row(places[row], first_slot + row, names, rows)

        batch = Batch(
            sample_keys=[""] * len(places),
            columns={name: [None] * len(places) for name in names},
            step=step,
            epoch=step // self._steps_per_epoch,
            position=self.position(step + 1),
            valid=valid,
            sources=[self.datasets[source].name for source in sources.tolist()] if self.draw.blend else None,
            stacked=stacked,
        )
        if self.is_plain:
            num_bytes, rest = self._read_plain(places, batch)
            results = [read_row(row) for row in rest]
        else:
            num_bytes, rest = 0, list(range(len(places)))
            results = helpers.map(read_row, len(places))
        errors = []
        for row, made in zip(rest, results, strict=True):
            batch.sample_keys[row] = made.key
            for name, value in made.values.items():
                batch.columns[name][row] = value
            num_bytes += made.num_bytes
            if made.errors:
                errors += [(self._rows.start + row, error) for error in made.errors]
                if not self._train:  # a stand-in may train a model, but its score would count twice
                    valid[row] = False
        self.bytes_read += num_bytes
        if self._transform is not None:
            batch.tensors = self._transform(batch)
        held = num_bytes if self.decoder is None else held_bytes(batch.columns)
        return (batch, errors), held + held_bytes(batch.tensors)

    def _stacks(self, names: list[str], num_rows: int) -> dict[str, torch.Tensor]:
        if self.decoder is None:
            return {}
        shapes = {name: self.decoder.sources[name].spec.shape for name in names}
        return {
            name: self._pool.empty((num_rows, *shape), torch.uint8)
            for name, shape in shapes.items()
            if shape is not None
        }

    def _read_plain(self, places: list[tuple[Shards, int, int]], batch: Batch) -> tuple[int, list[int]]:
        """Fill in all members of local samples as raw bytes; returns how many, and the rows that couldn't be read.

        `_read_row` with everything that can be taken out of the loop: a third of its cost, which is nothing
        beside decoding but all there is without it. `_read_row` then finds out what is wrong with a row.
        """
        opened: dict[tuple[str, int], tuple[Any, ...] | None] = {}
        failed: list[int] = []
        num_bytes = 0
        keys, columns = batch.sample_keys, batch.columns
        thread = threading.get_ident()
        for row, (shards, shard, place) in enumerate(places):
            try:
                shape = opened[shards.name, shard]
            except KeyError:
                self._doing[thread] = f"shard {shards.shard_name(shard)}"
                shape = opened[shards.name, shard] = shards.plain(shard)
            if shape is None:
                failed.append(row)
                continue
            read, stem, fields, starts, offsets, sizes, field_ids, key_of = shape
            first, last = starts[place], starts[place + 1]
            start = offsets[first]
            size = offsets[last - 1] + sizes[last - 1] - start
            try:
                if size <= SMALL:  # one read, then cut
                    data = read(start, size)
                    for member in range(first, last):
                        at = offsets[member] - start
                        columns[fields[field_ids[member]]][row] = data[at : at + sizes[member]]
                    num_bytes += size
                else:  # a cut is a copy, which costs more than another read
                    for member in range(first, last):
                        size = sizes[member]
                        columns[fields[field_ids[member]]][row] = read(offsets[member], size) if size else b""
                        num_bytes += size
            except (OSError, DataError):
                failed.append(row)
                continue
            keys[row] = f"{stem}/{key_of(place)}"
        self._doing.pop(thread, None)
        return num_bytes, failed

    def _fetch_ahead(self, step: int, fetchers: Helpers) -> None:
        """Ask for the remote bytes of this step and the next ones, before any of them is waited for."""
        last = step + _FETCH_AHEAD
        if self._end is not None:
            last = min(last, self._end - 1)
        for ahead in range(max(step, self._fetched + 1), last + 1):
            self._fetched = ahead
            sources, samples, _ = self._drawn(ahead)
            names = self._names(ahead)
            for place in self._located(sources, samples):
                fetchers.submit(functools.partial(self._fetch, fetchers, place, names))

    def _fetch(self, fetchers: Helpers, place: tuple[Shards, int, int], names: list[str]) -> None:
        if fetchers.stopped:
            return
        shards, shard, number = place
        try:
            record = shards.record(shard, number)
            shards.fetch(record, self._members(record, names))
        except Exception:  # whoever reads this sample meets the error and reports it
            logger.debug("fetching ahead failed", exc_info=True)

    def _members(self, record: Record, names: list[str]) -> list[str]:
        if self.decoder is None:
            return list(record.members) if self._select is None else [n for n in names if n in record.members]
        wanted = [self.decoder.sources[name].members(record.members) for name in names]
        return list(dict.fromkeys(member for found in wanted for member, _ in found))

    def _names(self, step: int) -> list[str]:
        known = self._known if self.decoder is None else list(self.decoder.sources)
        if self._select is None:
            return known
        selected = set(self._select(step))
        if unknown := selected.difference(known):
            raise ValueError(f"select({step}) names unknown fields {sorted(unknown)}; there are {known}")
        return [name for name in known if name in selected]

    def _read_row(
        self, place: tuple[Shards, int, int], slot: int, names: list[str], rows: dict[str, torch.Tensor]
    ) -> _Row:
        shards, shard, number = place
        errors: list[SampleError] = []
        while True:
            try:
                return self._read_sample(shards, shard, number, slot, names, rows, errors)
            except SampleError as error:
                if not self._substitute:
                    raise
                errors.append(error)
                if len(errors) == MAX_SUBSTITUTES:
                    raise DataError(
                        f"{len(errors)} samples in a row can't be used, the last: {error}"
                    ) from error
            text = f"substitute/{self._seed}/{slot}/{len(errors)}"
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            sample = int.from_bytes(digest, "little") % shards.num_samples
            [shard], [number] = shards.locate(np.array([sample]))

    def _read_sample(
        self,
        shards: Shards,
        shard: int,
        number: int,
        slot: int,
        names: list[str],
        rows: dict[str, torch.Tensor],
        errors: list[SampleError],
    ) -> _Row:
        record = shards.record(shard, number)
        thread = threading.get_ident()
        self._doing[thread] = key = shards.sample_key(record)
        try:
            if self.decoder is None:
                members = record.members
                present = members if self._select is None else [name for name in names if name in members]
                values: dict[str, Any] = shards.read(record, present)
                return _Row(key, values, errors, sum(map(len, values.values())))
            begin = time.perf_counter()
            num_bytes, read_s = 0, 0.0

            def read(wanted: Collection[str]) -> dict[str, bytes]:
                nonlocal num_bytes, read_s
                for name in wanted:
                    if record.members[name][1] > MAX_BYTES:  # before it is in memory
                        raise SampleError.of(
                            shards.shard_name(shard),
                            record.key,
                            None,
                            f"too large {name}",
                            f"{name} has {record.members[name][1]:,} bytes: at most {MAX_BYTES:,} are allowed",
                        )
                start = time.perf_counter()
                bodies = shards.read(record, wanted)
                num_bytes += sum(map(len, bodies.values()))
                read_s = time.perf_counter() - start
                return bodies

            values = self.decoder.decode(
                record.members,
                read,
                names,
                sample=(shards.name, shard, number),
                slot=slot,
                where=(shards.shard_name(shard), record.key),
                rows=rows,
            )
            took = time.perf_counter() - begin
            with self._lock:
                self.read_s += read_s
                self.decode_s += took - read_s
            return _Row(key, values, errors, num_bytes)
        finally:
            self._doing.pop(thread, None)


def held_bytes(value: Any) -> int:
    """Bytes of memory that arrays, tensors and bytes in nested dicts and lists hold, about."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.nbytes
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(held_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(held_bytes, value))
    return 0
