"""The embedded broker: a log for the processes of one machine, in one SQLite file (docs/decisions/0001)."""

from __future__ import annotations

from streaming.embedded.broker import EmbeddedLog

__all__ = ["EmbeddedLog"]
