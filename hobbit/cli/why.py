"""hobbit why: what the last run's time went into."""

from __future__ import annotations

import json
from typing import Annotated

from .console import write
from .flags import flag


def why(
    json_output: Annotated[
        bool, flag("--json", help="Print one JSON object instead of text.")
    ] = False,
) -> int:
    """Explain the last run's speed, and what would change it."""
    from ..errors import HobbitError
    from ..planning.feedback import last_run
    from ..planning.why import explain

    record = last_run()
    try:
        found = explain(record)
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise HobbitError(
            "there is nothing to explain: no run has ended here yet, or what it left cannot be "
            "read; hobbit run leaves it"
        ) from None
    write((json.dumps(found.to_dict()) if json_output else "\n".join(found.lines())) + "\n")
    return 0
