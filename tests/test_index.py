"""Indexing shards: the same samples that webdataset sees, and a clear refusal of whatever is damaged."""

import hashlib
import io
import os
import subprocess
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from web_server import WebServer

from mmscale.data import DataError, build_index, read_index
from mmscale.data.index import IndexBuilder, sidecar_path
from mmscale.data.manifest import expand
from mmscale.data.measure import Measurer
from mmscale.data.storage import Storage
from mmscale.errors import ConfigError


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


def test_sidecar_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(
        tmp_path / ("s" * 247 + ".tar"), MEMBERS
    )  # with .index the name is too long for the folder
    assert len(build_index(path)) == 6
    assert "can't keep the index" in caplog.text
    assert list(tmp_path.iterdir()) == [path]


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


# --- tars of other tools ---


def gnu_tar(folder: Path, names: list[str], *options: str) -> Path:
    path = folder / "gnu.tar"
    subprocess.run(["tar", "cf", path.name, *options, *names], cwd=folder, check=True, timeout=20)
    return path


def test_interleaved_keys_are_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`tar cf x.tar *.jpg *.txt`: all pictures, then all texts."""
    for name in ("b.jpg", "a.jpg", "c.jpg", "a.txt", "c.txt", "b.txt"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    path = gnu_tar(tmp_path, ["b.jpg", "a.jpg", "c.jpg", "a.txt", "c.txt", "b.txt"])
    assert contents(path) == [
        (key, {field: f"{key}.{field}".encode() * 100 for field in ("jpg", "txt")}) for key in "bac"
    ]
    assert caplog.text.count("interleaved shard") == 1
    caplog.clear()
    index = read_index(path)
    assert index.interleaved
    assert index.signatures == {("jpg", "txt"): 3}
    assert not caplog.records  # it is said when the index is made, not each time it is read


def test_a_field_twice_in_an_interleaved_shard(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4"), ("a.txt", b"5")]
    path = write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=rf"key a: field txt appears twice \(byte {4 * 1024 + 512}\)"):
        build_index(path)


def test_whole_samples_that_come_again_are_not_joined(tmp_path: Path) -> None:
    members = [("a.txt", b"1"), ("a.jpg", b"2"), ("b.txt", b"3"), ("a.txt", b"4"), ("a.jpg", b"5")]
    path = write_tar(tmp_path / "s.tar", members)
    assert contents(path) == as_webdataset_reads(path)
    assert build_index(path).keys == ["a", "b", "a"]


@pytest.mark.parametrize("members", [MEMBERS, [("a.x", b""), ("b.x", b"1"), ("a.y", b"2"), ("b.y", b"3")]])
def test_fingerprint_is_as_it_was(tmp_path: Path, members: list[tuple[str, bytes]]) -> None:
    """Checkpoints hold it: BLAKE2b over each member's length of name, offset, size and name, in the tar's order."""
    path = write_tar(tmp_path / "s.tar", members)
    digest = hashlib.blake2b(digest_size=16)
    with tarfile.open(path) as tar:
        for info in tar:
            name = info.name.encode()
            if info.name not in ("README", ".hidden", "__meta__/notes.txt"):
                digest.update(b"%d %d %d " % (len(name), info.offset_data, info.size) + name)
    assert build_index(path).fingerprint == digest.hexdigest()


def test_img2dataset_layout(tmp_path: Path) -> None:
    members = [
        (f"{i:09d}.{field}", body)
        for i in range(3)
        for field, body in (("jpg", b"\xff\xd8"), ("json", b'{"caption": "c"}'), ("txt", b"c"))
    ]
    path = write_tar(tmp_path / "00000.tar", members)
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_bytes(b"{}")
    assert contents(path) == as_webdataset_reads(path)
    assert expand(tmp_path) == [str(path)]


def test_gnu_tar_of_a_folder(tmp_path: Path) -> None:
    long = "n" * 180
    (tmp_path / "x").mkdir()
    for name in ("b.txt", "a.seg.png", "a.txt", f"{long}.txt"):
        (tmp_path / "x" / name).write_bytes(name.encode())
    for options in (["--format=gnu"], ["--format=pax"]):
        path = gnu_tar(tmp_path, ["x"], "--sort=name", *options)
        assert contents(path) == as_webdataset_reads(path)
        assert build_index(path).keys == ["x/a", "x/b", f"x/{long}"]


def test_links_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"a")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    path = gnu_tar(tmp_path, ["a.txt", "b.txt"])
    assert build_index(path).keys == ["a"]
    assert "links are no part of any sample" in caplog.text


def test_size_of_a_pax_header_and_lies_in_headers(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    info = tarfile.TarInfo("big.bin")
    info.size = 9 * 2**30
    header = info.tobuf(tarfile.PAX_FORMAT)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + info.size + 1024)
    assert build_index(path).record(0) == {"bin": (len(header), info.size)}
    for size in (b"-0000000512\0", b"99999999999\0", b"abc\0"):  # backwards, no octal, no number
        header = bytearray(tarfile.TarInfo("a.txt").tobuf())
        header[124:136] = size.ljust(12, b"\0")
        header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 256)
        path.write_bytes(bytes(header) + bytes(1024))
        with pytest.raises(DataError, match="damaged: no valid header at byte 0"):
            build_index(path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a regular file"):
        build_index(path)


# --- the sidecar's further contents ---


def picture(kind: str, width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


def sound(kind: str, seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(8000 * seconds), np.float32), 8000, format=kind)
    return file.getvalue()


MEASURED = [
    ("a.jpg", picture("JPEG", 40, 30)),
    ("a.txt", "größe zwei".encode()),
    ("a.wav", sound("WAV", 1.5)),
    ("b.png", picture("PNG", 7, 9)),
    ("b.txt", b"\xff\xfe"),
    ("b.flac", sound("FLAC", 2.0)),
    ("c.jpg", b"\xff\xd8 no picture"),
    ("c.json", b'{"caption": "abc", "captions": ["a", "abcd"], "width": 3}'),
    ("c.wav", b"no sound"),
]


def test_measured_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "s.tar", MEASURED)
    build_index(path, measure=("image", "audio", "text"))
    assert "bodies that can't be measured: 1 x jpg.height, 1 x jpg.width, 1 x txt.chars" in caplog.text
    index = read_index(path)
    nan = float("nan")
    expected = {
        "jpg.width": [40, nan, nan],
        "jpg.height": [30, nan, nan],
        "png.width": [nan, 7, nan],
        "png.height": [nan, 9, nan],
        "wav.seconds": [1.5, nan, nan],
        "flac.seconds": [nan, 2, nan],
        "txt.chars": [10, nan, nan],
        "json.caption.chars": [nan, nan, 3],
        "json.captions.chars": [nan, nan, 4],
    }
    assert set(index.columns) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(index.columns[name], np.array(values, np.float32), err_msg=name)
    assert index.unmeasured == {"jpg.width": 1, "jpg.height": 1, "txt.chars": 1, "wav.seconds": 1}
    assert build_index(path).columns == {}
    with pytest.raises(ConfigError, match="measure: pictures not known; there are image, audio, text"):
        build_index(path, measure=["pictures"])


def test_columns_of_an_interleaved_shard(tmp_path: Path) -> None:
    members = [
        ("b.txt", b"1"),
        ("a.txt", b"22"),
        ("c.txt", b"333"),
        ("c.wav", sound("WAV", 1)),
        ("a.bin", b""),
    ]
    path = write_tar(tmp_path / "s.tar", [*members, ("b.wav", sound("WAV", 2))])
    columns = build_index(path, measure=("text", "audio")).columns
    assert columns["txt.chars"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(columns["wav.seconds"], [2, np.nan, 1])


def test_a_picture_with_a_long_header_is_measured(tmp_path: Path) -> None:
    jpeg = picture("JPEG", 40, 30)
    comment = b"\xff\xfe\xff\xff" + bytes(65533)  # a comment of 64 KiB
    path = write_tar(tmp_path / "s.tar", [("a.jpg", jpeg[:2] + 3 * comment + jpeg[2:])])
    assert build_index(path, measure=["image"]).columns["jpg.width"].tolist() == [40]


def test_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)  # what is counted is the text's length, whatever the file cuts it to
    tokenizer.save(str(tmp_path / "t.json"))
    path = write_tar(tmp_path / "s.tar", [("x.txt", b"a b a c"), ("y.txt", b"")])
    index = build_index(path, measure=["text"], tokenizer=tmp_path / "t.json")
    assert index.columns["txt.tokens"].tolist() == [4, 0]
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer .*t\.json: no file of the tokenizers library"):
        build_index(path, measure=["text"], tokenizer=tmp_path / "t.json")


def test_hash_of_the_shard_is_that_of_b2sum(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    assert build_index(path).full_hash is None
    build_index(path, full_hash=True)
    printed = subprocess.run(["b2sum", "-l", "256", path], capture_output=True, check=True, timeout=20).stdout
    assert read_index(path).full_hash == printed.decode().split()[0]


def test_signatures_count_sets_of_fields(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar", [("a.txt", b""), ("a.jpg", b""), ("b.jpg", b""), ("b.txt", b""), ("c.txt", b"")]
    )
    build_index(path)
    assert read_index(path).signatures == {("jpg", "txt"): 2, ("txt",): 1}


def test_a_sidecar_of_the_last_version_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    sidecar_path(path).write_bytes(b"mmscale-index 1 little-endian\n{}\n")
    assert len(read_index(path)) == 6
    assert "its index is of another version" in caplog.text


def test_builder_makes_the_same_sidecar_while_writing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEASURED)
    build_index(path, measure=("image", "audio", "text"))
    whole = sidecar_path(path).read_bytes()
    sidecar_path(path).unlink()
    builder = IndexBuilder(path, measurer=Measurer(("image", "audio", "text")))
    with tarfile.open(path) as tar:
        for info, (_, body) in zip(tar, MEASURED, strict=True):
            builder.add(info.name, info.offset_data, info.size, body)
    builder.finish()
    assert sidecar_path(path).read_bytes() == whole


# --- shards that are cut ---


@pytest.mark.parametrize(
    ("end", "num_left"),
    [
        (600, 0),  # inside a.txt
        (1536, 0),  # inside a.jpg
        (2048, 0),  # between a and b: a might go on behind the cut
        (2100, 0),  # inside a header, which might be a's
        (2560, 1),  # inside b.txt, whose header is there: a is whole
        (3072, 1),
        (4096, 1),
        (4608, 2),
        (5000, 2),
    ],
)
def test_salvage(tmp_path: Path, end: int, num_left: int) -> None:
    """Samples a, b, c, d of a txt and a jpg, 1,024 bytes a member; what is left is whole, and as much as can be."""
    members = [(f"{key}.{field}", key.encode() * 300) for key in "abcd" for field in ("txt", "jpg")]
    whole = write_tar(tmp_path / "whole.tar", members)
    full = contents(whole)
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:end])
    with pytest.raises(DataError, match="truncated"):
        build_index(path)
    if num_left == 0:
        with pytest.raises(DataError, match="no sample is whole before the cut"):
            build_index(path, salvage=True)
        return
    index = build_index(path, salvage=True)
    data = path.read_bytes()
    found = [
        (index.key(i), {name: data[at : at + size] for name, (at, size) in index.record(i).items()})
        for i in range(len(index))
    ]
    assert found == full[:num_left]
    assert index.fault is not None
    assert f"ends at byte {end}" in index.fault
    assert not sidecar_path(path).exists()


def test_salvage_of_an_interleaved_shard_keeps_whole_samples(tmp_path: Path) -> None:
    members = [(f"{key}.{field}", b"x" * 300) for field in ("txt", "jpg") for key in "abc"]
    path = write_tar(tmp_path / "s.tar", members)
    path.write_bytes(path.read_bytes()[: 4 * 1024 + 600])  # inside b.jpg
    assert build_index(path, salvage=True).keys == ["a"]


# --- remote shards ---


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_remote_shard_of_small_samples_takes_few_requests(tmp_path: Path, home: Path) -> None:
    members = [(f"{i:05d}.{field}", bytes(3000)) for i in range(1000) for field in ("txt", "bin")]
    path = write_tar(tmp_path / "s.tar", members)
    local = build_index(path)
    with WebServer({"/s.tar": path.read_bytes()}) as server:
        index = build_index(server.url("/s.tar"), storage=Storage(retries=0))
        # 7 MB in ranges of 256 KiB, 512 KiB, 1, 2, 4 MiB
        assert sum(request.range is not None for request in server.requests) <= 6
    assert [index.record(i) for i in range(1000)] == [local.record(i) for i in range(1000)]
    assert (index.fingerprint, index.keys) == (local.fingerprint, local.keys)


def test_remote_shard_of_large_members_takes_few_bytes(tmp_path: Path, home: Path) -> None:
    members = [
        (f"{i}.{field}", bytes(size)) for i in range(6) for field, size in (("bin", 3 << 20), ("txt", 9))
    ]
    path = write_tar(tmp_path / "s.tar", members)
    storage = Storage(retries=0)
    with WebServer({"/s.tar": path.read_bytes()}) as server:
        assert len(build_index(server.url("/s.tar"), storage=storage)) == 6
        assert sum(request.range is not None for request in server.requests) <= 8
    assert storage.stats()["bytes_read"] < 1 << 20  # of 18 MB


def test_index_of_a_remote_shard_is_kept_and_shows_no_secret(
    tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    with WebServer({"/s.tar": path.read_bytes()}) as server:
        signed = server.url("/s.tar") + "?X-Amz-Signature=SECRET"
        keys = read_index(signed, storage=Storage(retries=0)).keys
        assert keys == build_index(path).keys
        assert "indexes of 1 remote shards are kept in" in caplog.text
        kept = list((home / "mmscale" / "indexes").iterdir())
        assert len(kept) == 1
        assert "SECRET" not in caplog.text + kept[0].name + repr(read_index(signed))
        assert b"SECRET" not in kept[0].read_bytes()
        server.requests.clear()
        caplog.clear()
        again = server.url("/s.tar") + "?X-Amz-Signature=ANOTHER"
        assert read_index(again, storage=Storage(retries=0)).keys == keys
        assert not caplog.records
        assert len(server.requests) == 1  # whether the shard is as it was
        server.files["/s.tar"] = write_tar(path, [("new.txt", b"x")]).read_bytes()
        assert read_index(again, storage=Storage(retries=0)).keys == ["new"]


def test_sidecar_beside_a_remote_shard_is_used(tmp_path: Path, home: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    local = build_index(path)
    files = {"/s.tar": path.read_bytes(), "/s.tar.index": sidecar_path(path).read_bytes()}
    with WebServer(files) as server:
        storage = Storage(retries=0)
        index = read_index(server.url("/s.tar"), storage=storage)
        assert index.keys == local.keys
        assert index.stat == storage.stat(server.url("/s.tar"))  # not the local file's time
        ranges = [request.range for request in server.requests if request.path == "/s.tar"]
        assert all(span is None or span[1] - span[0] <= 1 for span in ranges)  # looked at, but not read
        assert not home.exists()
        server.files["/s.tar"] = write_tar(path, [("new.txt", bytes(20000))]).read_bytes()
        assert read_index(server.url("/s.tar"), storage=storage).keys == ["new"]
