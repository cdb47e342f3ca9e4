"""`mmscale data stats`: the numbers against plain numpy, duplicates that were planted, and the page."""

import io
import json
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_check import jpeg, sound, write_tar
from test_preview import Page
from tokenizers import Tokenizer
from web_server import WebServer

from mmscale.cli import main
from mmscale.data.decode import MAX_BYTES
from mmscale.data.jobs import local_map
from mmscale.data.stats import Histogram, ShardStats, difference_hash, near_labels, shard_stats, stats
from mmscale.errors import ConfigError


def picture(seed: int, size: tuple[int, int] = (96, 72), form: str = "JPEG", quality: int = 90) -> bytes:
    """A smooth picture, other for each seed, the same in all sizes."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, form, quality=quality)
    return file.getvalue()


def run(urls: Any, **options: Any) -> dict[str, Any]:
    return stats(urls, run_jobs=local_map(1), **options)


@pytest.mark.parametrize("num", [1, 50, 40_000])
def test_quantiles_are_those_of_the_values(num: int) -> None:
    values = np.random.default_rng(num).lognormal(3, 2, num)
    values[: num // 10] = 0
    whole = Histogram()
    whole.add(values)
    merged = Histogram()
    parts = np.array_split(values, 7)
    random.Random(0).shuffle(parts)
    for part in parts:
        histogram = Histogram()
        histogram.add(part)
        merged.merge(histogram)
    assert (merged.num, merged.bins, merged.smallest) == (whole.num, whole.bins, whole.smallest)
    assert (merged.values is None) == (num > 2048)  # so that it stays small
    ordered = np.sort(values)
    for q in (0.01, 0.05, 0.5, 0.95, 1.0):
        true = ordered[max(1, int(np.ceil(q * num))) - 1]
        assert merged.quantile(q) == whole.quantile(q)
        # half a bin: 2 ** (1 / 64) - 1 = 1.09 %
        assert merged.quantile(q) == pytest.approx(true, rel=0.011 if num > 2048 else 1e-12)
    assert sum(bar[2] for bar in merged.bars()) == num
    assert len(merged.bars()) <= 41


def test_numbers_are_those_of_the_samples(tmp_path: Path) -> None:
    sizes = [(40, 30), (80, 30), (60, 60), (20, 90)]
    for shard in range(2):
        members = []
        for number, size in enumerate(sizes):
            key = f"{shard}{number}"
            members += [
                (f"{key}.jpg", jpeg(10 * shard + number, size)),
                (f"{key}.cls", b"cat" if number else b"dog"),
            ]
            members += [(f"{key}.json", json.dumps({"caption": "x" * (number + 1)}).encode())]
        members += [(f"{shard}.wav", sound(0.5, "WAV")), (f"{shard}.txt", "größe".encode())]
        members += [(f"b{shard}.jpg", b"no picture")]
        write_tar(tmp_path / f"{shard}.tar", members)
    numbers = run(tmp_path)
    assert (numbers["num_shards"], numbers["num_samples"], numbers["num_read"]) == (2, 12, 12)
    assert numbers["num_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert [(row["fields"], row["num_samples"]) for row in numbers["signatures"]] == [
        (["cls", "jpg", "json"], 8),
        (["jpg"], 2),
        (["txt", "wav"], 2),
    ]
    columns = numbers["columns"]
    widths = columns["jpg.width"]
    assert [widths[name] for name in ("num", "min", "median", "mean", "max", "unmeasured")] == [
        8,
        20,
        40,
        50,
        80,
        2,
    ]
    assert columns["jpg.aspect"]["max"] == pytest.approx(80 / 30, rel=1e-5)  # six digits are kept
    assert columns["wav.seconds"]["median"] == 0.5
    assert columns["json.caption.chars"]["max"] == 4
    assert columns["txt.chars"]["max"] == 5
    assert numbers["fields"]["txt"]["max"] == 7
    assert numbers["classes"] == {"cat": 6, "dog": 2}
    assert numbers["problems"]["jpg.width: can't be measured"] == 2
    # several processes, and another order of the shards, give the same
    names = sorted(map(str, tmp_path.glob("*.tar")))
    assert stats(names, run_jobs=local_map(2)) == run(names)


def test_planted_duplicates_are_found_and_nothing_else(tmp_path: Path) -> None:
    same, near = picture(1), picture(2)
    first = [(f"u{seed}.jpg", picture(seed)) for seed in range(100, 140)]
    first += [("a.jpg", same), ("b.jpg", near)]
    second = [("c.jpg", same), ("d.png", picture(2, (384, 288), "PNG")), ("e.jpg", picture(2, quality=30))]
    blank = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(blank, "PNG")
    other = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(other, "PNG")
    second += [("f.png", blank.getvalue()), ("g.png", other.getvalue())]
    write_tar(tmp_path / "1.tar", first)
    write_tar(tmp_path / "2.tar", second)
    found = run(tmp_path)["duplicates"]
    assert found["exact"]["groups"] == [["1/a", "2/c"]]
    assert found["near"]["groups"] == [["1/b", "2/d", "2/e"]]
    assert found["near"]["num_superfluous"] == 2
    assert found["near"]["num_uniform"] == 2


def test_bodies_too_large_to_be_read_are_no_duplicates(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        for name in ("a.txt", "b.txt"):  # holes, which take no room on the disk
            info = tarfile.TarInfo(name)
            info.size = MAX_BYTES + 512
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
            file.seek(info.size, io.SEEK_CUR)
        file.write(bytes(1024))
    numbers = run(tmp_path)
    assert numbers["duplicates"]["exact"]["num_groups"] == 0
    assert numbers["problems"] == {"txt: too large to be read": 2}
    assert numbers["fields"]["txt"]["max"] == pytest.approx(MAX_BYTES + 512, rel=1e-5)  # six digits are kept


def test_near_labels_are_those_of_comparing_all_with_all() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 300, np.uint64)
    copies = []
    for value in hashes[:60]:
        for bits in (1, 2, 3):
            for bit in rng.choice(64, bits, replace=False):
                value ^= np.uint64(1 << int(bit))
            copies.append(value)
    hashes = np.unique(np.concatenate([hashes, np.array(copies, np.uint64)]))
    labels, passed_over = near_labels(hashes)
    assert passed_over == 0
    expected = np.arange(len(hashes))
    close = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= 2
    for _ in range(10):  # the smallest number reaches all of a chain
        expected = np.where(close, expected[None, :], len(hashes)).min(axis=1)
    assert (labels == expected).all()


def test_difference_hash_is_of_looks_not_of_size() -> None:
    small, large = difference_hash(picture(3)), difference_hash(picture(3, (640, 480), "PNG"))
    assert small is not None
    assert large is not None
    assert (small ^ large).bit_count() <= 2
    other = difference_hash(picture(4))
    assert other is not None
    assert (small ^ other).bit_count() > 10


def test_a_sample_is_read_evenly_and_counts_stay_of_all(tmp_path: Path) -> None:
    for shard, count in enumerate((10, 30, 60)):
        write_tar(tmp_path / f"{shard}.tar", [(f"{shard}-{n}.txt", b"x" * (n + 1)) for n in range(count)])
    asked: list[int] = []

    def noted(work: Any, jobs: Any) -> Iterator[tuple[int, Any]]:
        asked.extend(num_read for _, _, num_read in jobs)
        return local_map(1)(work, jobs)

    numbers = stats(tmp_path, sample=20, run_jobs=noted)
    assert asked == [2, 6, 12]
    assert (numbers["num_samples"], numbers["num_read"], numbers["sampled"]) == (100, 20, True)
    assert numbers["fields"]["txt"]["num"] == 100
    assert numbers["columns"]["txt.chars"]["num"] == 20
    read = [
        shard_stats((shard, str(tmp_path / f"{shard}.tar"), n)).places[0]
        for shard, n in enumerate((2, 6, 12))
    ]
    assert [len(np.unique(rows[:, 1])) for rows in read] == [2, 6, 12]
    assert numbers == run(tmp_path, sample=20)
    with pytest.raises(ConfigError, match="--sample must be at least 1"):
        run(tmp_path, sample=0)


def backwards(work: Any, jobs: Any) -> Iterator[tuple[int, Any]]:
    for number in reversed(range(len(jobs))):
        yield number, work(jobs[number])


def test_what_is_shown_is_of_all_shards_in_any_order(tmp_path: Path) -> None:
    for shard in range(3):
        members = [(f"{n}.jpg", picture(30 * shard + n, (10 * n + shard + 16, 16))) for n in range(9)]
        write_tar(tmp_path / f"{shard}.tar", [*members, ("same.txt", b"words"), ("more.txt", b"words")])
    total = ShardStats()
    for shard in range(3):
        total.merge(shard_stats((shard, str(tmp_path / f"{shard}.tar"), 11)))
    sizes = sorted((16 * (10 * n + shard + 16), shard, n) for shard in range(3) for n in range(9))
    assert total.smallest == sizes[:6]
    assert total.largest == sizes[:-7:-1]
    assert len({shard for _, shard, _ in total.drawn}) == 3
    assert total.drawn == sorted(total.drawn)
    numbers = run(tmp_path, out=tmp_path / "forwards.html")
    assert numbers == stats(tmp_path, run_jobs=backwards, out=tmp_path / "backwards.html")
    assert (tmp_path / "forwards.html").read_text() == (tmp_path / "backwards.html").read_text()
    stems = [f"{shard}/{key}" for shard in range(3) for key in ("same", "more")]
    assert numbers["duplicates"]["exact"]["groups"] == [stems]
    assert run(tmp_path, out=tmp_path / "other.html", seed=1) == numbers
    assert (tmp_path / "other.html").read_text() != (tmp_path / "forwards.html").read_text()


def test_classes_beyond_the_limit_are_counted_together(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.cls", b"%d" % min(n, 10_002)) for n in range(10_010)])
    numbers = run(tmp_path)
    assert len(numbers["classes"]) == 10_000
    assert numbers["num_other_classes"] == 10


def test_hashes_that_share_too_many_bits_are_passed_over_and_told() -> None:
    labels, passed_over = near_labels(np.arange(0, 5000 * 4096, 4096, dtype=np.uint64) << np.uint64(2))
    assert (len(labels), passed_over > 0) == (5000, True)


def test_transparent_pictures_look_as_on_white() -> None:
    with Image.open(io.BytesIO(picture(5))) as image:
        clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    files = io.BytesIO(), io.BytesIO()
    clear.save(files[0], "PNG")
    white.save(files[1], "PNG")
    looks = [difference_hash(file.getvalue()) for file in files]
    assert looks[0] == looks[1]
    assert looks[0] != difference_hash(picture(5))


def test_tokens_are_counted(tmp_path: Path, scene_shards: Path) -> None:
    text = "a red circle on the left"
    shard = write_tar(tmp_path / "a.tar", [("a.txt", text.encode())])
    tokenizer = scene_shards / "tokenizer.json"
    expected = len(Tokenizer.from_file(str(tokenizer)).encode(text).ids)
    assert run(shard, tokenizer=tokenizer)["columns"]["txt.tokens"]["max"] == expected


def test_the_verb_writes_a_page_that_escapes_what_shards_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "<script>alert(1)</script>"
    members = [("a.jpg", picture(1)), ("a.txt", evil.encode()), ("a.cls", evil.encode())]
    members += [("b.jpg", picture(1)), ("b.<script>", b"1"), ("c.jpg", b"broken")]
    write_tar(tmp_path / "a.tar", members)
    page = tmp_path / "stats.html"
    assert main(["data", "stats", str(tmp_path), "--out", str(page), "--workers", "1"]) == 0
    assert "equal bytes: 2 samples in 1 groups" in capsys.readouterr().out
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags}.isdisjoint({"script"})
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 4  # width, height, aspect, characters
    assert "Equal bytes, group 1 of 1: 2 samples" in parsed.text
    assert "The largest pictures" in parsed.text
    assert evil in parsed.text
    assert main(["data", "stats", str(tmp_path), "--json", "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == {evil: 1}


def test_remote_shards_have_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for shard in range(2):
        members = [(f"{shard}{n}.jpg", picture(10 * shard + n)) for n in range(3)]
        write_tar(
            tmp_path / f"{shard}.tar",
            [*members, (f"{shard}x.jpg", picture(99)), (f"{shard}y.txt", b"%d" % shard)],
        )
    files = {f"/s/{shard}.tar": (tmp_path / f"{shard}.tar").read_bytes() for shard in range(2)}
    local = run(tmp_path, out=tmp_path / "local.html")
    with WebServer(files) as server:
        remote = run(server.url("/s/{0..1}.tar"), out=tmp_path / "remote.html")
    assert remote == local
    assert remote["duplicates"]["exact"]["groups"] == [["0/0x", "1/1x"]]
    pages = [Page(tmp_path / f"{name}.html") for name in ("local", "remote")]
    pictures = [[values["src"] for tag, values in page.tags if tag == "img"] for page in pages]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 8
