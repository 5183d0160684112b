"""What the verifier finds."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """A broken promise, by its letter, and what shows it."""

    promise: str
    text: str
