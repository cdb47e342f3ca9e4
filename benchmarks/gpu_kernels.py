"""The kernels on a GPU, in one command: their tests, their speed beside the peers, and checks that no timing shows.

    python benchmarks/gpu_kernels.py --minutes 8 --out results       # everything, the most important first
    python benchmarks/gpu_kernels.py --only 'softmax' --out results  # cases whose name holds this (* and ? work)
    python benchmarks/gpu_kernels.py --smoke --out smoke             # tiny sizes, on any device: does each case run?
    python benchmarks/gpu_kernels.py --table results/results.jsonl   # the Markdown table of a result file
    python benchmarks/gpu_kernels.py --list

Needs a checkout, torch and triton, and pytest for the tests; nothing of ours has to be installed. Peers are used where
they can be imported. Writes into --out: `results.jsonl`, one JSON object a line, complete up to the moment of a cut;
`table.md`; `tests.log` and `worker.log`. README.md beside this file says what a line means. Exit codes: 0 all cases ran
or were skipped for want of time, 1 a test, a check or ours failed, 2 wrong usage or no device.

The trade-off: a budget of minutes, so few samples of many cases. Rows of one case are taken in turns in one process
and may be compared; rows of different runs may not.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels"
sys.path[:0] = [str(ROOT / "benchmarks"), str(KERNELS)]

from gpu.cases import all_cases  # noqa: E402
from gpu.table import read, table  # noqa: E402
from gpu.worker import Supervisor, emitter, machine, own_stdout, work  # noqa: E402

NO_DEVICE = 2


def environment() -> dict[str, str]:
    """This process's variables, with the kernels where they can be imported."""
    paths = [str(KERNELS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


class Results:
    """The result file: each line is flushed, and timed rows get their percentages of the ceilings seen so far."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("w", encoding="utf-8")
        self.ceilings: dict[str, float] = {}
        self.bad = 0

    def write(self, line: dict[str, Any]) -> None:
        if line["kind"] == "ceiling":
            self.ceilings[line["name"]] = line["value"]
        if line["kind"] == "row":
            seconds = line["ms"]["p50"] / 1e3
            line["tflops"] = line["flops"] / seconds / 1e12
            line["terabytes_per_s"] = line["bytes"] / seconds / 1e12
            if not line["tiny"] and {"product", "copy"} <= self.ceilings.keys():
                line["percent_of_product"] = 100 * line["tflops"] / self.ceilings["product"]
                line["percent_of_copy"] = 100 * line["terabytes_per_s"] / self.ceilings["copy"]
        ours = line.get("contender") in (None, "ours")
        failed_check = line["kind"] == "check" and not line["passed"]
        failed_tests = line["kind"] == "tests" and not line["passed"]
        if failed_check or failed_tests or (line["kind"] == "failure" and ours):
            self.bad += 1
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()
        if line["kind"] in ("failure", "skipped", "done", "check", "tests", "ceiling", "tune"):
            shown = {k: v for k, v in line.items() if k not in ("kind", "time")}
            print(f"{line['kind']}: {json.dumps(shown)[:300]}", flush=True)


def run_tests(out: Path, smoke: bool, seconds: float, write: Any) -> None:
    """The GPU-marked tests, shared out over the processors (most of the time is compiling); killed after `seconds`."""
    if importlib.util.find_spec("pytest") is None:
        write({"kind": "skipped", "case": "tests", "why": "pytest is not installed"})
        return
    folder = ROOT / "tests" / "gpu"
    processors = os.cpu_count() or 1
    num_shards = 1 if smoke or processors < 8 else min(12, processors - 2)
    # The repository's own settings and conftest need what a bare machine lacks.
    command = [
        sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-rfEs", "--tb=short", "-p", "no:cacheprovider",
        "-c", os.devnull, f"--rootdir={ROOT}", f"--confcutdir={folder}", "-o", "markers=gpu: needs a device",
    ]  # fmt: skip
    began = time.time()
    running = []
    for number in range(num_shards):
        log = out / f"tests-{number}.part"
        shard = {**environment(), "MMSCALE_GPU_TESTS_SHARD": f"{number}/{num_shards}"}
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [*command, str(folder)], stdout=stream, stderr=stream, env=shard, cwd=ROOT
            )
        running.append((number, log, process))
    with (out / "tests.log").open("w", encoding="utf-8") as whole:
        for number, log, process in running:
            cut = False
            try:
                process.wait(timeout=max(1.0, began + seconds - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                cut = True
            text = log.read_text(encoding="utf-8", errors="replace")
            log.unlink()
            whole.write(text)
            lines = text.splitlines() or [""]
            counts = {
                word.lower(): text.count(f" {word} ") for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
            }
            summary = f"cut off after {seconds:.0f} s: {counts}" if cut else lines[-1].strip("= ")
            write(
                {
                    "kind": "tests",
                    "time": round(time.time(), 3),
                    "shard": f"{number + 1} of {num_shards}",
                    "passed": process.returncode in (0, 5)
                    or (cut and not counts["failed"] + counts["error"]),
                    "exit_code": process.returncode,
                    "cut": cut,
                    "summary": summary,
                    "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50],
                }
            )


def run_tuner(out: Path, seconds: float, write: Any) -> None:
    """`python -m mmscale_kernels.tune`, its tables into the checkout and, as a copy, into the results."""
    if not (KERNELS / "mmscale_kernels" / "tune.py").exists():
        write({"kind": "skipped", "case": "tune", "why": "there is no mmscale_kernels.tune"})
        return
    tables = KERNELS / "mmscale_kernels" / "tables"
    command = [sys.executable, "-m", "mmscale_kernels.tune", "--out", str(tables)]
    with (out / "tune.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=log, env=environment(), timeout=seconds, check=False
            )
            write({"kind": "tune", "exit_code": done.returncode})
        except subprocess.TimeoutExpired:
            write({"kind": "tune", "exit_code": None, "why": f"cut off after {seconds:.0f} s"})
    shutil.copytree(tables, out / "tables", dirs_exist_ok=True)


def worker_main(options: argparse.Namespace) -> int:
    """Run cases named on the command line in this process, lines to standard output."""
    emit = emitter(own_stdout())
    import torch

    on_gpu = torch.cuda.is_available()
    if not (on_gpu or options.smoke):
        emit("no device", why="torch sees no CUDA or ROCm device; --smoke runs anywhere")
        return NO_DEVICE
    from gpu.harness import Setting
    from mmscale_kernels import configs

    device = torch.device("cuda" if on_gpu else "cpu")
    versions: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
    if on_gpu:
        properties = torch.cuda.get_device_properties(device)
        versions.update(
            device_name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            num_multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            l2_mib=getattr(properties, "L2_cache_size", 0) // 2**20,
        )
    emit("machine", **{"device_name": "cpu", **machine(), **versions}, smoke=options.smoke, argv=options.told)
    setting = Setting(device, options.smoke, frozenset(map(tuple, json.loads(options.excluded))))
    last: list[Any] = [None]

    def after() -> None:
        record = configs.record(device)
        if record != last[0]:
            last[0] = json.loads(json.dumps(record))
            emit("configs", **record)
        if on_gpu:
            torch.cuda.empty_cache()

    return work(all_cases(), json.loads(options.cases), setting, options.deadline, emit, after)


def select(names: list[str], pattern: str | None) -> list[str]:
    """Names that match; the ceilings always, since percentages need them."""
    if pattern is None:
        return names
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [name for name in names if name == "ceilings" or fnmatch.fnmatchcase(name, wild)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of the whole run (default: 8)")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name holds or matches this")
    parser.add_argument("--list", action="store_true", help="print the cases' names in their order")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--no-tests", action="store_true", help="leave the GPU tests out")
    parser.add_argument("--tune", action="store_true", help="tune the launch configurations before timing")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print the Markdown table of a result file"
    )
    for hidden in ("--cases", "--excluded", "--told"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return worker_main(options)
    if options.table is not None:
        print(table(read(options.table)), end="")
        return 0
    names = select(list(all_cases()), options.only)
    if options.list:
        print("\n".join(names))
        return 0
    if options.out is None:
        parser.error("--out is missing: the folder for the results")
    if not set(names) - {"ceilings"} and options.only != "ceilings":
        parser.error(f"--only {options.only!r} matches no case; --list prints them")
    return run(options, names, sys.argv[1:] if arguments is None else arguments)


def run(options: argparse.Namespace, names: list[str], told: list[str]) -> int:
    began = time.time()
    total = 60 * options.minutes
    deadline = began + total
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out / "results.jsonl")
    no_device = False

    def write(line: dict[str, Any]) -> None:
        nonlocal no_device
        no_device |= line["kind"] == "no device"
        results.write(line)

    def command(left: list[str], excluded: list[tuple[str, str]]) -> list[str]:
        settings = {"--cases": left, "--excluded": excluded, "--told": told}
        flat = [text for key, value in settings.items() for text in (key, json.dumps(value))]
        smoke = ["--smoke"] if options.smoke else []
        return [sys.executable, __file__, "--worker", "--deadline", str(deadline), *smoke, *flat]

    supervisor = Supervisor(command, out / "worker.log")
    # In a smoke run one worker does it all: starting one takes seconds, and the tests disturb no timing that counts.
    first = names if options.smoke else names[:1]
    supervisor.run(first, deadline, write)
    if not no_device:
        if not options.no_tests:
            run_tests(out, options.smoke, 0.4 * total, write)
        if options.tune:
            run_tuner(out, 0.4 * max(10.0, deadline - time.time()), write)
        supervisor.run([name for name in names if name not in first], deadline, write)
    write({"kind": "end", "time": round(time.time(), 3), "seconds": round(time.time() - began, 1)})
    text = table(read(out / "results.jsonl"))
    (out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if no_device:
        print("no CUDA or ROCm device: nothing was measured; --smoke runs anywhere", file=sys.stderr)
        return NO_DEVICE
    return 1 if results.bad else 0


if __name__ == "__main__":
    sys.exit(main())
