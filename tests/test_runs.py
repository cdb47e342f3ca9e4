"""A run's folder: who owns it, what asks it to stop, what its ranks leave in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import run_config

from mmscale.errors import ConfigError, Fenced, Preempted
from mmscale.runs import ATTEMPT, STOP_FILE, Run, StopRequest, open_run
from mmscale.train import train
from mmscale.world import close_world, init_world


def test_a_run_that_was_taken_over_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, rank=0, attempt="a-1")
    (tmp_path / "attempt").write_text("a-1\n")
    run.check_owner()
    (tmp_path / "attempt").write_text("a-2\n")
    with pytest.raises(Fenced, match="belongs to attempt a-2 by now; this is a-1"):
        run.check_owner()
    assert Fenced.exit_code == 17


def test_opening_a_run_claims_it_for_the_attempt(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / STOP_FILE).touch()  # meant for those before us
    world = init_world(device="cpu")
    try:
        for attempt in ("one", "two"):
            monkeypatch.setenv(ATTEMPT, attempt)
            run = open_run(run_config(scene_shards, f"run.dir={tmp_path / 'run'}"), world)
            run.check_owner()
            assert (tmp_path / "run" / "attempt").read_text() == f"{attempt}\n"
            assert not (tmp_path / "run" / STOP_FILE).exists()
            run.close()
    finally:
        close_world()


@pytest.mark.parametrize("how", ["file", "signal"])
def test_told_to_stop_it_saves_and_goes_on_later(scene_shards: Path, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "run"
    config = run_config(
        scene_shards, f"run.dir={folder}", "train.duration=12", "train.log_every=1", "data.evals={}"
    )

    def stop_at_4(event: dict[str, object]) -> None:
        if event["event"] == "log" and event["step"] == 4:
            if how == "file":
                (folder / STOP_FILE).touch()
            else:
                os.kill(os.getpid(), signal.SIGTERM)

    # the file is looked for once a second: a step may be faster than that
    config = config.override("train.duration=2000") if how == "file" else config
    with pytest.raises(Preempted) as caught:
        train(config, stop_at_4)
    assert caught.value.by_request == (how == "file")
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = sorted(path.name for path in (folder / "checkpoints").glob("step-*") if not path.suffix)
    assert saved[-1] == f"step-{steps[-1]:08d}"
    if how == "signal":
        assert steps[-1] == 5
        assert train(config)["step"] == 12


def test_the_samples_of_each_step_are_noted_once(scene_shards: Path, tmp_path: Path) -> None:
    def keys(folder: Path) -> dict[int, list[str]]:
        lines = [json.loads(text) for text in (folder / "keys/rank-0.jsonl").read_text().splitlines()]
        assert len({line["step"] for line in lines}) == len(lines)
        return {line["step"]: line["keys"] for line in lines}

    def stop_at_5(event: dict[str, object]) -> None:
        if event["event"] == "log" and event["step"] == 5:
            raise KeyboardInterrupt  # between two checkpoints, at 3 and 6

    changes = ("train.log_keys=true", "train.log_every=1", "train.duration=8", "data.evals={}")
    whole = run_config(scene_shards, *changes, f"run.dir={tmp_path / 'whole'}")
    train(whole)
    cut = whole.override(f"run.dir={tmp_path / 'cut'}")
    with pytest.raises(KeyboardInterrupt):
        train(cut, stop_at_5)
    train(cut)
    assert keys(tmp_path / "cut") == keys(tmp_path / "whole")
    first_epoch = [key for step in range(1, 9) for key in keys(tmp_path / "whole")[step]]
    assert len(first_epoch) == len(set(first_epoch)) == 64


def test_other_checkpoints_are_not_a_start_from_scratch(scene_shards: Path, tmp_path: Path) -> None:
    config = run_config(scene_shards, f"run.dir={tmp_path / 'run'}", "data.evals={}", "train.log_every=1")

    def stop_at_4(event: dict[str, object]) -> None:
        if event["event"] == "log" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop_at_4)
    with pytest.raises(ConfigError, match=r"run\.checkpoints"):
        train(config.override(f"run.checkpoints={tmp_path / 'elsewhere'}"))


WRITES = """
import ctypes, os, sys
from pathlib import Path
from mmscale.runs import Run
Run(Path(sys.argv[1]), rank=3)
print("from Python", flush=True)
os.system("echo from a child")
ctypes.string_at(0)
"""


def test_what_a_rank_writes_is_in_its_log(tmp_path: Path) -> None:
    environment = {**os.environ, "MMSCALE_CAPTURE_OUTPUT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WRITES, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGSEGV
    log = (tmp_path / "logs/rank-3.log").read_text()
    assert log.startswith("from Python\nfrom a child\n")
    assert "Fatal Python error: Segmentation fault" in log


def test_a_signal_is_noticed_and_handlers_are_given_back() -> None:
    before, called = signal.getsignal(signal.SIGTERM), []
    stop = StopRequest(lambda: called.append(1))
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.by_signal
    assert called == [1]
    stop.close()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_dropped_comes_again() -> None:
    class Dropping:
        def __del__(self) -> None:  # what is raised here, Python reports and forgets
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    before = signal.getsignal(signal.SIGINT)
    stop = StopRequest()
    try:
        Dropping()
        with pytest.raises(KeyboardInterrupt):
            assert not stop.by_signal
    finally:
        stop.close()
    assert signal.getsignal(signal.SIGINT) is before
