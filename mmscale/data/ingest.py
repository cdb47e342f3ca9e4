"""Pack files, tables and Hugging Face data sets on the disk into shards: `mmscale data pack`.

    pack(Path("shards"), [Path("photos")], PackOptions(shuffle=0, keys="stem"))

What a source is, it says itself:

- a folder of files: files that share folder and stem are one sample (`cat.jpg`, `cat.txt`); with `classes` the first
  sub-folder is the class, and `captions.csv` (or .tsv, .json, .jsonl; or metadata.csv, .jsonl) in it adds to the files;
- a table (.csv, .tsv, .jsonl, .parquet, .arrow): columns with paths, relative to the table, or with bytes;
- a folder that `datasets` saved (`save_to_disk`), or one of Parquet files.

Bodies are copied byte for byte, so nothing is lost and nothing is checked: `mmscale data repack --drop-bad` decodes.
The price of planning first is memory: about a kilobyte for each file of a folder, or row of a CSV or JSONL table;
Parquet and Arrow are planned by their row counts alone.
"""

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import posixpath
import re
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mmscale.data.jobs import JobMap, local_map
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
from mmscale.errors import DataError, UserError

_PICTURES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"))
_SOUNDS = frozenset(("wav", "flac", "ogg", "opus", "mp3", "m4a"))
_VIDEOS = frozenset(("mp4", "webm", "mov", "mkv", "avi"))
_ARRAYS = frozenset(("npy", "npz"))
_MEDIA = _PICTURES | _SOUNDS | _VIDEOS
# role of a column: its field
_TEXTS = {"text": "txt", "txt": "txt", "label": "cls", "cls": "cls", "json": "json"}
_ROLES = frozenset(("image", "audio", "video", "file"))  # the field is the file's extension
_PATH_COLUMNS = {
    **dict.fromkeys(("file_name", "filename", "filepath", "file_path", "file", "path", "key_path"), "file"),
    **dict.fromkeys(("image", "image_path", "image_file", "img", "img_path"), "image"),
    **dict.fromkeys(("audio", "audio_path", "audio_file", "wav"), "audio"),
    **dict.fromkeys(("video", "video_path", "video_file"), "video"),
}
_TEXT_COLUMNS = (
    "caption",
    "captions",
    "text",
    "title",
    "transcription",
    "transcript",
    "sentence",
    "description",
)
_CAPTION_FILES = (
    *(f"captions.{end}" for end in ("json", "jsonl", "csv", "tsv")),
    "metadata.jsonl",
    "metadata.csv",
)
_TABLES = frozenset((".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow"))
_WINDOW_SHARDS = 8  # of shuffled Parquet: how many shards' worth of row groups are mixed with each other


@dataclass(frozen=True)
class PackOptions:
    """How `pack` makes shards.

    Attributes:
        columns: (role or field, column) of a table. Roles: `image`, `audio`, `video`, `file` (a path, or bytes; the
            field is the extension), `text`, `label`, `json`; anything else is the field's own name (`seg.png`).
        split: of a data set that has several.
        classes: the first sub-folder is the class: field `cls` is its number, `classes.json` has the names, and the
            name is the `txt` of a sample without one.
        samples_per_shard, shard_bytes: a shard ends at whichever comes first.
        shuffle: seed of a keyed permutation of the samples, None: in the source's order.
        limit: at most so many samples, the first ones after shuffling.
        resize: pictures whose shorter side is longer (pixels) become JPEGs (quality 95) of that size.
        keys: "number" (the sample's number in the source) or "stem" (its path without the extension).
        on_error: "fail" at a sample that can't be read, or "skip" it.
        first_dot: a file's stem ends at the first dot of its name (`cat.seg.png` belongs to `cat`), not the last.
        allow_outside: files may lie outside of the source's folder.
        prefix: what the shards' names begin with.
    """

    columns: tuple[tuple[str, str], ...] = ()
    split: str | None = None
    classes: bool = False
    samples_per_shard: int = 10_000
    shard_bytes: int | None = 1 << 30
    shuffle: int | None = None
    limit: int | None = None
    resize: int | None = None
    keys: str = "number"
    on_error: str = "fail"
    first_dot: bool = False
    allow_outside: bool = False
    prefix: str = "shard"

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "shard_bytes", "limit", "resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be 1 or more")
        for name, known in (("keys", ("number", "stem")), ("on_error", ("fail", "skip"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(known)}")


def pack(
    out: Path,
    sources: Sequence[Path],
    options: PackOptions | None = None,
    *,
    job_map: JobMap | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> PackReport:
    """Write the samples of `sources` as shards to the folder `out`; go on where a killed call stopped.

    The bytes depend on sources and options alone, not on `job_map` (default: one process a CPU). With
    `on_error="skip"` samples that can't be read are counted in the report and listed in `out/skipped.jsonl`.

    Raises:
        UserError: `out` holds something else, or shards of other options or of a source that has changed since;
            the sources hold no samples, or a column is unknown; pyarrow is needed and missing.
        DataError: a file can't be read (`on_error="fail"`), it names sample and file; the disk is full.
    """
    options = options or PackOptions()
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{out} lies inside of the source {source}; give a folder elsewhere")
    found = open_sources(sources, options, say=say)
    order = found.order(options.shuffle, options.samples_per_shard)
    if options.limit is not None:
        order = order[: options.limit]
    if not len(order):
        raise UserError(f"{', '.join(map(str, sources))}: holds no samples")
    sizes = found.sizes()
    samples_per_shard = options.samples_per_shard
    if sizes is not None:
        sizes = sizes[order]
    elif options.shard_bytes is not None:
        samples_per_shard = min(samples_per_shard, max(1, int(options.shard_bytes / found.mean_size())))
    bounds = cut(sizes, len(order), samples_per_shard, options.shard_bytes)
    jobs = _Jobs(found, order, bounds)
    request = {
        name: value
        for name, value in asdict(options).items()
        if value != PackOptions.__dataclass_fields__[name].default and name != "on_error"
    }
    # A run that stopped at a bad sample may go on without it: what it wrote is what it would write now.
    if options.on_error == "fail" and any((out / name).exists() for name in (".pack", "skipped.jsonl")):
        raise UserError(
            f"{out} holds shards written with --on-error skip; give that again, or another folder"
        )
    plan = {
        "tool": "pack",
        "request": json.loads(json.dumps(request)),
        "sources": found.facts,
        "shards": [
            {
                "name": shard_path(out, options.prefix, number).name,
                "samples": last - first,
                "digest": found.digest(order[first:last]),
            }
            for number, (first, last) in enumerate(itertools.pairwise(bounds))
        ],
    }
    num_bytes = None
    if sizes is not None and options.resize is None:
        num_bytes = sum(tar_size(int(sizes[a:b].sum())) for a, b in itertools.pairwise(bounds))
    width = max(6, len(str(len(found) - 1)))
    files = {}
    if found.class_names:
        files["classes.json"] = (json.dumps(found.class_names, ensure_ascii=False) + "\n").encode()
    return run_plan(
        out,
        plan,
        jobs,
        functools.partial(_pack_shard, out, options, found.reader(), width),
        job_map=job_map or local_map(),
        progress=progress,
        files=files,
        num_bytes=num_bytes,
    )


class _Jobs(Sequence[Any]):
    """Job i: (i, the samples' numbers, their items), made when asked for."""

    def __init__(self, source: "Source", order: np.ndarray, bounds: list[int]) -> None:
        self._source, self._order, self._bounds = source, order, bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: Any) -> Any:
        numbers = self._order[self._bounds[number] : self._bounds[number + 1]].tolist()
        return number, numbers, self._source.items(numbers)


class Fault(Exception):
    """A sample can't be read. `cause` is short, to count by."""

    def __init__(self, where: str, cause: str, message: str) -> None:
        super().__init__(where, cause, message)
        self.where, self.cause, self.message = where, cause, message


_Read = tuple[str, str, dict[str, bytes]]  # stem, where it is from, fields


class Reader(Protocol):
    """Reads items in a worker; pickles."""

    def read(self, items: list[Any]) -> Iterator[_Read | Fault]: ...


class Source(Protocol):
    """Samples with numbers 0 to len - 1."""

    facts: list[dict[str, Any]]  # for the plan: the sources by name, and what tells that they changed
    class_names: list[str]

    def __len__(self) -> int: ...
    def order(self, seed: int | None, samples_per_shard: int) -> np.ndarray: ...
    def sizes(self) -> np.ndarray | None: ...
    def mean_size(self) -> float: ...
    def items(self, numbers: list[int]) -> list[Any]: ...
    def digest(self, numbers: np.ndarray) -> str: ...
    def reader(self) -> Reader: ...


def _pack_shard(out: Path, options: PackOptions, reader: Reader, width: int, job: Any) -> None:
    shard, numbers, items = job

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]] | LeftOut]:
        used: set[str] = set()
        for number, read in zip(numbers, reader.read(items), strict=True):
            try:
                if isinstance(read, Fault):
                    raise read
                stem, where, fields = read
                if options.resize is not None:
                    fields = _resized(where, fields, options.resize)
                if not fields:
                    raise Fault(where, "no data", "none of its columns holds anything")
            except Fault as fault:
                if options.on_error == "fail":
                    raise DataError(
                        f"shard {shard_path(out, options.prefix, shard)}: {fault.where}: {fault.message} "
                        "(--on-error skip leaves such samples out)"
                    ) from None
                yield LeftOut({"number": number, "sample": fault.where}, fault.cause, fault.message)
                continue
            key = f"{number:0{width}d}" if options.keys == "number" else free_key(valid_key(stem), used)
            used.add(key)
            yield key, fields

    write_shard(out, options.prefix, shard, samples())


def valid_key(stem: str) -> str:
    """A key as near to `stem` as a shard can hold: dots in its last part, control characters and undecodable bytes
    become `_`."""
    stem = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", "_", stem)
    parts = [part for part in stem.split("/") if part not in ("", ".", "..")] or ["_"]
    parts[-1] = parts[-1].replace(".", "_")
    if re.fullmatch(r"__.*__", parts[0]):  # readers leave out names like __this__
        parts[0] = "_" + parts[0].strip("_") + "_"
    return "/".join(parts)


def free_key(key: str, used: set[str]) -> str:
    """`key`, or `key_2`, `key_3`, ... if the shard has it already."""
    if key not in used:
        return key
    return next(other for n in itertools.count(2) if (other := f"{key}_{n}") not in used)


# Files ---------------------------------------------------------------------------------------------------------


class _Item(NamedTuple):
    root: str  # real path of the folder that its files lie in
    where: str  # for messages: the sample's files, or the table's row
    stem: str
    files: tuple[
        tuple[str, str, int, int], ...
    ]  # field, path from root, bytes (-1: unknown), time of change in ns
    texts: tuple[tuple[str, bytes], ...]  # field, body
    fault: tuple[str, str] | None  # cause, message


@dataclass
class _Files:
    """Samples whose files are known by name: folders, and tables with paths."""

    all_items: list[_Item]
    facts: list[dict[str, Any]]
    allow_outside: bool
    class_names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.all_items)

    def order(self, seed: int | None, samples_per_shard: int) -> np.ndarray:
        return np.arange(len(self)) if seed is None else permutation(seed, len(self))

    def sizes(self) -> np.ndarray:
        # Keys aren't known yet. Running numbers are short; long stems cost some blocks more.
        return np.array(
            [
                sum(member_size(f"{item.stem}.{name}", max(size, 0)) for name, _, size, _ in item.files)
                + sum(member_size(f"{item.stem}.{name}", len(body)) for name, body in item.texts)
                for item in self.all_items
            ],
            np.int64,
        )

    def mean_size(self) -> float:
        return float(self.sizes().mean())

    def items(self, numbers: list[int]) -> list[Any]:
        return [self.all_items[number] for number in numbers]

    def digest(self, numbers: np.ndarray) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for number in numbers.tolist():
            item = self.all_items[number]
            digest.update(
                repr((item.stem, item.files, item.texts, item.fault)).encode("utf-8", "surrogatepass")
            )
        return digest.hexdigest()

    def reader(self) -> Reader:
        return _FileReader(self.allow_outside)


@dataclass(frozen=True)
class _FileReader:
    allow_outside: bool

    def read(self, items: list[Any]) -> Iterator[_Read | Fault]:
        for item in items:
            try:
                yield self._read(item)
            except Fault as fault:
                yield fault

    def _read(self, item: _Item) -> _Read:
        if item.fault is not None:
            raise Fault(item.where, *item.fault)
        fields: dict[str, bytes] = {}
        for name, path, size, _ in item.files:
            body = _read_file(item.root, path, item.where, self.allow_outside)
            if size >= 0 and len(body) != size:
                raise Fault(item.where, "changed", f"{path} had {size} bytes and has {len(body)}")
            _add(fields, name, body, item.where)
        for name, body in item.texts:
            _add(fields, name, body, item.where)
        return item.stem, item.where, fields


def _add(fields: dict[str, bytes], name: str, body: bytes, where: str) -> None:
    if name in fields:
        raise Fault(where, "twice", f"has two bodies for its field {name}")
    if not body and name.rpartition(".")[2] in _MEDIA | _ARRAYS:
        raise Fault(where, "empty", f"its {name} is empty")
    fields[name] = body


def _locate(root: str, path: str, where: str, allow_outside: bool) -> str:
    full = os.path.join(root, path)  # noqa: PTH118 (a Path for each of millions of files costs)
    if not allow_outside:
        if "\0" in path:
            raise Fault(where, "missing", f"{path!r} is no file's name")
        real = os.path.realpath(full)
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            raise Fault(
                where, "outside", f"{path} leads out of {root} (--allow-outside reads it all the same)"
            )
    return full


def _stat_file(root: str, path: str, where: str, allow_outside: bool) -> os.stat_result:
    full = _locate(root, path, where, allow_outside)
    try:
        status = os.stat(full)  # noqa: PTH116
    except FileNotFoundError:
        raise Fault(where, "missing", f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Fault(where, "unreadable", f"{path}: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Fault(where, "no file", f"{path} is not a regular file")
    return status


def _read_file(root: str, path: str, where: str, allow_outside: bool) -> bytes:
    _stat_file(root, path, where, allow_outside)
    try:
        # not blocking: should the file have become a pipe meanwhile, opening it must not wait for a writer
        descriptor = os.open(_locate(root, path, where, allow_outside), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise Fault(where, "missing", f"{path}: no such file") from None
    except OSError as error:
        raise Fault(where, "unreadable", f"{path}: {error.strerror}") from None


def open_sources(sources: Sequence[Path], options: PackOptions, *, say: Callable[[str], None]) -> Source:
    """What `sources` hold, found by what they are. Raises UserError."""
    if not sources:
        raise UserError("no source: give --from a folder or a table")
    found: list[_Files | _Rows] = []
    for source in sources:
        if not source.exists():
            raise UserError(f"--from {source}: no such file or folder")
        if source.is_dir():
            found.append(_open_folder(source, options, say))
        elif source.suffix.lower() in (".parquet", ".arrow"):
            found.append(_open_rows(source.parent, [source], options, say))
        elif source.suffix.lower() in _TABLES:
            found.append(_open_table(source, options, say))
        else:
            raise UserError(
                f"--from {source}: not known; give a folder, or a table: {', '.join(sorted(_TABLES))}"
            )
    if len(found) == 1:
        return found[0]
    if len({type(source) for source in found}) > 1:
        raise UserError("--from: files and tables of paths can't be mixed with Parquet or Arrow in one run")
    if any(source.class_names != found[0].class_names for source in found):
        raise UserError("--from: the sources have different classes; pack a folder that holds them all")
    facts = [fact for source in found for fact in source.facts]
    for number, fact in enumerate(facts):
        if any(fact["name"] == other["name"] for other in facts[:number]):
            fact["name"] += f" (source {number + 1})"
    first = found[0]
    if isinstance(first, _Files):
        merged = [item for source in found if isinstance(source, _Files) for item in source.all_items]
        return _Files(merged, facts, options.allow_outside, first.class_names)
    blocks = [block for source in found if isinstance(source, _Rows) for block in source.blocks]
    columns = {source.columns for source in found if isinstance(source, _Rows)}
    if len(columns) > 1:
        raise UserError("--from: the tables have different columns; pack them one by one")
    return _Rows(blocks, first.columns, facts, options.allow_outside, first.class_names)


def _open_folder(root: Path, options: PackOptions, say: Callable[[str], None]) -> "_Files | _Rows":
    if (root / "dataset_dict.json").is_file():
        splits = json.loads((root / "dataset_dict.json").read_text())["splits"]
        return _open_folder(root / _choose_split(splits, options.split, root), options, say)
    if (root / "state.json").is_file() and (root / "dataset_info.json").is_file():
        names = [entry["filename"] for entry in json.loads((root / "state.json").read_text())["_data_files"]]
        return _open_rows(root, [root / name for name in names], options, say)
    tables = sorted(
        path
        for path in root.rglob("*")
        if path.suffix in (".parquet", ".arrow")
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and not path.name.startswith("cache-")  # what `datasets` keeps of its own computations
    )
    if tables and len({path.suffix for path in tables}) == 1 and not _has_media(root):
        splits_of = [_split_of(path.relative_to(root)) for path in tables]
        known = sorted({split for split in splits_of if split is not None})
        if known:
            split = _choose_split(known, options.split, root)
            tables = [path for path, own in zip(tables, splits_of, strict=True) if own == split]
        elif options.split is not None:
            raise UserError(f"--split {options.split}: the files of {root} name no splits")
        return _open_rows(root, tables, options, say)
    if options.split is not None:
        raise UserError(f"--split {options.split}: {root} is a folder of files, which has no splits")
    return _scan_folder(root, options, say)


def _has_media(root: Path) -> bool:
    return any(path.suffix.lower().lstrip(".") in _MEDIA for path in root.rglob("*"))


def _split_of(path: Path) -> str | None:
    """`data/train-00000-of-00002.parquet`, `train.parquet` and `train/0000.parquet` are of split train."""
    match = re.match(r"(?:[\w.]+-)?([A-Za-z_]\w*)-\d+-of-\d+", path.stem)
    if match:
        return match[1]
    names = ("train", "test", "validation", "val", "valid", "dev")
    return next((part for part in (path.stem, *path.parts[:-1]) if part in names), None)


def _choose_split(splits: Sequence[str], split: str | None, root: Path) -> str:
    if split is None and len(splits) == 1:
        return splits[0]
    if split is None or split not in splits:
        what = "has several splits: choose one with --split" if split is None else f"has no split {split!r}"
        raise UserError(f"--from {root}: {what}; it holds {', '.join(splits)}")
    return split


def _scan_folder(root: Path, options: PackOptions, say: Callable[[str], None]) -> _Files:
    real = os.path.realpath(root)
    captions = _read_captions(root, options)
    groups: dict[str, list[tuple[str, str, os.stat_result | None, tuple[str, str] | None]]] = {}
    no_extension = 0
    links: list[str] = []
    seen = {real}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(real, folder)) as scan:  # noqa: PTH118
            entries = sorted(scan, key=lambda entry: entry.name)
        for entry in entries:
            path = posixpath.join(folder, entry.name)
            if entry.name.startswith(".") or entry.name in ("__MACOSX", "Thumbs.db", "desktop.ini"):
                continue
            if entry.is_dir():
                target = os.path.realpath(entry.path)
                if entry.is_symlink() and (not options.allow_outside or target in seen):
                    links.append(path)
                else:
                    seen.add(target)
                    folders.append(path)
                continue
            if captions is not None and path == captions.name:
                continue
            stem, _, end = entry.name.partition(".") if options.first_dot else entry.name.rpartition(".")
            if not stem or not end:
                no_extension += 1
                continue
            fault, status = None, None
            try:
                status = _stat_file(real, path, path, options.allow_outside)
            except Fault as error:
                fault = (error.cause, error.message)
            groups.setdefault(posixpath.join(folder, stem), []).append((end.lower(), path, status, fault))
    if no_extension:
        say(f"{root}: {no_extension:,} files without an extension are left out")
    if links:
        say(f"{root}: {len(links):,} links to folders are left out, for instance {links[0]}")
    class_names: list[str] = []
    if options.classes:
        class_names = sorted({stem.split("/", 1)[0] for stem in groups if "/" in stem})
        if not class_names:
            raise UserError(f"--classes: {root} has no sub-folders with files")
    class_ids = {name: number for number, name in enumerate(class_names)}
    items = []
    for stem in sorted(groups):
        files = groups[stem]
        faults = [fault for *_, fault in files if fault is not None]
        fields = [name for name, *_ in files]
        texts: dict[str, bytes] = {}
        if captions is not None:
            texts.update(captions.take([path for _, path, _, _ in files]))
        if options.classes:
            if "/" in stem:
                name = stem.split("/", 1)[0]
                texts["cls"] = str(class_ids[name]).encode()
                if "txt" not in texts and "txt" not in fields:
                    texts["txt"] = name.encode("utf-8", "replace")
            else:
                faults.append(("no class", "lies in no class's folder"))
        twice = [name for name in {*fields, *texts} if (fields + list(texts)).count(name) > 1]
        if twice:
            paths = [path for name, path, _, _ in files if name in twice]
            also = f" and {captions.name}" if captions and set(twice) & set(texts) else ""
            faults.append(("twice", f"{', '.join(paths)}{also} are all its field {min(twice)}"))
        items.append(
            _Item(
                real,
                f"{root}/{stem}",
                stem,
                tuple(
                    (name, path, status.st_size, status.st_mtime_ns) if status else (name, path, -1, 0)
                    for name, path, status, _ in files
                ),
                tuple(texts.items()),
                faults[0] if faults else None,
            )
        )
    if captions is not None:
        items += captions.rest(real, root)
    facts: list[dict[str, Any]] = [{"name": root.resolve().name, "samples": len(items)}]
    if captions is not None:
        facts.append(_file_facts(root / captions.name, captions.name))
    return _Files(items, facts, options.allow_outside, class_names)


def _file_facts(path: Path, name: str) -> dict[str, Any]:
    status = path.stat()
    return {"name": name, "bytes": status.st_size, "changed_ns": status.st_mtime_ns}


class _Captions:
    """A table in a folder of files that says more about some of them."""

    def __init__(self, name: str, rows: dict[str, list[dict[str, Any]]], text: str | None) -> None:
        self.name = name
        self._rows = rows
        self._text = text

    def take(self, paths: list[str]) -> dict[str, bytes]:
        rows = [row for path in paths for row in self._rows.pop(path, [])]
        if not rows:
            return {}
        captions: list[str] = []
        rest: dict[str, Any] = {}
        for row in rows:
            for name, value in row.items():
                if name != self._text:
                    rest.setdefault(name, value)
                elif isinstance(value, list):
                    captions += [str(caption) for caption in value]
                elif value is not None:
                    captions.append(str(value))
        return _texts(captions, rest)

    def rest(self, real: str, root: Path) -> list[_Item]:
        """A failing item for each file that the table names and the folder lacks."""
        return [
            _Item(
                real,
                f"{root}/{path}",
                path,
                (),
                (),
                ("missing", f"{self.name} names it; there is no such file"),
            )
            for path in self._rows
        ]


def _texts(captions: Sequence[str], rest: Mapping[str, Any]) -> dict[str, bytes]:
    """The fields of captions and of what else a table says: `txt` is the first caption, `json` holds the others."""
    fields = {}
    if captions:
        fields["txt"] = captions[0].encode("utf-8", "backslashreplace")
    if len(captions) > 1:
        rest = {**rest, "captions": list(captions)}
    if rest:
        fields["json"] = _json(rest)
    return fields


def _json(value: Any) -> bytes:
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items() if not isinstance(part, bytes)}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value if not isinstance(part, bytes)]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _read_captions(root: Path, options: PackOptions) -> _Captions | None:
    names = [name for name in _CAPTION_FILES if (root / name).is_file()]
    if not names:
        if options.columns:
            raise UserError(f"--column: {root} is a folder of files without a table of captions")
        return None
    if len(names) > 1:
        raise UserError(f"{root} holds {' and '.join(names)}; only one of them can describe its files")
    name = names[0]
    rows = _read_coco(root / name) or _read_rows(root / name)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    chosen = dict(options.columns)
    unknown = [column for column in chosen.values() if column not in columns]
    if unknown or set(chosen) - {"file", "text"}:
        raise UserError(
            f"--column: {root / name} takes file=COLUMN and text=COLUMN; its columns are {', '.join(columns)}"
        )
    by = chosen.get("file") or next((column for column in _PATH_COLUMNS if column in columns), None)
    if by is None:
        raise UserError(
            f"{root / name}: no column names the files (give --column file=COLUMN); its columns are "
            f"{', '.join(columns)}"
        )
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        path = posixpath.normpath(str(row[by])) if row.get(by) else ""
        found.setdefault(path, []).append({column: row[column] for column in row if column != by})
    text = chosen.get("text") or next((column for column in _TEXT_COLUMNS if column in columns), None)
    return _Captions(name, found, text)


def _read_coco(path: Path) -> list[dict[str, Any]] | None:
    """The captions of a file in COCO's form, one row each; of `{file: caption}` likewise; None: neither."""
    if path.suffix != ".json":
        return None
    content = _load_json(path)
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            return [
                {"file_name": names[note["image_id"]], "caption": note["caption"]}
                for note in content["annotations"]
            ]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: looks like COCO's captions, but lacks {error}") from None
    if all(isinstance(value, str | list) for value in content.values()):
        return [{"file_name": name, "caption": value} for name, value in content.items()]
    return None


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON: {error}") from None


# Tables --------------------------------------------------------------------------------------------------------


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV, JSONL or JSON table."""
    kind = path.suffix.lower()
    rows: list[dict[str, Any]] = []
    try:
        if kind == ".json":
            content = _load_json(path)
            if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
                raise UserError(f"{path}: must be a list of objects")
            return content
        with path.open(encoding="utf-8-sig", newline="") as file:
            if kind in (".jsonl", ".ndjson"):
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{path}, line {number}: is no JSON: {error}") from None
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number}: must be an object")
                    rows.append(row)
                return rows
            csv.field_size_limit(1 << 30)
            reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
            if len(set(reader.fieldnames or ())) != len(reader.fieldnames or ()):
                raise UserError(f"{path}: two of its columns have the same name: {reader.fieldnames}")
            for row in reader:
                if None in row or None in row.values():
                    raise UserError(
                        f"{path}, line {reader.line_num}: has not as many cells as the first line"
                    )
                rows.append({name: value or None for name, value in row.items()})  # an empty cell: no value
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8: {error}") from None
    except csv.Error as error:
        raise UserError(f"{path}: is no table of {kind}: {error}") from None
    return rows


def _open_table(path: Path, options: PackOptions, say: Callable[[str], None]) -> _Files:
    if options.classes or options.split:
        raise UserError("--classes and --split are for folders, not for a table")
    rows = _read_rows(path)
    if not rows:
        raise UserError(f"{path}: holds no rows")
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = _choose_columns(path, names, {}, options, say)
    root = os.path.realpath(path.parent)
    items = []
    for number, row in enumerate(rows):
        where = f"{path}, row {number + 1}"
        files: list[tuple[str, str, int, int]] = []
        texts: list[tuple[str, bytes]] = []
        fault = None
        stem = None
        try:
            for name, value in _parts(row, columns, where):
                if isinstance(value, bytes):
                    texts.append((name, value))
                else:
                    stem = stem or _stem(value, root)
                    files.append((name, value, -1, 0))
                    status = _stat_file(root, value, where, options.allow_outside)
                    files[-1] = (name, value, status.st_size, status.st_mtime_ns)
        except Fault as error:
            fault = (error.cause, error.message)
        stem = stem or f"{path.stem}_{number}"
        items.append(_Item(root, where, stem, tuple(files), tuple(texts), fault))
    return _Files(items, [{**_file_facts(path, path.name), "samples": len(items)}], options.allow_outside)


def _stem(path: str, root: str) -> str:
    """What `keys="stem"` makes of a path: without extension, from the root on."""
    if path.startswith(root + "/"):
        path = path[len(root) + 1 :]
    folder, name = posixpath.split(path)
    return posixpath.join(folder, name.rpartition(".")[0] or name)


_Columns = tuple[tuple[str, str], ...]


def _choose_columns(
    table: Path, names: list[str], kinds: Mapping[str, str], options: PackOptions, say: Callable[[str], None]
) -> _Columns:
    """(role or field, column): as asked for, or guessed by the columns' names and kinds, which is said then."""
    unknown = [column for _, column in options.columns if column not in names]
    if unknown:
        raise UserError(
            f"--column: {table} has no column {', '.join(unknown)}; its columns are {', '.join(names)}"
        )
    if options.columns:
        return options.columns
    chosen: list[tuple[str, str]] = []
    for column in names:
        role = kinds.get(column) or _PATH_COLUMNS.get(column.lower())
        if role is None:
            continue
        if any(role == other for other, _ in chosen):
            if column not in kinds:
                continue
            role = re.sub(r"[^a-z0-9_]", "_", column.lower())
        chosen.append((role, column))
    text = next((name for wanted in _TEXT_COLUMNS for name in names if name.lower() == wanted), None)
    if text is not None:
        chosen.append(("text", text))
    if not chosen:
        raise UserError(
            f"{table}: which columns hold what? Give for instance --column image=COLUMN --column text=COLUMN; "
            f"its columns are {', '.join(names)}"
        )
    rest = [name for name in names if all(name != column for _, column in chosen)]
    said = " ".join(f"--column {role}={column}" for role, column in chosen)
    say(f"{table}: taken as {said}" + (f"; {', '.join(rest)} go into json" if rest else ""))
    return tuple(chosen)


def _parts(row: Mapping[str, Any], columns: _Columns, where: str) -> Iterator[tuple[str, str | bytes]]:
    """(field, body as bytes, or path as str) of one row. Raises Fault."""
    used = set()
    captions: list[str] = []
    label: dict[str, Any] = {}
    for role, column in columns:
        used.add(column)
        value = row.get(column)
        if value is None:
            continue
        if role in _TEXTS or role.rpartition(".")[2] in ("txt", "cls", "json"):
            name = _TEXTS.get(role, role)
            if name == "txt":
                captions += [str(text) for text in value] if isinstance(value, list) else [str(value)]
            elif name == "json" and isinstance(value, Mapping):
                label.update(value)
            else:
                text = value if isinstance(value, str) else json.dumps(_plain(value), ensure_ascii=False)
                yield name, text.encode("utf-8", "backslashreplace")
            continue
        body, path = value, None
        if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
            body, path = value.get("bytes"), value.get("path")
            if body is None:
                body = path
        if body is None:
            continue
        if not isinstance(body, str | bytes):
            raise Fault(
                where, "no file", f"column {column} must hold a path or bytes, got {type(body).__name__}"
            )
        if isinstance(body, bytes):
            end = _sniff(body) or (path or "").rpartition(".")[2].lower()
        else:
            end = (
                posixpath.basename(body).rpartition(".")[2].lower() if "." in posixpath.basename(body) else ""
            )
        yield _field(role, end, where, column), body
    rest = {name: value for name, value in row.items() if name not in used and not isinstance(value, bytes)}
    yield from _texts(captions, {**label, **rest}).items()


def _field(role: str, end: str, where: str, column: str) -> str:
    if role not in _ROLES and role.rpartition(".")[2] in _MEDIA | _ARRAYS:
        return role
    if not end or "/" in end:
        raise Fault(
            where,
            "unknown type",
            f"column {column} holds data of a type that neither its first bytes nor a name tell "
            f"(give the field: --column jpg={column})",
        )
    return end if role in _ROLES else f"{role}.{end}"


def _sniff(data: bytes) -> str | None:
    """The extension that the first bytes tell."""
    for magic, end in (
        (b"\xff\xd8\xff", "jpg"),
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"GIF8", "gif"),
        (b"fLaC", "flac"),
        (b"OggS", "ogg"),
        (b"ID3", "mp3"),
        (b"BM", "bmp"),
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
        (b"\x1aE\xdf\xa3", "webm"),
        (b"\x93NUMPY", "npy"),
    ):
        if data.startswith(magic):
            return end
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav", b"AVI ": "avi"}.get(data[8:12])
    if data[4:8] == b"ftyp":
        return {b"avif": "avif", b"M4A ": "m4a", b"qt  ": "mov"}.get(data[8:12], "mp4")
    if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2:  # MPEG audio, layer III
        return "mp3"
    return None


# Parquet and Arrow ---------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Rows that are read together: a row group of Parquet, a record batch of Arrow."""

    path: str
    root: str  # real path of the folder that paths in its columns begin at
    number: int  # in its file
    first_row: int
    num_rows: int
    num_bytes: int


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("reading Parquet and Arrow needs pyarrow: pip install 'mmscale[parquet]'") from None
    return pyarrow


def _open_rows(root: Path, paths: list[Path], options: PackOptions, say: Callable[[str], None]) -> "_Rows":
    arrow = _pyarrow()
    if options.classes:
        raise UserError(
            "--classes is for folders of files; a column of labels goes in by --column label=COLUMN"
        )
    blocks: list[_Block] = []
    facts = []
    schema = None
    real_root = os.path.realpath(root)
    for path in paths:
        try:
            real = os.path.realpath(path)
            if not options.allow_outside and not real.startswith(real_root.rstrip("/") + "/"):
                raise UserError(f"{path} leads out of {root} (--allow-outside reads it all the same)")
            if path.suffix == ".parquet":
                with arrow.parquet.ParquetFile(path) as file:
                    own = file.schema_arrow
                    counts = [
                        (file.metadata.row_group(n).num_rows, file.metadata.row_group(n).total_byte_size)
                        for n in range(file.metadata.num_row_groups)
                    ]
            else:
                batches, own = _arrow_batches(str(path))
                counts = [(len(batch), batch.nbytes) for batch in batches]
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"{path}: can't be read: {str(error).splitlines()[0]}") from None
        if schema is None:
            schema = own
        elif own.names != schema.names:
            raise UserError(f"{path}: its columns are {own.names}, those of {paths[0]} are {schema.names}")
        starts = itertools.accumulate((rows for rows, _ in counts), initial=0)
        blocks += [
            _Block(str(path), real_root, number, first, rows, num_bytes)
            for number, ((rows, num_bytes), first) in enumerate(zip(counts, starts, strict=False))
            if rows
        ]
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        facts.append({**_file_facts(path, name), "samples": sum(rows for rows, _ in counts)})
    if schema is None:
        raise UserError(f"{root}: holds no rows")
    kinds, class_names = _kinds(schema, arrow)
    table = paths[0] if len(paths) == 1 else root
    columns = _choose_columns(table, schema.names, kinds, options, say)
    mapped = {column for _, column in columns}
    lost = [
        name for name in schema.names if name not in mapped and kinds.get(name) in ("file", "image", "audio")
    ]
    if lost:
        say(
            f"{table}: {', '.join(lost)} hold bytes and are left out; --column file=COLUMN takes one of them in"
        )
    labels = [
        class_names[column] for role, column in columns if role in ("label", "cls") and column in class_names
    ]
    return _Rows(blocks, columns, facts, options.allow_outside, labels[0] if labels else [])


def _kinds(schema: Any, arrow: Any) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The roles of the columns that hold media or classes, by their types and by what `datasets` notes of them."""
    noted: dict[str, Any] = {}
    with contextlib.suppress(KeyError, ValueError, TypeError):
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    kinds: dict[str, str] = {}
    class_names: dict[str, list[str]] = {}
    for column in schema:
        note = noted.get(column.name)
        note = note if isinstance(note, dict) else {}  # a list or a struct is noted otherwise
        kind = note.get("_type")
        if kind in ("Image", "Audio", "Video"):
            kinds[column.name] = kind.lower()
        elif kind == "ClassLabel" and isinstance(note.get("names"), list):
            kinds[column.name] = "label"
            class_names[column.name] = note["names"]
        elif (
            (arrow.types.is_struct(column.type) and {"bytes", "path"} <= {part.name for part in column.type})
            or arrow.types.is_binary(column.type)
            or arrow.types.is_large_binary(column.type)
        ):
            kinds[column.name] = "file"
    return kinds, class_names


@functools.lru_cache(maxsize=4)
def _arrow_batches(path: str) -> tuple[list[Any], Any]:
    """The record batches of an Arrow stream or file, mapped into memory, and the schema."""
    arrow = _pyarrow()
    source = arrow.memory_map(path)
    if source.read(6) == b"ARROW1":
        file = arrow.ipc.open_file(source)
        return [file.get_batch(number) for number in range(file.num_record_batches)], file.schema
    source.seek(0)
    stream = arrow.ipc.open_stream(source)
    return list(stream), stream.schema


@dataclass
class _Rows:
    """The rows of Parquet or Arrow files; what is in them is read by the workers."""

    blocks: list[_Block]
    columns: _Columns
    facts: list[dict[str, Any]]
    allow_outside: bool
    class_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._starts = np.cumsum([0, *(block.num_rows for block in self.blocks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def order(self, seed: int | None, samples_per_shard: int) -> np.ndarray:
        """All rows; shuffled, Arrow's one by one. Of Parquet whole row groups have to be read, so their order is
        drawn first, and rows are mixed within windows of so many groups as fill `_WINDOW_SHARDS` shards."""
        if seed is None:
            return np.arange(len(self))
        if not any(block.path.endswith(".parquet") for block in self.blocks):
            return permutation(seed, len(self))
        parts = []
        window: list[np.ndarray] = []
        for place in permutation(seed, len(self.blocks)).tolist():
            window.append(np.arange(self._starts[place], self._starts[place + 1]))
            if sum(map(len, window)) >= _WINDOW_SHARDS * samples_per_shard:
                parts.append(np.concatenate(window))
                window = []
        parts += [np.concatenate(window)] if window else []
        return np.concatenate([part[permutation(seed + n, len(part))] for n, part in enumerate(parts)])

    def sizes(self) -> None:
        return None

    def mean_size(self) -> float:
        headers = 1024 * (len(self.columns) + 1)  # and padding
        return headers + sum(block.num_bytes for block in self.blocks) / len(self)

    def items(self, numbers: list[int]) -> list[Any]:
        places = np.searchsorted(self._starts, numbers, side="right") - 1
        return [
            (self.blocks[place], number - int(self._starts[place]))
            for place, number in zip(places.tolist(), numbers, strict=True)
        ]

    def digest(self, numbers: np.ndarray) -> str:
        return ""  # the files' sizes and times tell a change, and the request the order

    def reader(self) -> Reader:
        return _RowReader(self.columns, self.allow_outside)


@dataclass(frozen=True)
class _RowReader:
    columns: _Columns
    allow_outside: bool

    def read(self, items: list[Any]) -> Iterator[_Read | Fault]:
        for (block, place), row in zip(items, self._rows(items), strict=True):
            where = f"{block.path}, row {block.first_row + place + 1}"
            try:
                yield self._read(block, row, where)
            except Fault as fault:
                yield fault

    def _read(self, block: _Block, row: Mapping[str, Any], where: str) -> _Read:
        fields: dict[str, bytes] = {}
        stem = None
        for name, value in _parts(row, self.columns, where):
            if isinstance(value, str):
                stem = stem or _stem(value, block.root)
                value = _read_file(block.root, value, where, self.allow_outside)
            _add(fields, name, value, where)
        for _, column in self.columns:
            cell = row.get(column)
            if stem is None and isinstance(cell, Mapping) and isinstance(cell.get("path"), str):
                stem = _stem(cell["path"], block.root)
        return stem or f"{Path(block.path).stem}_{where.rpartition(' ')[2]}", where, fields

    def _rows(self, items: list[Any]) -> Iterator[dict[str, Any]]:
        arrow = _pyarrow()
        left: dict[_Block, list[int]] = {}
        for block, place in items:
            left.setdefault(block, []).append(place)
        held: dict[_Block, dict[int, dict[str, Any]]] = {}
        for block, place in items:
            if block.path.endswith(".parquet"):
                if block not in held:
                    with arrow.parquet.ParquetFile(block.path) as file:
                        table = file.read_row_group(block.number, use_threads=False)
                    held[block] = {n: table.slice(n, 1).to_pylist()[0] for n in left[block]}
                yield held[block].pop(place)
            else:
                batches, _ = _arrow_batches(block.path)
                yield batches[block.number].slice(place, 1).to_pylist()[0]


# Pictures ------------------------------------------------------------------------------------------------------


def _resized(where: str, fields: Mapping[str, bytes], size: int) -> dict[str, bytes]:
    """The same fields, with pictures whose shorter side is longer than `size` pixels made smaller, as JPEG."""
    found: dict[str, bytes] = {}
    for name, body in fields.items():
        small = _resize_picture(where, name, body, size) if name in _PICTURES else None
        _add(found, *((name, body) if small is None else ("jpg", small)), where)
    return found


def _resize_picture(where: str, name: str, body: bytes, size: int) -> bytes | None:
    from PIL import Image, ImageOps

    from mmscale.data.decode import MAX_PIXELS

    try:
        with Image.open(io.BytesIO(body)) as picture:
            if (
                min(picture.size) <= size or picture.mode[0] in "IF"
            ):  # JPEG holds no 16 bits: depth stays as it is
                return None
            if picture.width * picture.height > MAX_PIXELS:
                raise Fault(where, "too large", f"its {name} has {picture.width} x {picture.height} pixels")
            scale = size / min(picture.size)
            target = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
            picture.draft("RGB", (2 * target[0], 2 * target[1]))  # JPEG: decode a half, a quarter, an eighth
            profile = picture.info.get("icc_profile") if picture.mode in ("RGB", "RGBA", "L") else None
            orientation = picture.getexif().get(0x0112, 1)
            small: Image.Image = picture
            if picture.mode not in ("RGB", "L"):
                small = picture.convert(
                    "RGBA" if "transparency" in picture.info or "A" in picture.mode else "RGB"
                )
            if small.mode == "RGBA":  # on white, as a page would show it
                ground = Image.new("RGB", small.size, "white")
                ground.paste(small, mask=small.getchannel("A"))
                small = ground
            small = small.resize(target, Image.Resampling.BICUBIC, reducing_gap=3.0)
            if orientation != 1:  # the new file has no EXIF data to say it
                small.getexif()[0x0112] = orientation
                small = ImageOps.exif_transpose(small)
            out = io.BytesIO()
            small.save(out, "JPEG", quality=95, icc_profile=profile)
            return out.getvalue()
    except Fault:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise Fault(where, "undecodable", f"its {name} can't be decoded: {error}") from None
