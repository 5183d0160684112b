"""Numbering what a batch holds: each thing once, in an order that depends on the batch alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor
from torch.nn.functional import embedding_bag


def first_seen(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, none below 0, in the order in which they first come, and where each value stands among them.

    The order depends on the batch alone, not on what this process saw before: sums then round alike after a restart.
    Without sorting: the last to write a value's cell, going backwards, is its first. Of the cells only those written are ever touched.
    """
    flat = values.ravel()
    cells = np.empty(int(flat.max(initial=-1)) + 1, np.int64)
    counted = np.arange(len(flat))
    cells[flat[::-1]] = counted[::-1]
    unique = flat[cells[flat] == counted]
    cells[unique] = np.arange(len(unique))
    return unique, cells[flat].reshape(values.shape)


def slices(ends: list[int]) -> list[slice]:
    """The slices that end there, each where the next begins."""
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def bags(rows: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows (m, width): bag b sums those at ``index`` (l,) from ``starts[b]`` on until the next begins. (bags, width)."""
    return embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights)
