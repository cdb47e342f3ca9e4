"""For tests of Triton kernels under Triton's interpreter, which need a process of their own.

Triton decides at its first import whether it interprets, for good, and other tests need it otherwise. So a file of such
tests has two halves: without TRITON_INTERPRET=1 a test that calls `run(__file__)`, with it the tests themselves. What
they share is here; a file that imports `poisoned_memory` has all its tests run with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run(file: str, tier: str = "not slow") -> None:
    """Run a file's tests of a tier (a marker expression) under the interpreter; fails with what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", tier, file]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What a kernel forgets to write is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
