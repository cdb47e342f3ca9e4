"""Files read by ranges: local ones, and remote ones from a real server that fails in all the ways servers do."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from web_server import WebServer

from mmscale.data.storage import MAX_WITHOUT_RANGES, Stat, Storage, StorageError, is_remote, shown
from mmscale.errors import ConfigError, DataError

DATA = random.Random(0).randbytes(200_000)
PATH = "/a b/x+1.tar"
URL_PATH = "/a%20b/x+1.tar"
TIMEOUT_S = 0.3
# All tries end within three time-outs; the rest is what a busy machine may take to run this process.
BOUND_S = 3 * TIMEOUT_S + 1.0


@pytest.fixture
def server() -> Iterator[WebServer]:
    with WebServer({PATH: DATA}) as found:
        yield found


def _storage(**options: object) -> Storage:
    return Storage(**{"timeout_s": TIMEOUT_S, "retries": 2, **options})  # type: ignore[arg-type]


def _fails(storage: Storage, url: str, expect: Stat, *, offset: int = 1000, size: int = 500) -> StorageError:
    start = time.monotonic()
    with pytest.raises(StorageError) as caught:
        storage.open(url, expect).read(offset, size)
    assert time.monotonic() - start < BOUND_S
    return caught.value


# --- local ---


def test_local_file_is_read_exactly_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x y.tar"
    path.write_bytes(DATA)
    storage = Storage()
    for url in (str(path), path.as_uri()):
        assert not is_remote(url)
        stat = storage.stat(url)
        assert stat == Stat(len(DATA), str(path.stat().st_mtime_ns))
        file = storage.open(url, stat)
        threads = [
            threading.Thread(target=lambda file=file: [file.read(i, 10) for i in range(500)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert file.read(777, 1234) == DATA[777:2011]
        assert storage.read_all(url) == DATA
    assert storage.stats()["bytes_read"] == 2 * (4 * 500 * 10 + 1234 + len(DATA))
    assert storage.stats()["requests"] == 0


def test_local_file_that_is_cut_while_open_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(DATA)
    file = Storage().open(str(path))
    os.truncate(path, 5000)
    assert file.read(4000, 1000) == DATA[4000:5000]
    with pytest.raises(StorageError, match=r"ends at byte 5000, bytes 4500 to 5500") as caught:
        file.read(4500, 1000)
    assert caught.value.cause == "truncated"


def test_local_file_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(DATA)
    storage = Storage()
    stat = storage.stat(str(path))
    os.utime(path, ns=(0, 12345))
    with pytest.raises(StorageError, match="its tag is '12345'") as caught:
        storage.open(str(path), stat)
    assert caught.value.cause == "changed"
    os.truncate(path, 7)
    with pytest.raises(StorageError, match="7 bytes, 200000 expected"):
        storage.open(str(path), stat)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    storage = Storage()
    for name, cause in (("fifo", "unreadable"), (".", "unreadable"), ("none.tar", "missing")):
        for call in (storage.open, storage.stat, storage.read_all):
            with pytest.raises(StorageError) as caught:
                call(str(tmp_path / name))
            assert caught.value.cause == cause
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.cause, str(copy)) == ("missing", str(caught.value))


def test_local_list(tmp_path: Path) -> None:
    for name in ("b/2.tar", "a.tar", "b/1.tar", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert Storage().list(str(tmp_path)) == [str(tmp_path / name) for name in ("a.tar", "b/1.tar", "b/2.tar")]


# --- a web server ---


def test_http_ranges(server: WebServer) -> None:
    storage = _storage()
    url = server.url(URL_PATH)
    stat = storage.stat(url)
    assert stat.size == len(DATA)
    assert stat.tag.startswith('"')
    assert storage.open(url, stat).read(1000, 500) == DATA[1000:1500]
    assert server.ranges() == [(0, 1), (1000, 1500)]
    assert {request.path for request in server.requests} == {PATH}
    assert storage.read_all(url) == DATA
    stats = storage.stats()
    assert stats["bytes_read"] == 500 + len(DATA)
    assert (stats["requests"], stats["retries"], stats["bytes_in_flight"]) == (4, 0, 0)
    server.files[PATH] = b""
    assert storage.read_all(url) == b""


@pytest.mark.parametrize(
    "fault", ["silent", "stall", "reset", "short", "long", "few", "shifted", "500", "502", "503", "429"]
)
def test_faults_that_pass_are_tried_again(server: WebServer, fault: str) -> None:
    storage = _storage()
    url = server.url(URL_PATH)
    stat = storage.stat(url)
    server.fail(fault)
    start = time.monotonic()
    assert storage.open(url, stat).read(1000, 500) == DATA[1000:1500]
    assert time.monotonic() - start < BOUND_S
    assert storage.stats()["retries"] == 1
    probes = 1 if fault in ("503", "429") else 0  # the one that asks for Retry-After
    assert server.ranges().count((1000, 1500)) == 2
    assert len(server.requests) == 3 + probes


@pytest.mark.parametrize(
    ("fault", "cause", "tries"),
    [
        ("silent", "slow", None),
        ("stall", "slow", None),
        ("reset", "unreadable", 3),
        ("short", "truncated", 3),
        ("long", "truncated", 3),
        ("few", "truncated", 3),
        ("shifted", "unreadable", 3),
        ("500", "unreadable", 3),
        ("503", "unreadable", 3),
        ("403", "refused", 1),
        ("401", "refused", 1),
        ("404", "missing", 1),
        ("416", "truncated", 1),
    ],
)
def test_faults_that_stay_have_a_cause(server: WebServer, fault: str, cause: str, tries: int | None) -> None:
    storage = _storage()
    url = server.url(URL_PATH)
    stat = storage.stat(url)
    server.fail(fault, None)
    error = _fails(storage, url + "?X-Amz-Signature=secret", stat)
    assert error.cause == cause
    assert url in str(error)
    assert "secret" not in str(error)
    asked = server.ranges().count((1000, 1500))
    assert asked == tries if tries else 2 <= asked <= 3
    assert storage.stats()["bytes_in_flight"] == 0


def test_retry_after_is_kept(server: WebServer) -> None:
    storage = _storage(timeout_s=3.0)
    url = server.url(URL_PATH)
    stat = storage.stat(url)
    server.retry_after = "1"
    server.fail("503", 2)  # the request, and the question for the header
    start = time.monotonic()
    assert storage.open(url, stat).read(0, 10) == DATA[:10]
    assert 1.0 <= time.monotonic() - start < 3.0


def test_retry_after_beyond_the_bound_is_not_waited_for(server: WebServer) -> None:
    storage = _storage()
    url = server.url(URL_PATH)
    stat = storage.stat(url)
    server.retry_after = "3600"
    server.fail("429", None)
    assert _fails(storage, url, stat).cause == "unreadable"


def test_nobody_listens(server: WebServer) -> None:
    url = server.url(URL_PATH)
    server.__exit__()
    storage = _storage()
    url = url.replace("//", "//me:password@") + "?sig=secret"
    error = _fails(storage, url, Stat(len(DATA), ""))
    assert error.cause == "unreadable"
    assert "password" not in str(error)
    assert "secret" not in str(error)


def test_changed_between(server: WebServer) -> None:
    storage = _storage()
    url = server.url(URL_PATH)
    stat = storage.stat(url)
    server.tags[PATH] = '"other"'
    error = _fails(storage, url, stat)
    assert error.cause == "changed"
    assert '"other"' in str(error)
    server.files[PATH] = DATA[:-1]
    assert "199999 bytes, 200000 expected" in str(_fails(storage, url, stat))


def test_server_that_ignores_ranges(server: WebServer) -> None:
    server.fail("ignore", None)
    storage = _storage()
    url = server.url(URL_PATH)
    stat = storage.stat(url)
    file = storage.open(url, stat)
    assert file.read(1000, 500) == DATA[1000:1500]
    assert file.read(5, 5) == DATA[5:10]
    big = "/big.tar"
    server.files[big] = bytes(MAX_WITHOUT_RANGES + 1)
    stat = storage.stat(server.url(big))
    error = _fails(storage, server.url(big), stat)
    assert error.cause == "refused"
    assert "ignores ranges" in str(error)


def test_http_has_no_listing(server: WebServer) -> None:
    with pytest.raises(DataError, match="give a brace pattern"):
        _storage().list(server.url("/a%20b"))
    assert not server.requests


def test_secrets_are_not_shown() -> None:
    assert shown("https://me:pw@host:80/a/b.tar?sig=x#y") == "https://host:80/a/b.tar"
    assert shown("s3://bucket/a?b") == "s3://bucket/a"
    assert shown("/a/b?c") == "/a/b?c"


def test_signed_url_reaches_the_server_as_it_is(server: WebServer) -> None:
    query = "X-Amz-Signature=a%2Fb&response=x+y"
    storage = _storage()
    url = f"{server.url(URL_PATH)}?{query}"
    assert storage.open(url).read(3, 4) == DATA[3:7]
    assert {request.query for request in server.requests} == {query}
    assert all(request.method == "GET" for request in server.requests)


def test_forked_child_reads_too(server: WebServer) -> None:
    """obstore's threads are gone after a fork; a call would never return."""
    storage = _storage(timeout_s=5.0)
    url = server.url(URL_PATH)
    code = (
        "import os, sys\n"
        "from mmscale.data.storage import Storage\n"
        "storage = Storage(timeout_s=5.0)\n"
        "def check(): assert storage.open(sys.argv[1]).read(10, 10).hex() == sys.argv[2]\n"
        "check()\n"
        "for depth in range(2):\n"
        "    pid = os.fork()\n"
        "    if pid: sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "    check()\n"
    )
    run = [sys.executable, "-c", code, url, DATA[10:20].hex()]
    assert subprocess.run(run, timeout=30, check=False).returncode == 0
    assert storage.open(url).read(0, 1) == DATA[:1]


# --- object stores and fsspec ---


def test_s3(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {f"/bucket/set/{name}": DATA for name in ("1.tar", "0 a.tar", "0.txt")}
    for name, value in {
        "AWS_ENDPOINT": server.origin,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    storage = _storage()
    urls = storage.list("s3://bucket/set")
    assert urls == ["s3://bucket/set/0 a.tar", "s3://bucket/set/1.tar"]
    for url in urls:
        stat = storage.stat(url)
        assert storage.open(url, stat).read(1000, 500) == DATA[1000:1500]
    assert server.requests[-1].path == "/bucket/set/1.tar"
    server.fail("404")
    assert _fails(storage, urls[0], stat).cause == "missing"


def test_fsspec() -> None:
    fsspec.filesystem("memory").pipe({"/set/0.tar": DATA, "/set/b/1.tar": b"1", "/set/x.txt": b""})
    storage = _storage()
    assert storage.list("memory://set") == ["memory:///set/0.tar", "memory:///set/b/1.tar"]
    stat = storage.stat("memory://set/0.tar")
    file = storage.open("memory://set/0.tar", stat)
    assert file.read(1000, 500) == DATA[1000:1500]
    fsspec.filesystem("memory").pipe("/set/0.tar", DATA[:-1])
    with pytest.raises(StorageError) as caught:
        file.read(1000, 500)
    assert caught.value.cause == "changed"
    with pytest.raises(StorageError, match="nothing is known that reads nosuch:// URLs"):
        storage.stat("nosuch://a")


def test_cache_beside_the_shards_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    path = tmp_path / "shards" / "x.tar"
    path.write_bytes(DATA)
    for folder in ("shards", "shards/cache", "."):
        storage = Storage(cache_dir=tmp_path / folder, cache_bytes=1 << 30)
        with pytest.raises(ConfigError, match="must lie apart"):
            storage.open(str(path))
    assert Storage(cache_dir=tmp_path / "cache", cache_bytes=1 << 30).open(str(path)).read(0, 1) == DATA[:1]
    assert path.read_bytes() == DATA
