"""Decoding on one core: mmscale's decoders against Pillow's and soundfile's plain use, per CPU-second.

    python benchmarks/decode.py                 # some minutes; use an idle machine
    python benchmarks/decode.py --smoke         # a few seconds, to see that it runs; its numbers mean nothing
    python benchmarks/decode.py --out FILE      # in place of benchmarks/results/decode.json

The other side of a picture is webdataset's default, `decode("pilrgb")` (Image.open and convert("RGB")), then a centre
crop, Pillow's bicubic resize and an array of channels first; of a sound it is soundfile.read, the channels' mean and
soxr at HQ. The two take turns on the same bodies; the time is that of this process on the CPU, all threads together.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from PIL import Image

from mmscale.data.decode import decode_audio, decode_image

ROOT = Path(__file__).resolve().parent.parent
SIZE = 224
RATE = 16_000


def textured(height: int, width: int, seed: int) -> Image.Image:
    """A picture with a photograph's spectrum (power falls as 1 / frequency**2.4) and a hard edge."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.2
    smooth = np.fft.irfft2(noise, s=(height, width))
    smooth = smooth / smooth.std() * 40 + 128
    smooth[:, height // 4 : height // 2, width // 3 : width // 2] += 50
    return Image.fromarray(np.ascontiguousarray(smooth.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)))


def picture_bodies(height: int, width: int, format: str, count: int) -> list[bytes]:
    bodies = []
    for seed in range(count):
        buffer = io.BytesIO()
        textured(height, width, seed).save(buffer, format, **({} if format == "PNG" else {"quality": 90}))
        bodies.append(buffer.getvalue())
    return bodies


def sound_bodies(rate: int, count: int) -> list[bytes]:
    bodies = []
    for seed in range(count):
        wave = np.cumsum(np.random.default_rng(seed).standard_normal(10 * rate))
        wave -= np.convolve(wave, np.ones(101) / 101, "same")
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.5 * wave / np.abs(wave).max(), rate, format="FLAC", subtype="PCM_16")
        bodies.append(buffer.getvalue())
    return bodies


def pillow_image(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def plain_audio(data: bytes) -> np.ndarray:
    wave, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    mono = np.ascontiguousarray(wave.mean(axis=1))
    return mono if rate == RATE else soxr.resample(mono, rate, RATE, quality="HQ")


def measure(
    bodies: list[bytes],
    ours: Callable[[bytes], Any],
    plain: Callable[[bytes], Any],
    repeats: int,
    passes: int,
) -> dict[str, Any]:
    """Bodies per CPU-second of both, taken by turns, and their ratio of medians."""
    found: dict[str, list[float]] = {"mmscale": [], "plain": []}
    for repeat in range(repeats + 1):
        for name, function in (("mmscale", ours), ("plain", plain)):
            start = time.process_time()
            for _ in range(passes):
                for body in bodies:
                    function(body)
            seconds = time.process_time() - start
            if repeat:  # the first one warms up
                found[name].append(passes * len(bodies) / max(seconds, 1e-9))
    row: dict[str, Any] = {}
    for name, values in found.items():
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        row[name] = {f"p{p}_per_cpu_s": round(cuts[p // 10 - 1], 1) for p in (20, 50, 80)}
        row[name]["all"] = [round(value, 1) for value in values]
    row["ratio_p50"] = round(row["mmscale"]["p50_per_cpu_s"] / row["plain"]["p50_per_cpu_s"], 3)
    return row


def setting(**more: Any) -> dict[str, Any]:
    """Machine, versions and commit of a measurement."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"],
        capture_output=True,
        text=True,
    )
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "pillow", "simplejpeg", "soundfile", "soxr")},
        "libsndfile": soundfile.__libsndfile_version__,
        "machine": platform.machine(),
        "cpu": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **more,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny: only to see that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    count, passes = (2, 1) if arguments.smoke else (24, 8)
    repeats = 2 if arguments.smoke else arguments.repeats
    rows = []
    sides = {"256 px": (256, 256), "VGA": (480, 640), "1280x1024": (1024, 1280)}
    for format in ("JPEG", "PNG", "WEBP"):
        for name, (height, width) in sides.items():
            if format != "JPEG" and name == "1280x1024":
                continue
            bodies = picture_bodies(height, width, format, count)
            row = measure(bodies, lambda data: decode_image(data, SIZE), pillow_image, repeats, passes)
            rows.append({"case": f"{format} {name}", "mean_bytes": sum(map(len, bodies)) // count, **row})
            _tell(rows[-1])
    for rate in (16_000, 44_100):
        bodies = sound_bodies(rate, count)
        row = measure(bodies, lambda data: decode_audio(data, RATE), plain_audio, repeats, passes)
        rows.append({"case": f"FLAC {rate} Hz, 10 s", "mean_bytes": sum(map(len, bodies)) // count, **row})
        _tell(rows[-1])
    config = {"size": SIZE, "sample_rate": RATE, "repeats": repeats, "passes": passes, "bodies": count}
    content = {**setting(warm_up=1, smoke=arguments.smoke, **config), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")


def _tell(row: dict[str, Any]) -> None:
    print(
        f"{row['case']}: mmscale {row['mmscale']['p50_per_cpu_s']:,.0f}, plain "
        f"{row['plain']['p50_per_cpu_s']:,.0f} per CPU-second, {row['ratio_p50']:.2f}x",
        flush=True,
    )


if __name__ == "__main__":
    main()
