"""A TCP proxy before a broker: it cuts connections, leaves them half open, and loses answers and requests of one kind."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

END_TXN = 26
TXN_OFFSET_COMMIT = 28
"""The API key of the request that commits or aborts a transaction."""

CONNECT_SECONDS = 5.0


class Connection:
    """A client's connection and the proxy's own to the broker. A direction that is mute stays so, and what comes in it is thrown away."""

    def __init__(self, client: socket.socket, broker: socket.socket) -> None:
        self.client, self.broker = client, broker
        self.requests_mute = self.answers_mute = False

    def mute(self, *, requests: bool, answers: bool) -> None:
        """Pass nothing more in these directions."""
        self.requests_mute |= requests
        self.answers_mute |= answers

    def shut(self) -> None:
        """End both, which wakes whoever reads from them; what is under way in them is lost, and the peers are told by a reset."""
        for sock in (self.client, self.broker):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Listens on a port of its own, ``listen`` or, for 0, any that is free, and passes everything on to ``port``.

    ``lose_answers`` and ``lose_requests`` name API keys: from such a request on, its connection passes on nothing more in that direction,
    but stays open, as behind a firewall that forgot it.
    """

    def __init__(self, listen: int, port: int) -> None:
        self.port = port
        self.lose_answers: set[int] = set()
        self.lose_requests: set[int] = set()
        self.lost = 0
        self._server = socket.create_server(("127.0.0.1", listen))
        self.listens: int = self._server.getsockname()[1]
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self._mute_new = self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connections(self) -> int:
        """How many connections there are, mute ones among them."""
        return len(self._connections)

    def cut(self) -> int:
        """End every connection at once; returns how many there were."""
        with self._lock:
            found = list(self._connections)
        for connection in found:
            connection.shut()
        return len(found)

    def half_open(self, *, requests: bool = True, answers: bool = True) -> int:
        """Leave every connection open, but pass on nothing more in these directions, for good; returns how many there are.

        Until `mend`, new connections are taken and are mute both ways.
        """
        with self._lock:
            self._mute_new = True
            for connection in self._connections:
                connection.mute(requests=requests, answers=answers)
            return len(self._connections)

    def mend(self) -> None:
        """Let connections that are made from now on work again. Those that are mute know nothing of it."""
        with self._lock:
            self._mute_new = False

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._server.accept()
            except OSError:
                continue
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                broker = socket.create_connection(("127.0.0.1", self.port), CONNECT_SECONDS)
            except OSError:
                return
            with broker:
                broker.settimeout(None)
                connection = Connection(client, broker)
                with self._lock:
                    connection.mute(requests=self._mute_new, answers=self._mute_new)
                    self._connections.add(connection)
                answers = threading.Thread(target=self._answers, args=(connection,), daemon=True)
                answers.start()
                self._requests(connection)
                answers.join()
                with self._lock:
                    self._connections.discard(connection)

    def _requests(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            while (head := _exactly(connection.client, 4)) and (body := _exactly(connection.client, struct.unpack(">i", head)[0])):
                (key,) = struct.unpack(">h", body[:2])
                if key in self.lose_answers or key in self.lose_requests:
                    self.lost += 1
                    connection.mute(requests=key in self.lose_requests, answers=True)
                if not connection.requests_mute:
                    connection.broker.sendall(head + body)
        # The end of a connection does not get through either where nothing does.
        if not connection.requests_mute:
            connection.shut()

    def _answers(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            while data := connection.broker.recv(65_536):
                if not connection.answers_mute:
                    connection.client.sendall(data)
        if not connection.answers_mute:
            connection.shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more, and end every connection. Closing twice does nothing."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            return b""
        data += part
    return bytes(data)
