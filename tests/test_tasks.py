"""Tasks: which one a step runs, which samples it can use, and what it says where something is missing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import run_config

from mmscale.config import Config
from mmscale.models import Model
from mmscale.objectives import IGNORED
from mmscale.tasks import TASKS, Caption, Contrastive, model_for, schedule

# ---------------------------------------------------------------------------------------------- the schedule


def widest_deviation(weights: Mapping[str, float], num_steps: int) -> float:
    """The most by which a task's number of steps differs from its share, over all stretches of the first steps."""
    total = sum(weights.values())
    excess = dict.fromkeys(weights, 0.0)  # steps of the task so far, less its share
    lowest, highest = dict(excess), dict(excess)
    for step in range(num_steps):
        chosen = schedule(weights, step)
        for name, weight in weights.items():
            excess[name] += (name == chosen) - weight / total
            lowest[name] = min(lowest[name], excess[name])
            highest[name] = max(highest[name], excess[name])
    return max(highest[name] - lowest[name] for name in weights)


@pytest.mark.parametrize(
    "weights", [{"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1}, {"a": 97, "b": 3}]
)
def test_any_stretch_holds_nearly_the_right_share_of_each_task(weights: dict[str, float]) -> None:
    # The golden-ratio sequence leaves an interval by O(log n) at most: 3.3 was the most found for n = 3,000. Drawing
    # at random leaves it by sqrt(n p (1 - p)), here up to 27 and more.
    assert widest_deviation(weights, 3000) < 4


@given(
    weights=st.dictionaries(st.sampled_from("abcde"), st.floats(0, 100), min_size=1).filter(
        lambda weights: sum(weights.values()) > 1e-3
    ),
    start=st.integers(0, 10**6),
)
def test_a_task_without_weight_never_runs(weights: dict[str, float], start: int) -> None:
    for step in range(start, start + 50):
        assert weights[schedule(weights, step)] > 0


def test_only_the_ratio_of_weights_matters() -> None:
    small, large = {"a": 0.3, "b": 0.2}, {"a": 3, "b": 2}
    assert [schedule(small, step) for step in range(300)] == [schedule(large, step) for step in range(300)]
    counts = Counter(schedule(large, step) for step in range(1000))
    assert abs(counts["a"] - 600) < 4  # as above


# ------------------------------------------------------------------------------------------------- the tasks


@pytest.fixture(scope="module")
def config(scene_shards: Path) -> Config:
    return run_config(scene_shards)


@pytest.fixture(scope="module")
def model(config: Config) -> Model:
    return model_for(config).eval()


def batch_of(
    model: Model, texts: list[str | None], pictures: list[int | None]
) -> dict[str, dict[str, torch.Tensor]]:
    """Texts and grey pictures of the given brightness; None = the sample lacks it."""
    size = model.image.size
    arrays = [
        None if grey is None else torch.full((3, size, size), grey, dtype=torch.uint8).numpy()
        for grey in pictures
    ]
    return {
        "image": model.image.collate(arrays),
        "text": model.text.collate(
            [None if text is None else model.text.read(text.encode()) for text in texts]
        ),
    }


TEXTS = ["red circle", None, "blue square above red circle", "", "green star"]
PICTURES = [10, 60, None, 120, 240]


def test_usable_rows_have_all_the_fields(model: Model) -> None:
    batch = batch_of(model, TEXTS, PICTURES)
    for name in ("image_text", "caption"):
        assert TASKS[name]().usable(batch).tolist() == [0, 4]


def test_caption_targets_are_the_text_and_its_end(model: Model) -> None:
    text = model.text
    field = text.collate([text.read(b"red circle"), None])
    num_ids = int(field["lengths"][0])
    ids = field["x"][0].tolist()
    target, labels = text.target(field)
    assert target["x"][0].tolist() == [text.bos_id, *ids]
    assert labels[0].tolist() == [*ids, text.eos_id]
    assert target["lengths"].tolist() == [num_ids + 1, 0]
    assert labels[1].tolist() == [IGNORED] * (num_ids + 1)


def test_a_shorter_text_is_not_asked_for_what_pads_it(model: Model) -> None:
    text = model.text
    field = text.collate([text.read(b"red circle above blue square"), text.read(b"red circle")])
    short = int(field["lengths"][1])
    target, labels = text.target(field)
    assert short < int(field["lengths"][0])
    assert labels[1, short].item() == text.eos_id
    assert set(labels[1, short + 1 :].tolist()) <= {IGNORED}
    assert target["lengths"][1].item() == short + 1


def test_the_weight_known_beforehand_is_the_objective_s(model: Model) -> None:
    task = TASKS["caption"]()
    for rows in (slice(None), slice(1, 4), slice(4, 5)):
        batch = batch_of(model, TEXTS[rows], PICTURES[rows])
        total, weight = task.objective(task.embed(model, batch), group=False, backend=None)
        assert weight.item() == task.weight(batch)
        assert math.isfinite(total.item())
    assert weight.item() > 0


def test_caption_loss_is_that_of_the_usable_samples_alone(model: Model) -> None:
    task = TASKS["caption"]()
    sums = []
    for rows in (range(5), (0, 4)):
        batch = batch_of(model, [TEXTS[i] for i in rows], [PICTURES[i] for i in rows])
        sums.append(task.objective(task.embed(model, batch), group=False, backend=None)[0].item())
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)  # fp32 sums over other paddings


def test_contrastive_loss_is_that_of_the_usable_samples_alone(model: Model) -> None:
    task = TASKS["image_text"]()
    whole = batch_of(model, TEXTS, PICTURES)
    whole["usable"] = {"x": task.usable(whole)}
    alone = batch_of(model, [TEXTS[0], TEXTS[4]], [PICTURES[0], PICTURES[4]])
    losses = [
        task.objective(task.embed(model, one), group=False, backend=None)[0].item() for one in (whole, alone)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # fp32 sums over other paddings
    assert losses[0] > 0


def test_samples_of_one_label_are_each_other_s_positives(model: Model) -> None:
    task = TASKS["image_text"]()
    batch = batch_of(model, ["red circle", "red circle"], [10, 10])
    plain = task.objective(task.embed(model, batch), group=False, backend=None)[0].item()
    batch["concept"] = {"x": torch.tensor([4, 4]), "lengths": torch.ones(2, dtype=torch.int32)}
    labelled = task.objective(task.embed(model, batch), group=False, backend=None)[0].item()
    # Equal samples: each of two is as likely as the other, and that is the best there is only if both are right.
    assert plain == pytest.approx(math.log(2), rel=1e-5)
    assert labelled == pytest.approx(math.log(2), rel=1e-5)
    batch["concept"]["x"] = torch.tensor([4, 5])
    assert task.objective(task.embed(model, batch), group=False, backend=None)[0].item() == pytest.approx(
        plain
    )


def test_scores_leave_out_what_is_missing_and_repeated(model: Model) -> None:
    task = TASKS["image_text"]()
    batch = batch_of(model, ["red circle", None, "red circle", "green star"], [10, 60, 10, 240])
    batch["concept"] = {"x": torch.tensor([1, 2, 1, 3]), "lengths": torch.ones(4, dtype=torch.int32)}
    with torch.no_grad():
        metrics = task.metrics(task.score(model, batch), num_candidates=400)
    assert metrics["candidates"].value == 2
    assert metrics["image to text R@1"].chance == 0.5
    assert metrics["text to image R@5"] == (1.0, 1.0)
    with torch.no_grad():
        assert (
            TASKS["caption"]().metrics(
                TASKS["caption"]().score(model, batch_of(model, [None], [1])), num_candidates=1
            )
            == {}
        )


def test_generated_text_does_not_depend_on_its_neighbours(model: Model) -> None:
    task = TASKS["caption"]()
    assert isinstance(task, Caption)
    with torch.no_grad():
        together = task.generate(model, batch_of(model, [None] * 3, [10, 120, 240]))
        alone = task.generate(model, batch_of(model, [None], [120]))
    assert together.shape == (3, model.text.max_length)
    assert together[1].tolist() == alone[0].tolist()


def test_predict_says_what_is_missing(model: Model) -> None:
    batch = batch_of(model, ["red circle"], [10])
    with pytest.raises(ValueError, match="image_text compares image with text: text is missing"):
        TASKS["image_text"]().predict(model, {"image": batch["image"]})
    with pytest.raises(ValueError, match="caption describes a picture: image is missing"):
        TASKS["caption"]().predict(model, {"text": batch["text"]})


def test_predict_ranks_by_probability(model: Model) -> None:
    task = TASKS["image_text"]()
    assert isinstance(task, Contrastive)
    batch = batch_of(model, ["red circle", "green star", "blue ring"], [10, 240, 120])
    with torch.no_grad():
        answers = task.predict(model, {**batch, "image": batch_of(model, [None], [10])["image"]})
    assert len(answers) == 1
    ranking = answers[0]
    assert isinstance(ranking, list)
    shares = [entry["probability"] for entry in ranking]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, rel=1e-6)  # fp32 softmax
    assert sorted(entry["index"] for entry in ranking) == [0, 1, 2]
