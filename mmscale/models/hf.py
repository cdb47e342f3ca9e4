"""transformers models on mmscale's kernels.

`register_attention` puts `cross_modal_attention` among the attention functions of transformers, where any model that
dispatches its attention can use it; `check_attention` proves with one forward pass that a given model does::

    name = register_attention()                                  # "mmscale_triton"
    model = AutoModel.from_pretrained(folder, attn_implementation=name)
    print(check_attention(model, inputs))

The name is only a name: on a CPU the torch form runs (see `mmscale_kernels.explain`).

What a model asks for and `cross_modal_attention` can't do (a learned position bias, attention sinks, a soft cap, a
window or chunk that hides a key, sequences packed into one row, attention weights as output) is a `UserError`, never
left out. So is an argument that this module doesn't know.

The trade-off is in the masks. The padding that tokenizers make, on the left or on the right, becomes one range of keys
per sample, and causal attention a flag: nothing of size Lq x Lk is made. To know that a mask is one range, it is read
once in a forward pass, which waits for the device as transformers' own mask for sdpa does. A mask with holes, or one
that comes ready-made with four dimensions, is used as a bias of its own size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from mmscale_kernels import Source, cross_modal_attention
from torch import Tensor, nn

from mmscale.errors import UserError

BACKENDS = (None, "triton", "torch", "reference")

# transformers looks for these words in a name, and then expects what belongs to them.
TAKEN_WORDS = ("eager", "flash", "flex", "paged", "sdpa")

# Arguments that change the result in a way that we can't follow, and what to call them.
REFUSED = {
    "position_bias": "a position bias",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "softcap": "a soft cap on the logits",
    "head_mask": "a head mask",
    "layer_head_mask": "a head mask",
    "output_attentions": "attention weights as output",
    "cu_seq_lens_q": "sequences packed into one row",
    "cu_seq_lens_k": "sequences packed into one row",
    "seq_idx": "sequences packed into one row",
    "cache": "a paged cache",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of blocks for each query",
}

# Arguments that travel through the layers and don't concern the attention function: the model has used them before it,
# or will after it. `position_ids` belongs here because a packed row is found, and refused, where the mask is made.
HARMLESS = frozenset({
    "cache_position",
    "deterministic",  # we always are
    "kernel_options",
    "labels",
    "layer_idx",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
})  # fmt: skip

# Our own masks are (B, 1, ..., 1, n), one range of seen keys a row, and say by their number of dimensions how they are
# meant, which costs nothing and survives torch.compile. Combined with a mask of four dimensions they no longer have the
# shape that we expect, and are refused. A seen key is NaN and another -inf: a model that adds the mask to logits of its
# own, because it doesn't dispatch, gets an error or NaN and never a wrong result that looks right.
CAUSAL_DIMS = 5  # query i sees keys up to i + n - Lq within its range
OPEN_DIMS = 7  # all queries see the range


class _Check:
    """What `check_attention` asks of the calls while it runs; plain attributes, because torch.compile reads them."""

    calls: list[nn.Module] | None = None  # the modules that called, in order
    plain_masks: bool = (
        False  # whether masks are to be such that a model doesn't fail that adds them to its logits
    )


def register_attention(name: str = "mmscale_triton", *, backend: str | None = None) -> str:
    """Make `cross_modal_attention` known to transformers, as an attention function and as a mask function; return name.

    name: what a model's `attn_implementation` is to be; letters, digits and underscores. Registering again under the
        same name replaces what was there, in all models that use it.
    backend: as in `cross_modal_attention`, None = decide for each call.

    Raises UserError if transformers would take the name for something else: a slash is a hub repository to it.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", name) or any(word in name.lower() for word in TAKEN_WORDS):
        raise UserError(
            f"name is {name!r}; it needs letters, digits and underscores only, "
            f"without any of {', '.join(TAKEN_WORDS)}, or transformers takes it for something else"
        )
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; it needs to be one of {', '.join(map(repr, BACKENDS))}")
    from transformers import AttentionInterface, AttentionMaskInterface

    # Without a mask function transformers hands no mask at all, and padding would be ignored.
    AttentionInterface.register(name, partial(_attend, backend=backend))
    AttentionMaskInterface.register(name, _make_mask)
    return name


@dataclass(frozen=True)
class AttentionCheck:
    """What `check_attention` found: calls of our attention by layer, and the layers that were left out."""

    calls: dict[str, int]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        left_out = f", {len(self.ignored)} ignored" if self.ignored else ""
        return f"{len(self.calls)} attention layers, {sum(self.calls.values())} calls{left_out}"


def check_attention(
    model: nn.Module, inputs: Mapping[str, Any], *, ignore: Sequence[str] = ()
) -> AttentionCheck:
    """Run the model once and make sure that all its attention layers call a function of `register_attention`.

    Some models take the setting and go on computing their own attention (BLIP, FLAVA), and some have a layer that does
    (the pooling of SigLIP is torch's MultiheadAttention).

    inputs: keyword arguments of the model, such that all its parts run.
    ignore: patterns (`*` stands for anything) of the names of layers that may go their own way.

    The pass is in evaluation mode and without gradients; the model is left as it was. A layer is a module with
    "Attention" or "Attn" in the name of its class, and no further such module within.

    Raises UserError with the names of the layers that don't call it, or that `inputs` doesn't reach.
    """
    layers = _attention_layers(model)
    ignored = tuple(name for name in layers if any(fnmatchcase(name, pattern) for pattern in ignore))
    unmatched = [pattern for pattern in ignore if not any(fnmatchcase(name, pattern) for name in layers)]
    if unmatched:
        raise UserError(
            f"ignore has {', '.join(unmatched)}, which no attention layer is called; they are {', '.join(layers)}"
        )
    called: list[nn.Module] = []
    reached: set[nn.Module] = set()
    failure: Exception | None = None
    handles = [
        module.register_forward_pre_hook(lambda module, _: reached.add(module)) for module in layers.values()
    ]
    _Check.calls = called
    try:
        with torch.no_grad(), _evaluating(model):
            try:
                model(**inputs)
            except UserError:
                raise
            except Exception as error:
                # A layer that adds our mask to logits of its own fails; with masks that it can add, we see which one.
                failure = error
                _Check.plain_masks = True
                try:
                    model(**inputs)
                finally:
                    _Check.plain_masks = False
    finally:
        _Check.calls = None
        for handle in handles:
            handle.remove()
    names = {module: name for name, module in model.named_modules()}
    calls: dict[str, int] = {}
    for module in called:
        calls[names[module]] = calls.get(names[module], 0) + 1
    own: list[str] = []
    unreached: list[str] = []
    for name, module in layers.items():
        # a layer may hold a part that is called attention too, or be such a part
        if name in ignored or any(_is_within(name, other) or _is_within(other, name) for other in calls):
            continue
        (own if module in reached else unreached).append(f"{name} ({type(module).__name__})")
    problems = []
    if own:
        problems.append(f"{len(own)} of {len(layers)} compute their own attention: {', '.join(own)}")
    if unreached:
        problems.append(
            f"{len(unreached)} of {len(layers)} don't run on these inputs: {', '.join(unreached)}"
        )
    if not calls:
        setting = getattr(getattr(model, "config", None), "_attn_implementation", None)
        problems.append(f"none calls it; the model's attn_implementation is {setting!r}")
    if problems:
        raise UserError(f"attention layers of {type(model).__name__}: " + "; ".join(problems)) from failure
    if failure is not None:
        raise failure
    return AttentionCheck(calls, ignored)


def _attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the innermost modules of the model that are called attention, by name."""
    named = {
        name: module
        for name, module in model.named_modules()
        if re.search("attention|attn", type(module).__name__, re.IGNORECASE)
    }
    return {
        name: module
        for name, module in named.items()
        if not any(other != name and _is_within(other, name) for other in named)
    }


def _is_within(name: str, other: str) -> bool:
    """Return whether the module `name` is `other` or a part of it."""
    return name == other or name.startswith(f"{other}." if other else "")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    backend: str | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query (B, H, Lq, D), key, value (B, Hkv, Lk, D); out (B, Lq, H, D)."""
    layer = type(module).__name__
    _refuse(layer, kwargs)
    _refuse(layer, {"output_attentions": _is_recorded()})
    num_queries = query.shape[2]
    bias = valid = None
    if attention_mask is None:
        causal = _causality(layer, module, is_causal, num_queries, key.shape[2])
    elif attention_mask.dim() == 4:
        # Ready-made: it holds all that there is to mask, causality included.
        causal = False
        bias = _as_bias(layer, attention_mask, query.dtype)
    else:
        causal, seen = _read_mask(layer, attention_mask, key.shape[2])
        if is_causal is not None and is_causal != causal and num_queries > 1:
            raise UserError(
                f"{layer}: is_causal is {is_causal}, but its mask is {'' if causal else 'not '}causal; "
                "they need to agree"
            )
        # Keys past the mask are the part of a static cache that nothing was written to yet.
        key, value = key[:, :, : seen.shape[1]], value[:, :, : seen.shape[1]]
        # Strides of 0 are how _make_mask says that all is seen.
        valid = seen.isnan() if any(seen.stride()) else None
    if sliding_window is not None and key.shape[2] > sliding_window:
        raise UserError(
            f"{layer}: sliding_window is {sliding_window} and there are {key.shape[2]} keys; mmscale's attention has "
            "no window, so there may be at most as many keys as it is wide"
        )
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (_to_kernel(x, batch) for x in (query, key, value))
    lengths = starts = None
    if valid is not None:
        valid = valid.expand(batch, -1)
        lengths = valid.sum(-1)
        starts = valid.to(torch.uint8).argmax(-1)  # the first of the largest
    # One seed for each sample; drawn where torch.manual_seed and activation checkpointing govern it, without a sync.
    seed = torch.randint(2**63 - 1, (batch,), device=query.device) if dropout > 0 else None
    out = cross_modal_attention(
        query,
        [Source(key, value, lengths=lengths, starts=starts, bias=bias, causal=causal)],
        scale=scaling,
        dropout_p=dropout,
        seed=seed,
        backend=backend,
    )
    if _Check.calls is not None:
        _Check.calls.append(module)
    assert isinstance(out, Tensor)
    return out, None


def _is_recorded() -> bool:
    """Return whether transformers records the attention weights that layers return.

    Most models don't pass `output_attentions` on to their layers, and would come back with none.
    """
    from transformers.utils import output_capturing

    recorder = output_capturing._active_collector.get()
    return recorder is not None and not {"attentions", "cross_attentions"}.isdisjoint(recorder)


def _refuse(layer: str, kwargs: dict[str, Any]) -> None:
    for name, argument in kwargs.items():
        if argument is None or argument is False or name in HARMLESS:
            continue
        what = REFUSED.get(name)
        if what is None:
            raise UserError(
                f"{layer}: it passes {name} ({type(argument).__name__}) to its attention, which mmscale's doesn't "
                "know; this model needs another attn_implementation"
            )
        raise UserError(
            f"{layer}: {name} asks for {what}, which mmscale's attention doesn't have; "
            "this model needs another attn_implementation"
        )


def _causality(
    layer: str, module: nn.Module, is_causal: bool | None, num_queries: int, num_keys: int
) -> bool:
    """Return whether attention without a mask is causal: by the argument, else by the module."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if num_queries == 1:
        return False  # the last token sees all
    if is_causal is None:
        raise UserError(
            f"{layer}: neither a mask nor is_causal, of the call or of the module, says whether its attention is causal"
        )
    if is_causal and num_queries != num_keys:
        raise UserError(
            f"{layer}: causal attention of {num_queries} queries over {num_keys} keys without a mask; nothing says "
            "which key the first query stands at"
        )
    return bool(is_causal)


def _as_bias(layer: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask (B or 1, H or 1, Lq or 1, Lk) as a term of the logits: True is 0, False is -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    if not mask.is_floating_point():
        raise UserError(
            f"{layer}: attention_mask has four dimensions and dtype {mask.dtype}; it needs bool (True = seen) or a "
            "floating dtype (added to the logits)"
        )
    return mask


def _read_mask(layer: str, mask: Tensor, num_keys: int) -> tuple[bool, Tensor]:
    """Return whether a mask of `_make_mask` is causal, and its last dimension (B, n), n <= Lk."""
    ours = (
        mask.dim() in (CAUSAL_DIMS, OPEN_DIMS)
        and all(size == 1 for size in mask.shape[1:-1])
        and mask.is_floating_point()
        and mask.shape[-1] <= num_keys
    )
    if not ours:
        raise UserError(
            f"{layer}: attention_mask has shape {tuple(mask.shape)} and dtype {mask.dtype} for {num_keys} keys; "
            "it needs four dimensions, or to be what transformers' create_..._mask returned, unchanged"
        )
    return mask.dim() == CAUSAL_DIMS, mask.squeeze(tuple(range(1, mask.dim() - 1)))


def _to_kernel(x: Tensor, batch: int) -> Tensor:
    """Return (B, H, L, D) as (B, L, H, D), in the dtype of autocast if that is on: a view, wherever possible."""
    # transformers relies on broadcasting for learned queries
    x = x.expand(batch, -1, -1, -1).transpose(1, 2)
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    # The kernels need D in one piece, which hardly any model's projections don't give.
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """The mask as transformers asks for it: ours (see CAUSAL_DIMS) or (B, 1, Lq, Lk) bool, True = seen.

    attention_mask: (B, seen tokens) bool, the tokens that aren't padding.
    local_size: width of a window or chunk.

    Raises UserError if `mask_function` is more than causal or open and not the same as one of them on these lengths.
    """
    from transformers import masking_utils

    causal_function = masking_utils.causal_mask_function
    open_function = masking_utils.bidirectional_mask_function
    mask_function = causal_function if mask_function is None else mask_function
    dense = partial(
        masking_utils.sdpa_mask, batch_size, q_length, kv_length, q_offset, kv_offset, device=device,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False,
    )  # fmt: skip
    if mask_function not in (causal_function, open_function):
        mask_function = _plain_function(dense, mask_function, use_vmap, kv_length, local_size)
    if attention_mask is not None and attention_mask.dim() in (CAUSAL_DIMS, OPEN_DIMS):
        return attention_mask  # generation with a static cache has asked us before the model does
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it needs (B, L) or (B, 1 or H, Lq, Lk)"
        )
    causal = mask_function is causal_function
    if _Check.plain_masks:
        return dense(mask_function=mask_function, attention_mask=attention_mask)
    # A model that doesn't allow to leave the mask away works on it further, and expects four dimensions.
    leave = allow_is_causal_skip if allow_is_bidirectional_skip is None else allow_is_bidirectional_skip
    # The last query stands at the last key that counts; behind that a static cache has room for more.
    num_keys = int(q_offset) + q_length - kv_offset if causal and leave else kv_length
    if not leave or not 0 < num_keys <= kv_length:
        return dense(mask_function=mask_function, attention_mask=attention_mask)
    shape = (batch_size, *[1] * ((CAUSAL_DIMS if causal else OPEN_DIMS) - 2), num_keys)
    everything = torch.full((), math.nan, device=device).expand(shape)
    if attention_mask is None:
        return everything
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    valid = padding[:, kv_offset : kv_offset + num_keys].to(device=device, dtype=torch.bool)
    begins = valid[:, :1].sum(-1) + (valid[:, 1:] & ~valid[:, :-1]).sum(-1)
    is_full, is_range = torch.stack([valid.all(), (begins <= 1).all()]).tolist()
    if is_full:
        return everything
    if not is_range:
        return dense(mask_function=mask_function, attention_mask=attention_mask)
    return torch.where(valid, math.nan, -math.inf).reshape(valid.shape[0], *shape[1:])


def _plain_function(
    dense: Callable[..., Tensor],
    mask_function: Callable[..., Any],
    use_vmap: bool,
    kv_length: int,
    local_size: int | None,
) -> Callable[..., Any]:
    """Return the causal or the open mask function, whichever is the same as `mask_function` on these lengths.

    So that a window that is wider than the sequence is allowed. The masks are made in full to compare them, but not
    where a window or chunk, at most as wide as `local_size` on each side, can't reach all keys.
    """
    from transformers import masking_utils

    if local_size is not None:
        what = f"a window or chunk of {local_size} over {kv_length} keys"
    else:
        what = (
            "more than causality and padding (sequences packed into one row, which position_ids that start anew mean, "
            "or blocks of tokens that see each other)"
        )
    if local_size is None or kv_length <= local_size + 1:
        wanted = dense(mask_function=mask_function, use_vmap=use_vmap)
        for plain in (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function):
            if torch.equal(dense(mask_function=plain), wanted):
                return plain
    raise UserError(
        f"the model asks for a mask with {what}, which mmscale's attention doesn't have; "
        'use attn_implementation="sdpa" or "eager", or pass a mask (B, 1, Lq, Lk) of your own'
    )
