"""Flags and arguments that more than one command has, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .flags import MODEL_HELP, POLICY_HELP, PREDICTOR_HELP, flag, offline_flag

CacheTypeK = Annotated[str, flag("-ctk", "--cache-type-k", help="Type of K.")]
CacheTypeV = Annotated[str, flag("-ctv", "--cache-type-v", help="Type of V.")]
Threads = Annotated[int | None, flag("-t", "--threads", help="Threads (default: physical cores).")]
Memory = Annotated[
    str,
    flag("--memory", "--ram", help="Cap for the whole process: 8G, 8GB, 50% or auto."),
]
Policy = Annotated[str, flag("--policy", help=POLICY_HELP)]
Predictor = Annotated[str, flag("--predictor", help=PREDICTOR_HELP)]
ModelFlag = Annotated[str | None, flag("-m", "--model", help="MODEL, as a flag.")]
UbatchSize = Annotated[int, flag("-ub", "--ubatch-size", min=1, help="Batch.")]
Offline = Annotated[bool, offline_flag()]
HfRepo = Annotated[
    str | None,
    flag("-hf", "--hf-repo", help="Hugging Face repository: user/name[:quantisation]."),
]
HfFile = Annotated[str | None, flag("-hff", "--hf-file", help="File in it.")]
CtxSize = Annotated[
    int | None,
    flag(
        "-c",
        "--ctx-size",
        min=0,
        help="Context size; 0: the model's own (default: the same, up to 4096).",
    ),
]
ThreadsBatch = Annotated[
    int | None, flag("-tb", "--threads-batch", help="Threads for the prompt (as -t).")
]
BatchSize = Annotated[int, flag("-b", "--batch-size", min=1, help="Logical batch.")]
GpuLayers = Annotated[str, flag("-ngl", "--gpu-layers", "--n-gpu-layers", help="Layers on a GPU.")]
MainGpu = Annotated[
    int, flag("-mg", "--main-gpu", min=0, help="The GPU of -ngl where -sm is none or row.")
]
SplitMode = Annotated[
    str, flag("-sm", "--split-mode", help="How -ngl splits over GPUs: layer, row or none.")
]
Device = Annotated[
    str | None,
    flag(
        "--device",
        "-dev",
        help="Let this device (ggml's name for it) hold experts too, and compute those it holds: "
        "docs/devices.md.",
    ),
]
Vram = Annotated[str, flag("--vram", help="How much of the device's memory: 4G, or auto.")]
Rpc = Annotated[
    str | None,
    flag("--rpc", help="HOST:PORT of a llama.cpp RPC server whose device is to be used."),
]
Dispatch = Annotated[
    str,
    flag(
        "--dispatch",
        help="Who computes an expert: auto (by what it costs), device, cpu, or split (the device "
        "what is there, the CPU the rest).",
    ),
]
FlashAttn = Annotated[str, flag("-fa", "--flash-attn", help="on, off or auto.")]
Quality = Annotated[
    str,
    flag(
        "-Q",
        "--quality",
        help="exact, high, balanced, fast, or the mean KL divergence to exact that is allowed, "
        "as 0.02. All but exact need hobbit prepare.",
    ),
]
T1 = Annotated[
    float | None,
    flag("--t1", help="For experts: score above which low precision will do.", max=1),
]
T2 = Annotated[
    float | None,
    flag("--t2", help="Score above which an expert is skipped (T1 is T2 if not given).", max=1),
]
Patience = Annotated[
    int,
    flag(
        "--patience",
        min=0,
        max=65535,
        help="Read an expert's high copy when it was needed so often; use a low one before.",
    ),
]
Deterministic = Annotated[
    bool,
    flag("--deterministic", help="The same text whatever the cap, the cache and the disk."),
]
LowFile = Annotated[
    Path | None,
    flag("--low-file", help="GGUF with the experts in fewer bits (default: prepare's)."),
]
ResidentLow = Annotated[
    str,
    flag("--resident-low", help="Keep all low copies in memory: auto, on or off."),
]
NExpertUsed = Annotated[
    int | None,
    flag(
        "--n-expert-used",
        metavar="N",
        min=1,
        help="Experts of a layer that a token uses (default: the model's own number; another is "
        "not exact).",
    ),
]
WarmStart = Annotated[
    bool,
    flag(
        "--warm-start/--no-warm-start",
        help="Read ahead, in the background, the experts that earlier runs used most.",
    ),
]
Io = Annotated[str, flag("--io", help="Read experts: direct, buffered or auto.")]
IoThreads = Annotated[int, flag("--io-threads", min=0, help="Reading threads; 0: chosen.")]
Color = Annotated[str, flag("--color", help="auto, always or never.")]
Quiet = Annotated[bool, flag("--quiet", "-q", help="No progress on stderr.")]
ModelWord = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
