"""What the tests of two precisions share: low copies, GGUFs of them alone, and read schedules."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
from gates import JOB, Bench, layout_of, opened
from gguf import GGMLQuantizationType as Q

import hobbit
from hobbit.gguf_file import open_gguf
from hobbit.layout import LOW_PLANE
from hobbit.prepare import make_low
from hobbit.stock import Job

MIXED = replace(JOB, n_prompt=40, n_decode=24, n_ubatch=16)
# As when generating: each token is a ubatch of its own.
SINGLE = replace(JOB, n_prompt=1, n_decode=40, n_ubatch=16)

# A computation of a layer: group, and each expert with the precision it got, in both's order.
Step = tuple[int, list[tuple[int, int]]]
HIGH, LOW, SKIP = range(3)


def k_mix(name: str) -> str:
    """Choose types as the *_K_M mixes do: some layers' down projections get more bits."""
    layer = int(name.split(".")[1])
    if "down" in name:
        return ("Q6_K", "Q4_K", "Q5_K")[layer % 3]
    return "Q3_K" if layer == 1 else "Q4_K"


# Models with high and low types: by architecture, and by what their files have.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3moe": ({"arch": "qwen3moe", "n_used": 4}, "q4_0"),
    "olmoe": ({"arch": "olmoe", "n_used": 3}, "q4_1,q5_1"),
    "granitemoe": ({"arch": "granitemoe"}, "q4_0"),
    "deepseek2": ({"arch": "deepseek2", "n_expert": 16, "n_used": 4}, "iq4_nl"),
    "gpt-oss": ({"arch": "gpt-oss", "n_used": 4}, "mxfp4"),
    "llama": ({"arch": "llama"}, "q5_0"),
    "k-mix": (
        {"arch": "qwen3moe", "expert_type": k_mix, "n_embd": 256, "n_ff": 256, "n_used": 3},
        "q2_K",
    ),
    "fused": ({"arch": "qwen3moe", "fused": True, "n_used": 4}, "q4_0"),
    # Experts that are no multiple of a sector: direct reads need a bounce buffer.
    "odd-size": (
        {"arch": "olmoe", "n_embd": 96, "n_ff": 160, "n_head": 3, "expert_type": "F16"},
        "q8_0",
    ),
    # Two pools of slots.
    "layers-differ": (
        {
            "arch": "nemotron_h_moe",
            "n_layer": 5,
            "kv": {
                "nemotron_h_moe.expert_used_count": [0, 0, 3, 1, 2],
                "nemotron_h_moe.expert_feed_forward_length": [0, 0, 128, 64, 96],
            },
        },
        "q4_0",
    ),
}


def pair(bench: Bench, name: str) -> tuple[Path, Path]:
    """Return a model of MODELS and its low copy."""
    options, kind = MODELS[name]
    path = bench.arch(**options)
    return path, low_of(bench, path, kind)


def low_of(bench: Bench, path: Path, kind: str) -> Path:
    """Return a low copy of a model, made once."""
    name = f"{path.stem}-low-{kind}"
    return bench.model(name, lambda dest: make_low(layout_of(path), dest, kind).path)


def only_low(bench: Bench, path: Path, low: Path) -> Path:
    """Return a GGUF of a model whose experts are those of its low copy, or of its nested copy."""
    name = f"{path.stem}-only-{low.stem}"
    return bench.model(name, lambda dest: _replaced(path, low, dest))


def _replaced(path: Path, low: Path, dest: Path) -> Path:
    source, copies = gguf.GGUFReader(path), gguf.GGUFReader(low)
    experts = {t.name: t for t in copies.tensors if not t.name.endswith(LOW_PLANE)}
    writer = gguf.GGUFWriter(str(dest), source.fields["general.architecture"].contents())
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *sub = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=sub[0] if sub else None)
    streamed = layout_of(path).streamed
    for tensor in source.tensors:
        own = experts[tensor.name] if tensor.name in streamed else tensor
        plain = own.tensor_type in (Q.F32, Q.F16)
        writer.add_tensor(own.name, own.data, raw_dtype=None if plain else own.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    types = {t.name: t.type for t in open_gguf(dest).tensors.values()}
    assert all(types[name] == experts[name].tensor_type for name in streamed)
    return dest


@contextlib.contextmanager
def mixed(
    paths: tuple[Path, Path], cache: str | int, job: Job = MIXED, **arguments: Any
) -> Iterator[hobbit.Llama]:
    """Open a model with its low copy, at a named cache size or a number of bytes."""
    with opened(paths[0], cache, job, low=str(paths[1]), **arguments) as llm:
        yield llm


def n_pairs(path: Path, job: Job = MIXED) -> int:
    """Return how many (token, expert) pairs a job has: all its tokens have logits."""
    layout = layout_of(path)
    used = layout.gguf.get(f"{layout.gguf.arch}.expert_used_count")
    each = [used[g.layer] if isinstance(used, list) else used for g in layout.groups]
    return job.n_seq * (job.n_prompt + job.n_decode) * sum(each)


def steps_of(schedule: Path) -> list[Step]:
    """Read a recorded schedule, by what native/schedule.h says of its format."""
    data = schedule.read_bytes()
    assert data[:8] == b"HBSCHED1"
    at = 12 + int.from_bytes(data[8:12], "little")
    json.loads(data[12:at])
    numbers: list[int] = []
    value = shift = 0
    for byte in data[at:]:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(value)
            value = shift = 0
    assert shift == 0
    found: list[Step] = []
    while numbers:
        group, n = numbers[:2]
        found.append((group, [(v // 4, v % 4) for v in numbers[2 : 2 + n]]))
        numbers = numbers[2 + n :]
    return found
