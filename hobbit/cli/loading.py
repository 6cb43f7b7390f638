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
    from ..models import Located
    from ..options import Options
    from ..quality import Quality


def check_name(options: Options) -> None:
    """Refuse a word that can be no model's name, before anything is read or fetched."""
    from ..models.location import check

    name = _name(options)
    if not options.is_demo and name is not None:
        check(name)


def model_path(options: Options, screen: Screen) -> Path:
    """Return the path of the model's first part, which is fetched (or made) if it is not here."""
    from ..models import locate

    return get_model(locate(_name(options)), screen)


def get_model(located: Located, screen: Screen) -> Path:
    """Get a model onto this machine, saying what is fetched, and how far it is."""
    from ..models.pulling import choice_lines, pull

    if located.path is not None:
        return located.path
    screen.say(*choice_lines(located))
    try:
        with screen.progress() as report:
            return pull(located, report)
    except KeyboardInterrupt:
        if located.remote is not None:
            screen.say("what came is kept: the same command goes on where this stopped")
        raise


def shown_name(options: Options) -> str:
    """Return the model as a command names it."""
    return options.model_name or (f"-hf {options.hf_repo}" if options.hf_repo else "demo")


def _name(options: Options) -> str | None:
    if not options.hf_repo:
        return options.model_name
    repo = options.hf_repo.partition(":")[0]
    if repo.count("/") != 1:
        raise ModelError(f"-hf {options.hf_repo}: must be user/name or user/name:quantisation")
    return options.hf_repo if options.hf_file is None else f"{repo}:{options.hf_file}"


def load(layout: Layout, options: Options, quality: Quality, screen: Screen) -> Llama:
    """Load the model, saying what its memory is for before it takes any.

    It loads in another thread, so that Ctrl-C is heard while llama.cpp reads it.
    """
    from ..generate import interruptible
    from ..options import model_arguments

    trained = layout.gguf.get(f"{layout.gguf.arch}.context_length", 0)
    quality = quality.of(layout)
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
