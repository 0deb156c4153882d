"""A server's life: it listens, warms up, answers, and on a signal answers what is open and ends."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import uvicorn

from mos_jax.errors import InputError
from mos_jax.serving.engine import Engine
from mos_jax.serving.http.app import create_app
from mos_jax.serving.http.service import Service

T = TypeVar("T")
_LOG = logging.getLogger("mos_jax.serving")
# After all answers have ended, for their last bytes.
_FLUSH_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address; port 0 is any that is free.

    Raises:
      InputError: if it cannot.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port must be from 0 to 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host} port {port}: {error}") from error
    listening.setblocking(False)
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Server(uvicorn.Server):
    """Serves an engine until it is told to end.

    The first SIGTERM or SIGINT drains: new requests are answered 503, and those that are open have
    `Limits.drain_seconds` to end. A second one ends them at once.
    """

    def __init__(self, service: Service, engine: Engine, listening: socket.socket):
        """For an engine that is not started yet; `listening` is closed at the end."""
        self.service, self.engine = service, engine
        config = uvicorn.Config(
            create_app(service),
            http="h11",
            loop="asyncio",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        super().__init__(config)
        # `Guard` bounds them: uvicorn would answer in plain text, and no figure would count it.
        service.connections = lambda: len(self.server_state.connections)
        self._listening = listening
        self._told = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: asyncio.Event | None = None
        self._quiet: dict[Any, float] = {}

    @property
    def address(self) -> tuple[str, int]:
        """Host and port it listens on."""
        host, port, *_ = self._listening.getsockname()
        return host, port

    def run_until_told(self, ready: Callable[[], None] | None = None) -> bool:
        """Serves until a signal or `stop`; in the main thread, or any other one.

        Args:
          ready: called when requests are taken.

        Returns:
          Whether all that was accepted has been answered.

        Raises:
          Exception: what the engine raised when it was started.
        """
        return asyncio.run(self._live(ready))

    def stop(self) -> None:
        """As a signal, from any thread: drains, and the second time ends at once."""
        self._told += 1
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        _LOG.warning("%s: %s", signal.Signals(sig).name, "ending" if self._told else "draining")
        self.stop()

    async def on_tick(self, counter: int) -> bool:
        """Once a second, drops connections on which nothing goes on but that take up a place.

        They have sent half of a request, or take nothing of an answer that was given up.
        """
        if counter % 10 == 0:
            now, limits = time.monotonic(), self.service.limits
            quiet: dict[Any, float] = {}
            connections: set[Any] = self.server_state.connections  # type: ignore[assignment]
            for connection in connections:
                cycle = connection.cycle
                idle = cycle is None or cycle.response_complete
                if idle or connection.transport.is_closing():
                    quiet[connection] = self._quiet.get(connection, now)
                    most = limits.body_seconds if idle else limits.write_seconds
                    if now - quiet[connection] > most:
                        connection.transport.abort()
            self._quiet = quiet
        return await super().on_tick(counter)

    def _wake(self) -> None:
        assert self._end is not None
        self._end.set()

    async def _live(self, ready: Callable[[], None] | None) -> bool:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        if self._told:
            self._wake()
        serving = asyncio.create_task(self.serve(sockets=[self._listening]))
        starting = asyncio.create_task(_in_thread(self.engine.start))
        told = asyncio.create_task(self._end.wait())
        try:
            await asyncio.wait({starting, told, serving}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():  # told to end, and nothing can be open yet
                return True
            await starting
            self.service.state = "ready"
            if ready is not None:
                ready()
            await asyncio.wait({told, serving}, return_when=asyncio.FIRST_COMPLETED)
            return await self._drain()
        finally:
            if starting.done():
                self.service.state = "draining"
                await _in_thread(self.engine.close)
            self.should_exit = True
            await serving
            told.cancel()
            starting.cancel()

    async def _drain(self) -> bool:
        """Waits for what is open, until it is told a second time."""
        self.service.state = "draining"
        limit = time.monotonic() + self.service.limits.drain_seconds
        done = False
        while not done and time.monotonic() < limit and self._told < 2:
            done = await _in_thread(lambda: self.engine.drain(0.2))
        return done


async def _in_thread(call: Callable[[], T]) -> T:
    """Awaits a call in a thread that does not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_it(value)

    def work() -> None:
        try:
            outcome: tuple[Callable[[Any], None], Any] = future.set_result, call()
        except BaseException as error:
            outcome = future.set_exception, error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=work, daemon=True).start()
    return await future


def tell_operator(line: str) -> None:
    """A line on standard error; where that cannot be written, as on a full disk, it is lost."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Lines of the server and its answers go to standard error, each with its time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("mos_jax.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
    logging.getLogger("mos_jax.serving").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
