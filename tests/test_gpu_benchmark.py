"""The GPU benchmark on a machine without a GPU: every case runs in tiny sizes, and a run survives what fails in it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "gpu_kernels.py"
sys.path.append(str(ROOT / "benchmarks"))

from gpu.cases import all_cases  # noqa: E402
from gpu.table import read, table  # noqa: E402
from gpu.worker import FATAL_EXIT, Fatal, Supervisor, emitter, work  # noqa: E402

ROW = {
    "case", "contender", "step", "ms", "num_samples", "host_ms", "peak_extra_mib", "error", "error_sizes",
    "flops", "bytes", "sizes", "num_copies", "device", "tiny", "note", "dtype", "tflops", "terabytes_per_s",
}  # fmt: skip


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smoke")
    done = run(out, "--smoke", "--no-tests")
    assert done.returncode == 0, done.stdout[-3000:] + (out / "worker.log").read_text()[-3000:]
    return out


def test_every_case_runs_and_its_lines_are_whole(smoke: Path) -> None:
    lines = [json.loads(text) for text in (smoke / "results.jsonl").read_text().splitlines()]
    kinds = {
        kind: [line for line in lines if line["kind"] == kind] for kind in {line["kind"] for line in lines}
    }
    assert not kinds.get("failure")
    assert [line["case"] for line in kinds["done"]] == list(all_cases())
    (machine,) = kinds["machine"]
    assert {"torch", "triton", "python", "num_cpus", "device_name", "argv"} <= machine.keys()
    assert {line["name"] for line in kinds["ceiling"]} == {"product", "copy"}
    assert kinds["configs"][-1]["tables"]
    timed = [name for name in all_cases() if name != "ceilings" and not name.startswith("check: ")]
    assert [line["case"] for line in kinds["decision"]] == timed
    assert all(
        line["backend"] == "torch" and "the tensors lie on cpu" in line["says"] for line in kinds["decision"]
    )
    for name in timed:
        steps = {row["step"] for row in kinds["row"] if row["case"] == name and row["contender"] == "ours"}
        assert {"forward", "forward_backward"} <= steps, name
    for row in kinds["row"]:
        assert row.keys() >= ROW
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        # No claim about a GPU comes from a CPU, and none about a ceiling from tiny sizes.
        assert (row["device"], row["tiny"], row["peak_extra_mib"]) == ("cpu", True, None)
        assert "percent_of_product" not in row
        if row["contender"] == "ours":
            # fp32 for attention; the losses' inputs are bf16 everywhere, whose gradients are rounded to 2^-9.
            assert max(row["error"].values()) < (1e-2 if row["dtype"] == "bfloat16" else 1e-5), row["case"]
    assert all(check["passed"] for check in kinds["check"])
    assert {"determinism", "exact at scale 100", "large softmax"} == {c["check"] for c in kinds["check"]}


def test_the_table_shows_what_was_measured_and_what_was_not(smoke: Path) -> None:
    text = (smoke / "table.md").read_text()
    assert text == table(read(smoke / "results.jsonl"))
    assert "**softmax n65536 d768**, forward + backward (on a CPU) (tiny sizes: no measurement)" in text
    assert "| ours |" in text
    assert "SDPA cuDNN + mask: it needs a CUDA device" in text
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--table", str(smoke / "results.jsonl")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == text


def test_a_line_cut_in_half_costs_that_line_alone(smoke: Path, tmp_path: Path) -> None:
    whole = (smoke / "results.jsonl").read_text()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(whole[:-40])
    assert read(cut) == read(smoke / "results.jsonl")[:-1]


def test_without_a_device_nothing_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = run(tmp_path, "--no-tests", "--only", "deformable")
    assert done.returncode == 2
    assert "no CUDA or ROCm device" in done.stderr
    assert not [line for line in read(tmp_path / "results.jsonl") if line["kind"] in ("row", "ceiling")]


def test_usage(tmp_path: Path) -> None:
    listed = subprocess.run(
        [sys.executable, str(BENCHMARK), "--list"], capture_output=True, text=True, check=True
    )
    assert listed.stdout.splitlines() == list(all_cases())
    done = run(tmp_path, "--only", "no such case")
    assert done.returncode == 2
    assert "matches no case" in done.stderr


# A worker of fake cases, without torch. {0}: the folder of the benchmark.
WORKER = """
import json, os, sys, time
sys.path.insert(0, {0!r})
from gpu.worker import Fatal, emitter, work

def good(setting, emit):
    emit("row", case="good")

def bad(setting, emit):
    raise RuntimeError("out of luck")

def dies(setting, emit):
    os._exit(7)

def hangs(setting, emit):
    time.sleep(60)

def faults(setting, emit):
    if ["faults", "ours"] in json.loads(sys.argv[2]):
        return emit("row", case="faults", contender="peer")
    emit("failure", case="faults", contender="ours", error="illegal memory access", fatal=True)
    raise Fatal("illegal memory access")

cases = {{f.__name__: (f, 0.0) for f in (good, bad, dies, hangs, faults)}}
sys.exit(work(cases, json.loads(sys.argv[1]), None, float(sys.argv[3]), emitter(sys.stdout)))
"""

Supervise = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def supervise(tmp_path: Path) -> Supervise:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(str(BENCHMARK.parent)))

    def run_cases(*names: str, seconds: float = 60.0) -> list[dict[str, Any]]:
        deadline = time.time() + seconds
        lines: list[dict[str, Any]] = []

        def command(left: list[str], excluded: list[tuple[str, str]]) -> list[str]:
            return [sys.executable, str(script), json.dumps(left), json.dumps(excluded), str(deadline)]

        Supervisor(command, tmp_path / "log").run(list(names), deadline, lines.append)
        return lines

    return run_cases


def short(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(line["kind"], line["case"]) for line in lines]


def test_a_case_that_raises_is_recorded_and_the_run_goes_on(supervise: Supervise) -> None:
    lines = supervise("bad", "good")
    assert short(lines) == [("failure", "bad"), ("done", "bad"), ("row", "good"), ("done", "good")]
    assert lines[0]["error"] == "RuntimeError: out of luck"


def test_a_case_that_ends_the_process_costs_that_case_alone(supervise: Supervise) -> None:
    lines = supervise("good", "dies", "good")
    assert short(lines) == [
        ("row", "good"), ("done", "good"), ("failure", "dies"), ("row", "good"), ("done", "good")
    ]  # fmt: skip
    assert lines[2]["error"] == "the worker's exit code was 7"


def test_a_case_is_tried_again_without_the_contender_that_broke_the_device(supervise: Supervise) -> None:
    lines = supervise("faults", "good")
    assert short(lines) == [
        ("failure", "faults"), ("row", "faults"), ("done", "faults"), ("row", "good"), ("done", "good")
    ]  # fmt: skip
    assert lines[1]["contender"] == "peer"


def test_a_case_that_hangs_is_killed(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu.worker.GRACE", 0.5)
    began = time.time()
    lines = supervise("good", "hangs", "good", seconds=3.0)
    assert time.time() - began < 20
    assert short(lines) == [("row", "good"), ("done", "good"), ("failure", "hangs"), ("skipped", "good")]
    assert "it took too long" in lines[2]["error"]


def test_what_the_budget_has_no_time_for_is_skipped_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[str] = []
    cases = {
        name: (lambda *_, name=name: ran.append(name), needs)
        for name, needs in (("a", 0.0), ("b", 50.0), ("c", 1.0))
    }
    assert work(cases, ["a", "b", "c"], None, time.time() + 10, emitter(sys.stdout)) == 0
    assert ran == ["a", "c"]
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    (skipped,) = [line for line in lines if line["kind"] == "skipped"]
    assert skipped["case"] == "b"
    assert "it needs 50 s" in skipped["why"]


def test_a_broken_device_ends_the_worker() -> None:
    def breaks(setting: Any, emit: Any) -> None:
        raise Fatal("gone")

    assert work({"x": (breaks, 0.0)}, ["x"], None, time.time() + 9, lambda *_, **__: None) == FATAL_EXIT


def test_one_contender_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import losses
    from gpu.harness import Contender, Setting, run_case

    case = losses.case("softmax", "softmax", 64, 8)
    lines: list[dict[str, Any]] = []

    def breaks(inputs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    real = losses.contenders
    monkeypatch.setattr(losses, "contenders", lambda *given: [Contender("peer", breaks), *real(*given)])
    run_case(
        Setting(torch.device("cpu"), smoke=True), case, lambda kind, **f: lines.append({"kind": kind, **f})
    )
    (failure,) = [line for line in lines if line["kind"] == "failure"]
    assert (failure["contender"], failure["error"]) == ("peer", "OutOfMemoryError: out of memory")
    assert {line["contender"] for line in lines if line["kind"] == "row"} == {"ours", "eager", "compiled"}
