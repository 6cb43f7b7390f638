"""Print the demo's perplexity beside the dense model's, and how it routes.

usage: python evaluate.py WORK [MODEL.gguf]

Perplexity: 4 windows of 512 held-out tokens per domain, through llama.cpp. The routing is that of
the same windows.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

from hobbit import demo

LENGTH, WINDOWS = 512, 4
Array = npt.NDArray

base = ctypes.CDLL(str(Path(libggml._name).with_name("libggml-base.so")))
base.ggml_get_name.restype = ctypes.c_char_p
base.ggml_get_name.argtypes = [ctypes.c_void_p]
base.ggml_nelements.restype = ctypes.c_int64
base.ggml_nelements.argtypes = [ctypes.c_void_p]
base.ggml_backend_tensor_get.argtypes = [
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
]


class Router:
    """Collects every layer's expert probabilities while llama.cpp computes."""

    NAME = re.compile(r"ffn_moe_probs-(\d+)")

    def __init__(self) -> None:
        self.layers: dict[int, Array] = {}
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._look)

    def _look(self, tensor: int, ask: bool, _: int) -> bool:
        match = self.NAME.fullmatch(base.ggml_get_name(tensor).decode())
        if match and not ask:
            values = np.empty(base.ggml_nelements(tensor), np.float32)
            base.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            self.layers[int(match[1])] = values.reshape(LENGTH, -1)
        return bool(match) or not ask

    def take(self) -> Array:
        """Return [layers, LENGTH, experts] of the last window."""
        return np.stack([self.layers[i] for i in sorted(self.layers)])


class Runner:
    """One model and one context; the AMX buffers are left out, which crash on some machines."""

    def __init__(self, model: int, router: Router | None) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = LENGTH
        params.n_threads = params.n_threads_batch = 1
        if router:
            params.cb_eval = router.callback
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def loss(self, window: Array) -> float:
        """Return the mean negative log likelihood of a window's tokens after its first."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(LENGTH, 0, 1)
        batch.n_tokens = LENGTH
        for i, token in enumerate(window[:-1]):
            batch.token[i], batch.pos[i], batch.logits[i] = int(token), i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama_decode failed")
        llama_cpp.llama_batch_free(batch)
        flat = llama_cpp.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(flat, (LENGTH, self.vocabulary))
        top = logits.max(1, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(logits - top).sum(1))
        return float((norm - logits[np.arange(LENGTH), window[1:]]).mean())


@contextmanager
def running(path: Path, router: Router | None = None) -> Iterator[Runner]:
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    runner = Runner(model, router)
    try:
        yield runner
    finally:
        llama_cpp.llama_free(runner.context)
        llama_cpp.llama_model_free(model)


def held_out(work: Path) -> dict[str, Array]:
    with np.load(work / "tokens.npz") as file:
        names = [n.removesuffix(".held") for n in file if n.endswith(".held")]
        size = WINDOWS * (LENGTH + 1)
        return {n: file[f"{n}.held"][:size].astype(int).reshape(WINDOWS, -1) for n in names}


def cached_share(chosen: Array, slots: int) -> float:
    """Return the hit rate of one layer's LRU cache over a window's [tokens, 2] experts."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in chosen.flatten().tolist():
        hits += expert in cache
        cache[expert] = None
        cache.move_to_end(expert)
        if len(cache) > slots:
            cache.popitem(last=False)
    return hits / chosen.size


def print_routing(probability: Array) -> None:
    """Print the statistics of [windows, layers, tokens, experts] probabilities."""
    experts = probability.shape[-1]
    chosen = np.argsort(-probability, -1)[..., :2]
    weight = np.take_along_axis(probability, chosen, -1)
    first = weight[..., 0] / weight.sum(-1)
    used = np.zeros_like(probability)
    np.put_along_axis(used, chosen, 1, -1)
    load = used.mean((0, 2)) / 2
    reuse = (used[:, :, 1:] * used[:, :, :-1]).sum(-1).mean() / 2
    chance = 2 * np.square(load).sum(-1).mean()
    low, middle, high = np.quantile(first, (0.1, 0.5, 0.9))
    least, most = load.min(1), load.max(1)
    print(f"load of a layer's least and most used expert: {least.mean():.3f}, {most.mean():.3f}")
    print(f"the same, extremes: {least.min():.3f}, {most.max():.3f} (even: {1 / experts:.3f})")
    print(f"top-1 weight: mean {first.mean():.3f}, q10 {low:.3f}, q50 {middle:.3f}, q90 {high:.3f}")
    print(f"experts kept from the token before: {reuse:.3f} (independent draws: {chance:.3f})")
    for slots in (2, experts // 4, experts // 2):
        hits = np.mean([cached_share(layer, slots) for window in chosen for layer in window])
        print(f"LRU hits, {slots} of {experts} cached: {hits:.3f}")


def main(work: Path, path: Path) -> None:
    texts = held_out(work)
    router = Router()
    losses: dict[str, list[float]] = {}
    routes = []
    with demo.source_model() as source, running(source) as dense, running(path, router) as split:
        print(f"{'domain':12}{'dense':>8}{'demo':>8}{'ratio':>8}")
        for name, windows in texts.items():
            pairs = []
            for window in windows:
                pairs.append((dense.loss(window), split.loss(window)))
                routes.append(router.take())
            losses[name] = list(np.mean(pairs, 0))
            plain, ours = np.exp(losses[name])
            print(f"{name:12}{plain:8.2f}{ours:8.2f}{ours / plain:8.3f}", flush=True)
    plain, ours = np.exp(np.mean(list(losses.values()), 0))
    print(f"{'geometric':12}{plain:8.2f}{ours:8.2f}{ours / plain:8.3f}\n")
    print_routing(np.stack(routes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else demo.ensure())
