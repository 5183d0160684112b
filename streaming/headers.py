"""A model version as `streaming.events.Version` is written, read without what is large in it. No record of its own: nothing writes it."""

from __future__ import annotations

import msgspec


class VersionHeader(msgspec.Struct, frozen=True):
    """A `streaming.events.Version` without its values: to tell which there are, at the price of passing over the tensors."""

    version: int
    parent: int | None
    folded: dict[int, int]
    settings: str
    events: int
    made_at: int
    format: int
    dropped: list[tuple[int, int]] = []
    replaces: int | None = None
    skipped: list[tuple[int, int, int]] = []
    position: int = 0
