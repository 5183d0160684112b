"""Historical logs as sources of records: which columns of a file are an interaction's fields or a profile's features, and in what unit.

A line that cannot be taken is an entry too, with its reason, so that nothing of a file is lost and nothing stops a replay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from streaming.codec import encode
from streaming.errors import Malformed, SourceError
from streaming.textfiles import MAX_LINE_BYTES, Layout, Line, Place, TextFile
from streaming.untrusted import read_json_map, shown
from streaming.validation import Limits, checked_id, interaction_of, profile_of

if TYPE_CHECKING:
    from pathlib import Path

ColumnName = str | int
"""A column by its name in the header (or the field of JSONL), or by its position from 0."""

TimestampFormat = Literal["ms", "s", "iso"]
"""Milliseconds or seconds since the epoch, or ISO 8601 text (UTC where it names no offset). Never guessed."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """Which columns hold an interaction's fields."""

    user: ColumnName = "user"
    item: ColumnName = "item"
    rating: ColumnName = "rating"
    timestamp: ColumnName = "timestamp"


@dataclass(frozen=True, slots=True)
class Column:
    """A column that is a feature: a number, one category, or several between separators. ``feature`` names it, by default as the column."""

    name: ColumnName
    kind: Literal["number", "category", "list"] = "category"
    feature: str | None = None
    separator: str = " "


class Entry(NamedTuple):
    """One line as a record: key, value and event time (None where it has none), or the ``error`` that it is."""

    line: Line
    key: bytes | None
    value: bytes | None
    timestamp: int | None
    error: Malformed | None


class _Event(NamedTuple):
    key: str
    value: bytes
    timestamp: int | None


_Row = Mapping[ColumnName, object]
_Read = Callable[[_Row], _Event]

_RECBOLE_KINDS: dict[str, Literal["number", "category", "list"]] = {"token": "category", "float": "number", "token_seq": "list"}

_SCHEMA_KINDS: dict[str, Literal["number", "category", "list"]] = {"numeric": "number", "multivalued": "list"}


class Source:
    """The entries of one file. ``timed`` tells whether they have event times. Made by `interaction_source` and `profile_source`."""

    def __init__(self, file: TextFile, read: _Read, wanted: Sequence[ColumnName], *, timed: bool, settings: object, limits: Limits) -> None:
        self.file = file
        self.timed = timed
        self._read = read
        self._limits = limits
        self._positions = {} if file.format == "jsonl" else {name: _position(file, name) for name in wanted}
        text = json.dumps([asdict(file.layout), settings], sort_keys=True, default=asdict)
        self.settings = hashlib.sha256(text.encode()).hexdigest()[:16]
        of_events = {name: value for name, value in asdict(limits).items() if name not in ("max_candidates", "max_n")}
        self.valid = hashlib.sha256(json.dumps(of_events).encode()).hexdigest()[:16]
        """Of what decides whether an entry is an event: one that is none has no time."""

    def entries(self, place: Place = Place()) -> Iterator[tuple[Entry, float]]:  # noqa: B008 - immutable
        """Yield the entries after ``place``, each with the share of the file read so far. Raises `SourceError` if the file fails."""
        for line, done in self.file.lines(max(place, self.file.start)):
            yield self.entry(line), done

    def entry(self, line: Line) -> Entry:
        """Read one line. Never raises: what is wrong with it is in the entry."""
        try:
            if line.overlong:
                raise Malformed("too-large", f"a line of {line.overlong} bytes, at most {MAX_LINE_BYTES}")
            key, value, timestamp = self._read(self._row(line.raw))
            if len(value) > self._limits.max_event_bytes:
                raise Malformed("too-large", f"{len(value)} bytes as a record, at most {self._limits.max_event_bytes}")
        except Malformed as error:
            return Entry(line, None, line.raw, None, error)
        return Entry(line, key.encode(), value, timestamp, None)

    def _row(self, raw: bytes) -> _Row:
        if self.file.format == "jsonl":
            return cast("_Row", read_json_map(self.file.text(raw).encode(), self._limits.max_depth))
        fields = self.file.split(self.file.text(raw))
        columns = self.file.columns
        if columns is not None and len(fields) != len(columns):
            raise Malformed("not-decodable", f"{len(fields)} columns where the header names {len(columns)}")
        # White space around a field is how people align files, not part of an id.
        return {name: fields[position].strip() for name, position in self._positions.items() if position < len(fields)}


def interaction_source(
    path: Path,
    *,
    layout: Layout = Layout(),  # noqa: B008 - immutable
    columns: Mapped = Mapped(),
    timestamps: TimestampFormat = "ms",
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Source:
    """Return the interactions of a file. Raises `SourceError` for a file that cannot be read or a column that it does not have."""
    wanted = asdict(columns)

    def read(row: _Row) -> _Event:
        fields = {field: row[name] for field, name in wanted.items() if row.get(name) not in (None, "")}
        if isinstance(rating := fields.get("rating"), str):
            fields["rating"] = _number(rating, "rating")
        if "timestamp" in fields:
            fields["timestamp"] = _milliseconds(fields["timestamp"], timestamps)
        event = interaction_of(fields, limits)
        return _Event(event.user, encode(event), event.timestamp)

    return Source(TextFile(path, layout), read, list(wanted.values()), timed=True, settings=[columns, timestamps], limits=limits)


def profile_source(
    path: Path,
    *,
    id_column: ColumnName,
    columns: Sequence[Column] | None = None,
    kinds: Mapping[str, str] | None = None,
    separator: str = "|",
    layout: Layout = Layout(),  # noqa: B008 - immutable
    limits: Limits = Limits(),  # noqa: B008 - immutable
) -> Source:
    """Return the profiles of users or items in a file.

    Without ``columns`` every other column is a feature: in JSONL as it stands, elsewhere by the types in the header (RecBole's token,
    float and token_seq), else by the ``kinds`` of a schema's features, of which a multivalued one is cut by ``separator``, else a
    category. An empty field is a feature that is not known. Raises `SourceError` as `interaction_source` does.
    """
    file = TextFile(path, layout)
    chosen = columns if columns is not None or file.format == "jsonl" else _typed_columns(file, id_column, kinds or {}, separator)

    def read(row: _Row) -> _Event:
        if row.get(id_column) is None:
            raise Malformed("missing-field", f"the id, {id_column}")
        owner = checked_id(row[id_column], "id", limits)
        if chosen is None:
            features = {name: value for name, value in row.items() if name != id_column}
        else:
            given = [column for column in chosen if row.get(column.name) not in (None, "")]
            features = {column.feature or str(column.name): _feature(row[column.name], column) for column in given}
        return _Event(owner, encode(profile_of({"features": features}, limits)), None)

    wanted = [id_column, *(column.name for column in chosen or ())]
    return Source(file, read, wanted, timed=False, settings=[id_column, list(chosen or ())], limits=limits)


def _position(file: TextFile, name: ColumnName) -> int:
    if isinstance(name, int):
        if name < 0 or (file.columns is not None and name >= len(file.columns)):
            raise SourceError(f"{file.path}: there is no column {name}, they are counted from 0")
        return name
    if file.columns is None:
        raise SourceError(f"{file.path}: without a header, column {name!r} must be given by its position")
    if name not in file.columns:
        raise SourceError(
            f"{file.path}: there is no column {name!r}; cut by {file.delimiter!r} there are {', '.join(file.columns)}: the settings "
            "replay.*_column (or --user-column and so on) name columns, replay.delimiter says what is between them"
        )
    return file.columns[name]


def _typed_columns(file: TextFile, id_column: ColumnName, kinds: Mapping[str, str], separator: str) -> list[Column]:
    id_position = _position(file, id_column)
    found = []
    for name, position in (file.columns or {}).items():
        if position == id_position:
            continue
        if kind := _RECBOLE_KINDS.get(file.types[name]):
            found.append(Column(name, kind))
        else:
            found.append(Column(name, _SCHEMA_KINDS.get(kinds.get(name, ""), "category"), separator=separator))
    return found


def _number(text: str, field: str) -> float:
    try:
        if "_" in text:  # Python's own notation, a typing error anywhere else
            raise ValueError
        return float(text)
    except ValueError:
        raise Malformed("wrong-type", f"{field}: a number is needed, found {shown(text)}") from None


def _milliseconds(value: object, unit: TimestampFormat) -> object:
    """``value`` in milliseconds; what has the wrong type in JSONL goes on as it is, to be refused by the one check that there is."""
    if unit == "iso":
        if not isinstance(value, str):
            raise Malformed("wrong-type", f"timestamp: ISO 8601 text is needed, found {shown(value)}")
        try:
            moment = datetime.fromisoformat(value)
            moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
            return round(moment.timestamp() * 1000)
        except (ValueError, OverflowError):
            raise Malformed("wrong-type", f"timestamp: no ISO 8601 time: {shown(value)}") from None
    if isinstance(value, str):
        value = int(value) if value.isdecimal() and len(value) < 19 else _number(value, "timestamp")
    if unit == "ms" or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value * 1000
    # Beyond 2**53 the product says nothing; infinity and NaN stay what they are and are refused.
    return float(round(value * 1000)) if isinstance(value, float) and abs(value) < 1e15 else value


def _feature(value: object, column: Column) -> object:
    if not isinstance(value, str):
        return value
    if column.kind == "number":
        return _number(value, f"feature {column.feature or column.name}")
    return [part for part in value.split(column.separator) if part] if column.kind == "list" else value
