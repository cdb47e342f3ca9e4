"""One run in this process, from an empty folder to its report, and what a second one makes of it."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from mmscale_kernels import configs as kernel_configs
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import run_config, with_loud_sounds

from mmscale import checkpoint
from mmscale.config import load_config
from mmscale.errors import ConfigError, DataError, Preempted, UserError
from mmscale.metrics import Event, read_json_lines
from mmscale.pipeline import check_world
from mmscale.runs import run_folder
from mmscale.tasks import schedule
from mmscale.train import train
from mmscale.world import World

STEPS = 40


@pytest.fixture(scope="module")
def finished(
    scene_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[Event]]:
    """A run to the end: its report and its events."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    events: list[Event] = []
    changes = [f"train.duration={STEPS}", "train.log_every=4", "train.save_every=8", "optim.lr=3e-3"]
    return train(run_config(scene_shards, f"run.dir={folder}", *changes), events.append), events


def test_the_loss_of_every_task_falls(finished: tuple[dict[str, Any], list[Event]]) -> None:
    report, events = finished
    for name in ("image_text", "audio_text", "caption"):
        losses = [event[f"loss/{name}"] for event in events if f"loss/{name}" in event]
        assert losses[-1] < 0.95 * losses[0], f"{name}: {losses}"
    assert report["step"] == STEPS


def test_the_folder_holds_what_it_promises(finished: tuple[dict[str, Any], list[Event]]) -> None:
    report, _ = finished
    folder = Path(report["folder"])
    config = load_config(folder / "config.json")
    assert config.run.dir == str(folder)

    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(4, STEPS + 1, 4))
    for line in lines:
        assert line["samples"] == 8 * line["step"]
        assert line["epoch"] == pytest.approx(8 * line["step"] / 64)
        for name in ("loss", "lr", "samples_per_s", "tokens_per_s", "mem_gib", "grad_norm"):
            assert line[name] >= 0, name
        assert 0 <= line["data_wait_frac"] <= 1
        assert line["mfu"] is None
        assert any(name.startswith("loss/") for name in line)
    board = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [line["step"] for line in lines]
    # TensorBoard keeps float32.
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(
        [line["loss"] for line in lines]
    )
    assert [event.step for event in board.Scalars("eval/unseen style/caption/loss per token")] == [0, STEPS]

    newest = checkpoint.complete(folder / "checkpoints")
    assert [path.name for path in newest] == ["step-00000032", "step-00000040"], "two are kept"
    assert checkpoint.verify(newest[-1]).step == STEPS
    assert all(
        torch.isfinite(weight).all() for weight in load_file(newest[-1] / "model.safetensors").values()
    )

    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))
    assert "## unseen style: image_text, 22 candidates" in (folder / "report.md").read_text()
    assert "finished at step 40" in (folder / "logs" / "rank-0.log").read_text()
    assert all(Path(path).exists() for path in report["files"].values())


def test_events_tell_a_terminal_all_it_shows(finished: tuple[dict[str, Any], list[Event]]) -> None:
    _, events = finished
    assert {event["event"] for event in events} >= {"message", "log", "eval", "save"}
    logs = [event for event in events if event["event"] == "log"]
    assert all(event["total_steps"] == STEPS for event in logs)
    assert logs[-1]["eta_s"] == 0
    assert [event["step"] for event in events if event["event"] == "save"] == [8, 16, 24, 32, 40]


def test_a_finished_run_is_left_alone(
    finished: tuple[dict[str, Any], list[Event]],
    scene_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = run_config(scene_shards, "train.duration=2", "data.evals={}", "train.save_every=0")
    folders = [train(config)["folder"] for _ in range(2)]
    assert folders == ["runs/tiny", "runs/tiny-2"]
    assert run_folder(config) == Path("runs/tiny")
    report, _ = finished
    with pytest.raises(ConfigError, match="holds a finished run: give another folder"):
        train(run_config(scene_shards, f"run.dir={report['folder']}"))


class Stop(Exception):
    """Ends a run from within, as a defect would."""


def run_until(step: int, error: type[BaseException] = Stop) -> Any:
    def on_event(event: Event) -> None:
        if event["event"] == "log" and event["step"] >= step:
            raise error

    return on_event


def test_an_unfinished_run_goes_on_only_as_itself(scene_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changes = [f"run.dir={folder}", "data.evals={}", "train.log_every=1", "train.save_every=2"]
    with pytest.raises(Stop):
        train(run_config(scene_shards, *changes), run_until(3))
    assert "Stop" in (folder / "logs" / "rank-0.log").read_text(), (
        "a defect leaves its traceback in the rank's log"
    )
    with pytest.raises(
        ConfigError, match=r"unfinished run of another configuration:\n  optim.lr: 0.001 -> 0.5\n"
    ):
        train(run_config(scene_shards, *changes, "optim.lr=0.5"))
    with pytest.raises(ConfigError, match=r"holds a run, and run.resume=never: give another folder"):
        train(run_config(scene_shards, *changes, "run.resume=never"))
    # What doesn't change the result may change: a bad sample, say, must not end a run for good.
    events: list[Event] = []
    report = train(
        run_config(scene_shards, *changes, "data.on_error=substitute", "run.resume=must"), events.append
    )
    assert any(event.get("text", "").startswith("resumed at step 2 from ") for event in events)
    assert report["step"] == 6
    assert [json.loads(text)["step"] for text in (folder / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_a_run_that_saved_nothing_is_in_nobody_s_way(scene_shards: Path, tmp_path: Path) -> None:
    """A first command with a typing error must not stand against the second one."""
    changes = [f"run.dir={tmp_path / 'run'}", "data.evals={}", "train.duration=1"]
    with pytest.raises(Stop):
        train(
            run_config(scene_shards, *changes, "optim.lr=0.5", "train.log_every=1", "train.duration=3"),
            run_until(1),
        )
    report = train(run_config(scene_shards, *changes))
    assert report["step"] == 1
    assert load_config(tmp_path / "run" / "config.json").optim.lr == 1e-3
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_resume_must_needs_a_checkpoint(scene_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"run.resume=must: there is no checkpoint to resume from in .*run"):
        train(run_config(scene_shards, f"run.dir={folder}", "run.resume=must"))
    assert not folder.exists()


def test_a_folder_in_use_is_refused(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmscale.runs.LOCK_PATIENCE_S", 0.0)
    config = run_config(scene_shards, f"run.dir={tmp_path / 'run'}", "data.evals={}", "train.log_every=1")
    refusals: list[str] = []

    def start_again(event: Event) -> None:
        if event["event"] == "log" and not refusals:
            from mmscale.runs import _claim

            with pytest.raises(ConfigError) as caught:
                _claim(config)
            refusals.append(str(caught.value))

    train(config, start_again)
    assert f"{tmp_path / 'run'} is in use by process {os.getpid()} on " in refusals[0]


def test_sigterm_saves_and_gives_the_handler_back(scene_shards: Path, tmp_path: Path) -> None:
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    config = run_config(scene_shards, f"run.dir={tmp_path / 'run'}", "data.evals={}", "train.log_every=1")

    def stop(event: Event) -> None:
        if event["event"] == "log" and event["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted, match="stopped at step 3, saved"):
        train(config, stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.verify(checkpoint.complete(tmp_path / "run" / "checkpoints")[-1]).step == 3


def test_steps_without_usable_samples_are_counted(scene_shards: Path, tmp_path: Path) -> None:
    nothing = {"source": "absent", "modality": "text", "required": False}
    changes = [f"data.fields.spoken={json.dumps(nothing)}", f"run.dir={tmp_path / 'run'}", "data.evals={}"]
    config = run_config(scene_shards, *changes, 'tasks={"audio_text": 1, "caption": 1}')
    report = train(config)
    skipped = [schedule(config.tasks, step) for step in range(6)].count("audio_text")
    assert report["step"] == 6
    assert report["steps_without_usable_samples"] == skipped > 0
    assert (
        f"Steps passed over for want of usable samples: {skipped}."
        in (tmp_path / "run" / "report.md").read_text()
    )


def test_a_batch_that_the_ranks_cannot_share_names_the_nearest(scene_shards: Path) -> None:
    world = World(0, 3, 0, 3, torch.device("cpu"), None)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"data.batch_size=8 can't be dealt .* 3 ranks .*: the nearest that can is 6 or 9"
    ):
        check_world(run_config(scene_shards), world)


def test_a_damaged_last_checkpoint_is_written_again(scene_shards: Path, tmp_path: Path) -> None:
    config = run_config(scene_shards, f"run.dir={tmp_path / 'run'}", "data.evals={}", "run.resume=auto")
    train(config)
    run = tmp_path / "run"
    (run / "report.json").unlink()
    weights = run / "checkpoints" / "step-00000006" / "model.safetensors"
    good = {name: value.clone() for name, value in load_file(weights).items()}  # it maps the file
    weights.write_bytes(weights.read_bytes()[:-1])
    assert train(config)["step"] == 6
    again = load_file(weights)
    assert all(torch.equal(good[name], again[name]) for name in good)


def test_a_model_that_comes_apart_is_not_saved(scene_shards: Path, tmp_path: Path) -> None:
    config = run_config(
        scene_shards,
        f"run.dir={tmp_path / 'run'}",
        "data.evals={}",
        "optim.lr=1e30",
        "optim.warmup=0",
        "train.duration=20",
        "train.log_every=20",
        "train.save_every=1",
        "train.keep_checkpoints=20",
    )
    with pytest.raises(
        UserError, match=r"3 steps in a row had gradients that aren't finite by step .* lower optim.lr"
    ):
        train(config)
    for path in checkpoint.complete(tmp_path / "run" / "checkpoints"):
        weights = load_file(path / "model.safetensors")
        assert all(value.isfinite().all() for value in weights.values()), path


def test_a_checkpoint_brings_its_own_words(scene_shards: Path, tmp_path: Path) -> None:
    words = tmp_path / "tokenizer.json"
    words.write_bytes((scene_shards / "tokenizer.json").read_bytes())
    config = run_config(
        scene_shards, f"run.dir={tmp_path / 'run'}", "data.evals={}", f"model.text.tokenizer={words}"
    )
    train(config)
    words.unlink()
    model, _ = checkpoint.load_model(tmp_path / "run")
    assert model.text.num_ids > 3


def test_counts_of_a_run_survive_its_interruption(scene_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "train"
    shards.mkdir()
    damage_pictures(next((scene_shards / "train").glob("*.tar")), shards / "train-000000.tar", every=4)
    changes = [
        f"data.train={shards}",
        "data.evals={}",
        "data.on_error=substitute",
        "data.error_budget=1",
        'tasks={"image_text": 1.0}',
        "train.duration=12",
        "train.save_every=4",
    ]
    whole = train(run_config(scene_shards, f"run.dir={tmp_path / 'whole'}", *changes))
    assert sum(whole["substituted_samples"].values()) > 3
    cut = run_config(scene_shards, f"run.dir={tmp_path / 'cut'}", *changes)

    def interrupt(event: Event) -> None:
        if event["event"] == "log" and event["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cut, interrupt)
    assert train(cut)["substituted_samples"] == whole["substituted_samples"]
    lines = read_json_lines(tmp_path / "cut" / "quarantine.jsonl")
    assert lines == read_json_lines(tmp_path / "whole" / "quarantine.jsonl")
    assert len(lines) == sum(whole["substituted_samples"].values())
    assert {(line["field"], line["cause"]) for line in lines} == {("image", "undecodable image")}
    assert {Path(line["shard"]).name for line in lines} == {"train-000000.tar"}
    last = read_json_lines(tmp_path / "cut" / "metrics.jsonl")[-1]
    assert last["data/bad_frac"] == pytest.approx(len(lines) / last["samples"])
    assert last["data/bad/undecodable image"] == len(lines)


def test_a_blend_trains_resumes_and_is_reported(scene_shards: Path, tmp_path: Path) -> None:
    folder = scene_shards / "train"
    changes = [
        f'data.train={{"first": "{folder}", "second": "{scene_shards / "test-style"}"}}',
        'data.weights={"first": 3, "second": 1}',
        "data.evals={}",
        "train.duration=12",
        "train.save_every=4",
    ]
    config = run_config(scene_shards, f"run.dir={tmp_path / 'run'}", *changes)

    def interrupt(event: Event) -> None:
        if event["event"] == "log" and event["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt)
    events: list[Event] = []
    changed = config.override('data.weights={"first": 0, "second": 1}')
    report = train(changed, events.append)
    said = [event["text"] for event in events if event["event"] == "message"]
    assert any("weights change at step 8: first 0.75, second 0.25 -> first 0, second 1" in t for t in said), (
        said
    )
    assert {name: row["samples"] for name, row in report["blend"].items()} == {"first": 48, "second": 48}


def test_no_sample_has_what_a_task_reads(scene_shards: Path, tmp_path: Path) -> None:
    config = run_config(
        scene_shards, f"run.dir={tmp_path / 'run'}", "data.evals={}", "data.fields.image.source=tiff"
    )
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"tasks\.image_text has nothing to learn from in data\.train: .*jpg"):
        train(config)
    assert time.monotonic() - begin < 10


def test_unreadable_samples_are_left_out_of_an_evaluation(scene_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "test"
    shards.mkdir()
    damage_pictures(next((scene_shards / "test-style").glob("*.tar")), shards / "test-000000.tar", every=5)
    report = train(
        run_config(
            scene_shards,
            f"run.dir={tmp_path / 'run'}",
            f'data.evals={{"damaged": "{shards}"}}',
            "data.on_error=substitute",
            "data.error_budget=1",
            'tasks={"image_text": 1.0}',
            "train.duration=2",
        )
    )
    scores = report["evaluations"][-1]["tasks"]["image_text"]
    with tarfile.open(shards / "test-000000.tar") as tar:
        num_pictures = sum(name.endswith("jpg") for name in tar.getnames())
    num_damaged = -(-num_pictures // 5)
    assert scores["unreadable samples, left out"]["value"] == num_damaged
    assert scores["candidates"]["value"] <= num_pictures - num_damaged


def damage_pictures(source: Path, target: Path, *, every: int) -> None:
    """Copies a shard with each so-many-th picture replaced by bytes that are none."""
    count = 0
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith("jpg"):
                data = b"no picture" if count % every == 0 else data
                count += 1
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))


def test_a_change_of_the_kernels_tables_is_recorded_and_said(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(scene_shards, f"run.dir={tmp_path / 'run'}", "data.evals={}", "train.duration=6")
    events: list[Event] = []

    def interrupt(event: Event) -> None:
        if event["event"] == "save":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, interrupt)
    monkeypatch.setattr(kernel_configs, "fingerprint", lambda: "another")
    report = train(config, events.append)
    assert report["kernels"] == {"tables": "another", "device": "cpu", "used": ANY}
    said = [event["text"] for event in events if event["event"] == "message"]
    assert any("are another now" in text for text in said), said


def test_random_crops_are_drawn_by_seed_and_row(scene_shards: Path, tmp_path: Path) -> None:
    def losses(name: str, *changes: str) -> list[float]:
        folder = tmp_path / name
        train(
            run_config(
                scene_shards,
                f"run.dir={folder}",
                "data.evals={}",
                "train.duration=4",
                "data.cache_mb=0",
                'tasks={"image_text": 1.0}',
                *changes,
            )
        )
        return [line["loss"] for line in read_json_lines(folder / "metrics.jsonl")]

    plain = losses("plain")
    cropped = losses("cropped", "data.augment.image.crop=[0.3,0.6]")
    assert cropped != plain
    assert losses("again", "data.augment.image.crop=[0.3,0.6]", "data.threads=3") == cropped
    with pytest.raises(ConfigError, match=r"crop=\[0\.3, 0\.6\].*give cache_mb=0, not 8"):
        losses("cached", "data.augment.image.crop=[0.3,0.6]", "data.cache_mb=8")


@pytest.mark.parametrize("num_bad", [2, 3])
def test_bad_steps_are_left_out_and_three_in_a_row_go_back(
    scene_shards: Path, tmp_path: Path, num_bad: int
) -> None:
    changes = ["data.shuffle=false", "data.evals={}", 'tasks={"audio_text": 1.0}', "train.log_keys=true"]
    changes += ["train.duration=9", "train.save_every=4", "train.log_every=1", "optim.schedule=constant"]
    good = run_config(scene_shards, f"run.dir={tmp_path / 'good'}", *changes)
    train(good)
    read = {
        line["step"]: line["keys"] for line in read_json_lines(tmp_path / "good" / "keys" / "rank-0.jsonl")
    }
    bad = [read[step][3] for step in range(5, 5 + num_bad)]  # a sample each; step 4 is saved before
    with_loud_sounds(scene_shards, tmp_path, bad)

    events: list[Event] = []
    config = good.override(f"data.train={tmp_path / 'train'}", f"run.dir={tmp_path / 'run'}")
    assert train(config, events.append)["step"] == 9
    told = [event["text"] for event in events if event["event"] == "message"]
    left_out = [text for text in told if "was left out on all ranks" in text]
    assert [key for key in bad if any(key in text for text in left_out)] == bad
    assert len(left_out) == num_bad
    steps = [line["step"] for line in read_json_lines(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [step for step in range(1, 10) if not 5 <= step < 5 + num_bad]
    last = read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["guard/skipped_steps"] == num_bad
    back = [text for text in told if "back to the weights and optimizer of step 4" in text]
    assert len(back) == last["guard/rollbacks"] == (num_bad == 3)
