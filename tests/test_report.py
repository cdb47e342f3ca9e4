"""The report: tables, Markdown, text for a terminal, and the picture of what was found."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_run import run_config

from mmscale.evals import report as reports
from mmscale.evals.report import (
    next_commands,
    report_text,
    retrieval_picture,
    tables,
    to_json,
    to_markdown,
    to_text,
)
from mmscale.tasks import model_for
from mmscale.tasks.base import Metric


def metric(value: float, chance: float | None = None) -> dict[str, float | None]:
    return {"value": value, "chance": chance}


def scores(at_1: float) -> dict[str, Any]:
    return {
        "image_text": {"image to text R@1": metric(at_1, 0.0025), "candidates": metric(400.0)},
        "caption": {"loss per token": metric(3.5)},
    }


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    return {
        "step": 800,
        "samples": 153600,
        "train_seconds": 573.0,
        "samples_per_s": 268.06,
        "world_size": 2,
        "device": "cpu",
        "steps_without_usable_samples": 0,
        "substituted_samples": {},
        "evaluations": [
            {"step": 0, "set": "unseen style", "tasks": scores(0.002)},
            {"step": 400, "set": "unseen style", "tasks": scores(0.1)},
            {"step": 800, "set": "unseen style", "tasks": scores(0.21)},
        ],
        "folder": str(tmp_path),
        "files": {"report": str(tmp_path / "report.md")},
        "next": ["tensorboard --logdir here"],
    }


def test_tables_set_before_beside_after_and_chance(report: dict[str, Any]) -> None:
    assert tables(report) == [
        (
            "unseen style: image_text, 400 candidates",
            [["", "before", "after", "chance"], ["image to text R@1", "0.002", "0.210", "0.003"]],
        ),
        (
            "unseen style: caption",
            [["", "before", "after", "chance"], ["loss per token", "3.500", "3.500", ""]],
        ),
    ]


def test_tables_of_a_run_without_a_before(report: dict[str, Any]) -> None:
    report["evaluations"] = report["evaluations"][-1:]
    assert tables(report)[0][1][1] == ["image to text R@1", "", "0.210", "0.003"]
    report["evaluations"] = []
    assert tables(report) == []


def test_markdown_is_well_formed(report: dict[str, Any], scene_shards: Path) -> None:
    text = to_markdown(report, run_config(scene_shards))
    assert text.startswith("# tiny\n\n800 steps, 153600 samples in 9:33 (268 samples/s) on 2 ranks, cpu.\n")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[:3] == [
        "|  | before | after | chance |",
        "| --- | --- | --- | --- |",
        "| image to text R@1 | 0.002 | 0.210 | 0.003 |",
    ]
    assert "replaced" not in text
    assert "passed over" not in text
    report |= {
        "substituted_samples": {"undecodable image": 3},
        "steps_without_usable_samples": 2,
        "samples_per_s": None,
    }
    text = to_markdown(report, run_config(scene_shards))
    assert "Unreadable samples replaced by others: 3 undecodable image." in text
    assert "Steps passed over for want of usable samples: 2." in text


def test_text_for_a_terminal_is_aligned(report: dict[str, Any]) -> None:
    lines = report_text(report).splitlines()
    assert lines[:3] == [
        "unseen style: image_text, 400 candidates",
        "                     before  after  chance",
        "  image to text R@1   0.002  0.210   0.003",
    ]
    assert "trained in 9:33, 268 samples/s" in lines
    assert "  tensorboard --logdir here" in lines


def test_scores_as_text_and_as_json() -> None:
    results = {"image_text": {"R@1": Metric(0.5, 0.25)}, "caption": {"loss per token": Metric(3.5)}}
    assert to_text(results).splitlines() == [
        "image_text",
        "       value  chance",
        "  R@1  0.500   0.250",
        "",
        "caption",
        "                  value  chance",
        "  loss per token  3.500",
    ]
    assert json.loads(to_json(results)) == {
        "image_text": {"R@1": metric(0.5, 0.25)},
        "caption": {"loss per token": metric(3.5)},
    }


def test_commands_are_quoted_for_a_shell(tmp_path: Path, scene_shards: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "example.png").touch()
    (folder / "example.flac").touch()
    commands = next_commands(folder, run_config(scene_shards))
    assert commands[0] == f"tensorboard --logdir '{folder}'"
    assert commands[1] == f"mmscale eval '{folder}' --data {scene_shards / 'test-style'}"
    assert commands[2].startswith(
        f"mmscale predict '{folder}' --task image_text --image '{folder}/example.png' --text"
    )
    assert len(commands) == 3


def test_the_picture_frames_the_right_image_of_each_text(
    tmp_path: Path, scene_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(scene_shards)
    drawn: list[Any] = []
    draw = reports._draw
    monkeypatch.setattr(
        reports, "_draw", lambda caption, rows: drawn.append((caption, rows)) or draw(caption, rows)
    )
    path = retrieval_picture(model_for(config).eval(), config, tmp_path)
    assert path == tmp_path / "report.png", "with 22 candidates some text finds its image even by chance"
    caption, rows = drawn[0]
    assert caption.startswith("unseen style: ")
    assert " of 22 texts have their image among the five most similar (by chance 5)" in caption
    assert 1 <= len(rows) <= 6
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (56 + 140 * len(rows) + 12, 240 + 140 * 5 + 12, 3)
    for i, (text, found) in enumerate(rows):
        assert text
        assert [right for _, right in found].count(True) == 1
        for j, (_, right) in enumerate(found):
            frame = sheet[56 + i * 140 - 3, 240 + j * 140 + 60]
            assert frame.tolist() == ([0x1A, 0x98, 0x50] if right else [255, 255, 255])
    assert Image.open(io.BytesIO((tmp_path / "example.jpg").read_bytes())).size == (128, 128)
    assert (tmp_path / "example.flac").read_bytes()[:4] == b"fLaC"


def test_no_picture_without_enough_candidates(tmp_path: Path, scene_shards: Path) -> None:
    config = run_config(
        scene_shards, f'data.evals={{"few": "{scene_shards / "test-concepts"}"}}'
    )  # three concepts
    assert retrieval_picture(model_for(config).eval(), config, tmp_path) is None
    assert not (tmp_path / "report.png").exists()
