"""Launch configurations of the Triton kernels: block sizes, warps and pipeline stages, from shipped tables.

One JSON file a family of kernels lies in `tables/`. It holds, for each kernel and shape class, the candidates that a
tuner may pick from, and the choice for each device it was tuned on::

    {"attention_forward": {"half d64": {"candidates": [{"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 3}, ...],
                                        "default": {...}, "sm_90": {...}, "interpreter": {...}}}}

Nothing is timed while a program runs: the order of sums follows from the block sizes, so a choice by stopwatch would
change results from one start to the next. `record()` says what this process has used, for a run's report and its
checkpoints, and `mmscale_kernels.tune` writes the tables anew on a device.

The trade-off: a device without a column of its own gets the default, which may be some percent slower than the best.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Any

import torch

FAMILIES = ("attention", "losses", "deformable")
INTERPRETER = "interpreter"

Config = dict[str, Any]

_used: dict[tuple[str, str, str], Config] = {}
_device_override: str | None = None
_choice_override: dict[tuple[str, str], Config] = {}


@functools.cache
def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    architecture = getattr(properties, "gcnArchName", None)  # ROCm alone has it
    return architecture.split(":")[0] if architecture else f"sm_{properties.major}{properties.minor}"


def device_key(device: torch.device) -> str:
    """The column of the tables for a device: "sm_90", "gfx942", or "interpreter" for the CPU."""
    return _device_override or _device_name(device)


@functools.cache
def table(family: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The shipped table of a family of kernels: kernel -> shape class -> candidates, default and devices."""
    text = resources.files(__package__).joinpath("tables", f"{family}.json").read_text(encoding="utf-8")
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
    return loaded


@functools.cache
def _tables() -> dict[str, dict[str, dict[str, Any]]]:
    return {kernel: classes for family in FAMILIES for kernel, classes in table(family).items()}


def choose(kernel: str, shape_class: str, device: torch.device) -> Config:
    """The configuration of a kernel for a shape class on a device. KeyError if the tables don't have it."""
    key = device_key(device)
    entry = _tables()[kernel][shape_class]
    chosen = _choice_override.get((kernel, shape_class)) or entry.get(key, entry["default"])
    _used[kernel, shape_class, key] = chosen
    return dict(chosen)


def fingerprint() -> str:
    """A short hash of all tables: equal fingerprints on equal devices mean equal block sizes."""
    return hashlib.sha256(json.dumps(_tables(), sort_keys=True).encode()).hexdigest()[:16]


def record(device: torch.device) -> dict[str, Any]:
    """What decides the order of sums on this device: the tables' hash, and the configurations used by now."""
    return {
        "tables": fingerprint(),
        "device": device_key(device) if device.type == "cuda" else device.type,
        "used": {" / ".join(key): config for key, config in sorted(_used.items())},
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """In words, why results may differ in their last bits between two records; None if they need not."""
    if before["device"] != now["device"]:
        return f"kernels ran on {before['device']} before and run on {now['device']} now"
    if before["tables"] != now["tables"]:
        return f"the kernels' tables of configurations were {before['tables']} before and are {now['tables']} now"
    return None


@contextmanager
def override(
    *, device: str | None = None, choices: Mapping[tuple[str, str], Config] | None = None
) -> Iterator[None]:
    """Pretend to be another device, or take other choices for (kernel, shape class): for tuning and compile tests."""
    global _device_override, _choice_override
    before = _device_override, _choice_override
    _device_override, _choice_override = device or _device_override, {**_choice_override, **(choices or {})}
    try:
        yield
    finally:
        _device_override, _choice_override = before
