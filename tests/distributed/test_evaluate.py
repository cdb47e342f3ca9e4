"""Scores don't depend on how many ranks share an evaluation, or on how the model is sharded meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import start_ranks
from tiny_run import run_config

from mmscale.checkpoint import load_model
from mmscale.config import load_config
from mmscale.evals.evaluate import evaluate
from mmscale.tasks import TASKS
from mmscale.train import train
from mmscale.world import close_world, init_world

pytestmark = pytest.mark.distributed


def train_file(path: str) -> None:
    train(load_config(path))


def test_scores_under_zero_3_on_two_ranks_are_those_of_one_process(
    scene_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = run_config(scene_shards, f"run.dir={run}", "engine.zero_stage=3", "train.duration=4")
    (tmp_path / "config.json").write_text(config.to_json())
    processes = start_ranks(2, train_file, str(tmp_path / "config.json"))
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    scored = json.loads((run / "report.json").read_text())["evaluations"][-1]
    assert scored["step"] == 4

    model, config = load_model(run)
    world = init_world(device="cpu", threads=1)
    try:
        tasks = {name: TASKS[name]() for name in config.tasks}
        shards = config.data.evals[scored["set"]]
        found = evaluate(model, model, tasks, shards, config=config, world=world)
    finally:
        close_world()
    assert found.keys() == scored["tasks"].keys()
    for task, metrics in found.items():
        for name, metric in metrics.items():
            # Ranks and padding change the order of float32 sums, by some 1e-7; no retrieval's rank hangs on that here.
            assert metric.value == pytest.approx(scored["tasks"][task][name]["value"], rel=1e-5), (task, name)
