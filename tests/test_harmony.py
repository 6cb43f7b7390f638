"""The channels of gpt-oss: what is a thought, what an answer, what a call."""

from __future__ import annotations

import json

import pytest

from hobbit.harmony import CALL, FINAL, Harmony, Tagged, is_format_of

THOUGHT = "<|channel|>analysis<|message|>The user <greets> me.<|end|><|start|>assistant"
ANSWER = THOUGHT + "<|channel|>final<|message|>Hello <|there.<|return|>"
CALLED = (
    THOUGHT + "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": "Bonn"}<|call|>'
)


def split(text: str, size: int, within: bool = False) -> dict[str, str]:
    """Return the text of each kind of part when an answer comes in pieces of `size`."""
    channels = Harmony(within)
    parts = [p for i in range(0, len(text), size) for p in channels.feed(text[i : i + size])]
    found: dict[str, str] = {}
    for part in [*parts, *channels.finish()]:
        found[part.kind] = found.get(part.kind, "") + part.text
    return found


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_thoughts_and_words_wherever_the_pieces_end(size: int) -> None:
    assert split(ANSWER, size) == {
        "reasoning": "The user <greets> me.",
        "content": "Hello <|there.",
    }


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    "called",
    [
        CALLED,
        CALLED.removesuffix("<|call|>"),  # which ends an answer, and is then not told
        " to=functions.weather<|channel|>commentary json<|message|>" + '{"city": "Bonn"}',
        CALL.format(name="weather") + '{"city": "Bonn"}',
    ],
)
def test_calls(called: str, size: int) -> None:
    found = split(called, size)
    assert json.loads(found["tool"]) == {"name": "weather", "arguments": '{"city": "Bonn"}'}
    assert "content" not in found


def test_thoughts_come_before_they_are_complete() -> None:
    channels = Harmony()
    channels.feed("<|channel|>analysis<|message|>")
    assert [part.text for part in channels.feed("One two<|e")] == ["One two"]


def test_a_preamble_is_for_the_person() -> None:
    text = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
    assert split(text + CALLED, 3)["content"] == "I look it up."


def test_an_answer_may_end_anywhere_and_need_not_have_tags() -> None:
    for end in range(len(ANSWER)):
        assert set(split(ANSWER[:end], 4)) <= {"reasoning", "content"}
        assert "assistant" not in split(ANSWER[:end], 4).get("content", "")
    assert split("Hello", 2) == {"content": "Hello"}
    assert split('{"a": 1}<|end|>', 2, within=True) == {"content": '{"a": 1}'}


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_with_the_tags_of_other_models(size: int) -> None:
    def tagged(text: str) -> str:
        told = Tagged()
        pieces = [told.feed(text[i : i + size]) for i in range(0, len(text), size)]
        return "".join([*pieces, told.finish()])

    assert tagged(ANSWER) == "<think>The user <greets> me.</think>\n\nHello <|there."
    assert tagged(ANSWER.removeprefix(THOUGHT)) == "Hello <|there."
    assert tagged(THOUGHT) == "<think>The user <greets> me."
    call = json.dumps({"name": "weather", "arguments": '{"city": "Bonn"}'})
    assert tagged(CALLED).endswith(f"</think>\n\n<tool_call>{call}</tool_call>")


def test_the_format_is_known_by_the_template() -> None:
    assert is_format_of("{{ '<|channel|>final<|message|>' }}") and is_format_of(FINAL)
    assert not is_format_of("<|im_start|><think>")
