"""Faults of shards through a stream: a real server that misbehaves, files that are cut, changed and gone.

Each ends in the right bytes after retries, in a sample that is replaced and counted exactly, or in an error in
words, within a bound of time.
"""

import itertools
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from web_server import WebServer

from mmscale.data import Batch, DataError, Field, ShardStream
from mmscale.data.pack import ShardWriter
from mmscale.data.storage import Storage

NUM_SHARDS, PER_SHARD = 3, 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of twenty samples: {bin: 1,000 bytes of the number, txt: the number}."""
    with ShardWriter(tmp_path / "shards", "s", samples_per_shard=PER_SHARD) as writer:
        for i in range(NUM_SHARDS * PER_SHARD):
            writer.write(f"{i:03d}", {"bin": bytes([i]) * 1000, "txt": f"{i}".encode()})
    return tmp_path / "shards"


@pytest.fixture
def server(folder: Path) -> Any:
    files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with WebServer(files) as running:
        yield running


FIELDS = {"bin": Field("bin", bytes), "number": Field("txt", int)}


def remote(server: WebServer, tmp_path: Path, *, cache: bool = True, **options: Any) -> ShardStream:
    storage = Storage(
        cache_dir=tmp_path / "cache" if cache else None,
        cache_bytes=1 << 28 if cache else 0,
        timeout_s=options.pop("timeout_s", 1.0),
        retries=options.pop("retries", 2),
    )
    urls = options.pop("urls", server.url("/s-{000000..000002}.tar"))
    return ShardStream(urls, storage=storage, **{"batch_size": 6, "fields": FIELDS, **options})


def local(folder: Path, **options: Any) -> ShardStream:
    return ShardStream(folder, **{"batch_size": 6, "fields": FIELDS, "order": "window", **options})


def contents(batches: list[Batch]) -> list[tuple[str, int, bytes]]:
    return [row for b in batches for row in zip(b.sample_keys, b["number"], b["bin"], strict=True)]


@pytest.mark.parametrize("cache", [True, False])
def test_remote_shards_give_the_same_samples_as_local_ones(
    server: WebServer, folder: Path, tmp_path: Path, cache: bool
) -> None:
    stream = remote(server, tmp_path, cache=cache, epochs=3)  # which reads the headers, for want of an index
    server.requests.clear()
    assert stream.state_dict()["order"] == "window"
    found = contents(list(stream))
    assert found == contents(list(local(folder, epochs=3)))
    assert all(body == bytes([number]) * 1000 for _, number, body in found)
    state = local(folder, epochs=3).state_dict()
    stream.load_state_dict(state)  # the same data in another place
    bodies = [r for r in server.requests if r.method == "GET" and r.path.endswith(".tar")]
    if cache:  # each shard is one block, read once however often its samples come
        assert max(Counter(r.path for r in bodies).values()) <= 2, bodies
    else:
        assert len(bodies) >= 3 * 60


@pytest.mark.parametrize(
    "kind", ["500", "503", "429", "silent", "stall", "reset", "short", "long", "few", "shifted"]
)
def test_a_server_that_fails_for_a_while(server: WebServer, folder: Path, tmp_path: Path, kind: str) -> None:
    stream = remote(server, tmp_path, cache=False, timeout_s=0.5, retries=4)
    first = next(stream)
    server.fail(kind, times=1 if kind in ("silent", "stall") else 2)
    begin = time.monotonic()
    found = contents([first, *stream])
    assert time.monotonic() - begin < 30
    assert found == contents(list(local(folder)))
    assert stream.faults == {}


@pytest.mark.parametrize(
    ("kind", "cause"), [("404", "shard missing"), ("403", "shard refused"), ("stall", "shard slow")]
)
def test_a_shard_that_fails_for_good_is_replaced_and_counted(
    server: WebServer, folder: Path, tmp_path: Path, kind: str, cause: str
) -> None:
    """One shard of three goes bad after it was indexed; every one of its samples has a stand-in, counted once."""
    with WebServer(server.files) as other:
        urls = [server.url("/s-000000.tar"), other.url("/s-000001.tar"), server.url("/s-000002.tar")]
        options = {
            "timeout_s": 0.1,
            "retries": 0,
            "on_error": "substitute",
            "error_budget": 1.0,
            "urls": urls,
        }
        streams = [
            remote(server, tmp_path, cache=False, threads=8, rank=rank, world_size=world_size, **options)
            for rank, world_size in ((0, 1), (0, 2), (1, 2))
        ]
        # Opens every index, as a run has that meets the fault later on.
        keys = next([stream.keys(step) for step in range(10)] for stream in streams)
        if kind == "404":
            other.files.clear()
        else:
            other.fail(kind, times=None)
        stream = streams[0]
        batches = list(stream)
        halves = [[batch["number"] for batch in half] for half in streams[1:]]
    expected = [row for row, key in enumerate(itertools.chain(*keys)) if key.startswith("s-000001")]
    assert len(expected) == PER_SHARD
    # A stand-in may come from the bad shard as well, and is then counted and replaced in turn.
    assert stream.faults.keys() == {cause}
    faults = stream.take_faults()
    assert stream.faults[cause] == len(faults) >= PER_SHARD
    assert sorted({6 * fault.step + fault.row for fault in faults}) == expected
    assert {Path(fault.shard).name for fault in faults} == {"s-000001.tar"}
    found = contents(batches)
    assert all(not key.startswith("s-000001") for key, _, _ in found)
    # The same stand-ins on two ranks.
    assert [a + b for a, b in zip(*halves, strict=True)] == [batch["number"] for batch in batches]


def test_a_shard_that_changes_on_the_server(server: WebServer, folder: Path, tmp_path: Path) -> None:
    stream = remote(server, tmp_path, cache=False)
    next(stream)
    server.files["/s-000000.tar"] = server.files["/s-000000.tar"][:-1024] + bytes(1024)
    server.tags["/s-000000.tar"] = '"another"'
    with pytest.raises(DataError, match=r"s-000000\.tar.*changed"):
        list(stream)


def test_a_stall_is_an_error_that_says_where(server: WebServer, tmp_path: Path) -> None:
    stream = remote(server, tmp_path, cache=False, timeout_s=60, stall_s=0.5)
    next(stream)
    server.fail("silent", times=None)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"no batch came for 0 s; being read: .*s-00000\d/\d+|no batch came"):
        list(stream)
    assert time.monotonic() - begin < 10


# --- files ---


def substituting(folder: Path, **options: Any) -> ShardStream:
    return ShardStream(
        folder,
        **{"batch_size": 6, "fields": FIELDS, "on_error": "substitute", "error_budget": 0.5, **options},
    )


def forget_index(folder: Path) -> None:
    for path in [*folder.glob("*.index"), *folder.glob("*.manifest")]:
        path.unlink()


def test_a_shard_cut_at_a_member_boundary_keeps_its_whole_samples(folder: Path) -> None:
    """webdataset reads such a shard without a word; here it is told, and what is whole is used."""
    import webdataset

    from mmscale.data import build_index

    path = folder / "s-000001.tar"
    boundary = build_index(path).record(11)["txt"][0] - 512  # sample 11 has its bin, but no txt
    os.truncate(path, boundary)
    forget_index(folder)
    silent = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    assert len(silent) == 12
    with pytest.raises(DataError, match=r"s-000001\.tar: truncated"):
        ShardStream(folder, batch_size=6)
    stream = substituting(folder)
    assert stream.num_samples == 2 * PER_SHARD + 11
    [fault] = stream.shard_faults
    assert (Path(fault.shard).name, fault.key, fault.cause) == ("s-000001.tar", None, "shard truncated")
    assert any("1 shards are left out or cut" in note for note in stream.notes())
    keys = [key for batch in substituting(folder, remainder="pad") for key in batch.sample_keys]
    assert sum(key.startswith("s-000001") for key in set(keys)) == 11
    with pytest.raises(
        DataError, match=r"1 of \d shards can't be used whole, more than the error budget of 1\.000%"
    ):
        substituting(folder, error_budget=0.01)


def test_a_shard_that_is_gone_is_replaced_sample_by_sample(folder: Path) -> None:
    whole = [key for batch in ShardStream(folder, batch_size=6) for key in batch.sample_keys]
    (folder / "s-000002.tar").unlink()
    urls = str(folder / "s-{000000..000002}.tar")
    with pytest.raises(DataError, match=r"s-000002\.tar"):
        list(ShardStream(urls, batch_size=6))
    stream = substituting(urls, error_budget=1.0)  # type: ignore[arg-type]
    batches = list(stream)
    if stream.num_samples == 60:  # the manifest still knows it
        assert stream.faults.total() >= PER_SHARD
        faults = stream.take_faults()
        rows = sorted({6 * fault.step + fault.row for fault in faults})
        assert rows == [row for row, key in enumerate(whole) if key.startswith("s-000002")]
    else:
        assert stream.num_samples == 40
        assert [fault.cause for fault in stream.shard_faults] == ["shard missing"]
    assert not any(key.startswith("s-000002") for b in batches for key in b.sample_keys)


def test_a_shard_that_was_replaced_after_indexing(folder: Path) -> None:
    stream = substituting(folder, error_budget=1.0)
    (folder / "s-000000.tar").write_bytes((folder / "s-000001.tar").read_bytes())
    keys = [stream.keys(step) for step in range(10)]
    list(stream)
    expected = [row for row, key in enumerate(itertools.chain(*keys)) if key.startswith("s-000000")]
    faults = stream.take_faults()
    assert {fault.cause for fault in faults} == {"shard changed"}
    assert sorted({6 * fault.step + fault.row for fault in faults}) == expected


def test_no_sample_has_what_is_required(folder: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"bin.*60.*txt"):
        ShardStream(folder, batch_size=6, fields={"picture": Field("jpg|png", bytes)})
    with pytest.raises(DataError, match="bin"):
        ShardStream(folder, batch_size=6, fields={"a": Field("txt", bytes), "b": Field("json.x", bytes)})
    assert time.monotonic() - begin < 10
    ShardStream(folder, batch_size=6, fields={"picture": Field("jpg", bytes, required=False)}).close()


def test_faults_fit_json(folder: Path) -> None:
    (folder / "s-000000.tar").write_bytes((folder / "s-000000.tar").read_bytes()[:5000])
    stream = substituting(folder, error_budget=1.0)
    for fault in stream.shard_faults:
        assert json.loads(json.dumps(fault.as_dict()))["cause"] == "shard truncated"
