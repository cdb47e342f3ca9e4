"""A tokenizer for the texts of shards, where there isn't one already.

    from mmscale.data.tokenizer import train_on_shards
    train_on_shards("shards", Path("tokenizer.json"), source="txt|json.caption")

Byte-level BPE by the `tokenizers` library, with <pad>, <bos> and <eos>: any text round-trips.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmscale.data.fields import Field
from mmscale.data.pack import train_tokenizer, write_bytes
from mmscale.data.stream import ShardStream
from mmscale.errors import DataError


def train_on_shards(
    shards: str | Path | Sequence[str | Path],
    out: Path,
    *,
    source: str = "txt|json.caption|json.captions",
    vocab_size: int = 4096,
    limit: int = 1_000_000,
) -> tuple[int, int]:
    """Writes a tokenizer trained on at most `limit` texts, drawn from all shards; returns (texts, ids) it has.

    source: where a sample's text lies, as in `Field.source`; of several captions one, drawn at random.
    Raises DataError if no sample has one.
    """
    stream = ShardStream(
        shards,
        batch_size=256,
        remainder="pad",
        fields={"text": Field(source, bytes.decode, required=False)},
        on_error="substitute",
        error_budget=1.0,
    )
    count = 0

    def texts() -> Iterator[str]:
        nonlocal count
        for batch in stream:
            for text, valid in zip(batch["text"], batch.valid, strict=True):
                if text is not None and valid:
                    count += 1
                    yield text
                if count == limit:
                    stream.close()
                    return

    content = train_tokenizer(texts(), vocab_size=vocab_size)
    if not count:
        raise DataError(f"{source}: no sample has such a text")
    write_bytes(out, content.encode())
    from tokenizers import Tokenizer

    return count, Tokenizer.from_str(content).get_vocab_size()
