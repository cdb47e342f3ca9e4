"""`mmscale data bench`, and benchmarks/data_loading.py as far as it goes without the peers (tests/peers has them)."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from web_server import WebServer

from mmscale.cli import main
from mmscale.data.bench import Rate, Report, advice, bench
from mmscale.data.pack import ShardWriter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import data_loading  # noqa: E402


def _jpeg(seed: int, size: int = 256) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples in 2 shards: pictures, one of them damaged, texts, and a member of no known kind."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, samples_per_shard=20) as writer:
        for number in range(40):
            jpg = b"not a picture" if number == 7 else _jpeg(number % 4)
            writer.write(f"{number:04d}", {"jpg": jpg, "txt": b"a text", "weird": b"x" * 100_000})
    return folder


def test_it_measures_both_passes_and_counts_what_is_bad(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "bench", str(shards), "--seconds", "0.3", "--threads", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_samples"] == 40
    assert found["fields"] == {"jpg": "jpg", "txt": "txt"}
    assert found["left_out"] == ["weird"]
    for name in ("raw", "decoded"):
        rate = found[name]
        assert rate["samples"] >= 40
        assert rate["samples_per_s"] == pytest.approx(rate["samples"] / rate["wall_s"])
        assert rate["samples_per_cpu_s"] == pytest.approx(rate["samples"] / rate["cpu_s"])
    assert found["raw"]["faults"] == 0
    assert found["decoded"]["faults"] >= 1  # at least 80 rows of 40 samples
    # `weird` isn't read, so the bytes are those of the pictures and texts: 4 sizes of noise within 1 % of each other.
    size = len(_jpeg(0)) * 39 / 40
    assert found["raw"]["read_bytes"] / found["raw"]["samples"] == pytest.approx(size, rel=0.1)
    # 256 x 256 of noise takes over a millisecond to decode, reading it some ten microseconds
    assert found["raw"]["samples_per_cpu_s"] > 3 * found["decoded"]["samples_per_cpu_s"]
    assert found["decode_share"] > 0.5
    assert found["read_share"] == pytest.approx(1 - found["decode_share"])
    assert found["decoders_cpu_s"]["jpg"] > found["decoders_cpu_s"]["txt"]


def test_it_says_it_in_words(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "bench", str(shards), "--fields", "text: txt", "--seconds", "0.1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^40 samples, \d+ threads on \d+ cores$", said, re.MULTILINE)
    assert re.search(r"^reading: [\d,]+ samples/s, ", said, re.MULTILINE)
    assert re.search(r"^limit: reading: ", said, re.MULTILINE) or "limit: other work" in said
    assert "\nremedy: " in said


def test_shards_of_no_known_kind_are_read_alone(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"bin": b"1234"})
    report = bench(tmp_path, seconds=0.05)
    assert report.decoded is None
    assert report.left_out == ["bin"]
    assert report.raw.samples > 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--threads", "0"], 1, "threads must be at least 1, got 0"),
        (["--seconds", "0"], 1, "seconds must be above 0, got 0"),
        (["--fields", "image: jqg"], 2, "did you mean 'jpg'"),
    ],
)
def test_wrong_options_are_told(
    shards: Path, options: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "bench", str(shards), *options]) == code
    assert words in capsys.readouterr().err


def test_slow_storage_is_found_out(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes 10 ms to answer: far more than reading a text."""
    files = {
        f"/{path.name}": path.read_bytes()
        for path in sorted(shards.iterdir())
        if path.suffix in (".tar", ".index")
    }
    with WebServer(files) as server:
        urls = [server.url(path) for path in files if path.endswith(".tar")]
        server.delay_s = 0.01
        report = bench(urls, fields="text: txt", threads=2, seconds=0.3)
    limit, remedy = advice(report)
    assert limit.startswith("the storage: ")
    assert "data.storage.cache_gb" in remedy


RATE = Rate(
    samples=1000,
    wall_s=10,
    cpu_s=40,
    read_bytes=10**6,
    disk_bytes=0,
    read_s=1,
    decode_s=39,
    idle_cores=4.0,
    faults=0,
)


@pytest.mark.parametrize(
    ("changes", "rates", "limit", "remedy"),
    [
        ({}, {}, "decoding, with 4 of 8 cores", "--threads 8 "),
        ({"threads": 8}, {"cpu_s": 78, "idle_cores": 0}, "decoding, most of all image", "pack --resize"),
        ({"threads": 8}, {"cpu_s": 40}, "decoding in threads that wait for each other", "several ranks"),
        ({"threads": 8}, {"cpu_s": 40, "idle_cores": 0.1}, "other work on this machine", "measure again"),
        ({}, {"cpu_s": 5, "read_s": 35, "decode_s": 4}, "the storage", "--threads 8 "),
        ({"decoders": {"image": 2.0}}, {"read_s": 36, "decode_s": 3}, "reading: more CPU time", "--fields"),
        ({"decoded": None}, {}, "reading: the CPU", "nothing is decoded"),
    ],
)
def test_the_advice_follows_from_the_figures(
    changes: dict[str, Any], rates: dict[str, float], limit: str, remedy: str
) -> None:
    rate = replace(RATE, **rates)
    share = 0.05 if rate.read_s > rate.decode_s else 0.95
    report = Report(10, 4, 8, rate, rate, {"image": "jpg|png"}, {"image": share * rate.cpu_s})
    if limit == "the storage":
        report = replace(report, decoders={"image": 4.0})
    found = advice(replace(report, **changes))
    assert found[0].startswith(limit)
    assert remedy in found[1]


def test_the_benchmark_measures_who_is_there_and_says_who_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Energon isn't installed; in webdataset's place is a program that delivers too little."""
    environments = tmp_path / "environments"
    python = environments / "webdataset" / "bin" / "python"
    python.parent.mkdir(parents=True)
    result = {
        "samples": 511,
        "form": ["torch.uint8", 3, 224, 224],
        "cpu_s": 1,
        "wall_s": 1,
        "first_batch_s": 1,
    }
    python.write_text(f"#!/bin/sh\necho '{json.dumps(result)}'\n")
    python.chmod(0o755)
    (environments / "webdataset" / ".installed").touch()
    monkeypatch.setattr(data_loading, "ENVIRONMENTS", environments)
    out = tmp_path / "result.json"
    assert (
        data_loading.main(
            ["--smoke", "--only", "256px default", "--out", str(out), "--folder", str(tmp_path)]
        )
        == 0
    )
    said = capsys.readouterr().out
    content = json.loads(out.read_text())
    (case,) = content["cases"]
    assert case["case"] == "256px default"
    ours = case["contenders"]["mmscale"]
    (repeat,) = ours["repeats"]
    assert repeat["samples"] == 512
    assert repeat["bytes"] == 512 * 3 * 224 * 224
    assert ours["samples_per_cpu_s"]["p50"] == pytest.approx(
        512 / repeat["cpu_s"], rel=1e-3
    )  # rounded to 4 digits
    assert ours["peak_rss_mib"]["p50"] > 50
    assert case["contenders"]["webdataset"] == {"failed": "delivered 511 of 512 samples"}
    assert case["contenders"]["webdataset, normalised"] == {"failed": "delivered 511 of 512 samples"}
    assert case["contenders"]["energon"] == {"absent": "not installed: make peers"}
    assert case["mmscale_over"] == {}
    assert "| energon | not installed: make peers |" in said
    assert "| webdataset | failed: delivered 511 of 512 samples |" in said
    assert content["data"]["256px decoded"]["samples"] == 512
    assert {"commit", "cpu", "cores", "config"} <= content.keys()
    assert not list(tmp_path.glob("data-loading-*"))


def test_pictures_are_about_as_large_as_photographs() -> None:
    """256 px: 20 to 40 kB, VGA: about 70 kB, which the noise is set for."""
    rng = np.random.default_rng(1)
    for name, least, most in (("256px", 20_000, 40_000), ("vga", 55_000, 90_000)):
        data = data_loading.DATA[name]
        assert data.pixels is not None
        body = data_loading.make_picture(rng, data.pixels, data.noise)
        assert least < len(body) < most
        assert Image.open(io.BytesIO(body)).size == data.pixels


def test_percentiles_are_of_the_repeats() -> None:
    repeats = [dict.fromkeys(data_loading.MEASURES, value) for value in (5.0, 1.0, 2.0, 3.0, 4.0)]
    found = data_loading.summarise(repeats)["samples_per_s"]
    assert found == {"p20": 1.8, "p50": 3.0, "p80": 4.2}


@pytest.mark.parametrize("name", ["webdataset", "energon"])
def test_the_peers_are_pinned(name: str) -> None:
    lines = (ROOT / "benchmarks" / "peers" / f"{name}.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 10
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in packages)
