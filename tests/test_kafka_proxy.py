"""The proxy that chaos cuts connections with, before a server that answers each request with itself."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.kafka_proxy import Proxy

SILENCE = 0.2


class _Echo(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while head := self.rfile.read(4):
            body = self.rfile.read(struct.unpack(">i", head)[0])
            self.server.heard.append(body[2:])  # type: ignore[attr-defined]
            self.wfile.write(head + body)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Echo)
        self.heard: list[bytes] = []


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(server: _Server) -> Iterator[Proxy]:
    with Proxy(0, server.server_address[1]) as proxy:
        yield proxy


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.listens), 5)


def ask(connection: socket.socket, text: bytes, key: int = 0, seconds: float = 5.0) -> bytes | None:
    """The server's answer; None where nothing comes."""
    connection.settimeout(seconds)
    connection.sendall(struct.pack(">ih", 2 + len(text), key) + text)
    try:
        return connection.recv(100)[6:]
    except TimeoutError:
        return None


def test_all_passes_both_ways(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as two:
        assert (ask(one, b"a"), ask(two, b"b"), ask(one, b"c")) == (b"a", b"b", b"c")
        assert proxy.connections == 2


def test_a_cut_ends_every_connection_and_new_ones_work(proxy: Proxy) -> None:
    with connect(proxy) as one, connect(proxy) as two:
        assert ask(one, b"a") == ask(two, b"a") == b"a"
        assert proxy.cut() == 2
        for connection in (one, two):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    with connect(proxy) as later:
        assert ask(later, b"later") == b"later"


@pytest.mark.parametrize(("requests", "answers"), [(True, True), (True, False), (False, True)])
def test_half_open_connections_stay_and_pass_nothing_for_good(proxy: Proxy, server: _Server, *, requests: bool, answers: bool) -> None:
    with connect(proxy) as before:
        assert ask(before, b"before") == b"before"
        assert proxy.half_open(requests=requests, answers=answers) == 1
        with connect(proxy) as meanwhile:
            assert ask(before, b"lost", seconds=SILENCE) is None
            assert ask(meanwhile, b"mute", seconds=SILENCE) is None
            proxy.mend()
            with connect(proxy) as later:
                assert ask(later, b"later") == b"later"
            assert ask(before, b"still", seconds=SILENCE) is None, "who was forgotten stays so"
            assert ask(meanwhile, b"still", seconds=SILENCE) is None
    heard = [b"before", b"later"] if requests else [b"before", b"lost", b"later", b"still"]
    assert server.heard == heard


def test_answers_of_one_kind_are_lost_and_whatever_follows_them(proxy: Proxy, server: _Server) -> None:
    proxy.lose_answers.add(26)
    with connect(proxy) as one:
        assert ask(one, b"a", key=3) == b"a"
        assert ask(one, b"b", key=26, seconds=SILENCE) is None
        assert ask(one, b"c", key=3, seconds=SILENCE) is None
    assert server.heard == [b"a", b"b", b"c"]
    assert proxy.lost == 1


def test_where_no_broker_is_the_connection_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        free = held.getsockname()[1]
    with Proxy(0, free) as proxy, connect(proxy) as one, contextlib.suppress(ConnectionResetError):
        assert one.recv(1) == b""
