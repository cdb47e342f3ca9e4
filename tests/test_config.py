"""The configuration: overrides, messages that name every problem, durations, and what is kept in files."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmscale.config import Config, Duration, load_config, parse_duration
from mmscale.errors import ConfigError
from mmscale.recipes import RECIPES, get


def base() -> Config:
    """The quickstart, with every number fixed that a test goes by, so that the recipe may be tuned."""
    return get("quickstart").override(
        "data.batch_size=192",
        "data.fields.text.source=json.captions|txt",
        "model.width=192",
        "model.num_heads=4",
        "model.image.size=64",
        'tasks={"image_text": 0.6, "audio_text": 0.3, "caption": 0.1}',
        "optim.lr=1e-3",
        "optim.schedule=cosine",
        "optim.warmup=5%",
        "train.save_every=25%",
        "engine.zero_stage=2",
    )


def problems(*assignments: str) -> list[str]:
    """The lines of the message that these overrides give, without its first."""
    with pytest.raises(ConfigError) as caught:
        base().override(*assignments)
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("the configuration has ")
    return [line.strip() for line in rest]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_and_survives_its_file(name: str) -> None:
    config = get(name)
    assert Config.from_json(config.to_json()) == config
    assert (RECIPES[name].__doc__ or "").strip(), "`mmscale recipes` shows the first line"


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    before = base()
    after = before.override(
        "optim.lr=3e-4", "tasks.caption=0", "data.fields.text.source=txt", "model.image.size=32"
    )
    assert (after.optim.lr, after.tasks["caption"]) == (3e-4, 0)
    assert (after.data.fields["text"].source, after.model.image.size) == ("txt", 32)
    assert before.differences(after) == [
        "data.fields.text.source: json.captions|txt -> txt",
        "model.image.size: 64 -> 32",
        "optim.lr: 0.001 -> 0.0003",
        "tasks.caption: 0.1 -> 0.0",
    ]
    assert before.optim.lr == 1e-3, "override returns a copy"


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("run.name=2024", "run.name", "2024"),
        ("run.name=true", "run.name", "true"),
        ("run.dir=1e3", "run.dir", "1e3"),
        ("run.dir=null", "run.dir", None),
        ("run.dir=a=b", "run.dir", "a=b"),
        ("run.dir=", "run.dir", ConfigError),
        ("data.train=7", "data.train", "7"),
        ('data.train=["a","b"]', "data.train", ["a", "b"]),
        ("data.train=a/{0..3}.tar", "data.train", "a/{0..3}.tar"),
        ("data.evals.mine=shards/x", "data.evals.mine", "shards/x"),
        ("train.duration=500", "train.duration", "500"),
        ("train.duration=2ep", "train.duration", "2ep"),
        ("train.eval_every=null", "train.eval_every", None),
        ("data.shuffle=false", "data.shuffle", False),
    ],
)
def test_the_type_of_a_field_decides_how_a_value_is_read(assignment: str, path: str, value: Any) -> None:
    if value is ConfigError:
        problems(assignment)
        return
    found: Any = get("quickstart").override(assignment)
    for part in path.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optm.lr=3", "optm: no such field; did you mean optim?"),
        ("optim.lrr=3", "optim.lrr: no such field; did you mean lr?"),
        ("model.image.sze=3", "model.image.sze: no such field; did you mean size?"),
        ("data.fields.image.sorce=jpg", "data.fields.image.sorce: no such field; did you mean source?"),
        ("tasks.captoin=1", "tasks.captoin: no such task; did you mean caption?"),
        ("optim.lr=fast", "optim.lr='fast': input should be a valid number"),
        ("optim.lr=-1", "optim.lr=-1: input should be greater than 0"),
        ("optim.lr=NaN", "optim.lr=nan: input should be a finite number"),
        ("optim.lr=true", "optim.lr: true is neither a number nor a text"),
        ("run.seed=true", "run.seed: true is neither a number nor a text"),
        ("run.seed=-1", "run.seed=-1: input should be greater than or equal to 0"),
        ("run.name=..", "run.name: '..' can't be a folder of runs/"),
        ("run.name=a/b", "run.name: 'a/b' can't be a folder of runs/"),
        ("engine.zero_stage=4", "engine.zero_stage=4: input should be 0, 1, 2 or 3"),
        ("engine.zero_stage=true", "engine.zero_stage: true is neither a number nor a text"),
        ("engine.offload_parameters=cpu", "engine: offload_parameters=cpu needs zero_stage=3, it is 2"),
        ("engine.timeout=1e300", "engine.timeout=1e+300: input should be less than or equal to"),
        ("data=5", "data=5: it is a section: its fields are train, evals,"),
        ("data.evals=5", "data.evals=5: it is a section: give data.evals.NAME=value"),
        ("data.train=[]", "data.train: [] names no shards"),
        ("data.train=[1]", "data.train: [1] names no shards"),
        ("data.batch_size=8.5", "data.batch_size=8.5: input should be a valid integer"),
        ("train.accumulation=5", "data.batch_size=192 must be a multiple of train.accumulation=5"),
        ("train.duration=2ep 10%", "train.duration: '2ep 10%' is not a duration: give one of"),
        ("train.duration=10%", "train.duration=10% is a share of itself"),
        ("train.eval_every=0", "train.eval_every=0: give null for none"),
        ("train.eval_every=0ep", "train.eval_every=0ep: give null for none"),
        ("train.eval_every=5m", "train.eval_every=5m is wall time"),
        ("optim.warmup=1h", "optim.warmup=1h is wall time"),
        ("model.width=100", "model: width=100 over num_heads=4 must be a whole multiple of 8 a head"),
        ('tasks={"caption": 0}', "tasks={'caption': 0.0}: at least one task needs a weight above 0"),
        ("run.name.first=x", "run.name.first: run.name is a value, not a section"),
        ("data.fields.depth.source=png", "data.fields.depth.modality: missing"),
        ("data.fields.image.source=a||b", "data.fields.image.source: 'a||b' must be names joined by |"),
        ("optim.lr", "'optim.lr': give section.field=value"),
        ("=3", "'=3': give section.field=value"),
    ],
)
def test_a_problem_is_named_with_its_value_and_what_would_be_right(assignment: str, message: str) -> None:
    found = problems(assignment)
    assert len(found) == 1, found
    assert found[0].startswith(message)


def test_all_problems_are_reported_at_once() -> None:
    """Also those that lie between sections, where a section is wrong that has no part in them."""
    found = problems(
        "nonsense",
        "optim.lr=fast",
        "model.width=33",
        "data.batch_size=193",
        "train.accumulation=2",
        "tasks.captoin=1",
    )
    assert [line.split(":")[0] for line in found] == [
        "'nonsense'",
        "model",
        "optim.lr='fast'",
        "data.batch_size=193 must be a multiple of train.accumulation=2",
        "tasks.captoin",
    ]


def test_a_task_names_the_fields_that_it_lacks() -> None:
    found = problems('data.fields={"image": {"source": "jpg", "modality": "image"}}', "tasks.audio_text=0")
    assert found == [
        "tasks.image_text reads the field text, which data.fields lacks; it has image",
        "tasks.caption reads the field text, which data.fields lacks; it has image",
    ]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "data.fields.image.modality=label",
            "tasks.caption can't read data.fields.image, whose modality is label",
        ),
        (
            "data.fields.text.modality=image",
            "tasks.caption can't read data.fields.text, whose modality is image",
        ),
        ("data.fields.concept.required=false", "data.fields.concept: a label tells which samples match"),
    ],
)
def test_a_field_has_the_modality_that_its_tasks_read(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        get("quickstart").override(assignment)
    assert message in str(caught.value)


def test_a_timed_run_names_every_share_of_it() -> None:
    found = problems("train.duration=30m", "train.eval_every=10%")
    assert [line.split(" is ")[0] for line in found] == [
        "train.duration=30m",
        "train.save_every=25%",
        "train.eval_every=10%",
        "optim.warmup=5%",
    ]
    timed = get("quickstart").override(
        "train.duration=30m", "optim.schedule=constant", "optim.warmup=50", "train.save_every=5m"
    )
    assert timed.train.save_every == "5m"


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no recipe is called 'quickstrat'; did you mean quickstart"):
        get("quickstrat")
    with pytest.raises(ConfigError, match="known are quickstart"):
        get("zebra")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[1]", "must hold one JSON object, it holds a list"),
        (b"{}", "run: missing"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match=r"can't read the config .*absent\.json: No such file"):
        get(str(tmp_path / "absent.json"))


def test_a_config_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(get("quickstart").override("optim.lr=0.5").to_json())
    assert get(str(path)).optim.lr == 0.5


# ------------------------------------------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1000", Duration(steps=1000)),
        ("0", Duration(steps=0)),
        ("2ep", Duration(steps=20)),  # 105 samples in batches of 10: an epoch has 10 whole steps
        ("0.5ep", Duration(steps=5)),
        ("3e3ex", Duration(steps=300)),
        ("3e+3ex", Duration(steps=300)),
        ("1ex", Duration(steps=1)),  # never nothing
        ("10%", Duration(steps=7)),
        ("0%", Duration(steps=0)),
        ("30m", Duration(seconds=1800)),
        ("1.5h", Duration(seconds=5400)),
        (" 7 ", Duration(steps=7)),
    ],
)
def test_durations_in_every_unit(text: str, expected: Duration) -> None:
    assert parse_duration(text, batch_size=10, samples_per_epoch=105, total_steps=70) == expected


@pytest.mark.parametrize(
    "text", ["", "ep", "2ep10%", "2ep,10%", "1d", "-5", "1e", "five", "5 m", "0x10", "nan", "inf", "5\n6"]
)
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: give one of 1000"):
        parse_duration(text, batch_size=10, samples_per_epoch=105, total_steps=70)


def test_a_share_needs_a_run_counted_in_steps() -> None:
    with pytest.raises(ConfigError, match="'10%' is a share of a run that isn't counted in steps"):
        parse_duration("10%", batch_size=10, samples_per_epoch=105)


@given(
    value=st.integers(0, 10**9),
    unit=st.sampled_from(["", "ep", "ex", "%", "m", "h"]),
    batch=st.integers(1, 10**4),
    epoch=st.integers(1, 10**7),
    total=st.integers(1, 10**7),
)
def test_a_duration_is_steps_or_seconds_and_never_nothing_by_rounding(
    value: int, unit: str, batch: int, epoch: int, total: int
) -> None:
    found = parse_duration(f"{value}{unit}", batch_size=batch, samples_per_epoch=epoch, total_steps=total)
    amount = found.steps if found.seconds is None else found.seconds
    assert (found.steps is None) != (found.seconds is None)
    assert amount is not None
    assert (amount == 0) == (value == 0)


# ------------------------------------------------------------------------------------------------- round trip


@given(
    name=st.from_regex(r"[a-z0-9_][a-z0-9._-]{0,20}", fullmatch=True),
    lr=st.floats(1e-9, 10),
    seed=st.integers(0, 2**63 - 1),
    shards=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3),
)
def test_any_config_survives_its_file(name: str, lr: float, seed: int, shards: list[str]) -> None:
    changes = [f"run.name={name}", f"optim.lr={lr!r}", f"run.seed={seed}", f"data.train={json.dumps(shards)}"]
    config = get("quickstart").override(*changes)
    assert (config.run.name, config.optim.lr, config.run.seed, config.data.train) == (name, lr, seed, shards)
    assert Config.from_json(config.to_json()) == config
    assert config.differences(Config.from_json(config.to_json())) == []


@given(st.lists(st.text(max_size=30), max_size=4))
def test_whatever_is_typed_ends_in_a_config_or_in_a_message(assignments: list[str]) -> None:
    with contextlib.suppress(ConfigError):
        get("quickstart").override(*assignments)
