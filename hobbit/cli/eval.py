"""hobbit eval: what lossy modes cost on a text."""

from __future__ import annotations

import json
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..render import Screen, model_line, resident_lines
from .console import write
from .flags import chosen, flag
from .loading import check_name, load, model_path
from .shared import (
    Device,
    Dispatch,
    Memory,
    ModelWord,
    Policy,
    Predictor,
    Quiet,
    Rpc,
    Threads,
    Vram,
)

if TYPE_CHECKING:
    from ..choices import ChoiceRow
    from ..evaluate import Row
    from ..options import EvalOptions


def evaluate(
    model: ModelWord = None,
    file: Annotated[
        Path | None, flag("-f", "--file", help="Text to judge by (default: a built-in one).")
    ] = None,
    tokens: Annotated[
        int, flag("--tokens", min=0, help="How much of it; 0: only the tasks.")
    ] = 1536,
    window: Annotated[
        int, flag("--window", min=32, help="Tokens of context a piece of it has.")
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
        float | None, flag("--t1", min=0, max=1, help="One more mode: high up to this score,")
    ] = None,
    t2: Annotated[
        float | None, flag("--t2", min=0, max=1, help="low up to this one, above it skipped.")
    ] = None,
    deterministic: Annotated[
        bool, flag("--deterministic", help="Let the scores decide, whatever is cached.")
    ] = False,
    low: Annotated[
        Path | None, flag("--low-file", help="Low-precision copy of the experts.")
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
        flag("--max-kld", min=0, help="Exit with 6 if a mode's mean KL is above this."),
    ] = None,
    plot: Annotated[
        Path | None, flag("--plot", help="Draw KL against bytes a token into this PNG.")
    ] = None,
    ctx_size: Annotated[
        int | None, flag("-c", "--ctx-size", min=32, help="Context size (default: as needed).")
    ] = None,
    threads: Threads = None,
    memory: Memory = "auto",
    policy: Policy = "decay",
    predictor: Predictor = "auto",
    device: Device = None,
    vram: Vram = "auto",
    rpc: Rpc = None,
    dispatch: Dispatch = "auto",
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of tables.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Measure what lossy modes cost: KL, perplexity, bytes a token."""
    from ..options import EvalOptions

    return _evaluate(chosen(EvalOptions, locals()))


def _evaluate(options: EvalOptions) -> int:
    from .. import plot
    from ..choices import answer, read_questions
    from ..evaluate import EXIT_TOO_FAR, Sample, compare
    from ..forced import Forced, stoppable
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..memory import resolve_cap
    from ..modes import check_low, companions, default_modes, modes
    from ..quality import EXACT_NAME, ROOMY, Quality, low_copies
    from ..report import eval_lines, eval_report, task_lines, too_far
    from ..rule import EXACT
    from ..texts import read

    screen, loading = Screen(options.quiet), options.loading()
    check_name(loading)
    resolve_cap(options.memory)
    if options.plot:
        plot.check()
    text = read(options.file)
    questions = {str(path): read_questions(path) for path in options.tasks}
    path = model_path(loading, screen)
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
    with closing(load(layout, loading, quality, screen)) as llm, screen.progress() as report:
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
                "device": llm.arena.to_dict() if llm.arena else None,
            }
        )
    if options.json_output:
        write(json.dumps(eval_report(rows, answers, facts), ensure_ascii=False) + "\n")
    else:
        tables = [eval_lines(rows)] if rows else []
        tables += [task_lines(name, found) for name, found in answers.items()]
        write("\n\n".join("\n".join(lines) for lines in tables) + "\n")
    if options.plot and rows:
        marks = [plot.Mark(row.mode, row.bytes_per_token, row.kl, row.kl_se) for row in rows]
        plot.plot(options.plot, marks, title=path.name)
    worse = [] if options.max_kld is None else too_far(rows, options.max_kld)
    for line in worse:
        screen.error(line)
    return EXIT_TOO_FAR if worse else 0
