"""Checks that no timing shows: same bits in every run, CUDA graphs, no waiting for the device, memory of a huge loss.

Each operator is called as one step, forward and backward, on fixed inputs; each check emits a line for each operator.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from mmscale_kernels import (
    Source,
    contrastive_loss,
    cross_modal_attention,
    deformable_attention,
    packed_attention,
    sigmoid_loss,
)
from torch import Tensor

from gpu.harness import Emit, Setting, check_fatal, describe, relative_error, widened
from gpu.losses import dense
from gpu.losses import make as make_loss

Step = Callable[[], list[Tensor]]


def operators(setting: Setting) -> dict[str, Callable[[], Step]]:
    """Makers of steps: each makes its inputs and returns what runs forward and backward on them."""
    device = setting.device
    many = 1 if setting.smoke else 8
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32

    def normal(*shape: int, wide: bool = False) -> Tensor:
        generator = torch.Generator(device=device).manual_seed(sum(shape))
        drawn = torch.randn(*shape, device=device, generator=generator)
        return (drawn if wide else drawn.to(dtype)).requires_grad_()

    def loss(kind: str) -> Step:
        operator: Any = contrastive_loss if kind == "softmax" else sigmoid_loss
        inputs = make_loss(kind, setting, {"n": 160 * many, "d": 32 * many}, 0)
        given = list(inputs.values())

        def step() -> list[Tensor]:
            value = operator(*given, group=False)
            return [value, *torch.autograd.grad(value, given)]

        return step

    def stepped(call: Callable[[], Tensor], given: list[Tensor]) -> Step:
        with torch.no_grad():
            weight = torch.randn_like(call())

        def step() -> list[Tensor]:
            out = call()
            return [out, *torch.autograd.grad(out, given, weight)]

        return step

    def attention(dropout_p: float) -> Step:
        query, key, value = (
            normal(3, 33 * many, 4, 64),
            normal(3, 40 * many, 2, 64),
            normal(3, 40 * many, 2, 64),
        )
        key2, value2 = normal(3, 33 * many, 4, 64), normal(3, 33 * many, 4, 64)
        gate, bias = normal(4, wide=True), normal(1, 4, 33 * many, 33 * many)
        lengths = torch.tensor([40 * many, 7, 0], device=device)
        seeds = torch.tensor([5, 6, 7], device=device)
        sources = [
            Source(key, value, lengths=lengths, gate=gate),
            Source(key2, value2, bias=bias, causal=True),
        ]
        more: dict[str, Any] = {"dropout_p": dropout_p, "seed": seeds} if dropout_p else {}
        given = [query, key, value, key2, value2, gate, bias]
        return stepped(lambda: cross_modal_attention(query, sources, **more), given)

    def short_keys() -> Step:
        query, key, value = normal(4, 50 * many, 4, 64), normal(4, 77, 4, 64), normal(4, 77, 4, 64)
        return stepped(lambda: cross_modal_attention(query, [Source(key, value)]), [query, key, value])

    def packed() -> Step:
        qkv, gates = normal(3, 60 * many, 12, 64), normal(2, 4, wide=True)
        lengths = torch.tensor([[20, 31], [5, 40], [0, 1]], device=device)
        return stepped(
            lambda: packed_attention(
                qkv, num_heads=4, offsets=(0, 20), lengths=lengths, causal=(False, True), gates=gates
            ),
            [qkv, gates],
        )

    def deformable() -> Step:
        shapes = [(8, 8), (5, 4)]
        value = normal(2, 84, 4, 32)
        places = torch.rand(2, 30 * many, 4, 2, 4, 2, device=device).requires_grad_()
        weights = normal(2, 30 * many, 4, 2, 4)
        return stepped(lambda: deformable_attention(value, shapes, places, weights), [value, places, weights])

    return {
        "contrastive_loss": lambda: loss("softmax"),
        "sigmoid_loss": lambda: loss("sigmoid"),
        "cross_modal_attention": lambda: attention(0.0),
        "cross_modal_attention, dropout": lambda: attention(0.1),
        "cross_modal_attention, short keys": short_keys,
        "packed_attention": packed,
        "deformable_attention": deformable,
    }


def each(setting: Setting, emit: Emit, check: str, judge: Callable[[Step], dict[str, Any]]) -> None:
    """Run one check on each operator; what it raises is a failed check."""
    for name, make in operators(setting).items():
        try:
            fields = judge(make())
        except Exception as error:
            if setting.on_gpu:
                torch.cuda.set_sync_debug_mode("default")
            fields = {"passed": False, "error": describe(error)}
            error.__traceback__ = None
        emit("check", check=check, operator=name, device=setting.device.type, **fields)
        check_fatal(fields.get("error", ""))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Bit for bit; NaN never counts as equal."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def determinism(setting: Setting, emit: Emit) -> None:
    """Bitwise equal results and gradients over many runs, other work between them."""
    num_runs = 3 if setting.smoke else 1000

    def judge(step: Step) -> dict[str, Any]:
        first = [tensor.clone() for tensor in step()]
        different = torch.zeros((), dtype=torch.int64, device=setting.device)
        for number in range(num_runs - 1):
            if number % 10 == 0:  # memory with another content, and blocks at other times
                torch.full((1 << 20,), float("nan"), device=setting.device)
            equal = [(a == b).all() for a, b in zip(first, step(), strict=True)]
            different += 1 - torch.stack(equal).all().long()
        return {"passed": int(different) == 0, "num_runs": num_runs, "num_different": int(different)}

    each(setting, emit, "determinism", judge)


def needs_gpu(setting: Setting, emit: Emit, check: str) -> bool:
    if not setting.on_gpu:
        emit("absent", case=check, why="it needs a CUDA device")
    return not setting.on_gpu


def graphs(setting: Setting, emit: Emit) -> None:
    """Capture forward and backward in one CUDA graph; a replay gives the bits of a plain run."""
    if needs_gpu(setting, emit, "check: CUDA graph"):
        return

    def judge(step: Step) -> dict[str, Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                plain = [tensor.clone() for tensor in step()]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for tensor in captured:
            tensor.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        return {"passed": same(plain, captured)}

    each(setting, emit, "CUDA graph", judge)


def no_sync(setting: Setting, emit: Emit) -> None:
    """No call, forward or backward, waits for the device."""
    if needs_gpu(setting, emit, "check: no synchronisation"):
        return

    def judge(step: Step) -> dict[str, Any]:
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"passed": True}

    each(setting, emit, "no synchronisation", judge)


def exact_at_any_scale(setting: Setting, emit: Emit) -> None:
    """Gradients of scale and bias, rows of any length, logits in the thousands, in fp32 against fp64."""
    for kind in ("softmax", "sigmoid"):
        try:
            inputs = make_loss(kind, setting, {"n": 48 if setting.smoke else 1000, "d": 96}, 0)
            given = {
                name: (value.detach().float() * (20.0 if name == "x" else 1.0)).requires_grad_()
                for name, value in inputs.items()
            }
            # Pairs that don't resemble each other, or the loss and its gradients would all but vanish.
            given["y"] = given["y"].detach().roll(1, 0).requires_grad_()
            given["scale"] = torch.tensor(100.0, device=setting.device, requires_grad=True)
            operator: Any = contrastive_loss if kind == "softmax" else sigmoid_loss
            loss = operator(*given.values(), group=False)
            wide = {name: value.detach().double().requires_grad_() for name, value in given.items()}
            exact = dense(kind, wide)
            got = [loss, *torch.autograd.grad(loss, list(given.values()))]
            want = [exact, *torch.autograd.grad(exact, list(wide.values()))]
            errors = {n: relative_error(a, b) for n, a, b in zip(["loss", *given], got, want, strict=True)}
            # fp32: logits of 2,000 carry errors of 2000 * 2^-24 = 1e-4 into probabilities; sums are better.
            fields: dict[str, Any] = {"passed": max(errors.values()) < 1e-3, "errors": errors}
        except Exception as error:
            fields = {"passed": False, "error": describe(error)}
        name = "contrastive_loss" if kind == "softmax" else "sigmoid_loss"
        emit("check", check="exact at scale 100", operator=name, device=setting.device.type, **fields)
        check_fatal(fields.get("error", ""))


def ceilings(setting: Setting, emit: Emit) -> None:
    """What this device can do: a bf16 product of 8192^3, and a copy of 2 GiB (bytes read and written counted)."""
    n, size = (64, 1 << 16) if setting.smoke else (8192, 2 << 30)
    a, b = (torch.randn(n, n, device=setting.device).bfloat16() for _ in range(2))
    product = torch.empty(n, n, device=setting.device, dtype=torch.bfloat16)
    seconds = median_seconds(setting, lambda: torch.mm(a, b, out=product))
    emit("ceiling", name="product", value=2 * n**3 / seconds / 1e12, unit="TFLOP/s", ms=seconds * 1e3)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=setting.device) for _ in range(2))
    seconds = median_seconds(setting, lambda: target.copy_(source))
    emit("ceiling", name="copy", value=2 * size / seconds / 1e12, unit="TB/s", ms=seconds * 1e3)


def median_seconds(setting: Setting, work: Callable[[], Any]) -> float:
    """Median seconds of 20 runs after 5 that don't count."""
    for _ in range(5):
        work()
    samples = []
    for _ in range(20):
        if setting.on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            samples.append(time.perf_counter() - began)
    return statistics.median(samples)


def large_softmax(setting: Setting, emit: Emit) -> None:
    """A softmax loss over more rows than any dense form could hold: time, memory, and the exact value.

    The rows repeat K different ones. Then a log-sum-exp is that of the K rows plus log(N / K), and a row's gradient
    K / N of that in the loss of the K rows: both are known in fp64.
    """
    n, d, num_rows = (512, 16, 64) if setting.smoke else (1_048_576, 768, 1024)
    base = make_loss("softmax", setting, {"n": num_rows, "d": d}, 0)

    def repeated(times: int) -> dict[str, Tensor]:
        return {
            name: value.detach().repeat(times, 1).requires_grad_() if value.dim() else value
            for name, value in base.items()
        }

    inputs = repeated(n // num_rows)
    given = list(inputs.values())
    fields: dict[str, Any] = {}
    before = 0
    if setting.on_gpu:
        contrastive_loss(*repeated(64).values(), group=False).backward()  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    loss = contrastive_loss(*given, group=False)
    got = torch.autograd.grad(loss, given)
    if setting.on_gpu:
        torch.cuda.synchronize()
        fields["peak_extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        fields["peak_total_mib"] = torch.cuda.max_memory_allocated() / 2**20
    fields["seconds"] = time.perf_counter() - began
    wide = widened(base)
    exact = dense("softmax", wide)
    want = torch.autograd.grad(exact, list(wide.values()))
    exact = exact.detach() + math.log(n / num_rows)
    errors = {"loss": relative_error(loss, exact)}
    for name, mine, right in zip(inputs, got, want, strict=True):
        if mine.dim():
            last = mine[-num_rows:].double() * (n / num_rows)
            errors[f"d_{name}"] = max(
                relative_error(last, right), relative_error(mine[:num_rows], mine[-num_rows:])
            )
        else:
            errors[f"d_{name}"] = relative_error(mine, right)
    # bf16: a gradient is rounded to 2^-9, its logits' gradients before the product as well; the loss is a sum in fp32
    # of logits of up to 100, each good to 100 * 2^-24.
    passed = errors.pop("loss") < 1e-4 and max(errors.values()) < 2e-2
    emit(
        "check",
        check="large softmax",
        operator="contrastive_loss",
        passed=passed,
        n=n,
        d=d,
        loss=float(loss.detach()),
        exact=float(exact),
        errors=errors,
        device=setting.device.type,
        **fields,
    )
