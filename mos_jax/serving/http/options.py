"""Limits of the HTTP server."""

from __future__ import annotations

import dataclasses

from mos_jax.adapters.adapter import require_integer
from mos_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
      body_bytes: of a request's body.
      bodies: how many of that size are held at a time, or more smaller ones; requests whose body
        finds no room are answered 503.
      prompt_tokens: of a prompt; 0 is as many as the engine takes.
      output_tokens: of one answer.
      timeout: seconds from a request's acceptance to the end of its answer.
      body_seconds: within which a body must have arrived.
      write_seconds: how long a client may take no byte of an answer before it is given up.
      connections: open ones; while there are more, all but what is open to anybody, such as
        `/health`, is answered 503.
      drain_seconds: how long the server waits for open answers when it is told to end.
    """

    body_bytes: int = 1 << 20
    bodies: int = 64
    prompt_tokens: int = 0
    output_tokens: int = 4096
    timeout: float = 600.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    connections: int = 4096
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Checks the values. Raises InputError."""
        for name, least in (
            ("body_bytes", 1024),
            ("bodies", 1),
            ("prompt_tokens", 0),
            ("output_tokens", 1),
            ("connections", 1),
        ):
            require_integer("server", name, getattr(self, name), least)
        for name in ("timeout", "body_seconds", "write_seconds"):
            if not 0 < getattr(self, name) <= 86400:
                raise InputError(
                    f"server: {name} must be seconds above 0, got {getattr(self, name)!r}"
                )
        if not 0 <= self.drain_seconds <= 86400:
            raise InputError(f"server: drain_seconds must be 0 or more, got {self.drain_seconds!r}")
