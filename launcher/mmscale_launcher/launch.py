"""Runs a training over Ray: one process a rank, supervised from the driver, restarted together when one fails.

::

    report = launch(config)                                    # on this machine
    report = launch(config, address="auto", on_event=print)    # on a cluster
    plan = launch(config, address="auto", dry_run=True)        # what would start

`launch` reserves one bundle a node, starts an actor a rank in it (ranks are numbered node by node), lets
each run `mmscale.train.train`, and waits. When a rank fails, all of its attempt are killed and known to be
gone before the next attempt begins, in fresh processes: neither DeepSpeed nor CUDA can be set up twice in
one. `train` resumes from the newest checkpoint that is whole. What follows from a failure:

- a `UserError` in any rank is final, and raised here as it was there;
- a rank that died, hangs, or lost its node or peers costs a restart: `Exhausted` when launch.max_restarts are used
  up, `Stalled` if by hanging;
- the same exception at the same step twice is a bug: `RankFailed` has its traceback; `OutOfMemory` likewise;
- fewer nodes than asked for go on as fewer ranks, if launch.min_workers permits, and the missing ones are taken up
  again when they are back; a node that is being drained, or on which a rank gets SIGTERM, is left after a save.

Why plain actors in a placement group and not Ray Train: its limits, measured with Ray 2.60, are the rows of our
table of faults. It took 11 s to notice a killed worker and 73 s a lost node, never noticed a rank that sleeps, tried
a deterministic bug until `max_failures`, couldn't outlive its own controller actor, and its snapshots missed
reported checkpoints, which mmscale keeps itself anyway. The price is `supervise.py` and `attempt.py`.

Ray is not in the step loop: rank 0's events go to a reporter actor that nobody waits for, and the driver
asks that one three times a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmscale_launcher.cluster import OnEvent, connected, message
from mmscale_launcher.failures import Exhausted, OutOfMemory, PreflightFailed, RankFailed, Stalled
from mmscale_launcher.supervise import Supervisor

if TYPE_CHECKING:
    from mmscale.config import Config

__all__ = ["Exhausted", "OutOfMemory", "PreflightFailed", "RankFailed", "Stalled", "launch"]


def launch(
    config: Config,
    *,
    address: str | None = None,
    on_event: OnEvent | None = None,
    dry_run: bool = False,
    _worker: str = "mmscale.train:train",
) -> dict[str, Any]:
    """Trains `config` on launch.nodes x launch.workers_per_node ranks and returns rank 0's report.

    address: of a Ray cluster: "auto", "host:port" or "ray://host:port"; with None a Ray is started on this
    machine (RAY_ADDRESS is not looked at). on_event: called with rank 0's events, with {"event": "message",
    "text": ...} for what the launcher has to say, and about once a second with {"event": "ranks", "status": ...},
    which RUN/status.json holds too, in the calling thread. dry_run: returns what would start, and starts nothing.

    Raises ConfigError where the ranks can't be placed, PreflightFailed, RankFailed, OutOfMemory, Exhausted, Stalled,
    and whatever UserError a rank raised. An interrupt ends all ranks before it goes on as KeyboardInterrupt. SIGTERM
    asks them to save and stop, which ends in their Preempted; before they run, and where they don't listen, it is an
    interrupt.
    """
    emit = on_event or (lambda event: None)
    with connected(config, address, emit) as cluster:
        if config.launch.preflight and not dry_run:
            from mmscale_launcher.doctor import check

            for node, finding in check(config, cluster).of("warning"):
                emit(message(f"{finding.check}, {node}: {finding.text}"))
        supervisor = Supervisor(config, cluster=cluster, emit=emit)
        return supervisor.dry_run() if dry_run else supervisor.run(_worker)
