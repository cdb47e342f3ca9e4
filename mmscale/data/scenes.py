"""Drawn scenes: pictures of coloured shapes, captions in English and Chinese, and a melody that spells them.

    from mmscale.data.scenes import make_scenes
    info = make_scenes(Path("scenes"), num_samples=64)
    info.shards["train"], info.shards["test-style"], info.shards["test-concepts"]

Tests and machines without any other data use it: it needs no network and no licence, and 64 samples take
half a second. The layout is that of `mmscale.data.demo`, field for field. It shows that a training run
works; it says nothing of how well a model would do on real pictures and speech.

A concept is one shape ("red circle") or two with their relation ("red circle above blue square"). Each word
has a tone of its own, so the melody says what the caption says; "voices" are timbres. The styles are four
ways of drawing, one of which, and two voices, are met in the test splits only.
"""

import contextlib
import io
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageDraw

from mmscale.data.pack import DemoInfo, Plan, Render, build, find_built
from mmscale.errors import UserError

_VERSION = 1  # of what the generator makes; part of every request

SAMPLE_RATE = 16_000  # Hz, of every clip of the demo data
IMAGE_SIZE = 128  # pixels, of every picture of the demo data

_COLORS = {
    "red": ("红色", (220, 40, 40)),
    "green": ("绿色", (40, 160, 60)),
    "blue": ("蓝色", (40, 80, 220)),
    "yellow": ("黄色", (240, 200, 30)),
    "purple": ("紫色", (140, 60, 180)),
    "orange": ("橙色", (245, 130, 30)),
    "brown": ("棕色", (125, 80, 45)),
    "black": ("黑色", (30, 30, 30)),
}
_SHAPES = {
    "circle": "圆",
    "square": "正方形",
    "triangle": "三角形",
    "diamond": "菱形",
    "star": "星",
    "cross": "十字",
    "hexagon": "六边形",
    "ring": "圆环",
}
_RELATIONS = {"above": "在上，下面是", "left of": "在左，右边是"}
_STYLES = ("filled", "outlined", "striped", "dotted")
_VOICES = ("flute", "reed", "bell", "horn", "organ")
_TEST_STYLE = "dotted"
_TEST_VOICES = ("horn", "organ")

# strength of each harmonic
_HARMONICS = {
    "flute": (1.0, 0.1),
    "reed": (1.0, 0.0, 0.5, 0.0, 0.3, 0.0, 0.2),
    "bell": (1.0, 0.0, 0.0, 0.6, 0.0, 0.0, 0.4),
    "horn": (1.0, 0.7, 0.4, 0.2),
    "organ": (1.0, 0.8, 0.0, 0.6, 0.0, 0.0, 0.0, 0.5),
}
_TONES = {word: 220.0 * 2 ** (step / 12) for step, word in enumerate([*_COLORS, *_SHAPES, *_RELATIONS])}  # Hz


@dataclass(frozen=True)
class _Scene:
    """One record: a concept in a style, a voice and a language. `seed` draws position, size and tempo."""

    concept: int
    parts: tuple[str, ...]  # colour, shape[, relation, colour, shape]
    style: str
    voice: str
    lang: str
    seed: int


def make_scenes(
    out: str | Path,
    *,
    num_samples: int = 64,
    seed: int = 0,
    samples_per_shard: int = 500,
    workers: int = 1,
    progress: bool = False,
) -> DemoInfo:
    """Write drawn scenes to the folder `out`: splits `train`, `test-style`, `test-concepts`, and a tokenizer.

    Args:
        num_samples: samples in `train`, in three styles, so a third as many concepts. `test-style` has each
            of these concepts once, `test-concepts` a ninth as many others, three times each.
        seed: draws concepts, positions, voices and the samples' order. The same arguments, the same bytes.
        samples_per_shard: at most; shards of a split are evenly filled.
        workers: processes.

    Returns what lies in `out`; at once if a call with the same arguments made it before.

    Raises:
        UserError: `out` is a file or holds other files. DataError: the disk is full.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be 1 or more")
    out = Path(out)
    request = {
        "generator": "scenes",
        "version": _VERSION,
        "num_samples": num_samples,
        "seed": seed,
        "samples_per_shard": samples_per_shard,
    }
    return find_built(out, request) or build(
        out,
        scenes_plan(num_samples=num_samples, seed=seed),
        request,
        samples_per_shard=samples_per_shard,
        workers=workers,
        progress=progress,
    )


def scenes_plan(*, num_samples: int, seed: int) -> Plan:
    """The plan of `make_scenes`, for `mmscale.data.pack.build`."""
    parts = [
        *itertools.product(_COLORS, _SHAPES),
        *(
            (color, shape, relation, other_color, other_shape)
            for relation in _RELATIONS
            for color, shape, other_color, other_shape in itertools.product(
                _COLORS, _SHAPES, _COLORS, _SHAPES
            )
            if color != other_color and shape != other_shape
        ),
    ]
    num_train = -(-num_samples // 3)
    num_held_out = -(-num_train // 9)
    if num_train + num_held_out > len(parts):
        raise UserError(
            f"num_samples is {num_samples}; there are scenes for {3 * len(parts) * 9 // 10} at most"
        )
    draw = np.random.default_rng((seed, 0))
    # half of the concepts single shapes, while there are any: the easy ones make a short run show progress
    singles, pairs = draw.permutation(64), 64 + draw.permutation(len(parts) - 64)
    num_singles = min(64, (num_train + num_held_out + 1) // 2)
    concepts = [*singles[:num_singles], *pairs[: num_train + num_held_out - num_singles]]
    concepts = [int(concepts[place]) for place in draw.permutation(len(concepts))]

    def scene(concept: int, style: str, voices: tuple[str, ...]) -> _Scene:
        own = np.random.default_rng((seed, 1, concept, _STYLES.index(style)))
        return _Scene(
            concept=concept,
            parts=parts[concept],
            style=style,
            voice=voices[own.integers(len(voices))],
            lang="zh" if own.random() < 0.25 else "en",
            seed=int(own.integers(2**31)),
        )

    train_voices = tuple(voice for voice in _VOICES if voice not in _TEST_VOICES)
    train_styles = [style for style in _STYLES if style != _TEST_STYLE]
    seen, held_out = concepts[:num_train], concepts[num_train:]
    train = [scene(concept, style, train_voices) for concept in seen for style in train_styles][:num_samples]
    unheard = [scene(concept, style, _TEST_VOICES) for concept in held_out for style in train_styles]
    unseen = [scene(concept, _TEST_STYLE, _TEST_VOICES) for concept in seen]
    return Plan(
        source="scenes",
        details={"test_style": _TEST_STYLE, "test_voices": list(_TEST_VOICES), "styles": list(_STYLES)},
        splits={
            "train": [train[place] for place in draw.permutation(len(train))],
            "test-style": [unseen[place] for place in draw.permutation(len(unseen))],
            "test-concepts": [unheard[place] for place in draw.permutation(len(unheard))],
        },
        renderer=_renderer,
        texts=[text for scene in train for text in _captions(scene.parts)],
        licenses="# Licences\n\nmmscale generated all that lies here; no rights are reserved.\n",
        bytes_per_sample=20_000,
    )


@contextlib.contextmanager
def _renderer() -> Iterator[Render]:
    yield _render


def _render(scene: _Scene) -> tuple[str, Mapping[str, bytes]]:
    draw = np.random.default_rng(scene.seed)
    captions = _captions(scene.parts)
    name, name_zh = captions[0], captions[-1]
    facts = {
        "concept": scene.concept,
        "name": name,
        "name_zh": name_zh,
        "captions": captions,
        "spoken": name_zh if scene.lang == "zh" else name,
        "lang": scene.lang,
        "voice": scene.voice,
        "style": scene.style,
        "emoji": "",
    }
    fields = {
        "jpg": encode_jpeg(_draw(scene, draw)),
        "flac": encode_flac(_play(scene, draw)),
        "json": encode_facts(facts),
    }
    return f"{scene.concept:x}_{scene.style}", fields


def encode_jpeg(image: Image.Image) -> bytes:
    """A picture as the demo data's JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def encode_flac(wave: np.ndarray) -> bytes:
    """A clip, int16 samples at SAMPLE_RATE, as FLAC bytes."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def encode_facts(facts: Mapping[str, Any]) -> bytes:
    """A record's `json` field."""
    return json.dumps(facts, ensure_ascii=False).encode()


def _captions(parts: tuple[str, ...]) -> list[str]:
    """The name, other ways to say it, and last the Chinese one."""
    color, shape = parts[:2]
    name_zh = _COLORS[color][0] + _SHAPES[shape]
    if len(parts) == 2:
        return [f"{color} {shape}", f"a {shape} that is {color}", f"{shape}, {color}", name_zh]
    _, _, relation, other_color, other_shape = parts
    name = f"{color} {shape} {relation} {other_color} {other_shape}"
    other = f"{other_color} {other_shape}"
    inverse = {"above": "below", "left of": "right of"}[relation]
    return [
        name,
        f"{other} {inverse} {color} {shape}",
        f"{color} {shape}, {other}",
        name_zh + _RELATIONS[relation] + _COLORS[other_color][0] + _SHAPES[other_shape],
    ]


def _draw(scene: _Scene, draw: np.random.Generator) -> Image.Image:
    scale = 2  # drawn larger and reduced, since Pillow's shapes have no smooth edges
    size = IMAGE_SIZE * scale
    image = Image.new("RGB", (size, size), "white")
    parts = scene.parts
    shapes = [parts[:2]] if len(parts) == 2 else [parts[:2], parts[3:]]
    centers = {
        1: [(0.5, 0.5)],
        2: [(0.5, 0.27), (0.5, 0.73)] if "above" in parts else [(0.27, 0.5), (0.73, 0.5)],
    }
    for (color, shape), center in zip(shapes, centers[len(shapes)], strict=True):
        radius = draw.uniform(0.3, 0.4) * size / len(shapes) ** 0.75
        x, y = np.array(center) * size + draw.uniform(-0.05, 0.05, 2) * size
        mask = Image.new("L", (size, size), 0)
        _draw_shape(ImageDraw.Draw(mask), shape, float(x), float(y), float(radius))
        ink = np.asarray(mask) > 0
        rows, columns = np.indices(ink.shape)
        if scene.style == "outlined":
            inner = Image.new("L", (size, size), 0)
            _draw_shape(ImageDraw.Draw(inner), shape, float(x), float(y), float(radius) * 0.75)
            ink &= ~(np.asarray(inner) > 0)
        elif scene.style == "striped":
            ink &= (rows + columns) % 20 < 12
        elif scene.style == "dotted":
            ink &= (rows % 20 - 10) ** 2 + (columns % 20 - 10) ** 2 < 70
        image.paste(_COLORS[color][1], mask=Image.fromarray(ink))
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float) -> None:
    def polygon(corners: int, start: float, inner: float = 1.0) -> None:
        angles = [math.radians(start) + 2 * math.pi * corner / corners for corner in range(corners)]
        sizes = [radius * (inner if corner % 2 else 1.0) for corner in range(corners)]
        pen.polygon(
            [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, sizes, strict=True)], fill=255
        )

    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=255)
    elif shape == "ring":
        pen.ellipse(box, fill=255)
        hole = radius * 0.55
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif shape == "square":
        polygon(4, 45)
    elif shape == "diamond":
        pen.polygon(
            [(x, y - radius), (x + radius * 0.6, y), (x, y + radius), (x - radius * 0.6, y)], fill=255
        )
    elif shape == "triangle":
        polygon(3, -90)
    elif shape == "hexagon":
        polygon(6, 0)
    elif shape == "star":
        polygon(10, -90, inner=0.4)
    else:
        assert shape == "cross"
        arm = radius * 0.33
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)


def _play(scene: _Scene, draw: np.random.Generator) -> np.ndarray:
    """The melody, int16: one tone a word. Chinese plays the words backwards, to sound different."""
    words = scene.parts if scene.lang == "en" else scene.parts[::-1]
    length = int(SAMPLE_RATE * draw.uniform(0.12, 0.18))
    detune = 2 ** (draw.uniform(-0.2, 0.2) / 12)
    seconds = np.arange(length) / SAMPLE_RATE
    envelope = np.minimum(1.0, np.minimum(seconds, seconds[::-1]) / 0.01)
    tones = []
    for word in words:
        phase = 2 * np.pi * _TONES[word] * detune * seconds
        harmonics = enumerate(_HARMONICS[scene.voice], start=1)
        tone = sum(strength * np.sin(number * phase) for number, strength in harmonics)
        tones.append(envelope * tone / sum(_HARMONICS[scene.voice]))
    return np.rint(np.concatenate(tones) * 0.6 * 32767).astype(np.int16)
