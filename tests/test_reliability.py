"""The fault table of benchmarks/reliability.py: a row is met only where its tests have run and passed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import reliability
from reliability import ROWS, judge, outcomes

REPORT = """<testsuites><testsuite>
<testcase file="tests/chaos/test_drivers.py" name="test_a[1]" time="3.5"/>
<testcase file="tests/chaos/test_drivers.py" name="test_b" time="1"><failure message="still there&#10;more"/></testcase>
<testcase file="tests/chaos/test_bugs.py" name="test_c" time="2"/>
<testcase file="tests/chaos/test_head.py" name="test_d" time="0"><skipped message="needs root"/></testcase>
<testcase file="tests/chaos/test_soak.py" name="test_a_fault_each_half_minute[0]" time="9"/>
</testsuite></testsuites>"""


def verdicts(records: list[dict[str, object]]) -> dict[str, dict[str, object]]:
    return {row.tests: judge(row, outcomes(REPORT), records) for row in ROWS}


def test_a_row_is_what_its_tests_are() -> None:
    found = {tests.split("\\")[0]: row for tests, row in verdicts([]).items()}
    assert found["chaos/test_drivers"]["verdict"] == "failed"
    assert found["chaos/test_drivers"]["measured"] == "1 of 2 tests"
    assert [test["why"] for test in found["chaos/test_drivers"]["failed"]] == ["still there"]  # type: ignore[attr-defined]
    assert found["chaos/test_bugs"]["verdict"] == "met"
    assert found["chaos/test_head"]["verdict"] == "not run"
    assert found["chaos/test_kills"]["verdict"] == "not run"  # no test of it: not a success


def test_what_was_recorded_stands_in_its_row_alone() -> None:
    records = [
        {
            "row": "kill -9 of a random rank",
            "figures": {"lost_steps": lost, "seconds": 10.0 + lost, "start_s": 8.0},
        }
        for lost in (2, 4, 9)
    ]
    records.append({"row": "kill -9 of a random rank, median", "figures": {"seconds_beyond_start": 6.0}})
    measured = {row.fault: judge(row, [], records)["measured"] for row in ROWS}
    [kills] = [text for text in measured.values() if "3 kills" in text]
    assert "first step after 6.0 (at most 11.0) s beyond start-up (8.0 (at most 8.0) s)" in kills
    assert "lost steps 4 (at most 9)" in kills


@pytest.mark.parametrize(("goodput", "verdict"), [(0.61, "met"), (0.59, "missed")])
def test_a_gate_that_is_missed_is_not_met(goodput: float, verdict: str) -> None:
    figures = {"faults": [{}], "wall_s": 100.0, "goodput": goodput}
    judged = [judge(row, outcomes(REPORT), [{"row": "soak", "figures": figures}]) for row in ROWS]
    [row] = [row for row in judged if row["fault"].startswith("soak")]
    assert row["verdict"] == verdict
    assert f"goodput {goodput:.0%}" in row["measured"]


def test_rows_measured_again_say_so() -> None:
    def content(commit: str, rows: list[reliability.Row]) -> dict[str, object]:
        where = {"commit": commit, "cores": 2, "cpu": "a cpu", "memory_gib": 8, "load_before": [0.5]}
        where["versions"] = {"torch": "2", "deepspeed": "0", "ray": "2"}
        tests = outcomes(REPORT)
        judged = [judge(row, tests, []) | {"setting": where} for row in rows]
        return {"setting": where, "seconds": 60.0, "rows": judged, "tests": tests}

    before, new = content("aaa", ROWS), content("bbb", ROWS[:1])
    whole = reliability.renewed(before, new)
    assert [row["setting"]["commit"] for row in whole["rows"]] == ["bbb"] + ["aaa"] * (len(ROWS) - 1)
    assert whole["tests"] == before["tests"]
    assert "Measured again at commit bbb: kill -9 of a random rank." in reliability.table(whole)
    assert "Measured again" not in reliability.table(before)


def test_the_table_goes_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{reliability.BEGIN}\nold\n{reliability.END}\nafter\n")
    monkeypatch.setattr(reliability, "PAGE", page)
    reliability.update_page("| new |")
    assert page.read_text() == f"before\n{reliability.BEGIN}\n\n| new |\n\n{reliability.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        reliability.update_page("| new |")


def test_every_row_finds_what_its_tests_record() -> None:
    texts = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    names = {name for text in texts for name in re.findall(r'\brecord\(\s*f?"([^"]+)"', text)}
    names |= {name for text in texts for name in re.findall(r'^ROW = "([^"]+)"', text, re.MULTILINE)}
    names = {name.replace("{how}", "SIGTERM") for name in names}
    silent = {row.fault for row in ROWS if not any(re.match(f"(?:{row.records})", name) for name in names)}
    assert {fault.split(",")[0] for fault in silent} == {
        "a byte flipped",
        "NaN on one rank",
    }  # counted by tests


def test_every_row_names_a_test_file_of_its_own() -> None:
    files = reliability.files_of(ROWS)
    assert files
    assert len({row.tests for row in ROWS}) == len(ROWS)
