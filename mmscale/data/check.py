"""Looks through shards for everything that would stop or mislead a training: `mmscale data check SHARDS`.

    report = check("shards", on_fault=lambda fault: print(fault.line()))
    report.num_faults, report.causes          # 2, {"truncated": 1, "undecodable": 1}

Each shard's tar is read header by header, compared with its index and its folder's manifest, and then every
member is decoded in full, by its kind: pictures with all frames, sound to the last sample, JSON, texts, arrays.
All faults are found, not the first one only. Nothing is written but what was asked for: neither shards nor
indexes change.

Decoding happens in a child process, so that a picture that crashes its decoder (or makes it hang) is one more
fault, named with shard, key and field. The trade-off: each body is copied to that child, a small part of the
time that decoding takes. `quick` decodes nothing, and finds what headers and names tell.
"""

import contextlib
import functools
import io
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import stat as stat_module
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmscale.data import schema
from mmscale.data.decode import MAX_BYTES, MAX_SECONDS, PICKLES
from mmscale.data.fields import Field, Source
from mmscale.data.index import (
    Index,
    IndexBuilder,
    _checksum_matches,
    _CutError,
    _LocalReader,
    _members,
    _Reader,
    is_remote,
    load_index,
    shown,
)
from mmscale.data.jobs import JobMap, local_map
from mmscale.data.manifest import MANIFEST_NAME, Urls, expand, list_shards
from mmscale.data.measure import AUDIO_FIELDS, IMAGE_FIELDS, TEXT_FIELDS
from mmscale.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from mmscale.data.storage import Storage

logger = logging.getLogger("mmscale.data")

NUMBERS = frozenset(("cls", "cls2", "index", "inx", "id"))  # one whole number, as text
MAX_FRAMES = 1000  # of an animation
DECODE_TIMEOUT_S = 120.0
_BLOCK = 512


@dataclass(frozen=True)
class Fault:
    """What is wrong with a shard (key and field empty), a sample (field empty) or one field of it.

    cause: one of "missing", "unreadable", "not a tar", "truncated", "damaged", "data after the end", "duplicate
    field", "index", "manifest", "empty", "undecodable", "too large", "refused", "crash", "hang", "missing field".
    """

    shard: str
    key: str
    field: str
    cause: str
    detail: str

    def line(self) -> str:
        """`shard<TAB>key<TAB>field<TAB>cause: detail`, with nothing in it that a terminal would obey."""
        return (
            "\t".join(map(escaped, (self.shard, self.key, self.field)))
            + f"\t{self.cause}: {escaped(self.detail)}"
        )

    def to_json(self) -> dict[str, str | None]:
        """For the quarantine: null where the fault is the whole shard's, or the whole sample's."""
        return {name: value or None for name, value in asdict(self).items()}


@dataclass
class ShardReport:
    """What was found in one shard. notes: what is odd but does no harm, {what: how often}."""

    shard: str
    size: int = 0
    tag: str = ""
    num_samples: int = 0
    num_members: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


@dataclass
class CheckReport:
    """The sum over all shards. causes: {cause: how many faults}. num_resumed: shards that weren't read again."""

    num_shards: int = 0
    num_samples: int = 0
    num_members: int = 0
    num_bytes: int = 0
    num_faults: int = 0
    num_bad_shards: int = 0
    num_resumed: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def to_text(self) -> str:
        lines = [
            f"{self.num_shards:,} shards, {self.num_samples:,} samples, {self.num_members:,} members, "
            f"{self.num_bytes:,} bytes: "
            + (
                f"{self.num_faults:,} faults in {self.num_bad_shards:,} shards"
                if self.num_faults
                else "no fault"
            )
        ]
        lines += [f"  {count:8,}  {cause}" for cause, count in sorted(self.causes.items())]
        lines += [f"  note: {escaped(text)}: {count:,}" for text, count in sorted(self.notes.items())]
        return "\n".join(lines)


def escaped(text: str) -> str:
    """`text` with control characters, ANSI escapes, direction marks and broken UTF-8 as backslash escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


def check(
    urls: Urls,
    *,
    fields: str | None = None,
    quick: bool = False,
    run_jobs: JobMap | None = None,
    resume: str | Path | None = None,
    on_fault: Callable[[Fault], None] | None = None,
    on_shard: Callable[[int], None] | None = None,
    storage: "Storage | None" = None,
    timeout_s: float = DECODE_TIMEOUT_S,
) -> CheckReport:
    """Check all shards that `urls` names. Faults are told in the order of the shards, as they are found.

    fields: "image: jpg|png, text: txt|json.caption, sound?: wav": every sample must have one of each (but for
        those with "?"), and only these are decoded; by default all members are, whose kind is known. What isn't
        decoded (`quick`) isn't looked for inside JSON.
    quick: decode nothing.
    run_jobs: where the work runs, one job a shard; default this machine's processors.
    resume: a file that keeps what was found. Shards that are in it, and haven't changed, aren't read again.
    on_shard: called with the number of shards done, after each.
    timeout_s: a member that takes longer to decode is a fault.

    Raises ConfigError for `fields` that can't be read, ValueError or DataError for `urls` that name nothing.
    """
    wanted = parse_fields(fields) if fields else None
    shards = expand(urls, storage=storage)
    manifests, manifest_faults = _manifests(urls, shards)
    options = json.dumps([fields, quick])
    done = _read_resume(Path(resume), options) if resume is not None else {}
    found: dict[int, ShardReport] = {}
    todo: list[int] = []
    for number, shard in enumerate(shards):
        known = done.get(shown(shard))
        if known is not None and (known.size, known.tag) == _stat(shard, storage):
            found[number] = known
        else:
            todo.append(number)
    report = CheckReport(num_resumed=len(found))
    told = 0
    bad_shards: set[str] = set()
    causes: Counter[str] = Counter()
    notes: Counter[str] = Counter()

    def tell(fault: Fault) -> None:
        causes[fault.cause] += 1
        bad_shards.add(fault.shard)
        if on_fault is not None:
            on_fault(fault)

    def tell_in_order() -> None:
        nonlocal told
        while told in found:
            shard = found.pop(told)
            for fault in shard.faults:
                tell(fault)
            # The manifest isn't kept in the file to resume from: it may change while the shards don't.
            entry = manifests.get(shards[told])
            if entry is not None and not shard.faults and entry != (shard.size, shard.num_samples):
                detail = (
                    f"says {entry[0]:,} bytes and {entry[1]:,} samples, "
                    f"there are {shard.size:,} and {shard.num_samples:,}"
                )
                tell(Fault(shard.shard, "", "", "manifest", detail))
            report.num_shards += 1
            report.num_samples += shard.num_samples
            report.num_members += shard.num_members
            report.num_bytes += shard.size
            notes.update(shard.notes)
            told += 1

    for fault in manifest_faults:
        tell(fault)
    tell_in_order()
    work = functools.partial(check_shard, wanted=wanted, quick=quick, storage=storage, timeout_s=timeout_s)
    with contextlib.ExitStack() as stack:
        log = None
        if resume is not None:
            try:
                log = stack.enter_context(Path(resume).open("ab"))
                log.write(b"\n")  # a run that was killed may have left half a line
            except OSError as error:
                raise UserError(f"--resume {resume}: can't be written: {error.strerror}") from None
        jobs = [shards[number] for number in todo]
        for count, (place, shard_report) in enumerate((run_jobs or local_map())(work, jobs), start=1):
            found[todo[place]] = shard_report
            if log is not None:
                log.write(json.dumps({"options": options, **asdict(shard_report)}).encode() + b"\n")
                log.flush()
            tell_in_order()
            if on_shard is not None:
                on_shard(report.num_resumed + count)
    report.causes, report.notes = dict(causes), dict(notes)
    report.num_faults, report.num_bad_shards = sum(causes.values()), len(bad_shards)
    return report


def write_quarantine(path: str | Path, faults: list[Fault]) -> None:
    """One JSON object a line: shard, key, field, cause, detail."""
    lines = "".join(json.dumps(fault.to_json()) + "\n" for fault in faults)
    temporary = Path(f"{path}.part")
    temporary.write_text(lines, encoding="utf-8")
    temporary.replace(path)


def parse_fields(text: str) -> dict[str, Source]:
    """ "image: jpg|png, sound?: wav" as data. Raises ConfigError that names the part which can't be read."""
    try:
        parsed = schema.parse(text)
    except ValueError as error:
        raise ConfigError(f"--fields: {error}") from None
    return {
        name: Source(0, name, Field("|".join(alternatives).lower(), bytes, choose=True, required=required))
        for name, (alternatives, required) in parsed.items()
    }


# --- one shard ---


def check_shard(
    url: str,
    *,
    wanted: Mapping[str, Source] | None = None,
    quick: bool = False,
    storage: "Storage | None" = None,
    timeout_s: float = DECODE_TIMEOUT_S,
) -> ShardReport:
    """Everything that is wrong with one shard, in the order: structure, index, samples."""
    report = ShardReport(shown(url))
    notes: Counter[str] = Counter()

    def fault(cause: str, detail: str, key: str = "", name: str = "") -> None:
        report.faults.append(
            Fault(report.shard, key, name, cause, detail.removeprefix(f"shard {report.shard}: "))
        )

    try:
        with open_reader(url, storage) as (reader, tag):
            report.size, report.tag = reader.size, tag
            index = _check_structure(url, reader, tag, fault, notes)
            if index is not None:
                _check_sidecar(url, index, bool(report.faults), fault, notes, storage)
                report.num_samples = len(index)
                _check_samples(index, reader, report, wanted, quick, timeout_s, fault, notes)
    except DataError as error:
        fault(getattr(error, "cause", "unreadable"), str(error))
    except OSError as error:
        fault("unreadable", error.strerror or str(error))
    report.notes = dict(notes)
    return report


_Tell = Callable[..., None]


@contextlib.contextmanager
def open_reader(url: str, storage: "Storage | None" = None) -> Iterator[tuple[_Reader, str]]:
    """(what reads bytes of a shard, its tag), local or remote. Raises DataError with `.cause`."""
    if is_remote(url):
        from mmscale.data.index import _RemoteReader
        from mmscale.data.storage import Storage

        storage = storage or Storage()
        stat = storage.stat(url)
        file = storage.open(url, stat)
        try:
            yield _RemoteReader(file, stat.size), stat.tag
        finally:
            file.close()
        return
    try:
        if not stat_module.S_ISREG(os.stat(url).st_mode):  # noqa: PTH116 (opening a pipe would wait for a writer)
            raise _caused("refused", f"shard {url}: not a regular file")
        fd = os.open(url, os.O_RDONLY)
    except FileNotFoundError:
        raise _caused("missing", f"shard {url}: no such file") from None
    except OSError as error:
        raise _caused("unreadable", f"shard {url}: can't be opened: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        yield _LocalReader(fd, status.st_size), str(status.st_mtime_ns)
    finally:
        os.close(fd)


class _Caused(DataError):
    cause: str


def _caused(cause: str, message: str) -> DataError:
    error = _Caused(message)
    error.cause = cause
    return error


class _From:
    """A reader that begins at a later byte of another."""

    def __init__(self, reader: _Reader, start: int) -> None:
        self._reader, self._start = reader, start
        self.size = reader.size - start

    def read(self, offset: int, size: int) -> bytes:
        return self._reader.read(self._start + offset, size)


def _check_structure(url: str, reader: _Reader, tag: str, fault: _Tell, notes: Counter[str]) -> Index | None:
    """Tells what is wrong with the tar; the index of all that can be read of it, None if that is nothing.

    Behind a damaged header the next valid one is looked for, so that one bad block doesn't hide the rest.
    """
    builder = IndexBuilder(url)
    start = 0
    found_fault = False
    while True:
        last = start
        try:
            for name, offset, size in _members(url, _From(reader, start), builder):
                last = start + offset + -(-size // _BLOCK) * _BLOCK
                try:
                    builder.add(name, start + offset, size)
                except DataError as error:
                    key, _, field_name = _split(name)
                    fault("duplicate field", str(error).partition(": ")[2] or str(error), key, field_name)
            break
        except _CutError as error:
            found_fault = True
            key, _, field_name = _split(error.member or "")
            fault("truncated", _moved(str(error), start, reader.size), key, field_name)
            break
        except DataError as error:
            found_fault = True
            cause, text = _structural_cause(str(error)), _moved(str(error), start, reader.size)
            following = _next_header(reader, last + _BLOCK) if cause == "damaged" else None
            if following is not None:
                text += f"; members go on at byte {following}, those between are lost"
            fault(cause, text)
            if following is None:
                break
            start = following
    if builder.num_links:
        notes["links, which are no part of any sample"] += builder.num_links
    try:
        index = builder.make(reader.size, tag)
    except DataError as error:
        text = str(error)
        if not any(other in text for other in ("holds no samples", "appears twice")):
            raise
        if "appears twice" in text:
            fault("duplicate field", text)
        elif not found_fault:  # else that is why there are none
            fault("not a tar", text)
        return None
    if index.interleaved:
        notes["interleaved shards: slow to read, repack"] += 1
    if repeated := len(index) - len(set(index.keys)):
        notes["keys that came before in the same shard"] += repeated
    return index


def _structural_cause(text: str) -> str:
    for words, cause in (
        ("not a tar", "not a tar"),
        ("empty", "not a tar"),
        ("after the end of the archive", "data after the end"),
        ("sparse", "refused"),
    ):
        if words in text:
            return cause
    return "damaged"


def _moved(text: str, start: int, size: int) -> str:
    """An error of the tar's rest, with places counted from the beginning of the shard."""
    if not start:
        return text
    text = re.sub(r"(?<=at byte )\d+", lambda match: str(int(match[0]) + start), text)
    return re.sub(r"(?<=ends at byte )\d+", str(size), text)


def _next_header(reader: _Reader, position: int) -> int | None:
    """The first byte at or after `position` where a valid tar header lies (headers lie at multiples of 512)."""
    chunk_size = 1 << 20
    while position < reader.size:
        chunk = reader.read(position, chunk_size)
        for at in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            block = chunk[at : at + _BLOCK]
            if block[257:262] == b"ustar" and _checksum_matches(block):
                return position + at
        position += chunk_size
    return None


def _split(name: str) -> tuple[str, str, str]:
    folder, slash, base = name.rpartition("/")
    stem, dot, field_name = base.partition(".")
    return folder + slash + stem, dot, field_name.lower()


def _check_sidecar(
    url: str, index: Index, faulty: bool, fault: _Tell, notes: Counter[str], storage: "Storage | None"
) -> None:
    stored, reason = load_index(url, storage=storage)
    if stored is None:
        if reason == "no index yet":
            notes["shards without an index"] += 1
        else:
            fault("index", reason)
    elif not faulty and (len(stored), stored.fingerprint) != (len(index), index.fingerprint):
        fault("index", f"says {len(stored):,} samples and other members, the shard has {len(index):,}")


def _check_samples(
    index: Index,
    reader: _Reader,
    report: ShardReport,
    wanted: Mapping[str, Source] | None,
    quick: bool,
    timeout_s: float,
    fault: _Tell,
    notes: Counter[str],
) -> None:
    isolated = Isolated(timeout_s)
    try:
        for number in range(len(index)):
            key, record = index.key(number), index.record(number)
            members: set[str] = set()
            paths: dict[str, list[list[tuple[str, ...]]]] = {}
            for name, source in (wanted or {}).items():
                places = source.members(record)
                holders = {member for member, _ in places}
                members |= holders
                if not source.spec.required:
                    continue
                if not places:
                    detail = f"none of {source.spec.source}, it has {', '.join(record)}"
                    fault("missing field", detail, key, name)
                elif len(holders) == 1 and all(path for _, path in places):  # nothing else could serve
                    paths.setdefault(places[0][0], []).append([path for _, path in places])
            for name, (offset, size) in record.items():
                report.num_members += 1
                if wanted is not None and name not in members:
                    continue
                last = name.rpartition(".")[2]
                if size == 0:
                    fault("empty", "a member without bytes", key, name)
                elif last in PICKLES:
                    fault("refused", "a pickle: loading it may run any code, so it is never read", key, name)
                elif size > MAX_BYTES:
                    fault("too large", f"{size:,} bytes, at most {MAX_BYTES:,} are decoded", key, name)
                elif quick:
                    continue
                elif not is_known(name):
                    notes[f"members of no known kind, not decoded: {name}"] += 1
                else:
                    body = reader.read(offset, size)
                    if len(body) < size:
                        fault("truncated", f"{len(body):,} of {size:,} bytes could be read", key, name)
                        continue
                    wrong = isolated.call(examine, name, body, paths.get(name, ()))
                    if isinstance(wrong, Crash):
                        fault(wrong.cause, wrong.detail, key, name)
                    elif wrong is not None:
                        fault(wrong[0], wrong[1], key, name)
    finally:
        isolated.close()


# --- one member, decoded ---


def is_known(name: str) -> bool:
    """Whether `examine` can decode members of this field."""
    last = name.rpartition(".")[2]
    return (
        last in IMAGE_FIELDS or last in AUDIO_FIELDS or last in TEXT_FIELDS or last in NUMBERS
        or last in ("json", "jsonl", "npy", "npz")
    )  # fmt: skip


_Paths = Sequence[Sequence[tuple[str, ...]]]


def examine(name: str, body: bytes, paths: _Paths = ()) -> tuple[str, str] | None:
    """(cause, detail) of what is wrong with one member's bytes, None if it decodes in full.

    paths: of each field that only a JSON member can give, the paths inside it of which one must hold a value.
    """
    last = name.rpartition(".")[2]
    try:
        if last in IMAGE_FIELDS:
            _examine_picture(body)
        elif last in AUDIO_FIELDS:
            _examine_sound(body)
        elif last in TEXT_FIELDS:
            body.decode()
        elif last in NUMBERS:
            int(body.decode().strip())
        elif last == "json":
            _examine_json(json.loads(body.decode()), paths)
        elif last == "jsonl":
            for line in body.decode().splitlines():
                json.loads(line)
        elif last == "npy":
            _examine_array(io.BytesIO(body), len(body))
        elif last == "npz":
            _examine_arrays(body)
    except UnicodeDecodeError as error:
        return "undecodable", f"not UTF-8: {error.reason} at byte {error.start}"
    except RecursionError:
        return "undecodable", "nested too deeply"
    except MemoryError:
        return "too large", "doesn't fit into memory"
    except DataError as error:
        return getattr(error, "cause", "undecodable"), str(error)
    except Exception as error:  # decoders raise a dozen types for damaged bytes
        if type(error).__name__ == "DecompressionBombError":  # Pillow's own limit, before it tells the size
            return "too large", _first_line(error)
        return "undecodable", _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    text = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
    return (text.splitlines() or [""])[0][:200]


# libjpeg's warnings about bytes that belong to no picture; all pixels are there.
_HARMLESS = ("extraneous bytes", "Unknown Adobe color transform code", "Inconsistent progression sequence")


def _examine_picture(body: bytes) -> None:
    import simplejpeg
    from PIL import Image

    from mmscale.data.decode import MAX_PIXELS

    warning = ""
    if body[:2] == b"\xff\xd8":
        try:
            height, width = simplejpeg.decode_jpeg_header(body)[:2]
            if 0 < height * width <= MAX_PIXELS:
                simplejpeg.decode_jpeg(body, "RGB", strict=True)
                return
        except ValueError as error:
            warning = str(error)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the limit is checked here, not by Pillow's warning
        with Image.open(io.BytesIO(body)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _caused(
                    "too large", f"{image.width} x {image.height} pixels, at most {MAX_PIXELS:,} are decoded"
                )
            image.load()
            for number in range(1, min(getattr(image, "n_frames", 1), MAX_FRAMES)):
                image.seek(number)
                image.load()
    # Pillow ignores libjpeg's warnings: where data is broken the rest of the picture is grey.
    if warning.startswith("Corrupt JPEG data") and not any(words in warning for words in _HARMLESS):
        raise DataError(warning)


def _examine_sound(body: bytes) -> None:
    import soundfile

    if (missing := _missing(body)) > 0:
        raise DataError(f"cut short: {missing:,} bytes of samples are missing")
    with soundfile.SoundFile(io.BytesIO(body)) as file:
        frames, rate = file.frames, file.samplerate
        known = frames < 1 << 62  # a stream of unknown length says 2**63 - 1
        if known and frames > MAX_SECONDS * rate:
            raise _caused(
                "too large", f"{frames / rate:,.0f} s of sound, at most {MAX_SECONDS:,.0f} are decoded"
            )
        count = 0
        while len(block := file.read(1 << 16, dtype="float32", always_2d=True)):
            if not np.isfinite(block).all():
                raise DataError("values that aren't finite")
            count += len(block)
            if count > MAX_SECONDS * rate:
                raise _caused("too large", f"more than {MAX_SECONDS:,.0f} s of sound")
    if not count:
        raise DataError("a sound file without samples")
    if known and count < frames:
        raise DataError(f"cut short: {count:,} of {frames:,} samples")


def _missing(body: bytes) -> int:
    """Bytes of samples that a container claims beyond the file's end; libsndfile passes over that in silence."""
    if body[:4] == b"RIFF" and body[8:12] == b"WAVE":
        return _missing_of_chunks(body, b"data", "little")
    if body[:4] == b"FORM" and body[8:12] in (b"AIFF", b"AIFC"):
        return _missing_of_chunks(body, b"SSND", "big")
    if body[:4] == b".snd":
        start, size = (int.from_bytes(body[at : at + 4], "big") for at in (4, 8))
        return 0 if size >= _UNKNOWN_SIZE else start + size - len(body)
    at = 0
    while body[at : at + 4] == b"OggS" and at + 27 <= len(
        body
    ):  # a page's header, then the sizes of its parts
        parts = body[at + 27 : at + 27 + body[at + 26]]
        at += 27 + body[at + 26] + sum(parts)
    return at - len(body)


_UNKNOWN_SIZE = 0x7FFFF000  # or more: of a writer to a stream, which can't know


def _missing_of_chunks(body: bytes, name: bytes, order: Literal["little", "big"]) -> int:
    at = 12
    while at + 8 <= len(body):
        size = int.from_bytes(body[at + 4 : at + 8], order)
        if body[at : at + 4] == name:
            return 0 if size >= _UNKNOWN_SIZE else at + 8 + size - len(body)
        at += 8 + size + size % 2
    return 0


def _examine_json(value: Any, paths: _Paths) -> None:
    for alternatives in paths:
        if not any(_holds(value, path) for path in alternatives):
            raise _caused("missing field", f"no value at {'|'.join(map('.'.join, alternatives))}")


def _holds(value: Any, path: tuple[str, ...]) -> bool:
    for step in path:
        if not isinstance(value, dict) or step not in value:
            return False
        value = value[step]
    return value is not None and value != []  # the stream, too, takes these for absent


def _examine_array(file: Any, size: int) -> None:
    """The header is checked by hand first: numpy would allocate whatever it claims."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise _caused("refused", "an array of objects is a pickle: loading it may run any code")
    needed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if needed > there:
        raise DataError(f"an array of shape {shape}, {dtype}, needs {needed:,} bytes, there are {there:,}")


def _examine_arrays(body: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        total = sum(entry.file_size for entry in archive.infolist())
        if total > MAX_BYTES:
            raise _caused("too large", f"{total:,} bytes when unpacked, at most {MAX_BYTES:,} are")
        for entry in archive.infolist():
            with archive.open(entry) as file:
                content = file.read()
            if entry.filename.endswith(".npy"):
                _examine_array(io.BytesIO(content), len(content))


# --- decoders in a process of their own ---


@dataclass(frozen=True)
class Crash:
    """The child died or was ended. cause: "crash" or "hang"."""

    cause: str
    detail: str


class Isolated:
    """Calls functions in a child process: one that crashes or hangs is a `Crash`, and the next has a new child.

        isolated = Isolated(timeout_s=60)
        isolated.call(examine, "jpg", body)      # what the function returns, or a Crash
        isolated.close()

    Functions and values must pickle. The child is forked at the first call, and ends with this process.
    """

    def __init__(self, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: Any = None
        self._connection: Any = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns, or a Crash. Raises what the function raises."""
        if self._process is None:
            self._start()
        try:
            self._connection.send((function, arguments))
            if not self._connection.poll(self._timeout_s):
                self.close()
                return Crash("hang", f"its decoder took more than {self._timeout_s:g} s and was ended")
            returned, value = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.close()
            return Crash("crash", f"its decoder crashed: {_ending(code)}")
        if not returned:
            raise value
        return value

    def close(self) -> None:
        if self._process is None:
            return
        self._connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process = None

    def _start(self) -> None:
        import simplejpeg  # noqa: F401 (once here, not in each child)
        import soundfile  # noqa: F401

        from mmscale.data import decode  # noqa: F401

        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._connection), daemon=True)
        self._process.start()
        theirs.close()


def _serve(connection: Any, other_end: Any) -> None:
    other_end.close()  # else this child would never see that its parent is gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    with contextlib.suppress(Exception):
        import torch

        torch.set_num_threads(1)  # threads of the parent's pool don't live on in a fork
    while True:
        try:
            function, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, error)
        connection.send(answer)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"signal {-code} ({signal.Signals(-code).name})"
        except ValueError:
            return f"signal {-code}"
    return f"exit code {code}"


# --- manifests, and what is done already ---


def _manifests(urls: Urls, shards: list[str]) -> tuple[dict[str, tuple[int, int]], list[Fault]]:
    """{shard: (bytes, samples) that its folder's manifest says}, and where manifest and folder disagree."""
    from mmscale.data.manifest import _from_bytes

    items = [urls] if isinstance(urls, str | os.PathLike) else list(urls)
    folders = [os.fspath(item) for item in items if not is_remote(str(item)) and Path(item).is_dir()]
    entries: dict[str, tuple[int, int]] = {}
    faults: list[Fault] = []
    for folder in folders:
        place = Path(folder) / MANIFEST_NAME
        try:
            data = place.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            faults.append(Fault(str(place), "", "", "manifest", f"can't be read: {error.strerror}"))
            continue
        rows, reason = _from_bytes(data, f"{Path(folder)}/")
        if rows is None:
            faults.append(Fault(str(place), "", "", "manifest", reason))
            continue
        there = {f"{Path(folder)}/{name}" for name in list_shards(folder)}
        for url in sorted(set(rows.urls) - there):
            faults.append(Fault(str(place), "", "", "manifest", f"lists {url}, which isn't in the folder"))
        for url in sorted(there - set(rows.urls)):
            faults.append(Fault(str(place), "", "", "manifest", f"doesn't list {url}"))
        for url, size, num_samples in zip(rows.urls, rows.sizes, rows.num_samples, strict=True):
            entries[url] = (int(size), int(num_samples))
    return {shard: entries[shard] for shard in shards if shard in entries}, faults


def _stat(shard: str, storage: "Storage | None") -> tuple[int, str] | None:
    if is_remote(shard):
        from mmscale.data.storage import Storage

        try:
            found = (storage or Storage()).stat(shard)
        except DataError:
            return None
        return found.size, found.tag
    try:
        status = os.stat(shard)  # noqa: PTH116
    except OSError:
        return None
    return status.st_size, str(status.st_mtime_ns)


def _read_resume(path: Path, options: str) -> dict[str, ShardReport]:
    """{shard: its report} of a run with the same options; a last line that was torn is passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"--resume {path}: can't be read: {error.strerror}") from None
    known = {}
    for line in lines:
        try:
            values = json.loads(line)
            if values.pop("options") == options:
                values["faults"] = [Fault(**values_of_fault) for values_of_fault in values["faults"]]
                known[values["shard"]] = ShardReport(**values)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return known
