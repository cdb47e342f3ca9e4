"""Offline tuning: time every candidate of the shipped tables on a device, and write the tables with its column.

    python -m mmscale_kernels.tune --out kernels/mmscale_kernels/tables
    python -m mmscale_kernels.tune attention losses --out /somewhere --repeats 15

A program never tunes itself (see `configs`), so this is where a device gets a column of its own. For each kernel
and shape class, each candidate is put in by `configs.override`, and the public operator, forward and backward, is timed
on the workloads below that use this kernel and class. Candidates take turns, so that a clock that drifts is unfair to
none; the figure is the median over the turns. The device's choice changes only where a candidate is faster by more than
`MARGIN`, so that noise doesn't rewrite a table, and with it the order of sums. All other columns stay as they are.

The trade-off: kernels are tuned one after the other with the others at their present choice, not all combinations. For
kernels that share nothing but a stream, that finds the same.

Needs a CUDA or ROCm device; without one it says so and exits with 2. `--device cpu` runs tiny workloads under Triton's
interpreter: good for testing this file, and for nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import configs
from .attention import Source, cross_modal_attention
from .configs import Config
from .deformable import deformable_attention
from .losses import contrastive_loss, sigmoid_loss
from .packed import packed_attention

# A candidate replaces the present choice if it takes less than (1 - MARGIN) of its time.
MARGIN = 0.02
# Workloads for one kernel and class: more of them cost time and hardly move a median.
MOST_WORKLOADS = 3

Step = Callable[[], object]
Table = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Workload:
    """A representative call: `build(device)` makes the inputs and returns what runs it once, forward and backward."""

    name: str
    family: str
    build: Callable[[torch.device], Step]


def _randn(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype).requires_grad_()


def _step(
    function: Callable[[], Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], backward: bool
) -> Step:
    def step() -> object:
        if not backward:
            with torch.no_grad():
                return function()
        out = function()
        outputs = [out] if isinstance(out, Tensor) else [tensor for tensor in out if tensor.requires_grad]
        return torch.autograd.grad(outputs, inputs, [torch.ones_like(tensor) for tensor in outputs])

    return step


def attention_step(
    device: torch.device,
    *,
    dtype: torch.dtype,
    batch: int,
    queries: int,
    keys: Sequence[int],
    heads: int,
    width: int,
    kv_heads: int | None = None,
    lengths: bool = False,
    starts: bool = False,
    gates: bool = False,
    bias: bool = False,
    causal: bool = False,
    dropout: float = 0.0,
    softmax: str = "joint",
    mass: bool = False,
    backward: bool = True,
) -> Step:
    """A call of `cross_modal_attention` with one source for each of `keys`; the last one is causal if asked."""
    query = _randn(device, dtype, batch, queries, heads, width)
    inputs, sources = [query], []
    for place, size in enumerate(keys):
        key, value = (_randn(device, dtype, batch, size, kv_heads or heads, width) for _ in range(2))
        inputs += [key, value]
        source: dict[str, Any] = {"key": key, "value": value, "causal": causal and place == len(keys) - 1}
        if lengths:  # half full on average
            source["lengths"] = torch.linspace(size // 4, size - size // 4, batch, device=device).to(
                torch.int32
            )
        if starts:
            source["starts"] = torch.full((batch,), size // 8, device=device, dtype=torch.int32)
        if gates:
            source["gate"] = _randn(device, torch.float32, heads)
            inputs.append(source["gate"])
        if bias:
            source["bias"] = _randn(device, dtype, 1, heads, queries, size)
            inputs.append(source["bias"])
        sources.append(Source(**source))
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "seed": 0 if dropout else None,
        "softmax": softmax,
        "return_mass": mass,
    }
    call = partial(cross_modal_attention, query, sources, backend="triton", **options)
    return _step(call, inputs, backward)


def packed_step(
    device: torch.device,
    *,
    dtype: torch.dtype,
    batch: int,
    segments: Sequence[int],
    heads: int,
    width: int,
    kv_heads: int | None = None,
    causal: bool = False,
    gates: bool = False,
    full: bool = False,
    backward: bool = True,
) -> Step:
    """A call of `packed_attention` with segments of these widths, three quarters full unless `full`."""
    qkv = _randn(device, dtype, batch, sum(segments), heads + 2 * (kv_heads or heads), width)
    inputs = [qkv]
    gate = None
    if gates:
        gate = _randn(device, torch.float32, len(segments), heads)
        inputs.append(gate)
    lengths = torch.tensor([[size if full else size * 3 // 4 for size in segments]] * batch, device=device)
    call = partial(
        packed_attention,
        qkv,
        num_heads=heads,
        offsets=[sum(segments[:place]) for place in range(len(segments))],
        lengths=lengths,
        causal=[False] * (len(segments) - 1) + [causal],
        gates=gate,
        backend="triton",
    )
    return _step(call, inputs, backward)


def loss_step(
    device: torch.device,
    *,
    dtype: torch.dtype,
    rows: int,
    width: int,
    sigmoid: bool = False,
    columns: int | None = None,
    labels: bool = False,
    weights: bool = False,
    smoothing: float = 0.0,
    backward: bool = True,
) -> Step:
    """A call of `sigmoid_loss` or `contrastive_loss` on this process alone."""
    x, y = (_randn(device, dtype, count, width) for count in (rows, columns or rows))
    scale = torch.tensor(10.0, device=device, requires_grad=True)
    options: dict[str, Any] = {"group": False, "backend": "triton"}
    if labels:
        options["labels"] = torch.arange(rows, device=device) // 2
    if weights:
        options["weights"] = torch.ones(rows, device=device)
    if sigmoid:
        bias = torch.tensor(-10.0, device=device, requires_grad=True)
        return _step(partial(sigmoid_loss, x, y, scale, bias, **options), [x, y, scale, bias], backward)
    call = partial(contrastive_loss, x, y, scale, label_smoothing=smoothing, **options)
    return _step(call, [x, y, scale], backward)


def deformable_step(
    device: torch.device,
    *,
    dtype: torch.dtype,
    batch: int,
    queries: int,
    heads: int,
    width: int,
    shapes: Sequence[tuple[int, int]],
    points: int = 4,
    backward: bool = True,
) -> Step:
    """A call of `deformable_attention`."""
    value = _randn(device, dtype, batch, sum(h * w for h, w in shapes), heads, width)
    places = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*places, 2, device=device).to(dtype).requires_grad_()
    weights = torch.rand(*places, device=device).to(dtype).requires_grad_()
    call = partial(deformable_attention, value, list(shapes), locations, weights, backend="triton")
    return _step(call, [value, locations, weights], backward)


def workloads(tiny: bool = False) -> list[Workload]:
    """What is timed: sizes of real training, or, for the interpreter, of nothing at all."""
    found: list[Workload] = []

    def add(family: str, name: str, builder: Callable[..., Step], **arguments: Any) -> None:
        found.append(Workload(name, family, partial(builder, **arguments)))

    dtypes = {"fp32": torch.float32} if tiny else {"bf16": torch.bfloat16, "fp32": torch.float32}
    for word, dtype in dtypes.items():
        for width in (16,) if tiny else (32, 64, 80, 128, 256):
            heads, batch = (1, 2) if tiny else (max(1, 1024 // width), 8)
            shape: dict[str, Any] = {"dtype": dtype, "batch": batch, "heads": heads, "width": width}
            for queries, keys in (
                ((20, (24,)),)
                if tiny
                else ((1344, (77,)), (1344, (257,)), (1024, (256, 77)), (1024, (1024,)), (4096, (4096,)))
            ):
                many = "+".join(map(str, keys))
                for flags in ({}, {"lengths": True, "gates": True}):
                    name = f"cross {word} D={width} {queries} x {many}{' lengths, gates' if flags else ''}"
                    add("attention", name, attention_step, queries=queries, keys=keys, **shape, **flags)
            if not tiny:
                name = f"cross {word} D={width} causal 2048"
                add("attention", name, attention_step, queries=2048, keys=(2048,), causal=True, **shape)
                name = f"cross {word} D={width} 512 x 512 bias"
                add("attention", name, attention_step, queries=512, keys=(512,), bias=True, **shape)
            for segments in ((16, 16),) if tiny else ((50, 32), (257, 256), (1024, 1024)):
                for gates in (False, True):
                    name = (
                        f"packed {word} D={width} {'+'.join(map(str, segments))}{' gates' if gates else ''}"
                    )
                    add(
                        "attention", name, packed_step, segments=segments, causal=True, gates=gates, **shape
                    )  # fmt: skip
        for rows, width in ((40, 16),) if tiny else ((8192, 64), (8192, 512), (16384, 768), (16384, 1152)):
            for sigmoid in (False, True):
                for backward in (True, False):
                    kind = f"{'sigmoid' if sigmoid else 'softmax'}{'' if backward else ' value'}"
                    name = f"{kind} {word} N={rows} D={width}"
                    add(
                        "losses", name, loss_step,
                        dtype=dtype, rows=rows, width=width, sigmoid=sigmoid, backward=backward,
                    )  # fmt: skip
        for queries, width in ((2, 8),) if tiny else ((300, 32), (13294, 32), (300, 64), (300, 128)):
            shapes = ((2, 2), (1, 1)) if tiny else ((100, 100), (50, 50), (25, 25), (13, 13))
            name = f"deformable {word} Lq={queries} D={width}"
            add(
                "deformable", name, deformable_step,
                dtype=dtype, batch=1 if tiny else 2, queries=queries, heads=1 if tiny else 8, width=width,
                shapes=shapes, points=1 if tiny else 4,
            )  # fmt: skip
    return found


class Timer:
    """Milliseconds that a step takes: events on a device, the clock on the CPU."""

    def __init__(self, device: torch.device, least_ms: float = 5.0) -> None:
        self.device = device
        self.least_ms = least_ms

    def warm(self, step: Step) -> None:
        """Compile, and fill caches."""
        for _ in range(2 if self.device.type == "cuda" else 1):
            step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def __call__(self, step: Step, *, times: int = 1) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(times):
                step()
            return (time.perf_counter() - start) * 1e3 / times
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / times

    def repetitions(self, once_ms: float) -> int:
        """How often a step must run for its time to be well above that of an event."""
        return max(1, math.ceil(self.least_ms / max(once_ms, 1e-3))) if self.device.type == "cuda" else 1


@dataclass(frozen=True)
class Finding:
    """What timing said of one kernel and shape class. The times are relative to the present choice."""

    kernel: str
    shape_class: str
    before: Config
    after: Config
    relative: Mapping[str, float]
    failed: Mapping[str, str]
    workloads: tuple[str, ...]

    def __str__(self) -> str:
        place = f"{self.kernel} / {self.shape_class}"
        times = f"{len(self.relative)} candidates on {', '.join(self.workloads)}"
        failures = "".join(f"\n    {config} fails: {why}" for config, why in self.failed.items())
        if self.after == self.before:
            return f"{place}: stays {_word(self.before)} ({times}){failures}"
        gain = 1 - self.relative[_word(self.after)]
        return (
            f"{place}: {_word(self.before)} -> {_word(self.after)}, {gain:.1%} less time ({times}){failures}"
        )


def _word(config: Config) -> str:
    return " ".join(f"{key}={value}" for key, value in config.items())


def used_by(step: Step) -> list[tuple[str, str]]:
    """The (kernel, shape class) pairs that a step asks the tables for."""
    before = dict(configs._used)
    configs._used.clear()
    try:
        step()
        return [key[:2] for key in configs._used]
    finally:
        configs._used.update(before)


def compare(
    steps: Mapping[str, Step],
    pair: tuple[str, str],
    candidates: Sequence[Config],
    before: Config,
    *,
    timer: Timer,
    repeats: int,
) -> Finding:
    """Time the candidates of one kernel and class in turns, and choose.

    steps: name -> what to time. before: the present choice; it is timed too, and may be among the candidates.
    A candidate that doesn't compile or launch is out, and the finding says why.
    """
    from triton.errors import TritonError

    contenders = [before, *(config for config in candidates if config != before)]
    failed: dict[str, str] = {}
    ratios: dict[str, list[float]] = {}
    for step in steps.values():
        times: dict[str, list[float]] = {}
        repetitions = 1
        for config in contenders:
            if _word(config) in failed:
                continue
            with configs.override(choices={pair: config}):
                try:
                    timer.warm(step)
                    if config is before:
                        repetitions = timer.repetitions(timer(step))
                except (TritonError, RuntimeError) as error:
                    lines = str(error).splitlines() or [type(error).__name__]
                    failed[_word(config)] = lines[0]
                    continue
            times[_word(config)] = []
        for _ in range(repeats):
            for config in contenders:
                if _word(config) in times:
                    with configs.override(choices={pair: config}):
                        times[_word(config)].append(timer(step, times=repetitions))
        medians = {config: statistics.median(values) for config, values in times.items()}
        # If the present choice itself fails here, the fastest one is the yardstick.
        present = medians.get(_word(before), min(medians.values(), default=math.nan))
        for word, median in medians.items():
            ratios.setdefault(word, []).append(median / present)
    relative = {
        word: statistics.geometric_mean(values) for word, values in ratios.items() if word not in failed
    }
    after = before
    if relative:
        best = min(relative, key=lambda word: relative[word])
        if _word(before) not in relative or relative[best] < (1 - MARGIN) * relative[_word(before)]:
            after = next(config for config in contenders if _word(config) == best)
    return Finding(*pair, before, after, relative, failed, tuple(steps))


def tune(
    families: Iterable[str],
    device: torch.device,
    *,
    todo: Sequence[Workload],
    timer: Timer,
    repeats: int = 9,
    say: Callable[[str], object] = print,
) -> dict[str, Table]:
    """Tune families of kernels on a device; returns their tables with the device's column.

    say: gets a line for each kernel and class as soon as it is decided, and for each that no workload reaches.
    """
    column = configs.device_key(device)
    result: dict[str, Table] = {}
    for family in families:
        table: Table = json.loads(json.dumps(configs.table(family)))
        reached: dict[tuple[str, str], list[Workload]] = {}
        for workload in todo:
            if workload.family == family:
                torch.manual_seed(0)
                for pair in used_by(workload.build(device)):
                    reached.setdefault(pair, []).append(workload)
        decided: dict[tuple[str, str], Config] = {}
        for kernel, classes in table.items():
            for shape_class, entry in classes.items():
                pair = kernel, shape_class
                if pair not in reached:
                    say(f"{kernel} / {shape_class}: no workload reaches it; left as it is")
                    continue
                chosen = reached[pair][:MOST_WORKLOADS]
                before: Config = entry[column if column in entry else "default"]
                with configs.override(choices=decided):
                    steps = {workload.name: workload.build(device) for workload in chosen}
                    finding = compare(steps, pair, entry["candidates"], before, timer=timer, repeats=repeats)
                entry[column] = decided[pair] = finding.after
                say(str(finding))
        result[family] = table
    return result


def dump(table: Table) -> str:
    """A table as the text of its file: one line for each configuration."""

    def entry(value: Any) -> str:
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"        {json.dumps(config)}" for config in value) + "\n      ]"
        return json.dumps(value)

    kernels = []
    for kernel, classes in table.items():
        texts = []
        for shape_class, columns in classes.items():
            lines = ",\n".join(f"      {json.dumps(name)}: {entry(value)}" for name, value in columns.items())
            texts.append(f"    {json.dumps(shape_class)}: {{\n{lines}\n    }}")
        kernels.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(texts) + "\n  }")
    return "{\n" + ",\n".join(kernels) + "\n}\n" if kernels else "{}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mmscale_kernels.tune", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "families", nargs="*", metavar="family", help=f"of {', '.join(configs.FAMILIES)}; all"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that gets FAMILY.json")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu only to test this command")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each candidate (default: 9)")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.families) - set(configs.FAMILIES)):
        parser.error(f"family is {unknown[0]!r}; it needs to be one of {', '.join(configs.FAMILIES)}")
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it needs to be at least 1")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("tuning needs a CUDA or ROCm device, and torch finds none here", file=sys.stderr)
        return 2
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        print("--device cpu needs Triton's interpreter (TRITON_INTERPRET=1)", file=sys.stderr)
        return 2
    families = options.families or list(configs.FAMILIES)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{configs.device_key(device)}: {', '.join(families)}", flush=True)
    todo = workloads(tiny=device.type == "cpu")
    for family in families:  # a file as soon as it is ready: a lost machine costs one family
        say = partial(print, flush=True)
        found = tune([family], device, todo=todo, timer=Timer(device), repeats=options.repeats, say=say)
        path = options.out / f"{family}.json"
        path.write_text(dump(found[family]), encoding="utf-8")
        print(f"wrote {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
