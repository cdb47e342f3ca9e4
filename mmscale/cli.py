"""The command line: each verb a plain function, nothing else.

Exit codes: see `EXIT_CODES`, which `mmscale --help` prints.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mmscale.errors import ConfigError, UserError

EXIT_CODES = """\
exit codes:
  0    done
  1    failed
  2    the command or the configuration is wrong
  3    the data can't be used
  10   a rank failed twice with the same exception at the same step
  11   the budget of restarts is used up
  12   hung again and again
  13   out of memory twice
  14   no checkpoint could be written, or none read
  15   the loss isn't finite, and going back didn't help
  16   the check before the launch found what it can't run with
  17   another attempt has taken the run over
  75   stopped early with a checkpoint: the same command goes on
  130  Ctrl-C
"""


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    verb: Callable[[argparse.Namespace], None] = arguments.verb
    try:
        verb(arguments)
    except UserError as error:
        if not error.is_told_by_another:
            print(f"mmscale: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        kept = "; the same command goes on from the newest checkpoint, if there is one"
        print(f"mmscale: interrupted{kept if verb in (train, launch) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # the disk or the network, which a traceback doesn't explain better
        if error.errno is None:
            raise
        print(f"mmscale: {error.filename or arguments.command}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def train(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from mmscale.progress import ProgressBar
    from mmscale.train import train as run

    bar = ProgressBar()
    try:
        report = run(config, bar.update)
    finally:
        bar.close()
    if int(os.environ.get("RANK", 0)) == 0:
        _show_report(report, config, as_json=arguments.json)


def launch(arguments: argparse.Namespace) -> None:
    if arguments.attach is not None:
        return _attach(arguments)
    config = _launch_config(arguments)
    if arguments.emit is not None:
        from mmscale_launcher.emit import emit

        print(
            emit(arguments.emit, recipe=arguments.recipe, overrides=arguments.overrides, config=config),
            end="",
        )
        return None
    if arguments.dry_run:
        from mmscale_launcher.emit import plan

        print(plan(config, address=arguments.address))
        return None
    from mmscale_launcher import launch as run

    from mmscale.progress import ProgressBar

    bar = ProgressBar()
    try:
        report = run(config, address=arguments.address, on_event=bar.update)
    finally:
        bar.close()
    return _show_report(report, config, as_json=arguments.json)


def _launch_config(arguments: argparse.Namespace) -> Any:
    if arguments.recipe is None:
        raise ConfigError("give a RECIPE, or --attach RUN (see mmscale launch --help)")
    names = ("nodes", "workers_per_node", "min_workers")
    given = [(name, getattr(arguments, name)) for name in names if getattr(arguments, name) is not None]
    return _config(arguments, *(f"launch.{name}={value}" for name, value in given))


def _attach(arguments: argparse.Namespace) -> None:
    options = ("nodes", "workers_per_node", "min_workers", "address", "dry_run", "emit")
    given = [f"--{name.replace('_', '-')}" for name in options if getattr(arguments, name)]
    given = [*([arguments.recipe] if arguments.recipe else []), *arguments.overrides, *given]
    if given:
        raise ConfigError(f"--attach goes on with what the run has recorded: leave out {' '.join(given)}")
    from mmscale_launcher.follow import attach

    from mmscale.config import load_config
    from mmscale.progress import ProgressBar

    run = Path(arguments.attach)
    bar = ProgressBar()
    try:
        report = attach(run, on_event=bar.update)
    finally:
        bar.close()
    _show_report(report, load_config(run / "config.json"), as_json=arguments.json)


def status(arguments: argparse.Namespace) -> None:
    from mmscale_launcher.follow import look, to_text

    run = Path(arguments.run)
    facts = look(run)
    print(json.dumps(facts) if arguments.json else to_text(run, facts))


def stop(arguments: argparse.Namespace) -> None:
    from mmscale_launcher.follow import stop as run

    facts = run(Path(arguments.run), timeout=arguments.timeout)
    if facts["state"] == "done":
        print(f"{arguments.run}: done before it could be stopped")
        return
    kept = facts.get("checkpoint")
    print(f"{arguments.run}: {facts['state']} at step {facts.get('step')}; checkpoint: {kept or 'none'}")
    if facts["state"] != "stopped" or not kept:
        raise UserError(f"{arguments.run} has ended without saving: {facts.get('error') or facts['state']}")


def logs(arguments: argparse.Namespace) -> None:
    from mmscale_launcher.follow import log_lines

    for text in log_lines(Path(arguments.run), arguments.rank, follow=arguments.follow):
        print(text, end="", flush=True)


def doctor(arguments: argparse.Namespace) -> None:
    config = _config(arguments) if arguments.recipe is not None else None
    from mmscale_launcher.doctor import diagnose

    report = diagnose(config, arguments.address)
    print(json.dumps(report.to_json()) if arguments.json else report.to_text())
    if (error := report.error()) is not None:
        raise error


def tune(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    from mmscale_launcher.tune import tune as run

    from mmscale.progress import ProgressBar

    bar = ProgressBar()
    try:
        found = run(
            config,
            arguments.search,
            num_trials=arguments.trials,
            metric=arguments.metric,
            parallel=arguments.parallel,
            workers=arguments.workers_per_trial,
            address=arguments.address,
            on_event=bar.update,
        )
    finally:
        bar.close()
    print(json.dumps(found.to_json()) if arguments.json else found.to_text())


def evaluate(arguments: argparse.Namespace) -> None:
    from mmscale.checkpoint import load_model
    from mmscale.evals.evaluate import evaluate as run
    from mmscale.evals.report import to_json, to_text
    from mmscale.tasks import TASKS
    from mmscale.world import close_world, init_world

    model, config = load_model(arguments.checkpoint)
    names = arguments.tasks or _trained_tasks(config)
    _check_tasks(names, config)
    world = init_world(device=config.run.device, threads=config.run.threads)
    try:
        model.to(world.device)
        tasks = {name: TASKS[name]() for name in names}
        results = run(model, model, tasks, arguments.data, config=config, world=world)
    finally:
        close_world()
    if world.rank == 0:
        print(to_json(results) if arguments.json else to_text(results))


def predict(arguments: argparse.Namespace) -> None:
    import torch

    from mmscale.checkpoint import load_model
    from mmscale.predict import answer_lines
    from mmscale.predict import predict as run

    model, config = load_model(arguments.checkpoint)
    _check_tasks([arguments.task], config)
    with torch.no_grad():
        answers = run(
            model,
            arguments.task,
            images=arguments.image,
            audios=arguments.audio,
            texts=arguments.text,
        )
    print(json.dumps(answers, ensure_ascii=False) if arguments.json else "\n".join(answer_lines(answers)))


def recipes(arguments: argparse.Namespace) -> None:
    from mmscale.recipes import RECIPES, get

    if arguments.name is not None:
        print(get(arguments.name).to_json(), end="")
        return
    for name, recipe in RECIPES.items():
        print(f"{name:16} {(recipe.__doc__ or '').strip().splitlines()[0]}")


def data_demo(arguments: argparse.Namespace) -> None:
    from mmscale.data.demo import make_demo

    info = make_demo(Path(arguments.out), seed=arguments.seed, source=arguments.source, limit=arguments.limit)
    print("already there" if info.cached else f"made of {info.source}")
    for split, shards in info.shards.items():
        counts = f"{info.num_samples[split]} samples of {info.num_concepts[split]} concepts"
        print(f"{shards[0].parent}: {counts} in {len(shards)} shards")
    print(f"{info.path / 'LICENSES.md'}: whose work it is")


def data_index(arguments: argparse.Namespace) -> None:
    from mmscale.data.jobs import Progress, local_map
    from mmscale.data.manifest import expand, index_shards

    if arguments.tokenizer is not None and "text" not in arguments.measure:
        arguments.measure = [*arguments.measure, "text"]
    with Progress(len(expand(arguments.shards)), unit="shards") as progress:
        indexed = index_shards(
            arguments.shards,
            measure=arguments.measure,
            tokenizer=arguments.tokenizer,
            full_hash=arguments.hash,
            force=arguments.force,
            job_map=local_map(arguments.workers),
            on_shards=progress.set,
        )
    if arguments.json:
        print(json.dumps(indexed.to_json()))
    else:
        print(indexed.to_text(), end="")
    if (error := indexed.error()) is not None:
        raise error


def data_tokenizer(arguments: argparse.Namespace) -> None:
    from mmscale.data.tokenizer import train_on_shards

    count, size = train_on_shards(
        arguments.shards,
        Path(arguments.out),
        source=arguments.source,
        vocab_size=arguments.vocab_size,
        limit=arguments.limit,
    )
    print(f"{arguments.out}: {size} ids, trained on {count} texts")


def data_order(arguments: argparse.Namespace) -> None:
    from mmscale.data import ShardStream

    options: dict[str, Any]
    if arguments.run is not None:
        if arguments.shards:
            raise ConfigError("give shards or --run, not both")
        urls, options, state = _order_of_run(Path(arguments.run))
    else:
        if not arguments.shards or arguments.batch_size is None:
            raise ConfigError("give shards and --batch-size, or --run RUN")
        urls, state = arguments.shards, None
        options = {"batch_size": arguments.batch_size, "seed": arguments.seed, "order": arguments.order}
        options["bucket_by"] = arguments.bucket_by
    if arguments.step < 0 or arguments.steps < 1 or arguments.world_size < 1:
        raise ConfigError("--step must be 0 or more, --steps and --world-size 1 or more")
    ranks = range(arguments.world_size)
    streams = [
        ShardStream(urls, rank=rank, world_size=arguments.world_size, epochs=None, **options)
        for rank in ranks
    ]
    if state is not None:
        for stream in streams:
            stream.load_state_dict(state)
    for step in range(arguments.step, arguments.step + arguments.steps):
        keys = [stream.keys(step) for stream in streams]
        if arguments.json:
            print(json.dumps({"step": step, "ranks": keys}))
        else:
            for rank in ranks:
                print(f"step {step}, rank {rank}: {' '.join(keys[rank])}")


def _order_of_run(folder: Path) -> tuple[Any, dict[str, Any], Any]:
    """Shards, options of the stream, and its newest state (which knows of changed weights), if there is one."""
    from mmscale import checkpoint
    from mmscale.config import load_config
    from mmscale.runs import checkpoints_of

    if not (folder / "config.json").is_file():
        raise ConfigError(f"--run {folder}: holds no config.json, so it isn't a run's folder")
    config = load_config(folder / "config.json")
    data = config.data
    options: dict[str, Any] = {
        "batch_size": data.batch_size,
        "seed": config.run.seed,
        "shuffle": data.shuffle,
        "order": data.order,
        "bucket_by": data.bucket_by,
        "weights": data.weights or None,
        "weight_by": data.weight_by,
    }
    paths = checkpoint.complete(checkpoints_of(config, folder))
    return data.train, options, checkpoint.verify(paths[-1]).manifest["state"]["stream"] if paths else None


def data_check(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from mmscale.data.check import Fault, check, write_quarantine
    from mmscale.errors import DataError

    faults: list[Fault] = []

    def on_fault(fault: Fault) -> None:
        faults.append(fault)
        if not arguments.json:
            print(fault.line())

    with _shard_progress(arguments.shards) as on_shard:
        report = check(
            arguments.shards,
            fields=arguments.fields,
            quick=arguments.quick,
            run_jobs=_job_map(arguments),
            resume=arguments.resume,
            on_fault=on_fault,
            on_shard=on_shard,
        )
    if arguments.quarantine is not None:
        write_quarantine(arguments.quarantine, faults)
    if arguments.json:
        print(json.dumps({**asdict(report), "faults": [fault.to_json() for fault in faults]}))
    else:
        print(report.to_text())
    if faults:
        raise DataError(
            f"{report.num_faults:,} faults in {report.num_bad_shards:,} of {report.num_shards:,} shards"
        )


def data_preview(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from mmscale.data.preview import preview

    report = preview(
        arguments.shards, arguments.out, count=arguments.count, seed=arguments.seed, query=arguments.query
    )
    if arguments.json:
        print(json.dumps(asdict(report)))
        return
    faults = f", {report.num_faults} undecodable members among them" if report.num_faults else ""
    print(f"{report.num_shown} of {report.num_samples:,} samples{faults}: {report.page}, {report.sheet}")


def data_stats(arguments: argparse.Namespace) -> None:
    from mmscale.data.stats import stats, to_text

    with _shard_progress(arguments.shards) as on_shard:
        numbers = stats(
            arguments.shards,
            out=arguments.out,
            sample=arguments.sample,
            seed=arguments.seed,
            tokenizer=arguments.tokenizer,
            run_jobs=_job_map(arguments),
            on_shard=on_shard,
        )
    print(json.dumps(numbers) if arguments.json else to_text(numbers))


@contextlib.contextmanager
def _shard_progress(shards: list[str]) -> Iterator[Callable[[int], None]]:
    from mmscale.data.jobs import Progress
    from mmscale.data.manifest import expand

    with Progress(len(expand(shards)), unit="shards") as progress:
        yield progress.set


def _job_map(arguments: argparse.Namespace) -> Any:
    if arguments.address is None:
        from mmscale.data.jobs import local_map

        return local_map(arguments.workers)
    # Ray's threads write to stdout, among our results, that it tries again.
    sys.stdout = _OwnOutput(sys.stdout)
    from mmscale_launcher.tools import ray_map

    return ray_map(arguments.address)


class _OwnOutput:
    """Stdout for what this program's main thread prints; what other threads print goes to stderr."""

    def __init__(self, stdout: Any) -> None:
        self._stdout = stdout

    def write(self, text: str) -> int:
        is_ours = threading.current_thread() is threading.main_thread()
        return int((self._stdout if is_ours else sys.stderr).write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stdout, name)


def data_bench(arguments: argparse.Namespace) -> None:
    from mmscale.data.bench import bench

    report = bench(
        arguments.shards, fields=arguments.fields, threads=arguments.threads, seconds=arguments.seconds
    )
    print(json.dumps(report.as_dict()) if arguments.json else report.to_text())


def data_pack(arguments: argparse.Namespace) -> None:
    from mmscale.data.ingest import PackOptions, pack

    report = pack(
        Path(arguments.out),
        [Path(source) for source in arguments.sources],
        PackOptions(
            columns=tuple(_pairs("--column", "image=filepath", arguments.column)),
            split=arguments.split,
            classes=arguments.classes,
            samples_per_shard=arguments.samples_per_shard,
            shard_bytes=round(arguments.shard_mb * 1e6),
            shuffle=arguments.shuffle,
            limit=arguments.limit,
            resize=arguments.resize,
            keys=arguments.keys,
            on_error=arguments.on_error,
            first_dot=arguments.first_dot,
            allow_outside=arguments.allow_outside,
        ),
        job_map=_job_map(arguments),
    )
    print(json.dumps(report.to_json()) if arguments.json else report.to_text())


def data_repack(arguments: argparse.Namespace) -> None:
    from mmscale.data.repack import RepackOptions, repack

    report = repack(
        Path(arguments.out),
        arguments.shards,
        RepackOptions(
            samples_per_shard=arguments.samples_per_shard,
            shard_bytes=round(arguments.shard_mb * 1e6),
            shuffle=arguments.shuffle,
            require=tuple(arguments.require),
            minimum=_limits("--min", arguments.min),
            maximum=_limits("--max", arguments.max),
            fields=tuple(arguments.fields) if arguments.fields else None,
            rename=tuple(_pairs("--rename", "txt=caption", arguments.rename)),
            drop_bad=arguments.drop_bad,
            quarantine=Path(arguments.quarantine) if arguments.quarantine else None,
        ),
        job_map=_job_map(arguments),
    )
    print(json.dumps(report.to_json()) if arguments.json else report.to_text())


def _pairs(option: str, example: str, texts: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {text}: must have the form {example}")
        pairs.append((name, value))
    return pairs


def _limits(option: str, texts: list[str]) -> tuple[tuple[str, float], ...]:
    limits = []
    for name, value in _pairs(option, "jpg.width=256", texts):
        try:
            limits.append((name, float(value)))
        except ValueError:
            raise ConfigError(f"{option} {name}={value}: {value!r} is no number") from None
    return tuple(limits)


def _config(arguments: argparse.Namespace, *changes: str) -> Any:
    from mmscale.recipes import get

    return get(arguments.recipe).override(*arguments.overrides, *changes)


def _trained_tasks(config: Any) -> list[str]:
    return [name for name, weight in config.tasks.items() if weight > 0]


def _check_tasks(names: list[str], config: Any) -> None:
    known = _trained_tasks(config)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"--task: this model was not trained for {', '.join(unknown)}; its tasks are {', '.join(known)}"
        )


def _show_report(report: dict[str, Any], config: Any, *, as_json: bool) -> None:
    from mmscale.evals.report import report_text

    print(json.dumps(report) if as_json else f"\n{report_text(report)}")


class _Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line with the nearest right word, without the usage above it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mmscale: {message} (see {self.prog} --help)\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            match = difflib.get_close_matches(str(value), map(str, action.choices), n=1)
            hint = (
                f"did you mean {match[0]}?" if match else f"known are {', '.join(map(str, action.choices))}"
            )
            name = (
                action.metavar
                if action.metavar and not action.option_strings
                else "/".join(action.option_strings)
            )
            raise argparse.ArgumentError(None, f"{str(name).lower()} {value!r} is not known; {hint}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse stops taking overrides at the first option; those after it are overrides all the same.
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"{' '.join(rest)}: not known to mmscale {arguments.command}")
    if rest:
        arguments.overrides += rest
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mmscale",
        description="Trains models that read text, images and audio together.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="command")

    def add(verb: Callable[[argparse.Namespace], None], name: str, text: str, group: Any = verbs) -> Any:
        command = group.add_parser(name, help=text, description=text)
        command.set_defaults(verb=verb)
        return command

    def add_recipe(command: Any, *, nargs: str | None = None) -> None:
        text = "a recipe's name, or a config's .json file"
        command.add_argument("recipe", nargs=nargs, metavar="RECIPE", help=text)
        command.add_argument(
            "overrides", nargs="*", default=[], metavar="section.field=value", help="changes to it"
        )
        command.add_argument("--json", action="store_true", help="print the report as JSON")

    def add_address(command: Any) -> None:
        command.add_argument("--address", help="of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT")

    add_recipe(add(train, "train", "train in this process, or as one rank under torchrun"))
    command = add(launch, "launch", "train through Ray; with no address it starts a local one")
    add_recipe(command, nargs="?")
    command.add_argument("--nodes", type=int, metavar="N")
    command.add_argument(
        "--workers-per-node", type=int, metavar="W", help="default: the GPUs of a node, else 2"
    )
    command.add_argument(
        "--min-workers", type=int, metavar="M", help="go on with M or more when nodes are lost"
    )
    add_address(command)
    command.add_argument("--dry-run", action="store_true", help="print what would start")
    command.add_argument(
        "--emit", choices=("ray-cluster", "kuberay", "slurm"), help="print a file to start from"
    )
    command.add_argument(
        "--attach", metavar="RUN", help="follow a launched run; take it up again if its launcher died"
    )

    def add_run(verb: Callable[[argparse.Namespace], None], name: str, text: str) -> Any:
        command = add(verb, name, text)
        command.add_argument("run", metavar="RUN", help="the run's folder")
        return command

    command = add_run(status, "status", "what a run does, and each of its ranks")
    command.add_argument("--json", action="store_true", help="as one JSON object")
    command = add_run(stop, "stop", "ask a run to save and stop, and wait until it has")
    command.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds; default 600")
    command = add_run(logs, "logs", "print what a rank has logged")
    command.add_argument("--rank", type=int, required=True, metavar="R")
    command.add_argument("--follow", action="store_true", help="and what comes, until the run ends")
    command = add(doctor, "doctor", "check machines before a run: versions, links, disks, data, memory")
    add_recipe(command, nargs="?")
    add_address(command)
    command = add(tune, "tune", "search for good values of a recipe's fields, on Ray Tune with ASHA")
    add_recipe(command)
    command.add_argument(
        "--search",
        action="append",
        required=True,
        metavar="FIELD=EXPRESSION",
        help="optim.lr=loguniform(1e-5,1e-3), train.accumulation=choice(1,2), ...; may be repeated",
    )
    command.add_argument("--trials", type=int, required=True, metavar="N")
    command.add_argument(
        "--metric", default="loss", metavar="SET/TASK/METRIC", help="of the evaluations; default: loss"
    )
    command.add_argument(
        "--parallel", type=int, metavar="K", help="trials at a time; default: as many as fit"
    )
    command.add_argument(
        "--workers-per-trial", type=int, metavar="W", help="default: launch.workers_per_node or 1"
    )
    add_address(command)

    command = add(evaluate, "eval", "score a run's newest checkpoint, or a checkpoint, on shards")
    command.add_argument("checkpoint", metavar="RUN|CHECKPOINT")
    command.add_argument(
        "--data", required=True, metavar="SHARDS", help="a folder, a tar, or a brace pattern"
    )
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="default: those it was trained for")
    command.add_argument("--json", action="store_true")

    command = add(predict, "predict", "ask a model about pictures, sounds and texts")
    command.add_argument("checkpoint", metavar="RUN|CHECKPOINT")
    command.add_argument("--task", required=True)
    for name in ("image", "audio"):
        command.add_argument(f"--{name}", action="append", default=[], metavar="FILE")
    command.add_argument("--text", action="append", default=[], metavar="TEXT")
    command.add_argument("--json", action="store_true")

    command = add(recipes, "recipes", "list the recipes, or print one in full")
    command.add_argument("name", nargs="?", metavar="NAME")

    data = verbs.add_parser("data", help="tools for shards", description="Tools for shards.")
    tools = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = add(data_demo, "demo", "make shards of real pictures, names and spoken names (emoji)", tools)
    command.add_argument("out", metavar="OUT", help="the folder to make")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--source", choices=("auto", "emoji", "scenes"), default="auto")
    command.add_argument("--limit", type=int, metavar="N", help="at most N concepts")
    command = add(data_index, "index", "write the index of shards, and the manifest of each folder", tools)
    command.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, tars, brace patterns, URLs")
    command.add_argument(
        "--measure",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="image, audio, text: keep pixels, seconds, characters as columns",
    )
    command.add_argument("--tokenizer", metavar="FILE", help="count tokens of texts with this tokenizer.json")
    command.add_argument("--hash", action="store_true", help="keep a hash of every byte of each shard")
    command.add_argument("--workers", type=int, metavar="N", help="processes; default: one a CPU")
    command.add_argument("--force", action="store_true", help="make indexes anew that are there and right")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command = add(data_tokenizer, "tokenizer", "train a tokenizer on the texts of shards", tools)
    command.add_argument("shards", nargs="+", metavar="SHARDS")
    command.add_argument("--out", default="tokenizer.json", metavar="FILE")
    command.add_argument(
        "--source",
        default="txt|json.caption|json.captions",
        metavar="FIELD",
        help="where a text lies (default: %(default)s)",
    )
    command.add_argument("--vocab-size", type=int, default=4096, metavar="N")
    command.add_argument("--limit", type=int, default=1_000_000, metavar="N", help="at most N texts")
    command = add(data_order, "order", "print the keys of any step, for any number of ranks", tools)
    command.add_argument("shards", nargs="*", metavar="SHARDS")
    command.add_argument("--run", metavar="RUN", help="as this run's folder has it, instead of shards")
    command.add_argument("--batch-size", type=int, metavar="B", help="samples in a step, over all ranks")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--order", choices=("auto", "full", "window"), default="auto")
    command.add_argument("--bucket-by", metavar="COLUMN", help="a measured column, as wav.seconds")
    command.add_argument("--step", type=int, default=0, metavar="N")
    command.add_argument("--steps", type=int, default=1, metavar="M", help="how many, from step N on")
    command.add_argument("--world-size", type=int, default=1, metavar="W")
    command.add_argument("--json", action="store_true", help="one JSON object a step")

    def add_work(command: Any) -> None:
        command.add_argument(
            "shards", nargs="+", metavar="SHARDS", help="a folder, a tar, a brace pattern, or several"
        )
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
        command.add_argument("--workers", type=int, metavar="N", help="processes; default one a CPU")
        command.add_argument(
            "--address", help="of a Ray cluster to work on: auto, HOST:PORT or ray://HOST:PORT"
        )

    command = add(
        data_check, "check", "find everything that is wrong with shards, decoding all of them", tools
    )
    add_work(command)
    command.add_argument(
        "--fields", metavar="SPEC", help='what each sample must have: "image: jpg|png, sound?: wav"'
    )
    command.add_argument("--quick", action="store_true", help="structure only: decode nothing")
    command.add_argument("--resume", metavar="FILE", help="keep what was found there, and go on from it")
    command.add_argument(
        "--quarantine", metavar="FILE", help="write the faults there, for repack and training"
    )
    command = add(data_stats, "stats", "count and measure what shards hold, and find duplicates", tools)
    add_work(command)
    command.add_argument("--out", metavar="stats.html", help="write a page with pictures and histograms")
    command.add_argument(
        "--sample", type=int, metavar="N", help="read bodies of N random samples; default all"
    )
    command.add_argument("--seed", type=int, default=0, help="of the random draw")
    command.add_argument("--tokenizer", metavar="FILE", help="count the tokens of texts, too")
    command = add(data_preview, "preview", "a page and a contact sheet of some samples", tools)
    command.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="a folder, a tar, a brace pattern, or several"
    )
    command.add_argument("--out", required=True, metavar="FOLDER", help="for the page and the sheet")
    command.add_argument("--count", type=int, default=24, metavar="N", help="samples to show; default 24")
    command.add_argument("--seed", type=int, default=0, help="of the random draw")
    command.add_argument("--query", metavar="KEY", help="show the samples whose key is, or holds, this")
    command.add_argument("--json", action="store_true", help="print the result as one JSON object")

    def add_writing(command: Any) -> None:
        command.add_argument(
            "--samples-per-shard", type=int, default=10_000, metavar="N", help="at most, default 10000"
        )
        command.add_argument(
            "--shard-mb", type=float, default=1000.0, metavar="MB", help="megabytes, at most; default 1000"
        )
        command.add_argument("--shuffle", type=int, metavar="SEED", help="mix the samples")
        command.add_argument("--workers", type=int, metavar="N", help="processes, default one a CPU")
        command.add_argument(
            "--address", help="of a Ray cluster that does the work: auto, HOST:PORT or ray://"
        )
        command.add_argument("--json", action="store_true", help="print the summary as JSON")

    command = add(data_bench, "bench", "measure how fast shards are read here, and say what limits it", tools)
    command.add_argument("shards", nargs="+", metavar="SHARDS")
    command.add_argument(
        "--fields", metavar="SCHEMA", help='as "image: jpg|png, text: txt"; default: all known kinds'
    )
    command.add_argument("--threads", type=int, metavar="N", help="default: one a core")
    command.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each of the two passes")
    command.add_argument("--json", action="store_true")

    command = add(data_pack, "pack", "write shards of files, tables or Hugging Face data sets", tools)
    command.add_argument("out", metavar="OUT", help="the folder to make; a killed run goes on there")
    command.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="a folder of files, a .csv .tsv .jsonl .parquet .arrow table, a folder that `datasets` saved",
    )
    command.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=COLUMN",
        help="of a table; roles: image, audio, video, file, text, label, json, or a field's name",
    )
    command.add_argument("--split", help="of a data set that has several")
    command.add_argument("--classes", action="store_true", help="the first sub-folder is the class")
    command.add_argument("--limit", type=int, metavar="N", help="at most N samples")
    command.add_argument(
        "--resize", type=int, metavar="N", help="shrink pictures to a shorter side of N, as JPEG"
    )
    command.add_argument("--keys", choices=("number", "stem"), default="number")
    command.add_argument("--on-error", choices=("fail", "skip"), default="fail")
    command.add_argument("--first-dot", action="store_true", help="cat.seg.png is field seg.png of cat")
    command.add_argument("--allow-outside", action="store_true", help="read files outside of the source, too")
    add_writing(command)
    command = add(data_repack, "repack", "write shards anew: other sizes, filtered, shuffled", tools)
    command.add_argument("out", metavar="OUT", help="the folder to make; a killed run goes on there")
    command.add_argument(
        "shards", nargs="+", metavar="SHARDS", help="a folder, a tar, a brace pattern, or a URL"
    )
    command.add_argument("--require", nargs="+", default=[], metavar="FIELD", help="samples must have these")
    for name, word in (("min", "least"), ("max", "most")):
        command.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="COLUMN=X",
            help=f"at {word} X: FIELD.width, .height, .seconds, .chars or .bytes",
        )
    command.add_argument("--fields", nargs="+", metavar="FIELD", help="keep only these")
    command.add_argument("--rename", action="append", default=[], metavar="FIELD=NEW")
    command.add_argument(
        "--drop-bad", action="store_true", help="decode each sample, leave out what can't be"
    )
    command.add_argument(
        "--quarantine", metavar="F", help="leave out the samples that this .jsonl file lists"
    )
    add_writing(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
