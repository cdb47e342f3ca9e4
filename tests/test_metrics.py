"""Metrics: the throughput arithmetic under a fake clock, what the files hold after a crash."""

from __future__ import annotations

import json
import math
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmscale.data.stream import Fault
from mmscale.errors import DataError
from mmscale.metrics import (
    LoaderMeter,
    Window,
    Writer,
    read_json_lines,
    remedy,
)
from mmscale.world import init_world


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_sums_over_the_whole_window() -> None:
    clock = Clock()
    window = Window(clock)
    for seconds, wait in ((1.0, 0.5), (3.0, 0.5)):  # a mean of rates would give (8 + 8 / 3) / 2 samples/s
        clock.now += seconds
        window.add(samples=8, tokens=100, wait_s=wait)
    assert window.close() == {
        "samples_per_s": 4.0,
        "tokens_per_s": 50.0,
        "data_wait_frac": 0.25,
        "step_s": 2.0,
    }


def test_a_window_begins_anew_when_closed() -> None:
    clock = Clock()
    window = Window(clock)
    clock.now += 100
    window.add(samples=1, tokens=1, wait_s=50)
    window.close()
    clock.now += 2
    window.add(samples=8, tokens=16, wait_s=0)
    assert window.close() == {"samples_per_s": 4.0, "tokens_per_s": 8.0, "data_wait_frac": 0.0, "step_s": 2.0}


def test_paused_time_is_not_training_time() -> None:
    clock = Clock()
    window = Window(clock)
    clock.now += 1
    window.add(samples=8, tokens=8, wait_s=0.5)
    resume = window.pause()
    clock.now += 3600  # an evaluation
    resume()
    clock.now += 1
    window.add(samples=8, tokens=8, wait_s=0.5)
    assert window.close() == {"samples_per_s": 8.0, "tokens_per_s": 8.0, "data_wait_frac": 0.5, "step_s": 1.0}


def test_an_empty_window_has_rates_of_zero() -> None:
    rates = Window(Clock()).close()
    assert rates["samples_per_s"] == rates["tokens_per_s"] == rates["data_wait_frac"] == 0
    assert math.isfinite(rates["step_s"])


# -------------------------------------------------------------------------------------------------- the files


def line(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "mfu": None, "loss/caption": 2.0 * step, **more}


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_lines_and_curves_hold_what_was_logged(tmp_path: Path) -> None:
    writer = Writer(tmp_path, resume_step=0)
    for step in (1, 2):
        writer.log(line(step))
    # Read before anything is closed: a process that is killed closes nothing.
    assert read_json_lines(tmp_path / "metrics.jsonl") == [line(1), line(2)]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert scalars(tmp_path, "loss/caption") == [(1, 2.0), (2, 4.0)]
    assert "train/mfu" not in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    writer.scalars(2, {"eval/unseen style/R@1": 0.25})
    assert scalars(tmp_path, "eval/unseen style/R@1") == [(2, 0.25)]
    writer.image("picture", np.zeros((4, 4, 3), np.uint8), 2)
    writer.close()
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["images"] == ["picture"]


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    first = Writer(tmp_path, resume_step=0)
    for step in (2, 4, 6):
        first.log(line(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # what a killed process leaves
    second = Writer(tmp_path, resume_step=4)
    second.log(line(6, loss=0.125))
    second.close()
    kept = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [line(2), line(4), line(6, loss=0.125)]
    assert scalars(tmp_path, "train/loss") == [(2, 0.5), (4, 0.25), (6, 0.125)], "no zigzag in TensorBoard"


def test_a_run_that_starts_over_has_one_curve(tmp_path: Path) -> None:
    for loss in (3.0, 5.0):
        writer = Writer(tmp_path, resume_step=0)
        writer.scalars(0, {"eval/x": loss})
        writer.log(line(2, loss=loss))
        writer.close()
    assert scalars(tmp_path, "train/loss") == [(2, 5.0)]
    assert scalars(tmp_path, "eval/x") == [(0, 5.0)]
    assert read_json_lines(tmp_path / "metrics.jsonl") == [line(2, loss=5.0)]


@pytest.mark.parametrize("end", ["", '{"step": 4', '{"step": 4}\n\x00\x00\x00', '{"step": 4}\n\xff'])
def test_damaged_ends_of_json_lines_are_ignored(tmp_path: Path, end: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2}\n' + end.encode("latin-1"))
    expected = [{"step": 2}, {"step": 4}] if "}\n" in end else [{"step": 2}]
    assert read_json_lines(path) == expected
    assert read_json_lines(tmp_path / "absent.jsonl") == []


def test_a_loss_that_is_no_number_is_still_a_line_of_json(tmp_path: Path) -> None:
    writer = Writer(tmp_path, resume_step=0)
    writer.log(line(1, loss=float("nan"), grad_norm=float("inf")))
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["loss"] is None
    assert found["grad_norm"] is None


# ------------------------------------------------------------------------------------------------------ the loader


class FakeLoader:
    """Counts as a stream would; which faults come is the test's."""

    def __init__(self) -> None:
        self.new: list[Fault] = []
        self.shard_faults: list[Fault] = []
        self.numbers = {
            "samples": 0.0,
            "bytes_read": 0.0,
            "wait_s": 0.0,
            "read_s": 1.0,
            "decode_s": 9.0,
            "queue_depth": 2.0,
            "ready_bytes": 2.0**20,
            "bytes_in_flight": 0.0,
        }

    def take_faults(self) -> list[Fault]:
        taken, self.new = self.new, []
        return taken

    def stats(self) -> dict[str, float]:
        return dict(self.numbers)


def fault(step: int, cause: str = "undecodable image") -> Fault:
    return Fault(step, 3, "0.tar", f"k{step}", "image", cause, f"shard 0.tar, key k{step}: broken")


def make_meter(
    loader: FakeLoader, folder: Path, *, step: int = 0, counts: Any = (), budget: float = 0.1
) -> LoaderMeter:
    world = init_world(device="cpu", threads=1)
    return LoaderMeter(loader, world, folder, counts=dict(counts), step=step, budget=budget, clock=Clock())


def test_faults_are_counted_written_and_held_to_the_budget(tmp_path: Path) -> None:
    loader = FakeLoader()
    meter = make_meter(loader, tmp_path)
    for step in range(3):
        loader.new = [fault(step)]
        meter.record(meter.num_new(), (step + 1) * 4)  # three are free, whatever the share
    meter.record(meter.num_new(), 16)
    lines = read_json_lines(tmp_path / "quarantine.jsonl")
    assert [(line["step"], line["shard"], line["key"], line["cause"]) for line in lines] == [
        (step, "0.tar", f"k{step}", "undecodable image") for step in range(3)
    ]
    loader.new = [fault(40, "missing text")]
    meter.record(meter.num_new(), 40)  # 4 of 40 is the budget
    assert meter.counts == {"undecodable image": 3, "missing text": 1}
    loader.new = [fault(41)]
    num_new = meter.num_new()
    with pytest.raises(DataError, match=r"5 of 48 .* error budget of 10\.000%: 4 x undecodable.*k41: broken"):
        meter.record(num_new, 48)
    # A resumed run reads the steps after its checkpoint again, and finds their faults again.
    again = make_meter(FakeLoader(), tmp_path, step=2, counts={"undecodable image": 2})
    assert [line["step"] for line in read_json_lines(tmp_path / "quarantine.jsonl")] == [0, 1]
    assert again.counts.total() == 2


def test_shards_left_out_come_first_in_the_quarantine(tmp_path: Path) -> None:
    loader = FakeLoader()
    loader.shard_faults = [Fault(-1, -1, "9.tar", None, None, "shard missing", "no such file")]
    for step in (0, 5):
        make_meter(loader, tmp_path, step=step)
        [line] = read_json_lines(tmp_path / "quarantine.jsonl")
        assert (line["shard"], line["key"]) == ("9.tar", None)


def test_rates_of_the_loader(tmp_path: Path) -> None:
    loader, clock = FakeLoader(), Clock()
    world = init_world(device="cpu", threads=1)
    meter = LoaderMeter(loader, world, tmp_path, counts={"a": 2}, step=0, budget=1.0, clock=clock)
    clock.now += 2.0
    loader.numbers["bytes_read"] += 3e6
    rates = meter.rates(samples=200)
    assert rates == {
        "data/mb_per_s": 1.5,
        "data/queue_depth": 2.0,
        "data/ready_mib": 1.0,
        "data/in_flight_mib": 0.0,
        "data/bad_frac": 0.01,
        "data/bad/a": 2.0,
    }
    clock.now += 1.0
    assert meter.rates(samples=200)["data/mb_per_s"] == 0


def test_a_slow_loader_is_told_once_with_the_cheapest_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    loader = FakeLoader()
    meter = make_meter(loader, tmp_path, step=100)
    assert meter.warning(105, 0.9, threads=1) is None  # too early
    assert meter.warning(110, 0.1, threads=1) is None  # not slow
    text = meter.warning(120, 0.4, threads=1)
    assert text is not None
    assert "waits for data 40% of the time" in text
    assert "data.threads=4" in text
    assert meter.warning(130, 0.9, threads=1) is None  # once
    assert "cache_mb" in remedy(loader.stats(), threads=4, cores=4)
    assert "faster disk" in remedy({**loader.stats(), "read_s": 90.0}, threads=4, cores=4)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's own thread
def test_a_full_disk_costs_no_line(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        told: list[str] = []
        writer = Writer(disk, resume_step=0, say=told.append)
        writer.log({"step": 1, "loss": 1.0})
        filler = disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        for step in range(2, 200):  # more than the last page has room for
            writer.log({"step": step, "loss": 1.0})
        assert len(told) == 1
        assert "No space left" in told[0]
        assert len(read_json_lines(disk / "metrics.jsonl")) < 199
        filler.unlink()
        writer.log({"step": 200, "loss": 1.0})
        writer.close()
        assert [line["step"] for line in read_json_lines(disk / "metrics.jsonl")] == list(range(1, 201))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
