"""hobbit bench: how fast, beside stock llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..render import Screen, model_line, resident_lines
from .console import write
from .flags import POLICY_HELP, PREDICTOR_HELP, chosen, flag
from .loading import check_name, model_path
from .shared import CacheTypeK, CacheTypeV, Device, NExpertUsed, Quiet, Rpc

if TYPE_CHECKING:
    from ..bench_options import BenchOptions


def bench(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="As for hobbit run, or several."),
    ] = None,
    model: Annotated[
        list[str] | None, flag("-m", "--model", help="MODEL, as a flag (repeatable).")
    ] = None,
    n_prompt: Annotated[
        str,
        flag(
            "-p",
            "--n-prompt",
            help="Tokens of the prompt. Of this, -n, -d, -b, -ub, -ctk, -ctv and -t several may be "
            "given: 128,512 or 128-512*2.",
        ),
    ] = "512",
    n_gen: Annotated[
        str, flag("-n", "--n-gen", help="Tokens decoded after it, one at a time.")
    ] = "128",
    pg: Annotated[
        list[str] | None,
        flag("-pg", "--pg", metavar="PP,TG", help="A prompt and decoding as one (repeatable)."),
    ] = None,
    n_depth: Annotated[str, flag("-d", "--n-depth", help="Tokens in the context before.")] = "0",
    batch_size: Annotated[str, flag("-b", "--batch-size", help="Logical batch.")] = "2048",
    ubatch_size: Annotated[str, flag("-ub", "--ubatch-size", help="Batch.")] = "512",
    cache_type_k: CacheTypeK = "f16",
    cache_type_v: CacheTypeV = "f16",
    threads: Annotated[
        str, flag("-t", "--threads", help="Threads (default: physical cores).")
    ] = "",
    repetitions: Annotated[int, flag("-r", "--repetitions", min=1, help="Runs of each arm.")] = 5,
    output: Annotated[str, flag("-o", "--output", help="md, csv, json or jsonl.")] = "md",
    delay: Annotated[float, flag("--delay", min=0, help="Seconds to wait before each run.")] = 0.0,
    arm: Annotated[
        list[str] | None,
        flag(
            "--arm",
            help="What is compared (repeatable, or with commas): exact, high, balanced, fast, a KL "
            "budget, stock-mmap, stock (llama.cpp, without mmap); ARM@CAP has a cap of its own, as "
            "stock@none (default: exact).",
        ),
    ] = None,
    memory: Annotated[
        str,
        flag(
            "--memory",
            "--ram",
            help="Cap on each process, page cache included: 8G, 50% of the machine's memory, "
            "55%model of the model's file, or none. Needs root, or systemd.",
        ),
    ] = "none",
    policy: Annotated[
        list[str] | None, flag("--policy", help=f"{POLICY_HELP} Repeatable: an arm for each.")
    ] = None,
    predictor: Annotated[
        list[str] | None,
        flag("--predictor", help=f"{PREDICTOR_HELP} Repeatable: an arm for each."),
    ] = None,
    device: Device = None,
    vram: Annotated[
        str,
        flag(
            "--vram",
            help="How much of the device's memory: 4G, or auto. Several may be given, as 0,2G,4G: "
            "an arm for each; 0 is without the device.",
        ),
    ] = "auto",
    rpc: Rpc = None,
    dispatch: Annotated[
        list[str] | None,
        flag(
            "--dispatch",
            help="Who computes an expert: auto, device, cpu or split. Repeatable: an arm for each.",
        ),
    ] = None,
    n_expert_used: NExpertUsed = None,
    read_bps: Annotated[
        str, flag("--read-bps", help="Hold the disk to so many bytes a second, as 500M.")
    ] = "",
    text: Annotated[
        str,
        flag("--text", help="Text that is fed, or random (tokens; default: a built-in text)."),
    ] = "",
    warm: Annotated[
        bool,
        flag(
            "--warm/--cold",
            "--warmup/--no-warmup",
            help="Feed the prompt and a few tokens before what is timed, or start with nothing "
            "of the model in memory.",
        ),
    ] = True,
    roofline: Annotated[
        bool,
        flag(
            "--roofline/--no-roofline",
            help="Compare with the longer of computing with everything in memory, which is "
            "measured too, and reading what was missed.",
        ),
    ] = True,
    interference: Annotated[
        bool,
        flag(
            "--interference",
            help="Compare also with computing while another process reads as much, for reading "
            "slows computing down.",
        ),
    ] = False,
    breakdown: Annotated[
        bool,
        flag("--breakdown", "--verbose", "-v", help="Show where a token's time goes (md)."),
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Measure speed as llama-bench does, beside stock llama.cpp."""
    from ..bench_options import BenchOptions

    return _bench(chosen(BenchOptions, locals()))


def _bench(options: BenchOptions) -> int:
    from ..bench import measure
    from ..bench_rows import FORMATS, as_markdown, rows
    from ..gguf_file import open_gguf
    from ..layout import build_layout

    screen = Screen(options.quiet)
    for loading in options.loading():
        check_name(loading)
    paths = [model_path(loading, screen) for loading in options.loading()]
    layouts = [build_layout(open_gguf(path), options.n_expert_used) for path in paths]
    setups = [options.setup(layout) for layout in layouts]
    found = []
    for setup in setups:
        screen.say(model_line(setup.layout), *resident_lines(setup.layout))
        found += rows(measure(setup, screen.say))
    breakdown = options.breakdown and options.output == "md"
    write(as_markdown(found, True) if breakdown else FORMATS[options.output](found))
    return 0
