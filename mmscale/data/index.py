"""The index of a shard: where in the tar every field of every sample lies.

A shard is an ordinary tar in WebDataset form: members that follow each other and share their path up to the
first dot of the base name are one sample, and what follows that dot, lower-cased, names the field.
`build_index` reads the tar's headers once (never the bodies) and writes a sidecar, `<shard>.index`; with it
any sample is one seek away, so the order of training is free and resuming costs nothing.

    index = build_index("shards/000000.tar")
    index.keys[17], index.record(17)      # 'cat_17', {'jpg': (offset, size), 'txt': (offset, size)}

The trade-off: shards have to be uncompressed files that can be read at an offset, and a shard must not change
while it is in use (its size and time of change are checked when it is opened).

The sidecar is one line of magic, one line of JSON, then plain arrays, covered by a checksum: it
loads in a fraction of a millisecond and a torn one is noticed and rebuilt. It holds nothing that can't be had
from the shard again, so it may be deleted at any time.
"""

import hashlib
import itertools
import json
import logging
import os
import re
import struct
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from mmscale.errors import DataError

logger = logging.getLogger("mmscale.data")

_BLOCK = 512
_MAGIC = f"mmscale-index 1 {sys.byteorder}-endian\n".encode()
# Name and type (a letter of the struct module) of the sidecar's arrays, in file order.
_ARRAYS: tuple[tuple[str, Literal["q", "H", "B"]], ...] = (
    ("offsets", "q"),  # (num_members,) first byte of the body in the shard
    ("sizes", "q"),  # (num_members,) bytes of the body
    ("field_ids", "H"),  # (num_members,) position in `fields`
    ("starts", "q"),  # (num_samples + 1,) first member of each sample
    ("key_starts", "q"),  # (num_samples + 1,) first byte of each key in `key_text`
    ("key_text", "B"),  # UTF-8
)
_REGULAR = frozenset(b"0\x007")
# WebDataset's own rules (1.0): names without a field are no part of any sample, nor are `__meta__` entries.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Index:
    """Keys, fields, offsets and sizes of one shard's samples, in the tar's order.

    `keys` and `fields` are as in the tar; `record(i)` gives the members of sample `i`. `fingerprint` (32 hex
    digits) covers every member's name, offset and size, but not the times in the headers: packing the same
    files again gives the same fingerprint, and so does moving or renaming the shard.
    """

    def __init__(
        self,
        shard: Path,
        arrays: dict[str, memoryview],
        *,
        fields: tuple[str, ...],
        shard_size: int,
        shard_mtime_ns: int,
        fingerprint: str,
    ) -> None:
        self.shard = shard
        self.fields = fields
        self.shard_size = shard_size
        self.shard_mtime_ns = shard_mtime_ns
        self.fingerprint = fingerprint
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
        return f"Index({str(self.shard)!r}, num_samples={len(self)}, fields={list(self.fields)})"

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

    @property
    def num_bytes(self) -> np.ndarray:
        """(len,) int64: bytes of all bodies of each sample."""
        return np.add.reduceat(np.array(self._sizes), np.array(self._starts)[:-1])


def sidecar_path(shard: str | Path) -> Path:
    """Where the index of `shard` is kept: beside it, with `.index` added to the name."""
    shard = Path(shard)
    return shard.with_name(shard.name + ".index")


def build_index(shard: str | Path) -> Index:
    """Index a tar shard, write the sidecar `<shard>.index` and return the index.

    Reads headers only (USTAR, PAX and GNU long names). The sidecar is written whole or not at all, so several
    processes may do this at once. Where the folder can't be written the index is still returned, with a
    warning.

    Raises DataError, naming the shard and the byte where it can, if the file is missing, empty, compressed,
    no tar, cut short (inside a member, or before the end-of-archive marker), followed by further data,
    without samples, or has the same field twice in one sample.
    """
    shard = Path(shard)
    index = _scan(shard)
    try:
        _write_sidecar(index)
    except OSError as error:
        logger.warning(
            "can't keep the index of shard %s (%s): it is built again at every start", shard, error.strerror
        )
    return index


def read_index(shard: str | Path) -> Index:
    """The index of `shard` from its sidecar, built first (saying so) if that is missing, damaged or outdated.

    Raises DataError like `build_index`.
    """
    return read_indexes([shard])[0]


def read_indexes(shards: Iterable[str | Path]) -> list[Index]:
    """`read_index` for many shards, with one warning for all the sidecars that had to be built.

    Raises DataError naming *all* missing shards, before any is indexed.
    """
    paths = [Path(shard) for shard in shards]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards don't exist or aren't files: {_some(missing, 100)}"
        )
    indexes: list[Index | None] = []
    reasons: list[str] = []
    for path in paths:
        index, reason = _read_sidecar(path)
        indexes.append(index)
        if index is None:
            reasons.append(f"{path} ({reason})")
    if reasons:
        logger.warning("indexing %d of %d shards: %s", len(reasons), len(paths), _some(reasons, 3))
    return [index or build_index(path) for index, path in zip(indexes, paths, strict=True)]


def _some(items: list[str], limit: int) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


# --- reading the tar ---


def _scan(shard: Path) -> Index:
    try:
        fd = os.open(shard, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(f"shard {shard}: no such file") from None
    except OSError as error:
        raise DataError(f"shard {shard}: can't be opened: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not os.path.isfile(shard):  # noqa: PTH113 (a Path would be built for one call)
            raise DataError(f"shard {shard}: not a regular file, so it can't be read at an offset")
        return _group(shard, status, _members(shard, fd, status.st_size))
    except OSError as error:
        raise DataError(f"shard {shard}: can't be read: {error.strerror}") from error
    finally:
        os.close(fd)


def _group(shard: Path, status: os.stat_result, members: Iterator[tuple[str, int, int]]) -> Index:
    fields: dict[str, int] = {}
    offsets: list[int] = []
    sizes: list[int] = []
    field_ids: list[int] = []
    starts: list[int] = []
    keys: list[bytes] = []
    digest = hashlib.blake2b(digest_size=16)
    current: str | None = None
    seen: set[str] = set()
    for name, offset, size in members:
        match = _NAME.match(name)
        if match is None or _META.match(name):
            continue
        key, field = match[1], match[2].lower()
        encoded = name.encode("utf-8", "surrogateescape")
        digest.update(b"%d %d %d " % (len(encoded), offset, size))
        digest.update(encoded)
        if key != current:
            current, seen = key, set()
            starts.append(len(offsets))
            keys.append(key.encode("utf-8", "surrogateescape"))
        if field in seen:
            raise DataError(f"shard {shard}, key {key}: field {field} appears twice (byte {offset})")
        seen.add(field)
        offsets.append(offset)
        sizes.append(size)
        field_ids.append(fields.setdefault(field, len(fields)))
    if not keys:
        raise DataError(f"shard {shard}: holds no samples (no member is named KEY.FIELD)")
    if len(fields) > 0xFFFF:
        raise DataError(f"shard {shard}: has {len(fields)} different fields, at most 65,535 can be indexed")
    arrays = {
        "offsets": memoryview(array("q", offsets)),
        "sizes": memoryview(array("q", sizes)),
        "field_ids": memoryview(array("H", field_ids)),
        "starts": memoryview(array("q", [*starts, len(offsets)])),
        "key_starts": memoryview(array("q", itertools.accumulate(map(len, keys), initial=0))),
        "key_text": memoryview(b"".join(keys)),
    }
    return Index(
        shard,
        arrays,
        fields=tuple(fields),
        shard_size=status.st_size,
        shard_mtime_ns=status.st_mtime_ns,
        fingerprint=digest.hexdigest(),
    )


def _members(shard: Path, fd: int, shard_size: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every regular member; checks the tar's structure on the way.

    Format: POSIX.1-2017 pax (`ustar`, extended headers), GNU tar manual (`L` entries, base-256 numbers).
    """
    position = 0
    long_name: str | None = None  # from a GNU `L` entry, for the next member
    extended: dict[str, str] = {}  # from a PAX `x` entry, for the next member

    def truncated(what: str) -> NoReturn:
        raise DataError(f"shard {shard}: truncated: {what} (the file ends at byte {shard_size})")

    while True:
        header = os.pread(fd, _BLOCK, position)
        if not header and position == 0:
            raise DataError(f"shard {shard}: the file is empty")
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
            raise DataError(f"shard {shard}: damaged: no valid header at byte {position}")
        kind_byte = header[156]
        size = int(extended["size"]) if "size" in extended else _number(header[124:136])
        body = position + _BLOCK
        if body + size > shard_size:
            name = extended.get("path") or long_name or _header_name(header)
            truncated(
                f"member {name} at byte {position} needs {size} bytes of data, {shard_size - body} are left"
            )
        if kind_byte == ord("x"):
            extended = _pax(shard, os.pread(fd, size, body), position)
        elif kind_byte == ord("L"):
            long_name = os.pread(fd, size, body).rstrip(b"\0").decode("utf-8", "surrogateescape")
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
            elif kind_byte not in _REGULAR:
                size = size if kind_byte not in b"123456" else 0  # links, devices, folders have no body
            long_name, extended = None, {}
        position = body + -(-size // _BLOCK) * _BLOCK
    if position == 0:
        raise DataError(f"shard {shard}: the tar is empty")
    _check_tail(shard, fd, position, shard_size)


def _check_tail(shard: Path, fd: int, position: int, shard_size: int) -> None:
    """Only padding may follow the end of the archive: readers of tars would silently ignore anything else."""
    while position < shard_size:
        chunk = os.pread(fd, 1 << 20, position)
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


def _pax(shard: Path, body: bytes, position: int) -> dict[str, str]:
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


def _write_sidecar(index: Index) -> None:
    payload = b"".join(index._arrays[name].tobytes() for name, _ in _ARRAYS)
    header = {
        "shard_size": index.shard_size,
        "shard_mtime_ns": index.shard_mtime_ns,
        "fingerprint": index.fingerprint,
        "fields": list(index.fields),
        "lengths": [len(index._arrays[name]) for name, _ in _ARRAYS],
        "checksum": hashlib.blake2b(payload, digest_size=16).hexdigest(),
    }
    path = sidecar_path(index.shard)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(_MAGIC + json.dumps(header).encode() + b"\n" + payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_sidecar(shard: Path) -> tuple[Index | None, str]:
    """The index, or None and the reason why it has to be built."""
    try:
        data = sidecar_path(shard).read_bytes()
    except FileNotFoundError:
        return None, "no index yet"
    except OSError as error:
        return None, f"its index can't be read: {error.strerror}"
    end = data.find(b"\n", len(_MAGIC))
    if not data.startswith(_MAGIC) or end < 0:
        return None, "its index is damaged or of another version"
    try:
        header = json.loads(data[len(_MAGIC) : end])
        payload = memoryview(data)[end + 1 :]
        if hashlib.blake2b(payload, digest_size=16).hexdigest() != header["checksum"]:
            return None, "its index is damaged"
        arrays = {}
        at = 0
        for (name, letter), length in zip(_ARRAYS, header["lengths"], strict=True):
            end = at + length * struct.calcsize(letter)
            arrays[name] = payload[at:end].cast(letter)
            at = end
        status = shard.stat()
        if (header["shard_size"], header["shard_mtime_ns"]) != (status.st_size, status.st_mtime_ns):
            return None, "the shard changed since it was indexed"
        return Index(
            shard,
            arrays,
            fields=tuple(header["fields"]),
            shard_size=header["shard_size"],
            shard_mtime_ns=header["shard_mtime_ns"],
            fingerprint=header["fingerprint"],
        ), ""
    except (ValueError, KeyError, TypeError):
        return None, "its index is damaged"
