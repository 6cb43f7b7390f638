"""The command line: its commands, and what becomes of whatever goes wrong in them.

stdout carries the answer and nothing else. Modules that are slow to import are imported where they
are used, so that `hobbit --help` is quick.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from importlib.metadata import version
from typing import Annotated

import typer

from ..errors import HobbitError
from ..render import Screen
from .bench import bench
from .config import config, default_map
from .console import forget_stdout, write
from .doctor import doctor
from .eval import evaluate
from .foreign import BENCH, TOOLS, with_foreign
from .ls import ls
from .plan import plan
from .plot import plot
from .prepare import prepare
from .ps import ps
from .pull import pull
from .rm import rm
from .run import run
from .serve import serve
from .show import show
from .signals import Interrupted, on_sigterm, signal_code
from .simulate import simulate
from .top import top
from .trace import trace
from .verify import verify
from .why import why

EXIT_DISK_FULL = 5


app = typer.Typer(
    help="Run Mixture-of-Experts GGUF models that are bigger than memory.",
    add_completion=True,
    rich_markup_mode=None,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; no exception leaves here."""
    try:
        signal.signal(signal.SIGTERM, on_sigterm)
        _open_standard_streams()
        code = app(args=arguments, standalone_mode=False, prog_name="hobbit")
        write("")  # what was printed without flushing it
        return code if isinstance(code, int) else 0
    except BaseException as exc:  # the last resort: whatever it is, one line and an exit code
        return _report(exc)


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
        os._exit(signal_code(exc))
    if isinstance(exc, BrokenPipeError):
        forget_stdout()
        return 1
    if isinstance(exc, HobbitError):
        screen.error(str(exc))
        cause = exc.__cause__
        full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
        return EXIT_DISK_FULL if full else exc.exit_code
    # The parser's own errors; their class is private to typer.
    format_message = getattr(exc, "format_message", None)
    if format_message is not None:
        context = getattr(exc, "ctx", None)
        screen.error(format_message(), f"{context.command_path if context else 'hobbit'} --help")
        return int(getattr(exc, "exit_code", 2))
    if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        forget_stdout()
        screen.error(f"{exc.filename}: {exc.strerror}" if exc.filename else str(exc.strerror))
        return EXIT_DISK_FULL
    screen.error(f"{type(exc).__name__}: {exc}", "set HOBBIT_VERBOSE=1 to see where")
    if os.environ.get("HOBBIT_VERBOSE"):
        traceback.print_exception(exc)
    return 1


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
    elif not context.resilient_parsing:
        context.default_map = default_map(context.command)


def _interruptible(command: Callable[..., int]) -> Callable[..., int]:
    @wraps(command)
    def call(*args: object, **kwargs: object) -> int:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as exc:
            raise Interrupted from exc

    return call


for _name, _command in (
    ("run", with_foreign(run, TOOLS)),
    ("serve", with_foreign(serve, TOOLS)),
    ("ps", ps),
    ("top", top),
    ("plan", plan),
    ("why", why),
    ("doctor", doctor),
    ("verify", verify),
    ("prepare", prepare),
    ("pull", pull),
    ("ls", ls),
    ("show", show),
    ("rm", rm),
    ("eval", evaluate),
    ("trace", trace),
    ("bench", with_foreign(bench, BENCH)),
    ("simulate", simulate),
    ("plot", plot),
    ("config", config),
):
    app.command(_name)(_interruptible(_command))
app.command("chat", help="Chat on a terminal: another name for run.")(
    _interruptible(with_foreign(run, TOOLS))
)
