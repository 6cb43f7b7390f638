"""What can be asked about the server: answered by the event loop, whatever the model does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import UsageError
from ..render import mode_line
from . import sse
from .errors import HttpError
from .service import Service, body_of

_FEED_INTERVAL_S = 1.0


async def health(request: Request) -> Response:
    if request.app.state.service.engine.draining:
        raise HttpError(503, "the server is shutting down")
    return JSONResponse({"status": "ok"})


async def version(request: Request) -> Response:
    return JSONResponse({"version": request.app.state.service.version})


async def props(request: Request) -> Response:
    service: Service = request.app.state.service
    llm, own = service.engine.llm, service.defaults
    settings = {
        "n_ctx": llm.n_ctx(),
        "params": {
            "temperature": own.temperature,
            "top_k": own.top_k,
            "top_p": own.top_p,
            "min_p": own.min_p,
            "repeat_penalty": own.repeat_penalty,
            "n_predict": -1 if service.options.predict is None else service.options.predict,
        },
    }
    return JSONResponse(
        {
            "default_generation_settings": settings,
            "total_slots": 1,
            "model_alias": service.name,
            "model_path": llm.layout.gguf.parts[0].path.name,
            "chat_template": service.template.source if service.template else "",
            "bos_token": llm.metadata.get("tokenizer.ggml.bos_token_id", ""),
            "eos_token": llm.metadata.get("tokenizer.ggml.eos_token_id", ""),
            "modalities": {"vision": False, "audio": False},
            "build_info": service.version,
            "hobbit": {"mode": llm.plan.mode, "quality": llm.quality.name},
        }
    )


async def slots(request: Request) -> Response:
    service: Service = request.app.state.service
    engine = service.engine
    job, llm = engine.current, engine.llm
    progress = job.progress if job else None
    slot = {
        "id": 0,
        "n_ctx": llm.n_ctx(),
        "is_processing": job is not None,
        "prompt": {"done": progress.done, "total": progress.total} if progress else None,
        "next_token": {"n_decoded": job.n_generated if job else 0},
    }
    return JSONResponse([slot])


async def stats(request: Request) -> Response:
    return JSONResponse(request.app.state.service.stats())


async def plan(request: Request) -> Response:
    return JSONResponse(_plan(request.app.state.service))


async def events(request: Request) -> Response:
    """Feed the stats, once a second, until the client or the server goes."""
    service: Service = request.app.state.service

    async def feed() -> AsyncIterator[bytes]:
        while not service.engine.draining:
            yield sse.event(service.stats())
            await asyncio.sleep(_FEED_INTERVAL_S)

    return StreamingResponse(feed(), headers=sse.HEADERS, media_type=sse.MEDIA_TYPE)


async def memory(request: Request) -> Response:
    """Change the cap: {"bytes": 8589934592} or {"memory": "8G"}."""
    service: Service = request.app.state.service
    body = await body_of(request)
    wanted = body.get("bytes", body.get("memory"))
    if isinstance(wanted, bool) or not isinstance(wanted, int | str):
        raise UsageError('say {"bytes": 8589934592} or {"memory": "8G"}')
    await run_in_threadpool(service.engine.set_memory, wanted)
    service.say(mode_line(service.engine.llm.plan, service.engine.llm.quality))
    return JSONResponse(_plan(service))


def _plan(service: Service) -> dict[str, Any]:
    llm = service.engine.llm
    plain = llm.plan.to_dict() | {"quality": llm.quality.label}
    return plain | {
        "words": mode_line(llm.plan, llm.quality),
        "cached_share": llm.plan.cached_share,
    }
