"""A conversation with a loaded model. It needs no terminal."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HobbitError, UsageError
from ..generate import Prompt, Result, Sampling, generate
from ..options import MAX_SEED, Options, chosen_quality
from ..quality import Quality
from . import transcript
from .prompts import Prompts
from .session_file import SessionFile
from .transcript import Message

if TYPE_CHECKING:
    from ..llama import Llama

Loader = Callable[[Options, Quality], "Llama"]
OnText = Callable[[str], None]

# Turns are dropped when less than this part of the context is left for an answer, and until this
# part of it is free: what stays has to be read again, so it should not happen often.
_LEAST_ROOM = 1 / 8
_ROOM_AFTER = 1 / 2


class ModelLost(HobbitError):
    """There is no model any more that could answer."""


@dataclass(frozen=True)
class Reply:
    """What came of a question: `answer` as it is kept.

    `dropped` turns no longer fitted, and `cut` says that the context ended within the answer.
    `kept` is false where the question was taken back, because no word of an answer came.
    """

    result: Result
    answer: str
    dropped: int = 0
    cut: bool = False
    kept: bool = True

    def notes(self, keeper: str) -> list[str]:
        """Return what is to be known of it, in sentences; `keeper` still has all turns."""
        said = []
        if self.dropped:
            turns = "1 oldest turn" if self.dropped == 1 else f"{self.dropped} oldest turns"
            said.append(f"the context was full: {turns} left out of it ({keeper} still has them)")
        if self.cut:
            said.append(
                "the context is full: the answer ends here, and the oldest turns will make room"
            )
        if not self.kept:
            said.append("stopped before the answer began: the message was taken back")
        return said


@dataclass(frozen=True)
class _Fitted:
    """A prompt that fits the context: its text, its tokens, and the first message it has."""

    text: str
    tokens: tuple[int, ...]
    first: int
    dropped: int


class Session:
    """The messages, the settings and the model that answers.

    What the model has read stays in its KV cache: of a turn only what is new is evaluated. `load`
    makes the model anew where a quality needs that. `close` closes whichever model there is.

    With a `file` it goes on with the conversation that is kept there; `system` takes the place of
    the system prompt there is in it. `keep` is for when a turn has ended.
    """

    def __init__(
        self,
        llm: Llama,
        sampling: Sampling,
        options: Options | None = None,
        *,
        quality: Quality | None = None,
        system: str = "",
        load: Loader | None = None,
        file: SessionFile | None = None,
    ) -> None:
        self.llm = llm
        self.sampling = sampling
        self.options = options or Options()
        self.system = system
        self.messages: list[Message] = []
        self.think: bool | None = None
        self.prompts = Prompts(llm, self.options.raw)
        self.file = file
        self._load = load
        self._first = 0  # the first message that the model still sees
        self._asked = 0
        self._quality = quality or llm.quality  # as chosen, before the plan had its say
        # The text in the KV cache, and its tokens.
        self._read: tuple[str, tuple[int, ...]] = "", ()
        if file is not None and file.messages:
            self._restore(file.messages)
            self.system = system or self.system
        self._kept = self.conversation

    def close(self) -> None:
        self.llm.close()

    @property
    def conversation(self) -> list[Message]:
        """All of it, with what no longer fits the context; the system prompt is the first."""
        system = [Message("system", self.system)] if self.system else []
        return [*system, *self.messages]

    def keep(self) -> None:
        """Write the conversation to its file, if it has one and something has changed.

        Raises HobbitError where that cannot be; the file then has what it had.
        """
        conversation = self.conversation
        if self.file is not None and conversation != self._kept:
            self.file.write(conversation)
            self._kept = conversation

    @property
    def last_question(self) -> str | None:
        return next((m.content for m in reversed(self.messages) if m.role == "user"), None)

    def ask(self, text: str, on_text: OnText, on_tick: Callable[[], None] | None = None) -> Reply:
        """Answer a message; `on_text` gets the pieces of the answer, as in `generate`.

        When it is interrupted, or fails, what came of the answer stays in the conversation; where
        nothing came the question does not stay either. Errors are raised after that. A model that
        lost its device is loaded anew first.
        """
        return self._answer([*self.messages, Message("user", text)], on_text, on_tick)

    def regenerate(self, on_text: OnText, on_tick: Callable[[], None] | None = None) -> Reply:
        """Answer the last message once more, with another seed."""
        return self._answer(self._up_to_last_question(), on_text, on_tick)

    def ask_instead(
        self, text: str, on_text: OnText, on_tick: Callable[[], None] | None = None
    ) -> Reply:
        """Answer this message in place of the last one."""
        before = self._up_to_last_question()[:-1]
        return self._answer([*before, Message("user", text)], on_text, on_tick)

    def _up_to_last_question(self) -> list[Message]:
        kept = list(self.messages)
        while kept and kept[-1].role != "user":
            kept.pop()
        if not kept:
            raise UsageError("there is no message yet")
        return kept

    def _answer(
        self, messages: list[Message], on_text: OnText, on_tick: Callable[[], None] | None
    ) -> Reply:
        if self.llm.is_lost and self._load is not None:
            self.llm.close()
            self._use(self._load(self.options, self._quality))
        fitted = self._fitted(messages)
        said: list[str] = []

        def heard(piece: str) -> None:
            said.append(piece)
            on_text(piece)

        sampling = self._next_sampling()
        finished = False
        try:
            channels = self.prompts.has_channels and not sampling.grammar
            prompt = Prompt(tokens=fitted.tokens, channels=channels)
            result = generate(self.llm, prompt, sampling, heard, on_tick)
            finished = result.signal is None
        finally:
            answer = "".join(said)
            kept = finished or bool(answer)
            if kept:
                self.messages = [*messages, Message("assistant", answer)]
                self._first = fitted.first
            self._remember(fitted, answer)
        full = len(self.llm.eval_tokens) + 1 >= self.llm.n_ctx()
        cut = full and result.finish_reason == "length"
        return Reply(result, answer, fitted.dropped, cut, kept)

    def _next_sampling(self) -> Sampling:
        """Return the settings with a seed of this answer's own."""
        seed = self.sampling.seed
        if seed is not None:
            seed = (seed + self._asked) % (MAX_SEED + 1)
        self._asked += 1
        return replace(self.sampling, seed=seed)

    def _fitted(self, messages: Sequence[Message]) -> _Fitted:
        """Return the prompt of what the context has room for: without the oldest turns, if need be.

        Raises UsageError where not even the last message fits.
        """
        size: int = self.llm.n_ctx()

        def leaves_room(start: int) -> bool:
            return len(self._prompt(messages[start:])[1]) <= size * _ROOM_AFTER

        limit = self.sampling.max_tokens
        room = max(min(int(size * _LEAST_ROOM), limit or size), 1)
        first, dropped = min(self._first, len(messages) - 1), 0
        text, tokens = self._prompt(messages[first:])
        if len(tokens) + room > size:
            later = [i for i in range(first + 1, len(messages)) if messages[i].role == "user"]
            if later:
                # Few are tried: a session may have a thousand, each rendered with all after it.
                dropped = min(bisect_left(later, True, key=leaves_room) + 1, len(later))
                first = later[dropped - 1]
                text, tokens = self._prompt(messages[first:])
        if len(tokens) >= size:
            raise UsageError(
                f"the message does not fit: with it the prompt has {len(tokens)} tokens, and the "
                f"context {size}; a larger one is set with -c when hobbit starts"
            )
        return _Fitted(text, tuple(tokens), first, dropped)

    def _prompt(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        system = [Message("system", self.system)] if self.system else []
        plain = bool(self.sampling.grammar)
        text = self.prompts.render([*system, *messages], self.think, plain=plain)
        whole = self.prompts.tokens(text)
        known, tokens = self._read
        if tokens and text.startswith(known):
            # The tokens of an answer stay as they were sampled: its text may be cut otherwise.
            continued = self.prompts.continued(tokens, text[len(known) :], whole)
            return text, continued or whole
        return text, whole

    def _remember(self, fitted: _Fitted, answer: str) -> None:
        """Remember as much of prompt and answer as is in the KV cache and in the text alike."""
        evaluated = [int(token) for token in self.llm.eval_tokens]
        start = len(fitted.tokens)
        if tuple(evaluated[:start]) != fitted.tokens:
            self._read = "", ()
            return
        sampled = evaluated[start:]
        while sampled:
            text = self.llm.detokenize(sampled, prev_tokens=list(fitted.tokens))
            if answer.encode().startswith(text):
                break
            sampled.pop()
        spoken = text.decode(errors="ignore") if sampled else ""
        self._read = fitted.text + spoken, (*fitted.tokens, *sampled)

    def clear(self) -> None:
        """Forget what was said; the system prompt and the settings stay."""
        self.messages, self._first = [], 0

    def set_memory(self, size: str) -> None:
        """Change the memory cap. What the model has read stays."""
        self.llm.set_memory(size)
        self.options = replace(self.options, memory=size)

    def set_quality(self, name: str) -> bool:
        """Change the quality; whether the model was loaded again for it.

        After that, all of the conversation is read again with the next message. Where the new model
        cannot be loaded, it is loaded as it was before, and the error raised: ModelLost where that
        cannot be either.
        """
        low_file = None if self.llm.layout.low else self.options.low_file
        wanted = replace(
            self.options, quality=name, t1=None, t2=None, patience=0, low_file=low_file
        )
        quality = chosen_quality(wanted, self.llm.layout)
        reloads = not self.llm.takes_quality(quality)
        if reloads:
            self._reload(wanted, quality)
        else:
            self.llm.set_quality(quality)
        self._quality = quality
        self.options = replace(wanted, low_file=self.options.low_file)
        return reloads

    def _reload(self, options: Options, quality: Quality) -> None:
        if self._load is None:
            raise UsageError(f"quality {quality.name} needs the model to be loaded with it")
        before = self.options, self._quality
        self.llm.close()
        try:
            self._use(self._load(options, quality))
        except HobbitError as exc:
            try:
                self._use(self._load(*before))
            except HobbitError as error:
                raise ModelLost(f"{exc}; and it could not be loaded as it was: {error}") from error
            raise

    def _use(self, llm: Llama) -> None:
        self.llm = llm
        self.prompts = Prompts(llm, self.options.raw)
        self._read = "", ()

    def save(self, path: Path) -> None:
        """Write the whole conversation, with what no longer fits the context."""
        if not self.messages:
            raise UsageError("there is nothing to save yet")
        transcript.save(path, self.conversation)

    def load(self, path: Path) -> None:
        """Go on with a saved conversation in place of this one."""
        self._restore(transcript.load(path))

    def _restore(self, messages: Sequence[Message]) -> None:
        has_system = messages[0].role == "system"
        self.system = messages[0].content if has_system else ""
        self.messages, self._first = [*messages[has_system:]], 0
