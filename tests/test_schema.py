"""Schemas in one line: what they mean, what they refuse, and whom of the shards they can serve."""

import io
import json

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmscale.data.schema import check_schema, parse, schema
from mmscale.errors import DataError


def test_both_forms_and_what_they_read() -> None:
    fields = schema(
        "image: jpg|png, text: txt|json.caption, audio?: wav|flac, label: cls, x: emb.npy, meta: json"
    )
    same = schema(
        {
            "image": "jpg|png",
            "text": "txt|json.caption",
            "audio?": "wav|flac",
            "label": "cls",
            "x": "emb.npy",
            "meta": "json",
        }
    )
    assert {n: (f.source, f.required) for n, f in fields.items()} == {
        n: (f.source, f.required) for n, f in same.items()
    }
    assert fields["text"].source == "txt|json.caption"
    assert [name for name, field in fields.items() if not field.required] == ["audio"]
    png, wav, npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (300, 280), "red").save(png, "PNG")
    soundfile.write(wav, np.zeros(8000, np.float32), 8000, format="WAV")
    np.save(npy, np.arange(3))
    assert fields["image"].read(png.getvalue()).shape == (3, 224, 224)
    assert fields["text"].read("grüße".encode()) == "grüße"
    assert fields["audio"].read(wav.getvalue()).shape == (16000,)
    assert fields["label"].read(b"7\n") == 7
    assert fields["x"].read(npy.getvalue()).tolist() == [0, 1, 2]
    assert fields["meta"].read(json.dumps({"a": 1}).encode()) == {"a": 1}
    mel = schema("sound: wav", num_mels=40)["sound"].read(wav.getvalue())
    assert mel.shape == (100, 40)
    with pytest.raises(DataError, match="not UTF-8"):
        fields["text"].read(b"\xff\xfe\xfa")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("image: jpgg", "'jpgg' is not a kind of data that is known; did you mean 'jpg'"),
        ("weights: pth", "'pth' may hold a pickle"),
        ("x: a.pkl", "'a.pkl' may hold a pickle"),
        ("image: jpg|", "'image' has an empty alternative in 'jpg|'"),
        ("image:", "'image' has an empty alternative"),
        ("a: jpg, a?: png", "'a' is given twice"),
        ("image", "'image' must be of the form"),
        (": jpg", "without a name before 'jpg'"),
        ("a: jpg|txt", r"one kind, got jpg \(image\), txt \(text\)"),
        ({}, "no fields"),
    ],
)
def test_what_is_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        schema(spec)


def test_how_many_samples_can_serve() -> None:
    held = {("jpg", "txt"): 900, ("jpg",): 60, ("jpg", "json"): 30, ("jpg", "txt", "wav"): 10}
    assert check_schema(parse("image: jpg, text: txt"), held) == 910
    assert check_schema(parse("image: jpg, text: txt|json.caption, sound?: wav"), held) == 940
    assert check_schema(parse("sound: wav"), held) == 10
    assert check_schema(parse("sound?: flac"), held) == 1000  # nothing is asked for
    with pytest.raises(
        DataError,
        match=r"No sample has the fields image \(jpeg\); the shards hold jpg \(1,000\), txt \(910\)"
        r", json \(30\), wav \(10\); did you mean jpg\?",
    ):
        check_schema(parse("image: jpeg"), held)
    with pytest.raises(DataError, match=r"did you mean json.caption\?"):
        check_schema(parse("image: jpg, text: txt"), {("jpg", "json"): 5})
    with pytest.raises(DataError, match="no sample has all of them"):
        check_schema(parse("image: jpg, sound: wav"), {("jpg",): 5, ("wav",): 5})
