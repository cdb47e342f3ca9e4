"""Checkpoints: written whole or not at all, verified before they are loaded.

`save` writes into `step-N.tmp/`, every file synced, a manifest of sizes and SHA-256 last, and then renames the folder:
one without `.tmp` is complete. Each holds the sharded state of DeepSpeed (to resume), `model.safetensors` (to
evaluate, without DeepSpeed), the resolved config and the position in the data. `find` verifies the newest and falls
back to the one before. At another world size within ZeRO 1 to 3, DeepSpeed's universal format is made beside it, loaded
and removed again: it costs seconds, and nothing unverified is left for a later start.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mmscale.config import Config, load_config
from mmscale.engine import Engine, load_deepspeed
from mmscale.errors import CheckpointError, ConfigError, UserError
from mmscale.models import Model
from mmscale.tasks import model_for
from mmscale.world import World

TAG = "deepspeed"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Found:
    """A verified checkpoint and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


def save(
    engine: Engine, folder: Path, *, step: int, state: dict[str, Any], config: Config, keep: int
) -> Path:
    """Writes `folder/step-N/`, then removes all but the newest `keep`. Collective. Raises CheckpointError on all ranks.

    state: json-able, equal on every rank (the data's position and the like).
    """
    world = engine.world
    final, temporary = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    error: OSError | None = None
    if world.rank == 0:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            need, free = _bytes_needed(engine), shutil.disk_usage(folder).free
            if free < need:
                raise OSError(
                    f"about {need / 2**20:,.0f} MiB are needed and {free / 2**20:,.0f} MiB are free"
                )
        except OSError as caught:
            error = caught
    _agree_on_write(world, error, temporary)
    writer = _DurableWriter()
    engine.deepspeed.checkpoint_engine, before = writer, engine.deepspeed.checkpoint_engine
    # DeepSpeed adds scripts that make model.safetensors of its files, and it is there; on a full disk their copying
    # would raise on rank 0 alone and leave the others at a barrier.
    engine.deepspeed._copy_recovery_script = lambda folder: None
    try:
        engine.deepspeed.save_checkpoint(
            str(temporary), tag=TAG, client_state={"universal_checkpoint_info": {}}, save_latest=False
        )
    finally:
        engine.deepspeed.checkpoint_engine = before
    weights = engine.weights()
    error = writer.error
    if world.rank == 0 and error is None:
        try:
            save_file(weights, temporary / "model.safetensors")
            tokenizer = engine.model.text.tokenizer.to_str(pretty=False)
            (temporary / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            (temporary / "config.json").write_text(config.to_json(), encoding="utf-8")
        except OSError as caught:
            error = caught
        except SafetensorError as caught:
            error = OSError(str(caught))
    _agree_on_write(world, error, temporary)
    if world.rank == 0:
        try:
            manifest = {
                "step": step,
                "world_size": world.size,
                "zero_stage": engine.zero_stage,
                "state": state,
                "files": _digests(temporary),
            }
            _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
            _sync_tree(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync(folder)
            for old in complete(folder)[:-keep]:
                shutil.rmtree(old)
            # What killed runs left behind.
            for left in (*folder.glob("step-*.tmp"), *folder.glob("step-*.universal*")):
                shutil.rmtree(left)
        except OSError as caught:
            error = caught
    _agree_on_write(world, error, temporary)
    return final


def check_finite(losses: Mapping[str, float], step: int, lr: float, folder: Path) -> None:
    """Raises UserError before a model that has come apart is saved over a good one."""
    if all(map(math.isfinite, losses.values())):
        return
    saved = complete(folder)
    raise UserError(
        f"the loss is {losses['all']} by step {step}: lower optim.lr={lr:g} or look at the data; "
        + (f"the newest checkpoint is {saved[-1]}" if saved else "nothing is saved yet")
    )


def complete(folder: Path) -> list[Path]:
    """The checkpoints whose writing was finished, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.name.startswith("step-") and not p.suffix and p.is_dir())


def find(folder: Path, world: World) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with newer ones. Collective: all ranks get rank 0's.

    Raises CheckpointError where there are checkpoints and none of them verifies: nothing starts over silently.
    """
    found, problems = None, []
    if world.rank == 0:
        paths = complete(folder)
        for path in reversed(paths):
            try:
                found = verify(path)
                break
            except CheckpointError as error:
                problems.append(str(error))
        if paths and found is None:
            listed = "\n  ".join(problems)
            problems = [f"no checkpoint in {folder} can be used:\n  {listed}"]
    found, problems = world.gather((found, problems))[0]
    if problems and found is None:
        raise CheckpointError(problems[0])
    return found, problems


def verify(path: Path) -> Found:
    """Checks every file of a checkpoint against its manifest. Raises CheckpointError naming the first that differs."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = dict(manifest["files"])
        Found(path, manifest).step  # noqa: B018  (a manifest without a step is not one)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} can't be read: {error}") from None
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes, written were {size}")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} has changed since it was written")
    return Found(path, manifest)


def needs_conversion(found: Found, world_size: int, zero_stage: int) -> bool:
    """Whether a checkpoint must be converted to be resumed so. Raises ConfigError where it can't be."""
    saved_size, saved_stage = found.manifest["world_size"], found.manifest["zero_stage"]
    if saved_stage != zero_stage:
        raise ConfigError(
            f"engine.zero_stage={zero_stage}: {found.path} was written with zero_stage={saved_stage}; "
            "resume with that, or start another run"
        )
    return saved_size != world_size and zero_stage > 0


def load(engine: Engine, found: Found, *, universal: bool) -> None:
    """Loads weights and optimizer into a fresh engine (made with universal=True if so). Collective."""
    world, path = engine.world, found.path
    if universal:
        path, error = found.path.with_name(f"{found.path.name}.universal"), None
        if world.rank == 0:
            try:
                _convert(found.path / TAG, path)
            except UserError as caught:
                error = caught
        world.agree(error)
    optimizer = engine.deepspeed.optimizer
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    with _stand_ins(optimizer) if universal and engine.zero_stage < 3 else nullcontext():
        loaded, _ = engine.deepspeed.load_checkpoint(str(path), tag=TAG)
    world.agree(None if loaded else CheckpointError(f"DeepSpeed found nothing to load in {path}"))
    # The universal format gives all groups of ZeRO-3 the options of the first one, and one step counter between them,
    # which each of them would advance.
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    if universal and world.rank == 0:
        shutil.rmtree(path)


@contextmanager
def _stand_ins(optimizer: Any) -> Iterator[None]:
    """Lets DeepSpeed load a universal checkpoint on a rank that holds nothing of some parameter group, only padding.

    It asks for the step of the group's first parameter held here; there is none, so one answers for the others.
    """
    absent = [group[0] for group in optimizer.bit16_groups if all(p._hp_mapping is None for p in group)]
    before = [getattr(parameter, "load_hp_checkpoint_state", None) for parameter in absent]
    for parameter in absent:
        parameter._hp_mapping = SimpleNamespace(get_optim_state_keys=lambda: ())
        parameter.load_hp_checkpoint_state = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for parameter, method in zip(absent, before, strict=True):
            parameter._hp_mapping, parameter.load_hp_checkpoint_state = None, method


def load_model(path: Path) -> tuple[Model, Config]:
    """The model of a checkpoint (or of a run's newest one) on the CPU, in evaluation mode, and its config.

    Raises CheckpointError or ConfigError.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such run or checkpoint")
    if (path / "checkpoints").is_dir():
        found = complete(path / "checkpoints")
        if not found:
            raise CheckpointError(f"{path} has no checkpoint yet")
        path = found[-1]
    if not (path / MANIFEST).is_file():
        raise ConfigError(f"{path} is neither a run's folder nor a checkpoint: there is no {MANIFEST} in it")
    verify(path)
    config = load_config(path / "config.json")
    # Its own words, wherever the run's tokenizer has gone, and kernels that a CPU has too.
    text = config.model.text.model_copy(update={"tokenizer": str(path / "tokenizer.json")})
    own = config.model.model_copy(update={"text": text, "kernels": "auto"})
    model = model_for(config.model_copy(update={"model": own}))
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model.float().eval(), config


class _DurableWriter:
    """What DeepSpeed writes through: synced files, and no exception that would leave the other ranks at a barrier."""

    def __init__(self) -> None:
        self.error: OSError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            with _NotingFile(path, "wb") as raw:
                try:
                    with io.BufferedWriter(raw) as file:
                        torch.save(state_dict, file)
                        file.flush()
                        os.fsync(file.fileno())
                except RuntimeError:  # what torch makes of a failed write
                    if raw.error is None:
                        raise
                    raise raw.error from None
        except OSError as error:
            self.error = error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None: ...

    def preserves_storage_sharing(self) -> bool:
        return True


class _NotingFile(io.FileIO):
    """A file that remembers the first error of a write, which torch.save turns into other words."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _agree_on_write(world: World, error: OSError | None, temporary: Path) -> None:
    """Raises on all ranks if one couldn't write, and removes what was written of this checkpoint."""
    try:
        world.agree(None if error is None else CheckpointError(_explain(error, temporary)))
    except CheckpointError:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        world.barrier()  # so that every rank finds room again to say in its log why it ends
        raise


def _explain(error: OSError, temporary: Path) -> str:
    last = complete(temporary.parent)
    kept = f"the newest good one is {last[-1]}" if last else "there is none before it"
    return f"checkpoint {temporary.with_suffix('')} can't be written: {error.strerror or error}; {kept}"


def _bytes_needed(engine: Engine) -> int:
    """A little above what all ranks will write: float32 weights to train, their master copy, those to evaluate, and two
    Adam moments.
    """
    shapes = (getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    return int(sum(shapes) * 5 * 4 * 1.1)


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's own converter, in a process of its own since it starts a pool of workers."""
    load_deepspeed()
    temporary = target.with_suffix(".universal-tmp")
    for left in (temporary, target):  # by a start that was killed
        shutil.rmtree(left, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source)]
    command += [
        "--output_folder",
        str(temporary / TAG),
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{source} can't be converted to another world size: {done.stderr.strip()[-2000:]}"
        )
    temporary.rename(target)


def _digests(folder: Path) -> dict[str, tuple[int, str]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, _sha256(p)) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)
