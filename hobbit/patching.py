"""`hobbit.patch`: code that builds llama_cpp.Llama itself gets hobbit.Llama."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import Any

import llama_cpp

from .llama import Llama

_lock = threading.Lock()
_active: list[patch] = []  # the innermost is the last


class patch:
    """From now on, until `undo` or the end of a with block, llama_cpp.Llama(...) is hobbit's.

    Takes the arguments of hobbit.Llama that shall hold where the code that builds the model says
    nothing; of nested patches the inner one counts first. It is in force for the whole process, all
    threads, and wherever llama_cpp.Llama was imported to before; models that exist already, and
    classes that others derived from llama_cpp.Llama, stay what they are. Raises TypeError for an
    argument that hobbit.Llama does not have.
    """

    def __init__(self, **arguments: Any) -> None:
        known = inspect.signature(Llama.__init__).parameters
        for name in arguments:
            if name not in known or name in ("self", "model_path"):
                raise TypeError(f"patch() has no argument {name!r}")
        self._arguments = arguments
        with _lock:
            _active.append(self)
            llama_cpp.Llama.__new__ = _new

    def undo(self) -> None:
        """Take this patch back, whichever others are in force; harmless when done already."""
        with _lock:
            if self in _active:
                _active.remove(self)

    def __enter__(self) -> patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


class PatchedLlama(Llama):
    """What llama_cpp.Llama(...) makes under a patch."""

    def __init__(self, model_path: str, **arguments: Any) -> None:
        super().__init__(model_path, **{**_defaults(), **arguments})


def _defaults() -> Mapping[str, Any]:
    with _lock:
        return {name: value for one in _active for name, value in one._arguments.items()}


def _new(kind: type[Any], *_: Any, **__: Any) -> Any:
    """In place of llama_cpp.Llama.__new__, for good.

    A class that once had a __new__ of its own and lost it refuses every argument, so without a
    patch it stays, and makes what was asked for.
    """
    return object.__new__(PatchedLlama if kind is llama_cpp.Llama and _active else kind)


# What inspect shows of the class is of __new__ where there is one.
_new.__signature__ = inspect.signature(Llama.__init__)  # type: ignore[attr-defined]
