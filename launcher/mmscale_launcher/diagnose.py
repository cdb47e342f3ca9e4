"""Tells from the signs of the ranks whether they hang, which of them is the cause, and which one is slow.

::

    watcher, stragglers = Watcher(hang_s=15, hang_steps=10, start_s=600), Stragglers()
    signs = [sign for agent in agents for sign in agent.look()]     # a few times a second
    if watcher.see(signs, time.monotonic()):
        rank, why = culprit(signs, stacks, watcher.cpu_s(signs))
    for slow in stragglers.see(signs): ...

Ranks wait for each other at least once a step, so one that hangs soon stops them all. That all have stopped is plain to
see; which one the others wait for is what this file finds. Only durations are compared, since clocks differ between
nodes. The trade-off: no rank can be said to hang before the slowest honest step would have ended, hence the limits; and
a slow rank is seen by its data and forward phases alone, since in the others the fast ranks wait for it. Under ZeRO-3
they wait in the forward pass too, so there only slow data tells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmscale.heartbeat import PHASES, Beat
from mmscale_launcher.agent import Sign

# One beat of these may hold all of a checkpoint's way to the disk, a first compilation, or the report at the end.
LONG_PHASES = ("start", "save", "eval", "done")
LONG = 4.0  # times the usual limit
EARLY = 0.9  # of the limit, so that looks and stacks, a second in all, fit into it too
MAX_GAP = 5.0  # seconds that one look can add: a watcher that was stopped itself has seen nothing meanwhile
WINDOW = 8  # steps; a straggler is slow in two windows in a row
SLOW_RATIO = 2.0
SLOW_SHARE = 0.1  # of a step that would be saved; a rank 3x slower in all it does saves 0.15 to 0.2 in its forward pass
OWN_PHASES = ("data", "forward")  # in which a rank waits for no other
_COLLECTIVE = re.compile(r"torch/distributed/|mmscale/world\.py|deepspeed/comm/")
_IN_STEP = [PHASES.index(phase) for phase in PHASES if phase not in LONG_PHASES]


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """No rank has made progress."""

    seconds: float  # for so long
    limit_s: float


class Watcher:
    """hang_s and hang_steps: how long all may stand still, in seconds and in median steps, whichever is longer.
    start_s: the same until every rank has made a step, since it builds operators, compiles, and reads indexes.
    """

    def __init__(self, *, hang_s: float, hang_steps: float, start_s: float) -> None:
        self._hang_s, self._hang_steps, self._start_s = hang_s, hang_steps, start_s
        self._beats: dict[int, int] = {}
        self._cpu_s: dict[int, float] = {}
        self._quiet, self._last = 0.0, 0.0

    def see(self, signs: Sequence[Sign], now: float) -> Suspicion | None:
        """signs: of all ranks. now: seconds of any clock that doesn't stop."""
        beats = {sign.rank: sign.beat.num_beats if sign.beat else -1 for sign in signs}
        if beats != self._beats:
            self._beats, self._quiet = beats, 0.0
            self._cpu_s = {sign.rank: sign.cpu_s for sign in signs}
        else:
            self._quiet += min(now - self._last, MAX_GAP)
        self._last = now
        limit_s = self._limit_s(signs)
        if not signs or self._quiet < EARLY * limit_s:
            return None
        return Suspicion(seconds=self._quiet, limit_s=limit_s)

    def cpu_s(self, signs: Sequence[Sign]) -> dict[int, float]:
        """What each rank has used since all stand still."""
        return {sign.rank: sign.cpu_s - self._cpu_s.get(sign.rank, sign.cpu_s) for sign in signs}

    def _limit_s(self, signs: Sequence[Sign]) -> float:
        steps = [_step_s(sign.beat.recent_s) for sign in signs if sign.beat and sign.beat.num_steps]
        limit_s = max([self._hang_s, *(self._hang_steps * step_s for step_s in steps)])
        if any(sign.state == "stopped" for sign in signs):
            return limit_s  # whatever it was at, it isn't now
        if any(sign.beat is None or sign.beat.num_steps == 0 for sign in signs):
            return self._start_s
        behind = min((_place(sign) for sign in signs), default=(0, 0))
        is_long = any(
            sign.beat and sign.beat.phase in LONG_PHASES for sign in signs if _place(sign) == behind
        )
        return LONG * limit_s if is_long else limit_s


def culprit(
    signs: Sequence[Sign], stacks: Mapping[int, str], cpu_s: Mapping[int, float] | None = None
) -> tuple[int, str]:
    """The rank that the others wait for, and how it is known. cpu_s: as Watcher.cpu_s."""
    for state, why in (("gone", "its process is gone"), ("stopped", "its process is stopped")):
        # even one ahead of the others: it may have its part of an exchange and still owe theirs
        found = [sign for sign in signs if sign.state == state]
        if found:
            return min(found, key=_place).rank, why
    behind = min(_place(sign) for sign in signs)
    left = [sign.rank for sign in signs if _place(sign) == behind]
    if len(left) < len(signs):
        why = "it is behind the others"
    else:
        why = "all are at the same place, and nothing tells them apart"
    if len(left) > 1:
        elsewhere = [rank for rank in left if not _waits(stacks.get(rank, ""))]
        if elsewhere and len(elsewhere) < len(left):
            left, why = elsewhere, "the others wait in a collective operation, and it doesn't"
    if len(left) > 1 and cpu_s:
        busy = max(left, key=lambda rank: cpu_s.get(rank, 0.0))
        if cpu_s.get(busy, 0.0) > 0:
            return busy, f"{why}; it is the busiest of ranks {', '.join(map(str, left))}"
    return left[0], why


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that the others wait for in every step."""

    rank: int
    phase: str
    ratio: float  # of its median seconds in the phase to those of the others
    seconds: float  # more than theirs, a step


class Stragglers:
    """Finds ranks that are slow, and tells of each once until it has recovered."""

    def __init__(self) -> None:
        self._told: set[int] = set()

    def see(self, signs: Sequence[Sign]) -> list[Straggler]:
        """Those that weren't slow before. Needs the last two windows of each rank, else nothing is said."""
        table = _same_steps([sign.beat for sign in signs])
        if table is None:
            return []
        step_s = np.median(table[..., _IN_STEP].sum(-1), axis=(0, 2))  # (2 windows,)
        medians = np.median(table, axis=2)  # (ranks, 2, phases)
        found = []
        for i, sign in enumerate(signs):
            others = np.median(np.delete(medians, i, axis=0), axis=0)
            more = medians[i] - others
            ratio = medians[i] / np.maximum(others, 1e-6)
            is_slow = (ratio > SLOW_RATIO) & (more > SLOW_SHARE * step_s[:, None])
            phases = [p for p in map(PHASES.index, OWN_PHASES) if is_slow[:, p].all()]
            if not phases:
                if not is_slow[:, list(map(PHASES.index, OWN_PHASES))].any():
                    self._told.discard(sign.rank)
                continue
            phase = max(phases, key=lambda p: more[1, p])
            if sign.rank not in self._told:
                self._told.add(sign.rank)
                found.append(
                    Straggler(
                        rank=sign.rank,
                        phase=PHASES[phase],
                        ratio=float(ratio[1, phase]),
                        seconds=float(more[1, phase]),
                    )
                )
        return found


def _place(sign: Sign) -> tuple[int, int]:
    """How far a rank has come. All ranks begin the same phases in the same order."""
    return (sign.beat.step, sign.beat.num_phases) if sign.beat else (-1, 0)


def _waits(stack: str) -> bool:
    """Whether the main thread, which comes first, waits for other ranks."""
    first, *lines = stack.splitlines() or [""]
    main = [first]
    for line in lines:
        if not line.startswith(" "):
            break
        main.append(line)
    return _COLLECTIVE.search("\n".join(main)) is not None


def _step_s(recent_s: np.ndarray) -> float:
    return float(np.median(recent_s[:, _IN_STEP].sum(-1)))


def _same_steps(beats: Sequence[Beat | None]) -> np.ndarray | None:
    """(ranks, 2, WINDOW, phases) seconds of the last steps that all ranks have made; None with too few of them."""
    rows = []
    known = [beat for beat in beats if beat is not None]
    if len(known) < max(2, len(beats)):
        return None
    newest = min(beat.step for beat in known)
    for beat in known:
        end = len(beat.recent_s) - (beat.step - newest)
        if end < 2 * WINDOW:
            return None
        rows.append(beat.recent_s[end - 2 * WINDOW : end].reshape(2, WINDOW, len(PHASES)))
    return np.stack(rows)
