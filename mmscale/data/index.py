"""The index of a shard: where in the tar every field of every sample lies.

A shard is an ordinary tar in WebDataset form: members that share their path up to the first dot of the base
name are one sample, and what follows that dot, lower-cased, names the field. `build_index` reads the tar's
headers once and writes a sidecar, `<shard>.index`; with it any sample is one seek away, so the order of
training is free and resuming costs nothing. On request it also holds lengths (pixels, seconds, characters,
tokens; see measure.py) and a hash of the whole shard.

    index = build_index("shards/000000.tar")
    index.key(17), index.record(17)       # 'cat_17', {'jpg': (offset, size), 'txt': (offset, size)}

As in webdataset, a sample's members follow each other, and a key that comes again is another sample. Where a
key comes again with other fields only, as in `tar cf x.tar *.jpg *.txt`, the shard is taken for interleaved:
webdataset would make two samples of each, here the members of a key are one sample, wherever they lie.

The trade-off: shards have to be uncompressed files that can be read at an offset, and a shard must not change
while it is in use (its size and tag are checked when it is opened).

The sidecar is one line of magic, a checksum, one line of JSON, then plain arrays: it loads in a fraction of
a millisecond, and a torn one is noticed and rebuilt. It holds nothing that can't be had from the shard again,
so it may be deleted at any time. The index of a remote shard is read from `<url>.index` if that is there;
else it is built by range requests and kept in ~/.cache/mmscale/indexes.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import stat as stat_module
import struct
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np

from mmscale.data.storage import File, Stat, Storage, StorageError, is_remote, shown
from mmscale.errors import DataError

if TYPE_CHECKING:
    from mmscale.data.measure import Measurer, Read

logger = logging.getLogger("mmscale.data")

_BLOCK = 512
_MAGIC = f"mmscale-index 2 {sys.byteorder}-endian\n".encode()
# The sidecar's arrays, in file order; each is stored in the smallest type (a letter of the struct module) that
# holds its values. After them come the columns, (num_samples,) float32 each.
_ARRAYS = (
    ("offsets", "IQ"),  # (num_members,) first byte of the body in the shard; members are in order of samples
    ("sizes", "IQ"),  # (num_members,) bytes of the body
    ("field_ids", "BH"),  # (num_members,) position in `fields`
    ("starts", "IQ"),  # (num_samples + 1,) first member of each sample
    ("key_starts", "IQ"),  # (num_samples + 1,) first byte of each key in `key_text`
    ("key_text", "B"),  # UTF-8
)
_LETTERS = frozenset("BHIQf")
_REGULAR = frozenset(b"0\x007")
# WebDataset's own rules (1.0): names without a field are no part of any sample, nor are `__meta__` entries.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_MAX_EXTENDED = 1 << 20  # bytes of a PAX header or a long name; real ones have some hundred
# What presigned URLs of S3, GCS, CloudFront and Azure add: it changes with every signing and is a secret.
_SIGNING = re.compile(
    r"^(x-amz-.*|x-goog-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|token|sig|s[eiprtv]"
    r"|spr|sks|skt|ske|skv|skoid|sktid)$",
    re.IGNORECASE,
)


class Index:
    """Keys, fields, offsets and sizes of one shard's samples, in the tar's order.

    `keys` and `fields` are as in the tar; `record(i)` gives the members of sample `i`. `fingerprint` (32 hex
    digits) covers every member's name, offset and size, but not the times in the headers: packing the same
    files again gives the same fingerprint, and so does moving or renaming the shard.

    url: the shard. size, tag: its bytes, and its time of change in ns (remote: etag) when it was indexed.
    signatures: {field names of a sample, sorted: how many samples have exactly these}.
    columns: {"jpg.width" and the like: (len,) float32}, NaN where a sample lacks the field or it can't be
        measured. measured: {measure: its version}. unmeasured: {column: bodies that couldn't be measured}.
    full_hash: BLAKE2b-256 of all bytes (64 hex digits, as `b2sum -l 256` prints), if it was asked for.
    interleaved: samples' members don't lie together, so that reading them takes several reads.
    fault: None, or what is wrong with a shard that was indexed with `salvage=True`.
    num_links: members named like a field that are links, which are no part of any sample.
    """

    def __init__(self, url: str, header: dict[str, Any], arrays: dict[str, memoryview]) -> None:
        self.url = url
        self.fields = tuple(header["fields"])
        self.size: int = header["size"]
        self.tag: str = header["tag"]
        self.is_remote: bool = header["remote"]
        self.fingerprint: str = header["fingerprint"]
        self.signatures: dict[tuple[str, ...], int] = {
            tuple(self.fields[number] for number in numbers): count for numbers, count in header["signatures"]
        }
        self.measured: dict[str, str] = header["measured"]
        self.unmeasured: dict[str, int] = header["unmeasured"]
        self.full_hash: str | None = header["full_hash"]
        self.interleaved: bool = header["interleaved"]
        self.num_links: int = header["num_links"]
        self.fault: str | None = header["fault"]
        self._header = header
        self._arrays = arrays
        # Views, not numpy arrays: looking up one element, as is done for each sample, costs a tenth.
        self._offsets = arrays["offsets"]
        self._sizes = arrays["sizes"]
        self._field_ids = arrays["field_ids"]
        self._starts = arrays["starts"]
        self._key_starts = arrays["key_starts"]
        self._key_text = arrays["key_text"]

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __repr__(self) -> str:
        return f"Index({shown(self.url)!r}, num_samples={len(self)}, fields={list(self.fields)})"

    @property
    def shard(self) -> Path:
        """The shard's path, if it is a local file."""
        return Path(self.url)

    @property
    def stat(self) -> Stat:
        """Size and tag of the shard when it was indexed: what `Storage.open` may expect."""
        return Stat(self.size, self.tag)

    @property
    def arrays(self) -> tuple[memoryview, memoryview, memoryview, memoryview]:
        """Each sample's first member (len + 1), and each member's offset, size, and number in `fields`."""
        return self._starts, self._offsets, self._sizes, self._field_ids

    @property
    def keys(self) -> list[str]:
        """All keys, as a new list; `key(i)` is cheaper for one."""
        return [self.key(sample) for sample in range(len(self))]

    def key(self, sample: int) -> str:
        start, end = self._key_starts[sample], self._key_starts[sample + 1]
        return str(self._key_text[start:end], "utf-8", "surrogateescape")

    def record(self, sample: int) -> dict[str, tuple[int, int]]:
        """`{field: (offset, size)}` of sample number `sample`, in bytes, in the tar's order."""
        fields, field_ids, offsets, sizes = self.fields, self._field_ids, self._offsets, self._sizes
        return {
            fields[field_ids[member]]: (offsets[member], sizes[member])
            for member in range(self._starts[sample], self._starts[sample + 1])
        }

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        return {
            name: np.array(self._arrays[f"column {name}"], np.float32) for name in self._header["columns"]
        }

    @property
    def num_bytes(self) -> np.ndarray:
        """(len,) int64: bytes of all bodies of each sample."""
        return np.add.reduceat(np.array(self._sizes, np.int64), np.array(self._starts, np.int64)[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the index holds, but for some hundred."""
        return sum(values.nbytes for values in self._arrays.values())


def carry_over(old: Index, new: Index) -> Index:
    """`new` with the hash, and the columns of measures, that it lacks and `old`, of the same shard, has."""
    if (old.size, old.tag, old.fingerprint) != (new.size, new.tag, new.fingerprint):
        return new
    from mmscale.data.measure import measure_of

    header, arrays = dict(new._header), dict(new._arrays)
    names = [name for name in old._header["columns"] if measure_of(name) not in new.measured]
    arrays.update((f"column {name}", old._arrays[f"column {name}"]) for name in names)
    header["columns"] = [*header["columns"], *names]
    header["measured"] = old.measured | new.measured
    header["unmeasured"] = {
        name: count for name, count in old.unmeasured.items() if name in names
    } | new.unmeasured
    header["full_hash"] = new.full_hash or old.full_hash
    return Index(new.url, header, arrays)


def sidecar_path(shard: str | Path) -> Path:
    """Where the index of a local `shard` is kept: beside it, with `.index` added to the name."""
    shard = Path(shard)
    return shard.with_name(shard.name + ".index")


def build_index(
    shard: str | Path,
    *,
    measure: Collection[str] = (),
    tokenizer: str | Path | None = None,
    full_hash: bool = False,
    storage: Storage | None = None,
    salvage: bool = False,
) -> Index:
    """Index a tar shard, local or remote, write the sidecar and return the index.

    Reads headers only (USTAR, PAX and GNU long names), and of a remote shard the bodies between them where
    that takes fewer requests. `measure` adds columns: "image" (FIELD.width, FIELD.height in pixels), "audio"
    (FIELD.seconds), "text" (FIELD.chars; with a `tokenizer` file FIELD.tokens). `full_hash` reads every byte.
    The sidecar is written whole or not at all, so several processes may do this at once. Where the folder
    can't be written the index is still returned, with a warning.

    salvage: of a shard that is cut, index the samples that are complete; `Index.fault` says what is wrong, and
    no sidecar is written. The last sample before the cut is left out unless the cut is inside another one;
    of an interleaved shard all samples are left out that lack any field.

    Raises DataError, naming the shard and the byte where it can, if the file is missing, empty, compressed,
    no tar, cut short (inside a member, or before the end-of-archive marker), followed by further data,
    without samples, or has the same field twice in one sample.
    """
    index = make_index(
        local_or_remote(shard),
        measurer=_measurer(measure, tokenizer),
        full_hash=full_hash,
        storage=storage,
        salvage=salvage,
    )
    notes = Notes()
    notes.add(index, keep_sidecar(index) if index.fault is None else None)
    notes.say()
    return index


def read_index(shard: str | Path, *, storage: Storage | None = None) -> Index:
    """The index of `shard` from its sidecar, built first (saying so) if that is missing, damaged or outdated.

    Raises DataError like `build_index`.
    """
    return read_indexes([shard], storage=storage)[0]


def read_indexes(shards: Iterable[str | Path], *, storage: Storage | None = None) -> list[Index]:
    """`read_index` for many shards, with one warning for all the sidecars that had to be built.

    Raises DataError naming *all* missing shards, before any is indexed.
    """
    urls = [local_or_remote(shard) for shard in shards]
    missing = [url for url in urls if not is_remote(url) and not Path(url).is_file()]
    if missing:
        raise DataError(missing_shards(missing, len(urls)))
    indexes: list[Index | None] = []
    reasons: list[str] = []
    for url in urls:
        index, reason = load_index(url, storage=storage)
        indexes.append(index)
        if index is None:
            reasons.append(f"{shown(url)} ({reason})")
    if reasons:
        logger.warning("indexing %d of %d shards: %s", len(reasons), len(urls), some(reasons, 3))
    notes = Notes()
    made: list[Index] = []
    for url, index in zip(urls, indexes, strict=True):
        if index is None:
            index = make_index(url, storage=storage)
            notes.add(index, keep_sidecar(index))
        made.append(index)
    notes.say()
    return made


def missing_shards(missing: list[str], total: int) -> str:
    return f"{len(missing)} of {total} shards don't exist or aren't files: {some(missing, 100)}"


def some(items: list[str], limit: int) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


class Notes:
    """What is worth saying about indexes that were just made, one warning a kind for any number of them."""

    def __init__(self) -> None:
        self._found: dict[str, list[str]] = {}
        self._unmeasured: Counter[str] = Counter()
        self._remote_kept = 0

    def merge(self, other: "Notes") -> None:
        for text, names in other._found.items():
            self._found.setdefault(text, []).extend(names)
        self._unmeasured.update(other._unmeasured)
        self._remote_kept += other._remote_kept

    def add(self, index: Index, not_kept: str | None) -> None:
        """`not_kept`: why the sidecar can't be kept, if it can't."""
        name = shown(index.url)
        if not_kept is not None:
            text = "can't keep the index of shard %s: it is built again at every start"
            self._found.setdefault(text, []).append(f"{name} ({not_kept})")
        elif index.is_remote and index.fault is None:
            self._remote_kept += 1
        if index.interleaved:
            text = (
                "interleaved shard %s: the members of a sample don't lie together (webdataset would make several "
                "samples of them); they are joined by key, but reading them is slower: repack"
            )
            self._found.setdefault(text, []).append(name)
        if index.num_links:
            text = "links are no part of any sample (GNU tar's --hard-dereference stores files): shard %s"
            self._found.setdefault(text, []).append(f"{name} ({index.num_links})")
        if index.fault is not None:
            text = "a cut shard was salvaged, its complete samples are used: %s"
            self._found.setdefault(text, []).append(f"{index.fault}; {len(index)} samples are left")
        self._unmeasured.update(index.unmeasured)

    def say(self) -> None:
        for text, names in self._found.items():
            logger.warning(text, some(names, 3))
        if self._remote_kept:
            logger.warning("indexes of %d remote shards are kept in %s", self._remote_kept, cache_folder())
        if self._unmeasured:
            counts = ", ".join(f"{count} x {name}" for name, count in sorted(self._unmeasured.items()))
            logger.warning("bodies that can't be measured: %s (NaN in the index)", counts)


# --- names of shards ---


def local_or_remote(shard: str | Path) -> str:
    text = os.fspath(shard)
    if text.startswith("file://"):
        from urllib.request import url2pathname

        return url2pathname(urlsplit(text).path)
    return text


def beside(url: str, name: str) -> str:
    """The remote file `name` in the folder of `url`, with its query: `beside(url, "shards.manifest")`."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/" + name))


def is_signed(url: str) -> bool:
    """Whether `url` is signed, so that its query is good for this one file alone."""
    return any(_SIGNING.match(name) for name, _ in parse_qsl(urlsplit(url).query, keep_blank_values=True))


def cached_sidecar_path(url: str, stat: Stat) -> Path:
    """Where the index of a remote shard is kept: named by a hash of its URL, without a signature, and its tag."""
    parts = urlsplit(url)
    query = [item for item in parse_qsl(parts.query, keep_blank_values=True) if not _SIGNING.match(item[0])]
    plain = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, urlencode(query), ""))
    name = hashlib.blake2b(f"{plain}\0{stat.size}\0{stat.tag}".encode(), digest_size=16).hexdigest()
    return cache_folder() / f"{name}.index"


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mmscale" / "indexes"


# --- making an index ---


class IndexBuilder:
    """Makes the index of a shard while it is written, without reading it again.

        builder = IndexBuilder("shards/000000.tar")
        builder.add("cat.jpg", 512, len(jpg), jpg)      # each member: its name, where its body begins, its bytes
        index = builder.finish()                        # once the shard lies under its name; writes the sidecar

    Bodies are needed to measure them only (`measurer`).
    """

    def __init__(self, shard: str | Path, *, measurer: "Measurer | None" = None) -> None:
        self.url = local_or_remote(shard)
        self._measurer = measurer
        self._fields: dict[str, int] = {}
        self._names: list[bytes] = []  # each member's, as in the tar; the others likewise
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._field_ids: list[int] = []
        self._keys: list[str] = []  # of each run of members with one key; a run is a sample as a rule
        self._starts: list[int] = []  # first member of each run
        self._seen: set[str] = set()  # fields of the run under way
        self._values: dict[str, list[tuple[int, float]]] = {}  # column: (member, value)
        self.num_links = 0

    def add(self, name: str, offset: int, size: int, body: bytes | None = None) -> None:
        """Take note of a member; one whose name isn't KEY.FIELD is no part of any sample.

        Raises DataError for a field that its sample has already.
        """
        if body is None:
            self._add(name, offset, size, None)
        else:
            self._add(name, offset, size, lambda at, count: body[at : at + count])

    def _add(self, name: str, offset: int, size: int, read: "Read | None") -> None:
        match = _NAME.match(name)
        if match is None or _META.match(name):
            return
        key, field = match[1], match[2].lower()
        if not self._keys or key != self._keys[-1]:
            self._keys.append(key)
            self._starts.append(len(self._offsets))
            self._seen = set()
        if field in self._seen:
            raise DataError(
                f"shard {shown(self.url)}, key {key}: field {field} appears twice (byte {offset})"
            )
        self._seen.add(field)
        if self._measurer is not None and read is not None:
            for suffix, value in self._measurer.measure(field, size, read).items():
                self._values.setdefault(f"{field}.{suffix}", []).append((len(self._offsets), value))
        self._names.append(name.encode("utf-8", "surrogateescape"))
        self._offsets.append(offset)
        self._sizes.append(size)
        self._field_ids.append(self._fields.setdefault(field, len(self._fields)))

    def finish(self, stat: Stat | None = None, *, full_hash: str | None = None) -> Index:
        """The index; writes the sidecar, with a warning if that can't be.

        stat: size and tag of the complete shard, by default those of the local file.
        """
        if stat is None:
            status = os.stat(self.url)  # noqa: PTH116
            size, tag = status.st_size, str(status.st_mtime_ns)
        else:
            size, tag = stat.size, stat.tag
        index = self.make(size, tag, full_hash=full_hash)
        notes = Notes()
        notes.add(index, keep_sidecar(index))
        notes.say()
        return index

    def make(
        self, size: int, tag: str, *, full_hash: str | None = None, cut: "_CutError | None" = None
    ) -> Index:
        """The index alone. cut: how the shard was found to be cut; samples that may lack members are left out."""
        keys, starts, members, interleaved = self._samples()
        if cut is not None:
            keys, starts, members = self._complete(keys, starts, members, interleaved, cut)
        if not keys:
            left = f" is whole before the cut ({cut})" if cut is not None else ""
            raise _EmptyError(
                f"shard {shown(self.url)}: "
                + (f"no sample{left}" if left else "holds no samples (no member is named KEY.FIELD)")
            )
        if len(self._fields) > 0xFFFF:
            raise DataError(
                f"shard {shown(self.url)}: has {len(self._fields)} different fields, at most 65,535 can be indexed"
            )
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        values: dict[str, Any] = {
            "offsets": [self._offsets[member] for member in members],
            "sizes": [self._sizes[member] for member in members],
            "field_ids": [self._field_ids[member] for member in members],
            "starts": starts,
            "key_starts": list(itertools.accumulate(map(len, encoded), initial=0)),
            "key_text": b"".join(encoded),
        }
        arrays = {name: _packed(values[name], letters) for name, letters in _ARRAYS}
        field_ids = values["field_ids"]
        names = list(self._fields)
        signatures = Counter(
            tuple(sorted(field_ids[start:end], key=names.__getitem__))
            for start, end in itertools.pairwise(starts)
        )
        # Of the members in the tar's order, whatever samples they form.
        digest = hashlib.blake2b(digest_size=16)
        for member in sorted(members) if interleaved else members:
            name = self._names[member]
            digest.update(b"%d %d %d " % (len(name), self._offsets[member], self._sizes[member]))
            digest.update(name)
        columns, unmeasured = self._columns(starts, members)
        arrays.update((f"column {name}", memoryview(array("f", column))) for name, column in columns.items())
        header = {
            "size": size,
            "tag": tag,
            "remote": is_remote(self.url),
            "fingerprint": digest.hexdigest(),
            "fields": names,
            "signatures": [[list(numbers), count] for numbers, count in signatures.items()],
            "columns": list(columns),
            "measured": {} if self._measurer is None else self._measurer.versions,
            "unmeasured": unmeasured,
            "full_hash": full_hash,
            "interleaved": interleaved,
            "num_links": self.num_links,
            "fault": None if cut is None else str(cut),
        }
        return Index(self.url, header, arrays)

    def _samples(self) -> tuple[list[str], list[int], Collection[int], bool]:
        """(keys, starts in members, members by sample, whether keys were joined)."""
        starts = [*self._starts, len(self._offsets)]
        members = range(len(self._offsets))
        if len(set(self._keys)) == len(self._keys):
            return self._keys, starts, members, False
        fields_of_key: dict[str, set[int]] = {}
        interleaved = False
        for key, (start, end) in zip(self._keys, itertools.pairwise(starts), strict=True):
            fields = set(self._field_ids[start:end])
            known = fields_of_key.setdefault(key, set())
            interleaved = interleaved or bool(known and known.isdisjoint(fields))
            known |= fields
        if not interleaved:  # samples that come again whole, as webdataset sees them too
            return self._keys, starts, members, False
        members_of_key: dict[str, list[int]] = {}
        for key, (start, end) in zip(self._keys, itertools.pairwise(starts), strict=True):
            members_of_key.setdefault(key, []).extend(range(start, end))
        names = list(self._fields)
        for key, joined in members_of_key.items():
            seen: set[int] = set()
            for member in joined:
                if self._field_ids[member] in seen:
                    raise DataError(
                        f"shard {shown(self.url)}, key {key}: field {names[self._field_ids[member]]} appears twice "
                        f"(byte {self._offsets[member]})"
                    )
                seen.add(self._field_ids[member])
        starts = list(itertools.accumulate(map(len, members_of_key.values()), initial=0))
        return list(members_of_key), starts, list(itertools.chain(*members_of_key.values())), True

    def _complete(
        self,
        keys: list[str],
        starts: list[int],
        members: Collection[int],
        interleaved: bool,
        cut: "_CutError",
    ) -> tuple[list[str], list[int], list[int]]:
        """What `_samples` gave, without the samples that may lack a member behind the cut."""
        listed = list(members)
        match = _NAME.match(cut.member) if cut.member is not None else None
        kept: list[int] = []
        for number, key in enumerate(keys):
            if interleaved:
                whole = starts[number + 1] - starts[number] == len(self._fields)
            else:  # the member that was cut says whether the sample before it was at its end
                whole = number < len(keys) - 1 or (match is not None and match[1] != key)
            if whole:
                kept.append(number)
        runs = [listed[starts[number] : starts[number + 1]] for number in kept]
        return (
            [keys[number] for number in kept],
            list(itertools.accumulate(map(len, runs), initial=0)),
            list(itertools.chain(*runs)),
        )

    def _columns(
        self, starts: list[int], members: Collection[int]
    ) -> tuple[dict[str, np.ndarray], dict[str, int]]:
        if not self._values:
            return {}, {}
        sample_of_member = np.full(len(self._offsets), -1, np.int64)
        ends = np.array(starts, np.int64)
        counts = ends[1:] - ends[:-1]
        sample_of_member[np.array(members, np.int64)] = np.repeat(
            np.arange(len(counts), dtype=np.int64), counts
        )
        columns = {}
        unmeasured = {}
        for name, pairs in sorted(self._values.items()):
            samples = sample_of_member[[member for member, _ in pairs]]
            values = np.array([value for _, value in pairs], np.float32)
            values, samples = values[samples >= 0], samples[samples >= 0]
            columns[name] = np.full(len(counts), np.nan, np.float32)
            columns[name][samples] = values
            if failed := int(np.isnan(values).sum()):
                unmeasured[name] = failed
        return columns, unmeasured


def _packed(values: Any, letters: str) -> memoryview:
    if isinstance(values, bytes):
        return memoryview(values)
    largest = max(values)
    letter = next(letter for letter in letters if largest < 1 << (8 * struct.calcsize(letter)))
    return memoryview(array(letter, values))


def _measurer(measure: Collection[str], tokenizer: str | Path | None) -> "Measurer | None":
    if not measure and tokenizer is None:
        return None
    from mmscale.data.measure import Measurer

    return Measurer(measure, tokenizer=tokenizer)


def make_index(
    url: str,
    *,
    measurer: "Measurer | None" = None,
    full_hash: bool = False,
    storage: Storage | None = None,
    salvage: bool = False,
) -> Index:
    """`build_index` without the sidecar and without a word."""
    if is_remote(url):
        storage = storage or Storage()
        stat = storage.stat(url)
        file = storage.open(url, stat)
        try:
            return _scan(url, _RemoteReader(file, stat.size), stat.tag, measurer, full_hash, salvage)
        finally:
            file.close()
    try:
        status = os.stat(url)  # noqa: PTH116
        if not stat_module.S_ISREG(status.st_mode):  # before it is opened: opening a pipe waits for a writer
            raise DataError(f"shard {url}: not a regular file, so it can't be read at an offset")
        fd = os.open(url, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise _MissingError(f"shard {url}: no such file") from None
    except OSError as error:
        raise DataError(f"shard {url}: can't be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        reader = _LocalReader(fd, status.st_size)
        return _scan(url, reader, str(status.st_mtime_ns), measurer, full_hash, salvage)
    except OSError as error:
        raise DataError(f"shard {url}: can't be read: {error.strerror}") from error
    finally:
        os.close(fd)


# --- reading the tar ---


class _ShardError(DataError):
    """A shard can't be used; `cause`: why, in words to count by. Set after construction, so that it pickles."""

    cause = "unreadable"


class _CutError(_ShardError):
    """The tar ends before its end. `member`: the name of the member that was cut, if its header is there."""

    cause = "truncated"
    member: str | None = None


class _EmptyError(_ShardError):
    cause = "no samples"


class _MissingError(_ShardError):
    cause = "missing"


class _Reader(Protocol):
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """The bytes there, fewer at the end of the shard."""


class _LocalReader:
    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        while len(data) < size and (more := os.pread(self._fd, size - len(data), offset + len(data))):
            data += more  # a system call may return less than asked for
        return data


class _RemoteReader:
    """Reads ahead so much that a shard of small samples takes few requests, one of large ones few bytes.

    A request costs about as much time as a megabyte. Where the next header lies less than that behind what
    was read, the next request asks for twice as much, up to 8 MiB; where it lies farther, for 16 KiB: a
    header and the small members that may follow it.
    """

    _LARGEST, _FIRST, _LEAST, _NEAR = 8 << 20, 256 << 10, 16 << 10, 1 << 20

    def __init__(self, file: File, size: int) -> None:
        self._file = file
        self.size = size
        self._ahead = self._FIRST
        self._at = 0
        self._data = b""

    def read(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self.size - offset))
        end = self._at + len(self._data)
        if not (self._at <= offset and offset + size <= end):
            if self._data:
                near = 0 <= offset - end < self._NEAR or self._at <= offset < end
                self._ahead = min(2 * self._ahead, self._LARGEST) if near else self._LEAST
            self._data = self._file.read(offset, min(max(size, self._ahead), self.size - offset))
            self._at = offset
        return self._data[offset - self._at : offset - self._at + size]


def _scan(
    url: str, reader: _Reader, tag: str, measurer: "Measurer | None", full_hash: bool, salvage: bool
) -> Index:
    builder = IndexBuilder(url, measurer=measurer)
    cut: _CutError | None = None
    try:
        for name, offset, size in _members(url, reader, builder):

            def read(at: int, count: int, offset: int = offset) -> bytes:
                return reader.read(offset + at, count)

            builder._add(name, offset, size, read)
    except _CutError as error:
        if not salvage:
            raise
        cut = error
    digest = None
    if full_hash:
        whole = hashlib.blake2b(digest_size=32)
        for at in range(0, reader.size, 8 << 20):
            whole.update(reader.read(at, 8 << 20))
        digest = whole.hexdigest()
    return builder.make(reader.size, tag, full_hash=digest, cut=cut)


def _members(url: str, reader: _Reader, builder: IndexBuilder) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular member; checks the tar's structure on the way.

    Format: POSIX.1-2017 pax (`ustar`, extended headers), GNU tar manual (`L` entries, base-256 numbers).
    """
    shard = shown(url)
    shard_size = reader.size
    position = 0
    long_name: str | None = None  # from a GNU `L` entry, for the next member
    extended: dict[str, str] = {}  # from a PAX `x` entry, for the next member

    def truncated(what: str, member: str | None = None) -> NoReturn:
        error = _CutError(f"shard {shard}: truncated: {what} (the file ends at byte {shard_size})")
        error.member = member
        raise error

    def damaged() -> NoReturn:
        raise DataError(f"shard {shard}: damaged: no valid header at byte {position}")

    while True:
        header = reader.read(position, _BLOCK)
        if not header and position == 0:
            raise _EmptyError(f"shard {shard}: the file is empty")
        if len(header) < _BLOCK:
            if position == 0:
                raise DataError(f"shard {shard}: not a tar: it has {shard_size} bytes, a header needs 512")
            truncated(
                f"no end-of-archive marker at byte {position}"
                if not header
                else f"inside the header at byte {position}"
            )
        if header.count(0) == _BLOCK:
            break
        if not _checksum_matches(header):
            if position == 0:
                kind = next((name for magic, name in _COMPRESSED.items() if header.startswith(magic)), None)
                hint = f"it is compressed with {kind}: unpack it, shards are read at offsets" if kind else ""
                raise DataError(f"shard {shard}: not a tar: {hint or 'byte 0 starts no tar header'}")
            damaged()
        kind_byte = header[156]
        try:
            size = int(extended["size"]) if "size" in extended else _number(header[124:136])
        except ValueError:
            damaged()
        if size < 0:
            damaged()
        body = position + _BLOCK
        if kind_byte in b"xL" and size > _MAX_EXTENDED:
            raise DataError(f"shard {shard}: damaged: bad extended header at byte {position}")
        if kind_byte in b"123456":
            size = 0  # links, devices, folders have no body, whatever their header says
        if body + size > shard_size:
            name = extended.get("path") or long_name or _header_name(header)
            truncated(
                f"member {name} at byte {position} needs {size} bytes of data, {shard_size - body} are left",
                name if kind_byte in _REGULAR else None,
            )
        if kind_byte == ord("x"):
            extended = _pax(shard, reader.read(body, size), position)
        elif kind_byte == ord("L"):
            long_name = reader.read(body, size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind_byte in b"gK":  # global defaults and long link targets: nothing that matters here
            pass
        else:
            name = extended.get("path") or long_name or _header_name(header)
            if kind_byte == ord("S") or any(keyword.startswith("GNU.sparse.") for keyword in extended):
                raise DataError(
                    f"shard {shard}: member {name} at byte {position} is stored sparse: repack it"
                )
            if kind_byte in _REGULAR and not name.endswith("/"):
                yield name, body, size
            elif kind_byte in b"12" and _NAME.match(name) and not _META.match(name):
                builder.num_links += 1
            long_name, extended = None, {}
        position = body + -(-size // _BLOCK) * _BLOCK
    if position == 0:
        raise _EmptyError(f"shard {shard}: the tar is empty")
    _check_tail(shard, reader, position)


def _check_tail(shard: str, reader: _Reader, position: int) -> None:
    """Only padding may follow the end of the archive: readers of tars would silently ignore anything else."""
    while position < reader.size:
        chunk = reader.read(position, 1 << 20)
        if not chunk:
            return
        if chunk.count(0) != len(chunk):
            at = position + len(chunk) - len(chunk.lstrip(b"\0"))
            raise DataError(
                f"shard {shard}: data at byte {at}, after the end of the archive (several tars joined?)"
            )
        position += len(chunk)


def _checksum_matches(header: bytes) -> bool:
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    unsigned = sum(header) - sum(header[148:156]) + 8 * 0x20
    if stored == unsigned:
        return True
    # Some old tars summed signed bytes.
    return stored == unsigned - 256 * sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes) -> int:
    """A number of a tar header: octal text, or base-256 if the top bit is set (GNU, for 8 GiB and more)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _header_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":  # GNU's own format keeps times where POSIX keeps the prefix
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _pax(shard: str, body: bytes, position: int) -> dict[str, str]:
    """The records of a PAX extended header: `LENGTH KEYWORD=VALUE\\n`, LENGTH counting the whole record."""
    records: dict[str, str] = {}
    at = 0
    try:
        while at < len(body) and body[at]:
            space = body.index(b" ", at)
            length = int(body[at:space])
            keyword, _, value = body[space + 1 : at + length - 1].partition(b"=")
            if length <= 0 or body[at + length - 1 : at + length] != b"\n":
                raise ValueError
            records[keyword.decode()] = value.decode("utf-8", "surrogateescape")
            at += length
        int(records.get("size", "0"))
    except ValueError:
        raise DataError(f"shard {shard}: damaged: bad extended header at byte {position}") from None
    return records


# --- the sidecar ---


def keep_sidecar(index: Index) -> str | None:
    """Write the sidecar; None, or why that can't be done."""
    if index.is_remote:
        path = cached_sidecar_path(index.url, Stat(index.size, index.tag))
    else:
        path = sidecar_path(index.url)
    try:
        if index.is_remote:
            path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, _to_bytes(index))
    except OSError as error:
        return error.strerror or str(error)
    return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears under its name with all its bytes on the disk, or not at all."""
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _to_bytes(index: Index) -> bytes:
    layout = [[name, values.format, len(values)] for name, values in index._arrays.items()]
    header = json.dumps({**index._header, "arrays": layout}).encode() + b"\n"
    return with_checksum(_MAGIC, header + b"".join(values.tobytes() for values in index._arrays.values()))


def with_checksum(magic: bytes, payload: bytes) -> bytes:
    return magic + hashlib.blake2b(payload, digest_size=16).hexdigest().encode() + b"\n" + payload


def checked_payload(magic: bytes, data: bytes) -> tuple[dict[str, Any], memoryview] | None:
    """(the JSON line, all that follows it) of what `with_checksum` gave; None if it is damaged."""
    start = len(magic) + 33
    payload = memoryview(data)[start:]
    stored = data[len(magic) : start - 1]
    if hashlib.blake2b(payload, digest_size=16).hexdigest().encode() != stored:
        return None
    end = data.find(b"\n", start) + 1
    return (json.loads(data[start:end]), memoryview(data)[end:]) if end else None


def _from_bytes(url: str, data: bytes) -> tuple[Index | None, str]:
    if not data.startswith(_MAGIC):
        version = data[:32].split(b" ")[:2]
        if version[0] == b"mmscale-index" and version[1:] != [b"2"]:
            return None, "its index is of another version"
        return None, "its index is damaged or of another machine"
    try:
        found = checked_payload(_MAGIC, data)
        if found is None:
            return None, "its index is damaged"
        header, payload = found
        arrays = {}
        at = 0
        for name, letter, length in header["arrays"]:
            if letter not in _LETTERS:
                return None, "its index is damaged"
            end = at + length * struct.calcsize(letter)
            arrays[name] = payload[at:end].cast(letter)
            at = end
        return Index(url, header, arrays), ""
    except (ValueError, KeyError, TypeError, IndexError):
        return None, "its index is damaged"


def load_index(
    url: str, *, stat: Stat | None = None, storage: Storage | None = None
) -> tuple[Index | None, str]:
    """The index from its sidecar, or None and the reason why it has to be built.

    stat: what the shard's size and tag are known to be, else they are looked up. A sidecar beside a remote
    shard that was made where the shard was a local file is compared by size only, and takes the shard's tag.
    """
    if is_remote(url):
        return _load_remote(url, stat, storage)
    try:
        data = sidecar_path(url).read_bytes()
    except FileNotFoundError:
        return None, "no index yet"
    except OSError as error:
        return None, f"its index can't be read: {error.strerror}"
    index, reason = _from_bytes(url, data)
    if index is None:
        return None, reason
    if stat is None:
        try:
            status = os.stat(url)  # noqa: PTH116
        except OSError as error:
            return None, f"the shard can't be read: {error.strerror}"
        size, tag = status.st_size, str(status.st_mtime_ns)
    else:
        size, tag = stat.size, stat.tag
    if (index.size, index.tag) != (size, tag) or index.is_remote:
        return None, "the shard changed since it was indexed"
    return index, ""


def _load_remote(url: str, stat: Stat | None, storage: Storage | None) -> tuple[Index | None, str]:
    storage = storage or Storage()
    if stat is None:
        stat = storage.stat(url)
    candidates: list[bytes] = []
    with contextlib.suppress(OSError):
        candidates.append(cached_sidecar_path(url, stat).read_bytes())
    reason = "no index yet"
    for fetch in (False, True):
        if fetch:
            if is_signed(url):
                break
            try:
                candidates = [storage.read_all(beside(url, urlsplit(url).path.rpartition("/")[2] + ".index"))]
            except StorageError:
                break
        for data in candidates:
            index, reason = _from_bytes(url, data)
            if index is None:
                continue
            if index.size != stat.size or (index.is_remote and index.tag != stat.tag):
                reason = "the shard changed since it was indexed"
                continue
            index.tag, index.is_remote = stat.tag, True
            return index, ""
    return None, reason
