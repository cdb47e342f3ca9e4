"""Pictures and sound to arrays, against Pillow and Whisper's own extractor, and what can't be decoded."""

import io
import json
import pickle
import random
import struct
import time
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import simplejpeg
import soundfile
import torch
from PIL import Image
from transformers import WhisperFeatureExtractor

from mmscale.data import DataError
from mmscale.data.decode import (
    MAX_PIXELS,
    BodyError,
    decode_audio,
    decode_image,
    decode_image_train,
    decode_int,
    decode_json,
    decode_npy,
    decode_npz,
    decode_text,
    log_mel,
    log_mel_batch,
    refuse,
)


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


@pytest.mark.parametrize("options", [{}, {"num_mels": 40, "n_fft": 512, "hop": 320}])
def test_log_mel_of_a_batch_is_that_of_each_wave(options: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    lengths = [16000, 1, 0, 159, 320, 201, 9999, 400, 12345]
    waves = rng.standard_normal((len(lengths), 16000)).astype(
        np.float32
    )  # noise past the ends must not count
    waves[4] = 0
    found, frames = log_mel_batch(torch.from_numpy(waves), torch.tensor(lengths), **options)
    for wave, length, mel, num_frames in zip(waves, lengths, found.numpy(), frames.tolist(), strict=True):
        expected = log_mel(wave[:length], **options) if length else np.zeros((0, mel.shape[1]), np.float32)
        assert num_frames == len(expected)
        # The same sums in another order, in float32: 1e-7 of the values, which are about 1.
        assert np.abs(mel[:num_frames] - expected).max(initial=0) < 1e-5
        assert not mel[num_frames:].any()
    with pytest.raises(ValueError, match="lengths"):
        log_mel_batch(torch.zeros(2, 5), torch.tensor([5]))


@pytest.mark.parametrize("rate", [44100, 48000, 22050])
def test_resampling_rejects_aliases_over_a_sweep(rate: int) -> None:
    seconds = 4
    t = np.arange(rate * seconds) / rate
    low, high = 8_500, rate / 2 - 200  # all of it above the new Nyquist frequency of 8 kHz
    sweep = 0.5 * np.sin(2 * np.pi * (low * t + (high - low) * t**2 / (2 * seconds)))
    found = decode_audio(sound(sweep.astype(np.float32), rate), 16000)
    # soxr's HQ has a stop band of 20 bits, -120 dB; its edge is at 8 kHz and the ends of the sweep are cut
    # hard, so they are left out. -90 dB of 0.5 is 16 bit sound's last step.
    assert np.abs(found[2000:-2000]).max() < 2**-15


# --- training crops ---


def textured(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 with a photograph's spectrum (power falls as 1 / frequency**2) and some hard edges."""
    rng = np.random.default_rng(height + width)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    noise = rng.standard_normal((3, height, width))
    smooth = np.fft.irfft2(np.fft.rfft2(noise) / frequency**1.2, s=(height, width))
    smooth = smooth / smooth.std() * 40 + 128
    smooth[:, height // 4 : height // 2, width // 3 : width // 2] += 50
    return np.ascontiguousarray(smooth.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.square(first.astype(float) - second).mean())))


@pytest.mark.parametrize(
    ("height", "width", "size", "decibels"),
    [
        (256, 256, 224, 60),  # decoded in full: rounding alone
        (480, 640, 224, 60),
        (1024, 1280, 224, 35),  # at 1/2 of the size
        (2000, 1501, 224, 35),  # at 1/2, odd sides
        (1600, 1600, 96, 35),  # at 1/8
    ],
)
def test_scaled_decoding_loses_little(height: int, width: int, size: int, decibels: float) -> None:
    data = simplejpeg.encode_jpeg(textured(height, width), quality=90)
    full = np.asarray(Image.open(io.BytesIO(data)))
    expected = resized_by_pillow(full, size)
    found = decode_image(data, size)
    # 60 dB is one level of 255 in every pixel in four. Scaled decoding averages blocks first and places the crop to
    # half of one; Pillow's own reducing_gap=2.0 does the same.
    assert psnr(found, expected) > decibels, psnr(found, expected)


def test_training_crop_is_cut_where_it_was_drawn() -> None:
    pixels = textured(300, 400)
    png = encode(Image.fromarray(pixels), "PNG")
    from mmscale.data.decode import _random_crop

    mirrored = 0
    for seed in range(20):
        numbers = np.random.default_rng(seed).random(23).tolist()
        top, left, height, width = _random_crop(
            300, 400, numbers=numbers, scale=(0.2, 1.0), ratio=(0.75, 4 / 3)
        )
        cut = Image.fromarray(pixels[top : top + height, left : left + width])
        expected = np.asarray(cut.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
        found = decode_image_train(png, 64, np.random.default_rng(seed), scale=(0.2, 1.0))
        if numbers[22] < 0.5:
            mirrored += 1
            found = found[:, :, ::-1]
        assert np.abs(found - expected).max() <= 2  # as Pillow, see above
    assert 0 < mirrored < 20
    data = simplejpeg.encode_jpeg(textured(1200, 1600), quality=90)
    full = encode(Image.open(io.BytesIO(data)), "PNG")
    for seed in range(5):  # with scaled decoding too
        a, b = (
            decode_image_train(d, 64, np.random.default_rng(seed), scale=(0.2, 1.0)) for d in (data, full)
        )
        assert psnr(a, b) > 30  # a crop a pixel aside has about 20


def test_training_crops_are_spread_as_asked() -> None:
    from mmscale.data.decode import _random_crop

    rng = np.random.default_rng(0)
    boxes = np.array(
        [
            _random_crop(480, 640, numbers=rng.random(23).tolist(), scale=(0.25, 0.5), ratio=(0.75, 4 / 3))
            for _ in range(2000)
        ]
    )
    top, left, height, width = boxes.T
    assert min(top.min(), left.min()) >= 0
    assert (top + height).max() <= 480
    assert (left + width).max() <= 640
    share = height * width / (480 * 640)
    assert 0.245 < share.min() < 0.26
    assert 0.49 < share.max() < 0.505
    assert abs(share.mean() - 0.375) < 5 * 0.25 / 12**0.5 / 2000**0.5  # five standard errors
    assert abs(np.log(width / height).mean()) < 5 * np.log(16 / 9) / 12**0.5 / 2000**0.5 + 1e-3
    wide = _random_crop(10, 1000, numbers=[0.99] * 23, scale=(0.9, 1.0), ratio=(0.75, 4 / 3))
    assert wide == (0, 493, 10, 13)  # nothing of that area fits: the centre


def test_out_orientation_and_mistakes() -> None:
    png = encode(Image.fromarray(picture(90, 70)), "PNG")
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    found = decode_image(png, 32, out=batch[1])
    assert np.array_equal(batch[1].numpy(), decode_image(png, 32))
    assert found.ctypes.data == batch[1].data_ptr()
    assert not batch[0].any()
    with pytest.raises(ValueError, match=r"out must be \(3, 16, 16\) uint8"):
        decode_image(png, 16, out=batch[1])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = encode(Image.fromarray(picture(64, 64)), "JPEG", exif=exif.tobytes(), quality=95)
    upright = decode_image(turned, 64)
    assert (
        np.abs(decode_image(turned, 64, orient=True).astype(int) - np.rot90(upright, -1, (1, 2))).max() <= 2
    )
    with pytest.raises(ValueError, match="scale must be"):
        decode_image_train(png, 32, np.random.default_rng(0), scale=(0.5, 2))


# --- limits, before anything is decoded ---


def cause_of(function: object, *arguments: object) -> str:
    start = time.perf_counter()
    with pytest.raises(BodyError) as caught:
        function(*arguments)  # type: ignore[operator]
    assert time.perf_counter() - start < 2  # nothing large was decoded
    return caught.value.cause


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_pictures_that_claim_too_much() -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
        + png_chunk(b"IEND", b"")
    )
    assert cause_of(decode_image, bomb, 32) == "too large"
    gif = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 50_000, 50_000)
    assert cause_of(decode_image, bytes(gif), 32) == "too large"
    whole = encode(Image.new("RGB", (8, 8)), "PNG")
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20)))  # 80 MiB in 80 kB
    assert cause_of(decode_image, whole[:33] + text + whole[33:], 32) == "too large"
    assert cause_of(decode_image, bytes((256 << 20) + 1), 32) == "too large"
    assert cause_of(decode_image, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 32) == "undecodable"


def test_sounds_that_claim_too_much() -> None:
    hour = encode_flac_claiming(3601 * 16000)
    assert cause_of(decode_audio, hour, 16000) == "too large"
    assert cause_of(decode_audio, encode_flac_claiming(3000 * 16000), 16000) == "undecodable"  # cut short
    assert cause_of(decode_audio, sound(np.zeros(4000, np.float32), 1), 16000) == "too large"  # at 1 Hz


def encode_flac_claiming(num_frames: int) -> bytes:
    data = bytearray(sound(tone(440, 16000), 16000, "FLAC", "PCM_16"))
    info = int.from_bytes(data[18:26], "big")  # rate, channels, bits, and 36 bits of the number of samples
    data[18:26] = ((info >> 36 << 36) | num_frames).to_bytes(8, "big")
    return bytes(data)


def test_text_numbers_and_json() -> None:
    assert decode_json(b'{"a": [1, "x"]}') == {"a": [1, "x"]}
    assert cause_of(decode_json, b"[" * 200_000) == "undecodable"
    assert cause_of(decode_json, b"9" * 5000) == "undecodable"
    assert cause_of(decode_json, b'{"a"') == "undecodable"
    assert cause_of(decode_json, b"\xff\xfe\x00") == "undecodable"
    assert decode_text(b"\xef\xbb\xbfabc") == "abc"
    assert cause_of(decode_text, b"\xff") == "undecodable"
    assert decode_int(b" 12\n") == 12
    assert cause_of(decode_int, b"cat") == "undecodable"
    assert cause_of(decode_int, str(2**63).encode()) == "too large"
    error = pickle.loads(pickle.dumps(BodyError("too large", "why")))
    assert (error.cause, str(error), error.exit_code) == ("too large", "why", 3)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("code of a pickle ran",))


def test_pickles_are_refused_and_arrays_read() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(6).reshape(2, 3))
    assert decode_npy(buffer.getvalue()).tolist() == [[0, 1, 2], [3, 4, 5]]
    evil = io.BytesIO()
    np.save(evil, np.array([Evil()], dtype=object), allow_pickle=True)
    assert cause_of(decode_npy, evil.getvalue()) == "refused"
    assert cause_of(decode_npy, pickle.dumps(Evil())) == "undecodable"
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    assert cause_of(decode_npy, huge.getvalue()) == "undecodable"
    archive = io.BytesIO()
    np.savez_compressed(archive, a=np.arange(3), b=np.ones(2))
    assert sorted(decode_npz(archive.getvalue())) == ["a", "b"]
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file, file.open("a.npy", "w") as entry:
        for _ in range(257):
            entry.write(bytes(1 << 20))
    assert cause_of(decode_npz, bomb.getvalue()) == "too large"
    with zipfile.ZipFile(bomb := io.BytesIO(), "w") as file:
        file.writestr("a.pkl", pickle.dumps(Evil()))
    assert cause_of(decode_npz, bomb.getvalue()) == "refused"
    for name in ("x.pth", "weights.PT", "a.pkl"):
        assert cause_of(refuse, name) == "refused"
    refuse("a.npy")


def bodies() -> dict[str, tuple[object, bytes]]:
    """A valid body of each kind and what reads it."""
    rgb = Image.fromarray(picture(48, 40))
    wave = tone(440, 16000, 0.1)
    arrays = io.BytesIO()
    np.savez(arrays, a=np.arange(9))
    array = io.BytesIO()
    np.save(array, np.arange(9))

    def image(data: bytes) -> None:
        decode_image(data, 32)
        decode_image_train(data, 16, np.random.default_rng(0))

    def audio(data: bytes) -> None:
        decode_audio(data, 16000)

    return {
        "jpg": (image, encode(rgb, "JPEG")),
        "png": (image, encode(rgb, "PNG")),
        "webp": (image, encode(rgb, "WEBP")),
        "gif": (image, encode(rgb, "GIF")),
        "tif": (image, encode(rgb, "TIFF", compression="tiff_lzw")),
        "bmp": (image, encode(rgb, "BMP")),
        "wav": (audio, sound(wave, 8000, "WAV", "PCM_16")),
        "flac": (audio, sound(wave, 16000, "FLAC", "PCM_16")),
        "ogg": (audio, sound(wave, 16000, "OGG", "VORBIS")),
        "mp3": (audio, sound(wave, 16000, "MP3", "MPEG_LAYER_III")),
        "json": (decode_json, json.dumps({"caption": "a\u00e9", "n": [1, 2.5e9, None]}).encode()),
        "cls": (decode_int, b"123"),
        "txt": (decode_text, "grüße".encode()),
        "npy": (decode_npy, array.getvalue()),
        "npz": (decode_npz, arrays.getvalue()),
    }


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, most of them near the start where headers lie; or cut, or with a part twice."""
    body = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(body), rng.choice((32, 128, len(body))))) if body else 0
        kind = rng.randrange(5)
        if kind < 3 and body:
            body[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 3:
            del body[at : at + rng.choice((1, 4, len(body)))]
        else:
            body[at:at] = body[at : at + rng.randrange(1, 64)]
    return bytes(body)


def fuzz(kind: str, count: int, seed: int) -> None:
    read, data = bodies()[kind]
    rng = random.Random(f"{kind}{seed}")
    for number in range(count):
        body = mutated(data, rng)
        start = time.perf_counter()
        try:
            read(body)  # type: ignore[operator]
        except DataError:
            pass
        except Exception as error:
            raise AssertionError(
                f"{kind} {number}: {type(error).__name__}: {error}: {body[:200]!r}"
            ) from error
        assert time.perf_counter() - start < 5, (kind, number, body[:200])


@pytest.mark.parametrize("kind", list(bodies()))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bodies_end_in_data_errors(kind: str) -> None:
    fuzz(kind, 100, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(bodies()))
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_bodies_end_in_data_errors(kind: str) -> None:
    fuzz(kind, 1000, 1)
