"""Blends, windows and length buckets through a stream: which samples come, at any world size, after any change."""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmscale.data import DataError, ShardStream, build_index
from mmscale.data.pack import ShardWriter

SIZES = {"a": 40, "b": 25, "c": 7}
WEIGHTS = {"a": 0.5, "b": 0.2, "c": 0.3}


def flat(parts: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def write(folder: Path, name: str, num_samples: int, *, measure: bool = False) -> None:
    with ShardWriter(folder / name, name, samples_per_shard=10) as writer:
        for i in range(num_samples):
            writer.write(f"{i:04d}", {"txt": b"x" * (1 + 7 * i % 50)})
    if measure:
        for shard in (folder / name).glob("*.tar"):
            build_index(shard, measure=["text"])
        (folder / name / "shards.manifest").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name, num_samples in SIZES.items():
        write(folder, name, num_samples, measure=True)
    return {name: folder / name for name in SIZES}


def blend(sources: dict[str, Path], **arguments: Any) -> ShardStream:
    return ShardStream(sources, **{"batch_size": 12, "epochs": None, "weights": WEIGHTS, **arguments})


def take(stream: ShardStream, num_steps: int) -> list[list[str]]:
    batches = list(itertools.islice(stream, num_steps))
    stream.close()
    return [batch.sample_keys for batch in batches]


def source_of(key: str) -> str:
    return key.split("-")[0]


def test_each_source_has_its_share_at_every_position(sources: dict[str, Path]) -> None:
    keys = flat(take(blend(sources), 100))
    counts = Counter[str]()
    for position, key in enumerate(keys, 1):
        counts[source_of(key)] += 1
        for name, weight in WEIGHTS.items():
            assert abs(counts[name] - weight * position) < 1, (position, name)


def test_each_pass_of_a_source_is_all_of_it_once(sources: dict[str, Path]) -> None:
    stream = blend(sources)
    batches = list(itertools.islice(stream, 100))
    keys = [key for batch in batches for key in batch.sample_keys]
    assert [source_of(key) for key in keys] == [name for b in batches for name in b.sources or []]
    for name, size in SIZES.items():
        own = [key for key in keys if source_of(key) == name]
        passes = [own[i : i + size] for i in range(0, len(own) - size + 1, size)]
        assert len(passes) > 1
        assert all(len(set(part)) == size for part in passes)
        assert passes[0] != passes[1]
    report = stream.blend_report()
    stream.close()
    assert {name: row["samples"] for name, row in report.items()} == Counter(map(source_of, keys))
    assert report["c"]["epochs"] == pytest.approx(360 / 7)
    assert report["c"]["weight"] == 0.3


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
def test_a_blend_is_the_same_at_any_world_size_and_after_a_resume(
    sources: dict[str, Path], world_size: int
) -> None:
    whole = take(blend(sources), 40)
    stream = blend(sources)
    for _ in range(17):
        next(stream)
    state = json.loads(json.dumps(stream.state_dict()))
    stream.close()
    parts = []
    for rank in range(world_size):
        resumed = blend(sources, rank=rank, world_size=world_size)
        resumed.load_state_dict(state)
        parts.append(take(resumed, 23))
    assert [flat(rows) for rows in zip(*parts, strict=True)] == whole[17:]


def test_weights_can_change_and_a_replay_is_exact(sources: dict[str, Path]) -> None:
    def run(world_size: int, rank: int) -> tuple[list[list[str]], dict[str, Any]]:
        stream = blend(sources, world_size=world_size, rank=rank)
        keys = [next(stream).sample_keys for _ in range(10)]
        stream.set_weights({"a": 0, "b": 3, "c": 1})
        keys += [next(stream).sample_keys for _ in range(10)]
        state = stream.state_dict()
        keys += [next(stream).sample_keys for _ in range(5)]
        stream.close()
        return keys, json.loads(json.dumps(state))

    whole, state = run(1, 0)
    after = flat(whole[10:])
    assert Counter(map(source_of, after)) == {"b": 135, "c": 45}
    halves = [run(2, rank) for rank in range(2)]
    assert [a + b for a, b in zip(halves[0][0], halves[1][0], strict=True)] == whole
    assert halves[0][1] == halves[1][1] == state
    resumed = blend(sources, weights={"a": 0, "b": 3, "c": 1})
    resumed.load_state_dict(state)
    assert take(resumed, 5) == whole[20:]
    assert [record["position"] for record in resumed.blend_records()] == [0, 120]
    resumed.seek(5)  # before the change: still known
    assert take(resumed, 15) == whole[5:20]


def test_other_weights_on_resuming_hold_from_there_and_are_told(sources: dict[str, Path]) -> None:
    stream = blend(sources)
    first = [next(stream).sample_keys for _ in range(10)]
    state = stream.state_dict()
    stream.close()
    resumed = blend(sources, weights={"a": 1, "b": 1, "c": 0})
    resumed.load_state_dict(state)
    assert any("change at step 10" in note for note in resumed.notes())
    rest = [next(resumed).sample_keys for _ in range(5)]
    assert Counter(map(source_of, flat(rest))) == {"a": 30, "b": 30}
    # The passes of a source go on where they were.
    own = [key for key in flat(first) + flat(rest) if source_of(key) == "b"]
    assert len(set(own[:25])) == 25
    again = blend(sources, weights={"a": 1, "b": 1, "c": 0})
    again.load_state_dict(resumed.state_dict())
    assert not any("change at step" in note for note in again.notes())


def test_weights_by_a_column_share_out_its_sum(sources: dict[str, Path]) -> None:
    stream = ShardStream(
        {"a": sources["a"], "b": sources["b"]},
        batch_size=10,
        epochs=None,
        weights={"a": 0.25, "b": 0.75},
        weight_by="txt.chars",
    )
    sums = Counter[str]()
    for batch in itertools.islice(stream, 500):
        for key, text in zip(batch.sample_keys, batch["txt"], strict=True):
            sums[source_of(key)] += len(text)
    stream.close()
    # Whole passes hit the mean exactly; what is left of the last pass is below one in a hundred of the sum.
    assert sums["a"] / sums.total() == pytest.approx(0.25, abs=0.01)


def test_state_of_many_sources_is_small(tmp_path: Path) -> None:
    names = [f"a-source-with-a-long-name-{i}" for i in range(24)]
    for name in names:
        write(tmp_path, name, 3)
    stream = ShardStream({name: tmp_path / name for name in names}, batch_size=24, epochs=None)
    for i in range(30):
        next(stream)
        stream.set_weights({name: 1 + (i + j) % 5 for j, name in enumerate(names)})
    state = stream.state_dict()
    stream.close()
    assert len(json.dumps(state)) < 4096
    with pytest.raises(ValueError, match="at most 24"):
        ShardStream({f"{i}": tmp_path for i in range(25)}, batch_size=2)


def test_mistakes_in_a_blend_are_named(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weight for c; d: no such source"):
        blend(sources, weights={"a": 1, "b": 1, "d": 1})
    with pytest.raises(ValueError, match="weights are for a blend"):
        ShardStream(sources["a"], batch_size=2, weights={"a": 1})
    with pytest.raises(ValueError, match=r"b.*-1"):
        blend(sources, weights={"a": 1, "b": -1, "c": 1})
    with pytest.raises(ValueError, match="'drop' for a blend"):
        blend(sources, remainder="pad")
    with pytest.raises(DataError, match=r"source x: .*nowhere"):
        blend({"x": tmp_path / "nowhere"}, weights=None)
    with pytest.raises(ValueError, match="set_weights is for a blend"):
        ShardStream(sources["a"], batch_size=2).set_weights({"a": 1})
    state = blend(sources).state_dict()
    fewer = {"a": sources["a"], "b": sources["b"]}
    with pytest.raises(DataError, match="sources: a, b, c in the state, a, b here"):
        blend(fewer, weights={"a": 1, "b": 1}).load_state_dict(state)
    swapped = {"a": sources["a"], "b": sources["c"], "c": sources["b"]}
    with pytest.raises(DataError, match="source b: 25 samples in the state, 7 here"):
        blend(swapped).load_state_dict(state)
    with pytest.raises(DataError, match="sources: a, b, c in the state, one, unnamed here"):
        ShardStream(sources["a"], batch_size=12, epochs=None).load_state_dict(state)


def windowed(folder: Path, **arguments: Any) -> ShardStream:
    return ShardStream(folder, **{"batch_size": 6, "order": "window", "epochs": 2, **arguments})


def test_windowed_order_is_a_permutation_and_the_same_at_any_world_size(tmp_path: Path) -> None:
    write(tmp_path, "w", 3500)
    whole = [batch.sample_keys for batch in windowed(tmp_path)]
    steps = 3500 // 6
    epochs = [flat(whole[:steps]), flat(whole[steps:])]
    assert all(len(set(epoch)) == steps * 6 for epoch in epochs)
    assert epochs[0] != epochs[1]
    for world_size in (2, 3):
        parts = [windowed(tmp_path, rank=rank, world_size=world_size) for rank in range(world_size)]
        for stream in parts:
            stream.seek(steps - 20)
        joined = [flat(b.sample_keys for b in rows) for rows in zip(*parts, strict=True)]
        assert joined == whole[steps - 20 :]


def test_auto_goes_on_with_the_order_of_the_state(sources: dict[str, Path]) -> None:
    state = windowed(sources["a"]).state_dict()
    assert state["order"] == "window"
    stream = ShardStream(sources["a"], batch_size=6, epochs=2)
    assert stream.state_dict()["order"] == "full"
    stream.load_state_dict(state)
    assert take(stream, 6) == take(windowed(sources["a"]), 6)
    with pytest.raises(DataError, match="order: window in the state, full here"):
        ShardStream(sources["a"], batch_size=6, epochs=2, order="full").load_state_dict(state)
    old = {k: v for k, v in ShardStream(sources["a"], batch_size=6).state_dict().items() if k != "order"}
    del old["bucket_by"]
    ShardStream(sources["a"], batch_size=6).load_state_dict({**old, "version": 1})


def bucketed(folder: Path, **arguments: Any) -> ShardStream:
    return ShardStream(folder, **{"batch_size": 6, "bucket_by": "txt.chars", "epochs": 2, **arguments})


def test_buckets_hold_like_lengths_and_do_not_depend_on_the_world_size(sources: dict[str, Path]) -> None:
    def spread(stream: ShardStream) -> float:
        return float(np.mean([np.ptp([len(text) for text in batch["txt"]]) for batch in stream]))

    assert spread(bucketed(sources["a"])) < 0.4 * spread(bucketed(sources["a"], bucket_by=None))
    whole = [batch.sample_keys for batch in bucketed(sources["a"])]
    assert all(len(set(flat(whole[i : i + 6]))) == 36 for i in (0, 6))
    parts = [
        [batch.sample_keys for batch in bucketed(sources["a"], rank=rank, world_size=3)] for rank in range(3)
    ]
    assert [flat(rows) for rows in zip(*parts, strict=True)] == whole
    with pytest.raises(DataError, match=r"txt\.tokens"):
        next(bucketed(sources["a"], bucket_by="txt.tokens"))


def test_a_blend_can_be_bucketed(sources: dict[str, Path]) -> None:
    plain = blend(sources)
    stream = blend(sources, bucket_by="txt.chars")
    steps = stream.steps_per_epoch
    keys, expected = take(stream, 2 * steps), take(plain, 2 * steps)
    for epoch in (slice(0, steps), slice(steps, None)):
        assert sorted(flat(keys[epoch])) == sorted(flat(expected[epoch]))
    halves = [take(blend(sources, bucket_by="txt.chars", rank=r, world_size=2), 2 * steps) for r in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == keys


def test_no_index_is_no_obstacle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "a", 20)
    for path in [*tmp_path.rglob("*.index"), *tmp_path.rglob("*.manifest")]:
        path.unlink()
    with caplog.at_level(logging.WARNING, logger="mmscale.data"):
        assert len(list(ShardStream(tmp_path / "a", batch_size=5))) == 4
        assert "index" in caplog.text
        caplog.clear()
        assert len(list(ShardStream(tmp_path / "a", batch_size=5))) == 4
        assert not caplog.text


def test_keys_of_any_step_without_reading(sources: dict[str, Path]) -> None:
    for make in (
        lambda **a: windowed(sources["a"], **a),
        lambda **a: blend(sources, epochs=2, **a),
        lambda **a: bucketed(sources["a"], **a),
    ):
        whole = [batch.sample_keys for batch in make()]
        for world_size in (1, 2):
            for rank in range(world_size):
                stream = make(rank=rank, world_size=world_size)
                size = len(whole[0]) // world_size
                for step in (0, 7, len(whole) - 1):
                    assert stream.keys(step) == whole[step][rank * size : (rank + 1) * size]
