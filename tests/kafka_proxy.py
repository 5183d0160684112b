"""A TCP proxy before a broker, which can lose answers and requests of one kind."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

END_TXN = 26
"""The API key of the request that commits or aborts a transaction."""


class Proxy:
    """Listens on a port of its own and passes everything on to ``port``.

    ``lose_answers`` and ``lose_requests`` name API keys: from such a request on, its connection passes on nothing more in that direction,
    but stays open, as behind a firewall that forgot it.
    """

    def __init__(self, listen: int, port: int) -> None:
        self.port = port
        self.lose_answers: set[int] = set()
        self.lose_requests: set[int] = set()
        self.lost = 0
        self._server = socket.create_server(("127.0.0.1", listen))
        self._sockets: list[socket.socket] = [self._server]
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._server.accept()
                broker = socket.create_connection(("127.0.0.1", self.port))
            except OSError:
                continue
            self._sockets += [client, broker]
            mute = threading.Event()
            threading.Thread(target=self._requests, args=(client, broker, mute), daemon=True).start()
            threading.Thread(target=self._answers, args=(broker, client, mute), daemon=True).start()

    def _requests(self, client: socket.socket, broker: socket.socket, mute: threading.Event) -> None:
        deaf = False
        with contextlib.suppress(OSError):
            while (head := _exactly(client, 4)) and (body := _exactly(client, struct.unpack(">i", head)[0])):
                (key,) = struct.unpack(">h", body[:2])
                if key in self.lose_answers or key in self.lose_requests:
                    self.lost += 1
                    mute.set()
                    deaf = deaf or key in self.lose_requests
                if not deaf:
                    broker.sendall(head + body)
        _end(client, broker)

    def _answers(self, broker: socket.socket, client: socket.socket, mute: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := broker.recv(65_536):
                if not mute.is_set():
                    client.sendall(data)
        _end(client, broker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed = True
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            return b""
        data += part
    return data


def _end(*sockets: socket.socket) -> None:
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
