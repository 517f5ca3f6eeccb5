"""The routes of the service."""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from leanvit._version import __version__
from leanvit.serve import infer, metrics
from leanvit.serve.models import summary
from leanvit.serve.openapi import (
    CLOSED,
    FACTS,
    IMAGE_BODY,
    INFERENCE,
    LIVE,
    METADATA,
    MODEL_READY,
    MODELS,
    OPEN,
    PREDICTION,
    READY,
    SERVER,
    TENSOR_BODY,
    UNKNOWN,
    WORK,
    described,
    not_ready,
    returns,
    without_validation,
)
from leanvit.serve.predict import predict
from leanvit.serve.refusals import Gone, Refusal
from leanvit.serve.service import Service
from leanvit.serve.surround import CLIENT_LEFT, INTERNAL, refusal_response

PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

PAGE_TYPES = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "mjs": "text/javascript; charset=utf-8", "svg": "image/svg+xml", "png": "image/png", "ico": "image/x-icon",
    "woff2": "font/woff2",
}  # fmt: skip

PREDICT = "/v1/models/{name}:predict"
PREDICT_PATH = re.compile(r"/v1/models/([^/]+):predict")

PAGE_NAME = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.([a-z0-9]+)")


class App(FastAPI):
    """FastAPI, with the document as it is here."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        return without_validation(super().openapi())


def json_response(values: Any, code: int = 200) -> Response:
    """A response of JSON values."""
    return Response(json.dumps(values, allow_nan=False), code, media_type="application/json")


def create_app(service: Service) -> FastAPI:
    """The application, without what surrounds it (leanvit.serve.surround)."""
    app = App(
        title="leanvit", version=__version__, docs_url=None, redoc_url=None, openapi_url="/openapi.json",
        redirect_slashes=False,
    )  # fmt: skip
    add_errors(app, service)
    add_page(app)
    add_models(app, service)
    add_protocol(app, service)

    @app.get("/metrics", responses=CLOSED, response_class=PlainTextResponse)
    async def numbers() -> Response:
        """Prometheus metrics."""
        return Response(service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    return app


def with_shortcut(app: FastAPI, service: Service) -> ASGIApp:
    """The application, but images go straight to `predict`: FastAPI's layers, which describe that route and do nothing
    else for it, take as long as a small network. Raises Refusal and Gone for what surrounds it."""
    route = next(route for route in app.routes if getattr(route, "path", "") == PREDICT)

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        found = PREDICT_PATH.fullmatch(scope["path"]) if scope["method"] == "POST" else None
        if found is None:
            await app(scope, receive, send)
            return
        scope.update(route=route, path_params={"name": found[1]})
        response = await predict(service, Request(scope, receive), found[1])
        await response(scope, receive, send)

    return call


def add_errors(app: FastAPI, service: Service) -> None:
    """Every error is {"error": sentence}."""

    async def refused(request: Request, error: Exception) -> Response:
        refusal = error if isinstance(error, Refusal) else INTERNAL
        service.metrics.refused.labels(refusal.reason or str(refusal.code)).inc()
        return await refusal_response(refusal, request.receive)

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)

    async def of_http(request: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 400
        sentences = {404: "no such path; GET /openapi.json lists them", 405: "another method is expected here"}
        response = json_response({"error": sentences.get(code, "malformed request")}, code)
        # The methods that are taken, of a 405.
        response.headers.update(getattr(error, "headers", None) or {})
        return response

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(Gone, gone)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_http)


def add_page(app: FastAPI) -> None:
    """The page at / and its files."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return page_file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return page_file(name)


def page_file(name: str) -> Response:
    """A file of the folder `page` in this room, or one that both pages share. Raises Refusal for any other."""
    found = PAGE_NAME.fullmatch(name)
    kind = PAGE_TYPES.get(found[1]) if found else None
    # What the page shares with that of `leanvit web` is there once.
    rooms = (resources.files("leanvit.serve") / "page", resources.files("leanvit.web") / "static")
    path = next((room / name for room in rooms if kind and (room / name).is_file()), None)
    if path is None:
        raise Refusal(404, "no such file of the page")
    headers = {"Content-Security-Policy": PAGE_POLICY, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
    return Response(path.read_bytes(), headers=headers, media_type=kind)


def add_models(app: FastAPI, service: Service) -> None:
    """The models, what each is, and predictions on images."""

    @app.get("/v1/models", responses=CLOSED | returns(MODELS))
    async def models() -> Response:
        """The models that are served."""
        return json_response({"models": [summary(model.name, model.predictor) for model in service.models]})

    @app.get("/v1/models/{name}", responses=UNKNOWN | returns(FACTS))
    async def facts(name: str) -> Response:
        """What a model is and what its bundle proves."""
        return json_response(service.model(name).facts)

    drawn = returns(PREDICTION, "image/png") | described(e406="The task draws no picture")

    @app.post(PREDICT, responses=WORK | drawn, openapi_extra=IMAGE_BODY)
    async def prediction(name: str, request: Request) -> Response:
        """What the network finds in one image."""
        return await predict(service, request, name)


def add_protocol(app: FastAPI, service: Service) -> None:
    """The Open Inference Protocol v2."""

    @app.get("/v2", responses=CLOSED | returns(SERVER))
    async def server() -> Response:
        """The server."""
        return json_response(infer.server_metadata())

    @app.get("/v2/health/live", responses=OPEN | returns(LIVE))
    async def live() -> Response:
        """Whether the process answers."""
        return json_response({"live": True})

    @app.get("/v2/health/ready", responses=OPEN | returns(READY) | not_ready(READY))
    async def ready() -> Response:
        """Whether requests should be sent here: every model is loaded and checked, and the server is not ending."""
        return json_response({"ready": not service.draining}, 503 if service.draining else 200)

    async def model(name: str) -> Response:
        """The tensors of a model."""
        return json_response(infer.model_metadata(service.model(name)))

    async def model_ready(name: str) -> Response:
        """Whether a model is ready."""
        found = service.model(name)
        return json_response({"name": found.name, "ready": not service.draining}, 503 if service.draining else 200)

    async def inference(name: str, request: Request) -> Response:
        """Outputs of the network for encoded images or prepared pixels."""
        return await infer.infer(service, request, name)

    for prefix in ("/v2/models/{name}", f"/v2/models/{{name}}/versions/{infer.VERSION}"):
        app.get(prefix, responses=UNKNOWN | returns(METADATA))(model)
        ready_or_not = UNKNOWN | returns(MODEL_READY) | not_ready(MODEL_READY)
        app.get(f"{prefix}/ready", responses=ready_or_not)(model_ready)
        binary = returns(INFERENCE, "application/octet-stream")
        app.post(f"{prefix}/infer", responses=WORK | binary, openapi_extra=TENSOR_BODY)(inference)
