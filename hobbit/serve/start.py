"""From what was asked for to a service."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING

from ..calibration import budget_of
from ..errors import UsageError
from ..gguf_file import ArrayRef
from ..options import Options, model_arguments, sampling
from ..quality import EXACT_NAME, Quality, choose
from ..template import ChatTemplate
from .engine import Engine
from .generation import Finished
from .keeper import Facts, Keeper
from .options import ServeOptions
from .service import Service

if TYPE_CHECKING:
    from ..layout import Layout
    from ..llama import Llama


def make_service(
    layout: Layout,
    quality: Quality,
    options: ServeOptions,
    load: Callable[[str | int], Llama],
    on_finished: Callable[[Llama, Finished], None],
    say: Callable[..., None],
    failed: Callable[[BaseException], None],
) -> Service:
    """Start the model's thread; `load` makes the model with a memory cap, when it is needed."""
    gguf, loading = layout.gguf, options.loading
    idle_s = options.sleep_idle_seconds
    model = Keeper(load, _facts(layout, quality, loading), loading.memory, idle_s)

    def rested() -> None:
        say(f"asleep: nothing was asked for {idle_s:g} s; the next request loads the model")

    return Service(
        engine=Engine(model, options.queue, on_finished, rested),
        options=options,
        layout=layout,
        name=options.alias or str(gguf.get("general.name", "") or gguf.parts[0].path.stem),
        defaults=sampling(Options(seed=0, predict=-1), gguf.get),
        qualities=within_budget(layout, quality, loading),
        version=f"hobbit-{version('hobbit-moe')}",
        say=say,
        failed=failed,
    )


def _facts(layout: Layout, quality: Quality, loading: Options) -> Facts:
    """Return what the model's file says of it."""
    gguf = layout.gguf
    trained = gguf.get(f"{gguf.arch}.context_length", 0)
    words = gguf.get("tokenizer.ggml.tokens")
    template = gguf.get("tokenizer.chat_template", "")
    return Facts(
        n_ctx=model_arguments(loading, trained)["n_ctx"] or trained,
        n_vocab=words.count if isinstance(words, ArrayRef) else 0,
        n_embd=gguf.get(f"{gguf.arch}.embedding_length", 0),
        quality=quality,
        template=ChatTemplate(template, ("", "")) if template else None,
    )


def within_budget(
    layout: Layout, own: Quality, loading: Options
) -> Callable[[str], Quality | None]:
    """Return what makes a quality of its name: at most as far from exact as the server's own."""
    # A nested copy cannot be without its low copies.
    layout = layout if layout.low else replace(layout, low=own.low)
    budget = 0.0 if own.rule.is_exact else math.inf
    if loading.quality != EXACT_NAME:
        budget = budget_of(loading.quality)
    by_thresholds = math.isinf(budget)

    def quality(name: str) -> Quality | None:
        if layout.other_number:  # neither exact nor a promise can be had
            raise UsageError(f"quality {name}: this server computes with {layout.other_number}")
        if name == loading.quality and not by_thresholds:
            return None
        if name == EXACT_NAME:
            return Quality(EXACT_NAME, choose(layout).rule) if budget else None
        wanted = budget_of(name)
        if by_thresholds or wanted > budget:
            raise UsageError(f"quality {name}: this server computes {own.name}, or exact")
        low = loading.low_file.expanduser() if loading.low_file else None
        return choose(layout, name, low, deterministic=loading.deterministic)

    return quality
