"""Small programs that build llama_cpp.Llama through a library, and know nothing of hobbit.

As a script: `programs.py NAME MODEL` prints as JSON what one of them says on plain llama.cpp.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import llama_cpp.llama_cpp as api

PROMPT = "it is the end of a day and they were not at home"
TOKENS = 24
COMMON: dict[str, Any] = {"n_threads": 1, "n_batch": 64, "seed": 7}

Said = tuple[list[str], object]  # what was answered, whole and streamed; and the llama_cpp.Llama


def langchain_completion(path: str) -> Said:
    from langchain_community.llms import LlamaCpp

    llm = LlamaCpp(model_path=path, n_ctx=256, max_tokens=TOKENS, temperature=0.0, **COMMON)
    return [llm.invoke(PROMPT), "".join(llm.stream(PROMPT))], llm.client


def langchain_chat(path: str) -> Said:
    from langchain_community.chat_models import ChatLlamaCpp

    llm = ChatLlamaCpp(model_path=path, n_ctx=256, max_tokens=TOKENS, temperature=0.0, **COMMON)
    streamed = "".join(str(chunk.content) for chunk in llm.stream(PROMPT))
    return [str(llm.invoke(PROMPT).content), streamed], llm.client


def llama_index(path: str) -> Said:
    from llama_index.llms.llama_cpp import LlamaCPP

    llm = LlamaCPP(
        model_path=path,
        temperature=0.0,
        max_new_tokens=TOKENS,
        context_window=256,
        model_kwargs=COMMON,
        verbose=False,
    )
    streamed = [str(part.delta) for part in llm.stream_complete(PROMPT, formatted=True)]
    return [llm.complete(PROMPT, formatted=True).text, "".join(streamed)], llm._model


def plainly() -> None:
    """Turn llama.cpp's repacked weights off, as in every comparison of hobbit's."""
    default_params = api.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = default_params()
        params.use_extra_bufts = False
        return params

    api.llama_model_default_params = without_extra_buffers


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    plainly()
    print(json.dumps(globals()[sys.argv[1]](sys.argv[2])[0]))
