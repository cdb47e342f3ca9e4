"""Shards written anew: what is kept, byte for byte, and what is left out, by cause."""

import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset as wds
from PIL import Image

from mmscale.cli import main
from mmscale.data.index import read_index
from mmscale.data.jobs import local_map
from mmscale.data.pack import PackReport, ShardWriter
from mmscale.data.repack import RepackOptions, _repack_shard, repack
from mmscale.errors import ConfigError, DataError, UserError

Samples = dict[str, dict[str, bytes]]


def _repack(out: Path, *shards: Path, workers: int = 1, **options: Any) -> PackReport:
    return repack(
        out,
        [str(shard) for shard in shards],
        RepackOptions(**options),
        job_map=local_map(workers),
        progress=False,
    )


def _read(folder: Path) -> Samples:
    shards = sorted(map(str, folder.glob("*.tar")))
    found = wds.WebDataset(shards, shardshuffle=False, empty_check=False)
    return {
        sample["__key__"]: {name: body for name, body in sample.items() if not name.startswith("__")}
        for sample in found
    }


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def _jpeg(size: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size // 2), (size % 256, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def _wav(seconds: float) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(int(8000 * seconds)), 8000, format="WAV")
    return out.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """24 samples in 4 shards: pictures of 16 to 108 pixels; every third lacks a text, every fourth has sound."""
    with ShardWriter(tmp_path / "in", samples_per_shard=6) as writer:
        for number in range(24):
            fields = {"jpg": _jpeg(16 + 4 * number)}
            if number % 3:
                fields["txt"] = f"text {number}".encode()
            if number % 4 == 0:
                fields["wav"] = _wav(number / 10 + 0.1)
            writer.write(f"s{number:02d}", fields)
    return tmp_path / "in"


def test_other_sizes_same_bodies(shards: Path, tmp_path: Path) -> None:
    report = _repack(tmp_path / "out", shards, samples_per_shard=10)
    assert _read(tmp_path / "out") == _read(shards)
    assert list(_read(tmp_path / "out")) == list(_read(shards))
    assert [len(read_index(path)) for path in sorted((tmp_path / "out").glob("*.tar"))] == [10, 10, 4]
    assert (report.num_samples, report.num_shards, report.left_out) == (24, 3, {})
    _repack(tmp_path / "small", tmp_path / "out" / "shard-{000000..000002}.tar", shard_bytes=51_200)
    assert _read(tmp_path / "small") == _read(shards)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "small").glob("*.tar"))]
    assert len(sizes) > 2
    assert max(sizes) <= 51_200
    assert min(sizes[:-1]) > 20_000, "the largest sample takes up less than 40,000 bytes"


def test_packing_and_repacking_give_the_same_shards(shards: Path, tmp_path: Path) -> None:
    _repack(tmp_path / "out", shards, samples_per_shard=6)
    assert _digests(tmp_path / "out") == _digests(shards)


def test_filters_by_the_index(shards: Path, tmp_path: Path) -> None:
    report = _repack(tmp_path / "a", shards, require=("jpg", "txt"), minimum=(("jpg.width", 44),))
    kept = [f"s{number:02d}" for number in range(24) if number % 3 and 16 + 4 * number >= 44]
    assert list(_read(tmp_path / "a")) == kept
    assert report.left_out == {"no txt": 8, "jpg.width below 44": 4}
    report = _repack(tmp_path / "b", shards, maximum=(("wav.seconds", 1.3), ("jpg.bytes", 10_000)))
    assert list(_read(tmp_path / "b")) == ["s00", "s04", "s08", "s12"]
    assert report.left_out == {"no wav.seconds": 18, "wav.seconds above 1.3": 2}


def test_fields_and_names(shards: Path, tmp_path: Path) -> None:
    report = _repack(tmp_path / "a", shards, fields=("txt", "wav"), rename=(("txt", "caption"),))
    assert _read(tmp_path / "a")["s04"] == {"caption": b"text 4", "wav": _wav(0.5)}
    assert report.left_out == {"none of txt, wav": 6}  # 3, 6, 9, 15, 18, 21
    with pytest.raises(ConfigError, match="would have jpg twice"):
        _repack(tmp_path / "b", shards, rename=(("txt", "jpg"),))
    with pytest.raises(ConfigError, match="no sample has png; the shards hold jpg, txt, wav"):
        _repack(tmp_path / "b", shards, require=("png",))
    with pytest.raises(ConfigError, match=r"jpg\.heigth"):
        _repack(tmp_path / "b", shards, minimum=(("jpg.heigth", 1),))
    with pytest.raises(DataError, match="no sample is left"):
        _repack(tmp_path / "b", shards, minimum=(("jpg.width", 1000),))


def test_bad_samples_are_dropped_and_listed(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "in", samples_per_shard=4) as writer:
        for number in range(12):
            body = _jpeg(64)
            writer.write(
                f"k{number:02d}",
                {
                    "jpg": body[: len(body) // 2] if number in (2, 3) else body,
                    "json": b"{" if number == 7 else b"{}",
                    "txt": b"\xff" if number == 9 else b"x",
                },
            )
    report = _repack(tmp_path / "out", tmp_path / "in", drop_bad=True, samples_per_shard=5)
    kept = [f"k{number:02d}" for number in range(12) if number not in (2, 3, 7, 9)]
    assert list(_read(tmp_path / "out")) == kept
    assert sum(report.left_out.values()) == 4
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(Path(line["shard"]).name, line["key"]) for line in lines] == [
        ("shard-000000.tar", "k02"),
        ("shard-000000.tar", "k03"),
        ("shard-000001.tar", "k07"),
        ("shard-000002.tar", "k09"),
    ]
    # what was left out serves as a quarantine of the same shards
    again = _repack(tmp_path / "again", tmp_path / "in", quarantine=tmp_path / "out" / "skipped.jsonl")
    assert list(_read(tmp_path / "again")) == kept
    assert again.left_out == {"in the quarantine": 4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"shard": "shard-000009.tar", "key": "s00"}', "line 2: there is no shard shard-000009"),
        ('{"shard": "shard-000001.tar", "key": "s00"}', "1 of its 2 samples are not in these shards"),
        ("nonsense", "line 2: must be a JSON object"),
    ],
)
def test_a_quarantine_that_does_not_fit(shards: Path, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text('{"shard": "shard-000000", "key": "s00", "cause": "x"}\n' + line)
    with pytest.raises(DataError, match=message):
        _repack(tmp_path / "out", shards, quarantine=tmp_path / "q.jsonl")


def test_the_same_key_twice(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name, name) as writer:
            writer.write("k.d/0", {"txt": name.encode()})
    _repack(tmp_path / "out", tmp_path / "a", tmp_path / "b")
    assert _read(tmp_path / "out") == {"k.d/0": {"txt": b"a"}, "k.d/0_b-000000": {"txt": b"b"}}


def test_interleaved_members_become_neighbours(tmp_path: Path) -> None:
    source = tmp_path / "in.tar"
    with tarfile.open(source, "w") as tar:
        for field in ("jpg", "txt"):
            for key in "abc":
                member = tarfile.TarInfo(f"{key}.{field}")
                member.size = 1
                tar.addfile(member, io.BytesIO(key.encode()))
    _repack(tmp_path / "out", source)
    assert _read(tmp_path / "out") == {key: {"jpg": key.encode(), "txt": key.encode()} for key in "abc"}


def test_bytes_depend_on_sources_and_options_alone(shards: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 3)):
        _repack(tmp_path / name, shards, workers=workers, shuffle=1, samples_per_shard=5)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    assert len(_digests(tmp_path / "a")) == 5
    mixed = _read(tmp_path / "a")
    assert mixed == _read(shards)
    assert list(mixed) != sorted(mixed)


class _Ranges(SimpleHTTPRequestHandler):
    """Answers ranges, which the standard library's server doesn't."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2]), len(data) - 1)) if asked else (0, len(data) - 1)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", '"fixed"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def do_HEAD(self) -> None:
        path = Path(self.translate_path(self.path))
        self.send_response(200 if path.is_file() else 404)
        self.send_header("ETag", '"fixed"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(path.stat().st_size if path.is_file() else 0))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_remote_shards(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # indexes of remote shards are kept below it
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for sidecar in (*shards.glob("*.index"), *shards.glob("*.manifest")):
        sidecar.unlink()
    handler = functools.partial(_Ranges, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/shard-{{000000..000003}}.tar"
        options = RepackOptions(shuffle=1, samples_per_shard=5, minimum=(("jpg.width", 40),))
        repack(tmp_path / "remote", [url], options, job_map=local_map(2), progress=False)
        server.shutdown()
    repack(tmp_path / "local", [str(shards)], options, job_map=local_map(1), progress=False)
    assert _digests(tmp_path / "remote") == _digests(tmp_path / "local")


def test_changes_are_refused_in_words(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _repack(out, shards, samples_per_shard=10)
    again = _repack(out, shards, samples_per_shard=10)
    assert (again.num_written, again.num_samples) == (0, 24)
    with pytest.raises(UserError, match="--shuffle was None and is 3"):
        _repack(out, shards, samples_per_shard=10, shuffle=3)
    with pytest.raises(UserError, match="lies inside of the source"):
        _repack(shards / "out", shards)
    with ShardWriter(shards, first_shard=4) as writer:
        writer.write("new", {"txt": b"x"})
    with pytest.raises(UserError, match="shard-000004 is new"):
        _repack(out, shards, samples_per_shard=10)


def test_a_source_that_changes_during_the_work_is_noticed(shards: Path, tmp_path: Path) -> None:
    index = read_index(shards / "shard-000000.tar")
    job = (0, [(index.url, index.fingerprint, [0])])
    (tmp_path / "out").mkdir()
    with ShardWriter(shards) as writer:  # the plan of `job` is made; now the shard is replaced
        writer.write("s00", {"txt": b"another"})
    with pytest.raises(DataError, match=r"shard-000000\.tar: changed since the plan was made"):
        _repack_shard(tmp_path / "out", RepackOptions(), None, job)
    assert not list((tmp_path / "out").iterdir())


def test_the_command(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "repack", str(tmp_path / "out"), str(shards), "--workers", "1"]
    more = ["--require", "txt", "--min", "jpg.width=40", "--rename", "txt=caption", "--fields", "jpg", "txt"]
    assert main([*arguments, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: 12 samples in 1 shards, ")
    assert lines[1:] == ["left out, jpg.width below 40: 4 samples", "left out, no txt: 8 samples"]
    assert set(_read(tmp_path / "out")["s10"]) == {"jpg", "caption"}
    assert main([*arguments, "--min", "jpg.width=wide"]) == 2
    assert "--min jpg.width=wide: 'wide' is no number" in capsys.readouterr().err


@pytest.mark.chaos
def test_killed_and_called_again_gives_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    _repack(tmp_path / "whole", shards, samples_per_shard=2, shuffle=1)
    program = """
        import sys, time
        from pathlib import Path
        from mmscale.data import repack as module
        from mmscale.data.jobs import local_map
        bodies = module._bodies
        def slowly(*arguments):
            time.sleep(0.03)
            return bodies(*arguments)
        module._bodies = slowly
        options = module.RepackOptions(samples_per_shard=2, shuffle=1)
        module.repack(Path(sys.argv[1]), [sys.argv[2]], options, job_map=local_map(2))
    """
    out = tmp_path / "out"
    counts = [0]
    for _ in range(2):
        arguments = [sys.executable, "-c", textwrap.dedent(program), str(out), str(shards)]
        with subprocess.Popen(arguments, start_new_session=True) as run:
            deadline = time.monotonic() + 60
            while len(list(out.glob("*.tar"))) < counts[-1] + 3 and time.monotonic() < deadline:
                time.sleep(0.005)
            os.killpg(run.pid, signal.SIGKILL)
        counts.append(len(list(out.glob("*.tar"))))
    assert 0 < counts[1] < counts[2] < 12
    report = _repack(out, shards, workers=2, samples_per_shard=2, shuffle=1)
    assert report.num_written == 12 - counts[2]
    assert _digests(out) == _digests(tmp_path / "whole")
