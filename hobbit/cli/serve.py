"""hobbit serve: a model behind OpenAI's HTTP interface."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import HobbitError
from ..render import Screen, model_line, resident_lines
from .flags import MODEL_HELP, chosen, flag
from .loading import check_name, load, model_path
from .shared import (
    T1,
    T2,
    BatchSize,
    CacheTypeK,
    CacheTypeV,
    Color,
    CtxSize,
    Deterministic,
    FlashAttn,
    GpuLayers,
    HfFile,
    HfRepo,
    Io,
    IoThreads,
    LowFile,
    Memory,
    ModelFlag,
    Patience,
    Policy,
    Predictor,
    Quality,
    ResidentLow,
    Threads,
    ThreadsBatch,
    UbatchSize,
    WarmStart,
)

if TYPE_CHECKING:
    from ..serve.generation import Finished
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
    warm_start: WarmStart = True,
    io: Io = "auto",
    io_threads: IoThreads = 0,
    verbose: Annotated[
        int,
        flag("--verbose", "-v", count=True, help="Show the whole plan; -vv: llama.cpp's log."),
    ] = 0,
    quiet: Annotated[bool, flag("--quiet", "-q", help="Print nothing but errors.")] = False,
    color: Color = "auto",
) -> int:
    """Serve a model over HTTP to OpenAI's and llama.cpp's clients. It has a web page too."""
    from ..serve.options import ServeOptions

    return _serve(chosen(ServeOptions, locals()))


def _serve(options: ServeOptions) -> int:
    try:
        from ..serve.app import make_app
        from ..serve.metrics import Metrics
        from ..serve.server import listen, serve, url_of
    except ImportError as exc:
        raise HobbitError(
            f"hobbit serve needs the {exc.name} package: pip install 'hobbit-moe[serve]'"
        ) from exc
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..memory import resolve_cap
    from ..options import chosen_quality
    from ..serve.guard import Rules
    from ..serve.start import make_service

    screen, loading = Screen(options.quiet, options.color), options.loading()
    check_name(loading)
    resolve_cap(options.memory)
    keys = options.keys()
    sock = listen(options.host, options.port)
    layout = build_layout(open_gguf(model_path(loading, screen)))
    quality = chosen_quality(loading, layout)
    screen.say(model_line(layout), *resident_lines(layout))
    collected = Metrics()

    def finished(done: Finished) -> None:
        collected.observe(done)
        screen.say(_request_line(done))

    with closing(sock), closing(load(layout, loading, quality, screen)) as llm:
        service = make_service(llm, options, finished, screen.say)
        rules = Rules(keys, options.origins(), options.is_loopback, options.body_bytes())
        app = make_app(service, rules, collected if options.metrics else None)
        if not keys and not options.is_loopback:
            screen.say(f"warning: anyone who reaches {options.host} can use this: set --api-key")
        with closing(service.engine):
            number = serve(
                app,
                sock,
                service.engine,
                lambda: screen.say(f"listening on {url_of(sock)}", "ready"),
            )
    return 128 + number


def _request_line(done: Finished) -> str:
    tok_s = len(done.token_seconds) / done.decode_s if done.decode_s else 0.0
    return (
        f"[{done.n_prompt} tok prompt, {done.n_cached} cached | {done.n_generated} tok, "
        f"{tok_s:.1f} tok/s, first token {done.ttft_s:.1f} s | {done.mode} | "
        f"hit {100 * done.decode.hit_rate:.0f} % | {done.decode.mib_per_token:.0f} MiB/tok]"
    )
