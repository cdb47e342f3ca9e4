"""What shards hold, in numbers and on one page: `mmscale data stats SHARDS --out stats.html`.

    numbers = stats("shards", out="stats.html")
    numbers["columns"]["jpg.width"]["median"], numbers["duplicates"]["exact"]["num_samples"]

Counts, bytes, signatures and the sizes of fields come from the indexes, of all samples. Lengths (pixels, seconds,
characters, tokens), classes and duplicates need the bodies, of all samples or of `sample` random ones.

Each shard is one job whose result is small and merges with others in any order, to the same sum. Quantiles come
from histograms with 32 bins an octave, within 1.1 % of the true ones, once there are more than 2,048 different
values; all else is exact. The memory needed is 25 bytes a sample that was read (two hashes and where it lies),
about three times as much while duplicates are looked for, and no more for more samples in all.

Duplicates: samples whose main field (a picture if there is one, else sound, else text) has the same bytes. Near
duplicates: pictures whose difference hashes (64 bits of which neighbour is brighter in a 9 x 8 grey picture;
N. Krawetz, "Kind of like that", 2013) differ in at most 2 bits. That finds other sizes and compressions of one
picture, not crops; simple drawings on plain ground may resemble each other by chance, so look at them. Nearly
uniform pictures, whose hash is noise, aren't compared.
"""

import functools
import hashlib
import heapq
import html
import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmscale.data.check import Crash, Isolated, open_reader
from mmscale.data.decode import MAX_BYTES
from mmscale.data.index import Index, load_index, make_index
from mmscale.data.jobs import JobMap, local_map
from mmscale.data.manifest import Manifest, Urls, open_manifest
from mmscale.data.measure import AUDIO_FIELDS, IMAGE_FIELDS, TEXT_FIELDS, Measurer
from mmscale.errors import ConfigError

if TYPE_CHECKING:
    from mmscale.data.storage import Storage

NEAR_BITS = 2  # differing bits of the difference hashes of near duplicates
_BINS = 32  # an octave
_MAX_VALUES = 2048  # different ones that are counted one by one
_MAX_CLASSES = 10_000
_MAX_GROUPS = 100  # of duplicates that are listed
_FLAT = 8  # grey levels between the darkest and brightest of the 72 pixels
_MAX_BUCKET = 4096  # hashes with 32 equal bits that are compared with each other


class Histogram:
    """Counts of values >= 0 in bins of equal ratio; two of them merge without loss, in any order.

    quantile(q): exact as long as there are at most 2,048 different values; then within 1.1 % of the true one
    (half a bin of 2 ** (1 / 32)), and exact for the ends.
    """

    def __init__(self) -> None:
        self.num = 0
        self.unknown = 0  # NaN: could not be measured
        self.total = 0.0
        self.smallest, self.largest = math.inf, -math.inf
        self.bins: Counter[int] = Counter()
        self.num_zero = 0
        self.values: Counter[float] | None = Counter()  # None: too many different ones

    def add(self, values: Iterable[float] | np.ndarray) -> None:
        array = np.asarray(list(values) if not isinstance(values, np.ndarray) else values, np.float64)
        self.unknown += int(np.isnan(array).sum())
        array = array[~np.isnan(array)]
        if not len(array):
            return
        self.num += len(array)
        self.total += float(array.sum())
        self.smallest = min(self.smallest, float(array.min()))
        self.largest = max(self.largest, float(array.max()))
        self._count_values(Counter(array.tolist()))
        positive = array[array > 0]
        self.num_zero += len(array) - len(positive)
        numbers, counts = np.unique(np.floor(np.log2(positive) * _BINS).astype(np.int64), return_counts=True)
        self.bins.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))

    def merge(self, other: "Histogram") -> None:
        self.num += other.num
        self.unknown += other.unknown
        self.total += other.total
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        self.num_zero += other.num_zero
        self.bins.update(other.bins)
        self._count_values(other.values)

    def _count_values(self, more: Counter[float] | None) -> None:
        if self.values is None or more is None:
            self.values = None
            return
        self.values.update(more)
        if len(self.values) > _MAX_VALUES:
            self.values = None

    def quantile(self, q: float) -> float:
        """The value of rank ceil(q * num); NaN without values."""
        if not self.num:
            return math.nan
        rank = max(1, math.ceil(q * self.num))
        if self.values is not None:
            passed = 0
            for value in sorted(self.values):
                passed += self.values[value]
                if passed >= rank:
                    return value
        if rank <= self.num_zero:
            return 0.0
        if rank == self.num:
            return self.largest
        passed = self.num_zero
        for number in sorted(self.bins):
            passed += self.bins[number]
            if passed >= rank:
                middle = 2 ** ((number + 0.5) / _BINS)
                return min(max(middle, self.smallest), self.largest)
        return self.largest

    def to_json(self) -> dict[str, Any]:
        values = (self.smallest, self.quantile(0.5), self.total / self.num if self.num else 0.0,
                  self.quantile(0.95), self.largest)  # fmt: skip
        names = ("min", "median", "mean", "p95", "max")
        return {
            "num": self.num,
            "unmeasured": self.unknown,
            **{
                name: float(f"{value:.6g}") if self.num else None
                for name, value in zip(names, values, strict=True)
            },
            "histogram": self.bars(),
        }

    def bars(self, limit: int = 40) -> list[list[float]]:
        """[from, to, count] of at most about `limit` bars of equal ratio (equal width on a log axis)."""
        if not self.bins:
            return [[0.0, 0.0, self.num_zero]] if self.num_zero else []
        low, high = min(self.bins), max(self.bins)
        step = max(1, -(-(high - low + 1) // limit))
        joined: Counter[int] = Counter()
        for number, count in self.bins.items():
            joined[(number - low) // step] += count
        bars = [
            [float(f"{2 ** ((low + place * step) / _BINS):.5g}"),
             float(f"{2 ** ((low + (place + 1) * step) / _BINS):.5g}"), joined[place]]
            for place in range(max(joined) + 1)
        ]  # fmt: skip
        return ([[0.0, 0.0, self.num_zero]] if self.num_zero else []) + bars


@dataclass
class ShardStats:
    """What one shard gives; `merge` adds another's, in any order, to the same sum."""

    num_shards: int = 0
    num_samples: int = 0
    num_read: int = 0
    num_bytes: int = 0
    fields: dict[str, Histogram] = field(default_factory=dict)  # bytes of the members
    columns: dict[str, Histogram] = field(default_factory=dict)
    per_shard: Histogram = field(default_factory=Histogram)
    signatures: Counter[tuple[str, ...]] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    num_other_classes: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    num_flat: int = 0
    # of samples that were read: which shard and sample; hash of the main field; difference hash
    places: list[np.ndarray] = field(default_factory=list)  # (n, 2) uint32
    hashes: list[np.ndarray] = field(default_factory=list)  # (n,) uint64
    looks: list[np.ndarray] = field(default_factory=list)  # (n,) uint64
    has_look: list[np.ndarray] = field(default_factory=list)  # (n,) bool
    smallest: list[tuple[int, int, int]] = field(default_factory=list)  # (pixels, shard, sample)
    largest: list[tuple[int, int, int]] = field(default_factory=list)
    drawn: list[tuple[int, int, int]] = field(default_factory=list)  # (random number, shard, sample)

    def merge(self, other: "ShardStats") -> None:
        for name in ("num_shards", "num_samples", "num_read", "num_bytes", "num_other_classes", "num_flat"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.fields, other.fields), (self.columns, other.columns)):
            for name, histogram in theirs.items():
                mine.setdefault(name, Histogram()).merge(histogram)
        self.per_shard.merge(other.per_shard)
        self.signatures.update(other.signatures)
        self.problems.update(other.problems)
        self.classes.update(other.classes)
        for name in ("places", "hashes", "looks", "has_look"):
            getattr(self, name).extend(getattr(other, name))
        self.smallest = heapq.nsmallest(6, self.smallest + other.smallest)
        self.largest = heapq.nlargest(6, self.largest + other.largest)
        self.drawn = heapq.nsmallest(12, self.drawn + other.drawn)


def stats(
    urls: Urls,
    *,
    out: str | Path | None = None,
    sample: int | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    run_jobs: JobMap | None = None,
    on_shard: Callable[[int], None] | None = None,
    storage: "Storage | None" = None,
) -> dict[str, Any]:
    """All numbers as one JSON-able dict; with `out` the page is written as well.

    sample: read the bodies of that many samples, spread over all shards, drawn by `seed`; default all.
    tokenizer: a file of the `tokenizers` library: texts' tokens are counted too.

    Raises ConfigError for a bad `sample` or tokenizer, DataError for shards that can't be used.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"--sample must be at least 1, got {sample}")
    Measurer(("text",), tokenizer=tokenizer)  # a bad file is told before any work
    manifest = open_manifest(urls, storage=storage)
    share = manifest.num_samples if sample is None else min(sample, manifest.num_samples)
    edges = (
        manifest.starts * share // manifest.num_samples
    )  # how many of the samples before each shard are read
    jobs = [
        (number, manifest.urls(number), int(edges[number + 1] - edges[number]))
        for number in range(manifest.num_shards)
    ]
    work = functools.partial(shard_stats, seed=seed, tokenizer=tokenizer, storage=storage)
    total = ShardStats()
    for count, (_, part) in enumerate((run_jobs or local_map())(work, jobs), start=1):
        total.merge(part)
        if on_shard is not None:
            on_shard(count)
    exact, near, skipped = _duplicates(total)
    numbers = _to_json(total, exact, near, skipped, manifest, sampled=share < manifest.num_samples)
    if out is not None:
        Path(out).write_text(
            _page(numbers, total, exact, near, manifest, storage), encoding="utf-8", errors="replace"
        )
    return numbers


# --- one shard ---


def shard_stats(
    job: tuple[int, str, int],
    *,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    storage: "Storage | None" = None,
) -> ShardStats:
    """Of shard (its number, URL, how many of its samples are read)."""
    shard, url, num_read = job
    index = load_index(url, storage=storage)[0] or make_index(url, storage=storage)
    total = ShardStats(num_shards=1, num_samples=len(index), num_read=num_read, num_bytes=index.size)
    total.per_shard.add([len(index)])
    total.signatures.update(index.signatures)
    sizes: dict[str, list[int]] = {}
    for number in range(len(index)):
        for name, (_, size) in index.record(number).items():
            sizes.setdefault(name, []).append(size)
    for name, values in sizes.items():
        total.fields.setdefault(name, Histogram()).add(np.array(values))
    rng = np.random.default_rng([seed, shard])
    chosen = np.sort(rng.choice(len(index), num_read, replace=False))
    priorities = rng.integers(0, 1 << 62, num_read)
    total.drawn = heapq.nsmallest(
        12, ((int(priority), shard, int(number)) for priority, number in zip(priorities, chosen, strict=True))
    )
    _read_bodies(index, url, shard, chosen.tolist(), total, tokenizer, storage)
    return total


def _read_bodies(
    index: Index,
    url: str,
    shard: int,
    chosen: list[int],
    total: ShardStats,
    tokenizer: str | Path | None,
    storage: "Storage | None",
) -> None:
    columns: dict[str, list[float]] = {}
    hashes = np.zeros(len(chosen), np.uint64)
    looks = np.zeros(len(chosen), np.uint64)
    has_look = np.zeros(len(chosen), bool)
    pixels: list[tuple[int, int, int]] = []
    isolated = Isolated()
    try:
        with open_reader(url, storage) as (reader, _):
            for place, number in enumerate(chosen):
                record = index.record(number)
                main = main_field(record)
                bodies = {
                    name: reader.read(offset, size)
                    for name, (offset, size) in record.items()
                    if size <= MAX_BYTES and (name == main or _is_measured(name) or name == "cls")
                }
                if main in bodies:
                    body = bodies[main]
                else:  # it isn't read, so nothing equals it
                    body = f"{url}\0{number}".encode("utf-8", "surrogateescape")
                    total.problems[f"{main}: too large to be read"] += 1
                digest = hashlib.blake2b(body, digest_size=8).digest()
                hashes[place] = int.from_bytes(digest, "little")
                found = isolated.call(measure_sample, bodies, main, tokenizer)
                if isinstance(found, Crash):
                    total.problems[f"{main}: {found.cause}"] += 1
                    continue
                for name, value in found.values.items():
                    columns.setdefault(name, []).append(value)
                if found.look is not None:
                    looks[place], has_look[place] = found.look, True
                total.num_flat += found.flat
                if found.num_pixels:
                    pixels.append((found.num_pixels, shard, number))
                total.problems.update(found.problems)
                if found.class_name is not None:
                    if found.class_name in total.classes or len(total.classes) < _MAX_CLASSES:
                        total.classes[found.class_name] += 1
                    else:
                        total.num_other_classes += 1
    finally:
        isolated.close()
    for name, values in columns.items():
        total.columns.setdefault(name, Histogram()).add(np.array(values))
    total.places.append(
        np.stack([np.full(len(chosen), shard), chosen], axis=1).astype(np.uint32).reshape(-1, 2)
    )
    total.hashes.append(hashes)
    total.looks.append(looks)
    total.has_look.append(has_look)
    total.smallest, total.largest = heapq.nsmallest(6, pixels), heapq.nlargest(6, pixels)


def main_field(record: Iterable[str]) -> str:
    """The field that duplicates are found by: the first picture, else sound, else text, else any."""
    names = list(record)
    for kinds in (IMAGE_FIELDS, AUDIO_FIELDS, TEXT_FIELDS):
        for name in names:
            if name.rpartition(".")[2] in kinds:
                return name
    return names[0]


def _is_measured(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in IMAGE_FIELDS or last in AUDIO_FIELDS or last in TEXT_FIELDS or last == "json"


@dataclass
class _Measured:
    values: dict[str, float] = field(default_factory=dict)
    look: int | None = None
    flat: bool = False
    num_pixels: int = 0
    class_name: str | None = None
    problems: list[str] = field(default_factory=list)


@functools.lru_cache(maxsize=2)
def _measurer(tokenizer: str | Path | None) -> Measurer:
    return Measurer(("image", "audio", "text"), tokenizer=tokenizer)


def measure_sample(bodies: dict[str, bytes], main: str, tokenizer: str | Path | None) -> _Measured:
    """Lengths of all bodies, and the difference hash of the main one if it is a picture."""
    measurer = _measurer(tokenizer)
    found = _Measured()
    for name, body in bodies.items():
        values = measurer.measure(name, len(body), lambda at, size, body=body: body[at : at + size])  # type: ignore[misc]
        for suffix, value in values.items():
            found.values[f"{name}.{suffix}"] = value
            if math.isnan(value):
                found.problems.append(f"{name}.{suffix}: can't be measured")
        width, height = values.get("width", math.nan), values.get("height", math.nan)
        if width > 0 and height > 0:
            found.values[f"{name}.aspect"] = width / height
            if name == main:
                found.num_pixels = int(width * height)
        if name == "cls":
            found.class_name = body.decode("utf-8", "replace").strip()[:200]
    if main.rpartition(".")[2] in IMAGE_FIELDS and found.num_pixels:
        try:
            found.look = difference_hash(bodies[main])
            found.flat = found.look is None
        except Exception:  # damaged bytes raise a dozen types
            found.problems.append(f"{main}: can't be decoded")
    return found


def difference_hash(body: bytes) -> int | None:
    """64 bits of a picture's looks: whether each of 8 x 8 points is darker than its right neighbour. None: uniform."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(body)) as image:
            image.draft("L", (72, 64))
            if image.has_transparency_data:
                colours = image.convert("RGBA")
                white = Image.new("RGBA", colours.size, "white")
                grey = Image.alpha_composite(white, colours).convert("L")
            else:
                grey = image.convert("L")
    small = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16)
    if int(small.max()) - int(small.min()) < _FLAT:
        return None
    return int.from_bytes(np.packbits(small[:, :-1] < small[:, 1:]).tobytes(), "big")


# --- duplicates ---


def _duplicates(total: ShardStats) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """(groups with equal bytes, groups of near looks and unequal bytes, hashes passed over); rows: (shard, sample)."""
    places = np.concatenate(total.places) if total.places else np.zeros((0, 2), np.uint32)
    hashes = np.concatenate(total.hashes) if total.hashes else np.zeros(0, np.uint64)
    looks = np.concatenate(total.looks) if total.looks else np.zeros(0, np.uint64)
    has_look = np.concatenate(total.has_look) if total.has_look else np.zeros(0, bool)
    order = np.lexsort((places[:, 1], places[:, 0]))  # as in the data, whatever order the shards came in
    places, hashes, looks, has_look = places[order], hashes[order], looks[order], has_look[order]
    exact = [places[rows] for rows in _equal(hashes)]
    # One picture for each set of equal bytes, then one hash for each set of equal hashes.
    _, first = np.unique(hashes, return_index=True)
    first = np.sort(first[has_look[first]])
    unique, inverse = np.unique(looks[first], return_inverse=True)
    labels, skipped = near_labels(unique)
    near = [places[first[rows]] for rows in _equal(labels[inverse])]
    return exact, near, skipped


def _equal(values: np.ndarray) -> list[np.ndarray]:
    """Positions of equal values, ascending, for each value that comes at least twice; the largest groups first."""
    order = np.argsort(values, kind="stable")
    ends = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
    groups = [rows for rows in np.split(order, ends) if len(rows) > 1]
    return sorted(groups, key=lambda rows: (-len(rows), int(rows[0])))


def near_labels(hashes: np.ndarray) -> tuple[np.ndarray, int]:
    """(n,) distinct uint64 -> (n,) int64, equal where a chain of steps of at most 2 bits leads; and hashes passed over.

    Of four parts of 16 bits two at least are equal in hashes that differ in 2 bits: only hashes that share two
    parts are compared. Where more than 4,096 share them, the rest is compared with near ones in the sorted order only.
    """
    parent = np.arange(len(hashes))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = int(parent[node])
        return node

    passed_over: set[int] = set()
    parts = [(hashes >> np.uint64(16 * part)) & np.uint64(0xFFFF) for part in range(4)]
    for a, b in itertools.combinations(range(4), 2):
        keys = (parts[a] << np.uint64(16)) | parts[b]
        for rows in _equal(keys):
            if len(rows) > _MAX_BUCKET:
                passed_over.update(rows[_MAX_BUCKET:].tolist())
                rows = rows[:_MAX_BUCKET]
            for place, row in enumerate(rows[:-1]):
                later = rows[place + 1 :]
                close = later[np.bitwise_count(hashes[later] ^ hashes[row]) <= NEAR_BITS]
                for other in close:
                    low, high = sorted((root(int(row)), root(int(other))))
                    parent[high] = low
    return np.array([root(node) for node in range(len(hashes))], np.int64), len(passed_over)


# --- results ---


def _name(manifest: Manifest, shard: int, number: int) -> str:
    return f"{manifest.stem(shard)}/{manifest.index(shard).key(number)}"


def _to_json(
    total: ShardStats,
    exact: list[np.ndarray],
    near: list[np.ndarray],
    skipped: int,
    manifest: Manifest,
    *,
    sampled: bool,
) -> dict[str, Any]:
    def groups(found: list[np.ndarray]) -> dict[str, Any]:
        return {
            "num_groups": len(found),
            "num_samples": sum(map(len, found)),
            "num_superfluous": sum(len(rows) - 1 for rows in found),
            "groups": [
                [_name(manifest, shard, number) for shard, number in rows[:10].tolist()]
                for rows in found[:_MAX_GROUPS]
            ],
        }

    return {
        "num_shards": total.num_shards,
        "num_samples": total.num_samples,
        "num_read": total.num_read,
        "sampled": sampled,
        "num_bytes": total.num_bytes,
        "fingerprint": manifest.fingerprint,
        "samples_per_shard": total.per_shard.to_json(),
        "signatures": [
            {"fields": list(names), "num_samples": count}
            for names, count in sorted(total.signatures.items(), key=lambda pair: (-pair[1], pair[0]))
        ],
        "fields": {name: total.fields[name].to_json() for name in sorted(total.fields)},
        "columns": {name: total.columns[name].to_json() for name in sorted(total.columns)},
        "classes": dict(sorted(total.classes.items(), key=lambda pair: (-pair[1], pair[0]))),
        "num_other_classes": total.num_other_classes,
        "problems": dict(sorted(total.problems.items())),
        "duplicates": {
            "exact": groups(exact),
            "near": {
                **groups(near),
                "max_bits": NEAR_BITS,
                "num_uniform": total.num_flat,
                "num_passed_over": skipped,
            },
        },
        "quantiles": f"exact up to {_MAX_VALUES:,} different values, else within 1.1 %",
    }


def _page(
    numbers: dict[str, Any],
    total: ShardStats,
    exact: list[np.ndarray],
    near: list[np.ndarray],
    manifest: Manifest,
    storage: "Storage | None",
) -> str:
    from mmscale.data.preview import Sample, load_sample, render

    isolated = Isolated()

    def load(places: Iterable[tuple[int, int]]) -> list[Sample]:
        return [load_sample(manifest, shard, number, isolated, storage=storage) for shard, number in places]

    try:
        pictures: list[tuple[str, list[Sample]]] = [
            ("A random dozen", load((shard, number) for _, shard, number in total.drawn)),
        ]
        for title, found in (("Equal bytes", exact), ("Near duplicates", near)):
            for group, rows in enumerate(found[:8], start=1):
                pictures.append(
                    (f"{title}, group {group} of {len(found)}: {len(rows)} samples", load(rows[:6].tolist()))
                )
        if total.largest:
            pictures.append(
                ("The largest pictures", load((shard, number) for _, shard, number in total.largest))
            )
            pictures.append(
                ("The smallest pictures", load((shard, number) for _, shard, number in total.smallest))
            )
    finally:
        isolated.close()
    charts = {
        name: histogram_svg(values, name) for name, values in numbers["columns"].items() if values["num"]
    }
    return render(
        "stats.html.j2",
        title=f"{numbers['num_samples']:,} samples in {numbers['num_shards']:,} shards",
        about=manifest.describe(),
        numbers=numbers,
        charts=charts,
        pictures=pictures,
    )


def histogram_svg(values: dict[str, Any], title: str) -> Any:
    """An inline picture of what `Histogram.to_json` gave, on a logarithmic axis; safe to be put into a page."""
    from markupsafe import Markup

    bars = values["histogram"]
    width, height, floor = 340, 120, 100
    highest = max((bar[2] for bar in bars), default=0) or 1
    step = width / max(10, len(bars))
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="histogram of {html.escape(title)}">'
    ]
    for place, (low, high, count) in enumerate(bars):
        if count:
            tall = max(1.0, count / highest * (floor - 4))
            parts.append(
                f'<rect x="{place * step:.1f}" y="{floor - tall:.1f}" width="{max(1.0, step - 1):.1f}" '
                f'height="{tall:.1f}"><title>{low:g} to {high:g}: {count:,}</title></rect>'
            )
    parts.append(f'<line x1="0" y1="{floor}" x2="{width}" y2="{floor}"/>')
    if bars:
        parts.append(f'<text x="0" y="{height - 6}">{values["min"]:g}</text>')
        parts.append(f'<text x="{width}" y="{height - 6}" text-anchor="end">{values["max"]:g}</text>')
    return Markup("".join(parts) + "</svg>")  # all that is in it are numbers, and the title, escaped


def to_text(numbers: dict[str, Any]) -> str:
    """A short summary for a terminal."""
    from mmscale.data.check import escaped

    duplicates = numbers["duplicates"]
    lines = [
        f"{numbers['num_samples']:,} samples in {numbers['num_shards']:,} shards, {numbers['num_bytes']:,} bytes"
        + (f"; bodies of {numbers['num_read']:,} samples were read" if numbers["sampled"] else ""),
        f"{'':28}{'num':>12}{'min':>12}{'median':>12}{'p95':>12}{'max':>12}",
    ]
    rows = {f"{name} (bytes)": values for name, values in numbers["fields"].items()} | numbers["columns"]
    for name, values in rows.items():
        cells = "".join(
            f"{'-' if values[key] is None else format(values[key], ',.6g'):>12}"
            for key in ("min", "median", "p95", "max")
        )
        lines.append(f"{escaped(name):28}{values['num']:>12,}{cells}")
    for kind, words in (("exact", "equal bytes"), ("near", "near duplicates")):
        found = duplicates[kind]
        lines.append(f"{words}: {found['num_samples']:,} samples in {found['num_groups']:,} groups")
    lines += [f"{escaped(what)}: {count:,}" for what, count in numbers["problems"].items()]
    return "\n".join(lines)
