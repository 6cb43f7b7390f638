"""gpt-oss's channels from a model's tokens to the server's answers and to a person's screen.

The model is a tiny one with such a template and such control tokens, and what it says is given: its
sampler is replaced.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import tiny

import hobbit
from hobbit.chat.display import Answer, Display
from hobbit.chat.session import Session
from hobbit.chat.view import Live
from hobbit.generate import Sampling
from hobbit.serve import openai
from hobbit.serve.answer import answer
from hobbit.serve.generation import Event, Finished, Token
from hobbit.serve.service import Service
from hobbit.template import template_of

TAGS = [
    "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{% if '<|channel|>' in m['content'] or '<think>' in m['content'] %}"
    "{{ raise_exception('tags in a message') }}{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
    "<|start|>assistant"
)
THOUGHT = "<|channel|>analysis<|message|>the sea is on<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>we are by you"
CALLED = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
F = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = tiny.vocabulary()
    tokens, kinds = words["tokenizer.ggml.tokens"], words["tokenizer.ggml.token_type"]
    kv = {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.add_space_prefix": False,
        # In place of the last words; one for the space alone, that any text becomes itself again.
        "tokenizer.ggml.tokens": [*tokens[: -len(TAGS) - 1], *TAGS, "\u2581"],
        "tokenizer.ggml.token_type": [*kinds[: -len(TAGS) - 1], *[3] * len(TAGS), 1],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1 - len(TAGS) + TAGS.index("<|return|>"),
    }
    return tiny.make(tmp_path_factory.mktemp("channels") / "m.gguf", "qwen3moe", kv=kv)


@dataclass
class Script:
    """What the model says next, and the prompts that it was given."""

    llm: hobbit.Llama
    text: str = ""
    prompts: list[str] = field(default_factory=list)

    def generate(self, tokens: Any, **_: Any) -> Iterator[int]:
        self.prompts.append(self.llm.detokenize([*tokens], special=True).decode())
        yield from self.llm.tokenize(self.text.encode(), add_bos=False, special=True)
        yield self.llm.token_eos()


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[hobbit.Llama]:
    arguments: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    with hobbit.Llama(str(path), memory="1G", **arguments) as llama:
        yield llama


@pytest.fixture
def script(llm: hobbit.Llama, monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script(llm)
    monkeypatch.setattr(llm, "generate", script.generate)
    return script


def served(script: Script, text: str, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the message of a whole answer with its reason, and the same put together of a stream.

    Everything between a request's body and the answer's is the server's own, but for HTTP.
    """
    llm, script.text = script.llm, text

    class Fake:
        chat_template = staticmethod(lambda: template_of(llm))
        defaults, version, name = Sampling(), "v", "m"
        options = type("O", (), {"loading": type("L", (), {"predict": None})})

    service = cast(Service, Fake())
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "the way"}], **more}
    chat = openai._chat(service, llm, body)
    events: list[Event] = []
    events.append(answer(llm, chat.wanted, events.append, lambda: False))
    reply = openai._Reply(service, body, "chat.completion", "c")
    told = [event for event in events if isinstance(event, Token | Finished)]
    choice = openai._chat_answer(told, chat, reply)["choices"][0]
    return choice["message"] | {"reason": choice["finish_reason"]}, streamed(events, chat, reply)


def streamed(events: list[Event], chat: Any, reply: Any) -> dict[str, Any]:
    async def each() -> Any:
        for event in events:
            yield event

    async def chunks() -> list[bytes]:
        waiting = openai.Waiting(0, 0, None)
        return [chunk async for chunk in openai._chat_stream(each(), waiting, chat, reply)]

    found: dict[str, Any] = {}
    for chunk in asyncio.run(chunks()):
        if not chunk.startswith(b"data: {"):
            continue
        for choice in json.loads(chunk.removeprefix(b"data: "))["choices"]:
            for name, value in choice["delta"].items():
                found[name] = found[name] + value if name in found else value
            found["reason"] = choice["finish_reason"] or found.get("reason")
    return found


def test_thoughts_are_told_apart_and_tags_are_not_told(script: Script) -> None:
    whole, stream = served(script, THOUGHT + FINAL)
    assert whole["reasoning_content"] == stream["reasoning_content"] == "the sea is on"
    assert whole["content"] == stream["content"] == "we are by you"
    assert whole["reason"] == stream["reason"] == "stop"


def test_a_call(script: Script) -> None:
    whole, stream = served(script, THOUGHT + CALLED, tools=[F])
    for found in (whole, stream):
        (call,) = found["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
        assert found["reason"] == "tool_calls" and not found["content"]
        assert found["reasoning_content"] == "the sea is on"


def test_what_a_grammar_forces_begins_with_words(script: Script) -> None:
    whole, _ = served(script, '{"a": 1}', response_format={"type": "json_object"})
    assert (whole["content"], whole["reason"]) == ('{"a": 1}', "stop")
    assert script.prompts[-1].endswith("<|start|>assistant<|channel|>final<|message|>")
    choice = {"type": "function", "function": {"name": "f"}}
    whole, _ = served(script, '{"a": 1}', tools=[F], tool_choice=choice)
    assert whole["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    head = " to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
    assert script.prompts[-1].endswith("<|start|>assistant" + head)


def test_a_call_that_was_cut_is_no_call(script: Script) -> None:
    whole, stream = served(script, CALLED, tools=[F], max_tokens=40)
    assert whole["reason"] == stream["reason"] == "length"


def test_a_chat_has_the_words_alone_in_its_next_prompt(script: Script) -> None:
    session = Session(script.llm, Sampling())
    script.text = THOUGHT + FINAL
    said: list[str] = []
    reply = session.ask("the way", said.append)
    assert "".join(said) == reply.answer == "<think>the sea is on</think>\n\nwe are by you"
    session.ask("the sky", said.append)
    assert "<|channel|>final<|message|>we are by you<|end|>" in script.prompts[-1]
    assert "the sea is on" not in script.prompts[-1]


def test_a_chat_whose_answers_are_json(script: Script) -> None:
    session = Session(script.llm, Sampling(grammar='root ::= "{}"'))
    script.text = "{}"
    assert session.ask("the way", lambda text: None).answer == "{}"
    assert script.prompts[-1].endswith("<|channel|>final<|message|>")


@pytest.mark.parametrize("hidden", [False, True])
def test_on_a_screen(script: Script, hidden: bool) -> None:
    written: list[str] = []
    display = Display(
        Live(script.llm), written.append, screen_codes=False, color=False, hide_thinking=hidden
    )
    session = Session(script.llm, Sampling())
    script.text = THOUGHT + FINAL
    with Answer(display, session.prompts.opens_thoughts()) as shown:
        shown.begin()
        session.ask("the way", shown.text)
    thought = "" if hidden else "<think>the sea is on</think>\n\n"
    assert re.sub(r"\n$", "", "".join(written)) == thought + "we are by you"
