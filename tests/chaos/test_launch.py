"""The launcher when ranks, drivers and nodes die. Afterwards nothing of it may run, and no folder be left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from mmscale_launcher import RankFailed, launch, processes
from ray.cluster_utils import Cluster

from mmscale.config import Config, DataConfig, FieldConfig, LaunchConfig, ModelConfig, RunConfig, TextConfig

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed]
TESTS = Path(__file__).parents[1]


def make_config(folder: Path, **options: Any) -> Config:
    return Config(
        run=RunConfig(name="test", dir=str(folder), device="cpu"),
        data=DataConfig(train="none", fields={"text": FieldConfig(source="txt", modality="text")}),
        model=ModelConfig(text=TextConfig(tokenizer="none")),
        tasks={"none": 1.0},
        launch=LaunchConfig(**({"preflight": False, "max_restarts": 3} | options)),
    )


def marked() -> list[int]:
    """Processes of a local Ray, whose mark no process of Ray's can lose."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    name = f"{processes.MARK}=".encode()
    return [
        pid
        for pid in pids
        if processes._is_alive(pid) and any(entry.startswith(name) for entry in processes._environment(pid))
    ]


def running(folder: Path) -> list[str]:
    """The ranks, and their children, that left their process id in a folder and still run."""
    files = [*folder.glob("attempt-*"), *folder.glob("child-*")]
    return [path.name for path in files if processes._is_alive(int(path.read_text()))]


def wait_for(condition: Any, *, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(TESTS))
    # short, for the sake of Ray's sockets, and a folder of our own, to see that it is empty again
    with tempfile.TemporaryDirectory(prefix="mm-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        before = set(marked())
        yield
        assert set(marked()) <= before
        assert running(tmp_path) == []
        assert [path.name for path in Path(folder).glob("mmscale-*")] == []


def test_a_killed_rank_costs_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "203.0.113.1:6379")  # nobody is there; a local Ray must not ask
    events: list[dict[str, Any]] = []
    config = make_config(tmp_path, workers_per_node=2)
    mode = os.environ.get("RAY_AUTH_MODE")
    report = launch(config, on_event=events.append, _worker="fake_worker:killed_once")
    assert os.environ.get("RAY_AUTH_MODE") == mode
    assert report == {"attempt": 2}
    told = [event["text"] for event in events if event["event"] == "message"]
    assert len(told) == 1
    assert told[0].startswith("rank 1 on node ")  # not rank 0, which lost its peer
    assert "killed" in told[0]
    assert "about to be killed" in told[0]
    assert "restarting, attempt 2 (restart 1 of 3)" in told[0]
    steps = [(event["attempt"], event["step"], event["time"]) for event in events if event["event"] == "log"]
    assert [step[:2] for step in steps] == [(1, n) for n in range(5)] + [(2, n) for n in range(20)]
    lost = steps[5][2] - steps[4][2]
    assert lost < 30  # 3.6 s measured, most of it importing torch; the rest is for a busy machine


def test_a_rank_stuck_in_a_collective_is_ended_with_its_children(tmp_path: Path) -> None:
    left_at_restart: list[str] = ["nobody looked"]

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "ranks":
            return
        assert event["event"] == "message"
        left_at_restart[:] = running(tmp_path)

    with pytest.raises(RankFailed) as caught:
        launch(make_config(tmp_path, workers_per_node=2), on_event=on_event, _worker="fake_worker:stuck")
    assert left_at_restart == []
    message = str(caught.value)
    assert message.count("Traceback") == 1
    assert "rank 1 on node" in message
    assert "ZeroDivisionError: a bug of the model" in message
    assert len(list(tmp_path.glob("child-*"))) == 4  # two attempts of two ranks


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from chaos.test_launch import make_config
from mmscale_launcher import launch
def on_event(event):
    if event["event"] != "ranks":
        print(event["event"], flush=True)
if __name__ == "__main__":
    launch(make_config(Path({folder!r}), workers_per_node=2), on_event=on_event, _worker="fake_worker:asleep")
"""


@pytest.mark.parametrize(
    ("number", "whole_group", "seconds"),
    [
        (signal.SIGINT, True, 15),  # Ctrl-C in a terminal
        (signal.SIGTERM, False, 15),  # a scheduler
        (signal.SIGTERM, True, 40),  # an unkind one, that ends Ray under our feet; 17 s until we give it up
        (signal.SIGKILL, False, 30),
    ],
)
def test_a_driver_that_is_stopped_leaves_nothing(
    tmp_path: Path, number: signal.Signals, whole_group: bool, seconds: int
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(tests=str(TESTS), folder=str(tmp_path / "run")))
    before = set(marked())
    driver = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "start\n"
        wait_for(lambda: len(running(tmp_path / "run")) == 2, timeout=20)
        assert set(marked()) > before
        if whole_group:
            os.killpg(driver.pid, number)
        else:
            driver.send_signal(number)
        _, errors = driver.communicate(timeout=seconds)
        if number != signal.SIGKILL:
            assert driver.returncode in (130, -signal.SIGINT)  # how Python ends on KeyboardInterrupt
            assert errors.strip().endswith("KeyboardInterrupt")
        wait_for(lambda: not running(tmp_path / "run") and set(marked()) <= before, timeout=seconds)
    finally:
        driver.kill()
        driver.wait()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes with 2 CPUs each, on this machine, with a folder of Ray's own."""
    with tempfile.TemporaryDirectory(prefix="mr-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # as a local Ray before it has made it for this process
        Path(folder, "ray").mkdir()
        options = {"num_cpus": 2, "object_store_memory": 100_000_000, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args={**options, "num_cpus": 0})
        for _ in range(3):
            cluster.add_node(**{name: options[name] for name in ("num_cpus", "object_store_memory")})
        cluster.wait_for_nodes()
        try:
            yield cluster
        finally:
            cluster.shutdown()


def test_ranks_are_ordered_by_node_and_outlive_one(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "places", nodes=2, workers_per_node=2)
    launch(config, address=cluster.address, _worker="fake_worker:environment")
    assert not ray.is_initialized()
    ranks = [json.loads((tmp_path / f"places/report-{rank}.json").read_text()) for rank in range(4)]
    assert [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1", "0", "1"]
    assert {rank["WORLD_SIZE"] for rank in ranks} == {"4"}
    assert {rank["LOCAL_WORLD_SIZE"] for rank in ranks} == {"2"}
    nodes = [rank["node"] for rank in ranks]
    assert nodes[0] == nodes[1] != nodes[2] == nodes[3]

    # a node goes, with the ranks on it; the third one takes its place
    events: list[dict[str, Any]] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "ranks":
            return
        events.append(event)
        if [e["event"] for e in events] == ["start"]:
            node = next(n for n in cluster.worker_nodes if n.node_id == event["node"])
            cluster.remove_node(node, allow_graceful=False)

    config = make_config(tmp_path / "loss", nodes=2, workers_per_node=1)
    report = launch(config, address=cluster.address, on_event=on_event, _worker="fake_worker:until_node_lost")
    assert report == {"attempt": 2}
    told = [event["text"] for event in events if event["event"] == "message"]
    assert len(told) == 1
    assert "restarting, attempt 2 (restart 1 of 3)" in told[0]
