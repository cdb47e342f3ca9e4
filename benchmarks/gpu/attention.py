"""The attention cases: lengths, short keys, several sources, bias with gradient, long keys.

Counted work, the same for all contenders: of the (query, key) pairs that lengths and causality leave, 4 D operations
forward and 10 D backward (two and five products). Bytes: queries and results, valid keys and values once forward;
backward reads query, key, value, out and its gradient and writes three gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmscale_kernels import Source, cross_modal_attention, explain
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.harness import Case, Contender, Emit, Setting, Tensors, Work

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def spread_lengths(batch: int, most: int, seed: int) -> Tensor:
    """Lengths from 1 to `most`, evenly spread and shuffled: half full on average."""
    even = torch.linspace(1, most, batch).round().long() if batch > 1 else torch.tensor([(most + 1) // 2])
    return even[torch.randperm(batch, generator=torch.Generator().manual_seed(seed))]


def make(setting: Setting, sizes: dict[str, Any], seed: int) -> Tensors:
    device = setting.device
    generator = torch.Generator(device=device).manual_seed(seed)
    # fp32 on a CPU: a smoke run is about the code, and halves are slow there
    dtype = torch.bfloat16 if setting.on_gpu else torch.float32

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, generator=generator)

    batch, heads, width, lq = sizes["b"], sizes["h"], sizes["d"], sizes["lq"]
    made: Tensors = {"query": normal(batch, lq, heads, width).requires_grad_()}
    for name in ("key", "value"):
        made[name] = [normal(batch, lk, heads, width).requires_grad_() for lk in sizes["lk"]]
    made["host_lengths"] = [spread_lengths(batch, lk, 7 + i) for i, lk in enumerate(sizes["lk"])]
    made["lengths"] = [x.to(device) for x in made["host_lengths"]] if sizes.get("lengths") else None
    made["bias"] = normal(1, heads, lq, sum(sizes["lk"])).requires_grad_() if sizes.get("bias") else None
    made["causal"] = bool(sizes.get("causal"))
    made["grad_out"] = normal(batch, lq, heads, width)
    if sizes.get("packed"):
        rows = valid_rows(made["host_lengths"][0], sizes["lk"][0]).to(device)
        made["packed"] = [
            made[name][0].detach().flatten(0, 1)[rows].requires_grad_() for name in ("key", "value")
        ]
    return made


def valid_rows(lengths: Tensor, lk: int) -> Tensor:
    """Rows of (B * Lk) that lie within the lengths."""
    return torch.cat([torch.arange(int(n)) + b * lk for b, n in enumerate(lengths)])


def sources(inputs: Tensors, lengths: list[Tensor] | None = None) -> list[Source]:
    given = lengths if lengths is not None else inputs["lengths"]
    return [
        Source(
            key,
            value,
            lengths=None if given is None else given[i],
            bias=inputs["bias"],
            causal=inputs["causal"],
        )
        for i, (key, value) in enumerate(zip(inputs["key"], inputs["value"], strict=True))
    ]


def valid(inputs: Tensors) -> Tensor:
    """(B, sum of Lk) bool: keys within their source's length."""
    parts = []
    for i, key in enumerate(inputs["key"]):
        place = torch.arange(key.shape[1], device=key.device)
        lengths = inputs["lengths"]
        full = torch.ones(key.shape[0], key.shape[1], dtype=torch.bool, device=key.device)
        parts.append(full if lengths is None else place < lengths[i][:, None])
    return torch.cat(parts, 1)


def dense(inputs: Tensors) -> Tensor:
    """Softmax over all keys, written out."""
    key, value = (torch.cat(inputs[name], 1) for name in ("key", "value"))
    logits = torch.einsum("bqhd,bkhd->bhqk", inputs["query"], key) * inputs["query"].shape[-1] ** -0.5
    if inputs["bias"] is not None:
        logits = logits + inputs["bias"]
    seen = valid(inputs)[:, None, None, :]
    if inputs["causal"]:
        lq, lk = logits.shape[-2:]
        seen = seen & torch.ones(lq, lk, dtype=torch.bool, device=key.device).tril(lk - lq)
    probability = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probability, value)


def joined(inputs: Tensors, name: str) -> Tensor:
    """One source as it is; several are concatenated, inside the time, as a user of the peer would have to."""
    parts = inputs[name]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)


def sdpa(backend: str, mask: Tensor | None = None, use_bias: bool = False) -> Callable[[Tensors], Tensor]:
    def run(inputs: Tensors) -> Tensor:
        bias = inputs["bias"] if use_bias else mask
        with sdpa_kernel([BACKENDS[backend]]):
            out = F.scaled_dot_product_attention(
                inputs["query"].transpose(1, 2),
                joined(inputs, "key"),
                joined(inputs, "value"),
                attn_mask=bias,
                is_causal=inputs["causal"],
            )
        return out.transpose(1, 2)

    return run


@contextmanager
def deterministic() -> Iterator[None]:
    """torch's deterministic algorithms, which the flash backward looks at when it runs."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it would cost the peer a pass over its results
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def flex(setting: Setting, inputs: Tensors, build: str) -> Callable[[Tensors], Tensor]:
    """FlexAttention. build: "" = no mask; "before", "inside" = the block mask is built before, or inside, the time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend, create = setting.compiled(flex_attention), setting.compiled(create_block_mask)
    lk = sum(key.shape[1] for key in inputs["key"])
    batch, lq = inputs["query"].shape[:2]
    # Sources lie one after the other: a key is seen if it is within the length of its own source.
    sizes = [key.shape[1] for key in inputs["key"]]
    source_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(setting.device)
    offsets = (torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)).to(setting.device)
    place = torch.arange(lk, device=setting.device) - offsets[source_of]

    table = None if inputs["lengths"] is None else torch.stack(inputs["lengths"])

    # One function for all calls (all copies of the inputs have the same lengths), so that nothing is compiled twice.
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q + lk - lq >= k if table is None else place[k] < table[source_of[k], b]

    def block_mask() -> Any:
        return create(seen, None if table is None else batch, None, lq, lk, device=setting.device.type)

    ready = block_mask() if build == "before" else None

    def run(given: Tensors) -> Tensor:
        if not setting.on_gpu:  # there it refuses whatever requires a gradient
            given = given | {name: [x.detach() for x in given[name]] for name in ("key", "value")}
            given["query"] = given["query"].detach()
        mask = block_mask() if build == "inside" else ready
        score = None
        if given["bias"] is not None:
            bias = given["bias"]

            def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return score + bias[0, h, q, k]

        query = given["query"].transpose(1, 2)
        out = attend(query, joined(given, "key"), joined(given, "value"), score_mod=score, block_mask=mask)
        return out.transpose(1, 2)

    return run


def varlen(inputs: Tensors, pack: bool) -> Callable[[Tensors], Tensor]:
    """torch's variable-length flash. With `pack` the valid keys and values are gathered inside the time.

    Index and offsets are made beforehand from lengths that the host knows, which favours the peer.
    """
    attend = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    batch, lq = inputs["query"].shape[:2]
    device = inputs["query"].device
    lk = inputs["key"][0].shape[1]
    lengths = inputs["host_lengths"][0]
    index = valid_rows(lengths, lk).to(device)
    of_keys = F.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    of_queries = (torch.arange(batch + 1) * lq).int().to(device)
    most = int(lengths.max())

    def run(given: Tensors) -> Tensor:
        if pack:
            key, value = (given[name][0].flatten(0, 1).index_select(0, index) for name in ("key", "value"))
        else:
            key, value = given["packed"]
        out = attend(given["query"].flatten(0, 1), key, value, of_queries, of_keys, lq, most)
        return out.view(given["query"].shape)

    return run


def flash3(inputs: Tensors) -> Callable[[Tensors], Tensor]:
    for name in ("fa3_fwd_interface", "fa3_fwd", "flash_attn_interface"):
        try:
            attend = importlib.import_module(name).flash_attn_func
        except (ImportError, AttributeError):
            continue

        def run(given: Tensors, attend: Any = attend) -> Tensor:
            out = attend(given["query"], given["key"][0], given["value"][0], causal=given["causal"])
            return out[0] if isinstance(out, tuple) else out

        return run
    raise ImportError("no module fa3_fwd_interface, fa3_fwd or flash_attn_interface with flash_attn_func")


def contenders(setting: Setting, inputs: Tensors, emit: Emit, sizes: dict[str, Any]) -> list[Contender]:
    def attend(given: Tensors) -> Tensor:
        return cross_modal_attention(given["query"], sources(given))

    found = [Contender("ours", attend)]

    def offer(name: str, load: Callable[[], Callable[[Tensors], Tensor]], **rest: Any) -> None:
        try:
            found.append(Contender(name, load(), **rest))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            emit("absent", case="attention", contender=name, why=why)

    joins = "concatenated inside the time" if len(inputs["key"]) > 1 else ""
    if inputs["bias"] is not None:
        for name in ("efficient", "cuDNN"):
            offer(f"SDPA {name}", lambda name=name: sdpa(name, use_bias=True), needs_gpu=True)
        if setting.on_gpu:  # there is no backward of it on a CPU
            offer("Flex", lambda: flex(setting, inputs, ""))
        return found
    if inputs["lengths"] is None:
        for name in ("flash", "efficient", "cuDNN"):
            offer(f"SDPA {name}", lambda name=name: sdpa(name), needs_gpu=name != "flash", note=joins)
        if sizes.get("deterministic"):
            offer("SDPA flash deterministic", lambda: sdpa("flash"), context=deterministic)
        if sizes.get("flash3"):
            offer("FlashAttention-3", lambda: flash3(inputs), needs_gpu=True, forward_only=True)
        return found
    mask = valid(inputs)[:, None, None, :].expand(-1, -1, inputs["query"].shape[1], -1)
    full = [torch.full_like(n, key.shape[1]) for n, key in zip(inputs["lengths"], inputs["key"], strict=True)]
    for name in ("efficient", "cuDNN"):
        offer(f"SDPA {name} + mask", lambda name=name: sdpa(name, mask), needs_gpu=True, note=joins)
    offer("SDPA flash, padding attended", lambda: sdpa("flash"), note="another result: no mask")
    forward_only = not setting.on_gpu
    offer("Flex", lambda: flex(setting, inputs, "before"), forward_only=forward_only, note=joins)
    offer("Flex + mask build", lambda: flex(setting, inputs, "inside"), forward_only=forward_only, note=joins)
    if sizes.get("packed"):
        offer("varlen + packing", lambda: varlen(inputs, True), needs_gpu=True)
        offer("varlen", lambda: varlen(inputs, False), needs_gpu=True, prepacked=True, note="packed before")
        found.append(
            Contender(
                "ours, full lengths",
                lambda given: cross_modal_attention(given["query"], sources(given, full)),
                note="nothing masked: beside the next row, what lengths cost",
            )
        )
        found.append(
            Contender(
                "ours, no lengths",
                lambda given: attend({**given, "lengths": None}),
                note="nothing masked",
            )
        )
    return found


def work(sizes: dict[str, Any], inputs: Tensors) -> dict[str, Work]:
    batch, heads, width, lq = sizes["b"], sizes["h"], sizes["d"], sizes["lq"]
    size = inputs["query"].element_size()
    given = inputs["host_lengths"] if inputs["lengths"] is not None else None
    keys = sum(int(x.sum()) for x in given) if given else batch * sum(sizes["lk"])
    pairs = float(lq * keys * heads)
    if sizes.get("causal"):
        lk = sizes["lk"][0]
        pairs = float(batch * heads * sum(max(0, min(lk, i + 1 + lk - lq)) for i in range(lq)))
    rows, columns = batch * lq * heads * width * size, keys * heads * width * size
    bias = inputs["bias"].numel() * size if inputs["bias"] is not None else 0
    forward = Work(4 * width * pairs, 2 * rows + 2 * columns + bias)
    backward = Work(10 * width * pairs, 4 * rows + 4 * columns + 2 * bias)
    both = Work(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "backward": backward, "forward_backward": both}


def decide(inputs: Tensors) -> dict[str, Any]:
    decision = explain(cross_modal_attention, inputs["query"], sources(inputs))
    return {"backend": decision.backend, "says": str(decision)}


def case(name: str, **sizes: Any) -> Case:
    num = len(sizes["lk"])
    tiny = {**sizes, "b": 2, "h": 2, "d": 16, "lq": 40, "lk": [40, 24, 17, 9][:num]}
    error = {**sizes, "b": 2, "h": 2, "lq": min(sizes["lq"], 1024), "lk": [min(x, 2048) for x in sizes["lk"]]}
    if sizes.get("causal"):
        tiny["lk"], error["lk"] = [tiny["lq"]], [error["lq"]]
    return Case(
        name=name,
        sizes=sizes,
        tiny=tiny,
        error_sizes=error,
        make=make,
        dense=dense,
        contenders=lambda setting, inputs, emit: contenders(setting, inputs, emit, sizes),
        work=work,
        decide=decide,
    )
