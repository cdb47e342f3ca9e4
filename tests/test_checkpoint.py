"""Checkpoints that are damaged, pruned, fenced or far away: what is saved, found and loaded, on one or two ranks."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from ranks import run_ranks, start_ranks
from safetensors.torch import load_file
from tiny import join_world, make_engine, tiny_config

from mmscale import checkpoint
from mmscale.checkpoint import CheckpointError, Found, complete, load_model, needs_conversion, verify
from mmscale.config import Config
from mmscale.errors import ConfigError, Fenced, UserError
from mmscale.saver import Saver, write_safetensors
from mmscale.train import train

pytestmark = pytest.mark.distributed

NUM_STEPS = 8  # with a checkpoint every second one


def make_config(scenes: Path, folder: Path, *assignments: str) -> Config:
    return tiny_config(
        scenes,
        f"run.dir={folder}",
        f"train.duration={NUM_STEPS}",
        "train.save_every=2",
        "train.keep_checkpoints=3",
        "engine.zero_stage=2",
        'tasks={"image_text": 1.0}',
        *assignments,
    )


def run(fn: Callable[..., Any], *args: Any, world_size: int = 1) -> list[int | None]:
    """The exit codes of ranks that ran fn(*args)."""
    workers = start_ranks(world_size, fn, *args)
    try:
        for worker in workers:
            worker.join(timeout=60)
        return [worker.exitcode for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def kill_at(config: Config, step: int) -> None:
    """Trains, and dies with the batch of a step (from 0) in its hands."""
    from mmscale.data import ShardStream

    take = ShardStream.__next__

    def take_or_die(stream: ShardStream) -> Any:
        batch = take(stream)
        if batch.step == step:  # and the save after the step before, which goes on behind it, is done
            pointer = Path(config.run.dir or "") / "checkpoints" / "latest"
            while pointer.read_text() != f"step-{step:08d}\n":
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    ShardStream.__next__ = take_or_die  # type: ignore[method-assign]
    train(config)


@pytest.fixture(scope="module")
def killed(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its seventh step of eight, having saved after two, four and six. Copy it."""
    folder = tmp_path_factory.mktemp("runs") / "killed"
    assert run(kill_at, make_config(scene_shards, folder), 6) == [-signal.SIGKILL]
    return folder


@pytest.fixture
def copied(killed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(killed, tmp_path / "run"))


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in complete(folder / "checkpoints")]


def log(folder: Path, rank: int = 0) -> str:
    return (folder / "logs" / f"rank-{rank}.log").read_text()


# -------------------------------------------------------------------------------------------------- retention


def test_the_newest_are_kept(copied: Path, scene_shards: Path) -> None:
    assert steps(copied) == [2, 4, 6]
    for left_by_a_kill in ("step-00000005.tmp", "step-00000004.universal", "step-00000004.universal-tmp"):
        (copied / "checkpoints" / left_by_a_kill / "deepspeed").mkdir(parents=True)
    assert run(train, make_config(scene_shards, copied)) == [0]
    assert steps(copied) == [4, 6, 8]
    left = sorted(path.name for path in (copied / "checkpoints").iterdir())
    assert left == ["latest", "step-00000004", "step-00000004.universal", "step-00000006", "step-00000008"]
    assert (copied / "checkpoints" / "latest").read_text() == "step-00000008\n"


# -------------------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a flipped bit in the weights": ("model.safetensors", flip, "model.safetensors has changed since"),
    "a flipped bit in the config": ("config.json", flip, "config.json has changed since"),
    "a truncated optimizer state": ("deepspeed/*optim_states.pt", truncate, "optim_states.pt has"),
    "a missing model state": ("deepspeed/*model_states.pt", Path.unlink, "model_states.pt is missing"),
    "a truncated manifest": ("manifest.json", truncate, "manifest.json can't be read"),
    "a missing manifest": ("manifest.json", Path.unlink, "manifest.json can't be read"),
    "an empty manifest": (
        "manifest.json",
        lambda path: path.write_text("{}") and None,
        "manifest.json can't be read",
    ),
}


def damage(path: Path, kind: str) -> str:
    """Damages one file of a checkpoint; what the message must say."""
    pattern, how, words = DAMAGES[kind]
    [file] = path.glob(pattern)
    how(file)
    return words


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_before_loading(copied: Path, kind: str) -> None:
    path = copied / "checkpoints" / "step-00000006"
    assert verify(path).step == 6
    words = damage(path, kind)
    with pytest.raises(CheckpointError, match=words):
        verify(path)
    if "optimizer" in kind or "model state" in kind:  # which the model can do without
        assert load_model(path)
    else:
        with pytest.raises(UserError, match=re.escape("manifest.json" if "manifest" in kind else words)):
            load_model(path)
        with pytest.warns(UserWarning, match="passed over a damaged checkpoint"):
            load_model(copied)


def found_on_each_rank(folder: Path) -> tuple[int, list[str]]:
    found, problems = checkpoint.find(folder, join_world())
    assert found is not None
    return found.step, problems


def test_all_ranks_fall_back_to_the_checkpoint_before(copied: Path) -> None:
    words = damage(copied / "checkpoints" / "step-00000006", "a flipped bit in the weights")
    for step, problems in run_ranks(2, found_on_each_rank, copied / "checkpoints"):
        assert step == 4
        assert len(problems) == 1
        assert words in problems[0]


def test_a_run_goes_on_from_the_checkpoint_before_and_says_so(copied: Path, scene_shards: Path) -> None:
    words = damage(copied / "checkpoints" / "step-00000006", "a truncated optimizer state")
    assert run(train, make_config(scene_shards, copied)) == [0]
    assert "checkpoints: " in log(copied)
    assert words in log(copied)
    assert "resumed at step 4" in log(copied)
    assert steps(copied) == [4, 6, 8]
    for path in complete(copied / "checkpoints"):
        verify(path)  # the damaged one was written anew


def test_nothing_starts_over_where_all_are_damaged(copied: Path, scene_shards: Path) -> None:
    for path in complete(copied / "checkpoints"):
        damage(path, "a flipped bit in the weights")
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        run_ranks(1, found_on_each_rank, copied / "checkpoints")
    assert str(caught.value).count("model.safetensors has changed since it was written") == 3
    before = (copied / "metrics.jsonl").read_bytes()
    assert run(train, make_config(scene_shards, copied)) == [1]
    assert "CheckpointError: no checkpoint in" in log(copied)
    assert (copied / "metrics.jsonl").read_bytes() == before


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert run_ranks(1, finds_nothing, tmp_path) == [True]


def finds_nothing(folder: Path) -> bool:
    return checkpoint.find(folder / "checkpoints", join_world()) == (None, [])


# -------------------------------------------------------------------------------------------------- mutations


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Fifty of them: (file, how) over every kind of file in a checkpoint, and its bytes."""
    draw = random.Random(5)

    def flip_bit(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)

    hows: list[Callable[[Path], object]] = [
        *[flip_bit] * 4,
        truncate,
        lambda path: os.truncate(path, path.stat().st_size // 2),
        lambda path: os.truncate(path, 0),
        Path.unlink,
    ]
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert len(files) == 6
    for file in files:
        for how in hows:
            yield file, how
    yield "manifest.json", lambda path: path.write_text("{}")
    yield "manifest.json", lambda path: path.write_text(path.read_text().replace('"step": 6', '"step": 9'))


def found_in_each(folders: list[Path]) -> list[tuple[int, list[str]]]:
    world = join_world()
    result = []
    for folder in folders:
        found, problems = checkpoint.find(folder, world)
        assert found is not None
        result.append((found.step, problems))
    return result


def test_fifty_mutations_are_found_by_all_ranks_before_anything_is_loaded(
    killed: Path, tmp_path: Path
) -> None:
    folders, files = [], []
    for number, (file, how) in enumerate(mutations(killed / "checkpoints" / "step-00000006")):
        folder = tmp_path / str(number)
        ignored = shutil.ignore_patterns("step-00000002")
        shutil.copytree(killed / "checkpoints", folder, ignore=ignored)
        how(folder / "step-00000006" / file)
        folders.append(folder)
        files.append(file)
    assert len(folders) == 50
    for found in run_ranks(2, found_in_each, folders):
        for (step, problems), file in zip(found, files, strict=True):
            assert step == 4, (file, problems)
            [problem] = problems
            assert "step-00000006" in problem
            assert Path(file).name in problem


@pytest.mark.parametrize("text", ["step-00000099\n", "", "\0\xff", None])
def test_a_bad_pointer_is_named_and_not_followed(copied: Path, text: str | None) -> None:
    pointer = copied / "checkpoints" / "latest"
    pointer.unlink() if text is None else pointer.write_text(text, encoding="latin-1")
    [(step, [problem])] = run_ranks(1, found_on_each_rank, copied / "checkpoints")
    assert step == 6
    assert str(pointer) in problem


def test_a_pointer_without_a_checkpoint_is_no_start_from_scratch(copied: Path) -> None:
    for path in complete(copied / "checkpoints"):
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="latest names 'step-00000006', which is no checkpoint here"):
        run_ranks(1, found_on_each_rank, copied / "checkpoints")


# -------------------------------------------------------------------------------------------------- savers


def make_saver(scenes: Path, folder: Path | str, *assignments: str, **kwargs: Any) -> tuple[Saver, list[Any]]:
    """A saver around a fresh engine, and the list of what it tells."""
    config = make_config(scenes, Path("unused"), *assignments)
    told: list[Any] = []
    saver = Saver(make_engine(config, join_world()), folder, config=config, on_event=told.append, **kwargs)
    return saver, told


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saves_what_was_there_at_the_start(scenes: Path, folder: Path) -> None:
    saver, told = make_saver(scenes, folder)
    parameter = next(saver._engine.model.parameters())
    before = parameter.detach().clone()
    held = saver.start(1, {"x": 1})
    with torch.no_grad():
        parameter.add_(1.0)  # what a step does while it is being written
    saver.wait()
    assert held > 0
    assert saver.last_saved == 1
    assert [event["event"] for event in told] == ["save"]
    name = next(iter(dict(saver._engine.model.named_parameters())))
    assert torch.equal(load_file(folder / "step-00000001" / "model.safetensors")[name], before)
    manifest = verify(folder / "step-00000001").manifest
    assert manifest["state"] == {"x": 1}
    saver.save(1, {"x": 2})  # it is saved already
    assert verify(folder / "step-00000001").manifest == manifest


def test_a_save_holds_what_was_there_when_it_began(scene_shards: Path, tmp_path: Path) -> None:
    run_ranks(1, saves_what_was_there_at_the_start, scene_shards, tmp_path)


def keeps_the_best_and_two_good_ones(scenes: Path, folder: Path) -> None:
    evals = f'data.evals={{"a": "{scenes}/test-style"}}'
    best = ("train.keep_checkpoints=2", evals, "train.keep_best=a/image_text/image_to_text_r@1")
    saver, _ = make_saver(scenes, folder, *best)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.2), (5, 0.3)):
        saver.set_score(step, score)
        saver.save(step, {})
    assert names(folder) == ["latest", *(f"step-0000000{n}" for n in (2, 4, 5))]
    # A later process, which has verified nothing yet: the damaged one doesn't count as one of the two.
    truncate(folder / "step-00000005" / "model.safetensors")
    later, _ = make_saver(scenes, folder, "train.keep_checkpoints=2")
    later.save(6, {})
    assert names(folder) == ["latest", *(f"step-0000000{n}" for n in (4, 5, 6))]


def test_the_best_is_kept_and_never_fewer_than_two_that_verify(scene_shards: Path, tmp_path: Path) -> None:
    run_ranks(1, keeps_the_best_and_two_good_ones, scene_shards, tmp_path)


def is_fenced_off(scenes: Path, folder: Path) -> list[str]:
    def check_owner() -> None:
        raise Fenced("it belongs to another attempt")

    saver, _ = make_saver(scenes, folder, check_owner=check_owner)
    saver.start(1, {})
    with pytest.raises(Fenced, match="another attempt"):
        saver.wait()
    return names(folder)


def test_who_has_lost_the_run_commits_nothing(scene_shards: Path, tmp_path: Path) -> None:
    assert run_ranks(2, is_fenced_off, scene_shards, tmp_path) == [[], []]


def test_safetensors_are_written_as_the_package_reads_them(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(2, 4).bfloat16().T,
        "c": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "d": torch.tensor([True, False]),
    }
    with (tmp_path / "x").open("wb") as file:
        write_safetensors(file, tensors)
    read = load_file(tmp_path / "x")
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)


# -------------------------------------------------------------------------------------------------- behind fsspec


class Objects(LocalFileSystem):
    """Objects that all processes see and none can rename, as a service has them."""

    protocol = "objects"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("objects://"))

    def mv(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("objects can't be renamed")

    mv_file = rename = mv


def saves_and_finds_objects(scenes: Path, url: str) -> None:
    fsspec.register_implementation("objects", Objects, clobber=True)
    saver, _ = make_saver(scenes, url, "train.keep_checkpoints=2")
    engine, world = saver._engine, saver._engine.world
    for step in (1, 2, 3):
        saver.save(step, {"step": step})
    world.barrier()
    assert [path.rsplit("/", 1)[1] for path in complete(url)] == ["step-00000002", "step-00000003"]
    found, problems = checkpoint.find(url, world)
    assert found is not None
    assert (found.step, problems, found.manifest["state"]) == (3, [], {"step": 3})
    assert found.is_copy
    weights = {name: value.clone() for name, value in engine.model.state_dict().items()}
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
    checkpoint.load(engine, found, universal=False)
    world.barrier()
    assert all(torch.equal(value, weights[name]) for name, value in engine.model.state_dict().items())
    assert not found.path.exists()
    model, _ = load_model(url)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    world.barrier()
    if world.rank == 0:
        with fsspec.open(
            f"{url}/step-00000003/model.safetensors", "r+b" if "objects" in url else "wb"
        ) as file:
            file.write(b"!")
    world.barrier()
    found, [problem] = checkpoint.find(url, world)
    assert found is not None
    assert found.step == 2
    assert "step-00000003/model.safetensors" in problem
    # Without its manifest, which is written last, there is none.
    world.barrier()
    if world.rank == 0:
        fs, path = fsspec.core.url_to_fs(url)
        fs.rm(f"{path}/step-00000003/manifest.json")
    world.barrier()
    found, [problem] = checkpoint.find(url, world)
    assert found is not None
    assert found.step == 2
    assert "latest names 'step-00000003'" in problem


def test_objects_of_two_processes_without_renames(scene_shards: Path, tmp_path: Path) -> None:
    run_ranks(2, saves_and_finds_objects, scene_shards, f"objects://{tmp_path}/run")


def test_objects_in_memory(scene_shards: Path) -> None:
    run_ranks(1, saves_and_finds_objects, scene_shards, "memory://run")


# -------------------------------------------------------------------------------------------------- what it is good for


def test_another_zero_stage_is_refused_in_words() -> None:
    found = Found(Path("runs/x/checkpoints/step-00000006"), {"step": 6, "world_size": 2, "zero_stage": 2})
    assert not needs_conversion(found, 2, 2)
    assert needs_conversion(found, 3, 2)
    for stage in (0, 1, 3):
        with pytest.raises(
            ConfigError, match=f"engine.zero_stage={stage}: .*step-00000006 was written with zero_stage=2"
        ):
            needs_conversion(found, 2, stage)
    plain = Found(Path("step-00000006"), {"step": 6, "world_size": 2, "zero_stage": 0})
    assert not needs_conversion(plain, 3, 0)  # every rank has everything


def test_the_model_of_a_run_and_of_a_checkpoint(copied: Path, tmp_path: Path) -> None:
    newest = copied / "checkpoints" / "step-00000006"
    for path in (copied, newest):
        model, config = load_model(path)
        assert not model.training
        assert config.model.width == 32
        state = model.state_dict()
        for name, value in load_file(newest / "model.safetensors").items():
            assert torch.equal(state[name], value)
    older, _ = load_model(copied / "checkpoints" / "step-00000002")
    assert any(not torch.equal(value, state[name]) for name, value in older.state_dict().items())

    for path, words in (
        (tmp_path / "nowhere", "there is no such run or checkpoint"),
        (copied / "logs", "neither a run's folder nor a checkpoint"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_model(path)
    (tmp_path / "fresh" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(tmp_path / "fresh")


def test_the_manifest_lists_every_file(killed: Path) -> None:
    for path in complete(killed / "checkpoints"):
        listed = set(json.loads((path / "manifest.json").read_text())["files"])
        there = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
        assert listed == there - {"manifest.json"}
