"""From a record's bytes to values: fields, their sources in a record, their random numbers, and what is cached.

A `Field` says where a value lies in a record (`"jpg|png|webp"`, `"json.captions|txt"`) and what reads it. All
that is random about a value (which of several captions, which crop) is drawn from (seed, row of the run,
field), never from a shared generator, so it is the same on any number of ranks and after any crash.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmscale.data.decode import decode_json
from mmscale.errors import DataError


@dataclass(frozen=True)
class Field:
    """How one field of the samples is made from the bytes of a record.

    source: the record's field, or alternatives in order of preference, "jpg|png|webp". "json.captions" is the
        value at `captions` (a dotted path) in the member `json`; an exact member name comes first.
    read: bytes to value (an array, as a rule). For a value inside JSON it gets a string's UTF-8, and the JSON
        text of anything else. A JSON list is a set of alternatives: each is read; training takes one at
        random, evaluation the first. None, a missing path and an empty list count as absent.
    choose: all sources that the record has are alternatives to choose from, not the first one only.
    first: how often training takes the first alternative; the others share the rest evenly. None: all evenly.
    augment: (value, rng) -> value, applied in training to what was read, with a generator of its own.
    read_train: (bytes, rng) -> value, what training uses instead of `read`, where what is random decides how
        much of the bytes has to be decoded (a crop); `augment` follows. Not used where values are cached.
    required: an absent field is an error; otherwise its value is None.
    shape: of every value, where all are uint8 arrays of one shape. They are then rows of one tensor a batch,
        `batch.stacked[name]`, in memory that is used again; absent ones are zeros. `read` and `read_train` are
        called with `out=`, a tensor of that shape, and return the array they wrote into it.
    """

    source: str
    read: Callable[..., Any]
    choose: bool = False
    first: float | None = None
    augment: Callable[[Any, np.random.Generator], Any] | None = None
    required: bool = True
    read_train: Callable[..., Any] | None = None
    shape: tuple[int, ...] | None = None


class SampleError(DataError):
    """One sample can't be used. The attributes are set after construction, so that the error pickles."""

    shard: str
    key: str | None
    field: str | None
    cause: str  # short and without the sample's own details, to count by

    @classmethod
    def of(cls, shard: str, key: str | None, name: str | None, cause: str, detail: str) -> "SampleError":
        where = f"shard {shard}{f', key {key}' if key else ''}{f', field {name}' if name else ''}"
        error = cls(f"{where}: {detail}")
        error.shard, error.key, error.field = shard, key, name
        error.cause = f"{cause} {name}" if name else cause
        return error


class Source:
    """A schema field, ready for use: its parsed sources and the key of its random numbers."""

    def __init__(self, seed: int, name: str, spec: Field) -> None:
        if not isinstance(spec, Field):
            raise ValueError(f"fields[{name!r}] must be a Field, got {type(spec).__name__}")
        self.spec = spec
        self.names = spec.source.split("|")
        if not all(self.names):
            raise ValueError(f"fields[{name!r}].source must be names separated by '|', got {spec.source!r}")
        # For each source, whatever member could hold it: itself, or a json member of which the rest is a path
        # inside it.
        self._cuts: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for source in self.names:
            parts = source.split(".")
            self._cuts[source] = [
                (".".join(parts[:cut]), tuple(parts[cut:]))
                for cut in range(len(parts) - 1, 0, -1)
                if parts[cut - 1] == "json"
            ]
        digest = hashlib.blake2b(f"field/{seed}/{name}".encode(), digest_size=16).digest()
        self._random_key = np.frombuffer(digest, "<u8")

    def members(self, record: Collection[str]) -> list[tuple[str, tuple[str, ...]]]:
        """(member, path inside it) to look at, in order; only the last can't turn out to be absent."""
        found: list[tuple[str, tuple[str, ...]]] = []
        for source in self.names:
            if source in record:
                found.append((source, ()))
                if not self.spec.choose:
                    break
            else:
                found += [(member, path) for member, path in self._cuts[source] if member in record]
        return found

    def generator(self, slot: int) -> np.random.Generator:
        """The random numbers of this field in one row of the run: row `slot`, counted over all batches.

        Philox (Salmon et al., 2011) turns a key and a counter into independent numbers: the key is (seed,
        field), and the row is the counter's highest word, so no two rows overlap.
        """
        return np.random.Generator(np.random.Philox(key=self._random_key, counter=slot << 192))


class ValueCache:
    """Decoded alternatives by (sample, field), until the budget is full; what is in stays in.

    Every sample comes once an epoch, so throwing out the oldest would throw out what comes next.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes
        self._values: dict[tuple[Any, str], list[Any]] = {}
        self._lock = threading.Lock()

    def get(self, sample: Any, name: str) -> list[Any] | None:
        return self._values.get((sample, name))

    def put(self, sample: Any, name: str, values: list[Any]) -> None:
        num_bytes = sum(getattr(value, "nbytes", None) or sys.getsizeof(value) for value in values)
        with self._lock:
            if num_bytes <= self._left and (sample, name) not in self._values:
                self._left -= num_bytes
                self._values[sample, name] = values


Bodies = Callable[[Collection[str]], Mapping[str, bytes]]


class Decoder:
    """Records to the values of a schema."""

    def __init__(
        self, seed: int, fields: Mapping[str, Field], *, train: bool, cache: ValueCache | None = None
    ) -> None:
        self.sources = {name: Source(seed, name, spec) for name, spec in fields.items()}
        self._train = train
        self._cache = cache

    def decode(
        self,
        record: Collection[str],
        read: Bodies,
        names: Collection[str],
        *,
        sample: Any,
        slot: int,
        where: tuple[str, str],
        rows: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """The values of the named fields; of those in `rows` (uint8, of the field's shape), written into that.

        record: names of the record's members; read: names to bodies. sample: what tells this record from all
        others, for the cache. slot: the row of the run. where: shard and key, for errors.

        Raises SampleError if a required field is absent or one can't be decoded.
        """
        sources = {name: self.sources[name] for name in names}
        known = {name: self._cache.get(sample, name) for name in names} if self._cache else {}
        members = {
            name: source.members(record) for name, source in sources.items() if known.get(name) is None
        }
        bodies = read(dict.fromkeys(member for found in members.values() for member, _ in found))
        parsed: dict[str, Any] = {}
        values = {}
        for name, source in sources.items():
            row = rows.get(name) if rows else None
            value = self._value(
                name,
                source,
                known.get(name),
                members.get(name, []),
                bodies,
                parsed,
                record,
                sample,
                slot,
                where,
                row if self._cache is None else None,  # what is kept must not lie in a batch
            )
            values[name] = value if row is None else _laid(value, row, name, where)
        return values

    def _value(
        self,
        name: str,
        source: Source,
        known: list[Any] | None,
        members: list[tuple[str, tuple[str, ...]]],
        bodies: Mapping[str, bytes],
        parsed: dict[str, Any],
        record: Collection[str],
        sample: Any,
        slot: int,
        where: tuple[str, str],
        row: torch.Tensor | None,
    ) -> Any:
        spec = source.spec
        options = {} if row is None else {"out": row}
        rng = None
        try:
            if known is None and self._train and spec.read_train is not None and self._cache is None:
                found = _alternatives(members, bodies, parsed, spec.choose)
                if found:
                    rng = source.generator(slot)
                    chosen = _choose(rng, len(found), spec.first)
                    value = spec.read_train(found[chosen], rng, **options)
                    return value if spec.augment is None else spec.augment(value, rng)
                alternatives: list[Any] = []
            elif known is None:
                found = _alternatives(members, bodies, parsed, spec.choose)
                if len(found) > 1:
                    options = {}  # one row can't hold them all
                alternatives = [spec.read(body, **options) for body in found]
                if self._cache:
                    self._cache.put(sample, name, alternatives)
            else:
                alternatives = known
        except MemoryError:
            raise
        except Exception as error:  # readers are arbitrary code, fed with arbitrary bytes
            detail = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            cause = getattr(error, "cause", None) or "undecodable"
            raise SampleError.of(*where, name, cause, detail) from error
        if not alternatives:
            if spec.required:
                detail = f"the record has no {spec.source}; it has {', '.join(record)}"
                raise SampleError.of(*where, name, "missing", detail)
            return None
        chosen = 0
        if self._train and (len(alternatives) > 1 or spec.augment is not None):
            rng = source.generator(slot)
            chosen = _choose(rng, len(alternatives), spec.first)
        value = alternatives[chosen]
        if self._cache and isinstance(value, np.ndarray):
            value = value.copy()  # whoever gets it may write into it
        if self._train and spec.augment is not None and rng is not None:
            value = spec.augment(value, rng)
        return value


def _laid(value: Any, row: torch.Tensor, name: str, where: tuple[str, str]) -> np.ndarray | None:
    """The value as its row of the batch: where it isn't there yet (it was augmented, or kept), copied."""
    if value is None:
        row.zero_()
        return None
    target = row.numpy()
    if np.shape(value) != target.shape or value.dtype != np.uint8:
        got = f"{np.shape(value)} {getattr(value, 'dtype', type(value).__name__)}"
        raise SampleError.of(*where, name, "undecodable", f"its reader gave {got}, not {target.shape} uint8")
    if value.__array_interface__["data"][0] != row.data_ptr():
        np.copyto(target, value)
    return target


def _choose(rng: np.random.Generator, num_alternatives: int, first: float | None) -> int:
    if num_alternatives == 1:
        return 0
    if first is None:
        return int(rng.integers(num_alternatives))
    return 0 if rng.random() < first else int(rng.integers(1, num_alternatives))


def _alternatives(
    members: list[tuple[str, tuple[str, ...]]],
    bodies: Mapping[str, bytes],
    parsed: dict[str, Any],
    choose: bool,
) -> list[bytes]:
    """The bytes to read: of the first member (and path in it) that has a value, or of all if `choose`."""
    found: list[bytes] = []
    for member, path in members:
        if not path:
            found.append(bodies[member])
        else:
            if member not in parsed:
                parsed[member] = decode_json(bodies[member])
            value = parsed[member]
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            for element in value if isinstance(value, list) else [value]:
                if element is not None:
                    text = element if isinstance(element, str) else json.dumps(element, ensure_ascii=False)
                    found.append(text.encode("utf-8", "surrogatepass"))
        if found and not choose:
            break
    return found
