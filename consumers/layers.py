"""Where settings come from: defaults < preset < file < environment < flags, with the origin of every value.

The usual loader (pydantic-settings) ignores an environment variable with a misspelled name and forgets where a value came from. Here
both are answered: a wrong setting is an error that names it, its place, its value and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from consumers import catalogue
from consumers.logs import HIDDEN, is_secret, masked_text
from consumers.settings import Settings
from model.settings import PRESETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from consumers.catalogue import Entry

FILE = "coldstream.toml"
PREFIX = "COLDSTREAM_"
CONFIG_VARIABLE = "COLDSTREAM_CONFIG"
PASSWORD_VARIABLE = "COLDSTREAM_KAFKA_PASSWORD"  # noqa: S105 - a name, no password
"""No setting, so that `coldstream config` and an error have nothing to hide."""
"""The environment's form of --config; it names the file and is no setting."""
MAX_FILE_BYTES = 1_048_576


class Origin(NamedTuple):
    """Where a value came from: the kind of source, and the place within it."""

    source: Literal["default", "preset", "file", "environment", "flag"]
    place: str = ""

    def __str__(self) -> str:
        return f"{self.source} {self.place}".rstrip()


class Loaded(NamedTuple):
    """The effective settings, and the origin of each by its dotted name."""

    settings: Settings
    origins: dict[str, Origin]


class SettingsError(Exception):
    """Settings that are unknown or wrong. ``problems`` holds one line for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class _Given(NamedTuple):
    name: str
    value: Any
    origin: Origin


class _Problems(list[str]):
    """Collects what is wrong, so that all of it is reported at once."""

    def unknown(self, name: str, shown: str, origin: Origin, known: Iterable[str]) -> None:
        ends = {full: full for full in known} | {full.rpartition(".")[2]: full for full in known}
        close = [ends[match] for match in difflib.get_close_matches(name, ends, 2, 0.75)]
        hint = f"; did you mean {' or '.join(dict.fromkeys(close))}?" if close else "; `coldstream config` lists all settings"
        self.append(f"{shown}: unknown setting ({origin}){hint}")

    def wrong(self, entry: Entry, value: object, origin: Origin, why: str) -> None:
        shown = HIDDEN if is_secret(entry.name) else masked_text(value if isinstance(value, str) else _short(value))
        unit = f" ({entry.unit})" if entry.unit else ""
        self.append(f"{entry.name} = {shown} ({origin}): {why}; allowed: {entry.allowed()}{unit}, default {_short(entry.default)}")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def load(
    config: Path | None = None,
    sets: Iterable[str] = (),
    flags: Mapping[str, object] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Loaded:
    """Read all sources. Raises `SettingsError`, which names everything that is wrong with them.

    ``config`` is the file to read; without it ``coldstream.toml`` in ``directory`` (default: the working directory) is, where it
    exists. ``sets`` are texts ``section.name=value``. ``flags`` are a command's own flags by the dotted name of their setting, None for
    one not given; the flag of ``worker.micro_batch`` is called ``--micro-batch``.
    """
    known = catalogue.entries()
    problems = _Problems()
    environ = os.environ if environ is None else environ
    given = [
        *_from_file(config, directory or Path(), known, problems),
        *_from_environment(environ, known, problems),
        *_from_sets(sets, known, problems),
        *_from_flags(flags or {}, known),
    ]
    preset = next((item.value for item in reversed(given) if item.name == "preset"), "default")
    below = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    given = [*_from_table(below, lambda _: Origin("preset", str(preset)), known, problems), *given]
    if problems:
        raise SettingsError(problems)
    chosen = {item.name: item for item in given}
    settings = _validated(chosen, known)
    return Loaded(settings, {name: chosen[name].origin if name in chosen else Origin("default") for name in known})


def _validated(chosen: Mapping[str, _Given], known: Mapping[str, Entry]) -> Settings:
    nested: dict[str, Any] = {}
    for item in chosen.values():
        *tables, last = item.name.split(".")
        table = nested
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = item.value
    try:
        return Settings.model_validate(nested)
    except ValidationError as error:
        problems = _Problems()
        for detail in error.errors(include_url=False):
            _explain(
                [str(part) for part in detail["loc"]],
                detail["msg"].removeprefix("Value error, ").replace("Input should be", "must be"),
                chosen,
                known,
                problems,
            )
        raise SettingsError(problems) from None


def _explain(location: list[str], why: str, chosen: Mapping[str, _Given], known: Mapping[str, Entry], problems: _Problems) -> None:
    """Put one of pydantic's errors in words; ``location`` may lead into a setting's value, or only to a table (values that clash)."""
    for length in range(len(location), 0, -1):
        name = ".".join(location[:length])
        if name in chosen:
            inside = ".".join(location[length:])
            problems.wrong(known[name], chosen[name].value, chosen[name].origin, f"{inside}: {why}" if inside else why)
            return
    table = ".".join(location)
    named = [item for item in chosen.values() if item.name in why]
    involved = [f"{item.name}: {item.origin}" for item in named or chosen.values() if named or item.name.startswith(f"{table}.")]
    problems.append(f"{why} ({'; '.join(involved) or 'defaults'})")


def _from_table(table: Mapping[str, Any], place: Any, known: Mapping[str, Entry], problems: _Problems, above: str = "") -> Iterator[_Given]:  # noqa: ANN401
    tables = {name for name, _ in catalogue.sections()}
    for key, value in table.items():
        name = f"{above}.{key}" if above else key
        origin: Origin = place(name)
        if (
            isinstance(value, dict) and value and name not in known
        ):  # a table, or one whose settings are told one by one that nobody knows them
            yield from _from_table(value, place, known, problems, name)
        elif name in tables:
            problems.append(
                f"{name} = {_short(value)} ({origin}): is a table of settings, not a value; write [{name}] and its settings below"
            )
        elif name not in known:
            problems.unknown(name, name, origin, known)
        elif isinstance(value, bool) and bool not in known[name].types and True not in known[name].choices:
            # pydantic would take true for 1
            problems.wrong(known[name], value, origin, "is of the wrong type")
        else:
            yield _Given(name, value, origin)


def _from_file(config: Path | None, directory: Path, known: Mapping[str, Entry], problems: _Problems) -> Iterator[_Given]:
    path = config or directory / FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        if config is not None:
            problems.append(f"{path}: no such settings file (flag --config, or {CONFIG_VARIABLE})")
        return
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return
    if len(text) > MAX_FILE_BYTES:
        problems.append(f"{path}: is larger than {MAX_FILE_BYTES} bytes, this is no settings file")
        return
    try:
        table = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: is not TOML: {error}")
        return

    def place(name: str) -> Origin:
        section, _, key = name.rpartition(".")
        return Origin("file", f"{path.name if config is None else path}: {f'[{section}] ' if section else ''}{key}")

    yield from _from_table(table, place, known, problems)


def _from_environment(environ: Mapping[str, str], known: Mapping[str, Entry], problems: _Problems) -> Iterator[_Given]:
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in (CONFIG_VARIABLE, PASSWORD_VARIABLE):
            continue
        name = variable.removeprefix(PREFIX).lower().replace("__", ".")
        origin = Origin("environment", variable)
        if name in known:
            yield from _from_text(known[name], environ[variable], origin, problems)
        else:
            problems.unknown(name, name, origin, known)


def _from_sets(sets: Iterable[str], known: Mapping[str, Entry], problems: _Problems) -> Iterator[_Given]:
    for text in sets:
        name, equals, value = text.partition("=")
        name = name.strip()
        origin = Origin("flag", f"--set {name}")
        if not equals:
            problems.append(f"--set {text}: write section.name=value, such as --set worker.micro_batch=32")
        elif name in known:
            yield from _from_text(known[name], value.strip(), origin, problems)
        else:
            problems.unknown(name, name, origin, known)


def _from_flags(flags: Mapping[str, object], known: Mapping[str, Entry]) -> Iterator[_Given]:
    for name, value in flags.items():
        if value is not None:
            assert name in known, name  # noqa: S101 - names are written in our own commands
            yield _Given(name, value, Origin("flag", "--" + name.rpartition(".")[2].replace("_", "-")))


def _from_text(entry: Entry, text: str, origin: Origin, problems: _Problems) -> Iterator[_Given]:
    """A value given as text: numbers and booleans as written, lists and tables as JSON, ``none`` where that is allowed."""
    if entry.optional and text.lower() in ("none", "null"):
        yield _Given(entry.name, None, origin)
    elif text.startswith(("[", "{")) and not entry.takes_text:
        try:
            yield _Given(entry.name, json.loads(text), origin)
        except ValueError as error:
            problems.wrong(entry, text, origin, f"is not JSON ({error})")
    else:
        yield _Given(entry.name, text, origin)
