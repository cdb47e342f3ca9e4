"""What the tests of faults share: tiny launched runs, their traces, real faults for them, records of what was measured.

::

    expected = reference(scene_shards, steps=40, world_size=2)           # what nothing disturbed
    with Launched(tmp_path, scene_shards, "hurt", "train.duration=40", workers=2) as launched:
        launched.wait_step(12)
        launched.kill(1)
        code, told = launched.finish(120)
    assert code == 0, told
    assert_exact(launched.run, expected)
    record("kill -9 of a rank", lost_steps=2, seconds=8.1)

`reference` runs plain `mmscale train` processes without Ray, so what the launcher does is compared with what it can't
have touched. The command runs in `folder`, where `demo-data` is made a link to the shards, so relative paths are used
as a user would. MMSCALE_CHAOS=ci|standard|full says how many seeds there are; with MMSCALE_CHAOS_RESULTS=FILE, `record`
adds a line of JSON to that file, which benchmarks/reliability.py makes a table of.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from mmscale_launcher import processes

from mmscale import heartbeat
from mmscale.metrics import read_json_lines

TESTS = Path(__file__).resolve().parents[1]
MMSCALE = Path(sys.executable).with_name("mmscale")
SCALE: Literal["ci", "standard", "full"] = os.environ.get("MMSCALE_CHAOS", "ci")  # type: ignore[assignment]
RESULTS = "MMSCALE_CHAOS_RESULTS"

# Tri-modal, three tasks in turn; a step of some milliseconds, so that a run is mostly the start of its processes.
SMALL: list[str] = [
    "run.device=cpu",
    "run.threads=1",
    "data.evals={}",
    "data.batch_size=12",  # 1, 2, 3, 4, 6 ranks
    "data.cache_mb=8",
    "data.threads=1",
    "data.fields.text.first=null",
    "model.width=32",
    "model.depth=1",
    "model.num_heads=2",
    "model.mlp_ratio=2",
    "model.embed_dim=16",
    "model.text.max_length=12",
    "model.image.size=32",
    "model.image.stem_widths=[8,16]",
    "model.image.patch_size=2",
    "model.audio.num_mels=16",
    "model.audio.hop=320",
    "model.audio.max_frames=96",
    "model.audio.stem_widths=[16,16]",
    "model.audio.patch_size=2",
    "optim.lr=1e-3",
    "optim.warmup=5%",
    "train.duration=60",
    "train.log_every=1",
    "train.log_keys=true",
    "train.save_every=10",
    "train.eval_every=null",
    "engine.zero_stage=1",
    "engine.precision=fp32",
]

# Runs `mmscale ...` with another worker function in the place of mmscale.train.train: a user's code.
_WITH_WORKER = """
import functools, sys
import mmscale_launcher
from mmscale.cli import main
mmscale_launcher.launch = functools.partial(mmscale_launcher.launch, _worker=sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


def seeds(*, ci: int = 6, standard: int = 10, full: int = 20) -> list[int]:
    """As many seeds as the present scale asks for."""
    return list(range({"ci": ci, "standard": standard, "full": full}[SCALE]))


def record(row: str, **figures: Any) -> None:
    """Notes what was measured for a row of the fault table."""
    if path := os.environ.get(RESULTS):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"row": row, "figures": figures, "time": time.time()}) + "\n")


def wait_for(condition: Callable[[], Any], timeout: float, *, what: str = "it", every: float = 0.02) -> Any:
    """Waits until the condition holds and returns what it gave."""
    deadline = time.monotonic() + timeout
    while True:
        if result := condition():
            return result
        assert time.monotonic() < deadline, f"{what} didn't happen within {timeout:g} s"
        time.sleep(every)


def same_ray(pid: int) -> set[int]:
    """The living processes of the local Ray that this one belongs to; empty for one of a cluster."""
    marks = [line for line in _environment_of(pid).splitlines() if line.startswith(f"{processes.MARK}=")]
    return {
        other for other in living_processes() if marks and marks[0] in _environment_of(other).splitlines()
    }


def living_processes() -> list[int]:
    """All that aren't zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):  # it may have ended meanwhile
            if entry.name.isdigit():
                state = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
                found += [int(entry.name)] if state not in "ZX" else []
    return found


def _environment_of(pid: int) -> str:
    with suppress(OSError):
        return "\n".join(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
    return ""


# --------------------------------------------------------------------------------------------- what a run has done


@dataclass(frozen=True)
class Trace:
    """What is compared between two runs."""

    losses: dict[int, float]  # by step, of all ranks
    keys: dict[int, tuple[str, ...]]  # by step, the samples of all ranks, sorted
    weights: str  # SHA-256 of the newest checkpoint's model.safetensors; "" without one


def trace(run: Path) -> Trace:
    """Reads a run's folder. Of a step that was done twice the later record counts."""
    losses = {line["step"]: line["loss"] for line in read_json_lines(run / "metrics.jsonl")}
    by_step: dict[int, list[str]] = {}
    for path in (run / "keys").glob("rank-*.jsonl"):
        last = {line["step"]: line["keys"] for line in read_json_lines(path)}
        for step, keys in last.items():
            by_step.setdefault(step, []).extend(keys)
    saved = sorted(
        path for path in run.glob("checkpoints/step-*/model.safetensors") if not path.parent.suffix
    )
    weights = hashlib.sha256(saved[-1].read_bytes()).hexdigest() if saved else ""
    return Trace(losses, {step: tuple(sorted(keys)) for step, keys in by_step.items()}, weights)


def assert_exact(run: Path, expected: Trace) -> None:
    """The losses of every step, bit for bit, the samples of every step, and the final weights."""
    found = trace(run)
    wrong = {
        step: (found.losses.get(step), loss)
        for step, loss in expected.losses.items()
        if found.losses.get(step) != loss
    }
    assert not wrong, f"losses differ from step {min(wrong)} on (found, expected): {wrong}"
    assert found.losses.keys() == expected.losses.keys()
    assert found.keys == expected.keys
    assert found.weights == expected.weights != ""


def assert_close(run: Path, expected: Trace, *, rel: float = 1e-5, steps: int = 50) -> None:
    """Equal until the number of ranks changed, then within `rel` for `steps` steps; the samples of every step equal.

    The sums of a step are added up in another order by another number of ranks, so the losses part where that changes:
    the first step that differs at all is taken for it.
    """
    found = trace(run)
    assert found.losses.keys() == expected.losses.keys()
    assert found.keys == expected.keys
    changed = min(
        (step for step, loss in expected.losses.items() if found.losses[step] != loss), default=None
    )
    if changed is not None:
        apart = {
            step: abs(found.losses[step] / loss - 1)
            for step, loss in expected.losses.items()
            if changed <= step < changed + steps
        }
        worst = max(apart, key=apart.__getitem__)
        assert apart[worst] <= rel, (
            f"step {worst} is {apart[worst]:.2e} apart, the runs part at step {changed}"
        )


@dataclass(frozen=True)
class Plain:
    """An undisturbed run without Ray."""

    trace: Trace
    start_s: float  # from the start of the processes to their first step
    run: Path


_PLAIN: dict[tuple[Any, ...], Plain] = {}
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the session's process ends


def plain_run(
    shards: Path,
    *overrides: str,
    steps: int | None = None,
    world_size: int = 1,
    env: Mapping[str, str] | None = None,
) -> Plain:
    """`mmscale train` of as many processes, made once a session for the same arguments."""
    changes = [*SMALL, *overrides, *([f"train.duration={steps}"] if steps is not None else [])]
    key = (shards, world_size, *changes, *sorted((env or {}).items()))
    if key not in _PLAIN:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="mmscale-plain-"))
        folder = Path(_FOLDERS[-1].name)
        (folder / "demo-data").symlink_to(shards)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        begin = time.monotonic()
        started = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(env or {}),
            }
            output = (folder / f"output-{rank}").open("w")
            command = [str(MMSCALE), "train", "quickstart", "run.name=plain", *changes]
            started.append(
                subprocess.Popen(
                    command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
                )
            )
            output.close()
        try:
            run = folder / "runs" / "plain"

            def has_begun() -> bool:
                return last_step(run) > 0 or any(process.poll() for process in started)

            wait_for(has_begun, 300, what="the first step of the reference")
            start_s = time.monotonic() - begin
            for process in started:
                assert process.wait(300) == 0, "\n".join(p.read_text() for p in folder.glob("output-*"))
        finally:
            for process in started:
                process.kill()
                process.wait()
        _PLAIN[key] = Plain(trace(run), start_s, run)
    return _PLAIN[key]


def reference(
    shards: Path,
    *overrides: str,
    steps: int | None = None,
    world_size: int = 1,
    env: Mapping[str, str] | None = None,
) -> Trace:
    """The trace of an undisturbed run. overrides: `section.field=value`, added to SMALL."""
    return plain_run(shards, *overrides, steps=steps, world_size=world_size, env=env).trace


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl; 0 without one."""
    lines = read_json_lines(run / "metrics.jsonl")
    return int(lines[-1]["step"]) if lines else 0


# ---------------------------------------------------------------------------------------------------- launched runs


class Launched:
    """A `mmscale launch` in a process of its own, killed on leaving the `with`.

    overrides come after SMALL. address: of a cluster; None for a local Ray. worker: "module:function" in the place of
    mmscale.train.train, found in `folder` or in tests/ and tests/chaos. attach: a run's folder, for `--attach` (no
    overrides then). env: added to the environment. more: further arguments of the command. prefix:
    a command that runs it, elsewhere.
    """

    def __init__(
        self,
        folder: Path,
        shards: Path,
        name: str,
        *overrides: str,
        address: str | None = None,
        nodes: int = 1,
        workers: int = 2,
        env: Mapping[str, str] | None = None,
        worker: str | None = None,
        attach: Path | None = None,
        more: tuple[str, ...] = (),
        prefix: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.run = folder, folder / "runs" / name
        link = folder / "demo-data"
        if not link.exists():
            link.symlink_to(shards)
        self.command = [str(MMSCALE)] if worker is None else [sys.executable, "-c", _WITH_WORKER, worker]
        if attach is not None:
            self.command += ["launch", "--attach", str(attach)]
        else:
            sizes = [f"launch.nodes={nodes}", f"launch.workers_per_node={workers}"]
            # what it finds is another test's matter, and it takes seconds
            changes = [*SMALL, f"run.name={name}", *sizes, "launch.preflight=false", *overrides]
            self.command += ["launch", "quickstart", *changes]
        self.command += ["--address", address] if address is not None else []
        self.command = [*prefix, *self.command, *more]
        paths = [str(folder), str(TESTS), str(TESTS / "chaos"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            **(env or {}),
        }
        self._number = len(list(folder.glob("driver-*.out")))
        self.output = folder / f"driver-{self._number}.out"
        self.errors = folder / f"driver-{self._number}.err"
        self.started = time.monotonic()
        with self.output.open("w") as out, self.errors.open("w") as err:
            self.process = subprocess.Popen(
                self.command, cwd=folder, env=environment, stdout=out, stderr=err, start_new_session=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in self.rank_pids():  # on a cluster they live on until their lease ends
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    # what it does

    @property
    def step(self) -> int:
        return last_step(self.run)

    def status(self) -> dict[str, Any] | None:
        """RUN/status.json."""
        with suppress(OSError, ValueError):
            found: dict[str, Any] = json.loads((self.run / "status.json").read_text())
            return found
        return None

    def rank_pids(self) -> list[int]:
        """All rank processes of this launch that live. Ray names an actor's process after what it runs, and a rank
        works in the driver's folder.
        """
        found = []
        for pid in living_processes():
            with suppress(OSError):
                is_rank = Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Rank")
                if is_rank and Path(f"/proc/{pid}/cwd").readlink() == self.folder.resolve():
                    found.append(pid)
        return sorted(found)

    def beat_files(self) -> dict[int, Path]:
        """The heartbeat files of the living ranks, by process id: the ranks have them mapped."""
        found = {}
        for pid in self.rank_pids():
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                    path = Path(line.split(maxsplit=5)[-1])
                    if (
                        path.is_absolute()
                        and path.is_file()
                        and path.stat().st_size == heartbeat._RECORD.itemsize
                    ):
                        found[pid] = path
        return found

    def beats(self) -> dict[int, heartbeat.Beat]:
        """What the living ranks are doing, by process id."""
        read = {pid: heartbeat.read(path) for pid, path in self.beat_files().items()}
        return {pid: beat for pid, beat in read.items() if beat is not None}

    def saves_under_way(self) -> list[int]:
        """The steps whose checkpoints are being written."""
        return sorted(int(path.name[5:].split(".")[0]) for path in self.run.glob("checkpoints/step-*.tmp"))

    def ranks(self, timeout: float = 60) -> dict[int, int]:
        """rank -> process id, of all ranks of the attempt that runs; waits until there is one."""

        def complete() -> dict[int, int]:
            self._check()
            status, alive = self.status(), set(self.rank_pids())
            if not status or status["state"] != "running":
                return {}
            listed = {entry["rank"]: entry["pid"] for entry in status["ranks"]}
            is_whole = len(listed) == status["world_size"] and alive.issuperset(listed.values())
            return listed if is_whole else {}

        found: dict[int, int] = wait_for(complete, timeout, what="a status with all ranks alive")
        return found

    # faults

    def signal(self, rank: int, number: int) -> int:
        """Sends a signal to a rank; returns its process id."""
        pid = self.ranks()[rank]
        os.kill(pid, number)
        return pid

    def kill(self, rank: int) -> int:
        return self.signal(rank, signal.SIGKILL)

    # waiting

    def _check(self) -> None:
        assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.told()}"

    def told(self) -> str:
        return self.errors.read_text(errors="replace")

    def wait_step(self, step: int, timeout: float = 120) -> int:
        """Waits until metrics.jsonl has this step, or a later one, which is returned."""

        def reached() -> int:
            self._check()
            found = self.step
            return found if found >= step else 0

        found: int = wait_for(reached, timeout, what=f"step {step}")
        return found

    def wait_phase(self, rank: int, phase: str, timeout: float = 120) -> heartbeat.Beat:
        """Waits until the rank is seen in this phase."""
        pid = self.ranks(timeout)[rank]

        def seen() -> heartbeat.Beat | None:
            self._check()
            beat = self.beats().get(pid)
            return beat if beat is not None and beat.phase == phase else None

        found: heartbeat.Beat = wait_for(seen, timeout, what=f"rank {rank} in {phase}", every=0.001)
        return found

    def mark(self) -> int | None:
        """What tells the metrics of this attempt from those of the next: a rank that resumes replaces the file."""
        path = self.run / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else None

    def wait_resumed(self, mark: int | None, timeout: float = 120) -> int:
        """Waits for the first step of an attempt after the one with this mark, and returns that step."""

        def resumed() -> int:
            self._check()
            if self.mark() in (mark, None):
                return 0
            begun = self.last_start()
            return begun + 1 if begun is not None and self.step > begun else 0

        found: int = wait_for(resumed, timeout, what="a step of the next attempt")
        return found

    def last_start(self) -> int | None:
        """The step at which rank 0 began or went on last; None before it did."""
        log = self.run / "logs" / "rank-0.log"
        found = None
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            if " resumed at step " in line:
                found = int(line.partition(" resumed at step ")[2].split()[0])
            elif "M parameters, ZeRO-" in line:
                found = 0
        return found

    def starts(self) -> int:
        """How often rank 0 has begun or gone on."""
        log = self.run / "logs" / "rank-0.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        return text.count("M parameters, ZeRO-") + text.count(" resumed at step ")

    def finish(self, timeout: float = 180) -> tuple[int, str]:
        """Waits for the end; returns the exit code and what was told on standard error."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it didn't end within {timeout:g} s:\n{self.told()}") from None
        return code, self.told()


# ---------------------------------------------------------------------------------------------------------- cluster


class Nodes:
    """A Ray cluster on this machine: a head without CPUs, and nodes that come and go. Not connected to."""

    OPTIONS: Mapping[str, Any] = {"num_cpus": 2, "object_store_memory": 100_000_000}
    # A node whose raylet is killed is known to be dead at once; these are for one that doesn't answer.
    HEALTH: Mapping[str, Any] = {
        "health_check_initial_delay_ms": 3000,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 3000,
        "health_check_failure_threshold": 3,
    }

    def __init__(self, folder: Path, *, num_nodes: int = 3) -> None:
        from ray.cluster_utils import Cluster

        (folder / "ray").mkdir()
        self._folder = folder
        with self._environment():
            head = {**self.OPTIONS, "num_cpus": 0, "include_dashboard": False, "_system_config": self.HEALTH}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
            for _ in range(num_nodes):
                self._cluster.add_node(wait=False, **self.OPTIONS)
            self._cluster.wait_for_nodes()

    @contextmanager
    def _environment(self) -> Iterator[None]:
        changes = {
            "RAY_TMPDIR": str(self._folder),
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "SPT_NOENV": "1",  # else setproctitle writes over the environment, by which we know its processes
        }
        before = {name: os.environ.get(name) for name in (*changes, "RAY_ADDRESS")}
        os.environ.update(changes)
        os.environ.pop("RAY_ADDRESS", None)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def nodes(self) -> list[Any]:
        """Without the head; each has a node_id."""
        return sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)

    def node_of(self, pid: int) -> Any:
        """The node whose raylet is the parent of this process."""
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        parent = int(text.rpartition(")")[2].split()[1])
        for node in self.nodes:
            if any(info.process.pid == parent for info in node.all_processes["raylet"]):
                return node
        raise AssertionError(f"process {pid} belongs to no node of this cluster")

    def at_work(self) -> list[str]:
        """What Ray's workers on this cluster do, but for those that wait for work."""
        found = []
        for pid in living_processes():
            with suppress(OSError):
                name = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")
                is_ours = f"RAY_TMPDIR={self._folder}\n" in _environment_of(pid)
                # the agents are Ray's own, two for each node
                idle = name.startswith(("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent"))
                if name.startswith("ray::") and not idle and is_ours:
                    found.append(f"{name} ({pid})")
        return found

    def add_node(self) -> Any:
        with self._environment():
            return self._cluster.add_node(**self.OPTIONS)

    def remove_node(self, node: Any) -> None:
        """Kills its processes, without notice; what it ran ends with it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def refill(self, num_nodes: int = 3) -> None:
        while len(self.nodes) < num_nodes:
            self.add_node()

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def cluster(*, num_nodes: int = 3) -> Iterator[Nodes]:
    """A cluster of one's own, where the shared one won't do. Its folder has a short name, for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="mc-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(Path(folder), num_nodes=num_nodes)
        try:
            yield nodes
        finally:
            nodes.shutdown()
