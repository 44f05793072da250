"""What all open pages see: events, sent to each as they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

#: Events that a page may lag behind before its connection is ended; it comes back and is told all.
MOST_BEHIND = 64
#: Seconds between signs of life on a silent connection.
SILENCE_S = 15.0


class Hub:
    """The pages that listen. Belongs to one event loop."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[str | None]] = set()
        self.closed = False

    def send(self, kind: str, value: Any) -> None:
        """Send an event to every page."""
        text = event(kind, value)
        for queue in tuple(self._queues):
            if queue.qsize() >= MOST_BEHIND:
                self._end(queue)
            else:
                queue.put_nowait(text)

    async def listen(self, greeting: Callable[[], list[tuple[str, Any]]]) -> AsyncIterator[str]:
        """Yield what one page is to be told: the greeting, then events as they come, until one has gone."""
        queue: asyncio.Queue[str | None] = asyncio.Queue()
        self._queues.add(queue)
        try:
            for kind, value in greeting():
                yield event(kind, value)
            while not self.closed:
                try:
                    text = await asyncio.wait_for(queue.get(), SILENCE_S)
                except TimeoutError:
                    text = ":\n\n"
                if text is None:
                    return
                yield text
        finally:
            self._queues.discard(queue)

    def close(self) -> None:
        """End every connection: the server is about to stop."""
        self.closed = True
        for queue in tuple(self._queues):
            self._end(queue)

    def _end(self, queue: asyncio.Queue[str | None]) -> None:
        self._queues.discard(queue)
        queue.put_nowait(None)


def event(kind: str, value: Any) -> str:
    """Return an event as a stream of them has it."""
    return f"event: {kind}\ndata: {json.dumps(value, separators=(',', ':'))}\n\n"
