"""Text on its way to the terminal: thoughts, lines, live numbers."""

from __future__ import annotations

import pyte
import pytest

from hobbit.chat.flow import Lines, Thoughts, WithoutThoughts
from hobbit.chat.screen import is_open, unquoted
from hobbit.chat.view import cut

STORY = "Once upon a time there was a hobbit who lived in a hole under a hill. " * 4


def pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def on_screen(text: str, columns: int, size: int = 3) -> list[str]:
    """Write a text in pieces through Lines, and return what a terminal shows of it."""
    screen = pyte.Screen(columns, 60)
    screen.set_mode(pyte.modes.LNM)
    stream = pyte.Stream(screen)
    lines = Lines(stream.feed, lambda: columns - 1)
    for piece in pieces(text, size):
        lines.feed(piece)
    lines.end()
    shown = [line.rstrip() for line in screen.display]
    while shown and not shown[-1]:
        shown.pop()
    return shown


@pytest.mark.parametrize("columns", [12, 40, 80])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_words_stay_whole(columns: int, size: int) -> None:
    shown = on_screen(STORY, columns, size)
    assert " ".join(shown).split() == STORY.split()
    assert max(map(len, shown)) < columns
    assert len(shown) > 1


def test_line_ends_and_indents_stay() -> None:
    text = "a list:\n  - one\n\n  - two\n\tand a tab"
    assert on_screen(text, 40) == ["a list:", "  - one", "", "  - two", "        and a tab"]


def test_a_word_longer_than_the_line_is_cut() -> None:
    assert on_screen("to " + "x" * 25, 11) == ["to", "x" * 10, "x" * 10, "x" * 5]


def test_wide_characters_break_anywhere() -> None:
    screen = on_screen("山" * 10, 12)
    assert "".join(screen).replace(" ", "") == "山" * 10
    assert len(screen) == 2


def test_escape_sequences_of_a_model_do_nothing() -> None:
    out: list[str] = []
    lines = Lines(out.append, lambda: None)
    lines.feed("a\x1b[2Jb\x07\x9bc\r")
    lines.end()
    assert "".join(out) == "a[2Jbc\n"


def test_a_line_that_is_ended_is_not_ended_again() -> None:
    out: list[str] = []
    lines = Lines(out.append, lambda: 20)
    lines.feed("one\n")
    lines.end()
    assert "".join(out) == "one\n"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_thoughts(size: int) -> None:
    text = "a < b <thin <think>hm < </thi</think>\n\nyes <think>2</think>."
    thoughts = Thoughts()
    parts = [part for piece in pieces(text, size) for part in thoughts.feed(piece)]
    parts += thoughts.end()
    assert "".join(part for _, part in parts) == text
    thought = "".join(part for is_thought, part in parts if is_thought)
    assert thought == "<think>hm < </thi</think><think>2</think>"


def test_thoughts_that_the_template_opened() -> None:
    thoughts = Thoughts(inside=True)
    assert [*thoughts.feed("hm</think>yes")] == [(True, "hm</think>"), (False, "yes")]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_hidden_thoughts(size: int) -> None:
    out: list[str] = []
    shown = WithoutThoughts(out.append, inside=True)
    for piece in pieces("hm</think>\n\nyes,\n <no", size):
        shown(piece)
    shown.end()
    assert "".join(out) == "yes,\n <no"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""', True),
        ('"""one\ntwo', True),
        ('"""one\ntwo"""', False),
        ('/set system """one', True),
        ('/set system """one"""', False),
        ('say """x', False),
        ("", False),
    ],
)
def test_messages_of_several_lines(text: str, expected: bool) -> None:
    assert is_open(text) is expected


def test_unquoted() -> None:
    assert unquoted('"""\none\n  two\n"""') == "one\n  two"
    assert unquoted("  one  ") == "one"


def test_numbers_are_cut_to_the_width() -> None:
    line = "4.8 tok/s | hit 71 % | mem 1/2 GiB"
    assert cut(line, 80) == line
    assert cut(line, 25) == "4.8 tok/s | hit 71 %"
    assert cut(line, 5) == ""
