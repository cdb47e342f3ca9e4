"""Guards: what is done about steps that would harm the model, or have.

::

    guard = Guard(config.guard)
    result = engine.train_step(task, parts, weight=weight)      # not applied where gradients aren't finite
    if not result.applied:
        run.say(explain_skip(engine, task, parts, batch.sample_keys, step=step, loss=result.loss))
    if guard.after_step(step, result.applied):                  # so many in a row: go back
        roll_back(engine, guard, saver, run, step)              # raises Diverged when that hasn't helped
    if guard.has_spiked([(step, task.name, loss), ...], run.say):  # global losses, on log steps and before a save
        roll_back(engine, guard, saver, run, step)

Everything here depends on values that are equal on all ranks, so all ranks decide alike.

A rollback at step t to the checkpoint of step S takes back weights and optimizer alone. The step counter and the data
go on from t: the samples of steps S+1 to t are passed over, and a position is still the step times the batch size.
Taking the data back as well would read into the same trouble again. The trade-off: the steps in between are lost, good
ones too, and the schedule of the learning rate is that much ahead of the weights.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmscale import checkpoint
from mmscale.config import GuardConfig
from mmscale.engine import Engine, held_weights
from mmscale.errors import CheckpointError, Diverged
from mmscale.models.model import Batch
from mmscale.runs import Run
from mmscale.saver import Saver
from mmscale.tasks import Task

REMEDY = "lower optim.lr, set optim.clip_norm, or look at the samples that the messages before name"
NUM_NAMED = 5  # samples that a message names; the others are counted

# The scale of losses is at least this share of their median, and at least so many nats, whatever their MAD: losses that
# hardly vary (one batch over and over, or nothing left to learn) would make a spike of any rounding.
MIN_RELATIVE_SCALE, MIN_SCALE = 0.01, 1e-3
NORMAL = 1.4826  # a normal distribution's standard deviation in units of its MAD


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A loss far above those of the same task before it. str() gives the words for it."""

    step: int
    task: str
    loss: float
    median: float  # of the losses that it was compared with; NaN if there were too few
    z: float  # its distance from the median in robust standard deviations; infinite for a loss that isn't finite
    roll_back: bool  # guard.on_spike says so

    def __str__(self) -> str:
        if not math.isfinite(self.loss):
            return (
                f"step {self.step}: the loss of {self.task} is {self.loss}, though its gradients were finite"
            )
        return (
            f"step {self.step}: the loss of {self.task} is {self.loss:.4g}, {self.z:.1f} robust standard deviations "
            f"above the median {self.median:.4g} of the steps before"
        )


class Guard:
    """Counts bad steps, looks for spikes, and says when to go back and when to give up."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.num_skipped = 0  # steps that were left out because of their gradients
        self.num_rollbacks = 0
        self.last_z: dict[str, float] = {}  # of each task: the largest z-score at the last log
        self._in_a_row = 0
        self._seen = 0  # the last step whose loss was looked at
        self._why = ""  # of the rollback that is due
        self._losses: dict[str, deque[tuple[int, float]]] = {}  # finite ones, by task: (step, loss)

    def after_step(self, step: int, applied: bool) -> bool:
        """Whether to go back to the last checkpoint now."""
        if applied:
            self._in_a_row = 0
            return False
        self.num_skipped += 1
        self._in_a_row += 1
        if self._in_a_row < self.config.max_bad_steps:
            return False
        self._why = f"{_count(self._in_a_row, 'step')} in a row had gradients that aren't finite"
        return True

    def after_log(self, losses: Sequence[tuple[int, str, float]]) -> Spike | None:
        """The worst spike among (step, task, global loss) of the steps that were applied, oldest first.

        Steps that it has seen are passed over, so that it may be asked before a save as well as on a log step: then no
        checkpoint holds a spike that nobody has looked at, and a resumed run compares with the same losses.
        """
        worst: Spike | None = None
        losses = [loss for loss in losses if loss[0] > self._seen]
        if not losses:
            return None
        self._seen = losses[-1][0]
        self.last_z = {}
        for step, task, loss in losses:
            history = self._losses.setdefault(task, deque(maxlen=self.config.spike_window))
            median, z = score([value for _, value in history], loss, window=self.config.spike_window)
            if math.isfinite(loss):
                history.append((step, loss))
            self.last_z[task] = max(z, self.last_z.get(task, -math.inf))
            is_spike = self.config.spike_z > 0 and z >= self.config.spike_z
            if is_spike and (worst is None or z > worst.z):
                back = self.config.on_spike == "rollback"
                worst = Spike(step=step, task=task, loss=loss, median=median, z=z, roll_back=back)
        if worst is not None and worst.roll_back:
            self._why = str(worst)
        return worst

    def has_spiked(self, losses: Sequence[tuple[int, str, float]], say: Callable[[str], None]) -> bool:
        """Tells of a spike among the losses; whether to go back because of it."""
        spike = self.after_log(losses)
        if spike is not None:
            say(str(spike))
        return spike is not None and spike.roll_back

    def rolled_back(self, step: int, *, to: int | None) -> str:
        """Counts a rollback at `step` to the checkpoint of step `to`; the words for it.

        Call it before loading. Raises Diverged if there is no checkpoint (None), or guard.max_rollbacks have been made.
        """
        if to is None:
            raise Diverged(f"{self._why} by step {step}, and there is no checkpoint to go back to: {REMEDY}")
        if self.num_rollbacks >= self.config.max_rollbacks:
            before = _count(self.num_rollbacks, "rollback")
            raise Diverged(
                f"{self._why} by step {step}, after {before}: {REMEDY}; the last checkpoint is of step {to}"
            )
        self.num_rollbacks += 1
        self._in_a_row = 0
        for task, history in self._losses.items():
            kept = [(at, loss) for at, loss in history if at <= to]
            self._losses[task] = deque(kept, maxlen=self.config.spike_window)
        return (
            f"{self._why}: back to the weights and optimizer of step {to}; the data goes on, so the samples of steps "
            f"{to + 1} to {step} are passed over (rollback {self.num_rollbacks} of {self.config.max_rollbacks})"
        )

    def counts(self) -> dict[str, float]:
        """For the log."""
        return {
            "guard/skipped_steps": self.num_skipped,
            "guard/rollbacks": self.num_rollbacks,
            **{f"guard/loss_z/{task}": z for task, z in self.last_z.items()},
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint: json-able, exact. Not to be loaded after a rollback, whose count it would take back."""
        return {
            "num_skipped": self.num_skipped,
            "num_rollbacks": self.num_rollbacks,
            "in_a_row": self._in_a_row,
            "losses": {task: [list(pair) for pair in history] for task, history in self._losses.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.num_skipped = state["num_skipped"]
        self.num_rollbacks = state["num_rollbacks"]
        self._in_a_row = state["in_a_row"]
        window = self.config.spike_window
        self._losses = {
            task: deque(((step, loss) for step, loss in pairs), maxlen=window)
            for task, pairs in state["losses"].items()
        }


def score(history: Sequence[float], loss: float, *, window: int) -> tuple[float, float]:
    """(median, robust z-score) of a loss against those before it; z is 0 until half a window is there.

    z = (loss - median) / (1.4826 MAD), as Iglewicz and Hoaglin 1993 have it, with the floor for the MAD above.
    """
    if not math.isfinite(loss):
        return math.nan, math.inf
    if len(history) < window // 2:
        return math.nan, 0.0
    median = statistics.median(history)
    mad = statistics.median(abs(value - median) for value in history)
    scale = max(NORMAL * mad, MIN_RELATIVE_SCALE * abs(median), MIN_SCALE)
    return median, (loss - median) / scale


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What of a step wasn't finite on one rank, in the order in which it comes to be; rows are those of its batch."""

    weights: bool  # some
    inputs: dict[str, list[int]]  # by field
    outputs: list[int]  # what the model makes of inputs that are finite
    loss: bool


@torch.no_grad()
def trace(engine: Engine, task: Task, parts: Sequence[Batch], *, loss: Tensor) -> Traced:
    """Runs the model once more over the micro-batches of a step that wasn't applied, to see what isn't finite.

    Collective under ZeRO-3. Good steps pay nothing for it; the weights haven't changed, so it sees what the step saw.
    """
    inputs: dict[str, list[int]] = {}
    outputs: list[int] = []
    first = 0
    for part in parts:
        num_rows = len(next(iter(part.values()))["lengths"])
        bad_inputs: set[int] = set()
        for field in task.fields:
            rows = _bad_rows(part[field]["x"])
            bad_inputs.update(rows)
            if rows:
                inputs.setdefault(field, []).extend(first + row for row in rows)
        used = part["usable"]["x"].tolist() if "usable" in part else list(range(num_rows))
        bad: set[int] = set()
        for value in engine.deepspeed(task.embed, part).values():
            if value.dim():  # rows of all samples, or of the usable ones
                names = used if len(value) == len(used) else range(num_rows)
                bad.update(names[row] for row in _bad_rows(value))
        outputs += sorted(first + row for row in bad - bad_inputs)
        first += num_rows
    weights = not all(bool(held_weights(engine, p).isfinite().all()) for p in engine.model.parameters())
    return Traced(weights=weights, inputs=inputs, outputs=outputs, loss=not math.isfinite(loss.item()))


def explain_skip(
    engine: Engine, task: Task, parts: Sequence[Batch], keys: Sequence[str], *, step: int, loss: Tensor
) -> str:
    """The message about a step that wasn't applied: who brought what, down to the samples. Collective.

    keys: of this rank's samples, in the order of the rows. loss: what `train_step` returned on this rank.
    """
    traced = trace(engine, task, parts, loss=loss)
    inputs = {field: [keys[row] for row in rows] for field, rows in traced.inputs.items()}
    ranks = engine.world.gather((traced, inputs, [keys[row] for row in traced.outputs], list(keys)))
    return (
        f"step {step} ({task.name}) was left out on all ranks: its gradients aren't finite; {_causes(ranks)}"
    )


def _causes(ranks: list[tuple[Traced, dict[str, list[str]], list[str], list[str]]]) -> str:
    if any(traced.weights for traced, *_ in ranks):
        return "nor are the weights"
    causes = [
        f"rank {rank} reads {field} that isn't finite in {_named(found, len(keys))}"
        for rank, (_, inputs, _, keys) in enumerate(ranks)
        for field, found in inputs.items()
    ]
    causes += [
        f"rank {rank} makes what isn't finite of the finite {_named(found, len(keys))}"
        for rank, (_, _, found, keys) in enumerate(ranks)
        if found
    ]
    if causes:
        return "; ".join(causes)
    lost = [rank for rank, (traced, *_) in enumerate(ranks) if traced.loss]
    read = "; ".join(f"rank {rank} read {_named(keys, len(keys))}" for rank, (*_, keys) in enumerate(ranks))
    if lost:
        who = ", ".join(map(str, lost))
        return f"inputs and outputs of the model are finite, the loss on rank {who} isn't; {read}"
    return f"the loss is finite, so they overflowed in the backward pass, and whose they were can't be known; {read}"


def _named(keys: Sequence[str], total: int) -> str:
    """ "2 of 6 samples: a, b"."""
    more = f" and {len(keys) - NUM_NAMED} more" if len(keys) > NUM_NAMED else ""
    return f"{len(keys)} of {_count(total, 'sample')}: {', '.join(keys[:NUM_NAMED])}{more}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _bad_rows(values: Tensor) -> list[int]:
    """The rows in which something isn't finite."""
    if not values.is_floating_point() or not values.numel():
        return []
    found: list[int] = (~values.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    return found


def roll_back(engine: Engine, guard: Guard, saver: Saver, run: Run, step: int) -> None:
    """Loads the newest good checkpoint into the engine that trains. Collective.

    Raises Diverged where that is no use.
    """
    with suppress(CheckpointError):  # a save that fails now: then it is the one before
        saver.wait()
    found, _ = checkpoint.find(run.checkpoints, engine.world)
    run.say(guard.rolled_back(step, to=None if found is None else found.step))
    assert found is not None  # else it has raised
    universal = checkpoint.needs_conversion(found, engine.world.size, engine.zero_stage)
    checkpoint.load(engine, found, universal=universal)
