"""How an attempt can fail, what follows from it, and the errors that a launch ends with.

`RankFailed` and its like are for callers. A `Failure` is what the supervisor decides by: its kind says whether the
same can be expected to come again. The trade-off: Ray and torch say many things in words only, so some of this
goes by their messages.
"""

from __future__ import annotations

import pickle
import re
import time
from dataclasses import dataclass
from typing import Literal

from ray.exceptions import GetTimeoutError, RayError, RuntimeEnvSetupError
from ray.exceptions import OutOfMemoryError as RayOutOfMemory

from mmscale.errors import UserError
from mmscale_launcher.rank import Outcome

# MemoryError and OutOfMemoryError are Python's and torch's, the others glibc's, C++'s, and torch's on a CPU
OUT_OF_MEMORY = re.compile(
    r"MemoryError|OutOfMemoryError|can't allocate memory|cannot allocate memory|std::bad_alloc|out of memory",
    re.IGNORECASE,
)


class RankFailed(UserError):
    """The same exception came at the same step twice: a bug. The message holds its traceback, once."""

    exit_code = 10


class Exhausted(UserError):
    """Machines, links or processes failed more often than launch.max_restarts permits, or too few are left."""

    exit_code = 11


class Stalled(Exhausted):
    """The restarts are used up, and the last of them by a rank that hung."""

    exit_code = 12


class OutOfMemory(UserError):
    """A rank was out of memory, on its host or device, twice."""

    exit_code = 13


class PreflightFailed(UserError):
    """`mmscale doctor` found what has to be put right first."""

    exit_code = 16


# Why Ray itself ends an actor: nobody has asked for it, so something is wrong between the launcher and the cluster.
_ENDED_BY_RAY = re.compile(
    r"all references to the actor were removed|owner has died|`ray\.kill`", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one rank failed."""

    rank: int
    who: str
    what: str
    kind: Literal["user_error", "memory", "died", "error", "hung", "peer_failed"]
    time: float  # seconds since the epoch
    step: int | None = None  # that were done
    title: str = ""  # of the exception
    details: str = ""  # a traceback, or what the process wrote last
    is_traceback: bool = False
    error: UserError | None = None

    @property
    def priority(self) -> tuple[int, float, int]:
        """The least is the cause: what follows from a death or an exception elsewhere comes last."""
        kinds = ("user_error", "memory", "died", "error", "hung", "peer_failed")
        return kinds.index(self.kind), self.time, self.rank

    @property
    def signature(self) -> tuple[str, int | None] | None:
        """Equal for two failures that are one bug; None for one that says nothing of the next."""
        # numbers differ between two runs of one bug: addresses, bytes free, ports
        text = re.sub(r"0x[0-9a-fA-F]+|\d+", "#", self.title)
        return (text, self.step) if self.title and self.kind in ("error", "died") else None

    def told(self) -> str:
        return f"{self.who} {self.what}" + (f"\n{self.details}" if self.details else "")

    def in_short(self) -> str:
        """Without its traceback: that is told once, by the error that ends the run, if it does."""
        if self.is_traceback:
            return f"{self.who}: {self.title}"
        words = "\n" if self.kind == "hung" else "; it wrote last:\n"
        return f"{self.who} {self.what}" + (f"{words}{self.details}" if self.details else "")


def of_outcome(rank: int, who: str, outcome: Outcome) -> Failure:
    """Of a rank that ended by an exception."""
    assert outcome.kind != "done"
    kind = outcome.kind
    error = _unpickled(outcome) if kind == "user_error" else None
    plain = error is None or type(error) is UserError  # the loop makes one of an OSError
    is_memory = plain and bool(OUT_OF_MEMORY.search(outcome.title))
    what = "lost its peers" if kind == "peer_failed" else "raised an exception"
    return Failure(
        rank=rank,
        who=who,
        what="ran out of memory" if is_memory else what,
        kind="memory" if is_memory else kind,
        time=outcome.time,
        step=outcome.step,
        title=outcome.title,
        details=outcome.traceback,
        is_traceback=bool(outcome.traceback),
        error=None if is_memory else error,
    )


def of_death(rank: int, who: str, error: RayError, *, start_timeout: float) -> Failure:
    """What Ray says for an answer. An actor that can't even begin is a bug, the rest are deaths."""
    text = str(error).strip()
    no_start = isinstance(error, RuntimeEnvSetupError) or getattr(error, "actor_init_failed", False)
    is_memory = isinstance(error, RayOutOfMemory) or "NODE_OUT_OF_MEMORY" in text
    if no_start:
        what = "couldn't start"
    elif isinstance(error, GetTimeoutError):
        what = f"didn't start within {start_timeout:.0f} s"
    elif is_memory:
        what = "was killed by Ray, since its node ran out of memory"
    elif cause := _ENDED_BY_RAY.search(text):
        what = f"was ended by Ray ({cause[0]})"
    elif "node died" in text.lower() or "NODE_DIED" in text:
        what = "died with its node"
    else:
        what = "was killed (by signal 9, say, as for want of memory)"
    return Failure(
        rank=rank,
        who=who,
        what=what,
        kind="error" if no_start else "memory" if is_memory else "died",
        time=time.time(),
        title=text.splitlines()[-1] if no_start else "",
        details=text if no_start else "",
        is_traceback=bool(no_start),
    )


def _unpickled(outcome: Outcome) -> UserError:
    try:
        error = pickle.loads(outcome.error)
    except Exception:  # a class of the user's own, say, that this process can't import
        error = UserError(outcome.title)
    assert isinstance(error, UserError)
    error.is_told_by_another = False  # whichever rank's it is, here it is the only one
    return error
