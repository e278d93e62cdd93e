"""The server on a socket: it listens first, so that a taken port is known before a model is opened."""

from __future__ import annotations

import errno
import signal
import socket
import threading
import time
from collections.abc import Callable

import uvicorn

from ..engines.errors import UsageError
from .door.guard import Guard
from .door.heads import TimedHeads
from .server import Server

GRACE_S = 30.0  # for jobs that are there when the server is asked to end
_CLOSING_S = 5  # for connections after that: uvicorn would wait for streams for ever
_HURRIED_S = 2.0  # after a second signal: answers are on their way, whatever a step still takes
_CONNECTIONS = 512  # more are answered 503 while there is still a file descriptor to say so
_HEAD_BYTES = 16 * 2**10  # of a request
_TRIED = 100  # ports after a taken one


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the port is taken, or there is no such address here.
    """
    try:
        return _bound(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = next((other for other in range(port + 1, port + _TRIED) if _is_free(host, other)), 0)
            raise UsageError(
                f"port {port} is taken", expected="a free one", fix=f"Use another: --port {free}"
            ) from error
        raise UsageError(
            f"{host}:{port} cannot be listened on: {error.strerror}",
            expected="an address of this machine and a port that its user may take",
            fix="Use another: --host 127.0.0.1",
        ) from error


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio switches Nagle's algorithm off where the protocol is named; with it, answers wait 40 ms
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(2048)
    except BaseException:
        made.close()
        raise
    return made


def _is_free(host: str, port: int) -> bool:
    try:
        _bound(host, port).close()
    except OSError:
        return False
    return True


def serve(
    server: Server,
    app: Guard,
    listening: socket.socket,
    *,
    ready: Callable[[], None],
    grace_s: float = GRACE_S,
) -> None:
    """Answer until SIGTERM or SIGINT, and then as long as there are jobs, but not longer than the grace.

    A second signal cancels the jobs: who waits for one is told so. The server has been started.

    Args:
        server: what draws.
        app: its application.
        listening: as `listen` returns it; it is closed.
        ready: called when requests are answered.
        grace_s: what `Server.end` gives jobs.
    """
    _Uvicorn(settings(app), server, ready, grace_s).run(sockets=[listening])


def settings(app: Guard, closing_s: int = _CLOSING_S) -> uvicorn.Config:
    """uvicorn's settings: everything that it would leave open has a bound.

    Args:
        app: the application.
        closing_s: for connections at the end.
    """
    return uvicorn.Config(
        app,
        http=TimedHeads,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing here asks for a client's address
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_graceful_shutdown=closing_s,
    )


class _Uvicorn(uvicorn.Server):
    """uvicorn, whose first signal lets jobs end before connections are closed."""

    def __init__(
        self, config: uvicorn.Config, server: Server, ready: Callable[[], None], grace_s: float
    ) -> None:
        super().__init__(config)
        self._server, self._ready, self._grace_s = server, ready, grace_s
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: object) -> None:
        """What a signal does: first jobs end, then connections; a second one makes it short."""
        known = sig in (signal.SIGINT, signal.SIGTERM)
        steps = (self._end, self._hurry) if known else ()
        if self._signals >= len(steps):
            self.force_exit = self.should_exit = True
            return
        threading.Thread(target=steps[self._signals], name="latentrt end", daemon=True).start()
        self._signals += 1

    def _end(self) -> None:
        self._server.end(self._grace_s)
        self.should_exit = True

    def _hurry(self) -> None:
        self._server.jobs.cancel_all("shutdown")  # `_end` then has nothing to wait for but a step
        time.sleep(_HURRIED_S)
        self.force_exit = self.should_exit = True
