"""Another number of experts a token than the model's own: as stock with the same, and said so."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from gates import JOB, Bench, assert_same, layout_of, opened, run
from moefile import write_moe
from serving import loopback_only, served
from test_calibration import CALIBRATION
from test_cli import SMALL, hobbit

import hobbit as package
from hobbit.attempt import check_graph
from hobbit.bench import _resident_arm
from hobbit.bench_options import BenchOptions
from hobbit.calibration import path_of, save
from hobbit.errors import ModelError, UsageError
from hobbit.fingerprint import fingerprint
from hobbit.folders import state_folder
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout, used_key
from hobbit.low_file import low_path
from hobbit.nested import make_nested
from hobbit.planning.feedback import expected, finished
from hobbit.planning.parts import Context, compute_bytes
from hobbit.prepare import make_low
from hobbit.quality import EXACT_NAME, Quality, choose
from hobbit.render import verify_lines
from hobbit.report import trace_lines
from hobbit.rule import Rule
from hobbit.stock import DecodeFailed
from hobbit.trace import LAYER, read_trace
from hobbit.verify import verify

SHORT = replace(JOB, n_prompt=40, n_decode=8)
FEWER = "1 expert instead of 2"
# So many experts that llama.cpp's graph has no room for all.
WIDE: dict[str, Any] = {"n_expert": 128, "n_used": 8, "n_embd": 32, "n_ff": 32, "n_layer": 12}

no_network = loopback_only  # in place of the one in conftest


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_text_model(tmp_path_factory.mktemp("number") / "m.gguf", chat=True)


def refused(path: Path, **arguments: Any) -> str:
    with pytest.raises(UsageError) as error:
        package.Llama(str(path), **arguments)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    return str(error.value)


# The logits


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "arch", ["qwen3moe", "deepseek2", "gpt-oss", "qwen3next", "llama4", "grovemoe", "arctic"]
)
def test_the_logits_are_those_of_stock_with_the_same_number(
    arch: str, count: int, bench: Bench
) -> None:
    path = bench.arch(arch)
    own, expected = bench.stock(path), bench.stock(path, n_expert_used=count)
    if count != layout_of(path).n_expert_used:
        assert np.abs(own - expected).max() > 0.01
    for cache in ("floor", "all"):
        with opened(path, cache, n_expert_used=count) as llm:
            assert_same(expected, run(llm), f"{cache}, {count} experts")
            assert llm.layout.n_expert_used == count
            if cache == "floor":
                assert llm.stats.evictions > 0
                assert {pool.slots for pool in llm.plan.pools} == {count}


def test_all_experts_of_a_layer(bench: Bench) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", n_expert_used=8) as llm:
        assert_same(bench.stock(path, n_expert_used=8), run(llm))


@pytest.mark.parametrize("arch", ["qwen3moe", "deepseek2"])
def test_the_models_own_number_changes_nothing(arch: str, bench: Bench) -> None:
    path = bench.arch(arch)
    assert build_layout(open_gguf(path), 2) == layout_of(path)
    with opened(path, "floor", n_expert_used=2) as llm:
        assert_same(bench.stock(path), run(llm))
        assert (llm.quality.name, llm.quality.label) == (EXACT_NAME, EXACT_NAME)
        assert llm.kv_overrides is None


def test_what_kv_overrides_say_means_the_same(bench: Bench) -> None:
    """It was computed by llama.cpp and planned for, and called, as if it were not."""
    path = bench.arch("qwen3moe")
    key = used_key(open_gguf(path))
    told = {"kv_overrides": {key: 3, "qwen3moe.context_length": 300}}
    with opened(path, "floor", **told) as llm:
        assert llm.quality.name == "3 experts instead of 2"
        assert [pool.slots for pool in llm.plan.pools] == [3]
        assert llm.metadata["qwen3moe.context_length"] == "512"  # that is what the file says
        assert_same(bench.stock(path, n_expert_used=3), run(llm))
    with opened(path, "floor", n_expert_used=3, **told) as llm:
        assert llm.kv_overrides == told["kv_overrides"]
        copy = pickle.loads(pickle.dumps(llm))
    with copy:
        assert copy.quality.name == "3 experts instead of 2"


def test_several_parts_and_nested_copies(bench: Bench, tmp_path: Path) -> None:
    whole = bench.arch("qwen3moe")
    copy = tmp_path / "parts.gguf"
    copy.write_bytes(whole.read_bytes())
    expected = bench.stock(whole, n_expert_used=3)
    with opened(tiny.split(copy, 2), "floor", n_expert_used=3) as llm:
        assert_same(expected, run(llm))
    nested = tmp_path / "nested.gguf"
    make_nested(layout_of(whole), nested)
    with opened(nested, "floor", n_expert_used=3) as llm:
        assert_same(expected, run(llm))


def test_fewer_experts_by_rule_are_the_same_where_weights_are_normalised(bench: Bench) -> None:
    """So `hobbit eval --mode fewer:K` tells what a smaller number costs."""
    rule = Rule(deterministic=True, renormalise=True, experts=1, per_token=True)
    for arch, same in (("qwen3moe", True), ("olmoe", False)):
        with opened(bench.arch(arch), "all", SHORT, rule=rule) as llm:
            found = run(llm, SHORT)
        equal = np.array_equal(found, bench.stock(bench.arch(arch), SHORT, n_expert_used=1))
        assert equal == same


# What cannot be


def test_numbers_that_cannot_be(bench: Bench, tmp_path: Path) -> None:
    path = bench.arch("qwen3moe")
    for count in (0, -1, 9):
        assert "must be from 1 to 8, the experts of a layer" in refused(path, n_expert_used=count)
    assert "must be a number of experts" in refused(path, n_expert_used=2.0)
    assert "must be a number of experts" in refused(path, n_expert_used=True)
    key = used_key(open_gguf(path))
    assert "must be a number" in refused(path, kv_overrides={key: 3.0})
    assert "must be from 1 to 8" in refused(path, kv_overrides={key: 9})
    both = refused(path, n_expert_used=1, kv_overrides={key: 3})
    assert both == "n_expert_used is 1, and kv_overrides say 3: give one"
    dense = write_moe(tmp_path / "dense.gguf", dense=True)
    assert "has no experts that stream" in refused(dense, n_expert_used=2)
    assert "has no experts" in refused(dense, kv_overrides={"llama.expert_used_count": 2})


def test_experts_outside_the_chosen_groups_are_no_choice(bench: Bench) -> None:
    """A token has 2 of 4 groups of 2 experts; the fifth would be of a group that it did not choose.

    llama.cpp takes one all the same, whatever the router thinks of it.
    """
    path = bench.arch("deepseek2")
    said = refused(path, n_expert_used=5)
    assert "must be from 1 to 4, the experts of the 2 groups that a token chooses" in said
    with opened(path, "floor", n_expert_used=4) as llm:
        assert_same(bench.stock(path, n_expert_used=4), run(llm))


def test_a_second_stack_of_fewer_experts_is_the_limit(bench: Bench) -> None:
    """llama.cpp ends the process above it."""
    path = bench.arch("grovemoe")
    with pytest.raises(DecodeFailed):
        bench.stock(path, SHORT, n_expert_used=5)
    assert "must be from 1 to 4" in refused(path, n_expert_used=5)


def test_a_number_for_each_layer_is_not_to_be_changed(bench: Bench) -> None:
    """llama.cpp passes over it in silence."""
    kv = {"nemotron_h_moe.expert_used_count": [0, 0, 3, 1]}
    path = bench.arch("nemotron_h_moe", kv=kv)
    assert_same(bench.stock(path, SHORT), bench.stock(path, SHORT, n_expert_used=2))
    assert "has a number of its own for each layer" in refused(path, n_expert_used=2)


def test_more_than_llama_cpps_graph_has_room_for(bench: Bench, tmp_path: Path) -> None:
    """It ends the process there, and not before."""
    path = bench.arch("qwen3moe", dense_type="F32", **WIDE)
    with opened(path, "floor", SHORT, n_expert_used=32) as llm:
        assert_same(bench.stock(path, SHORT, n_expert_used=32), run(llm, SHORT))
    with pytest.raises(DecodeFailed):
        bench.stock(path, SHORT, n_expert_used=33)
    said = refused(path, n_expert_used=33, **SHORT.llama_arguments())
    assert "more than llama.cpp's graph" in said and "own number is 8" in said
    with pytest.raises(UsageError, match="graph"):
        verify(path, job=SHORT, n_expert_used=33)
    with pytest.raises(UsageError, match="graph"):
        BenchOptions(arm=("stock",)).setup(build_layout(open_gguf(path), 33))
    nested = tmp_path / "nested.gguf"  # which only hobbit can load
    make_nested(layout_of(path), nested)
    check_graph(build_layout(open_gguf(nested), 32), SHORT.llama_arguments())
    with pytest.raises(UsageError, match="graph"):
        check_graph(build_layout(open_gguf(nested), 33), SHORT.llama_arguments())


# What it is called


def test_nothing_is_called_exact(bench: Bench) -> None:
    path = bench.arch("qwen3moe")
    with opened(path, "floor", SHORT, n_expert_used=1) as llm:
        assert (llm.quality.name, llm.quality.label) == (FEWER, FEWER)
        llm.rule = Rule(0.5, 0.5)
        assert llm.quality.name == f"rule, {FEWER}"
        llm.set_quality("exact")
        assert llm.quality.name == FEWER
        with llm.using(Quality("T", Rule(0.5, 0.5))):  # of who knows nothing of the number
            assert llm.quality.label == f"T, {FEWER}"
        llm.set_memory("1G")
        assert llm.quality.label == FEWER
    with opened(path, "all", SHORT, n_expert_used=1, rule=Rule(0.5, 0.5)) as llm:
        assert llm.quality.label == f"rule, {FEWER}"


@pytest.mark.parametrize("nested", [False, True])
def test_no_promise_that_was_measured_with_another_number(nested: bool, tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", kind="Q8_0")
    if nested:
        make_nested(layout_of(path), tmp_path / "n.gguf")
        low = path = tmp_path / "n.gguf"
    else:
        low = make_low(layout_of(path), low_path(open_gguf(path)), "q4_0").path
    save(replace(CALIBRATION, source=fingerprint(open_gguf(path))), path_of(low))
    layout = build_layout(open_gguf(path), 1)
    said = "-Q fast was measured with 2 experts a token, and promises nothing with 1: leave it out"
    for quality in ("fast", 0.08):
        with pytest.raises(UsageError, match="promises nothing with 1"):
            choose(layout, quality)
    promise = choose(layout_of(path), "fast")
    assert refused(path, n_expert_used=1, quality=promise).startswith(said)
    assert refused(path, n_expert_used=1, quality="fast").startswith(said)
    assert choose(build_layout(open_gguf(path), 2), "fast") == promise
    by_hand = choose(layout, t1=0.5)
    assert by_hand.label == f"T1 0.5, T2 1, {FEWER}" and by_hand.low is not None
    with package.Llama(str(path), n_expert_used=1, quality=by_hand, n_ctx=64) as llm:
        assert llm.quality.label == by_hand.label
        with pytest.raises(UsageError, match="promises nothing"):
            llm.set_quality("fast")
        with pytest.raises(UsageError, match="promises nothing"):
            llm.set_quality(promise)


def test_it_is_part_of_what_a_recording_is_of(bench: Bench, tmp_path: Path) -> None:
    path, file = bench.arch("qwen3moe"), tmp_path / "schedule"
    with opened(path, "floor", SHORT, n_expert_used=1) as llm:
        with llm.recorded(file):
            first = run(llm, SHORT)
        with llm.replayed(file):
            assert_same(first, run(llm, SHORT))
    with opened(path, "floor", SHORT) as llm:
        with pytest.raises(ModelError, match="recorded with n_expert_used 1, this run has 2"):
            llm.replayed(file).__enter__()
        with llm.recorded(file):
            run(llm, SHORT)
        # Before there was a choice nothing was written of it.
        data = file.read_bytes()
        words = b'"n_expert_used": 2, '
        assert words in data
        file.write_bytes(data.replace(words, b" " * len(words)))
        with llm.replayed(file):
            run(llm, SHORT)


def test_a_trace_tells_it(bench: Bench, tmp_path: Path) -> None:
    for count, told in ((2, False), (3, True)):
        path, file = bench.arch("qwen3moe"), tmp_path / "t"
        with opened(path, "floor", SHORT, n_expert_used=count) as llm, llm.traced(file):
            run(llm, SHORT)
        trace = read_trace(tmp_path / "t")
        assert (trace.note["n_expert_used"], trace.note["own_expert_used"]) == (count, 2)
        assert set(trace.n_used[trace.kind == LAYER]) <= {count}
        lines = [line for line in trace_lines(trace) if line.endswith("3 a token instead of 2")]
        assert bool(lines) == told


def test_verify_tells_it(bench: Bench) -> None:
    said: list[str] = []
    path = bench.arch("qwen3moe")
    rows = verify(path, ("floor", "all"), job=SHORT, n_expert_used=1, on_progress=said.append)
    assert all(row.equal for row in rows)
    assert said[0] == f"stock llama.cpp, {FEWER}"
    assert all(line.endswith(f", {FEWER}") for line in verify_lines(rows))
    plain = verify(path, ("floor",), job=SHORT, n_expert_used=2)
    assert "instead" not in verify_lines(plain)[0]


def test_memory_is_planned_for_it(bench: Bench) -> None:
    path = bench.arch("qwen3moe")
    few, many = (build_layout(open_gguf(path), count) for count in (1, 8))
    context = Context(256, 256, flash=True)
    assert compute_bytes(few.gguf, context) < compute_bytes(many.gguf, context)
    sizes = []
    for count in (1, 8):
        with opened(path, "floor", SHORT, n_expert_used=count) as llm:
            sizes.append((llm.plan.token_bytes, llm.plan.cache_bytes))
    assert sizes[1][0] == 8 * sizes[0][0] and sizes[1][1] > 4 * sizes[0][1]


# The commands


def test_run_tells_it(text_model: Path) -> None:
    asked = ("run", text_model, "one two", "-n", "4", "--temp", "0", *SMALL)
    fewer = hobbit(*asked, "--n-expert-used", "1")
    assert fewer.returncode == 0, fewer.stderr
    assert f", {FEWER}   memory" in fewer.stderr and f" | {FEWER} | hit" in fewer.stderr
    assert "exact" not in fewer.stderr and "top-1" in fewer.stderr
    own = hobbit(*asked, "--n-expert-used", "2")
    assert own.stdout != fewer.stdout and "instead" not in own.stderr
    found = json.loads(hobbit(*asked, "--n-expert-used", "1", "--json").stdout)
    assert found["quality"]["name"] == FEWER
    assert found["config"]["n_expert_used"] == 1
    assert json.loads(hobbit(*asked, "--json").stdout)["config"]["n_expert_used"] == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run", ("-p", "a")), ("serve", ()), ("verify", ()), ("plan", ()), ("trace", ("-o", "t")),
        ("bench", ("-p", "8", "-n", "1")),
    ],
)  # fmt: skip
def test_errors_of_commands(command: str, words: tuple[str, ...], text_model: Path) -> None:
    done = hobbit(command, text_model, *words, "--n-expert-used", "99", "-q")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("hobbit: error: 99 experts a token: must be from 1 to ")
    assert done.stderr.count("\n") == 1


def test_plan_tells_it(text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOBBIT_CACHE", str(tmp_path))  # it measures, which others must not know of
    asked = ("plan", text_model, "--memory", "1G", "-t", "1", "-q", "--read-gbps", "1")
    asked = (*asked, "--n-expert-used", "1")
    assert f"\nquality: {FEWER}\n" in hobbit(*asked).stdout
    found = json.loads(hobbit(*asked, "--json").stdout)
    assert (found["quality"], found["n_expert_used"]) == (FEWER, 1)
    assert f"--override-kv {used_key(open_gguf(text_model))}=int:1" in (
        hobbit(*asked, "--llama-cpp").stdout
    )


def test_bench_tells_it(text_model: Path) -> None:
    layout = build_layout(open_gguf(text_model), 1)
    setup = BenchOptions(arm=("exact,stock",)).setup(layout)
    assert [arm.title for arm in setup.arms] == [FEWER, f"stock, {FEWER}"]
    asked = (
        "bench",
        text_model,
        "-p",
        "8",
        "-n",
        "2",
        "-r",
        "1",
        "-t",
        "1",
        "--arm",
        "exact,stock",
    )
    done = hobbit(*asked, "--n-expert-used", "1", "-o", "json", "-q")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["mode"] for row in rows} == {FEWER, f"stock, {FEWER}"}
    assert {row["n_expert_used"] for row in rows} == {1}
    assert rows[0]["quality"] == FEWER
    resident = _resident_arm(setup, lambda text: None)
    assert resident is not None and resident.arguments == {"n_expert_used": 1}


@pytest.fixture(scope="module")
def server(text_model: Path) -> Iterator[Any]:
    with served(text_model, "-c", "256", "--n-expert-used", "1") as running:
        yield running


def test_serve_tells_it(server: Any) -> None:
    assert any(f", {FEWER}   memory" in line for line in server.lines)
    assert server.ask("/props").json["hobbit"] == {
        "mode": "resident-experts", "quality": FEWER, "n_expert_used": 1,
    }  # fmt: skip
    assert server.ask("/hobbit/stats").json["quality"] == FEWER
    assert "hobbit_experts_used 1.0" in server.ask("/metrics").body.decode()
    body = {"prompt": "one two", "max_tokens": 2}
    assert FEWER in server.ask("/v1/completions", body).body.decode()
    refused = server.ask("/v1/completions", body | {"hobbit": {"quality": "exact"}})
    assert refused.status == 400 and f"this server computes with {FEWER}" in refused.body.decode()


def test_predictions_do_not_learn_from_it(
    text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hits are others, and no quality with a promise is an advice."""
    monkeypatch.setenv("HOBBIT_STATE", str(tmp_path))
    with package.Llama(str(text_model), n_expert_used=1, n_ctx=64) as llm:
        llm.eval([1, 2, 3])
        done = type("Done", (), {"stats": llm.stats, "decode": llm.stats})
        finished(llm, "m", done, expected(llm))
    folder = state_folder()
    assert folder is not None
    record = json.loads((folder / "last-run.json").read_text())
    assert (record["quality"], record["exact"]) == (FEWER, False)
