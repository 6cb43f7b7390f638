"""Which type each tensor of a quantised model has: the rules of llama.cpp's quantiser.

They are those for a quantiser without importance matrix. Uploaders change some of them (an
importance matrix, token embeddings in Q8_0, "dynamic" mixtures), so that a real file of a name may
differ; docs/models.md says by how much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ModelError
from ..gguf_file import GGML_TYPES

_BY_NAME = {kind.name: number for number, kind in GGML_TYPES.items()}
_F32, _F16 = _BY_NAME["f32"], _BY_NAME["f16"]
# What takes the place of a type whose blocks do not divide a row.
_FALLBACK = {
    "q2_K": "q4_0",
    "q3_K": "q4_0",
    "q4_K": "q5_0",
    "q5_K": "q5_1",
    "q6_K": "q8_0",
    "iq4_xs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
}
# The type of most tensors, by the name of the mixture, and the file type's number in the header.
_BASE = {
    "F32": ("f32", 0),
    "F16": ("f16", 1),
    "BF16": ("bf16", 32),
    "Q4_0": ("q4_0", 2),
    "Q4_1": ("q4_1", 3),
    "Q5_0": ("q5_0", 8),
    "Q5_1": ("q5_1", 9),
    "Q8_0": ("q8_0", 7),
    "Q2_K": ("q2_K", 10),
    "Q3_K_S": ("q3_K", 11),
    "Q3_K_M": ("q3_K", 12),
    "Q3_K_L": ("q3_K", 13),
    "Q4_K_S": ("q4_K", 14),
    "Q4_K_M": ("q4_K", 15),
    "Q5_K_S": ("q5_K", 16),
    "Q5_K_M": ("q5_K", 17),
    "Q6_K": ("q6_K", 18),
    "IQ4_NL": ("iq4_nl", 25),
    "IQ4_XS": ("iq4_xs", 30),
    "MXFP4": ("mxfp4", 38),
}

MIXTURES = frozenset(_BASE)


@dataclass(frozen=True)
class Model:
    """What of a model the rules ask for."""

    layers: int
    experts: int
    heads_per_kv: int
    tied: bool


def file_type(mixture: str) -> int:
    """Return the number that `general.file_type` has for a mixture."""
    return _BASE[mixture][1]


def tensor_types(
    mixture: str, model: Model, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Return ggml's number of each tensor's type; `shapes` have the row's length first."""
    if mixture not in _BASE:
        raise ModelError(f"{mixture}: hobbit knows no quantisation of that name")
    base = _BASE[mixture][0]
    order = _attention_order(shapes)
    types = {}
    for name, shape in shapes.items():
        if not _is_quantised(name, shape):
            types[name] = _F32
        elif base in ("f32", "f16", "bf16"):
            types[name] = _BY_NAME[base]
        else:
            chosen = _rule(mixture, base, model, name, order)
            types[name] = _fitting(chosen, shape[0])
    return types


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) < 2 or not name.endswith(".weight"):
        return False
    kept = ("_norm.weight", "ffn_gate_inp.weight", "shortconv.conv.weight")
    return not name.endswith(kept)


def _attention_order(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Number the value projections, by which their types vary: (number, of how many)."""
    values = [name for name in shapes if re.search(r"attn_(v|qkv|kv_b)\.weight$", name)]
    return {name: (number, len(values)) for number, name in enumerate(values)}


def _fitting(chosen: str, row: int) -> int:
    """Return the type, or what takes its place where its blocks do not divide a row."""
    if row % GGML_TYPES[_BY_NAME[chosen]].block:
        chosen = _FALLBACK.get(chosen, chosen)
    return _F16 if row % GGML_TYPES[_BY_NAME[chosen]].block else _BY_NAME[chosen]


def _rule(
    mixture: str, base: str, model: Model, name: str, order: Mapping[str, tuple[int, int]]
) -> str:
    if name == "output.weight" or (model.tied and name == "token_embd.weight"):
        return "q8_0" if base in ("q8_0", "mxfp4") else "q6_K"
    if mixture == "MXFP4":
        return "mxfp4" if "_exps." in name else "q8_0"
    if name == "token_embd.weight":
        return base
    if name in order:
        return _value_type(mixture, base, model, *order[name])
    if name.endswith("attn_k.weight"):
        return "q8_0" if model.experts == 8 else base
    if name.endswith("attn_output.weight"):
        return _attention_output_type(mixture, base, model)
    layer = re.match(r"blk\.(\d+)\.ffn_down", name)
    return _down_type(mixture, base, int(layer[1]), model.layers) if layer else base


def _more_bits(number: int, count: int) -> bool:
    """Say whether llama.cpp gives one of `count` layers more bits than the others."""
    eighth = count // 8
    return number < eighth or number >= 7 * count // 8 or (number - eighth) % 3 == 2


def _value_type(mixture: str, base: str, model: Model, number: int, count: int) -> str:
    if model.experts == 8:
        return "q8_0"
    grouped = model.heads_per_kv >= 4
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "q6_K" if _more_bits(number, count) else base
    if mixture == "Q3_K_M":
        return "q5_K" if number < 2 else "q4_K"
    if mixture == "Q4_K_S":
        return "q5_K" if number < 4 else base
    if mixture == "Q2_K":
        return "q4_K" if grouped else "q3_K"
    if mixture in ("IQ4_NL", "IQ4_XS") and grouped:
        return "q5_K"
    return "q5_K" if mixture == "Q3_K_L" else base


def _attention_output_type(mixture: str, base: str, model: Model) -> str:
    if model.experts == 8:
        raised = {"Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS"}
        return "q5_K" if mixture in raised else base
    return {"Q2_K": "q3_K", "Q3_K_M": "q4_K", "Q3_K_L": "q5_K"}.get(mixture, base)


def _down_type(mixture: str, base: str, layer: int, layers: int) -> str:
    if mixture in ("Q4_K_M", "Q5_K_M"):
        return "q6_K" if _more_bits(layer, layers) else base
    first = layer < layers // 8
    if mixture in ("Q4_K_S", "IQ4_NL", "IQ4_XS"):
        return "q5_K" if first else base
    if mixture == "Q3_K_M":
        return "q5_K" if layer < layers // 16 else "q4_K"
    return {"Q2_K": "q3_K", "Q3_K_L": "q5_K"}.get(mixture, base)
