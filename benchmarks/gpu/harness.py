"""Measuring: cases, contenders, and how a pass is timed.

A `Case` makes inputs and lists contenders, ours and the peers. `run_case` checks each contender's error against fp64,
then times all of them interleaved, in bursts, each call on another copy of the inputs so that no cache holds them,
and emits one row for each contender and pass.

On a CUDA device a burst is queued behind a sleeping kernel and timed by events. So a time is the device's own, without
the gaps in which it waits for Python; what Python costs is the row's `host_ms`. The trade-off: where a contender
waits for the device inside the call, the gap counts, as it should.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu.worker import Fatal

Tensors = dict[str, Any]  # name -> Tensor, list of tensors, or None
Emit = Callable[..., None]

# Together larger than the L2 cache of any device by far (an H100 has 50 MB).
ROTATION_BYTES = 256 * 2**20
FATAL = (
    "CUDA error",
    "device-side assert",
    "illegal memory access",
    "unspecified launch failure",
    "HIP error",
)


@dataclass(frozen=True)
class Setting:
    """Where a run happens: the device, whether sizes are tiny, and contenders not to try again."""

    device: torch.device
    smoke: bool = False
    excluded: frozenset[tuple[str, str]] = frozenset()
    pass_seconds: float = 0.6

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile'd for a fixed shape; left as it is in a smoke run, where compiling would take minutes."""
        return function if self.smoke else torch.compile(function, dynamic=False)


@dataclass(frozen=True)
class Contender:
    """One way of computing a case. `run` takes the inputs and returns the one differentiable result.

    context is entered around both passes. prepacked: it reads query and the lists `packed` instead of all inputs.
    """

    name: str
    run: Callable[[Tensors], Tensor]
    needs_gpu: bool = False
    forward_only: bool = False
    prepacked: bool = False
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    note: str = ""

    def gradients(self, inputs: Tensors, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all leaves, or of those that it reads."""
        if self.prepacked:
            inputs = {"query": inputs["query"], "other": inputs["packed"], "grad_out": inputs["grad_out"]}
        return gradients(inputs, out)


@dataclass(frozen=True)
class Work:
    """What a pass has to do at least, the same for all contenders: operations, and bytes of inputs and results."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One comparison. `make(setting, sizes, seed)` returns tensors; those that require a gradient get one."""

    name: str
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    error_sizes: dict[str, Any]
    make: Callable[[Setting, dict[str, Any], int], Tensors]
    dense: Callable[[Tensors], Tensor]
    contenders: Callable[[Setting, Tensors, Emit], list[Contender]]
    work: Callable[[dict[str, Any], Tensors], dict[str, Work]]
    decide: Callable[[Tensors], Any]
    passes: tuple[str, ...] = ("forward", "forward_backward", "backward")
    select: Callable[[Tensors, Tensor], Tensor] = lambda inputs, out: (
        out
    )  # the part of a result that is compared
    about: dict[str, Any] = field(default_factory=dict)


def flat(inputs: Tensors) -> list[tuple[str, Tensor]]:
    """Every tensor of the inputs with its name; those in lists get a number."""
    found = []
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, list):
            found += [(f"{name}{i}", item) for i, item in enumerate(value) if isinstance(item, Tensor)]
    return found


def leaves(inputs: Tensors) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in flat(inputs) if x.requires_grad and not name.startswith("packed")]


def gradients(inputs: Tensors, out: Tensor) -> tuple[Tensor, ...]:
    wanted = [tensor for _, tensor in leaves(inputs)]
    return torch.autograd.grad(out, wanted, inputs.get("grad_out"))


def widened(inputs: Tensors) -> Tensors:
    """The same inputs in fp64, as leaves of their own."""

    def widen(value: Any) -> Any:
        if isinstance(value, list):
            return [widen(item) for item in value]
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    return {name: widen(value) for name, value in inputs.items()}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact value."""
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm()) / (float(exact.norm()) or 1.0)


def percentiles(samples: list[float]) -> dict[str, float]:
    """p20, p50 and p80 by linear interpolation."""
    ordered = sorted(samples)

    def at(part: float) -> float:
        place = part * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return {"p20": at(0.2), "p50": at(0.5), "p80": at(0.8)}


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def check_fatal(text: str) -> None:
    """Raise Fatal if the text of an error says that the device's context is gone."""
    if any(sign in text for sign in FATAL):
        raise Fatal(text)


def synchronize(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()


def call(contender: Contender, inputs: Tensors, step: str) -> None:
    """One pass, results dropped."""
    if step == "forward":
        with torch.no_grad(), contender.context():
            contender.run(inputs)
    else:
        with contender.context():
            contender.gradients(inputs, contender.run(inputs))


def extra_memory(setting: Setting, contender: Contender, inputs: Tensors, step: str) -> float | None:
    """MiB by which a pass raises the memory in use at its peak: results and gradients count, inputs don't."""
    if not setting.on_gpu:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(contender, inputs, step)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def burst(
    setting: Setting, contender: Contender, copies: list[Tensors], step: str, count: int, host: float
) -> tuple[list[tuple[float, float]], float]:
    """`count` calls: (ms of the whole, ms of its backward part) each, and seconds of Python's for one call."""
    samples: list[tuple[float, float]] = []
    if not setting.on_gpu:
        began = time.perf_counter()
        for number in range(count):
            inputs = copies[number % len(copies)]
            start = time.perf_counter()
            if step == "forward":
                call(contender, inputs, step)
                middle = time.perf_counter()
            else:
                with contender.context():
                    out = contender.run(inputs)
                    middle = time.perf_counter()
                    contender.gradients(inputs, out)
            end = time.perf_counter()
            samples.append(((end - start) * 1e3, (end - middle) * 1e3))
        return samples, (time.perf_counter() - began) / count
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(count)]
    # About 2e9 cycles a second; what Python needs to queue the burst, and half as much again.
    torch.cuda._sleep(int(2e9 * min(0.1, 1.5 * host * count)))
    began = time.perf_counter()
    for number, (start, middle, end) in enumerate(marks):
        inputs = copies[number % len(copies)]
        start.record()
        if step == "forward":
            call(contender, inputs, step)
            middle.record()
        else:
            with contender.context():
                out = contender.run(inputs)
                middle.record()
                contender.gradients(inputs, out)
                del out
        end.record()
    host_seconds = (time.perf_counter() - began) / count
    torch.cuda.synchronize()
    for start, middle, end in marks:
        samples.append((start.elapsed_time(end), middle.elapsed_time(end)))
    return samples, host_seconds


def measure(
    setting: Setting, contenders: list[Contender], copies: list[Tensors], step: str, fail: Callable[..., None]
) -> dict[str, dict[str, Any]]:
    """Interleaved samples of one pass: contender -> samples (whole and backward part, ms), host_ms, peak_extra_mib."""
    results: dict[str, dict[str, Any]] = {}
    plans: dict[str, tuple[Contender, int, float, int]] = {}
    for contender in contenders:
        try:
            call(contender, copies[0], step)  # compiles
            synchronize(setting)
            memory = extra_memory(setting, contender, copies[0], step)
            start = time.perf_counter()
            call(contender, copies[-1], step)
            host = time.perf_counter() - start
            synchronize(setting)
            estimate = time.perf_counter() - start
        except Exception as error:
            fail(contender.name, step, error)
            continue
        results[contender.name] = {"samples": [], "host": [], "peak_extra_mib": memory}
        count = 1 if setting.smoke else max(1, min(20, round(0.01 / estimate)))
        rounds = 2 if setting.smoke else max(5, min(30, round(setting.pass_seconds / (estimate * count))))
        plans[contender.name] = (contender, count, min(host, estimate), rounds)
    most = max((rounds for *_, rounds in plans.values()), default=0)
    for number in range(most):
        names = list(plans)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            contender, count, host, rounds = plans[name]
            if number >= rounds or name not in results:
                continue
            turned = copies[number % len(copies) :] + copies[: number % len(copies)]
            try:
                samples, seconds = burst(setting, contender, turned, step, count, host)
            except Exception as error:
                del results[name]
                fail(name, step, error)
                continue
            results[name]["samples"] += samples
            results[name]["host"].append(seconds * 1e3)
    return results


def errors_of(
    setting: Setting, case: Case, inputs: Tensors, contenders: list[Contender], fail: Callable[..., None]
) -> dict[str, dict[str, float]]:
    """Relative error of the result and of each gradient against dense fp64: contender -> name -> error."""
    wide = widened(inputs)
    exact = case.dense(wide)
    exact_gradients = gradients(wide, exact)
    found: dict[str, dict[str, float]] = {}
    for contender in contenders:
        try:
            with torch.set_grad_enabled(not contender.forward_only), contender.context():
                out = contender.run(inputs)
                row = {"out": relative_error(case.select(inputs, out), case.select(inputs, exact))}
                if not (contender.forward_only or contender.prepacked):
                    got = contender.gradients(inputs, out)
                    for (name, _), mine, right in zip(leaves(inputs), got, exact_gradients, strict=True):
                        row[f"d_{name}"] = relative_error(mine, right)
            found[contender.name] = row
        except Exception as error:
            fail(contender.name, "error", error)
    return found


def run_case(setting: Setting, case: Case, emit: Emit) -> None:
    """Measure one case and emit its rows. A contender that fails is recorded and left out; `Fatal` ends the process."""
    torch._dynamo.reset()
    # Two sizes, with and without gradients, for each of several contenders that share a compiled function.
    torch._dynamo.config.recompile_limit = 64
    failed: set[str] = set()

    def fail(name: str, step: str, error: BaseException) -> None:
        failed.add(name)
        gone = any(sign in str(error) for sign in FATAL)
        text = describe(error)
        # A traceback holds the frames, and so the memory, of what failed.
        error.__traceback__ = None
        emit("failure", case=case.name, contender=name, step=step, error=text, fatal=gone)
        if gone:
            raise Fatal(text)
        if setting.on_gpu:
            torch.cuda.empty_cache()

    def fitting(inputs: Tensors, say: Emit) -> list[Contender]:
        chosen = []
        for contender in case.contenders(setting, inputs, say):
            if contender.needs_gpu and not setting.on_gpu:
                say("absent", case=case.name, contender=contender.name, why="it needs a CUDA device")
            elif (case.name, contender.name) in setting.excluded:
                say("absent", case=case.name, contender=contender.name, why="it ended the process before")
            else:
                chosen.append(contender)
        return chosen

    sizes = case.tiny if setting.smoke else case.sizes
    small = case.tiny if setting.smoke else case.error_sizes
    inputs = case.make(setting, small, 0)
    errors = errors_of(setting, case, inputs, fitting(inputs, lambda *_, **__: None), fail)
    del inputs

    first = case.make(setting, sizes, 1)
    emit("decision", case=case.name, **case.decide(first))
    size = sum(tensor.numel() * tensor.element_size() for _, tensor in flat(first))
    count = max(2, min(32, math.ceil(ROTATION_BYTES / size)))
    copies = [first] + [
        case.make(setting, sizes, seed) for seed in range(2, 1 + (2 if setting.smoke else count))
    ]
    contenders = [c for c in fitting(first, emit) if c.name not in failed]
    work = case.work(sizes, first)
    timed: dict[str, dict[str, Any]] = {}
    for step in ("forward", "forward_backward"):
        able = [c for c in contenders if c.name not in failed and (step == "forward" or not c.forward_only)]
        for name, result in measure(setting, able, copies, step, fail).items():
            timed.setdefault(name, {})[step] = result
    for contender in contenders:
        for step in case.passes:
            source = timed.get(contender.name, {}).get("forward" if step == "forward" else "forward_backward")
            if source is None or not source["samples"]:
                continue
            part = 1 if step == "backward" else 0
            emit(
                "row",
                case=case.name,
                contender=contender.name,
                step=step,
                ms=percentiles([sample[part] for sample in source["samples"]]),
                num_samples=len(source["samples"]),
                host_ms=percentiles(source["host"])["p50"],
                peak_extra_mib=source["peak_extra_mib"],
                error=errors.get(contender.name),
                error_sizes=small,
                flops=work[step].flops,
                bytes=work[step].bytes,
                sizes=sizes,
                num_copies=len(copies),
                device=setting.device.type,
                dtype=str(flat(first)[0][1].dtype).removeprefix("torch."),
                tiny=setting.smoke,
                note=contender.note,
                **case.about,
            )
