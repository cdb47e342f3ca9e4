"""Every Triton kernel, compiled ahead of time for devices that aren't here: memory, spills, tensor cores.

The compiling is done by benchmarks/compile_kernels.py in a process of its own, since triton decides at its first import
whether it interprets, for good. The quick test compiles what an H100 would choose for bf16 at D = 64; the slow one a
fixed quarter of all variants. The committed result holds all of them, and is held against what the tables say now.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "compile_kernels.py"
RESULT = ROOT / "benchmarks" / "results" / "compiled_kernels.json"
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}
# What one block may use, KiB: the CUDA C++ Programming Guide's table of compute capabilities; CDNA 3's LDS.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}

# (the tables' kernel, class): bytes that its sm_90 choice may spill, and why it has to.
MAY_SPILL: dict[tuple[str, str], tuple[int, str]] = {
    ("attention_key", "half d64"): (
        56,
        "with four sources, each with lengths, starts and a gate; with two, none",
    ),
    ("attention_forward", "fp32 d64"): (
        24,
        "in the packed form at D = 16, whose 128 registers are the assembler's choice",
    ),
    ("deformable_backward_value", "d64"): (24, "in fp32, whose 80 registers are the assembler's choice"),
}
# (the tables' kernel, class): why its sm_90 choice multiplies halves without wgmma.
WITHOUT_WGMMA: dict[tuple[str, str], str] = {
    ("attention_key", "half d256"): "32 keys a block are too few rows for one; 64 spilled 328 B",
}

Row = dict[str, Any]


def compile_kernels(out: Path, *arguments: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def problems(row: Row) -> list[str]:
    """What is wrong with one compiled kernel, in words."""
    place, found = (row["table"], row["class"]), []
    if row["failed"]:
        return [f"doesn't compile: {row['failed']}"]
    if row["shared_bytes"] > SHARED_KIB[row["target"]] * 1024:
        found.append(f"{row['shared_bytes'] / 1024:.0f} KiB of shared memory, of {SHARED_KIB[row['target']]}")
    if not row["chosen"]:
        return found
    if row["target"] == "sm_90" and row["spill_bytes"] > MAY_SPILL.get(place, (0, ""))[0]:
        found.append(f"spills {row['spill_bytes']} B in {row['spills_in']}")
    if row["half_dots"]:
        if "none" in row["instructions"]:
            found.append("multiplies halves without tensor cores")
        elif (
            row["target"] == "sm_90"
            and place not in WITHOUT_WGMMA
            and row["instructions"] != ["wgmma.mma_async"]
        ):
            found.append(f"multiplies halves by {row['instructions']}, not by wgmma alone")
    return found


def assert_sound(rows: list[Row]) -> None:
    found = [
        f"{row['table']} / {row['class']} {row['config']} for {row['target']}: {problem}"
        for row in rows
        for problem in problems(row)
    ]
    assert not found, "\n".join(found)


def test_what_an_h100_would_choose(tmp_path: Path) -> None:
    result = compile_kernels(tmp_path / "quick.json", "--quick")
    assert not result["refused"]
    rows = result["rows"]
    assert_sound(rows)
    # Each operator has launched something: a case that launches nothing proves nothing.
    tables = {row["table"] for row in rows}
    for family in ("attention_", "losses_statistics", "losses_gradients", "losses_sigmoid", "deformable_"):
        assert any(table.startswith(family) for table in tables), f"{family}: nothing was launched"
    assert sum(row["half_dots"] for row in rows) > 0
    assert all(row["registers"] > 0 and row["target"] == "sm_90" for row in rows)


@pytest.mark.slow
def test_a_quarter_of_all_variants(tmp_path: Path) -> None:
    result = compile_kernels(tmp_path / "part.json", "--part", "4")
    assert_sound(result["rows"])
    assert {row["target"] for row in result["rows"]} == TARGETS


def test_the_committed_result_is_sound() -> None:
    result = json.loads(RESULT.read_text())
    assert not result["refused"]
    assert_sound(result["rows"])
    assert {row["target"] for row in result["rows"]} == TARGETS


def test_the_committed_result_covers_the_tables(tmp_path: Path) -> None:
    """Every kernel, class and candidate that operators launch now is in the file: it is made anew with the tables."""
    now = compile_kernels(tmp_path / "list.json", "--list")
    assert not now["refused"]
    assert not now["unreached"], "no case, at any setting of the tables, asks for these classes"
    committed = {key_of(row) for row in json.loads(RESULT.read_text())["rows"]}
    missing = sorted(set(now["keys"]) - committed)
    assert not missing, f"{len(missing)} rows are missing, such as {missing[:3]}; run {SCRIPT.name}"
    assert not committed - set(now["keys"]), (
        f"the file holds rows of kernels that are gone; run {SCRIPT.name}"
    )
    # And the other way round: each candidate of a kernel that is launched has its row.
    for family in ("attention", "losses", "deformable"):
        table = json.loads((ROOT / "kernels" / "mmscale_kernels" / "tables" / f"{family}.json").read_text())
        for kernel, classes in table.items():
            for shape_class, entry in classes.items():
                if f"{kernel} / {shape_class}" in now["interpreter_alone"]:
                    continue
                for config in entry["candidates"]:
                    if "num_warps" in config:  # else it chooses between kernels
                        words = " | ".join((kernel, shape_class, words_of(config), "sm_90"))
                        assert any(key.endswith(f"| {words}") for key in committed), words


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text()
    found = re.search(r"<!-- compiled -->\n(.*)\n<!-- /compiled -->", text, re.DOTALL)
    assert found
    lines = found[1].count("\n| `")
    chosen = [row for row in json.loads(RESULT.read_text())["rows"] if row["chosen"]]
    others = {(row["table"], row["target"]) for row in chosen if row["target"] != "sm_90"}
    assert lines == sum(row["target"] == "sm_90" for row in chosen) + len(others)


def words_of(config: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(config.items()))


def key_of(row: Row) -> str:
    return " | ".join((row["kernel"], row["table"], row["class"], words_of(row["config"]), row["target"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shared_bytes": 228 * 1024}, "shared memory"),
        ({"spill_bytes": 8, "spills_in": "a case"}, "spills 8 B in a case"),
        ({"instructions": ["none"]}, "without tensor cores"),
        ({"instructions": ["mma.sync", "wgmma.mma_async"]}, "not by wgmma alone"),
        ({"failed": {"a case": "CompilationError"}}, "doesn't compile"),
    ],
)
def test_a_bad_kernel_would_be_found(change: Row, words: str) -> None:
    good: Row = {
        "kernel": "k", "table": "t", "class": "c", "config": {}, "target": "sm_90", "chosen": True, "variants": 1,
        "shared_bytes": 227 * 1024, "registers": 255, "spill_bytes": 0, "spills_in": None, "half_dots": 1,
        "instructions": ["wgmma.mma_async"], "failed": {},
    }  # fmt: skip
    assert not problems(good)
    assert [words in problem for problem in problems({**good, **change})] == [True]
