"""hobbit show: what is known of a model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .console import write
from .flags import flag
from .shared import Offline


def show(
    model: Annotated[
        str, typer.Argument(help="A path, a known model, user/name[:QUANT], or demo.")
    ],
    offline: Offline = False,
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of lines.")
    ] = False,
) -> int:
    """Show a model's shape, sizes, licence and low copy. Of one that is not here, its header."""
    from ..listing import fact_lines
    from ..models import locate
    from ..models.inventory import facts

    found = facts(locate(model))
    if json_output:
        write(json.dumps({"schema": "hobbit.show/1"} | found) + "\n")
    else:
        write("\n".join(fact_lines(found)) + "\n")
    return 0
