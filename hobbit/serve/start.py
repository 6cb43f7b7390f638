"""From a loaded model to a service."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..calibration import budget_of
from ..errors import UsageError
from ..options import Options, sampling
from ..quality import EXACT_NAME, Quality, choose
from .chat import ChatTemplate
from .engine import Engine
from .generation import Finished
from .options import ServeOptions
from .service import Service

if TYPE_CHECKING:
    from ..llama import Llama


def make_service(
    llm: Llama,
    options: ServeOptions,
    on_finished: Callable[[Finished], None],
    say: Callable[[str], None],
) -> Service:
    """Start the model's thread."""
    metadata = llm.metadata
    template = metadata.get("tokenizer.chat_template")
    ends = _ends(llm)
    own = sampling(Options(seed=0, predict=-1), llm.layout.gguf.get)
    return Service(
        engine=Engine(llm, options.queue, on_finished),
        options=options,
        name=options.alias
        or str(metadata.get("general.name") or llm.layout.gguf.parts[0].path.stem),
        defaults=own,
        template=ChatTemplate(template, *ends) if template else None,
        ends=ends,
        qualities=within_budget(llm, options),
        version=f"hobbit-{version('hobbit-moe')}",
        say=say,
    )


def within_budget(llm: Llama, options: ServeOptions) -> Callable[[str], Quality | None]:
    """Return what makes a quality of its name: at most as far from exact as the server's own."""
    own = llm.quality
    budget = 0.0 if own.rule.is_exact else math.inf
    if options.quality != EXACT_NAME:
        budget = budget_of(options.quality)
    by_thresholds = math.isinf(budget)

    def quality(name: str) -> Quality | None:
        if name == options.quality and not by_thresholds:
            return None
        if name == EXACT_NAME:
            return Quality(EXACT_NAME, choose(llm.layout).rule) if budget else None
        wanted = budget_of(name)
        if by_thresholds or wanted > budget:
            raise UsageError(f"quality {name}: this server computes {own.name}, or exact")
        low = options.low_file.expanduser() if options.low_file else None
        return choose(llm.layout, name, low, deterministic=options.deterministic)

    return quality


def _ends(llm: Llama) -> tuple[str, str]:
    """Return the texts of the tokens that begin and end a text; empty where there is none."""

    def text(token: int) -> str:
        return str(llm._model.token_get_text(token)) if token >= 0 else ""

    return text(llm.token_bos()), text(llm.token_eos())
