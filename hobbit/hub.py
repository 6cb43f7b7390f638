"""Find and fetch a GGUF model of a Hugging Face repository, through the huggingface_hub package."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import ModelError

DEFAULT_QUANTISATION = "Q4_K_M"


def fetch(repo: str, file: str | None = None) -> Path:
    """Return the local path of a model's (first) file, downloading what is not in the hub's cache.

    `repo` is `user/name` or `user/name:quantisation`; `file` names one file of it exactly.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise ModelError(
            "-hf needs the huggingface_hub package: pip install huggingface_hub, "
            "or download the .gguf file and name its path"
        ) from None
    name, _, quantisation = repo.partition(":")
    if name.count("/") != 1:
        raise ModelError(f"-hf {repo}: must be user/name or user/name:quantisation")
    try:
        names = [file] if file else choose(huggingface_hub.list_repo_files(name), quantisation)
        if not names:
            raise ModelError(f"{repo} has no GGUF file of that quantisation; name one with -hff")
        paths = [huggingface_hub.hf_hub_download(name, part) for part in names]
    except (OSError, ValueError) as exc:  # the hub's errors are of these kinds
        if isinstance(exc, ModelError):
            raise
        raise ModelError(f"cannot fetch {repo}: {exc}") from exc
    return Path(paths[0])


def choose(files: list[str], quantisation: str = "") -> list[str]:
    """Pick one model among a repository's files: all of its parts, in order."""
    wanted = (quantisation or DEFAULT_QUANTISATION).lower()
    models = sorted(f for f in files if f.lower().endswith(".gguf") and "mmproj" not in f.lower())
    fitting = [f for f in models if re.search(rf"(^|[-_./]){re.escape(wanted)}[-.]", f.lower())]
    if not fitting and not quantisation:
        fitting = models
    if not fitting:
        return []
    part = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", fitting[0])
    if part is None:
        return fitting[:1]
    return [f"{part[1]}-{i + 1:05d}-of-{part[2]}.gguf" for i in range(int(part[2]))]
