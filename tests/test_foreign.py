"""A user's own webdataset pipeline in place of a ShardStream, and ShardStream's samples in webdataset's decoders."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from tiny import tiny_config

from mmscale.data import DataError, Field, ShardStream
from mmscale.data.foreign import Pipeline, PipelineStream
from mmscale.data.pack import ShardWriter
from mmscale.errors import ConfigError
from mmscale.train import train


def flat(parts: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for i in range(48):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(picture, "PNG")
            fields = {"png": picture.getvalue(), "txt": f"{i}".encode(), "cls": f"{i % 5}".encode()}
            writer.write(f"k{i:03d}", fields)
    return folder


def open_samples(folder: Path, rank: int = 0, world_size: int = 1) -> Iterable[dict[str, Any]]:
    urls = sorted(map(str, folder.glob("*.tar")))[rank::world_size]
    return webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=webdataset.split_by_worker)


def make(folder: Path, **arguments: Any) -> PipelineStream:
    fields = {"number": Field("txt", int)}
    return PipelineStream(
        lambda: open_samples(folder), **{"batch_size": 10, "num_samples": 48, "fields": fields, **arguments}
    )


def numbers(stream: PipelineStream, count: int) -> list[list[int]]:
    found = [batch["number"] for batch in itertools.islice(stream, count)]
    stream.close()
    return found


def test_batches_of_a_webdataset_pipeline(shards: Path) -> None:
    stream = make(shards)
    batch = next(stream)
    assert (batch.sample_keys[0], batch.step, batch.position) == ("k000", 0, 10)
    assert batch["number"] == list(range(10))
    rest = numbers(stream, 9)
    assert flat([batch["number"], *rest]) == [i % 48 for i in range(100)]  # begins anew at its end


def test_a_resume_runs_through_what_was_consumed(shards: Path) -> None:
    whole = numbers(make(shards), 12)
    stream = make(shards)
    for _ in range(5):
        next(stream)
    state = stream.state_dict()
    stream.close()
    resumed = make(shards)
    resumed.load_state_dict(state)
    assert numbers(resumed, 7) == whole[5:]
    with pytest.raises(DataError, match="world_size: 1 in the state, 2 here"):
        make(shards, world_size=2).load_state_dict(state)
    with pytest.raises(DataError, match="pipeline: None in the state, True here"):
        make(shards).load_state_dict(ShardStream(shards, batch_size=10).state_dict())


def test_what_a_pipeline_must_yield(shards: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        next(PipelineStream(list, batch_size=1, num_samples=1, fields={}))
    decoded = webdataset.WebDataset(sorted(map(str, shards.glob("*.tar"))), shardshuffle=False).decode("pil")
    with pytest.raises(DataError, match=r"k000 has a Image as png: give raw bytes"):
        next(PipelineStream(lambda: decoded, batch_size=1, num_samples=1, fields={}))
    with pytest.raises(DataError, match="dicts with a __key__, got int"):
        next(PipelineStream(lambda: [1], batch_size=1, num_samples=1, fields={}))  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="can't be shared equally"):
        make(shards, world_size=3)


def test_samples_go_through_webdatasets_decoders(shards: Path) -> None:
    source = ShardStream(shards, batch_size=8, shuffle=False)

    class Stream(webdataset.DataPipeline):
        pass

    def samples() -> Iterator[dict[str, Any]]:
        return source.samples()

    pipeline = Stream(samples, webdataset.decode("pil"), webdataset.to_tuple("__key__", "png", "txt", "cls"))
    found = list(pipeline)
    assert [key for key, *_ in found] == [f"k{i:03d}" for i in range(48)]
    _key, picture, text, number = found[7]
    assert (picture.size, text, number) == ((8, 8), "7", 2)
    with pytest.raises(ValueError, match="fields=None"):
        next(ShardStream(shards, batch_size=8, fields={"n": Field("txt", int)}).samples())


def test_training_from_a_pipeline(scene_shards: Path, tmp_path: Path) -> None:
    def samples(rank: int, world_size: int) -> Iterable[dict[str, Any]]:
        return open_samples(scene_shards / "train")

    config = tiny_config(scene_shards, f"run.dir={tmp_path}/run", "train.duration=4", "data.train=pipeline")
    messages: list[str] = []
    report = train(
        config,
        lambda event: messages.append(event["text"]) if event["event"] == "message" else None,
        pipeline=Pipeline(samples, num_samples=60),
    )
    assert report["step"] == 4
    assert any("pipeline of your own" in text for text in messages)
