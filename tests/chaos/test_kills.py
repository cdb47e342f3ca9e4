"""Ranks are killed at random: at any step and phase, while they start, while a checkpoint is written, while an operator
is built. Each run comes out exactly as one that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from pathlib import Path

import harness
import pytest
from harness import SCALE, Launched, Nodes, assert_exact, plain_run, record, seeds, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.distributed, pytest.mark.timeout(600)]

ROW = "kill -9 of a random rank"
INTERVAL = 10  # steps between saves
STEPS = 70
APART = 18  # a kill comes so many steps after the one before, at most
RESTART_S = 12.0  # the gate: beyond the start of the same number of plain processes

# In CI three kills share a run, since most of a short run is the start of its processes; else each seed has one.
GROUPS = [seeds()[first : first + 3] for first in range(0, 6, 3)] if SCALE == "ci" else [[s] for s in seeds()]
ONCE = {"ci": 1, "standard": 2, "full": 5}[SCALE]

_measured: list[float] = []  # seconds from a kill to the next step, less the start of plain processes


def kill_one(launched: Launched, shuffle: random.Random, *, where: str, start_s: float) -> None:
    """Kills a rank here and now, waits for the first step after it, and notes what that took."""
    mark = launched.mark()
    rank, pid = shuffle.choice(sorted(launched.ranks().items()))
    beat_file = launched.beat_files().get(pid)
    being_saved = launched.saves_under_way()
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    beat = harness.heartbeat.read(beat_file) if beat_file is not None else None
    done = max(launched.step, beat.step if beat is not None else 0)
    first = launched.wait_resumed(mark)
    seconds = time.monotonic() - killed
    _measured.append(seconds - start_s)
    lost = done - (first - 1)
    record(
        ROW,
        where=where,
        rank=rank,
        step=done,
        phase=beat.phase if beat is not None else None,
        lost_steps=lost,
        seconds=seconds,
        start_s=start_s,
    )
    # Training goes on while a checkpoint is written; one that the kill tore doesn't count.
    assert lost <= INTERVAL + (done - min(being_saved) if being_saved else 0)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: "-".join(map(str, group)))
def test_at_any_step_and_phase(
    group: list[int], scene_shards: Path, tmp_path: Path, shared_cluster: Nodes
) -> None:
    overrides = (f"train.duration={STEPS}", f"train.save_every={INTERVAL}")
    plain = plain_run(scene_shards, *overrides, world_size=2)
    on_cluster = group[0] % 2 == 1
    where = "two nodes" if on_cluster else "one node, a local Ray"
    places = {"address": shared_cluster.address, "nodes": 2, "workers": 1} if on_cluster else {"workers": 2}
    with Launched(tmp_path, scene_shards, "hurt", *overrides, **places) as launched:
        for seed in group:
            shuffle = random.Random(seed)
            launched.wait_step((launched.last_start() or 0) + shuffle.randint(1, APART))
            time.sleep(shuffle.uniform(0, 0.1))  # a step takes less, so this is anywhere in one
            kill_one(launched, shuffle, where=where, start_s=plain.start_s)
        code, told = launched.finish()
    assert code == 0, told
    assert launched.starts() == len(group) + 1  # each kill has ended an attempt, and nothing else has
    assert_exact(launched.run, plain.trace)


@pytest.mark.parametrize("seed", range(ONCE))
def test_while_a_checkpoint_is_written_and_while_starting(
    seed: int, scene_shards: Path, tmp_path: Path
) -> None:
    overrides = (f"train.duration={STEPS}", f"train.save_every={INTERVAL}")
    plain = plain_run(scene_shards, *overrides, world_size=2)
    shuffle = random.Random(1000 + seed)
    with Launched(tmp_path, scene_shards, "hurt", *overrides, workers=2) as launched:
        wait_for(lambda: len(launched.rank_pids()) == 2, 60, what="the start of two ranks")
        time.sleep(shuffle.uniform(0, 0.8 * plain.start_s))
        if launched.step == 0:
            os.kill(shuffle.choice(launched.rank_pids()), signal.SIGKILL)
            killed = time.monotonic()
            launched.wait_resumed(None)
            seconds = time.monotonic() - killed
            record(f"{ROW}, while starting", seconds=seconds, start_s=plain.start_s)
        else:
            raise AssertionError("it started too quickly to be killed before its first step")
        if seed:  # the first save of the run, which has nothing before it, and later ones
            launched.wait_step(INTERVAL * shuffle.randint(1, 4) + 1)
        wait_for(launched.saves_under_way, 60, what="a save", every=0.001)
        kill_one(launched, shuffle, where="during a save", start_s=plain.start_s)
        code, told = launched.finish()
    assert code == 0, told
    assert_exact(launched.run, plain.trace)
    assert list(launched.run.glob("checkpoints/step-*.tmp")) == []


@pytest.mark.parametrize("seed", range(ONCE))
def test_while_an_operator_is_built(seed: int, scene_shards: Path, tmp_path: Path) -> None:
    overrides = ("train.duration=12", "train.save_every=5", "engine.offload_optimizer=cpu")
    folder = tmp_path / "built"
    env = {"TORCH_EXTENSIONS_DIR": str(folder)}  # DeepSpeed's Adam for CPUs is compiled there
    with Launched(tmp_path, scene_shards, "hurt", *overrides, workers=2, env=env) as launched:
        wait_for(lambda: list(folder.glob("cpu_adam/build.ninja")), 60, what="the begin of the build")
        time.sleep(random.Random(seed).uniform(0.2, 5))
        assert not list(folder.glob("cpu_adam/*.so")), "it was built before it could be disturbed"
        compiling = [pid for pid in launched.rank_pids() if has_children(pid)]
        # the one that builds holds the lock on which the other waits
        victims = compiling if seed % 2 == 0 else [p for p in launched.rank_pids() if p not in compiling]
        assert victims
        os.kill(victims[0], signal.SIGKILL)
        killed = time.monotonic()
        launched.wait_resumed(None, timeout=300)
        record(f"{ROW}, during the operator build", seconds=time.monotonic() - killed)
        code, told = launched.finish()
    assert code == 0, told
    assert "restarting" in told
    assert_exact(launched.run, plain_run(scene_shards, *overrides, world_size=2, env=env).trace)


def has_children(pid: int) -> bool:
    children = Path(f"/proc/{pid}/task").glob("*/children")
    return any(path.read_text().strip() for path in children)


def test_a_restart_is_quick() -> None:
    if not _measured:
        pytest.skip("no rank was killed in this session: run the whole file")
    median = statistics.median(_measured)
    record(f"{ROW}, median", seconds_beyond_start=median, kills=len(_measured))
    assert median <= RESTART_S
