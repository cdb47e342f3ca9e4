"""The manifest: the same samples as the shards' indexes, opened without looking at them, and never a wrong one."""

import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from web_server import WebServer

from mmscale.data import build_index
from mmscale.data.index import sidecar_path
from mmscale.data.jobs import local_map
from mmscale.data.manifest import MANIFEST_NAME, Manifest, expand, index_shards, open_manifest
from mmscale.data.storage import Storage, StorageError
from mmscale.errors import ConfigError, DataError


def write_shard(path: Path, num_samples: int, *, fields: tuple[str, ...] = ("txt", "bin")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in range(num_samples):
            for field in fields:
                info = tarfile.TarInfo(f"{path.stem}-{i}.{field}")
                info.size = 10 + i
                tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five shards of 1, 2, 3, 4, 5 samples; the third has other fields."""
    for i in range(5):
        fields = ("jpg",) if i == 2 else ("txt", "bin")
        write_shard(tmp_path / "shards" / f"{i:06d}.tar", i + 1, fields=fields)
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def all_records(manifest: Manifest) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    shards, numbers = manifest.locate(np.arange(manifest.num_samples))
    found = []
    for shard, number in zip(shards.tolist(), numbers.tolist(), strict=True):
        index = manifest.index(shard)
        found.append((index.key(number), index.record(number)))
    return found


def test_totals_order_and_fingerprint(shards: Path) -> None:
    paths = sorted(shards.glob("*.tar"))
    manifest = open_manifest(shards)
    assert [manifest.urls(i) for i in range(5)] == [str(path) for path in paths]
    assert manifest.starts.tolist() == [0, 1, 3, 6, 10, 15]
    assert (manifest.num_shards, manifest.num_samples) == (5, 15)
    assert manifest.num_bytes == sum(path.stat().st_size for path in paths)
    assert manifest.fields == ["bin", "jpg", "txt"]
    assert manifest.signatures == {("bin", "txt"): 12, ("jpg",): 3}
    digest = hashlib.blake2b(digest_size=16)  # as checkpoints hold it
    expected = []
    for path in paths:
        index = build_index(path)
        digest.update(f"{path.stem}\0{index.fingerprint}\0".encode())
        expected += [(index.key(i), index.record(i)) for i in range(len(index))]
    assert manifest.fingerprint == digest.hexdigest()
    assert all_records(manifest) == expected


def test_second_opening_needs_no_sidecar(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = open_manifest(shards)
    assert caplog.text.count("indexing 5 of 5 shards") == 1
    caplog.clear()
    expected = all_records(first)
    for sidecar in shards.glob("*.index"):
        sidecar.unlink()
    second = open_manifest(shards)
    assert second.fingerprint == first.fingerprint
    assert second.signatures == first.signatures
    assert not caplog.records
    assert not list(shards.glob("*.index"))
    assert all_records(second) == expected
    assert caplog.text.count("again") == 1  # said once for all five
    assert len(list(shards.glob("*.index"))) == 5


def test_all_ways_to_name_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_manifest(shards)
    monkeypatch.chdir(shards)
    for urls in (
        str(shards / "{000000..000004}.tar"),
        sorted(shards.glob("*.tar")),
        shards / MANIFEST_NAME,
        f"file://{shards}",
        ".",
        "{000000..000004}.tar",
    ):
        manifest = open_manifest(urls)
        assert manifest.fingerprint == whole.fingerprint
        assert manifest.signatures == whole.signatures
        assert all_records(manifest) == all_records(whole)
    for sidecar in shards.glob("*.index"):
        sidecar.unlink()
    some = open_manifest([shards / "000003.tar", shards / "000002.tar"])
    assert some.num_samples == 7  # known from the folder's manifest
    assert some.signatures == {("bin", "txt"): 4, ("jpg",): 3}
    assert not list(shards.glob("*.index"))
    other = write_shard(tmp_path / "other" / "a.tar", 2)
    assert open_manifest([other, shards, tmp_path / "other"][:2]).starts.tolist() == [0, 2, 3, 5, 8, 12, 17]
    with pytest.raises(ConfigError, match=r"names 1 shards more than once: .*a\.tar"):
        open_manifest([other, tmp_path / "other"])
    with pytest.raises(ConfigError, match="names no shards"):
        open_manifest([])
    with pytest.raises(ConfigError, match="bad brace pattern"):
        open_manifest("{a.tar")


def test_listing_of_a_folder(tmp_path: Path, shards: Path) -> None:
    """In the order of the paths, as pathlib sorts them; no hidden files, nor Energon's own folder."""
    root = tmp_path / "root"
    for name in ("b.tar", "a-1.tar", "a/z.tar", "a/b/c.tar"):
        write_shard(root / name, 1)
    for name in (".nv-meta/x.tar", ".tmp.tar", "notes.txt", "a.tar.index"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no shard")
    (root / "folder.tar").mkdir()
    assert expand(root) == [str(root / name) for name in ("a/b/c.tar", "a/z.tar", "a-1.tar", "b.tar")]
    assert open_manifest(root).num_samples == 4
    with pytest.raises(DataError, match=r"folder\.tar: holds no shards"):
        expand(root / "folder.tar")


def test_new_and_gone_shards(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_manifest(shards)
    write_shard(shards / "000009.tar", 7)
    (shards / "000000.tar").unlink()
    caplog.clear()
    assert open_manifest(shards).starts.tolist() == [0, 2, 5, 9, 14, 21]
    assert "1 shards are new and 1 are gone" in caplog.text
    caplog.clear()
    assert open_manifest(shards).num_samples == 21
    assert not caplog.records


def test_changed_shard_is_indexed_again_when_opened(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = open_manifest(shards)
    write_shard(shards / "000001.tar", 9)
    caplog.clear()
    second = open_manifest(shards)
    assert second.num_samples == first.num_samples + 7
    assert "000001.tar (the shard changed since it was indexed)" in caplog.text
    assert second.fingerprint != first.fingerprint


def test_shard_that_changes_while_it_is_open_is_refused(shards: Path) -> None:
    manifest = open_manifest(shards)
    write_shard(shards / "000001.tar", 9)
    build_index(shards / "000001.tar")
    with pytest.raises(DataError, match=r"000001\.tar: changed since it was indexed"):
        manifest.index(1)
    # written anew, and its sidecar is still there: found when the shard is opened with what the index expects
    write_shard(shards / "000003.tar", 4)
    with pytest.raises(StorageError, match=r"000003\.tar") as error:
        Storage().open(manifest.urls(3), manifest.index(3).stat)
    assert error.value.cause == "changed"
    (shards / "000004.tar").unlink()
    sidecar_path(shards / "000004.tar").unlink()
    with pytest.raises(DataError, match=r"000004\.tar: no such file"):
        manifest.index(4)
    assert len(manifest.index(0)) == 1


def test_sidecar_of_another_shard_is_refused(shards: Path) -> None:
    """A sidecar that is whole but not the manifest's: as many samples, as many bytes, other names."""
    manifest = open_manifest(shards)
    path = shards / "000001.tar"
    status = path.stat()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"000001-1", b"000001-7"))  # header checksums differ, so write it properly
    with tarfile.open(path, "w") as tar:
        for i in (0, 7):
            for field in ("txt", "bin"):
                info = tarfile.TarInfo(f"000001-{i}.{field}")
                info.size = 10 + min(i, 1)
                tar.addfile(info, io.BytesIO(b"x" * info.size))
    os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    build_index(path)
    with pytest.raises(DataError, match="changed since it was indexed"):
        manifest.index(1)


def test_damaged_manifest_is_made_again(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = open_manifest(shards)
    place = shards / MANIFEST_NAME
    data = place.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    for damaged in (data[:-1], data[: len(data) // 3], b"", b"something else", bytes(flipped), data + b"!"):
        caplog.clear()
        place.write_bytes(damaged)
        with pytest.raises(DataError, match=r"shards\.manifest: it is (no manifest, or )?damaged"):
            open_manifest(place)
        assert open_manifest(shards).fingerprint == whole.fingerprint
        assert caplog.text.count("damaged\n") == 1
        assert place.read_bytes() == data
    place.write_bytes(data.replace(b"mmscale-manifest 1", b"mmscale-manifest 0"))
    open_manifest(shards)
    assert "of another version" in caplog.text


# --- faults ---


def test_every_unusable_shard_is_named(shards: Path) -> None:
    whole = (shards / "000004.tar").read_bytes()
    (shards / "000001.tar").write_bytes(b"no tar" * 1000)
    (shards / "000002.tar").write_bytes(b"")
    (shards / "000004.tar").write_bytes(whole[: 7 * 1024 + 700])
    urls = [*sorted(shards.glob("*.tar")), shards / "nowhere.tar"]
    with pytest.raises(DataError, match=r"^1 of 6 shards don't exist or aren't files: .*nowhere\.tar$"):
        open_manifest(urls)
    with pytest.raises(DataError, match="3 of 5 shards can't be used") as error:
        open_manifest(shards)
    for words in (r"000001.tar: not a tar", "000002.tar: the file is empty", "000004.tar: truncated"):
        assert words in str(error.value)
    assert not (shards / MANIFEST_NAME).exists()
    manifest = open_manifest(urls, on_error="substitute")
    assert [(Path(url).name, cause) for url, cause, _ in manifest.faults] == [
        ("000001.tar", "unreadable"),
        ("000002.tar", "no samples"),
        ("000004.tar", "truncated"),
        ("nowhere.tar", "missing"),
    ]
    # of the cut one samples 0 to 2 are whole, and 3's second member is cut
    assert manifest.starts.tolist() == [0, 1, 5, 8]
    assert [key for key, _ in all_records(manifest)][-3:] == ["000004-0", "000004-1", "000004-2"]
    assert not sidecar_path(shards / "000004.tar").exists()
    assert not (shards / MANIFEST_NAME).exists()
    assert open_manifest(shards, on_error="substitute").num_shards == 3
    assert not (shards / MANIFEST_NAME).exists()  # it would hide the faults the next time
    with pytest.raises(DataError, match="2 of 2 shards can't be used"):
        open_manifest([shards / "000001.tar", shards / "nowhere.tar"], on_error="substitute")


def test_no_more_than_a_hundred_shards_are_listed(tmp_path: Path) -> None:
    for i in range(103):
        (tmp_path / f"{i:03d}.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"103 of 103 shards can't be used") as error:
        open_manifest(tmp_path)
    assert "099.tar" in str(error.value)
    assert "100.tar" not in str(error.value)
    assert "and 3 more" in str(error.value)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user that may not write")
def test_folder_that_cannot_be_written() -> None:
    """Whoever may read only goes on without sidecars and manifest, with one warning for that."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        for i in range(3):
            write_shard(folder / f"{i}.tar", i + 1)
        code = """
import logging, os, sys
import mmscale.data.jobs
from mmscale.data.manifest import open_manifest
logging.basicConfig()
os.setgid(65534); os.setuid(65534)
manifest = open_manifest(sys.argv[1])
print(manifest.num_samples, [len(manifest.index(i)) for i in range(3)])
"""
        done = run_python(code, name)
        assert done.stdout == "6 [1, 2, 3]\n", done.stderr
        assert done.stderr.count("can't keep") == 1
        assert len(list(folder.iterdir())) == 3


def test_two_processes_open_a_fresh_folder_at_once(tmp_path: Path) -> None:
    for i in range(40):
        write_shard(tmp_path / f"{i:02d}.tar", 3)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.SimpleQueue()

    def work() -> None:
        barrier.wait(timeout=30)
        results.put(open_manifest(tmp_path).fingerprint)

    processes = [context.Process(target=work) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    manifest = open_manifest(tmp_path)
    assert found[0] == found[1] == manifest.fingerprint
    assert manifest.signatures == {("bin", "txt"): 120}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {MANIFEST_NAME} | {f"{i:02d}.tar{end}" for i in range(40) for end in ("", ".index")}


# --- size ---


@pytest.mark.slow
def test_a_large_data_set_opens_fast_and_small(tmp_path: Path) -> None:
    """10,000 samples in each of 100,000 shards: a manifest alone, no sidecar, no look at any shard.

    The shards are empty files: whoever looked at one would notice. On a machine in use it took 0.3 s and 60 MB;
    the bounds are what is promised (2 s, 200 MB), with the time tripled for machines that are busy.
    """
    n = 100_000
    names = [f"{i:06d}.tar" for i in range(n)]
    for name in names:
        os.close(os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY))
    prepare = """
import sys
import numpy as np
from mmscale.data.manifest import _Rows, Manifest
folder, n = sys.argv[1], 100_000
rows = _Rows.unknown([f"{folder}/{i:06d}.tar" for i in range(n)])
rows.num_samples[:] = 10_000
rows.sizes[:] = 1 << 30
rows.tags = [str(1_700_000_000_000_000_000 + i) for i in range(n)]
rows.fingerprints[:] = np.random.default_rng(0).integers(0, 256, (n, 16))
rows.signatures = [((("jpg", "txt"), 10_000 - i % 10), (("txt",), i % 10)) for i in range(n)]
Manifest(rows).save(f"{folder}/shards.manifest")
"""
    assert run_python(prepare, str(tmp_path)).returncode == 0
    code = """
import json, os, resource, sys, time
import mmscale.data.manifest as m, tqdm
def rss(name="VmRSS"):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
before = rss()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
start = time.perf_counter()
manifest = m.open_manifest(sys.argv[1])
manifest.fingerprint, manifest.signatures
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "mb": rss("VmHWM") - before, "samples": manifest.num_samples,
    "files": len(os.listdir("/proc/self/fd")), "signatures": {" ".join(k): v for k, v in manifest.signatures.items()},
    "at": [int(x[0]) for x in manifest.locate(__import__("numpy").array([999_999_999]))]}))
"""
    done = run_python(code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["samples"] == 10**9
    assert result["at"] == [99_999, 9_999]
    assert result["signatures"] == {"jpg txt": 10**9 - 450_000, "txt": 450_000}
    assert result["seconds"] < 6
    assert result["mb"] < 200
    assert result["files"] < 20
    assert "shard" not in done.stderr


def test_few_indexes_of_many_are_kept_open(tmp_path: Path) -> None:
    """2,000 sidecars from four threads, with memory for 20 of them."""
    first = write_shard(tmp_path / "shards" / "0000.tar", 50)
    build_index(first)
    for i in range(1, 2000):  # hard links: one file, one time of change, many names
        os.link(first, first.with_name(f"{i:04d}.tar"))
        os.link(sidecar_path(first), first.with_name(f"{i:04d}.tar.index"))
    size = open_manifest(first).index(0).nbytes + 2048
    manifest = open_manifest(tmp_path / "shards", index_bytes=20 * size)
    errors: list[BaseException] = []
    most = 0

    def read(seed: int) -> None:
        nonlocal most
        try:
            for shard in np.random.default_rng(seed).permutation(2000).tolist():
                index = manifest.index(shard)
                assert index.url.endswith(f"{shard:04d}.tar")
                assert index.key(49) == "0000-49"
                most = max(most, manifest._loaded_bytes)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(manifest._loaded) == 20
    assert most <= 21 * size  # one more while room is made for it
    kept = next(reversed(manifest._loaded))
    index = manifest.index(kept)
    for shard in range(40):  # whatever wasn't used for longer goes first
        manifest.index((kept + 1 + shard) % 2000)
        assert manifest.index(kept) is index


# --- arrays ---


def test_locate(shards: Path) -> None:
    manifest = open_manifest(shards)
    samples = np.array([14, 0, 1, 5, 6, 2])
    found, numbers = manifest.locate(samples)
    assert found.tolist() == [4, 0, 1, 2, 3, 1]
    assert numbers.tolist() == [4, 0, 0, 2, 0, 1]
    assert [array.size for array in manifest.locate(np.array([], np.int64))] == [0, 0]
    for outside in (-1, 15):
        with pytest.raises(IndexError):
            manifest.locate(np.array([outside]))


def test_columns(shards: Path) -> None:
    manifest = open_manifest(shards)
    with pytest.raises(DataError, match=r"0\.tar: its index has no column txt\.chars: .*--measure text"):
        manifest.columns("txt.chars", np.arange(3))
    with pytest.raises(ConfigError, match=r"'txt\.length' is no measured column"):
        manifest.columns("txt.length", np.arange(3))
    index_shards([str(shards)], measure=["text"], job_map=local_map(1))
    manifest = open_manifest(shards)
    samples = np.random.default_rng(0).permutation(15)
    shard, number = manifest.locate(samples)
    expected = np.where(shard == 2, np.nan, 10 + number).astype(np.float32)  # shard 2 has pictures only
    values = manifest.columns("txt.chars", samples)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, expected)
    assert manifest.columns("txt.chars", samples[:0]).tolist() == []
    with pytest.raises(DataError, match="--measure text --tokenizer F"):
        manifest.columns("txt.tokens", samples)


# --- remote ---


def serve(folder: Path, *names: str) -> dict[str, bytes]:
    return {f"/d/{path.name}": path.read_bytes() for name in names for path in sorted(folder.glob(name))}


def test_remote_shards_by_pattern(shards: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    local = open_manifest(shards)
    caplog.clear()
    with WebServer(serve(shards, "*.tar")) as server:
        pattern = server.url("/d/{000000..000004}.tar")
        manifest = open_manifest(pattern, storage=Storage(retries=0))
        assert manifest.fingerprint == local.fingerprint
        assert all_records(manifest) == all_records(local)
        assert caplog.text.count("indexing 5 of 5 shards") == 1
        caplog.clear()
        assert open_manifest(pattern, storage=Storage(retries=0)).num_samples == 15
        assert not caplog.records
        del server.files["/d/000003.tar"]
        with pytest.raises(DataError, match=r"000003\.tar"):
            open_manifest(pattern, storage=Storage(retries=0))
        manifest = open_manifest(pattern, storage=Storage(retries=0), on_error="substitute")
        assert [(url[-10:], cause) for url, cause, _ in manifest.faults] == [("000003.tar", "missing")]
        assert manifest.starts.tolist() == [0, 1, 3, 6, 11]


def test_remote_manifest_made_where_the_shards_were_local(shards: Path, home: Path) -> None:
    local = open_manifest(shards)
    with WebServer(serve(shards, "*.tar", "*.index", "*.manifest")) as server:
        for url in (
            server.url("/d"),
            server.url("/d/shards.manifest"),
            server.url("/d/{000000..000004}.tar"),
        ):
            server.requests.clear()
            storage = Storage(retries=0)
            manifest = open_manifest(url, storage=storage)
            assert {request.path for request in server.requests} == {"/d/shards.manifest"}
            assert manifest.fingerprint == local.fingerprint
            assert all_records(manifest) == all_records(local)
            assert manifest.index(0).stat == storage.stat(server.url("/d/000000.tar"))
        assert not home.exists()  # all indexes lie on the server
        server.files["/d/000001.tar"] = write_shard(shards / "x.tar", 40).read_bytes()
        with pytest.raises(DataError, match=r"000001\.tar: changed since it was indexed"):
            open_manifest(server.url("/d"), storage=Storage(retries=0)).index(1)


def test_names_in_a_remote_manifest_stay_remote(shards: Path) -> None:
    """A manifest from the network can't make local files read."""
    manifest = open_manifest(shards)
    manifest._rows.urls[0] = "/etc/passwd"
    manifest.save(shards / MANIFEST_NAME)
    with WebServer(serve(shards, "*.manifest")) as server:
        remote = open_manifest(server.url("/d/shards.manifest"), storage=Storage(retries=0))
        assert remote.urls(0).startswith(server.origin)


# --- indexing on request ---


def test_index_shards(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    first = index_shards([str(shards)], job_map=local_map(2), on_shards=done.append)
    assert (first.num_made, done[-1], first.error()) == (5, 5, None)
    times = {path: path.stat().st_mtime_ns for path in shards.glob("*.index")}
    assert index_shards([str(shards)], job_map=local_map(2)).num_made == 0
    sidecar_path(shards / "000001.tar").unlink()  # as if it had been killed there
    assert index_shards([str(shards)], job_map=local_map(2)).num_made == 1
    again = {path: path.stat().st_mtime_ns for path in shards.glob("*.index")}
    assert {path.name for path in times if times[path] != again[path]} == {"000001.tar.index"}
    assert index_shards([str(shards)], job_map=local_map(2), force=True).num_made == 5
    assert not caplog.records


def test_what_was_measured_stays(shards: Path) -> None:
    index_shards([str(shards)], measure=["text"], job_map=local_map(1))
    second = index_shards([str(shards)], measure=["image"], full_hash=True, job_map=local_map(1))
    assert second.num_made == 5
    index = open_manifest(shards).index(4)
    assert index.columns["txt.chars"].tolist() == [10, 11, 12, 13, 14]
    assert set(index.measured) == {"image", "text"}
    assert index.full_hash is not None
    assert index_shards([str(shards)], measure=["image", "text"], job_map=local_map(1)).num_made == 0


def test_command_line(shards: Path) -> None:
    command = [sys.executable, "-m", "mmscale.cli", "data", "index"]

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
        )

    done = run(shards, "--workers", 2)
    lines = [f"{shards}/{i:06d}.tar: {i + 1} samples" for i in range(5)]
    lines.append(f"{shards}: 15 samples in 5 shards, 0.1 MB; txt 12, bin 12, jpg 3")
    assert sorted(done.stdout.splitlines()[:-1]) == sorted(lines[:-1]), done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{shards}: 15 samples in 5 shards, 0.1 MB; ")
    assert (shards / MANIFEST_NAME).exists()
    (shards / "000001.tar").write_bytes(b"no tar" * 1000)
    (shards / "000002.tar").write_bytes(b"")
    done = run(shards, "--json")
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert [fault["shard"] for fault in report["faults"]] == [
        f"{shards}/000001.tar",
        f"{shards}/000002.tar",
    ]
    assert report["datasets"][0]["num_samples"] == 10
    for name in ("000001.tar", "000002.tar"):
        assert name in done.stderr
