"""Whether llama.cpp can compute more experts a token than a model's own number.

Its graph has room for so many nodes, a few for each tensor, and each expert of each layer takes
two. Where they do not fit llama.cpp ends the process, so another process tries first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError
from .layout import Layout

# It gets as far as the memory plan, for which llama.cpp builds the graph and allocates nothing.
# What raises an error here does so in the caller's process too.
_TRY = """
import contextlib, json, sys
with contextlib.suppress(ImportError, ValueError):
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
folder, path, arguments = sys.argv[1:]
sys.path.insert(0, folder)

def planned(plan):
    raise InterruptedError

with contextlib.suppress(Exception):
    from hobbit.llama import Llama

    Llama._check_graph = lambda self: None  # this is it
    Llama(path, on_plan=planned, **json.loads(arguments))
"""


def check_graph(layout: Layout, arguments: Mapping[str, Any]) -> None:
    """Raise UsageError where llama.cpp has no room for the experts that a token is to use.

    Up to the model's own number there always is. `arguments` are those of the Llama that is meant;
    of them what is plain data counts.
    """
    if layout.n_expert_used <= layout.own_expert_used:
        return
    own = {"n_expert_used": layout.n_expert_used, "n_gpu_layers": 0, "verbose": False}
    plain = {name: value for name, value in arguments.items() if _is_plain(value)}
    path = layout.gguf.parts[0].path
    command = [sys.executable, "-c", _TRY, Path(__file__).parents[1], path, json.dumps(plain | own)]
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        check=False,
    )
    if done.returncode:
        raise UsageError(
            f"{layout.n_expert_used} experts a token: more than llama.cpp's graph of {path} has "
            f"room for: take fewer (the model's own number is {layout.own_expert_used})"
        )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | dict)
