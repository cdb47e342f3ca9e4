"""Where the ranks of an attempt go: what a cluster has, and how many workers that makes.

::

    size = Size.of(config, look(), is_local=False)       # what each node gives: once a launch
    layout = arrange(num_nodes, config, size.per_node)   # None if that is too few

The arithmetic is for nodes alike: one counts that has room for all of `launch.workers_per_node`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.util.client import ray as ray_client

from mmscale_launcher.cluster import CPU_WORKERS

if TYPE_CHECKING:
    from mmscale.config import Config


@dataclass(frozen=True, kw_only=True)
class Node:
    node_id: str
    address: str
    resources: dict[str, float]
    is_draining: bool


def look() -> list[Node]:
    """The living nodes of the cluster; blocks while its head is away."""
    # Ray has no public call for it; Ray Train and Serve use this one. It isn't there through ray://
    draining = {} if ray_client.is_connected() else ray._private.state.state.get_draining_nodes()
    return [
        Node(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            resources=node["Resources"],
            is_draining=node["NodeID"] in draining,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a node has to give, fixed for a launch."""

    per_node: int  # workers
    use_gpu: bool
    is_local: bool

    @staticmethod
    def of(config: Config, nodes: list[Node], *, is_local: bool) -> Size:
        gpus = sorted((int(node.resources.get("GPU", 0)) for node in nodes), reverse=True)
        num_gpus = gpus[min(config.launch.nodes, len(gpus)) - 1]  # as many nodes as are asked have these
        use_gpu = config.run.device == "cuda" or (config.run.device == "auto" and num_gpus > 0)
        num_workers = config.launch.workers_per_node or (num_gpus if use_gpu and num_gpus else CPU_WORKERS)
        return Size(per_node=num_workers, use_gpu=use_gpu, is_local=is_local)

    def bundle(self, num_workers: int) -> dict[str, float]:
        # CPUs are there to be shared out on a cluster; those of a local Ray are ours, and may be too few
        cpus = {"CPU": 1.0 if self.is_local else float(num_workers)}
        return cpus | ({"GPU": float(num_workers)} if self.use_gpu else {})

    def fits(self, node: Node) -> bool:
        return all(node.resources.get(name, 0) >= n for name, n in self.bundle(self.per_node).items())


@dataclass(frozen=True, kw_only=True)
class Layout:
    workers: tuple[int, ...]  # on each node; ranks are numbered in this order
    idle: int  # workers that there is room for, and no use
    accumulation: int

    @property
    def world_size(self) -> int:
        return sum(self.workers)

    def places(self) -> list[tuple[int, int]]:
        """For each rank its node and its local rank."""
        return [(node, local) for node, count in enumerate(self.workers) for local in range(count)]


def arrange(num_nodes: int, config: Config, per_node: int) -> Layout | None:
    """Makes the most of `num_nodes` nodes; None if they are too few.

    The world is the largest that divides the global batch, and the micro-batch at most the recipe's, which the
    full world would have: another number of workers needs no more memory, and the batch stays the same.
    """
    launch, batch = config.launch, config.data.batch_size
    full = launch.nodes * per_node
    room = min(num_nodes, launch.nodes) * per_node
    if launch.min_workers is None or (room == full and batch % full == 0):
        if room < full:
            return None
        # where it doesn't divide the batch, the ranks say so in words
        return Layout(workers=(per_node,) * launch.nodes, idle=0, accumulation=config.train.accumulation)
    world = next((n for n in range(room, launch.min_workers - 1, -1) if batch % n == 0), None)
    if world is None:
        return None
    micro = max(1, batch // (full * config.train.accumulation))
    share = batch // world
    accumulation = next(a for a in range(1, share + 1) if share % a == 0 and share // a <= micro)
    whole, rest = divmod(world, per_node)
    workers = (per_node,) * whole + ((rest,) if rest else ())
    return Layout(workers=workers, idle=room - world, accumulation=accumulation)


def in_words(amounts: dict[str, float]) -> str:
    return f"{amounts.get('CPU', 0):g} CPU and {amounts.get('GPU', 0):g} GPU"
