"""The line that a person types, on a terminal."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application.current import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import ANSI, AnyFormattedText
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from ..folders import state_folder

_QUOTES = '"""'
_PLACEHOLDER = "Send a message (/? for help)"
_STYLE = Style.from_dict({"bottom-toolbar": "noreverse", "placeholder": ""})


def is_open(text: str) -> bool:
    '''Whether the text began with """ (perhaps after /set system) and has not ended so.'''
    begins = text.lstrip().startswith((_QUOTES, f"/set system {_QUOTES}"))
    return begins and text.count(_QUOTES) < 2


def unquoted(text: str) -> str:
    '''Return what stands between """ and """, or else the text without space around it.'''
    text = text.strip()
    if text.startswith(_QUOTES):
        return text.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
    return text


class History(FileHistory):
    """What was typed, kept in a file where that can be written; `on` False keeps nothing new."""

    def __init__(self, path: Path, on: bool) -> None:
        self.on = on
        super().__init__(str(path))

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        if not self.on:
            return
        path = Path(os.fsdecode(self.filename))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # What is said to a model is nobody else's business.
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
            super().store_string(string)
        except OSError:
            return


def history() -> History | InMemoryHistory:
    """Return the history; HOBBIT_NOHISTORY, unless 0 or empty, leaves the file alone."""
    if os.environ.get("HOBBIT_NOHISTORY", "") in ("", "0"):
        with suppress(RuntimeError):  # no home
            return History(state_folder() / "history", True)
    return InMemoryHistory()


class _Words(Completer):
    """Completes commands, and the words that may follow them."""

    def __init__(self, words: Mapping[str, Iterable[str]]) -> None:
        self._words = words

    def get_completions(self, document: Document, _: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        if not before.startswith("/") or "\n" in before:
            return
        command, space, rest = before.partition(" ")
        found, typed = (self._words.get(command, ()), rest) if space else (self._words, before)
        for word in found:
            if word.startswith(typed):
                yield Completion(word, -len(typed))


class Input:
    """Asks for a message. Ctrl-C empties the line; on an empty one it is a KeyboardInterrupt."""

    def __init__(
        self,
        words: Mapping[str, Iterable[str]],
        toolbar: Callable[[int], str] | None,
        color: bool,
    ) -> None:
        self.history = history()

        def below() -> AnyFormattedText:
            text = toolbar(get_app().output.get_size().columns) if toolbar else ""
            return ANSI(f"\x1b[2m{text}\x1b[0m") if color else text

        def hint() -> AnyFormattedText:
            if get_app().is_done:  # it shall not stay on the screen
                return ""
            return ANSI(f"\x1b[2m{_PLACEHOLDER}\x1b[0m") if color else _PLACEHOLDER

        self._session: PromptSession[str] = PromptSession(
            history=self.history,
            multiline=True,
            key_bindings=_keys(),
            completer=_Words(words),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            prompt_continuation=lambda width, line, wrapped: "" if wrapped else "... ",
            bottom_toolbar=below if toolbar else None,
            placeholder=hint,
            reserve_space_for_menu=0,
            enable_open_in_editor=True,
            style=_STYLE,
        )

    def ask(self, text: str = "") -> str:
        """Return what is typed, beginning with `text`; EOFError when it is Ctrl-D."""
        return self._session.prompt(">>> ", default=text)


@contextmanager
def no_echo() -> Iterator[None]:
    """While it lasts, what is typed does not get into the answer; it waits for the next prompt."""
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (termios.error, OSError, ValueError):
        yield
        return
    silent = [*before]
    # Else Ctrl-C would also throw away what was written and is not on the screen yet.
    silent[3] = silent[3] & ~termios.ECHO | termios.NOFLSH
    try:
        termios.tcsetattr(number, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        if is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
