"""A small HTTP server for pages of text: threads of its own, few of them, and none for long.

Whoever connects gets a thread, CONNECTIONS_MAX at most, and SECONDS_MAX from connecting to the last
byte. When all are taken, whoever takes longest to ask, or to take the answer, makes room; so a
crowd that connects and says nothing keeps nobody out. A TLS handshake is done by the connection's
thread, not by the one that accepts.
"""

import contextlib
import errno
import gzip
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from prometheus_client.exposition import gzip_accepted

from stoker.agent.metrics.page_access import Users
from stoker.core.addresses import Address
from stoker.core.errors import BadInput, InUse

CONNECTIONS_MAX = 16
SECONDS_MAX = 10.0
# How long a newcomer waits for the room that another one makes.
ROOM_SECONDS = 0.5
# How often connections that take too long are looked for.
_POLL_SECONDS = 0.5
_BACKLOG = 64
_GZIP_LEVEL = 1  # half the time of the usual level for a tenth more bytes
_REALM = 'Basic realm="metrics", charset="UTF-8"'


@dataclass(frozen=True, slots=True)
class Answer:
    """A page as it is sent."""

    content_type: str
    text: str


# Makes a page for a request with this header `Accept`; called in the thread of the request.
Page = Callable[[str], Answer]


class PageServer:
    """Serves pages by their paths until closed."""

    def __init__(
        self,
        address: Address,
        pages: Mapping[str, Page],
        *,
        option: str,
        tls: ssl.SSLContext | None = None,
        users: Users | None = None,
    ) -> None:
        """Listen; raises InUse when the port is taken, BadInput when the address is not ours.

        Both name `option`, where the address was told.
        """
        try:
            self._server = _Server(address, pages, tls, users)
        except OSError as error:
            kind = InUse if error.errno == errno.EADDRINUSE else BadInput
            raise kind(f"{option}: {address}: {error.strerror}") from error
        self.address = Address(address.host, self._server.port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="pages", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; requests under way are left to end."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    since: float
    has_asked: bool = False


class _Server(socketserver.TCPServer):
    allow_reuse_address = True
    request_queue_size = _BACKLOG

    def __init__(
        self,
        address: Address,
        pages: Mapping[str, Page],
        tls: ssl.SSLContext | None,
        users: Users | None,
    ) -> None:
        self.pages = pages
        self.users = users
        self._tls = tls
        self._room = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._connections: list[_Connection] = []
        self._guard = threading.Lock()
        family, _, _, _, place = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self.address_family = family
        super().__init__((str(place[0]), int(place[1])), _Handler)

    @property
    def port(self) -> int:
        """Where it listens."""
        port: int = self.socket.getsockname()[1]
        return port

    def process_request(self, request: object, client_address: object) -> None:
        """Give the connection a thread, or let it go when nobody makes room."""
        assert isinstance(request, socket.socket)
        if not self._room.acquire(blocking=False):
            self._evict()
            if not self._room.acquire(timeout=ROOM_SECONDS):
                self.shutdown_request(request)
                return
        connection = _Connection(request, time.monotonic())
        with self._guard:
            self._connections.append(connection)
        threading.Thread(
            target=self._serve, args=(connection, client_address), name="page", daemon=True
        ).start()

    def service_actions(self) -> None:
        """Cut off those who have had their time."""
        oldest = time.monotonic() - SECONDS_MAX
        with self._guard:
            for each in self._connections:
                if each.since < oldest:
                    _cut(each.socket)

    def has_asked(self, request: socket.socket) -> None:
        """Note that the whole question has come."""
        with self._guard:
            for each in self._connections:
                each.has_asked |= each.socket is request

    def _serve(self, connection: _Connection, client_address: object) -> None:
        try:
            connection.socket.settimeout(SECONDS_MAX)
            if self._tls is not None:
                # Wrapping takes the file descriptor away from the socket: no cutting meanwhile.
                with self._guard:
                    connection.socket = self._tls.wrap_socket(
                        connection.socket, server_side=True, do_handshake_on_connect=False
                    )
                connection.socket.do_handshake()
            self.finish_request(connection.socket, client_address)
        except OSError:
            pass  # it went away, was too slow, or spoke no TLS: nothing that we could mend
        finally:
            with self._guard:
                self._connections.remove(connection)
            self.shutdown_request(connection.socket)
            self._room.release()

    def _evict(self) -> None:
        """Cut off who takes longest to ask, or if all have asked, to take the answer."""
        with self._guard:
            asking = [each for each in self._connections if not each.has_asked]
            for each in (asking or self._connections)[:1]:  # they are in the order of arrival
                _cut(each.socket)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; HTTP/1.0, so that a scraper between two scrapes keeps no thread."""

    server_version = "stoker"
    sys_version = ""

    def do_GET(self) -> None:
        """Send the page."""
        server = self.server
        assert isinstance(server, _Server)
        server.has_asked(self.request)
        users = server.users
        if users is not None and not users.admit(self.headers["Authorization"]):
            self._send(HTTPStatus.UNAUTHORIZED, _plain("a user and a password are needed\n"))
            return
        pages = server.pages
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(HTTPStatus.OK, _plain(f"pages for Prometheus: {', '.join(pages)}\n"))
        elif (page := pages.get(path)) is not None:
            self._send(HTTPStatus.OK, page(self.headers["Accept"] or ""))
        else:
            self._send(HTTPStatus.NOT_FOUND, _plain(f"no such page; there is {', '.join(pages)}\n"))

    def do_HEAD(self) -> None:
        """Send what a GET would send, without the page."""
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base's name)
        """Log nothing: scrapes come all the time."""

    def _send(self, status: HTTPStatus, answer: Answer) -> None:
        body = answer.text.encode()
        self.send_response(status)
        if status is HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", _REALM)
        self.send_header("Content-Type", answer.content_type)
        if gzip_accepted(self.headers["Accept-Encoding"] or ""):
            body = gzip.compress(body, _GZIP_LEVEL)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _plain(text: str) -> Answer:
    return Answer("text/plain; charset=utf-8", text)


def _cut(connection: socket.socket) -> None:
    """End a connection that another thread reads from or writes to."""
    with contextlib.suppress(OSError):  # it is gone already
        # Not SSLSocket's own: that one takes the session from under the other thread.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
