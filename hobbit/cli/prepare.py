"""hobbit prepare: the low-precision copy of a model, and what its use costs."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..render import Screen, loss_line, low_lines, model_line, resident_lines
from ..sizes import format_size
from .console import write
from .flags import chosen, flag
from .loading import check_name, model_path
from .shared import ModelWord, Quiet, Threads

if TYPE_CHECKING:
    from ..calibration import Calibration
    from ..importance import Importance
    from ..layout import Layout
    from ..options import PrepareOptions


def prepare(
    model: ModelWord = None,
    low: Annotated[
        str,
        flag(
            "--low",
            help="Type of the low-precision experts, such as q4_0; two with a comma: of gate and "
            "up, and of down; auto: by the model's types, 0.3 to 0.55 of its bytes.",
        ),
    ] = "auto",
    imatrix: Annotated[
        str,
        flag(
            "--imatrix",
            help="Importance of the columns: a file of llama-imatrix; uniform (slower than none, "
            "but better); none; auto: gathered from text for types below 4 bits, for others "
            "uniform or none.",
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        flag(
            "-o",
            "--output",
            help="The file to make (default: MODEL.hobbit-low.gguf, or MODEL.hobbit-nested.gguf).",
        ),
    ] = None,
    threads: Threads = None,
    nested: Annotated[
        bool,
        flag(
            "--nested",
            help="Of a Q8_0 model: make one file with everything in it, whose low copies are "
            "half of the high ones.",
        ),
    ] = False,
    low_file: Annotated[
        Path | None,
        flag("--low-file", help="Make no copy: calibrate this smaller GGUF of the same model."),
    ] = None,
    file: Annotated[
        Path | None, flag("-f", "--file", help="Text to calibrate on (default: a built-in one).")
    ] = None,
    calibration: Annotated[
        bool,
        flag("--calibrate/--no-calibrate", help="Measure which rules keep which promises."),
    ] = True,
    plot: Annotated[
        Path | None, flag("--plot", help="Draw KL against bytes a token into this PNG.")
    ] = None,
    memory: Annotated[
        str, flag("--memory", "--ram", help="Cap while it runs the model on text.")
    ] = "auto",
    force: Annotated[bool, flag("--force", help="Make it again, or in place of a file.")] = False,
    quiet: Quiet = False,
) -> int:
    """Make a model's low-precision copy; calibrate the lossy modes."""
    from ..options import PrepareOptions

    return _prepare(chosen(PrepareOptions, locals()))


def _prepare(options: PrepareOptions) -> int:
    from .. import plot
    from ..calibration import load, path_of
    from ..fingerprint import fingerprint
    from ..gguf_file import open_gguf
    from ..layout import build_layout
    from ..memory import resolve_cap
    from ..report import calibration_lines, calibration_marks
    from ..texts import CALIBRATION, read

    screen, loading = Screen(options.quiet), options.loading()
    check_name(loading)
    resolve_cap(options.memory)
    if options.plot:
        plot.check()
    text = read(options.file, CALIBRATION)
    layout = build_layout(open_gguf(model_path(loading, screen)))
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
        write(f"{line}\n")
    if options.plot:
        marks, curve = calibration_marks(known)
        plot.plot(options.plot, marks, title=str(low.name), curves=[("measured rules", curve)])
    return 0


def _low_copy(options: PrepareOptions, layout: Layout, text: str, screen: Screen) -> Path:
    """Make the low copy, or check the one that was named."""
    from ..gguf_file import open_gguf
    from ..low_file import low_path
    from ..low_writer import part_path
    from ..prepare import errors_of, prepare
    from ..quality import low_copies

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
    from ..calibrate import gather_importance
    from ..generate import interruptible

    screen.say("gathering the importance of the experts' columns from text")
    threads, memory = options.n_threads, options.memory
    return interruptible(lambda: gather_importance(layout, text, threads=threads, memory=memory))


def _nested_copy(options: PrepareOptions, layout: Layout, text: str, screen: Screen) -> Path:
    """Make the nested copy, unless it is there."""
    from ..generate import interruptible
    from ..importance import read_importance
    from ..low_file import nested_path
    from ..nested import check, make_nested

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
    from ..calibrate import calibrate
    from ..calibration import path_of, save
    from ..generate import interruptible
    from ..texts import CALIBRATION

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
