"""hobbit plan: will it run here, how fast, and what is its memory for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..render import Screen, model_line, resident_lines
from .console import write
from .flags import MODEL_HELP, chosen, flag
from .shared import (
    CacheTypeK,
    CacheTypeV,
    Device,
    GpuLayers,
    ModelFlag,
    NExpertUsed,
    Offline,
    Quiet,
    Rpc,
    Threads,
    UbatchSize,
)

if TYPE_CHECKING:
    from ..options import PlanOptions


def plan(
    name: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Nothing is fetched but its header."),
    ] = None,
    model: ModelFlag = None,
    memory: Annotated[
        str,
        flag(
            "--memory",
            "--ram",
            help="Cap for the whole process: 8G, 8GB, 50% or auto; it may be more than this "
            "machine has.",
        ),
    ] = "auto",
    for_tok_s: Annotated[
        float | None,
        flag("--for", metavar="TOK_S", min=0.01, help="The memory that gives this speed."),
    ] = None,
    read_gbps: Annotated[
        float | None,
        flag(
            "--read-gbps",
            min=0.001,
            help="Of another disk: its speed in 10^9 bytes a second (default: measured).",
        ),
    ] = None,
    device: Device = None,
    vram: Annotated[
        str,
        flag(
            "--vram",
            help="How much of the device's memory: 4G, or auto; without --device of a graphics "
            "card that is not here.",
        ),
    ] = "auto",
    rpc: Rpc = None,
    gpu_layers: GpuLayers = "auto",
    device_gbps: Annotated[
        float | None,
        flag(
            "--device-gbps",
            min=0.001,
            help="How fast the device multiplies, in 10^9 bytes of weights a second (default: as "
            "runs with it measured, or 200).",
        ),
    ] = None,
    quality: Annotated[
        str, flag("-Q", "--quality", help="exact, or what hobbit prepare has measured.")
    ] = "exact",
    n_expert_used: NExpertUsed = None,
    ctx_size: Annotated[
        int | None,
        flag(
            "-c",
            "--ctx-size",
            "--ctx",
            min=0,
            help="Context size; 0: the model's own (default: the same, up to 4096).",
        ),
    ] = None,
    threads: Threads = None,
    ubatch_size: UbatchSize = 512,
    cache_type_k: CacheTypeK = "f16",
    cache_type_v: CacheTypeV = "f16",
    offline: Offline = False,
    remeasure: Annotated[
        bool, flag("--remeasure", help="Measure processor and disk again.")
    ] = False,
    llama_cpp: Annotated[
        bool, flag("--llama-cpp", help="Print the nearest command of llama.cpp's instead.")
    ] = False,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of text.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Say whether a model fits and how fast it would be. Nothing of it is loaded."""
    from ..options import PlanOptions

    return _plan(chosen(PlanOptions, locals()))


def _plan(options: PlanOptions) -> int:
    from ..errors import PlanError
    from ..planning.others import others
    from ..planning.planner import plan
    from ..planning.report import llama_server_flags, plan_lines

    screen = Screen(options.quiet)
    made = plan(
        options.model_name,
        options.memory,
        n_ctx=options.ctx_size,
        n_threads=options.n_threads,
        quality=options.quality,
        n_expert_used=options.n_expert_used,
        read_gbps=options.read_gbps,
        type_k=options.type_k,
        type_v=options.type_v,
        n_ubatch=options.ubatch_size,
        for_tok_s=options.for_tok_s,
        remeasure=options.remeasure,
        **options.there,
    )
    layout = made.forecast.subject.layout
    if options.json_output:
        found = made.to_dict() | {"others": [asdict(other) for other in others(made)]}
        write(json.dumps(found, ensure_ascii=False) + "\n")
    elif options.llama_cpp:
        write(llama_server_flags(made) + "\n")
    else:
        write("\n".join([model_line(layout), *resident_lines(layout), *plan_lines(made)]) + "\n")
    if not made.fits:
        screen.error(made.reason)
    return 0 if made.fits else PlanError.exit_code
