"""A run seen from outside, through its folder: what it does, its logs, asking it to stop, taking it up again.

::

    look(run)                            # the facts of `mmscale status`
    stop(run, timeout=600)               # asks it to save and stop, and waits until it has
    for line in log_lines(run, 0, follow=True): ...
    attach(run, on_event=bar.update)     # follows its launcher, or launches it again where that has died

It works for `mmscale train`, torchrun and `mmscale launch` alike, from any machine that sees the folder, and needs no
Ray until a run is taken up again. The trade-off: what it knows is what the run wrote, up to a second ago, and on a file
system without locks a run that `mmscale train` began can't be told from one that died.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmscale.config import Config, load_config
from mmscale.errors import ConfigError, UserError
from mmscale.progress import clock_text, slowest
from mmscale.runs import STOP_FILE, checkpoints_of, is_finished
from mmscale_launcher.status import is_alive, read_status

ENDED = ("done", "stopped", "failed")  # states that don't change by themselves
POLL_S = 0.5
LEASE_SLACK_S = 15.0  # beyond launch.lease_s, until the ranks of a launcher that died are gone

TAIL_BYTES = 1 << 16  # of metrics.jsonl, whose last line is wanted

OnEvent = Callable[[dict[str, Any]], None]


class Ended(UserError):
    """A run that was followed ended otherwise than done; `exit_code` is that of its launcher."""


# -------------------------------------------------------------------------------------------------- looking


def look(run: Path) -> dict[str, Any]:
    """What the run does: status.json's fields, `alive`, and `state`, which may also be `lost`: its launcher has died.

    A run that no launcher supervises has the fields that its folder tells of. Raises ConfigError if it isn't one.
    """
    config = _config(run)
    status, owner = read_status(run), holder(run)
    if status is not None and is_alive(status) and status["state"] not in ENDED:
        return {**status, "alive": True}
    facts = _facts(run, config)
    if owner is not None:  # ranks of `mmscale train`, or such as outlive their launcher for some seconds
        return {**facts, "alive": True, "state": "running", "owner": owner}
    if is_finished(run):
        state, error = "done", None
    elif status is None:
        state, error = "stopped", None
    else:
        state, error = status["state"] if status["state"] in ENDED else "lost", status.get("error")
        facts = {**status, **{name: value for name, value in facts.items() if value is not None}}
    return {**facts, "alive": False, "state": state, "error": error}


def holder(run: Path) -> str | None:
    """Who has claimed the run's folder, where its file system has locks."""
    try:
        with (run / "lock").open(encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:  # there is no such file, or there are no locks
        return None
    return None


def to_text(run: Path, status: dict[str, Any]) -> str:
    """`mmscale status` for people."""
    words = {
        "lost": "lost: its launcher has died; `mmscale launch --attach` takes it up again",
        "stopped": "stopped; the same command, or `mmscale launch --attach`, goes on",
    }
    state = words.get(status["state"], status["state"])
    step, total = status.get("step"), status.get("total_steps")
    place = "before its first step" if step is None else f"step {step}" + (f" of {total}" if total else "")
    figures = [place]
    for name, form in (
        ("loss", "loss {:.3f}"),
        ("samples_per_s", "{:.0f} samples/s"),
        ("data_wait_frac", "data wait {:.0%}"),
    ):
        if status.get(name) is not None:
            figures.append(form.format(status[name]))
    if status["alive"] and status.get("eta_s") is not None:
        figures.append(f"ETA {clock_text(status['eta_s'])}")
    lines = [f"{run}: {state}", ", ".join(figures)]
    if status.get("launcher"):
        lines.append(
            f"launcher: process {status['launcher']['pid']} on {status['launcher']['host']}, "
            f"attempt {status.get('attempt')}, {status.get('restarts') or 0} restarts, "
            f"{status.get('idle_workers') or 0} idle workers"
        )
    elif status.get("owner"):
        lines.append(f"trained by {status['owner']}")
    lines.append(f"checkpoint: {status.get('checkpoint') or 'none yet'}")
    ranks = (status.get("ranks") or []) if status["alive"] else []
    last = slowest(ranks) if len(ranks) > 1 else None
    if ranks:
        rows: list[tuple[str, ...]] = [("rank", "node", "process", "step", "phase", "for", "memory")]
        rows += [_row(rank) for rank in ranks]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row, rank in zip(rows, [None, *ranks], strict=True):
            text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            lines.append(text + ("  <- last" if rank is not None and rank is last else ""))
    if status.get("messages"):
        lines += ["it said last:", *(f"  {text}" for text in status["messages"][-5:])]
    if status.get("error"):
        lines.append(f"error: {status['error']}")
    return "\n".join(lines)


def _row(rank: dict[str, Any]) -> tuple[str, ...]:
    memory, seconds = rank.get("memory_gib"), rank.get("phase_s")
    return (
        str(rank["rank"]),
        str(rank.get("address") or rank.get("node") or "?"),
        f"{rank.get('process', '?')} {rank.get('pid') or ''}".rstrip(),
        str(rank.get("step", "?")),
        str(rank.get("phase") or "?"),
        "?" if seconds is None else f"{seconds:.1f} s",
        "?" if memory is None else f"{memory:.1f} GiB",
    )


def _config(run: Path) -> Config:
    if not (run / "config.json").is_file():
        what = "holds no config.json, so it isn't a run's folder" if run.is_dir() else "there is no such run"
        raise ConfigError(f"{run}: {what}")
    return load_config(run / "config.json")


def _facts(run: Path, config: Config) -> dict[str, Any]:
    """What metrics and checkpoints tell."""
    from mmscale.checkpoint import complete

    line = _last_metrics(run) or {}
    total = int(config.train.duration) if config.train.duration.isdigit() else None
    names = ("step", "loss", "samples_per_s", "data_wait_frac")
    place = checkpoints_of(config, run)
    paths = complete(place)
    return {
        **{name: line.get(name) for name in names},
        "total_steps": total,
        "checkpoint": str(paths[-1]) if paths else None,
    }


def _last_metrics(run: Path) -> dict[str, Any] | None:
    """The last whole line of metrics.jsonl, which may be long, and is being written."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return None
    for text in reversed(lines):
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError:
            continue
        return line
    return None


# -------------------------------------------------------------------------------------------------- stopping


def stop(run: Path, *, timeout: float) -> dict[str, Any]:
    """Asks a run to save and stop, and waits until it has; returns what `look` says then.

    Raises UserError if it isn't running, or still is after `timeout` seconds; the request then stands.
    """
    status = look(run)
    if not status["alive"]:
        raise UserError(f"{run} isn't running, it is {status['state']}")
    deadline = time.monotonic() + timeout
    while status["alive"]:
        # Each time: a run that is only starting takes the file for one that was meant for those before it.
        (run / STOP_FILE).touch()
        if time.monotonic() >= deadline:
            raise UserError(
                f"{run} hasn't stopped within {timeout:g} s; it was asked to, and will when its step ends. "
                f"It is at step {status.get('step')}"
            )
        time.sleep(POLL_S)
        status = look(run)
    return status


# ------------------------------------------------------------------------------------------------------ logs


def log_lines(run: Path, rank: int, *, follow: bool) -> Iterator[str]:
    """The text of a rank's log, in pieces; follow: and what comes, until the run has ended.

    Raises ConfigError if there is no such rank.
    """
    _config(run)
    path = run / "logs" / f"rank-{rank}.log"
    if not path.is_file():
        found = (re.fullmatch(r"rank-(\d+)\.log", entry.name) for entry in (run / "logs").glob("rank-*.log"))
        ranks = sorted(int(match[1]) for match in found if match)
        listed = f"there are {', '.join(map(str, ranks))}" if ranks else "the run hasn't begun to log"
        raise ConfigError(f"--rank {rank}: {run} has no log of that rank; {listed}")
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        while True:
            alive = follow and look(run)["alive"]  # before reading, so that the last words are read
            while text := file.read(1 << 16):
                yield text
            if not alive:
                return
            time.sleep(POLL_S)


# ----------------------------------------------------------------------------------------------- taking up


def attach(run: Path, *, on_event: OnEvent) -> dict[str, Any]:
    """Follows a launched run until it ends, taking it up again if its launcher has died, and returns its report.

    Raises Ended with the launcher's exit code if it ended otherwise than done, UserError if a process without a
    launcher has the run, and what `launch` raises once it is taken up again.
    """
    config = _config(run)
    status = read_status(run)
    if status is not None and is_alive(status) and status["state"] not in ENDED:
        owner = status["launcher"]
        on_event(_message(f"following process {owner['pid']} on {owner['host']}"))
        status = _follow(run, on_event)
        if status["state"] in ENDED:
            return _end(run, status)
        on_event(_message("its launcher has died; taking the run up again"))
    if is_finished(run):
        return _report(run)
    _wait_until_free(run, config, on_event, launched=status is not None)
    from mmscale_launcher import launch

    again = config.run.model_copy(update={"dir": str(run), "resume": "auto"})
    config = config.model_copy(update={"run": again})
    return launch(config, address=(status or {}).get("address"), on_event=on_event)


def _follow(run: Path, on_event: OnEvent) -> dict[str, Any]:
    """Hands on what status.json and metrics.jsonl tell, until the launcher ends; returns the last status."""
    told: list[str] = []
    step = -1
    while True:
        status = read_status(run)
        assert status is not None, "it is replaced, never removed"
        messages = status.get("messages") or []
        for text in _news(told, messages):
            on_event(_message(text))
        told = messages
        on_event({"event": "ranks", "status": status})
        line = _last_metrics(run)
        if line is not None and line["step"] != step:
            step = line["step"]
            shown = {"total_steps": status.get("total_steps"), "eta_s": status.get("eta_s")}
            on_event({"event": "log", **shown, **line})
        if status["state"] in ENDED or not is_alive(status):
            return status
        time.sleep(POLL_S)


def _news(before: list[str], now: list[str]) -> list[str]:
    """What the list `now` of the last messages has beyond that of a moment ago."""
    for start in range(len(before) + 1):
        rest = before[start:]
        if now[: len(rest)] == rest:
            return now[len(rest) :]
    return now


def _end(run: Path, status: dict[str, Any]) -> dict[str, Any]:
    if status["state"] == "done" and is_finished(run):
        return _report(run)
    error = Ended(status.get("error") or f"{run}: {status['state']}")
    error.exit_code = status.get("exit_code") or 1
    raise error


def _report(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    return report


def _wait_until_free(run: Path, config: Config, on_event: OnEvent, *, launched: bool) -> None:
    """Ranks whose launcher has died end by themselves when its lease is over; others are somebody's."""
    patience = config.launch.lease_s + LEASE_SLACK_S if launched else 0.0
    deadline, told = time.monotonic() + patience, False
    while (owner := holder(run)) is not None:
        if time.monotonic() >= deadline:
            raise UserError(
                f"{run} is in use by {owner}, which no launcher supervises: wait for it, or stop it"
            )
        if not told:
            on_event(_message(f"waiting for the ranks that the launcher left ({owner}) to end"))
            told = True
        time.sleep(POLL_S)


def _message(text: str) -> dict[str, Any]:
    return {"event": "message", "text": text}
