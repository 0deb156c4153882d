"""The application: routes behind their guard, and every error in one form."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from mos_jax.serving.http.errors import ApiError, of_invalid
from mos_jax.serving.http.guard import PUBLIC, Guard
from mos_jax.serving.http.routes import build_routes
from mos_jax.serving.http.service import Service


def create_app(service: Service) -> ASGIApp:
    """The server as an ASGI application."""
    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="mos_jax", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(build_routes(service))
    app.add_exception_handler(ApiError, _of_api)
    app.add_exception_handler(RequestValidationError, _of_validation)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(Exception, _of_defect)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return Guard(app, service)


async def _of_api(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def _of_validation(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return of_invalid(error.errors()).response()


async def _of_http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    words = {404: "there is no such route", 405: "the route has no such method"}
    message = words.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()


async def _of_defect(_: Request, error: Exception) -> JSONResponse:
    # `Guard`, which the error reaches next, logs it.
    return ApiError(500, "the server failed on this request", "internal").response()


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: what FastAPI gathers, with keys, and without its form of errors."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version="1", routes=app.routes)
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)
                if path not in PUBLIC:
                    operation["security"] = [{"key": []}]
        for unused in ("HTTPValidationError", "ValidationError"):
            found["components"].get("schemas", {}).pop(unused, None)
        app.openapi_schema = found
    return app.openapi_schema
