"""Fetch a file of the hub into the hub's cache, from where an interrupted fetch stopped.

huggingface_hub (2.4) throws away what came of a download that ends early, and checks no checksum.
So the data is fetched here, into the place where the cache keeps it; the cache's links and
references are huggingface_hub's work.
"""

from __future__ import annotations

import errno
import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..errors import HobbitError, NoSpace
from ..sizes import format_size
from .hub import PATIENCE_S, HubError, RemoteFile, Repository, asking, url_of
from .stores import hub_cache

Fetched = Callable[[int], None]

# One request's share: the hub's servers refuse larger answers, and the addresses they give expire.
_PIECE = 8 << 30
_CHUNK = 1 << 20
# Seconds to wait before each new try while no byte comes; any byte makes it begin anew.
_PAUSES_S = (0.0, 1.0, 2.0, 4.0, 8.0)


def fetch(repo: Repository, file: RemoteFile, fetched: Fetched) -> Path:
    """Return a file's path in the hub's cache, fetching what is not there.

    `fetched` is called with the bytes that are there, of `file.size`. NoSpace and Ctrl-C leave them
    for the next call; HubError if the data is not what the hub says it is.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import WeakFileLock

    lock = hub_cache() / ".locks" / folder_name(repo.name) / f"{file.sha256 or file.name}.lock"
    blob = blob_path(repo, file)
    try:
        if blob is not None and not blob.exists():
            blob.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                if not blob.exists():
                    _fetch_blob(repo, file, partial_path(blob), fetched)
                    partial_path(blob).rename(blob)
        with asking(f"{repo.name}: {file.name}"):
            return Path(hf_hub_download(repo.name, file.name))
    except OSError as exc:
        raise _cannot_write(exc, file) from exc


def folder_name(repo: str) -> str:
    """Return what the hub's cache calls the folder of a repository."""
    return f"models--{repo.replace('/', '--')}"


def blob_path(repo: Repository, file: RemoteFile) -> Path | None:
    """Return where the cache keeps the data; None for a file that git keeps, which is small."""
    if re.fullmatch(r"[0-9a-f]{64}", file.sha256) is None:
        return None
    return hub_cache() / folder_name(repo.name) / "blobs" / file.sha256


def partial_path(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def missing_bytes(repo: Repository, file: RemoteFile) -> int:
    """Return how much of a file is still to be fetched."""
    blob = blob_path(repo, file)
    if blob is None:
        return file.size
    if blob.exists():
        return 0
    part = partial_path(blob)
    return max(file.size - (part.stat().st_size if part.exists() else 0), 0)


def _fetch_blob(repo: Repository, file: RemoteFile, partial: Path, fetched: Fetched) -> None:
    digest = hashlib.sha256()
    with partial.open("a+b") as out:
        if out.tell() > file.size:
            out.truncate(0)
        out.seek(0)
        while block := out.read(_CHUNK):  # of an earlier call
            digest.update(block)
        tries = 0
        while out.tell() < file.size:
            before = out.tell()
            try:
                with asking(f"{repo.name}: {file.name}"):
                    _append(url_of(repo, file.name), out, file.size, digest.update, fetched)
            except HubError as exc:
                tries = 1 if out.tell() > before else tries + 1
                if tries > len(_PAUSES_S) or not _passes(exc):
                    raise
                time.sleep(_PAUSES_S[tries - 1])
    if digest.hexdigest() != file.sha256:
        partial.unlink()
        raise HubError(
            f"{repo.name}: {file.name}: what came is not what the hub says it is (its SHA-256 is "
            "another), and was thrown away: try again"
        )


def _append(
    url: str,
    out: BinaryIO,
    size: int,
    update: Callable[[bytes], None],
    fetched: Fetched,
) -> None:
    """Fetch one more piece; what came before an error stays."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    at = out.tell()
    asked = {"Range": f"bytes={at}-{min(at + _PIECE, size) - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers() | asked
    with get_session().stream("GET", url, headers=headers, timeout=PATIENCE_S) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206 and at:
            raise HubError(f"{url}: the server cannot go on in the middle of a file")
        for block in answer.iter_bytes():
            out.write(block)
            update(block)
            fetched(out.tell())
            if out.tell() >= size:
                break


def _passes(exc: HubError) -> bool:
    """Say whether the same request may succeed a moment later."""
    answer = getattr(exc.__cause__, "response", None)
    return answer is None or answer.status_code >= 500 or answer.status_code in (408, 429)


def _cannot_write(exc: OSError, file: RemoteFile) -> HobbitError:
    where = f"{hub_cache()}, the hub's cache"
    if exc.errno == errno.ENOSPC:
        return NoSpace(
            f"{file.name}: the disk of {where} is full; what came is kept: free some space, and "
            f"the same command goes on where this stopped ({format_size(file.size)} in all)"
        )
    return HobbitError(
        f"cannot write to {where}: {exc.strerror or exc}; HF_HUB_CACHE can name another folder"
    )
