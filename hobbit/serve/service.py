"""What the endpoints share: the engine, the model's facts, the settings."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ..generate import Sampling
from ..llama import resident_bytes
from ..template import ChatTemplate
from .engine import Engine
from .errors import HttpError
from .exchange import Exchange
from .generation import Generation
from .options import ServeOptions

if TYPE_CHECKING:
    from starlette.requests import Request

    from ..layout import Layout
    from ..llama import Llama
    from ..quality import Quality

P = ParamSpec("P")
T = TypeVar("T")

MAX_PROMPTS = 256

_HALVES = re.compile("[\ud800-\udfff]")

# Requests that are read at a time; where the model has to be loaded first they wait for it here.
_READERS = 8


@dataclass(frozen=True)
class Service:
    """One served model. `defaults` is the sampling where a request says nothing; `qualities` makes
    a quality of its name, within the server's budget, or raises UsageError. `say` is for lines that
    a person reads, `failed` for an error that is nobody's fault but ours.
    """

    engine: Engine
    options: ServeOptions
    layout: Layout
    name: str
    defaults: Sampling
    qualities: Callable[[str], Quality | None]
    version: str
    say: Callable[..., None]
    failed: Callable[[BaseException], None]
    created: int = field(default_factory=lambda: int(time.time()))
    _readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_READERS, "hobbit-reader")
    )

    def exchange(self, wanted: Generation, request: Request, user: object) -> Exchange:
        """Let a generation wait for its turn, which it takes among the client's others."""
        options = self.options
        return Exchange(
            self.engine, wanted, client_of(request, user), options.sse_ping, options.timeout
        )

    async def with_model(
        self,
        call: Callable[Concatenate[Service, Llama, P], T],
        *arguments: P.args,
        **named: P.kwargs,
    ) -> T:
        """Call with the model, in a thread; it is loaded first where it is not."""

        def borrowed() -> T:
            with self.engine.model.borrowed() as llm:
                return call(self, llm, *arguments, **named)

        return await asyncio.get_running_loop().run_in_executor(self._readers, borrowed)

    def chat_template(self) -> ChatTemplate:
        """Return the template; one that can be rendered while the model is borrowed."""
        template = self.engine.model.facts.template
        if template is None:
            raise HttpError(400, "this model has no chat template: use /v1/completions")
        return template

    def check_name(self, body: dict[str, Any]) -> None:
        """With --strict-model a request may name no other model."""
        name = body.get("model")
        if self.options.strict_model and name not in (None, "", self.name):
            raise HttpError(404, f"there is no model {name!r} here, but {self.name!r}")

    def stats(self) -> dict[str, Any]:
        """Return all counters as plain data, as /hobbit/stats and its feed tell them."""
        engine, model = self.engine, self.engine.model
        facts, totals = model.facts, engine.totals
        current, last = engine.current, totals.last
        progress = current.progress if current else None
        layers = model.look_ups
        return {
            "schema": "hobbit.stats/1",
            "time": time.time(),
            "pid": os.getpid(),
            "state": self._state(),
            "model": self.name,
            "loaded": model.state,
            "quality": facts.quality.name,
            "mode": facts.plan.mode if facts.plan else None,
            "queue": {"waiting": engine.waiting, "limit": self.options.queue},
            "draining": engine.draining,
            "prompt": {"done": progress.done, "total": progress.total} if progress else None,
            "generating": current.n_generated if current else 0,
            "context": {"used": model.n_tokens, "size": facts.n_ctx},
            "requests": {
                "answered": totals.requests,
                "failed": totals.failed,
                "abandoned": totals.abandoned,
                "refused": totals.refused,
            },
            "last_tok_s": rate(last.n_generated - 1, last.decode_s) if last else None,
            "uptime_s": time.time() - totals.started_at,
            "resident_bytes": resident_bytes(),
            "majflt": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
            "device": model.facts.arena.to_dict() if model.facts.arena else None,
            "stats": model.stats.to_dict(),
            "layers": {
                "layer": [each.layer for each in layers],
                "hits": [each.hits for each in layers],
                "misses": [each.misses for each in layers],
            },
        }

    def _state(self) -> str:
        """What the model does."""
        current, loaded = self.engine.current, self.engine.model.state
        if loaded != "loaded":
            return loaded
        if current is None:
            return "idle"
        progress = current.progress
        return "prompt" if progress and progress.done < progress.total else "answer"


def rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def client_of(request: Request, user: object) -> str:
    """Tell clients apart: by address, API key, and the user that an OpenAI request may name."""
    host = request.client.host if request.client else ""
    key = hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
    return f"{host} {key} {user if isinstance(user, str) else ''}"


def _whole(value: Any) -> Any:
    """Return JSON without halves of characters, which some clients cut: they cannot be encoded."""
    if isinstance(value, str):
        return _HALVES.sub("\ufffd", value)
    if isinstance(value, list):
        return [_whole(each) for each in value]
    if isinstance(value, dict):
        return {_whole(name): _whole(each) for name, each in value.items()}
    return value


async def body_of(request: Request) -> dict[str, Any]:
    """Return the request's JSON object."""
    data = await request.body()
    try:
        body = json.loads(data.decode("utf-8-sig"))
        if b"\\ud" in data or b"\\uD" in data:
            body = _whole(body)
    except (ValueError, RecursionError):
        raise HttpError(400, "the request's body is not JSON") from None
    if not isinstance(body, dict):
        raise HttpError(400, "the request's body must be a JSON object")
    return body
