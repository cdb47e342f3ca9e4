"""The manifest: all shards of a data set as one sequence of samples, without opening any of them.

    manifest = open_manifest("shards")                # a folder, a brace pattern, URLs, a manifest file, or a list
    shards, locals = manifest.locate(samples)         # which shard, which sample of it
    manifest.index(shards[0]).record(locals[0])       # the sidecar is opened when it is needed

For each shard it has the name, number of samples, size, tag (time of change, or etag) and fingerprint, and
which sets of fields its samples have. The file, `shards.manifest` in the shards' folder, is one line of magic,
a checksum, one line of JSON, then plain arrays: 100,000 shards open in well under a second. Without it the
sidecars are read, and it is written for the next time when the shards are one whole folder.

The trade-off: of a large data set neither shards nor sidecars are looked at when it is opened, so a shard that
changed is found when it is first read, not before. Up to 1,000 local shards are looked at.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import struct
import sys
import threading
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from braceexpand import braceexpand

from mmscale.data.index import (
    Index,
    Notes,
    beside,
    cache_folder,
    carry_over,
    checked_payload,
    is_signed,
    keep_sidecar,
    load_index,
    local_or_remote,
    make_index,
    missing_shards,
    some,
    with_checksum,
    write_whole,
)
from mmscale.data.measure import Measurer, measure_of
from mmscale.data.storage import Stat, Storage, StorageError, is_remote, shown
from mmscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmscale.data.jobs import JobMap

logger = logging.getLogger("mmscale.data")

MANIFEST_NAME = "shards.manifest"
INDEX_BYTES = 64 << 20
MAX_LISTED = 100  # shards that an error names
_MAGIC = f"mmscale-manifest 1 {sys.byteorder}-endian\n".encode()
_CHECKED = 1000  # up to that many local shards are compared with the manifest when it is opened
_REMOTE_THREADS = 16
_QUIET_S = 2.0  # work that takes longer shows a progress bar
_FEW = 20  # up to that many shards `index` prints a line each
_OVERHEAD = 2048  # bytes of an open index that aren't in its arrays

Urls = str | Path | Sequence[str | Path]
Signatures = tuple[tuple[tuple[str, ...], int], ...]  # ((field names, sorted), how many samples), ...


class Manifest:
    """All shards of a data set, in order; made by `open_manifest`.

    num_shards, num_samples, num_bytes: totals; bytes are those of the shards.
    starts: (num_shards + 1,) int64, number of the first sample of each shard.
    signatures: {field names of a sample, sorted: how many samples have exactly these}; fields: all names, sorted.
    fingerprint: of the shards' names and their fingerprints, in order; equal wherever the shards lie.
    faults: with on_error="substitute", (url, cause, message) of each shard that was left out, or salvaged.

    Safe to use from several threads.
    """

    def __init__(
        self,
        rows: "_Rows",
        *,
        storage: Storage | None = None,
        index_bytes: int = INDEX_BYTES,
        faults: list[tuple[str, str, str]] | None = None,
        salvaged: dict[str, Index] | None = None,
    ) -> None:
        self.num_shards = len(rows.urls)
        self.starts = np.zeros(self.num_shards + 1, np.int64)
        np.cumsum(rows.num_samples, out=self.starts[1:])
        self.num_samples = int(self.starts[-1])
        self.num_bytes = int(rows.sizes.sum())
        self.faults = faults or []
        self._rows = rows
        self._storage = storage
        self._salvaged = salvaged or {}
        self._index_bytes = index_bytes
        self._loaded: OrderedDict[int, Index] = OrderedDict()
        self._loaded_bytes = 0
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in range(64)]  # a shard's index is opened by one thread
        self._said = False

    def __repr__(self) -> str:
        return f"Manifest({self.describe()}, num_shards={self.num_shards}, num_samples={self.num_samples})"

    def describe(self) -> str:
        """The shards in a few words, for messages."""
        more = self.num_shards - 1
        return f"shard {shown(self.urls(0))}" + (f" and {more} more" if more else "")

    def urls(self, shard: int) -> str:
        """Path or URL of shard number `shard`."""
        return self._rows.urls[shard]

    def stem(self, shard: int) -> str:
        """The shard's file name without ".tar"."""
        return _stem(self._rows.urls[shard])

    @cached_property
    def signatures(self) -> dict[tuple[str, ...], int]:
        total: Counter[tuple[str, ...]] = Counter()
        for signatures, times in Counter(self._rows.signatures).items():
            for names, count in signatures:
                total[names] += count * times
        return dict(total.most_common())

    @cached_property
    def fields(self) -> list[str]:
        return sorted({name for names in self.signatures for name in names})

    @property
    def field_counts(self) -> dict[str, int]:
        """{field: samples that have it}, the most common first."""
        counts: Counter[str] = Counter()
        for names, count in self.signatures.items():
            counts.update(dict.fromkeys(names, count))
        return dict(counts.most_common())

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        fingerprints = self._rows.fingerprints.tobytes().hex()
        for number, url in enumerate(self._rows.urls):
            text = f"{_stem(url)}\0{fingerprints[32 * number : 32 * number + 32]}\0"
            digest.update(text.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 sample numbers -> (n,) int64 shards, (n,) int64 numbers of the samples in them.

        Raises IndexError for a number outside [0, num_samples).
        """
        samples = np.asarray(samples, np.int64)
        if samples.size and (samples.min() < 0 or samples.max() >= self.num_samples):
            raise IndexError(f"sample numbers must be from 0 to {self.num_samples - 1}")
        shards = np.searchsorted(self.starts, samples, side="right") - 1
        return shards, samples - self.starts[shards]

    def index(self, shard: int) -> Index:
        """The index of shard number `shard`: from memory, or its sidecar, or (said once) built again.

        At most `index_bytes` of indexes are kept, those used last; an index that was given out stays valid.

        Raises DataError if the shard isn't as it was when the manifest was made, or can't be read.
        """
        index = self._loaded.get(shard)
        if index is None:
            return self._open(shard)
        with contextlib.suppress(KeyError):  # another thread let go of it in this moment
            self._loaded.move_to_end(shard)
        return index

    def columns(self, name: str, samples: np.ndarray) -> np.ndarray:
        """(n,) int64 sample numbers -> (n,) float32 of a measured column such as "jpg.width", NaN where unknown.

        Raises ConfigError for a name that no measure makes, DataError, naming the shard, if one wasn't measured.
        """
        measure = measure_of(name)
        shards, numbers = self.locate(samples)
        values = np.full(len(shards), np.nan, np.float32)
        order = np.argsort(shards, kind="stable")
        ends = np.flatnonzero(np.diff(shards[order], append=-1)) + 1
        for start, end in itertools.pairwise([0, *ends.tolist()]):
            rows = order[start:end]
            index = self.index(int(shards[rows[0]]))
            column = index.columns.get(name)
            if column is not None:
                values[rows] = column[numbers[rows]]
            elif measure not in index.measured or (
                name.endswith(".tokens") and " " not in index.measured["text"]
            ):
                wanted = "text --tokenizer F" if name.endswith(".tokens") else measure
                raise DataError(
                    f"shard {shown(index.url)}: its index has no column {name}: "
                    f"`mmscale data index SHARDS --measure {wanted}` adds it"
                )
        return values

    def save(self, path: str | Path) -> None:
        """Write the manifest to a local file; shards in the file's folder or below are named relative to it."""
        path = Path(path)
        write_whole(path, _to_bytes(self._rows, _base(str(path.parent))))

    def _open(self, shard: int) -> Index:
        with self._opening[shard % len(self._opening)]:
            index = self._loaded.get(shard)  # another thread may have been faster
            if index is not None:
                return index
            salvaged = self._salvaged.get(self.urls(shard))
            if salvaged is not None:
                return salvaged
            index = self._load(shard)
            with self._lock:
                self._loaded[shard] = index
                self._loaded_bytes += index.nbytes + _OVERHEAD
                while self._loaded_bytes > self._index_bytes and len(self._loaded) > 1:
                    _, old = self._loaded.popitem(last=False)
                    self._loaded_bytes -= old.nbytes + _OVERHEAD
            return index

    def _load(self, shard: int) -> Index:
        rows = self._rows
        url = rows.urls[shard]
        expected = Stat(int(rows.sizes[shard]), rows.tags[shard])
        if (
            is_remote(url) and not rows.exact[shard]
        ):  # the manifest was made where the shards were local files
            self._storage = self._storage or Storage()
            found = self._storage.stat(url)
            if found.size != expected.size:
                raise self._changed(shard)
            expected = found
        index, reason = load_index(url, stat=expected, storage=self._storage)
        if index is None:
            if not self._said:
                self._said = True
                logger.warning("indexing shard %s again (%s)", shown(url), reason)
            index = make_index(url, storage=self._storage)
            if (index.size, index.tag) == (expected.size, expected.tag):
                keep_sidecar(index)
        if (index.size, index.tag, len(index)) != (
            expected.size,
            expected.tag,
            int(rows.num_samples[shard]),
        ) or bytes.fromhex(index.fingerprint) != rows.fingerprints[shard].tobytes():
            raise self._changed(shard)
        return index

    def _changed(self, shard: int) -> DataError:
        return DataError(
            f"shard {shown(self.urls(shard))}: changed since it was indexed (its manifest has another size, time "
            "or contents): `mmscale data index SHARDS` takes it as it is now"
        )


def open_manifest(
    urls: Urls,
    *,
    storage: Storage | None = None,
    on_error: Literal["fail", "substitute"] = "fail",
    index_bytes: int = INDEX_BYTES,
    fresh: bool = False,
) -> Manifest:
    """The manifest of the shards that `urls` names; indexes what has no index yet, saying so once.

    urls: brace pattern, path or URL of a tar, folder (all *.tar below it, in order), manifest file, or a list of
        these. A folder's `shards.manifest` is compared with the names in the folder, and made again where they
        differ; shards given by name take from it what it knows. A remote folder that has one isn't listed.
    storage: what reads remote shards.
    on_error: "fail" raises DataError naming every shard that can't be used (at most 100); "substitute" leaves
        those out, salvages the complete samples of shards that are cut, and lists both in `Manifest.faults`.
    index_bytes: at most this much memory holds opened indexes.
    fresh: don't use a manifest that is there; read the sidecars and write it anew.

    Raises ConfigError (a ValueError) for `urls` that name nothing, something twice, or with unbalanced braces,
    and DataError.
    """
    if on_error not in ("fail", "substitute"):
        raise ValueError(f"on_error must be 'fail' or 'substitute', got {on_error!r}")
    parts = _parts(urls, storage)
    _refuse_doubles([url for part in parts for url in part.urls])
    stale = False
    tables = []
    for part in parts:
        rows, as_stored = _known_rows(part, storage, fresh)
        stale = stale or not as_stored
        tables.append(rows)
    rows = _joined(tables)
    filled = _fill(rows, storage, on_error)
    manifest = Manifest(
        filled.rows,
        storage=storage,
        index_bytes=index_bytes,
        faults=filled.faults,
        salvaged=filled.salvaged,
    )
    folder = parts[0].folder if len(parts) == 1 else None
    if folder is not None and not filled.faults and (stale or filled.num_read):
        _keep(manifest, folder, quiet=filled.unkept)
    return manifest


def expand(urls: Urls, *, storage: Storage | None = None) -> list[str]:
    """The paths and URLs of the shards that `urls` names, in order. Raises like `open_manifest`."""
    found = [url for part in _parts(urls, storage) for url in part.urls]
    _refuse_doubles(found)
    return found


# --- indexing on request ---


@dataclass
class Indexed:
    """What `index_shards` did. `datasets`: (name, its manifest), each folder by itself, other shards together.

    num_made: indexes that were made; the others were there and right. faults: (url, cause, message) of shards that
    can't be used.
    """

    datasets: list[tuple[str, Manifest]]
    num_made: int
    faults: list[tuple[str, str, str]]

    def to_json(self) -> dict[str, Any]:
        return {
            "datasets": [
                {
                    "name": shown(name),
                    "num_samples": manifest.num_samples,
                    "num_shards": manifest.num_shards,
                    "num_bytes": manifest.num_bytes,
                    "fields": manifest.field_counts,
                    "fingerprint": manifest.fingerprint,
                }
                for name, manifest in self.datasets
            ],
            "num_made": self.num_made,
            "faults": [
                {"shard": shown(url), "cause": cause, "detail": detail} for url, cause, detail in self.faults
            ],
        }

    def to_text(self) -> str:
        """A line a shard, if there are few, and a line a data set."""
        lines = []
        few = sum(manifest.num_shards for _, manifest in self.datasets) <= _FEW
        for name, manifest in self.datasets:
            counts = np.diff(manifest.starts).tolist()
            if few:
                lines += [f"{shown(manifest.urls(n))}: {count} samples" for n, count in enumerate(counts)]
            if manifest.num_shards > 1 or not few:
                fields = ", ".join(f"{field} {count:,}" for field, count in manifest.field_counts.items())
                lines.append(
                    f"{shown(name)}: {manifest.num_samples:,} samples in {manifest.num_shards:,} shards, "
                    f"{manifest.num_bytes / 1e6:,.1f} MB; {fields}"
                )
        return "".join(f"{line}\n" for line in lines)

    def error(self) -> DataError | None:
        if not self.faults:
            return None
        if len(self.faults) == 1:
            return DataError(self.faults[0][2])
        lines = "\n".join(f"  {message}" for _, _, message in self.faults)
        return DataError(f"{len(self.faults)} shards can't be used:\n{lines}")


def index_shards(
    urls: Urls,
    *,
    measure: Collection[str] = (),
    tokenizer: str | Path | None = None,
    full_hash: bool = False,
    force: bool = False,
    job_map: "JobMap | None" = None,
    on_shards: Callable[[int], None] | None = None,
) -> Indexed:
    """Index shards in parallel and write the manifests of the folders among them; behind `mmscale data index`.

    Indexes that are there and right are kept, so that a killed run goes on; `force` makes all anew. What was
    measured before stays. A folder with a shard that can't be used gets no manifest.

    job_map: where the work runs (see jobs.py), default this machine's processes. on_shards: called with the number
    of shards that are done.

    Raises ConfigError for a wrong `measure` or tokenizer, otherwise like `open_manifest`; what is wrong with single
    shards is in the result.
    """
    from mmscale.data.jobs import local_map

    if measure or tokenizer is not None:
        _measurer(tuple(measure), tokenizer)  # raises here, not in each worker
    parts = _parts(urls, None)
    shards = [url for part in parts for url in part.urls]
    _refuse_doubles(shards)
    step = 1 if len(shards) <= _CHECKED else 16
    jobs = [shards[at : at + step] for at in range(0, len(shards), step)]
    work = functools.partial(
        _index_some, measure=tuple(measure), tokenizer=tokenizer, full_hash=full_hash, force=force
    )
    notes = Notes()
    faults: dict[str, tuple[str, str, str]] = {}
    num_made = num_done = 0
    for number, (made, new_notes, new_faults) in (job_map or local_map())(work, jobs):
        num_made += made
        num_done += len(jobs[number])
        notes.merge(new_notes)
        faults.update((fault[0], fault) for fault in new_faults)
        if on_shards is not None:
            on_shards(num_done)
    notes.say()
    datasets = []
    for part in parts:
        good = [url for url in part.urls if url not in faults]
        if good:
            whole = part.folder is not None and len(good) == len(part.urls)
            name = part.folder or f"{len(good)} shards"
            datasets.append((name, open_manifest(part.folder if whole and part.folder else good, fresh=True)))
    return Indexed(datasets, num_made, [faults[url] for url in shards if url in faults])


@functools.lru_cache(maxsize=4)
def _measurer(measure: tuple[str, ...], tokenizer: str | Path | None) -> Measurer:
    return Measurer(measure, tokenizer=tokenizer)


@functools.lru_cache(maxsize=1)
def _process_storage() -> Storage:
    return Storage()


def _index_some(
    urls: list[str], *, measure: tuple[str, ...], tokenizer: str | Path | None, full_hash: bool, force: bool
) -> tuple[int, Notes, list[tuple[str, str, str]]]:
    """In a worker: (indexes made, what to say of them, shards that can't be used)."""
    storage = _process_storage()
    notes = Notes()
    faults = []
    num_made = 0
    for url in urls:
        try:
            old = None if force else load_index(url, storage=storage)[0]
            missing = list(measure)
            if measure and old is not None:
                missing = _measurer(measure, tokenizer).missing(old.measured)
            if old is not None and not missing and (old.full_hash is not None or not full_hash):
                continue
            measurer = None
            if missing:
                measurer = _measurer(tuple(missing), tokenizer if "text" in missing else None)
            index = make_index(url, measurer=measurer, full_hash=full_hash, storage=storage)
            if old is not None:
                index = carry_over(old, index)
            notes.add(index, keep_sidecar(index))
            num_made += 1
        except DataError as error:
            faults.append(_fault(url, error))
    return num_made, notes, faults


# --- what the user named ---


@dataclass
class _Part:
    """Shards named together: a whole folder, a manifest file, or single shards."""

    urls: list[str]
    folder: str | None = None
    stored: "_Rows | None" = None  # of a manifest file, or of a remote folder's manifest


def _parts(urls: Urls, storage: Storage | None) -> list[_Part]:
    items = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    if not items:
        raise ConfigError("urls names no shards")
    parts: list[_Part] = []
    for item in items:
        text = os.path.expanduser(local_or_remote(item))  # noqa: PTH111 (it may be a pattern, not yet a path)
        try:
            exists = not is_remote(text) and os.path.exists(text)  # noqa: PTH110
            names = [text] if exists else list(braceexpand(text))
        except ValueError as error:  # unbalanced braces
            raise ConfigError(f"urls: bad brace pattern {shown(text)!r}: {error}") from None
        for name in names:
            part = _remote_part(name, storage) if is_remote(name) else _local_part(name)
            if part.folder is None and part.stored is None and parts and _is_plain(parts[-1]):
                parts[-1].urls += part.urls
            else:
                parts.append(part)
    return parts


def _is_plain(part: _Part) -> bool:
    return part.folder is None and part.stored is None


def _local_part(name: str) -> _Part:
    path = Path(name)
    if os.path.isdir(name):  # noqa: PTH112 (False, not an error, where it can't be looked at)
        found = list_shards(path)
        if not found:
            raise DataError(f"folder {path}: holds no shards (files named *.tar)")
        return _Part([_base(str(path)) + entry for entry in found], folder=str(path))
    if path.name.endswith(".manifest"):
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"manifest {path}: can't be read: {error.strerror}") from None
        stored, reason = _from_bytes(data, _base(str(path.parent)))
        if stored is None:
            raise DataError(f"manifest {path}: {reason}: `mmscale data index` on the folder writes it anew")
        return _Part(stored.urls, stored=stored)
    return _Part([str(path)])


def _remote_part(url: str, storage: Storage | None) -> _Part:
    parts = urlsplit(url)
    name = parts.path.rpartition("/")[2]
    if name.endswith(".manifest"):
        data = (storage or Storage()).read_all(url)
        stored, reason = _from_bytes(data, beside(url, ""))
        if stored is None:
            raise DataError(f"manifest {shown(url)}: {reason}")
        return _Part(stored.urls, stored=stored)
    if "." in name or parts.query:
        return _Part([url])
    storage = storage or Storage()
    folder = url.rstrip("/")
    stored = _remote_manifest(f"{folder}/{MANIFEST_NAME}", storage)
    if stored is not None:
        return _Part(stored.urls, stored=stored)
    found = storage.list(folder)
    if not found:
        raise DataError(f"folder {shown(folder)}: holds no shards (files named *.tar)")
    return _Part(found, folder=folder)


def list_shards(folder: str | Path) -> list[str]:
    """All *.tar below a local folder, relative to it, in the order of their paths; names only, no file is looked at.

    Folders and files that begin with a dot are left out, as are folders that are links.
    """
    found: list[str] = []

    def walk(path: str, prefix: str) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if name.endswith(".tar") and entry.is_file():
                    found.append(prefix + name)
                elif entry.is_dir(follow_symlinks=False):
                    walk(entry.path, f"{prefix}{name}/")

    try:
        walk(os.fspath(folder), "")
    except OSError as error:
        raise DataError(f"folder {error.filename}: can't be listed: {error.strerror}") from None
    # as paths are sorted, part by part: a-1.tar comes after a/b.tar
    return (
        sorted(found, key=lambda name: name.split("/"))
        if any("/" in name for name in found)
        else sorted(found)
    )


def _refuse_doubles(urls: list[str]) -> None:
    if len(set(urls)) < len(urls):
        twice = [shown(url) for url, count in Counter(urls).items() if count > 1]
        raise ConfigError(f"urls names {len(twice)} shards more than once: {', '.join(twice[:5])}")


# --- what is known of the shards ---


@dataclass
class _Rows:
    """One row a shard; `num_samples` is -1 where nothing is known yet."""

    urls: list[str]
    num_samples: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n,) int64, bytes
    tags: list[str]
    exact: np.ndarray  # (n,) bool: the tag is of the shard as it is reached, not of a local copy
    fingerprints: np.ndarray  # (n, 16) uint8
    index_bytes: np.ndarray  # (n,) int64
    signatures: list[Signatures]

    @classmethod
    def unknown(cls, urls: list[str]) -> "_Rows":
        n = len(urls)
        return cls(
            urls,
            np.full(n, -1, np.int64),
            np.zeros(n, np.int64),
            [""] * n,
            np.ones(n, bool),
            np.zeros((n, 16), np.uint8),
            np.zeros(n, np.int64),
            [()] * n,
        )

    def take(self, numbers: list[int]) -> "_Rows":
        return _Rows(
            [self.urls[i] for i in numbers],
            self.num_samples[numbers],
            self.sizes[numbers],
            [self.tags[i] for i in numbers],
            self.exact[numbers],
            self.fingerprints[numbers],
            self.index_bytes[numbers],
            [self.signatures[i] for i in numbers],
        )

    def set(self, number: int, index: Index) -> None:
        self.num_samples[number] = len(index)
        self.sizes[number] = index.size
        self.tags[number] = index.tag
        self.exact[number] = True
        self.fingerprints[number] = np.frombuffer(bytes.fromhex(index.fingerprint), np.uint8)
        self.index_bytes[number] = index.nbytes
        self.signatures[number] = tuple(
            (tuple(sys.intern(name) for name in names), count) for names, count in index.signatures.items()
        )


def _joined(tables: list[_Rows]) -> _Rows:
    if len(tables) == 1:
        return tables[0]
    return _Rows(
        [url for table in tables for url in table.urls],
        np.concatenate([table.num_samples for table in tables]),
        np.concatenate([table.sizes for table in tables]),
        [tag for table in tables for tag in table.tags],
        np.concatenate([table.exact for table in tables]),
        np.concatenate([table.fingerprints for table in tables]),
        np.concatenate([table.index_bytes for table in tables]),
        [signatures for table in tables for signatures in table.signatures],
    )


def _known_rows(part: _Part, storage: Storage | None, fresh: bool) -> tuple[_Rows, bool]:
    """What manifests know of the part's shards, and whether a manifest knew exactly these."""
    if fresh:
        return _Rows.unknown(part.urls), False
    if part.stored is not None:
        rows, exact = part.stored, True
    elif part.folder is not None:
        rows, exact = _rows_of_folder(part.folder, part.urls)
    else:
        rows, exact = _rows_of_shards(part.urls, storage), True
    if len(rows.urls) <= _CHECKED:
        _forget_changed(rows)
    return rows, exact


def _rows_of_folder(folder: str, urls: list[str]) -> tuple[_Rows, bool]:
    place = _place(folder)
    stored = _local_manifest(place, folder)
    if stored is None:
        return _Rows.unknown(urls), False
    if len(stored.urls) == len(urls) and set(stored.urls) == set(urls):
        return stored, True
    known = set(stored.urls)
    num_new = sum(url not in known for url in urls)
    num_gone = len(known.difference(urls))
    logger.warning(
        "folder %s: %d shards are new and %d are gone since its manifest was made: it is made again",
        shown(folder),
        num_new,
        num_gone,
    )
    return _looked_up(stored, urls), False


def _rows_of_shards(urls: list[str], storage: Storage | None) -> _Rows:
    """What the manifests of the shards' folders know of them."""
    numbers: dict[str, list[int]] = {}
    for number, url in enumerate(urls):
        if is_remote(url):
            folder = "" if urlsplit(url).query else url.rpartition("/")[0]
        else:
            folder = str(Path(url).parent)
        numbers.setdefault(folder, []).append(number)
    tables = []
    for folder, here in numbers.items():
        stored = None
        if is_remote(folder):
            stored = _remote_manifest(f"{folder}/{MANIFEST_NAME}", storage or Storage())
        elif folder:
            stored = _local_manifest(_place(folder), folder)
        named = [urls[number] for number in here]
        tables.append(_Rows.unknown(named) if stored is None else _looked_up(stored, named))
    if len(tables) == 1:
        return tables[0]
    order = np.argsort(np.array([number for here in numbers.values() for number in here]))
    return _joined(tables).take(order.tolist())


def _looked_up(stored: _Rows, urls: list[str]) -> _Rows:
    places = {url: number for number, url in enumerate(stored.urls)}
    numbers = [places.get(url, -1) for url in urls]
    rows = stored.take(numbers)
    rows.urls = list(urls)
    rows.num_samples[[number < 0 for number in numbers]] = -1
    return rows


def _forget_changed(rows: _Rows) -> None:
    """Mark local shards as unknown that aren't as the manifest has them."""
    for number, url in enumerate(rows.urls):
        if rows.num_samples[number] >= 0 and not is_remote(url):
            try:
                status = os.stat(url)  # noqa: PTH116
                same = (status.st_size, str(status.st_mtime_ns)) == (rows.sizes[number], rows.tags[number])
            except OSError:
                same = False
            if not same:
                rows.num_samples[number] = -1


@dataclass
class _Filled:
    rows: _Rows
    faults: list[tuple[str, str, str]]
    salvaged: dict[str, Index]
    num_read: int  # rows that no manifest knew
    unkept: bool  # a sidecar couldn't be written


def _fill(rows: _Rows, storage: Storage | None, on_error: str) -> _Filled:
    """Learn from sidecars and shards what isn't known; leave out, or refuse, shards that can't be used."""
    unknown = np.flatnonzero(rows.num_samples < 0).tolist()
    if not unknown:
        return _Filled(rows, [], {}, 0, False)
    total = len(rows.urls)
    missing = [n for n in unknown if not is_remote(rows.urls[n]) and not os.path.isfile(rows.urls[n])]  # noqa: PTH113
    faults = {n: (rows.urls[n], "missing", "doesn't exist or isn't a file") for n in missing}
    if missing and on_error == "fail":
        raise DataError(missing_shards([rows.urls[n] for n in missing], total))
    notes = Notes()
    salvaged: dict[str, Index] = {}
    unkept = False
    todo = [n for n in unknown if n not in faults]

    def load(number: int) -> tuple[Index | None, str] | DataError:
        try:
            return load_index(rows.urls[number], storage=storage)
        except DataError as error:
            return error

    reasons: dict[int, str] = {}
    for number, found in _each(load, todo, rows):
        if isinstance(found, DataError):
            faults[number] = _fault(rows.urls[number], found)
        elif found[0] is None:
            reasons[number] = found[1]
        else:
            rows.set(number, found[0])
    if reasons:
        texts = [f"{shown(rows.urls[number])} ({reason})" for number, reason in reasons.items()]
        logger.warning("indexing %d of %d shards: %s", len(texts), total, some(texts, 3))

    def build(number: int) -> tuple[Index, str | None] | DataError:
        try:
            index = make_index(rows.urls[number], storage=storage, salvage=on_error == "substitute")
            return index, (keep_sidecar(index) if index.fault is None else None)
        except DataError as error:
            return error

    for number, made in _each(build, list(reasons), rows):
        url = rows.urls[number]
        if isinstance(made, DataError):
            faults[number] = _fault(url, made)
            continue
        index, not_kept = made
        rows.set(number, index)
        notes.add(index, not_kept)
        unkept = unkept or not_kept is not None
        if index.fault is not None:
            salvaged[url] = index
            faults[number] = (url, "truncated", f"{index.fault}; {len(index)} samples are left")
    notes.say()
    lost = [number for number in sorted(faults) if rows.urls[number] not in salvaged]
    if lost and (on_error == "fail" or len(lost) == total):
        raise _all_faults([faults[number][2] for number in lost], total)
    if lost:
        logger.warning(
            "%d of %d shards can't be used and are left out: %s",
            len(lost),
            total,
            some([f"{shown(faults[n][0])} ({faults[n][1]})" for n in lost], 3),
        )
        left_out = set(lost)
        rows = rows.take([number for number in range(total) if number not in left_out])
    return _Filled(rows, [faults[n] for n in sorted(faults)], salvaged, len(unknown), unkept)


def _fault(url: str, error: DataError) -> tuple[str, str, str]:
    return url, getattr(error, "cause", "unreadable"), str(error)


def _all_faults(messages: list[str], total: int) -> DataError:
    if len(messages) == 1:
        return DataError(messages[0])
    lines = "\n".join(f"  {message}" for message in messages[:MAX_LISTED])
    more = f"\n  and {len(messages) - MAX_LISTED} more" if len(messages) > MAX_LISTED else ""
    return DataError(f"{len(messages)} of {total} shards can't be used:\n{lines}{more}")


def _each(function: Callable[[int], Any], numbers: list[int], rows: _Rows) -> Iterator[tuple[int, Any]]:
    """(number, function(number)), with a progress bar if it takes long; threads where shards are remote."""
    from mmscale.data.jobs import Progress

    start = time.monotonic()
    progress: Progress | None = None
    pool = (
        ThreadPoolExecutor(_REMOTE_THREADS, thread_name_prefix="mmscale-index")
        if any(is_remote(rows.urls[number]) for number in numbers)
        else None
    )
    results = map(function, numbers) if pool is None else pool.map(function, numbers)
    try:
        for done, (number, result) in enumerate(zip(numbers, results, strict=True), start=1):
            if progress is None and time.monotonic() - start > _QUIET_S:
                progress = Progress(len(numbers), unit="shards")
            if progress is not None:
                progress.set(done)
            yield number, result
    finally:
        if progress is not None:
            progress.__exit__()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


def _stem(url: str) -> str:
    path = urlsplit(url).path if is_remote(url) else url
    return path.rpartition("/")[2].removesuffix(".tar")


def _base(folder: str) -> str:
    """What the names of a folder's shards begin with, as `pathlib` writes them."""
    if folder == ".":
        return ""
    return folder if folder.endswith("/") else f"{folder}/"


# --- the file ---


def _place(folder: str) -> Path:
    """The local file that keeps a folder's manifest; of a remote folder in the user's cache."""
    if not is_remote(folder):
        return Path(folder) / MANIFEST_NAME
    name = hashlib.blake2b(folder.encode(), digest_size=16).hexdigest()
    return cache_folder() / f"{name}.manifest"


def _keep(manifest: Manifest, folder: str, *, quiet: bool) -> None:
    place = _place(folder)
    try:
        if is_remote(folder):
            place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, _to_bytes(manifest._rows, _base(folder)))
    except OSError as error:
        if not quiet:  # that the folder can't be written was said of the indexes already
            logger.warning(
                "can't keep the manifest of folder %s (%s): the indexes are read at every start",
                shown(folder),
                error.strerror,
            )


def _local_manifest(place: Path, folder: str) -> _Rows | None:
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("manifest %s can't be read: %s", place, error.strerror)
        return None
    rows, reason = _from_bytes(data, _base(folder))
    if rows is None:
        logger.warning("manifest %s: %s", place, reason)
    return rows


def _remote_manifest(url: str, storage: Storage) -> _Rows | None:
    if is_signed(url):
        return None
    try:
        data = storage.read_all(url)
    except StorageError:
        return None
    rows, reason = _from_bytes(data, beside(url, ""))
    if rows is None:
        logger.warning("manifest %s: %s", shown(url), reason)
    return rows


def _to_bytes(rows: _Rows, base: str) -> bytes:
    groups = {signatures: number for number, signatures in enumerate(dict.fromkeys(rows.signatures))}
    names = [url.removeprefix(base) for url in rows.urls]
    arrays: list[tuple[str, Any]] = [
        ("num_samples", array("q", rows.num_samples.tolist())),
        ("sizes", array("q", rows.sizes.tolist())),
        ("index_bytes", array("q", rows.index_bytes.tolist())),
        ("groups", array("I", [groups[signatures] for signatures in rows.signatures])),
        ("fingerprints", array("B", rows.fingerprints.tobytes())),
        ("names", array("B", "\0".join(names).encode("utf-8", "surrogateescape"))),
        ("tags", array("B", "\0".join(rows.tags).encode())),
    ]
    header = {
        "num_shards": len(names),
        "num_samples": int(rows.num_samples.sum()),
        "remote": any(is_remote(url) for url in rows.urls),
        "signatures": [list(signatures) for signatures in groups],
        "arrays": [[name, values.typecode, len(values)] for name, values in arrays],
    }
    payload = json.dumps(header).encode() + b"\n" + b"".join(values.tobytes() for _, values in arrays)
    return with_checksum(_MAGIC, payload)


def _from_bytes(data: bytes, base: str) -> tuple[_Rows | None, str]:
    """The rows, or None and what is wrong; names are relative to `base`, which ends with a slash."""
    if not data.startswith(_MAGIC):
        known = data.startswith(b"mmscale-manifest ")
        return None, "it is of another version or machine" if known else "it is no manifest, or damaged"
    try:
        found = checked_payload(_MAGIC, data)
        if found is None:
            return None, "it is damaged"
        header, payload = found
        arrays: dict[str, memoryview] = {}
        at = 0
        for name, letter, length in header["arrays"]:
            end = at + length * struct.calcsize(letter)
            arrays[name] = payload[at:end]
            at = end
        names = str(arrays["names"], "utf-8", "surrogateescape").split("\0")
        tags = str(arrays["tags"], "utf-8").split("\0")
        groups: list[Signatures] = [
            tuple((tuple(sys.intern(name) for name in names), count) for names, count in signatures)
            for signatures in header["signatures"]
        ]
        remote = is_remote(base)
        return _Rows(
            urls=[name if _is_whole(name, remote) else base + name for name in names],
            num_samples=np.frombuffer(arrays["num_samples"], np.int64).copy(),
            sizes=np.frombuffer(arrays["sizes"], np.int64).copy(),
            tags=tags,
            exact=np.full(len(names), header["remote"] == remote),
            fingerprints=np.frombuffer(arrays["fingerprints"], np.uint8).reshape(-1, 16).copy(),
            index_bytes=np.frombuffer(arrays["index_bytes"], np.int64).copy(),
            signatures=[groups[number] for number in np.frombuffer(arrays["groups"], np.uint32).tolist()],
        ), ""
    except (ValueError, KeyError, TypeError, IndexError, struct.error):
        return None, "it is damaged"


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def _is_whole(name: str, remote: bool) -> bool:
    """Whether a name in a manifest stands for itself; one that came from the network can't name a local file."""
    return _SCHEME.match(name) is not None or (name.startswith("/") and not remote)
