"""A schema in one line: which members of a sample become which fields, decoded by their kinds.

    schema("image: jpg|png|webp, text: txt|json.caption, audio?: wav|flac|ogg")
    schema({"image": "jpg|png|webp", "text": "txt|json.caption"})

gives `ShardStream(fields=...)` its dict of `Field`s. What a member is follows from its extension. A "?" after a
name makes the field optional: its value is None where a sample lacks it, and collating it (`batch.stack_arrays`,
`batch.pad_sequences`) gives length 0, which is the presence mask. For anything unusual write a `Field` by hand.
"""

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mmscale.data.decode import (
    PICKLES,
    decode_audio,
    decode_image,
    decode_int,
    decode_json,
    decode_npy,
    decode_npz,
    decode_text,
    log_mel,
)
from mmscale.errors import DataError

if TYPE_CHECKING:
    from mmscale.data.stream import Field

KINDS: dict[str, tuple[str, ...]] = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2"),
    "audio": ("wav", "flac", "ogg", "mp3", "opus", "aiff", "au"),
    "text": ("txt", "caption"),
    "json": ("json",),
    "int": ("cls", "index"),
    "array": ("npy",),
    "arrays": ("npz",),
}
_KIND = {extension: kind for kind, extensions in KINDS.items() for extension in extensions}


def kind_of(source: str) -> str:
    """The kind of one alternative, by its extension: "seg.png" is an image, "json.caption" a text.

    ValueError for extensions that aren't known, with the nearest that is, and for pickles.
    """
    parts = source.lower().split(".")
    if "json" in parts[:-1]:
        return "text"
    extension = parts[-1]
    if extension in PICKLES:
        raise ValueError(f"{source!r} may hold a pickle, which runs code when it is loaded; use npy")
    if extension not in _KIND:
        near = difflib.get_close_matches(extension, _KIND, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_KIND)}"
        raise ValueError(f"{source!r}: {extension!r} is not a kind of data that is known; {hint}")
    return _KIND[extension]


def schema(
    spec: str | Mapping[str, str],
    *,
    image_size: int = 224,
    sample_rate: int = 16000,
    num_mels: int = 0,
) -> dict[str, "Field"]:
    """Fields by name, from "name: ext|ext, name?: ext" or {"name": "ext|ext", "name?": "ext"}.

    Values: images (3, image_size, image_size) uint8; sound (num_samples,) float32 at `sample_rate` Hz, or with
    `num_mels` > 0 its log-mel spectrogram (frames, num_mels) float32; txt and json.path strings; json what it
    holds; cls an int64; npy an array; npz a dict of arrays.
    Raises ValueError, naming what is wrong, for unknown extensions, pickles, names given twice, fields without
    alternatives or with alternatives of different kinds.
    """
    from mmscale.data.stream import Field  # the stream imports much

    readers: dict[str, Callable[[bytes], Any]] = {
        "image": partial(decode_image, size=image_size),
        "audio": partial(decode_audio, sample_rate=sample_rate),
        "text": decode_text,
        "json": decode_json,
        "int": decode_int,
        "array": decode_npy,
        "arrays": decode_npz,
    }
    if num_mels:
        readers["audio"] = partial(_read_mel, sample_rate=sample_rate, num_mels=num_mels)
    fields: dict[str, Field] = {}
    for name, (alternatives, required) in parse(spec).items():
        kinds = {kind_of(alternative): alternative for alternative in alternatives}
        if len(kinds) > 1:
            told = ", ".join(f"{source} ({kind})" for kind, source in kinds.items())
            raise ValueError(f"field {name!r}: its alternatives must be of one kind, got {told}")
        kind = next(iter(kinds))
        fields[name] = Field(
            "|".join(alternatives),
            readers[kind],
            required=required,
            shape=(3, image_size, image_size) if kind == "image" else None,
        )
    return fields


def _read_mel(data: bytes, *, sample_rate: int, num_mels: int) -> np.ndarray:
    return log_mel(decode_audio(data, sample_rate), sample_rate=sample_rate, num_mels=num_mels)


def parse(spec: str | Mapping[str, str]) -> dict[str, tuple[list[str], bool]]:
    """name -> (alternatives, required), of either form of a schema; ValueError as `schema`."""
    if isinstance(spec, str):
        entries = []
        for entry in spec.split(","):
            name, colon, sources = entry.partition(":")
            if not colon:
                raise ValueError(f"schema: {entry.strip()!r} must be of the form 'name: ext|ext'")
            entries.append((name, sources))
    else:
        entries = list(spec.items())
    if not entries:
        raise ValueError("schema: there are no fields in it")
    found: dict[str, tuple[list[str], bool]] = {}
    for given, sources in entries:
        name = given.strip()
        required = not name.endswith("?")
        name = name.removesuffix("?").strip()
        if not name:
            raise ValueError(f"schema: a field without a name before {sources.strip()!r}")
        if name in found:
            raise ValueError(f"schema: the field {name!r} is given twice")
        alternatives = [source.strip().lstrip(".") for source in sources.split("|")]
        if not all(alternatives):
            raise ValueError(f"schema: field {name!r} has an empty alternative in {sources.strip()!r}")
        found[name] = (alternatives, required)
    return found


def check_schema(
    sources: Mapping[str, tuple[list[str], bool]], signatures: Mapping[tuple[str, ...], int]
) -> int:
    """How many samples have all that is required; `sources` as `parse` gives it, `signatures` as an index holds them.

    Paths inside JSON can't be known from an index: a sample that has the JSON is counted.
    Raises DataError, listing what the shards hold with counts and the nearest name, where there is none.
    """
    required = {name: alternatives for name, (alternatives, must) in sources.items() if must}
    serving = 0
    held: dict[str, int] = {}
    for members, count in signatures.items():
        for member in members:
            held[member] = held.get(member, 0) + count
        if all(any(_serves(a, members) for a in alternatives) for alternatives in required.values()):
            serving += count
    if serving or not required:
        return serving
    missing = {
        name: alternatives
        for name, alternatives in required.items()
        if not any(_serves(a, tuple(held)) for a in alternatives)
    }
    wanted = ", ".join(f"{name} ({'|'.join(alternatives)})" for name, alternatives in required.items())
    listed = ", ".join(
        f"{name} ({count:,})" for name, count in sorted(held.items(), key=lambda x: -x[1])[:20]
    )
    message = f"No sample has the fields {wanted}; the shards hold {listed or 'no samples'}"
    hints = [hint for alternatives in missing.values() if (hint := _nearest(alternatives, held))]
    if hints:
        message += f"; did you mean {', '.join(hints)}?"
    elif held and not missing:
        message += "; each is there, but no sample has all of them"
    raise DataError(message)


def _serves(source: str, members: tuple[str, ...]) -> bool:
    if source in members:
        return True
    parts = source.split(".")
    return any(parts[i] == "json" and ".".join(parts[: i + 1]) in members for i in range(len(parts) - 1))


def _nearest(alternatives: list[str], held: Mapping[str, int]) -> str | None:
    """What of the shards is nearest: of a similar name, else of the same kind, else a caption in the JSON."""
    for alternative in alternatives:
        if near := difflib.get_close_matches(alternative, held, n=1, cutoff=0.6):
            return near[0]
    try:
        kind = kind_of(alternatives[0])
    except ValueError:  # a field with a reader of the user's own may have any extension
        return None
    for member in sorted(held, key=lambda name: -held[name]):
        if _KIND.get(member.rsplit(".", 1)[-1].lower()) == kind:
            return member
    return "json.caption" if kind == "text" and "json" in held else None
