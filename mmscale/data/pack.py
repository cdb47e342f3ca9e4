"""Write tar shards: one after another (`ShardWriter`), by a plan that a killed run goes on with (`run_plan`), or a
whole generated data set (`build`).

    with ShardWriter("shards", "train", samples_per_shard=1000) as writer:
        writer.write("000001", {"jpg": jpg_bytes, "txt": b"a red apple"})

A shard is a plain POSIX tar in WebDataset form: the files `KEY.FIELD` of one sample lie next to each other.
The same samples give the same bytes on every machine, since times, owners and modes are fixed. A shard
appears under its name only when all of it is on the disk (temporary name, fsync, rename): whatever has its
name is complete, so a killed run goes on where it stopped. The price is that a killed run loses the shards
it was in.

`mmscale data pack` and `mmscale data repack` decide first what goes into which shard, write that plan beside the
shards (`.pack.json`) and then make the shards in any order, each by itself. So the bytes don't depend on the number of
workers, nor on how often the run was killed.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from mmscale.data.index import IndexBuilder, read_index
from mmscale.data.jobs import JobMap, Progress, local_map
from mmscale.errors import DataError, UserError

Fields = Mapping[str, bytes]
Render = Callable[[Any], tuple[str, Fields]]

_BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers and bodies begin at multiples of it
_RECORD = tarfile.RECORDSIZE  # 10,240 bytes: a tar's length is a multiple of it


class ShardWriter:
    """Writes samples to `FOLDER/PREFIX-000000.tar`, `-000001.tar`, ... and each shard's index beside it.

    Use it as a context manager. If the body raises, the shard under way is dropped; complete shards stay.

    Args:
        folder: made if it doesn't exist.
        prefix: what the shards' names begin with.
        samples_per_shard: a new shard begins after that many samples.
        shard_bytes: a new shard begins before a sample that would make the file larger than that, too. A sample
            that is larger by itself gets a shard of its own. None: no bound.
        first_shard: number of the first shard.
        manifest: write the folder's manifest at the end.

    Raises:
        DataError: a key or field that a tar shard can't hold, or a full disk; it names shard, key and field.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "shard",
        *,
        samples_per_shard: int = 1000,
        shard_bytes: int | None = None,
        first_shard: int = 0,
        manifest: bool = True,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be 1 or more")
        if shard_bytes is not None and shard_bytes < 1:
            raise ValueError(f"shard_bytes is {shard_bytes}; it must be 1 or more")
        if not prefix or "/" in prefix:
            raise ValueError(f"prefix is {prefix!r}; it must be a file name's beginning, without '/'")
        self.folder = Path(folder)
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.shard_bytes = shard_bytes
        self.paths: list[Path] = []  # the complete shards
        self.num_samples = 0  # written so far, over all shards
        self._first_shard = first_shard
        self._manifest = manifest
        self._file: BinaryIO | None = None
        self._index: IndexBuilder
        self._position = 0  # bytes of the shard under way
        self._keys: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._drop()
            return
        try:
            self.close()
        except BaseException:
            self._drop()
            raise
        if self._manifest and self.paths:
            write_manifest(self.folder)

    @property
    def _path(self) -> Path:
        return shard_path(self.folder, self.prefix, self._first_shard + len(self.paths))

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")

    def write(self, key: str, fields: Fields) -> None:
        """Append one sample: `fields` maps each field's name (`jpg`, `json`, ...) to its bytes."""
        self._check(key, fields)
        members = [
            (f"{key}.{field}", member_header(f"{key}.{field}", len(content)), content)
            for field, content in fields.items()
        ]
        size = sum(len(header) + _padded(len(content)) for _, header, content in members)
        if self.shard_bytes is not None and self._keys and tar_size(self._position + size) > self.shard_bytes:
            self.close()
        if key in self._keys:
            raise DataError(f"shard {self._path}: key {key!r} was already written")
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = self._temporary.open("wb")
                self._index = IndexBuilder(self._path)
            position = self._position
            for name, header, content in members:
                self._index.add(name, position + len(header), len(content))
                position += len(header) + _padded(len(content))
                self._file.write(header)
                self._file.write(content)
                self._file.write(b"\0" * (_padded(len(content)) - len(content)))
        except OSError as error:
            raise _disk_error(self._path, error) from error
        self._position += size
        self._keys.add(key)
        self.num_samples += 1
        if len(self._keys) == self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Complete the shard under way, if there is one: write it out, give it its name, index it."""
        if self._file is None:
            return
        path, temporary = self._path, self._temporary
        try:
            self._file.write(b"\0" * (tar_size(self._position) - self._position))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            temporary.replace(path)
            _sync_folder(self.folder)
        except OSError as error:
            raise _disk_error(path, error) from error
        self._file = None
        self._position = 0
        self._keys.clear()
        self.paths.append(path)
        self._index.finish()

    def _drop(self) -> None:
        if self._file is not None:
            temporary = self._temporary
            with contextlib.suppress(OSError):  # a full disk: closing flushes, and fails again
                self._file.close()
            temporary.unlink(missing_ok=True)
        self._file = None

    def _check(self, key: str, fields: Fields) -> None:
        name = key.rpartition("/")[2]
        if not name or "." in name or key.startswith("/") or "\0" in key:
            raise DataError(
                f"shard {self._path}: {key!r} can't be a sample's key: it needs a last part without '.', "
                "since the first '.' begins the field's name"
            )
        if _META.match(key):
            raise DataError(
                f"shard {self._path}: {key!r} can't be a sample's key: readers leave out names like __this__"
            )
        if not fields:
            raise DataError(f"shard {self._path}: sample {key!r} has no fields")
        for field in fields:
            if not field or "/" in field or "\0" in field:
                raise DataError(f"shard {self._path}: sample {key!r} has a field named {field!r}")
        twice = [field for field, count in Counter(map(str.lower, fields)).items() if count > 1]
        if twice:  # readers take a field's name in lower case
            raise DataError(f"shard {self._path}: sample {key!r} has field {twice[0]!r} twice")


_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's and Energon's rule


def member_header(name: str, size: int) -> bytes:
    """The tar header of a member of `size` bytes: USTAR, and PAX in front of it only if USTAR can't hold it.

    USTAR holds names of up to 100 bytes (up to 255 if a '/' falls right) and bodies of less than 8 GiB.
    """
    member = tarfile.TarInfo(name)  # mtime, uid and gid are 0, the owner's names empty
    member.size = size
    try:
        return member.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:
        return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def member_size(name: str, size: int) -> int:
    """Bytes that a member takes up in a shard: headers, body and padding."""
    if len(name.encode("utf-8", "surrogateescape")) <= 100 and size < 8 << 30:  # fits: no need to make it
        return _BLOCK + _padded(size)
    return len(member_header(name, size)) + _padded(size)


def tar_size(size: int) -> int:
    """Bytes of a tar whose members take up `size` bytes, with its end-of-archive marker."""
    return -(-(size + 2 * _BLOCK) // _RECORD) * _RECORD


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def shard_path(folder: str | Path, prefix: str, number: int) -> Path:
    """Where a ShardWriter puts shard `number`."""
    return Path(folder) / f"{prefix}-{number:06d}.tar"


def write_manifest(folder: Path) -> None:
    """Write the manifest of a folder of shards, from their indexes."""
    from mmscale.data.manifest import open_manifest

    open_manifest(folder)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is complete or absent, whatever happens in between."""
    write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is complete or absent, whatever happens in between."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _disk_error(path, error) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_error(path: Path, error: OSError) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"no space left on the disk while writing {path}; free some and run the same command again"
        )
    return DataError(f"can't write {path}: {error.strerror or error}")


# Shards by a plan -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """A sample that goes into no shard: `sample` says which (JSON), `cause` counts, `message` explains."""

    sample: Mapping[str, Any]
    cause: str
    message: str


@dataclass(frozen=True)
class PackReport:
    """What a run of `mmscale data pack` or `repack` left on the disk.

    Attributes:
        path: the folder of the shards.
        num_shards, num_samples: what lies in it. A shard of which every sample was left out has no file.
        num_bytes: of all shards.
        left_out: how many samples were left out, by cause. Those that were read lie in `skipped.jsonl`, too.
        num_written: shards that this call wrote; the others lay there already.
    """

    path: Path
    num_shards: int
    num_samples: int
    num_bytes: int
    left_out: dict[str, int]
    num_written: int

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "path": str(self.path)}

    def to_text(self) -> str:
        lines = [
            f"{self.path}: {self.num_samples:,} samples in {self.num_shards:,} shards, {self.num_bytes:,} bytes"
            + ("" if self.num_written else "; all of it was there already")
        ]
        lines += [f"left out, {cause}: {count:,} samples" for cause, count in sorted(self.left_out.items())]
        return "\n".join(lines)


def cut(
    sizes: np.ndarray | None, num_samples: int, samples_per_shard: int, shard_bytes: int | None
) -> list[int]:
    """Where shards begin, and the end: bounds[i] to bounds[i + 1] are the samples of shard i.

    sizes: (num_samples,) int64, the bytes that each sample takes up, in the order of writing, or None where they
    aren't known; then `shard_bytes` is left aside. The rule is that of ShardWriter.
    """
    if sizes is None or shard_bytes is None:
        return [*range(0, num_samples, samples_per_shard), num_samples]
    bounds, held = [0], 0
    for number, size in enumerate(sizes.tolist()):
        count = number - bounds[-1]
        if count and (count == samples_per_shard or tar_size(held + size) > shard_bytes):
            bounds.append(number)
            held = 0
        held += size
    return [*bounds, num_samples]


def permutation(seed: int, num_samples: int) -> np.ndarray:
    """(num_samples,) int64: the keyed permutation of `--shuffle`, the same on every machine."""
    from mmscale.data.order import FullOrder

    order = FullOrder(seed, num_samples)
    step = 1 << 14  # FullOrder looks at every offset once for each 1,024 of them
    parts = [
        order.at(0, np.arange(first, min(first + step, num_samples), dtype=np.int64))
        for first in range(0, num_samples, step)
    ]
    return np.concatenate([np.empty(0, np.int64), *parts])


def write_shard(out: Path, prefix: str, number: int, samples: Iterable[tuple[str, Fields] | LeftOut]) -> None:
    """Write one shard of a plan, and what was left out of it. Its bytes depend on `samples` alone."""
    name = shard_path(out, prefix, number).name
    lines = []
    writer = ShardWriter(out, prefix, samples_per_shard=sys.maxsize, first_shard=number, manifest=False)
    with writer:
        for sample in samples:
            if isinstance(sample, LeftOut):
                facts = {"output": name, **sample.sample, "cause": sample.cause, "message": sample.message}
                lines.append(json.dumps(facts, ensure_ascii=False) + "\n")
            else:
                writer.write(*sample)
        if lines:  # before the shard gets its name: what has its name is never written again
            (out / _RECORDS).mkdir(exist_ok=True)
            write_bytes(out / _RECORDS / name, "".join(lines).encode("utf-8", "backslashreplace"))


def run_plan(
    out: Path,
    plan: Mapping[str, Any],
    jobs: Sequence[Any],
    work: Callable[[Any], None],
    *,
    job_map: JobMap,
    progress: bool = True,
    files: Mapping[str, bytes] | None = None,
    num_bytes: int | None = None,
    left_out: Mapping[str, int] | None = None,
) -> PackReport:
    """Make the shards of a plan in the folder `out`; go on where a killed run of the same plan stopped.

    plan: JSON values: `tool`; `request`, the options by name; `sources`, a list of objects with a `name` and what
        tells that a source changed; `shards`, a list of objects with `name`, `samples` and a `digest` of what
        goes in.
    jobs: job i makes shard i of the plan, by `work(job)`, which calls `write_shard`.
    files: further files for the folder.
    num_bytes: of all shards, if it is known, to see before the work that the disk has room.
    left_out: what the plan itself leaves out, by cause.

    Raises:
        UserError: `out` is a file, holds other files or shards of another plan, or another process writes there.
        DataError: the disk is full or can't be written to, or a job's own.
    """
    shards = plan["shards"]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to write the shards to")
    is_ours = not out.is_dir() or (out / _PLAN).exists()
    if not is_ours and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} holds other files; give an empty or a new folder to write the shards to")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            old = _load_json(out / _PLAN)
            if old is not None and not any(out.glob("*.tar")) and not (out / _RECORDS).exists():
                old = None  # a run that failed before its first shard: nothing is lost by planning anew
            if old is not None and (differences := _differences(old, plan)):
                raise UserError(
                    f"{out} holds shards of another plan: {'; '.join(differences)}. Give another folder, or "
                    "delete this one to begin anew"
                )
            if old is None:
                write_json(out / _PLAN, dict(plan))
            skipped = _skipped(out)
            missing = [number for number, shard in enumerate(shards) if not _is_done(out, shard, skipped)]
            samples = sum(shard["samples"] for shard in shards)
            todo = sum(shards[number]["samples"] for number in missing)
            if num_bytes is not None and missing:
                needed, free = num_bytes * todo // max(samples, 1), shutil.disk_usage(out).free
                if needed > free:
                    raise DataError(
                        f"{out} needs about {needed / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB left"
                    )
            if not missing and old is not None and "finished" in old:
                return PackReport(out, **old["finished"], num_written=0)
            if missing:
                with Progress(samples, done=samples - todo, shown=progress) as bar:
                    for number, _ in job_map(work, _Chosen(jobs, missing)):
                        bar.add(shards[missing[number]]["samples"])
            return _finish(out, plan, files or {}, dict(left_out or {}), len(missing))
    except OSError as error:
        raise _disk_error(out, error) from error


_PLAN = ".pack.json"
_RECORDS = ".pack"  # a folder: what was left out of each shard, until all are done


class _Chosen(Sequence[Any]):
    """Some of the jobs, each made when it is asked for: jobs hold the list of what goes into a shard."""

    def __init__(self, jobs: Sequence[Any], numbers: list[int]) -> None:
        self._jobs, self._numbers = jobs, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: Any) -> Any:
        return self._jobs[self._numbers[place]]


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    with (out / ".pack.lock").open("w") as file:
        deadline = time.monotonic() + 5  # the children of a killed run follow it within a second
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is writing shards to {out}; wait until it ends"
                    ) from None
                time.sleep(0.1)
        yield


def _is_done(out: Path, shard: Mapping[str, Any], skipped: Mapping[str, list[bytes]]) -> bool:
    if (out / shard["name"]).is_file():
        return True
    try:  # all of it left out
        with (out / _RECORDS / shard["name"]).open("rb") as record:
            num_lines = sum(1 for _ in record)
    except FileNotFoundError:
        num_lines = len(skipped.get(shard["name"], []))
    return num_lines == shard["samples"]


def _skipped(out: Path) -> dict[str, list[bytes]]:
    """The lines of `skipped.jsonl`, by the shard that they were left out of."""
    lines: dict[str, list[bytes]] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (out / "skipped.jsonl").read_bytes().splitlines(keepends=True):
            lines.setdefault(json.loads(line)["output"], []).append(line)
    return lines


def _finish(
    out: Path, plan: Mapping[str, Any], files: Mapping[str, bytes], left_out: dict[str, int], num_written: int
) -> PackReport:
    skipped = _skipped(out)
    lines: list[bytes] = []
    counts = {"num_shards": 0, "num_samples": 0, "num_bytes": 0}
    for shard in plan["shards"]:
        path = out / shard["name"]
        try:
            own = (out / _RECORDS / path.name).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            own = skipped.get(path.name, [])
        lines += own
        if len(own) < shard["samples"]:
            index = read_index(path)  # makes it, if a run died between the shard and its index
            counts["num_shards"] += 1
            counts["num_samples"] += len(index)
            counts["num_bytes"] += index.size
    causes = Counter(left_out)
    causes.update(json.loads(line)["cause"] for line in lines)
    if not counts["num_samples"]:
        shutil.rmtree(out / _RECORDS, ignore_errors=True)
        raise DataError(f"{out}: no sample is left: {dict(causes)}")
    if lines:
        write_bytes(out / "skipped.jsonl", b"".join(lines))
    for name, content in files.items():
        write_bytes(out / name, content)
    write_manifest(out)
    finished = {**counts, "left_out": dict(sorted(causes.items()))}
    write_json(out / _PLAN, {**plan, "finished": finished})
    shutil.rmtree(out / _RECORDS, ignore_errors=True)
    return PackReport(out, **finished, num_written=num_written)  # type: ignore[arg-type]


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What a plan on the disk has that this one has not, and the other way round, in words; [] if none."""
    if old.get("tool") != new["tool"]:
        return [f"it was written by data {old.get('tool')}"]
    found = [
        f"--{name.replace('_', '-')} was {old['request'].get(name)!r} and is {new['request'].get(name)!r}"
        for name in sorted({*old["request"], *new["request"]})
        if old["request"].get(name) != new["request"].get(name)
    ]
    before, now = ({source["name"]: source for source in plan["sources"]} for plan in (old, new))
    changes: list[str] = []
    changes += [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} is gone" for name in before if name not in now]
    for name in now:
        facts, facts_then = now[name], before.get(name, now[name])
        changes += [
            f"{name}: {fact} was {facts_then.get(fact)} and is {facts[fact]}"
            for fact in facts
            if facts_then.get(fact) != facts[fact]
        ]
    if len(changes) > 5:
        changes[5:] = [f"{len(changes) - 5} further changes of the sources"]
    found += changes
    if not found:
        counts = [sum(shard["samples"] for shard in plan["shards"]) for plan in (old, new)]
        if counts[0] != counts[1]:
            found.append(f"there were {counts[0]:,} samples and are {counts[1]:,}")
        for first, second in itertools.zip_longest(old["shards"], new["shards"]):
            if first != second:
                name = (first or second)["name"]
                found.append(f"the source changed: {name} is the first shard that would differ")
                break
    return found


# Generated data sets ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoInfo:
    """A generated data set on the disk.

    Attributes:
        path: its folder, with `demo.json`, `tokenizer.json`, `LICENSES.md` and one folder a split.
        source: where the data comes from, for instance "emoji" or "scenes".
        shards: the tar shards of each split, in order.
        num_samples: samples of each split.
        num_concepts: different concepts of each split.
        cached: nothing was made, all of it lay there already.
    """

    path: Path
    source: str
    shards: dict[str, list[Path]]
    num_samples: dict[str, int]
    num_concepts: dict[str, int]
    cached: bool


@dataclass(frozen=True)
class Plan:
    """What `build` needs to make a data set.

    Attributes:
        source: for DemoInfo.
        details: further JSON facts for `demo.json`: versions, styles, voices.
        splits: the items of each split, in the order in which they shall lie in the shards. An item has an
            int attribute `concept`.
        renderer: opened once for each shard; gives the function that turns an item into (key, fields). Opened
            afresh, so that a shard's bytes depend on its own items alone, not on what a process wrote before.
        texts: all captions that the tokenizer is trained on.
        licenses: the content of LICENSES.md.
        bytes_per_sample: generous estimate, to see before the work that the disk has room.
    """

    source: str
    details: dict[str, Any]
    splits: Mapping[str, Sequence[Any]]
    renderer: Callable[[], AbstractContextManager[Render]]
    texts: Sequence[str]
    licenses: str
    bytes_per_sample: int


def find_built(out: Path, request: Mapping[str, Any]) -> DemoInfo | None:
    """The data set that the same request already made in `out`, or None if it isn't there or not whole.

    Raises:
        UserError: `out` is a file, or a folder that holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder to write the data to")
    manifest = _load_json(out / "demo.json")
    ours = (
        (out / _MARKER).exists() if manifest is None else isinstance(manifest, dict) and "request" in manifest
    )
    if not ours and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise UserError(f"{out} holds other files; give an empty or a new folder to write the data to")
    if manifest is None or manifest["request"] != dict(request):
        return None
    shards: dict[str, list[Path]] = {}
    for split, facts in manifest["splits"].items():
        shards[split] = [out / split / name for name in facts["shards"]]
        for path, size in zip(shards[split], facts["shards"].values(), strict=True):
            if not path.is_file() or path.stat().st_size != size:
                return None
    if not (out / "tokenizer.json").is_file():
        return None
    return DemoInfo(
        path=out,
        source=manifest["source"],
        shards=shards,
        num_samples={split: facts["num_samples"] for split, facts in manifest["splits"].items()},
        num_concepts={split: facts["num_concepts"] for split, facts in manifest["splits"].items()},
        cached=True,
    )


_MARKER = ".unfinished.json"  # lies in a folder from its first shard until demo.json is written


def build(
    out: Path,
    plan: Plan,
    request: Mapping[str, Any],
    *,
    samples_per_shard: int = 500,
    workers: int | None = None,
    progress: bool = True,
) -> DemoInfo:
    """Make the data set of a plan in `out`, on several processes; go on where a killed run stopped.

    `request` is what the caller was asked for, in JSON's types. Data in `out` that another request made is
    replaced. Shards are as even as can be, with at most `samples_per_shard` samples. `workers`: processes,
    default one a CPU.

    Raises:
        UserError: `out` is a file or holds other files. DataError: no room on the disk.
    """
    find_built(out, request)  # for its errors, before anything is made
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # several ranks may ask for the same data at once: one makes it
            found = find_built(out, request)
            return found or _build(
                out, plan, request, samples_per_shard, workers or os.cpu_count() or 1, progress
            )
    except OSError as error:
        raise _disk_error(out, error) from error


def _build(
    out: Path, plan: Plan, request: Mapping[str, Any], samples_per_shard: int, workers: int, progress: bool
) -> DemoInfo:
    identity = {"request": dict(request), "source": plan.source, "details": plan.details}
    if _load_json(out / _MARKER) != identity:
        for leftover in (*(out / split for split in plan.splits), out / "demo.json"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink(missing_ok=True)
        write_json(out / _MARKER, identity)

    jobs = [
        (split, number, items)
        for split, all_items in plan.splits.items()
        for number, items in enumerate(_evenly(all_items, samples_per_shard))
    ]
    shards: dict[str, list[Path]] = {split: [] for split in plan.splits}
    missing = []
    for split, number, items in jobs:
        path = shard_path(out / split, split, number)
        shards[split].append(path)
        if path.is_file():
            read_index(path)  # makes it, if the run died between the shard and its index
        else:
            missing.append((split, number, items))
    needed = sum(len(items) for _, _, items in missing) * plan.bytes_per_sample
    free = shutil.disk_usage(out).free
    if needed > free:
        raise DataError(f"{out} needs about {needed / 1e6:.0f} MB, and its disk has {free / 1e6:.0f} MB left")
    total = sum(len(items) for items in plan.splits.values())
    _write_shards(out, missing, plan.renderer, workers=workers, progress=progress, total=total)

    write_bytes(out / "tokenizer.json", train_tokenizer(plan.texts).encode())
    write_bytes(out / "LICENSES.md", plan.licenses.encode())
    info = DemoInfo(
        path=out,
        source=plan.source,
        shards=shards,
        num_samples={split: len(items) for split, items in plan.splits.items()},
        num_concepts={split: len({item.concept for item in items}) for split, items in plan.splits.items()},
        cached=False,
    )
    splits = {
        split: {
            "shards": {path.name: path.stat().st_size for path in paths},
            "num_samples": info.num_samples[split],
            "num_concepts": info.num_concepts[split],
        }
        for split, paths in shards.items()
    }
    write_json(out / "demo.json", {**identity, "splits": splits})
    (out / _MARKER).unlink()
    return info


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"can't read {path}: {error}; delete the folder and start again") from error


def _evenly(items: Sequence[Any], samples_per_shard: int) -> Iterator[Sequence[Any]]:
    num_shards = -(-len(items) // samples_per_shard)
    bounds = [len(items) * shard // num_shards for shard in range(num_shards + 1)]
    return (items[first:last] for first, last in itertools.pairwise(bounds))


_Job = tuple[str, int, Sequence[Any]]  # split, number of the shard, its items


def _write_shards(
    out: Path,
    jobs: Sequence[_Job],
    renderer: Callable[[], AbstractContextManager[Render]],
    *,
    workers: int,
    progress: bool,
    total: int,
) -> None:
    if not jobs:
        return
    todo = sum(len(items) for _, _, items in jobs)
    work = functools.partial(_write_shard, out, renderer)
    with Progress(total, done=total - todo, shown=progress) as bar:
        for number, _ in local_map(workers)(work, jobs):
            bar.add(len(jobs[number][2]))


def _write_shard(out: Path, renderer: Callable[[], AbstractContextManager[Render]], job: _Job) -> None:
    split, number, items = job
    writer = ShardWriter(out / split, split, samples_per_shard=len(items), first_shard=number, manifest=False)
    with renderer() as render, writer:
        for item in items:
            writer.write(*render(item))


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> str:
    """A byte-level BPE tokenizer trained on texts, as the JSON that `tokenizers.Tokenizer.from_file` reads.

    Any text round-trips. Ids 0, 1, 2 are <pad>, <bos>, <eos>; encoding adds none of them by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())
