"""What every client of one connection has in common: servers, patience, security, and how its errors are told."""

from __future__ import annotations

import contextlib
import re
import selectors
import ssl
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kafka import errors

from streaming.errors import AccessRefused, BrokerUnreachable, Fenced, LogError, LogUnavailable, RecordTooLarge, UnknownTopic
from streaming.kafka.probe import greet

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

BATCH_BYTES = 262_144
"""Largest batch of small records that a producer sends; a larger record goes alone. Topics have room for it beside their largest record."""

FENCED = (
    errors.ProducerFencedError,
    errors.InvalidProducerEpochError,
    errors.InvalidProducerIdMappingError,
    errors.IllegalGenerationError,
    errors.UnknownMemberIdError,
    errors.FencedInstanceIdError,
    errors.FencedMemberEpochError,
    errors.StaleMemberEpochError,
    errors.RebalanceInProgressError,
    errors.CommitFailedError,
)
"""Errors that say that another has taken over, or that the group has moved on."""


class Selector(selectors.DefaultSelector):
    """The system's selector, which answers for a file it does not know by its identity alone.

    The standard one describes the file in full for its error, twice, and for a socket that is two calls of the system's each: the client
    asks so before every wait, and swallows the error (kafka-python 3.0.12). It was a sixth of what the producer's thread did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[FileDescriptorLike, selectors.SelectorKey] = {}

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        """As the standard one."""
        key = self._known[fileobj] = super().register(fileobj, events, data)
        return key

    def modify(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        """As the standard one."""
        key = self._known[fileobj] = super().modify(fileobj, events, data)
        return key

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """As the standard one."""
        self._known.pop(fileobj, None)
        return super().unregister(fileobj)

    def get_key(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        """The key of a registered file. Raises KeyError."""
        return self._known[fileobj]


@dataclass(frozen=True)
class Security:
    """How a connection is protected and who we are. Passwords are never shown."""

    protocol: str = "PLAINTEXT"
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    key_password: str = field(default="", repr=False)
    check_hostname: bool = True
    mechanism: str = ""
    username: str = ""
    password: str = field(default="", repr=False)

    def options(self) -> dict[str, Any]:
        """As kafka-python takes them. Raises `LogUnavailable` for files that cannot be used, by name."""
        found: dict[str, Any] = {"security_protocol": self.protocol}
        if self.protocol.endswith("SSL"):
            found |= {"ssl_context": self.context(), "ssl_check_hostname": self.check_hostname}
        if self.protocol.startswith("SASL"):
            found |= self.sasl()
        return found

    def who(self) -> str:
        """Who we are, in words."""
        if self.protocol.startswith("SASL"):
            return f"the user {self.username}"
        return f"whom {self.cert_file} names" if self.cert_file else "who says no name"

    def sasl(self) -> dict[str, str]:
        """Who we are, as kafka-python takes it."""
        return {"sasl_mechanism": self.mechanism, "sasl_plain_username": self.username, "sasl_plain_password": self.password}

    def context(self) -> ssl.SSLContext:
        """Whom we trust, and our own certificate. Raises `LogUnavailable` for files that cannot be used, by name."""
        context = ssl.create_default_context()
        context.check_hostname = self.check_hostname
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        setting = "kafka.ca_file"
        try:
            if self.ca_file:
                context.load_verify_locations(self.ca_file)
            setting = "kafka.cert_file and kafka.key_file"
            if self.cert_file:
                context.load_cert_chain(self.cert_file, self.key_file or None, lambda: self.key_password)
        except (OSError, ssl.SSLError) as error:
            raise LogUnavailable(f"{setting}: the certificate or key cannot be used ({error.strerror or error})") from error
        return context


@dataclass(frozen=True)
class KafkaOptions:
    """Patience and security of a connection, times in milliseconds.

    ``session_timeout_ms``: a member whose process is gone for longer loses its partitions. ``max_poll_interval_ms``: so does one that does
    not ask for its assignment for longer. ``transaction_timeout_ms``: an open transaction of a writer that is gone is aborted after it, and
    it bounds every wait of a commit. ``request_timeout_ms`` bounds other requests. ``connect_timeout_ms`` is the longest wait for a
    first answer. ``replication`` and ``min_insync`` are those of topics made here; 0 takes the broker's own.
    """

    session_timeout_ms: int = 6_000
    max_poll_interval_ms: int = 60_000
    transaction_timeout_ms: int = 15_000
    request_timeout_ms: int = 10_000
    connect_timeout_ms: int = 10_000
    replication: int = 0
    min_insync: int = 0
    security: Security = field(default_factory=Security)


class Client:
    """Options for the clients of one connection."""

    def __init__(self, servers: list[str], options: KafkaOptions) -> None:
        self.servers = servers
        self.options = options
        self.place = "kafka:" + ",".join(servers)
        self._common: dict[str, Any] = {
            "bootstrap_servers": servers,
            "client_id": "coldstream",
            "request_timeout_ms": options.request_timeout_ms,
            "bootstrap_timeout_ms": options.connect_timeout_ms,
            # A broker that is back is found within a second, not after half a minute.
            "reconnect_backoff_max_ms": 1_000,
            # The client's default of 100 ms between two tries is most of a transaction's time.
            "retry_backoff_ms": 5,
            "selector": Selector,
            **options.security.options(),
        }

    def common(self, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - as the clients take them
        """Options of any client, with ``more`` of its own."""
        return self._common | more

    @contextlib.contextmanager
    def told(self, what: str, right: str, topics: Iterable[str] = ()) -> Iterator[None]:
        """Turn what kafka-python raises in the block into errors of this package.

        ``what`` names what was being done, ``right`` the operation of Kafka's that whoever does it must be allowed, and
        ``topics`` those among which the refused one is, where the error does not say which.
        """
        try:
            yield
        except errors.KafkaError as error:
            found = self.translated(error, what, right, topics)
            if isinstance(found, BrokerUnreachable) and self.options.security.protocol != "PLAINTEXT":
                # kafka-python tells neither a password that is no longer taken nor a certificate that ran out from a broker that is gone.
                with contextlib.suppress(BrokerUnreachable):
                    greet(self.servers, self.options.security)
            raise found from error

    def translated(self, error: errors.KafkaError, what: str, right: str, topics: Iterable[str] = ()) -> LogError:
        """The error of this package that says what ``error`` of kafka-python means; the rest is as `told` takes it."""
        text = f"{what}: {type(error).__name__.removesuffix('Error')}: {error}"
        # A producer that was fenced a moment ago says only that it failed before; the reason stands among what it says.
        if isinstance(error, FENCED) or any(isinstance(cause, FENCED) for cause in error.args):
            return Fenced(text)
        if isinstance(error, errors.MessageSizeTooLargeError | errors.RecordListTooLargeError):
            return RecordTooLarge(text)
        if isinstance(error, errors.UnknownTopicOrPartitionError | errors.UnknownTopicIdError):
            return UnknownTopic(text)
        if isinstance(error, errors.SaslAuthenticationFailedError):
            return AccessRefused(f"{text} ({self.place}); see kafka.username and the password")
        # Some come as plain errors with the real one's name in their text.
        if refused := _REFUSED.search(text):
            return AccessRefused(
                f"{what}: {self.options.security.who()} may not: {_missing(refused[1], error, right, sorted(set(topics)))}; "
                f"docs/security.md lists what each process needs ({self.place})"
            )
        return BrokerUnreachable(f"{text} ({self.place})")


_REFUSED = re.compile(r"(Topic|Group|TransactionalId|Cluster)AuthorizationFailed")


def _missing(kind: str, error: errors.KafkaError, right: str, topics: Sequence[str]) -> str:
    """The right that is missing, by Kafka's names."""
    given = error.args[0] if isinstance(error, errors.AuthorizationError) and error.args else None
    if kind == "Topic":
        if "TxnOffsetCommit" in str(error):
            return "it needs READ of the topics whose offsets it commits"
        if isinstance(given, set | frozenset):
            topics = sorted(given)
        return f"it needs {right} of {'the topic' if len(topics) == 1 else 'each of the topics'} {', '.join(topics) or 'named'}"
    if kind == "Group":
        group = f" {given}" if isinstance(given, str) else ""
        return f"it needs {'READ' if right == 'WRITE' else right} of the group{group}"
    if kind == "TransactionalId":
        return "it needs WRITE of this transactional id"
    return f"it needs {right} of {', '.join(topics) or 'the topic'}"
