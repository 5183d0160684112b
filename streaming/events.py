"""What is in the topics: one struct for each kind of record, with the field names of the contract (docs/contract.md).

Records that people write (`Interaction`, `Profile`, `Request`) are checked field by field and refused with a reason (see
`streaming.validation`); records that the system writes carry ``format``, the version of their layout.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FORMAT = 1
"""Version of the layout of every record that the system writes."""

Source = tuple[str, int, int]
"""Where an event stands: topic, partition, offset."""

Feature = float | str | list[str]
"""The value of one profile feature: a number, one category, or several."""


REASONS = frozenset(
    {
        "empty",
        "too-large",
        "too-deep",
        "not-decodable",
        "invalid-utf8",
        "not-a-map",
        "duplicate-field",
        "missing-field",
        "wrong-type",
        "bad-id",
        "rating-off-scale",
        "timestamp-out-of-range",
        "too-many-items",
        "bad-feature",
        "too-many-features",
        "wrong-key",
        "wrong-partition",
    }
)
"""Why a record is a dead letter. A fixed set, fit for a metric's label; docs/contract.md explains each."""


# Unknown fields are forbidden here so that `streaming.validation` can decode the common case in one pass: what this struct refuses is
# looked at again with care, where unknown fields are ignored and counted.
class Interaction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user rated an item. ``timestamp`` is the event's own time, in milliseconds since the epoch."""

    user: str
    item: str
    rating: float
    timestamp: int


class Profile(msgspec.Struct, frozen=True):
    """What is known of a user or an item beside its id."""

    features: dict[str, Feature]


class Request(msgspec.Struct, frozen=True):
    """A question: which of ``items``, or without them which of the whole catalogue, will the user rate highest?

    ``n`` is how many of the best are wanted; without it all of ``items``, or `BEST` of the catalogue. ``exclude_rated`` leaves out what
    stands in the user's support set. ``request`` is the asker's own name for it, which the answer repeats.
    """

    request: str
    user: str
    timestamp: int
    items: list[str] | None = None
    n: int | None = None
    exclude_rated: bool = False


BEST = 10
"""How many of the catalogue a request without ``n`` is answered with."""


class Tensor(msgspec.Struct, frozen=True):
    """An array as raw little-endian bytes in C order. ``dtype`` is numpy's name of it, such as ``float32``."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Rows(msgspec.Struct, frozen=True):
    """Rows of an embedding table by id: ``values`` is of shape (number of ids, width).

    ``ids`` is an array of texts, left as it is encoded: a thousand texts that nobody looks at take longer than the rest of a record.
    `streaming.codec.texts` makes them.
    """

    ids: msgspec.Raw
    values: Tensor


class Score(msgspec.Struct, frozen=True):
    """The score of one interaction, made before anything was learned from it.

    ``sd`` is the score's standard deviation, None where the model has none. ``support_size`` is how many interactions of the user the
    model was adapted to, ``earlier`` how many the user had before this one. ``step`` is the offset of the first record of the step
    that scored it.
    """

    user: str
    item: str
    score: float
    sd: float | None
    source: Source
    model_version: int
    support_size: int
    earlier: int
    step: int
    timestamp: int
    format: int = FORMAT


class Answer(msgspec.Struct, frozen=True):
    """The answer to a request, in ``scores``: items with scores and standard deviations, best first, equal scores by id.

    ``sds`` is None where the model has none. ``as_of`` is the position in interactions (topic, partition, offset) before which all of the
    user's interactions count; ``stale`` says that more of them stood in the log when the request was read. ``asked`` is the place of the
    request, ``tables`` how far users and items had been read. ``support_size`` and ``earlier`` are as in `Score`.
    """

    request: str
    user: str
    items: list[str]
    scores: list[float]
    sds: list[float] | None
    model_version: int
    support_size: int
    earlier: int
    as_of: Source
    stale: bool
    asked: Source
    tables: dict[str, int]
    timestamp: int
    format: int = FORMAT


class Support(msgspec.Struct, frozen=True):
    """A user's support set: the last interactions as (item, rating, timestamp), oldest first, and the source of the last one.

    ``earlier`` counts all interactions that the user ever had. ``ordinal`` is the user's place in the partition's order of first
    appearance: rehearsal draws users by it, so that a restored worker draws the same ones. ``since`` is the first offset of
    ``interactions`` that counts: where the user was last forgotten, 0 for one who never was.
    """

    interactions: list[tuple[str, float, int]]
    source: Source
    earlier: int
    ordinal: int
    since: int = 0
    format: int = FORMAT


class Forgotten(msgspec.Struct, frozen=True):
    """What ``support`` keeps of a user who was forgotten and has not come back: the first offset of ``interactions`` that would count."""

    forgotten: int
    format: int = FORMAT


class Position(msgspec.Struct, frozen=True):
    """The position record of a partition in ``support``: all interactions before ``offset`` are in the support sets.

    ``tables`` are the positions up to which users and items had been read when the step was made, ``users`` the number of ordinals given.
    ``changelog`` is a random name that the partition's first step gave it: a local store that names another is of another log.
    ``owners`` are the last takeovers of the partition, each by a random name and where in ``support`` it began: a local store that goes
    beyond where the next owner began has what the log has lost since.
    """

    offset: int
    users: int
    model_version: int
    tables: dict[str, int]
    changelog: str = ""
    owners: list[tuple[bytes, int]] = []
    format: int = FORMAT


class Update(msgspec.Struct, frozen=True):
    """What one step teaches the global model: gradients, all made at ``version``, and the memory writes.

    ``tensors`` are gradients of whole parameters by name, ``rows`` those of embedding rows; both are sums over ``events`` queries.
    ``writes`` are the composed memory writes of the step, on its first update only. ``source`` is the range of interactions, as
    topic, partition, first offset, offset after the last.

    A small step teaches a part of a meta-update: the update that ``completes`` it is the one that its partition's next
    ``trainer.meta_update`` th offset fell to, and the trainer folds the parts with it, as one. ``settings`` is the digest of the settings
    that it was made with, as a version has it; empty in those of before there was one.
    """

    kind: Literal["query", "rehearsal"]
    source: tuple[str, int, int, int]
    version: int
    events: int
    tensors: dict[str, Tensor]
    rows: dict[str, Rows]
    writes: dict[str, Tensor] = {}
    tables: dict[str, int] = {}
    completes: bool = True
    settings: str = ""
    format: int = FORMAT


class Version(msgspec.Struct, frozen=True):
    """A model version: the values that changed since ``parent``, absolute, the optimiser's state among them.

    ``folded`` is the offset after the last update folded, for each partition of ``updates``. ``settings`` is the digest of the
    settings that the values depend on. A snapshot is a version without a parent, which holds every value; its ``position`` is an offset of
    ``model`` from which all later versions can be read. ``events`` counts the queries folded since the parent, ``made_at`` is in
    milliseconds since the epoch. ``dropped`` names the updates passed over since the parent, each by its partition and the offset after it.

    A version that goes back, or was imported, stands in ``model`` with every value and names the version that it ``replaces``, the last
    one before it. Its parent is the version it goes back to, None if it was imported. ``skipped`` are the updates folded by then that are
    not in its values, as partition, first offset, offset after the last; in any other version, those that retention removed before they
    were folded.
    """

    version: int
    parent: int | None
    folded: dict[int, int]
    settings: str
    tensors: dict[str, Tensor]
    rows: dict[str, Rows]
    events: int
    made_at: int
    dropped: list[tuple[int, int]] = []
    replaces: int | None = None
    skipped: list[tuple[int, int, int]] = []
    position: int = 0
    format: int = FORMAT


class DeadLetter(msgspec.Struct, frozen=True):
    """A record that could not be taken.

    ``key`` and ``value`` are its first kilobytes, ``length`` and ``digest`` those of the whole value.
    """

    reason: str
    detail: str
    source: Source
    key: bytes | None
    value: bytes | None
    length: int
    digest: str
    format: int = FORMAT


class SentBack(msgspec.Struct, frozen=True):
    """That the record of a dead letter was sent back, written in one transaction with it. The key is ``letter``, the letter's position.

    ``source`` and ``digest`` are those of the letter, ``topic`` and ``partition`` are where the record went, ``sent_at`` when, in
    milliseconds since the epoch.
    """

    letter: int
    source: Source
    topic: str
    partition: int
    digest: str
    sent_at: int
    format: int = FORMAT


class ReplayPosition(msgspec.Struct, frozen=True):
    """How far a file or a topic has been replayed into a topic: the value of ``replays``, keyed by the digest of both names and the range.

    ``size`` and ``digest`` (of the first and last megabyte; of a topic that of the last record taken, behind its partition and offset)
    tell whether it is still the same, ``settings`` is the digest of how a file was read. The first ``entries`` entries are done; in the
    file's own order the next one starts after line ``line`` and byte ``end``, in a topic (whose ``size`` is its number of partitions) at
    ``offsets`` by partition. ``events`` and ``dead_letters`` (by reason) count over all runs, and ``outside`` the events before ``since``
    or not before ``until``, which were left out.
    """

    topic: str
    name: str
    size: int
    digest: str
    settings: str
    entries: int
    line: int
    end: int
    events: int
    dead_letters: dict[str, int]
    done: bool
    offsets: dict[int, int] = {}
    since: int | None = None
    until: int | None = None
    outside: int = 0
    format: int = FORMAT
