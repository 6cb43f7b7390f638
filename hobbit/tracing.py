"""Record the routing of a text that is fed to a model token by token, or in batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .forced import Forced
from .trace import is_trace

if TYPE_CHECKING:
    from .llama import Llama


def check_dest(path: Path) -> None:
    """Refuse to write a trace where none can be, or over a file that is something else."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file with -o")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")
    if path.is_file() and path.stat().st_size and not is_trace(path):
        raise UsageError(f"{path} exists and is no trace: name another file with -o")


def record(
    llm: Llama,
    text: str,
    path: Path,
    *,
    limit: int = 0,
    batch: int = 1,
    probs: bool = False,
    on_progress: Callable[[str, float], None] | None = None,
) -> int:
    """Write the routing of the text's first tokens to a file; return how many they are.

    The run begins with no expert cached. `limit` 0: all, as far as the context holds them; `batch`
    tokens are decoded at once, of which, as in a prompt, the last one's logits are computed. Raises
    UsageError for an empty text, HobbitError when the disk is full, Cancelled after `llm.cancel()`.
    """
    model = Forced(llm)
    tokens = [*([] if model.bos is None else [model.bos]), *model.tokens(text)]
    tokens = tokens[: min(limit or len(tokens), model.n_ctx)]
    if not tokens or not text:
        raise UsageError("the text is empty: there is nothing to trace")
    llm.forget()
    model.clear()
    with llm.traced(path, probs=probs):
        for at in range(0, len(tokens), batch):
            model.decode(tokens[at : at + batch], logits=False)
            if on_progress:
                on_progress("tracing", min(at + batch, len(tokens)) / len(tokens))
    return len(tokens)
