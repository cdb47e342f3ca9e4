"""The report at the end of a run: report.md for people, report.json for scripts, report.png to look at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from mmscale.checkpoint import complete, load_model
from mmscale.config import Config
from mmscale.data import Field, ShardStream
from mmscale.data.decode import decode_image
from mmscale.metrics import clock_text
from mmscale.models import Model
from mmscale.runs import Run
from mmscale.tasks.base import Metric

THUMBNAIL = 128  # pixels a side
NUM_QUERIES, NUM_SHOWN = 6, 5


def write_report(run: Run, config: Config, report: dict[str, Any]) -> dict[str, Any]:
    """Writes the three files (rank 0 only) and returns the report with their paths; report.json, last, ends the run."""
    files = {"report": "report.md", "metrics": "metrics.jsonl", "checkpoints": "checkpoints"}
    picture = None
    model, _ = load_model(complete(run.checkpoints)[-1])
    if config.data.evals and "image_text" in config.tasks:
        picture = retrieval_picture(model, config, run.folder)
    if picture is not None:
        files["picture"] = "report.png"
    report = {**report, "files": {name: str(run.folder / path) for name, path in files.items()}}
    report["next"] = next_commands(run.folder, config)
    (run.folder / "report.md").write_text(to_markdown(report, config), encoding="utf-8")
    temporary = run.folder / "report.json.tmp"
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    temporary.rename(run.folder / "report.json")
    return report


def next_commands(folder: Path, config: Config) -> list[str]:
    commands = [f"tensorboard --logdir {folder}"]
    if config.data.evals:
        shards = next(iter(config.data.evals.values()))
        commands.append(f"mmscale eval {folder} --data {shards if isinstance(shards, str) else shards[0]}")
    if (folder / "example.jpg").is_file():
        commands.append(
            f"mmscale predict {folder} --task image_text --image {folder / 'example.jpg'} "
            "--text 'red apple' --text 'smiling face' --text house"
        )
    return commands


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows) for each evaluation set and task; the first row is the header."""
    steps = sorted({entry["step"] for entry in report["evaluations"]})
    found = {(e["step"], e["set"]): e["tasks"] for e in report["evaluations"]}
    names = list(dict.fromkeys(e["set"] for e in report["evaluations"]))
    out = []
    for name in names:
        last = found.get((steps[-1], name), {})
        first = found.get((steps[0], name), {}) if len(steps) > 1 else {}
        for task, metrics in last.items():
            before = first.get(task, {})
            candidates = metrics.get("candidates", {}).get("value")
            title = f"{name}: {task}" + (f", {candidates:.0f} candidates" if candidates else "")
            rows = [["", "before", "after", "chance"]]
            for metric, score in metrics.items():
                if metric != "candidates":
                    rows.append(
                        [metric]
                        + [_number(one.get("value")) for one in (before.get(metric, {}), score)]
                        + [_number(score["chance"])]
                    )
            out.append((title, rows))
    return out


def to_markdown(report: Mapping[str, Any], config: Config) -> str:
    rate = report["samples_per_s"]
    lines = [
        f"# {config.run.name}",
        "",
        f"{report['step']} steps, {report['samples']} samples in {clock_text(report['train_seconds'])} "
        f"({'?' if rate is None else f'{rate:.0f}'} samples/s) on {report['world_size']} "
        f"rank{'s' * (report['world_size'] > 1)}, {report['device']}.",
    ]
    if report["substituted_samples"]:
        counts = ", ".join(f"{number} {cause}" for cause, number in report["substituted_samples"].items())
        lines.append(f"Unreadable samples replaced by others: {counts}.")
    if report["steps_without_usable_samples"]:
        lines.append(f"Steps passed over for want of usable samples: {report['steps_without_usable_samples']}.")
    for title, rows in tables(report):
        lines += ["", f"## {title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in rows[:1]]
        lines += ["|" + " --- |" * len(rows[0])]
        lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    lines += ["", "## Files", ""]
    lines += [f"- {name}: `{path}`" for name, path in report["files"].items()]
    lines += ["", "## Next", ""] + [f"    {command}" for command in report["next"]]
    return "\n".join(lines) + "\n"


def to_json(results: Mapping[str, Mapping[str, Metric]]) -> str:
    return json.dumps({task: {k: m._asdict() for k, m in metrics.items()} for task, metrics in results.items()})


def to_text(results: Mapping[str, Mapping[str, Metric]]) -> str:
    """Metrics by task as aligned tables."""
    blocks = []
    for task, metrics in results.items():
        rows = [["", "value", "chance"], *([k, _number(m.value), _number(m.chance)] for k, m in metrics.items())]
        blocks.append(_aligned(task, rows))
    return "\n\n".join(blocks)


def report_text(report: Mapping[str, Any]) -> str:
    """The report for a terminal: the tables aligned, then where things are and what to try."""
    blocks = [_aligned(title, rows) for title, rows in tables(report)]
    rate = report["samples_per_s"]
    seconds = clock_text(report["train_seconds"])
    blocks.append(f"trained in {seconds}" + (f", {rate:.0f} samples/s" if rate else ""))
    blocks.append("\n".join(["files", *(f"  {path}" for path in report["files"].values())]))
    blocks.append("\n".join(["next", *(f"  {command}" for command in report["next"])]))
    return "\n\n".join(blocks)


def _aligned(title: str, rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    body = ["  ".join(_pad(cell, widths[i], i) for i, cell in enumerate(row)) for row in rows]
    return "\n".join([title, *("  " + line for line in body)])


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@torch.no_grad()
def retrieval_picture(model: Model, config: Config, folder: Path) -> Path | None:
    """Draws six texts with the five images each finds among the first evaluation set's, the right one framed.

    Only texts whose image is among the five are shown, spread evenly over those, and the picture says how many there
    are. None where no text finds its image. Writes example.jpg and, where there is sound, example.flac beside it.
    """
    title, shards = next(iter(config.data.evals.items()))
    images, texts, names, raw = _candidates(model, config, shards, folder)
    if len(raw) < NUM_SHOWN:
        return None
    similarity = texts @ images.T
    best = similarity.topk(NUM_SHOWN, dim=1).indices
    hits = (best == torch.arange(len(raw)).unsqueeze(1)).any(1).nonzero().squeeze(1).tolist()
    if not hits:
        return None
    chosen = [hits[i * len(hits) // min(NUM_QUERIES, len(hits))] for i in range(min(NUM_QUERIES, len(hits)))]
    caption = (
        f"{title}: {len(hits)} of {len(raw)} texts have their image among the five most similar "
        f"(by chance {NUM_SHOWN}). {len(chosen)} of those:"
    )
    rows = [(names[query], [(raw[j], j == query) for j in best[query].tolist()]) for query in chosen]
    _draw(caption, rows).save(folder / "report.png")
    return folder / "report.png"


def _candidates(
    model: Model, config: Config, shards: str | list[str], folder: Path
) -> tuple[torch.Tensor, torch.Tensor, list[str], list[bytes]]:
    """Embeddings of image and text, the text and the image's bytes, for each of a set's candidates."""
    sources = {name: config.data.fields[name].source for name in ("image", "text")}
    labels = [f.source for f in config.data.fields.values() if f.modality == "label"]
    fields = {
        "image": Field(sources["image"], read=bytes, required=False),
        "text": Field(sources["text"], read=bytes, required=False),
        "label": Field(labels[0] if labels else "-", read=int, required=False),
        "audio": Field("flac|wav", read=bytes, required=False),
    }
    size = config.evals.batch_size
    stream = ShardStream(shards, batch_size=size, remainder="pad", train=False, fields=fields)
    rows: list[tuple[bytes, bytes]] = []
    seen: set[int] = set()
    for batch in stream:
        for i in np.flatnonzero(batch.valid).tolist():
            image, text, label = (batch[name][i] for name in ("image", "text", "label"))
            if image is None or text is None or label in seen:
                continue
            if label is not None:
                seen.add(label)
            if not rows:
                (folder / "example.jpg").write_bytes(image)
                if batch["audio"][i] is not None:
                    (folder / "example.flac").write_bytes(batch["audio"][i])
            rows.append((image, text))
        if len(rows) >= config.evals.num_candidates:
            break
    stream.close()
    rows = rows[: config.evals.num_candidates]
    images, texts = [], []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        tensors = {
            "image": model.image.collate([model.image.read(image) for image, _ in part]),
            "text": model.text.collate([model.text.read(text) for _, text in part]),
        }
        images.append(model.represent("image", tensors))
        texts.append(model.represent("text", tensors))
    names = [text.decode() for _, text in rows]
    return torch.cat(images), torch.cat(texts), names, [image for image, _ in rows]


def _draw(caption: str, rows: Sequence[tuple[str, Sequence[tuple[bytes, bool]]]]) -> Pillow.Image:
    gap, left, top = 12, 240, 56
    cell = THUMBNAIL + gap
    sheet = Pillow.new("RGB", (left + NUM_SHOWN * cell + gap, top + len(rows) * cell + gap), "white")
    draw = ImageDraw.Draw(sheet)
    small, large = ImageFont.load_default(15), ImageFont.load_default(20)
    draw.text((gap, 18), caption, fill="#444444", font=small)
    for i, (text, found) in enumerate(rows):
        y = top + i * cell
        for line, words in enumerate(_wrap(text, draw, large, left - 2 * gap)):
            draw.text((gap, y + 34 + 26 * line), words, fill="black", font=large)
        for j, (data, right) in enumerate(found):
            x = left + j * cell
            picture = decode_image(data, THUMBNAIL).transpose(1, 2, 0)
            sheet.paste(Pillow.fromarray(picture), (x, y))
            box = (x - 4, y - 4, x + THUMBNAIL + 3, y + THUMBNAIL + 3)
            draw.rectangle(box, outline="#1a9850" if right else "#dddddd", width=4 if right else 1)
    return sheet


def _wrap(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:3]
