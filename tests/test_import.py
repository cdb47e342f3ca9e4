"""What importing the package needs, and what it must not shadow."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code: str, **options: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, **options)


def test_imports_and_computes_without_triton() -> None:
    run(
        """
import sys

sys.modules["triton"] = None  # as if it were not installed
import torch
import mmscale_kernels
x = torch.eye(3)
assert mmscale_kernels.contrastive_loss(x, x, torch.tensor(1.0)) > 0
try:
    mmscale_kernels.contrastive_loss(x, x, torch.tensor(1.0), backend="triton")
except ValueError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("ran without triton")
"""
    )


def test_import_is_quick() -> None:
    """Neither triton nor torch's compiler, which cost seconds, are imported before they are used."""
    run(
        """
import sys
import mmscale_kernels
heavy = [name for name in ("triton", "torch._dynamo", "torch._inductor") if name in sys.modules]
assert not heavy, heavy
"""
    )


def test_nothing_importable_is_called_kernels() -> None:
    """transformers probes for a package of that name; a folder without __init__.py does no harm."""
    for folder in ("kernels", "launcher"):
        assert not (ROOT / folder / "__init__.py").exists()
    run("import transformers.integrations.hub_kernels", cwd=str(ROOT))
