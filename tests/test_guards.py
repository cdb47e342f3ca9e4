"""Guards without ranks: counting, spikes, what is said; and the optimizer that looks before it steps."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import join_world, make_engine, tiny_config

from mmscale.config import GuardConfig
from mmscale.engine import Engine
from mmscale.errors import Diverged
from mmscale.guards import Guard, Traced, explain_skip, score, trace
from mmscale.heartbeat import Heartbeat
from mmscale.optim import AdamW, CheckedAdamW
from mmscale.pipeline import drop_complete, micro_batches, train_stream
from mmscale.tasks import TASKS

# -------------------------------------------------------------------------------------------------- counting


def test_bad_steps_in_a_row_go_back() -> None:
    guard = Guard(GuardConfig(max_bad_steps=3))
    outcomes = [False, False, True, False, False, False]
    assert [guard.after_step(step, applied) for step, applied in enumerate(outcomes)] == [False] * 5 + [True]
    assert guard.num_skipped == 5
    text = guard.rolled_back(6, to=2)
    assert text == (
        "3 steps in a row had gradients that aren't finite: back to the weights and optimizer of step 2; "
        "the data goes on, so the samples of steps 3 to 6 are passed over (rollback 1 of 2)"
    )
    assert [guard.after_step(step, False) for step in (7, 8, 9)] == [False, False, True]  # counted afresh


def test_after_so_many_rollbacks_the_run_ends() -> None:
    guard = Guard(GuardConfig(max_bad_steps=1, max_rollbacks=1))
    guard.after_step(4, False)
    guard.rolled_back(4, to=2)
    guard.after_step(5, False)
    with pytest.raises(
        Diverged, match=r"1 step in a row.* by step 5, after 1 rollback: lower optim.lr.*of step 2"
    ):
        guard.rolled_back(5, to=2)
    assert Diverged.exit_code == 15
    assert guard.num_rollbacks == 1


def test_without_a_checkpoint_there_is_no_way_back() -> None:
    guard = Guard(GuardConfig(max_bad_steps=1))
    guard.after_step(1, False)
    with pytest.raises(
        Diverged, match=r"by step 1, and there is no checkpoint to go back to: lower optim.lr"
    ):
        guard.rolled_back(1, to=None)


# -------------------------------------------------------------------------------------------------- spikes


def noisy(count: int, *, seed: int = 0, first: int = 1) -> list[tuple[int, str, float]]:
    generator = random.Random(seed)
    return [(first + i, "a", 2 + generator.gauss(0, 0.1)) for i in range(count)]


def test_the_score_is_the_textbook_one() -> None:
    # median 3, deviations 2 1 0 1 2: MAD 1
    assert score([5.0, 1.0, 3.0, 2.0, 4.0], 3 + 1.4826 * 2.5, window=8) == (3.0, pytest.approx(2.5))
    assert score([5.0, 1.0, 3.0, 2.0, 4.0], 1.0, window=8)[1] < 0  # a fall is never a spike
    # One wild value of five moves a mean and a standard deviation, and neither of these.
    assert score([5.0, 1.0, 3.0, 2.0, 1e9], 3 + 1.4826 * 2.5, window=8) == (3.0, pytest.approx(1.25))


def test_the_scale_has_a_floor() -> None:
    assert score([2.0] * 8, 2.02, window=8) == (2.0, pytest.approx(1.0))  # 1 % of the median
    assert score([0.0] * 8, 0.001, window=8) == (0.0, pytest.approx(1.0))  # 0.001 nats


def test_a_spike_is_found_in_its_task_and_named() -> None:
    guard = Guard(GuardConfig(spike_z=8, spike_window=16))
    assert guard.after_log(noisy(16)) is None
    other = [(step, "b", 9 + 0.1 * (step % 3)) for step in range(17, 33)]
    assert guard.after_log(other) is None  # far above a's, and b has no past yet
    spike = guard.after_log([(33, "b", 9.1), (34, "a", 5.0), (35, "a", 4.0)])
    assert spike is not None
    assert (spike.step, spike.task, spike.loss, spike.roll_back) == (34, "a", 5.0, False)
    assert spike.z > 8
    assert str(spike).startswith("step 34: the loss of a is 5, ")
    assert guard.after_log([(34, "a", 5.0), (35, "a", 4.0)]) is None  # asked again, before a save
    assert guard.counts()["guard/loss_z/a"] == spike.z
    assert guard.counts()["guard/loss_z/b"] < 1


def test_losses_that_vary_as_they_do_are_no_spikes() -> None:
    for seed in range(10):
        guard = Guard(GuardConfig())
        falling = [
            (step, task, loss + 4 * math.exp(-step / 200))  # as a training's first thousand steps
            for step, task, loss in noisy(1000, seed=seed)
        ]
        for at in range(0, 1000, 10):
            assert guard.after_log(falling[at : at + 10]) is None


def test_too_few_losses_prove_nothing_but_a_loss_must_be_finite() -> None:
    guard = Guard(GuardConfig(spike_window=16))
    assert guard.after_log([*noisy(7), (8, "a", 100.0)]) is None
    spike = guard.after_log([(9, "a", math.inf)])
    assert spike is not None
    assert str(spike) == "step 9: the loss of a is inf, though its gradients were finite"
    assert Guard(GuardConfig(spike_z=0)).after_log([(1, "a", math.nan)]) is None  # 0 is never


def test_a_spike_goes_back_if_the_recipe_says_so_and_its_steps_are_forgotten() -> None:
    guard = Guard(GuardConfig(on_spike="rollback", spike_window=16))
    guard.after_log(noisy(16))
    spike = guard.after_log([(17, "a", 50.0)])
    assert spike is not None
    assert spike.roll_back
    assert guard.rolled_back(17, to=12).startswith(f"{spike}: back to the weights and optimizer of step 12")
    assert [step for step, _ in guard.state()["losses"]["a"]] == list(range(2, 13))  # 16 of them, to 12


def test_the_state_survives_a_checkpoint() -> None:
    config = GuardConfig(spike_window=16, max_bad_steps=2)
    guard, other = Guard(config), Guard(config)
    guard.after_log(noisy(20))
    guard.after_step(21, False)
    guard.after_step(22, False)
    guard.rolled_back(22, to=20)
    guard.after_step(23, False)
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.state() == guard.state()
    assert guard.after_step(24, False) is other.after_step(24, False) is True
    spike = guard.after_log([(25, "a", 9.0)])
    assert spike is not None
    assert other.after_log([(25, "a", 9.0)]) == spike


# -------------------------------------------------------------------------------------------------- what is said


@pytest.fixture(scope="module")
def engine(scene_shards: Path) -> Engine:
    return make_engine(tiny_config(scene_shards, "train.accumulation=2"), join_world())


def parts_of(engine: Engine, scenes: Path) -> tuple[list[Any], list[str]]:
    """Two micro-batches of 6 samples of which the fourth of the first lacks its sound, and all keys."""
    config = tiny_config(scenes)
    stream = train_stream(config, engine.model, engine.world, select=lambda step: list(config.data.fields))
    batch = next(stream)
    stream.close()
    batch.tensors["audio"]["lengths"][3] = 0
    parts = [drop_complete(part) for part in micro_batches(TASKS["audio_text"](), batch.tensors, 2)]
    assert ["usable" in part for part in parts] == [True, False]
    return parts, batch.sample_keys


def test_the_rows_of_inputs_and_outputs_that_are_not_finite(
    engine: Engine, scene_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, loss = TASKS["audio_text"](), torch.tensor(math.nan)
    parts, keys = parts_of(engine, scene_shards)
    parts[0]["audio"]["x"][4, 0, 0] = math.nan
    parts[1]["audio"]["x"][5, 0, 0] = math.inf
    assert trace(engine, task, parts, loss=loss) == Traced(
        weights=False, inputs={"audio": [4, 11]}, outputs=[], loss=True
    )
    text = explain_skip(engine, task, parts, keys, step=7, loss=loss)
    assert text == (
        "step 7 (audio_text) was left out on all ranks: its gradients aren't finite; "
        f"rank 0 reads audio that isn't finite in 2 of 12 samples: {keys[4]}, {keys[11]}"
    )

    # A finite input of which the model makes none: the fifth row of the usable ones is row 5 of the part.
    parts, keys = parts_of(engine, scene_shards)
    represent = engine.model.represent

    def overflowing(field: str, batch: Any) -> torch.Tensor:
        values = represent(field, batch)
        if field == "spoken" and "usable" in batch:
            values[5] = math.inf
        return values

    monkeypatch.setattr(engine.model, "represent", overflowing)
    assert trace(engine, task, parts, loss=loss).outputs == [5]
    text = explain_skip(engine, task, parts, keys, step=7, loss=loss)
    assert f"rank 0 makes what isn't finite of the finite 1 of 12 samples: {keys[5]}" in text


def test_what_can_not_be_known_is_said(engine: Engine, scene_shards: Path) -> None:
    task = TASKS["audio_text"]()
    parts, keys = parts_of(engine, scene_shards)
    text = explain_skip(engine, task, parts, keys, step=7, loss=torch.tensor(1.0))
    assert (
        "the loss is finite, so they overflowed in the backward pass, and whose they were can't be known"
        in text
    )
    assert f"rank 0 read 12 of 12 samples: {', '.join(keys[:5])} and 7 more" in text
    text = explain_skip(engine, task, parts, keys, step=7, loss=torch.tensor(math.inf))
    assert "inputs and outputs of the model are finite, the loss on rank 0 isn't" in text
    with torch.no_grad():
        weight = engine.model.scales["audio_text"].logit_scale
        weight.fill_(math.nan)
    text = explain_skip(engine, task, parts, keys, step=7, loss=torch.tensor(math.nan))
    assert text.endswith("its gradients aren't finite; nor are the weights")


# -------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("task", ["audio_text", "caption"])
def test_a_step_tells_its_phases(scene_shards: Path, task: str) -> None:
    engine = make_engine(tiny_config(scene_shards, "train.accumulation=2"), join_world())
    parts, _ = parts_of(engine, scene_shards)
    told: list[str] = []
    beat = cast(Heartbeat, SimpleNamespace(phase=told.append))
    weight = sum(TASKS[task]().weight(part) for part in parts)
    result = engine.train_step(TASKS[task](), parts, weight=weight, beat=beat)
    assert result.applied
    each = (
        ["forward", "backward", "step"] if task == "audio_text" else ["forward", "loss", "backward", "step"]
    )
    assert told == (["forward", "loss"] if task == "audio_text" else []) + each * 2


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_the_optimizer_that_checks_takes_the_same_steps(max_norm: float) -> None:
    def make(kind: type, **kwargs: Any) -> tuple[torch.nn.Parameter, Any]:
        weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        unused = torch.nn.Parameter(torch.ones(2))
        return weight, kind([{"params": [weight, unused]}], lr=0.1, **kwargs)

    ours, checked = make(CheckedAdamW, max_norm=max_norm)
    plain, reference = make(AdamW)
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        gradient = torch.randn(2, 3, generator=generator)
        if number == 3:
            ours.grad = gradient.clone()
            ours.grad[1, 1] = math.inf
            state = {name: value.clone() for name, value in checked.state[ours].items()}
            before = ours.detach().clone()
            checked.step()
            assert checked.overflow
            assert checked._global_grad_norm == math.inf
            assert torch.equal(ours, before)
            assert all(torch.equal(value, state[name]) for name, value in checked.state[ours].items())
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_([plain], max_norm)
        checked.step()
        reference.step()
        assert not checked.overflow
        assert checked._global_grad_norm == pytest.approx(gradient.norm().item())
        assert torch.equal(ours, plain)
