"""A look at what is in the shards: `mmscale data preview SHARDS --out preview`.

    report = preview("shards", "preview", count=24)
    report.page, report.sheet        # preview/index.html and preview/contact_sheet.png

Samples are drawn evenly over all shards, one at random from each of `count` equal parts, or are those whose key
holds `query`. The page is one file, with pictures and sound inside it, that shows any script the browser has a
font for; the contact sheet is a PNG for reports, whose font has fewer. What can't be decoded is shown in red, with
the cause. Texts and keys come from the shards: they are always shown as text, never read as HTML.
"""

import base64
import functools
import io
import json
import textwrap
import unicodedata
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmscale.data.check import Crash, Isolated, escaped, examine, is_known, open_reader
from mmscale.data.decode import PICKLES
from mmscale.data.index import shown
from mmscale.data.manifest import Manifest, Urls, open_manifest
from mmscale.data.measure import AUDIO_FIELDS, CAPTIONS, IMAGE_FIELDS, TEXT_FIELDS
from mmscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mmscale.data.storage import Storage

PICTURE_SIZE = 480  # px, the longer side of a picture in the page
MAX_SOUND_BYTES = 1 << 20  # a longer sound is cut and written anew
MAX_SOUND_S = 15.0
MAX_TEXT = 2000  # characters of one text that are shown
MAX_BODY = 64 << 20
_PLAYED = {"wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg", "oga": "audio/ogg", "opus": "audio/ogg",
           "mp3": "audio/mpeg"}  # fmt: skip


@dataclass
class Shown:
    """One field of a sample as it is shown. kind: "picture", "sound", "text", "other" or "fault"."""

    name: str
    kind: str
    num_bytes: int
    detail: str = ""  # size in pixels, seconds, or what is wrong
    text: str = ""
    caption: str = ""  # of a JSON object: its captions alone, which is what the contact sheet has room for
    picture: bytes = b""  # of a picture: PNG or JPEG; of a sound: its waveform and log-mel spectrogram
    sound: bytes = b""
    mime: str = ""

    @property
    def picture_uri(self) -> str:
        form = "jpeg" if self.picture[:2] == b"\xff\xd8" else "png"
        return data_uri(self.picture, f"image/{form}")

    @property
    def sound_uri(self) -> str:
        return data_uri(self.sound, self.mime)


@dataclass
class Sample:
    shard: str
    key: str
    fields: list[Shown] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass
class PreviewReport:
    page: str
    sheet: str
    num_samples: int
    num_shown: int
    num_faults: int
    keys: list[str]


def preview(
    urls: Urls,
    out: str | Path,
    *,
    count: int = 24,
    seed: int = 0,
    query: str | None = None,
    storage: "Storage | None" = None,
) -> PreviewReport:
    """Write `out`/index.html and `out`/contact_sheet.png.

    Raises ConfigError for a count below 1, DataError if no key holds `query`.
    """
    if count < 1:
        raise ConfigError(f"--count must be at least 1, got {count}")
    manifest = open_manifest(urls, storage=storage)
    places = draw(manifest, count, seed) if query is None else _find(manifest, query, count)
    modalities = _modalities(manifest.fields)
    isolated = Isolated()
    try:
        samples = [
            load_sample(manifest, shard, number, isolated, storage=storage, modalities=modalities)
            for shard, number in places
        ]
    finally:
        isolated.close()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sheet, substituted = contact_sheet(samples)
    report = PreviewReport(
        page=str(out / "index.html"),
        sheet=str(out / "contact_sheet.png"),
        num_samples=manifest.num_samples,
        num_shown=len(samples),
        num_faults=sum(item.kind == "fault" for sample in samples for item in sample.fields),
        keys=[f"{Path(sample.shard).name.removesuffix('.tar')}/{sample.key}" for sample in samples],
    )
    sheet.save(report.sheet, optimize=True)
    how = f'keys that hold "{query}"' if query is not None else f"drawn evenly, seed {seed}"
    page = render(
        "preview.html.j2",
        samples=samples,
        title=f"{len(samples)} of {manifest.num_samples:,} samples",
        about=f"{manifest.describe()}; {how}",
        substituted=substituted,
    )
    Path(report.page).write_text(page, encoding="utf-8", errors="replace")
    return report


def draw(manifest: Manifest, count: int, seed: int) -> list[tuple[int, int]]:
    """(shard, number in it) of `count` samples, one at random out of each of `count` equal parts of all."""
    count = min(count, manifest.num_samples)
    edges = np.arange(count + 1) * manifest.num_samples // count
    samples = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
    shards, numbers = manifest.locate(samples)
    return list(zip(shards.tolist(), numbers.tolist(), strict=True))


def _find(manifest: Manifest, query: str, count: int) -> list[tuple[int, int]]:
    """Samples whose key is `query`; if there is none, whose "shard/key" holds it."""
    exact: list[tuple[int, int]] = []
    within: list[tuple[int, int]] = []
    for shard in range(manifest.num_shards):
        for number, key in enumerate(manifest.index(shard).keys):
            if key == query:
                exact.append((shard, number))
            elif len(within) < count and query in f"{manifest.stem(shard)}/{key}":
                within.append((shard, number))
        if len(exact) >= count:
            break
    if not exact and not within:
        raise DataError(f"no key of {manifest.describe()} holds {query!r}")
    return (exact or within)[:count]


def _modalities(fields: list[str]) -> dict[str, list[str]]:
    """{"picture": ["jpg", "png"], ...}: what the shards hold, to say what a sample lacks."""
    found: dict[str, list[str]] = {}
    for name in fields:
        kind = kind_of(name)
        if kind != "other":
            found.setdefault(kind, []).append(name)
    return found


def kind_of(name: str) -> str:
    last = name.rpartition(".")[2]
    if last in IMAGE_FIELDS:
        return "picture"
    if last in AUDIO_FIELDS:
        return "sound"
    return "text" if last in TEXT_FIELDS or last in ("json", "cls") else "other"


def load_sample(
    manifest: Manifest,
    shard: int,
    number: int,
    isolated: Isolated,
    *,
    storage: "Storage | None" = None,
    modalities: dict[str, list[str]] | None = None,
) -> Sample:
    """Read and decode one sample for showing; decoders run in `isolated`'s child."""
    index = manifest.index(shard)
    sample = Sample(shown(manifest.urls(shard)), index.key(number))
    record = index.record(number)
    with open_reader(manifest.urls(shard), storage) as (reader, _):
        for name, (offset, size) in record.items():
            kind = kind_of(name)
            if name.rpartition(".")[2] in PICKLES:
                item = Shown(name, "fault", size, "refused: a pickle is never read")
            elif size == 0:
                item = Shown(name, "fault", size, "empty: a member without bytes")
            elif kind == "other" and not is_known(name):
                item = Shown(name, "other", size)
            elif size > MAX_BODY:
                item = Shown(name, "fault", size, f"too large to be shown: {size:,} bytes")
            else:
                item = isolated.call(show, name, reader.read(offset, size))
                if isinstance(item, Crash):
                    item = Shown(name, "fault", size, f"{item.cause}: {item.detail}")
            sample.fields.append(item)
    order = ["picture", "fault", "sound", "text", "other"]
    sample.fields.sort(key=lambda item: order.index(item.kind))
    for kind, names in (modalities or {}).items():
        if not any(name in record for name in names):
            sample.missing.append(f"no {kind} ({', '.join(names)})")
    return sample


def show(name: str, body: bytes) -> Shown:
    """One member's bytes as they are shown. Never raises for bad bytes: it is a "fault" with the cause."""
    kind = kind_of(name)
    wrong = examine(name, body)
    item = Shown(name, kind, len(body))
    try:
        if wrong is not None and kind not in ("picture", "sound"):
            item.text = body[: 4 * MAX_TEXT].decode("utf-8", "replace")[:MAX_TEXT]
        elif wrong is None and kind == "picture":
            item.picture, item.detail = thumbnail(body, PICTURE_SIZE)
        elif wrong is None and kind == "sound":
            _show_sound(name, body, item)
        elif wrong is None and kind == "text":
            item.text, item.caption = _text_of(name, body)
    except Exception as error:  # whatever examine lets through and drawing doesn't like
        wrong = ("undecodable", f"{type(error).__name__}: {error}"[:200])
    if wrong is not None:
        item.kind, item.detail = "fault", f"{wrong[0]}: {wrong[1]}"
    return item


def thumbnail(body: bytes, size: int) -> tuple[bytes, str]:
    """(JPEG, or PNG if it has transparency, of at most size x size px; "640 x 480 JPEG")."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(body)) as image:
            detail = f"{image.width} x {image.height} px, {image.format}"
            clear = image.has_transparency_data
            image.draft("RGB", (size, size))
            small: Image.Image = image.convert("RGBA" if clear else "RGB")
    small.thumbnail((size, size))
    file = io.BytesIO()
    if clear:
        small.save(file, "PNG")
    else:
        small.save(file, "JPEG", quality=88)
    return file.getvalue(), detail


def _show_sound(name: str, body: bytes, item: Shown) -> None:
    import soundfile

    with soundfile.SoundFile(io.BytesIO(body)) as file:
        rate, channels = file.samplerate, file.channels
        seconds = file.frames / rate
        wave = file.read(int(MAX_SOUND_S * rate), dtype="float32", always_2d=True).mean(axis=1)
    cut = len(wave) < seconds * rate - 1
    item.detail = f"{seconds:.2f} s, {rate:,} Hz" + (f", {channels} channels" if channels > 1 else "")
    if cut:
        item.detail += f"; the first {MAX_SOUND_S:g} s"
    last = name.rpartition(".")[2]
    if len(body) <= MAX_SOUND_BYTES and last in _PLAYED:
        item.sound, item.mime = body, _PLAYED[last]
    else:
        step = max(1, rate // 16000)
        encoded = io.BytesIO()
        soundfile.write(encoded, wave[::step], rate // step, format="WAV", subtype="PCM_16")
        item.sound, item.mime = encoded.getvalue(), "audio/wav"
    file_ = io.BytesIO()
    draw_sound(wave, rate).save(file_, "PNG")
    item.picture = file_.getvalue()


def _text_of(name: str, body: bytes) -> tuple[str, str]:
    text, caption = body.decode(), ""
    if name.rpartition(".")[2] == "json":
        value = json.loads(text)
        if isinstance(value, dict):
            # what captions are called comes first
            value = dict(sorted(value.items(), key=lambda pair: pair[0] not in CAPTIONS))
            caption = " · ".join(_plain(value[name]) for name in CAPTIONS if value.get(name))[:MAX_TEXT]
            text = "\n".join(f"{key}: {_plain(entry)}" for key, entry in value.items())
        else:
            text = _plain(value)
    return (text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text):,} characters)"), caption


def _plain(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return " · ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_COLOURS = np.array([[13, 8, 50], [80, 18, 123], [182, 54, 121], [251, 136, 97], [252, 253, 191]], np.float32)


def draw_sound(wave: np.ndarray, rate: int, *, width: int = 440) -> Image.Image:
    """(num_samples,) float32 -> a picture: the waveform's extremes above, the log-mel spectrogram below."""
    from mmscale.data.decode import log_mel

    wave = np.nan_to_num(wave)
    high, low = 44, 80
    picture = Image.new("RGB", (width, high + low), (24, 26, 32))
    pen = ImageDraw.Draw(picture)
    edges = np.linspace(0, len(wave), width + 1).astype(int)
    peak = float(np.abs(wave).max()) or 1.0
    for x in range(width):
        part = wave[edges[x] : max(edges[x] + 1, edges[x + 1])]
        if len(part):
            top, bottom = float(part.max()) / peak, float(part.min()) / peak
            middle = high / 2
            pen.line(
                (x, middle - top * (middle - 2), x, middle - bottom * (middle - 2)), fill=(120, 190, 255)
            )
    mel = log_mel(np.ascontiguousarray(wave), sample_rate=rate).T[::-1]  # (80, frames), low tones below
    values = np.clip((mel - mel.max() + 2.0) / 2.0, 0, 1) * (len(_COLOURS) - 1)
    lower = np.minimum(values.astype(int), len(_COLOURS) - 2)
    share = (values - lower)[..., None]
    colours = _COLOURS[lower] * (1 - share) + _COLOURS[lower + 1] * share
    picture.paste(
        Image.fromarray(colours.astype(np.uint8)).resize((width, low), Image.Resampling.BILINEAR), (0, high)
    )
    return picture


# --- the contact sheet ---

_CELL, _PICTURE, _SOUND, _LINE, _GAP = 264, 200, 74, 17, 12
_INK, _PALE, _RED = (28, 30, 36), (112, 118, 130), (200, 30, 40)


def contact_sheet(samples: list[Sample]) -> tuple[Image.Image, bool]:
    """(the sheet, whether it has words in place of letters that its font lacks)."""
    columns = min(6, max(1, round(len(samples) ** 0.5 * 1.2)))
    num_lines = 6
    with_picture = any(kind_of(item.name) == "picture" for sample in samples for item in sample.fields)
    with_sound = any(kind_of(item.name) == "sound" for sample in samples for item in sample.fields)
    cell_height = (
        (_PICTURE + 6 if with_picture else 0) + (_SOUND + 6 if with_sound else 0) + num_lines * _LINE + 16
    )
    rows = -(-len(samples) // columns)
    sheet = Image.new(
        "RGB",
        (columns * (_CELL + _GAP) + _GAP, rows * (cell_height + _GAP) + _GAP),
        (236, 238, 242),
    )
    pen = ImageDraw.Draw(sheet)
    font = _font(13)
    substituted = False
    for number, sample in enumerate(samples):
        left = _GAP + number % columns * (_CELL + _GAP)
        top = _GAP + number // columns * (cell_height + _GAP)
        pen.rounded_rectangle((left, top, left + _CELL, top + cell_height), 8, fill="white")
        x, y = left + 8, top + 8
        inner = _CELL - 16
        if with_picture:
            _place(sheet, pen, sample, "picture", (x, y, inner, _PICTURE), font)
            y += _PICTURE + 6
        if with_sound:
            _place(sheet, pen, sample, "sound", (x, y, inner, _SOUND), font)
            y += _SOUND + 6
        lines: list[tuple[str, tuple[int, int, int]]] = [
            (line, _PALE) for line in _wrap(sample.key, font, inner, 1)
        ]
        for item in sample.fields:
            if item.kind == "fault" and kind_of(item.name) not in ("picture", "sound"):
                lines += [(line, _RED) for line in _wrap(f"{item.name}: {item.detail}", font, inner, 2)]
        texts = [item for item in sample.fields if item.kind == "text"]
        for item in texts:
            words, changed = _drawable(item.caption or item.text, font)
            substituted = substituted or changed
            lines += [(line, _INK) for line in _wrap(words, font, inner, num_lines - len(lines))]
        if not texts:
            lines += [(line, _PALE) for line in sample.missing if line.startswith("no text")]
        for line, colour in lines[:num_lines]:
            pen.text((x, y), line, font=font, fill=colour)
            y += _LINE
    return sheet, substituted


def _place(
    sheet: Image.Image, pen: Any, sample: Sample, kind: str, box: tuple[int, int, int, int], font: Any
) -> None:
    x, y, width, height = box
    items = [item for item in sample.fields if kind_of(item.name) == kind]
    good = next((item for item in items if item.picture), None)
    if good is not None:
        with Image.open(io.BytesIO(good.picture)) as image:
            if kind == "sound":
                picture: Image.Image = image.convert("RGB").resize((width, height))
            else:
                colours = image.convert("RGBA")
                scale = min(width / colours.width, height / colours.height, 4)
                size = (max(1, round(colours.width * scale)), max(1, round(colours.height * scale)))
                colours = colours.resize(size, Image.Resampling.LANCZOS)
                picture = Image.new("RGB", size, "white")
                picture.paste(colours, mask=colours.getchannel("A"))
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        return
    fault = next((item for item in items if item.kind == "fault"), None)
    colour = _RED if fault else _PALE
    words = f"{fault.name}: {fault.detail}" if fault else f"no {kind}"
    pen.rectangle(
        (x, y, x + width - 1, y + height - 1),
        outline=colour,
        fill=(253, 240, 240) if fault else (246, 247, 249),
    )
    for number, line in enumerate(_wrap(words, font, width - 16, max(1, (height - 12) // _LINE))):
        pen.text((x + 8, y + 6 + number * _LINE), line, font=font, fill=colour)


@functools.lru_cache(maxsize=4)
def _font(size: int) -> Any:
    try:
        import matplotlib

        place = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
        # Basic layout: the other one raises on some texts. The page shapes Arabic and Indic scripts, this doesn't.
        return ImageFont.truetype(place, size, layout_engine=ImageFont.Layout.BASIC)
    except (ImportError, OSError):
        return ImageFont.load_default(size)  # Latin only


@functools.lru_cache(maxsize=1 << 16)
def _has_glyph(font: Any, letter: str) -> bool:
    """Whether the font draws `letter` as anything but its box for what it doesn't have."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010fffd"))


def _drawable(text: str, font: Any) -> tuple[str, bool]:
    """Runs of letters that the font lacks become words, such as ‹4 CJK›; and whether there were any."""
    done: list[str] = []
    run: list[str] = []

    def end_run() -> None:
        if run:
            script = unicodedata.name(run[0], "UNKNOWN").split()[0]
            names = {"CJK": "CJK", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}
            if unicodedata.category(run[0]) in ("So", "Sk", "Cn", "Co"):
                script = "sign" if len(run) == 1 else "signs"
            done.append(
                f"‹{len(run)} {names.get(script, script.capitalize() if script.isupper() else script)}›"
            )
            run.clear()

    changed = False
    for letter in text:
        if letter in "\u200d\ufe0e\ufe0f":  # joiners of emoji are nothing by themselves
            continue
        if not letter.isprintable() and not letter.isspace():
            end_run()
            done.append(escaped(letter))
        elif _has_glyph(font, letter):
            end_run()
            done.append(letter)
        else:
            run.append(letter)
            changed = True
    end_run()
    return "".join(done), changed


def _wrap(text: str, font: Any, width: int, num_lines: int) -> list[str]:
    """`text` in at most `num_lines` lines of `width` px; the last ends with an ellipsis if there is more."""
    if num_lines < 1:
        return []
    text = escaped(" ".join(text.split()))
    words: list[str] = []
    for word in textwrap.wrap(text, 10_000, break_long_words=True) and text.split(" "):
        while font.getlength(word) > width:
            count = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            words.append(word[:count])
            word = word[count:]
            if not word or len(words) > 40 * num_lines:
                break
        words.append(word)
    lines = [""]
    for place, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) < num_lines:
            lines.append(word)
        else:
            while lines[-1] and font.getlength(lines[-1] + "…") > width:
                lines[-1] = lines[-1][:-1]
            lines[-1] += "…"
            break
        del place
    return [line for line in lines if line]


# --- pages ---


def data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def render(template: str, **values: Any) -> str:
    """A page from this package's templates; everything put into it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmscale.data", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["escaped"] = escaped
    return environment.get_template(template).render(**values)
