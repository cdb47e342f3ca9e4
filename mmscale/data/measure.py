"""Lengths of samples without decoding them: pixels, seconds, characters, tokens, for the index's columns.

    measurer = Measurer(("image", "text"), tokenizer="tokenizer.json")
    measurer.measure("jpg", len(body), lambda at, size: body[at : at + size])      # {"width": 640.0, "height": 480.0}

A field's kind is known from the last part of its name (`seg.png` is a picture). Pictures and sound are measured
by their headers, of which only the first bytes are read as a rule; texts are read in full. The trade-off: what
a header says may be wrong; whoever decodes the sample finds out.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from mmscale.errors import ConfigError

MEASURES = ("image", "audio", "text")
IMAGE_FIELDS = frozenset(
    ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif")
)
AUDIO_FIELDS = frozenset(("wav", "flac", "ogg", "oga", "opus", "mp3", "aif", "aiff", "au"))
TEXT_FIELDS = frozenset(("txt", "text", "transcript"))
CAPTIONS = ("caption", "captions", "text")  # what texts are called inside a member `json`
_HEAD = (
    64 * 1024
)  # bytes that hold nearly every picture's header, with a thumbnail and colour profile before it
_WHOLE = 4 << 20  # bodies of sound up to this many bytes are read at once

Read = Callable[[int, int], bytes]  # (offset inside the body, size) -> the bytes


def kind_of(field: str) -> str | None:
    """ "image", "audio" or "text" for a field that can be measured ("json": text), else None."""
    last = field.rpartition(".")[2]
    if last in IMAGE_FIELDS:
        return "image"
    if last in AUDIO_FIELDS:
        return "audio"
    return "text" if last in TEXT_FIELDS or last == "json" else None


def measure_of(column: str) -> str:
    """The measure that makes a column such as "jpg.width". Raises ConfigError for a name no measure makes."""
    kinds = {"width": "image", "height": "image", "seconds": "audio", "chars": "text", "tokens": "text"}
    kind = kinds.get(column.rpartition(".")[2])
    if kind is None or "." not in column:
        raise ConfigError(
            f"{column!r} is no measured column: they are named FIELD.width, FIELD.height, FIELD.seconds, "
            "FIELD.chars and FIELD.tokens, as in jpg.width"
        )
    return kind


class Measurer:
    """Measures bodies; `versions` says how, for the sidecar: another version measures anew.

    names: any of "image" (width and height in pixels), "audio" (seconds), "text" (characters; with `tokenizer`,
    a file of the `tokenizers` library, tokens as well). Of a `json` member its captions count, under
    `json.caption.chars` and the like; of a list of captions the longest.

    Raises ConfigError for an unknown name, a tokenizer without "text", or a file that is no tokenizer.
    """

    def __init__(self, names: Collection[str], *, tokenizer: str | Path | None = None) -> None:
        unknown = [name for name in names if name not in MEASURES]
        if unknown:
            raise ConfigError(f"measure: {', '.join(unknown)} not known; there are {', '.join(MEASURES)}")
        if tokenizer is not None and "text" not in names:
            raise ConfigError("a tokenizer counts tokens of texts: measure 'text' as well")
        self.names = frozenset(names)
        self.versions = dict.fromkeys(sorted(self.names), "1")
        self._tokenizer: Any = None
        if tokenizer is not None:
            self._tokenizer, digest = _load_tokenizer(Path(tokenizer))
            self.versions["text"] = f"1 {digest}"

    def missing(self, measured: Mapping[str, str]) -> list[str]:
        """Those of the names that an index with `Index.measured` lacks; tokens need the same tokenizer."""
        return [
            name
            for name, version in self.versions.items()
            if measured.get(name) != version
            and not (version == "1" and measured.get(name, "").startswith("1 "))
        ]

    def measure(self, field: str, size: int, read: Read) -> dict[str, float]:
        """{"width": 640.0, "height": 480.0} and the like; NaN what can't be measured; {} if it isn't to be.

        The names are added to the field's: "width" of `jpg` is the column "jpg.width". `read` gives bytes of the
        body, of `size` bytes in all; what it raises is passed on.
        """
        kind = kind_of(field)
        if kind not in self.names:
            return {}
        if kind == "image":
            width, height = _image_size(size, read)
            return {"width": width, "height": height}
        if kind == "audio":
            return {"seconds": _seconds(size, read)}
        body = read(0, size)
        if field.rpartition(".")[2] == "json":
            captions = _captions(body)
            if captions is None:
                return {"caption.chars": math.nan}
            return {
                f"{name}.{unit}": value
                for name, texts in captions.items()
                for unit, value in self._longest(texts).items()
            }
        try:
            return self._longest([body.decode()])
        except UnicodeDecodeError:
            return dict.fromkeys(self._longest([""]), math.nan)

    def _longest(self, texts: list[str]) -> dict[str, float]:
        lengths = {"chars": float(max(map(len, texts)))}
        if self._tokenizer is not None:
            try:
                lengths["tokens"] = float(max(len(self._tokenizer.encode(text).ids) for text in texts))
            except Exception:  # a tokenizer without a token for what it doesn't know
                lengths["tokens"] = math.nan
        return lengths


def _load_tokenizer(path: Path) -> tuple[Any, str]:
    from tokenizers import Tokenizer

    try:
        data = path.read_bytes()
        tokenizer = Tokenizer.from_str(data.decode())
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: can't be read: {error.strerror}") from None
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"tokenizer {path}: no file of the tokenizers library: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, hashlib.blake2b(data, digest_size=8).hexdigest()


def _captions(body: bytes) -> dict[str, list[str]] | None:
    """The texts of a JSON object by name; {} if it has none, None if it can't be read."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    found = {}
    for name in CAPTIONS if isinstance(value, dict) else ():
        texts = value.get(name)
        if isinstance(texts, str):
            texts = [texts]
        if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
            found[name] = texts
    return found


def _image_size(size: int, read: Read) -> tuple[float, float]:
    import simplejpeg
    from PIL import Image

    head = read(0, min(size, _HEAD))
    if head[:2] == b"\xff\xd8":
        try:
            height, width = simplejpeg.decode_jpeg_header(head)[:2]
            return float(width), float(height)
        except ValueError:
            pass  # its header is longer, or only Pillow knows it
    file = _Body(size, read, head)
    try:
        with Image.open(cast(BinaryIO, file)) as image:
            return float(image.width), float(image.height)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises whatever its plug-ins raise
        if file.error is not None:
            raise file.error from error
        return math.nan, math.nan


def _seconds(size: int, read: Read) -> float:
    import soundfile

    # Whole bodies where that's cheap: Ogg and MP3 keep their length at the end.
    file = _Body(size, read, read(0, size) if size <= _WHOLE else b"")
    try:
        info = soundfile.info(file)
        # a stream of unknown length says 2**63 - 1 frames
        return info.frames / info.samplerate if 0 < info.frames < 1 << 62 else math.nan
    except MemoryError:
        raise
    except Exception as error:
        if file.error is not None:
            raise file.error from error
        return math.nan


class _Body(io.RawIOBase):
    """A body as a file that reads only what is asked for; `error` keeps what reading raised, for C code hides it."""

    def __init__(self, size: int, read: Read, head: bytes) -> None:
        self.error: Exception | None = None
        self._size, self._read, self._head, self._at = size, read, head, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        if self._at + size <= len(self._head):
            data = self._head[self._at : self._at + size]
        else:
            try:
                data = self._read(self._at, size)
            except Exception as error:
                self.error = error
                raise
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
