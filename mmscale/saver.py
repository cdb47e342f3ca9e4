"""Checkpoints written behind training's back: it is held for a copy into host memory, threads do the rest.

::

    saver = Saver(engine, run.checkpoints, config=config, check_owner=run.check_owner, attempt=run.attempt)
    held_s = saver.start(step, state)        # collective; waits for the save before, should it still be under way
    if saver.poll(): ...                     # each step; on rank 0, when a save has ended: tell all ranks, who then
    outcome = saver.settle()                 # collective: what has become of it
    saver.save(step, state)                  # collective: at the end, or to stop; returns when it is on the disk

The thread of each rank writes its files into `step-N.NONCE.tmp/`, to the disk itself, reads them back, and leaves
`done-R.json` there, or `failed-R.json`. When all have, the thread of rank 0 writes the manifest, renames the folder to
`step-N`, moves the pointer `latest`, and removes what needn't be kept. No thread takes part in a collective. Behind an
fsspec URL the objects have their names at once, and the manifest, written last, makes them a checkpoint.

The trade-off: host memory for one more copy of a rank's state, which is kept for the next time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mmscale.checkpoint import POINTER, TAG, check_file, read_manifest, seal, step_name, step_names
from mmscale.config import Config
from mmscale.doctor import code_hash
from mmscale.engine import Engine
from mmscale.errors import CheckpointError, ConfigError, Fenced
from mmscale.metrics import Event
from mmscale.store import MANIFEST, Fill, LocalStore, Store, digest, open_store, read

NICE = 10  # of the writing threads, so that a step loses little of a processor that both want
MIN_GOOD = 2  # verified checkpoints, below which nothing is removed
Fetched = tuple[str, Fill]  # a file of a checkpoint and what fills it


class Outcome(NamedTuple):
    """What has become of a save."""

    step: int
    place: str
    error: str | None  # in words; None: it is saved
    warnings: list[str]
    is_fenced: bool
    num_bytes: int
    write_s: float


@dataclass
class _Job:
    step: int
    nonce: str
    staging: str
    state: Mapping[str, Any]
    files: list[Fetched]
    begin_s: float = field(default_factory=time.monotonic)


class Saver:
    """Writes the checkpoints of a run. Every method but `poll` and `close` is collective.

    folder: a local one, or an fsspec URL. check_owner: raises Fenced where the run has been taken over; rank 0 asks
    before it commits. on_event: called on rank 0, on the caller's thread, with {"event": "save", ...} and {"event":
    "message", "text": ...}. attempt: its id, for the manifest.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path | str,
        *,
        config: Config,
        check_owner: Callable[[], None] = lambda: None,
        on_event: Callable[[Event], None] = lambda event: None,
        attempt: str | None = None,
    ) -> None:
        try:
            self._store: Store = open_store(folder)
        except OSError as error:
            raise CheckpointError(f"run.checkpoints: {error}") from None
        if self._store.is_remote and "nvme" in (
            config.engine.offload_optimizer,
            config.engine.offload_parameters,
        ):
            raise ConfigError(
                f"run.checkpoints={folder}: what is offloaded to NVMe can only be saved to a folder; "
                "give one, or offload to cpu"
            )
        self.error = ""
        self.last_saved: int | None = None
        self.num_failed = 0  # in a row
        self._engine, self._config, self._attempt = engine, config, attempt
        self._check_owner, self._on_event = check_owner, on_event
        self._is_first = engine.world.rank == 0
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._good: set[str] = set()  # names that this process has written or verified; rank 0
        self._scores: dict[int, float] = {}
        self._num_bytes = _first_guess(engine)

    def set_score(self, step: int, value: float) -> None:
        """What an evaluation at a step gave, larger is better: the best checkpoint is kept besides."""
        self._scores[step] = value

    def start(self, step: int, state: dict[str, Any]) -> float:
        """Takes a snapshot and lets it be written; the seconds for which it has held the caller.

        state: json-able, equal on every rank (the data's position and the like). Raises as `settle` does, of the save
        before.
        """
        begin = time.perf_counter()
        self._join()
        self.settle()
        nonce = error = None
        if self._is_first:
            try:
                nonce = uuid.uuid4().hex[:8]
                self._need_room()
            except OSError as caught:
                error = caught.strerror or str(caught)
        nonce, error = self._engine.world.gather((nonce, error))[0]
        if error is not None:
            self._outcome = self._failed(step, error, 0.0)
            return time.perf_counter() - begin
        staging = self._store.staging(step_name(step), nonce)
        job = _Job(step, nonce, staging, json.loads(json.dumps(state)), self._snapshot(staging))
        self._thread = threading.Thread(target=self._write, args=(job,), daemon=True, name="checkpoint")
        self._thread.start()
        return time.perf_counter() - begin

    def poll(self) -> Literal["saved", "failed"] | None:
        """On rank 0, whether a save has ended of which `settle` hasn't told yet. Costs nothing, asks nobody."""
        if self._outcome is None or not self._is_first:
            return None
        return "saved" if self._outcome.error is None else "failed"

    def settle(self) -> Outcome | None:
        """What has become of the save, once to all ranks; None while it is under way.

        Raises Fenced, and CheckpointError after `train.max_failed_saves` failures in a row.
        """
        outcome: Outcome | None = self._engine.world.gather(self._outcome if self._is_first else None)[0]
        if outcome is None:  # one that has come since the question is left for the next time
            return None
        self._outcome = None
        self._tell(outcome)
        if outcome.is_fenced:
            raise Fenced(outcome.error)
        if outcome.error is None:
            self.error, self.num_failed, self.last_saved = "", 0, outcome.step
            return outcome
        self.error = outcome.error
        self.num_failed += 1
        if self.num_failed >= self._config.train.max_failed_saves:
            raise CheckpointError(outcome.error)
        return outcome

    def wait(self) -> None:
        """Until no save is under way. Raises CheckpointError on all ranks if the last one failed."""
        self._join()
        outcome = self.settle()
        if outcome is not None and outcome.error is not None:
            raise CheckpointError(outcome.error)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """A save that is done when this returns, tried again until `train.max_failed_saves` have failed in a row."""
        while self.last_saved != step:
            self.start(step, state)
            self._join()
            self.settle()

    def close(self, timeout: float = 60.0) -> None:
        """Gives a save that is under way some time to end, where ranks end without asking each other."""
        if self._thread is not None:
            self._thread.join(timeout)

    # ------------------------------------------------------------------------------------------ on the step's thread

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _snapshot(self, staging: str) -> list[Fetched]:
        """Every file of this rank, of values that training won't touch."""
        engine = self._engine
        self._host.begin()
        # DeepSpeed copies what it keeps on NVMe itself, so the folder must be the real one.
        root = Path(self._store.place(staging)).absolute() if not self._store.is_remote else Path(staging)
        catcher = _Catcher(self._host, root)
        before = engine.deepspeed.checkpoint_engine
        engine.deepspeed.checkpoint_engine = catcher
        # DeepSpeed adds scripts that make model.safetensors of its files, and it is there.
        engine.deepspeed._copy_recovery_script = lambda folder: None
        try:
            engine.deepspeed.save_checkpoint(
                str(root), tag=TAG, client_state={"universal_checkpoint_info": {}}, save_latest=False
            )
        finally:
            engine.deepspeed.checkpoint_engine = before
        weights = self._host.copy(engine.weights())
        self._host.end()
        files = catcher.files
        if self._is_first:
            tokenizer = engine.model.text.tokenizer.to_str(pretty=False)
            files += [
                ("model.safetensors", lambda file: write_safetensors(file, weights)),
                ("tokenizer.json", lambda file: file.write(tokenizer.encode())),
                ("config.json", lambda file: file.write(self._config.to_json().encode())),
            ]
        return files

    def _need_room(self) -> None:
        """Raises OSError where a checkpoint doesn't fit, after having removed what needn't be kept. Rank 0."""
        free = self._store.free_bytes()
        if free is None or free >= self._num_bytes:
            return
        self._retain(MIN_GOOD)
        free = self._store.free_bytes() or 0
        if free < self._num_bytes:
            need, left = (f"{size / 2**20:,.0f} MiB" for size in (self._num_bytes, free))
            raise OSError(f"about {need} are needed and {left} are free")

    def _tell(self, outcome: Outcome) -> None:
        if not self._is_first:
            return
        for text in outcome.warnings:
            self._on_event({"event": "message", "text": text})
        if outcome.error is None:
            self._on_event(
                {
                    "event": "save",
                    "step": outcome.step,
                    "path": outcome.place,
                    "write_s": outcome.write_s,
                    "bytes": outcome.num_bytes,
                }
            )
        elif not outcome.is_fenced:
            number, limit = self.num_failed + 1, self._config.train.max_failed_saves
            self._on_event({"event": "message", "text": f"{outcome.error} (failure {number} of {limit})"})

    # ------------------------------------------------------------------------------------------ on the writing thread

    def _write(self, job: _Job) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        rank, store = self._engine.world.rank, self._store
        files: dict[str, tuple[int, str]] = {}
        error: str | None = None
        try:
            for name, fill in job.files:
                files[name] = store.write(f"{job.staging}/{name}", fill)
            for name, (size, expected) in files.items():
                check_file(store, f"{job.staging}/{name}", size, expected)
            self._mark(job, "done", rank, files)
        except Exception as caught:  # whatever it was: the others must not wait for it
            error = (caught.strerror if isinstance(caught, OSError) else None) or f"{caught}"
            self._give_up(job, rank, error)
        if self._is_first:
            self._outcome = self._commit(job)

    def _give_up(self, job: _Job, rank: int, error: str) -> None:
        """Frees what this rank has taken, so that there is room to say that it failed."""
        deadline = time.monotonic() + self._config.engine.timeout
        while time.monotonic() < deadline:
            for name, _ in job.files:
                with suppress(OSError):
                    self._store.remove(f"{job.staging}/{name}")
            with suppress(OSError):
                self._mark(job, "failed", rank, error)
                return
            time.sleep(0.2)

    def _mark(self, job: _Job, what: str, rank: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self._store.replace(f"{job.staging}/{what}-{rank}.{job.nonce}.json", data)

    def _commit(self, job: _Job) -> Outcome:
        name, store = step_name(job.step), self._store
        try:
            files = self._collect(job)
            self._check_owner()
            store.write(f"{job.staging}/{MANIFEST}", lambda file: file.write(self._manifest(job, files)))
            store.commit(job.staging, name)
        except Fenced as error:
            if not store.is_remote:  # there the new owner writes to the same names
                store.remove(job.staging)
            return self._failed(job.step, str(error), time.monotonic() - job.begin_s, is_fenced=True)
        except Exception as caught:
            with suppress(OSError):
                store.remove(job.staging)
            words = (caught.strerror if isinstance(caught, OSError) else None) or str(caught)
            return self._failed(job.step, words, time.monotonic() - job.begin_s)
        self._good.add(name)
        warnings = []
        try:
            store.replace(POINTER, f"{name}\n".encode())
            self._retain(self._config.train.keep_checkpoints)
        except OSError as error:
            warnings.append(f"{store.place(name)} is saved, but tidying up failed: {error}")
        self._num_bytes = int(1.1 * sum(size for size, _ in files.values()))
        seconds = time.monotonic() - job.begin_s
        return Outcome(job.step, store.place(name), None, warnings, False, self._num_bytes, seconds)

    def _collect(self, job: _Job) -> dict[str, tuple[int, str]]:
        """The files of all ranks, when all have written them. Raises OSError when all have ended and one failed."""
        store, waiting = self._store, set(range(self._engine.world.size))
        files: dict[str, tuple[int, str]] = {}
        failures: list[str] = []
        give_up_s = None
        marks: set[str] = set()
        while waiting:
            names = set(store.names(job.staging)) - marks
            for rank in sorted(waiting):
                done, failed = (f"{what}-{rank}.{job.nonce}.json" for what in ("done", "failed"))
                if done in names:
                    files.update(json.loads(read(store, f"{job.staging}/{done}")))
                elif failed in names:
                    failures.append(f"rank {rank}: {json.loads(read(store, f'{job.staging}/{failed}'))}")
                else:
                    continue
                marks.add(done if done in names else failed)
                waiting.discard(rank)
            if failures and give_up_s is None:
                give_up_s = time.monotonic() + self._config.engine.timeout
            if give_up_s is not None and time.monotonic() > give_up_s:
                failures.append(f"no word of ranks {sorted(waiting)}")
                break
            if waiting:
                time.sleep(store.poll_s)
        if failures:
            raise OSError("; ".join(failures))
        for mark in marks:
            store.remove(f"{job.staging}/{mark}")
        if isinstance(store, LocalStore):  # DeepSpeed itself copies what it has offloaded to NVMe
            root = store.folder / job.staging
            for path in root.glob(f"{TAG}/offloaded_tensors/**/*"):
                if path.is_file():
                    file = path.relative_to(root).as_posix()
                    files[file] = path.stat().st_size, digest(store, f"{job.staging}/{file}")
        return files

    def _manifest(self, job: _Job, files: dict[str, tuple[int, str]]) -> bytes:
        engine = self._engine
        return seal(
            {
                "step": job.step,
                "world_size": engine.world.size,
                "zero_stage": engine.zero_stage,
                "attempt": self._attempt,
                "config": hashlib.sha256(self._config.to_json().encode()).hexdigest(),
                "versions": {
                    **{name: importlib.metadata.version(name) for name in ("mmscale", "torch", "deepspeed")},
                    "code": code_hash(),
                },
                "seeds": {"run.seed": self._config.run.seed},  # every draw comes of it and the step
                "state": job.state,
                "files": dict(sorted(files.items())),
            }
        )

    def _failed(self, step: int, words: str, seconds: float, *, is_fenced: bool = False) -> Outcome:
        place = self._store.place(step_name(step))
        if not is_fenced:
            kept: list[str] = []
            with suppress(OSError):
                kept = step_names(self._store)[-1:] if self._is_first else []
            newest = (
                f"the newest good one is {self._store.place(kept[0])}" if kept else "there is none before it"
            )
            words = f"checkpoint {place} can't be written: {words}; {newest}"
        return Outcome(step, place, words, [], is_fenced, 0, seconds)

    def _retain(self, num: int) -> None:
        """Removes what is older than the newest `num` that verify, but for the best, and what killed runs left."""
        names, good, keep = step_names(self._store), 0, set()
        for name in reversed(names):
            if good < num:
                keep.add(name)
                good += self._is_good(name)
        scored = [name for name in names if int(name.removeprefix("step-")) in self._scores]
        if self._config.train.keep_best is not None and scored:
            keep.add(max(scored, key=lambda name: self._scores[int(name.removeprefix("step-"))]))
        for name in names:
            if name not in keep:
                self._store.remove(name)
        for name in self._store.names():
            left = name.removesuffix(".universal")
            if name.startswith("step-") and name not in keep and (left == name or left not in keep):
                self._store.remove(name)

    def _is_good(self, name: str) -> bool:
        if name not in self._good:
            try:
                for file, (size, expected) in read_manifest(self._store, name)["files"].items():
                    check_file(self._store, f"{name}/{file}", size, expected)
            except CheckpointError:
                return False
            self._good.add(name)
        return True


class HostCopy:
    """Copies nested values into host memory that is used again the next time.

    Tensors that share their memory share the copy. What is neither a tensor nor a container is taken as it is:
    DeepSpeed puts only plain values and descriptions of fixed layouts there.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._num_used = 0
        self._seen: dict[Any, Tensor] = {}

    def begin(self) -> None:
        self._num_used, self._waits = 0, False

    def end(self) -> None:
        """The copies hold from now on."""
        if self._waits:
            torch.cuda.synchronize()
        del self._buffers[self._num_used :]
        self._seen.clear()

    def copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._copy(value.detach())
        if isinstance(value, dict):
            copied = copy(value)
            copied.update({key: self.copy(item) for key, item in value.items()})
            return copied
        if type(value) in (list, tuple):
            return type(value)(self.copy(item) for item in value)
        return value

    def _copy(self, tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in self._seen:
            return self._seen[key]
        index, pinned = self._num_used, tensor.is_cuda
        self._num_used += 1
        if index == len(self._buffers) or not _fits(self._buffers[index], tensor):
            self._buffers[index : index + 1] = [
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            ]
        buffer = self._buffers[index]
        buffer.copy_(tensor, non_blocking=pinned)
        self._waits |= pinned
        self._seen[key] = buffer
        return buffer


def _fits(buffer: Tensor, tensor: Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


class _Catcher:
    """What DeepSpeed takes for a checkpoint engine: it keeps copies instead of writing."""

    def __init__(self, host: HostCopy, root: Path) -> None:
        self.files: list[Fetched] = []
        self._host, self._root = host, root

    def save(self, state_dict: Any, path: str) -> None:
        copied = self._host.copy(state_dict)
        name = Path(path).relative_to(self._root).as_posix()
        self.files.append((name, lambda file: torch.save(copied, file)))

    def makedirs(self, path: str, exist_ok: bool = False) -> None: ...

    def create(self, info: Any) -> None: ...

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None: ...

    def preserves_storage_sharing(self) -> bool:
        return True


_SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(file: Any, tensors: Mapping[str, Tensor]) -> None:
    """The safetensors format, tensor by tensor: the package's own writer makes a copy of all of them in memory first.

    A header's length in 8 bytes, little-endian, the header in JSON, then the bytes of the tensors.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        if tensor.numel():
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _first_guess(engine: Engine) -> int:
    """A little above what all ranks will write: float32 weights to train, their master copy, those to evaluate, and two
    Adam moments.
    """
    shapes = (getattr(p, "ds_numel", p.numel()) for p in engine.model.parameters())
    return int(sum(shapes) * 5 * 4 * 1.1)
