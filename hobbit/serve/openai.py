"""OpenAI's endpoints: chat completions, completions, models."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import UsageError
from ..harmony import CALL, FINAL, Harmony, Part
from ..template import ChatTemplate, opens_thoughts
from . import replies, sse
from .channels import Channels, parsed_call
from .chat import Tools, chat_prompt, grammar_of, tools_of
from .errors import HttpError
from .exchange import Waiting, whole
from .generation import Finished, Generation, Progress, Scored, Token
from .requests import flag, generation, limit_of, logprobs_of, prompts_of
from .service import Service, body_of
from .stream import Stream

if TYPE_CHECKING:
    from ..llama import Llama

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
        self._channels = self._splitter(chat)
        self.n_calls = 0

    @staticmethod
    def _splitter(chat: _Chat) -> Channels | Harmony:
        is_free = not chat.wanted.sampling.grammar
        if chat.template.is_harmony and is_free:
            return Harmony()
        return Channels(
            reasoning=chat.template.thinks and is_free,
            tools=bool(chat.tools.tools),
            thinking=chat.thinking,
        )

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

    def reason(self, done: Finished) -> str:
        """Return why it ended; a call that was cut short is no call."""
        return "tool_calls" if self.n_calls and done.reason != "length" else done.reason

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
    service.check_name(body)
    streams = flag(body, "stream")
    chat = await service.with_model(_chat, body)
    exchange = service.exchange(chat.wanted, request, body.get("user"))
    reply = _Reply(service, body, "chat.completion", "chatcmpl")
    if streams:
        return Stream(
            exchange, _chat_stream(exchange.events(), exchange.waiting, chat, reply), service.failed
        )
    events = await whole(exchange, request.receive)
    return JSONResponse(_chat_answer(events, chat, reply))


async def completions(request: Request) -> Response:
    service: Service = request.app.state.service
    body = await body_of(request)
    service.check_name(body)
    streams = flag(body, "stream")
    jobs = await service.with_model(_completions, body)
    reply = _Reply(service, body, "text_completion", "cmpl")
    if streams:
        if len(jobs) > 1:
            raise HttpError(400, "only one prompt can be streamed")
        exchange = service.exchange(jobs[0], request, body.get("user"))
        return Stream(
            exchange, _completion_stream(exchange.events(), exchange.waiting, reply), service.failed
        )
    choices, ends = [], []
    for index, wanted in enumerate(jobs):
        exchange = service.exchange(wanted, request, body.get("user"))
        events = await whole(exchange, request.receive)
        choices.append(_completion_choice(events, wanted, index))
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
    """Any name is the one model's, as in requests, unless --strict-model is set."""
    service: Service = request.app.state.service
    name = request.path_params["id"]
    service.check_name({"model": name})
    return JSONResponse(_model(service, name))


async def embeddings(request: Request) -> Response:
    raise HttpError(501, "embeddings: the model is loaded for generation only")


def _model(service: Service, name: str) -> Body:
    facts, gguf = service.engine.model.facts, service.layout.gguf
    meta = {
        "n_ctx": facts.n_ctx,
        "n_ctx_train": gguf.get(f"{gguf.arch}.context_length", 0),
        "n_vocab": facts.n_vocab,
        "n_embd": facts.n_embd,
        "size": gguf.nbytes,
        "mode": facts.plan.mode if facts.plan else None,
        "quality": facts.quality.name,
    }
    created = service.created
    return {"id": name, "object": "model", "created": created, "owned_by": "hobbit", "meta": meta}


def _chat(service: Service, llm: Llama, body: Body) -> _Chat:
    template, tools = service.chat_template(), tools_of(body)
    prompt = chat_prompt(template, body, tools)
    grammar = grammar_of(body, tools)
    if grammar and template.is_harmony:
        prompt += CALL.format(name=tools.forced) if tools.forced else FINAL
    tokens = [*llm.tokenize(prompt.encode(), add_bos=False, special=True)]
    limit = limit_of(service, body, "max_completion_tokens", "max_tokens")
    wanted = generation(service, llm, body, tokens, limit, grammar)
    wanted = replace(wanted, tells_control=template.is_harmony and not grammar)
    if flag(body, "logprobs"):
        top = logprobs_of(body.get("top_logprobs", 0), "top_logprobs")
        wanted = replace(wanted, logprobs=top or 0)
    return _Chat(wanted, tools, template, opens_thoughts(prompt))


def _completions(service: Service, llm: Llama, body: Body) -> list[Generation]:
    if body.get("suffix"):
        raise UsageError("suffix is not supported: write the prompt as the model wants it")
    limit = limit_of(service, body, "max_tokens", default=16)
    grammar = grammar_of(body, Tools())
    logprobs, echo = logprobs_of(body.get("logprobs"), "logprobs"), flag(body, "echo")
    return [
        replace(
            generation(service, llm, body, prompt.tokens, limit, grammar),
            logprobs=logprobs,
            echo=echo,
            n_implied=prompt.n_implied,
        )
        for prompt in prompts_of(llm, body.get("prompt"))
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
        return {"timings": replies.timings(done), "hobbit": replies.hobbit_block(done)}

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
            yield chunk({}, parts.reason(item))
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
        "finish_reason": parts.reason(done),
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


def _completion_choice(events: Sequence[Token | Finished], wanted: Generation, index: int) -> Body:
    tokens = [event for event in events if isinstance(event, Token)]
    scored = [entry for token in tokens for entry in token.scored]
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
