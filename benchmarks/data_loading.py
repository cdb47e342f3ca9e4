"""Data loading beside the peers: mmscale's ShardStream, webdataset and Megatron Energon on the same shards.

    make peers                                       # once: an environment for each peer, below .venv-peers/
    python benchmarks/data_loading.py                # some 30 minutes, on a machine that does nothing else
    python benchmarks/data_loading.py --only vga     # cases whose name holds this
    python benchmarks/data_loading.py --smoke        # tiny: shows that all works, and nothing of speed
    python benchmarks/data_loading.py --picture      # draws the results file anew

Writes benchmarks/results/data_loading.json and docs/images/data_loading.png (with matplotlib: the extra "bench").

Measured is what reaches the training loop in batches of 64: raw bytes, or uint8 tensors (64, 3, 224, 224) and captions.
Every contender is a process of its own in its own environment, with two workers: mmscale's are threads, the peers'
processes. They take turns (A B C A B C ...) on shards that lie in the page cache. The peers are unmodified releases,
used as their documentation shows (benchmarks/peers/run_*.py). In the cases named "same" they decode with
mmscale's decode_image, so that what is left is the loading alone. CPU seconds are user and system time of the process
and its workers, from making the loader to the workers' end, without imports. Memory is looked at five times a second:
the sum of the resident sizes of the process and its workers, which counts shared pages once for each of them, and the
proportional sizes, which count them once.

Ratios are of medians within one run. A contender that isn't installed has no row of figures, and the row says so.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "benchmarks" / "peers"
RESULTS = ROOT / "benchmarks" / "results" / "data_loading.json"
PICTURE = ROOT / "docs" / "images" / "data_loading.png"
BATCH, SIZE = 64, 224
ENVIRONMENTS = ROOT / ".venv-peers"  # what `make peers` makes
NUM_SHARDS = 8
MEASURES = ("samples_per_cpu_s", "samples_per_s", "peak_rss_mib", "peak_pss_mib", "first_batch_s")


@dataclass(frozen=True)
class Data:
    """Samples with pictures of (width, height) pixels, or of text alone: how many for raw cases and for decoding ones.

    As many as take the slower peers some seconds.
    """

    pixels: tuple[int, int] | None
    num_raw: int
    num_decoded: int
    noise: float = 0.0


DATA = {
    "text": Data(None, 131_072, 0),
    "256px": Data((256, 256), 16_384, 2_048, noise=20.0),
    "vga": Data((640, 480), 8_192, 1_024, noise=10.0),
}


@dataclass(frozen=True)
class Case:
    """What one table measures."""

    data: str
    kind: str  # raw, default, same: see benchmarks/peers/common.py
    workers: int = 2

    @property
    def name(self) -> str:
        return f"{self.data} {self.kind}" + ("" if self.workers else ", no workers")

    @property
    def shards(self) -> tuple[str, bool]:
        """Which shards it reads; cases of the same data and amount share them."""
        return self.data, self.kind == "raw"


CASES = [
    *(Case(data, "raw") for data in DATA),
    *(Case(data, "raw", workers=0) for data in DATA),
    *(Case(data, kind) for data in ("256px", "vga") for kind in ("default", "same")),
]
# contender -> (environment, what it adds to the config, the kinds it takes part in)
CONTENDERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "mmscale": ("mmscale", {}, ("raw", "default", "same")),
    "webdataset": ("webdataset", {}, ("raw", "default", "same")),
    "webdataset, normalised": ("webdataset", {"normalised": True}, ("default",)),
    "energon": ("energon", {}, ("raw", "default", "same")),
    "energon, pilrgb": ("energon", {"pil": True}, ("default",)),
}


def python_of(environment: str) -> Path | None:
    """The interpreter of a contender's environment, or None if `make peers` hasn't made it."""
    if environment == "mmscale":
        return Path(sys.executable)
    path = ENVIRONMENTS / environment / "bin" / "python"
    return path if path.exists() and (path.parent.parent / ".installed").exists() else None


def make_picture(rng: np.random.Generator, pixels: tuple[int, int], noise: float) -> bytes:
    """A JPEG (quality 90) of gradients, soft blobs and noise: about as hard to compress as a photograph."""
    width, height = pixels
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    image = np.empty((height, width, 3))
    for channel in range(3):
        slope = rng.normal(size=2) * 40
        image[..., channel] = 128 + slope[0] * x + slope[1] * y
    for _ in range(24):
        cx, cy, radius = rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.03, 0.5)
        hard = rng.uniform(2, 30)
        distance = np.hypot(x - cx, y - cy) / radius
        image += (1 / (1 + np.exp(hard * (distance - 1).clip(-20, 20))))[..., None] * rng.normal(size=3) * 60
    grain = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).filter(
        ImageFilter.GaussianBlur(0.7)
    )
    image += (np.asarray(grain) - 127.5) * (noise / 50)
    out = io.BytesIO()
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def make_shards(folder: Path, data: Data, num_samples: int, distinct: int = 256) -> dict[str, Any]:
    """The shards of one set, with mmscale's index. `distinct` pictures are drawn; bodies repeat, captions don't."""
    from mmscale.data.pack import ShardWriter

    rng = np.random.default_rng(0)
    words = [
        "red",
        "green",
        "small",
        "large",
        "old",
        "round",
        "cat",
        "tree",
        "house",
        "river",
        "bird",
        "star",
    ]
    bodies = (
        [make_picture(rng, data.pixels, data.noise) for _ in range(min(distinct, num_samples))]
        if data.pixels
        else []
    )
    start = time.perf_counter()
    with ShardWriter(folder, "shard", samples_per_shard=num_samples // NUM_SHARDS) as writer:
        for number in range(num_samples):
            text = f"{number:08d} a {' '.join(rng.choice(words, 8))}".encode()
            fields = {"jpg": bodies[number % len(bodies)], "txt": text} if bodies else {"txt": text}
            writer.write(f"{number:08d}", fields)
    return {
        "samples": num_samples,
        "shards": len(writer.paths),
        "bytes": sum(path.stat().st_size for path in writer.paths),
        "mean_jpeg_bytes": round(statistics.fmean(map(len, bodies))) if bodies else None,
        "pack_and_index_s": round(time.perf_counter() - start, 3),
    }


def prepare_energon(folder: Path, kind: str) -> float | None:
    """Energon's own index beside the shards: the seconds it took, or None where Energon isn't installed."""
    python = python_of("energon")
    if python is None:
        return None
    start = time.perf_counter()
    command = [python, PEERS / "run_energon.py", "prepare", folder, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"energon prepare failed: {(done.stderr or done.stdout)[-500:]}", file=sys.stderr)
    return round(time.perf_counter() - start, 3)


class _Memory(threading.Thread):
    """Peak of the resident (RSS) and proportional (PSS) sizes of a process and its descendants, in KiB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.rss, self.pss = pid, 0, 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            pids, rss, pss = [self.pid], 0, 0
            while pids:
                process = Path(f"/proc/{pids.pop()}")
                try:
                    for line in (process / "smaps_rollup").read_text().splitlines():
                        name, _, value = line.partition(":")
                        rss += int(value.split()[0]) if name == "Rss" else 0
                        pss += int(value.split()[0]) if name == "Pss" else 0
                    for task in (process / "task").iterdir():
                        pids += map(int, (task / "children").read_text().split())
                except (OSError, ProcessLookupError):  # it has just ended
                    continue
            self.rss, self.pss = max(self.rss, rss), max(self.pss, pss)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def run_once(contender: str, config: dict[str, Any], timeout_s: float = 600) -> dict[str, Any]:
    """One process of one contender: what its runner printed, and its memory. {"error": ...} if it failed."""
    environment, more, _ = CONTENDERS[contender]
    python = python_of(environment)
    assert python is not None
    runner = PEERS / f"run_{environment}.py"
    # One thread for each worker's arithmetic; torch's own threads would fight with the workers.
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [python, runner, json.dumps({**config, **more})],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=settings,
    )
    memory = _Memory(process.pid)
    memory.start()
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return {"error": f"took more than {timeout_s:.0f} s"}
    finally:
        memory.stop()
    if process.returncode:
        return {"error": "\n".join((err or out).strip().splitlines()[-3:])}
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    result["samples_per_cpu_s"] = result["samples"] / result["cpu_s"]
    result["samples_per_s"] = result["samples"] / result["wall_s"]
    result["peak_rss_mib"], result["peak_pss_mib"] = memory.rss / 1024, memory.pss / 1024
    return result


def summarise(repeats: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each measure's 20th, 50th and 80th percentile over the repeats."""
    found = {}
    for measure in MEASURES:
        values = [repeat[measure] for repeat in repeats]
        cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
        found[measure] = {f"p{p}": round(cuts[p // 10 - 1], 3) for p in (20, 50, 80)}
    return found


def measure(case: Case, folder: Path, pictures: bool, num_samples: int, repeats: int) -> dict[str, Any]:
    """One case: all contenders by turns, `repeats` times after a round that warms the caches and isn't counted."""
    config = {
        "shards": sorted(map(str, folder.glob("*.tar"))),
        "folder": str(folder),
        "batch": BATCH,
        "size": SIZE,
        "workers": case.workers,
        "kind": case.kind,
        "pictures": pictures,
    }
    rows: dict[str, Any] = {}
    taking = [name for name, (_, _, kinds) in CONTENDERS.items() if case.kind in kinds]
    for name in taking:
        installed = python_of(CONTENDERS[name][0]) is not None
        rows[name] = {"repeats": []} if installed else {"absent": "not installed: make peers"}
    for repeat in range(repeats + 1):
        for name in taking:
            row = rows[name]
            if "repeats" not in row:
                continue
            result = run_once(name, config)
            if "error" not in result and result["samples"] != num_samples:
                result = {"error": f"delivered {result['samples']} of {num_samples} samples"}
            kind = "torch.float32" if CONTENDERS[name][1].get("normalised") else "torch.uint8"
            expected = [kind, 3, SIZE, SIZE] if pictures and case.kind != "raw" else []
            if "error" not in result and result["form"] != expected:
                result = {"error": f"delivered {result['form']}, not {expected}"}
            if "error" in result:
                rows[name] = {"failed": result["error"]}
                continue
            row["versions"] = result.pop("versions")
            if repeat:
                row["repeats"].append(
                    {
                        key: round(value, 4) if isinstance(value, float) else value
                        for key, value in result.items()
                    }
                )
    for row in rows.values():
        if row.get("repeats"):
            row.update(summarise(row["repeats"]))
    ours = rows["mmscale"]
    ratios: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if name != "mmscale" and row.get("repeats") and ours.get("repeats"):
            ratios[name] = {
                measure: round(ours[measure]["p50"] / row[measure]["p50"], 2)
                for measure in ("samples_per_cpu_s", "samples_per_s")
            }
    found = {"case": case.name, **asdict(case), "contenders": rows, "mmscale_over": ratios}
    print(table(found), flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """The Markdown table of one case."""
    lines = [
        f"\n{found['case']}\n",
        "| contender | samples per CPU s | samples per s | peak RSS, MiB | peak PSS, MiB | first batch, s "
        "| mmscale's samples per CPU s over it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["contenders"].items():
        if not row.get("repeats"):
            why = row.get("absent") or f"failed: {row.get('failed')}"
            lines.append(f"| {name} | {' '.join(why.split())} | | | | | |")
            continue
        cells = [f"{row[measure]['p50']:,.{0 if row[measure]['p50'] >= 100 else 2}f}" for measure in MEASURES]
        ratio = found["mmscale_over"].get(name, {}).get("samples_per_cpu_s")
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines)


def setting(**more: Any) -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
        check=False,
    )
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "load_before": list(os.getloadavg()),
        **more,
    }


def draw(content: dict[str, Any], path: Path) -> None:
    """Samples per CPU second of each contender, one panel a case with workers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [case for case in content["cases"] if case["workers"]]
    figure, axes = plt.subplots(len(cases), figsize=(6.4, 1.15 * len(cases) + 0.5), dpi=140, squeeze=False)
    colours = dict(zip(CONTENDERS, ("#1f5fa8", "#c2571a", "#e0a37f", "#4d8f3a", "#9bc48c"), strict=True))
    for axis, case in zip(axes[:, 0], cases, strict=True):
        names = [name for name, row in case["contenders"].items() if row.get("repeats")]
        for place, name in enumerate(names):
            row = case["contenders"][name]["samples_per_cpu_s"]
            error = [[row["p50"] - row["p20"]], [row["p80"] - row["p50"]]]
            axis.barh(place, row["p50"], xerr=error, color=colours[name], height=0.7)
            axis.text(row["p80"], place, f"  {row['p50']:,.0f}", va="center", fontsize=7)
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(case["case"], fontsize=8, loc="left")
        axis.tick_params(axis="x", labelsize=6)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("samples per CPU second (median, 20th to 80th percentile)", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="TEXT", help="cases whose name holds this")
    parser.add_argument("--skip", metavar="TEXT", help="no cases whose name holds this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--smoke", action="store_true", help="tiny: 1 repeat of few samples; nothing is drawn"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", action="store_true", help="only draw what --out holds")
    parser.add_argument("--folder", type=Path, help="where the shards are made (default: a temporary folder)")
    args = parser.parse_args(argv)
    if args.picture:
        draw(json.loads(args.out.read_text()), PICTURE)
        return 0
    cases = [case for case in CASES if args.only is None or args.only in case.name]
    cases = [case for case in cases if args.skip is None or args.skip not in case.name]
    if not cases:
        parser.error(
            f"--only {args.only!r}: no case has that in its name; there are {', '.join(c.name for c in CASES)}"
        )
    repeats = 1 if args.smoke else args.repeats
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}")
    if args.smoke and args.out == RESULTS:
        parser.error("--smoke measures nothing worth keeping: give it an --out of its own")
    content = {
        **setting(),
        "config": {"batch": BATCH, "size": SIZE, "repeats": repeats, "warm_up": 1, "smoke": args.smoke},
    }
    content |= {"data": {}, "cases": []}
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="data-loading-") as temporary:
        for name, raw in dict.fromkeys(case.shards for case in cases):
            data, folder = DATA[name], Path(temporary) / name
            num_samples = data.num_raw if raw else data.num_decoded
            if args.smoke:
                num_samples = NUM_SHARDS * BATCH
            made = make_shards(folder, data, num_samples, 8 if args.smoke else 256)
            made["energon_prepare_s"] = prepare_energon(folder, "image" if data.pixels else "text")
            content["data"][f"{name} {'raw' if raw else 'decoded'}"] = made
            for case in [case for case in cases if case.shards == (name, raw)]:
                content["cases"].append(measure(case, folder, data.pixels is not None, num_samples, repeats))
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(
                    json.dumps(content, indent=1) + "\n"
                )  # a run that is cut off keeps what it has
            shutil.rmtree(folder)
    if not args.smoke:
        try:
            draw(content, PICTURE if args.out == RESULTS else args.out.with_suffix(".png"))
        except ImportError:
            print("no picture drawn: matplotlib isn't installed (the extra `bench`)", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
