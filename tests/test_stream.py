"""The order of samples, its independence of ranks and resuming, schemas, faults, and the reading threads."""

import gc
import hashlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mmscale.data import Batch, DataError, Field, ShardStream, build_index
from mmscale.data.fields import Source as _Source
from mmscale.data.order import FullOrder as _Order
from mmscale.data.shards import MAX_OPEN_FILES
from mmscale.errors import ConfigError

NUM_SHARDS, NUM_SAMPLES = 3, 50


def write_shard(path: Path, samples: list[dict[str, Any]]) -> Path:
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    build_index(path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 16, 17 and 17 samples: {txt, json, bin}."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = np.array_split(np.arange(NUM_SAMPLES), NUM_SHARDS)
    for shard, part in enumerate(numbers):
        samples = [
            {
                "__key__": f"k{i:03d}",
                "txt": f"caption {i}",
                "json": {"captions": [f"first {i}", f"second {i}", f"third {i}"], "deep": {"label": i}},
                "bin": bytes([i]) * 100,
            }
            for i in part.tolist()
        ]
        write_shard(folder / f"{shard:06d}.tar", samples)
    return folder


def keys_of(stream: ShardStream) -> list[list[str]]:
    return [batch.sample_keys for batch in stream]


def chain(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def read_bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


# --- order ---


@given(num_samples=st.integers(1, 5000), seed=st.integers(-(2**40), 2**40), epoch=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_each_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    order = _Order(seed, num_samples, shuffle=True).at(epoch, np.arange(num_samples))
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(num_samples=st.integers(1, 10**15), offset=st.integers(0, 10**15))
@settings(max_examples=50, deadline=None)
def test_seeking_costs_nothing_however_large_the_set(num_samples: int, offset: int) -> None:
    offsets = np.array([offset % num_samples])
    (sample,) = _Order(0, num_samples, shuffle=True).at(0, offsets)
    assert 0 <= sample < num_samples


def test_order_never_changes() -> None:
    """Pinned: a run resumed with a later version must go on in the same order."""
    text = [
        _Order(seed, num_samples, shuffle=True).at(epoch, np.arange(num_samples))
        for num_samples in (50, 2500)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    digest = hashlib.blake2b(np.concatenate(text).astype("<i8").tobytes(), digest_size=16).hexdigest()
    assert digest == "af43b152753cfe9ac2f17a494d252d94"


@pytest.mark.parametrize("num_samples", [2, 3, 5, 8, 20, 1025, 5000])
def test_order_is_random(num_samples: int) -> None:
    """Over 3,000 epochs, every sample comes as often in each of the first places: chi-squared for each place.

    With c cells its mean is c - 1 and its variance 2 (c - 1); five deviations above are reached by chance in
    fewer than one of 10,000 cases (and the seed is fixed). Larger sets are counted in 20 cells.
    """
    num_epochs, num_places = 3000, min(num_samples, 8)
    places = np.arange(num_places)
    order = _Order(7, num_samples, shuffle=True)
    samples = np.stack([order.at(epoch, places) for epoch in range(num_epochs)])
    num_cells = min(num_samples, 20)
    cells = samples * num_cells // num_samples
    sizes = np.bincount(np.arange(num_samples) * num_cells // num_samples)
    expected = num_epochs * sizes / num_samples
    for place in places:
        counts = np.bincount(cells[:, place], minlength=num_cells)
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < num_cells - 1 + 5 * (2 * (num_cells - 1)) ** 0.5


def test_neighbours_are_no_neighbours_after() -> None:
    order = _Order(0, 10_000, shuffle=True).at(0, np.arange(10_000))
    # For a random permutation the correlation of successive values has deviation 1 / sqrt(n) = 0.01.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_every_sample_once_an_epoch_and_each_epoch_differs(shards: Path) -> None:
    stream = ShardStream(shards, batch_size=10, epochs=3)
    assert (stream.num_samples, stream.steps_per_epoch, len(stream)) == (50, 5, 15)
    batches = list(stream)
    epochs = [
        [key for batch in batches if batch.epoch == epoch for key in batch.sample_keys] for epoch in range(3)
    ]
    assert all(len(set(keys)) == 50 for keys in epochs)
    assert len({tuple(keys) for keys in epochs}) == 3
    assert [batch.step for batch in batches] == list(range(15))
    assert [batch.position for batch in batches] == list(range(10, 160, 10))
    assert keys_of(ShardStream(shards, batch_size=10, seed=1)) != [b.sample_keys for b in batches[:5]]
    assert len(stream) == 0
    assert list(stream) == []  # a finished stream stays finished
    with pytest.raises(StopIteration):
        next(stream)


def test_natural_order_and_contents(shards: Path) -> None:
    (batch,) = ShardStream(shards, batch_size=50, shuffle=False)
    assert batch.sample_keys[:2] == ["000000/k000", "000000/k001"]
    assert batch.sample_keys[-1] == "000002/k049"
    assert batch["txt"] == [f"caption {i}".encode() for i in range(50)]
    assert batch["bin"] == [bytes([i]) * 100 for i in range(50)]
    assert batch.names == ["bin", "json", "txt"]
    assert "jpg" not in batch
    with pytest.raises(KeyError, match=r"no field 'jpg'.*'txt'"):
        batch["jpg"]


def test_same_samples_as_webdataset(shards: Path) -> None:
    urls = sorted(map(str, shards.glob("*.tar")))
    expected = {s["__key__"]: (s["txt"], s["bin"]) for s in webdataset.WebDataset(urls, shardshuffle=False)}
    found = {}
    for batch in ShardStream(shards, batch_size=5):
        for key, txt, body in zip(batch.sample_keys, batch["txt"], batch["bin"], strict=True):
            found[key.split("/")[1]] = (txt, body)
    assert found == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("remainder", ["drop", "wrap", "pad"])
def test_ranks_share_the_global_batch(shards: Path, world_size: int, remainder: Any) -> None:
    def stream(rank: int, world_size: int) -> ShardStream:
        return ShardStream(
            shards, batch_size=12, epochs=2, remainder=remainder, rank=rank, world_size=world_size
        )

    alone = list(stream(0, 1))
    ranks = [list(stream(rank, world_size)) for rank in range(world_size)]
    assert len(alone) == (8 if remainder == "drop" else 10)
    for step, whole in enumerate(alone):
        parts = [rank[step] for rank in ranks]
        assert chain(part.sample_keys for part in parts) == whole.sample_keys
        assert np.concatenate([part.valid for part in parts]).tolist() == whole.valid.tolist()
        assert {(part.position, part.epoch, part.step) for part in parts} == {
            (whole.position, whole.epoch, whole.step)
        }


def test_remainders(shards: Path) -> None:
    def epoch(remainder: Any) -> list[Batch]:
        return list(ShardStream(shards, batch_size=12, remainder=remainder))

    dropped, wrapped, padded = epoch("drop"), epoch("wrap"), epoch("pad")
    assert [b.sample_keys for b in wrapped[:4]] == [b.sample_keys for b in dropped]
    assert [b.sample_keys for b in wrapped] == [b.sample_keys for b in padded]
    assert wrapped[-1].sample_keys[2:] == wrapped[0].sample_keys[:10]
    assert wrapped[-1].valid.all()
    assert padded[-1].valid.tolist() == [True] * 2 + [False] * 10
    assert (wrapped[-1].position, padded[-1].position) == (60, 50)
    small = ShardStream(shards, batch_size=120, remainder="pad")
    assert next(small).valid.sum() == 50
    with pytest.raises(DataError, match="50 samples don't fill one batch of 120"):
        ShardStream(shards, batch_size=120)


# --- state ---


def test_resume_at_any_step_on_any_number_of_ranks(shards: Path) -> None:
    """State taken at each step of a run on one rank; the rest is the same on 1, 2, 3 and 4 ranks."""

    def make(rank: int, world_size: int) -> ShardStream:
        return ShardStream(shards, batch_size=12, epochs=2, seed=3, rank=rank, world_size=world_size)

    whole = keys_of(make(0, 1))
    first = make(0, 1)
    for step in range(len(whole) + 1):
        state = json.loads(json.dumps(first.state_dict()))
        assert state["step"] == step
        for world_size in (1, 2, 3, 4):
            rest = []
            for rank in range(world_size):
                stream = make(rank, world_size)
                stream.load_state_dict(state)
                assert len(stream) == len(whole) - step
                rest.append([batch.sample_keys for batch in stream])
            assert [chain(parts) for parts in zip(*rest, strict=True)] == whole[step:]
        if step < len(whole):
            next(first)


def test_state_counts_what_was_returned_not_what_lies_ready(shards: Path) -> None:
    made = []
    stream = ShardStream(
        shards, batch_size=10, epochs=None, prefetch=4, transform=lambda batch: made.append(batch.step)
    )
    for step in range(12):
        state = stream.state_dict()
        assert (state["step"], state["position"], state["epoch"]) == (step, 10 * step, step // 5)
        batch = next(stream)
        assert stream.state_dict()["position"] == batch.position
    deadline = time.monotonic() + 10
    while len(made) < 16 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert made == list(range(16))  # four ahead, and no more
    stream.close()


def test_state_is_equal_on_every_rank_and_small(shards: Path) -> None:
    states = []
    for rank in range(3):
        stream = ShardStream(shards, batch_size=12, rank=rank, world_size=3, remainder="pad")
        for _ in range(2):
            next(stream)
        states.append(stream.state_dict())
        stream.close()
    assert states[0] == states[1] == states[2]
    assert len(json.dumps(states[0])) < 400


def test_seek_within_a_running_stream(shards: Path) -> None:
    stream = ShardStream(shards, batch_size=10, epochs=2)
    whole = keys_of(stream)
    for step in (0, 7, 3, 10):
        stream.seek(step)
        assert keys_of(stream) == whole[step:]
    with pytest.raises(ValueError, match="step must be a whole number"):
        stream.seek(-1)


def test_another_streams_state_is_refused_in_words(shards: Path, tmp_path: Path) -> None:
    state = ShardStream(shards, batch_size=10).state_dict()

    def load(urls: Any, **changed: Any) -> None:
        ShardStream(urls, **{"batch_size": 10, **changed}).load_state_dict(state)

    with pytest.raises(DataError, match="seed: 0 in the state, 4 here"):
        load(shards, seed=4)
    with pytest.raises(DataError, match="batch_size: 10 in the state, 5 here; shuffle: True in the state"):
        load(shards, batch_size=5, shuffle=False)
    with pytest.raises(DataError, match="remainder: drop in the state, wrap here"):
        load(shards, remainder="wrap")
    with pytest.raises(
        DataError, match="samples: 50 in the state, 17 here; number of shards: 3 in the state, 1 here"
    ):
        load(shards / "000000.tar")
    with pytest.raises(DataError, match="other names, order or contents"):
        load(sorted(shards.glob("*.tar"))[::-1])
    with pytest.raises(DataError, match="not a state of a ShardStream"):
        ShardStream(shards, batch_size=10).load_state_dict({"step": 3})
    moved = tmp_path / "moved"
    moved.mkdir()
    for shard in shards.glob("*.tar"):
        (moved / shard.name).write_bytes(shard.read_bytes())
    load(moved)  # the same data in another place is the same data


# --- urls and arguments ---


def test_urls(shards: Path, tmp_path: Path) -> None:
    every = sorted(shards.glob("*.tar"))
    expected = keys_of(ShardStream(shards, batch_size=5))
    assert keys_of(ShardStream(f"{shards}/{{000000..000002}}.tar", batch_size=5)) == expected
    assert keys_of(ShardStream(every, batch_size=5)) == expected
    assert keys_of(ShardStream([str(every[0]), f"{shards}/00000{{1,2}}.tar"], batch_size=5)) == expected
    assert ShardStream(str(every[1]), batch_size=5).num_samples == 17
    with pytest.raises(DataError, match=r"2 of 5 shards don't exist.*000003\.tar.*000004\.tar"):
        ShardStream(f"{shards}/{{000000..000004}}.tar", batch_size=5)
    empty = tmp_path / "nothing here"
    empty.mkdir()
    with pytest.raises(DataError, match="nothing here: holds no shards"):
        ShardStream(empty, batch_size=5)
    with pytest.raises(ValueError, match="urls names no shards"):
        ShardStream([], batch_size=5)
    with pytest.raises(ValueError, match="more than once"):
        ShardStream([every[0], every[0]], batch_size=5)
    with pytest.raises(DataError, match="pipe:cat"):  # no command is ever run
        ShardStream("pipe:cat 0.tar", batch_size=5)


def test_folder_is_searched_below(tmp_path: Path) -> None:
    for name in ("b/1.tar", "a/2.tar", "0.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / name, [{"__key__": name[0], "txt": name}])
    (batch,) = ShardStream(tmp_path, batch_size=3, shuffle=False)
    assert batch.sample_keys == ["0/0", "2/a", "1/b"]


def test_truncated_shards_are_found_at_the_start(shards: Path, tmp_path: Path) -> None:
    whole = (shards / "000000.tar").read_bytes()
    second = build_index(shards / "000000.tar").record(1)["bin"][0] - 512
    for end, words in ((second + 600, "member k001.bin at byte"), (second, "no end-of-archive marker")):
        (tmp_path / "000000.tar").write_bytes(whole[:end])
        with pytest.raises(DataError, match=rf"000000\.tar: truncated: {words}"):
            ShardStream(tmp_path, batch_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size, got rank 2 of 2"),
        ({"epochs": 0}, "epochs must be"),
        ({"threads": 0}, "threads must be"),
        ({"prefetch": 0}, "prefetch must be"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"remainder": "keep"}, "remainder must be 'drop', 'wrap' or 'pad', got 'keep'"),
        ({"on_error": "skip"}, "on_error must be"),
        ({"error_budget": 5}, "error_budget is a share"),
        ({"fields": {"txt": 3}}, r"fields\['txt'\] must be a Field, got int"),
        ({"fields": {"txt": Field("a||b", bytes)}}, r"fields\['txt'\]\.source"),
    ],
)
def test_bad_arguments(shards: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardStream(shards, **{"batch_size": 10, **arguments})


def test_batch_that_ranks_cannot_share(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"batch_size 10 .* world_size 4 .*nearest that can is 8 or 12"):
        ShardStream(shards, batch_size=10, world_size=4)
    with pytest.raises(ConfigError, match=r"nearest that can is 4$"):
        ShardStream(shards, batch_size=3, world_size=4)


def test_length_of_an_endless_stream(shards: Path) -> None:
    with pytest.raises(TypeError, match="no length"):
        len(ShardStream(shards, batch_size=10, epochs=None))


# --- schemas ---


def values(urls: Any, spec: Field, **arguments: Any) -> list[Any]:
    stream = ShardStream(urls, **{"batch_size": 50, "shuffle": False, "fields": {"x": spec}, **arguments})
    return [value for batch in stream for value in batch["x"]]


def test_sources(shards: Path, tmp_path: Path) -> None:
    assert values(shards, Field("png|bin|txt", read_bytes))[3].tolist() == [3] * 100
    assert values(shards, Field("txt", bytes.decode))[7] == "caption 7"
    assert values(shards, Field("json.deep.label", int))[9] == 9
    assert values(shards, Field("json.none|json.deep.label", int))[9] == 9
    assert values(shards, Field("json", json.loads))[2]["deep"] == {"label": 2}
    assert values(shards, Field("json.none", int, required=False)) == [None] * 50
    mixed = {
        "__key__": "a",
        "meta.json": {"text": "é", "float": 1.5, "yes": True, "empty": [], "object": {"a": [1]}},
        "json.member": b"exact",
    }
    write_shard(tmp_path / "0.tar", [mixed])

    def one(source: str) -> bytes:
        return values(tmp_path, Field(source, bytes, required=False), batch_size=1)[0]

    assert one("meta.json.text") == "é".encode()
    assert one("meta.json.float") == b"1.5"
    assert one("meta.json.yes") == b"true"
    assert one("meta.json.empty") is None
    assert one("meta.json.object") == b'{"a": [1]}'
    assert one("meta.json.text.deeper") is None
    assert one("json.member") == b"exact"


def test_alternatives(shards: Path) -> None:
    """Training takes one of the captions at random, at any world size the same; evaluation the first."""
    spec = Field("json.captions", bytes.decode)
    assert values(shards, spec, train=False) == [f"first {i}" for i in range(50)]
    trained = values(shards, spec)
    counts = Counter(value.split()[0] for value in values(shards, spec, epochs=40))
    # 2,000 draws of 3: each count has mean 667 and deviation 21, so 100 is nearly five deviations.
    assert all(abs(counts[word] - 2000 / 3) < 100 for word in ("first", "second", "third"))
    for rank in range(2):
        part = values(shards, spec, world_size=2, rank=rank)
        assert part == trained[rank * 25 : rank * 25 + 25]
    every = Field("json.captions|txt", bytes.decode, choose=True)
    assert {value.split()[0] for value in values(shards, every)} == {"first", "second", "third", "caption"}
    assert values(shards, every, train=False)[0] == "first 0"


def test_augmentation_depends_on_seed_row_and_field_alone(shards: Path) -> None:
    def noise(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return array + rng.random(4)

    spec = Field("bin", lambda data: np.zeros(4), augment=noise)

    def drawn(**arguments: Any) -> np.ndarray:
        return np.array(values(shards, spec, **{"batch_size": 10, "epochs": 2, **arguments}))

    whole = drawn()
    assert len(np.unique(whole)) == whole.size  # no numbers twice: over rows, nor over epochs
    for arguments in ({"threads": 1}, {"threads": 4, "prefetch": 5}, {"cache_bytes": 10**6}):
        assert np.array_equal(drawn(**arguments), whole)
    halves = [drawn(world_size=2, rank=rank) for rank in range(2)]
    joined = np.stack([half.reshape(10, 5, 4) for half in halves], axis=1).reshape(100, 4)
    assert np.array_equal(joined, whole)
    assert not np.array_equal(drawn(seed=1), whole)
    assert not drawn(train=False).any()
    stream = ShardStream(
        shards, batch_size=10, shuffle=False, epochs=2, fields={"x": spec, "y": Field("txt", len), "z": spec}
    )
    stream.seek(6)
    batch = next(stream)
    assert np.array_equal(batch["x"], whole[60:70])  # neither resuming nor other fields change it
    assert not np.array_equal(batch["z"], batch["x"])


def test_random_numbers_never_change() -> None:
    """Pinned, like the order."""
    rng = _Source(5, "image", Field("jpg", bytes)).generator(10**12)
    assert rng.integers(0, 2**32, 3).tolist() == [3129605838, 4195207173, 1924447539]


def test_selected_fields_alone_are_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    pread = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        reads.append(size)
        return pread(fd, size, offset)

    fields = {"text": Field("txt", bytes.decode), "body": Field("bin", read_bytes)}
    stream = ShardStream(
        shards,
        batch_size=10,
        fields=fields,
        shuffle=False,
        select=lambda step: {"text"} if step % 2 else ["body"],
    )
    monkeypatch.setattr(os, "pread", counting)
    names = [batch.names for batch in stream]
    assert names == [["body"], ["text"], ["body"], ["text"], ["body"]]
    assert Counter(reads) == Counter(
        [100] * 30 + [len(f"caption {i}") for i in (*range(10, 20), *range(30, 40))]
    )
    (batch,) = ShardStream(shards, batch_size=50, select=lambda step: ["txt"])
    assert batch.names == ["txt"]
    with pytest.raises(ValueError, match=r"select\(0\) names unknown fields \['wav'\]"):
        next(ShardStream(shards, batch_size=10, fields=fields, select=lambda step: ["wav"]))


def test_members_far_apart(tmp_path: Path) -> None:
    """Two small members around a large one are read one by one, and rightly so."""
    sample = {"__key__": "a", "a.txt": b"left", "b.bin": bytes(100_000), "c.txt": b"right", "d.txt": b""}
    write_shard(tmp_path / "0.tar", [sample])
    fields = {"left": Field("a.txt", bytes), "right": Field("c.txt", bytes), "none": Field("d.txt", bytes)}
    (batch,) = ShardStream(tmp_path, batch_size=1, fields=fields)
    assert (batch["left"], batch["right"], batch["none"]) == ([b"left"], [b"right"], [b""])


def test_cache_decodes_once_and_hands_out_copies(shards: Path) -> None:
    calls: list[bytes] = []

    def read(data: bytes) -> np.ndarray:
        calls.append(data)
        return np.frombuffer(data, np.uint8).copy()

    def spoil(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        array += 1
        return array

    spec = Field("bin", read, augment=spoil)
    found = values(shards, spec, epochs=3, cache_bytes=10**6)
    assert len(calls) == 50
    assert [array[0] for array in found] == [i + 1 for i in range(50)] * 3
    calls.clear()
    values(shards, spec, epochs=3, cache_bytes=20 * 100)
    assert len(calls) == 50 + 2 * 30  # twenty fit


# --- faults ---


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """100 samples; 7 has no txt, 20 an undecodable one."""
    samples = [{"__key__": f"k{i:02d}", "txt": f"{i}", "bin": bytes([i])} for i in range(100)]
    del samples[7]["txt"]
    samples[20]["txt"] = "not a number"
    write_shard(tmp_path / "0.tar", samples)
    return tmp_path


def test_fail_names_shard_key_and_field(damaged: Path) -> None:
    stream = ShardStream(damaged, batch_size=5, shuffle=False, fields={"number": Field("txt", int)})
    assert len(next(stream)) == 5
    with pytest.raises(
        DataError, match=r"0\.tar, key k07, field number: the record has no txt; it has bin$"
    ) as caught:
        next(stream)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert stream.state_dict()["step"] == 1
    with pytest.raises(DataError, match="key k07"):  # asking again tries again
        next(stream)
    stream.seek(4)
    with pytest.raises(DataError, match=r"0\.tar, key k20, field number: ValueError: invalid literal"):
        next(stream)
    stream.seek(2)
    assert next(stream)["number"] == list(range(10, 15))


def test_substitutes_are_the_same_at_any_world_size_and_on_resuming(damaged: Path) -> None:
    def make(**arguments: Any) -> ShardStream:
        fields = {"number": Field("txt", int)}
        return ShardStream(
            damaged,
            **{
                "batch_size": 10,
                "fields": fields,
                "on_error": "substitute",
                "error_budget": 0.1,
                **arguments,
            },
        )

    stream = make(epochs=2)
    whole = [batch["number"] for batch in stream]
    assert stream.faults == {"missing number": 2, "undecodable number": 2}
    assert Counter(stream.quarantine) == {
        (str(damaged / "0.tar"), "k07", "missing number"): 2,
        (str(damaged / "0.tar"), "k20", "undecodable number"): 2,
    }
    assert all(0 <= number < 100 for part in whole for number in part)
    assert 7 not in chain(whole)
    parts = [[batch["number"] for batch in make(epochs=2, world_size=2, rank=rank)] for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    for step in (1, 5, 13):
        resumed = make(epochs=2)
        resumed.seek(step)
        assert [batch["number"] for batch in resumed] == whole[step:]
    assert keys_of(make())[0] != keys_of(make(seed=1))[0]


def test_error_budget(damaged: Path) -> None:
    def read(data: bytes) -> int:
        if int(data) % 10 == 3:
            raise DataError("ends in 3")
        return int(data)

    spec = Field("txt", read)

    def make(budget: float) -> ShardStream:
        return ShardStream(
            damaged,
            batch_size=10,
            shuffle=False,
            fields={"n": spec},
            on_error="substitute",
            error_budget=budget,
        )

    assert len(list(make(0.5))) == 10
    stream = make(0.01)
    taken = []
    with pytest.raises(
        DataError, match=r"samples can't be used, more than the error budget of 1\.000%.*ends in 3"
    ):
        taken += stream
    assert stream.faults.total() > 3
    assert stream.state_dict()["step"] == len(taken)
    assert 2 <= len(taken) <= 3  # three faults are free; the fourth comes in the third or fourth batch


def test_nothing_but_bad_samples(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [{"__key__": f"{i}", "txt": "x"} for i in range(4)])
    stream = ShardStream(
        tmp_path, batch_size=2, fields={"n": Field("txt", int)}, on_error="substitute", error_budget=1
    )
    with pytest.raises(DataError, match=r"16 samples in a row can't be used, the last: .*key"):
        next(stream)


def test_shard_that_changes_while_in_use(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes((shards / "000000.tar").read_bytes())
    stream = ShardStream(path, batch_size=1, shuffle=False, prefetch=1, threads=1)
    next(stream)
    os.truncate(path, 5000)
    with pytest.raises(DataError, match=r"0\.tar, key k\d+: .*0\.tar is truncated: it ends at byte 5000"):
        list(stream)
    stream = ShardStream(shards / "000000.tar", batch_size=1)
    (shards / "copy").mkdir()
    path = shards / "copy" / "1.tar"
    path.write_bytes((shards / "000000.tar").read_bytes())
    stream = ShardStream(path, batch_size=1)
    path.write_bytes((shards / "000001.tar").read_bytes())
    with pytest.raises(DataError, match=r"1\.tar changed: its"):
        next(stream)
    path.unlink()
    with pytest.raises(DataError, match=r"key k\d+: .*1\.tar doesn't exist"):
        next(stream)
    (shards / "copy" / "1.tar.index").unlink()
    (shards / "copy").rmdir()


def test_number_of_open_files_is_bounded(tmp_path: Path) -> None:
    num_shards = MAX_OPEN_FILES + 20
    for shard in range(num_shards):
        write_shard(tmp_path / f"{shard:04d}.tar", [{"__key__": "k", "txt": f"{shard}"}])
    before = len(list(Path("/proc/self/fd").iterdir()))
    stream = ShardStream(tmp_path, batch_size=num_shards, epochs=2)
    for batch in stream:
        assert sorted(int(text) for text in batch["txt"]) == list(range(num_shards))
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + MAX_OPEN_FILES + 4
    stream.close()
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


# --- threads ---


@pytest.fixture
def no_threads_of_other_tests() -> None:
    """A stream that raised is in a cycle with its traceback and keeps its threads until it is collected."""
    gc.collect()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mmscale-")]


def test_transform_runs_in_the_reading_thread(shards: Path) -> None:
    def transform(batch: Batch) -> tuple[int, str]:
        return batch.step, threading.current_thread().name

    stream = ShardStream(shards, batch_size=10, transform=transform)
    assert [batch.tensors for batch in stream] == [(step, "mmscale-read-ahead") for step in range(5)]
    assert next(iter(ShardStream(shards, batch_size=10))).tensors is None


@pytest.mark.usefixtures("no_threads_of_other_tests")
def test_an_error_surfaces_at_its_batch(shards: Path) -> None:
    def transform(batch: Batch) -> None:
        if batch.step == 3:
            raise RuntimeError("step 3")

    stream = ShardStream(shards, batch_size=10, transform=transform, prefetch=5)
    for _ in range(3):
        next(stream)
    with pytest.raises(RuntimeError, match="step 3"):
        next(stream)
    assert stream.state_dict()["step"] == 3
    assert not reading_threads()


@pytest.mark.usefixtures("no_threads_of_other_tests")
def test_threads_end_with_the_stream(shards: Path) -> None:
    assert not reading_threads()
    stream = ShardStream(shards, batch_size=10, epochs=None, threads=3, fields={"x": Field("txt", bytes)})
    next(stream)
    assert len(reading_threads()) == 3
    stream.close()
    stream.close()
    assert not reading_threads()
    assert next(stream).step == 1  # a closed stream keeps its place
    del stream
    gc.collect()
    assert not reading_threads()
    list(ShardStream(shards, batch_size=10))
    assert not reading_threads()


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "raise RuntimeError"])
def test_process_ends_at_once(shards: Path, ending: str) -> None:
    """Even with a reader that hangs: nothing waits for it longer than the two seconds it is given."""
    script = f"""
import sys, time
from mmscale.data import Field, ShardStream
def read(data):
    if started:
        time.sleep(1000)
    return data
started = []
stream = ShardStream({str(shards)!r}, batch_size=10, fields={{"x": Field("txt", read)}}, prefetch=1)
next(stream)
next(stream)
started.append(1)
time.sleep(0.1)
print("done", time.time())
{ending}
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout.startswith("done"), result.stderr
    assert time.time() - float(result.stdout.split()[1]) < 8
    assert result.returncode == {"": 0, "sys.exit(3)": 3, "raise RuntimeError": 1}[ending]
    assert "Fatal" not in result.stderr


def test_rows_are_shared_by_the_threads(shards: Path) -> None:
    """Five rows are read at once, or the barrier breaks; all but the first, which is timed."""
    barrier = threading.Barrier(5, timeout=20)
    rows = itertools.count()

    def read(data: bytes) -> bytes:
        if next(rows) == 0:
            time.sleep(0.01)
        else:
            barrier.wait()
        return data

    # One batch of 11 rows, so that the other ten meet at the barrier five by five.
    stream = ShardStream(shards, batch_size=11, fields={"x": Field("txt", read)}, threads=5, prefetch=1)
    assert len(next(stream)) == 11
    barrier.abort()  # whatever is read ahead
    stream.close()


def test_torch_runs_in_one_thread_where_samples_are_read_and_only_there(shards: Path) -> None:
    script = f"""
import threading, torch
from mmscale.data import Field, ShardStream
torch.set_num_threads(3)
seen, after = [], []
def read(data):
    seen.append(torch.get_num_threads())
    return data
stream = ShardStream({str(shards)!r}, batch_size=10, fields={{"x": Field("txt", read)}}, threads=3,
                     transform=lambda batch: seen.append(torch.get_num_threads()))
next(stream)
thread = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
thread.start()
thread.join()
print(set(seen), torch.get_num_threads(), after)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.split() == ["{1}", "3", "[3]"]


def test_fields_of_one_shape_are_rows_of_one_tensor(shards: Path) -> None:
    """Read in place, augmented, kept in the cache, absent, substituted: always the same rows."""

    def read(data: bytes, out: Any = None) -> np.ndarray:
        value = np.frombuffer(data, np.uint8)[:4]
        if out is None:
            return value.copy()
        out.copy_(torch.from_numpy(value.copy()))
        if data[0] == 13:
            raise DataError("bad, and its row is written already")
        return out.numpy()

    def brighter(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return value + np.uint8(100)

    def stacks(**arguments: Any) -> list[Batch]:
        spec = Field("bin", read, shape=(4,), **arguments.pop("spec", {}))
        stream = ShardStream(
            shards, **{"batch_size": 10, "fields": {"x": spec}, "error_budget": 1.0, **arguments}
        )
        return list(stream)

    numbers = [int(key[-3:]) for batch in stacks(on_error="substitute") for key in batch.sample_keys]
    assert 13 not in numbers
    for options, add in (({}, 0), ({"spec": {"augment": brighter}}, 100)):
        batches = stacks(on_error="substitute", **options)
        whole = torch.cat([batch.stacked["x"] for batch in batches])
        assert whole.dtype == torch.uint8
        assert whole[:, 0].tolist() == [number + add for number in numbers]
        for batch in batches:
            assert all(batch["x"][row].ctypes.data == batch.stacked["x"][row].data_ptr() for row in range(10))
    kept = torch.cat(
        [b.stacked["x"] for b in stacks(epochs=2, cache_bytes=10**6, spec={"augment": brighter})]
    )
    plain = [int(k[-3:]) for b in stacks(epochs=2, cache_bytes=10**6) for k in b.sample_keys]
    assert kept[:, 0].tolist() == [number + 100 for number in plain]
    absent = Field("png", read, shape=(4,), required=False)
    (batch,) = ShardStream(shards, batch_size=50, fields={"x": absent})
    assert batch["x"] == [None] * 50
    assert not batch.stacked["x"].any()
    with pytest.raises(DataError, match=r"field x: its reader gave \(100,\) uint8, not \(4,\) uint8"):
        next(
            ShardStream(
                shards,
                batch_size=5,
                fields={"x": Field("bin", lambda data, out: np.frombuffer(data, np.uint8), shape=(4,))},
            )
        )
