"""Numbering what a batch holds: each thing once, in an order that depends on the batch alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
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


def first_seen_by_group(groups: np.ndarray, values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """As `first_seen`, of each of ``count`` groups: the distinct values, group after group, where each value stands, and the groups' ends.

    >>> distinct, place, ends = first_seen_by_group(np.array([1, 0, 1, 1]), np.array([7, 7, 5, 7]), 2)
    >>> distinct.tolist(), place.tolist(), ends
    ([7, 7, 5], [1, 0, 2, 1], [1, 3])
    """
    bound = int(values.max(initial=0)) + 1
    pairs, place = first_seen(groups * bound + values)
    of_pair = pairs // bound
    order = np.argsort(of_pair, kind="stable")
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    ends = np.bincount(of_pair, minlength=count).cumsum().tolist()
    return pairs[order] % bound, back[place], ends


def slices(ends: list[int]) -> list[slice]:
    """The slices that end there, each where the next begins."""
    return [slice(start, end) for start, end in pairwise([0, *ends])]


def in_order(index: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Where the members with each index from 0 to ``count`` stand, index after index, and where those of each begin."""
    # Numbers of two bytes are sorted by radix, which is ten times as fast.
    narrow = index.astype(np.uint16) if count <= 1 << 16 else index
    starts = np.zeros(count, np.int64)
    np.cumsum(np.bincount(index, minlength=count)[:-1], out=starts[1:])
    return torch.from_numpy(np.argsort(narrow, kind="stable")), torch.from_numpy(starts)


def bags(rows: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows (m, width): bag b sums those at ``index`` (l,) from ``starts[b]`` on until the next begins. (bags, width)."""
    return embedding_bag(index, rows, starts, mode="sum", per_sample_weights=weights)
