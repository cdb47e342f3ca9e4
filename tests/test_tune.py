"""The search: its expressions, what is drawn from them, its table and picture, and one search of real runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mmscale_launcher.search import parse_search
from mmscale_launcher.tune import Found, Measure, Trial, draw, draw_curves, tune
from PIL import Image
from tiny_run import run_config

from mmscale.cli import main
from mmscale.config import load_config
from mmscale.errors import ConfigError
from mmscale.recipes import get


@pytest.mark.parametrize(
    ("text", "function", "arguments"),
    [
        ("optim.lr=loguniform(1e-5,1e-3)", "loguniform", (1e-5, 1e-3)),
        ("optim.weight_decay=quniform(0, 0.3, 0.1)", "quniform", (0, 0.3, 0.1)),
        ("model.depth=randint(2,5)", "randint", (2, 5)),
        ("optim.schedule=choice(cosine, 'linear')", "choice", ("cosine", "linear")),
        ("model.num_kv_heads=choice([null, 2])", "choice", (None, 2)),
        ("optim.eps=uniform(-1, 1)", "uniform", (-1, 1)),
    ],
)
def test_expressions(text: str, function: str, arguments: tuple[Any, ...]) -> None:
    (search,) = parse_search([text])
    assert (search.field, search.function, search.arguments) == (text.split("=")[0], function, arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.lr", "must have the form optim.lr=loguniform(1e-5,1e-3)"),
        ("optim.lr=loguniforn(1,2)", "loguniforn is not known; did you mean loguniform?"),
        ("optim.lr=loguniform(1", "loguniform(1 is not an expression: give one of uniform(lower, upper)"),
        ("optim.lr=1e-3", "1e-3 is not one of the expressions known"),
        ("optim.lr=uniform(1)", "uniform takes 2 numbers: uniform(lower, upper)"),
        ("optim.lr=uniform(2,1)", "uniform goes from 2 to 1, which holds nothing"),
        ("optim.lr=loguniform(0,1)", "loguniform begins at 0, it must be above 0"),
        ("model.depth=randint(1,2.5)", "randint takes whole numbers, 2.5 is none"),
        ("optim.lr=uniform(1,high)", "uniform takes numbers, 'high' is none"),
        ("optim.lr=choice()", "choice() needs values to choose from"),
        ("optim.lr=choice(f(1))", "f(1) is neither a number, a text, nor a list of such"),
        ("optim.lr=__import__('os').system('true')", "is not one of the expressions known"),
        ("run.seed=choice(1,2)", "run.seed doesn't change what is computed, or names the run"),
    ],
)
def test_a_wrong_expression_is_named_with_its_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_search([text, "optim.eps=zebra(1)"])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"--search {text}: ")
    assert message in first
    assert second.startswith("--search optim.eps=zebra(1): zebra is not known")


def test_a_field_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"--search optim\.lr: given twice"):
        parse_search(["optim.lr=uniform(1,2)", "optim.lr=uniform(3,4)"])


def searched(*texts: str, seed: int = 0, count: int = 20) -> list[Trial]:
    pytest.importorskip("pandas", reason="Ray Tune needs it: the extra `tune`")
    return draw(get("quickstart").override(f"run.seed={seed}"), parse_search(texts), count)


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    texts = (
        "optim.lr=loguniform(1e-5,1e-3)",
        "optim.schedule=choice(cosine,linear)",
        "model.depth=randint(2,5)",
    )
    trials = searched(*texts)
    assert [t.changes for t in trials] == [t.changes for t in searched(*texts)]
    assert [t.changes[0] for t in trials] == [t.changes[0] for t in searched(texts[0])]
    assert [t.changes for t in trials] != [t.changes for t in searched(*texts, seed=1)]
    assert {t.config.optim.schedule for t in trials} == {"cosine", "linear"}
    assert {t.config.model.depth for t in trials} == {2, 3, 4}
    assert all(1e-5 <= t.config.optim.lr <= 1e-3 for t in trials)
    # of a log-uniform value half lie below the geometric mean; all on one side by chance once in 500,000
    assert 0 < sum(t.config.optim.lr < 1e-4 for t in trials) < 20


def test_a_drawn_value_that_makes_no_config_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)--search optim\.lr=choice\(-1\) drew optim\.lr=-1: .*greater than 0"
    ) as e:
        searched("optim.eps=choice(1e-8)", "optim.lr=choice(-1)")
    assert "optim.lr=-1" in str(e.value)
    with pytest.raises(ConfigError, match=r"optim\.lrr: no such field; did you mean lr\?"):
        searched("optim.lrr=choice(1)")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("unseen stile/caption/exact match", "no set is called 'unseen stile'; did you mean unseen style?"),
        ("unseen style/captoin/exact match", "no task is called 'captoin'; did you mean caption?"),
        ("unseen style/caption", "must have the form SET/TASK/METRIC"),
    ],
)
def test_a_metric_that_is_not_there(metric: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Measure.of(get("quickstart"), metric)
    assert message in str(caught.value)


def test_scores_are_read_from_a_runs_files(tmp_path: Path) -> None:
    lines = [{"step": 160, "epoch": 1.0, "loss": 2.0}, {"step": 320, "epoch": 2.0, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = [
        {"step": step, "set": "unseen style", "tasks": {"caption": {"exact match": {"value": step / 1000}}}}
        for step in (0, 320)
    ]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    loss = Measure.of(get("quickstart"), "loss")
    assert loss.curve(tmp_path) == [(25, 2.0), (50, math.inf)]
    assert Measure.of(get("quickstart").override("train.duration=8ep"), "loss").curve(tmp_path)[0] == (
        12,
        2.0,
    )
    score = Measure.of(get("quickstart"), "unseen style/caption/exact match")
    assert (score.mode, score.curve(tmp_path)) == ("max", [(50, 0.32)])
    with pytest.raises(ConfigError, match="is wall time"):
        Measure.of(
            get("quickstart").override(
                "train.duration=5m", "optim.schedule=constant", "optim.warmup=5", "train.save_every=9"
            ),
            "loss",
        )


def test_the_best_came_to_its_end(tmp_path: Path) -> None:
    config = get("quickstart")
    rows = [("stopped early", 0.5), ("done", 0.9), ("done", 0.7), ("failed", None)]
    trials = [
        Trial(number=i, changes=[f"optim.lr={i + 1}e-3"], config=config, state=state, score=score, error=None)
        for i, (state, score) in enumerate(rows)
    ]
    trials[3].error = "out of | memory\nmore"
    found = Found(folder=tmp_path, metric="loss", mode="min", trials=trials, best=trials[2])
    assert [trial.number for trial in found.ranked()] == [2, 1, 0, 3]
    table = found.to_markdown()
    assert "| trial-002 | 0.003 | 0.7000 | 0% | 0:00 | done |" in table
    assert "failed: out of \\| memory |" in table
    picture = draw_curves(
        found, {0: [(12, 0.5)], 1: [(12, 2.0), (100, 0.9)], 2: [(12, 3.0), (100, 0.7)], 3: []}
    )
    assert picture.size == (960, 540)
    assert {(0, 0, 0), (68, 119, 170)} <= {colour for _, colour in picture.getcolors(1 << 16)}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_search_of_real_runs(
    scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of three values is no learning rate to learn with; the search finds so, and its best config trains."""
    pytest.importorskip("pandas", reason="Ray Tune needs it: the extra `tune`")
    monkeypatch.chdir(tmp_path)
    config = run_config(
        scene_shards, "data.evals={}", "train.duration=12", "train.log_every=1", "run.name=search"
    )
    told: list[str] = []
    found = tune(
        config,
        ["optim.lr=choice(1e-3,1e-9)"],
        num_trials=3,
        parallel=2,
        on_event=lambda e: told.append(e["text"]),
    )
    folder = tmp_path / "runs" / "search"
    assert {trial.config.optim.lr for trial in found.trials} == {1e-3, 1e-9}, "else there is nothing to find"
    assert found.best.config.optim.lr == 1e-3
    assert found.best.state == "done"
    assert load_config(folder / "best.json") == found.best.config
    assert (folder / found.best.name / "report.json").is_file()
    assert found.best.name in (folder / "trials.md").read_text()
    assert Image.open(folder / "trials.png").size == (960, 540)
    assert any(text.startswith(f"{found.best.name} done: loss ") for text in told)
    with pytest.raises(ConfigError, match="holds this search, and it is done"):
        tune(config, ["optim.lr=choice(1e-3,1e-9)"], num_trials=3)
    with pytest.raises(ConfigError, match="holds another search"):
        tune(config, ["optim.lr=choice(1e-3,1e-9)"], num_trials=4)
    assert main(["train", str(folder / "best.json"), "run.name=again", "train.duration=2"]) == 0
