"""How progress looks: plain lines in a pipe, one bar on a terminal, and what of the ranks it tells."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import struct
import termios
from typing import Any

import pytest

from mmscale.progress import ProgressBar, clock_text, rank_facts


def events(total: int | None) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = [{"event": "message", "text": "64 samples, 8 a step"}]
    for step in (10, 20):
        eta = None if total is None else 130.0 - step
        facts = {"loss": 30 / step, "samples_per_s": 267.7, "data_wait_frac": 0.021, "eta_s": eta}
        said.append({"event": "log", "step": step, "total_steps": total, **facts})
    said += [
        {"event": "eval", "step": 20},
        {"event": "message", "text": "resumed"},
        {"event": "save", "step": 20},
    ]
    return said


def test_progress_in_a_pipe_is_plain_lines() -> None:
    out = io.StringIO()
    bar = ProgressBar(out)
    for event in [*events(800), *events(None)[1:2]]:
        bar.update(event)
    bar.close()
    assert out.getvalue().splitlines() == [
        "64 samples, 8 a step",
        "step 10/800: loss 3.000, 268 samples/s, data wait 2%, ETA 2:00",
        "step 20/800: loss 1.500, 268 samples/s, data wait 2%, ETA 1:50",
        "resumed",
        "step 10: loss 3.000, 268 samples/s, data wait 2%, ETA ?",
    ]


def drawn_on_a_terminal(said: list[dict[str, Any]], *, columns: int) -> list[str]:
    """What a terminal of this width shows: its lines after all carriage returns have done their work."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(follower, "w", encoding="utf-8") as terminal:
        bar = ProgressBar(terminal)
        for event in said:
            bar.update(event)
        bar.close()
    parts = []
    with contextlib.suppress(OSError):  # how a terminal whose other side is closed says that it is empty
        while part := os.read(leader, 4096):
            parts.append(part)
    os.close(leader)
    written = b"".join(parts).decode()
    assert "\x1b[A" not in written, "one line is enough"
    lines = []
    for row in written.replace("\r\n", "\n").split("\n"):
        shown = ""
        for text in row.split("\r"):
            shown = text + shown[len(text) :]
        lines.append(shown.rstrip())
    return [row for row in lines if row]


@pytest.mark.parametrize(
    ("total", "last"),
    [
        (800, "  2% |▎         | 20/800  loss 1.500  268 samples/s  data wait 2%  ETA 1:50"),
        (None, "step 20  loss 1.500  268 samples/s  data wait 2%  ETA ?"),
    ],
)
def test_progress_on_a_terminal_is_one_bar_with_messages_above(total: int | None, last: str) -> None:
    assert drawn_on_a_terminal(events(total), columns=80) == ["64 samples, 8 a step", "resumed", last]


def test_a_narrow_terminal_never_wraps() -> None:
    assert all(len(text) <= 40 for text in drawn_on_a_terminal(events(800), columns=40))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599.4, "59:59"), (3600, "1:00:00")]
)
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def ranks(*phases: tuple[str, float], step: int = 20, nodes: int = 2, **status: Any) -> dict[str, Any]:
    """What the supervisor tells: one rank for each (phase, seconds in it)."""
    rows = [
        {"rank": i, "node": f"n{i % nodes}", "step": step, "phase": phase, "phase_s": s, "process": "running"}
        for i, (phase, s) in enumerate(phases)
    ]
    return {
        "event": "ranks",
        "status": {"state": "running", "restarts": 0, "idle_workers": 0, "ranks": rows, **status},
    }


def test_the_bar_names_the_rank_that_is_behind() -> None:
    slow = ranks(("sync", 7.0), ("data", 6.6), ("sync", 7.1), restarts=2, idle_workers=1)
    *_, last = drawn_on_a_terminal([*events(800), slow], columns=140)
    assert last == (
        "  2% |▎         | 20/800  loss 1.500  268 samples/s  data wait 2%  ETA 1:50"
        "  3 ranks on 2 nodes  1 worker idle  2 restarts  rank 1 data 7 s"
    )


def test_before_the_first_step_the_bar_says_what_happens() -> None:
    assert drawn_on_a_terminal([ranks(("start", 9.0), ("start", 4.0), state="starting")], columns=80) == [
        "starting  2 ranks on 2 nodes  rank 0 start 9 s"
    ]


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        (ranks(("forward", 0.1)), []),
        (ranks(("forward", 0.1), ("sync", 30.0), nodes=1), ["2 ranks"]),
        (ranks(("sync", 90.0), ("backward", 31.0)), ["2 ranks on 2 nodes", "rank 1 backward 31 s"]),
        (ranks(("done", 90.0), state="done"), ["done"]),
        (ranks(state="restarting", restarts=1), ["restarting", "1 restart"]),
    ],
)
def test_ranks_are_told_of_where_it_matters(event: dict[str, Any], facts: list[str]) -> None:
    assert rank_facts(event["status"]) == facts


def test_a_stopped_process_comes_before_a_slow_one() -> None:
    event = ranks(("sync", 90.0), ("backward", 31.0), nodes=1)
    event["status"]["ranks"][0]["process"] = "stopped"
    assert rank_facts(event["status"]) == ["2 ranks", "rank 0 stopped"]


def test_a_pipe_gets_no_line_for_what_changes_each_second() -> None:
    out = io.StringIO()
    bar = ProgressBar(out)
    for _ in range(50):
        bar.update(ranks(("sync", 7.0), ("data", 6.6), restarts=2))
    for event in events(800):
        bar.update(event)
    bar.close()
    assert out.getvalue().splitlines()[1:2] == [
        "step 10/800: loss 3.000, 268 samples/s, data wait 2%, ETA 2:00, 2 restarts"
    ]
    assert len(out.getvalue().splitlines()) == 4
