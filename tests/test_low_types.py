"""Which types the low copy gets."""

from __future__ import annotations

import pytest

from hobbit._native import lib
from hobbit.errors import UsageError
from hobbit.gguf_file import GGML_TYPES
from hobbit.layout import ExpertMatrix
from hobbit.low_types import (
    AUTO,
    NUMBERS,
    SHARE,
    TARGETS,
    bits,
    choose,
    gains_from_search,
    low_bytes,
    role,
    wants_importance,
)


def matrix(name: str, kind: str, ne0: int = 256, ne1: int = 256) -> ExpertMatrix:
    nbytes = ne0 * ne1 // GGML_TYPES[NUMBERS[kind]].block * GGML_TYPES[NUMBERS[kind]].nbytes
    full = f"blk.0.ffn_{name}_exps.weight"
    return ExpertMatrix(full, 0, 0, NUMBERS[kind], ne0, ne1, 4, 0, 0, nbytes)


def layer(kind: str, ne0: int = 256) -> list[ExpertMatrix]:
    return [matrix(name, kind, ne0) for name in ("gate", "up", "down")]


def chosen(low: str, matrices: list[ExpertMatrix]) -> list[str]:
    types = choose(low, matrices)
    return [GGML_TYPES[types[matrix.name]].name for matrix in matrices]


def test_targets_are_what_the_library_makes() -> None:
    source = NUMBERS["q8_0"]
    made = {kind.name for n, kind in GGML_TYPES.items() if lib.hobbit_can_quantize(source, n)}
    assert made == {*TARGETS, "f32"}


@pytest.mark.parametrize("source", AUTO)
@pytest.mark.parametrize(("width", "index"), [(256, 0), (32, 1)])
def test_automatic_types_have_the_promised_share(source: str, width: int, index: int) -> None:
    pair = AUTO[source][index]
    if pair is None or GGML_TYPES[NUMBERS[source]].block > width:
        return
    matrices = layer(source, width)
    names = chosen("auto", matrices)
    assert names == [pair[0], pair[0], pair[1]]
    size = sum(low_bytes(m, NUMBERS[name]) for m, name in zip(matrices, names, strict=True))
    low, high = SHARE
    assert low <= size / sum(m.expert_bytes for m in matrices) <= high
    assert bits(names[2]) >= bits(names[0])


def test_each_matrix_is_judged_by_its_own_rows_and_type() -> None:
    assert chosen("auto", [matrix("up", "q8_0", 576), matrix("down", "q8_0", 512)]) == [
        AUTO["q8_0"][1][0],  # type: ignore[index]
        "q4_K",
    ]
    assert chosen("auto", [matrix("gate", "q4_K"), matrix("down", "q6_K")]) == ["iq2_xs", "q3_K"]


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("q2_K", 256, "is q2_K: no type is worth having between 30% and 55% of its size"),
        ("q4_0", 96, "is q4_0 with rows of 96: no type is worth having"),
        ("mxfp4", 2880, "is mxfp4 with rows of 2880: no type is worth having"),
    ],
)
def test_where_nothing_is_worth_having(kind: str, rows: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose("auto", layer(kind, rows))


def test_types_by_name() -> None:
    assert chosen("Q4_0", layer("q8_0", 96)) == ["q4_0"] * 3
    assert chosen("q3_k", layer("q8_0")) == ["q3_K"] * 3
    assert chosen("iq4_nl, Q5_1", layer("q8_0", 96)) == ["iq4_nl", "iq4_nl", "q5_1"]
    assert chosen("q4_0,q5_1", [matrix("gate_up", "q8_0")]) == ["q4_0"]


@pytest.mark.parametrize(
    ("low", "words"),
    [
        ("q4_K_M", "--low q4_K_M: is not a type; auto, or one of f16, "),
        ("", "--low : is not a type"),
        ("f32", "--low f32: is not a type"),
        ("q4_0,", "--low : is not a type"),
        ("q4_K", "--low q4_K: blk.0.ffn_gate_exps.weight has rows of 96, not a multiple of 256"),
        ("q8_0", "--low q8_0: blk.0.ffn_gate_exps.weight is q8_0 already"),
        ("q4_0,f16", "--low f16: blk.0.ffn_down_exps.weight is q8_0 already"),
        ("q4_0,q4_1,q5_0", "give one type, or two"),
    ],
)
def test_refusals(low: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        choose(low, layer("q8_0", 96))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_wants_an_importance() -> None:
    assert not wants_importance([NUMBERS["q5_0"], NUMBERS["q6_K"]])
    for name in ("q4_0", "q4_1", "q4_K", "iq4_nl", "q3_K"):
        assert wants_importance([NUMBERS["q8_0"], NUMBERS[name]]), name
    assert gains_from_search([NUMBERS["q4_K"], NUMBERS["q4_1"]])
    assert not gains_from_search([NUMBERS["q4_K"]])


@pytest.mark.parametrize("name", ["gate", "up", "down", "gate_up"])
def test_roles(name: str) -> None:
    assert role(matrix(name, "q8_0")) == name
