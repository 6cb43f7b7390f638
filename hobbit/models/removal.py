"""Remove models: what hobbit made and what is in the hub's cache; never another tool's files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import calibration
from ..errors import HobbitError, ModelError
from ..gguf_file import open_gguf
from ..low_file import find_low
from .names import model_files
from .stores import HUB, LLAMA_CPP, LM_STUDIO, OLLAMA, OWN, Stored, hub_cache

_OWNERS = {
    LLAMA_CPP: "is in llama.cpp's cache: remove its file there",
    LM_STUDIO: "is LM Studio's: remove it there",
    OLLAMA: "is ollama's: remove it with `ollama rm`",
}


@dataclass(frozen=True)
class Removal:
    """What goes: files, and revisions of the hub's cache, by their hashes."""

    name: str
    files: tuple[Path, ...]
    revisions: tuple[str, ...] = ()
    freed: int = 0

    def execute(self) -> None:
        try:
            for path in self.files:
                path.unlink(missing_ok=True)
            if self.revisions:
                _strategy(self.revisions).execute()
        except OSError as exc:
            raise HobbitError(f"{self.name}: cannot remove it: {exc.strerror or exc}") from exc


def plan_removal(stored: Stored, low_only: bool = False) -> Removal:
    """Say what removing a model comes to; ModelError if it is not ours to remove.

    `low_only`: its low copy, with its calibration, and nothing else.
    """
    low = _low_files(stored)
    if low_only:
        if not low:
            raise ModelError(f"{stored.name}: has no low copy")
        return Removal(stored.name, low, freed=_bytes(low))
    if stored.store == OWN:
        files = (*stored.paths, *low)
        return Removal(stored.name, files, freed=_bytes(files))
    if stored.store != HUB:
        why = _OWNERS.get(
            stored.store, "is your own file, which hobbit did not make: remove it yourself"
        )
        raise ModelError(f"{stored.name}: {why} ({stored.path})")
    return _from_hub(stored, low)


def _from_hub(stored: Stored, low: tuple[Path, ...]) -> Removal:
    """Remove a revision, if nothing else is in it; else the model's own files of it."""
    commit = next(p for p in stored.path.parents if p.parent.name == "snapshots")
    files = [str(f.relative_to(commit)) for f in commit.rglob("*.gguf") if f.is_file()]
    others = [model for model in model_files(files) if commit / model[0] != stored.path]
    if not others:
        freed = _strategy([commit.name]).expected_freed_size + _bytes(low)
        return Removal(stored.name, low, (commit.name,), freed)
    used = {f.resolve() for f in commit.parent.rglob("*.gguf") if f not in stored.paths}
    # A link that somebody made to a file of theirs goes, and the file stays.
    own = commit.parents[1].resolve()
    links = [path.resolve() for path in stored.paths]
    blobs = [path for path in links if path not in used and path.is_relative_to(own)]
    gone = tuple(dict.fromkeys([*stored.paths, *blobs, *low]))
    return Removal(stored.name, gone, freed=_bytes([*blobs, *low]))


def _strategy(revisions: Sequence[str]) -> Any:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(hub_cache()).delete_revisions(*revisions)


def _low_files(stored: Stored) -> tuple[Path, ...]:
    try:
        low = find_low(open_gguf(stored.path))
    except ModelError:
        return ()
    if low is None:
        return ()
    return tuple(path for path in (low, calibration.path_of(low)) if path.is_file())


def _bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())
