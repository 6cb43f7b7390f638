from __future__ import annotations

import pytest

from hobbit import errors

TREE = [
    ("ModelError", ValueError, 3),
    ("UnsupportedModelError", errors.ModelError, 3),
    ("PlanError", MemoryError, 4),
    ("ReadError", OSError, 1),
    ("Cancelled", errors.HobbitError, 130),
    ("CapUnavailable", errors.HobbitError, 1),
    ("UsageError", ValueError, 2),
]


@pytest.mark.parametrize(("name", "parent", "exit_code"), TREE)
def test_tree(name: str, parent: type[Exception], exit_code: int) -> None:
    error: errors.HobbitError = getattr(errors, name)("what to do")
    assert isinstance(error, errors.HobbitError)
    assert issubclass(type(error), parent)
    assert error.exit_code == exit_code
    assert str(error) == "what to do"
    assert name in (errors.__doc__ or "")


def test_plan_error_knows_what_is_needed() -> None:
    assert errors.PlanError("too small", 7).needed_bytes == 7
