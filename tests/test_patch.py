"""hobbit.patch: what llama_cpp.Llama(...) makes under it, and after it."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
import tiny
from llama_cpp import Llama as imported_before

import hobbit

GIB = 1 << 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.make_text_model(tmp_path_factory.mktemp("patch") / "m.gguf", arch="qwen3moe"))


def made(model: str, kind: Any = None, **more: Any) -> Any:
    kind = kind or llama_cpp.Llama
    return kind(model_path=model, n_ctx=64, n_threads=1, verbose=False, **more)


def test_in_a_block_and_after_it(model: str) -> None:
    with hobbit.patch(memory="1G"):
        from llama_cpp import Llama as imported_within

        for kind in (llama_cpp.Llama, imported_before, imported_within, llama_cpp.llama.Llama):
            llm = made(model, kind)
            assert isinstance(llm, hobbit.Llama) and llm.plan.cap.bytes == GIB
    for kind in (llama_cpp.Llama, imported_before, imported_within):
        assert type(made(model, kind)) is llama_cpp.Llama


def test_a_plain_call_holds_until_it_is_undone(model: str) -> None:
    patch = hobbit.patch(memory="1G")
    try:
        assert isinstance(made(model), hobbit.Llama)
    finally:
        patch.undo()
    assert type(made(model)) is llama_cpp.Llama
    patch.undo()


def test_an_exception_undoes_it(model: str) -> None:
    with pytest.raises(ZeroDivisionError), hobbit.patch(memory="1G"):
        _ = 1 / 0
    assert type(made(model)) is llama_cpp.Llama


def test_nested(model: str) -> None:
    with hobbit.patch(memory="1G", policy="lru") as outer:
        with hobbit.patch(memory="2G"):
            llm = made(model)
            assert (llm.plan.cap.bytes, llm.policy.name) == (2 * GIB, "lru")
        assert made(model).plan.cap.bytes == GIB
        inner = hobbit.patch(memory="3G")
        outer.undo()  # whichever is undone first
        llm = made(model)
        assert (llm.plan.cap.bytes, llm.policy.name) == (3 * GIB, "decay")
        inner.undo()
    assert type(made(model)) is llama_cpp.Llama


def test_what_the_code_says_itself_counts_more(model: str) -> None:
    with hobbit.patch(memory="1G", n_ctx=256):
        llm = made(model, memory="2G")
        assert llm.plan.cap.bytes == 2 * GIB and llm.n_ctx() == made(model).n_ctx()
        assert llama_cpp.Llama(model_path=model, n_threads=1).n_ctx() == 256


def test_other_classes_stay_what_they_are(model: str) -> None:
    class Derived(llama_cpp.Llama):  # type: ignore[misc]
        pass

    with hobbit.patch(memory="1G"):
        assert type(made(model, Derived)) is Derived
        ours = made(model, hobbit.Llama, memory="2G")
        assert type(ours) is hobbit.Llama and ours.plan.cap.bytes == 2 * GIB


def test_other_threads(model: str) -> None:
    found: list[Any] = []
    with hobbit.patch(memory="1G"):
        thread = threading.Thread(target=lambda: found.append(made(model)))
        thread.start()
        thread.join()
    assert isinstance(found[0], hobbit.Llama)


def test_patches_from_many_threads(model: str) -> None:
    """Each ends its own; when all have ended there is none."""
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(200):
            with hobbit.patch(memory="1G"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert type(made(model)) is llama_cpp.Llama


def test_a_copy_does_not_need_the_patch(model: str) -> None:
    with hobbit.patch(memory="1G"):
        data = pickle.dumps(made(model))
    again = pickle.loads(data)
    assert isinstance(again, hobbit.Llama) and again.plan.cap.bytes == GIB


def test_the_text_is_hobbits(model: str) -> None:
    asked = {"prompt": "it is", "max_tokens": 12, "temperature": 0.0}
    expected = made(model, hobbit.Llama).create_completion(**asked)["choices"][0]["text"]
    with hobbit.patch(cache_bytes="floor", memory="1G"):
        llm = made(model)
    assert llm.create_completion(**asked)["choices"][0]["text"] == expected
    assert llm.plan.mode == "streamed" and llm.stats.misses > 0


def test_wrong_arguments() -> None:
    for name in ("memroy", "model_path"):
        with pytest.raises(TypeError, match=f"patch.. has no argument '{name}'"):
            hobbit.patch(**{name: 1})


def test_the_package_has_it_under_its_name(model: str) -> None:
    """Not the module that it comes from."""
    assert "patch" in hobbit.__all__ and callable(hobbit.patch)
    assert Path(model).exists()
