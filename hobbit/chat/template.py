"""From messages to the tokens of a prompt, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import HobbitError, UsageError
from .transcript import Message

if TYPE_CHECKING:
    from ..llama import Llama


class ChatTemplate:
    """The model's template; with `raw`, or where it has none, texts follow one another as they are.

    `switches_thinking` says whether the template can be told to let the model think or not.
    """

    def __init__(self, llm: Llama, raw: bool = False) -> None:
        self._llm = llm
        self.text: str = "" if raw else llm.metadata.get("tokenizer.chat_template", "")
        self.switches_thinking = "enable_thinking" in self.text
        self._formatter = None
        if self.text:
            self._formatter = Jinja2ChatFormatter(
                template=self.text,
                eos_token=self._special(llm.token_eos()),
                bos_token=self._special(llm.token_bos()),
            )

    def _special(self, token: int) -> str:
        return self._llm._model.token_get_text(token) if token != -1 else ""

    def render(self, messages: Sequence[Message], think: bool | None = None) -> str:
        """Return the text that the model goes on with; `think` None leaves it to the template."""
        if self._formatter is None:
            return _joined(messages)
        wishes = {} if think is None else {"enable_thinking": think}
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self._formatter(messages=plain, **wishes).prompt)
        except Exception as exc:  # a template is the model's, and may fail in any way
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise HobbitError(f"the model's chat template fails: {reason}") from exc

    def check_switch(self) -> None:
        """Raise UsageError where the template does not let one choose."""
        if not self.switches_thinking:
            raise UsageError("this model's chat template has no switch for thinking")

    def opens_thoughts(self, think: bool | None = None) -> bool:
        """Whether an answer begins within thoughts, as the template has opened them."""
        question = [Message("user", "?")]
        return self.render(question, think).rstrip().endswith("<think>")

    def tokens(self, text: str) -> list[int]:
        """Return the tokens of a rendered text."""
        # A template writes the begin-of-sequence token itself.
        bos = self._formatter is None and self._llm._model.add_bos_token()
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
