"""Rows that stay where they are on a terminal, and change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..render import Screen


@contextmanager
def in_place(rows: Callable[[], list[str]], screen: Screen) -> Iterator[Callable[[], None]]:
    """Yield what draws the rows anew; the last stay."""
    console = Console(file=screen.stream, no_color=not screen.color, highlight=False)
    with Live(console=console, auto_refresh=False, transient=False) as live:

        def show() -> None:
            shown = Text("\n".join(rows()), no_wrap=True, overflow="crop")
            live.update(shown, refresh=True)

        yield show
