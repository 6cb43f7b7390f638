"""What was said, and the files that it is kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..errors import HobbitError, UsageError
from ..folders import state_folder

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """What one side said; `role` is one of ROLES."""

    role: str
    content: str


def place(name: str) -> Path:
    """Return the file that /save and /load mean: a path, or a bare word, kept in hobbit's folder.

    Raises UsageError where it would be neither.
    """
    path = Path(name).expanduser()
    if len(path.parts) == 1 and not path.suffix:
        try:
            return state_folder() / "chats" / f"{name}.jsonl"
        except RuntimeError as exc:
            raise UsageError(f"{name}: there is no home folder: name a .jsonl file") from exc
    if path.suffix not in (".md", ".jsonl"):
        raise UsageError(f"{name}: the name must end in .md or .jsonl, or be a word")
    return path


def save(path: Path, messages: Sequence[Message], mode: int = 0o666) -> None:
    """Write the messages, whole or not at all: .jsonl to load again, .md to read.

    `mode` is what the file's permissions are where the umask allows them.
    """
    text = _markdown(messages) if path.suffix == ".md" else _lines(messages)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            create = partial(os.open, mode=mode)
            with open(part, "w", encoding="utf-8", errors="replace", opener=create) as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave the name without the text
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as exc:
        raise HobbitError(f"cannot write {path}: {exc.strerror or exc}") from exc


def load(path: Path) -> list[Message]:
    """Read what `save` wrote as .jsonl; raises UsageError for anything else."""
    if path.suffix == ".md":
        raise UsageError(f"{path}: .md is for reading; /load takes what /save wrote as .jsonl")
    try:
        # Not splitlines: JSON leaves other ends of lines, as U+2028, within a message.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as exc:
        raise UsageError(f"{path}: is not UTF-8 text") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    messages = [_message(path, number, line) for number, line in enumerate(lines, 1) if line]
    if not messages:
        raise UsageError(f"{path}: has no messages")
    if any(message.role == "system" for message in messages[1:]):
        raise UsageError(f"{path}: only the first message may be the system's")
    return messages


def _message(path: Path, number: int, line: str) -> Message:
    try:
        found = json.loads(line)
        role, content = found["role"], found["content"]
    except (ValueError, KeyError, TypeError, RecursionError):
        role, content = None, None
    if role not in ROLES or not isinstance(content, str):
        raise UsageError(f'{path}:{number}: is no message: {{"role": "user", "content": "..."}}')
    return Message(role, content)


def _lines(messages: Sequence[Message]) -> str:
    return "".join(json.dumps(asdict(m), ensure_ascii=False) + "\n" for m in messages)


def _markdown(messages: Sequence[Message]) -> str:
    return "\n".join(f"## {m.role.capitalize()}\n\n{m.content.strip()}\n" for m in messages)
