"""The conversation without a terminal: what the model reads, what is kept, what is saved."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from mixed import pair

import hobbit
from hobbit.chat import transcript
from hobbit.chat.display import Display
from hobbit.chat.interrupts import Interrupts
from hobbit.chat.loop import Chat
from hobbit.chat.prompts import Prompts
from hobbit.chat.session import Session
from hobbit.chat.transcript import Message
from hobbit.chat.view import Live
from hobbit.cli.signals import Terminated
from hobbit.errors import Cancelled, HobbitError, ReadError, UsageError
from hobbit.generate import Sampling
from hobbit.options import Options
from hobbit.quality import Quality
from hobbit.render import Screen
from hobbit.rule import Rule

ARGUMENTS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "memory": "1G"}
SAMPLING = Sampling(max_tokens=8, seed=1)


def mute(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    return tiny.make_text_model(folder / "m.gguf", chat=True, template=tiny.CONTROL_TEMPLATE)


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[hobbit.Llama]:
    with hobbit.Llama(str(path), **ARGUMENTS) as made:
        yield made


@pytest.fixture
def session(llm: hobbit.Llama) -> Session:
    llm.reset()
    return Session(llm, SAMPLING)


def contents(session: Session) -> list[str]:
    return [message.content for message in session.messages]


def whole(session: Session) -> int:
    """Return how many tokens the conversation has."""
    template = session.prompts
    return len(template.tokens(template.render(session.messages)))


def test_a_turn_evaluates_what_is_new_and_nothing_else(session: Session) -> None:
    # Its answer ends by itself, as that of a real model: every token of it was evaluated.
    session.sampling = Sampling(seed=1, grammar='root ::= " the of and"')
    first = session.ask("the way of the sea", mute)
    assert (first.result.finish_reason, first.result.text) == ("stop", " the of and")
    before = len(session.llm.eval_tokens)
    second = session.ask("and the sky", mute)
    new = session.prompts.tokens("</s>user:and the sky</s>assistant:")
    assert second.result.stats.tokens_prompt == len(new)
    assert len(session.llm.eval_tokens) == before + len(new) + second.result.stats.tokens_generated
    assert second.result.stats.tokens_prompt < whole(session) - len(new)
    assert [m.role for m in session.messages] == ["user", "assistant"] * 2


def test_what_is_kept_is_what_a_fresh_model_would_read(session: Session, path: Path) -> None:
    """Greedy, the second answer is the same with the KV cache of the first turn and without."""
    session.sampling = Sampling(max_tokens=8, temperature=0.0, seed=1)
    for text in ("the way of the sea", "and the sky"):
        session.ask(text, mute)
    tokens = session.llm.eval_tokens
    with hobbit.Llama(str(path), **ARGUMENTS) as fresh:
        prompt = list(tokens)[:-7]
        found = fresh.create_completion(prompt, max_tokens=8, temperature=0.0, min_p=0.05)
    assert found["choices"][0]["text"] == session.messages[-1].content


def test_without_control_tokens_the_common_part_is_reused(tmp_path: Path) -> None:
    model = tiny.make_text_model(tmp_path / "m.gguf", chat=True)
    with hobbit.Llama(str(model), **ARGUMENTS) as llm:
        session = Session(llm, SAMPLING)
        session.ask("the way of the sea", mute)
        second = session.ask("and the sky", mute)
        assert 0 < second.result.stats.tokens_prompt < whole(session)


def test_each_answer_has_a_seed_of_its_own(session: Session) -> None:
    one = session.ask("the sea", mute).result.text
    two = session.regenerate(mute).result.text
    assert one != two
    assert contents(session) == ["the sea", two]
    again = Session(session.llm, SAMPLING)
    session.llm.reset()
    assert again.ask("the sea", mute).result.text == one


def test_another_question_in_place_of_the_last(session: Session) -> None:
    session.ask("the sea", mute)
    session.ask("the sky", mute)
    session.ask_instead("the way", mute)
    assert contents(session)[0::2] == ["the sea", "the way"]
    assert session.last_question == "the way"


def test_nothing_to_answer_again(session: Session) -> None:
    with pytest.raises(UsageError, match="there is no message yet"):
        session.regenerate(mute)


def interrupting(after: int) -> Callable[[str], None]:
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == after:
            os.kill(os.getpid(), signal.SIGINT)

    return on_text


def test_an_interrupted_answer_stays_and_the_next_goes_on(session: Session) -> None:
    session.sampling = Sampling(seed=1)
    reply = session.ask("the sea", interrupting(3))
    assert (reply.result.finish_reason, reply.kept) == ("cancelled", True)
    assert contents(session) == ["the sea", reply.result.text]
    session.sampling = SAMPLING
    more = session.ask("the sky", mute)
    assert more.result.stats.tokens_prompt < whole(session) - 8
    assert len(session.messages) == 4


def test_a_question_without_a_word_of_answer_is_taken_back(session: Session) -> None:
    session.ask("the sea", mute)
    said = contents(session)
    session.llm.cancel()  # the next evaluation, which is the prompt's, ends at once
    with pytest.raises(Cancelled):
        session.ask("the sky", mute)
    assert contents(session) == said


def test_a_read_error_is_raised_and_what_was_said_stays(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = hobbit.Llama.eval
    calls = 0

    def failing(self: hobbit.Llama, tokens: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise ReadError("m.gguf at 5: input/output error")
        evaluated(self, tokens)

    with monkeypatch.context() as patched:
        patched.setattr(hobbit.Llama, "eval", failing)
        with pytest.raises(ReadError):
            session.ask("the sea", mute)
    assert session.messages[0] == Message("user", "the sea")
    assert session.messages[1].content
    assert session.ask("the sky", mute).kept


def test_a_full_context_drops_the_oldest_turns(session: Session) -> None:
    session.sampling = Sampling(max_tokens=20, seed=1)
    session.system = "be brief"
    replies = [session.ask(f"the sea {i}", mute) for i in range(12)]
    dropped = [reply.dropped for reply in replies]
    assert sum(dropped) > 0
    # Many at once, and then none for some turns.
    assert max(dropped) > 1
    assert all(b == 0 for a, b in itertools.pairwise(dropped) if a)
    assert len(session.messages) == 24
    prompt, _ = session._prompt(session.messages[session._first :])
    assert prompt.startswith("system:be brief</s>user:the sea ")
    assert "the sea 0" not in prompt


def test_an_answer_that_fills_the_context_is_cut(session: Session) -> None:
    session.sampling = Sampling(seed=1)
    reply = session.ask("the sea", mute)
    assert (reply.cut, reply.result.finish_reason) == (True, "length")
    assert len(session.llm.eval_tokens) + 1 >= 256
    session.sampling = SAMPLING
    after = session.ask("the sky", mute)
    assert (after.dropped, after.cut) == (1, False)


def test_an_answer_that_its_limit_ends_is_not_cut(session: Session) -> None:
    assert not session.ask("the sea", mute).cut


def test_a_message_longer_than_the_context(session: Session) -> None:
    session.ask("the sea", mute)
    said = contents(session)
    with pytest.raises(UsageError, match=r"the message does not fit: .* and the context 256"):
        session.ask("the sea " * 300, mute)
    assert contents(session) == said
    assert session.ask("the sky", mute).kept


def test_the_template_is_told_to_think_or_not(session: Session) -> None:
    assert session.prompts.switches_thinking
    question = [Message("user", "x")]
    assert session.prompts.render(question).endswith("assistant:")
    assert session.prompts.render(question, False).endswith("assistant: no")


def test_a_template_that_fails_is_one_error(llm: hobbit.Llama, session: Session) -> None:
    metadata = {**llm.metadata, "tokenizer.chat_template": "{{ raise_exception('roles') }}"}
    kept, llm.metadata = llm.metadata, metadata
    try:
        session.prompts = Prompts(llm)
    finally:
        llm.metadata = kept
    with pytest.raises(HobbitError, match="the model's chat template fails: roles"):
        session.ask("the sea", mute)
    assert session.messages == []


def test_raw_texts_follow_each_other(llm: hobbit.Llama) -> None:
    session = Session(llm, SAMPLING, Options(raw=True))
    messages = [Message("user", "a"), Message("assistant", " b"), Message("user", "c")]
    assert session.prompts.render(messages) == "a b\nc"
    assert session.prompts.tokens("a")[0] == llm.token_bos()


def test_an_interrupt_waits_for_what_is_half_done() -> None:
    done: list[str] = []

    def pressed_twice(text: str) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        done.append(text)

    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            interrupts.after(pressed_twice)("x")
        assert done == ["x"]
        interrupts.after(pressed_twice)("y")  # only the first counts
    assert done == ["x", "y"]
    with Interrupts(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --------------------------------------------------------------------------------------------------
# files


def test_saved_and_loaded(session: Session, tmp_path: Path) -> None:
    session.system = "be brief"
    session.ask("the\nsea", mute)
    session.save(tmp_path / "c.jsonl")
    other = Session(session.llm, SAMPLING)
    other.load(tmp_path / "c.jsonl")
    assert (other.system, other.messages) == (session.system, session.messages)
    assert other.ask("the sky", mute).kept
    session.save(tmp_path / "c.md")
    text = (tmp_path / "c.md").read_text()
    assert text.startswith("## System\n\nbe brief\n\n## User\n\nthe\nsea\n\n## Assistant\n\n")
    assert [*tmp_path.glob(".*")] == []


def test_nothing_to_save(session: Session, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to save"):
        session.save(tmp_path / "c.jsonl")


LINE = '{"role": "user", "content": "x"}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "cannot read .*none.jsonl: No such file"),
        ("c.md", "x", r"\.md is for reading"),
        ("c.jsonl", "", "has no messages"),
        ("c.jsonl", LINE + "\nnot json", ":2: is no message"),
        ("c.jsonl", "[" * 100_000, ":1: is no message"),
        ("c.jsonl", '{"role": "god", "content": "x"}', ":1: is no message"),
        ("c.jsonl", '{"role": "user", "content": 5}', ":1: is no message"),
        ("c.jsonl", '["role"]', ":1: is no message"),
        ("c.jsonl", LINE + '\n{"role": "system", "content": "x"}', "only the first"),
        ("c.jsonl", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_what_cannot_be_loaded_changes_nothing(
    session: Session, tmp_path: Path, name: str, text: str | bytes | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    session.messages = [Message("user", "kept")]
    with pytest.raises(UsageError, match=message):
        session.load(tmp_path / name)
    assert contents(session) == ["kept"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HobbitError, match=r"cannot write .*/file/c\.jsonl: "):
        transcript.save(tmp_path / "file" / "c.jsonl", [Message("user", "x")])


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert transcript.place("trip") == tmp_path / "hobbit" / "chats" / "trip.jsonl"
    assert transcript.place("a/b.md") == Path("a/b.md")
    with pytest.raises(UsageError, match=r"must end in \.md or \.jsonl"):
        transcript.place("c.txt")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert transcript.place("trip") == Path.home() / ".local/state/hobbit/chats/trip.jsonl"


def test_a_line_is_a_message(session: Session, tmp_path: Path) -> None:
    session.messages = [Message("user", "é\n\u2028\x85")]
    session.save(tmp_path / "c.jsonl")
    line = (tmp_path / "c.jsonl").read_text(encoding="utf-8")
    assert json.loads(line) == {"role": "user", "content": "é\n\u2028\x85"}
    assert line.startswith('{"role": "user", "content": "é')
    other = Session(session.llm, SAMPLING)
    other.load(tmp_path / "c.jsonl")
    assert other.messages == session.messages


# --------------------------------------------------------------------------------------------------
# memory and quality


def test_another_cap_keeps_what_was_read(path: Path) -> None:
    with hobbit.Llama(str(path), **ARGUMENTS) as llm:
        session = Session(llm, SAMPLING)
        session.ask("the sea", mute)
        session.set_memory("900M")
        assert (llm.stats.cap_bytes, session.options.memory) == (900 << 20, "900M")
        with pytest.raises(hobbit.PlanError):
            session.set_memory("10M")
        assert (llm.stats.cap_bytes, session.options.memory) == (900 << 20, "900M")
        second = session.ask("the sky", mute)
        assert second.result.stats.tokens_prompt < whole(session) - 8


@pytest.fixture
def qualities(
    tmp_path: Path, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Callable[[Any], Quality]]]:
    """A model with low copies, and qualities by name that need no calibration."""
    high, low = pair(bench, "qwen3moe")

    def chosen(options: Options, layout: Any) -> Quality:
        from hobbit.quality import low_copies

        if options.quality == "exact":
            return Quality("exact", Rule())
        if options.quality != "fast":
            raise UsageError(f"{options.quality}: is no quality")
        return Quality("fast", Rule(0.2, 0.9), low_copies(layout, None if layout.low else low))

    monkeypatch.setattr("hobbit.chat.session.chosen_quality", chosen)
    return high, {"fast": lambda layout: chosen(Options(quality="fast"), layout)}


def test_a_quality_without_low_copies_loads_the_model_again(qualities: Any, tmp_path: Path) -> None:
    high, _ = qualities
    loads: list[tuple[str, str]] = []

    def load(options: Options, quality: Quality) -> hobbit.Llama:
        loads.append((options.memory, quality.name))
        return hobbit.Llama(str(high), quality=quality, **ARGUMENTS | {"memory": options.memory})

    options = Options(memory="1G", raw=True)
    session = Session(load(options, Quality("exact", Rule())), SAMPLING, options, load=load)
    try:
        session.ask("the sea", mute)
        said = contents(session)
        assert session.set_quality("fast") is True
        assert session.llm.quality.name == "fast"
        assert contents(session) == said
        second = session.ask("the sky", mute)
        assert second.result.stats.tokens_prompt > 8  # all of it, for the model is new
        assert second.result.stats.pairs_low > 0
        # There are low copies now: what follows takes effect at once.
        assert session.set_quality("exact") is False
        third = session.ask("the way", mute)
        assert third.result.stats.pairs_low == 0
        assert session.set_quality("fast") is False
        assert session.ask("the sea", mute).result.stats.pairs_low > 0
        with pytest.raises(UsageError, match="is no quality"):
            session.set_quality("best")
        assert session.llm.quality.name == "fast"
    finally:
        session.close()
    assert loads == [("1G", "exact"), ("1G", "fast")]


def test_a_model_that_cannot_be_loaded_again_is_loaded_as_it_was(qualities: Any) -> None:
    high, _ = qualities

    def load(options: Options, quality: Quality) -> hobbit.Llama:
        if quality.name == "fast":
            raise hobbit.PlanError("too small", 1)
        return hobbit.Llama(str(high), quality=quality, **ARGUMENTS)

    options = Options(raw=True)
    session = Session(load(options, Quality("exact", Rule())), SAMPLING, options, load=load)
    try:
        session.ask("the sea", mute)
        with pytest.raises(hobbit.PlanError):
            session.set_quality("fast")
        assert session.llm.quality.name == "exact"
        assert session.options.quality == "exact"
        session.ask("the sky", mute)
        assert len(session.messages) == 4
    finally:
        session.close()


def chat_with(session: Session) -> Chat:
    display = Display(Live(session.llm), mute, screen_codes=False, quiet=True)
    return Chat(session, display, Screen(quiet=True))


def test_ctrl_c_waits_for_a_model_that_is_loaded_again(qualities: Any) -> None:
    high, _ = qualities

    def load(options: Options, quality: Quality) -> hobbit.Llama:
        if quality.name == "fast":
            os.kill(os.getpid(), signal.SIGINT)
        return hobbit.Llama(str(high), quality=quality, **ARGUMENTS)

    options = Options(raw=True)
    session = Session(load(options, Quality("exact", Rule())), SAMPLING, options, load=load)
    try:
        chat = chat_with(session)
        chat._do("/quality fast", instead=False)
        assert session.llm.quality.name == "fast"
        chat._do("the sea", instead=False)
        assert len(session.messages) == 2
    finally:
        session.close()


def test_a_chat_whose_model_is_lost_ends(qualities: Any) -> None:
    high, _ = qualities
    loads = []

    def load(options: Options, quality: Quality) -> hobbit.Llama:
        loads.append(quality.name)
        if len(loads) > 1:
            raise hobbit.PlanError("too small", 1)
        return hobbit.Llama(str(high), quality=quality, **ARGUMENTS)

    options = Options(raw=True)
    session = Session(load(options, Quality("exact", Rule())), SAMPLING, options, load=load)
    with pytest.raises(HobbitError, match="could not be loaded as it was: too small"):
        chat_with(session)._do("/quality fast", instead=False)
    assert loads == ["exact", "fast", "exact"]
    session.close()


def test_a_kill_while_the_model_is_loaded_again_ends_the_chat(qualities: Any) -> None:
    high, _ = qualities

    def load(options: Options, quality: Quality) -> hobbit.Llama:
        if quality.name == "fast":
            raise Terminated(signal.SIGTERM)
        return hobbit.Llama(str(high), quality=quality, **ARGUMENTS)

    options = Options(raw=True)
    session = Session(load(options, Quality("exact", Rule())), SAMPLING, options, load=load)
    with pytest.raises(Terminated):
        chat_with(session)._do("/quality fast", instead=False)
    session.close()
