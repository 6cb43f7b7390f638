from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from hobbit.errors import Cancelled, HobbitError, ReadError, UsageError
from hobbit.generate import (
    Prompt,
    Result,
    Sampling,
    generate,
    has_chat_template,
    interruptible,
    parsed_grammar,
)
from hobbit.stats import Stats


class FakeLlama:
    """Answers with given pieces, or fails; `forever` answers until it is cancelled."""

    def __init__(self, *pieces: str, error: BaseException | None = None, forever: bool = False):
        self.pieces = pieces
        self.error = error
        self.forever = forever
        self.metadata: dict[str, str] = {}
        self.stats = Stats()
        self.calls: list[tuple[Any, dict[str, Any]]] = []
        self.cancelled = threading.Event()
        self.cancel_left_on = False
        self.stopped = False

    def cancel(self, on: bool = True) -> None:
        if on:
            self.cancelled.set()
        self.cancel_left_on = on

    def token_eos(self) -> int:
        return 2

    def _answer(self) -> Iterator[tuple[str, str | None]]:
        self.stats = Stats(tokens_prompt=3, prompt_s=0.5, misses=9)
        for number, piece in enumerate(self.pieces):
            self.stats = Stats(tokens_prompt=3, tokens_generated=number, prompt_s=0.5, misses=9)
            yield piece, None
        if self.error:
            raise self.error
        while self.forever:
            if self.cancelled.wait(0.01):
                self.stopped = True
                raise Cancelled("cancelled")
        yield "", "stop"

    def create_completion(self, prompt: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((prompt, arguments))
        for text, reason in self._answer():
            yield {"choices": [{"text": text, "finish_reason": reason}]}

    def create_chat_completion(self, messages: Any, **arguments: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((messages, arguments))
        yield {"choices": [{"delta": {"role": "assistant"}, "finish_reason": None}]}
        for text, reason in self._answer():
            yield {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


def run(llm: FakeLlama, prompt: Prompt = Prompt("hi"), **more: Any) -> Result:  # noqa: B008 # frozen
    return generate(cast(Any, llm), prompt, more.pop("sampling", Sampling()), **more)


def test_text_and_counts() -> None:
    seen: list[str] = []
    result = run(FakeLlama("a", "b", "c"), on_text=seen.append)
    assert (result.text, seen, result.finish_reason) == ("abc", ["a", "b", "c"], "stop")
    assert result.stats.tokens_prompt == 3
    assert result.tokens == 3
    assert result.decode.tokens_generated == 2
    assert (result.stats.misses, result.decode.misses) == (9, 0)
    assert result.stats.ttft_s > 0
    assert result.signal is None


def test_the_arguments() -> None:
    llm = FakeLlama("x")
    run(llm, sampling=Sampling(seed=7, stop=("END",), max_tokens=5))
    prompt, arguments = llm.calls[0]
    assert prompt == "hi"
    assert arguments == {
        "stream": True,
        "max_tokens": 5,
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "repeat_penalty": 1.0,
        "seed": 7,
        "stop": ["END"],
    }


def test_the_prompt_only() -> None:
    llm = FakeLlama("a")
    seen: list[str] = []
    result = run(llm, sampling=Sampling(max_tokens=0), on_text=seen.append)
    assert (result.text, seen, result.finish_reason, result.tokens) == ("", [], "length", 0)
    assert result.stats.tokens_prompt == 3
    assert llm.calls[0][1]["max_tokens"] == 1
    assert llm.calls[0][1]["logit_bias"] == {2: 1e9}


def test_what_ends_by_itself_is_not_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation after the end would stop whatever the model is asked next."""

    class Lingering(threading.Thread):
        def run(self) -> None:
            super().run()
            time.sleep(0.1)

    monkeypatch.setattr(threading, "Thread", Lingering)
    llm = FakeLlama("a")
    run(llm)
    assert not llm.cancelled.is_set()


def test_chat_messages() -> None:
    llm = FakeLlama("x")
    assert run(llm, Prompt("hi", system="be brief", chat=True)).text == "x"
    assert llm.calls[0][0] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    assert Prompt("hi", chat=True).messages() == [{"role": "user", "content": "hi"}]


def test_tokens_are_the_prompt_in_place_of_all_else() -> None:
    llm = FakeLlama("x")
    assert run(llm, Prompt("hi", chat=True, tokens=(1, 2))).text == "x"
    assert llm.calls[0][0] == [1, 2]


def test_it_ticks_while_nothing_comes() -> None:
    llm = FakeLlama("a", forever=True)
    ticks: list[int] = []

    def on_tick() -> None:
        ticks.append(1)
        if len(ticks) == 2:
            raise KeyboardInterrupt

    result = run(llm, on_tick=on_tick)
    assert (result.text, result.finish_reason, len(ticks)) == ("a", "cancelled", 2)


def test_has_chat_template() -> None:
    llm = FakeLlama()
    assert not has_chat_template(cast(Any, llm))
    llm.metadata["tokenizer.chat_template"] = "..."
    assert has_chat_template(cast(Any, llm))


def test_ctrl_c_keeps_what_was_said() -> None:
    llm = FakeLlama("a", "b", forever=True)
    seen: list[str] = []

    def on_text(piece: str) -> None:
        seen.append(piece)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    start = time.monotonic()
    result = run(llm, on_text=on_text)
    assert time.monotonic() - start < 2
    assert (result.text, result.finish_reason) == ("ab", "cancelled")
    assert isinstance(result.signal, KeyboardInterrupt)
    assert llm.stopped


def test_ctrl_c_before_the_first_token() -> None:
    llm = FakeLlama(forever=True)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    result = run(llm)
    assert (result.text, result.finish_reason, result.stats.ttft_s) == ("", "cancelled", 0)
    assert result.tokens == 0
    assert llm.stopped
    assert not llm.cancel_left_on  # it would stop what the model is asked next


def test_an_error_of_the_reader_of_the_text_stops_the_model() -> None:
    llm = FakeLlama("a", forever=True)

    def closed(piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(llm, on_text=closed)
    assert llm.stopped


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (ReadError("m.gguf at 5"), ReadError, "m.gguf at 5"),
        (Cancelled("by somebody"), Cancelled, "by somebody"),
        (ValueError("Requested tokens (9) exceed context window of 8"), UsageError, "with -c"),
        (RuntimeError("llama_decode returned -3"), HobbitError, "generation failed: llama_dec"),
        (KeyError("x"), KeyError, "x"),
    ],
)
def test_errors(error: Exception, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message):
        run(FakeLlama("a", error=error))


@pytest.mark.parametrize("text", ["", 'root ::= "a" | <think>', 'root ::= "<b>"'])
def test_grammar(text: str) -> None:
    assert parsed_grammar(text) == text


def test_grammar_of_a_schema() -> None:
    assert "root ::= " in parsed_grammar("", '{"type": "integer"}')


@pytest.mark.parametrize("text", ["root", 'other ::= "a"', 'root ::= "a', "root ::= root"])
def test_a_wrong_grammar(text: str) -> None:
    with pytest.raises(UsageError, match="the grammar cannot be parsed"):
        parsed_grammar(text)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "it is not JSON: Expecting property name"),
        ('{"type": "nothing"}', 'Unrecognized schema: {"type": "nothing"}'),
        ('{"$ref": "https://x/y"}', "Fetching remote schemas is not allowed"),
        ("5", "it is JSON, but not a schema"),
    ],
)
def test_a_wrong_schema(schema: str, reason: str) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)):
        parsed_grammar("", schema)


def test_interruptible() -> None:
    assert interruptible(lambda: 5) == 5
    with pytest.raises(ReadError):
        interruptible(lambda: (_ for _ in ()).throw(ReadError("x")))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: time.sleep(2))
