"""The tables of launch configurations, what reads them, and the command that writes them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from mmscale_kernels import configs, tune

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def entries() -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (kernel, shape_class, entry)
        for family in configs.FAMILIES
        for kernel, classes in configs.table(family).items()
        for shape_class, entry in classes.items()
    ]


def test_tables_are_well_formed() -> None:
    found = entries()
    assert found
    for kernel, shape_class, entry in found:
        place = f"{kernel} / {shape_class}"
        candidates = entry["candidates"]
        assert candidates, place
        assert all(isinstance(config, dict) and config for config in candidates), place
        assert len({tune._word(config) for config in candidates}) == len(candidates), (
            f"{place}: twice the same"
        )
        names = set(candidates[0])
        assert all(set(config) == names for config in candidates), (
            f"{place}: candidates with different settings"
        )
        for column, config in entry.items():
            if column == "candidates":
                continue
            # The interpreter's small blocks are for tests, and the candidates are too large for gfx942's 64 KiB.
            assert column in ("interpreter", "gfx942") or config in candidates, (
                f"{place}: {column} is not among the candidates"
            )
            assert set(config) == names, f"{place}: {column} has other settings"
        assert {"default", "interpreter"} <= set(entry), place


def test_no_kernel_is_in_two_tables() -> None:
    kernels = [kernel for family in configs.FAMILIES for kernel in configs.table(family)]
    assert len(set(kernels)) == len(kernels)


TABLE = {
    "kernel": {
        "wide": {
            "candidates": [{"BM": 100}, {"BM": 99}, {"BM": 90}, {"BM": 666}],
            "default": {"BM": 100},
            "sm_80": {"BM": 90},
            "interpreter": {"BM": 16},
        },
        "narrow": {"candidates": [{"BM": 8}], "default": {"BM": 8}, "interpreter": {"BM": 4}},
    }
}


@pytest.fixture
def small_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "FAMILIES", ("small",))
    monkeypatch.setattr(configs, "table", lambda family: TABLE)
    monkeypatch.setattr(configs, "_tables", lambda: TABLE)
    monkeypatch.setattr(configs, "_used", {})


@pytest.mark.usefixtures("small_table")
def test_choosing() -> None:
    assert configs.choose("kernel", "wide", CPU) == {"BM": 16}
    with configs.override(device="sm_90"):
        assert configs.choose("kernel", "wide", CPU) == {"BM": 100}
        with configs.override(device="sm_80"):
            assert configs.choose("kernel", "wide", CPU) == {"BM": 90}
            with configs.override(choices={("kernel", "wide"): {"BM": 1}}):
                assert configs.choose("kernel", "wide", CPU) == {"BM": 1}
                assert configs.choose("kernel", "narrow", CPU) == {"BM": 8}
        assert configs.choose("kernel", "wide", CPU) == {"BM": 100}
    assert configs.record(torch.device("cpu"))["used"]["kernel / wide / sm_80"] == {"BM": 1}
    with pytest.raises(KeyError):
        configs.choose("kernel", "unheard of", CPU)


@pytest.mark.usefixtures("small_table")
def test_a_choice_is_the_callers_own() -> None:
    """Changing what `choose` returned doesn't change what the next caller gets."""
    configs.choose("kernel", "wide", CPU)["BM"] = 5
    assert configs.choose("kernel", "wide", CPU) == {"BM": 16}


def test_fingerprint_follows_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    before = configs.fingerprint()
    assert before == configs.fingerprint()
    monkeypatch.setattr(configs, "_tables", lambda: TABLE)
    assert configs.fingerprint() != before


class FakeTimer(tune.Timer):
    """A step returns the milliseconds that it claims to take. Each further turn is slower, as on a hot device."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.turns: list[float] = []

    def __call__(self, step: tune.Step, *, times: int = 1) -> float:
        claimed = step()
        assert isinstance(claimed, int)
        self.turns.append(claimed)
        return claimed * (1 + 0.001 * len(self.turns))


def claim() -> int:
    value: int = configs.choose("kernel", "wide", CPU)["BM"]
    if value == 666:
        raise RuntimeError("out of shared memory\nand more")
    return value


def compare(timer: FakeTimer, *candidates: int) -> tune.Finding:
    choices = [{"BM": value} for value in candidates]
    return tune.compare({"claim": claim}, ("kernel", "wide"), choices, {"BM": 100}, timer=timer, repeats=5)


@pytest.mark.usefixtures("small_table")
def test_the_fastest_candidate_wins_and_the_slow_and_broken_lose() -> None:
    timer = FakeTimer()
    finding = compare(timer, 100, 200, 50, 666, 70)
    assert finding.after == {"BM": 50}
    assert finding.failed == {"BM=666": "out of shared memory"}
    assert finding.relative["BM=200"] == pytest.approx(2, rel=0.01)  # 1 % is what the device's drift may move
    # Candidates take turns: after the trial of the present choice, each is timed once before any is timed again.
    assert timer.turns == [100, *[100, 200, 50, 70] * 5]
    assert "BM=100 -> BM=50" in str(finding)
    assert "BM=666 fails: out of shared memory" in str(finding)


@pytest.mark.usefixtures("small_table")
def test_a_gain_within_the_noise_changes_nothing() -> None:
    assert compare(FakeTimer(), 99).after == {"BM": 100}
    assert compare(FakeTimer(), 97).after == {"BM": 97}


@pytest.mark.usefixtures("small_table")
def test_a_present_choice_that_fails_is_replaced() -> None:
    choices = [{"BM": 80}, {"BM": 70}]
    steps = {"claim": claim}
    finding = tune.compare(steps, ("kernel", "wide"), choices, {"BM": 666}, timer=FakeTimer(), repeats=3)
    assert finding.after == {"BM": 70}


@pytest.mark.usefixtures("small_table")
def test_tuning_writes_one_column() -> None:
    said: list[str] = []
    workload = tune.Workload("claim", "small", lambda device: claim)
    with configs.override(device="sm_90"):
        result = tune.tune(["small"], CPU, todo=[workload], timer=FakeTimer(), repeats=3, say=said.append)[
            "small"
        ]
    wide = result["kernel"]["wide"]
    assert wide["sm_90"] == {"BM": 90}
    assert {name: value for name, value in wide.items() if name != "sm_90"} == TABLE["kernel"]["wide"]
    assert result["kernel"]["narrow"] == TABLE["kernel"]["narrow"]
    assert said[0].startswith("kernel / wide: BM=100 -> BM=90, ")
    assert said[1] == "kernel / narrow: no workload reaches it; left as it is"


def test_a_table_survives_being_written() -> None:
    for table in (TABLE, {}, *(configs.table(family) for family in configs.FAMILIES)):
        assert json.loads(tune.dump(table)) == table


def run_tune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mmscale_kernels.tune", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**outside, **environment}, timeout=200
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, and it would be tuned")
def test_without_a_device_it_says_so(tmp_path: Path) -> None:
    done = run_tune("--out", str(tmp_path))
    assert done.returncode == 2
    assert "needs a CUDA or ROCm device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    done = run_tune("attentoin", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "family is 'attentoin'; it needs to be one of attention, losses, deformable" in done.stderr


def test_the_whole_command_under_the_interpreter(tmp_path: Path) -> None:
    options = ("--out", str(tmp_path), "--device", "cpu", "--repeats", "1")
    done = run_tune("deformable", *options, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "deformable.json").read_text())
    shipped = configs.table("deformable")
    assert table.keys() == shipped.keys()
    for kernel, classes in shipped.items():
        for shape_class, entry in classes.items():
            assert f"{kernel} / {shape_class}: " in done.stdout
            assert {**table[kernel][shape_class], "interpreter": entry["interpreter"]} == entry
    assert "candidates on deformable" in done.stdout


def test_a_wheel_holds_the_tables(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "launcher", "mmscale"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"mmscale_kernels/tables/{family}.json" for family in configs.FAMILIES} <= names
