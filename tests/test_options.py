from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from hobbit.cpus import physical_cores
from hobbit.errors import UsageError
from hobbit.generate import Sampling
from hobbit.options import (
    DEMO_TOKENS,
    KV_TYPES,
    MAX_SEED,
    EvalOptions,
    Options,
    TraceOptions,
    grammar,
    model_arguments,
    read_prompt,
    sampling,
    system_prompt,
)


def own(options: Options, **metadata: Any) -> Sampling:
    """Resolve the sampling settings for a model with this metadata."""
    return sampling(options, metadata.get)


def test_model_and_prompt_of_the_words() -> None:
    assert Options().model_name is None
    assert Options(words=("m.gguf", "a", "b")).model_name == "m.gguf"
    assert Options(words=("m.gguf", "a", "b")).prompt_words == ("a", "b")
    assert Options(words=("a", "b"), model="m.gguf").prompt_words == ("a", "b")
    assert Options(words=("a", "b"), hf_repo="u/m").prompt_words == ("a", "b")
    assert Options(words=("a",), hf_repo="u/m").model_name is None


def test_is_demo() -> None:
    assert Options().is_demo
    assert Options(words=("demo", "hi")).is_demo
    assert not Options(hf_repo="u/m").is_demo
    assert not Options(words=("m.gguf",)).is_demo


def test_prompt_order(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("file\n\n")
    options = Options(words=("m", "two", "words"), prompt="flag", file=tmp_path / "f")
    assert read_prompt(options, io.StringIO("stdin\n")) == "stdin\n\nfile\n\nflag\ntwo words"
    assert read_prompt(options, None) == "file\n\nflag\ntwo words"
    assert read_prompt(Options(words=("m",)), io.StringIO("only")) == "only"


def test_no_prompt() -> None:
    assert read_prompt(Options(), io.StringIO("")) == ""
    with pytest.raises(UsageError, match=r"no prompt: hobbit run m\.gguf"):
        read_prompt(Options(words=("m.gguf",)), io.StringIO(" \n"))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_prompt(Options(file=tmp_path / "binary"), None)
    with pytest.raises(UsageError, match="No such file"):
        system_prompt(Options(system_prompt_file=tmp_path / "none"))


def test_system_prompt(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("from file\n")
    assert system_prompt(Options()) == ""
    assert system_prompt(Options(system_prompt="given")) == "given"
    assert system_prompt(Options(system_prompt_file=tmp_path / "f")) == "from file"


def test_sampling_has_the_defaults_of_llama_cpp() -> None:
    got = own(Options(words=("m.gguf",)))
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.8, 40, 0.95, 0.05)
    assert got.repeat_penalty == 1.0
    assert got.max_tokens is None
    assert got.seed is not None
    assert got.seed >= 0
    assert own(Options(seed=0)).seed == 0


def test_token_limits() -> None:
    assert own(Options()).max_tokens == DEMO_TOKENS
    assert own(Options(predict=-1)).max_tokens is None
    assert own(Options(predict=5)).max_tokens == 5
    assert own(Options(predict=0)).max_tokens == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"predict": -3},
        {"seed": -2},
        {"seed": 2**32 - 1},
        {"threads": 513},
        {"threads_batch": 100000},
        {"gpu_layers": "many"},
        {"io": "mmap"},
        {"flash_attn": "yes"},
        {"color": "red"},
        {"cache_type_k": "q3_K"},
        {"cache_type_v": "int8"},
        {"policy": "mru"},
        {"predictor": "oracle"},
    ],
)
def test_values_that_mean_nothing(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        Options(**wrong)


def test_model_arguments() -> None:
    got = model_arguments(Options(), 2048)
    assert got["n_threads"] == got["n_threads_batch"] == physical_cores()
    assert (got["n_ctx"], got["n_batch"], got["n_ubatch"]) == (2048, 2048, 512)
    assert (got["memory"], got["io"], got["n_gpu_layers"]) == ("auto", "auto", 0)
    assert (got["policy"], got["predict"]) == ("decay", "auto")
    assert "flash_attn" not in got
    assert "type_k" not in got
    assert model_arguments(Options(threads=3, threads_batch=5), 0)["n_threads_batch"] == 5


def test_the_engine_is_set_by_every_command() -> None:
    own = {"policy": "lfu", "predictor": "gate:depth=1"}
    commands = [
        Options(**own),
        EvalOptions(**own).loading(),
        TraceOptions(output=Path("x"), **own).loading(),
    ]
    for options in commands:
        got = model_arguments(options, 0)
        assert (got["policy"], got["predict"]) == ("lfu", "gate:depth=1")
    with pytest.raises(UsageError, match="no cache policy 'x'"):
        EvalOptions(policy="x").loading()
    with pytest.raises(UsageError, match="no predictor 'x'"):
        TraceOptions(output=Path("x"), predictor="x").loading()


def test_only_run_starts_warm() -> None:
    assert Options().warm_start
    assert not EvalOptions().loading().warm_start
    assert not TraceOptions(output=Path("x")).loading().warm_start


@pytest.mark.parametrize("count", [0, -1])
def test_no_number_of_threads_is_the_default(count: int) -> None:
    got = model_arguments(Options(threads=count, threads_batch=count), 0)
    assert got["n_threads"] == got["n_threads_batch"] == physical_cores()


@pytest.mark.parametrize(
    ("asked", "trained", "context"),
    [(None, 0, 4096), (None, 128000, 4096), (None, 512, 512), (0, 512, 0), (100, 512, 256)],
)
def test_context(asked: int | None, trained: int, context: int) -> None:
    assert model_arguments(Options(ctx_size=asked), trained)["n_ctx"] == context


def test_a_quantised_v_cache_needs_flash_attention() -> None:
    got = model_arguments(Options(cache_type_v="q8_0"), 0)
    assert (got["flash_attn"], got["type_v"]) == (True, 8)
    with pytest.raises(UsageError, match="-ctv q8_0 needs flash attention"):
        Options(cache_type_v="q8_0", flash_attn="off")
    assert model_arguments(Options(flash_attn="on"), 0)["flash_attn"]


def test_kv_types_are_ggml_numbers() -> None:
    from gguf import GGMLQuantizationType

    assert {name: GGMLQuantizationType[name.upper()] for name in KV_TYPES} == KV_TYPES


@pytest.mark.parametrize(("text", "layers"), [("auto", 0), ("all", -1), ("7", 7), ("-1", -1)])
def test_gpu_layers(text: str, layers: int) -> None:
    assert model_arguments(Options(gpu_layers=text), 0)["n_gpu_layers"] == layers


def test_the_largest_seed_is_used_as_given() -> None:
    assert own(Options(seed=MAX_SEED)).seed == MAX_SEED == 2**32 - 2


def test_grammar(tmp_path: Path) -> None:
    (tmp_path / "g").write_text('root ::= "a"')
    (tmp_path / "s").write_text('{"type": "boolean"}')
    assert grammar(Options()) == ""
    assert grammar(Options(grammar_file=tmp_path / "g")) == 'root ::= "a"'
    assert "true" in grammar(Options(json_schema_file=tmp_path / "s"))
    with pytest.raises(UsageError, match="cannot be parsed"):
        grammar(Options(grammar="root"))


def test_a_model_may_ask_for_its_own_sampling() -> None:
    asked = {"general.sampling.temp": 0.25, "general.sampling.penalty_repeat": 1.25}
    got = own(Options(top_k=7), **asked, **{"general.sampling.top_k": 3})
    assert (got.temperature, got.repeat_penalty, got.top_k, got.top_p) == (0.25, 1.25, 7, 0.95)
    assert own(Options(temp=0.0), **asked).temperature == 0.0


def test_resolved_is_plain_and_complete() -> None:
    options = Options(file=Path("x"), words=("a",), top_k=9)
    data = options.resolved(own(options))
    assert json.loads(json.dumps(data)) == data
    assert (data["file"], data["words"], data["top_k"], data["temp"]) == ("x", ["a"], 9, 0.8)
    assert data["seed"] >= 0
    assert data["predict"] == -1
