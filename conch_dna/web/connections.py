"""Connections that keep a client waiting for nothing: time for a request's head, and their number.

Knows sockets and uvicorn; nothing of addresses, bodies or jobs. Another bound on what a client does
before its request is known: an event of `GuardedProtocol`.
"""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conch_dna.errors import ConchError, one_line
from conch_dna.web.door import ListenSettings

if TYPE_CHECKING:
    import uvicorn

# For connections that stay open when all answers are sent.
_CLOSING_S = 2
# Connections beside those that wait for an answer: between two requests, or sending one.
_SPARE_CONNECTIONS = 256

# Parts of one body; each takes the thread of all connections some 15 us, so 10,000 take 0.15 s.
MOST_PIECES = 10_000
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)


def guarded_protocol(*, head_timeout_s: float, most: int) -> type:
    """HTTP/1.1 as uvicorn speaks it, with bounds.

    Args:
        head_timeout_s: Longest time from the first byte of a request, or from the connection's
            beginning, to the end of the request's head. It also bounds what is still sent of a
            body after its request was answered.
        most: Most connections that are open at once; further ones are told to come back.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class GuardedProtocol(H11Protocol):
        head_timer: Any = None

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            connection: Any = self.conn
            connection.next_event = self.counted(connection.next_event)

        @staticmethod
        def counted(next_event: Callable[[], Any]) -> Callable[[], Any]:
            pieces = 0

            def counting() -> Any:
                nonlocal pieces
                event = next_event()
                pieces = pieces + 1 if type(event) is h11.Data else 0
                if pieces > MOST_PIECES:
                    raise h11.RemoteProtocolError("the body comes in too many pieces")
                return event

            return counting

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.write(_BUSY)
                transport.close()
                return
            self.head_timer = self.loop.call_later(head_timeout_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_timer()
            elif self.head_timer is None and not self.transport.is_closing():
                self.head_timer = self.loop.call_later(head_timeout_s, self.transport.abort)

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            super().connection_lost(exc)

        def stop_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return GuardedProtocol


def listening(settings: ListenSettings) -> tuple[socket.socket, str]:
    """A socket that listens, and the base URL by which clients reach it.

    Raises:
        ConchError: The address is taken or not this machine's.
    """
    host, port = settings.host.strip("[]"), settings.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise ConchError(
            f"cannot listen at {host}, port {port} ({one_line(error)}): name another by --port"
        ) from error
    host, port = found.getsockname()[:2]
    return found, f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def guarded_server(app: Any, settings: ListenSettings) -> "uvicorn.Server":
    """What serves an ASGI application through sockets, with these bounds."""
    import uvicorn

    config = uvicorn.Config(
        app,
        http=guarded_protocol(
            head_timeout_s=settings.head_timeout_s, most=settings.max_queue + _SPARE_CONNECTIONS
        ),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_CLOSING_S,
    )
    return uvicorn.Server(config)
