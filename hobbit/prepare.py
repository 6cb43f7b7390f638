"""Make a model's low-precision copy: in which types, with what importance, and whether at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ._native import lib
from .calibration import path_of
from .cpus import physical_cores
from .errors import HobbitError, ModelError, UsageError
from .gguf_file import GGML_TYPES, GGUF, open_gguf
from .importance import UNIFORM, Gather, Importance, read_importance, write_importance
from .layout import Layout
from .low_file import ERROR, KEY, LowPlan, plan_low
from .low_types import choose, gains_from_search, wants_importance
from .low_writer import Progress, Written, part_path, write_low

GATHERED = "gathered from text by hobbit"


def make_low(
    layout: Layout,
    dest: Path,
    low: str = "auto",
    importance: Importance | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> Written:
    """Write the low copy of `layout` to `dest`, whatever is there.

    `low` is as in low_types.choose; 0 threads means one a core. Interrupted, it is continued by the
    next call with the same arguments.
    """
    types = _types(layout, low)
    if importance is None:
        _check_without_importance(types)
    plan = plan_low(layout, types, _told(importance))
    return write_low(
        layout, plan, dest, importance, threads or physical_cores(), progress or _ignore
    )


def prepare(
    layout: Layout,
    dest: Path,
    low: str = "auto",
    imatrix: str = "auto",
    *,
    gather: Gather | None = None,
    threads: int = 0,
    force: bool = False,
    progress: Progress | None = None,
) -> Written | None:
    """Make the low copy unless `dest` is already what would be made: then return None.

    `imatrix` is none, uniform, a file's path, or auto: types below 4 bits get what `gather`
    returns, others uniform or none, whichever is worth it. `gather` is called only if the copy is
    not there yet, and what it returned is kept beside an unfinished copy. A file at `dest` that is
    no low copy of ours is replaced only if `force`.
    """
    _check_dest(layout, dest, force)
    types = _types(layout, low)
    gathered = imatrix == "auto" and wants_importance(types.values())
    importance = None if gathered else _named(imatrix, layout, types)
    if not gathered and importance is None:
        _check_without_importance(types)
    plan = plan_low(layout, types, GATHERED if gathered else _told(importance))
    if not force and _is_made(dest, plan):
        return None
    kept = part_path(dest).with_name(f"{part_path(dest).name}.imatrix")
    if gathered:
        importance = _gathered(kept, layout, gather, types)
    # What was measured of a copy must not be taken for that of another: gone before it comes.
    with suppress(FileNotFoundError, NotADirectoryError):
        path_of(dest).unlink()
    made = write_low(
        layout, plan, dest, importance, threads or physical_cores(), progress or _ignore
    )
    kept.unlink(missing_ok=True)
    return made


def errors_of(low: GGUF) -> dict[str, float]:
    """Return what a low copy says of its loss, as Written.errors; nothing if it is not ours."""
    return {key.removeprefix(ERROR): low.get(key) for key in low.entries if key.startswith(ERROR)}


def _types(layout: Layout, low: str) -> dict[str, int]:
    matrices = [matrix for group in layout.groups for matrix in group.matrices]
    if not matrices:
        raise ModelError(
            f"{layout.gguf.parts[0].path}: has no experts that could be streamed: "
            "there is nothing to prepare"
        )
    return choose(low, matrices)


def _check_without_importance(types: dict[str, int]) -> None:
    for kind in sorted(set(types.values())):
        if lib.hobbit_needs_importance(kind):
            raise UsageError(
                f"{GGML_TYPES[kind].name} cannot be made without an importance matrix: "
                "name one with --imatrix FILE, or take --imatrix uniform"
            )


def _named(imatrix: str, layout: Layout, types: dict[str, int]) -> Importance | None:
    if imatrix == "auto":
        return UNIFORM if gains_from_search(types.values()) else None
    if imatrix in ("none", "uniform"):
        return UNIFORM if imatrix == "uniform" else None
    return read_importance(Path(imatrix).expanduser(), layout)


def _told(importance: Importance | None) -> str:
    if importance is None:
        return "none"
    return (
        f"{importance.origin} {importance.digest()[:16]}" if importance.sums else importance.origin
    )


def _gathered(
    kept: Path, layout: Layout, gather: Gather | None, types: dict[str, int]
) -> Importance:
    """Gather the importance, or take what an unfinished run has gathered."""
    if kept.exists():
        with suppress(ModelError):
            return read_importance(kept, layout)
    if gather is None:
        names = sorted({GGML_TYPES[kind].name for kind in types.values()})
        raise UsageError(
            f"{' and '.join(names)} want an importance matrix: name one with --imatrix FILE, "
            "or take --imatrix uniform"
        )
    fresh = kept.with_name(f"{kept.name}.new")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_importance(fresh, gather(), layout)
        fresh.replace(kept)
    except OSError as exc:
        fresh.unlink(missing_ok=True)
        raise HobbitError(f"cannot write {kept}: {exc.strerror or exc}") from exc
    # Read back, so that a run that continues this one has the same numbers.
    return read_importance(kept, layout)


def _check_dest(layout: Layout, dest: Path, force: bool) -> None:
    if dest.is_dir():
        raise UsageError(f"-o {dest}: is a folder; name a file")
    if not dest.exists():
        return
    if not dest.is_file():
        raise UsageError(f"-o {dest}: is not a regular file")
    if any(dest.samefile(part.path) for part in layout.gguf.parts):
        raise UsageError(f"-o {dest}: is the model itself; name another file")
    if not force and _key_of(dest) is None:
        raise UsageError(
            f"{dest}: exists and is no low copy made by hobbit; "
            "name another file with -o, or replace it with --force"
        )


def _is_made(dest: Path, plan: LowPlan) -> bool:
    return dest.exists() and _key_of(dest) == plan.key


def _key_of(path: Path) -> str | None:
    """Return the key of a whole low copy of ours."""
    with suppress(ModelError):
        key = open_gguf(path).get(KEY)
        return key if isinstance(key, str) else None
    return None


def _ignore(stage: str, done: float, words: str) -> None:
    pass
