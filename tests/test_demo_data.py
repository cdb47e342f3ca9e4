"""Shard writing, drawn scenes and the emoji data, with four hand-made icons in place of the real packages."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image
from tokenizers import Tokenizer

from mmscale.data import demo
from mmscale.data.index import read_index
from mmscale.data.pack import DemoInfo, ShardWriter, train_tokenizer
from mmscale.data.scenes import SAMPLE_RATE, make_scenes, scenes_plan
from mmscale.errors import DataError, UserError


def _read(shard: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, field = member.name.split(".", 1)
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[field] = file.read()
    return samples


def _facts(info: DemoInfo, split: str) -> list[dict]:
    return [json.loads(fields["json"]) for shard in info.shards[split] for fields in _read(shard).values()]


def _digests(folder: Path) -> dict[str, str]:
    """Of all that is promised to be the same bytes: the indexes hold the shards' times, so not of them."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".index"
    }


class TestShardWriter:
    def test_shards_hold_what_was_written_and_are_indexed(self, tmp_path: Path) -> None:
        with ShardWriter(tmp_path / "new" / "folder", "train", samples_per_shard=2) as writer:
            for number in range(5):
                writer.write(f"{number:03d}", {"txt": f"text {number}".encode(), "bin": b"\0" * number})
        names = [path.name for path in writer.paths]
        assert names == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
        assert writer.num_samples == 5
        samples = {key: fields for path in writer.paths for key, fields in _read(path).items()}
        assert samples == {
            f"{number:03d}": {"txt": f"text {number}".encode(), "bin": b"\0" * number} for number in range(5)
        }
        assert [len(read_index(path)) for path in writer.paths] == [2, 2, 1]
        assert not list(writer.folder.glob("*.tmp"))

    def test_bytes_depend_on_the_samples_alone(self, tmp_path: Path) -> None:
        for name in "ab":
            with ShardWriter(tmp_path / name) as writer:
                writer.write("k", {"txt": b"x"})
            if name == "a":
                time.sleep(1.01)  # tar headers hold whole seconds
        first, second = (tmp_path / name / "shard-000000.tar" for name in "ab")
        assert first.read_bytes() == second.read_bytes()
        with tarfile.open(first) as tar:
            member = tar.getmembers()[0]
        assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)

    def test_an_error_drops_the_shard_under_way_and_keeps_complete_ones(self, tmp_path: Path) -> None:
        def write_and_stop() -> None:
            with ShardWriter(tmp_path, samples_per_shard=2) as writer:
                for key in "abc":
                    writer.write(key, {"txt": b"1"})
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            write_and_stop()
        assert [path.name for path in tmp_path.glob("*.tar")] == ["shard-000000.tar"]
        assert not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize(
        ("key", "fields", "message"),
        [
            ("a.b", {"txt": b""}, "key"),
            ("", {"txt": b""}, "key"),
            ("folder/", {"txt": b""}, "key"),
            ("/root", {"txt": b""}, "key"),
            ("dup", {"txt": b""}, "'dup' was already written"),
            ("x", {}, "no fields"),
            ("x", {"": b""}, "field named ''"),
            ("x", {"a/b": b""}, "field named 'a/b'"),
            ("x", {"JPG": b"", "jpg": b""}, "field 'jpg' twice"),
            ("__x__/a", {"txt": b""}, "like __this__"),
        ],
    )
    def test_what_a_tar_shard_cannot_hold(
        self, tmp_path: Path, key: str, fields: Mapping[str, bytes], message: str
    ) -> None:
        with ShardWriter(tmp_path) as writer:
            writer.write("dup", {"txt": b""})
            with pytest.raises(DataError, match=message) as error:
                writer.write(key, fields)
        assert "shard-000000.tar" in str(error.value)
        assert list(_read(writer.paths[0])) == ["dup"]

    def test_a_full_disk_is_said_in_words(self, tmp_path: Path) -> None:
        if not os.access("/dev/full", os.W_OK):
            pytest.skip("no /dev/full on this machine")
        (tmp_path / ".shard-000000.tar.tmp").symlink_to("/dev/full")
        writer = ShardWriter(tmp_path)
        with pytest.raises(DataError, match=r"no space left.*shard-000000\.tar"), writer:
            writer.write("a", {"bin": b"\0" * 100_000})
        assert not list(tmp_path.iterdir())

    def test_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="samples_per_shard is 0"):
            ShardWriter(tmp_path, samples_per_shard=0)
        with pytest.raises(ValueError, match="prefix is 'a/b'"):
            ShardWriter(tmp_path, "a/b")


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> DemoInfo:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "data", num_samples=64, samples_per_shard=30)


class TestScenes:
    def test_counts(self, info: DemoInfo) -> None:
        assert info.num_samples == {"train": 64, "test-style": 22, "test-concepts": 9}
        assert info.num_concepts == {"train": 22, "test-style": 22, "test-concepts": 3}
        assert [len(_read(shard)) for shard in info.shards["train"]] == [21, 21, 22]
        assert (info.source, info.cached) == ("scenes", False)

    def test_records(self, info: DemoInfo) -> None:
        for shard in info.shards["train"]:
            for key, fields in _read(shard).items():
                assert list(fields) == ["jpg", "flac", "json"]
                facts = json.loads(fields["json"])
                assert key == f"{facts['concept']:x}_{facts['style']}"
                assert facts["captions"][0] == facts["name"]
                assert facts["captions"][-1] == facts["name_zh"]
                assert facts["spoken"] == (facts["name_zh"] if facts["lang"] == "zh" else facts["name"])
                picture = np.asarray(Image.open(io.BytesIO(fields["jpg"])))
                assert picture.shape == (128, 128, 3)
                assert (picture.min(axis=2) < 200).mean() > 0.01, "something is drawn"
                assert (picture[0, 0] > 250).all(), "on white"
                wave, rate = soundfile.read(io.BytesIO(fields["flac"]), dtype="int16")
                assert rate == SAMPLE_RATE
                assert wave.ndim == 1
                assert 0.2 < len(wave) / rate < 1.0
                assert np.abs(wave).max() > 3000

    def test_splits_keep_apart_what_they_say(self, info: DemoInfo) -> None:
        train, style, concepts = (_facts(info, split) for split in ("train", "test-style", "test-concepts"))

        def values(split: list[dict], key: str) -> set:
            return {facts[key] for facts in split}

        assert values(style, "concept") == values(train, "concept")
        assert values(concepts, "concept").isdisjoint(values(train, "concept"))
        assert values(concepts, "name").isdisjoint(values(train, "name"))
        assert values(style, "style").isdisjoint(values(train, "style"))
        assert values(concepts, "style") <= values(train, "style")
        assert values(style, "voice").isdisjoint(values(train, "voice"))
        assert values(concepts, "voice").isdisjoint(values(train, "voice"))
        assert {facts["lang"] for facts in train} == {"en", "zh"}

    def test_order_is_shuffled(self, info: DemoInfo) -> None:
        train = [facts["concept"] for facts in _facts(info, "train")]
        neighbours = sum(first == second for first, second in itertools.pairwise(train))
        assert neighbours < 12, "unshuffled, 42 of 63 neighbours would share their concept; by chance, 2 do"

    def test_words_have_tones(self, info: DemoInfo) -> None:
        """The melody can be read back: each word's loudest frequency is the one of its tone."""
        from mmscale.data.scenes import _COLORS, _RELATIONS, _SHAPES, _TONES

        vocabulary = [*_COLORS, *_SHAPES, *_RELATIONS]
        for shard in info.shards["train"]:
            for fields in _read(shard).values():
                facts = json.loads(fields["json"])
                words = facts["name"].replace("left of", "left_of").split()
                words = [word.replace("_", " ") for word in words]
                wave, _ = soundfile.read(io.BytesIO(fields["flac"]))
                heard = []
                for tone in np.array_split(wave, len(words)):
                    spectrum = np.abs(np.fft.rfft(tone * np.hanning(len(tone)), SAMPLE_RATE))
                    heard.append(
                        vocabulary[
                            int(np.argmin([abs(np.log(np.argmax(spectrum) / _TONES[w])) for w in vocabulary]))
                        ]
                    )
                assert heard == (words if facts["lang"] == "en" else words[::-1])

    def test_same_arguments_same_bytes_on_any_number_of_workers(self, info: DemoInfo, tmp_path: Path) -> None:
        make_scenes(tmp_path, num_samples=64, samples_per_shard=30, workers=2)
        assert _digests(tmp_path) == _digests(info.path)

    def test_seed_matters(self, tmp_path: Path) -> None:
        names = [
            {
                facts["name"]
                for facts in _facts(make_scenes(tmp_path / str(seed), num_samples=9, seed=seed), "train")
            }
            for seed in (0, 1)
        ]
        assert names[0] != names[1]

    def test_second_call_returns_at_once(self, info: DemoInfo, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("made again")

        monkeypatch.setattr("mmscale.data.scenes.build", fail)
        again = make_scenes(info.path, num_samples=64, samples_per_shard=30)
        assert again.cached
        assert (again.shards, again.num_samples) == (info.shards, info.num_samples)

    def test_other_arguments_replace_the_data(self, tmp_path: Path) -> None:
        make_scenes(tmp_path, num_samples=30, samples_per_shard=10)
        info = make_scenes(tmp_path, num_samples=9, samples_per_shard=10)
        assert not info.cached
        assert [path.name for path in (tmp_path / "train").glob("*.tar")] == ["train-000000.tar"]
        assert len(_facts(info, "train")) == 9

    def test_damaged_data_is_made_again(self, tmp_path: Path) -> None:
        info = make_scenes(tmp_path, num_samples=9)
        before = _digests(tmp_path)
        info.shards["train"][0].unlink()
        assert not make_scenes(tmp_path, num_samples=9).cached
        assert _digests(tmp_path) == before

    def test_folders_that_hold_something_else_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(UserError, match="holds other files"):
            make_scenes(tmp_path)
        with pytest.raises(UserError, match="is a file"):
            make_scenes(tmp_path / "notes.txt")
        (tmp_path / "demo.json").write_text("{}")
        with pytest.raises(UserError, match="holds other files"):
            make_scenes(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "notes.txt"]

    def test_no_room_is_said_before_the_work(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Usage:
            free = 1_000_000

        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
        with pytest.raises(DataError, match=r"needs about 2 MB, and its disk has 1 MB left"):
            make_scenes(tmp_path / "data", num_samples=64)

    def test_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="num_samples is 0"):
            make_scenes(tmp_path, num_samples=0)
        with pytest.raises(UserError, match="there are scenes for"):
            make_scenes(tmp_path, num_samples=1_000_000)

    def test_several_processes_may_ask_at_once(self, tmp_path: Path, info: DemoInfo) -> None:
        program = """
            import sys
            from pathlib import Path
            from mmscale.data.scenes import make_scenes
            print(make_scenes(Path(sys.argv[1]), num_samples=64, samples_per_shard=30).cached)
        """
        arguments = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "data")]
        ranks = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        said = sorted(rank.communicate(timeout=60)[0].strip() for rank in ranks)
        assert said == ["False", "True", "True"], "one makes it, the others wait for it"
        assert _digests(tmp_path / "data") == _digests(info.path)

    def test_one_sample_is_enough(self, tmp_path: Path) -> None:
        assert make_scenes(tmp_path, num_samples=1).num_samples == {
            "train": 1,
            "test-style": 1,
            "test-concepts": 3,
        }


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = make_scenes(tmp_path / "whole", num_samples=60, samples_per_shard=10)
    # dies after 35 samples, in the fourth shard, as if the machine had failed: no exit handler runs
    program = """
        import os, sys
        from pathlib import Path
        from mmscale.data import scenes
        count, render = 0, scenes._render
        def dying(scene):
            global count
            count += 1
            if count > 35:
                os._exit(9)
            return render(scene)
        scenes._render = dying
        scenes.make_scenes(Path(sys.argv[1]), num_samples=60, samples_per_shard=10)
    """
    out = tmp_path / "killed"
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(out)], timeout=60)
    assert result.returncode == 9
    finished = sorted((out / "train").glob("*.tar"))
    assert len(finished) == 3
    (out / "train" / "train-000002.tar.index").unlink()  # as if it had died just before the index
    times = [path.stat().st_mtime_ns for path in finished]
    info = make_scenes(out, num_samples=60, samples_per_shard=10)
    assert not info.cached
    assert [path.stat().st_mtime_ns for path in finished] == times, "finished shards are kept"
    assert _digests(out) == _digests(whole.path)
    assert len(list(out.rglob("*.index"))) == len(list(out.rglob("*.tar")))


@pytest.mark.distributed
def test_a_dead_worker_is_an_error_and_the_next_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmscale.data import scenes

    with monkeypatch.context() as patch:
        patch.setattr(scenes, "_render", lambda _: os._exit(9))
        with pytest.raises(UserError, match="a worker process died"):
            make_scenes(tmp_path, num_samples=9, samples_per_shard=3, workers=2)
    assert make_scenes(tmp_path, num_samples=9, samples_per_shard=3).num_samples["train"] == 9


@pytest.mark.distributed
def test_children_follow_a_dead_parent(tmp_path: Path) -> None:
    program = """
        import os, sys, time
        from pathlib import Path
        from mmscale.data import scenes
        def slow(scene):
            (Path(sys.argv[2]) / str(os.getpid())).touch()
            time.sleep(60)
        scenes._render = slow
        scenes.make_scenes(Path(sys.argv[1]), num_samples=60, samples_per_shard=10, workers=2)
    """
    pids = tmp_path / "pids"
    pids.mkdir()
    arguments = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "out"), str(pids)]
    with subprocess.Popen(arguments) as parent:
        deadline = time.monotonic() + 30
        while len(list(pids.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        children = [int(path.name) for path in pids.iterdir()]
        parent.kill()
    assert len(children) == 2
    deadline = time.monotonic() + 10
    while any(_lives(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_lives(child) for child in children)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


class TestTokenizer:
    def test_any_text_round_trips_and_special_tokens_come_first(self) -> None:
        texts = ["red apple", "红苹果", "green apple", "绿苹果"] * 3
        tokenizer = Tokenizer.from_str(train_tokenizer(texts, vocab_size=300))
        assert [tokenizer.token_to_id(token) for token in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
        for text in ("red apple", "红苹果", "未见过的字 and unseen words, 🍎 é\n"):
            ids = tokenizer.encode(text).ids
            assert not {0, 1, 2} & set(ids)
            assert tokenizer.decode(ids) == text
        assert len(tokenizer.encode("苹果").ids) < 6, "frequent Chinese is more than bytes"
        assert tokenizer.get_vocab_size() <= 300

    def test_same_texts_same_tokenizer(self) -> None:
        texts = [text for scene in scenes_plan(num_samples=90, seed=0).texts for text in (scene,)]
        assert train_tokenizer(texts) == train_tokenizer(texts)


# Emoji: four icons, with the traps that the real packages have

_ICONS = {
    "1F534": ("red-circle", '<circle cx="16" cy="16" r="14" fill="#d22"/>', "red circle", "红色圆"),
    "2764": (
        "red-heart",
        '<path d="M16 30L2 12a8 8 0 0 1 14-6a8 8 0 0 1 14 6z" fill="#d22"/>',
        "red heart",
        "红心",
    ),
    "1F7E6": (
        "blue-square",
        '<rect x="2" y="2" width="28" height="28" fill="#22d"/>',
        "blue square",
        "蓝色方块",
    ),
    "1F9D1-200D-1F33E": ("farmer", '<path d="M2 30L16 2l14 28z" fill="#2a2"/>', "farmer", "农民"),
    "1F468-200D-1F33E": ("man-farmer", '<path d="M2 30L16 2l14 28z" fill="#2a3"/>', "man farmer", "农夫"),
    "1F46E-200D-2640": ("police-woman", '<path d="M2 2h9v9z"/>', "woman police officer", "女警察"),
}


def _tarball(path: Path, members: Mapping[str, object]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, value in members.items():
            content = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The five tarballs as npm names them, each style with its own way to spell code points."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for number, style in enumerate(demo._STYLES):
        icons = {name: {"body": body} for name, body, _, _ in _ICONS.values()}
        codes = {code.lower() if number % 2 else code: name for code, (name, _, _, _) in _ICONS.items()}
        if style == "twemoji":
            codes["2764-fe0f"] = codes.pop("2764")
            codes["1f4a4"] = "hidden-alias"  # listed, but not drawn
        package, version, _ = demo._PACKAGES[style]
        _tarball(
            demo._tarball(folder, package, version),
            {"icons.json": {"icons": icons, "width": 32, "height": 32}, "chars.json": codes},
        )
    entries: dict[str, list[dict]] = {"en": [], "zh": []}
    for code, (_, _, name, name_zh) in _ICONS.items():
        for language, label in (("en", name), ("zh", name_zh)):
            entries[language].append(
                {
                    "hexcode": "2764-FE0F" if code == "2764" else code,
                    "label": label,
                    "tags": [*label.split(), "one", "two", "three", "four"],
                    "group": 0,
                    "subgroup": 3,
                }
            )
    package, version, _ = demo._PACKAGES["names"]
    _tarball(
        demo._tarball(folder, package, version),
        {
            "en/data.json": entries["en"],
            "zh/data.json": entries["zh"],
            "meta/groups.json": {"subgroups": {"3": "face-hand"}},
        },
    )
    return folder


def _need_drawing_and_speech() -> None:
    pytest.importorskip("resvg_py", reason="resvg_py, of mmscale[demo], draws the pictures")
    pytest.importorskip("espeakng_loader", reason="espeakng_loader, of mmscale[demo], holds the voices")


class TestEmoji:
    def test_packages_are_joined_by_code_point_and_variants_left_out(self, packages: Path) -> None:
        emojis = {emoji.code: emoji for emoji in demo.read_packages(packages)}
        assert sorted(emojis) == ["1f534", "1f7e6", "1f9d1-200d-1f33e", "2764"]
        assert emojis["2764"].captions == ("red heart", "face hand: red heart", "one, two, three", "four")
        assert emojis["2764"].captions_zh[0] == "红心"
        assert set(emojis["2764"].drawings) == set(demo._STYLES)

    def test_pictures(self, packages: Path) -> None:
        pytest.importorskip("resvg_py", reason="resvg_py, of mmscale[demo], draws the pictures")
        emojis = {emoji.code: emoji for emoji in demo.read_packages(packages)}
        picture = np.asarray(emojis["1f534"].drawings["noto"]())
        assert picture.shape == (128, 128, 3)
        np.testing.assert_array_equal(picture[64, 64], (0xDD, 0x22, 0x22))
        np.testing.assert_array_equal(picture[0, 0], (255, 255, 255))

    def test_an_oblong_icon_is_centred_on_a_square(self) -> None:
        pytest.importorskip("resvg_py", reason="resvg_py, of mmscale[demo], draws the pictures")
        icon = {"body": '<rect width="32" height="16" fill="#d22"/>', "width": 32, "height": 16}
        picture = np.asarray(demo._draw_svg(demo._svg(icon, {"width": 16, "height": 16})))
        assert picture.shape == (128, 128, 3)
        assert (picture[:32] == 255).all()
        assert (picture[32:96] == (0xDD, 0x22, 0x22)).all()
        assert (picture[96:] == 255).all()

    def test_speech(self) -> None:
        pytest.importorskip("espeakng_loader", reason="espeakng_loader, of mmscale[demo], holds the voices")
        calls = [("red apple", "en-us+f2"), ("红苹果", "cmn"), ("red apple", "en-us+f2")]
        clips = []
        for _ in range(2):
            with demo.Speaker() as speaker:
                clips.append([speaker.say(text, voice=voice, speed=160) for text, voice in calls])
        for first, second in zip(*clips, strict=True):
            np.testing.assert_array_equal(first, second)
        for clip in clips[0]:
            assert clip.dtype == np.int16
            assert 0.3 < len(clip) / SAMPLE_RATE < 1.5, "two words take about half a second"
            assert np.abs(clip).max() > 3000
        with demo.Speaker() as speaker:
            slow = speaker.say("red apple", voice="en-us", speed=100)
            fast = speaker.say("red apple", voice="en-us", speed=200)
            assert len(slow) > 1.3 * len(fast)
            with pytest.raises(UserError, match="no voice 'xx-none'"):
                speaker.say("red apple", voice="xx-none")

    def test_resampling_keeps_a_tone_and_drops_what_the_rate_cannot_hold(self) -> None:
        seconds = np.arange(22_050) / 22_050
        tone = np.rint(10_000 * np.sin(2 * np.pi * 1_000 * seconds)).astype(np.int16)
        resampled = demo._resample(tone, 22_050)
        assert len(resampled) == 16_000
        expected = 10_000 * np.sin(2 * np.pi * 1_000 * np.arange(16_000) / 16_000)
        # away from the ends, where the cut spectrum rings; 50 of 10,000 leaves room for what of it gets there
        np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=50)
        high = np.rint(10_000 * np.sin(2 * np.pi * 9_500 * seconds)).astype(np.int16)
        assert np.abs(demo._resample(high, 22_050)[500:-500]).max() < 100

    def test_data_set(self, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        _need_drawing_and_speech()
        fetched = []

        def fetch(folder: Path) -> None:
            fetched.append(folder)
            for tarball in packages.iterdir():
                (folder / tarball.name).write_bytes(tarball.read_bytes())

        monkeypatch.setattr(demo, "_fetch", fetch)
        info = demo.make_demo(tmp_path / "a", workers=1, progress=False, source="emoji")
        assert info.source == "emoji"
        assert info.num_samples == {"train": 9, "test-style": 3, "test-concepts": 3}
        train, style, concepts = (_facts(info, split) for split in ("train", "test-style", "test-concepts"))
        assert {facts["style"] for facts in train}.isdisjoint(facts["style"] for facts in style)
        assert {facts["concept"] for facts in train}.isdisjoint(facts["concept"] for facts in concepts)
        assert {facts["concept"] for facts in train} == {facts["concept"] for facts in style}
        train_voices = {facts["voice"] for facts in train}
        assert train_voices.isdisjoint(facts["voice"] for facts in [*style, *concepts])
        heard = {(facts["concept"], facts["lang"]) for facts in train}
        assert {(facts["concept"], facts["lang"]) for facts in style} <= heard
        for shard in info.shards["train"]:
            for key, fields in _read(shard).items():
                facts = json.loads(fields["json"])
                code = "-".join(f"{ord(char):x}" for char in facts["emoji"])
                assert key == f"{code}_{facts['style']}"
                assert facts["captions"][0] == facts["name"]
                assert facts["spoken"] == facts["name_zh" if facts["lang"] == "zh" else "name"]
                assert soundfile.info(io.BytesIO(fields["flac"])).samplerate == SAMPLE_RATE
                assert Image.open(io.BytesIO(fields["jpg"])).size == (128, 128)
        licenses = (info.path / "LICENSES.md").read_text()
        for words in ("Apache-2.0", "CC-BY-4.0", "MIT", "CC-BY-SA-4.0", "GPL-3.0", "emojibase-data 17.0.0"):
            assert words in licenses
        assert (
            json.loads((info.path / "demo.json").read_text())["details"]["packages"]["emojibase-data"]
            == "17.0.0"
        )
        assert demo.make_demo(tmp_path / "a", source="emoji").cached
        assert len(fetched) == 1, "the second call asks for nothing"
        assert not fetched[0].exists(), "the scratch folder is gone"
        demo.make_demo(tmp_path / "b", workers=2, progress=False, source="emoji")
        assert _digests(tmp_path / "b") == _digests(tmp_path / "a")

    def test_limit(self, packages: Path) -> None:
        plan = demo.plan_emoji(
            demo.read_packages(packages), demo._STYLES, "noto", details={}, licenses="", seed=0, limit=2
        )
        assert [len(plan.splits[split]) for split in ("train", "test-style", "test-concepts")] == [3, 1, 3]


def _fake_npm(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)


class TestFallback:
    @pytest.fixture(autouse=True)
    def _no_font(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _need_drawing_and_speech()
        monkeypatch.setattr(demo, "_FONT", Path("/nowhere/font.ttf"))

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            ("echo 'npm error code ENOTFOUND' >&2; exit 1", "failed with code 1: npm error code ENOTFOUND"),
            ("exit 0", "npm didn't bring @iconify-json/noto@1.2.9"),
            (
                # the folder is the argument after --pack-destination
                'while [ "$1" != --pack-destination ]; do shift; done; '
                'echo cut > "$2/iconify-json-noto-1.2.9.tgz"',
                "npm brought another @iconify-json/noto@1.2.9",
            ),
        ],
    )
    def test_without_emoji_scenes_are_drawn_and_stderr_says_so(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        script: str,
        message: str,
    ) -> None:
        _fake_npm(tmp_path / "bin", script)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        info = demo.make_demo(tmp_path / "out", limit=4, workers=1)
        assert info.source == "scenes"
        said = capsys.readouterr().err
        assert message in said
        assert "Using drawn scenes" in said
        assert demo.make_demo(tmp_path / "out", limit=4).cached
        assert "delete it to try for emoji again" in capsys.readouterr().err

    def test_asking_for_emoji_is_an_error_where_there_are_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _fake_npm(tmp_path / "bin", "exit 1")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        with pytest.raises(UserError, match=r"npm failed with code 1.*fonts-noto-color-emoji.*not installed"):
            demo.make_demo(tmp_path / "out", source="emoji")
        assert not (tmp_path / "out").exists()

    def test_arguments(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="source is 'photos'"):
            demo.make_demo(tmp_path, source="photos")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="limit is 1"):
            demo.make_demo(tmp_path, limit=1)


def test_font_of_the_distribution(tmp_path: Path) -> None:
    if not (demo._FONT.is_file() and demo._CLDR.is_dir()):
        pytest.skip("fonts-noto-color-emoji and unicode-cldr-core are not installed")
    emojis = demo.read_font(demo._FONT, demo._CLDR)
    assert len(emojis) > 1000
    apple = next(emoji for emoji in emojis if emoji.code == "1f34e")
    assert apple.captions[0] == "red apple"
    pictures = [np.asarray(draw()) for draw in apple.drawings.values()]
    assert all(picture.shape == (128, 128, 3) for picture in pictures)
    assert all((a != b).any() for place, a in enumerate(pictures) for b in pictures[:place])
