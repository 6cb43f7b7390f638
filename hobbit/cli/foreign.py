"""llama.cpp's flags that hobbit has no use for, or has under another name.

Each is a hidden flag of the commands that stand in for a tool of llama.cpp's: what asks for what
hobbit does anyway is taken, everything else is refused by name, with what to use instead. Without
them the parser would see other flags in some: -mu is not -m u.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import typer

from ..errors import UsageError

_PLACES = (
    "hobbit places experts itself; say how much memory it may use with --memory, and with --device "
    "and --vram what of a GPU"
)
_OTHER_WAY = "fetch the file some other way and name it, or name user/name of the hub"
_SAMPLING = "use --temp, --top-k, --top-p, --min-p and --repeat-penalty"
_DEVICE = "one device can hold experts: hobbit run --device"


@dataclass(frozen=True)
class Foreign:
    """A flag by its names, the first in every message.

    `instead` is what to use; nothing where the flag is taken, whatever it says. `fine` are the
    values with which it changes nothing here; None where it has no value.
    """

    names: tuple[str, ...]
    instead: str = ""
    fine: tuple[str, ...] | None = None


def _taken(*names: str) -> Foreign:
    return Foreign(names)


def _switch(*names: str, instead: str) -> Foreign:
    return Foreign(names, instead)


def _valued(*names: str, instead: str, fine: tuple[str, ...] = ()) -> Foreign:
    return Foreign(names, instead, fine)


_EXPERTS = (
    _switch("-cmoe", "--cpu-moe", instead=_PLACES),
    _valued("-ncmoe", "--n-cpu-moe", instead=_PLACES),
    _valued("-ot", "--override-tensor", instead=_PLACES),
)

# Of llama-cli and llama-server.
TOOLS = (
    *_EXPERTS,
    # Not -o td.
    _valued("-otd", "--override-tensor-draft", instead="hobbit has no draft model"),
    _taken("-cnv", "--conversation", "-no-cnv", "--no-conversation"),
    _taken("-st", "--single-turn"),
    _taken("--show-timings", "--no-show-timings", "--perf", "--no-perf"),
    _taken("--mmap", "--no-mmap", "--mlock"),
    _taken("--warmup", "--no-warmup"),
    _taken("--jinja", "--no-display-prompt", "--simple-io"),
    _taken("-cb", "--cont-batching"),
    _valued(
        "-lm",
        "--load-mode",
        instead="hobbit reads experts as --io says: auto, direct or buffered",
        fine=("auto", "none", "mmap", "mlock", "mmap+mlock"),
    ),
    _switch("-dio", "--direct-io", "--dio", instead="use --io direct"),
    _valued("-mu", "--model-url", instead=_OTHER_WAY),
    _valued("-dr", "--docker-repo", instead=_OTHER_WAY),
    _valued("--samplers", instead=_SAMPLING),
    _valued("--sampling-seq", instead=_SAMPLING),
    _valued("-rea", "--reasoning", instead="use hobbit run --think or --no-think", fine=("auto",)),
    _valued(
        "--reasoning-budget",
        instead="use hobbit run --no-think, or -n for the whole answer",
        fine=("-1",),
    ),
    _valued(
        "--reasoning-format",
        instead="hobbit serve sends thoughts as reasoning_content, hobbit run --hide-thinking "
        "leaves them out",
        fine=("auto", "deepseek"),
    ),
    _valued("-lv", "--verbosity", "--log-verbosity", instead="use -v, -vv or -q", fine=("3",)),
    _valued("--log-file", instead="everything but the answer is on stderr: use 2>FILE"),
    _switch("--log-jsonl", instead="hobbit run --jsonl prints an answer as JSON lines"),
    _valued("--log-colors", instead="use --color auto, always or never", fine=("auto",)),
    _valued("-fit", "--fit", instead="hobbit always fits: see --memory", fine=("on", "auto")),
    _valued("-fitt", "--fit-target", instead="use --memory, the cap on all that hobbit holds"),
    _valued("-cram", "--cache-ram", instead="use --memory, the cap on all that hobbit holds"),
    _valued(
        "-np",
        "--parallel",
        instead="hobbit serve makes one answer at a time, --queue others may wait",
        fine=("1", "-1"),
    ),
    _valued("-ts", "--tensor-split", instead=_DEVICE),
    _valued("--override-kv", instead="use --n-expert-used N; nothing else can be overridden"),
)

# Of llama-bench.
BENCH = (
    *_EXPERTS,
    _valued("-ngl", "--n-gpu-layers", instead="hobbit bench measures the CPU", fine=("0", "auto")),
    _valued("-mmp", "--mmap", instead="use --arm stock-mmap or stock"),
    _valued("-lm", "--load-mode", instead="use --arm stock-mmap or stock"),
    _valued("-fa", "--flash-attn", instead="it is on where -ctv needs it", fine=("auto",)),
    _valued("-oe", "--output-err", instead="use -o, and > for its file"),
    _taken("--progress"),
)


def with_foreign(command: Callable[..., int], flags: Iterable[Foreign]) -> Callable[..., int]:
    """Return the command with hidden flags that it does not get to see."""
    hidden = {f"foreign_{number}": _option(flag) for number, flag in enumerate(flags)}

    @wraps(command)
    def call(*args: Any, **kwargs: Any) -> int:
        return command(*args, **{k: v for k, v in kwargs.items() if k not in hidden})

    own = inspect.signature(command, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in hidden.items()
    ]
    call.__annotations__ = {p.name: p.annotation for p in own.parameters.values()} | hidden
    call.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*own.parameters.values(), *more]
    )
    return call


def _option(flag: Foreign) -> Any:
    def check(param: typer.CallbackParam, value: Any) -> Any:
        if value and flag.instead and str(value) not in (flag.fine or ()):
            given = "" if flag.fine is None else f" {value}"
            raise UsageError(f"{param.opts[0]}{given}: {flag.instead}")
        return value

    kind = bool if flag.fine is None else str
    return Annotated[kind | None, typer.Option(*flag.names, hidden=True, callback=check)]
