"""From the name of a model to where it is: on this machine, on the hub, or known by its shape."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .. import demo
from ..errors import ModelError
from ..gguf_file import GGUF, open_gguf
from .catalogue import Known, known_models, known_source
from .hub import Repository, Unreachable, remote_header, repository
from .mixtures import MIXTURES
from .names import Name, choose, model_files, parse_name, quant_of
from .stores import OWN, Stored, models_in, stored_models

DEMO = "demo"
FILE = "file"


@dataclass(frozen=True)
class Located:
    """Where a model is.

    `local`: in the file `path` (the first part's), found in `store`; `remote`: in `files` of the
    repository `remote`; `known`: there is no way to it now, but models.toml has its shape. `known`
    may be there in any case. `quant` is empty where the name of the file does not tell.
    """

    name: str
    quant: str = ""
    path: Path | None = None
    store: str = ""
    remote: Repository | None = None
    files: tuple[str, ...] = ()
    known: Known | None = None
    why: str = ""

    @property
    def kind(self) -> Literal["local", "remote", "known"]:
        if self.path is not None:
            return "local"
        return "remote" if self.remote is not None else "known"

    @property
    def size(self) -> int:
        """Bytes of its files; of one that is known only by its shape, about as many."""
        if self.remote is not None:
            return sum(self.remote.file(file).size for file in self.files)
        return sum(part.size for part in self.header().parts)

    def header(self) -> GGUF:
        """Return the model's header, of which nothing else is read.

        Of a remote one some MB are fetched; where there is no way to it, or for a known one, it is
        made from the shape, which `is_estimate` tells.
        """
        if self.path is not None:
            return open_gguf(self.path)
        if self.remote is not None:
            try:
                return remote_header(self.remote, list(self.files))
            except Unreachable:
                if not self._has_skeleton():
                    raise
        return self._skeleton()

    def _has_skeleton(self) -> bool:
        return self.known is not None and self.known.shape is not None and self.quant in MIXTURES

    def _skeleton(self) -> GGUF:
        if self.known is None or not self._has_skeleton():
            raise ModelError(self.why or f"{self.name}: {self.quant} is known by name only")
        return self.known.skeleton(self.quant)


def check(name: str) -> None:
    """Raise ModelError for what can be no model's name; neither network nor header is asked."""
    path, wanted = _path(name), parse_name(name)
    is_path = _is_there(path) or path.suffix.lower() == ".gguf"
    if not is_path and not wanted.is_repository and _known(wanted.base) is None:
        stored = stored_models()
        if _of_base(stored, wanted) is None:
            _by_part(name, stored)


def locate(name: str | None) -> Located:
    """Find a model by what a user calls it; None is the demo.

    A path, the path of the first part or a folder with one model; the name of a known model or of a
    repository, each perhaps with `:QUANTISATION`; or a part of the name of a model that is here.
    The hub is asked only about what is not here, and only for a list of files.
    """
    if name is None or name == DEMO:
        return _demo()
    path = _path(name)
    if _is_there(path) or (path.suffix.lower() == ".gguf" and ":" not in name):
        return _file(name, path)
    wanted = parse_name(name)
    known = _known(wanted.base)
    if known is not None:
        wanted = replace(wanted, base=known.source)
    stored = stored_models()
    here = _of_base(stored, wanted)
    if here is not None:
        return _local(name, here, known or known_source(wanted.base))
    if known is None and not wanted.is_repository:
        return _local(name, _by_part(name, stored))
    return _elsewhere(name, wanted, known or known_source(wanted.base))


def locate_here(name: str) -> Located:
    """Find a model as `locate` does, on this machine only; without a path it is not here."""
    if name == DEMO:
        return _demo()
    path = _path(name)
    if _is_there(path):
        return _file(name, path)
    wanted = parse_name(name)
    known = _known(wanted.base)
    stored = stored_models()
    here = _of_base(stored, replace(wanted, base=known.source) if known else wanted)
    if here is None and (known is not None or wanted.is_repository):
        return Located(name, known=known)
    return _local(name, here or _by_part(name, stored), known)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # the home of a user who is not there
        return Path(name)


def _is_there(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Say whether there is such a thing; what cannot be looked at, or be a path, is not there."""
    try:
        return kind(path)
    except OSError:
        return False


def _demo() -> Located:
    known = known_models()[DEMO]
    if demo.path().is_file():
        return Located(DEMO, "Q8_0", demo.path(), OWN, known=known)
    return Located(DEMO, "Q8_0", known=known)


def _file(name: str, path: Path) -> Located:
    if not _is_there(path, Path.is_dir):
        return Located(name, quant_of(path.name), path, FILE)
    models = models_in(path)
    if len(models) != 1:
        some = (
            f"{len(models)} models, as {models[0][0].name} and {models[1][0].name}"
            if models
            else ""
        )
        raise ModelError(f"{path}: the folder has {some or 'no .gguf file'}: name one file")
    first = models[0][0]
    return Located(name, quant_of(first.name), first, FILE)


def _local(name: str, model: Stored, known: Known | None = None) -> Located:
    # What ollama calls a file tells nothing; its tag may.
    quant = quant_of(model.path.name) or quant_of(f"-{model.name.partition(':')[2]}")
    return Located(name, quant, model.path, model.store, known=known)


def _known(name: str) -> Known | None:
    return next((k for k in known_models().values() if k.name.lower() == name.lower()), None)


def _of_base(stored: Sequence[Stored], wanted: Name) -> Stored | None:
    """Return the model of that name that is here, in the first store that has it."""
    named = [m for m in stored if m.base.lower() == wanted.base.lower()]
    whole = f"{wanted.base}:{wanted.quant}".lower()
    for model in stored:
        if whole.rstrip(":") == model.name.lower():
            return model
    for store in dict.fromkeys(model.store for model in named):
        by_file = {str(model.path): model for model in named if model.store == store}
        files = choose([str(p) for m in by_file.values() for p in m.paths], wanted.quant)
        if files:
            return by_file[files[0]]
    return None


def _by_part(name: str, stored: Sequence[Stored]) -> Stored:
    """Return the one model that is here and has `name` in its name."""
    found = [m for m in stored if name.lower() in f"{m.name} {m.path.name}".lower()]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(model.name for model in found[:4])
        raise ModelError(f"{name!r} is a part of several models' names: {names}: name one")
    near = difflib.get_close_matches(name.lower(), known_models(), n=3, cutoff=0.5)
    hint = f" (as {', '.join(near)})" if near else ""
    prompt = " (a prompt for it is given with -p)" if " " in name else ""
    raise ModelError(
        f"no model is called {name!r}: name a .gguf file, a repository as user/name, one of "
        f"hobbit ls --known{hint}, or demo, the built-in model{prompt}"
    )


def _elsewhere(name: str, wanted: Name, known: Known | None) -> Located:
    """Ask the hub, and where there is no way to it, models.toml."""
    try:
        remote = repository(wanted.base)
    except Unreachable as exc:
        if known is None or known.shape is None:
            raise
        quant = _known_quant(name, wanted.quant, known)
        return Located(name, quant, known=known, why=str(exc))
    listed = [file.name for file in remote.files]
    default = known.quants[0] if known else "Q4_K_M"
    files = choose(listed, wanted.quant, default)
    if not files:
        raise ModelError(_no_such_quant(wanted, listed))
    return Located(name, quant_of(files[0]), remote=remote, files=tuple(files), known=known)


def _known_quant(name: str, wanted: str, known: Known) -> str:
    quant = wanted.upper() or known.quants[0]
    if quant not in MIXTURES:
        raise ModelError(f"{name}: of {quant} nothing is known without the network")
    return quant


def _no_such_quant(wanted: Name, listed: list[str]) -> str:
    quants = dict.fromkeys(quant_of(model[0]) or model[0] for model in model_files(listed))
    if not quants:
        return f"{wanted.base}: the repository has no GGUF file"
    return f"{wanted.base}: has no {wanted.quant}; it has {', '.join(quants)}"
