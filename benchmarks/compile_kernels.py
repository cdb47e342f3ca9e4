"""Compiles every Triton kernel ahead of time, for four kinds of device, on a machine that has none of them.

    python benchmarks/compile_kernels.py            # all: writes results/compiled_kernels.json and the README's table
    python benchmarks/compile_kernels.py --quick --out FILE    # the sm_90 choice, bf16, D = 64 alone; no README
    python benchmarks/compile_kernels.py --part 4 --out FILE   # each fourth variant, the same ones every time
    python benchmarks/compile_kernels.py --list --out FILE     # what would be compiled, without doing it

The public operators run on small CPU tensors, forward and backward, while the launch of a kernel is replaced by a
recorder that computes nothing. What triton would have specialised a launch on (types, ones, divisibility by 16,
constants) is taken from its own code, and compiled for `GPUTarget`s by the compilers in triton's wheel. So whatever an
operator launches is compiled, under the names of the tables' kernels and shape classes that it asked for.

For sm_90 all candidates of the tables are compiled, for the other targets the choice that they would take. One row is
one kernel, class, configuration and target; variants of it (dtypes, flags) are joined, and the worst figure counts.
There are several for sm_90's choice, and one for each of the others, to keep this a matter of minutes.

What this can't say: whether results are right (the interpreter's tests do) and how fast it is (a device does).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "kernels"))
# Before triton is imported: it warns without it, and 1 is what it does by itself.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch  # noqa: E402
import triton  # noqa: E402
from mmscale_kernels import configs, tune  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The target whose candidates are all compiled: that of the devices that the tables were made for.
TUNED = "sm_90"
INSTRUCTIONS = {
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "gfx942": ("v_mfma",),
}
RESULT = ROOT / "benchmarks" / "results" / "compiled_kernels.json"
README = ROOT / "benchmarks" / "README.md"

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One call of a public operator, forward and backward."""

    name: str
    build: Callable[[torch.device], tune.Step]
    quick: bool = False
    tf32: bool = False


def cases() -> list[Case]:
    """The calls whose launches are compiled: each flag on and off, not all combinations of them.

    A kernel's first case decides what is compiled for the other targets, so plain calls come first.
    """
    found = []

    def add(
        name: str,
        builder: Callable[..., tune.Step],
        *,
        quick: bool = False,
        tf32: bool = False,
        **arguments: Any,
    ) -> None:
        found.append(Case(name, partial(builder, **arguments), quick, tf32))

    for word, dtype in DTYPES.items():
        for width in (64, 128, 80, 16, 32, 256):
            if word == "fp16" and width != 64:
                continue  # it takes bf16's paths
            quick = word == "bf16" and width == 64
            where = f"{word} D={width}"
            shape: dict[str, Any] = {"dtype": dtype, "batch": 2, "heads": 2, "width": width}
            cross = partial(add, builder=tune.attention_step, **shape)
            packed = partial(add, builder=tune.packed_step, **shape)
            # Long, and short: all keys on chip, if there is such a form. Longer than any block of queries.
            long, short = {"queries": 1024, "keys": (512,)}, {"queries": 1024, "keys": (77,)}
            cross(name=f"cross {where} long", quick=quick, **long)
            cross(name=f"cross {where} 77 keys", quick=quick, **short)
            for keys in (10, 32, 50, 200):
                cross(name=f"cross {where} {keys} keys", queries=1024, keys=(keys,))
            cross(name=f"cross {where} bias", **long, bias=True)
            packed(name=f"packed {where} causal", quick=quick, segments=(512, 512), causal=True, gates=True)
            if width not in (64, 128):
                continue
            flags = {"lengths": True, "starts": True, "gates": True, "mass": True}
            cross(name=f"cross {where} short, two sources", queries=512, keys=(77, 130), **flags)
            cross(name=f"cross {where} long, two sources", queries=512, keys=(1024, 77), **flags)
            if word != "bf16":
                continue
            cross(name=f"cross {where} short, bias", **short, bias=True)
            cross(name=f"cross {where} long, dropout", **long, dropout=0.1)
            cross(name=f"cross {where} long, causal, grouped", **long, causal=True, kv_heads=1)
            if width != 64:
                continue
            cross(name=f"cross {where} short, four sources", queries=512, keys=(77, 257, 130, 50), **flags)
            cross(name=f"cross {where} per source", queries=512, keys=(77, 257), softmax="per_source")
            packed(name=f"packed {where} prefix alone", segments=(257, 50))
            packed(name=f"packed {where} short, grouped", segments=(50, 32), causal=True, kv_heads=1)
        for width in (64, 768, 80, 2304):
            quick = word == "bf16" and width == 64
            if word == "fp16" and width != 64:
                continue
            where = f"{word} D={width}"
            loss = partial(add, builder=tune.loss_step, dtype=dtype, width=width)
            loss(name=f"softmax {where}", rows=512, quick=quick)
            loss(name=f"sigmoid {where}", rows=512, quick=quick, sigmoid=True)
            if word == "fp16" or width in (80, 2304):
                continue
            if word == "fp32":
                loss(name=f"softmax {where}, TF32", rows=512, tf32=True)
                loss(name=f"sigmoid {where}, TF32", rows=512, tf32=True, sigmoid=True)
            loss(name=f"softmax {where}, odd", rows=300, columns=333)
            loss(name=f"sigmoid {where}, odd", rows=300, columns=333, sigmoid=True)
            loss(name=f"softmax {where}, labels", rows=512, labels=True, weights=True, smoothing=0.1)
            loss(name=f"sigmoid {where}, labels", rows=512, labels=True, weights=True, sigmoid=True)
            loss(name=f"sigmoid {where}, value", rows=512, backward=False, sigmoid=True)
        for width in (64, 16, 32, 80, 128, 256):
            if word == "fp16" and width != 64:
                continue
            quick = word == "bf16" and width == 64
            shapes = ((16, 16), (8, 8), (4, 4), (2, 2))
            sizes: dict[str, Any] = {"batch": 1, "heads": 2, "width": width, "queries": 300, "shapes": shapes}
            add(f"deformable {word} D={width}", tune.deformable_step, quick=quick, dtype=dtype, **sizes)
    return found


# --- capturing launches


class _Label(int):
    """An integer of a configuration that remembers which kernel and class it was chosen for."""

    place: tuple[str, str]


def _labelled(place: tuple[str, str], config: configs.Config) -> configs.Config:
    result = dict(config)
    for key, value in config.items():
        if type(value) is int:
            label = _Label(value)
            label.place = place
            result[key] = label
    return result


def _plain(value: Any) -> Any:
    return int(value) if type(value) is _Label else value


@dataclass
class Variant:
    """One specialisation of a kernel for a target, as triton would compile it, and the rows that it belongs to."""

    target: str
    kernel: JITFunction[Any]
    source: ASTSource
    options: Any
    rows: dict[str, Row] = field(default_factory=dict)


@dataclass
class Row:
    """A kernel (its function), the tables' kernel and class, the configuration, the target: what a figure is for."""

    kernel: str
    table: str
    shape_class: str
    config: configs.Config
    target: str
    chosen: bool = False
    cases: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        words = " ".join(f"{name}={value}" for name, value in sorted(self.config.items()))
        return " | ".join((self.kernel, self.table, self.shape_class, words, self.target))


@dataclass
class Captured:
    """All that was found: variants by what makes them one, and calls that were refused.

    unreached: classes that no case asks for. interpreted: classes that only the interpreter's choices lead to.
    """

    variants: dict[str, Variant] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)
    interpreted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def rows_by_key(self) -> dict[str, Row]:
        found: dict[str, Row] = {}
        for variant in self.variants.values():
            for key, row in variant.rows.items():
                known = found.setdefault(key, row)
                known.chosen |= row.chosen
                known.cases += [case for case in row.cases if case not in known.cases]
        return found


@contextmanager
def _on_a_device() -> Iterator[None]:
    """Let the operators take their Triton form for CPU tensors of any dtype."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("mmscale_kernels.") and hasattr(module, "triton_refusal"):
                stack.enter_context(mock.patch.object(module, "triton_refusal", return_value=None))
        yield


_binders: dict[tuple[int, str], Any] = {}


def _specialise(
    kernel: JITFunction[Any], target: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Variant:
    """What `JITFunction.run` makes of its arguments before it compiles: the same code, without a driver."""
    backend = make_backend(TARGETS[target])
    binder = _binders.get((id(kernel), target))
    if binder is None:
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _binders[id(kernel), target] = binder
    bound, specialization, rest = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, rest
    )
    return Variant(target, kernel, ASTSource(kernel, signature, constants, attributes), options)


def _key(variant: Variant) -> str:
    source = variant.source
    words = (
        variant.target, source.name, sorted(map(str, source.signature.items())),
        sorted(map(str, source.constants.items())), sorted(map(str, source.attrs.items())), variant.options.hash(),
    )  # fmt: skip
    return hashlib.sha256(repr(words).encode()).hexdigest()


def _is_switch(entry: Mapping[str, Any]) -> bool:
    """Whether a table's entry chooses between kernels, rather than how one is launched."""
    return all("num_warps" not in config for config in entry["candidates"])


@dataclass(frozen=True)
class Round:
    """One run of a case: for which target, with which candidates (None = the target's choice) and switches."""

    target: str = TUNED
    candidate: int | None = None
    switch: int | None = None

    def choices(self) -> dict[tuple[str, str], configs.Config]:
        """For each kernel and class a configuration."""
        chosen = {}
        for pair, entry in _entries().items():
            place = self.switch if _is_switch(entry) else self.candidate
            config = entry.get(self.target, entry["default"])
            if place is not None:
                config = entry["candidates"][place % len(entry["candidates"])]
            chosen[pair] = _labelled(pair, config)
        return chosen


def _entries() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (kernel, shape_class): entry
        for family in configs.FAMILIES
        for kernel, classes in configs.table(family).items()
        for shape_class, entry in classes.items()
    }


def capture(todo: Sequence[Case], targets: Sequence[str], *, candidates: bool) -> Captured:
    """Run the cases and record what they launch.

    `TUNED`'s choices are recorded in every case. The other targets, `TUNED`'s candidates (if asked), and what only
    another setting of a switch leads to, are recorded in the first case that reaches a kernel and class.
    """
    found = Captured()
    entries = _entries()
    most = max((len(entry["candidates"]) for entry in entries.values()), default=0) if candidates else 0
    switches = {pair for pair, entry in entries.items() if _is_switch(entry)}
    num_switches = (
        max((len(entries[pair]["candidates"]) for pair in switches), default=0) if candidates else 0
    )
    reached: set[tuple[str, tuple[str, str]]] = set()
    launched: set[tuple[str, tuple[str, str]]] = set()
    asked: set[tuple[str, str]] = set()
    interpreted: set[tuple[str, str]] = set()
    case_name, now, choices, only = "", Round(), Round().choices(), None

    def record(kernel: JITFunction[Any], *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        labels = [value for value in (kwargs.get("num_warps"), *kwargs.values()) if type(value) is _Label]
        place = labels[0].place if labels else ("", "")
        name = kernel.fn.__qualname__
        launched.add((name, place))
        if only is not None and (name, place) not in only:
            return
        # The interpreter alone multiplies bf16 in fp32.
        plain = {key: False if key == "UPCAST" else _plain(value) for key, value in kwargs.items()}
        variant = _specialise(kernel, now.target, tuple(_plain(value) for value in args), plain)
        variant = found.variants.setdefault(_key(variant), variant)
        config = {key: _plain(value) for key, value in choices.get(place, {}).items()}
        if not labels:
            config = {key: plain[key] for key in ("num_warps", "num_stages") if key in plain}
        row = Row(name, *place, config, now.target)
        row = variant.rows.setdefault(row.key, row)
        row.chosen |= now.candidate is None
        if case_name not in row.cases:
            row.cases.append(case_name)

    def run(step: tune.Step) -> set[tuple[str, str]]:
        with configs.override(device=now.target, choices=choices):
            pairs = set(tune.used_by(step))
        if now.target != configs.INTERPRETER:
            asked.update(pairs)
        return pairs

    precision = torch.get_float32_matmul_precision()
    with _on_a_device(), mock.patch.object(JITFunction, "run", record), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in todo:
            case_name = case.name
            torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
            torch.manual_seed(0)
            try:
                step = case.build(torch.device("cpu"))
                turns: list[int | None] = [None]
                for switch in turns:
                    now, only = Round(switch=switch), None if switch is None else set()
                    choices = now.choices()
                    launched.clear()
                    used = run(step)
                    if switch is None and used & switches:
                        turns += range(num_switches)
                    only = launched - reached
                    reached |= only
                    rest = [
                        Round(name, switch=switch) for name in targets if name != TUNED or switch is not None
                    ]
                    rest += [Round(candidate=number, switch=switch) for number in range(most)]
                    for now in rest if only else ():
                        choices = now.choices()
                        run(step)
                # What only the interpreter's small sizes lead to is never compiled; here it counts as known.
                now, only = Round(configs.INTERPRETER), set()
                choices = now.choices()
                interpreted |= run(step)
            except ValueError as error:
                found.refused[case.name] = str(error)
    torch.set_float32_matmul_precision(precision)
    found.unreached = [" / ".join(pair) for pair in sorted(set(entries) - asked - interpreted)]
    found.interpreted = [" / ".join(pair) for pair in sorted(interpreted - asked)]
    return found


# --- compiling, and reading the result


@dataclass
class Figures:
    """What a compiled variant needs. spills: bytes a thread, stack or scratch. seconds: of CPU, to compile it."""

    shared: int
    registers: int
    spills: int
    has_dot: bool
    instruction: str
    seconds: float


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    assert found, f"cuobjdump says nothing of registers: {text!r}"
    return int(found[1]), int(found[2]) + int(found[3])


def _cpu_seconds() -> float:
    """Of this process and of the assemblers that it has started: what other work on the machine doesn't change."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def measure(variant: Variant) -> Figures:
    """Compile one variant, from triton's cache where it is there, and read what came out."""
    start = _cpu_seconds()
    target = TARGETS[variant.target]
    compiled = triton.compile(variant.source, target=target, options=dict(variant.options.__dict__))
    text = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    if target.backend == "cuda":
        registers, spills = _usage(compiled.asm["cubin"])
    else:
        registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", text)))
        spills = max(map(int, re.findall(r"\.private_segment_fixed_size:\s*(\d+)", text)))
    dots = re.findall(r"tt\.dot .*", compiled.asm["ttir"])
    half = any(re.search(r"tensor<[\dx]+x(bf16|f16)>", dot) for dot in dots)
    instruction = next((name for name in INSTRUCTIONS[variant.target] if name in text), "")
    return Figures(compiled.metadata.shared, registers, spills, half, instruction, _cpu_seconds() - start)


_jobs: list[Variant] = []


def _measure_job(place: int) -> tuple[int, Figures | str]:
    try:
        return place, measure(_jobs[place])
    except Exception as error:  # of any compiler: it is the result
        # Triton's errors quote the source; what is wrong with it stands last.
        return place, f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"


def compile_all(
    captured: Captured, part: int, processes: int, say: Callable[[str], object]
) -> list[dict[str, Any]]:
    """One object for each row: the worst figures of its variants, and the case that has them."""
    _jobs[:] = [variant for key, variant in captured.variants.items() if int(key, 16) % part == 0]
    rows = captured.rows_by_key
    results: dict[str, dict[str, Any]] = {}
    slowest: list[tuple[float, str]] = []
    start = time.perf_counter()
    # Forked, since a kernel and its source can't be sent; nothing has been compiled and no thread started before.
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        for done, (place, figures) in enumerate(pool.imap_unordered(_measure_job, range(len(_jobs))), 1):
            for key, row in _jobs[place].rows.items():
                result = results.setdefault(key, _empty(rows[key]))
                _join(result, row.cases[0], figures)
            if isinstance(figures, Figures):
                row = next(iter(_jobs[place].rows.values()))
                name = f"{row.kernel} {row.target} in {row.cases[0]}"
                slowest = sorted([*slowest, (figures.seconds, name)])[-5:]
            if done % 100 == 0 or done == len(_jobs):
                say(f"{done} of {len(_jobs)} variants, {time.perf_counter() - start:.0f} s")
    say("slowest: " + "; ".join(f"{name} {seconds:.0f} s" for seconds, name in reversed(slowest)))
    return [results[key] for key in sorted(results)]


def _empty(row: Row) -> dict[str, Any]:
    return {
        "kernel": row.kernel, "table": row.table, "class": row.shape_class, "config": row.config,
        "target": row.target, "chosen": row.chosen, "variants": 0, "shared_bytes": 0, "registers": 0,
        "spill_bytes": 0, "spills_in": None, "half_dots": 0, "instructions": [], "failed": {},
    }  # fmt: skip


def _join(result: dict[str, Any], case: str, figures: Figures | str) -> None:
    result["variants"] += 1
    if isinstance(figures, str):
        result["failed"][case] = figures
        return
    result["shared_bytes"] = max(result["shared_bytes"], figures.shared)
    result["registers"] = max(result["registers"], figures.registers)
    if (figures.spills, case) > (result["spill_bytes"], result["spills_in"] or "") and figures.spills:
        result["spill_bytes"], result["spills_in"] = figures.spills, case
    if figures.has_dot:
        result["half_dots"] += 1
        result["instructions"] = sorted({*result["instructions"], figures.instruction or "none"})


# --- the command


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The README's table: each choice for `TUNED`; of the other targets a line a kernel, the worst of its classes."""
    lines = [
        "| kernel | class | configuration | target | shared KiB | registers | spills B | halves multiplied by |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | --- |",
    ]

    def add(kernel: str, shape_class: str, config: str, target: str, of: Sequence[Mapping[str, Any]]) -> None:
        shared = max(row["shared_bytes"] for row in of) / 1024
        registers, spills = (max(row[name] for row in of) for name in ("registers", "spill_bytes"))
        instructions = ", ".join(sorted({name for row in of for name in row["instructions"]}))
        words = f"`{kernel}` | {shape_class} | {config} | {target} | {shared:.1f} | {registers} | {spills}"
        lines.append(f"| {words} | {instructions} |")

    others: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["chosen"] and row["target"] == TUNED:
            config = " ".join(f"{name}={value}" for name, value in row["config"].items())
            add(row["table"] or row["kernel"], row["class"], config, TUNED, [row])
        elif row["chosen"]:
            others.setdefault((row["target"], row["table"] or row["kernel"]), []).append(row)
    for (target, kernel), of in sorted(others.items()):
        add(kernel, f"worst of {len(of)}", "its choices", target, of)
    return "\n".join(lines)


def section(result: Mapping[str, Any]) -> str:
    """The README's part between the markers."""
    return f"""\
`python benchmarks/compile_kernels.py` made this with triton {result["versions"]["triton"]}; no device took part.
For sm_90 each kernel and class of the tables has a row with its choice, for the other targets each kernel has
one with the worst figures of its classes. `tests/test_compiled.py` holds them to the devices' limits, and
gives the reason of each spill for sm_90.

{table_of(result["rows"])}"""


def dump(result: Mapping[str, Any]) -> str:
    """The result as JSON, a row a line."""
    rows = ",\n".join(json.dumps(row) for row in result.get("rows", []))
    head = json.dumps({name: value for name, value in result.items() if name != "rows"}, indent=1)
    return f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'


def write_readme(text: str, path: Path = README) -> None:
    """Put a text between the markers in benchmarks/README.md."""
    begin, end = "<!-- compiled -->", "<!-- /compiled -->"
    old = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n"
    if begin not in old:
        old = f"{old.rstrip()}\n\n## Compiled kernels\n\n{begin}\n{end}\n"
    head, rest = old.split(begin, 1)
    tail = rest.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the sm_90 choice of bf16, D = 64")
    parser.add_argument("--part", type=int, default=1, metavar="N", help="compile one in N variants")
    parser.add_argument("--list", action="store_true", help="capture, don't compile")
    parser.add_argument("--out", type=Path, help="the result's file; the README is written only without it")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1; the interpreter compiles nothing, so it needs to be unset")
    if options.out is None and (options.quick or options.list or options.part != 1):
        parser.error("--quick, --list and --part need --out: the committed result has all")
    torch.set_num_threads(1)
    todo = [case for case in cases() if case.quick] if options.quick else cases()
    targets = [TUNED] if options.quick else list(TARGETS)
    captured = capture(todo, targets, candidates=not options.quick)
    say = partial(print, flush=True)
    for name, why in captured.refused.items():
        say(f"refused: {name}: {why}")
    for name in () if options.quick else captured.unreached:
        say(f"no case reaches {name}")
    say(f"{len(todo)} cases, {len(captured.rows_by_key)} rows, {len(captured.variants)} variants")
    result: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        "refused": captured.refused,
        "unreached": [] if options.quick else captured.unreached,
        "interpreter_alone": [] if options.quick else captured.interpreted,
    }
    if options.list:
        result["keys"] = sorted(captured.rows_by_key)
    else:
        start = time.perf_counter()
        result["rows"] = compile_all(captured, options.part, options.processes, say)
        say(f"compiled in {time.perf_counter() - start:.0f} s")
    path = options.out or RESULT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(result), encoding="utf-8")
    if options.out is None:
        write_readme(section(result))
    failed = [row for row in result.get("rows", []) if row["failed"]]
    for row in failed:
        say(f"failed: {row['kernel']} {row['class']} {row['config']} {row['target']}: {row['failed']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
