"""What one machine needs for a run, looked at before the run: versions, disk, memory, operators, shards, folder.

::

    for finding in examine(config, num_ranks=4, world_size=8):
        print(finding.check, finding.level, finding.text, finding.remedy)

Each check takes milliseconds to a second and changes nothing, with two exceptions: locks that a killed build left
behind are removed, and the one operator that a run may need (DeepSpeed's CPU Adam) is compiled, so that a rank doesn't
do it later, under a clock. What takes several machines is in `mmscale_launcher.doctor`. The trade-off: memory is
arithmetic over weights, gradients and optimizer; activations are left to the first step.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil

from mmscale.config import Config
from mmscale.errors import ConfigError, UserError

LEVELS = ("ok", "warning", "error")
PACKAGES = ("torch", "deepspeed", "ray", "triton", "safetensors", "numpy", "mmscale")
OURS = ("mmscale", "mmscale_kernels", "mmscale_launcher")
MIN_CHECKPOINTS = 3  # that the disk should have room for
MAX_SHARDS = 3  # that are read, of each set
# A checkpoint in bytes for each parameter: float32 weights to train, their master copy, those to evaluate, two moments.
CHECKPOINT_BYTES = 20
# On a folder that machines share, whoever builds may be elsewhere; a build takes about a minute.
OLD_LOCK_S = 900.0
SHARED_FILE_SYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "lustre",
    "gpfs",
    "ceph",
    "beegfs",
    "fuse",
    "9p",
    "glusterfs",
    "afs",
)
BUILD_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found. values: the same for scripts; some are compared between machines."""

    check: str
    level: Literal["ok", "warning", "error"]
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examine(config: Config | None, *, num_ranks: int = 1, world_size: int = 1) -> list[Finding]:
    """All checks of this machine, on which num_ranks of world_size ranks would run; the first few without a config."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("versions", versions),
        ("operators", lambda: operators(config)),
    ]
    if config is not None:
        known = config
        checks += [
            ("folder", lambda: folder(known)),
            ("disk", lambda: disk(known)),
            ("memory", lambda: memory(known, num_ranks=num_ranks, world_size=world_size)),
            ("shards", lambda: shards(known)),
        ]
    return [_guarded(name, check) for name, check in checks]


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (UserError, OSError) as error:
        return Finding(check=name, level="error", text=str(error), remedy="put right what it names")


# ------------------------------------------------------------------------------------------------------- versions


def versions() -> Finding:
    """Of Python and of the packages that decide what is computed, and the hash of our own code."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None  # mmscale itself where the launcher brings its code
    found["code"] = code_hash()
    missing = [name for name in PACKAGES[:-1] if found[name] is None and name != "triton"]
    listed = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    return Finding(
        check="versions",
        level="error" if missing else "ok",
        text=f"{', '.join(missing)} not installed; {listed}" if missing else listed,
        remedy=f"pip install {' '.join(missing)}" if missing else "",
        values=found,
    )


@cache
def code_hash() -> str:
    """Of the Python files of our packages as this process finds them; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in OURS:
        spec = importlib.util.find_spec(name)
        for place in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(place).rglob("*.py")):
                digest.update(f"{name}/{path.relative_to(place)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------ operators


def operators(config: Config | None) -> Finding:
    """Removes stale locks of torch's extension builds, then builds the operator that the config needs, if it does."""
    root = _extensions_folder()
    stale, busy = clear_stale_locks()
    cleared = f"removed what killed builds left locked: {', '.join(stale)}" if stale else ""
    values = {"cleared": stale, "building": busy}
    if config is None or config.engine.offload_optimizer == "none":
        text = "none to compile" + (f"; {cleared}" if cleared else "")
        return Finding(check="operators", level="ok", text=text, values=values)
    if "cpu_adam" in busy:
        return Finding(
            check="operators",
            level="warning",
            text=f"another process is building cpu_adam in {root}",
            remedy="ranks will wait until it is done",
            values=values,
        )
    begin = time.perf_counter()
    problem = _build_cpu_adam()
    if problem:
        return Finding(
            check="operators",
            level="error",
            text=f"engine.offload_optimizer needs DeepSpeed's CPU Adam, which can't be built: {problem}",
            remedy="install a C++ compiler and ninja (apt install g++ ninja-build), or give "
            "engine.offload_optimizer=none",
            values=values,
        )
    text = f"cpu_adam is there ({time.perf_counter() - begin:.0f} s)" + (f"; {cleared}" if cleared else "")
    return Finding(check="operators", level="ok", text=text, values=values)


def clear_stale_locks() -> tuple[list[str], list[str]]:
    """Removes what killed builds of torch's extensions left locked; names of those, and of what is being built."""
    root = _extensions_folder()
    stale, busy = [], []
    for lock in sorted(root.glob("*/lock")) if root.is_dir() else []:
        if is_stale(lock):
            lock.unlink(missing_ok=True)
            stale.append(lock.parent.name)
        else:
            busy.append(lock.parent.name)
    return stale, busy


def is_stale(lock: Path) -> bool:
    """Whether the process that made a build's lock is gone.

    torch makes the file, holds it open while it builds, and removes it; every later build waits for that, for ever if
    the builder was killed. On a folder that machines share its age has to decide.
    """
    try:
        status = lock.stat()
    except FileNotFoundError:
        return False
    if _is_open(status):
        return False
    return not _is_shared(lock) or time.time() - status.st_mtime > OLD_LOCK_S


def _is_open(status: os.stat_result) -> bool:
    """Whether a process of this machine has the file open; of those, at least, that we may look into."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                other = descriptor.stat()
                if (other.st_dev, other.st_ino) == (status.st_dev, status.st_ino):
                    return True
        except OSError:
            continue  # it is gone, or another user's
    return False


def _is_shared(path: Path) -> bool:
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else ""
    return kind.startswith(SHARED_FILE_SYSTEMS)


def _extensions_folder() -> Path:
    """Where torch builds extensions, by its own rule."""
    from torch.utils import cpp_extension

    return Path(cpp_extension._get_build_directory("mmscale", verbose=False)).parent


def _build_cpu_adam() -> str:
    """In a process of its own, since DeepSpeed can't be set up twice in one. Returns what went wrong."""
    code = (
        "import torch; from mmscale.engine import cpu_adam; "
        "cpu_adam([{'params': [torch.nn.Parameter(torch.zeros(1))]}], object)"
    )
    command = [sys.executable, "-c", code]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it wasn't done within {BUILD_TIMEOUT_S:.0f} s"
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else ""


# ------------------------------------------------------------------------------------------------- disk and folder


def folder(config: Config) -> Finding:
    """Whether this machine may write where the run will be."""
    from mmscale.runs import run_folder

    place = run_folder(config).absolute()
    there = existing(place)
    if there != place and (obstacle := there / place.relative_to(there).parts[0]).exists():
        raise ConfigError(f"{place} can't be a folder: {obstacle} is a file")
    with tempfile.TemporaryFile(dir=there):
        pass
    return Finding(check="folder", level="ok", text=f"{place} can be written", values={"folder": str(place)})


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def disk(config: Config) -> Finding:
    """Room for three checkpoints where they will be written."""
    from mmscale.runs import checkpoints_of, run_folder

    place = checkpoints_of(config, run_folder(config))
    size = checkpoint_bytes(config)
    values: dict[str, Any] = {"checkpoint_bytes": size}
    if isinstance(place, str):
        return Finding(
            check="disk",
            level="ok",
            text=f"a checkpoint is about {_bytes(size)}; how much {place} takes isn't known",
            values=values,
        )
    free = shutil.disk_usage(existing(place)).free
    enough = free >= MIN_CHECKPOINTS * size
    return Finding(
        check="disk",
        level="ok" if enough else "error",
        text=f"{place}: {_bytes(free)} free, a checkpoint is about {_bytes(size)}"
        + ("" if enough else f", and {MIN_CHECKPOINTS} must fit"),
        remedy=""
        if enough
        else f"make {_bytes(MIN_CHECKPOINTS * size - free)} of room, or give run.checkpoints on another disk",
        values={**values, "free_bytes": free},
    )


@cache
def _num_parameters(model_json: str) -> int:
    import torch

    from mmscale.tasks import model_for

    with torch.device("meta"):  # shapes only
        return sum(p.numel() for p in model_for(Config.from_json(model_json)).parameters())


def num_parameters(config: Config) -> int:
    return _num_parameters(config.to_json())


def checkpoint_bytes(config: Config) -> int:
    return int(num_parameters(config) * CHECKPOINT_BYTES * 1.1)


# --------------------------------------------------------------------------------------------------------- memory


def bytes_of_rank(config: Config, num: int, world_size: int) -> tuple[int, int]:
    """(on the device, on the host) bytes of one rank for `num` parameters: weights, gradients, Adam; no activations.

    ZeRO keeps float32 master weights and two moments in any precision (Rajbhandari et al. 2020, section 3.1), and cuts
    up the optimizer from stage 1, gradients from stage 2, weights from stage 3 on.
    """
    stage, wide = config.engine.zero_stage, config.engine.precision == "fp32"
    share = 1 / world_size
    weights = num * (4 if wide else 2) * (share if stage == 3 else 1)
    gradients = num * (4 if wide else 2) * (share if stage >= 2 else 1)
    master = 0 if wide and stage == 0 else 4 * num
    optimizer = (master + 8 * num) * (share if stage else 1)
    device, host = 0.0, 0.0
    if config.engine.offload_parameters == "none":
        device += weights
    elif config.engine.offload_parameters == "cpu":
        host += weights
    device += gradients
    if config.engine.offload_optimizer == "none":
        device += optimizer
    elif config.engine.offload_optimizer == "cpu":
        host += optimizer
    host += 4 * num  # the model is built whole on the host first
    return int(device), int(host)


def memory(config: Config, *, num_ranks: int, world_size: int) -> Finding:
    """The estimate for each rank against its device, and of all ranks against the machine."""
    import torch

    num = num_parameters(config)
    device, host = bytes_of_rank(config, num, world_size)
    on_cuda = config.run.device != "cpu" and torch.cuda.is_available()
    available = psutil.virtual_memory().available
    problems = []
    if config.run.device == "cuda" and not on_cuda:
        problems.append("run.device=cuda: torch finds no such device here")
    if on_cuda:
        total = min(
            torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count())
        )
        if device > total:
            problems.append(f"{_bytes(device)} for each rank are more than a device's {_bytes(total)}")
        rule = f"{_bytes(device)} a rank of {_bytes(total)} on the device"
    else:
        host += device
        rule = f"{_bytes(host)} a rank"
    if host * num_ranks > available:
        problems.append(
            f"{num_ranks} ranks need {_bytes(host * num_ranks)} of the machine's memory, "
            f"{_bytes(available)} are available"
        )
    text = (
        f"{num:,} parameters, ZeRO-{config.engine.zero_stage}: {rule}; the machine has "
        f"{_bytes(available)}; activations come on top"
    )
    return Finding(
        check="memory",
        level="error" if problems else "ok",
        text="; ".join(problems) or text,
        remedy="a higher engine.zero_stage, more ranks, engine.offload_optimizer=cpu, or a smaller model"
        if problems
        else "",
        values={"parameters": num, "device_bytes": device, "host_bytes": host, "available_bytes": available},
    )


# --------------------------------------------------------------------------------------------------------- shards


def shards(config: Config) -> Finding:
    """A few random shards of each set: there, indexed, and the last sample of each can be read."""
    from mmscale.data.index import load_index, make_index
    from mmscale.data.manifest import expand
    from mmscale.data.storage import shown
    from mmscale.errors import DataError
    from mmscale.pipeline import make_storage

    storage = make_storage(config.data.storage)
    problems, missing, num_read, num_all = [], [], 0, 0
    for setting, urls in _sets(config):
        try:
            found = expand(urls, storage=storage)
            if not found:
                raise DataError("there are no shards")
            num_all += len(found)
            for url in random.sample(found, min(MAX_SHARDS, len(found))):
                index, reason = load_index(url, storage=storage)
                if index is None:
                    missing.append(f"{shown(url)} ({reason})")
                    if len(missing) > 1:
                        continue  # one is enough to see whether they can be
                    index = make_index(url, storage=storage)
                if len(index):
                    file = storage.open(url)
                    try:
                        for offset, size in index.record(len(index) - 1).values():
                            file.read(offset, size)
                    finally:
                        file.close()
                num_read += 1
        except ConfigError:
            raise
        except (DataError, OSError, ValueError) as error:
            problems.append(f"{setting}: {error}")
    values = {"shards": num_all, "read": num_read, "not_indexed": len(missing)}
    if problems:
        return Finding(
            check="shards",
            level="error",
            text="; ".join(problems),
            remedy="give data.train and data.evals as paths that this machine sees, absolute ones or URLs; "
            "`mmscale data check` looks at whole shards",
            values=values,
        )
    if missing:
        return Finding(
            check="shards",
            level="warning",
            text=f"not indexed: {', '.join(missing[:2])}" + (" and more" if len(missing) > 2 else ""),
            remedy="`mmscale data index SHARDS` once, else each start reads them whole",
            values=values,
        )
    return Finding(
        check="shards",
        level="ok",
        text=f"read from {num_read} of {num_all} shards, all indexed",
        values=values,
    )


def _sets(config: Config) -> Iterator[tuple[str, Any]]:
    train = config.data.train
    if isinstance(train, Mapping):
        yield from ((f"data.train.{name}", urls) for name, urls in train.items())
    else:
        yield "data.train", train
    yield from ((f"data.evals.{name}", urls) for name, urls in config.data.evals.items())


# -------------------------------------------------------------------------------------------------------- network


def interface_for(address: str) -> str | None:
    """The network interface by which this machine reaches an address or host name; None if there is no route."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of datagrams: chooses the route, sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.family == family and one.address.partition("%")[0] == own for one in addresses):
            return name
    return None


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
