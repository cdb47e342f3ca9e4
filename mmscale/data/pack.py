"""Write tar shards: one after another (`ShardWriter`), or a whole generated data set in parallel (`build`).

    with ShardWriter("shards", "train", samples_per_shard=1000) as writer:
        writer.write("000001", {"jpg": jpg_bytes, "txt": b"a red apple"})

A shard is a plain POSIX tar in WebDataset form: the files `KEY.FIELD` of one sample lie next to each other.
The same samples give the same bytes on every machine, since times, owners and modes are fixed. A shard
appears under its name only when all of it is on the disk (temporary name, fsync, rename): whatever has its
name is complete, so a killed run goes on where it stopped. The price is that a killed run loses the shards
it was in.
"""

import contextlib
import errno
import fcntl
import io
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from tqdm import tqdm

from mmscale.data.index import build_index, read_index
from mmscale.errors import DataError, UserError

Fields = Mapping[str, bytes]
Render = Callable[[Any], tuple[str, Fields]]


class ShardWriter:
    """Writes samples to `FOLDER/PREFIX-000000.tar`, `-000001.tar`, ... and each shard's index beside it.

    Use it as a context manager. If the body raises, the shard under way is dropped; complete shards stay.

    Args:
        folder: made if it doesn't exist.
        prefix: what the shards' names begin with.
        samples_per_shard: a new shard begins after that many samples.
        first_shard: number of the first shard.

    Raises:
        DataError: a key or field that a tar shard can't hold, or a full disk; it names shard, key and field.
    """

    def __init__(
        self,
        folder: str | Path,
        prefix: str = "shard",
        *,
        samples_per_shard: int = 1000,
        first_shard: int = 0,
    ) -> None:
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be 1 or more")
        if not prefix or "/" in prefix:
            raise ValueError(f"prefix is {prefix!r}; it must be a file name's beginning, without '/'")
        self.folder = Path(folder)
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.paths: list[Path] = []  # the complete shards
        self.num_samples = 0  # written so far, over all shards
        self._first_shard = first_shard
        self._file: BinaryIO | None = None
        self._tar: tarfile.TarFile | None = None
        self._keys: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._drop()

    @property
    def _path(self) -> Path:
        return shard_path(self.folder, self.prefix, self._first_shard + len(self.paths))

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")

    def write(self, key: str, fields: Fields) -> None:
        """Append one sample: `fields` maps each field's name (`jpg`, `json`, ...) to its bytes."""
        self._check(key, fields)
        try:
            if self._tar is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = self._temporary.open("wb")
                self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
            for field, content in fields.items():
                member = tarfile.TarInfo(
                    f"{key}.{field}"
                )  # mtime, uid and gid are 0, the owner's names empty
                member.size = len(content)
                self._tar.addfile(member, io.BytesIO(content))
        except ValueError as error:  # tarfile's own: the name doesn't fit into a tar header
            raise DataError(f"shard {self._path}, key {key!r}: {error}") from error
        except OSError as error:
            raise _disk_error(self._path, error) from error
        self._keys.add(key)
        self.num_samples += 1
        if len(self._keys) == self.samples_per_shard:
            self.close()

    def close(self) -> None:
        """Complete the shard under way, if there is one: write it out, give it its name, index it."""
        if self._tar is None or self._file is None:
            return
        path, temporary = self._path, self._temporary
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            temporary.replace(path)
            _sync_folder(self.folder)
        except OSError as error:
            raise _disk_error(path, error) from error
        self._tar = self._file = None
        self._keys.clear()
        self.paths.append(path)
        build_index(path)

    def _drop(self) -> None:
        if self._file is not None:
            temporary = self._temporary
            with contextlib.suppress(OSError):  # a full disk: closing flushes, and fails again
                self._file.close()
            temporary.unlink(missing_ok=True)
        self._tar = self._file = None

    def _check(self, key: str, fields: Fields) -> None:
        name = key.rpartition("/")[2]
        if not name or "." in name or key.startswith("/") or "\0" in key:
            raise DataError(
                f"shard {self._path}: {key!r} can't be a sample's key: it needs a last part without '.', "
                "since the first '.' begins the field's name"
            )
        if key in self._keys:
            raise DataError(f"shard {self._path}: key {key!r} was already written")
        if not fields:
            raise DataError(f"shard {self._path}: sample {key!r} has no fields")
        for field in fields:
            if not field or "/" in field or "\0" in field:
                raise DataError(f"shard {self._path}: sample {key!r} has a field named {field!r}")


def shard_path(folder: str | Path, prefix: str, number: int) -> Path:
    """Where a ShardWriter puts shard `number`."""
    return Path(folder) / f"{prefix}-{number:06d}.tar"


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
    todo = sum(len(items) for _, _, items in jobs)
    if not jobs:
        return
    with _Progress(total, done=total - todo, shown=progress) as bar:
        if workers == 1 or len(jobs) == 1:
            for job in jobs:
                _write_shard(out, job, renderer, bar.add)
            return
        # fork: the plan reaches the children without a copy, and a script that calls this needs no main guard
        context = multiprocessing.get_context("fork")
        count = context.Value("q", 0)

        def add() -> None:
            with count.get_lock():
                count.value += 1

        def work(job: _Job) -> None:
            _write_shard(out, job, renderer, add)

        with ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=context, initializer=_start_child, initargs=(work,)
        ) as pool:
            pending = {pool.submit(_run_child, job) for job in jobs}
            try:
                while pending:
                    finished, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                    bar.set(total - todo + count.value)
                    for future in finished:
                        future.result()  # raises what the child raised
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process died, killed from outside or for want of memory; the same command goes "
                    "on with what is left to do, and workers=1 needs the least memory"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_work: Callable[[_Job], None]  # in a child: what it was forked to do


def _start_child(work: Callable[[_Job], None]) -> None:
    global _work
    _work = work
    parent = os.getppid()

    def follow_parent() -> None:  # else a child whose parent is killed waits for work for ever
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _run_child(job: _Job) -> None:
    _work(job)


def _write_shard(
    out: Path, job: _Job, renderer: Callable[[], AbstractContextManager[Render]], add: Callable[[], None]
) -> None:
    split, number, items = job
    writer = ShardWriter(out / split, split, samples_per_shard=len(items), first_shard=number)
    with renderer() as render, writer:
        for item in items:
            writer.write(*render(item))
            add()


class _Progress:
    """A bar on a terminal; elsewhere a plain line every few seconds. On stderr: stdout is for results."""

    def __init__(self, total: int, *, done: int, shown: bool) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, unit=" samples", disable=not (shown and terminal), file=sys.stderr
        )
        self._lines = shown and not terminal
        self._total, self._done = total, done
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self) -> None:
        self.set(self._done + 1)

    def set(self, done: int) -> None:
        self._bar.update(done - self._done)
        self._done = done
        if self._lines and (time.monotonic() - self._last > 10 or done == self._total):
            self._last = time.monotonic()
            print(f"{done} of {self._total} samples", file=sys.stderr, flush=True)


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
