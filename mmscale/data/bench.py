"""How fast these shards can be read here, what limits it, and what would help: `mmscale data bench`.

    report = bench("shards", fields="image: jpg|png, text: txt", threads=4)
    print(report.to_text())

Two passes over random samples, of some seconds each, with a stream like training's: one that hands on bytes, and
one that decodes. Training can't be faster than that on this machine. Random samples of shards that were read before
come from memory; the report says how much came from a disk, so that a first pass isn't taken for the usual one.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mmscale.data.fields import Field
from mmscale.data.schema import kind_of, schema
from mmscale.data.stream import ShardStream, Urls
from mmscale.errors import ConfigError, UserError

MAX_BATCH = 64
_BUSY = 0.8  # of the cores that the threads could use; below that they wait for something
_ASLEEP = 0.25  # of the cores that they could use: other work alone doesn't slow them down that much
_IDLE = 0.1  # of the machine's cores; below that it is busy


@dataclass(frozen=True)
class Rate:
    """One pass. Times in seconds; `read_s` and `decode_s` are summed over threads and can exceed `wall_s`.

    They hold what threads waited for, be it the storage or Python's lock, and don't tell these apart; CPU times do.
    """

    samples: int
    wall_s: float
    cpu_s: float
    read_bytes: int  # of the shards, as handed to the decoders
    disk_bytes: int | None  # of them, what the disk had to give; None where the system doesn't say
    read_s: float
    decode_s: float
    idle_cores: float | None  # of the machine, all others' work counted; None where the system doesn't say
    faults: int

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.wall_s

    @property
    def samples_per_cpu_s(self) -> float:
        return self.samples / max(self.cpu_s, 1e-9)

    @property
    def mb_per_s(self) -> float:
        return self.read_bytes / self.wall_s / 1e6

    @property
    def busy_cores(self) -> float:
        return self.cpu_s / self.wall_s

    def as_dict(self) -> dict[str, Any]:
        rates = ("samples_per_s", "samples_per_cpu_s", "mb_per_s", "busy_cores")
        return {**asdict(self), **{name: getattr(self, name) for name in rates}}


@dataclass(frozen=True)
class Report:
    """What `bench` found. `decoders`: for each field the CPU seconds of its decoder, in the second pass."""

    num_samples: int
    threads: int
    cores: int
    raw: Rate
    decoded: Rate | None
    fields: dict[str, str]  # name -> source
    decoders: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # members that are of no kind that can be decoded

    @property
    def decode_share(self) -> float | None:
        """What the decoders took of the CPU time in the second pass; the rest is reading and putting together."""
        if self.decoded is None:
            return None
        return min(1.0, sum(self.decoders.values()) / max(1e-9, self.decoded.cpu_s))

    def as_dict(self) -> dict[str, Any]:
        limit, remedy = advice(self)
        return {
            "num_samples": self.num_samples,
            "threads": self.threads,
            "cores": self.cores,
            "fields": self.fields,
            "left_out": self.left_out,
            "raw": self.raw.as_dict(),
            "decoded": None if self.decoded is None else self.decoded.as_dict(),
            "read_share": None if self.decode_share is None else 1 - self.decode_share,
            "decode_share": self.decode_share,
            "decoders_cpu_s": self.decoders,
            "limit": limit,
            "remedy": remedy,
        }

    def to_text(self) -> str:
        lines = [f"{self.num_samples:,} samples, {self.threads} threads on {self.cores} cores"]
        for name, rate in (("reading", self.raw), ("reading and decoding", self.decoded)):
            if rate is None:
                continue
            lines.append(
                f"{name}: {_number(rate.samples_per_s)} samples/s, {_number(rate.mb_per_s)} MB/s, "
                f"{_number(rate.samples_per_cpu_s)} samples per CPU second, {rate.busy_cores:.2f} cores busy"
                + _from_disk(rate)
                + (f", {rate.faults:,} samples that can't be used" if rate.faults else "")
            )
        if self.decode_share is not None:
            lines.append(f"CPU time: {1 - self.decode_share:.0%} reading, {self.decode_share:.0%} decoding")
        total = sum(self.decoders.values())
        if total:
            shares = sorted(self.decoders.items(), key=lambda item: -item[1])
            lines.append("decoders: " + ", ".join(f"{name} {cpu_s / total:.0%}" for name, cpu_s in shares))
        if self.left_out:
            lines.append(f"not decoded, being of no known kind: {', '.join(self.left_out)}")
        limit, remedy = advice(self)
        return "\n".join([*lines, f"limit: {limit}", f"remedy: {remedy}"])


def advice(report: Report) -> tuple[str, str]:
    """(what limits the second pass, or the first where nothing is decoded; the cheapest thing to do about it)."""
    rate = report.decoded or report.raw
    usable = min(report.threads, report.cores)
    busy, idle = rate.busy_cores, rate.idle_cores
    waits_for_storage = rate.read_s > rate.decode_s
    machine_is_full = idle is not None and idle < _IDLE * report.cores
    if busy < _BUSY * usable and machine_is_full and not (waits_for_storage and busy < _ASLEEP * usable):
        return (
            f"other work on this machine: it left {busy:.2f} of {usable} cores to the threads, and none idle",
            "measure again when nothing else runs",
        )
    if busy < _BUSY * usable and waits_for_storage and rate.cpu_s < rate.read_s:
        return (
            f"the storage: threads wait for it, {busy:.2f} of {usable} cores are busy",
            f"--threads {2 * report.threads} (data.threads in training) waits for more of it at once; else copy the "
            "shards to a local disk, or for remote ones set data.storage.cache_gb and data.order=window",
        )
    if report.decode_share is None:
        return "reading: the CPU finds and copies samples", "none is needed: nothing is decoded"
    if report.decode_share < 0.5:
        return (
            "reading: more CPU time goes into finding and copying samples than into decoding them",
            "--fields with only what training needs; fewer, larger samples",
        )
    if report.threads < report.cores:
        return (
            f"decoding, with {report.threads} of {report.cores} cores",
            f"--threads {report.cores} (data.threads={report.cores} in training)",
        )
    if busy < _BUSY * usable:
        return (
            f"decoding in threads that wait for each other: {busy:.2f} of {usable} cores are busy",
            "several ranks on this machine, with fewer threads each",
        )
    costly = max(report.decoders, key=lambda name: report.decoders[name], default="")
    kind = kind_of(report.fields[costly].split("|")[0]) if costly else ""
    store = {
        "image": "store smaller pictures once (`mmscale data pack --resize N`)",
        "audio": "store sound once at the rate that training wants",
    }.get(kind, "store what is decoded slowly in a form that isn't")
    return (
        f"decoding, most of all {costly}: all {usable} cores are busy",
        f"{store}; data.cache_mb keeps decoded samples in memory if they fit; more nodes bring more cores",
    )


def bench(
    urls: Urls,
    *,
    fields: str | Mapping[str, Field | str] | None = None,
    threads: int | None = None,
    seconds: float = 5.0,
) -> Report:
    """Measure reading and decoding of `urls` (as ShardStream takes them), about `seconds` for each.

    fields: a schema as ShardStream takes it; None decodes every member whose kind its extension tells. threads:
    default one a core. Samples that can't be used are replaced and counted.
    Raises UserError for bad arguments, ConfigError for a bad schema, DataError for shards that can't be read.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = cores if threads is None else threads
    if threads < 1:
        raise UserError(f"threads must be at least 1, got {threads}")
    if not 0 < seconds < float("inf"):
        raise UserError(f"seconds must be above 0, got {seconds}")
    with_all = ShardStream(urls, batch_size=1, epochs=None)
    num_samples = with_all.num_samples
    left_out: list[str] = []
    try:
        if fields is None:
            chosen, left_out = _fields_of(next(with_all).names)
        elif isinstance(fields, str):
            chosen = schema(fields)
        else:
            texts = {name: source for name, source in fields.items() if isinstance(source, str)}
            given = {name: spec for name, spec in fields.items() if isinstance(spec, Field)}
            chosen = {**schema(texts), **given}
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise ConfigError(f"fields: {error}") from error
    finally:
        with_all.close()
    sources = {name: spec.source for name, spec in chosen.items()}
    batch_size = min(MAX_BATCH, num_samples)
    bytes_of = {
        name: replace(spec, read=_same, augment=None, read_train=None, shape=None)
        for name, spec in chosen.items()
    }
    raw = _measure(urls, bytes_of or None, batch_size, threads, seconds, seed=0)
    if not chosen:
        return Report(num_samples, threads, cores, raw, None, sources, left_out=left_out)
    timers = {name: _Timed(spec.read) for name, spec in chosen.items()}
    timed = {name: replace(spec, read=timers[name], read_train=None) for name, spec in chosen.items()}
    decoded = _measure(urls, timed, batch_size, threads, seconds, seed=1)
    decoders = {name: timer.cpu_s for name, timer in timers.items()}
    return Report(num_samples, threads, cores, raw, decoded, sources, decoders, left_out)


def _fields_of(members: list[str]) -> tuple[dict[str, Field], list[str]]:
    """A field for each member of a known kind, all optional, and the other members."""
    known, other = [], []
    for name in members:
        try:
            kind_of(name)
        except ValueError:
            other.append(name)
        else:
            known.append(name)
    return {name: replace(schema({"x": name})["x"], required=False) for name in known}, other


def _same(body: bytes) -> bytes:
    return body


class _Timed:
    """A decoder that counts its own CPU time, over all threads."""

    def __init__(self, read: Any) -> None:
        self.cpu_s = 0.0
        self._read, self._lock = read, threading.Lock()

    def __call__(self, body: bytes, **options: Any) -> Any:
        start = time.thread_time()
        try:
            return self._read(body, **options)
        finally:
            spent = time.thread_time() - start
            with self._lock:
                self.cpu_s += spent


def _measure(
    urls: Urls,
    fields: Mapping[str, Field] | None,
    batch_size: int,
    threads: int,
    seconds: float,
    *,
    seed: int,
) -> Rate:
    """At least one batch and `seconds` of a stream, from its second batch on: the first opens and imports things."""
    stream = ShardStream(
        urls,
        batch_size=batch_size,
        seed=seed,
        epochs=None,
        fields=fields,
        threads=threads,
        on_error="substitute",
        error_budget=1.0,
    )
    try:
        next(stream)
        before, cpu_s, disk_bytes, idle_s = stream.stats(), _cpu_s(), _disk_bytes(), _idle_s()
        start = end = time.perf_counter()
        samples = 0
        while not samples or end - start < seconds:
            samples += len(next(stream))
            end = time.perf_counter()
        after = stream.stats()
        return Rate(
            samples=samples,
            wall_s=end - start,
            cpu_s=_cpu_s() - cpu_s,
            read_bytes=int(after["bytes_read"] - before["bytes_read"]),
            disk_bytes=None if disk_bytes is None else (_disk_bytes() or 0) - disk_bytes,
            read_s=after["read_s"] - before["read_s"],
            decode_s=after["decode_s"] - before["decode_s"],
            idle_cores=None if idle_s is None else ((_idle_s() or 0.0) - idle_s) / (end - start),
            faults=stream.faults.total(),
        )
    finally:
        stream.close()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _idle_s() -> float | None:
    """Seconds that this machine's cores had nothing to do, since it started; Linux says it."""
    try:
        words = Path("/proc/stat").read_text().split(maxsplit=6)
        return (int(words[4]) + int(words[5])) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for a disk
    except OSError:
        return None


def _disk_bytes() -> int | None:
    """What this process made disks read, since its start. Linux says it; the page cache and networks don't count."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _from_disk(rate: Rate) -> str:
    if rate.disk_bytes is None or not rate.read_bytes:
        return ""
    return f", {min(1.0, rate.disk_bytes / rate.read_bytes):.0%} of the bytes from a disk"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
