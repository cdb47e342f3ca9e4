"""A run seen from outside: status, logs, stop and attach on made-up folders with real locks and processes."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mmscale_launcher import follow

from mmscale.cli import main
from mmscale.errors import ConfigError, UserError
from mmscale.recipes import get


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text(get("quickstart").override("launch.lease_s=5").to_json())
    lines = [{"step": 10 * i, "loss": 3.0 / i, "samples_per_s": 50.0, "data_wait_frac": 0.1} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    return folder


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for a launcher."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


def write(run: Path, pid: int, state: str = "running", **changes: Any) -> None:
    ranks = [
        {"rank": i, "node": "n", "address": "10.0.0.1", "pid": 70 + i, "step": 20, "phase": phase}
        | {"phase_s": 2.5, "memory_gib": 1.5, "process": "running"}
        for i, phase in enumerate(["sync", "backward"])
    ]
    status = {"state": state, "attempt": 2, "attempt_id": "a-2", "world_size": 2, "idle_workers": 0}
    status |= {"address": None, "launcher": {"pid": pid, "host": socket.gethostname()}, "time": time.time()}
    status |= {"started": time.time(), "step": 20, "total_steps": 640, "samples_per_s": 50.0, "eta_s": 90.0}
    status |= {"data_wait_frac": 0.1, "loss": 1.5, "checkpoint": "somewhere/step-16", "restarts": 1}
    status |= {"messages": ["rank 1 died"], "ranks": ranks, "exit_code": None, "error": None, **changes}
    (run / "status.json.new").write_text(json.dumps(status))
    (run / "status.json.new").replace(run / "status.json")


def test_status_of_a_launched_run(
    run: Path, process: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, process.pid)
    assert main(["status", str(run)]) == 0
    text = capsys.readouterr().out
    assert f"{run}: running\nstep 20 of 640, loss 1.500, 50 samples/s, data wait 10%, ETA 1:30\n" in text
    assert "attempt 2, 1 restarts, 0 idle workers" in text
    assert "checkpoint: somewhere/step-16" in text
    (last,) = (line for line in text.splitlines() if line.endswith("<- last"))
    assert last.split()[:2] == ["1", "10.0.0.1"]
    assert main(["status", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alive"] is True
    process.kill()
    process.wait()
    assert follow.look(run)["state"] == "lost"


def test_status_of_a_run_without_a_launcher(run: Path) -> None:
    assert follow.look(run)["state"] == "stopped"
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 5 on here")
        file.flush()
        found = follow.look(run)
        assert (found["state"], found["owner"], found["step"]) == ("running", "process 5 on here", 20)
    (run / "report.json").write_text("{}")
    assert follow.look(run)["state"] == "done"


@pytest.mark.parametrize("verb", ["status", "stop", "logs --rank 0", "launch --attach"])
def test_what_is_no_run_is_said_so(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = verb.split()
    assert (
        main([*words[:1], str(tmp_path), *words[1:]] if words[0] != "launch" else [*words, str(tmp_path)])
        == 2
    )
    assert "holds no config.json, so it isn't a run's folder" in capsys.readouterr().err


def test_a_run_that_is_not_running_cannot_be_stopped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", str(run)]) == 1
    assert f"mmscale: {run} isn't running, it is stopped" in capsys.readouterr().err
    assert not (run / "stop").exists()


def test_stop_waits_until_the_run_has_saved(
    run: Path, process: subprocess.Popen[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """It asks again where a run that was only starting has taken the file away."""
    write(run, process.pid, "starting")
    seen: list[bool] = []

    def supervise() -> None:
        for _ in range(2):
            deadline = time.monotonic() + 10
            while not (run / "stop").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            seen.append((run / "stop").exists())
            (run / "stop").unlink()
        write(run, process.pid, "stopped", step=24, checkpoint="somewhere/step-24", exit_code=75)

    thread = threading.Thread(target=supervise)
    thread.start()
    code = main(["stop", str(run)])
    thread.join()
    assert seen == [True, True]
    assert code == 0
    assert "checkpoint: somewhere/step-24" in capsys.readouterr().out


def test_stop_gives_up_waiting_and_says_so(run: Path, process: subprocess.Popen[bytes]) -> None:
    write(run, process.pid)
    with pytest.raises(UserError, match=r"hasn't stopped within 0.2 s.*It is at step 20"):
        follow.stop(run, timeout=0.2)
    assert (run / "stop").exists()


def test_logs_name_the_ranks_there_are(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"hasn't begun to log"):
        list(follow.log_lines(run, 0, follow=False))
    for rank in (0, 2):
        (run / "logs" / f"rank-{rank}.log").write_text(f"hello from {rank}\n")
    assert main(["logs", str(run), "--rank", "2"]) == 0
    assert capsys.readouterr().out == "hello from 2\n"
    assert main(["logs", str(run), "--rank", "1"]) == 2
    assert "has no log of that rank; there are 0, 2" in capsys.readouterr().err


def test_logs_are_followed_until_the_run_ends(run: Path, process: subprocess.Popen[bytes]) -> None:
    write(run, process.pid)
    log = run / "logs" / "rank-0.log"
    log.write_text("one\n")
    pieces = follow.log_lines(run, 0, follow=True)
    assert next(pieces) == "one\n"
    with log.open("a") as file:
        file.write("two\n")
    assert next(pieces) == "two\n"
    with log.open("a") as file:
        file.write("three\n")
    write(run, process.pid, "done")
    assert list(pieces) == ["three\n"]


@pytest.mark.parametrize(("state", "code"), [("failed", 10), ("stopped", 75)])
def test_attach_follows_and_ends_as_the_launcher_did(
    run: Path, process: subprocess.Popen[bytes], state: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, process.pid)
    timer = threading.Timer(
        0.8,
        lambda: write(
            run, process.pid, state, exit_code=code, error="it broke", messages=["rank 1 died", "x"]
        ),
    )
    timer.start()
    assert main(["launch", "--attach", str(run)]) == code
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"following process {process.pid} on ")
    assert told.count("rank 1 died") == 1
    assert "step 20/640: loss 1.500, 50 samples/s, data wait 10%, ETA 1:30, 1 restart" in told
    assert told[-1] == "mmscale: it broke"


def test_attach_does_not_take_a_run_from_another_process(run: Path) -> None:
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"process {os.getpid()} on here")
        file.flush()
        with pytest.raises(UserError, match=r"in use by process .* on here"):
            follow.attach(run, on_event=lambda event: None)


def test_attach_takes_no_other_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "quickstart", "--attach", str(run), "--nodes", "2"]) == 2
    assert "leave out quickstart --nodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "now", "news"),
    [
        ([], ["a"], ["a"]),
        (["a", "b"], ["b", "c"], ["c"]),
        (["a"], ["a"], []),
        (["a"], ["x", "y"], ["x", "y"]),
    ],
)
def test_messages_are_told_once(before: list[str], now: list[str], news: list[str]) -> None:
    assert follow._news(before, now) == news
