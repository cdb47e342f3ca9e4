"""Whether all ranks hang, which of them is the cause, and which one is slow; over made-up signs and over real ranks."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from beating import Nursery
from mmscale_launcher import diagnose
from mmscale_launcher.agent import Agent, Sign
from mmscale_launcher.diagnose import Straggler, Stragglers, Suspicion, Watcher, culprit

from mmscale.heartbeat import PHASES, Beat

COLLECTIVE = (
    "MainThread\n  all_reduce (torch/distributed/distributed_c10d.py:3060)\n  sum (mmscale/world.py:47)"
)
WORKING = "MainThread\n  conv2d (torch/nn/conv.py:5)\n  forward (mmscale/models/image.py:7)"


def _beat(
    *,
    step: int = 100,
    phase: str = "sync",
    num_phases: int | None = None,
    step_s: float = 0.5,
    num_steps: int = 40,
) -> Beat:
    recent_s = np.zeros((num_steps, len(PHASES)), np.float32)
    recent_s[:, PHASES.index("forward")] = step_s
    at = PHASES.index(phase) if num_phases is None else num_phases
    return Beat(
        pid=1, step=step, samples=0, num_beats=100 * step + at, phase=phase, phase_s=0.0, stop=False, device_bytes=0.0,
        num_steps=num_steps, num_phases=at, recent_s=recent_s,
    )  # fmt: skip


def _sign(rank: int, beat: Beat | None, state: str = "running", cpu_s: float = 0.0) -> Sign:
    return Sign(rank=rank, beat=beat, state=state, cpu_s=cpu_s)  # type: ignore[arg-type]


def _silent(watcher: Watcher, signs: list[Sign]) -> float:
    """After how many seconds without progress the watcher speaks; 0 if it doesn't in an hour."""
    for tenths in range(36_000):
        if (found := watcher.see(signs, 1e6 + tenths / 10)) is not None:
            assert isinstance(found, Suspicion)
            assert found.seconds == pytest.approx(tenths / 10)
            return tenths / 10
    return 0.0


class TestWatcher:
    def _watcher(self) -> Watcher:
        return Watcher(hang_s=10, hang_steps=20, start_s=300)

    @pytest.mark.parametrize(
        ("beats", "seconds"),
        [
            ([_beat(step_s=0.1), _beat(step_s=0.1)], 10),  # 20 steps are less than 10 s
            ([_beat(step_s=2.0), _beat(step_s=2.0)], 40),
            ([_beat(phase="save"), _beat(phase="save")], 40),  # 4 times
            ([_beat(phase="eval"), _beat(phase="eval")], 40),
            ([_beat(phase="data", num_phases=1), _beat(phase="save", num_phases=2)], 10),  # of the one behind
            ([_beat(num_steps=0), _beat()], 300),
            ([None, _beat()], 300),
            ([None, None], 300),
        ],
    )
    def test_waits_as_long_as_honest_work_may_take(self, beats: list[Beat | None], seconds: float) -> None:
        signs = [_sign(rank, beat) for rank, beat in enumerate(beats)]
        assert _silent(self._watcher(), signs) == pytest.approx(diagnose.EARLY * seconds, abs=0.11)

    @pytest.mark.parametrize(
        "beats", [[_beat(phase="save"), _beat()], [_beat(num_steps=0), _beat()], [None, None]]
    )
    def test_a_stopped_process_has_no_long_work(self, beats: list[Beat | None]) -> None:
        signs = [_sign(rank, beat, state="stopped") for rank, beat in enumerate(beats)]
        assert _silent(self._watcher(), signs) == pytest.approx(9, abs=0.11)

    def test_progress_of_any_rank_is_progress(self) -> None:
        watcher = self._watcher()
        still = _sign(0, _beat())
        for second in range(100):
            assert watcher.see([still, _sign(1, _beat(step=second))], second) is None
        moved = [still, _sign(1, _beat(step=99))]
        assert [watcher.see(moved, second) for second in (103, 107)] == [None, None]
        assert watcher.see(moved, 109) is not None

    def test_a_watcher_that_was_stopped_saw_nothing_meanwhile(self) -> None:
        watcher, signs = self._watcher(), [_sign(0, _beat()), _sign(1, _beat())]
        assert watcher.see(signs, 0) is None
        assert watcher.see(signs, 3600) is None

    def test_nothing_to_see(self) -> None:
        watcher = self._watcher()
        assert [watcher.see([], second) for second in range(0, 1000, 4)] == [None] * 250


class TestCulprit:
    def test_the_one_behind_though_all_wait_alike(self) -> None:
        signs = [_sign(0, _beat()), _sign(1, _beat(phase="data")), _sign(2, _beat())]
        assert culprit(signs, dict.fromkeys(range(3), COLLECTIVE)) == (1, "it is behind the others")
        signs = [_sign(0, _beat(step=99, phase="step")), _sign(1, _beat(step=100, phase="data"))]
        assert culprit(signs, {})[0] == 0

    def test_a_second_forward_pass_is_after_the_first_backward(self) -> None:
        signs = [
            _sign(0, _beat(phase="backward", num_phases=5)),
            _sign(1, _beat(phase="forward", num_phases=6)),
        ]
        assert culprit(signs, {})[0] == 0

    def test_one_that_does_not_beat_is_behind(self) -> None:
        assert culprit([_sign(0, _beat(num_steps=0)), _sign(1, None)], {})[0] == 1

    @pytest.mark.parametrize("state", ["stopped", "gone"])
    def test_a_stopped_one_even_ahead(self, state: str) -> None:
        signs = [_sign(0, _beat()), _sign(1, _beat(phase="forward"), state=state)]
        assert culprit(signs, {0: WORKING, 1: COLLECTIVE}) == (1, f"its process is {state}")

    def test_on_a_tie_the_one_that_does_not_wait(self) -> None:
        signs = [_sign(rank, _beat()) for rank in range(3)]
        rank, why = culprit(signs, {0: COLLECTIVE, 1: COLLECTIVE, 2: WORKING})
        assert rank == 2
        assert "collective" in why
        assert culprit(signs, {0: COLLECTIVE, 1: "no stack: it can't be read", 2: COLLECTIVE})[0] == 1

    def test_other_threads_do_not_count(self) -> None:
        signs = [_sign(rank, _beat()) for rank in range(2)]
        other = COLLECTIVE.replace("MainThread", "mmscale-read-ahead")
        assert culprit(signs, {0: COLLECTIVE, 1: f"{WORKING}\n{other}"})[0] == 1

    def test_at_last_the_busy_one(self) -> None:
        signs = [_sign(rank, _beat()) for rank in range(3)]
        rank, why = culprit(signs, dict.fromkeys(range(3), WORKING), {0: 0.1, 1: 12.0, 2: 0.0})
        assert rank == 1
        assert "busiest" in why
        assert "nothing tells them apart" in culprit(signs, dict.fromkeys(range(3), WORKING))[1]

    def test_what_each_used_since_all_stand_still(self) -> None:
        watcher = Watcher(hang_s=10, hang_steps=20, start_s=300)
        watcher.see([_sign(0, _beat(), cpu_s=50), _sign(1, _beat(), cpu_s=2)], 0)
        watcher.see([_sign(0, _beat(), cpu_s=51), _sign(1, _beat(), cpu_s=7)], 5)
        assert watcher.cpu_s([_sign(0, _beat(), cpu_s=51), _sign(1, _beat(), cpu_s=12)]) == {0: 1, 1: 10}


def _rows(num_steps: int, **seconds: float) -> np.ndarray:
    """As Beat.recent_s: a step of 100 ms, 20 of them forward, other than is said."""
    usual = {"data": 0.002, "forward": 0.02, "backward": 0.06, "step": 0.018, **seconds}
    rows = np.zeros((num_steps, len(PHASES)), np.float32)
    for phase, value in usual.items():
        rows[:, PHASES.index(phase)] = value
    return rows


def _slow(*rows: np.ndarray, steps: tuple[int, ...] = ()) -> list[Sign]:
    return [
        _sign(
            rank,
            dataclasses.replace(
                _beat(step=steps[rank] if steps else 100, num_steps=len(of_rank)), recent_s=of_rank
            ),
        )
        for rank, of_rank in enumerate(rows)
    ]


class TestStragglers:
    def test_names_the_rank_and_phase_once_until_it_recovers(self) -> None:
        stragglers = Stragglers()
        good, bad = _rows(40), _rows(40, forward=0.07)
        (found,) = stragglers.see(_slow(good, bad, good))
        assert (found.rank, found.phase) == (1, "forward")
        assert found.ratio == pytest.approx(3.5, rel=1e-6)  # float32
        assert found.seconds == pytest.approx(0.05, rel=1e-6)
        assert stragglers.see(_slow(good, bad, good)) == []
        half = np.concatenate([bad[:8], good[:8]])
        assert stragglers.see(_slow(good, half, good)) == []
        assert stragglers.see(_slow(good, bad, good)) == []  # it hadn't recovered
        assert stragglers.see(_slow(good, good, good)) == []
        assert [one.rank for one in stragglers.see(_slow(good, bad, good))] == [1]

    def test_one_of_two(self) -> None:
        (found,) = Stragglers().see(_slow(_rows(40, data=0.09), _rows(40)))
        assert (found.rank, found.phase) == (0, "data")

    def test_the_phase_that_costs_most(self) -> None:
        (found,) = Stragglers().see(_slow(_rows(40), _rows(40, data=0.05, forward=0.2)))
        assert found.phase == "forward"

    @pytest.mark.parametrize(
        "other",
        [
            {"forward": 0.039},  # less than twice
            {"data": 0.010},  # five times, but 8 % of a step
            {"backward": 0.5},  # there a rank waits for others
            {"sync": 0.5},
            {"save": 0.5},
        ],
    )
    def test_says_nothing_of(self, other: dict[str, float]) -> None:
        assert Stragglers().see(_slow(_rows(40), _rows(40, **other))) == []

    def test_needs_two_windows(self) -> None:
        slow, good = _rows(40, forward=0.09), _rows(40)
        assert Stragglers().see(_slow(slow[:15], good[:15])) == []
        assert Stragglers().see(_slow(np.concatenate([good[:30], slow[:11]]), good)) == []
        assert len(Stragglers().see(_slow(np.concatenate([good[:30], slow[:13]]), good))) == 1

    def test_compares_equal_steps(self) -> None:
        """A rank that is eight steps ahead of what was seen of the other, while steps grow longer for both."""
        rows = _rows(40)
        rows[:, PHASES.index("forward")] = 0.01 * 3.0 ** (np.arange(40) // 8)
        assert Stragglers().see(_slow(rows, rows[:32], steps=(100, 92))) == []
        assert Stragglers().see(_slow(rows, rows[:14], steps=(100, 74))) == []  # too few of the same

    def test_one_rank_is_no_straggler(self) -> None:
        assert Stragglers().see(_slow(_rows(40))) == []
        assert Stragglers().see([*_slow(_rows(40), _rows(40)), _sign(2, None)]) == []
        assert Stragglers().see([]) == []


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent(None, f"test{os.getpid()}")
    yield made
    made.close()


def _find(agent: Agent, watcher: Watcher, timeout: float = 60) -> tuple[int, str, dict[int, str]]:
    deadline = time.monotonic() + timeout
    while True:
        signs = agent.look()
        if watcher.see(signs, time.monotonic()):
            stacks = agent.stacks([sign.rank for sign in signs])
            return *culprit(signs, stacks, watcher.cpu_s(signs)), stacks
        assert time.monotonic() < deadline, f"no hang was found: {signs}"
        time.sleep(0.05)


def _wait_step(agent: Agent, step: int) -> None:
    deadline = time.monotonic() + 60
    while any(sign.beat is None or sign.beat.step < step for sign in agent.look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


CASES = [
    (2, 1, "sleep", "data"),
    (3, 0, "stop", ""),
    pytest.param((3, 1, "gil", "sync"), marks=pytest.mark.slow),
    pytest.param((3, 2, "loader", "data"), marks=pytest.mark.slow),
]


def _random_cases(number: int) -> list[tuple[int, int, str, str]]:
    random = np.random.default_rng(20)
    kinds = ("sleep", "gil", "busy", "loader", "stop")
    phases = ("data", "sync", "forward", "loss", "backward", "step")
    cases = []
    for index in range(number):
        kind = kinds[index % len(kinds)]
        world_size = int(random.integers(2, 4))
        phase = "data" if kind == "loader" else phases[random.integers(len(phases))]
        cases.append((world_size, int(random.integers(world_size)), kind, phase))
    return cases


def _case(nursery: Nursery, agent: Agent, folder: Path, case: tuple[int, int, str, str]) -> tuple[bool, str]:
    """Has one rank hang; returns whether it was named with its phase, and what was found."""
    world_size, rank, kind, phase = case
    paths = [agent.heartbeat_path(number) for number in range(world_size)]
    agent.watch(nursery.start(paths, folder, rank=rank, kind=kind, phase=phase, step=25))
    if kind == "stop":
        _wait_step(agent, 25)
        time.sleep(np.random.default_rng().uniform(0, 0.1))  # some three steps
        agent.signal([rank], signal.SIGSTOP)
    found, why, stacks = _find(agent, Watcher(hang_s=1.0, hang_steps=10, start_s=30))
    told = f"{case}: rank {found}, {why}\n" + "\n".join(f"{r}: {text}" for r, text in stacks.items())
    beat = agent.look()[rank].beat
    assert beat is not None
    right = found == rank and (kind == "stop" or beat.phase == phase)
    agent.end(list(agent._ranks.values()), [])
    return right, told


class TestRealRanks:
    """Processes that exchange tensors over gloo; one of them really sleeps, is stopped, holds the lock, or waits."""

    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[2]}-{case[3]}")
    def test_names_the_one_that_hangs(
        self, nursery: Nursery, agent: Agent, tmp_path: Path, case: tuple[int, int, str, str]
    ) -> None:
        right, told = _case(nursery, agent, tmp_path, case)
        assert right, told
        if case[2] == "loader":
            assert "mmscale-read-ahead" not in told or "read_bytes" in told

    @pytest.mark.slow
    @pytest.mark.chaos
    def test_names_it_in_19_of_20(self, nursery: Nursery, agent: Agent, tmp_path: Path) -> None:
        results = [_case(nursery, agent, tmp_path, case) for case in _random_cases(20)]
        assert sum(right for right, _ in results) >= 19, "\n".join(
            told for right, told in results if not right
        )

    @pytest.mark.parametrize("phase", ["forward", pytest.param("data", marks=pytest.mark.slow)])
    def test_names_the_slow_one_and_its_phase_within_20_steps(
        self, nursery: Nursery, agent: Agent, tmp_path: Path, phase: str
    ) -> None:
        paths = [agent.heartbeat_path(rank) for rank in range(3)]
        agent.watch(nursery.start(paths, tmp_path, rank=1, kind="slow", phase=phase, step=40))
        stragglers, found = Stragglers(), list[Straggler]()
        while not found:
            signs = agent.look()
            found = stragglers.see(signs)
            newest = max((sign.beat.step for sign in signs if sign.beat), default=0)
            assert newest < 200
            time.sleep(0.005)
        assert [(one.rank, one.phase) for one in found] == [(1, phase)]
        assert 40 <= newest <= 60, f"named at step {newest}, slow from step 40 on"
