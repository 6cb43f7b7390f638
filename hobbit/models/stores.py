"""The models that are on this machine already: hobbit's own, the hub's cache, other tools' stores.

Everything here only reads. That a file is a model is known when its header has been read, not here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import demo
from .names import model_files, quant_of

HUB, LLAMA_CPP, LM_STUDIO, OLLAMA, OWN = "hf", "llama.cpp", "lmstudio", "ollama", "hobbit"
_OLLAMA_MODEL = "application/vnd.ollama.image.model"


@dataclass(frozen=True)
class Stored:
    """A model on this machine: all of its parts, the first one first, and whose they are."""

    name: str
    paths: tuple[Path, ...]
    store: str

    @property
    def path(self) -> Path:
        return self.paths[0]

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    @property
    def modified(self) -> float:
        return max(path.stat().st_mtime for path in self.paths)

    @property
    def base(self) -> str:
        """The name without the quantisation."""
        return self.name.rpartition(":")[0] or self.name


def stored_models() -> list[Stored]:
    """Return all of them, in the order in which a name is looked for."""
    found = [*_own(), *_hub(), *_llama_cpp(), *_lm_studio(), *_ollama()]
    return [model for model in found if all(_is_readable(path) for path in model.paths)]


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def models_in(folder: Path) -> list[tuple[Path, ...]]:
    """Return the models in a folder, each with its parts in order."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return []
    return [tuple(folder / file for file in model) for model in model_files(names)]


def _own() -> Iterator[Stored]:
    if demo.path().is_file():
        yield Stored("demo", (demo.path(),), OWN)


def _hub() -> Iterator[Stored]:
    """Yield what the hub's cache has; of a model that several commits have, the newest one."""
    for repo in _folders(hub_cache()):
        kind, _, name = repo.name.partition("--")
        if kind != "models":
            continue
        name = name.replace("--", "/", 1)
        taken = set()
        for commit in _commits(repo):
            files = [str(f.relative_to(commit)) for f in commit.rglob("*.gguf") if f.is_file()]
            for model in model_files(files):
                if model[0] not in taken:
                    taken.add(model[0])
                    paths = tuple(commit / file for file in model)
                    yield Stored(_with_quant(name, model[0]), paths, HUB)


def _commits(repo: Path) -> list[Path]:
    """Return the folders of a cached repository's commits, that of the main branch first."""
    try:
        main = (repo / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        main = ""
    commits = sorted(_folders(repo / "snapshots"), key=lambda c: -c.stat().st_mtime)
    return sorted(commits, key=lambda commit: commit.name != main)


def _llama_cpp() -> Iterator[Stored]:
    named = os.environ.get("LLAMA_CACHE")
    usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
    folder = Path(named) if named else _home() / usual / "llama.cpp"
    for paths in models_in(folder):
        yield Stored(paths[0].stem, paths, LLAMA_CPP)


def _lm_studio() -> Iterator[Stored]:
    for root in (_home() / ".lmstudio" / "models", _home() / ".cache" / "lm-studio" / "models"):
        for user in _folders(root):
            for repo in _folders(user):
                for paths in models_in(repo):
                    name = _with_quant(f"{user.name}/{repo.name}", paths[0].name)
                    yield Stored(name, paths, LM_STUDIO)


def _ollama() -> Iterator[Stored]:
    named = os.environ.get("OLLAMA_MODELS")
    roots = [_home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]
    for root in [Path(named)] if named else roots:
        manifests = root / "manifests"
        for manifest in sorted(_files(manifests)):
            blob = _ollama_blob(manifest)
            if blob is not None:
                *path, name, tag = manifest.relative_to(manifests).parts
                owner = [] if path[1:] == ["library"] else path[1:]
                yield Stored("/".join([*owner, f"{name}:{tag}"]), (root / "blobs" / blob,), OLLAMA)


def _ollama_blob(manifest: Path) -> str | None:
    """Return the file name of the model that a manifest lists."""
    try:
        layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"]
        found = (layer["digest"] for layer in layers if layer["mediaType"] == _OLLAMA_MODEL)
        digest = next(found, None)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A digest is a file's name here, and a manifest could name any file.
    if not isinstance(digest, str) or not digest.startswith("sha256:") or "/" in digest:
        return None
    return digest.replace(":", "-", 1)


def _is_readable(path: Path) -> bool:
    return os.path.isfile(path) and os.access(path, os.R_OK)


def _with_quant(name: str, file: str) -> str:
    quant = quant_of(file.rsplit("/", 1)[-1])
    return f"{name}:{quant}" if quant else name


def _home() -> Path:
    return Path(os.path.expanduser("~"))


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names)
