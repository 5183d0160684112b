"""Why a broker will not have us, found out before kafka-python tries: it repeats what cannot succeed, and then says that it took too long.

One connection that does what every later one begins with: TLS, who we are, a first request. It is spoken by hand, since only so each
answer is heard. Its requests are those of every Apache Kafka since 1.0.
"""

from __future__ import annotations

import socket
import ssl
import struct
from typing import TYPE_CHECKING

from kafka import errors
from kafka.net.sasl import get_sasl_mechanism

from streaming.errors import AccessRefused, BrokerUnreachable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streaming.kafka.client import Security

SECONDS = 3.0
"""Longest wait for one answer of one broker."""

LARGEST_ANSWER = 1 << 24
METADATA, SASL_HANDSHAKE, API_VERSIONS, SASL_AUTHENTICATE = (3, 1), (17, 1), (18, 0), (36, 0)
"""Requests, by key and version."""

EXPIRED, NOT_YET, WRONG_NAME = 10, 9, (62, 64)
"""What OpenSSL calls X509_V_ERR_CERT_HAS_EXPIRED and so on."""


class _Closed(ConnectionError):
    """The broker ended the connection, or what it speaks is not Kafka's protocol: it expected something else."""


def greet(servers: Sequence[str], security: Security, seconds: float = SECONDS) -> None:
    """Return once one of ``servers`` (HOST:PORT) takes us as who we say we are.

    Raises `AccessRefused` if one says that it never will, naming the setting at fault, and `BrokerUnreachable` if none answers.
    """
    troubles = []
    for server in servers:
        host, _, port = server.strip().rpartition(":")
        place = host.strip("[]"), int(port)
        try:
            try:
                with socket.create_connection(place, seconds) as plain:
                    _greet(plain, place[0], security)
            except (_Closed, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                _explain(place, security, seconds)
                raise
        except AccessRefused as error:
            raise AccessRefused(f"kafka:{server}: {error}") from error
        except OSError as error:
            troubles.append(f"{server}: {error.strerror or error}")
        else:
            return
    raise BrokerUnreachable(f"no broker answers ({'; '.join(troubles)})")


def _greet(plain: socket.socket, host: str, security: Security) -> None:
    if not security.protocol.endswith("SSL"):
        _introduce(plain, security)
        return
    try:
        with security.context().wrap_socket(plain, server_hostname=host) as protected:
            # With TLS 1.3, what the broker thinks of our certificate comes in place of its first answer.
            _introduce(protected, security)
    except ssl.SSLCertVerificationError as error:
        raise AccessRefused(_distrusted(error, host, security)) from error
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
        raise
    except ssl.SSLError as error:
        what = (error.reason or str(error)).replace("_", " ").lower()
        if "wrong version number" in what:
            raise _Closed(what) from error
        ours = "kafka.cert_file and kafka.key_file" if "certificate" in what else f"kafka.protocol = {security.protocol}"
        raise AccessRefused(f"TLS failed ({what}); see {ours}") from error


def _distrusted(error: ssl.SSLCertVerificationError, host: str, security: Security) -> str:
    why = error.verify_message
    if error.verify_code in WRONG_NAME:
        return (
            f"the broker's certificate does not name the host {host} ({why}): name the host in broker as the certificate does; "
            "kafka.check_hostname = false would trust any host with a certificate of the same authority"
        )
    if error.verify_code in (EXPIRED, NOT_YET):
        return f"the broker's certificate, or one of its authorities', is not valid now ({why}): it must be renewed, or this clock is wrong"
    has = f"kafka.ca_file = {security.ca_file} does not have it" if security.ca_file else "kafka.ca_file must name a file that has it"
    return f"the broker's certificate is of an authority that is not trusted ({why}): {has}"


def _introduce(connection: socket.socket, security: Security) -> None:
    if security.protocol.startswith("SASL"):
        _authenticate(connection, security)
    # Of no topics. A broker that wants something else first ends the connection here.
    _ask(connection, METADATA, struct.pack(">i", 0))


def _authenticate(connection: socket.socket, security: Security) -> None:
    name = security.mechanism.encode()
    answer = _ask(connection, SASL_HANDSHAKE, struct.pack(">h", len(name)) + name)
    (code,) = struct.unpack_from(">h", answer)
    if code == errors.UnsupportedSaslMechanismError.errno:
        known = ", ".join(_texts(answer[2:]))
        raise AccessRefused(f"kafka.mechanism = {security.mechanism}: the broker takes {known or 'none'} here")
    if code:
        raise AccessRefused(f"kafka.protocol = {security.protocol}: the broker takes no SASL here ({errors.for_code(code).__name__})")
    mechanism = get_sasl_mechanism(security.mechanism)(**security.sasl(), security_protocol="SASL_SSL")
    while not mechanism.is_done():
        token = mechanism.auth_bytes()
        answer = _ask(connection, SASL_AUTHENTICATE, struct.pack(">i", len(token)) + token)
        code, length = struct.unpack_from(">hh", answer)
        if code:
            said = answer[4 : 4 + max(0, length)].decode(errors="replace")
            raise AccessRefused(
                f"the broker does not take us as the user {security.username} by {security.mechanism} ({said}): see kafka.username and "
                "the password (kafka.password_file or COLDSTREAM_KAFKA_PASSWORD)"
            )
        try:
            mechanism.receive(answer[4 + max(0, length) + 4 :])
        except (ValueError, KeyError, errors.KafkaError) as error:
            raise AccessRefused(f"the broker could not prove that it knows the password of {security.username}") from error


def _ask(connection: socket.socket, request: tuple[int, int], body: bytes) -> bytes:
    """The body of the answer to a request."""
    name = b"coldstream"
    frame = struct.pack(">hhih", *request, 1, len(name)) + name + body
    connection.sendall(struct.pack(">i", len(frame)) + frame)
    (size,) = struct.unpack(">I", _receive(connection, 4))
    if not 4 <= size <= LARGEST_ANSWER:
        raise _Closed("it answers with something that is not of Kafka")
    return _receive(connection, size)[4:]


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise _Closed("it closes the connection at our first requests")
        received += part
    return received


def _texts(answer: bytes) -> list[str]:
    (count,), place, found = struct.unpack_from(">i", answer), 4, []
    for _ in range(count):
        (length,) = struct.unpack_from(">h", answer, place)
        found.append(answer[place + 2 : place + 2 + length].decode(errors="replace"))
        place += 2 + length
    return found


def _explain(place: tuple[str, int], security: Security, seconds: float) -> None:
    """Raise `AccessRefused` where the broker speaks another protocol than ours, which shows by what it does answer.

    It answers the question for its versions before it knows who asks, so a connection that it ends after that wants SASL.
    """
    tls = security.protocol.endswith("SSL")
    here = f"kafka.protocol = {security.protocol}"
    if _answers(place, seconds, tls=not tls):
        raise AccessRefused(f"{here}: the broker speaks {'without' if tls else 'only with'} TLS here")
    if not security.protocol.startswith("SASL") and _answers(place, seconds, tls=tls):
        raise AccessRefused(f"{here}: the broker wants to know who we are, so SASL_{'SSL' if tls else 'PLAINTEXT'} must be meant")


def _answers(place: tuple[str, int], seconds: float, *, tls: bool) -> bool:
    """Whether a question that anybody may ask is answered. Nothing of ours is told, so that whom we speak to does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with socket.create_connection(place, seconds) as plain:
            if not tls:
                _ask(plain, API_VERSIONS, b"")
                return True
            with context.wrap_socket(plain, server_hostname=place[0]) as protected:
                _ask(protected, API_VERSIONS, b"")
                return True
    except ssl.SSLError as error:
        # Only who speaks TLS asks for a certificate.
        return tls and "certificate" in (error.reason or "").lower()
    except OSError:
        return False
