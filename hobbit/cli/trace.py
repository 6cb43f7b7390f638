"""hobbit trace: which experts a text needs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..render import Screen, model_line, resident_lines
from ..sizes import format_size
from .console import write
from .flags import chosen, flag
from .loading import check_name, load, model_path
from .shared import Memory, ModelWord, NExpertUsed, Policy, Predictor, Quiet, Threads

if TYPE_CHECKING:
    from ..options import Options, TraceOptions


def trace(
    model: ModelWord = None,
    file: Annotated[
        Path | None, flag("-f", "--file", help="Text to feed (default: a built-in one).")
    ] = None,
    output: Annotated[
        Path | None, flag("-o", "--output", help="The trace to write; see docs/trace.md.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option("--show", help="Summarise a trace instead of recording one.")
    ] = None,
    tokens: Annotated[
        int, flag("-n", "--tokens", min=0, help="How many tokens; 0: all that the context holds.")
    ] = 1024,
    probs: Annotated[
        bool, flag("--probs", help="Record the router's probabilities of all experts too.")
    ] = False,
    batch: Annotated[
        int, flag("-b", "--batch", min=1, help="Tokens at once; 1 is how generating routes.")
    ] = 1,
    ubatch: Annotated[
        int, flag("-ub", "--ubatch", min=1, help="Of these, at most so many in a layer at once.")
    ] = 512,
    ctx_size: Annotated[
        int | None, flag("-c", "--ctx-size", min=1, help="Context size (default: as needed).")
    ] = None,
    threads: Threads = None,
    memory: Memory = "auto",
    policy: Policy = "decay",
    predictor: Predictor = "auto",
    n_expert_used: NExpertUsed = None,
    quiet: Quiet = False,
) -> int:
    """Record which experts a text needs, or show such a record."""
    from ..options import TraceOptions

    return _trace(chosen(TraceOptions, locals()))


def _trace(options: TraceOptions) -> int:
    from ..report import trace_lines
    from ..trace import read_trace

    screen, loading = Screen(options.quiet), options.loading()
    if options.show:
        write("\n".join(trace_lines(read_trace(options.show.expanduser()))) + "\n")
        return 0
    assert options.output is not None
    dest = options.output.expanduser()
    n = _record_routing(options, loading, dest, screen)
    size = f", {format_size(dest.stat().st_size)}" if dest.is_file() else ""
    write(f"{dest}: the routing of {n} tokens{size}\n")
    return 0


def _record_routing(options: TraceOptions, loading: Options, dest: Path, screen: Screen) -> int:
    from ..forced import stoppable
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..memory import resolve_cap
    from ..quality import EXACT_NAME, Quality
    from ..rule import EXACT
    from ..texts import read
    from ..tracing import check_dest, record

    check_name(loading)
    resolve_cap(options.memory)
    check_dest(dest)
    text = read(options.file)
    layout = build_layout(open_gguf(model_path(loading, screen)), options.n_expert_used)
    screen.say(model_line(layout), *resident_lines(layout))
    quality = Quality(EXACT_NAME, EXACT, layout.low)
    with closing(load(layout, loading, quality, screen)) as llm, screen.progress() as report:
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
