"""Errors in the form of OpenAI's API."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse

from mos_jax.errors import one_line
from mos_jax.serving.http.schemas import FIELDS, NEUTRAL, UNSUPPORTED
from mos_jax.serving.requests import Refused

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer other than what was asked for.

    Attributes:
      status: of HTTP.
      message: one line for whoever asked.
      code: for programs.
      param: the field of the request that is to blame.
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message = status, encodable(one_line(message))
        self.code, self.param, self.headers = code, param, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _KINDS.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which no answer could hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def of_refused(refused: Refused, model: str, wait: float) -> ApiError:
    """What a request that the engine did not take is answered.

    Args:
      refused: by the engine.
      model: as it was asked for.
      wait: seconds after which to try again.
    """
    later = {"Retry-After": str(max(1, round(wait)))}
    if refused.code == "unknown_tenant":
        return no_model(model)
    if refused.code == "too_long":
        return ApiError(400, str(refused), "context_length_exceeded", "messages")
    if refused.code == "queue_full":
        return ApiError(429, str(refused), "queue_full", headers=later)
    if refused.code == "closing":
        return ApiError(503, "the server is going down", "closing", headers=later)
    return ApiError(503, str(refused), refused.code, headers=later)


def no_model(model: str) -> ApiError:
    """For a model that does not exist; names no other."""
    return ApiError(404, f"the model {model!r} does not exist", "model_not_found", "model")


def no_right(model: str) -> ApiError:
    """For a model that the key has no right to, whether it exists or not."""
    return ApiError(403, f"this key may not use the model {model!r}", "no_right", "model")


def of_invalid(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """For a request of the wrong form: its first problem, as pydantic lists them."""
    problem = problems[0]
    where = [part for part in problem["loc"] if part not in ("body", "path", "query")]
    # Of a value that may have several forms, each is listed with its name; the field is before it.
    path = ".".join(str(part) for part in where if isinstance(part, int) or part in FIELDS)
    name = str(where[-1])[:64] if where else ""
    if problem["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", "invalid_json")
    if problem["type"] == "missing":
        return ApiError(400, f"{name or 'the body'} is missing", "missing", name or None)
    if problem["type"] == "extra_forbidden":
        if name in UNSUPPORTED:
            return ApiError(400, f"{name!r} is not supported", "unsupported", name)
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return ApiError(400, f"there is no field {name!r}{hint}", "unknown_field", name)
    known = next((str(part) for part in where if part in NEUTRAL), None)
    if known is not None:
        return ApiError(400, f"{known}: {NEUTRAL[known]} is not supported", "unsupported", known)
    message = f"{path or 'the body'}: {problem['msg']}"
    return ApiError(400, message, "invalid_value", path or None)
