"""Random changes to training samples, drawn from the generator that the stream hands out for each of them.

    Field("jpg", read, augment=lambda x, rng: image_augment(x, rng, shift=0.1, scale=0.1, flip=True))

All of it works on single samples in the reading threads, so that a sample's changes depend on its place in
the run and on nothing else. The trade-off is one cheap resampling (bilinear, on all geometric changes
together) in place of a pipeline of exact ones: a fraction of a millisecond at 64 px.
"""

import math

import numpy as np
import torch

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def image_augment(
    array: np.ndarray,
    rng: np.random.Generator,
    *,
    shift: float = 0.0,
    scale: float = 0.0,
    rotate_deg: float = 0.0,
    flip: bool = False,
    color: float = 0.0,
) -> np.ndarray:
    """(3, H, W) uint8 RGB to the same, moved, zoomed, turned, mirrored and tinted at random.

    shift: up to this share of the width and height, each way. scale: zoom between 1 / (1 + scale) and 1 +
    scale, evenly in its logarithm. rotate_deg: up to this angle, each way. What comes in at the borders
    repeats the edge.
    flip: mirror left and right, half of the time (not for pictures with text or sides in their captions).
    color: brightness, contrast and saturation each by a factor within 1 - color .. 1 + color.

    The numbers drawn from `rng` don't depend on the arguments. Returns `array` itself if nothing changes.
    """
    if array.ndim != 3 or array.shape[0] != 3 or array.dtype != np.uint8:
        raise ValueError(f"array must be (3, H, W) uint8, got {array.shape} {array.dtype}")
    if min(shift, scale, rotate_deg, color) < 0 or color > 1:
        raise ValueError("shift, scale, rotate_deg and color must be at least 0, and color at most 1")
    dx, dy, zoom, turn, mirror, *tints = rng.uniform(-1, 1, 8).tolist()
    mirrored = flip and mirror < 0
    if shift or scale or rotate_deg:
        pixels = _affine(
            array,
            dx=2 * shift * dx,
            dy=2 * shift * dy,
            zoom=(1 + scale) ** zoom,
            radians=math.radians(rotate_deg * turn),
            mirrored=mirrored,
        )
    elif mirrored:
        array = pixels = np.ascontiguousarray(array[:, :, ::-1])
    else:
        pixels = array
    if color:
        pixels = _tint(pixels.astype(np.float32), *(1 + color * tint for tint in tints))
    return pixels if pixels.dtype == np.uint8 else np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _affine(
    array: np.ndarray, *, dx: float, dy: float, zoom: float, radians: float, mirrored: bool
) -> np.ndarray:
    """(3, H, W) uint8 to float32, resampled once. dx and dy in half widths and heights."""
    _, height, width = array.shape
    cos, sin = math.cos(radians) / zoom, math.sin(radians) / zoom
    sign = -1.0 if mirrored else 1.0
    # From the new picture's coordinates to the old one's, both -1 .. 1: angles hold in pixels, hence the
    # ratios.
    theta = torch.tensor([[[sign * cos, -sin * height / width, dx], [sign * sin * width / height, cos, dy]]])
    grid = torch.nn.functional.affine_grid(theta, [1, 3, height, width], align_corners=False)
    pixels = torch.from_numpy(array.astype(np.float32))[None]
    moved = torch.nn.functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    return moved[0].numpy()


def _tint(pixels: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Brightness, contrast (about the mean grey) and saturation, together one 3 x 3 map and an offset."""
    flat = pixels.reshape(3, -1)
    grey = float(_LUMA @ flat.mean(axis=1)) * brightness
    matrix = saturation * np.eye(3, dtype=np.float32) + (1 - saturation) * _LUMA  # rows sum to 1: greys stay
    tinted = (brightness * contrast * matrix) @ flat
    tinted += (1 - contrast) * grey
    return tinted.reshape(pixels.shape)


def spectrogram_augment(
    mel: np.ndarray,
    rng: np.random.Generator,
    *,
    time_mask: int = 0,
    freq_mask: int = 0,
    gain: float = 0.0,
    shift: int = 0,
) -> np.ndarray:
    """(frames, num_mels) float32 log-mel spectrogram to a changed copy of the same shape.

    shift: moved by up to this many frames, each way. gain: up to this much added to all values, each way
    (louder or softer); what is moved in is silence, the clip's minimum. time_mask, freq_mask: up to this many
    frames and mels in a row are replaced by the clip's mean (SpecAugment: Park et al., 2019, whose zero is the
    mean of normalised features). The numbers drawn don't depend on the arguments.
    """
    if mel.ndim != 2 or not mel.size:
        raise ValueError(f"mel must be (frames, num_mels) and not empty, got shape {mel.shape}")
    if min(time_mask, freq_mask, gain, shift) < 0:
        raise ValueError("time_mask, freq_mask, gain and shift must be at least 0")
    frames, num_mels = mel.shape
    shift_u, gain_u, time_width, time_at, freq_width, freq_at = rng.random(6).tolist()
    moved = min(int((2 * shift + 1) * shift_u), 2 * shift) - shift
    moved = max(-frames, min(frames, moved))
    silence = mel.min()
    changed = np.full_like(mel, silence)
    changed[max(0, moved) : frames + min(0, moved)] = mel[max(0, -moved) : frames - max(0, moved)]
    changed += gain * (2 * gain_u - 1)
    mean = changed.mean(dtype=np.float32)
    width = min(int((time_mask + 1) * time_width), frames)
    start = int((frames - width + 1) * time_at)
    changed[start : start + width] = mean
    width = min(int((freq_mask + 1) * freq_width), num_mels)
    start = int((num_mels - width + 1) * freq_at)
    changed[:, start : start + width] = mean
    return changed
