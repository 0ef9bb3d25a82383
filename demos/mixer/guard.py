"""What stands before the page: requests too large to read, and ways in that the page does not use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MAX_BODY_BYTES = 30 * 10**6  # a picture of 20 MB as base64, and a little

# Gradio serves these whether or not a page uses them, and most write files for whoever asks.
CLOSED = (
    "/gradio_api/upload",
    "/gradio_api/deep_link",
    "/gradio_api/process_recording",
    "/gradio_api/proxy=",
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

__all__ = ["CLOSED", "MAX_BODY_BYTES", "Guard"]


class _TooLargeError(Exception):
    """A body that has grown past the limit while it was read."""


class Guard:
    """ASGI middleware that refuses large bodies, before they are in memory, and closed paths.

    Args:
        app: What it stands before.
        max_body_bytes: Largest body of a request; larger ones are answered with 413.
        closed: Beginnings of paths that are answered with 404.
    """

    def __init__(
        self, app: Any, max_body_bytes: int = MAX_BODY_BYTES, closed: tuple[str, ...] = CLOSED
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.closed = closed

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"].removeprefix(scope.get("root_path", "")).startswith(self.closed):
            await _answer(send, 404, "There is nothing here.")
            return
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        if any(not value.isdigit() or int(value) > self.max_body_bytes for value in lengths):
            await self._refuse(send)
            return
        read, begun = 0, False

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_body_bytes:
                raise _TooLargeError
            return message

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, watched)
        except _TooLargeError:
            if begun:
                raise
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        await _answer(send, 413, f"A request may be {self.max_body_bytes // 10**6} MB at most.")


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
