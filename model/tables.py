"""Embedding tables keyed by strings, which grow as new keys come.

A key that the model version does not hold has an initial value, the same in every process, so that a new id is served at once and nobody
has to hand out row numbers. A table holds at most ``max_rows`` keys of the version: once it is full, every further key is served from,
and learns into, one of ``overflow_rows`` shared rows, chosen by a hash of the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, TypeGuard, cast, overload

import numpy as np
import torch
from torch import Tensor

from model.texts import Index, Texts

if TYPE_CHECKING:
    from model.numbering import Numbers


class RowKeys(Sequence[str]):
    """The keys of rows of a table, found when they are asked for: who stays in this process may never need them.

    They need not be looked up there for as long as its rows keep their numbers. What they are does not change when these do.
    """

    __slots__ = ("_index", "_texts", "layout", "rows", "table")

    def __init__(self, table: Table, rows: Numbers, index: Index) -> None:
        self.table = table
        self.layout = table.layout
        self.rows = rows
        self._index = index
        self._texts: Texts | None = None

    @property
    def texts(self) -> Texts:
        """The keys."""
        if self._texts is None:
            self._texts = self._index.texts(self.rows)
        return self._texts

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        return self.texts[place]


class Table:
    """Rows by key: ``values`` is of shape (allotted, width); the rows past ``len(self)`` are spare.

    A row starts as a draw of N(0, deviation^2), seeded by its key, but for columns from ``zero_from`` on, which start at 0.
    """

    def __init__(
        self,
        name: str,
        width: int,
        *,
        deviation: float,
        zero_from: int,
        seed: int,
        max_rows: int,
        overflow_rows: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self.width = width
        self.deviation = deviation
        self.zero_from = zero_from
        self.seed = seed
        self.max_rows = max_rows
        self.overflow_rows = overflow_rows
        self.values = torch.zeros(64, width, dtype=dtype)
        self.beside: Tensor | None = None
        """What a learner keeps for each row, (allotted, any width): it moves with the rows, and is 0 for a new one."""
        self.rows: dict[str, int] = {}
        self.keys: list[str] = []
        self.provisional = np.zeros(64, np.bool_)
        """Of each row, whether its key was looked up but is in no version yet; ``pending`` is how many are."""
        self.pending = 0
        self._index: Index | None = None
        self._cells = np.zeros(0, np.int64)
        self.layout = 0
        """Counts the times that row numbers changed, for those who remember them."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def known(self) -> int:
        """How many keys the model version holds."""
        return len(self.rows) - self.pending

    @property
    def cells(self) -> np.ndarray:
        """Room for a number beside each row, for `scatter` and `distinct`; made once, as `Profiles.cells` is."""
        if len(self._cells) != len(self.values):
            self._cells = np.zeros(len(self.values), np.int64)
        return self._cells

    def home(self, key: str) -> str:
        """The key under which ``key`` is served and learned: itself, or an overflow row of its feature once the table is full.

        Keys that name no value (the direction and bins of a number, a missing feature, an overflow row itself) are few and stay.
        """
        if "=" not in key or self.known < self.max_rows or ((row := self.rows.get(key)) is not None and not self.provisional[row]):
            return key
        feature = key.partition("=")[0]
        return f"{feature}~{int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest()) % self.overflow_rows}"

    def initial(self, key: str) -> Tensor:
        """The value of a key that the version does not hold, of shape (width,)."""
        value = torch.zeros(self.width, dtype=self.values.dtype)
        if self.deviation and self.zero_from:
            seed = hashlib.blake2b(f"{self.seed} {self.name} {key}".encode(), digest_size=8).digest()
            draw = np.random.default_rng(int.from_bytes(seed)).standard_normal(self.zero_from)
            value[: self.zero_from] = torch.from_numpy(draw) * self.deviation
        return value

    def lookup(self, keys: Iterable[str]) -> list[int]:
        """Row numbers of keys; a new key gets a provisional row with its initial value."""
        keys = list(keys)
        found = list(map(self.rows.get, keys))
        if None not in found:
            return cast("list[int]", found)
        for place, key in enumerate(keys):
            if found[place] is None:
                home = self.home(key)
                row = self.rows.get(home)
                if row is None:
                    row = self._append(home, self.initial(home))
                    self.provisional[row] = True
                    self.pending += 1
                found[place] = row
        return cast("list[int]", found)

    def admit(self, keys: Sequence[str]) -> Numbers:
        """As `lookup`, (len(keys),), but the keys become part of the version, as long as there is room."""
        found = self._find(keys)
        if not self.pending and self._gave(keys):
            return found
        new = found < 0
        if self.pending:
            new |= self.provisional[found]
        for place in np.flatnonzero(new).tolist():
            key = keys[place]
            row = self.rows.get(key)
            if row is None or self.provisional[row]:
                home = self.home(key)
                row = self.rows.get(home)
                if row is None:
                    row = self._append(home, self.initial(home))
                self._settle(row)
            found[place] = row
        return found

    def assign(self, keys: Sequence[str], values: Tensor) -> Numbers:
        """Set rows to what a version states: ``values`` is of shape (len(keys), width). Returns their numbers, (len(keys),)."""
        found = self._find(keys)
        new = np.flatnonzero(found < 0)
        if len(new) > len(self.rows):
            self._index = None  # Made anew when it is asked for, which takes less than to add most of the keys one by one.
        nothing = self.values.new_zeros(self.width)
        for place in new.tolist():
            key = keys[place]
            # A key may come twice.
            found[place] = self._append(key, nothing) if (row := self.rows.get(key)) is None else row
        if self.pending:
            for row in found[self.provisional[found]].tolist():
                self._settle(row)
        self.values.numpy()[found] = values.numpy()
        return found

    def keys_of(self, rows: Numbers) -> RowKeys:
        """The keys of rows (m,)."""
        return RowKeys(self, rows, self._indexed())

    def _find(self, keys: Sequence[str]) -> Numbers:
        """The rows of keys, -1 for one without."""
        if self._gave(keys):
            return keys.rows.copy()
        if isinstance(keys, (RowKeys, Texts)):
            return self._indexed().of(keys if isinstance(keys, Texts) else keys.texts)[0]
        return np.array(list(map(self.rows.get, keys, repeat(-1))), np.int64)

    def _gave(self, keys: Sequence[str]) -> TypeGuard[RowKeys]:
        """Whether keys are those of rows of this table, as these stand."""
        return isinstance(keys, RowKeys) and keys.table is self and keys.layout == self.layout

    def _indexed(self) -> Index:
        if self._index is None:
            self._index = Index(self.rows)
        return self._index

    def _settle(self, row: int) -> None:
        """A row is part of the version."""
        self.pending -= int(self.provisional[row])
        self.provisional[row] = False

    def trim(self, spare: int = 0) -> None:
        """Forget provisional rows once they are many or the version has filled up. Called between steps: row numbers change.

        Many are ``spare`` more than the version may hold: one for each profile, or who walks through all of them would never be done.
        """
        many, full = self.pending >= self.max_rows + spare, self.known >= self.max_rows
        # In a full table what is looked up has a shared row, which may stay: to forget it would be to make all anew, step after step.
        if not many and not (
            full and self.pending and any(self.home(key) != key for key in map(self.keys.__getitem__, self.provisional.nonzero()[0]))
        ):
            return
        keys, values = self.export()
        beside = None if self.beside is None else self.beside[[self.rows[key] for key in keys]]
        self.clear()
        self.assign(keys, values)
        if self.beside is not None and beside is not None:
            self.beside[: len(keys)] = beside

    def clear(self) -> None:
        """Forget every row."""
        self.rows = {}
        self.keys = []
        self.provisional = np.zeros(64, np.bool_)
        self.pending = 0
        self._index = None
        self.values = self.values.new_zeros(64, self.width)
        if self.beside is not None:
            self.beside = self.beside.new_zeros(64, self.beside.shape[1])
        self.layout += 1

    def export(self) -> tuple[list[str], Tensor]:
        """Keys and values, of shape (known, width), of all rows that the version holds."""
        rows = np.flatnonzero(~self.provisional[: len(self)])
        return [self.keys[row] for row in rows.tolist()], self.values[torch.from_numpy(rows)]

    def _append(self, key: str, value: Tensor) -> int:
        row = len(self.rows)
        if row == len(self.values):
            self.values = torch.cat([self.values, torch.zeros_like(self.values)])
            self.provisional = np.concatenate([self.provisional, np.zeros_like(self.provisional)])
            if self.beside is not None:
                self.beside = torch.cat([self.beside, torch.zeros_like(self.beside)])
        self.values[row] = value
        self.rows[key] = row
        self.keys.append(key)
        if self._index is not None:
            self._index.add(key, row)
        return row
