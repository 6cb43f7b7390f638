"""Make tiny random MoE GGUFs of every architecture llama.cpp runs, for tests.

llama.cpp is asked which tensors an architecture has: `llama_model_init_from_user` builds a model
from metadata alone and shows every tensor to a callback. That call also invents each optional
tensor, so `_kept` decides which of them a file has. The file is then written with gguf-py, and
libggml quantises the experts. Everything is seeded by the tensor's name.

ctypes is used here, unlike in the package: the tests need a few calls of libggml-base that
llama-cpp-python does not bind.
"""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Q
from llama_cpp._logger import set_verbose

N_VOCAB = 320
N_CTX_TRAIN = 512
SEED = 20261121

_EXPERT = re.compile(r"^blk\.(\d+)\.ffn_(gate|up|down|gate_up)_(exps|chexps)\.weight$")
_DENSE = re.compile(
    r"^(token_embd|output|blk\.\d+\.(attn_(q|k|v|output|qkv|gate)"
    r"|ffn_(gate|up|down)(_shexp)?))\.weight$"
)

Shapes = dict[str, tuple[int, ...]]  # tensor -> shape in ggml's order, the row's length first
Values = npt.NDArray[np.float32]
Value = Any  # bool, int (uint32), float, str, U64, or a list of one of them


def _words(text: str) -> list[str]:
    return text.split()


class U64(int):
    """An integer that is written as uint64."""


# Every architecture with routed experts that decodes causally. Left out: nomic-bert-moe (an
# encoder, tested through its embeddings), graniteswitch (needs adapters), refact (its graph never
# uses the experts it loads).
ARCHS = _words("""
    afmoe arctic bailingmoe bailingmoe2 bailingmoe3 cohere2moe dbrx deepseek deepseek2
    deepseek32 deepseek4 dots1 dots3note ernie4_5-moe exaone-moe gemma4 glm-dsa glm4moe
    glm5-next gpt-oss granite granite_swa granitehybrid granitemoe grok grovemoe hunyuan-moe
    hy_v3 hy_v4 jamba kimi-k3 kimi-linear laguna lfm2moe llama llama4 maple mellum mimo2 minicpm
    minimax-01 minimax-m2 minimax-m3 mistral3 mistral4 nemotron_h_moe olmoe phimoe qwen2moe
    qwen35moe qwen3moe qwen3next qwen3vlmoe qwen4exp smallthinker step35
""")

# Those that attend in both directions.
DIFFUSION = ["llada-moe", "rnd1"]

# Every type that llama.cpp multiplies by.
TYPES = _words("""
    F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS
    IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS MXFP4 NVFP4 TQ1_0 TQ2_0 Q1_0 Q2_0
""")

# llama.cpp itself aborts when one batch has several sequences.
ONE_SEQUENCE = {"kimi-linear", "minimax-01"}


# --------------------------------------------------------------------------------------------------
# metadata: what llama.cpp's tests/test-llama-archs.cpp sets, smaller, with more experts


_MLA = set(
    _words("""
    deepseek2 deepseek32 glm-dsa dots3note kimi-linear bailingmoe3 kimi-k3 glm5-next mistral4
    hy_v4
""")
)
_HYBRID = set(
    _words("""
    jamba nemotron_h_moe granitehybrid lfm2moe kimi-linear bailingmoe3 kimi-k3 glm5-next
""")
)
_SWA_LIST = {"cohere2moe", "mimo2", "step35", "granite_swa", "dots3note", "maple"}


def _shape(arch: str, n_embd: int, n_layer: int | None, n_head: int | None) -> dict[str, int]:
    """Return n_embd, n_head, n_layer with what the architecture insists on."""
    layers, heads = 3, 2
    if arch == "llama4":
        layers = 4  # every 4th layer has no rope, hard-coded
    elif arch == "gemma4":
        layers = 5  # every 5th layer has full attention
    elif arch == "deepseek4":
        n_embd, layers, heads = max(n_embd, 256), 4, 8
    elif arch in {"jamba", "nemotron_h_moe"}:
        layers = 4
    if arch in _MLA:
        heads = 1
    elif arch == "afmoe":
        heads = 4
    return {"n_embd": n_embd, "n_layer": n_layer or layers, "n_head": n_head or heads}


def metadata(
    arch: str,
    *,
    n_expert: int = 8,
    n_used: int = 2,
    n_embd: int = 128,
    n_ff: int = 128,
    n_layer: int | None = None,
    n_head: int | None = None,
) -> dict[str, Value]:
    """Return the metadata of a tiny model, keys with the architecture already filled in."""
    shape = _shape(arch, n_embd, n_layer, n_head)
    n_embd, layers, heads = shape["n_embd"], shape["n_layer"], shape["n_head"]
    head_dim = n_embd // heads
    kv: dict[str, Value] = {}

    def put(**values: Value) -> None:
        for key, value in values.items():
            kv[f"{arch}.{key.replace('__', '.')}"] = value

    kv["general.architecture"] = arch
    kv["general.name"] = f"tiny random {arch}"
    put(
        vocab_size=N_VOCAB,
        context_length=N_CTX_TRAIN,
        embedding_length=n_embd,
        features_length=n_embd,
        block_count=layers,
        leading_dense_block_count=1,
        feed_forward_length=n_ff,
        use_parallel_residual=False,
        logit_scale=1.0,
        full_attention_interval=2,
        attention__head_count=heads,
        attention__head_count_kv=heads,
        attention__max_alibi_bias=8.0,
        attention__clamp_kqv=1.0,
        attention__layer_norm_epsilon=1e-5,
        attention__layer_norm_rms_epsilon=1e-5,
        attention__group_norm_epsilon=1e-5,
        attention__group_norm_groups=8,
        attention__q_lora_rank=64,
        attention__kv_lora_rank=64,
        attention__sliding_window=32,
        attention__sliding_window_pattern=2,
        attention__indexer__head_count=4,
        attention__indexer__key_length=64,
        # a realistic top-k makes the attention unstable; this selects everything
        attention__indexer__top_k=131072,
        attention__indexer__block_size=4,
        attention__indexer__local_blocks=1,
        attention__indexer__kpool=4,
        attention__indexer__kpool_select_tail=True,
        rope__dimension_sections=[head_dim // 4] * 4,
        rope__freq_base=10000.0,
        ssm__inner_size=2 * n_embd,
        ssm__conv_kernel=4,
        ssm__state_size=128,
        ssm__time_step_rank=heads,
        ssm__group_count=2,
        kda__head_dim=128,
        kda__safe_gate=True,
        kda__gate_lower_bound=-5.0,
        shortconv__l_cache=3,
        residual_scale=3.5565588200778455,
        activation__situ_beta=4.0,
        activation__situ_linear_beta=25.0,
        attn_res__block_size=12,
    )
    put(
        expert_feed_forward_length=n_ff,
        expert_shared_feed_forward_length=n_ff // 2,
        expert_chunk_feed_forward_length=n_ff // 2,
        expert_latent_length=n_ff,
        interleave_moe_layer_step=2,
        expert_count=n_expert,
        expert_used_count=n_used,
        expert_shared_count=1,
        expert_gating_func=2,  # sigmoid
        expert_group_scale=0.05,
        experts_per_group=1,
    )
    for rule in _RULES:
        rule(arch, shape, put, kv)
    return kv


Put = Callable[..., None]


def _attention(arch: str, shape: dict[str, int], put: Put, kv: dict[str, Value]) -> None:
    heads, layers, n_embd = shape["n_head"], shape["n_layer"], shape["n_embd"]
    if arch in _MLA:
        put(
            attention__key_length=64 if arch == "glm5-next" else 80,
            attention__value_length=64,
            rope__dimension_count=0 if arch == "glm5-next" else 16,
            attention__key_length_mla=48,
            attention__value_length_mla=32,
        )
    if arch in _HYBRID:
        per_layer = [0 if i == 1 else heads for i in range(layers)]
        put(attention__head_count_kv=per_layer)
        if arch != "glm5-next":
            put(attention__head_count=per_layer)
    if arch in _SWA_LIST:
        put(attention__sliding_window_pattern=[i % 2 for i in range(layers)])
    if arch == "minimax-m3":
        put(rope__dimension_count=64, attention__indexer__head_count=heads)
    if arch == "afmoe":
        put(attention__head_count_kv=2)
    if arch == "bailingmoe3":
        put(rope__dimension_sections=[2, 3, 3, 0])
    if arch in {"qwen3next", "qwen35moe", "qwen4exp"}:
        put(ssm__inner_size=256)
    if arch == "dots3note":
        put(
            attention__kv_lora_rank_swa=64,
            attention__key_length_swa=80,
            attention__value_length_swa=64,
            attention__key_length_mla_swa=48,
            attention__value_length_mla_swa=32,
            rope__freq_base_swa=10000.0,
        )
    if arch in {"dots3note", "hy_v4"}:
        put(attention__indexer__types=[0 if i % 2 else 1 for i in range(layers)])
    if arch == "gemma4":
        put(
            embedding_length_per_layer_input=n_embd // 2,
            attention__shared_kv_layers=0,
            attention__key_length=n_embd // heads,
            attention__value_length=n_embd // heads,
            attention__key_length_swa=n_embd // heads,
            attention__value_length_swa=n_embd // heads,
            rope__freq_base_swa=10000.0,
            rope__dimension_count=n_embd // heads,
            rope__dimension_count_swa=n_embd // heads,
            attention__sliding_window_pattern=[i % 5 < 4 for i in range(layers)],
        )
    if arch == "nemotron_h_moe":
        put(
            feed_forward_length=[
                0 if i <= 1 else kv[f"{arch}.feed_forward_length"] for i in range(layers)
            ]
        )


def _experts(arch: str, shape: dict[str, int], put: Put, kv: dict[str, Value]) -> None:
    if arch in {"deepseek2", "deepseek32", "bailingmoe2", "dots1", "glm4moe"}:
        # DeepSeek-V3's routing: the best groups of experts first, then the best experts of those
        put(
            expert_group_count=4,
            expert_group_used_count=2,
            expert_weights_scale=2.5,
            expert_weights_norm=True,
        )
    if arch == "llama4":
        put(expert_used_count=1, interleave_moe_layer_step=2)
    if arch == "ernie4_5-moe":
        put(interleave_moe_layer_step=1)
    if arch == "grovemoe":
        put(experts_per_group=2)
    if arch == "gpt-oss":
        put(expert_gating_func=3)
    if arch in {"qwen3moe", "qwen2moe", "olmoe", "mixtral", "llama", "phimoe", "dbrx", "deepseek"}:
        put(expert_gating_func=1)
    if arch == "deepseek":
        put(expert_weights_scale=1.0)
    if arch == "bailingmoe3":
        put(
            swiglu_clamp_exp=[0.0, 4.0, 4.0][: shape["n_layer"]], swiglu_clamp_shexp=[0.0, 5.0, 5.0]
        )
    if arch == "maple":
        put(swiglu_clamp_exp=7.0)


def _hyper(arch: str, shape: dict[str, int], put: Put, kv: dict[str, Value]) -> None:
    """Hyper-connections, compressed attention and n-gram embeddings of the newest architectures."""
    layers, n_embd = shape["n_layer"], shape["n_embd"]
    head_dim = n_embd // shape["n_head"]
    if arch in {"qwen4exp", "glm5-next"}:
        offsets = [U64(h * N_VOCAB) for h in range(4)]
        put(
            hyper_connection__count=4,
            hyper_connection__sinkhorn_iterations=2,
            hyper_connection__epsilon=1e-6,
            hyper_connection__low_rank=8,
            attention__compress_ratios=[4] * layers,
            ple__layers=[0],
            ple__ngram_size=3,
            ple__heads_per_ngram=2,
            ple__conv_kernel=4,
            ple__eos_token_id=0,
            embedding_length_per_layer_input=n_embd // 4,
            ple__layer_multipliers=[U64(1), U64(3), U64(5)],
            ple__head_offsets=offsets,
            ple__head_vocab_sizes=[U64(N_VOCAB)] * 4,
        )
    if arch == "qwen4exp":
        put(attention__indexer__key_length=head_dim)
    if arch == "hy_v4":
        put(
            hyper_connection__count=4,
            hyper_connection__epsilon=1e-6,
            hyper_connection__magnitude=2.0,
            swiglu_clamp_exp=10.0,
            expert_weights_scale=1.0,
            expert_weights_norm=True,
        )
    if arch == "deepseek4":
        put(
            attention__head_count_kv=1,
            attention__key_length=head_dim,
            attention__value_length=head_dim,
            rope__dimension_count=head_dim // 2,
            attention__output_group_count=8,
            attention__output_lora_rank=32,
            attention__compress_ratios=[0, 0, 4, 128],
            attention__compress_rope_freq_base=160000.0,
            hyper_connection__count=4,
            hyper_connection__sinkhorn_iterations=2,
            hyper_connection__epsilon=1e-6,
            hash_layer_count=0,
            swiglu_clamp_exp=10.0,
            expert_weights_scale=1.0,
            expert_weights_norm=True,
            expert_gating_func=4,  # sqrt(softplus)
        )


_RULES = (_attention, _experts, _hyper)


def vocabulary() -> dict[str, Value]:
    """Return a byte-fallback SentencePiece vocabulary: any text becomes tokens and back."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    kinds = [2, 3, 3] + [6] * 256
    words = _words(
        "the a of and to in is was it for on as with by at from he she they we you not be"
    )
    for text in ["\u2581" + w for w in words] + [chr(c) for c in range(97, 123)]:
        tokens.append(text)
        kinds.append(1)
    tokens += [f"\u2581w{i}" for i in range(N_VOCAB - len(tokens))]
    kinds += [1] * (N_VOCAB - len(kinds))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0 if i < 259 else -float(i) for i in range(N_VOCAB)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _add_kv(writer: gguf.GGUFWriter, kv: dict[str, Value]) -> None:
    kinds = gguf.GGUFValueType

    def scalar(value: Value) -> gguf.GGUFValueType:
        if isinstance(value, bool):
            return kinds.BOOL
        if isinstance(value, U64):
            return kinds.UINT64
        if isinstance(value, int):
            return kinds.UINT32
        return kinds.FLOAT32 if isinstance(value, float) else kinds.STRING

    for key, value in kv.items():
        if key == "general.architecture":
            continue  # the writer adds it
        if isinstance(value, list):
            kind = scalar(value[0])
            if key == "tokenizer.ggml.token_type":
                kind = kinds.INT32
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=kind)
        else:
            writer.add_key_value(key, value, scalar(value))


# --------------------------------------------------------------------------------------------------
# which tensors an architecture has


class _GgufInitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


@functools.lru_cache(maxsize=1)
def _base() -> ctypes.CDLL:
    suffix = "dylib" if sys.platform == "darwin" else "so"
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / f"libggml-base.{suffix}"))
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufInitParams]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_get_name.argtypes = [ctypes.c_void_p]
    lib.ggml_row_size.restype = ctypes.c_size_t
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    return lib


def tensor_list(kv: dict[str, Value]) -> Shapes:
    """Ask llama.cpp which tensors a model with this metadata has: name -> shape in ggml's order."""
    base = _base()
    found: Shapes = {}

    def seen(tensor: int, _userdata: int) -> None:
        # ggml_tensor starts: int type; (padding); void *buffer; int64_t ne[4]
        ne = (ctypes.c_int64 * 4).from_address(tensor + 16)
        dims = list(ne)
        while len(dims) > 1 and dims[-1] == 1:
            dims.pop()
        found[base.ggml_get_name(tensor).decode()] = tuple(dims)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kv.gguf"
        writer = gguf.GGUFWriter(str(path), kv["general.architecture"])
        _add_kv(writer, kv)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        meta = base.gguf_init_from_file(str(path).encode(), _GgufInitParams(True, None))
    if not meta:
        raise RuntimeError("libggml cannot read the metadata")
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    llama_cpp.llama_backend_init()
    set_verbose(False)
    callback = llama_cpp.llama_cpp.llama_model_set_tensor_data_t(seen)
    model = llama_cpp.llama_cpp.llama_model_init_from_user(meta, callback, None, params)
    base.gguf_free(meta)
    if not model:
        raise RuntimeError(f"llama.cpp cannot make a model of {kv['general.architecture']}")
    llama_cpp.llama_model_free(model)
    return found


def _kept(tensors: Shapes, *, arch: str, fused: bool, scales: bool, biases: bool) -> Shapes:
    """Drop the optional tensors that real files of the architecture do not have."""
    kept: Shapes = {}
    for name, shape in tensors.items():
        expert = "_exps." in name or "_chexps." in name
        if name.endswith((".scale", ".input_scale")):
            # One scale per expert or, for a dense matrix, per tensor: NVFP4 files have them.
            if not (scales and name.endswith(".scale") and expert) and arch != "gemma4":
                continue
            if name.endswith(".input_scale"):
                continue
        if expert and name.endswith(".bias") and not biases:
            continue
        if name.endswith("_gate_up_exps.weight") and not fused:
            half = (shape[0], shape[1] // 2, shape[2])
            kept[name.replace("gate_up", "gate")] = half
            kept[name.replace("gate_up", "up")] = half
            continue
        kept[name] = shape
    return kept


# --------------------------------------------------------------------------------------------------
# values


def _values(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[Any]:
    """Return seeded float32 values, scaled so that activations neither die nor explode."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    noise = rng.standard_normal(shape[::-1], dtype=np.float32)
    if name.startswith("rope_f"):
        return np.ones_like(noise)
    if "norm" in name and name.endswith(".weight"):
        return (1.0 + 0.1 * noise).astype(np.float32)
    if name.endswith(".scale"):
        return (1.0 + 0.25 * np.tanh(noise)).astype(np.float32)
    if "ssm_a" in name:
        return -np.abs(noise)  # a decay
    if name.endswith(".bias") or len(shape) == 1:
        return (0.1 * noise).astype(np.float32)
    if name.startswith("token_embd"):
        return noise
    gain = 2.0 if "ffn_gate_inp" in name or name.startswith("output.") else 1.2
    return (noise * np.float32(gain / shape[0] ** 0.5)).astype(np.float32)


def quantize(values: npt.NDArray[Any], kind: Q | int) -> npt.NDArray[Any]:
    """Quantise float32 rows with libggml (gguf-py lacks the k- and i-quants)."""
    base = _base()
    n_per_row = values.shape[-1]
    rows = values.size // n_per_row
    source = np.ascontiguousarray(values, dtype=np.float32)
    row_size = base.ggml_row_size(int(kind), n_per_row)
    out = np.zeros((*values.shape[:-1], row_size), dtype=np.uint8)
    importance = np.ones(
        n_per_row, dtype=np.float32
    )  # the smallest i-quants refuse to work without
    done = base.ggml_quantize_chunk(
        int(kind), source.ctypes.data, out.ctypes.data, 0, rows, n_per_row, importance.ctypes.data
    )
    if done != out.nbytes:
        raise RuntimeError(f"ggml_quantize_chunk made {done} bytes of {out.nbytes}")
    return out


def block_width(kind: str) -> int:
    """Return how many elements a block of the type has: rows must be a multiple."""
    return int(gguf.GGML_QUANT_SIZES[_type(kind)][0])


_Q2_0 = 42
gguf.GGML_QUANT_SIZES.setdefault(_Q2_0, (64, 18))  # newer than gguf-py 0.19


def _type(kind: str) -> Any:
    return _Q2_0 if kind == "Q2_0" else Q[kind]


# Of each i-quant: where its block keeps the half-precision scale, and one that gives weights of
# about the usual size. All other bytes are codes and signs, of which every value is valid.
_IQ_SCALE = {
    "IQ1_S": (0, 1e-2), "IQ2_XXS": (0, 2e-3), "IQ2_XS": (0, 2e-3), "IQ2_S": (0, 2e-3),
    "IQ3_XXS": (0, 7e-4), "IQ3_S": (0, 5e-4), "IQ4_NL": (0, 1e-3), "IQ4_XS": (0, 1e-4),
}  # fmt: skip


def _random_blocks(shape: tuple[int, ...], kind: Q, name: str) -> npt.NDArray[np.uint8]:
    """Make up an i-quant's blocks: libggml's search for its codes takes seconds."""
    width, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // width, size), dtype=np.uint8)
    if kind == Q.IQ1_M:
        # Its last 8 bytes are four uint16, whose top digits together are the scale.
        digits = int(np.float16(1e-2).view(np.uint16))
        for i in range(4):
            digit = (digits >> (4 * i)) & 15
            blocks[:, 49 + 2 * i] = (blocks[:, 49 + 2 * i] & 15) | (digit << 4)
    else:
        at, scale = _IQ_SCALE[kind.name]
        scales = (rng.uniform(0.5, 1.5, len(blocks)) * scale).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def _quantized(values: Values, kind: Q | int, name: str) -> npt.NDArray[np.uint8]:
    if isinstance(kind, Q) and kind.name.startswith("IQ"):
        return _random_blocks(values.shape, kind, name)
    return quantize(values, kind)


# --------------------------------------------------------------------------------------------------
# files


def make(
    path: Path | str,
    arch: str,
    expert_type: str | Callable[[str], str] = "Q8_0",
    *,
    dense_type: str = "Q8_0",
    fused: bool = False,
    scales: bool = False,
    alignment: int | None = None,
    seed: int = SEED,
    kv: dict[str, Value] | None = None,
    file_kv: dict[str, Value] | None = None,
    edit: Callable[[Shapes], Shapes] | None = None,
    change: Callable[[str, Values], Values] | None = None,
    **shape: int,
) -> Path:
    """Write a tiny random model and return its path.

    `expert_type` is a type's name, or a function from an expert tensor's name to one. `kv`
    overrides metadata, `file_kv` what is written of it, `edit` the list of tensors, `change` a
    tensor's float32 values; further keywords go to `metadata`.
    """
    path = Path(path)
    meta = metadata(arch, **shape) | vocabulary() | (kv or {})
    meta = {key: value for key, value in meta.items() if value is not None}
    tensors = _kept(
        tensor_list(meta), arch=arch, fused=fused, scales=scales, biases=arch == "gpt-oss"
    )
    if edit:
        tensors = edit(tensors)
    writer = gguf.GGUFWriter(str(path), arch)
    _add_kv(writer, meta | (file_kv or {}))
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, dims in tensors.items():
        values = _values(name, dims, seed)
        if change:
            values = change(name, values)
        kind = Q.F32
        if _EXPERT.match(name):
            kind = _type(expert_type if isinstance(expert_type, str) else expert_type(name))
        elif _DENSE.match(name) and dims[0] % block_width(dense_type) == 0:
            kind = _type(dense_type)
        if kind == Q.F32:
            writer.add_tensor(name, values)
        elif kind == Q.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, _quantized(values, kind, name), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(path: Path, n: int) -> Path:
    """Write the model again as about `n` parts, named as gguf-split does, and return the first."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    stem = path.stem + "-split"
    writer = gguf.GGUFWriter(
        str(path.with_name(f"{stem}.gguf")), arch, split_max_tensors=-(-len(reader.tensors) // n)
    )
    for name, field in reader.fields.items():
        # GGUFWriter would give the first part alone the alignment.
        if name.startswith("GGUF.") or name in ("general.architecture", "general.alignment"):
            continue
        kind, *sub = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=sub[0] if sub else None)
    for tensor in reader.tensors:
        plain = tensor.tensor_type in (Q.F32, Q.F16)
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=None if plain else tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{stem}-00001-of-*.gguf"))


# Speaks only in the vocabulary's words, so that its answers are printable.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


# As real templates do, it ends each message with a control token.
CONTROL_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% if enable_thinking is false %} no{% endif %}"
    "{% endif %}"
)


def make_text_model(
    path: Path | str, *, chat: bool = False, arch: str = "llama", template: str = CHAT_TEMPLATE
) -> Path:
    """Write a model that answers in words, never ends by itself and may have a chat template."""

    def words_only(name: str, values: Values) -> Values:
        if name == "output.weight":
            values[:259] = 0.0  # control tokens and bytes: logit 0, below the best of 61 words
        return values

    kv: dict[str, Value] = {"tokenizer.chat_template": template} if chat else {}
    if template == CONTROL_TEMPLATE:
        # With a token for the space alone, as real ones have it, any text becomes itself again.
        kv["tokenizer.ggml.tokens"] = [*vocabulary()["tokenizer.ggml.tokens"][:-1], "\u2581"]
    return make(path, arch, change=words_only, kv=kv)
