"""Which type each expert matrix gets in the low-precision copy. Pure: no file, no library."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import UsageError
from .gguf_file import GGML_TYPES
from .layout import ExpertMatrix

NUMBERS = {kind.name: number for number, kind in GGML_TYPES.items()}

# What ggml's quantisers make; a test compares this with the library. f32 is never smaller.
TARGETS = (
    "f16", "bf16", "q8_0", "q6_K", "q5_1", "q5_0", "q5_K", "q4_1", "q4_K", "q4_0", "iq4_nl",
    "nvfp4", "iq4_xs", "mxfp4", "iq3_s", "q3_K", "iq3_xxs", "q2_K", "iq2_s", "iq2_xs", "q2_0",
    "iq2_xxs", "tq2_0", "iq1_m", "tq1_0", "iq1_s", "q1_0",
)  # fmt: skip

# For each source type the types of (gate and up, down), where the rows are whole blocks of 256, and
# where they are only blocks of 32. `down` is the fragile one: a step more bits for it, if the copy
# stays within SHARE of the source's bytes. q2_0, the only type of 2 bits that needs less than 256,
# is not here: ggml's quantiser leaves half the weights' energy as error (in q2_K: 9 %).
SHARE = (0.30, 0.55)
Pair = tuple[str, str]
AUTO: dict[str, tuple[Pair | None, Pair | None]] = {
    "f32": (("f16", "f16"), ("f16", "f16")),
    "f16": (("q5_K", "q6_K"), ("q5_0", "q5_1")),
    "bf16": (("q5_K", "q6_K"), ("q5_0", "q5_1")),
    "q8_0": (("q4_K", "q4_K"), ("iq4_nl", "iq4_nl")),
    "q6_K": (("q3_K", "q3_K"), None),
    "q5_1": (("q2_K", "q3_K"), None),
    "q5_0": (("q2_K", "q3_K"), None),
    "q5_K": (("q2_K", "q3_K"), None),
    "q4_1": (("q2_K", "q2_K"), None),
    "q4_0": (("iq2_xs", "iq2_s"), None),
    "q4_K": (("iq2_xs", "iq2_s"), None),
    "iq4_nl": (("iq2_xs", "iq2_s"), None),
    "nvfp4": (("iq2_xs", "iq2_s"), None),
    "iq4_xs": (("iq2_xxs", "iq2_s"), None),
    "mxfp4": (("iq2_xxs", "iq2_s"), None),
}

# Up to this many bits a weight, the columns' importance is worth running the model on text: below 4
# it decides whether the copy is any good, at 4.5 it takes a quarter off the KL (docs/quality.md).
_IMPORTANCE_BITS = 5.0
# With an importance, also one that favours no column, ggml searches for the best scales. That takes
# 5 to 45 times longer and makes the squared error of these types 10 to 20 % smaller (q4_K: 2 %). So
# q4_0 is within 5 % of iq4_nl, in a fifth of its time.
_GAIN_FROM_SEARCH = {"q4_0", "q4_1", "q5_0", "q5_1"}
_WIDE = 256


def bits(name: str) -> float:
    """Return the bits that a weight of this type takes."""
    kind = GGML_TYPES[NUMBERS[name]]
    return 8 * kind.nbytes / kind.block


def choose(low: str, matrices: Iterable[ExpertMatrix]) -> dict[str, int]:
    """Map each matrix's name to the ggml type of its low copy.

    `low` is `auto`, a type for all, or two with a comma between: gate and up, then down.
    UsageError: the type is unknown, does not fit the rows, or saves nothing.
    """
    if low.lower() == "auto":
        return {matrix.name: NUMBERS[_auto(matrix)] for matrix in matrices}
    names = [_known(word) for word in low.split(",")]
    if len(names) > 2:
        raise UsageError(f"--low {low}: give one type, or two: of gate and up, and of down")
    return {matrix.name: NUMBERS[_asked(names, matrix)] for matrix in matrices}


def low_bytes(matrix: ExpertMatrix, kind: int) -> int:
    """Return the bytes of one expert of this matrix in another type."""
    return matrix.ne0 * matrix.ne1 // GGML_TYPES[kind].block * GGML_TYPES[kind].nbytes


def wants_importance(types: Iterable[int]) -> bool:
    """Return whether some of these types are so coarse that an importance matrix is worth it."""
    return any(bits(GGML_TYPES[kind].name) <= _IMPORTANCE_BITS for kind in types)


def gains_from_search(types: Iterable[int]) -> bool:
    """Return whether a uniform importance is worth its time for some of these types."""
    return any(GGML_TYPES[kind].name in _GAIN_FROM_SEARCH for kind in types)


def role(matrix: ExpertMatrix) -> str:
    """Return gate, up, gate_up or down."""
    return matrix.name.split(".")[2].removeprefix("ffn_").rpartition("_")[0]


def _auto(matrix: ExpertMatrix) -> str:
    source = GGML_TYPES[matrix.type].name
    wide, narrow = AUTO.get(source, (None, None))
    pair = wide if matrix.ne0 % _WIDE == 0 else narrow
    if pair is None:
        rows = "" if matrix.ne0 % _WIDE == 0 else f" with rows of {matrix.ne0}"
        low, high = SHARE
        raise UsageError(
            f"{matrix.name} is {source}{rows}: no type is worth having between "
            f"{low:.0%} and {high:.0%} of its size; name one with --low, or start "
            "from a copy of the model with more bits"
        )
    return pair[role(matrix) == "down"]


def _known(word: str) -> str:
    for name in TARGETS:
        if name.lower() == word.strip().lower():
            return name
    raise UsageError(f"--low {word.strip()}: is not a type; auto, or one of {', '.join(TARGETS)}")


def _asked(names: list[str], matrix: ExpertMatrix) -> str:
    name = names[-1] if role(matrix) == "down" else names[0]
    block = GGML_TYPES[NUMBERS[name]].block
    if matrix.ne0 % block:
        raise UsageError(
            f"--low {name}: {matrix.name} has rows of {matrix.ne0}, not a multiple of {block}; "
            "of 4 bits, q4_0, q4_1 and iq4_nl need only a multiple of 32"
        )
    if low_bytes(matrix, NUMBERS[name]) >= matrix.expert_bytes:
        raise UsageError(
            f"--low {name}: {matrix.name} is {GGML_TYPES[matrix.type].name} already, "
            "which takes no more space"
        )
    return name
