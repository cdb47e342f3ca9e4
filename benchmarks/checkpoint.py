"""What a save costs training: held and written, beside a step and DeepSpeed's own save, in one run on one process.

    python benchmarks/checkpoint.py --data demo-data        # made by `mmscale data demo demo-data`; about 2 minutes

The quickstart's model trains on its own data. In turn, so that whatever else the machine does falls on all alike: steps
alone, `Saver.start` and the steps behind it while the checkpoint is written, and `save_checkpoint` of DeepSpeed, which
holds training until its files are written (without fsync, digests or verification). Writes
`benchmarks/results/checkpoint.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cpu_attention import ceilings, processor

from mmscale.data.batch import to_device
from mmscale.engine import Engine
from mmscale.pipeline import drop_complete, micro_batches, open_run_data
from mmscale.recipes import get
from mmscale.saver import Saver
from mmscale.tasks import TASKS, schedule
from mmscale.world import close_world, init_world

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"


def quantiles(values: list[float]) -> dict[str, float]:
    found = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return dict(zip(("p20", "p50", "p80"), (round(1e3 * x, 2) for x in found), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("demo-data"))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    config = get("quickstart").override(
        f"data.train={options.data / 'train'}",
        "data.evals={}",
        f"model.text.tokenizer={options.data / 'tokenizer.json'}",
        "run.device=cpu",
        f"run.threads={options.threads}",
    )
    load = [round(x, 2) for x in os.getloadavg()]
    world = init_world(device="cpu", threads=options.threads)
    tasks = {name: TASKS[name]() for name, weight in config.tasks.items() if weight > 0}
    model, stream = open_run_data(config, tasks, world, None)
    engine = Engine(
        model,
        config=config.engine,
        optim=config.optim,
        world=world,
        micro_batch=config.data.batch_size // config.train.accumulation,
        accumulation=config.train.accumulation,
    )
    engine.set_learning_rate(config.optim.lr)
    batches, step = iter(stream), 0

    def train_step() -> float:
        nonlocal step
        batch, task = next(batches), tasks[schedule(config.tasks, step)]
        parts = [
            to_device(drop_complete(part), world.device)
            for part in micro_batches(task, batch.tensors, config.train.accumulation)
        ]
        weight = 1.0 if task.coupled else sum(task.weight(part) for part in parts)
        begin = time.perf_counter()
        engine.train_step(task, parts, weight=weight)
        step += 1
        return time.perf_counter() - begin

    times: dict[str, list[float]] = {name: [] for name in ("step", "held", "step_behind", "written", "dense")}
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        events: list[dict[str, Any]] = []
        saver = Saver(engine, Path(folder) / "ours", config=config, on_event=events.append)
        for _ in range(3):
            train_step()
        saver.save(step, {})  # warm: the buffers are made
        for _ in range(options.repeats):
            times["step"] += [train_step() for _ in range(4)]
            times["held"].append(saver.start(step, {}))
            while saver.poll() is None:
                times["step_behind"].append(train_step())
            saver.wait()
            times["written"].append(events[-1]["write_s"])
            dense = Path(folder) / "dense"
            begin = time.perf_counter()
            engine.deepspeed.save_checkpoint(str(dense), tag="x")
            times["dense"].append(time.perf_counter() - begin)
            shutil.rmtree(dense)
        num_bytes = events[-1]["bytes"]
    stream.close()
    close_world()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    rows = {f"{name}_ms": quantiles(values) for name, values in times.items()}
    report = {
        "what": "ms; step: forward to optimizer; held: Saver.start; step_behind: a step while a checkpoint is written; "
        "written: until it is committed; dense: DeepSpeed's save_checkpoint, which holds training all the time",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "threads": options.threads,
        "load_average_before": load,
        "commit": commit,
        "config": config.model_dump(mode="json"),
        "repeats": options.repeats,
        "warm_up": "3 steps and a save",
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "bytes": num_bytes,
        "ceilings": ceilings(),
        "rows": rows,
        "held_of_a_step": round(rows["held_ms"]["p50"] / rows["step_ms"]["p50"], 4),
        "dense_of_a_step": round(rows["dense_ms"]["p50"] / rows["step_ms"]["p50"], 4),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, row in rows.items():
        print(f"{name:16} {row}")
    print(f"held {report['held_of_a_step']:.1%} of a step, dense {report['dense_of_a_step']:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
