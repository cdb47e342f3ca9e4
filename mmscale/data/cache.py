"""Blocks of remote files on a local disk, shared by all processes of a node, in a bounded number of bytes.

    cache = BlockCache(Path("/local/cache"), num_bytes=100 << 30)
    data = cache.read(url, size, tag, offset, length, fetch)  # fetch(offset, length) -> bytes

A block is 4 MiB of one version of one file: its name is a hash of URL, tag, size and number. An index (SQLite) in the
same folder holds who reserved and who used what, when. Space is reserved before a byte is written and freed before
it is given again, so the folder stays within its bound whatever is killed when; of several processes that want a
block one fetches it. A hit needs no index: one open, one read.

The trade-off: a small read fetches a whole block. That pays where neighbours are read soon, or the next epoch.

The folder must be empty or the cache's own. Only files that the index names are ever deleted. To clear it, delete
the folder while nothing runs.
"""

import contextlib
import hashlib
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from mmscale.errors import ConfigError

logger = logging.getLogger("mmscale.data")

BLOCK_BYTES = 4 << 20
_INDEX_BYTES = 256 << 10  # kept free for the index and its journal, beside _ROW_BYTES for each block
_ROW_BYTES = 1024
_HEADER = 32
_MAGIC = b"mmscale-block 1\n"
_MARKER = "mmscale-cache"
_AT_ONCE = 8  # blocks that one read holds in memory and reserves together
_BUSY_S = 10.0
_LOST_S = 600.0  # a reservation made in another container counts as left behind after this

_TABLES = (
    "CREATE TABLE IF NOT EXISTS blocks (name TEXT PRIMARY KEY, charge INTEGER, ready INTEGER, used REAL, owner TEXT, "
    "since REAL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS by_use ON blocks (ready, used)",
    "CREATE TABLE IF NOT EXISTS total (one INTEGER PRIMARY KEY, charge INTEGER)",
    "INSERT OR IGNORE INTO total VALUES (1, 0)",
    "CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON blocks BEGIN "
    "UPDATE total SET charge = charge + NEW.charge; END",
    "CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON blocks BEGIN "
    "UPDATE total SET charge = charge - OLD.charge; END",
)

# SQLite's locks must not be held while a process forks.
_database_lock = threading.Lock()
_all_caches: "weakref.WeakSet[BlockCache]" = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_database_lock.acquire,
        after_in_parent=_database_lock.release,
        after_in_child=_database_lock.release,
    )
    os.register_at_fork(after_in_child=lambda: _renew_locks())  # defined below


def _renew_locks() -> None:
    for cache in list(_all_caches):  # another thread of the parent may have held one
        cache._lock = threading.Lock()


class BlockCache:
    """Blocks of files that `fetch` brings, in `folder`, of at most `num_bytes` with everything that lies there.

    block_bytes: size of a block, the same for all users of the folder. wait_s: how long to wait for a block that
    another process fetches. `hits` and `misses` count blocks that this process read.

    The folder is opened by the first read. Where it can't be written, or the disk is full, reads go on
    without it, after one warning. Raises ConfigError for a folder with files of others.
    """

    def __init__(
        self, folder: Path, num_bytes: int, *, block_bytes: int = BLOCK_BYTES, wait_s: float = 30.0
    ) -> None:
        least = _INDEX_BYTES + _charge(block_bytes)
        if num_bytes < least:
            raise ConfigError(f"a cache needs {least} bytes or more, got {num_bytes}: 0 is no cache")
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100
        self.num_bytes = num_bytes
        self.hits = 0
        self.misses = 0
        self._block_bytes = block_bytes
        self._wait_s = wait_s
        self._salt = os.urandom(16).hex()
        self._is_open = False
        self._off = False
        self._warned: set[str] = set()
        self._lock = threading.Lock()
        self._used: dict[str, float] = {}  # blocks read since the index was last told
        self._verified: dict[str, tuple[int, int, int]] = {}
        _all_caches.add(self)

    def refuse_source(self, source: Path) -> None:
        """Raises ConfigError where the cache's folder is, holds, or lies in the folder `source`."""
        cache, source = self.folder.resolve(), source.resolve()
        if cache.is_relative_to(source) or source.is_relative_to(cache):
            raise ConfigError(
                f"the cache's folder {self.folder} and the shards' folder {source} must lie apart: "
                "give another cache_dir"
            )

    def read(
        self,
        url: str,
        size: int,
        tag: str,
        offset: int,
        length: int,
        fetch: Callable[[int, int], bytes],
        *,
        want: bool = True,
    ) -> bytes:
        """Bytes `offset` to `offset + length` of a file of `size` bytes; with want=False b"", once they're here."""
        if not self._opened():
            return fetch(offset, length) if want else b""
        if not tag:
            self._warn_once(
                "some servers tell no etag and no date: their files are kept in the cache for this process only"
            )
        block = self._block_bytes
        key = f"{url}\0{tag or self._salt}\0{size}\0{block}\0"
        pieces = []
        first, last = offset // block, (offset + length - 1) // block
        for start in range(first, last + 1, _AT_ONCE):
            numbers = range(start, min(start + _AT_ONCE, last + 1))
            names = {
                number: hashlib.blake2b(f"{key}{number}".encode(), digest_size=16).hexdigest()
                for number in numbers
            }
            found = self._read_blocks(names, size, offset, offset + length, fetch)
            if want:
                pieces += [found[number] for number in numbers]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_blocks(
        self, names: dict[int, str], size: int, begin: int, end: int, fetch: Callable[[int, int], bytes]
    ) -> dict[int, bytes]:
        """{number: what bytes `begin` to `end` of the file take of that block}."""
        block = self._block_bytes

        def span(number: int) -> tuple[int, int]:
            return number * block, min(size, (number + 1) * block)

        def load(number: int) -> bytes | None:
            low, high = span(number)
            return self._load(names[number], high - low, max(begin, low) - low, min(end, high) - low)

        found: dict[int, bytes] = {}
        for number in names:
            if (data := load(number)) is not None:
                found[number] = data
        with self._lock:
            self.hits += len(found)
            self.misses += len(names) - len(found)
        missing = [number for number in names if number not in found]
        deadline = time.monotonic() + self._wait_s
        while missing:
            claims = self._claim({names[number]: span(number)[1] - span(number)[0] for number in missing})
            mine = [number for number in missing if claims[names[number]] == "mine"]
            late = time.monotonic() > deadline
            direct = [
                number
                for number in missing
                if (claim := claims[names[number]]) == "none" or (claim != "mine" and late)
            ]
            self._fetch(mine, direct, names, span, begin, end, fetch, found)
            missing = [number for number in missing if number not in found]
            for number in list(missing):
                if (data := load(number)) is not None:
                    found[number] = data
                    missing.remove(number)
            if missing:
                time.sleep(0.02)
        return found

    def _fetch(
        self,
        mine: list[int],
        direct: list[int],
        names: dict[int, str],
        span: Callable[[int], tuple[int, int]],
        begin: int,
        end: int,
        fetch: Callable[[int, int], bytes],
        found: dict[int, bytes],
    ) -> None:
        left = set(mine)
        try:
            for run in _runs(mine):
                start = span(run[0])[0]
                data = fetch(start, span(run[-1])[1] - start)
                for number in run:
                    low, high = span(number)
                    body = data[low - start : high - start]
                    self._store(names[number], body)
                    left.discard(number)
                    found[number] = body[max(begin, low) - low : min(end, high) - low]
            for run in _runs(direct):
                start, stop = max(begin, span(run[0])[0]), min(end, span(run[-1])[1])
                data = fetch(start, stop - start)
                for number in run:
                    low, high = max(begin, span(number)[0]), min(end, span(number)[1])
                    found[number] = data[low - start : high - start]
        finally:
            for number in left:
                self._release(names[number])

    # --- files ---

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}.block"

    def _load(self, name: str, size: int, begin: int, end: int) -> bytes | None:
        """Bytes of a block, or None if it isn't there, or is damaged. Each is checked once by each process."""
        try:
            fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            identity = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._verified.get(name) == identity:
                data = os.pread(fd, end - begin, _HEADER + begin)
                if len(data) != end - begin:
                    return None
            else:
                whole = _pread_all(fd, _HEADER + size + 1)
                body = whole[_HEADER:]
                if len(body) != size or whole[:_HEADER] != _header(name, body):
                    self._drop_damaged(name)
                    return None
                with self._lock:
                    self._verified[name] = identity
                data = body[begin:end]
        except OSError:
            return None
        finally:
            os.close(fd)
        with self._lock:
            self._used[name] = time.time()
        return data

    def _store(self, name: str, body: bytes) -> None:
        """Write a block that is reserved by this thread. Where that fails the cache is left alone from then on."""
        part = f"{self.folder}/{name}.part"
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(_header(name, body))
                file.write(body)
            os.rename(part, self._path(name))  # noqa: PTH104
        except OSError as error:
            self._release(name)
            self._turn_off(error.strerror or str(error))
            return
        try:
            with self._transaction() as database:
                database.execute("UPDATE blocks SET ready = 1, used = ? WHERE name = ?", (time.time(), name))
        except sqlite3.Error as error:
            self._turn_off(str(error))

    # --- the index ---

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with _database_lock:
            # A connection for each transaction: they come with fetches only, and none is there to be forked.
            database = sqlite3.connect(self.folder / "index.sqlite", timeout=_BUSY_S, isolation_level=None)
            try:
                database.execute("PRAGMA journal_mode=TRUNCATE")
                database.execute("PRAGMA synchronous=OFF")  # it needs to outlive processes, not the machine
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        database.execute("ROLLBACK")
                    raise
            finally:
                database.close()

    def _claim(self, sizes: dict[str, int]) -> dict[str, str]:
        """{name: "mine" to fetch and store, "theirs" to wait for, "ready", or "none": there is no room}."""
        if self._off:
            return dict.fromkeys(sizes, "none")
        with self._lock:
            used, self._used = self._used, {}
            if len(self._verified) > 100_000:
                self._verified.clear()
        claims = {}
        me = _identity()
        try:
            with self._transaction() as database:
                database.executemany(
                    "UPDATE blocks SET used = max(used, ?) WHERE name = ?",
                    [(when, name) for name, when in used.items()],
                )
                for name, size in sizes.items():
                    claims[name] = self._claim_one(database, name, _charge(size), me)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                self._turn_off(str(error))
            return dict.fromkeys(sizes, "none")
        except (sqlite3.Error, OSError) as error:
            self._turn_off(str(error))
            return dict.fromkeys(sizes, "none")
        return claims

    def _claim_one(self, database: sqlite3.Connection, name: str, charge: int, me: str) -> str:
        row = database.execute("SELECT ready, owner, since FROM blocks WHERE name = ?", (name,)).fetchone()
        if row is not None:
            ready, owner, since = row
            if ready and os.path.exists(self._path(name)):  # noqa: PTH110
                return "ready"
            if not ready and _is_alive(owner, since):
                return "theirs"
            self._delete(database, name)
        room = self.num_bytes - _INDEX_BYTES - charge
        if _total(database) > room:
            for other, owner, since in database.execute(
                "SELECT name, owner, since FROM blocks WHERE ready = 0"
            ).fetchall():
                if not _is_alive(owner, since):
                    self._delete(database, other)
        while _total(database) > room:
            oldest = database.execute(
                "SELECT name FROM blocks WHERE ready = 1 ORDER BY used LIMIT 1"
            ).fetchone()
            if oldest is None:
                return "none"
            self._delete(database, oldest[0])
        now = time.time()
        database.execute("INSERT INTO blocks VALUES (?, ?, 0, ?, ?, ?)", (name, charge, now, me, now))
        return "mine"

    def _delete(self, database: sqlite3.Connection, name: str) -> None:
        """A block's files, then its row: what a kill in between leaves is a row without a file."""
        for path in (f"{self.folder}/{name}.part", self._path(name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
        database.execute("DELETE FROM blocks WHERE name = ?", (name,))
        with self._lock:
            self._verified.pop(name, None)

    def _release(self, name: str) -> None:
        try:
            with self._transaction() as database:
                if database.execute(
                    "SELECT 1 FROM blocks WHERE name = ? AND ready = 0 AND owner = ?", (name, _identity())
                ).fetchone():
                    self._delete(database, name)
        except (sqlite3.Error, OSError) as error:
            self._turn_off(str(error))

    def _drop_damaged(self, name: str) -> None:
        with contextlib.suppress(sqlite3.Error, OSError), self._transaction() as database:
            if database.execute("SELECT 1 FROM blocks WHERE name = ? AND ready = 1", (name,)).fetchone():
                self._delete(database, name)

    # --- the folder ---

    def _opened(self) -> bool:
        if self._off or self._is_open:
            return not self._off
        with self._lock:
            if self._is_open:
                return True
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                marker = self.folder / _MARKER
                names = sorted(os.listdir(self.folder))  # noqa: PTH208
                if names and not marker.exists():
                    raise ConfigError(
                        f"the cache's folder {self.folder} holds files of others ({', '.join(names[:3])}): "
                        "give an empty folder, or one that doesn't exist"
                    )
                with contextlib.suppress(FileExistsError), marker.open("x") as file:
                    file.write(
                        "Blocks of remote files, kept by mmscale; may be deleted while nothing runs.\n"
                    )
                with self._transaction() as database:
                    for statement in _TABLES:
                        database.execute(statement)
            except (OSError, sqlite3.Error) as error:
                reason = getattr(error, "strerror", None) or str(error)
            else:
                self._is_open = True
                return True
        self._turn_off(reason)
        return False

    def _turn_off(self, reason: str) -> None:
        self._off = True
        self._warn_once(
            f"the cache {self.folder} can't be used ({reason}): remote files are read without it; if the disk isn't "
            "full, delete the folder while nothing runs"
        )

    def _warn_once(self, text: str) -> None:
        with self._lock:
            if text.partition(" (")[0] in self._warned:
                return
            self._warned.add(text.partition(" (")[0])
        logger.warning("%s", text)


def _charge(size: int) -> int:
    """Bytes that a block of `size` bytes may take: whole pages of the disk, and its row."""
    return -(-(_HEADER + size) // 4096) * 4096 + _ROW_BYTES


def _header(name: str, body: bytes) -> bytes:
    return _MAGIC + hashlib.blake2b(body, digest_size=16, key=name.encode()).digest()


def _total(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT charge FROM total").fetchone()[0])


def _pread_all(fd: int, size: int) -> bytes:
    pieces = []
    at = 0
    while at < size and (piece := os.pread(fd, size - at, at)):
        pieces.append(piece)
        at += len(piece)
    return b"".join(pieces)


def _runs(numbers: list[int]) -> list[list[int]]:
    """Neighbours together: [1, 2, 5] -> [[1, 2], [5]]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


# --- who reserved it ---


def _start_time(pid: int) -> str:
    """When a process began, in the kernel's ticks: pids come again, (pid, start) doesn't. "" if it's gone."""
    try:
        # the name in parentheses may hold anything
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def _place() -> str:
    """This boot of this machine, and the space of its pids."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    return ""


def _identity() -> str:
    pid = os.getpid()
    return f"{pid} {_start_time(pid)} {_place()}"


def _is_alive(owner: str, since: float) -> bool:
    pid, start, place = owner.split(" ", 2)
    here = _place()
    if place != here:
        # another container's process can't be seen; one of an earlier boot is gone
        same_boot = place.partition("/")[0] == here.partition("/")[0]
        return same_boot and time.time() - since < _LOST_S
    if not here:
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return _start_time(int(pid)) == start
