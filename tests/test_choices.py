from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from fakemodel import FakeModel

import hobbit
from hobbit.choices import ChoiceRow, Question, answer, read_questions
from hobbit.errors import UsageError
from hobbit.evaluate import log_normaliser
from hobbit.forced import Forced, Logits
from hobbit.rule import EXACT, Rule

LOSSY = Rule(t1=0.5)
ARMS = [("exact", EXACT), ("half", LOSSY)]


def by_letter(text: str) -> list[int]:
    """Make a token of each character, after one for the start."""
    return [1, *(ord(c) % 48 + 2 for c in text)]


def by_word(text: str) -> list[int]:
    """Make a token of each word with the space before it, as real tokenizers do."""
    words = text.replace(" ", "\0 ").split("\0")
    return [1, *(sum(map(ord, word)) % 48 + 2 for word in words if word)]


def questions(n: int = 30) -> list[Question]:
    rng = np.random.default_rng(5)

    def word() -> str:
        return "".join(chr(c) for c in rng.integers(97, 123, rng.integers(1, 9)))

    return [
        Question(
            f"what is {word()}?",
            tuple({word(): None for _ in range(4)}),
            (1.0, 0.0, 0.0, 0.0),
        )
        for _ in range(n)
    ]


def naive_scores(model: FakeModel, question: Question, rule: Rule, tokenize: Any) -> list[float]:
    start = len(tokenize(question.prompt))
    scores = []
    for choice in question.choices:
        tokens = tokenize(f"{question.prompt} {choice}")
        score = 0.0
        for i in range(start, len(tokens)):
            logits = model.logits_of(tokens[:i], rule)
            score += float(logits[tokens[i]]) - log_normaliser(logits)
        scores.append(score)
    return scores


@pytest.mark.parametrize("tokenize", [by_letter, by_word])
@pytest.mark.parametrize("width", [1, 3, 100])
def test_answers_are_those_of_a_naive_computation(tokenize: Any, width: int) -> None:
    asked, model = questions(), FakeModel()
    model.noise = 3.0
    rows = answer(model, asked, ARMS, tokenize, width=width)
    picks = {}
    for name, rule in ARMS:
        best = []
        for question in asked:
            scores = naive_scores(model, question, rule, tokenize)
            norm = [s / len(c.encode()) for s, c in zip(scores, question.choices, strict=True)]
            best.append((int(np.argmax(scores)), int(np.argmax(norm))))
        picks[name] = best
    n = len(asked)
    for row in rows:
        right = sum(pick[0] == 0 for pick in picks[row.mode]) / n
        right_norm = sum(pick[1] == 0 for pick in picks[row.mode]) / n
        pairs = [*zip(picks[row.mode], picks["exact"], strict=True)]
        assert row == ChoiceRow(
            row.mode,
            n,
            right,
            math.sqrt(right * (1 - right) / (n - 1)),
            right_norm,
            math.sqrt(right_norm * (1 - right_norm) / (n - 1)),
            sum(a[0] == b[0] for a, b in pairs) / n,
            sum(a[1] == b[1] for a, b in pairs) / n,
        )
    assert rows[0].agreement == rows[0].agreement_norm == 1
    assert rows[1].agreement < 1


def test_the_length_of_a_choice_is_in_bytes() -> None:
    """One letter of two bytes against two letters: all tokens cost the same."""

    class Even(FakeModel):
        def logits_of(self, context: Sequence[int], rule: Rule) -> Logits:
            return np.zeros(self.n_vocab, dtype=np.float32)

    asked = Question("which?", ("\u00e9", "ee"), (1, 0))
    (row,) = answer(Even(), [asked], ARMS[:1], by_letter)
    # With the space, 2 tokens over 2 bytes beat 3 over 2; a letter they would be 2 against 1.5.
    assert row.accuracy_norm == 1


def test_the_prompt_is_decoded_once() -> None:
    model = FakeModel()
    asked = [Question("abcdef", ("xy", "z", "uvw"), (1, 0, 0))]
    answer(model, asked, ARMS[:1], by_letter)
    # The start and six letters; then all but the last letter of the space and the choice.
    sizes = [call for call in model.calls if call[0] != "clear"]
    once = [("decode", 1)]
    assert sizes == [
        ("begin", 0), *once * 7, *once * 2, ("keep", 7), *once * 1, ("keep", 7), *once * 3,
    ]  # fmt: skip


def test_a_model_without_a_past_decodes_it_again() -> None:
    asked = questions(10)
    with_past, without = FakeModel(), FakeModel(recurrent=True)
    assert answer(with_past, asked, ARMS, by_letter) == answer(without, asked, ARMS, by_letter)
    assert without.cached > with_past.cached


def test_a_token_across_prompt_and_choice() -> None:
    """A tokenizer that joins the last letter with the space: the split is before that token."""

    def joining(text: str) -> Sequence[int]:
        return by_letter(text.replace("? ", "!"))

    model = FakeModel()
    assert answer(model, questions(5), ARMS[:1], joining)[0].n == 5
    decoded = sum(size for call, size in model.calls if call == "decode")
    plain = FakeModel()
    answer(plain, questions(5), ARMS[:1], by_letter)
    # One token fewer in each prompt; the choices are as long: "!x" for " x".
    assert sum(size for call, size in plain.calls if call == "decode") - decoded == 5


def test_too_long_a_question_is_told_before_anything_is_decoded() -> None:
    model = FakeModel(n_ctx=30)
    with pytest.raises(UsageError, match=r"t\.jsonl: question 2: \d+ tokens do not fit .* of 30"):
        asked = [Question("a", ("b", "c"), (1, 0)), *questions(1), Question("a" * 40, "bc", (1, 0))]
        answer(model, [asked[0], asked[2]], ARMS, by_letter, name="t.jsonl")
    assert model.calls == []


def test_no_prompt_at_all() -> None:
    with pytest.raises(UsageError, match="no prompt in common"):
        answer(FakeModel(), [Question("", ("b", "c"), (1, 0))], ARMS, lambda t: by_letter(t)[1:])


def test_with_a_model(tmp_path: Path) -> None:
    path = tiny.make_text_model(tmp_path / "m.gguf")
    asked = [
        Question("it is the", ("end of it", "a"), (1, 0)),
        Question("we were at", ("you", "they had"), (0, 1)),
    ]
    with hobbit.Llama(str(path), n_ctx=256, n_threads=1, memory="1G") as llm:
        arms = [("exact", EXACT), ("again", EXACT)]
        exact, again = answer(Forced(llm), asked, arms, lambda text: llm.tokenize(text.encode()))
        assert exact.n == 2 and again.agreement == 1
        assert exact == ChoiceRow(**{**again.__dict__, "mode": "exact"})


# --------------------------------------------------------------------------------------------------
# files


def written(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t.jsonl",
        {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1},
        {"input": "The sky is", "choices": ["blue", "green"], "answer": 0},
        {"input": "x", "target_scores": {"a": 0, "b": 1, "c": 1}},
    )
    assert read_questions(path) == [
        Question("Question: 2 + 2?\nAnswer:", ("3", "4"), (0, 1)),
        Question("The sky is", ("blue", "green"), (1, 0)),
        Question("x", ("a", "b", "c"), (0, 1, 1)),
    ]
    assert [read_questions(path)[2].right(i) for i in range(3)] == [False, True, True]


def test_bigbench(tmp_path: Path) -> None:
    task: dict[str, Any] = {
        "name": "t",
        "examples": [{"input": "1 + 1 =", "target_scores": {"3": 0, "2": 1}}],
    }
    path = tmp_path / "task.json"
    path.write_text(json.dumps(task, indent=2))
    plain = "\nQ: 1 + 1 =\n  choice: 2\n  choice: 3\nA: "
    assert read_questions(path) == [Question(plain, ("3", "2"), (0, 1))]
    task |= {"append_choices_to_input": False, "task_prefix": "Add.\n", "example_input_prefix": ""}
    path.write_text(json.dumps(task))
    assert read_questions(path)[0].prompt == "Add.\n1 + 1 =\nA: "


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "t.jsonl:1: it is not JSON"),
        ("[1]", "t.jsonl:1: it is not an object"),
        ('{"x": 1}', 'it has no "examples"'),
        ('{"choices": ["a", "b"], "answer": 0}', 'no "question" or "input"'),
        ('{"input": "x"}\n[]', 'no "choices" or "target_scores"'),
        ('{"input": "x", "choices": ["a", "b"], "answer": 2}', '"answer" must be the number'),
        ('{"input": "x", "choices": ["a", "b"], "answer": "a"}', '"answer" must be the number'),
        ('{"input": "x", "choices": ["a", "b"], "answer": true}', '"answer" must be the number'),
        ('{"input": "x", "choices": ["a"], "answer": 0}', "two choices at least"),
        ('{"input": "x", "choices": ["a", " "], "answer": 0}', "two choices at least"),
        ('{"input": "x", "target_scores": {"a": "1", "b": 0}}', "must be numbers"),
        ("", "there is no question in it"),
        ('{"name": "x",\n "subtasks": []}', 'it has no "examples"'),
        ('{"examples": []}', "there is no question in it"),
        ('{"examples": [5]}', "example 1: it is not an object"),
    ],
)
def test_bad_files(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError) as info:
        read_questions(path)
    assert message in str(info.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*absent: No such file"):
        read_questions(tmp_path / "absent")
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_questions(tmp_path / "b")
