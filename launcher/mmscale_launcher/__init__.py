"""Launches mmscale over Ray: places one process a rank, watches them, restarts what died.

::

    from mmscale_launcher import launch
    report = launch(config)                      # a local Ray, started for this run and gone after it
    report = launch(config, address="auto")      # an existing cluster

The only package that knows Ray. Its trade-off: a restart is always of all ranks, in fresh processes, from
the newest checkpoint; no rank outlives a failure of another.
"""

from mmscale_launcher.launch import Exhausted, OutOfMemory, PreflightFailed, RankFailed, Stalled, launch

__all__ = ["Exhausted", "OutOfMemory", "PreflightFailed", "RankFailed", "Stalled", "launch"]
