"""Augmentation: each change does what it says, and the generator alone decides."""

import numpy as np
import pytest

from mmscale.data.augment import image_augment, spectrogram_augment


def image(size: int = 32) -> np.ndarray:
    """(3, size, size) uint8, smooth, different in all directions."""
    y, x = np.mgrid[:size, :size] / size
    return (255 * np.stack([x, y, (x + y * y) / 2])).astype(np.uint8)


class Fixed:
    """Stands in for a generator: returns the numbers given."""

    def __init__(self, *values: float) -> None:
        self.values = np.array(values)

    def uniform(self, low: float, high: float, count: int) -> np.ndarray:
        return np.resize(self.values, count)

    def random(self, count: int) -> np.ndarray:
        return np.resize(self.values, count)


def drawn(*values: float) -> np.random.Generator:
    return Fixed(*values)  # type: ignore[return-value]


ALL = {"shift": 0.1, "scale": 0.2, "rotate_deg": 15.0, "flip": True, "color": 0.3}


def test_same_generator_same_picture() -> None:
    first, second, other = (image_augment(image(), np.random.default_rng(s), **ALL) for s in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    assert first.shape == (3, 32, 32)
    assert first.dtype == np.uint8


def test_nothing_asked_nothing_changed() -> None:
    assert np.array_equal(image_augment(image(), np.random.default_rng(0)), image())
    still = drawn(0, 0, 0, 0, 1, 0, 0, 0)
    # Resampling on the grid itself weighs neighbours by rounding errors of 1e-6: 255 levels round to the
    # same.
    assert np.array_equal(image_augment(image(), still, **ALL), image())


def test_input_is_left_alone() -> None:
    array = image()
    for seed in range(5):
        image_augment(array, np.random.default_rng(seed), **ALL)
        image_augment(array, np.random.default_rng(seed), flip=True)
    assert np.array_equal(array, image())


def test_shift_by_whole_pixels() -> None:
    moved = image_augment(
        image(), drawn(1, 0.5, 0, 0, 1, 0, 0, 0), shift=0.25
    )  # 8 right, 4 down in the source
    assert np.array_equal(moved[:, :-4, :-8], image()[:, 4:, 8:])
    assert np.array_equal(moved[:, 0, -8:], np.repeat(image()[:, 4, -1:], 8, axis=1))


def test_quarter_turn_and_zoom() -> None:
    turned = image_augment(image(), drawn(0, 0, 0, 1, 1, 0, 0, 0), rotate_deg=90)
    assert np.array_equal(turned, np.rot90(image(), -1, axes=(1, 2))) or np.array_equal(
        turned, np.rot90(image(), 1, axes=(1, 2))
    )
    ramp = image_augment(image(), drawn(0, 0, 1, 0, 1, 0, 0, 0), scale=1.0)  # twice as large
    source = image().astype(float)
    # The slope of a ramp is halved. Levels are rounded to integers, so over 30 pixels it is exact to 1 / 15.
    assert abs(np.ptp(ramp[0, 16, 1:-1].astype(float)) - np.ptp(source[0, 16, 1:-1]) / 2) <= 2 * 255 / 32 / 2


def test_flip_is_half_of_the_time() -> None:
    flips = [
        np.array_equal(image_augment(image(), np.random.default_rng(seed), flip=True), image()[:, :, ::-1])
        for seed in range(400)
    ]
    assert abs(sum(flips) - 200) < 50  # five standard deviations of 10
    both = drawn(0, 0, 0, 0, -1, 0, 0, 0)
    assert np.array_equal(image_augment(image(), both, flip=True, shift=0.1), image()[:, :, ::-1])


def test_color() -> None:
    grey = np.full((3, 8, 8), 100, np.uint8)
    bright = image_augment(grey, drawn(0, 0, 0, 0, 1, 0.5, 0, 0), color=0.4)
    assert (bright == 120).all()
    flat = image_augment(
        image(), drawn(0, 0, 0, 0, 1, 0, -1, 0), color=1.0
    )  # no contrast: the mean grey everywhere
    assert np.ptp(flat.astype(int)) <= 1
    drained = image_augment(image(), drawn(0, 0, 0, 0, 1, 0, 0, -1), color=1.0)  # no saturation
    assert np.array_equal(drained[0], drained[2])
    luma = np.tensordot([0.299, 0.587, 0.114], image().astype(float), 1)
    assert np.abs(drained[0] - luma).max() <= 0.5 + 1e-3  # rounded to integers


def test_values_stay_in_range() -> None:
    extreme = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 16, 16))
    found = np.stack([image_augment(extreme, np.random.default_rng(s), color=1.0) for s in range(50)])
    # Overflow would wrap white to black: on brightened pictures white has to stay the brightest.
    for array in found:
        assert array[extreme == 255].mean() >= array[extreme == 0].mean() - 1


def test_bad_pictures() -> None:
    with pytest.raises(ValueError, match=r"must be \(3, H, W\) uint8, got \(32, 32, 3\) uint8"):
        image_augment(image().transpose(1, 2, 0), np.random.default_rng(0))
    with pytest.raises(ValueError, match="float32"):
        image_augment(image().astype(np.float32), np.random.default_rng(0))
    with pytest.raises(ValueError, match="color at most 1"):
        image_augment(image(), np.random.default_rng(0), color=1.5)


# --- spectrograms ---


def mel() -> np.ndarray:
    """(50, 20) float32, all different, all above 1."""
    return np.random.default_rng(0).permutation(1000).reshape(50, 20).astype(np.float32) + 1


def test_spectrogram_unchanged_by_default() -> None:
    found = spectrogram_augment(mel(), np.random.default_rng(0))
    assert np.array_equal(found, mel())


def test_spectrogram_shift_and_gain() -> None:
    later = spectrogram_augment(mel(), drawn(0.999, 0.5, 0, 0, 0, 0), shift=7)
    assert np.array_equal(later[7:], mel()[:-7])
    assert (later[:7] == mel().min()).all()
    earlier = spectrogram_augment(mel(), drawn(0.0, 0.5, 0, 0, 0, 0), shift=7)
    assert np.array_equal(earlier[:-7], mel()[7:])
    assert (earlier[-7:] == mel().min()).all()
    louder = spectrogram_augment(mel(), drawn(0.5, 1.0, 0, 0, 0, 0), gain=0.25)
    assert np.array_equal(louder, mel() + np.float32(0.25))
    assert spectrogram_augment(mel(), drawn(0.0, 0.5, 0, 0, 0, 0), shift=80).shape == (50, 20)


def test_spectrogram_masks() -> None:
    masked = spectrogram_augment(mel(), drawn(0.5, 0.5, 0.999, 0.5, 0.999, 0.5), time_mask=6, freq_mask=3)
    silent = masked == mel().mean()
    assert silent.all(axis=1).sum() == 6
    assert silent.all(axis=0).sum() == 3
    kept = ~silent.all(axis=1)[:, None] & ~silent.all(axis=0)[None]
    assert np.array_equal(masked[kept], mel()[kept])
    widths = set()
    for seed in range(200):
        found = spectrogram_augment(mel(), np.random.default_rng(seed), time_mask=3)
        widths.add(int((found == mel().mean()).all(axis=1).sum()))
    assert widths == {0, 1, 2, 3}
    wide = spectrogram_augment(mel()[:2], drawn(0.5, 0.5, 0.999, 0.999, 0, 0), time_mask=90)
    assert wide.shape == (2, 20)


def test_spectrogram_input_is_left_alone_and_seeded() -> None:
    array = mel()
    changes = {"time_mask": 9, "freq_mask": 5, "gain": 0.5, "shift": 6}
    first, second = (spectrogram_augment(array, np.random.default_rng(3), **changes) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(array, mel())
    assert first.dtype == np.float32
    with pytest.raises(ValueError, match="not empty"):
        spectrogram_augment(array[:0], np.random.default_rng(0))
    with pytest.raises(ValueError, match="at least 0"):
        spectrogram_augment(array, np.random.default_rng(0), shift=-1)
