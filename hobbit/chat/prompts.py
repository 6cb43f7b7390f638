"""From messages to the tokens of a prompt, by the model's own chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..harmony import FINAL
from ..template import opens_thoughts, template_of
from .transcript import Message

if TYPE_CHECKING:
    from ..llama import Llama

_THOUGHTS = re.compile(r"<think>.*?(</think>\s*|$)", re.DOTALL)


class Prompts:
    """Prompts for a model; with `raw`, or where it has no template, texts follow one another."""

    def __init__(self, llm: Llama, raw: bool = False) -> None:
        self._llm = llm
        self._template = None if raw else template_of(llm)

    @property
    def text(self) -> str:
        """The template as the model's file has it; empty where there is none."""
        return self._template.text if self._template else ""

    @property
    def switches_thinking(self) -> bool:
        """Whether the template can be told to let the model think or not."""
        return self._template is not None and self._template.switches_thinking

    @property
    def has_channels(self) -> bool:
        """Whether answers have channels: see harmony.py."""
        return self._template is not None and self._template.is_harmony

    def render(
        self, messages: Sequence[Message], think: bool | None = None, *, plain: bool = False
    ) -> str:
        """Return the text that the model goes on with; `think` None leaves it to the template.

        `plain`: what follows is the answer's words and nothing else, as a grammar wants it.
        """
        if self._template is None:
            return _joined(messages)
        wishes = {} if think is None else {"enable_thinking": think}
        text = self._template.render([self._told(message) for message in messages], **wishes)
        return text + FINAL if plain and self.has_channels else text

    def _told(self, message: Message) -> dict[str, str]:
        content = message.content
        if self.has_channels and message.role == "assistant":
            content = _THOUGHTS.sub("", content)  # this template wants them elsewhere, if at all
        return {"role": message.role, "content": content}

    def check_switch(self) -> None:
        """Raise UsageError where the template does not let one choose."""
        if not self.switches_thinking:
            raise UsageError("this model's chat template has no switch for thinking")

    def opens_thoughts(self, think: bool | None = None) -> bool:
        """Whether an answer begins within thoughts, as the template has opened them."""
        return opens_thoughts(self.render([Message("user", "?")], think))

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""
        # A template writes the begin-of-sequence token itself.
        bos = self._template is None and self._llm._model.add_bos_token()
        return list(self._llm.tokenize(text.encode(), add_bos=bos, special=True))

    def continued(self, before: Sequence[int], rest: str, whole: Sequence[int]) -> list[int] | None:
        """Return `before` with tokens for the rest of a text; `whole` are all of the text's own.

        None where that would not say the same. Some tokenisers put a space before whatever they
        are given: it may then be the rest's own.
        """
        said = self._llm.detokenize(list(whole), special=True)
        for given in (rest, rest.removeprefix(" ")):
            more = self._llm.tokenize(given.encode(), add_bos=False, special=True)
            tokens = [*before, *more]
            if self._llm.detokenize(tokens, special=True) == said:
                return tokens
        return None


def _joined(messages: Sequence[Message]) -> str:
    text = ""
    for message in messages:
        # An answer goes on where the question ends.
        between = "\n" if text and message.role == "user" else ""
        text += between + message.content
    return text
