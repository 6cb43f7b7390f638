"""What a server must stand: clients that cut, stall, lie, or ask for too much."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from serving import Server, data_of, loopback_only, served

from hobbit.errors import UsageError
from hobbit.generate import parsed_grammar
from hobbit.serve.generation import Scored
from hobbit.serve.guard import Guard, Rules
from hobbit.serve.replies import completion_logprobs

no_network = loopback_only

ASK = {"prompt": "one two", "max_tokens": 4, "temperature": 0}
HELLO = [{"role": "user", "content": "one two three"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Schwaebisch Gmuend", "Castrop-Rauxel"]}},
    "required": ["city"],
}
CALL = {"type": "function", "function": {"name": "f", "parameters": CITY}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("edges") / "m.gguf", chat=True)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with served(model, "-c", "32768", "-ub", "32", "-b", "64", "-a", "m") as running:
        yield running


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "one"}),
        ("/completion", {"prompt": "one"}),
        ("/v1/chat/completions", {"messages": HELLO}),
    ],
)
def test_a_request_that_is_refused_leaves_no_work_behind(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    before = server.ask("/hobbit/stats").json["requests"]
    asked = server.ask(path, body | {"stream": "yes", "max_tokens": -1, "n_predict": -1})
    assert asked.status == 400 and "stream must be" in asked.json["error"]["message"]
    assert server.slot_is_free()
    assert server.ask("/hobbit/stats").json["requests"] == before


def test_halves_of_characters(server: Server) -> None:
    """JavaScript cuts a text between the halves of an emoji."""
    raw = b'{"model": "\\ud83d", "prompt": "one \\ud83d two", "max_tokens": 3, "stream": %s}'
    whole = server.ask("/v1/completions", raw % b"false")
    assert whole.status == 200 and whole.json["model"] == "\ufffd"
    events = [*data_of(server.stream("/v1/completions", raw % b"true"))]
    assert len(events) > 2 and not any("error" in event for event in events)
    chat = b'{"messages": [{"role": "user", "content": "\\uDE00"}], "max_tokens": 2}'
    assert server.ask("/v1/chat/completions", chat).status == 200
    assert server.ask("/tokenize", b'{"content": "\\ud83d\\ude00"}').status == 200
    assert server.ask("/tokenize", b"\xef\xbb\xbf" + b'{"content": "one"}').status == 200
    assert server.ask("/tokenize", b'{"content": "\xff"}').status == 400


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e999"])
def test_numbers_that_are_none(server: Server, value: str) -> None:
    for name in ("temperature", "top_p", "logit_bias"):
        number = f'{{"300": {value}}}' if name == "logit_bias" else value
        raw = f'{{"prompt": "one", "max_tokens": 2, "{name}": {number}}}'.encode()
        assert server.ask("/v1/completions", raw).status == 400, name


def test_every_seed_but_minus_one_is_kept_to(server: Server) -> None:
    for seed in (0, 2**32 - 1, 2**63, -5):
        ask = ASK | {"temperature": 2.0, "seed": seed, "max_tokens": 12}
        texts = {server.ask("/v1/completions", ask).json["choices"][0]["text"] for _ in range(3)}
        assert len(texts) == 1, seed


def test_an_echo_has_the_tokens_of_the_text_however_it_is_asked_for(server: Server) -> None:
    ask = {"prompt": "one two", "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 0}
    one = server.ask("/v1/completions", ask).json["choices"][0]
    listed = server.ask("/v1/completions", ask | {"prompt": ["one two"]}).json["choices"][0]
    assert listed == one
    first, *_ = [
        event["choices"][0]
        for event in data_of(server.stream("/v1/completions", ask | {"stream": True}))
        if isinstance(event, dict) and event["choices"]
    ]
    n = len(first["logprobs"]["tokens"])
    assert first["logprobs"]["tokens"] == one["logprobs"]["tokens"][:n] and n > 2


def test_offsets_count_characters_also_where_tokens_are_parts_of_one() -> None:
    parts = [b"a", "é".encode()[:1], "é".encode()[1:], b"b"]
    found = completion_logprobs([Scored(part, -1.0) for part in parts], 5)
    assert found["text_offset"] == [5, 6, 6, 7]


def test_a_call_that_does_not_fit_is_cut_and_says_so(server: Server) -> None:
    ask = {"messages": HELLO, "tools": [CALL], "tool_choice": "required", "max_tokens": 3}
    choice = server.ask("/v1/chat/completions", ask).json["choices"][0]
    assert choice["finish_reason"] == "length"
    named = ask | {"tool_choice": {"type": "function", "function": {"name": "f"}}}
    choice = server.ask("/v1/chat/completions", named).json["choices"][0]
    assert choice["finish_reason"] == "length"
    events = data_of(server.stream("/v1/chat/completions", named | {"stream": True}))
    reasons = [
        e["choices"][0]["finish_reason"] for e in events if isinstance(e, dict) and e["choices"]
    ]
    assert reasons[-1] == "length"


@pytest.mark.parametrize(
    "wanted",
    [
        {"grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000},
        {"json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}},
        {"json_schema": {"type": "string", "minLength": 10**9}},
        {"json_schema": {"type": "string", "pattern": "^((a{999}){999}){999}$"}},
        {"json_schema": {"type": "string", "pattern": "^a{%s}$" % ("9" * 5000)}},
        {"json_schema": {"type": "string", "maxLength": 30_000}},
    ],
)
def test_a_grammar_that_would_end_the_server_is_refused(server: Server, wanted: Any) -> None:
    asked = server.ask("/v1/completions", ASK | wanted)
    assert asked.status == 400 and "at most" in asked.json["error"]["message"]


def test_ordinary_schemas_are_within_the_limits() -> None:
    schema = {
        "type": "object",
        "properties": {
            "maxLength": {"type": "string", "minLength": 1, "maxLength": 200},
            "when": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"},
            "all": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 50},
        },
        "required": ["when"],
    }
    assert "root ::= " in parsed_grammar("", json.dumps(schema))
    with pytest.raises(UsageError, match="nested too deeply"):
        parsed_grammar("root ::= " + "(" * 5000)


def test_tokens_in_plenty_do_not_hold_up_others(server: Server) -> None:
    """A million tokens are detokenised beside what asks for the models."""
    done = threading.Event()

    def detokenize() -> None:
        assert server.ask("/detokenize", {"tokens": [300] * 1_000_000}).status == 200
        done.set()

    thread = threading.Thread(target=detokenize)
    thread.start()
    answered = 0
    while not done.is_set():
        assert server.ask("/health").status == 200
        answered += 1
    thread.join()
    assert answered > 20


def test_what_is_not_allowed_says_what_is(server: Server) -> None:
    asked = server.ask("/v1/chat/completions")
    assert asked.status == 405 and asked.headers["Allow"] == "POST"
    assert asked.json["error"]["type"] == "invalid_request_error"


def test_a_request_that_stalls_is_given_up() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def receive() -> Any:
        if not sent:
            sent.append(1)
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.Event().wait()

    async def ask() -> None:
        scope = {
            "type": "http",
            "path": "/",
            "method": "POST",
            "headers": [(b"host", b"localhost")],
        }
        await Guard(app, Rules(patience_s=0.01))(scope, receive, lambda message: None)  # type: ignore[arg-type]

    with pytest.raises(Exception, match=r"no more came for 0\.01 s"):
        asyncio.run(asyncio.wait_for(ask(), 30))


def test_a_server_is_reached_by_the_address_it_listens_on(model: Path) -> None:
    with served(model, "--host", "127.0.0.2", "--lazy") as server:
        assert server.ask("/health").status == 200
        assert server.ask("/health", Host="evil.example").status == 403


def test_keys_of_any_characters(model: Path) -> None:
    with served(model, "--lazy", "--api-key", "schlüssel") as server:
        host, port = server.url.removeprefix("http://").split(":")
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            connection.putrequest("GET", "/slots")
            connection.putheader("Authorization", f"Bearer {key}".encode())
            connection.endheaders()
            assert connection.getresponse().status == status
            connection.close()


def test_a_strict_server_has_one_name(model: Path) -> None:
    with served(model, "-c", "512", "-a", "m", "--strict-model") as server:
        for path in ("/v1/completions", "/completion"):
            assert server.ask(path, ASK).status == 200
            assert server.ask(path, ASK | {"model": "m"}).status == 200
            wrong = server.ask(path, ASK | {"model": "gpt-4"})
            assert (wrong.status, wrong.json["error"]["type"]) == (404, "not_found_error")
        chat = {"messages": HELLO, "max_tokens": 2, "model": "x", "stream": True}
        assert server.ask("/v1/chat/completions", chat).status == 404
        assert server.ask("/v1/models/m").status == 200
        assert server.ask("/v1/models/x").status == 404


def test_a_log_for_programs(model: Path, tmp_path: Path) -> None:
    with served(model, "--log-json", "-c", "512", "-a", "m") as server:
        assert server.ask("/v1/completions", ASK).status == 200
        server.until(lambda: any('"request"' in line for line in server.lines), "its line")
        assert server.stop() == 143
    events = [json.loads(line) for line in server.lines]
    assert all(isinstance(e["time"], float) and e["level"] == "info" for e in events)
    (listening,) = [e for e in events if e["event"] == "listening"]
    assert listening["url"] == server.url
    (request,) = [e for e in events if e["event"] == "request"]
    assert (request["n_generated"], request["reason"]) == (4, "length")
    assert request["stats"]["tokens_generated"] == 3 and request["ttft_s"] > 0


def test_errors_in_a_log_for_programs(model: Path) -> None:
    from test_serve import hobbit_serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = hobbit_serve(str(model), "--port", port, "--log-json")
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert (done.returncode, told["level"]) == (1, "error")
    assert f"port {port} of 127.0.0.1 is in use" in told["message"]
    done = hobbit_serve("/none.gguf", "--log-json", "-q", "--port", "0")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 3 and json.loads(line)["level"] == "error"
