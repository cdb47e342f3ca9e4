"""Modalities: what a sample is embedded as depends on that sample alone, however its batch is padded."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from tiny_run import run_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mmscale.config import TextConfig
from mmscale.errors import ConfigError, DataError
from mmscale.models import Model
from mmscale.models.modality import Text
from mmscale.tasks import model_for

# An embedding of unit length, through sums in float32 that other paddings take in another order: 1e-5 is 80 ulp.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model(scene_shards: Path) -> Model:
    model = model_for(run_config(scene_shards)).eval()
    with torch.no_grad():  # positions and gates start near zero; large ones show what leaks
        for parameter in (model.image.position, model.audio.position, model.text.position.weight):
            parameter.normal_()
    return model


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sound(seed: int, seconds: float) -> bytes:
    wave = np.random.default_rng(seed).uniform(-1, 1, int(16000 * seconds))
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16000, format="FLAC")
    return buffer.getvalue()


SAMPLES = {
    "text": [b"red circle", b"green star left of brown square", "红色圆".encode(), b"a"],
    "image": [picture(0), picture(1), picture(2), picture(3)],
    # Odd numbers of frames too: 0.33 s are 16 frames of 20 ms, 0.35 s are 17, 0.02 s is one, 5 s are cut.
    "audio": [sound(0, 0.33), sound(1, 0.35), sound(2, 0.02), sound(3, 5.0)],
}


def embeddings(model: Model, field: str, samples: list[bytes | None]) -> torch.Tensor:
    modality = model.modality(field)
    arrays = [None if data is None else modality.read(data) for data in samples]
    with torch.no_grad():
        return model.represent(field, {field: modality.collate(arrays)})


@pytest.mark.parametrize("field", SAMPLES)
def test_an_embedding_depends_on_its_sample_alone(model: Model, field: str) -> None:
    samples = SAMPLES[field]
    together = embeddings(model, field, [*samples, None])
    alone = torch.cat([embeddings(model, field, [data]) for data in samples])
    backwards = embeddings(model, field, [None, *samples[::-1]]).flip(0)[:-1]
    assert torch.isfinite(together).all()
    torch.testing.assert_close(together[:-1], alone, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(backwards, alone, rtol=0, atol=TOLERANCE)
    distances = (alone @ alone.T).fill_diagonal_(-1)
    assert distances.max() < 1 - 100 * TOLERANCE, (
        "different samples must lie apart, or the test shows nothing"
    )


@pytest.mark.parametrize("field", SAMPLES)
def test_an_absent_sample_is_zero_and_has_no_tokens(model: Model, field: str) -> None:
    modality = model.modality(field)
    collated = modality.collate([None, None])
    assert collated["lengths"].tolist() == [0, 0]
    assert modality.num_tokens(collated) == 0
    assert embeddings(model, field, [None, None]).abs().max() == 0
    assert embeddings(model, field, [None, SAMPLES[field][0]])[1].norm().item() == pytest.approx(1, abs=1e-5)


def test_padding_of_text_may_hold_anything(model: Model) -> None:
    collated = model.text.collate([model.text.read(data) for data in SAMPLES["text"][:2]])
    with torch.no_grad():
        before = model.represent("text", {"text": collated})
        collated["x"][0, int(collated["lengths"][0]) :] = 7
        after = model.represent("text", {"text": collated})
    torch.testing.assert_close(before, after, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("field", "tokens"), [("text", None), ("image", 4 * 4), ("audio", 2)])
def test_the_number_of_tokens_is_the_trunk_s(model: Model, field: str, tokens: int | None) -> None:
    modality = model.modality(field)
    collated = modality.collate([modality.read(data) for data in [SAMPLES[field][0], SAMPLES[field][3]]])
    with torch.no_grad():
        embedded = model.tokens(field, {field: collated})
    assert modality.num_tokens(collated) == int(embedded.lengths.sum())
    assert int(embedded.lengths.max()) <= embedded.x.shape[1]
    if tokens is not None:  # of the first: 32 px over a reduction of 8; 16 frames over one of 8
        assert embedded.lengths[0].item() == tokens


def test_texts_of_both_languages_survive_the_tokenizer(model: Model) -> None:
    for text in ("red circle above blue square", "红色圆在上，下面是蓝色正方形", "a star that is green"):
        ids = model.text.tokenizer.encode(text, add_special_tokens=False).ids
        assert model.text.write(ids) == text
    # A character that no caption had still comes back: the alphabet is bytes.
    assert model.text.write(model.text.tokenizer.encode("龍 ñ 🙂").ids) == "龍 ñ 🙂"


def test_long_texts_are_cut(model: Model) -> None:
    ids = model.text.read(b"red circle " * 50)
    assert len(ids) == model.text.max_length
    assert ids.dtype == np.int32


def test_bytes_of_the_wrong_kind_are_data_errors(model: Model) -> None:
    with pytest.raises(DataError, match="not a picture"):
        model.image.read(sound(0, 0.1))
    with pytest.raises(DataError, match="not a sound file"):
        model.audio.read(picture(0))


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path) -> None:
    Tokenizer(WordLevel({"red": 0, "<bos>": 1}, unk_token="red")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="lacks the special tokens <pad>, <eos>"):
        Text(TextConfig(tokenizer=str(tmp_path)), 32)


@pytest.mark.parametrize(("content", "message"), [(None, "there is no such file"), ("{}", "can't be read")])
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Text(TextConfig(tokenizer=str(path)), 32)
    assert f"model.text.tokenizer={path}" in str(caught.value)
