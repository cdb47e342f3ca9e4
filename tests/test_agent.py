"""The launcher's agent on a node, without Ray: real processes that it looks at, stops, ends and loses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mmscale_launcher import processes
from mmscale_launcher.agent import Agent, Sign, stack_by_signal

RANK = """
import os, subprocess, sys, threading, time
from pathlib import Path
from mmscale.heartbeat import Heartbeat
def wait_here():
    time.sleep(600)
child = subprocess.Popen(["sleep", "600"])
Path(sys.argv[1] + ".child").write_text(str(child.pid))
beat = Heartbeat(Path(sys.argv[1]))
beat.phase("data")
{more}
wait_here()
"""
LISTENS = "import faulthandler, signal; faulthandler.register(signal.SIGUSR2, file=2)"
READS = """
def read_here():
    time.sleep(600)
threading.Thread(target=read_here, name="mmscale-read-ahead", daemon=True).start()
exec(compile("def take():\\n    time.sleep(600)", "/somewhere/mmscale/data/ahead.py", "exec"))
take()
"""
# An agent in a process of its own, with one rank; lines of its input are polls.
AGENT = """
import json, os, subprocess, sys
from mmscale_launcher.agent import Agent
agent = Agent(float(sys.argv[1]), sys.argv[2])
rank = subprocess.Popen([sys.executable, "-c", sys.argv[3], agent.heartbeat_path(0)], process_group=0)
agent.watch({0: (rank.pid, os.getsid(0))})
print(json.dumps([rank.pid, agent.heartbeat_path(0)]), flush=True)
heard = 0
for line in sys.stdin:
    number, _ = agent.poll(heard)
    heard = heard if "unheard" in line else number
"""


def _wait(condition: Callable[[], Any], timeout: float = 20) -> Any:
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def _is_alive(pid: int) -> bool:
    return processes._is_alive(pid)


def _child(path: str) -> int:
    """The id of the process that a rank has started."""
    file = Path(path + ".child")
    return int(_wait(lambda: file.exists() and file.read_text()))


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent(None, f"test{os.getpid()}")
    yield made
    made.close()


def _start(agent: Agent, *, num_ranks: int = 1, more: str = "", log: Path | None = None) -> list[int]:
    """Starts ranks, has the agent watch them, and waits until they are in their data phase."""
    ranks = {}
    for rank in range(num_ranks):
        command = [sys.executable, "-c", RANK.format(more=more), agent.heartbeat_path(rank)]
        with (log or Path(os.devnull)).open("ab") as file:
            started = subprocess.Popen(command, process_group=0, stderr=file)
        ranks[rank] = (started.pid, os.getsid(0))
    agent.watch(ranks)
    _wait(lambda: all(sign.beat is not None and sign.beat.phase == "data" for sign in agent.look()))
    return [group for group, _ in ranks.values()]


def _sign(agent: Agent, rank: int = 0) -> Sign:
    return agent.look()[rank]


class TestSigns:
    def test_running_stopped_gone(self, agent: Agent) -> None:
        pid, other = _start(agent, num_ranks=2)
        sign = _sign(agent)
        assert (sign.rank, sign.state) == (0, "running")
        assert sign.beat is not None
        assert sign.beat.pid == pid
        assert sign.rss_bytes > 1e6
        assert sign.cpu_s > 0
        os.kill(pid, signal.SIGSTOP)
        _wait(lambda: _sign(agent).state == "stopped")
        os.kill(pid, signal.SIGCONT)
        _wait(lambda: _sign(agent).state == "running")
        os.kill(pid, signal.SIGKILL)
        _wait(lambda: _sign(agent).state == "gone")  # nobody has waited for it yet: a zombie
        os.waitpid(pid, 0)
        sign = _sign(agent)
        assert (sign.state, sign.rss_bytes) == ("gone", 0)
        assert sign.beat is not None  # the last
        assert _sign(agent, 1).state == "running"
        assert _is_alive(other)

    def test_an_id_that_another_process_has_now_is_gone(self, agent: Agent) -> None:
        with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
            agent.watch({0: (process.pid, process.pid)})
            assert _sign(agent).state == "running"
            agent.watch({0: (process.pid, os.getsid(0))})
            assert _sign(agent).state == "gone"
            process.kill()

    def test_a_rank_that_does_not_beat_yet(self, agent: Agent) -> None:
        with subprocess.Popen(["sleep", "600"], process_group=0) as process:
            agent.watch({3: (process.pid, os.getsid(0))})
            (sign,) = agent.look()
            assert (sign.rank, sign.beat, sign.state) == (3, None, "running")
            process.kill()

    def test_is_quick(self, agent: Agent) -> None:
        """Of 8 ranks in under 10 ms of CPU time, of which 1.5 are usual: a launcher polls a few times a second."""
        _start(agent)
        agent.watch(dict.fromkeys(range(8), next(iter(agent._ranks.values()))))
        begin = time.process_time()
        heard = 0
        for _ in range(10):
            heard, _ = agent.poll(heard)
        assert (time.process_time() - begin) / 10 < 0.01

    def test_signals_reach_the_rank_and_not_its_child(self, agent: Agent) -> None:
        (pid,) = _start(agent)
        agent.signal([0], signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert _is_alive(_child(agent.heartbeat_path(0)))
        agent.signal([0], signal.SIGTERM)  # of a rank that is gone, and one that was never watched
        agent.signal([7], signal.SIGTERM)


class TestStacks:
    def test_of_a_rank_that_runs_and_of_one_that_is_stopped(self, agent: Agent) -> None:
        pid, _ = _start(agent, num_ranks=2)
        os.kill(pid, signal.SIGSTOP)
        found = agent.stacks([0, 1])
        for rank in (0, 1):
            lines = found[rank].splitlines()
            assert lines[0].startswith("MainThread")
            assert lines[1].startswith("  wait_here (")
            assert len(lines) == 3
        assert _sign(agent).state == "stopped"
        assert _sign(agent, 1).state == "running"  # a look leaves it as it was

    def test_data_threads_are_shown_where_the_main_one_waits_for_them(self, agent: Agent) -> None:
        _start(agent, more=READS)
        _wait(lambda: "take (mmscale/data/ahead.py" in agent.stacks([0])[0])
        text = agent.stacks([0])[0]
        assert text.index("MainThread") < text.index("mmscale-read-ahead") < text.index("read_here")

    def test_of_deep_stacks_the_innermost(self, agent: Agent) -> None:
        _start(agent, more="def down(n):\n    return down(n - 1) if n else wait_here()\ndown(50)")
        _wait(lambda: "wait_here" in agent.stacks([0])[0])
        assert len(agent.stacks([0])[0].splitlines()) == 9

    def test_in_words_where_there_is_none(self, agent: Agent) -> None:
        (pid,) = _start(agent)
        os.kill(pid, signal.SIGKILL)
        _wait(lambda: _sign(agent).state == "gone")
        assert agent.stacks([0]) == {0: "no stack: the process is gone"}
        assert agent.stacks([7]) == {}
        with subprocess.Popen(["sleep", "600"], process_group=0) as process:
            agent.watch({0: (process.pid, os.getsid(0))})
            assert agent.stacks([0])[0].startswith("no stack: ")
            process.kill()

    def test_by_signal_from_a_rank_that_listens(self, agent: Agent, tmp_path: Path) -> None:
        log = tmp_path / "rank-0.log"
        (pid,) = _start(agent, more=LISTENS, log=log)
        lines = _wait(lambda: stack_by_signal(pid)).splitlines()
        assert lines[0] == "MainThread"
        assert lines[1].startswith("  wait_here (")
        assert "wait_here" in log.read_text()
        os.kill(pid, signal.SIGSTOP)
        assert stack_by_signal(pid) == ""

    def test_a_rank_that_does_not_listen_gets_no_signal(self, agent: Agent, tmp_path: Path) -> None:
        (pid,) = _start(agent, log=tmp_path / "rank-0.log")
        assert stack_by_signal(pid) == ""
        assert _sign(agent).state == "running"


class TestEnd:
    def test_ends_groups_with_their_children_and_no_others(self, agent: Agent, tmp_path: Path) -> None:
        first, second = _start(agent, num_ranks=2)
        os.kill(first, signal.SIGSTOP)
        child = _child(agent.heartbeat_path(0))
        log = tmp_path / "log"
        log.write_text("one\ntwo\n")
        assert agent.end([(first, os.getsid(0))], [str(log)]) == ([], ["one\ntwo"])
        assert not _is_alive(first)
        assert not _is_alive(child)
        assert _is_alive(second)
        assert [sign.rank for sign in agent.look()] == [1]

    def test_close_ends_the_rest_and_leaves_no_files(self) -> None:
        agent = Agent(5.0, f"test{os.getpid()}")
        (pid,) = _start(agent)
        folder = Path(agent.heartbeat_path(0)).parent
        agent.close()
        assert not _is_alive(pid)
        assert not folder.exists()
        _wait(lambda: not _guards(folder))


@contextmanager
def _agent_process(lease_s: float, launch_id: str) -> Iterator[tuple[subprocess.Popen[str], int, str]]:
    """An agent in a process of its own, the id of its rank, and the rank's heartbeat file."""
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(lease_s), launch_id, RANK.format(more="")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    pid, path = json.loads(process.stdout.readline())
    try:
        yield process, pid, path
    finally:
        for group in (pid, process.pid):
            if _is_alive(group):
                os.kill(group, signal.SIGKILL)
        processes.kill_group(pid, os.getsid(0), timeout=10)
        process.communicate()


def _poll(agent: subprocess.Popen[str], word: str = "poll") -> None:
    assert agent.stdin is not None
    agent.stdin.write(f"{word}\n")
    agent.stdin.flush()


def _guards(folder: Path) -> list[int]:
    """The guards of a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"--ranks" in command and str(folder).encode() in command and _is_alive(int(entry.name)):
            found.append(int(entry.name))
    return found


class TestLease:
    """What is left when the agent, its driver, or both are no more."""

    @pytest.mark.slow
    def test_an_agent_that_nobody_calls_ends_with_its_ranks(self) -> None:
        with _agent_process(1.0, f"test{os.getpid()}") as (agent, pid, path):
            child = _child(path)
            begin = time.monotonic()
            while time.monotonic() < begin + 2.0:
                _poll(agent)
                time.sleep(0.05)
            assert agent.poll() is None
            assert _is_alive(pid)
            silent = time.monotonic()
            _wait(lambda: not _is_alive(pid) and not _is_alive(child))
            assert time.monotonic() - silent > 0.9  # the last line may have been on its way for a while
            assert agent.wait(10) == -signal.SIGKILL
            _wait(lambda: not Path(path).parent.exists())

    def test_calls_whose_answers_are_not_heard_renew_nothing(self) -> None:
        """As when a link is cut, and calls that were under way arrive when it is mended."""
        with _agent_process(1.0, f"test{os.getpid()}") as (agent, pid, path):
            _poll(agent)
            begin = time.monotonic()

            def has_ended() -> bool:
                with suppress(BrokenPipeError):
                    _poll(agent, "unheard")
                time.sleep(0.05)
                return not _is_alive(pid)

            _wait(has_ended)
            assert time.monotonic() - begin < 10  # one second, and what a busy machine adds
            assert agent.wait(10) == -signal.SIGKILL
            _wait(lambda: not Path(path).parent.exists())

    def test_an_agent_that_is_stopped_takes_its_ranks_along(self) -> None:
        with _agent_process(1.0, f"test{os.getpid()}") as (agent, pid, path):
            child = _child(path)
            agent.send_signal(signal.SIGSTOP)
            _wait(lambda: not _is_alive(pid) and not _is_alive(child))
            assert agent.wait(10) == -signal.SIGKILL
            _wait(lambda: not Path(path).parent.exists())

    def test_an_agent_that_is_killed_does_so_at_once_even_after_its_first_guard_was(self) -> None:
        with _agent_process(600.0, f"test{os.getpid()}") as (agent, pid, path):
            folder, child = Path(path).parent, _child(path)
            (guard,) = _wait(lambda: _guards(folder))
            os.kill(guard, signal.SIGKILL)
            _wait(lambda: not _is_alive(guard))
            _poll(agent)
            _wait(lambda: _guards(folder))
            agent.kill()
            _wait(lambda: not _is_alive(pid) and not _is_alive(child))
            _wait(lambda: not folder.exists())

    @pytest.mark.slow
    def test_what_outlived_both_is_cleared_by_the_next_agent_of_the_launch_alone(self) -> None:
        mine, other = f"test{os.getpid()}a", f"test{os.getpid()}b"
        beside = Agent(None, mine)  # of another node that shares this machine
        (kept,) = _start(beside)
        with _agent_process(600.0, mine) as (agent, pid, path):
            child = _child(path)
            _wait(lambda: Path(path).exists())
            (guard,) = _wait(lambda: _guards(Path(path).parent))
            os.kill(guard, signal.SIGKILL)
            agent.kill()
            agent.wait()
            foreign = Agent(None, other)
            assert foreign.clear() == []
            foreign.close()
            assert _is_alive(pid)
            following = Agent(None, mine)
            assert following.clear() == []
            assert not _is_alive(pid)
            assert not _is_alive(child)
            assert not Path(path).parent.exists()
            assert _is_alive(kept)
            assert Path(beside.heartbeat_path(0)).exists()
            following.close()
            beside.close()

    def test_children_of_an_attempt_are_known_by_what_they_inherited(self) -> None:
        launch_id = f"test{os.getpid()}"
        environment = {**os.environ, processes.ATTEMPT: f"{launch_id}-3"}
        with subprocess.Popen(["sleep", "600"], env=environment) as orphan:
            agent = Agent(None, launch_id)
            assert agent.clear() == []
            assert orphan.wait(10) == -signal.SIGKILL
            agent.close()
