"""Shards of folders, tables and Arrow files, read back by others; resuming; what is refused."""

import csv
import hashlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from mmscale.cli import main
from mmscale.data.index import build_index, read_index, sidecar_path
from mmscale.data.ingest import PackOptions, pack, valid_key
from mmscale.data.jobs import local_map
from mmscale.data.pack import ShardWriter, cut, member_size, tar_size
from mmscale.errors import DataError, UserError

Samples = dict[str, dict[str, bytes]]


def _pack(out: Path, *sources: Path, workers: int = 1, **options: Any) -> Any:
    said: list[str] = []
    report = pack(
        out,
        list(sources),
        PackOptions(**options),
        job_map=local_map(workers),
        progress=False,
        say=said.append,
    )
    return report, said


def _read(folder: Path) -> Samples:
    """By Energon's rules (megatron-energon 7.4: `split_name_re`, `skip_meta_re`; a key comes once in a shard)."""
    split_name = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
    skip_meta = re.compile(r"__[^/]*__($|/)")
    samples: Samples = {}
    for shard in sorted(folder.glob("*.tar")):
        last = None
        seen = set()
        with tarfile.open(shard) as tar:
            for member in tar:
                assert not skip_meta.match(member.name)
                match = split_name.match(member.name)
                assert match, member.name
                if match[1] != last:
                    last = match[1]
                    assert last not in seen, "a key's members lie together"
                    seen.add(last)
                file = tar.extractfile(member)
                assert file is not None
                samples.setdefault(last, {})[match[2]] = file.read()
    return samples


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.tar"))}


def _jpeg(width: int, height: int, seed: int = 0) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(out, "JPEG")
    return out.getvalue()


JPEG = _jpeg(64, 48)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number in range(30):
        folder = root / f"part{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"p{number:02d}.jpg").write_bytes(JPEG + bytes([number]) * number * 100)
        (folder / f"p{number:02d}.txt").write_text(f"photo {number}")
    return root


class TestWriter:
    def test_long_and_foreign_names_come_back_from_every_reader(self, tmp_path: Path) -> None:
        keys = ["k" * 300, "ordner/" + "ä" * 60, "红苹果", "d/" * 80 + "x", "a" * 96]
        with ShardWriter(tmp_path) as writer:
            for key in keys:
                writer.write(key, {"txt": key.encode(), "seg.png": b""})
        shard = writer.paths[0]
        assert list(_read(tmp_path)) == keys
        assert read_index(shard).keys == keys
        names = [f"{key}.{field}" for key in keys for field in ("txt", "seg.png")]
        listed = subprocess.run(
            ["tar", "--quoting-style=literal", "-tf", shard], capture_output=True, check=True
        )
        assert listed.stdout.decode().splitlines() == names
        found = list(wds.WebDataset(str(shard), shardshuffle=False, empty_check=False))
        assert [sample["__key__"] for sample in found] == keys
        assert [sample["txt"].decode() for sample in found] == keys

    def test_only_names_that_need_it_get_a_pax_header(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write("a" * 96, {"txt": b"", "jpeg": b""})  # 100 bytes and 101
            writer.write("é" * 48, {"txt": b""})
        with tarfile.open(writer.paths[0]) as tar:
            assert [bool(member.pax_headers) for member in tar] == [False, True, False]

    def test_the_index_made_in_passing_is_the_one_made_by_reading(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path) as writer:
            for key in ("a", "k" * 200, "红"):
                writer.write(key, {"txt": key.encode(), "bin": b"\1" * 1000})
        made = sidecar_path(writer.paths[0]).read_bytes()
        sidecar_path(writer.paths[0]).unlink()
        build_index(writer.paths[0])
        assert sidecar_path(writer.paths[0]).read_bytes() == made

    def test_shards_end_at_bytes_or_at_samples(self, tmp_path: Path) -> None:
        sizes = [5_000, 5_000, 40_000, 100, 100, 100, 100, 9_000]
        with ShardWriter(tmp_path, samples_per_shard=3, shard_bytes=20_480) as writer:
            for number, size in enumerate(sizes):
                writer.write(str(number), {"bin": b"x" * size})
        counts = [len(read_index(path)) for path in writer.paths]
        assert counts == [2, 1, 3, 2]  # full; larger than a shard by itself; three; the rest
        bodies = np.array([member_size(f"{number}.bin", size) for number, size in enumerate(sizes)])
        assert np.diff(cut(bodies, len(sizes), 3, 20_480)).tolist() == counts
        for path, first in zip(writer.paths, (0, 2, 3, 6), strict=True):
            count = len(read_index(path))
            assert path.stat().st_size == tar_size(int(bodies[first : first + count].sum()))


class TestFolders:
    def test_files_with_one_stem_are_one_sample(self, photos: Path, tmp_path: Path) -> None:
        (photos / "part0" / "p00.JSON").write_text('{"a": 1}')
        (photos / "part0" / ".hidden.jpg").write_bytes(b"x")
        (photos / "part0" / "README").write_text("x")
        (photos / "part1" / "p00.jpg").write_bytes(JPEG)  # the same name in another folder
        (photos / "part1" / "v1.5.txt").write_text("")  # empty, and a dot in the stem
        report, said = _pack(tmp_path / "out", photos, keys="stem", samples_per_shard=10)
        samples = _read(tmp_path / "out")
        assert (report.num_samples, report.num_shards, len(samples)) == (32, 4, 32)
        assert samples["part0/p00"] == {"jpg": JPEG, "json": b'{"a": 1}', "txt": b"photo 0"}
        assert samples["part1/p00"] == {"jpg": JPEG}
        assert samples["part1/v1_5"] == {"txt": b""}
        assert samples["part2/p29"]["jpg"] == (photos / "part2" / "p29.jpg").read_bytes()
        assert said == [f"{photos}: 1 files without an extension are left out"]
        assert (tmp_path / "out" / "shards.manifest").is_file()

    def test_first_dot(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        for name in ("cat.jpg", "cat.seg.png"):
            (tmp_path / "in" / name).write_bytes(JPEG)
        _pack(tmp_path / "a", tmp_path / "in", first_dot=True, keys="stem")
        assert {key: list(fields) for key, fields in _read(tmp_path / "a").items()} == {
            "cat": ["jpg", "seg.png"]
        }
        _pack(tmp_path / "b", tmp_path / "in", keys="stem")
        assert list(_read(tmp_path / "b")) == ["cat", "cat_seg"]

    def test_classes(self, photos: Path, tmp_path: Path) -> None:
        (photos / "part2" / "p02.txt").unlink()
        _pack(tmp_path / "out", photos, keys="stem", classes=True)
        samples = _read(tmp_path / "out")
        assert samples["part2/p02"] == {"jpg": JPEG + bytes([2]) * 200, "cls": b"2", "txt": b"part2"}
        assert samples["part1/p01"]["txt"] == b"photo 1"
        assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["part0", "part1", "part2"]

    @pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "coco", "map"])
    def test_captions(self, tmp_path: Path, form: str) -> None:
        root = tmp_path / "in"
        root.mkdir()
        for name in "abc":
            (root / f"{name}.jpg").write_bytes(JPEG)
        rows = [("a.jpg", 'a "red", apple'), ("b.jpg", "苹果"), ("b.jpg", "green\tone")]
        table = root / {"coco": "captions.json", "map": "captions.json"}.get(form, f"captions.{form}")
        objects = [{"file_name": name, "caption": text} for name, text in rows]
        if form in ("csv", "tsv"):
            with table.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, delimiter="," if form == "csv" else "\t")
                writer.writerows([("file_name", "caption"), *rows])
        elif form == "jsonl":
            table.write_text("\n".join(map(json.dumps, objects)))
        elif form == "json":
            table.write_text(json.dumps(objects))
        elif form == "map":
            table.write_text(json.dumps({"a.jpg": rows[0][1], "b.jpg": [rows[1][1], rows[2][1]]}))
        else:
            images = [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.jpg"}]
            notes = [{"image_id": 7 if name == "a.jpg" else 9, "caption": text} for name, text in rows]
            table.write_text(json.dumps({"images": images, "annotations": notes}))
        _pack(tmp_path / "out", root, keys="stem")
        samples = _read(tmp_path / "out")
        assert samples["a"] == {"jpg": JPEG, "txt": b'a "red", apple'}
        assert samples["b"]["txt"].decode() == "苹果"
        assert json.loads(samples["b"]["json"]) == {"captions": ["苹果", "green\tone"]}
        assert samples["c"] == {"jpg": JPEG}

    def test_faults_among_good_samples(self, tmp_path: Path) -> None:
        root = tmp_path / "in"
        root.mkdir()
        for number in range(12):
            (root / f"{number:02d}.jpg").write_bytes(JPEG)
        (root / "01.jpg").write_bytes(b"")
        (root / "03.JPG").write_bytes(JPEG)
        (root / "05.txt").symlink_to("/etc/hostname")
        (root / "07.txt").symlink_to(root / "nothing")
        os.mkfifo(root / "09.txt")
        with pytest.raises(DataError, match=r"in/01: its jpg is empty.*--on-error skip"):
            _pack(tmp_path / "fail", root)
        report, _ = _pack(tmp_path / "out", root, on_error="skip", samples_per_shard=4, keys="stem")
        assert list(_read(tmp_path / "out")) == ["00", "02", "04", "06", "08", "10", "11"]
        assert report.left_out == {"empty": 1, "missing": 1, "no file": 1, "outside": 1, "twice": 1}
        lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
        assert [(line["number"], line["cause"]) for line in lines] == [
            (1, "empty"),
            (3, "twice"),
            (5, "outside"),
            (7, "missing"),
            (9, "no file"),
        ]
        again, _ = _pack(tmp_path / "out", root, on_error="skip", samples_per_shard=4, keys="stem")
        assert (again.num_written, again.left_out) == (0, report.left_out)

    def test_a_failed_run_goes_on_with_other_means(self, photos: Path, tmp_path: Path) -> None:
        (photos / "part1" / "p16.jpg").write_bytes(b"")
        with pytest.raises(DataError, match="part1/p16"):
            _pack(tmp_path / "first", photos, samples_per_shard=30)
        _pack(
            tmp_path / "first", photos, samples_per_shard=15, on_error="skip"
        )  # no shard was there: planned anew
        with pytest.raises(DataError, match="part1/p16"):
            _pack(tmp_path / "out", photos, samples_per_shard=15)
        assert list(_digests(tmp_path / "out")) == ["shard-000000.tar"]
        report, _ = _pack(tmp_path / "out", photos, samples_per_shard=15, on_error="skip")
        assert (report.num_written, report.num_samples) == (1, 29)
        assert _digests(tmp_path / "out") == _digests(tmp_path / "first")
        with pytest.raises(UserError, match="written with --on-error skip"):
            _pack(tmp_path / "out", photos, samples_per_shard=15)

    def test_a_shard_of_failures_alone_has_no_file(self, tmp_path: Path) -> None:
        root = tmp_path / "in"
        root.mkdir()
        for number in range(6):
            (root / f"{number}.jpg").write_bytes(b"" if number in (2, 3) else JPEG)
        for written in (2, 0):
            report, _ = _pack(tmp_path / "out", root, on_error="skip", samples_per_shard=2)
            assert (report.num_shards, report.num_samples, report.num_written) == (2, 4, written and 3)
        assert sorted(_digests(tmp_path / "out")) == ["shard-000000.tar", "shard-000002.tar"]

    def test_keys(self) -> None:
        assert valid_key("a/b.c/d.e") == "a/b.c/d_e"
        assert valid_key("../x\n\udc80") == "x__"
        assert valid_key("__meta__/x") == "_meta_/x"
        assert valid_key("") == "_"

    def test_resize(self, tmp_path: Path) -> None:
        root = tmp_path / "in"
        root.mkdir()
        (root / "big.jpg").write_bytes(_jpeg(640, 480))
        (root / "small.jpg").write_bytes(JPEG)
        Image.new("RGBA", (300, 900), (255, 0, 0, 0)).save(root / "clear.png")
        turned = Image.open(io.BytesIO(_jpeg(640, 480)))
        turned.getexif()[0x0112] = 6
        turned.save(root / "turned.jpg", exif=turned.getexif())
        (root / "broken.jpg").write_bytes(_jpeg(640, 480)[:5000])
        report, _ = _pack(tmp_path / "out", root, resize=96, keys="stem", on_error="skip")
        samples = _read(tmp_path / "out")
        sizes = {key: Image.open(io.BytesIO(fields["jpg"])).size for key, fields in samples.items()}
        assert sizes == {"big": (128, 96), "clear": (96, 288), "small": (64, 48), "turned": (96, 128)}
        assert samples["small"]["jpg"] == JPEG
        assert Image.open(io.BytesIO(samples["clear"]["jpg"])).getpixel((5, 5)) == (255, 255, 255)
        assert report.left_out == {"undecodable": 1}


class TestTables:
    @pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
    def test_paths_and_texts(self, photos: Path, tmp_path: Path, form: str) -> None:
        rows = [
            {"filepath": f"part{n % 3}/p{n:02d}.jpg", "caption": f"text {n}", "score": str(n)}
            for n in range(6)
        ]
        table = photos / f"table.{form}"
        if form == "csv":
            with table.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        elif form == "jsonl":
            table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=4)
        columns = (("image", "filepath"), ("text", "caption"))
        _pack(tmp_path / "out", table, columns=columns, keys="stem", samples_per_shard=4)
        samples = _read(tmp_path / "out")
        assert samples["part2/p05"] == {
            "jpg": (photos / "part2" / "p05.jpg").read_bytes(),
            "txt": b"text 5",
            "json": b'{"score": "5"}',
        }
        _, said = _pack(tmp_path / "guessed", table, keys="stem", samples_per_shard=4)
        assert _digests(tmp_path / "guessed") == _digests(tmp_path / "out")
        assert said[-1].endswith("taken as --column file=filepath --column text=caption; score go into json")
        with pytest.raises(UserError, match="has no column txt; its columns are filepath, caption, score"):
            _pack(tmp_path / "bad", table, columns=(("text", "txt"),))

    @pytest.mark.parametrize("form", ["csv", "parquet"])
    def test_no_path_leads_out_of_the_tables_folder(self, tmp_path: Path, form: str) -> None:
        root = tmp_path / "in"
        root.mkdir()
        (tmp_path / "secret.jpg").write_bytes(JPEG)
        (root / "ok.jpg").write_bytes(JPEG)
        (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
        paths = ["ok.jpg", "../secret.jpg", "link.jpg", str(tmp_path / "secret.jpg"), "gone.jpg"]
        table = root / f"t.{form}"
        if form == "csv":
            table.write_text("image\n" + "\n".join(paths))
        else:
            pq.write_table(pa.table({"image": paths}), table)
        report, _ = _pack(tmp_path / "out", table, on_error="skip")
        assert (report.num_samples, report.left_out) == (1, {"outside": 3, "missing": 1})
        report, _ = _pack(tmp_path / "all", table, on_error="skip", allow_outside=True)
        assert (report.num_samples, report.left_out) == (4, {"missing": 1})

    def test_parquet_with_bytes(self, tmp_path: Path) -> None:
        root = tmp_path / "data"
        root.mkdir()
        for part in range(2):
            pictures = [{"bytes": JPEG + bytes([part, n]), "path": None} for n in range(10)]
            table = pa.table(
                {"image": pictures, "text": [f"{part} {n}" for n in range(10)], "x": [float("nan")] * 10}
            )
            pq.write_table(table, root / f"train-{part:05d}-of-00002.parquet", row_group_size=3)
        pq.write_table(table, root / "test-00000-of-00001.parquet")
        with pytest.raises(UserError, match=r"several splits: choose one with --split; it holds test, train"):
            _pack(tmp_path / "out", tmp_path / "data")
        _pack(tmp_path / "out", root, split="train", samples_per_shard=7)
        samples = _read(tmp_path / "out")
        assert samples["000013"] == {"jpg": JPEG + bytes([1, 3]), "txt": b"1 3", "json": b'{"x": null}'}
        assert len(samples) == 20
        _pack(tmp_path / "mixed", root, split="train", samples_per_shard=7, shuffle=3)
        assert _read(tmp_path / "mixed") == samples  # as sets
        numbers = [int(key) for key in _read(tmp_path / "mixed")]
        neighbours = sum(second == first + 1 for first, second in itertools.pairwise(numbers))
        assert neighbours < 6, "in whole row groups 12 of 19 would be; by chance, 1 is"
        _pack(
            tmp_path / "small", root, split="train", shard_bytes=16_000
        )  # planned by the mean size of a row
        assert all(path.stat().st_size <= 20_480 for path in (tmp_path / "small").glob("*.tar"))
        assert len(list((tmp_path / "small").glob("*.tar"))) > 1

    def test_what_datasets_saved(self, tmp_path: Path) -> None:
        """The layout of `save_to_disk` (datasets 5.2), written by pyarrow."""
        features = {
            "image": {"_type": "Image"},
            "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
            "caption": {"dtype": "string", "_type": "Value"},
        }
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema(
            {"image": struct, "label": pa.int64(), "caption": pa.string()},
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        root = tmp_path / "saved"
        for split, count in (("train", 5), ("test", 2)):
            folder = root / split
            folder.mkdir(parents=True)
            rows = [
                {"image": {"bytes": JPEG, "path": f"{n}.png"}, "label": n % 2, "caption": f"{split} {n}"}
                for n in range(count)
            ]
            with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", schema) as stream:
                for first in range(0, count, 2):
                    stream.write(pa.RecordBatch.from_pylist(rows[first : first + 2], schema))
            (folder / "state.json").write_text(
                json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split})
            )
            (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
        (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        _pack(tmp_path / "out", root, split="train", keys="stem", shuffle=5, samples_per_shard=2)
        samples = _read(tmp_path / "out")
        assert {key: fields["txt"] for key, fields in samples.items()} == {
            str(n): f"train {n}".encode() for n in range(5)
        }
        assert samples["3"] == {"jpg": JPEG, "cls": b"1", "txt": b"train 3"}
        assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
        with pytest.raises(UserError, match="no split 'dev'; it holds train, test"):
            _pack(tmp_path / "no", root, split="dev")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a,b\n1\n", "line 2: has not as many cells"),
            ("a,a\n1,2\n", "same name"),
            ("x,y\n1,2\n", "which columns hold what"),
            ("image\n", "holds no rows"),
        ],
    )
    def test_bad_tables(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            _pack(tmp_path / "out" / "o", tmp_path / "t.csv")


class TestRuns:
    def test_the_bytes_depend_on_source_and_options_alone(self, photos: Path, tmp_path: Path) -> None:
        digests = []
        for name, workers in (("a", 1), ("b", 3)):
            _pack(
                tmp_path / name, photos, workers=workers, shuffle=1, shard_bytes=30_720, samples_per_shard=9
            )
            digests.append(_digests(tmp_path / name))
        assert digests[0] == digests[1]
        assert len(digests[0]) > 3
        shuffled = list(_read(tmp_path / "a"))
        assert sorted(shuffled) == [f"{number:06d}" for number in range(30)] != shuffled
        _pack(tmp_path / "c", photos, shuffle=2)
        assert list(_read(tmp_path / "c")) != shuffled
        _pack(tmp_path / "d", photos, shuffle=1, limit=7)
        assert list(_read(tmp_path / "d")) == shuffled[:7]

    def test_another_source_or_other_options_are_refused_in_words(self, photos: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        _pack(out, photos, samples_per_shard=10)
        with pytest.raises(
            UserError, match="--samples-per-shard was 10 and is 9; --shuffle was None and is 0"
        ):
            _pack(out, photos, samples_per_shard=9, shuffle=0)
        os.utime(photos / "part1" / "p10.jpg", ns=(1, 1))
        with pytest.raises(UserError, match=r"the source changed: shard-000001\.tar is the first"):
            _pack(out, photos, samples_per_shard=10)
        (photos / "new.jpg").write_bytes(JPEG)
        with pytest.raises(UserError, match="photos: samples was 30 and is 31"):
            _pack(out, photos, samples_per_shard=10)

    def test_foreign_folders_are_left_alone(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine.txt").write_text("x")
        with pytest.raises(UserError, match="holds other files"):
            _pack(tmp_path / "other", photos)
        with pytest.raises(UserError, match="lies inside of the source"):
            _pack(photos / "out", photos)
        with pytest.raises(UserError, match="no such file or folder"):
            _pack(tmp_path / "out", tmp_path / "nothing")
        assert [path.name for path in (tmp_path / "other").iterdir()] == ["mine.txt"]

    def test_the_command(self, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["data", "pack", str(tmp_path / "out"), "--from", str(photos), "--workers", "1"]
        assert main([*arguments, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["num_samples"], said["num_shards"], said["left_out"]) == (30, 1, {})
        assert main([*arguments, "--limit", "3"]) == 1
        assert "--limit was None and is 3" in capsys.readouterr().err
        assert main([*arguments, "--column", "x"]) == 2

    @pytest.mark.chaos
    def test_killed_and_called_again_gives_the_same_bytes(self, photos: Path, tmp_path: Path) -> None:
        _pack(tmp_path / "whole", photos, samples_per_shard=2, shuffle=4)
        program = """
            import sys, time
            from pathlib import Path
            from mmscale.data import ingest
            from mmscale.data.jobs import local_map
            read = ingest._FileReader._read
            def slowly(self, item):
                time.sleep(0.03)
                return read(self, item)
            ingest._FileReader._read = slowly
            options = ingest.PackOptions(samples_per_shard=2, shuffle=4)
            ingest.pack(Path(sys.argv[1]), [Path(sys.argv[2])], options, job_map=local_map(2))
        """
        out = tmp_path / "out"
        counts = [0]
        for _ in range(3):
            arguments = [sys.executable, "-c", textwrap.dedent(program), str(out), str(photos)]
            with subprocess.Popen(arguments, start_new_session=True) as run:
                deadline = time.monotonic() + 60
                while len(list(out.glob("*.tar"))) < counts[-1] + 3 and time.monotonic() < deadline:
                    time.sleep(0.005)
                os.killpg(run.pid, signal.SIGKILL)
            counts.append(len(list(out.glob("*.tar"))))
        assert 0 < counts[1] < counts[2] < counts[3] < 15
        report, _ = _pack(out, photos, workers=2, samples_per_shard=2, shuffle=4)
        assert report.num_written == 15 - counts[3]
        assert _digests(out) == _digests(tmp_path / "whole")
        assert not list(out.glob(".*.tmp"))
