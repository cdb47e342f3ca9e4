"""The node's cache of blocks: its bound, kills, damage, and what the server is asked for."""

from __future__ import annotations

import logging
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from web_server import WebServer

from mmscale.data.cache import BlockCache, _charge, _identity, _is_alive
from mmscale.data.storage import Stat, Storage, StorageError
from mmscale.errors import ConfigError

BLOCK = 4 << 20
DATA = random.Random(1).randbytes(2 * BLOCK + 1000)
URL = "/x.tar"


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer({URL: DATA}) as found:
        yield found


def _storage(folder: Path, num_bytes: int = 64 << 20, timeout_s: float = 5.0) -> Storage:
    return Storage(cache_dir=folder, cache_bytes=num_bytes, timeout_s=timeout_s, retries=1)


def _disk_bytes(folder: Path) -> int:
    """What the folder's files take, and at least their lengths; a file may go meanwhile."""
    total = 0
    for name in os.listdir(folder):  # noqa: PTH208
        try:
            status = os.stat(folder / name)  # noqa: PTH116
        except FileNotFoundError:
            continue
        total += max(status.st_size, status.st_blocks * 512)
    return total


def test_blocks_are_fetched_once_and_merged(server: WebServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path / "cache")
    url = server.url(URL)
    stat = storage.stat(url)
    file = storage.open(url, stat)
    server.requests.clear()
    assert file.read(BLOCK + 5, 10) == DATA[BLOCK + 5 : BLOCK + 15]
    assert file.read(BLOCK + 500, 10) == DATA[BLOCK + 500 : BLOCK + 510]
    assert server.ranges() == [(BLOCK, 2 * BLOCK)]
    assert file.read(0, len(DATA)) == DATA
    assert server.ranges()[1:] == [(0, BLOCK), (2 * BLOCK, len(DATA))]
    stats = storage.stats()
    assert (stats["cache_hits"], stats["cache_misses"]) == (2, 3)
    other = _storage(tmp_path / "cache")  # another process would see the same
    assert other.open(url, stat).read(3, BLOCK) == DATA[3 : BLOCK + 3]
    assert len(server.requests) == 3
    fresh = _storage(tmp_path / "fresh")
    assert fresh.open(url, stat).read(1, len(DATA) - 1) == DATA[1:]
    assert server.ranges()[3:] == [(0, len(DATA))]


def test_prefetch_raises_nothing(server: WebServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path / "cache", timeout_s=0.5)
    url = server.url(URL)
    stat = storage.stat(url)
    server.requests.clear()
    storage.prefetch(url, 5, 10, stat)
    assert storage.open(url, stat).read(0, BLOCK) == DATA[:BLOCK]
    assert server.ranges() == [(0, BLOCK)]
    server.fail("404", None)
    storage.prefetch(url, BLOCK, 10, stat)
    storage.prefetch("/nowhere", 0, 10, stat)
    with pytest.raises(StorageError):
        storage.open(url, stat).read(BLOCK, 10)


def test_changed_file_is_other_blocks(server: WebServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path / "cache")
    url = server.url(URL)
    assert storage.open(url).read(0, 5) == DATA[:5]
    server.files[URL] = b"other" + DATA[5:]
    assert storage.open(url).read(0, 5) == b"other"


def test_files_without_a_tag_are_kept_for_this_process(
    server: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.tags[URL] = ""
    storage = _storage(tmp_path / "cache")
    url = server.url(URL)
    stat = storage.stat(url)
    assert stat == Stat(len(DATA), "")
    for _ in range(2):
        assert storage.open(url, stat).read(0, 5) == DATA[:5]
    assert server.ranges().count((0, BLOCK)) == 1
    assert sum("no etag" in record.message for record in caplog.records) == 1
    assert _storage(tmp_path / "cache").open(url, stat).read(0, 5) == DATA[:5]
    assert server.ranges().count((0, BLOCK)) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "swap"])
def test_damaged_block_is_fetched_anew(server: WebServer, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    url = server.url(URL)
    storage = _storage(folder)
    stat = storage.stat(url)
    assert storage.open(url, stat).read(0, len(DATA)) == DATA
    blocks = sorted(path for path in folder.glob("*.block") if path.stat().st_size > BLOCK)
    body = bytearray(blocks[0].read_bytes())
    body[BLOCK // 2] ^= 1
    blocks[0].write_bytes(
        {
            "flip": bytes(body),
            "cut": bytes(body[:-7]),
            "grow": bytes(body) + b"x",
            "swap": blocks[1].read_bytes(),
        }[damage]
    )
    for reader in (storage, _storage(folder)):
        server.requests.clear()
        assert reader.open(url, stat).read(0, len(DATA)) == DATA
        assert len(server.requests) == (1 if reader is storage else 0)


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    size = 100_000
    cache = BlockCache(tmp_path / "c", (256 << 10) + 3 * _charge(size), block_bytes=size)
    fetched: list[int] = []

    def read(number: int) -> None:
        def fetch(offset: int, length: int) -> bytes:
            fetched.append(offset // size)
            return bytes([number]) * length

        assert cache.read("u", 10 * size, "t", number * size, 10, fetch) == bytes([number]) * 10

    for number in (0, 1, 2, 0, 3, 0, 2, 1):
        read(number)
    assert fetched == [0, 1, 2, 3, 1]


def test_unusable_folder_is_done_without(
    server: WebServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    storage = _storage(tmp_path / "file" / "cache")
    url = server.url(URL)
    for _ in range(3):
        assert storage.open(url).read(7, 9) == DATA[7:16]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "remote files are read without it" in caplog.text


def test_foreign_files_are_refused_and_stay(server: WebServer, tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"holiday\.jpg"):
        _storage(tmp_path).open(server.url(URL)).read(0, 1)
    assert os.listdir(tmp_path) == ["holiday.jpg"]  # noqa: PTH208


def test_only_its_own_files_are_deleted(tmp_path: Path) -> None:
    size = 100_000
    cache = BlockCache(tmp_path / "c", (256 << 10) + 2 * _charge(size), block_bytes=size)
    cache.read("u", size, "t", 0, 1, lambda _, length: bytes(length))
    foreign = tmp_path / "c" / ("0" * 32 + ".block")
    foreign.write_bytes(b"not in the index")
    for number in range(20):
        cache.read("u", 30 * size, "t", number * size, 1, lambda _, length: bytes(length))
    assert foreign.read_bytes() == b"not in the index"


def test_secrets_stay_out_of_the_folder(server: WebServer, tmp_path: Path) -> None:
    storage = _storage(tmp_path / "cache")
    assert storage.open(server.url(URL) + "?X-Amz-Signature=0123secret").read(0, 4) == DATA[:4]
    for path in (tmp_path / "cache").iterdir():
        assert b"0123secret" not in path.read_bytes()
        assert "secret" not in path.name


def test_full_disk_goes_on_without(server: WebServer, tmp_path: Path) -> None:
    """The limit on a file's length stands in for a full disk: the same write fails."""
    url = server.url(URL)
    code = (
        "import sys, logging\nfrom pathlib import Path\nfrom mmscale.data.storage import Storage\n"
        "logging.basicConfig(format='%(message)s')\n"
        "storage = Storage(cache_dir=Path(sys.argv[2]), cache_bytes=1 << 26)\n"
        "for _ in range(3): assert len(storage.open(sys.argv[1]).read(0, 9_000_000 - 611_392 - 1000)) == 8387608\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    run = subprocess.run(
        [sys.executable, "-c", code, url, str(tmp_path / "cache")],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("can't be used") == 1
    assert not list((tmp_path / "cache").glob("*.part"))


def test_one_fetches_and_threads_wait(server: WebServer, tmp_path: Path) -> None:
    server.delay_s = 0.2
    storage = _storage(tmp_path / "cache")
    url = server.url(URL)
    stat = storage.stat(url)
    server.requests.clear()
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(storage.open(url, stat).read(10, 10)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [DATA[10:20]] * 6
    assert server.ranges() == [(0, BLOCK)]


_READER = """
import os, sys, random, time
from pathlib import Path
from mmscale.data.cache import BlockCache
folder, num_bytes, seed, seconds, size = sys.argv[1], *map(int, sys.argv[2:])
cache = BlockCache(Path(folder), num_bytes, block_bytes=size, wait_s=1.0)
rng = random.Random(seed)
def content(offset, length):
    first = offset // 8
    text = b"".join(i.to_bytes(8, "little") for i in range(first, (offset + length) // 8 + 1))
    return text[offset - first * 8:][:length]
def fetch(offset, length):
    print(offset // size, flush=True)
    time.sleep(0.003)
    return content(offset, length)
end = time.time() + seconds
while time.time() < end:
    offset = rng.randrange(39 * size)
    length = rng.randrange(1, size)
    assert cache.read("u", 40 * size, "t", offset, length, fetch) == content(offset, length), offset
print("hits", cache.hits)
"""


def _readers(
    count: int, folder: Path, num_bytes: int, seconds: int, size: int
) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", _READER, str(folder), *map(str, (num_bytes, seed, seconds, size))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(count)
    ]


@pytest.mark.chaos
def test_bound_holds_while_processes_are_killed(tmp_path: Path) -> None:
    size = 64 << 10
    folder = tmp_path / "cache"
    num_bytes = (256 << 10) + 10 * _charge(size)
    readers = _readers(8, folder, num_bytes, 4, size)
    largest = 0
    samples = 0
    start = time.monotonic()
    victims = list(readers[:4])
    while any(reader.poll() is None for reader in readers[4:]):
        if victims and time.monotonic() - start > 2 + 0.3 * (4 - len(victims)):
            victims.pop().kill()
        if folder.exists():
            largest = max(largest, _disk_bytes(folder))
            samples += 1
        time.sleep(0.001)
    for reader in readers:
        out, err = reader.communicate()
        if reader in readers[:4]:
            assert reader.returncode == -signal.SIGKILL
        else:
            assert reader.returncode == 0, err
            assert "Warning" not in err
            assert int(out.rpartition("hits")[2]) > 0
    assert samples > 100
    assert 5 * size < largest <= num_bytes
    # what the killed had reserved is given again
    cache = BlockCache(folder, num_bytes, block_bytes=size)
    for number in range(10):
        cache.read("v", 40 * size, "t", number * size, 1, lambda _, length: bytes(length))
    assert not list(folder.glob("*.part"))
    assert len(list(folder.glob("*.block"))) == 10


@pytest.mark.chaos
def test_reservation_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    size = 64 << 10
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom mmscale.data.cache import BlockCache\n"
        f"cache = BlockCache(Path(sys.argv[1]), 1 << 20, block_bytes={size})\n"
        "def fetch(offset, length):\n    print('fetching', flush=True)\n    time.sleep(60)\n"
        f"cache.read('u', {size}, 't', 0, 1, fetch)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "c")], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "fetching\n"
    cache = BlockCache(tmp_path / "c", 1 << 20, block_bytes=size, wait_s=0.3)
    start = time.monotonic()
    assert cache.read("u", size, "t", 0, 1, lambda _, length: bytes(length)) == b"\0"
    assert 0.3 <= time.monotonic() - start < 3  # it waited, then read for itself
    assert not list((tmp_path / "c").glob("*.block"))
    child.kill()
    child.wait()
    start = time.monotonic()
    assert cache.read("u", size, "t", 0, 1, lambda _, length: bytes(length)) == b"\0"
    assert time.monotonic() - start < 0.3
    assert len(list((tmp_path / "c").glob("*.block"))) == 1


def test_a_reused_pid_is_another_process() -> None:
    pid, start, place = _identity().split(" ", 2)
    now = time.time()
    assert _is_alive(f"{pid} {start} {place}", now)
    assert not _is_alive(f"{pid} {int(start) - 1} {place}", now)
    boot, space = place.split("/", 1)
    assert not _is_alive(f"{pid} {start} another-boot/{space}", now)
    assert _is_alive(f"{pid} {start} {boot}/another-container", now)
    assert not _is_alive(f"{pid} {start} {boot}/another-container", now - 3600)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not _is_alive(f"{child.pid} {start} {place}", now)
