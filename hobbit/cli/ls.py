"""hobbit ls: which models are here, or known."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

from ..render import Screen
from .console import write
from .flags import flag


def ls(
    known: Annotated[
        bool, flag("--known", help="List the models that hobbit knows by name instead.")
    ] = False,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of a table.")
    ] = False,
    quiet: Annotated[bool, flag("--quiet", "-q", help="Nothing on stderr.")] = False,
) -> int:
    """List the models on this machine, also other tools'."""
    return _known(json_output) if known else _here(json_output, Screen(quiet))


def _here(as_json: bool, screen: Screen) -> int:
    from ..errors import ModelError
    from ..listing import row_lines
    from ..models.inventory import row
    from ..models.stores import stored_models

    rows = []
    for stored in stored_models():
        try:
            rows.append(row(stored))
        except ModelError as exc:
            screen.say(f"left out: {exc}")
    if as_json:
        found = {"schema": "hobbit.ls/1", "models": [asdict(row) for row in rows]}
        write(json.dumps(found) + "\n")
    elif rows:
        write("\n".join(row_lines(rows)) + "\n")
    else:
        screen.say("no model is here: hobbit ls --known lists some, hobbit pull NAME fetches one")
    return 0


def _known(as_json: bool) -> int:
    from ..listing import known_lines
    from ..models.catalogue import known_models

    models = list(known_models().values())
    sizes = {m.name: m.skeleton(m.quants[0]).nbytes for m in models if m.shape is not None}
    if as_json:
        rows = [asdict(model) | {"size": sizes.get(model.name)} for model in models]
        write(json.dumps({"schema": "hobbit.known/1", "models": rows}) + "\n")
    else:
        write("\n".join(known_lines(models, sizes)) + "\n")
    return 0
