"""The samples of a data set by number: manifest, sidecars and shard files behind `read`.

A bounded number of shards is open at a time, and of sidecars a bounded number of bytes is kept (see
`mmscale.data.manifest`), so a data set may have any number of either. What goes wrong with one sample is a
`SampleError` that names shard and key.
"""

import sys
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from mmscale.data.fields import SampleError
from mmscale.data.index import Index, shown
from mmscale.data.manifest import Manifest
from mmscale.data.storage import File, Storage, is_remote
from mmscale.errors import DataError

MAX_OPEN_FILES = 256
_GAP = 4096  # bytes between members that are cheaper to read over than to seek over
SMALL = 8192  # bytes that are cheaper to copy than to read in two calls


class Record:
    """Where one sample lies: its shard's number, its number in there, its index, and its members."""

    __slots__ = ("index", "key", "members", "shard")

    def __init__(self, shard: int, index: Index, key: str, members: dict[str, tuple[int, int]]) -> None:
        self.shard, self.index, self.key, self.members = shard, index, key, members


class Shards:
    """The shards of one data set (or of one source of a blend) as one sequence of samples."""

    def __init__(self, manifest: Manifest, storage: Storage, *, name: str = "") -> None:
        self.manifest = manifest
        self.storage = storage
        self.name = name  # of the source in a blend
        self.num_samples = manifest.num_samples
        self.field_names = list(manifest.fields)
        # A request to a remote store costs more than any copy.
        self._cut_limit = sys.maxsize if self.is_remote else SMALL
        self._stems: dict[int, str] = {}
        self._open: OrderedDict[int, File] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def is_remote(self) -> bool:
        return any(is_remote(self.manifest.urls(shard)) for shard in {0, self.manifest.num_shards - 1})

    def describe(self) -> str:
        return self.manifest.describe()

    def shard_name(self, shard: int) -> str:
        """Path or URL of a shard, for messages."""
        return shown(self.manifest.urls(shard))

    def locate(self, samples: np.ndarray) -> tuple[list[int], list[int]]:
        """(n,) int64 sample numbers to the shards' numbers and the numbers in them."""
        shards, places = self.manifest.locate(samples)
        return shards.tolist(), places.tolist()

    def record(self, shard: int, place: int) -> Record:
        """Sample number `place` of a shard. Raises SampleError if its index can't be had."""
        try:
            index = self.manifest.index(shard)
        except DataError as error:
            raise self._failed(shard, None, error) from error
        return Record(shard, index, index.key(place), index.record(place))

    def sample_key(self, record: Record) -> str:
        """What a batch calls this sample: "shard-stem/key"."""
        return f"{self.stem(record.shard)}/{record.key}"

    def stem(self, shard: int) -> str:
        stem = self._stems.get(shard)
        if stem is None:
            stem = self._stems[shard] = self.manifest.stem(shard)
        return stem

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def span(self, record: Record, names: Collection[str]) -> tuple[int, int]:
        """(offset, size) of the part of the shard that holds these members."""
        places = [record.members[name] for name in names]
        start = min(offset for offset, _ in places)
        return start, max(offset + size for offset, size in places) - start

    def fetch(self, record: Record, names: Collection[str]) -> None:
        """Bring what `read` will want into the node's cache; errors are left for `read` to meet."""
        if names:
            start, size = self.span(record, names)
            self.storage.prefetch(self.manifest.urls(record.shard), start, size, record.index.stat)

    def read(self, record: Record, names: Collection[str]) -> dict[str, bytes]:
        """The bodies of the named members. Raises SampleError if they can't be read in full."""
        start, end, num_bytes = sys.maxsize, 0, 0
        members = record.members
        for name in names:
            offset, size = members[name]
            start, end, num_bytes = min(start, offset), max(end, offset + size), num_bytes + size
        if not num_bytes:
            return dict.fromkeys(names, b"")
        try:
            file = self._open.get(record.shard) or self._file(record.shard, record.index)
            # One read for small members that lie together; of large ones the cut would be one copy more.
            if end - start <= min(num_bytes + _GAP, self._cut_limit):
                data = file.read(start, end - start)
                bodies = {}
                for name in names:
                    offset, size = members[name]
                    bodies[name] = data[offset - start : offset - start + size]
                return bodies
            return {name: file.read(*members[name]) for name in names}
        except (OSError, DataError) as error:
            raise self._failed(record.shard, record.key, error) from error

    def plain(self, shard: int) -> tuple[Any, ...] | None:
        """What a loop over samples of one shard needs at hand; None if the shard can't be opened.

        (read, stem, fields, starts, offsets, sizes, field_ids, key): see `mmscale.data.index.Index.arrays`.
        """
        try:
            index = self.manifest.index(shard)
            file = self._open.get(shard) or self._file(shard, index)
        except (OSError, DataError):
            return None
        return file.read, self.stem(shard), index.fields, *index.arrays, index.key

    def _failed(self, shard: int, key: str | None, error: Exception) -> SampleError:
        cause = getattr(error, "cause", None) or "unreadable"
        detail = getattr(error, "detail", None) or str(error)
        if isinstance(error, OSError):
            detail = f"can't be read: {error.strerror}"
        return SampleError.of(self.shard_name(shard), key, None, f"shard {cause}", detail)

    def _file(self, shard: int, index: Index) -> File:
        # Opened outside the lock: it may take long on a network file system.
        file = self.storage.open(self.manifest.urls(shard), index.stat)
        with self._lock:
            self._open[shard] = file
            if len(self._open) > MAX_OPEN_FILES:
                # Not closed: a thread may be reading from it. Its descriptor goes with its last user.
                self._open.popitem(last=False)
        return file


def signatures_text(signatures: Mapping[tuple[str, ...], int], limit: int = 12) -> str:
    """ "jpg (1,000), txt (990)": in how many samples each field is."""
    counts: dict[str, int] = {}
    for names, count in signatures.items():
        for name in names:
            counts[name] = counts.get(name, 0) + count
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(f"{name} ({count:,})" for name, count in ordered[:limit]) + more
