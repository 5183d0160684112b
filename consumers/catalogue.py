"""The settings as a flat list, each under its dotted name, with what is allowed for it in words."""

from __future__ import annotations

import re
import types
import typing
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, SecretStr

from consumers.settings import Settings

if typing.TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

_UNIT = re.compile(r"\s*\[([^\[\]]+)\]$")
"""A description ends with the unit in brackets, where there is one."""


class Entry(NamedTuple):
    """One setting: its dotted name, the types it may have, and pydantic's field behind it."""

    name: str
    types: tuple[Any, ...]
    field: FieldInfo

    @property
    def unit(self) -> str:
        """Unit of the value, empty where it has none."""
        found = _UNIT.search(self.field.description or "")
        return found[1] if found else ""

    @property
    def description(self) -> str:
        """What the setting does."""
        return _UNIT.sub("", self.field.description or "")

    @property
    def default(self) -> object:
        """The value where no source gives another."""
        return plain(self.field.get_default(call_default_factory=True, validated_data={}))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values of a literal type; empty for every other type."""
        return tuple(choice for kind in self.types if typing.get_origin(kind) is Literal for choice in typing.get_args(kind))

    @property
    def takes_text(self) -> bool:
        """Whether a string is taken as it is."""
        return any(kind in (str, SecretStr) for kind in self.types) or any(isinstance(choice, str) for choice in self.choices)

    @property
    def optional(self) -> bool:
        """Whether the setting may be none."""
        return type(None) in self.types

    def allowed(self) -> str:
        """The type and range in words, such as ``integer from 1 to 4096``."""
        words = [_word(kind) for kind in self.types]
        bounds = {
            key: getattr(part, key)
            for part in self.field.metadata
            for key in ("ge", "gt", "le", "lt")
            if getattr(part, key, None) is not None
        }
        low = f"from {bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}" if "gt" in bounds else ""
        high = f"to {bounds['le']}" if "le" in bounds else f"below {bounds['lt']}" if "lt" in bounds else ""
        if low.startswith("from") and not high:
            low = f"{bounds['ge']} or more"
        elif high.startswith("to") and not low:
            high = f"{bounds['le']} or less"
        return " ".join(part for part in (" or ".join(words), low, high) if part)


def _word(kind: Any) -> str:  # noqa: ANN401 - a type, of any form
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(_literal(choice) for choice in typing.get_args(kind))
    names = {int: "integer", float: "number", bool: "true or false", str: "text", SecretStr: "text", type(None): "none"}
    origins = {list: "list", tuple: "list", dict: "table"}
    return names.get(kind) or origins.get(typing.get_origin(kind) or kind) or "table"


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)


def plain(value: object) -> object:
    """``value`` as JSON has it: models as dicts, tuples as lists."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _alternatives(annotation: Any) -> tuple[Any, ...]:  # noqa: ANN401 - a type, of any form
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for option in typing.get_args(annotation) for part in _alternatives(option))
    return (annotation,)


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that is a table of settings, None for a setting of its own."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def sections(model: type[BaseModel] = Settings, above: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every table of settings by its dotted name, the top one under the empty name, outer before inner."""
    yield above, model
    for name, field in model.model_fields.items():
        inner = section(field)
        if inner is not None:
            yield from sections(inner, _join(above, field.alias or name))


def _join(above: str, name: str) -> str:
    return f"{above}.{name}" if above else name


def entries() -> dict[str, Entry]:
    """Every setting by its dotted name, in the order of declaration, a table's own before those of the tables inside it."""
    return {
        dotted: Entry(dotted, _alternatives(field.annotation), field)
        for above, model in sections()
        for name, field in model.model_fields.items()
        if section(field) is None
        for dotted in [_join(above, field.alias or name)]
    }
