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
    """Answer that requests are taken, and whether the model has to be loaded for the next one."""
    engine = request.app.state.service.engine
    if engine.draining:
        raise HttpError(503, "the server is shutting down")
    return JSONResponse({"status": "ok", "model": engine.model.state})


async def version(request: Request) -> Response:
    return JSONResponse({"version": request.app.state.service.version})


async def props(request: Request) -> Response:
    service: Service = request.app.state.service
    facts, own = service.engine.model.facts, service.defaults
    gguf, limit = service.layout.gguf, service.options.loading.predict
    settings = {
        "n_ctx": facts.n_ctx,
        "params": {
            "temperature": own.temperature,
            "top_k": own.top_k,
            "top_p": own.top_p,
            "min_p": own.min_p,
            "repeat_penalty": own.repeat_penalty,
            "n_predict": -1 if limit is None else limit,
        },
    }
    return JSONResponse(
        {
            "default_generation_settings": settings,
            "total_slots": 1,
            "model_alias": service.name,
            "model_path": gguf.parts[0].path.name,
            "chat_template": facts.template.text if facts.template else "",
            "bos_token": facts.ends[0],
            "eos_token": facts.ends[1],
            "modalities": {"vision": False, "audio": False},
            "build_info": service.version,
            "hobbit": {
                "mode": facts.plan and facts.plan.mode,
                "quality": facts.quality.name,
                "n_expert_used": service.layout.n_expert_used,
            },
        }
    )


async def slots(request: Request) -> Response:
    service: Service = request.app.state.service
    engine = service.engine
    job = engine.current
    progress = job.progress if job else None
    slot = {
        "id": 0,
        "n_ctx": engine.model.facts.n_ctx,
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
    facts = service.engine.model.facts
    if facts.plan is not None:
        service.say(mode_line(facts.plan, facts.quality))
    return JSONResponse(_plan(service))


def _plan(service: Service) -> dict[str, Any]:
    facts = service.engine.model.facts
    if facts.plan is None:
        raise HttpError(409, "there is no plan yet: the first request loads the model")
    plain = facts.plan.to_dict() | {"quality": facts.quality.label}
    return plain | {
        "words": mode_line(facts.plan, facts.quality),
        "cached_share": facts.plan.cached_share,
        "arena": facts.arena.to_dict() if facts.arena else None,
    }
