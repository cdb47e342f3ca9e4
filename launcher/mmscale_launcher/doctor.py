"""`mmscale doctor`: what each machine of a run needs, and whether they fit together, before the run.

::

    report = diagnose(config, "10.0.0.1:6379")    # a cluster; with None this machine alone, without Ray
    print(report.to_text())                       # a table for people, what to do about it below
    check(config, cluster)                        # what launch does first; raises PreflightFailed

On a cluster an actor on each node looks at its machine (`mmscale.doctor`) and takes part in what needs several: equal
versions and code, clocks, the interface that reaches the first node, the speed of an all-reduce, a folder that all
share. Every wait is bounded, so a node that doesn't answer is a finding too. The trade-off: all nodes that could take
ranks must be sound, also those that a small run would leave idle, since a restart may use them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mmscale.config import Config
from mmscale.doctor import LEVELS, Finding, examine, existing, interface_for, num_parameters
from mmscale.errors import UserError

if TYPE_CHECKING:
    import torch

ANSWER_TIMEOUT_S = 30.0  # a node's processes start, import torch, and look; 5 s is usual
BUILD_TIMEOUT_S = 600.0  # ... and compile an operator
REDUCE_TIMEOUT_S = 15.0
SEEN_TIMEOUT_S = 5.0  # until a network file system shows a file to others
REDUCE_BYTES = 8 << 20
NUM_REDUCTIONS = 5
NUM_ROUND_TRIPS = 5
SKEW_WARNING_S, SKEW_ERROR_S = 0.5, 5.0  # status files and logs of several nodes are compared by their times
CPU_WORKERS = 2  # of a node without GPUs, as in launch
COMPARED = ("python", "torch", "deepspeed", "ray", "triton", "code")
THIS = "this machine"
BETWEEN = "all nodes"


class HasPlace(Protocol):
    """What `check` must know of a cluster."""

    @property
    def is_local(self) -> bool: ...


@dataclass(frozen=True)
class Report:
    """findings: (the node's address, or what else it is about; the finding), in the order of the checks."""

    findings: list[tuple[str, Finding]]
    seconds: float
    nodes: list[str] = field(default_factory=list)

    def of(self, level: str) -> list[tuple[str, Finding]]:
        return [(node, finding) for node, finding in self.findings if finding.level == level]

    def to_text(self) -> str:
        """A table, then what to do about each finding that isn't ok."""
        rows = [("check", "where", "", "found"), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        for level in ("error", "warning"):
            for node, finding in self.of(level):
                lines += [
                    "",
                    f"{level}: {finding.check}, {node}: {finding.text}",
                    f"  remedy: {finding.remedy}",
                ]
        counts = [
            f"{len(self.of(level))} {level}{'s' * (len(self.of(level)) != 1)}"
            for level in ("error", "warning")
        ]
        return "\n".join([*lines, "", f"{', '.join(counts)}; {self.seconds:.1f} s"])

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """One for each check where all nodes say the same, else one for each node."""
        rows: list[tuple[str, str, str, str]] = []
        for check in dict.fromkeys(finding.check for _, finding in self.findings):
            found = [(node, f) for node, f in self.findings if f.check == check]
            if len(found) > 1 and len({(f.level, f.text) for _, f in found}) == 1:
                found = [(BETWEEN, found[0][1])]
            rows += [(check, node, f.level, f.text) for node, f in found]
        return rows

    def to_json(self) -> dict[str, Any]:
        level = max((f.level for _, f in self.findings), key=LEVELS.index, default="ok")
        return {
            "level": level,
            "seconds": round(self.seconds, 2),
            "nodes": self.nodes,
            "findings": [{"where": node, **finding.to_json()} for node, finding in self.findings],
        }

    def error(self) -> UserError | None:
        """PreflightFailed with all errors and their remedies, if there are any."""
        found = self.of("error")
        if not found:
            return None
        from mmscale_launcher.launch import PreflightFailed

        listed = "\n".join(f"  {f.check}, {node}: {f.text}\n    remedy: {f.remedy}" for node, f in found)
        return PreflightFailed(f"the run can't start well:\n{listed}")


def diagnose(config: Config | None, address: str | None = None) -> Report:
    """Looks at this machine, or with an address at a Ray cluster. Raises ConfigError where none can be joined."""
    if address is None:
        return _report(lambda: _local(config))
    import ray

    from mmscale_launcher.cluster import join

    was_connected = ray.is_initialized()
    if not was_connected:
        join(address)
    try:
        return _report(lambda: _cluster(config))
    finally:
        if not was_connected:
            ray.shutdown()


def check(config: Config, cluster: HasPlace) -> Report:
    """Before a launch, connected to Ray: on a local one only this machine. Raises PreflightFailed."""
    report = _report(lambda: _local(config) if cluster.is_local else _cluster(config))
    error = report.error()
    if error is not None:
        raise type(error)(f"{error}\nput it right, or skip these checks with launch.preflight=false")
    return report


def _report(look: Callable[[], list[tuple[str, Finding]]]) -> Report:
    begin = time.monotonic()
    findings = look()
    nodes = list(dict.fromkeys(node for node, _ in findings if node != BETWEEN))
    return Report(findings, time.monotonic() - begin, nodes)


def _local(config: Config | None) -> list[tuple[str, Finding]]:
    num_ranks = (config.launch.workers_per_node or CPU_WORKERS) if config else 1
    return [(THIS, finding) for finding in examine(config, num_ranks=num_ranks, world_size=num_ranks)]


# ------------------------------------------------------------------------------------------------------ on a node


class Examiner:
    """Looks at the node it runs on. search_path and folder: of the driver, taken where this node has them."""

    def __init__(self, search_path: list[str], folder: str) -> None:
        sys.path += [entry for entry in search_path if entry not in sys.path and Path(entry).exists()]
        if Path(folder).is_dir():
            os.chdir(folder)
        self._made: list[Path] = []

    def clock(self) -> float:
        return time.time()

    def free_port(self) -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return probe.getsockname()[1]

    def examine(self, config: str | None, num_ranks: int, world_size: int) -> list[Finding]:
        parsed = Config.from_json(config) if config is not None else None
        return examine(parsed, num_ranks=num_ranks, world_size=world_size)

    def interface(self, address: str) -> str | None:
        return interface_for(address)

    def leave(self, folder: str, name: str, text: str) -> None:
        """Writes a marker, making the folder if need be."""
        place = Path(folder)
        above = existing(place)
        place.mkdir(parents=True, exist_ok=True)
        self._made = [p for p in (place, *place.parents) if p.is_relative_to(above) and p != above]
        (place / name).write_text(text)

    def sees(self, folder: str, name: str, text: str) -> bool:
        deadline = time.monotonic() + SEEN_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                os.scandir(folder).close()  # makes NFS look again
                if (Path(folder) / name).read_text() == text:
                    return True
            time.sleep(0.2)
        return False

    def remove(self, folder: str, name: str) -> None:
        (Path(folder) / name).unlink(missing_ok=True)
        for made in self._made:
            with contextlib.suppress(OSError):  # in use by now
                made.rmdir()

    def reduce(self, rank: int, size: int, address: str, port: int, interface: str, use_gpu: bool) -> float:
        """Seconds of one all-reduce of REDUCE_BYTES over all nodes; the median of a few."""
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
        import torch
        import torch.distributed as dist

        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=REDUCE_TIMEOUT_S),
        )
        try:
            tensor = torch.ones(REDUCE_BYTES // 4, device="cuda" if use_gpu else "cpu")
            spans = []
            for _ in range(NUM_REDUCTIONS + 1):
                _finish(tensor)
                begin = time.perf_counter()
                dist.all_reduce(tensor)
                _finish(tensor)
                spans.append(time.perf_counter() - begin)
            return sorted(spans[1:])[NUM_REDUCTIONS // 2]  # the first one sets up connections
        finally:
            dist.destroy_process_group()


def _finish(tensor: torch.Tensor) -> None:
    tensor[0].item()  # waits for the device


# -------------------------------------------------------------------------------------------------- over the nodes


@dataclass
class _Node:
    address: str
    num_gpus: int
    num_ranks: int
    actor: Any = None


class _Nodes:
    """The nodes that answer, in a fixed order, and the findings about them."""

    def __init__(self, nodes: list[_Node]) -> None:
        self.nodes = nodes
        self.findings: list[tuple[str, Finding]] = []

    def note(self, node: str, check: str, level: Any, text: str, remedy: str = "", **values: Any) -> None:
        self.findings.append(
            (node, Finding(check=check, level=level, text=text, remedy=remedy, values=values))
        )

    def ask(self, check: str, calls: Sequence[Any], *, timeout: float, remedy: str) -> list[Any]:
        """One answer for each node; None, and a finding, for those that fail or take too long."""
        import ray

        deadline = time.monotonic() + timeout
        answers: list[Any] = []
        for node, call in zip(self.nodes, calls, strict=True):
            try:
                answers.append(ray.get(call, timeout=max(0.1, deadline - time.monotonic())))
            except ray.exceptions.GetTimeoutError:
                answers.append(None)
                self.note(node.address, check, "error", f"no answer within {timeout:.0f} s", remedy)
            except ray.exceptions.RayTaskError as error:
                answers.append(None)
                words = str(error.cause).strip().splitlines() or [type(error.cause).__name__]
                self.note(node.address, check, "error", words[0], remedy)
            except ray.exceptions.RayError as error:
                answers.append(None)
                words = str(error).strip().splitlines() or [type(error).__name__]
                self.note(node.address, check, "error", words[0], remedy)
        return answers


def _cluster(config: Config | None) -> list[tuple[str, Finding]]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_gpu = config is None or config.run.device != "cpu"
    nodes = []
    alive = [node for node in ray.nodes() if node["Alive"]]
    for node in sorted(alive, key=lambda node: "node:__internal_head__" not in node["Resources"]):
        resources = node["Resources"]
        num_gpus = int(resources.get("GPU", 0)) if on_gpu else 0
        if not num_gpus and not resources.get("CPU"):
            continue  # a head that takes no ranks
        num_ranks = (config.launch.workers_per_node if config else None) or num_gpus or CPU_WORKERS
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        # a sliver of a GPU, or Ray would hide them all
        actor = (
            ray.remote(Examiner)
            .options(num_cpus=0, num_gpus=0.01 if num_gpus else 0, scheduling_strategy=there)
            .remote([entry for entry in sys.path if entry], str(Path.cwd()))
        )
        nodes.append(_Node(node["NodeManagerAddress"], num_gpus, num_ranks, actor))
    state = _Nodes(nodes)
    try:
        _look(state, config)
    finally:
        for node in nodes:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(node.actor)
    return state.findings


def _look(state: _Nodes, config: Config | None) -> None:
    if not state.nodes:
        remedy = "ray start --address=... on the machines that should take ranks"
        state.note(BETWEEN, "nodes", "error", "the cluster has no node with a CPU or a GPU to give", remedy)
        return
    text = config.to_json() if config is not None else None
    num_nodes = config.launch.nodes if config else len(state.nodes)
    if num_nodes > len(state.nodes):
        state.note(
            BETWEEN,
            "nodes",
            "error" if config is not None and config.launch.min_workers is None else "warning",
            f"launch.nodes={num_nodes}, the cluster has {len(state.nodes)}: "
            f"{', '.join(node.address for node in state.nodes)}",
            f"ray start --address=... on {num_nodes - len(state.nodes)} more, or a smaller --nodes",
        )
    world_size = sum(sorted((node.num_ranks for node in state.nodes), reverse=True)[:num_nodes])
    builds = config is not None and config.engine.offload_optimizer != "none"
    answers = state.ask(
        "machine",
        [node.actor.examine.remote(text, node.num_ranks, world_size) for node in state.nodes],
        timeout=BUILD_TIMEOUT_S if builds else ANSWER_TIMEOUT_S,
        remedy="look at the node's logs below its Ray folder (/tmp/ray/session_latest/logs): its processes don't start "
        "or it is too busy",
    )
    for node, found in zip(list(state.nodes), answers, strict=True):
        state.findings += [(node.address, finding) for finding in found or []]
    state.nodes = [node for node, found in zip(state.nodes, answers, strict=True) if found is not None]
    if len(state.nodes) > 1:
        _compare(state)
        _clocks(state)
        _network(state, config)
        if config is not None:
            _shared(state, config)


def _compare(state: _Nodes) -> None:
    """Versions and code that differ between nodes, as a finding for each name."""
    known = {node: finding.values for node, finding in state.findings if finding.check == "versions"}
    differing = False
    for name in COMPARED:
        by_value: dict[str, list[str]] = {}
        for node, values in known.items():
            by_value.setdefault(str(values.get(name)), []).append(node)
        if len(by_value) > 1:
            differing = True
            listed = "; ".join(f"{value} on {', '.join(nodes)}" for value, nodes in by_value.items())
            remedy = (
                "start the launch from the code that all should run, without another mmscale on PYTHONPATH there"
                if name == "code"
                else f"install the same {name} everywhere"
            )
            state.note(BETWEEN, "agreement", "error", f"{name}: {listed}", remedy)
    if not differing:
        state.note(BETWEEN, "agreement", "ok", f"equal on {len(known)} nodes: {', '.join(COMPARED)}")


def clock_offset(trips: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(seconds that a clock is ahead of ours, uncertainty) from (our time before, its time, our time after).

    The shortest round trip tells most: the other's time lies in it, wherever it was read (Cristian 1989).
    """
    begin, there, end = min(trips, key=lambda trip: trip[2] - trip[0])
    return there - (begin + end) / 2, (end - begin) / 2


def _clocks(state: _Nodes) -> None:
    """Each node's clock against the first node's."""
    import ray

    offsets: dict[str, tuple[float, float]] = {}
    for node in state.nodes:
        trips = []
        try:
            for _ in range(NUM_ROUND_TRIPS):
                begin = time.time()
                there = ray.get(node.actor.clock.remote(), timeout=ANSWER_TIMEOUT_S)
                trips.append((begin, there, time.time()))
        except ray.exceptions.RayError as error:
            state.note(node.address, "clock", "error", f"{type(error).__name__} while asked for the time")
            continue
        offsets[node.address] = clock_offset(trips)
    (first, (base, doubt)), *others = offsets.items()
    worst = 0.0
    for address, (offset, own_doubt) in others:
        sure = max(0.0, abs(offset - base) - doubt - own_doubt)
        worst = max(worst, sure)
        if sure > SKEW_WARNING_S:
            state.note(
                address,
                "clock",
                "error" if sure > SKEW_ERROR_S else "warning",
                f"{offset - base:+.2f} s from {first}'s",
                "run a time service there (chrony, systemd-timesyncd)",
                offset_s=offset - base,
            )
    if worst <= SKEW_WARNING_S:
        widest = max(doubt + own for _, (_, own) in others) if others else 0.0
        state.note(
            BETWEEN,
            "clock",
            "ok",
            f"equal within {worst + widest:.3f} s",
            worst_s=worst,
            uncertainty_s=widest,
        )


def _network(state: _Nodes, config: Config | None) -> None:
    import ray

    first = state.nodes[0]
    loopback = [node.address for node in state.nodes if node.address.startswith("127.")]
    if loopback:
        state.note(
            ", ".join(loopback),
            "network",
            "error",
            "registered with an address that other nodes can't reach",
            "give ray start --node-ip-address=ADDRESS there",
        )
        return
    names = state.ask(
        "network",
        [node.actor.interface.remote(first.address) for node in state.nodes],
        timeout=ANSWER_TIMEOUT_S,
        remedy=f"no interface of it reaches {first.address}: look at its routes",
    )
    if None in names:
        for node, name in zip(state.nodes, names, strict=True):
            if name is None:
                text = f"no interface reaches {first.address}"
                state.note(node.address, "network", "error", text, "look at its routes (ip route)")
        return
    use_gpu = all(node.num_gpus for node in state.nodes)
    port = ray.get(first.actor.free_port.remote(), timeout=ANSWER_TIMEOUT_S)
    spans = state.ask(
        "network",
        [
            node.actor.reduce.remote(rank, len(state.nodes), first.address, port, name, use_gpu)
            for rank, (node, name) in enumerate(zip(state.nodes, names, strict=True))
        ],
        timeout=2 * REDUCE_TIMEOUT_S,
        remedy="let all ports through between the nodes; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface",
    )
    if None in spans:
        return
    seconds, num = max(spans), len(state.nodes)
    # what each node sends and receives in a ring, so that it can be compared with the link's speed
    speed = 2 * (num - 1) / num * REDUCE_BYTES / seconds / 1e9
    text = f"all-reduce over {', '.join(dict.fromkeys(names))} at {speed:.2f} GB/s ({'nccl' if use_gpu else 'gloo'})"
    values: dict[str, Any] = {"interfaces": names, "gb_per_s": speed}
    if config is not None:
        gradients = num_parameters(config) * (4 if config.engine.precision == "fp32" else 2)
        values["gradients_s"] = seconds * gradients / REDUCE_BYTES
        text += f"; the gradients of a step take about {values['gradients_s']:.3g} s"
    state.note(BETWEEN, "network", "ok", text, **values)


def _shared(state: _Nodes, config: Config) -> None:
    """A marker that the first node leaves must be seen by all."""
    import ray

    from mmscale.runs import run_folder

    folder, name, text = str(run_folder(config).parent), f".mmscale-{uuid.uuid4().hex}", uuid.uuid4().hex
    first = state.nodes[0]
    try:
        ray.get(first.actor.leave.remote(folder, name, text), timeout=ANSWER_TIMEOUT_S)
        seen = state.ask(
            "storage",
            [node.actor.sees.remote(folder, name, text) for node in state.nodes],
            timeout=ANSWER_TIMEOUT_S,
            remedy="give run.dir on storage that all nodes mount",
        )
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        state.note(
            first.address, "storage", "error", f"can't write into {folder}: {cause}", "give another run.dir"
        )
        return
    finally:
        first.actor.remove.remote(folder, name)
    blind = [node.address for node, answer in zip(state.nodes, seen, strict=True) if answer is False]
    for address in blind:
        state.note(
            address,
            "storage",
            "error",
            f"what {first.address} writes into {Path(folder).absolute()} isn't seen here",
            "give run.dir on storage that all nodes mount at the same path (NFS, Lustre, a FUSE mount of a bucket)",
        )
    if not blind and None not in seen:
        state.note(BETWEEN, "storage", "ok", f"{Path(folder).absolute()} is shared by {len(seen)} nodes")
