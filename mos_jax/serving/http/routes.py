"""The routes: thin, since `Service` knows how and `Guard` has seen who."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from mos_jax.errors import InputError
from mos_jax.serving.http.errors import ApiError, no_model
from mos_jax.serving.http.page import PAGE_HEADERS, read_page
from mos_jax.serving.http.schemas import AdapterBody, ChatBody, CompletionBody
from mos_jax.serving.http.service import Service
from mos_jax.serving.kinds import check_tenant_name

# How long it is worth waiting for a tenant's last requests.
_UNLOAD_SECONDS = 2.0
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_FIGURES: dict[int | str, dict[str, Any]] = {
    200: {"description": "Figures.", "content": {"text/plain": {"schema": {"type": "string"}}}}
}
_ERROR = {
    "description": "An error, in the form of OpenAI's API.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}


def _answers(*errors: int, ok: int = 200, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """What a route answers, for the OpenAPI document."""
    content = {"application/json": {"schema": {"type": "object"}}} | (_STREAM if stream else {})
    found: dict[int | str, dict[str, Any]] = {
        ok: {"description": "As asked for.", "content": content}
    }
    return found | dict.fromkeys((401, 403, *errors), _ERROR)


def build_routes(service: Service) -> APIRouter:
    """All routes of a server."""
    router = APIRouter()
    inference = _answers(400, 404, 408, 413, 415, 429, 500, 503, 504, stream=True)
    page = read_page()

    @router.post("/v1/chat/completions", responses=inference, response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Continues a conversation, with the tenant that `model` names."""
        tenant = service.tenant_of(request.state.key, body.model)
        # Long texts take their time, and nobody else should wait for it.
        prompt = await run_in_threadpool(service.chat_prompt, body)
        return service.answer_chat(tenant, body, prompt)

    @router.post("/v1/completions", responses=inference, response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continues texts, with the tenant that `model` names."""
        tenant = service.tenant_of(request.state.key, body.model)
        prompts = await run_in_threadpool(service.completion_prompts, body)
        return service.answer_completion(tenant, body, prompts)

    @router.get("/v1/models", responses=_answers())
    def models(request: Request) -> JSONResponse:
        """The models that the key may use."""
        listed = [_model(service, name) for name in service.models(request.state.key)]
        return JSONResponse({"object": "list", "data": listed})

    @router.get("/v1/models/{model}", responses=_answers(400, 404))
    def model(model: str, request: Request) -> JSONResponse:
        """One model."""
        service.tenant_of(request.state.key, model)
        return JSONResponse(_model(service, model))

    @router.get("/v1/adapters", responses=_answers())
    def adapters() -> JSONResponse:
        """All tenants, and whether they are on the device. Needs an administrator's key."""
        bank = service.engine.bank
        listed = []
        for name in bank.names:
            try:
                listed.append({"name": name, "resident": bank.is_resident(name)})
            except InputError:  # removed meanwhile
                continue
        return JSONResponse({"object": "list", "data": listed})

    @router.post(
        "/v1/adapters", responses=_answers(400, 408, 409, 413, 415, 503, ok=201), status_code=201
    )
    def load(body: AdapterBody) -> JSONResponse:
        """Makes a tenant of the adapter in a folder. Needs an administrator's key."""
        service.check_ready()
        with_name = _checked_name(body.name)
        if with_name == service.base_id or with_name in service.engine.bank:
            raise ApiError(409, f"there is a model {with_name!r} already", "exists", "name")
        folder = service.folder_in_roots(body.folder or with_name)
        try:
            service.engine.load(with_name, folder)
        except InputError as error:
            raise ApiError(400, str(error), "invalid_adapter", "folder") from error
        return JSONResponse({"name": with_name, "object": "adapter"}, 201)

    @router.delete("/v1/adapters/{name}", responses=_answers(400, 404) | {202: {}})
    def unload(name: Annotated[str, Path()]) -> JSONResponse:
        """Forgets a tenant; its folder stays. Needs an administrator's key.

        202 where its requests have yet to end; no new ones are taken from now on.
        """
        if _checked_name(name) not in service.engine.bank:
            raise no_model(name)
        try:
            gone = service.engine.unload(name, _UNLOAD_SECONDS)
        except InputError as error:  # removed meanwhile
            raise no_model(name) from error
        found = {"name": name, "object": "adapter", "deleted": gone}
        return JSONResponse(found, 200 if gone else 202)

    @router.get("/health", responses={200: {}, 503: {}})
    def health() -> JSONResponse:
        """Whether it takes requests: "ready", else 503 with "starting", "draining" or "failed"."""
        state = service.health
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @router.get("/health/live", responses={200: {}, 503: {}})
    def live() -> JSONResponse:
        """Whether it should be left running: 503 where the engine has failed."""
        failed = service.health == "failed"
        return JSONResponse({"status": "failed" if failed else "live"}, 503 if failed else 200)

    @router.get("/load", responses=_answers())
    def load_figures(request: Request) -> JSONResponse:
        """How busy the server is; for an administrator, all that the engine says of itself."""
        return JSONResponse(service.load_figures(request.state.key))

    @router.get("/metrics", responses=_answers() | _FIGURES, response_class=PlainTextResponse)
    def metrics() -> Response:
        """Figures in Prometheus' text format. Needs an administrator's key, if there are keys."""
        return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/", include_in_schema=False)
    def show() -> HTMLResponse:
        """A page that shows models and load, and compares the base with a tenant."""
        return HTMLResponse(page, headers=PAGE_HEADERS)

    return router


def _model(service: Service, name: str) -> dict[str, Any]:
    base = service.base_id
    return {
        "id": name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "mos_jax",
        "parent": None if name == base else base,
    }


def _checked_name(name: str) -> str:
    try:
        check_tenant_name(name)
    except InputError as error:
        raise ApiError(400, str(error), "invalid_name", "name") from error
    return name
