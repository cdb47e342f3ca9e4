"""A run's folder: who may use it, what was evaluated, one log for each rank.

`open_run` claims `runs/NAME`: an unfinished run of the same config is gone on with, a finished one is left alone and the
next free name taken, and an unfinished one of another config is refused with the differences in words.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmscale.config import Config, load_config
from mmscale.errors import ConfigError, UserError
from mmscale.metrics import Event, Writer
from mmscale.tasks.base import Metric
from mmscale.world import World

# What may differ between a run and its resumption without changing what is computed.
FREE_TO_CHANGE = ("run.resume", "run.name", "run.dir", "launch.", "data.threads", "data.prefetch", "data.cache_mb")


class Run:
    """The folder of a run as one rank sees it. Only rank 0 writes into it, but for the rank's own log."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.checkpoints = folder / "checkpoints"
        self.emit: Callable[[Event], None] = lambda event: None
        self._log = folder / "logs" / f"rank-{rank}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)

    def log(self, text: str) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

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
            "tasks": {task: {k: m._asdict() for k, m in metrics.items()} for task, metrics in results.items()},
        }
        with (self.folder / "evals.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        if writer is not None:
            writer.scalars(
                step,
                {f"eval/{name}/{t}/{k}": m.value for t, metrics in results.items() for k, m in metrics.items()},
            )
        self.emit({"event": "eval", **entry})

    def evaluations(self) -> list[dict[str, Any]]:
        """All evaluations so far; of two at one step and set, as a restart makes them, the later one."""
        path = self.folder / "evals.jsonl"
        if not path.is_file():
            return []
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return list({(entry["step"], entry["set"]): entry for entry in entries}.values())


def open_run(config: Config, world: World) -> Run:
    """Claims the run's folder. Collective: rank 0 decides. Raises ConfigError on every rank."""
    folder, error = None, None
    if world.rank == 0:
        try:
            folder = _claim(config)
        except OSError as caught:
            error = ConfigError(f"the run's folder can't be made: {caught}")
        except ConfigError as caught:
            error = caught
    world.agree(error)
    return Run(world.gather(folder)[0], rank=world.rank)


def run_folder(config: Config) -> Path:
    return Path(config.run.dir) if config.run.dir is not None else Path("runs") / config.run.name


def is_finished(folder: Path) -> bool:
    return (folder / "report.json").is_file()


def _claim(config: Config) -> Path:
    first = run_folder(config)
    folder, number = first, 1
    while (folder / "config.json").is_file() and (is_finished(folder) or config.run.resume == "never"):
        if config.run.dir is not None:
            raise ConfigError(f"run.dir={folder} holds a finished run; give another, or none")
        if config.run.resume == "must":
            raise ConfigError(f"run.resume=must: the run in {folder} is finished")
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    if (folder / "config.json").is_file():
        before = load_config(folder / "config.json")
        changed = [d for d in before.differences(config) if not d.startswith(FREE_TO_CHANGE)]
        if changed:
            listed = "\n  ".join(changed)
            raise ConfigError(
                f"{folder} holds an unfinished run of another configuration:\n  {listed}\n"
                "give the same one to go on with it, run.name=... for another folder, or run.resume=never"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "config.json.tmp"
        temporary.write_text(config.to_json(), encoding="utf-8")
        temporary.rename(folder / "config.json")
    return folder
