"""Parts of the server without a server: turns, text, channels, events."""

from __future__ import annotations

import json
import threading

import pytest

from hobbit.serve import sse
from hobbit.serve.channels import Channels, Part, parsed_call
from hobbit.serve.text import TextStream
from hobbit.serve.turns import QueueFull, Turns


def taken(turns: Turns[str]) -> list[str]:
    found = []
    while len(turns):
        item = turns.take()
        assert item is not None
        found.append(item)
        turns.done()
    return found


def test_clients_take_turns_and_each_is_served_in_order() -> None:
    turns: Turns[str] = Turns(10)
    for item in ("a1", "a2", "a3", "b1", "c1", "b2"):
        turns.put(item[0], item)
    order = ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert [turns.position(item) for item in order] == [1, 2, 3, 4, 5, 6]
    assert taken(turns) == order


def test_a_client_that_comes_later_is_not_behind_all_of_a_busy_one() -> None:
    turns: Turns[str] = Turns(10)
    for item in ("a1", "a2", "a3"):
        turns.put("a", item)
    assert turns.take() == "a1"
    turns.put("b", "b1")
    assert taken(turns) == ["a2", "b1", "a3"]


def test_a_full_queue_refuses() -> None:
    turns: Turns[str] = Turns(2)
    turns.put("a", "runs")
    assert turns.take() == "runs"
    turns.put("a", "1")
    turns.put("b", "2")
    with pytest.raises(QueueFull):
        turns.put("c", "3")
    turns.done()
    turns.put("c", "3")
    assert len(turns) == 3


def test_without_a_queue_one_is_served_at_a_time() -> None:
    turns: Turns[str] = Turns(0)
    turns.put("a", "1")
    with pytest.raises(QueueFull):
        turns.put("a", "2")


def test_what_is_removed_is_not_served() -> None:
    turns: Turns[str] = Turns(5)
    turns.put("a", "1")
    turns.put("a", "2")
    assert turns.remove("1")
    assert not turns.remove("1")
    assert (turns.position("1"), turns.position("2")) == (0, 1)
    assert taken(turns) == ["2"]


def test_a_closed_queue_hands_out_what_it_has_and_then_nothing() -> None:
    turns: Turns[str] = Turns(5)
    turns.put("a", "1")
    turns.close()
    with pytest.raises(QueueFull):
        turns.put("a", "2")
    assert turns.take() == "1"
    assert turns.take() is None


def test_take_waits_for_an_item() -> None:
    turns: Turns[str] = Turns(5)
    found: list[str | None] = []
    waiter = threading.Thread(target=lambda: found.append(turns.take()))
    waiter.start()
    turns.put("a", "1")
    waiter.join(10)
    assert found == ["1"]


def test_text_comes_in_whole_characters() -> None:
    stream = TextStream()
    euro = "€".encode()
    assert [stream.feed(euro[i : i + 1]) for i in range(3)] == ["", "", "€"]
    assert stream.feed(euro[:1]) == ""
    assert stream.finish() == "\ufffd"


def test_a_stop_sequence_ends_the_text_before_it() -> None:
    stream = TextStream(["END", "\n\n"])
    assert stream.feed(b"one E") == "one "
    assert stream.feed(b"N two ") == "EN two "
    assert stream.feed(b"EN") == ""
    assert not stream.stopped
    assert stream.feed(b"D three") == ""
    assert stream.stopped
    assert stream.finish() == ""


def test_of_two_stop_sequences_the_first_in_the_text_counts() -> None:
    stream = TextStream(["bb", "aa"])
    assert stream.feed(b"x aa bb") == "x "
    assert stream.stopped


def test_what_only_began_like_a_stop_sequence_is_said_in_the_end() -> None:
    stream = TextStream(["STOP"])
    assert stream.feed(b"ST") == ""
    assert stream.finish() == "ST"


def in_pieces(channels: Channels, text: str, size: int) -> dict[str, str]:
    found: dict[str, str] = {}
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    parts = [part for piece in pieces for part in channels.feed(piece)] + channels.finish()
    for part in parts:
        found[part.kind] = found.get(part.kind, "") + part.text
    return found


ANSWER = '<think>\nwell < 3</think>\n\nYes.<tool_call>\n{"name": "f"}\n</tool_call> Done'


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_an_answer_is_split_wherever_its_pieces_end(size: int) -> None:
    channels = Channels(reasoning=True, tools=True)
    assert in_pieces(channels, ANSWER, size) == {
        "reasoning": "\nwell < 3",
        "content": "Yes. Done",
        "tool": '\n{"name": "f"}\n',
    }


def test_tags_that_are_not_asked_for_are_text() -> None:
    channels = Channels(reasoning=False, tools=False)
    assert in_pieces(channels, ANSWER, 4) == {"content": ANSWER}


def test_a_prompt_that_has_opened_a_thought() -> None:
    channels = Channels(reasoning=True, tools=False, thinking=True)
    assert in_pieces(channels, "hm</think>so", 2) == {"reasoning": "hm", "content": "so"}


def test_a_tool_call_that_is_never_closed_is_content() -> None:
    channels = Channels(reasoning=False, tools=True)
    assert [*channels.feed('<tool_call>{"na'), *channels.finish()] == [
        Part("content", '<tool_call>{"na')
    ]


def test_tool_calls_are_parsed_leniently() -> None:
    assert parsed_call('{"name": "f", "arguments": {"a": 1}}') == {
        "name": "f",
        "arguments": '{"a": 1}',
    }
    assert parsed_call('{"name": "f", "parameters": {}}') == {"name": "f", "arguments": "{}"}
    for bad in ("", "[]", "{}", "null", '{"name": 3}', "f(x)"):
        assert parsed_call(bad) is None


def test_events_and_comments_are_one_block_each() -> None:
    event = sse.event({"text": "a\nb", "more": "ü"})
    assert event.startswith(b"data: ") and event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:]) == {"text": "a\nb", "more": "ü"}
    assert sse.comment("keepalive 3/\n4") == b": keepalive 3/ 4\n\n"
