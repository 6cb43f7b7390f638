"""hobbit.Llama is llama_cpp.Llama: the same arguments, methods and answers, plus ours.

Answers are compared with llama_cpp's own class on the same tiny model, with the smallest cache.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny
from gates import Bench, opened
from llama_cpp import _internals
from llama_cpp import llama_cpp as api
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

import hobbit
from hobbit.stock import plain_llama

ARGUMENTS: dict[str, Any] = {
    "n_ctx": 256,
    "n_batch": 64,
    "n_ubatch": 32,
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
}
THE = 259  # the first word of tiny.vocabulary
PROMPT = "the cat is on a mat and it was not by the sea"


@pytest.fixture(scope="module")
def path(bench: Bench) -> Path:
    return bench.model("text", lambda path: tiny.make_text_model(path, chat=True))


@pytest.fixture(scope="module")
def plain(path: Path) -> Iterator[llama_cpp.Llama]:
    with plain_llama(str(path), ARGUMENTS) as llm:
        yield llm


@pytest.fixture(scope="module")
def ours(path: Path) -> Iterator[hobbit.Llama]:
    with hobbit.Llama(str(path), cache_bytes="floor", **ARGUMENTS) as llm:
        yield llm


def undated(answer: Any) -> Any:
    """Drop what differs from call to call."""
    return {k: v for k, v in answer.items() if k not in ("id", "created", "model")}


def last_logits(llm: llama_cpp.Llama) -> bytes:
    row = api.llama_get_logits_ith(llm._ctx.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).tobytes()


class TestSignature:
    def test_upstream_arguments(self) -> None:
        """Every argument of the parent, with its kind and default, but for `verbose`."""
        upstream = inspect.signature(llama_cpp.Llama).parameters
        mine = inspect.signature(hobbit.Llama).parameters
        for name, parameter in upstream.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            assert name in mine, name
            assert mine[name].kind == parameter.kind, name
            if name != "verbose":
                assert mine[name].default == parameter.default, name
        assert mine["verbose"].default is False

    def test_own_arguments_are_keywords(self) -> None:
        mine = inspect.signature(hobbit.Llama).parameters
        own = set(mine) - set(inspect.signature(llama_cpp.Llama).parameters)
        assert {"memory", "cache_bytes", "io", "io_threads"} <= own
        assert all(mine[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)

    def test_methods_are_the_parents(self) -> None:
        for name, method in inspect.getmembers(llama_cpp.Llama, inspect.isfunction):
            if name.startswith("_") or name not in vars(hobbit.Llama):
                continue
            parameters = inspect.signature(method).parameters
            mine = inspect.signature(getattr(hobbit.Llama, name)).parameters
            kinds = {p.kind for p in mine.values()}
            passed_on = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
            assert passed_on or list(mine) == list(parameters), name

    @pytest.mark.parametrize(
        ("name", "near"), [("n_ctxx", "n_ctx"), ("memmory", "memory"), ("nthreads", "n_threads")]
    )
    def test_unknown_argument(self, path: Path, name: str, near: str) -> None:
        with pytest.raises(TypeError, match=f"no argument '{name}'; did you mean '{near}'"):
            hobbit.Llama(str(path), **{name: 1})  # type: ignore[arg-type]

    def test_unknown_argument_like_nothing(self, path: Path) -> None:
        with pytest.raises(TypeError, match=r"no argument 'xyzzy'$"):
            hobbit.Llama(str(path), xyzzy=1)

    def test_dead_argument_warns(self, path: Path) -> None:
        with (
            pytest.warns(UserWarning, match="f16_kv"),
            hobbit.Llama(str(path), f16_kv=True, cache_bytes="floor", **ARGUMENTS) as llm,
        ):
            assert llm.n_ctx() == 256

    def test_bad_io(self, path: Path) -> None:
        with pytest.raises(hobbit.UsageError, match="direct or buffered"):
            hobbit.Llama(str(path), io="mmap")  # type: ignore[arg-type]


COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 24},
    "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 7, "max_tokens": 24},
    "penalised": {"temperature": 0.0, "repeat_penalty": 1.3, "max_tokens": 16},
    "mirostat": {"mirostat_mode": 2, "seed": 3, "max_tokens": 12},
    "echo": {"echo": True, "temperature": 0.0, "max_tokens": 6},
    "biased": {"logit_bias": {"270": 50.0}, "temperature": 0.0, "max_tokens": 6},
    "nothing": {"max_tokens": 0, "temperature": 0.0, "echo": True},
}


class TestCompletion:
    @pytest.mark.parametrize("name", COMPLETIONS)
    def test_same_answer(self, name: str, plain: llama_cpp.Llama, ours: hobbit.Llama) -> None:
        options = COMPLETIONS[name]
        expected = plain.create_completion(PROMPT, **options)
        assert undated(ours.create_completion(PROMPT, **options)) == undated(expected)
        assert undated(ours(PROMPT, **options)) == undated(expected)

    def test_default_arguments(self, path: Path) -> None:
        options = {"max_tokens": 8, "temperature": 0.0}
        with plain_llama(str(path), {"verbose": False}) as llm:
            expected = undated(llm.create_completion(PROMPT, **options))
        with hobbit.Llama(str(path)) as llm:
            assert undated(llm.create_completion(PROMPT, **options)) == expected
            assert llm.plan.mode == "resident-experts"

    def test_says_something(self, ours: hobbit.Llama) -> None:
        answer = ours.create_completion(PROMPT, max_tokens=24, temperature=0.0)
        text = answer["choices"][0]["text"]
        assert len(set(text.split())) > 3
        assert answer["usage"]["completion_tokens"] == 24

    def test_stop(self, plain: llama_cpp.Llama, ours: hobbit.Llama) -> None:
        text = plain.create_completion(PROMPT, max_tokens=24, temperature=0.0)["choices"][0]["text"]
        stop = text.split()[5]
        options = {"max_tokens": 24, "temperature": 0.0, "stop": [stop]}
        answer = ours.create_completion(PROMPT, **options)
        assert undated(answer) == undated(plain.create_completion(PROMPT, **options))
        assert answer["choices"][0]["finish_reason"] == "stop"

    @pytest.mark.parametrize("name", ["greedy", "sampled"])
    def test_stream(self, name: str, plain: llama_cpp.Llama, ours: hobbit.Llama) -> None:
        options = COMPLETIONS[name] | {"stream": True}
        expected = [undated(chunk) for chunk in plain.create_completion(PROMPT, **options)]
        assert [undated(chunk) for chunk in ours.create_completion(PROMPT, **options)] == expected
        assert len(expected) > 5

    def test_abandoned_stream(self, ours: hobbit.Llama) -> None:
        """A caller that stops listening leaves a model that works."""
        options = {"max_tokens": 24, "temperature": 0.0}
        whole = ours.create_completion(PROMPT, **options)
        stream = ours.create_completion(PROMPT, stream=True, **options)
        next(stream)
        stream.close()
        assert undated(ours.create_completion(PROMPT, **options)) == undated(whole)

    def test_grammar(self, plain: llama_cpp.Llama, ours: hobbit.Llama) -> None:
        text = 'root ::= (" the" | " sea" | " he") " was" " not"'
        answers = []
        for llm in (plain, ours):
            grammar = llama_cpp.LlamaGrammar.from_string(text, verbose=False)
            answer = llm.create_completion(PROMPT, grammar=grammar, max_tokens=24, temperature=0.0)
            answers.append(undated(answer))
        assert answers[0] == answers[1]
        assert answers[1]["choices"][0]["text"].endswith(" was not")

    def test_logits_processor(self, ours: hobbit.Llama) -> None:
        seen = []

        def only_the(tokens: Any, scores: Any) -> Any:
            seen.append(len(tokens))
            scores[:] = -np.inf
            scores[THE] = 0
            return scores

        processors = llama_cpp.LogitsProcessorList([only_the])
        answer = ours.create_completion(PROMPT, logits_processor=processors, max_tokens=3)
        assert answer["choices"][0]["text"] == " the the the"
        assert len(seen) == 3

    def test_logprobs(self, path: Path) -> None:
        options = {"max_tokens": 5, "logprobs": 3, "temperature": 0.0}
        arguments = ARGUMENTS | {"logits_all": True}
        with plain_llama(str(path), arguments) as llm:
            expected = undated(llm.create_completion(PROMPT, **options))
        with hobbit.Llama(str(path), cache_bytes="floor", **arguments) as llm:
            assert undated(llm.create_completion(PROMPT, **options)) == expected
        assert len(expected["choices"][0]["logprobs"]["token_logprobs"]) == 5


class TestChat:
    MESSAGES = (
        {"role": "system", "content": "be the sea"},
        {"role": "user", "content": "was it not?"},
    )

    def test_template_is_the_models(self, ours: hobbit.Llama) -> None:
        assert ours.chat_format == "chat_template.default"
        assert ours.metadata["tokenizer.chat_template"] == tiny.CHAT_TEMPLATE

    @pytest.mark.parametrize("stream", [False, True])
    def test_same_answer(self, stream: bool, plain: llama_cpp.Llama, ours: hobbit.Llama) -> None:
        answers = []
        for llm in (plain, ours):
            answer = llm.create_chat_completion(
                [*self.MESSAGES], max_tokens=16, temperature=0.0, stream=stream
            )
            answers.append([undated(chunk) for chunk in answer] if stream else undated(answer))
        assert answers[0] == answers[1]

    def test_json_mode(self, plain: llama_cpp.Llama, ours: hobbit.Llama) -> None:
        answers = [
            llm.create_chat_completion(
                [*self.MESSAGES],
                response_format={
                    "type": "json_object",
                    "schema": {"type": "object", "properties": {"a": {"enum": ["he", "she"]}}},
                },
                max_tokens=40,
                temperature=0.0,
            )
            for llm in (plain, ours)
        ]
        assert undated(answers[0]) == undated(answers[1])
        assert answers[1]["choices"][0]["message"]["content"].startswith("{")


class TestArguments:
    """Arguments that change what is computed do so in both classes alike."""

    CASES: ClassVar[dict[str, dict[str, Any]]] = {
        "overridden-top-k": {"kv_overrides": {"llama.expert_used_count": 5}},
        "quantised-kv": {"flash_attn": True, "type_k": 8, "type_v": 8},
        "flash": {"flash_attn": True},
        "whole-context": {"n_ctx": 0},
        "gpu-layers": {"n_gpu_layers": -1},
        "rope": {"rope_freq_base": 500000.0, "rope_freq_scale": 0.5},
        "no-mmap": {"use_mmap": False},
        "lookup": {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=4), "logits_all": True},
        "chat-format": {"chat_format": "chatml"},
    }

    @pytest.mark.parametrize("name", CASES)
    def test_same_answer(self, name: str, path: Path) -> None:
        arguments = ARGUMENTS | self.CASES[name]
        options = {"max_tokens": 16, "temperature": 0.0}
        with plain_llama(str(path), arguments) as llm:
            expected = undated(llm.create_completion(PROMPT, **options))
            n_ctx = llm.n_ctx()
        with hobbit.Llama(str(path), cache_bytes="floor", **arguments) as llm:
            assert undated(llm.create_completion(PROMPT, **options)) == expected
            assert llm.n_ctx() == n_ctx

    def test_all_logits(self, path: Path) -> None:
        arguments = ARGUMENTS | {"logits_all": True}
        tokens = list(range(3, 83))
        with plain_llama(str(path), arguments) as llm:
            llm.eval(tokens)
            expected = llm.scores[: len(tokens)].copy()
        with hobbit.Llama(str(path), cache_bytes="floor", **arguments) as llm:
            llm.eval(tokens)
            assert llm.scores[: len(tokens)].tobytes() == expected.tobytes()

    def test_embeddings(self, path: Path) -> None:
        arguments = ARGUMENTS | {"embedding": True}
        texts = ["the cat", "a sea of it", PROMPT]
        with plain_llama(str(path), arguments) as llm:
            expected = llm.create_embedding(texts)
        with hobbit.Llama(str(path), cache_bytes="floor", **arguments) as llm:
            assert llm.create_embedding(texts) == expected
            assert llm.stats.misses > 0

    def test_embedding_model(self, bench: Bench) -> None:
        """An encoder with experts, which has no logits to compare."""
        arch = "nomic-bert-moe"
        keys = {
            f"{arch}.moe_every_n_layers": 2,
            f"{arch}.expert_gating_func": 1,
            f"{arch}.attention.causal": False,
            f"{arch}.pooling_type": 1,
            "tokenizer.ggml.token_type_count": 2,
        }
        path = bench.arch(arch, n_layer=4, kv=keys)
        arguments = ARGUMENTS | {"embedding": True, "n_batch": 128, "n_ubatch": 128}
        texts = ["the cat", "a sea of it", PROMPT]
        with plain_llama(str(path), arguments) as llm:
            expected = llm.create_embedding(texts)
        with hobbit.Llama(str(path), cache_bytes="floor", **arguments) as llm:
            assert llm.create_embedding(texts) == expected
            assert llm.stats.evictions > 0

    def test_vocabulary_only(self, path: Path, plain: llama_cpp.Llama) -> None:
        with hobbit.Llama(str(path), vocab_only=True, verbose=False) as llm:
            assert llm.tokenize(PROMPT.encode()) == plain.tokenize(PROMPT.encode())


class TestLora:
    def adapter(self, folder: Path, tensor: str, n_in: int, n_out: int) -> Path:
        rng = np.random.default_rng(5)
        writer = gguf.GGUFWriter(str(folder / "lora.gguf"), "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)
        a = rng.standard_normal((4, n_in), dtype=np.float32)
        b = rng.standard_normal((n_out, 4), dtype=np.float32)
        if "exps" in tensor:
            a, b = np.stack([a] * 8), np.stack([b] * 8)
        writer.add_tensor(f"{tensor}.lora_a", a)
        writer.add_tensor(f"{tensor}.lora_b", b)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return folder / "lora.gguf"

    def test_dense_weights(self, path: Path, tmp_path: Path) -> None:
        lora = self.adapter(tmp_path, "blk.0.attn_q.weight", 128, 128)
        arguments = ARGUMENTS | {"lora_path": str(lora), "logits_all": True}
        tokens = list(range(3, 43))
        with plain_llama(str(path), arguments) as llm:
            llm.eval(tokens)
            expected = llm.scores[:40].copy()
        with hobbit.Llama(str(path), cache_bytes="floor", **arguments) as llm:
            llm.eval(tokens)
            assert llm.scores[:40].tobytes() == expected.tobytes()

    def test_expert_weights_are_refused(self, path: Path, tmp_path: Path) -> None:
        lora = self.adapter(tmp_path, "blk.0.ffn_up_exps.weight", 128, 128)
        with pytest.raises(hobbit.UnsupportedModelError, match="merge the adapter"):
            hobbit.Llama(str(path), lora_path=str(lora), cache_bytes="floor", **ARGUMENTS)


class TestState:
    def test_save_and_load(self, plain: llama_cpp.Llama, ours: hobbit.Llama) -> None:
        found = []
        for llm in (plain, ours):
            llm.reset()
            llm.eval(llm.tokenize(PROMPT.encode()))
            state = llm.save_state()
            llm.eval([THE])
            found.append(last_logits(llm))
            llm.eval([THE + 1, THE + 2])
            llm.load_state(state)
            llm.eval([THE])
            found.append(last_logits(llm))
        assert len(set(found)) == 1

    def test_prompt_cache(self, ours: hobbit.Llama) -> None:
        options = {"max_tokens": 8, "temperature": 0.0}
        expected = undated(ours.create_completion(PROMPT, **options))
        ours.set_cache(llama_cpp.LlamaRAMCache())
        try:
            for _ in range(2):
                assert undated(ours.create_completion(PROMPT, **options)) == expected
        finally:
            ours.set_cache(None)

    def test_pickle(self, path: Path) -> None:
        with hobbit.Llama(str(path), cache_bytes="floor", io="buffered", **ARGUMENTS) as llm:
            expected = llm.create_completion(PROMPT, max_tokens=8, temperature=0.0)
            copy = pickle.loads(pickle.dumps(llm))
        with copy:
            assert isinstance(copy, hobbit.Llama)
            assert copy.stats.io == "buffered"
            assert copy.plan.cache_bytes == llm.plan.cache_bytes
            answer = copy.create_completion(PROMPT, max_tokens=8, temperature=0.0)
            assert undated(answer) == undated(expected)


class TestLifetime:
    def test_close_twice(self, path: Path) -> None:
        llm = hobbit.Llama(str(path), cache_bytes="floor", **ARGUMENTS)
        llm.close()
        llm.close()

    def test_context_manager(self, path: Path) -> None:
        with hobbit.Llama(str(path), cache_bytes="floor", **ARGUMENTS) as llm:
            assert isinstance(llm, llama_cpp.Llama)
        assert llm._model.model is None

    @pytest.mark.parametrize("kind", [str, Path])
    def test_odd_path(self, path: Path, tmp_path: Path, kind: Any) -> None:
        odd = tmp_path / "a b" / "modèle %s 🐑.gguf"
        odd.parent.mkdir()
        odd.write_bytes(path.read_bytes())
        with hobbit.Llama(kind(odd), cache_bytes="floor", **ARGUMENTS) as llm:
            assert llm.create_completion("the", max_tokens=2)["model"] == str(odd)

    def test_relative_path(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(path.parent)
        with hobbit.Llama(path.name, cache_bytes="floor", **ARGUMENTS) as llm:
            monkeypatch.chdir("/")
            assert llm.create_completion("the", max_tokens=2)["choices"]

    def test_failed_constructor_leaves_nothing(self, path: Path, tmp_path: Path) -> None:
        before = (api.llama_model_load_from_file, api.llama_init_from_model)
        broken = tmp_path / "broken.gguf"
        tiny.make(broken, "llama", file_kv={"llama.block_count": 9})
        with pytest.raises(hobbit.UnsupportedModelError, match="cannot load it"):
            hobbit.Llama(str(broken), cache_bytes="floor", **ARGUMENTS)
        assert (api.llama_model_load_from_file, api.llama_init_from_model) == before
        with hobbit.Llama(str(path), cache_bytes="floor", **ARGUMENTS) as llm:
            assert llm.create_completion("the", max_tokens=1)["choices"]

    def test_absent_file(self, tmp_path: Path) -> None:
        """A ValueError, as llama_cpp raises it."""
        with pytest.raises(ValueError, match="absent") as info:
            hobbit.Llama(str(tmp_path / "absent.gguf"))
        assert isinstance(info.value, hobbit.ModelError)

    def test_no_tokenizer(self, bench: Bench) -> None:
        """llama.cpp would abort the process."""
        path = bench.arch("qwen3moe", kv={"tokenizer.ggml.model": "no_vocab"})
        with (
            hobbit.Llama(str(path), **ARGUMENTS) as llm,
            pytest.raises(hobbit.UnsupportedModelError, match="no tokenizer"),
        ):
            llm.create_completion(PROMPT)

    def test_cap_below_the_floor(self, path: Path) -> None:
        with pytest.raises(MemoryError) as info:
            hobbit.Llama(str(path), memory="1M", **ARGUMENTS)
        assert isinstance(info.value, hobbit.PlanError)
        assert "\n" not in str(info.value)
        with hobbit.Llama(str(path), memory=info.value.needed_bytes, **ARGUMENTS) as llm:
            assert llm.plan.mode in ("streamed", "resident-experts")

    def test_plan_before_allocation(self, path: Path) -> None:
        plans = []

        def look(plan: Any) -> None:
            plans.append(plan)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            hobbit.Llama(str(path), on_plan=look, **ARGUMENTS)
        assert plans[0].cache_bytes > 0


class TestStats:
    def test_counts(self, path: Path) -> None:
        with hobbit.Llama(str(path), cache_bytes="floor", **ARGUMENTS) as llm:
            assert llm.stats.tokens_prompt == llm.stats.tokens_generated == 0
            answer = llm.create_completion(PROMPT, max_tokens=6, temperature=0.0)
            stats = llm.stats
            assert stats.tokens_prompt == answer["usage"]["prompt_tokens"]
            assert stats.tokens_generated == answer["usage"]["completion_tokens"] - 1
            assert stats.misses > 0 and stats.read_bytes > 0
            assert stats.prompt_s > 0 and stats.decode_s > 0
            again = llm.stats.minus(stats)
            assert (again.misses, again.read_bytes, again.tokens_prompt) == (0, 0, 0)

    def test_read_bytes_are_experts(self, path: Path) -> None:
        with opened(path, "floor") as llm:
            llm.eval([5, 6, 7, 8])
            assert llm.stats.read_bytes == llm.stats.misses * llm.layout.groups[0].expert_bytes


class TestPatchPoint:
    """What hobbit replaces while the parent's constructor runs; fails when upstream moves."""

    def test_pinned_version(self) -> None:
        assert llama_cpp.__version__ == "0.3.36"

    def test_the_constructor_loads_through_two_calls(self) -> None:
        model = inspect.getsource(_internals.LlamaModel.__init__)
        assert model.count("llama_cpp.llama_model_load_from_file(") == 1
        assert model.count("llama_model_load") == 1
        context = inspect.getsource(_internals.LlamaContext.__init__)
        assert context.count("llama_cpp.llama_init_from_model(") == 1
        constructor = inspect.getsource(llama_cpp.Llama.__init__)
        assert constructor.count("internals.LlamaModel(") == 1
        assert constructor.count("internals.LlamaContext(") == 1
        assert "load_from" not in constructor

    def test_each_call_happens_once(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        load = hobbit.Llama._load

        def counted(self: hobbit.Llama, params: Any) -> int:
            calls.append(params)
            return load(self, params)

        monkeypatch.setattr(hobbit.Llama, "_load", counted)
        before = (api.llama_model_load_from_file, api.llama_init_from_model)
        with hobbit.Llama(str(path), cache_bytes="floor", **ARGUMENTS) as llm:
            assert llm.plan.mode == "streamed"
            assert len(calls) == 1
            assert (api.llama_model_load_from_file, api.llama_init_from_model) == before

    def test_parent_still_works_beside(self, path: Path, ours: hobbit.Llama) -> None:
        with plain_llama(str(path), ARGUMENTS) as llm:
            assert not isinstance(llm, hobbit.Llama)
            assert llm.create_completion("the", max_tokens=1)["choices"]


class TestFromPretrained:
    @pytest.fixture
    def hub(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """Stand in for huggingface_hub, which the tests do not install."""
        downloads: list[dict[str, Any]] = []

        def download(**wanted: Any) -> str:
            downloads.append(wanted)
            return str(path)

        class Files:
            def ls(self, repo: str, recursive: bool) -> list[dict[str, str]]:
                assert recursive
                return [{"name": f"{repo}/README.md"}, {"name": f"{repo}/{path.name}"}]

        hub, utils = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.utils")
        hub.hf_hub_download, hub.HfFileSystem = download, Files  # type: ignore[attr-defined]
        utils.validate_repo_id = lambda repo: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setitem(sys.modules, "huggingface_hub.utils", utils)
        return downloads

    def test_loads_what_was_downloaded(self, hub: list[dict[str, Any]], path: Path) -> None:
        with hobbit.Llama.from_pretrained(
            "someone/model", "*.gguf", cache_bytes="floor", **ARGUMENTS
        ) as llm:
            assert isinstance(llm, hobbit.Llama)
            assert llm.plan.mode == "streamed"
        assert hub[0]["repo_id"] == "someone/model"
        assert hub[0]["filename"] == path.name

    def test_no_such_file(self, hub: list[dict[str, Any]]) -> None:
        with pytest.raises(ValueError, match="No file found"):
            hobbit.Llama.from_pretrained("someone/model", "*.bin")
        assert hub == []


def test_a_context_that_llama_cpp_rounds_up(path: Path) -> None:
    """It can be used whole: llama_cpp.Llama itself has room for what was asked for only."""
    tokens = [THE + i % 40 for i in range(200)]
    found = []
    for n_ctx in (64, 256):
        arguments = ARGUMENTS | {"n_ctx": n_ctx, "logits_all": True}
        with hobbit.Llama(str(path), cache_bytes="floor", **arguments) as llm:
            assert llm.n_ctx() == 256
            llm.eval(tokens)
            found.append(np.array(llm.scores[: len(tokens)]))
            assert list(llm.eval_tokens) == tokens
    assert (found[0] == found[1]).all() and found[0].any()
