"""From the name of a model to the model, as the commands need it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..render import Screen, cap_lines, mode_line

if TYPE_CHECKING:
    from ..layout import Layout
    from ..llama import Llama
    from ..memory import MemoryPlan
    from ..options import Options
    from ..quality import Quality


def check_name(options: Options) -> None:
    """Refuse a word that cannot be meant as a path, with an answer about names."""
    name = options.model_name
    if name is None or options.is_demo:
        return
    path = Path(name).expanduser()
    if not path.exists() and path.suffix != ".gguf" and len(path.parts) == 1:
        hint = " (a prompt for it is given with -p)" if " " in name else ""
        raise ModelError(
            f"no model is called {name!r}: name a .gguf file, a Hugging Face repository with -hf, "
            f"or demo, the built-in model{hint}"
        )


def model_path(options: Options, screen: Screen) -> Path:
    if options.hf_repo:
        from ..hub import fetch

        return fetch(options.hf_repo, options.hf_file)
    name = options.model_name
    if name is None or options.is_demo:
        from .. import demo

        if demo.path().is_file():
            return demo.path()
        screen.say(f"the demo model is made once, in {demo.path().parent}")
        with screen.progress() as report:
            return demo.ensure(report)
    return Path(name).expanduser()


def load(layout: Layout, options: Options, quality: Quality, screen: Screen) -> Llama:
    """Load the model, saying what its memory is for before it takes any.

    It loads in another thread, so that Ctrl-C is heard while llama.cpp reads it.
    """
    from ..generate import interruptible
    from ..options import model_arguments

    trained = layout.gguf.get(f"{layout.gguf.arch}.context_length", 0)
    arguments = model_arguments(options, trained) | {"quality": quality}

    loading = True

    def introduce(plan: MemoryPlan) -> None:
        if not loading:  # a cap that is changed later is for those to tell who change it
            return
        screen.say(mode_line(plan, quality.at(plan.cached_share)))
        screen.say(*([plan.describe()] if options.verbose else cap_lines(plan)))

    def load() -> Llama:
        from ..llama import Llama

        return Llama(str(layout.gguf.parts[0].path), on_plan=introduce, **arguments)

    try:
        return interruptible(load)
    finally:
        loading = False
