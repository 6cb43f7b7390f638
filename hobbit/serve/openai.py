"""OpenAI's endpoints: chat completions, completions, models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import UsageError
from . import replies, sse
from .channels import Channels, Part, parsed_call
from .chat import ChatTemplate, Tools, grammar_of, tools_of
from .errors import HttpError
from .exchange import Waiting, whole
from .generation import Finished, Generation, Progress, Scored, Token
from .requests import flag, generation, limit_of, logprobs_of, prompts_of
from .service import Service, body_of
from .stream import Stream

Body = dict[str, Any]


@dataclass(frozen=True)
class _Chat:
    """A chat request, understood."""

    wanted: Generation
    tools: Tools
    template: ChatTemplate
    thinking: bool

    def parts(self) -> _Parts:
        return _Parts(self)


class _Parts:
    """The deltas of a chat answer."""

    def __init__(self, chat: _Chat) -> None:
        self._must_call = chat.tools.schema() is not None
        self._forced = chat.tools.forced
        self._text = ""  # of an answer that must be a call
        self._channels = Channels(
            reasoning=chat.template.thinks and not chat.wanted.sampling.grammar,
            tools=bool(chat.tools.tools),
            thinking=chat.thinking,
        )
        self.n_calls = 0

    def feed(self, text: str) -> list[Body]:
        if self._must_call:
            self._text += text
            return []
        return [self._delta(part) for part in self._channels.feed(text)]

    def finish(self) -> list[Body]:
        if not self._must_call:
            return [self._delta(part) for part in self._channels.finish()]
        call = parsed_call(self._text)
        if self._forced:
            call = {"name": self._forced, "arguments": self._text}
        return [{"content": self._text} if call is None else self._call(call)]

    def _delta(self, part: Part) -> Body:
        if part.kind == "reasoning":
            return {"reasoning_content": part.text}
        call = parsed_call(part.text) if part.kind == "tool" else None
        if call is not None:
            return self._call(call)
        is_broken = part.kind == "tool"
        return {"content": f"<tool_call>{part.text}</tool_call>" if is_broken else part.text}

    def _call(self, function: Body) -> Body:
        call = {
            "index": self.n_calls,
            "id": replies.new_id("call"),
            "type": "function",
            "function": function,
        }
        self.n_calls += 1
        return {"tool_calls": [call]}


async def chat_completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await body_of(request)
    chat = await run_in_threadpool(_chat, service, body)
    exchange = service.exchange(chat.wanted, request, body.get("user"))
    reply = _Reply(service, body, "chat.completion", "chatcmpl")
    if flag(body, "stream"):
        return Stream(exchange, _chat_stream(exchange.events(), exchange.waiting, chat, reply))
    events = await whole(exchange, request.receive)
    return JSONResponse(_chat_answer(events, chat, reply))


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await body_of(request)
    jobs = await run_in_threadpool(_completions, service, body)
    reply = _Reply(service, body, "text_completion", "cmpl")
    if flag(body, "stream"):
        if len(jobs) > 1:
            raise HttpError(400, "only one prompt can be streamed")
        exchange = service.exchange(jobs[0], request, body.get("user"))
        return Stream(exchange, _completion_stream(exchange.events(), exchange.waiting, reply))
    choices, ends = [], []
    for index, wanted in enumerate(jobs):
        exchange = service.exchange(wanted, request, body.get("user"))
        events = await whole(exchange, request.receive)
        choices.append(_completion_choice(events, wanted, index, isinstance(body["prompt"], str)))
        ends.append(_end(events))
    return JSONResponse(
        reply.head()
        | {"choices": choices, "usage": replies.total_usage(ends)}
        | reply.tail(ends[-1])
    )


async def models(request: Request) -> Response:
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_model(service, service.name)]})


async def model(request: Request) -> Response:
    """Any name is the one model's, as in requests."""
    return JSONResponse(_model(request.app.state.service, request.path_params["id"]))


async def embeddings(request: Request) -> Response:
    raise HttpError(501, "embeddings: the model is loaded for generation only")


def _model(service: Service, name: str) -> Body:
    llm = service.engine.llm
    gguf = llm.layout.gguf
    meta = {
        "n_ctx": llm.n_ctx(),
        "n_ctx_train": gguf.get(f"{gguf.arch}.context_length", 0),
        "n_vocab": llm.n_vocab(),
        "n_embd": llm.n_embd(),
        "size": gguf.nbytes,
        "mode": llm.plan.mode,
        "quality": llm.quality.name,
    }
    created = service.created
    return {"id": name, "object": "model", "created": created, "owned_by": "hobbit", "meta": meta}


def _chat(service: Service, body: Body) -> _Chat:
    template, tools = service.chat_template(), tools_of(body)
    more = body.get("chat_template_kwargs")
    prompt = template.prompt(
        body.get("messages"), tools.shown, more if isinstance(more, dict) else None
    )
    tokens = [*service.engine.llm.tokenize(prompt.encode(), add_bos=False, special=True)]
    limit = limit_of(service, body, "max_completion_tokens", "max_tokens")
    wanted = generation(service, body, tokens, limit, grammar_of(body, tools))
    if flag(body, "logprobs"):
        top = logprobs_of(body.get("top_logprobs", 0), "top_logprobs")
        wanted = replace(wanted, logprobs=top or 0)
    return _Chat(wanted, tools, template, prompt.rstrip().endswith("<think>"))


def _completions(service: Service, body: Body) -> list[Generation]:
    if body.get("suffix"):
        raise UsageError("suffix is not supported: write the prompt as the model wants it")
    limit = limit_of(service, body, "max_tokens", default=16)
    grammar = grammar_of(body, Tools())
    logprobs, echo = logprobs_of(body.get("logprobs"), "logprobs"), flag(body, "echo")
    return [
        replace(generation(service, body, tokens, limit, grammar), logprobs=logprobs, echo=echo)
        for tokens in prompts_of(service, body.get("prompt"))
    ]


class _Reply:
    """What all chunks of one answer have in common."""

    def __init__(self, service: Service, body: Body, kind: str, prefix: str) -> None:
        self.service, self.body = service, body
        self.name = body["model"] if isinstance(body.get("model"), str) else service.name
        self.kind, self.id, self.created = kind, replies.new_id(prefix), int(time.time())
        options = body.get("stream_options")
        self.with_usage = isinstance(options, dict) and bool(options.get("include_usage"))

    def head(self, kind: str = "") -> Body:
        return {
            "id": self.id,
            "object": kind or self.kind,
            "created": self.created,
            "model": self.name,
            "system_fingerprint": self.service.version,
        }

    def tail(self, done: Finished) -> Body:
        block = replies.hobbit_block(done, self.service.engine.llm)
        return {"timings": replies.timings(done), "hobbit": block}

    def last(self, done: Finished, kind: str = "") -> list[bytes]:
        """Return what ends a stream; a client that asks for usage gets it in a chunk of its own."""
        chunks = [sse.event(self.head(kind) | {"choices": []} | self.tail(done))]
        if self.with_usage:
            more = {"choices": [], "usage": replies.usage(done)}
            chunks = [sse.event(self.head(kind) | more | self.tail(done))]
        return [*chunks, sse.DONE]

    def wants_progress(self) -> bool:
        return self.body.get("return_progress") is True


async def _chat_stream(
    events: AsyncIterator[Any], waiting: Waiting, chat: _Chat, reply: _Reply
) -> AsyncIterator[bytes]:
    kind = "chat.completion.chunk"

    def chunk(delta: Body, reason: str | None = None, scored: Sequence[Scored] = ()) -> bytes:
        logprobs = replies.chat_logprobs(scored) if scored else None
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse.event(reply.head(kind) | {"choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    parts = chat.parts()
    async for item in _commented(events, waiting, lambda more: reply.head(kind) | more, reply):
        if isinstance(item, bytes):
            yield item
        elif isinstance(item, Token):
            deltas = parts.feed(item.text)
            if item.scored and not deltas:
                deltas = [{"content": ""}]
            for i, delta in enumerate(deltas):
                yield chunk(delta, scored=() if i else item.scored)
        elif isinstance(item, Finished):
            for delta in parts.finish():
                yield chunk(delta)
            yield chunk({}, "tool_calls" if parts.n_calls else item.reason)
            for last in reply.last(item, kind):
                yield last


def _chat_answer(events: Sequence[Token | Finished], chat: _Chat, reply: _Reply) -> Body:
    parts, done = chat.parts(), _end(events)
    tokens = [event for event in events if isinstance(event, Token)]
    deltas = [delta for token in tokens for delta in parts.feed(token.text)] + parts.finish()
    message: Body = {"role": "assistant", "content": _joined(deltas, "content")}
    if thoughts := _joined(deltas, "reasoning_content"):
        message["reasoning_content"] = thoughts
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    if calls:
        message["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in calls]
        message["content"] = message["content"] or None
    scored = [entry for token in tokens for entry in token.scored]
    wants_logprobs = chat.wanted.logprobs is not None
    choice = {
        "index": 0,
        "message": message,
        "logprobs": replies.chat_logprobs(scored) if wants_logprobs else None,
        "finish_reason": "tool_calls" if calls else done.reason,
    }
    return reply.head() | {"choices": [choice], "usage": replies.usage(done)} | reply.tail(done)


async def _completion_stream(
    events: AsyncIterator[Any], waiting: Waiting, reply: _Reply
) -> AsyncIterator[bytes]:
    offset = 0

    def chunk(text: str, reason: str | None, scored: Sequence[Scored] = ()) -> bytes:
        logprobs = replies.completion_logprobs(scored, offset) if scored else None
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return sse.event(reply.head() | {"choices": [choice]})

    async for item in _commented(events, waiting, lambda more: reply.head() | more, reply):
        if isinstance(item, bytes):
            yield item
        elif isinstance(item, Token):
            yield chunk(item.text, None, item.scored)
            offset += len(item.text)
        elif isinstance(item, Finished):
            yield chunk("", item.reason)
            for last in reply.last(item):
                yield last


async def _commented(
    events: AsyncIterator[Any],
    waiting: Waiting,
    head: Callable[[Body], Body],
    reply: _Reply,
) -> AsyncIterator[bytes | Token | Finished]:
    """Turn what is not the answer into comments, and progress into chunks where asked for."""
    if waiting.place:
        yield sse.comment(waiting.words())
    async for event in events:
        if isinstance(event, Waiting):
            yield sse.comment(event.words())
        elif isinstance(event, Progress):
            yield sse.comment(f"keepalive {event.done}/{event.total}")
            if reply.wants_progress():
                progress = {
                    "total": event.total,
                    "cache": event.cached,
                    "processed": event.done,
                    "time_ms": round(1e3 * event.seconds),
                }
                yield sse.event(head({"choices": [], "prompt_progress": progress}))
        elif isinstance(event, Token | Finished):
            yield event


def _completion_choice(
    events: Sequence[Token | Finished], wanted: Generation, index: int, is_text: bool
) -> Body:
    tokens = [event for event in events if isinstance(event, Token)]
    scored = [entry for token in tokens for entry in token.scored]
    if scored and wanted.echo and is_text and not scored[0].data:
        scored = scored[1:]  # the beginning of a text is no token of it
    has_logprobs = wanted.logprobs is not None
    return {
        "index": index,
        "text": "".join(token.text for token in tokens),
        "logprobs": replies.completion_logprobs(scored) if has_logprobs else None,
        "finish_reason": _end(events).reason,
    }


def _end(events: Sequence[Token | Finished]) -> Finished:
    return next(event for event in events if isinstance(event, Finished))


def _joined(deltas: Sequence[Body], name: str) -> str:
    return "".join(delta.get(name, "") for delta in deltas)
