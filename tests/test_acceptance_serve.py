"""What else the server must show: patience, and that being watched changes nothing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tiny
from serving import Server, data_of, loopback_only, served

no_network = loopback_only  # in place of the one in conftest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that reads a long prompt slowly: 16 tokens at a time, on one thread."""
    model = tiny.make_text_model(tmp_path_factory.mktemp("serve") / "m.gguf", chat=True)
    with served(model, "-c", "32768", "-ub", "16", "-b", "16", "--sse-ping", "0.05") as running:
        yield running


def long_prompt(seed: int) -> list[int]:
    """Token ids, of which the server knows none yet."""
    return [300 + seed, *(300 + i % 7 for i in range(12_000))]


def test_a_client_with_little_patience_outlives_a_slow_prompt(server: Server) -> None:
    """A client's timeout is for the time between two signs of life: comments are such.

    Stands for 10 s and a prompt of minutes; here the prompt takes at least thrice the timeout.
    """
    asked: dict[str, Any] = {"model": "m", "max_tokens": 2, "temperature": 0}
    body = {"prompt": long_prompt(1), "max_tokens": 2, "stream": True, "temperature": 0}
    start = time.perf_counter()
    with server.stream("/v1/completions", body) as answer:
        for item in data_of(answer):
            if isinstance(item, dict) and item["choices"][0]["text"]:
                break
    first_token = time.perf_counter() - start
    patience = first_token / 4
    client = openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0,
        timeout=openai.Timeout(patience, connect=30),
    )  # fmt: skip
    start = time.perf_counter()
    stream = client.completions.create(prompt=long_prompt(2), stream=True, **asked)
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text
    assert time.perf_counter() - start > 2 * patience
    # It is the comments that keep it: an answer in one piece comes too late.
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(prompt=long_prompt(3), **asked)
    server.until(server.slot_is_free, "free after the client has gone")


def test_an_answer_does_not_depend_on_who_watches(server: Server) -> None:
    body = {"prompt": "one two", "max_tokens": 600, "temperature": 0, "stream": True}

    def text() -> str:
        with server.stream("/v1/completions", body) as answer:
            found = [item for item in data_of(answer) if isinstance(item, dict)]
        assert found[-1]["timings"]["predicted_n"] == 600
        return "".join(item["choices"][0]["text"] for item in found if item["choices"])

    alone = text()
    done = threading.Event()
    asked: dict[str, int] = {}

    def watch() -> None:
        while not done.is_set():
            for path in ("/v1/models", "/health", "/metrics", "/slots"):
                assert server.ask(path).status == 200
                asked[path] = asked.get(path, 0) + 1

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    try:
        watched = text()
    finally:
        done.set()
        for watcher in watchers:
            watcher.join()
    assert watched == alone
    assert min(asked.values()) > 2


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"7", b'{"prompt": 7}', b'{"messages": []}', b"\xff\xfe",
     b'{"prompt": "x", "max_tokens": "many"}', b'{"prompt": "x", "temperature": NaN}',
     b'{"prompt": "x", "stop": 7}', b'{"messages": [{"role": 5}]}', b"[" * 50_000],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/completion"])
def test_a_body_that_makes_no_sense(server: Server, path: str, body: bytes) -> None:
    reply = server.ask(path, body)
    if reply.status == 200:  # what one of them does not know, it leaves aside
        assert body.startswith(b'{"')
        return
    assert reply.status == 400, reply.body
    error = json.loads(reply.body)["error"]
    assert error["message"] and "Traceback" not in error["message"]
