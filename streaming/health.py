"""The HTTP endpoint of a process: /metrics for Prometheus, /healthz and /readyz for whoever runs it.

/healthz says whether the process can still make progress; where it cannot, it is to be restarted. /readyz says whether it is of use
now. Both answer 200 or 503 with every condition by name, so that nobody has to guess which one failed.
"""

from __future__ import annotations

import errno
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder

from streaming.errors import EndpointError

if TYPE_CHECKING:
    from types import TracebackType

    from prometheus_client import CollectorRegistry

MAX_CONNECTIONS = 16
REQUEST_SECONDS = 5.0
"""How long a client may take to send its request or to take the answer."""


class Condition(NamedTuple):
    """One condition: whether it holds, and in words how it stands."""

    ok: bool
    detail: str


class Health:
    """What a process knows of its own state. The main loop reports, the endpoint reads.

    ``stall`` is how many seconds may pass between two heartbeats: longer than any single step, restore included, which therefore beats
    while it runs. ``commit_age`` is how many seconds may pass without a commit while records wait.
    """

    def __init__(self, stall: float = 60.0, commit_age: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.stall = stall
        self.commit_age = commit_age
        self._clock = clock
        self._beat = clock()
        self._fatal: str | None = None
        self._assigned: int | None = None
        self._restored = False
        self._restoring = "being restored"
        self._version: int | None = None
        self._waiting = 0
        self._progress = clock()

    def beat(self) -> None:
        """The main loop lives; call it at every turn, and while a long restore goes on."""
        self._beat = self._clock()

    def fail(self, reason: str) -> None:
        """The process cannot go on, for the stated reason. There is no way back but a restart."""
        self._fatal = reason

    def assigned(self, partitions: int | None) -> None:
        """An assignment of so many partitions is held (0 for a stand-by); None: none is. State must be restored anew after a change."""
        self._assigned = partitions

    def restored(self, done: bool = True, detail: str = "being restored") -> None:  # noqa: FBT001, FBT002 - reads as a sentence
        """The state of all partitions assigned is here, or is not any more; ``detail`` says how far it is."""
        self._restored = done
        self._restoring = detail

    def loaded(self, version: int) -> None:
        """A model version is loaded."""
        self._version = version

    def committed(self) -> None:
        """A step was committed."""
        self._progress = self._clock()

    def waiting(self, records: int) -> None:
        """So many records wait to be consumed. Time counts against the commits only from when there was something to do."""
        if self._waiting == 0:
            self._progress = self._clock()
        self._waiting = records

    def live(self) -> dict[str, Condition]:
        """The conditions of /healthz."""
        age = self._clock() - self._beat
        return {
            "main_loop": Condition(age <= self.stall, f"last heartbeat {age:.1f} s ago, at most {self.stall:g} s allowed"),
            "no_fatal_error": Condition(self._fatal is None, self._fatal or "none"),
        }

    def ready(self) -> dict[str, Condition]:
        """The conditions of /readyz, those of /healthz among them."""
        age = self._clock() - self._progress
        idle = self._waiting == 0
        progress = (
            "nothing to do" if idle else f"{self._waiting} records wait, last commit {age:.1f} s ago, at most {self.commit_age:g} s allowed"
        )
        held = "none" if self._assigned is None else f"{self._assigned} partitions"
        return {
            **self.live(),
            "assignment": Condition(self._assigned is not None, held),
            "state": Condition(self._restored, "restored" if self._restored else self._restoring),
            "model": Condition(self._version is not None, "not loaded" if self._version is None else f"version {self._version}"),
            "progress": Condition(idle or age <= self.commit_age, progress),
        }


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_SECONDS
    server: _Server
    server_version = "coldstream"
    sys_version = ""

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        self.close_connection = True
        if self.command in ("GET", "HEAD"):
            return True
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        match urlsplit(self.path).path:
            case "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))
                self._answer(HTTPStatus.OK, encode(self.server.registry), kind)
            case "/healthz":
                self._conditions(self.server.health.live())
            case "/readyz":
                self._conditions(self.server.health.ready())
            case _:
                self._answer(HTTPStatus.NOT_FOUND, b"There are /metrics, /healthz and /readyz.\n", "text/plain; charset=utf-8")

    do_HEAD = do_GET  # noqa: N815 - the base's naming

    def _conditions(self, conditions: dict[str, Condition]) -> None:
        ok = all(condition.ok for condition in conditions.values())
        body = {"ok": ok, "conditions": {name: condition._asdict() for name, condition in conditions.items()}}
        status = HTTPStatus.OK if ok else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, json.dumps(body, indent=2).encode() + b"\n", "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's own name
        """A scrape every few seconds is no news."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # Two processes on one port would answer by turns; newer Pythons allow it by default.
    allow_reuse_port = False

    def __init__(self, address: tuple[str, int], registry: CollectorRegistry, health: Health) -> None:
        self.registry = registry
        self.health = health
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # Not HTTPServer's own, which asks DNS for the name of the address and may wait long for it.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:  # noqa: ANN401 - the base's
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class Endpoint:
    """Serves `Health` and a registry of metrics over HTTP until it is closed.

    ``port`` 0 takes any free port; ``self.port`` is the one that was got. Raises `EndpointError` if the address cannot be had.
    """

    def __init__(self, registry: CollectorRegistry, health: Health, host: str = "127.0.0.1", port: int = 9464) -> None:
        try:
            self._server = _Server((host, port), registry, health)
        except OSError as error:
            of_port = port and error.errno in (errno.EADDRINUSE, errno.EACCES)
            hint = "set metrics.port to a free one, or to 0 for any" if of_port else "set metrics.host to an address of this machine"
            raise EndpointError(f"metrics.port = {port}, metrics.host = {host}: cannot listen there ({error.strerror}); {hint}") from error
        self.host = host
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="endpoint", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it is served, such as ``http://127.0.0.1:9464``."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def close(self) -> None:
        """Stop serving. Closing twice does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
