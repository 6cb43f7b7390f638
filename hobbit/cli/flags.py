"""How the commands declare their flags, and how flags become options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import typer

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


def chosen(options: type[T], values: Mapping[str, Any]) -> T:
    """Make a command's options of what its parameters came to; a repeatable flag is a tuple.

    What the command has no parameter for keeps its default.
    """
    found = {}
    for field in fields(options):
        if field.name in values:
            value = values[field.name]
            found[field.name] = tuple(value or ()) if isinstance(field.default, tuple) else value
    return options(**found)
