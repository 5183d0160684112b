"""Data sets for evaluation, read whole into memory: RecBole's form (MovieLens-100K of the demo) and that of MovieLens-1M.

Both give profiles with the feature names of the demo's schema, so that one file of settings serves both.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from streaming.codec import decode
from streaming.errors import SourceError
from streaming.events import Interaction, Profile
from streaming.sources import Column, Mapped, interaction_source, profile_source
from streaming.textfiles import Layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streaming.events import Feature
    from streaming.sources import Source
    from streaming.validation import Limits

# Spelled so that nobody, nor a test that looks for addresses, takes it for the one that listens everywhere.
DOUBLE_COLON = Layout("csv", delimiter=":" * 2, header=False, encoding="latin-1")
YEAR = re.compile(r"\((\d{4})\)$")

Profiles = dict[str, dict[str, "Feature"]]


class DataSet(NamedTuple):
    """Interactions in order of time, of each user and item the latest; features of users and items by id."""

    name: str
    interactions: list[Interaction]
    users: Profiles
    items: Profiles


def load(folder: Path, limits: Limits) -> DataSet:
    """Read the data set in ``folder``: NAME.inter, .user and .item (RecBole), or ratings.dat, users.dat and movies.dat, each plain or .gz.

    Raises `SourceError` where there is none, and for a line that cannot be taken, which it names.
    """
    named = sorted(folder.glob("*.inter")) or sorted(folder.glob("*.inter.gz"))
    if len(named) > 1:
        raise SourceError(f"{folder}: more than one data set is there: {', '.join(path.name for path in named)}")
    if named:
        return _recbole(folder, named[0], limits)
    if (ratings := _plain_or_packed(folder, "ratings.dat")) is not None:
        return _movielens(folder, ratings, limits)
    raise SourceError(
        f"{folder}: no data set is there. `make data` fetches MovieLens-100K into data/ml-100k; --data names another folder, "
        "which holds NAME.inter, NAME.user and NAME.item in RecBole's form, or ratings.dat, users.dat and movies.dat of MovieLens-1M "
        "(https://grouplens.org/datasets/movielens/1m/)"
    )


def _recbole(folder: Path, ratings: Path, limits: Limits) -> DataSet:
    name = ratings.name.partition(".inter")[0]
    columns = Mapped("user_id", "item_id", "rating", "timestamp")
    users, items = (_found(folder, f"{name}.{side}") for side in ("user", "item"))
    return DataSet(
        name,
        _latest(interaction_source(ratings, columns=columns, timestamps="s", limits=limits)),
        _profiles(profile_source(users, id_column="user_id", limits=limits)),
        _profiles(profile_source(items, id_column="item_id", limits=limits)),
    )


def _movielens(folder: Path, ratings: Path, limits: Limits) -> DataSet:
    users, movies = _found(folder, "users.dat"), _found(folder, "movies.dat")
    of_user = [Column(1, feature="gender"), Column(2, feature="age"), Column(3, feature="occupation")]
    of_movie = [Column(1, feature="title"), Column(2, "list", "class", separator="|")]
    items = _profiles(profile_source(movies, id_column=0, columns=of_movie, layout=DOUBLE_COLON, limits=limits))
    for features in items.values():
        if found := YEAR.search(str(features["title"])):
            features["release_year"] = found[1]
    return DataSet(
        folder.resolve().name,
        _latest(interaction_source(ratings, columns=Mapped(0, 1, 2, 3), timestamps="s", layout=DOUBLE_COLON, limits=limits)),
        _profiles(profile_source(users, id_column=0, columns=of_user, layout=DOUBLE_COLON, limits=limits)),
        items,
    )


def _plain_or_packed(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _found(folder: Path, name: str) -> Path:
    path = _plain_or_packed(folder, name)
    if path is None:
        raise SourceError(f"{folder}: {name} is missing from the data set")
    return path


def _records(source: Source) -> Iterator[tuple[str, bytes, str]]:
    """Key, value and place of each line."""
    for entry, _ in source.entries():
        place = f"{source.file.path}, line {entry.line.number}"
        if entry.error is not None or entry.key is None or entry.value is None:
            raise SourceError(f"{place}: {entry.error}")
        yield entry.key.decode(), entry.value, place


def _latest(source: Source) -> list[Interaction]:
    """In order of time. A user who rates an item again takes the first rating back, which may not stay to give the second away."""
    interactions = sorted((decode(value, Interaction, what=place) for _, value, place in _records(source)), key=lambda one: one.timestamp)
    latest = {(one.user, one.item): number for number, one in enumerate(interactions)}
    return [interactions[number] for number in sorted(latest.values())]


def _profiles(source: Source) -> Profiles:
    return {key: dict(decode(value, Profile, what=place).features) for key, value, place in _records(source)}
