"""Plain Ray Train under the faults of docs/reliability.md: TorchTrainer around mmscale's own `train`, two workers.

    python benchmarks/peers/run_ray_train.py [kill node sleep bug]      # a line of JSON for each fault; minutes

Everything but the launcher is the same: the worker function, the checkpoints, the model, the three nodes of
tests/chaos/harness.py with their health checks, as many restarts allowed (10). Ray Train's settings are its defaults.
It needs pandas, which mmscale doesn't. Reported is what an outsider sees: seconds from the fault to the next attempt's
first step, steps done again, and whether the run came to its end exactly.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]

import harness  # noqa: E402

STEPS = ("train.duration=60", "train.save_every=10")
PATIENCE_S = 150.0  # after which a fault counts as unnoticed
ASLEEP_S = 60.0  # how long a stopped rank is watched


def worker(options: dict[str, Any]) -> None:
    """Runs in each of Ray Train's workers, which have joined a process group of torch's."""
    from mmscale.recipes import get

    os.environ["MMSCALE_HEARTBEAT"] = f"{options['folder']}/beat-{os.environ['RANK']}"
    os.environ["DS_ACCELERATOR"] = "cpu"
    if os.environ["RANK"] == "0":
        with Path(options["folder"], "attempts").open("a") as file:
            file.write("begun\n")
    if options["bug"]:
        from user_code import with_a_bug as train
    else:
        from mmscale.train import train
    train(get("quickstart").override(*options["overrides"]))


def driver(address: str, options: dict[str, Any]) -> None:
    """What a user of Ray Train writes."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(
        address=address,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}},
    )
    TorchTrainer(
        worker,
        train_loop_config=options,
        torch_config=TorchConfig("gloo"),
        scaling_config=ScalingConfig(num_workers=2, placement_strategy="SPREAD"),
        run_config=RunConfig(
            name="peer",
            storage_path=f"{options['folder']}/ray-train",
            failure_config=FailureConfig(max_failures=10),
        ),
    ).fit()


class Trained:
    """A driver in a process of its own, and the run that its workers write."""

    def __init__(self, folder: Path, shards: Path, address: str, *, bug: bool = False) -> None:
        self.folder, self.run = folder, folder / "run"
        overrides = [
            *harness.SMALL,
            *STEPS,
            f"run.dir={self.run}",
            f"data.train={shards}/train",
            f"model.text.tokenizer={shards}/tokenizer.json",
        ]
        options = {"folder": str(folder), "overrides": overrides, "bug": bug}
        paths = [*sys.path[:2], os.environ.get("PYTHONPATH", "")]
        self.output = folder / "output"
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--driver", address, json.dumps(options)],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pid(self, rank: int) -> int:
        beat = harness.heartbeat.read(self.folder / f"beat-{rank}")
        assert beat is not None
        return beat.pid

    def starts(self) -> int:
        path = self.folder / "attempts"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait(self, condition: Callable[[], object], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.02)
        return bool(condition())

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def disturb(fault: str, shards: Path, expected: harness.Trace) -> dict[str, Any]:
    """Makes one fault happen, on a cluster of its own, and says what followed."""
    with (
        harness.cluster() as nodes,
        tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder,
    ):
        trained = Trained(Path(folder), shards, nodes.address, bug=fault == "bug")
        try:
            if fault == "bug":
                begin = time.monotonic()
                trained.wait(lambda: False, PATIENCE_S)
                ended = trained.process.poll()
                seconds = time.monotonic() - begin
                how = (
                    f"ended after {seconds:.0f} s"
                    if ended is not None
                    else f"still at it after {seconds:.0f} s"
                )
                return {
                    "fault": "deterministic bug",
                    "attempts": trained.starts(),
                    "text": f"{trained.starts()} attempts, {how}",
                }
            if not trained.wait(lambda: harness.last_step(trained.run) >= 25, PATIENCE_S):
                raise SystemExit(f"Ray Train didn't get to step 25:\n{trained.output.read_text()[-4000:]}")
            metrics = trained.run / "metrics.jsonl"
            mark, pid = metrics.stat().st_ino, trained.pid(1)
            if fault == "node":
                nodes.remove_node(nodes.node_of(pid))
            else:
                os.kill(pid, signal.SIGSTOP if fault == "sleep" else signal.SIGKILL)
            begin, done = time.monotonic(), [harness.last_step(trained.run)]
            limit = ASLEEP_S if fault == "sleep" else PATIENCE_S

            def goes_on() -> bool:
                step = harness.last_step(trained.run)
                if metrics.stat().st_ino == mark:  # a fault may take a moment to arrive
                    done.append(step)
                    return False
                return step % 10 >= 1

            first = trained.wait(goes_on, limit)
            seconds, at = time.monotonic() - begin, harness.last_step(trained.run)
            names = {"kill": "kill -9 of a rank", "node": "a node lost", "sleep": "a rank stopped (SIGSTOP)"}
            if not first:
                os.kill(pid, signal.SIGCONT) if fault == "sleep" else None
                return {"fault": names[fault], "seconds": None, "text": f"not noticed within {limit:.0f} s"}
            trained.wait(lambda: trained.process.poll() is not None, PATIENCE_S)
            exact = harness.trace(trained.run) == expected
            lost = max(done) - (at - 1)
            return {
                "fault": names[fault],
                "seconds": seconds,
                "lost_steps": lost,
                "exact": exact,
                "text": f"first step after {seconds:.1f} s, {lost} steps done again, "
                f"{'exact' if exact else 'NOT exact'} at the end",
            }
        finally:
            trained.end()


def main(faults: list[str]) -> None:
    from mmscale.data.scenes import make_scenes

    with tempfile.TemporaryDirectory(prefix="peer-shards-") as folder:
        shards = Path(folder) / "scenes"
        make_scenes(shards, num_samples=64)
        plain = harness.plain_run(shards, *STEPS, world_size=2)
        for fault in faults:
            told = disturb(fault, shards, plain.trace)
            print(json.dumps({**told, "start_s": plain.start_s}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--driver"]:
        driver(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main(sys.argv[1:] or ["kill", "node", "sleep", "bug"])
