"""Tell one model from another without reading all of it."""

from __future__ import annotations

import hashlib
import os

from .errors import ModelError
from .gguf_file import GGUF, Part

SAMPLES = 64
SAMPLE_BYTES = 4096


def fingerprint(gguf: GGUF) -> str:
    """Return a SHA-256 in hex over the header and the size of each part, and samples of the data.

    The samples are at fixed places, spread evenly: a second even for a model of 400 GB. Names,
    folders and times of the files do not count.
    """
    digest = hashlib.sha256()
    total = source_size(gguf)
    start = 0
    for part in gguf.parts:
        digest.update(part.size.to_bytes(8, "little"))
        # A sample belongs to the part that its place is in, where all parts are laid end to end.
        places = [i * total // SAMPLES - start for i in range(SAMPLES)]
        _update(digest, part, [place for place in places if 0 <= place < part.size])
        start += part.size
    return digest.hexdigest()


def source_size(gguf: GGUF) -> int:
    """Return the bytes of all parts."""
    return sum(part.size for part in gguf.parts)


def _update(digest: hashlib._Hash, part: Part, places: list[int]) -> None:
    try:
        with open(part.path, "rb") as file:
            left = part.data_offset
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
            for place in places:
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, place))
    except OSError as exc:
        raise ModelError(f"{part.path}: cannot read it: {exc.strerror}") from exc
