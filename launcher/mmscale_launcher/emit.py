"""Files to start from on a cluster, and what `mmscale launch --dry-run` prints.

::

    print(emit("slurm", recipe="quickstart", overrides=["optim.lr=3e-4"], config=config))
    print(plan(config, address=None))

Each file is a template in `templates/`, filled in with the recipe, its overrides, nodes and workers, and explained in
its own comments. The trade-off: clusters differ, so a file holds names to replace (image, addresses, shared folder),
listed in its first lines, instead of an option for each.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from mmscale.config import Config
from mmscale.runs import run_folder

KINDS = {"ray-cluster": "ray-cluster.yaml.j2", "kuberay": "kuberay.yaml.j2", "slurm": "slurm.sh.j2"}
GPUS_PER_NODE = 8  # where launch.workers_per_node doesn't say
CPU_WORKERS = 2
SHARED = "/shared/mmscale"  # the folder that all nodes see, to be replaced
SAVE_CLOCK = "10m"  # so that a preempted node costs no more than that


def emit(kind: str, *, recipe: str, overrides: Sequence[str], config: Config) -> str:
    """The text of a file that launches `config`, which is `recipe` with `overrides`, on launch.nodes nodes.

    kind: ray-cluster (for `ray up`), kuberay (a RayJob) or slurm (for `sbatch`).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        comment_start_string="{%#",  # bash has ${#array[@]}
    )
    environment.filters["shell"] = shlex.quote
    environment.filters["yaml"] = lambda text: json.dumps(text, ensure_ascii=False)  # as YAML takes it, too
    return environment.get_template(KINDS[kind]).render(_facts(kind, recipe, overrides, config))


def _facts(kind: str, recipe: str, overrides: Sequence[str], config: Config) -> dict[str, Any]:
    use_gpu = config.run.device != "cpu"
    workers = config.launch.workers_per_node or (GPUS_PER_NODE if use_gpu else CPU_WORKERS)
    folder = run_folder(config)
    # A batch job begins in the folder it was submitted from, which is shared as a rule.
    place = folder if folder.is_absolute() or kind == "slurm" else Path(SHARED) / folder
    changes = [text for text in overrides if not text.startswith("run.dir=")]
    changes.append(f"run.dir={place}")
    if config.train.save_clock is None:
        changes.append(f"train.save_clock={SAVE_CLOCK}")
    command = ["mmscale", "launch", recipe, *changes, "--nodes", str(config.launch.nodes)]
    command += ["--workers-per-node", str(workers)]
    if config.launch.min_workers is not None:
        command += ["--min-workers", str(config.launch.min_workers)]
    return {
        "recipe": recipe,
        "name": re.sub(r"[^a-z0-9]+", "-", config.run.name.lower()).strip("-") or "run",  # a DNS label
        "command": shlex.join(command),
        "folder": str(place),
        "shared": SHARED,
        "nodes": config.launch.nodes,
        "workers": workers,
        "use_gpu": use_gpu,
        # For each rank: itself and its data threads, and what a GPU's share of a node usually is.
        "cpus": workers * (8 if use_gpu else 1 + config.data.threads),
        "memory_gib": workers * (64 if use_gpu else 4),
        "min_nodes": -(-(config.launch.min_workers or config.launch.nodes * workers) // workers),
        "ray_version": importlib.metadata.version("ray"),
        "python_version": platform.python_version(),
        "version": importlib.metadata.version("mmscale"),
    }


def plan(config: Config, *, address: str | None) -> str:
    """What `mmscale launch` would start, in words; nothing is started or asked."""
    launch, train = config.launch, config.train
    workers = str(launch.workers_per_node) if launch.workers_per_node else "one a GPU (2 where there is none)"
    lines = [
        "on            " + ("a local Ray, for this run alone" if address is None else f"Ray at {address}"),
        f"nodes         {launch.nodes}",
        f"workers       {workers} a node" if launch.workers_per_node else f"workers       {workers}",
    ]
    if launch.workers_per_node:
        world_size = launch.nodes * launch.workers_per_node
        lines.append(f"ranks         {world_size}")
        lines += [
            f"  node {node}      ranks {node * launch.workers_per_node} to {(node + 1) * launch.workers_per_node - 1}"
            for node in range(launch.nodes if launch.nodes <= 8 else 0)
        ]
        micro, rest = divmod(config.data.batch_size, world_size * train.accumulation)
        if rest:
            lines.append(
                f"batch         {config.data.batch_size}: {world_size} ranks x accumulation {train.accumulation} don't "
                "divide it, so it can't start as it is"
            )
        else:
            lines.append(
                f"batch         {config.data.batch_size} = {world_size} ranks x {train.accumulation} x {micro} samples"
            )
    least = launch.min_workers
    lines += [
        "goes on with  "
        + (
            f"{least} ranks or more, when nodes are lost"
            if least
            else "all of them only (launch.min_workers)"
        ),
        f"restarts      {launch.max_restarts} at most",
        f"first         {'mmscale doctor' if launch.preflight else 'nothing (launch.preflight=false)'}",
        f"run           {run_folder(config)} (run.resume={config.run.resume})",
        f"engine        ZeRO-{config.engine.zero_stage}, {config.engine.precision}, device {config.run.device}",
        f"duration      {train.duration}, saves every {train.save_every}"
        + (f" and every {train.save_clock}" if train.save_clock else ""),
    ]
    return "\n".join(lines)
