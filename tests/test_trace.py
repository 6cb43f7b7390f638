"""Routing traces: what is recorded is what llama.cpp computed, and a damaged file is one error."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tiny
from gates import JOB, Bench, assert_same, layout_of, opened, run
from mixed import MIXED, low_of, pair
from mixed import mixed as with_low
from routed import stock_routing
from test_cli import hobbit as command

import hobbit
from hobbit.errors import HobbitError, ModelError, UsageError
from hobbit.forced import Forced
from hobbit.rule import Rule
from hobbit.stock import Job
from hobbit.trace import FORGET, LAYER, PREDICTED, PROB_ONE, SEQUENCE, Trace, read_trace
from hobbit.trace_summary import summary

SMALL = replace(JOB, n_prompt=24, n_decode=8, n_ubatch=16)
# Softmax routers, of which some are scaled or normed; sigmoids; a softmax of the chosen only.
ARCHS = ["qwen3moe", "olmoe", "qwen2moe", "granitemoe", "llama", "deepseek2", "glm4moe", "gpt-oss"]
NO_SOFTMAX = {"deepseek2", "glm4moe"}


def traced(
    path: Path, dest: Path, cache: str = "floor", job: Job = SMALL, *, probs: bool = False
) -> tuple[Trace, hobbit.Stats]:
    """Run a job on a new model; return its trace, and what the engine counted."""
    with opened(path, cache, job) as llm:
        with llm.traced(dest, probs=probs):
            run(llm, job)
        return read_trace(dest), llm.stats


def layers(trace: Trace) -> Iterator[int]:
    return (int(i) for i in np.flatnonzero(trace.kind == LAYER))


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


class TestRecording:
    @pytest.mark.parametrize("arch", ARCHS)
    def test_it_is_what_llama_cpp_computed(self, arch: str, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch(arch, n_expert=16, n_used=4)
        trace, stats = traced(path, tmp_path / "t", probs=True)
        expected = stock_routing(path, SMALL)
        found = [trace[i] for i in layers(trace)]
        assert [trace.groups[e.group].layer for e in found] == [e.layer for e in expected]
        for mine, theirs in zip(found, expected, strict=True):
            assert np.array_equal(mine.experts, theirs.experts)
            assert mine.weights is not None and theirs.weights is not None
            assert mine.weights.tobytes() == theirs.weights.tobytes()
            assert (mine.probs is None) == (arch in NO_SOFTMAX)
            if mine.probs is not None and theirs.probs is not None:
                # gpt-oss calls the logits so: it takes the softmax of the chosen ones only.
                probs = softmax(theirs.probs) if arch == "gpt-oss" else theirs.probs
                assert np.abs(mine.probs / PROB_ONE - probs).max() < 2e-5
        assert trace.n_distinct.sum() == stats.hits + stats.misses
        assert stats.evictions > 0

    def test_more_experts_than_a_byte_has_values(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe", n_expert=300, n_used=2, n_layer=1)
        trace, stats = traced(path, tmp_path / "t")
        expected = stock_routing(path, SMALL)
        for i, theirs in zip(layers(trace), expected, strict=True):
            assert np.array_equal(trace[i].experts, theirs.experts)
        assert trace.experts.max() > 255
        assert trace.n_distinct.sum() == stats.hits + stats.misses
        # With one layer too the tokens are told apart.
        assert trace.token.tolist() == [*range(SMALL.n_prompt + SMALL.n_decode)]

    def test_weights_before_the_experts_are_not_seen(self, bench: Bench, tmp_path: Path) -> None:
        trace, stats = traced(bench.arch("llama4"), tmp_path / "t", probs=True)
        assert len(trace.experts) > 0 and np.isnan(trace.weights).all()
        assert not trace.has_weights.any() and not len(trace.probs)
        assert trace.n_distinct.sum() == stats.hits + stats.misses
        assert summary(trace).weighted == 0

    @pytest.mark.parametrize("width", [1, 5])
    def test_each_step_asks_the_cache_for_its_experts(
        self, width: int, bench: Bench, tmp_path: Path
    ) -> None:
        asked = []
        with opened(bench.arch("qwen3moe", n_used=3), "floor", SMALL) as llm:
            model = Forced(llm)
            with llm.traced(tmp_path / "t"):
                for at in range(0, 20, width):
                    before = llm.stats
                    model.decode([*range(at, at + width)])
                    since = llm.stats.minus(before)
                    asked.append(since.hits + since.misses)
        trace = read_trace(tmp_path / "t")
        assert trace.n_distinct.reshape(20 // width, 3).sum(axis=1).tolist() == asked

    @pytest.mark.parametrize("cache", ["floor", "half", "all"])
    def test_it_changes_no_logit(self, cache: str, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe")
        expected = bench.stock(path, SMALL)
        with opened(path, cache, SMALL) as llm:
            for probs in (False, True):
                with llm.traced(tmp_path / "t", probs=probs):
                    assert_same(expected, run(llm, SMALL), "traced")
            size = (tmp_path / "t").stat().st_size
            assert_same(expected, run(llm, SMALL), "afterwards")
            assert (tmp_path / "t").stat().st_size == size

    def test_whatever_is_cached_the_routing_is_the_same(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe")
        for name in ("floor", "all"):
            traced(path, tmp_path / name, name)
        floor, everything = (read_trace(tmp_path / name) for name in ("floor", "all"))
        assert floor.experts.tolist() == everything.experts.tolist()
        assert floor.weights.tobytes() == everything.weights.tobytes()
        assert floor.pools != everything.pools

    def test_the_head_describes_the_model(self, bench: Bench, tmp_path: Path) -> None:
        paths = pair(bench, "layers-differ")
        # A prompt's reads ahead would still be arriving, and be cached a moment later.
        job = replace(MIXED, n_prompt=1)
        with with_low(paths, "half", rule=Rule(0.3, 0.9, patience=2), predict="none") as llm:
            run(llm, job)
            cached = llm._moe().counters().n_cached
            with llm.traced(tmp_path / "t"):
                run(llm, job)
            plan, slots = llm.plan, llm._moe().slot_bytes()
        trace, layout = read_trace(tmp_path / "t"), layout_of(paths[0])
        assert [(p.bytes, p.slot_bytes, p.slots) for p in trace.pools] == [
            (p.bytes, tuple(p.slot_bytes), (p.slots, p.low_slots)) for p in plan.pools
        ]
        for group, mine, slot in zip(layout.groups, trace.groups, slots, strict=True):
            assert (mine.layer, mine.n_expert) == (group.layer, group.n_expert)
            assert group.index in plan.pools[mine.pool].groups
            assert mine.expert_bytes[0] == group.expert_bytes > mine.expert_bytes[1] > 0
            assert mine.slot_bytes == tuple(slot)
        note = trace.note
        assert (note["architecture"], note["n_expert_used"]) == ("nemotron_h_moe", 3)
        assert (note["rule"]["t1"], note["rule"]["patience"]) == (0.3, 2)
        assert len(note["model"]) == len(note["low"]) == 64
        assert 0 < note["cached"] == cached
        assert not trace.has_probs

    def test_rows_know_their_token(self, bench: Bench, tmp_path: Path) -> None:
        """The last layer computes only what logits are asked for: the prompt's last token."""
        path, job = bench.arch("qwen3moe"), replace(SMALL, all_logits=False)
        trace, stats = traced(path, tmp_path / "t", job=job)
        n = job.n_prompt + job.n_decode
        for group in range(3):
            rows = [token for e in trace if e.group == group for token in e.token.tolist()]
            assert rows == [*range(0 if group < 2 else job.n_prompt - 1, n)]
        assert set(trace.sequence.tolist()) == {0}
        assert trace.n_distinct.sum() == stats.hits + stats.misses

    def test_emptying_the_cache_is_an_event(self, bench: Bench, tmp_path: Path) -> None:
        with opened(bench.arch("qwen3moe"), "half", SMALL) as llm, llm.traced(tmp_path / "t"):
            llm.forget()
            run(llm, SMALL)
            llm.forget()
        trace = read_trace(tmp_path / "t")
        assert np.flatnonzero(trace.kind == FORGET).tolist() == [0, len(trace) - 1]

    def test_a_trace_replaces_the_one_before(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe")
        with opened(path, "floor", SMALL) as llm, llm.traced(tmp_path / "a"):
            with llm.traced(tmp_path / "b"):
                run(llm, SMALL)
            run(llm, SMALL)
        assert len(read_trace(tmp_path / "a")) == 0
        assert len(read_trace(tmp_path / "b")) > 0

    def test_closing_the_model_ends_it(self, bench: Bench, tmp_path: Path) -> None:
        with (
            opened(bench.arch("qwen3moe"), "floor", SMALL) as llm,
            contextlib.suppress(HobbitError),
            llm.traced(tmp_path / "t"),
        ):
            run(llm, SMALL)
            raise HobbitError("stopped")
        assert len(read_trace(tmp_path / "t")) == 3 * (2 + SMALL.n_decode)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk(self, bench: Bench) -> None:
        path, words = bench.arch("qwen3moe"), f"written: {os.strerror(errno.ENOSPC)}"
        with opened(path, "floor", SMALL) as llm:
            with pytest.raises(HobbitError, match=words), llm.traced(Path("/dev/full")):
                run(llm, SMALL)  # it all fits the buffer: the end finds out
            with (
                pytest.raises(HobbitError, match=words),
                llm.traced(Path("/dev/full"), probs=True),
                llm.translated_errors(),
            ):
                for _ in range(200):
                    run(llm, SMALL)
            assert_same(bench.stock(path, SMALL), run(llm, SMALL), "afterwards")

    def test_a_path_that_cannot_be_written(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe")
        with opened(path, "floor", SMALL) as llm:
            for dest in (tmp_path / "none" / "x", tmp_path):
                with pytest.raises(HobbitError) as refused, llm.traced(dest):
                    pass
                assert str(dest) in str(refused.value) and "\n" not in str(refused.value)

    def test_a_dense_model(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("llama", n_expert=0, n_used=0)
        with (
            opened(path, 0) as llm,
            pytest.raises(HobbitError, match="no experts that stream"),
            llm.traced(tmp_path / "t"),
        ):
            pass

    def test_under_a_rule_the_pairs_are_all_there(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("qwen3moe", n_used=4)
        paths = path, low_of(bench, path, "q4_0")
        with with_low(paths, "half", rule=Rule(0.35, 0.75)) as llm:
            with llm.traced(tmp_path / "t"):
                run(llm, MIXED)
            stats = llm.stats
        trace = read_trace(tmp_path / "t")
        assert len(trace.experts) == stats.pairs_high + stats.pairs_low + stats.pairs_skip
        assert stats.pairs_skip > 0


# --- the reader, on bytes made here as docs/trace.md says ---

POOL = struct.pack("<QQIQI", 100, 10, 10, 5, 20)
GROUP = struct.pack("<IIIQQQQ", 0, 8, 0, 9, 10, 4, 5)


def head(note: bytes = b"{}", pools: bytes = POOL, groups: bytes = GROUP * 2) -> bytes:
    counts = struct.pack("<II", len(pools) // len(POOL), len(groups) // len(GROUP))
    return b"HBTRACE1" + struct.pack("<II", 0, len(note)) + note + counts + pools + groups


def end(n: int) -> bytes:
    return struct.pack("<BQ", 0, n)


EVENTS = [
    bytes([2, 7]),
    bytes([1, 0, 2, 2, 7, 0, 1, 2, 2, 3]),
    bytes([0x11, 1, 1, 2, 7, 0, 5, 6]) + struct.pack("<ff", 0.75, 0.25),
    bytes([0x61, 0, 2, 1, 3, 4, 9, 0x80, 1, 7, 0]) + struct.pack("<16H", *range(16)),
    bytes([3, 1, 3, 4, 5, 6]) + struct.pack("<fff", 0.5, 0.25, 0.125),
    bytes([4]),
]
WHOLE = head() + b"".join(EVENTS) + end(len(EVENTS))


def parsed(data: bytes, tmp_path: Path) -> Trace:
    (tmp_path / "t").write_bytes(data)
    return read_trace(tmp_path / "t")


class TestReading:
    def test_every_kind_of_event(self, tmp_path: Path) -> None:
        trace = parsed(WHOLE, tmp_path)
        new, first, second, listed, predicted, forget = trace
        assert [e.kind for e in trace] == [SEQUENCE, LAYER, LAYER, LAYER, PREDICTED, FORGET]
        assert new.sequence.tolist() == [7]
        assert first.experts.tolist() == [[1, 2], [2, 3]] and first.weights is None
        assert (first.sequence.tolist(), first.token.tolist()) == ([7, 7], [0, 1])
        assert second.weights is not None and second.weights.tolist() == [[0.75, 0.25]]
        assert (listed.sequence.tolist(), listed.token.tolist()) == ([3, 9], [4, 128])
        assert listed.probs is not None
        assert listed.probs.tolist() == [[*range(8)], [*range(8, 16)]]
        assert predicted.group == 1 and predicted.experts.tolist() == [[4, 5, 6]]
        assert predicted.weights is not None
        assert predicted.weights.tolist() == [[0.5, 0.25, 0.125]]
        assert (forget.group, forget.experts.size) == (-1, 0)
        assert trace.n_distinct.tolist() == [0, 3, 2, 2, 0, 0]
        assert trace.groups[1].slot_bytes == (10, 5) and trace.pools[0].slots == (10, 20)

    def test_an_empty_trace(self, tmp_path: Path) -> None:
        trace = parsed(head() + end(0), tmp_path)
        assert len(trace) == 0 and [*trace] == []
        found = summary(trace)
        assert found.tokens == 0 and math.isnan(found.reused)

    def test_every_cut_is_one_clear_error(self, tmp_path: Path) -> None:
        for kept in range(len(WHOLE)):
            with pytest.raises(ModelError) as refused:
                parsed(WHOLE[:kept], tmp_path)
            assert "is not a routing trace" in str(refused.value) or "ends early" in str(
                refused.value
            )
            assert "\n" not in str(refused.value)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"GGUF" + bytes(1000),
            bytes(1000),
            WHOLE + b"x",
            WHOLE[:-1] + b"\1",
            head(b"[]") + end(0),
            head(b"\xff{") + end(0),
            head(b"[" * 100_000) + end(0),
            head(pools=b"") + end(0),
            head(pools=POOL * 2) + end(0),
            head(pools=struct.pack("<QQIQI", 100, 0, 10, 5, 20)) + end(0),
            head(pools=struct.pack("<QQIQI", 100, 1 << 40, 10, 5, 20)) + end(0),
            head(groups=b"") + end(0),
            head(groups=struct.pack("<IIIQQQQ", 0, 8, 1, 9, 10, 4, 5)) + end(0),
            head(groups=struct.pack("<IIIQQQQ", 0, 0, 0, 9, 10, 4, 5)) + end(0),
            head(groups=struct.pack("<IIIQQQQ", 0, 1 << 31, 0, 9, 10, 4, 5)) + end(0),
            head() + bytes([5]) + end(1),
            head() + bytes([0x12, 0]) + end(1),
            head() + bytes([0x81, 0]) + end(1),
            head() + bytes([1, 2, 1, 1, 0, 0, 0]) + end(1),
            head() + bytes([1, 0, 1, 1, 0, 0, 8]) + end(1),
            head() + bytes([1, 0, 1, 0, 0, 0]) + end(1),
            head() + bytes([1, 0, 1, 9, 0, 0, *range(9)]) + end(1),
            head() + bytes([1, 0, 0xFF, 0xFF, 0xFF, 0xFF, 7, 1, 0, 0]) + end(1),
            head() + bytes([1, 0, *[0xFF] * 30]) + end(1),
            head() + bytes([0x80, *[0x80] * 30]) + end(1),
            head() + bytes([3, 0, 9, *range(9)]) + bytes(36) + end(1),
        ],
    )
    def test_nonsense_is_one_clear_error(self, data: bytes, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"/t: (is not a|the) routing trace") as refused:
            parsed(data, tmp_path)
        assert "\n" not in str(refused.value)

    def test_any_damage_is_an_error_or_another_trace(self, tmp_path: Path) -> None:
        rng = random.Random(5)
        for _ in range(600):
            data = bytearray(WHOLE)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(len(data))] = rng.choice(
                    [0, 1, 127, 128, 255, rng.randrange(256)]
                )
            with contextlib.suppress(ModelError):
                trace = parsed(bytes(data), tmp_path)
                summary(trace)
                assert len([*trace]) == len(trace)

    def test_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none", tmp_path):
            with pytest.raises(UsageError, match=f"cannot read {path}: "):
                read_trace(path)


def test_summary(tmp_path: Path) -> None:
    def layer(group: int, first: int, *experts: int) -> bytes:
        return bytes([1, group, len(experts) // 2, 2, 0, first, *experts])

    events = [
        layer(0, 0, 0, 1), layer(1, 0, 4, 5),
        layer(0, 1, 1, 2, 0, 2), layer(1, 2, 5, 6),  # of the second layer, only the last token
        layer(0, 3, 5, 6), layer(1, 3, 5, 6),
        bytes([2, 0]), layer(0, 0, 5, 6), layer(1, 0, 5, 6),
    ]  # fmt: skip
    trace = parsed(head() + b"".join(events) + end(len(events)), tmp_path)
    found = summary(trace)
    assert (found.tokens, found.sequences, found.layers, found.events) == (5, 1, 2, 9)
    assert (found.experts, found.used) == (16, 5 + 3)
    assert (found.asked, found.asked_bytes) == (17, 17 * 9)
    # After one another are three pairs of tokens in layer 0, and one in layer 1.
    assert found.reused == (1 + 1 + 0 + 2) / 8
    assert found.entropy_max == 3 and 0 < found.entropy < 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes text."""
    return tiny.make_text_model(tmp_path_factory.mktemp("trace") / "m.gguf", arch="qwen3moe")


class TestCommand:
    def test_it_records_and_shows(self, model: Path, tmp_path: Path) -> None:
        dest = tmp_path / "trace"
        done = command("trace", model, "-o", dest, "-n", "64", "-t", "1", "--memory", "1G")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{dest}: the routing of 64 tokens, ")
        trace = read_trace(dest)
        assert trace.n_rows.tolist() == [1] * 192
        assert trace.note["cached"] == 0
        shown = command("trace", "--show", dest)
        assert shown.returncode == 0 and "tokens         64\n" in shown.stdout
        assert shown.stderr == ""

    def test_batches_and_a_text(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "text").write_text("it is the end of a day and they were not at home " * 9)
        dest = tmp_path / "trace"
        batches = ("-b", "32", "-ub", "16", "--probs", "-n", "64", "-c", "256")
        done = command("trace", model, "-f", tmp_path / "text", "-o", dest, *batches, "-t", "1")
        assert done.returncode == 0, done.stderr
        trace = read_trace(dest)
        assert trace.n_rows.tolist() == [16, 16, 0, 16, 16, 1] * 2
        assert trace.has_probs and len(trace.probs) == 8 * trace.n_rows.sum()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    def test_a_full_disk_has_its_exit_code(self, model: Path) -> None:
        done = command("trace", model, "-o", "/dev/full", "-n", "16", "-t", "1", "-q")
        assert (done.returncode, done.stdout) == (5, "")
        assert done.stderr.endswith("trace cannot be written: No space left on device\n")
        assert len(done.stderr.splitlines()) == 1

    def test_a_model_without_experts(self, bench: Bench, tmp_path: Path) -> None:
        path = bench.arch("llama", n_expert=0, n_used=0)
        done = command("trace", path, "-o", tmp_path / "t", "-n", "8", "-t", "1", "-q")
        assert (done.returncode, done.stdout) == (1, "")
        assert "no experts that stream" in done.stderr and len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "t").exists()

    def test_refusals(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").write_text("")
        dest = tmp_path / "t"
        for arguments, code, words in (
            ((model,), 2, "-o FILE"),
            ((model, "--show", dest), 2, "--show reads a trace"),
            (("--show", dest), 2, f"cannot read {dest}"),
            (("--show", model), 3, "m.gguf: is not a routing trace"),
            ((model, "-o", model), 2, "m.gguf exists and is no trace"),
            ((model, "-o", tmp_path), 2, "is a folder: name a file"),
            ((model, "-o", tmp_path / "none" / "t"), 2, "there is no folder"),
            ((model, "-o", dest, "-f", tmp_path / "none"), 2, "cannot read"),
            ((model, "-o", dest, "-f", tmp_path / "empty"), 2, "the text is empty"),
        ):
            done = command("trace", *arguments, "-q", "-t", "1")
            assert (done.returncode, done.stdout) == (code, ""), done.stderr
            assert words in done.stderr and len(done.stderr.splitlines()) == 1
        assert model.stat().st_size > 1 << 20


def test_the_note_is_json(bench: Bench, tmp_path: Path) -> None:
    traced(bench.arch("qwen3moe"), tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    length = int.from_bytes(data[12:16], "little")
    assert json.loads(data[16 : 16 + length]) == read_trace(tmp_path / "t").note
