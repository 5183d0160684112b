"""Profiles of users or of items, and their embeddings p_u and p_i."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.features import Entry, Value, encode
from model.numbering import Embedding, bags, packed, scatter, slices
from model.settings import Feature
from model.tables import RowKeys, Table
from model.texts import Index, Texts

if TYPE_CHECKING:
    from model.numbering import Floats, Numbers


class Profiles:
    """The profiles of one side and the rows of the embedding table that each is made of.

    Encoded profiles are remembered by place, as row numbers (places, slots) and weights of the same shape; features follow each other
    in the schema's order, each in its own slots. ``remember`` bounds how many profiles and places are held;
    ``changes`` is how many of those set or dropped last `changed_since` can tell of.
    """

    def __init__(self, schema: Mapping[str, Feature], table: Table, *, remember: int = 1_000_000, changes: int = 0) -> None:
        self.schema = schema
        self.table = table
        self.remember = remember
        self.features: dict[str, Mapping[str, Value]] = {}
        self.refused = 0
        self.revision = 0
        """Counts the profiles that were set or dropped."""
        self._changed: deque[tuple[str, bool]] = deque(maxlen=changes)
        self.spans: list[tuple[int, int]] = []
        start = 0
        for feature in schema.values():
            self.spans.append((start, start + feature.slots))
            start += feature.slots
        self.slots = start
        self._feature_of = np.array([number for number, (low, high) in enumerate(self.spans) for _ in range(low, high)])
        self._starts = torch.tensor([low for low, _ in self.spans])
        self._forget()

    def _forget(self) -> None:
        self.epoch = object()
        """Changes whenever a place that was given may no longer hold."""
        self._places: dict[str, int] = {}
        self._index: Index | None = None
        self._free: list[int] = []
        self._rows = np.zeros((64, self.slots), np.int64)
        self._weights = np.zeros((64, self.slots), np.float32)
        self._cells = np.zeros((0, 2), np.int64)
        self._layout = self.table.layout

    def set(self, key: str, features: Mapping[str, Value] | None) -> None:
        """Take a new or changed profile; None drops it, and with it all that is held of the key. In effect from the next `places` on.

        Beyond ``remember`` profiles a new one is refused and counted: its owner is served as one without a profile.
        """
        self.revision += 1
        self._changed.append((key, key in self.features))
        if features is None:
            self.features.pop(key, None)
            if (place := self._places.pop(key, None)) is not None:
                self._free.append(place)
                if self._index is not None:
                    self._index.remove(key)
                self.epoch = object()
            return
        if key in self.features or len(self.features) < self.remember:
            self.features[key] = features
        else:
            self.refused += 1
        if (place := self._places.get(key)) is not None:
            self._rows[place], self._weights[place] = self._encode(key)

    def changed_since(self, revision: int) -> list[tuple[str, bool]] | None:
        """The keys of profiles that were set or dropped since, each with whether it had one before; None where they were too many."""
        count = self.revision - revision
        return None if count > len(self._changed) else list(islice(reversed(self._changed), count))[::-1]

    def entries(self, key: str) -> list[list[Entry]]:
        """What the profile of ``key`` is encoded to, feature by feature."""
        profile = self.features.get(key, {})
        return [encode(name, feature, profile.get(name), key) for name, feature in self.schema.items()]

    def begin(self) -> None:
        """Start a step: the places given before may no longer hold."""
        self.table.trim(len(self.features))
        if self._layout != self.table.layout or len(self._places) > self.remember:
            self._forget()

    def places(self, keys: Sequence[str]) -> Numbers:
        """The places of keys, known or not, (len(keys),)."""
        if isinstance(keys, Texts):
            return self._places_of(keys)
        # Most are known, and this is asked for every interaction of every support set.
        try:
            found = itemgetter(*keys)(self._places) if len(keys) > 1 else map(self._places.__getitem__, keys)  # It is faster than `map`.
            return packed(found, len(keys), np.int64)
        except KeyError:
            return np.fromiter(map(self._place, keys), np.int64, len(keys))

    def _places_of(self, keys: Texts) -> Numbers:
        if self._index is None:
            self._index = Index(self._places)
        found, unknown = self._index.of(keys)
        if unknown:
            for place in np.flatnonzero(found < 0).tolist():
                found[place] = self._place(keys[place])
        return found

    def _place(self, key: str) -> int:
        place = self._places.get(key)
        if place is None:
            encoded = self._encode(key)
            place = self._places[key] = self._free.pop() if self._free else len(self._places)
            if self._index is not None:
                self._index.add(key, place)
            if place == len(self._rows):
                self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
                self._weights = np.concatenate([self._weights, np.zeros_like(self._weights)])
            self._rows[place], self._weights[place] = encoded
        return place

    def _encode(self, key: str) -> tuple[list[int], list[float]]:
        """Row numbers and weights of the profile of ``key``, both (slots,)."""
        features, rows, weights = self.entries(key), list[int](), list[float]()
        found, at = self.table.lookup([entry.key for entries in features for entry in entries]), 0
        for (start, end), entries in zip(self.spans, features, strict=True):
            spare = end - start - len(entries)
            # A slot without a value repeats the first row at weight 0, so that nothing but what the profile names is ever touched.
            rows += found[at : at + len(entries)] + spare * [found[at]]
            weights += [entry.weight for entry in entries] + spare * [0.0]
            at += len(entries)
        return rows, weights

    @property
    def cells(self) -> Numbers:
        """Room for two numbers beside each place, for `number`."""
        # Made once: in a large catalogue most of the work of new room would be the system's, which clears each page when it is touched.
        if len(self._cells) != len(self._rows):
            self._cells = np.zeros((len(self._rows), 2), np.int64)
        return self._cells

    def encoded(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Row numbers and weights of places, both of shape (len(places), slots); weights are of the table's type."""
        weights = torch.from_numpy(self._weights.take(places, 0))
        return torch.from_numpy(self._rows.take(places, 0)), weights.to(self.table.values.dtype)

    def encoded_of(self, keys: Sequence[str]) -> tuple[Numbers, Floats]:
        """As `encoded` of the places of keys, of which those without one are given none. ``keys`` are not empty."""
        places = [self._places.get(key, -1) for key in keys]
        rows, weights = self._rows.take(places, 0), self._weights.take(places, 0)
        missing, of_rows, of_weights = [number for number, place in enumerate(places) if place < 0], list[int](), list[float]()
        for number in missing:
            # Not as lists of lists: Python's collector would look through them again and again, which takes as long as the rest.
            encoded = self._encode(keys[number])
            of_rows += encoded[0]
            of_weights += encoded[1]
        rows[missing] = np.array(of_rows, np.int64).reshape(-1, self.slots)
        weights[missing] = np.array(of_weights, np.float32).reshape(-1, self.slots)
        return rows, weights

    def embed(self, rows: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        """Sum each feature's weighted rows: (n, slots) into ``values`` (m, width) -> (n, features, width)."""
        starts = (torch.arange(len(rows))[:, None] * self.slots + self._starts).flatten().to(rows.device)
        return bags(values, rows.flatten(), starts, weights.flatten().to(values.dtype)).view(len(rows), len(self.spans), -1)

    def embed_at(self, places: Numbers) -> Tensor:
        """As `embed`, of the profiles at places (n,), from the table's values."""
        return self.embed(*self.encoded(places), self.table.values)

    def embedding(self, places: Numbers, encoded: tuple[Numbers, Floats] | None = None) -> Embedding:
        """What `embed` of `model.numbering` takes of the profiles at places, or of some ``encoded``, from the table's values.

        Compiled, a tenth of the time that the method takes; autograd cannot follow it.
        """
        rows, weights = (self._rows, self._weights) if encoded is None else encoded
        return Embedding(self.table.values.numpy(), rows, weights, places, self._feature_of, len(self.spans), self.table.zero_from)

    def embed_back(self, places: Numbers, ends: Numbers, at: Floats, rest: Floats | None = None) -> list[tuple[RowKeys, Tensor]]:
        """The way back through `embedding`, for each group: the keys of the rows that its members touch, and the gradient at each.

        ``at`` (m, features d_e) and ``rest`` (m,), of rows that have a bias, are the gradients at what was made of the profiles at
        ``places`` (m,), of which those of each group end at ``ends`` (G,).
        """
        distinct, summed, row_ends = scatter(self.embedding(places), ends, at, at[:0, 0] if rest is None else rest, self.table.cells)
        return [(self.table.keys_of(distinct[of]), torch.from_numpy(summed[of])) for of in slices(row_ends.tolist())]
