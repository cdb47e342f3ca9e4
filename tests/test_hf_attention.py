"""Models of transformers on our attention: the same outputs and gradients as on their own, or an error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from mmscale_kernels import Source
from torch import Tensor, nn

from mmscale.errors import UserError
from mmscale.models import hf

NAME = hf.register_attention()

# fp32 rounds at 6e-8; two or four layers of sums of some tens of terms, in another order, stay a hundred times below.
CLOSE = 1e-5

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    "vocab_size": 99,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **SIZES,
}
IMAGE = {"image_size": 16, "patch_size": 4, **SIZES}
WHISPER = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "begin_suppress_tokens": None, "suppress_tokens": None,
}  # fmt: skip
LENGTHS = (9, 5, 1)


def llama(**more: Any) -> T.LlamaConfig:
    return T.LlamaConfig(**TEXT, num_key_value_heads=2, **more)


def make(kind: type, config: Any, attention: str = NAME) -> Any:
    """A model of large random weights: attention is far from uniform, so that a wrong scale or mask shows."""
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0.0, 2.0 / weight.shape[-1] ** 0.5, generator=generator)
    return model


def padding(side: str) -> Tensor:
    """(3, 9), 1 = token; `holes` leaves one out in the middle."""
    if side == "none":
        return torch.ones(3, 9, dtype=torch.long)
    place = torch.arange(9)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (place < lengths) if side != "left" else (place >= 9 - lengths)
    if side == "holes":
        mask[:2, 2] = False
    return mask.long()


def tokens() -> Tensor:
    return torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(2))


def pixels() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def words(side: str) -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": padding(side)}


def sound(side: str) -> dict[str, Tensor]:
    features = torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(4))
    return {
        "input_features": features,
        "decoder_input_ids": tokens(),
        "decoder_attention_mask": padding(side),
    }


Made = tuple[type, Callable[[], Any], Callable[[str], dict[str, Tensor]]]
MODELS: dict[str, Made] = {
    "clip-text": (T.CLIPTextModel, lambda: T.CLIPTextConfig(**TEXT), words),
    "clip": (
        T.CLIPModel,
        lambda: T.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16),
        lambda side: words(side) | {"pixel_values": pixels()},
    ),
    "siglip-text": (T.SiglipTextModel, lambda: T.SiglipTextConfig(**TEXT), words),
    "siglip-image": (
        T.SiglipVisionModel,
        lambda: T.SiglipVisionConfig(**IMAGE),
        lambda side: {"pixel_values": pixels()},
    ),
    "whisper": (T.WhisperModel, lambda: T.WhisperConfig(**WHISPER), sound),
    "vit": (T.ViTModel, lambda: T.ViTConfig(**IMAGE), lambda side: {"pixel_values": pixels()}),
    "bert": (T.BertModel, lambda: T.BertConfig(**TEXT), words),
    "llama": (T.LlamaModel, llama, words),
}  # fmt: skip
CASES = [
    (name, side)
    for name in MODELS
    for side in (("none",) if name in ("siglip-image", "vit") else ("none", "right", "left", "holes"))
]


def outputs_and_gradients(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the last hidden states where there is a token, and the gradient of each parameter."""
    result = model(**inputs)
    mask = inputs.get("attention_mask", inputs.get("decoder_attention_mask"))
    if isinstance(model, T.CLIPModel):
        states = [result.text_model_output[0], result.vision_model_output[0]]
    else:
        states = [result[0]]
    if mask is not None:
        # a mask of four dimensions is seen from the last query
        seen = mask if mask.dim() == 2 else torch.ones(states[0].shape[:2])
        states[0] = states[0][seen.bool()]
    generator = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in states)
    assert isinstance(loss, Tensor)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(loss, weights, allow_unused=True)
    return [x.detach() for x in states] + [
        torch.zeros_like(x) if g is None else g for x, g in zip(weights, grads, strict=True)
    ]


def assert_same(got: list[Tensor], wanted: list[Tensor], tolerance: float = CLOSE) -> None:
    """Compare to the largest element of each tensor, or to a tenth of the largest of all if that is more.

    The gradient of a key's bias is zero, for it adds the same to all logits of a query: what is there is the rounding
    of terms as large as in the other gradients.
    """
    assert len(got) == len(wanted)
    got, wanted = ([x.detach() for x in both] for both in (got, wanted))
    floor = 0.1 * max(float(x.abs().max()) for x in wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.isfinite().all()
        assert float((a - b).abs().max()) <= tolerance * max(float(b.abs().max()), floor)


@pytest.mark.parametrize("theirs", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "side"), CASES)
def test_same_outputs_and_gradients(name: str, side: str, theirs: str) -> None:
    kind, config, inputs = MODELS[name]
    wanted = outputs_and_gradients(make(kind, config(), theirs), inputs(side))
    assert_same(outputs_and_gradients(make(kind, config()), inputs(side)), wanted)


@pytest.mark.parametrize("how", ["bool", "float", "broadcast"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_mask_of_four_dimensions_is_a_bias(name: str, how: str) -> None:
    kind, config, _ = MODELS[name]
    mask = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(6)) < 0.6
    mask[..., 0] = True
    if how == "float":
        mask = torch.randn(3, 1, 9, 9, generator=torch.Generator().manual_seed(7)).masked_fill(~mask, -3e38)
    elif how == "broadcast":
        mask = mask[:, :, :1]
    inputs = {"input_ids": tokens(), "attention_mask": mask}
    wanted = outputs_and_gradients(make(kind, config(), "sdpa"), inputs)
    assert_same(outputs_and_gradients(make(kind, config()), inputs), wanted)


@pytest.mark.parametrize("side", ["none", "left"])
def test_is_causal_of_the_call_is_obeyed(side: str) -> None:
    inputs = words(side) | {"is_causal": False, "use_cache": False}
    got, wanted = (
        outputs_and_gradients(make(T.LlamaModel, llama(), name), inputs) for name in (NAME, "sdpa")
    )
    assert_same(got, wanted)
    causal = outputs_and_gradients(make(T.LlamaModel, llama()), words(side))
    assert (got[0] - causal[0]).abs().max() > 0.1


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generates_the_same_tokens(cache: str, side: str) -> None:
    def generate(attention: str) -> tuple[Tensor, Tensor]:
        model = make(T.LlamaForCausalLM, llama(), attention)
        done = model.generate(
            **words(side), max_new_tokens=8, do_sample=False, cache_implementation=cache, disable_compile=True,
            return_dict_in_generate=True, output_logits=True, eos_token_id=None,
        )  # fmt: skip
        return done.sequences, torch.stack(done.logits)

    (got, got_logits), (wanted, wanted_logits) = generate(NAME), generate("sdpa")
    assert got.tolist() == wanted.tolist()
    assert_same([got_logits], [wanted_logits])


def test_whisper_generates_the_same_tokens() -> None:
    """Its decoder keeps two caches, one of them for the encoder's states."""

    def generate(attention: str) -> list[list[int]]:
        model = make(T.WhisperForConditionalGeneration, T.WhisperConfig(**WHISPER), attention)
        features = sound("none")["input_features"]
        return model.generate(features, max_new_tokens=6, do_sample=False, eos_token_id=None).tolist()

    assert generate(NAME) == generate("sdpa")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_in_two_parts_is_the_prompt(cache: str) -> None:
    model = make(T.LlamaModel, llama())
    inputs = words("left")
    with torch.no_grad():
        whole = model(**inputs)[0]
        past = T.DynamicCache(config=model.config)
        if cache == "static":
            past = T.StaticCache(config=model.config, max_cache_len=16)
        parts = []
        for begin, end in ((0, 5), (5, 8), (8, 9)):
            part = {
                "input_ids": inputs["input_ids"][:, begin:end],
                "attention_mask": inputs["attention_mask"][:, :end],
            }
            parts.append(model(**part, past_key_values=past)[0])
    seen = inputs["attention_mask"].bool()
    assert_same([torch.cat(parts, 1)[seen]], [whole[seen]])


class Spy:
    """Stands in for cross_modal_attention, calls it and keeps what it was handed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Tensor, Source, dict[str, Any]]] = []
        self.true = hf.cross_modal_attention
        monkeypatch.setattr(hf, "cross_modal_attention", self)

    def __call__(self, query: Tensor, sources: list[Source], **options: Any) -> Any:
        [source] = sources
        self.calls.append((query, source, options))
        return self.true(query, sources, **options)


@pytest.mark.parametrize(("side", "starts"), [("right", [0, 0, 0]), ("left", [0, 4, 8])])
def test_padding_becomes_ranges_and_groups_stay_groups(
    side: str, starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(monkeypatch)
    make(T.LlamaModel, llama())(**words(side))
    make(T.BertModel, T.BertConfig(**TEXT))(**words(side))
    assert [source.causal for _, source, _ in spy.calls] == [True, True, False, False]
    assert [source.key.shape[2] for _, source, _ in spy.calls] == [2, 2, 4, 4]
    for query, source, _ in spy.calls:
        assert query.shape == (3, 9, 4, 8)
        assert source.bias is None
        assert source.lengths is not None
        assert source.lengths.tolist() == list(LENGTHS)
        assert source.starts is not None
        assert source.starts.tolist() == starts


def test_without_padding_nothing_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    make(T.LlamaModel, llama())(**words("none"))
    make(T.LlamaModel, llama())(input_ids=tokens())
    assert len(spy.calls) == 4
    for _, source, _ in spy.calls:
        assert source.causal
        assert (source.lengths, source.starts, source.bias) == (None, None, None)


def test_views_are_handed_on_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    query, key, value = (x.transpose(1, 2) for x in torch.randn(2, 5, 3, 4, 8).unbind(2))
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    call(layer, query, key, value, None)
    [(handed, source, _)] = spy.calls
    for ours, theirs in ((handed, query), (source.key, key), (source.value, value)):
        assert ours.data_ptr() == theirs.data_ptr()
        assert ours.stride() == theirs.transpose(1, 2).stride()


def test_heads_that_are_not_in_one_piece_are_copied() -> None:
    query, key, value = (torch.randn(2, 4, 8, 5).transpose(2, 3) for _ in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert_same([call(nn.Module(), query, key, value, None, is_causal=False)], [wanted])


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_that_wants_the_whole_mask_gets_it(causal: bool) -> None:
    """It works on it further, as Falcon does to add its alibi."""
    config = T.BertConfig(**TEXT, attn_implementation=NAME)
    arguments = (config, torch.randn(3, 9, 32), padding("left"))
    if causal:
        mask = T.masking_utils.create_causal_mask(*arguments, None, allow_is_causal_skip=False)
    else:
        mask = T.masking_utils.create_bidirectional_mask(*arguments, allow_is_bidirectional_skip=False)
    wanted = padding("left").bool()[:, None, None].expand(3, 1, 9, 9)
    assert torch.equal(mask, wanted.tril() if causal else wanted)


def test_queries_past_the_last_key_get_the_whole_mask() -> None:
    """No flag says where they stand."""
    mask = hf._make_mask(2, 3, 4, q_offset=2)
    assert torch.equal(mask, torch.ones(2, 1, 3, 4, dtype=torch.bool).tril(2))


def test_the_backend_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    name = hf.register_attention("mmscale_reference", backend="reference")
    spy = Spy(monkeypatch)
    wanted, got = (
        make(T.BertModel, T.BertConfig(**TEXT), which)(**words("left"))[0] for which in (NAME, name)
    )
    assert [options["backend"] for _, _, options in spy.calls] == [None, None, "reference", "reference"]
    seen = padding("left").bool()
    assert_same([got[seen]], [wanted[seen]])


def test_autocast_is_followed() -> None:
    """Queries that a rotation has made fp32 again are used in the dtype of autocast, as sdpa uses them.

    bf16 keeps 8 bits: the two forms round to results that differ by some times 2**-8.
    """
    query = torch.randn(2, 4, 5, 8)
    key, value = (torch.randn(2, 4, 5, 8).bfloat16() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = call(nn.Module(), query, key, value, None, is_causal=False)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert_same([got], [wanted], tolerance=0.03)


def test_learned_queries_of_one_row_serve_all() -> None:
    key, value = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8)
    query = torch.randn(1, 2, 4, 8)
    layer = nn.Module()
    layer.is_causal = False  # type: ignore[assignment]
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    assert_same([call(layer, query, key, value, None)], [wanted])


# Dropout


def train_step(config: Any, seed: int, *, checkpointing: bool = False) -> list[Tensor]:
    model = make(T.LlamaForCausalLM, config).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(seed)
    loss = model(**words("right"), labels=tokens(), use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_dropout_follows_the_seed_of_torch() -> None:
    config = llama(attention_dropout=0.3)
    first = train_step(config, 0)
    assert all(torch.equal(a, b) for a, b in zip(train_step(config, 0), first, strict=True))
    assert train_step(config, 1)[0] != first[0]
    assert train_step(llama(), 0)[0] != first[0]


def test_dropout_is_drawn_again_in_a_checkpoint() -> None:
    config = llama(attention_dropout=0.3)
    assert_same(train_step(config, 0, checkpointing=True), train_step(config, 0))


def test_no_dropout_when_evaluating() -> None:
    inputs = words("right")
    torch.manual_seed(0)
    before = torch.get_rng_state()
    dropped, plain = (make(T.LlamaModel, llama(attention_dropout=p))(**inputs)[0] for p in (0.5, 0.0))
    assert torch.equal(dropped, plain)
    model = make(T.LlamaModel, llama(attention_dropout=0.5))
    torch.set_rng_state(before)
    model(**inputs)
    assert torch.equal(torch.get_rng_state(), before)


# Refusals


def refused(match: str, kind: type, config: Any, inputs: dict[str, Any]) -> None:
    model = make(kind, config)
    with pytest.raises(UserError, match=match):
        model(**inputs)


def test_refuses_position_bias() -> None:
    config = T.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()}
    refused("T5Attention: position_bias asks for a position bias", T.T5Model, config, inputs)


def test_refuses_soft_caps() -> None:
    config = T.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8)
    refused("softcap asks for a soft cap", T.Gemma2Model, config, words("none"))


def test_refuses_sinks() -> None:
    config = T.GptOssConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    refused("s_aux asks for attention sinks", T.GptOssModel, config, words("none"))


def test_refuses_wide_windows_without_making_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have Lq x Lk elements."""
    monkeypatch.setattr(T.masking_utils, "sdpa_mask", lambda *_, **__: pytest.fail("the mask was made"))
    config = T.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=4)
    refused("window or chunk of 4 over 9 keys", T.MistralModel, config, words("none"))


@pytest.mark.parametrize("side", ["none", "right"])
def test_refuses_windows_that_hide_a_key(side: str) -> None:
    config = T.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=6)
    refused("window or chunk of 6 over 9 keys", T.MistralModel, config, words(side))


def test_refuses_a_window_where_no_mask_was_made() -> None:
    layer = nn.Module()
    layer.is_causal = True  # type: ignore[assignment]
    x = torch.randn(1, 2, 9, 8)
    with pytest.raises(UserError, match="sliding_window is 6 and there are 9 keys"):
        call(layer, x, x, x, None, sliding_window=6)


def test_refuses_windows_on_both_sides() -> None:
    config = T.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2, local_attention=8)
    refused("window or chunk of 4 over 9 keys", T.ModernBertModel, config, words("right"))


@pytest.mark.parametrize("window", [9, 64])
def test_a_window_as_wide_as_the_text_hides_nothing(window: int) -> None:
    config = {"num_key_value_heads": 2, "sliding_window": window}
    got, wanted = (
        outputs_and_gradients(make(T.MistralModel, T.MistralConfig(**TEXT, **config), name), words("left"))
        for name in (NAME, "sdpa")
    )
    assert_same(got, wanted)


def test_a_cache_that_forgets_what_the_window_hides_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generation goes beyond the window: each step hands only the keys within it."""

    def generate(attention: str) -> list[list[int]]:
        config = T.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=10)
        model = make(T.MistralForCausalLM, config, attention)
        return model.generate(**words("left"), max_new_tokens=8, do_sample=False, eos_token_id=None).tolist()

    spy = Spy(monkeypatch)
    assert generate(NAME) == generate("sdpa")
    assert [source.bias for _, source, _ in spy.calls] == [None] * 16
    assert max(source.key.shape[1] for _, source, _ in spy.calls) == 10


def test_refuses_chunks() -> None:
    config = T.Llama4TextConfig(
        **TEXT, num_key_value_heads=2, head_dim=8, intermediate_size_mlp=64, num_local_experts=2,
        attention_chunk_size=4, attn_temperature_tuning=False,
    )  # fmt: skip
    refused("window or chunk of 4 over 9 keys", T.Llama4TextModel, config, words("none"))


def test_refuses_sequences_packed_into_a_row() -> None:
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(3, -1)
    inputs = {"input_ids": tokens(), "position_ids": position_ids, "use_cache": False}
    refused("sequences packed into one row", T.LlamaModel, llama(), inputs)
    model = make(T.LlamaModel, llama())
    plain = model(input_ids=tokens(), position_ids=torch.arange(9)[None].expand(3, -1), use_cache=False)[0]
    assert torch.equal(plain, model(input_ids=tokens())[0])


@pytest.mark.parametrize("name", ["bert", "clip-text", "siglip-image", "whisper"])
def test_refuses_to_return_attention_weights(name: str) -> None:
    kind, config, inputs = MODELS[name]
    refused("output_attentions asks for", kind, config(), inputs("none") | {"output_attentions": True})


def test_refuses_masks_of_three_dimensions() -> None:
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(3, 9, 9)}
    refused(r"attention_mask has shape \(3, 9, 9\); it needs", T.BertModel, T.BertConfig(**TEXT), inputs)


def test_refuses_packed_lengths_and_what_it_does_not_know() -> None:
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    refused("sequences packed", T.LlamaModel, llama(), {"input_ids": tokens(), "cu_seq_lens_q": ends})
    refused("passes temperature", T.LlamaModel, llama(), {"input_ids": tokens(), "temperature": 0.5})


def call(layer: nn.Module, *tensors: Tensor | None, **options: Any) -> Tensor:
    """Call our function as a layer of a model would."""
    function = T.AttentionInterface()[NAME]
    out, weights = function(layer, *tensors, **options)
    assert weights is None
    return out


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(2, 1, 5, 5, dtype=torch.long), "dtype torch.int64; it needs bool"),
        (torch.ones(2, 5), r"shape \(2, 5\).*four dimensions"),
        (torch.ones(2, 1, 1, 5, 5), r"shape \(2, 1, 1, 5, 5\).*unchanged"),  # ours, after a mask was added
        (torch.ones(2, 1, 1, 1, 6), "for 5 keys"),
    ],
)
def test_refuses_masks_it_can_not_read(mask: Tensor, match: str) -> None:
    x = torch.randn(2, 2, 5, 8)
    with pytest.raises(UserError, match=match):
        call(nn.Module(), x, x, x, mask)


@pytest.mark.parametrize("name", sorted(hf.REFUSED))
def test_refuses_each_argument_it_names(name: str) -> None:
    x = torch.randn(2, 2, 5, 8)
    with pytest.raises(UserError, match=f"Module: {name} asks for "):
        call(nn.Module(), x, x, x, None, is_causal=False, **{name: torch.ones(2)})
    call(nn.Module(), x, x, x, None, is_causal=False, **{name: None})


def test_refuses_to_guess_what_is_causal() -> None:
    x = torch.randn(2, 2, 5, 8)
    layer = nn.Module()
    with pytest.raises(UserError, match="neither a mask nor is_causal"):
        call(layer, x, x, x, None)
    with pytest.raises(UserError, match="which key the first query stands at"):
        call(layer, x[:, :, :3], x, x, None, is_causal=True)
    mask = torch.full((2, *[1] * (hf.CAUSAL_DIMS - 2), 5), torch.nan)
    with pytest.raises(UserError, match="is_causal is False, but its mask is causal"):
        call(layer, x, x, x, mask, is_causal=False)
    call(layer, x, x, x, mask)
    call(layer, x[:, :, :1], x, x, None)  # one query sees all, causal or not


@pytest.mark.parametrize("name", ["org/mmscale", "mmscale:1", "", "my_flash", "SDPA", "paged_mmscale"])
def test_refuses_names_that_mean_something_to_transformers(name: str) -> None:
    with pytest.raises(UserError, match="letters, digits and underscores"):
        hf.register_attention(name)
    assert name not in T.AttentionInterface()


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(UserError, match="backend is 'cuda'"):
        hf.register_attention("mmscale_other", backend="cuda")
    assert "mmscale_other" not in T.AttentionInterface()


# The dry run


BLIP_CONFIG = {
    "text_config": TEXT | {"sep_token_id": 2},
    "vision_config": IMAGE,
    "image_text_hidden_size": 16,
}


def both() -> dict[str, Tensor]:
    return words("right") | {"pixel_values": pixels()}


def test_check_counts_the_calls_and_leaves_the_model_alone() -> None:
    kind, config, inputs = MODELS["clip"]
    model = make(kind, config()).train()
    model.vision_model.eval()
    training = [module.training for module in model.modules()]
    check = hf.check_attention(model, inputs("right"))
    names = [
        f"{part}_model.encoder.layers.{layer}.self_attn" for part in ("text", "vision") for layer in (0, 1)
    ]
    assert check.calls == dict.fromkeys(names, 1)
    assert str(check) == "4 attention layers, 4 calls"
    assert [module.training for module in model.modules()] == training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("name", ["whisper", "vit", "bert", "llama"])
def test_check_passes_where_all_layers_dispatch(name: str) -> None:
    kind, config, inputs = MODELS[name]
    check = hf.check_attention(make(kind, config()), inputs("right"))
    assert sum(check.calls.values()) == (6 if name == "whisper" else 2)


def test_check_fails_on_blip() -> None:
    model = make(T.BlipModel, T.BlipConfig(**BLIP_CONFIG))
    with pytest.raises(UserError) as caught:
        hf.check_attention(model, both())
    said = str(caught.value)
    assert "4 of 6 compute their own attention" in said
    assert "vision_model.encoder.layers.1.self_attn (BlipAttention)" in said
    assert "text_model.encoder.layer.0.attention.self (BlipTextSelfAttention)" in said
    # the text model has layers for the other tower's states, and BlipModel never runs them
    assert "2 of 6 don't run on these inputs: text_model.encoder.layer.0.crossattention.self" in said


def test_check_fails_on_flava() -> None:
    config = T.FlavaConfig(text_config=TEXT, image_config=IMAGE, multimodal_config=SIZES)
    with pytest.raises(UserError) as caught:
        hf.check_attention(make(T.FlavaModel, config), both())
    said = str(caught.value)
    assert "6 of 6 compute their own attention" in said
    for part in ("text", "image", "multimodal"):
        assert f"{part}_model.encoder.layer.0.attention.attention (FlavaSelfAttention)" in said


def test_a_model_that_does_not_dispatch_gives_nothing_that_looks_right() -> None:
    """Handed our mask, it fails or gives NaN, with one sample and with several."""
    model = make(T.BlipModel, T.BlipConfig(**BLIP_CONFIG)).text_model
    for size in (1, 3):
        try:
            out = model(**{name: x[-size:] for name, x in words("right").items()})[0]
        except RuntimeError:
            continue
        assert out.isnan().any(-1).all()


def test_check_names_the_layer_that_is_not_theirs_to_set() -> None:
    kind, config, inputs = MODELS["siglip-image"]
    model = make(kind, config())
    with pytest.raises(UserError, match=r"1 of 3 .*: head\.attention \(MultiheadAttention\)$"):
        hf.check_attention(model, inputs("none"))
    check = hf.check_attention(model, inputs("none"), ignore=["head.*"])
    assert (check.ignored, sum(check.calls.values())) == (("head.attention",), 2)
    with pytest.raises(UserError, match=r"ignore has heads, which no attention layer is called"):
        hf.check_attention(model, inputs("none"), ignore=["heads"])


def test_check_fails_on_another_setting_and_on_layers_not_reached() -> None:
    kind, config, inputs = MODELS["llama"]
    with pytest.raises(UserError, match=r"none calls it; the model's attn_implementation is 'sdpa'"):
        hf.check_attention(make(kind, config(), "sdpa"), inputs("none"))
    holder = nn.ModuleDict(
        {"one": make(kind, config()), "other": make(*MODELS["bert"][:1], MODELS["bert"][1]())}
    )
    holder.forward = lambda **inputs: holder["one"](**inputs)
    with pytest.raises(UserError, match=r"2 of 4 don't run on these inputs: other\.encoder"):
        hf.check_attention(holder, inputs("none"))


def test_check_passes_errors_of_the_model_on() -> None:
    kind, config, inputs = MODELS["llama"]
    model = make(kind, config())
    with pytest.raises(IndexError):
        hf.check_attention(model, {"input_ids": torch.tensor([[1000]])})
    failures = [ArithmeticError("only once")]

    def fail(*_: Any) -> None:
        if failures:
            raise failures.pop()

    model.norm.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError, match="only once"):
        hf.check_attention(model, inputs("none"))


def test_check_evaluates_without_gradients() -> None:
    kind, config, inputs = MODELS["llama"]
    model = make(kind, config()).train()
    seen: list[tuple[bool, bool]] = []
    model.norm.register_forward_pre_hook(
        lambda module, _: seen.append((module.training, torch.is_grad_enabled()))
    )
    hf.check_attention(model, inputs("none"))
    assert seen == [(False, False)]


class Core(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return call(self, x, x, x, None, is_causal=False)


class AttentionNorm(nn.Identity):
    pass


class OuterAttention(nn.Module):
    """Calls from a part that isn't called attention."""

    def __init__(self) -> None:
        super().__init__()
        self.core = Core()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


class NormedAttention(Core):
    """Has a part that is called attention and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = AttentionNorm()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("layer", [OuterAttention, NormedAttention])
def test_check_sees_calls_around_and_within_a_layer(layer: type[nn.Module]) -> None:
    model = nn.Sequential(layer())
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    assert sum(hf.check_attention(model, {"x": torch.randn(2, 2, 5, 8)}).calls.values()) == 1


def test_the_example_in_the_docs_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = (
        (Path(__file__).parent.parent / "docs" / "kernels.md").read_text().split("## transformers models")[1]
    )
    kind, config, inputs = MODELS["clip"]
    make(kind, config()).save_pretrained(tmp_path)
    code = section.split("```python\n")[1].split("```")[0]
    capsys.readouterr()
    exec(code, {"folder": tmp_path, "inputs": inputs("right")})
    assert capsys.readouterr().out == "4 attention layers, 4 calls\n"
    assert code.rstrip().endswith("# 4 attention layers, 4 calls")


@pytest.mark.slow
def test_compiled_models_give_the_same() -> None:
    model = make(T.LlamaModel, llama())
    with torch.no_grad():
        wanted = model(**words("left"))[0]
        got = torch.compile(model, backend="eager")(**words("left"))[0]
    assert_same([got[padding("left").bool()]], [wanted[padding("left").bool()]])


@pytest.mark.slow
def test_transformers_is_imported_late() -> None:
    program = "import sys, mmscale.models.hf; print({'transformers', 'deepspeed', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
