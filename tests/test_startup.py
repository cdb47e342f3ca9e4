"""What a rank imports before its first step: torch's compiler alone takes seconds of CPU time, and isn't used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys
from pathlib import Path

from tiny_run import run_config
from mmscale.errors import Preempted
from mmscale.train import train

def interrupt(event):
    if event["event"] == "log":
        os.kill(os.getpid(), signal.SIGTERM)

config = run_config(Path(sys.argv[1]), f"run.dir={sys.argv[2]}", "run.resume=auto", *sys.argv[3:])
try:
    train(config, interrupt)
except Preempted as error:
    print(error)
train(config)
assert "resumed at step" in Path(sys.argv[2], "logs/rank-0.log").read_text()
assert "torch._dynamo" not in sys.modules, "torch's compiler was imported"
assert "torch._inductor" not in sys.modules, "torch's compiler was imported"

# and with it, the operators are as they were
import torch
from mmscale_kernels import contrastive_loss

x, y, scale = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8), torch.tensor(2.0)
loss = torch.compile(contrastive_loss, backend="aot_eager", fullgraph=True)(x, y, scale)
assert torch.equal(loss, contrastive_loss(x, y, scale))
assert "torch._dynamo" in sys.modules
"""


@pytest.mark.parametrize("stage", [0, 2])  # of ZeRO; stage 3 compiles for itself
def test_training_does_not_import_the_compiler(stage: int, scene_shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, scene_shards, tmp_path / "run", f"engine.zero_stage={stage}"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
