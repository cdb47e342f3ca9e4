"""For a machine on which nothing of ours is installed: makes the kernels importable, and shares the tests out.

MMSCALE_GPU_TESTS_SHARD=K/N keeps every N-th test, from the K-th: on a GPU most of the time is compiling, which several
processes do at once.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "benchmarks")]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard = os.environ.get("MMSCALE_GPU_TESTS_SHARD")
    if not shard:
        return
    number, count = (int(part) for part in shard.split("/"))
    mine = items[number::count]
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % count != number])
    items[:] = mine
