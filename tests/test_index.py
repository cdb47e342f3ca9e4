"""Indexing shards: the same samples that webdataset sees, and a clear refusal of whatever is damaged."""

import io
import os
import tarfile
import time
from pathlib import Path

import pytest
import webdataset

from mmscale.data import DataError, build_index, read_index
from mmscale.data.index import sidecar_path


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def contents(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Every sample's key and bytes, read at the index's offsets."""
    index = build_index(path)
    data = path.read_bytes()
    return [
        (index.key(i), {field: data[at : at + size] for field, (at, size) in index.record(i).items()})
        for i in range(len(index))
    ]


def as_webdataset_reads(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    samples = webdataset.WebDataset(str(path), shardshuffle=False)
    return [
        (sample["__key__"], {name: body for name, body in sample.items() if not name.startswith("__")})
        for sample in samples
    ]


LONG = "folder/" * 20 + "x" * 90
MEMBERS = [
    ("a.txt", b"caption"),
    ("a.JPG", b"\xff\xd8" * 700),
    ("b.seg.png", b""),
    ("b.txt", "größe".encode()),
    ("with.dots/in.folder/c.txt", b"c"),
    ("__meta__/notes.txt", b"no sample"),
    ("README", b"no field"),
    (".hidden", b"no key"),
    (LONG + ".txt", b"long name"),
    ("ünïcode.txt", b"name"),
    ("a.txt", b"the key comes again: another sample"),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_groups_members_as_webdataset_does(tmp_path: Path, format: int) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS, format=format)
    assert contents(path) == as_webdataset_reads(path)
    assert [key for key, _ in contents(path)] == ["a", "b", "with.dots/in.folder/c", LONG, "ünïcode", "a"]
    assert build_index(path).fields == ("txt", "jpg", "seg.png")


def test_ustar_prefix(tmp_path: Path) -> None:
    name = "d" * 60 + "/" + "e" * 60 + ".txt"  # too long for the name field alone
    path = write_tar(tmp_path / "s.tar", [(name, b"x")], format=tarfile.USTAR_FORMAT)
    assert build_index(path).keys == [name.removesuffix(".txt")]


def test_reads_what_tarwriter_writes(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for i in range(20):
            writer.write({"__key__": f"{i:04d}", "txt": f"caption {i}", "bin": bytes(i * 100)})
    assert contents(path) == as_webdataset_reads(path)


def test_folders_and_links_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("f.d", tarfile.DIRTYPE), ("l.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.txt"
            tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert contents(path) == [("a", {"txt": b"abc"})]


def test_size_above_8_gib_in_base_256(tmp_path: Path) -> None:
    """GNU tar's number format, on a sparse file: the bodies are never read, so this is quick."""
    path = tmp_path / "s.tar"
    info = tarfile.TarInfo("big.bin")
    info.size = 9 * 2**30
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + info.size + 1024)
    assert build_index(path).record(0) == {"bin": (512, info.size)}


def test_sidecar_gives_the_same_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    built, read = build_index(path), read_index(path)
    assert [read.record(i) for i in range(len(read))] == [built.record(i) for i in range(len(built))]
    assert (read.keys, read.fields, read.fingerprint) == (built.keys, built.fields, built.fingerprint)
    assert read.num_bytes.tolist() == [sum(len(b) for b in sample.values()) for _, sample in contents(path)]
    assert not caplog.records


def test_index_is_rebuilt_when_missing_damaged_or_outdated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    keys = read_index(path).keys
    assert "no index yet" in caplog.text
    sidecar = sidecar_path(path)
    whole = sidecar.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", b"something else", whole[:-1] + b"!"):
        caplog.clear()
        sidecar.write_bytes(damaged)
        assert read_index(path).keys == keys
        assert "damaged" in caplog.text
        assert sidecar.read_bytes() == whole
    caplog.clear()
    write_tar(path, [("new.txt", b"x"), *MEMBERS])
    assert read_index(path).keys == ["new", *keys]
    os.utime(path, ns=(time.time_ns(), 1))
    read_index(path)
    assert caplog.text.count("changed since it was indexed") == 2
    assert set(tmp_path.iterdir()) == {path, sidecar}


def test_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write_tar(tmp_path / "s.tar", MEMBERS)
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(build_index(path)) == 6
    assert "can't keep the index" in caplog.text


def test_fingerprint_is_of_names_and_sizes(tmp_path: Path) -> None:
    def fingerprint(members: list[tuple[str, bytes]]) -> str:
        return build_index(write_tar(tmp_path / "s.tar", members)).fingerprint

    first = fingerprint(MEMBERS)
    assert fingerprint(MEMBERS) == first
    assert fingerprint(MEMBERS[::-1]) != first
    assert fingerprint([("a2.txt", b"caption"), *MEMBERS[1:]]) != first
    assert fingerprint([("a.txt", b"caption!"), *MEMBERS[1:]]) != first


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """Wherever the tar is cut before the end-of-archive marker: in a header, a body, or between members."""
    whole = write_tar(tmp_path / "s.tar", [("a.txt", b"x" * 700), ("b.txt", b"y")]).read_bytes()
    path = tmp_path / "cut.tar"
    marker = 512 + 1024 + 512 + 512
    assert whole[marker:].count(0) == len(whole) - marker
    for end in [*range(512, marker, 100), 512, 1536, 2048, marker, marker + 511]:
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=rf"cut\.tar: truncated.*ends at byte {end}\)"):
            build_index(path)
    path.write_bytes(whole[:1536])
    with pytest.raises(DataError, match="no end-of-archive marker at byte 1536"):
        build_index(path)
    path.write_bytes(whole[:1000])
    with pytest.raises(DataError, match=r"member a\.txt at byte 0 needs 700 bytes of data, 488 are left"):
        build_index(path)
    assert not sidecar_path(path).exists()
    path.write_bytes(whole[: marker + 512])  # nothing is lost with half of the marker
    assert len(build_index(path)) == 2


def test_what_is_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with pytest.raises(DataError, match=r"s\.tar: no such file"):
        build_index(path)
    with pytest.raises(DataError, match=r"1 of 1 shards don't exist.*s\.tar"):
        read_index(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        build_index(path)
    write_tar(path, [])
    with pytest.raises(DataError, match="the tar is empty"):
        build_index(path)
    write_tar(path, [("README", b"")])
    with pytest.raises(DataError, match="holds no samples"):
        build_index(path)
    for text in (b"hello", b"hello" * 1000):
        path.write_bytes(text)
        with pytest.raises(DataError, match="not a tar"):
            build_index(path)
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "big.txt")
        tar.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(DataError, match="compressed with gzip"):
        build_index(path)
    with pytest.raises(DataError, match="not a regular file"):
        build_index(tmp_path)


def test_damage_inside(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"x"), ("b.txt", b"y")])
    data = bytearray(path.read_bytes())
    data[1024 + 3] ^= 1  # in the second header's name
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged: no valid header at byte 1024"):
        build_index(path)


def test_joined_tars_are_refused(tmp_path: Path) -> None:
    """`cat a.tar b.tar`: readers stop at the first marker and would lose b without a word."""
    first = write_tar(tmp_path / "a.tar", [("a.txt", b"x")]).read_bytes()
    path = tmp_path / "joined.tar"
    path.write_bytes(first + first)
    with pytest.raises(DataError, match=f"data at byte {len(first)}, after the end of the archive"):
        build_index(path)


def test_a_field_twice(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"x"), ("a.TXT", b"y")])
    with pytest.raises(DataError, match=r"s\.tar, key a: field txt appears twice \(byte 1536\)"):
        build_index(path)
