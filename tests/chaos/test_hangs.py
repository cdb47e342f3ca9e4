"""Ranks that hang or are slow in launched runs: named with phase and stack, and restarted, or only named.

tests/test_diagnose.py has more of the same with processes that train nothing.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from statistics import median

import pytest
from harness import SCALE, Launched, assert_exact, record, reference, seeds, wait_for

from mmscale.config import LaunchConfig
from mmscale.metrics import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed, pytest.mark.timeout(600)]

GATE_S = 15.0  # or 10 median steps, until it is named
HANG_S = 5.0 if SCALE == "ci" else LaunchConfig().hang_s  # CI has no time to wait
STEPS = 60
HANGS = re.compile(r"rank (\d+) .*?hangs in phase (\w+)")
STACKS = {"sleep": "fall_asleep", "lock": "hold_the_lock", "loader": "read_a_pipe"}


def plan(seed: int) -> list[dict[str, object]]:
    """What happens in each attempt."""
    shuffle = random.Random(seed)
    kinds = ["stop", "lock"] if SCALE == "ci" else ["stop", "lock", "sleep", "loader"]
    faults: list[dict[str, object]] = []
    for kind in kinds:
        phases = ("data", "sync", "forward", "loss", "backward", "step")
        phase = "data" if kind == "loader" else shuffle.choice(phases)
        faults.append(
            {"rank": shuffle.randrange(2), "kind": kind, "phase": phase, "step": shuffle.randint(3, 8)}
        )
    return faults


@pytest.mark.parametrize("seed", seeds(ci=1, standard=2, full=5))
def test_a_rank_that_hangs_is_named_and_replaced(seed: int, scene_shards: Path, tmp_path: Path) -> None:
    faults = plan(seed)
    # a stop comes from here
    written = {str(n): fault for n, fault in enumerate(faults, 1) if fault["kind"] != "stop"}
    (tmp_path / "hangs.json").write_text(json.dumps(written))
    overrides = (f"train.duration={STEPS}", "train.save_every=5", f"launch.hang_s={HANG_S}")
    with Launched(
        tmp_path, scene_shards, "hung", *overrides, "launch.backoff_s=0", workers=2, worker="hanging:train"
    ) as launched:
        for number, fault in enumerate(faults, 1):
            if fault["kind"] == "stop":
                launched.wait_step(5)
                time.sleep(random.Random(seed).uniform(0, 0.1))  # anywhere in a step or two
                launched.signal(int(str(fault["rank"])), signal.SIGSTOP)
            else:
                wait_for((tmp_path / f"hung-{number}").exists, 120, what=f"fault {number}")
            begin = time.monotonic()
            found = wait_for(
                lambda n=number: len(seen := HANGS.findall(launched.told())) >= n and seen,
                120,
                what=f"a name for {fault}",
            )
            seconds = time.monotonic() - begin
            rank, phase = int(found[-1][0]), found[-1][1]
            steps = [line["step_s"] for line in read_json_lines(launched.run / "metrics.jsonl")]
            record("one rank hangs", **fault, named_rank=rank, named_phase=phase, seconds=seconds)
            assert len(found) == number
            assert rank == fault["rank"], launched.told()
            assert fault["kind"] == "stop" or phase == fault["phase"], launched.told()
            assert seconds <= max(GATE_S, 10 * median(steps))
        code, told = launched.finish()
    assert code == 0, told
    for fault in faults:
        assert fault["kind"] == "stop" or STACKS[str(fault["kind"])] in told, (fault, told)
    assert_exact(launched.run, reference(scene_shards, *overrides[:2], world_size=2))


class Brake:
    """Lets a process run for a third of the time, in turns that are shorter than what is measured of it."""

    def __init__(self, pid: int) -> None:
        self._pid, self._ended = pid, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *about: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                os.kill(self._pid, signal.SIGSTOP)
                time.sleep(0.02)
                os.kill(self._pid, signal.SIGCONT)
                time.sleep(0.01)
        except ProcessLookupError:
            return  # the run has ended


def test_a_slow_rank_is_named_with_its_phase_and_kept(scene_shards: Path, tmp_path: Path) -> None:
    # a step of some tenths of a second on two cores
    overrides = (
        "model.width=192",
        "model.depth=4",
        "model.num_heads=4",
        "data.batch_size=48",
        "train.duration=70",
        "train.save_every=50",
    )
    with Launched(tmp_path, scene_shards, "slow", *overrides, workers=2) as launched:
        launched.wait_step(20)
        assert " is slow: " not in launched.told()
        with Brake(launched.ranks()[1]):
            begun = launched.step
            wait_for(lambda: " is slow: " in launched.told() or launched.step > begun + 30, 200, every=0.01)
            named = launched.step
        code, told = launched.finish()
    assert code == 0, told
    found = re.findall(r"rank (\d+) .*?is slow: its (\w+) phase takes ([\d.]+) times", told)
    record("one rank 3x slower", step=begun, named_after=named - begun, found=found)
    assert [(rank, phase) for rank, phase, _ in found] == [("1", "forward")], told
    assert named - begun <= 20
    assert launched.starts() == 1  # no restart
