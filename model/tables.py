"""Embedding tables keyed by strings, which grow as new keys come.

A key that the model version does not hold has an initial value, the same in every process, so that a new id is served at once and nobody
has to hand out row numbers. A table holds at most ``max_rows`` keys of the version: once it is full, every further key is served from,
and learns into, one of ``overflow_rows`` shared rows, chosen by a hash of the key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor


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
        self.provisional: set[str] = set()
        """Keys that were looked up but are in no version yet."""
        self._cells = np.zeros(0, np.int64)
        self.layout = 0
        """Counts the times that row numbers changed, for those who remember them."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def known(self) -> int:
        """How many keys the model version holds."""
        return len(self.rows) - len(self.provisional)

    @property
    def cells(self) -> np.ndarray:
        """Room for a number beside each row, for `scatter`; made once, as `Profiles.cells` is."""
        if len(self._cells) != len(self.values):
            self._cells = np.zeros(len(self.values), np.int64)
        return self._cells

    def home(self, key: str) -> str:
        """The key under which ``key`` is served and learned: itself, or an overflow row of its feature once the table is full.

        Keys that name no value (the direction and bins of a number, a missing feature, an overflow row itself) are few and stay.
        """
        if "=" not in key or self.known < self.max_rows or (key in self.rows and key not in self.provisional):
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
                    self.provisional.add(home)
                found[place] = row
        return cast("list[int]", found)

    def admit(self, keys: Iterable[str]) -> list[int]:
        """As `lookup`, but the keys become part of the version, as long as there is room."""
        keys = list(keys)
        known = list(map(self.rows.get, keys))
        if None not in known and (not self.provisional or self.provisional.isdisjoint(keys)):
            return cast("list[int]", known)
        found = []
        for key in keys:
            row = self.rows.get(key)
            if row is None or key in self.provisional:
                home = self.home(key)
                row = self.rows.get(home)
                if row is None:
                    row = self._append(home, self.initial(home))
                self.provisional.discard(home)
            found.append(row)
        return found

    def assign(self, keys: Sequence[str], values: Tensor) -> None:
        """Set rows to what a version states: ``values`` is of shape (len(keys), width)."""
        rows = list(map(self.rows.get, keys))
        if None in rows:
            nothing = self.values.new_zeros(self.width)
            # A key may come twice.
            rows = [self._append(key, nothing) if (row := self.rows.get(key)) is None else row for key in keys]
        if self.provisional:
            self.provisional.difference_update(keys)
        self.values.numpy()[np.array(rows, np.int64)] = values.numpy()

    def trim(self) -> None:
        """Forget provisional rows once they are many or the version has filled up. Called between steps: row numbers change."""
        many, full = len(self.provisional) >= self.max_rows, self.known >= self.max_rows
        # In a full table what is looked up has a shared row, which may stay: to forget it would be to make all anew, step after step.
        if not many and not (full and any(self.home(key) != key for key in self.provisional)):
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
        self.provisional = set()
        self.values = self.values.new_zeros(64, self.width)
        if self.beside is not None:
            self.beside = self.beside.new_zeros(64, self.beside.shape[1])
        self.layout += 1

    def export(self) -> tuple[list[str], Tensor]:
        """Keys and values, of shape (known, width), of all rows that the version holds."""
        keys = [key for key in self.keys if key not in self.provisional]
        return keys, self.values[[self.rows[key] for key in keys]]

    def _append(self, key: str, value: Tensor) -> int:
        row = len(self.rows)
        if row == len(self.values):
            self.values = torch.cat([self.values, torch.zeros_like(self.values)])
            if self.beside is not None:
                self.beside = torch.cat([self.beside, torch.zeros_like(self.beside)])
        self.values[row] = value
        self.rows[key] = row
        self.keys.append(key)
        return row
