"""Write MoE GGUF files to measure with: an inflated demo, or a real shape with random weights.

The inflated demo is a real model whose experts are padded with neurons that have a zero down
projection: text, logits and routing stay the source's while each expert, and so each read, grows.
Both kinds are written tensor by tensor, so memory use does not depend on the file's size.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType

from hobbit.errors import HobbitError, ModelError, UsageError
from hobbit.sizes import format_size, parse_size

Bytes = npt.NDArray[np.uint8]

# Widths are padded to a multiple of this: whole blocks of every type, and expert sizes that are a
# multiple of a disk sector.
WIDTH_STEP = 256
# A type's (first, last + 1) scale bytes in each block. Zero scales make a block of zeros whatever
# its other bytes are. Those are random: a virtual disk may store and read zeros faster than data.
SCALE_BYTES = {
    Type.Q4_0: (0, 2),
    Type.Q4_1: (0, 4),
    Type.Q5_0: (0, 2),
    Type.Q5_1: (0, 4),
    Type.Q8_0: (0, 2),
    Type.IQ4_NL: (0, 2),
    Type.IQ4_XS: (0, 2),
    Type.Q4_K: (0, 4),
    Type.Q5_K: (0, 4),
    Type.Q6_K: (208, 210),
}
SYNTHETIC_TYPES = {t.name: t for t in (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0)}
EXPERT = re.compile(r"^blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.weight$")


class Tensor(NamedTuple):
    """A tensor to write: its shape, outermost dimension first, and what yields its bytes."""

    name: str
    shape: tuple[int, ...]
    type: Type
    chunks: Callable[[], Iterator[npt.NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return int(np.prod(self.shape, dtype=np.int64) // block * size)


def write_model(
    dest: Path,
    arch: str,
    add_metadata: Callable[[gguf.GGUFWriter], None],
    tensors: Sequence[Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a GGUF of these tensors, return its size; dest appears only when it is whole."""
    total = sum(t.nbytes for t in tensors)
    free = shutil.disk_usage(dest.parent).free
    if total > free:
        raise HobbitError(f"{dest} needs {format_size(total)}, {format_size(free)} are free there")
    part = dest.with_name(f".{dest.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(part, arch)
    try:
        add_metadata(writer)
        for tensor in tensors:
            _add_info(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        out = writer.fout[0]
        writer.write_padding(out, out.tell())
        done = 0
        for tensor in tensors:
            written = sum(out.write(_raw(chunk)) for chunk in tensor.chunks())
            if written != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: {written} bytes, not {tensor.nbytes}")
            writer.write_padding(out, written)
            done += written
            progress(done, total)
        out.flush()
        os.fsync(out.fileno())
        part.replace(dest)
    finally:
        writer.close()
        part.unlink(missing_ok=True)
    return dest.stat().st_size


def _add_info(writer: gguf.GGUFWriter, tensor: Tensor) -> None:
    if tensor.type in (Type.F32, Type.F16):
        dtype = np.dtype(np.float32 if tensor.type == Type.F32 else np.float16)
        writer.add_tensor_info(tensor.name, tensor.shape, dtype, tensor.nbytes)
        return
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
    dtype = np.dtype(np.uint8)
    writer.add_tensor_info(tensor.name, shape, dtype, tensor.nbytes, raw_dtype=tensor.type)


def _raw(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# The inflated demo


class Source:
    """A MoE GGUF whose experts are to be padded from `width` neurons to more."""

    def __init__(self, path: Path) -> None:
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError) as exc:
            raise ModelError(f"{path}: not a readable GGUF file ({exc})") from exc
        self.path = path
        self.arch = str(self.reader.fields["general.architecture"].contents())
        self.experts = [t for t in self.reader.tensors if EXPERT.match(t.name)]
        self.width = self._expert_width()
        self._refuse_what_padding_would_break()

    def _expert_width(self) -> int:
        widths = {int(t.shape[0]) for t in self.experts if "_down_" in t.name}
        if len(widths) != 1:
            raise ModelError(f"{self.path}: its experts have {len(widths)} widths, not one")
        return widths.pop()

    def _refuse_what_padding_would_break(self) -> None:
        names = [t.name for t in self.reader.tensors]
        odd = [n for n in names if re.search(r"_(ch)?exps\.", n) and not EXPERT.match(n)]
        if odd:
            raise ModelError(f"{self.path}: {odd[0]} cannot be padded")
        if self._shared_width_follows():
            raise ModelError(f"{self.path}: its shared experts' width follows the others'")
        if not self.width_keys():
            raise ModelError(f"{self.path}: no metadata key holds the experts' width {self.width}")

    def _shared_width_follows(self) -> bool:
        """Say whether llama.cpp derives the shared experts' width from the experts'."""
        shared = [t for t in self.reader.tensors if t.name.endswith(".ffn_down_shexp.weight")]
        if not shared:
            return False
        keys = self.reader.fields
        count = keys.get(f"{self.arch}.expert_shared_count")
        told = f"{self.arch}.expert_shared_feed_forward_length" in keys
        return not told or (
            count is not None and int(shared[0].shape[0]) == count.contents() * self.width
        )

    def width_keys(self) -> list[str]:
        """Return the metadata keys that llama.cpp reads the experts' width from."""
        keys = [f"{self.arch}.expert_feed_forward_length"]
        if not any(t.name.endswith(".ffn_down.weight") for t in self.reader.tensors):
            keys.append(f"{self.arch}.feed_forward_length")
        held = {k: self.reader.fields[k].contents() for k in keys if k in self.reader.fields}
        return [
            k for k, v in held.items() if set(v if isinstance(v, list) else [v]) == {self.width}
        ]

    def padded_width(self, size: int) -> int:
        """Return the largest width that keeps the file within `size` bytes."""
        per_neuron = sum(t.n_bytes for t in self.experts) / self.width
        room = size - self.path.stat().st_size
        width = self.width + int(room / per_neuron)
        width -= width % WIDTH_STEP
        if width <= self.width:
            smallest = self.path.stat().st_size + int(per_neuron * WIDTH_STEP * 2)
            raise UsageError(f"--size {format_size(size)}: must be {format_size(smallest)} or more")
        return width

    def tensors(self, width: int) -> list[Tensor]:
        return [
            self._padded(t, width) if t in self.experts else _copied(t) for t in self.reader.tensors
        ]

    def _padded(self, tensor: gguf.ReaderTensor, width: int) -> Tensor:
        n_expert, rows, row = (int(n) for n in reversed(tensor.shape))
        if "_down_" in tensor.name:
            shape = (n_expert, rows, width)
            return Tensor(
                tensor.name, shape, tensor.tensor_type, lambda: _wider_rows(tensor, width)
            )
        stacked = rows // self.width  # 2 when gate and up are one matrix
        shape = (n_expert, stacked * width, row)
        chunks = _more_rows
        return Tensor(
            tensor.name, shape, tensor.tensor_type, lambda: chunks(tensor, self.width, width)
        )

    def add_metadata(self, writer: gguf.GGUFWriter, width: int) -> None:
        """Copy the metadata with the experts' width replaced."""
        widths = self.width_keys()
        for field in self.reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            value = field.contents()
            if field.name in widths:
                value = [width] * len(value) if isinstance(value, list) else width
            if field.name == "general.alignment":
                writer.data_alignment = value
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, field.types[0], element)


def _copied(tensor: gguf.ReaderTensor) -> Tensor:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    return Tensor(tensor.name, shape, tensor.tensor_type, lambda: iter([tensor.data]))


def _more_rows(tensor: gguf.ReaderTensor, old: int, new: int) -> Iterator[npt.NDArray[Any]]:
    """Yield each matrix of `old` rows, followed by its own rows again up to `new`."""
    for matrix in tensor.data.reshape(-1, old, tensor.data.shape[-1]):
        for start in range(0, new, old):
            yield matrix[: min(old, new - start)]


def _wider_rows(tensor: gguf.ReaderTensor, width: int) -> Iterator[npt.NDArray[Any]]:
    """Yield each expert with its rows widened to `width` by blocks that decode to zero."""
    block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    if width % block:
        raise ModelError(
            f"{tensor.name}: width {width} is not whole {tensor.tensor_type.name} blocks"
        )
    extra = (width - int(tensor.shape[0])) // block
    rows = int(tensor.shape[1])
    zeros = zero_blocks(tensor.tensor_type, rows * extra).reshape(rows, extra * size)
    for matrix in tensor.data:
        yield np.concatenate([matrix.view(np.uint8), zeros], axis=1)


def zero_blocks(kind: Type, count: int) -> Bytes:
    """Return blocks of this type that decode to zeros."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    if kind not in SCALE_BYTES:
        return np.zeros((count, size), np.uint8)
    blocks = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    first, end = SCALE_BYTES[kind]
    blocks[:, first:end] = 0
    return blocks


def inflate(
    source: Path, dest: Path, size: int, progress: Callable[[int, int], None] = lambda d, t: None
) -> int:
    """Write `source` with its experts padded until the file has about `size` bytes."""
    model = Source(source)
    width = model.padded_width(size)
    tensors = model.tensors(width)
    return write_model(dest, model.arch, lambda w: model.add_metadata(w, width), tensors, progress)


# Real shapes with random weights


@dataclass(frozen=True)
class Shape:
    """What decides the size of a MoE model's tensors."""

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_expert: int
    n_expert_used: int
    n_vocab: int
    rope_base: float
    qk_norm: Literal["none", "whole", "head"]


SHAPES = {
    "olmoe-1b-7b": Shape("olmoe", 16, 2048, 16, 16, 128, 1024, 64, 8, 50304, 1e4, "whole"),
    "qwen3-30b-a3b": Shape("qwen3moe", 48, 2048, 32, 4, 128, 768, 128, 8, 151936, 1e6, "head"),
    "mixtral-8x7b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 8, 2, 32000, 1e6, "none"),
}


class RandomWeights:
    """Yields random tensors as slices of one pool of quantised rows per type, row width and scale.

    Each slice starts elsewhere in the pool: experts differ and every block is valid, while only the
    pool is ever quantised.
    """

    POOL_WEIGHTS = 4 << 20

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.pools: dict[tuple[Type, int, float], npt.NDArray[Any]] = {}
        self.at = 0

    def tensor(self, name: str, shape: tuple[int, ...], kind: Type, sigma: float) -> Tensor:
        return Tensor(name, shape, kind, lambda: self._slices(shape, kind, sigma))

    def _slices(
        self, shape: tuple[int, ...], kind: Type, sigma: float
    ) -> Iterator[npt.NDArray[Any]]:
        pool = self._pool(kind, shape[-1], sigma)
        need = int(np.prod(shape[:-1]))
        while need:
            self.at = (self.at * 7919 + 1013) % len(pool)
            rows = pool[self.at : self.at + need]
            yield rows
            need -= len(rows)

    def _pool(self, kind: Type, columns: int, sigma: float) -> npt.NDArray[Any]:
        key = (kind, columns, sigma)
        if key not in self.pools:
            rows = max(64, self.POOL_WEIGHTS // columns)
            weights = self.random.standard_normal((rows, columns), np.float32) * np.float32(sigma)
            self.pools[key] = gguf.quants.quantize(weights, kind)
        return self.pools[key]


def synthetic_tensors(shape: Shape, kind: Type) -> list[Tensor]:
    """List the tensors of a random model; dense matrices are Q8_0, experts of type `kind`."""
    weights = RandomWeights()
    s = shape

    def matrix(name: str, *dims: int, type: Type = Type.Q8_0, sigma: float = 0.0) -> Tensor:
        return weights.tensor(f"{name}.weight", dims, type, sigma or dims[-1] ** -0.5)

    def norm(name: str, length: int) -> Tensor:
        ones = np.ones(length, np.float32)
        return Tensor(f"{name}.weight", (length,), Type.F32, lambda: iter([ones]))

    tensors = [
        # How much of the routing is the token's own and how much the context's, which hardly
        # changes from token to token: with random tokens, an LRU cache of a third of the experts
        # of the OLMoE shape hits 55 %. (0.02, the usual size: 95 %; 4: 34 %, as without memory.)
        matrix("token_embd", s.n_vocab, s.n_embd, sigma=1.6),
        norm("output_norm", s.n_embd),
        matrix("output", s.n_vocab, s.n_embd),
    ]
    heads, heads_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
    for layer in range(s.n_layer):
        b = f"blk.{layer}."
        tensors += [
            norm(b + "attn_norm", s.n_embd),
            matrix(b + "attn_q", heads, s.n_embd),
            matrix(b + "attn_k", heads_kv, s.n_embd),
            matrix(b + "attn_v", heads_kv, s.n_embd),
            matrix(b + "attn_output", s.n_embd, heads),
            norm(b + "ffn_norm", s.n_embd),
            # Wide enough that a token's experts have clearly different gate weights.
            matrix(
                b + "ffn_gate_inp", s.n_expert, s.n_embd, type=Type.F32, sigma=1.5 * s.n_embd**-0.5
            ),
            matrix(b + "ffn_gate_exps", s.n_expert, s.n_ff, s.n_embd, type=kind),
            matrix(b + "ffn_up_exps", s.n_expert, s.n_ff, s.n_embd, type=kind),
            matrix(b + "ffn_down_exps", s.n_expert, s.n_embd, s.n_ff, type=kind),
        ]
        if s.qk_norm != "none":
            whole = s.qk_norm == "whole"
            tensors.append(norm(b + "attn_q_norm", heads if whole else s.head_dim))
            tensors.append(norm(b + "attn_k_norm", heads_kv if whole else s.head_dim))
    return tensors


def add_synthetic_metadata(writer: gguf.GGUFWriter, name: str, shape: Shape) -> None:
    """Describe a random model, with a vocabulary of single bytes and made-up words."""
    writer.add_name(name)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(shape.n_expert_used)
    if shape.arch != "llama":
        writer.add_expert_feed_forward_length(shape.n_ff)
    writer.add_vocab_size(shape.n_vocab)
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{i:02X}>" for i in range(256)]
    words = shape.n_vocab - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"\u2581w{i}" for i in range(words)])
    writer.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(words)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256 + [kinds.NORMAL] * words
    )
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def synthesize(
    name: str,
    shape: Shape,
    kind: Type,
    dest: Path,
    progress: Callable[[int, int], None] = lambda d, t: None,
) -> int:
    """Write a random model of this shape with experts of type `kind`."""
    tensors = synthetic_tensors(shape, kind)
    title = f"synthetic {name} {kind.name}"
    return write_model(
        dest, shape.arch, lambda w: add_synthetic_metadata(w, title, shape), tensors, progress
    )


# The command


def parse_args(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make-bench-model", description=__doc__)
    models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
    inflated = models.add_parser("inflated", help="a real MoE model with padded experts")
    inflated.add_argument("--size", default="4G", help="size to grow to (default: 4G)")
    inflated.add_argument(
        "--from", dest="source", type=Path, help="source (default: the demo model)"
    )
    inflated.add_argument("out", type=Path, metavar="OUT")
    for name, shape in SHAPES.items():
        text = f"{shape.n_layer} layers of {shape.n_expert} experts, {shape.n_expert_used} used"
        known = models.add_parser(name, help=f"random weights: {text}")
        known.add_argument("--type", default="Q4_0", choices=SYNTHETIC_TYPES, help="of the experts")
        known.add_argument("--layers", type=int, default=shape.n_layer, help="fewer layers")
        known.add_argument("out", type=Path, metavar="OUT")
    return parser.parse_args(args)


def demo_model() -> Path:
    from hobbit import demo

    return demo.ensure(lambda stage, done: None)


def show_progress(done: int, total: int) -> None:
    print(f"\r{format_size(done)} of {format_size(total)}", end="", file=sys.stderr, flush=True)


def main(args: Sequence[str] | None = None) -> int:
    options = parse_args(args)
    progress = show_progress if sys.stderr.isatty() else lambda done, total: None
    try:
        if options.model == "inflated":
            size = parse_size(options.size)
            written = inflate(options.source or demo_model(), options.out, size, progress)
        else:
            shape = replace(SHAPES[options.model], n_layer=options.layers)
            kind = SYNTHETIC_TYPES[options.type]
            written = synthesize(options.model, shape, kind, options.out, progress)
    except (HobbitError, OSError) as exc:
        print(f"make-bench-model: {exc}", file=sys.stderr)
        return exc.exit_code if isinstance(exc, HobbitError) else 1
    print(f"{options.out}: {format_size(written)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
