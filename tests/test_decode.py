"""Pictures and sound to arrays, against Pillow and Whisper's own extractor, and what can't be decoded."""

import io
import warnings

import numpy as np
import pytest
import simplejpeg
import soundfile
from PIL import Image
from transformers import WhisperFeatureExtractor

from mmscale.data import DataError
from mmscale.data.decode import MAX_PIXELS, decode_audio, decode_image, log_mel


def picture(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8 with smooth patches of colour."""
    rng = np.random.default_rng(height * 1000 + width)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def resized_by_pillow(pixels: np.ndarray, size: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.mark.parametrize(("height", "width"), [(128, 128), (200, 131), (97, 300), (64, 64), (20, 31), (1, 1)])
def test_png_is_resized_as_pillow_does(height: int, width: int) -> None:
    pixels = picture(height, width)
    found = decode_image(encode(Image.fromarray(pixels), "PNG"), 64)
    assert found.shape == (3, 64, 64)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    # Both filter with fixed-point weights, rows then columns: each pass may round differently by one.
    assert np.abs(found.astype(int) - resized_by_pillow(pixels, 64)).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(128, 128), (480, 640), (100, 150), (40, 40)])
def test_jpeg(height: int, width: int) -> None:
    data = simplejpeg.encode_jpeg(picture(height, width), quality=95)
    expected = resized_by_pillow(np.asarray(Image.open(io.BytesIO(data))), 64)
    found = decode_image(data, 64)
    assert found.shape == (3, 64, 64)
    # Decoding at n / 8 of the size has another filter than the bicubic and rounds the sides up, moving the
    # square by a fraction of a pixel: 2 to 4 levels of 255 on these pictures. A whole pixel makes 7 to 45.
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() < 5
    if min(height, width) >= 64:
        assert difference.mean() < np.abs(np.roll(found, 1, axis=2).astype(int) - expected).mean() / 3


def test_modes() -> None:
    """Palettes, grey, deep, CMYK and transparent pictures."""
    pixels = picture(32, 32)
    rgb = Image.fromarray(pixels)
    grey = np.asarray(rgb.convert("L"))
    expected_grey = np.repeat(grey[None], 3, axis=0)

    assert np.array_equal(decode_image(encode(rgb.convert("L"), "PNG"), 32), expected_grey)
    palette = rgb.quantize(16)
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(decode_image(encode(palette, "PNG"), 32), expected)
    assert np.array_equal(decode_image(encode(palette, "GIF"), 32), expected)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decode_image(encode(deep, "PNG"), 32), expected_grey)
    floats = Image.fromarray(grey.astype(np.float32))
    assert np.array_equal(decode_image(encode(floats, "TIFF"), 32), expected_grey)
    lab = Image.merge("LAB", rgb.split())
    assert decode_image(encode(lab, "TIFF"), 32).shape == (3, 32, 32)
    grey_jpeg = decode_image(encode(rgb.convert("L"), "JPEG"), 32)
    assert np.array_equal(grey_jpeg[0], grey_jpeg[2])
    cmyk = decode_image(encode(rgb.convert("CMYK"), "JPEG", quality=95), 32).astype(int)
    # Without a black part CMYK is RGB inverted; what is left is JPEG's own loss, a few levels on smooth
    # patches.
    assert np.abs(cmyk - pixels.transpose(2, 0, 1)).mean() < 5
    webp = decode_image(encode(rgb, "WEBP", lossless=True), 32)
    assert np.array_equal(webp, pixels.transpose(2, 0, 1))


def test_transparency_lies_over_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (10, 20, 30, 255)
    rgba[:, 4:] = (10, 20, 30, 0)
    found = decode_image(encode(Image.fromarray(rgba), "PNG"), 8)
    assert found[:, 0, 0].tolist() == [10, 20, 30]
    assert found[:, 0, 7].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode_image(encode(palette, "PNG", transparency=1), 8) == 255).all()
    assert (decode_image(encode(palette, "PNG", transparency=0), 8) == 9).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    found = decode_image(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), 8)
    assert found[:, 4, 4].tolist() == [255, 0, 0]


def test_the_long_side_costs_nothing() -> None:
    data = encode(Image.new("RGB", (20_000, 2), "green"), "PNG")
    assert decode_image(data, 224).shape == (3, 224, 224)  # not 2,240,000 pixels wide on the way


def test_what_is_no_picture() -> None:
    whole = encode(Image.fromarray(picture(64, 64)), "PNG")
    jpeg = simplejpeg.encode_jpeg(picture(64, 64))
    broken = [b"", b"hello", b"\xff\xd8", whole[:100], whole[: len(whole) // 2]]
    for data in (*broken, jpeg[: len(jpeg) // 2], jpeg[:-200]):
        with pytest.raises(DataError, match="not a picture that can be decoded"):
            decode_image(data, 32)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        decode_image(whole, 0)


def test_stray_bytes_in_a_jpeg_are_forgiven() -> None:
    jpeg = simplejpeg.encode_jpeg(picture(64, 64))
    tables = jpeg.index(b"\xff\xdb")
    stray = jpeg[:tables] + b"\0\0\0" + jpeg[tables:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(stray)
    assert np.array_equal(decode_image(jpeg, 64), decode_image(stray, 64))


def test_decompression_bombs() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    bomb = encode(Image.new("1", (side, side)), "PNG")
    assert len(bomb) < 50_000
    with pytest.raises(DataError, match=f"a picture of {side} x {side} pixels"):
        decode_image(bomb, 32)
    jpeg = bytearray(simplejpeg.encode_jpeg(picture(16, 16)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(DataError, match="60000 x 60000"):
        decode_image(bytes(jpeg), 32)


# --- sound ---


def sound(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


def tone(frequency: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def test_audio_formats_and_channels() -> None:
    wave = tone(440, 16000)
    assert np.array_equal(decode_audio(sound(wave, 16000), 16000), wave)
    flac = decode_audio(sound(wave, 16000, "FLAC", "PCM_16"), 16000)
    assert flac.dtype == np.float32
    assert np.abs(flac - wave).max() <= 2**-15  # one step of 16 bits
    stereo = np.stack([wave, np.zeros_like(wave)], axis=1)
    assert np.allclose(decode_audio(sound(stereo, 16000), 16000), wave / 2, atol=0)
    assert len(decode_audio(sound(wave, 16000, "OGG", "VORBIS"), 16000)) == 16000


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 15999])
def test_resampling_keeps_tones(rate: int) -> None:
    found = decode_audio(sound(tone(1000, rate), rate), 16000)
    assert len(found) == 16000
    # The window of 16 zero crossings leaves ripple of about -60 dB in the pass band, 1e-3 of the amplitude;
    # the ends, where the sinc sees silence, are left out.
    assert np.abs(found - tone(1000, 16000))[200:-200].max() < 1e-3


def test_resampling_removes_what_would_alias() -> None:
    found = decode_audio(sound(tone(11_000, 48000), 48000), 16000)  # would come back as 5 kHz
    assert np.abs(found[200:-200]).max() < 1e-3  # as above


def test_what_is_no_sound() -> None:
    wave = tone(440, 16000)
    for data in (b"", b"hello", sound(wave, 16000, "FLAC", "PCM_16")[:30]):
        with pytest.raises(DataError, match="not a sound file"):
            decode_audio(data, 16000)
    with pytest.raises(DataError, match="without samples"):
        decode_audio(sound(wave[:0], 16000), 16000)
    wave[3] = np.nan
    with pytest.raises(DataError, match="aren't finite"):
        decode_audio(sound(wave, 16000), 16000)
    with pytest.raises(ValueError, match="sample_rate must be"):
        decode_audio(sound(wave, 16000), 0)


@pytest.mark.parametrize(
    ("num_mels", "hop", "n_fft"), [(80, 160, 400), (40, 160, 400), (64, 320, 512), (128, 160, 400)]
)
def test_log_mel_is_whispers(num_mels: int, hop: int, n_fft: int) -> None:
    noise = 0.01 * np.random.default_rng(0).standard_normal(480_000)
    wave = (tone(300, 16000, 30) * np.linspace(0, 1, 480_000) + noise).astype(np.float32)
    wave[100_000:200_000] = 0
    extractor = WhisperFeatureExtractor(feature_size=num_mels, hop_length=hop, n_fft=n_fft)
    expected = extractor(wave, sampling_rate=16000, return_tensors="np").input_features[0].T
    found = log_mel(wave, num_mels=num_mels, hop=hop, n_fft=n_fft)
    assert found.shape == expected.shape == (480_000 // hop, num_mels)
    assert found.dtype == np.float32
    # Rounding of fp32 transforms is about 1e-6 of the largest power; the floor lies 1e-8 below it, after a
    # log10 and division by 4.
    assert np.abs(found - expected).max() < 1e-3
    assert np.abs(found - expected).mean() < 1e-5


def test_log_mel_of_short_and_silent_waves() -> None:
    for num_samples, num_frames in ((1, 1), (159, 1), (201, 1), (319, 1), (320, 2), (16000, 100)):
        assert log_mel(tone(440, 16000)[:num_samples]).shape == (num_frames, 80)
    silent = log_mel(np.zeros(16000, np.float32))
    assert silent.shape == (100, 80)
    assert (silent == -1.5).all()  # (log10(1e-10) + 4) / 4
    with pytest.raises(ValueError, match="at least one sample"):
        log_mel(np.zeros(0, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = tone(440, 16000)
        frozen.setflags(write=False)
        log_mel(frozen)
