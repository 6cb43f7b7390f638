"""hobbit pull: get a model onto this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..render import Screen
from .console import write
from .flags import flag
from .loading import get_model
from .shared import Offline, Quiet


def pull(
    model: Annotated[
        str,
        typer.Argument(
            help="A known model (hobbit ls --known), or user/name of a repository; perhaps with a "
            "quantisation, as user/name:Q4_K_M."
        ),
    ],
    offline: Offline = False,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of the path.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Fetch a model into the hub's cache. An interrupted fetch goes on where it stopped."""
    return _pull(model, json_output, Screen(quiet))


def _pull(name: str, as_json: bool, screen: Screen) -> int:
    from ..gguf_file import open_gguf
    from ..models import locate

    located = locate(name)
    path = get_model(located, screen)
    gguf = open_gguf(path)
    if located.path is not None:
        screen.say(f"{name}: is here already, in {located.store}")
    size = sum(part.size for part in gguf.parts)
    facts = {
        "schema": "hobbit.pull/1",
        "name": name,
        "path": str(path),
        "size": size,
        "quant": located.quant,
        "fetched": located.path is None,
    }
    write(f"{json.dumps(facts) if as_json else path}\n")
    return 0
