"""Between the model's tensors and the records that carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import torch

from model.checkpoint import State
from model.memory import Writes
from model.meta import Gradient, RowGradients
from model.packing import texts_of
from model.tables import RowKeys
from model.texts import Texts
from streaming import codec
from streaming.errors import Malformed
from streaming.events import Rows, Tensor


def to_wire(tensor: torch.Tensor) -> Tensor:
    """A tensor as it travels."""
    return codec.tensor(tensor.detach().numpy())


def from_wire(tensor: Tensor) -> torch.Tensor:
    """The tensor that travelled. Raises `Malformed` where bytes, shape and dtype disagree."""
    # A copy, for what was read is read-only and torch writes in place.
    return torch.from_numpy(codec.array(tensor).copy())


def rows_to_wire(rows: Mapping[str, tuple[Sequence[str], torch.Tensor]]) -> dict[str, Rows]:
    """Rows by table as they travel."""
    found = {}
    for name, (keys, values) in rows.items():
        texts = keys.texts if isinstance(keys, RowKeys) else keys
        found[name] = Rows(msgspec.Raw(texts.packed() if isinstance(texts, Texts) else codec.packed(texts)), to_wire(values))
    return found


def rows_from_wire(rows: Mapping[str, Rows]) -> dict[str, tuple[Sequence[str], torch.Tensor]]:
    """Rows by table: their ids, of which no texts are made as long as nobody asks for them, and values.

    Raises `Malformed` where ids are no texts, or the values no tensor with a row for each.
    """
    found = dict[str, tuple[Sequence[str], torch.Tensor]]()
    for name, part in rows.items():
        packed = bytes(part.ids)
        spans, end = texts_of(np.frombuffer(packed, np.uint8), 0)
        # What is not ASCII, or too much to be a step's, is for the decoder.
        keys = Texts(packed, spans) if end == len(packed) else codec.texts(part.ids, what=f"ids of rows of {name}")
        values = from_wire(part.values)
        if values.ndim != 2 or len(values) != len(keys):
            raise Malformed("wrong-type", f"rows of {name}: {len(keys)} ids, but values of shape {tuple(values.shape)}")
        found[name] = keys, values
    return found


def gradient_to_wire(gradient: Gradient) -> tuple[dict[str, Tensor], dict[str, Rows]]:
    """Tensors and rows of an `Update`."""
    return {"phi": to_wire(gradient.vector)}, rows_to_wire({name: (part.keys, part.values) for name, part in gradient.rows.items()})


def gradient_from_wire(queries: int, tensors: dict[str, Tensor], rows: dict[str, Rows]) -> Gradient:
    """The gradient that an `Update` carries."""
    parts = {name: RowGradients(keys, values) for name, (keys, values) in rows_from_wire(rows).items()}
    return Gradient(queries, from_wire(tensors["phi"]), parts)


def writes_to_wire(writes: Writes | None) -> dict[str, Tensor]:
    """Memory writes as they travel; empty where there are none."""
    return {} if writes is None else {name: to_wire(tensor) for name, tensor in writes.tensors().items()}


def writes_from_wire(writes: dict[str, Tensor]) -> Writes | None:
    """The memory writes that an `Update` carries."""
    return Writes(**{name: from_wire(tensor) for name, tensor in writes.items()}) if writes else None


def state_from_wire(tensors: dict[str, Tensor], rows: dict[str, Rows]) -> State:
    """The values that a `Version` carries."""
    return State({name: from_wire(tensor) for name, tensor in tensors.items()}, rows_from_wire(rows))
