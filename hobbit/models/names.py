"""What the name of a model can mean, before anything is looked up."""

from __future__ import annotations

import re
from dataclasses import dataclass

_HOSTS = re.compile(r"^(https?://)?(www\.)?(hf|huggingface)\.\w+/", re.IGNORECASE)
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
# What a file's name says of its quantisation.
_QUANT = re.compile(
    r"(?:^|[-._/])(UD-)?((?:I?Q\d\w*?|T?Q\d_\w+|MXFP4\w*?|NVFP4|BF16|F16|F32|FP16))"
    r"(?=$|[-./])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Name:
    """A name and the quantisation, or file, that is wanted of it; empty where none was named."""

    base: str
    quant: str = ""

    @property
    def is_repository(self) -> bool:
        return _REPOSITORY.fullmatch(self.base) is not None


def parse_name(text: str) -> Name:
    """Take `user/repo:Q4_K_M`, `user/repo@q4_k_m`, `hf.co/user/repo:...` and `name:...` apart."""
    plain = _HOSTS.sub("", text)
    if plain != text:
        # What a browser shows: user/repo/blob/main/FILE, or with /tree/main behind it.
        plain = re.sub(r"/(?:blob|resolve)/[^/]+/(.+)$", r":\1", plain)
        plain = re.sub(r"/tree/.*$", "", plain).rstrip("/")
    base, mark, quant = plain.partition(":")
    if not mark:
        base, mark, quant = plain.partition("@")
    return Name(base, quant)


def quant_of(file: str) -> str:
    """Return the quantisation that a file's name tells, in capitals; empty if it tells none."""
    stem = _PART.sub("", file.removesuffix(".gguf").removesuffix(".GGUF"))
    found = _QUANT.findall(stem)
    if not found:
        return ""
    prefix, quant = found[-1]
    return f"{prefix}{quant}".upper()


def model_files(files: list[str]) -> list[list[str]]:
    """Group a repository's file names into models, each with its parts in order, sorted by name.

    Projectors, importance matrices and hobbit's own low copies are no models; nor is a model with
    parts that are not all there.
    """
    names = set(files)
    models = []
    for file in sorted(names):
        stem, is_gguf, _ = file.lower().rpartition(".gguf")
        last = stem.rsplit("/", 1)[-1]
        if not is_gguf or "mmproj" in last or "imatrix" in last or ".hobbit-low" in last:
            continue
        part = _PART.search(stem)
        if part is None:
            models.append([file])
        elif int(part[1]) == 1:
            end = len(file) - len(".gguf")
            first, count = file[: end - len(part[0])], int(part[2])
            parts = [f"{first}-{i + 1:05d}-of-{part[2]}{file[end:]}" for i in range(count)]
            if names.issuperset(parts):
                models.append(parts)
    return models


def choose(files: list[str], quant: str = "", default: str = "Q4_K_M") -> list[str]:
    """Pick one model among a repository's files: all of its parts, in order.

    `quant` is a quantisation, in any case, or a file's name. Without one it is `default`, or else
    the first.
    """
    models = model_files(files)
    if quant.lower().endswith(".gguf"):
        return next((model for model in models if quant in (model[0], _last(model[0]))), [])
    wanted = (quant or default).upper()
    fitting = [model for model in models if quant_of(_last(model[0])) == wanted]
    if not fitting:
        fitting = [m for m in models if quant_of(m[0]).removeprefix("UD-") == wanted]
    if not fitting and not quant:
        fitting = models
    return fitting[0] if fitting else []


def _last(file: str) -> str:
    return file.rsplit("/", 1)[-1]
