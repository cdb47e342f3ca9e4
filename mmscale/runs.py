"""A run's folder: who may use it, what was evaluated, one log for each rank.

`open_run` claims `runs/NAME`: an unfinished run of the same config is gone on with, a finished one is left alone and
the next free name taken, and an unfinished one of another config is refused with the differences in words, unless it
has no checkpoint yet: then there is nothing to lose, and the folder is taken over. A folder has one process at a time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mmscale.checkpoint import complete
from mmscale.config import Config, load_config
from mmscale.errors import ConfigError, Fenced, UserError
from mmscale.metrics import Event, Writer, read_json_lines, write_json_lines, write_whole
from mmscale.tasks.base import Metric
from mmscale.world import World

# What may differ between a run and its resumption without changing what is computed from good samples.
FREE_TO_CHANGE = (
    "run.resume:",
    "run.name:",
    "run.dir:",
    "launch.",
    "data.train:",  # the same shards may have moved: the stream's state holds their fingerprint
    "data.train.",
    "data.weights.",  # a change is recorded, and holds from the resumed step on
    "data.weight_by:",
    "data.threads:",
    "data.buffer_mb:",
    "data.stall_s:",
    "data.storage.",
    "data.prefetch:",
    "data.cache_mb:",
    "data.on_error:",
    "data.error_budget:",
    "guard.",
    "train.accumulation:",  # another number of workers, the same global batch
    "train.log_every:",
    "train.log_keys:",
    "train.save_every:",
    "train.save_clock:",
    "train.keep_checkpoints:",
    "train.keep_best:",
    "train.max_failed_saves:",
    "engine.timeout:",
)

ATTEMPT = "MMSCALE_ATTEMPT"  # in the environment: the id of the attempt that a launcher has begun
CAPTURE = "MMSCALE_CAPTURE_OUTPUT"  # in the environment: whatever the process writes goes to the rank's log
STOP_FILE = "stop"  # in a run's folder: asks it to save and stop
STOP_PATIENCE_S = 1.0  # between looks at that file, which may lie on a network file system

LOCK_PATIENCE_S = 5.0  # how long a process that was just killed may take to let go of its run


class Run:
    """The folder of a run as one rank sees it. Only rank 0 writes into it, but for the rank's own log.

    lock: on rank 0, what keeps other processes out until `close`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        checkpoints: Path | str | None = None,
        lock: TextIO | None = None,
        attempt: str | None = None,
    ) -> None:
        self.folder, self.rank, self._lock = folder, rank, lock
        self.checkpoints: Path | str = folder / "checkpoints" if checkpoints is None else checkpoints
        self.emit: Callable[[Event], None] = lambda event: None
        self.attempt = attempt
        self._log = folder / "logs" / f"rank-{rank}.log"
        self._keys: TextIO | None = None
        self._at_end: list[Callable[[], None]] = []
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if os.environ.get(CAPTURE):
            _capture(self._log)

    def call_at_end(self, callback: Callable[[], None]) -> None:
        """Before the run is closed, however it ends."""
        self._at_end.append(callback)

    def close(self) -> None:
        while self._at_end:
            self._at_end.pop()()
        for file in (self._keys, self._lock):
            if file is not None:
                file.close()

    def check_owner(self) -> None:
        """Raises Fenced if another attempt has taken the run over since: whoever writes then must stop."""
        owner = (self.folder / "attempt").read_text(encoding="utf-8").strip()
        if self.attempt is not None and owner != self.attempt:
            raise Fenced(f"{self.folder} belongs to attempt {owner} by now; this is {self.attempt}")

    def log_keys(self, step: int, keys: Sequence[str]) -> None:
        """Notes which samples this rank's part of a step was made of."""
        if self._keys is None:
            path = _keys_file(self.folder, self.rank)
            path.parent.mkdir(exist_ok=True)
            self._keys = path.open("a", encoding="utf-8", buffering=1)
        self._keys.write(json.dumps({"step": step, "keys": list(keys)}, ensure_ascii=False) + "\n")

    def forget_keys(self, after: int) -> None:
        """Rank 0, before the others write: drops what was noted of steps that will be done again."""
        for path in self.folder.glob(str(_keys_file(Path(), "*"))):
            write_json_lines(path, [line for line in read_json_lines(path) if line["step"] <= after])

    def log(self, text: str) -> None:
        # A log must not end what it tells of, as on a full disk.
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def tell(self, event: Event) -> None:
        """An event for whoever watches; the words of a message go into the log, too."""
        if event["event"] == "message":
            self.log(event["text"])
        self.emit(event)

    def say(self, text: str) -> None:
        """To the rank's log, and to the terminal from rank 0."""
        self.log(text)
        if self.rank == 0:
            self.emit({"event": "message", "text": text})

    def record(self, error: BaseException) -> None:
        """Why the rank ended: in words for a user's error, with the traceback for any other."""
        if isinstance(error, UserError | KeyboardInterrupt):
            self.log(f"{type(error).__name__}: {error}")
        else:
            self.log("".join(traceback.format_exception(error)))

    def add_evaluation(
        self, step: int, name: str, results: Mapping[str, Mapping[str, Metric]], writer: Writer | None
    ) -> None:
        if self.rank != 0:
            return
        entry = {
            "step": step,
            "set": name,
            "tasks": {
                task: {k: m._asdict() for k, m in metrics.items()} for task, metrics in results.items()
            },
        }
        write_json_lines(self.folder / "evals.jsonl", [*self.evaluations(), entry])
        if writer is not None:
            writer.scalars(
                step,
                {
                    f"eval/{name}/{t}/{k}": m.value
                    for t, metrics in results.items()
                    for k, m in metrics.items()
                },
            )
        self.emit({"event": "eval", **entry})

    def scores(self, metric: str | None) -> dict[int, float]:
        """What the evaluations gave for SET/TASK/METRIC, by step; rank 0's, nothing on others."""
        if metric is None or self.rank != 0:
            return {}
        found: dict[int, float] = {}
        known: set[str] = set()
        for entry in self.evaluations():
            for task, metrics in entry["tasks"].items():
                names = {f"{entry['set']}/{task}/{name}": part["value"] for name, part in metrics.items()}
                known.update(names)
                if metric in names:
                    found[entry["step"]] = names[metric]
        if known and not found:
            listed = "\n  ".join(sorted(known))
            self.say(f"train.keep_best={metric} keeps nothing: the evaluations give\n  {listed}")
        return found

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far; of two at one step and set, as a restart makes them, the later one."""
        entries = read_json_lines(self.folder / "evals.jsonl")
        return list({(entry["step"], entry["set"]): entry for entry in entries}.values())


def open_run(config: Config, world: World) -> Run:
    """Claims the run's folder. Collective: rank 0 decides. Raises ConfigError on every rank."""
    folder, lock, attempt, error = None, None, None, None
    if world.rank == 0:
        try:
            folder, lock = _claim(config)
            attempt = os.environ.get(ATTEMPT) or uuid.uuid4().hex
            write_whole(folder / "attempt", f"{attempt}\n")
            (folder / STOP_FILE).unlink(missing_ok=True)  # it was for those before us
        except OSError as caught:
            error = ConfigError(f"the run's folder can't be made: {caught}")
        except ConfigError as caught:
            error = caught
    world.agree(error)
    folder, attempt = world.gather((folder, attempt))[0]
    place = checkpoints_of(config, folder)
    return Run(folder, rank=world.rank, checkpoints=place, lock=lock, attempt=attempt)


def checkpoints_of(config: Config, folder: Path) -> Path | str:
    """Where the checkpoints of a run in `folder` lie: a local path, or the text of an fsspec URL."""
    if config.run.checkpoints is None:
        return folder / "checkpoints"
    if "://" in config.run.checkpoints:
        return f"{config.run.checkpoints.rstrip('/')}/{folder.name}"
    return Path(config.run.checkpoints) / folder.name


def run_folder(config: Config) -> Path:
    return Path(config.run.dir) if config.run.dir is not None else Path("runs") / config.run.name


def is_finished(folder: Path) -> bool:
    return (folder / "report.json").is_file()


def _claim(config: Config) -> tuple[Path, TextIO]:
    first, resume = run_folder(config), config.run.resume
    folder, number = first, 1
    while True:
        if not _is_taken(folder, resume):
            if resume == "must" and not complete(checkpoints_of(config, folder)):
                finished = f"; {first} is finished" if is_finished(first) else ""
                raise ConfigError(
                    f"run.resume=must: there is no checkpoint to resume from in {folder}{finished}"
                )
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            if not _is_taken(folder, resume):  # its last user may have finished while we waited
                break
            lock.close()
        if config.run.dir is not None:
            state = "a finished run" if is_finished(folder) else "a run, and run.resume=never"
            raise ConfigError(
                f"run.dir={folder} holds {state}: give another folder, or run.name in its place"
            )
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    try:
        if _has_checkpoint(folder, config):
            _check_same(folder, config)
        else:
            _start_over(folder, config)
    except BaseException:
        lock.close()
        raise
    return folder, lock


def _has_checkpoint(folder: Path, config: Config) -> bool:
    """Where the folder's own config puts them: under another run.checkpoints a run would start over silently."""
    if (folder / "config.json").is_file():
        config = load_config(folder / "config.json")
    return bool(complete(checkpoints_of(config, folder)))


def _is_taken(folder: Path, resume: str) -> bool:
    return (folder / "config.json").is_file() and (is_finished(folder) or resume == "never")


def _check_same(folder: Path, config: Config) -> None:
    """Raises ConfigError where going on would compute something else than what was begun."""
    before = load_config(folder / "config.json")
    changed = [d for d in before.differences(config) if not d.startswith(FREE_TO_CHANGE)]
    if changed:
        listed = "\n  ".join(changed)
        raise ConfigError(
            f"{folder} holds an unfinished run of another configuration:\n  {listed}\n"
            "give the same one to go on with it, run.name=... for another folder, or run.resume=never"
        )


def _start_over(folder: Path, config: Config) -> None:
    """Makes the folder this config's, without what a run left that ended before its first checkpoint."""
    for pattern in ("metrics.jsonl", "evals.jsonl", "quarantine.jsonl", "events.out.tfevents.*", "keys/*"):
        for path in folder.glob(pattern):
            path.unlink()
    write_whole(folder / "config.json", config.to_json())


def _lock(folder: Path) -> TextIO:
    """Keeps other processes out of a run's folder, until the file is closed or this process ends, however it ends."""
    file = (folder / "lock").open("a+", encoding="utf-8")
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                raise ConfigError(
                    f"{folder} is in use by {file.read().strip() or 'another process'}: "
                    "wait for it, or give run.name=... for another folder"
                ) from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


class StopRequest:
    """Whether this rank has been told to save and stop: by SIGTERM, or by a file in the run's folder.

    Signals reach us until `close`, and only in the main thread. on_signal: called in the handler. Python drops a
    KeyboardInterrupt that is raised where nothing can be, as in a callback of the collector or of an import: so an
    interrupt is remembered, and raised again by the next look at `by_signal`.
    """

    def __init__(self, on_signal: Callable[[], None] = lambda: None) -> None:
        self._requested, self._interrupted, self._on_signal = False, False, on_signal
        self._before: dict[int, Any] = {}
        self._looked_s, self._by_file = float("-inf"), False
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    @property
    def by_signal(self) -> bool:
        if self._interrupted:
            raise KeyboardInterrupt
        return self._requested

    def by_file(self, folder: Path) -> bool:
        """Looks into the run's folder, once a second at most."""
        now = time.monotonic()
        if not self._by_file and now - self._looked_s >= STOP_PATIENCE_S:
            self._looked_s, self._by_file = now, (folder / STOP_FILE).exists()
        return self._by_file

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: object) -> None:
        self._requested = True
        self._on_signal()

    def _interrupt(self, number: int, frame: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt


def _keys_file(folder: Path, rank: int | str) -> Path:
    return folder / "keys" / f"rank-{rank}.jsonl"


def _capture(log: Path) -> None:
    """Lets this process, and libraries in it, write to the rank's log; SIGUSR2 makes it write its Python stacks."""
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable(file=2)
    faulthandler.register(signal.SIGUSR2, file=2)
