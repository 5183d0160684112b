"""Tasks, and how a list of them becomes one batch of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

from model.history import History, by_text, rated
from model.numbering import number, number_once, packed, slices
from model.profiles import Profiles
from model.settings import RATINGS

if TYPE_CHECKING:
    from model.numbering import Numbers

T = TypeVar("T")


class Task(NamedTuple):
    """One adaptation: a user's support set, oldest interaction first, and the query to score from it.

    The ratings of a query are what its gradient is taken at; scores never depend on them. A ``history`` is one that begins with the
    support set; where all tasks of a batch have one, nothing is looked up that was looked up before. The query of a rehearsed user stands
    in the history too, from place ``asked`` on.
    """

    user: str
    support_items: Sequence[str]
    support_ratings: Sequence[float]
    query_items: Sequence[str]
    query_ratings: Sequence[float]
    history: History | None = None
    asked: int | None = None


class Part(Sequence[T]):
    """The elements of a list from ``start`` up to ``stop``, not copied: texts that lie all over the memory take long to hold and let go."""

    __slots__ = ("_of", "_start", "_stop")

    def __init__(self, of: Sequence[T], start: int, stop: int) -> None:
        self._of = of
        self._start = start
        self._stop = stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __iter__(self) -> Iterator[T]:
        return islice(self._of, self._start, self._stop)

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        places = range(self._start, self._stop)[place]
        return self._of[places] if isinstance(places, int) else [self._of[each] for each in places]


def cut(users: Sequence[str], histories: Sequence[History], query: int, generator: np.random.Generator) -> list[Task]:
    """The tasks of rehearsed users: each history, of one interaction at least, is cut at random; what stands before the cut is support.

    The query is what follows, ``query`` interactions at most. Every place is as likely a cut, the first too, where a new user stands.
    """
    cuts = generator.integers(np.array([len(history.ratings) for history in histories], np.int64)).tolist()
    return [
        Task(
            user,
            Part(history.items, 0, at),
            history.ratings[:at],
            Part(history.items, at, min(at + query, len(history.ratings))),
            history.ratings[at : at + query],
            history,
            at,
        )
        for user, history, at in zip(users, histories, cuts, strict=True)
    ]


class Supports(NamedTuple):
    """The L interactions of all supports of a batch, task after task."""

    items: Tensor  # (L,)
    ratings: Tensor  # (L,)
    bounds: Tensor  # (B + 1,), where those of each task begin, and the last end

    def padded(self) -> Padded:
        """The same with as many places for each task as the longest support has, at least one."""
        lengths = torch.diff(self.bounds)
        place = torch.arange(max(1, int(lengths.max())), device=lengths.device)
        there = place < lengths[:, None]

        def full(values: Tensor) -> Tensor:
            return values.new_zeros(there.shape).masked_scatter_(there, values)

        newer = (lengths[:, None] - 1 - place).clamp(min=0).to(self.ratings.dtype)
        return Padded(full(self.items), full(self.ratings), there.to(self.ratings.dtype), newer)


class Padded(NamedTuple):
    """Supports (B, n): numbers of items, ratings, 1 where there is an interaction, and how many of the support are newer; 0 where not."""

    items: Tensor
    ratings: Tensor
    mask: Tensor
    newer: Tensor


class Ends(NamedTuple):
    """Where the tasks, the users and the items of each of G groups end, (G,)."""

    tasks: Numbers
    users: Numbers
    items: Numbers


class Batch(NamedTuple):
    """B tasks in G groups; q is the longest query. Padding of queries has mask 0, item 0 and rating 0. Ratings are on that of `RATINGS`.

    Users and items are numbered within their group, group after group, so that what a group teaches can be told apart: U users and J
    items in all. Of these items I are different: ``item_of`` points into ``item_places``.
    """

    users: list[str]
    user_of: Tensor  # (B,)
    user_places: Numbers  # (U,), of `Profiles`, for as long as the step lasts
    item_of: Tensor  # (J,)
    item_places: Numbers  # (I,)
    support: Supports
    queries: Tensor  # (B,), how many each task has
    query_items: Tensor  # (B, q)
    query_ratings: Tensor  # (B, q)
    query_mask: Tensor  # (B, q)
    ends: Ends

    @property
    def tasks_of(self) -> list[slice]:
        """Of each group the tasks."""
        return slices(self.ends.tasks.tolist())

    @property
    def users_of(self) -> list[slice]:
        """Of each group the users."""
        return slices(self.ends.users.tolist())

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on a device."""
        if self.user_of.device == device:
            return self

        def moved(parts: dict[str, Any]) -> dict[str, Any]:
            return {name: value.to(device) for name, value in parts.items() if isinstance(value, Tensor)}

        support = self.support._replace(**moved(self.support._asdict()))
        return self._replace(support=support, **moved(self._asdict()))


def collate(groups: Sequence[Sequence[Task]], users: Profiles, items: Profiles, scale: tuple[float, float], dtype: torch.dtype) -> Batch:
    """Make one batch of groups of tasks, none of them empty. Ratings, given on ``scale``, are brought to that of `RATINGS`."""
    users.begin()
    items.begin()
    # Column by column, so that what is done for each task is done by what is compiled.
    names, support_items, support_ratings, query_items, query_ratings, histories, begins = zip(*chain.from_iterable(groups), strict=True)
    sizes, count = np.array([len(group) for group in groups]), len(names)
    of_users = users.places(names)
    user_of, firsts, user_ends = number_once(of_users, sizes, users.cells)

    lengths, queries = (packed(map(len, parts), count, np.int64) for parts in (support_ratings, query_ratings))
    if None in histories:
        held, ends, at = by_text(support_items, support_ratings, items), lengths.cumsum(), np.full(count, -1)
        asked = by_text(query_items, query_ratings, items)
    else:
        known = rated(histories, items)
        held, ends = np.concatenate(known), packed(map(len, known), count, np.int64).cumsum()
        at = packed((-1 if begin is None else begin for begin in begins), count, np.int64)
        events = np.flatnonzero(at < 0).tolist()
        asked = by_text([query_items[task] for task in events], [query_ratings[task] for task in events], items)
    for interactions in (held, asked):
        interactions[:, 1] = brought(interactions[:, 1], scale)
    numbered = number(held, ends, lengths, at, queries, asked, sizes, items.cells, torch.empty(0, dtype=dtype).numpy())
    return Batch(
        users=[names[task] for task in firsts.tolist()],
        user_of=torch.from_numpy(user_of),
        user_places=of_users[firsts],
        item_of=torch.from_numpy(numbered.item_of),
        item_places=numbered.distinct,
        support=Supports(torch.from_numpy(numbered.items), torch.from_numpy(numbered.ratings), torch.from_numpy(numbered.starts)),
        queries=torch.from_numpy(queries),
        query_items=torch.from_numpy(numbered.query_items),
        query_ratings=torch.from_numpy(numbered.query_ratings),
        query_mask=torch.from_numpy(numbered.query_mask),
        ends=Ends(sizes.cumsum(), user_ends, numbered.ends),
    )


def brought(ratings: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Ratings (n,) on a scale as they are on that of `RATINGS`."""
    if scale == RATINGS:
        return ratings
    (low, high), (least, most) = scale, RATINGS
    return least + (ratings - low) * ((most - least) / (high - low))
