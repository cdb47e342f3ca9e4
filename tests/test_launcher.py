"""The launcher on one machine: ranks and their environment, errors, restarts, places; all on one Ray.

What takes longer, or kills more than a rank, is in `chaos/test_launch.py`.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_worker
import pytest
from mmscale_launcher import Exhausted, RankFailed, cluster, launch, processes, supervise
from mmscale_launcher.cluster import join
from mmscale_launcher.failures import of_death
from mmscale_launcher.layout import arrange
from mmscale_launcher.rank import _PEER_FAILED, Reporter, _pickled
from mmscale_launcher.status import is_alive, read_status, write_status
from ray.exceptions import RayActorError

from mmscale.config import Config, DataConfig, FieldConfig, LaunchConfig, ModelConfig, RunConfig, TextConfig
from mmscale.errors import ConfigError, DataError, Preempted


def make_config(folder: Path, **options: Any) -> Config:
    return Config(
        run=RunConfig(name="test", dir=str(folder), device="cpu"),
        data=DataConfig(train="none", fields={"text": FieldConfig(source="txt", modality="text")}),
        model=ModelConfig(text=TextConfig(tokenizer="none")),
        tasks={"none": 1.0},
        launch=LaunchConfig(**({"preflight": False, "backoff_s": 0.1} | options)),
    )


@pytest.fixture(scope="module")
def shared_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray with 4 CPUs, which `launch(..., address="auto")` finds."""
    config = make_config(tmp_path_factory.mktemp("ray"), workers_per_node=2)
    with cluster.local_ray(config, lambda event: None):
        yield


def run(worker: str, folder: Path, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Launches on the shared Ray; returns the report and the events."""
    events: list[dict[str, Any]] = []
    config = make_config(folder, **({"workers_per_node": 2} | options))
    report = launch(config, address="auto", on_event=events.append, _worker=f"fake_worker:{worker}")
    return report, events


def fail(expected: type[Exception], worker: str, folder: Path, **options: Any) -> tuple[str, list[str]]:
    """Launches what must fail; returns the error's message and the launcher's."""
    events: list[dict[str, Any]] = []
    config = make_config(folder, **({"workers_per_node": 2} | options))
    with pytest.raises(expected) as caught:
        launch(config, address="auto", on_event=events.append, _worker=f"fake_worker:{worker}")
    assert type(caught.value) is expected
    return str(caught.value), [event["text"] for event in events if event["event"] == "message"]


def test_every_rank_finds_its_place(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    report, events = run("environment", Path("relative"))  # a path of the driver's working directory
    ranks = [json.loads((tmp_path / f"relative/report-{rank}.json").read_text()) for rank in range(2)]
    assert report == ranks[0]
    for rank, found in enumerate(ranks):
        assert found["RANK"] == found["LOCAL_RANK"] == str(rank)
        assert found["WORLD_SIZE"] == found["LOCAL_WORLD_SIZE"] == "2"
        assert found["MASTER_ADDR"] == ranks[0]["MASTER_ADDR"]
        assert found["MASTER_PORT"] == ranks[0]["MASTER_PORT"]
        assert found["DS_ACCELERATOR"] == "cpu"
        assert found["OMP_NUM_THREADS"] is None
        assert not found["torch"]
    assert [event["step"] for event in events if event["event"] == "log"] == [
        1,
        2,
        3,
    ]  # rank 0's, all of them, in order


def test_a_user_error_is_final(shared_ray: None, tmp_path: Path) -> None:
    message, told = fail(DataError, "data_error", tmp_path)
    assert message == "shards/000001.tar, key 7: no field jpg"
    assert told == []
    attempts = sorted(path.name for path in tmp_path.glob("attempt-*"))
    assert attempts == ["attempt-1-rank-0", "attempt-1-rank-1"]
    assert not alive(tmp_path)  # rank 0 was asleep


def test_the_same_exception_twice_stops_the_run(shared_ray: None, tmp_path: Path) -> None:
    message, told = fail(RankFailed, "bug", tmp_path, workers_per_node=1, max_restarts=3)
    assert message.count("Traceback") == 1
    assert "fake_worker.py" in message
    assert "KeyError: 'the same each time'" in message
    assert "rank.py" not in message  # our own frames say nothing
    assert len(told) == 1
    assert "restarting, attempt 2 (restart 1 of 3)" in told[0]
    assert "Traceback" not in told[0]


def test_a_killed_rank_is_restarted_and_its_last_words_told(shared_ray: None, tmp_path: Path) -> None:
    message, told = fail(Exhausted, "always_killed", tmp_path, workers_per_node=1, max_restarts=1)
    for text in (message, *told):
        assert "killed" in text
        assert "the last words of a rank" in text
        assert ":actor_name:" not in text
    assert "gave up after 2 attempts" in message
    assert len(told) == 1
    assert "restarting, attempt 2 (restart 1 of 1)" in told[0]


def test_no_room_is_an_error_in_bounded_time(
    shared_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "PLACEMENT_TIMEOUT", 1.0)
    begin = time.monotonic()
    message, _ = fail(ConfigError, "environment", tmp_path, workers_per_node=50)
    assert time.monotonic() - begin < 10  # the second above, and what a busy machine adds
    assert "50 CPU" in message
    assert "4 CPU" in message
    message, _ = fail(ConfigError, "environment", tmp_path, nodes=2)
    assert "launch.nodes=2" in message


def test_a_local_ray_needs_a_process_without_one(shared_ray: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="connected to a Ray already"):
        launch(make_config(tmp_path))


def test_a_local_ray_is_one_node(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"launch\.nodes=2 needs a cluster"),
        cluster.local_ray(make_config(tmp_path, nodes=2), lambda event: None),
    ):
        pass


def test_errors_come_back_as_what_they_are() -> None:
    assert isinstance(pickle.loads(_pickled(Preempted("at step 7"))), Preempted)
    error = pickle.loads(_pickled(fake_worker.TwoPartError("a.tar", "7")))  # can't be unpickled as itself
    assert type(error) is DataError
    assert str(error) == "a.tar, key 7: no such field"


@pytest.mark.parametrize(
    "message",
    [
        "[../gloo/transport/tcp/pair.cc:538] Read error [10.0.0.1]:1234: Connection reset by peer",
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:45678",
        "Gloo connectFullMesh failed with [../gloo/transport/tcp/pair.cc:144] no error",
        "Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_a_lost_peer_is_not_a_bug(message: str) -> None:
    assert _PEER_FAILED.search(message)


@pytest.mark.parametrize("message", ["shapes (2, 3) and (4, 5) don't match", "the loss is not finite"])
def test_a_bug_is_not_a_lost_peer(message: str) -> None:
    assert not _PEER_FAILED.search(message)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("Worker unexpectedly exits with a connection error code 2. End of file.", "was killed (by signal 9"),
        (
            "The actor is dead because all references to the actor were removed.",
            "was ended by Ray (all references",
        ),
        ("The actor died because its node has died. Node Id: 12, NODE_DIED", "died with its node"),
    ],
)
def test_a_death_is_told_by_what_ray_says_of_it(said: str, told: str) -> None:
    failure = of_death(1, "rank 1", RayActorError(error_msg=said), start_timeout=1)
    assert (failure.kind, failure.what.startswith(told)) == ("died", True), failure.what


def test_the_reporter_is_bounded() -> None:
    reporter = Reporter(3)
    for step in range(5):
        reporter.push({"step": step})
    assert [event["step"] for event in reporter.drain()] == [2, 3, 4]
    assert reporter.drain() == []


def test_a_group_ends_with_its_children_and_alone() -> None:
    command = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
    group = subprocess.Popen(command, process_group=0)
    other = subprocess.Popen(["sleep", "600"], process_group=0)
    try:
        wait_for(lambda: len(members(group.pid)) == 2)
        assert processes.kill_group(group.pid, os.getsid(0), timeout=10) == []
        assert members(group.pid) == []
        assert other.poll() is None
    finally:
        for process in (group, other):
            process.kill()
            process.wait()


def test_marked_processes_end_and_no_others() -> None:
    marked = subprocess.Popen(["sleep", "600"], env={**os.environ, processes.MARK: "mine"})
    other = subprocess.Popen(["sleep", "600"], env={**os.environ, processes.MARK: "mine too"})
    try:
        assert processes.kill_marked("mine", timeout=10) == []
        assert marked.wait(10) == -9
        assert other.poll() is None
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()


def members(group: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if processes._is_alive(pid) and (processes._group(pid) or (0,))[0] == group]


def alive(folder: Path) -> list[str]:
    """The ranks that left their process id in a folder and still run."""
    files = [*folder.glob("attempt-*"), *folder.glob("child-*")]
    return [path.name for path in files if processes._is_alive(int(path.read_text()))]


def wait_for(condition: Any, *, timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.05)


def test_a_cluster_that_is_not_there_is_named_at_once() -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"can't join a Ray cluster at 127\.0\.0\.1:1"):
        join("127.0.0.1:1")
    with pytest.raises(ConfigError, match="give auto, HOST:PORT or ray://HOST:PORT"):
        join("nowhere")
    assert time.monotonic() - begin < 10


def with_batch(size: int, accumulation: int, **options: Any) -> Config:
    config = make_config(Path("none"), **options)
    train = config.train.model_copy(update={"accumulation": accumulation})
    return config.model_copy(
        update={"data": config.data.model_copy(update={"batch_size": size}), "train": train}
    )


@pytest.mark.parametrize(
    ("num_nodes", "minimum", "workers", "idle", "accumulation"),
    [
        (3, None, (2, 2, 2), 0, 2),
        (2, None, None, 0, 0),  # all are needed
        (2, 1, (2, 2), 0, 3),
        (1, 1, (2,), 0, 6),
        (1, 3, None, 0, 0),
        (5, 1, (2, 2, 2), 0, 2),  # no more than were asked for
    ],
)
def test_fewer_nodes_are_fewer_workers_and_the_same_batch(
    num_nodes: int, minimum: int | None, workers: tuple[int, ...] | None, idle: int, accumulation: int
) -> None:
    config = with_batch(24, 2, nodes=3, min_workers=minimum)
    found = arrange(num_nodes, config, 2)
    assert (found and (found.workers, found.idle, found.accumulation)) == (
        (workers, idle, accumulation) if workers else None
    )


def test_a_world_divides_the_batch_and_its_micro_batch_is_no_larger() -> None:
    config = with_batch(12, 1, nodes=4, min_workers=1)
    for per_node in range(1, 6):
        if 12 % (4 * per_node):
            continue
        for num_nodes in range(1, 5):
            found = arrange(num_nodes, config, per_node)
            assert found is not None
            micro = 12 // (found.world_size * found.accumulation)
            assert micro * found.world_size * found.accumulation == 12
            assert micro <= 12 // (4 * per_node)
            assert found.idle == num_nodes * per_node - found.world_size
            assert max(found.workers) <= per_node
    found = arrange(3, with_batch(16, 1, nodes=3, min_workers=1), 2)
    assert found is not None
    assert (found.workers, found.idle) == ((2, 2), 2)
    assert found.places() == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_launcher_that_is_gone_is_told_from_one_that_runs(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    launcher = {"pid": child.pid, "host": socket.gethostname()}
    status = {"state": "running", "time": 0.0, "started": time.time(), "launcher": launcher}
    try:
        assert read_status(tmp_path) is None
        write_status(tmp_path, status)
        assert read_status(tmp_path) == status
        assert is_alive(status)
        assert not is_alive(status | {"state": "failed"})
        assert not is_alive(status | {"started": time.time() - 60})  # then the process is another one
    finally:
        child.kill()
        child.wait()
    assert not is_alive(status)
    elsewhere = status | {"launcher": {"pid": 1, "host": "another machine"}}
    assert not is_alive(elsewhere)
    assert is_alive(elsewhere | {"time": time.time()})
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
