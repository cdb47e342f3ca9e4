"""One attempt: a set of fresh processes on the nodes of a placement group, from their start to their end.

::

    attempt = Attempt(config, cluster=cluster, ...)
    failure = attempt.run(worker)      # None when all are done
    attempt.end()                      # every process is known to be gone, or `fence` says when it will be

On each node there is an agent, asked once a second by a thread of its own: whatever holds this process up for a
moment must not end the agents' lease. What the agents see tells of ranks that hang or lag; an agent that isn't heard
tells of a node that is gone, long before Ray would.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from mmscale_launcher import diagnose, processes
from mmscale_launcher.agent import Agent, Sign
from mmscale_launcher.cluster import ANSWER_TIMEOUT, Cluster, OnEvent, Stop, message, within
from mmscale_launcher.failures import Failure, of_death, of_outcome
from mmscale_launcher.layout import Layout, Node, Size
from mmscale_launcher.rank import Place, Rank, Reporter

if TYPE_CHECKING:
    from mmscale.config import Config

START_TIMEOUT = 120.0  # seconds the processes get to start, environment included
SAVE_TIMEOUT = 120.0  # seconds the ranks get to save and stop
GRACE = 1.0  # seconds in which the other ranks may tell the cause of a failure, after its first sign
POLL = 0.3  # seconds between looks at the reporter
POLL_AGENTS = 1.0  # seconds between looks at the ranks
SILENT_TIMEOUT = (
    8.0  # seconds without an answer of an agent; shorter than the lease, which is waited for anyway
)
KILL_TIMEOUT = 10.0  # seconds until a killed process is gone
STACK_TIMEOUT = 15.0  # seconds the agents get to find the stacks
MAX_EVENTS = 10_000  # kept by the reporter
MAX_PENDING_EVENTS = 1_000  # on their way to it


def start_reporter(cluster: Cluster) -> Any:
    """One for all attempts of a launch, near the driver; Ray starts it again should it die."""
    near = NodeAffinitySchedulingStrategy(cluster.node_id, soft=True) if cluster.node_id else "DEFAULT"
    options = {"num_cpus": 0, "max_restarts": -1, "max_pending_calls": MAX_PENDING_EVENTS}
    return ray.remote(Reporter).options(**options, scheduling_strategy=near).remote(MAX_EVENTS)


class Poller:
    """Asks the agents what their ranks do, and so renews their leases."""

    def __init__(self, agents: list[Any]) -> None:
        self._agents = agents
        self._ended = threading.Event()
        self.signs: dict[int, Sign] = {}  # by rank, the newest
        self.answered = [time.monotonic()] * len(agents)  # by node
        self._heard = [0] * len(agents)  # by node, the number of the newest answer
        self.dead: dict[int, RayError] = {}  # by node
        self._thread = threading.Thread(target=self._run, daemon=True, name="mmscale-poller")
        self._thread.start()

    def end(self) -> None:
        self._ended.set()

    def silent_s(self, node: int) -> float:
        """How long an agent that has answered once hasn't."""
        return time.monotonic() - self.answered[node] if self._heard[node] else 0.0

    def _run(self) -> None:
        pending: dict[Any, int] = {}
        while not self._ended.wait(POLL_AGENTS):
            for node, agent in enumerate(self._agents):
                if node not in pending.values() and node not in self.dead:
                    with suppress(RayError):
                        pending[agent.poll.remote(self._heard[node])] = node
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0.3) if pending else ([], [])
            for answer in ready:
                node = pending.pop(answer)
                try:
                    number, signs = ray.get(answer, timeout=1)
                except ActorUnavailableError:
                    continue  # the link may come back: how long it is silent decides
                except RayError as error:
                    self.dead[node] = error
                    continue
                self.signs.update((sign.rank, sign) for sign in signs)
                self.answered[node], self._heard[node] = time.monotonic(), number


class Attempt:
    """needs: what has the supervisor to ask of the ranks, as "drain" or "grow", or nothing; it sees the signs."""

    def __init__(
        self,
        config: Config,
        *,
        cluster: Cluster,
        emit: OnEvent,
        stop: Stop,
        layout: Layout,
        size: Size,
        group: PlacementGroup,
        reporter: Any,
        attempt_id: str,
        alive: Callable[[], dict[str, Node] | None],
        needs: Callable[[Attempt], str],
        tell_status: Callable[[Attempt], None],
    ) -> None:
        self._config, self._cluster, self._emit, self._stop = config, cluster, emit, stop
        self.layout, self._size, self._group, self._id = layout, size, group, attempt_id
        self._alive, self._needs, self._tell_status = alive, needs, tell_status
        self._lease_s = None if cluster.is_local else config.launch.lease_s
        self._agents: list[Any] = []
        self._actors: list[Any] = []
        self._reporter = reporter
        self._fetch: Any = None  # the events under way from the reporter
        self._poller: Poller | None = None
        self._watcher = diagnose.Watcher(
            hang_s=config.launch.hang_s, hang_steps=config.launch.hang_steps, start_s=config.launch.start_s
        )
        self._stragglers = diagnose.Stragglers()
        self._log_sizes: dict[int, int] = {}
        self.places: dict[int, Place] = {}
        self.asked = ""  # why the ranks were asked to save and stop
        self.report: dict[str, Any] = {}
        self.folder: str | None = None  # of the run, once rank 0 has told it
        self.first_step_at: float | None = None
        self.signalled: set[str] = set()  # nodes on which a rank got SIGTERM, not from us
        self.survivors: list[int] = []  # ids of processes that couldn't be ended
        self.silent: set[str] = set()  # nodes that don't say that their ranks are gone
        self.fence = 0.0  # on time.monotonic(): when ranks on nodes that don't answer are gone for sure

    @property
    def signs(self) -> list[Sign]:
        signs = self._poller.signs if self._poller else {}
        return [signs[rank] for rank in sorted(signs)]

    @property
    def step(self) -> int:
        return max((sign.beat.step for sign in self.signs if sign.beat), default=0)

    def run(self, worker: str, *, not_before: float) -> Failure | None:
        """Runs the ranks until all are done or one has failed. not_before: those before it are gone."""
        self._start()
        failure = self._find_places()
        if failure is not None:
            return failure
        while time.monotonic() < not_before:
            time.sleep(min(POLL, max(0.0, not_before - time.monotonic())))
        failure = self._watch(self._begin(worker))
        self._tell(last=True)
        return failure

    def _start(self) -> None:
        bundles = [
            PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node)
            for node in range(len(self.layout.workers))
        ]
        launch_id = self._id.rpartition("-")[0]
        for bundle in bundles:
            # the bundle holds the CPUs; an actor needs no part of them to be in it
            agent = ray.remote(Agent).options(num_cpus=0, max_concurrency=4, scheduling_strategy=bundle)
            self._agents.append(agent.remote(self._lease_s, launch_id))
        search_path = [entry for entry in sys.path if entry]
        for node, _ in self.layout.places():
            rank = ray.remote(Rank).options(
                num_cpus=0, num_gpus=int(self._size.use_gpu), scheduling_strategy=bundles[node]
            )
            self._actors.append(rank.remote(search_path, str(Path.cwd())))
        self._poller = Poller(self._agents)

    def _find_places(self) -> Failure | None:
        """All ranks' places, so that all can be ended; then the agents are told, and clear what is left there."""
        answers = {actor.place.remote(): rank for rank, actor in enumerate(self._actors)}
        deadline, failure = time.monotonic() + START_TIMEOUT, None
        while answers:
            left = deadline - time.monotonic()
            ready, _ = ray.wait(list(answers), timeout=max(0.0, min(left, POLL)))
            for answer in ready or (list(answers) if left <= 0 else []):
                rank = answers.pop(answer)
                try:
                    self.places[rank] = ray.get(answer, timeout=0 if left <= 0 else GRACE)
                except RayError as error:
                    failure = failure or of_death(rank, self.who(rank), error, start_timeout=START_TIMEOUT)
                    deadline = min(deadline, time.monotonic() + GRACE)
        if failure is not None:
            return failure
        ranks: dict[int, dict[int, tuple[int, int]]] = {}
        for rank, (node, _) in enumerate(self.layout.places()):
            ranks.setdefault(node, {})[rank] = (self.places[rank].group, self.places[rank].session)
        try:
            left = START_TIMEOUT / 4
            cleared = ray.get([agent.clear.remote() for agent in self._agents], timeout=left)
            self.survivors += [pid for pids in cleared for pid in pids]
            ray.get([self._agents[node].watch.remote(groups) for node, groups in ranks.items()], timeout=left)
            assert self._poller is not None
            self._poller.answered = [time.monotonic()] * len(self._agents)  # their leases began before that
            paths = [
                self._agents[node].heartbeat_path.remote(r)
                for r, (node, _) in enumerate(self.layout.places())
            ]
            self._beats: list[str] = ray.get(paths, timeout=left)
        except RayError as error:
            found = of_death(0, "an agent", error, start_timeout=left)
            return replace(found, kind="died", title="")
        return None

    def environment(self, rank: int) -> dict[str, str]:
        node, local = self.layout.places()[rank]
        first = self.places[0]
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(self.layout.world_size),
            "LOCAL_WORLD_SIZE": str(self.layout.workers[node]),
            "MASTER_ADDR": first.address,
            "MASTER_PORT": str(first.free_port),
            "MMSCALE_HEARTBEAT": self._beats[rank],
            "MMSCALE_ATTEMPT": self._id,
            "MMSCALE_CAPTURE_OUTPUT": "1",
        }
        if not self._size.use_gpu:
            variables["DS_ACCELERATOR"] = "cpu"
        if "OMP_NUM_THREADS" in os.environ:
            variables["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        return variables

    def _begin(self, worker: str) -> dict[Any, int]:
        with suppress(OSError):
            run = self._config.run
            for path in Path(run.dir or f"runs/{run.name}", "logs").glob("rank-*.log"):
                self._log_sizes[int(path.stem[5:])] = path.stat().st_size
        config, places, running = pickle.dumps(self._config), self.layout.places(), {}
        for rank, actor in enumerate(self._actors):
            beside = [other for other, (node, _) in enumerate(places) if node == places[rank][0]]
            devices = [device for other in beside for device in self.places[other].devices]
            reporter = self._reporter if rank == 0 else None
            running[actor.run.remote(worker, config, self.environment(rank), devices, reporter)] = rank
        return running

    # watching

    def _watch(self, running: dict[Any, int]) -> Failure | None:
        failures: list[Failure] = []
        deadline, next_look = float("inf"), 0.0
        self._stop.ranks_run = True
        while running and time.monotonic() < deadline:
            if not self.asked and (reason := "stop" if self._stop.requested else self._needs(self)):
                self.asked, deadline = reason, min(deadline, time.monotonic() + SAVE_TIMEOUT)
                self._ask_to_stop()
            ready, _ = ray.wait(list(running), timeout=POLL)
            for answer in ready:
                rank = running.pop(answer)
                try:
                    outcome = ray.get(answer, timeout=GRACE)
                except RayError as error:
                    failures.append(of_death(rank, self.who(rank), error, start_timeout=START_TIMEOUT))
                    deadline = 0.0  # what the others say follows from it
                    continue
                if outcome.signalled and not self.asked:
                    self.signalled.add(self.places[rank].node_id)
                if outcome.kind != "done":
                    failures.append(of_outcome(rank, self.who(rank), outcome))
                    deadline = min(deadline, time.monotonic() + GRACE)
                elif rank == 0:
                    self.report = outcome.report
            self._tell()
            if not failures and time.monotonic() >= next_look:
                next_look = time.monotonic() + POLL_AGENTS
                failure = self._lost() or self._hung(running.values())
                failures += [failure] if failure else []
                deadline = min(deadline, time.monotonic() + GRACE) if failure else deadline
                self._tell_status(self)
        self._stop.ranks_run = False
        if self.asked and running and not failures:
            if self._stop.requested:
                raise KeyboardInterrupt
            rank = min(running.values())
            what = f"didn't save and stop within {SAVE_TIMEOUT:.0f} s"
            return Failure(rank=rank, who=self.who(rank), what=what, kind="hung", time=time.time())
        return min(failures, key=lambda failure: failure.priority, default=None)

    def _lost(self) -> Failure | None:
        """A node that Ray calls dead, or whose agent is dead or silent: too few answers to wait for more."""
        assert self._poller is not None
        alive = self._alive()
        for node in range(len(self._agents)):
            rank = next(r for r, (n, _) in enumerate(self.layout.places()) if n == node)
            if alive is not None and self.places[rank].node_id not in alive:
                what = "was lost with its node"
            elif node in self._poller.dead:
                what = "was lost with its node, or its agent there died"
            elif self._poller.silent_s(node) > SILENT_TIMEOUT:
                what = f"can't be reached: its node hasn't answered for {SILENT_TIMEOUT:.0f} s"
            else:
                continue
            return Failure(rank=rank, who=self.who(rank), what=what, kind="died", time=time.time())
        return None

    def _hung(self, running: Iterable[int]) -> Failure | None:
        signs = [sign for sign in self.signs if sign.rank in set(running)]
        if self.first_step_at is None and any(sign.beat and sign.beat.num_steps for sign in signs):
            self.first_step_at = time.monotonic()
        for straggler in self._stragglers.see(signs):
            self._emit(message(self._straggler_words(straggler)))
        if not signs or self._watcher.see(signs, time.monotonic()) is None:
            return None
        answers = []
        for node, agent in enumerate(self._agents):
            ranks = [rank for rank, (other, _) in enumerate(self.layout.places()) if other == node]
            answers.append(agent.stacks.remote(ranks))
        stacks: dict[int, str] = {}
        ready, _ = ray.wait(answers, num_returns=len(answers), timeout=STACK_TIMEOUT)
        for answer in ready:
            with suppress(RayError):
                stacks |= ray.get(answer, timeout=GRACE)
        rank, why = diagnose.culprit(signs, stacks, self._watcher.cpu_s(signs))
        beat = next(sign.beat for sign in signs if sign.rank == rank)
        where = (
            f"hangs in phase {beat.phase} ({beat.phase_s:.0f} s)" if beat else "hangs before its first step"
        )
        return Failure(
            rank=rank,
            who=self.who(rank),
            what=f"{where}: {why}",
            kind="hung",
            time=time.time(),
            step=beat.step if beat else None,
            details=stacks.get(rank, ""),
        )

    def _straggler_words(self, straggler: diagnose.Straggler) -> str:
        return (
            f"{self.who(straggler.rank)} is slow: its {straggler.phase} phase takes {straggler.ratio:.1f} times as "
            f"long as the others', {straggler.seconds:.2f} s more a step"
        )

    def _ask_to_stop(self) -> None:
        """Sends SIGTERM to every rank, on which `train` saves at its next step and raises Preempted."""
        reasons = {
            "stop": "stopping",
            "drain": "a node is being drained",
            "grow": "there is room for more ranks",
        }
        self._emit(message(f"{reasons[self.asked]}: the ranks save first"))
        places = self.layout.places()
        for node, agent in enumerate(self._agents):
            ranks = [rank for rank, (other, _) in enumerate(places) if other == node]
            with suppress(RayError):
                agent.signal.remote(ranks, signal.SIGTERM)

    def _tell(self, *, last: bool = False) -> None:
        """Hands the events that have arrived to the caller, asks for more; waits only for the last."""
        with suppress(RayError):  # without its reporter a run goes on, silently
            while True:
                self._fetch = self._fetch or self._reporter.drain.remote()
                if not last and not ray.wait([self._fetch], timeout=0)[0]:
                    return
                fetch, self._fetch = self._fetch, None
                events = ray.get(fetch, timeout=5)
                for event in events:
                    self.folder = event.get("folder", self.folder)
                    self._emit(event)
                if not events:
                    return

    def who(self, rank: int) -> str:
        place = self.places.get(rank)
        return f"rank {rank} on node {place.address}" if place else f"rank {rank}"

    # the end

    def end(self) -> dict[int, str]:
        """Ends every process, and waits until they are gone, where that can be known; gives the places back.

        Returns what each rank wrote last.
        """
        if self._poller is not None:
            self._poller.end()
        words: dict[int, str] = {}
        by_node: dict[int, list[int]] = {}
        for rank in self.places:
            by_node.setdefault(self.layout.places()[rank][0], []).append(rank)
        answers: dict[int, list[Any]] = {}
        for node, ranks in by_node.items():
            places = [self.places[rank] for rank in ranks]
            groups, files = (
                [(place.group, place.session) for place in places],
                [place.stderr for place in places],
            )
            if places[0].node_id == self._cluster.node_id:
                self.survivors += processes.kill_groups(groups, timeout=KILL_TIMEOUT)
                words.update(zip(ranks, map(processes.tail, files), strict=True))
            else:
                there = NodeAffinitySchedulingStrategy(places[0].node_id, soft=False)
                task = ray.remote(_end_groups).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
                answers[node] = [self._agents[node].end.remote(groups, files)]
                if self._poller is not None and node in self._poller.dead:  # but the node may live
                    answers[node].append(task.remote(groups, files))
        deadline = time.monotonic() + KILL_TIMEOUT + GRACE
        for node, tried in answers.items():
            silent = self._poller is not None and self._poller.silent_s(node) > 2 * POLL_AGENTS
            for answer in tried:
                with suppress(RayError):
                    left = max(0.1, (GRACE if silent else deadline - time.monotonic()))
                    survivors, last = ray.get(answer, timeout=left)
                    self.survivors += survivors
                    words.update(zip(by_node[node], last, strict=True))
                    break
            else:  # nobody there says that they are gone: they are when the lease has ended
                self.silent.add(self.places[by_node[node][0]].node_id)
                if self._poller is not None:
                    last_heard = self._poller.answered[node]
                    self.fence = max(self.fence, last_heard + (self._lease_s or 0.0) + POLL_AGENTS)
        with suppress(TimeoutError, RayError):
            within(ANSWER_TIMEOUT, self._withdraw)
        return {rank: text or self._log_tail(rank) for rank, text in words.items()}

    def _log_tail(self, rank: int) -> str:
        """What a rank wrote into its log, since it has one. The log is of all attempts: only what is new counts."""
        if self.folder is None:
            return ""
        path = Path(self.folder) / "logs" / f"rank-{rank}.log"
        with suppress(OSError):
            if path.stat().st_size > self._log_sizes.get(rank, 0):
                return processes.tail(str(path), start=self._log_sizes.get(rank, 0))
        return ""

    def _withdraw(self) -> None:
        """Tells Ray that the actors and their places are wanted no more."""
        for actor in [*self._actors, *self._agents]:
            with suppress(RayError):
                ray.kill(actor)
        remove_placement_group(self._group)


def _end_groups(groups: list[tuple[int, int]], files: list[str]) -> tuple[list[int], list[str]]:
    return processes.kill_groups(groups, timeout=KILL_TIMEOUT), [processes.tail(file) for file in files]
