"""What stock llama.cpp routes, as its own graph has it: a callback on its tensors sees each.

Run as a script it decodes one job on plain llama-cpp-python and pickles what it saw: hobbit's
device must not be in that process.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import pickle
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

STOCK = Path(__file__).parent.parent / "hobbit" / "stock.py"
# The last of them that a layer has are its gate weights.
WEIGHTS = {f"ffn_moe_weights{name}" for name in ("", "_norm", "_scaled", "_softmax")}


@dataclass
class Routed:
    """One layer and ubatch: experts and weights are [n_rows, n_used], probs [n_rows, n_expert]."""

    layer: int
    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None
    probs: npt.NDArray[np.float32] | None = None


def stock_routing(path: Path, job: Any) -> list[Routed]:
    """Return the routing of a job on stock llama.cpp, in the order it was computed."""
    command = [sys.executable, __file__, str(path), json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found: list[Routed] = [Routed(**fields) for fields in pickle.loads(done.stdout)]
    return found


class _Watcher:
    """Takes a copy of the tensors that are about routing, when they were computed."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []
        self._probs: dict[int, npt.NDArray[np.float32]] = {}
        base = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        for name, kind in (
            ("ggml_get_name", ctypes.c_char_p),
            ("ggml_nbytes", ctypes.c_size_t),
            ("ggml_nelements", ctypes.c_int64),
        ):
            getattr(base, name).restype = kind
            getattr(base, name).argtypes = [ctypes.c_void_p]
        base.ggml_backend_tensor_get.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t,
        ]  # fmt: skip
        base.ggml_backend_tensor_get.restype = None
        self._base = base

    def __call__(self, tensor: int, ask: bool, user_data: object) -> bool:
        name, _, layer = self._base.ggml_get_name(tensor).decode().rpartition("-")
        # Views of them have more words behind the layer's number.
        wanted = layer.isdigit() and name in WEIGHTS | {"ffn_moe_topk", "ffn_moe_probs"}
        if not ask and wanted:
            self._take(name, int(layer), tensor)
        return bool(wanted or not ask)

    def _values(self, tensor: int, kind: Any) -> npt.NDArray[Any]:
        raw = np.empty(self._base.ggml_nbytes(tensor) // 4, dtype=kind)
        self._base.ggml_backend_tensor_get(tensor, raw.ctypes.data, 0, raw.nbytes)
        return raw

    def _take(self, name: str, layer: int, tensor: int) -> None:
        if name == "ffn_moe_probs":
            self._probs[layer] = self._values(tensor, np.float32)
        elif name == "ffn_moe_topk":
            self._topk(layer, tensor)
        else:
            mine = next(f for f in reversed(self.found) if f["layer"] == layer)
            mine["weights"] = self._values(tensor, np.float32).reshape(mine["experts"].shape)

    def _topk(self, layer: int, tensor: int) -> None:
        raw, n = self._values(tensor, np.int32), int(self._base.ggml_nelements(tensor))
        probs = self._probs[layer]
        rows = len(probs) // N_EXPERT
        n_used, stride = n // rows, (len(raw) - n // rows) // (rows - 1) if rows > 1 else 0
        # A view of the sorted experts: the rows are as far apart as there are experts.
        starts = np.arange(rows)[:, None] * stride
        experts = raw[starts + np.arange(n_used)]
        self.found.append(
            {
                "layer": layer,
                "experts": experts,
                "probs": probs.reshape(rows, N_EXPERT),
            }
        )


N_EXPERT = 0


def main(path: str, fields: dict[str, Any]) -> None:
    global N_EXPERT
    spec = importlib.util.spec_from_file_location("stock", STOCK)
    assert spec is not None and spec.loader is not None
    stock = importlib.util.module_from_spec(spec)
    sys.modules["stock"] = stock
    spec.loader.exec_module(stock)
    job, watcher = stock.Job(**fields), _Watcher()
    with stock.plain_llama(path, job.llama_arguments() | {"use_mmap": False}) as llama:
        arch = llama.metadata["general.architecture"]
        N_EXPERT = int(llama.metadata[f"{arch}.expert_count"])
        callback = api.ggml_backend_sched_eval_callback(watcher)
        llama.context_params.cb_eval = callback
        with stock.further_context(llama, job) as context:
            stock._decode(context, llama.n_vocab(), job)
    sys.stdout.buffer.write(pickle.dumps(watcher.found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
