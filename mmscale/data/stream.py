"""The stream of batches: which sample comes next, read ahead and decoded, the same on any number of workers.

    stream = ShardStream("shards/{000000..000099}.tar", batch_size=256, seed=0, rank=0, world_size=8)
    for batch in stream:
        batch["txt"], batch.sample_keys, batch.position

The order is arithmetic, not state. Step t belongs to epoch t // steps_per_epoch; an epoch's k-th sample is
the image of k under a permutation keyed by (seed, epoch); the global batch is a run of such samples, of which
each rank takes its contiguous part. So seeking costs nothing, the state is one step number, it is the same on
every rank, and a run resumes on another number of workers with no sample twice and none lost. Whatever else
is random (which caption, which crop) is drawn from (seed, row of the global batch, field), never from a
shared generator.

The trade-off: samples are drawn from the whole data set at once, one `pread` each. That is a true shuffle and
needs no buffer, but it wants shards on storage that seeks well: local disks, the page cache, a parallel file
system.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import re
import sys
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
from braceexpand import braceexpand

from mmscale.data.index import Index, read_indexes
from mmscale.errors import ConfigError, DataError

MAX_OPEN_FILES = 256
MAX_QUARANTINE = 1000
MAX_SUBSTITUTES = 16  # for one row; with 1 % of bad samples all of them are bad once in 1e32 rows
FREE_FAULTS = 3  # this many never exceed the budget, however short the run
_GAP = 16 * 1024  # bytes between members that are cheaper to read over than to seek over
_QUICK_S = 50e-6  # rows quicker than this are done by one thread: more would wait for each other
_STOP_S = 2.0  # the longest that closing waits for threads; one that hangs in a read is left behind
_REMOTE = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True)
class Field:
    """How one field of the samples is made from the bytes of a record.

    source: the record's field, or alternatives in order of preference, "jpg|png|webp". "json.captions" is the
        value at `captions` (a dotted path) in the member `json`; an exact member name comes first.
    read: bytes to value (an array, as a rule). For a value inside JSON it gets a string's UTF-8, and the JSON
        text of anything else. A JSON list is a set of alternatives: each is read; training takes one at
        random, evaluation the first. None, a missing path and an empty list count as absent.
    choose: all sources that the record has are alternatives to choose from, not the first one only.
    first: how often training takes the first alternative; the others share the rest evenly. None: all evenly.
    augment: (value, rng) -> value, applied in training to what was read, with a generator of its own.
    required: an absent field is an error; otherwise its value is None.
    """

    source: str
    read: Callable[[bytes], Any]
    choose: bool = False
    first: float | None = None
    augment: Callable[[Any, np.random.Generator], Any] | None = None
    required: bool = True


@dataclass
class Batch:
    """This rank's part of one global batch; `batch["txt"]` is the list of that field's values, one a row.

    A value is None where the record lacks the field. `len(batch)` is the number of rows, `batch.names` the
    fields that this step has. `valid` is False for the rows that only fill up a last batch (remainder="pad"),
    and, with train=False, for those whose sample can't be read and has another in its place.
    `position` is the number of samples that all ranks have consumed, since the start, when this batch is done
    (without such fillers). `tensors` is what the stream's `transform` made of the batch.
    """

    sample_keys: list[str]
    columns: dict[str, list[Any]]
    step: int
    epoch: int
    position: int
    valid: np.ndarray
    tensors: Any = None

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


class ShardStream:
    """Iterates the batches of one rank over `epochs` passes of the shards; an iterator that knows its place.

    urls: brace pattern, path, folder (all *.tar below it, in order), or a list of these.
    batch_size: samples in the global batch; each of the `world_size` ranks gets an equal part.
    epochs: passes from the start of training (not from where a state resumes); None = forever.
    fields: None for raw bytes by field name, or a schema {name: Field}.
    select: names of the fields that are needed at a global step; no other member of the shards is read then.
    remainder: what becomes of the samples that don't fill an epoch's last batch: "drop" them, "wrap" (fill up
        from the start of the epoch), or "pad" (the same, but `batch.valid` is False for the fillers).
    on_error: "fail" raises DataError for a sample that can't be read or decoded; "substitute" takes another
        in its place (the same one on any number of ranks, and on resuming), until more than `error_budget` of
        the rank's samples since the start or the last `load_state_dict`, and more than three, were bad.
        `faults` counts the causes, `quarantine` lists (shard, key, cause).
    train: False = no augmentation, and the first of several alternatives.
    transform: called with each batch in the reading thread; the result is `batch.tensors`.
    threads: how many threads read and decode. prefetch: how many batches may lie ready.
    cache_bytes: keep up to this many bytes of decoded values (before augmentation) in memory.

    Raises ValueError for bad arguments, ConfigError for a batch that the ranks can't share equally, DataError
    for shards that can't be used. An error of a batch is raised when that batch is asked for, not before;
    asking again tries again.
    """

    def __init__(
        self,
        urls: str | Path | Sequence[str | Path],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = 1,
        fields: Mapping[str, Field] | None = None,
        select: Callable[[int], Collection[str]] | None = None,
        shuffle: bool = True,
        remainder: Literal["drop", "wrap", "pad"] = "drop",
        on_error: Literal["fail", "substitute"] = "fail",
        error_budget: float = 0.005,
        train: bool = True,
        transform: Callable[[Batch], Any] | None = None,
        threads: int = 2,
        prefetch: int = 2,
        cache_bytes: int = 0,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
            ("threads", threads, 1),
            ("prefetch", prefetch, 1),
            ("cache_bytes", cache_bytes, 0),
            ("epochs", 1 if epochs is None else epochs, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size, got rank {rank} of {world_size}")
        if remainder not in ("drop", "wrap", "pad"):
            raise ValueError(f"remainder must be 'drop', 'wrap' or 'pad', got {remainder!r}")
        if on_error not in ("fail", "substitute"):
            raise ValueError(f"on_error must be 'fail' or 'substitute', got {on_error!r}")
        if not 0 <= error_budget <= 1:
            raise ValueError(f"error_budget is a share of the samples, from 0 to 1, got {error_budget!r}")
        if batch_size % world_size:
            below = batch_size // world_size * world_size
            nearest = f"{below} or {below + world_size}" if below else str(world_size)
            raise ConfigError(
                f"batch_size {batch_size} can't be shared equally by world_size {world_size} ranks: "
                f"the nearest that can is {nearest}"
            )
        shards = _Shards(expand(urls))
        self.num_samples = shards.num_samples
        if remainder == "drop":
            self.steps_per_epoch = self.num_samples // batch_size
            if not self.steps_per_epoch:
                raise DataError(
                    f"{shards.describe()}: {self.num_samples} samples don't fill one batch of {batch_size}: "
                    "use a smaller batch_size"
                )
        else:
            self.steps_per_epoch = -(-self.num_samples // batch_size)
        self.faults: Counter[str] = Counter()
        self.quarantine: list[tuple[str, str, str]] = []
        self._error_budget = error_budget
        self._num_read = 0
        self._step = 0
        self._end = None if epochs is None else epochs * self.steps_per_epoch
        self._prefetch = prefetch
        self._threads = threads
        self._ahead: _ReadAhead | None = None
        self._identity = {
            "num_samples": self.num_samples,
            "num_shards": len(shards.indexes),
            "fingerprint": shards.fingerprint,
            "seed": seed,
            "batch_size": batch_size,
            "shuffle": shuffle,
            "remainder": remainder,
        }
        # The threads hold the assembler, never the stream, so that an abandoned stream is collected and stops
        # them.
        self._assembler = _Assembler(
            shards=shards,
            order=_Order(seed, self.num_samples, shuffle=shuffle),
            seed=seed,
            rows=range(rank * (batch_size // world_size), (rank + 1) * (batch_size // world_size)),
            batch_size=batch_size,
            steps_per_epoch=self.steps_per_epoch,
            pad=remainder == "pad",
            fields=None
            if fields is None
            else {name: _Source(seed, name, spec) for name, spec in fields.items()},
            select=select,
            substitute=on_error == "substitute",
            train=train,
            transform=transform,
            cache=_Cache(cache_bytes) if cache_bytes else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """Steps left; a stream without end has no length (TypeError)."""
        if self._end is None:
            raise TypeError("a stream with epochs=None has no length")
        return max(0, self._end - self._step)

    def __next__(self) -> Batch:
        if self._end is not None and self._step >= self._end:
            self.close()
            raise StopIteration
        if self._ahead is None:
            steps = itertools.count(self._step) if self._end is None else range(self._step, self._end)
            self._ahead = _ReadAhead(self._assembler.assemble, iter(steps), self._prefetch, self._threads)
            # Also runs at the end of the process, before the interpreter is torn down under the threads.
            self._stop = weakref.finalize(self, self._ahead.stop)
        made = self._ahead.take()
        if isinstance(made, BaseException):
            self.close()
            raise made
        batch, faults = made
        self._num_read += len(batch)
        self._count(faults)
        self._step += 1
        return batch

    def _count(self, faults: list["_SampleError"]) -> None:
        for error in faults:
            self.faults[error.cause] += 1
            if len(self.quarantine) < MAX_QUARANTINE:
                self.quarantine.append((error.shard, error.key, error.cause))
        num_faults = self.faults.total()
        if faults and num_faults > FREE_FAULTS and num_faults > self._error_budget * self._num_read:
            self.close()
            causes = ", ".join(f"{count} x {cause}" for cause, count in self.faults.most_common(5))
            raise DataError(
                f"{num_faults} of {self._num_read} samples can't be used, more than the error budget of "
                f"{self._error_budget:.3%}: {causes}. The last one: {faults[-1]}"
            ) from faults[-1]

    def seek(self, step: int) -> None:
        """Continue before global step `step`, as if the earlier ones had been consumed; costs nothing."""
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be a whole number of at least 0, got {step!r}")
        self.close()
        self._step = step

    def close(self) -> None:
        """Stop the threads and close the shards; the stream keeps its place and may be used again."""
        if self._ahead is not None:
            self._stop()
            self._ahead = None
        self._assembler.shards.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, after the last batch that was *returned* (whatever lies read ahead).

        Small, fit for JSON, equal on every rank and valid for any world size.
        """
        return {
            "version": 1,
            "step": self._step,
            "epoch": self._step // self.steps_per_epoch,
            "position": self._assembler.position(self._step),
            **self._identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken, on any rank of any world size.

        Raises DataError, saying in words what differs, for the state of another data set, order or batch
        size.
        """
        if state.get("version") != 1 or not isinstance(state.get("step"), int) or state["step"] < 0:
            raise DataError(f"not a state of a ShardStream, version 1: {str(dict(state))[:200]}")
        words = {
            "num_samples": "number of samples",
            "num_shards": "number of shards",
            "seed": "seed",
            "batch_size": "batch_size",
            "shuffle": "shuffle",
            "remainder": "remainder",
        }
        differences = [
            f"{word}: {state.get(name)} in the state, {self._identity[name]} here"
            for name, word in words.items()
            if state.get(name) != self._identity[name]
        ]
        if not differences and state.get("fingerprint") != self._identity["fingerprint"]:
            differences = ["the shards: as many, with as many samples, but other names, order or contents"]
        if differences:
            raise DataError(f"the state belongs to another stream; differing are {'; '.join(differences)}")
        self.seek(state["step"])
        self.faults.clear()
        self.quarantine.clear()
        self._num_read = 0


# --- which sample comes next ---


class _Order:
    """The permutation of each epoch, evaluated where it is needed.

    A Feistel network over the smallest 2**bits >= n, whose two parts take turns in being changed by a keyed
    hash of the other (so it is a bijection whatever the hash), made one over [0, n) by cycle walking: results
    outside are sent through again (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). Eight
    rounds; keys from BLAKE2b of (seed, epoch). Fewer than two walks are needed on average.

    On a few bits such a network is visibly biased; sets that fit into one block are sorted by a keyed hash
    instead.
    """

    _BLOCK = 1024  # offsets evaluated together: numpy's cost for each call is shared by them

    def __init__(self, seed: int, num_samples: int, *, shuffle: bool) -> None:
        self._seed = seed
        self._num_samples = num_samples
        self._shuffle = shuffle
        bits = (num_samples - 1).bit_length()
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        self._block = functools.lru_cache(maxsize=8)(self._evaluate_block)

    def at(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        """(n,) int64 offsets into an epoch, 0 <= offset < num_samples, to (n,) int64 sample numbers."""
        if not self._shuffle:
            return offsets
        numbers = offsets // self._BLOCK
        samples = np.empty_like(offsets)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            samples[here] = self._block(epoch, number)[offsets[here] - number * self._BLOCK]
        return samples

    def _evaluate_block(self, epoch: int, number: int) -> np.ndarray:
        first = number * self._BLOCK
        offsets = np.arange(first, min(first + self._BLOCK, self._num_samples), dtype=np.uint64)
        digest = hashlib.blake2b(f"order/{self._seed}/{epoch}".encode(), digest_size=64).digest()
        keys = np.frombuffer(digest, "<u8")
        if self._num_samples <= self._BLOCK:
            return np.argsort(_mix(_mix(offsets + keys[0]) + keys[1]))
        samples = self._encrypt(offsets, keys)
        while (outside := samples >= self._num_samples).any():
            samples[outside] = self._encrypt(samples[outside], keys)
        return samples.astype(np.int64)

    def _encrypt(self, x: np.ndarray, keys: np.ndarray) -> np.ndarray:
        high, low = x >> self._low_bits, x & self._low_mask
        for first, second in keys.reshape(4, 2):
            high = high ^ (_mix(low + first) & self._high_mask)
            low = low ^ (_mix(high + second) & self._low_mask)
        return (high << self._low_bits) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014), on (n,) uint64 with wrap-around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- reading shards ---


class _SampleError(DataError):
    """One sample can't be used. The attributes are set after construction, so that the error pickles."""

    shard: str
    key: str
    cause: str  # short and without the sample's own details, to count by

    @classmethod
    def of(cls, shard: Path, key: str, name: str | None, cause: str, detail: str) -> "_SampleError":
        error = cls(f"shard {shard}, key {key}{f', field {name}' if name else ''}: {detail}")
        error.shard, error.key = str(shard), key
        error.cause = f"{cause} {name}" if name else cause
        return error


def expand(urls: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `urls` of a ShardStream names, in order. Raises ValueError and DataError as it does."""
    items = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    if not items:
        raise ValueError("urls names no shards")
    paths: list[Path] = []
    for item in items:
        text = os.path.expanduser(os.fspath(item))  # noqa: PTH111 (it may be a pattern, not yet a path)
        if _REMOTE.match(text):
            raise ValueError(f"urls: shards are read from files (mount or copy them), got {text!r}")
        try:
            names = [text] if Path(text).exists() else list(braceexpand(text))
        except ValueError as error:  # unbalanced braces
            raise ValueError(f"urls: bad brace pattern {text!r}: {error}") from None
        for name in names:
            path = Path(name)
            if path.is_dir():
                found = sorted(entry for entry in path.rglob("*.tar") if entry.is_file())
                if not found:
                    raise DataError(f"folder {path}: holds no shards (files named *.tar)")
                paths += found
            else:
                paths.append(path)
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(f"urls names {len(twice)} shards more than once: {', '.join(twice[:5])}")
    return paths


class _OpenFile:
    """A file descriptor, closed when its last user lets go of it, be that the cache or a reading thread."""

    def __init__(self, index: Index) -> None:
        self.fd = os.open(index.shard, os.O_RDONLY)
        status = os.fstat(self.fd)
        if (status.st_size, status.st_mtime_ns) != (index.shard_size, index.shard_mtime_ns):
            raise DataError("the shard changed since it was indexed")

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class _Shards:
    """All shards of a data set as one sequence of samples, with a bounded number of them open."""

    def __init__(self, paths: list[Path]) -> None:
        self.indexes = read_indexes(paths)
        self._ends = list(itertools.accumulate(len(index) for index in self.indexes))
        self.num_samples = self._ends[-1]
        self.field_names = sorted({name for index in self.indexes for name in index.fields})
        self._stems = [path.name.removesuffix(".tar") for path in paths]
        digest = hashlib.blake2b(digest_size=16)
        for stem, index in zip(self._stems, self.indexes, strict=True):
            digest.update(f"{stem}\0{index.fingerprint}\0".encode("utf-8", "surrogateescape"))
        self.fingerprint = digest.hexdigest()
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def describe(self) -> str:
        first = self.indexes[0].shard
        more = len(self.indexes) - 1
        return f"shard {first}" + (f" and {more} more" if more else "")

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the shard, number of the sample in it)."""
        shard = bisect.bisect_right(self._ends, sample)
        return shard, sample - (self._ends[shard - 1] if shard else 0)

    def sample_key(self, shard: int, key: str) -> str:
        return f"{self._stems[shard]}/{key}"

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def read(
        self, shard: int, key: str, record: Mapping[str, tuple[int, int]], names: Collection[str]
    ) -> dict[str, bytes]:
        """The bodies of the named members. Raises _SampleError if they can't be read in full."""
        path = self.indexes[shard].shard
        start, end, num_bytes = sys.maxsize, 0, 0
        for name in names:
            offset, size = record[name]
            start, end, num_bytes = min(start, offset), max(end, offset + size), num_bytes + size
        if not num_bytes:
            return dict.fromkeys(names, b"")
        try:
            file = self._file(shard)
            bodies = {}
            if end - start <= num_bytes + _GAP:
                data = _pread(file.fd, start, end - start)
                for name in names:
                    offset, size = record[name]
                    bodies[name] = data[offset - start : offset - start + size]
            else:
                for name in names:
                    bodies[name] = _pread(file.fd, *record[name])
            return bodies
        except OSError as error:
            detail = f"can't be read: {error.strerror}"
            raise _SampleError.of(path, key, None, "unreadable", detail) from error
        except DataError as error:
            raise _SampleError.of(path, key, None, "unreadable", str(error)) from error

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.get(shard)
            if file is not None:
                self._open.move_to_end(shard)
                return file
        file = _OpenFile(
            self.indexes[shard]
        )  # outside the lock: opening may take long on a network file system
        with self._lock:
            self._open[shard] = file
            if len(self._open) > MAX_OPEN_FILES:
                self._open.popitem(last=False)
        return file


def _pread(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) == size:
        return data
    parts = [data]
    missing = size - len(data)
    while missing:  # a system call may return less than asked for, of large reads above all
        data = os.pread(fd, missing, offset + size - missing)
        if not data:
            raise DataError(f"the shard was cut while in use: it ends before byte {offset + size}")
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


# --- from a record to values ---


class _Source:
    """A schema field, ready for use: its parsed sources and the key of its random numbers."""

    def __init__(self, seed: int, name: str, spec: Field) -> None:
        if not isinstance(spec, Field):
            raise ValueError(f"fields[{name!r}] must be a Field, got {type(spec).__name__}")
        self.names = spec.source.split("|")
        if spec.first is not None and not 0 <= spec.first <= 1:
            raise ValueError(f"fields[{name!r}].first must be from 0 to 1, got {spec.first!r}")
        if not all(self.names):
            raise ValueError(f"fields[{name!r}].source must be names joined by '|', got {spec.source!r}")
        self.spec = spec
        # Cuts after each component called `json`: what is before may be a member, what is after a path inside
        # it.
        self._cuts: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for source in self.names:
            parts = source.split(".")
            self._cuts[source] = [
                (".".join(parts[:cut]), tuple(parts[cut:]))
                for cut in range(len(parts) - 1, 0, -1)
                if parts[cut - 1] == "json"
            ]
        digest = hashlib.blake2b(f"field/{seed}/{name}".encode(), digest_size=16).digest()
        self._random_key = np.frombuffer(digest, "<u8")

    def members(self, record: Collection[str]) -> list[tuple[str, tuple[str, ...]]]:
        """(member, path inside it) to look at, in order; only the last can't turn out to be absent."""
        found: list[tuple[str, tuple[str, ...]]] = []
        for source in self.names:
            if source in record:
                found.append((source, ()))
                if not self.spec.choose:
                    break
            else:
                found += [(member, path) for member, path in self._cuts[source] if member in record]
        return found

    def generator(self, slot: int) -> np.random.Generator:
        """The random numbers of this field in one row of the run: row `slot`, counted over all batches.

        Philox (Salmon et al., 2011) turns a key and a counter into independent numbers: the key is (seed,
        field), and the row is the counter's highest word, so no two rows overlap.
        """
        return np.random.Generator(np.random.Philox(key=self._random_key, counter=slot << 192))


class _Cache:
    """Decoded alternatives by (sample, field), until the budget is full; what is in stays in.

    Every sample comes once an epoch, so throwing out the oldest would throw out what comes next.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._values: dict[tuple[int, str], list[Any]] = {}
        self._lock = threading.Lock()

    def get(self, sample: int, name: str) -> list[Any] | None:
        return self._values.get((sample, name))

    def put(self, sample: int, name: str, values: list[Any]) -> None:
        num_bytes = sum(getattr(value, "nbytes", None) or sys.getsizeof(value) for value in values)
        with self._lock:
            if num_bytes <= self._left and (sample, name) not in self._values:
                self._left -= num_bytes
                self._values[sample, name] = values


@dataclass
class _Assembler:
    """Makes the batch of a step: all that the reading threads need, and nothing that changes the stream."""

    shards: _Shards
    order: _Order
    seed: int
    rows: range
    batch_size: int
    steps_per_epoch: int
    pad: bool
    fields: dict[str, _Source] | None
    select: Callable[[int], Collection[str]] | None
    substitute: bool
    train: bool
    transform: Callable[[Batch], Any] | None
    cache: _Cache | None
    num_samples: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_samples = self.shards.num_samples

    def position(self, step: int) -> int:
        """Samples consumed by all ranks before `step`; the fillers of a padded batch don't count."""
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        if self.pad:
            return epoch * self.num_samples + in_epoch * self.batch_size
        return step * self.batch_size

    def assemble(self, step: int, helpers: "_Helpers") -> tuple[Batch, list[_SampleError]]:
        epoch, in_epoch = divmod(step, self.steps_per_epoch)
        rows = np.arange(self.rows.start, self.rows.stop, dtype=np.int64)
        offsets = in_epoch * self.batch_size + rows
        valid = offsets < self.num_samples if self.pad else np.ones(len(rows), bool)
        samples = self.order.at(epoch, offsets % self.num_samples).tolist()
        names = self._names(step)
        first_slot = step * self.batch_size + self.rows.start

        def read_row(row: int) -> tuple[str, dict[str, Any], list[_SampleError]]:
            return self._read_row(samples[row], first_slot + row, names)

        results = helpers.map(read_row, len(samples))
        if not self.train:  # a stand-in may train a model, but its score would count twice
            valid &= np.array([not errors for _, _, errors in results])
        batch = Batch(
            sample_keys=[key for key, _, _ in results],
            columns={name: [values.get(name) for _, values, _ in results] for name in names},
            step=step,
            epoch=epoch,
            position=self.position(step + 1),
            valid=valid,
        )
        if self.transform is not None:
            batch.tensors = self.transform(batch)
        return batch, [error for _, _, errors in results for error in errors]

    def _names(self, step: int) -> list[str]:
        known = self.shards.field_names if self.fields is None else list(self.fields)
        if self.select is None:
            return known
        selected = set(self.select(step))
        if unknown := selected.difference(known):
            raise ValueError(f"select({step}) names unknown fields {sorted(unknown)}; there are {known}")
        return [name for name in known if name in selected]

    def _read_row(
        self, sample: int, slot: int, names: list[str]
    ) -> tuple[str, dict[str, Any], list[_SampleError]]:
        errors: list[_SampleError] = []
        while True:
            try:
                key, values = self._read_sample(sample, slot, names)
                return key, values, errors
            except _SampleError as error:
                if not self.substitute:
                    raise
                errors.append(error)
                if len(errors) == MAX_SUBSTITUTES:
                    raise DataError(
                        f"{len(errors)} samples in a row can't be used, the last: {error}"
                    ) from error
            text = f"substitute/{self.seed}/{slot}/{len(errors)}"
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            sample = int.from_bytes(digest, "little") % self.num_samples

    def _read_sample(self, sample: int, slot: int, names: list[str]) -> tuple[str, dict[str, Any]]:
        shards = self.shards
        shard, local = shards.locate(sample)
        index = shards.indexes[shard]
        key = index.key(local)
        record = index.record(local)
        if self.fields is None:
            present = record.keys() if self.select is None else [name for name in names if name in record]
            return shards.sample_key(shard, key), shards.read(shard, key, record, present)
        sources = {name: self.fields[name] for name in names}
        known = {name: self.cache.get(sample, name) for name in names} if self.cache else {}
        members = {
            name: source.members(record) for name, source in sources.items() if known.get(name) is None
        }
        needed = dict.fromkeys(member for found in members.values() for member, _ in found)
        bodies = shards.read(shard, key, record, needed)
        parsed: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for name, source in sources.items():
            spec = source.spec
            alternatives = known.get(name)
            if alternatives is None:
                try:
                    alternatives = [
                        spec.read(body) for body in _alternatives(members[name], bodies, parsed, spec.choose)
                    ]
                except MemoryError:
                    raise
                except Exception as error:  # readers are arbitrary code, fed with arbitrary bytes
                    detail = (
                        str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
                    )
                    raise _SampleError.of(index.shard, key, name, "undecodable", detail) from error
                if self.cache:
                    self.cache.put(sample, name, alternatives)
            if not alternatives:
                if spec.required:
                    detail = f"the record has no {spec.source}; it has {', '.join(record)}"
                    raise _SampleError.of(index.shard, key, name, "missing", detail)
                values[name] = None
                continue
            chosen = 0
            if self.train and (len(alternatives) > 1 or spec.augment is not None):
                rng = source.generator(slot)
                chosen = _choose(rng, len(alternatives), spec.first)
            value = alternatives[chosen]
            if self.cache and isinstance(value, np.ndarray):
                value = value.copy()  # whoever gets it may write into it
            if self.train and spec.augment is not None:
                value = spec.augment(value, rng)
            values[name] = value
        return shards.sample_key(shard, key), values


def _choose(rng: np.random.Generator, num_alternatives: int, first: float | None) -> int:
    if num_alternatives == 1:
        return 0
    if first is None:
        return int(rng.integers(num_alternatives))
    return 0 if rng.random() < first else int(rng.integers(1, num_alternatives))


def _alternatives(
    members: list[tuple[str, tuple[str, ...]]], bodies: dict[str, bytes], parsed: dict[str, Any], choose: bool
) -> list[bytes]:
    """The bytes to read: of the first member (and path in it) that has a value, or of all if `choose`."""
    found: list[bytes] = []
    for member, path in members:
        if not path:
            found.append(bodies[member])
        else:
            if member not in parsed:
                parsed[member] = json.loads(bodies[member])
            value = parsed[member]
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            for element in value if isinstance(value, list) else [value]:
                if element is not None:
                    text = element if isinstance(element, str) else json.dumps(element, ensure_ascii=False)
                    found.append(text.encode("utf-8", "surrogatepass"))
        if found and not choose:
            break
    return found


# --- reading ahead ---


class _Helpers:
    """A few daemon threads that share the rows of a batch with the thread that asks.

    Not a ThreadPoolExecutor: the interpreter waits for that one's threads at its end, whatever they hang on.
    """

    def __init__(self, num_threads: int) -> None:
        self.stopped = False  # what is still to do is given up then
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.threads = [
            threading.Thread(target=_help, args=(self._tasks,), name=f"mmscale-decode-{i}", daemon=True)
            for i in range(num_threads)
        ]
        for thread in self.threads:
            thread.start()

    def map(self, function: Callable[[int], Any], count: int) -> list[Any]:
        """[function(0), ..., function(count - 1)]; raises the lowest number's error, after all have run."""
        results: list[Any] = [None] * count
        errors: dict[int, Exception] = {}
        numbers = iter(range(count))  # shared: taking the next number is atomic
        done = threading.Semaphore(0)

        def do(number: int) -> None:
            try:
                if self.stopped:
                    raise InterruptedError("the stream was closed")
                results[number] = function(number)
            except Exception as error:
                errors[number] = error

        def help_and_tell() -> None:
            try:
                for number in numbers:
                    do(number)
            finally:
                done.release()

        num_helping = 0
        start = time.perf_counter()
        for number in numbers:
            do(number)
            if not num_helping and time.perf_counter() - start > _QUICK_S * (number + 1):
                num_helping = len(self.threads)
                for _ in self.threads:
                    self._tasks.put(help_and_tell)
        for _ in range(num_helping):
            done.acquire()
        if errors:
            raise errors[min(errors)]
        return results

    def end(self) -> None:
        """To be called by the thread that calls `map`: a helper that ended would be waited for."""
        for _ in self.threads:
            self._tasks.put(None)


def _help(tasks: "SimpleQueue[Callable[[], None] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()


class _ReadAhead:
    """One thread that makes batches in order, up to `depth` ahead of whoever takes them."""

    def __init__(
        self,
        make: Callable[[int, _Helpers], tuple[Batch, list[_SampleError]]],
        steps: Iterator[int],
        depth: int,
        num_threads: int,
    ) -> None:
        self._make = make
        self._steps = steps
        self._depth = depth
        self._ready: deque[tuple[Batch, list[_SampleError]] | BaseException] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._helpers = _Helpers(num_threads - 1)
        self._thread = threading.Thread(target=self._run, name="mmscale-read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._make_all()
        finally:
            self._helpers.end()

    def _make_all(self) -> None:
        for step in self._steps:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
                if self._stopped:
                    return
            made: tuple[Batch, list[_SampleError]] | BaseException
            try:
                made = self._make(step, self._helpers)
            except BaseException as error:  # whatever it is belongs to the one who asks for this batch
                made = error
            with self._changed:
                self._ready.append(made)
                self._changed.notify_all()
            if isinstance(made, BaseException):
                return

    def take(self) -> tuple[Batch, list[_SampleError]] | BaseException:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._stopped)
            if not self._ready:
                raise RuntimeError("the stream was closed while a batch of it was waited for")
            made = self._ready.popleft()
            self._changed.notify_all()
        return made

    def stop(self) -> None:
        """End the threads after the rows that they are reading now; waits for that, but not long."""
        with self._changed:
            self._stopped = self._helpers.stopped = True
            self._ready.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + _STOP_S
        for thread in (self._thread, *self._helpers.threads):
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))
