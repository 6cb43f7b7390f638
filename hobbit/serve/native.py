"""llama-server's own endpoints: completion, tokens, templates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import UsageError
from ..template import ends_of
from . import replies, sse
from .chat import Tools, chat_prompt, grammar_of, tools_of
from .exchange import Waiting, whole
from .generation import Finished, Generation, Progress, Token
from .requests import checked_tokens, flag, generation, limit_of, prompts_of
from .service import Service, body_of
from .stream import Stream

if TYPE_CHECKING:
    from ..llama import Llama

Body = dict[str, Any]


async def completion(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await body_of(request)
    service.check_name(body)
    streams = flag(body, "stream")
    wanted = await service.with_model(_completion, body)
    exchange = service.exchange(wanted, request, body.get("user"))
    if streams:
        return Stream(
            exchange,
            _completion_stream(service, exchange.events(), exchange.waiting),
            service.failed,
        )
    events = await whole(exchange, request.receive)
    text = "".join(event.text for event in events if isinstance(event, Token))
    done = next(event for event in events if isinstance(event, Finished))
    return JSONResponse(_last(service, done) | {"content": text})


async def tokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await body_of(request)
    return JSONResponse(await service.with_model(_tokenize, body))


async def detokenize(request: Request) -> Response:
    service: Service = request.app.state.service
    tokens = (await body_of(request)).get("tokens")
    if not isinstance(tokens, list):
        raise UsageError("tokens must be a list of tokens")
    plain = await service.with_model(_detokenize, tokens)
    return JSONResponse({"content": plain, "prompt": plain})  # vLLM's name, which lm-eval reads


async def tokenizer_info(request: Request) -> Response:
    """Answer as vLLM does, so that lm-eval needs no tokenizer of its own."""
    service: Service = request.app.state.service
    bos, eos = await service.with_model(lambda _, llm: ends_of(llm))
    template = service.engine.model.facts.template
    return JSONResponse(
        {
            "tokenizer_class": "hobbit",
            "bos_token": bos or None,
            "eos_token": eos or None,
            "pad_token": None,
            "chat_template": template.text if template else None,
        }
    )


async def apply_template(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await body_of(request)

    def prompt(service: Service, llm: Llama) -> str:
        return chat_prompt(service.chat_template(), body, tools_of(body))

    return JSONResponse({"prompt": await service.with_model(prompt)})


def _completion(service: Service, llm: Llama, body: Body) -> Generation:
    prompts = prompts_of(llm, body.get("prompt"))
    if len(prompts) != 1:
        raise UsageError("/completion takes one prompt")
    limit = limit_of(service, body, "n_predict", "max_tokens")
    return generation(service, llm, body, prompts[0].tokens, limit, grammar_of(body, Tools()))


async def _completion_stream(
    service: Service, events: AsyncIterator[Any], waiting: Waiting
) -> AsyncIterator[bytes]:
    if waiting.place:
        yield sse.comment(waiting.words())
    async for event in events:
        if isinstance(event, Waiting):
            yield sse.comment(event.words())
        elif isinstance(event, Progress):
            yield sse.comment(f"keepalive {event.done}/{event.total}")
        elif isinstance(event, Token):
            yield sse.event({"index": 0, "content": event.text, "stop": False})
        elif isinstance(event, Finished):
            yield sse.event(_last(service, event) | {"content": ""})


def _last(service: Service, done: Finished) -> Body:
    return {
        "index": 0,
        "model": service.name,
        "stop": True,
        "stop_type": "limit" if done.reason == "length" else "eos",
        "truncated": False,
        "tokens_predicted": done.n_generated,
        "tokens_evaluated": done.n_prompt,
        "tokens_cached": done.n_cached,
        "timings": replies.timings(done),
        "hobbit": replies.hobbit_block(done),
    }


def _detokenize(service: Service, llm: Llama, tokens: list[Any]) -> str:
    checked = checked_tokens(llm, tokens)
    return b"".join(llm.detokenize([token]) for token in checked).decode(errors="replace")


def _tokenize(service: Service, llm: Llama, body: Body) -> Body:
    content = body.get("content", body.get("prompt"))
    if not isinstance(content, str):
        raise UsageError("content must be a text")
    special = body.get("parse_special") is not False
    bos = (
        flag(body, "add_special") or flag(body, "add_special_tokens")
    ) and llm._model.add_bos_token()
    tokens = [*llm.tokenize(content.encode(), add_bos=bos, special=special)]
    if not flag(body, "with_pieces"):
        return {"tokens": tokens}
    pieces = [llm.detokenize([token], special=True).decode(errors="replace") for token in tokens]
    return {"tokens": [{"id": t, "piece": p} for t, p in zip(tokens, pieces, strict=True)]}
