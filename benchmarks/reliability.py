"""The fault table: makes each fault happen, measures what follows, and writes the table of docs/reliability.md.

    python benchmarks/reliability.py                     # `make chaos`: every row, at most 45 minutes on two cores
    python benchmarks/reliability.py --scale full        # `make chaos-full`: all seeds, the long soak, plain Ray Train
    python benchmarks/reliability.py --only soak         # rows whose fault holds this; prints, and writes nothing
    python benchmarks/reliability.py --again soak head   # these rows anew, into the results file, with their own commit
    python benchmarks/reliability.py --peer ray-train    # only plain Ray Train under the same faults
    python benchmarks/reliability.py --table             # the table anew, from the results file

Writes benchmarks/results/reliability-SCALE.json, and the page from the standard scale. The faults are in the tests
themselves (tests/chaos, and some of tests/distributed): a test that fails makes its row fail, whatever was measured,
and the tests note figures by `harness.record`. So a row can't say more than a test has asserted. Exit code 1 if a row
fails.

Times depend on the machine; those that the table compares with a gate are stated beyond the start of plain processes on
the same machine, in the same run. Run it on a machine that does nothing else: the load before is in the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reliability.md"
PEER = ROOT / "benchmarks" / "peers" / "run_ray_train.py"
BEGIN, END = "<!-- fault table: made by benchmarks/reliability.py -->", "<!-- end of the fault table -->"

Figures = list[dict[str, Any]]


def spread(figures: Figures, name: str, unit: str = "", digits: int = 1) -> str:
    """median (largest) of a figure, or nothing where none has it."""
    values = [float(entry[name]) for entry in figures if isinstance(entry.get(name), int | float)]
    if not values:
        return ""
    middle, most = statistics.median(values), max(values)
    text = f"{middle:.{digits}f}" + (f" (at most {most:.{digits}f})" if len(values) > 1 else "")
    return f"{text}{unit}"


def everything(figures: Figures) -> str:
    """All numbers that the records of a row have in common names."""
    names = list(dict.fromkeys(name for entry in figures for name in entry))
    parts = [f"{name.replace('_', ' ')} {text}" for name in names if (text := spread(figures, name))]
    return "; ".join([f"{len(figures)} case{'s' * (len(figures) != 1)}", *parts]) if figures else ""


def kills(figures: Figures) -> str:
    shared = [f for f in figures if "lost_steps" in f]
    beyond = [{"s": f["seconds"] - f["start_s"]} for f in figures if "start_s" in f]
    phases = sorted({f["phase"] for f in shared if f.get("phase")})
    return (
        f"{len(figures)} kills, in {', '.join(phases) or 'unknown phases'}; first step after {spread(beyond, 's')} s "
        f"beyond start-up ({spread(figures, 'start_s')} s); lost steps {spread(shared, 'lost_steps', digits=0)}"
    )


def hangs(figures: Figures) -> str:
    right = sum(entry["named_rank"] == entry["rank"] for entry in figures)
    kinds = ", ".join(sorted({entry["kind"] for entry in figures}))
    return f"{right} of {len(figures)} named rightly ({kinds}), after {spread(figures, 'seconds')} s"


def soak(figures: Figures) -> str:
    faults = sum(len(entry["faults"]) for entry in figures)
    least = min(entry["goodput"] for entry in figures)
    return f"{faults} faults, wall {spread(figures, 'wall_s', digits=0)} s; goodput {least:.0%}"


@dataclass(frozen=True)
class Row:
    """A line of the table. tests: a regular expression over `file::name`; records: one over the names of records."""

    fault: str
    expected: str
    gate: str
    tests: str
    records: str
    measured: Callable[[Figures], str] = everything
    meets: Callable[[Figures], bool] = lambda figures: True  # the gate, where tests ask for less
    needed: str = "standard"  # the least scale that has it


ROWS = [
    Row(
        "kill -9 of a random rank, at a random step and phase, also during save, start and operator build",
        "restart, exact",
        "all seeds; median to the first step at most 12 s beyond start-up; lost steps at most the save interval",
        r"chaos/test_kills\.py",
        r"kill -9 of a random rank(, while starting)?$",
        kills,
    ),
    Row(
        "kill -9 inside each of 8 sub-phases of a save",
        "a torn checkpoint is never loaded",
        "8 of 8",
        r"chaos/test_checkpoint_faults\.py.*(kill|phase)",
        r"kill.*save|sub-?phase",
    ),
    Row(
        "a node lost, 3 to 2 and 2 to 1, then back",
        "goes on, close, samples exact, global batch the same, grows again with no step lost",
        "first step at most 15 s beyond start-up",
        r"chaos/test_elastic\.py",
        r"a node lost",
    ),
    Row(
        "partition (a link goes down)",
        "ranks that are cut off end themselves; never two writers of one run",
        "at most 45 s",
        r"chaos/test_partition\.py",
        r"partition",
    ),
    Row(
        "SIGTERM; drain with 20 s notice",
        "saved at the next boundary",
        "0 steps done again",
        r"chaos/test_preemption\.py",
        r"SIGTERM|drain|preempt",
    ),
    Row(
        "a byte flipped, a file cut or deleted, of each kind in a checkpoint; a bad manifest or pointer",
        "found before any rank loads; the one before is used; the file is named",
        "all of 50 mutations",
        r"test_checkpoint\.py.*mutation",
        r"mutation|flipped|damage",
    ),
    Row(
        "disk full during save, log, index",
        "training goes on, good checkpoints stay whole, a warning; ends only after K failed saves",
        "no good checkpoint lost",
        r"chaos/test_checkpoint_faults\.py.*(disk|full)|chaos/test_quickstart_faults\.py.*full_disk",
        r"disk",
    ),
    Row(
        "NaN on one rank, ZeRO 0 to 3, fp32 and bf16",
        "left out everywhere, the samples named, weights unchanged",
        "hash equal",
        r"distributed/test_guards_distributed\.py",
        r"NaN|non-finite",
    ),
    Row(
        "a rank asleep, stopped, holding the GIL, stuck in the loader",
        "named (rank, phase, stack), restarted",
        "within max(10 median steps, 15 s); the right one in 19 of 20",
        r"chaos/test_hangs\.py(?!.*slow)",
        r"one rank hangs",
        hangs,
    ),
    Row(
        "one rank 3 times slower; clean steps",
        "named with its phase within 20 steps, no restart; no false alarm in 1,000 clean steps",
        "0 false alarms",
        r"chaos/test_hangs\.py.*slow|chaos/test_soak\.py.*thousand",
        r"one rank 3x slower|clean steps",
    ),
    Row(
        "supervisor or driver killed",
        "the same command or --attach resumes exactly",
        "no orphan process after 30 s",
        r"chaos/test_drivers\.py",
        r"supervisor or driver",
    ),
    Row(
        "head (GCS) killed and restarted",
        "resumes",
        "at most 30 s after it is back",
        r"chaos/test_head\.py",
        r"head",
    ),
    Row(
        "deterministic bug; out of memory (RLIMIT_AS)",
        "stops, with its code and the traceback once",
        "2 attempts",
        r"chaos/test_bugs\.py",
        r"deterministic bug|out of memory|sample that",
    ),
    Row(
        "soak: a random fault about every 30 s, 200 steps, 3 ranks",
        "finishes, exact or close",
        "goodput (useful step time over wall) at least 60 %",
        r"chaos/test_soak\.py.*half_minute",
        r"soak",
        soak,
        lambda figures: all(entry["goodput"] >= 0.6 for entry in figures),
    ),
]


def setting() -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
        check=False,
    )
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "interconnect": "loopback, gloo",
        "root": os.geteuid() == 0,
        "load_before": list(os.getloadavg()),
        "versions": {name: version(name) for name in ("mmscale", "torch", "deepspeed", "ray")},
    }


def files_of(rows: list[Row]) -> list[str]:
    """The test files that a row's expression can mean, of those that exist."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = str(path.relative_to(ROOT / "tests"))
        # the part of each alternative that is the file's name
        if any(re.escape(name) in row.tests for row in rows):
            found.append(str(path))
    return found


def run_tests(rows: list[Row], scale: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Runs the rows' tests; returns how each test ended, and what they have recorded."""
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        records, report = Path(folder, "records.jsonl"), Path(folder, "report.xml")
        environment = {
            **os.environ,
            "MMSCALE_CHAOS": scale,
            "MMSCALE_CHAOS_RESULTS": str(records),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-m", "not gpu and not peers", f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1", *files_of(rows)]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        noted = [json.loads(line) for line in records.read_text().splitlines()] if records.exists() else []
        return outcomes(report.read_text()), noted


def outcomes(report: str) -> list[dict[str, Any]]:
    """The tests of a report of pytest's, as {"test": "chaos/test_kills.py::test_x[0]", "outcome", "seconds", "why"}."""
    found = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        faults = [child for child in case if child.tag in ("failure", "error", "skipped")]
        outcome = "passed" if not faults else "skipped" if faults[0].tag == "skipped" else "failed"
        file = case.get("file", "").removeprefix("tests/")
        found.append(
            {
                "test": f"{file}::{case.get('name')}",
                "outcome": outcome,
                "seconds": float(case.get("time", 0)),
                "why": faults[0].get("message", "").splitlines()[0][:200]
                if faults and faults[0].get("message")
                else "",
            }
        )
    return found


def judge(row: Row, tests: list[dict[str, Any]], records: list[dict[str, Any]]) -> dict[str, Any]:
    """A row with what was measured and whether it holds: met, failed, not run, or missed: only the gate isn't met."""
    own = [test for test in tests if re.match(f"(?:{row.tests})", test["test"])]
    figures = [entry["figures"] for entry in records if re.match(f"(?:{row.records})", entry["row"])]
    ran = [test for test in own if test["outcome"] != "skipped"]
    failed = [test for test in own if test["outcome"] == "failed"]
    verdict = "failed" if failed else "not run" if not ran else "met" if row.meets(figures) else "missed"
    counted = f"{len(ran) - len(failed)} of {len(ran)} tests"
    skipped = len(own) - len(ran)
    measured = row.measured(figures) if figures else ""
    return {
        "fault": row.fault,
        "expected": row.expected,
        "measured": "; ".join(
            filter(None, [counted + (f", {skipped} skipped" if skipped else ""), measured])
        ),
        "gate": row.gate,
        "verdict": verdict,
        "failed": failed,
        "records": figures,
        "skipped": [test for test in own if test["outcome"] == "skipped"],
    }


def renewed(before: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The results with some rows measured anew; each row says at which commit."""
    rows = {row["fault"]: row for row in new["rows"]}
    tests = {test["test"]: test for test in [*before["tests"], *new["tests"]]}
    whole = [rows.pop(row["fault"], row) for row in before["rows"]] + list(rows.values())
    return before | {"rows": whole, "tests": list(tests.values())}


def table(content: dict[str, Any]) -> str:
    """The table in Markdown, with what it was measured on."""
    names = ("fault", "expected", "measured", "gate", "verdict")
    lines = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    lines += [f"| {' | '.join(row[name].replace('|', '/') for name in names)} |" for row in content["rows"]]
    where = content["setting"]
    lines += [
        "",
        f"Measured in {content['seconds'] / 60:.0f} minutes on {where['cores']} cores ({where['cpu']}, "
        f"{where['memory_gib']} GiB), commit {where['commit']}, torch {where['versions']['torch']}, deepspeed "
        f"{where['versions']['deepspeed']}, ray {where['versions']['ray']}; load before {where['load_before'][0]:.1f}.",
    ]
    again: dict[str, list[str]] = {}
    for row in content["rows"]:
        if row["setting"]["commit"] != where["commit"]:
            again.setdefault(row["setting"]["commit"], []).append(row["fault"].split(",")[0].split(";")[0])
    lines += [
        f"\nMeasured again at commit {commit}: {'; '.join(faults)}." for commit, faults in again.items()
    ]
    if content.get("peer"):
        lines += [
            "",
            "The same faults under plain Ray Train, the same worker function and the same machine:",
            "",
        ]
        lines += ["| fault | what happened |", "| --- | --- |"]
        lines += [f"| {entry['fault']} | {entry['text']} |" for entry in content["peer"]]
    return "\n".join(lines)


def update_page(text: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not rest or not after:
        raise SystemExit(f"{PAGE} lacks the lines between which the table belongs")
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def run_peer() -> list[dict[str, Any]]:
    """Plain Ray Train under faults, in a process of its own."""
    command = [sys.executable, str(PEER)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"fault"')]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--scale", choices=("ci", "standard", "full"), default="standard")
    parser.add_argument("--only", metavar="TEXT", help="rows whose fault holds this; writes nothing")
    parser.add_argument(
        "--again", metavar="TEXT", nargs="+", help="rows whose fault holds one of these, anew"
    )
    parser.add_argument("--peer", choices=("ray-train",), help="only this, into the results file")
    parser.add_argument("--table", action="store_true", help="the table anew from the results file")
    args = parser.parse_args()
    path = RESULTS / f"reliability-{args.scale}.json"

    if args.table or args.peer:
        content = json.loads(path.read_text())
        if args.peer:
            content["peer"] = run_peer()
    else:
        wanted = args.again or ([args.only] if args.only else [""])
        rows = [row for row in ROWS if any(text in row.fault for text in wanted)]
        where, begin = setting(), time.monotonic()
        tests, records = run_tests(rows, args.scale)
        content = {
            "setting": where,
            "scale": args.scale,
            "seconds": time.monotonic() - begin,
            "rows": [judge(row, tests, records) | {"setting": where} for row in rows],
            "tests": tests,
        }
        if args.again and path.exists():
            content = renewed(json.loads(path.read_text()), content)
        if args.scale == "full" and args.only is None:
            content["peer"] = run_peer()
    text = table(content)
    print(text)
    if args.only is None:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if args.scale == "standard":  # what everyone can run
            update_page(text)
    return int(any(row["verdict"] == "failed" for row in content["rows"]))


if __name__ == "__main__":
    sys.exit(main())
