"""`hobbit serve` as a process, and what clients get from it: the openai package, and plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from prometheus_client.parser import text_string_to_metric_families
from serving import Server, data_of, loopback_only, served

from hobbit.cli.serve import serve
from hobbit.options import Options
from hobbit.serve.options import ServeOptions

no_network = loopback_only  # in place of the one in conftest

ENDLESS = {"prompt": "one two", "max_tokens": -1, "temperature": 0, "stream": True}
HELLO = [{"role": "user", "content": "one two three"}]
CALL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bonn", "Rome"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("serve") / "m.gguf", chat=True)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    """One server for all tests that leave it as it was; its answers may be very long."""
    with served(model, "-c", "32768", "-ub", "32", "-b", "64", "--sse-ping", "0.05") as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


# OpenAI's client


def test_a_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "any", "messages": HELLO, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert (message.role, whole.choices[0].finish_reason, whole.model) == (
        "assistant",
        "length",
        "any",
    )
    assert whole.usage and whole.usage.completion_tokens == 12
    options = {"include_usage": True}
    chunks = [*client.chat.completions.create(**asked, stream=True, stream_options=options)]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == message.content
    assert len([t for t in texts if t]) >= 8
    last = chunks[-1]
    assert last.choices == [] and last.usage
    assert last.usage.completion_tokens == 12
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    extra: Any = last.model_extra
    assert extra["timings"]["predicted_n"] == 12
    assert extra["hobbit"]["quality"] == "exact" and extra["hobbit"]["hit"] > 0
    assert extra["hobbit"]["memory"]["cap"] == 1 << 30


def test_a_prompt_that_is_known_is_not_evaluated_again(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "prompt": "one two three four five", "temperature": 0}
    first, second = (client.completions.create(**asked, max_tokens=4) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    details = second.usage and second.usage.prompt_tokens_details
    assert details and details.cached_tokens == second.usage.prompt_tokens - 1


def test_a_tool_that_must_be_called(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": HELLO, "tools": [CALL], "temperature": 0}
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        reply = client.chat.completions.create(**asked, tool_choice=choice)
        assert reply.choices[0].finish_reason == "tool_calls"
        (call,) = reply.choices[0].message.tool_calls or []
        assert call.type == "function" and call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Bonn", "Rome")
    stream = client.chat.completions.create(**asked, tool_choice=named, stream=True)
    deltas = [c.choices[0].delta for c in stream if c.choices]
    (call,) = [call for delta in deltas for call in delta.tool_calls or []]
    assert call.index == 0 and call.function and call.function.arguments
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Rome")


def test_tools_that_need_not_be_called_leave_the_answer_free(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "messages": HELLO, "temperature": 0, "max_tokens": 8}
    free = client.chat.completions.create(**asked)
    with_tools = client.chat.completions.create(**asked, tools=[CALL])
    assert with_tools.choices[0].message.content == free.choices[0].message.content


def test_answers_are_remembered_for_plan_and_why(model: Path, tmp_path: Path) -> None:
    env = {"HOBBIT_CACHE": str(tmp_path / "cache"), "HOBBIT_STATE": str(tmp_path / "state")}

    def said(*words: str) -> str:
        command = [sys.executable, "-m", "hobbit", *words]
        return subprocess.check_output(command, env=os.environ | env, text=True)

    plan = "plan", str(model), "-t", "1", "-c", "256"
    assert "no run here yet" in said(*plan)
    with served(model, "-c", "256", env=env) as running:
        for _ in range(2):
            asked = {"prompt": "one", "n_predict": 40, "ignore_eos": True, "temperature": 0}
            assert running.ask("/completion", asked).status == 200
    assert "the last 2 runs here were" in said(*plan)
    assert said("why").startswith(f"{model}: ")


def test_an_answer_that_follows_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    reply = client.chat.completions.create(
        model="m",
        messages=HELLO,  # type: ignore[arg-type]
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert json.loads(reply.choices[0].message.content or "")["n"] in (1, 2)


def test_logprobs_of_an_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 5}
    done = client.completions.create(prompt="one two", logprobs=3, **asked)
    logprobs = done.choices[0].logprobs
    assert logprobs and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    assert "".join(logprobs.tokens) == done.choices[0].text
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert value is not None and value == max(top.values()) == top[token]
    chat = client.chat.completions.create(
        messages=HELLO, logprobs=True, top_logprobs=2, **asked
    ).choices[0]
    assert chat.logprobs and chat.logprobs.content
    assert "".join(e.token for e in chat.logprobs.content) == chat.message.content
    assert all(e.top_logprobs[0].logprob == e.logprob for e in chat.logprobs.content)


def test_a_stop_sequence(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "prompt": "one two", "temperature": 0, "max_tokens": 12}
    text = client.completions.create(**asked).choices[0].text
    word = text.split()[3]
    cut = client.completions.create(**asked, stop=[word]).choices[0]
    assert (cut.text, cut.finish_reason) == (text[: text.index(word)], "stop")


def test_several_prompts_in_one_request(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 6}
    both = client.completions.create(prompt=["one two", "three four"], **asked).choices
    alone = [client.completions.create(prompt=p, **asked) for p in ("one two", "three four")]
    assert [c.text for c in both] == [a.choices[0].text for a in alone]
    assert [c.index for c in both] == [0, 1]


def test_eight_clients_at_once_get_their_own_answers(server: Server) -> None:
    def ask(i: int) -> str:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"k{i}", timeout=120) as own:
            stream = own.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": f"{'one ' * i}two {i}"}],
                temperature=0,
                max_tokens=24,
                stream=True,
            )
            return "".join(c.choices[0].delta.content or "" for c in stream if c.choices)

    alone = [ask(i) for i in range(8)]
    assert len(set(alone)) == 8
    together: dict[int, str] = {}
    threads = [threading.Thread(target=lambda i=i: together.update({i: ask(i)})) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [together[i] for i in range(8)] == alone


def test_errors_as_the_client_knows_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="m", prompt="one", temperature=-1)
    assert "temperature must be a number from 0" in str(bad.value)
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="m", prompt=[300] * 40000)
    with pytest.raises(openai.APIStatusError, match="501"):
        client.embeddings.create(model="m", input="one")


def test_the_models(client: openai.OpenAI, server: Server) -> None:
    (only,) = client.models.list().data
    assert only.owned_by == "hobbit" and only.id
    assert client.models.retrieve("whatever/it:is").id == "whatever/it:is"


# While the model works


def test_metadata_does_not_wait_for_the_model(server: Server) -> None:
    with server.stream("/v1/completions", ENDLESS) as answer:
        data = data_of(answer)
        while not isinstance(next(data), dict):
            pass
        paths = ("/v1/models", "/health", "/props", "/slots", "/metrics", "/hobbit/stats")
        seconds: dict[str, list[float]] = {path: [] for path in paths}
        for _ in range(5):
            for path in paths:
                start = time.perf_counter()
                assert server.ask(path).status == 200
                seconds[path].append(time.perf_counter() - start)
        assert server.ask("/slots").json[0]["is_processing"]
        before = server.ask("/slots").json[0]["next_token"]["n_decoded"]
        server.until(
            lambda: server.ask("/slots").json[0]["next_token"]["n_decoded"] > before,
            "the stream goes on",
        )
    # The best of five: the machine may be busy with something else.
    assert {path: min(s) for path, s in seconds.items() if min(s) >= 0.05} == {}
    server.until(server.slot_is_free, "free after the client has gone")


def test_a_client_that_goes_frees_the_slot(server: Server) -> None:
    gone = server.ask("/hobbit/stats").json["requests"]["abandoned"]
    answer = server.stream("/v1/completions", ENDLESS)
    server.until(lambda: not server.slot_is_free(), "the request runs")
    answer.close()
    server.until(server.slot_is_free, "free after the client has gone")
    assert server.ask("/hobbit/stats").json["requests"]["abandoned"] == gone + 1
    reply = server.ask("/completion", {"prompt": "one two", "n_predict": 2, "temperature": 0})
    assert reply.json["tokens_predicted"] == 2


def test_a_client_that_does_not_stream_and_goes_frees_the_slot(server: Server) -> None:
    body = json.dumps(ENDLESS | {"stream": False}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as plain:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        plain.sendall(f"{head}\r\n".encode() + body)
        server.until(lambda: not server.slot_is_free(), "the request runs")
    server.until(server.slot_is_free, "free after the client has gone")


def test_a_prompt_in_progress_says_how_far_it_is(server: Server) -> None:
    asked = {"prompt": [300 + i % 7 for i in range(640)], "max_tokens": 1, "stream": True}
    with server.stream("/v1/completions", asked | {"return_progress": True}) as answer:
        found = [*data_of(answer)]
    comments = [item for item in found if isinstance(item, str)]
    done = [int(c.split()[1].split("/")[0]) for c in comments if c.startswith("keepalive ")]
    assert len(set(done)) > 10 and done == sorted(done) and done[-1] == 640
    told = [item["prompt_progress"] for item in found if "prompt_progress" in item]
    assert [p["processed"] for p in told][-1] == 640 == told[0]["total"]


def test_who_waits_is_told_its_place(server: Server) -> None:
    with server.stream("/v1/completions", ENDLESS) as running:
        next(data_of(running))
        with server.stream("/v1/completions", ENDLESS) as waiting:
            assert next(data_of(waiting)) == "queue 1/1"
            assert next(data_of(waiting)) == "queue 1/1"
    server.until(server.slot_is_free, "free after both have gone")


def test_another_cap_while_the_model_works(server: Server) -> None:
    with server.stream("/v1/completions", ENDLESS) as answer:
        next(data_of(answer))
        reply = server.ask("/hobbit/memory", {"memory": "900M"})
        assert (reply.status, reply.json["cap_bytes"]) == (200, 900 << 20)
        refused = server.ask("/hobbit/memory", {"bytes": 1 << 20})
        assert (
            refused.status == 409
            and "the smallest cap that works" in refused.json["error"]["message"]
        )
        assert server.ask("/hobbit/plan").json["cap_bytes"] == 900 << 20
        assert server.ask("/hobbit/memory", {"bytes": 1 << 30}).json["cap_bytes"] == 1 << 30
        assert not server.slot_is_free()
    assert server.ask("/hobbit/memory", {}).status == 400
    server.until(server.slot_is_free, "free after the client has gone")


# llama-server's endpoints, and hobbit's


def test_native_completion(server: Server) -> None:
    asked = {"prompt": "one two", "n_predict": 6, "temperature": 0}
    whole = server.ask("/completion", asked).json
    assert (whole["stop"], whole["stop_type"], whole["tokens_predicted"]) == (True, "limit", 6)
    with server.stream("/completion", asked | {"stream": True}) as answer:
        events = [item for item in data_of(answer) if isinstance(item, dict)]
    assert "".join(event["content"] for event in events) == whole["content"]
    assert [event["stop"] for event in events][-2:] == [False, True]


def test_tokens_and_templates(server: Server) -> None:
    tokens = server.ask("/tokenize", {"content": "one two"}).json["tokens"]
    text = server.ask("/detokenize", {"tokens": tokens}).json["content"]
    assert text.replace("\u2581", " ").strip() == "one two"  # the tiny vocabulary keeps its mark
    pieces = server.ask("/tokenize", {"content": "one two", "with_pieces": True}).json["tokens"]
    assert [entry["id"] for entry in pieces] == tokens
    prompt = server.ask("/apply-template", {"messages": HELLO}).json["prompt"]
    assert prompt == "user: one two three\nassistant: "


def test_metrics_parse_and_count(server: Server) -> None:
    def scraped() -> dict[str, float]:
        text = server.ask("/metrics").body.decode()
        samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
        return {s.name + "".join(sorted(s.labels.values())): s.value for s in samples}

    before = scraped()
    server.ask("/completion", {"prompt": "two one", "n_predict": 5})
    server.until(lambda: scraped()["llamacpp:requests_processing"] == 0, "done")
    after = scraped()
    name = "llamacpp:tokens_predicted_total"
    assert after[name] == before[name] + 5
    assert after["hobbit_ttft_seconds_count"] == before["hobbit_ttft_seconds_count"] + 1
    assert after["hobbit_token_seconds_count"] == before["hobbit_token_seconds_count"] + 4
    assert after["hobbit_memory_cap_bytes"] == 1 << 30
    parts = [v for k, v in after.items() if k.startswith("hobbit_memory_bytes")]
    assert sum(parts) == 1 << 30
    names = ("prompt_tokens_total", "prompt_seconds_total", "tokens_predicted_seconds_total",
             "prompt_tokens_seconds", "predicted_tokens_seconds", "requests_deferred",
             "n_tokens_max", "n_decode_total", "n_busy_slots_per_decode")  # fmt: skip
    assert all(f"llamacpp:{name}" in after for name in names)
    assert after["hobbit_expert_lookups_totalhitram"] > 0
    for name in ("read_bytes", "stall_seconds", "evictions", "majflt"):
        assert f"hobbit_{name}_total" in after


def test_the_feed_and_the_stats(server: Server) -> None:
    with server.stream_get("/hobbit/events") as feed:
        first, second = (next(data_of(feed)) for _ in range(2))
    assert first["schema"] == "hobbit.stats/1" and second["time"] > first["time"]
    assert first["stats"]["cap_bytes"] == 1 << 30
    assert server.ask("/version").json["version"].startswith("hobbit-")
    assert server.ask("/props").json["total_slots"] == 1


def test_a_quality_above_the_servers_own_is_refused(server: Server) -> None:
    asked = {"prompt": "one", "max_tokens": 1, "hobbit": {"quality": "balanced"}}
    reply = server.ask("/v1/completions", asked)
    assert reply.status == 400 and "exact" in reply.json["error"]["message"]
    asked["hobbit"] = {"quality": "exact"}
    assert server.ask("/v1/completions", asked).status == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", [], 400),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"a": 1}]}]}, 400),
        ("/v1/chat/completions", {"messages": HELLO, "tools": [3]}, 400),
        ("/v1/chat/completions", {"messages": HELLO, "response_format": {"type": "x"}}, 400),
        ("/v1/completions", {"prompt": 7}, 400),
        ("/v1/completions", {"prompt": [-1]}, 400),
        ("/v1/completions", {"prompt": "one", "n": 2}, 400),
        ("/v1/completions", {"prompt": "one", "stop": 3}, 400),
        ("/v1/completions", {"prompt": "one", "logit_bias": {"x": 1}}, 400),
        ("/v1/completions", {"prompt": "one", "grammar": "root ::= ("}, 400),
        ("/v1/completions", {"prompt": "one", "max_tokens": "many"}, 400),
        ("/v1/nothing", {}, 404),
        ("/v1/models", {}, 405),
    ],
)
def test_bad_requests(server: Server, path: str, body: Any, status: int) -> None:
    reply = server.ask(path, body)
    assert reply.status == status
    error = reply.json["error"]
    assert error["code"] == status and error["message"] and error["type"]
    assert server.ask("/health").status == 200


# Settings of the process


def test_keys_limits_and_a_full_queue(model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\nsecond\n")
    flags = (
        *("--api-key-file", str(tmp_path / "keys"), "--queue", "1", "--max-body", "2000"),
        *("--timeout", "1.5", "-c", "32768", "--no-ui", "--no-metrics", "-a", "bilbo"),
    )
    with served(model, *flags) as server:
        assert server.ask("/v1/models").status == 401
        assert server.ask("/v1/models", Authorization="Bearer third").status == 401
        assert server.ask("/health").status == 200
        key = {"Authorization": "Bearer second"}
        assert server.ask("/v1/models", **key).json["data"][0]["id"] == "bilbo"
        assert server.ask("/metrics", **key).status == server.ask("/", **key).status == 404
        large = server.ask("/v1/completions", {"prompt": "one " * 600}, **key)
        assert large.status == 413 and large.json["error"]["code"] == 413
        endless = ENDLESS | {"stream": False}
        replies: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda: replies.append(server.ask("/v1/completions", endless, **key))
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(reply.status for reply in replies) == [503, 504, 504]
        full = next(reply for reply in replies if reply.status == 503)
        assert int(full.headers["Retry-After"]) >= 1
        assert full.json["error"]["type"] == "unavailable_error"
        late = [r for r in replies if r.status == 504]
        assert all("1.5 s" in r.json["error"]["message"] for r in late)


def test_pages_of_others_may_not_use_it(server: Server, model: Path) -> None:
    assert server.ask("/v1/models", Origin="http://evil.example").status == 403
    assert server.ask("/v1/models", Host="evil.example:80").status == 403
    for broken in ("http://[", "null", ""):
        assert server.ask("/v1/models", Origin=broken).status == 403
        assert server.ask("/v1/models", Host=broken or "-").status == 403
    assert server.ask("/v1/models", Origin=server.url).status == 200
    with served(model, "-c", "256", "--cors-origins", "http://a.example") as open_one:
        reply = open_one.ask("/v1/models", Origin="http://a.example")
        assert reply.headers["Access-Control-Allow-Origin"] == "http://a.example"
        assert open_one.ask("/v1/models", Origin="http://b.example").status == 403


def test_the_most_tokens_of_an_answer(model: Path) -> None:
    with served(model, "-c", "512", "-n", "7") as server:
        for asked in ({}, {"max_tokens": 100}, {"max_tokens": -1}):
            reply = server.ask("/v1/completions", {"prompt": "one"} | asked).json
            assert reply["usage"]["completion_tokens"] == 7


def test_sigterm_lets_answers_finish(model: Path) -> None:
    with served(model, "-c", "32768") as server:
        asked = ENDLESS | {"max_tokens": 2000}
        with server.stream("/v1/completions", asked) as answer:
            data = data_of(answer)
            first = next(data)
            server.process.send_signal(signal.SIGTERM)
            last = [item for item in data if isinstance(item, dict)][-1]
        assert first and last["timings"]["predicted_n"] == 2000
        assert server.process.wait(30) == 143


def test_sigint_ends_answers(model: Path) -> None:
    with served(model, "-c", "32768") as server:
        with server.stream("/v1/completions", ENDLESS) as answer:
            data = data_of(answer)
            next(data)
            server.process.send_signal(signal.SIGINT)
            last = [item for item in data if isinstance(item, dict)][-1]
        assert last["error"]["code"] == 503
        assert server.process.wait(30) == 130


def test_an_idle_server_ends_at_once(model: Path) -> None:
    with served(model, "-c", "256") as server:
        assert "ready" in server.lines
        assert any(line.startswith("mode: ") for line in server.lines)
        with server.stream_get("/hobbit/events") as feed:
            next(data_of(feed))
            assert server.stop() == 143


def test_a_port_in_use_is_named(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = hobbit_serve(str(model), "--port", port)
    assert done.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use by process {os.getpid()} (" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("m.gguf", "x"), 2, "one model"),
        (("--max-body", "much"), 2, "much"),
        (("-n", "0"), 2, "-n 0"),
        (("--api-key-file", "nowhere"), 2, "nowhere"),
        (("--api-key", " "), 2, "empty"),
        (("nothing.gguf", "--port", "0"), 3, "nothing.gguf"),
        (("--host", "no such host", "--port", "0"), 2, "no such host"),
    ],
)
def test_bad_settings_are_one_line(arguments: tuple[str, ...], code: int, words: str) -> None:
    done = hobbit_serve(*arguments)
    assert done.returncode == code
    assert words in done.stderr and "Traceback" not in done.stderr


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, model: Path) -> None:
    (tmp_path / "starlette.py").write_text("raise ImportError('no', name='starlette')")
    done = hobbit_serve(str(model), env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert "pip install 'hobbit-moe[serve]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_options_have_the_flags_defaults() -> None:
    import inspect
    from dataclasses import fields

    flags = {n: p.default for n, p in inspect.signature(serve).parameters.items()}
    own = {f.name: f.default for f in fields(ServeOptions) if f.name != "loading"}
    shared = {f.name: f.default for f in fields(Options) if f.name in flags}
    assert not own.keys() & shared.keys() and own.keys() | shared.keys() == flags.keys()
    assert {n: d or None for n, d in (own | shared).items()} == {
        n: d or None for n, d in flags.items()
    }


def hobbit_serve(
    *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hobbit", "serve", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **(env or {})},
        check=False,
    )
