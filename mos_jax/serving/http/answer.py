"""One answer on its way: whole or as a stream, until it ends or its client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from mos_jax.serving.http.errors import ApiError, encodable
from mos_jax.serving.http.forms import Form, Gathered, count_usage
from mos_jax.serving.http.running import Running
from mos_jax.serving.requests import Done, Event

# Until the first token, for as long, an answer can still be an error with a status of its own.
FIRST_SECONDS = 10.0
# Proxies end a connection on which nothing moves.
HEARTBEAT_SECONDS = 15.0
_LOG = logging.getLogger(__name__)


class Answer(StreamingResponse):
    """What a route returns: it carries the engine's events to the client.

    A client that goes away, or takes nothing for too long, ends its requests, and their rows are
    free for others.
    """

    def __init__(
        self,
        running: Running,
        form: Form,
        *,
        choices: int,
        n: int,
        stream: bool,
        usage: bool,
    ):
        """An answer of requests that run already.

        Args:
          running: the requests.
          form: of the answer.
          choices: how many requests there are.
          n: of these, for each prompt.
          stream: whether to send pieces as they come.
          usage: whether a stream ends with the counts of tokens.
        """
        super().__init__(iter(()), media_type="text/event-stream" if stream else "application/json")
        self._running, self._form, self._n = running, form, n
        self._choices = [Gathered() for _ in range(choices)]
        self._stream, self._usage = stream, usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; returns when all is sent or the client is gone."""
        answering = self._streamed if self._stream else self._whole
        work = asyncio.create_task(answering(scope, receive, send))
        gone = asyncio.create_task(_wait_for_end(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            scope["state"]["gone"] = not work.done()
            if work.done():
                work.result()
        finally:
            self._running.cancel()
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: JSONResponse | None = None
        async for index, event in self._running.events():
            self._choices[index].add(event)
            if (error := _failure(event)) is not None:
                response = error.response()
                break
        if response is None:
            usage = count_usage(self._choices, self._n)
            response = JSONResponse(self._form.whole(self._choices, usage))
        for name, value in self.headers.items():
            if name not in ("content-type", "content-length"):
                response.headers[name] = value
        await response(scope, receive, send)

    async def _streamed(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = await self._running.next(FIRST_SECONDS)
        error = next((e for _, event in events if (e := _failure(event)) is not None), None)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        self.headers["Cache-Control"] = "no-store"
        self.headers["X-Accel-Buffering"] = "no"  # nginx would hold pieces back
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        openings = [self._form.first(index) for index in range(len(self._choices))]
        await self._write(send, [chunk for chunk in openings if chunk is not None])
        while True:
            chunks, error = self._chunks(events)
            if error is not None:
                await self._write(send, [*chunks, error.body()])
                break
            if chunks or not events:
                await self._write(send, chunks)
            if not self._running.open:
                if self._usage:
                    await self._write(
                        send, [self._form.counts(count_usage(self._choices, self._n))]
                    )
                break
            events = await self._running.next(HEARTBEAT_SECONDS)
        end = b"" if error is not None else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end, "more_body": False})

    def _chunks(
        self, events: Sequence[tuple[int, Event]]
    ) -> tuple[list[dict[str, Any]], ApiError | None]:
        """The chunks of some events, and the error that ends the stream after them."""
        chunks: list[dict[str, Any]] = []
        for index, event in events:
            choice = self._choices[index]
            before = choice.text
            choice.add(event)
            if (error := _failure(event)) is not None:
                return chunks, error
            if isinstance(event, Done):
                chunks.append(self._form.last(index, event))
            elif (chunk := self._form.piece(index, event, before)) is not None:
                chunks.append(chunk)
        return chunks, None

    async def _write(self, send: Send, chunks: Sequence[dict[str, Any]]) -> None:
        """Sends chunks in one write; of none, a comment that keeps the connection alive."""
        text = "".join(f"data: {_dump(chunk)}\n\n" for chunk in chunks) or ": waiting\n\n"
        body = encodable(text).encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _wait_for_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _dump(chunk: dict[str, Any]) -> str:
    return json.dumps(chunk, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _failure(event: Event) -> ApiError | None:
    """The error that an end is, None for one that is an answer."""
    if not isinstance(event, Done) or event.reason in ("stop", "length"):
        return None
    if event.reason == "timeout":
        return ApiError(504, "the answer took longer than the server allows", "timeout")
    if event.reason == "cancelled":
        later = {"Retry-After": "5"}
        return ApiError(503, "the server is going down", "closing", headers=later)
    _LOG.error("a request ended in an error: %s", event.detail or event.error)
    return ApiError(500, event.error or "the engine failed on this request", "engine")
