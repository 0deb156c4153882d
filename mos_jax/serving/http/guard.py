"""What every request passes before a route sees it, and what every answer gets on its way out."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mos_jax.serving.http.errors import ApiError
from mos_jax.serving.http.keys import Key
from mos_jax.serving.http.service import Service

ACCESS = logging.getLogger("mos_jax.serving.access")
_LOG = logging.getLogger(__name__)

# Neither says anything of tenants.
PUBLIC = ("/", "/health", "/health/live", "/openapi.json")
# All below these is an administrator's.
ADMIN = ("/v1/adapters", "/metrics")
ANYBODY = Key("open", b"", ("*",))
# A client that went away before its answer; nginx made the number known.
GONE = 499
_CLOSE = {"Connection": "close"}
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


class Guard:
    """Keys, hosts, sizes and times of requests; figures and a line in the log for answers.

    It asks for the key before it reads a body, reads none where no route takes one, and names in
    its log the key's name, the route's pattern, and nothing that a client wrote.
    """

    def __init__(self, app: ASGIApp, service: Service):
        """Wraps `app`."""
        self._app, self._service = app, service
        # Bytes of the bodies of all requests that have not ended.
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:  # there are no web sockets
                await send({"type": "websocket.close", "code": 1000})
            return
        start, name, status = time.monotonic(), f"req-{uuid.uuid4().hex[:16]}", 0
        state = scope.setdefault("state", {})
        state["key"], state["gone"], state["held"] = ANYBODY, False, 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = (*_HEADERS, (b"x-request-id", name.encode()))
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            try:
                async with asyncio.timeout(self._service.limits.write_seconds):
                    await send(message)
            except TimeoutError as error:
                raise _Gone from error

        try:
            try:
                state["key"] = self._admit(scope)
                await self._app(scope, await self._with_body(scope, receive), sending)
            except ApiError as error:
                await error.response()(scope, receive, sending)
            except _Gone:
                state["gone"] = True
            except Exception:
                _LOG.exception("%s failed", name)
                if not status:
                    broken = ApiError(500, f"the server failed on this request, {name}", "internal")
                    await broken.response()(scope, receive, sending)
        finally:
            self._held -= state["held"]
            status = GONE if state["gone"] else status
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.answered(route, status)
            ACCESS.info(
                "%s %s %s %d %.3fs key=%s",
                name,
                scope["method"] if scope["method"].isalpha() else "?",
                route,
                status,
                time.monotonic() - start,
                state["key"].name,
            )

    def _admit(self, scope: Scope) -> Key:
        """Who asks. Raises ApiError for nobody, or for one who may not."""
        service, headers = self._service, _headers(scope)
        if service.hosts is not None and _host(headers.get("host", "")) not in service.hosts:
            # A page of the web may have its name point here, and so read what is open.
            raise ApiError(403, "this server is not called by that name", "wrong_host")
        path = scope["path"]
        admin = any(path == place or path.startswith(f"{place}/") for place in ADMIN)
        if path in PUBLIC:
            return ANYBODY
        if service.connections() > service.limits.connections:
            raise _busy("too many connections are open")
        if not len(service.keyring):
            if admin and path != "/metrics":
                raise ApiError(403, "the server was started without an administrator's key")
            return ANYBODY
        kind, _, token = headers.get("authorization", "").partition(" ")
        challenge = {"WWW-Authenticate": "Bearer"}
        if kind.lower() != "bearer" or not token:
            raise ApiError(
                401, "give a key: Authorization: Bearer KEY", "no_key", headers=challenge
            )
        key = service.keyring.find(token.strip())
        if key is None:
            raise ApiError(401, "this key is not known", "invalid_api_key", headers=challenge)
        if admin and not key.admin:
            raise ApiError(403, "this needs an administrator's key", "no_right")
        return key

    async def _with_body(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the whole body, within its size and time; what is received then begins with it.

        Raises:
          ApiError: for a body that is too large, too slow or not JSON, for any where none is
            taken, and where those of other requests leave no room for it.
        """
        limits, headers = self._service.limits, _headers(scope)
        # All routes that take one are asked by POST; what anybody may ask holds no memory.
        most = limits.body_bytes if scope["method"] == "POST" and scope["path"] not in PUBLIC else 0
        too_large = ApiError(
            413, f"the body has more than {most} bytes" if most else "there must be no body",
            "body_too_large", headers=_CLOSE,
        )  # fmt: skip
        announced = headers.get("content-length", "0")
        if not announced.isdecimal() or int(announced[:32]) > most:
            raise too_large
        parts, size, more = [], 0, True
        try:
            async with asyncio.timeout(limits.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise too_large
                    if self._held + len(part) > limits.bodies * limits.body_bytes:
                        raise _busy("too many large bodies are open")
                    self._held += len(part)
                    scope["state"]["held"] += len(part)
                    parts.append(part)
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError(
                408, "the body did not arrive in time", "slow_body", headers=_CLOSE
            ) from error
        if size and headers.get("content-type", "").partition(";")[0].strip().lower() not in (
            "application/json",
        ):
            # A page of the web may send other types to any server without asking it first.
            raise ApiError(415, "the body must be application/json", "not_json")
        body: list[bytes] = [b"".join(parts)]

        async def receiving() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            return await receive()

        return receiving


def _busy(message: str) -> ApiError:
    return ApiError(503, message, "busy", headers={**_CLOSE, "Retry-After": "5"})


class _Gone(Exception):
    """The client went away before its body was there, or takes nothing of the answer."""


def _headers(scope: Scope) -> dict[str, str]:
    return {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
    }


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower()
