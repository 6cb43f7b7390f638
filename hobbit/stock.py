"""The other arm of a comparison: plain llama-cpp-python, in a process that never loads hobbit.

Run as a script it answers one JSON request a line on stdin with one JSON line on stdout. A child
process of its own keeps hobbit's ggml device out of the stock arm's scheduler, gives its memory
back before hobbit's arm starts, and survives a model that aborts llama.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api
from llama_cpp._ggml import libggml

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """What both arms decode: random tokens, so that the routing varies, with every logit kept.

    Each of `n_seq` sequences has its own tokens; they share every batch. The prompt is longer than
    the ubatch, so that one decode call takes several. Without `all_logits` only the prompt's last
    token has logits, as when generating: the last layer then computes nothing for most ubatches.
    """

    n_prompt: int = 80
    n_decode: int = 32
    n_ubatch: int = 32
    n_seq: int = 1
    n_threads: int = 2
    seed: int = 0
    all_logits: bool = True

    @property
    def n_ctx(self) -> int:
        """Return cells for every token of every sequence, with room for llama.cpp's rounding."""
        return self.n_seq * -(-(self.n_prompt + self.n_decode + 1) // 256) * 256

    def tokens(self, n_vocab: int) -> npt.NDArray[np.int32]:
        """Return the tokens of all sequences, one row each."""
        rng = np.random.default_rng(self.seed)
        size = (self.n_seq, self.n_prompt + self.n_decode)
        return rng.integers(0, n_vocab, size, dtype=np.int32)

    def llama_arguments(self) -> dict[str, Any]:
        """Return the constructor arguments that both arms share."""
        return {
            "n_ctx": self.n_ctx,
            "n_batch": self.n_seq * self.n_prompt,
            "n_ubatch": self.n_ubatch,
            "n_threads": self.n_threads,
            "n_threads_batch": self.n_threads,
            "verbose": False,
        }


class DecodeFailed(RuntimeError):
    """llama_decode returned an error; hobbit's reason, if any, is the model's last error."""


def collect(llama: llama_cpp.Llama, job: Job) -> Logits:
    """Decode the job on the model and return its logits: (position, sequence, vocabulary)."""
    if job.n_seq == 1:
        context = llama._ctx.ctx
        api.llama_memory_clear(api.llama_get_memory(context), True)
        return _decode(context, llama.n_vocab(), job)
    with further_context(llama, job) as context:
        return _decode(context, llama.n_vocab(), job)


@contextlib.contextmanager
def further_context(llama: llama_cpp.Llama, job: Job) -> Iterator[Any]:
    """Make a context beside the one the model's object has, with as many sequences as the job."""
    params = type(llama.context_params).from_buffer_copy(llama.context_params)
    params.n_seq_max = job.n_seq
    context = api.llama_init_from_model(llama._model.model, params)
    if not context:
        raise DecodeFailed("llama.cpp could not make a further context")
    try:
        yield context
    finally:
        api.llama_free(context)


def _decode(context: Any, n_vocab: int, job: Job) -> Logits:
    logits = empty_logits(n_vocab, job)
    for _ in steps(context, job, logits):
        pass
    return logits


def empty_logits(n_vocab: int, job: Job) -> Logits:
    """Return room for what `steps` fills in."""
    return np.zeros((job.n_prompt + job.n_decode, job.n_seq, n_vocab), dtype=np.float32)


def steps(context: Any, job: Job, logits: Logits) -> Iterator[None]:
    """Decode the prompt, then token by token, stopping after each llama_decode."""
    tokens = job.tokens(logits.shape[2])
    batch = api.llama_batch_init(job.n_prompt * job.n_seq, 0, 1)
    try:
        first = 0 if job.all_logits else job.n_prompt - 1
        _step(context, batch, tokens, range(job.n_prompt), logits, first)
        yield
        for position in range(job.n_prompt, job.n_prompt + job.n_decode):
            _step(context, batch, tokens, range(position, position + 1), logits)
            yield
    finally:
        api.llama_batch_free(batch)


def _step(
    context: Any,
    batch: Any,
    tokens: npt.NDArray[np.int32],
    positions: range,
    logits: Logits,
    first_logits: int = 0,
) -> None:
    """Decode these positions of every sequence in one batch; keep logits from a position on."""
    order = [(seq, pos) for seq in range(len(tokens)) for pos in positions]
    batch.n_tokens = len(order)
    for i, (seq, pos) in enumerate(order):
        batch.token[i] = int(tokens[seq, pos])
        batch.pos[i] = pos
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = seq
        batch.logits[i] = pos >= first_logits
    status = api.llama_decode(context, batch)
    if status != 0:
        raise DecodeFailed(f"llama_decode returned {status} at position {positions.start}")
    n_vocab = logits.shape[2]
    for i, (seq, pos) in enumerate(order):
        if pos < first_logits:
            continue
        row = api.llama_get_logits_ith(context, i)
        logits[pos, seq] = np.ctypeslib.as_array(row, shape=(n_vocab,))


@contextlib.contextmanager
def plain_llama(
    path: str, arguments: dict[str, Any], *, extra_buffers: bool = False, n_cpu_moe: int = 0
) -> Iterator[llama_cpp.Llama]:
    """Open a model with llama-cpp-python's own class, changing one default of llama.cpp.

    With extra buffer types llama.cpp repacks weights, which rounds differently and, on a CPU with
    AMX, crashes in a batch. hobbit leaves them off where it streams; Llama has no argument for it.
    Nor for `n_cpu_moe`, llama.cpp's own: the experts of so many layers stay off the GPU.
    """
    overrides = _experts_off_gpu(n_cpu_moe) if n_cpu_moe else None
    default_params = api.llama_model_default_params

    def without_extra_buffers() -> Any:
        params = default_params()
        params.use_extra_bufts = params.use_extra_bufts and extra_buffers
        params.tensor_buft_overrides = overrides and ctypes.addressof(overrides)
        return params

    api.llama_model_default_params = without_extra_buffers
    try:
        llama = llama_cpp.Llama(path, **arguments)
    finally:
        api.llama_model_default_params = default_params
    with contextlib.closing(llama):
        yield llama


class _Override(ctypes.Structure):
    """llama.cpp's llama_model_tensor_buft_override, which its Python binding leaves out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _experts_off_gpu(n_layers: int) -> ctypes.Array[_Override]:
    """Say what `--n-cpu-moe` says; it has to live as long as the model."""
    by_name, type_of = libggml.ggml_backend_dev_by_name, libggml.ggml_backend_dev_buffer_type
    by_name.argtypes, by_name.restype = [ctypes.c_char_p], ctypes.c_void_p
    type_of.argtypes, type_of.restype = [ctypes.c_void_p], ctypes.c_void_p
    host = type_of(by_name(b"CPU"))
    patterns = [rf"blk\.{n}\.ffn_(up|down|gate|gate_up)_(ch|)exps" for n in range(n_layers)]
    entries = [_Override(pattern.encode(), host) for pattern in patterns]
    return (_Override * (n_layers + 1))(*entries, _Override(None, None))


class StockProcess:
    """A child process that runs jobs on plain llama-cpp-python."""

    def __init__(self) -> None:
        # Not `-m hobbit.stock`: that would import the package, and with it the plugin.
        code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self._child = subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="hobbit-stock-")

    def logits(
        self,
        path: Path | str,
        jobs: Sequence[Job],
        *,
        mmap: bool = True,
        extra_buffers: bool = False,
        kv_overrides: Mapping[str, int] | None = None,
    ) -> list[Logits]:
        """Return each job's logits; raise DecodeFailed when llama.cpp cannot load or decode."""
        request = {
            "path": str(path),
            "jobs": [asdict(job) for job in jobs],
            "mmap": mmap,
            "extra_buffers": extra_buffers,
            "kv_overrides": dict(kv_overrides or {}) or None,
            "out": self._folder.name,
        }
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise DecodeFailed(f"plain llama.cpp ended with status {self._child.wait()} on {path}")
        answer = json.loads(line)
        if "error" in answer:
            raise DecodeFailed(answer["error"])
        found = []
        for name in answer["files"]:
            found.append(np.load(name))
            os.unlink(name)
        return found

    def close(self) -> None:
        """End the child, whatever it is doing; harmless when done already, and from any thread."""
        self._child.kill()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._child.wait()
        self._folder.cleanup()

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    files = []
    for number, fields in enumerate(request["jobs"]):
        job = Job(**fields)
        arguments = job.llama_arguments() | {"use_mmap": request["mmap"]}
        arguments["kv_overrides"] = request["kv_overrides"]
        extra = request["extra_buffers"]
        with plain_llama(request["path"], arguments, extra_buffers=extra) as llama:
            name = os.path.join(request["out"], f"{number}.npy")
            np.save(name, collect(llama, job))
            files.append(name)
    return {"files": files}


def main(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until the input ends."""
    for line in requests:
        try:
            answer = _answer(json.loads(line))
        except Exception as error:  # the parent decides what it means
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # llama.cpp prints to stdout in places: keep the answers' pipe to ourselves.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, pipe)
