"""The stream of batches: which sample comes next, read ahead and decoded, the same on any number of workers.

    stream = ShardStream("shards/{000000..000099}.tar", batch_size=256, seed=0, rank=0, world_size=8)
    for batch in stream:
        batch["txt"], batch.sample_keys, batch.position

The order is arithmetic, not state. Step t belongs to epoch t // steps_per_epoch; an epoch's k-th sample is
the image of k under a permutation keyed by (seed, epoch); the global batch is a run of such samples, of which
each rank takes its contiguous part. So seeking costs nothing, the state is one step number (and, of a blend,
a count a source), it is the same on every rank, and a run resumes on another number of workers with no sample
twice and none lost. Whatever else is random (which caption, which crop) is drawn from (seed, row of the
global batch, field), never from a shared generator.

Shards on local disks are drawn from sample by sample, over the whole data set at once: a true shuffle. Remote
ones, and sets whose index doesn't fit into memory, are read in runs of neighbours that are shuffled in
windows (`mmscale.data.order`). The trade-off against a plain tar reader: an index of each shard is needed, and
shards must not be compressed.
"""

import hashlib
import itertools
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from mmscale.data.ahead import Helpers, ReadAhead
from mmscale.data.assemble import Assembler, Batch, Made
from mmscale.data.batch import BufferPool
from mmscale.data.draw import Blender, Draw
from mmscale.data.fields import Decoder, Field, SampleError, ValueCache
from mmscale.data.manifest import open_manifest
from mmscale.data.schema import check_schema, schema
from mmscale.data.shards import Shards
from mmscale.data.storage import Storage
from mmscale.errors import ConfigError, DataError

logger = logging.getLogger("mmscale.data")

Urls = str | Path | Sequence[str | Path]

MAX_QUARANTINE = 1000
MAX_NEW_FAULTS = 100_000  # kept for take_faults
FREE_FAULTS = 3  # this many never exceed the budget, however short the run
MAX_SOURCES = 24  # of a blend: its state has to stay below 4 kB
_QUICK_S = 100e-6  # a row: raw bytes that come faster aren't read ahead
_SLOW_BATCHES = 3
_NO_HELPERS = Helpers(0)
FULL_ORDER_LIMIT = 2_000_000  # samples; the index of more doesn't fit into the memory that is kept for it


@dataclass(frozen=True)
class Fault:
    """A sample that couldn't be used and was replaced, or a whole shard that was left out (key None)."""

    step: int
    row: int  # of the global batch
    shard: str
    key: str | None
    field: str | None
    cause: str
    detail: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class ShardStream:
    """Iterates the batches of one rank over `epochs` passes of the shards; an iterator that knows its place.

    urls: brace pattern, path, folder (all *.tar below it, in order), URL (http, s3, gs, whatever fsspec
        knows), a manifest's path, or a list of these; or a mapping {source: such urls} for a blend.
    batch_size: samples in the global batch; each of the `world_size` ranks gets an equal part.
    epochs: passes from the start of training (not from where a state resumes); None = forever.
    fields: None for raw bytes by field name; or a schema: {name: Field}, {"image": "jpg|png", "text": "txt"},
        or the same as text, "image: jpg|png, text: txt" (see `mmscale.data.schema`).
    select: names of the fields that are needed at a global step; no other member of the shards is read then.
    weights: of a blend's sources, by samples; they needn't add up to 1. Default: as many as each source has.
        At every position each source has had its share to less than one sample.
    weight_by: a measured column ("txt.tokens"): the weights are then shares of that column's sum.
    order: "full" (single samples permuted), "window" (runs of neighbours, shuffled in windows), or "auto":
        "window" for remote shards and for more than two million samples.
    bucket_by: a measured column ("wav.seconds"); batches then hold samples of similar length.
    remainder: what becomes of the samples that don't fill an epoch's last batch: "drop" them, "wrap" (fill up
        from the start of the epoch), or "pad" (the same, but `batch.valid` is False for the fillers). A blend
        has no remainder: each of its sources begins anew when it is through.
    on_error: "fail" raises DataError for a sample that can't be read or decoded, and for a shard that can't be
        indexed; "substitute" takes another sample in its place (the same one on any number of ranks, and on
        resuming), until more than `error_budget` of the rank's samples since the start or the last
        `load_state_dict`, and more than three, were bad. `faults` counts the causes, `quarantine` lists
        (shard, key, cause), `take_faults()` gives them in full. Shards that can't be indexed are left out and
        listed in `shard_faults`; more than `error_budget` of the shards is an error at once.
    hold_to_budget: False leaves it to the caller to hold the samples of all ranks against the budget.
    train: False = no augmentation, and the first of several alternatives.
    transform: called with each batch in the reading thread; the result is `batch.tensors`.
    threads: how many threads read and decode. prefetch, buffer_bytes: how many batches may lie ready, and how
        many bytes of them (one always may).
    cache_bytes: keep up to this many bytes of decoded values (before augmentation) in memory.
    storage: how shards are read: time-outs, retries, the node's cache of remote shards.
    pool: memory for fields of one shape, used again when the last view of a batch is gone; page-locked, for copies
        to a device, with BufferPool(pin=True).
    stall_s: a batch that doesn't come for so many seconds is an error that says what the threads wait for.

    Raises ValueError for bad arguments, ConfigError for a batch that the ranks can't share equally, DataError
    for shards that can't be used, and at once if no sample has what the schema requires. An error of a batch
    is raised when that batch is asked for, not before; asking again tries again.
    """

    def __init__(
        self,
        urls: Urls | Mapping[str, Urls],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = 1,
        fields: Mapping[str, Field | str] | str | None = None,
        select: Callable[[int], Collection[str]] | None = None,
        weights: Mapping[str, float] | None = None,
        weight_by: str | None = None,
        shuffle: bool = True,
        order: Literal["auto", "full", "window"] = "auto",
        bucket_by: str | None = None,
        remainder: Literal["drop", "wrap", "pad"] = "drop",
        on_error: Literal["fail", "substitute"] = "fail",
        error_budget: float = 0.005,
        hold_to_budget: bool = True,
        train: bool = True,
        transform: Callable[[Batch], Any] | None = None,
        threads: int = 2,
        prefetch: int = 2,
        buffer_bytes: int = 256 << 20,
        cache_bytes: int = 0,
        storage: Storage | None = None,
        pool: BufferPool | None = None,
        stall_s: float = 600.0,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
            ("threads", threads, 1),
            ("prefetch", prefetch, 1),
            ("buffer_bytes", buffer_bytes, 0),
            ("cache_bytes", cache_bytes, 0),
            ("epochs", 1 if epochs is None else epochs, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be a whole number, got {seed!r}")
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size, got rank {rank} of {world_size}")
        for name, text, known in (
            ("remainder", remainder, ("drop", "wrap", "pad")),
            ("on_error", on_error, ("fail", "substitute")),
            ("order", order, ("auto", "full", "window")),
        ):
            if text not in known:
                choices = f"{', '.join(map(repr, known[:-1]))} or {known[-1]!r}"
                raise ValueError(f"{name} must be {choices}, got {text!r}")
        if not 0 <= error_budget <= 1:
            raise ValueError(f"error_budget is a share of the samples, from 0 to 1, got {error_budget!r}")
        if not stall_s > 0:
            raise ValueError(f"stall_s must be above 0 seconds, got {stall_s!r}")
        if batch_size % world_size:
            below = batch_size // world_size * world_size
            nearest = f"{below} or {below + world_size}" if below else str(world_size)
            raise ConfigError(
                f"batch_size {batch_size} can't be shared equally by world_size {world_size} ranks: "
                f"the nearest that can is {nearest}"
            )
        is_blend = isinstance(urls, Mapping)
        if is_blend and remainder != "drop":
            raise ValueError(f"remainder must be 'drop' for a blend, which has none, got {remainder!r}")
        if not is_blend and (weights is not None or weight_by is not None):
            raise ValueError("weights are for a blend: give urls as a mapping {source: urls}")
        parsed = None if fields is None else _parse_fields(fields)
        decoder = (
            None
            if parsed is None
            else Decoder(seed, parsed, train=train, cache=ValueCache(cache_bytes) if cache_bytes else None)
        )

        self._storage = storage or Storage()
        self._datasets = datasets = _open_datasets(urls, self._storage, on_error)
        self.shard_faults = [
            Fault(-1, -1, url, None, None, f"shard {cause}", message)
            for shards in datasets
            for url, cause, message in shards.manifest.faults
        ]
        _check_left_out(self.shard_faults, datasets, error_budget)
        self._fields = parsed
        if parsed is not None and select is None:
            self.check_fields(parsed)
        self.num_samples = sum(shards.num_samples for shards in datasets)
        if remainder == "drop":
            self.steps_per_epoch = self.num_samples // batch_size
            if not self.steps_per_epoch:
                raise DataError(
                    f"{datasets[0].describe()}: {self.num_samples} samples don't fill one batch of "
                    f"{batch_size}: use a smaller batch_size"
                )
        else:
            self.steps_per_epoch = -(-self.num_samples // batch_size)

        self.faults: Counter[str] = Counter()
        self.quarantine: list[tuple[str, str | None, str]] = []
        self._new_faults: list[Fault] = []
        self._error_budget = error_budget if hold_to_budget else 1.0
        self._num_read = 0
        self._step = 0
        self._end = None if epochs is None else epochs * self.steps_per_epoch
        self._prefetch = prefetch
        self._buffer_bytes = buffer_bytes
        self._threads = threads
        self._stall_s = stall_s
        self._wait_s = 0.0
        self._num_slow = 0  # batches in a row
        self._order_is_auto = order == "auto"
        self._ahead: ReadAhead[Made] | None = None

        if order == "auto":
            large = self.num_samples > FULL_ORDER_LIMIT or any(shards.is_remote for shards in datasets)
            order = "window" if large and shuffle else "full"
        blend = None
        if is_blend:
            blend = Blender(datasets, weights, weight_by)
        self._identity: dict[str, Any] = {
            "num_samples": self.num_samples,
            "num_shards": sum(shards.manifest.num_shards for shards in datasets),
            "fingerprint": _fingerprint(datasets, is_blend),
            "seed": seed,
            "batch_size": batch_size,
            "shuffle": shuffle,
            "remainder": remainder,
            "order": order,
            "bucket_by": bucket_by,
        }
        if is_blend:
            self._identity["sources"] = {
                shards.name: [shards.num_samples, shards.manifest.fingerprint[:8]] for shards in datasets
            }
        # The threads hold the assembler, never the stream, so that an abandoned stream is collected and stops
        # them.
        self._assembler = Assembler(
            datasets=datasets,
            draw=Draw(
                datasets,
                seed=seed,
                batch_size=batch_size,
                steps_per_epoch=self.steps_per_epoch,
                shuffle=shuffle,
                order=order,
                bucket_by=bucket_by,
                blend=blend,
            ),
            seed=seed,
            rows=range(rank * (batch_size // world_size), (rank + 1) * (batch_size // world_size)),
            batch_size=batch_size,
            steps_per_epoch=self.steps_per_epoch,
            pad=remainder == "pad",
            decoder=decoder,
            select=select,
            substitute=on_error == "substitute",
            train=train,
            transform=transform,
            pool=pool or BufferPool(4 * buffer_bytes),
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """Steps left; a stream without end has no length (TypeError)."""
        if self._end is None:
            raise TypeError("a stream with epochs=None has no length")
        return max(0, self._end - self._step)

    def __next__(self) -> Batch:
        if self._end is not None and self._step >= self._end:
            self.close()
            raise StopIteration
        if self._assembler.is_plain:
            return self._taken(*self._made_here())
        if self._ahead is None:
            steps = itertools.count(self._step) if self._end is None else range(self._step, self._end)
            self._assembler.start(self._end)
            self._ahead = ReadAhead(
                self._assembler.assemble,
                iter(steps),
                depth=self._prefetch,
                max_bytes=self._buffer_bytes,
                num_threads=self._threads,
                stall_s=self._stall_s,
                doing=self._assembler.doing,
            )
            # Also runs at the end of the process, before the interpreter is torn down under the threads.
            self._stop = weakref.finalize(self, _stop, self._ahead, self._assembler)
        begin = time.perf_counter()
        try:
            made = self._ahead.take()
        except DataError:
            self.close()
            raise
        finally:
            self._wait_s += time.perf_counter() - begin
        if isinstance(made, BaseException):
            self.close()
            raise made
        return self._taken(*made)

    def _taken(self, batch: Batch, faults: list[tuple[int, SampleError]]) -> Batch:
        self._num_read += len(batch)
        self._count(batch.step, faults)
        self._step += 1
        return batch

    def _made_here(self) -> Made:
        """The next batch, made by the caller's own thread.

        Raw bytes of local shards come in a few microseconds a sample, less than handing them from one thread to
        another costs. Where they come slowly (a cold disk), threads take over for good.
        """
        begin = time.perf_counter()
        try:
            made, _ = self._assembler.assemble(self._step, _NO_HELPERS)
        except BaseException:
            self.close()
            raise
        took = time.perf_counter() - begin
        self._wait_s += took
        self._num_slow = self._num_slow + 1 if took > _QUICK_S * len(made[0]) else 0
        if self._num_slow == _SLOW_BATCHES:
            self._assembler.is_plain = False
        return made

    def samples(self) -> Iterator[dict[str, Any]]:
        """The samples of all batches left, one by one, as webdataset has them: `__key__`, `__url__`, raw bytes.

        For decoders and filters written for webdataset; a stream with a schema has no raw bytes (ValueError).
        """
        if self._assembler.decoder is not None:
            raise ValueError("samples() gives raw bytes: make the stream with fields=None")
        for batch in self:
            for row, key in enumerate(batch.sample_keys):
                stem, _, name = key.partition("/")
                values = {
                    field: column[row] for field, column in batch.columns.items() if column[row] is not None
                }
                yield {"__key__": name, "__url__": f"{stem}.tar", **values}

    def _count(self, step: int, faults: list[tuple[int, SampleError]]) -> None:
        for row, error in faults:
            self.faults[error.cause] += 1
            if len(self.quarantine) < MAX_QUARANTINE:
                self.quarantine.append((error.shard, error.key, error.cause))
            if len(self._new_faults) < MAX_NEW_FAULTS:
                fault = Fault(step, row, error.shard, error.key, error.field, error.cause, str(error))
                self._new_faults.append(fault)
        num_faults = self.faults.total()
        if faults and num_faults > FREE_FAULTS and num_faults > self._error_budget * self._num_read:
            self.close()
            causes = ", ".join(f"{count} x {cause}" for cause, count in self.faults.most_common(5))
            raise DataError(
                f"{num_faults} of {self._num_read} samples can't be used, more than the error budget of "
                f"{self._error_budget:.3%}: {causes}. The last one: {faults[-1][1]}"
            ) from faults[-1][1]

    def take_faults(self) -> list[Fault]:
        """The faults of the batches returned since the last call (the first 100,000 of them)."""
        taken, self._new_faults = self._new_faults, []
        return taken

    def check_fields(self, names: Collection[str]) -> int:
        """How many samples have the members that these fields of the schema require.

        Known from the index, before anything is read. Raises DataError, listing what the shards hold, if none has.
        """
        assert self._fields is not None, "a stream without a schema requires nothing"
        signatures: Counter[tuple[str, ...]] = Counter()
        for shards in self._datasets:
            signatures.update(shards.manifest.signatures)
        wanted = {name: self._fields[name] for name in names}
        return check_schema(
            {name: (spec.source.split("|"), spec.required) for name, spec in wanted.items()}, signatures
        )

    def notes(self) -> list[str]:
        """What a user should know of the data before training on it: shards left out, weights that changed."""
        notes = []
        if self.shard_faults:
            some = "; ".join(fault.detail for fault in self.shard_faults[:3])
            more = f" and {len(self.shard_faults) - 3} more" if len(self.shard_faults) > 3 else ""
            notes.append(f"{len(self.shard_faults)} shards are left out or cut: {some}{more}")
        records = self.blend_records()
        if len(records) > 1 and records[-1]["position"] == self._step * self._assembler.batch_size:
            before, now = (
                ", ".join(f"{name} {float(Fraction(share)):.4g}" for name, share in record["weights"].items())
                for record in records[-2:]
            )
            notes.append(f"the blend's weights change at step {self._step}: {before} -> {now}")
        return notes

    def seek(self, step: int) -> None:
        """Continue before global step `step`, as if the earlier ones had been consumed; costs nothing."""
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step must be a whole number of at least 0, got {step!r}")
        self.close()
        self._step = step

    def keys(self, step: int) -> list[str]:
        """The keys of this rank's samples at a global step, without reading any body or moving the stream.

        What `on_error` puts in a sample's place isn't known before it is read; these are the ones drawn first.
        """
        return self._assembler.keys(step)

    def close(self) -> None:
        """Stop the threads and close the shards; the stream keeps its place and may be used again."""
        if self._ahead is not None:
            self._stop()
            self._ahead = None
        for shards in self._assembler.datasets:
            shards.close()

    # --- blends ---

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Blend by other weights from the next batch on; to be called on every rank before the same step.

        The change is recorded in the state, so what comes after a resume, or a replay, is the same.
        """
        blend = self._assembler.draw.blend
        if blend is None:
            raise ValueError("set_weights is for a blend: give urls as a mapping {source: urls}")
        self.close()
        blend.change(self._step * self._assembler.batch_size, weights)

    def blend_report(self) -> dict[str, dict[str, float]]:
        """{source: samples consumed by all ranks, epochs of it, its weight now} at the present position."""
        draw = self._assembler.draw
        if draw.blend is None:
            return {}
        counts = draw.blend.history.counts(self._step * self._assembler.batch_size)
        return {
            shards.name: {
                "samples": int(count),
                "epochs": int(count) / shards.num_samples,
                "weight": float(draw.blend.effective()[shards.name]),
            }
            for shards, count in zip(self._assembler.datasets, counts, strict=True)
        }

    def blend_records(self) -> list[dict[str, Any]]:
        """Every change of the weights so far, from the start: position and weights."""
        blend = self._assembler.draw.blend
        return [] if blend is None else blend.history.records()

    # --- metrics ---

    def stats(self) -> dict[str, float]:
        """What the loader did since it was made, on this rank.

        samples, bytes read from shards, seconds that the caller waited, seconds of reading and of decoding
        (summed over threads), batches and bytes that lie ready, bytes on their way from remote storage.
        """
        ahead, assembler = self._ahead, self._assembler
        return {
            "samples": self._num_read,
            "bytes_read": assembler.bytes_read,
            "wait_s": self._wait_s,
            "read_s": assembler.read_s,
            "decode_s": assembler.decode_s,
            "queue_depth": ahead.num_ready if ahead is not None else 0,
            "ready_bytes": ahead.ready_bytes if ahead is not None else 0,
            "bytes_in_flight": self._storage.stats()["bytes_in_flight"],
        }

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, after the last batch that was *returned* (whatever lies read ahead).

        Small (below 4 kB), fit for JSON, equal on every rank and valid for any world size.
        """
        state = {
            "version": 2,
            "step": self._step,
            "epoch": self._step // self.steps_per_epoch,
            "position": self._assembler.position(self._step),
            **self._identity,
        }
        if self._assembler.draw.blend is not None:
            state["blend"] = self._assembler.draw.blend.history.to_json()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken, on any rank of any world size.

        A blend goes on with the state's counts; if this stream was made with other weights than the state's
        last, they hold from here on, and that is recorded.

        Raises DataError, saying in words what differs, for the state of another data set, order or batch
        size.
        """
        if state.get("version") not in (1, 2) or not isinstance(state.get("step"), int) or state["step"] < 0:
            raise DataError(f"not a state of a ShardStream, version 1 or 2: {str(dict(state))[:200]}")
        # Version 1 knew one source and one order.
        state = {"order": "full", "bucket_by": None, **state}
        here = dict(self._identity)
        if self._order_is_auto and state["order"] in ("full", "window"):
            here["order"] = state["order"]  # the shards may have moved to or from a remote store
        words = {
            "num_samples": "number of samples",
            "num_shards": "number of shards",
            "seed": "seed",
            "batch_size": "batch_size",
            "shuffle": "shuffle",
            "remainder": "remainder",
            "order": "order",
            "bucket_by": "bucket_by",
        }
        differences = [
            f"{word}: {state.get(name)} in the state, {here[name]} here"
            for name, word in words.items()
            if state.get(name) != here[name]
        ]
        differences += _source_differences(state.get("sources"), here.get("sources"))
        if not differences and state.get("fingerprint") != here["fingerprint"]:
            differences = ["the shards: as many, with as many samples, but other names, order or contents"]
        if differences:
            raise DataError(f"the state belongs to another stream; differing are {'; '.join(differences)}")
        self.seek(state["step"])
        if here["order"] != self._identity["order"]:
            self._identity = here
            self._assembler.draw.set_order(here["order"])
        blend = self._assembler.draw.blend
        if blend is not None:
            blend.load(state["blend"], state["step"] * self._assembler.batch_size)
        self.faults.clear()
        self.quarantine.clear()
        self._new_faults.clear()
        self._num_read = 0


def _stop(ahead: ReadAhead[Made], assembler: Assembler) -> None:
    assembler.stop()
    ahead.stop()


def _parse_fields(fields: Mapping[str, Field | str] | str) -> dict[str, Field]:
    if isinstance(fields, str):
        return schema(fields)
    plain = {name: spec for name, spec in fields.items() if isinstance(spec, str)}
    parsed = schema(plain) if plain else {}
    # The order of the caller; a schema's optional mark ("audio?") is no part of the name.
    return {
        name.rstrip("?"): parsed[name.rstrip("?")] if name in plain else spec  # type: ignore[misc]
        for name, spec in fields.items()
    }


def _open_datasets(urls: Urls | Mapping[str, Urls], storage: Storage, on_error: Any) -> list[Shards]:
    if not isinstance(urls, Mapping):
        return [Shards(open_manifest(urls, storage=storage, on_error=on_error), storage)]
    if not urls:
        raise ValueError("urls names no sources")
    if len(urls) > MAX_SOURCES:
        raise ValueError(f"urls names {len(urls)} sources; at most {MAX_SOURCES} can be blended")
    datasets = []
    for name, part in urls.items():
        try:
            datasets.append(
                Shards(open_manifest(part, storage=storage, on_error=on_error), storage, name=str(name))
            )
        except DataError as error:
            raise DataError(f"source {name}: {error}") from error
    return datasets


def _check_left_out(faults: list[Fault], datasets: list[Shards], budget: float) -> None:
    total = sum(shards.manifest.num_shards for shards in datasets) + len(faults)
    if len(faults) > budget * total:
        some = "; ".join(fault.detail for fault in faults[:3])
        raise DataError(
            f"{len(faults)} of {total} shards can't be used whole, more than the error budget of {budget:.3%}: {some}"
        )


def _fingerprint(datasets: list[Shards], is_blend: bool) -> str:
    if not is_blend:
        return datasets[0].manifest.fingerprint
    digest = hashlib.blake2b(digest_size=16)
    for shards in datasets:
        digest.update(f"{shards.name}\0{shards.manifest.fingerprint}\0".encode())
    return digest.hexdigest()


def _source_differences(theirs: Any, ours: Any) -> list[str]:
    if theirs is None or ours is None:
        if theirs is ours:
            return []
        return [f"sources: {_names(theirs)} in the state, {_names(ours)} here"]
    if list(theirs) != list(ours):
        return [f"sources: {_names(theirs)} in the state, {_names(ours)} here"]
    return [
        f"source {name}: {theirs[name][0]} samples in the state, {ours[name][0]} here"
        + (", other shards" if theirs[name][0] == ours[name][0] else "")
        for name in ours
        if list(theirs[name]) != list(ours[name])
    ]


def _names(sources: Any) -> str:
    return "one, unnamed" if sources is None else ", ".join(sources)


__all__ = ["Batch", "Fault", "Field", "ShardStream"]
