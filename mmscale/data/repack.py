"""Write shards anew, in other sizes, filtered, shuffled or with other fields: `mmscale data repack`.

    repack(Path("good"), ["shards"], RepackOptions(require=("jpg", "txt"), minimum=(("jpg.width", 256),), shuffle=0))

What goes where is decided from the indexes alone, before any body is read; bodies are then copied byte for byte. Only
`drop_bad` looks into them: it decodes each, and shards with bad samples come out shorter. A shuffled repack reads its
sources sample by sample, in no order: quick from a local disk, slow from a store far away.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmscale.data.index import Index, build_index, is_remote, read_index
from mmscale.data.ingest import free_key
from mmscale.data.jobs import JobMap, local_map
from mmscale.data.manifest import Manifest, open_manifest
from mmscale.data.measure import measure_of
from mmscale.data.pack import (
    LeftOut,
    PackReport,
    cut,
    member_size,
    permutation,
    run_plan,
    shard_path,
    tar_size,
    write_shard,
)
from mmscale.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from mmscale.data.storage import Storage

Limits = tuple[tuple[str, float], ...]
_GAP = 1 << 16  # bytes between two wanted bodies of a sample that are read along rather than skipped


@dataclass(frozen=True)
class RepackOptions:
    """What `repack` keeps, and how it writes it.

    Attributes:
        samples_per_shard, shard_bytes: a shard ends at whichever comes first.
        shuffle: seed of a keyed permutation of all samples that are kept, None: as they lie.
        require: fields (of the source) that a sample must have.
        minimum, maximum: bounds of measured columns, such as ("jpg.width", 256), ("wav.seconds", 30), or of a field's
            size, ("jpg.bytes", 1000). A sample that lacks the field, or can't be measured, is left out.
        fields: keep only these (of the source); samples with none of them are left out.
        rename: (field, new name).
        drop_bad: decode every body that is kept, and leave out samples with one that can't be.
        quarantine: a file of JSON lines with `shard` and `key`: these samples are left out.
        prefix: what the shards' names begin with.
    """

    samples_per_shard: int = 10_000
    shard_bytes: int | None = 1_000_000_000
    shuffle: int | None = None
    require: tuple[str, ...] = ()
    minimum: Limits = ()
    maximum: Limits = ()
    fields: tuple[str, ...] | None = None
    rename: tuple[tuple[str, str], ...] = ()
    drop_bad: bool = False
    quarantine: Path | None = None
    prefix: str = "shard"

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more")
        for column, _ in (*self.minimum, *self.maximum):
            if not column.endswith(".bytes"):
                measure_of(column)  # raises ConfigError
        for old, new in self.rename:
            if not new or "/" in new or "\0" in new or new != new.lower():
                raise ConfigError(
                    f"rename: {new!r} (of {old}) can't be a field's name: lower case, without '/'"
                )


def repack(
    out: Path,
    shards: Sequence[str],
    options: RepackOptions | None = None,
    *,
    storage: "Storage | None" = None,
    job_map: JobMap | None = None,
    progress: bool = True,
) -> PackReport:
    """Write the samples of `shards` (as `open_manifest` takes them, local or remote) to new shards in `out`.

    A killed call goes on where it stopped; the bytes don't depend on `job_map` (default: one process a CPU). Keys stay
    as they are; if two samples in a new shard have the same, `_` and the old shard's name are added to the later one.

    Raises:
        UserError: `out` holds something else, or shards of other options or of sources that have changed since.
        ConfigError: a field or column that no sample has. DataError: a shard can't be used; the disk is full.
    """
    options = options or RepackOptions()
    job_map = job_map or local_map()
    for shard in shards:
        if (
            not is_remote(shard)
            and Path(shard).is_dir()
            and out.resolve().is_relative_to(Path(shard).resolve())
        ):
            raise UserError(f"{out} lies inside of the source {shard}; give a folder elsewhere")
    manifest = open_manifest(list(shards), storage=storage)
    _check_fields(manifest, options)
    _measure(manifest, options, job_map, storage)
    chosen, left_out = _choose(manifest, options, storage)
    numbers, locals_, sizes = chosen
    if not len(numbers):
        raise DataError(f"no sample is left: {dict(left_out)}")
    if options.shuffle is not None:
        order = permutation(options.shuffle, len(numbers))
        numbers, locals_, sizes = numbers[order], locals_[order], sizes[order]
    bounds = cut(sizes, len(numbers), options.samples_per_shard, options.shard_bytes)
    cuts = list(itertools.pairwise(bounds))
    request = {name: value for name, value in asdict(options).items() if name != "quarantine"}
    if options.quarantine is not None:
        request["quarantine"] = (
            f"{options.quarantine.name} that leaves out {left_out[_IN_QUARANTINE]} samples"
        )
    plan = {
        "tool": "repack",
        "request": json.loads(json.dumps(request)),
        "sources": [
            {
                "name": f"{shard}: {manifest.stem(shard)}",
                "fingerprint": manifest.index(shard).fingerprint,
                "bytes": manifest.index(shard).size,
            }
            for shard in range(manifest.num_shards)
        ],
        "shards": [
            {
                "name": shard_path(out, options.prefix, number).name,
                "samples": last - first,
                "digest": _digest(numbers[first:last], locals_[first:last]),
            }
            for number, (first, last) in enumerate(cuts)
        ],
    }
    return run_plan(
        out,
        plan,
        _Jobs(manifest, numbers, locals_, cuts),
        functools.partial(_repack_shard, out, options, storage),
        job_map=job_map,
        progress=progress,
        num_bytes=sum(tar_size(int(sizes[first:last].sum())) for first, last in cuts),
        left_out=left_out,
    )


_IN_QUARANTINE = "in the quarantine"


def _check_fields(manifest: Manifest, options: RepackOptions) -> None:
    columns = [column.rpartition(".")[0] for column, _ in (*options.minimum, *options.maximum)]
    named = {*options.require, *(options.fields or ()), *(old for old, _ in options.rename)}
    named |= {column for column in columns if column.partition(".")[0] != "json"}
    unknown = sorted(named - set(manifest.fields))
    if unknown:
        raise ConfigError(f"no sample has {', '.join(unknown)}; the shards hold {', '.join(manifest.fields)}")
    for signature in manifest.signatures:
        names = [_new_name(name, options) for name in signature if _is_kept(name, options)]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ConfigError(f"--rename: samples with {', '.join(signature)} would have {twice[0]} twice")


def _is_kept(name: str, options: RepackOptions) -> bool:
    return options.fields is None or name in options.fields


def _new_name(name: str, options: RepackOptions) -> str:
    return dict(options.rename).get(name, name)


def _measure(manifest: Manifest, options: RepackOptions, job_map: JobMap, storage: "Storage | None") -> None:
    """Measure what the bounds ask for, in the shards whose indexes don't have it."""
    columns = [column for column, _ in (*options.minimum, *options.maximum) if not column.endswith(".bytes")]
    needed = {measure_of(column) for column in columns}
    missing = []
    for shard in range(manifest.num_shards):
        index = manifest.index(shard)
        if needed - set(index.measured):
            missing.append((index.url, sorted(needed | set(index.measured))))
        elif any(column.endswith(".tokens") and " " not in index.measured["text"] for column in columns):
            missing.append((index.url, []))
    if any(column.endswith(".tokens") for column in columns) and missing:
        raise DataError(
            f"shard {missing[0][0]}: its index counts no tokens: "
            "`mmscale data index SHARDS --measure text --tokenizer F` adds them"
        )
    for _ in job_map(functools.partial(_measure_shard, storage), missing):
        pass


def _measure_shard(storage: "Storage | None", job: tuple[str, list[str]]) -> None:
    url, measures = job
    build_index(url, measure=measures, storage=storage)


def _choose(
    manifest: Manifest, options: RepackOptions, storage: "Storage | None"
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], Counter[str]]:
    """Shard, number in it and size in a new shard of every sample that is kept, and how many aren't, by cause."""
    listed = _read_quarantine(options.quarantine, manifest)
    left_out: Counter[str] = Counter()
    shards: list[int] = []
    locals_: list[int] = []
    sizes: list[int] = []
    measured = any(not column.endswith(".bytes") for column, _ in (*options.minimum, *options.maximum))
    found = 0
    for shard in range(manifest.num_shards):
        index = read_index(manifest.urls(shard), storage=storage) if measured else manifest.index(shard)
        keys = listed.get(shard, frozenset())
        for number in range(len(index)):
            record = index.record(number)
            key = index.key(number)
            cause = None
            if key in keys:
                found += 1
                cause = _IN_QUARANTINE
            cause = cause or _why_not(index, number, record, options)
            if cause is not None:
                left_out[cause] += 1
                continue
            shards.append(shard)
            locals_.append(number)
            sizes.append(
                sum(
                    member_size(f"{key}.{_new_name(name, options)}", size)
                    for name, (_, size) in record.items()
                    if _is_kept(name, options)
                )
            )
    total = sum(map(len, listed.values()))
    if found < total:
        raise DataError(
            f"{options.quarantine}: {total - found} of its {total} samples are not in these shards"
        )
    return (np.array(shards, np.int64), np.array(locals_, np.int64), np.array(sizes, np.int64)), left_out


def _why_not(
    index: Index, number: int, record: Mapping[str, tuple[int, int]], options: RepackOptions
) -> str | None:
    lacking = [name for name in options.require if name not in record]
    if lacking:
        return f"no {lacking[0]}"
    for limits, word, fails in (
        (options.minimum, "below", lambda value, limit: value < limit),
        (options.maximum, "above", lambda value, limit: value > limit),
    ):
        for column, limit in limits:
            value = _value(index, number, record, column)
            if value is None:
                return f"no {column}"
            if fails(value, limit if column.endswith(".bytes") else float(np.float32(limit))):  # as measured
                return f"{column} {word} {limit:g}"
    if not any(_is_kept(name, options) for name in record):
        return f"none of {', '.join(options.fields or ())}"
    return None


def _value(index: Index, number: int, record: Mapping[str, tuple[int, int]], column: str) -> float | None:
    name, _, unit = column.rpartition(".")
    if unit == "bytes":
        return float(record[name][1]) if name in record else None
    values = index.columns.get(column)
    value = float("nan") if values is None else float(values[number])
    return None if np.isnan(value) or value < 0 else value


def _read_quarantine(path: Path | None, manifest: Manifest) -> dict[int, frozenset[str]]:
    """{shard's number: keys} of a file whose lines name shards by URL, path, file name or stem."""
    if path is None:
        return {}
    names: dict[str, set[int]] = {}
    for shard in range(manifest.num_shards):
        url = manifest.urls(shard)
        own = {url, url.rpartition("/")[2], manifest.stem(shard)}
        if not is_remote(url):
            own.add(str(Path(url).resolve()))
        for name in own:
            names.setdefault(name, set()).add(shard)
    found: dict[int, set[str]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--quarantine {path}: can't be read: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            shard, key = entry["shard"], entry["key"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}, line {number}: must be a JSON object with shard and key") from None
        if not key:  # a fault of the shard, not of a sample
            continue
        places = (
            names.get(shard)
            or names.get(str(Path(shard).resolve()))
            or names.get(str(shard).rpartition("/")[2])
        )
        if places is None:
            raise DataError(f"{path}, line {number}: there is no shard {shard} among the sources")
        if len(places) > 1:
            raise DataError(
                f"{path}, line {number}: {len(places)} sources are named {shard}; give its whole path"
            )
        found.setdefault(next(iter(places)), set()).add(key)
    return {shard: frozenset(keys) for shard, keys in found.items()}


def _digest(numbers: np.ndarray, locals_: np.ndarray) -> str:
    return hashlib.blake2b(numbers.tobytes() + locals_.tobytes(), digest_size=8).hexdigest()


class _Jobs(Sequence[Any]):
    """Job i: (i, [(URL, fingerprint, numbers of its samples), ...] in the order of writing), made when asked for."""

    def __init__(
        self, manifest: Manifest, numbers: np.ndarray, locals_: np.ndarray, cuts: list[tuple[int, int]]
    ) -> None:
        self._manifest, self._numbers, self._locals, self._cuts = manifest, numbers, locals_, cuts

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, number: Any) -> Any:
        first, last = self._cuts[number]
        runs: list[tuple[str, str, list[int]]] = []
        before = -1
        for shard, place in zip(
            self._numbers[first:last].tolist(), self._locals[first:last].tolist(), strict=True
        ):
            if shard != before:
                runs.append((self._manifest.urls(shard), self._manifest.index(shard).fingerprint, []))
                before = shard
            runs[-1][2].append(place)
        return number, runs


Read = Callable[[int, int], bytes]


def _repack_shard(out: Path, options: RepackOptions, storage: "Storage | None", job: Any) -> None:
    number, runs = job

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]] | LeftOut]:
        used: set[str] = set()
        with contextlib.ExitStack() as stack:

            @functools.cache
            def opened(url: str, fingerprint: str) -> tuple[Index, Read]:
                index = read_index(url, storage=storage)
                if index.fingerprint != fingerprint:
                    raise DataError(f"shard {url}: changed since the plan was made")
                return index, stack.enter_context(_reading(index, storage))

            for url, fingerprint, places in runs:
                if opened.cache_info().currsize > 256:  # descriptors
                    opened.cache_clear()
                    stack.close()
                index, read = opened(url, fingerprint)
                for place in places:
                    key = index.key(place)
                    fields = _bodies(index, place, read, options)
                    fault = _fault(fields) if options.drop_bad else None
                    if fault is not None:
                        yield LeftOut({"shard": url, "key": key}, *fault)
                        continue
                    if key in used:
                        stem = url.rpartition("/")[2].removesuffix(".tar").replace(".", "_")
                        key = free_key(f"{key}_{stem}", used)
                    used.add(key)
                    yield key, {_new_name(name, options): body for name, body in fields.items()}

    write_shard(out, options.prefix, number, samples())


@functools.cache
def _storage() -> "Storage":
    """One for the process: connections are kept."""
    from mmscale.data.storage import Storage

    return Storage()


@contextlib.contextmanager
def _reading(index: Index, storage: "Storage | None") -> Iterator[Read]:
    """read(offset, size) of a shard that is as its index says."""
    if is_remote(index.url):
        file = (storage or _storage()).open(index.url, index.stat)
        try:
            yield file.read
        finally:
            file.close()
        return
    descriptor = os.open(index.url, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        if (status.st_size, str(status.st_mtime_ns)) != (index.size, index.tag):
            raise DataError(f"shard {index.url}: changed since it was indexed")

        def read(offset: int, size: int) -> bytes:
            parts = []
            while size:  # the system reads at most 2 GiB at once
                part = os.pread(descriptor, size, offset)
                if not part:
                    raise DataError(f"shard {index.url}: truncated: it ends at byte {offset}")
                parts.append(part)
                offset, size = offset + len(part), size - len(part)
            return parts[0] if len(parts) == 1 else b"".join(parts)

        yield read
    finally:
        os.close(descriptor)


def _bodies(index: Index, number: int, read: Read, options: RepackOptions) -> dict[str, bytes]:
    """The fields of a sample that are kept, in the shard's order; neighbours are read together."""
    wanted = [
        (name, offset, size)
        for name, (offset, size) in index.record(number).items()
        if _is_kept(name, options)
    ]
    found: dict[str, bytes] = {}
    start = 0
    for place in range(1, len(wanted) + 1):
        end = wanted[place - 1][1] + wanted[place - 1][2]
        if place < len(wanted) and 0 <= wanted[place][1] - end <= _GAP:
            continue
        first = wanted[start][1]
        chunk = read(first, end - first)
        for name, offset, size in wanted[start:place]:
            found[name] = chunk[offset - first : offset - first + size]
        start = place
    return found


def _fault(fields: Mapping[str, bytes]) -> tuple[str, str] | None:
    from mmscale.data.check import examine, is_known

    for name, body in fields.items():
        if is_known(name) and (fault := examine(name, body)) is not None:
            return fault[0], f"{name}: {fault[1]}"
    return None
