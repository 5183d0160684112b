"""The effective settings as `coldstream config` shows them: flat, with their origins, and without secrets."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from consumers import catalogue
from consumers.catalogue import Entry
from consumers.layers import Loaded, Origin, SettingsError
from consumers.logs import masked
from consumers.settings import Settings
from model.settings import PRESETS


class Effective(NamedTuple):
    """A setting with its value in force, as JSON has it, and the value's origin."""

    entry: Entry
    value: object
    origin: Origin
    of_preset: bool = False
    """Whether the preset in force has a value of its own for it."""

    @property
    def unchanged(self) -> bool:
        """Whether it is the default, be it that somebody wrote it down, and would be without."""
        if self.origin.source == "default":
            return True
        is_default = json.dumps(self.value) == json.dumps(self.entry.default, default=str)
        return is_default and (self.origin.source == "preset" or not self.of_preset)

    @property
    def shown(self) -> str:
        """The value as a person writes it."""
        return toml(self.value)


def public(settings: Settings) -> dict[str, Any]:
    """All settings, nested, as JSON has them; secrets are masked."""
    dumped = settings.model_dump(mode="json", by_alias=True)
    # The names of features are no names of settings: one that reads like a secret's is none.
    shown: dict[str, Any] = masked(dumped) | {"schema": dumped["schema"]}
    return shown


def effective(loaded: Loaded) -> list[Effective]:
    """Every setting, in the order of docs/settings.md; a secret's value is masked."""
    rows, of_preset = list[Effective](), PRESETS.get(loaded.settings.preset, {})
    shown = public(loaded.settings)
    for name, entry in catalogue.entries().items():
        value: Any = shown
        for part in name.split("."):
            value = value[part]
        section, _, key = name.rpartition(".")
        rows.append(Effective(entry, value, loaded.origins[name], key in of_preset.get(section, {})))
    return rows


def select(rows: Iterable[Effective], names: Iterable[str], *, changed: bool = False) -> list[Effective]:
    """The rows of these settings or sections (none named: all), if ``changed`` only those whose value is not the default.

    Raises `SettingsError` for a name that is neither a setting nor a section.
    """
    rows = list(rows)
    known = {row.entry.name for row in rows} | {name for name, _ in catalogue.sections() if name}
    wanted = list(names)
    unknown = [
        f"{name}: no such setting or section; sections: {', '.join(sorted(known - {r.entry.name for r in rows}))}"
        for name in wanted
        if name not in known
    ]
    if unknown:
        raise SettingsError(unknown)
    return [
        row
        for row in rows
        if (not wanted or any(row.entry.name == name or row.entry.name.startswith(f"{name}.") for name in wanted))
        and not (changed and row.unchanged)
    ]


def as_json(rows: Iterable[Effective]) -> str:
    """An object of ``{name: {"value", "unit", "from", "place"}}``."""
    plain = {
        row.entry.name: {"value": row.value, "unit": row.entry.unit, "from": row.origin.source, "place": row.origin.place} for row in rows
    }
    return json.dumps(plain, indent=2, ensure_ascii=False)


def as_toml(rows: Iterable[Effective]) -> str:
    """A settings file of these values, with each one's origin as a comment. A value of none has no form in TOML and stays a comment."""
    tables: dict[str, list[str]] = {}
    for row in rows:
        table, _, key = row.entry.name.rpartition(".")
        line = f"# {key} is none" if row.value is None else f"{key} = {toml(row.value)}"
        tables.setdefault(table, []).append(f"{line}  # {row.origin}")
    return "\n".join(line for table, lines in tables.items() for line in ([f"\n[{table}]", *lines] if table else lines)).lstrip("\n") + "\n"


def toml(value: object) -> str:
    """``value`` in TOML's syntax."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's strings are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return "none" if value is None else repr(value)
