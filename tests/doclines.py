"""The command lines and the Python blocks of a document, as a shell and an interpreter see them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

_OPERATORS = "|&;<>()"


@dataclass(frozen=True)
class Command:
    """One simple command of a line: its words, the variables set before it, where stdout goes."""

    line: str
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]
    stdout: str = ""

    @property
    def arguments(self) -> list[str]:
        """What follows `hobbit`."""
        return [*self.words[1:]]

    @property
    def is_hobbit(self) -> bool:
        return self.words[0] in ("hobbit", "scripts/hobbit")


def blocks(text: str, *languages: str) -> list[str]:
    """Return what stands in the fences of these languages."""
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```"
    return re.findall(pattern, text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[Command]:
    """Return the simple commands of a document's shell fences."""
    found = []
    for block in blocks(text, "sh", "bash", "console", "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            found += _commands_of(line.strip().removeprefix("$ "))
    return found


def _commands_of(line: str) -> Iterator[Command]:
    without_stderr = re.sub(r"\s2>\s*(&1|\S+)", "", line)
    lexer = shlex.shlex(without_stderr, posix=True, punctuation_chars=_OPERATORS)
    lexer.whitespace_split = True
    words: list[str] = []
    stdout = redirection = ""
    for word in [*lexer, ";"]:
        if set(word) <= set("<>"):
            redirection = word  # the next word is a file
        elif set(word) <= set(_OPERATORS):
            yield from _command(line, words, stdout)
            words, stdout = [], ""
        elif redirection:
            stdout, redirection = word if redirection == ">" else stdout, ""
        else:
            words.append(word)


def _command(line: str, words: list[str], stdout: str) -> Iterator[Command]:
    n = 0
    while n < len(words) and re.match(r"[A-Z_]+=", words[n]):
        n += 1
    if words[n:]:
        variables = tuple(tuple(word.split("=", 1)) for word in words[:n])
        yield Command(line, tuple(words[n:]), variables, stdout)  # type: ignore[arg-type]
