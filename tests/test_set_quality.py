"""Llama.set_quality: another quality for a loaded model, as if it had been loaded with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gates import Bench
from mixed import pair
from moefile import write_moe

import hobbit
from hobbit.calibration import Point
from hobbit.gguf_file import open_gguf
from hobbit.layout import build_layout
from hobbit.quality import Quality, low_copies
from hobbit.rule import ALL_LOW, Rule

ARGUMENTS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "memory": "2G"}
EXACT = Quality("exact", Rule())
TOKENS = [5, 9, 2, 7, 11, 3, 8, 6]


def logits_of(llm: hobbit.Llama) -> bytes:
    llm.reset()
    llm.eval(TOKENS)
    row = llm._ctx.get_logits_ith(-1)
    return np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).tobytes()


@pytest.fixture
def model(bench: Bench) -> tuple[str, Quality]:
    """A model and a deterministic quality with low copies."""
    high, low = pair(bench, "qwen3moe")
    copies = low_copies(build_layout(open_gguf(high)), low)
    return str(high), Quality("fast", Rule(0.2, 0.9, deterministic=True), copies)


def test_it_computes_as_if_loaded_so(model: tuple[str, Quality]) -> None:
    path, fast = model
    with hobbit.Llama(path, quality=EXACT, **ARGUMENTS) as llm:
        exact = logits_of(llm)
        assert not llm.takes_quality(fast)
        with pytest.raises(hobbit.UsageError, match="needs the model to be loaded with it"):
            llm.set_quality(fast)
        assert (logits_of(llm), llm.quality.name) == (exact, "exact")
    with hobbit.Llama(path, quality=fast, **ARGUMENTS) as llm:
        lossy = logits_of(llm)
        assert lossy != exact
        llm.set_quality("exact")
        assert (logits_of(llm), llm.quality.name) == (exact, "exact")
        llm.set_quality(fast)
        assert (logits_of(llm), llm.quality) == (lossy, fast)
        # The plan made anew by another cap keeps it.
        llm.set_memory("1G")
        assert (logits_of(llm), llm.quality) == (lossy, fast)


def test_a_model_without_experts_is_exact(tmp_path: Path) -> None:
    path = write_moe(tmp_path / "m.gguf", dense=True)
    with hobbit.Llama(str(path), **ARGUMENTS) as llm:
        llm.set_quality("exact")
        with pytest.raises(hobbit.UsageError, match="has no experts"):
            llm.set_quality("fast")


def test_with_all_low_copies_kept_only_what_may_be_low_everywhere(
    model: tuple[str, Quality],
) -> None:
    path, fast = model
    point = Point.__new__(Point)  # whatever was measured: that there is one is what counts
    everywhere = replace(fast, rule=ALL_LOW, all_low=point)
    with hobbit.Llama(path, quality=fast, **ARGUMENTS) as llm:
        llm.plan = replace(llm.plan, low_is_resident=True)
        assert not llm.takes_quality(EXACT)
        assert not llm.takes_quality(fast)
        assert llm.takes_quality(everywhere)
