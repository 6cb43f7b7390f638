"""Multiple choice: the choice that the model finds most likely after the question, for each mode.

For the tokens t of a choice after a prompt:  score = sum_i log p(t_i | prompt, t_1 .. t_{i-1}), and
the normalised score is that per byte of the choice's text, so that a long choice is not at a loss.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .evaluate import Progress, log_normaliser
from .forced import Model
from .rule import Rule
from .texts import read

Tokenize = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Question:
    """One question; `scores` has what each choice is worth, and the best are right."""

    prompt: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]

    def right(self, choice: int) -> bool:
        """Return whether this choice, by its number, is a best one."""
        return self.scores[choice] == max(self.scores)


@dataclass(frozen=True)
class ChoiceRow:
    """One mode on one file of questions: shares of `n`, and the standard errors of the first two.

    `agreement` is the share answered as exact does, right or wrong; the `_norm` ones are by the
    score a byte.
    """

    mode: str
    n: int
    accuracy: float
    accuracy_se: float
    accuracy_norm: float
    accuracy_norm_se: float
    agreement: float
    agreement_norm: float


# --------------------------------------------------------------------------------------------------
# files


def read_questions(path: Path) -> list[Question]:
    """Read a task: JSON lines of our own, or BIG-bench's task.json.

    A line is an object with "question", which is put as `Question: ... Answer:`, or "input", taken
    as it is; with "choices", a list of texts, and "answer", the number of the right one from 0; or
    with BIG-bench's "target_scores", from a choice's text to its worth. Raises UsageError, which
    names the line.
    """
    text = read(path)
    task = _whole(text, path)
    if task is not None:
        examples = task["examples"]
        questions = [
            _question(example, task, f"{path}: example {number}")
            for number, example in enumerate(examples, 1)
        ]
    else:
        questions = [
            _question(_line(line, f"{path}:{number}"), {}, f"{path}:{number}")
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    if not questions:
        raise UsageError(f"{path}: there is no question in it")
    return questions


def _whole(text: str, path: Path) -> dict[str, Any] | None:
    """Return the text as a BIG-bench task, or None where it is lines."""
    try:
        data = json.loads(text)
    except ValueError:
        return None
    if not isinstance(data, dict) or "choices" in data or "target_scores" in data:
        return None  # a single line, to be looked at as such
    if not isinstance(data.get("examples"), list):
        raise UsageError(f'{path}: it has no "examples", and is no line with "choices" either')
    return data


def _line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as exc:
        raise UsageError(f"{where}: it is not JSON: {exc}") from exc


def _question(data: Any, task: Mapping[str, Any], where: str) -> Question:
    if not isinstance(data, dict):
        raise UsageError(f"{where}: it is not an object")
    prompt = data.get("question", data.get("input"))
    if not isinstance(prompt, str):
        raise UsageError(f'{where}: there is no "question" or "input"')
    choices, scores = _choices(data, where)
    if len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UsageError(f"{where}: two choices at least are needed, each with a text")
    if task:
        prompt = _as_bigbench(prompt, choices, task)
    elif "question" in data:
        prompt = f"Question: {prompt}\nAnswer:"
    return Question(prompt, tuple(choices), tuple(scores))


def _choices(data: Mapping[str, Any], where: str) -> tuple[list[str], list[float]]:
    targets = data.get("target_scores")
    if isinstance(targets, dict) and targets:
        values = [*targets.values()]
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise UsageError(f'{where}: "target_scores" must be numbers')
        return [*targets], values
    choices, answer = data.get("choices"), data.get("answer")
    if not isinstance(choices, list):
        raise UsageError(f'{where}: there is no "choices" or "target_scores"')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UsageError(f'{where}: "answer" must be the number of a choice, from 0')
    return choices, [float(i == answer) for i in range(len(choices))]


def _as_bigbench(prompt: str, choices: Iterable[str], task: Mapping[str, Any]) -> str:
    """Put a question together with the task's own words, or with what BIG-bench has for them.

    The choices are shown sorted: in many files the right one comes first.
    """
    prompt = str(task.get("example_input_prefix", "\nQ: ")) + prompt
    if task.get("append_choices_to_input", True):
        mark = str(task.get("choice_prefix", "\n  choice: "))
        prompt += "".join(mark + choice for choice in sorted(choices))
    prompt += str(task.get("example_output_prefix", "\nA: "))
    return str(task.get("task_prefix", "")) + prompt


# --------------------------------------------------------------------------------------------------
# answers


@dataclass(frozen=True)
class _Tokens:
    """A question in tokens: all choices begin with `base`, and go on with `ends`."""

    base: tuple[int, ...]
    ends: tuple[tuple[int, ...], ...]


def _tokens(question: Question, tokenize: Tokenize, n_ctx: int, where: str) -> _Tokens:
    """Split each prompt with its choice where they part.

    They are tokenised together, since a tokenizer may join the prompt's end with the choice's
    start: then the split is before that token. A space is put between the two where none is.
    """
    body = question.prompt.rstrip(" ")
    # The space goes with the choice, as tokenizers have it.
    space = "" if not body or (body == question.prompt and body[-1].isspace()) else " "
    prompt = tokenize(body)
    wholes = [tokenize(body + space + choice) for choice in question.choices]
    common = 0
    while all(common < len(w) - 1 and w[common] == wholes[0][common] for w in wholes):
        if common >= len(prompt) or prompt[common] != wholes[0][common]:
            break
        common += 1
    longest = max(map(len, wholes))
    if not common:
        raise UsageError(f"{where}: its choices have no prompt in common")
    if longest > n_ctx:
        raise UsageError(
            f"{where}: {longest} tokens do not fit the context of {n_ctx}: raise it with -c"
        )
    return _Tokens(tuple(wholes[0][:common]), tuple(tuple(w[common:]) for w in wholes))


def answer(
    model: Model,
    questions: Sequence[Question],
    arms: Sequence[tuple[str, Rule]],
    tokenize: Tokenize,
    *,
    name: str = "questions",
    width: int = 1,
    on_progress: Progress | None = None,
) -> list[ChoiceRow]:
    """Answer every question under every rule; the others are compared with the first arm.

    The prompt is decoded once for all choices of a question, `width` tokens a step: as with
    `Sample`, more than 1 shows what generating gives only under a rule that is deterministic and
    per token. Raises UsageError for a question that does not fit the context, Cancelled, ReadError.
    """
    say = on_progress or (lambda mode, done: None)
    asked = [
        _tokens(question, tokenize, model.n_ctx, f"{name}: question {number}")
        for number, question in enumerate(questions, 1)
    ]
    rows: list[ChoiceRow] = []
    exact: list[tuple[int, int]] = []
    for mode, rule in arms:
        model.begin(rule)
        picked: list[tuple[int, int]] = []
        for number, (question, tokens) in enumerate(zip(questions, asked, strict=True)):
            say(mode, number / len(questions))
            scores = _scores(model, tokens, width)
            sizes = [len(choice.encode()) for choice in question.choices]
            by_byte = [score / size for score, size in zip(scores, sizes, strict=True)]
            picked.append((scores.index(max(scores)), by_byte.index(max(by_byte))))
        say(mode, 1.0)
        exact = exact or picked
        rows.append(_row(mode, questions, picked, exact))
    return rows


def _scores(model: Model, tokens: _Tokens, width: int) -> list[float]:
    """Return the log-likelihood of each choice."""
    first = _prompt(model, tokens.base, width)
    found = []
    for number, end in enumerate(tokens.ends):
        if number and len(tokens.ends[number - 1]) > 1 and not model.keep(len(tokens.base)):
            _prompt(model, tokens.base, width)
        score = float(first[end[0]]) - log_normaliser(first)
        for at in range(0, len(end) - 1, width):
            rows = model.decode(end[at : min(at + width, len(end) - 1)])
            for row, token in zip(rows, end[at + 1 :], strict=False):
                score += float(row[token]) - log_normaliser(row)
        found.append(score)
    return found


def _prompt(model: Model, tokens: Sequence[int], width: int) -> Any:
    """Decode the prompt in a new context and return the logits after it."""
    model.clear()
    last = (len(tokens) - 1) // width * width
    for at in range(0, last, width):
        model.decode(tokens[at : at + width], logits=False)
    return model.decode(tokens[last:])[-1]


def _row(
    mode: str,
    questions: Sequence[Question],
    picked: Sequence[tuple[int, int]],
    exact: Sequence[tuple[int, int]],
) -> ChoiceRow:
    n = len(questions)
    values = []
    for which in (0, 1):
        share = sum(q.right(p[which]) for q, p in zip(questions, picked, strict=True)) / n
        values += [share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else 0.0]
    agreed = [sum(p[i] == e[i] for p, e in zip(picked, exact, strict=True)) / n for i in (0, 1)]
    return ChoiceRow(mode, n, *values, *agreed)
