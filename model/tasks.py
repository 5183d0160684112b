"""Tasks, and how a list of them becomes one batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.profiles import Profiles


class Task(NamedTuple):
    """One adaptation: a user's support set, oldest interaction first, and the query to score from it.

    The ratings of a query are what its gradient is taken at; scores never depend on them.
    """

    user: str
    support_items: Sequence[str]
    support_ratings: Sequence[float]
    query_items: Sequence[str]
    query_ratings: Sequence[float]


class Batch(NamedTuple):
    """B tasks of U different users over I different items; n is the longest support, q the longest query.

    Padding has mask 0, item 0 and rating 0. ``newer`` counts the interactions of the support that came after each.
    Item numbers point into ``item_rows`` and ``item_weights``, of shape (I, slots); user numbers likewise.
    """

    users: list[str]
    user_of: Tensor  # (B,)
    user_rows: Tensor  # (U, slots)
    user_weights: Tensor  # (U, slots)
    item_rows: Tensor  # (I, slots)
    item_weights: Tensor  # (I, slots)
    support_items: Tensor  # (B, n)
    support_ratings: Tensor  # (B, n)
    support_mask: Tensor  # (B, n)
    newer: Tensor  # (B, n)
    query_items: Tensor  # (B, q)
    query_ratings: Tensor  # (B, q)
    query_mask: Tensor  # (B, q)


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


def collate(tasks: Sequence[Task], users: Profiles, items: Profiles, dtype: torch.dtype) -> Batch:
    """Make one batch of tasks, padded to the longest support and query."""
    users.begin()
    items.begin()
    user_keys = list(dict.fromkeys(task.user for task in tasks))
    number = {key: place for place, key in enumerate(user_keys)}
    user_rows, user_weights = users.encoded(np.array(users.places(user_keys), np.int64))

    lengths = np.array([len(task.support_items) for task in tasks])
    queries = np.array([len(task.query_items) for task in tasks])
    support_mask = np.arange(max(1, lengths.max())) < lengths[:, None]
    query_mask = np.arange(max(1, queries.max())) < queries[:, None]
    places = items.places(list(chain.from_iterable(task.support_items for task in tasks)))
    asked = items.places(list(chain.from_iterable(task.query_items for task in tasks)))
    unique, inverse = first_seen(np.array(places + asked, np.int64))
    item_rows, item_weights = items.encoded(unique)

    def padded(values: np.ndarray, mask: np.ndarray, kind: type) -> Tensor:
        full: np.ndarray = np.zeros(mask.shape, kind)
        full[mask] = values
        return torch.from_numpy(full)

    support_ratings = np.fromiter(chain.from_iterable(task.support_ratings for task in tasks), np.float64, len(places))
    query_ratings = np.fromiter(chain.from_iterable(task.query_ratings for task in tasks), np.float64, len(asked))
    newer = np.maximum(lengths[:, None] - 1 - np.arange(support_mask.shape[1]), 0)
    return Batch(
        users=user_keys,
        user_of=torch.tensor([number[task.user] for task in tasks]),
        user_rows=user_rows,
        user_weights=user_weights.to(dtype),
        item_rows=item_rows,
        item_weights=item_weights.to(dtype),
        support_items=padded(inverse[: len(places)], support_mask, np.int64),
        support_ratings=padded(support_ratings, support_mask, np.float64).to(dtype),
        support_mask=torch.from_numpy(support_mask).to(dtype),
        newer=torch.from_numpy(newer).to(dtype),
        query_items=padded(inverse[len(places) :], query_mask, np.int64),
        query_ratings=padded(query_ratings, query_mask, np.float64).to(dtype),
        query_mask=torch.from_numpy(query_mask).to(dtype),
    )
