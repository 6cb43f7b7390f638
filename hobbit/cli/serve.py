"""hobbit serve: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import HobbitError
from ..render import model_line, resident_lines
from .flags import MODEL_HELP, chosen, flag
from .loading import check_name, load, model_path, shown_name
from .shared import (
    T1,
    T2,
    BatchSize,
    CacheTypeK,
    CacheTypeV,
    Color,
    CtxSize,
    Deterministic,
    Device,
    Dispatch,
    FlashAttn,
    GpuLayers,
    HfFile,
    HfRepo,
    Io,
    IoThreads,
    LowFile,
    MainGpu,
    Memory,
    ModelFlag,
    NExpertUsed,
    Patience,
    Policy,
    Predictor,
    Quality,
    ResidentLow,
    Rpc,
    SplitMode,
    Threads,
    ThreadsBatch,
    UbatchSize,
    Vram,
    WarmStart,
)

if TYPE_CHECKING:
    from socket import socket

    from ..llama import Llama
    from ..serve.generation import Finished
    from ..serve.log import Log
    from ..serve.metrics import Metrics
    from ..serve.options import ServeOptions


def serve(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]", help=MODEL_HELP),
    ] = None,
    model: ModelFlag = None,
    hf_repo: HfRepo = None,
    hf_file: HfFile = None,
    host: Annotated[
        str, flag("--host", help="Address to listen on; the default is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[
        int, flag("--port", min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8080,
    api_key: Annotated[
        list[str] | None,
        flag("--api-key", help="Key that clients must give (repeatable; better: the variable)."),
    ] = None,
    api_key_file: Annotated[
        Path | None, flag("--api-key-file", help="Read keys from FILE, one a line.")
    ] = None,
    alias: Annotated[
        str | None, flag("-a", "--alias", help="Name of the model (default: its own).")
    ] = None,
    strict_model: Annotated[
        bool, flag("--strict-model", help="Refuse requests that name another model (404).")
    ] = False,
    cors_origins: Annotated[
        str,
        flag(
            "--cors-origins", help="Web pages that may use the server: origins with commas, or *."
        ),
    ] = "",
    timeout: Annotated[
        float,
        flag("--timeout", min=0, help="Seconds that a request may take, waiting too; 0: any."),
    ] = 3600.0,
    sse_ping: Annotated[
        float, flag("--sse-ping", min=0.01, help="Seconds between signs of life in a stream.")
    ] = 5.0,
    queue: Annotated[
        int, flag("--queue", min=0, help="Requests that may wait; more are refused (503).")
    ] = 16,
    metrics: Annotated[
        bool, flag("--metrics/--no-metrics", help="Tell Prometheus about it at /metrics.")
    ] = True,
    no_ui: Annotated[bool, flag("--no-ui", help="No web page.")] = False,
    max_body: Annotated[
        str, flag("--max-body", help="Largest request that is read, as 16M.")
    ] = "16M",
    preload: Annotated[
        bool,
        flag(
            "--preload/--lazy",
            help="Load the model before requests are taken, or with the first that needs it.",
        ),
    ] = True,
    sleep_idle_seconds: Annotated[
        float,
        flag(
            "--sleep-idle-seconds",
            min=0,
            help="Give the memory back when nothing was asked for so long; 0: never.",
        ),
    ] = 0.0,
    log_json: Annotated[
        bool, flag("--log-json", help="Say everything on stderr as JSON, an object a line.")
    ] = False,
    predict: Annotated[
        int | None,
        flag(
            "-n",
            "--predict",
            "--n-predict",
            "--max-tokens",
            min=-1,
            help="Most tokens of an answer; -1: as the context has room (the default).",
        ),
    ] = None,
    ctx_size: CtxSize = None,
    threads: Threads = None,
    threads_batch: ThreadsBatch = None,
    batch_size: BatchSize = 2048,
    ubatch_size: UbatchSize = 512,
    gpu_layers: GpuLayers = "auto",
    main_gpu: MainGpu = 0,
    split_mode: SplitMode = "layer",
    flash_attn: FlashAttn = "auto",
    cache_type_k: CacheTypeK = "f16",
    cache_type_v: CacheTypeV = "f16",
    memory: Memory = "auto",
    policy: Policy = "decay",
    predictor: Predictor = "auto",
    quality: Quality = "exact",
    t1: T1 = None,
    t2: T2 = None,
    patience: Patience = 0,
    deterministic: Deterministic = False,
    low_file: LowFile = None,
    resident_low: ResidentLow = "auto",
    n_expert_used: NExpertUsed = None,
    warm_start: WarmStart = True,
    io: Io = "auto",
    io_threads: IoThreads = 0,
    device: Device = None,
    vram: Vram = "auto",
    rpc: Rpc = None,
    dispatch: Dispatch = "auto",
    verbose: Annotated[
        int,
        flag("--verbose", "-v", count=True, help="Show the whole plan; -vv: llama.cpp's log."),
    ] = 0,
    quiet: Annotated[bool, flag("--quiet", "-q", help="Print nothing but errors.")] = False,
    color: Color = "auto",
) -> int:
    """Serve a model over HTTP to OpenAI's and llama.cpp's clients. It has a web page too."""
    from ..options import Options
    from ..serve.options import ServeOptions

    values = locals()
    return _serve(chosen(ServeOptions, values | {"loading": chosen(Options, values)}))


def _serve(options: ServeOptions) -> int:
    try:
        from ..serve.log import JsonLog, Log
        from ..serve.metrics import Metrics
        from ..serve.server import listen
    except ImportError as exc:
        raise HobbitError(
            f"hobbit serve needs the {exc.name} package: pip install 'hobbit-moe[serve]'"
        ) from exc
    from ..memory import resolve_cap

    loading = options.loading
    log = JsonLog(loading.quiet) if options.log_json else Log(loading.quiet, loading.color)
    try:
        check_name(loading)
        resolve_cap(loading.memory)
        with closing(listen(options.host, options.port)) as sock:
            return _served(options, log, sock, Metrics())
    except HobbitError as exc:
        if not options.log_json:
            raise
        log.failed(exc)
        return exc.exit_code


def _served(options: ServeOptions, log: Log, sock: socket, metrics: Metrics) -> int:
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..options import chosen_quality
    from ..serve.app import make_app
    from ..serve.guard import Rules
    from ..serve.registry import new_token, registered
    from ..serve.server import serve, url_of
    from ..serve.start import make_service

    loading, keys, token = options.loading, options.keys(), new_token()
    layout = build_layout(open_gguf(model_path(loading, log)), loading.n_expert_used)
    quality = chosen_quality(loading, layout)
    log.say(model_line(layout), *resident_lines(layout))

    def loaded(memory: str | int) -> Llama:
        return load(layout, replace(loading, memory=str(memory)), quality, log)

    def finished(llm: Llama, done: Finished) -> None:
        metrics.observe(done)
        log.finished(done)
        _remember(llm, shown_name(loading), done)

    service = make_service(layout, quality, options, loaded, finished, log.say, log.failed)
    # `hobbit ps` and `top` of this user need no key; nor does anybody where none is set.
    rules = Rules(
        keys=(*keys, token) if keys else (),
        origins=options.origins(),
        local=options.is_loopback,
        host=options.host,
        max_body=options.body_bytes(),
    )
    app = make_app(service, rules, metrics if options.metrics else None)
    with closing(service.engine.model), closing(service.engine):
        if options.preload:
            with service.engine.model.borrowed():
                pass
        if not keys and not options.is_loopback:
            log.say(f"warning: anyone who reaches {options.host} can use this: set --api-key")
        url = url_of(sock)
        with registered(url, service.name, token):
            number = serve(app, sock, service.engine, lambda: log.listening(url))
    return 128 + number


def _remember(llm: Llama, name: str, done: Finished) -> None:
    """Keep how an answer went, for hobbit plan and why, unless it had a quality of its own."""
    from ..planning.feedback import expected, finished

    if done.decode.tokens_generated and done.mode == llm.quality.name:
        # Memory may have changed since the last answer.
        finished(llm, name, done, expected(llm))
