"""Memory and time of the contrastive losses on the CPU, against the dense PyTorch expressions, forward and backward.

    python benchmarks/loss_memory.py                   # N = 1,024 to 16,384 in float32; some minutes, 8 GiB
    python benchmarks/loss_memory.py --only memory     # or speed, or picture (drawn anew from the results)
    OMP_NUM_THREADS=1 python benchmarks/loss_memory.py --only speed    # on a machine that others use too

Writes `loss_memory.json` and `loss_speed.json` into benchmarks/results/ and draws the first as
docs/images/loss_memory.png (with matplotlib: the extra "bench").

Memory is by how much the largest resident size of a fresh process grows over one loss and its gradients, inputs
and their gradients left out. Times of the two forms are taken by turns, so that what else the machine does meets
both; each file has the 20th, 50th and 80th percentile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmscale_kernels import contrastive_loss, sigmoid_loss
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "loss_memory.png"
NUM_ROWS = (1_024, 2_048, 4_096, 8_192, 16_384)
WIDTHS = (64, 512)


def dense_contrastive(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits = scale * x @ y.T
    labels = torch.arange(len(x))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * x @ y.T + bias
    signs = 2 * torch.eye(len(x)) - 1
    return -F.logsigmoid(signs * logits).sum() / len(x)


# loss -> (dense form, this package's form, scale and bias at about their starting values)
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[float, ...]]] = {
    "contrastive": (dense_contrastive, contrastive_loss, (14.3,)),
    "sigmoid": (dense_sigmoid, sigmoid_loss, (10.0, -10.0)),
}
FORMS = ("dense", "tiled")


def make_inputs(loss: str, num_rows: int, width: int) -> list[Tensor]:
    """x, y of unit rows, and the scalars, all of which want gradients."""
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(num_rows, width, generator=generator), dim=1) for _ in range(2)]
    scalars = [torch.tensor(value) for value in LOSSES[loss][2]]
    return [tensor.requires_grad_() for tensor in (*features, *scalars)]


def step(loss: str, form: str, inputs: list[Tensor]) -> float:
    """One forward and backward pass; the loss."""
    for tensor in inputs:
        tensor.grad = None
    value = LOSSES[loss][FORMS.index(form)](*inputs)
    value.backward()
    return value.item()


def growth_mib(case: tuple[str, str, int, int]) -> tuple[float, float]:
    """(growth in MiB, the loss) of one forward and backward pass; to be called once in a process."""
    loss, form, num_rows, width = case
    step(loss, form, make_inputs(loss, 64, width))  # imports and thread pools are not the loss's
    inputs = make_inputs(loss, num_rows, width)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value = step(loss, form, inputs)
    gradients = 2 * num_rows * width * 4 / 2**20  # which any form has
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 - gradients, value


def memory(cases: list[tuple[str, str, int, int]]) -> list[dict[str, Any]]:
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case, (growth, value) in zip(cases, pool.imap(growth_mib, cases, chunksize=1), strict=True):
            loss, form, num_rows, width = case
            rows.append(
                {
                    "loss": loss,
                    "form": form,
                    "N": num_rows,
                    "D": width,
                    "growth_mib": round(growth, 1),
                    "value": value,
                }
            )
            print(f"{loss} {form} N={num_rows} D={width}: {growth:,.0f} MiB, loss {value:.6f}", flush=True)
    return rows


def speed(cases: list[tuple[str, int, int]], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for loss, num_rows, width in cases:
        inputs = make_inputs(loss, num_rows, width)
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        for repeat in range(repeats + 1):
            for form in FORMS:
                start = time.perf_counter()
                step(loss, form, inputs)
                if repeat:  # the first one warms up
                    seconds[form].append(time.perf_counter() - start)
        row: dict[str, Any] = {"loss": loss, "N": num_rows, "D": width}
        for form, found in seconds.items():
            cuts = statistics.quantiles(found, n=10, method="inclusive")
            row[form] = {f"p{p}_ms": round(1e3 * cuts[p // 10 - 1], 3) for p in (20, 50, 80)}
        row["speedup_p50"] = round(row["dense"]["p50_ms"] / row["tiled"]["p50_ms"], 3)
        rows.append(row)
        # As it goes: a run that is cut off keeps what it has.
        write("loss_speed", {**setting(repeats=repeats, warm_up=1), "rows": rows})
        print(
            f"{loss} N={num_rows} D={width}: dense {row['dense']['p50_ms']:,.1f} ms, "
            f"tiled {row['tiled']['p50_ms']:,.1f} ms, {row['speedup_p50']:.2f}x",
            flush=True,
        )
    return rows


def setting(**more: Any) -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
    )
    model = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "machine": platform.machine(),
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "passes": "forward and backward",
        **more,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(name: str, content: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def draw() -> None:
    """Memory against N, dense and tiled, from the results file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    content = json.loads((RESULTS / "loss_memory.json").read_text())
    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=140)
    for loss, colour in zip(LOSSES, ("#1f5fa8", "#c2571a"), strict=True):
        for form, style in zip(FORMS, ("--", "-"), strict=True):
            rows = [row for row in content["rows"] if (row["loss"], row["form"]) == (loss, form)]
            name = f"{loss}_loss" if form == "tiled" else f"{loss}, dense PyTorch"
            axes.plot(
                [row["N"] for row in rows],
                [row["growth_mib"] for row in rows],
                style,
                color=colour,
                marker="o",
                markersize=4,
                label=name,
            )
    width = content["rows"][0]["D"]
    axes.set(
        xscale="log", yscale="log", xlabel="pairs in the batch, N", ylabel="growth of resident memory, MiB"
    )
    axes.set_xticks(NUM_ROWS, [f"{n:,}" for n in NUM_ROWS])
    axes.minorticks_off()
    axes.set_title(f"Forward and backward on a CPU, float32, D = {width}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("memory", "speed", "picture"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--max-rows", type=int, default=NUM_ROWS[-1])
    args = parser.parse_args()
    sizes = [n for n in NUM_ROWS if n <= args.max_rows]
    if args.only in (None, "memory"):
        rows = memory([(loss, form, n, WIDTHS[0]) for loss in LOSSES for form in FORMS for n in sizes])
        write("loss_memory", {**setting(), "rows": rows})
    if args.only in (None, "speed"):
        speed([(loss, n, width) for n in sizes for width in WIDTHS for loss in LOSSES], args.repeats)
    if args.only != "speed":
        draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
