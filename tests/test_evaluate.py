from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import tracemalloc
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fakemodel import FakeModel
from gates import layout_of

import hobbit
from hobbit import evaluate as module
from hobbit.errors import Cancelled, HobbitError, UsageError
from hobbit.evaluate import (
    Row,
    Sample,
    compare,
    divergence,
    evaluate,
    log_normaliser,
    temporary_folder,
    windows,
)
from hobbit.forced import Forced, Logits, stoppable
from hobbit.rule import EXACT, Rule
from hobbit.verify import cache_bytes

LOSSY = Rule(t1=0.5)
SAMPLE = Sample(window=50, limit=200, skip=5, warmup=30)
TOKENS = [int(t) for t in np.random.default_rng(3).integers(0, 50, 400)]


def row(*values: float) -> Logits:
    return np.array(values, dtype=np.float32)


def naive_kl(p: Logits, q: Logits) -> float:
    """The definition, in extended precision, without a shift."""
    a, b = np.exp(p.astype(np.longdouble)), np.exp(q.astype(np.longdouble))
    a, b = a / a.sum(), b / b.sum()
    return float((a * (np.log(a) - np.log(b))).sum())


def test_divergence_is_that_of_the_definition() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.01, 1, 10):
        p, q = rng.normal(0, scale, (2, 500)).astype(np.float32)
        assert divergence(p, q) == pytest.approx(naive_kl(p, q), rel=1e-9)
        assert divergence(p, p) == 0.0
        assert scale < 1 or divergence(p, q) != pytest.approx(divergence(q, p), rel=1e-2)


def test_divergence_of_logits_that_overflow_an_exponential() -> None:
    p, q = row(1000.0, 999.0, -1000.0), row(5000.0, 5000.0, 0.0)
    share = 1 / (1 + np.exp(-1.0))
    expected = share * np.log(2 * share) + (1 - share) * np.log(2 * (1 - share))
    assert divergence(p, q) == pytest.approx(expected, rel=1e-6)
    assert log_normaliser(p) == pytest.approx(1000 + np.log(1 + np.exp(-1.0)), rel=1e-9)


def test_divergence_of_what_is_impossible() -> None:
    assert divergence(row(0.0, -np.inf), row(0.0, 0.0)) == pytest.approx(np.log(2))
    assert divergence(row(0.0, 0.0), row(0.0, -np.inf)) == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_numbers_are_refused(value: float) -> None:
    with pytest.raises(HobbitError, match="not numbers"):
        log_normaliser(row(value, value))


def test_rows_are_those_of_a_naive_computation() -> None:
    model = FakeModel()
    exact, lossy = compare(model, TOKENS, [("exact", EXACT), ("half", LOSSY)], SAMPLE, bos=1)
    nll, exact_nll, kl, same, step = [], [], [], 0, 0
    for part in windows(TOKENS, SAMPLE, 1):
        for at in range(len(part) - 1):
            p, q = (model.logits_of(part[: at + 1], rule) for rule in (EXACT, LOSSY))
            step += 1
            if at < 5 or step <= 30:
                continue
            kl.append(naive_kl(p, q))
            nll.append(np.log(np.exp(q.astype(float)).sum()) - q[part[at + 1]])
            exact_nll.append(np.log(np.exp(p.astype(float)).sum()) - p[part[at + 1]])
            same += p.argmax() == q.argmax()
    n = len(kl)
    assert (exact.n_tokens, lossy.n_tokens) == (n, n)
    assert exact.perplexity == pytest.approx(np.exp(np.mean(exact_nll)), rel=1e-6)
    assert lossy.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)
    assert lossy.kl == pytest.approx(np.mean(kl), rel=1e-6)
    assert lossy.kl_se == pytest.approx(np.std(kl, ddof=1) / np.sqrt(n), rel=1e-6)
    assert lossy.kl_max == pytest.approx(max(kl), rel=1e-6)
    above = sum(k > lossy.kl_p99 for k in kl)
    assert above == int(0.01 * (n - 1)) + 1
    assert lossy.top1 == same / n < 1
    assert (exact.kl, exact.kl_se, exact.kl_p99, exact.kl_max, exact.top1) == (0, 0, 0, 0, 1)


def test_counters_are_those_after_the_warm_up() -> None:
    exact, lossy = compare(FakeModel(), TOKENS, [("exact", EXACT), ("half", LOSSY)], SAMPLE)
    assert exact.bytes_per_token == lossy.bytes_per_token == 100  # 1000 while the cache is cold
    assert (exact.low_bytes_per_token, lossy.low_bytes_per_token) == (0, 10)
    assert (exact.high, exact.low, exact.skipped) == (1, 0, 0)
    assert (lossy.high, lossy.low, lossy.skipped) == (0.5, 0.25, 0.25)
    assert exact.hit_rate == 0.75
    assert exact.tok_s > 0 and exact.seconds > 0
    cold = replace(SAMPLE, warmup=0)
    (first,) = compare(FakeModel(), TOKENS, [("exact", EXACT)], cold)
    assert first.bytes_per_token == pytest.approx(100 + 900 * 20 / 196)


def test_every_mode_starts_alike_and_decodes_token_by_token() -> None:
    model = FakeModel()
    compare(model, TOKENS, [("exact", EXACT), ("a", LOSSY), ("b", LOSSY)], SAMPLE)
    arm = [("begin", 0), ("clear", 0), *4 * [("clear", 0), *49 * [("decode", 1)]]]
    assert model.calls == 3 * arm


def test_wide_steps_give_the_same_and_end_with_the_warm_up() -> None:
    model, narrow = FakeModel(), FakeModel()
    arms = [("exact", EXACT), ("half", LOSSY)]
    wide = compare(model, TOKENS, arms, replace(SAMPLE, width=16))
    for a, b in zip(wide, compare(narrow, TOKENS, arms, SAMPLE), strict=True):
        assert replace(a, tok_s=0, seconds=0) == replace(b, tok_s=0, seconds=0)
    sizes = [size for call, size in model.calls if call == "decode"]
    assert sizes[:7] == [16, 14, 16, 3, 16, 16, 16]


def test_one_step_for_a_whole_window() -> None:
    wide = Sample(window=256, skip=0, warmup=20, width=1000)
    (exact,) = compare(FakeModel(), TOKENS[:200], [("exact", EXACT)], wide)
    assert exact.n_tokens == 179


def test_windows_cover_the_text() -> None:
    tokens = list(range(1000))
    parts = windows(tokens, Sample(window=100, limit=450, warmup=0))
    assert [part[0] for part in parts] == [0, 300, 600, 900]
    assert [len(part) for part in parts] == [100] * 4
    assert parts[-1][-1] == 999
    parts = windows(tokens, Sample(window=100, limit=450, warmup=0), bos=7)
    assert [part[:2] for part in parts] == [[7, 0], [7, 300], [7, 601], [7, 901]]
    assert [len(part) for part in parts] == [100] * 4


def test_a_short_text_is_one_window() -> None:
    assert windows(TOKENS[:150], Sample()) == [TOKENS[:150]]
    assert windows(TOKENS, Sample(window=300, limit=200)) == [TOKENS[:200]]
    assert len(windows(TOKENS, Sample(window=100, limit=10**6, warmup=0))) == 4


@pytest.mark.parametrize("n", [0, 1, 2, 100, 128])
def test_too_short_a_text(n: int) -> None:
    with pytest.raises(
        UsageError, match=rf"text of {n} tokens is too short: \d+ count.*64 are needed"
    ):
        compare(FakeModel(), TOKENS[:n], [("exact", EXACT)])
    compare(FakeModel(), TOKENS[:129], [("exact", EXACT)])


def test_too_low_a_limit() -> None:
    with pytest.raises(UsageError, match="limit of 100 tokens is too low: 35 count"):
        compare(FakeModel(), TOKENS, [("exact", EXACT)], Sample(limit=100))


def test_too_small_a_context() -> None:
    with pytest.raises(UsageError, match="windows of 256 tokens need a context"):
        compare(FakeModel(n_ctx=255), TOKENS, [("exact", EXACT)])


def test_exact_logits_are_on_the_disk_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(n_vocab=50_000)
    cheap = np.random.default_rng(0).normal(0, 1, (3, model.n_vocab)).astype(np.float32)

    def quick(self: FakeModel, tokens: list[int], *, logits: bool = True) -> Logits:
        self.context.append(tokens[0])
        return cheap[[len(self.context) % 3]]

    monkeypatch.setattr(FakeModel, "decode", quick)
    largest = 0
    real = module._Reference.next

    def watched(self: Any, logits: Logits) -> Logits:
        nonlocal largest
        largest = max(largest, os.fstat(self._file.fileno()).st_size)
        assert list(tmp_path.iterdir()) == []  # no name: it cannot outlive the process
        return real(self, logits)

    monkeypatch.setattr(module._Reference, "next", watched)
    tracemalloc.start()
    try:
        arms = [("exact", EXACT), ("half", LOSSY)]
        compare(model, TOKENS, arms, SAMPLE, folder=tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest == 196 * 4 * 50_000  # 39 MB
    assert peak < 8 << 20


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    model = FakeModel()
    needed = 196 * 4 * 50 + (64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, needed - 1))
    with pytest.raises(HobbitError, match="logits take") as info:
        compare(model, TOKENS, [("exact", EXACT)], SAMPLE, folder=tmp_path)
    assert isinstance(info.value.__cause__, OSError)  # by which the command line knows exit code 5
    assert model.calls == []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, needed))
    compare(model, TOKENS, [("exact", EXACT)], SAMPLE, folder=tmp_path)


def test_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert temporary_folder() == Path("/var/tmp")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert temporary_folder() == tmp_path


def test_progress() -> None:
    said: list[tuple[str, float]] = []
    arms = [("exact", EXACT), ("half", LOSSY)]
    compare(FakeModel(), TOKENS, arms, SAMPLE, on_progress=lambda *a: said.append(a))
    assert said[0] == ("exact", 0.0) and said[-1] == ("half", 1.0)
    assert len(said) == 2 * 197


def test_row_is_plain_data() -> None:
    (exact,) = compare(FakeModel(), TOKENS, [("exact", EXACT)], SAMPLE)
    assert exact.to_dict()["rule"]["t1"] == 1.0
    assert set(exact.to_dict()) == set(Row.__dataclass_fields__)


# --------------------------------------------------------------------------------------------------
# with a model


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny.make_text_model(tmp_path_factory.mktemp("evaluate") / "m.gguf")
    size = cache_bytes(layout_of(path), "half")
    with hobbit.Llama(str(path), n_ctx=256, n_threads=1, memory="1G", cache_bytes=size) as llama:
        yield llama


def test_exact_with_a_model(llm: hobbit.Llama) -> None:
    tokens = llm.tokenize(b"it is the end of a day " * 20, add_bos=False)
    sample = Sample(window=128, limit=256)
    exact, again = evaluate(llm, tokens, [("again", EXACT)], sample, bos=1)
    assert (again.kl, again.kl_max, again.top1) == (0, 0, 1)
    assert again.perplexity == exact.perplexity
    assert exact.bytes_per_token > 0 and 0 < exact.hit_rate < 1
    # Wide batches compute the same up to rounding.
    (wide,) = evaluate(llm, tokens, [], replace(sample, width=32), bos=1)
    assert wide.perplexity == pytest.approx(exact.perplexity, rel=1e-2)
    # The model is as before: it generates.
    assert llm.create_completion("the end", max_tokens=3, temperature=0)["choices"][0]["text"]


def test_forced_decoding_gives_the_models_logits(llm: hobbit.Llama) -> None:
    from hobbit.stock import Job, collect

    job = Job(n_prompt=1, n_decode=20, n_threads=1)
    tokens = [int(t) for t in job.tokens(llm.n_vocab())[0]]
    expected = collect(llm, job)[:, 0]
    model = Forced(llm)
    model.begin(EXACT)
    found = np.concatenate([model.decode([token]) for token in tokens])
    assert found.tobytes() == expected.tobytes()
    # The past can be taken up again from any place.
    assert model.keep(11)
    assert model.decode([tokens[11]]).tobytes() == expected[11:12].tobytes()
    assert model.decode(tokens[12:15], logits=False).shape == (0, llm.n_vocab())


def test_cancel_from_another_thread(llm: hobbit.Llama) -> None:
    tokens = llm.tokenize(b"it is the end of a day " * 40, add_bos=False)
    started = threading.Event()

    def work() -> None:
        started.wait(10)
        llm.cancel()

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises(Cancelled):
        evaluate(llm, tokens, 50 * [("a", EXACT)], on_progress=lambda *_: started.set())
    thread.join()


def test_ctrl_c_stops_the_model_first(llm: hobbit.Llama) -> None:
    tokens = llm.tokenize(b"it is the end of a day " * 40, add_bos=False)
    running = threading.active_count()
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stoppable(llm, lambda: evaluate(llm, tokens, 500 * [("a", EXACT)]))
    assert time.monotonic() - start < 5
    time.sleep(0.1)
    assert threading.active_count() <= running
    evaluate(llm, tokens, [], Sample(window=128, limit=128, warmup=0))  # no cancel is left behind


def test_stoppable_passes_on(llm: hobbit.Llama) -> None:
    assert stoppable(llm, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        stoppable(llm, lambda: 1 // 0)
