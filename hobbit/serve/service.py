"""What the endpoints share: the engine, the model's facts, the settings."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..generate import Sampling
from .chat import ChatTemplate
from .engine import Engine
from .errors import HttpError
from .exchange import Exchange
from .generation import Generation
from .options import ServeOptions

if TYPE_CHECKING:
    from starlette.requests import Request

    from ..quality import Quality

MAX_PROMPTS = 256


@dataclass(frozen=True)
class Service:
    """One served model. `defaults` is the sampling where a request says nothing; `qualities` makes
    a quality of its name, within the server's budget, or raises UsageError. `ends` are the
    texts of the tokens that begin and end a text.
    """

    engine: Engine
    options: ServeOptions
    name: str
    defaults: Sampling
    template: ChatTemplate | None
    ends: tuple[str, str]
    qualities: Callable[[str], Quality | None]
    version: str
    say: Callable[[str], None]
    created: int = field(default_factory=lambda: int(time.time()))

    def exchange(self, wanted: Generation, request: Request, user: object) -> Exchange:
        """Let a generation wait for its turn, which it takes among the client's others."""
        options = self.options
        return Exchange(
            self.engine, wanted, client_of(request, user), options.sse_ping, options.timeout
        )

    def chat_template(self) -> ChatTemplate:
        if self.template is None:
            raise HttpError(400, "this model has no chat template: use /v1/completions")
        return self.template

    def stats(self) -> dict[str, Any]:
        """Return all counters as plain data, as /hobbit/stats and its feed tell them."""
        engine, llm = self.engine, self.engine.llm
        current, last = engine.current, engine.totals.last
        progress = current.progress if current else None
        prefill = progress is not None and progress.done < progress.total
        state = "idle" if current is None else "prompt" if prefill else "answer"
        totals = engine.totals
        return {
            "schema": "hobbit.stats/1",
            "time": time.time(),
            "state": state,
            "model": self.name,
            "quality": llm.quality.name,
            "mode": llm.plan.mode,
            "queue": {"waiting": engine.waiting, "limit": self.options.queue},
            "draining": engine.draining,
            "prompt": {"done": progress.done, "total": progress.total} if progress else None,
            "generating": current.n_generated if current else 0,
            "requests": {
                "answered": totals.requests,
                "failed": totals.failed,
                "abandoned": totals.abandoned,
                "refused": totals.refused,
            },
            "last_tok_s": rate(last.n_generated - 1, last.decode_s) if last else None,
            "uptime_s": time.time() - totals.started_at,
            "majflt": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
            "stats": llm.stats.to_dict(),
        }


def rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def client_of(request: Request, user: object) -> str:
    """Tell clients apart: by address, API key, and the user that an OpenAI request may name."""
    host = request.client.host if request.client else ""
    key = hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()
    return f"{host} {key} {user if isinstance(user, str) else ''}"


async def body_of(request: Request) -> dict[str, Any]:
    """Return the request's JSON object."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise HttpError(400, "the request's body is not JSON") from None
    if not isinstance(body, dict):
        raise HttpError(400, "the request's body must be a JSON object")
    return body
