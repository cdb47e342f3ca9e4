"""Every operator as a training step meets it: same bits, in a CUDA graph, without waiting for the device.

The steps are those of the benchmark's checks, which do the same at length (benchmarks/gpu/checks.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import checks
from gpu.harness import Setting
from on_device import DEVICE, device_only, needs_device

pytestmark = needs_device


@pytest.mark.parametrize(
    "check",
    [
        "determinism",
        "exact_at_any_scale",
        pytest.param("graphs", marks=device_only),
        pytest.param("no_sync", marks=device_only),
    ],
)
def test_every_operator(check: str) -> None:
    lines: list[dict[str, Any]] = []
    setting = Setting(torch.device(DEVICE), smoke=True)
    getattr(checks, check)(setting, lambda kind, **fields: lines.append({"kind": kind, **fields}))
    assert len(lines) >= 2
    assert all(line["kind"] == "check" for line in lines)
    assert not [line for line in lines if not line["passed"]]
