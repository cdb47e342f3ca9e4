"""Failures that come again at each start: a bug of the user's, want of memory, a sample that can't be read."""

from __future__ import annotations

import shutil
import tarfile
import time
from pathlib import Path

import pytest
from harness import SCALE, Launched, Nodes, last_step, record
from user_code import FAULTY_STEP

pytestmark = [pytest.mark.chaos, pytest.mark.distributed, pytest.mark.timeout(300)]

OVERRIDES = ("train.duration=30", "train.save_every=3")
ATTEMPTS = 2  # the gate
MEMORY = ["with_much_memory"] if SCALE == "ci" else ["with_much_memory", "with_a_long_list"]


@pytest.mark.parametrize(("worker", "code"), [("with_a_bug", 10), *((name, 13) for name in MEMORY)])
def test_it_stops_after_two_attempts(
    worker: str, code: int, scene_shards: Path, tmp_path: Path, shared_cluster: Nodes
) -> None:
    begin = time.monotonic()
    with Launched(
        tmp_path,
        scene_shards,
        "buggy",
        *OVERRIDES,
        address=shared_cluster.address,
        nodes=2,
        workers=1,
        worker=f"user_code:{worker}",
    ) as launched:
        found, told = launched.finish(120)
    record(
        "deterministic bug" if worker == "with_a_bug" else "out of memory (RLIMIT_AS)",
        worker=worker,
        code=found,
        attempts=launched.starts(),
        seconds=time.monotonic() - begin,
    )
    assert found == code, told
    assert launched.starts() == ATTEMPTS
    assert last_step(launched.run) == FAULTY_STEP - 1
    # rank 1's traceback, once, with the line that is wrong
    assert told.count("Traceback (most recent call last)") == 1
    assert "rank 1" in told
    assert told.count("in objective_of_mine") == 1
    if worker == "with_a_bug":
        assert f"KeyError: {FAULTY_STEP}" in told


def test_a_sample_that_cannot_be_read_is_final(
    scene_shards: Path, tmp_path: Path, shared_cluster: Nodes
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(scene_shards, shards)
    broken = break_sample(next((shards / "train").glob("*.tar")), number=40)
    with Launched(
        tmp_path, shards, "torn", *OVERRIDES, address=shared_cluster.address, nodes=2, workers=1
    ) as launched:
        code, told = launched.finish(120)
    record("sample that can't be read", code=code, attempts=launched.starts())
    assert code == 3, told
    assert launched.starts() == 1
    assert "Traceback" not in told
    assert broken in told.splitlines()[-1]
    assert "restarting" not in told


def break_sample(shard: Path, *, number: int) -> str:
    """Cuts a picture of a shard short, in a tar that is whole otherwise; returns the sample's key."""
    whole = shard.with_suffix(".whole")
    shard.rename(whole)
    for index in shard.parent.glob(f"{shard.name}.index*"):
        index.unlink()
    with tarfile.open(whole) as source, tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as target:
        pictures = [member.name for member in source if member.name.endswith(".jpg")]
        for member in source.getmembers():
            if member.name == pictures[number]:
                member.size //= 3
            target.addfile(member, source.extractfile(member.name))
    whole.unlink()
    return Path(pictures[number]).stem
