"""Libraries that build llama_cpp.Llama themselves, under hobbit.patch(): the text is stock's.

Not among the normal tests, for what it installs: scripts/test-ecosystem runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import programs
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests"))
import tiny  # from tests/

import hobbit

HERE = Path(__file__).parent
PROGRAMS = ["langchain_completion", "langchain_chat", "llama_index"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("eco") / "m.gguf", arch="qwen3moe")


@pytest.mark.filterwarnings("ignore")  # the libraries' own, and f16_kv, which LangChain passes
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_text_is_that_of_stock(name: str, model: Path) -> None:
    command = [sys.executable, str(HERE / "programs.py"), name, str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = json.loads(done.stdout.splitlines()[-1])
    assert len(expected) == 2 and all(expected)
    with hobbit.patch(memory="1G", cache_bytes="floor"):
        texts, llm = getattr(programs, name)(str(model))
    assert isinstance(llm, hobbit.Llama)
    assert llm.plan.mode == "streamed" and llm.stats.misses > 0
    assert texts == expected


def test_langchain_passes_our_arguments(model: Path) -> None:
    from langchain_community.chat_models import ChatLlamaCpp

    ours = {"memory": "1G"}
    with hobbit.patch(memory="2G"):
        llm = ChatLlamaCpp(model_path=str(model), n_ctx=256, model_kwargs=ours, **programs.COMMON)
    assert llm.client.plan.cap.bytes == 1 << 30
