"""A search for good values of a recipe's fields, on Ray Tune with ASHA.

::

    found = tune(config, ["optim.lr=loguniform(1e-5,1e-3)", "train.accumulation=choice(1,2)"], num_trials=16)
    found.best.changes            # ["optim.lr=0.00031", "train.accumulation=2"]

All values are drawn before anything starts, from the run's seed, and each trial's config is checked then. A trial is an
ordinary run in runs/NAME/trial-003, trained by `mmscale train` in a process of its own (with several workers, by
`mmscale launch` on its node). It reports at each log line or evaluation; ASHA ends those that are behind at 1/8 and 3/8
of the run. Written in the end: best.json, which `mmscale train` takes, trials.md, trials.png.

The same command again goes on with what is unfinished: a trial that was cut off resumes from its checkpoint. The
trade-off: the search is random, since all is drawn beforehand, and a trial has one node.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmscale.config import Config
from mmscale.errors import ConfigError, UserError
from mmscale.metrics import read_json_lines, write_whole
from mmscale.progress import clock_text
from mmscale.runs import run_folder
from mmscale_launcher.search import Search, parse_search

POLL_S = 0.3  # between looks at a trial's files
OUTCOME = "outcome.json"  # in a trial's folder, once it has ended by itself
GRACE, REDUCTION = 12, 3  # percent of the run before ASHA ends anything; it keeps one in three
SMALLER_IS_BETTER = re.compile(r"loss|unreadable")  # the others are shares of right answers

OnEvent = Callable[[dict[str, Any]], None]

# Starts a trial's command so that it is killed when its starter is, which nothing else would tell it.
_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, "-m", "mmscale.cli", *sys.argv[2:]])
"""


# ---------------------------------------------------------------------------------------------- what is searched


def draw(config: Config, searches: Sequence[Search], num_trials: int) -> list[Trial]:
    """The trials, drawn with the run's seed. Raises ConfigError where a drawn value makes no valid config."""
    tune = _ray_tune()
    trials = []
    for number in range(num_trials):
        changes = []
        for index, search in enumerate(searches):
            # a generator for each value: a search that is added changes nothing of the others
            state = np.random.RandomState([config.run.seed % 2**32, number, index])
            arguments = [list(search.arguments)] if search.function == "choice" else search.arguments
            value = getattr(tune, search.function)(*arguments).sample(random_state=state)
            value = value.item() if isinstance(value, np.generic) else value
            changes.append(f"{search.field}={value if isinstance(value, str) else json.dumps(value)}")
        try:
            changed = config.override(*changes)
        except ConfigError as error:
            raise _explained(error, config, searches, changes) from None
        trials.append(Trial(number=number, changes=changes, config=changed))
    return trials


def _explained(
    error: ConfigError, config: Config, searches: Sequence[Search], changes: list[str]
) -> ConfigError:
    """Names the search that drew a value which is wrong by itself, or all of them."""
    for search, change in zip(searches, changes, strict=True):
        try:
            config.override(change)
        except ConfigError as alone:
            return ConfigError(f"--search {search.field}={search.text} drew {change}: {alone}")
    return ConfigError(f"--search drew {' '.join(changes)}: {error}")


# ------------------------------------------------------------------------------------------------------- trials


@dataclass(kw_only=True)
class Trial:
    number: int
    changes: list[str]  # `section.field=value`
    config: Config
    state: str = "not begun"  # done, stopped early, failed, not begun
    score: float | None = None  # the last
    percent: int = 0
    seconds: float = 0.0
    error: str | None = None

    @property
    def name(self) -> str:
        return f"trial-{self.number:03d}"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search has found."""

    folder: Path
    metric: str
    mode: str  # min or max
    trials: list[Trial]
    best: Trial

    def ranked(self) -> list[Trial]:
        """The best first: those that came to their end, then those that were ended, then those without a score."""
        sign = 1 if self.mode == "min" else -1

        def order(trial: Trial) -> tuple[bool, bool, float, int]:
            score = math.inf if trial.score is None else sign * trial.score
            return trial.state == "failed", trial.state != "done", score, trial.number

        return sorted(self.trials, key=order)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "metric": self.metric,
            "mode": self.mode,
            "best": str(self.folder / "best.json"),
            "trials": [
                {
                    "trial": trial.name,
                    "changes": trial.changes,
                    "state": trial.state,
                    "score": trial.score,
                    "percent": trial.percent,
                    "seconds": trial.seconds,
                    "error": trial.error,
                }
                for trial in self.ranked()
            ],
        }

    def rows(self) -> list[list[str]]:
        fields = [change.partition("=")[0] for change in self.trials[0].changes]
        rows = [["trial", *fields, self.metric, "of the run", "time", ""]]
        for trial in self.ranked():
            values = [change.partition("=")[2] for change in trial.changes]
            score = "" if trial.score is None else f"{trial.score:.4f}"
            state = trial.state + (f": {trial.error.splitlines()[0]}" if trial.error else "")
            rows.append(
                [
                    trial.name,
                    *map(_short, values),
                    score,
                    f"{trial.percent}%",
                    clock_text(trial.seconds),
                    state,
                ]
            )
        return rows

    def to_text(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join(
            [*lines, f"\nmmscale train {self.folder / 'best.json'}", f"{self.folder / 'trials.png'}"]
        )

    def to_markdown(self) -> str:
        head, *body = self.rows()
        table = [head, ["---"] * len(head), *body]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        better = "smaller" if self.mode == "min" else "larger"
        return "\n".join(
            [
                f"# {self.folder.name}: {len(self.trials)} trials",
                "",
                f"{self.metric}, {better} is better. The best that came to its end: {self.best.name}, in best.json.",
                "",
                *lines,
                "",
                "![trials](trials.png)",
                "",
            ]
        )


def _short(text: str) -> str:
    with contextlib.suppress(ValueError):
        return text if re.fullmatch(r"-?\d+", text) else f"{float(text):.4g}"
    return text


# ------------------------------------------------------------------------------------------------------- the search


def tune(
    config: Config,
    searches: Sequence[str],
    *,
    num_trials: int,
    metric: str = "loss",
    parallel: int | None = None,
    workers: int | None = None,
    address: str | None = None,
    on_event: OnEvent | None = None,
) -> Found:
    """Runs the trials and writes best.json, trials.md and trials.png into the run's folder.

    metric: loss, or SET/TASK/METRIC of the evaluations. parallel: trials at a time; None: as many as fit. workers: of
    a trial; None: launch.workers_per_node, or one. address: of a Ray cluster whose nodes share the run's folder; None:
    this machine. Raises ConfigError where anything of it is wrong, UserError if no trial came to a score.
    """
    emit = on_event or (lambda event: None)
    ray_tune = _ray_tune()
    if num_trials < 1:
        raise ConfigError(f"--trials {num_trials}: must be 1 or more")
    workers = workers or config.launch.workers_per_node or 1
    folder = run_folder(config).absolute()
    config = _with_evaluations(config, metric)
    measure = Measure.of(config, metric)
    trials = draw(config, parse_search(searches), num_trials)
    resumed = _claim(folder, config, searches, num_trials, metric)
    with _ray(config, workers=workers, parallel=parallel, address=address, emit=emit) as use:
        for trial in trials:
            place = folder / trial.name
            place.mkdir(exist_ok=True)
            changes = [f"run.dir={place}", "run.resume=auto", "launch.preflight=false"]
            if config.run.threads is None and use.threads is not None:
                changes.append(f"run.threads={use.threads}")
            write_whole(place / "recipe.json", trial.config.override(*changes).to_json())
        paths = [entry for entry in sys.path if entry]
        run = _Runner(folder=folder, measure=measure, workers=workers, cwd=str(Path.cwd()), search_path=paths)

        def mmscale_trial(config: dict[str, Any]) -> None:  # Ray Tune wants a plain function
            run(config["number"])

        trainable = ray_tune.with_resources(mmscale_trial, {"cpu": use.cpus, "gpu": use.gpus})
        path = str(folder / "tune")
        if resumed and ray_tune.Tuner.can_restore(path):
            emit(_message(f"going on with the search in {folder}"))
            tuner = ray_tune.Tuner.restore(path, trainable, resume_unfinished=True, restart_errored=True)
        else:
            tuner = ray_tune.Tuner(
                trainable,
                param_space={"number": ray_tune.grid_search(list(range(num_trials)))},
                tune_config=ray_tune.TuneConfig(
                    metric="score",
                    mode=measure.mode,
                    scheduler=_asha(ray_tune),
                    max_concurrent_trials=parallel,
                    trial_name_creator=_tune_name,
                    trial_dirname_creator=_tune_name,
                ),
                run_config=ray_tune.RunConfig(
                    name="tune",
                    storage_path=str(folder),
                    verbose=0,
                ),
            )
        with _telling(folder, trials, measure, emit):
            results = tuner.fit()
    for result in results:
        trial, metrics = trials[result.config["number"]], result.metrics or {}
        _take(trial, folder, measure, metrics.get("time_total_s"))
        if result.error is not None and trial.state != "done":
            trial.state, trial.error = "failed", str(result.error).strip().splitlines()[-1]
    return _write(folder, config, measure, trials)


def _ray_tune() -> Any:
    try:
        from ray import tune as ray_tune
    except ImportError:
        raise ConfigError(
            "mmscale tune needs Ray Tune's packages, which the extra brings: pip install 'mmscale[tune]'"
        ) from None
    return ray_tune


def _asha(ray_tune: Any) -> Any:
    return ray_tune.schedulers.ASHAScheduler(
        time_attr="percent", max_t=101, grace_period=GRACE, reduction_factor=REDUCTION
    )


def _tune_name(trial: Any) -> str:
    return f"trial-{trial.config['number']:03d}"


def _with_evaluations(config: Config, metric: str) -> Config:
    """A score that comes from evaluations is wanted before the run is over."""
    if metric == "loss" or config.train.eval_every is not None:
        return config
    return config.override("train.eval_every=12%")


def _claim(folder: Path, config: Config, searches: Sequence[str], num_trials: int, metric: str) -> bool:
    """Makes the folder this search's; returns whether it was already. Raises ConfigError if it is another's."""
    if (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds a run: give run.name=... for another folder")
    wanted = {
        "search": list(searches),
        "trials": num_trials,
        "metric": metric,
        "config": config.model_dump(mode="json"),
    }
    path = folder / "search.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != wanted:
            raise ConfigError(
                f"{folder} holds another search: give the same command to go on with it, or run.name=..."
            )
        if (folder / "best.json").exists():
            raise ConfigError(f"{folder} holds this search, and it is done: see {folder / 'trials.md'}")
        return True
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
    return False


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What each trial gets of a node."""

    cpus: int
    gpus: int
    threads: int | None  # of each rank on a local Ray's CPUs


@contextlib.contextmanager
def _ray(
    config: Config, *, workers: int, parallel: int | None, address: str | None, emit: OnEvent
) -> Iterator[_Share]:
    import ray

    from mmscale_launcher.cluster import connected

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # a run has its own files
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # whose banner no verbosity turns off
    num_cores = len(os.sched_getaffinity(0))
    at_once = parallel or max(1, num_cores // workers)
    local = config.launch.model_copy(update={"nodes": 1, "workers_per_node": at_once * workers})
    with connected(config.model_copy(update={"launch": local}), address, emit):
        use_gpu = config.run.device == "cuda" or (
            config.run.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        )
        threads = None
        if address is None and not use_gpu:
            threads = max(1, num_cores // (at_once * workers))
        yield _Share(cpus=workers, gpus=workers * use_gpu, threads=threads)


@contextlib.contextmanager
def _telling(folder: Path, trials: list[Trial], measure: Measure, emit: OnEvent) -> Iterator[None]:
    """Says, while the search runs, how each trial ended that wasn't ended early."""
    ended = threading.Event()
    known = {trial.number for trial in trials if (folder / trial.name / OUTCOME).exists()}

    def watch() -> None:
        while not ended.wait(2 * POLL_S):
            for trial in trials:
                path = folder / trial.name / OUTCOME
                if trial.number in known or not path.exists():
                    continue
                known.add(trial.number)
                _take(trial, folder, measure, None)
                score = "no score" if trial.score is None else f"{measure.metric} {trial.score:.4f}"
                emit(_message(f"{trial.name} {trial.state}: {score} ({', '.join(trial.changes)})"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _take(trial: Trial, folder: Path, measure: Measure, seconds: float | None) -> None:
    """Reads how a trial ended from its folder."""
    points = measure.curve(folder / trial.name)
    if points:
        trial.percent, score = points[-1]
        trial.score = score if math.isfinite(score) else None
    trial.seconds = trial.seconds if seconds is None else seconds
    path = folder / trial.name / OUTCOME
    if path.exists():
        outcome = json.loads(path.read_text(encoding="utf-8"))
        trial.state, trial.error, trial.seconds = outcome["state"], outcome["error"], outcome["seconds"]
        trial.percent = 100 if trial.state == "done" else trial.percent
    elif points:
        trial.state = "stopped early"


def _write(folder: Path, config: Config, measure: Measure, trials: list[Trial]) -> Found:
    scored = [trial for trial in trials if trial.score is not None and trial.state != "failed"]
    if not scored:
        reasons = list(dict.fromkeys(trial.error for trial in trials if trial.error))
        raise UserError(f"no trial came to a score; {folder} holds their logs. " + "\n".join(reasons))
    found = Found(folder=folder, metric=measure.metric, mode=measure.mode, trials=trials, best=scored[0])
    found = Found(**{**found.__dict__, "best": found.ranked()[0]})
    write_whole(folder / "trials.md", found.to_markdown())
    curves = {trial.number: measure.curve(folder / trial.name) for trial in trials}
    draw_curves(found, curves).save(folder / "trials.png")
    write_whole(folder / "best.json", found.best.config.to_json())  # last: it ends the search
    return found


def _message(text: str) -> dict[str, Any]:
    return {"event": "message", "text": text}


# ---------------------------------------------------------------------------------------------------- a trial's run


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a run's files are read: its score, and how far it is."""

    metric: str
    mode: str
    unit: str  # of the run's length: step, epoch, samples
    total: float

    @staticmethod
    def of(config: Config, metric: str) -> Measure:
        """Raises ConfigError where the run's evaluations have no such metric, or its length is wall time."""
        from mmscale.config import duration_unit

        text = config.train.duration
        unit = {"": "step", "ep": "epoch", "ex": "samples"}.get(duration_unit(text))
        if unit is None:
            raise ConfigError(
                f"train.duration={text} is wall time, and trials are compared at equal parts of a run: "
                "give it in steps, ep or ex"
            )
        if metric != "loss":
            _check_metric(config, metric)
        mode = "min" if SMALLER_IS_BETTER.search(metric.rpartition("/")[2]) else "max"
        return Measure(metric=metric, mode=mode, unit=unit, total=float(text.rstrip("epx")))

    def curve(self, run: Path) -> list[tuple[int, float]]:
        """(percent of the run, score) of all that a run has logged so far; a score that is no number is infinite."""
        lines = read_json_lines(run / "metrics.jsonl")
        worst = math.inf if self.mode == "min" else -math.inf
        if self.metric == "loss":
            return [(self._percent(line), worst if line["loss"] is None else line["loss"]) for line in lines]
        at = {line["step"]: self._percent(line) for line in lines}
        name, task, key = _parts(self.metric)
        points = []
        for entry in read_json_lines(run / "evals.jsonl"):
            score = entry["tasks"].get(task, {}).get(key, {}).get("value")
            if entry["set"] == name and entry["step"] > 0 and score is not None:
                percent = at.get(entry["step"])
                if percent is None and self.unit == "step":
                    percent = self._percent(entry)
                points.append((percent or 1, score if math.isfinite(score) else worst))
        return points

    def _percent(self, line: dict[str, Any]) -> int:
        return max(1, min(100, int(100 * line[self.unit] / self.total + 1e-6)))


def _parts(metric: str) -> tuple[str, str, str]:
    name, task, key = [*metric.split("/", 2), "", ""][:3]
    return name, task, key


def _check_metric(config: Config, metric: str) -> None:
    name, task, key = _parts(metric)
    tasks = [task for task, weight in config.tasks.items() if weight > 0]
    for what, value, known in (("set", name, list(config.data.evals)), ("task", task, tasks)):
        if value not in known:
            match = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {match[0]}?" if match else f"known are {', '.join(known) or 'none'}"
            raise ConfigError(
                f"--metric {metric}: no {what} is called {value!r}; {hint} (SET/TASK/METRIC, or loss)"
            )
    if not key:
        raise ConfigError(f"--metric {metric}: must have the form SET/TASK/METRIC, as report.md names them")


@dataclass(frozen=True, kw_only=True)
class _Runner:
    """What Ray Tune calls, in an actor for each trial."""

    folder: Path
    measure: Measure
    workers: int
    cwd: str
    search_path: list[str]

    def __call__(self, number: int) -> None:
        from ray import tune as ray_tune

        place = self.folder / f"trial-{number:03d}"
        begin, told, code = time.monotonic(), 0, None
        (place / OUTCOME).unlink(missing_ok=True)
        # where it had ended when the search was cut off, its files are read once more
        process = None if (place / "report.json").is_file() else self._start(place)
        try:
            while code is None:
                code = process.poll() if process is not None else 0
                points = self.measure.curve(place)
                for percent, score in points[told:]:
                    # 100 is told at its end: what is ended before has no checkpoint of its last step
                    ray_tune.report({"percent": min(percent, 99), "score": score})
                told = max(told, len(points))
                if code is None:
                    time.sleep(POLL_S)
        finally:
            if process is not None and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        failure = None
        if code != 0:
            failure = _last_words(place / "trial.log")
        elif not told:
            failure = f"the run has no {self.measure.metric}"
        outcome = {
            "state": "done" if failure is None else "failed",
            "error": failure,
            "seconds": time.monotonic() - begin,
        }
        write_whole(place / OUTCOME, json.dumps(outcome) + "\n")
        worst = math.inf if self.measure.mode == "min" else -math.inf
        score = points[-1][1] if failure is None else worst
        ray_tune.report({"percent": 100, "score": score})

    def _start(self, place: Path) -> subprocess.Popen[bytes]:
        recipe = str(place / "recipe.json")
        arguments = ["train", recipe]
        if self.workers > 1:
            arguments = ["launch", recipe, "--nodes", "1", "--workers-per-node", str(self.workers)]
        environment = {
            name: value
            for name, value in os.environ.items()
            # the trial's process is no part of this Ray
            if not name.startswith(("RAY_", "MMSCALE_"))
            and name not in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE")
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            dict.fromkeys([*self.search_path, *filter(None, sys.path)])
        )
        with (place / "trial.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", _BOUND, str(os.getpid()), *arguments],
                env=environment,
                cwd=self.cwd if Path(self.cwd).is_dir() else None,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [line for line in lines if line.startswith("mmscale: ")]
    return (said or lines or ["it said nothing"])[-1].removeprefix("mmscale: ")


# ------------------------------------------------------------------------------------------------------- the picture


def draw_curves(found: Found, curves: dict[int, list[tuple[int, float]]]) -> Any:
    """The score of each trial over its run, the best one's in black."""
    from PIL import Image, ImageDraw, ImageFont

    width, height, left, top, right, bottom = 960, 540, 90, 50, 30, 60
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    finite = [score for points in curves.values() for _, score in points if math.isfinite(score)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    high = high if high > low else low + 1.0

    def place(percent: float, score: float) -> tuple[float, float]:
        x = left + (width - left - right) * percent / 100
        return x, height - bottom - (height - top - bottom) * (score - low) / (high - low)

    for i in range(5):
        value, percent = low + (high - low) * i / 4, 25 * i
        pen.line([place(0, value), place(100, value)], fill="#dddddd")
        pen.text((left - 8, place(0, value)[1]), f"{value:.4g}", fill="#444444", font=font, anchor="rm")
        pen.text(
            (place(percent, low)[0], height - bottom + 8),
            f"{percent}%",
            fill="#444444",
            font=font,
            anchor="ma",
        )
    for trial in reversed(found.ranked()):  # the best on top
        points = [place(percent, score) for percent, score in curves[trial.number] if math.isfinite(score)]
        is_best = trial is found.best
        colour = (
            "#000000" if is_best else {"done": "#4477aa", "failed": "#cc6677"}.get(trial.state, "#bbbbbb")
        )
        if len(points) > 1:
            pen.line(points, fill=colour, width=3 if is_best else 1, joint="curve")
        for x, y in points[-1:]:
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    text = f"{found.metric} over the run: black {found.best.name}, the best; blue done; grey stopped early; red failed"
    pen.text((left, 18), text, fill="#000000", font=font)
    return picture
