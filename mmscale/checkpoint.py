"""Checkpoints: found, verified before anything is loaded, loaded. `mmscale.saver` writes them.

Each holds the sharded state of DeepSpeed (to resume), `model.safetensors` (to evaluate, without DeepSpeed), the config,
the tokenizer, and a manifest: sizes and SHA-256 of the files, the position in the data, who wrote it. The ranks verify
the newest together, each a part of its files, and fall back to the one before; the file `latest` is for people and
tools, and only checked. At another world size within ZeRO 1 to 3, DeepSpeed's universal format is made beside the
checkpoint, once, and goes with it. What lies behind an fsspec URL is copied to a folder of each machine while it is
verified. The trade-off: a start reads every byte of the checkpoint once before it loads it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, overload

import torch
from safetensors.torch import load_file

from mmscale.config import Config, load_config
from mmscale.engine import Engine, load_deepspeed
from mmscale.errors import CheckpointError, ConfigError, Diverged, UserError
from mmscale.models import Model
from mmscale.store import MANIFEST, LocalStore, Store, digest, open_store, read
from mmscale.tasks import model_for
from mmscale.world import World

TAG = "deepspeed"
POINTER = "latest"
FOR_THE_MODEL = ("model.safetensors", "config.json", "tokenizer.json")


@dataclass(frozen=True)
class Found:
    """A verified checkpoint and what its manifest says. path: where its files are on this machine."""

    path: Path
    manifest: dict[str, Any]
    place: str = ""  # where it lies, for messages
    is_copy: bool = False  # path is this machine's copy of a remote one

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def __str__(self) -> str:
        return self.place or str(self.path)


def check_finite(losses: Mapping[str, float], step: int, lr: float, folder: Path | str) -> None:
    """Raises Diverged before a model that has come apart is saved over a good one."""
    if all(map(math.isfinite, losses.values())):
        return
    saved = complete(folder)
    raise Diverged(
        f"the loss is {losses['all']} by step {step}: lower optim.lr={lr:g} or look at the data; "
        + (f"the newest checkpoint is {saved[-1]}" if saved else "nothing is saved yet")
    )


# -------------------------------------------------------------------------------------------------- names and manifests


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_names(store: Store) -> list[str]:
    """The checkpoints whose writing was finished, oldest first."""
    names = [name for name in store.names() if name.startswith("step-") and "." not in name]
    return [name for name in names if store.is_complete(name)]


@overload
def complete(folder: Path) -> list[Path]: ...
@overload
def complete(folder: str) -> list[str]: ...
@overload
def complete(folder: Path | str) -> list[Path] | list[str]: ...
def complete(folder: Path | str) -> list[Path] | list[str]:
    """The checkpoints whose writing was finished, oldest first: paths, or URLs where the folder is one."""
    store = open_store(folder)
    if isinstance(store, LocalStore):
        return [store.folder / name for name in step_names(store)]
    return [store.place(name) for name in step_names(store)]


def seal(body: Mapping[str, Any]) -> bytes:
    """A manifest and a digest of it: a figure that has changed must not pass for the one that was written."""
    return json.dumps({**body, "sha256": _digest_of(body)}, indent=1).encode()


def unseal(data: bytes) -> dict[str, Any]:
    """Raises ValueError unless it is a manifest as it was written."""
    body = json.loads(data)
    if not isinstance(body, dict) or not isinstance(body.get("files"), dict):
        raise ValueError("it isn't a manifest")
    if body.pop("sha256", None) != _digest_of(body):
        raise ValueError("it has changed since it was written")
    return body


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------- verifying


def find(folder: Path | str, world: World) -> tuple[Found | None, list[str]]:
    """The newest checkpoint that verifies, and what was wrong with others. Collective: the same on all ranks.

    Each rank reads its share of the files, and nothing is loaded before all agree. Raises CheckpointError where there
    are checkpoints and none of them verifies, or there must have been one: nothing starts over silently.
    """
    candidates, error = None, None
    store: Store | None = None
    try:
        store = open_store(folder)
        if world.rank == 0:
            names = step_names(store)
            candidates = names, _pointer_problems(store, names)
    except OSError as caught:
        error = CheckpointError(f"{folder} can't be read: {caught}")
    world.agree(error)
    assert store is not None
    names, problems = world.gather(candidates)[0]
    for name in reversed(names):
        found, problem = _verify_together(store, name, world)
        if found is not None:
            return found, problems
        problems.append(problem)
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(f"no checkpoint in {folder} can be used:\n  {listed}")
    return None, []


def _pointer_problems(store: Store, names: list[str]) -> list[str]:
    """An older one than the newest is what a kill leaves between the two moves: no problem."""
    place = store.place(POINTER)
    if store.size(POINTER) is None:
        return [f"{place} is missing; the newest of the folder is taken"] if names else []
    try:
        named = read(store, POINTER).decode().strip()
    except ValueError:
        named = ""
    if named in names:
        return []
    return [f"{place} names {named[:40]!r}, which is no checkpoint here; the newest of the folder is taken"]


def _verify_together(store: Store, name: str, world: World) -> tuple[Found | None, str]:
    manifest, problem = None, None
    if world.rank == 0:
        try:
            manifest = read_manifest(store, name)
        except CheckpointError as error:
            problem = str(error)
    manifest, problem = world.gather((manifest, problem))[0]
    if manifest is None:
        return None, problem
    path, share, of = Path(store.place(name)), world.rank, world.size
    if store.is_remote:
        # Every machine needs a copy, which its ranks make together.
        path, share, of = _copy_folder(store, name, manifest), world.local_rank, world.local_size
    try:
        files = sorted(manifest["files"].items())
        for file, (size, expected) in files[share::of]:
            check_file(store, f"{name}/{file}", size, expected, path / file if store.is_remote else None)
    except CheckpointError as error:
        problem = str(error)
    [*problems] = filter(None, world.gather(problem))
    if problems:
        if store.is_remote and world.local_rank == 0:
            shutil.rmtree(path, ignore_errors=True)
        return None, problems[0]
    return Found(path, manifest, store.place(name), store.is_remote), ""


def _copy_folder(store: Store, name: str, manifest: Mapping[str, Any]) -> Path:
    """The same for all ranks of a machine, another one for another checkpoint or user."""
    key = hashlib.sha256(f"{store}/{name}/{_digest_of(manifest)}".encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"mmscale-{os.getuid()}-{key}" / name


def read_manifest(store: Store, name: str) -> dict[str, Any]:
    """Raises CheckpointError."""
    try:
        manifest = unseal(read(store, f"{name}/{MANIFEST}"))
        int(manifest["step"])
        [(size, expected) for size, expected in manifest["files"].values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{store.place(name)}: {MANIFEST} can't be read: {error}") from None
    return manifest


def check_file(store: Store, name: str, size: int, expected: str, copy: Path | None = None) -> None:
    """Raises CheckpointError naming the file unless it is as it was written. copy: where to put it meanwhile."""
    place = store.place(name)
    try:
        found = store.size(name)
        if found is None:
            raise CheckpointError(f"{place} is missing")
        if found != size:
            raise CheckpointError(f"{place} has {found} bytes, written were {size}")
        if copy is None:
            same = digest(store, name) == expected
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with copy.open("wb") as target:
                same = digest(store, name, target) == expected
    except OSError as error:
        raise CheckpointError(f"{place} can't be read: {error}") from None
    if not same:
        raise CheckpointError(f"{place} has changed since it was written")


def verify(path: Path | str) -> Found:
    """Checks every file of a checkpoint against its manifest. Raises CheckpointError naming the first that differs."""
    folder, name = _split(path)
    try:
        store = open_store(folder)
    except OSError as error:
        raise CheckpointError(str(error)) from None
    manifest = read_manifest(store, name)
    for file, (size, expected) in sorted(manifest["files"].items()):
        check_file(store, f"{name}/{file}", size, expected)
    return Found(Path(path), manifest, store.place(name))


def _split(path: Path | str) -> tuple[Path | str, str]:
    if isinstance(path, str) and "://" in path:
        folder, name = path.rstrip("/").rsplit("/", 1)
        return folder, name
    path = Path(path).absolute()
    return path.parent, path.name


# -------------------------------------------------------------------------------------------------- loading


def needs_conversion(found: Found, world_size: int, zero_stage: int) -> bool:
    """Whether a checkpoint must be converted to be resumed so. Raises ConfigError where it can't be."""
    saved_size, saved_stage = found.manifest["world_size"], found.manifest["zero_stage"]
    if saved_stage != zero_stage:
        raise ConfigError(
            f"engine.zero_stage={zero_stage}: {found} was written with zero_stage={saved_stage}; "
            "resume with that, or start another run"
        )
    return saved_size != world_size and zero_stage > 0


def load(engine: Engine, found: Found, *, universal: bool) -> None:
    """Loads weights and optimizer into an engine, a fresh one or one that has trained. Collective."""
    world, path = engine.world, found.path
    engine.deepspeed._config.load_universal_checkpoint = universal
    if universal:
        path, error = found.path.with_name(f"{found.path.name}.universal"), None
        if (world.local_rank if found.is_copy else world.rank) == 0:
            try:
                _make_universal(found, path)
            except UserError as caught:
                error = caught
            except OSError as caught:
                error = CheckpointError(f"{path} can't be written: {caught.strerror or caught}")
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
    if found.is_copy and world.local_rank == 0:  # agreed above: all have read it
        shutil.rmtree(found.path.parent, ignore_errors=True)


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


def _make_universal(found: Found, target: Path) -> None:
    """Converts a checkpoint, unless that was done before and is still as it was left."""
    store, source = LocalStore(target.parent), _digest_of(found.manifest)
    with warnings.catch_warnings():
        try:
            manifest = unseal((target / MANIFEST).read_bytes())
            for file, (size, expected) in manifest["files"].items():
                check_file(store, f"{target.name}/{file}", size, expected)
            if manifest["source"] == source:
                return
        except (OSError, ValueError, KeyError, CheckpointError):
            pass  # none yet, or none any more
    staging = f"{target.name}.tmp"
    for left in (staging, target.name):
        store.remove(left)
    _convert(found.path / TAG, target.with_name(staging) / TAG)
    files = {}
    for file in sorted(path for path in target.with_name(staging).rglob("*") if path.is_file()):
        name = file.relative_to(target.with_name(staging)).as_posix()
        files[name] = file.stat().st_size, digest(store, f"{staging}/{name}")
    store.write(f"{staging}/{MANIFEST}", lambda raw: raw.write(seal({"source": source, "files": files})))
    store.commit(staging, target.name)


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's own converter, in a process of its own since it starts a pool of workers."""
    load_deepspeed()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(source)]
    command += ["--output_folder", str(target), "--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(target.parent, ignore_errors=True)
        raise CheckpointError(
            f"{source} can't be converted to another world size: {done.stderr.strip()[-2000:]}"
        )


def load_model(path: Path | str) -> tuple[Model, Config]:
    """The model of a checkpoint (or of a run's newest one) on the CPU, in evaluation mode, and its config.

    Of a run, a damaged newest checkpoint is passed over with a warning; one that is asked for by its own name is not.
    Only the files that the model needs are verified. Raises CheckpointError or ConfigError.
    """
    from mmscale.runs import checkpoints_of  # which imports this module

    remote = isinstance(path, str) and "://" in path
    if not remote:
        path = Path(path)
        if not path.exists():
            raise ConfigError(f"{path}: there is no such run or checkpoint")
    folder, name = _split(path)
    try:
        # The weights tell of a checkpoint that has lost its manifest.
        if any(
            open_store(folder).size(f"{name}/{file}") is not None for file in (MANIFEST, FOR_THE_MODEL[0])
        ):
            return _load_model(open_store(folder), name)
        folder = path
        if isinstance(path, Path) and (path / "config.json").is_file():
            folder = checkpoints_of(load_config(path / "config.json"), path)
        elif isinstance(path, Path) and (path / "checkpoints").is_dir():
            folder = path / "checkpoints"
        elif not remote:
            raise ConfigError(
                f"{path} is neither a run's folder nor a checkpoint: there is no {MANIFEST} in it"
            )
        store = open_store(folder)
        names = step_names(store)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error}") from None
    if not names:
        raise CheckpointError(f"{path} has no checkpoint yet")
    problems = []
    for name in reversed(names):
        try:
            loaded = _load_model(store, name)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"passed over a damaged checkpoint: {problem}", stacklevel=2)
        return loaded
    listed = "\n  ".join(problems)
    raise CheckpointError(f"no checkpoint in {folder} can be used:\n  {listed}")


def _load_model(store: Store, name: str) -> tuple[Model, Config]:
    files = read_manifest(store, name)["files"]
    with tempfile.TemporaryDirectory(prefix="mmscale-") as copies:
        path = Path(copies) if store.is_remote else Path(store.place(name))
        for file in FOR_THE_MODEL:
            if file not in files:
                raise CheckpointError(f"{store.place(name)}: {MANIFEST} doesn't list {file}")
            size, expected = files[file]
            check_file(store, f"{name}/{file}", size, expected, path / file if store.is_remote else None)
        config = load_config(path / "config.json")
        # Its own words, wherever the run's tokenizer has gone, and kernels that a CPU has too.
        text = config.model.text.model_copy(update={"tokenizer": str(path / "tokenizer.json")})
        own = config.model.model_copy(update={"text": text, "kernels": "auto"})
        model = model_for(config.model_copy(update={"model": own}))
        model.load_state_dict(load_file(path / "model.safetensors"))
    return model.float().eval(), config
