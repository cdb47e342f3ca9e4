"""Runs a training over Ray: one process a rank, supervised from the driver, restarted together when one dies.

::

    report = launch(config)                                    # on this machine
    report = launch(config, address="auto", on_event=print)    # on a cluster

`launch` reserves one bundle a node, starts an actor a rank in it (ranks are numbered node by node), lets
each run `mmscale.train.train`, and waits. When a rank fails, all of its attempt are killed and known to be
gone before the next attempt begins, in fresh processes: neither DeepSpeed nor CUDA can be set up twice in
one. `train` resumes from the newest checkpoint that is whole. What follows from a failure:

- a `UserError` in any rank is final, and raised here as it was there;
- a rank that died, or lost its peers, is restarted up to `launch.max_restarts` times;
- any other exception is tried once more; if it comes again it is a bug, and `RankFailed` has its traceback.

Why plain actors in a placement group and not Ray Train: its limits, measured with Ray 2.60, are those that
matter here. It took 11 s to notice a killed worker and 73 s a lost node, tried a deterministic bug until
`max_failures`, couldn't outlive its own controller actor, and its snapshots missed reported checkpoints,
which mmscale keeps itself anyway. The price is this file. What it doesn't do: change the number of ranks
between attempts, or notice a rank that hangs (its peers do, after `engine.timeout`).

Ray is not in the step loop: rank 0's events go to a reporter actor that nobody waits for, and the driver
asks that one three times a second. A local Ray belongs to its run alone: nothing of it is left after it,
not even when the driver is killed by a signal that can't be caught (see `mmscale_launcher.processes`).
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# Ray reads this once, when it is imported: the death of a rank is told by us, not by the raylet as well.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RuntimeEnvSetupError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from mmscale.errors import ConfigError, UserError
from mmscale_launcher import processes
from mmscale_launcher.rank import Outcome, Place, Rank, Reporter

if TYPE_CHECKING:
    from mmscale.config import Config

CPU_WORKERS = 2  # on a node without GPUs, unless launch.workers_per_node says otherwise
PLACEMENT_TIMEOUT = 30.0  # seconds a cluster gets to make room
START_TIMEOUT = 120.0  # seconds the processes get to start, environment included
REACH_TIMEOUT = 5.0  # seconds a cluster gets to answer at all
SAVE_TIMEOUT = 120.0  # seconds the ranks get to save and stop
GRACE = 1.0  # seconds in which the other ranks may tell the cause of a failure, after its first sign
POLL = 0.3  # seconds between looks at the reporter
OBJECT_STORE_BYTES = 100_000_000  # little goes through it: configs, events, one report a rank
MAX_EVENTS = 10_000  # kept by the reporter
MAX_PENDING_EVENTS = 1_000  # on their way to it
KILL_TIMEOUT = 10.0  # seconds until a killed process is gone
ANSWER_TIMEOUT = 6.0  # seconds Ray gets to clean up by itself; 1.5 s is usual
MAX_SOCKET_PATH = 107  # bytes, a limit of Linux; Ray adds about 65 to its folder

OnEvent = Callable[[dict[str, Any]], None]


class RankFailed(UserError):
    """A rank failed in a way that restarting doesn't mend. The message holds its traceback, once."""

    exit_code = 1


def launch(
    config: Config,
    *,
    address: str | None = None,
    on_event: OnEvent | None = None,
    _worker: str = "mmscale.train:train",
) -> dict[str, Any]:
    """Trains `config` on launch.nodes x launch.workers_per_node ranks and returns rank 0's report.

    address: of a Ray cluster: "auto", "host:port" or "ray://host:port"; with None a Ray is started on this
    machine (RAY_ADDRESS is not looked at). on_event: called with rank 0's events, and with {"event":
    "message", "text": ...} for what the launcher has to say, in the calling thread. Raises ConfigError
    where the ranks can't be placed, RankFailed, and whatever UserError a rank raised. An interrupt ends all
    ranks before it goes on as KeyboardInterrupt. SIGTERM asks them to save and stop, which ends in their
    Preempted; before they run, and where they don't listen, it is an interrupt.
    """
    emit = on_event or (lambda event: None)
    with _connected(config, address, emit) as cluster:
        return _supervise(config, cluster=cluster, emit=emit, worker=_worker)


# ---------------------------------------------------------------------------------------------------- cluster


@dataclass(frozen=True, kw_only=True)
class _Cluster:
    is_local: bool
    node_id: str | None  # of the driver, None where it isn't on a node of the cluster


@contextmanager
def _connected(config: Config, address: str | None, emit: OnEvent) -> Iterator[_Cluster]:
    """Connects to a Ray, local or not, and leaves it as it was found: gone, running, or connected."""
    was_connected = ray.is_initialized()
    if address is None and was_connected:
        raise ConfigError(
            "this process is connected to a Ray already, so a local one can't be started: give an address"
        )
    with _interruptible():
        if address is None:
            with _local_ray(config, emit):
                yield _Cluster(is_local=True, node_id=ray.get_runtime_context().get_node_id())
            return
        if not was_connected:
            _join(address)
        try:
            is_client = address.startswith("ray://")
            yield _Cluster(
                is_local=False, node_id=None if is_client else ray.get_runtime_context().get_node_id()
            )
        finally:
            if not was_connected:
                with _uninterrupted():
                    ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes to reach a cluster that isn't there, and says so in its own words."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"address={address}: give auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_TIMEOUT).close()
    except OSError as error:
        raise ConfigError(f"can't join a Ray cluster at {address}: {error.strerror or error}") from None


def _join(address: str) -> None:
    if address != "auto":
        _check_reachable(address)
    packages = [importlib.util.find_spec(name) for name in ("mmscale", "mmscale_kernels", "mmscale_launcher")]
    folders = [
        spec.submodule_search_locations[0] for spec in packages if spec and spec.submodule_search_locations
    ]
    try:
        ray.init(
            address=address,
            runtime_env={"py_modules": folders},  # the nodes run the code of the driver
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"can't join a Ray cluster at {address}: {error}") from None


@contextmanager
def _local_ray(config: Config, emit: OnEvent) -> Iterator[None]:
    if config.launch.nodes > 1:
        raise ConfigError(
            f"launch.nodes={config.launch.nodes} needs a cluster, a local Ray is one node: give its address"
        )
    num_workers = config.launch.workers_per_node or CPU_WORKERS
    num_cores = len(os.sched_getaffinity(0))
    if num_workers > num_cores:
        emit(_message(f"{num_workers} ranks share {num_cores} CPU cores"))
    folder = _short_folder()
    mark = uuid.uuid4().hex
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", processes.__file__, mark, folder],
        stdin=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C reaches the whole process group of the driver
    )
    try:
        environment = {
            processes.MARK: mark,
            "SPT_NOENV": "1",  # else setproctitle, in each of Ray's Python processes, writes over the mark
            "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        with _environment(environment):
            ray.init(
                address="local",
                num_cpus=num_workers + 1,  # Ray starts a process for each beforehand; one is the reporter's
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=folder,
            )
        yield
    finally:
        with _uninterrupted():
            assert guard.stdin is not None
            # a SIGTERM to the whole process group leaves a Ray that answers no more: then the guard comes
            # first
            impatience = threading.Timer(ANSWER_TIMEOUT, guard.stdin.close)
            impatience.start()
            ray.shutdown()
            impatience.cancel()
            guard.stdin.close()
            guard.wait()


def _short_folder() -> str:
    for parent in (tempfile.gettempdir(), "/tmp"):
        folder = tempfile.mkdtemp(prefix="mmscale-", dir=parent)
        if len(os.fsencode(folder)) + 70 <= MAX_SOCKET_PATH:
            return folder
        Path(folder).rmdir()
    raise ConfigError(
        f"the folder for temporary files, {tempfile.gettempdir()}, is too long a path for sockets"
    )


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Calls something of Ray that may never return when Ray is half gone, and goes on without it if so."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is an interrupt, so that `finally` runs; Ray, too, sets a handler and leaves it behind."""
    if not _is_main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Cleaning up takes seconds; a second Ctrl-C must not end it half way."""
    if not _is_main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


class _Stop:
    """What SIGTERM does: while ranks run they are asked to save and stop; else, or at the second, an interrupt."""

    def __init__(self) -> None:
        self.ranks_run = self.requested = False

    def __call__(self, number: int, frame: object) -> None:
        if self.requested or not self.ranks_run:
            raise KeyboardInterrupt
        self.requested = True


# ------------------------------------------------------------------------------------------------ supervision


@dataclass(frozen=True, kw_only=True)
class _Failure:
    """How one rank failed."""

    rank: int
    who: str
    what: str
    kind: Literal["user_error", "died", "error", "peer_failed"]
    time: float  # seconds since the epoch
    title: str = ""  # of the exception
    traceback: str = ""
    error: UserError | None = None

    @property
    def priority(self) -> tuple[int, float, int]:
        """The least is the cause: what follows from a death or an exception elsewhere comes last."""
        return ("user_error", "died", "error", "peer_failed").index(self.kind), self.time, self.rank


def _supervise(config: Config, *, cluster: _Cluster, emit: OnEvent, worker: str) -> dict[str, Any]:
    stop = _Stop()
    if _is_main_thread():
        signal.signal(signal.SIGTERM, stop)  # only now, since Ray sets its own when it connects
    num_attempts = config.launch.max_restarts + 1
    seen: set[str] = set()
    for number in range(1, num_attempts + 1):
        attempt = _Attempt(config, cluster=cluster, emit=emit, stop=stop)
        try:
            failure = attempt.run(worker)
        except ConfigError as error:
            if number == 1:
                raise
            raise RankFailed(f"there is no room for attempt {number}: {error}") from None
        finally:
            with _uninterrupted():
                attempt.end()
        if failure is None:
            return attempt.report
        if failure.error is not None:
            raise failure.error
        if stop.requested:
            raise KeyboardInterrupt
        if attempt.folder is not None:  # whatever run.resume says, a restart goes on with the run it restarts
            run = config.run.model_copy(update={"dir": attempt.folder, "resume": "auto"})
            config = config.model_copy(update={"run": run})
        details = failure.traceback or attempt.last_words.get(failure.rank, "")
        crash = re.search("Fatal Python error: (.+)", details)
        what = f"crashed ({crash[1]})" if crash and failure.kind == "died" else failure.what
        told = f"{failure.who} {what}" + (f"\n{details}" if details else "")
        if attempt.survivors:
            raise RankFailed(f"processes {attempt.survivors} can't be ended; the cause of it:\n{told}")
        # numbers differ between two runs of one bug: addresses, bytes free, ports
        signature = re.sub(r"0x[0-9a-fA-F]+|\d+", "#", failure.title)
        if failure.kind == "error" and signature in seen:
            raise RankFailed(f"the same failure twice: {told}")
        seen.add(signature)
        if number == num_attempts:
            raise RankFailed(f"gave up after {number} attempts: {told}")
        # a traceback is told once, by the error that ends the run, if it does
        text = f"{failure.who}: {failure.title}" if failure.traceback else f"{failure.who} {what}"
        words = f"; it wrote last:\n{details}" if details and not failure.traceback else ""
        emit(_message(f"{text}; restarting, attempt {number + 1} of {num_attempts}{words}"))
    raise AssertionError("the last attempt returns or raises")


class _Attempt:
    """One set of processes, from their placement to their end."""

    def __init__(self, config: Config, *, cluster: _Cluster, emit: OnEvent, stop: _Stop) -> None:
        self._config = config
        self._stop = stop
        self._cluster = cluster
        self._emit = emit
        self._bundles: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._places: dict[int, Place] = {}
        self._reporter: Any = None
        self._fetch: Any = None  # the events under way from the reporter
        self.report: dict[str, Any] = {}
        self.folder: str | None = None  # of the run, once rank 0 has told it
        self.last_words: dict[int, str] = {}  # by rank, what its process wrote last
        self.survivors: list[int] = []  # ids of processes that couldn't be ended

    def run(self, worker: str) -> _Failure | None:
        """Places and runs the ranks until all are done or one has failed, which is returned."""
        config, cluster = self._config, self._cluster
        layout = self._reserve()
        world_size = config.launch.nodes * layout.num_workers
        near_driver = (
            NodeAffinitySchedulingStrategy(cluster.node_id, soft=True) if cluster.node_id else "DEFAULT"
        )
        self._reporter = (
            ray.remote(Reporter)
            .options(num_cpus=0, max_pending_calls=MAX_PENDING_EVENTS, scheduling_strategy=near_driver)
            .remote(MAX_EVENTS)
        )
        search_path = [entry for entry in sys.path if entry]
        for rank in range(world_size):
            bundle = PlacementGroupSchedulingStrategy(
                self._bundles, placement_group_bundle_index=rank // layout.num_workers
            )
            # the bundle holds the CPUs; an actor needs no part of them to be in it
            options = {"num_cpus": 0, "num_gpus": int(layout.use_gpu), "scheduling_strategy": bundle}
            self._actors.append(ray.remote(Rank).options(**options).remote(search_path, str(Path.cwd())))
        failure = self._find_places()
        if failure is not None:
            return failure
        running = {}
        for rank, actor in enumerate(self._actors):
            local = range(
                rank - rank % layout.num_workers, rank - rank % layout.num_workers + layout.num_workers
            )
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank - local.start),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(layout.num_workers),
                "MASTER_ADDR": self._places[0].address,
                "MASTER_PORT": str(self._places[0].free_port),
            }
            if not layout.use_gpu:
                environment["DS_ACCELERATOR"] = "cpu"
            if "OMP_NUM_THREADS" in os.environ:
                environment["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
            devices = [device for other in local for device in self._places[other].devices]
            reporter = self._reporter if rank == 0 else None
            running[actor.run.remote(worker, pickle.dumps(config), environment, devices, reporter)] = rank
        failure = self._watch(running)
        self._tell(last=True)
        return failure

    def end(self) -> None:
        """Ends every process of the attempt, waits until they are gone, and gives the places back."""
        _within(ANSWER_TIMEOUT, self._withdraw)
        on_node: dict[str, list[int]] = {}
        for rank, place in self._places.items():
            on_node.setdefault(place.node_id, []).append(rank)
        answers = {}
        for node_id, ranks in on_node.items():
            places = [self._places[rank] for rank in ranks]
            groups = [(place.group, place.session) for place in places]
            files = [place.stderr for place in places]
            if node_id == self._cluster.node_id:
                answers[node_id] = _end_groups(groups, files)
            else:
                there = NodeAffinitySchedulingStrategy(node_id, soft=False)
                task = ray.remote(_end_groups).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
                answers[node_id] = task.remote(groups, files)
        for node_id, answer in answers.items():
            if isinstance(answer, ray.ObjectRef):
                try:
                    answer = ray.get(answer, timeout=KILL_TIMEOUT + GRACE)
                except RayError:
                    continue  # the node is gone, and the ranks with it
            survivors, words = answer
            self.survivors += survivors
            self.last_words.update(zip(on_node[node_id], words, strict=True))

    def _withdraw(self) -> None:
        """Tells Ray that the actors and their places are wanted no more."""
        with suppress(RayError):
            for actor in [*self._actors, self._reporter]:
                if actor is not None:
                    ray.kill(actor)
            if self._bundles is not None:
                remove_placement_group(self._bundles)

    # placement

    def _reserve(self) -> _Layout:
        """Reserves a bundle on each of launch.nodes nodes, or raises ConfigError in a bounded time."""
        num_nodes = self._config.launch.nodes
        layout = _Layout.of(self._config, self._cluster)
        if not (self._cluster.is_local and layout.num_fitting < num_nodes):
            self._bundles = placement_group(
                [layout.bundle] * num_nodes, strategy="STRICT_SPREAD" if num_nodes > 1 else "PACK"
            )
            waiting = time.monotonic()
            while time.monotonic() < waiting + PLACEMENT_TIMEOUT:
                if self._bundles.wait(1):  # seconds, short so that an interrupt gets through
                    return layout
            layout = _Layout.of(self._config, self._cluster)
        free = ray.available_resources()
        raise ConfigError(
            f"launch.nodes={num_nodes} with {layout.num_workers} workers each asks for {num_nodes} node(s) "
            f"with {_resources(layout.bundle)} each; there are {layout.nodes}; "
            f"free at present: {_resources(free)}"
        )

    def _find_places(self) -> _Failure | None:
        deadline = time.monotonic() + START_TIMEOUT
        answers = [actor.place.remote() for actor in self._actors]
        failure = None
        for rank, answer in enumerate(answers):  # all of them, so that all can be ended
            try:
                left = max(0.0, deadline - time.monotonic()) if failure is None else GRACE
                self._places[rank] = ray.get(answer, timeout=left)
            except RayError as error:
                failure = failure or self._death(rank, error)
        return failure

    # watching

    def _watch(self, running: dict[Any, int]) -> _Failure | None:
        failures: list[_Failure] = []
        deadline = float("inf")
        asked = False
        self._stop.ranks_run = True
        while running and time.monotonic() < deadline:
            if self._stop.requested and not asked:
                asked, deadline = True, min(deadline, time.monotonic() + SAVE_TIMEOUT)
                self._ask_to_stop()
            ready, _ = ray.wait(list(running), timeout=POLL)
            for answer in ready:
                rank = running.pop(answer)
                try:
                    outcome = ray.get(answer)
                except RayError as error:
                    failures.append(self._death(rank, error))
                    deadline = 0.0  # what the others say follows from it
                    continue
                if outcome.kind != "done":
                    failures.append(self._failure(rank, outcome))
                    deadline = min(deadline, time.monotonic() + GRACE)
                elif rank == 0:
                    self.report = outcome.report
            self._tell()
        self._stop.ranks_run = False
        if asked and not failures:
            raise KeyboardInterrupt
        return min(failures, key=lambda failure: failure.priority, default=None)

    def _ask_to_stop(self) -> None:
        """Sends SIGTERM to every rank, on which `train` saves at its next step and raises Preempted."""
        self._emit(_message("stopping: the ranks save first"))
        for place in self._places.values():
            if place.node_id == self._cluster.node_id:
                os.kill(place.group, signal.SIGTERM)
            else:
                there = NodeAffinitySchedulingStrategy(place.node_id, soft=False)
                task = ray.remote(os.kill).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
                task.remote(place.group, signal.SIGTERM)

    def _tell(self, *, last: bool = False) -> None:
        """Hands the events that have arrived to the caller, asks for more; waits only for the last."""
        with suppress(RayError):  # without its reporter a run goes on, silently
            while True:
                self._fetch = self._fetch or self._reporter.drain.remote()
                if not last and not ray.wait([self._fetch], timeout=0)[0]:
                    return
                events, self._fetch = ray.get(self._fetch, timeout=5), None
                for event in events:
                    self.folder = event.get("folder", self.folder)
                    self._emit(event)
                if not events:
                    return

    def _who(self, rank: int) -> str:
        place = self._places.get(rank)
        return f"rank {rank} on node {place.address}" if place else f"rank {rank}"

    def _failure(self, rank: int, outcome: Outcome) -> _Failure:
        assert outcome.kind != "done"
        error = _unpickled(outcome) if outcome.kind == "user_error" else None
        what = "lost its peers" if outcome.kind == "peer_failed" else "raised an exception"
        return _Failure(
            rank=rank,
            who=self._who(rank),
            what=what,
            kind=outcome.kind,
            time=outcome.time,
            title=outcome.title,
            traceback=outcome.traceback,
            error=error,
        )

    def _death(self, rank: int, error: RayError) -> _Failure:
        """What Ray says for an answer. An actor that can't even begin is a bug, the rest are deaths."""
        text = str(error).strip()
        no_start = isinstance(error, RuntimeEnvSetupError) or getattr(error, "actor_init_failed", False)
        if no_start:
            what = "couldn't start"
        elif isinstance(error, GetTimeoutError):
            what = f"didn't start within {START_TIMEOUT:.0f} s"
        elif isinstance(error, OutOfMemoryError) or "NODE_OUT_OF_MEMORY" in text:
            what = "was killed by Ray, since its node ran out of memory"
        elif "node died" in text.lower() or "NODE_DIED" in text:
            what = "died with its node"
        else:
            what = "was killed (by signal 9, say, as for want of memory)"
        return _Failure(
            rank=rank,
            who=self._who(rank),
            what=what,
            kind="error" if no_start else "died",
            time=time.time(),
            title=text.splitlines()[-1] if no_start else "",
            traceback=text if no_start else "",
        )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a run asks of the cluster, and what there is."""

    num_workers: int  # on each node
    use_gpu: bool
    bundle: dict[str, float]  # resources, on each node
    num_fitting: int  # nodes that have as much
    nodes: str  # in words

    @staticmethod
    def of(config: Config, cluster: _Cluster) -> _Layout:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        gpus = sorted((int(node["Resources"].get("GPU", 0)) for node in nodes), reverse=True)
        num_gpus = gpus[min(config.launch.nodes, len(gpus)) - 1]  # as many nodes as are asked have these
        use_gpu = config.run.device == "cuda" or (config.run.device == "auto" and num_gpus > 0)
        num_workers = config.launch.workers_per_node or (num_gpus if use_gpu and num_gpus else CPU_WORKERS)
        # CPUs are there to be shared out on a cluster; those of a local Ray are ours, and may be too few
        bundle: dict[str, float] = {"CPU": 1 if cluster.is_local else num_workers}
        if use_gpu:
            bundle["GPU"] = num_workers
        fitting = [n for n in nodes if all(n["Resources"].get(name, 0) >= bundle[name] for name in bundle)]
        listed = [f"{node['NodeManagerAddress']} ({_resources(node['Resources'])})" for node in nodes]
        return _Layout(
            num_workers=num_workers,
            use_gpu=use_gpu,
            bundle=bundle,
            num_fitting=len(fitting),
            nodes=f"{len(nodes)} node(s): {', '.join(listed)}",
        )


def _resources(amounts: dict[str, float]) -> str:
    return f"{amounts.get('CPU', 0):g} CPU and {amounts.get('GPU', 0):g} GPU"


def _end_groups(groups: list[tuple[int, int]], files: list[str]) -> tuple[list[int], list[str]]:
    """Ends process groups of this node; returns processes that are left, and the files' last lines."""
    survivors = []
    for group, session in groups:
        survivors += processes.kill_group(group, session, timeout=KILL_TIMEOUT)
    return survivors, [processes.tail(file) for file in files]


def _unpickled(outcome: Outcome) -> UserError:
    try:
        error = pickle.loads(outcome.error)
    except Exception:  # a class of the user's own, say, that this process can't import
        error = UserError(outcome.title)
    assert isinstance(error, UserError)
    error.is_told_by_another = False  # whichever rank's it is, here it is the only one
    return error


def _message(text: str) -> dict[str, Any]:
    return {"event": "message", "text": text}
