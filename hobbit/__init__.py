"""Run Mixture-of-Experts GGUF models bigger than memory, exactly, under a hard memory cap."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from .errors import (
    Cancelled,
    HobbitError,
    ModelError,
    PlanError,
    ReadError,
    UnsupportedModelError,
    UsageError,
)

if TYPE_CHECKING:
    from .llama import Llama
    from .patching import patch
    from .planning.planner import plan

__all__ = [
    "Cancelled",
    "HobbitError",
    "Llama",
    "ModelError",
    "PlanError",
    "ReadError",
    "UnsupportedModelError",
    "UsageError",
    "__version__",
    "patch",
    "plan",
]

__version__ = version("hobbit-moe")


def __getattr__(name: str) -> object:
    # llama.cpp takes half a second to import: `hobbit --help` must not wait for it.
    if name == "Llama":
        from .llama import Llama

        return Llama
    if name == "patch":
        from .patching import patch

        return patch
    if name == "plan":
        from .planning.planner import plan

        return plan
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
