"""The loop over attempts: what follows from a failure, how many ranks the next attempt has, and when it begins.

    report = Supervisor(config, cluster=cluster, emit=emit).run("mmscale.train:train")

Failures of machines, links and processes cost a restart each, of which there are launch.max_restarts: at once where
steps were gained since the last one, else after a pause that doubles. Failures that would come again end the run (see
`mmscale_launcher.failures`). A stop that the launcher itself asked for, to make room or to use it, costs neither
restart nor step.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from mmscale.errors import ConfigError, Preempted, UserError
from mmscale_launcher.attempt import Attempt, start_reporter
from mmscale_launcher.cluster import Cluster, OnEvent, Stop, is_main_thread, message, uninterrupted, within
from mmscale_launcher.failures import OUT_OF_MEMORY, Exhausted, Failure, OutOfMemory, RankFailed, Stalled
from mmscale_launcher.layout import Layout, Node, Size, arrange, in_words, look
from mmscale_launcher.status import write_status

if TYPE_CHECKING:
    from mmscale.config import Config

PLACEMENT_TIMEOUT = 30.0  # seconds a cluster gets to make room at first
RETURN_TIMEOUT = 120.0  # seconds a lost node gets to come back, where the run can't do without
SHRINK_AFTER = 3.0  # seconds without room, where the run can do with fewer nodes
GROW_AFTER = 30.0  # seconds from an attempt's first step until it makes way for a larger one
ROOM_FOR = 3.0  # seconds there must have been room for it
AVOID = 120.0  # seconds a node is not used on which a rank got SIGTERM: somebody wants it
NOTICE = 30.0  # seconds a node is not used that doesn't answer, in which Ray notices too
NUM_MESSAGES = 20  # kept in status.json
HEAD_TIMEOUT = 10.0  # seconds a call may take that asks the head


class NodeWatch:
    """The nodes of the cluster, asked for in a thread once a second: the call blocks while the head is away."""

    def __init__(self) -> None:
        self._ended, self._wanted = threading.Event(), threading.Event()
        self._nodes: dict[str, Node] = {}
        self._time = float("-inf")
        threading.Thread(target=self._run, daemon=True, name="mmscale-nodes").start()

    def end(self) -> None:
        self._ended.set()
        self._wanted.set()

    def alive(self) -> dict[str, Node] | None:
        """By id; None while the head doesn't answer, which says nothing of the nodes."""
        return self._nodes if time.monotonic() - self._time < HEAD_TIMEOUT else None

    def newest(self) -> list[Node]:
        """As of now, or of when the head last answered."""
        asked = time.monotonic()
        self._wanted.set()
        while self._time < asked and time.monotonic() < asked + HEAD_TIMEOUT:
            time.sleep(0.05)
        return list(self._nodes.values())

    def _run(self) -> None:
        while not self._ended.is_set():
            self._wanted.clear()
            with suppress(Exception):  # a head that is away answers with errors of many kinds
                begun = time.monotonic()
                self._nodes, self._time = {node.node_id: node for node in look()}, begun
            self._wanted.wait(1.0)


class Supervisor:
    def __init__(self, config: Config, *, cluster: Cluster, emit: OnEvent) -> None:
        self.config, self._cluster, self._caller = config, cluster, emit
        self._launch_id = uuid.uuid4().hex[:12]
        self._watch = NodeWatch()
        self._size = Size.of(config, self._watch.newest() or look(), is_local=cluster.is_local)
        self._avoided: dict[str, float] = {}  # node -> until when
        self._room_since: float | None = None
        self._reporter: Any = None
        self._restarts = 0
        self._status: dict[str, Any] = {
            "state": "starting",
            "attempt": 0,
            "attempt_id": "",
            "world_size": 0,
            "idle_workers": 0,
            "address": cluster.address,
            "launcher": {"pid": os.getpid(), "host": socket.gethostname()},
            "started": time.time(),
            "step": 0,
            "total_steps": None,
            "samples_per_s": None,
            "data_wait_frac": None,
            "eta_s": None,
            "loss": None,
            "checkpoint": None,
            "restarts": 0,
            "messages": [],
            "ranks": [],
            "exit_code": None,
            "error": None,
        }
        self._folder: Path | None = None

    # what is told

    def _emit(self, event: dict[str, Any]) -> None:
        status = self._status
        if event["event"] == "message":
            status["messages"] = [*status["messages"], event["text"]][-NUM_MESSAGES:]
        elif event["event"] == "log":
            names = ("step", "total_steps", "samples_per_s", "data_wait_frac", "eta_s", "loss")
            status.update({name: event[name] for name in names if name in event})
        elif event["event"] == "save":
            status["checkpoint"] = event.get("path")
        if "folder" in event:
            self._folder = Path(event["folder"])
        self._caller(event)

    def _tell_status(
        self, attempt: Attempt | None = None, *, state: str | None = None, **changes: Any
    ) -> None:
        status = self._status
        status |= changes | {"time": time.time(), "restarts": self._restarts}
        if state is not None:
            status["state"] = state
        if attempt is not None:
            status["state"] = "stopping" if attempt.asked else "running"
            status["ranks"] = _ranks(attempt)
        if self._folder is not None:
            write_status(self._folder, status)
        if attempt is not None:
            self._caller({"event": "ranks", "status": dict(status)})

    # the loop

    def run(self, worker: str) -> dict[str, Any]:
        stop = Stop()
        if is_main_thread():
            signal.signal(signal.SIGTERM, stop)  # only now, since Ray sets its own when it connects
        try:
            report = self._run(worker, stop)
        except BaseException as error:
            state = "stopped" if isinstance(error, Preempted | KeyboardInterrupt) else "failed"
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            self._tell_status(state=state, exit_code=code, error=str(error) or type(error).__name__, ranks=[])
            raise
        finally:
            self._watch.end()
            if self._reporter is not None:
                with suppress(TimeoutError, RayError):
                    within(HEAD_TIMEOUT, lambda: ray.kill(self._reporter))
        self._tell_status(state="done", exit_code=0, eta_s=0, ranks=[])
        return report

    def _run(self, worker: str, stop: Stop) -> dict[str, Any]:
        number, fence, without_progress = 0, 0.0, 0
        best_step = 0  # the furthest that a failure has come
        seen: set[tuple[str, int | None]] = set()
        was_memory = False
        preempted: UserError | None = None
        self._reporter = start_reporter(self._cluster)
        while True:
            number += 1
            layout, group = self._reserve(first=number == 1, instead=preempted)
            attempt = self._attempt(number, layout, group, stop)
            try:
                failure = attempt.run(worker, not_before=fence)
            finally:
                with uninterrupted():
                    words = attempt.end()
            fence = attempt.fence
            if failure is None:
                return attempt.report
            if (
                attempt.folder is not None
            ):  # whatever run.resume says, a restart goes on with the run it restarts
                run = self.config.run.model_copy(update={"dir": attempt.folder, "resume": "auto"})
                self.config = self.config.model_copy(update={"run": run})
            failure = _explained(failure, words.get(failure.rank, ""))
            if attempt.survivors:
                raise Exhausted(
                    f"processes {attempt.survivors} can't be ended; the cause of it:\n{failure.told()}"
                )
            preempted = None
            if (
                isinstance(failure.error, Preempted)
                and not failure.error.by_request
                and attempt.asked != "stop"
            ):
                self._avoid(attempt.signalled, AVOID)
                preempted = failure.error
                self._emit(
                    message(f"saved at step {failure.step or attempt.step}; going on where there is room")
                )
                self._tell_status(state="restarting", ranks=[])
                continue
            if failure.error is not None:
                raise failure.error
            if stop.requested:
                raise KeyboardInterrupt

            # deterministic failures
            if failure.kind == "memory":
                if was_memory:
                    raise OutOfMemory(f"out of memory in 2 attempts: {failure.told()}")
                was_memory = True
            else:
                was_memory = False
            if (signature := failure.signature) is not None:
                if signature in seen:
                    raise RankFailed(f"the same failure twice, in 2 attempts: {failure.told()}")
                seen.add(signature)

            # failures of machines, links and processes
            step = max(attempt.step, failure.step or 0)
            without_progress = 0 if step > best_step else without_progress + 1
            best_step = max(best_step, step)
            if self._restarts == self.config.launch.max_restarts:
                ended = Stalled if failure.kind == "hung" else Exhausted
                raise ended(f"gave up after {number} attempts: {failure.told()}")
            self._restarts += 1
            launch = self.config.launch
            pause = min(launch.max_backoff_s, launch.backoff_s * 2 ** (without_progress - 1))
            self._emit(
                message(
                    f"{failure.in_short()}; restarting, attempt {number + 1} "
                    f"(restart {self._restarts} of {launch.max_restarts})"
                )
            )
            self._tell_status(state="restarting", ranks=[])
            self._avoid(attempt.silent, NOTICE)
            time.sleep(pause if without_progress else 0.0)

    def _attempt(self, number: int, layout: Layout, group: PlacementGroup, stop: Stop) -> Attempt:
        train = self.config.train.model_copy(update={"accumulation": layout.accumulation})
        attempt_id = f"{self._launch_id}-{number}"
        before = self._status["world_size"]
        if (before and before != layout.world_size) or layout.idle:
            idle = f", {layout.idle} idle" if layout.idle else ""
            words = f"{layout.world_size} ranks on {len(layout.workers)} node(s){idle}"
            self._emit(message(f"{words}; the batch stays {self.config.data.batch_size}"))
        self._status |= {"attempt": number, "attempt_id": attempt_id}
        self._status |= {"world_size": layout.world_size, "idle_workers": layout.idle}
        self._tell_status(state="restarting" if number > 1 else "starting")
        self._room_since = None
        return Attempt(
            self.config.model_copy(update={"train": train}),
            cluster=self._cluster,
            emit=self._emit,
            stop=stop,
            layout=layout,
            size=self._size,
            group=group,
            reporter=self._reporter,
            attempt_id=attempt_id,
            alive=self._watch.alive,
            needs=self._needs,
            tell_status=self._tell_status,
        )

    # room

    def _avoid(self, nodes: set[str], seconds: float) -> None:
        self._avoided.update(dict.fromkeys(nodes, time.monotonic() + seconds))

    def _usable(self, nodes: list[Node]) -> list[Node]:
        self._avoided = {node: until for node, until in self._avoided.items() if until > time.monotonic()}
        return [
            n for n in nodes if not n.is_draining and n.node_id not in self._avoided and self._size.fits(n)
        ]

    def _needs(self, attempt: Attempt) -> str:
        """Whether the ranks should save and make way: "drain", "grow", or "" if not."""
        nodes = self._watch.alive()
        if nodes is None:
            return ""
        if any(
            place.node_id in nodes and nodes[place.node_id].is_draining for place in attempt.places.values()
        ):
            return "drain"
        layout = arrange(len(self._usable(list(nodes.values()))), self.config, self._size.per_node)
        if layout is None or layout.world_size <= attempt.layout.world_size:
            self._room_since = None
            return ""
        now = time.monotonic()
        self._room_since = self._room_since or now
        settled = float(os.environ.get("MMSCALE_GROW_AFTER_S", GROW_AFTER))
        has_run = attempt.first_step_at is not None and now - attempt.first_step_at >= settled
        return "grow" if has_run and now - self._room_since >= ROOM_FOR else ""

    def _reserve(self, *, first: bool, instead: UserError | None) -> tuple[Layout, PlacementGroup]:
        """Reserves a bundle on each node of the largest layout there is room for. Raises ConfigError the first time,
        `instead` if there is one, Exhausted else, in a bounded time."""
        deadline = time.monotonic() + (PLACEMENT_TIMEOUT if first else RETURN_TIMEOUT)
        per_node, limit = self._size.per_node, self.config.launch.nodes
        while True:
            nodes = self._watch.newest()
            usable = self._usable(nodes)
            found = arrange(min(limit, len(usable)), self.config, per_node)
            if found is None and (instead is not None or self._cluster.is_local):
                break
            # a cluster that grows on demand must see what is wanted
            layout = found or arrange(self.config.launch.nodes, self.config, per_node)
            assert layout is not None
            fewer = arrange(len(layout.workers) - 1, self.config, per_node)
            until = deadline if fewer is None else min(deadline, time.monotonic() + SHRINK_AFTER)
            if (group := self._place(layout, nodes, until)) is not None:
                return layout, group
            if time.monotonic() >= deadline:
                break
            if fewer is not None and time.monotonic() >= until:
                limit = len(layout.workers) - 1
        if instead is not None:
            raise instead
        text = self._no_room(nodes)
        raise ConfigError(text) if first else Exhausted(f"there is no room for another attempt: {text}")

    def _place(self, layout: Layout, nodes: list[Node], until: float) -> PlacementGroup | None:
        bundles = [self._size.bundle(count) for count in layout.workers]
        banned = [n.node_id for n in nodes if n.is_draining or n.node_id in self._avoided]
        selector = [{"ray.io/node-id": f"!in({','.join(banned)})"}] * len(bundles) if banned else None
        num_usable = len(self._usable(nodes))

        def reserve() -> PlacementGroup:
            strategy = "STRICT_SPREAD" if len(bundles) > 1 else "PACK"
            return placement_group(bundles, strategy=strategy, bundle_label_selector=selector)

        try:
            group = within(max(1.0, until - time.monotonic()), reserve)
            while time.monotonic() < until:
                if group.wait(1):  # seconds, short so that an interrupt gets through
                    return group
                alive = self._watch.alive()
                if alive is not None and len(self._usable(list(alive.values()))) != num_usable:
                    break  # another layout may fit now
            within(HEAD_TIMEOUT, lambda: remove_placement_group(group))
        except (TimeoutError, RayError):
            return None  # the head is away
        return None

    def _no_room(self, nodes: list[Node]) -> str:
        launch, per_node = self.config.launch, self._size.per_node
        listed = ", ".join(
            f"{n.address} ({in_words(n.resources)}{', draining' if n.is_draining else ''})" for n in nodes
        )
        free: dict[str, float] = {}
        with suppress(TimeoutError, RayError):
            free = within(HEAD_TIMEOUT, ray.available_resources)
        return (
            f"launch.nodes={launch.nodes} with {per_node} workers each asks for {launch.nodes} node(s) "
            f"with {in_words(self._size.bundle(per_node))} each; there are {len(nodes)} node(s): {listed}; "
            f"free at present: {in_words(free)}"
        )

    def dry_run(self) -> dict[str, Any]:
        """What would start, with nothing started."""
        nodes = self._watch.newest()
        self._watch.end()
        usable = self._usable(nodes)
        layout = arrange(len(usable), self.config, self._size.per_node)
        if layout is None:
            raise ConfigError(self._no_room(nodes))
        ranks = [{"rank": r, "node": n, "local_rank": local} for r, (n, local) in enumerate(layout.places())]
        return {
            "world_size": layout.world_size,
            "workers": list(layout.workers),
            "idle_workers": layout.idle,
            "accumulation": layout.accumulation,
            "batch_size": self.config.data.batch_size,
            "device": "cuda" if self._size.use_gpu else "cpu",
            "bundles": [self._size.bundle(count) for count in layout.workers],
            "nodes": [
                {"address": n.address, "node_id": n.node_id, "resources": in_words(n.resources)}
                for n in usable
            ],
            "ranks": ranks,
        }


def _ranks(attempt: Attempt) -> list[dict[str, Any]]:
    signs = {sign.rank: sign for sign in attempt.signs}
    found = []
    for rank, place in sorted(attempt.places.items()):
        sign = signs.get(rank)
        beat = sign.beat if sign is not None else None
        found.append(
            {
                "rank": rank,
                "node": place.node_id,
                "address": place.address,
                "pid": place.group,  # which it leads
                "step": beat.step if beat else 0,
                "phase": beat.phase if beat else "start",
                "phase_s": round(beat.phase_s, 2) if beat else None,
                "memory_gib": round(sign.rss_bytes / 2**30, 3) if sign else None,
                "process": sign.state if sign else "running",
            }
        )
    return found


def _explained(failure: Failure, words: str) -> Failure:
    """With what the process wrote last, which may tell more than how it ended."""
    if failure.kind != "died" or not words:
        return failure
    if OUT_OF_MEMORY.search(words):
        return replace(failure, kind="memory", what="ran out of memory", details=words)
    crash = re.search("Fatal Python error: (.+)", words)
    if crash is not None:  # comes again where it is a bug
        return replace(failure, what=f"crashed ({crash[1]})", title=crash[1], details=words)
    return replace(failure, details=words)
