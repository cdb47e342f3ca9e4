"""`mmscale launch quickstart` in its smallest form, through real Ray and DeepSpeed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = [
    "data.batch_size=8",
    "model.width=32",
    "model.depth=1",
    "model.num_heads=2",
    "evals.batch_size=8",
    "evals.num_generated=4",
    "train.log_every=2",
]


@pytest.mark.distributed
def test_launch_quickstart(scene_shards: Path, tmp_path: Path):
    (tmp_path / "demo-data").symlink_to(scene_shards)
    mmscale = Path(sys.executable).with_name("mmscale")
    done = subprocess.run(
        [str(mmscale), "launch", "quickstart", "train.duration=6", *SMALL, "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    run = tmp_path / "runs" / "quickstart"
    assert report["step"] == 6
    assert report["world_size"] == 2
    assert json.loads((run / "report.json").read_text())["samples"] == 48
    assert {entry["step"] for entry in report["evaluations"]} == {0, 6}
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        2,
        4,
        6,
    ]
    assert sorted(p.name for p in (run / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert (run / "checkpoints" / "step-00000006" / "model.safetensors").is_file()
    for word in ("samples/s", "data wait", "ETA"):
        assert word in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_ray_and_torchrun_compute_the_same_bit_for_bit(scene_shards: Path, tmp_path: Path):
    (tmp_path / "demo-data").symlink_to(scene_shards)
    bin_folder = Path(sys.executable).parent
    train = ["quickstart", *SMALL, "train.duration=20", "train.log_every=1", "data.evals={}"]
    torchrun = [f"{bin_folder}/torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"]
    for command in (
        [f"{bin_folder}/mmscale", "launch", *train, "run.name=ray"],
        [*torchrun, f"{bin_folder}/mmscale", "train", *train, "run.name=torchrun"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / "runs" / name / "metrics.jsonl").open()]
        for name in ("ray", "torchrun")
    ]
    assert len(losses[0]) == 20
    assert losses[0] == losses[1]
