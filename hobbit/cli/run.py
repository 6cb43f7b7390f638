"""hobbit run: text from a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..render import Screen, model_line, resident_lines, run_report, stats_line, verbose_lines
from .console import is_terminal, mute, read_stdin, write
from .flags import chosen, dead, flag, ignored
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
    FlashAttn,
    GpuLayers,
    HfFile,
    HfRepo,
    Io,
    IoThreads,
    LowFile,
    Memory,
    ModelFlag,
    Offline,
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
from .signals import signal_code

if TYPE_CHECKING:
    from ..generate import Prompt
    from ..llama import Llama
    from ..options import Options


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]...",
            help="A .gguf file (the first part), a known model (hobbit ls --known), a repository, "
            "as user/name[:QUANT], or demo (the default: a small model made on first use); then "
            "the prompt.",
        ),
    ] = None,
    model: ModelFlag = None,
    hf_repo: HfRepo = None,
    hf_file: HfFile = None,
    offline: Offline = False,
    prompt: Annotated[str | None, flag("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[Path | None, flag("-f", "--file", help="Read the prompt from FILE.")] = None,
    system_prompt: Annotated[
        str | None, flag("-sys", "--system-prompt", "--system", help="System prompt.")
    ] = None,
    system_prompt_file: Annotated[
        Path | None, flag("-sysf", "--system-prompt-file", help="Read it from FILE.")
    ] = None,
    raw: Annotated[bool, flag("--raw", help="Complete the text; apply no chat template.")] = False,
    predict: Annotated[
        int | None,
        flag(
            "-n",
            "--predict",
            "--n-predict",
            "--max-tokens",
            help="Tokens to generate; 0: only read the prompt; -1: until the end of the answer "
            "(default: -1; demo: 256).",
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
    temp: Annotated[
        float | None,
        flag("--temp", "--temperature", min=0, help="0: always the likeliest (model's, or 0.8)."),
    ] = None,
    top_k: Annotated[
        int | None, flag("--top-k", help="Sample from the K likeliest (model's, or 40).")
    ] = None,
    top_p: Annotated[
        float | None, flag("--top-p", help="Sample from this mass (model's, or 0.95).")
    ] = None,
    min_p: Annotated[
        float | None, flag("--min-p", help="Least share of the best (model's, or 0.05).")
    ] = None,
    repeat_penalty: Annotated[
        float | None, flag("--repeat-penalty", help="1: none (model's, or 1).")
    ] = None,
    seed: Annotated[int, flag("-s", "--seed", help="Seed; -1: random.")] = -1,
    reverse_prompt: Annotated[
        list[str] | None, flag("-r", "--reverse-prompt", help="Stop at this text (repeatable).")
    ] = None,
    grammar: Annotated[str | None, flag("--grammar", help="GBNF grammar of the answer.")] = None,
    grammar_file: Annotated[Path | None, flag("--grammar-file", help="Read it from FILE.")] = None,
    json_schema: Annotated[
        str | None, flag("-j", "--json-schema", help="JSON schema of the answer.")
    ] = None,
    json_schema_file: Annotated[
        Path | None, flag("-jf", "--json-schema-file", help="Read it from FILE.")
    ] = None,
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
    record: Annotated[
        Path | None,
        flag("--record", help="Write the precision that each expert gets to FILE."),
    ] = None,
    replay: Annotated[
        Path | None,
        flag("--replay", help="Give the experts the precisions recorded in FILE."),
    ] = None,
    io: Io = "auto",
    io_threads: IoThreads = 0,
    device: Annotated[
        str | None,
        flag(
            "--device",
            "-dev",
            help="Let this device (ggml's name for it) hold experts too, and compute those it "
            "holds: docs/devices.md.",
        ),
    ] = None,
    vram: Annotated[
        str, flag("--vram", help="How much of the device's memory: 4G, or auto.")
    ] = "auto",
    rpc: Annotated[
        str | None,
        flag("--rpc", help="HOST:PORT of a llama.cpp RPC server whose device is to be used."),
    ] = None,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of the answer.")
    ] = False,
    no_stream: Annotated[
        bool, flag("--no-stream", help="Print the answer when it is whole.")
    ] = False,
    think: Annotated[
        bool | None,
        flag(
            "--think/--no-think",
            help="Let the model think first or not, where its chat template has a switch.",
        ),
    ] = None,
    hide_thinking: Annotated[
        bool, flag("--hide-thinking", help="Do not show what stands in <think>...</think>.")
    ] = False,
    panel: Annotated[
        bool, flag("--panel", help="In a chat: show hits, reads, memory and speed as they change.")
    ] = False,
    verbose: Annotated[
        int,
        flag("--verbose", "-v", count=True, help="Show plan and timings; -vv: llama.cpp's log."),
    ] = 0,
    quiet: Annotated[bool, flag("--quiet", "-q", help="Print nothing but the answer.")] = False,
    color: Color = "auto",
    cpu_moe: Annotated[bool, dead("-cmoe", "--cpu-moe")] = False,
    n_cpu_moe: Annotated[str | None, dead("-ncmoe", "--n-cpu-moe")] = None,
    override_tensor: Annotated[str | None, dead("-ot", "--override-tensor")] = None,
    conversation: Annotated[
        bool, ignored("-cnv", "--conversation", "-no-cnv", "--no-conversation")
    ] = False,
    single_turn: Annotated[bool, ignored("-st", "--single-turn")] = False,
    show_timings: Annotated[bool, ignored("--show-timings", "--no-show-timings")] = False,
    load_mode: Annotated[bool, ignored("--mmap", "--no-mmap", "--mlock")] = False,
    escape: Annotated[bool, ignored("-e", "--escape")] = False,
) -> int:
    """Answer a prompt; without one, on a terminal, chat."""
    from ..options import Options

    options = chosen(Options, locals())
    if options.wants_chat and is_terminal():
        from .chat import chat

        return chat(options)
    return _run(options)


def _run(options: Options) -> int:
    from ..chat.flow import WithoutThoughts
    from ..generate import Prompt, generate, has_chat_template
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..memory import resolve_cap
    from ..options import (
        DEMO_PROMPT,
        chosen_quality,
        grammar,
        read_prompt,
        sampling,
        system_prompt,
    )
    from ..planning.feedback import expected, expected_line, finished

    screen = Screen(options.quiet, options.color)
    check_name(options)
    # What needs no model to be found wrong is told before one is fetched, made or loaded.
    resolve_cap(options.memory)
    answer_grammar = grammar(options)
    text = read_prompt(options, read_stdin(screen))
    system = system_prompt(options)
    path = model_path(options, screen)
    layout = build_layout(open_gguf(path))
    settings = sampling(options, layout.gguf.get, answer_grammar)
    quality = chosen_quality(options, layout)
    if not text:
        text = DEMO_PROMPT
        screen.say(f"no prompt given, so the demo is asked: {text}")
    start = time.monotonic()
    screen.say(model_line(layout), *resident_lines(layout))
    with closing(load(layout, options, quality, screen)) as llm, _schedule(llm, options):
        load_s = time.monotonic() - start
        io = llm.stats.io or "none"
        facts = f"threads: {llm.n_threads}   context: {llm.n_ctx()}   seed: {settings.seed}"
        screen.say(f"io: {io}   {facts}")
        forecast = expected(llm)
        if forecast is not None:
            screen.say(expected_line(forecast))
        chat = has_chat_template(llm) and not options.raw
        if system and not chat:
            screen.say("the system prompt is not used: there is no chat template, or --raw")
        whole = options.no_stream or options.json_output
        prompt = Prompt(text, system, chat)
        if options.think is not None:
            prompt = _thinking(llm, prompt, options)
        shown = _shown(llm, options)
        result = generate(llm, prompt, settings, mute if whole else shown)
        missed = finished(llm, shown_name(options), result, forecast)
        if options.json_output:
            config = options.resolved(settings) | {"model": str(path), "chat": chat}
            config |= {"threads": llm.n_threads, "ctx_size": llm.n_ctx()}
            report = run_report(result, llm.plan, llm.quality, config, load_s)
            write(json.dumps(report, ensure_ascii=False))
        elif whole:
            shown(result.text)
        if isinstance(shown, WithoutThoughts):
            shown.end()
        write("\n")
        if options.verbose:
            screen.say(*verbose_lines(result, load_s))
        screen.say(stats_line(result, llm.quality, missed))
    return 0 if result.signal is None else signal_code(result.signal)


def _thinking(llm: Llama, prompt: Prompt, options: Options) -> Prompt:
    """Return the prompt as the chat template writes it when it is told to think or not."""
    from ..chat.template import ChatTemplate
    from ..chat.transcript import Message

    template = ChatTemplate(llm, options.raw)
    template.check_switch()
    messages = [Message(m["role"], m["content"]) for m in prompt.messages()]
    return replace(prompt, tokens=tuple(template.tokens(template.render(messages, options.think))))


def _shown(llm: Llama, options: Options) -> Callable[[str], None]:
    """Return what writes the pieces of an answer that a person wants to see."""
    from ..chat.flow import WithoutThoughts
    from ..chat.template import ChatTemplate

    if not options.hide_thinking:
        return write
    return WithoutThoughts(write, ChatTemplate(llm, options.raw).opens_thoughts(options.think))


def _schedule(llm: Llama, options: Options) -> AbstractContextManager[None]:
    if options.record:
        return llm.recorded(options.record.expanduser())
    return llm.replayed(options.replay.expanduser()) if options.replay else nullcontext()
