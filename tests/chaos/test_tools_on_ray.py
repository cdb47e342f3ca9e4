"""`mmscale data pack|check|stats --address` on a cluster: what the local tools give, also when workers are killed."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray.cluster_utils import Cluster

from mmscale.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.distributed]

NUM_PICTURES = 18


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of two nodes with one CPU each, on this machine, with a folder of Ray's own."""
    with (
        tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("SPT_NOENV", "1")  # else setproctitle writes over the environment, by which we know them
        patch.delenv("RAY_ADDRESS", raising=False)
        Path(folder, "ray").mkdir()
        options = {"num_cpus": 1, "object_store_memory": 100_000_000}
        cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
        cluster.add_node(**options)
        cluster.wait_for_nodes()
        try:
            yield cluster.address
        finally:
            cluster.shutdown()


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mmscale.cli", "data", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size).save(file, "PNG", compress_level=1)
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def working(folder: str) -> list[int]:
    """Ray's workers, of the Ray with that folder, that run a job of ours at this moment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not (entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(b"ray::_run_job")):
                continue
            if f"RAY_TMPDIR={folder}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # gone in the meantime
            continue
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_pack_gives_the_same_bytes_though_a_worker_is_killed(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(NUM_PICTURES):  # large ones: to shrink them takes long enough to be killed in
        (photos / f"{number:03}.png").write_bytes(picture(number, (1600, 1200)))
        (photos / f"{number:03}.txt").write_text(f"picture {number}")
    options = ("--from", "photos", "--resize", "256", "--samples-per-shard", "3", "--shuffle", "1", "--json")
    # relative paths: of the command's working directory, not of where Ray was started
    process = start("pack", "there", *options, "--address", address, folder=tmp_path)
    deadline = time.monotonic() + 60
    killed = False
    while not killed:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        pids = working(os.environ["RAY_TMPDIR"]) if any((tmp_path / "there").glob("*.tar")) else []
        for pid in pids[:1]:
            os.kill(pid, signal.SIGKILL)
            killed = True
        time.sleep(0.005)
    assert len(list((tmp_path / "there").glob("*.tar"))) < NUM_PICTURES // 3
    said, told = process.communicate(timeout=60)
    assert process.returncode == 0, told
    assert json.loads(said)["num_samples"] == NUM_PICTURES  # nothing else on stdout

    monkeypatch.chdir(tmp_path)
    assert main(["data", "pack", "here", *options, "--workers", "1"]) == 0
    here, there = content(tmp_path / "here"), content(tmp_path / "there")
    assert list(here) == list(there)  # nor is anything left of the one that was killed
    shards = [name for name in here if name.endswith(".tar")]
    assert len(shards) == NUM_PICTURES // 3
    assert [name for name in shards if here[name] != there[name]] == []  # the indexes hold times


def test_check_and_stats_report_the_same(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(3):
        members = [(f"{number}{seed}.png", picture(10 * number + seed)) for seed in range(4)]
        members += [(f"{number}x.png", picture(1)[:-100]), (f"{number}x.txt", b"\xff")]
        write_tar(shards / f"{number}.tar", members)
    verbs = {
        verb: start(verb, "shards", "--json", "--address", address, folder=tmp_path)
        for verb in ("check", "stats")
    }
    monkeypatch.chdir(tmp_path)
    for (verb, process), code in zip(verbs.items(), (3, 0), strict=True):
        said, told = process.communicate(timeout=60)
        assert process.returncode == code, told
        assert main(["data", verb, "shards", "--json", "--workers", "1"]) == code
        local = capsys.readouterr().out
        if verb == "check":  # stats, beside it, writes the indexes
            notes = [json.loads(text).pop("notes") for text in (said, local)]
            assert all(set(note) <= {"shards without an index"} for note in notes)
            said, local = (json.dumps({**json.loads(text), "notes": {}}) for text in (said, local))
            assert json.loads(local)["num_faults"] == 6
        assert json.loads(said) == json.loads(local)
    assert json.loads(said)["num_samples"] == 15


DRIVER = """
import json, os, signal, sys
import mmscale
from mmscale.data.decode import BodyError
from mmscale_launcher import tools

def work(job):
    if job == "fail":
        raise BodyError("undecodable", "no picture")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return mmscale.__file__

tools.RETRIES = 0
run = tools.ray_map(sys.argv[1])
places = run(work, ["", ""])
said = [mmscale.__file__, next(places)[1]]
for job in ("fail", "die"):
    try:
        list(run(work, [job]))  # over the connection that is open now
    except Exception as error:
        said += [type(error).__name__, getattr(error, "cause", None), str(error)]
print(json.dumps(said))
"""


def test_nodes_run_the_code_of_the_driver_and_errors_come_back(address: str, tmp_path: Path) -> None:
    script = [sys.executable, "-c", DRIVER, address]
    said = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    here, there, *failed, died, _, text = json.loads(said.splitlines()[-1])
    assert failed == ["BodyError", "undecodable", "no picture"]
    assert Path(there).parts[-2:] == Path(here).parts[-2:] == ("mmscale", "__init__.py")
    assert there.startswith(os.environ["RAY_TMPDIR"])  # the copy that Ray was sent, not what is installed
    assert died == "UserError"
    assert text.startswith("a worker process died at the last of 1 tries, ")
    assert "\n" not in text


def test_a_wrong_address_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # as the command sets it, but only for this test
    write_tar(tmp_path / "a.tar", [("a.txt", b"1")])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.txt").write_text("words")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        for verb in (("check", "a.tar"), ("stats", "a.tar"), ("pack", "out", "--from", "photos")):
            assert main(["data", *verb, "--address", address]) == 1
            said = capsys.readouterr()
            assert said.out == ""
            lines = [line for line in said.err.splitlines() if not line.startswith("indexing 1 of 1 shards")]
            assert lines == [f"mmscale: can't join a Ray cluster at {address}: Connection refused"]
