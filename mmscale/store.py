"""Where checkpoints lie: a folder, or a place behind fsspec (`s3://bucket/runs/x`), by the same few calls.

::

    store = open_store("s3://bucket/runs/x")
    size, digest = store.write("step-00000004/config.json", lambda file: file.write(data))
    store.names()                            # what lies directly in it

A folder has renames and fsync, so what is being written has another name until it is whole. Objects have neither: there
the manifest, written last, says that the rest is whole. The trade-off of fsspec: hundreds of services, each as fast and
as strict as its own package; what it raises becomes an OSError here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

Fill = Callable[[Any], object]  # writes into the file that it is given
CHUNK = 4 << 20  # bytes of a read
MANIFEST = "manifest.json"


class Digesting:
    """A file to write into, which counts and digests; it keeps the first error, of which torch.save tells nothing."""

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self.error: Exception | None = None
        self._file, self._sha = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except Exception as error:
            self.error = self.error or error
            raise
        self._sha.update(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def flush(self) -> None:
        pass

    @property
    def result(self) -> tuple[int, str]:
        return self.size, self._sha.hexdigest()


class LocalStore:
    """A folder, of this machine or one that all machines see."""

    is_remote = False
    poll_s = 0.02

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def names(self, name: str = "") -> list[str]:
        """What lies directly in a folder of it; nothing where there is no such folder."""
        try:
            return sorted(path.name for path in (self.folder / name).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def is_complete(self, name: str) -> bool:
        return (self.folder / name).is_dir()

    def staging(self, name: str, nonce: str) -> str:
        """Its name until it is whole, another at each try: what an earlier owner still writes stays apart."""
        return f"{name}.{nonce}.tmp"

    def write(self, name: str, fill: Fill) -> tuple[int, str]:
        """Writes a file to the disk itself; its size and SHA-256."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as raw:
            result = _fill(raw, fill)
            raw.flush()
            os.fsync(raw.fileno())
        return result

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        with (self.folder / name).open("rb") as file:
            yield file

    def size(self, name: str) -> int | None:
        """None where there is no such file."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def commit(self, staging: str, name: str) -> None:
        """Gives what is whole its name, in place of what had it before."""
        source, target = self.folder / staging, self.folder / name
        for path in [*source.rglob("*"), source]:
            if path.is_dir():
                _sync(path)
        before = source.with_suffix(".old.tmp")
        if target.exists():
            target.rename(before)
        source.rename(target)
        _sync(self.folder)
        shutil.rmtree(before, ignore_errors=True)

    def replace(self, name: str, data: bytes) -> None:
        """Replaces a file, whole or not at all."""
        temporary = f"{name}.tmp"
        self.write(temporary, lambda file: file.write(data))
        (self.folder / temporary).rename(self.folder / name)
        _sync(self.folder)

    def remove(self, name: str) -> None:
        """Removes a file or a folder. One that counts loses its name first: a half of it never looks like one."""
        path = self.folder / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
            return
        if not name.endswith(".tmp"):
            path = path.rename(path.with_name(f"{name}.removed.tmp"))
        shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self) -> int | None:
        folder = self.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free


class RemoteStore:
    """What fsspec reaches."""

    is_remote = True
    poll_s = 0.2

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url.rstrip("/")
        try:
            self._fs, root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise OSError(f"{url}: {error}") from None
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self._url

    def place(self, name: str) -> str:
        return f"{self._url}/{name}"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def names(self, name: str = "") -> list[str]:
        with _as_os_error(self.place(name)):
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self._path(name), detail=False)
            except FileNotFoundError:
                return []
            return sorted({path.rstrip("/").rsplit("/", 1)[-1] for path in found} - {""})

    def is_complete(self, name: str) -> bool:
        return self.size(f"{name}/{MANIFEST}") is not None

    def staging(self, name: str, nonce: str) -> str:
        return name

    def write(self, name: str, fill: Fill) -> tuple[int, str]:
        with _as_os_error(self.place(name)):
            self._fs.makedirs(self._path(name).rsplit("/", 1)[0], exist_ok=True)
            with self._fs.open(self._path(name), "wb") as raw:
                return _fill(raw, fill)

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        with _as_os_error(self.place(name)), self._fs.open(self._path(name), "rb") as file:
            yield file

    def size(self, name: str) -> int | None:
        with _as_os_error(self.place(name)):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info.get("type") == "file" else None

    def commit(self, staging: str, name: str) -> None:
        """The manifest is there: it is whole."""

    def replace(self, name: str, data: bytes) -> None:
        self.write(name, lambda file: file.write(data))

    def remove(self, name: str) -> None:
        with _as_os_error(self.place(name)):
            for path in (f"{self._path(name)}/{MANIFEST}", self._path(name)):
                with suppress(FileNotFoundError, NotADirectoryError):
                    self._fs.rm(path, recursive=True)

    def free_bytes(self) -> int | None:
        return None


Store = LocalStore | RemoteStore


def open_store(place: Path | str) -> Store:
    return RemoteStore(place) if isinstance(place, str) and "://" in place else LocalStore(Path(place))


def read(store: Store, name: str) -> bytes:
    with store.reading(name) as file:
        return file.read()


def digest(store: Store, name: str, copy: BinaryIO | None = None) -> str:
    """The SHA-256 of a file, read once; what is read is written into `copy`, too."""
    sha = hashlib.sha256()
    with store.reading(name) as file:
        while chunk := file.read(CHUNK):
            sha.update(chunk)
            if copy is not None:
                copy.write(chunk)
    return sha.hexdigest()


def _fill(raw: BinaryIO, fill: Fill) -> tuple[int, str]:
    file = Digesting(raw)
    try:
        fill(file)
    except RuntimeError:  # what torch makes of a failed write
        if file.error is None:
            raise
        raise file.error from None
    return file.result


@contextmanager
def _as_os_error(place: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # each service has errors of its own
        raise OSError(f"{place}: {type(error).__name__}: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
