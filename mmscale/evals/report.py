"""The report at the end of a run: report.md for people, report.json for scripts, report.png to look at."""

from __future__ import annotations

import json
import shlex
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
from mmscale.metrics import Writer, write_whole
from mmscale.models import Model
from mmscale.progress import clock_text
from mmscale.runs import Run
from mmscale.tasks.base import Metric

PICTURES = (".jpg", ".png", ".gif", ".webp")
THUMBNAIL = 128  # pixels a side
NUM_QUERIES, NUM_SHOWN = 6, 5


def write_report(run: Run, config: Config, report: dict[str, Any], *, writer: Writer) -> dict[str, Any]:
    """Writes the three files (rank 0 only) and returns the report with their paths; report.json, last, ends the run.

    The picture goes to TensorBoard too.
    """
    files = {"report": "report.md", "metrics": "metrics.jsonl", "checkpoints": "checkpoints"}
    picture = None
    model, _ = load_model(complete(run.checkpoints)[-1])
    if config.data.evals and config.tasks.get("image_text"):
        picture = retrieval_picture(model, config, run.folder)
    if picture is not None:
        files["picture"] = "report.png"
        writer.image("retrieval", np.asarray(Pillow.open(picture).convert("RGB")), report["step"])
    report = {**report, "files": {name: str(run.folder / path) for name, path in files.items()}}
    report["next"] = next_commands(run.folder, config)
    (run.folder / "report.md").write_text(to_markdown(report, config), encoding="utf-8")
    write_whole(run.folder / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def next_commands(folder: Path, config: Config) -> list[str]:
    """What to try next, as a shell takes it."""
    commands = [["tensorboard", "--logdir", str(folder)]]
    if config.data.evals:
        shards = next(iter(config.data.evals.values()))
        commands.append(
            ["mmscale", "eval", str(folder), "--data", shards if isinstance(shards, str) else shards[0]]
        )
    for example in (path for path in folder.glob("example.*") if path.suffix in PICTURES):
        texts = [part for text in ("red apple", "smiling face", "house") for part in ("--text", text)]
        commands.append(
            ["mmscale", "predict", str(folder), "--task", "image_text", "--image", str(example), *texts]
        )
    return [shlex.join(command) for command in commands]


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
        lines.append(
            f"Steps passed over for want of usable samples: {report['steps_without_usable_samples']}."
        )
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
    return json.dumps(
        {task: {k: m._asdict() for k, m in metrics.items()} for task, metrics in results.items()}
    )


def to_text(results: Mapping[str, Mapping[str, Metric]]) -> str:
    """Metrics by task as aligned tables."""
    blocks = []
    for task, metrics in results.items():
        rows = [
            ["", "value", "chance"],
            *([k, _number(m.value), _number(m.chance)] for k, m in metrics.items()),
        ]
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
    body = ["  ".join(_pad(cell, widths[i], i) for i, cell in enumerate(row)).rstrip() for row in rows]
    return "\n".join([title, *("  " + line for line in body)])


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


@torch.no_grad()
def retrieval_picture(model: Model, config: Config, folder: Path) -> Path | None:
    """Draws six texts with the five images each finds among the first evaluation set's, the right one framed.

    Only texts whose image is among the five are shown, spread evenly over those, and the picture says how many there
    are. None where no text finds its image. Writes one sample's image and sound as example.jpg and .flac.
    """
    title, shards = next(iter(config.data.evals.items()))
    rows = _candidates(model, config, shards, folder)
    if len(rows) < NUM_SHOWN:
        return None
    images, texts = _embeddings(model, rows, batch_size=config.evals.batch_size)
    similarity = texts @ images.T
    best = similarity.topk(NUM_SHOWN, dim=1).indices
    hits = (best == torch.arange(len(rows)).unsqueeze(1)).any(1).nonzero().squeeze(1).tolist()
    if not hits:
        return None
    chosen = [hits[i * len(hits) // min(NUM_QUERIES, len(hits))] for i in range(min(NUM_QUERIES, len(hits)))]
    caption = (
        f"{title}: {len(hits)} of {len(rows)} texts have their image among the five most similar "
        f"(by chance {NUM_SHOWN}). {len(chosen)} of those:"
    )
    found = [
        (rows[query][1].decode(), [(rows[j][0], j == query) for j in best[query].tolist()])
        for query in chosen
    ]
    _draw(caption, found).save(folder / "report.png")
    return folder / "report.png"


def _candidates(
    model: Model, config: Config, shards: str | list[str], folder: Path
) -> list[tuple[bytes, bytes, np.ndarray, np.ndarray]]:
    """The image's and the text's bytes, and what the model reads from them, of each candidate of a set."""
    sources = {name: config.data.fields[name].source for name in ("image", "text")}
    labels = [f.source for f in config.data.fields.values() if f.modality == "label"]
    sounds = [f.source for f in config.data.fields.values() if f.modality == "audio"]
    fields = {
        "image": Field(sources["image"], read=lambda data: (data, model.image.read(data)), required=False),
        "text": Field(sources["text"], read=lambda data: (data, model.text.read(data)), required=False),
        "label": Field(
            labels[0] if labels else "-", read=lambda data: int(model.label.read(data)), required=False
        ),
        "audio": Field(sounds[0] if sounds else "-", read=bytes, required=False),
    }
    stream = ShardStream(
        shards,
        batch_size=config.evals.batch_size,
        remainder="pad",
        train=False,
        fields=fields,
        on_error=config.data.on_error,
        error_budget=config.data.error_budget,
    )
    rows: list[tuple[bytes, bytes, np.ndarray, np.ndarray]] = []
    seen: set[int] = set()
    for batch in stream:
        for i in np.flatnonzero(batch.valid).tolist():
            image, text, label, audio = (batch[name][i] for name in fields)
            if image is None or text is None or label in seen:
                continue
            if label is not None:
                seen.add(label)
            if not rows:
                (folder / f"example.{_suffix(image[0])}").write_bytes(image[0])
                if audio is not None:
                    (folder / f"example.{_suffix(audio)}").write_bytes(audio)
            rows.append((image[0], text[0], image[1], text[1]))
        if len(rows) >= config.evals.num_candidates:
            break
    stream.close()
    return rows[: config.evals.num_candidates]


def _suffix(data: bytes) -> str:
    """A file name's ending for a picture or a sound, from its first bytes."""
    endings = {b"\xff\xd8": "jpg", b"\x89P": "png", b"GI": "gif", b"fL": "flac", b"Og": "ogg"}
    if data[:2] == b"RI":
        return "webp" if data[8:12] == b"WEBP" else "wav"
    return endings.get(data[:2], "bin")


def _embeddings(
    model: Model, rows: Sequence[tuple[bytes, bytes, np.ndarray, np.ndarray]], *, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of images and of texts, (rows, embed_dim) each."""
    images, texts = [], []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        tensors = {
            "image": model.image.collate([image for _, _, image, _ in part]),
            "text": model.text.collate([text for _, _, _, text in part]),
        }
        images.append(model.represent("image", tensors))
        texts.append(model.represent("text", tensors))
    return torch.cat(images), torch.cat(texts)


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
