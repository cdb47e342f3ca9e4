"""Reading bytes at an offset, from local files, web servers, object stores and whatever fsspec knows.

    storage = Storage(cache_dir=Path("/local/cache"), cache_bytes=100 << 30)
    stat = storage.stat("https://host/shards/000000.tar")
    file = storage.open("https://host/shards/000000.tar", expect=stat)
    file.read(512, 1000)  # exactly 1000 bytes, or StorageError

Local files are read by `pread` on a descriptor, never mapped: a mapped file that is cut kills the process.
http, https, s3, gs and az go through obstore, which takes credentials and endpoints from the environment (AWS_*,
GOOGLE_*, AZURE_*); any other scheme goes through fsspec. Every answer is checked: the bytes
asked for and no others, of an object whose size and etag are what they were.

The trade-off: a remote read blocks its thread and is tried again where that may help, so it costs latency, not a
queue to manage; callers read ahead with threads. All tries of one request together end within three times
`timeout_s`, whatever the server does.
"""

import contextlib
import http.client
import importlib.machinery
import importlib.util
import logging
import os
import re
import stat as stat_module
import tempfile
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol
from urllib.parse import unquote, urlsplit

import tenacity

from mmscale.data.cache import BlockCache
from mmscale.errors import ConfigError, DataError

logger = logging.getLogger("mmscale.data")

MAX_REQUEST = 16 << 20  # bytes; a longer read is several requests, each with its own time limit
MAX_WITHOUT_RANGES = (
    16 << 20
)  # bytes; a server that ignores ranges sends a file whole, and again for each read
_MAX_STORES = 128  # connections are kept for this many hosts and folders
Names = list[str]  # `Storage` has a method of the name list
_REMOTE = re.compile(r"^(?!file://)[A-Za-z][A-Za-z0-9+.-]*://")
_OBSTORE = frozenset(["http", "https", "s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "adl"])
_PLAIN_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TRY_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))


class StorageError(DataError):
    """A file can't be read. `cause`: "missing", "truncated", "changed", "slow", "refused" or "unreadable"."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return StorageError, (str(self), self.cause)


@dataclass(frozen=True)
class Stat:
    """size: bytes. tag: changes with the content; local: time of change in ns; remote: etag, or date, or ""."""

    size: int
    tag: str


class File(Protocol):
    """An open file; threads may share it."""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from byte `offset`. Raises StorageError."""

    def close(self) -> None:
        """To be called when no thread reads any more."""


def is_remote(url: str) -> bool:
    """Whether `url` has a scheme other than file://."""
    return _REMOTE.match(url) is not None


def shown(url: str) -> str:
    """`url` as it may be printed: without user, password and query, which hold secrets."""
    if not is_remote(url):
        return url
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if scheme.lower() in ("http", "https"):
        host, path = host.partition("?")[0], path.partition("#")[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


class _Counters:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values = dict.fromkeys(("bytes_read", "requests", "retries", "bytes_in_flight"), 0)
        self.bytes_local = 0
        _all_counters.add(self)

    def add(self, name: str, count: int) -> None:
        with self.lock:
            self.values[name] += count


_all_counters: "weakref.WeakSet[_Counters]" = weakref.WeakSet()


def _after_fork() -> None:
    global _library_lock
    _library_lock = threading.Lock()
    for counters in list(_all_counters):  # another thread of the parent may have held it
        counters.lock = threading.Lock()
        counters.values["bytes_in_flight"] = 0


class Storage:
    """Opens files by path or URL, and counts what is read; one a process, for all its threads.

    cache_dir, cache_bytes: keep blocks of remote files in this folder of the node, in at most so many bytes, for
        all processes of the node together (see cache.py); 0 reads ranges directly.
    timeout_s: one request may take so long; all tries of it together three times that.
    retries: how often a request is tried again after time-outs, broken connections, short bodies and the
        statuses 408, 425, 429 and 5xx, after pauses that double, with jitter, or as long as the server asks.
    options: for the object stores, as obstore names them (`{"endpoint": ..., "region": ...}`), or for fsspec.

    It pickles: a copy opens its own connections, as does a forked child. Making one touches neither disk nor
    network. Raises ConfigError, when it first reads, for a cache_dir that it must not use.
    """

    def __init__(
        self,
        *,
        cache_dir: Path | None = None,
        cache_bytes: int = 0,
        timeout_s: float = 30.0,
        retries: int = 4,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if cache_bytes < 0 or retries < 0 or not timeout_s > 0:
            raise ValueError(
                "cache_bytes and retries must be at least 0 and timeout_s above 0, got "
                f"cache_bytes={cache_bytes!r}, retries={retries!r}, timeout_s={timeout_s!r}"
            )
        if cache_bytes and cache_dir is None:
            raise ValueError("cache_bytes needs a cache_dir")
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.cache_bytes = cache_bytes
        self.timeout_s = timeout_s
        self.retries = retries
        self.options = dict(options or {})
        self._start()

    def __getstate__(self) -> dict[str, Any]:
        names = ("cache_dir", "cache_bytes", "timeout_s", "retries", "options")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._counters = _Counters()
        self._remote: tuple[int, _Remote] | None = None
        self._cache: BlockCache | None = None
        if self.cache_bytes and self.cache_dir is not None:
            self._cache = BlockCache(self.cache_dir, self.cache_bytes, wait_s=self.timeout_s)
        self._checked: set[str] = set()  # local folders that don't collide with the cache

    def stats(self) -> dict[str, int]:
        """What this process read through this storage so far, and the bytes that it now waits for.

        `bytes_read` come from files and servers (what the cache gives isn't counted), `requests` and `retries`
        are remote ones, `cache_hits` and `cache_misses` count blocks.
        """
        counters, cache = self._counters, self._cache
        with counters.lock:
            found = dict(counters.values)
            found["bytes_read"] += counters.bytes_local
        found["cache_hits"] = cache.hits if cache else 0
        found["cache_misses"] = cache.misses if cache else 0
        return found

    def stat(self, url: str) -> Stat:
        """Size and tag. Raises StorageError."""
        url = str(url)
        if is_remote(url):
            return self._backend().stat(url)
        return _local_stat(_local_path(url))

    def open(self, url: str, expect: Stat | None = None) -> File:
        """Open for reading. A remote file is asked for nothing here if `expect` is given.

        Raises StorageError: "changed" where size or tag differ from `expect`, of a remote file when it is read.
        """
        url = str(url)
        if is_remote(url):
            backend = self._backend()
            return _RemoteFile(self, url, expect or backend.stat(url))
        return self._open_local(_local_path(url), expect)

    def read_all(self, url: str) -> bytes:
        """The whole file. Raises StorageError."""
        url = str(url)
        if is_remote(url):
            stat = self._backend().stat(url)
            return self._backend().read(url, 0, stat.size, stat)
        path = _local_path(url)
        file = self._open_local(path, None)
        try:
            return file.read(0, file.size)
        finally:
            file.close()

    def list(self, url: str) -> Names:
        """All *.tar below a folder, sorted; as paths, or URLs of the same form.

        Raises StorageError, and DataError for web servers, which have no listings.
        """
        url = str(url)
        if is_remote(url):
            return self._backend().list_tars(url)
        folder = Path(_local_path(url))
        if not folder.exists():
            raise StorageError(f"folder {folder} doesn't exist", "missing")
        if not folder.is_dir():
            raise StorageError(f"{folder} is not a folder", "unreadable")
        return sorted(str(path) for path in folder.rglob("*.tar") if path.is_file())

    def prefetch(self, url: str, offset: int, size: int, expect: Stat) -> None:
        """Read a range into the cache, if there is one and the file is remote. Returns when it's in; raises nothing."""
        if self._cache is None or size <= 0 or not is_remote(str(url)):
            return
        with contextlib.suppress(DataError, ConfigError):
            self._read_remote(str(url), offset, size, expect, want=False)

    def _backend(self) -> "_Remote":
        found = self._remote
        if found is None or found[0] != os.getpid():
            found = self._remote = (os.getpid(), _Remote(self))
        return found[1]

    def _read_remote(self, url: str, offset: int, size: int, expect: Stat, *, want: bool = True) -> bytes:
        backend = self._backend()
        if self._cache is None:
            return backend.read(url, offset, size, expect)
        return self._cache.read(
            url,
            expect.size,
            expect.tag,
            offset,
            size,
            lambda start, length: backend.read(url, start, length, expect),
            want=want,
        )

    def _open_local(self, path: str, expect: Stat | None) -> "_LocalFile":
        if self._cache is not None:
            folder = os.path.dirname(path)  # noqa: PTH120
            if folder not in self._checked:
                self._cache.refuse_source(Path(folder))
                self._checked.add(folder)
        fd, status = _open_regular(path)
        found = Stat(status.st_size, str(status.st_mtime_ns))
        if expect is not None and found != expect:
            os.close(fd)
            raise StorageError(_changed(path, expect, found), "changed")
        return _LocalFile(path, fd, found.size, self._counters)


# --- local files ---


def _local_path(url: str) -> str:
    if not url.startswith("file://"):
        return url
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise StorageError(
            f"{url} names the host {parts.netloc!r}: write file:///path, with three slashes", "missing"
        )
    return unquote(url[len("file://") + len(parts.netloc) :])


def _local_error(path: str, error: OSError) -> StorageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return StorageError(f"{path} doesn't exist", "missing")
    cause = "refused" if isinstance(error, PermissionError) else "unreadable"
    return StorageError(f"{path} can't be read: {error.strerror or error}", cause)


def _local_stat(path: str) -> Stat:
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        raise _local_error(path, error) from error
    if not stat_module.S_ISREG(status.st_mode):
        raise StorageError(f"{path} is not a regular file", "unreadable")
    return Stat(status.st_size, str(status.st_mtime_ns))


def _open_regular(path: str) -> tuple[int, os.stat_result]:
    _local_stat(path)  # before opening: that alone wakes whoever waits to write into a FIFO
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _local_error(path, error) from error
    status = os.fstat(fd)
    if not stat_module.S_ISREG(status.st_mode):
        os.close(fd)
        raise StorageError(f"{path} is not a regular file", "unreadable")
    return fd, status


def _changed(path: str, expect: Stat, found: Stat) -> str:
    if found.size != expect.size:
        return f"{path} changed: {found.size} bytes, {expect.size} expected"
    return f"{path} changed: its tag is {found.tag!r}, {expect.tag!r} expected"


class _LocalFile:
    def __init__(self, path: str, fd: int, size: int, counters: _Counters) -> None:
        self.size = size
        self._path, self._fd, self._counters = path, fd, counters

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._fd, size, offset)
            if len(data) != size:  # the kernel gives at most 2 GiB at once
                data = self._read_rest(data, offset, size)
        except OSError as error:
            if self._fd < 0:
                raise ValueError(f"{self._path} is closed") from None
            raise _local_error(self._path, error) from error
        with self._counters.lock:
            self._counters.bytes_local += size
        return data

    def _read_rest(self, data: bytes, offset: int, size: int) -> bytes:
        pieces = [data]
        done = len(data)
        while done < size:
            piece = os.pread(self._fd, size - done, offset + done)
            if not piece:
                now = os.fstat(self._fd).st_size
                raise StorageError(
                    f"{self._path} is truncated: it ends at byte {now}, bytes {offset} to {offset + size} "
                    f"were asked for, and it had {self.size} bytes when it was opened",
                    "truncated",
                )
            pieces.append(piece)
            done += len(piece)
        return b"".join(pieces)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


# --- remote files ---


class _RemoteFile:
    def __init__(self, storage: Storage, url: str, stat: Stat) -> None:
        self._storage, self._url, self._stat = storage, url, stat

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0:
            raise ValueError(f"offset and size must be at least 0, got {offset} and {size}")
        if offset + size > self._stat.size:
            raise StorageError(
                f"{shown(self._url)} is truncated: it ends at byte {self._stat.size}, bytes {offset} to "
                f"{offset + size} were asked for",
                "truncated",
            )
        if not size:
            return b""
        return self._storage._read_remote(self._url, offset, size, self._stat)

    def close(self) -> None:
        """Nothing is held."""


class _RetryableError(Exception):
    """A try failed in a way that may pass. overloaded: the server asked for a pause."""

    def __init__(self, cause: str, detail: str, *, overloaded: bool = False) -> None:
        super().__init__(detail)
        self.cause, self.detail, self.overloaded = cause, detail, overloaded


class _RangesIgnored(Exception):
    """The server answers 200 with everything."""


class _OutOfRange(Exception):
    """The server answers 416."""


class _Remote:
    """Tries requests, until the bytes are right or the time is up."""

    def __init__(self, storage: Storage) -> None:
        self._timeout_s, self._retries = storage.timeout_s, storage.retries
        self._options = storage.options
        self._counters = storage._counters
        self._stores: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._without_ranges: set[str] = set()

    def stat(self, url: str) -> Stat:
        return self._retry(url, lambda deadline: self._stat_once(url, deadline))

    def read(self, url: str, offset: int, size: int, expect: Stat) -> bytes:
        """Any number of bytes, in requests of at most MAX_REQUEST."""
        pieces = []
        for start in range(offset, offset + size, MAX_REQUEST):
            length = min(MAX_REQUEST, offset + size - start)
            self._counters.add("bytes_in_flight", length)
            try:
                pieces.append(self._retry(url, self._read_try(url, start, length, expect), start))
            finally:
                self._counters.add("bytes_in_flight", -length)
            self._counters.add("bytes_read", length)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def list_tars(self, url: str) -> list[str]:
        scheme = _scheme(url)
        if scheme in ("http", "https"):
            raise DataError(
                f"{shown(url)}: web servers have no listing of a folder; give a brace pattern such as "
                "{000000..000099}.tar, or the URL of a manifest"
            )
        base = url.partition("?")[0].rstrip("/")
        found = self._retry(url, lambda deadline: self._list_once(base, deadline))
        return sorted(name for name in found if name.endswith(".tar"))

    def _retry(self, url: str, attempt: Callable[[float], Any], offset: int = 0) -> Any:
        name = shown(url)
        start = time.monotonic()
        last_start = start + 2 * self._timeout_s
        jitter = tenacity.wait_exponential_jitter(multiplier=0.1, max=5.0, jitter=0.1)
        pause = 0.0

        def wait(state: tenacity.RetryCallState) -> float:
            nonlocal pause
            error = state.outcome.exception() if state.outcome else None
            pause = jitter(state)
            if (
                isinstance(error, _RetryableError)
                and error.overloaded
                and state.attempt_number <= self._retries
            ):
                asked = _asked_pause(url, offset, min(self._timeout_s, last_start - time.monotonic()))
                if asked is not None:
                    pause = asked
            return pause

        def before_sleep(state: tenacity.RetryCallState) -> None:
            self._counters.add("retries", 1)

        def stop(state: tenacity.RetryCallState) -> bool:
            return state.attempt_number > self._retries or time.monotonic() + pause > last_start

        def one_try() -> Any:
            self._counters.add("requests", 1)
            return attempt(time.monotonic() + self._timeout_s)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_RetryableError),
            wait=wait,
            stop=stop,
            before_sleep=before_sleep,
            reraise=True,
        )
        try:
            return retrying(one_try)
        except _RetryableError as error:
            tries = retrying.statistics.get("attempt_number", 1)
            raise StorageError(
                f"{name}, from byte {offset}: {error.detail} ({tries} tries in {time.monotonic() - start:.1f} s)",
                error.cause,
            ) from None

    def _stat_once(self, url: str, deadline: float) -> Stat:
        if _scheme(url) not in _OBSTORE:
            return self._fsspec_stat(url, deadline)
        store, path = self._store(url)
        library = _library()
        try:
            # one byte, not HEAD: a URL that is signed for GET allows nothing else
            return self._call(url, lambda: _stat_of(library.get(store, path, options={"range": (0, 1)}).meta))
        except _RangesIgnored:
            with self._lock:
                self._without_ranges.add(url)
        except _OutOfRange:  # an empty file has no first byte
            pass
        self._counters.add("requests", 1)
        return self._call(url, lambda: _stat_of(library.head(store, path)))

    def _read_try(self, url: str, offset: int, size: int, expect: Stat) -> Callable[[float], bytes]:
        if _scheme(url) not in _OBSTORE:
            return lambda deadline: self._fsspec_read(url, offset, size, expect, deadline)
        return lambda deadline: self._read_once(url, offset, size, expect)

    def _read_once(self, url: str, offset: int, size: int, expect: Stat) -> bytes:
        store, path = self._store(url)
        library = _library()
        if url not in self._without_ranges:
            try:
                found, data = self._call(
                    url, lambda: _get(library, store, path, expect, {"range": (offset, offset + size)})
                )
                return self._checked(url, found, data, size, expect)
            except _RangesIgnored:
                with self._lock:
                    self._without_ranges.add(url)
                self._counters.add("requests", 1)
            except _OutOfRange:
                raise StorageError(
                    f"{shown(url)} is truncated: the server has no bytes {offset} to {offset + size}, and "
                    f"{expect.size} bytes were expected",
                    "truncated",
                ) from None
        if expect.size > MAX_WITHOUT_RANGES:
            raise StorageError(
                f"{shown(url)}: the server ignores ranges and would send all {expect.size} bytes for each read; "
                f"that is done up to {MAX_WITHOUT_RANGES >> 20} MiB. Use a server that answers ranges, or copy the "
                "file",
                "refused",
            )
        found, data = self._call(url, lambda: _get(library, store, path, expect, None))
        whole = self._checked(url, found, data, expect.size, expect)
        return whole[offset : offset + size]

    def _checked(self, url: str, found: Stat, data: bytes, size: int, expect: Stat) -> bytes:
        if found.size != expect.size or (expect.tag and found.tag != expect.tag):
            raise StorageError(_changed(shown(url), expect, found), "changed")
        if len(data) != size:
            raise _RetryableError("truncated", f"{len(data)} bytes came of {size}")
        return data

    def _call(self, url: str, function: Callable[[], Any]) -> Any:
        """Run a function of obstore's; its errors say what they are only in their text."""
        try:
            return function()
        except (StorageError, _RetryableError):
            raise
        except Exception as error:
            _translate(url, error, self._timeout_s)

    def _store(self, url: str) -> tuple[Any, str]:
        """obstore's store, and the path in it."""
        scheme, _, rest = url.partition("://")
        scheme = scheme.lower()
        is_http = scheme in ("http", "https")
        if is_http:
            # A whole URL reaches the server as it is, query and all; only plain names share connections.
            base, _, name = url.rpartition("/")
            if not _PLAIN_NAME.fullmatch(name) or base.count("/") < 2 or "?" in base:
                base, name = url, ""
        else:
            base, name = f"{scheme}://{rest.partition('/')[0]}", rest.partition("/")[2]
        with self._lock:
            store = self._stores.get(base)
            if store is not None:
                self._stores.move_to_end(base)
                return store, name
        timeout = timedelta(seconds=self._timeout_s)
        retry = {"max_retries": 0, "retry_timeout": timeout}
        try:
            client: dict[str, Any] = {"timeout": timeout, "connect_timeout": timeout}
            if is_http:
                client["allow_http"] = True
                store = _library()._store.HTTPStore(base, client_options=client, retry_config=retry)
            else:
                config = dict(self._options)
                client.update(_client_settings(scheme), **config.pop("client_options", {}))
                store = _library()._store.from_url(
                    base, config=config or None, client_options=client, retry_config=retry
                )
        except Exception as error:  # obstore has its own classes; the text names the setting
            reason = str(error).split("\n")[0]
            raise StorageError(f"{shown(url)} can't be opened: {_clean(reason, url)}", "unreadable") from None
        with self._lock:
            self._stores[base] = store
            while len(self._stores) > _MAX_STORES:
                self._stores.popitem(last=False)
        return store, name

    def _list_once(self, base: str, deadline: float) -> list[str]:
        if _scheme(base) not in _OBSTORE:
            return self._fsspec_list(base, deadline)
        store, path = self._store(base)
        root = base[: len(base) - len(path)].rstrip("/")

        def walk() -> list[str]:
            found = []
            for chunk in _library().list(store, path or None):
                found += [f"{root}/{meta['path']}" for meta in chunk]
                if time.monotonic() > deadline + self._timeout_s:
                    raise _RetryableError("slow", "the listing takes too long")
            return found

        return self._call(base, walk)

    # fsspec may block for as long as it likes, so its calls run in threads that are left behind.

    def _filesystem(self, url: str) -> tuple[Any, str]:
        import fsspec

        scheme = _scheme(url)
        if scheme not in fsspec.available_protocols():
            raise StorageError(
                f"{shown(url)}: nothing is known that reads {scheme}:// URLs; there are http, https, s3, gs, az and "
                f"those of fsspec ({', '.join(sorted(fsspec.available_protocols()))})",
                "unreadable",
            )
        try:
            filesystem, path = fsspec.core.url_to_fs(url, **self._options)
        except ImportError as error:
            raise StorageError(f"{shown(url)} needs a package: {error}", "unreadable") from None
        return filesystem, path

    def _fsspec(self, url: str, deadline: float, function: Callable[[Any, str], Any]) -> Any:
        name = shown(url)
        try:
            return _bounded(lambda: function(*self._filesystem(url)), deadline - time.monotonic())
        except (StorageError, _RetryableError):
            raise
        except FileNotFoundError:
            raise StorageError(f"{name} doesn't exist", "missing") from None
        except PermissionError:
            raise StorageError(f"{name}: access is refused", "refused") from None
        except TimeoutError:
            raise _RetryableError("slow", f"no answer within {self._timeout_s:g} s") from None
        except Exception as error:  # file systems raise what they like
            raise _RetryableError(
                "unreadable", f"{type(error).__name__}: {_clean(str(error), url)}"
            ) from None

    def _fsspec_stat(self, url: str, deadline: float) -> Stat:
        def look(filesystem: Any, path: str) -> Stat:
            found = filesystem.info(path)
            if found.get("type") == "directory" or found.get("size") is None:
                raise StorageError(f"{shown(url)} is not a regular file", "unreadable")
            tags = (found.get(name) for name in ("ETag", "etag", "mtime", "LastModified", "created"))
            return Stat(int(found["size"]), next((str(tag) for tag in tags if tag), ""))

        return self._fsspec(url, deadline, look)

    def _fsspec_read(self, url: str, offset: int, size: int, expect: Stat, deadline: float) -> bytes:
        found = self._fsspec_stat(url, deadline)
        if found.size != expect.size or (expect.tag and found.tag != expect.tag):
            raise StorageError(_changed(shown(url), expect, found), "changed")
        data = self._fsspec(
            url, deadline, lambda filesystem, path: filesystem.cat_file(path, start=offset, end=offset + size)
        )
        return self._checked(url, found, data, size, expect)

    def _fsspec_list(self, base: str, deadline: float) -> list[str]:
        def walk(filesystem: Any, path: str) -> list[str]:
            return [filesystem.unstrip_protocol(name) for name in filesystem.find(path)]

        return self._fsspec(base, deadline + self._timeout_s, walk)


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _client_settings(scheme: str) -> dict[str, str]:
    """obstore's settings of connections in the environment, which it doesn't read once a time-out is given."""
    prefix = "AWS_" if scheme.startswith("s3") else "GOOGLE_" if scheme == "gs" else "AZURE_"
    names = (
        "allow_http",
        "allow_invalid_certificates",
        "proxy_url",
        "proxy_excludes",
        "proxy_ca_certificate",
    )
    found = {name: os.environ.get(prefix + name.upper()) for name in names}
    return {name: value for name, value in found.items() if value}


def _stat_of(meta: Mapping[str, Any]) -> Stat:
    date = meta["last_modified"]
    # object_store puts 1970 where the server gives no date
    return Stat(meta["size"], meta["e_tag"] or ("" if date.timestamp() == 0 else date.isoformat()))


def _get(
    library: Any, store: Any, path: str, expect: Stat, options: dict[str, Any] | None
) -> tuple[Stat, bytes]:
    result = library.get(store, path, options=options)
    found = _stat_of(result.meta)
    if found.size != expect.size:  # don't read what may be gigabytes
        return found, b""
    return found, bytes(result.bytes())


def _clean(text: str, url: str) -> str:
    text = re.sub(r"//[^/\s@]*@", "//", text.replace(url, shown(url)))
    return re.sub(r"\?[^\s'\"]*", "?...", text)


def _translate(url: str, error: Exception, timeout_s: float) -> NoReturn:
    name, kind, text = shown(url), type(error).__name__, str(error)
    status = re.search(r"status code: (\d{3})", text)
    code = int(status[1]) if status else 0
    if isinstance(error, FileNotFoundError) or kind == "NotFoundError" or code in (404, 410):
        raise StorageError(f"{name} doesn't exist", "missing") from None
    if code == 416:
        raise _OutOfRange from None
    if code in _TRY_AGAIN or code > 499:
        raise _RetryableError(
            "unreadable", f"the server answers {code}", overloaded=code in (429, 503)
        ) from None
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or code in (401, 403, 407):
        raise StorageError(f"{name}: access is refused{f' ({code})' if code else ''}", "refused") from None
    if code:
        raise StorageError(f"{name}: the server answers {code}", "refused") from None
    if kind == "NotSupportedError" and "ange" in text:
        raise _RangesIgnored from None
    if ranges := re.search(r"Requested (\d+)\.\.(\d+), got (\d+)\.\.(\d+)", text):
        start, end, got_start, got_end = map(int, ranges.groups())
        cause = "truncated" if start == got_start and got_end < end else "unreadable"
        raise _RetryableError(
            cause, f"bytes {got_start} to {got_end} came instead of {start} to {end}"
        ) from None
    if re.search(r"TimedOut|kind: Timeout|operation timed out", text):
        raise _RetryableError("slow", f"no whole answer within {timeout_s:g} s") from None
    if "IncompleteBody" in text or "UnexpectedEof" in text or "IncompleteMessage" in text:
        raise _RetryableError("truncated", "the connection ended before the answer did") from None
    raise _RetryableError("unreadable", _clean(text.split("\n")[0], url)) from None


def _asked_pause(url: str, offset: int, limit_s: float) -> float | None:
    """Seconds of a server's Retry-After. obstore doesn't tell the header, so a web server is asked once more."""
    if _scheme(url) not in ("http", "https") or limit_s <= 0:
        return None

    def ask() -> float | None:
        request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-{offset}"})
        try:
            with urllib.request.urlopen(request, timeout=limit_s):
                return 0.0
        except urllib.error.HTTPError as error:
            with error:
                value = error.headers.get("Retry-After", "").strip()
        if value.isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time()) if value else None

    try:
        return _bounded(ask, limit_s)
    except (OSError, ValueError, http.client.HTTPException):  # no answer, or no date
        return None


def _bounded(function: Callable[[], Any], seconds: float) -> Any:
    """function(), in a thread that is left behind with TimeoutError if it takes longer."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.extend((True, function()))
        except BaseException as error:
            result.extend((False, error))

    thread = threading.Thread(target=run, name="mmscale-remote", daemon=True)
    thread.start()
    thread.join(max(0.0, seconds))
    if len(result) != 2:
        raise TimeoutError
    if not result[0]:
        raise result[1]
    return result[1]


# --- obstore ---

_library_lock = threading.Lock()
_loaded: tuple[int, Any] | None = None


def _library() -> Any:
    """obstore's compiled module, good in this process.

    Its threads don't survive a fork, and a call in the child would wait for them for ever. So a child whose
    parent used it loads a second copy, from a file of another identity, as the loader would share the first.
    """
    global _loaded
    found = _loaded
    if found is not None and found[0] == os.getpid():
        return found[1]
    with _library_lock:
        if _loaded is None:
            import obstore._obstore as library
        elif _loaded[0] != os.getpid():
            library = _copy_of(_loaded[1].__file__)
        else:
            library = _loaded[1]
        _loaded = (os.getpid(), library)
        return library


_library_path: str | None = None


def _copy_of(path: str) -> Any:
    global _library_path
    _library_path = _library_path or path
    data = Path(_library_path).read_bytes()
    with contextlib.ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            file: Any = stack.enter_context(os.fdopen(os.memfd_create("obstore"), "wb"))
            source = f"/proc/{os.getpid()}/fd/{file.fileno()}"  # a name never loaded before
        else:
            file = stack.enter_context(tempfile.NamedTemporaryFile(suffix=".so"))
            source = file.name
        file.write(data)
        file.flush()
        loader = importlib.machinery.ExtensionFileLoader("_obstore", source)
        spec = importlib.util.spec_from_file_location("_obstore", source, loader=loader)
        if spec is None:
            raise ImportError("obstore can't be loaded again in a forked process")
        library = importlib.util.module_from_spec(spec)
        loader.exec_module(library)
    return library


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
