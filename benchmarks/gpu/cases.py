"""All cases in the order of their importance: what a budget cuts off is at the end.

Their names are known without torch, which the supervisor of a run doesn't import.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# What runs a case, and the seconds that it needs at least.
Runnable = tuple[Callable[[Any, Any], None], float]


def _timed(name: str, seconds: float, module: str, *args: Any, **sizes: Any) -> tuple[str, Runnable]:
    def run(setting: Any, emit: Any) -> None:
        case = importlib.import_module(f"gpu.{module}").case(name, *args, **sizes)
        importlib.import_module("gpu.harness").run_case(setting, case, emit)

    return name, (run, seconds)


def _check(name: str, seconds: float, module: str, function: str) -> tuple[str, Runnable]:
    return name, (lambda *given: getattr(importlib.import_module(f"gpu.{module}"), function)(*given), seconds)


def _loss(kind: str, n: int, d: int, seconds: float) -> tuple[str, Runnable]:
    return _timed(f"{kind} n{n} d{d}", seconds, "losses", kind, n, d)


def _attend(name: str, seconds: float = 20.0, **sizes: Any) -> tuple[str, Runnable]:
    return _timed(name, seconds, "attention", **{"h": 16, "d": 64, **sizes})


FOUR = [512, 257, 128, 77]


def all_cases() -> dict[str, Runnable]:
    return dict(
        [
            _check("ceilings", 5, "checks", "ceilings"),
            _loss("sigmoid", 65_536, 768, 25),
            _loss("softmax", 65_536, 768, 30),
            _attend(
                "lengths half full q2048 k2048 d64", 30, b=16, lq=2048, lk=[2048], lengths=True, packed=True
            ),
            _attend("short keys q1344 k77 d64", b=32, lq=1344, lk=[77]),
            _attend("sources 2 q1024 k256+1024 d64", b=16, lq=1024, lk=[256, 1024]),
            _attend("bias with gradient q1024 k1024 d64", b=8, lq=1024, lk=[1024], bias=True),
            _attend("long keys q4096 k4096 d64", b=4, lq=4096, lk=[4096], deterministic=True, flash3=True),
            _check("check: no synchronisation", 15, "checks", "no_sync"),
            _check("check: CUDA graph", 15, "checks", "graphs"),
            _check("check: exact at scale 100", 10, "checks", "exact_at_any_scale"),
            _loss("softmax", 16_384, 768, 15),
            _attend("long keys q4096 k4096 d128", b=4, d=128, lq=4096, lk=[4096], flash3=True),
            _attend("sources 4 with lengths q1024 d64", 25, b=16, lq=1024, lk=FOUR, lengths=True),
            _check("check: large softmax", 45, "checks", "large_softmax"),
            _check("check: determinism", 40, "checks", "determinism"),
            _attend("short keys q4096 k257 d64", b=16, lq=4096, lk=[257]),
            _loss("softmax", 32_768, 768, 20),
            _loss("softmax", 8_192, 768, 12),
            _timed("packed trunk b32 t530 d64", 15, "trunk"),
            _timed("deformable b8 q5440 d32", 15, "sampling"),
            _attend("sources 4 q1024 d64", b=16, lq=1024, lk=FOUR),
            _attend("long keys q16384 k16384 d64", b=1, lq=16_384, lk=[16_384], flash3=True),
            _attend("long keys q16384 k16384 d128", b=1, d=128, lq=16_384, lk=[16_384], flash3=True),
            _attend("causal q4096 k4096 d64", b=4, lq=4096, lk=[4096], causal=True, flash3=True),
            _attend("short keys q1344 k257 d64", b=32, lq=1344, lk=[257]),
            _attend("short keys q4096 k77 d64", b=16, lq=4096, lk=[77]),
            _loss("sigmoid", 16_384, 768, 12),
            _loss("softmax", 65_536, 512, 25),
        ]
    )
