"""Serve an application until it is told to end: pages are let go first, then the run is stopped."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from .hub import Hub


class Server(uvicorn.Server):
    """A server whose open streams end as soon as it is told to; `ready` is called once it can be told."""

    def __init__(self, app: ASGIApp, hub: Hub, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=200,
                timeout_graceful_shutdown=10,
            )
        )
        self._hub, self._ready = hub, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so: from here on Ctrl-C ends the server in order."""
        await super().startup(sockets)
        if not self.should_exit:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, then the server; the application's lifespan stops the run."""
        self._hub.close()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):  # what a browser opened in the last moment
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()
        await asyncio.sleep(0)


def serve(app: ASGIApp, hub: Hub, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve on a socket that listens, until Ctrl-C or SIGTERM; `ready` is called once it answers."""
    Server(app, hub, ready).run(sockets=[listener])
