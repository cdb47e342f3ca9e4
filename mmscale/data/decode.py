"""Bytes of a record to arrays: pictures to uint8 squares, sound to waveforms and log-mel spectrograms.

    decode_image(jpg, 224)                        # (3, 224, 224) uint8
    log_mel(decode_audio(flac, 16000))            # (frames, 80) float32, as Whisper's extractor makes them

Pictures stay uint8: normalising to floats here would cost more than decoding does and quadruple what has to
be moved, so it is left to the device. Whatever can't be decoded is a DataError with the cause; the stream
adds shard, key and field.
"""

import functools
import io
import math
import re

import numpy as np
import simplejpeg
import soundfile
import torch
from PIL import Image

from mmscale.errors import DataError

MAX_PIXELS = 1 << 26  # 8192 x 8192: larger pictures are taken for decompression bombs


def decode_image(data: bytes, size: int) -> np.ndarray:
    """The centre square of a picture, resized with antialiasing to (3, size, size) uint8 RGB.

    JPEG goes through libjpeg-turbo, which decodes at a fraction of the resolution where that suffices;
    everything else through Pillow: palettes, grey, 16 bit (the upper 8 are kept), CMYK; transparency is laid
    over white, and of an animation the first frame counts. The square is cut out before resizing (bicubic),
    so that a picture's long side costs nothing: up to half a pixel this is resizing the shorter side to
    `size` and cropping the centre.

    Raises DataError for bytes that are no picture, are cut short, or hold more than 2**26 pixels.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    pixels = _decode_jpeg(data, size) if data[:2] == b"\xff\xd8" else None  # (H, W, 3) uint8
    if pixels is None:
        pixels = _decode_with_pillow(data)
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(pixels[top : top + side, left : left + side]).permute(2, 0, 1)
    if side != size:
        square = torch.nn.functional.interpolate(
            square[None], (size, size), mode="bicubic", antialias=True, align_corners=False
        )[0]
    return square.contiguous().numpy()


def _decode_jpeg(data: bytes, size: int) -> np.ndarray | None:
    """(H, W, 3) uint8, or None for a file that libjpeg-turbo can't turn into RGB or has doubts about.

    Pillow is the judge of those: it reads CMYK, forgives stray bytes, and refuses files that are cut short.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        return simplejpeg.decode_jpeg(data, "RGB", min_height=size, min_width=size)
    except DataError:
        raise
    except ValueError:
        return None


def _decode_with_pillow(data: bytes) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(*image.size)
            if image.mode.startswith("I") or image.mode == "F":
                return _grey_from_deep(np.asarray(image))
            if image.has_transparency_data:
                colours = image.convert("RGBA")
                white = Image.new("RGBA", colours.size, "white")
                return np.array(Image.alpha_composite(white, colours).convert("RGB"))
            return np.array(image.convert("RGB"))
    except (DataError, MemoryError):
        raise
    except Exception as error:  # damaged files raise a dozen types, SyntaxError and struct.error among them
        raise DataError(f"not a picture that can be decoded: {_first_line(error)}") from error


def _grey_from_deep(values: np.ndarray) -> np.ndarray:
    """(H, W) of 16 bit integers or floats to (H, W, 3) uint8; floats hold 0 to 255."""
    if values.dtype.kind == "f":
        grey = np.nan_to_num(values).clip(0, 255).astype(np.uint8)
    else:
        grey = (values.astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"a picture of {width} x {height} pixels: at most {MAX_PIXELS} are allowed")
    if not width * height:
        raise DataError("a picture without pixels")


def _first_line(error: Exception) -> str:
    """What the error says, without the object in memory that stands for the file's name."""
    text = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
    return text.splitlines()[0][:200]


def decode_audio(data: bytes, sample_rate: int) -> np.ndarray:
    """A sound file (WAV, FLAC, OGG, MP3: what libsndfile reads) to (num_samples,) float32 in [-1, 1], mono.

    Channels are averaged, and the rate is changed to `sample_rate` (Hz) by a windowed sinc.
    Raises DataError for bytes that are no sound file, are without samples, or hold values that aren't finite.
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be at least 1 Hz, got {sample_rate}")
    try:
        channels, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"not a sound file that can be decoded: {_first_line(error)}") from error
    if not len(channels):
        raise DataError("a sound file without samples")
    wave = channels[:, 0] if channels.shape[1] == 1 else channels.mean(axis=1)
    if not np.isfinite(wave).all():
        raise DataError("a sound file with values that aren't finite")
    return np.ascontiguousarray(_resample(wave, rate, sample_rate))


_SINC_ZEROS = 16  # zero crossings of the sinc on each side


def _resample(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(n,) float32 at `rate` to (ceil(n * new_rate / rate),) at `new_rate`.

    Band-limited interpolation (Smith, "Digital Audio Resampling", 2002): each new sample is a sum of old ones
    around it, weighted by a sinc under a Hann window, cut off at 95 % of the lower Nyquist frequency.
    """
    if rate == new_rate:
        return wave
    common = math.gcd(rate, new_rate)
    up, down = new_rate // common, rate // common
    taps = _sinc_taps(up, down)  # (up, width)
    half = taps.shape[1] // 2
    num_out = -(-len(wave) * up // down)
    at = np.arange(num_out, dtype=np.int64) * down
    # New sample k lies at k * down / up: before it the old sample at the whole part, the rest picks the
    # phase.
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(wave, half), taps.shape[1])[at // up]
    return np.einsum("kt,kt->k", windows, taps[at % up])


@functools.lru_cache(maxsize=16)
def _sinc_taps(up: int, down: int) -> np.ndarray:
    """(up, width) float32: the weights of the `width` old samples around each of the `up` phases."""
    cutoff = 0.95 * min(1.0, up / down)
    half = math.ceil(_SINC_ZEROS / cutoff) + 1
    distance = np.arange(-half, half + 1) - np.arange(up)[:, None] / up  # in old samples
    window = np.cos(np.pi / 2 * np.clip(distance * cutoff / _SINC_ZEROS, -1, 1)) ** 2
    taps = np.sinc(distance * cutoff) * window
    return (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)


def log_mel(
    wave: np.ndarray, *, sample_rate: int = 16000, n_fft: int = 400, hop: int = 160, num_mels: int = 80
) -> np.ndarray:
    """(num_samples,) float32 to (frames, num_mels) float32: Whisper's features without its padding to 30 s.

    frames = num_samples // hop, and at least 1 (a shorter wave is padded with silence). Power spectrum under
    a periodic Hann window, Slaney mel filters from 0 to the Nyquist frequency, log10, at most 8 (80 dB) below
    the clip's maximum, then (x + 4) / 4 (Radford et al., "Robust Speech Recognition via Large-Scale Weak
    Supervision", 2022).
    """
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"wave must have shape (num_samples,) with at least one sample, got {wave.shape}")
    shortest = max(hop, n_fft // 2 + 1)  # one frame, and what reflecting at the borders needs
    # np.pad also copies, so that torch doesn't complain about waves that mustn't be written to.
    samples = torch.from_numpy(np.pad(wave.astype(np.float32, copy=False), (0, max(0, shortest - len(wave)))))
    spectrum = torch.stft(
        samples, n_fft, hop, window=_hann(n_fft), center=True, pad_mode="reflect", return_complex=True
    )  # (n_fft // 2 + 1, frames + 1)
    power = torch.view_as_real(spectrum[:, :-1]).square().sum(dim=2)
    mel = torch.log10((power.T @ _mel_filters(sample_rate, n_fft, num_mels)).clamp(min=1e-10))
    mel = torch.maximum(mel, mel.max() - 8.0)
    return ((mel + 4.0) / 4.0).numpy()


@functools.lru_cache(maxsize=8)
def _hann(n_fft: int) -> torch.Tensor:
    return torch.hann_window(n_fft)


@functools.lru_cache(maxsize=8)
def _mel_filters(sample_rate: int, n_fft: int, num_mels: int) -> torch.Tensor:
    """(n_fft // 2 + 1, num_mels) float32: triangles of equal area, spaced evenly on Slaney's mel scale.

    The scale is linear up to 1 kHz (15 mel) and logarithmic above (27 mel for a factor of 6.4): Slaney,
    "Auditory Toolbox", 1998.
    """
    nyquist = sample_rate / 2
    top = nyquist * 3 / 200 if nyquist < 1000 else 15 + 27 * math.log(nyquist / 1000) / math.log(6.4)
    mels = np.linspace(0, top, num_mels + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(math.log(6.4) / 27 * (mels - 15)))  # Hz
    frequencies = np.linspace(0, nyquist, n_fft // 2 + 1)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))
    return torch.from_numpy(triangles.astype(np.float32))
