"""The Markdown table of a result file. Standard library alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

STEPS = {"forward": "forward", "forward_backward": "forward + backward", "backward": "backward"}


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines: a run that was cut off may leave half of one at the end."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


def table(lines: Iterable[dict[str, Any]]) -> str:
    """One table a case and pass; then checks, and all that was not measured."""
    lines = list(lines)
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_kind.setdefault(line["kind"], []).append(line)
    out = []
    for machine in by_kind.get("machine", []):
        name = machine.get("device_name", "?")
        parts = [
            f"device: {name}",
            *(f"{k} {machine[k]}" for k in ("driver", "torch", "triton") if machine.get(k)),
        ]
        if machine.get("commit"):
            parts.append(f"commit {machine['commit'][:12]}{' with changes' if machine.get('dirty') else ''}")
        if "; ".join(parts) not in out:  # each worker says it
            out.append("; ".join(parts))
    for ceiling in by_kind.get("ceiling", []):
        out.append(f"{ceiling['name']}: {number(ceiling['value'])} {ceiling['unit']}")
    for tests in by_kind.get("tests", []):
        out.append(f"GPU tests: {tests['summary']}")
    rows = by_kind.get("row", [])
    for case in dict.fromkeys(row["case"] for row in rows):
        for step, title in STEPS.items():
            part = [row for row in rows if row["case"] == case and row["step"] == step]
            if not part:
                continue
            where = " (on a CPU)" if part[0]["device"] == "cpu" else ""
            where += " (tiny sizes: no measurement)" if part[0]["tiny"] else ""
            ours = next((row["ms"]["p50"] for row in part if row["contender"] == "ours"), None)
            out += ["", f"**{case}**, {title}{where}", ""]
            out.append(
                "| | p50 ms | p20 - p80 | time / ours | extra MiB | % of product | % of copy | largest error | |"
            )
            out.append("| --- " * 9 + "|")
            for row in sorted(part, key=lambda row: row["ms"]["p50"]):
                ms = row["ms"]
                out.append(
                    f"| {row['contender']} | {number(ms['p50'])} | {number(ms['p20'])} - {number(ms['p80'])} "
                    f"| {number(ms['p50'] / ours) if ours else ''} | {number(row['peak_extra_mib'])} "
                    f"| {number(row.get('percent_of_product'))} | {number(row.get('percent_of_copy'))} "
                    f"| {number(max(row['error'].values()) if row['error'] else None, 2)} | {row['note']} |"
                )
    checks = by_kind.get("check", [])
    if checks:
        out += ["", "| check | operator | |", "| --- | --- | --- |"]
        for check in checks:
            known = {"kind", "time", "check", "operator", "passed", "device"}
            rest = ", ".join(f"{k} {v}" for k, v in check.items() if k not in known)
            out.append(
                f"| {check['check']} | {check['operator']} | {'yes' if check['passed'] else '**no**'} {rest} |"
            )
    missing = by_kind.get("failure", []) + by_kind.get("skipped", []) + by_kind.get("absent", [])
    if missing:
        out += ["", "Not measured:", ""]
        texts = [
            f"- {' / '.join(str(line[k]) for k in ('case', 'contender', 'step') if line.get(k))}: "
            f"{line.get('error') or line.get('why')}"
            for line in missing
        ]
        out += dict.fromkeys(texts)
    return "\n".join(out) + "\n"
