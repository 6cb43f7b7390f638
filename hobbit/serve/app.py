"""The application: which path is answered by what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from ..errors import HobbitError
from . import info, native, openai
from .errors import HttpError, as_http
from .guard import Guard, Rules
from .metrics import CONTENT_TYPE, Metrics
from .service import Service

STATIC = Path(__file__).parent / "static"

# The page loads nothing from elsewhere, runs no inline script, and is shown in no frame.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def make_app(service: Service, rules: Rules, metrics: Metrics | None) -> Starlette:
    """Put the endpoints together; without `metrics` there is no /metrics."""
    routes: list[BaseRoute] = [*_ROUTES]
    if metrics is not None:
        routes.append(Route("/metrics", _scrape(metrics)))
    if not service.options.no_ui:
        routes += [Route("/", _page), Mount("/ui", _Static(directory=STATIC))]
    middleware = [Middleware(Guard, rules=rules)]
    if rules.origins:
        cors = Middleware(
            CORSMiddleware,
            allow_origins=[*rules.origins],
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
        middleware.insert(0, cors)
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={
            HttpError: _failed,
            HobbitError: _failed,
            HTTPException: _not_found,
            Exception: _failed,
        },
    )
    app.state.service = service
    return app


_ROUTES = (
    Route("/v1/chat/completions", openai.chat_completions, methods=["POST"]),
    Route("/v1/completions", openai.completions, methods=["POST"]),
    Route("/v1/embeddings", openai.embeddings, methods=["POST"]),
    Route("/v1/models", openai.models),
    Route("/v1/models/{id:path}", openai.model),
    Route("/completion", native.completion, methods=["POST"]),
    Route("/tokenize", native.tokenize, methods=["POST"]),
    Route("/detokenize", native.detokenize, methods=["POST"]),
    Route("/tokenizer_info", native.tokenizer_info),
    Route("/apply-template", native.apply_template, methods=["POST"]),
    Route("/health", info.health),
    Route("/v1/health", info.health),
    Route("/version", info.version),
    Route("/props", info.props),
    Route("/slots", info.slots),
    Route("/hobbit/stats", info.stats),
    Route("/hobbit/events", info.events),
    Route("/hobbit/plan", info.plan),
    Route("/hobbit/memory", info.memory, methods=["POST"]),
)


class _Static(StaticFiles):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: dict[str, object]) -> None:
            if message["type"] == "http.response.start":
                own = [(k.lower().encode(), v.encode()) for k, v in PAGE_HEADERS.items()]
                message["headers"] = [*message["headers"], *own]  # type: ignore[misc]
            await send(message)

        await super().__call__(scope, receive, with_headers)  # type: ignore[arg-type]


async def _page(request: Request) -> Response:
    return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)


def _scrape(metrics: Metrics) -> Callable[[Request], Awaitable[Response]]:
    async def scrape(request: Request) -> Response:
        return Response(metrics.text(request.app.state.service), media_type=CONTENT_TYPE)

    return scrape


async def _failed(request: Request, error: Exception) -> Response:
    told = as_http(error)
    if isinstance(error, HobbitError) and told.status == 500:  # of others uvicorn tells
        request.app.state.service.failed(error)
    return JSONResponse(told.body(), told.status, told.headers)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = f"there is no {request.url.path}" if error.status_code == 404 else error.detail
    told = HttpError(error.status_code, words)
    return JSONResponse(told.body(), told.status, error.headers)
