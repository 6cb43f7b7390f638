"""A model's own chat template: from messages to the text that the model goes on with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from . import harmony
from .errors import HobbitError

if TYPE_CHECKING:
    from .llama import Llama

_KEY = "tokenizer.chat_template"
_OPENED = "<think>"


class ChatTemplate:
    """`text` is Jinja, as the model's file has it; `ends` what begins and ends a text."""

    def __init__(self, text: str, ends: tuple[str, str]) -> None:
        self.text = text
        self._ends = ends

    @property
    def thinks(self) -> bool:
        """Whether this model writes its thoughts between <think> tags."""
        return "<think>" in self.text or "</think>" in self.text

    @property
    def is_harmony(self) -> bool:
        """Whether its answers have channels: see harmony.py."""
        return harmony.is_format_of(self.text)

    @property
    def switches_thinking(self) -> bool:
        """Whether it can be told to let the model think or not."""
        return "enable_thinking" in self.text

    def render(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """Return the text before the answer; HobbitError where the template fails, or refuses."""
        try:
            return str(self._formatter(messages=messages, **more).prompt)
        except Exception as exc:  # a template is the model's, and may fail in any way
            reason = " ".join(str(exc).split()) or type(exc).__name__
            raise HobbitError(f"the model's chat template fails: {reason}") from exc

    @cached_property
    def _formatter(self) -> Any:
        bos, eos = self._ends
        return Jinja2ChatFormatter(template=self.text, bos_token=bos, eos_token=eos)


def template_of(llm: Llama) -> ChatTemplate | None:
    """Return a loaded model's template, where it has one."""
    text = llm.metadata.get(_KEY)
    return ChatTemplate(text, ends_of(llm)) if text else None


def ends_of(llm: Llama) -> tuple[str, str]:
    """Return the texts of the tokens that begin and end a text; empty where there is none."""

    def text(token: int) -> str:
        return str(llm._model.token_get_text(token)) if token >= 0 else ""

    return text(llm.token_bos()), text(llm.token_eos())


def opens_thoughts(prompt: str) -> bool:
    """Whether an answer begins within thoughts, as the prompt has opened them."""
    return prompt.rstrip().endswith(_OPENED)
