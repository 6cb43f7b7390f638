"""What calibration gathers, against sums and scores made in numpy from the weights of one layer.

A context of one token attends to itself alone, so that the layer's input is a line of algebra.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gates import JOB, Bench, layout_of, opened, run
from mixed import MIXED, low_of, mixed, n_pairs, pair, steps_of

import hobbit
from hobbit.calibrate import IMPORTANCE_BATCH, LAST_LAYER_EVERY, gather_importance
from hobbit.forced import Forced
from hobbit.importance import Importance, read_importance, write_importance
from hobbit.layout import Layout
from hobbit.rule import ALL_LOW, Rule

Floats = npt.NDArray[np.float64]

TOKENS = [5, 300, 5, 17, 99, 260, 271, 280, 41, 9, 130, 200]
F32 = {"type_k": 0, "type_v": 0}  # of the KV cache
N_USED = 3


@pytest.fixture(scope="module")
def one_layer(bench: Bench) -> Path:
    return bench.arch("llama", expert_type="F32", dense_type="F32", n_layer=1, n_used=N_USED)


@dataclass
class Layer:
    """One token's way through the experts: which, their weights, what enters gate, up and down."""

    experts: list[int]
    weights: Floats
    x: Floats
    hidden: list[Floats]


def layers(path: Path) -> list[Layer]:
    tensors = {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(path).tensors}

    def attention(h: Floats) -> Floats:
        value = of("attn_v") @ norm(h, "attn") + tensors["blk.0.attn_v.bias"]
        made: Floats = of("attn_output") @ value + tensors["blk.0.attn_output.bias"]
        return made

    def norm(x: Floats, name: str) -> Floats:
        scaled: Floats = x / np.sqrt((x * x).mean() + 1e-5) * tensors[f"blk.0.{name}_norm.weight"]
        return scaled

    def of(name: str) -> Floats:
        found: Floats = tensors[f"blk.0.{name}.weight"]
        return found

    found = []
    for token in TOKENS:
        h = tensors["token_embd.weight"][token]
        x = norm(h + attention(h), "ffn")
        logits = of("ffn_gate_inp") @ x
        p = np.exp(logits - logits.max())
        experts = [int(e) for e in np.argsort(-p)[:N_USED]]
        gates = [of("ffn_gate_exps")[e] @ x for e in experts]
        hidden = [
            g / (1 + np.exp(-g)) * (of("ffn_up_exps")[e] @ x)
            for g, e in zip(gates, experts, strict=True)
        ]
        weights = p[experts] / p[experts].sum()
        found.append(Layer(experts, weights, x, hidden))
    return found


def feed(llm: hobbit.Llama) -> None:
    """Decode each token in a context of its own."""
    model = Forced(llm)
    for token in TOKENS:
        model.clear()
        model.decode([token])


def test_collect(one_layer: Path) -> None:
    with opened(one_layer, "floor", JOB, **F32) as llm:
        feed(llm)  # before: nothing of it counts
        with llm.collect() as inputs:
            feed(llm)
        frozen = {name: (of.squares.copy(), of.rows.copy()) for name, of in inputs.items()}
        feed(llm)
    expected = {
        role: (np.zeros((8, 128)), np.zeros(8, np.int64)) for role in ("gate", "up", "down")
    }
    for layer in layers(one_layer):
        for expert, hidden in zip(layer.experts, layer.hidden, strict=True):
            for role, row in (("gate", layer.x), ("up", layer.x), ("down", hidden)):
                expected[role][0][expert] += row**2
                expected[role][1][expert] += 1
    assert set(inputs) == layout_of(one_layer).streamed
    for role, (squares, rows) in expected.items():
        found = inputs[f"blk.0.ffn_{role}_exps.weight"]
        assert found.rows.tolist() == rows.tolist(), role
        np.testing.assert_allclose(found.squares, squares, rtol=1e-3, atol=1e-5)
        for mine, then in zip(
            (found.squares, found.rows), frozen[f"blk.0.ffn_{role}_exps.weight"], strict=True
        ):
            assert (mine == then).all(), "it went on after its end"


def test_observe(one_layer: Path) -> None:
    with opened(one_layer, "floor", JOB, **F32) as llm:
        with llm.observe() as bins:
            feed(llm)
        assert llm.stats.scored == N_USED * len(TOKENS)
        before = bins.copy()
        feed(llm)
        assert (bins == before).all(), "it went on after its end"
    assert bins.shape == (1, 1000)
    # s of the second is the first's weight, s of the third that of both.
    scores = np.array([np.cumsum(layer.weights)[:-1] for layer in layers(one_layer)]).ravel()
    assert bins.sum() == len(scores) == len(TOKENS) * (N_USED - 1)
    seen = np.repeat(np.arange(1000), bins[0])
    assert np.abs(np.sort(scores) * 1000 - 0.5 - seen).max() < 0.6


@pytest.mark.parametrize("rule", [Rule(), Rule(0.3, 0.7, deterministic=True)])
def test_needs_follow_the_scores(rule: Rule, bench: Bench, one_layer: Path, tmp_path: Path) -> None:
    paths = one_layer, low_of(bench, one_layer, "q8_0")
    with mixed(paths, "floor", JOB, rule=rule, **F32) as llm, llm.recorded(tmp_path / "schedule"):
        feed(llm)
    for layer, (_, got) in zip(layers(one_layer), steps_of(tmp_path / "schedule"), strict=True):
        scores = np.concatenate([[0], np.cumsum(layer.weights)[:-1]])
        assert np.abs(scores[:, None] - [0.3, 0.7]).min() > 1e-3, "too near to tell"
        need = {
            e: 0 if s <= rule.t1 else 1 if s <= rule.t2 else 2
            for e, s in zip(layer.experts, scores, strict=True)
        }
        assert dict(got) == need


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek2", "gpt-oss", "layers-differ", "fused"])
def test_every_pair_is_counted(name: str, bench: Bench, tmp_path: Path) -> None:
    """At any cache size, in batches and single steps: rows as routed, and the same sums."""
    paths, found = pair(bench, name), []
    for cache in ("floor", "all"):
        with mixed(paths, cache, MIXED) as llm:
            with llm.collect() as inputs, llm.observe() as bins:
                exact = run(llm, MIXED)
            assert exact.tobytes() == bench.stock(paths[0], MIXED).tobytes()
            found.append({name: of.squares for name, of in inputs.items()})
            used = llm.layout.groups
            for group in used:
                rows = [inputs[m.name].rows for m in group.matrices]
                assert all((r == rows[0]).all() for r in rows)
            total = sum(int(inputs[g.matrices[0].name].rows.sum()) for g in used)
            assert total == n_pairs(paths[0])
            # All but the top ones have s > 0.
            tops = (MIXED.n_prompt + MIXED.n_decode) * len(used)
            assert bins.sum() == n_pairs(paths[0]) - tops
    for tensor, squares in found[0].items():
        np.testing.assert_allclose(squares, found[1][tensor], rtol=1e-5)


def test_only_what_is_computed_high_or_low_is_summed(bench: Bench) -> None:
    paths = pair(bench, "qwen3moe")
    with mixed(paths, "all", MIXED, rule=ALL_LOW) as llm:
        with llm.collect() as inputs:
            run(llm, MIXED)
        assert sum(int(of.rows.sum()) for of in inputs.values()) == 3 * n_pairs(paths[0])
        llm.rule = Rule(0.0, 0.0, deterministic=True)
        before = llm.stats
        with llm.collect() as inputs:
            run(llm, MIXED)
        since = llm.stats.minus(before)
        assert sum(int(of.rows.sum()) for of in inputs.values()) == 3 * since.pairs_high
        assert since.pairs_skip > 0


@pytest.fixture(scope="module")
def gathered(bench: Bench) -> tuple[Layout, Importance]:
    layout = layout_of(bench.arch("qwen3moe", n_used=4))
    text = "it is the end of a day and they were not at home with you by the " * 50
    return layout, gather_importance(layout, text, threads=1, memory="1G")


def test_an_importance_is_gathered(gathered: tuple[Layout, Importance], tmp_path: Path) -> None:
    layout, made = gathered
    assert set(made.sums) == layout.streamed
    write_importance(tmp_path / "imatrix", made, layout)
    again = read_importance(tmp_path / "imatrix", layout)
    for name, sums in made.sums.items():
        assert np.isfinite(sums).all() and (sums >= 0).all() and sums.any()
        assert (again.counts[name] == made.counts[name]).all()
        np.testing.assert_allclose(again.sums[name], sums, rtol=1e-6)


def test_every_layer_hears_the_whole_text(gathered: tuple[Layout, Importance]) -> None:
    layout, made = gathered
    rows = {name: int(counts.sum()) for name, counts in made.counts.items()}
    # The last layer computes only tokens with logits: as many of them as memory is planned for.
    last = {m.name for m in layout.groups[-1].matrices}
    whole = {n for name, n in rows.items() if name not in last}
    assert len(whole) == 1, rows
    batches = max(whole) // layout.n_expert_used // IMPORTANCE_BATCH
    heard = max(whole) // LAST_LAYER_EVERY + layout.n_expert_used * batches  # and each last token
    assert {rows[name] for name in last} == {heard}, rows
