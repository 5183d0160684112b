"""Every error that ``streaming`` raises on purpose. Each message names the setting, topic or event at fault."""

from __future__ import annotations


class StreamError(Exception):
    """Base of all errors of this package."""


class LogError(StreamError):
    """The log refused or failed an operation."""


class UnknownTopic(LogError):
    """A topic or partition that does not exist."""


class TopicMismatch(LogError):
    """A topic exists with settings that do not fit those asked for."""


class RecordTooLarge(LogError):
    """A record larger than its topic allows."""


class OffsetOutOfRange(LogError):
    """A position whose records retention has removed, or that lies past the end."""


class Fenced(LogError):
    """A newer writer of the same id, or a newer generation of the group, has taken over. The step in hand must be abandoned."""


class LogFull(LogError):
    """The disk under the log is full. Nothing of the commit was kept."""


class LogUnavailable(LogError):
    """The broker does not answer, or its file is locked, damaged or of another format."""


class BrokerUnreachable(LogUnavailable):
    """The broker does not answer now. Trying again may help; what was being done may or may not have taken place."""


class AccessRefused(LogUnavailable):
    """The broker does not take us as who we say we are, or we it; or this user may not do what was asked. Trying again does not help."""


class OtherSettings(StreamError):
    """The log's model was made with other settings than this process has."""


class Refused(StreamError):
    """What was asked for would lose something, or makes no sense as things stand. The message says how it can be had all the same."""


class VersionLost(StreamError):
    """Model versions that are needed were removed by retention, and no snapshot stands in for them."""


class Malformed(StreamError):
    """A record that cannot be taken as what its topic holds.

    ``reason`` is one of a fixed set of words (`streaming.events.REASONS`), fit for a metric's label; ``detail`` names the field and
    what was wrong with it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class SourceError(StreamError):
    """A historical log that cannot be read: no such file, no such column, unknown format."""


class FormatMismatch(StreamError):
    """A record of the system in another layout than this version reads. The message names what was found and what was expected."""


class ChunkError(StreamError):
    """Chunks of a cut value that do not fit together: one is missing, out of turn, or damaged."""


class EndpointError(StreamError):
    """The endpoint for metrics and health cannot listen at the address and port asked for."""


class StoreError(StreamError):
    """The local store of a partition's support sets cannot be used. Nothing is lost by it: the changelog has all that it holds."""


class StoreLocked(StoreError):
    """Another process has the store."""


class StoreFull(StoreError):
    """There is no room for the store, and more waits in memory than may."""


class StoreDamaged(StoreError):
    """The store turned out to be damaged, or another's, and was set aside; opened again it is empty, and rebuilt from the changelog."""
