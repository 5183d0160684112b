"""Exit codes of `coldstream`, and the one place where an error becomes one of them."""

from __future__ import annotations

import enum

from consumers.asking import NoAnswer
from consumers.layers import SettingsError
from consumers.stop import Interrupted
from streaming import errors


class Exit(enum.IntEnum):
    """What a command's exit code says; `MEANING` has it in words."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    LOG_UNAVAILABLE = 3
    LOG_FULL = 4
    FENCED = 5
    DATA = 6
    DIFFERENT = 7
    NO_ANSWER = 8
    INTERRUPTED = 130
    TERMINATED = 143


MEANING = {
    Exit.DONE: "Done. Also the end of a worker or trainer that was asked to stop (Ctrl-C, SIGTERM) and finished the step in hand.",
    Exit.UNEXPECTED: "Something that should not happen; run again with --verbose to see where.",
    Exit.USAGE: "A wrong flag or setting, a port that is in use, or topics or a model that do not fit the settings.",
    Exit.LOG_UNAVAILABLE: "The log does not answer, refuses this user, is locked or damaged, or lacks the topic or records asked for.",
    Exit.LOG_FULL: "The disk under the log, or under a local store, is full. No committed step is lost; the next start goes on from there.",
    Exit.FENCED: "Another instance has taken over this one's partitions or transactional id.",
    Exit.DATA: "A file that was named cannot be read or written, or a record cannot be taken as what it should be.",
    Exit.DIFFERENT: "An audit found differences: something in the log does not follow from the rest of it.",
    Exit.NO_ANSWER: "No worker answered a request in time.",
    Exit.INTERRUPTED: "Ctrl-C before the work was done. What was done is committed; the same command goes on from there.",
    Exit.TERMINATED: "SIGTERM before the work was done. What was done is committed; the same command goes on from there.",
}

_BY_ERROR: tuple[tuple[type[BaseException], Exit], ...] = (
    (SettingsError, Exit.USAGE),
    (errors.EndpointError, Exit.USAGE),
    (errors.TopicMismatch, Exit.USAGE),
    (errors.OtherSettings, Exit.USAGE),
    (errors.Refused, Exit.USAGE),
    (errors.VersionLost, Exit.LOG_UNAVAILABLE),
    (errors.LogFull, Exit.LOG_FULL),
    (errors.StoreFull, Exit.LOG_FULL),
    (errors.StoreError, Exit.LOG_UNAVAILABLE),
    (errors.Fenced, Exit.FENCED),
    (errors.LogError, Exit.LOG_UNAVAILABLE),
    (errors.FormatMismatch, Exit.LOG_UNAVAILABLE),
    (errors.ChunkError, Exit.LOG_UNAVAILABLE),
    (errors.SourceError, Exit.DATA),
    (errors.Malformed, Exit.DATA),
    (NoAnswer, Exit.NO_ANSWER),
    (ConnectionError, Exit.UNEXPECTED),
    (TimeoutError, Exit.UNEXPECTED),
    # Files that the user named: a journal, a folder for the report.
    (OSError, Exit.DATA),
    (KeyboardInterrupt, Exit.INTERRUPTED),
)
"""The first that fits counts, so the special ones stand before their bases."""


def exit_of(error: BaseException) -> Exit:
    """The exit code that says what ``error`` was."""
    if isinstance(error, Interrupted):
        return Exit(128 + error.signal)
    return next((code for kind, code in _BY_ERROR if isinstance(error, kind)), Exit.UNEXPECTED)
