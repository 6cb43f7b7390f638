"""hobbit run: text from a prompt."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from ..render import Screen, model_line, resident_lines, run_report, say_stats
from .console import is_terminal, read_stdin
from .flags import chosen, flag
from .loading import check_name, load, model_path, shown_name
from .sessions import keeping, session_file
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
    Offline,
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
from .signals import signal_code

if TYPE_CHECKING:
    from ..chat.prompts import Prompts
    from ..chat.session_file import SessionFile
    from ..generate import Prompt
    from ..layout import Layout
    from ..llama import Llama
    from ..options import Options
    from .destination import Destination
    from .forms import Form


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
    escape: Annotated[
        bool, flag("-e", "--escape", help="Read \\n, \\t and the like in -p and PROMPT as C does.")
    ] = False,
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
    main_gpu: MainGpu = 0,
    split_mode: SplitMode = "layer",
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
    n_expert_used: NExpertUsed = None,
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
    device: Device = None,
    vram: Vram = "auto",
    rpc: Rpc = None,
    dispatch: Dispatch = "auto",
    output: Annotated[
        Path | None, flag("-o", "--output", help="Write the answer to FILE, not to stdout.")
    ] = None,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of the answer.")
    ] = False,
    jsonl: Annotated[
        bool, flag("--jsonl", help="Print JSON objects, one a line, as the answer comes.")
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
    session: Annotated[
        str | None,
        flag("--session", help="Go on with the conversation kept under this name, and keep it."),
    ] = None,
    continue_last: Annotated[
        bool, flag("--continue", help="Go on with the session that was used last.")
    ] = False,
    stats: Annotated[
        str | None,
        flag(
            "--stats",
            help="What follows an answer on stderr: none, line, full or json (default: line; "
            "full with -v, none with -q).",
        ),
    ] = None,
    verbose: Annotated[
        int,
        flag("--verbose", "-v", count=True, help="Show plan and timings; -vv: llama.cpp's log."),
    ] = 0,
    quiet: Annotated[bool, flag("--quiet", "-q", help="Print nothing but the answer.")] = False,
    color: Color = "auto",
) -> int:
    """Answer a prompt; without one, on a terminal, chat."""
    from ..options import Options

    options = chosen(Options, locals())
    if options.wants_chat and is_terminal():
        from .chat import chat

        if options.output:
            raise UsageError(
                f"-o {options.output}: takes one answer: give a prompt with -p; /save is for a chat"
            )
        return chat(options)
    return _run(options)


def _run(options: Options) -> int:
    from ..memory import resolve_cap
    from ..options import grammar, read_prompt, system_prompt
    from .destination import destination

    screen = Screen(options.is_silent, options.color)
    check_name(options)
    # What needs no model to be found wrong is told before one is fetched, made or loaded.
    resolve_cap(options.memory)
    answer_grammar = grammar(options)
    text = read_prompt(options, read_stdin(screen))
    system = system_prompt(options)
    # Not before stdin has ended: who writes it may be another hobbit, with the same session.
    with session_file(options, screen) as file, destination(options.output) as out:
        return _answer(options, screen, out, text, system, answer_grammar, file)


def _answer(
    options: Options,
    screen: Screen,
    out: Destination,
    text: str,
    system: str,
    answer_grammar: str,
    file: SessionFile | None,
) -> int:
    """Load the model and answer; the exit code."""
    from ..chat.prompts import Prompts
    from ..chat.session import Session
    from ..generate import Prompt, generate, has_chat_template
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..options import DEMO_PROMPT, chosen_quality, sampling
    from ..planning.feedback import expected, expected_line, finished

    path = model_path(options, screen)
    layout = build_layout(open_gguf(path), options.n_expert_used)
    _check_output(options, layout)
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
        if system and not chat and file is None:
            screen.say("the system prompt is not used: there is no chat template, or --raw")
        prompts = Prompts(llm, options.raw)
        if options.think is not None:
            prompts.check_switch()
        form = _form(prompts, options, out)
        llm.on_progress = form.progress
        session = Session(llm, settings, options, system=system, file=file) if file else None
        with keeping(session):
            notes: list[str] = []
            if session is None:
                prompt = _prompt(prompts, Prompt(text, system, chat), options, bool(answer_grammar))
                result = generate(llm, prompt, settings, form.text)
            else:
                session.think = options.think
                reply = session.ask(text, form.text)
                result, notes = reply.result, reply.notes("the session")
            missed = finished(llm, shown_name(options), result, forecast)
            config = options.resolved(settings) | {"model": str(path), "chat": chat}
            config |= {"threads": llm.n_threads, "ctx_size": llm.n_ctx()}
            config |= {"session": file.name if file else None}
            config |= {"n_expert_used": layout.n_expert_used or None}
            form.end(result, run_report(result, llm.plan, llm.quality, config, load_s))
            out.keep = out.keep or result.signal is None
            screen.say(*notes)
            say_stats(screen, options.wanted_stats, result, llm.plan, llm.quality, load_s, missed)
    return 0 if result.signal is None else signal_code(result.signal)


def _prompt(prompts: Prompts, prompt: Prompt, options: Options, constrained: bool) -> Prompt:
    """Return the prompt as the template writes it where it is told to think or not."""
    from ..chat.transcript import Message

    if options.think is None and not prompts.has_channels:
        return prompt
    messages = [Message(m["role"], m["content"]) for m in prompt.messages()]
    text = prompts.render(messages, options.think, plain=constrained)
    channels = prompts.has_channels and not constrained
    return replace(prompt, tokens=tuple(prompts.tokens(text)), channels=channels)


def _form(prompts: Prompts, options: Options, out: Destination) -> Form:
    """Return what writes the answer in the form that is asked for."""
    from .forms import Object, Stream, Text

    if options.json_output:
        return Object(out)
    hide = options.hide_thinking
    inside = (hide or options.jsonl) and prompts.opens_thoughts(options.think)
    if options.jsonl:
        return Stream(out, hide_thinking=hide, inside=inside)
    return Text(out, whole=options.no_stream, hide_thinking=hide, inside=inside)


def _check_output(options: Options, layout: Layout) -> None:
    """Refuse to put the answer in the place of the model."""
    path = options.output.expanduser() if options.output else None
    if path is None or not path.exists():
        return
    if any(path.samefile(part.path) for part in layout.gguf.parts):
        raise UsageError(f"-o {path}: that is the model: name a file for the answer")


def _schedule(llm: Llama, options: Options) -> AbstractContextManager[None]:
    if options.record:
        return llm.recorded(options.record.expanduser())
    return llm.replayed(options.replay.expanduser()) if options.replay else nullcontext()
