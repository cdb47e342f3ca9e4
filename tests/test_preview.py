"""`mmscale data preview`: what the page and the contact sheet show, and that texts stay texts."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_check import jpeg, sound, write_tar
from web_server import WebServer

from mmscale.cli import main
from mmscale.data.manifest import open_manifest
from mmscale.data.preview import _drawable, _font, _wrap, draw, preview
from mmscale.errors import DataError


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def with_class(self, name: str) -> int:
        return sum(attributes.get("class") == name for _, attributes in self.tags)


def test_shows_pictures_sound_captions_and_what_is_missing_or_broken(tmp_path: Path) -> None:
    members = [
        *[
            ("a.jpg", jpeg()),
            ("a.flac", sound(0.5)),
            ("a.json", json.dumps({"n": 1, "caption": "漢字 مرحبا"}).encode()),
        ],
        *[("b.jpg", b"no picture"), ("b.wav", sound(60.0, "WAV")), ("b.txt", b"")],
        *[("c.txt", b"only text"), ("c.pkl", b"x"), ("c.bin", b"123")],
    ]
    report = preview(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert (report.num_shown, report.num_faults) == (3, 3)
    page = Page(Path(report.page))
    sources = [(tag, attributes["src"] or "") for tag, attributes in page.tags if "src" in attributes]
    kinds = [(tag, source.partition(";")[0]) for tag, source in sources]
    assert sorted(kinds) == [
        ("audio", "data:audio/flac"),
        ("audio", "data:audio/wav"),
        ("img", "data:image/jpeg"),
        ("img", "data:image/png"),
        ("img", "data:image/png"),
    ]
    # 60 s are cut to 15 s of 16 bit samples at 16 kHz, in base64
    assert len(max((source for tag, source in sources if tag == "audio"), key=len)) < 15 * 16000 * 2 * 1.4
    assert page.with_class("fault") == 3
    assert "undecodable: UnidentifiedImageError" in page.text
    assert "refused: a pickle is never read" in page.text
    assert "no picture (jpg)" in page.text
    assert "no sound (flac, wav)" in page.text
    assert "caption: 漢字 مرحبا" in page.text
    assert "3 bytes, not shown" in page.text
    with Image.open(report.sheet) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    red = (abs(pixels - [200, 30, 40]).sum(axis=2) < 30).sum()
    assert red > 100  # the frame and words of the broken picture


def test_texts_and_keys_of_shards_are_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    key = 'k"><script>x</script>\x1b[31m'.replace("/", "")
    members = [
        (f"{key}.txt", evil.encode()),
        (f"{key}.json", json.dumps({"<b>": evil}).encode()),
        (f"{key}.jpg", jpeg()),
    ]
    members += [("b.jpg", b"<script>"), ("b.<i>", b"1")]
    report = preview(write_tar(tmp_path / "a.tar", members), tmp_path / "out")
    page = Page(Path(report.page))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b>", "i"})
    assert all(
        (attributes.get("src") or "").startswith("data:") for tag, attributes in page.tags if tag == "img"
    )
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert evil in page.text
    assert "\x1b" not in Path(report.page).read_text()
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", Path(report.page).read_text())


def test_samples_are_drawn_evenly_over_shards_and_by_seed(tmp_path: Path) -> None:
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}-{n:03}.txt", b"x") for n in range(50)])
    manifest = open_manifest(tmp_path)
    places = draw(manifest, 20, 0)
    assert [shard for shard, _ in places] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert places == draw(manifest, 20, 0) != draw(manifest, 20, 1)
    assert draw(manifest, 1000, 0) == [(shard, n) for shard in range(4) for n in range(50)]


def test_query_finds_a_key_exactly_or_in_part(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("cat.txt", b"1"), ("cat2.txt", b"2"), ("dog.txt", b"3")])
    assert preview(tmp_path, tmp_path / "out", query="cat").keys == ["a/cat"]
    assert preview(tmp_path, tmp_path / "out", query="at2").keys == ["a/cat2"]
    assert preview(tmp_path, tmp_path / "out", query="a/d").keys == ["a/dog"]
    with pytest.raises(DataError, match=r"no key of shard .* holds 'bird'"):
        preview(tmp_path, tmp_path / "out", query="bird")


def test_letters_without_glyphs_become_words_and_long_words_are_wrapped() -> None:
    pytest.importorskip("matplotlib")  # its DejaVu has these letters; Pillow's own font has fewer
    font = _font(13)
    assert _drawable("größe 漢字かな, \u202eok", font) == ("größe ‹4 CJK›, \\u202eok", True)
    assert _drawable("größe Ωμέγα мир", font) == ("größe Ωμέγα мир", False)
    lines = _wrap("w" * 500, font, 200, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert _wrap("a b", font, 200, 3) == ["a b"]


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.jpg", jpeg()), ("b.jpg", jpeg(1))])
    out = tmp_path / "out"
    assert main(["data", "preview", str(shard), "--out", str(out), "--count", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_shown"] == 1
    assert Path(report["page"]).is_file()
    assert main(["data", "preview", str(shard), "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith("2 of 2 samples: ")
    assert main(["data", "preview", str(shard), "--out", str(out), "--count", "0"]) == 2


def test_remote_shards_look_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}{n}.jpg", jpeg(10 * shard + n)) for n in range(3)])
    files = {f"/s/{shard}.tar": (tmp_path / f"{shard}.tar").read_bytes() for shard in range(2)}
    local = preview(tmp_path, tmp_path / "local", count=4)
    with WebServer(files) as server:
        remote = preview(server.url("/s/{0..1}.tar"), tmp_path / "remote", count=4)
    assert remote.keys == local.keys
    assert len(set(remote.keys)) == 4
    assert Path(remote.sheet).read_bytes() == Path(local.sheet).read_bytes()
    pages = [Page(Path(report.page)) for report in (local, remote)]
    pictures = [[values["src"] for tag, values in page.tags if tag == "img"] for page in pages]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 4
