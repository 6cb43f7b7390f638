"""The hub, through the huggingface_hub package: what a repository has, and parts of its files.

huggingface_hub is imported where it is used: it takes a quarter of a second.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError
from ..gguf_file import GGUF, PartHeader, join_parts, parse_part

# Seconds to wait for an answer that is only asked for to know more.
PATIENCE_S = 10.0


class HubError(ModelError):
    """The hub cannot be asked, or does not give what was asked for."""


class Unreachable(HubError):
    """There is no way to the hub now, or none is wanted."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository; `sha256` is empty for small ones, which git itself keeps."""

    name: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Repository:
    """What a repository has at a commit."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]

    def file(self, name: str) -> RemoteFile:
        return next(file for file in self.files if file.name == name)


def is_offline() -> bool:
    """Say whether HF_HUB_OFFLINE, which --offline sets, forbids the network."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Turn the hub's errors into ours, with what a person can do; `what` was to be had."""
    from huggingface_hub import errors

    try:
        yield
    except ModelError:
        raise
    except errors.OfflineModeIsEnabled as exc:
        raise offline(what) from exc
    except errors.GatedRepoError as exc:
        raise HubError(
            f"{what}: its makers want to know who uses it: accept their terms on its page, and "
            "log in with `hf auth login`, or set HF_TOKEN"
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise HubError(
            f"{what}: there is no such repository, or it is private: check the name; for a private "
            "one log in with `hf auth login`, or set HF_TOKEN"
        ) from exc
    except errors.LocalEntryNotFoundError as exc:
        raise Unreachable(f"{what}: the hub cannot be reached") from exc
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise HubError(f"{what}: is not in the repository") from exc
    except errors.HfHubHTTPError as exc:
        status = getattr(exc.response, "status_code", "no")
        raise HubError(f"{what}: the hub answered with status {status}: try again later") from exc
    except (errors.HTTPError, ConnectionError, TimeoutError) as exc:
        raise Unreachable(
            f"{what}: the hub cannot be reached ({exc or type(exc).__name__})"
        ) from exc
    except ValueError as exc:  # a name that cannot be one
        raise HubError(f"{what}: {exc}") from exc


def repository(name: str) -> Repository:
    """List a repository's files with their sizes."""
    if is_offline():
        raise offline(name)
    from huggingface_hub import HfApi

    with asking(name):
        info = HfApi().model_info(name, files_metadata=True, timeout=PATIENCE_S)
    files = tuple(
        RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else "")
        for file in info.siblings or ()
    )
    return Repository(name, info.sha or "main", files)


def url_of(repo: Repository, file: str) -> str:
    from huggingface_hub import hf_hub_url

    return str(hf_hub_url(repo.name, file, revision=repo.commit))


def remote_header(repo: Repository, files: list[str]) -> GGUF:
    """Read the header of a model whose parts are there, and of its data nothing."""

    def read_part(path: Path, index: int) -> PartHeader:
        name = next((file for file in files if file.rsplit("/", 1)[-1] == path.name), None)
        if name is None:
            raise HubError(f"{repo.name}: part {index + 1} of this model is missing")
        url, size = url_of(repo, name), repo.file(name).size
        return parse_part(lambda length, at: read_range(url, at, length), path, size, index)

    if is_offline():
        raise offline(repo.name)
    with asking(repo.name):
        return join_parts(Path(files[0].rsplit("/", 1)[-1]), read_part)


def read_range(url: str, offset: int, length: int) -> bytes:
    """Return bytes of a file of the hub."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    asked = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
    headers = build_hf_headers() | asked
    # A server that does not know ranges would send the whole file: not a byte of it is read.
    with get_session().stream("GET", url, headers=headers, timeout=PATIENCE_S) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206:
            raise HubError(f"{url}: the server sends no parts of files")
        return bytes(answer.read())


def offline(what: str) -> Unreachable:
    """Return the error for what is not here, and may not be fetched."""
    return Unreachable(
        f"{what}: is not on this machine, and HF_HUB_OFFLINE or --offline forbids to fetch it"
    )
