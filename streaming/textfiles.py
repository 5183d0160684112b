"""Lines of historical logs: CSV, TSV, JSONL and files cut by any other text, plain or gzip, read as a stream.

One line is one entry: a quoted field may hold the delimiter, but no line break. So a stray quote costs its own line and no other,
and a line number or a byte offset is a place to go on from.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from streaming.errors import Malformed, SourceError

MAX_LINE_BYTES = 65_536
"""A longer line is one malformed entry, of which only `KEPT_BYTES` are held."""

KEPT_BYTES = 4096

_DIGESTED_BYTES = 1 << 20
_DELIMITERS = {"csv": ",", "tsv": "\t", "inter": "\t", "user": "\t", "item": "\t"}


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file is written.

    ``format``: ``csv`` (quotes as in RFC 4180), ``tsv`` (no quotes) or ``jsonl``; None goes by the file's name (.csv, .tsv, .jsonl, or
    RecBole's .inter, .user, .item, each also with .gz). ``delimiter``: any text between columns, such as ``::``, None for the format's
    own; one of more than one character has no quotes. ``header``: the first line names the columns; without it they go by position,
    from 0. ``strip_types``: drop the type from names such as RecBole's ``user_id:token``. ``encoding``: such as utf-8 or latin-1.
    """

    format: Literal["csv", "tsv", "jsonl"] | None = None
    delimiter: str | None = None
    header: bool = True
    strip_types: bool = True
    encoding: str = "utf-8"


class Line(NamedTuple):
    """One line: ``number`` from 1 as editors count, ``end`` the byte offset (of the unpacked text) after it, ``raw`` without its break.

    A line beyond `MAX_LINE_BYTES` has only its first `KEPT_BYTES` in ``raw``, and its size in ``overlong`` (else 0).
    """

    number: int
    end: int
    raw: bytes
    overlong: int = 0


class Place(NamedTuple):
    """A place between two lines: the number of the line before it and the byte offset there."""

    line: int = 0
    end: int = 0


class TextFile:
    """A file of lines. Raises `SourceError` for a file that cannot be opened or read, or whose layout does not fit it."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path.resolve()
        self.packed = path.suffix == ".gz"
        suffix = (path.with_suffix("") if self.packed else path).suffix.lstrip(".").lower()
        self.format = layout.format or ("jsonl" if suffix == "jsonl" else "tsv" if _DELIMITERS.get(suffix) == "\t" else None)
        if not self.path.is_file():
            raise SourceError(f"{path}: {'is no file' if self.path.exists() else 'there is no such file'}")
        if self.format is None:
            if suffix != "csv":
                raise SourceError(f"{path}: the name does not tell the format; it must end in .csv, .tsv or .jsonl, each also with .gz")
            self.format = "csv"
        self.delimiter = layout.delimiter or _DELIMITERS.get(self.format, "")
        self.layout = layout
        if any(char in self.delimiter for char in '\r\n"'):
            raise SourceError(f"{path}: a delimiter cannot hold a quote or a line break: {self.delimiter!a}")
        try:
            "".encode(layout.encoding)
        except LookupError:
            raise SourceError(f"{path}: no such encoding: {layout.encoding}") from None
        if codecs.lookup(layout.encoding).name.startswith(("utf-16", "utf-32")):
            raise SourceError(f"{path}: files in {layout.encoding} cannot be read line by line; convert it to utf-8")
        self.size = self._stat_size()
        self.types: dict[str, str] = {}
        self.start = Place()
        self.columns = self._read_header()

    def _stat_size(self) -> int:
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror}") from None

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        """The unpacked text and the file under it."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise SourceError(f"{self.path}: {error.strerror}") from None
        return (cast("IO[bytes]", gzip.GzipFile(fileobj=file, mode="rb")) if self.packed else file, file)

    def digest(self) -> str:
        """SHA-256 of the first and last megabyte: with the size, enough to notice that a file was changed or exchanged."""
        text, file = self._open()
        with text, file:
            digest = hashlib.sha256(file.read(_DIGESTED_BYTES))
            file.seek(max(self.size - _DIGESTED_BYTES, 0))
            digest.update(file.read(_DIGESTED_BYTES))
        return digest.hexdigest()

    def _read_header(self) -> dict[str, int] | None:
        """Column positions by name, None where there are none. Sets `types` and `start`."""
        if self.format == "jsonl" or not self.layout.header:
            return None
        first = next(self.lines(), (None, 0.0))[0]
        if first is None or first.overlong:
            raise SourceError(f"{self.path}: no header in the first line")
        self.start = Place(first.number, first.end)
        names = []
        try:
            row = self.split(self.text(first.raw))
        except Malformed as error:
            raise SourceError(f"{self.path}: the header cannot be read: {error.detail}") from None
        for cell in row:
            plain, _, kind = cell.strip().partition(":")
            name = plain if self.layout.strip_types else cell.strip()
            names.append(name)
            self.types[name] = kind
        if len(set(names)) != len(names):
            raise SourceError(f"{self.path}: the header names a column twice: {', '.join(names)}")
        return {name: position for position, name in enumerate(names)}

    def lines(self, place: Place = Place()) -> Iterator[tuple[Line, float]]:  # noqa: B008 - immutable
        """Yield the lines after ``place``, each with the share of the file read so far (0 to 1). Blank lines are passed over."""
        number, end = place
        text, file = self._open()
        with text, file:
            try:
                if end:
                    text.seek(end)  # in a gzip file this reads and drops what is before
                while raw := text.readline(MAX_LINE_BYTES + 2):
                    start, size = raw, len(raw)
                    while not raw.endswith(b"\n") and (raw := text.readline(MAX_LINE_BYTES)):
                        size += len(raw)
                    number, end = number + 1, end + size
                    line = start.removesuffix(b"\n").removesuffix(b"\r")
                    if number == 1:
                        line = line.removeprefix(codecs.BOM_UTF8)
                    if not line.strip():
                        continue
                    done = file.tell() / self.size if self.packed else end / max(self.size, end)
                    yield (Line(number, end, line) if len(line) <= MAX_LINE_BYTES else Line(number, end, line[:KEPT_BYTES], size)), done
            except (OSError, EOFError, zlib.error) as error:
                raise SourceError(f"{self.path}: line {number + 1} cannot be read: {error}") from None

    def text(self, raw: bytes) -> str:
        """Decode a line. Raises `Malformed` where the bytes are not in the layout's encoding."""
        try:
            return raw.decode(self.layout.encoding)
        except UnicodeDecodeError as error:
            raise Malformed("invalid-utf8", f"not {self.layout.encoding}: {error.reason}") from None

    def split(self, text: str) -> list[str]:
        """Cut a line into its columns. Raises `Malformed` for quotes that do not close."""
        if self.format != "csv" or len(self.delimiter) > 1:
            return text.split(self.delimiter)
        try:
            return next(csv.reader([text], delimiter=self.delimiter, strict=True))
        except (csv.Error, StopIteration) as error:
            raise Malformed("not-decodable", f"no CSV line: {error}") from None
