"""The typed configuration of a run: nested frozen sections, overrides, every problem reported at once.

A recipe (`mmscale.recipes`) returns one complete `Config`; the command line changes single values::

    config = get("quickstart").override("optim.lr=3e-4", "tasks.caption=0")

Pydantic checks types and bounds, so a mistake is found before any device is touched; an unknown name fails with the
nearest known one. The trade-off: a value is either in the config or it isn't configurable; components take plain values
or their own section, never the whole config.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mmscale.errors import ConfigError

# -------------------------------------------------------------------------------------------------- durations

_DURATION = re.compile(r"(?P<value>\d+(?:\.\d+)?(?:e\+?\d{1,2})?)(?P<unit>|ep|ex|%|m|h)")
_DURATION_HELP = (
    "give one of 1000 (steps), 2ep (epochs), 3e6ex (samples), 10% (of the run), 30m or 2h (wall time)"
)


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training, in steps or in seconds; exactly one of the two is set."""

    steps: int | None = None
    seconds: float | None = None


def check_duration(text: object) -> str:
    """Returns the text of a duration, or raises ValueError if it isn't one (two at once aren't one)."""
    text = str(text).strip()
    if not _DURATION.fullmatch(text):
        raise ValueError(f"{text!r} is not a duration: {_DURATION_HELP}")
    return text


def parse_duration(
    text: str, *, batch_size: int, samples_per_epoch: int, total_steps: int | None = None
) -> Duration:
    """Converts `1000`, `2ep`, `3e6ex`, `10%`, `30m` or `2h`.

    batch_size and samples_per_epoch count samples over all ranks; a percentage needs the run's total_steps. Durations
    in samples or epochs round to the nearest step, and to one step at least (unless they are zero).
    """
    match = _DURATION.fullmatch(check_duration(text))
    assert match is not None
    value, unit = float(match["value"]), match["unit"]
    if unit in ("m", "h"):
        return Duration(seconds=value * (60 if unit == "m" else 3600))
    if unit == "%":
        if total_steps is None:
            raise ConfigError(f"the duration {text!r} is a share of a run that isn't counted in steps")
        steps = value / 100 * total_steps
    elif unit == "ep":
        steps = value * (samples_per_epoch // batch_size)
    elif unit == "ex":
        steps = value / batch_size
    else:
        steps = value
    return Duration(steps=max(1, round(steps)) if value else 0)


def duration_unit(text: str) -> str:
    """The unit of a duration's text: "" (steps), "ep", "ex", "%", "m" or "h"."""
    match = _DURATION.fullmatch(text)
    assert match is not None, text
    return match["unit"]


def _check_shards(value: object) -> object:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(
            f"{value!r} names no shards: give a folder, a .tar, a brace pattern, or a list of these"
        )
    return value


def _check_sources(value: object) -> object:
    if not isinstance(value, dict):
        return _check_shards(value)
    for name, shards in value.items():
        try:
            _check_shards(shards)
        except ValueError as error:
            raise ValueError(f"source {name}: {error}") from None
    return value


# --------------------------------------------------------------------------------------------------- sections

DurationText = Annotated[str, BeforeValidator(check_duration)]
Shards = Annotated[str | list[str], BeforeValidator(_check_shards)]
Sources = Annotated[str | list[str] | dict[str, str | list[str]], BeforeValidator(_check_sources)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: ValidationInfo) -> object:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is neither a number nor a text")
        return value


class RunConfig(Section):
    """Where the run's folder is, its seed, its device."""

    name: str
    dir: Annotated[str, Field(min_length=1)] | None = None  # default: runs/NAME below the working directory
    checkpoints: Annotated[str, Field(min_length=1)] | None = (
        None  # a folder or an fsspec URL, and below it the run's name; default: checkpoints/ in the run's folder
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    resume: Literal["auto", "never", "must"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = (
        None  # CPU threads of a rank; default: the cores of the machine over its ranks
    )

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"{name!r} can't be a folder of runs/: give letters, digits, and . _ - after the first"
            )
        return name


class FieldConfig(Section):
    """One named field of a sample: where it lies in the record, and the modality that reads it."""

    source: str  # alternatives tried in order: "jpg|png|webp", "json.caption|txt"
    modality: Literal["text", "image", "audio", "label"]
    first: Fraction | None = None  # how often training takes the first of several texts; default: all evenly
    required: bool = True

    @model_validator(mode="after")
    def _fits(self) -> FieldConfig:
        if self.modality == "label" and not self.required:
            raise ValueError(
                "a label tells which samples match, so it can't be missing: leave out required=false"
            )
        return self

    @field_validator("source")
    @classmethod
    def _names_members(cls, source: str) -> str:
        if not all(source.split("|")):
            raise ValueError(f"{source!r} must be names joined by |")
        return source


class ImageAugmentConfig(Section):
    """Random changes to a training picture; zero is none. See `mmscale.data.augment.image_augment`."""

    shift: Fraction = 0.0  # of the side
    scale: Annotated[float, Field(ge=0)] = 0.0  # zoom within 1 / (1 + scale) .. 1 + scale
    rotate_deg: Annotated[float, Field(ge=0, le=180)] = 0.0
    flip: bool = False
    crop: tuple[Fraction, Fraction] | None = None  # a random part of the picture, by its share of the area
    color: Fraction = 0.0  # brightness, contrast, saturation within 1 - color .. 1 + color

    @field_validator("crop")
    @classmethod
    def _is_a_range(cls, crop: tuple[float, float] | None) -> tuple[float, float] | None:
        if crop is not None and not 0 < crop[0] <= crop[1]:
            raise ValueError(f"{list(crop)} must be the least and the largest share, as [0.5, 1.0]")
        return crop


class AudioAugmentConfig(Section):
    """Random changes to a training spectrogram; zero is none. See `mmscale.data.augment.spectrogram_augment`."""

    time_mask: Annotated[int, Field(ge=0)] = 0  # frames
    freq_mask: Annotated[int, Field(ge=0)] = 0  # mel bands
    gain: Annotated[float, Field(ge=0)] = 0.0
    shift: Annotated[int, Field(ge=0)] = 0


class AugmentConfig(Section):
    image: ImageAugmentConfig = ImageAugmentConfig()
    audio: AudioAugmentConfig = AudioAugmentConfig()


class StorageConfig(Section):
    """How shards are read, remote ones above all. See `mmscale.data.storage`."""

    timeout_s: Annotated[float, Field(gt=0)] = 30.0  # for one request
    retries: Annotated[int, Field(ge=0)] = 4
    cache_dir: str | None = (
        None  # of remote shards' blocks, for all ranks of a node; default: ~/.cache/mmscale
    )
    cache_gb: Annotated[float, Field(ge=0)] = 20.0  # at most, of remote shards only; 0 = none


class DataConfig(Section):
    train: Sources  # {source: shards} is a blend
    evals: dict[str, Shards] = {}
    weights: dict[
        str, Annotated[float, Field(ge=0)]
    ] = {}  # of a blend's sources; default: as many as they have
    weight_by: str | None = (
        None  # a measured column ("txt.tokens") that the weights share out; default: samples
    )
    batch_size: PositiveInt = 256  # samples in a step over all ranks
    fields: dict[str, FieldConfig]
    shuffle: bool = True
    order: Literal["auto", "full", "window"] = "auto"  # window: runs of neighbours, for remote and huge sets
    bucket_by: str | None = None  # a measured column ("wav.seconds"): batches of similar length
    augment: AugmentConfig = AugmentConfig()
    on_error: Literal["fail", "substitute"] = "fail"
    error_budget: Fraction = 0.005  # of all ranks' samples since the start of this process
    threads: PositiveInt = 1
    prefetch: PositiveInt = 3  # batches
    buffer_mb: PositiveInt = 256  # that batches read ahead may hold, for each rank
    cache_mb: Annotated[int, Field(ge=0)] = 0  # decoded samples kept in memory, for each rank
    stall_s: Annotated[float, Field(gt=0)] = 600.0  # without a batch: an error, not a hang
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _blends(self) -> DataConfig:
        problems = []
        if self.augment.image.crop is not None and self.cache_mb:
            problems.append(
                f"augment.image.crop={list(self.augment.image.crop)} decodes another part each time, so nothing "
                f"can be kept decoded: give cache_mb=0, not {self.cache_mb}"
            )
        if not isinstance(self.train, dict):
            if self.weights or self.weight_by:
                problems.append("weights are for a blend: give data.train as {source: shards}")
        else:
            if not self.train:
                problems.append("data.train={} names no sources")
            missing = [name for name in self.train if self.weights and name not in self.weights]
            unknown = [name for name in self.weights if name not in self.train]
            if missing:
                problems.append(f"weights lack {', '.join(missing)}")
            for name in unknown:
                match = difflib.get_close_matches(name, self.train, n=1)
                hint = f"did you mean {match[0]}?" if match else f"known are {', '.join(self.train)}"
                problems.append(f"weights: no source is called {name!r}; {hint}")
            if self.weights and not any(self.weights.values()):
                problems.append("weights are all 0")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class TextConfig(Section):
    tokenizer: str  # a tokenizer.json, or a folder that holds one
    max_length: PositiveInt = 32


class ImageConfig(Section):
    size: PositiveInt = 64  # pixels a side
    stem_widths: list[PositiveInt] = [
        16,
        32,
        64,
        128,
    ]  # channels of the stride-2 convolutions before the patches
    patch_size: PositiveInt = 1  # of the stem's output

    @property
    def num_tokens(self) -> int:
        return (self.size // (2 ** len(self.stem_widths) * self.patch_size)) ** 2


class AudioConfig(Section):
    sample_rate: PositiveInt = 16000  # Hz
    num_mels: PositiveInt = 64
    hop: PositiveInt = 256  # samples between frames
    max_frames: PositiveInt = 128
    stem_widths: list[PositiveInt] = [128, 128, 128]  # channels of the stride-2 convolutions over time
    patch_size: PositiveInt = 1  # of the stem's output

    @property
    def stride(self) -> int:
        """Frames that one token covers."""
        return 2 ** len(self.stem_widths) * self.patch_size


class ModelConfig(Section):
    width: PositiveInt = 192
    depth: PositiveInt = 4
    num_heads: PositiveInt = 4
    num_kv_heads: PositiveInt | None = None  # default: num_heads
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    embed_dim: PositiveInt = 128  # of the joint space
    text: TextConfig
    image: ImageConfig = ImageConfig()
    audio: AudioConfig = AudioConfig()
    kernels: Literal["auto", "triton", "torch", "reference"] = "auto"
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        problems = []
        if self.width % self.num_heads or (self.width // self.num_heads) % 8:
            problems.append(
                f"width={self.width} over num_heads={self.num_heads} must be a whole multiple of 8 a head"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            problems.append(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        reduction = 2 ** len(self.image.stem_widths) * self.image.patch_size
        if self.image.size % reduction:
            problems.append(
                f"image.size={self.image.size} must be a multiple of {reduction}, what the stem and patches reduce by"
            )
        if self.audio.max_frames % self.audio.stride:
            problems.append(
                f"audio.max_frames={self.audio.max_frames} must be a multiple of {self.audio.stride}, a token's frames"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def backend(self) -> str | None:
        return None if self.kernels == "auto" else self.kernels


class OptimConfig(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: DurationText = "5%"
    final_lr: Fraction = 0.0  # of lr, where the schedule ends
    clip_norm: Annotated[float, Field(ge=0)] = 1.0  # global gradient norm; 0 = no clipping


class TrainConfig(Section):
    duration: DurationText = "1000"
    accumulation: PositiveInt = 1  # micro-batches in a step, for each rank
    log_every: PositiveInt = 10  # steps
    log_keys: bool = False  # keys/rank-R.jsonl: which samples each step of a rank has read
    save_every: DurationText = "25%"
    save_clock: DurationText | None = None  # besides: "10m", so that a slow run loses no more than that
    eval_every: DurationText | None = None  # besides before and after
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    keep_best: str | None = None  # besides: the best by SET/TASK/METRIC of the evaluations
    max_failed_saves: PositiveInt = 3  # in a row, until the run ends


class GuardConfig(Section):
    """What is done about steps that would harm the model. See `mmscale.guards`."""

    max_bad_steps: PositiveInt = 3  # with non-finite gradients, in a row: then back to the last checkpoint
    max_rollbacks: Annotated[int, Field(ge=0)] = 2  # until the run ends
    spike_z: Annotated[float, Field(ge=0)] = 8.0  # robust z-score of a loss that is a spike; 0 = never
    spike_window: Annotated[int, Field(ge=8)] = 64  # steps that it is compared with
    on_spike: Literal["warn", "rollback"] = "warn"


class EngineConfig(Section):
    """DeepSpeed: how the model is sharded, its precision, what is offloaded."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    timeout: Annotated[float, Field(gt=0, le=1e6)] = 600.0  # seconds a collective may take

    @model_validator(mode="after")
    def _fits(self) -> EngineConfig:
        problems = []
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            problems.append(f"offload_optimizer={self.offload_optimizer} needs zero_stage 1, 2 or 3, it is 0")
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            problems.append(f"offload_optimizer=nvme needs zero_stage=3, it is {self.zero_stage}")
        if self.offload_parameters != "none" and self.zero_stage != 3:
            problems.append(
                f"offload_parameters={self.offload_parameters} needs zero_stage=3, it is {self.zero_stage}"
            )
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
            problems.append("offloading to nvme needs nvme_path, a folder on that disk")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class EvalConfig(Section):
    num_candidates: PositiveInt = 400  # of a retrieval
    batch_size: PositiveInt = 128  # samples over all ranks
    num_generated: PositiveInt = 128  # samples of a set that a generating task is scored on


class LaunchConfig(Section):
    nodes: PositiveInt = 1
    workers_per_node: PositiveInt | None = None  # default: the GPUs of a node, else two
    min_workers: PositiveInt | None = None  # go on with as few when nodes are lost; default: all are needed
    max_restarts: Annotated[int, Field(ge=0)] = 10  # after failures of machines, links and processes
    backoff_s: Annotated[float, Field(ge=0)] = (
        1.0  # before a restart that follows one without a step gained; doubled at each such
    )
    max_backoff_s: Annotated[float, Field(ge=0)] = 60.0
    start_s: Annotated[float, Field(gt=0)] = 600.0  # until a rank's first step
    hang_s: Annotated[float, Field(gt=0)] = 12.0  # without progress, and ...
    hang_steps: Annotated[float, Field(gt=0)] = 10.0  # ... as many median steps: then a rank hangs
    lease_s: Annotated[float, Field(ge=5)] = 10.0  # on a cluster: ranks end that don't hear the launcher
    preflight: bool = True  # `mmscale doctor` first


class Config(Section):
    """One complete run. `override` returns a changed copy; `to_json` and `from_json` keep it in a file."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    tasks: dict[str, Annotated[float, Field(ge=0)]]
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    guard: GuardConfig = GuardConfig()
    evals: EvalConfig = EvalConfig()
    launch: LaunchConfig = LaunchConfig()

    @model_validator(mode="after")
    def _fits(self) -> Config:
        problems = _problems_between(dict(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def override(self, *assignments: str) -> Config:
        """Returns a copy changed by `section.field=value` texts.

        A value is JSON where it parses as such, else a string; for a field that holds text, 2024 and true are text too.
        Raises ConfigError with all problems of all assignments.
        """
        tree = self.model_dump(mode="json")
        problems = []
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals or not path:
                problems.append(f"{assignment!r}: give section.field=value")
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError:
                value = text
            *parents, leaf = path.split(".")
            if isinstance(value, int | float) and _takes_text(_annotation([*parents, leaf])):
                value = text
            node: Any = tree
            for parent in parents:
                node = node.setdefault(parent, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                problems.append(f"{path}: {'.'.join(parents)} is a value, not a section")
                continue
            node[leaf] = value
        return _validate(tree, problems, origin="the configuration")

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes, *, origin: str = "the file") -> Config:
        """Reads what `to_json` wrote. Raises ConfigError; `origin` names the source in its message."""
        try:
            tree = json.loads(text)
        except ValueError as error:  # no JSON, or bytes that aren't text
            raise ConfigError(f"{origin} is not JSON: {error}") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{origin} must hold one JSON object, it holds a {type(tree).__name__}")
        return _validate(tree, [], origin=origin)

    def differences(self, other: Config) -> list[str]:
        """The fields in which two configs differ, as `path: this -> other`."""
        mine, theirs = (dict(_leaves(c.model_dump(mode="json"))) for c in (self, other))
        return [
            f"{key}: {mine.get(key, '(absent)')} -> {theirs.get(key, '(absent)')}"
            for key in sorted({*mine, *theirs})
            if mine.get(key) != theirs.get(key)
        ]


@dataclass(frozen=True, kw_only=True)
class Durations:
    """The lengths in a config as numbers; None where it sets none of that kind."""

    total_steps: int | None
    total_s: float | None
    warmup_steps: int
    save_steps: int | None
    save_s: float | None  # the shortest of what is given
    eval_steps: int | None

    @staticmethod
    def of(config: Config, samples_per_epoch: int) -> Durations:
        def convert(text: str, total: int | None = None) -> Duration:
            return parse_duration(
                text,
                batch_size=config.data.batch_size,
                samples_per_epoch=samples_per_epoch,
                total_steps=total,
            )

        train = config.train
        total = convert(train.duration)
        save, clock = (
            convert(text, total.steps) if text else Duration()
            for text in (train.save_every, train.save_clock)
        )
        seconds = [part.seconds for part in (save, clock) if part.seconds is not None]
        return Durations(
            total_steps=total.steps,
            total_s=total.seconds,
            warmup_steps=convert(config.optim.warmup, total.steps).steps or 0,
            save_steps=save.steps or None,
            save_s=min(seconds, default=None),
            eval_steps=convert(train.eval_every, total.steps).steps if train.eval_every else None,
        )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --------------------------------------------------------------------------------------------------- messages


def _problems_between(sections: Mapping[str, Any]) -> list[str]:
    """What is wrong between sections that are valid by themselves; a section that isn't may be left out."""
    problems = []
    data, train, optim, tasks = (sections.get(name) for name in ("data", "train", "optim", "tasks"))
    if tasks is not None and not any(tasks.values()):
        problems.append(f"tasks={tasks}: at least one task needs a weight above 0")
    if data and train and data.batch_size % train.accumulation:
        problems.append(
            f"data.batch_size={data.batch_size} must be a multiple of train.accumulation={train.accumulation}"
        )
    if train and duration_unit(train.duration) == "%":
        problems.append(f"train.duration={train.duration} is a share of itself: {_DURATION_HELP}")
    if train and train.save_clock is not None and duration_unit(train.save_clock) not in ("m", "h"):
        problems.append(
            f"train.save_clock={train.save_clock} must be wall time, as 10m; train.save_every takes steps"
        )
    if train and train.keep_best is not None and data and tasks is not None:
        evaluation, _, rest = train.keep_best.partition("/")
        task, _, metric = rest.partition("/")
        if evaluation not in data.evals or task not in tasks or not metric:
            problems.append(
                f"train.keep_best={train.keep_best} must be SET/TASK/METRIC with one of data.evals "
                f"({', '.join(data.evals) or 'there are none'}) and one of tasks ({', '.join(tasks)})"
            )
    if train and train.eval_every is not None:
        if duration_unit(train.eval_every) in ("m", "h"):
            problems.append(
                f"train.eval_every={train.eval_every} is wall time: give it in steps, ep, ex or % of the run"
            )
        elif not float(train.eval_every.rstrip("epx%")):
            problems.append(
                f"train.eval_every={train.eval_every}: give null for none besides before and after"
            )
    if optim and duration_unit(optim.warmup) in ("m", "h"):
        problems.append(f"optim.warmup={optim.warmup} is wall time: give it in steps, ep, ex or % of the run")
    if train and duration_unit(train.duration) in ("m", "h"):
        if optim and optim.schedule != "constant":
            problems.append(
                f"train.duration={train.duration} is wall time, so the learning rate can't follow it: "
                f"optim.schedule={optim.schedule} must be constant, or train.duration in steps, ep or ex"
            )
        shares = {"train.save_every": train.save_every, "train.eval_every": train.eval_every}
        if optim:
            shares["optim.warmup"] = optim.warmup
        problems += [
            f"{name}={text} is a share of a run whose steps aren't known: "
            f"train.duration={train.duration} is wall time"
            for name, text in shares.items()
            if text is not None and duration_unit(text) == "%"
        ]
    return problems


def _task_problems(tree: Mapping[str, Any]) -> list[str]:
    from mmscale.tasks import TASKS  # here, since it brings torch, which `mmscale --help` does without

    tasks, data = tree.get("tasks"), tree.get("data")
    fields = data.get("fields") if isinstance(data, dict) else None
    problems = []
    for name, weight in tasks.items() if isinstance(tasks, dict) else ():
        if name not in TASKS:
            problems.append(f"tasks.{name}: no such task{_nearest(name, TASKS)}")
        elif weight and isinstance(fields, dict):
            problems += [
                f"tasks.{name} reads the field {field}, which data.fields lacks; it has {', '.join(fields)}"
                for field in TASKS[name]().fields
                if field not in fields
            ]
            problems += [
                f"tasks.{name} can't read data.fields.{field}, whose modality is {fields[field]['modality']}"
                for field in TASKS[name]().fields
                if isinstance(fields.get(field), dict)
                and isinstance(fields[field].get("modality"), str)
                and not TASKS[name]().accepts(field, fields[field]["modality"])
            ]
    return problems


def _validate(tree: dict[str, Any], problems: list[str], *, origin: str) -> Config:
    config = None
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        problems = [*problems, *_messages(error)]
        broken = {problem["loc"][0] for problem in error.errors() if problem["loc"]}
        if broken:  # pydantic then doesn't come to what lies between sections
            types = {name: field.annotation for name, field in Config.model_fields.items() if name in tree}
            sound = {
                name: TypeAdapter(kind).validate_python(tree[name])
                for name, kind in types.items()
                if kind is not None and name not in broken
            }
            problems += _problems_between(sound)
    problems = [*problems, *_task_problems(tree)]
    if config is None or problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "a problem"
        raise ConfigError(f"{origin} has {count}:\n{listed}")
    return config


def _messages(error: ValidationError) -> list[str]:
    messages = []
    for problem in error.errors():
        path = [str(part) for part in problem["loc"]]
        name = ".".join(path)
        if problem["type"] == "extra_forbidden":
            message = f"{name}: no such field{_nearest(path[-1], _known_names(path[:-1]))}"
        elif problem["type"] == "missing":
            message = f"{name}: missing"
        elif problem["type"] in ("model_type", "dict_type"):
            known = _known_names(path)
            inside = f"its fields are {', '.join(known)}" if known else f"give {name}.NAME=value"
            message = f"{name}={problem['input']!r}: it is a section: {inside}"
        elif problem["type"] == "value_error":
            text = str(problem["ctx"]["error"])
            messages += [f"{name}: {line}" if name else line for line in text.splitlines()]
            continue
        else:
            message = f"{name}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        messages.append(message)
    return messages


def _annotation(path: list[str]) -> Any:
    """The type of the field at a path; None where the path leaves the typed sections."""
    found: Any = Config
    for part in path:
        if get_origin(found) is dict:
            found = get_args(found)[1]
        elif isinstance(found, type) and issubclass(found, BaseModel) and part in found.model_fields:
            found = found.model_fields[part].annotation
        else:
            return None
    return found


def _takes_text(annotation: Any) -> bool:
    """Whether a field of this type may hold any text: str itself, or str among others."""
    return annotation is str or (
        get_origin(annotation) is not dict and any(map(_takes_text, get_args(annotation)))
    )


def _known_names(path: list[str]) -> list[str]:
    """The field names of the section at a path; none where there is no section."""
    section = _annotation(path)
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _nearest(name: str, known: Any) -> str:
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if match:
        return f"; did you mean {match[0]}?"
    return f"; known are {', '.join(known)}" if known else ""


def load_config(path: str | Path) -> Config:
    """Reads a config file (JSON, as saved in a run's folder). Raises ConfigError."""
    path = Path(path)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"can't read the config {path}: {error.strerror}") from None
    return Config.from_json(text, origin=str(path))
