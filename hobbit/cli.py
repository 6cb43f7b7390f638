"""The command line: parse, call the library once, hand the result to a renderer.

stdout carries the answer and nothing else. Modules that are slow to import are imported where they
are used, so that `hobbit --help` is quick.
"""

from __future__ import annotations

import errno
import io
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from .errors import HobbitError, ModelError, UsageError
from .render import (
    Screen,
    cap_lines,
    loss_line,
    low_lines,
    mode_line,
    model_line,
    resident_lines,
    run_report,
    stats_line,
    verbose_lines,
    verify_lines,
)
from .sizes import format_size

if TYPE_CHECKING:
    from .bench_options import BenchOptions
    from .calibration import Calibration
    from .choices import ChoiceRow
    from .evaluate import Row
    from .importance import Importance
    from .layout import Layout
    from .llama import Llama
    from .memory import MemoryPlan
    from .options import EvalOptions, Options, PrepareOptions, TraceOptions
    from .quality import Quality

EXIT_DISK_FULL = 5
_STDIN_PATIENCE_S = 2.0
_POLICY_HELP = (
    "Who is evicted from the cache of experts: decay, hobbit, lcu, lfru, lfu or lru, perhaps with "
    "settings, as decay:half_life=64."
)
_PREDICTOR_HELP = (
    "Who says which experts the next layers need: gate, map, none, or auto, which tries; perhaps "
    "with settings, as gate:depth=1,always."
)

app = typer.Typer(
    help="Run Mixture-of-Experts GGUF models that are bigger than memory.",
    add_completion=False,
    rich_markup_mode=None,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Terminated(KeyboardInterrupt):
    """SIGTERM; handled like Ctrl-C, with an exit code of its own."""


class Interrupted(Exception):
    """A KeyboardInterrupt on its way through typer, which would make its own of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; no exception leaves here."""
    try:
        signal.signal(signal.SIGTERM, _on_sigterm)
        _open_standard_streams()
        code = app(args=arguments, standalone_mode=False, prog_name="hobbit")
        _print("")  # what was printed without flushing it
        return code if isinstance(code, int) else 0
    except BaseException as exc:  # the last resort: whatever it is, one line and an exit code
        return _report(exc)


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _open_standard_streams() -> None:
    """Give closed streams /dev/null: else a file opened later gets their number, and the output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 # for good
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _report(exc: BaseException) -> int:
    screen = Screen()
    if isinstance(exc, SystemExit):
        return exc.code if isinstance(exc.code, int) else 1
    if isinstance(exc, Interrupted):
        exc = exc.__cause__ or exc
    if isinstance(exc, KeyboardInterrupt):
        screen.error("interrupted")
        # A thread may be inside llama.cpp still: leave without waiting for it.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(_signal_code(exc))
    if isinstance(exc, BrokenPipeError):
        _forget_stdout()
        return 1
    if isinstance(exc, HobbitError):
        screen.error(str(exc))
        cause = exc.__cause__
        full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
        return EXIT_DISK_FULL if full else exc.exit_code
    # The parser's own errors; their class is private to typer.
    format_message = getattr(exc, "format_message", None)
    if format_message is not None:
        screen.error(format_message(), "hobbit --help, hobbit run --help")
        return int(getattr(exc, "exit_code", 2))
    if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        _forget_stdout()
        screen.error(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror))
        return EXIT_DISK_FULL
    screen.error(f"{type(exc).__name__}: {exc}", "set HOBBIT_VERBOSE=1 to see where")
    if os.environ.get("HOBBIT_VERBOSE"):
        traceback.print_exception(exc)
    return 1


def _signal_code(exc: KeyboardInterrupt) -> int:
    return 128 + (signal.SIGTERM if isinstance(exc, Terminated) else signal.SIGINT)


def _forget_stdout() -> None:
    """Keep the interpreter from flushing into a closed pipe or a full disk when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"hobbit {version('hobbit-moe')} (llama-cpp-python {version('llama-cpp-python')})")
        raise typer.Exit


@app.callback(epilog="Every flag can also be given as HOBBIT_<NAME>, as in HOBBIT_CTX_SIZE=8192.")
def _options(
    context: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def _flag(*names: str, help: str = "", hidden: bool = False, **more: Any) -> Any:
    """Make an option that an environment variable, named after its long form, can set too."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "HOBBIT_" + long.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, envvar=variable, show_envvar=False, hidden=hidden, **more
    )


def _ignored(*names: str) -> Any:
    """Take flags of llama.cpp that ask for what hobbit does anyway, or has no use for."""
    return typer.Option(*names, hidden=True)


def _refuse(param: typer.CallbackParam, value: Any) -> Any:
    if value:
        raise UsageError(
            f"{param.opts[0]}: hobbit places experts itself; "
            "say how much memory it may use with --memory"
        )
    return value


def _dead(*names: str) -> Any:
    """Make a flag of llama.cpp that means nothing here: it is refused by name."""
    return typer.Option(*names, hidden=True, callback=_refuse)


@app.command()
def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]...",
            help="Path of a .gguf file (of the first part), or demo (the default: a small model "
            "made on first use); then the prompt.",
        ),
    ] = None,
    model: Annotated[str | None, _flag("-m", "--model", help="MODEL, as a flag.")] = None,
    hf_repo: Annotated[
        str | None,
        _flag("-hf", "--hf-repo", help="Hugging Face repository: user/name[:quantisation]."),
    ] = None,
    hf_file: Annotated[str | None, _flag("-hff", "--hf-file", help="File in it.")] = None,
    prompt: Annotated[str | None, _flag("-p", "--prompt", help="The prompt.")] = None,
    file: Annotated[Path | None, _flag("-f", "--file", help="Read the prompt from FILE.")] = None,
    system_prompt: Annotated[
        str | None, _flag("-sys", "--system-prompt", "--system", help="System prompt.")
    ] = None,
    system_prompt_file: Annotated[
        Path | None, _flag("-sysf", "--system-prompt-file", help="Read it from FILE.")
    ] = None,
    raw: Annotated[bool, _flag("--raw", help="Complete the text; apply no chat template.")] = False,
    predict: Annotated[
        int | None,
        _flag(
            "-n",
            "--predict",
            "--n-predict",
            "--max-tokens",
            help="Tokens to generate; 0: only read the prompt; -1: until the end of the answer "
            "(default: -1; demo: 256).",
        ),
    ] = None,
    ctx_size: Annotated[
        int | None,
        _flag(
            "-c",
            "--ctx-size",
            min=0,
            help="Context size; 0: the model's own (default: the same, up to 4096).",
        ),
    ] = None,
    threads: Annotated[
        int | None, _flag("-t", "--threads", help="Threads (default: physical cores).")
    ] = None,
    threads_batch: Annotated[
        int | None, _flag("-tb", "--threads-batch", help="Threads for the prompt (as -t).")
    ] = None,
    batch_size: Annotated[int, _flag("-b", "--batch-size", min=1, help="Logical batch.")] = 2048,
    ubatch_size: Annotated[int, _flag("-ub", "--ubatch-size", min=1, help="Batch.")] = 512,
    gpu_layers: Annotated[
        str, _flag("-ngl", "--gpu-layers", "--n-gpu-layers", help="Layers on a GPU.")
    ] = "auto",
    flash_attn: Annotated[str, _flag("-fa", "--flash-attn", help="on, off or auto.")] = "auto",
    cache_type_k: Annotated[str, _flag("-ctk", "--cache-type-k", help="Type of K.")] = "f16",
    cache_type_v: Annotated[str, _flag("-ctv", "--cache-type-v", help="Type of V.")] = "f16",
    temp: Annotated[
        float | None,
        _flag("--temp", "--temperature", min=0, help="0: always the likeliest (model's, or 0.8)."),
    ] = None,
    top_k: Annotated[
        int | None, _flag("--top-k", help="Sample from the K likeliest (model's, or 40).")
    ] = None,
    top_p: Annotated[
        float | None, _flag("--top-p", help="Sample from this mass (model's, or 0.95).")
    ] = None,
    min_p: Annotated[
        float | None, _flag("--min-p", help="Least share of the best (model's, or 0.05).")
    ] = None,
    repeat_penalty: Annotated[
        float | None, _flag("--repeat-penalty", help="1: none (model's, or 1).")
    ] = None,
    seed: Annotated[int, _flag("-s", "--seed", help="Seed; -1: random.")] = -1,
    reverse_prompt: Annotated[
        list[str] | None, _flag("-r", "--reverse-prompt", help="Stop at this text (repeatable).")
    ] = None,
    grammar: Annotated[str | None, _flag("--grammar", help="GBNF grammar of the answer.")] = None,
    grammar_file: Annotated[Path | None, _flag("--grammar-file", help="Read it from FILE.")] = None,
    json_schema: Annotated[
        str | None, _flag("-j", "--json-schema", help="JSON schema of the answer.")
    ] = None,
    json_schema_file: Annotated[
        Path | None, _flag("-jf", "--json-schema-file", help="Read it from FILE.")
    ] = None,
    memory: Annotated[
        str,
        _flag("--memory", "--ram", help="Cap for the whole process: 8G, 8GB, 50% or auto."),
    ] = "auto",
    policy: Annotated[str, _flag("--policy", help=_POLICY_HELP)] = "decay",
    predictor: Annotated[str, _flag("--predictor", help=_PREDICTOR_HELP)] = "auto",
    quality: Annotated[
        str,
        _flag(
            "-Q",
            "--quality",
            help="exact, high, balanced, fast, or the mean KL divergence to exact that is allowed, "
            "as 0.02. All but exact need hobbit prepare.",
        ),
    ] = "exact",
    t1: Annotated[
        float | None,
        _flag("--t1", help="For experts: score above which low precision will do.", max=1),
    ] = None,
    t2: Annotated[
        float | None,
        _flag(
            "--t2", help="Score above which an expert is skipped (T1 is T2 if not given).", max=1
        ),
    ] = None,
    patience: Annotated[
        int,
        _flag(
            "--patience",
            min=0,
            max=65535,
            help="Read an expert's high copy when it was needed so often; use a low one before.",
        ),
    ] = 0,
    deterministic: Annotated[
        bool,
        _flag("--deterministic", help="The same text whatever the cap, the cache and the disk."),
    ] = False,
    low_file: Annotated[
        Path | None,
        _flag("--low-file", help="GGUF with the experts in fewer bits (default: prepare's)."),
    ] = None,
    resident_low: Annotated[
        str,
        _flag("--resident-low", help="Keep all low copies in memory: auto, on or off."),
    ] = "auto",
    warm_start: Annotated[
        bool,
        _flag(
            "--warm-start/--no-warm-start",
            help="Read ahead, in the background, the experts that earlier runs used most.",
        ),
    ] = True,
    record: Annotated[
        Path | None,
        _flag("--record", help="Write the precision that each expert gets to FILE."),
    ] = None,
    replay: Annotated[
        Path | None,
        _flag("--replay", help="Give the experts the precisions recorded in FILE."),
    ] = None,
    io: Annotated[str, _flag("--io", help="Read experts: direct, buffered or auto.")] = "auto",
    io_threads: Annotated[
        int, _flag("--io-threads", min=0, help="Reading threads; 0: chosen.")
    ] = 0,
    json_output: Annotated[
        bool, _flag("--json", help="Print one JSON object instead of the answer.")
    ] = False,
    no_stream: Annotated[
        bool, _flag("--no-stream", help="Print the answer when it is whole.")
    ] = False,
    verbose: Annotated[
        int,
        _flag("--verbose", "-v", count=True, help="Show plan and timings; -vv: llama.cpp's log."),
    ] = 0,
    quiet: Annotated[bool, _flag("--quiet", "-q", help="Print nothing but the answer.")] = False,
    color: Annotated[str, _flag("--color", help="auto, always or never.")] = "auto",
    cpu_moe: Annotated[bool, _dead("-cmoe", "--cpu-moe")] = False,
    n_cpu_moe: Annotated[str | None, _dead("-ncmoe", "--n-cpu-moe")] = None,
    override_tensor: Annotated[str | None, _dead("-ot", "--override-tensor")] = None,
    conversation: Annotated[
        bool, _ignored("-cnv", "--conversation", "-no-cnv", "--no-conversation")
    ] = False,
    single_turn: Annotated[bool, _ignored("-st", "--single-turn")] = False,
    show_timings: Annotated[bool, _ignored("--show-timings", "--no-show-timings")] = False,
    load_mode: Annotated[bool, _ignored("--mmap", "--no-mmap", "--mlock")] = False,
    escape: Annotated[bool, _ignored("-e", "--escape")] = False,
) -> int:
    """Generate text from a prompt."""
    values = dict(locals())
    try:
        from .options import Options

        values = {name: values[name] for name in Options.__dataclass_fields__}
        for name in ("words", "reverse_prompt"):
            values[name] = tuple(values[name] or ())
        return _run(Options(**values))
    except KeyboardInterrupt as exc:
        raise Interrupted from exc


@app.command()
def verify(
    model: Annotated[
        str | None, typer.Argument(help="Path of a .gguf file, or demo (the default).")
    ] = None,
    threads: Annotated[
        int | None, _flag("-t", "--threads", help="Threads (default: physical cores).")
    ] = None,
    quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Compare every logit with stock llama.cpp's, bit by bit, at several cache sizes."""
    try:
        return _verify(model, threads, Screen(quiet))
    except KeyboardInterrupt as exc:
        raise Interrupted from exc


def _verify(model: str | None, threads: int | None, screen: Screen) -> int:
    from .generate import interruptible
    from .options import Options
    from .stock import Job, StockProcess
    from .verify import EXIT_DIFFERENT
    from .verify import verify as compare

    options = Options(model=model, threads=threads)
    _check_name(options)
    path = _model_path(options, screen)
    job = replace(Job(), n_threads=options.n_threads)
    # An interrupted comparison goes on in its thread until the process ends; its child ends here.
    with StockProcess() as stock:
        rows = interruptible(lambda: compare(path, job=job, stock=stock, on_progress=screen.say))
    for line in verify_lines(rows):
        _print(f"{line}\n")
    return 0 if all(row.equal for row in rows) else EXIT_DIFFERENT


@app.command()
def prepare(
    model: Annotated[
        str | None, typer.Argument(help="Path of a .gguf file, or demo (the default).")
    ] = None,
    low: Annotated[
        str,
        _flag(
            "--low",
            help="Type of the low-precision experts, such as q4_0; two with a comma: of gate and "
            "up, and of down; auto: by the model's types, 0.3 to 0.55 of its bytes.",
        ),
    ] = "auto",
    imatrix: Annotated[
        str,
        _flag(
            "--imatrix",
            help="Importance of the columns: a file of llama-imatrix; uniform (slower than none, "
            "but better); none; auto: gathered from text for types below 4 bits, for others "
            "uniform or none.",
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        _flag(
            "-o",
            "--output",
            help="The file to make (default: MODEL.hobbit-low.gguf, or MODEL.hobbit-nested.gguf).",
        ),
    ] = None,
    threads: Annotated[
        int | None, _flag("-t", "--threads", help="Threads (default: physical cores).")
    ] = None,
    nested: Annotated[
        bool,
        _flag(
            "--nested",
            help="Of a Q8_0 model: make one file with everything in it, whose low copies are "
            "half of the high ones.",
        ),
    ] = False,
    low_file: Annotated[
        Path | None,
        _flag("--low-file", help="Make no copy: calibrate this smaller GGUF of the same model."),
    ] = None,
    file: Annotated[
        Path | None, _flag("-f", "--file", help="Text to calibrate on (default: a built-in one).")
    ] = None,
    calibration: Annotated[
        bool,
        _flag("--calibrate/--no-calibrate", help="Measure which rules keep which promises."),
    ] = True,
    plot: Annotated[
        Path | None, _flag("--plot", help="Draw KL against bytes a token into this PNG.")
    ] = None,
    memory: Annotated[
        str, _flag("--memory", "--ram", help="Cap while it runs the model on text.")
    ] = "auto",
    force: Annotated[bool, _flag("--force", help="Make it again, or in place of a file.")] = False,
    quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Make the low-precision copy of a model's experts, once, and calibrate the lossy modes."""
    values = dict(locals())
    try:
        from .options import PrepareOptions

        return _prepare(PrepareOptions(**values))
    except KeyboardInterrupt as exc:
        raise Interrupted from exc


def _prepare(options: PrepareOptions) -> int:
    from . import plot
    from .calibration import load, path_of
    from .fingerprint import fingerprint
    from .gguf_file import open_gguf
    from .layout import build_layout
    from .memory import resolve_cap
    from .report import calibration_lines, calibration_marks
    from .texts import CALIBRATION, read

    screen, loading = Screen(options.quiet), options.loading()
    _check_name(loading)
    resolve_cap(options.memory)
    if options.plot:
        plot.check()
    text = read(options.file, CALIBRATION)
    layout = build_layout(open_gguf(_model_path(loading, screen)))
    screen.say(model_line(layout), *resident_lines(layout))
    if options.nested:
        low = _nested_copy(options, layout, text, screen)
        layout = build_layout(open_gguf(low))
    else:
        low = _low_copy(options, layout, text, screen)
    known = load(path_of(low), fingerprint(layout.gguf)) if path_of(low).exists() else None
    if options.calibration and (known is None or options.force or options.file):
        known = _calibrate(options, layout, low, text, screen)
    if known is None:
        return 0
    screen.say(f"calibrated on {known.tokens} tokens of {known.text}: {path_of(low)}")
    for line in calibration_lines(known):
        _print(f"{line}\n")
    if options.plot:
        marks, curve = calibration_marks(known)
        plot.plot(options.plot, marks, title=str(low.name), curves=[("measured rules", curve)])
    return 0


def _low_copy(options: PrepareOptions, layout: Layout, text: str, screen: Screen) -> Path:
    """Make the low copy, or check the one that was named."""
    from .gguf_file import open_gguf
    from .low_file import low_path
    from .low_writer import part_path
    from .prepare import errors_of, prepare
    from .quality import low_copies

    if options.low_file is not None:
        return low_copies(layout, options.low_file.expanduser()).gguf.parts[0].path
    dest = options.output.expanduser() if options.output else low_path(layout.gguf)
    gather = partial(_gathered, options, layout, text, screen)
    try:
        with screen.progress() as report:
            made = prepare(
                layout,
                dest,
                options.low,
                options.imatrix,
                gather=gather,
                threads=options.n_threads,
                force=options.force,
                progress=report,
            )
    except KeyboardInterrupt:
        if part_path(dest).exists():
            screen.say(f"{part_path(dest)} is kept: the same command goes on where this stopped")
        raise
    if made is None:
        screen.say(f"{dest}: is made already", loss_line(errors_of(open_gguf(dest))))
    else:
        screen.say(*low_lines(made, layout))
    return dest


def _gathered(options: PrepareOptions, layout: Layout, text: str, screen: Screen) -> Importance:
    from .calibrate import gather_importance
    from .generate import interruptible

    screen.say("gathering the importance of the experts' columns from text")
    threads, memory = options.n_threads, options.memory
    return interruptible(lambda: gather_importance(layout, text, threads=threads, memory=memory))


def _nested_copy(options: PrepareOptions, layout: Layout, text: str, screen: Screen) -> Path:
    """Make the nested copy, unless it is there."""
    from .generate import interruptible
    from .importance import read_importance
    from .low_file import nested_path
    from .nested import check, make_nested

    dest = options.output.expanduser() if options.output else nested_path(layout.gguf)
    if dest.exists() and not options.force:
        screen.say(f"{dest}: is made already")
        return dest
    check(layout)
    importance = None
    if options.imatrix == "auto":
        importance = _gathered(options, layout, text, screen)
    elif options.imatrix not in ("none", "uniform"):
        importance = read_importance(Path(options.imatrix).expanduser(), layout)
    start = time.monotonic()
    with screen.progress() as report:
        interruptible(
            lambda: make_nested(layout, dest, report, importance.row if importance else None)
        )
    seconds = max(time.monotonic() - start, 1e-9)
    size = dest.stat().st_size
    screen.say(
        f"{dest}: {format_size(size)}, {100 * size / layout.gguf.nbytes:.0f} % of the model, "
        f"written at {size / seconds / 1e6:.0f} MB/s; the model's own file is not needed beside it"
    )
    return dest


def _calibrate(
    options: PrepareOptions, layout: Layout, low: Path, text: str, screen: Screen
) -> Calibration:
    from .calibrate import calibrate
    from .calibration import path_of, save
    from .generate import interruptible
    from .texts import CALIBRATION

    name = str(options.file) if options.file else f"hobbit's {CALIBRATION} text"
    with screen.progress() as report:
        known = interruptible(
            lambda: calibrate(
                layout,
                low,
                text,
                name,
                threads=options.n_threads,
                memory=options.memory,
                on_progress=report,
            )
        )
    save(known, path_of(low))
    return known


@app.command("eval")
def evaluate(
    model: Annotated[
        str | None, typer.Argument(help="Path of a .gguf file, or demo (the default).")
    ] = None,
    file: Annotated[
        Path | None, _flag("-f", "--file", help="Text to judge by (default: a built-in one).")
    ] = None,
    tokens: Annotated[
        int, _flag("--tokens", min=0, help="How much of it; 0: only the tasks.")
    ] = 1536,
    window: Annotated[
        int, _flag("--window", min=32, help="Tokens of context a piece of it has.")
    ] = 256,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="Compare this with exact (repeatable): high, balanced, fast, a KL budget (0.02), "
            "T1:T2, all-low, skip-only:T, fewer:K experts, or substitute:LAMBDA, cache-aware "
            "routing (default: all that the model is prepared for).",
        ),
    ] = None,
    t1: Annotated[
        float | None, _flag("--t1", min=0, max=1, help="One more mode: high up to this score,")
    ] = None,
    t2: Annotated[
        float | None, _flag("--t2", min=0, max=1, help="low up to this one, above it skipped.")
    ] = None,
    deterministic: Annotated[
        bool, _flag("--deterministic", help="Let the scores decide, whatever is cached.")
    ] = False,
    low: Annotated[
        Path | None, _flag("--low-file", help="Low-precision copy of the experts.")
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            "--tasks",
            metavar="FILE",
            help="Multiple-choice questions: JSON lines, or a task.json of BIG-bench (repeatable).",
        ),
    ] = None,
    max_kld: Annotated[
        float | None,
        _flag("--max-kld", min=0, help="Exit with 6 if a mode's mean KL is above this."),
    ] = None,
    plot: Annotated[
        Path | None, _flag("--plot", help="Draw KL against bytes a token into this PNG.")
    ] = None,
    ctx_size: Annotated[
        int | None, _flag("-c", "--ctx-size", min=32, help="Context size (default: as needed).")
    ] = None,
    threads: Annotated[
        int | None, _flag("-t", "--threads", help="Threads (default: physical cores).")
    ] = None,
    memory: Annotated[
        str,
        _flag("--memory", "--ram", help="Cap for the whole process: 8G, 8GB, 50% or auto."),
    ] = "auto",
    policy: Annotated[str, _flag("--policy", help=_POLICY_HELP)] = "decay",
    predictor: Annotated[str, _flag("--predictor", help=_PREDICTOR_HELP)] = "auto",
    json_output: Annotated[
        bool, _flag("--json", help="Print one JSON object instead of tables.")
    ] = False,
    quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Measure what lossy modes cost: KL to exact, perplexity, bytes a token."""
    values = dict(locals())
    try:
        from .options import EvalOptions

        values["mode"], values["tasks"] = tuple(mode or ()), tuple(tasks or ())
        return _evaluate(EvalOptions(**values))
    except KeyboardInterrupt as exc:
        raise Interrupted from exc


def _evaluate(options: EvalOptions) -> int:
    from . import plot
    from .choices import answer, read_questions
    from .evaluate import EXIT_TOO_FAR, Sample, compare
    from .forced import Forced, stoppable
    from .gguf_file import open_gguf
    from .layout import build_layout
    from .memory import resolve_cap
    from .modes import check_low, companions, default_modes, modes
    from .quality import EXACT_NAME, ROOMY, Quality, low_copies
    from .report import eval_lines, eval_report, task_lines, too_far
    from .rule import EXACT
    from .texts import read

    screen, loading = Screen(options.quiet), options.loading()
    _check_name(loading)
    resolve_cap(options.memory)
    if options.plot:
        plot.check()
    text = read(options.file)
    questions = {str(path): read_questions(path) for path in options.tasks}
    path = _model_path(loading, screen)
    gguf = open_gguf(path)
    low, calibration = companions(gguf, options.low)
    names = options.mode or (() if options.has_thresholds else default_modes(low, calibration))
    thresholds, typed = (options.t1, options.t2), options.model or "demo"
    chosen = partial(
        modes, names, thresholds, calibration, typed, deterministic=options.deterministic
    )
    arms = chosen()
    check_low(arms, low, typed)
    layout = build_layout(gguf)
    screen.say(model_line(layout), *resident_lines(layout))
    copies = layout.low
    if copies is None and any(rule.needs_low for _, rule in arms):
        copies = low_copies(layout, low)
    quality = Quality(EXACT_NAME, EXACT, copies)
    with closing(_load(layout, loading, quality, screen)) as llm, screen.progress() as report:
        if llm.plan.cached_share < ROOMY:
            arms = chosen(roomy=False)
        model, sample = Forced(llm), Sample(options.window, options.tokens)
        tokens, bos = model.tokens(text), model.bos

        def measure() -> list[Row]:
            return compare(model, tokens, arms, sample, bos=bos, on_progress=report)

        def ask(name: str) -> list[ChoiceRow]:
            first = [] if bos is None else [bos]
            return answer(
                model,
                questions[name],
                arms,
                lambda words: [*first, *model.tokens(words)],
                name=name,
                on_progress=lambda mode, done: report(f"{name}: {mode}", done),
            )

        rows = stoppable(llm, measure) if options.tokens else []
        answers = {name: stoppable(llm, partial(ask, name)) for name in questions}
        facts = (
            options.facts(path, text)
            | {"low": str(low) if copies else None}
            | {
                "tokens_in_text": len(tokens),
                "threads": llm.n_threads,
                "ctx_size": llm.n_ctx(),
                "cap_bytes": llm.stats.cap_bytes,
                "cache_bytes": llm.stats.cache_bytes,
                "io": llm.stats.io,
            }
        )
    if options.json_output:
        _print(json.dumps(eval_report(rows, answers, facts), ensure_ascii=False) + "\n")
    else:
        tables = [eval_lines(rows)] if rows else []
        tables += [task_lines(name, found) for name, found in answers.items()]
        _print("\n\n".join("\n".join(lines) for lines in tables) + "\n")
    if options.plot and rows:
        marks = [plot.Mark(row.mode, row.bytes_per_token, row.kl, row.kl_se) for row in rows]
        plot.plot(options.plot, marks, title=path.name)
    worse = [] if options.max_kld is None else too_far(rows, options.max_kld)
    for line in worse:
        screen.error(line)
    return EXIT_TOO_FAR if worse else 0


@app.command()
def trace(
    model: Annotated[
        str | None, typer.Argument(help="Path of a .gguf file, or demo (the default).")
    ] = None,
    file: Annotated[
        Path | None, _flag("-f", "--file", help="Text to feed (default: a built-in one).")
    ] = None,
    output: Annotated[
        Path | None, _flag("-o", "--output", help="The trace to write; see docs/trace.md.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option("--show", help="Summarise a trace instead of recording one.")
    ] = None,
    tokens: Annotated[
        int, _flag("-n", "--tokens", min=0, help="How many tokens; 0: all that the context holds.")
    ] = 1024,
    probs: Annotated[
        bool, _flag("--probs", help="Record the router's probabilities of all experts too.")
    ] = False,
    batch: Annotated[
        int, _flag("-b", "--batch", min=1, help="Tokens at once; 1 is how generating routes.")
    ] = 1,
    ubatch: Annotated[
        int, _flag("-ub", "--ubatch", min=1, help="Of these, at most so many in a layer at once.")
    ] = 512,
    ctx_size: Annotated[
        int | None, _flag("-c", "--ctx-size", min=1, help="Context size (default: as needed).")
    ] = None,
    threads: Annotated[
        int | None, _flag("-t", "--threads", help="Threads (default: physical cores).")
    ] = None,
    memory: Annotated[
        str,
        _flag("--memory", "--ram", help="Cap for the whole process: 8G, 8GB, 50% or auto."),
    ] = "auto",
    policy: Annotated[str, _flag("--policy", help=_POLICY_HELP)] = "decay",
    predictor: Annotated[str, _flag("--predictor", help=_PREDICTOR_HELP)] = "auto",
    quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Record which experts the router chooses for a text, in a file, or show such a file."""
    values = dict(locals())
    try:
        from .options import TraceOptions

        return _trace(TraceOptions(**values))
    except KeyboardInterrupt as exc:
        raise Interrupted from exc


@app.command()
def bench(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Paths of .gguf files, or demo (the default)."),
    ] = None,
    model: Annotated[
        list[str] | None, _flag("-m", "--model", help="MODEL, as a flag (repeatable).")
    ] = None,
    n_prompt: Annotated[
        str,
        _flag(
            "-p",
            "--n-prompt",
            help="Tokens of the prompt. Of this, -n, -d, -b, -ub, -ctk, -ctv and -t several may be "
            "given: 128,512 or 128-512*2.",
        ),
    ] = "512",
    n_gen: Annotated[
        str, _flag("-n", "--n-gen", help="Tokens decoded after it, one at a time.")
    ] = "128",
    pg: Annotated[
        list[str] | None,
        _flag("-pg", "--pg", metavar="PP,TG", help="A prompt and decoding as one (repeatable)."),
    ] = None,
    n_depth: Annotated[str, _flag("-d", "--n-depth", help="Tokens in the context before.")] = "0",
    batch_size: Annotated[str, _flag("-b", "--batch-size", help="Logical batch.")] = "2048",
    ubatch_size: Annotated[str, _flag("-ub", "--ubatch-size", help="Batch.")] = "512",
    cache_type_k: Annotated[str, _flag("-ctk", "--cache-type-k", help="Type of K.")] = "f16",
    cache_type_v: Annotated[str, _flag("-ctv", "--cache-type-v", help="Type of V.")] = "f16",
    threads: Annotated[
        str, _flag("-t", "--threads", help="Threads (default: physical cores).")
    ] = "",
    repetitions: Annotated[int, _flag("-r", "--repetitions", min=1, help="Runs of each arm.")] = 5,
    output: Annotated[str, _flag("-o", "--output", help="md, csv, json or jsonl.")] = "md",
    delay: Annotated[float, _flag("--delay", min=0, help="Seconds to wait before each run.")] = 0.0,
    arm: Annotated[
        list[str] | None,
        _flag(
            "--arm",
            help="What is compared (repeatable, or with commas): exact, high, balanced, fast, a KL "
            "budget, stock-mmap, stock (llama.cpp, without mmap); ARM@CAP has a cap of its own, as "
            "stock@none (default: exact).",
        ),
    ] = None,
    memory: Annotated[
        str,
        _flag(
            "--memory",
            "--ram",
            help="Cap on each process, page cache included: 8G, 50% of the machine's memory, "
            "55%model of the model's file, or none. Needs root, or systemd.",
        ),
    ] = "none",
    policy: Annotated[
        list[str] | None, _flag("--policy", help=f"{_POLICY_HELP} Repeatable: an arm for each.")
    ] = None,
    predictor: Annotated[
        list[str] | None,
        _flag("--predictor", help=f"{_PREDICTOR_HELP} Repeatable: an arm for each."),
    ] = None,
    read_bps: Annotated[
        str, _flag("--read-bps", help="Hold the disk to so many bytes a second, as 500M.")
    ] = "",
    text: Annotated[
        str,
        _flag("--text", help="Text that is fed, or random (tokens; default: a built-in text)."),
    ] = "",
    warm: Annotated[
        bool,
        _flag(
            "--warm/--cold",
            "--warmup/--no-warmup",
            help="Feed the prompt and a few tokens before what is timed, or start with nothing "
            "of the model in memory.",
        ),
    ] = True,
    roofline: Annotated[
        bool,
        _flag(
            "--roofline/--no-roofline",
            help="Compare with the longer of computing with everything in memory, which is "
            "measured too, and reading what was missed.",
        ),
    ] = True,
    interference: Annotated[
        bool,
        _flag(
            "--interference",
            help="Compare also with computing while another process reads as much, for reading "
            "slows computing down.",
        ),
    ] = False,
    breakdown: Annotated[
        bool,
        _flag("--breakdown", "--verbose", "-v", help="Show where a token's time goes (md)."),
    ] = False,
    quiet: Annotated[bool, _flag("--quiet", "-q", help="No progress on stderr.")] = False,
) -> int:
    """Measure speed as llama-bench does, of hobbit's modes and of stock llama.cpp, under a cap."""
    values = dict(locals())
    try:
        from .bench_options import BenchOptions

        for name in ("words", "model", "pg", "arm", "policy", "predictor"):
            values[name] = tuple(values[name] or ())
        return _bench(BenchOptions(**values))
    except KeyboardInterrupt as exc:
        raise Interrupted from exc


def _trace(options: TraceOptions) -> int:
    from .report import trace_lines
    from .trace import read_trace

    screen, loading = Screen(options.quiet), options.loading()
    if options.show:
        _print("\n".join(trace_lines(read_trace(options.show.expanduser()))) + "\n")
        return 0
    assert options.output is not None
    dest = options.output.expanduser()
    n = _record_routing(options, loading, dest, screen)
    size = f", {format_size(dest.stat().st_size)}" if dest.is_file() else ""
    _print(f"{dest}: the routing of {n} tokens{size}\n")
    return 0


def _record_routing(options: TraceOptions, loading: Options, dest: Path, screen: Screen) -> int:
    from .forced import stoppable
    from .gguf_file import open_gguf
    from .layout import build_layout
    from .memory import resolve_cap
    from .quality import EXACT_NAME, Quality
    from .rule import EXACT
    from .texts import read
    from .tracing import check_dest, record

    _check_name(loading)
    resolve_cap(options.memory)
    check_dest(dest)
    text = read(options.file)
    layout = build_layout(open_gguf(_model_path(loading, screen)))
    screen.say(model_line(layout), *resident_lines(layout))
    quality = Quality(EXACT_NAME, EXACT, layout.low)
    with closing(_load(layout, loading, quality, screen)) as llm, screen.progress() as report:
        return stoppable(
            llm,
            lambda: record(
                llm,
                text,
                dest,
                limit=options.tokens,
                batch=options.batch,
                probs=options.probs,
                on_progress=report,
            ),
        )


def _bench(options: BenchOptions) -> int:
    from .bench import measure
    from .bench_rows import FORMATS, as_markdown, rows
    from .gguf_file import open_gguf
    from .layout import build_layout

    screen = Screen(options.quiet)
    for loading in options.loading():
        _check_name(loading)
    paths = [_model_path(loading, screen) for loading in options.loading()]
    setups = [options.setup(build_layout(open_gguf(path))) for path in paths]
    found = []
    for setup in setups:
        screen.say(model_line(setup.layout), *resident_lines(setup.layout))
        found += rows(measure(setup, screen.say))
    breakdown = options.breakdown and options.output == "md"
    _print(as_markdown(found, True) if breakdown else FORMATS[options.output](found))
    return 0


@app.command()
def simulate(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Files of hobbit trace, of one model; each further one is another sequence.",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="NAME[:SETTINGS]",
            help="Compare this (repeatable): belady, decay, hobbit, lcu, lfru, lfu or lru, as in "
            "decay:half_life=64,w_fld=0.1 (default: all).",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="SIZE",
            help="Size of the cache (repeatable): 4G, 55% of all experts, or '200 slots' "
            "(default: 25%, 50%, 75%).",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="NAME=VALUES",
            help="Compare a setting's values, as half_life=32,64 (repeatable: every combination).",
        ),
    ] = None,
    tune: Annotated[
        bool, _flag("--tune", help="Print the settings that read the least, of decay and hobbit.")
    ] = False,
    predict: Annotated[
        str, _flag("--predict", help="none, or recorded: the trace's own predictions.")
    ] = "none",
    odds: Annotated[
        float, _flag("--odds", min=0, max=1, help="Read ahead what has at least these odds.")
    ] = 0.0,
    t1: Annotated[
        float | None,
        _flag("--t1", help="For experts: score above which low precision will do.", max=1),
    ] = None,
    t2: Annotated[
        float | None,
        _flag(
            "--t2", help="Score above which an expert is skipped (T1 is T2 if not given).", max=1
        ),
    ] = None,
    patience: Annotated[
        int,
        _flag("--patience", min=0, max=65535, help="As in hobbit run."),
    ] = 0,
    deterministic: Annotated[
        bool, _flag("--deterministic", help="Let the scores decide, whatever is cached.")
    ] = False,
    tokens: Annotated[
        int, _flag("-n", "--tokens", min=0, help="Only the first tokens; 0: all.")
    ] = 0,
    skip: Annotated[
        int, _flag("--skip", min=0, help="Tokens of warm-up that are not counted.")
    ] = 0,
    one_sequence: Annotated[
        bool,
        _flag("--one-sequence", help="Forget no records of uses where another sequence begins."),
    ] = False,
    disk: Annotated[
        str, _flag("--disk", help="Speed of the disk in bytes a second, for the modelled tok/s.")
    ] = "500M",
    compute_ms: Annotated[
        float, _flag("--compute-ms", min=0, help="Milliseconds that computing a token takes.")
    ] = 90.0,
    plot: Annotated[
        Path | None, _flag("--plot", help="Draw bytes a token against the cache into this PNG.")
    ] = None,
    json_output: Annotated[
        bool, _flag("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> int:
    """Replay routing traces: what would other caches and policies have read?"""
    values = dict(locals())
    try:
        from .simulating import simulating

        for name in ("traces", "policy", "budget", "sweep"):
            values[name] = tuple(values[name] or ())
        _print(simulating(values, Screen()))
        return 0
    except KeyboardInterrupt as exc:
        raise Interrupted from exc


def _run(options: Options) -> int:
    from .generate import Prompt, generate, has_chat_template
    from .gguf_file import open_gguf
    from .layout import build_layout
    from .memory import resolve_cap
    from .options import (
        DEMO_PROMPT,
        chosen_quality,
        grammar,
        read_prompt,
        sampling,
        system_prompt,
    )

    screen = Screen(options.quiet, options.color)
    _check_name(options)
    # What needs no model to be found wrong is told before one is fetched, made or loaded.
    resolve_cap(options.memory)
    answer_grammar = grammar(options)
    text = read_prompt(options, _stdin(screen))
    system = system_prompt(options)
    path = _model_path(options, screen)
    layout = build_layout(open_gguf(path))
    settings = sampling(options, layout.gguf.get, answer_grammar)
    quality = chosen_quality(options, layout)
    if not text:
        text = DEMO_PROMPT
        screen.say(f"no prompt given, so the demo is asked: {text}")
    start = time.monotonic()
    screen.say(model_line(layout), *resident_lines(layout))
    with closing(_load(layout, options, quality, screen)) as llm, _schedule(llm, options):
        load_s = time.monotonic() - start
        io = llm.stats.io or "none"
        facts = f"threads: {llm.n_threads}   context: {llm.n_ctx()}   seed: {settings.seed}"
        screen.say(f"io: {io}   {facts}")
        chat = has_chat_template(llm) and not options.raw
        if system and not chat:
            screen.say("the system prompt is not used: there is no chat template, or --raw")
        whole = options.no_stream or options.json_output
        result = generate(llm, Prompt(text, system, chat), settings, _mute if whole else _print)
        if options.json_output:
            config = options.resolved(settings) | {"model": str(path), "chat": chat}
            config |= {"threads": llm.n_threads, "ctx_size": llm.n_ctx()}
            report = run_report(result, llm.plan, llm.quality, config, load_s)
            _print(json.dumps(report, ensure_ascii=False))
        elif whole:
            _print(result.text)
        _print("\n")
        if options.verbose:
            screen.say(*verbose_lines(result, load_s))
        screen.say(stats_line(result, llm.quality))
    return 0 if result.signal is None else _signal_code(result.signal)


def _schedule(llm: Llama, options: Options) -> AbstractContextManager[None]:
    if options.record:
        return llm.recorded(options.record.expanduser())
    return llm.replayed(options.replay.expanduser()) if options.replay else nullcontext()


def _load(layout: Layout, options: Options, quality: Quality, screen: Screen) -> Llama:
    """Load the model, saying what its memory is for before it takes any.

    It loads in another thread, so that Ctrl-C is heard while llama.cpp reads it.
    """
    from .generate import interruptible
    from .options import model_arguments

    trained = layout.gguf.get(f"{layout.gguf.arch}.context_length", 0)
    arguments = model_arguments(options, trained) | {"quality": quality}

    def introduce(plan: MemoryPlan) -> None:
        screen.say(mode_line(plan, quality.at(plan.cached_share)))
        screen.say(*([plan.describe()] if options.verbose else cap_lines(plan)))

    def load() -> Llama:
        from .llama import Llama

        return Llama(str(layout.gguf.parts[0].path), on_plan=introduce, **arguments)

    return interruptible(load)


def _check_name(options: Options) -> None:
    """Refuse a word that cannot be meant as a path, with an answer about names."""
    name = options.model_name
    if name is None or options.is_demo:
        return
    path = Path(name).expanduser()
    if not path.exists() and path.suffix != ".gguf" and len(path.parts) == 1:
        hint = " (a prompt for it is given with -p)" if " " in name else ""
        raise ModelError(
            f"no model is called {name!r}: name a .gguf file, a Hugging Face repository with -hf, "
            f"or demo, the built-in model{hint}"
        )


def _model_path(options: Options, screen: Screen) -> Path:
    if options.hf_repo:
        from .hub import fetch

        return fetch(options.hf_repo, options.hf_file)
    name = options.model_name
    if name is None or options.is_demo:
        from . import demo

        if demo.path().is_file():
            return demo.path()
        screen.say(f"the demo model is made once, in {demo.path().parent}")
        with screen.progress() as report:
            return demo.ensure(report)
    return Path(name).expanduser()


def _stdin(screen: Screen) -> TextIO | None:
    """Return stdin unless it is a terminal; say so when nothing comes from it for a while."""
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        return None
    try:
        ready = select.select([sys.stdin], [], [], _STDIN_PATIENCE_S)[0]
    except (OSError, ValueError):
        return sys.stdin
    if not ready:
        screen.say("waiting for the end of stdin, which is put before the prompt (or: </dev/null)")
    return sys.stdin


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        _forget_stdout()
        raise HobbitError(f"cannot write to stdout: {exc.strerror}") from exc


def _mute(text: str) -> None:
    pass
