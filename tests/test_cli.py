"""The command line under bad input: one clear message that names the thing, the right exit code, no traceback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_run import run_changes, run_config

from mmscale import checkpoint
from mmscale.cli import main
from mmscale.train import train


@dataclass(frozen=True)
class Ended:
    """How a command ended; errors are what it wrote to stderr but for what a run says of its progress."""

    code: int
    output: str
    errors: str

    @property
    def message(self) -> str:
        """What it said against the user's input: all that follows `mmscale: `."""
        found = re.search(r"^mmscale: (.*)\Z", self.errors, re.MULTILINE | re.DOTALL)
        assert found is not None, self.errors
        return found[1].strip()


Command = Callable[..., Ended]


@pytest.fixture
def mmscale(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
        output, errors = capfd.readouterr()
        assert "Traceback" not in errors
        return Ended(code, output, errors)

    return run


@pytest.fixture
def train_tiny(mmscale: Command, scene_shards: Path) -> Command:
    def run(*changes: str) -> Ended:
        return mmscale("train", "quickstart", *run_changes(scene_shards), "data.evals={}", *changes)

    return run


def rewritten(shards: Path, out: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """A copy of the training shard, each member as `change(name, body)` makes it, or left out."""
    (source,) = (shards / "train").glob("*.tar")
    with tarfile.open(source) as before, tarfile.open(out, "w") as after:
        for member in before:
            file = before.extractfile(member)
            assert file is not None
            body = change(member.name, file.read())
            if body is not None:
                member.size = len(body)
                after.addfile(member, io.BytesIO(body))
    return out


# ------------------------------------------------------------------------------------- what was typed is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND (see mmscale --help)"),
        ("trian quickstart", "command 'trian' is not known; did you mean train? (see mmscale --help)"),
        ("train", "the following arguments are required: RECIPE (see mmscale train --help)"),
        ("train quickstart --jsn", "--jsn: not known to mmscale train (see mmscale --help)"),
        ("data idx", "command 'idx' is not known; did you mean index? (see mmscale data --help)"),
        ("data demo out --source emojis", "--source 'emojis' is not known; did you mean emoji?"),
        ("launch quickstart --nodes two", "argument --nodes: invalid int value: 'two'"),
        ("eval here", "the following arguments are required: --data"),
        ("predict here", "the following arguments are required: --task"),
        ("train quickstrat", "no recipe is called 'quickstrat'; did you mean quickstart?"),
        ("train mine.json", "can't read the config mine.json: No such file or directory"),
        ("train ./", "can't read the config .: Is a directory"),
        ("recipes zebra", "no recipe is called 'zebra'; known are quickstart"),
        (
            "train quickstart optim.lrr=1",
            "the configuration has a problem:\n  optim.lrr: no such field; did you mean lr?",
        ),
        (
            "train quickstart --json optim.lr=x",
            "the configuration has a problem:\n  optim.lr='x': input should be a valid",
        ),
        (
            "train quickstart engine.zero_stage=5",
            "the configuration has a problem:\n  engine.zero_stage=5: input should be 0,",
        ),
        ("train quickstart a=1 b=2", "the configuration has 2 problems:\n  a: no such field"),
        ("data demo out --limit 1", "limit is 1; it must be 2 or more"),
        ("train quickstart model.kernels=triton run.device=cpu", "model.kernels=triton needs a GPU"),
        ("eval nowhere --data x", "nowhere: there is no such run or checkpoint"),
        ("predict nowhere --task caption", "nowhere: there is no such run or checkpoint"),
        ("eval . --data x", ". is neither a run's folder nor a checkpoint"),
        (
            "train quickstart model.text.tokenizer=nowhere",
            "model.text.tokenizer=nowhere: there is no such file",
        ),
    ],
)
def test_wrong_usage_exits_with_2(mmscale: Command, arguments: str, message: str) -> None:
    ended = mmscale(*arguments.split())
    assert ended.code == 2
    assert ended.message.startswith(message)
    assert not ended.output


def test_overrides_may_follow_options(mmscale: Command) -> None:
    """argparse by itself takes none after the first option."""
    ended = mmscale("train", "quickstart", "optim.lr=x", "--json", "data.shuffle=7")
    assert ended.code == 2
    assert "optim.lr='x'" in ended.message
    assert "data.shuffle=7" in ended.message


def test_recipes_are_listed_and_printed(mmscale: Command) -> None:
    assert "quickstart       A small tri-modal model" in mmscale("recipes").output
    assert json.loads(mmscale("recipes", "quickstart").output)["run"]["name"] == "quickstart"


# ---------------------------------------------------------------------------------------- the data can't be used


@pytest.mark.parametrize(
    ("train", "code", "message"),
    [
        ("nowhere", 3, "data.train: 1 of 1 shards don't exist or aren't files: nowhere"),
        ("empty", 3, "data.train: folder empty: holds no shards (files named *.tar)"),
        ("nothing.tar", 3, "data.train: shard nothing.tar: the file is empty"),
        ("text.tar", 3, "data.train: shard text.tar: not a tar"),
        ("cut.tar", 3, "data.train: shard cut.tar: truncated: member "),
        ("http://127.0.0.1:1/x.tar", 3, "data.train: http://127.0.0.1:1/x.tar, from byte 0: "),
        ("{a", 2, "data.train: bad brace pattern '{a'"),
    ],
)
def test_shards_that_cannot_be_used(
    train_tiny: Command, scene_shards: Path, tmp_path: Path, train: str, code: int, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.tar").touch()
    (tmp_path / "text.tar").write_text("not a tar" * 1000)
    (source,) = (scene_shards / "train").glob("*.tar")
    (tmp_path / "cut.tar").write_bytes(source.read_bytes()[:100_000])
    ended = train_tiny(f"data.train={train}", "data.storage.retries=0")
    assert ended.code == code
    assert ended.message.startswith(message)


def test_a_batch_larger_than_the_data(train_tiny: Command) -> None:
    ended = train_tiny("data.batch_size=100")
    assert ended.code == 3
    assert "64 samples don't fill one batch of 100" in ended.message


def test_a_batch_that_accumulation_does_not_divide(train_tiny: Command) -> None:
    ended = train_tiny("train.accumulation=3")
    assert ended.code == 2
    assert "data.batch_size=8 must be a multiple of train.accumulation=3" in ended.message


DAMAGE: dict[str, tuple[Callable[[str, bytes], bytes | None], str, str]] = {
    "a caption is missing": (
        lambda name, body: None if name.endswith(".json") else body,
        r"field (text|spoken|concept): the record has no json\S+; it has jpg, flac",
        "missing",
    ),
    "a picture is damaged": (
        lambda name, body: body[:200] if name.endswith(".jpg") else body,
        r"field image: not a picture that can be decoded",
        "undecodable image",
    ),
    "a sound is damaged": (
        lambda name, body: body[:50] if name.endswith(".flac") else body,
        r"field audio: not a sound file that can be decoded",
        "undecodable audio",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_sample_ends_the_run_or_is_replaced(
    train_tiny: Command, scene_shards: Path, tmp_path: Path, damage: str
) -> None:
    change, message, cause = DAMAGE[damage]
    seen: list[str] = []

    def every_fourth(name: str, body: bytes) -> bytes | None:
        key = name.split(".")[0]
        if key not in seen:
            seen.append(key)
        return change(name, body) if seen.index(key) % 4 == 0 else body

    rewritten(scene_shards, tmp_path / "damaged.tar", every_fourth)
    ended = train_tiny("data.train=damaged.tar")
    assert ended.code == 3
    assert re.fullmatch(rf"shard damaged.tar, key \w+, {message}.*", ended.message)

    ended = train_tiny(
        "data.train=damaged.tar", "data.on_error=substitute", "data.error_budget=0.6", "run.name=again"
    )
    assert ended.code == 0
    (counts,) = (
        json.loads(path.read_text())["substituted_samples"] for path in Path("runs/again").glob("report.json")
    )
    assert all(name.startswith(cause) for name in counts)
    assert sum(counts.values()) > 0
    assert "Unreadable samples replaced by others:" in Path("runs/again/report.md").read_text()

    ended = train_tiny(
        "data.train=damaged.tar", "data.on_error=substitute", "run.name=strict", "train.duration=16"
    )
    assert ended.code == 3
    assert "more than the error budget of 0.500%" in ended.message
    assert "damaged.tar" in ended.message


def test_damaged_evaluation_shards_do_not_cost_the_report(
    train_tiny: Command, scene_shards: Path, tmp_path: Path
) -> None:
    broken: list[str] = []

    def some(name: str, body: bytes) -> bytes:
        if name.endswith(".jpg") and len(broken) < 3:
            broken.append(name)
            return body[:100]
        return body

    rewritten(scene_shards, tmp_path / "held-out.tar", some)
    ended = train_tiny('data.evals={"held out": "held-out.tar"}', "data.on_error=substitute")
    assert ended.code == 0
    assert Path("runs/tiny/report.json").is_file()
    ended = train_tiny('data.evals={"held out": "nowhere"}', "run.name=other")
    assert ended.code == 3
    assert ended.message == "the shards to evaluate on: 1 of 1 shards don't exist or aren't files: nowhere"


def test_a_corrected_command_is_not_held_against_the_first(train_tiny: Command) -> None:
    assert train_tiny("data.train=typo").code == 3
    assert train_tiny().code == 0


# ------------------------------------------------------------------------------------------- a model, asked


@pytest.fixture(scope="module")
def run_folder(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(
        run_config(
            scene_shards,
            f"run.dir={folder}",
            "train.duration=2",
            'tasks={"image_text":1,"caption":1,"audio_text":0}',
        )
    )
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("--task image_text --image {example}", 2, "--task image_text reads image and text: give --text"),
        ("--task image_text --text red", 2, "--task image_text reads image and text: give --image"),
        ("--task image_text", 2, "--task image_text reads image and text: give --image and --text"),
        (
            "--task image_text --image {example} --audio x",
            2,
            "--task image_text reads image and text: leave out --audio, give --text",
        ),
        ("--task caption --image {example} --text x", 2, "--task caption reads image: leave out --text"),
        ("--task caption --image nowhere.jpg", 3, "nowhere.jpg can't be read: No such file or directory"),
        ("--task caption --image {folder}", 3, "{folder} can't be read: Is a directory"),
        (
            "--task caption --image {folder}/config.json",
            3,
            "{folder}/config.json: not a picture that can be decoded",
        ),
        ("--task image_text --image {example} --text=", 2, "--text '' is empty"),
        (
            "--task audio_text --text x --audio y",
            2,
            "--task: this model was not trained for audio_text; its tasks are image_text, caption",
        ),
        ("--task zebra", 2, "--task: this model was not trained for zebra"),
    ],
)
def test_predict_names_what_it_lacks(
    mmscale: Command, run_folder: Path, arguments: str, code: int, message: str
) -> None:
    places = {"example": run_folder / "example.jpg", "folder": run_folder}
    ended = mmscale("predict", run_folder, *arguments.format(**places).split())
    assert ended.code == code
    assert ended.message.startswith(message.format(**places))


def test_predict_answers(mmscale: Command, run_folder: Path) -> None:
    picture = run_folder / "example.jpg"
    arguments = (
        "predict",
        run_folder,
        "--task",
        "image_text",
        "--image",
        picture,
        "--text",
        "red circle",
        "--text",
        "星",
    )
    (answer,) = json.loads(mmscale(*arguments, "--json").output)
    assert answer["input"] == str(picture)
    assert {entry["choice"] for entry in answer["answer"]} == {"red circle", "星"}
    lines = mmscale(*arguments).output.splitlines()
    assert lines[0] == str(picture)
    assert re.fullmatch(r" +\d+\.\d%  (red circle|星)", lines[1])
    assert mmscale("predict", run_folder, "--task", "caption", "--image", picture).output.startswith(
        f"{picture}: "
    )


def test_eval_scores_what_the_run_reported(mmscale: Command, run_folder: Path, scene_shards: Path) -> None:
    report = json.loads((run_folder / "report.json").read_text())
    ended = mmscale("eval", run_folder, "--data", scene_shards / "test-style", "--json")
    # The same weights on the same samples; batches are padded the same way too.
    assert json.loads(ended.output) == report["evaluations"][-1]["tasks"]
    ended = mmscale("eval", run_folder, "--data", scene_shards / "test-style", "--tasks", "caption")
    assert ended.output.startswith("caption\n")
    assert "exact match" in ended.output


def test_eval_names_shards_that_are_not_there(mmscale: Command, run_folder: Path) -> None:
    ended = mmscale("eval", run_folder, "--data", "nowhere")
    assert ended.code == 3
    assert "shards don't exist or aren't files: nowhere" in ended.message


def test_a_damaged_checkpoint_is_named(mmscale: Command, run_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run_folder, tmp_path / "copy")
    damaged = []
    for path in reversed(checkpoint.complete(copy / "checkpoints")):
        damaged.append(path / "model.safetensors")
        with damaged[-1].open("r+b") as file:
            file.truncate(1000)
    ended = mmscale("predict", copy, "--task", "caption", "--image", copy / "example.jpg")
    assert ended.code == 14
    assert ended.message.startswith(f"no checkpoint in {copy / 'checkpoints'} can be used:")
    for weights in damaged:
        assert f"{weights} has 1000 bytes, written were " in ended.message


def test_index_names_a_shard_that_is_not_there(mmscale: Command, scene_shards: Path) -> None:
    assert mmscale("data", "index", "nowhere.tar").code == 3
    (shard,) = (scene_shards / "train").glob("*.tar")
    assert mmscale("data", "index", shard).output == f"{shard}: 64 samples\n"


# -------------------------------------------------------------------------------- signals, ranks and full disks


def start(changes: list[str], *, folder: Path, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    program = [sys.executable, *(prefix or ("-m", "mmscale.cli")), "train", "quickstart", *changes]
    # The runs in this process have left who they are in the environment.
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    environment = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.Popen(
        program,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def lines_until(process: subprocess.Popen[str], pattern: str) -> list[str]:
    """What the process says up to the first line that matches."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    pytest.fail(f"{pattern!r} never came: {''.join(lines)}")


def signalled(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    """The exit code after a signal, and what it still said. Nothing of it may be left running."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("it left a process behind")
    return process.returncode, errors


@pytest.fixture
def endless(scene_shards: Path) -> list[str]:
    changes = ["data.evals={}", "train.duration=100000", "train.log_every=1", "train.save_every=5"]
    return [*run_changes(scene_shards), *changes]


def test_sigterm_saves_and_ctrl_c_leaves_what_was_saved(endless: list[str], tmp_path: Path) -> None:
    process = start(endless, folder=tmp_path)
    lines_until(process, "^step 7/")
    code, errors = signalled(process, signal.SIGTERM)
    assert code == 75
    assert "Traceback" not in errors
    stopped = re.search(
        r"^mmscale: stopped at step (\d+), saved; the same command goes on from there$", errors, re.M
    )
    assert stopped is not None, errors
    step = int(stopped[1])

    process = start(endless, folder=tmp_path)
    said = lines_until(process, f"^step {step + 1}/")
    assert any(line.startswith(f"resumed at step {step} from runs/tiny/checkpoints/step-") for line in said)
    code, errors = signalled(process, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert (
        last == "mmscale: interrupted; the same command goes on from the newest checkpoint, if there is one"
    )
    newest = checkpoint.complete(tmp_path / "runs" / "tiny" / "checkpoints")[-1]
    assert checkpoint.verify(newest).step >= step


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_cannot_share_the_batch(scene_shards: Path, tmp_path: Path) -> None:
    prefix = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "mmscale.cli")
    process = start([*run_changes(scene_shards), "data.batch_size=7"], folder=tmp_path, prefix=prefix)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (
        "mmscale: data.batch_size=7 can't be dealt evenly to 2 ranks of 1 micro-batches: the nearest that can is 6 or 8"
        in errors
    )
    assert not (tmp_path / "runs").exists()


def test_a_world_without_an_address(train_tiny: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ended = train_tiny()
    assert ended.code == 2
    assert ended.message == "WORLD_SIZE=2 without MASTER_ADDR: start through torchrun or mmscale launch"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of the given size, such as 600k; needs root."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"mounting a small disk needs root: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)  # the failed run still has files open


@pytest.mark.chaos
@pytest.mark.parametrize("size", ["16k", "200k", "500k"])
def test_a_full_disk_is_named(train_tiny: Command, small_disk: Callable[[str], Path], size: str) -> None:
    folder = small_disk(size)
    (folder / "ballast").write_bytes(b"x" * 4096)
    ended = train_tiny(
        f"run.dir={folder / 'run'}", "train.log_every=1", "train.duration=60", "train.save_every=50"
    )
    assert ended.code == 14, ended.errors
    assert "disk" in ended.message
    assert re.search("No space left|are needed and", ended.message)
    assert "step 60/60" in ended.errors  # the training went on, and only the third save that failed ended it
    assert "(failure 2 of 3)" in ended.errors
    assert not list(folder.rglob("*.tmp"))


def test_read_by_head(run_folder: Path, mmscale: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: 0)
    assert main(["recipes"]) == 1
