"""`mmscale data check`: every fault is found and named, shards stay as they are, and crashes are told."""

import ctypes
import io
import json
import os
import re
import shutil
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image
from web_server import WebServer

from mmscale.cli import main
from mmscale.data.check import Crash, Fault, Isolated, check, escaped, examine, parse_fields
from mmscale.data.decode import MAX_BYTES
from mmscale.data.index import build_index
from mmscale.data.jobs import local_map
from mmscale.data.manifest import open_manifest
from mmscale.errors import ConfigError


def jpeg(seed: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def sound(seconds: float = 0.1, form: str = "FLAC") -> bytes:
    file = io.BytesIO()
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, int(16000 * seconds))
    soundfile.write(file, wave, 16000, format=form)
    return file.getvalue()


def numpy_bytes(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def good(prefix: str, count: int = 3) -> list[tuple[str, bytes]]:
    members = []
    for number in range(count):
        key = f"{prefix}{number}"
        members += [(f"{key}.jpg", jpeg(number)), (f"{key}.txt", b"a caption"), (f"{key}.flac", sound())]
        members += [(f"{key}.json", b'{"caption": "words"}'), (f"{key}.cls", b"3\n")]
    return members


def faults_of(urls: Any, **options: Any) -> list[Fault]:
    faults: list[Fault] = []
    report = check(urls, on_fault=faults.append, run_jobs=local_map(1), **options)
    assert report.num_faults == len(faults)
    return faults


def brief(faults: list[Fault]) -> list[tuple[str, str, str]]:
    return [(fault.key, fault.field, fault.cause) for fault in faults]


def test_whole_shards_have_no_fault_and_nothing_is_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", good("a"))
    before = (tmp_path / "a.tar").stat().st_mtime_ns
    report = check(tmp_path, run_jobs=local_map(1))
    assert (report.num_faults, report.num_samples, report.num_members) == (0, 3, 15)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]
    assert (tmp_path / "a.tar").stat().st_mtime_ns == before


def test_every_kind_of_body_that_is_wrong_is_named(tmp_path: Path) -> None:
    wave = sound(1.0, "WAV")
    broken = bytearray(jpeg(1, (256, 256)))
    broken[len(broken) // 2 : len(broken) // 2 + 64] = b"\xff\xd9" * 32  # the picture ends in its middle
    bad = [
        ("b.jpg", jpeg()[:-700], "undecodable"),
        ("c.png", b"no picture", "undecodable"),
        ("d.flac", sound(1.0)[:-2000], "undecodable"),
        ("e.wav", wave[:-2000], "undecodable"),
        ("f.json", b'{"a": ', "undecodable"),
        ("g.json", b"[" * 100_000, "undecodable"),
        ("h.txt", b"\xff\xfe", "undecodable"),
        ("i.cls", b"cat", "undecodable"),
        ("j.txt", b"", "empty"),
        ("k.pyd", b"cos\nsystem\n(S'touch ran'\ntR.", "refused"),
        ("l.npy", numpy_bytes(np.array([{}], object)), "refused"),
        ("m.npy", numpy_bytes(np.zeros(9))[:-8], "undecodable"),
        ("n.jpg", bytes(broken), "undecodable"),
    ]
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (50_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"

    bomb = (
        header
        + zlib.crc32(header[12:]).to_bytes(4, "big")
        + b"\0\0\0\0IDAT"
        + zlib.crc32(b"IDAT").to_bytes(4, "big")
    )
    bad.append(("o.png", bomb, "too large"))
    expected = [(*name.split(".", 1), cause) for name, _, cause in bad]
    write_tar(tmp_path / "a.tar", [*good("x"), *((name, body) for name, body, _ in bad), *good("y")])
    assert brief(faults_of(tmp_path)) == expected
    assert brief(faults_of(tmp_path, quick=True)) == [("j", "txt", "empty"), ("k", "pyd", "refused")]


def write_sound(values: np.ndarray, rate: int = 100, **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, values, rate, **{"format": "WAV"} | options)
    return file.getvalue()


def test_pictures_and_arrays_are_looked_at_to_their_end() -> None:
    frames = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (64, 64), np.uint8)) for n in range(3)
    ]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert examine("gif", file.getvalue()) is None
    assert (examine("gif", file.getvalue()[:-1500]) or "")[0] == "undecodable"  # in the third frame
    extraneous = jpeg()[:-2] + bytes(4) + b"\xff\xd9"  # libjpeg warns, all pixels are there
    assert examine("jpg", extraneous) is None
    bomb = io.BytesIO()
    np.savez_compressed(bomb, a=np.zeros((MAX_BYTES >> 3) + 1))
    assert (examine("npz", bomb.getvalue()) or "")[0] == "too large"
    objects = io.BytesIO()
    np.savez(objects, a=np.array([{}], object))
    assert (examine("npz", objects.getvalue()) or "")[0] == "refused"
    assert examine("jsonl", b'{"a": 1}\n{"a": 2}\n') is None
    assert (examine("jsonl", b'{"a": 1}\n{"a": \n') or "")[0] == "undecodable"


def test_sound_is_looked_at_to_its_end() -> None:
    for form in ("WAV", "AIFF", "AU", "FLAC", "OGG", "MP3"):
        whole = sound(1.0, form)
        assert examine(form.lower(), whole) is None
        for cut in (len(whole) // 10, len(whole) // 2):
            cause, detail = examine(form.lower(), whole[:-cut]) or ("", "")
            assert (form, cause) == (form, "undecodable")
            assert form == "FLAC" or detail.startswith("cut short")
    streamed = bytearray(write_sound(np.zeros(100)))
    at = streamed.index(b"data") + 4
    streamed[at : at + 4] = b"\xff" * 4  # what a writer to a pipe puts there
    assert examine("wav", bytes(streamed)) is None
    assert examine("wav", write_sound(np.zeros(3600 * 100))) is None
    long = examine("wav", write_sound(np.zeros(3600 * 100 + 1)))
    assert long == ("too large", "3,600 s of sound, at most 3,600 are decoded")
    assert examine("wav", write_sound(np.zeros(0))) == ("undecodable", "a sound file without samples")
    infinite = write_sound(np.array([0.0, np.inf]), subtype="FLOAT")
    assert examine("wav", infinite) == ("undecodable", "values that aren't finite")


def test_a_body_too_large_is_not_read_and_oddities_are_notes(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        info = tarfile.TarInfo("a.txt")
        info.size = MAX_BYTES + 512  # a hole, which takes no room on the disk
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.seek(info.size, io.SEEK_CUR)
        for name in ("b.txt", "c.txt", "b.txt"):
            file.write(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
        link = tarfile.TarInfo("d.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        file.write(link.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    faults: list[Fault] = []
    report = check(tmp_path / "a.tar", on_fault=faults.append, run_jobs=local_map(1))
    assert brief(faults) == [("a", "txt", "too large"), *((key, "txt", "empty") for key in "bcb")]
    assert report.notes == {
        "links, which are no part of any sample": 1,
        "keys that came before in the same shard": 1,
        "shards without an index": 1,
    }


def test_structure_is_checked_and_the_rest_of_a_damaged_shard_too(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [*good("a"), ("z.txt", b"\xff")])
    data = whole.read_bytes()
    index = build_index(whole)
    (tmp_path / "whole.tar.index").unlink()
    at = index.record(1)["jpg"][0] - 512  # the header of a1.jpg
    end = index.record(3)["txt"][0] + 512

    def found(content: bytes) -> list[tuple[str, str, str]]:
        (tmp_path / "bad.tar").write_bytes(content)
        return brief(faults_of(tmp_path / "bad.tar"))

    not_utf8 = ("z", "txt", "undecodable")
    assert found(data) == [not_utf8]
    assert found(data[:end]) == [("", "", "truncated"), not_utf8]  # at a member's boundary
    assert found(data[: at + 600])[0] == ("a1", "jpg", "truncated")
    # a damaged header hides one member, not those behind it
    assert found(data[:at] + b"\x55" * 512 + data[at + 512 :]) == [("", "", "damaged"), not_utf8]
    assert found(data + data)[0] == ("", "", "data after the end")
    assert found(b"\x1f\x8b" + data) == [("", "", "not a tar")]
    assert found(b"") == [("", "", "not a tar")]
    twice = write_tar(tmp_path / "twice.tar", [("a.txt", b"1"), ("a.TXT", b"2"), ("b.txt", b"3")])
    assert brief(faults_of(twice)) == [("a", "txt", "duplicate field")]


def test_places_behind_a_damaged_header_are_counted_from_the_beginning(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", good("a", 6))
    index = build_index(shard)
    first, second = (index.record(number)["txt"][0] - 512 for number in (1, 4))
    data = bytearray(shard.read_bytes())
    for at in (first, second):
        data[at : at + 512] = b"\x55" * 512
    (tmp_path / "b.tar").write_bytes(data)
    details = [fault.detail for fault in faults_of(tmp_path / "b.tar")]
    assert [
        f"no valid header at byte {at};" in text for at, text in zip((first, second), details, strict=True)
    ] == [
        True,
        True,
    ]


def test_missing_files_pipes_and_folders_are_faults_not_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    names = [str(tmp_path / "gone.tar"), str(tmp_path / "pipe.tar")]
    assert [fault.cause for fault in faults_of(names)] == ["missing", "refused"]


def test_sidecar_and_manifest_that_disagree_are_told(tmp_path: Path) -> None:
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", good(name))
    open_manifest(tmp_path)
    assert faults_of(tmp_path, quick=True) == []
    (tmp_path / "a.tar").unlink()
    write_tar(tmp_path / "d.tar", good("d"))
    write_tar(tmp_path / "b.tar", good("b", 2))
    faults = faults_of(tmp_path, quick=True)
    place = str(tmp_path / "shards.manifest")
    assert [(fault.shard, fault.cause) for fault in faults] == [
        (place, "manifest"),
        (place, "manifest"),
        (str(tmp_path / "b.tar"), "index"),
    ]
    assert "a.tar, which isn't in the folder" in faults[0].detail
    assert faults[1].detail.endswith("d.tar")
    # a sidecar that looks right by size and time, of other members
    write_tar(tmp_path / "e.tar", [("one.txt", b"1")])
    write_tar(tmp_path / "f.tar", [("two.txt", b"2")])
    stamp = (tmp_path / "e.tar").stat()
    os.utime(tmp_path / "f.tar", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    build_index(tmp_path / "e.tar")
    shutil.copy(tmp_path / "e.tar.index", tmp_path / "f.tar.index")
    assert brief(faults_of(tmp_path / "f.tar")) == [("", "", "index")]
    (tmp_path / "b.tar.index").unlink()
    assert [fault.cause for fault in faults_of(tmp_path, quick=True)].count("manifest") == 5  # a, d, e, f, b


def test_fields_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    members = [
        *[("a.jpg", jpeg()), ("a.json", b'{"caption": "x"}'), ("a.png", b"not looked at")],
        *[("b.webp", b"bad"), ("b.txt", b"words")],
        *[("c.jpg", jpeg()), ("c.json", b"{}")],
        *[("d.txt", b"no picture")],
        # the text is elsewhere, so the JSON needn't have it; an empty list is no value
        *[("e.jpg", jpeg()), ("e.json", b"{}"), ("e.txt", b"words")],
        *[("f.jpg", jpeg()), ("f.json", b'{"caption": []}')],
        *[("g.jpg", jpeg()), ("g.meta.json", b'{"a": {"b": "x"}}'), ("h.jpg", jpeg()), ("h.meta.json", b"1")],
        *[("i.jpg", jpeg()), ("i.json", b"{}"), ("i.meta.json", b'{"a": {"b": "x"}}')],
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    assert brief(
        faults_of(
            shard, fields="image: JPG|webp, text: json.caption|txt|meta.json.a.b, sound?: wav|json.sound"
        )
    ) == [
        ("b", "webp", "undecodable"),
        ("c", "json", "missing field"),
        ("d", "image", "missing field"),
        ("f", "json", "missing field"),
        ("h", "meta.json", "missing field"),
    ]
    for text, word in (("image jpg", "'image jpg'"), ("a: b, a: c", "'a' is given twice"), ("a: b|", "'b|'")):
        with pytest.raises(ConfigError, match=f"--fields: .*{re.escape(word)}"):
            parse_fields(text)


def crash(kind: str) -> None:
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "hang":
        time.sleep(60)


def test_a_decoder_that_crashes_or_hangs_is_told_and_the_next_call_works() -> None:
    isolated = Isolated(timeout_s=1.0)
    try:
        found = [isolated.call(crash, kind) for kind in ("fine", "segfault", "hang", "fine")]
    finally:
        isolated.close()
    assert found[0] is None
    assert found[3] is None
    assert isinstance(found[1], Crash)
    assert found[1].detail == "its decoder crashed: signal 11 (SIGSEGV)"
    assert isinstance(found[2], Crash)
    assert found[2].cause == "hang"


def test_resuming_reads_only_what_is_new_or_changed(tmp_path: Path) -> None:
    for name in "abc":
        write_tar(tmp_path / f"{name}.tar", [*good(name), (f"{name}.txt", b"\xff")])
    state = tmp_path / "state.jsonl"
    first = faults_of(tmp_path, resume=state)
    assert len(first) == 3
    lines = state.read_bytes().split(b"\n")
    state.write_bytes(
        b"\n".join(line for line in lines[:-2]) + b"\n" + lines[-2][:50]
    )  # killed in the third line
    write_tar(tmp_path / "a.tar", good("a"))
    faults: list[Fault] = []
    report = check(tmp_path, resume=state, on_fault=faults.append, run_jobs=local_map(1))
    assert report.num_resumed == 1
    assert faults == first[1:]
    assert check(tmp_path, resume=state, run_jobs=local_map(1)).num_resumed == 3
    assert check(tmp_path, resume=state, quick=True, run_jobs=local_map(1)).num_resumed == 0  # other options


def test_the_verb_prints_faults_escaped_writes_the_quarantine_and_exits_with_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "evil\x1b[31m\u202ekey"
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [*good(name), (f"{key}.txt", b"\xff")])
    quarantine = tmp_path / "bad.jsonl"
    verb = ["data", "check", str(tmp_path), "--workers", "2"]
    assert main([*verb, "--quarantine", str(quarantine)]) == 3
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[0].split("\t") == [
        str(tmp_path / "a.tar"),
        "evil\\x1b[31m\\u202ekey",
        "txt",
        "undecodable: not UTF-8: invalid start byte at byte 0",
    ]
    assert "\x1b" not in said.out + said.err
    assert "2 faults in 2 shards" in said.out
    found = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [(entry["shard"], entry["key"], entry["field"]) for entry in found] == [
        (str(tmp_path / f"{name}.tar"), key, "txt") for name in "ab"
    ]
    assert main([*verb, "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["causes"] == {"undecodable": 2}
    assert [entry["key"] for entry in report["faults"]] == [key, key]
    write_tar(tmp_path / "a.tar", good("a"))
    (tmp_path / "b.tar").unlink()
    assert main([*verb, "--json"]) == 0


def test_escaped_keeps_letters_of_any_script() -> None:
    assert escaped("größe 漢字 😀") == "größe 漢字 😀"
    assert escaped("a\tb\nc\x9bd\udc80\u2066") == "a\\tb\\nc\\x9bd\\udc80\\u2066"


def test_remote_shards_have_the_same_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole = write_tar(tmp_path / "0.tar", [*good("a"), ("z.txt", b"\xff")]).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: len(whole) // 2])
    names = [str(tmp_path / f"{number}.tar") for number in range(3)]
    local = [
        (fault.shard.rpartition("/")[2], fault.key, fault.field, fault.cause) for fault in faults_of(names)
    ]
    assert [fault[0] for fault in local].count("1.tar") > 0
    assert (local[0], local[-1]) == (("0.tar", "z", "txt", "undecodable"), ("2.tar", "", "", "missing"))
    with WebServer({f"/s/{number}.tar": Path(names[number]).read_bytes() for number in range(2)}) as server:
        faults = faults_of(server.url("/s/{0..2}.tar"))
        assert {fault.shard.rpartition("/")[0] for fault in faults} == {server.url("/s")}
        assert [(f.shard.rpartition("/")[2], f.key, f.field, f.cause) for f in faults] == local
        # what was found is kept by size and etag
        state = tmp_path / "state.jsonl"
        check(server.url("/s/{0..1}.tar"), resume=state, run_jobs=local_map(1))
        server.files["/s/1.tar"] = whole
        report = check(server.url("/s/{0..1}.tar"), resume=state, run_jobs=local_map(1))
        assert (report.num_resumed, report.causes) == (1, {"undecodable": 2})
        server.fail("403", times=None)
        refused = faults_of(server.url("/s/0.tar"))
    assert brief(refused) == [("", "", "refused")]
