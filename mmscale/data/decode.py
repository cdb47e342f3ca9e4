"""Bytes of a record to arrays: pictures to uint8 squares, sound to waveforms and log-mel spectrograms.

    decode_image(jpg, 224)                        # (3, 224, 224) uint8
    decode_image_train(jpg, 224, rng)             # the same of a random crop, perhaps mirrored
    log_mel(decode_audio(flac, 16000))            # (frames, 80) float32, as Whisper's extractor makes them

Pictures stay uint8: normalising to floats here would cost more than decoding does and quadruple what has to
be moved, so it is left to the device. Bodies come from anywhere, so sizes are looked up in the header and
refused before anything is decoded. Whatever can't be used is a `BodyError` (a DataError) with a short `cause`;
the stream adds shard, key and field.
"""

import functools
import io
import json
import math
import re
import zipfile
from typing import Any, Literal

import numpy as np
import simplejpeg
import soundfile
import soxr
import torch
from PIL import Image, ImageOps

from mmscale.errors import DataError

MAX_PIXELS = 1 << 26  # 8192 x 8192: larger pictures are taken for decompression bombs
MAX_BYTES = 256 << 20  # of one body, and of what an .npz unpacks to
MAX_SECONDS = 3600  # of sound
MAX_FRAMES = MAX_SECONDS * 48_000  # of sound at its own rate: 660 MiB as float32
PICKLES = frozenset(
    {"pickle", "pkl", "pyd", "pt", "pth", "ckpt", "joblib", "dill"}
)  # what runs code when loaded

# Formats that Pillow decodes by itself: not EPS, which starts Ghostscript, and none of the rarely tried ones.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_BLOCK = 1 << 20  # samples of sound that are decoded at a time

Cause = Literal["undecodable", "too large", "missing", "refused"]


class BodyError(DataError):
    """A body that can't be used; `cause` is a short stable word, the message tells more."""

    def __init__(self, cause: Cause, message: str) -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.cause, str(self))


def check_body(data: bytes) -> None:
    """Raises BodyError "too large" for a body of more than MAX_BYTES."""
    if len(data) > MAX_BYTES:
        raise BodyError("too large", f"a body of {len(data):,} bytes: at most {MAX_BYTES:,} are allowed")


# --- pictures ---


def decode_image(
    data: bytes,
    size: int,
    *,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    orient: bool = False,
    out: torch.Tensor | None = None,
) -> np.ndarray:
    """The centre square of a picture, resized with antialiasing to (3, size, size) uint8 RGB.

    JPEG goes through libjpeg-turbo, everything else through Pillow: palettes, grey, 16 bit (the upper 8 are
    kept), CMYK; transparency is laid over white, and of an animation the first frame counts. The square is cut
    out before resizing, so that a picture's long side costs nothing: up to half a pixel this is resizing the
    shorter side to `size` and cropping the centre. A JPEG is decoded at 1/2, 1/4 or 1/8 where twice `size` is
    left: the resampling filter then still has two pixels for each that it makes.

    orient: turn the picture as its EXIF says. torchvision, open_clip and webdataset don't, and so neither is
    it done by default; turned pictures take Pillow's slower way.
    out: (3, size, size) uint8, such as a row of a batch, to write into; the result is a view of it.

    Raises BodyError for bytes that are no picture or are cut short ("undecodable"), or hold more than
    MAX_PIXELS pixels or MAX_BYTES bytes ("too large").
    """
    _check_size(size)
    return _decode(data, size, _centre_square, False, interpolation, orient, out)


def decode_image_train(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    orient: bool = False,
    out: torch.Tensor | None = None,
) -> np.ndarray:
    """A random crop of a picture, resized to (3, size, size) uint8 RGB, and mirrored half of the time if `flip`.

    The crop is drawn as torchvision's RandomResizedCrop draws it: its share of the area evenly from `scale`, its
    width over its height evenly in the logarithm from `ratio`, ten tries, then the largest centred crop within
    `ratio`. The default scale is open_clip's. It is drawn before decoding, from the header's size, so that large
    crops of large JPEGs are decoded at a fraction. As many numbers are drawn from `rng` whatever the arguments.
    The rest as `decode_image`.
    """
    _check_size(size)
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale must be two shares of the area, 0 < low <= high <= 1, got {scale}")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio must be two numbers, 0 < low <= high, got {ratio}")
    numbers = rng.random(23).tolist()
    crop = functools.partial(_random_crop, numbers=numbers, scale=scale, ratio=ratio)
    return _decode(data, size, crop, flip and numbers[22] < 0.5, interpolation, orient, out)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")


Box = tuple[int, int, int, int]  # top, left, height, width


def _centre_square(height: int, width: int) -> Box:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def _random_crop(
    height: int, width: int, *, numbers: list[float], scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[2 * attempt])
        shape = math.exp(low + (high - low) * numbers[2 * attempt + 1])
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[20] * (height - h + 1)), int(numbers[21] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


def _decode(
    data: bytes,
    size: int,
    crop: Any,
    mirrored: bool,
    interpolation: str,
    orient: bool,
    out: torch.Tensor | None,
) -> np.ndarray:
    check_body(data)
    if out is not None and (out.shape != (3, size, size) or out.dtype != torch.uint8):
        raise ValueError(f"out must be (3, {size}, {size}) uint8, got {tuple(out.shape)} {out.dtype}")
    found = _decode_jpeg(data, size, crop) if data[:2] == b"\xff\xd8" and not orient else None
    if found is None:
        pixels = _decode_with_pillow(data, orient)
        found = pixels, crop(*pixels.shape[:2])
    pixels, (top, left, height, width) = found
    square = torch.from_numpy(pixels[top : top + height, left : left + width]).permute(2, 0, 1)
    if (height, width) != (size, size):
        square = torch.nn.functional.interpolate(
            square[None], (size, size), mode=interpolation, antialias=True, align_corners=False
        )[0]
    if mirrored:
        square = square.flip(2)
    if out is not None:
        return out.copy_(square).numpy()
    return square.contiguous().numpy()


def _decode_jpeg(data: bytes, size: int, crop: Any) -> tuple[np.ndarray, Box] | None:
    """((H, W, 3) uint8, crop in it), or None for a file that libjpeg-turbo can't turn into RGB or has doubts about.

    Pillow is the judge of those: it reads CMYK, forgives stray bytes, and refuses files that are cut short.
    Only halves are used of the n / 8 that libjpeg-turbo offers: the others are slower than decoding in full.
    """
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        box = crop(height, width)
        factor = 1
        while factor < 8 and min(box[2:]) >= 4 * size * factor:
            factor *= 2
        if factor == 1:
            return simplejpeg.decode_jpeg(data, "RGB"), box
        least = -(-height // factor), -(-width // factor)
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except DataError:
        raise
    except ValueError:
        return None
    if pixels.shape[:2] != least:  # another factor was chosen: in doubt, in full
        return simplejpeg.decode_jpeg(data, "RGB"), box
    h, w = (max(1, min(round(side / factor), most)) for side, most in zip(box[2:], least, strict=True))
    return pixels, (
        min(round(box[0] / factor), least[0] - h),
        min(round(box[1] / factor), least[1] - w),
        h,
        w,
    )


def _decode_with_pillow(data: bytes, orient: bool = False) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            _check_pixels(*opened.size)
            image: Image.Image = ImageOps.exif_transpose(opened) if orient else opened
            if image.mode.startswith("I") or image.mode == "F":
                return _grey_from_deep(np.asarray(image))
            if image.has_transparency_data:
                colours = image.convert("RGBA")
                white = Image.new("RGBA", colours.size, "white")
                return np.array(Image.alpha_composite(white, colours).convert("RGB"))
            return np.array(image.convert("RGB"))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = re.search(r"\((\d+) pixels\)", str(error))
        pixels = f"{int(size[1]):,}" if size else "too many"
        raise BodyError(
            "too large", f"a picture of {pixels} pixels: at most {MAX_PIXELS} are allowed"
        ) from error
    except MemoryError as error:
        raise BodyError("too large", "a picture that doesn't fit into memory") from error
    except Exception as error:  # damaged files raise a dozen types, SyntaxError and struct.error among them
        cause: Cause = "too large" if "too large" in str(error).lower() else "undecodable"  # packed PNG text
        raise BodyError(cause, f"not a picture that can be decoded: {_first_line(error)}") from error


def _grey_from_deep(values: np.ndarray) -> np.ndarray:
    """(H, W) of 16 bit integers or floats to (H, W, 3) uint8; floats hold 0 to 255."""
    if values.dtype.kind == "f":
        grey = np.nan_to_num(values).clip(0, 255).astype(np.uint8)
    else:
        grey = (values.astype(np.int64).clip(0, 0xFFFF) >> 8).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BodyError(
            "too large", f"a picture of {width} x {height} pixels: at most {MAX_PIXELS} are allowed"
        )
    if not width * height:
        raise BodyError("undecodable", "a picture without pixels")


def _first_line(error: Exception) -> str:
    """What the error says, without the object in memory that stands for the file's name."""
    text = re.sub(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>", "", f"{type(error).__name__}: {error}")
    return text.splitlines()[0][:200]


# --- text, numbers and arrays ---


def decode_text(data: bytes) -> str:
    """UTF-8 (a byte order mark at the start is dropped) to a string; BodyError "undecodable" otherwise."""
    check_body(data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BodyError("undecodable", f"not UTF-8: {error.reason} at byte {error.start}") from error


def decode_json(data: bytes) -> Any:
    """A JSON document; BodyError "undecodable" for what is none, nests too deep or holds a number of 4,300 digits."""
    check_body(data)
    try:
        return json.loads(data)
    except RecursionError as error:
        raise BodyError("undecodable", "JSON that nests too deep") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BodyError("undecodable", f"not JSON: {_first_line(error)}") from error


def decode_int(data: bytes) -> np.ndarray:
    """A whole number as text, such as a class, to () int64."""
    text = decode_text(data[:100]).strip()
    try:
        value = int(text)
    except ValueError as error:
        raise BodyError("undecodable", f"not a whole number: {text[:40]!r}") from error
    if not -(2**63) <= value < 2**63 or len(data) > 100:
        raise BodyError("too large", f"{text[:40]} doesn't fit into 64 bits")
    return np.asarray(value, dtype=np.int64)


def decode_npy(data: bytes) -> np.ndarray:
    """An array in NumPy's format; objects, which are pickles, are "refused" before they are loaded."""
    check_body(data)
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read is None:
            raise ValueError(f"version {version[0]}.{version[1]} of the format")
        shape, _, dtype = read(stream)
        if dtype.hasobject:
            raise BodyError("refused", "an array of Python objects, which are pickles")
        if math.prod(shape) * dtype.itemsize > len(data) - stream.tell():
            raise ValueError(f"the header says {shape} of {dtype}, the body holds {len(data):,} bytes")
        return np.load(io.BytesIO(data), allow_pickle=False)
    except DataError:
        raise
    except Exception as error:  # the header is parsed as Python text, so anything may be wrong with it
        raise BodyError("undecodable", f"not an array that can be read: {_first_line(error)}") from error


def decode_npz(data: bytes) -> dict[str, np.ndarray]:
    """An archive of arrays by name; what unpacks to more than MAX_BYTES is refused before it is unpacked."""
    check_body(data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > MAX_BYTES:
                raise BodyError("too large", f"arrays of {total:,} bytes: at most {MAX_BYTES:,} are allowed")
            found = {}
            for entry in entries:
                if not entry.filename.endswith(".npy"):
                    raise BodyError("refused", f"{entry.filename[:80]!r} in an .npz is no .npy")
                with archive.open(entry) as body:  # reads file_size at most, whatever is packed
                    found[entry.filename.removesuffix(".npy")] = decode_npy(body.read(entry.file_size))
            return found
    except DataError:
        raise
    except Exception as error:  # zipfile raises BadZipFile, zlib.error, NotImplementedError, EOFError, ...
        raise BodyError("undecodable", f"not arrays that can be read: {_first_line(error)}") from error


def refuse(name: str) -> None:
    """Raises BodyError "refused" for a member whose name says that loading it would run code (a pickle)."""
    extension = name.rsplit(".", 1)[-1].lower()
    if extension in PICKLES:
        raise BodyError(
            "refused", f".{extension} may hold a pickle, which runs code when it is loaded; use .npy"
        )


# --- sound ---


def decode_audio(data: bytes, sample_rate: int) -> np.ndarray:
    """A sound file (WAV, FLAC, OGG, MP3: what libsndfile reads) to (num_samples,) float32 in [-1, 1], mono.

    Channels are averaged, and the rate is changed to `sample_rate` (Hz) by soxr at its quality HQ;
    num_samples = ceil(old * sample_rate / old rate). Decoded by blocks, so that memory goes by what the
    file holds and not by what its header says.
    Raises BodyError for bytes that are no sound file, are without samples, or hold values that aren't finite
    ("undecodable"), and for more than MAX_SECONDS or MAX_FRAMES ("too large").
    """
    if sample_rate < 1:
        raise ValueError(f"sample_rate must be at least 1 Hz, got {sample_rate}")
    check_body(data)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            rate, channels = sound.samplerate, sound.channels
            most = min(MAX_SECONDS * rate, MAX_FRAMES)
            # 2**63 - 1 is how libsndfile says that the header doesn't say.
            if most < sound.frames < 2**62:
                raise _too_long(sound.frames, rate)
            parts: list[np.ndarray] = []
            num_frames = 0
            block = max(1, _BLOCK // channels)
            while True:
                want = max(1, min(block, sound.frames - num_frames + 1))
                part = sound.read(want, dtype="float32", always_2d=True)
                num_frames += len(part)
                if num_frames > most:
                    raise _too_long(num_frames, rate)
                if len(part):
                    parts.append(part[:, 0] if channels == 1 else part.mean(axis=1))
                if len(part) < want:
                    break
    except (RuntimeError, TypeError, ValueError, AssertionError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise BodyError(
            "undecodable", f"not a sound file that can be decoded: {_first_line(error)}"
        ) from error
    if not num_frames:
        raise BodyError("undecodable", "a sound file without samples")
    wave = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if not np.isfinite(wave).all():
        raise BodyError("undecodable", "a sound file with values that aren't finite")
    return _resample(np.ascontiguousarray(wave), rate, sample_rate)


def _too_long(frames: int, rate: int) -> BodyError:
    return BodyError(
        "too large",
        f"a sound of {frames / rate:,.0f} s at {rate:,} Hz: at most {MAX_SECONDS:,} s "
        f"and {MAX_FRAMES:,} samples are allowed",
    )


def _resample(wave: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(n,) float32 at `rate` to (ceil(n * new_rate / rate),) at `new_rate`."""
    if rate == new_rate:
        return wave
    num_out = -(-len(wave) * new_rate // rate)
    try:
        found = soxr.resample(wave, rate, new_rate, quality="HQ")
    except (RuntimeError, ValueError) as error:
        raise BodyError("undecodable", f"{rate} Hz can't be changed to {new_rate} Hz: {error}") from error
    if len(found) >= num_out:
        return found[:num_out]
    return np.pad(found, (0, num_out - len(found)))  # soxr rounds the number of samples, at most one less


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


def log_mel_batch(
    waves: torch.Tensor,
    lengths: torch.Tensor,
    *,
    sample_rate: int = 16000,
    n_fft: int = 400,
    hop: int = 160,
    num_mels: int = 80,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves (B, T) float32 and their lengths (B,) to (mel (B, frames, num_mels) float32, int32 numbers of frames (B,)).

    The same as `log_mel` on each row alone, on the device of `waves`; what lies past a row's length doesn't
    count. Frames past a row's end are zeros; a row of length 0 has none. Without a synchronisation.
    """
    if waves.ndim != 2 or lengths.shape != waves.shape[:1]:
        raise ValueError(
            f"waves must be (B, T) and lengths (B,), got {tuple(waves.shape)} and {tuple(lengths.shape)}"
        )
    device = waves.device
    lengths = lengths.to(device, torch.int64)[:, None]
    shortest = max(hop, n_fft // 2 + 1)
    ends = lengths.clamp(min=shortest)
    longest = max(waves.shape[1], shortest)
    num_frames = longest // hop
    # Where each sample of the padded rows comes from: reflected at the row's own ends, as a single wave is.
    at = torch.arange(-(n_fft // 2), longest + n_fft // 2, device=device).abs()[None]
    at = torch.where(at >= ends, 2 * (ends - 1) - at, at)
    inside = (at >= 0) & (at < lengths)
    padded = torch.zeros(waves.shape[0], at.shape[1], device=device)
    if waves.shape[1]:
        padded = torch.where(inside, waves.float().gather(1, at.clamp(0, waves.shape[1] - 1)), padded)
    spectrum = torch.stft(
        padded, n_fft, hop, window=_hann(n_fft).to(device), center=False, return_complex=True
    )[:, :, :num_frames]
    power = torch.view_as_real(spectrum).square().sum(dim=3)  # (B, n_fft // 2 + 1, frames)
    mel = (power.transpose(1, 2) @ _mel_filters(sample_rate, n_fft, num_mels).to(device)).clamp(min=1e-10)
    mel = torch.log10(mel)
    counts = torch.where(lengths > 0, ends // hop, 0)
    valid = (torch.arange(num_frames, device=device) < counts)[:, :, None]
    top = mel.masked_fill(~valid, -torch.inf).amax(dim=(1, 2), keepdim=True)
    mel = (torch.maximum(mel, top - 8.0) + 4.0) / 4.0
    return torch.where(valid, mel, torch.zeros((), device=device)), counts[:, 0].to(torch.int32)


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
