"""From shards to batches: a stream whose schema is the config's fields, collated by the model's modalities."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmscale.config import AugmentConfig, Config, StorageConfig
from mmscale.data import Batch, Field, ShardStream
from mmscale.data.augment import image_augment, spectrogram_augment
from mmscale.data.batch import BufferPool, TensorBatch, split_rows
from mmscale.data.decode import decode_image_train
from mmscale.data.foreign import Pipeline, PipelineStream
from mmscale.data.storage import Storage
from mmscale.errors import ConfigError, DataError
from mmscale.models import Model
from mmscale.tasks import Task, model_for, schedule
from mmscale.world import World


def _augmentation(config: AugmentConfig, modality: str) -> Callable[..., Any] | None:
    if modality == "image":
        return partial(image_augment, **config.image.model_dump(exclude={"crop"}))
    if modality == "audio":
        return partial(spectrogram_augment, **config.audio.model_dump())
    return None


def _random_crop(config: Config, modality: str) -> Callable[..., Any] | None:
    """(bytes, rng) -> a picture's random part, which is all of it that is decoded."""
    crop = config.data.augment.image.crop
    if crop is None or modality != "image":
        return None
    return partial(_cropped, size=config.model.image.size, scale=crop)


def _cropped(
    data: bytes,
    rng: np.random.Generator,
    *,
    size: int,
    scale: tuple[float, float],
    out: torch.Tensor | None = None,
) -> np.ndarray:
    return decode_image_train(data, size, rng, scale=scale, flip=False, out=out)  # image_augment mirrors


def make_schema(config: Config, model: Model, names: Collection[str], *, augment: bool) -> dict[str, Field]:
    """What the stream must know of the named fields to read and decode them."""
    schema = {}
    for name in names:
        field = config.data.fields[name]
        schema[name] = Field(
            field.source,
            read=model.modality(name).read,
            first=field.first,
            augment=_augmentation(config.data.augment, field.modality) if augment else None,
            required=field.required,
            read_train=_random_crop(config, field.modality) if augment else None,
            shape=(3, config.model.image.size, config.model.image.size)
            if field.modality == "image"
            else None,
        )
    return schema


def collate(model: Model, batch: Batch, pool: BufferPool | None = None) -> TensorBatch:
    """A batch of decoded arrays as tensors on the CPU: field name -> {"x", "lengths"}."""
    return {
        name: _present(batch.stacked[name], batch[name])
        if name in batch.stacked
        else model.modality(name).collate(batch[name], pool)
        for name in batch.names
    }


def _present(stacked: torch.Tensor, values: list[Any]) -> dict[str, torch.Tensor]:
    present = torch.tensor([value is not None for value in values], dtype=torch.int32)
    return {"x": stacked, "lengths": present}


def _pool(config: Config, world: World) -> BufferPool:
    """Memory of the batches that lie ready, the one in use and the one being made, again and again."""
    return BufferPool(4 * config.data.buffer_mb * 2**20, pin=world.device.type == "cuda")


def make_storage(config: StorageConfig) -> Storage:
    """How this rank reads shards; the cache is one for all ranks of a node."""
    folder = config.cache_dir or Path.home() / ".cache" / "mmscale" / "blocks"
    return Storage(
        cache_dir=Path(folder).expanduser(),
        cache_bytes=int(config.cache_gb * 1e9),
        timeout_s=config.timeout_s,
        retries=config.retries,
    )


def _open(shards: Any, *, setting: str, **options: Any) -> ShardStream:
    """A stream over what a user named as shards: what the stream says against it, the message says of the setting."""
    try:
        return ShardStream(shards, **options)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{setting}: {str(error).removeprefix('urls: ')}") from None


def train_stream(
    config: Config,
    model: Model,
    world: World,
    *,
    select: Callable[[int], Collection[str]],
    pipeline: Pipeline | None = None,
) -> ShardStream | PipelineStream:
    """The endless training stream of this rank; select names the fields that a step reads."""
    data = config.data
    pool = _pool(config, world)
    common: dict[str, Any] = {
        "batch_size": data.batch_size,
        "seed": config.run.seed,
        "rank": world.rank,
        "world_size": world.size,
        "fields": make_schema(config, model, data.fields, augment=True),
        "select": select,
        "train": True,
        "transform": partial(collate, model, pool=pool),
        "threads": data.threads,
        "prefetch": data.prefetch,
        "buffer_bytes": data.buffer_mb * 2**20,
        "stall_s": data.stall_s,
    }
    if pipeline is not None:
        return PipelineStream(
            partial(pipeline.open, world.rank, world.size), num_samples=pipeline.num_samples, **common
        )
    return _open(
        data.train,
        setting="data.train",
        epochs=None,
        weights=data.weights or None,
        weight_by=data.weight_by,
        shuffle=data.shuffle,
        order=data.order,
        bucket_by=data.bucket_by,
        on_error=data.on_error,
        error_budget=data.error_budget,
        hold_to_budget=False,  # the trainer does, with all ranks' faults together
        cache_bytes=data.cache_mb * 2**20,
        storage=make_storage(data.storage),
        pool=pool,
        **common,
    )


def open_run_data(
    config: Config, tasks: Mapping[str, Task], world: World, pipeline: Pipeline | None
) -> tuple[Model, ShardStream | PipelineStream]:
    """The model, and the stream it trains on, checked for all tasks; the shards of evaluations are opened too.

    Collective: an error of one rank is raised on all.
    """
    error: Exception | None = None
    try:
        model = model_for(config)
        stream = train_stream(
            config,
            model,
            world,
            select=lambda step: fields_of(config, tasks[schedule(config.tasks, step)]),
            pipeline=pipeline,
        )
        for name, task in tasks.items():
            check_fields(stream, config, name, task)
        for shards in config.data.evals.values():  # now rather than when the training is done
            eval_stream(config, model, world, shards, names=()).close()
    except Exception as caught:
        error = caught
    world.agree(error)
    return model, stream


def eval_stream(
    config: Config, model: Model, world: World, shards: str | list[str], *, names: Collection[str]
) -> ShardStream:
    """One pass over held-out shards in a fixed, mixed order; fillers of the last batch are not `valid`."""
    data = config.data
    per_rank = -(-config.evals.batch_size // world.size)
    return _open(
        shards,
        setting="the shards to evaluate on",
        batch_size=per_rank * world.size,
        rank=world.rank,
        world_size=world.size,
        fields=make_schema(config, model, names, augment=False),
        remainder="pad",
        on_error=data.on_error,
        error_budget=data.error_budget,
        train=False,
        transform=partial(collate, model, pool=_pool(config, world)),
        threads=data.threads,
        prefetch=data.prefetch,
        buffer_bytes=data.buffer_mb * 2**20,
        stall_s=data.stall_s,
        storage=make_storage(data.storage),
    )


def check_world(config: Config, world: World) -> None:
    """Raises ConfigError where the config asks what these ranks can't do."""
    share = world.size * config.train.accumulation
    if config.data.batch_size % share:
        below = config.data.batch_size // share * share
        nearest = f"{below} or {below + share}" if below else str(share)
        raise ConfigError(
            f"data.batch_size={config.data.batch_size} can't be dealt evenly to {world.size} ranks of "
            f"{config.train.accumulation} micro-batches: the nearest that can is {nearest}"
        )
    if (
        config.model.kernels == "triton"
        and world.device.type == "cpu"
        and not os.environ.get("TRITON_INTERPRET")
    ):
        raise ConfigError(
            "model.kernels=triton needs a GPU (or TRITON_INTERPRET=1, slowly); give auto or torch"
        )


def fields_of(config: Config, task: Task) -> list[str]:
    """What a step of the task reads: its fields, and labels, which tell which samples match."""
    labels = [name for name, field in config.data.fields.items() if field.modality == "label"]
    return [*task.fields, *labels]


def check_fields(stream: ShardStream | PipelineStream, config: Config, name: str, task: Task) -> None:
    """Raises DataError, listing what the shards hold, if no sample has all that the task reads."""
    try:
        stream.check_fields(fields_of(config, task))
    except DataError as error:
        raise DataError(f"tasks.{name} has nothing to learn from in data.train: {error}") from None


def micro_batches(task: Task, batch: TensorBatch, num_parts: int) -> list[TensorBatch]:
    """Equal parts of a batch, each with the rows that the task can use."""
    parts = split_rows(batch, num_parts)
    return [{**part, "usable": {"x": task.usable(part)}} for part in parts]


def drop_complete(part: TensorBatch) -> TensorBatch:
    """Without the list of usable rows where all are: then nothing needs to be selected."""
    num_rows = len(next(iter(part.values()))["lengths"])
    if len(part["usable"]["x"]) == num_rows:
        return {name: field for name, field in part.items() if name != "usable"}
    return part
