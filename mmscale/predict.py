"""Asks a trained model about files and texts: what `mmscale predict` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmscale.errors import ConfigError, DataError
from mmscale.models import Model
from mmscale.tasks import TASKS


def predict(
    model: Model, task_name: str, *, images: Sequence[str], audios: Sequence[str], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """The task's answer for each input of its first field: {"input": ..., "answer": ...}.

    images and audios are files. A ranking's entries name the ranked input. Raises ConfigError where an input is
    missing, empty or not of the task's kind, DataError for a file that can't be read.
    """
    task = TASKS[task_name]()
    given = {"image": images, "audio": audios, "text": texts}
    kinds = [model.fields[name] for name in task.fields]
    wanted = kinds[:-1] if task.generates else kinds  # what a task generates isn't given to it
    surplus = [f"--{kind}" for kind, values in given.items() if values and kind not in wanted]
    missing = [f"--{kind}" for kind in wanted if not given[kind]]
    if surplus or missing:
        advice = [
            f"{verb} {' and '.join(names)}"
            for verb, names in (("leave out", surplus), ("give", missing))
            if names
        ]
        raise ConfigError(f"--task {task_name} reads {' and '.join(wanted)}: {', '.join(advice)}")
    batch = {}
    for name, kind in zip(task.fields, wanted, strict=False):
        modality = model.modality(name)
        batch[name] = modality.collate([_read(modality, kind, value) for value in given[kind]])
    answers = task.predict(model, batch)
    ranked = given[kinds[1]]
    lines = []
    for value, answer in zip(given[kinds[0]], answers, strict=True):
        if isinstance(answer, list):
            answer = [{"choice": ranked[entry.pop("index")], **entry} for entry in answer]
        lines.append({"input": value, "answer": answer})
    return lines


def _read(modality: Any, kind: str, value: str) -> Any:
    if kind == "text":
        try:
            tokens = modality.read(value.encode())
        except UnicodeError:  # bytes of the command line that aren't UTF-8
            raise ConfigError(f"--text {value!r} is not UTF-8") from None
        if not len(tokens):
            raise ConfigError(f"--text {value!r} is empty")
        return tokens
    try:
        return modality.read(Path(value).read_bytes())
    except OSError as error:
        raise DataError(f"{value} can't be read: {error.strerror}") from None
    except DataError as error:
        raise DataError(f"{value}: {error}") from None


def answer_lines(answers: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in answers:
        if isinstance(entry["answer"], list):
            lines.append(entry["input"])
            lines += [f"  {one['probability']:6.1%}  {one['choice']}" for one in entry["answer"]]
        else:
            lines.append(f"{entry['input']}: {entry['answer']}")
    return lines
