"""Attention on the CPU, forward and backward, against the plain PyTorch expression that a user would write.

    python benchmarks/cpu_attention.py            # float32, 2 threads, about 2 minutes

The plain form concatenates the sources, builds the mask from the lengths and gates and calls
`F.scaled_dot_product_attention`. Both forms run in turn, so that whatever else the machine does falls on both alike;
the ratio is that of their medians, plain over ours. Writes `benchmarks/results/cpu_attention.json`.

`--clock cpu` counts the processor's time instead of the wall's (with `--threads 1` the two agree on an idle machine):
the way to compare on a machine that other jobs share, where threads that wait for each other drown in noise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmscale_kernels import Source, cross_modal_attention
from mmscale_kernels.packed import packed_attention
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "cpu_attention.json"

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Form = Callable[[], Tensor]
Case = tuple[str, dict[str, Any], Form, Form, list[Tensor]]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def plain_sources(query: Tensor, sources: list[Source]) -> Tensor:
    keys = torch.cat([source.key for source in sources], 1) if len(sources) > 1 else sources[0].key
    values = torch.cat([source.value for source in sources], 1) if len(sources) > 1 else sources[0].value
    batch = query.shape[0]
    mask = None
    if any(source.lengths is not None for source in sources):
        seen = []
        for source in sources:
            size = source.key.shape[1]
            full = torch.full((batch,), size)
            lengths = full if source.lengths is None else source.lengths
            seen.append(torch.arange(size) < lengths[:, None])
        mask = torch.cat(seen, 1)[:, None, None]
    if any(source.gate is not None for source in sources):
        terms = []
        for source in sources:
            gate = torch.zeros(query.shape[2]) if source.gate is None else source.gate
            terms.append(gate[:, None, None].expand(-1, 1, source.key.shape[1]))
        added = torch.cat(terms, -1)[None]
        mask = added if mask is None else added.masked_fill(~mask, -math.inf)
    heads = (x.transpose(1, 2) for x in (query, keys, values))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


def plain_packed(
    qkv: Tensor, num_heads: int, offsets: tuple[int, ...], lengths: Tensor, gates: Tensor | None
) -> Tensor:
    columns = qkv.shape[1]
    column = torch.arange(columns)
    segment = torch.searchsorted(torch.tensor(offsets), column, right=True) - 1
    valid = column - torch.tensor(offsets)[segment] < lengths[:, segment]
    causal = (column < offsets[-1]) | (column <= column[:, None])
    mask = (causal & valid[:, None])[:, None]
    if gates is not None:
        mask = gates[segment].T[None, :, None].expand(1, -1, columns, -1).masked_fill(~mask, -math.inf)
    heads = (x.transpose(1, 2) for x in qkv.split(num_heads, 2))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)


def cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(1)
    for batch, heads, length, width in ((32, 4, 16, 16), (32, 4, 40, 32), (8, 8, 300, 64), (2, 8, 1000, 64)):
        shape = {"batch": batch, "heads": heads, "length": length, "width": width}

        def source(size: int, shape: dict[str, int] = shape, **known: Any) -> Source:
            wide = (shape["batch"], size, shape["heads"], shape["width"])
            return Source(leaf(*wide), leaf(*wide), **known)

        query = leaf(batch, length, heads, width)
        half = torch.randint(1, length + 1, (batch,), generator=generator)
        part = max(1, length // 3)
        gated = [source(part, gate=leaf(heads)), source(part, gate=leaf(heads)), source(length - 2 * part)]
        by_name = {
            "one source, full": [source(length)],
            "one source, lengths uniform in 1..L": [source(length, lengths=half)],
            "two sources": [source(part), source(length - part)],
            "three sources, two with gates": gated,
        }
        for name, sources in by_name.items():
            terms = [x for one in sources for x in (one.key, one.value, one.gate) if x is not None]
            yield (
                name, shape,
                lambda q=query, s=sources: cross_modal_attention(q, s),
                lambda q=query, s=sources: plain_sources(q, s),
                [query, *terms],
            )  # fmt: skip
        qkv = leaf(batch, length, 3 * heads, width)
        offsets = (0, length // 2)
        room = torch.tensor([offsets[1], length - offsets[1]])
        full = room.expand(batch, -1)
        lengths = 1 + (torch.rand(batch, 2, generator=generator) * room).long()
        for name, given, gates in (
            ("packed", full, None),
            ("packed, lengths", lengths, None),
            ("packed, lengths, gates", lengths, leaf(2, heads)),
        ):
            arguments = {"offsets": offsets, "lengths": given, "gates": gates}
            yield (
                name, shape,
                lambda x=qkv, a=arguments, h=heads: packed_attention(x, num_heads=h, causal=(False, True), **a),
                lambda x=qkv, a=arguments, h=heads: plain_packed(x, h, **a),
                [qkv] if gates is None else [qkv, gates],
            )  # fmt: skip


def measure(run: Case, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    name, shape, ours, plain, leaves = run
    arriving = torch.randn_like(ours())

    def once(form: Form) -> float:
        start = clock()
        torch.autograd.grad(form(), leaves, arriving)
        return (clock() - start) * 1e3

    times: dict[str, list[float]] = {"ours": [], "plain": []}
    once(ours), once(plain)
    begun = time.perf_counter()
    while len(times["ours"]) < 7 or time.perf_counter() - begun < seconds:
        for key, form in (("ours", ours), ("plain", plain)):
            times[key].append(once(form))
    row: dict[str, Any] = {"case": name, **shape, "repeats": len(times["ours"])}
    for key, measured in times.items():
        quantiles = torch.tensor(measured).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row[f"{key}_ms"] = dict(zip(("p20", "p50", "p80"), (round(x, 4) for x in quantiles), strict=True))
    row["ratio"] = round(row["plain_ms"]["p50"] / row["ours_ms"]["p50"], 3)
    return row


def ceilings() -> dict[str, float]:
    """Return the best of some runs of a matrix product and of a copy, GFLOP/s and GB/s (read and written)."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    big, into = torch.randn(1 << 24), torch.empty(1 << 24)

    def best(form: Callable[[], object]) -> float:
        found = []
        for _ in range(7):
            start = time.perf_counter()
            form()
            found.append(time.perf_counter() - start)
        return min(found)

    return {
        "matmul_1024_gflops": round(2 * 1024**3 / best(lambda: a @ b) / 1e9, 1),
        "copy_64mib_gbps": round(2 * 4 * (1 << 24) / best(lambda: into.copy_(big)) / 1e9, 1),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--seconds", type=float, default=3.0, help="time a case, at least")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    report: dict[str, Any] = {
        "what": "forward + backward, ms; ratio = plain p50 / ours p50",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "clock": options.clock,
        "load_average_before": [round(x, 2) for x in os.getloadavg()],
        "dtype": "float32",
        "warm_up": 1,
        "commit": commit,
        "ceilings": ceilings(),
        "rows": [],
    }
    print(f"{'case':36} {'B':>3} {'H':>2} {'L':>5} {'D':>3} {'ours ms':>9} {'plain ms':>9} {'ratio':>6}")
    for case in cases():
        row = measure(case, options.seconds, CLOCKS[options.clock])
        report["rows"].append(row)
        print(
            f"{row['case']:36} {row['batch']:3} {row['heads']:2} {row['length']:5} {row['width']:3} "
            f"{row['ours_ms']['p50']:9.3f} {row['plain_ms']['p50']:9.3f} {row['ratio']:6.2f}",
            flush=True,
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
