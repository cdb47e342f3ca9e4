"""The model: modalities embed fields as Tokens, one trunk reads them, heads project its states."""

from mmscale.models.modality import Tokens
from mmscale.models.model import Model, build_model
from mmscale.models.trunk import States, Trunk

__all__ = ["Model", "States", "Tokens", "Trunk", "build_model"]
