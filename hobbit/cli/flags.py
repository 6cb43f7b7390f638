"""How the commands declare their flags, and how flags become options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


MODEL_HELP = "A .gguf file, or the name of a model (docs/models.md); demo if none is given."


POLICY_HELP = (
    "Who is evicted from the cache of experts: decay, hobbit, lcu, lfru, lfu or lru, perhaps with "
    "settings, as decay:half_life=64."
)


PREDICTOR_HELP = (
    "Who says which experts the next layers need: gate, map, none, or auto, which tries; perhaps "
    "with settings, as gate:depth=1,always."
)


def flag(*names: str, help: str = "", hidden: bool = False, **more: Any) -> Any:
    """Make an option that an environment variable, named after its long form, can set too."""
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "HOBBIT_" + long.removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, envvar=variable, show_envvar=False, hidden=hidden, **more
    )


def offline_flag() -> Any:
    """Make --offline, which is in force before anything asks the hub."""
    return flag("--offline", help="Never use the network (as HF_HUB_OFFLINE=1).", callback=_offline)


def _offline(value: bool) -> bool:
    if value:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return value


def ignored(*names: str) -> Any:
    """Take flags of llama.cpp that ask for what hobbit does anyway, or has no use for."""
    return typer.Option(*names, hidden=True)


def _refuse(param: typer.CallbackParam, value: Any) -> Any:
    if value:
        raise UsageError(
            f"{param.opts[0]}: hobbit places experts itself; "
            "say how much memory it may use with --memory"
        )
    return value


def dead(*names: str) -> Any:
    """Make a flag of llama.cpp that means nothing here: it is refused by name."""
    return typer.Option(*names, hidden=True, callback=_refuse)


def chosen(options: type[T], values: Mapping[str, Any]) -> T:
    """Make a command's options of what its parameters came to; a repeatable flag is a tuple."""
    found = {}
    for field in fields(options):
        value = values[field.name]
        found[field.name] = tuple(value or ()) if isinstance(field.default, tuple) else value
    return options(**found)
