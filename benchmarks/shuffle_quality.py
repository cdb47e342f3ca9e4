"""How far from a uniform shuffle the orders are: mmscale's two, webdataset's buffer, and none.

    python benchmarks/shuffle_quality.py            # a table and benchmarks/results/shuffle_quality.json; 20 s
    python benchmarks/shuffle_quality.py --plot shuffle.png     # also a picture (with matplotlib: the extra "bench")
    python benchmarks/shuffle_quality.py --samples 20000 --batch-size 32 --out /tmp/small.json

The figures are mmscale.data.quality's: 1 is a uniform permutation's average (0 for displacement), smaller than 1 is
more even than chance. webdataset's orders are made by its own filters on whole numbers: shards in the order of its
`detshuffle`, their samples one after the other through its `shuffle`; with one reader, and with 16 (8 ranks of 2
workers, say) that have shards of their own, whose samples take turns. Data lie sorted by class
(class = sample * classes // samples), the hardest case for anything but a full permutation. Each order is measured in
several epochs; the table has means, the file each epoch. These are counts, not times: they don't depend on the machine.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import webdataset

from mmscale.data.order import FullOrder, WindowOrder
from mmscale.data.quality import shuffle_quality

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "shuffle_quality.json"


def webdataset_order(
    num_samples: int, per_shard: int, buffer: int, epoch: int, num_readers: int = 1
) -> np.ndarray:
    """As `WebDataset(urls, shardshuffle=len(urls), detshuffle=True, seed=0).shuffle(buffer)` in each reader."""
    num_shards = -(-num_samples // per_shard)
    shards = list(webdataset.detshuffle(num_shards, num_shards, 0, epoch - 1).run(iter(range(num_shards))))

    def read(reader: int) -> Iterator[int]:
        samples = (
            sample
            for shard in shards[reader::num_readers]
            for sample in range(shard * per_shard, min((shard + 1) * per_shard, num_samples))
        )
        return webdataset.shuffle(buffer, seed=epoch * num_readers + reader)(samples)

    turns = itertools.zip_longest(*map(read, range(num_readers)))
    return np.fromiter((s for turn in turns for s in turn if s is not None), np.int64, num_samples)


def contenders(args: argparse.Namespace) -> dict[str, Callable[[int], np.ndarray]]:
    n = args.samples
    positions = np.arange(n)
    full, window = FullOrder(0, n), WindowOrder(0, n, args.batch_size)
    return {
        "FullOrder": lambda epoch: full.at(epoch, positions),
        "WindowOrder": lambda epoch: window.at(epoch, positions),
        "webdataset shuffle(1000)": lambda epoch: webdataset_order(n, args.per_shard, 1000, epoch),
        "shuffle(1000), 16 readers": lambda epoch: webdataset_order(n, args.per_shard, 1000, epoch, 16),
        "webdataset shuffle(10000)": lambda epoch: webdataset_order(n, args.per_shard, 10_000, epoch),
        "shuffle(10000), 16 readers": lambda epoch: webdataset_order(n, args.per_shard, 10_000, epoch, 16),
        "no shuffle": lambda epoch: positions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--per-shard", type=int, default=10_000, help="samples in a shard, for webdataset")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, help="draw where the samples of each order come from")
    args = parser.parse_args()

    rows: dict[str, dict[str, list[float]]] = {}
    pictures = {}
    for name, order in contenders(args).items():
        for epoch in range(args.epochs):
            made = order(epoch)
            pictures[name] = made[:: max(1, len(made) // 4000)]
            for metric, value in shuffle_quality(made, args.batch_size, num_classes=args.classes).items():
                rows.setdefault(name, {}).setdefault(metric, []).append(value)
    metrics = list(rows["FullOrder"])
    print(f"{'':27}" + "".join(f"{metric.replace('_', ' '):>26}" for metric in metrics))
    for name, row in rows.items():
        print(f"{name:27}" + "".join(f"{statistics.mean(row[metric]):26.4g}" for metric in metrics))

    window = WindowOrder(0, args.samples, args.batch_size)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("mmscale", "numpy", "webdataset")},
        "config": {
            "samples": args.samples,
            "batch_size": args.batch_size,
            "samples_per_shard": args.per_shard,
            "classes": args.classes,
            "epochs": args.epochs,
            "stretch_batches": 64,
            "neighbours_within": 64,
            "window_order": {
                "lanes": window.num_lanes,
                "run_length": window.run_length,
                "runs_in_window": window.runs_in_window,
                "windows": window.num_windows,
            },
        },
        "values_by_epoch": rows,
        "means": {
            name: {metric: statistics.mean(row[metric]) for metric in metrics} for name, row in rows.items()
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot:
        draw(pictures, args.samples, args.plot)


def draw(pictures: dict[str, np.ndarray], num_samples: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(pictures), figsize=(3 * len(pictures), 3.2), sharey=True, layout="constrained"
    )
    for axis, (name, samples) in zip(axes, pictures.items(), strict=True):
        axis.plot(np.linspace(0, 1, len(samples)), samples / num_samples, ",", color="tab:blue")
        axis.set(title=name, xlabel="place in the epoch", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("place in the data set")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
