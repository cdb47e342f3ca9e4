"""From tar shards to tensors: index, stream, decode, augment, batch."""

from mmscale.data.assemble import Batch
from mmscale.data.fields import Field
from mmscale.data.index import Index, build_index, read_index
from mmscale.data.stream import ShardStream
from mmscale.errors import DataError

__all__ = ["Batch", "DataError", "Field", "Index", "ShardStream", "build_index", "read_index"]
