"""Gates on what happens around the arithmetic: several models, reloading, failures, leaving."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from gates import (
    JOB,
    Bench,
    assert_same,
    in_threads,
    layout_of,
    open_files,
    opened,
    rss_bytes,
    run,
    skip_without_direct,
    thread_count,
)
from llama_cpp import llama_cpp as api

import hobbit
from hobbit.stock import (
    Job,
    Logits,
    collect,
    empty_logits,
    further_context,
    plain_llama,
    steps,
)

SHORT = replace(JOB, n_prompt=40, n_decode=12)


def interleaved(contexts: list[tuple[object, int]], job: Job) -> list[Logits]:
    """Decode the job on several contexts, a step of each in turn."""
    found = [empty_logits(n_vocab, job) for _, n_vocab in contexts]
    running = [steps(c, job, f) for (c, _), f in zip(contexts, found, strict=True)]
    for _ in range(1 + job.n_decode):
        for one in running:
            next(one)
    for one in running:
        assert next(one, "ended") == "ended"
    return found


@pytest.mark.parametrize("pair", [("qwen3moe", "qwen3moe"), ("gpt-oss", "deepseek2")])
def test_two_models_interleaved(pair: tuple[str, str], bench: Bench) -> None:
    paths = [bench.arch(arch) for arch in pair]
    with ExitStack() as stack:
        llamas = [stack.enter_context(opened(path, "floor", SHORT)) for path in paths]
        found = interleaved([(llm._ctx.ctx, llm.n_vocab()) for llm in llamas], SHORT)
        for path, logits, llm in zip(paths, found, llamas, strict=True):
            assert_same(bench.stock(path, SHORT), logits, path.name)
            assert llm.stats.evictions > 0


def test_two_contexts_of_one_model(bench: Bench) -> None:
    path = bench.arch("grovemoe")
    expected = bench.stock(path, SHORT)
    with opened(path, "floor", SHORT) as llm, further_context(llm, SHORT) as second:
        for logits in interleaved([(llm._ctx.ctx, llm.n_vocab()), (second, llm.n_vocab())], SHORT):
            assert_same(expected, logits)


@pytest.mark.parametrize("pair", [("llama", "llama"), ("qwen3moe", "gpt-oss")])
def test_two_threads(pair: tuple[str, str], bench: Bench) -> None:
    """Each with its own model, of the same file or not."""
    expected = {arch: bench.stock(bench.arch(arch), SHORT) for arch in pair}

    def work(arch: str) -> None:
        with opened(bench.arch(arch), "floor", SHORT) as llm:
            for _ in range(4):
                assert_same(expected[arch], run(llm, SHORT), arch)

    in_threads(*(lambda arch=arch: work(arch) for arch in pair))


def test_two_threads_on_one_model(bench: Bench) -> None:
    """Two contexts of one model share its cache; a layer at a time is computed."""
    path = bench.arch("olmoe")
    expected = bench.stock(path, SHORT)

    def decode(context: object, n_vocab: int) -> None:
        logits = empty_logits(n_vocab, SHORT)
        for _ in steps(context, SHORT, logits):
            pass
        assert_same(expected, logits)

    with opened(path, "floor", SHORT) as llm, further_context(llm, SHORT) as second:
        n_vocab = llm.n_vocab()
        in_threads(lambda: decode(llm._ctx.ctx, n_vocab), lambda: decode(second, n_vocab))


def test_loading_in_two_threads(bench: Bench) -> None:
    expected = {arch: bench.stock(bench.arch(arch), SHORT) for arch in ("llama", "mistral3")}

    def work(arch: str) -> None:
        for _ in range(4):
            with opened(bench.arch(arch), "half", SHORT) as llm:
                assert_same(expected[arch], run(llm, SHORT), arch)

    in_threads(lambda: work("llama"), lambda: work("mistral3"))


def test_reloading_leaks_nothing(bench: Bench) -> None:
    path = bench.arch("qwen3moe")
    job = replace(JOB, n_prompt=8, n_decode=2)
    before: tuple[int, int, int] | None = None
    for number in range(24):
        with opened(path, "floor", job) as llm:
            run(llm, job)
        del llm
        gc.collect()
        now = (thread_count(), len(open_files()), rss_bytes())
        if number == 7:
            before = now
    assert before is not None
    assert now[0] <= before[0], "threads leak"
    assert now[1] <= before[1], "file descriptors leak"
    assert now[2] - before[2] < 4 << 20, "memory leaks"
    assert not [name for name in open_files() if name == str(path)]


def test_loading_reads_no_expert(bench: Bench) -> None:
    """By the kernel's count of this process's reads, not only by hobbit's."""
    path = bench.arch("qwen3moe", expert_type="F32", n_embd=512, n_ff=512, n_layer=2)
    layout = layout_of(path)
    assert layout.expert_bytes > 8 * layout.dense_bytes

    def bytes_read() -> int:
        counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(counters["rchar"])

    with opened(path, "all"):  # what is imported at the first load
        pass
    before = bytes_read()
    with opened(path, "all"):
        # stdio reads some of the dense part several times, on its way from tensor to tensor.
        assert bytes_read() - before < layout.expert_bytes // 2


def test_dropping_the_object_frees_it(bench: Bench) -> None:
    threads = thread_count()
    llm = hobbit.Llama(str(bench.arch("llama")), cache_bytes="floor")
    assert thread_count() > threads
    del llm
    gc.collect()
    assert thread_count() == threads


def test_leaving_python_without_closing(bench: Bench) -> None:
    script = (
        "import sys, hobbit\n"
        "llm = hobbit.Llama(sys.argv[1], cache_bytes='floor', n_threads=1, n_threads_batch=1)\n"
        "print(len(llm.create_completion('the', max_tokens=4)['choices']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bench.arch("llama"))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_experts_that_the_graph_never_uses(bench: Bench) -> None:
    """llama.cpp loads refact's experts and then computes its dense feed-forward."""
    path = bench.arch("refact")
    with opened(path, "floor") as llm:
        assert_same(bench.stock(path), run(llm))
        assert llm.stats.read_bytes == 0


def test_plain_llama_beside(bench: Bench) -> None:
    """hobbit's device joins every context of the process, and leaves stock's results alone."""
    path = bench.arch("gpt-oss")
    expected = bench.stock(path, SHORT)
    with opened(path, "floor", SHORT) as llm:
        with plain_llama(str(path), SHORT.llama_arguments()) as plain:
            assert_same(expected, collect(plain, SHORT))
        assert_same(expected, run(llm, SHORT))


def test_dense_model(bench: Bench) -> None:
    path = bench.arch("llama", n_expert=0, n_used=0)
    with opened(path, 0) as llm:
        assert llm.plan.mode == "resident"
        assert_same(bench.stock(path), run(llm))
        assert llm.stats.read_bytes == 0


class TestShrinkingFile:
    """A file that is cut short while the model is in use."""

    @pytest.fixture
    def path(self, bench: Bench, tmp_path: Path) -> Path:
        copy = tmp_path / "model.gguf"
        copy.write_bytes(bench.arch("qwen3moe").read_bytes())
        return copy

    @pytest.mark.parametrize("io", ["direct", "buffered"])
    def test_raises_and_recovers(self, io: str, path: Path, bench: Bench) -> None:
        if io == "direct":
            skip_without_direct(path)
        whole = path.read_bytes()
        # Cut inside the experts of the middle layer: some reads succeed, then one fails.
        cut = layout_of(path).groups[1].matrices[0].offset + 1000
        with opened(path, "floor", SHORT, io=io) as llm:
            with path.open("r+b") as file:
                file.truncate(cut)
            with pytest.raises(hobbit.ReadError, match=r"model\.gguf at offset \d+ failed") as info:
                llm.eval([5, 6, 7])
            assert isinstance(info.value, OSError)
            assert "\n" not in str(info.value)
            # The process goes on, another model works, and so does this one once the file is back.
            other = bench.arch("gpt-oss")
            with opened(other, "floor", SHORT) as second:
                assert_same(bench.stock(other, SHORT), run(second, SHORT))
            with path.open("r+b") as file:
                file.write(whole)
            llm.reset()
            assert_same(bench.stock(bench.arch("qwen3moe"), SHORT), run(llm, SHORT))

    def test_generation_raises(self, path: Path) -> None:
        cut = layout_of(path).groups[0].matrices[0].offset
        with opened(path, "floor", SHORT) as llm:
            with path.open("r+b") as file:
                file.truncate(cut)
            with pytest.raises(hobbit.ReadError):
                llm.create_completion("the a of", max_tokens=4)
            with pytest.raises(hobbit.ReadError):
                list(llm.create_completion("the a of", max_tokens=4, stream=True))

    def test_cut_before_loading(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(size - 4096)
        with pytest.raises(hobbit.ModelError, match="truncated"):
            hobbit.Llama(str(path), cache_bytes="floor")


def test_file_replaced_while_in_use(bench: Bench, tmp_path: Path) -> None:
    """The model that was opened stays the model, as long as it is open."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bench.arch("qwen3moe").read_bytes())
    with opened(path, "floor", SHORT) as llm:
        path.unlink()
        path.write_bytes(bytes(1 << 20))
        assert_same(bench.stock(bench.arch("qwen3moe"), SHORT), run(llm, SHORT))


def test_garbage_in_the_experts(bench: Bench) -> None:
    """Bad weights are computed with as stock does, down to the bits of the NaNs."""
    whole = bench.arch("qwen3moe", expert_type="F16")
    rng = np.random.default_rng(1)

    def spoil(path: Path) -> Path:
        data = bytearray(whole.read_bytes())
        for matrix in layout_of(whole).groups[1].matrices:
            length = matrix.expert_bytes * matrix.n_expert
            data[matrix.offset : matrix.offset + length] = rng.bytes(length)
        path.write_bytes(data)
        return path

    path = bench.model("garbage", spoil)
    expected = bench.stock(path)
    with opened(path, "floor") as llm:
        assert_same(expected, run(llm))


def test_cancel(bench: Bench) -> None:
    path = bench.arch("llama")
    with opened(path, "floor", SHORT) as llm:
        llm.cancel()
        with pytest.raises(hobbit.Cancelled):
            llm.eval(list(range(3, 60)))
        llm.reset()
        assert_same(bench.stock(path, SHORT), run(llm, SHORT))


def last_logits(llm: hobbit.Llama) -> bytes:
    row = api.llama_get_logits_ith(llm._ctx.ctx, -1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).tobytes()


def test_resume(bench: Bench, tmp_path: Path) -> None:
    """What was interrupted can go on where it stood, without a reset."""
    path = tmp_path / "model.gguf"
    path.write_bytes(bench.arch("qwen3moe").read_bytes())
    whole = path.read_bytes()
    tokens = list(range(3, 163))
    with opened(path, "floor", SHORT) as llm:
        llm.eval(tokens)
        expected = last_logits(llm)
        llm.reset()
        llm.eval(tokens[:50])
        done = llm.n_tokens
        llm.cancel()
        with pytest.raises(hobbit.Cancelled):
            llm.eval(tokens[50:100])
        assert llm.n_tokens == done
        llm.eval(tokens[50:100])
        with path.open("r+b") as file:
            file.truncate(layout_of(path).groups[1].matrices[0].offset)
        with pytest.raises(hobbit.ReadError):
            llm.eval(tokens[100:])
        with path.open("r+b") as file:
            file.write(whole)
        llm.eval(tokens[llm.n_tokens :])
        # Not the bits of one uninterrupted run: the batches are others. So run these batches.
        resumed = last_logits(llm)
        llm.reset()
        for begin, end in ((0, 50), (50, 100), (100, 160)):
            llm.eval(tokens[begin:end])
        assert last_logits(llm) == resumed
        assert np.allclose(
            np.frombuffer(expected, np.float32), np.frombuffer(resumed, np.float32), atol=0.05
        )


def test_cancel_while_running(bench: Bench) -> None:
    """From another thread, in the middle of a long generation."""
    path = bench.arch("llama", kv={"llama.context_length": 20000})
    with opened(path, "floor", replace(SHORT, n_prompt=64, n_decode=20000)) as llm:
        tokens = list(np.random.default_rng(0).integers(3, tiny.N_VOCAB, 19000))

        def cancel_soon() -> None:
            deadline = time.monotonic() + 60
            while llm.stats.misses < 200 and time.monotonic() < deadline:
                time.sleep(0.001)
            llm.cancel()

        def generate() -> None:
            with pytest.raises(hobbit.Cancelled):
                llm.eval(tokens)

        in_threads(generate, cancel_soon)
        assert llm.n_tokens < len(tokens)
