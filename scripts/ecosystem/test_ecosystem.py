"""Libraries that build llama_cpp.Llama themselves, under hobbit.patch(): the text is stock's.

Not among the normal tests, for what it installs: scripts/test-ecosystem runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402 # from tests/

import hobbit  # noqa: E402

PROMPT = "it is the end of a day and they were not at home"
TOKENS = 24
# What the libraries are told and stock is too; `cache_bytes` makes sure that experts stream.
SAME = {"n_ctx": 256, "n_threads": 1, "n_batch": 64, "seed": 7, "verbose": False}

STOCK = """
import json, runpy, sys
stock = runpy.run_path(sys.argv[1])
path, arguments, call, given = json.loads(sys.argv[2])
with stock["plain_llama"](path, arguments, extra_buffers=False) as llm:
    answer = getattr(llm, call)(**given)["choices"][0]
print(json.dumps(answer["message"]["content"] if "message" in answer else answer["text"]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("eco") / "m.gguf", arch="qwen3moe")


@pytest.fixture
def patched() -> Iterator[list[hobbit.Llama]]:
    """Patch, and collect the models that are made."""
    made: list[hobbit.Llama] = []
    with hobbit.patch(memory="1G", cache_bytes="floor", on_plan=lambda plan: made.append(plan)):
        yield made


def stock(model: Path, call: str, **given: object) -> str:
    """Return what plain llama-cpp-python says, in a process without hobbit."""
    job = json.dumps([str(model), SAME, call, given])
    command = [sys.executable, "-c", STOCK, str(ROOT / "hobbit" / "stock.py"), job]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: str = json.loads(done.stdout.splitlines()[-1])
    assert answer
    return answer


def test_langchain_completion(model: Path, patched: list[hobbit.Llama]) -> None:
    from langchain_community.llms import LlamaCpp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # f16_kv, which llama.cpp no longer has
        llm = LlamaCpp(model_path=str(model), max_tokens=TOKENS, temperature=0.0, **SAME)
    assert isinstance(llm.client, hobbit.Llama)
    assert [plan.mode for plan in patched] == ["streamed"]
    expected = stock(model, "create_completion", prompt=PROMPT, max_tokens=TOKENS, temperature=0.0)
    assert llm.invoke(PROMPT) == expected
    assert "".join(llm.stream(PROMPT)) == expected
    assert llm.client.stats.misses > 0


def test_langchain_chat(model: Path, patched: list[hobbit.Llama]) -> None:
    from langchain_community.chat_models import ChatLlamaCpp

    llm = ChatLlamaCpp(model_path=str(model), max_tokens=TOKENS, temperature=0.0, **SAME)
    assert isinstance(llm.client, hobbit.Llama)
    messages = [{"role": "user", "content": PROMPT}]
    expected = stock(
        model, "create_chat_completion", messages=messages, max_tokens=TOKENS, temperature=0.0
    )
    assert llm.invoke(PROMPT).content == expected
    assert "".join(str(chunk.content) for chunk in llm.stream(PROMPT)) == expected


def test_langchain_passes_our_arguments(model: Path) -> None:
    from langchain_community.chat_models import ChatLlamaCpp

    with hobbit.patch(memory="2G"):
        llm = ChatLlamaCpp(model_path=str(model), model_kwargs={"memory": "1G"}, **SAME)
    assert llm.client.plan.cap.bytes == 1 << 30


def test_llama_index(model: Path, patched: list[hobbit.Llama]) -> None:
    from llama_index.llms.llama_cpp import LlamaCPP

    told = {name: value for name, value in SAME.items() if name not in ("n_ctx", "verbose")}
    llm = LlamaCPP(
        model_path=str(model),
        temperature=0.0,
        max_new_tokens=TOKENS,
        context_window=SAME["n_ctx"],
        model_kwargs=told,
        verbose=False,
    )
    assert isinstance(llm._model, hobbit.Llama)
    expected = stock(model, "create_completion", prompt=PROMPT, max_tokens=TOKENS, temperature=0.0)
    assert llm.complete(PROMPT, formatted=True).text == expected
    streamed = [part.delta for part in llm.stream_complete(PROMPT, formatted=True)]
    assert "".join(streamed) == expected
